"""The experiments that decide how the GEMM with a tail walks: paired ratios, each with its prediction beside it.

    swizzle   the tail GEMM in each order of its tiles, beside the library's x W^T; on 128 multiprocessors; two ranks
    beside    the GEMM on 128 multiprocessors with and without a shrink on those it leaves free

Others were run once and are answered (bench/results/NOTES.md); the rows of their reports are still shown: `beta`, what
it costs to add to y; `mm` and `shrink`, z by the library and by csrc/shrink.cu; `host`, a launch as the host pays it.

What a prediction says in bytes is turned into time by a copy that is timed in the same rounds.  The most decisive
experiments come first, until BUDGET is spent.  An experiment that raises costs only its own rows.

Counted for swizzle: each program makes a tile of y, 128 x 256 or 128 x 128; those that run at the same time (a wave)
find in L2 what others of them have read.  So a wave asks memory once for each row block of x and each column block of W
that its tiles need (Cut.reads).  For 14336 x 4096 and T = 8192 on 132 multiprocessors, along N, 28 waves of 45 us in
128 x 256 tiles read, in MB a wave and TB/s:

    swizzle 1    118 MB    2.6 TB/s        swizzle 4    45 MB    1.0 TB/s
    swizzle 2     74 MB    1.6 TB/s        swizzle 8    37 MB    0.8 TB/s

From L2 to the multiprocessors all of them move the same: (128 + 256 / 2) K elements a tile.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from ..backends.cuda import config, core
from ..backends.device import facts
from . import BenchError, compare, gemm, tables, timer
from .compare import Candidate, Row, checked, figures, timed
from .paths import Operands
from .question import Point, Question
from .request import Request
from .roofline import STEP
from .shapes import Shape
from .tables import Table

BUDGET = 47.0  # seconds after which no experiment is begun: 60 less what torch's start and the ceilings take
SWIZZLES = (1, 2, 4, 8)
RASTERS = {1: "along T", 2: "along N"}
FEW = 128  # multiprocessors that the tiles of T = 8192 fill in whole waves; the others are free for z


def check(request: Request) -> Request:
    if not request.gpu:
        raise BenchError("question: 'experiments' needs a GPU, and there is none in use here")
    if request.dtype == torch.float32:
        raise BenchError("dtype: got 'fp32', the question experiments takes bf16 or fp16")
    return request


def plan(request: Request) -> list[Point]:
    """Every experiment, the most decisive first; none is begun once BUDGET is spent."""
    T, few, r = max(request.tokens), min(request.tokens), max(request.ranks)
    wide = sorted(request.shapes, key=lambda shape: -shape.N)  # swizzle 1 is predicted to be slow for the first
    wanted = [("swizzle", shape, T, r, "forward") for shape in wide]
    wanted += [
        ("beside", shape, T, rank, "forward")
        for shape in dict.fromkeys((request.shapes[0], wide[0]))
        for rank in sorted(set(request.ranks), reverse=True)
    ]
    wanted += [("swizzle", shape, T, r, "backward") for shape in wide]
    wanted += [("swizzle", shape, few, r, way) for shape in wide if few < T for way in ("forward", "backward")]
    end = time.perf_counter() + BUDGET

    def rows(name: str, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
        if time.perf_counter() > end:
            raise BenchError(f"not begun: the {BUDGET:.0f} s were spent")
        if why := gemm.missing(request.dtype, request.device):
            raise BenchError(why)
        case = gemm.Case(shape, T, r, direction, request.dtype, request.device)
        if name == "beside":
            yield from _beside(request, case, shape)
        else:
            best = yield from _swizzle(request, case)
            if best is not None and direction == "forward" and max(request.tokens) == T:
                yield from _few(request, case, shape, best)

    return [
        Point({"experiment": name, "N": shape.N, "K": shape.K, "T": T, "r": r, "direction": way}, partial(rows, *each))
        for each in wanted
        for name, shape, T, r, way in [each]
    ]


def against(measured: Tensor, low: Tensor | float, high: Tensor | float, unit: str, why: str) -> Row:
    """What was measured in each round beside the range predicted for it: numbers, or a number a round; the ratio is to
    the middle of the range.

    unit: "s", "x" (a ratio) or "B/s".
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


