"""GLUE with LoRA-XS by the paper's recipes (its tables 4 and 5): R and the classifier train, each at its rate.

    python examples/train_glue.py --task cola --loraxs_r 16 --show_recipe
    python examples/train_glue.py --task cola --loraxs_r 16 --output_dir out --seeds 5
    python examples/train_glue.py --task rte --loraxs_r 16 --output_dir out --train_file train.tsv \
        --validation_file dev.tsv --mnli_adapter out-mnli/adapter.safetensors

The defaults are the paper's; the command line, with every option of TrainingArguments, comes first.  The data are local
files (csv, tsv, json, jsonl) with a column label and the columns of the task, or sentence1 and sentence2 for a pair; or
they come from the Hugging Face Hub, by the package datasets.  The metrics need scikit-learn.  The recipe is that of one
process; with several, each takes 32 examples a step unless per_device_train_batch_size is smaller.  What is left is
output_dir/adapter.safetensors: R and the classifier of the epoch that did best on the validation data.
--resume_from_checkpoint true continues where a run was stopped.  With --seeds every seed has a folder in output_dir,
results.json has the metrics of all, and the same command continues what was stopped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification as Model
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, Trainer, TrainingArguments, set_seed

import loraxs_kernels as lx
from loraxs_kernels import adapter_format, paper
from loraxs_kernels.files import read_json, sha256_of, write_atomically
from loraxs_kernels.integrations.reference_repo import load_reference_adapter
from loraxs_kernels.integrations.transformers import LoraXSCallback
from loraxs_kernels.matching import adapted_layers, choose

PAPER, TASKS = paper.TABLES["glue"], paper.GLUE_TASKS
BY_ROW = ("learning_rate", "classifier_learning_rate", "num_train_epochs")  # what a row of the paper's tables has
# No part of a recipe: where a run writes, what it shows, and how often it is repeated.
NO_RECIPE = {"output_dir", "resume_from_checkpoint", "report_to", "run_name", "disable_tqdm", "show_recipe", "seeds"}


@dataclass
class Task:
    task: str = field(metadata={"help": "what to learn", "choices": list(TASKS)})
    model_name_or_path: str = PAPER["model_name_or_path"]
    train_file: str | None = field(default=None, metadata={"help": "by default the task's from the Hub"})
    validation_file: str | None = None
    dataset: str = field(default="nyu-mll/glue", metadata={"help": "on the Hub, where no files are given"})
    max_length: int = field(default=PAPER["max_length"], metadata={"help": "in tokens; what is longer is cut"})
    loraxs_r: int = field(default=16, metadata={"help": "rank: R is r x r"})
    loraxs_alpha: float = field(default=PAPER["loraxs_alpha"], metadata={"help": "s = alpha / r"})
    # Names match by their ends, so that the last takes in the third: four modules a layer.
    loraxs_target_modules: list[str] = field(default_factory=lambda: list(PAPER["loraxs_target_modules"]))
    init: str = field(default="svd", metadata={"help": "of A and B", "choices": ["svd", "random"]})
    classifier: list[str] = field(default_factory=lambda: ["classifier"], metadata={"help": "modules that train whole"})
    classifier_learning_rate: float | None = field(default=None, metadata={"help": "by default the paper's"})
    mnli_adapter: str | None = field(default=None, metadata={"help": "has the R to start from: a file or a folder"})
    keep_mnli_dense: bool = field(default=False, metadata={"help": "take its classifier's layer `dense`, too"})
    seeds: int | None = field(default=None, metadata={"help": "train this many seeds, from --seed on"})
    show_recipe: bool = field(default=False, metadata={"help": "print what would run, as JSON, and stop"})


@dataclass
class Recipe(TrainingArguments):
    """TrainingArguments with the values that all tasks share."""

    per_device_train_batch_size: int = PAPER["per_device_train_batch_size"]
    per_device_eval_batch_size: int = 64
    lr_scheduler_type: str = PAPER["lr_scheduler_type"]
    warmup_ratio: float = field(default=PAPER["warmup_ratio"], metadata={"help": "of the steps, while the rate rises"})
    warmup_steps: float | None = field(default=None, metadata={"help": "instead of warmup_ratio; 0: no warm-up"})
    optim: str = PAPER["optim"]
    weight_decay: float = field(default=0.01, metadata={"help": "torch's, which the reference's scripts take"})
    logging_steps: float = 20
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True

    def __post_init__(self) -> None:
        steps, ratio = self.warmup_steps, self.warmup_ratio
        for name, good, must in (
            ("warmup_steps", steps is None or 0 <= steps < math.inf, "0 or greater"),
            ("warmup_ratio", 0 <= ratio < 1, "0 or greater and less than 1"),
        ):
            if not good:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be {must}")
        if steps is not None:  # comes first; below 1 it is a ratio, as transformers 5 has it
            self.warmup_ratio = ratio = steps if steps < 1 else 0.0
        # Transformers 5 takes a ratio as warmup_steps: some of its versions have no warmup_ratio, others set one by it.
        self.warmup_steps = 0
        super().__post_init__()
        takes_ratio = getattr(TrainingArguments, "warmup_ratio", None) is None
        self.warmup_steps = steps if steps and steps >= 1 else ratio if takes_ratio else 0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else list(argv)
    task, recipe, shown, notes = parse(argv)
    for note in notes:
        print(note, file=sys.stderr)
    if task.show_recipe:
        print(json.dumps(shown, indent=1))
        return shown
    if task.mnli_adapter:
        check_start(task)
    data = read_data(task)
    return train_seeds(argv, task, recipe, shown, data) if task.seeds else train(task, recipe, *data)["result"]


def parse(argv: list[str]) -> tuple[Task, Recipe, dict[str, Any], list[str]]:
    """The command line over the paper's row; the recipe as one JSON object; and what to tell the user."""
    parser = HfArgumentParser((Task, Recipe))
    parser.set_defaults(**dict.fromkeys(BY_ROW))
    given, notes = parser.parse_args(argv), []
    parser.set_defaults(metric_for_best_model=TASKS[given.task].metrics[0])
    if any(getattr(given, name) is None for name in BY_ROW):
        try:
            row = paper.glue(given.task, given.loraxs_r, given.init)
        except ValueError as error:
            options = ", ".join(f"--{name}" for name in BY_ROW)
            raise ValueError(f"{error}. Anything else needs all of {options}") from None
        parser.set_defaults(**{name: getattr(row, name) for name in BY_ROW})
        notes += [row.note] if row.note else []
    task, recipe = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_options(task, recipe)
    if task.task in paper.TABLES["from_mnli"]["tasks"] and not task.mnli_adapter:
        notes.append(f"The paper starts {task.task} from an adapter trained on MNLI: --mnli_adapter.")
    own = {*get_annotations(Task), *get_annotations(Recipe), *BY_ROW, "seed", "metric_for_best_model", "max_grad_norm"}
    values = vars(parser.parse_args(argv)) | {"warmup_ratio": recipe.warmup_ratio}
    plain = vars(parser.parse_args(["--task", task.task]))
    names = {name for name in values if name in own or values[name] != plain[name]} - NO_RECIPE
    return task, recipe, {name: values[name] for name in values if name in names}, notes


