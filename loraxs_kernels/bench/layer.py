"""What does the adapter cost next to its frozen linear?  Every path, over shapes, tokens and ranks."""

from __future__ import annotations

import dataclasses
import gc
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from . import timer
from .paths import PATHS, Layer, Operands, calls, errors
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

Row = dict[str, Any]


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path and mode at each point of the grid; all shapes of one T and r first, then the next."""
    for T in settings.tokens:
        for r in settings.ranks:
            for shape in settings.shapes:
                yield from point(settings, shape, T, r)
                release()


def points(settings: Settings) -> int:
    return len(settings.shapes) * len(settings.tokens) * len(settings.ranks)


def point(settings: Settings, shape: Shape, T: int, r: int) -> Iterator[Row]:
    """Build, check, warm up and time every path on the same operands; what fails is said and left out."""
    where = {
        **{"question": "layer", "model": settings.model, "layers": shape.names, "count": shape.count},
        **{"N": shape.N, "K": shape.K, "T": T, "r": r, "dtype": settings.dtype_name, "direction": settings.direction},
    }
    if any(name.startswith("compile") for name in settings.paths):
        torch._dynamo.reset()  # a shape of its own each time: what earlier ones compiled counts against a limit
    try:
        sets = operands(settings, shape, T, r)
    except torch.OutOfMemoryError:
        yield from (where | failure(name, "out of memory: the operands alone") for name in settings.paths)
        return
    built: dict[str, list[Layer]] = {}
    facts: dict[str, Row] = {}
    for name in settings.paths:
        try:
            built[name], facts[name] = build(name, sets, settings)
        except Exception as error:  # a path that cannot run must not cost the others their figures
            yield where | failure(name, error)
            continue
        if facts[name]["wrong"]:
            yield where | facts[name] | failure(name, f"not timed, it is wrong: {', '.join(facts[name]['wrong'])}")
            del built[name]
    for mode in settings.modes:
        passes = {}
        for name, layers in built.items():
            try:
                passes[name] = ready(name, layers, sets, settings, mode == "graph")
            except Exception as error:
                yield where | {"mode": mode} | failure(name, error)
        before = timer.gauges(settings.device)
        samples, lost = timed(passes, settings)
        yield from (where | {"mode": mode} | failure(name, lost) for name in passes if lost)
        gauges = [before, timer.gauges(settings.device)]
        for name in samples:
            row = where | {"path": name, "mode": mode, "sets": len(sets), "gauges": gauges}
            yield row | facts[name] | figures(samples, name, settings.device)


def operands(settings: Settings, shape: Shape, T: int, r: int) -> list[Operands]:
    """Enough sets of operands to leave the cache."""

    def make(seed: int) -> Operands:
        return Operands.random(T, shape.N, shape.K, r, settings.dtype, settings.device, seed)

    first = make(0)
    return [first, *map(make, range(1, timer.sets_needed(settings.device, first.bytes)))]


def build(name: str, sets: list[Operands], settings: Settings) -> tuple[list[Layer], Row]:
    """The layers of a path, and what is known before timing: errors against what is allowed, and peak memory."""
    path = PATHS[name]
    with path.within():
        layers = path.build(sets)
        found = errors(layers[0], sets[0])
        facts: Row = {
            "errors": {what: {"error": error, "allowed": allowed} for what, (error, allowed) in found.items()},
            "wrong": [what for what, (error, allowed) in found.items() if not error <= allowed],
        }
        if settings.device.type == "cuda":
            (call,) = calls(layers[:1], sets[:1], settings.direction)
            call()
            held = torch.cuda.memory_allocated(settings.device)
            torch.cuda.reset_peak_memory_stats(settings.device)
            call()
            facts["peak_bytes"] = torch.cuda.max_memory_allocated(settings.device) - held
    return layers, facts


def ready(name: str, layers: list[Layer], sets: list[Operands], settings: Settings, graph: bool = False) -> timer.Pass:
    """A built path, warmed up."""
    return timer.prepare(
        lambda: calls(layers, sets, settings.direction), settings.device, graph, within=PATHS[name].within
    )


def timed(
    passes: dict[str, timer.Pass], settings: Settings, min_rounds: int = timer.MIN_ROUNDS
) -> tuple[dict[str, torch.Tensor], str]:
    """(samples, ""), or ({}, why) where one of the passes broke: then none has figures."""
    try:
        return timer.interleave(passes, settings.device, settings.seconds, min_rounds), ""
    except Exception as error:
        return {}, failure("", error)["reason"]


def figures(
    samples: dict[str, torch.Tensor],
    name: str,
    device: torch.device,
    others: tuple[str, ...] = ("frozen", "reference", "peft-lora", "torch"),
) -> Row:
    """Time (on a GPU) and ratios to other paths, by default floor, reference and PEFT's layer, taken round by round."""
    own = samples[name]
    row: Row = {"status": "ok", "rounds": len(own), "over": {}}
    if device.type == "cuda":
        row["seconds"] = dataclasses.asdict(timer.Spread.of(own))
    for other in others:
        if other in samples:
            row["over"][other] = dataclasses.asdict(timer.Spread.of(own / samples[other]))
    spreads = [timer.Spread.of(own)] if device.type == "cuda" else []
    spreads += [timer.Spread(**row["over"]["frozen"])] if "frozen" in row["over"] else []
    return row | {"noisy": any(spread.noisy for spread in spreads)}


def failure(name: str, why: str | BaseException) -> Row:
    """The row of a path that could not be measured."""
    if isinstance(why, BaseException):
        traceback.clear_frames(why.__traceback__)  # they hold tensors
        lines = (str(why).strip() or "(no message)").splitlines()
        why = "out of memory" if isinstance(why, torch.OutOfMemoryError) else f"{type(why).__name__}: {lines[0]}"
        release()
    return {"path": name, "status": "failed", "reason": why}


def release() -> None:
    """Give back what a point held, so that the next one starts from the same memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after an error that took the device with it
            torch.cuda.empty_cache()
