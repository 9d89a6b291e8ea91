"""A report as one self-contained HTML page: tables, plots as embedded SVG, and where and how it was measured."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from ..files import write_atomically
from . import BenchError, plots, tables
from .questions import QUESTIONS, plots_of, tables_of

TITLE = b"<title>loraxs bench</title>"
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.note { color: #555; font-size: .85rem; margin: .4rem 0; }
"""


def check(path: Path) -> None:
    """Raise BenchError, before anything is measured, where the page could not be made or written."""
    plots.require()
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise BenchError(f"html: got {path}, must be a file in a folder that is there")
    if path.exists() and (there := path.read_bytes()) and TITLE not in there:
        raise BenchError(f"html: {path} is there and is no page of `loraxs bench`; name another file")


def write(report: dict[str, Any], path: Path) -> None:
    write_atomically(path, page(report).encode())


def page(report: dict[str, Any]) -> str:
    """The whole page; it loads nothing from anywhere."""
    figures = "\n".join(
        f'<h2>{html.escape(plot.title)}</h2>\n<img alt="{html.escape(plot.title)}" id="{plot.name}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(plot.svg()).decode()}">'
        for plot in plots_of(report)
    )
    body = "\n".join(table.html() for table in tables_of(report))
    facts = "\n".join(f"<p class=note>{html.escape(line)}</p>" for line in provenance(report))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{TITLE.decode()}<style>{STYLE}</style></head><body>
<h1>What LoRA-XS costs on {html.escape(machine(report))}</h1>
{facts}
{figures}
{body}
</body></html>
"""


def machine(report: dict[str, Any]) -> str:
    """The GPU, or the processor with its cores and, if that is another number, torch's threads."""
    where = report["machine"]
    if tables.gpu(report):
        return where["device"]
    cores, threads = where["cores"], where["threads"]
    return f"{where['cpu']}, {cores} cores" + (f", {threads} thread{'s' * (threads > 1)}" if threads != cores else "")


def provenance(report: dict[str, Any]) -> list[str]:
    """When, with what, from which source, and how."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    dirty = " with uncommitted changes" if report["dirty"] else ""
    lines = [f"{report['date']}, commit {report['commit']}{dirty}; {versions}."]
    if not report["complete"]:
        lines.append("The run was stopped before its end; this is what it had measured.")
    questions = {row["question"] for row in report["rows"]}
    clock = "medians of CUDA-event times" if tables.gpu(report) else "times on a shared CPU mean little: ratios alone"
    cold = ", operands rotated past the L2 cache" if tables.gpu(report) else ""
    if questions & {"layer", "gemm", "host"}:
        lines.append(
            f"Layers: random data, outputs checked against an fp64 oracle first{cold}, warm-up apart, all paths in "
            f"turn within each round; {clock}. The host's question is timed by the host's clock, with the device idle."
        )
    lines += [each.how for name, each in QUESTIONS.items() if each.how and name in questions]
    return lines
