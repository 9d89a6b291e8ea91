"""Whether two pairs A and B are the same, by fingerprints in place of one pair, and how R moves between two pairs.

R means nothing without its A and B, which are recomputed from the base weight and not stored.  What counts is the
delta B R A, so that is what is compared: by its value at a few random pairs of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .rademacher import rademacher
from .recipe import Factors
from .recipe import Recipe as Recipe  # pickles of earlier versions have it here

PROBES = 8  # bilinear probes of a delta, and columns of a sketch
ACCEPT = 1e-3  # relative error of delta W up to which two bases are the same
ALIGNED = 3e-2  # relative error of delta W up to which an aligned R is used, with a warning
OTHER_BASE = 5e-2  # relative distance of the singular values from which the base is another model
PROBE_ROWS = 1024  # rows of a weight that are copied to fp64 at a time
SAMPLED = 64  # rows and columns of a weight that tell whether A and B are still its own
DIFFERENT = 0.5  # relative error from which the weights are different ones, and not the same ones in another dtype
CLUSTER = 1e-2  # singular values closer than this may have mixed their vectors
FLAT = 0.998  # the least singular value over the largest from which rounding decides what their vectors are
SAME_WEIGHT = 1e-5  # relative distance of two weights up to which they make the same A and B


def singular_values(A: Tensor) -> Tensor:
    """The norms of the rows of A (r,), fp32: for A = S V^T the singular values S."""
    return torch.linalg.vector_norm(A.float(), dim=1)


def is_flat(S: Tensor) -> bool:
    """Whether singular values (r,) are nearly equal, as of an orthogonal weight: then rounding decides on A and B.

    Two that are nearly equal are no news: the first two of many weights are.
    """
    return len(S) > 2 and bool(S.min() >= FLAT * S.max() > 0)


def probes(A: Tensor, R: Tensor, B: Tensor) -> Tensor:
    """p_i = a_i^T (B R A) b_i for hashed +-1 vectors a_i, b_i: (PROBES,) fp32.

    E[p^2] = |B R A|_F^2, and the difference of two sets of probes estimates the distance of their deltas likewise.
    """
    return _probes(*_halves(A, B), R)


def residual(expected: Tensor, A: Tensor, R: Tensor, B: Tensor) -> float:
    """The estimated relative error of the delta B R A against the one whose probes are `expected`; inf for NaN."""
    return float(Fingerprint.of(A, B).residual(expected, R))


def same_base(expected: Tensor, A: Tensor) -> bool:
    """Whether the singular values in A are those of the base the adapter was trained on."""
    return bool(same_values(expected, singular_values(A)))


def same_values(expected: Tensor, S: Tensor) -> Tensor:
    """Whether singular values S (..., r) are those of the base that has `expected`: (...), of bool."""
    expected = expected.to(S.device)
    return (S - expected).norm(dim=-1) <= OTHER_BASE * expected.norm(dim=-1)


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of A and B where they themselves are not: enough for the probes and the residual of any R.

    S (..., r), fp32: the singular values in A.  left, right (..., r, PROBES): B^T and A times the probes' vectors.
    gram_A, gram_B (..., r, r): A A^T and B^T B.  All but S are fp64.  Leading dimensions: of several modules.
    """

    S: Tensor
    left: Tensor
    right: Tensor
    gram_A: Tensor
    gram_B: Tensor

    @classmethod
    def of(cls, A: Tensor, B: Tensor) -> Fingerprint:
        """The fingerprint of one module's A and B."""
        A64, B64 = A.double(), B.double()
        return cls(singular_values(A), *_halves(A64, B64), A64 @ A64.t(), B64.t() @ B64)

    def probes(self, R: Tensor) -> Tensor:
        """As the function `probes`: (..., PROBES)."""
        return _probes(self.left, self.right, R)

    def residual(self, expected: Tensor, R: Tensor) -> Tensor:
        """As the function `residual`: (...), fp64."""
        square = (self._inner(R.double()) * self.gram_A).sum((-2, -1))
        return _relative(self.probes(R), expected, square)

    def flipped_residuals(self, expected: Tensor, R: Tensor) -> Tensor:
        """The residual of `flipped(R, k)` for each k: (..., r), fp64, in a number of products that r does not change.

        That matrix is D R D with D = I - 2 e_k e_k^T.  Multiplied out, its probes and its |B D R D A|_F^2 are those of
        R plus terms in row and column k.  Of the Grams only what is off the diagonal changes sign in D G D.
        """
        R, left, right = R.double(), self.left, self.right
        R_kk = R.diagonal(dim1=-2, dim2=-1)
        by_row, by_column = left * (R @ right), (R.mT @ left) * right
        probes = by_row.sum(-2, keepdim=True) - 2 * (by_row + by_column) + 4 * R_kk[..., None] * left * right

        off_A, off_B = (G - torch.diag_embed(G.diagonal(dim1=-2, dim2=-1)) for G in (self.gram_A, self.gram_B))
        R_A, B_R, inner = R @ off_A, off_B @ R, self._inner(R)
        one = off_A * inner + off_B * (R @ self.gram_A @ R.mT)
        both = R_A.diagonal(dim1=-2, dim2=-1) * B_R.diagonal(dim1=-2, dim2=-1) + R_kk * (B_R * off_A).sum(-1)
        square = (inner * self.gram_A).sum((-2, -1))[..., None] - 4 * one.sum(-2) + 8 * both
        return _relative(probes, expected[..., None, :], square)

    def _inner(self, R: Tensor) -> Tensor:
        """(B R)^T B R, whose inner product with A A^T is |B R A|_F^2."""
        return R.mT @ self.gram_B @ R


