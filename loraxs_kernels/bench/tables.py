"""Tables of a report: made once by the questions, shown as plain text, Markdown or HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .compare import Row
from .timer import NOISY, Spread, noisy

NO_FIGURE = "-"
QUARTILES = "Quartiles are in brackets."
OF_COPY = "in brackets as a share of what this GPU reaches when it copies"


class Noisy(str):
    """A cell with a figure that is too noisy to be trusted."""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned to the left, the others to the right."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: Sequence[str] = ()
    noise: str = f"more than {NOISY:.0%} of the median"  # how far apart the quartiles of a figure with ~ are

    @property
    def below(self) -> list[str]:
        """The notes, and what explains a "~", where there is one."""
        noisy = any(isinstance(cell, Noisy) for line in self.rows for cell in line)
        explained = f"~ marks a figure too noisy to be trusted: its quartiles are {self.noise} apart."
        return [*self.notes, *([explained] if noisy else [])]

    def plain(self) -> str:
        return "\n".join([self.title, aligned([self.head, *self.rows]), *self.below])

    def markdown(self) -> str:
        bars = ["| " + " | ".join(cells) + " |" for cells in (self.head, *self.rows)]
        rule = "|---" + "|--:" * (len(self.head) - 1) + "|"
        return "\n".join([f"**{self.title}**", "", bars[0], rule, *bars[1:], "", *self.below]).rstrip()

    def html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(line(cells, "td") for cells in self.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.below)
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<div class=wide><table><thead>{line(self.head, 'th')}</thead>"
            f"<tbody>\n{body}\n</tbody></table></div>{notes}"
        )


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text: the first column to the left, the others to the right, a rule below the first line."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def show(tables: Iterable[Table]) -> None:
    for each in tables:
        print(f"\n{each.plain()}", flush=True)


# --- what the questions make them of


def gpu(report: dict[str, Any]) -> bool:
    return report["machine"]["device"] != "cpu"


def labelled(rows: Iterable[Row], text: str) -> dict[str, dict[str, Row]]:
    """{what `text` says of rows: {path: row}}, such as "T {T}, r {r}"."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(text.format(**row), {})[row["path"]] = row
    return found


def compared(
    title: str,
    points: Mapping[str, Mapping[str, Row]],
    columns: Sequence[tuple[str, str, Callable[[Row], str]]],
    *notes: str,
    **more: str,
) -> Table:
    """A line for each point, with a cell made of the row of a path in each column: (its head, the path, the cell)."""
    lines = [
        [where, *(cell(point[path]) if path in point else NO_FIGURE for _, path, cell in columns)]
        for where, point in points.items()
    ]
    return Table(title, ["", *(head for head, *_ in columns)], lines, notes, **more)


def ratios_to(what: str) -> str:
    """The note below ratios of times."""
    return f"Each figure is a time divided by that of {what}: below 1 is faster. {QUARTILES}"


def present(names: Iterable[str], rows: Iterable[Row]) -> list[str]:
    """The names of paths that have rows, in their order."""
    found = {row["path"] for row in rows}
    return [name for name in names if name in found]


def grouped(rows: Iterable[Row], key: str = "mode") -> dict[Any, list[Row]]:
    """{value of this key: the rows that have it}."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def baseline(rows: list[Row]) -> str:
    """What ratios are shown over: the reference layer where it was measured, else the floor."""
    return "reference" if any(row["path"] == "reference" for row in rows) else "frozen"


def figure(text: str, noisy: bool, rest: str = "") -> str:
    return Noisy(f"{text}~{rest}") if noisy else f"{text}{rest}"


def quartiles(found: Spread, digits: int, noisy: bool = False, scale: float = 1.0, rest: str = "") -> str:
    """A spread: its median, and in brackets its quartiles."""
    low, median, high = (f"{scale * found[each]:.{digits}f}" for each in ("low", "median", "high"))
    return figure(median, noisy, f" ({low} to {high}){rest}")


def over(row: Row | None, other: str) -> str:
    """A ratio with its quartiles."""
    if row is None or other not in row["over"]:
        return NO_FIGURE
    ratio = row["over"][other]
    return "1" if ratio["low"] == ratio["high"] == 1 else quartiles(ratio, 2, noisy(ratio))


def bandwidth(row: Row, report: dict[str, Any]) -> str:
    """TB/s of a row's bytes, and the share of this GPU's copy."""
    speed = row["bytes"] / row["seconds"]["median"]
    of = f" ({speed / report['ceilings']['bandwidth']:.0%})" if report["ceilings"] else ""
    return figure(f"{speed / 1e12:.2f}", row["noisy"], of)
