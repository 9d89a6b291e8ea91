"""B (N, r) with rows padded to whole multiples of 16 elements by zeros, so that a kernel can read 16 bytes at a time.

A GPU loads 16 bytes at once, and copies them to shared memory in the background, only where addresses and masks allow
for it: with r = 12, one of the paper's ranks, rows of B begin at odd places and end inside of 16 bytes.  So the layers
keep B as a view of wider storage.  That what lies beside it is zero is noted on the storage itself: every view of it
shares the note, and every copy loses it, so a kernel never reads what someone else has put there.
"""

from __future__ import annotations

from torch import Tensor

MULTIPLE = 16


def padded_rows(B: Tensor) -> Tensor:
    """B (N, r), or where r is no multiple of 16 a copy of it in padded rows, if it is not one already."""
    N, r = B.shape
    if r % MULTIPLE == 0 or readable_columns(B) > r:
        return B
    wide = B.new_zeros(N, r + -r % MULTIPLE)
    wide.untyped_storage().zeros_from = r
    return wide[:, :r].copy_(B)


def readable_columns(B: Tensor) -> int:
    """How many elements of each row of B (N, r) a kernel may read: r, or also the zeros beside them."""
    r = B.shape[1]
    if r % MULTIPLE == 0 or getattr(B.untyped_storage(), "zeros_from", None) != r:
        return r
    wide = r + -r % MULTIPLE
    whole_rows = B.stride() == (wide, 1) and B.storage_offset() % wide == 0
    return wide if whole_rows else r
