"""Which backend is fastest where: all of them are measured on the shapes of a model, within a budget.

First the choices: every backend on each kind of call, the most valuable kinds first, until the budget is spent.  Then,
with what is left of it, the tiles of the Triton kernels (tiles.py), where Triton is the fastest or nearly so; they are
kept where the calls gain by them.  After every step the table (backends/tuned.py) is on the disk and in force in this
process, so a run can be stopped at any time, and the next one goes on where it stopped.

"measured" in the table has rows of the question choice (bench/choice.py), and a note of each search of tiles:
{"search": [rank, least number of rows, layout]}.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .. import backends
from ..backends import choice, tuned
from ..backends.device import Device, facts
from ..backends.triton import config
from ..backends.triton.config import padded
from ..bench import BenchError, timer
from ..bench import choice as question
from ..bench.compare import Row, failure, release
from ..bench.questions import check
from ..bench.request import Request, at_least_one
from ..bench.shapes import Shape
from ..recipe import is_number
from . import tiles

# Buckets of rows, the most valuable first: training's, a step of decoding, then what lies between.
TOKENS = (8192, 16, 2048, 512, 64, 4096, 1024, 32768, 256, 128, 16384, 32)
DECODING = 64  # rows up to which hardly anyone calls a backward
BUDGET = 300.0  # seconds
SECONDS = 0.03  # for each backend and mode, shape and kind of call
WIDEST = config.WIDEST["half"]  # wider ranks only the GEMM of the CUDA backend takes, on Hopper
NEAR = 0.9  # times the fastest backend's speed: from there on other tiles may make Triton's the fastest
BETTER = 1.01  # times as fast: from there on new tiles are kept
LEAST, MOST = 30.0, 120.0  # seconds of a search: not begun with less; so that others have their turn, too
REST, AFTER = 15.0, 3.0  # seconds that the end of a search takes, and then each kind of call that is measured again
# The fields of a row that are kept beside where it was measured: what `decide` reads, and why a backend did not run.
KEPT = {"path", "mode", "status", "reason", "over", "seconds"}
PASSING = ("out of memory", question.LOST)  # how reasons begin that another run may not find

Shapes = Mapping[int, Sequence[Shape]]  # by rank, the most valuable first
Table = dict[str, Any]  # as backends/tuned.py reads it, and its "path"

clock = time.monotonic


class Kind(NamedTuple):
    """A kind of call; T and r as the table counts them."""

    T: int
    r: int
    weight: bool
    direction: str

    def __str__(self) -> str:
        return f"T {self.T}, r {self.r}, {self.direction} {'with' if self.weight else 'without'} W"


def run(
    shapes: Shapes,
    tokens: Sequence[int] = (),
    dtype: str = "bf16",
    budget: float = BUDGET,
    path: Path | None = None,
    *,
    weights: Sequence[bool] = (True, False),
    again: bool = False,
    progress: bool = True,
    step: Callable[[], None] = lambda: None,
) -> Table:
    """Measure on the current GPU until the budget (seconds) is spent; returns the user's table.

    shapes: a rank counts as the padded one.  tokens: each counts as its bucket; default: all.  dtype: "bf16" or "fp16".
    weights: whether calls with W come first, or those without.  path: default: the file that is used from then on.
    again: measure anew what the file has.  step: is called after every one.  Raises BenchError, ValueError or OSError
    where this cannot be done, before anything is measured.
    """
    if not (is_number(budget) and budget > 0):
        raise ValueError(f"budget: got {budget!r}, must be a number of seconds above 0")
    end = clock() + budget
    at_least_one(tokens=tokens, rank=[*shapes])
    reasons = {name: backends.unavailable(name) for name in backends.NAMES}
    names = [name for name, reason in reasons.items() if reason is None]
    if names == ["torch"]:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise BenchError(f"there is nothing to choose, only the torch backend can run here ({why})")
    device = _gpu()
    if max(shapes) > WIDEST and not ("cuda" in names and facts(device).capability == (9, 0)):
        raise BenchError(f"rank: got {max(shapes)}, must be at most {WIDEST}: wider ones run on the torch backend here")
    request = check(["choice"], dtype=dtype, paths=names, device=str(device), seconds=SECONDS)

    def say(line: str) -> None:
        if progress:
            tqdm.write(line, file=sys.stderr)

    table = _table(path, tuned.machine(facts(device)), say)
    by_rank = {padded(r): tuple(each) for r, each in shapes.items()}
    kinds = valuable([*by_rank], [choice.bucket(T) for T in tokens] or TOKENS, weights)
    this = _Run(request, names, by_rank, table, end, again, say, step)
    this.keep()  # before anything is measured, in case it cannot be written
    say(f"loraxs tune: {len(kinds)} kinds of calls, {budget:g} seconds at most; writing {table['path']}")
    try:
        with timer.on(device), torch.autocast(device.type, enabled=False), timer.short_collections():
            if this.choices(kinds, progress) and "triton" in names and tiles.can_be_measured():
                this.tiles(kinds)
    finally:  # also in place of tiles that were being tried
        tuned.install(this.table)
    return this.table


def _gpu() -> torch.device:
    if not torch.cuda.is_available():  # a backend may be interpreted
        raise BenchError("torch finds no GPU here, and on a CPU there is nothing to choose")
    return torch.device("cuda", torch.cuda.current_device())


def _table(path: Path | None, made_on: dict[str, Any], say: Callable[[str], None]) -> Table:
    """What an earlier run under the same conditions has left in the file, or an empty table."""
    path = path or tuned.user_path(made_on["gpu"])
    if path is None:
        raise BenchError("there is no home folder to write the table to: name a file")
    empty = {"path": path, "made_on": made_on, **{name: [] for name in tuned.LISTS}}
    try:
        old = tuned.read(path)
    except FileNotFoundError:
        return empty
    except ValueError as error:
        raise BenchError(f"{error}; it is not overwritten: delete it, or name another file") from error
    gpu = old["made_on"].get("gpu")
    if gpu != made_on["gpu"]:
        raise BenchError(f"{path} is the table of another GPU, {gpu}, and is not overwritten: name another file")
    if why := tuned.differences(old["made_on"], made_on):
        say(f"{path} was measured under other conditions ({why}) and is replaced")
        return empty
    try:  # "choices" are made of "measured"
        calls, parsed = map(_call, old["measured"]), map(config.parse, old["tiles"])
        chosen = question.decide(_rows(old), Device((0, 0), 0), dict.fromkeys(backends.NAMES, ""), "", torch_too=True)
        list(itertools.chain(calls, parsed, (choice.parse(row._asdict()) for row in chosen)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        say(f"{path} is damaged ({type(error).__name__}: {error}) and is replaced")
        return empty
    return empty | {name: old[name] for name in tuned.LISTS}


def _rows(table: Table) -> list[Row]:
    """What was measured."""
    return [entry for entry in table["measured"] if "search" not in entry]


def _call(entry: dict[str, Any]) -> tuple:
    """The kind of call and the layers of a row, or the search that is noted."""
    return tuple(entry.get("search") or (entry[name] for name in (*Kind._fields, "dtype", "N", "K")))


def valuable(ranks: Sequence[int], tokens: Sequence[int], weights: Sequence[bool]) -> list[Kind]:
    """All kinds of calls, in the order of their value."""
    grid = itertools.product(weights, dict.fromkeys(tokens), ranks, choice.DIRECTIONS)
    kinds = [Kind(T, r, weight, direction) for weight, T, r, direction in grid]
    return sorted(kinds, key=lambda kind: kind.direction == "backward" and kind.T <= DECODING)


@dataclass
class _Run:
    request: Request
    names: list[str]  # of the backends
    shapes: dict[int, tuple[Shape, ...]]  # by padded rank
    table: Table
    end: float  # on the clock
    again: bool
    say: Callable[[str], None]
    step: Callable[[], None]

    def keep(self, new: Sequence[dict[str, Any]] = (), **lists: list[dict[str, Any]]) -> None:
        """Write the table with new entries of "measured" and other lists in place of its own, and put it in force.

        What another process has added to the file meanwhile stays in it.
        """
        table = self.table | lists
        theirs = _table(table["path"], table["made_on"], lambda line: None)
        measured: list[dict[str, Any]] = []
        for entries in (new, table["measured"], theirs["measured"]):  # a call has several rows, all of one origin
            known = set(map(_call, measured))
            measured += [entry for entry in entries if _call(entry) not in known]
        rows = tiles.merged(*(map(config.parse, each["tiles"]) for each in (table, theirs)))
        table |= {"measured": measured, "tiles": [config.plain(each) for each in rows]}
        device, kernels = self.request.device, {name: tuned.kernels(name) for name in self.names}
        chosen = question.decide(_rows(table), facts(device), kernels, tiles.source(device), torch_too=True)
        table["choices"] = [row._asdict() for row in chosen]
        tuned.write(table, table["path"])
        self.table = table
        tuned.install(table)
        self.step()

    def rows(self, kind: Kind) -> list[Row]:
        """What was measured of a kind of call."""
        wanted = {**kind._asdict(), "dtype": self.request.dtype_name}.items()
        return [row for row in _rows(self.table) if wanted <= row.items()]

    def speeds(self, rows: list[Row]) -> dict[str, float]:
        """How many times as fast as torch's each backend is over these rows of one kind, or 0.0: it did not run."""
        ran = [row for row in rows if row["status"] == "ok"]
        return {name: question.speed(ran, name) for name in self.names}

    def choices(self, kinds: list[Kind], progress: bool) -> bool:
        """Measure the kinds of calls, as far as an earlier run has not; False where the budget does not last."""
        left = {}
        for kind in kinds:
            known = [] if self.again else self.rows(kind)
            there = {(row["N"], row["K"]) for row in known}
            there -= {(row["N"], row["K"]) for row in known if row["status"] == "failed"}
            if shapes := [shape for shape in self.shapes[kind.r] if (shape.N, shape.K) not in there]:
                left[kind] = shapes
        bar = tqdm(left.items(), desc="loraxs tune", unit="kind", disable=None if progress else True)
        for i, (kind, shapes) in enumerate(bar):
            if i and clock() >= self.end:  # one at least, so that every run comes further
                self.say(f"the budget is spent, {len(left) - i} of {len(kinds)} kinds are left for another run")
                return False
            self.keep(self.measured(kind, shapes))
            speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in self.speeds(self.rows(kind)).items() if speed)
            self.say(f"  {kind}: {speeds or 'nothing ran'}")
        return True

    def measured(self, kind: Kind, shapes: Sequence[Shape]) -> list[Row]:
        """The rows of the backends that ran, of each shape that fits the GPU, and of those that may run next time."""
        rows = []
        for shape in shapes:
            found = list(question.measure(self.request, shape, *kind))
            failed = {row["path"]: row["reason"] for row in found if row["status"] == "failed"}
            for name, why in failed.items():
                self.say(f"  {name} is left out at {kind}, {shape}: {why}")
            if "torch" not in failed:
                where = {**kind._asdict(), "dtype": self.request.dtype_name, **shape.where}
                may = (row for row in found if row["status"] == "ok" or row["reason"].startswith(PASSING))
                rows += [where | {key: value for key, value in row.items() if key in KEPT} for row in may]
            elif not failed["torch"].startswith(PASSING):
                raise BenchError(f"the torch backend failed at {kind}, {shape}: {failed['torch']}")
        release()
        return rows

    def tiles(self, kinds: list[Kind]) -> None:
        """Search tiles for the ranges of rows where Triton is the fastest or nearly so, most valuable first."""
        ranges: dict[tuple[int, int, str], list[Kind]] = {}
        for kind in kinds:
            if kind.r <= WIDEST:
                least = max(tokens for tokens in tiles.TYPICAL if tokens <= kind.T)
                ranges.setdefault((kind.r, least, kind.direction), []).append(kind)
        for search, inside in ranges.items():
            speeds = [self.speeds(self.rows(kind)) for kind in inside]
            worth = any(each["triton"] >= NEAR * max(each.values()) > 0 for each in speeds)
            if not worth or ({"search": [*search]} in self.table["measured"] and not self.again):
                continue
            seconds = self.end - clock() - REST - AFTER * len(inside)
            if seconds < LEAST:
                self.say("the budget is spent, some tiles of the Triton kernels are left for another run")
                return
            came = self.search(search, inside, clock() + min(seconds, MOST))
            self.say(f"  tiles for r {search[0]}, T >= {search[1]}, {search[2]}: {came}")

    def search(self, search: tuple[int, int, str], inside: list[Kind], until: float) -> str:
        """Find tiles, and keep them where the kinds of calls that they are for gain; in words what came of it."""
        shapes, done = self.shapes[search[0]], {"search": [*search]}
        try:
            row = tiles.measured(shapes, *search, self.request.device, lambda: clock() >= until)
        except Exception as error:  # what is known of the choices must not be lost by it
            timer.synchronize()  # raises where the device itself is lost
            self.keep([done])
            return f"none: {failure('', error)['reason']}"
        finally:
            release()
        own = [config.plain(each) for each in tiles.merged([row], map(config.parse, self.table["tiles"]))]
        tuned.install(self.table | {"tiles": own})
        new, gain = [], 1.0
        for kind in inside:
            now = self.measured(kind, shapes)
            calls = set(map(_call, now))
            before = self.speeds([row for row in self.rows(kind) if _call(row) in calls])["triton"]
            gain *= (self.speeds(now)["triton"] / before) ** (1 / len(inside)) if before else 1.0
            new += now
        if gain < BETTER:
            self.keep([done])
            return f"no gain, {gain:.2f}"
        self.keep([*new, done], tiles=own)
        return f"{gain:.2f} times as fast"
