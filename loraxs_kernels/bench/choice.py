"""Which backend is fastest, call by call?  The primitive with and without W, forward and backward, on each backend.

`measure` times every backend beside torch's in the same rounds; `decide` makes of such rows those of the table that
`loraxs_kernels.backends.choose` looks into (backends/choice.py).

Long products follow each other without a pause nowhere but in a bench, where they hold the GPU at its power limit;
there another backend can be ahead than in a model (bench/results/NOTES.md).  So in CUDA graphs a long call is followed
by copies that take about as long, since memory takes half the time of a training step; their own time is taken off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from .. import backends
from ..backends import choice
from ..backends.device import Device
from ..backends.triton.config import padded
from . import paths, tables, timer
from .chain import Case
from .compare import Candidate, Row, checked, failure, figures, timed
from .question import Point, Question, grid
from .request import Request
from .shapes import Shape
from .tables import Table

ROUNDS = 5  # at least
COPIED = 2**26  # bytes, which take 45 us on an H100
LONG = 1e11  # flops of x W^T from which a call is a long one: 0.15 ms on an H100
GAIN = 1.03  # a backend is chosen from so many times the speed of torch's on, over all layers or for one
WORST = 1.01  # times torch's time is the most that it may take for any one of the layers
EAGER = 1.03  # times torch's time is the most for all layers together, if the host issues them one by one
BESIDE = "the work beside"  # the copies that follow each long call in a CUDA graph
LOST = "its time is lost in that of"  # how a reason begins that another try may not find


def plan(request: Request) -> list[Point]:
    """N and K of a row are those of the layer."""
    return grid(request, measure, weight=(True, False), direction=request.directions)


def measure(request: Request, shape: Shape, T: int, r: int, weight: bool, direction: str) -> Iterator[Row]:
    """Every backend on one kind of call, in turn with the others, and in CUDA graphs less the time of the copies."""
    copies: list[Callable[[], None]] = []  # for each set, or none

    def make() -> Case:
        case = Case(shape, T, r, direction, request.dtype, request.device, weight)
        copies.extend(_copies(case, 2.0 * T * shape.N * shape.K * weight))
        return case

    names = [name for name in backends.NAMES if name in request.paths]
    right = yield from checked(names, make, lambda case, name: case.candidate(backends.primitive(name)))
    for mode in request.modes:
        beside = mode == "graph" and copies and right
        followed = {name: _followed(each, copies[0]) for name, each in right.items()} if beside else right
        more = {BESIDE: Candidate(lambda: copies)} if beside else {}
        samples = yield from timed(request, followed | more, mode, ROUNDS)
        rest = samples.pop(BESIDE, torch.full((1,), math.inf if beside else 0.0))
        samples = {name: each - rest for name, each in samples.items()}
        for name in [name for name, each in samples.items() if not each.quantile(0.25) > 0.1 * rest.median()]:
            del samples[name]
            yield {"mode": mode} | failure(name, f"{LOST} {BESIDE} it")
        beside = {name: each for name, each in samples.items() if name == "torch"}
        for name, own in samples.items():
            yield {"mode": mode} | right[name].row | figures(name, own, beside, request.gpu)


def _copies(case: Case, work: float) -> list[Callable[[], None]]:
    """For each set copies in memory, on a GPU, that take about as long as a call of torch's backend; none of a short
    one."""
    if case.device.type != "cuda" or work < LONG:
        return []
    source = torch.empty(COPIED, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    calls = partial(backends.primitive("torch"), *case.sets[0]), partial(target.copy_, source)
    call, copy = (min(timer.once(each) for _ in range(5)) for each in calls)
    many = max(1, round(call / copy))

    def copies() -> None:
        for _ in range(many):
            target.copy_(source)

    return [copies] * len(case.sets)


def _followed(candidate: Candidate, copies: Callable[[], None]) -> Candidate:
    """Each call of it, and then the copies."""

    def both(call: Callable[[], Any]) -> None:
        call()
        copies()

    return dataclasses.replace(candidate, calls=lambda: [partial(both, call) for call in candidate.calls()])


def decide(
    rows: Iterable[Row], device: Device, kernels: dict[str, str], source: str, torch_too: bool = False
) -> list[choice.Row]:
    """The rows of the table that measured rows give, none where torch's backend is best.

    For each kind of call at most one for all layers, and before it one for each layer for which another backend is
    GAIN times as fast as the one for all layers.  With `torch_too` there are rows for torch's backend, too, so that
    they go before what another table says of such calls.

    A backend is chosen where CUDA graphs of it are GAIN times as fast as torch's over all the layers, none of them
    takes more than WORST of torch's time, and eager calls, if measured, take at most EAGER.  Ratios count by their
    upper quartile, so that noise chooses nothing.  A backend counts only where it was measured for every layer that
    torch's was measured for.

    kernels: tuned.kernels of each backend, as it ran, of torch's too for `torch_too`.
    """
    found = []
    for key, measured in kinds(rows, device).items():
        sizes = dict.fromkeys((N, K) for N, K, _ in _layers(measured, "torch"))
        everywhere, gain = _best(measured, kernels)
        for size in sizes if len(sizes) > 1 else ():
            alone = [row for row in measured if (row["N"], row["K"]) == size]
            name, its = _best(alone, kernels)
            if its >= GAIN * (1.0 if everywhere == "torch" else speed(alone, everywhere)):
                found.append(_row(key, [size], name, its, kernels, source))
        if sizes and (torch_too or everywhere != "torch"):
            found.append(_row(key, list(sizes), everywhere, gain, kernels, source))
    return found


def _best(measured: list[Row], kernels: dict[str, str]) -> tuple[str, float]:
    """The backend to choose, and its gain."""
    gains = {name: gain for name in kernels if (gain := _gain(measured, name)) >= GAIN}
    name = max(gains, key=gains.__getitem__, default="torch")
    return name, gains.get(name, 1.0)


def _row(
    key: tuple, sizes: list[tuple[int, int]], name: str, gain: float, kernels: dict[str, str], source: str
) -> choice.Row:
    """sizes: (N, K) of the layers, which a backward has the other way round."""
    N, K = zip(*(sizes if key[3] == "forward" else [size[::-1] for size in sizes]), strict=True)
    return choice.Row(*key, (min(N), max(N)), (min(K), max(K)), name, round(gain, 3), kernels.get(name, ""), source)


def kinds(rows: Iterable[Row], device: Device) -> dict[tuple, list[Row]]:
    """The rows that count, by the kind of call that they are of: {choice.Row.key: rows}."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(row["dtype"])
        if dtype and row["status"] == "ok" and choice.bucket(row["T"]) == row["T"]:
            key = (*device, dtype, row["direction"], row["weight"], padded(row["r"]), row["T"])
            found.setdefault(key, []).append(row)
    return found


