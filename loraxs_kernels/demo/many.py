"""`loraxs demo --many`: very many adapters of MiniLM in one bank, mixed in batches, each as good as loaded alone.

All share the encoder and a head that is fitted once.  A few adapters train at once, each on questions of its own; the
rest of the bank are mixtures of those, since what is shown is how adapters are stored, mixed and served.

report.json: what ran, where and when; how many adapters were trained; the losses of their first and last steps;
`checks` of single adapters in mixed batches against the same ones exported and loaded alone; `throughput`, in questions
a second (of the fastest round, and each), and the time over that of one adapter; `memory`, resident bytes by stage;
`disk`, bytes.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loraxs_kernels as lx
from loraxs_kernels.bank.environment import DATA
from loraxs_kernels.bench.tables import aligned
from loraxs_kernels.matching import adapted_layers

from . import DemoError, Settings, minilm, report
from .experiment import Job
from .report import say
from .training import Encoded, accuracy, predict

RANK, LR, BATCH = 16, 1e-3, 4
TOGETHER = 32  # questions of a forward and backward in training
BANK = "bank"  # the folder in that of the results
CHECKED, ASKED, TESTED = 8, 100, 200  # adapters; questions each of them answers; those the others answer
KINDS = {"one": "one adapter, plain layers", "different": "all different, in their slots", "cold": "all new each time"}


@dataclass(frozen=True)
class Size:
    trained: int
    adapters: int  # in the end
    steps: int
    slots: int  # and samples of a batch
    fitted: int  # questions that the head is fitted to
    rounds: int  # in which speeds are measured


SIZES = {"default": Size(16, 1_000, 40, 64, 2_000, 5), "quick": Size(8, 100, 12, 32, 1_000, 3)}


def run(settings: Settings) -> dict[str, Any]:
    """Train, fill the bank, check and time; print and report."""
    size, folder = SIZES[settings.length], settings.out / BANK
    if folder.exists():
        raise DemoError(f"out: {folder} is there already, and no bank is overwritten; name another folder")
    torch.manual_seed(0)
    job, memory = minilm.job_for(settings), {}
    base = job.fresh().to(settings.device).eval()
    say("fitting the head that all adapters share")
    minilm.fit_head(base, job.train.first(size.fitted))
    how = {"target_modules": job.target_modules, "modules_to_save": job.modules_to_save, "alpha": job.scale * RANK}
    single = lx.attach(copy.deepcopy(base), RANK, progress=False, **how)
    memory["before the bank"] = resident()
    with lx.AdapterBank.create(folder, single) as bank:
        model = bank.attach(base, size.slots, progress=False)
        losses = train(bank, model, job.train, size)
        names = list(losses)
        draw = random.Random(0)
        answer(model, job.test, [(i, draw.choice(names)) for i in range(TESTED)], size.slots)
        memory[f"{len(bank):,} adapters"] = resident()
        mixtures = mix(bank, names, size.adapters)
        half = CHECKED // 2  # as many of those that are checked were trained
        chosen = draw.sample(names, half) + draw.sample(mixtures, size.slots - half)
        checks = check(bank, model, job, chosen, settings)
        memory[f"{len(bank):,} adapters"] = resident()
        load(single, bank.read(names[0]))
        throughput = measure({"one": single, "different": model, "cold": model}, job.test, mixtures, chosen, size)
        disk = {"bank": (folder / DATA).stat().st_size, "record": 4 * bank.size, "adapters": len(bank)}
    said = f"{size.trained} trained, {size.adapters - size.trained} mixtures of them"
    result = {
        **report.header(settings, f"{size.adapters:,} adapters of {job.what} in one bank"),
        "adapters": {"trained": size.trained, "in_all": size.adapters, "said": said, "slots": size.slots},
        "losses": {name: [each[0], each[-1]] for name, each in losses.items()},
        "checks": checks,
        "throughput": throughput,
        "memory": memory,
        "disk": disk,
    }
    report.write(result, settings)
    say("\n" + "\n\n".join([_accuracies(result), _speeds(result), _sizes(result)]) + "\n")
    say(f"{result['seconds']:.0f} s in all; {report.REPORT} and the bank, {BANK}, are in {settings.out}")
    return result


def train(bank: lx.AdapterBank, model: nn.Module, data: Encoded, size: Size) -> dict[str, list[float]]:
    """Train adapters at once, each on a part of the questions, and keep them; their losses."""
    names = [f"trained-{i:02}" for i in range(size.trained)]
    say(f"training {len(names)} adapters at once, {size.steps} steps of {BATCH} questions each")
    own = [torch.arange(i, len(data), len(names)) for i in range(len(names))]
    losses: dict[str, list[float]] = {name: [] for name in names}
    with bank.train(names, create=True) as training:
        optimizer = training.optimizer(LR)
        for _ in range(size.steps):
            rows = [i for part in own for i in part[torch.randperm(len(part))[:BATCH]].tolist()]
            each = torch.empty(len(rows))
            optimizer.zero_grad()
            for part in by_length(data, rows, TOGETHER):
                some = [rows[i] for i in part]
                logits = model(**data.batch(some), adapter_ids=[names[i // BATCH] for i in part])
                loss = F.cross_entropy(logits, data.labels[some], reduction="none")
                (loss.sum() / BATCH).backward()  # the sum over adapters of the mean that each would have alone
                each[part] = loss.detach().cpu()
            optimizer.step()
            for name, mean in zip(names, each.view(-1, BATCH).mean(1).tolist(), strict=True):
                losses[name].append(mean)
        training.commit()
    return losses


def mix(bank: lx.AdapterBank, trained: list[str], adapters: int) -> list[str]:
    """Fill the bank up with mixtures of the trained R, of random convex weights; their names."""
    names = [f"mixture-{i:04}" for i in range(adapters - len(trained))]
    say(f"filling the bank up to {adapters:,}: {len(trained)} trained, {len(names)} mixtures of them")
    weights = torch.rand(len(names), len(trained)).log().neg()
    mixed = F.normalize(weights, p=1, dim=1) @ torch.stack([bank.read(name) for name in trained])
    of = dict(bank.modules)
    bank.add_many(
        (name, {module: R[place].view(of[module], -1) for module, place in bank.places.items()})
        for name, R in zip(names, mixed, strict=True)
    )
    return names


@torch.no_grad()
def answer(model: nn.Module, data: Encoded, pairs: list[tuple[int, str]], size: int) -> Tensor:
    """The logits for questions, each by an adapter, in the order of `pairs`; batches mix the adapters."""
    found: list[Tensor] = [None] * len(pairs)
    for part in by_length(data, [row for row, _ in pairs], size):
        rows, names = zip(*(pairs[i] for i in part), strict=True)
        for i, logits in zip(part, model(**data.batch(list(rows)), adapter_ids=names), strict=True):
            found[i] = logits
    return torch.stack(found)


def by_length(data: Encoded, rows: Sequence[int], size: int) -> list[list[int]]:
    """Where in `rows` questions of similar length are, at most `size` in each part, so that little of it is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(data.tokens[rows[i]]))
    return [order[i : i + size] for i in range(0, len(rows), size)]


