"""What the backends with kernels of their own share: facts of a device, and memory that is read, written, made."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_NOTHING = nullcontext()


class Device(NamedTuple):
    """What of a GPU decides how a launch is cut: never its name."""

    capability: tuple[int, int]
    multiprocessors: int


@lru_cache(maxsize=64)
def facts(device: torch.device) -> Device:
    """Those of a device; of a CPU, where kernels are interpreted or emulated, an H100's."""
    if device.type == "cpu":
        return Device((9, 0), 132)
    found = torch.cuda.get_device_properties(device)
    return Device((found.major, found.minor), found.multi_processor_count)


def on(device: torch.device) -> AbstractContextManager[None]:
    """Launches go to the current device, which need not be the tensors'."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory on the device of `like`: everything these backends allocate."""
    return like.new_empty(shape, dtype=dtype)


def plain(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The operands as a kernel can read them: all on one device, each with its numbers at its address, and only those.

    A negated view (`c.conj().imag`) is copied, and so is a zero tensor, which autograd may hand over in place of zeros
    and which has no memory.  Real tensors have no conj bit.  Raises, before anything is launched, ValueError for an
    operand on another device than x, and RuntimeError for tangents of forward-mode AD, under torch.func's transforms
    and for a batch of gY, which comes as x: a kernel would drop what they carry.
    """
    operands = (x, W, A, R, B, bias, other)
    if transformed(*operands) or torch._C._functorch.is_legacy_batchedtensor(x):
        refuse_transforms("lora_xs_linear, lora_xs_delta and decode: their kernels")
    device, as_they_are = x.device, True
    for t in operands:
        if t is not None:
            if t.device != device:
                _refuse_device(x, W=W, A=A, R=R, B=B, bias=bias, z=other)
            if t.is_neg() or t._is_zerotensor():
                as_they_are = False
    if as_they_are:
        return operands
    return tuple(t.clone() if t is not None and (t.is_neg() or t._is_zerotensor()) else t for t in operands)


def _refuse_device(x: Tensor, **operands: Tensor | None) -> NoReturn:
    name, t = next((name, t) for name, t in operands.items() if t is not None and t.device != x.device)
    raise ValueError(f"{name}: got device {t.device}, must be {x.device} like x")


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func (vmap, jvp, grad, ...) is at work, under which all tensors are wrapped, or forward-mode AD on
    one of these tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if not in_forward_mode():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def in_forward_mode() -> bool:
    """Whether the call is made inside torch.autograd.forward_ad.dual_level or torch.func.jvp."""
    return forward_ad._current_level >= 0


def refuse_transforms(what: str) -> NoReturn:
    """The error for work that torch cannot see into, and therefore cannot transform; `what` is the work."""
    raise RuntimeError(
        f"{what} cannot be transformed by torch.func (vmap, jvp, grad, ...), differentiated in forward mode or batched "
        "(torch.autograd.grad with is_grads_batched=True); use loraxs_kernels.reference.lowrank_linear, which can"
    )


def check_out(out: Tensor, **operands: Tensor | None) -> None:
    """Raise a ValueError if `out` cannot be written in place while the operands are read; `x` may be out itself.

    Rows or columns of one buffer, side by side or interleaved, are known to be apart; what cannot be told apart by its
    address and strides is refused.  Different storages are taken to be apart, as torch takes them.
    """
    if out.is_neg():
        raise ValueError("out: got a negated view (its neg bit is set), must be a tensor that holds its own numbers")
    if out._is_zerotensor():
        raise ValueError("out: got a zero tensor without memory, must be one that can be written: .clone() it")
    try:
        if not out.data_ptr():  # on the meta device, or empty
            return
        if not out.is_contiguous() and _Runs.of(out).shared:
            what = f"shape {tuple(out.shape)} with strides {out.stride()}"
            raise ValueError(f"out: got {what}, must have memory of its own for each element")
        memory = out.untyped_storage().data_ptr()
        for name, t in operands.items():
            if t is None or t.is_neg() or t._is_zerotensor():  # of the last two a copy is read
                continue
            if t.untyped_storage().data_ptr() != memory or _Runs.of(out).apart(_Runs.of(t)):
                continue
            itself = name == "x" and (t.data_ptr(), t.shape, t.stride()) == (out.data_ptr(), out.shape, out.stride())
            if not itself:
                but = ", unless it is x itself" if name == "x" else ""
                raise ValueError(f"out: got a tensor that overlaps {name} in memory, must share none with it{but}")
    except RuntimeError:  # FakeTensor and torch.func's tensors have no address
        return


class _Runs(NamedTuple):
    """Where the elements of a tensor lie: in runs of `width` bytes, `pitch` apart (0: in one), over `extent` bytes."""

    address: int
    width: int
    pitch: int
    extent: int
    shared: bool  # whether two elements share memory, or may

    @classmethod
    def of(cls, t: Tensor) -> _Runs:
        size = width = extent = t.element_size()
        pitch = count = 0
        shared = False
        for stride, n in sorted((size * stride, n) for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1):
            before, extent = extent, extent + stride * (n - 1)
            if stride < before:
                shared, width, pitch = True, extent, 0
            elif pitch and stride == pitch * count:
                count *= n
            elif not pitch and stride == width:
                width = extent
            else:
                width, pitch, count = before, stride, n
        return cls(t.data_ptr(), width, pitch, extent if t.numel() else 0, shared)

    def apart(self, other: _Runs) -> bool:
        """Whether they share no byte, as far as can be told."""
        ahead = other.address - self.address
        if ahead >= self.extent or -ahead >= other.extent:
            return True
        pitch = max(self.pitch, other.pitch)
        alike = pitch > 0 and {self.pitch, other.pitch} <= {0, pitch}
        return alike and self.width <= ahead % pitch <= pitch - other.width
