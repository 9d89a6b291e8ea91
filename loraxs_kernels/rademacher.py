"""+-1 from a hash: random vectors that are the same on every device, whatever the state of a generator."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor


def rademacher(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """A (rows, columns) int8 matrix of +-1, each a hash of (seed, row, column): the same on every device."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    hashed = _mix(_mix(row + _mix(seed)) + column)
    return (1 - 2 * (hashed & 1)).to(torch.int8)


M = TypeVar("M", int, Tensor)


def _mix(h: M) -> M:
    """A 32-bit integer hash (C. Wellons' lowbias32) in arithmetic of 64 bits or more, which wraps alike everywhere."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)
