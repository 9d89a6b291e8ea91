"""The output of a layer for a batch in which each sample has an adapter of its own (samples.py says which)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ... import parallel
from ...functional import Adapter
from ...indexed import RowIndex
from ...naming import label_of
from ...route import layer_output, plus_delta
from .samples import Samples

if TYPE_CHECKING:
    from .layer import LoraXSLinearLayer

# For each layer and each pair of adapters: the A and B that were compared, their versions then, and whether both
# adapters have the same.
_COMPARED: WeakKeyDictionary[LoraXSLinearLayer, dict] = WeakKeyDictionary()


@torch.compiler.disable
def mixed_output(
    layer: LoraXSLinearLayer, x: Tensor, samples: Samples, active: list[str], args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """base_layer(x) + s B R A x with an adapter for each sample.  No dropout: no layer is in training mode.

    The largest group of adapters with the same A and B is computed in one pass with base_layer.  Every other group
    then adds its delta to the rows of its samples.
    """
    base, name = layer.base_layer, layer.recipe[active[0]].name
    if x.dim() < 2 or len(x) != len(samples.names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(samples.names)} "
            f"names and x of shape {tuple(x.shape)} in {label_of(name)}. adapter_names needs layers whose input "
            "has the samples of the batch in its first dimension"
        )
    first, *others = alike(layer, active)
    if others and parallel.is_cut(base):
        raise ValueError(
            f"adapter_names: {', '.join(repr(each[0]) for each in (first, *others))} have different A and B in "
            f"{label_of(name)}, which is cut over ranks; there they must have the same (same r and svd_seed)"
        )
    _, index = samples.laid_out(first, x.device, whole=True)
    y = layer_output(base, x, [_stack(layer, first, index)], name, index, args, kwargs)
    parts = []
    for group in others:
        rows, index = samples.laid_out(group, x.device)
        own = y.index_select(0, rows), x.index_select(0, rows)
        parts.append((rows, plus_delta(*own, _stack(layer, group, index), name, index, in_place=True)))
    return y.index_copy(0, *map(torch.cat, zip(*parts, strict=True))) if parts else y


def _stack(layer: LoraXSLinearLayer, group: tuple[str, ...], index: RowIndex | None) -> Adapter:
    """Adapters that share A and B as one.  With an index, its R is the stack of their R."""
    A, R, B, s, p = layer.operands(group[0])
    if index is None:
        return A, R, B, s, p
    stack = [(R, s) for _, R, _, s, _ in map(layer.operands, group)]
    if any(each != s for _, each in stack):
        stack, s = [(R.to(torch.promote_types(R.dtype, torch.float32)) * each, 1.0) for R, each in stack], 1.0
    return A, torch.stack([R for R, _ in stack]), B, s, p


def alike(layer: LoraXSLinearLayer, names: list[str]) -> list[tuple[str, ...]]:
    """The adapters in groups with the same A and B, the largest group first."""
    groups: list[list[str]] = []
    for name in names:
        group = next((each for each in groups if _same_factors(layer, each[0], name)), None)
        groups.append([name]) if group is None else group.append(name)
    return sorted(map(tuple, groups), key=len, reverse=True)


def _same_factors(layer: LoraXSLinearLayer, one: str, other: str) -> bool:
    """Whether two adapters have the same A and B.  The answer is remembered until one of the four is changed."""
    factors = [each._buffers[name] for each in (layer.loraxs_A, layer.loraxs_B) for name in (one, other)]
    A, A2, B, B2 = factors
    if (A.shape, A.dtype, A.device) != (A2.shape, A2.dtype, A2.device) or A.is_meta:
        return False
    compared = _COMPARED.setdefault(layer, {})
    versions = [None if t.is_inference() else t._version for t in factors]  # an inference tensor has no version
    before, then, same = compared.get((one, other), ((), None, False))
    unchanged = versions == then and all(t is kept() for t, kept in zip(factors, before, strict=True))
    if None in versions or not unchanged:
        same = torch.equal(A, A2) and torch.equal(B, B2)
        compared[one, other] = [ref(t) for t in factors], versions, same
    return same
