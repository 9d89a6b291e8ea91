"""What the backends with kernels of their own share: facts of a device, and memory that is read, written, made."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import gcd
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

    Memory is compared by addresses, sizes and strides: rows or columns of one buffer, side by side or interleaved, are
    known to be apart.  A shared buffer whose elements cannot be told apart that way is refused.
    """
    if out.is_neg():
        raise ValueError("out: got a negated view (its neg bit is set), must be a tensor that holds its own numbers")
    if out._is_zerotensor():
        raise ValueError("out: got a zero tensor without memory, must be one that can be written: .clone() it")
    try:
        first = out.data_ptr()
        if not first:  # on the meta device, or empty
            return
        mine, end = None, first + out.nbytes
        if not out.is_contiguous():
            mine = _Elements.of(out)
            if mine.overlap_themselves():
                raise ValueError(
                    f"out: got shape {tuple(out.shape)} with strides {out.stride()}, must have memory of its own for "
                    "each element"
                )
            end = first + mine.extent
        for name, t in operands.items():
            if t is None or t.data_ptr() >= end or (t.is_contiguous() and t.data_ptr() + t.nbytes <= first):
                continue
            if t.is_neg() or t._is_zerotensor():  # a copy is read
                continue
            mine, theirs = mine or _Elements.of(out), _Elements.of(t)
            if mine.may_meet(theirs) and not (name == "x" and mine == theirs):
                itself = ", unless it is x itself" if name == "x" else ""
                raise ValueError(f"out: got a tensor that overlaps {name} in memory, must share none with it{itself}")
    except RuntimeError:  # FakeTensor and torch.func's tensors have no address
        return


class _Elements(NamedTuple):
    """Where the elements of a tensor lie: all in bytes, strides of 0 and dimensions of one element left out."""

    address: int
    size: int  # of an element
    extent: int  # from the first byte to the last
    dims: tuple[tuple[int, int], ...]  # (stride, count), largest stride first; neighbours that run on are one
    repeated: bool  # whether a stride is 0

    @classmethod
    def of(cls, t: Tensor) -> _Elements:
        size, address = t.element_size(), t.data_ptr()
        if t.is_contiguous():
            count = t.numel()
            return cls(address, size, size * count, ((size, count),) if count > 1 else (), False)
        dims: list[tuple[int, int]] = []
        laid = sorted(
            ((size * stride, n) for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1), reverse=True
        )
        for stride, n in laid:
            if stride and dims and dims[-1][0] == stride * n:
                dims[-1] = (stride, n * dims[-1][1])
            elif stride:
                dims.append((stride, n))
        extent = size + sum(stride * (n - 1) for stride, n in dims)
        return cls(address, size, extent, tuple(dims), any(not stride for stride, _ in laid))

    def overlap_themselves(self) -> bool:
        """Whether two elements share memory; for more than two dimensions that do not run on, whether they may."""
        if self.repeated:
            return True
        if len(self.dims) == 2:
            (a, m), (b, n) = self.dims
            steps = gcd(a, b)
            return b // steps < m and a // steps < n  # b/steps of the one stride are a/steps of the other
        return any(stride < self._reach(i + 1) for i, (stride, _) in enumerate(self.dims))

    def may_meet(self, other: _Elements) -> bool:
        """Whether an element of the one and one of the other share memory, as far as the rules below can tell."""
        ahead = other.address - self.address
        if ahead >= self.extent or -ahead >= other.extent or not self.extent or not other.extent:
            return False
        strides = [stride for stride, _ in (*self.dims, *other.dims)]
        if _apart(ahead, gcd(*strides), self.size, other.size):  # interleaved
            return False
        pitch = max(strides, default=0)  # rows, in columns of their own?
        return not _apart(
            ahead, pitch, *(each._reach(bool(each.dims) and each.dims[0][0] == pitch) for each in (self, other))
        )

    def _reach(self, first: int) -> int:
        """The bytes from the first to the last that the dimensions from this one on take."""
        return self.size + sum(stride * (n - 1) for stride, n in self.dims[first:])


def _apart(ahead: int, period: int, mine: int, theirs: int) -> bool:
    """Whether [0, mine) and [ahead, ahead + theirs) stay apart, both repeated at every multiple of the period."""
    return period > 0 and mine <= ahead % period <= period - theirs
