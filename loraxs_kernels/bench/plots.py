"""A report as figures.  matplotlib is imported when a plot is wanted, and nowhere else in this package."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import BenchError, roofline, tables, tax

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ours in blues and greens, what people run today in warm colours, the floor black.
COLOURS = {
    "frozen": "#000000",
    "reference-fp32": "#a63603",
    "reference": "#e6550d",
    "addmm": "#b8860b",
    "compile": "#8c6bb1",
    "compile-max": "#4d004b",
    "peft-lora": "#d6616b",
    "peft-tinylora": "#e7969c",
    "vera": "#7b4173",
    "torch": "#1f77b4",
    "triton": "#17a398",
    "cuda": "#2ca02c",
    "cuda-128x256": "#98df8a",
    "cuda-128x128": "#006d2c",
    "chosen": "#08519c",
    "operator": "#9ecae1",
    "two": "#6baed6",
    "two-compile": "#2171b5",
    "two-frozen-compile": "#525252",
    "one-pass": "#7f7f7f",
    "loraxs-svd": "#1f77b4",
    "sklearn": "#e6550d",
    "svd-lowrank": "#b8860b",
    "svd-full": "#000000",
    "loraxs-eigh-gpu": "#9e9ac8",
    "loraxs-krylov": "#6baed6",
    "loraxs-subspace": "#2ca02c",
    "svd-lowrank-2": "#f2c14e",
    "svd-lowrank-4": "#d9a441",
    "svd-lowrank-r": "#8c6d31",
    "svd-lowrank-4-r": "#e7cb94",
}
PANELS = 3  # in a row
MOST_PANELS = 12


@dataclass(frozen=True)
class Plot:
    """`name` for a file, `title` for people, and the figure."""

    name: str
    title: str
    figure: Figure

    def png(self) -> bytes:
        return self._drawn("png", dpi=110)

    def svg(self) -> bytes:
        return self._drawn("svg", metadata={"Date": None})

    def _drawn(self, kind: str, **options: Any) -> bytes:
        import matplotlib

        out = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):  # the same bytes every time
            self.figure.savefig(out, format=kind, **options)
        return out.getvalue()


def require() -> None:
    """Raise BenchError where matplotlib is missing: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("plots need the package matplotlib: pip install matplotlib")


def of(report: dict[str, Any]) -> list[Plot]:
    """Every figure of a report that it has rows for."""
    require()
    ok = [row for row in report["rows"] if row["status"] == "ok"]
    makers: tuple[Callable[..., Iterator[Plot]], ...] = (taxes, ceilings, gemms, host, models, svd)
    return [plot for make in makers for plot in make(report, ok)]


def taxes(report: dict[str, Any], ok: list[dict]) -> Iterator[Plot]:
    """Tax against T, and against r: of a block on a GPU, of each shape on a CPU."""
    points = list(_tax_points(report, ok))
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
            figure, panels = _panels(min(len(groups), MOST_PANELS))
            if len(groups) > MOST_PANELS:
                title += f" (the first {MOST_PANELS} of {len(groups)})"
            for axes, (name, group) in zip(panels, groups.items(), strict=False):
                _tax_panel(axes, group, x)
                axes.set(title=name, xlabel=x, ylabel="% of the frozen linears' time")
            _finish(figure)
            yield Plot(f"tax-by-{x}-{mode}", title, figure)


def _tax_points(report: dict[str, Any], ok: list[dict]) -> Iterator[dict[str, Any]]:
    """{of, mode, T, r, path, tax, low, high, floor} in percent."""
    if not tables.gpu(report):
        for row in ok:
            if row["question"] == "layer" and row["path"] != "frozen" and "frozen" in row["over"]:
                low, median, high = (100 * (row["over"]["frozen"][name] - 1) for name in ("low", "median", "high"))
                where = {name: row[name] for name in ("mode", "T", "r", "path")}
                of = f"{row['N']} x {row['K']} {row['dtype']}"
                yield where | {"of": of, "tax": median, "low": low, "high": high, "floor": None}
        return
    seen: set[tuple] = set()
    for at, paths in tax.points(ok).items():
        for path in (*paths, "one-pass"):
            found, least = tax.measured(paths, path), tax.least(report, at, paths, path)
            spot = (*at[1:], path)  # of several runs the first
            if path != "frozen" and spot not in seen and (found is not None or least is not None):
                seen.add(spot)
                of = f"{at.model} {at.dtype} {roofline.DIRECTIONS[at.direction]}".strip()
                point = {"of": of, "mode": at.mode, "T": at.T, "r": at.r, "path": path}
                low, median, high = (100 * v for v in dataclasses.astuple(found)) if found else (None, None, None)
                point |= {"tax": median, "low": low, "high": high, "floor": None if least is None else 100 * least}
                yield point


