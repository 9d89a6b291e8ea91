"""`loraxs tune` and `lx.tune`: which backend is fastest where, measured on the user's own GPU, for a model's shapes.

First the choices: every backend on each kind of call, the most valuable kinds first, until the budget is spent.  Then,
with what is left of it, the tiles of the Triton kernels, where Triton is the fastest or nearly so; they are kept where
the calls gain by them.  After every step the table (backends/tuned.py) is on the disk and in force in this process, so
a run can be stopped at any time, and the next one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from .. import backends
from .. import model as models
from ..backends import choice, tuned
from ..backends.device import Device, facts
from ..backends.triton import config
from ..backends.triton.config import padded
from ..bench import BenchError, tables, timer
from ..bench import choice as question
from ..bench.compare import Row, failure, release
from ..bench.questions import check
from ..bench.request import DTYPES, MODES, Request, at_least_one, model_or_shapes
from ..bench.shapes import MODELS, Shape
from ..linear import LoraXSLinear, check_rank, label_of
from ..weights import weight_of, weight_view
from . import tiles

# Buckets of rows, the most valuable first: training's, a step of decoding, then what lies between.
TOKENS = (8192, 16, 2048, 512, 64, 4096, 1024, 32768, 256, 128, 16384, 32)
DECODING = 64  # rows up to which hardly anyone calls a backward
RANKS = (16, 64, 32)
BUDGET = 300.0  # seconds
SECONDS = 0.03  # for each backend and mode, shape and kind of call
WIDEST = config.WIDEST["half"]  # wider ranks only the GEMM of the CUDA backend takes, on Hopper
NEAR = 0.9  # of the fastest backend's speed: from there on other tiles may make Triton's the fastest
BETTER = 1.01  # times as fast: from there on new tiles are kept
SEARCH, REST = 45.0, 15.0  # seconds without which no search of tiles begins, and which its last steps take
LONGEST = 120.0  # seconds of a search, so that others have their turn and waiting processes hear of it

Say = Callable[[str], None]
Shapes = Mapping[int, Sequence[Shape]]  # by padded rank

clock = time.monotonic


class Point(NamedTuple):
    """A kind of call, measured over all shapes."""

    T: int
    r: int
    weight: bool
    direction: str

    def __str__(self) -> str:
        return f"T {self.T}, r {self.r}, {self.direction} {'with' if self.weight else 'without'} W"


class Result(NamedTuple):
    """What a run leaves: the table, in force for GPUs like `device`, and written to `path`."""

    device: Device
    path: Path
    table: dict[str, Any]

    @property
    def rows(self) -> list[choice.Row]:
        return list(map(choice.parse, self.table["choices"]))


def run(
    shapes: Shapes,
    tokens: Sequence[int] = (),
    dtype: str = "bf16",
    budget: float = BUDGET,
    path: Path | None = None,
    *,
    seconds: float = SECONDS,
    weights: Sequence[bool] = (True, False),
    again: bool = False,
    progress: bool = True,
    tell: Callable[[], None] = lambda: None,
) -> Result:
    """Measure on the current GPU until the budget (seconds) is spent, and write the user's table.

    shapes: by rank, the most valuable first; a rank counts as the padded one.  tokens: each counts as its bucket;
    default: all.  weights: whether calls with W come first, or those without.  path: default: the file that is used
    from then on.  again: measure anew what the file has.  tell: is called after every step.  Raises BenchError,
    ValueError or OSError where this cannot be done, before anything is measured.
    """
    begun = clock()
    at_least_one(tokens=tokens, rank=list(shapes))
    if not 0 < budget < math.inf:
        raise BenchError(f"budget: got {budget:g} seconds, must be above 0 and finite")
    if dtype not in ("bf16", "fp16"):
        raise BenchError(f"dtype: got {dtype!r}, must be bf16 or fp16: in other dtypes there is nothing to choose")
    whole = {padded(r): tuple(each) for r, each in shapes.items()}
    device = _gpu()
    names = _names(device, max(whole))
    path = Path(path) if path is not None else tuned.user_path(tuned.machine(facts(device))["gpu"])
    checked = check(
        questions=["choice"],
        shapes=list(dict.fromkeys(str(shape) for each in whole.values() for shape in each)),
        dtype=dtype,
        paths=names,
        device=str(device),
        seconds=seconds,
    )
    request = replace(checked, paths=tuple(names))  # and none to compare them with
    points = _points(list(whole), [choice.bucket(T) for T in tokens] or TOKENS, weights)
    with tqdm(total=len(points), desc="loraxs tune", unit="point", disable=None if progress else True) as bar:

        def say(line: str) -> None:
            if progress:
                tqdm.write(line, file=sys.stderr)

        def step(line: str) -> None:
            bar.set_postfix_str(line)
            bar.update()
            if bar.disable and line:
                say(f"  {line}")

        say(f"loraxs tune: {len(points)} kinds of calls, {budget / 60:g} minutes at most; writing {path}")
        return _Run(request, whole, path, begun + budget, again, say, step, tell).all(points)


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise BenchError(
            "torch finds no GPU here, and on a CPU there is nothing to choose: run it on the machine and in the "
            "environment in which the layers will run"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _names(device: torch.device, rank: int) -> list[str]:
    """The backends to choose from."""
    reasons = {name: backends.unavailable(name) for name in backends.NAMES}
    names = [name for name, reason in reasons.items() if reason is None]
    if names == ["torch"]:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise BenchError(f"there is nothing to choose, only the torch backend can run here ({why})")
    if rank > WIDEST and not ("cuda" in names and facts(device).capability == (9, 0)):
        raise BenchError(f"rank: got {rank}, must be at most {WIDEST}: wider ones run on the torch backend here")
    return names


def _points(ranks: Sequence[int], tokens: Sequence[int], weights: Sequence[bool]) -> list[Point]:
    """In the order of their value."""
    points = [
        Point(T, r, weight, direction)
        for weight in weights
        for T in dict.fromkeys(tokens)
        for r in ranks
        for direction in choice.DIRECTIONS
    ]
    return sorted(points, key=lambda point: point.direction == "backward" and point.T <= DECODING)


def _together(work: Callable[[Callable[[], None]], Result]) -> Result:
    """Where there are several processes, rank 0 works and the others wait; its table is everybody's.

    `work` gets a function to call after every step: what it sends keeps the others from running out of patience.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return work(lambda: None)

    def exchange(message: Any = None) -> Any:
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    if dist.get_rank() == 0:
        try:
            result = work(lambda: exchange(("goes on", None)))
        except BaseException as error:
            exchange(("failed", f"{type(error).__name__}: {error}"))
            raise
        exchange(("done", result))
        return result
    state, what = exchange()
    while state == "goes on":
        state, what = exchange()
    if state == "failed":
        raise BenchError(f"rank 0 could not tune: {what}")
    _install(what)
    return what


