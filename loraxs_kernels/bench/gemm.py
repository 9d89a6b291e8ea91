"""What does u B^T cost, where u is given?  y = x W^T + u B^T beside the library's x W^T alone, the floor.

The library's two ways to add it, and the GEMM of the cuda backend whose sum runs on into u B^T, once with each tile it
is built for: the rule in backends/cuda/config.py should pick the fastest.  What making u takes, and what a whole layer
does on each backend, are the questions chain and layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import cuda
from ..backends.cuda import config, core
from ..backends.device import facts
from ..padding import padded_rows
from . import BenchError, compare, paths, plots, tables, tax, timer
from .compare import Candidate, Results, Row
from .paths import Operands
from .question import Point, Question, colour, grid
from .request import Request
from .roofline import STEP
from .shapes import Shape
from .tables import Table

Tail = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The tiles by the names of their paths.
TILES = {f"cuda-{rows}x{columns}": number for number, (rows, columns, *_) in config.TILES.items()}
TILE_COLOURS = ("#98df8a", "#006d2c", "#2ca02c", "#74c476")


def _tail(tile: int, x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> Tensor:
    return cuda.gemm_tail(x, W, u, B, bias=None, tile=tile, overlap=False)


PATHS: dict[str, Tail] = {
    "frozen": lambda x, W, u, B: F.linear(x, W),
    "addmm": lambda x, W, u, B: F.linear(x, W).addmm_(u, B.t()),
    "torch": lambda x, W, u, B: F.linear(u, B).addmm_(x, W.t()),  # as that backend does it
    **{name: partial(_tail, tile) for name, tile in TILES.items()},
}


class Case(compare.Case):
    """Operands of one shape in one direction: (x, W, u, B), u and B in rows as shrink and attach lay them.

    backward: x is gY, W is W^T, B is A^T, as views.  N and K are columns of y and x here, exchanged for the backward.
    """

    def __init__(self, shape: Shape, T: int, r: int, direction: str, dtype: torch.dtype, device: torch.device) -> None:
        def operands(seed: int) -> tuple:
            o = Operands.random(T, shape.N, shape.K, r, dtype, device, seed)
            u = torch.randn(T, r, generator=torch.Generator(device).manual_seed(~seed), device=device).to(dtype)
            if direction == "forward":
                return o.x.detach(), o.W, padded_rows(u), o.B
            return o.gY, o.W.t(), padded_rows(u), o.A.t()

        self.T, self.r, self.dtype, self.device = T, r, dtype, device
        self.N, self.K = (shape.N, shape.K) if direction == "forward" else (shape.K, shape.N)
        numbers = T * (self.N + self.K + r) + self.N * (self.K + r)
        self.sets = [operands(seed) for seed in range(timer.sets_needed(device, numbers * dtype.itemsize))]

    def facts(self, name: str) -> Row:
        """What a path and the floor multiply, and the tile of a tail, which multiplies whole steps of u."""
        columns = {"frozen": 0, "addmm": self.r, "torch": self.r}.get(name, -(-self.r // STEP) * STEP)
        each = 2 * self.T * self.N
        row: Row = {"flops": each * (self.K + columns), "floor_flops": each * self.K}
        return row | ({"tile": config.TILES[TILES[name]][:2]} if name in TILES else {})

    def picked(self) -> str | None:
        """The path that the cuda backend would use here; None: it takes few rows another way."""
        plan = config.pick(self.T, self.N, self.K, self.r, self.dtype, facts(self.device), core.architectures())
        if isinstance(plan, config.Decode):
            return None
        tile = None if plan is None else plan.tile
        return next((name for name, number in TILES.items() if number == tile), "torch")

    def results(self, path: Tail) -> dict[str, Tensor]:
        """y on some rows; the floor lacks u B^T, which is added to it here."""
        y = path(*self.sets[0])[self.rows]
        if path is PATHS["frozen"]:
            _, _, u, B = self.sets[0]
            y = y.double() + u[self.rows].double() @ B.double().t()
        return {"y": y}

    def expected(self, dtype: torch.dtype) -> Results:
        x, W, u, B = self.sets[0]
        x, W, u, B = (t.to(dtype) for t in (x[self.rows], W, u[self.rows], B))
        return {"y": F.linear(x, W) + F.linear(u, B)}


def missing(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the GEMM with a tail cannot run here, where the cuda backend can; None: it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "the GEMM with a tail takes bf16 and fp16"
    if not cuda.runs_here(torch.empty(0, device=device)):
        return "the GEMM with a tail runs on a GPU"
    if facts(device).capability != (9, 0) or "90a" not in core.architectures():
        return "the GEMM with a tail needs a GPU of compute capability 9.0, and a core built for sm_90a"
    return None


def check(request: Request) -> Request:
    if "cuda" in request.paths and (why := missing(request.dtype, request.device)):
        left_out = request.left_out | {"cuda, of the question gemm": why}
        return dataclasses.replace(request, left_out=left_out)
    return request


def plan(request: Request) -> list[Point]:
    return grid(request, _rows, direction=request.directions)


def _rows(request: Request, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    tiles = "cuda" in request.paths and missing(request.dtype, request.device) is None
    names = [name for name in PATHS if name in request.paths or (tiles and name in TILES)]

    def build(case: Case, name: str) -> Candidate:
        if name in TILES and (shape.N % config.ALIGNMENT or shape.K % config.ALIGNMENT):
            raise BenchError(f"N and K must be multiples of {config.ALIGNMENT}")
        picked = "cuda" in request.paths and name == case.picked()
        return case.candidate(PATHS[name], **case.facts(name), picked=picked)

    make = partial(Case, shape, T, r, direction, request.dtype, request.device)
    return compare.compare(request, names, make, build, ("frozen", "torch"))


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """On a GPU the speed of each path and the time it adds to the library's x W^T, else ratios to that."""
    rows = _with_picked(rows)
    others = [name for name in dict.fromkeys(row["path"] for row in rows) if name != "frozen"]
    columns = [(f"{name} over frozen", name, partial(tables.over, other="frozen")) for name in others]
    notes, noise = [tables.ratios_to("frozen, the library's x W^T")], {}
    if tables.gpu(report):
        columns = [("frozen, TFLOP/s", "frozen", _flops)]
        for name in others:
            columns += [] if name in ("addmm", "torch") else [(f"{name}, TFLOP/s", name, _flops)]
            columns.append((f"{name}, % added", name, _added))
        notes = [
            "frozen: the library's x W^T. TFLOP/s: in brackets as a share of frozen's. "
            f"% added: what a path takes longer than frozen. {tables.QUARTILES}"
        ]
        noise = {"noise": tax.NOISE}
    if any("tile" in row for row in rows):
        notes.append(
            f"cuda-...: our GEMM, by its tiles of y; of u it takes {STEP} columns at a time, whose flops all count."
        )
    if "cuda" in others:
        notes.append("cuda: the one of these paths that the cuda backend would take: our GEMM in some tiles, or torch.")
    for mode, group in tables.grouped(rows).items():
        yield tables.compared(f"x W^T + u B^T, u given, {mode}", _points(group), columns, *notes, **noise)


