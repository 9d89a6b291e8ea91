"""A and B of a layer: where they come from, how another copy of them is recognised, how R moves between two copies.

R means nothing without its A and B, which are recomputed from the base weight and not stored.  What counts is the
delta B R A, so that is what is compared: by its value at a few random pairs of vectors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .svd import NotFinite, Plan, plan, rademacher, truncated_svd
from .weights import Weight

INITS = ("svd", "random")  # by name; only load_reference_adapter makes "sklearn", a pair (A, B) is "given"

PROBES = 8  # bilinear probes of a delta, and columns of a sketch
ACCEPT = 1e-3  # relative error of delta W up to which two bases are the same
ALIGNED = 3e-2  # and up to which an aligned R may be used, with a warning
OTHER_BASE = 5e-2  # relative distance of the singular values from which the base is another model
CLUSTER = 1e-2  # singular values closer than this may have mixed their vectors

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How A and B of one layer are made; the same recipe on the same weight makes the same factors.

    init: "svd" (A = S_r V_r^T, B = U_r), "random" (Kaiming uniform, the paper's ablation), "sklearn" (the same as "svd"
        by scikit-learn's TruncatedSVD on the CPU, as far as n_iter steps converge: what the reference implementation
        trains on) or "given".
    seed: of everything random.  name: of the layer in its model, which tells layers of one seed apart.
    dtype: of A and B, by torch's name, where it is not the weight's: rounded to another they are another basis.
    method, block, n_iter, tier: of truncated_svd; n_iter of scikit-learn too; unused by the other inits.  `pinned` puts
        what "auto" and None mean today in their place, so that a recipe in a file means the same tomorrow.
    """

    init: str = "svd"
    seed: int = 0
    name: str = ""
    dtype: str | None = None
    method: str = "auto"
    block: int | None = None
    n_iter: int | None = None
    tier: str = "standard"

    def __post_init__(self) -> None:
        if self.init not in (*INITS, "sklearn", "given"):
            raise ValueError(f'init: got {self.init!r}, must be "svd", "random" or a pair (A, B)')

    def plan(self, rank: int, shape: Sequence[int]) -> Plan:
        """What truncated_svd does by this recipe with weights of this shape."""
        return plan(rank, shape, method=self.method, block=self.block, n_iter=self.n_iter, tier=self.tier)

    def pinned(self, rank: int, shape: Sequence[int]) -> Recipe:
        """The recipe with nothing left open for weights of this shape."""
        return replace(self, **asdict(self.plan(rank, shape))) if self.init == "svd" else self

    def factors(self, weight: Weight, rank: int) -> Factors:
        """A (r, K) and B (N, r) for W (N, K), in fp32 (fp64 for fp64 W) on W's device; random ones do not read W.

        Raises ValueError where W has no such factors or the init is "given", ImportError where scikit-learn is needed
        and missing.
        """
        N, K = weight.shape
        if self.init == "svd":
            W = weight.read()
            U, S, Vh = truncated_svd(W, rank, seed=self.seed, **asdict(self.plan(rank, W.shape)))
            return S[:, None] * Vh, U
        if self.init == "random":
            dtype = torch.promote_types(weight.dtype, torch.float32)
            A = torch.empty(rank, K, device="cpu").uniform_(-1, 1, generator=self.generator("A")) / math.sqrt(K)
            B = torch.empty(N, rank, device="cpu").uniform_(-1, 1, generator=self.generator("B")) / math.sqrt(rank)
            return A.to(weight.device, dtype), B.to(weight.device, dtype)
        if self.init == "sklearn":
            return self._factors_by_sklearn(weight.read(), rank)
        raise ValueError("init: A and B were given, there is no recipe to make them again")

    def _factors_by_sklearn(self, W: Tensor, rank: int) -> Factors:
        try:
            from sklearn.decomposition import TruncatedSVD
        except ImportError as error:
            raise ImportError(
                f"module {self.name!r}: A and B of its adapter are as scikit-learn makes them, which is not installed: "
                "pip install scikit-learn"
            ) from error
        X = W.detach().to("cpu", torch.promote_types(W.dtype, torch.float32)).t()
        if not torch.isfinite(X).all():
            raise NotFinite(0, "NaN or Inf values, must be finite")
        svd = TruncatedSVD(rank, n_iter=self.n_iter, random_state=self.seed).fit(X.numpy())
        A, B = torch.from_numpy(svd.transform(X.numpy())).t(), torch.from_numpy(svd.components_).t()
        signs = B.gather(0, B.abs().argmax(0, keepdim=True)).sign()  # scikit-learn's own rule differs by version
        return (A * signs.t()).to(W.device, X.dtype), (B * signs).to(W.device, X.dtype)

    def initial_R(self, rank: int, sigma: float) -> Tensor:
        """R (r, r) ~ N(0, sigma^2), fp32, on the CPU."""
        return torch.randn(rank, rank, generator=self.generator("R"), device="cpu") * sigma

    def generator(self, what: str) -> torch.Generator:
        """A CPU generator of its own for each seed, layer and purpose."""
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{what}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def dtype_name(dtype: torch.dtype) -> str:
    """As a Recipe has it: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def singular_values(A: Tensor) -> Tensor:
    """The norms of the rows of A (r,), fp32: for A = S V^T the singular values S."""
    return torch.linalg.vector_norm(A.float(), dim=1)


def probes(A: Tensor, R: Tensor, B: Tensor) -> Tensor:
    """p_i = a_i^T (B R A) b_i for hashed +-1 vectors a_i, b_i: (PROBES,) fp32.

    E[p^2] = |B R A|_F^2, and the difference of two sets of probes estimates the distance of their deltas likewise.
    """
    left = B.double().t() @ _probe_vectors(B.shape[0], 1, B.device)
    right = A.double() @ _probe_vectors(A.shape[1], 2, A.device)
    return (left * (R.double() @ right)).sum(0).float()


def residual(expected: Tensor, A: Tensor, R: Tensor, B: Tensor) -> float:
    """The estimated relative error of the delta B R A against the one whose probes are `expected`; inf for NaN."""
    error = (probes(A, R, B).double() - expected.to(A.device).double()).square().mean().sqrt()
    G_B, G_A = B.double().t() @ B.double(), A.double() @ A.double().t()
    norm = ((R.double().t() @ G_B @ R.double()) * G_A.t()).sum().clamp(min=0).sqrt()  # |B R A|_F
    return float((error / norm).nan_to_num(nan=torch.inf)) if norm > 0 or error != 0 else 0.0


def same_base(expected: Tensor, A: Tensor) -> bool:
    """Whether the singular values in A are those of the base the adapter was trained on."""
    expected = expected.to(A.device)
    return bool((singular_values(A) - expected).norm() <= OTHER_BASE * expected.norm())


def distance(W: Tensor, A: Tensor, B: Tensor) -> float:
    """How far A = S V^T and B = U are from singular triplets of W (N, K): about 0, or about 1 for another weight.

    The relative error of U^T W = A, or of W V S = B S^2 where W is tall, estimated at PROBES hashed +-1 vectors: the
    one of the two that `truncated_svd` meets to rounding even where it has not converged.
    """
    if W.shape[0] <= W.shape[1]:
        X = _probe_vectors(W.shape[1], 5, W.device)
        got, right = B.double().t() @ (W @ X.to(W.dtype)).double(), A.double() @ X
    else:
        X = _probe_vectors(A.shape[0], 5, W.device)
        got = (W @ (A.double().t() @ X).to(W.dtype)).double()
        right = B.double() @ (singular_values(A).double().square()[:, None] * X)
    error = (got - right).norm()
    return float((error / right.norm()).nan_to_num(nan=torch.inf)) if error != 0 else 0.0


def sketch(A: Tensor, B: Tensor) -> Factors:
    """U^T Omega_m and V^T Omega_n, (r, PROBES) fp32 each: enough to recognise turned singular vectors by."""
    V_t = A.double() / singular_values(A).double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    U_sketch = B.double().t() @ _probe_vectors(B.shape[0], 3, B.device)
    return U_sketch.float(), (V_t @ _probe_vectors(A.shape[1], 4, A.device)).float()


def single_flips(R: Tensor) -> list[Tensor]:
    """R for a basis with one pair of singular vectors negated, for each pair: row and column k negated."""
    signs = 1 - 2 * torch.eye(len(R), dtype=R.dtype, device=R.device)
    return [R * torch.outer(s, s) for s in signs]


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
