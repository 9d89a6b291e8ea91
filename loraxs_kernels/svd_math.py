"""The arithmetic of `truncated_svd`: start, products, orthonormal rows, iteration, Rayleigh-Ritz.

g weights W (m, n) with m <= n (a taller one is read transposed) go through it together.  Vectors are rows, so that the
blocks of Q and Z are contiguous.  With M = W W^T and a start X (b, n) of +-1 from a hash:

    krylov     Q = orth[X W^T;  X W^T M;  ...;  X W^T M^q]                   D = (q + 1) b rows
    subspace   Q = orth[X W^T (M - x_1 I) ... (M - x_(q-1) I) M]             D = b rows
    both       Z = Q W,   Z Z^T = P diag(S^2) P^T,   U^T = P^T Q,   V^T = P^T Z / S              (Rayleigh-Ritz)

Either way W is read 2 (q + 1) times, which about bounds the time: a bf16 weight of 4096 x 14336 is 117 MB, 27 us at 4.3
TB/s, and its product with 72 rows in two terms 17 GFLOP, 21 us at 790 TFLOP/s, in three terms 32 us.  All terms of a
split factor go into one product, which reads W once.  Next in bytes is Z Z^T in fp64 (Z is 21 MB there), then the
orthogonalisation, on the smaller side.

The Grams of fp32 rows are summed in fp64, which tells apart what differs by 1e-8 of the largest; fp64 rows, for which
there is nothing wider, are made orthonormal by Householder reflections.

Musco and Musco, arXiv 1504.05477 (krylov); Halko, Martinsson and Tropp, SIAM Review 53, 2011 (subspace iteration); Zhou
and Saad, SIAM J. Matrix Anal. Appl. 29, 2007 (Chebyshev filters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends.torch import MM_OUT_DTYPE
from .rademacher import rademacher

if TYPE_CHECKING:
    from .upload import InPieces

# Half-precision terms of X in X W^T, which chooses the subspace, and of Q in Q W, which Rayleigh-Ritz computes with.
# With one term of X and two of Q delta W would be up to 2e-3 from that of a device that multiplies fp32; with these it
# is below 1e-4.
X_TERMS, Q_TERMS = 2, 3
GRAM_BYTES = 8 * 2**20  # of one weight's rows that are copied to fp64 at a time


def _shared(make: Callable[..., Tensor], most: int) -> Callable[..., Tensor]:
    """What `make` makes, kept for the next groups of a shape: on a GPU a hash is some forty launches."""

    @lru_cache(maxsize=most)
    def kept(*arguments: Any) -> Tensor:
        t = make(*arguments)
        if type(t) is Tensor and t.is_cuda:  # other streams use it too
            torch.cuda.current_stream(t.device).synchronize()
        return t

    def made(*arguments: Any) -> Tensor:
        t = kept(*arguments)
        if type(t) is not Tensor:  # made under a mode that ends, such as FakeTensorMode
            kept.cache_clear()
        return t

    return made


# +-1 (columns, rows) of a hash of (rows, columns).
signs_by_rows = _shared(lambda rows, columns, seed, device: rademacher(rows, columns, seed, device).mT.contiguous(), 8)
_sign_vector = _shared(rademacher, 16)
_eye = _shared(lambda size, device: torch.eye(size, dtype=torch.float64, device=device), 4)


class Products:
    """X W^T and Q W for each W of a group, turned so that m <= n, and scaled.

    The scale is the power of two that brings max |W| into (1/2, 1].  It goes to the other factor and to the product and
    never to W, which is read as it is, in half precision where the device can sum such products in fp32.

    peak: max |W| of each (g,), fp64; NaN or inf where W is not finite.
    """

    def __init__(self, weights: Sequence[Tensor | InPieces]) -> None:
        first = weights[0]
        self.flip = first.shape[0] > first.shape[1]
        self.m, self.n = sorted(first.shape)
        self.dtype, self.device = torch.promote_types(first.dtype, torch.float32), first.device
        self.split = first.dtype != self.dtype and can_sum_in_fp32(self.device)
        self.peak = torch.stack([end for W in weights for end in _ends(W)]).double().abs().view(-1, 2).amax(1)
        if self.device.type == "cpu" and not self.split:
            weights = [W.to(self.dtype) if isinstance(W, Tensor) else W for W in weights]
        self.weights = weights
        scale = scales(self.peak, self.dtype)[:, None, None]
        if first.dtype == torch.float16:  # of little range: factors as large as can be, |Q| <= 1, |Q W| <= sqrt(m)
            before = 2.0**15, 2.0 ** (15 - math.ceil(math.log2(self.m) / 2))
        else:  # the root of the scale: with all of it the last terms of the factor, or the sums, would leave the range
            before = (_power_of_two(scale.sqrt()).to(self.dtype),) * 2
        self.scale = scale.to(self.dtype)
        self.before_W, self.before_Wt = before
        self.after_W, self.after_Wt = (self.scale / each for each in before)

    def times_W(self, Q: Tensor) -> Tensor:
        """Q W (g, rows, n) for Q (g, rows, m) with rows of length at most 1."""
        return self._each(Q * self.before_W, self.flip, self.n, Q_TERMS).mul_(self.after_W)

    def times_Wt(self, X: Tensor, terms: int = X_TERMS) -> Tensor:
        """X W^T (g, rows, m) for X (g, rows, n), or one X (rows, n) for all, of at most sqrt(m) in magnitude."""
        return self._each(X.to(self.dtype) * self.before_Wt, not self.flip, self.m, terms).mul_(self.after_Wt)

    def whole(self) -> Tensor:
        """W (g, m, n) itself, scaled, in the dtype of the products."""
        return torch.stack([(W.mT if self.flip else W).to(self.dtype) for W in self.weights]).mul_(self.scale)

    def _each(self, X: Tensor, transposed: bool, columns: int, terms: int) -> Tensor:
        """X times each weight as it was given, or times its transpose."""
        rows, X = X.shape[-2], X.expand(len(self.weights), -1, -1)
        if self.split:
            X = _split(X, self.weights[0].dtype, terms)
        out = torch.empty(*X.shape[:2], columns, dtype=self.dtype, device=self.device)
        for X_i, W, out_i in zip(X.unbind(), self.weights, out.unbind(), strict=True):
            if isinstance(W, Tensor):
                self._multiply(X_i, W.mT if transposed else W, out_i)
                continue
            out_i.zero_()
            for at, part in W.parts():
                if transposed:
                    out_i[:, at] = self._multiply(X_i, part.mT)
                else:
                    out_i += self._multiply(X_i[:, at], part)
        return out if out.shape[1] == rows else out.unflatten(1, (-1, rows)).sum(1)

    def _multiply(self, X: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(len(X), W.shape[1], dtype=self.dtype, device=self.device)
        if self.split:
            mm_in_fp32(X, W, out)
        else:
            torch.mm(X, W.to(self.dtype), out=out)
        return out


def _ends(W: Tensor | InPieces) -> tuple[Tensor, Tensor]:
    """The least and the largest element, on the device; both are NaN if any element is."""
    if not isinstance(W, Tensor):
        W = torch.stack([end for _, part in W.parts() for end in torch.aminmax(part)])
    return torch.aminmax(W)


def scales(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that brings each peak into (1/2, 1], as far as the dtype of the products has it: fp64."""
    limit = 2.0**120 if dtype == torch.float32 else 2.0**1000
    return _power_of_two((1 / peak).clamp(1 / limit, limit))


