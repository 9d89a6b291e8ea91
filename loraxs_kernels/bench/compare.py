"""The loop that every question goes through: make operands, build each path on them, check it, time all in turn.

A path that fails, or whose results are wrong, has a row that says so and is not timed; it costs the others nothing.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import BenchError, timer
from .request import Request
from .timer import Call

ROWS = 64  # so many rows of y and gX are compared with an oracle; what is small is compared whole

Row = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A path that was built.  `calls` makes one call for each set of operands; `facts` stand in its rows.

    errors: {result: its error and what the accuracy rule allows}.
    """

    calls: Callable[[], list[Call]]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)
    within: Callable[[], AbstractContextManager] = nullcontext  # open while it runs
    warm: bool = True  # it is called before it is timed

    @property
    def wrong(self) -> list[str]:
        return [what for what, each in self.errors.items() if not each["error"] <= each["allowed"]]

    @property
    def row(self) -> Row:
        """What is known before it is timed."""
        return ({"errors": self.errors} if self.errors else {}) | self.facts

    def ready(self, device: torch.device, mode: str) -> timer.Pass:
        return timer.prepare(self.calls, device, mode == "graph", self.within, self.warm)


def compare(
    request: Request,
    names: Sequence[str],
    make: Callable[[], Any],
    build: Callable[[Any, str], Candidate],
    over: Sequence[str],
    *,
    modes: Sequence[str] = (),
    **how: Any,
) -> Iterator[Row]:
    """Rows of every path in every mode.

    make: makes the operands, on which `build` builds a path by its name.  over: paths whose time a path's is divided
    by, the floor first.
    """
    right = yield from checked(names, make, build)
    for mode in modes or request.modes:
        before = timer.gauges(request.device)
        samples = yield from timed(request, right, mode, **how)
        gauges = {"gauges": [before, timer.gauges(request.device)]} if before else {}
        beside = {other: samples[other] for other in over if other in samples}
        for name, own in samples.items():
            yield {"mode": mode} | gauges | right[name].row | figures(name, own, beside, request.gpu)


def checked(
    names: Sequence[str], make: Callable[[], Any], build: Callable[[Any, str], Candidate]
) -> Generator[Row, None, dict[str, Candidate]]:
    """Yields the rows of paths that cannot be built, or are wrong; returns the others."""
    try:
        operands = make()
    except torch.OutOfMemoryError:
        yield from (failure(name, "out of memory: the operands alone") for name in names)
        return {}
    right = {}
    for name in names:
        try:
            candidate = build(operands, name)
        except Exception as error:
            yield failure(name, error)
            continue
        if candidate.wrong:
            yield candidate.row | failure(name, f"not timed, it is wrong: {', '.join(candidate.wrong)}")
        else:
            right[name] = candidate
    return right


def timed(
    request: Request, right: dict[str, Candidate], mode: str, min_rounds: int = timer.MIN_ROUNDS, issue: bool = False
) -> Generator[Row, None, dict[str, Tensor]]:
    """Yields the rows of paths that cannot be made ready, or of all if timing breaks off; returns {path: samples}."""
    passes = {}
    for name, candidate in right.items():
        try:
            passes[name] = candidate.ready(request.device, mode)
        except Exception as error:
            yield {"mode": mode} | failure(name, error)
    try:
        return timer.interleave(passes, request.device, request.seconds, min_rounds, issue)
    except Exception as error:
        lost = failure("", error)["reason"]
        yield from ({"mode": mode} | failure(name, lost) for name in passes)
        return {}


def figures(name: str, own: Tensor, beside: dict[str, Tensor], absolute: bool) -> Row:
    """Time, if it is wanted, and ratios to others, taken round by round; noisy: the time, or the first ratio."""
    seconds = {"seconds": timer.spread(own)} if absolute else {}
    over = {other: timer.spread(own / its) for other, its in beside.items()}
    noisy = any(map(timer.noisy, [*seconds.values(), *list(over.values())[:1]]))
    return {"path": name, "status": "ok", "rounds": len(own), **seconds, "over": over, "noisy": noisy}


def failure(name: str, why: str | BaseException) -> Row:
    """The row of a path that could not be measured."""
    if isinstance(why, BaseException):
        traceback.clear_frames(why.__traceback__)  # they hold tensors
        lines = (str(why).strip() or "(no message)").splitlines()
        kind = "" if isinstance(why, BenchError) else f"{type(why).__name__}: "
        why = "out of memory" if isinstance(why, torch.OutOfMemoryError) else f"{kind}{lines[0]}"
        release()
    return {"path": name, "status": "failed", "reason": why}


def release() -> None:
    """Give back what a point held, so that the next one starts from the same memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after an error that took the device with it
            torch.cuda.empty_cache()


# --- what is right


def errors(got: dict[str, Tensor | None], rounded: Results, exact: Results, dtype: torch.dtype) -> dict[str, dict]:
    """The relative error of each result, and what the accuracy rule allows beside `rounded`, which is in dtype."""
    return {
        what: {
            "error": reference.relative_error(value, exact[what]),
            "allowed": reference.allowed_error(rounded[what], exact[what], dtype),
        }
        for what, value in got.items()
        if value is not None
    }


def some(x: Tensor) -> Tensor:
    """ROWS of the rows of x, spread over all of it."""
    return torch.linspace(0, len(x) - 1, min(len(x), ROWS), device=x.device).round().long()


class Case:
    """Operands of a function of tensors, in sets that leave the cache.

    A question's own Case has `results(path)`, those of the first set, on `rows` where there are many, and
    `expected(dtype)`, the same by the specification.
    """

    sets: list[tuple]  # what is called, with each in turn; x is the first of a set
    device: torch.device

    def calls(self, path: Callable) -> list[Call]:
        """A result is held until its set is called again, so that each set writes results of its own."""
        held: list[Any] = [None] * len(self.sets)

        def call(i: int) -> None:
            held[i] = path(*self.sets[i])

        return [partial(call, i) for i in range(len(self.sets))]

    def candidate(self, path: Callable, **facts: Any) -> Candidate:
        """The path, checked."""
        found = errors(self.results(path), *self._oracle, self.sets[0][0].dtype)
        return Candidate(partial(self.calls, path), found, facts)

    @cached_property
    def rows(self) -> Tensor:
        return some(self.sets[0][0])

    @cached_property
    def _oracle(self) -> tuple[Results, Results]:
        return self.expected(self.sets[0][0].dtype), self.expected(torch.float64)
