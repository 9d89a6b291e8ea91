"""What a run is asked to measure: the command line's options, and what the report notes of them."""

# ruff: noqa: RUF009 - `_option` makes fields

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from . import BenchError
from .shapes import MODELS, Shape, parse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("eager", "graph")


def _option(
    help: str, flag: str = "", *, several: str = "", own: bool = False, default: Any = None, **more: Any
) -> Any:
    """A field that is an option of the command line; several: of which, by that name, there may be more than one.

    own: only for the questions that name it in `Question.options`.
    """
    if several:
        default, more = (), {"nargs": "+", "action": "extend", "metavar": several, **more}
    return field(default=default, metadata={"flag": flag, "own": own, "argparse": {"help": help, **more}})


@dataclass(frozen=True)
class Request:
    """The options of `loraxs bench`; `question.check` makes one in which all are valid and none is left open."""

    questions: tuple[str, ...] = ()
    model: str = _option(f"take its shapes: {', '.join(MODELS)}; for the question model also a folder with a HF model")
    shapes: tuple[Shape, ...] = _option("shapes instead of a model's, such as 4096x14336", "shape", several="NxK")
    tokens: tuple[int, ...] = _option("rows of x", several="T", type=int)
    ranks: tuple[int, ...] = _option("of the adapter", "rank", several="r", type=int)
    dtype: torch.dtype = _option(f"{', '.join(DTYPES)}; default: bf16 on a GPU, fp32 on a CPU")
    direction: str = _option("both (forward and backward, the default), forward or backward", default="both")
    paths: tuple[str, ...] = _option("all, or some of those that the questions have", several="path")
    modes: tuple[str, ...] = _option("eager, graph; default on a GPU: both", "mode", several="mode")
    device: torch.device = _option("default: the GPU where there is one, else the CPU")
    seconds: float = _option("for each path at each point of the grid; default 0.1 on a GPU, 0.5 on a CPU", type=float)
    blocks: int | None = _option("blocks of the model, if not all: questions model and svd", own=True, type=int)
    sequence: int | None = _option("tokens in a sequence: question model", own=True, type=int)
    batch: int | None = _option("sequences in a step: question model", own=True, type=int)
    records: tuple[int, ...] = _option("adapters in the banks: question bank", several="n", own=True, type=int)
    # Paths that were not asked for by name and cannot run here: why.
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def directions(self) -> tuple[str, ...]:
        """Forward and backward one by one, as questions about the primitive take them."""
        return ("forward", "backward") if self.direction == "both" else (self.direction,)

    def plain(self) -> dict[str, Any]:
        """As JSON has it; the device stands in the report's `machine`."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "device"}
        return values | {"shapes": [str(shape) for shape in self.shapes], "dtype": self.dtype_name}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The fields of Request as options of a command; what is not given is left to `check`."""
    for each in fields(Request):
        if "argparse" in each.metadata:
            flag = each.metadata["flag"] or each.name
            parser.add_argument(f"--{flag}", dest=each.name, default=argparse.SUPPRESS, **each.metadata["argparse"])


def known(what: str, given: Sequence[str], names: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse a name that is not one of those."""
    for name in given:
        if name not in names:
            raise BenchError(f"{what}: got {name!r}, must be one of {', '.join(names)}")


def one_of(name: str, value: object, other: str, other_value: object) -> None:
    """Refuse two options of which one makes the other meaningless."""
    if value and other_value:
        raise BenchError(f"{name} and {other}: got {value} and {other_value}, give one of the two")


def model_or_shapes(model: str | None, shapes: Sequence[str]) -> tuple[str, tuple[Shape, ...]]:
    """A known model's name (default mistral-7b) and its shapes, or those given in their place."""
    one_of("model", model, "shape", shapes)
    model = model or "mistral-7b"
    known("model", [model], MODELS)
    return model, tuple(map(parse, shapes)) or MODELS[model].shapes


def at_least_one(**options: Sequence[int]) -> None:
    """Refuse numbers below 1, and those that no tensor's size can be."""
    for name, numbers in options.items():
        for number in numbers:
            if not 1 <= number < 2**63:
                raise BenchError(f"{name}: got {number}, must be at least 1" + " and below 2^63" * (number > 1))
