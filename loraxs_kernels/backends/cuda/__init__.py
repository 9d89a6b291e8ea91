"""The primitive with the CUDA core of csrc/: on Hopper a base GEMM that accumulates u B^T, too.

config.py says which kernels a problem takes, core.py finds the core.  Many rows: z, u and gram, by the library or a
shrink, then the GEMM with a tail; before Hopper a shrink, then the library's GEMMs.  Few rows: the library's
GEMM, then the rest added in one launch.  fp32, fp64, empty operands and what is not on a GPU go to the torch backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import torch as torch_backend
from ..device import check_out, empty, facts, on, plain
from ..torch import cast, scaled_mm
from . import core
from .config import ALIGNMENT, TOKENS, UNIT, WIDEST_DECODE, Decode, Rows, aligned, pick, unsupported, workspace

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # loraxs.h


def unavailable() -> str | None:
    """Why this backend cannot run here; None: it can."""
    if reason := core.missing():
        return reason
    if not torch.cuda.is_available():
        return "torch finds no GPU here (torch.cuda.is_available() is False); the torch backend runs on a CPU"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's; the triton backend is for AMD's too"
    if reason := core.load().not_ready():
        return f"the driver cannot run the CUDA core: {reason}"
    return unsupported(torch.cuda.get_device_capability(), core.architectures())


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

    The workspace is u, T x r, and where blocks share K at most config.PARTS parts of z; r x r fp32 for each 64 rows,
    where a gram is asked for.  Every sum has a fixed order: same inputs, same bits.
    """
    x, W, A, R, B, bias, other = plain(x, W, A, R, B, bias, other)
    picked = plan(x, A, B)
    if picked is None:
        return torch_backend.lowrank_linear(x, W, A, R, B, s, bias, out, other)
    with on(x.device):
        if isinstance(picked, Rows):
            return _rows(picked, x, W, A, R, B, s, bias, out, other)
        if W is not None:
            out = F.linear(x, W, bias) if out is None else out.addmm_(x, W.t())
            bias = None
        y, z = _decode(picked, x, A, R, B, s, bias, out, None)
        return y, z, None if other is None else scaled_mm(z.t(), other, s, z.new_empty(R.shape))


def plan(x: Tensor, A: Tensor, B: Tensor) -> Decode | Rows | None:
    """Which kernels run, and how they are cut; None: the torch backend computes it."""
    if not runs_here(x):
        return None
    (T, K), (N, r) = x.shape, B.shape
    return pick(T, N, K, r, x.dtype, facts(x.device), core.architectures())


