"""GLUE with LoRA-XS on RoBERTa-large, by the settings of the reference implementation's scripts: R and the classifier
train, each at its rate.

    python examples/train_glue.py --task cola --loraxs_r 16 --output_dir out
    python examples/train_glue.py --task rte --train_file train.tsv --validation_file dev.tsv --output_dir out \
        --mnli_adapter out-mnli/adapter.safetensors

The data are local files (csv, tsv, json, jsonl) with the columns of the task or sentence1, sentence2 and label, or come
from the Hugging Face Hub where the package datasets is installed.  Every option of transformers' TrainingArguments
works; --resume_from_checkpoint true continues where a run was stopped.  The settings are those of one process, which
takes 32 examples a step; with several, each takes 32 unless per_device_train_batch_size is smaller.  The metrics need
scikit-learn.  What is left in the end is output_dir/adapter.safetensors, R and the classifier of the epoch that did
best on the validation data.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import loraxs_kernels as lx
from loraxs_kernels.integrations.transformers import LoraXSCallback


@dataclass(frozen=True)
class Glue:
    """A task: its columns, the metric that picks the best epoch, and how it is trained.

    The rates are the grids that the scripts of the reference implementation search, at every rank from 4 to 25; MNLI
    and QQP, for which it has none, share those of the other large tasks.  The one in the middle, or the first of two,
    is taken unless the command line says otherwise.
    """

    columns: tuple[str, ...]
    metric: str = "accuracy"
    num_train_epochs: float = 10
    warmup_ratio: float = 0.06
    learning_rates: tuple[float, ...] = (1e-4, 5e-4, 1e-3)
    classifier_learning_rates: tuple[float, ...] = (5e-4, 1e-3, 5e-3)

    def defaults(self) -> dict[str, Any]:
        return {
            "num_train_epochs": self.num_train_epochs,
            "warmup_ratio": self.warmup_ratio,
            "learning_rate": self.learning_rates[(len(self.learning_rates) - 1) // 2],
            "classifier_learning_rate": self.classifier_learning_rates[(len(self.classifier_learning_rates) - 1) // 2],
            "metric_for_best_model": self.metric,
        }


FROM_MNLI = {  # the small tasks, which start from an adapter that was trained on MNLI
    "num_train_epochs": 50,
    "warmup_ratio": 0.0,
    "learning_rates": (6e-4, 1e-3),
    "classifier_learning_rates": (6e-4, 1e-3),
}
TASKS = {
    "cola": Glue(("sentence",), "matthews"),
    "sst2": Glue(("sentence",)),
    "qnli": Glue(("question", "sentence")),
    "mnli": Glue(("premise", "hypothesis")),
    "qqp": Glue(("question1", "question2")),
    "mrpc": Glue(("sentence1", "sentence2"), **FROM_MNLI),
    "rte": Glue(("sentence1", "sentence2"), **FROM_MNLI),
    "stsb": Glue(("sentence1", "sentence2"), "pearson", **FROM_MNLI),
}


@dataclass
class Task:
    task: str = field(metadata={"help": "what to learn", "choices": list(TASKS)})
    model_name_or_path: str = "FacebookAI/roberta-large"
    train_file: str | None = field(default=None, metadata={"help": "by default the task's from the Hub"})
    validation_file: str | None = None
    dataset: str = field(default="nyu-mll/glue", metadata={"help": "on the Hub, where no files are given"})
    max_length: int = field(default=128, metadata={"help": "in tokens; what is longer is cut"})
    loraxs_r: int = field(default=16, metadata={"help": "rank: R is r x r"})
    loraxs_alpha: float = field(default=16.0, metadata={"help": "s = alpha / r"})
    loraxs_target_modules: list[str] = field(
        # Names match by their ends, so that the last takes in the third: four modules a layer.
        default_factory=lambda: ["query", "value", "attention.output.dense", "output.dense"],
        metadata={"help": "names of modules"},
    )
    classifier: str = field(default="classifier", metadata={"help": "the module that trains whole"})
    classifier_learning_rate: float = 1e-3
    mnli_adapter: str | None = field(default=None, metadata={"help": "an adapter file to start from, trained on MNLI"})


@dataclass
class Recipe(TrainingArguments):
    """TrainingArguments with the values that all tasks share."""

    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = field(default=0.06, metadata={"help": "the part of the steps in which the rate rises"})
    weight_decay: float = 0.01
    logging_steps: float = 20
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True

    def __post_init__(self) -> None:
        if all(f.name != "warmup_ratio" for f in fields(TrainingArguments)) and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # transformers 5 takes either there
        super().__post_init__()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((Task, Recipe))
    glue = TASKS[parser.parse_known_args(argv)[0].task]
    parser.set_defaults(**glue.defaults())
    task, recipe = parser.parse_args_into_dataclasses(argv)
    set_seed(recipe.seed)

    train, validation = read_data(task)
    names = None if task.task == "stsb" else label_names([*train, *validation], 3 if task.task == "mnli" else 2)
    tokenizer = AutoTokenizer.from_pretrained(task.model_name_or_path)
    model = attached(task, recipe, num_labels=len(names or [0]))

    # A collator with a tokenizer would have it saved with every checkpoint.
    padded = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model=model,
        args=recipe,
        train_dataset=encode(train, glue, names, tokenizer, task.max_length),
        eval_dataset=encode(validation, glue, names, tokenizer, task.max_length),
        data_collator=lambda examples: padded(examples),
        compute_metrics=lambda prediction: metrics(task.task, prediction),
        optimizers=(optimizer(model, task, recipe), None),
    )
    LoraXSCallback().add_to(trainer)
    resume = recipe.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)

    trainer.save_state()

    result = trainer.evaluate()
    if trainer.is_world_process_zero():
        path = Path(recipe.output_dir, "adapter.safetensors")
        lx.save_adapter(model, path)
        Path(recipe.output_dir, "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{path}: {path.stat().st_size:,} bytes; {result}")
    return result


def attached(task: Task, recipe: Recipe, num_labels: int) -> torch.nn.Module:
    """A model with LoRA-XS: new, or as it was trained on MNLI, with a new last layer for this task's labels."""
    model = AutoModelForSequenceClassification.from_pretrained(task.model_name_or_path, num_labels=num_labels)
    if task.mnli_adapter:
        # On its own A and B, whatever the seed is here: R means nothing on others.
        start = AutoModelForSequenceClassification.from_pretrained(task.model_name_or_path, num_labels=3)
        lx.load_adapter(start, task.mnli_adapter, device=recipe.device)
        for m in start.modules():
            if isinstance(m, lx.LoRAXSLinear) and (m.rank, m.alpha) != (task.loraxs_r, task.loraxs_alpha):
                raise ValueError(
                    f"mnli_adapter: has r = {m.rank} and alpha = {m.alpha:g}, must have loraxs_r = {task.loraxs_r} "
                    f"and loraxs_alpha = {task.loraxs_alpha:g}"
                )
        start.get_submodule(task.classifier).out_proj = model.get_submodule(task.classifier).out_proj
        start.config, start.num_labels = model.config, num_labels
        model = start
    else:
        lx.attach(
            model,
            task.loraxs_r,
            target_modules=task.loraxs_target_modules,
            alpha=task.loraxs_alpha,
            modules_to_save=[task.classifier],
            seed=recipe.seed,
            device=recipe.device,
        )
    adapters = [m for m in model.modules() if isinstance(m, lx.LoRAXSLinear)]
    head = sum(p.numel() for p in model.get_submodule(task.classifier).parameters())
    print(f"{sum(m.R.numel() for m in adapters):,} parameters in {len(adapters)} adapters train, {head:,} in the head")
    return model


