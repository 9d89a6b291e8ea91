"""All questions of `loraxs bench`, in the order in which a report shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import BenchError, bank, chain, choice, experiments, gemm, group, host, layer, model, plots, question, svd
from .request import Request, known
from .tables import Table

QUESTIONS = {
    each.QUESTION.name: each.QUESTION
    for each in (layer, chain, gemm, group, host, choice, svd, model, bank, experiments)
}
ASKED = tuple(name for name, each in QUESTIONS.items() if not each.answered)
DEFAULT = ("layer", "host")


def check(questions: Iterable[str] = (), **asked: Any) -> Request:
    """The request for these questions, DEFAULT where there are none; see `question.check`."""
    names = dict.fromkeys(questions) or DEFAULT
    for name in names:
        if name in QUESTIONS and (answer := QUESTIONS[name].answered):
            raise BenchError(f"question: {name!r} is asked no more, {answer}")
    known("question", names, ASKED)
    return question.check([QUESTIONS[name] for name in names], asked)


def check_read(names: Iterable[str], options: Iterable[str]) -> None:
    """Refuse an option of the command line that none of these questions reads, or of DEFAULT where there are none."""
    asked = [QUESTIONS[name] for name in names or DEFAULT if name in QUESTIONS]
    for option in options:
        if asked and all(option in question.unread for question in asked):
            flag = Request.__dataclass_fields__[option].metadata["flag"] or option
            raise BenchError(f"{flag}: none of {', '.join(question.name for question in asked)} reads it, leave it out")


def tables_of(report: dict[str, Any], questions: Iterable[str] = QUESTIONS) -> list[Table]:
    """Every table of a report that it has rows for; those of all questions end with what was not measured."""
    found = [table for name in questions for table in QUESTIONS[name].tables(report, _rows(report, name))]
    return found + (list(_failures(report)) if set(questions) == set(QUESTIONS) else [])


def plots_of(report: dict[str, Any]) -> list[plots.Plot]:
    """Every figure of a report that it has rows for."""
    plots.require()
    return [plot for name, each in QUESTIONS.items() for plot in each.plots(report, _rows(report, name))]


def _rows(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["question"] == name and row["status"] == "ok"]


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
