"""Instruction tuning of a causal language model with LoRA-XS: by default the recipe of the paper's MetaMathQA runs.

    python examples/train_causal_lm.py --model_name_or_path mistralai/Mistral-7B-v0.1 \
        --data_path MetaMathQA-395K.json --data_fields query response --loraxs_r 64 --output_dir out

The data are a file, or a folder of files, of JSON (an array, or an object a line) or parquet.  Every option of
transformers' TrainingArguments works; --resume_from_checkpoint true continues where a run was stopped.

With several processes, put one of these in place of `python`; docs/parallel.md has a DeepSpeed configuration:

    torchrun --nproc_per_node 8 examples/train_causal_lm.py ...
    accelerate launch --multi_gpu --num_processes 8 examples/train_causal_lm.py ...
    deepspeed --num_gpus 8 examples/train_causal_lm.py --deepspeed zero.json ...

An optimizer step takes 128 examples however many processes there are: gradient_accumulation_steps is what remains of
128 after per_device_train_batch_size and the number of processes, unless it is given.

The adapter is saved to output_dir/adapter.safetensors:

    model = AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1", dtype=torch.bfloat16)
    lx.load_adapter(model, "out/adapter.safetensors")
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

import loraxs_kernels as lx
from loraxs_kernels.integrations.transformers import LoraXSCallback
from loraxs_kernels.paper import TABLES

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
IGNORED = -100  # a label that has no part in the loss
PAPER = TABLES["instruction"]  # its appendix A.2
GLOBAL_BATCH = PAPER["global_batch"]  # examples in an optimizer step, of all processes
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Task:
    model_name_or_path: str = field(metadata={"help": "a folder, or a name on the Hugging Face Hub"})
    data_path: str = field(metadata={"help": "a .json, .jsonl or .parquet file, or a folder of them"})
    data_fields: list[str] = field(
        default_factory=lambda: ["query", "response"],
        metadata={"help": "the names of the instruction and of the response; GSM8K's are question answer"},
    )
    max_samples: int = field(
        default=PAPER["max_samples"], metadata={"help": "how many examples to take, from the first on"}
    )
    max_length: int = field(default=512, metadata={"help": "in tokens; what is longer is cut"})
    dtype: str = field(default="auto", metadata={"help": "of the frozen weights; auto: bfloat16 on GPUs that have it"})
    loraxs_r: int = field(default=PAPER["loraxs_r"], metadata={"help": "rank: R is r x r"})
    loraxs_alpha: float | None = field(
        default=PAPER["loraxs_alpha"], metadata={"help": "s = alpha / r; by default alpha = r"}
    )
    loraxs_dropout: float = 0.0
    loraxs_target_modules: list[str] = field(
        default_factory=lambda: list(PAPER["loraxs_target_modules"]),
        metadata={"help": "names of modules, or all-linear"},
    )
    show_recipe: bool = field(default=False, metadata={"help": "print what would run, as a JSON object, and stop"})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, must be {', '.join(DTYPES)}")
        for name in ("max_samples", "max_length"):  # of -1 samples the last would be left out
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: got {value}, must be at least 1")
        if len(self.data_fields) != 2:
            raise ValueError(f"data_fields: got {self.data_fields}, must be two names")


@dataclass
class Recipe(TrainingArguments):
    """TrainingArguments with the paper's values: batches of 128, AdamW with cosine decay and no weight decay."""

    learning_rate: float = PAPER["learning_rate"]
    lr_scheduler_type: str = PAPER["lr_scheduler_type"]
    warmup_ratio: float = field(
        default=PAPER["warmup_ratio"], metadata={"help": "the part of the steps in which the rate rises"}
    )
    weight_decay: float = 0.0
    num_train_epochs: float = PAPER["num_train_epochs"]
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "by default what makes the batches of all processes 128 examples together"}
    )
    logging_steps: float = 1
    save_steps: float = 100
    save_total_limit: int | None = 5

    def __post_init__(self) -> None:
        if all(f.name != "warmup_ratio" for f in fields(TrainingArguments)) and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # transformers 5 takes either there
        if self.gradient_accumulation_steps is None:  # before DeepSpeed's "auto" is filled in from it
            self.gradient_accumulation_steps = accumulation(self.per_device_train_batch_size, replicas(self))
        super().__post_init__()

    @property
    def global_batch(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * replicas(self)


def replicas(recipe: TrainingArguments) -> int:
    """How many batches are computed at a time: one a process, or one a GPU where one process has several."""
    _ = recipe.device  # which joins the processes that are counted here
    return max(1, recipe.n_gpu) * recipe.world_size


def accumulation(per_device: int, replicas: int) -> int:
    """gradient_accumulation_steps with which an optimizer step takes GLOBAL_BATCH examples."""
    if per_device < 1 or GLOBAL_BATCH % (per_device * replicas):
        raise ValueError(
            f"per_device_train_batch_size: got {per_device}, with {replicas} processes or GPUs; their product must "
            f"divide {GLOBAL_BATCH}, the recipe's batch. Change either, or choose another batch by "
            "gradient_accumulation_steps"
        )
    return GLOBAL_BATCH // (per_device * replicas)


def main(argv: Sequence[str] | None = None) -> None:
    task, recipe = HfArgumentParser((Task, Recipe)).parse_args_into_dataclasses(argv)
    main_process = recipe.process_index == 0
    say = print if main_process else lambda text: None
    if task.show_recipe:
        say(json.dumps(shown(task, recipe), indent=1))
        return
    set_seed(recipe.seed)

    tokenizer = AutoTokenizer.from_pretrained(task.model_name_or_path)
    records = read_records(Path(task.data_path))[: task.max_samples]
    data = encode(records, task, tokenizer)
    say(f"{len(data)} examples; {len(records) - len(data)} left out, whose prompts leave no room for a response")

    model = AutoModelForCausalLM.from_pretrained(task.model_name_or_path, dtype=chosen_dtype(task.dtype))
    lx.attach(
        model,
        task.loraxs_r,
        target_modules="all-linear" if task.loraxs_target_modules == ["all-linear"] else task.loraxs_target_modules,
        alpha=task.loraxs_alpha,
        dropout=task.loraxs_dropout,
        seed=recipe.seed,
        device=recipe.device,
        progress=main_process,
    )
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}  # ZeRO-3 leaves each empty
    say(f"{sum(n for p, n in sizes.items() if p.requires_grad):,} of {sum(sizes.values()):,} parameters train")
    say(
        f"an optimizer step takes {recipe.global_batch} examples: {recipe.per_device_train_batch_size} a batch, "
        f"{recipe.gradient_accumulation_steps} batches one after the other, {replicas(recipe)} at a time"
    )

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = Trainer(model=model, args=recipe, train_dataset=data, data_collator=functools.partial(collate, pad=pad))
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        raise ValueError('fsdp: got FSDP1, which cannot save an adapter; must be FSDP2 ("version": 2 in fsdp_config)')
    sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    if not sharded:  # else Trainer writes its own checkpoints, the only ones that can be resumed there
        LoraXSCallback().add_to(trainer)
    resume = recipe.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_state()

    path = Path(recipe.output_dir, "adapter.safetensors")
    if main_process:
        lx.save_adapter(model, path)
        print(f"{path}: {path.stat().st_size:,} bytes")
    elif sharded:  # every process has a part of R to give
        with tempfile.TemporaryDirectory() as folder:
            lx.save_adapter(model, Path(folder, path.name))


