"""Timing: several calls side by side, in turn, so that whatever drifts drifts for all of them.

That is why there is a timer of our own: those of torch.utils.benchmark and pytest-benchmark time one call to its end
and then the next, on one set of operands, which a GPU finds in its cache.

A sample is the time of one call, averaged over a pass through all sets of operands; a round takes one sample of every
call.  Figures are medians and quartiles over rounds, and ratios are taken within a round.

On a GPU a sample lies between two CUDA events, begun with the device idle; the sets together are larger than the L2
cache, so every call finds its operands in memory, as it would in a model.  In graph mode a pass over all sets is one
CUDA graph: what is left is the GPU's own time, without the host's.  On a CPU only ratios are meant to be read.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .roofline import Ceilings

MIN_ROUNDS, MAX_ROUNDS = 9, 200
SAMPLE = 5e-3  # seconds a sample should last at least
NOISY = 0.10  # quartiles further apart than this fraction of the median: the figure is not to be trusted
_L2_MULTIPLE = 3  # the sets of operands together, as a multiple of the L2 cache

Call = Callable[[], Any]
Spread = dict[str, float]  # low, median, high: quartiles of a figure over rounds
Made = TypeVar("Made")


def spread(samples: Tensor) -> Spread:
    quartiles = samples.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return dict(zip(("low", "median", "high"), quartiles.tolist(), strict=True))


def noisy(figure: Spread) -> bool:
    return figure["high"] - figure["low"] > NOISY * figure["median"]


def sets_needed(device: torch.device, bytes_each: int) -> int:
    """How many sets of operands of `bytes_each` it takes to leave the L2 cache; 1 on a CPU, where only ratios count."""
    if device.type != "cuda":
        return 1
    L2 = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if bytes_each > _L2_MULTIPLE * L2 else -(-_L2_MULTIPLE * L2 // bytes_each) + 1


def in_sets(make: Callable[[int], Made], device: torch.device, size: Callable[[Made], int]) -> list[Made]:
    """What `make` makes of 0, 1, ...: as many sets of operands, by the bytes of one, as it takes to leave the cache."""
    first = make(0)
    return [first, *map(make, range(1, sets_needed(device, size(first))))]


@dataclass(frozen=True)
class Pass:
    """One call for each set of operands, ready to be timed; `within` is open while it runs."""

    run: Call
    length: int
    within: Callable[[], AbstractContextManager] = nullcontext


def prepare(
    make: Callable[[], list[Call]],
    device: torch.device,
    graph: bool = False,
    within: Callable[[], AbstractContextManager] = nullcontext,
    warm: bool = True,
) -> Pass:
    """Make the calls and warm up, apart from every measurement; with `graph` (CUDA), capture a pass over all sets."""
    with on(device), within():
        if graph:
            return Pass(*_captured(make))
        calls = make()
        for call in (*calls, *calls) if warm else ():
            call()

        def run() -> None:
            for call in calls:
                call()

        return Pass(run, len(calls), within)


def interleave(
    passes: dict[str, Pass], device: torch.device, seconds: float, min_rounds: int = MIN_ROUNDS, issue: bool = False
) -> dict[str, Tensor]:
    """Time the passes in turn, for about `seconds` each; {name: seconds of one call, for each round}.

    With `issue`, on a GPU, what is timed is the host issuing the calls to an idle device.
    """
    if not passes:
        return {}
    clock = _host_clock if issue or device.type != "cuda" else _cuda_clock
    with on(device), _no_collection():
        once = {name: max(clock([(each, 1)])[0], 1e-9) for name, each in passes.items()}
        repeats = {name: max(1, round(SAMPLE / t)) for name, t in once.items()}
        if clock is _host_clock and device.type == "cuda":  # more would fill the launch queue, and wait for the device
            repeats = {name: min(n, max(1, 16 // passes[name].length)) for name, n in repeats.items()}
        round_s = sum(once[name] * repeats[name] for name in passes)
        rounds = max(min_rounds, min(MAX_ROUNDS, int(seconds * len(passes) / round_s)))
        names, samples = list(passes), {name: [] for name in passes}
        for i in range(rounds):
            order = names[i % len(names) :] + names[: i % len(names)]
            for name, t in zip(order, clock([(passes[name], repeats[name]) for name in order]), strict=True):
                samples[name].append(t / (repeats[name] * passes[name].length))
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in samples.items()}


def on(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one: streams, events and synchronize mean that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def short_collections() -> Iterator[None]:
    """Meanwhile the garbage collector, which runs before all samples, passes over the objects that are there now."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _captured(make: Callable[[], list[Call]]) -> tuple[Call, int]:
    """The replay of a graph with every set in it, so that none is found in the cache; and how many sets those are.

    All on one stream: autograd runs a backward on the stream of its forward, and a capture must not leave its own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = make()
        for call in (*calls, *calls):  # what a first call does (handles, compilation, autograd) must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()  # a graph tells of its own only once it was captured
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for call in calls:
                call()
    except BaseException:
        # torch before 2.12 leaves a failed capture's stream current and its pool open, and every empty_cache then fails
        # (pytorch #180395).
        torch.cuda.set_stream(before)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(before.device_index, pool)
            torch._C._cuda_releasePool(before.device_index, pool)
        raise

    def replay(graph: torch.cuda.CUDAGraph = graph, calls: list[Call] = calls) -> None:
        graph.replay()  # `calls` are held on to: they own what a kept backward reads

    replay()
    return replay, len(calls)


def _cuda_clock(runs: list[tuple[Pass, int]]) -> list[float]:
    """Seconds of each pass, repeated as often as it says, between CUDA events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
    for (each, repeats), (start, end) in zip(runs, events, strict=True):
        with each.within():
            torch.cuda.synchronize()  # or the host would be ahead after a slow neighbour, and behind after a fast one
            start.record()
            for _ in range(repeats):
                each.run()
            end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _host_clock(runs: list[tuple[Pass, int]]) -> list[float]:
    times = []
    for each, repeats in runs:
        with each.within():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                each.run()
            times.append(time.perf_counter() - start)
    return times


