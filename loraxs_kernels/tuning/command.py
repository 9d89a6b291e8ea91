"""The command `loraxs tune`, and the table that it shows."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backends import choice, tuned
from ..bench.request import at_least_one, model_or_shapes
from ..bench.shapes import MODELS
from ..bench.tables import Table, show
from .run import BUDGET, Shapes, run

RANKS = [16, 64, 32]


def add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = f"{', '.join(MODELS)}; or a folder with a config.json, such a file, or a name on Hugging Face's hub"
    add("--model", help=f"the model whose shapes to tune for: {known}; default: mistral-7b")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--shape", **several, metavar="NxK", help="shapes instead of a model's, such as 4096x14336")
    add("--rank", **several, type=int, metavar="r", help="in this order; default: 16 64 32")
    add("--tokens", **several, type=int, metavar="T", help="rows of x; default: the powers of two to 32768")
    add("--dtype", choices=("bf16", "fp16"), default="bf16", help="default: bf16")
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:g}")
    add("--again", action="store_true", help="measure anew what the table has already")
    add("--out", type=Path, metavar="FILE", help="default: the table that is used from then on")


def command(arguments: argparse.Namespace, shapes: Shapes | None = None) -> None:
    """Run `loraxs tune`; shapes: by padded rank, those of --model if that is none of shapes.MODELS."""
    ranks = arguments.rank or RANKS
    at_least_one(rank=ranks)
    shapes = shapes or dict.fromkeys(ranks, model_or_shapes(arguments.model, arguments.shape)[1])
    given = (arguments.tokens, arguments.dtype, arguments.budget, arguments.out)
    table = run(shapes, *given, again=arguments.again)
    show([summary(list(map(choice.parse, table["choices"])))])
    print(f"\n{table['path']} has the table; what it has is not measured again (--again: it is)")
    if table["path"] != tuned.user_path(table["made_on"]["gpu"]):
        print(f"It is used where it is named: LORAXS_TUNED={table['path']}")


def summary(rows: list[choice.Row]) -> Table:
    """Which backend where, and its gain: a column for each bucket of rows, a line for each kind of call.

    A layer for which another backend is better than for the others has a line of its own.
    """
    tokens = sorted({row.tokens for row in rows})
    cells: dict[tuple, dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: (row.dtype, not row.weight, row.direction == "backward", row.rank)):
        what = f"{row.direction} {'with' if row.weight else 'without'} W, {row.dtype}"
        N, K = (row.N, row.K) if row.direction == "forward" else (row.K, row.N)
        layers = f"{N[0]} x {K[0]}" if (N[0], K[0]) == (N[1], K[1]) else "all"
        cell = "torch" if row.backend == "torch" else f"{row.backend} {row.gain:.2f}"
        cells.setdefault((what, str(row.rank), layers), {})[row.tokens] = cell
    lines = [[*key, *(found.get(T, "") for T in tokens)] for key, found in cells.items()]
    title = "The fastest backend, and how many times as fast as torch's it is"
    return Table(title, ["call", "r", "layers", *(f"T {T}" for T in tokens)], lines)