def _tax_panel(axes: Axes, group: list[dict], x: str) -> None:
    for path in dict.fromkeys(point["path"] for point in group):
        own = [point for point in group if point["path"] == path]
        colour = COLOURS[path]
        measured = [point for point in own if point["tax"] is not None]
        if measured:
            xs = [point[x] for point in measured]
            axes.plot(xs, [point["tax"] for point in measured], "o-", color=colour, label=path, markersize=4)
            axes.fill_between(
                xs, *([point[k] for point in measured] for k in ("low", "high")), color=colour, alpha=0.15
            )
        floors = [(point[x], point["floor"]) for point in own if point["floor"] is not None]
        if floors:
            axes.plot(*zip(*floors, strict=True), ":", color=colour, label=f"{path}, floor")
    ticks = sorted({point[x] for point in group})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    # One path far above the others must not press them flat.
    if max(point["tax"] or 0 for point in group) > 200:
        axes.set_yscale("symlog", linthresh=50)


def ceilings(report: dict[str, Any], ok: list[dict]) -> Iterator[Plot]:
    """What the layer achieves of the machine: useful flop/s against intensity, under the measured copy and GEMM."""
    rows = [row for row in ok if row["question"] == "layer" and "seconds" in row and row["dtype"] != "fp32"]
    if not rows or not report["ceilings"]:
        return
    limit = roofline.Ceilings(**report["ceilings"])
    title = "Achieved: each layer under this run's own copy and GEMM"
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, panels = _panels(len(modes))
    for axes, mode in zip(panels, modes, strict=True):
        spots: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["mode"] == mode):
            sizes = (row[k] for k in ("T", "N", "K", "r", "direction"))
            moved, flops = roofline.needed(*sizes, adapter=row["path"] != "frozen")
            spots.setdefault(row["path"], []).append((flops / moved, flops / row["seconds"]["median"] / 1e12))
        for path, xy in spots.items():
            axes.plot(*zip(*xy, strict=True), "o", color=COLOURS[path], label=path, markersize=4, alpha=0.7)
        xs = sorted(x for xy in spots.values() for x, _ in xy)
        grid = [xs[0] / 2, limit.half / limit.bandwidth, max(2 * xs[-1], 2 * limit.half / limit.bandwidth)]
        roof = [min(limit.bandwidth * x, limit.half) / 1e12 for x in grid]
        what = f"copy {limit.bandwidth / 1e12:.2f} TB/s, GEMM {limit.half / 1e12:.0f} TFLOP/s"
        axes.plot(grid, roof, "-", color="black", label=what)
        axes.set(title=f"{mode} mode", xlabel="flops needed per byte needed")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_ylabel("TFLOP/s of what is needed")
    _finish(figure)
    yield Plot("achieved", title, figure)


def gemms(report: dict[str, Any], ok: list[dict]) -> Iterator[Plot]:
    """What u B^T adds to the library's x W^T over a block, on a GPU."""
    modes: dict[str, dict[str, list[tuple[str, str, dict[str, float]]]]] = {}
    for at, paths in tax.points(ok, "gemm").items():
        paths["cuda"] = tables.picked(paths)
        for path in paths:
            if path != "frozen" and (found := tax.measured(paths, path)):
                spread = {name: 100 * value for name, value in dataclasses.asdict(found).items()}
                where = f"{at.model} {at.dtype}, T = {at.T}, r = {at.r}".strip()
                group = modes.setdefault(at.mode, {}).setdefault(where, [])
                group.append((path, f"{path}, {at.direction}", spread))
    for mode, groups in modes.items():
        title = f"u B^T, u given: time added to the library's x W^T, {mode} mode"
        figure, panels = _panels(min(len(groups), MOST_PANELS))
        for axes, (name, bars) in zip(panels, groups.items(), strict=False):
            _bars(axes, bars)
            axes.set(title=name, xlabel="% of the frozen linears' time")
        _finish(figure, legend=False)
        yield Plot(f"gemm-{mode}", title, figure)