def shown(task: Task, recipe: Recipe) -> dict[str, Any]:
    """What would run: the task, the batch of an optimizer step, and all of TrainingArguments that is not None."""
    ours = {key: value for key, value in asdict(task).items() if key != "show_recipe"}
    theirs = {key: value for key, value in recipe.to_dict().items() if value is not None}
    return {**ours, "global_batch": recipe.global_batch, **theirs}


def read_records(path: Path, argument: str = "data_path") -> list[dict]:
    """All records of a file, or of the files of a folder in the order of their names.

    Raises FileNotFoundError and ValueError, naming the argument and the file, where there are none.
    """
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in (".json", ".jsonl", ".parquet"))
        if not files:
            raise FileNotFoundError(f"{argument}: there is no .json, .jsonl or .parquet file in {path}")
        return [record for each in files for record in read_records(each, argument)]
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file or folder {path}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            records = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            whole = text.lstrip().startswith("[")
            records = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} cannot be read as JSON or parquet: {error}") from error
    if not records:
        raise ValueError(f"{argument}: {path} has no records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{argument}: record {i} of {path} is a {type(record).__name__}, must be an object")
    return records


def encode(records: list[dict], task: Task, tokenizer: Any) -> list[dict]:
    """Tokens of prompt, response and end; the loss is on the response and its end alone."""
    for i, record in enumerate(records):
        if absent := [name for name in task.data_fields if name not in record]:
            raise ValueError(f"data_fields: record {i} has no field {absent[0]!r}; it has {', '.join(record)}")
        for name in task.data_fields:
            if not isinstance(record[name], str):
                raise ValueError(f"data_fields: {name!r} of record {i} is {record[name]!r}, must be text")
    instruction, response = task.data_fields
    prompts = [PROMPT.format(record[instruction]) for record in records]
    # Each with its response in one piece: some tokenizers begin every text with a space.
    texts = tokenizer([prompt + record[response] for prompt, record in zip(prompts, records, strict=True)])["input_ids"]
    examples = []
    for prompt, text in zip(tokenizer(prompts)["input_ids"], texts, strict=True):
        if len(prompt) < task.max_length:
            ids = [*text, tokenizer.eos_token_id][: task.max_length]
            examples.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if not examples:
        raise ValueError(f"max_length: got {task.max_length}, must leave room for a response; every prompt is longer")
    return examples


def collate(examples: list[dict], pad: int) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def chosen_dtype(name: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


if __name__ == "__main__":
    main()
