"""All questions of `loraxs bench`, in the order in which a report shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import bank, chain, choice, experiments, gemm, group, host, layer, model, plots, question, svd, tables
from .request import Request, known
from .tables import Table

QUESTIONS = {
    each.QUESTION.name: each.QUESTION
    for each in (layer, chain, gemm, group, host, choice, svd, model, bank, experiments)
}
DEFAULT = ("layer", "host")


def check(questions: Iterable[str] = (), **asked: Any) -> Request:
    """The request for these questions, DEFAULT where there are none; see `question.check`."""
    names = list(questions) or DEFAULT
    known("question", names, QUESTIONS)
    return question.check([QUESTIONS[name] for name in names], asked)


def tables_of(report: dict[str, Any], questions: Iterable[str] = QUESTIONS) -> list[Table]:
    """Every table of a report that it has rows for; those of all questions end with what was built and not measured."""
    found = [table for name in questions for table in QUESTIONS[name].tables(report, _rows(report, name))]
    return found + ([*_builds(report), *_failures(report)] if set(questions) == set(QUESTIONS) else [])


def plots_of(report: dict[str, Any]) -> list[plots.Plot]:
    """Every figure of a report that it has rows for."""
    plots.require()
    return [plot for name, each in QUESTIONS.items() for plot in each.plots(report, _rows(report, name))]


def _rows(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["question"] == name and row["status"] == "ok"]


def _builds(report: dict[str, Any]) -> Iterable[Table]:
    """How long the CUDA core took to build, where it was built there."""
    build = report.get("build", {})
    if build.get("built") and "seconds" in build:
        for_what = ", ".join(f"sm_{name}" for name in build["architectures"])
        cores = f"{build['cores']} cores" + (f", MAX_JOBS {build['MAX_JOBS']}" if build["MAX_JOBS"] else "")
        cutlass = build["cutlass"] or tables.NO_FIGURE
        line = [f"{for_what}, on {cores}", f"{build['seconds']:.0f}", build["nvcc"], cutlass]
        notes = () if build["whole"] else ("Not from nothing: an earlier build had left some of it.",)
        yield Table("Building the CUDA core", ["", "s", "nvcc", "CUTLASS"], [line], notes)


def _failures(report: dict[str, Any]) -> Iterable[Table]:
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
