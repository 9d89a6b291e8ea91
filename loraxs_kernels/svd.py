"""Randomized truncated SVD by block Krylov iteration: the largest r singular triplets of a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OVERSAMPLE = 16
N_ITER = 4


@torch.no_grad()
def truncated_svd(
    W: Tensor, rank: int, *, oversample: int = OVERSAMPLE, n_iter: int = N_ITER, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of W: W ~ U diag(S) Vh.

    Block Krylov iteration (Musco and Musco, arXiv 1504.05477): with b = rank + oversample columns and q = n_iter,
    Rayleigh-Ritz on the span of W X, (W W^T) W X, ..., (W W^T)^q W X, which reads W 2 (q + 1) times.  The start X is
    +-1 from a hash of (seed, row, column), the same on every device; the answer is deterministic, and two devices
    agree to rounding.  Singular values that are zero to working precision get orthonormal vectors all the same.

    Args:
        W: (..., m, n), bf16, fp16, fp32 or fp64, finite; read one matrix at a time, half precision upcast to fp32.
        rank: r, 1 <= r <= min(m, n).
        oversample: columns beyond rank in the block; more is more accurate and slower.
        n_iter: q; each more is two more reads of W, and more accurate.
        seed: of the start block.

    Returns:
        U (..., m, r) and Vh (..., r, n) with orthonormal columns and rows, S (..., r) descending; fp32, or fp64 for
        fp64 W.  Each column of U has a positive inner product with a hashed +-1 vector, so signs are the same
        everywhere but for the rare vector nearly orthogonal to it; vectors of equal singular values are any basis of
        their span.

    Raises:
        TypeError: W is not a tensor of one of these dtypes.  ValueError: W has fewer than 2 dimensions or holds NaN
        or Inf, or rank, oversample or n_iter is out of range.
    """
    if not isinstance(W, Tensor) or W.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        what = f"dtype {W.dtype}" if isinstance(W, Tensor) else type(W).__name__
        raise TypeError(f"W: got {what}, must be a bfloat16, float16, float32 or float64 tensor")
    if W.dim() < 2:
        raise ValueError(f"W: got shape {tuple(W.shape)}, must have at least 2 dimensions")
    *batch, m, n = W.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: got {rank}, must be from 1 to min(m, n) = {min(m, n)} for W of shape {(m, n)}")
    if oversample < 0 or n_iter < 0:
        raise ValueError(f"oversample and n_iter: got {oversample} and {n_iter}, must be at least 0")
    dtype = torch.promote_types(W.dtype, torch.float32)
    U = W.new_empty(*batch, m, rank, dtype=dtype)
    S = W.new_empty(*batch, rank, dtype=dtype)
    Vh = W.new_empty(*batch, rank, n, dtype=dtype)
    matrices = zip(W.reshape(-1, m, n), U.view(-1, m, rank), S.view(-1, rank), Vh.view(-1, rank, n), strict=True)
    with _exact_matmul(W.device.type):
        for W_i, U_i, S_i, Vh_i in matrices:
            flip = m > n  # the basis lives on the smaller side
            left, S_i[:], right = _krylov(W_i.t() if flip else W_i, rank, rank + oversample, n_iter, seed)
            left, right = (right, left) if flip else (left, right)
            signs = _signs(left, seed)
            U_i[:], Vh_i[:] = left * signs, (right * signs).t()
    return U, S, Vh


