"""What both demos train with: batches of similar length, AdamW with warm-up and linear decay, and prediction."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from .report import say
from .trec import Question

POOL = 16  # batches among which questions are sorted by length: little padding, and still a different mix every epoch
EVALUATION_BATCH = 64
REPORT_EVERY = 25


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `steps` of `batch` questions, `lr` reached after `warmup` steps, then linear to zero."""

    steps: int
    batch: int
    lr: float
    warmup: int
    validate_every: int


@dataclass
class Curve:
    """What a training run left behind: a loss and a time for every step, (step, accuracy) for every validation."""

    loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The seconds of training, without those of validation."""
        return sum(self.step_seconds)


class Encoded:
    """Questions tokenised once, and their labels; `batch` pads some of them on the right."""

    def __init__(
        self, questions: list[Question], tokenize: Callable[[list[str]], list[list[int]]], device: torch.device
    ) -> None:
        self.tokens = tokenize([question.text for question in questions])
        self.labels = torch.tensor([question.label for question in questions], device=device)
        self.device = device

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Encoded:
        """The first of them."""
        part = copy.copy(self)
        part.tokens, part.labels = self.tokens[:count], self.labels[:count]
        return part

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """The named arguments of the model."""
        lengths = torch.tensor([len(self.tokens[i]) for i in rows], device="cpu")
        mask = torch.arange(max(lengths), device="cpu") < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long, device="cpu")  # token 0 pads, or any other: it is masked
        ids[mask] = torch.tensor([token for i in rows for token in self.tokens[i]], device="cpu")
        return {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}


def train(
    model: nn.Module,
    data: Encoded,
    validation: Encoded,
    schedule: Schedule,
    seed: int,
    groups: list[dict[str, Any]] | None = None,
) -> Curve:
    """Train whatever of `model` requires a gradient; the batches follow from the seed alone.

    groups: the optimizer's parameter groups, where parts of the model train at rates of their own.
    The model stays in eval mode: without dropout, two implementations of the same layer must give the same losses.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups or trainable, lr=schedule.lr, weight_decay=0.0)
    rise, fall = schedule.warmup, schedule.steps - schedule.warmup
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / rise, (schedule.steps - step) / fall))
    curve = Curve()
    model.eval()
    for step, rows in enumerate(islice(_bucketed(data, schedule.batch, seed), schedule.steps), 1):
        start = time.perf_counter()
        loss = F.cross_entropy(model(**data.batch(rows)), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        curve.loss.append(loss.item())  # waits for the device, so the time is honest
        curve.step_seconds.append(time.perf_counter() - start)
        last = step == schedule.steps
        if last or step % schedule.validate_every == 0:
            curve.validation.append((step, accuracy(predict(model, validation), validation)))
        if last or step % REPORT_EVERY == 0:
            _report(curve, step, schedule.steps)
    return curve


@torch.no_grad()
def predict(model: nn.Module, data: Encoded) -> Tensor:
    """The logits (questions, classes) the model gives, in the order of `data`."""
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data.tokens[i]))
    logits = torch.cat([model(**data.batch(rows)) for rows in _chunks(order, EVALUATION_BATCH)])
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order, device=data.device), logits)


def accuracy(logits: Tensor, data: Encoded) -> float:
    """The fraction of questions whose largest logit is that of their class."""
    return (logits.argmax(dim=-1) == data.labels).double().mean().item()


def _report(curve: Curve, step: int, steps: int) -> None:
    recent = curve.loss[-REPORT_EVERY:]
    line = f"    step {step:3} of {steps}   loss {sum(recent) / len(recent):.3f}   {curve.seconds:5.1f} s"
    validated, value = curve.validation[-1] if curve.validation else (0, 0.0)
    say(line + (f"   validation {value:.1%}" if validated == step else ""))


def _bucketed(data: Encoded, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of similar length without end, every epoch shuffled anew."""
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator, device="cpu").tolist()
        pools = (sorted(pool, key=lambda i: len(data.tokens[i])) for pool in _chunks(order, POOL * batch))
        batches = [rows for pool in pools for rows in _chunks(pool, batch) if len(rows) == batch]
        for i in torch.randperm(len(batches), generator=generator, device="cpu").tolist():
            yield batches[i]


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
