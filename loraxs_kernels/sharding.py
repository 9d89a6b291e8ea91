"""Tensors that are sharded over ranks, by DTensor (FSDP2, tensor parallelism) or DeepSpeed's ZeRO-3: gathered to be
read, and written so that every rank has its part.

DTensor and DeepSpeed are recognised by names and attributes, and imported only when a tensor of theirs is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Make tensors that DeepSpeed's ZeRO-3 has partitioned whole on every rank, to be read in the block: a collective.

    ZeRO-3 leaves every rank with a part in `ds_tensor`, and the parameter itself empty.  Tensors that the caller has
    gathered, or that DeepSpeed keeps whole because they are small, are left as they are.
    """
    parts = [t for t in tensors if hasattr(t, "ds_id") and t.shape != t.ds_shape]
    with _zero3(parts) if parts else nullcontext():
        yield


def is_gathered(t: Tensor) -> bool:
    """Whether t is whole inside a GatheredParameters of DeepSpeed, which cannot be nested."""
    return getattr(t, "_ds_z3_gathered_param_context_depth", 0) > 0


def _zero3(parts: list[Tensor], **options: Any) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts, **options)


def whole(t: Tensor) -> Tensor:
    """t, detached; if it is sharded over ranks (DTensor, ZeRO-3), gathered by a collective."""
    if is_dtensor(t):
        return t.detach().full_tensor()
    with gathered([t]):
        return t.detach().clone() if hasattr(t, "ds_id") else t.detach()  # what was gathered is DeepSpeed's to free


@torch.no_grad()
def assign(t: Tensor, value: Tensor) -> None:
    """t.copy_(value); if t is sharded over ranks, a collective, in which every rank gets its part of rank 0's value."""
    if is_dtensor(t):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(t.device, t.dtype), t.device_mesh, t.placements)
    with written([t]):
        t.copy_(value)
    _write_master(t, value)  # which t may have rounded


def check_writable(tensors: Iterable[Tensor]) -> None:
    """RuntimeError for a running engine's tensors that the caller has gathered: what is written would not last."""
    if any(is_gathered(t) and hasattr(t, "_z3_optimizer") for t in tensors):
        raise RuntimeError(
            "model: its parameters are gathered by deepspeed.zero.GatheredParameters, whose end does not reach the "
            "fp32 copies that DeepSpeed's optimizer has of them; call this outside of it, on every rank"
        )


@contextmanager
def written(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Make tensors that ZeRO-3 has partitioned whole for the block, and keep what rank 0 writes there: a collective.

    Tensors that the caller has gathered are left alone: the end of the caller's own block decides what they become.
    """
    check_writable(tensors := list(tensors))
    parts = [t for t in tensors if hasattr(t, "ds_id") and not is_gathered(t)]
    with _zero3(parts, modifier_rank=0) if parts else nullcontext():
        yield
    for t in tensors:
        _write_master(t, t.detach())


def _write_master(t: Tensor, value: Tensor) -> None:
    """Into the fp32 copy that DeepSpeed's optimizer has of t, if any, and would put in place of t after its next step.

    ZeRO-3: a rank writes its part, what it has in t, which is rank 0's, or what value has there if t is that rounded.
    DeepSpeed's safe_set_full_fp32_param fails where the parts are not of one size, and takes each rank's own value.
    """
    if getattr(t, "_hp_mapping", None) is not None:  # ZeRO-1 and ZeRO-2, where this rank has a part
        t.set_full_hp_param(value)
    if hasattr(t, "_z3_optimizer"):
        first = dist.get_rank(t.ds_process_group) * t.ds_tensor.numel()
        part = value.flatten()[first:][: t.ds_tensor.numel()].to(t.ds_tensor.device, torch.float32)
        master = t.ds_tensor.to(torch.float32, copy=True)  # padded at its end
        same = part.to(t.dtype) == t.ds_tensor[: len(part)]
        master[: len(part)][same] = part[same]
        t._z3_optimizer.set_local_hp_param(master, t)


def groups_of(t: Tensor) -> tuple[Any, ...]:
    """The process groups over which a tensor is sharded: DTensor's, one for each dimension of its mesh, or ZeRO-3's."""
    if is_dtensor(t):
        return tuple(t.device_mesh.get_group(i) for i in range(t.device_mesh.ndim))
    if hasattr(t, "ds_id") and dist.is_available() and dist.is_initialized():
        return (getattr(t, "ds_process_group", None) or dist.group.WORLD,)
    return ()


def is_dtensor(weight: Tensor) -> bool:
    """Whether a tensor is a DTensor, sharded or replicated over ranks; asked without importing torch.distributed."""
    return type(weight).__name__ == "DTensor"  # which torch.compile can tell, too