def speed(measured: list[Row], name: str, mode: str | None = None) -> float:
    """How many times as fast as torch's a backend is over all layers, chosen or not; 0.0 where one was not measured."""
    layers = _layers(measured, name, mode).values()
    return sum(time for time, _ in layers) / sum(time * over for time, over in layers) if layers else 0.0


def _gain(measured: list[Row], name: str) -> float:
    """`speed` of a backend, or 0.0 if it may not be chosen."""
    slowest = max((over for _, over in _layers(measured, name).values()), default=math.inf)
    one_by_one = speed(measured, name, "eager") if _layers(measured, name, "eager") else 1.0
    return speed(measured, name) if slowest <= WORST and one_by_one * EAGER >= 1 else 0.0


def _layers(measured: list[Row], name: str, mode: str | None = None) -> dict[tuple, tuple[float, float]]:
    """{(N, K, r): torch's time for all such layers, and a backend's over it}; infinite where it was not measured.

    mode: default: "graph", or on a CPU "eager"; there the number of the layers stands for torch's time.
    """
    mode = mode or ("graph" if any(row["mode"] == "graph" for row in measured) else "eager")
    times, overs = {}, {}
    for row in measured:
        layer = (row["N"], row["K"], row["r"])
        if (row["path"], row["mode"]) == ("torch", mode):
            times[layer] = row["count"] * row.get("seconds", {"median": 1.0})["median"]
        if (row["path"], row["mode"]) == (name, mode) and "torch" in row["over"]:
            overs[layer] = row["over"]["torch"]["high"]
    return {layer: (time, overs.get(layer, math.inf)) for layer, time in times.items()}


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """Over the torch backend's time."""
    names = [name for name in dict.fromkeys(row["path"] for row in rows) if name != "torch"]
    for mode, group in tables.grouped(rows).items():
        said = (row | {"with W": " with W" * row["weight"]} for row in group)
        points = tables.labelled(said, "{dtype} {direction}{with W}, T {T}, r {r}, {N} x {K}")
        columns = [(name, name, partial(tables.over, other="torch")) for name in names]
        note = tables.ratios_to("the torch backend")
        yield tables.compared(f"Calls of the primitive, {mode}", points, columns, note)


QUESTION = Question(name="choice", plan=plan, tables=show, paths=paths.PATHS)