def check_options(task: Task, recipe: Recipe) -> None:
    given, metrics = vars(task) | vars(recipe), (*TASKS[task.task].metrics, "loss")
    one = f"one of {', '.join(metrics)} for {task.task}"
    for name, good, must in (
        ("loraxs_r", lambda r: r > 0, "1 or greater"),
        ("max_length", lambda tokens: tokens > 0, "1 or greater"),
        ("num_train_epochs", lambda epochs: 0 < epochs < math.inf, "greater than 0"),
        ("loraxs_alpha", lambda alpha: 0 < alpha < math.inf, "greater than 0"),
        ("learning_rate", lambda rate: 0 <= rate < math.inf, "0 or greater"),
        ("classifier_learning_rate", lambda rate: 0 <= rate < math.inf, "0 or greater"),
        ("metric_for_best_model", lambda name: name.removeprefix("eval_") in metrics, one),
        ("keep_mnli_dense", lambda keep: not keep or task.mnli_adapter, "left out without mnli_adapter"),
        ("seeds", lambda seeds: seeds is None or seeds > 0, "1 or greater"),
    ):
        if not good(given[name]):
            raise ValueError(f"{name}: got {given[name]}, must be {must}")


def train_seeds(argv: list[str], task: Task, recipe: Recipe, shown: dict, data: tuple) -> dict[str, Any]:
    """Train seed after seed, each in a folder of its own; results.json holds those that are finished."""
    if recipe.resume_from_checkpoint or recipe.eval_strategy == "no":
        raise ValueError("resume_from_checkpoint, eval_strategy no: cannot be beside seeds, which resume by themselves")
    path, metric = Path(recipe.output_dir, "results.json"), recipe.metric_for_best_model.removeprefix("eval_")
    begun = any(path.parent.glob("seed-*"))  # asked first: another process may be writing both
    if begun and not path.exists():
        raise ValueError(f"output_dir: {path.parent} has folders of seeds and no results.json; must be another folder")
    files = [file for file in (task.train_file, task.validation_file, task.mnli_adapter) if file]
    shown = shown | {  # what else decides the results
        "global_batch": recipe.train_batch_size * recipe.gradient_accumulation_steps * recipe.world_size,
        "sha256": {file: sha256_of(Path(file)) for file in files if Path(file).is_file()},
    }
    state: dict[str, Any] = {"loraxs_glue": 1, "recipe": shown, "metric": metric, "runs": {}}
    if path.exists():
        state = read_json(path.read_bytes(), str(path))
        there = state.get("recipe", {})
        for name in [name for name in {**there, **shown} if there.get(name) != shown.get(name)]:
            was = f"{name} is {there.get(name)!r} there and {shown.get(name)!r} here"
            raise ValueError(f"output_dir: {path} is of another recipe ({was}); must be another folder")
    state["seeds"] = sorted({*map(int, state["runs"]), *range(recipe.seed, recipe.seed + task.seeds)})

    for seed in [seed for seed in state["seeds"] if str(seed) not in state["runs"]]:
        if recipe.process_index == 0:
            write_json(path, state)
        folder = path.parent / f"seed-{seed}"
        resumed = ["--resume_from_checkpoint", str(last)] if (last := last_checkpoint(folder)) else []
        print(f"seed {seed}, {'from ' + str(last) if last else 'from the start'}")
        own = parse([*argv, "--seed", str(seed), "--output_dir", str(folder), *resumed])
        found = train(*own[:2], *data)
        best = (max if own[1].greater_is_better else min)(found["epochs"], key=lambda epoch: epoch[metric])
        state["parameters"] = found["parameters"]
        state["runs"][str(seed)] = {"best": best[metric], "best_epoch": best["epoch"], "epochs": found["epochs"]}
    scores = [run["best"] for run in state["runs"].values()]
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    state |= {"median": statistics.median(scores), "standard_deviation": deviation}
    if recipe.process_index == 0:
        write_json(path, state)
    print(f"{path}: {len(scores)} seeds, the best {metric} of each: median {state['median']}, deviation {deviation}")
    return state


