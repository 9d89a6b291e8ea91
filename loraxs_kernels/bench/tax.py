"""The adapter tax in %, from the rows of a report: (time with the adapter - frozen linear) / frozen linear, of a block.

Shapes are weighted by how often they occur and by the time of their frozen linear; the ratio of each shape is the
paired one, taken within rounds.  A point of the grid that lacks a shape has no tax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import roofline, tables
from .compare import Row
from .shapes import MODELS, Shape
from .timer import Spread

Paths = dict[str, dict[Shape, Row]]
NOISE = "more than one point, and more than a quarter of it,"


class Point(NamedTuple):
    """A point of the grid, without the shape."""

    run: str  # the step of bench/gpu_suite.py; "" in a report of `loraxs bench`
    model: str
    dtype: str
    direction: str
    mode: str
    T: int
    r: int


def of_ratio(ratio: Spread) -> Spread:
    """In percent, by the ratio of times to the frozen linear's."""
    return {quartile: 100 * (value - 1) for quartile, value in ratio.items()}


def noisy(tax: Spread) -> bool:
    """Goals are hundredths apart, so noise is told early."""
    return tax["high"] - tax["low"] > max(1, 0.25 * abs(tax["median"]))


def shown(tax: Spread, rest: str = "") -> str:
    return tables.quartiles(tax, 1, noisy(tax), rest=rest)


def points(rows: Iterable[Row]) -> dict[Point, Paths]:
    """Rows of layer or gemm with absolute times (a GPU's), by point, path and shape; separate runs stay apart."""
    found: dict[Point, Paths] = {}
    shapes: dict[tuple[str, str], set[Shape]] = {}
    for row in rows:
        if row["status"] == "ok" and "seconds" in row:
            at = Point(row.get("run", ""), *(row[name] for name in Point._fields[1:]))
            shape = Shape(row["N"], row["K"], row["count"], row["layers"])
            found.setdefault(at, {}).setdefault(row["path"], {})[shape] = row
            shapes.setdefault((at.run, at.model), set()).add(shape)
    whole = {key: set(MODELS[key[1]].shapes) if key[1] in MODELS else each for key, each in shapes.items()}
    return {at: paths for at, paths in found.items() if set(paths.get("frozen", ())) == whole[at.run, at.model]}


def measured(paths: Paths, path: str) -> Spread | None:
    """The tax of a path at a point; None if a shape is missing."""
    frozen, own = paths["frozen"], paths.get(path, {})
    if set(own) != set(frozen):
        return None
    weight = {shape: shape.count * row["seconds"]["median"] for shape, row in frozen.items()}

    def over(quartile: str) -> float:
        each = (weight[shape] * row["over"]["frozen"][quartile] for shape, row in own.items())
        return sum(each) / sum(weight.values())

    return of_ratio({quartile: over(quartile) for quartile in ("low", "median", "high")})


def least(report: dict[str, Any], at: Point, paths: Paths, path: str) -> float | None:
    """What bytes and flops alone add, at this run's own ceilings, to the frozen linears as measured.

    Counted for 16-bit dtypes; None for others, and for paths without a count.
    """
    if not report["ceilings"] or at.dtype == "fp32" or path not in roofline.PATHS:
        return None
    ceilings, frozen = roofline.Ceilings(**report["ceilings"]), paths["frozen"]

    def block(seconds: Callable[[Shape], float]) -> float:
        return sum(shape.count * seconds(shape) for shape in frozen)

    def floor(name: str) -> float:
        return block(lambda s: roofline.floor(ceilings, name, at.T, s.N, s.K, at.r, at.direction))

    return 100 * (floor(path) - floor("frozen")) / block(lambda shape: frozen[shape]["seconds"]["median"])
