"""`pytest bench/ --benchmark-only`: the questions of `loraxs bench`, a small point each, as pytest-benchmark groups.

Each path is built and checked by its question, as in a run; only the clock is pytest-benchmark's.
"""

from __future__ import annotations

import functools
from unittest import mock

import pytest

from loraxs_kernels.bench import bank, chain, gemm, group, model, questions, svd, timer
from loraxs_kernels.bench.paths import PATHS

SMALL = {"shapes": ["1024x1024"], "tokens": [64], "ranks": [16], "modes": ["eager"]}
SMALLER = {"bank": {"tokens": [16]}, "svd": {"shapes": ["512x512"], "tokens": []}}
DEFAULT = [name for name, path in PATHS.items() if path.run == "default"]
NAMES = {
    ("layer", "both"): DEFAULT,
    ("host", "both"): DEFAULT,
    ("chain", "forward"): chain.PATHS,
    ("chain", "backward"): chain.PATHS,
    ("gemm", "forward"): gemm.PATHS,
    ("gemm", "backward"): gemm.PATHS,
    ("group", "both"): group.PATHS,
    ("bank", "forward"): bank.PATHS,
    ("svd", "both"): [name for name, method in svd.METHODS.items() if method.run == "default"],
}


@functools.cache
def passes(question: str, direction: str) -> tuple[dict[str, timer.Pass], dict[str, str]]:
    """What the question would time at its first point, by path; and of the others, why they failed."""
    found: dict[str, timer.Pass] = {}
    request = questions.check([question], direction=direction, **SMALL | SMALLER.get(question, {}))
    asked = questions.QUESTIONS[question]
    with mock.patch.object(timer, "interleave", lambda passes, *_: found.update(passes) or {}):
        rows = list(asked.at(request, asked.plan(request)[0]))
    return found, {row["path"]: row["reason"] for row in rows}


@pytest.mark.parametrize("question, direction, path", [(*key, name) for key, names in NAMES.items() for name in names])
def test_question(benchmark, question, direction, path):
    found, failed = passes(question, direction)
    assert path not in failed, failed[path]
    if path not in found:
        pytest.skip("it cannot run here; `loraxs bench` says why")
    benchmark.group = f"{question}, {direction}"
    each = found[path]
    with each.within():
        benchmark(lambda: (each.run(), timer.synchronize()))


@pytest.mark.benchmark(group="model, tiny, r 16: one step")
@pytest.mark.parametrize("path", ["frozen", "reference-fp32", "reference", "peft-lora", "torch"])
def test_model(benchmark, path):
    pytest.importorskip("transformers")
    if path == "peft-lora":
        pytest.importorskip("peft")
    request = questions.check(["model"], model="tiny")
    with model.adapted(model.build(request), path, 16, checkpointing=False) as adapted:
        step = model.Trainer(adapted, request).step
        benchmark(lambda: (step(), timer.synchronize()))
