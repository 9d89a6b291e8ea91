"""The primitive with Triton: x -> A -> R -> B in one kernel, then the library's GEMM accumulates x W^T into y.

kernels.py holds the kernels, config.py how they are cut, launcher.py how they are started.  What they are not for goes
to the torch backend: ranks too wide to stay on chip (config.WIDEST), fp32 that must not be multiplied by TF32
instructions, fp64, empty operands, an `out` without contiguous rows, and tensors that are not on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...padding import readable_columns
from .. import torch as torch_backend
from ..device import empty, facts, on, plain
from .config import Config, padded, pick_config, precision

OLDEST = (3, 2)
GRAM_ON_CHIP = 64  # the widest padded rank whose gram is made beside z: before Hopper a wider one would spill registers
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable() -> str | None:
    """Why this backend cannot run here; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    try:
        import triton
    except (ImportError, OSError) as error:
        return f"the package triton is installed and cannot be imported: {' '.join(str(error).split())}"
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
    return cannot_compile()


@cache
def cannot_compile() -> str | None:
    """Why Triton cannot compile the C code by which it launches each kernel; None: it can, or has done so before."""
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    kept = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    if (knobs is not None and knobs.build.impl) or any(kept.glob("*/*.so")):
        return None
    if named := os.environ.get("CC"):
        if shutil.which(named) is None:
            return f"Triton needs a C compiler, and there is none at CC={named}: correct or unset CC"
    elif not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is no gcc or clang: install one, or set CC"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(headers, "Python.h").is_file():
        return f"Triton needs the headers of this Python, and {headers} has no Python.h: install them (python3-dev)"
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

    Besides the GEMM with W: one launch where rows alone fill the chip, two (shrink, expand) where they do not; one more
    for the gram where it is the sum of several parts, or past GRAM_ON_CHIP.  The workspace is those parts, r x r fp32
    for each block of rows, and for few rows at most config.MOST parts of z.  Every sum has a fixed order: same inputs,
    same bits.
    """
    x, W, A, R, B, bias, other = plain(x, W, A, R, B, bias, other)
    config = plan(x, A, B)
    if config is None or (out is not None and out.stride(1) != 1):
        return torch_backend.lowrank_linear(x, W, A, R, B, s, bias, out, other)
    with on(x.device):
        y, z, gram = low_rank(config, x, A, R, B, s, bias, out, other)
        return (y if W is None else y.addmm_(x, W.t())), z, gram


def plan(x: Tensor, A: Tensor, B: Tensor) -> Config | None:
    """How the launch is cut; None: the torch backend computes it."""
    (T, K), (N, r) = x.shape, B.shape
    if (x.is_cuda or (x.is_cpu and interpreted())) and x.dtype in _DTYPES and 0 not in (T, K, N):
        return pick_config(T, N, K, r, x.dtype, layout(A), facts(x.device))
    return None


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
    """(y, z, gram) without W, on chip; out has contiguous rows."""
    from .launcher import launch  # which imports Triton

    (T, K), (N, r) = x.shape, B.shape
    blocks, rank, add = -(-T // config.block_t), padded(r), out is not None
    if x.stride(1) != 1:
        x = x.contiguous()
    A, A_pitch, A_turned = as_it_lies(A)
    B, B_pitch, B_turned = as_it_lies(B)
    R = (R.t() if A_turned else R).contiguous()  # lies as A does
    width = min(readable_columns(A.t()) if A_turned else rank, rank if B_turned else readable_columns(B))
    bias, other = (t if t is None else t.contiguous() for t in (bias, other))
    y = empty(x, (T, N), x.dtype) if out is None else out
    z = empty(x, (T, r), torch.float32)
    beside = other if rank <= GRAM_ON_CHIP else None
    gram = None if beside is None else empty(x, (r, r) if blocks == 1 else (blocks, r, r), torch.float32)
    s, x_t, y_t = float(s), x.stride(0), y.stride(0)
    large, small = dot_precision(precision(x.dtype))
    end = (R, B, bias, beside, y, z, gram)  # what both of the kernels that write y take last
    if config.one_launch:
        launch(
            "chain_kernel",
            (blocks, 1, 1),
            (x, A, *end),
            (T, s),
            (N, K, r, width, x_t, A_pitch, B_pitch, y_t),
            (A_turned, B_turned, add, rank, config.block_t, config.block_k, config.block_n, large, small),
            config,
        )
    else:
        parts = empty(x, (config.split_k, T, rank), torch.float32)
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
            "expand_kernel",
            (blocks, config.split_n, 1),
            (parts, *end),
            (T, s, config.split_k),
            (N, r, width, B_pitch, y_t),
            (A_turned, B_turned, add, rank, config.block_t, config.block_n, large, small),
            config,
        )
    if gram is not None:
        gram = gram if blocks == 1 else gram.sum(0)
    elif other is not None:
        gram = torch_backend.scaled_mm(z.t(), other, s, z.new_empty(r, r))
    return y, z, gram


def as_it_lies(t: Tensor) -> tuple[Tensor, int, bool]:
    """t, or a copy in contiguous rows; the elements from one row to the next; True: from one column, as columns are."""
    rows, columns = t.stride()
    if columns == 1:
        return t, rows, False
    if rows == 1:
        return t, columns, True
    return t.contiguous(), t.shape[1], False


def layout(A: Tensor) -> str:
    """Which way A lies: as stored in the forward pass, or B^T of the backward pass."""
    return "forward" if A.stride(1) == 1 else "backward"


def dot_precision(which: str) -> tuple[str, str]:
    """`input_precision` of the products with A and B, and of those with R and of the gram, whose operands are fp32.

    A TF32 product holds 10 bits of its operands' fractions: as many as fp16, more than bf16.  fp32 takes three of them.
    """
    if torch.version.hip is not None:
        return "ieee", "ieee"
    return {"half": ("ieee", "tf32"), "tf32": ("tf32x3", "tf32x3")}[which]
