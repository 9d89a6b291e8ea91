"""What the backends with kernels of their own share: facts of a device, and the memory they allocate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

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
