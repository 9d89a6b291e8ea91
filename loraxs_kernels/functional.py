"""LoRA-XS as functions of tensors: lora_xs_linear, lora_xs_delta, and the autograd Function behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends, ops
from .backends.device import check_out, in_forward_mode, refuse_transforms, transformed
from .backends.torch import cast, scaled_mm, shrink

Operands = tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]  # W, A, R, B, s, bias of one layer


def lora_xs_linear(
    x: Tensor, weight: Tensor, A: Tensor, R: Tensor, B: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """A frozen linear layer with its LoRA-XS adapter: y = x W^T + scale (x A^T) R^T B^T (+ bias).

    Args:
        x: (..., K), bf16, fp16, fp32 or fp64; any strides, any number of leading dimensions, empty ones too.
        weight: W (N, K) in x's dtype, frozen; a transposed view is as good as a contiguous one.
        A: (r, K) and B: (N, r), in x's dtype, frozen: A = S_r V_r^T, B = U_r of W = U S V^T.
        R: (r, r), the trained matrix, usually fp32 whatever the other dtypes.
        scale: s = alpha / r, a number.
        bias: (N,), added to y; the only frozen operand that may also train.

    Returns:
        y (..., N) in x's dtype.  Gradients reach x, R and bias, once (no double backward).  Between forward and
        backward only z = x A^T (T x r, fp32) is kept, never x.

    Under torch.autocast, x, weight, A, B and bias are cast to the autocast dtype, as F.linear does.

    Raises:
        TypeError, ValueError: an operand's dtype, device, shape or requires_grad is not the above; it is named.
        RuntimeError: under torch.func (vmap, jvp, grad, ...) or on tangents of forward-mode AD, where a kernel runs or
            x or R requires a gradient.  loraxs_kernels.reference.lowrank_linear can be transformed.

    Source: LoRA-XS, arXiv 2405.17604, equations 4 and 5.
    """
    x, weight, A, B, bias = autocast(x, weight, A, B, bias)
    check(x, A, R, B, scale, weight=weight, bias=bias)
    return unchecked(x, weight, A, R, B, scale, bias)


def lora_xs_delta(x: Tensor, A: Tensor, R: Tensor, B: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """The adapter alone: scale (x A^T) R^T B^T, added in place to `out` when one is given.

    For a base layer that cannot hand over a dense weight (quantised, wrapped, hooked) and for dropout on the
    adapter's input: base(x) + lora_xs_delta(dropout(x), ...).

    Args:
        x, A, R, B, scale: as in `lora_xs_linear`.
        out: (..., N) in x's dtype, or None.  It is written in place and returned; gradients pass through it.  It
            shares no memory with A, R and B, nor with x, unless it is x itself.

    Returns:
        (..., N): the delta, or out + delta.

    Raises:
        TypeError, ValueError: an operand's dtype, device, shape or requires_grad is not the above, or out overlaps
            itself or another operand; it is named.
        RuntimeError: as for `lora_xs_linear`.
    """
    x, A, B = autocast(x, A, B)
    check(x, A, R, B, scale, out=out)
    return unchecked(x, None, A, R, B, scale, out=out)


def unchecked(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The functions above on operands known to be good: flatten x to rows, pick the backend, join autograd."""
    if bias is not None and bias.requires_grad:
        return unchecked(x, W, A, R, B, s) + bias
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    backend = backends.choose(rows, A, B)
    if torch.compiler.is_compiling():
        y = ops.lowrank_linear(rows, W, A, R, B, s, bias, None, backend)[0]
        y = y.view(*x.shape[:-1], B.shape[0])
        return y if out is None else out.add_(y)
    primitive = backends.primitive(backend)
    with ops.no_autocast(x):
        if torch.is_grad_enabled() and (x.requires_grad or R.requires_grad):
            if transformed(x, W, A, R, B, bias, out):
                name = "lora_xs_delta" if W is None else "lora_xs_linear"
                refuse_transforms(f"{name}: a call whose x or R requires a gradient")
            y = _LowRankLinear.apply(out, rows, W, A, R, B, s, bias, primitive)
        else:
            y = primitive(rows, W, A, R, B, s, bias, None if out is None else _rows(out))[0]
            if out is not None and not out.is_inference():
                torch.autograd.graph.increment_version(out)  # a kernel writes it behind autograd's back
    if out is not None:
        return out
    return y if x.dim() == 2 else y.view(*x.shape[:-1], B.shape[0])


