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
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from math_answers import EXPECTED, MARK, scored
from tqdm import tqdm
from train_causal_lm import DTYPES, PROMPT, chosen_dtype, read_records
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    StoppingCriteria,
)

import loraxs_kernels as lx
from loraxs_kernels import adapter_format
from loraxs_kernels.files import read_json, sha256_of, target_of, write_atomically

TASKS = ("gsm8k", "math")
ENGINES = ("transformers", "harness", "endpoint")
FIELDS = {"gsm8k": (("question", "answer"), ("query", "response"))}
FIELDS["math"] = (("problem", "solution"), ("instruction", "output"))
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")
HUB = {"gsm8k": ("openai/gsm8k", ("main",)), "math": ("EleutherAI/hendrycks_math", (*SUBJECTS, "precalculus"))}
STEP_BY_STEP = " Let's think step by step."
STOPS = ("Instruction:", "Instruction", "Response:", "Response")
MAX_NEW_TOKENS = {"gsm8k": 1024, "math": 2048}

Problems = dict[int, dict[str, Any]]  # question, prompt and expected answer, by the number of the record


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
    engine: str = field(default="transformers", metadata={"help": ", ".join(ENGINES)})
    endpoint: str | None = field(default=None, metadata={"help": "http://host:port of an OpenAI-compatible server"})
    served_model: str | None = field(default=None, metadata={"help": "the name of the model, or adapter, there"})
    harness_tasks: list[str] = field(default_factory=list, metadata={"help": "the harness's own tasks, by name"})

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        if self.engine not in ENGINES:
            raise ValueError(f"engine: got {self.engine!r}, must be {', '.join(ENGINES)}")
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
        return harness_tasks(options)
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
        self.settings = {key: value for key, value in asdict(options).items() if key not in ("output", "resume")}
        self.settings["problems_sha256"] = digest(problems)
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


def write_json(path: str, result: dict[str, Any], indent: int | None = 1) -> None:
    write_atomically(path, json.dumps(result, indent=indent).encode())


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# Engines: each takes {index: problem} and yields (index, completion), in any order


def load(problems: Problems, options: Options) -> tuple[Any, Any, dict[int, int]]:
    """The model, attached or merged, its tokenizer, and the number of tokens of each prompt.

    ValueError, before the weights are loaded, where a prompt and its answer are too long for the model.
    """
    name = options.model_name_or_path
    # A decoder's prompts end at the same place, where the answers begin.
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", clean_up_tokenization_spaces=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    lengths = {i: len(tokenizer(problem["prompt"])["input_ids"]) for i, problem in problems.items()}
    positions = getattr(AutoConfig.from_pretrained(name).get_text_config(), "max_position_embeddings", None)
    longest = max(lengths.values(), default=0)
    if positions and lengths and longest + options.max_new_tokens > positions:
        raise ValueError(
            f"max_new_tokens: got {options.max_new_tokens}; the longest prompt has {longest} tokens and {name} has "
            f"{positions} positions, so it must be at most {positions - longest}"
        )
    model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen_dtype(options.dtype))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    said = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}
    # Greedy, and nothing else that the model's own generation_config may ask for, such as a repetition penalty.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id
    )
    if options.adapter and Path(options.adapter).is_dir():
        from peft import PeftModel

        import loraxs_kernels.integrations.peft  # noqa: F401  its method, which PEFT then knows

        model = PeftModel.from_pretrained(model, options.adapter)
        if options.merge:
            model = model.merge_and_unload()
    elif options.adapter:
        lx.load_adapter(model, options.adapter)
        if options.merge:
            lx.detach(model, merge=True)
    return model.eval(), tokenizer, lengths


def with_transformers(problems: Problems, options: Options) -> Iterator[tuple[int, str]]:
    """In batches of prompts of about the same length, the longest first."""
    model, tokenizer, lengths = load(problems, options)
    order = sorted(problems, key=lengths.__getitem__, reverse=True)
    for first in range(0, len(order), options.batch_size):
        batch = order[first : first + options.batch_size]
        padded = tokenizer([problems[i]["prompt"] for i in batch], padding=True, return_tensors="pt").to(model.device)
        start = padded["input_ids"].shape[1]
        made = model.generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            stopping_criteria=[Stopped(tokenizer, start)],
        )
        yield from zip(batch, tokenizer.batch_decode(made[:, start:], skip_special_tokens=True), strict=True)


