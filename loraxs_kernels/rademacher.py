"""+-1 from a hash: random vectors that are the same on every device, whatever the state of a generator."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

ELEMENTS = 2**18  # hashed at a time, in 64 bits each


def rademacher(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """A (rows, columns) int8 matrix of +-1, each a hash of (seed, row, column): the same on every device."""
    column = torch.arange(columns, device=device)[None, :]
    out = torch.empty(rows, columns, dtype=torch.int8, device=device)
    step = max(1, ELEMENTS // max(1, columns))
    for i in range(0, rows, step):
        row = torch.arange(i, min(i + step, rows), device=device)[:, None]
        out[i : i + step] = 1 - 2 * (_mix(_mix(row + _mix(seed)) + column) & 1)
    return out


M = TypeVar("M", int, Tensor)


def _mix(h: M) -> M:
    """A 32-bit integer hash (C. Wellons' lowbias32) in arithmetic of 64 bits or more, which wraps alike everywhere."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)
