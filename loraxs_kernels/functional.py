"""LoRA-XS as functions of tensors: lora_xs_linear, lora_xs_delta, and the one way from there to a backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, indexed, ops
from .backends.device import check_out, transformed
from .indexed import IndexedLowRankLinear, RowIndex
from .naming import FLOATS, label_of
from .ops import autocast_on, in_grad_mode, no_autocast, rows_of, rows_of_out

Index = RowIndex | Tensor | Sequence[int] | None
Adapter = tuple[Tensor, Tensor, Tensor, float, float]  # A, R, B, s, p: that of dropout, 0 where it is not active


def lora_xs_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Index = None,
) -> Tensor:
    """A frozen linear layer with its LoRA-XS adapter: y = x W^T + scale (x A^T) R^T B^T (+ bias).

    Args:
        x: (..., K), bf16, fp16, fp32 or fp64; any strides, any number of leading dimensions, empty ones too.
        weight: W (N, K) in x's dtype, frozen; it may be a transposed view.
        A: (r, K) and B: (N, r), in x's dtype, frozen: A = S_r V_r^T, B = U_r of W = U S V^T.
        R: (r, r), the trained matrix, usually in fp32, whatever dtype the others have.
        scale: s = alpha / r, a number.
        bias: (N,), added to y; it may be frozen or train.
        index: with an index, R is a stack (n, r, r), and row t of x uses R[index_t], or no adapter if index_t is -1.
            Either integers, one for each sample (entry of x's first dimension) or one for each row of x, or a
            loraxs_kernels.indexed.RowIndex, which several layers can share.  Integers are checked on the host; those on
            a GPU are copied there first.

    Returns:
        y (..., N) in x's dtype.  Gradients reach x, R and bias.  Without `index` they can be differentiated again
        (create_graph=True).
        For the backward pass only z = x A^T (T x r, fp32) and W, A, R and B (under autocast their copies) are kept, by
        autograd's own means, so that checkpointing and hooks of saved tensors see them; x is never kept.

    Under torch.autocast, x, weight, A, B and bias are cast to the autocast dtype, as F.linear does.
    Under torch.func (vmap, jvp, grad, ...) and with tangents of forward-mode AD torch's own operators compute the call,
    whichever backend is chosen; z is then rounded to x's dtype, and an index needs memory for T copies of an R.

    Raises:
        TypeError, ValueError: an operand's dtype, device, shape or requires_grad is not as above; the message names it.
        RuntimeError: compiled code meets derivatives of torch.func, tangents of forward-mode AD, or an index.

    Source: LoRA-XS, arXiv 2405.17604, equations 4 and 5.
    """
    if weight is None:
        raise TypeError("weight: got NoneType, must be a torch.Tensor; lora_xs_delta computes only the adapter's part")
    return run(x, weight, A, R, B, scale, bias, index=_row_index(index, x, R), check_all=True)


def lora_xs_delta(
    x: Tensor, A: Tensor, R: Tensor, B: Tensor, scale: float, out: Tensor | None = None, index: Index = None
) -> Tensor:
    """Only the adapter's part: scale (x A^T) R^T B^T, added in place to `out` if that is given.

    Use it if the base layer has no dense weight to pass (quantised, wrapped, hooked), or with dropout on the adapter's
    input: base(x) + lora_xs_delta(dropout(x), ...).

    Args:
        x, A, R, B, scale, index: as in `lora_xs_linear`.
        out: (..., N) in x's dtype, or None.  It is written in place and returned; gradients pass through it.  It must
            not share memory with A, R or B, nor with x unless it is x itself.  It must be a tensor that autograd lets
            in-place operations write: not a leaf that requires grad, for example.

    Returns:
        (..., N): the delta, or out + delta.

    Raises:
        TypeError, ValueError: an operand's dtype, device, shape or requires_grad is not as above, or out overlaps
            itself or a different operand, or cannot be written.  The message names the operand, and out is as it was.
        RuntimeError: as for `lora_xs_linear`.
    """
    return run(x, None, A, R, B, scale, out=out, index=_row_index(index, x, R), check_all=True)


def _row_index(index: Index, x: Tensor, R: Tensor) -> RowIndex | None:
    """The index that a caller gave as a RowIndex that fits x and R."""
    if index is None:
        return None
    if not (isinstance(x, Tensor) and isinstance(R, Tensor) and R.dim() == 3):
        found = tuple(R.shape) if isinstance(R, Tensor) else type(R).__name__
        raise ValueError(f"R: got {found}, must be a stack (n, r, r) where there is an index")
    if not isinstance(index, RowIndex):
        index = RowIndex(index, len(R), x.device)
        rows, samples = math.prod(x.shape[:-1]), x.shape[0] if x.dim() > 1 else 1
        if len(index) not in (rows, samples):
            raise ValueError(
                f"index: got {len(index)} numbers, must be one for each of {samples} samples or {rows} rows"
            )
    return index


def run(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    name: str = "",
    index: RowIndex | None = None,
    *,
    check_all: bool = False,
) -> Tensor:
    """The one way from a call to a backend: cast by autocast, check, flatten x to rows, join autograd.

    name: of a layer, whose operands are known to fit each other, so that only x is checked.  It is for errors alone:
    if anything else depended on it, torch.compile would compile each of a model's equal blocks by itself.
    check_all: check all operands, which are a caller's.
    """
    if autocast_on(x):
        x, W, A, B, bias = cast_by_autocast(x, x, W, A, B, bias)
        with no_autocast(x):  # the fp32 side (z, u, R) stays as it is
            return run(x, W, A, R, B, s, bias, out, name, index, check_all=check_all)
    if check_all:
        check(x, A, R, B, s, weight=W, bias=bias, out=out, index=index)
    else:
        check_x(x, A, R, B, name)
    if bias is not None and bias.requires_grad:
        return run(x, W, A, R, B, s, name=name, index=index) + bias
    shape = x.shape
    flat = len(shape) == 2
    rows, forced = x if flat else rows_of(x), backends.forced()
    if index is not None:
        index.per_sample(len(rows))  # raises if they do not fit
        if torch.compiler.is_compiling():
            raise RuntimeError("index: torch.compile cannot trace a call with one; torch.compiler.disable the caller")
    if torch.compiler.is_compiling():
        if ops.exporting():
            op = ops.plain if torch.onnx.is_in_onnx_export() else ops.operator  # which ONNX does not have
            y = op(rows, W, A, R, B, s, bias, None, "forward", forced or "")[0]
        else:
            y = ops.linear(rows, W, A, R, B, s, bias, forced or "", ops.CODE)
        y = y.view(*shape[:-1], B.shape[0])
        return y if out is None else out.add_(y)
    # torch transforms its own operators, but no Function and no kernel.
    if transformed(x, W, A, R, B, bias, out):
        own = None if index is None else index.rows(len(rows))
        y = ops.plain(rows, W, A, R, B, s, bias, index=own)[0].view(*shape[:-1], B.shape[0])
        return y if out is None else out.add_(y)
    # torch.jit.trace, also for ONNX, records the library's operators, and no Function with arguments of other kinds.
    if (x.requires_grad or R.requires_grad) and in_grad_mode() and not torch._C._is_tracing():
        into = None if out is None else out.detach()
        if index is None:
            y = ops.apply(rows, R, (W, A, B, s, bias, into, "forward", forced))[0]
        else:
            y = IndexedLowRankLinear.apply(rows, R, (W, A, B, s, bias, into, index, forced))
        if out is not None:
            _Sum.apply(out, y)
    else:
        into = None if out is None else rows_of_out(out)
        if index is None:
            primitive = backends.select(rows, *B.shape, W is not None, "forward", forced)
            y = primitive(rows, W, A, R, B, s, bias, into)[0]
        else:
            y = indexed.lowrank_linear(rows, W, A, R, B, s, bias, into, index, forced)[0]
        if out is not None and not out.is_inference():
            torch.autograd.graph.increment_version(out)  # a kernel writes it behind autograd's back
    if out is not None:
        return out
    return y if flat else y.view(*shape[:-1], y.shape[-1])


class _Sum(torch.autograd.Function):
    """out, to which y has been added: a Function that writes to a view may return nothing but that view."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, y: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, gY: Tensor) -> tuple[Tensor, Tensor]:
        return gY, gY


def cast_by_autocast(x: Tensor, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands in the dtype that torch.autocast, which is on for x's device, asks for; all stay with x in fp64.

    As with torch's own functions, tensors without floating-point numbers stay as they are.
    """
    if x.dtype == torch.float64:
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in operands)


def check_x(x: Tensor, A: Tensor, R: Tensor, B: Tensor, name: str) -> None:
    """Raise a ValueError that names the layer if x does not fit it, or if it has no values yet."""
    if x.dtype is not A.dtype or x.dim() == 0 or x.is_nested or x.shape[-1] != A.shape[1]:
        found = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
        raise ValueError(
            f"x: got {found} and {x.dtype} for {label_of(name)}, "
            f"must be a dense tensor (..., {A.shape[1]}) of {A.dtype}"
        )
    if (A.is_meta or R.is_meta or B.is_meta) and not x.is_meta:  # torch multiplies by them, and gives anything at all
        raise ValueError(
            f"A, R, B: not all are in memory (meta device) for {label_of(name)}, must be like x: load the adapter's "
            "weights, or call reset_parameters() once the layer's own weight is loaded"
        )
    if (A.requires_grad or B.requires_grad) and torch.is_grad_enabled():
        raise ValueError(f"A, B: one has requires_grad=True for {label_of(name)}, must be frozen: only R trains")


def check(
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    index: RowIndex | None = None,
) -> None:
    """Raise a TypeError or ValueError that names the operand, what it was and what it must be."""
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, must be a number")
    operands = {"x": x, "A": A, "R": R, "B": B, "weight": weight, "bias": bias, "out": out}
    operands = {name: t for name, t in operands.items() if t is not None or name in "xARB"}
    for name, t in operands.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, must be a torch.Tensor")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {t.dtype}, must be bfloat16, float16, float32 or float64")
        if t.dtype != x.dtype and name != "R":
            raise TypeError(f"{name}: got dtype {t.dtype}, must be {x.dtype} like x")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, must be {x.device} like x")
        dimensions = 3 if name == "R" and index is not None else 2
        if t.dim() != dimensions and name in ("A", "R", "B", "weight"):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, must have {dimensions} dimensions")
        if t.requires_grad and name in ("A", "B", "weight") and torch.is_grad_enabled():
            raise ValueError(f"{name}: got requires_grad=True, must be frozen (LoRA-XS trains only R): .detach() it")
    (r, K), N = A.shape, B.shape[0]
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: got shape {tuple(x.shape)}, must be (..., {K}) for A of shape {tuple(A.shape)}")
    expected = {"R": (r, r), "B": (N, r), "weight": (N, K), "bias": (N,), "out": (*x.shape[:-1], N)}
    if index is not None:
        expected["R"] = (index.n, r, r)
        if index.device != x.device:
            raise ValueError(f"index: was made for device {index.device}, must be {x.device} like x")
    for name, shape in expected.items():
        if name in operands and operands[name].shape != shape:
            raise ValueError(f"{name}: got shape {tuple(operands[name].shape)}, must be {shape}")
    if r == 0:
        raise ValueError(f"A: got shape {tuple(A.shape)}, must have at least one row (rank >= 1)")
    if torch.compiler.is_compiling():  # compiled code adds to out when all has been read
        return
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, must be finite")
    grad = in_grad_mode() and (x.requires_grad or R.requires_grad)
    for name in ("A", "R", "B", "weight") if grad else ():
        if name in operands and operands[name].is_inference():
            raise ValueError(f"{name}: got an inference tensor, must be one that autograd can keep: .clone() it")
    if out is not None:
        check_out(out, x=x, A=A, R=R, B=B, weight=weight, bias=bias)
        _check_in_place(out, grad)


def _check_in_place(out: Tensor, grad: bool) -> None:
    """Raise a ValueError for an `out` that autograd would refuse, which it does only when it has been written.

    grad: whether a gradient will pass from what is added.
    """
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out: got an inference tensor outside of torch.inference_mode(), must be none: clone it first")
    if not (grad or (in_grad_mode() and out.requires_grad)):
        return
    base = out._base if out._is_view() else out
    if out.requires_grad and base.is_leaf:
        raise ValueError("out: got a leaf that requires grad, or a view of one, must be neither: clone it first")
    if out._is_view() and torch._C._autograd._get_creation_meta(out) != torch._C._autograd.CreationMeta.DEFAULT:
        raise ValueError(
            "out: got a view made under no_grad, or one of several that one operation made (chunk, split, unbind), "
            "must be the only view that its operation made, with gradients on, such as a slice"
        )