def _relative(probes: Tensor, expected: Tensor, square: Tensor) -> Tensor:
    """The relative error of deltas of these squares of norms, whose probes were to be `expected`."""
    error = (probes.double() - expected.to(probes.device).double()).square().mean(-1).sqrt()
    norm = square.clamp(min=0).sqrt()
    return torch.where((norm > 0) | (error != 0), (error / norm).nan_to_num(nan=torch.inf), 0.0)


def _halves(A: Tensor, B: Tensor) -> Factors:
    left = B.double().t() @ _probe_vectors(B.shape[0], 1, B.device)
    return left, A.double() @ _probe_vectors(A.shape[1], 2, A.device)


def _probes(left: Tensor, right: Tensor, R: Tensor) -> Tensor:
    return (left * (R.double() @ right)).sum(-2).float()


def mixing(rank: int, device: torch.device) -> Tensor:
    """An r x r matrix of +-1 in the place of R, to compare two A and B by: it sees turned signs, as I would not."""
    return rademacher(rank, rank, 6, device).double()


def distance(old: Factors, new: Factors) -> float:
    """How far B M A of `old` is, relatively, from that of `new`, on the device of `new`; M: `mixing`."""
    A, B = (t.to(new[0].device) for t in old)
    M = mixing(len(A), A.device)
    return residual(probes(A, M, B), new[0], M, new[1])


def weight_probes(W: Tensor) -> Tensor:
    """p_i = a_i^T W b_i for hashed +-1 vectors a_i, b_i: (PROBES,) fp64, the same for the same values in any dtype."""
    left, right = (_probe_vectors(size, seed, W.device) for size, seed in zip(W.shape, (7, 8), strict=True))
    rows = zip(W.split(PROBE_ROWS), left.split(PROBE_ROWS), strict=True)
    return sum((part.double() @ right * of_part).sum(0) for part, of_part in rows)


def weight_distance(expected: Tensor, W: Tensor) -> float:
    """The estimated relative distance of W from the weight whose probes are `expected`; inf for NaN."""
    error = (weight_probes(W) - expected.to(W.device)).square().mean().sqrt()
    norm = torch.linalg.vector_norm(W, dtype=torch.float64)
    return float((error / norm).nan_to_num(nan=torch.inf)) if error != 0 else 0.0


