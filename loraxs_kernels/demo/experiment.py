"""What both demos do with a model: train it in each of the ways of the table, then save, load and merge the adapter."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loraxs_kernels as lx
from loraxs_kernels.matching import adapted_layers
from loraxs_kernels.reference import UnfusedLinear

from . import Settings, report
from .report import say
from .training import Curve, Encoded, Schedule, accuracy, predict, train


@dataclass(frozen=True)
class Job:
    """A pretrained model, the questions tokenised for it, and how it is fine-tuned."""

    what: str
    fresh: Callable[[], nn.Module]  # loads the model; nothing but a head has random values
    train: Encoded
    validation: Encoded
    test: Encoded
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    scale: float  # s = alpha / r
    schedule: Schedule


@dataclass(frozen=True)
class Variant:
    """A way to train.  Without `init` there are no adapters: the modules_to_save train alone, or nothing does."""

    key: str
    label: str
    init: str | None = None
    rank: int = 16
    fused: bool = True


SVD = Variant("svd", "LoRA-XS r = 16, SVD factors", init="svd")
UNFUSED = Variant("unfused", "LoRA-XS r = 16, SVD factors, unfused", init="svd", fused=False)


@dataclass
class Row:
    """What a variant reached; the lists have an entry for each seed."""

    label: str
    adapter_parameters: int = 0
    head_parameters: int = 0
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def run(job: Job, settings: Settings, baselines: dict[str, Row], variants: Sequence[Variant]) -> dict[str, Any]:
    """Measure every variant, check the adapter of the one with key "svd", then print and write the report."""
    rows = dict(baselines)
    for variant in variants:
        rows[variant.key], model, logits = _measure(job, variant, settings)
        if variant.key == "svd":
            tuned, expected = model, logits
    checks = _check_adapter(job, settings, tuned, expected)
    if "unfused" in rows:
        checks["unfused"] = _compare_paths(rows["svd"], rows["unfused"])
    result = {
        **report.header(settings, job.what),
        "schedule": asdict(job.schedule),
        "questions": {"train": len(job.train), "validation": len(job.validation), "test": len(job.test)},
        "rows": {key: _summary(row) for key, row in rows.items()},
        "checks": checks,
        "bytes": _sizes(job, tuned, settings.out / report.ADAPTER),
    }
    report.finish(result, settings)
    return result


def _measure(job: Job, variant: Variant, settings: Settings) -> tuple[Row, nn.Module, Tensor]:
    """The variant trained and tested with every seed; the model of the last, and its logits for the test questions."""
    row = Row(variant.label)
    for seed in settings.seeds:
        say(variant.label + (f", seed {seed}" if len(settings.seeds) > 1 else ""))
        torch.manual_seed(seed)
        model = _prepared(job, variant, seed).to(settings.device)
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        row.head_parameters = sum(n for name, n in trainable.items() if name.startswith(job.modules_to_save))
        row.adapter_parameters = sum(trainable.values()) - row.head_parameters
        if trainable:
            row.curves.append(train(model, job.train, job.validation, job.schedule, seed))
            row.seconds.append(row.curves[-1].seconds)
        logits = predict(model, job.test)
        row.accuracy.append(accuracy(logits, job.test))
        say(f"    test {row.accuracy[-1]:.1%}")
    return row, model, logits


def _prepared(job: Job, variant: Variant, seed: int) -> nn.Module:
    """A fresh model in which exactly what the variant trains requires a gradient."""
    model = job.fresh()
    if variant.init is None:
        model.requires_grad_(False)
        for name in job.modules_to_save:
            model.get_submodule(name).requires_grad_(True)
        return model
    lx.attach(
        model,
        variant.rank,
        target_modules=job.target_modules,
        modules_to_save=job.modules_to_save,
        alpha=job.scale * variant.rank,
        init=variant.init,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    if not variant.fused:
        for name, layer in list(adapted_layers(model)):
            model.set_submodule(name, UnfusedLinear(layer))
    return model


def _check_adapter(job: Job, settings: Settings, tuned: nn.Module, expected: Tensor) -> dict[str, dict[str, float]]:
    """Save the adapter, load it into a fresh model, merge it there; how far the logits go from the trained model's."""
    path = settings.out / report.ADAPTER
    say(f"saving the adapter to {path}, loading it into a fresh model, merging it there")
    lx.save_adapter(tuned, path)
    torch.manual_seed(max(settings.seeds) + 1)  # whatever a fresh head starts from, the file must replace
    fresh = lx.load_adapter(job.fresh(), path, progress=sys.stderr.isatty()).to(settings.device)
    checks = {"loaded": _deviation(job, fresh, expected)}
    checks["merged"] = _deviation(job, lx.merge(fresh), expected)
    return checks


def _deviation(job: Job, model: nn.Module, expected: Tensor) -> dict[str, float]:
    logits = predict(model, job.test)
    return {
        "accuracy": accuracy(logits, job.test),
        "different_predictions": int((logits.argmax(-1) != expected.argmax(-1)).sum()),
        "largest_logit_difference": (logits - expected).abs().max().item(),
    }


def _compare_paths(fused: Row, unfused: Row) -> dict[str, float]:
    """Two implementations on the same batches: how far the losses part, and how their times compare.

    The median over steps of the ratio of their times: other work on the machine hits single steps.
    """
    pairs = list(zip(fused.curves, unfused.curves, strict=True))
    differences = [abs(a - b) for f, u in pairs for a, b in zip(f.loss, u.loss, strict=True)]
    ratios = [b / a for f, u in pairs for a, b in zip(f.step_seconds, u.step_seconds, strict=True)]
    return {"largest_loss_difference": max(differences), "time_ratio": statistics.median(ratios)}


def _summary(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "adapter_parameters": row.adapter_parameters,
        "head_parameters": row.head_parameters,
        "accuracy": statistics.mean(row.accuracy),
        "accuracy_std": statistics.stdev(row.accuracy) if len(row.accuracy) > 1 else None,
        "accuracy_by_seed": row.accuracy,
        "seconds": statistics.mean(row.seconds) if row.seconds else None,
        "loss": [curve.loss for curve in row.curves],
        "validation": [curve.validation for curve in row.curves],
    }


def _sizes(job: Job, tuned: nn.Module, path: Path) -> dict[str, int]:
    """What a fine-tuned copy costs on disk; LoRA's computed from the shapes, with R's dtype and the same head."""
    layers = [layer for _, layer in adapted_layers(tuned)]
    head = sum(p.nbytes for name in job.modules_to_save for p in tuned.get_submodule(name).parameters())
    in_layers = {id(layer.R) for layer in layers}
    return {
        "R": sum(layer.R.nbytes for layer in layers),
        "head": head,
        "adapter_file": path.stat().st_size,
        "lora": head
        + sum(layer.rank * (layer.in_features + layer.out_features) * layer.R.itemsize for layer in layers),
        "model": sum(p.nbytes for p in tuned.parameters() if id(p) not in in_layers),
    }
