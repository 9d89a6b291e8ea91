"""B (N, r) with rows padded to whole multiples of 16 elements by zeros, so that a kernel can read 16 bytes at a time.

A GPU loads 16 bytes at once, and copies them to shared memory in the background, only where addresses and masks allow
for it: with r = 12, one of the paper's ranks, rows of B begin at odd places and end inside of 16 bytes.  So the layers
keep B as a view of wider storage.  Multiples of 16, since of those Triton knows that they are: in bf16 a row takes 32
bytes for every r <= 16.

That what lies beside B is zero is noted on the storage itself.  Every view of it shares the note, and every copy loses
it, so that what a caller has put beside a B of his own is never read.  Whoever writes to the storage past B, or gives
it other memory, must call `padded_rows` again.
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
    storage = wide.untyped_storage()
    storage.zeros = (r, storage.data_ptr())
    return wide[:, :r].copy_(B)


def readable_columns(B: Tensor) -> int:
    """How many elements of each row of B (N, r) a kernel may read: r, or also the zeros beside them."""
    r = B.shape[1]
    if r % MULTIPLE == 0:
        return r
    storage = B.untyped_storage()
    if getattr(storage, "zeros", None) != (r, storage.data_ptr()):
        return r
    wide = r + -r % MULTIPLE
    return wide if B.stride() == (wide, 1) and B.storage_offset() % wide == 0 else r
