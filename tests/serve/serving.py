"""What the tests of serving share: a server and its answers, and our own layers to compare them with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
START = 240  # seconds that a server may take to start on two busy cores
PATIENCE = 120  # seconds that an answer may take


def environment(bank: Path | None, **more: str) -> dict[str, str]:
    """Of a process with vLLM in it: nothing from the network, and two threads at most."""
    own = {"LORAXS_BANK", "LORAXS_BASIS", "LORAXS_TOKEN", "VLLM_PLUGINS"}
    found = {name: value for name, value in os.environ.items() if name not in own}
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
    return found | ({} if bank is None else {"LORAXS_BANK": str(bank)}) | more


@dataclass
class Answer:
    """What a model said: the adapter (None: the base model), the prompt's and the answer's tokens."""

    name: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str = ""


class Layers:
    """Our own layers: the bank on transformers' model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def compare(self, answers: Sequence[Answer], names: Sequence[str | None] | None = None) -> tuple[Any, Any]:
        """Of every token of the answers: how far its log-probability is from ours, and ours from that of our choice.

        names: of the adapters to compare with, where not those of the answers.
        """
        names = [answer.name for answer in answers] if names is None else names
        rows = [answer.prompt + answer.tokens for answer in answers]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # what is right of a row it does not see
        for row, known in zip(ids, rows, strict=True):
            row[: len(known)] = torch.tensor(known)
        logits = self.model(ids, use_cache=False, adapter_ids=list(names)).logits.float()
        differences, behind = [], []
        for answer, row in zip(answers, logits.log_softmax(-1), strict=True):
            first = len(answer.prompt) - 1
            ours = row[first : first + len(answer.tokens)]
            chosen = ours.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            differences.append((chosen - torch.tensor(answer.logprobs)).abs())
            behind.append(ours.max(1).values - chosen)
        return torch.cat(differences), torch.cat(behind)


class Offline(RuntimeError):
    """A process of offline.py ended with an error; the message is what it printed."""


def offline(model: Path, bank: Path | None, jobs: Sequence[tuple[str | None, list[int]]], max_tokens: int = 16, **options: Any) -> list[Answer]:
    request = {"model": str(model), "options": options, "max_tokens": max_tokens, "jobs": list(jobs)}
    run = [sys.executable, str(Path(__file__).with_name("offline.py"))]
    done = ended(run, json.dumps(request), environment(bank))
    if done.returncode:
        raise Offline(done.stderr)
    return [Answer(*job, **answer) for job, answer in zip(jobs, json.loads(done.stdout), strict=True)]


def ended(command: Sequence[str], given: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    """A command that came to its end within START, and with it whatever it had started."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(given, timeout=START)
        finally:
            end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen) -> None:
    """Kill what is left of a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
