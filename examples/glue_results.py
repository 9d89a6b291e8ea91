"""What train_glue.py --seeds has reached, in the layout of the paper's tables 1 and 3, beside the paper's own figures.

    python examples/glue_results.py out-cola out-sst2 out-cola-random --output results.md --plot curves.png

Each argument is the output_dir of a run with --seeds, or its results.json.  The plot has a curve for every run, the
median of its seeds; --plot needs matplotlib.  Without --output the tables are printed.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraxs_kernels import paper
from loraxs_kernels.files import read_json, target_of, write_atomically

SIX = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")  # the tasks of table 1, in its order
ORDER = tuple(paper.GLUE_TASKS)
MUST_AGREE = ("model_name_or_path", "loraxs_target_modules")  # between the rows of a table
# In every recipe, and no matter here: global_batch is what the batch came to with all processes and accumulation.
BESIDE = {"task", "init", "dataset", "train_file", "validation_file", "sha256", "mnli_adapter", "seed", "logging_steps"}
BESIDE |= {"per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "save_strategy"}
BESIDE |= {"save_total_limit", "load_best_model_at_end", "use_cpu"}


@dataclass(frozen=True)
class Result:
    """A results.json; curves: {epoch: metric in percent} of every seed; best: the metric of the epoch that it took."""

    path: Path
    task: str
    rank: int
    init: str
    recipe: dict[str, Any]
    parameters: int
    curves: list[dict[float, float]]
    best: list[float]

    @property
    def key(self) -> tuple[str, int, str]:
        return self.task, self.rank, self.init

    def after(self, epoch: float) -> list[float]:
        """The metric of every seed after an epoch."""
        return [curve[epoch] for curve in self.curves if epoch in curve]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders of train_glue.py --seeds")
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--plot", type=Path, help="a file for the learning curves: png, svg or pdf")
    given = parser.parse_args(argv)
    results = [read(path) for path in given.results]
    check_together(results)
    kept = {result.path.resolve() for result in results}
    for argument in ("output", "plot"):
        if path := getattr(given, argument):
            if (target := target_of(path, argument)) in kept:
                raise ValueError(f"{argument}: got {path}, must be another file than the results and the other one")
            kept.add(target)
    written = [(given.plot, plot(results, given.plot.suffix))] if given.plot else []
    text = "\n\n".join((table1(results), table3(results), runs(results))) + "\n"
    if given.output:
        written.append((given.output, text.encode()))
    else:
        print(text, end="")
    for path, data in written:
        write_atomically(path, data)


def read(path: Path) -> Result:
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"results: there is no file {file}; train_glue.py --seeds writes one")
    found = read_json(file.read_bytes(), f"results: {file}")
    if found.get("loraxs_glue") != 1:
        raise ValueError(f"results: {file} is no results.json of train_glue.py --seeds")
    try:
        recipe, done, seeds = found["recipe"], found["runs"].values(), found["seeds"]
        task, rank, init, _ = (recipe[name] for name in ("task", "loraxs_r", "init", "model_name_or_path"))
        metric = paper.GLUE_TASKS[task].metrics[0]
        curves = [{float(each["epoch"]): 100 * float(each[metric]) for each in run["epochs"]} for run in done]
        best = [curve[run["best_epoch"]] for curve, run in zip(curves, done, strict=True)]
        if len(done) == len(seeds) > 0:
            return Result(file, task, int(rank), init, recipe, int(found["parameters"]["R"]), curves, best)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"results: {file} is damaged ({type(error).__name__}: {error})") from error
    raise ValueError(f"results: {file} has {len(done)} of {len(seeds)} seeds; start its run again, which continues it")


def check_together(results: list[Result]) -> None:
    """That one table can hold them all."""
    first: dict[tuple, Result] = {}
    for result in results:
        if (other := first.setdefault(result.key, result)) is not result:
            raise ValueError(
                f"results: {result.path} and {other.path} are both of {result.key}, must be different runs"
            )
        for name in MUST_AGREE:
            ours, theirs = (each.recipe.get(name) for each in (result, results[0]))
            if ours != theirs:
                where = f"{result.path} has {name} {ours}, {results[0].path} has {theirs}"
                raise ValueError(f"results: {where}; must be the same in one table")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def cell(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{deviation}" if values else "-"


def table1(results: list[Result]) -> str:
    """Every method at every rank, in the paper and here."""
    tasks = [*SIX, *sorted({result.task for result in results} - {*SIX})]
    ours, published = {result.key: result for result in results}, paper.TABLES["table1"]
    at_rank = {entry["rank"]: entry for entry in published if "rank" in entry}
    rows = [published_row(entry, tasks) for entry in published if "rank" not in entry]
    for rank in sorted({*at_rank, *(result.rank for result in results)}, reverse=True):
        rows.append(published_row(at_rank.get(rank, {"method": "LoRA-XS", "rank": rank}), tasks))
        for init, name in (("svd", "LoRA-XS, ours"), ("random", "LoRA-XS with random A and B, ours")):
            if row := {task: ours[task, rank, init] for task in tasks if (task, rank, init) in ours}:
                six = [statistics.median(row[task].best) for task in SIX if task in row]
                average = f"{statistics.mean(six):.2f}" if len(six) == len(SIX) else "-"
                cells = [cell(row[task].best) if task in row else "-" for task in tasks]
                count = f"{next(iter(row.values())).parameters:,}"
                rows.append([name, count, str(rank), *cells[: len(SIX)], average, *cells[len(SIX) :]])
    names = [paper.GLUE_TASKS[task].name for task in tasks]
    header = ["Method", "Trainable parameters", "Rank", *names[: len(SIX)], "Avg.", *names[len(SIX) :]]
    return f"""## Table 1

