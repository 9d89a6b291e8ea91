"""The primitive for autograd: its gradient, the autograd Function of eager calls, and the torch.library operators.

The operators are what torch.compile and torch.export see.  Eager calls go through the Function instead: with an
operator's Python boundary a small step takes over half as long again (bench/results/cpu, group "host", path
"operator").
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends, reference
from .backends import torch as torch_backend
from .backends.device import in_forward_mode, refuse_transforms
from .backends.torch import cast, scaled_mm, shrink

_NOTHING = nullcontext()


def autocast_on(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x (there is none for meta tensors)."""
    if not (torch._C._is_any_autocast_enabled() and isinstance(x, Tensor)):
        return False
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep torch.autocast, where it is on, from casting the fp32 side (z, u, R) of the primitive."""
    if not autocast_on(x):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False) if torch.compiler.is_compiling() else _Off(x.device.type)


def refuse_create_graph(what: str) -> None:
    """For the backward of a Function that torch does not record.

    torch's own once_differentiable raises only if the derivative that is asked for runs through the gradients; if other
    ways lead there too, it leaves these out without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} cannot be differentiated again: got create_graph=True, must be False")


class _Off(AbstractContextManager):
    """Autocast off, by its switch and not by a block of torch's.

    If Ctrl-C comes while torch enters or leaves a block of its own, torch never again drops the casts of weights that
    it keeps during autocast, and training goes on with stale ones.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device_type, False)

    def __exit__(self, *_: Any) -> None:
        torch.set_autocast_enabled(self.device_type, True)


def in_grad_mode() -> bool:
    """Whether autograd records: not in inference mode, where torch.enable_grad() has no effect."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def rows_of(t: Tensor) -> Tensor:
    """t (..., n) as (T, n); n may be 0."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def rows_of_out(out: Tensor) -> Tensor:
    """out (..., n) as a view (T, n), or a ValueError."""
    try:
        return out.view(math.prod(out.shape[:-1]), out.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"out: got shape {tuple(out.shape)} with strides {out.stride()}, must be viewable as rows of "
            f"{out.shape[-1]} to be written in place"
        ) from None


class LowRankLinear(torch.autograd.Function):
    """(y, z) of the primitive on x (T, K).

    z is an output so that gradients of gradients can reach x by it, although x is not kept.  With `out` (..., N) the
    result is added to it and y is a stand-in of its shape without memory.

    rest: (W, A, B, s, bias, out, direction, forced), the last two as in backends.select: in one tuple, since autograd
    spends time on each argument of its own, and none of these has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, rest: tuple) -> tuple[Tensor, Tensor]:
        W, A, B, s, bias, out, direction, forced = rest
        need_gX, need_gR, _ = ctx.needs_input_grad
        into = None if out is None else rows_of_out(out)
        primitive = backends.select(x, *B.shape, W is not None, direction, forced)
        y, z, _ = primitive(x, W, A, R, B, s, bias, into)
        # Only what the backward will read: W for gX, z for gR.  All tensors are kept here, where checkpointing and
        # hooks find them, and none on ctx.
        ctx.save_for_backward(W if need_gX else None, A, R, B, z if need_gR else None)
        ctx.s, ctx.how = s, ("backward" if direction == "forward" else "forward", forced)
        ctx.set_materialize_grads(False)
        return y if out is None else out.new_empty(()).expand(out.shape), z

    @staticmethod
    def backward(ctx: Any, gY: Tensor | None, gz: Tensor | None) -> tuple:
        need_gX, need_gR, _ = ctx.needs_input_grad
        rows = gY if gY is None or gY.dim() == 2 else rows_of(gY)
        return *gradients(eager, rows, gz, *ctx.saved_tensors, ctx.s, need_gX, need_gR, *ctx.how), None


# `LowRankLinear.apply` without the Python that torch.autograd.Function puts around it: that serves torch.func, for
# which `run` calls `plain`, and unwraps tensors that outlived a transform, which give the same results without it.
apply = super(torch.autograd.Function, LowRankLinear).apply