def once(run: Call) -> float:
    """Seconds of one run, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def peak(run: Callable[[], Made], device: torch.device) -> tuple[Made, int, int]:
    """What a run makes, the bytes of a GPU that it took at most beyond what was held before, and those still held."""
    synchronize()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = run()
    synchronize()
    return made, torch.cuda.max_memory_allocated(device) - held, torch.cuda.memory_allocated(device) - held


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ceilings(device: torch.device, size: int = 8192) -> Ceilings:
    """This machine's own, measured: a copy (bytes read and written) and a GEMM of size^3 on random data, two dtypes."""
    words = size * size * (8 if device.type == "cuda" else 1)  # on a GPU well past the cache
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    half, single = (torch.randn(2, size, size, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    calls = {
        "copy": partial(target.copy_, source),
        "half": partial(torch.mm, *half),
        "single": partial(torch.mm, *single),
    }
    passes = {name: prepare(lambda call=call: [call], device) for name, call in calls.items()}
    copy, half_s, single_s = (each.median().item() for each in interleave(passes, device, 0.1).values())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    flops = 2.0 * size**3
    return Ceilings(name, 8.0 * words / copy, flops / half_s, flops / single_s, f"measured: copy, GEMM of {size}^3")


def gauges(device: torch.device) -> dict[str, int]:
    """The GPU's SM clock (MHz), temperature (C) and power (W) now, as far as the driver's library tells them."""
    found = {}
    if device.type == "cuda":
        for name, read in (("MHz", "clock_rate"), ("C", "temperature"), ("W", "power_draw")):
            with suppress(Exception):  # no nvidia-ml-py, or not allowed to ask: a figure less, not a failure
                found[name] = getattr(torch.cuda, read)(device)
    if "W" in found:
        found["W"] = round(found["W"] / 1000)  # mW
    return found
