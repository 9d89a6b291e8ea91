"""How near does x -> A -> R -> B come to the memory's speed?  The primitive without W, forward and backward, alone.

Whatever computes it must read x and write y, T (K + N) numbers; A, B and R are small.  What a path reads and writes
beyond that lowers the bandwidth it achieves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, reference
from . import timer
from .layer import Row, failure, figures, points, release, timed
from .paths import Operands
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["Case", "points", "rows"]

LOST = "its time is lost in that of"  # how a reason begins that another try may not find

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


class Case:
    """The primitive on operands of one shape in one direction, in sets that leave the cache; W only with `weight`.

    backward: x is gY, W is W^T, A is B^T, B is A^T, R is R^T, all as views, and `other` is z; N and K stay those of
    the layer.
    """

    sets: list[tuple]  # what is called, with each in turn; x is the first of a set
    device: torch.device
    rest: Callable[[], None] | None = None  # in CUDA graphs, work that follows each call; its time is taken off

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

    def prepare(self, path: Callable, graph: bool = False) -> timer.Pass:
        """A call for each set; its results are held until its next, so that each set writes a y of its own."""
        held: list[Any] = [None] * len(self.sets)
        rest = self.rest if graph else None

        def call(i: int) -> None:
            held[i] = path(*self.sets[i])
            if rest is not None:
                rest()

        return timer.prepare(lambda: [partial(call, i) for i in range(len(self.sets))], self.device, graph)

    def wrong(self, path: Callable) -> list[str]:
        """Which results of the first set break the accuracy rule."""
        got = self._results(path)
        return [
            what
            for what, (oracle, allowed) in self._oracle.items()
            if not reference.relative_error(got[what], oracle) <= allowed
        ]

    def _results(self, path: Callable) -> dict[str, Tensor | None]:
        """y and z, on some rows, and all of the gram."""
        y, z, gram = path(*self.sets[0])
        return {"y": y[self._rows], "z": z[self._rows], "gram": gram}

    @cached_property
    def _rows(self) -> Tensor:
        x = self.sets[0][0]
        return torch.linspace(0, len(x) - 1, min(len(x), 64), device=x.device).round().long()

    @cached_property
    def _oracle(self) -> dict[str, tuple[Tensor, float]]:
        """{what: (its value in fp64, the error that is allowed)}."""
        x, W, A, R, B, s, _, _, other = self.sets[0]

        def expected(dtype: torch.dtype) -> dict[str, Tensor]:
            W_, A_, R_, B_ = (None if t is None else t.to(dtype) for t in (W, A, R, B))
            y, z = reference.lowrank_linear(x[self._rows].to(dtype), W_, A_, R_, B_, s)
            if other is None:
                return {"y": y, "z": z}
            return {"y": y, "z": z, "gram": s * (x.to(dtype) @ A_.T).T @ other.to(dtype)}

        rounded, exact = expected(x.dtype), expected(torch.float64)
        return {what: (t, reference.allowed_error(rounded[what], t, x.dtype)) for what, t in exact.items()}


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path, direction and mode at each point of the grid."""
    directions = ("forward", "backward") if settings.direction == "both" else (settings.direction,)
    for T in settings.tokens:
        for r in settings.ranks:
            for shape in settings.shapes:
                for direction in directions:
                    yield from _point(settings, shape, T, r, direction)
                    release()


def _point(settings: Settings, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    names = [name for name in PATHS if name in settings.paths]
    where: Row = {
        **{"question": "chain", "model": settings.model, "N": shape.N, "K": shape.K, "T": T, "r": r},
        **{"dtype": settings.dtype_name, "direction": direction},
    }
    try:
        case = Case(shape, T, r, direction, settings.dtype, settings.device)
    except torch.OutOfMemoryError:
        yield from (where | failure(name, "out of memory: the operands alone") for name in names)
        return
    yield from side_by_side(case, {name: PATHS[name] for name in names}, where | {"bytes": case.bytes}, settings)


def side_by_side(
    case: Case,
    paths: dict[str, Callable[[], Callable]],
    where: Row,
    settings: Settings,
    min_rounds: int = timer.MIN_ROUNDS,
) -> Iterator[Row]:
    """Check every path (made by a call) on the case, then time them in turn; what fails is said and left out."""
    right: dict[str, Callable] = {}
    for name, make in paths.items():
        try:
            path = make()
            wrong = case.wrong(path)
        except Exception as error:  # a path that cannot run must not cost the others their figures
            yield where | failure(name, error)
            continue
        if wrong:
            yield where | failure(name, f"not timed, it is wrong: {', '.join(wrong)}")
        else:
            right[name] = path
    for mode in settings.modes:
        passes = {}
        for name, path in right.items():
            try:
                passes[name] = case.prepare(path, mode == "graph")
            except Exception as error:
                yield where | {"mode": mode} | failure(name, error)
        beside = "the work beside"
        if passes and mode == "graph" and case.rest is not None:
            try:
                passes[beside] = case.prepare(lambda *operands: None, graph=True)
            except Exception as error:
                yield from (where | {"mode": mode} | failure(name, error) for name in passes)
                continue
        samples, lost = timed(passes, settings, min_rounds)
        yield from (where | {"mode": mode} | failure(name, lost) for name in passes if name != beside and lost)
        rest = samples.pop(beside, torch.zeros(1))
        samples = {name: each - rest for name, each in samples.items()}
        for name in [name for name, each in samples.items() if not each.quantile(0.25) > 0.1 * rest.median()]:
            del samples[name]
            yield where | {"mode": mode} | failure(name, f"{LOST} {beside} it")
        for name in samples:
            yield where | {"path": name, "mode": mode} | figures(samples, name, settings.device)
