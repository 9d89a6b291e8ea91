"""A question of `loraxs bench`, and the check that a run can answer the questions it is asked.

A question says here which paths it has, which options are its own and what it refuses: `check` knows none by its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import torch

from ..naming import first_line
from . import BenchError
from .compare import Row, failure, release
from .request import DTYPES, MODES, Request, at_least_one, known, one_of
from .roofline import DIRECTIONS
from .shapes import MODELS, Shape, parse

if TYPE_CHECKING:
    from .plots import Plot
    from .tables import Table


GREY = "#7f7f7f"


@dataclass(frozen=True)
class Path:
    """A way to compute something that is timed beside others."""

    name: str
    colour: str  # in plots
    what: str
    run: str = "default"  # part of a run that names no paths; "all": of one with `--paths all`; "named": of none
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here
    make: Callable | None = None  # how its question builds or calls it
    within: Callable[[], AbstractContextManager] = nullcontext  # open while it is built and runs


def earlier(name: str, colour: str, what: str) -> Path:
    """A path that can only be found in reports of earlier versions."""
    return Path(name, colour, what, "named", lambda: "it is measured no more")


def colour(paths: Mapping[str, Path], name: str) -> str:
    """The colour of a path; grey for a path of an earlier version."""
    return paths[name].colour if name in paths else GREY


@dataclass(frozen=True)
class Point:
    """A point of a question's grid: `where` stands in all rows that `rows` makes."""

    where: Row
    rows: Callable[[], Iterator[Row]]

    def __str__(self) -> str:
        """As the lines that show the progress have it."""
        return " ".join(f"{key} {value}" for key, value in self.where.items() if key not in ("layers", "count"))


def grid(request: Request, rows: Callable[..., Iterator[Row]], **more: Sequence[Any]) -> list[Point]:
    """Points of rows(request, shape, T, r, ...) for all shapes at each T, each r and each value of `more`."""
    return [
        Point(
            {**shape.where, "T": T, "r": r, **dict(zip(more, values, strict=True))},
            partial(rows, request, shape, T, r, *values),
        )
        for T, r, *values in itertools.product(request.tokens, request.ranks, *more.values())
        for shape in request.shapes
    ]


@dataclass(frozen=True)
class Question:
    """What a file of this package asks: its grid, its paths, its rows, and its tables and plots."""

    name: str
    tables: Callable[[dict[str, Any], list[Row]], Iterator[Table]]  # from a report and its rows of this question
    plan: Callable[[Request], list[Point]] = lambda request: []  # the grid, in the order in which it is measured
    plots: Callable[[dict[str, Any], list[Row]], Iterator[Plot]] = lambda report, rows: iter(())
    paths: Mapping[str, Path] = field(default_factory=dict)  # that may be named
    options: tuple[str, ...] = ()  # the fields of Request marked `own` that it reads
    unread: tuple[str, ...] = ()  # the other fields that it does not read
    folders: bool = False  # whether its model may be a folder with a Hugging Face model
    check: Callable[[Request], Request] = lambda request: request  # refuses (BenchError), and fills in what is its own
    how: str = ""  # it is measured, in a sentence for the page
    answered: str = ""  # where the answer is, if it is asked no more, and is here for the reports that have it

    def at(self, request: Request, point: Point) -> Iterator[Row]:
        """The rows of a point; one that breaks off costs only itself."""
        where = {"question": self.name, "model": request.model, **point.where, "dtype": request.dtype_name}
        try:
            for row in point.rows():
                yield where | row
        except Exception as error:
            yield where | failure(point.where.get("path", "(the rest)"), error)
        release()