def _power_of_two(t: Tensor) -> Tensor:
    """The power of two in (t / 2, t] for each positive t, 1 for 0, NaN and Inf."""
    return (t / (2 * torch.frexp(t)[0])).where((t > 0) & (t < torch.inf), 1)


def _split(X: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """X (g, rows, k) as a sum of terms of a narrower dtype, one below the other (g, terms rows, k)."""
    parts = X.new_empty(X.shape[0], terms, *X.shape[1:], dtype=dtype)
    for i, part in enumerate(parts.unbind(1)):
        part.copy_(X)
        if i + 1 < terms:
            X = X - part
    return parts.flatten(1, 2)


def can_sum_in_fp32(device: torch.device) -> bool:
    """Whether `mm_in_fp32` can multiply half-precision weights there; else they are upcast, one matrix at a time."""
    return device.type == "cuda" and MM_OUT_DTYPE


def mm_in_fp32(X: Tensor, W: Tensor, out: Tensor) -> None:
    """out = X W in fp32 of half-precision factors, and no fp32 W is made."""
    torch.mm(X, W, out_dtype=torch.float32, out=out)


def gram(Y: Tensor) -> Tensor:
    """Y Y^T (g, b, b) in fp64 for Y (g, b, m), some columns at a time."""
    total = None
    for part in Y.split(max(1, GRAM_BYTES // (8 * Y.shape[1])), dim=-1):
        part = part.double()
        total = part @ part.mT if total is None else total.baddbmm_(part, part.mT)
    return total


def _cholesky(H: Tensor) -> Tensor:
    """L (g, b, b) with L L^T = H, of which it takes the place.

    Each diagonal element is lifted by 1e-14 b of itself, so that a singular H has a factor too, and a zero one to
    2^-200, whose root has an inverse in fp32.
    """
    H.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-14 * H.shape[-1]).add_(2.0**-200)
    return torch.linalg.cholesky_ex(H)[0]


def by_gram(Y: Tensor) -> bool:
    """Whether rows are made orthonormal from their Gram (CholeskyQR); if not, by Householder reflections.

    A GPU has no quick batched Householder QR; a CPU does it in two thirds of the time of two Grams.
    """
    return Y.is_cuda and Y.dtype != torch.float64


def _whitened(Y: Tensor) -> Tensor:
    """Orthonormal rows with the span of Y (g, b, m), from its Gram: to rounding, if they are nearly so already."""
    L = _cholesky(gram(Y))
    return torch.linalg.solve_triangular(L, _eye(L.shape[-1], L.device).expand_as(L), upper=False).to(Y.dtype) @ Y


def _reflected(Y: Tensor) -> Tensor:
    """Orthonormal rows with the span of Y (g, b, m), and signs that leave orthonormal rows as they are."""
    Q, R = torch.linalg.qr(Y.mT)
    return Q.mT * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Y.dtype)[..., None]


def orthonormal(Y: Tensor, noise: Tensor, Q: Tensor | None = None) -> Tensor:
    """Orthonormal rows that span Y (g, b, m) minus the span of Q; dependent directions become those of the noise.

    noise: +-1 (b, m), of which as much is added as rounding is.  A product with a W of whole numbers or of zero rows
    may have no rounding outside the span of Q; what is left of Y would then lie in it however often it is projected.
    """
    limits = torch.finfo(Y.dtype)
    size = Y.norm(dim=-1, keepdim=True) * (limits.eps / Y.shape[-1] ** 0.5)
    Y = torch.addcmul(Y, noise.to(Y.dtype), size.clamp(min=limits.tiny**0.5))
    scaled = _whitened if by_gram(Y) else _reflected
    if Q is None or not Q.shape[1]:
        return scaled(scaled(Y)) if by_gram(Y) else scaled(Y)
    # Where nothing but rounding is left of Y it lies half in Q again: hence twice before the first scaling.
    for projections in (2, 1):
        for _ in range(projections):
            Y = torch.baddbmm(Y, Y @ Q.mT, Q, alpha=-1)
        Y = scaled(Y)
    return Y


def krylov(products: Products, block: int, n_iter: int, seed: int) -> tuple[Tensor, Tensor]:
    """Q (g, (q + 1) b, m), orthonormal, and Z = Q W."""
    X, noise = _random(products, block, block * (n_iter + 1), seed)
    Q = torch.empty(len(products.weights), len(noise), products.m, dtype=products.dtype, device=products.device)
    Z = Q.new_empty(*Q.shape[:2], products.n)
    for k in range(0, len(noise), block):
        rows = slice(k, k + block)
        Y = products.times_Wt(Z[:, k - block : k]) if k else products.times_Wt(X, 1)  # +-1 is one term
        Q[:, rows] = orthonormal(Y, noise[rows], Q[:, :k])
        Z[:, rows] = products.times_W(Q[:, rows])
    return Q, Z


def subspace(products: Products, block: int, n_iter: int, seed: int, last: int = 1) -> tuple[Tensor, Tensor]:
    """Q (g, b, m), orthonormal, and Z = Q W: a power step, a Chebyshev polynomial of M = W W^T, another power step.

    The polynomial, of degree q - 1, is flat on [0, c], where c is about the square of the b-th singular value, and
    grows past it.  It is applied by its roots, c cos^2((2 j - 1) pi / (4 q - 4)), the largest first: where the singular
    values fall so steeply that c is nothing beside the largest, its factors are power steps.  The last step is one,
    since beside many values near c the polynomial alone would leave what is far below as large as they are.

    last: how many of the q steps are such a last one: 1, or 0 for `chebyshev`.
    """
    X, noise = _random(products, block, block, seed)
    Q = orthonormal(products.times_Wt(X, 1), noise)
    Z = products.times_W(Q)
    c = _cholesky(gram(Z)).diagonal(dim1=-2, dim2=-1).amin(-1).square()  # the least pivot
    degree = n_iter - last
    for j in range(1, n_iter + 1):
        part = math.cos((2 * j - 1) * math.pi / (4 * degree)) ** 2 if j <= degree else 0.0
        Q = orthonormal(products.times_Wt(Z) - (c * part).to(Z.dtype)[:, None, None] * Q, noise)
        Z = products.times_W(Q)
    return Q, Z


def chebyshev(products: Products, block: int, n_iter: int, seed: int) -> tuple[Tensor, Tensor]:
    """The subspace method of files up to version 2: `subspace` without the last power step."""
    return subspace(products, block, n_iter, seed, last=0)


def _random(products: Products, block: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """+-1 in int8: the start X (b, n) and the noise (rows, m)."""
    return (
        signs_by_rows(products.n, block, seed, products.device),
        signs_by_rows(products.m, rows, seed + 4, products.device),
    )


def small_matrix(Z: Tensor) -> Tensor:
    """C (g, D, D) in fp64, of whose decomposition `leading` makes S and P: Z Z^T, or for fp64 Z the R of Z^T = Q R."""
    return torch.linalg.qr(Z.mT, mode="r").R if Z.dtype == torch.float64 else gram(Z)


def leading(C: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S (r,), descending, and P (D, r) in fp64 of one C (D, D) that was made for a Z of this dtype."""
    if dtype == torch.float64:
        _, S, Pt = torch.linalg.svd(C)
        return S[:rank], Pt[:rank].mT
    squares, P = torch.linalg.eigh(C)
    return squares[-rank:].flip(0).clamp(min=0).sqrt(), P[:, -rank:].flip(1)


def vectors(Q: Tensor | None, Z: Tensor, inverse: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """U^T (g, r, m) and V^T (g, r, n), orthonormal to rounding, for Q (None: the identity); where 1 / S is 0, 0.

    Rounding in Z is relative to the largest singular value, so that rows of V of the smallest are not yet orthonormal.
    """
    Pt, live = P.mT, (inverse > 0)[..., None]
    final = _reflected if Z.dtype == torch.float64 else _whitened
    Ut, Vt = Pt if Q is None else Pt @ Q, (Pt @ Z) * inverse[..., None]
    return final(Ut) * live, final(Vt) * live


def completed(Ut: Tensor, live: Sequence[int], seed: int) -> Tensor:
    """Ut (g, r, m) with the rows past the first `live` of each, which are zero, replaced by orthonormal ones."""
    for rows, k in zip(Ut, live, strict=True):
        if k < len(rows):
            fill = rademacher(rows.shape[1], len(rows) - k, seed, rows.device).mT.double()
            # Householder QR gives orthonormal vectors even where `fill` is singular; in fp64, to the rounding of fp32.
            rows[k:] = torch.linalg.qr(torch.cat([rows[:k].double(), fill]).mT).Q.mT[k:]
    return Ut


def signs(Ut: Tensor, seed: int) -> Tensor:
    """+-1 for each row of Ut (g, r, 1): what makes its product with a hashed vector positive."""
    products = Ut.double() @ _sign_vector(Ut.shape[-1], 1, seed + 3, Ut.device).double()
    return torch.where(products < 0, -1.0, 1.0).to(Ut.dtype)
