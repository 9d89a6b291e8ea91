"""How near does x -> A -> R -> B come to the memory's speed?  The primitive without W, forward and backward, alone.

Whatever computes it must read x and write y, T (K + N) numbers; A, B and R are small.  What a path reads and writes
beyond that lowers the bandwidth it achieves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from . import compare, paths, tables, timer
from .compare import Candidate, Results, Row
from .paths import Operands
from .question import Point, Question, grid
from .request import Request
from .shapes import Shape
from .tables import Table

Chain = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def _reference(
    x: Tensor, W: None, A: Tensor, R: Tensor, B: Tensor, s: float, bias: None, out: None, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The four ops of the reference layer's branch, in the dtype of x."""
    z, R = x @ A.t(), R.to(x.dtype)
    gram = None if other is None else (z.t() @ other.to(z.dtype)) * s
    return z @ R.t() @ B.t() * s, z, gram


PATHS: dict[str, Callable[[], Chain]] = {
    "reference": lambda: _reference,
    **{name: partial(backends.primitive, name) for name in backends.NAMES},
}


class Case(compare.Case):
    """The primitive on operands of one shape in one direction; W only with `weight`.

    backward: x is gY, W is W^T, A is B^T, B is A^T, R is R^T, all as views, and `other` is z; N and K stay those of
    the layer.
    """

    def __init__(
        self,
        shape: Shape,
        T: int,
        r: int,
        direction: str,
        dtype: torch.dtype,
        device: torch.device,
        weight: bool = False,
    ) -> None:
        def operands(seed: int) -> tuple:
            o = Operands.random(T, shape.N, shape.K, r, dtype, device, seed)
            x, W = o.x.detach(), o.W if weight else None
            if direction == "forward":
                return x, W, o.A, o.R, o.B, o.s, None, None, None
            W = None if W is None else W.t()
            return o.gY, W, o.B.t(), o.R.t(), o.A.t(), o.s, None, None, (x @ o.A.t()).float()

        numbers = (T + r) * (shape.N + shape.K) + weight * shape.N * shape.K
        self.bytes = numbers * dtype.itemsize  # that must move
        self.sets = [operands(seed) for seed in range(timer.sets_needed(device, self.bytes))]
        self.device = device

    def results(self, path: Chain) -> dict[str, Tensor | None]:
        """y and z, on some rows, and all of the gram."""
        y, z, gram = path(*self.sets[0])
        return {"y": y[self.rows], "z": z[self.rows], "gram": gram}

    def expected(self, dtype: torch.dtype) -> Results:
        x, *operands, s, _, _, other = self.sets[0]
        W, A, R, B = (None if t is None else t.to(dtype) for t in operands)
        y, z = reference.lowrank_linear(x[self.rows].to(dtype), W, A, R, B, s)
        return {"y": y, "z": z} | ({} if other is None else {"gram": s * (x.to(dtype) @ A.T).T @ other.to(dtype)})


def plan(request: Request) -> list[Point]:
    return grid(request, _rows, direction=request.directions)


def _rows(request: Request, *where: Any) -> Iterator[Row]:
    def build(case: Case, name: str) -> Candidate:
        return case.candidate(PATHS[name](), bytes=case.bytes)

    make = partial(Case, *where, request.dtype, request.device)
    names = [name for name in PATHS if name in request.paths]
    return compare.compare(request, names, make, build, ("reference", "torch"))


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """Ratios to the reference's four ops, and on a GPU the bandwidth achieved."""
    for mode, group in tables.grouped(rows).items():
        points = tables.labelled(group, "{dtype} {direction} T {T}, {N} x {K}, r {r}")
        names = tables.present(PATHS, group)
        columns, notes = [], [tables.ratios_to("reference, which is four ops in the dtype of x")]
        if tables.gpu(report):
            columns = [(f"{name}, TB/s", name, partial(tables.bandwidth, report=report)) for name in names]
            notes.append(f"TB/s: the bytes of x and y divided by the time; {tables.OF_COPY}.")
        over = partial(tables.over, other="reference")
        columns += [(f"{name} over reference", name, over) for name in names if name != "reference"]
        yield tables.compared(f"x, A, R, B without W, {mode}", points, columns, *notes)


QUESTION = Question(name="chain", plan=plan, tables=show, paths=paths.PATHS)
