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
from collections.abc import Sequence
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

Reports = dict[str, dict[str, Any]]  # by their paths below bench/results, the oldest first


def read() -> Reports:
    """The reports that are shown."""
    found: Reports = {}
    for path in RESULTS.glob("*/*.json"):
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise BenchError(f"{path.relative_to(RESULTS)}: cannot be read as a report: {error}") from error
        if isinstance(data, dict) and kind(data) in BLOCKS:
            found[path.relative_to(RESULTS).as_posix()] = report.load(path) if report.is_report(data) else data
    return dict(sorted(found.items(), key=lambda each: (each[1]["date"], each[0])))


def kind(data: dict[str, Any]) -> str | None:
    """The format of a report; a demo's says none."""
    return DEMO if isinstance(data.get("rows"), dict) else data.get("format")


def bench_block(data: dict[str, Any], questions: Sequence[str]) -> str:
    """The tables of some questions."""
    return "\n\n".join(table.markdown() for table in tables_of(data, questions or QUESTIONS))


def build_block(data: dict[str, Any], _: Sequence[str]) -> str:
    """How long the CUDA core takes to compile."""
    lines = []
    for row in data["rows"]:
        times = [f"{row[which] / 60:.1f}" for which in ("seconds", "processor_seconds")]
        lines.append([row["architectures"].replace(";", ", "), *times, f"{row['largest_bytes'] / 2**30:.1f}"])
    title = f"Compiling the CUDA core, nvcc {data['nvcc']}, {data['jobs']} at once"
    head = ["LORAXS_CUDA_ARCHS", "minutes", "minutes of one processor", "memory of the largest compiler, GiB"]
    return tables.Table(title, head, lines).markdown()


def demo_block(data: dict[str, Any], _: Sequence[str]) -> str:
    """The accuracies, the sizes on disk and the checks of a demo."""
    lines = []
    for row in data["rows"].values():
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        parameters = f"{row['adapter_parameters']:,} + {row['head_parameters']:,}"
        lines.append([row["label"], f"{100 * row['accuracy']:.1f}{spread}", parameters])
    seeds = f"{len(data['seeds'])} seeds" if len(data["seeds"]) > 1 else "one seed"
    title = f"{data['what']}: {data['questions']['test']:,} test questions, {seeds}"
    table = tables.Table(title, ["", "accuracy, %", "adapter + head parameters"], lines)
    size = {what: f"{data['bytes'][what] / 1024:,.0f} KiB" for what in ("adapter_file", "lora", "model")}
    checks = data["checks"]
    text = f"A fine-tuned copy takes {size['adapter_file']} on disk, LoRA's {size['lora']}, the model {size['model']}."
    differ = [checks[way]["different_predictions"] for way in ("loaded", "merged")]
    text += f" Loaded into a fresh model, {differ[0]} predictions differ; merged, {differ[1]}."
    if "unfused" in checks:
        text += f" Fused and unfused losses agree to {checks['unfused']['largest_loss_difference']:.1e}."
    return f"{table.markdown()}\n\n{text}"


DEMO = "demo"
BLOCKS = {
    report.FORMAT: bench_block,
    costs.BUILD: build_block,
    accuracy.FORMAT: lambda data, _: accuracy.table(data).markdown(),
    DEMO: demo_block,
}


def block(name: str, data: dict[str, Any], questions: Sequence[str] = ()) -> str:
    """Where it was measured, and what."""
    demo = kind(data) == DEMO
    machine, commit = (data["machine"]["cpu"], "") if demo else (page.machine(data), f", commit {data['commit']}")
    if not (body := BLOCKS[kind(data)](data, questions)):
        raise BenchError(f"{name} has nothing on {', '.join(questions)}")
    return f"{machine}, {data['date'][:10]}{commit}, `bench/results/{name}`:\n\n{body}"


def filled(text: str, reports: Reports) -> str:
    """A document with its blocks of figures as the reports have them."""

    def figures(match: re.Match) -> str:
        start, name, questions = match.groups()
        if name not in reports:
            raise BenchError(f"there is no report bench/results/{name}")
        return f"{start}{block(name, reports[name], questions.split())}\n<!-- end of figures -->"

    return BLOCK.sub(figures, text)


def results(reports: Reports) -> tuple[str, dict[Path, plots.Plot]]:
    """bench/results/README.md: the newest reports of each device in full, the newest of the others, and all files.  And
    its images."""
    benches = {name: data for name, data in reports.items() if report.is_report(data)}
    parts = [
        "# What has been measured",
        "Made by bench/render.py from the files beside it; never edited. Files are added, never changed. What has run "
        "on a GPU stands in STATUS.md.",
    ]
    images: dict[Path, plots.Plot] = {}

    def image(name: str, plot: plots.Plot) -> str:
        path = f"{name.removesuffix('.json')}-{plot.name}.png"
        images[RESULTS / path] = plot
        return f"![{plot.title}]({path})"

    for name, data in newest(benches).items():
        parts += [f"## {page.machine(data)}", f"`{name}`", "\n\n".join(page.provenance(data))]
        parts += [table.markdown() for table in tables_of(data)]
        parts += [image(name, plot) for plot in plots_of(data)]
    parts.append("## Demos, accuracy and the build")
    about = ("format", "model", "length", "task")
    others = {(Path(name).parent, *map(reports[name].get, about)): name for name in reports if name not in benches}
    for name in others.values():
        parts.append(block(name, reports[name]))
        parts += [image(name, accuracy.plot(reports[name]))] if kind(reports[name]) == accuracy.FORMAT else []
    files = [path.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.glob("*/*.json"))]
    parts += ["## All files", "\n".join(f"- [`{name}`]({name})" for name in files)]
    return "\n\n".join(parts) + "\n", images


def newest(benches: Reports) -> Reports:
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


def quoting() -> list[Path]:
    """README.md and the documents below docs that have a block of figures."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if BLOCK.search(path.read_text())]


def documents() -> tuple[dict[Path, str], dict[Path, plots.Plot]]:
    """Every document with a figure in it, and what it should say; and every image."""
    reports, texts = read(), {}
    for path in quoting():
        try:
            texts[path] = filled(path.read_text(), reports)
        except BenchError as error:
            raise BenchError(f"{path.relative_to(ROOT)}: {error}") from error
    texts[RESULTS / "README.md"], images = results(reports)
    texts[RESULTS / "STATUS.md"] = status.render(reports)
    texts[choice.TABLE] = choices.text(reports)
    return texts, images


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a document is out of date")
    check = parser.parse_args(argv).check
    try:
        texts, images = documents()
    except BenchError as error:
        print(f"render: {error}", file=sys.stderr)
        return 1
    if check:
        stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        stale += [path for path in images if not path.exists()]
        for path in stale:
            print(f"render: {path.relative_to(ROOT)} is out of date; run python bench/render.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text)
    for path, plot in images.items():
        path.write_bytes(plot.png())
    for path in set(RESULTS.glob("*/*.png")) - set(images):
        if not path.with_suffix(".json").exists():  # else a demo's own; these are of what newer reports superseded
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
