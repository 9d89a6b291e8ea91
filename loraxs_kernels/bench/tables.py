"""A report as tables: made once, shown as plain text, with rich, as Markdown or as HTML."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import roofline
from .paths import PATHS
from .settings import QUESTIONS
from .shapes import Shape
from .svd import METHODS
from .timer import NOISY

Row = dict[str, Any]
NO_FIGURE = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned to the left, the others to the right."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def plain(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
            for cells in (self.head, *self.rows)
        ]
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:], *self.notes])

    def markdown(self) -> str:
        bars = ["| " + " | ".join(cells) + " |" for cells in (self.head, *self.rows)]
        rule = "|---" + "|--:" * (len(self.head) - 1) + "|"
        return "\n".join([f"**{self.title}**", "", bars[0], rule, *bars[1:], "", *self.notes]).rstrip()

    def html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(line(cells, "td") for cells in self.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.notes)
        head = line(self.head, "th")
        return (
            f"<h2>{html.escape(self.title)}</h2>\n"
            f"<div class=wide><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>{notes}"
        )


def show(tables: Iterable[Table]) -> None:
    """Print: with rich where it is installed and a person is looking, else as plain text."""
    pretty = None
    if sys.stdout.isatty():
        try:
            from rich import console, table

            pretty = console.Console()
        except ImportError:
            pass
    for each in tables:
        if pretty is None:
            print(f"\n{each.plain()}", flush=True)
            continue
        grid = table.Table(
            title=each.title, title_justify="left", caption="\n".join(each.notes), caption_justify="left"
        )
        for i, name in enumerate(each.head):
            grid.add_column(name, justify="right" if i else "left")
        for cells in each.rows:
            grid.add_row(*cells)
        pretty.print(grid)


def of(report: dict[str, Any], questions: Iterable[str] = QUESTIONS) -> list[Table]:
    """Every table of a report that it has rows for; those of all questions end with what was not measured."""
    ok = [row for row in report["rows"] if row["status"] == "ok"]
    makers: dict[str, tuple[Callable[..., Iterator[Table]], ...]]
    makers = {"layer": (taxes, layers), "host": (host,), "svd": (svd,), "model": (models,)}
    tables = [table for question in questions for make in makers[question] for table in make(report, ok)]
    return tables + (list(failures(report)) if set(questions) == set(QUESTIONS) else [])


def gpu(report: dict[str, Any]) -> bool:
    return report["machine"]["device"] != "cpu"


class Point(NamedTuple):
    """A point of the grid, but for the shape."""

    run: str  # of bench/gpu_suite.py; "" where there is but one
    model: str
    dtype: str
    direction: str
    mode: str
    T: int
    r: int


def mix(ok: Iterable[Row]) -> dict[Point, dict[str, dict[Shape, Row]]]:
    """Layer rows with absolute times, by point of the grid, then path, then shape; separate runs stay apart."""
    found: dict[Point, dict[str, dict[Shape, Row]]] = {}
    for row in ok:
        if row["question"] == "layer" and "seconds" in row:
            key = Point(row.get("run", ""), *(row[name] for name in Point._fields[1:]))
            shape = Shape(row["N"], row["K"], row["count"], row["layers"])
            found.setdefault(key, {}).setdefault(row["path"], {})[shape] = row
    return found


def measured_tax(paths: dict[str, dict[Shape, Row]], path: str) -> float | None:
    """The tax over the shapes of one point of the grid; None where a shape or the floor is missing."""
    shapes = paths.get("frozen", {})
    if not shapes or set(paths.get(path, {})) != set(shapes):
        return None
    return roofline.tax(lambda name, shape: paths[name][shape]["seconds"]["median"], path, shapes)


def floor_tax(report: dict[str, Any], shapes: Iterable[Shape], path: str, at: Point) -> float | None:
    """The same from counted bytes and flops and this run's own ceilings; bf16 and fp16 alone are counted."""
    if not report["ceilings"] or at.dtype == "fp32" or path not in roofline.PATHS:
        return None
    ceilings = roofline.Ceilings(**report["ceilings"])
    return roofline.tax(
        lambda name, shape: roofline.floor(ceilings, name, at.T, shape.N, shape.K, at.r, at.direction), path, shapes
    )