def _install(result: Result) -> None:
    tuned.install(result.device, result.table | {"path": result.path})


@dataclass
class _Run:
    request: Request
    shapes: dict[int, tuple[Shape, ...]]
    path: Path
    end: float  # on the clock
    again: bool
    say: Say
    step: Say  # that a point is done
    tell: Callable[[], None]
    table: dict[str, Any] = field(init=False)
    took: list[float] = field(default_factory=list)  # seconds, of each point

    def __post_init__(self) -> None:
        self.device = facts(self.request.device)
        self.made_on = tuned.machine(self.device)
        gpu = self.made_on["gpu"] or "this CPU"
        self.source = f"measured on {gpu}, {datetime.now(timezone.utc):%Y-%m-%d}"
        self.kernels = {name: tuned.kernels(name) for name in self.request.paths}

    def all(self, points: list[Point]) -> Result:
        self.table = self._found()
        self.keep()  # before anything is measured, in case it cannot be written
        try:
            device = self.request.device
            with timer.on(device), torch.autocast(device.type, enabled=False), timer.short_collections():
                left = sum(not self.choice(point) for point in points)
                if left:
                    self.say(f"the budget is spent, {left} of {len(points)} points are left for another run")
                elif "triton" in self.request.paths and tiles_can_be_searched():
                    self.tiles(points)
        finally:  # also in place of tiles that were being tried
            _install(self.result)
        return self.result

    @property
    def result(self) -> Result:
        return Result(self.device, self.path, self.table)

    def _found(self) -> dict[str, Any]:
        """What an earlier run under the same conditions has left in the file, or an empty table."""
        empty: dict[str, Any] = {"made_on": self.made_on, **{name: [] for name in tuned.LISTS}}
        if not self.path.exists():
            return empty
        try:
            table = tuned.read(self.path)
        except ValueError as error:
            raise BenchError(f"{error}; it is not overwritten: delete it, or name another file") from error
        gpu = table["made_on"].get("gpu")
        if gpu != self.made_on["gpu"]:
            raise BenchError(
                f"{self.path} is the table of another GPU, {gpu}, and is not overwritten: name another file"
            )
        if why := tuned.differences(table["made_on"], self.made_on):
            self.say(f"{self.path} was measured under other conditions ({why}) and is replaced")
            return empty
        try:
            for name, parse in (("tiles", config.parse), ("choices", choice.parse), ("measured", _checked)):
                for entry in table[name]:
                    parse(entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"{name} has a row that cannot be, {type(error).__name__}: {error}"
            self.say(f"{self.path} is damaged ({why}) and is replaced")
            return empty
        return empty | {name: table[name] for name in tuned.LISTS}

    def keep(self, *new: dict[str, Any], **lists: list[dict[str, Any]]) -> None:
        """Write the table with new entries of "measured" and other lists, in place of its own, and put it in force."""
        keys = {_key(entry) for entry in new}
        others = [entry for entry in self.table["measured"] if _key(entry) not in keys]
        table = self.table | lists | {"measured": [*others, *new]}
        rows = [row for entry in table["measured"] for row in _rows(entry)]
        chosen = question.decide(rows, self.device, self.kernels, self.source, torch_too=True)
        table["choices"] = [row._asdict() for row in chosen]
        tuned.write(table, self.path)
        self.table = table
        _install(self.result)
        self.tell()

    def fits(self, seconds: float) -> bool:
        return clock() + seconds <= self.end

    def choice(self, point: Point) -> bool:
        """Measure a point as far as an earlier run has not; False where the budget does not last."""
        entries = () if self.again else self._entries(point)
        done = (entry for entry in entries if not any(map(_passing, entry.get("failed", {}).values())))
        there = {(entry["N"], entry["K"]) for entry in done}
        shapes = [shape for shape in self.shapes[point.r] if (shape.N, shape.K) not in there]
        if not shapes:
            self.step("")
            return True
        if not self.fits(statistics.median(self.took) if self.took else 0.0):
            return False
        before = clock()
        self.keep(*self._measured(point, shapes))
        self.took.append(clock() - before)
        self.step(f"{point}: {self._told(point)}")
        return True

    def _entries(self, point: Point) -> list[dict[str, Any]]:
        wanted = {**point._asdict(), "dtype": self.request.dtype_name}
        return [entry for entry in self.table["measured"] if "N" in entry and wanted.items() <= entry.items()]

    def _speeds(self, entries: list[dict[str, Any]]) -> dict[str, float]:
        rows = [row for entry in entries for row in _rows(entry)]
        return {name: question.speed(rows, name) for name in self.request.paths}

    def _told(self, point: Point) -> str:
        speeds = self._speeds(self._entries(point))
        return ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items() if speed) or "nothing ran"

    def _measured(self, point: Point, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
        """An entry for each shape that fits the GPU, of which `_rows` makes rows again."""
        entries = []
        for shape in shapes:
            entry: dict[str, Any] = {**point._asdict(), "dtype": self.request.dtype_name}
            entry |= {"N": shape.N, "K": shape.K, "count": shape.count}
            found = list(question.measure(self.request, shape, point.T, point.r, point.weight, point.direction))
            failed = {row["path"]: row["reason"] for row in found if row["status"] == "failed"}
            if "torch" in failed:
                if not _passing(failed["torch"]):
                    raise BenchError(f"the torch backend failed at {point}, {shape}: {failed['torch']}")
                self.say(f"  {shape} is left out at {point}: {failed['torch']}")
                continue
            for row in found:
                if row["status"] == "ok":
                    seconds = row.get("seconds", {"median": 1.0})["median"]  # of a CPU there are only ratios
                    figure = seconds if row["path"] == "torch" else row["over"]["torch"]["high"]
                    entry.setdefault(row["mode"], {})[row["path"]] = figure
            for name, reason in failed.items():
                self.say(f"  {name} is left out at {point}, {shape}: {reason}")
            entries.append(entry | ({"failed": failed} if failed else {}))
        release()
        return entries

    def tiles(self, points: list[Point]) -> None:
        """Search tiles for the ranges of rows where Triton is the fastest or nearly so, most valuable first."""
        searched = [entry["search"] for entry in self.table["measured"] if "search" in entry]
        for search, inside in self._worth_a_search(points).items():
            plain = dict(zip(("rank", "tokens", "layout"), search, strict=True))
            again = len(inside) * statistics.median(self.took or [3.0])
            if plain in searched and not self.again:
                continue
            if not self.fits(SEARCH + again):
                self.say("the budget is spent, some tiles of the Triton kernels are left for another run")
                return
            kept = self._search(*search, inside, min(clock() + LONGEST, self.end - REST - again))
            self.say(f"  tiles for r {search[0]}, T >= {search[1]}, {search[2]}: {kept}")

    def _worth_a_search(self, points: list[Point]) -> dict[tuple[int, int, str], list[Point]]:
        """{(rank, least number of rows, layout): the points that such tiles are for}."""
        found: dict[tuple[int, int, str], list[Point]] = {}
        worth = set()
        for point in points:
            if point.r > WIDEST:
                continue
            least = max(tokens for tokens in tiles.TYPICAL if tokens <= point.T)
            found.setdefault((point.r, least, point.direction), []).append(point)
            speeds = self._speeds(self._entries(point))
            if speeds["triton"] and speeds["triton"] >= NEAR * max(speeds.values()):
                worth.add((point.r, least, point.direction))
        return {search: inside for search, inside in found.items() if search in worth}

    def _search(self, rank: int, tokens: int, layout: str, inside: list[Point], until: float) -> str:
        """Find tiles, and keep them where the points of their range gain; in words what came of it."""
        done: dict[str, Any] = {"search": {"rank": rank, "tokens": tokens, "layout": layout}, "kept": False}
        given = (self.shapes[rank], rank, tokens, layout, self.request.device, self.device, self.source, 0.02)
        try:
            row = tiles.measured(*given, enough=lambda: clock() >= until)
        except Exception as error:  # what is known of the choices must not be lost by it
            timer.synchronize()  # raises where the device itself is lost
            self.keep(done)
            return f"none: {failure('', error)['reason']}"
        finally:
            release()
        own = tiles.merged([row], map(config.parse, self.table["tiles"]))
        tried = self.table | {"tiles": [config.plain(each) for each in own]}
        tuned.install(self.device, tried | {"path": self.path})
        new, gains = [], []
        for point in inside:
            now = self._measured(point, self.shapes[rank])
            keys = set(map(_key, now))
            before = self._speeds([entry for entry in self._entries(point) if _key(entry) in keys])["triton"]
            new += now
            gains += [self._speeds(now)["triton"] / before] if before else []
        gain = math.prod(gains) ** (1 / max(1, len(gains)))
        if gain < BETTER:
            self.keep(done)
            return f"no gain, {gain:.2f}"
        self.keep(*new, done | {"kept": True}, tiles=tried["tiles"])
        return f"{gain:.2f} times as fast"


def tiles_can_be_searched() -> bool:
    """Whether this Triton can compile ahead of time as the search needs."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def _checked(entry: dict[str, Any]) -> None:
    """Refuse an entry of "measured" that cannot be: ValueError, TypeError, KeyError or AttributeError."""
    if "search" in entry:
        good = entry["search"].keys() == {"rank", "tokens", "layout"} and type(entry["kept"]) is bool
    else:
        numbers = [entry[name] for name in ("T", "r", "N", "K", "count")]
        figures = [figure for mode in MODES for figure in entry.get(mode, {}).values()]
        good = (
            all(type(n) is int and n > 0 for n in numbers)
            and (entry["T"], entry["r"]) == (choice.bucket(entry["T"]), padded(entry["r"]))
            and all(type(n) is float and 0 < n < math.inf for n in figures)
            and type(entry["weight"]) is bool
            and entry["direction"] in choice.DIRECTIONS
            and entry["dtype"] in DTYPES
        )
    if not good:
        raise ValueError(f"got {entry}")


def _passing(reason: str) -> bool:
    """Whether another time may go better: other programs take memory and time now."""
    return reason.startswith(("out of memory", question.LOST))


def _key(entry: dict[str, Any]) -> tuple:
    """What no two entries of "measured" share."""
    names = ("T", "r", "weight", "direction", "dtype", "N", "K")
    return tuple(entry["search"].values()) if "search" in entry else tuple(entry[name] for name in names)


def _rows(entry: dict[str, Any]) -> Iterator[Row]:
    """The rows of choice.py behind an entry of "measured", as far as `decide` reads them."""
    for mode in MODES:
        figures = entry.get(mode, {})
        for name in figures if "torch" in figures else ():
            over = 1.0 if name == "torch" else figures[name]
            yield {
                **{key: entry[key] for key in ("T", "r", "dtype", "direction", "weight", "N", "K", "count")},
                **{"question": "choice", "status": "ok", "path": name, "mode": mode},
                **{"over": {"torch": {"high": over}}, "seconds": {"median": figures["torch"]}},
            }


class Found(NamedTuple):
    """What of a model decides what is measured."""

    shapes: dict[int, tuple[Shape, ...]]  # by padded rank, that of the most layers first
    dtype: torch.dtype
    dense: bool  # whether calls with W are more than those without


def _integers(name: str, value: Any) -> list[int]:
    """One or several integers, or none, as a list; or a TypeError."""
    found = [value] if isinstance(value, int) else value
    if found is not None and not (
        isinstance(found, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    ):
        raise TypeError(f"{name}: got {value!r}, must be an integer, several of them, or None")
    return list(found or ())


def of_model(model: nn.Module, ranks: Sequence[int]) -> Found:
    """The layers of a model that have adapters, by `attach` or by PEFT; of one without, all linear layers."""
    layers: list[tuple[int, int, int]] = []
    dtypes: Counter[torch.dtype] = Counter()
    dense = 0
    for m in model.modules():
        each: list[tuple[int, torch.dtype, float]] = []
        if isinstance(m, LoraXSLinear):
            each = [(m.rank, m.A.dtype, m.dropout)]
        elif hasattr(m, "loraxs_R"):  # the PEFT method's layer, told without importing peft
            each = [(r, m.loraxs_A[name].dtype, m.config[name].loraxs_dropout) for name, r in m.r.items()]
        for r, dtype, dropout in each:
            layers.append((m.out_features, m.in_features, r))
            dtypes[dtype] += 1
            dense += weight_view(m.base_layer) is not None and not dropout
    if layers and ranks:
        raise ValueError(f"rank: got {ranks} for a model with LoRA-XS adapters, which have theirs; leave it out")
    if not layers:
        if not ranks:
            raise ValueError("rank: must be given, for the model has no LoRA-XS adapters")
        for r in ranks:
            check_rank(r, "the model")
        model = models.unwrapped(model)
        for name in models.choose(model, "all-linear", None, None)[0]:
            weight = weight_of(model.get_submodule(name), label_of(name))
            layers += [(*weight.shape, r) for r in ranks]
            dtypes[weight.dtype] += 1
            dense += len(ranks) * (weight_view(model.get_submodule(name)) is not None)
    by_rank: dict[int, Counter[tuple[int, int]]] = {}
    for N, K, r in layers:
        by_rank.setdefault(padded(r), Counter())[N, K] += 1
    shapes = {}
    for r, counts in sorted(by_rank.items(), key=lambda each: -each[1].total()):
        blocks = math.gcd(*counts.values())
        shapes[r] = tuple(Shape(N, K, count // blocks) for (N, K), count in counts.items())
    return Found(shapes, dtypes.most_common(1)[0][0], 2 * dense >= len(layers))


def tune_model(
    model: nn.Module,
    rank: int | Sequence[int] | None,
    tokens: int | Sequence[int] | None,
    dtype: torch.dtype | None,
    budget: float,
    path: Any,
    again: bool,
    progress: bool,
) -> list[choice.Row]:
    """See `loraxs_kernels.tune`."""

    def work(tell: Callable[[], None]) -> Result:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}, must be an nn.Module")
        found = of_model(model, _integers("rank", rank))
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype or found.dtype)
        if name is None:
            raise ValueError(
                f"dtype: got {dtype or found.dtype}, must be torch.bfloat16 or torch.float16: in other dtypes there is "
                "nothing to choose. Name the one that autocast computes in, if it is used"
            )
        rows_of_x = _integers("tokens", tokens)
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"budget: got {budget!r}, must be a number of seconds")
        if path is not None and (not isinstance(path, (str, os.PathLike)) or not os.fspath(path)):
            raise TypeError(f"path: got {path!r}, must be the path of a file, or None")
        weights = (True, False) if found.dense else (False, True)
        more: dict[str, Any] = dict(weights=weights, again=again, progress=progress, tell=tell)
        return run(found.shapes, rows_of_x, name, budget, path, **more)

    return _together(work).rows


def add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        help=f"whose shapes: {', '.join(MODELS)}; or a folder with a config.json, such a file, or a name on Hugging "
        "Face's hub; default: mistral-7b",
    )
    add("--shape", nargs="+", default=[], metavar="NxK", help="shapes instead of a model's, such as 4096x14336")
    add("--rank", nargs="+", type=int, default=list(RANKS), metavar="r", help="most valuable first; default: 16 64 32")
    add("--tokens", nargs="+", type=int, default=[], metavar="T", help="rows of x; default: the powers of two to 32768")
    add("--dtype", choices=("bf16", "fp16"), default="bf16", help="default: bf16")
    add("--budget", type=float, default=BUDGET / 60, metavar="MINUTES", help="default: 5")
    add("--seconds", type=float, default=SECONDS, help=f"for each backend, shape and kind of call; default: {SECONDS}")
    add("--again", action="store_true", help="measure anew what the table has already")
    add("--out", type=Path, metavar="FILE", help="default: the table that is used from then on")


def command(arguments: argparse.Namespace, shapes: Shapes | None = None) -> int:
    """Run `loraxs tune`; shapes: by padded rank, those of --model, where it is none of shapes.MODELS."""
    at_least_one(rank=arguments.rank)
    shapes = shapes or dict.fromkeys(arguments.rank, model_or_shapes(arguments.model, arguments.shape)[1])
    if not 0 < arguments.budget < math.inf:
        raise BenchError(f"budget: got {arguments.budget:g} minutes, must be above 0 and finite")
    given = (arguments.tokens, arguments.dtype, 60 * arguments.budget, arguments.out)
    result = run(shapes, *given, seconds=arguments.seconds, again=arguments.again)
    tables.show([summary(result)])
    print(f"\n{result.path} has the table; what it has is not measured again (--again: it is)")
    if result.path != tuned.user_path(result.table["made_on"]["gpu"]):
        print(f"It is used where it is named: LORAXS_TUNED={result.path}")
    return 0


def summary(result: Result) -> tables.Table:
    """Which backend where, and its gain: a column for each bucket of rows, a line for each kind of call.

    A layer for which another backend is better than for the others has a line of its own.
    """
    rows = result.rows
    tokens = sorted({row.tokens for row in rows})
    cells: dict[tuple, dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: (row.dtype, not row.weight, row.direction == "backward", row.rank)):
        what = f"{row.direction} {'with' if row.weight else 'without'} W, {row.dtype}"
        cell = "torch" if row.backend == "torch" else f"{row.backend} {row.gain:.2f}"
        one = row.N[0] == row.N[1] and row.K[0] == row.K[1]
        size = (row.N[0], row.K[0]) if row.direction == "forward" else (row.K[0], row.N[0])
        layers = "{} x {}".format(*size) if one else "all"
        cells.setdefault((what, str(row.rank), layers), {})[row.tokens] = cell
    lines = [[*key, *(found.get(T, "") for T in tokens)] for key, found in cells.items()]
    title = "The fastest backend, and how many times as fast as torch's it is"
    return tables.Table(title, ["call", "r", "layers", *(f"T {T}" for T in tokens)], lines, ())
