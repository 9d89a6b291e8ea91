"""Were the predictions right on which the kernels' design rests?  It is answered, in bench/results/NOTES.md.

What is left shows the rows of the reports.  `swizzle` timed the GEMM with a tail in each order of its tiles, `beside`
on 128 multiprocessors with and without a shrink on the others; others are of earlier commits.  The last commit that
measures any of it is d5bc8bf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import tables
from .compare import Row
from .question import Question
from .tables import Table

UNITS = {"s": (1e6, " us"), "x": (1, ""), "B/s": (1e-9, " GB/s")}


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """A line for each prediction; then the GEMM with a tail, by the order of its tiles, over the library's x W^T."""
    if lines := [_prediction(row) for row in rows if "predicted" in row]:
        head = ["", "predicted", "measured", "measured / predicted"]
        yield Table("What was predicted", head, lines, [tables.QUARTILES])
    points: dict[str, dict[str, Row]] = {}
    for row in (row for row in rows if "wave_bytes" in row):
        tile, cut = row["path"].split(" ", 1)
        where = f"{row['N']}x{row['K']} T {row['T']} r {row['r']} {row['direction']}, {tile}"
        points.setdefault(where, {})[cut] = row
    if points:
        names = sorted({cut for point in points.values() for cut in point}, key=lambda cut: (cut[10:], cut))
        note = (
            "Each figure is a time divided by that of the library's x W^T. In brackets: the TB/s that the tiles would "
            "have read from memory if no wave of them had found in the cache what the one before read."
        )
        columns = [(name, name, _wave) for name in names]
        yield tables.compared("x W^T + u B^T by the order of tiles", points, columns, note)


def _prediction(row: Row) -> list[str]:
    """What it is of, predicted, measured, and measured / predicted."""
    sizes = [f"{row['N']}x{row['K']}", *(f"{key} {row[key]}" for key in ("T", "r") if key in row)]
    where = " ".join([*sizes, *([row["direction"]] if "direction" in row else []), row["path"]])
    scale, unit = UNITS[row["unit"]]
    expected = dict.fromkeys(_figure(scale * row["predicted"][end]) for end in ("low", "high"))
    low, found, high = (_figure(scale * row["measured"][quartile]) for quartile in ("low", "median", "high"))
    measured = tables.figure(found, row.get("noisy", False), f" ({low} to {high}){unit}")
    return [f"{row['experiment']}: {where}", " to ".join(expected) + unit, measured, f"{row['ratio']['median']:.2f}"]


def _figure(value: float) -> str:
    """The value with no digit after its point from 100 on, with one from 10 on, else with three."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _wave(row: Row) -> str:
    if "frozen" not in row["over"]:
        return tables.NO_FIGURE
    asked = f" ({row['waves'] * row['wave_bytes'] / row['seconds']['median'] / 1e12:.1f})"
    return tables.figure(f"{row['over']['frozen']['median']:.3f}", row["noisy"], asked)


QUESTION = Question(
    name="experiments",
    tables=show,
    answered="the predictions and what was measured of them are in the repository, in bench/results/NOTES.md",
)