def check(bank: lx.AdapterBank, model: nn.Module, job: Job, chosen: list[str], settings: Settings) -> dict[str, Any]:
    """Mixed batches of all the chosen adapters, compared with some of these exported and loaded alone."""
    checked, others = chosen[:CHECKED], chosen[CHECKED:]
    say(f"{len(chosen)} of {len(bank):,} adapters answer in mixed batches; {CHECKED} of them exported and loaded alone")
    pairs = [(i, name) for name in checked for i in range(ASKED)]
    pairs += [(i, name) for i in range(TESTED) for name in random.Random(i).sample(others, 4)]
    mixed = answer(model, job.test, pairs, len(chosen))
    found: dict[str, Any] = {"questions": ASKED, "adapters": {}}
    asked, path = job.test.first(ASKED), settings.out / report.ADAPTER
    for name, own in zip(checked, mixed.split(ASKED)[:CHECKED], strict=True):
        bank.export(name, path)
        alone = predict(lx.load_adapter(job.fresh(), path, progress=False).to(settings.device), asked)
        found["adapters"][name] = {
            "accuracy_mixed": accuracy(own, asked),
            "accuracy_alone": accuracy(alone, asked),
            "different_predictions": int((own.argmax(-1) != alone.argmax(-1)).sum()),
            "largest_logit_difference": (own - alone).abs().max().item(),
        }
    rest = pairs[CHECKED * ASKED :]
    right = mixed[CHECKED * ASKED :].argmax(-1) == job.test.labels[[i for i, _ in rest]]
    return found | {"others": len(others), "accuracy_of_others": right.double().mean().item()}


