"""What does the adapter cost next to its frozen linear?  Every path, over shapes, tokens and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch

from . import plots, tables, tax, timer
from .compare import Candidate, Row, compare
from .paths import PATHS, Operands, calls, layer_errors
from .question import Point, Question, colour, grid
from .request import Request
from .roofline import DIRECTIONS
from .shapes import Shape
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


OVER = ("frozen", "reference", "peft-lora", "torch")


def plan(request: Request) -> list[Point]:
    return grid(request, _rows, direction=[request.direction])


def _rows(request: Request, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    if any(name.startswith("compile") for name in request.paths):
        torch._dynamo.reset()  # a shape of its own each time: what earlier ones compiled counts against a limit

    names, make = [name for name in PATHS if name in request.paths], partial(operands, request, shape, T, r)
    return compare(request, names, make, partial(candidate, request), OVER)


def operands(request: Request, shape: Shape, T: int, r: int) -> list[Operands]:
    make = partial(Operands.random, T, shape.N, shape.K, r, request.dtype, request.device)
    return timer.in_sets(make, request.device, attrgetter("bytes"))


def candidate(request: Request, sets: list[Operands], name: str) -> Candidate:
    """The layers of a path, checked; on a GPU with the memory that a call takes at most."""
    path = PATHS[name]
    facts: Row = {"sets": len(sets)}
    with path.within():
        layers = list(map(path.make, sets))
        found = layer_errors(layers[0], sets[0])
        if request.gpu:
            (call,) = calls(layers[:1], sets[:1], request.direction)
            call()
            facts["peak_bytes"] = timer.peak(call, request.device)[1]
    return Candidate(partial(calls, layers, sets, request.direction), found, facts, path.within)


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """On a GPU the headline: time added to the frozen linears of a block, and what it must be at least; on a CPU,
    ratios to the reference layer, each with its quartiles."""
    if not tables.gpu(report):
        yield from _ratios(rows)
        return
    points = tax.points(rows)
    for group in dict.fromkeys(at[:-2] for at in points):
        grid = sorted(at for at in points if at[:-2] == group)
        names = [name for name in PATHS if any(name in points[at] for at in grid) and name != "frozen"]
        lines = [
            [f"{name}: {PATHS[name].what}", *(_tax(report, at, points[at], name) for at in grid)] for name in names
        ]
        run, model, dtype, direction, mode = group
        what = DIRECTIONS[direction] + (f" ({run})" if run else "")
        shapes = ", ".join(f"{shape.count} x {shape}" for shape in points[grid[0]]["frozen"])
        yield Table(
            f"Adapter tax in % of the frozen linears, {model or 'shapes as given'}, {dtype}, {what}, {mode}",
            ["", *(f"T {at.T} r {at.r}" for at in grid)],
            lines,
            [
                f"Linears: {shapes}. {tables.QUARTILES} In square brackets: the least that can be added, counted from "
                "bytes and flops at the bandwidth and the speed that this run has measured.",
            ],
            tax.NOISE,
        )


def _tax(report: dict[str, Any], at: tax.Point, paths: tax.Paths, name: str) -> str:
    found, least = tax.measured(paths, name), tax.least(report, at, paths, name)
    floor = "" if least is None else f" [{least:.1f}]"
    return tables.NO_FIGURE if found is None else tax.shown(found, floor)


def _ratios(rows: list[Row]) -> Iterator[Table]:
    if rows:
        points, other = tables.labelled(rows, "{dtype} T {T}, {N} x {K}, r {r}"), tables.baseline(rows)
        names = [name for name in tables.present(PATHS, rows) if name != other]
        title = f"One layer, {DIRECTIONS[rows[0]['direction']]}, as a multiple of the time of {other}"
        note = f"{other}: {PATHS[other].what}. {tables.ratios_to(other)}"
        columns = [(name, name, partial(tables.over, other=other)) for name in names]
        yield tables.compared(title, points, columns, note)


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    """Tax against T, and against r: of a block on a GPU, of each shape on a CPU."""
    spots = list(_of_blocks(report, rows) if tables.gpu(report) else _of_layers(rows))
    for mode, own in tables.grouped(spots).items():
        for x, other, what in (("T", "r", "tokens T"), ("r", "T", "rank r")):
            if len({spot[x] for spot in own}) > 1:
                groups: dict[str, list[Row]] = {}
                for spot in sorted(own, key=itemgetter("of", other, x)):
                    of = f"{spot['of']}, {other} = {spot[other]}"
                    groups.setdefault(of.removeprefix(", "), []).append(spot)
                title = f"Adapter tax by {what}" + (f", {mode} mode" if tables.gpu(report) else "")
                yield plots.panels(f"tax-by-{x}-{mode}", title, groups, partial(_panel, x=x))


def _of_layers(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        if row["path"] != "frozen" and "frozen" in row["over"]:
            of = f"{row['N']} x {row['K']} {row['dtype']}"
            yield row | {"of": of, "tax": tax.of_ratio(row["over"]["frozen"]), "floor": None}


def _of_blocks(report: dict[str, Any], rows: list[Row]) -> Iterator[Row]:
    """The tax of each path in a block, if it was measured, and its floor, if there is one."""
    seen: set[tuple] = set()
    for at, paths in tax.points(rows).items():
        for path in (*paths, "one-pass"):
            found, least = tax.measured(paths, path), tax.least(report, at, paths, path)
            where = (*at[1:], path)  # of several runs the first one counts
            if path != "frozen" and where not in seen and (found or least is not None):
                seen.add(where)
                of = f"{at.model} {at.dtype} {DIRECTIONS[at.direction]}".strip()
                yield {"of": of, "mode": at.mode, "T": at.T, "r": at.r, "path": path, "tax": found, "floor": least}


def _panel(axes: Axes, spots: list[Row], x: str) -> None:
    for path, own in tables.grouped(spots, "path").items():
        style = {"color": colour(PATHS, path)}
        if measured := [(spot[x], spot["tax"]) for spot in own if spot["tax"]]:
            xs = [where for where, _ in measured]
            low, median, high = ([tax[end] for _, tax in measured] for end in ("low", "median", "high"))
            axes.plot(xs, median, "o-", label=path, markersize=4, **style)
            axes.fill_between(xs, low, high, alpha=0.15, **style)
        if floors := [(spot[x], spot["floor"]) for spot in own if spot["floor"] is not None]:
            axes.plot(*zip(*floors, strict=True), ":", label=f"{path}, floor", **style)
    ticks = sorted({spot[x] for spot in spots})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    # One path far above the others must not press them flat.
    if max(spot["tax"]["median"] if spot["tax"] else 0 for spot in spots) > 200:
        axes.set_yscale("symlog", linthresh=50)
    axes.set(xlabel=x, ylabel="% of the frozen linears' time")


QUESTION = Question(name="layer", plan=plan, tables=show, plots=draw, paths=PATHS)
