"""What does the adapter cost next to its frozen linear?  Every path, over shapes, tokens and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import plots, roofline, tables, tax, timer
from .compare import Candidate, Row, compare
from .paths import PATHS, Operands, calls, layer_errors
from .question import Point, Question, colour, grid
from .request import Request
from .roofline import DIRECTIONS
from .shapes import Shape
from .tables import Table, over, pivot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plan(request: Request) -> list[Point]:
    return grid(request, _rows, direction=[request.direction])


def _rows(request: Request, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    if any(name.startswith("compile") for name in request.paths):
        torch._dynamo.reset()  # a shape of its own each time: what earlier ones compiled counts against a limit

    def prepare() -> partial:
        return partial(candidate, request, operands(request, shape, T, r))

    return compare(request, [name for name in PATHS if name in request.paths], prepare)


def operands(request: Request, shape: Shape, T: int, r: int) -> list[Operands]:
    """Enough sets of operands to leave the cache."""
    make = partial(Operands.random, T, shape.N, shape.K, r, request.dtype, request.device)
    first = make(0)
    return [first, *map(make, range(1, timer.sets_needed(request.device, first.bytes)))]


def candidate(request: Request, sets: list[Operands], name: str) -> Candidate:
    """The layers of a path, checked; on a GPU with the memory that a call takes at most."""
    path = PATHS[name]
    facts: Row = {"sets": len(sets)}
    with path.within():
        layers = path.build(sets)
        found = layer_errors(layers[0], sets[0])
        if request.gpu:
            (call,) = calls(layers[:1], sets[:1], request.direction)
            call()
            held = torch.cuda.memory_allocated(request.device)
            torch.cuda.reset_peak_memory_stats(request.device)
            call()
            facts["peak_bytes"] = torch.cuda.max_memory_allocated(request.device) - held
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
            (
                f"Linears: {shapes}. Quartiles in brackets; in square ones what bytes and flops alone add at this "
                "run's own ceilings.",
                *tables.noise(lines, "its quartiles are too far apart"),
            ),
        )


def _tax(report: dict[str, Any], at: tax.Point, paths: tax.Paths, name: str) -> str:
    found, least = tax.measured(paths, name), tax.least(report, at, paths, name)
    floor = "" if least is None else f" [{100 * least:.1f}]"
    return tables.NO_FIGURE if found is None else tables.percent(found, floor)


def _ratios(rows: list[Row]) -> Iterator[Table]:
    if not rows:
        return
    points = pivot(rows, "dtype", "direction", "T", "N", "K", "r")
    other = tables.baseline(rows)
    names = [name for name in tables.present(PATHS, points) if name != other]
    lines = [
        [f"{dtype} T {T}, {N} x {K}, r {r}", *(over(point.get(name), other) for name in names)]
        for (dtype, _, T, N, K, r), point in points.items()
    ]
    direction = DIRECTIONS[rows[0]["direction"]]
    notes = (f"{other}: {PATHS[other].what}, is 1; below 1 is faster. Quartiles in brackets.", *tables.noise(lines))
    yield Table(f"One layer, {direction}, as a multiple of the time of: {other}", ["", *names], lines, notes)


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    yield from taxes(report, rows)
    yield from achieved(report, rows)


def taxes(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    """Tax against T, and against r: of a block on a GPU, of each shape on a CPU."""
    points = list(_block_taxes(report, rows) if tables.gpu(report) else _layer_taxes(rows))
    for mode in dict.fromkeys(point["mode"] for point in points):
        of_mode = [point for point in points if point["mode"] == mode]
        for x, other in (("T", "r"), ("r", "T")):
            if len({point[x] for point in of_mode}) < 2:
                continue
            groups: dict[str, list[dict]] = {}
            for point in sorted(of_mode, key=lambda point: (point["of"], point[other], point[x])):
                groups.setdefault(f"{point['of']}, {other} = {point[other]}".removeprefix(", "), []).append(point)
            suffix = f", {mode} mode" if tables.gpu(report) else ""
            title = f"Adapter tax by {'tokens T' if x == 'T' else 'rank r'}{suffix}"
            yield plots.panels(f"tax-by-{x}-{mode}", title, groups, partial(_tax_panel, x=x))


def _layer_taxes(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """{of, mode, T, r, path, tax, low, high, floor} in percent."""
    for row in rows:
        if row["path"] != "frozen" and "frozen" in row["over"]:
            low, median, high = (100 * (row["over"]["frozen"][name] - 1) for name in ("low", "median", "high"))
            where = {name: row[name] for name in ("mode", "T", "r", "path")}
            of = f"{row['N']} x {row['K']} {row['dtype']}"
            yield where | {"of": of, "tax": median, "low": low, "high": high, "floor": None}


def _block_taxes(report: dict[str, Any], rows: list[Row]) -> Iterator[dict[str, Any]]:
    seen: set[tuple] = set()
    for at, paths in tax.points(rows).items():
        for path in (*paths, "one-pass"):
            found, least = tax.measured(paths, path), tax.least(report, at, paths, path)
            spot = (*at[1:], path)  # of several runs the first
            if path != "frozen" and spot not in seen and (found is not None or least is not None):
                seen.add(spot)
                of = f"{at.model} {at.dtype} {DIRECTIONS[at.direction]}".strip()
                point = {"of": of, "mode": at.mode, "T": at.T, "r": at.r, "path": path}
                low, median, high = (100 * v for v in dataclasses.astuple(found)) if found else (None, None, None)
                point |= {"tax": median, "low": low, "high": high, "floor": None if least is None else 100 * least}
                yield point


def _tax_panel(axes: Axes, group: list[dict], x: str) -> None:
    for path in dict.fromkeys(point["path"] for point in group):
        own = [point for point in group if point["path"] == path]
        style = {"color": colour(PATHS, path)}
        if measured := [point for point in own if point["tax"] is not None]:
            xs = [point[x] for point in measured]
            axes.plot(xs, [point["tax"] for point in measured], "o-", label=path, markersize=4, **style)
            ends = ([point[k] for point in measured] for k in ("low", "high"))
            axes.fill_between(xs, *ends, alpha=0.15, **style)
        if floors := [(point[x], point["floor"]) for point in own if point["floor"] is not None]:
            axes.plot(*zip(*floors, strict=True), ":", label=f"{path}, floor", **style)
    ticks = sorted({point[x] for point in group})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    # One path far above the others must not press them flat.
    if max(point["tax"] or 0 for point in group) > 200:
        axes.set_yscale("symlog", linthresh=50)
    axes.set(xlabel=x, ylabel="% of the frozen linears' time")


def achieved(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    """What the layer achieves of the machine: useful flop/s against intensity, under the measured copy and GEMM."""
    rows = [row for row in rows if "seconds" in row and row["dtype"] != "fp32"]
    if not rows or not report["ceilings"]:
        return
    limit = roofline.Ceilings(**report["ceilings"])
    modes: dict[str, list[Row]] = {}
    for row in rows:
        modes.setdefault(f"{row['mode']} mode", []).append(row)
    title = "Achieved: each layer under this run's own copy and GEMM"
    yield plots.panels("achieved", title, modes, partial(_achieved_panel, limit=limit))


def _achieved_panel(axes: Axes, rows: list[Row], limit: roofline.Ceilings) -> None:
    spots: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        sizes = (row[k] for k in ("T", "N", "K", "r", "direction"))
        moved, flops = roofline.needed(*sizes, adapter=row["path"] != "frozen")
        spots.setdefault(row["path"], []).append((flops / moved, flops / row["seconds"]["median"] / 1e12))
    for path, xy in spots.items():
        axes.plot(*zip(*xy, strict=True), "o", color=colour(PATHS, path), label=path, markersize=4, alpha=0.7)
    xs = sorted(x for xy in spots.values() for x, _ in xy)
    grid = [xs[0] / 2, limit.half / limit.bandwidth, max(2 * xs[-1], 2 * limit.half / limit.bandwidth)]
    roof = [min(limit.bandwidth * x, limit.half) / 1e12 for x in grid]
    what = f"copy {limit.bandwidth / 1e12:.2f} TB/s, GEMM {limit.half / 1e12:.0f} TFLOP/s"
    axes.plot(grid, roof, "-", color="black", label=what)
    axes.set(xlabel="flops needed per byte needed", ylabel="TFLOP/s of what is needed")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


QUESTION = Question(name="layer", plan=plan, tables=show, plots=draw, paths=PATHS)
