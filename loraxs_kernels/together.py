"""Layers that share their input, such as q, k and v: forward_together reads x once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends.device import in_forward_mode, transformed
from .backends.torch import cast, plus_product, scaled_mm, shrink
from .functional import cast_by_autocast, check_x, run
from .linear import LoraXSLinear
from .ops import autocast_on, eager, gradients, no_autocast, rows_of
from .route import computed_weight, does_more
from .weights import weight_view

Layer = tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None, str]  # W, A, R, B, s, bias, name


def forward_together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """(layer(x) for each layer), with one read of x: for layers with the same input, such as q, k, v or gate and up.

        q, k, v = forward_together(x, attention.q_proj, attention.k_proj, attention.v_proj)

    Args:
        x: (..., K), as for each layer.
        layers: any modules.  LoRA-XS layers that one operation computes whole share the read of x.  Other modules, and
            LoRA-XS layers that are merged, hooked or quantised or have active dropout, are called one after the other.
            Under torch.compile, which fuses by itself, all layers are called one after the other.

    Returns:
        One y (..., N_i) for each layer, in order.  Gradients are those of separate calls, to rounding; as there, only z
        is kept for them.  If x or any R requires grad, all outputs that share the read of x do.

    Raises:
        ValueError: x has the wrong shape or dtype for a layer; the message names the layer.
    """
    joined = []
    if not torch.compiler.is_compiling() and isinstance(x, Tensor):  # else each layer says what it must be
        joined = [i for i, layer in enumerate(layers) if joins(layer, x)]
    if len(joined) < 2:
        return tuple(layer(x) for layer in layers)
    operands = [
        (weight_view(layer.base_layer), layer.A, layer.R, layer.B, layer.scaling, layer.bias, layer.recipe.name)
        for layer in (layers[i] for i in joined)
    ]
    made = dict(zip(joined, outputs(x, operands), strict=True))
    return tuple(made[i] if i in made else layer(x) for i, layer in enumerate(layers))


def joins(layer: nn.Module, x: Tensor) -> bool:
    """Whether `forward_together` may compute a layer with others, in place of calling it."""
    if type(layer) is not LoraXSLinear or layer.merged or layer.seat is not None or layer.shares is not None:
        return False
    if does_more(layer):
        return False
    W = computed_weight(layer.base_layer, layer.A, layer.dropout if layer.training else 0.0)
    if W is None or x.device != W.device:
        return False
    return layer.bias is None or not layer.bias.requires_grad


def outputs(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + s_i (x A_i^T) R_i^T B_i^T (+ bias_i) for layers that share x, on operands known to be good.

    Reads x once for all A_i, and in the backward writes their share of gX once and lets every GEMM accumulate into it,
    where separate layers leave one gX each for autograd to add up.  By bytes, for q, k, v, gate and up of a Mistral-7B
    block at T = 8192 on an H200: 47 us in the forward and 190 us in the backward, 2.6 % of the block's frozen linears.
    The products are the library's, whichever backend is chosen: x, gX and each y pass through memory as often as they
    would with a kernel, and z and u are small.
    """
    # Single calls know what to do there; LowRankLinears does not.
    if in_forward_mode() or transformed() or torch._C._is_tracing():
        return tuple(run(x, W, A, R, B, s, bias, name=name) for W, A, R, B, s, bias, name in layers)
    if autocast_on(x):
        (h,) = cast_by_autocast(x, x)
        layers = [
            (*cast_by_autocast(x, W, A), R, *cast_by_autocast(x, B), s, *cast_by_autocast(x, bias), name)
            for W, A, R, B, s, bias, name in layers
        ]
        with no_autocast(x):
            return outputs(h, layers)
    for _, A, R, B, *_, name in layers:
        check_x(x, A, R, B, name)
    *ys, _ = LowRankLinears.apply(rows_of(x), layers, *(R for _, _, R, *_ in layers))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class LowRankLinears(torch.autograd.Function):
    """(y of each layer, z of all side by side) of layers on one x (T, K); see `outputs`.

    layers: (W, A, R, B, s, bias, ...) of each, whose R autograd gets once more as inputs of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[tuple], *Rs: Tensor) -> tuple[Tensor, ...]:
        z = shrink(x, torch.cat([A for _, A, *_ in layers]).t())
        ys = []
        for (W, _, R, B, s, bias, *_), z_i in zip(layers, z.split([len(R) for R in Rs], dim=1), strict=True):
            u = cast(scaled_mm(z_i, cast(R, z.dtype).t(), s, z_i), x.dtype)
            ys.append(plus_product(F.linear(u, B, bias), x, W.t()))
        need_gX, _, *need_gR = ctx.needs_input_grad
        kept = (t for W, A, R, B, *_ in layers for t in (W if need_gX else None, A, R, B))
        ctx.save_for_backward(z if any(need_gR) else None, *kept)
        ctx.scales = [s for *_, s, _, _ in layers]
        ctx.set_materialize_grads(False)
        return *ys, z

    @staticmethod
    def backward(ctx: Any, *gYs: Tensor | None) -> tuple[Tensor | None, ...]:
        *gYs, gz = gYs
        z, *kept = ctx.saved_tensors
        need_gX, _, *need_gR = ctx.needs_input_grad
        layers = [kept[i : i + 4] for i in range(0, len(kept), 4)]
        ranks = [len(A) for _, A, *_ in layers]
        zs, gzs = ([None] * len(layers) if t is None else t.split(ranks, dim=1) for t in (z, gz))
        each = list(zip(gYs, layers, zs, ctx.scales, need_gR, strict=True))
        if gz is not None or torch.is_grad_enabled():
            both = [
                gradients(eager, gY, gz_i, W, A, R, B, z_i, s, need_gX, need, "backward", "torch")
                for (gY, (W, A, R, B), z_i, s, need), gz_i in zip(each, gzs, strict=True)
            ]
            gXs = [gX for gX, _ in both if gX is not None]
            return sum(gXs[1:], gXs[0]) if gXs else None, None, *(gR for _, gR in both)
        gX, gRs, us, used = None, [], [], []  # as `gradients` has them, but each product adds to one gX
        with no_autocast(kept[1]):
            for gY, (W, A, R, B), z_i, s, need in each:
                gRs.append(None)
                if gY is None:
                    continue
                v = shrink(gY, B)
                if need:
                    gRs[-1] = cast(scaled_mm(v.t(), z_i, s, cast(R, v.dtype)), R.dtype)
                if need_gX:
                    us.append(cast(scaled_mm(v, cast(R, v.dtype), s, v), gY.dtype))
                    used.append((gY, W, A))
            if used:
                gX = torch.cat(us, dim=1) @ torch.cat([A for _, _, A in used])
                for gY, W, _ in used:
                    gX = plus_product(gX, gY, W)
        return gX, None, *gRs
