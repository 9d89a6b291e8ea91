"""The recipes and results of the LoRA-XS paper (arXiv 2405.17604) as data: tables 1, 2, 4 and 5 and appendix A.

    glue("cola", 16).learning_rate                  # a row of table 4
    glue("cola", 12, "random")                      # a row of table 5
    TABLES["instruction"], TABLES["table2"]         # fine-tuning on MetaMathQA, and what it reached

paper.json holds them and says what each part is from.  The scripts in examples/ take their defaults from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text())
# Without a row of their own: the rates of the other large inference task, and the epochs that appendix A gives MNLI.
LIKE_QNLI = ("mnli", "qqp")


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    name: as tables spell it.  columns: of its texts.  labels: how many classes it has; 0: the label is a number from 0
    to 5, which is predicted.  metrics: what is measured; the first one picks the best epoch.
    """

    name: str
    columns: tuple[str, ...]
    labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)


GLUE_TASKS = {
    "sst2": GlueTask("SST-2", ("sentence",)),
    "mrpc": GlueTask("MRPC", ("sentence1", "sentence2"), metrics=("accuracy", "f1")),
    "cola": GlueTask("CoLA", ("sentence",), metrics=("matthews",)),
    "qnli": GlueTask("QNLI", ("question", "sentence")),
    "rte": GlueTask("RTE", ("sentence1", "sentence2")),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), labels=0, metrics=("pearson", "spearman")),
    "mnli": GlueTask("MNLI", ("premise", "hypothesis"), labels=3),
    "qqp": GlueTask("QQP", ("question1", "question2"), metrics=("accuracy", "f1")),
}


@dataclass(frozen=True)
class GlueRow:
    """How a task of GLUE is trained at a rank.

    task, init, rank: of the row; `rank` may not be the one that was asked for.
    learning_rate: of R; classifier_learning_rate: of the classifier.
    note: one sentence where the row is not the very one that was asked for, else "".
    """

    task: str
    init: str
    rank: int
    learning_rate: float
    classifier_learning_rate: float
    num_train_epochs: float
    note: str = ""


def glue(task: str, rank: int, init: str = "svd") -> GlueRow:
    """The paper's row for a task of GLUE, or the nearest one.

    Args:
        task: as GLUE's data are named: cola, sst2, qnli, mrpc, rte, stsb; also mnli and qqp, which have no row of their
            own and take QNLI's rates.
        rank: between two rows the nearer one is taken, at equal distance the lower, and `note` says so.
        init: "svd" (table 4) or "random" (table 5, which has sst2, cola and qnli).

    Raises ValueError for a task or an init that the tables do not have, and for a rank below or above all of theirs.
    """
    if init not in ("svd", "random"):
        raise ValueError(f"init: got {init!r}, must be 'svd' or 'random'")
    number = 5 if init == "random" else 4
    rows = [row for row in TABLES[f"table{number}"] if row.get("init", "svd") == init]
    like = "qnli" if task in LIKE_QNLI else task
    found = {row["rank"]: row for row in rows if row["task"] == like}
    if not found:
        tasks = ", ".join(dict.fromkeys(row["task"] for row in rows))
        raise ValueError(f"task: got {task!r}; table {number} of the paper, init {init!r}, has {tasks}")
    ranks = sorted(found)
    if not ranks[0] <= rank <= ranks[-1]:
        raise ValueError(
            f"loraxs_r: got {rank}; table {number} of the paper has ranks {ranks[0]} to {ranks[-1]} for {like}, init "
            f"{init!r}"
        )
    nearest = min(ranks, key=lambda r: abs(r - rank))
    row = {"init": init} | found[nearest]
    notes = []
    if task != like:
        row |= {"task": task, "num_train_epochs": TABLES["from_mnli"]["num_train_epochs"]}
        notes.append(f"The paper has no row for {task}: taking QNLI's rates and {row['num_train_epochs']} epochs.")
    if nearest != rank:
        notes.append(f"Table {number} of the paper has no r = {rank} for {like}: taking its row for r = {nearest}.")
    return GlueRow(**row, note=" ".join(notes))
