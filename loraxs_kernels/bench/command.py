"""The commands `loraxs bench` and `loraxs roofline`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import BenchError, page, roofline, settings, tables, timer
from .layer import Row, failure, release
from .paths import PATHS
from .report import Report, load
from .settings import Settings
from .shapes import MODELS
from .svd import METHODS


def add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "questions",
        nargs="*",
        metavar="question",
        help="layer, host (the default is these two), chain, gemm, group, choice, svd, model, bank, experiments",
    )
    add("--model", help=f"whose shapes: {', '.join(MODELS)}; for the question model also a folder with a HF model")
    add("--shape", nargs="+", default=[], metavar="NxK", help="shapes instead of a model's, such as 4096x14336")
    add("--tokens", nargs="+", type=int, default=[], metavar="T")
    add("--rank", nargs="+", type=int, default=[], metavar="r")
    add("--dtype", help=f"{', '.join(settings.DTYPES)}; default: bf16 on a GPU, fp32 on a CPU")
    add("--direction", default="both", help="both (forward and backward, the default), forward or backward")
    add("--paths", nargs="+", default=[], metavar="path", help=f"all, or some of {', '.join([*PATHS, *METHODS])}")
    add("--mode", nargs="+", default=[], metavar="mode", help="eager, graph; default on a GPU: both")
    add("--device", help="default: the GPU where there is one, else the CPU")
    add("--seconds", type=float, help="for each path at each point of the grid; default 0.1 on a GPU, 0.5 on a CPU")
    add("--blocks", type=int, help="of the model, where not all: questions model and svd")
    add("--sequence", type=int, help="tokens in a sequence: question model")
    add("--batch", type=int, help="sequences in a step: question model")
    add("--records", nargs="+", type=int, default=[], metavar="n", help="of the banks: question bank")
    add("--out", type=Path, help="a new .json file, or a folder: <folder>/<device>/<date>-<commit>.json")
    add("--html", type=Path, metavar="FILE", help="also write one self-contained page with plots (needs matplotlib)")
    add("--commit", help="what to note as the source, where it is not a git checkout")


def bench(arguments: argparse.Namespace) -> int:
    """Run `loraxs bench`; returns 0, 1 where some path was wrong or failed, or 130 where the run was stopped."""
    if arguments.html is not None:
        page.check(arguments.html)
    request = settings.check(
        questions=arguments.questions,
        model=arguments.model,
        shapes=arguments.shape,
        tokens=arguments.tokens,
        ranks=arguments.rank,
        dtype=arguments.dtype,
        direction=arguments.direction,
        paths=arguments.paths,
        modes=arguments.mode,
        device=arguments.device,
        seconds=arguments.seconds,
        blocks=arguments.blocks,
        sequence=arguments.sequence,
        batch=arguments.batch,
        records=arguments.records,
    )
    report = run(request, arguments.out, arguments.commit)
    if arguments.html is not None:
        page.write(report.data, arguments.html)
        print(f"{arguments.html} has the plots")
    if not report.data["complete"]:
        return 130
    return 1 if any(row["status"] == "failed" for row in report.data["rows"]) else 0


def run(request: Settings, out: Path | None, commit: str | None = None) -> Report:
    """Measure everything that was asked for, telling of each point, and print the tables.

    Every row is in the report's file as soon as it is known: a run that is stopped (Ctrl-C, kill) loses nothing.
    """
    report = Report(request, out, commit)
    print(f"loraxs bench: {', '.join(request.questions)} on {page.machine(report.data)}; writing {report.path}")
    if request.device.type != "cuda":
        print("  no GPU in use: a small grid, and ratios alone, since times on a shared CPU mean little")
    for name, why in request.left_out.items():
        print(f"  without {name}: {why}")
    sys.stdout.flush()
    try:
        with timer.on(request.device), timer.short_collections():
            if request.device.type == "cuda":
                _measure_ceilings(report, request)
            for question in request.questions:
                _answer(question, request, report)
    except KeyboardInterrupt:
        print("\nstopped; what was measured until now:", file=sys.stderr)
    else:
        report.finish()
    tables.show(tables.of(report.data))
    print(f"\n{len(report.data['rows'])} rows in {report.path}, {report.data['seconds']:.0f} s")
    return report


def _answer(question: str, request: Settings, report: Report) -> None:
    """All rows of one question; what breaks it is noted, and the next question has its turn."""
    module = importlib.import_module(f".{question}", __package__)
    try:
        for row in _watched(question, module.rows(request), module.points(request)):
            report.add(row)
    except BrokenPipeError:  # of what is printed
        raise
    except Exception as error:
        row = {"question": question} | failure("(the rest)", error)
        report.add(row)
        print(f"  {question} broke off: {row['reason']}", file=sys.stderr)


def _measure_ceilings(report: Report, request: Settings) -> None:
    try:
        report.data["ceilings"] = dataclasses.asdict(timer.ceilings(request.device))
        report.save()
    except torch.OutOfMemoryError:
        print("  without floors: there is no memory for the copy and the GEMM that give this machine's ceilings")
    release()


def _watched(question: str, rows: Iterator[Row], points: int) -> Iterator[Row]:
    """Show how far it is: a bar for a person, a line for each point elsewhere."""
    seen: set[tuple] = set()
    with tqdm(total=points, desc=question, unit="point", disable=None, leave=False) as bar:
        for row in rows:
            where = tuple(
                f"{key} {row[key]}" for key in ("N", "K", "T", "r", "records", "checkpointing", "again") if key in row
            )
            if question == "model":
                where = (row["path"], *where)
            if question == "experiments":
                where = (row["experiment"], *where, *([row["direction"]] if "direction" in row else []))
            if where not in seen:
                seen.add(where)
                bar.set_postfix_str(" ".join(where))
                bar.update()
                if bar.disable:
                    print(f"  {question} {len(seen)}/{points}: {' '.join(where)}", flush=True)
            if row["status"] == "failed":
                tqdm.write(f"  {row['path']} at {' '.join(where)}: {row['reason']}")
            yield row


def add_roofline(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", help=f"ceilings by the datasheet: {', '.join(roofline.DATASHEETS)}; default: this GPU's, measured")
    add("--ceilings", type=Path, metavar="FILE", help="ceilings measured in a run: the .json that loraxs bench wrote")
    add("--model", help=f"{', '.join(MODELS)}; default mistral-7b")
    add("--shape", nargs="+", default=[], metavar="NxK", help="shapes instead of a model's, such as 4096x14336")
    add("--tokens", nargs="+", type=int, default=[512, 8192], metavar="T")
    add("--rank", nargs="+", type=int, default=[16, 64], metavar="r")
    add("--direction", default="both", choices=roofline.DIRECTIONS)


def show_roofline(arguments: argparse.Namespace) -> int:
    """Run `loraxs roofline`: the floor of each path, and what each would cost at least next to the frozen linear."""
    model, shapes = settings.model_or_shapes(arguments.model, arguments.shape)
    settings.one_of("gpu", arguments.gpu, "ceilings", arguments.ceilings)
    settings.at_least_one(tokens=arguments.tokens, rank=arguments.rank)
    ceilings = _ceilings(arguments)
    points = [(T, r) for T in arguments.tokens for r in arguments.rank]

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
        "A model: bytes and flops counted once, launches free, nothing kept in the cache between steps.",
    )
    head = ["least time, and tax", *(f"ms T {T} r {r}" for T, r in points), *(f"% T {T} r {r}" for T, r in points)]
    direction = roofline.DIRECTIONS[arguments.direction]
    tables.show([tables.Table(f"Floors for {what}, 16-bit weights, {direction}", head, lines, notes)])
    return 0


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
    if name not in roofline.DATASHEETS:
        raise BenchError(f"gpu: got {name!r}, must be one of {', '.join(roofline.DATASHEETS)}")
    return roofline.DATASHEETS[name]
