"""A report as tables: made once, shown as plain text, with rich, as Markdown or as HTML."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from . import bank, tax
from .layer import Row
from .paths import PATHS
from .roofline import DIRECTIONS, STEP
from .settings import QUESTIONS
from .shapes import Shape
from .svd import WHAT
from .timer import NOISY

NO_FIGURE = "-"
OURS = "loraxs-svd"


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
    if sys.stdout is not None and sys.stdout.isatty():
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
    """Every table of a report that it has rows for; those of all questions end with what was built and not measured."""
    ok = [row for row in report["rows"] if row["status"] == "ok"]
    makers: dict[str, tuple[Callable[..., Iterator[Table]], ...]]
    makers = {
        "layer": (taxes, layers),
        "chain": (chains,),
        "gemm": (gemms,),
        "group": (groups,),
        "host": (host,),
        "choice": (choices,),
        "svd": (svd,),
        "model": (models,),
        "bank": (batches, banks),
        "experiments": (experiments, swizzles),
    }
    tables = [table for question in questions for make in makers[question] for table in make(report, ok)]
    return tables + ([*builds(report), *failures(report)] if set(questions) == set(QUESTIONS) else [])


def gpu(report: dict[str, Any]) -> bool:
    return report["machine"]["device"] != "cpu"


def taxes(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """The headline, on a GPU: time added to the frozen linears of a block, in percent, and what it must be at least."""
    points = tax.points(ok)
    for group in dict.fromkeys(at[:-2] for at in points):
        grid = sorted(at for at in points if at[:-2] == group)
        names = [name for name in PATHS if any(name in points[at] for at in grid) and name != "frozen"]
        rows = [[f"{name}: {PATHS[name].what}", *(_tax(report, at, points[at], name) for at in grid)] for name in names]
        run, model, dtype, direction, mode = group
        what = DIRECTIONS[direction] + (f" ({run})" if run else "")
        shapes = ", ".join(f"{shape.count} x {shape}" for shape in points[grid[0]]["frozen"])
        yield Table(
            f"Adapter tax in % of the frozen linears, {model or 'shapes as given'}, {dtype}, {what}, {mode}",
            ["", *(f"T {at.T} r {at.r}" for at in grid)],
            rows,
            (
                f"Linears: {shapes}. Quartiles in brackets; in square ones what bytes and flops alone add at this "
                "run's own ceilings.",
                *_noise(rows, "its quartiles are too far apart"),
            ),
        )


def _tax(report: dict[str, Any], at: tax.Point, paths: tax.Paths, name: str) -> str:
    found, least = tax.measured(paths, name), tax.least(report, at, paths, name)
    if found is None:
        return NO_FIGURE
    spread = f"({100 * found.low:.1f} to {100 * found.high:.1f})"
    text = f"{100 * found.median:.1f}{'~' * found.noisy} {spread}"
    return text if least is None else f"{text} [{100 * least:.1f}]"


def layers(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """On a CPU, ratios to the reference layer, each with its quartiles."""
    rows = [row for row in ok if row["question"] == "layer"]
    if gpu(report) or not rows:
        return
    points: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        points.setdefault(tuple(row[k] for k in ("dtype", "direction", "T", "N", "K", "r")), {})[row["path"]] = row
    other = _baseline(rows)
    names = [name for name in PATHS if any(name in point for point in points.values()) and name != other]
    lines = [
        [f"{dtype} T {T}, {N} x {K}, r {r}", *(_over(point.get(name), other) for name in names)]
        for (dtype, _, T, N, K, r), point in points.items()
    ]
    direction = DIRECTIONS[rows[0]["direction"]]
    notes = (f"{other}: {PATHS[other].what}, is 1; below 1 is faster. Quartiles in brackets.", *_noise(lines))
    yield Table(f"One layer, {direction}, as a multiple of the time of: {other}", ["", *names], lines, notes)


def _baseline(rows: list[Row]) -> str:
    """What ratios are shown over: the reference layer where it was measured, else the floor."""
    return "reference" if any(row["path"] == "reference" for row in rows) else "frozen"


def chains(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """x -> A -> R -> B alone: ratios to the reference's four ops, and on a GPU the bandwidth achieved."""
    rows = [row for row in ok if row["question"] == "chain"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points: dict[tuple, dict[str, Row]] = {}
        for row in (row for row in rows if row["mode"] == mode):
            at = tuple(row[k] for k in ("dtype", "direction", "T", "N", "K", "r"))
            points.setdefault(at, {})[row["path"]] = row
        names = [name for name in PATHS if any(name in point for point in points.values())]
        lines = []
        for (dtype, direction, T, N, K, r), point in points.items():
            cells = [_bandwidth(report, point.get(name)) for name in names] if gpu(report) else []
            cells += [_over(point.get(name), "reference") for name in names if name != "reference"]
            lines.append([f"{dtype} {direction} T {T}, {N} x {K}, r {r}", *cells])
        ratios = [f"{name} over reference" for name in names if name != "reference"]
        head = ["", *(f"{name}, TB/s" for name in names if gpu(report)), *ratios]
        what = "reference: four ops in the dtype of x, is 1; below 1 is faster. Quartiles in brackets."
        speed = "TB/s: x once and y once, over the time; in brackets, of this GPU's copy." if gpu(report) else ""
        yield Table(f"x, A, R, B without W, {mode}", head, lines, tuple(filter(None, (what, speed, *_noise(lines)))))


def choices(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """The primitive by itself on each backend, over the torch backend's time."""
    rows = [row for row in ok if row["question"] == "choice"]
    names = [name for name in dict.fromkeys(row["path"] for row in rows) if name != "torch"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points: dict[tuple, dict[str, Row]] = {}
        for row in (row for row in rows if row["mode"] == mode):
            at = tuple(row[k] for k in ("dtype", "direction", "weight", "T", "r", "N", "K"))
            points.setdefault(at, {})[row["path"]] = row
        lines = [
            [f"{dtype} {direction}{' with W' * weight}, T {T}, r {r}, {N} x {K}"]
            + [_over(point.get(name), "torch") for name in names]
            for (dtype, direction, weight, T, r, N, K), point in points.items()
        ]
        note = "The torch backend is 1; below 1 is faster. Quartiles in brackets."
        yield Table(f"Calls of the primitive, {mode}", ["", *names], lines, (note, *_noise(lines)))


def _bandwidth(report: dict[str, Any], row: Row | None) -> str:
    if row is None:
        return NO_FIGURE
    speed = row["bytes"] / row["seconds"]["median"]
    of = f" ({speed / report['ceilings']['bandwidth']:.0%})" if report["ceilings"] else ""
    return f"{speed / 1e12:.2f}{'~' * row['noisy']}{of}"


def gemms(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """u B^T added to x W^T, u given: on a GPU the speed of each path and the time it adds to the library's x W^T."""
    rows = [row for row in ok if row["question"] == "gemm"]
    others = [name for name in dict.fromkeys(row["path"] for row in rows) if name != "frozen"]
    others += ["cuda"] if any(row["picked"] for row in rows) else []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = _gemm_points([row for row in rows if row["mode"] == mode])
        head, notes, why = ["", *(f"{name} over frozen" for name in others)], ["Quartiles in brackets."], []
        if gpu(report):
            own = {name: (_added,) if name in ("addmm", "torch") else (_flops, _added) for name in others}
            words = {_flops: "TFLOP/s", _added: "% added"}
            head = ["", "frozen, TFLOP/s", *(f"{name}, {words[cell]}" for name in others for cell in own[name])]
            notes = [
                "frozen: the library's x W^T, the floor; in brackets of TFLOP/s, of the floor's. "
                "% added: time added to the floor's, quartiles in brackets."
            ]
            why = ["its quartiles are too far apart"]
        if any("tile" in row for row in rows):
            notes.append(f"cuda-...: tiles of y by size; u in steps of {STEP} columns, all of which are counted.")
        if "cuda" in others:
            notes.append("cuda: the tile that the backend picks; expand first (torch), where it picks none.")
        lines = []
        for where, point in points.items():
            cells = [_over(point.get(name), "frozen") for name in others]
            if gpu(report):
                cells = [cell(point.get(name)) for name in others for cell in own[name]]
                cells = [_flops(point.get("frozen")), *cells]
            lines.append([where, *cells])
        yield Table(f"x W^T + u B^T, u given, {mode}", head, lines, (*notes, *_noise(lines, *why)))


def _gemm_points(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by path, and under "cuda" what that backend would use: of blocks of several shapes, then of each shape."""
    points: dict[str, dict[str, Row]] = {}
    for at, paths in tax.points(rows, "gemm").items():
        paths["cuda"] = picked(paths)
        if len(paths["frozen"]) > 1:
            where = f"{at.dtype} {at.direction} T {at.T} r {at.r}, the linears of {at.model or 'all shapes'}"
            points[where] = {name: _block(paths, name) for name in paths if tax.measured(paths, name)}
    for row in rows:
        where = f"{row['dtype']} {row['direction']} T {row['T']} r {row['r']}, {row['N']} x {row['K']}"
        point = points.setdefault(where, {})
        point[row["path"]] = row
        if row["picked"]:
            point["cuda"] = row
    return points


def picked(paths: tax.Paths) -> dict[Shape, Row]:
    """Of each shape the row of the path that the cuda backend would use."""
    return {shape: row for each in paths.values() for shape, row in each.items() if row["picked"]}


def _block(paths: tax.Paths, name: str) -> Row:
    """The rows of a path as one, each as often as its shape occurs."""
    found, own = tax.measured(paths, name), paths[name]
    floor = sum(shape.count * row["seconds"]["median"] for shape, row in paths["frozen"].items())
    over = {"low": 1 + found.low, "median": 1 + found.median, "high": 1 + found.high}
    return {
        "flops": sum(shape.count * row["flops"] for shape, row in own.items()),
        "floor_flops": sum(shape.count * row["floor_flops"] for shape, row in own.items()),
        "seconds": {"median": floor * over["median"]},
        "over": {"frozen": over},
        "noisy": found.noisy,
    }


def _flops(row: Row | None) -> str:
    """Achieved, and as a share of the floor's, by the ratio of times within rounds."""
    if row is None:
        return NO_FIGURE
    speed = f"{row['flops'] / row['seconds']['median'] / 1e12:.0f}"
    if "frozen" not in row["over"] or row["flops"] == row["floor_flops"]:
        return speed
    return f"{speed} ({row['flops'] / row['floor_flops'] / row['over']['frozen']['median']:.1%})"


def _added(row: Row | None) -> str:
    if row is None or "frozen" not in row["over"]:
        return NO_FIGURE
    found = tax.Tax(*(row["over"]["frozen"][quartile] - 1 for quartile in ("low", "median", "high")))
    return f"{100 * found.median:.1f}{'~' * found.noisy} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def groups(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """Layers that share their input."""
    rows = [row for row in ok if row["question"] == "group" and row["path"] != "frozen"]
    if not rows:
        return
    times = ["ms"] if gpu(report) else []
    lines = []
    for row in rows:
        sizes = " + ".join(map(str, row["N"]))
        line = [f"{row['path']}, {row['dtype']} {row['mode']} T {row['T']}, {sizes} x {row['K']}, r {row['r']}"]
        line += [f"{1e3 * row['seconds']['median']:.3f}"] if times else []
        lines.append([*line, *(_over(row, name) for name in ("frozen", "separate"))])
    head = ["", *times, "over their frozen linears", "over separate layers"]
    title = "Layers that share their input, together or one by one, forward + backward"
    yield Table(title, head, lines, ("Quartiles in brackets.", *_noise(lines)))


def host(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """What a call costs the host."""
    rows = [row for row in ok if row["question"] == "host"]
    if not rows:
        return
    others = [name for name in (_baseline(rows), "peft-lora", "two") if any(name in row["over"] for row in rows)]
    head = ["", "r", *(f"over {name}" for name in others), *(["us a call", "kernels"] if gpu(report) else [])]
    lines = []
    for row in rows:
        line = [f"{row['path']}: {PATHS[row['path']].what}", str(row["r"]), *(_over(row, name) for name in others)]
        if gpu(report):
            kernels = row.get("kernels", {})
            line.append(f"{1e6 * row['seconds']['median']:.0f}{'~' * row['noisy']}")
            line.append(" + ".join(str(kernels[way]) for way in ("forward", "backward")) if kernels else NO_FIGURE)
        lines.append(line)
    first = rows[0]
    what = DIRECTIONS[first["direction"]]
    title = f"Host: issuing {what} of one token on a {first['N']} x {first['K']} layer, {first['dtype']}"
    yield Table(title, head, lines, ("Quartiles in brackets.", *_noise(lines)))


def svd(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """How long the factors take, and how exact they are: of one weight, and of all of a model."""
    for whole in (False, True):
        points: dict[str, dict[str, Row]] = {}
        for row in (row for row in ok if row["question"] == "svd" and whole == ("matrices" in row)):
            where = f"{row['matrices']} linears" if whole else f"{row['N']} x {row['K']}"
            points.setdefault(f"{where}, {row['dtype']}, r {row['r']}", {})[row["path"]] = row
        if not points:
            continue
        names = [name for name in WHAT if any(name in point for point in points.values())]
        rivals = [name for name in names if name != OURS]
        head = ["", *(["ms", "peak MiB", "W read at, TB/s"] if gpu(report) else []), "error", "excess"]
        head += [f"{name}: {what}" for name in rivals for what in ("time", "error", "excess")]
        lines = []
        for where, point in points.items():
            line = [where]
            if gpu(report):
                line += _svd_cost(report, point.get(OURS))
            line += _svd_errors(point.get(OURS))
            for name in rivals:
                line += [_over(point.get(name), OURS), *_svd_errors(point.get(name))]
            lines.append(line)
        notes = [
            "time: over that of truncated_svd, quartiles in brackets; error: the largest relative one of a singular "
            "value; excess: squared reconstruction error beyond the best of that rank, relative"
            + ("; both of the last linear." if whole else ".")
        ]
        if gpu(report):
            notes.append("W read at: all reads of W, by the whole time; in brackets, of this GPU's copy.")
        notes += [f"{name}: {WHAT[name]}." for name in rivals]
        title = f"Factors of every linear of {row['model']}" if whole else "Truncated SVD of one weight"
        yield Table(title, head, lines, (*notes, *_noise(lines)))


def _svd_cost(report: dict[str, Any], row: Row | None) -> list[str]:
    if row is None:
        return [NO_FIGURE] * 3
    milliseconds = f"{1e3 * row['seconds']['median']:.1f}{'~' * row['noisy']}"
    return [milliseconds, f"{row['peak_bytes'] / 2**20:,.0f}", _bandwidth(report, row)]


def _svd_errors(row: Row | None) -> list[str]:
    if row is None:
        return [NO_FIGURE] * 2
    return [f"{row['sigma_error']:.1e}", NO_FIGURE if row["excess"] is None else f"{row['excess']:.1e}"]


def models(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """A training step."""
    rows = [row for row in ok if row["question"] == "model"]
    for checkpointing in (False, True):
        group = [row for row in rows if row["checkpointing"] == checkpointing]
        if not group:
            continue
        first = group[0]
        compiled = any("frozen+compile" in row["over"] for row in group)
        head = ["", "r", "trained", *(["tokens/s", "peak GiB"] if gpu(report) else []), "time over the frozen model"]
        head += ["over it compiled"] if compiled else []
        lines = []
        for row in group:
            name = row["path"] + (", again" if row["again"] else "")
            line = [name, str(row["r"] or NO_FIGURE), f"{row['trained']:,}"]
            if gpu(report):
                line += [f"{row['T'] / row['seconds']['median']:,.0f}", f"{row['peak_bytes'] / 2**30:.1f}"]
            lines.append([*line, _over(row, "frozen"), *([_over(row, "frozen+compile")] if compiled else [])])
        with_it = "with" if checkpointing else "without"
        yield Table(
            f"A training step of {first['model']}, {first['blocks']} blocks, random weights, {first['dtype']}, "
            f"{first['T']} tokens in sequences of {first['sequence']}, {with_it} activation checkpointing",
            head,
            lines,
            (
                "One way after another, by the host's clock. The frozen model: forward, and gradients for its input. "
                "Quartiles in brackets.",
                *_noise(lines),
            ),
        )


def batches(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """Many adapters in one batch, over one adapter."""
    rows = [row for row in ok if row["question"] == "bank" and "records" not in row]
    names = [name for name in bank.PATHS if name != "one" and any(row["path"] == name for row in rows)]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points: dict[tuple, dict[str, Row]] = {}
        for row in (row for row in rows if row["mode"] == mode):
            at = tuple(row[k] for k in ("dtype", "direction", "T", "N", "K", "r"))
            points.setdefault(at, {})[row["path"]] = row
        lines = [
            [f"{dtype} {DIRECTIONS[direction]}, T {T}, {N} x {K}, r {r}", *(_over(point.get(n), "one") for n in names)]
            for (dtype, direction, T, N, K, r), point in sorted(points.items(), key=lambda item: item[0][1:])
        ]
        notes = [f"{name}: {bank.PATHS[name][2]}." for name in ("one", *names)]
        notes += ["one is 1; below 1 is faster. Quartiles in brackets.", *_noise(lines)]
        yield Table(f"One layer, T rows of different adapters, {mode}", ["", *names], lines, tuple(notes))


def banks(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """What depends on how many records a bank has."""
    rows = [row for row in ok if row["question"] == "bank" and "records" in row]
    lines = []
    for row in rows:
        size = f" of {row['bytes'] / 1024:g} KiB" if "bytes" in row else ""
        which = row["dtype"] if row["path"] in ("warm", "cold") else ""
        milliseconds = NO_FIGURE
        if "seconds" in row:
            low, median, high = (1e3 * row["seconds"][quartile] for quartile in ("low", "median", "high"))
            milliseconds = f"{median:.3f} ({low:.3f} to {high:.3f})"
        what = " ".join(filter(None, (row["path"], which))) + f", {row['records']:,} records{size}"
        lines.append([what, milliseconds, *(_over(row, other) for other in ("fewest", "warm"))])
    if lines:
        notes = (
            f"warm, cold: select {bank.SAMPLES} names and run one layer, all of them in the slots or none. read: one "
            f"record, checked. adapter: select one of {bank.MODULES} modules that is in no slot. All from the page "
            "cache.",
            "Quartiles in brackets.",
            *_noise(lines),
        )
        yield Table("A bank, by its records", ["", "ms", "over the fewest records", "over warm"], lines, notes)


def experiments(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """What decides the design of the kernels: a line for each prediction."""
    lines = [[f"{what}: {where}", *cells] for what, where, *cells in predictions(ok)]
    if lines:
        whys = dict.fromkeys(row["not_read"] for row in ok if "not_read" in row)
        notes = ("Quartiles in brackets.", *(f"Not read: {why}." for why in whys), *_noise(lines))
        yield Table("What was predicted", ["", "predicted", "measured", "measured / predicted"], lines, notes)


def predictions(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, str, str]]:
    """(experiment, what of it, predicted, measured, measured / predicted), in the order they were made."""
    for row in rows:
        if row["question"] != "experiments" or row["status"] != "ok" or not {"predicted", "not_read"} & set(row):
            continue
        sizes = [f"{row['N']}x{row['K']}", *(f"{key} {row[key]}" for key in ("T", "r") if key in row)]
        where = " ".join([*sizes, *([row["direction"]] if "direction" in row else []), row["path"]])
        if "not_read" in row:
            yield row["experiment"], where, NO_FIGURE, "not read", NO_FIGURE
            continue
        scale, unit = {"s": (1e6, " us"), "x": (1, ""), "B/s": (1e-9, " GB/s"), "B": (1e-9, " GB")}[row["unit"]]
        expected = [_figure(scale * row["predicted"][end]) for end in ("low", "high")]
        low, found, high = (_figure(scale * row["measured"][quartile]) for quartile in ("low", "median", "high"))
        yield (
            *(row["experiment"], where, " to ".join(dict.fromkeys(expected)) + unit),
            f"{found}{'~' * row.get('noisy', False)} ({low} to {high}){unit}",
            f"{row['ratio']['median']:.2f}",
        )


def in_short(rows: Iterable[Row]) -> list[str]:
    """A line for each experiment: its first prediction / what was measured / their ratio; the range of all ratios."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for name, *cells in predictions(rows):
        found.setdefault(name, []).append(tuple(cells))
    lines = []
    for name, each in found.items():
        ratios = sorted((float(ratio) for *_, ratio in each if ratio != NO_FIGURE))
        rest = f"; all {len(ratios)}: {ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else ""
        where, *figures = each[0]
        lines.append(f"{name}: {where}: {' / '.join(figures)}{rest}")
    return lines


def _figure(value: float) -> str:
    """To three digits or hundredths, what is more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def swizzles(report: dict[str, Any], ok: list[Row]) -> Iterator[Table]:
    """The GEMM with a tail, by the order of its tiles, over the library's x W^T."""
    points: dict[str, dict[str, Row]] = {}
    for row in ok:
        if row["question"] == "experiments" and "wave_bytes" in row:
            tile, cut = row["path"].split(" ", 1)
            where = f"{row['N']}x{row['K']} T {row['T']} r {row['r']} {row['direction']}, {tile}"
            points.setdefault(where, {})[cut] = row
    if points:
        names = sorted({cut for point in points.values() for cut in point}, key=lambda cut: (cut[10:], cut))
        lines = [[where, *(_wave(report, point.get(name)) for name in names)] for where, point in points.items()]
        notes = (
            "Time over x W^T by the library; in brackets TB/s that each wave of tiles would ask of memory, at the time "
            "measured, if nothing stayed in the cache from the one before.",
            *_noise(lines),
        )
        yield Table("x W^T + u B^T by the order of tiles", ["", *names], lines, notes)


def _wave(report: dict[str, Any], row: Row | None) -> str:
    if row is None or "frozen" not in row["over"]:
        return NO_FIGURE
    found = f"{row['over']['frozen']['median']:.3f}{'~' * row['noisy']}"
    return (
        f"{found} ({row['waves'] * row['wave_bytes'] / row['seconds']['median'] / 1e12:.1f})" if gpu(report) else found
    )


def builds(report: dict[str, Any]) -> Iterator[Table]:
    """How long the CUDA core took to build, where it was built there."""
    build = report.get("build", {})
    if build.get("built") and "seconds" in build:
        for_what = ", ".join(f"sm_{name}" for name in build["architectures"])
        cores = f"{build['cores']} cores" + (f", MAX_JOBS {build['MAX_JOBS']}" if build["MAX_JOBS"] else "")
        line = [f"{for_what}, on {cores}", f"{build['seconds']:.0f}", build["nvcc"], build["cutlass"] or NO_FIGURE]
        notes = () if build["whole"] else ("Not from nothing: an earlier build had left some of it.",)
        yield Table("Building the CUDA core", ["", "s", "nvcc", "CUTLASS"], [line], notes)


def failures(report: dict[str, Any]) -> Iterator[Table]:
    """What was not measured, and why."""
    lines = [[name, "everywhere", why] for name, why in report["settings"]["left_out"].items()]
    if why := report.get("build", {}).get("why"):
        lines.append(["the CUDA core", "its build", why])
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


def _noise(lines: list[list[str]], why: str = f"quartiles over {NOISY:.0%} of the median apart") -> tuple[str, ...]:
    return (f"~ too noisy to be trusted: {why}.",) if any("~" in cell for line in lines for cell in line[1:]) else ()
