"""The kernels: x -> A -> R -> B in one launch or two.

Letters as everywhere: x (T, K), A (r, K), R (r, r), B (N, r), y (T, N); z = x A^T, u = s z R^T, both on chip in a tile
of RANK >= r columns, the rest of which is zero.  z is fp32, u is rounded to the dtype of x, sums are fp32.

How operands lie: rows of x and y are contiguous and begin x_t and y_t elements apart.  Rows of A and R are contiguous,
or with A_TURNED their columns are; those of A begin A_pitch elements apart, R has no gaps.  B likewise with B_TURNED
and B_pitch.  Of what is contiguous along the rank, `width` >= r elements are read, zeros from r on: a width of 16 lets
a rank of 12 be read 16 bytes at a time.  Offsets are 64-bit, masks take care of every edge.

PRECISION is that of fp32 products (`input_precision` of tl.dot) with A and B, R_PRECISION of those with R and of the
gram; products of half-precision operands are exact.  Kernels are not compiled anew for another number of rows
(do_not_specialize).

Counted for 16-bit operands, and for T = 8192, N = K = 4096, r = 64 on an H200 (4.3 TB/s):
    memory    x is read and y written once, 2 T (K + N) bytes: 134 MB, 31 us.  A and B, 2 r (K + N) bytes, stay in the
              L2 cache, z, the parts and R are small.
    L2        each block of rows reads A and B anew: T / BLOCK_T times 1 MB, 134 MB at BLOCK_T = 64; with x, 200 MB of
              reads, some 35 us where the cache gives 6 TB/s.  Half with BLOCK_T = 128, on half as many programs.
    flops     2 T r (K + N + 2 r): 8.7 GFLOP, 11 us at 790 TFLOP/s.
So 31 us is the floor and 40 us the prediction for chain_kernel; the library's GEMM, which then reads y beside its own
work, takes up to 16 us longer for it.
"""

import triton
import triton.language as tl


@triton.jit
def _at(i, k, pitch, TURNED: tl.constexpr):
    """Where element (i, k) of a matrix lies: in rows, or in columns."""
    return k * pitch + i if TURNED else i * pitch + k