def taxes(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """The headline, on a GPU: time added to the frozen linears of a block, in percent, and its floor."""
    points = mix(ok)
    for group in dict.fromkeys(key[:-2] for key in points):
        keys = sorted(key for key in points if key[:-2] == group)
        names = [name for name in PATHS if any(name in points[key] for key in keys) and name != "frozen"]
        rows = []
        for name in names:
            cells = []
            for key in keys:
                tax, least = measured_tax(points[key], name), floor_tax(report, points[key]["frozen"], name, key)
                noisy = any(row["noisy"] for row in points[key].get(name, {}).values())
                cell = NO_FIGURE if tax is None else f"{100 * tax:.1f}" + "~" * noisy
                cells.append(cell + (f" ({100 * least:.1f})" if tax is not None and least is not None else ""))
            rows.append([f"{name}: {PATHS[name].what}", *cells])
        run, model, dtype, direction, mode = group
        what = direction.replace("both", "forward + backward") + (f" ({run})" if run else "")
        shapes = ", ".join(f"{shape.count} x {shape}" for shape in points[keys[0]]["frozen"])
        yield Table(
            f"Adapter tax in % of the frozen linears, {model or 'shapes as given'}, {dtype}, {what}, {mode}",
            ["", *(f"T {key.T} r {key.r}" for key in keys)],
            rows,
            (
                f"Linears: {shapes}. In brackets: what bytes and flops alone allow at this run's ceilings.",
                *_noise(rows),
            ),
        )


def layers(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """On a CPU, ratios to the reference layer, each with its quartiles."""
    rows = [row for row in ok if row["question"] == "layer"]
    if gpu(report) or not rows:
        return
    points: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        points.setdefault(tuple(row[k] for k in ("dtype", "direction", "T", "N", "K", "r")), {})[row["path"]] = row
    names = [name for name in PATHS if any(name in point for point in points.values()) and name != "reference"]
    lines = [
        [f"{dtype} T {T}, {N} x {K}, r {r}", *(_over(point.get(name), "reference") for name in names)]
        for (dtype, _, T, N, K, r), point in points.items()
    ]
    direction = rows[0]["direction"].replace("both", "forward + backward")
    notes = ("The reference layer, four ops in the weight's dtype, is 1; below 1 is faster. Quartiles in brackets.",)
    yield Table(f"One layer, {direction}, as a multiple of the reference layer's time", ["", *names], lines, notes)


def host(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """What a call costs the host."""
    rows = [row for row in ok if row["question"] == "host"]
    if not rows:
        return
    head = ["", "r", "over reference", "over PEFT LoRA", *(["us a call", "kernels"] if gpu(report) else [])]
    lines = []
    for row in rows:
        line = [f"{row['path']}: {PATHS[row['path']].what}", str(row["r"]), _over(row, "reference")]
        line.append(_over(row, "peft-lora"))
        if gpu(report):
            kernels = row.get("kernels", {})
            line.append(f"{1e6 * row['seconds']['median']:.0f}{'~' * row['noisy']}")
            line.append(" + ".join(str(kernels[way]) for way in ("forward", "backward")) if kernels else NO_FIGURE)
        lines.append(line)
    first = rows[0]
    title = f"Host: issuing forward + backward of one token on a {first['N']} x {first['K']} layer, {first['dtype']}"
    yield Table(title, head, lines, ("Quartiles in brackets.", *_noise(lines)))


def svd(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """How long the factors take, and how exact they are."""
    rows = [row for row in ok if row["question"] == "svd" and "matrices" not in row]
    if rows:
        times = ["ms"] if gpu(report) else []
        head = ["", *times, "time over truncated_svd", "largest error of a singular value", "excess reconstruction"]
        lines = []
        for row in rows:
            line = [f"{row['N']} x {row['K']} {row['dtype']} r {row['r']}: {METHODS[row['path']].what}"]
            line += [f"{1e3 * row['seconds']['median']:.1f}{'~' * row['noisy']}"] if times else []
            excess = NO_FIGURE if row["excess"] is None else f"{row['excess']:.1e}"
            lines.append([*line, _over(row, "loraxs-svd"), f"{row['sigma_error']:.1e}", excess])
        notes = ("Excess: squared reconstruction error beyond the best of that rank, relative.", *_noise(lines))
        yield Table("Truncated SVD of one weight", head, lines, notes)
    for row in ok:
        if row["question"] == "svd" and "matrices" in row and "seconds" in row:
            cells = [f"{row['matrices']}, r {row['r']}, {row['dtype']}", f"{row['seconds']['median']:.2f}"]
            cells.append(f"{row['peak_bytes'] / 2**30:.2f}")
            yield Table(f"Factors of every linear of {row['model']}", ["linears", "s", "peak GiB"], [cells])


def models(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """A training step."""
    rows = [row for row in ok if row["question"] == "model"]
    for checkpointing in (False, True):
        group = [row for row in rows if row["checkpointing"] == checkpointing]
        if not group:
            continue
        first = group[0]
        head = ["", "r", "trained", *(["tokens/s", "peak GiB"] if gpu(report) else []), "time over the frozen model"]
        lines = []
        for row in group:
            line = [row["path"], str(row["r"] or NO_FIGURE), f"{row['trained']:,}"]
            if gpu(report):
                line += [f"{row['T'] / row['seconds']['median']:,.0f}", f"{row['peak_bytes'] / 2**30:.1f}"]
            lines.append([*line, _over(row, "frozen")])
        with_it = "with" if checkpointing else "without"
        yield Table(
            f"A training step of {first['model']}, {first['blocks']} blocks, random weights, {first['dtype']}, "
            f"{first['T']} tokens in sequences of {first['sequence']}, {with_it} activation checkpointing",
            head,
            lines,
            ("The frozen model, forward and gradients for its input, is timed first and again last.", *_noise(lines)),
        )


def failures(report: dict[str, Any]) -> Iterator[Table]:
    """What was not measured, and why."""
    lines = [[name, "everywhere", why] for name, why in report["settings"]["left_out"].items()]
    for row in report["rows"]:
        if row["status"] == "failed":
            where = [f"{key} {row[key]}" for key in ("N", "K", "T", "r", "mode") if key in row]
            lines.append([row["path"], f"{row['question']} {' '.join(where)}", row["reason"]])
    if lines:
        yield Table("Not measured", ["path", "where", "why"], lines)


def _over(row: Row | None, other: str) -> str:
    """A ratio with its quartiles."""
    if row is None or other not in row["over"]:
        return NO_FIGURE
    ratio = row["over"][other]
    if ratio["low"] == ratio["high"] == 1:
        return "1"
    return f"{ratio['median']:.2f}{'~' * row['noisy']} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _noise(lines: list[list[str]]) -> tuple[str, ...]:
    if not any("~" in cell for line in lines for cell in line[1:]):
        return ()
    return (f"~ too noisy to be trusted: quartiles more than {NOISY:.0%} of the median apart.",)
