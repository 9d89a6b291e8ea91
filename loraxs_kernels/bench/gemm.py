"""What does u B^T cost, where u is given?  y = x W^T + u B^T beside the library's x W^T alone, the floor.

The library's two ways to add it, and the GEMM of the cuda backend whose sum runs on into u B^T, once with each tile it
is built for: the rule in backends/cuda/config.py should pick the fastest.  What making u takes, and what a whole layer
does on each backend, are the questions chain and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backends import cuda
from ..backends.cuda import config, core
from ..backends.device import facts
from ..padding import padded_rows
from . import chain, timer
from .layer import Row, failure, release
from .paths import Operands
from .roofline import STEP
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

Tail = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The tiles by the names of their paths.
TILES = {f"cuda-{rows}x{columns}": number for number, (rows, columns, *_) in config.TILES.items()}


def _frozen(x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, W)


def _addmm(x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, W).addmm_(u, B.t())


def _expand_first(x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> Tensor:
    """What the torch backend does."""
    return F.linear(u, B).addmm_(x, W.t())


def _tail(tile: int, x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> Tensor:
    return cuda.gemm_tail(x, W, u, B, bias=None, tile=tile, overlap=False)


PATHS: dict[str, Tail] = {
    "frozen": _frozen,
    "addmm": _addmm,
    "torch": _expand_first,
    **{name: partial(_tail, tile) for name, tile in TILES.items()},
}


class Case(chain.Case):
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

    def _results(self, path: Tail) -> dict[str, Tensor]:
        """y on some rows; the floor lacks u B^T, which is added to it here."""
        y = path(*self.sets[0])[self._rows]
        if path is _frozen:
            _, _, u, B = self.sets[0]
            y = y.double() + u[self._rows].double() @ B.double().t()
        return {"y": y}

    @cached_property
    def _oracle(self) -> dict[str, tuple[Tensor, float]]:
        def expected(dtype: torch.dtype) -> Tensor:
            x, W, u, B = self.sets[0]
            x, W, u, B = (t.to(dtype) for t in (x[self._rows], W, u[self._rows], B))
            return F.linear(x, W) + F.linear(u, B)

        exact = expected(torch.float64)
        return {"y": (exact, reference.allowed_error(expected(self.dtype), exact, self.dtype))}


def missing(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the GEMM with a tail cannot run here, where the cuda backend can; None: it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "the GEMM with a tail takes bf16 and fp16"
    if not cuda.runs_here(torch.empty(0, device=device)):
        return "the GEMM with a tail runs on a GPU"
    if facts(device).capability != (9, 0) or "90a" not in core.architectures():
        return "the GEMM with a tail needs a GPU of compute capability 9.0, and a core built for sm_90a"
    return None


def points(settings: Settings) -> int:
    return chain.points(settings)


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path, direction and mode at each point of the grid."""
    tiles = "cuda" in settings.paths and missing(settings.dtype, settings.device) is None
    names = [name for name in PATHS if name in settings.paths or (tiles and name in TILES)]
    directions = ("forward", "backward") if settings.direction == "both" else (settings.direction,)
    for T in settings.tokens:
        for r in settings.ranks:
            for shape in settings.shapes:
                for direction in directions:
                    yield from _point(settings, names, shape, T, r, direction)
                    release()


def _point(settings: Settings, names: list[str], shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    where: Row = {
        **{"question": "gemm", "model": settings.model, "layers": shape.names, "count": shape.count},
        **{"N": shape.N, "K": shape.K, "T": T, "r": r, "dtype": settings.dtype_name, "direction": direction},
    }
    if shape.N % config.ALIGNMENT or shape.K % config.ALIGNMENT:
        why = f"N and K must be multiples of {config.ALIGNMENT}"
        yield from (where | failure(name, why) for name in names if name in TILES)
        names = [name for name in names if name not in TILES]
    try:
        case = Case(shape, T, r, direction, settings.dtype, settings.device)
    except torch.OutOfMemoryError:
        yield from (where | failure(name, "out of memory: the operands alone") for name in names)
        return
    paths = {name: partial(PATHS.get, name) for name in names}
    picked = case.picked() if "cuda" in settings.paths else None
    for row in chain.side_by_side(case, paths, where, settings):
        if row["status"] == "ok":
            row |= case.facts(row["path"]) | {"picked": row["path"] == picked}
        yield row
