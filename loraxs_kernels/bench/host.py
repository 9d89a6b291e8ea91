"""What does a call cost the host?  One token on a tiny layer: the device idles, and all there is is issuing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import layer, plots, tables
from .compare import Row, compare
from .paths import PATHS, Operands
from .question import Point, Question, colour
from .request import Request
from .roofline import DIRECTIONS
from .shapes import Shape
from .tables import Table, over

SHAPE, TOKENS = Shape(64, 64), 1
OVER = ("frozen", "reference", "peft-lora", "two")


def plan(request: Request) -> list[Point]:
    """One point: all ranks are timed before anything is counted, since programs stay slower once the profiler ran."""
    where = {"N": SHAPE.N, "K": SHAPE.K, "T": TOKENS, "direction": request.direction}
    return [Point(where, partial(_rows, request))]


def _rows(request: Request) -> Iterator[Row]:
    """A row for each path and rank; on a GPU with the kernels that it launches, at the first rank."""
    measured, names = [], [name for name in PATHS if name in (*request.paths, "operator")]
    for r in request.ranks:
        make = partial(layer.candidate, request, [_operands(request, r)])
        rows = compare(request, names, lambda make=make: make, OVER, modes=("eager",), issue=True)
        measured += [{"r": r} | row for row in rows]
    counts = {}
    if request.gpu:
        with profile(activities=[ProfilerActivity.CUDA]):  # the first one may miss events while it starts up
            torch.ones(1, device=request.device).sum()
        counts = {name: {"kernels": _kernels(name, request)} for name in names}
    for row in measured:
        yield row | (counts.get(row["path"], {}) if row["status"] == "ok" else {})


def _operands(request: Request, r: int) -> Operands:
    return Operands.random(TOKENS, SHAPE.N, SHAPE.K, r, request.dtype, request.device, seed=0)


def _kernels(name: str, request: Request) -> dict[str, int] | None:
    """How many kernels forward and backward launch, those of the frozen linear among them; None where it cannot run."""
    o, counted = _operands(request, request.ranks[0]), {}
    try:
        with PATHS[name].within():
            (built,) = PATHS[name].build([o])
            inputs = (o.x, *built.trained)
            torch.autograd.grad(built.call(o.x), inputs, o.gY)  # warm-up
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                y = built.call(o.x)
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


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    if not rows:
        return
    others = [name for name in (tables.baseline(rows), "peft-lora", "two") if any(name in row["over"] for row in rows)]
    head = ["", "r", *(f"over {name}" for name in others), *(["us a call", "kernels"] if tables.gpu(report) else [])]
    lines = []
    for row in rows:
        line = [f"{row['path']}: {PATHS[row['path']].what}", str(row["r"]), *(over(row, name) for name in others)]
        if tables.gpu(report):
            kernels = row.get("kernels", {})
            line.append(tables.figure(f"{1e6 * row['seconds']['median']:.0f}", row["noisy"]))
            each = " + ".join(str(kernels[way]) for way in ("forward", "backward")) if kernels else tables.NO_FIGURE
            line.append(each)
        lines.append(line)
    first = rows[0]
    what = DIRECTIONS[first["direction"]]
    title = f"Host: issuing {what} of one token on a {first['N']} x {first['K']} layer, {first['dtype']}"
    yield Table(title, head, lines, ("Quartiles in brackets.", *tables.noise(lines)))


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    if rows := [row for row in rows if "reference" in row["over"]]:
        title = "Host: issuing one layer, as a multiple of the reference layer"
        yield plots.panels("host", title, {"": rows}, _panel, legend=False)


def _panel(axes: Any, rows: list[Row]) -> None:
    found = [(colour(PATHS, row["path"]), f"{row['path']}, r {row['r']}", row["over"]["reference"]) for row in rows]
    plots.bars(axes, found, line=1)


QUESTION = Question(name="host", plan=plan, tables=show, plots=draw, paths=PATHS)