@torch.no_grad()
def measure(
    models: dict[str, nn.Module], data: Encoded, mixtures: list[str], chosen: list[str], size: Size
) -> dict[str, Any]:
    """Questions a second in each way, in turns, and the time over that of the first way within a round.

    The fastest round counts: what else the machine does only makes it slower.
    """
    say("timing batches of one adapter, of all different ones, and of ones that are new each time")
    slots, others = size.slots, [name for name in mixtures if name not in chosen]
    new = cycle([others[i : i + slots] for i in range(0, len(others) - slots + 1, slots)])
    rows = [part for part in by_length(data, range(TESTED), slots) if len(part) == slots]
    ids: dict[str, Callable[[], dict[str, Any]]] = {
        "one": dict,
        "different": partial(dict, adapter_ids=chosen),
        "cold": lambda: {"adapter_ids": next(new)},
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(-1, size.rounds):  # the first is not counted
        for kind, model in models.items():
            if kind == "different":  # brings them in, outside of what is timed
                model(**data.batch(rows[0]), **ids[kind]())
            started = time.perf_counter()
            for batch in rows:
                logits = model(**data.batch(batch), **ids[kind]())
            logits.sum().item()  # waits for the device
            if turn >= 0:
                speeds[kind].append(slots * len(rows) / (time.perf_counter() - started))
    over = {
        kind: statistics.median(a / b for a, b in zip(speeds["one"], each, strict=True))
        for kind, each in speeds.items()
    }
    return {
        kind: {"questions_per_second": max(each), "each": each, "time_over_one": over[kind]}
        for kind, each in speeds.items()
    }


@torch.no_grad()
def load(model: nn.Module, record: Tensor) -> None:
    """Give the layers of a model the R of a record of the bank, whose modules are in their order."""
    for (_, layer), R in zip(adapted_layers(model), record.split(RANK**2), strict=True):
        layer.R.copy_(R.view(RANK, RANK))


def resident() -> int | None:
    """VmRSS of this process in bytes; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return None


def _accuracies(result: dict[str, Any]) -> str:
    checks = result["checks"]
    cells = [
        (f"accuracy on {checks['questions']} questions", "in mixed batches", "loaded alone", "differ", "logits by")
    ]
    for name, each in checks["adapters"].items():
        percent = (f"{each[way]:.1%}" for way in ("accuracy_mixed", "accuracy_alone"))
        cells.append((name, *percent, str(each["different_predictions"]), f"{each['largest_logit_difference']:.1e}"))
    cells.append((f"{checks['others']} others", f"{checks['accuracy_of_others']:.1%}", "-", "-", "-"))
    return aligned(cells)


def _speeds(result: dict[str, Any]) -> str:
    cells = [(f"batches of {result['adapters']['slots']} questions", "questions/s at best", "time over one adapter")]
    for kind, each in result["throughput"].items():
        cells.append((KINDS[kind], f"{each['questions_per_second']:,.0f}", f"{each['time_over_one']:.2f}"))
    return aligned(cells)


def _sizes(result: dict[str, Any]) -> str:
    disk = result["disk"]
    cells = [(f"{result['adapters']['said']}", "MiB")]
    cells += [
        (f"resident memory (VmRSS), {stage}", "-" if held is None else f"{held / 2**20:,.1f}")
        for stage, held in result["memory"].items()
    ]
    cells.append((f"the bank on disk, {disk['adapters']:,} adapters", f"{disk['bank'] / 2**20:,.1f}"))
    cells.append(("an adapter on disk, of it R", f"{disk['record'] / 2**20:.3f}"))
    return aligned(cells)
