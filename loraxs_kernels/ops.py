"""The gradient of the primitive, and the primitive as a torch.library operator.

The operator is what torch.compile and torch.export see: one opaque node.  Eager calls go through the autograd
Function of functional.py instead: with the operator's Python boundary a small step takes over half as long again
(bench/results/cpu, group "host", path "operator").
"""

# No `from __future__ import annotations`: torch.library reads the operator's schema from the annotations.
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor

from . import backends, reference
from .backends.device import in_forward_mode, refuse_transforms
from .backends.torch import cast, scaled_mm, shrink

_NOTHING = nullcontext()


def autocast_on(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x (there is none for meta tensors)."""
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep torch.autocast, where it is on, from casting the fp32 side (z, u, R) of the primitive."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else _NOTHING


def gradients(
    op: Callable[..., tuple[Tensor, Tensor, Optional[Tensor]]],  # noqa: UP045
    gY: Optional[Tensor],  # noqa: UP045
    gz: Optional[Tensor],  # noqa: UP045
    W: Optional[Tensor],  # noqa: UP045
    A: Tensor,
    R: Tensor,
    B: Tensor,
    z: Optional[Tensor],  # noqa: UP045
    s: float,
    need_gX: bool,
    need_gR: bool,
) -> tuple[Optional[Tensor], Optional[Tensor]]:  # noqa: UP045
    """gX = gY W + s (gY B) R A and gR = s (gY B)^T z: the primitive on transposed views, whose gram gR is.

    `op` is a backend's `lowrank_linear`; gY (T, N), z = x A^T (T, r).  Gradients not needed are None.  gz (T, r), that
    of z, adds gz A to gX; there is one only where gradients are differentiated.  In grad mode (create_graph=True) `op`
    is differentiable in gY and R, its gram is not, and gR = s v^T z is a product of its own, of outputs that are.
    """
    gX = gR = None
    again = torch.is_grad_enabled()
    if again and gY is not None and torch._C._functorch.is_legacy_batchedtensor(gY):
        op = _chain
    with no_autocast(A):
        if gY is not None and (need_gX or again):
            other = z if need_gR and not again else None
            gX, v, gR = op(gY, None if W is None else W.t(), B.t(), R.t(), A.t(), s, other=other)
            if need_gR and again:
                gR = s * (v.t() @ z)
        elif gY is not None and need_gR:
            gR = scaled_mm(shrink(gY, B.t()).t(), z, s, cast(R, z.dtype))
        if gz is not None and need_gX:
            through_z = cast(gz, A.dtype) @ A
            gX = through_z if gX is None else gX + through_z
    return gX if need_gX else None, cast(gR, R.dtype) if need_gR and gR is not None else None


def _chain(x: Tensor, W: Optional[Tensor], A: Tensor, R: Tensor, B: Tensor, s: float, other: None) -> tuple:  # noqa: UP045
    """The primitive in plain torch, for a batch of gY in grad mode, in which a Function would lose its graph."""
    y, z = reference.lowrank_linear(x, W, A, R.to(x.dtype), B, s)
    return y, z.to(torch.promote_types(z.dtype, torch.float32)), other


@torch.library.custom_op("loraxs::lowrank_linear", mutates_args=())
def lowrank_linear(
    x: Tensor,
    W: Optional[Tensor],  # noqa: UP045
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Optional[Tensor],  # noqa: UP045
    other: Optional[Tensor],  # noqa: UP045
    direction: str,
    forced: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, gram) of the primitive; gram is empty without `other`, as an operator cannot return None.

    direction, forced: as in backends.select, with "" for None; the backend is chosen at every call.
    """
    _refuse_forward_mode()
    with no_autocast(x):
        primitive = backends.select(x, W, A, B, direction, forced or None)
        y, z, gram = primitive(x, W, A, R, B, s, bias, None, other)
    return y, z, z.new_empty(0) if gram is None else gram


@lowrank_linear.register_fake
def _(
    x: Tensor,
    W: Optional[Tensor],  # noqa: UP045
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Optional[Tensor],  # noqa: UP045
    other: Optional[Tensor],  # noqa: UP045
    direction: str,
    forced: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_forward_mode()
    z = x.new_empty(x.shape[0], A.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape[0], B.shape[0]), z, z.new_empty(0) if other is None else z.new_empty(R.shape)


def _refuse_forward_mode() -> None:
    """torch runs an operator that has no forward-mode derivative all the same, and drops the tangents."""
    if in_forward_mode():
        refuse_transforms("lora_xs_linear and lora_xs_delta: compiled code")


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, W, A, R, B, ctx.s, _, _, ctx.direction, ctx.forced = inputs
    ctx.save_for_backward(W, A, R, B, output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    gY: Optional[Tensor],  # noqa: UP045
    gz: Optional[Tensor],  # noqa: UP045
    _: None,  # of the gram, which only the line with `other` below asks for
) -> tuple[Optional[Tensor], ...]:  # noqa: UP045
    def op(*operands: Any, other: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # noqa: UP045
        turned = "backward" if ctx.direction == "forward" else "forward"
        return lowrank_linear(*operands, None, other, turned, ctx.forced)

    needed = ctx.needs_input_grad
    gX, gR = gradients(op, gY, gz, *ctx.saved_tensors, ctx.s, needed[0], needed[3])
    return gX, None, None, gR, None, None, None, None, None, None


lowrank_linear.register_autograd(_backward, setup_context=_setup_context)