def _rows(out: Tensor) -> Tensor:
    try:
        return out.view(-1, out.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"out: got shape {tuple(out.shape)} with strides {out.stride()}, must be viewable as rows of "
            f"{out.shape[-1]} to be written in place"
        ) from None


class _LowRankLinear(torch.autograd.Function):
    """The primitive of one backend on x (T, K), with the gradient of ops.gradients.

    `out` (..., N) is written in place and comes first: autograd takes the first input for the one an in-place
    Function changes, where that is a view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor | None,
        x: Tensor,
        W: Tensor | None,
        A: Tensor,
        R: Tensor,
        B: Tensor,
        s: float,
        bias: Tensor | None,
        primitive: backends.Primitive,
    ) -> Tensor:
        y, z, _ = primitive(x, W, A, R, B, s, bias, None if out is None else _rows(out))
        _, need_gX, _, _, need_gR = ctx.needs_input_grad[:5]
        # Only what the backward will read: W for gX, z for gR.
        ctx.save_for_backward(W if need_gX else None, A, R, B, z if need_gR else None)
        ctx.s, ctx.primitive = s, primitive
        if out is None:
            return y
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, gY: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradients = _LowRankLinear.backward(ctx, gY)
            return _OnceDifferentiable.apply(gY.new_zeros((), requires_grad=True), *gradients)
        need_gOut, need_gX, _, _, need_gR, *_ = ctx.needs_input_grad
        rows = gY if gY.dim() == 2 else gY.reshape(-1, gY.shape[-1])
        gX, gR = ops.gradients(ctx.primitive, rows, *ctx.saved_tensors, ctx.s, need_gX, need_gR)
        return gY if need_gOut else None, gX, None, None, gR, None, None, None, None


def together(x: Tensor, operands: Sequence[Operands]) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + s_i (x A_i^T) R_i^T B_i^T (+ bias_i) for layers that share x, on operands known to be good.

    Reads x once for all A_i, and in the backward writes their share of gX once and lets every GEMM accumulate into it,
    where separate layers leave one gX each for autograd to add up.  By bytes, for q, k, v, gate and up of a Mistral-7B
    block at T = 8192 on an H200: 47 us in the forward and 190 us in the backward, 2.6 % of the block's frozen linears.
    The products are the library's, whichever backend is chosen: x, gX and each y pass through memory as often as they
    would with a kernel, and z and u are small.
    """
    if in_forward_mode() or transformed():  # single calls are right there, or refused with a reason
        return tuple(unchecked(x, W, A, R, B, s, bias) for W, A, R, B, s, bias in operands)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    with ops.no_autocast(x):
        ys = _LowRankLinears.apply(rows, operands, *(R for _, _, R, *_ in operands))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _LowRankLinears(torch.autograd.Function):
    """The primitive of several layers on one x (T, K); see `together`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operands: Sequence[Operands], *Rs: Tensor) -> tuple[Tensor, ...]:
        z = shrink(x, torch.cat([A for _, A, *_ in operands]))
        ys = []
        for (W, _, R, B, s, bias), z_i in zip(operands, z.split([len(R) for R in Rs], dim=1), strict=True):
            u = cast(scaled_mm(z_i, cast(R, z.dtype).t(), s, z_i), x.dtype)
            ys.append(F.linear(u, B, bias).addmm_(x, W.t()))
        need_gX, _, *need_gR = ctx.needs_input_grad
        frozen = (t for W, A, R, B, *_ in operands for t in (W if need_gX else None, A, R, B))
        ctx.save_for_backward(z if any(need_gR) else None, *frozen)
        ctx.scales = [s for *_, s, _ in operands]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gYs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradients = _LowRankLinears.backward(ctx, *gYs)
            anchor = next(gY for gY in gYs if gY is not None).new_zeros((), requires_grad=True)
            return _OnceDifferentiable.apply(anchor, *gradients)
        z, *saved = ctx.saved_tensors
        Ws, As, Rs, Bs = (saved[i::4] for i in range(4))
        zs = () if z is None else z.split([len(R) for R in Rs], dim=1)
        need_gX, _, *need_gR = ctx.needs_input_grad
        used = [i for i, gY in enumerate(gYs) if gY is not None]
        gX, gRs, us = None, [None] * len(gYs), []
        with ops.no_autocast(Rs[0]):
            for i in used:
                v, R, s = shrink(gYs[i], Bs[i].t()), Rs[i], ctx.scales[i]
                if need_gR[i]:
                    gRs[i] = cast(scaled_mm(v.t(), zs[i], s, cast(R, v.dtype)), R.dtype)
                if need_gX:
                    us.append(cast(scaled_mm(v, cast(R, v.dtype), s, v), gYs[i].dtype))
            if need_gX and used:
                gX = torch.cat(us, dim=1) @ torch.cat([As[i] for i in used])
                for i in used:
                    gX.addmm_(gYs[i], Ws[i])
        return gX, None, *gRs


class _OnceDifferentiable(torch.autograd.Function):
    """Hands gradients on; whoever differentiates them is told that they cannot be.

    torch's own `once_differentiable` lets them pass as constants when gY is one, although gX depends on R.
    """

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "lora_xs_linear: is differentiable once, its gradients cannot be differentiated again; "
            "for second derivatives use loraxs_kernels.reference.lowrank_linear"
        )


def autocast(x: Tensor, *frozen: Tensor | None) -> tuple:
    """x and the frozen operands in the dtype torch.autocast asks for, where it is on for x's device."""
    if isinstance(x, Tensor) and ops.autocast_on(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in (x, *frozen))
    return (x, *frozen)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Raise a TypeError or ValueError that names the operand, what it was and what it must be."""
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, must be a number")
    operands = {"x": x, "A": A, "R": R, "B": B, "weight": weight, "bias": bias, "out": out}
    operands = {name: t for name, t in operands.items() if t is not None or name in "xARB"}
    for name, t in operands.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, must be a torch.Tensor")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name}: got dtype {t.dtype}, must be bfloat16, float16, float32 or float64")
        if t.dtype != x.dtype and name != "R":
            raise TypeError(f"{name}: got dtype {t.dtype}, must be {x.dtype} like x")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, must be {x.device} like x")
        if t.dim() != 2 and name in ("A", "R", "B", "weight"):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, must have 2 dimensions")
        if t.requires_grad and name in ("A", "B", "weight") and torch.is_grad_enabled():
            raise ValueError(f"{name}: got requires_grad=True, must be frozen (LoRA-XS trains R alone): .detach() it")
    (r, K), N = A.shape, B.shape[0]
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: got shape {tuple(x.shape)}, must be (..., {K}) for A of shape {tuple(A.shape)}")
    expected = {"R": (r, r), "B": (N, r), "weight": (N, K), "bias": (N,), "out": (*x.shape[:-1], N)}
    for name, shape in expected.items():
        if name in operands and operands[name].shape != shape:
            raise ValueError(f"{name}: got shape {tuple(operands[name].shape)}, must be {shape}")
    if r == 0:
        raise ValueError(f"A: got shape {tuple(A.shape)}, must have at least one row (rank >= 1)")
    if out is not None and not torch.compiler.is_compiling():  # compiled code adds to it when all has been read
        check_out(out, x=x, A=A, R=R, B=B, weight=weight, bias=bias)
