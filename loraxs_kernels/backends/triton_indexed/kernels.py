"""The kernels with an index: x -> A -> R[index] -> B in one launch for many rows, in three for few.

Letters and layouts are those of ../triton/kernels.py, but R is (n, r, r): matrix i begins i R_next elements on, and
within it the rows are contiguous and without gaps, or with R_TURNED the columns are.  Row t of x uses R[index[t]]; a
negative index means none: its row of u is zero, whatever x holds.  Values of the index are not checked.

A tile of rows takes the matrices that its rows use one after another, the largest index first.  Each product is that
of the whole tile, of which only the rows with this index are kept: no other row's numbers enter a row, and its bits do
not depend on what the other rows use.  Nothing of a launch but the index and R depends on the mix, so that a CUDA graph
serves any.

Counted for N = K = 4096 and 16-bit operands on an H200 (4.3 TB/s of memory, 6 TB/s of L2 cache, some 0.5 us for a
matrix to be read and multiplied when the next one waits for it), R in fp32:
    few rows   each of up to 512 rows has a program of mix_kernel to itself, so that no matrix waits for another.  Rows
               that are all different read 4 r^2 bytes each from memory: 1 KB at r = 16 and 16 KB at r = 64, that is
               1 KB and 16 KB for T = 1, 66 KB and 1 MB for T = 64, 0.5 MB and 8.4 MB (0.1 and 2.0 us) for T = 512.
               Rows that are all alike read the same from the cache: 0.1 and 1.4 us.  The product is one of 16 rows
               with one in use, 32 r^2 flops of 2 r^2: 67 MFLOP at T = 512 and r = 64, 0.2 us at 400 TFLOP/s.
               Were the mix a part of the expand, as in ../triton, then each of the up to 132 programs that share N
               would read up to 16 matrices one after another: 8 us, and 34 MB at r = 64.  A launch costs 1 to 2 us.
    between    past 512 rows 16 share a program of mix_kernel: one matrix for each program if the rows are alike, and up
               to 16 one after another (8 us) if they are all different.
    prefill    8 samples of 1024 rows are 128 tiles of 64 rows with one index each: what chain_kernel does, and two
               maxima of 64 numbers.  A tile where two samples meet reads two matrices: 0.5 us.
    the worst  8192 rows that are all different in one launch: 64 matrices a tile, one after another, 32 us; 134 MB
               at r = 64 (31 us) and 8 MB at r = 16; 4.3 GFLOP at r = 64 (11 us).  All beside the 350 us of x W^T.
"""

import triton
import triton.language as tl

from ..triton import kernels
from ..triton.kernels import _expand, _mix, _rounded, _shrink


@triton.jit
def _mix_indexed(
    z, R, index, rows, inside, r, s, R_next, R_TURNED: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr
):
    """u_t = s R[index_t] z_t for the rows that are `inside`, z being `_rounded`."""
    own = tl.load(index + rows, mask=inside, other=-1)
    u = tl.zeros(z.shape, tl.float32)
    at = tl.max(own, 0)
    while at >= 0:
        product = _mix(z, R + tl.cast(at, tl.int64) * R_next, r, s, R_TURNED, RANK, PRECISION)
        u = tl.where((own == at)[:, None], product, u)
        at = tl.max(tl.where(own < at, own, -1), 0)
    return u


@triton.jit
def _store_z(z, z_out, rows, inside, r, RANK: tl.constexpr):
    ranks = tl.arange(0, RANK).to(tl.int64)
    tl.store(z_out + rows[:, None] * r + ranks[None, :], z, mask=inside[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["T"])
def chain_indexed_kernel(
    x, A, R, index, B, bias, y, z_out, T, s, N, K, r, width, x_t, A_pitch, R_next, B_pitch, y_t,
    A_TURNED: tl.constexpr, R_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ADD: tl.constexpr, RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    R_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_T rows: z = x A^T over all of K, u_t = s R[index_t] z_t, y = u B^T (+ bias) (+ y)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    z = _shrink(x, A, rows, T, r, width, 0, K, x_t, A_pitch, A_TURNED, BLOCK_T, BLOCK_K, RANK, PRECISION)
    _store_z(z, z_out, rows, rows < T, r, RANK)
    u = _mix_indexed(_rounded(z, R_PRECISION), R, index, rows, rows < T, r, s, R_next, R_TURNED, RANK, R_PRECISION)
    _expand(u, B, bias, y, rows, T, N, r, width, 0, N, B_pitch, y_t, B_TURNED, BLOCK_N, RANK, ADD, PRECISION)


@triton.jit(do_not_specialize=["T", "shares"])
def mix_kernel(
    parts, R, index, z_out, u_out, T, s, shares, r, R_next,
    R_TURNED: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, R_PRECISION: tl.constexpr,
):  # fmt: skip
    """Between shrink_kernel and expand_mixed_kernel: z is the sum of the parts, u (T, RANK) in the dtype of x.

    A program takes STEP rows, at most 16, in a tile of the 16 that a product has at least.
    """
    lanes = tl.arange(0, 16)
    rows = tl.program_id(0).to(tl.int64) * STEP + lanes
    inside = (lanes < STEP) & (rows < T)
    at = rows[:, None] * RANK + tl.arange(0, RANK).to(tl.int64)[None, :]
    part = parts + at
    z = tl.zeros((16, RANK), tl.float32)
    for _ in range(shares):
        z += tl.load(part, mask=inside[:, None], other=0.0)
        part += tl.cast(T, tl.int64) * RANK
    _store_z(z, z_out, rows, inside, r, RANK)
    u = _mix_indexed(_rounded(z, R_PRECISION), R, index, rows, inside, r, s, R_next, R_TURNED, RANK, R_PRECISION)
    tl.store(u_out + at, u.to(u_out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["T"])
def expand_mixed_kernel(
    u, B, bias, y, T, N, r, width, B_pitch, y_t,
    B_TURNED: tl.constexpr, ADD: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = u B^T (+ bias) (+ y); program (i, j) makes its share of N."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = rows[:, None] * RANK + tl.arange(0, RANK).to(tl.int64)[None, :]
    u = tl.load(u + at, mask=(rows < T)[:, None], other=0.0)
    share = tl.cdiv(tl.cdiv(N, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    _expand(u, B, bias, y, rows, T, N, r, width, begin, end, B_pitch, y_t, B_TURNED, BLOCK_N, RANK, ADD, PRECISION)


for each in (chain_indexed_kernel, mix_kernel, expand_mixed_kernel):
    setattr(kernels, each.__name__, each)  # where launcher.launch finds a kernel by its name
