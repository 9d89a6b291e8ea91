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
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..backends import cuda
from ..backends import torch as torch_backend
from ..backends.cuda import config, core
from ..backends.device import facts
from . import BenchError, compare, gemm, tables, timer
from .compare import Candidate, Results, Row, checked, figures, timed
from .paths import Operands
from .question import Point, Question
from .request import DTYPES, Request
from .roofline import STEP
from .shapes import Shape, parse
from .tables import Table

BUDGET = 47.0  # seconds after which no experiment is begun: 60 less what torch's start and the ceilings take
PROFILER = 20.0  # seconds that the profiler may take
SWIZZLES = (1, 2, 4, 8)
RASTERS = {1: "along T", 2: "along N"}
FEW = 128  # multiprocessors that the tiles of T = 8192 fill in whole waves; the others are free for z
HOST = (64, 64, 64, 16)  # T, N, K, r of the question what a launch costs
# Microseconds.  Triton: the 44 that an H100's host took, less what is no longer done, which takes two to three times as
# long there as by bench/costs.py.  The core's: our Python 6, 3.4 and 9, timed on a CPU; guessed: binding 1.5,
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


def every(request: Request) -> list[Experiment]:
    """All of them, the most decisive first."""
    T, few, r = max(request.tokens), min(request.tokens), max(request.ranks)
    tokens = sorted(set(request.tokens), reverse=True)
    ranks = sorted(set(request.ranks), reverse=True)
    wide = sorted(request.shapes, key=lambda shape: -shape.N)  # of which swizzle 1 is predicted to be slow comes first
    one = request.shapes[0]
    found = []

    def add(name: str, run: Callable[..., Iterator[Row]], shape: Shape, T: int, r: int | None, *more: object) -> None:
        where = {"N": shape.N, "K": shape.K, "T": T} | ({} if r is None else {"r": r})
        where |= {"direction": more[0]} if more else {}
        arguments = (shape, T) if r is None else (shape, T, r)
        found.append(Experiment(name, where, partial(run, request, *arguments, *more)))

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
    found.append(Experiment("host", dict(zip("TNKr", HOST, strict=True)), partial(_host, request)))
    add("counters", _counters, wide[0], T, r)
    found[-1] = dataclasses.replace(found[-1], seconds=PROFILER)
    for shape in wide:
        add("swizzle", _swizzle, shape, T, r, "backward")
    for shape in wide if few < T else ():
        for direction in ("forward", "backward"):
            add("swizzle", _swizzle, shape, few, r, direction)
    return found


def check(request: Request) -> Request:
    if not request.gpu:
        raise BenchError("question: 'experiments' needs a GPU, and there is none in use here")
    if request.dtype == torch.float32:
        raise BenchError("dtype: got 'fp32', the question experiments takes bf16 or fp16")
    return request


def plan(request: Request) -> list[Point]:
    """Every experiment, none of which is begun when there is too little time for it."""
    end = time.perf_counter() + BUDGET

    def rows(each: Experiment) -> Iterator[Row]:
        if (left := end - time.perf_counter()) < each.seconds:
            raise BenchError(f"not begun: {left:.0f} of {BUDGET:.0f} s were left")
        yield from each.run()

    return [Point({"experiment": each.name, **each.where}, partial(rows, each)) for each in every(request)]


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