def gradients(
    op: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    gY: Tensor | None,
    gz: Tensor | None,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    z: Tensor | None,
    s: float,
    need_gX: bool,
    need_gR: bool,
    *how: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """gX = gY W + s (gY B) R A and gR = s (gY B)^T z: the primitive on transposed views, whose gram gR is.

    gY (T, N), z = x A^T (T, r).  Gradients not needed are None.  gz (T, r), that of z, adds gz A to gX; there is one
    only where gradients are differentiated.  op(gY, W, A, R, B, s, other, *how) runs the primitive on the transposes
    of W, A, R and B and returns (gX, v, gR), in grad mode (create_graph=True) differentiable in gY and R; its gR is
    not, so that there gR = s v^T z is a product of its own, of outputs that are.
    """
    if autocast_on(A):
        with no_autocast(A):
            return gradients(op, gY, gz, W, A, R, B, z, s, need_gX, need_gR, *how)
    gX = gR = None
    again = torch.is_grad_enabled()
    if gY is not None and (need_gX or again):
        if again and torch._C._functorch.is_legacy_batchedtensor(gY):
            op = _chain
        gX, v, gR = op(gY, W, A, R, B, s, z if need_gR and not again else None, *how)
        if need_gR and again:
            gR = s * (v.t() @ z)
    elif gY is not None and need_gR:
        gR = scaled_mm(shrink(gY, B).t(), z, s, cast(R, z.dtype))
    if gz is not None and need_gX:
        through_z = cast(gz, A.dtype) @ A
        gX = through_z if gX is None else gX + through_z
    return gX if need_gX else None, cast(gR, R.dtype) if need_gR and gR is not None else None


def eager(
    gY: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    other: Tensor | None,
    direction: str,
    forced: backends.Forced,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`op` of `gradients` by the backend that is chosen for the backward."""
    again = torch.is_grad_enabled()
    if not again:
        r, K = A.shape
        primitive = backends.select(gY, K, r, W is not None, direction, forced)
        if primitive is torch_backend.lowrank_linear:  # which would transpose the transposes again
            return torch_backend.products(gY, W, B, R, A, s, None, None, other)
    Wt, Bt, Rt, At = None if W is None else W.t(), B.t(), R.t(), A.t()
    if again:
        return *LowRankLinear.apply(gY, Rt, (Wt, Bt, At, s, None, None, direction, forced)), None
    return primitive(gY, Wt, Bt, Rt, At, s, None, None, other)


def _chain(gY: Tensor, W: Tensor | None, A: Tensor, R: Tensor, B: Tensor, s: float, *_: Any) -> tuple[Tensor, ...]:
    """`op` of `gradients` for a batch of gY in grad mode, in which a Function would lose its graph."""
    return plain(gY, None if W is None else W.t(), B.t(), R.t(), A.t(), s)


def plain(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    *_: Any,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`operator` in operators that torch can transform and other programs know; it asks nothing about sizes.

    index (T,): R is a stack, as in `reference.lowrank_linear`.
    """
    z = (x @ A.T).to(torch.promote_types(x.dtype, torch.float32))
    y = (s * reference.mixed(z, R.to(z.dtype), index)).to(x.dtype) @ B.T  # fp16 might not hold R and gR
    if W is not None:
        y = F.linear(x, W, bias) + y
    elif bias is not None:
        y = y + bias
    return y, z, z.new_empty(0) if other is None else s * (z.t() @ other)


def _kernel(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    other: Tensor | None,
    direction: str,
    forced: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_forward_mode()
    with no_autocast(x):
        primitive = backends.select(x, *B.shape, W is not None, direction, forced or None)
        y, z, gram = primitive(x, W, A, R, B, s, bias, None, other)
    return y, z, z.new_empty(0) if gram is None else gram


def _shapes(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    other: Tensor | None,
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
    _, W, A, R, B, s, _, _, direction, forced = inputs
    ctx.s, ctx.how = s, ("backward" if direction == "forward" else "forward", forced)
    ctx.save_for_backward(W, A, R, B, output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    gY: Tensor | None,
    gz: Tensor | None,
    _: None,  # of the gram, which only `_opaque` asks for
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gX, gR = gradients(_opaque, gY, gz, *ctx.saved_tensors, ctx.s, needed[0], needed[3], *ctx.how)
    return gX, None, None, gR, None, None, None, None, None, None


def _opaque(
    gY: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    other: Tensor | None,
    direction: str,
    forced: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`op` of `gradients` as the operator."""
    Wt = None if W is None else W.t()
    return operator(gY, Wt, B.t(), R.t(), A.t(), s, None, other, direction, forced)


def _compiled(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    forced: str,
    code: str,  # for torch's caches alone
) -> Tensor:
    few = isinstance(x.shape[0], int) and x.shape[0] <= FEW  # a symbolic number of rows is asked nothing
    # On a GPU torch before 2.10 computes the torch backend's product with out_dtype, but cannot trace it.
    certain = forced in ("", "torch") if x.is_cpu else forced == "torch" and torch.__version__ >= (2, 10)
    if few and certain and not in_forward_mode():
        with no_autocast(x):  # which may be on where the call runs and was off where it was recorded
            if in_grad_mode() and (x.requires_grad or R.requires_grad):
                return LowRankLinear.apply(x, R, (W, A, B, s, bias, None, "forward", "torch"))[0]
            return torch_backend.lowrank_linear(x, W, A, R, B, s, bias)[0]
    return operator(x, W, A, R, B, s, bias, None, "forward", forced)[0]


def _exported_before(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, backend = operands
    return operator(*operands, "forward", backend)


def exporting() -> bool:
    """Whether torch.export is at work; before torch 2.13 torch.compiler.is_exporting says so of torch.compile, too."""
    return getattr(torch.compiler, "_is_exporting_flag", False)  # torch 2.7 and later


# Up to how many rows compiled code consists of plain operators.
FEW = 64
# Names what AOTAutograd traces: torch keeps compiled graphs on disk by the calls that dynamo has recorded.
_TRACED = (globals(), vars(torch_backend), vars(reference))
try:
    CODE = hashlib.sha256(b"".join(m["__loader__"].get_data(m["__file__"]) for m in _TRACED)).hexdigest()[:16]
except (OSError, AttributeError):  # in a frozen application: no graph is taken from the disk
    CODE = secrets.token_hex(8)


def _latest(name: str) -> Callable[..., Any]:
    """The function of this module as it was imported last."""

    def call(*args: Any, **named: Any) -> Any:
        return _operators.latest[name](*args, **named)

    return call


def _define() -> torch.library.Library:
    """Define the operators, by hand: torch.library.custom_op wraps every call in more Python."""
    library = torch.library.Library("loraxs", "DEF")
    operands = "Tensor x, Tensor? W, Tensor A, Tensor R, Tensor B, float s, Tensor? bias"
    # (y, z, gram) of the primitive as one node that torch.compile does not look into; gram is empty without `other`,
    # as an operator cannot return None.  direction, forced: as in backends.select, which is asked at every call; ""
    # for None.
    library.define(
        f"primitive({operands}, Tensor? other, str direction, str forced) -> (Tensor, Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    library.impl("primitive", _latest("_kernel"), "CompositeExplicitAutograd")
    torch.library.register_fake("loraxs::primitive", _latest("_shapes"), lib=library)
    torch.library.register_autograd(
        "loraxs::primitive", _latest("_backward"), setup_context=_latest("_setup_context"), lib=library
    )
    # y, as torch.compile meets it: dynamo records the call as it is; AOTAutograd, which comes after dynamo, traces what
    # `_compiled` does.  At up to FEW rows on the torch backend that gives plain operators, which inductor may fuse and
    # calls without Python.  Otherwise it gives the operator above: for more rows inductor would copy y before it adds
    # to it; where the number of rows is symbolic one graph serves all; and on a GPU, where no backend is forced, the
    # choice is made at run time.  Exported programs hold the operator above, whose schema other versions know, too.
    library.define(f"linear({operands}, str forced, str code) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.impl("linear", _latest("_compiled"), "CompositeImplicitAutograd")
    # The operator in programs that were exported by earlier versions of this library.
    library.define(
        f"lowrank_linear({operands}, Tensor? other, str backend) -> (Tensor, Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    library.impl("lowrank_linear", _latest("_exported_before"), "CompositeImplicitAutograd")
    return library


# Graphs hold the operators, which therefore outlive this module where it is imported again (importlib.reload).
_operators = torch.ops.loraxs
if not hasattr(_operators, "library"):
    _operators.library = _define()
_operators.latest = globals()
operator = _operators.primitive.default
linear = _operators.linear.default