def write_json(path: Path, found: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; Trainer writes its state last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(task: Task, recipe: Recipe, training: list[tuple], validation: list[tuple], labels: int) -> dict[str, Any]:
    """One run; what came of it: the metrics of the best model, those of every epoch, and what trained."""
    set_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(task.model_name_or_path)
    model = attached(task, recipe, num_labels=labels)
    adapters = [layer for _, layer in adapted_layers(model)]
    head = sum(p.numel() for name in model.loraxs.modules_to_save for p in model.get_submodule(name).parameters())
    parameters = {"R": sum(layer.R.numel() for layer in adapters), "modules": len(adapters), "head": head}
    print(f"{parameters['R']:,} parameters in {len(adapters)} adapters train, {head:,} in the head")

    # A collator with a tokenizer would have it saved with every checkpoint.
    padded = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model=model,
        args=recipe,
        train_dataset=encode(training, tokenizer, task.max_length),
        eval_dataset=encode(validation, tokenizer, task.max_length),
        data_collator=lambda examples: padded(examples),
        compute_metrics=lambda prediction: metrics(task.task, prediction),
        optimizers=(optimizer(model, task, recipe), None),
    )
    LoraXSCallback().add_to(trainer)
    resume = recipe.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)

    if (best := trainer.state.best_model_checkpoint) and not Path(best).exists():  # Trainer only warns
        raise FileNotFoundError(f"{best}: the best checkpoint is not there; put it back, or train in another folder")
    trainer.save_state()
    kept = ("epoch", "loss", *TASKS[task.task].metrics)
    logged = [{key.removeprefix("eval_"): value for key, value in log.items()} for log in trainer.state.log_history]
    epochs = [{key: log[key] for key in kept} for log in logged if kept[-1] in log]

    result = trainer.evaluate()
    if trainer.is_world_process_zero():
        path = Path(recipe.output_dir, "adapter.safetensors")
        lx.save_adapter(model, path)
        write_json(path.with_name("result.json"), result)
        print(f"{path}: {path.stat().st_size:,} bytes; {result}")
    return {"result": result, "epochs": epochs, "parameters": parameters}


