"""What do layers that share their input gain from one read of it (`forward_together`)?  Forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..linear import LoraXSLinear, forward_together
from . import tables, timer
from .compare import Build, Candidate, Row, compare, errors
from .paths import Operands, fused
from .question import Point, Question
from .request import Request
from .shapes import MODELS, Shape
from .tables import Table, over

SHARING = (("q", "k", "v"), ("gate", "up"))

Set = tuple[Tensor, list[LoraXSLinear], list[Tensor]]  # x, the layers, gY of each


def _separate(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


# What each does with the layers, or with their frozen linears.
PATHS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "frozen": lambda x, *layers: _separate(x, *(layer.base_layer for layer in layers)),
    "separate": _separate,
    "together": forward_together,
}


def groups(request: Request) -> list[tuple[Shape, ...]]:
    """The shapes that share an input in the model's block; for shapes given one by one, three layers of each."""
    if request.model not in MODELS:
        return [(shape,) * 3 for shape in request.shapes]
    by_name = {name: shape for shape in request.shapes for name in shape.names.split()}
    return [tuple(by_name[name] for name in names) for names in SHARING if set(names) <= set(by_name)]


def plan(request: Request) -> list[Point]:
    return [
        Point(
            {"N": [shape.N for shape in shapes], "K": shapes[0].K, "T": T, "r": r, "direction": "both"},
            partial(_rows, request, shapes, T, r),
        )
        for T in request.tokens
        for r in request.ranks
        for shapes in groups(request)
    ]


def _rows(request: Request, shapes: tuple[Shape, ...], T: int, r: int) -> Iterator[Row]:
    def prepare() -> Build:
        sets = operands(request, shapes, T, r)

        def build(name: str) -> Candidate:
            found = check(*sets[0]) if name == "together" else {}
            return Candidate(lambda: [partial(step, name, *each) for each in sets], found)

        return build

    return compare(request, list(PATHS), prepare, ("frozen", "separate"))


def operands(request: Request, shapes: tuple[Shape, ...], T: int, r: int) -> list[Set]:
    """In as many sets as leave the cache."""

    def make(seed: int) -> Set:
        each = [
            Operands.random(T, shape.N, shape.K, r, request.dtype, request.device, seed + i)
            for i, shape in enumerate(shapes)
        ]
        return each[0].x, [fused(o) for o in each], [o.gY for o in each]

    first = make(0)
    size = sum(t.numel() * t.element_size() for t in (first[0], *first[2], *(layer.weight for layer in first[1])))
    return [first, *(make(len(shapes) * i) for i in range(1, timer.sets_needed(request.device, size)))]


def step(name: str, x: Tensor, layers: list[LoraXSLinear], gYs: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward, and gradients for x and each R."""
    trained = [layer.R for layer in layers if name != "frozen"]
    return torch.autograd.grad(PATHS[name](x, *layers), (x, *trained), gYs)


def check(x: Tensor, layers: list[LoraXSLinear], gYs: list[Tensor]) -> dict[str, dict[str, float]]:
    """The errors of `forward_together`, with the separate layers as the chain in x's dtype."""
    each = range(len(layers))
    names = (*(f"y of layer {i}" for i in each), "gX", *(f"gR of layer {i}" for i in each))

    def results(name: str) -> dict[str, Tensor]:
        ys = (y.detach() for y in PATHS[name](x, *layers))
        return dict(zip(names, (*ys, *step(name, x, layers, gYs)), strict=True))

    ys, gX, gRs = [], 0, []
    for layer, gY in zip(layers, gYs, strict=True):
        W, A, R, B, gY = (t.detach().double() for t in (layer.weight, layer.A, layer.R, layer.B, gY))
        y, z = reference.lowrank_linear(x.detach().double(), W, A, R, B, layer.scaling)
        share, v = reference.lowrank_linear(gY, W.T, B.T, R.T, A.T, layer.scaling)
        ys.append(y)
        gX = gX + share
        gRs.append(layer.scaling * v.T @ z)
    exact = dict(zip(names, (*ys, gX, *gRs), strict=True))
    return errors(results("together"), results("separate"), exact, x.dtype)


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    times = ["ms"] if tables.gpu(report) else []
    lines = []
    for row in (row for row in rows if row["path"] != "frozen"):
        sizes = " + ".join(map(str, row["N"]))
        line = [f"{row['path']}, {row['dtype']} {row['mode']} T {row['T']}, {sizes} x {row['K']}, r {row['r']}"]
        line += [f"{1e3 * row['seconds']['median']:.3f}"] if times else []
        lines.append([*line, *(over(row, name) for name in ("frozen", "separate"))])
    if lines:
        head = ["", *times, "over their frozen linears", "over separate layers"]
        title = "Layers that share their input, together or one by one, forward + backward"
        yield Table(title, head, lines, ("Quartiles in brackets.", *tables.noise(lines)))


QUESTION = Question(name="group", plan=plan, tables=show)