def distance_from_svd(W: Tensor, A: Tensor, B: Tensor) -> float:
    """How far A and B are, relatively, from what an SVD of W projects it to; NaN if both are zero.

    Converged or not, truncated_svd ends with B^T W = A or, if it works on W^T, with W A^T = B S^2.  That is looked at
    in SAMPLED columns and rows of W, spread over all of it: all of a 7B model would take a CPU a minute.
    """
    A, B = A.to(W.device, torch.float64), B.to(W.device, torch.float64)
    rows, columns = (torch.linspace(0, n - 1, min(n, SAMPLED), device=W.device).round().long() for n in W.shape)
    BS = B * A.square().sum(1)
    left = (B.t() @ W[:, columns].double() - A[:, columns]).norm() / _share(A, 1, columns)
    right = (W[rows].double() @ A.t() - BS[rows]).norm() / _share(BS, 0, rows)
    return min(left.item(), right.item())


def _share(t: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The norm of some rows or columns of t, or of as many on average: pruning may leave nothing but noise there."""
    average = t.norm() * (len(indices) / t.shape[dim]) ** 0.5
    return t.index_select(dim, indices).norm().maximum(average)


def sketch(A: Tensor, B: Tensor) -> Factors:
    """U^T Omega_m and V^T Omega_n, (r, PROBES) fp32 each: enough to recognise turned singular vectors by."""
    V_t = A.double() / singular_values(A).double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    U_sketch = B.double().t() @ _probe_vectors(B.shape[0], 3, B.device)
    return U_sketch.float(), (V_t @ _probe_vectors(A.shape[1], 4, A.device)).float()


def flipped(R: Tensor, k: int) -> Tensor:
    """R for a basis with the pair k of singular vectors negated: row and column k negated."""
    signs = torch.ones(len(R), dtype=R.dtype, device=R.device)
    signs[k] = -1
    return R * torch.outer(signs, signs)


def align_by_sketch(R: Tensor, S: Tensor, old: Factors, A: Tensor, B: Tensor, cluster: float) -> Tensor:
    """R' with B R' A ~ the old delta, whose R, singular values S and sketch `old` are known.

    Each run of singular values with relative gaps below `cluster` may have turned by an orthogonal Q, a single
    one by its sign: U = U' Q, V = V' Q.  Q maximises the agreement of the sketches (Procrustes), and
    R' = Q R (S Q^T / S').
    """
    new = sketch(A, B)
    agreement = sum(n.double() @ o.to(n.device).double().t() for n, o in zip(new, old, strict=True))
    S, S_new = S.to(A.device).double(), singular_values(A).double()
    Q = torch.zeros_like(agreement)
    start = 0
    for end in range(1, len(S) + 1):
        if end == len(S) or S[end - 1] - S[end] >= cluster * S[end - 1]:
            block = slice(start, end)
            left, _, right_t = torch.linalg.svd(agreement[block, block])
            Q[block, block] = left @ right_t
            start = end
    right = (S[:, None] * Q.t()) / S_new.where(S_new > 0, torch.inf)
    return (Q @ R.to(A.device).double() @ right).to(R.dtype)


def align_by_factors(R: Tensor, old: Factors, A: Tensor, B: Tensor) -> Tensor:
    """R' that brings B R' A nearest to the delta of R on the old A and B: R' = B^+ B_old R A_old A^+."""
    A_old, B_old = (t.to(A.device).double() for t in old)
    A, B = A.double(), B.double()
    left = torch.linalg.pinv(B.t() @ B) @ (B.t() @ B_old)
    right = (A_old @ A.t()) @ torch.linalg.pinv(A @ A.t())
    return (left @ R.to(A.device).double() @ right).to(R.dtype)


def _probe_vectors(length: int, seed: int, device: torch.device) -> Tensor:
    return _hashed(length, PROBES, seed, device).double()


# A model has few lengths, and on a GPU the hash is some forty launches.  As int8, 28672 x 8 of them are 224 KiB.
_hashed = lru_cache(maxsize=32)(rademacher)
