"""Quantised linear layers of other packages: in which dtype they compute, and W of their codes and scales.

    bitsandbytes (0.45 and later)
        Linear4bit: read in fp32, since rounding code times scale to bf16 moved delta W of real weights by 4e-3 to 3e-2,
            more than an adapter file accepts; dtype: its compute_dtype, else that of the weight it was made from
        Linear8bitLt: read in fp32; dtype: fp32, because an int8 layer follows its input and records no dtype
    transformers
        FP8Linear (fine-grained fp8), unless its weight is fp4: read in fp32; dtype: its bias's, else bf16

They are recognised by the names of their classes.  torchao's weights are tensors that dequantise themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .naming import FLOATS
from .sharding import whole

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Quantised(NamedTuple):
    """What is known of W (N, K).

    dtype: the default for A and B.  whole: whether layer.weight has all of W, and not a part that FSDP1 keeps.
    dequantise: makes W of layer.weight, whole and dense.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    whole: bool
    dequantise: Callable[[Tensor], Tensor]


def quantised(layer: nn.Module, label: str) -> Quantised | None:
    """None for a layer of no type that is known here; TypeError, naming `label`, for one that cannot be read now."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(layer).__mro__}
    if ("bitsandbytes.nn.modules", "Linear4bit") in kinds:
        return _linear4bit(layer, label)
    if ("bitsandbytes.nn.modules", "Linear8bitLt") in kinds:
        return _linear8bit(layer, label)
    # Not a class derived from it, which computes something else.
    if (type(layer).__module__, type(layer).__name__) == ("transformers.integrations.finegrained_fp8", "FP8Linear"):
        return _fp8_linear(layer)
    return None


def float_dtype(*candidates: torch.dtype | None) -> torch.dtype:
    """The first that is one of FLOATS; fp32 if none is."""
    return next((dtype for dtype in candidates if dtype in FLOATS), torch.float32)


def kind_of(layer: nn.Module) -> str:
    """The name of a layer's class, with its module if it is a Linear that is not torch's."""
    kind = type(layer)
    return f"{kind.__module__}.Linear" if kind.__name__ == "Linear" and kind is not nn.Linear else kind.__name__


def what(layer: nn.Module) -> str:
    """What a layer is, for an error."""
    weight = getattr(layer, "weight", None)
    found = f"a {kind_of(layer)}"
    if isinstance(weight, Tensor):
        found += f" with a {type(weight).__name__} weight of shape {tuple(weight.shape)} and dtype {weight.dtype}"
    if hasattr(layer, "quantization_scheme"):
        found += " that compressed-tensors has quantised (CompressedTensorsConfig(dequantize=True) loads it dense)"
    return found


def _linear4bit(layer: nn.Module, label: str) -> Quantised:
    weight, (N, K) = layer.weight, (layer.out_features, layer.in_features)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = layer.quant_state  # where a wrapper such as FSDP has put another parameter in place of the Params4bit
    if state is None and not weight.is_meta:
        raise _no_scales(layer, label)
    if getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            f"{label}: got {what(layer)} that bitsandbytes has packed anew and rounded for inference on this CPU, as "
            "the first forward in eval mode does, must be as it was loaded: load the model again and attach before that"
        )

    def dequantise(weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        in_fp32 = copy.copy(state)
        in_fp32.dtype = torch.float32
        return dequantize_4bit(weight, in_fp32)

    dtype = float_dtype(layer.compute_dtype, getattr(state, "dtype", None))
    return Quantised((N, K), dtype, 2 * weight.nbytes >= N * K, dequantise)


def _linear8bit(layer: nn.Module, label: str) -> Quantised:
    weight, (N, K) = layer.weight, (layer.out_features, layer.in_features)

    def scales() -> Tensor | None:
        """Of the rows; the first forward moves them from the weight to the state."""
        of_weight = getattr(layer.weight, "SCB", None)
        return layer.state.SCB if of_weight is None else of_weight

    if not (weight.is_meta or (layer.state.has_fp16_weights if weight.is_floating_point() else scales() is not None)):
        raise _no_scales(layer, label)

    def dequantise(codes: Tensor) -> Tensor:
        if codes.is_floating_point():  # has_fp16_weights: quantised anew in every forward
            return codes
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(codes, scales().to(codes.device))

    return Quantised((N, K), float_dtype(weight.dtype), weight.numel() >= N * K, dequantise)


def _fp8_linear(layer: nn.Module) -> Quantised | None:
    """W[n, k] = weight[n, k] scale[n // rows, k // columns], or times one scale; None: the weight is not fp8."""
    weight, (N, K) = layer.weight, (layer.out_features, layer.in_features)
    if weight.dtype not in FP8:
        return None

    def dequantise(codes: Tensor) -> Tensor:
        W, scales = codes.float(), whole(layer.weight_scale_inv).to(codes.device, torch.float32)
        if layer.block_size is None:
            return W.mul_(scales)
        rows, columns = layer.block_size
        scales = scales.repeat_interleave(rows, 0)[:N]
        for part, scale in zip(W.split(columns, 1), scales.split(1, 1), strict=True):
            part.mul_(scale)
        return W

    return Quantised((N, K), float_dtype(getattr(layer.bias, "dtype", None), torch.bfloat16), True, dequantise)


def _no_scales(layer: nn.Module, label: str) -> TypeError:
    return TypeError(
        f"{label}: got {what(layer)} that has no scales yet, must be quantised first, as moving it to its device "
        "does: that changes W, and A and B with it"
    )