def decode(
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = s R[index] x A^T B^T (+ bias) (+ out) and z = x A^T for few tokens, each with an R of its own, in one launch.

    For inference: no gradient passes.

    Args:
        x (T, K), A (r, K), B (N, r), bias (N,): bf16 or fp16, any strides; T <= 64, r <= 128.
        R: (n, r, r), fp32, bf16 or fp16, any strides; or (r, r), one for all tokens.
        s: a number.
        out: (T, N), written in place and returned; None: a new y.  It shares no memory with the others, unless it is x
            itself.
        index: (T,) int32 on x's device, which R a token uses; -1: none, its row of y gets the bias alone.  Values are
            not checked: they must be below n.  None: R is one matrix.

    Returns:
        y (T, N) in x's dtype, z (T, r) in fp32.

    Raises:
        TypeError, ValueError: an operand is not the above; it is named.  RuntimeError: CUDA's own words.
    """
    for name, t, dims in (("x", x, 2), ("A", A, 2), ("R", R, 2 if index is None else 3), ("B", B, 2)):
        if t.dim() != dims:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, must have {dims} dimensions")
    (T, K), (N, r) = x.shape, B.shape
    if not runs_here(x):
        raise ValueError(f"x: got device {x.device}, must be an NVIDIA GPU")
    if T > TOKENS:
        raise ValueError(f"x: got {T} rows, must be at most {TOKENS}")
    if r > WIDEST_DECODE:
        raise ValueError(f"B: got rank {r}, must be at most {WIDEST_DECODE}")
    if R.dtype not in _TYPES:
        raise TypeError(f"R: got {R.dtype}, must be float32, bfloat16 or float16")
    halves = {"x": x, "A": A, "B": B, "bias": bias, "out": out}
    for name, t in halves.items():
        if t is not None and (t.dtype != x.dtype or t.dtype not in _TYPES or t.dtype is torch.float32):
            raise TypeError(f"{name}: got {t.dtype}, must be bfloat16 or float16 like x")
    expected = {"A": (r, K), "R": (r, r) if index is None else (R.shape[0], r, r), "bias": (N,), "out": (T, N)}
    for name, t in (halves | {"R": R}).items():
        if t is not None and t.shape != expected.get(name, t.shape):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, must be {expected[name]}")
    if index is not None and (index.dtype != torch.int32 or index.shape != (T,)):
        raise TypeError(f"index: got shape {tuple(index.shape)} of {index.dtype}, must be ({T},) of int32")
    for name, t in (halves | {"R": R, "index": index}).items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, must be {x.device} like x")
    if out is not None:
        check_out(out, x=x, A=A, R=R, B=B, bias=bias, index=index)
    x, _, A, R, B, bias, _ = plain(x, None, A, R, B, bias)
    picked = plan(x, A, B)
    if picked is None:  # no rows or no columns: whatever R is, there is nothing to add
        return torch_backend.lowrank_linear(x, None, A, R.new_zeros(r, r), B, s, bias, out)[:2]
    with on(x.device):
        return _decode(picked, x, A, R, B, s, bias, out, index)


def runs_here(x: Tensor) -> bool:
    """Whether the core's kernels can read x."""
    return x.is_cuda


def _decode(
    plan: Decode,
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    out: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (T, K), (N, r) = x.shape, B.shape
    y = empty(x, (T, N), x.dtype) if out is None else out
    if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        x = x.clone()  # some programs still read x when others write y
    z = empty(x, (T, r), torch.float32)
    bias, index = _contiguous(bias), _contiguous(index)
    R = R if R.dtype in _TYPES else R.float()
    core.load().decode(
        *(T, N, K, r, _matrix(x), _matrix(A), _matrix(R), _matrix(B), _matrix(y), 0 if R.dim() == 2 else R.stride(0)),
        *(_address(index), _address(bias), _address(z), float(s), _TYPES[x.dtype], _TYPES[R.dtype], out is not None),
        *(plan.cluster, plan.clusters, _stream(x)),
    )
    return y, z


def _rows(
    plan: Rows,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    out: Tensor | None,
    other: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    way = lies(B) or 0 if W is None else lies(W)
    tail = plan.tile is not None and way is not None and out is None
    if tail or plan.shrink:
        x = _laid(x, 0)
    if tail:  # now: nothing may come between two launches that overlap
        B, bias = _laid(B, way), _contiguous(bias)
    ready, multiprocessors = None, facts(x.device).multiprocessors
    programs = plan.programs if tail and W is not None else 0  # else there is nothing that they could run beside
    if programs:
        A, R, other = _narrow(A, R, other)  # they read on while y is written: copies must live until it is allocated
        ready = empty(x, (-(-len(x) // UNIT),), torch.int32)
        multiprocessors -= programs
    if plan.shrink or programs:
        z, u, gram = shrink(x, A, R, s, other, plan.shrink, plan.overlap, programs, ready)
    else:
        z = torch_backend.shrink(x, A.t())
        u = cast(scaled_mm(z, cast(R, z.dtype).t(), s, z), x.dtype)
        gram = None if other is None else scaled_mm(z.t(), other, s, z.new_empty(R.shape))
    if tail:
        order = (plan.swizzle, plan.raster, multiprocessors)
        y = gemm_tail(x, W, _laid(u, 0), B, bias, plan.tile, plan.overlap, *order, ready)
    else:
        y = F.linear(u, B, bias) if out is None else out.addmm_(u, B.t())
        y = y if W is None else y.addmm_(x, W.t())
    if gram is not None and gram.dim() == 3:
        gram = gram[0] if len(gram) == 1 else gram.sum(0)
    return y, z, gram


def shrink(
    x: Tensor,
    A: Tensor,
    R: Tensor,
    s: float,
    other: Tensor | None,
    split: int,
    overlap: bool,
    programs: int = 0,
    ready: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z = x A^T, u = s z R^T, and the gram s z^T other as a part for each 64 rows; r <= 64.

    By csrc/shrink.cu, whose blocks share K `split` ways; or with `programs`, on Hopper, by as many of
    csrc/shrink_tma.cu, each of which takes a multiprocessor.  x has rows as `lies` wants them.
    overlap: the next launch may start early.  ready (ceil(T / 128),) int32: what the programs tell a `gemm_tail` that
    is launched next, and waits for them row by row.
    """
    (T, K), r = x.shape, A.shape[0]
    A, R, other = _narrow(A, R, other)
    z = empty(x, (T, r), torch.float32)
    shapes = workspace(T, r, 1 if programs else split, other is not None)
    u = empty(x, shapes.u, x.dtype)
    parts, gram = (None if each is None else empty(x, each, torch.float32) for each in shapes[1:])
    operands = (T, K, r, _matrix(x), _matrix(A), _matrix(R), _matrix(u), _address(other), _address(z), _address(gram))
    if programs:
        core.load().shrink_tma(*operands, float(s), _TYPES[x.dtype], lies(A), programs, _address(ready), _stream(x))
    else:
        core.load().shrink(*operands, _address(parts), float(s), _TYPES[x.dtype], lies(A), split, overlap, _stream(x))
    return z, u[:, :r], gram


def gemm_tail(
    x: Tensor,
    W: Tensor | None,
    u: Tensor,
    B: Tensor,
    bias: Tensor | None,
    tile: int,
    overlap: bool,
    swizzle: int = 1,
    raster: int = 0,
    multiprocessors: int | None = None,
    ready: Tensor | None = None,
) -> Tensor:
    """y = x W^T + u B^T (+ bias) in one GEMM, see csrc/gemm_tail.cuh.

    All lie as `lies` wants: rows of x and u, rows or columns of W, and B as W does.  bias is contiguous.
    overlap: u may still be in the making by the launch before, if that is one of the core's.
    swizzle (1, 2, 4, 8), raster (0 automatic, 1 along T, 2 along N): the order of the tiles, see csrc/loraxs.h.
    multiprocessors: how many of the GPU's the launch may take; None: all.
    ready: what a `shrink` with `programs` just before tells of u's rows: this launch waits for those it needs.
    """
    (T, K), (N, r) = x.shape, B.shape
    y = empty(x, (T, N), x.dtype)
    core.load().gemm_tail(
        *(T, N, K, r, _matrix(x), None if W is None else _matrix(W), _matrix(u), _matrix(B), _matrix(y)),
        *(_address(bias), _TYPES[x.dtype], B.stride(1) != 1, tile, overlap, swizzle),
        *(raster, multiprocessors or facts(x.device).multiprocessors, _address(ready), _stream(x)),
    )
    return y


def lies(t: Tensor) -> int | None:
    """0: rows of a matrix lie side by side, 1: columns do; None: neither, at addresses and pitches of 16 bytes."""
    rows, columns = t.stride()
    if t.data_ptr() % 16 == 0:
        if columns == 1 and rows % ALIGNMENT == 0 and rows >= t.shape[1]:
            return 0
        if rows == 1 and columns % ALIGNMENT == 0 and columns >= t.shape[0]:
            return 1
    return None


def _laid(t: Tensor, way: int) -> Tensor:
    """t, or a copy in padded storage, that lies this way."""
    if lies(t) == way:
        return t
    if way == 1:
        return _laid(t.t(), 0).t()
    return empty(t, (t.shape[0], aligned(t.shape[1])), t.dtype)[:, : t.shape[1]].copy_(t)


def _narrow(A: Tensor, R: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """These as the shrinks read them: A with rows or columns as `lies` wants them, R in fp32."""
    return A if lies(A) is not None else _laid(A, 0), R if R.dtype is torch.float32 else R.float(), _contiguous(other)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _matrix(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), *t.stride()[-2:]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