def check(questions: Sequence[Question], asked: Mapping[str, Any]) -> Request:
    """Fill in what was not asked for, by what the device can do in about a minute; refuse what cannot be.

    asked: options as the command line has them.  Raises BenchError, naming the option, what it was and what it must be.
    """
    given = {key: tuple(dict.fromkeys(value)) if isinstance(value, list) else value for key, value in asked.items()}
    names = tuple(question.name for question in questions)
    request = Request(**given | {"questions": names, "device": _device(asked.get("device"))})
    known("direction", [request.direction], DIRECTIONS)
    known("mode", request.modes, MODES)
    one_of("model", request.model, "shape", list(request.shapes))
    if request.model and request.model not in MODELS:
        _folder(request, questions)
    if "graph" in request.modes and not request.gpu:
        raise BenchError("mode: got 'graph' on a CPU, CUDA graphs need a GPU")
    dtype = request.dtype or ("bf16" if request.gpu else "fp32")
    known("dtype", [dtype], DTYPES)
    for each in fields(Request):
        values = asked.get(each.name)
        if each.metadata.get("argparse", {}).get("type") is int and values is not None:
            at_least_one(**{each.metadata["flag"] or each.name: [values] if isinstance(values, int) else values})
        if each.metadata.get("own") and values and not any(each.name in question.options for question in questions):
            raise BenchError(f"{each.name}: got {values}, and none of {', '.join(request.questions)} takes it")
    if request.seconds is not None and not 0 < request.seconds < 3600:
        raise BenchError(f"seconds: got {request.seconds:g}, must be above 0 and below 3600")
    request = replace(request, dtype=DTYPES[dtype], shapes=tuple(map(parse, request.shapes)))
    request = _with_paths(request, questions)
    for question in questions:
        request = question.check(request)
    model = request.model or ("mistral-7b" if request.gpu and not request.shapes else "")
    if request.blocks and model in MODELS and request.blocks > MODELS[model].blocks:
        raise BenchError(f"blocks: got {request.blocks}, must be at most {MODELS[model].blocks}, as {model} has")
    small = (Shape(1024, 1024), Shape(1024, 4096))
    return replace(
        request,
        model=model,
        shapes=request.shapes or (MODELS[model].shapes if model in MODELS else small),
        tokens=request.tokens or ((512, 8192) if request.gpu else (64, 512)),
        ranks=request.ranks or ((16, 64) if request.gpu else (16,)),
        modes=request.modes or (MODES if request.gpu else MODES[:1]),
        seconds=request.seconds or (0.1 if request.gpu else 0.5),
    )


def _with_paths(request: Request, questions: Sequence[Question]) -> Request:
    """Which paths run, the floor always among them, and those left out because they cannot run here.

    Questions may have different paths: a name that was given chooses only among those that have it.
    """
    groups = {id(question.paths): question.paths for question in questions}.values()
    known("path", request.paths, [*(name for paths in groups for name in paths), "all"])
    runs: list[str] = []
    left_out = {}
    for paths in groups:
        wanted = {name for name in paths if name in request.paths}
        if "all" in request.paths:
            wanted |= {name for name, path in paths.items() if path.run != "named"}
        wanted = (wanted or {name for name, path in paths.items() if path.run == "default"}) | ({"frozen"} & set(paths))
        for name in (name for name in paths if name in wanted):
            if (why := paths[name].missing()) is None:
                runs.append(name)
            elif name in request.paths:
                raise BenchError(f"path: {name!r} cannot run here: {why}")
            else:
                left_out[name] = why
    return replace(request, paths=tuple(runs), left_out=left_out)


def _folder(request: Request, questions: Sequence[Question]) -> None:
    """Refuse a model that is neither known nor a folder, and a folder where a question needs a model's shapes."""
    if not (File(request.model) / "config.json").is_file():
        names = ", ".join(MODELS)
        raise BenchError(f"model: got {request.model!r}, must be one of {names}, or a folder with a Hugging Face model")
    if others := [question.name for question in questions if not question.folders]:
        must = f"must be one of {', '.join(MODELS)} for {', '.join(others)}"
        raise BenchError(f"model: got the folder {request.model!r}, {must}")


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BenchError(f"device: {name!r} cannot be used here: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"device: got {name!r}, must be a CPU or a CUDA device")
    return device