@triton.jit
def _shrink(
    x, A, rows, T, r, width, begin, end, x_t, A_pitch,
    A_TURNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = x A^T over begin <= k < end."""
    ranks = tl.arange(0, RANK).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    first = tl.cast(begin, tl.int64)
    pitch = tl.cast(A_pitch, tl.int64)
    x_tile = x + rows[:, None] * x_t + (first + k)[None, :]
    A_tile = A + _at(ranks[None, :], (first + k)[:, None], pitch, A_TURNED)
    x_step = tl.cast(BLOCK_K, tl.int64)
    A_step = _at(0, x_step, pitch, A_TURNED)
    limit = width if A_TURNED else r
    z = tl.zeros((BLOCK_T, RANK), tl.float32)
    for at in range(begin, end, BLOCK_K):
        inside = at + k < end
        x_part = tl.load(x_tile, mask=(rows < T)[:, None] & inside[None, :], other=0.0)
        A_part = tl.load(A_tile, mask=(ranks < limit)[None, :] & inside[:, None], other=0.0)
        z = tl.dot(x_part, A_part, z, input_precision=PRECISION)
        x_tile += x_step
        A_tile += A_step
    return z


@triton.jit
def _rounded(t, PRECISION: tl.constexpr):
    """t rounded to the 10 bits of its fraction that a TF32 instruction reads: it would cut off the other 13."""
    if PRECISION == "tf32":
        bits = (t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        t = tl.where(t == t, bits.to(tl.float32, bitcast=True), t)  # a NaN stays one
    return t


@triton.jit
def _mix(z, R, r, s, R_TURNED: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """u = s z R^T, z being `_rounded`."""
    ranks = tl.arange(0, RANK).to(tl.int64)
    inside = (ranks < r)[:, None] & (ranks < r)[None, :]
    Rt = tl.load(R + _at(ranks[None, :], ranks[:, None], r, R_TURNED), mask=inside, other=0.0)
    Rt = _rounded(Rt.to(tl.float32), PRECISION)
    return s * tl.dot(z, Rt, input_precision=PRECISION)


@triton.jit
def _expand(
    u, B, bias, y, rows, T, N, r, width, begin, end, B_pitch, y_t,
    B_TURNED: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = u B^T (+ bias) (+ y) over begin <= n < end."""
    ranks = tl.arange(0, RANK).to(tl.int64)
    limit = r if B_TURNED else width
    u = u.to(B.dtype.element_ty)
    y_rows = y + rows[:, None] * y_t
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        wide = n.to(tl.int64)
        B_part = tl.load(
            B + _at(wide[None, :], ranks[:, None], tl.cast(B_pitch, tl.int64), B_TURNED),
            mask=(n < N)[None, :] & (ranks < limit)[:, None],
            other=0.0,
        )
        tile = tl.dot(u, B_part, input_precision=PRECISION)
        if bias is not None:
            tile += tl.load(bias + wide, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y_tile = y_rows + wide[None, :]
        inside = (rows < T)[:, None] & (n < N)[None, :]
        if ADD:
            tile += tl.load(y_tile, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_tile, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _keep(z, rounded, other, gram, z_out, block, rows, T, r, s, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """Store z, and this row block's part of the gram s z^T other where there is an `other`."""
    ranks = tl.arange(0, RANK).to(tl.int64)
    at = rows[:, None] * r + ranks[None, :]
    inside = (rows < T)[:, None] & (ranks < r)[None, :]
    tl.store(z_out + at, z, mask=inside)
    if other is not None:
        z_forward = _rounded(tl.load(other + at, mask=inside, other=0.0), PRECISION)
        part = s * tl.dot(tl.trans(rounded), z_forward, input_precision=PRECISION)
        square = (ranks < r)[:, None] & (ranks < r)[None, :]
        tl.store(gram + block * r * r + ranks[:, None] * r + ranks[None, :], part, mask=square)


@triton.jit(do_not_specialize=["T"])
def chain_kernel(
    x, A, R, B, bias, other, y, z_out, gram, T, s, N, K, r, width, x_t, A_pitch, B_pitch, y_t,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ADD: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, R_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_T rows: z = x A^T over all of K, u = s z R^T, y = u B^T (+ bias) (+ y) tile by tile."""
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    z = _shrink(x, A, rows, T, r, width, 0, K, x_t, A_pitch, A_TURNED, BLOCK_T, BLOCK_K, RANK, PRECISION)
    rounded = _rounded(z, R_PRECISION)
    _keep(z, rounded, other, gram, z_out, block, rows, T, r, s, RANK, R_PRECISION)
    u = _mix(rounded, R, r, s, A_TURNED, RANK, R_PRECISION)
    _expand(u, B, bias, y, rows, T, N, r, width, 0, N, B_pitch, y_t, B_TURNED, BLOCK_N, RANK, ADD, PRECISION)


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, A, parts, T, K, r, width, x_t, A_pitch,
    A_TURNED: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first half of chain_kernel for few rows: program (i, j) leaves z of its share of K in parts[j] (T, RANK)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    share = tl.cdiv(tl.cdiv(K, tl.num_programs(1)), BLOCK_K) * BLOCK_K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    z = _shrink(x, A, rows, T, r, width, begin, end, x_t, A_pitch, A_TURNED, BLOCK_T, BLOCK_K, RANK, PRECISION)
    part = parts + tl.program_id(1).to(tl.int64) * T * RANK
    tl.store(part + rows[:, None] * RANK + tl.arange(0, RANK).to(tl.int64)[None, :], z, mask=(rows < T)[:, None])


@triton.jit(do_not_specialize=["T", "shares"])
def expand_kernel(
    parts, R, B, bias, other, y, z_out, gram, T, s, shares, N, r, width, B_pitch, y_t,
    R_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ADD: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, R_PRECISION: tl.constexpr,
):  # fmt: skip
    """The second half: z is the sum of the parts, always in the same order; program (i, j) makes its share of N.

    Every program of a row block sums z anew (they are small, and in the cache); the first one keeps it.
    """
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    part = parts + rows[:, None] * RANK + tl.arange(0, RANK).to(tl.int64)[None, :]
    z = tl.zeros((BLOCK_T, RANK), tl.float32)
    for _ in range(shares):
        z += tl.load(part, mask=(rows < T)[:, None], other=0.0)
        part += tl.cast(T, tl.int64) * RANK
    rounded = _rounded(z, R_PRECISION)
    if tl.program_id(1) == 0:
        _keep(z, rounded, other, gram, z_out, block, rows, T, r, s, RANK, R_PRECISION)
    u = _mix(rounded, R, r, s, R_TURNED, RANK, R_PRECISION)
    share = tl.cdiv(tl.cdiv(N, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    _expand(u, B, bias, y, rows, T, N, r, width, begin, end, B_pitch, y_t, B_TURNED, BLOCK_N, RANK, ADD, PRECISION)
