"""The experiments that decide the design of the kernels: paired ratios, each with its prediction beside it.

    swizzle   the tail GEMM in each order of its tiles, beside the library's x W^T; on 128 multiprocessors; two ranks
    beta      y += x W^T beside y = x W^T: one more read of y
    mm        z = x A^T by the library with an fp32 result, beside its bytes
    shrink    z, u and the gram by csrc/shrink.cu, beside their bytes and beside the library's z
    beside    the GEMM on 128 multiprocessors with and without a shrink on those it leaves free
    host      a launch, as the host pays for it
    counters  what the profiler counts of the GEMM at swizzle 1 and 8, where it may

What a prediction says in bytes is turned into time by a copy that is timed in the same rounds.  The order is that of
plan(): the most decisive first, until BUDGET is spent.  An experiment that raises costs only its own rows.

Counted for swizzle: each program makes a tile of y, 128 x 256 or 128 x 128; those that run at the same time (a wave)
find in L2 what others of them have read.  So a wave asks memory once for each row block of x and each column block of W
that its tiles need (Cut.reads).  For 14336 x 4096 and T = 8192 on 132 multiprocessors, along N, 28 waves of 45 us in
128 x 256 tiles read, in MB a wave and TB/s:

    swizzle 1    118 MB    2.6 TB/s        swizzle 4    45 MB    1.0 TB/s
    swizzle 2     74 MB    1.6 TB/s        swizzle 8    37 MB    0.8 TB/s

From L2 to the multiprocessors all of them move the same: (128 + 256 / 2) K elements a tile.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends, reference
from ..backends import cuda
from ..backends import torch as torch_backend
from ..backends.cuda import config, core
from ..backends.device import facts
from . import BenchError, chain, gemm, timer
from .layer import Row, failure, figures, release
from .paths import Operands
from .roofline import STEP
from .shapes import Shape, parse

if TYPE_CHECKING:
    from .settings import Settings

BUDGET = 47.0  # seconds after which no experiment is begun: 60 less what torch's start and the ceilings take
PROFILER = 20.0  # seconds that the profiler may take
SWIZZLES = (1, 2, 4, 8)
RASTERS = {1: "along T", 2: "along N"}
FEW = 128  # multiprocessors that the tiles of T = 8192 fill in whole waves; the others are free for z
HOST = (64, 64, 64, 16)  # T, N, K, r of the question what a launch costs
# Microseconds.  Triton: the 44 that an H100's host took, less what is no longer done, which takes two to three times as
# long there as by bench/launch_cost.py.  The core's: our Python 6, 3.4 and 9, timed on a CPU; guessed: binding 1.5,
# memory and stream 1, five descriptors of the GEMM 2.5, driver 2.5.  The library's: guessed.
HOST_PREDICTED = {
    "triton chain": (24, 32),
    "cuda shrink": (9, 13),
    "cuda gemm_tail": (9, 14),
    "cuda decode": (12, 17),
    "F.linear": (4, 8),
    "addmm": (5, 9),
}
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum", "gpu__time_duration.sum")


@dataclass(frozen=True)
class Experiment:
    """`run` yields rows, to which `where` is added; it is not begun with less than `seconds` left."""

    name: str
    where: Row
    run: Callable[[], Iterator[Row]]
    seconds: float = 0.0


def plan(settings: Settings) -> list[Experiment]:
    """All of them, the most decisive first."""
    T, few, r = max(settings.tokens), min(settings.tokens), max(settings.ranks)
    tokens = sorted(set(settings.tokens), reverse=True)
    ranks = sorted(set(settings.ranks), reverse=True)
    wide = sorted(settings.shapes, key=lambda shape: -shape.N)  # of which swizzle 1 is predicted to be slow comes first
    one = settings.shapes[0]
    found = []

    def add(name: str, run: Callable[..., Iterator[Row]], shape: Shape, T: int, r: int | None, *more: object) -> None:
        where = {"N": shape.N, "K": shape.K, "T": T} | ({} if r is None else {"r": r})
        where |= {"direction": more[0]} if more else {}
        arguments = (shape, T) if r is None else (shape, T, r)
        found.append(Experiment(name, where, partial(run, settings, *arguments, *more)))

    for shape in wide:
        add("swizzle", _swizzle, shape, T, r, "forward")
    for each in tokens:
        for shape in wide:
            if shape.K == one.K:
                add("beta", _beta, shape, each, None)
    for each in tokens:
        for rank in ranks:
            add("mm", _mm, one, each, rank)
    for each in tokens:
        for rank in ranks:
            for direction in ("forward", "backward"):
                add("shrink", _shrink, one, each, rank, direction)
    for shape in dict.fromkeys((one, wide[0])):
        for rank in ranks:
            add("beside", _beside, shape, T, rank)
    found.append(Experiment("host", dict(zip("TNKr", HOST, strict=True)), partial(_host, settings)))
    add("counters", _counters, wide[0], T, r)
    found[-1] = dataclasses.replace(found[-1], seconds=PROFILER)
    for shape in wide:
        add("swizzle", _swizzle, shape, T, r, "backward")
    for shape in wide if few < T else ():
        for direction in ("forward", "backward"):
            add("swizzle", _swizzle, shape, few, r, direction)
    return found


def points(settings: Settings) -> int:
    return len(plan(settings))


def rows(settings: Settings) -> Iterator[Row]:
    """The rows of every experiment; one that raises, or that there is no time for, is a failed row."""
    end = time.perf_counter() + BUDGET
    for each in plan(settings):
        where = {"question": "experiments", "experiment": each.name, "dtype": settings.dtype_name, **each.where}
        if (left := end - time.perf_counter()) < each.seconds:
            yield where | failure(each.name, f"not begun: {left:.0f} of {BUDGET:.0f} s were left")
            continue
        try:
            for row in each.run():
                yield where | row
        except BenchError as error:
            yield where | failure(each.name, str(error))
        except Exception as error:
            yield where | failure(each.name, error)
        release()


def against(measured: Tensor, low: Tensor | float, high: Tensor | float, unit: str, why: str) -> Row:
    """What was measured in each round beside the range predicted for it: numbers, or a number a round; the ratio is to
    the middle of the range.

    unit: "s", "x" (a ratio), "B/s" or "B".
    """
    low, high = (torch.as_tensor(each, dtype=torch.float64) for each in (low, high))
    return {
        "unit": unit,
        "measured": dataclasses.asdict(timer.Spread.of(measured)),
        "predicted": {"low": low.median().item(), "high": high.median().item(), "why": why},
        "ratio": dataclasses.asdict(timer.Spread.of(measured / ((low + high) / 2))),
    }


def line(what: str, measured: Tensor, *prediction: object) -> Row:
    """A row for a ratio of two paths that have rows of their own."""
    found = against(measured, *prediction)
    return {"path": what, "status": "ok", "rounds": len(measured), "noisy": timer.Spread.of(measured).noisy} | found


# --- in which order the GEMM walks its tiles


@dataclass(frozen=True)
class Cut:
    """How the GEMM with a tail is cut: a tile of config.TILES, and the order in which CUTLASS's scheduler walks."""

    tile: int
    swizzle: int
    raster: int  # of RASTERS
    multiprocessors: int | None = None

    def __str__(self) -> str:
        rows, columns, *_ = config.TILES[self.tile]
        return f"{rows}x{columns} swizzle {self.swizzle} {RASTERS[self.raster]}"

    def __call__(self, x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> Tensor:
        return cuda.gemm_tail(
            *(x, W, u, B, None, self.tile, False),
            swizzle=self.swizzle,
            raster=self.raster,
            multiprocessors=self.multiprocessors,
        )

    def _tiles(self, T: int, N: int) -> tuple[int, int]:
        """Of y: rows, in whole clusters, and columns."""
        rows, columns, *_ = config.TILES[self.tile]
        return config.PAIR * -(-T // (config.PAIR * rows)), -(-N // columns)

    def distinct(self, T: int, N: int) -> bool:
        """Whether there are tiles enough for this swizzle; CUTLASS takes a smaller one else."""
        return min(self._tiles(T, N)) >= {1: 1, 2: 2, 4: 3, 8: 6}[self.swizzle]

    def reads(self, T: int, N: int, K: int, multiprocessors: int, itemsize: int = 2) -> tuple[int, int]:
        """(waves, bytes of x and W that they ask of memory in all), where a wave reads nothing twice and keeps nothing.

        As CUTLASS's static scheduler walks: both counts of tiles are rounded up to whole swizzles (what is past an
        edge is not read), and cluster c is number c mod swizzle across, then along the raster.
        """
        rows, columns, *_ = config.TILES[self.tile]
        down, across = self._tiles(T, N)
        unit = self.swizzle * config.PAIR
        down, across = -(-down // unit) * unit // config.PAIR, -(-across // self.swizzle) * self.swizzle
        along = across if self.raster == 2 else down
        clusters = min(self.multiprocessors or multiprocessors, multiprocessors) // config.PAIR
        seen = range(0, down * across, clusters)
        total = 0
        for first in seen:
            wave = range(first, min(first + clusters, down * across))
            minor = {c // self.swizzle // along * self.swizzle + c % self.swizzle for c in wave}
            major = {c // self.swizzle % along for c in wave}
            m, n = (minor, major) if self.raster == 2 else (major, minor)
            high, wide = config.PAIR * rows, columns
            total += sum(max(0, min(high, T - i * high)) for i in m) + sum(max(0, min(wide, N - j * wide)) for j in n)
        return len(seen), total * K * itemsize


def today(case: gemm.Case) -> Cut:
    """The tile that is picked, at swizzle 1 in the order that CUTLASS's heuristic takes."""
    picked = config.pick(case.T, case.N, case.K, case.r, case.dtype, facts(case.device), core.architectures())
    cut = Cut(getattr(picked, "tile", None) or 0, 1, 2)
    down, across = cut._tiles(case.T, case.N)
    return dataclasses.replace(cut, raster=1) if across > down else cut


def _swizzle(settings: Settings, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    """The library's x W^T and every cut; then, of the best one, what multiprocessors and the rank change."""
    if why := gemm.missing(settings.dtype, settings.device):
        raise BenchError(why)
    case = gemm.Case(shape, T, r, direction, settings.dtype, settings.device)
    every, now = facts(settings.device).multiprocessors, today(case)
    cuts = [Cut(tile, swizzle, raster) for tile in config.TILES for raster in RASTERS for swizzle in SWIZZLES]
    cuts = [cut for cut in cuts if cut.distinct(T, case.N)]
    mode = _mode(settings, T)
    paths = {"frozen": gemm.PATHS["frozen"]} | {str(cut): cut for cut in cuts}
    passes, failed = _ready(case, paths, mode)
    yield from failed
    copy, copied = _copy(settings)
    samples = _time(settings, passes | {"copy": copy})
    ran = {name: cut for name, cut in paths.items() if name in samples and name != "frozen"}
    for name in [name for name in paths if name in samples]:
        row = {"path": name, "mode": mode} | figures(samples, name, settings.device, ("frozen",))
        if name in ran:
            waves, total = ran[name].reads(T, case.N, case.K, every, settings.dtype.itemsize)
            row |= {"tile": config.TILES[ran[name].tile][:2], "waves": waves, "wave_bytes": total / waves}
        yield row
    if not ran or "frozen" not in samples:
        return
    best = ran[min(ran, key=lambda name: samples[name].median().item())]
    tail = STEP * -(-r // STEP) / case.K
    if str(now) in ran:
        _, total = now.reads(T, case.N, case.K, every, settings.dtype.itemsize)
        asked = total / ((1 + tail) * samples["frozen"].median().item())
        share = asked * samples["copy"].median().item() / copied
        slow = (1.1, 1.2) if share > 0.8 else (1.0, 1.03)
        why = f"reads {asked / 1e12:.2f} TB/s, {share:.0%} of the copy's; from 80 % on slower by 10 to 20 %"
        yield {"mode": mode} | line(f"{now} over {best}", samples[str(now)] / samples[str(best)], *slow, "x", why)
    why = "one step of u more, and 0.5 to 1.5 % that the library's GEMM is better"
    measured = samples[str(best)] / samples["frozen"]
    yield {"mode": mode} | line(f"{best} over frozen", measured, 1.005 + tail, 1.015 + tail, "x", why)
    if max(settings.tokens) == T and direction == "forward":
        del passes, samples
        yield from _few(settings, shape, case, best, mode)


def _few(settings: Settings, shape: Shape, case: gemm.Case, best: Cut, mode: str) -> Iterator[Row]:
    """The best cut on FEW multiprocessors, and at the lowest rank."""
    every, low = facts(settings.device).multiprocessors, min(settings.ranks)
    passes, failed = _ready(case, {str(best): best}, mode)
    fewer = dataclasses.replace(best, multiprocessors=FEW)
    if every > FEW:
        more, wrong = _ready(case, {f"on {FEW}": fewer}, mode)
        passes, failed = passes | more, failed + wrong
    if low < case.r:
        narrow = gemm.Case(shape, case.T, low, "forward", settings.dtype, settings.device)
        more, wrong = _ready(narrow, {f"r {low}": best}, mode)
        passes, failed = passes | more, failed + wrong
    yield from failed
    samples = _time(settings, passes)
    if f"on {FEW}" in samples:
        waves = [cut.reads(case.T, case.N, case.K, every)[0] for cut in (fewer, best)]
        expected, why = waves[0] / waves[1], f"{waves[0]} waves beside {waves[1]}"
        measured = samples[f"on {FEW}"] / samples[str(best)]
        yield {"mode": mode} | line(
            f"{best}: {FEW} multiprocessors over {every}", measured, expected - 0.01, expected + 0.01, "x", why
        )
    if f"r {low}" in samples:
        steps = [-(-r // STEP) * STEP + case.K for r in (low, case.r)]
        why, expected = f"{steps[0]} columns beside {steps[1]}: whole steps of {STEP}", steps[0] / steps[1]
        measured = samples[f"r {low}"] / samples[str(best)]
        yield {"mode": mode} | line(
            f"{best}: r {low} over r {case.r}", measured, expected - 0.01, expected + 0.01, "x", why
        )


# --- the library


class _Accumulate(gemm.Case):
    """(x, W, y): y = x W^T, or added to y, which is 1 everywhere when it is checked."""

    def __init__(self, settings: Settings, shape: Shape, T: int) -> None:
        super().__init__(shape, T, 1, "forward", settings.dtype, settings.device)
        self.sets = [(x, W, x.new_ones(T, self.N)) for x, W, *_ in self.sets]

    def _results(self, path: Callable) -> dict[str, Tensor]:
        x, W, y = self.sets[0]
        return {"y": path(x, W, y.fill_(1))[self._rows].double() - float(path is _beta_1)}

    @cached_property
    def _oracle(self) -> dict[str, tuple[Tensor, float]]:
        x, W, _ = self.sets[0]
        rounded, exact = (F.linear(x[self._rows].to(dtype), W.to(dtype)) for dtype in (self.dtype, torch.float64))
        return {"y": (exact, reference.allowed_error(rounded, exact, self.dtype))}


def _beta_0(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, W.t(), out=y)


def _beta_1(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return y.addmm_(x, W.t())


def _beta(settings: Settings, shape: Shape, T: int) -> Iterator[Row]:
    case, mode = _Accumulate(settings, shape, T), _mode(settings, T)
    passes, failed = _ready(case, {"beta 0": _beta_0, "beta 1": _beta_1}, mode)
    yield from failed
    copy, copied = _copy(settings)
    samples = _time(settings, passes | {"copy": copy})
    for name in passes:
        row = {"path": name, "mode": mode} | figures(samples, name, settings.device, ("beta 0",))
        if name == "beta 1" and "beta 0" in samples:
            more = T * shape.N * settings.dtype.itemsize
            expected = 1 + more * samples["copy"] / copied / samples["beta 0"]
            measured, why = samples[name] / samples["beta 0"], f"{more / 1e6:.1f} MB of y read at the copy's rate"
            row |= {"bytes": more} | against(measured, expected, expected, "x", why)
        yield row


class _Narrow(chain.Case):
    """(x, A, R, s, other) for z = x A^T alone, or with u = s z R^T and the gram; backward on views, as chain.Case."""

    def __init__(self, settings: Settings, shape: Shape, T: int, r: int, direction: str) -> None:
        dtype, device = settings.dtype, settings.device
        self.device, self.T, self.r = device, T, r
        self.K = shape.K if direction == "forward" else shape.N
        self.itemsize = dtype.itemsize

        def operands(seed: int) -> tuple:
            o = Operands.random(T, shape.N, shape.K, r, dtype, device, seed)
            if direction == "forward":
                return o.x.detach(), o.A, o.R, o.s, None
            return o.gY, o.B.t(), o.R.t(), o.s, (o.x.detach() @ o.A.t()).float()

        needed = timer.sets_needed(device, self.K * (T + r) * self.itemsize)
        self.sets = [operands(seed) for seed in range(needed)]

    def bytes_of(self, u: bool) -> int:
        """Those of x, A and z; with `u` those of u, and of the gram and what it needs, where there is one."""
        found = self.K * (self.T + self.r) * self.itemsize + 4 * self.T * self.r
        if u:
            found += self.T * self.r * self.itemsize
            if self.sets[0][4] is not None:
                found += 4 * self.T * self.r + 4 * self.r**2 * -(-self.T // config.SHRINK_ROWS)
        return found

    def wrong(self, path: Callable) -> list[str]:
        """Which of the results, where a path has all of them or z alone, break the accuracy rule."""
        found = path(*self.sets[0])
        z, u, gram = found if isinstance(found, tuple) else (found, None, None)
        got = {"z": z[self._rows], "u": None if u is None else u[self._rows]}
        got["gram"] = gram if gram is None or gram.dim() == 2 else gram.sum(0)
        return [
            what
            for what, value in got.items()
            if value is not None and not reference.relative_error(value, self._oracle[what][0]) <= self._oracle[what][1]
        ]

    @cached_property
    def _oracle(self) -> dict[str, tuple[Tensor, float]]:
        x, A, R, s, other = self.sets[0]

        def expected(dtype: torch.dtype) -> dict[str, Tensor]:
            z = x[self._rows].to(dtype) @ A.to(dtype).t()
            found = {"z": z, "u": s * z @ R.to(dtype).t()}
            whole = {} if other is None else {"gram": s * (x.to(dtype) @ A.to(dtype).t()).t() @ other.to(dtype)}
            return found | whole

        rounded, exact = expected(x.dtype), expected(torch.float64)
        return {what: (t, reference.allowed_error(rounded[what], t, x.dtype)) for what, t in exact.items()}


def _mm_fp32(x: Tensor, A: Tensor, *_: object) -> Tensor:
    """torch.mm(out_dtype=torch.float32), on a GPU."""
    return torch_backend.shrink(x, A.t())


def _mm_rounded(x: Tensor, A: Tensor, *_: object) -> Tensor:
    return F.linear(x, A)


def _mm(settings: Settings, shape: Shape, T: int, r: int) -> Iterator[Row]:
    case = _Narrow(settings, shape, T, r, "forward")
    yield from _narrow(settings, case, {"mm fp32": _mm_fp32, "mm": _mm_rounded}, "mm fp32", "mm", _floor)


def _shrink(settings: Settings, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    if reason := backends.unavailable("cuda"):
        raise BenchError(reason)
    case = _Narrow(settings, shape, T, r, direction)
    split = config.split(T, case.K, facts(settings.device).multiprocessors)
    paths = {"cuda shrink": partial(_cuda_shrink, split), "mm fp32": _mm_fp32}
    yield from _narrow(settings, case, paths, "cuda shrink", "mm fp32", partial(_by_shrink, split))


def _cuda_shrink(split: int, x: Tensor, A: Tensor, R: Tensor, s: float, other: Tensor | None) -> tuple:
    return cuda.shrink(x, A, R, s, other, split, False)


def _floor(floor: Tensor) -> tuple[Tensor, Tensor, str]:
    return floor, floor, "at the copy's rate"


def _by_shrink(split: int, floor: Tensor) -> tuple[Tensor, Tensor, str]:
    """What csrc/shrink.cu is predicted to take: the time of its bytes, or a launch more."""
    if split > 1:
        return floor + 2e-6, floor + 6e-6, f"at the copy's rate, and 2 to 6 us for two launches, {split} blocks share K"
    return floor, 1.2 * floor, "at the copy's rate, up to 20 % more"


def _narrow(
    settings: Settings, case: _Narrow, paths: dict[str, Callable], name: str, other: str, predict: Callable
) -> Iterator[Row]:
    """Rows of two paths to z; the first one has a prediction."""
    mode = _mode(settings)
    passes, failed = _ready(case, paths, mode)
    yield from failed
    copy, copied = _copy(settings)
    samples = _time(settings, passes | {"copy": copy})
    for each in passes:
        size = case.bytes_of(u=each == "cuda shrink")
        row = {"path": each, "mode": mode, "bytes": size} | figures(samples, each, settings.device, (other,))
        if each == name:
            low, high, why = predict(size * samples["copy"] / copied)
            row |= against(samples[each], low, high, "s", f"{size / 1e6:.1f} MB {why}")
        yield row


# --- z on the multiprocessors that the GEMM leaves free


def _beside(settings: Settings, shape: Shape, T: int, r: int, rounds: int = 21) -> Iterator[Row]:
    """The GEMM on FEW multiprocessors alone, and with launches of a shrink on a second stream for as long as it takes.

    A launch has 64 rows for each multiprocessor that is free.  The GEMM is begun first, so that its clusters of two
    find their places; the shrinks follow 20 us later.
    """
    if why := gemm.missing(settings.dtype, settings.device):
        raise BenchError(why)
    free = facts(settings.device).multiprocessors - FEW
    if free < 1:
        raise BenchError(f"the GPU has {FEW + free} multiprocessors, more than {FEW} are needed")
    case = gemm.Case(shape, T, r, "forward", settings.dtype, settings.device)
    cut = Cut(0, 4, 2, FEW)
    narrow = _Narrow(settings, shape, config.SHRINK_ROWS * free, r, "forward")
    _, A, R, s, _ = narrow.sets[0]
    wrong = case.wrong(cut) + narrow.wrong(partial(_cuda_shrink, 1))
    if wrong:
        raise BenchError(f"not timed, it is wrong: {', '.join(wrong)}")
    x = case.sets[0][0]
    blocks = [block for block in x.split(config.SHRINK_ROWS * free) if len(block) == config.SHRINK_ROWS * free]
    if not blocks:
        raise BenchError(f"tokens: got {T}, must be at least {config.SHRINK_ROWS * free}")
    every = [
        timer.prepare(
            lambda some=some: [partial(_cuda_shrink, 1, block, A, R, s, None) for block in some],
            case.device,
            graph=True,
        )
        for some in (blocks[i : i + 4] for i in range(0, len(blocks), 4))
    ]
    side = torch.cuda.Stream(case.device)

    def once(launches: int) -> tuple[float, float]:
        """Seconds of the GEMM, and of that many groups of shrinks beside it."""
        start, end, first, last = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        torch.cuda.synchronize()
        cut(*case.sets[0])  # until it is done the host gets ahead
        start.record()
        y = cut(*case.sets[0])
        end.record()
        with torch.cuda.stream(side):
            side.wait_event(start)
            torch.cuda._sleep(40_000)
            first.record()
            for i in range(launches):
                every[i % len(every)].run()
            last.record()
        torch.cuda.synchronize()
        del y
        return start.elapsed_time(end) * 1e-3, first.elapsed_time(last) * 1e-3

    once(1)
    took, group = once(1)
    launches = max(1, int(0.9 * (took - 20e-6) / group))
    once(launches)
    pairs = [(once(0)[0], *once(launches)) for _ in range(rounds)]
    alone, beside, lasted = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    rows_read = sum(config.SHRINK_ROWS * free * every[i % len(every)].length for i in range(launches))
    rate = rows_read * shape.K * settings.dtype.itemsize / lasted
    needed = T * shape.K * settings.dtype.itemsize / alone.median().item()
    samples = {"alone": alone, "beside": beside}
    more = {"mode": "eager", "groups": launches, "rows": rows_read}
    yield more | {"path": f"{cut} on {FEW}, alone"} | figures(samples, "alone", settings.device, ())
    why = "the shrink has multiprocessors of its own, and takes little of the memory's speed"
    what = f"{cut} on {FEW}, beside a shrink"
    yield (
        more
        | {"path": what}
        | figures(samples, "beside", settings.device, ("alone",))
        | against(beside / alone, 1.0, 1.02, "x", why)
    )
    most = free * (32e9 if r > 32 else 48e9)  # bytes of x under way on a multiprocessor, each for a microsecond
    why = f"at most {most / 1e9:.0f} GB/s by the copies under way; the GEMM needs {needed / 1e9:.0f}"
    what = f"shrink's rate beside it, {needed / 1e9:.0f} GB/s needed"
    yield (
        more
        | {"needed": needed, "lasted": (lasted / beside).median().item()}
        | line(what, rate, 0.7 * most, most, "B/s", why)
    )


# --- the host


def _host(settings: Settings) -> Iterator[Row]:
    """Issuing each launch to an idle device."""
    T, N, K, r = HOST
    o = Operands.random(T, N, K, r, settings.dtype, settings.device, seed=0)
    x, W, A, R, B = o.x.detach(), o.W, o.A, o.R, o.B
    u, y = x[:, :r].contiguous(), x.new_zeros(T, N)
    calls: dict[str, tuple[Callable, str | None]] = {
        "triton chain": (lambda: backends.primitive("triton")(x, None, A, R, B, o.s), backends.unavailable("triton")),
        "cuda shrink": (lambda: cuda.shrink(x, A, R, o.s, None, 1, False), backends.unavailable("cuda")),
        "cuda gemm_tail": (
            lambda: cuda.gemm_tail(x, W, u, B, None, 0, False),
            gemm.missing(settings.dtype, settings.device),
        ),
        "cuda decode": (lambda: cuda.decode(x, A, R, B, o.s), backends.unavailable("cuda")),
        "F.linear": (lambda: F.linear(x, W), None),
        "addmm": (lambda: y.addmm_(x, W.t()), None),
    }
    passes = {}
    for name, (call, reason) in calls.items():
        if reason:
            yield failure(name, reason)
            continue
        try:
            passes[name] = timer.prepare(lambda call=call: [call], settings.device)
        except Exception as error:
            yield failure(name, error)
    samples = timer.interleave(passes, settings.device, settings.seconds, issue=True)
    for name in passes:
        low, high = (each * 1e-6 for each in HOST_PREDICTED[name])
        row = {"path": name, "mode": "eager"} | figures(samples, name, settings.device, ("F.linear",))
        yield row | against(samples[name], low, high, "s", "partly counted without a GPU, partly guessed")


# --- the profiler


def _counters(settings: Settings, shape: Shape, T: int, r: int) -> Iterator[Row]:
    """Bytes from memory at swizzle 1 and 8; where the profiler is not here or may not count, a row that says so."""
    if why := gemm.missing(settings.dtype, settings.device):
        raise BenchError(why)
    swizzles, every = (1, 8), facts(settings.device).multiprocessors
    found = _profiled(["launch", str(shape), str(T), str(r), settings.dtype_name, *map(str, swizzles)])
    if isinstance(found, str):
        yield {"path": "counters", "status": "ok", "not_read": found}
        return
    for swizzle, counters in zip(swizzles, found, strict=True):
        waves, total = Cut(0, swizzle, 2).reads(T, shape.N, shape.K, every, settings.dtype.itemsize)
        why = f"{waves} waves that keep nothing would read {total / 1e9:.2f} GB, half of it may stay in the cache"
        measured = torch.tensor([counters["dram__bytes_read.sum"]], dtype=torch.float64)
        what = f"swizzle {swizzle}: bytes from memory"
        yield line(what, measured, total / 2, total, "B", why) | {"counters": counters}


def _profiled(arguments: list[str]) -> list[dict[str, float]] | str:
    """The counters of each launch of this module's command line, or why there are none."""
    ncu = shutil.which("ncu", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if ncu is None:
        return "there is no ncu here"
    command = [ncu, "--clock-control", "none", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "regex:device_kernel", sys.executable, "-m", __name__, *arguments]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=PROFILER)
    except subprocess.TimeoutExpired:
        return f"ncu was not done after {PROFILER:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return counted(text, len(arguments) - 5)


def counted(text: str, launches: int) -> list[dict[str, float]] | str:
    """ncu's CSV, {metric: value} for each launch; its own words where it counted nothing."""
    lines = text.splitlines()
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(each for each in lines if each.startswith('"')):
        if row.get("Metric Name") in METRICS:
            found.setdefault(row["ID"], {})[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    if len(found) == launches and all(len(each) == len(METRICS) for each in found.values()):
        return list(found.values())
    errors = [each for each in lines if "ERR" in each.upper()] or lines[-1:] or ["no output"]
    return f"ncu: {errors[0].strip('= ')}"


def launch(shape: str, T: str, r: str, dtype: str, *swizzles: str) -> None:
    """One GEMM for each swizzle, 128 x 256 along N, for the profiler to see."""
    from .settings import DTYPES

    case = gemm.Case(parse(shape), int(T), int(r), "forward", DTYPES[dtype], torch.device("cuda"))
    for swizzle in swizzles:
        Cut(0, int(swizzle), 2)(*case.sets[0])
    torch.cuda.synchronize()


# --- what they share


def _mode(settings: Settings, T: int = 0) -> str:
    """Graphs on a GPU, but where there is so much to do that the host is ahead anyway."""
    return "graph" if settings.device.type == "cuda" and T <= 1024 else "eager"


def _ready(case: chain.Case, paths: dict[str, Callable], mode: str) -> tuple[dict[str, timer.Pass], list[Row]]:
    """(the paths that are right, warmed up; the rows of the others)."""
    passes, failed = {}, []
    for name, path in paths.items():
        try:
            if wrong := case.wrong(path):
                failed.append({"mode": mode} | failure(name, f"not timed, it is wrong: {', '.join(wrong)}"))
            else:
                passes[name] = case.prepare(path, mode == "graph")
        except Exception as error:
            failed.append({"mode": mode} | failure(name, error))
    return passes, failed


def _copy(settings: Settings) -> tuple[timer.Pass, int]:
    """A copy past every cache, and the bytes that it reads and writes."""
    words = 1 << (26 if settings.device.type == "cuda" else 16)
    source = torch.randn(words, device=settings.device)
    target = torch.empty_like(source)
    return timer.prepare(lambda: [lambda: target.copy_(source)], settings.device), 8 * words


def _time(settings: Settings, passes: dict[str, timer.Pass]) -> dict[str, Tensor]:
    return timer.interleave(passes, settings.device, settings.seconds)


if __name__ == "__main__":
    {"launch": launch}[sys.argv[1]](*sys.argv[2:])
