"""The primitive with the library's own GEMMs, on any device: the definition of a backend, and the CPU path.

Expand first, then let the base GEMM accumulate: y is written once by u B^T and read once in the epilogue of
x W^T, so next to the frozen linear the adapter costs one more read of x, one write and one read of y.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# torch.mm(..., out_dtype=) keeps the fp32 accumulator of a half-precision product; CUDA only, and not on ROCm.
MM_OUT_DTYPE = torch.__version__ >= (2, 8) and torch.version.hip is None
# Whether this CPU multiplies bf16 by instructions of its own (asked by private functions: without them, no).
_CPU_BF16 = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
_WATCHING = ("torch.utils.checkpoint", "torch.utils.flop_counter")
_LARGE = 1 << 23  # multiplications from which two bf16 products on such a CPU take less time than one in fp32


def unavailable() -> str | None:
    """Why this backend cannot run here; None: it can."""
    return None


def lowrank_linear(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x W^T + u B^T (+ bias), with z = x A^T and u = s z R^T; returns (y, z, gram).

    x (T, K), W (N, K), A (r, K), B (N, r), bias (N,) in the compute dtype and any strides; R (r, r) in any float
    dtype; z (T, r) in fp32 (fp64 for fp64 operands).  W = None leaves the low-rank part alone; with `out` (T, N)
    that part is added to it in place and y is out; bias is for a new y.  gram = s z^T other, (r, r) in the dtype of
    z, for `other` (T, r) in that dtype: gR, where this is the backward pass (whose z is v) and other the z of the
    forward; else None.
    """
    return products(x, None if W is None else W.t(), A.t(), R.t(), B.t(), s, bias, out, other)


def products(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lowrank_linear` with W (K, N), A (K, r), R (r, r) and B (r, N) as they stand to the right of x.

    The backward's operands are these, so that it needs no views of them, which take as long as small products.
    """
    z = shrink(x, A)
    R = cast(R, z.dtype)
    u = cast(scaled_mm(z, R, s, z), x.dtype)
    if out is not None:
        y = out.addmm_(u, B)
    elif bias is not None:
        y = torch.addmm(bias, u, B)
    else:
        y = torch.mm(u, B)
    if W is not None:
        y = plus_product(y, x, W)
    return y, z, None if other is None else scaled_mm(z.t(), other, s, R)


def plus_product(y: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """y + x W, in place if y may be written."""
    return torch.addmm(y, x, W) if results_are_kept() else y.addmm_(x, W)


def results_are_kept() -> bool:
    """Whether selective checkpointing runs, which may keep what an operator returns and must not find that changed, or
    FlopCounterMode, which counts no operator that writes in place."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__ in _WATCHING for mode in _get_current_dispatch_mode_stack())


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """z = x A, x (T, K), A (K, r) -> (T, r) in fp32 (fp64 for fp64 operands), accumulated in that dtype.

    On a CPU with bf16 instructions a large product is made twice in bf16, the second time for what the first one
    rounded off (8 bits of z, then 8 more), which takes less time than one product in fp32.
    """
    dtype = x.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return torch.mm(x, A)
    if x.is_cuda and MM_OUT_DTYPE and x.numel():
        return torch.mm(x, A, out_dtype=torch.float32)
    if _CPU_BF16 and x.is_cpu and dtype is torch.bfloat16 and x.numel() * A.shape[1] > _LARGE:
        z = torch.mm(x, A)
        return z.float().add_(torch.addmm(z, x, A, beta=-1))
    return torch.mm(x.float(), A.float())


def scaled_mm(a: Tensor, b: Tensor, s: float, like: Tensor) -> Tensor:
    """s a b in one launch; `like` has the shape and dtype of the result and is not read (beta = 0)."""
    return torch.addmm(like, a, b, beta=0, alpha=s)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), at a tenth of its cost if t has that dtype already."""
    return t if t.dtype is dtype else t.to(dtype)
