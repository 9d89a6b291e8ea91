"""The largest r singular triplets of a weight, or of many: `truncated_svd`, and how groups of weights go through it.

The arithmetic is in svd_math.py.  Here matrices are moved: equal shapes go together as far as memory allows, and on a
GPU the small eigenproblems of one group are solved by the host while the products of the next ones run.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import svd_math as arithmetic
from .exact_matmul import exact_matmul
from .naming import FLOATS, Former, aliases
from .svd_math import GRAM_BYTES, Products

if TYPE_CHECKING:
    from .upload import InPieces

# "chebyshev" is only for recipes of earlier versions.
METHODS = {"krylov": arithmetic.krylov, "subspace": arithmetic.subspace, "chebyshev": arithmetic.chebyshev}
KRYLOV_ROWS = 512  # D up to which "auto" takes krylov; past it Q, Z and the eigenproblem grow too large
GROUP_BYTES = 384 * 2**20  # working memory for the weights that are factored together on a GPU
GROUP = 16  # the most weights that are factored together, and that may wait for the host's eigenproblems
KEEP_BYTES = 384 * 2**20  # what those that wait may hold
# On a CPU a weight of up to ALONE elements that is computed alone gets one thread; of up to AMONG_OTHERS elements each
# thread takes one of its own; larger ones get all threads.  A second thread on a small weight saves little, and costs
# much where it has to wait for a busy core.
ALONE, AMONG_OTHERS = 2**18, 2**23
MOST_ITERATIONS = 1000  # q: far past what changes a result, and not for ever

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """What `truncated_svd` does, nothing left to choose: with the seed and the weight it fixes U, S, Vh to rounding.

    method: "krylov", "subspace", or "chebyshev" of files up to version 2.  block: b, rows of X.  n_iter: q.
    """

    method: str
    block: int
    n_iter: int


def plan(
    rank: int, shape: Sequence[int], *, method: str = "auto", block: int | None = None, n_iter: int | None = None
) -> Plan:
    """The defaults filled in for weights of this shape, as `truncated_svd` describes them.

    Raises TypeError or ValueError where an argument is not an integer or out of range.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f'method: got {method!r}, must be "auto", "krylov" or "subspace"')
    rank, block, n_iter = (
        value if value is None else _integer(name, value)
        for name, value in (("rank", rank), ("block", block), ("n_iter", n_iter))
    )
    if block is not None and block < rank:
        raise ValueError(f"block: got {block}, must be at least the rank, {rank}")
    if n_iter is not None and not 0 <= n_iter <= MOST_ITERATIONS:
        raise ValueError(f"n_iter: got {n_iter}, must be from 0 to {MOST_ITERATIONS}")
    m = min(shape)
    # For the Krylov space a narrow block and one more step cost what a wide block costs and come nearer to the truth.
    krylov = Plan("krylov", block or rank + 8, (5 if rank < 32 else 4) if n_iter is None else n_iter)
    filtered = Plan(
        "subspace", block or rank + 16 + max(8, rank // 4), (6 if rank < 64 else 5) if n_iter is None else n_iter
    )
    if method != "auto":
        return krylov if method == "krylov" else replace(filtered, method=method)
    D = basis_size(m, krylov)
    # Past a third of the smaller side Q costs more than the products, unless all of that side is small.
    return krylov if KRYLOV_ROWS >= D <= m / 3 or m <= max(128, 2 * filtered.block) else filtered


def _integer(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {value!r}, must be an integer")


def _past_rank(block: Any, given: Mapping[str, Any]) -> Any:
    """The oversampling that a block is, as `truncated_svd` was once told."""
    try:
        return operator.index(block) - operator.index(given["rank"])
    except (TypeError, KeyError):  # None, or what truncated_svd refuses
        return block


def basis_size(m: int, how: Plan) -> int:
    """D, the rows of Q for weights whose smaller side is m."""
    return min(m, how.block * (how.n_iter + 1 if how.method == "krylov" else 1))


@aliases(block=Former("oversample", _past_rank))
@torch.no_grad()
def truncated_svd(
    W: Tensor,
    rank: int,
    *,
    method: str = "auto",
    oversample: int | None = None,
    n_iter: int | None = None,
    seed: int = 0,
) -> Triplets:
    """The `rank` largest singular triplets of W: W ~ U diag(S) Vh.

    The algorithm is block Krylov iteration (Musco and Musco, arXiv 1504.05477).  If its basis would span most of the
    space, it is subspace iteration with a Chebyshev polynomial (Zhou and Saad, SIAM J. Matrix Anal. Appl. 29, 2007).
    The start is a matrix of +1 and -1 that are a hash of (seed, row, column).  Autocast and the user's TF32 settings
    have no effect.  The same call gives the same bits with the same device, libraries and number of threads.  A
    different device, a different number of threads, or other weights in the batch change only the rounding: U S Vh by
    1e-5, B R A by less than 1e-4, or more if singular values are so close that their vectors are not determined better.
    Singular values that are zero to working precision get orthonormal vectors, too.  No gradient reaches W.

    Args:
        W: (..., m, n), bf16, fp16, fp32 or fp64, finite.  With CUDA and torch 2.8 or later a W in half precision is
            never upcast: the other factor of each product is split into terms of W's dtype, and the products are summed
            in fp32.  Otherwise a matrix is upcast while it is used.
        rank: r, 1 <= r <= min(m, n).
        method: "krylov", "subspace", or "auto".  With b vectors in the block and q iterations, "auto" is krylov if its
            (q + 1) b vectors are at most 512 and at most a third of min(m, n), or if min(m, n) is at most 128 or at
            most twice the block of subspace; otherwise it is subspace.
        oversample: b - r, how many more vectors than r the block (the start) has; None: 8 for krylov, 16 + max(8, r /
            4) for subspace.
        n_iter: q, the number of iterations, each of which reads W twice.  None: for krylov 5 if r < 32, otherwise 4;
            for subspace 6 if r < 64, otherwise 5.
        seed: for the start.

    Returns:
        U (..., m, r) with orthonormal columns, S (..., r) in descending order, and Vh (..., r, n) with orthonormal rows
        (to 1e-6; to 1e-12 in fp64), in fp32, or in fp64 for a W in fp64.  Once the iteration has converged, the error
        of S is some tens of eps times the largest singular value; values below 8 eps times the largest are 0.  Each
        column of U has a positive inner product with a hashed vector of +1 and -1.  So signs are the same everywhere,
        except for the rare column that is nearly orthogonal to that vector.  The vectors of equal singular values are
        any orthonormal basis of their span.

    Raises:
        TypeError: W is not a dense tensor of one of these dtypes; rank, oversample, n_iter or seed is not an integer.
        ValueError: W has fewer than 2 dimensions, has NaN or Inf values, or has singular values too large for the
            result's dtype; or a different argument is out of range.
    """
    plain = isinstance(W, Tensor) and not is_traceable_wrapper_subclass(W)  # as DTensors and quantised tensors are
    if not plain or W.dtype not in FLOATS or W.layout != torch.strided:
        what = f"dtype {W.dtype}, layout {W.layout}" if plain else type(W).__name__
        raise TypeError(f"W: got {what}, must be a dense bfloat16, float16, float32 or float64 tensor")
    if W.dim() < 2:
        raise ValueError(f"W: got shape {tuple(W.shape)}, must have at least 2 dimensions")
    rank, seed = _integer("rank", rank), _integer("seed", seed)
    *batch, m, n = W.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: got {rank}, must be from 1 to min(m, n) = {min(m, n)} for W of shape {(m, n)}")
    block = None
    if oversample is not None:
        if (past := _integer("oversample", oversample)) < 0:
            raise ValueError(f"oversample: got {past}, must be at least 0")
        block = rank + past
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
    with host_pool(W.device, len(matrices)) as pool:
        done = 0
        try:
            for made, out in zip(decompose(groups, W.device, pool), outputs, strict=True):
                for target, value in zip(out, made, strict=True):
                    target.copy_(value)
                done += len(made[0])
        except NotFinite as error:
            if not batch:
                raise
            raise NotFinite(error.index, error.what, f"W: matrix {done + error.index} of {len(matrices)}") from None
    return U, S, Vh


def check_device(device: torch.device, what: str) -> None:
    """ValueError for a device that truncated_svd does not know."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what}: got a weight on {str(device)!r}, must be on a CPU or a CUDA device")


class NotFinite(ValueError):
    """A weight, or what is made of it, holds NaN or Inf; `index` is its place in its group."""

    def __init__(self, index: int, what: str, which: str = "W") -> None:
        super().__init__(f"{which}: has {what}")
        self.index, self.what = index, what


def group_size(shape: Sequence[int], dtype: torch.dtype, device: torch.device, how: Plan) -> int:
    """How many weights of a shape are factored together, at most."""
    if device.type == "cpu":
        return 1
    return min(GROUP, max(1, GROUP_BYTES // working_bytes(shape, dtype, how)))


def working_bytes(shape: Sequence[int], dtype: torch.dtype, how: Plan) -> int:
    """Bytes of device memory to factor one weight of this shape, beside W, U, S and Vh; an upper estimate."""
    m, n = sorted(shape[-2:])
    itemsize, D, b = max(4, dtype.itemsize), basis_size(m, how), how.block
    # Bytes of X's terms, of their product with W and of the sum over terms; the same for Q.
    step = (16 * n + 32 * m) * b if dtype.itemsize < 4 else (4 * n + 6 * m) * b * itemsize
    end = 3 * D * D * 8 + (2 * n * D * 8 if dtype == torch.float64 else GRAM_BYTES)
    return (m + n) * D * itemsize + n * b + m * D + max(step, end)  # the start and the noise have a byte each


@dataclass(frozen=True)
class Group:
    """Up to `group_size` weights of one shape, dtype and device, and what is to be made of them."""

    weights: Sequence[Tensor | InPieces]
    rank: int
    how: Plan
    seed: int


def decompose(
    groups: Iterable[Group], device: torch.device, pool: Executor | None = None, keep: int = KEEP_BYTES
) -> Iterator[Triplets]:
    """(U, S, Vh) of the weights of each group, in order, stacked: (g, m, r), (g, r), (g, r, n).

    Args:
        groups: on this device, read when their turn comes; their weights are let go when their products are under way.
        pool: as `host_pool` makes it.
        keep: bytes that groups on a GPU may hold while they wait for the host.

    Raises NotFinite, for the first group that was not yielded.
    """
    return _on_cpu(groups, pool) if device.type == "cpu" else _on_gpu(groups, pool, keep)


@torch.no_grad()
def _on_gpu(groups: Iterable[Group], pool: Executor | None, keep: int) -> Iterator[Triplets]:
    """The small eigenproblems of some groups are solved by the host while the next ones' products run."""
    waiting: deque[_Started] = deque()
    for group in groups:
        begun = _Started(group, pool)
        del group
        while waiting and (
            sum(each.count for each in waiting) >= GROUP or sum(each.nbytes for each in (*waiting, begun)) > keep
        ):
            yield waiting.popleft().triplets()
        waiting.append(begun)
        del begun
    while waiting:
        yield waiting.popleft().triplets()


def _on_cpu(groups: Iterable[Group], pool: Executor | None) -> Iterator[Triplets]:
    """Threads of the pool take a weight each, up to AMONG_OTHERS; a larger one waits for them and takes all threads."""
    waiting: deque[Future[Triplets]] = deque()
    most = min(torch.get_num_threads(), GROUP)
    for group in groups:
        m, n = group.weights[0].shape
        if pool is not None and m * n <= AMONG_OTHERS:
            waiting.append(pool.submit(_made, group))
            del group
            if len(waiting) >= most:
                yield waiting.popleft().result()
            continue
        while waiting:
            yield waiting.popleft().result()
        with _one_thread() if m * n <= ALONE else nullcontext():
            made = _made(group)
        del group
        yield made
        del made
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def host_pool(device: torch.device, weights: int) -> Iterator[Executor | None]:
    """Threads of the host with one thread of torch's each, for weights on this device; None on a CPU where only one
    thread would work.

    For a GPU's eigenproblems one for each core this process may use.  That takes half the time of all threads on one
    matrix after another (D = 432, even on 2 cores).  For weights on a CPU as many as the user has set.
    """
    threads = torch.get_num_threads()
    workers = min(threads, weights, GROUP)
    if device.type == "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's, one process to a GPU
    elif workers <= 1:
        yield None
        return
    with ThreadPoolExecutor(workers, initializer=_take_one_thread, initargs=(threads,)) as pool:
        yield pool


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch's for what this thread computes."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    try:
        _take_one_thread(before)
        yield
    finally:
        torch.set_num_threads(before)


def _take_one_thread(others: int) -> None:
    """One thread of torch's for what this thread computes; threads that start later have `others`.

    torch.set_num_threads is for the thread that calls it and for all that start later: so a second, short-lived thread
    restores it for them.
    """
    torch.get_num_threads()  # the first call in a thread takes over what is for those that start later
    restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
    torch.set_num_threads(1)
    restoring.start()
    restoring.join()


@torch.no_grad()
def _made(group: Group) -> Triplets:
    return _Started(group, None).triplets()


class _Started:
    """A group on its way: all work up to the eigenproblem is under way once this is made."""

    def __init__(self, group: Group, pool: Executor | None) -> None:
        how, self.seed = group.how, group.seed
        with exact_matmul():
            products = Products(group.weights)
            self.flip, self.peak = products.flip, to_host(products.peak)
            if basis_size(products.m, how) == products.m:  # all of the smaller side: Q is the identity
                self.Q, self.Z = None, products.whole()
            else:
                self.Q, self.Z = METHODS[how.method](products, how.block, how.n_iter, group.seed)
            self.solved = _solved(self.Z, group.rank, self.peak, pool)
        self.count = len(self.Z)
        self.nbytes = self.Z.nbytes + (0 if self.Q is None else self.Q.nbytes)

    def triplets(self) -> Triplets:
        dtype = self.Z.dtype
        with exact_matmul():
            peak = self.peak()
            for i, each in enumerate(peak.tolist()):
                if not each < float("inf"):
                    raise NotFinite(i, f"a largest magnitude of {each}, must be finite (no NaN, no Inf)")
            S, P = self.solved()
            # On the host: to ask the GPU would be to wait for the next group.
            scale = arithmetic.scales(peak, dtype)[:, None]
            for i in (~torch.isfinite((S[:, :1] / scale).to(dtype))).nonzero()[:, 0].tolist():
                raise NotFinite(i, f"singular values past the range of {dtype}, must be scaled down")
            live = 8 * torch.finfo(dtype).eps * S[:, :1] < S
            P, inverse, S = (_to_device(t, self.Z) for t in (P, (1 / S).where(live, 0), S.where(live, 0) / scale))
            both = arithmetic.vectors(self.Q, self.Z, inverse, P)
            counts = live.sum(1).tolist()
            Ut, Vt = (arithmetic.completed(t, counts, self.seed + i) for i, t in enumerate(both, 1))
            Ut, Vt = (Vt, Ut) if self.flip else (Ut, Vt)
            signs = arithmetic.signs(Ut, self.seed)
            return (Ut * signs).mT, S, Vt * signs


def _solved(
    Z: Tensor, rank: int, peak: Callable[[], Tensor], pool: Executor | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Starts on S (g, r), descending, and P (g, D, r) of Rayleigh-Ritz, in fp64 on the host; 0 where W is not finite.

    LAPACK solves one matrix to a thread while the GPU goes on to the next group: on the GPU torch.linalg.eigh goes
    through a batch of D > 32 one by one (pytorch issues 174674, 175585 and 183806; for the 224 weights of a 7B model
    12 % slower, bench/results/h100/2026-11-27-cdec78f-svd.json).
    """
    dtype, there = Z.dtype, to_host(arithmetic.small_matrix(Z))

    def solve(i: int) -> tuple[Tensor, Tensor]:
        C = there()[i]
        if not peak()[i] < torch.inf:
            return C.new_zeros(rank), C.new_zeros(len(C), rank)
        return arithmetic.leading(C, rank, dtype)

    solved = (map if pool is None else pool.map)(solve, range(len(Z)))
    return lambda: tuple(map(torch.stack, zip(*solved, strict=True)))


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
    """A host tensor on the device and in the dtype of another; the host does not wait for the device's earlier work."""
    t = t.to(like.dtype)
    return t.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else t
