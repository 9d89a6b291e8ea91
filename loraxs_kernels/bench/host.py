"""What does a call cost the host?  One token on a tiny layer: the device idles, and all there is is issuing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from . import timer
from .layer import Row, build, failure, figures, ready
from .paths import PATHS, Operands
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

SHAPE, TOKENS = Shape(64, 64), 1
OVER = ("frozen", "reference", "peft-lora", "two")


def points(settings: Settings) -> int:
    return len(settings.ranks)


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path and rank; on a GPU with the kernels that it launches, at the first rank.

    All is timed before anything is counted: programs stay slower once the profiler has run.
    """
    measured, names = [], tuple(dict.fromkeys((*settings.paths, "operator")))
    for r in settings.ranks:
        where = {"question": "host", "N": SHAPE.N, "K": SHAPE.K, "T": TOKENS, "r": r, "dtype": settings.dtype_name}
        where |= {"direction": settings.direction, "mode": "eager"}
        sets, passes, facts = [operand(settings, r)], {}, {}
        for name in names:
            try:
                layers, facts[name] = build(name, sets, settings)
                if facts[name]["wrong"]:
                    yield where | facts[name] | failure(name, f"not timed, it is wrong: {facts[name]['wrong']}")
                    continue
                passes[name] = ready(name, layers, sets, settings)
            except Exception as error:
                yield where | failure(name, error)
        samples = timer.interleave(passes, settings.device, settings.seconds, issue=True)
        measured += [
            where | {"path": name} | facts[name] | figures(samples, name, settings.device, OVER) for name in samples
        ]
    counts = {}
    if settings.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]):  # the first one may miss events while it starts up
            torch.ones(1, device=settings.device).sum()
        counts = {name: {"kernels": kernels(name, settings)} for name in names}
    for row in measured:
        yield row | counts.get(row["path"], {})


def operand(settings: Settings, r: int) -> Operands:
    return Operands.random(TOKENS, SHAPE.N, SHAPE.K, r, settings.dtype, settings.device, seed=0)


def kernels(name: str, settings: Settings) -> dict[str, int] | None:
    """How many kernels forward and backward launch, those of the frozen linear among them; None where it cannot run."""
    o, counted = operand(settings, settings.ranks[0]), {}
    try:
        with PATHS[name].within():
            (layer,) = PATHS[name].build([o])
            inputs = (o.x, *layer.trained)
            torch.autograd.grad(layer.call(o.x), inputs, o.gY)  # warm-up
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                y = layer.call(o.x)
                torch.cuda.synchronize()
            counted["forward"] = _on_gpu(trace)
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                torch.autograd.grad(y, inputs, o.gY)
                torch.cuda.synchronize()
            counted["backward"] = _on_gpu(trace)
    except Exception:
        return None
    return counted


def _on_gpu(trace: profile) -> int:
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