Ours: {results[0].recipe["model_name_or_path"]}, the median ± standard deviation of the seeds' best epochs, on the
validation data: Matthews correlation for CoLA, Pearson correlation for STS-B, else accuracy. Trainable parameters are
those of R, without the classifier.

The paper: RoBERTa-large, from loraxs_kernels/paper.json. {paper.TABLES["table1_source"]}

{table(header, rows)}"""


def published_row(entry: dict[str, Any], tasks: list[str]) -> list[str]:
    cells = [str(entry.get(task, "-")) for task in tasks]
    count = f"{entry['trainable']:,}" if "trainable" in entry else "-"
    rank, average = (str(entry.get(key, "-")) for key in ("rank", "average"))
    return [f"{entry['method']}, paper", count, rank, *cells[: len(SIX)], average, *cells[len(SIX) :]]


def table3(results: list[Result]) -> str:
    """A and B from the SVD and at random, after one epoch, two, and the best one."""
    ours, rows = {result.key: result for result in results}, []
    for task, rank in sorted({result.key[:2] for result in results}, key=lambda key: (ORDER.index(key[0]), -key[1])):
        both = [ours.get((task, rank, init)) for init in ("svd", "random")]
        cells = [[cell(each.after(1)), cell(each.after(2)), cell(each.best)] if each else ["-"] * 3 for each in both]
        name = paper.GLUE_TASKS[task].name
        rows += [[name, str(rank), "paper", *["-"] * 6], [name, str(rank), "ours", *cells[0], *cells[1]]]
    header = [f"{init}, {when}" for init in ("SVD", "random") for when in ("epoch 1", "epoch 2", "best epoch")]
    return f"""## Table 3

The paper's figures are not in loraxs_kernels/paper.json, as said at table 1.

{table(["Task", "Rank", "Whose", *header], rows)}"""


def runs(results: list[Result]) -> str:
    """Where the figures are from, and what is not the paper's recipe."""
    rows = []
    for result in results:
        must = {name: value for name, value in paper.TABLES["glue"].items() if name not in BESIDE}
        must |= {"classifier": ["classifier"], "keep_mnli_dense": False, "weight_decay": 0.01, "eval_strategy": "epoch"}
        must |= {"max_grad_norm": 1.0, "metric_for_best_model": paper.GLUE_TASKS[result.task].metrics[0]}
        must |= {"global_batch": paper.TABLES["glue"]["per_device_train_batch_size"]}
        try:
            row = paper.glue(*result.key)
            must |= {"loraxs_r": row.rank, "num_train_epochs": row.num_train_epochs}
            must |= {name: getattr(row, name) for name in ("learning_rate", "classifier_learning_rate")}
        except ValueError:
            must["loraxs_r"] = "one that the tables have"
        must |= dict.fromkeys(sorted(result.recipe.keys() - must.keys() - BESIDE))  # options that are left alone there
        other = [f"{name} {result.recipe.get(name)}" for name in must if result.recipe.get(name) != must[name]]
        if result.task in paper.TABLES["from_mnli"]["tasks"] and not result.recipe.get("mnli_adapter"):
            other.append("no mnli_adapter")
        task, rank, init = result.key
        rows.append([str(result.path), task, str(rank), init, str(len(result.curves)), ", ".join(other) or "nothing"])
    return f"## Runs\n\n{table(['File', 'Task', 'Rank', 'A and B', 'Seeds', 'Other than in the paper'], rows)}"


def plot(results: list[Result], suffix: str) -> bytes:
    """A panel for every task, a curve for every run; epochs 1, 2 and the best one are marked."""
    from matplotlib.figure import Figure

    tasks = sorted({result.task for result in results}, key=ORDER.index)
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    if suffix[1:] not in (known := figure.canvas.get_supported_filetypes()):
        raise ValueError(f"plot: got a file of type {suffix or 'none'}, must be one of {', '.join(sorted(known))}")
    for i, task in enumerate(tasks, 1):
        axes = figure.add_subplot(lines, columns, i)
        for result in sorted((each for each in results if each.task == task), key=lambda each: each.key):
            epochs = sorted(set.intersection(*map(set, result.curves)))
            median, low, high = ([of(result.after(e)) for e in epochs] for of in (statistics.median, min, max))
            (line,) = axes.plot(epochs, median, label=f"{result.init}, r = {result.rank}")
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            first = [j for j, epoch in enumerate(epochs) if epoch in (1, 2)]
            best = median.index(max(median))
            for marked, marker in ((first, "o"), ([best], "*")):
                points = [epochs[j] for j in marked], [median[j] for j in marked]
                axes.plot(*points, marker, color=line.get_color(), markersize={"o": 6, "*": 12}[marker])
        name = paper.GLUE_TASKS[task]
        axes.set(title=name.name, xlabel="epoch", ylabel=f"{name.metrics[0]}, %")
        axes.legend(title="median and range of the seeds;\n● epochs 1, 2   ★ best epoch", fontsize=8, title_fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format=suffix[1:], dpi=150)
    return data.getvalue()


if __name__ == "__main__":
    main()
