"""Figures of a report.  matplotlib is imported when a plot is wanted, and nowhere else in this package."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # panels side by side
MOST_PANELS = 12

Bar = tuple[str, str, dict[str, float]]  # colour, label, spread


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


def panels(
    name: str, title: str, groups: dict[str, Any], draw: Callable[[Axes, Any], None], legend: bool = True
) -> Plot:
    """A panel for each group, the first MOST_PANELS of them: draw(axes, group)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(len(groups), MOST_PANELS)
    if len(groups) > MOST_PANELS:
        title += f" (the first {MOST_PANELS} of {len(groups)})"
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(7.0, 4.4 * columns), 3.6 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = [axes for line in figure.subplots(lines, columns, squeeze=False) for axes in line]
    for unused in grid[count:]:
        unused.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, (label, group) in zip(grid, groups.items(), strict=False):
        draw(axes, group)
        axes.set_title(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    if legend:
        figure.legend(handles.values(), handles, frameon=False, loc="outside lower center", ncols=6, fontsize=8)
    return Plot(name, title, figure)


def bars(
    name: str, title: str, groups: dict[str, list[Bar]], lines: dict[str, float] | None = None, xlabel: str = ""
) -> Plot:
    """Horizontal bars from the top, the quartiles as whiskers; and for a group a line there."""

    def draw(axes: Axes, group: str) -> None:
        for i, (colour, _, spread) in enumerate(groups[group]):
            axes.barh(i, spread["median"], color=colour, height=0.7)
            axes.plot([spread["low"], spread["high"]], [i, i], color="black", linewidth=1)
            axes.annotate(f" {spread['median']:.2f}", (spread["high"], i), va="center", fontsize=8)
        axes.set_yticks(range(len(groups[group])), [label for _, label, _ in groups[group]])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(xlabel)
        if group in (lines or {}):
            axes.axvline(lines[group], color="black", linewidth=0.8)

    return panels(name, title, {group: group for group in groups}, draw, legend=False)
