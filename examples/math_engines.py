"""The engines of evaluate_math.py: each answers problems with a model, by transformers, the harness or a server.

An engine takes {index: problem} and the Options of evaluate_math.py, and yields (index, completion) in any order.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from math_answers import scored
from train_causal_lm import chosen_dtype
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria

import loraxs_kernels as lx

if TYPE_CHECKING:
    from evaluate_math import Options

STOPS = ("Instruction:", "Instruction", "Response:", "Response")

Problems = dict[int, dict[str, Any]]  # question, prompt and expected answer, by the number of the record


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


def own_tasks_of_harness(options: Options) -> dict[str, Any]:
    """What the harness finds for tasks of its own, with its data from the Hub, its prompts and its scores."""
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
    return found


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
