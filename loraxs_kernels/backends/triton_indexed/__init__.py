"""The primitive with an index in Triton: many R on one A and B, and each row of x uses one of them, or none.

kernels.py holds the kernels and what they cost.  How a launch is cut, started and multiplied is ../triton's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...padding import readable_columns
from .. import triton
from ..device import empty, on, plain
from ..triton.config import Config, padded, precision

ALONE = 512  # rows up to which each has a program of the mix to itself
CHAIN = 64  # the widest padded rank of the chain in one launch: before Hopper a wider one would spill registers
_R_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor, A: Tensor, R: Tensor, B: Tensor) -> bool:
    """Whether `lowrank_linear_indexed` takes these operands here; if not, the torch backend must compute it."""
    return plan(x, A, R, B) is not None and triton.unavailable() is None


def plan(x: Tensor, A: Tensor, R: Tensor, B: Tensor) -> Config | None:
    """How the launch is cut, as for one R; None: x, A and B are nothing for Triton, or the matrices of R have gaps."""
    if R.dtype not in _R_DTYPES or turned(R) is None:
        return None
    return triton.plan(x, A, B)


def turned(R: Tensor) -> bool | None:
    """Which way each matrix of R (n, r, r) lies without gaps: False: in rows, True: in columns, None: neither."""
    r, strides = R.shape[2], R.stride()[1:]
    return False if r == 1 or strides == (r, 1) else True if strides == (1, r) else None


def lowrank_linear_indexed(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    index: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + u B^T (+ bias), with z = x A^T and u_t = s R[index_t] z_t; returns (y, z).

    x (T, K), W (N, K) or None, A (r, K), B (N, r), bias (N,) and out (T, N) are those of backends/torch.py, and z is
    (T, r) in fp32.  R is (n, r, r) in fp32, bf16 or fp16: each matrix lies without gaps, in rows or in columns, at any
    distance from the next.  index (T,) int32 is on x's device: -1 gives a row no R, and its u is exactly zero.  Its
    values are not checked: they must be below n.

    Besides the GEMM with W: one launch where there are more than ALONE rows, they fill the chip and the rank is at most
    CHAIN; else three (shrink, mix, expand).
    Kernels, grids and workspace do not depend on the index, nor does a row's result on what other rows use.  Every sum
    has a fixed order: same inputs, same bits.  The workspace is at most config.MOST parts of z, and u.

    Raises ValueError, before anything is launched, for operands that it does not run for, and for another index.
    """
    config = plan(x, A, R, B)
    if config is None:
        raise ValueError("the triton backend does not take these operands with an index: ask `runs` first")
    if index.dtype is not torch.int32 or index.shape != x.shape[:1] or index.device != x.device:
        got = f"shape {tuple(index.shape)} of {index.dtype} on {index.device}"
        raise ValueError(f"index: got {got}, must be ({x.shape[0]},) of torch.int32 on {x.device} like x")
    x, W, A, R, B, bias, _ = plain(x, W, A, R, B, bias)
    with on(x.device):
        y, z = low_rank(config, x, A, R, B, s, index, bias, out)
        return (y if W is None else y.addmm_(x, W.t())), z


def low_rank(
    config: Config,
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    index: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, z) without W."""
    from ..triton.launcher import launch  # which imports Triton
    from . import kernels  # noqa: F401  without which `launch` does not find them

    (T, K), (N, r) = x.shape, B.shape
    blocks, rank, add = -(-T // config.block_t), padded(r), out is not None
    if x.stride(1) != 1:
        x = x.contiguous()
    A, A_pitch, A_turned = triton.as_it_lies(A)
    B, B_pitch, B_turned = triton.as_it_lies(B)
    R_next, R_turned = R.stride(0), turned(R)
    width = min(readable_columns(A.t()) if A_turned else rank, rank if B_turned else readable_columns(B))
    bias, index = (t if t is None else t.contiguous() for t in (bias, index))
    y = empty(x, (T, N), x.dtype) if out is None else out if out.stride(1) == 1 else out.contiguous()
    z = empty(x, (T, r), torch.float32)
    s, x_t, y_t = float(s), x.stride(0), y.stride(0)
    large, small = triton.dot_precision(precision(x.dtype))
    if config.one_launch and T > ALONE and rank <= CHAIN:
        launch(
            "chain_indexed_kernel",
            (blocks, 1, 1),
            (x, A, R, index, B, bias, y, z),
            (T, s),
            (N, K, r, width, x_t, A_pitch, R_next, B_pitch, y_t),
            (A_turned, R_turned, B_turned, add, rank, config.block_t, config.block_k, config.block_n, large, small),
            config,
        )
    else:
        step = 1 if T <= ALONE else 16
        parts, u = empty(x, (config.split_k, T, rank), torch.float32), empty(x, (T, rank), x.dtype)
        launch(
            "shrink_kernel",
            (blocks, config.split_k, 1),
            (x, A, parts),
            (T,),
            (K, r, width, x_t, A_pitch),
            (A_turned, rank, config.block_t, config.block_k, large),
            config,
        )
        launch(
            "mix_kernel",
            (-(-T // step), 1, 1),
            (parts, R, index, z, u),
            (T, s, config.split_k),
            (r, R_next),
            (R_turned, rank, step, small),
            dataclasses.replace(config, num_warps=4 if rank <= 64 else 8),
        )
        launch(
            "expand_mixed_kernel",
            (blocks, config.split_n, 1),
            (u, B, bias, y),
            (T,),
            (N, r, width, B_pitch, y_t),
            (B_turned, add, rank, config.block_t, config.block_n, large),
            config,
        )
    return (y if out is None or y is out else out.copy_(y)), z
