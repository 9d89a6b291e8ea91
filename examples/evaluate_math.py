r"""The accuracy of a causal language model on GSM8K or MATH, asked and scored as in MetaMath's evaluation.

    python examples/evaluate_math.py --task gsm8k --data gsm8k_test.jsonl \
        --model_name_or_path mistralai/Mistral-7B-v0.1 --adapter out/adapter.safetensors --merge true \
        --output gsm8k.json

The data are a .json, .jsonl or .parquet file.  GSM8K's records have question and answer (or query and response), and
the answer ends in "#### 7"; MATH's have problem and solution (or instruction and output), with \boxed{7}.  Without
--data they are loaded from the Hub.  --adapter is a file of lx.save_adapter or a folder that PEFT has saved; without
it the model is evaluated as it is.

    --engine transformers           greedy generation in batches, the default
    --engine harness                the same problems as a task of EleutherAI's harness (pip install lm_eval)
    --engine harness --harness_tasks gsm8k minerva_math         the harness's own tasks, by name
    --engine endpoint --endpoint http://localhost:8000 --served_model alice     a server with /v1/completions

--output gets the accuracy and every answer as JSON, and keeps what is done when a run is stopped: --resume true goes on
from there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from math_answers import EXPECTED, MARK, scored
from math_engines import ENGINE, cut, own_tasks_of_harness
from tqdm import tqdm
from train_causal_lm import DTYPES, PROMPT, read_records
from transformers import HfArgumentParser

from loraxs_kernels import adapter_format
from loraxs_kernels.files import read_json, sha256_of, target_of, write_atomically

TASKS = ("gsm8k", "math")
FIELDS = {
    "gsm8k": (("question", "answer"), ("query", "response")),
    "math": (("problem", "solution"), ("instruction", "output")),
}
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")
HUB = {"gsm8k": ("openai/gsm8k", ("main",)), "math": ("EleutherAI/hendrycks_math", (*SUBJECTS, "precalculus"))}
STEP_BY_STEP = " Let's think step by step."
MAX_NEW_TOKENS = {"gsm8k": 1024, "math": 2048}


@dataclass
class Options:
    task: str = field(default="", metadata={"help": "gsm8k or math"})
    data: str | None = field(default=None, metadata={"help": "a .json, .jsonl or .parquet file; else from the Hub"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "a folder, or a name on the Hub"})
    adapter: str | None = field(default=None, metadata={"help": "a file of lx.save_adapter, or a folder of PEFT's"})
    merge: bool = field(default=False, metadata={"help": "add the adapter to the weights before generating"})
    dtype: str = field(default="auto", metadata={"help": f"{', '.join(DTYPES)}; auto: bfloat16 on GPUs that have it"})
    batch_size: int = field(default=16, metadata={"help": "problems at a time; for an endpoint, requests"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "by default 1024 for gsm8k, 2048 for math"})
    step_by_step: bool = field(default=True, metadata={"help": f"end the prompt in {STEP_BY_STEP.strip()!r}"})
    limit: int | None = field(default=None, metadata={"help": "the first so many problems"})
    output: str | None = field(default=None, metadata={"help": "a .json file for the accuracy and every answer"})
    resume: bool = field(default=False, metadata={"help": "go on with what is in output"})
    engine: str = field(default="transformers", metadata={"help": ", ".join(ENGINE)})
    endpoint: str | None = field(default=None, metadata={"help": "http://host:port of an OpenAI-compatible server"})
    served_model: str | None = field(default=None, metadata={"help": "the name of the model, or adapter, there"})
    harness_tasks: list[str] = field(default_factory=list, metadata={"help": "the harness's own tasks, by name"})

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        if self.engine not in ENGINE:
            raise ValueError(f"engine: got {self.engine!r}, must be {', '.join(ENGINE)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, must be {', '.join(DTYPES)}")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, must be at least 1")
        served = self.engine == "endpoint"
        self._need(served, "endpoint", "served_model", why=f"--engine {self.engine}")
        self._need(not served, "model_name_or_path", why=f"--engine {self.engine}")
        if served:
            self._refuse("adapter", "merge", "dtype", why="--engine endpoint: they are the server's")
            if not re.match(r"https?://[^/]", self.endpoint):
                raise ValueError(f"endpoint: got {self.endpoint!r}, must begin with http:// or https:// and a host")
        if self.harness_tasks:
            if self.engine != "harness":
                raise ValueError(
                    f"harness_tasks: got {self.harness_tasks} with --engine {self.engine}, must be harness"
                )
            self._refuse("task", "data", "max_new_tokens", "step_by_step", "resume", why="--harness_tasks")
        elif self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, must be {' or '.join(TASKS)}")
        if self.merge and not self.adapter:
            raise ValueError("merge: got true without an adapter; must be false, or --adapter given")
        if self.engine == "harness" and importlib.util.find_spec("lm_eval") is None:
            raise ValueError("engine: harness is not installed; pip install lm_eval")
        if self.resume and not self.output:
            raise ValueError("resume: got true without an output file to go on with")
        if self.output and target_of(self.output, "output").exists() and not self.resume:
            raise ValueError(f"output: {self.output} exists; must be a new file, or --resume true goes on with it")
        if self.adapter:
            check_adapter(Path(self.adapter))
        if self.max_new_tokens is None and not self.harness_tasks:
            self.max_new_tokens = MAX_NEW_TOKENS[self.task]

    def _need(self, needed: bool, *names: str, why: str) -> None:
        for name in names:
            if needed != bool(getattr(self, name)):
                raise ValueError(f"{name}: {'must be given' if needed else 'cannot be used'} with {why}")

    def _refuse(self, *names: str, why: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}: cannot be used with {why}")


def check_adapter(path: Path) -> None:
    """FileNotFoundError or ValueError where this is no adapter, or a damaged one."""
    if path.is_dir():
        if not (path / "adapter_config.json").is_file() or not list(path.glob("adapter_model.*")):
            raise FileNotFoundError(
                f"adapter: the folder {path} has no adapter_config.json and adapter_model.*; must be a folder of "
                "PEFT's, or a file of lx.save_adapter"
            )
        read_json((path / "adapter_config.json").read_bytes(), f"adapter: {path / 'adapter_config.json'}")
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"adapter: the folder {path} is PEFT's, which is not installed; pip install peft")
    elif path.is_file():
        adapter_format.read(path)
    else:
        raise FileNotFoundError(f"adapter: there is no file or folder {path}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate, print the accuracy and return what `output` gets."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    if options.harness_tasks:
        found = own_tasks_of_harness(options)
        result = {"settings": settings(options), "results": found["results"], "versions": found["versions"]}
        if options.output:
            write_json(options.output, result)
        return result
    problems = read_problems(options)
    report = Report(options, problems)
    todo = {i: problem for i, problem in enumerate(problems) if i not in report.rows}
    try:
        if todo:
            bar = tqdm(total=len(problems), initial=len(report.rows), desc=options.task, unit="problem")
            with bar, closing(ENGINE[options.engine](todo, options)) as answers:
                for i, completion in answers:
                    report.add(i, completion)
                    bar.update()
    finally:  # also where the run is stopped
        if report.rows:
            report.write()
    result = report.result()
    print(
        f"{options.task}: {result['correct']} of {result['number']} right, accuracy {100 * result['accuracy']:.2f} %; "
        f"{result['without_answer']} without {MARK.strip()!r}"
    )
    return result


# The problems, and what becomes of the answers


def read_problems(options: Options) -> list[dict[str, Any]]:
    """Prompt and expected answer of each problem; ValueError, naming the record, where there is none."""
    if options.data is None:
        from datasets import load_dataset

        name, parts = HUB[options.task]
        records = [record for part in parts for record in load_dataset(name, part, split="test")]
    else:
        records = read_records(Path(options.data), "data")
    problems = []
    for i, record in enumerate(records[: options.limit]):
        where = f"data: record {i}"
        found = [pair for pair in FIELDS[options.task] if record.keys() >= set(pair)]
        if not found:
            must = " or ".join(" and ".join(pair) for pair in FIELDS[options.task])
            raise ValueError(f"{where} has {', '.join(record)}; for --task {options.task} it must have {must}")
        for name in found[0]:
            if not isinstance(record[name], str):
                raise ValueError(f"{where}: {name!r} is {record[name]!r}, must be text")
        question, answer = (record[name] for name in found[0])
        expected, must = EXPECTED[options.task](answer)
        if expected is None:
            raise ValueError(f"{where}: {found[0][1]!r} has no answer: it ends in {answer[-60:]!r}, must have {must}")
        prompt = PROMPT.format(question) + (STEP_BY_STEP if options.step_by_step else "")
        problems.append({"question": question, "prompt": prompt, "expected": expected})
    return problems


class Report:
    """The answers so far, and the file that they are written to."""

    def __init__(self, options: Options, problems: list[dict[str, Any]]) -> None:
        self.options, self.problems = options, problems
        self.rows: dict[int, dict[str, Any]] = {}
        self.settings = settings(options) | {"problems_sha256": digest(problems)}
        if options.adapter:
            path = Path(options.adapter)
            files = sorted(path.glob("adapter_*")) if path.is_dir() else [path]
            self.settings["adapter_sha256"] = digest([sha256_of(file) for file in files])
        if options.resume and Path(options.output).exists():
            self._resume(read_json(Path(options.output).read_bytes(), f"output: {options.output}"))

    def _resume(self, earlier: dict[str, Any]) -> None:
        there = earlier.get("settings")
        if not isinstance(there, dict) or not isinstance(earlier.get("problems"), list):
            raise ValueError(f"output: {self.options.output} is no result of this script, cannot go on with it")
        for key in (self.settings.keys() | there.keys()) - {"batch_size"}:
            if self.settings.get(key) != there.get(key):
                raise ValueError(
                    f"resume: {self.options.output} was made with {key} {there.get(key)!r}, this run has "
                    f"{self.settings.get(key)!r}; must be the same, or another output file"
                )
        for row in earlier["problems"]:
            try:
                self.add(range(len(self.problems)).index(row["index"]), row["completion"], write=False)
            except (TypeError, ValueError, LookupError) as error:
                raise ValueError(f"output: {self.options.output} is damaged, it has {row!r} for a problem") from error

    def add(self, i: int, completion: str, write: bool = True) -> None:
        problem, task = self.problems[i], self.options.task
        completion = cut(completion)
        extracted, correct = scored(task, completion, problem["expected"])
        self.rows[i] = {
            "index": i,
            "question": problem["question"],
            "completion": completion,
            "extracted": extracted,
            "expected": problem["expected"],
            "correct": correct,
        }
        if write and len(self.rows) % self.options.batch_size == 0:
            self.write()

    def result(self) -> dict[str, Any]:
        rows = [self.rows[i] for i in sorted(self.rows)]
        correct = sum(row["correct"] for row in rows)
        return {
            "task": self.options.task,
            "accuracy": correct / len(rows) if len(rows) == len(self.problems) else None,
            "number": len(self.problems),
            "done": len(rows),
            "correct": correct,
            "without_answer": sum(MARK not in row["completion"] for row in rows),
            "settings": self.settings,
            "problems": rows,
        }

    def write(self) -> None:
        if self.options.output:
            readable = len(self.rows) == len(self.problems)  # which takes json long, too long after every batch
            write_json(self.options.output, self.result(), indent=1 if readable else None)


def settings(options: Options) -> dict[str, Any]:
    """The options that decide the result."""
    return {key: value for key, value in asdict(options).items() if key not in ("output", "resume")}


def write_json(path: str, result: dict[str, Any], indent: int | None = 1) -> None:
    write_atomically(path, json.dumps(result, indent=indent).encode())


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    main()
