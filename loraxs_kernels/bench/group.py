"""What do layers that share their input gain from one read of it (`forward_together`)?  Forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import reference
from ..linear import LoRAXSLinear, forward_together
from . import timer
from .layer import Row, failure, figures, release, timed
from .paths import Operands, fused
from .shapes import MODELS, Shape

if TYPE_CHECKING:
    from .settings import Settings

SHARING = (("q", "k", "v"), ("gate", "up"))


def _separate(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


# What each does with the layers, or with their frozen linears.
PATHS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "frozen": lambda x, *layers: _separate(x, *(layer.base_layer for layer in layers)),
    "separate": _separate,
    "together": forward_together,
}


def groups(settings: Settings) -> list[tuple[Shape, ...]]:
    """The shapes that share an input in the model's block; for shapes given one by one, three layers of each."""
    if settings.model not in MODELS:
        return [(shape,) * 3 for shape in settings.shapes]
    by_name = {name: shape for shape in settings.shapes for name in shape.names.split()}
    return [tuple(by_name[name] for name in names) for names in SHARING if set(names) <= set(by_name)]


def points(settings: Settings) -> int:
    return len(groups(settings)) * len(settings.tokens) * len(settings.ranks)


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path and mode at each point of the grid."""
    for T in settings.tokens:
        for r in settings.ranks:
            for shapes in groups(settings):
                yield from _point(settings, shapes, T, r)
                release()


def _point(settings: Settings, shapes: tuple[Shape, ...], T: int, r: int) -> Iterator[Row]:
    where = {
        **{"question": "group", "model": settings.model, "N": [shape.N for shape in shapes], "K": shapes[0].K},
        **{"T": T, "r": r, "dtype": settings.dtype_name, "direction": "both"},
    }
    try:
        sets = operands(settings, shapes, T, r)
    except torch.OutOfMemoryError:
        yield from (where | failure(name, "out of memory: the operands alone") for name in PATHS)
        return
    try:
        broken = wrong(*sets[0])
    except Exception as error:
        yield where | failure("together", error)
        return
    if broken:
        yield where | failure("together", f"not timed, it is wrong: {', '.join(broken)}")
        return
    for mode in settings.modes:
        passes = {}
        for name in PATHS:
            try:
                calls = [partial(step, name, *each) for each in sets]
                passes[name] = timer.prepare(lambda calls=calls: calls, settings.device, mode == "graph")
            except Exception as error:
                yield where | {"mode": mode} | failure(name, error)
        samples, lost = timed(passes, settings)
        yield from (where | {"mode": mode} | failure(name, lost) for name in passes if lost)
        for name in samples:
            yield where | {"path": name, "mode": mode} | figures(samples, name, settings.device, ("frozen", "separate"))


def operands(settings: Settings, shapes: tuple[Shape, ...], T: int, r: int) -> list[tuple]:
    """(x, layers, gYs), in as many sets as leave the cache."""

    def make(seed: int) -> tuple[Tensor, list[LoRAXSLinear], list[Tensor]]:
        each = [
            Operands.random(T, shape.N, shape.K, r, settings.dtype, settings.device, seed + i)
            for i, shape in enumerate(shapes)
        ]
        return each[0].x, [fused(o) for o in each], [o.gY for o in each]

    first = make(0)
    size = sum(t.numel() * t.element_size() for t in (first[0], *first[2], *(layer.weight for layer in first[1])))
    return [first, *(make(len(shapes) * i) for i in range(1, timer.sets_needed(settings.device, size)))]


def step(name: str, x: Tensor, layers: list[LoRAXSLinear], gYs: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward, and gradients for x and each R."""
    trained = [layer.R for layer in layers if name != "frozen"]
    return torch.autograd.grad(PATHS[name](x, *layers), (x, *trained), gYs)


def wrong(x: Tensor, layers: list[LoRAXSLinear], gYs: list[Tensor]) -> list[str]:
    """Which results of `forward_together` break the accuracy rule, with the separate layers as the chain."""

    def results(name: str) -> list[Tensor]:
        return [*(y.detach() for y in PATHS[name](x, *layers)), *step(name, x, layers, gYs)]

    ys, gX, gRs = [], 0, []
    for layer, gY in zip(layers, gYs, strict=True):
        W, A, R, B, gY = (t.detach().double() for t in (layer.weight, layer.A, layer.R, layer.B, gY))
        y, z = reference.lowrank_linear(x.detach().double(), W, A, R, B, layer.scaling)
        share, v = reference.lowrank_linear(gY, W.T, B.T, R.T, A.T, layer.scaling)
        ys.append(y)
        gX = gX + share
        gRs.append(layer.scaling * v.T @ z)
    each = range(len(layers))
    names = (*(f"y of layer {i}" for i in each), "gX", *(f"gR of layer {i}" for i in each))
    return [
        name
        for name, own, rounded, oracle in zip(
            names, results("together"), results("separate"), (*ys, gX, *gRs), strict=True
        )
        if not reference.relative_error(own, oracle) <= reference.allowed_error(rounded, oracle, x.dtype)
    ]
