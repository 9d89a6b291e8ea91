"""What of a model `tune` measures, and how the processes that train it together tune it once."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..backends import tuned
from ..backends.triton.config import padded
from ..bench import BenchError
from ..bench.shapes import Shape
from ..linear import LoraXSLinear
from ..matching import choose, is_peft_layer, unwrapped
from ..naming import label_of
from ..recipe import check_rank
from ..weights import weight_of, weight_view
from .run import Table


class Found(NamedTuple):
    """The facts of a model that decide what is measured."""

    shapes: dict[int, tuple[Shape, ...]]  # by padded rank, that of the most layers first
    dtype: torch.dtype
    dense: bool  # whether calls with W are more than those without


def of_model(model: nn.Module, ranks: Sequence[int]) -> Found:
    """The layers of a model that have adapters, by `attach` or by PEFT; of one without, all linear layers."""
    layers = list(_adapted(model))
    if layers and ranks:
        raise ValueError(f"rank: got {ranks} for a model with LoRA-XS adapters, which have theirs; leave it out")
    if not layers:
        if not ranks:
            raise ValueError("rank: must be given, for the model has no LoRA-XS adapters")
        for r in ranks:
            check_rank(r, "the model")
        model = unwrapped(model)
        for name in choose(model, "all-linear", None, None)[0]:
            layer = model.get_submodule(name)
            weight, dense = weight_of(layer, label_of(name)), weight_view(layer) is not None
            layers += [_Layer(*weight.shape, r, weight.dtype, dense) for r in ranks]
    shapes = {}
    for rank, _ in Counter(padded(layer.r) for layer in layers).most_common():
        counts = Counter((layer.N, layer.K) for layer in layers if padded(layer.r) == rank)
        blocks = math.gcd(*counts.values())
        shapes[rank] = tuple(Shape(N, K, count // blocks) for (N, K), count in counts.items())
    dtype = statistics.mode(layer.dtype for layer in layers)
    return Found(shapes, dtype, 2 * sum(layer.dense for layer in layers) >= len(layers))


class _Layer(NamedTuple):
    N: int
    K: int
    r: int
    dtype: torch.dtype
    dense: bool  # whether calls are with W


def _adapted(model: nn.Module) -> Iterator[_Layer]:
    """One for each adapter."""
    for m in model.modules():
        each: list[tuple[int, torch.dtype, float]] = []
        if isinstance(m, LoraXSLinear):
            each = [(m.rank, m.A.dtype, m.dropout)]
        elif is_peft_layer(m):
            each = [(r, m.loraxs_A[name].dtype, m.config[name].loraxs_dropout) for name, r in m.r.items()]
        for r, dtype, dropout in each:
            dense = weight_view(m.base_layer) is not None and not dropout
            yield _Layer(m.out_features, m.in_features, r, dtype, dense)


def together(work: Callable[[Callable[[], None]], Table]) -> Table:
    """Where there are several processes, rank 0 works and the others wait; its table is everybody's.

    `work` gets a function to call after every step: what it sends keeps the others from running out of patience.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return work(lambda: None)

    def exchange(message: Any = None) -> Any:
        """What rank 0 says: None, that it goes on; the table; or why there is none."""
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    if dist.get_rank() == 0:
        try:
            table = work(exchange)
        except BaseException as error:
            exchange(f"{type(error).__name__}: {error}")
            raise
        return exchange(table)
    while (said := exchange()) is None:
        pass
    if isinstance(said, str):
        raise BenchError(f"rank 0 could not tune: {said}")
    tuned.install(said)
    return said
