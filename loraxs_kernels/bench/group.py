"""What do layers that share their input gain from one read of it (`forward_together`)?  Forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import LoraXSLinear
from ..together import forward_together
from . import tables, timer
from .compare import Candidate, Row, compare, errors
from .paths import Operands, expected, fused
from .question import Point, Question
from .request import Request
from .shapes import MODELS, Shape
from .tables import Table, over

SHARING = (("q", "k", "v"), ("gate", "up"))

Set = tuple[list[Operands], list[LoraXSLinear]]  # x is the same in all


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
    def make(seed: int) -> Set:
        seeds = enumerate(shapes, len(shapes) * seed)
        each = [Operands.random(T, s.N, s.K, r, request.dtype, request.device, seed) for seed, s in seeds]
        each = [replace(o, x=each[0].x) for o in each]
        return each, [fused(o) for o in each]

    def size(each: Set) -> int:
        x = each[0][0].x  # which all layers share
        return sum(o.bytes - x.nbytes for o in each[0]) + x.nbytes

    def build(sets: list[Set], name: str) -> Candidate:
        found = check(*sets[0]) if name == "together" else {}
        return Candidate(lambda: [partial(step, name, *each) for each in sets], found)

    sets = partial(timer.in_sets, make, request.device, size)
    return compare(request, list(PATHS), sets, build, ("frozen", "separate"))


def step(name: str, each: list[Operands], layers: list[LoraXSLinear]) -> tuple[Tensor, ...]:
    """Forward, and gradients for x and each R."""
    trained = [layer.R for layer in layers if name != "frozen"]
    x = each[0].x
    return torch.autograd.grad(PATHS[name](x, *layers), (x, *trained), [o.gY for o in each])


def check(each: list[Operands], layers: list[LoraXSLinear]) -> dict[str, dict[str, float]]:
    """The errors of `forward_together`, with the separate layers as the chain in x's dtype."""
    x, layered = each[0].x, range(len(layers))
    names = (*(f"y of layer {i}" for i in layered), "gX", *(f"gR of layer {i}" for i in layered))

    def results(name: str) -> dict[str, Tensor]:
        ys = (y.detach() for y in PATHS[name](x, *layers))
        return dict(zip(names, (*ys, *step(name, each, layers)), strict=True))

    exact = [expected(o, (o.A, o.R, o.B), o.s, torch.arange(len(x), device=x.device), torch.float64) for o in each]
    ys, gXs, gRs = ([found[what] for found in exact] for what in ("y", "gX", "gR"))
    return errors(
        results("together"), results("separate"), dict(zip(names, (*ys, sum(gXs), *gRs), strict=True)), x.dtype
    )


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
        yield Table(title, head, lines, [tables.QUARTILES])


QUESTION = Question(name="group", plan=plan, tables=show, unread=("direction",))
