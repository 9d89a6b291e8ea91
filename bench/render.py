"""Make everything that is taken from the reports in bench/results/: documents, and the table of backends.

    python bench/render.py            README.md and its plots and STATUS.md in bench/results, the figures in
                                      README.md and below docs, and loraxs_kernels/backends/choices.json
                                      (bench/choices.py)
    python bench/render.py --check    write nothing; exit 1 and name the documents that are not what the reports say

In README.md and the documents below docs a block of figures lies between two comments. The first names its report
(below bench/results/) and, for a report of `loraxs bench`, the questions whose tables are wanted:

    <!-- figures: cpu/2026-11-22-abc1234.json layer host -->
    <!-- end of figures -->

The reports shown are those of `loraxs bench` and bench/gpu_suite.py (loraxs_kernels/bench/report.py says what they
hold), `loraxs demo` (loraxs_kernels/demo/report.py), `bench/costs.py build` and bench/accuracy.py; others are listed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import accuracy  # noqa: E402
import choices  # noqa: E402
import costs  # noqa: E402
import status  # noqa: E402

from loraxs_kernels.backends import choice  # noqa: E402
from loraxs_kernels.bench import BenchError, page, plots, report, tables  # noqa: E402
from loraxs_kernels.bench.questions import QUESTIONS, plots_of, tables_of  # noqa: E402

RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+)((?: \w+)*) -->\n).*?<!-- end of figures -->", re.S)

Reports = dict[str, dict[str, Any]]


def read() -> tuple[Reports, Reports]:
    """Reports of bench, and of demo, build and accuracy, {path below bench/results: report}, oldest first."""
    benches: Reports = {}
    others: Reports = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        data, name = json.loads(path.read_text()), path.relative_to(RESULTS).as_posix()
        if report.is_report(data):
            benches[name] = report.load(path)
        elif data.get("format") in (costs.BUILD, accuracy.FORMAT) or isinstance(data.get("rows"), dict):
            others[name] = data
    by_date = [dict(sorted(found.items(), key=lambda item: item[1]["date"])) for found in (benches, others)]
    return by_date[0], by_date[1]


def where(name: str, data: dict[str, Any]) -> str:
    return f"{page.machine(data)}, {data['date'][:10]}, commit {data['commit']}, `bench/results/{name}`:"


def bench_block(name: str, data: dict[str, Any], questions: list[str]) -> str:
    """Where it was measured, and the tables of some questions."""
    found = tables_of(data, questions or QUESTIONS)
    if not found:
        raise BenchError(f"{name} has nothing on {', '.join(questions)}")
    return "\n\n".join([where(name, data), *(table.markdown() for table in found)])


def build_block(name: str, data: dict[str, Any]) -> str:
    """How long the CUDA core takes to compile."""
    lines = []
    for row in data["rows"]:
        times = [f"{row[which] / 60:.1f}" for which in ("seconds", "processor_seconds")]
        lines.append([row["architectures"].replace(";", ", "), *times, f"{row['largest_bytes'] / 2**30:.1f}"])
    title = f"Compiling the CUDA core, nvcc {data['nvcc']}, {data['jobs']} at once"
    head = ["LORAXS_CUDA_ARCHS", "minutes", "minutes of one processor", "memory of the largest compiler, GiB"]
    return f"{where(name, data)}\n\n{tables.Table(title, head, lines).markdown()}"


def other_block(name: str, data: dict[str, Any]) -> str:
    makers = {costs.BUILD: build_block, accuracy.FORMAT: accuracy.block}
    return makers.get(data.get("format"), demo_block)(name, data)


def demo_block(name: str, data: dict[str, Any]) -> str:
    """The accuracies, the sizes on disk and the checks of a demo."""
    lines = []
    for row in data["rows"].values():
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        parameters = f"{row['adapter_parameters']:,} + {row['head_parameters']:,}"
        lines.append([row["label"], f"{100 * row['accuracy']:.1f}{spread}", parameters])
    seeds = f"{len(data['seeds'])} seeds" if len(data["seeds"]) > 1 else "one seed"
    title = f"{data['what']}: {data['questions']['test']:,} test questions, {seeds}"
    where = f"{data['machine']['cpu']}, {data['date'][:10]}, `bench/results/{name}`:"
    table = tables.Table(title, ["", "accuracy, %", "adapter + head parameters"], lines)
    size = {what: f"{data['bytes'][what] / 1024:,.0f} KiB" for what in ("adapter_file", "lora", "model")}
    checks = data["checks"]
    text = f"A fine-tuned copy takes {size['adapter_file']} on disk, LoRA's {size['lora']}, the model {size['model']}."
    differ = [checks[way]["different_predictions"] for way in ("loaded", "merged")]
    text += f" Loaded into a fresh model, {differ[0]} predictions differ; merged, {differ[1]}."
    if "unfused" in checks:
        text += f" Fused and unfused losses agree to {checks['unfused']['largest_loss_difference']:.1e}."
    return "\n\n".join([where, table.markdown(), text])


def readme(text: str, benches: Reports, others: Reports) -> str:
    """A document with its blocks of figures as the reports have them."""

    def block(match: re.Match) -> str:
        name, questions = match.group(2), match.group(3).split()
        if name not in benches and name not in others:
            raise BenchError(f"there is no report bench/results/{name}")
        body = other_block(name, others[name]) if name in others else bench_block(name, benches[name], questions)
        return f"{match.group(1)}{body}\n<!-- end of figures -->"

    return BLOCK.sub(block, text)


def results(benches: Reports, others: Reports) -> str:
    """bench/results/README.md: the newest reports of each device in full, the newest of the others, and all files."""
    parts = [
        "# What has been measured",
        "Made by bench/render.py from the files beside it; never edited. Files are added, never changed. What has run "
        "on a GPU stands in STATUS.md.",
    ]
    for name, data in _newest(benches).items():
        facts = "\n\n".join(page.provenance(data))
        images = [f"![{plot.title}]({_image(name, plot)})" for plot in plots_of(data)]
        texts = [table.markdown() for table in tables_of(data)]
        parts += [f"## {page.machine(data)}", f"`{name}`", facts, *texts, *images]
    parts.append("## Demos, accuracy and the build")
    for name, data in _newest_others(others).items():
        parts += [other_block(name, data), *(f"![{plot.title}]({_image(name, plot)})" for plot in _other_plots(data))]
    files = [path.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.glob("*/*.json"))]
    parts += ["## All files", "\n".join(f"- [`{name}`]({name})" for name in files)]
    return "\n\n".join(parts) + "\n"


def _newest(benches: Reports) -> Reports:
    """The reports with something that no newer complete report of the same device has: a run, a question, a dtype."""
    found: Reports = {}
    covered: set[tuple] = set()
    for name, data in reversed(benches.items()):
        ok = (row for row in data["rows"] if row["status"] == "ok")
        about = {(Path(name).parent, row.get("run", ""), row["question"], row["dtype"]) for row in ok}
        if about - covered:
            found[name] = data
        if data["complete"]:
            covered |= about
    return found


def _newest_others(others: Reports) -> Reports:
    """The newest report of each kind, model, length and task in each folder."""
    newest = {}
    for name, data in others.items():
        newest[(Path(name).parent, *(data.get(key) for key in ("format", "model", "length", "task")))] = name
    return {name: others[name] for name in newest.values()}


def _other_plots(data: dict[str, Any]) -> list[plots.Plot]:
    return [accuracy.plot(data)] if data.get("format") == accuracy.FORMAT else []


def _image(name: str, plot: plots.Plot) -> str:
    return f"{name.removesuffix('.json')}-{plot.name}.png"


def quoting() -> list[Path]:
    """README.md and the documents below docs that have a block of figures."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if BLOCK.search(path.read_text())]


