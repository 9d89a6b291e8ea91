"""Randomized truncated SVD: the largest r singular triplets of a weight, or of many.

How a group of equally shaped weights is taken apart, with m <= n (a tall one is read transposed), all at once but for
the products with W, which are the library's and go through the group one by one:

    krylov     Q = orth[W X, (W W^T) W X, ..., (W W^T)^q W X]         D = (q + 1) b columns, 2 (q + 1) reads of W
    subspace   Q = orth[T_q(2 W W^T / c - 1) W X]                     D = b columns, 2 (q + 1) reads
    both       Z = W^T Q,   Z^T Z = P diag(S^2) P^T,   U = Q P,   V = Z P / S          (Rayleigh-Ritz)

X (n, b) is +-1 from a hash.  Reading W bounds the time: a bf16 weight of 4096 x 14336 is 117 MB, 27 us at 4.3 TB/s,
and its product with b = 72 columns in two terms 17 GFLOP, 21 us at 790 TFLOP/s, so that the library's product is at the
limit; all terms of a split factor go into one product, which reads W once.  Next in bytes is Z^T Z in fp64 (Z is
25 MB there), then the orthogonalisation on the smaller side.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

METHODS = ("krylov", "subspace")
# Half-precision terms of X in W X and of Q in W^T Q.  With one term in W X delta W would be 2e-4 to 2e-3 from that of
# a device that multiplies exactly, more than an adapter file accepts; with two it is below 1e-4, and up to r = 64 the
# second one costs nothing beside reading W.
TERMS = 2
KRYLOV_COLUMNS = 512  # D up to which "auto" takes krylov; past it Q, Z and the eigenproblem grow too large
GROUP_BYTES = 256 * 2**20  # of working memory for the weights taken apart together on a GPU
GROUP = 16  # and at most so many of them; also how many may wait for the host's eigenproblems
KEEP_BYTES = 512 * 2**20  # and what those may hold
GRAM_ROWS = 4096  # of an fp64 copy at a time
NARROW, PIECES = 128, 8  # a Gram of up to so many columns is summed in so many pieces
MOST_ITERATIONS = 1000  # q: far past what changes a result, and not for ever
LEAST = 1e-8  # of c, over the sum of the squares of the singular values: less, and rounding spoils the iteration


Triplets = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Plan:
    """What `truncated_svd` does, nothing left to choose: with the seed, the weight and the device it fixes U, S, Vh.

    method: "krylov" or "subspace".  block: b, columns of X.  n_iter: q.
    """

    method: str
    block: int
    n_iter: int


def plan(
    rank: int,
    shape: Sequence[int],
    *,
    method: str = "auto",
    block: int | None = None,
    n_iter: int | None = None,
) -> Plan:
    """The defaults filled in for weights of this shape, as `truncated_svd` describes them.

    Raises ValueError where an argument is out of range.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f'method: got {method!r}, must be "auto", "krylov" or "subspace"')
    if block is not None and block < rank:
        raise ValueError(f"block: got {block}, must be at least the rank, {rank}")
    if n_iter is not None and not 0 <= n_iter <= MOST_ITERATIONS:
        raise ValueError(f"n_iter: got {n_iter}, must be from 0 to {MOST_ITERATIONS}")
    # For the Krylov space a narrow block and one more step cost what a wide block costs and come nearer to the truth.
    # Multiples of 8 keep rows of bf16 aligned.
    krylov = Plan("krylov", block or -(-rank // 8) * 8 + 8, 5 if n_iter is None else n_iter)
    if method == "krylov" or (method == "auto" and basis_columns(min(shape), krylov) <= KRYLOV_COLUMNS):
        return krylov
    return Plan("subspace", block or -(-3 * rank // 16) * 8, 6 if n_iter is None else n_iter)


@torch.no_grad()
def truncated_svd(
    W: Tensor,
    rank: int,
    *,
    method: str = "auto",
    block: int | None = None,
    n_iter: int | None = None,
    seed: int = 0,
) -> Triplets:
    """The `rank` largest singular triplets of W: W ~ U diag(S) Vh.

    Block Krylov iteration (Musco and Musco, arXiv 1504.05477) or, for large ranks, subspace iteration with a
    Chebyshev polynomial (Zhou and Saad, SIAM J. Matrix Anal. Appl. 29, 2007), from a start of +-1 that is a hash of
    (seed, row, column).  The same arguments give the same bits on one device, alone or in a batch; U S Vh of two
    devices agree to 1e-5, or as far as the spectrum tells the vectors apart.  Neither
    autocast nor the user's TF32 settings reach in.  Singular values that are zero to working precision get orthonormal
    vectors all the same.

    Args:
        W: (..., m, n), bf16, fp16, fp32 or fp64, finite.  On a GPU half precision is never upcast: the other factor
            of each product is split into terms of W's dtype and the products are summed in fp32.  On a CPU one matrix
            at a time is.
        rank: r, 1 <= r <= min(m, n).
        method: "krylov", "subspace", or "auto": krylov where Q then has at most 512 columns, up to rank 72 by default.
        block: b >= r, columns of the start; None: r + 8 for krylov, 3 r / 2 for subspace, on multiples of 8.
        n_iter: q; each is two more reads of W.  None: 5 for krylov, 6 for subspace.
        seed: of the start.

    Returns:
        U (..., m, r) and Vh (..., r, n) with orthonormal columns and rows (to 1e-6), S (..., r) descending; fp32, or
        fp64 for fp64 W.  Each column of U has a positive inner product with a hashed +-1 vector, so signs are the same
        everywhere but for the rare vector nearly orthogonal to it; vectors of equal singular values are any basis of
        their span.

    Raises:
        TypeError: W is not a tensor of one of these dtypes.  ValueError: W has fewer than 2 dimensions, holds NaN or
        Inf or has singular values past the range of the result, or another argument is out of range.
    """
    if not isinstance(W, Tensor) or W.dtype not in DTYPES:
        what = f"dtype {W.dtype}" if isinstance(W, Tensor) else type(W).__name__
        raise TypeError(f"W: got {what}, must be a bfloat16, float16, float32 or float64 tensor")
    if W.dim() < 2:
        raise ValueError(f"W: got shape {tuple(W.shape)}, must have at least 2 dimensions")
    *batch, m, n = W.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: got {rank}, must be from 1 to min(m, n) = {min(m, n)} for W of shape {(m, n)}")
    how = plan(rank, (m, n), method=method, block=block, n_iter=n_iter)
    dtype = torch.promote_types(W.dtype, torch.float32)
    U = W.new_empty(*batch, m, rank, dtype=dtype)
    S = W.new_empty(*batch, rank, dtype=dtype)
    Vh = W.new_empty(*batch, rank, n, dtype=dtype)
    if not W.numel():
        return U, S, Vh
    check_device(W.device, "W")
    matrices = W.reshape(-1, m, n).unbind()
    size = group_size((m, n), W.dtype, W.device, how)
    groups = (Group(matrices[i : i + size], rank, how, seed) for i in range(0, len(matrices), size))
    outputs = zip(
        U.view(-1, m, rank).split(size), S.view(-1, rank).split(size), Vh.view(-1, rank, n).split(size), strict=True
    )
    with host_pool() if W.is_cuda else nullcontext() as pool:
        for made, out in zip(decompose(groups, pool), outputs, strict=True):
            for target, value in zip(out, made, strict=True):
                target.copy_(value)
    return U, S, Vh


def check_device(device: torch.device, what: str) -> None:
    """ValueError for a device that truncated_svd does not know."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what}: got a weight on {str(device)!r}, must be on a CPU or a CUDA device")


class NotFinite(ValueError):
    """A weight, or what is made of it, holds NaN or Inf; `index` is its place in its group."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"W: has {what}")
        self.index = index


def group_size(shape: Sequence[int], dtype: torch.dtype, device: torch.device, how: Plan) -> int:
    """How many weights of a shape are taken apart together; it never depends on how many there are.

    On a GPU the small steps always run on that many, empty places included: another number of matrices may choose
    another kernel of the library's, and other bits.
    """
    if device.type == "cpu":
        return 1
    return min(GROUP, max(1, GROUP_BYTES // working_bytes(shape, dtype, how)))


def working_bytes(shape: Sequence[int], dtype: torch.dtype, how: Plan) -> int:
    """Bytes of device memory to take apart one weight of this shape, beside W, U, S and Vh; an upper estimate."""
    m, n = sorted(shape[-2:])
    itemsize, D = max(4, dtype.itemsize), basis_columns(m, how)
    kept = (m + n) * D * itemsize * (1 if how.method == "krylov" else 2)
    step = (4 + TERMS / 2) * n * how.block * itemsize + 4 * m * how.block * 8
    eigenproblem = min(n, GRAM_ROWS) * D * 8 + 3 * D * D * 8
    return int(kept + max(step, eigenproblem))


@dataclass(frozen=True)
class Group:
    """Up to `group_size` weights of one shape, dtype and device, and what is to be made of them."""

    weights: Sequence[Tensor]
    rank: int
    how: Plan
    seed: int


@torch.no_grad()
def decompose(groups: Iterable[Group], pool: Executor | None = None, keep: int = KEEP_BYTES) -> Iterator[Triplets]:
    """(U, S, Vh) of the weights of each group, in order, stacked: (g, m, r), (g, r), (g, r, n).

    On a GPU the small eigenproblems of some groups are solved by the host while the next ones' products run.

    Args:
        groups: read when their turn comes; their weights are let go when their products are under way.
        pool: of the host, for groups on a GPU (`host_pool`).
        keep: bytes that groups whose products are done may hold while they wait for the host.

    Raises NotFinite, for the first group that was not yielded.
    """
    waiting: deque[_Started] = deque()
    for group in groups:
        begun = _Started(group, pool)
        on_cpu = group.weights[0].device.type == "cpu"
        del group
        # As many as the host has threads for; on a CPU there is nothing to overlap.
        while waiting and (
            sum(each.count for each in waiting) >= GROUP or sum(each.nbytes for each in (*waiting, begun)) > keep
        ):
            yield waiting.popleft().triplets()
        waiting.append(begun)
        del begun
        if on_cpu:
            yield waiting.popleft().triplets()
    while waiting:
        yield waiting.popleft().triplets()


@contextmanager
def host_pool() -> Iterator[Executor]:
    """Threads for the host's eigenproblems: one for each core this process may use, LAPACK with one thread in each.

    That takes half the time of all threads on one matrix after another (D = 432, even on 2 cores).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's, one process to a GPU
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # of this thread it never changed, of threads to come it has


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


# The groups of one shape share their start; on a GPU the hash is some forty launches.
_start = lru_cache(maxsize=4)(rademacher)
_sign_vector = lru_cache(maxsize=16)(rademacher)


class _Started:
    """A group on its way: all work up to the eigenproblem is under way once this is made."""

    def __init__(self, group: Group, pool: Executor | None) -> None:
        self.seed, self.count, how, first = group.seed, len(group.weights), group.how, group.weights[0]
        with exact_matmul():
            places = group_size(first.shape, first.dtype, first.device, how)
            products = _Products(group.weights, places, TERMS)
            self.flip, self.facts = products.flip, products.facts
            if basis_columns(products.m, how) == products.m:  # all of the smaller side: Q is the identity
                self.Q, self.Z = None, products.transposed()
            else:
                self.Q, self.Z = (_krylov if how.method == "krylov" else _subspace)(products, how, group.seed)
            self.eigenpairs = _eigenpairs(_gram(self.Z), self.count, group.rank, pool)
        self.nbytes = self.Z.nbytes + (0 if self.Q is None else self.Q.nbytes)

    def triplets(self) -> Triplets:
        with exact_matmul():
            peaks, scales = self.facts()
            for i, peak in enumerate(peaks.tolist()):
                if not peak < float("inf"):
                    raise NotFinite(i, f"a largest magnitude of {peak}, must be finite (no NaN, no Inf)")
            ritz, P = self.eigenpairs()
            # On the host, as `live` is: to ask the GPU would be to wait for the next group.
            S = ritz.clamp(min=0).sqrt()
            largest = (S[:, 0] / scales).to(self.Z.dtype)
            for i in (~torch.isfinite(largest)).nonzero().flatten().tolist():
                raise NotFinite(i, f"singular values past the range of {self.Z.dtype}, must be scaled down")
            live = 8 * torch.finfo(self.Z.dtype).eps * S[:, :1] < S
            P, inverse = (_to_device(t, self.Z) for t in (P, 1 / S.where(live, 1)))
            U = P if self.Q is None else self.Q @ P
            V = self.Z @ P * inverse[:, None, :]
            U, V = (_finished(t, live, self.count, self.seed + i) for i, t in ((1, U), (2, V)))
            S = _to_device(S.where(live, 0) / scales[:, None], U)
            U, V = (V, U) if self.flip else (U, V)
            signs = _signs(U, self.seed)
            g = self.count
            return (U * signs)[:g], S[:g], (V * signs).mT[:g]


class _Products:
    """W X and W^T Q for each weight of a group, with W (m, n) turned so that m <= n, and scaled.

    `scale` is the power of two that brings max |W| into (1/2, 1]; it goes to the other factor and to the product, and
    never to W.  Tensors are stacked to `places`, of which those past the weights hold zeros.
    """

    def __init__(self, weights: Sequence[Tensor], places: int, terms: int) -> None:
        first = weights[0]
        self.flip = first.shape[0] > first.shape[1]
        self.m, self.n = sorted(first.shape)
        self.dtype, self.device = torch.promote_types(first.dtype, torch.float32), first.device
        self.places, self.terms = places, terms
        low, high = (torch.stack(each) for each in zip(*(torch.aminmax(W) for W in weights), strict=True))
        peak = torch.zeros(places, dtype=torch.float64, device=self.device)
        peak[: len(weights)] = torch.maximum(-low, high)  # NaN and Inf both show
        limit = 2.0**120 if self.dtype == torch.float32 else 2.0**1000
        scale = _power_of_two((1 / peak).clamp(1 / limit, limit))
        self.scale = scale.to(self.dtype)[:, None, None]
        self.facts = to_host(torch.stack([peak, scale]))
        self.split = first.dtype != self.dtype and can_sum_in_fp32(self.device)
        if first.is_cpu and not self.split:
            weights = [W.to(self.dtype) for W in weights]
        # The library may choose its kernel by the alignment: at an odd one a weight would get other bits than alone.
        weights = [W.clone() if W.data_ptr() % 16 and not W.is_cpu else W for W in weights]
        self.weights = [W.mT if self.flip else W for W in weights]

    def times(self, X: Tensor) -> Tensor:
        """W X (places, m, b) for X (places, n, b) or one X (n, b) for all."""
        return self._each(self.weights, X, self.m)

    def transposed_times(self, Q: Tensor) -> Tensor:
        """W^T Q (places, n, b)."""
        return self._each([W.mT for W in self.weights], Q, self.n)

    def transposed(self) -> Tensor:
        """W^T (places, n, m) itself, scaled, in the dtype of the products."""
        out = torch.zeros(self.places, self.n, self.m, dtype=self.dtype, device=self.device)
        for W, scale, out_i in zip(self.weights, self.scale, out, strict=False):
            torch.mul(W.mT, scale, out=out_i)
        return out

    def _each(self, weights: Sequence[Tensor], X: Tensor, rows: int) -> Tensor:
        dtype = weights[0].dtype
        if dtype == torch.float16:  # of little range: the factor as large as it can be
            before = _power_of_two(2.0**13 / X.abs().amax(dim=(-2, -1), keepdim=True).double()).to(self.dtype)
        else:  # half of the scale: with all of it the last terms of X, or the sums, would leave the range
            before = _power_of_two(self.scale.double().sqrt()).to(self.dtype)
        after = self.scale / before
        X = (X * before).expand(self.places, -1, -1)
        out = torch.zeros(self.places, rows, X.shape[-1], dtype=self.dtype, device=X.device)
        if self.split:
            X = _split(X, dtype, self.terms)
        for W, X_i, after_i, out_i in zip(weights, X, after.expand(self.places, -1, -1), out, strict=False):
            if self.split:
                product, *rest = reversed(_mm_in_fp32(W, X_i).split(out.shape[-1], dim=-1))  # the small terms first
                for part in rest:
                    product = product + part
            else:
                product = torch.mm(W.to(self.dtype), X_i)
            torch.mul(product, after_i, out=out_i)
        return out


def _power_of_two(t: Tensor) -> Tensor:
    """The power of two in (t / 2, t] for each positive t, 1 for 0, NaN and Inf."""
    return (t / (2 * torch.frexp(t)[0])).where((t > 0) & (t < torch.inf), 1)


def _split(X: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """X as a sum of terms of a narrower dtype, side by side (..., terms b): one product with them reads W once."""
    parts = []
    for _ in range(terms):
        parts.append(X.to(dtype))
        X = X - parts[-1]
    return torch.cat(parts, dim=-1)


def can_sum_in_fp32(device: torch.device) -> bool:
    """Whether `_mm_in_fp32` can multiply half-precision weights there; else they are upcast, one matrix at a time."""
    return device.type == "cuda" and torch.version.hip is None and torch.__version__ >= (2, 8)


def _mm_in_fp32(W: Tensor, X: Tensor) -> Tensor:
    """W X in fp32 of half-precision factors, and no fp32 W is made."""
    return torch.mm(W, X, out_dtype=torch.float32)


def basis_columns(m: int, how: Plan) -> int:
    """D, the columns of Q for weights whose smaller side is m."""
    return min(m, how.block * (how.n_iter + 1 if how.method == "krylov" else 1))


def _krylov(products: _Products, how: Plan, seed: int) -> tuple[Tensor, Tensor]:
    """Q (places, m, D), orthonormal, and Z = W^T Q."""
    X = _start(products.n, how.block, seed, products.device).to(products.dtype)
    Q = X.new_empty(products.places, products.m, basis_columns(products.m, how))
    Z = X.new_empty(products.places, products.n, Q.shape[-1])
    for k in range(0, Q.shape[-1], how.block):
        block = slice(k, k + how.block)
        Q[..., block] = _orthonormal(products.times(X), Q[..., :k])
        X = Z[..., block] = products.transposed_times(Q[..., block])
    return Q, Z


def _subspace(products: _Products, how: Plan, seed: int) -> tuple[Tensor, Tensor]:
    """Q (places, m, b), orthonormal, and Z = W^T Q: a power step, then its Chebyshev polynomial of degree q.

    The polynomial is flat on [0, c], where c is about the square of the b-th singular value, and grows past it.
    Of the two subspaces the one that holds more of W is kept: where the values fall fast that may be the power step.
    Values below 1e-4 of the largest are less exact than by `_krylov`.
    """
    first = now = _orthonormal(products.times(_start(products.n, how.block, seed, products.device).to(products.dtype)))
    Z_first = Z = products.transposed_times(first)
    H, before = _gram(Z), None
    c = torch.maximum(_smallest(H), LEAST * _trace(H)).clamp(min=torch.finfo(Z.dtype).tiny).to(Z.dtype)
    for _ in range(how.n_iter):
        now, before = _chebyshev(products.times(Z), now, before, c)
        Z = products.transposed_times(now)
    now = _orthonormal(now)
    Z = products.transposed_times(now)
    better = _trace(_gram(Z)) > (1 + 1e-6) * _trace(H)  # by more than rounding
    return now.where(better, first), Z.where(better, Z_first)


def _chebyshev(MQ: Tensor, now: Tensor, before: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next and this polynomial in M on a start, T_k+1(y) = 2 y T_k - T_k-1 with y = 2 M / c - 1, from M T_k.

    Both are multiplied by one matrix from the right, which keeps the recurrence and makes the first orthonormal.
    """
    after = MQ * (2 / c) - now if before is None else MQ * (4 / c) - 2 * now - before
    R = _whitening(after)
    return after @ R, now @ R


def _orthonormal(Y: Tensor, Q: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span Y (places, m, b) minus the span of Q; dependent directions become noise or zero."""
    # Where nothing but rounding is left of Y it lies half in Q again: hence twice before the first scaling.
    for projections in (2, 1):
        for _ in range(projections if Q is not None and Q.shape[-1] else 0):
            Y = torch.baddbmm(Y, Q, Q.mT @ Y, alpha=-1)
        Y = Y @ _whitening(Y)
    return Y


def _whitening(Y: Tensor) -> Tensor:
    """Upper triangular R (places, b, b) that makes the columns of Y R orthonormal, from the fp64 Gram (CholeskyQR)."""
    L, scale = _cholesky(_gram(Y))
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return (scale[..., None] * torch.linalg.solve_triangular(L, eye, upper=False).mT).to(Y.dtype)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L and a scale s (places, b) with L L^T = diag(s) gram diag(s), of unit diagonal, so that no column is too small.

    The diagonal is lifted by 1e-14 b so that a singular one has a factor too.
    """
    d = gram.diagonal(dim1=-2, dim2=-1)
    scale = d.rsqrt().where(d > 0, 1)
    lifted = gram * (scale[..., None] * scale[..., None, :])
    lifted.diagonal(dim1=-2, dim2=-1).add_(1e-14 * gram.shape[-1])
    return torch.linalg.cholesky_ex(lifted)[0], scale


def _smallest(gram: Tensor) -> Tensor:
    """About the smallest eigenvalue, from above (places, 1, 1): the least pivot."""
    L, scale = _cholesky(gram)
    return (L.diagonal(dim1=-2, dim2=-1) / scale).amin(-1).square()[..., None, None]


def _trace(gram: Tensor) -> Tensor:
    """(places, 1, 1)"""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _gram(Y: Tensor) -> Tensor:
    """Y^T Y (places, b, b) in fp64, some rows at a time; a narrow Y in pieces, for more of the GPU to work on."""
    out = torch.zeros(len(Y), Y.shape[-1], Y.shape[-1], dtype=torch.float64, device=Y.device)
    for rows in Y.split(GRAM_ROWS, dim=-2):
        rows = rows.double()
        if Y.is_cuda and Y.shape[-1] <= NARROW and rows.shape[-2] % PIECES == 0:
            pieces = rows.unflatten(-2, (PIECES, -1))
            out += (pieces.mT @ pieces).sum(1)
        else:
            out.baddbmm_(rows.mT, rows)
    return out


def _eigenpairs(H: Tensor, count: int, rank: int, pool: Executor | None) -> Callable[[], tuple[Tensor, Tensor]]:
    """Starts on the r largest eigenvalues (places, r), descending, and eigenvectors (places, D, r) of H (places, D, D).

    Both in fp64 and on the host, zeros past `count`, by LAPACK, one matrix to a thread, while the GPU goes on to the
    next group: on the GPU torch.linalg.eigh goes through a batch of D > 32 one by one (pytorch issues 174674, 175585
    and 183806).
    """
    there = to_host(H)
    ritz = torch.zeros(len(H), rank, dtype=H.dtype, device="cpu")
    P = torch.zeros(len(H), H.shape[-1], rank, dtype=H.dtype, device="cpu")

    def solve(i: int) -> None:
        H_i = there()[i]
        if torch.isfinite(H_i).all():
            values, vectors = torch.linalg.eigh(H_i)
            ritz[i], P[i] = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
        else:  # as W was, and `triplets` says so
            ritz[i] = torch.nan

    solved = (map if pool is None else pool.map)(solve, range(count))

    def wait() -> tuple[Tensor, Tensor]:
        for _ in solved:
            pass
        return ritz, P

    return wait


def to_host(t: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host; the function waits for it, and for nothing that comes after."""
    if t.device.type == "cpu":
        return lambda: t
    there = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
    there.copy_(t, non_blocking=True)
    # Those that wait sleep: their cores have eigenproblems to solve.
    copied = torch.cuda.current_stream(t.device).record_event(torch.cuda.Event(blocking=True))

    def wait() -> Tensor:
        copied.synchronize()
        return there

    return wait


def _to_device(t: Tensor, like: Tensor) -> Tensor:
    """A host tensor on the device and in the dtype of another; the host does not wait for what is there to finish."""
    t = t.to(like.dtype)
    return t.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else t


def _finished(U: Tensor, live: Tensor, count: int, seed: int) -> Tensor:
    """U (places, m, r) orthonormal to rounding, with columns that are not live replaced; zeros past `count`."""
    for i in range(count):
        if not live[i].all():
            U[i] = _completed(U[i], live[i], seed)
    return U @ _whitening(U)


def _completed(U: Tensor, live: Tensor, seed: int) -> Tensor:
    """U (m, r) with the columns that are not live, which come last, replaced by orthonormal ones."""
    k = int(live.sum())
    fill = rademacher(len(U), len(live) - k, seed, U.device).to(U.dtype)
    # Householder QR gives orthonormal columns even where `fill` is singular.
    complement = torch.linalg.qr(torch.cat([U[:, :k], fill], dim=1)).Q[:, k:]
    return torch.cat([U[:, :k], complement], dim=1)


def _signs(U: Tensor, seed: int) -> Tensor:
    """+-1 for each column of U (places, 1, r): what makes its product with a hashed vector positive."""
    products = _sign_vector(U.shape[-2], 1, seed + 3, U.device).double().mT @ U.double()
    return torch.where(products < 0, -1.0, 1.0).to(U.dtype)


# The open blocks of `exact_matmul`, and what puts the user's settings back once there are none.
_exact: set[object] = set()
_users_settings = ExitStack()
_exact_lock = threading.RLock()


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Products as written: neither autocast nor the user's TF32, bf16 or fp16 settings reach in.

    The settings of products belong to the whole process.  Of the blocks that are open at one time, in whichever
    threads, the first saves the user's settings and the last restores them.  Autocast belongs to a thread.
    """
    block = object()
    # Each lock on one line: between the lines of a longer block Ctrl-C can come before the lock is let go.
    try:
        try:
            with _exact_lock: _begin(block)  # fmt: skip  # noqa: E701
            with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                yield
        finally:
            with _exact_lock: _end(block)  # fmt: skip  # noqa: E701
    finally:  # once more, if Ctrl-C has stopped that
        with _exact_lock: _end(block)  # fmt: skip  # noqa: E701


def _begin(block: object) -> None:
    if not _exact:
        _save_settings(_users_settings)
    _exact.add(block)
    _multiply_exactly()


def _end(block: object) -> None:
    _exact.discard(block)
    if not _exact:
        _users_settings.close()


def _after_fork() -> None:
    """In a forked process the blocks of other threads do not go on: the user's settings come back."""
    global _exact_lock
    _exact_lock = threading.RLock()  # another thread may have held it
    _exact.clear()
    _users_settings.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _save_settings(to: ExitStack) -> None:
    """Has `to` restore, when it is closed, how products are made in this process now."""
    cuda = torch.backends.cuda.matmul
    if settings := _fp32_settings():
        for each in settings:
            to.callback(setattr, each, "fp32_precision", each.fp32_precision)
    else:
        to.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    if getattr(cuda, "allow_fp16_accumulation", False):
        to.callback(setattr, cuda, "allow_fp16_accumulation", True)


def _multiply_exactly() -> None:
    cuda = torch.backends.cuda.matmul
    if settings := _fp32_settings():
        for each in settings:
            each.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    if getattr(cuda, "allow_fp16_accumulation", False):
        cuda.allow_fp16_accumulation = False


def _fp32_settings() -> list[Any]:
    """What has torch 2.9's settings of fp32 products; once these have been used, torch's older functions raise."""
    each = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [where for where in each if hasattr(where, "fp32_precision")]