def rademacher(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """A (rows, columns) int8 matrix of +-1, each a hash of (seed, row, column): the same on every device."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    hashed = _mix(_mix(_mix(torch.tensor(seed, device=device)) + row) + column)
    return (1 - 2 * (hashed & 1)).to(torch.int8)


def _mix(h: Tensor) -> Tensor:
    """A 32-bit integer hash (C. Wellons' lowbias32) in int64 arithmetic, which wraps alike everywhere."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _krylov(W: Tensor, rank: int, block: int, n_iter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of W (m, n), m <= n, in fp64."""
    low, high = torch.aminmax(W)
    peak = torch.maximum(-low, high).item()  # NaN and Inf both end here
    if not peak < float("inf"):
        raise ValueError(f"W: has a largest magnitude of {peak}, must be finite (no NaN, no Inf)")
    W, exponent = _prescaled(W, peak)
    m, n = W.shape
    if (n_iter + 1) * block >= m:  # the Krylov space would be the whole space
        Q, Z = torch.eye(m, dtype=torch.float64, device=W.device), W.t().double()
    else:
        Q = W.new_empty(m, 0, dtype=torch.float64)
        X, Zs = rademacher(n, block, seed, W.device).to(W.dtype), []
        for _ in range(n_iter + 1):
            new = _orthonormal((W @ X).double(), Q)
            X = W.t() @ new.to(W.dtype)
            Q = torch.cat([Q, new], dim=1)
            Zs.append(X.double())
        Z = torch.cat(Zs, dim=1)
    # Rayleigh-Ritz: Z = W^T Q, so Z^T Z = Q^T W W^T Q.
    ritz, P = torch.linalg.eigh(Z.t() @ Z)
    ritz, P = ritz.flip(0)[:rank], P.flip(1)[:, :rank]
    S = ritz.clamp(min=0).sqrt()
    live = 8 * torch.finfo(W.dtype).eps * S[0] < S
    U = _completed(Q @ P, live, seed + 1)
    V = _completed((Z @ P) / S.where(live, 1), live, seed + 2)
    half = exponent // 2  # 2^e itself may be out of range
    return U, S.where(live, 0) * 2.0**half * 2.0 ** (exponent - half), V


def _prescaled(W: Tensor, peak: float) -> tuple[Tensor, int]:
    """(2^-e W in fp32 or fp64, e) with e = 0, and no copy, where products of W neither overflow nor underflow."""
    _, exponent = math.frexp(peak)
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if abs(exponent) <= 32:
        return W, 0
    half = exponent // 2
    return (W * 2.0**-half).mul_(2.0 ** (half - exponent)), exponent


def _orthonormal(Y: Tensor, Q: Tensor) -> Tensor:
    """Orthonormal columns that span Y (m, b) minus the span of Q, in fp64; a dependent direction becomes a zero one."""
    for _ in range(2):  # twice is enough
        Y = Y - Q @ (Q.t() @ Y)
        eigenvalues, P = torch.linalg.eigh(Y.t() @ Y)
        live = eigenvalues > 1e-14 * eigenvalues[-1]
        Y = Y @ (P * eigenvalues.where(live, 1).rsqrt().where(live, 0))
    return Y


def _completed(U: Tensor, live: Tensor, seed: int) -> Tensor:
    """U (m, r) with the columns that are not live replaced by orthonormal ones."""
    k = int(live.sum())
    if k == len(live):
        return U
    fill = rademacher(len(U), len(live) - k, seed, U.device).double()
    # Householder QR gives orthonormal columns even where `fill` is singular.
    complement = torch.linalg.qr(torch.cat([U[:, :k], fill], dim=1)).Q[:, k:]
    return torch.cat([U[:, :k], complement], dim=1)


def _signs(U: Tensor, seed: int) -> Tensor:
    """+-1 for each column of U (m, r): what makes its product with a hashed vector positive."""
    return torch.where(rademacher(len(U), 1, seed + 3, U.device).double().t() @ U < 0, -1.0, 1.0)


@contextmanager
def _exact_matmul(device_type: str) -> Iterator[None]:
    """fp32 products in fp32: neither autocast nor the user's TF32 or bf16 settings reach in."""
    # The older functions raise once the newer settings, of torch 2.9 on, have been used.
    settings = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    settings = [each for each in settings if hasattr(each, "fp32_precision")]
    before = [each.fp32_precision for each in settings] or torch.get_float32_matmul_precision()
    for each in settings:
        each.fp32_precision = "ieee"
    if not settings:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for each, value in zip(settings, before, strict=False):
            each.fp32_precision = value
        if not settings:
            torch.set_float32_matmul_precision(before)
