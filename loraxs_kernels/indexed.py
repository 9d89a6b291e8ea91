"""The primitive with an index: many R on one A and B, and each row of x uses one of them, or none.

    z = x A^T,   u_t = s R[index_t] z_t,   y = x W^T + u B^T (+ bias)

The two large products do not depend on the index.  Between them the rows are taken in blocks, each of rows that use the
same R, so that one batched product makes u of all of them: at r = 16 and K = N = 4096 that is r / (K + N) = 0.2 % of
the multiplications of the adapter, whatever the mix.  The backward is the same on transposed operands, and

    gR[i] = s * sum over the rows t with index_t = i of v_t z_t^T,   v = gY B.

Nothing here compiles or measures: without `lx.backend(...)` the products are the library's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import Forced
from .backends.torch import cast, plus_product, results_are_kept, shrink
from .ops import no_autocast, refuse_create_graph, rows_of, rows_of_out

NONE = -1  # the index of rows that use no R: the base model
FEW = 8  # rows that share an R, on average, from which it pays to bring them together


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make tensors that serve every later call, also where this one runs in inference mode or under torch.func."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        yield


@dataclass(frozen=True)
class Blocks:
    """T rows in blocks of one size, each of rows that use one R."""

    size: int  # rows of a block
    owner: Tensor  # (blocks,) int64: the R of each block, 0 where it has none
    order: Tensor | None  # (blocks * size,) int64: the row that stands there, T: a row of zeros; None: as they come
    back: Tensor | None  # (T,) int64: where each row stands
    idle: Tensor | None  # (blocks, 1, 1) bool: the blocks without an R; None: there are none
    members: Tensor  # int64: the R that occur, ascending; all where the shapes are fixed
    places: Tensor  # (blocks,) int64: the place of each block's R in `members`, len(members) where it has none

    def split(self, t: Tensor) -> Tensor:
        """t (T, r) as (blocks, size, r)."""
        if self.order is not None:
            t = torch.cat([t, t.new_zeros(1, t.shape[1])]).index_select(0, self.order)
        return t.view(len(self.owner), self.size, t.shape[1])

    def join(self, t: Tensor) -> Tensor:
        """(blocks, size, r) as (T, r)."""
        t = t.reshape(-1, t.shape[2])
        return t if self.back is None else t.index_select(0, self.back)


class RowIndex:
    """Which R of a stack (n, r, r) each sample of a batch uses: checked on the host and laid out once for all layers.

    Args:
        index: a number for each sample, 0 to n - 1, or -1 for the base model.  A batch of as many rows has one row a
            sample; one of more rows has equally many for each, those of a sample side by side.
        n: how many R there are.
        device: of x and R.
        fixed: keep all shapes the same whatever numbers the index has, so that a CUDA graph can be recorded once and
            replayed after `change`.

    Raises ValueError, naming the position, for a number that no R has.
    """

    def __init__(
        self, index: Sequence[int] | Tensor, n: int, device: torch.device | str, *, fixed: bool = False
    ) -> None:
        self.index, self.n, self.device, self.fixed = _checked(index, n), n, torch.device(device), fixed
        self._compact: tuple[RowIndex, Tensor] | None = None
        self._blocks: dict[int, Blocks] = {}
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, T: int) -> Tensor:
        """The index of each of T rows, (T,) int32 on the device: what kernels read."""
        if T not in self._rows:
            with plain_tensors():
                per_sample = torch.tensor(self.index, dtype=torch.int32)
                self._rows[T] = per_sample.repeat_interleave(self.per_sample(T)).to(self.device)
        return self._rows[T]

    def blocks(self, T: int) -> Blocks:
        """T rows in blocks."""
        if T not in self._blocks:
            with plain_tensors():
                self._blocks[T] = self._laid_out(T)
        return self._blocks[T]

    def compact(self) -> tuple[RowIndex, Tensor]:
        """The index renumbered for only those R that occur, and their numbers, int64: number 0 if no row has an R."""
        if self._compact is None:
            used = sorted({*self.index} - {NONE}) or [0]
            place = {i: at for at, i in enumerate(used)} | {NONE: NONE}
            with plain_tensors():
                members = torch.tensor(used, device=self.device)
            self._compact = RowIndex([place[i] for i in self.index], len(used), self.device), members
        return self._compact

    def per_sample(self, T: int) -> int:
        """How many of T rows each sample has."""
        if T % len(self.index):
            raise ValueError(f"x: got {T} rows for an index of {len(self.index)} samples, must be a multiple")
        return T // len(self.index)

    def change(self, index: Sequence[int] | Tensor) -> None:
        """Other R for the same samples, written into the tensors that recorded graphs read; only with `fixed`."""
        if not self.fixed:
            raise ValueError("index: was made with fixed=False, must be made with fixed=True to be changed")
        new = _checked(index, self.n)
        if len(new) != len(self.index):
            raise ValueError(f"index: got {len(new)} samples, must be {len(self.index)} as before")
        self.index, self._compact = new, None
        for T, rows in self._rows.items():
            rows.copy_(torch.tensor(new, dtype=torch.int32).repeat_interleave(T // len(new)))
        for T, blocks in self._blocks.items():
            there = self._laid_out(T)
            for part in ("owner", "idle", "places"):
                getattr(blocks, part).copy_(getattr(there, part))

    def _laid_out(self, T: int) -> Blocks:
        L = self.per_sample(T)
        if self.fixed:
            return self._make(L, self.index)
        runs = [(i, len(list(run)) * L) for i, run in groupby(self.index)]
        if len({count for _, count in runs}) == 1:  # as in a batch of all different adapters, or of one adapter
            return self._make(runs[0][1], [i for i, _ in runs])
        counts = Counter(self.index)
        if L > 1 or len(counts) * FEW > T:
            return self._make(L, self.index)
        size = 1 << (T // len(counts)).bit_length() - 1
        owners, order, back = [], [], [0] * T
        by_owner: dict[int, list[int]] = {i: [] for i in sorted(counts)}
        for row, i in enumerate(self.index):
            by_owner[i].append(row)
        for i, rows in by_owner.items():
            for place, row in enumerate(rows, len(order)):
                back[row] = place
            blocks = -(-len(rows) // size)
            owners += [i] * blocks
            order += rows + [T] * (blocks * size - len(rows))
        return self._make(size, owners, order, back)

    def _make(
        self, size: int, owners: Sequence[int], order: list[int] | None = None, back: list[int] | None = None
    ) -> Blocks:
        def here(values: list[int] | None, dtype: torch.dtype = torch.int64) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=dtype, device=self.device)

        used = [*range(self.n)] if self.fixed else sorted({*owners} - {NONE})
        place = {i: at for at, i in enumerate(used)} | {NONE: len(used)}
        idle = here([i == NONE for i in owners], torch.bool)[:, None, None] if NONE in owners or self.fixed else None
        owner, places = here([max(i, 0) for i in owners]), here([place[i] for i in owners])
        return Blocks(size, owner, here(order), here(back), idle, here(used), places)


def _checked(index: Sequence[int] | Tensor, n: int) -> list[int]:
    """The index as a list on the host."""
    if isinstance(index, Tensor):
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype is torch.bool:
            raise TypeError(f"index: got {index.dtype}, must be integers")
        with plain_tensors():
            index = index.reshape(-1).tolist()
    try:
        index = [i if isinstance(i, bool) or not hasattr(i, "__index__") else i.__index__() for i in index]
    except TypeError:
        raise TypeError(f"index: got a {type(index).__name__}, must be integers, one for each sample or row") from None
    for position, i in enumerate(index):
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"index: got {i!r} at position {position}, must be an integer")
        if not NONE <= i < n:
            raise ValueError(f"index: got {i} at position {position}, must be -1 (the base model) to {n - 1}")
    if not index:
        raise ValueError("index: is empty, must have a number for each sample")
    return index


def mix(z: Tensor, R: Tensor, blocks: Blocks, s: float) -> Tensor:
    """u_t = s R[index_t] z_t of rows in blocks: z (T, r) in fp32 or fp64, R (n, r, r) -> u (T, r) in z's dtype.

    R (n, m, r, r) is that of m layers, whose z and u lie side by side: (T, m r).  Rows without an R get exact zeros,
    whatever is in z.
    """
    parts = blocks.split(z)
    own = cast(R.index_select(0, blocks.owner), z.dtype)
    if together := R.ndim == 4:
        parts = parts.unflatten(2, R.shape[1:3]).transpose(1, 2).flatten(0, 1)
        own = own.flatten(0, 1)
    u = torch.baddbmm(parts, parts, own.transpose(1, 2), beta=0, alpha=s)
    if together:
        u = u.unflatten(0, (-1, R.shape[1])).transpose(1, 2).flatten(2)
    if blocks.idle is not None:
        u.masked_fill_(blocks.idle, 0)
    return blocks.join(u)


def gram(v: Tensor, z: Tensor, blocks: Blocks, s: float) -> Tensor:
    """gR of the R that occur, (len(blocks.members), r, r): s times the sum of v_t z_t^T over the rows of each.

    v, z (T, r) in fp32 or fp64.  The sums have a fixed order, and none reads the rows of another R.
    """
    left, right = blocks.split(v), blocks.split(z)
    r, count = z.shape[1], len(blocks.members)
    parts = torch.baddbmm(left.new_empty(len(left), r, r), left.transpose(1, 2), right, beta=0, alpha=s)
    total = parts.new_zeros(count + 1, r, r)
    if parts.is_cuda:  # where index_add_ adds in any order
        total.index_put_((blocks.places,), parts, accumulate=True)
    else:
        total.index_add_(0, blocks.places, parts)
    return total[:count]


def lowrank_linear(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    out: Tensor | None,
    index: RowIndex,
    forced: Forced = None,
) -> tuple[Tensor, Tensor]:
    """(y, z) of x (T, K), W (N, K), A (r, K), R (n, r, r), B (N, r), bias (N,), out (T, N); as in backends/torch.py.

    forced: the backend that `lx.backend` asks for.
    """
    T = len(x)
    if forced and results_are_kept():  # into which a kernel would write behind torch's back
        forced = "torch"
    if T and forced == "triton":
        from .backends import triton_indexed

        if triton_indexed.runs(x, A, R, B):
            return triton_indexed.lowrank_linear_indexed(x, W, A, R, B, s, index.rows(T), bias, out)
    if T and forced == "cuda":
        from .backends import cuda
        from .backends.cuda.config import TOKENS, WIDEST_DECODE

        halves = (torch.bfloat16, torch.float16)
        if cuda.runs_here(x) and x.dtype in halves and T <= TOKENS and len(A) <= WIDEST_DECODE:
            if W is not None:
                out, bias = F.linear(x, W, bias), None
            return cuda.decode(x, A, R, B, s, bias, out, index.rows(T))
    z = shrink(x, A.t())
    u = cast(mix(z, R, index.blocks(T), s) if T else z, x.dtype)
    y = F.linear(u, B, bias) if out is None else out.addmm_(u, B.t())
    return (y if W is None else plus_product(y, x, W.t())), z


class IndexedLowRankLinear(torch.autograd.Function):
    """y of the primitive with an index on x (T, K); rest: (W, A, B, s, bias, out, index, forced), as in ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, rest: tuple) -> Tensor:
        W, A, B, s, bias, out, index, forced = rest
        need_gX, need_gR, _ = ctx.needs_input_grad
        into = None if out is None else rows_of_out(out)
        y, z = lowrank_linear(x, W, A, R, B, s, bias, into, index, forced)
        if not need_gR:  # a copy of the R that occur: others take their places in a bank before the backward
            index, members = index.compact()
            R = R.index_select(0, members)
        ctx.save_for_backward(W if need_gX else None, A, R, B, z if need_gR else None)
        ctx.s, ctx.index, ctx.forced = s, index, forced
        return y if out is None else out.new_empty(()).expand(out.shape)

    @staticmethod
    def backward(ctx: Any, gY: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_create_graph("index: the gradients of a call with one")
        W, A, R, B, z = ctx.saved_tensors
        need_gX, need_gR, _ = ctx.needs_input_grad
        gX, gR, gY = None, None, rows_of(gY)
        with no_autocast(A):
            if need_gX:
                Wt, Rt = None if W is None else W.t(), R.transpose(1, 2)
                gX, v = lowrank_linear(gY, Wt, B.t(), Rt, A.t(), ctx.s, None, None, ctx.index, ctx.forced)
            elif len(gY):
                v = shrink(gY, B)
            if need_gR:
                gR = torch.zeros_like(R, memory_format=torch.contiguous_format)
                if len(gY):
                    blocks = ctx.index.blocks(len(gY))
                    gR.index_copy_(0, blocks.members, cast(gram(v, z, blocks, ctx.s), R.dtype))
        return gX, gR, None
