"""The commands `loraxs bench` and `loraxs roofline`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch

from . import BenchError, page, questions, request, roofline, tables, timer
from .compare import release
from .question import Question
from .questions import ASKED, DEFAULT, QUESTIONS
from .report import Report, load
from .request import Request
from .shapes import MODELS


def add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "questions",
        nargs="*",
        metavar="question",
        help=f"some of {', '.join(ASKED)}; default: {' and '.join(DEFAULT)}",
    )
    request.add_options(parser)
    names = dict.fromkeys(name for question in QUESTIONS.values() for name in question.paths)
    parser.epilog = f"paths: {', '.join(names)}"
    add("--out", type=Path, help="a new .json file, or a folder: <folder>/<device>/<date>-<commit>.json")
    add("--html", type=Path, metavar="FILE", help="also write one self-contained page with plots (needs matplotlib)")
    add("--commit", help="what to note as the source, if it is not a git checkout")


def bench(arguments: argparse.Namespace) -> int:
    """Run `loraxs bench`; returns 0, 1 where some path was wrong or failed, or 130 where the run was stopped."""
    if arguments.html is not None:
        page.check(arguments.html)
    given = {key: value for key, value in vars(arguments).items() if key in Request.__dataclass_fields__}
    questions.check_read(given["questions"], given)
    report = run(questions.check(**given), arguments.out, arguments.commit)
    if arguments.html is not None:
        page.write(report.data, arguments.html)
        print(f"{arguments.html} has the plots")
    if not report.data["complete"]:
        return 130
    return 1 if any(row["status"] == "failed" for row in report.data["rows"]) else 0


def run(asked: Request, out: Path | None, commit: str | None = None) -> Report:
    """Measure everything that was asked for, telling of each point, and print the tables.

    Every row is in the report's file as soon as it is known: a run that is stopped (Ctrl-C, kill) loses nothing.
    """
    report = Report(asked, out, commit)
    print(f"loraxs bench: {', '.join(asked.questions)} on {page.machine(report.data)}; writing {report.path}")
    if not asked.gpu:
        print("  no GPU in use: a small grid, and ratios alone, since times on a shared CPU mean little")
    for name, why in asked.left_out.items():
        print(f"  without {name}: {why}")
    sys.stdout.flush()
    try:
        with timer.on(asked.device), timer.short_collections():
            if asked.gpu:
                _measure_ceilings(report, asked)
            for name in asked.questions:
                _answer(QUESTIONS[name], asked, report)
        report.data["complete"] = True
        report.save()
    except KeyboardInterrupt:
        print("\nstopped; what was measured until now:", file=sys.stderr)
    finally:  # also where the disk is full
        tables.show(questions.tables_of(report.data))
    print(f"\n{len(report.data['rows'])} rows in {report.path}, {report.data['seconds']:.0f} s")
    return report


def _answer(question: Question, asked: Request, report: Report) -> None:
    """Every row of a question into the report, with a line for each point, and for what failed."""
    points = question.plan(asked)
    for i, point in enumerate(points, 1):
        print(f"  {question.name} {i}/{len(points)}: {point}", flush=True)
        for row in question.at(asked, point):
            if row["status"] == "failed":
                print(f"  {row['path']} at {point}: {row['reason']}", flush=True)
            report.add(row)


def _measure_ceilings(report: Report, asked: Request) -> None:
    try:
        report.data["ceilings"] = dataclasses.asdict(timer.ceilings(asked.device))
        report.save()
    except torch.OutOfMemoryError:
        print("  without floors: there is no memory for the copy and the GEMM that give this machine's ceilings")
    release()


def add_roofline(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", help=f"ceilings by the datasheet: {', '.join(roofline.DATASHEETS)}; default: this GPU's, measured")
    add("--ceilings", type=Path, metavar="FILE", help="ceilings measured in a run: the .json that loraxs bench wrote")
    add("--model", help=f"{', '.join(MODELS)}; default mistral-7b")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--shape", **several, metavar="NxK", help="shapes instead of a model's, such as 4096x14336")
    add("--tokens", **several, type=int, metavar="T", help="rows of x; default: 512 8192")
    add("--rank", **several, type=int, metavar="r", help="of the adapter; default: 16 64")
    add("--direction", default="both", choices=roofline.DIRECTIONS)


def show_roofline(arguments: argparse.Namespace) -> None:
    """Run `loraxs roofline`: the floor of each path, and what each would cost at least next to the frozen linear."""
    model, shapes = request.model_or_shapes(arguments.model, arguments.shape)
    request.one_of("gpu", arguments.gpu, "ceilings", arguments.ceilings)
    tokens, ranks = arguments.tokens or [512, 8192], arguments.rank or [16, 64]
    request.at_least_one(tokens=tokens, rank=ranks)
    ceilings = _ceilings(arguments)
    points = [(T, r) for T in dict.fromkeys(tokens) for r in dict.fromkeys(ranks)]

    def floor(path: str, T: int, r: int) -> float:
        """Milliseconds of the block."""
        each = (s.count * roofline.floor(ceilings, path, T, s.N, s.K, r, arguments.direction) for s in shapes)
        return 1e3 * sum(each)

    lines = []
    for path, what in roofline.PATHS.items():
        least = [floor(path, T, r) for T, r in points]
        taxes = [100 * (ms / floor("frozen", T, r) - 1) for ms, (T, r) in zip(least, points, strict=True)]
        lines.append([what, *(f"{ms:.3f}" for ms in least), *(f"{tax:.1f}" for tax in taxes)])
    what = "the shapes given" if arguments.shape else f"the linears of one block of {model}"
    notes = (
        f"{ceilings.name}: {ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.half / 1e12:.0f} TFLOP/s in 16 bits, "
        f"{ceilings.single / 1e12:.0f} in fp32 ({ceilings.source}).",
        "Counted, not measured: all bytes and flops once, launches free, nothing kept in the cache between steps.",
    )
    head = ["least time, and tax", *(f"ms T {T} r {r}" for T, r in points), *(f"% T {T} r {r}" for T, r in points)]
    direction = roofline.DIRECTIONS[arguments.direction]
    tables.show([tables.Table(f"Floors for {what}, 16-bit weights, {direction}", head, lines, notes)])


def _ceilings(arguments: argparse.Namespace) -> roofline.Ceilings:
    if arguments.ceilings is not None:
        found = load(arguments.ceilings)["ceilings"]
        if found is None:
            raise BenchError(f"ceilings: {arguments.ceilings} has none, it was not measured on a GPU")
        try:
            ceilings = roofline.Ceilings(**found)
            sensible = all(0 < each < math.inf for each in (ceilings.bandwidth, ceilings.half, ceilings.single))
        except TypeError:
            sensible = False
        if not sensible:
            raise BenchError(f"ceilings: those in {arguments.ceilings} are damaged: {found!r}")
        return ceilings
    if arguments.gpu is None and torch.cuda.is_available():
        return timer.ceilings(torch.device("cuda"))
    name = arguments.gpu or "H200"
    request.known("gpu", [name], roofline.DATASHEETS)
    return roofline.DATASHEETS[name]
