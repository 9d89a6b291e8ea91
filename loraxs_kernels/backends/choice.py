"""Which backend is fastest where: measured, kept as data, and looked up by a pure function.

choices.json has what was measured for everybody; bench/choices.py takes it from the reports of bench/gpu_suite.py.
What the user has measured (tuned.py) goes before it.  Without a row for a call the answer is "torch".  Nothing here
needs a GPU.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..naming import dtype_name
from . import tuned
from .device import Device
from .triton.config import padded

TABLE = Path(__file__).with_name("choices.json")
LEAST, MOST = 16, 32768  # tokens: the buckets are the powers of two from the one to the other
DIRECTIONS = ("forward", "backward")
DTYPES = ("bfloat16", "float16")  # the products of fp32 depend on a setting of torch: they have no rows


class Row(NamedTuple):
    """For which calls which backend was measured to be the fastest; sizes as the primitive's, x (T, K), B (N, r)."""

    capability: tuple[int, int]
    multiprocessors: int
    dtype: str
    direction: str  # "backward": x is gY, and gR is made as well
    weight: bool  # whether x W^T is part of the call
    rank: int  # padded, see triton/config.py
    tokens: int  # a bucket of T
    N: tuple[int, int]  # the least and the most that were measured: the row is for nothing else
    K: tuple[int, int]
    backend: str
    gain: float  # time of the torch backend over that of this one, over the layers that the row is for
    kernels: str  # tuned.kernels of this backend, as measured
    source: str

    @property
    def key(self) -> tuple:
        """The kind of call; of rows for one kind the first counts whose sizes fit."""
        return self[:7]


def pick(T: int, N: int, K: int, r: int, dtype: torch.dtype, direction: str, weight: bool, device: Device) -> str:
    """The backend for x (T, K), B (N, r) on a GPU: that of the row for such a call, else "torch".

    A row does not count where N or K lies outside of what was measured, where its backend cannot run here, or where the
    backend's kernels are others than those that were measured.  The same arguments, files and installation give the
    same answer, always.
    """
    row = row_for(T, N, K, r, dtype, direction, weight, device)
    return row.backend if row else "torch"


def row_for(
    T: int, N: int, K: int, r: int, dtype: torch.dtype, direction: str, weight: bool, device: Device
) -> Row | None:
    """The row behind `pick`; None: there is none, and the torch backend is picked."""
    return _row_for(bucket(T), N, K, padded(r), dtype, direction, weight, device)


@lru_cache(maxsize=4096)
def _row_for(
    tokens: int, N: int, K: int, rank: int, dtype: torch.dtype, direction: str, weight: bool, device: Device
) -> Row | None:
    key = (*device, dtype_name(dtype), direction, weight, rank, tokens)
    own = tuned.rows(device, "choices", parse)
    for row in (*own, *(committed() if torch.version.hip is None else ())):  # AMD's numbers mean other GPUs
        if row.key == key and row.N[0] <= N <= row.N[1] and row.K[0] <= K <= row.K[1] and _in_force(row):
            return row
    return None


def bucket(T: int) -> int:
    """The power of two that T is counted as: the least that is not below it, from LEAST to MOST."""
    return min(MOST, max(LEAST, 1 << max(T - 1, 0).bit_length()))


def _in_force(row: Row) -> bool:
    """Whether the row's backend can run here, by the kernels that were measured."""
    from . import triton, unavailable

    if row.backend == "torch":
        return True
    if row.backend == "triton" and triton.interpreted():
        return False
    return row.kernels == tuned.kernels(row.backend) and unavailable(row.backend) is None


@cache
def committed() -> tuple[Row, ...]:
    """The rows that come with the package."""
    return tuple(map(parse, json.loads(TABLE.read_text())["rows"]))


def forget() -> None:
    """The user's table has changed."""
    _row_for.cache_clear()


def parse(entry: dict[str, Any]) -> Row:
    """A row as it stands in a file, checked.  Raises ValueError, TypeError or KeyError."""
    row = Row(**entry | {name: tuple(entry[name]) for name in ("capability", "N", "K")})
    pairs = (row.capability, row.N, row.K)
    good = (
        all(len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair) for pair in pairs)
        and row.N[0] <= row.N[1]
        and row.K[0] <= row.K[1]
        and row.dtype in DTYPES
        and row.direction in DIRECTIONS
        and type(row.weight) is bool
        and row.rank == padded(row.rank)
        and row.tokens == bucket(row.tokens)
        and row.backend in ("torch", "triton", "cuda")
        and 0 < row.gain < math.inf
    )
    if not good:
        raise ValueError(f"got {entry}")
    return row