def _swizzle(request: Request, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    """The library's x W^T and every cut; then, of the best one, what multiprocessors and the rank change."""
    if why := gemm.missing(request.dtype, request.device):
        raise BenchError(why)
    case = gemm.Case(shape, T, r, direction, request.dtype, request.device)
    many, now = facts(request.device).multiprocessors, today(case)
    cuts = [Cut(tile, swizzle, raster) for tile in config.TILES for raster in RASTERS for swizzle in SWIZZLES]
    cuts = [cut for cut in cuts if cut.distinct(T, case.N)]
    mode = _mode(request, T)
    paths = {"frozen": gemm.PATHS["frozen"]} | {str(cut): cut for cut in cuts}
    samples = yield from _race(request, mode, _candidates(case, paths) | {"copy": partial(_copy, request)})
    ran = {name: cut for name, cut in paths.items() if name in samples and name != "frozen"}
    for name in [name for name in paths if name in samples]:
        row = {"mode": mode} | figures(samples, name, request.device, ("frozen",))
        if name in ran:
            waves, total = ran[name].reads(T, case.N, case.K, many, request.dtype.itemsize)
            row |= {"tile": config.TILES[ran[name].tile][:2], "waves": waves, "wave_bytes": total / waves}
        yield row
    if not ran or "frozen" not in samples:
        return
    best = ran[min(ran, key=lambda name: samples[name].median().item())]
    tail = STEP * -(-r // STEP) / case.K
    if str(now) in ran:
        _, total = now.reads(T, case.N, case.K, many, request.dtype.itemsize)
        asked = total / ((1 + tail) * samples["frozen"].median().item())
        share = asked * _a_byte(request, samples).median().item()
        slow = (1.1, 1.2) if share > 0.8 else (1.0, 1.03)
        why = f"reads {asked / 1e12:.2f} TB/s, {share:.0%} of the copy's; from 80 % on slower by 10 to 20 %"
        yield {"mode": mode} | line(f"{now} over {best}", samples[str(now)] / samples[str(best)], *slow, "x", why)
    why = "one step of u more, and 0.5 to 1.5 % that the library's GEMM is better"
    measured = samples[str(best)] / samples["frozen"]
    yield {"mode": mode} | line(f"{best} over frozen", measured, 1.005 + tail, 1.015 + tail, "x", why)
    if max(request.tokens) == T and direction == "forward":
        del samples
        yield from _few(request, shape, case, best, mode)


def _few(request: Request, shape: Shape, case: gemm.Case, best: Cut, mode: str) -> Iterator[Row]:
    """The best cut on FEW multiprocessors, and at the lowest rank."""
    many, low = facts(request.device).multiprocessors, min(request.ranks)
    fewer = dataclasses.replace(best, multiprocessors=FEW)
    candidates = _candidates(case, {str(best): best} | ({f"on {FEW}": fewer} if many > FEW else {}))
    if low < case.r:
        narrow = gemm.Case(shape, case.T, low, "forward", request.dtype, request.device)
        candidates |= _candidates(narrow, {f"r {low}": best})
    samples = yield from _race(request, mode, candidates)
    if f"on {FEW}" in samples:
        waves = [cut.reads(case.T, case.N, case.K, many)[0] for cut in (fewer, best)]
        expected, why = waves[0] / waves[1], f"{waves[0]} waves beside {waves[1]}"
        measured = samples[f"on {FEW}"] / samples[str(best)]
        yield {"mode": mode} | line(
            f"{best}: {FEW} multiprocessors over {many}", measured, expected - 0.01, expected + 0.01, "x", why
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

    def __init__(self, request: Request, shape: Shape, T: int) -> None:
        super().__init__(shape, T, 1, "forward", request.dtype, request.device)
        self.sets = [(x, W, x.new_ones(T, self.N)) for x, W, *_ in self.sets]

    def results(self, path: Callable) -> dict[str, Tensor]:
        x, W, y = self.sets[0]
        return {"y": path(x, W, y.fill_(1))[self.rows].double() - float(path is _beta_1)}

    def expected(self, dtype: torch.dtype) -> Results:
        x, W, _ = self.sets[0]
        return {"y": F.linear(x[self.rows].to(dtype), W.to(dtype))}


def _beta_0(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, W.t(), out=y)


def _beta_1(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return y.addmm_(x, W.t())


def _beta(request: Request, shape: Shape, T: int) -> Iterator[Row]:
    case, mode = _Accumulate(request, shape, T), _mode(request, T)
    candidates = _candidates(case, {"beta 0": _beta_0, "beta 1": _beta_1})
    samples = yield from _race(request, mode, candidates | {"copy": partial(_copy, request)})
    for name in (name for name in candidates if name in samples):
        row = {"mode": mode} | figures(samples, name, request.device, ("beta 0",))
        if name == "beta 1" and "beta 0" in samples:
            more = T * shape.N * request.dtype.itemsize
            expected = 1 + more * _a_byte(request, samples) / samples["beta 0"]
            measured, why = samples[name] / samples["beta 0"], f"{more / 1e6:.1f} MB of y read at the copy's rate"
            row |= {"bytes": more} | against(measured, expected, expected, "x", why)
        yield row


class _Narrow(compare.Case):
    """(x, A, R, s, other) for z = x A^T alone, or with u = s z R^T and the gram; backward on views, as chain.Case."""

    def __init__(self, request: Request, shape: Shape, T: int, r: int, direction: str) -> None:
        dtype, device = request.dtype, request.device
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

    def results(self, path: Callable) -> dict[str, Tensor | None]:
        """All of them, or z alone, as the path has it."""
        found = path(*self.sets[0])
        z, u, gram = found if isinstance(found, tuple) else (found, None, None)
        gram = gram if gram is None or gram.dim() == 2 else gram.sum(0)
        return {"z": z[self.rows], "u": None if u is None else u[self.rows], "gram": gram}

    def expected(self, dtype: torch.dtype) -> Results:
        x, A, R, s, other = self.sets[0]
        z = x[self.rows].to(dtype) @ A.to(dtype).t()
        found = {"z": z, "u": s * z @ R.to(dtype).t()}
        whole = {} if other is None else {"gram": s * (x.to(dtype) @ A.to(dtype).t()).t() @ other.to(dtype)}
        return found | whole


def _mm_fp32(x: Tensor, A: Tensor, *_: object) -> Tensor:
    """torch.mm(out_dtype=torch.float32), on a GPU."""
    return torch_backend.shrink(x, A.t())


def _mm_rounded(x: Tensor, A: Tensor, *_: object) -> Tensor:
    return F.linear(x, A)


def _mm(request: Request, shape: Shape, T: int, r: int) -> Iterator[Row]:
    case = _Narrow(request, shape, T, r, "forward")
    yield from _narrow(request, case, {"mm fp32": _mm_fp32, "mm": _mm_rounded}, "mm fp32", "mm", _floor)


def _shrink(request: Request, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    if reason := backends.unavailable("cuda"):
        raise BenchError(reason)
    case = _Narrow(request, shape, T, r, direction)
    split = config.split(T, case.K, facts(request.device).multiprocessors)
    paths = {"cuda shrink": partial(_cuda_shrink, split), "mm fp32": _mm_fp32}
    yield from _narrow(request, case, paths, "cuda shrink", "mm fp32", partial(_by_shrink, split))


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
    request: Request, case: _Narrow, paths: dict[str, Callable], name: str, other: str, predict: Callable
) -> Iterator[Row]:
    """Rows of two paths to z; the first one has a prediction."""
    mode = _mode(request)
    samples = yield from _race(request, mode, _candidates(case, paths) | {"copy": partial(_copy, request)})
    for each in (each for each in paths if each in samples):
        size = case.bytes_of(u=each == "cuda shrink")
        row = {"mode": mode, "bytes": size} | figures(samples, each, request.device, (other,))
        if each == name:
            low, high, why = predict(size * _a_byte(request, samples))
            row |= against(samples[each], low, high, "s", f"{size / 1e6:.1f} MB {why}")
        yield row


# --- z on the multiprocessors that the GEMM leaves free


def _beside(request: Request, shape: Shape, T: int, r: int, rounds: int = 21) -> Iterator[Row]:
    """The GEMM on FEW multiprocessors alone, and with launches of a shrink on a second stream for as long as it takes.

    A launch has 64 rows for each multiprocessor that is free.  The GEMM is begun first, so that its clusters of two
    find their places; the shrinks follow 20 us later.
    """
    if why := gemm.missing(request.dtype, request.device):
        raise BenchError(why)
    free = facts(request.device).multiprocessors - FEW
    if free < 1:
        raise BenchError(f"the GPU has {FEW + free} multiprocessors, more than {FEW} are needed")
    case = gemm.Case(shape, T, r, "forward", request.dtype, request.device)
    cut = Cut(0, 4, 2, FEW)
    narrow = _Narrow(request, shape, config.SHRINK_ROWS * free, r, "forward")
    _, A, R, s, _ = narrow.sets[0]
    wrong = case.candidate(cut).wrong + narrow.candidate(partial(_cuda_shrink, 1)).wrong
    if wrong:
        raise BenchError(f"not timed, it is wrong: {', '.join(wrong)}")
    x = case.sets[0][0]
    blocks = [block for block in x.split(config.SHRINK_ROWS * free) if len(block) == config.SHRINK_ROWS * free]
    if not blocks:
        raise BenchError(f"tokens: got {T}, must be at least {config.SHRINK_ROWS * free}")
    groups = [
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
                groups[i % len(groups)].run()
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
    rows_read = sum(config.SHRINK_ROWS * free * groups[i % len(groups)].length for i in range(launches))
    rate = rows_read * shape.K * request.dtype.itemsize / lasted
    needed = T * shape.K * request.dtype.itemsize / alone.median().item()
    samples = {"alone": alone, "beside": beside}
    more = {"mode": "eager", "groups": launches, "rows": rows_read}
    yield more | figures(samples, "alone", request.device, ()) | {"path": f"{cut} on {FEW}, alone"}
    why = "the shrink has multiprocessors of its own, and takes little of the memory's speed"
    what = f"{cut} on {FEW}, beside a shrink"
    row = more | figures(samples, "beside", request.device, ("alone",)) | {"path": what}
    yield row | against(beside / alone, 1.0, 1.02, "x", why)
    most = free * (32e9 if r > 32 else 48e9)  # bytes of x under way on a multiprocessor, each for a microsecond
    why = f"at most {most / 1e9:.0f} GB/s by the copies under way; the GEMM needs {needed / 1e9:.0f}"
    what = f"shrink's rate beside it, {needed / 1e9:.0f} GB/s needed"
    yield (
        more
        | {"needed": needed, "lasted": (lasted / beside).median().item()}
        | line(what, rate, 0.7 * most, most, "B/s", why)
    )


# --- the host


def _host(request: Request) -> Iterator[Row]:
    """Issuing each launch to an idle device."""
    T, N, K, r = HOST
    o = Operands.random(T, N, K, r, request.dtype, request.device, seed=0)
    x, W, A, R, B = o.x.detach(), o.W, o.A, o.R, o.B
    u, y = x[:, :r].contiguous(), x.new_zeros(T, N)
    calls: dict[str, tuple[Callable, str | None]] = {
        "triton chain": (lambda: backends.primitive("triton")(x, None, A, R, B, o.s), backends.unavailable("triton")),
        "cuda shrink": (lambda: cuda.shrink(x, A, R, o.s, None, 1, False), backends.unavailable("cuda")),
        "cuda gemm_tail": (
            lambda: cuda.gemm_tail(x, W, u, B, None, 0, False),
            gemm.missing(request.dtype, request.device),
        ),
        "cuda decode": (lambda: cuda.decode(x, A, R, B, o.s), backends.unavailable("cuda")),
        "F.linear": (lambda: F.linear(x, W), None),
        "addmm": (lambda: y.addmm_(x, W.t()), None),
    }

    def candidate(call: Callable, reason: str | None) -> Candidate:
        if reason:
            raise BenchError(reason)
        return Candidate(lambda: [call])

    candidates = {name: partial(candidate, *each) for name, each in calls.items()}
    samples = yield from _race(request, "eager", candidates, issue=True)
    for name in samples:
        low, high = (each * 1e-6 for each in HOST_PREDICTED[name])
        row = {"mode": "eager"} | figures(samples, name, request.device, ("F.linear",))
        yield row | against(samples[name], low, high, "s", "partly counted without a GPU, partly guessed")


# --- the profiler


def _counters(request: Request, shape: Shape, T: int, r: int) -> Iterator[Row]:
    """Bytes from memory at swizzle 1 and 8; where the profiler is not here or may not count, a row that says so."""
    if why := gemm.missing(request.dtype, request.device):
        raise BenchError(why)
    swizzles, many = (1, 8), facts(request.device).multiprocessors
    found = _profiled(["launch", str(shape), str(T), str(r), request.dtype_name, *map(str, swizzles)])
    if isinstance(found, str):
        yield {"path": "counters", "status": "ok", "not_read": found}
        return
    for swizzle, counters in zip(swizzles, found, strict=True):
        waves, total = Cut(0, swizzle, 2).reads(T, shape.N, shape.K, many, request.dtype.itemsize)
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
    case = gemm.Case(parse(shape), int(T), int(r), "forward", DTYPES[dtype], torch.device("cuda"))
    for swizzle in swizzles:
        Cut(0, int(swizzle), 2)(*case.sets[0])
    torch.cuda.synchronize()


# --- what they share


def _mode(request: Request, T: int = 0) -> str:
    """Graphs on a GPU, but where there is so much to do that the host is ahead anyway."""
    return "graph" if request.gpu and T <= 1024 else "eager"


def _candidates(case: compare.Case, paths: dict[str, Callable]) -> dict[str, Callable[[], Candidate]]:
    return {name: partial(case.candidate, path) for name, path in paths.items()}


def _race(
    request: Request, mode: str, candidates: dict[str, Callable[[], Candidate]], **how: Any
) -> Generator[Row, None, dict[str, Tensor]]:
    """The times of the paths that are right, in turn; it yields the rows of the others."""
    right = yield from checked(candidates, lambda: lambda name: candidates[name]())
    return (yield from timed(request, right, mode, **how))


def _copy(request: Request) -> Candidate:
    """A copy past every cache."""
    source = torch.randn(_copied(request) // 8, device=request.device)
    return Candidate(lambda: [partial(torch.empty_like(source).copy_, source)])


def _copied(request: Request) -> int:
    """The bytes that it reads and writes."""
    return 8 << (26 if request.gpu else 16)


def _a_byte(request: Request, samples: dict[str, Tensor]) -> Tensor:
    """Seconds that the copy takes for each of them."""
    return samples["copy"] / _copied(request)


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """A line for each prediction; then the GEMM with a tail, by the order of its tiles, over the library's x W^T."""
    lines = [[f"{what}: {where}", *cells] for what, where, *cells in predictions(rows)]
    if lines:
        whys = dict.fromkeys(row["not_read"] for row in rows if "not_read" in row)
        notes = ("Quartiles in brackets.", *(f"Not read: {why}." for why in whys), *tables.noise(lines))
        yield Table("What was predicted", ["", "predicted", "measured", "measured / predicted"], lines, notes)
    points: dict[str, dict[str, Row]] = {}
    for row in (row for row in rows if "wave_bytes" in row):
        tile, cut = row["path"].split(" ", 1)
        where = f"{row['N']}x{row['K']} T {row['T']} r {row['r']} {row['direction']}, {tile}"
        points.setdefault(where, {})[cut] = row
    if points:
        names = sorted({cut for point in points.values() for cut in point}, key=lambda cut: (cut[10:], cut))
        lines = [[where, *(_wave(report, point.get(name)) for name in names)] for where, point in points.items()]
        notes = (
            "Time over x W^T by the library; in brackets TB/s that each wave of tiles would ask of memory, at the time "
            "measured, if nothing stayed in the cache from the one before.",
            *tables.noise(lines),
        )
        yield Table("x W^T + u B^T by the order of tiles", ["", *names], lines, notes)


def predictions(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, str, str]]:
    """(experiment, what of it, predicted, measured, measured / predicted), in the order they were made."""
    for row in rows:
        if row["question"] != "experiments" or row["status"] != "ok" or not {"predicted", "not_read"} & set(row):
            continue
        sizes = [f"{row['N']}x{row['K']}", *(f"{key} {row[key]}" for key in ("T", "r") if key in row)]
        where = " ".join([*sizes, *([row["direction"]] if "direction" in row else []), row["path"]])
        if "not_read" in row:
            yield row["experiment"], where, tables.NO_FIGURE, "not read", tables.NO_FIGURE
            continue
        scale, unit = {"s": (1e6, " us"), "x": (1, ""), "B/s": (1e-9, " GB/s"), "B": (1e-9, " GB")}[row["unit"]]
        expected = [_figure(scale * row["predicted"][end]) for end in ("low", "high")]
        low, found, high = (_figure(scale * row["measured"][quartile]) for quartile in ("low", "median", "high"))
        yield (
            *(row["experiment"], where, " to ".join(dict.fromkeys(expected)) + unit),
            tables.figure(found, row.get("noisy", False), f" ({low} to {high}){unit}"),
            f"{row['ratio']['median']:.2f}",
        )


def in_short(rows: Iterable[Row]) -> list[str]:
    """A line for each experiment: its first prediction / what was measured / their ratio; the range of all ratios."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for name, *cells in predictions(rows):
        found.setdefault(name, []).append(tuple(cells))
    lines = []
    for name, each in found.items():
        ratios = sorted((float(ratio) for *_, ratio in each if ratio != tables.NO_FIGURE))
        rest = f"; all {len(ratios)}: {ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else ""
        where, *cells = each[0]
        lines.append(f"{name}: {where}: {' / '.join(cells)}{rest}")
    return lines


def _figure(value: float) -> str:
    """To three digits or hundredths, what is more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _wave(report: dict[str, Any], row: Row | None) -> str:
    if row is None or "frozen" not in row["over"]:
        return tables.NO_FIGURE
    asked = f" ({row['waves'] * row['wave_bytes'] / row['seconds']['median'] / 1e12:.1f})" if tables.gpu(report) else ""
    return tables.figure(f"{row['over']['frozen']['median']:.3f}", row["noisy"], asked)


QUESTION = Question(name="experiments", plan=plan, tables=show, check=check)


if __name__ == "__main__":
    {"launch": launch}[sys.argv[1]](*sys.argv[2:])