def _swizzle(request: Request, case: gemm.Case) -> Generator[Row, None, Cut | None]:
    """The library's x W^T and every cut; returns the fastest cut."""
    T, N, K, itemsize = case.T, case.N, case.K, request.dtype.itemsize
    many, now = facts(request.device).multiprocessors, today(case)
    cuts = [Cut(tile, swizzle, raster) for tile in config.TILES for raster in RASTERS for swizzle in SWIZZLES]
    found = {str(cut): cut for cut in cuts if cut.distinct(T, N)}
    mode = _mode(request, T)
    paths = {"frozen": gemm.PATHS["frozen"], **found}
    made = {name: partial(case.candidate, path) for name, path in paths.items()}
    samples = yield from _race(request, mode, made | {"copy": partial(_copy, request)})
    if "frozen" in samples:
        yield mode | figures(samples, "frozen", request.device, ("frozen",))
    ran = {name: cut for name, cut in found.items() if name in samples}
    for name, cut in ran.items():
        waves, total = cut.reads(T, N, K, many, itemsize)
        read = {"tile": config.TILES[cut.tile][:2], "waves": waves, "wave_bytes": total / waves}
        yield mode | figures(samples, name, request.device, ("frozen",)) | read
    if not ran or "frozen" not in samples:
        return None
    best = ran[min(ran, key=lambda name: samples[name].median().item())]
    tail = STEP * -(-case.r // STEP) / K
    if str(now) in ran and "copy" in samples:
        asked = now.reads(T, N, K, many, itemsize)[1] / ((1 + tail) * samples["frozen"].median().item())
        share = asked * samples["copy"].median().item() / _copied(request)
        slow = (1.1, 1.2) if share > 0.8 else (1.0, 1.03)
        why = f"reads {asked / 1e12:.2f} TB/s, {share:.0%} of the copy's; from 80 % on slower by 10 to 20 %"
        yield mode | line(f"{now} over {best}", samples[str(now)] / samples[str(best)], *slow, "x", why)
    why = "one step of u more, and 0.5 to 1.5 % that the library's GEMM is better"
    measured = samples[str(best)] / samples["frozen"]
    yield mode | line(f"{best} over frozen", measured, 1.005 + tail, 1.015 + tail, "x", why)
    return best


def _mode(request: Request, T: int) -> Row:
    """Eager where there is so much to do that the host is ahead."""
    return {"mode": "graph" if request.gpu and T <= 1024 else "eager"}


def _few(request: Request, case: gemm.Case, shape: Shape, best: Cut) -> Iterator[Row]:
    """What fewer multiprocessors, and the lowest rank, change for the fastest cut."""
    T, N, K, mode = case.T, case.N, case.K, _mode(request, case.T)
    many = facts(request.device).multiprocessors
    fewer, low = dataclasses.replace(best, multiprocessors=FEW), min(request.ranks)
    made = {str(best): partial(case.candidate, best)}
    if many > FEW:
        made[f"on {FEW}"] = partial(case.candidate, fewer)
    if low < case.r:
        narrow = gemm.Case(shape, T, low, "forward", request.dtype, request.device)
        made[f"r {low}"] = partial(narrow.candidate, best)
    samples = yield from _race(request, mode, made)
    waves = [cut.reads(T, N, K, many)[0] for cut in (fewer, best)]
    steps = [-(-rank // STEP) * STEP + K for rank in (low, case.r)]
    for name, what, (own, other), why in (
        (f"on {FEW}", f"{FEW} multiprocessors over {many}", waves, f"{waves[0]} waves beside {waves[1]}"),
        (f"r {low}", f"r {low} over r {case.r}", steps, f"{steps[0]} columns beside {steps[1]}: whole steps of {STEP}"),
    ):
        if {name, str(best)} <= set(samples):
            measured, expected = samples[name] / samples[str(best)], own / other
            yield mode | line(f"{best}: {what}", measured, expected - 0.01, expected + 0.01, "x", why)


def _race(
    request: Request, mode: Row, made: dict[str, Callable[[], Candidate]]
) -> Generator[Row, None, dict[str, Tensor]]:
    """The times of the paths that are right, in turn; it yields the rows of the others."""
    right = yield from checked(made, lambda: lambda name: made[name]())
    return (yield from timed(request, right, mode["mode"]))


def _copy(request: Request) -> Candidate:
    """A copy past every cache."""
    source = torch.randn(_copied(request) // 8, device=request.device)
    return Candidate(lambda: [partial(torch.empty_like(source).copy_, source)])


def _copied(request: Request) -> int:
    """The bytes that it reads and writes."""
    return 8 << (26 if request.gpu else 16)


# --- z on the multiprocessors that the GEMM leaves free


def _beside(request: Request, case: gemm.Case, shape: Shape) -> Iterator[Row]:
    """The GEMM on FEW multiprocessors alone, and with launches of a shrink on a second stream for as long as it takes.

    A launch has 64 rows for each multiprocessor that is free.  The GEMM is begun first, so that its clusters of two
    find their places; the shrinks follow 20 us later.
    """
    free = facts(request.device).multiprocessors - FEW
    if free < 1:
        raise BenchError(f"the GPU has {FEW + free} multiprocessors, more than {FEW} are needed")
    rows, cut = config.SHRINK_ROWS * free, Cut(0, 4, 2, FEW)
    if rows > case.T:
        raise BenchError(f"tokens: got {case.T}, must be at least {rows}")
    o = Operands.random(rows, shape.N, shape.K, case.r, request.dtype, request.device, seed=0)

    def shrink(x: Tensor) -> tuple:
        return cuda.shrink(x, o.A, o.R, o.s, None, 1, False)

    def exact(dtype: torch.dtype) -> compare.Results:
        z = o.x.detach().to(dtype) @ o.A.to(dtype).t()
        return {"z": z, "u": o.s * z @ o.R.to(dtype).t()}

    made = dict(zip("zu", shrink(o.x.detach()), strict=False))
    checks = compare.errors(made, exact(request.dtype), exact(torch.float64), request.dtype)
    if wrong := case.candidate(cut).wrong + Candidate(list, checks).wrong:
        raise BenchError(f"not timed, it is wrong: {', '.join(wrong)}")
    blocks = [block for block in case.sets[0][0].split(rows) if len(block) == rows]
    groups = [
        timer.prepare(lambda some=some: [partial(shrink, block) for block in some], case.device, graph=True)
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
    pairs = [(once(0)[0], *once(launches)) for _ in range(21)]
    alone, beside, lasted = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    read = rows * sum(groups[i % len(groups)].length for i in range(launches))
    a_row = shape.K * request.dtype.itemsize
    needed = case.T * a_row / alone.median().item()
    samples, more = {"alone": alone, "beside": beside}, {"mode": "eager", "groups": launches, "rows": read}
    yield more | figures(samples, "alone", request.device, ()) | {"path": f"{cut} on {FEW}, alone"}
    why = "the shrink has multiprocessors of its own, and takes little of the memory's speed"
    row = more | figures(samples, "beside", request.device, ("alone",)) | {"path": f"{cut} on {FEW}, beside a shrink"}
    yield row | against(beside / alone, 1.0, 1.02, "x", why)
    most = free * (32e9 if case.r > 32 else 48e9)  # bytes of x under way on a multiprocessor, each for a microsecond
    why = f"at most {most / 1e9:.0f} GB/s by the copies under way; the GEMM needs {needed / 1e9:.0f}"
    what = f"shrink's rate beside it, {needed / 1e9:.0f} GB/s needed"
    more |= {"needed": needed, "lasted": (lasted / beside).median().item()}
    yield more | line(what, read * a_row / lasted, 0.7 * most, most, "B/s", why)


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """A line for each prediction; then the GEMM with a tail, by the order of its tiles, over the library's x W^T."""
    lines = [[f"{what}: {where}", *cells] for what, where, *cells in predictions(rows)]
    if lines:
        notes = ("Quartiles in brackets.", *tables.noise(lines))
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
        if row["question"] != "experiments" or row["status"] != "ok" or "predicted" not in row:
            continue
        sizes = [f"{row['N']}x{row['K']}", *(f"{key} {row[key]}" for key in ("T", "r") if key in row)]
        where = " ".join([*sizes, *([row["direction"]] if "direction" in row else []), row["path"]])
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
        ratios = sorted(float(ratio) for *_, ratio in each)
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
