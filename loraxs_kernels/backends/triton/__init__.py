"""The primitive with Triton: x -> A -> R -> B in one kernel, then the library's GEMM accumulates x W^T into y.

kernels.py holds the kernels, config.py how they are cut.  Ranks too wide to stay on chip (config.WIDEST) leave the two
large products to the library, where they are GEMMs in their own right, and those with R to a kernel.  fp64, empty
operands and tensors that are not on a GPU go to the torch backend.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import torch as torch_backend
from ..device import empty, facts, on, plain
from .config import Config, padded, pick_config, precision

OLDEST = (3, 2)
GRAM_ON_CHIP = 64  # the widest padded rank whose gram is made beside z: a wider one would spill registers
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable() -> str | None:
    """Why this backend cannot run here; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton {triton.__version__} is too old, it must be at least {oldest}: pip install -U triton"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU here (torch.cuda.is_available() is False); the torch backend runs on a CPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}, it must be at least 8.0 (Ampere)"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, for tests (TRITON_INTERPRET=1, set before it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    """(y, z, gram), see backends/torch.py.

    Besides the GEMM with W: one launch where rows alone fill the chip, two (shrink, expand) where they do not, and one
    that sums the gram's parts where there are several; past GRAM_ON_CHIP one more, that makes them.  The workspace is
    those parts, r x r fp32 for each block of rows, and for few rows at most config.MOST parts of z.  Every sum has a
    fixed order: same inputs, same bits.
    """
    x, W, A, R, B, bias, other = plain(x, W, A, R, B, bias, other)
    (T, K), (N, r) = x.shape, B.shape
    if not (x.is_cuda or (x.is_cpu and interpreted())) or x.dtype not in _DTYPES or 0 in (T, K, N):
        return torch_backend.lowrank_linear(x, W, A, R, B, s, bias, out, other)
    with on(x.device):
        config = pick_config(T, N, K, r, x.dtype, layout(A), facts(x.device))
        if config is not None:
            y, z, gram = low_rank(config, x, A, R, B, s, bias, out, other)
        elif precision(x.dtype) == "ieee":  # no matrix instructions: the library's products are as good
            y, z, gram = torch_backend.lowrank_linear(x, None, A, R, B, s, bias, out, other)
        else:
            z = torch_backend.shrink(x, A)
            u = product(z, R.t(), s, x.dtype)
            y = F.linear(u, B, bias) if out is None else out.addmm_(u, B.t())
            gram = None if other is None else product(z.t(), other, s, z.dtype)
        return (y if W is None else y.addmm_(x, W.t())), z, gram


def low_rank(
    config: Config,
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    out: Tensor | None,
    other: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, z, gram) without W, on chip."""
    from . import kernels

    (T, K), (N, r) = x.shape, B.shape
    blocks = -(-T // config.block_t)
    y = empty(x, (T, N), x.dtype) if out is None else out
    z = empty(x, (T, r), torch.float32)
    rank, (large, small) = padded(r), dot_precision(precision(x.dtype))
    wanted = None if other is None else other.contiguous()
    other = wanted if rank <= GRAM_ON_CHIP else None
    gram = None if other is None else empty(x, (blocks, r, r), torch.float32)
    bias = bias if bias is None else bias.contiguous()
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, BLOCK_T=config.block_t, RANK=rank)
    shrink = dict(BLOCK_K=config.block_k, PRECISION=large)
    expand = dict(BLOCK_N=config.block_n, ADD=out is not None, PRECISION=large, R_PRECISION=small)
    results = (y, z, gram)
    if config.one_launch:
        kernels.chain_kernel[(blocks,)](
            *(x, A, R, B, bias, other, *results, T, N, K, r, float(s)),
            *(*x.stride(), *A.stride(), *R.stride(), *B.stride(), *y.stride()),
            **options | shrink | expand,
        )
    else:
        parts = empty(x, (config.split_k, T, r), torch.float32)
        kernels.shrink_kernel[(blocks, config.split_k)](
            *(x, A, parts, T, K, r, *x.stride(), *A.stride()), **options | shrink
        )
        kernels.expand_kernel[(blocks, config.split_n)](
            *(parts, R, B, bias, other, *results, T, N, r, float(s), config.split_k),
            *(*R.stride(), *B.stride(), *y.stride()),
            **options | expand,
        )
    if gram is not None:
        gram = gram[0] if blocks == 1 else gram.sum(0)
    elif wanted is not None:
        gram = product(z.t(), wanted, s, z.dtype)
    return y, z, gram


def product(a: Tensor, b: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """s a b for fp32 a (M, L) and any float b (L, N), on tensor cores; programs share L where M x N has few tiles."""
    from . import kernels

    (M, L), N = a.shape, b.shape[1]
    m, n, k = 64, 32, 32
    tiles = -(-M // m) * -(-N // n)
    shares = max(1, min(facts(a.device).multiprocessors // tiles, L // (8 * k)))
    c = empty(a, (shares, M, N), dtype if shares == 1 else torch.float32)
    kernels.product_kernel[(-(-M // m), -(-N // n), shares)](
        *(a, b, c, M, N, L, float(s), *a.stride(), *b.stride()),
        **dict(BLOCK_M=m, BLOCK_N=n, BLOCK_L=k, PRECISION=dot_precision("tf32")[1], num_warps=4, num_stages=2),
    )
    return c[0] if shares == 1 else c.sum(0).to(dtype)


def layout(A: Tensor) -> str:
    """Which way A lies: as stored in the forward pass, or B^T of the backward pass."""
    return "forward" if A.stride(1) == 1 else "backward"


def dot_precision(which: str) -> tuple[str, str]:
    """`input_precision` of the products with A and B, and of those with R, whose operands are always fp32.

    Where TF32 may be used it takes three products: a single one would truncate its operands to 10 bits, not round them,
    and the kernels wait for memory anyway.
    """
    if torch.version.hip is not None:
        return "ieee", "ieee"
    return {"half": ("ieee", "tf32x3"), "tf32": ("tf32x3", "tf32x3"), "ieee": ("ieee", "ieee")}[which]