def attached(task: Task, recipe: Recipe, num_labels: int) -> torch.nn.Module:
    """A model with LoRA-XS and a new head: with a new R, or with R as it was trained on MNLI."""
    model = Model.from_pretrained(task.model_name_or_path, num_labels=num_labels)
    if not task.mnli_adapter:
        return lx.attach(
            model,
            task.loraxs_r,
            target_modules=task.loraxs_target_modules,
            alpha=task.loraxs_alpha,
            init=task.init,
            modules_to_save=task.classifier,
            seed=recipe.seed,
            device=recipe.device,
        )
    names, heads, _ = choose(model, task.loraxs_target_modules, None, task.classifier)
    # On its own A and B, whatever the seed is here: R means nothing on others.
    labels = TASKS["mnli"].labels
    start = Model.from_pretrained(task.model_name_or_path, num_labels=labels)
    load = load_reference_adapter if Path(task.mnli_adapter).is_dir() else lx.load_adapter
    load(start, task.mnli_adapter, device=recipe.device)
    found = {name: (layer.rank, layer.alpha) for name, layer in adapted_layers(start)}
    must = dict.fromkeys(names, (task.loraxs_r, task.loraxs_alpha))
    for name in [name for name in must | found if found.get(name) != must.get(name)]:
        raise ValueError(
            f"mnli_adapter: module {name!r} has rank and alpha {found.get(name)} there, must have {must.get(name)} by "
            "loraxs_target_modules, loraxs_r and loraxs_alpha (None: no adapter)"
        )
    for name in heads if task.keep_mnli_dense else ():
        if not hasattr(model.get_submodule(name), "dense") or name not in start.loraxs.modules_to_save:
            raise ValueError(f"keep_mnli_dense: module {name!r} has no layer `dense`, or the MNLI adapter has it not")
        model.get_submodule(f"{name}.dense").load_state_dict(start.get_submodule(f"{name}.dense").state_dict())
    for name in (*start.loraxs.modules_to_save, *heads):  # new in any case; those that train now are the task's
        start.set_submodule(name, model.get_submodule(name).requires_grad_(name in heads))
    start.loraxs = replace(start.loraxs, modules_to_save=tuple(heads))
    start.config, start.num_labels = model.config, num_labels
    return start


def check_start(task: Task) -> None:
    """That the MNLI adapter has the rank, alpha and init of the command line, before a model is loaded."""
    path, asked = Path(task.mnli_adapter), (task.loraxs_r, task.loraxs_alpha, task.init)
    if not path.exists():
        raise FileNotFoundError(f"mnli_adapter: there is no file or folder {path}")
    if path.is_dir():
        weights = [path / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
        if not (path / "adapter_config.json").is_file() or not any(file.is_file() for file in weights):
            must = "a folder of the reference's with adapter_config.json and adapter_model.safetensors or .bin"
            raise FileNotFoundError(f"mnli_adapter: got {path}, must be a file adapter.safetensors, or {must}")
        config = read_json((path / "adapter_config.json").read_bytes(), f"mnli_adapter: {path}")
        if (kind := config.get("peft_type")) != "LORA":  # as LORAXS, of PEFT with LoraXSConfig
            raise ValueError(f"mnli_adapter: {path} is of PEFT's type {kind}; the reference implementation's are LORA")
        found = {(config.get("r", 8), config.get("lora_alpha", 8), "svd")}
    else:
        layers = adapter_format.read(path)[0].values()
        inits = {"given": "svd", "sklearn": "svd"}  # of the reference
        found = {(e["rank"], e["alpha"], inits.get(e["recipe"].init, e["recipe"].init)) for e in layers}
    for r, alpha, init in found - {asked}:
        was = f"--loraxs_r {asked[0]} --loraxs_alpha {asked[1]:g} --init {asked[2]}"
        raise ValueError(f"mnli_adapter: {path} needs --loraxs_r {r} --loraxs_alpha {alpha} --init {init}, got {was}")


def optimizer(model: torch.nn.Module, task: Task, recipe: Recipe) -> torch.optim.Optimizer:
    heads = tuple(f"{name}." for name in model.loraxs.modules_to_save)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if name.startswith(heads)]
    R = [p for name, p in trained if not name.startswith(heads)]
    groups = [{"params": R, "lr": recipe.learning_rate}, {"params": head, "lr": task.classifier_learning_rate}]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(recipe)
    return kind(groups, **options | {"weight_decay": recipe.weight_decay})


