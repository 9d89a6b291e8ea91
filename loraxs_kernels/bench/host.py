"""What does a call cost the host?  One token on a tiny layer: the device idles, and all there is is issuing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    measured, names = [], [name for name in PATHS if name in request.paths]
    for r in request.ranks:
        make, build = partial(_operands, request, r), partial(layer.candidate, request)
        rows = compare(request, names, make, build, OVER, modes=("eager",), issue=True)
        measured += [{"r": r} | row for row in rows]
    counts = {}
    if request.gpu:
        _kernels(lambda: torch.ones(1, device=request.device).sum())  # the first may miss events while it starts up
        counts = {name: {"kernels": _counted(name, request)} for name in names}
    for row in measured:
        yield row | (counts.get(row["path"], {}) if row["status"] == "ok" else {})


def _operands(request: Request, r: int) -> list[Operands]:
    return [Operands.random(TOKENS, SHAPE.N, SHAPE.K, r, request.dtype, request.device, seed=0)]


def _counted(name: str, request: Request) -> dict[str, int] | None:
    """How many kernels forward and backward launch, those of the frozen linear among them; None where it cannot run."""
    (o,) = _operands(request, request.ranks[0])
    try:
        with PATHS[name].within():
            built = PATHS[name].make(o)
            backward = partial(torch.autograd.grad, inputs=(o.x, *built.trained), grad_outputs=o.gY)
            backward(built.call(o.x))  # warm-up
            y, forward = _kernels(partial(built.call, o.x))
            return {"forward": forward, "backward": _kernels(partial(backward, y))[1]}
    except Exception:
        return None


def _kernels(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call makes, and the kernels that it launched."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        made = call()
        torch.cuda.synchronize()
    return made, sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    if not rows:
        return
    others = [name for name in (tables.baseline(rows), "peft-lora", "two") if any(name in row["over"] for row in rows)]
    head = ["", "r", *(f"over {name}" for name in others), *(["us a call", "kernels"] if tables.gpu(report) else [])]
    lines = []
    for row in rows:
        line = [f"{row['path']}: {PATHS[row['path']].what}", str(row["r"]), *(over(row, name) for name in others)]
        if tables.gpu(report):
            line.append(tables.figure(f"{1e6 * row['seconds']['median']:.0f}", row["noisy"]))
            line.append(" + ".join(map(str, (row.get("kernels") or {}).values())) or tables.NO_FIGURE)
        lines.append(line)
    what = f"{DIRECTIONS[rows[0]['direction']]} of one token on a {rows[0]['N']} x {rows[0]['K']} layer"
    title = f"Host: issuing {what}, {rows[0]['dtype']}"
    yield Table(title, head, lines, [tables.QUARTILES])


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    if rows := [row for row in rows if "reference" in row["over"]]:
        title = "Host: issuing one layer, as a multiple of the reference layer"
        found = [(colour(PATHS, row["path"]), f"{row['path']}, r {row['r']}", row["over"]["reference"]) for row in rows]
        yield plots.bars("host", title, {"": found}, {"": 1})


QUESTION = Question(
    name="host", plan=plan, tables=show, plots=draw, paths=PATHS, unread=("model", "shapes", "tokens", "modes")
)