def _with_picked(rows: list[Row]) -> list[Row]:
    """The rows, and of the path that the cuda backend would use once more, as "cuda"."""
    return [*rows, *(row | {"path": "cuda"} for row in rows if row["picked"])]


def _points(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by path: of blocks of several shapes, then of each shape."""
    points: dict[str, dict[str, Row]] = {}
    for at, found in tax.points(rows).items():
        if len(found["frozen"]) > 1:
            where = f"{at.dtype} {at.direction} T {at.T} r {at.r}, the linears of {at.model or 'all shapes'}"
            points[where] = {name: _block(found, name) for name in found if tax.measured(found, name)}
    return points | tables.labelled(rows, "{dtype} {direction} T {T} r {r}, {N} x {K}")


def _block(found: tax.Paths, name: str) -> Row:
    """The rows of a path as one, each as often as its shape occurs."""

    def total(path: str, what: Callable[[Row], float]) -> float:
        return sum(shape.count * what(row) for shape, row in found[path].items())

    added = tax.measured(found, name)
    ratio = {end: 1 + value / 100 for end, value in added.items()}
    floor = total("frozen", lambda row: row["seconds"]["median"])
    row: Row = {what: total(name, itemgetter(what)) for what in ("flops", "floor_flops")}
    return row | {"seconds": {"median": floor * ratio["median"]}, "over": {"frozen": ratio}, "noisy": tax.noisy(added)}


def _flops(row: Row) -> str:
    """Achieved, and as a share of the floor's, by the ratio of times within rounds."""
    speed = f"{row['flops'] / row['seconds']['median'] / 1e12:.0f}"
    if "frozen" not in row["over"] or row["flops"] == row["floor_flops"]:
        return speed
    return f"{speed} ({row['flops'] / row['floor_flops'] / row['over']['frozen']['median']:.1%})"


def _added(row: Row) -> str:
    return tax.shown(tax.of_ratio(row["over"]["frozen"])) if "frozen" in row["over"] else tables.NO_FIGURE


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    """What u B^T adds to the library's x W^T over a block, on a GPU."""
    modes: dict[str, dict[str, list[plots.Bar]]] = {}
    for at, found in tax.points(_with_picked(rows)).items():
        where = f"{at.model} {at.dtype}, T = {at.T}, r = {at.r}".strip()
        for path in found:
            if path != "frozen" and (added := tax.measured(found, path)):
                group = modes.setdefault(at.mode, {}).setdefault(where, [])
                group.append((_colour(path), f"{path}, {at.direction}", added))
    for mode, groups in modes.items():
        title = f"u B^T, u given: time added to the library's x W^T, {mode} mode"
        yield plots.bars(f"gemm-{mode}", title, groups, xlabel="% of the frozen linears' time")


def _colour(path: str) -> str:
    return TILE_COLOURS[TILES[path] % len(TILE_COLOURS)] if path in TILES else colour(paths.PATHS, path)


QUESTION = Question(name="gemm", plan=plan, tables=show, plots=draw, paths=paths.PATHS, check=check)