def read_data(task: Task) -> tuple[list[tuple], list[tuple], int]:
    """Rows for training and validation, texts and a label that is an index or a number; how many labels there are."""
    glue, files = TASKS[task.task], {"train_file": task.train_file, "validation_file": task.validation_file}
    if any(files.values()):
        splits = {f"{name}: {path}": read_records(path, name) for name, path in files.items()}
    else:
        from datasets import load_dataset

        found = load_dataset(task.dataset, task.task)
        names = ("train", "validation_matched" if task.task == "mnli" else "validation")
        splits = {f"dataset: {task.dataset}, {name}": list(found[name]) for name in names}
    training, validation = (rows_of(where, records, glue) for where, records in splits.items())
    if not glue.labels:
        if len(validation) < 2:
            raise ValueError(f"{[*splits][1]} has 1 record, must have 2 or more: {glue.metrics[0]} needs them")
        return training, validation, 1
    (first, second), (known, others) = splits, ({label for *_, label in rows} for rows in (training, validation))
    # What begins with "not" comes first, so that F1, as GLUE has it, is of the other one.
    classes = sorted(known, key=lambda label: (not label.startswith("not"), label))
    if len(classes) != glue.labels:
        shown = ", ".join(map(repr, classes[:9]))
        raise ValueError(f"{first} has labels {shown}, must have {glue.labels} different ones for {task.task}")
    if new := sorted(others - known):
        raise ValueError(f"{second} has label {new[0]!r}, must have those of the training data: {', '.join(classes)}")
    indexed = ([(*texts, classes.index(label)) for *texts, label in rows] for rows in (training, validation))
    return *indexed, glue.labels


def read_records(name: str | None, argument: str) -> list:
    if not name:
        raise ValueError(f"{argument}: got none, must be given where the other file is")
    if not (path := Path(name)).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".csv", ".tsv"):
            how = {"strict": True} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            return list(csv.DictReader(io.StringIO(text, newline=""), **how))
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{argument}: {path} cannot be read as {path.suffix or 'JSON'} ({error})") from error


def rows_of(where: str, records: list, glue: paper.GlueTask) -> list[tuple]:
    """Texts and label of every record; the label as text, so that numbers and names in any file are the same."""
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{where} has no records, or some without columns")
    known = [glue.columns, ("sentence1", "sentence2")][: len(glue.columns)]
    columns = next((each for each in known if {*each, "label"} <= records[0].keys()), None)
    if columns is None:
        got, must = (", ".join(map(str, each)) for each in (records[0], glue.columns))
        raise ValueError(f"{where} has columns {got}, must have {must} and label")
    rows = []
    for i, record in enumerate(records, 1):
        *texts, label = (record.get(column) for column in (*columns, "label"))
        if None in record or not all(isinstance(text, str) for text in texts):  # None: more cells than the header has
            raise ValueError(f"{where}: record {i} is {record}, must have a text for each of {', '.join(columns)}")
        try:
            value = str(label) if glue.labels else float(label)
        except (TypeError, ValueError):
            value = math.nan
        good = value not in ("", "None", "nan", "-1", "-1.0") if glue.labels else 0 <= value <= 5
        if not good:
            must = f"one of {glue.labels}" if glue.labels else "a number from 0 to 5"
            raise ValueError(
                f"{where}: record {i} has label {label!r}, must be {must}; -1 stands for a hidden one in GLUE"
            )
        rows.append((*texts, value))
    return rows


def encode(rows: list[tuple], tokenizer: Any, max_length: int) -> list[dict]:
    *texts, labels = map(list, zip(*rows, strict=True))
    tokens = tokenizer(*texts, truncation=True, max_length=max_length)
    return [{key: tokens[key][i] for key in tokens} | {"labels": label} for i, label in enumerate(labels)]


def metrics(task: str, prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    if task == "stsb":
        values = np.squeeze(logits, -1)
        found = {"pearson": pearsonr(values, labels)[0], "spearman": spearmanr(values, labels)[0]}
        return {name: float(np.nan_to_num(value)) for name, value in found.items()}  # of a constant: 0, as Matthews
    classes = np.argmax(logits, -1)
    if task == "cola":
        return {"matthews": float(matthews_corrcoef(labels, classes))}
    result = {"accuracy": float(accuracy_score(labels, classes))}
    return result | ({"f1": float(f1_score(labels, classes))} if "f1" in TASKS[task].metrics else {})


if __name__ == "__main__":
    main()
