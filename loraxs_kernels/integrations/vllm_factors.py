"""A and B of the layers that vLLM serves, made from its own weights, which may be cut, packed or quantised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group

from .. import adapter_file
from ..bank import Store
from ..matching import adapted_layers
from ..recipe import Factors

AT_ONCE = 2**30  # bytes of weights that are gathered before their A and B are made
PROBED = 2**24  # numbers of the identity matrix that a layer is given at a time, to read its weight

Layers = Mapping[str, tuple[Any, Sequence[str | None]]]  # by vLLM's name: one of its LoRA layers, the modules in it


def served_factors(layers: Layers, store: Store, basis: str | None) -> dict[str, Factors]:
    """A (r, K) and B (N, r) of the bank's modules in the dtype that is served, made and checked as `attach` does."""
    found: dict[str, Any] = {}
    for weights in _weights(layers):
        proxy, chunk = nn.Module(), {name: store.entries[name] for name in weights}
        for name, W in weights.items():
            _put(proxy, name, W)
        with adapter_file.naming_file(store.path):
            adapter_file.attach_as(proxy, chunk, [], basis, progress=False)
        for name, layer in adapted_layers(proxy):
            A, B = (get_tp_group().broadcast(t, src=0) for t in (layer.A, layer.B))
            found[name] = SimpleNamespace(A=A, B=B, rank=layer.rank, recipe=layer.recipe, dtype=weights[name].dtype)
    store.check_basis(found)
    return {name: (each.A.to(each.dtype), each.B.to(each.dtype)) for name, each in found.items()}


def _weights(layers: Layers) -> Iterator[dict[str, Tensor]]:
    """W (N, K) of the bank's modules, some at a time."""
    weights: dict[str, Tensor] = {}
    for layer, modules in layers.values():
        local = _weight(layer.base_layer, layer.input_size, sum(layer.output_slices), layer.device)
        for slice_, module in enumerate(modules):
            if module is not None:
                weights[module] = _whole(layer, local, slice_)
        if sum(W.nbytes for W in weights.values()) > AT_ONCE:
            yield weights
            weights = {}
    if weights:
        yield weights


def _put(root: nn.Module, name: str, W: Tensor) -> None:
    """Have a linear layer of weight W at a place in a model."""
    *above, last = name.split(".")
    for part in above:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    root.add_module(last, linear)


def _weight(layer: Any, K: int, N: int, device: torch.device) -> Tensor:
    """The weight (N, K) of one of vLLM's layers on this rank, in the dtype that it computes in.

    Where the layer does not hold it like that (packed for a CPU's products, quantised), it is what the layer makes of
    an identity matrix: each element is a product with 1, and sums with 0, so exact.
    """
    weight, dtype = getattr(layer, "weight", None), layer.params_dtype
    if isinstance(weight, Tensor) and weight.shape == (N, K) and weight.dtype == dtype:
        return weight.detach()
    W, step = torch.empty(N, K, dtype=dtype, device=device), max(1, PROBED // K)
    for start in range(0, K, step):
        rows = torch.arange(start, min(start + step, K), device=device)
        ones = torch.zeros(len(rows), K, dtype=dtype, device=device)
        ones[torch.arange(len(rows), device=device), rows] = 1
        W[:, rows] = layer.quant_method.apply(layer, ones, None).t()
    return W


def _whole(layer: Any, local: Tensor, slice_: int) -> Tensor:
    """W of one slice of a layer, from all ranks: by vLLM's own rules for which rows or columns each of them has."""
    stops = [0, *itertools.accumulate(layer.output_slices)]
    part = local[stops[slice_] : stops[slice_ + 1]]
    if layer.tp_size == 1:
        return part
    of_columns = layer.input_size != layer.base_layer.input_size
    size = layer.base_layer.input_size if of_columns else layer.base_layer.output_size
    ids = torch.arange(size)
    if of_columns:
        ids = layer.slice_lora_a(ids[None])[0]
    elif layer.n_slices > 1:
        only = [None] * layer.n_slices
        only[slice_] = ids[:, None]
        ids = layer.slice_lora_b(only)[slice_][:, 0]
    else:
        ids = layer.slice_lora_b(ids[:, None])[:, 0]
    group, part = get_tp_group(), part.t() if of_columns else part
    everywhere = [torch.empty_like(ids) for _ in range(layer.tp_size)]
    torch.distributed.all_gather(everywhere, ids, group=group.cpu_group)
    ids = torch.cat(everywhere).to(part.device)
    W = part.new_empty(int(ids.max()) + 1, part.shape[1])
    W[ids] = group.all_gather(part.contiguous(), dim=0)
    return W.t() if of_columns else W