class Stopped(StoppingCriteria):
    """Ends each row of a batch at the first stop string after its prompt."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # A token may be a single byte, and the one before the stop string half a character.
        recent = input_ids[:, max(self.start, input_ids.shape[1] - max(map(len, STOPS)) - 4) :]
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=True)
        return torch.tensor([cut(text) != text for text in texts], device=input_ids.device)


def cut(completion: str) -> str:
    """The text before the first stop string."""
    return re.split("|".join(map(re.escape, STOPS)), completion, maxsplit=1)[0]


def with_harness(problems: Problems, options: Options) -> Iterator[tuple[int, str]]:
    """As a task of lm-evaluation-harness with these prompts and scores; its table is printed, too."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    def process_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
        return {"acc": float(scored(options.task, cut(answers[0]), problems[doc["index"]]["expected"])[1])}

    task = {
        "task": f"{options.task}_metamath",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"index": i} for i in problems])},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: problems[doc["index"]]["prompt"],
        "doc_to_target": lambda doc: str(problems[doc["index"]]["expected"]),
        "process_results": process_results,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": list(STOPS), "max_gen_toks": options.max_new_tokens, "do_sample": False},
    }
    model, tokenizer, lengths = load(problems, options)
    room = max(lengths.values()) + options.max_new_tokens  # else it cuts prompts at its own idea of the longest
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=room)
    found = simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
    print(make_table(found))
    for sample in found["samples"][task["task"]]:
        yield sample["doc"]["index"], sample["filtered_resps"][0]


def harness_tasks(options: Options) -> dict[str, Any]:
    """The harness's own tasks, with their data from the Hub, their prompts and their scores."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager()
    if unknown := [name for name in options.harness_tasks if name not in manager.all_tasks]:
        raise ValueError(f"harness_tasks: the harness has no {unknown[0]!r}; `lm_eval ls tasks` lists its tasks")
    model, tokenizer, _ = load({}, options)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    found = simple_evaluate(
        lm, tasks=options.harness_tasks, task_manager=manager, limit=options.limit, log_samples=False
    )
    print(make_table(found))
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "resume")}
    result = {"settings": settings, "results": found["results"], "versions": found["versions"]}
    if options.output:
        write_json(options.output, result)
    return result


def with_endpoint(problems: Problems, options: Options) -> Iterator[tuple[int, str]]:
    """From an OpenAI-compatible server, batch_size requests at a time; the first error ends it."""
    with ThreadPoolExecutor(options.batch_size) as pool:
        asked = {pool.submit(ask, problem["prompt"], i, options): i for i, problem in problems.items()}
        try:
            for answered in as_completed(asked):
                yield asked[answered], answered.result()
        finally:
            pool.shutdown(cancel_futures=True)


def ask(prompt: str, i: int, options: Options) -> str:
    base = options.endpoint.rstrip("/")
    url = f"{base}{'' if base.endswith('/v1') else '/v1'}/completions"
    body = {"model": options.served_model, "prompt": prompt, "temperature": 0, "stop": list(STOPS)}
    body["max_tokens"] = options.max_new_tokens
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = response.read(2**26)
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise ConnectionError(f"endpoint: {url} answered problem {i} by status {error.code}: {said}") from error
    except (OSError, HTTPException) as error:  # no such host, a connection that breaks, no answer for 10 minutes
        raise ConnectionError(f"endpoint: {url} does not answer problem {i}: {error}") from error
    try:
        text = json.loads(answer)["choices"][0]["text"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ConnectionError(
            f"endpoint: {url} answered problem {i} by {answer[:200]!r}, must be JSON with choices[0].text, as of "
            "/v1/completions"
        )
    return text


ENGINE = {"transformers": with_transformers, "harness": with_harness, "endpoint": with_endpoint}


if __name__ == "__main__":
    main()
