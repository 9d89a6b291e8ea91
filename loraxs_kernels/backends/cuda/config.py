"""Which kernels of the core a problem takes, and how they are cut: a pure function of sizes, dtype and device.

For Hopper tried on an H100 (bench/results/NOTES.md has what was measured of the GEMM); for other GPUs counted, see
csrc/*.cu.  Nothing here needs the core or a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..device import Device

WIDEST_SHRINK, WIDEST_DECODE = 64, 128  # ranks
TOKENS = 64  # rows that decode takes at most
ALIGNMENT = 8  # 16-bit elements in the 16 bytes that TMA and wide copies want addresses and pitches in
SHRINK_ROWS, SHRINK_COLUMNS = 64, 128  # what a block of the shrink takes at a time
UNIT = 128  # rows that a program of shrink_tma takes at a time, and a tile of the GEMM has
DECODE_COLUMNS = 16 * 8  # of y, that a program of the decode makes at a time, 16 a warp
CLUSTER = 8  # the largest that every Hopper GPU can run
PARTS = 32  # of z at most, where blocks share K: the second launch reads them all


class Tile(NamedTuple):
    """A tile of y: its rows and columns, what it costs beside its size, and how wide a band of such tiles is best."""

    rows: int
    columns: int
    cost: float
    swizzle: int


# csrc/gemm_tail_tiles.h.  For 64 columns of the sum the large tile reads 32 KB from L2, the small one 24 KB for half as
# much of y; on an H100 at its power limit the small one is faster all the same, except for a narrow y or a long sum.
TILES = {0: Tile(128, 256, 1.0, 4), 1: Tile(128, 128, 0.95, 2)}
NARROW, LONG, SMALL_COST = 2048, 2, 1.1  # columns of y, and K / N: below the one or above the other it costs that
RASTER = 2  # along N: the rows of u are needed in the order in which they are made
# Multiprocessors for the programs that make u beside the GEMM; columns of y from which they keep up with it; units of
# rows from which it pays.
BESIDE, WIDE, LEAST_UNITS = 4, 4096, 32
PAIR = 2  # programs above each other that share a tile of W: rows are padded to as many tiles
LEAST_BUSY = 0.5  # share of the GPU that must have work for the GEMM here: the library's can split K


@dataclass(frozen=True)
class Decode:
    """One launch for few rows: `clusters` groups of `cluster` programs."""

    cluster: int
    clusters: int


@dataclass(frozen=True)
class Rows:
    """z and u first, then y: by the GEMM with a tail, as tiles of a number, or (None) by the library's GEMMs.

    The library's also where y is added to an output, which costs a GEMM of the library's 3.5 % at most
    (bench/results/NOTES.md).
    """

    shrink: int  # blocks that share K; 0: z by the library
    tile: int | None
    overlap: bool  # of each launch's start with the end of the one before
    swizzle: int = 1  # order of the GEMM's tiles, see csrc/loraxs.h
    raster: int = 0
    programs: int = 0  # on Hopper, in place of `shrink`: of csrc/shrink_tma.cu, which run while the GEMM does


class Workspace(NamedTuple):
    """Shapes of what the shrink writes beside z; None: not needed."""

    u: tuple[int, int]  # in the compute dtype, of which the first r columns are u
    parts: tuple[int, int, int] | None  # of z, fp32, one for each block that shares K
    gram: tuple[int, int, int] | None  # fp32, one for each SHRINK_ROWS rows


@lru_cache(maxsize=4096)
def pick(
    T: int, N: int, K: int, r: int, dtype: torch.dtype, device: Device, architectures: tuple[str, ...]
) -> Decode | Rows | None:
    """The plan for x (T, K), A (r, K), B (N, r); None: there is nothing here for it, the torch backend computes it.

    architectures: those the core was built for.  Operands that TMA or wide copies cannot read as they lie are the
    launcher's affair (backends/cuda/__init__.py).
    """
    if dtype not in (torch.bfloat16, torch.float16) or min(T, N, K) == 0 or max(T, N, K) >= 2**31:
        return None
    hopper = device.capability == (9, 0) and "90a" in architectures
    if T <= TOKENS and r <= WIDEST_DECODE:
        return _decode(N, K, device.multiprocessors, CLUSTER if hopper else 1)
    if hopper:
        return _hopper(T, N, K, r, device.multiprocessors) if K % ALIGNMENT == N % ALIGNMENT == 0 else None
    if r > WIDEST_SHRINK or K % ALIGNMENT:
        return None
    return Rows(split(T, K, device.multiprocessors), None, overlap=False)


def workspace(T: int, r: int, split: int, gram: bool) -> Workspace:
    """What a shrink of T rows by `split` blocks needs."""
    parts = (split, T, r) if split > 1 else None
    return Workspace((T, aligned(r)), parts, (-(-T // SHRINK_ROWS), r, r) if gram else None)


def aligned(n: int) -> int:
    """The pitch of rows of n 16-bit elements that begin at multiples of 16 bytes."""
    return _whole(n, ALIGNMENT)


def _decode(N: int, K: int, multiprocessors: int, largest: int) -> Decode:
    """As many programs to a cluster as have 32 columns of x each, as many clusters as have columns of y."""
    cluster = 1
    while 2 * cluster <= largest and 2 * cluster * 32 <= K:
        cluster *= 2
    wanted = -(-N // (DECODE_COLUMNS * cluster))
    return Decode(cluster, max(1, min(wanted, multiprocessors // cluster)))


def split(T: int, K: int, multiprocessors: int) -> int:
    """Blocks that share K: as many as the GPU has room for, each with two steps at least."""
    free = multiprocessors // -(-T // SHRINK_ROWS)
    return max(1, min(free, -(-K // (2 * SHRINK_COLUMNS)), PARTS))


def _hopper(T: int, N: int, K: int, r: int, multiprocessors: int) -> Rows | None:
    """The GEMM with a tail, after u or while it is made; None where it would leave the GPU idle."""
    long = K > LONG * N

    def waves(tile: int, swizzle: int, multiprocessors: int = multiprocessors) -> int:
        """In how many turns the programs make their tiles of y, whose rows and columns fill whole bands."""
        rows, columns = -(-T // TILES[tile].rows), -(-N // TILES[tile].columns)
        tiles = _whole(rows, PAIR * swizzle) * _whole(columns, swizzle)
        return -(-tiles // multiprocessors)

    def cost(tile: int) -> float:
        rows, columns, cost, _ = TILES[tile]
        return waves(tile, 1) * rows * columns * (SMALL_COST if tile == 1 and (N < NARROW or long) else cost)

    tile = min(TILES, key=cost)
    rows, columns, _, swizzle = TILES[tile]
    if LEAST_BUSY * waves(tile, 1) * multiprocessors * rows * columns > T * N:
        return None
    if waves(tile, swizzle) > waves(tile, 1):
        swizzle = 1
    # Where tiles come in whole waves the GEMM loses nothing; with a short sum the programs' ends weigh too much.
    free = waves(tile, swizzle, multiprocessors - BESIDE) == waves(tile, swizzle)
    if r <= WIDEST_SHRINK and long and N >= WIDE and free and T >= LEAST_UNITS * UNIT:
        return Rows(0, tile, True, swizzle, RASTER, BESIDE)
    return Rows(0, tile, False, swizzle, RASTER)


def _whole(n: int, by: int) -> int:
    return -(-n // by) * by


def unsupported(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Why kernels built for these architectures cannot run on a GPU of this capability; None: they can."""
    major, minor = capability
    if capability < (8, 0):
        return f"the GPU has compute capability {major}.{minor}, it must be at least 8.0 (Ampere)"
    if any(name.isdigit() and int(name) <= 10 * major + minor for name in architectures):
        return None
    if f"{major}{minor}a" in architectures:
        return None
    built = ", ".join(f"sm_{name}" for name in architectures)
    wanted = "90a" if capability == (9, 0) else f"{major}{minor}"
    return (
        f"the CUDA core is built for {built}, the GPU has compute capability {major}.{minor}: "
        f"install again with LORAXS_CUDA_ARCHS={wanted}"
    )
