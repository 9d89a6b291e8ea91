"""What does a call cost the host?  One token on a tiny layer: the device idles, and all there is is issuing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from . import timer
from .layer import Row, build, failure, figures, operands, ready
from .paths import PATHS, Layer, Operands
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

SHAPE, TOKENS = Shape(64, 64), 1


def points(settings: Settings) -> int:
    return len(settings.ranks)


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path and rank; on a GPU with the kernels that it launches."""
    for r in settings.ranks:
        where = {"question": "host", "N": SHAPE.N, "K": SHAPE.K, "T": TOKENS, "r": r, "dtype": settings.dtype_name}
        where |= {"direction": settings.direction, "mode": "eager"}
        sets = operands(settings, SHAPE, TOKENS, r)[:1]
        passes, facts = {}, {}
        for name in (*settings.paths, "operator"):
            try:
                layers, facts[name] = build(name, sets, settings)
                if settings.device.type == "cuda":
                    facts[name]["kernels"] = kernels(name, layers[0], sets[0])
                passes[name] = ready(name, layers, sets, settings)
            except Exception as error:
                yield where | failure(name, error)
        samples = timer.interleave(passes, settings.device, settings.seconds, issue=True)
        for name in samples:
            yield where | {"path": name} | facts[name] | figures(samples, name, settings.device)


def kernels(name: str, layer: Layer, o: Operands) -> dict[str, int]:
    """How many kernels forward and backward launch, counted by the profiler; the GEMMs of the base are among them."""
    counted, y = {}, None
    with profile(activities=[ProfilerActivity.CUDA]):  # the first one may miss events while it starts up
        o.x.sum()
    with PATHS[name].within():
        for what in ("forward", "backward"):
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                if y is None:
                    y = layer.call(o.x)
                else:
                    torch.autograd.grad(y, (o.x, *layer.trained), o.gY)
                torch.cuda.synchronize()
            on_gpu = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            counted[what] = len(on_gpu)
    return counted