def optimizer(model: torch.nn.Module, task: Task, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if name.startswith(f"{task.classifier}.")]
    R = [p for name, p in trained if not name.startswith(f"{task.classifier}.")]
    groups = [{"params": R, "lr": recipe.learning_rate}, {"params": head, "lr": task.classifier_learning_rate}]
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)


def read_data(task: Task) -> tuple[list[dict], list[dict]]:
    """The records for training and validation."""
    if task.train_file and task.validation_file:
        files = Path(task.train_file), Path(task.validation_file)
        train, validation = (read_records(path) for path in files)
        for path, records in zip(files, (train, validation), strict=True):
            if not records or "label" not in records[0]:
                raise ValueError(f"{path}: has no records with a column 'label'")
        return train, validation
    if task.train_file or task.validation_file:
        raise ValueError("train_file, validation_file: got one of them, must be both or none")
    from datasets import load_dataset

    data = load_dataset(task.dataset, task.task)
    return list(data["train"]), list(data["validation_matched" if task.task == "mnli" else "validation"])


def read_records(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        how = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        return list(csv.DictReader(text.splitlines(keepends=True), **how))
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def label_names(records: list[dict], number: int) -> list[str]:
    """Every label, as text, in order; so that numbers and names, in any file, are the same classes.

    What begins with "not" comes first, so that F1, as GLUE has it, is of the other one.
    """
    names = sorted({str(record["label"]) for record in records}, key=lambda name: (not name.startswith("not"), name))
    if len(names) != number:
        raise ValueError(f"label: got {', '.join(map(repr, names[:9]))} in the data, must be {number} different labels")
    return names


def encode(records: list[dict], glue: Glue, names: list[str] | None, tokenizer: Any, max_length: int) -> list[dict]:
    """Tokens and label of every record; names: of the classes, or None where the label is a number to be predicted."""
    columns = next((c for c in (glue.columns, ("sentence1", "sentence2")) if set(c) <= records[0].keys()), None)
    if columns is None:
        raise ValueError(
            f"the data have columns {', '.join(records[0])}, must have {', '.join(glue.columns)} and label"
        )
    texts = [[record[column] for record in records] for column in columns]
    tokens = tokenizer(*texts, truncation=True, max_length=max_length)
    labels = [float(r["label"]) if names is None else names.index(str(r["label"])) for r in records]
    return [{key: tokens[key][i] for key in tokens} | {"labels": label} for i, label in enumerate(labels)]


def metrics(task: str, prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    if task == "stsb":
        values = np.squeeze(logits, -1)
        return {"pearson": float(pearsonr(values, labels)[0]), "spearman": float(spearmanr(values, labels)[0])}
    classes = np.argmax(logits, -1)
    if task == "cola":
        return {"matthews": float(matthews_corrcoef(labels, classes))}
    result = {"accuracy": float(accuracy_score(labels, classes))}
    return result | ({"f1": float(f1_score(labels, classes))} if task in ("mrpc", "qqp") else {})


if __name__ == "__main__":
    main()
