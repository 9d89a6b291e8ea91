"""Many adapters trained at once on one model: users with questions of their own, or one task at many learning rates.

    python examples/train_many.py --users 32
    python examples/train_many.py --users 32 --sweep 1e-4 1e-2
    python examples/train_many.py --users 32 --alone 32 --report report.json

MiniLM learns to tell what kind of thing a question asks for, as in `loraxs demo`, whose packages this needs.  All users
share the encoder and a head, which is fitted once on what the frozen encoder gives; each trains an R of their own.  A
step has a few questions of every user, so that they share the large products and the host's work.  --alone trains some
of the users again, each by itself with torch's AdamW, and compares losses and times.  The result is a bank of adapters.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import loraxs_kernels as lx
from loraxs_kernels.demo import Settings, minilm
from loraxs_kernels.demo.many import answer, by_length
from loraxs_kernels.demo.training import EVALUATION_BATCH, Encoded, accuracy
from loraxs_kernels.files import write_atomically
from loraxs_kernels.info import environment

CHUNK = 32  # questions that run together


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(argv)
    if min(options.users, options.steps, options.batch) < 1 or min(options.sweep or [1.0]) <= 0:
        raise SystemExit("users, steps and batch must be at least 1, the rates of --sweep above 0")
    if options.bank.exists():
        raise SystemExit(f"--bank: {options.bank} is there already, and no bank is overwritten; name another folder")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    job = minilm.job_for(Settings("minilm", options.bank.parent, "quick", device, time.perf_counter()))
    if options.users > len(job.train) and not options.sweep:
        raise SystemExit(f"--users: got {options.users} for {len(job.train)} questions, must be at most as many")
    base = job.fresh().to(device).eval()
    minilm.fit_head(base, job.train)
    adapted = lx.attach(
        copy.deepcopy(base),
        options.rank,
        target_modules=job.target_modules,
        modules_to_save=job.modules_to_save,
        alpha=job.scale * options.rank,
    )
    names = [f"user-{i:04}" for i in range(options.users)]
    rates = dict.fromkeys(names, options.lr)
    if options.sweep:
        first, last = (math.log10(rate) for rate in options.sweep)
        rates = dict(zip(names, torch.logspace(first, last, len(names)).tolist(), strict=True))
    plans = {name: batches(i, len(job.train), options) for i, name in enumerate(names)}

    model = copy.deepcopy(base)
    with lx.AdapterBank.create(options.bank, adapted) as bank:
        bank.attach(model, progress=False)
        losses, seconds = together(bank, model, job.train, plans, rates)
        scores = {}
        for name in names[: options.tested]:
            logits = answer(model, job.test, [(i, name) for i in range(len(job.test))], EVALUATION_BATCH)
            scores[name] = accuracy(logits, job.test)
        bank.detach(model)
    print(f"{len(names)} at once: {options.steps} steps in {seconds:.1f} s, kept in {options.bank}")
    for name, score in scores.items():
        print(
            f"    {name}  lr {rates[name]:.1e}  loss {losses[name][0]:.3f} -> {losses[name][-1]:.3f}  test {score:.1%}"
        )
    report = {
        "what": "train_many",
        **environment(device),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "seconds": seconds,
        "losses": losses,
        "accuracy": scores,
    }
    if options.alone:
        some = {name: plans[name] for name in names[: options.alone]}
        report["alone"] = compare(adapted, job.train, some, rates, losses, seconds)
    if options.report:
        write_atomically(options.report, json.dumps(report, indent=1).encode())
    return report


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = made.add_argument
    add("--users", type=int, default=32)
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=4, help="questions of each user in a step")
    add("--rank", type=int, default=16)
    add("--lr", type=float, default=1e-3)
    add(
        "--sweep",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="the same questions for all, at learning rates between",
    )
    add("--alone", type=int, default=0, metavar="N", help="train the first N users alone as well, and compare")
    add("--tested", type=int, default=8, metavar="N", help="how many of the adapters are tested")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bank", type=Path, default=Path("many-out/bank"), help="folder of the bank, which must not exist yet")
    add("--report", type=Path, help="a JSON file for the figures")
    return made


def batches(user: int, questions: int, options: argparse.Namespace) -> list[list[int]]:
    """The questions of each step of one user: every user has a part of all, or, in a sweep, the same ones."""
    who, share = (0, 1) if options.sweep else (user, options.users)
    own = torch.arange(who, questions, share)
    generator = torch.Generator().manual_seed(options.seed + who)
    return [own[torch.randperm(len(own), generator=generator)[: options.batch]].tolist() for _ in range(options.steps)]


def together(
    bank: lx.AdapterBank, model: nn.Module, data: Encoded, plans: dict[str, list[list[int]]], rates: dict[str, float]
) -> tuple[dict[str, list[float]], float]:
    """Train all users at once, and keep their adapters in the bank; their losses, and the seconds it took."""
    names = list(plans)
    losses: dict[str, list[float]] = {name: [] for name in names}
    with bank.train(names, create=True) as training:
        optimizer = training.optimizer(rates)
        began = time.perf_counter()
        for step in zip(*plans.values(), strict=True):
            optimizer.zero_grad()
            totals, shares = dict.fromkeys(names, 0.0), dict(zip(names, step, strict=True))
            pairs = [(row, name) for name, own in shares.items() for row in own]
            for part in by_length(data, [row for row, _ in pairs], CHUNK):
                rows, users = map(list, zip(*(pairs[i] for i in part), strict=True))
                logits = model(**data.batch(rows), adapter_ids=users)
                counts = torch.tensor([len(shares[name]) for name in users], device=data.device)
                own = F.cross_entropy(logits, data.labels[rows], reduction="none") / counts
                own.sum().backward()  # the sum over users of the mean over the questions of each
                for name, part in zip(users, own.tolist(), strict=True):
                    totals[name] += part
            optimizer.step()
            for name, loss in totals.items():
                losses[name].append(loss)
        seconds = time.perf_counter() - began
        training.commit()
    return losses, seconds


def alone(model: nn.Module, data: Encoded, plan: list[list[int]], lr: float) -> tuple[list[float], float]:
    """Train one user by itself, as anybody would; the losses and the seconds."""
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n.endswith(".R")], lr=lr, weight_decay=0.0)
    losses, began = [], time.perf_counter()
    for rows in plan:
        loss = F.cross_entropy(model(**data.batch(rows)), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - began


def compare(
    adapted: nn.Module,
    data: Encoded,
    plans: dict[str, list[list[int]]],
    rates: dict[str, float],
    losses: dict[str, list[float]],
    seconds: float,
) -> dict[str, Any]:
    """Losses and times of the users in `plans`, trained alone, beside those of all at once."""
    off, took = 0.0, 0.0
    for name, plan in plans.items():
        found, each = alone(copy.deepcopy(adapted), data, plan, rates[name])
        off = max(off, *(abs(a - b) for a, b in zip(found, losses[name], strict=True)))
        took += each
    for_all = took / len(plans) * len(losses)
    print(
        f"{len(plans)} alone: {took / len(plans):.1f} s each, {for_all:.0f} s for {len(losses)}, "
        f"{for_all / seconds:.1f} times as long; losses differ by up to {off:.1e}"
    )
    return {"users": len(plans), "seconds": took, "times_as_long": for_all / seconds, "largest_loss_difference": off}


if __name__ == "__main__":
    main()