def host(report: dict[str, Any], ok: list[dict]) -> Iterator[Plot]:
    rows = [row for row in ok if row["question"] == "host" and "reference" in row["over"]]
    if rows:
        title = "Host: issuing one layer, as a multiple of the reference layer"
        figure, (axes,) = _panels(1)
        _bars(axes, [(row["path"], f"{row['path']}, r {row['r']}", row["over"]["reference"]) for row in rows])
        axes.axvline(1, color="black", linewidth=0.8)
        _finish(figure, legend=False)
        yield Plot("host", title, figure)


def models(report: dict[str, Any], ok: list[dict]) -> Iterator[Plot]:
    rows = [row for row in ok if row["question"] == "model" and "frozen" in row["over"] and not row["again"]]
    if not rows:
        return
    memory = any("peak_bytes" in row for row in rows)
    for checkpointing in dict.fromkeys(row["checkpointing"] for row in rows):
        group = [row for row in rows if row["checkpointing"] == checkpointing]
        first = group[0]
        with_it = "with" if checkpointing else "without"
        title = f"A training step of {first['model']} ({first['dtype']}, T = {first['T']}), {with_it} checkpointing"
        figure, panels = _panels(1 + memory)
        names = [f"{row['path']}, r {row['r']}" if row["r"] else row["path"] for row in group]
        paths = [row["path"].partition("+")[0] for row in group]
        _bars(panels[0], list(zip(paths, names, (row["over"]["frozen"] for row in group), strict=True)))
        panels[0].set_xlabel("time, as a multiple of the frozen model's")
        panels[0].axvline(1, color="black", linewidth=0.8)
        if memory:
            sizes = (dict.fromkeys(("low", "median", "high"), row["peak_bytes"] / 2**30) for row in group)
            _bars(panels[1], list(zip(paths, names, sizes, strict=True)))
            panels[1].set_xlabel("peak memory, GiB")
        _finish(figure, legend=False)
        yield Plot(f"step-{with_it}-checkpointing", title, figure)


def svd(report: dict[str, Any], ok: list[dict]) -> Iterator[Plot]:
    rows = [row for row in ok if row["question"] == "svd" and "matrices" not in row]
    if not rows:
        return
    title = "Truncated SVD: time against error"
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['N']} x {row['K']} {row['dtype']}, r = {row['r']}", []).append(row)
    if len(groups) > MOST_PANELS:
        title += f" (the first {MOST_PANELS} of {len(groups)})"
    figure, panels = _panels(min(len(groups), MOST_PANELS))
    for axes, (name, group) in zip(panels, groups.items(), strict=False):
        for row in group:
            time = row["over"].get("loraxs-svd")
            if time:
                error = max(row["sigma_error"], 1e-9)
                axes.plot(time["median"], error, "o", color=COLOURS[row["path"]], label=row["path"], markersize=8)
        axes.set(title=name, xscale="log", yscale="log", xlabel="time over truncated_svd")
        axes.set_ylabel("largest relative error of a singular value")
    _finish(figure)
    yield Plot("svd", title, figure)


def _bars(axes: Axes, bars: list[tuple[str, str, dict[str, float]]]) -> None:
    """Horizontal bars from the top: (path, label, spread), the quartiles as whiskers."""
    for i, (path, _, spread) in enumerate(bars):
        axes.barh(i, spread["median"], color=COLOURS[path], height=0.7)
        axes.plot([spread["low"], spread["high"]], [i, i], color="black", linewidth=1)
        axes.annotate(f" {spread['median']:.2f}", (spread["high"], i), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for _, label, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, PANELS)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(7.0, 4.4 * columns), 3.6 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = [axes for line in figure.subplots(lines, columns, squeeze=False) for axes in line]
    for unused in grid[count:]:
        unused.set_visible(False)
    return figure, grid[:count]


def _finish(figure: Figure, legend: bool = True) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if legend:
        figure.legend(handles.values(), handles, frameon=False, loc="outside lower center", ncols=6, fontsize=8)