def documents() -> Iterator[tuple[Path, str]]:
    """Every document with a figure in it, and what it should say."""
    benches, others = read()
    for path in quoting():
        try:
            text = readme(path.read_text(), benches, others)
        except BenchError as error:
            raise BenchError(f"{path.relative_to(ROOT)}: {error}") from error
        yield path, text
    yield RESULTS / "README.md", results(benches, others)
    yield RESULTS / "STATUS.md", status.render(benches)
    yield choice.TABLE, choices.text(benches)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a document is out of date")
    check = parser.parse_args(argv).check
    try:
        wanted = dict(documents())
    except BenchError as error:
        print(f"render: {error}", file=sys.stderr)
        return 1
    if check:
        named = [RESULTS / each for each in re.findall(r"\]\(([^)]+\.png)\)", wanted[RESULTS / "README.md"])]
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        for path in (stale := [*stale, *(path for path in named if not path.exists())]):
            print(f"render: {path.relative_to(ROOT)} is out of date; run python bench/render.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text)
    benches, others = read()
    drawn = {(name, plot) for name, data in _newest(benches).items() for plot in plots_of(data)}
    drawn |= {(name, plot) for name, data in _newest_others(others).items() for plot in _other_plots(data)}
    images = {RESULTS / _image(name, plot): plot for name, plot in drawn}
    for path, plot in images.items():
        path.write_bytes(plot.png())
    for path in set(RESULTS.glob("*/*.png")) - set(images):
        if not path.with_suffix(".json").exists():  # else a demo's own; these are of what newer reports superseded
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
