"""Which backend is fastest, call by call?  The primitive with and without W, forward and backward, on each backend.

`rows` measures, every backend beside torch's in the same rounds; `decide` makes of such rows those of the table that
`loraxs_kernels.backends.choose` looks into (backends/choice.py).

Long products follow each other without a pause nowhere but in a bench, where they hold the GPU at its power limit;
there another backend can be ahead than in a model (bench/results/NOTES.md).  So in CUDA graphs a long call is followed
by copies that take about as long, since memory takes half the time of a training step; their own time is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import backends
from ..backends import choice
from ..backends.device import Device
from ..backends.triton.config import padded
from . import timer
from .chain import Case, side_by_side
from .layer import Row, failure, release
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

ROUNDS = 5  # at least
COPIED = 2**26  # bytes, which take 45 us on an H100
LONG = 1e11  # flops of x W^T from which a call is a long one: 0.15 ms on an H100
GAIN = 1.03  # a backend is chosen from so many times the speed of torch's on, over all layers or for one
WORST = 1.01  # of torch's time, that it may take for any one of the layers
EAGER = 1.03  # of torch's time, that it may take over all layers where the host issues them one by one


def points(settings: Settings) -> int:
    return len(settings.tokens) * len(settings.ranks) * len(settings.shapes) * len(_directions(settings)) * 2


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each backend and mode at each point of the grid; all shapes of one kind of call first."""
    for T in settings.tokens:
        for r in settings.ranks:
            for weight in (True, False):
                for direction in _directions(settings):
                    for shape in settings.shapes:
                        yield from measure(settings, shape, T, r, direction, weight)
                        release()


def _directions(settings: Settings) -> tuple[str, ...]:
    return choice.DIRECTIONS if settings.direction == "both" else (settings.direction,)


def measure(settings: Settings, shape: Shape, T: int, r: int, direction: str, weight: bool) -> Iterator[Row]:
    """Every backend on one kind of call, in turn; N and K of a row are those of the layer."""
    names = [name for name in backends.NAMES if name in settings.paths]
    where: Row = {
        **{"question": "choice", "model": settings.model, "layers": shape.names, "count": shape.count},
        **{"N": shape.N, "K": shape.K, "T": T, "r": r, "dtype": settings.dtype_name},
        **{"direction": direction, "weight": weight},
    }
    try:
        case = Case(shape, T, r, direction, settings.dtype, settings.device, weight)
    except torch.OutOfMemoryError:
        yield from (where | failure(name, "out of memory: the operands alone") for name in names)
        return
    try:
        case.rest = _copies(case, 2.0 * T * shape.N * shape.K * weight)
    except Exception as error:
        yield from (where | failure(name, error) for name in names)
        return
    yield from side_by_side(case, {name: partial(backends.primitive, name) for name in names}, where, settings, ROUNDS)


def _copies(case: Case, work: float) -> Callable[[], None] | None:
    """Copies in memory, on a GPU, that take about as long as a call of torch's backend; None: that is a short one."""
    if case.device.type != "cuda" or work < LONG:
        return None
    source = torch.empty(COPIED, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    calls = partial(backends.primitive("torch"), *case.sets[0]), partial(target.copy_, source)
    call, copy = (min(timer.once(each) for _ in range(5)) for each in calls)
    many = max(1, round(call / copy))

    def copies() -> None:
        for _ in range(many):
            target.copy_(source)

    return copies


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
        mode = _best_mode(measured)
        base = [row for row in measured if row["path"] == "torch" and row["mode"] == mode]
        sizes = dict.fromkeys((row["N"], row["K"]) for row in base)
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


def speed(measured: list[Row], name: str) -> float:
    """How many times as fast as torch's a backend is over all layers, chosen or not; 0.0 where one was not measured."""
    overs, base = _over(measured, name, _best_mode(measured))
    return _speed(overs, base) if base and overs.keys() == base.keys() else 0.0


def _best_mode(measured: list[Row]) -> str:
    return "graph" if any(row["mode"] == "graph" for row in measured) else "eager"  # a CPU has no graphs


def _gain(measured: list[Row], name: str) -> float:
    """Time of torch's backend over that of another, over all layers in CUDA graphs; 0.0 where it may not be chosen."""
    overs, base = _over(measured, name, _best_mode(measured))
    if not base or overs.keys() != base.keys() or max(overs.values()) > WORST:
        return 0.0
    if 1 / _speed(*_over(measured, name, "eager")) > EAGER:
        return 0.0
    return _speed(overs, base)


def _over(measured: list[Row], name: str, mode: str) -> tuple[dict[tuple, float], dict[tuple, float]]:
    """Time over torch's for each layer, and torch's own of all layers of its shape (on a CPU: how many those are)."""
    own, base = {}, {}
    for row in measured:
        layer = (row["N"], row["K"], row["r"])
        if row["mode"] == mode and row["path"] == name and (over := row["over"].get("torch")):
            own[layer] = over["high"]
        if row["mode"] == mode and row["path"] == "torch":
            base[layer] = row["count"] * row.get("seconds", {}).get("median", 1.0)
    return own, base


def _speed(overs: dict[tuple, float], base: dict[tuple, float]) -> float:
    """Torch's time for these layers over the other backend's; 1.0 where there are none."""
    both = overs.keys() & base.keys()
    return sum(base[layer] for layer in both) / sum(base[layer] * overs[layer] for layer in both) if both else 1.0
