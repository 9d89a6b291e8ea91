"""A and B of a layer: where they come from, how another copy of them is recognised, how R moves between two copies.

R means nothing without its A and B, which are recomputed from the base weight and not stored.  What counts is the
delta B R A, so that is what is compared: by its value at a few random pairs of vectors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import damaged
from .rademacher import rademacher
from .svd import METHODS, MOST_ITERATIONS, NotFinite, Plan, plan, truncated_svd
from .weights import FLOATS, Weight

INITS = ("svd", "random")  # by name; only load_reference_adapter makes "sklearn", a pair (A, B) is "given"

PROBES = 8  # bilinear probes of a delta, and columns of a sketch
ACCEPT = 1e-3  # relative error of delta W up to which two bases are the same
ALIGNED = 3e-2  # and up to which an aligned R may be used, with a warning
OTHER_BASE = 5e-2  # relative distance of the singular values from which the base is another model
PROBE_ROWS = 1024  # of an fp64 copy of a weight at a time
DIFFERENT = 0.5  # relative error from which the weights are different ones, and not the same ones in another dtype
CLUSTER = 1e-2  # singular values closer than this may have mixed their vectors
SAME_WEIGHT = 1e-5  # relative distance of two weights up to which they make the same A and B

Factors = tuple[Tensor, Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """As a Recipe has it: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


def integer(low: int, high: int) -> Callable[[Any], bool]:
    """A test for integers within these bounds, which True and False are not."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, which True and False are not."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer past all floats
        return False


# What an adapter and its recipe may be, whether a caller or a file says so: a test, and its meaning in words.
MUST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (integer(1, 2**31 - 1), "an integer of at least 1"),
    "alpha": (is_number, "a finite number"),
    "dropout": (lambda value: is_number(value) and 0 <= value < 1, "in [0, 1)"),
    "init_std": (lambda value: is_number(value) and value >= 0, "a finite number of at least 0"),
    "init": (lambda value: value in (*INITS, "sklearn", "given"), '"svd", "random", "sklearn" or "given"'),
    "seed": (integer(-(2**127), 2**127), "an integer of at most 128 bits"),
    "name": (lambda value: isinstance(value, str), "a string"),
    "dtype": (lambda value: value in (None, *DTYPES), f"one of {', '.join(DTYPES)} or None"),
    "method": (lambda value: value in ("auto", *METHODS), '"auto", "krylov" or "subspace"'),
    "block": (lambda value: value is None or integer(1, 65536)(value), "an integer from 1 to 65536, or None"),
    "n_iter": (
        lambda value: value is None or integer(0, MOST_ITERATIONS)(value),
        f"an integer from 0 to {MOST_ITERATIONS}, or None",
    ),
    "tier": (lambda value: value in ("standard", "precise"), '"standard" or "precise"'),  # of files up to version 2
    "rounded": (
        lambda value: isinstance(value, tuple) and len(value) <= 8 and all(each in tuple(DTYPES) for each in value),
        f"at most 8 names, each one of {', '.join(DTYPES)}",
    ),
}
MUST["weight_dtype"] = MUST["dtype"]
MUST["sigma"] = MUST["init_std"]  # as files call it


def check(argument: str, value: Any, of: str = "") -> None:
    """ValueError where a number of an adapter, or a field of its recipe, is out of range; `of` names the layer."""
    allowed, must = MUST[argument]
    if not allowed(value):
        raise ValueError(f"{argument}: got {value!r}{f' for {of}' if of else ''}, must be {must}")


@dataclass(frozen=True)
class Recipe:
    """How A and B of one layer are made; the same recipe on the same weight makes the same factors.

    init: "svd" (A = S_r V_r^T, B = U_r), "random" (Kaiming uniform, the paper's ablation), "sklearn" (the same as "svd"
        by scikit-learn's TruncatedSVD on the CPU, as far as n_iter steps converge: what the reference implementation
        trains on) or "given".
    seed: of everything random.  name: of the layer in its model, which tells layers of one seed apart.
    dtype: that A and B are stored in, by torch's name, where it is not the weight's.
    rounded: the dtypes that A and B were converted to after they were computed, in this order, by torch's names; those
        that can change a value.  A load repeats the conversions.
    weight_dtype: of the weight that A and B were made from; None: not known.
    method, block, n_iter: of truncated_svd; n_iter of scikit-learn too; unused by the other inits.  `pinned` puts
        what "auto" and None mean today in their place, so that a recipe in a file means the same tomorrow.
    """

    init: str = "svd"
    seed: int = 0
    name: str = ""
    dtype: str | None = None
    method: str = "auto"
    block: int | None = None
    n_iter: int | None = None
    rounded: tuple[str, ...] = ()
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rounded, list):  # as JSON has it
            object.__setattr__(self, "rounded", tuple(self.rounded))
        for argument, value in vars(self).items():
            check(argument, value)

    def stored_in(self, weight: torch.dtype) -> torch.dtype:
        """The dtype to store A and B in beside a weight: the weight's own, if it holds them as they were rounded."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        made = torch.float32 if self.weight_dtype else weight  # fp32 is enough for what was not rounded
        last = DTYPES[self.rounded[-1]] if self.rounded else made
        return weight if torch.finfo(weight).eps <= torch.finfo(last).eps else last

    def cast(self, dtype: torch.dtype) -> Recipe:
        """The recipe once A and B have been converted to a dtype, which counts as a rounding if it can change them."""
        made = torch.promote_types(DTYPES[self.weight_dtype or "float32"], torch.float32)
        last = DTYPES[self.rounded[-1]] if self.rounded else made
        # A number that was rounded to both bf16 and fp16 is exact in both, so that a third conversion changes nothing.
        again = dtype_name(dtype) in self.rounded[-2:]
        exact = self.init == "given" or dtype not in FLOATS or again or torch.promote_types(last, dtype) == dtype
        rounded = self.rounded if exact else (*self.rounded, dtype_name(dtype))
        return replace(self, rounded=rounded, dtype=self.dtype if self.dtype == dtype_name(dtype) else None)

    def round(self, factors: Factors) -> Factors:
        """A and B as they were made, rounded as the recipe says."""
        A, B = factors
        for dtype in map(DTYPES.__getitem__, self.rounded):
            A, B = A.to(dtype), B.to(dtype)
        return A, B

    def plan(self, rank: int, shape: Sequence[int]) -> Plan:
        """What truncated_svd does by this recipe with weights of this shape."""
        return plan(rank, shape, method=self.method, block=self.block, n_iter=self.n_iter)

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
            how = self.plan(rank, W.shape)
            oversample = how.block - rank
            U, S, Vh = truncated_svd(
                W, rank, method=how.method, oversample=oversample, n_iter=how.n_iter, seed=self.seed
            )
            return S[:, None] * Vh, U
        if self.init == "random":
            dtype = torch.promote_types(weight.dtype, torch.float32)
            drawn = {"dtype": torch.float32, "device": "cpu"}  # torch's default dtype would decide what is drawn
            A = torch.empty(rank, K, **drawn).uniform_(-1, 1, generator=self.generator("A")) / math.sqrt(K)
            B = torch.empty(N, rank, **drawn).uniform_(-1, 1, generator=self.generator("B")) / math.sqrt(rank)
            return A.to(weight.device, dtype), B.to(weight.device, dtype)
        if self.init == "sklearn":
            return self._factors_by_sklearn(weight.read(), rank)
        raise ValueError("init: A and B were given to attach, so they cannot be made again")

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

    def initial_R(self, rank: int, init_std: float) -> Tensor:
        """R (r, r) ~ N(0, init_std^2), fp32, on the CPU."""
        drawn = torch.randn(rank, rank, generator=self.generator("R"), dtype=torch.float32, device="cpu")
        return drawn * init_std

    def generator(self, what: str) -> torch.Generator:
        """A CPU generator of its own for each seed, layer and purpose."""
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{what}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def as_header(descriptions: Mapping[str, Mapping[str, Any]], common: str) -> dict[str, Any]:
    """The descriptions of modules, by their names, as the header of a file has them: under the name `common` those of
    the first module, and under "modules" what differs from that."""
    first = {key: value for key, value in next(iter(descriptions.values())).items() if key != "name"}
    own = {
        name: {key: value for key, value in each.items() if key not in first or first[key] != value}
        for name, each in descriptions.items()
    }
    return {common: first, "modules": own}


def modules_in(
    header: dict[str, Any], common: str, numbers: Sequence[str], path: Path
) -> Iterator[tuple[str, dict[str, Any], Recipe]]:
    """The name, the numbers and the recipe of each module, of a header that has nothing else; as `as_header` made it.

    Every field must be there, none may be unknown, and each must be what `check` allows: ValueError, naming the file.
    """
    if unknown := sorted(header.keys() - {"version", "base_model", "modules", common}):
        damaged(path, f"its header has {unknown[0]!r}, which is not known")
    if not isinstance(header.get("base_model"), str):
        damaged(path, f"base_model is {header.get('base_model')!r} in its header, must be a string")
    modules, first = header.get("modules"), header.get(common)
    described = isinstance(modules, dict) and all(isinstance(each, dict) for each in (first, *modules.values()))
    if not (described and modules):
        damaged(path, "its header has no modules, or does not describe them")
    # Up to version 2 a recipe had a tier: by either one A and B are the same, far within what a load accepts.  What
    # "subspace" was then is "chebyshev".
    checked = [*numbers] if header["version"] > 2 else [*numbers, "tier"]
    needed = {*checked, *(each.name for each in fields(Recipe))}
    needed -= {"rounded", "weight_dtype"} if header["version"] == 1 else set()
    for name, own in modules.items():
        said = {"name": name} | first | own
        try:
            if wrong := sorted(needed ^ said.keys()):
                raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in needed else 'not known'} in the header")
            for key in checked:
                check(key, said[key])
            recipe = Recipe(**{key: value for key, value in said.items() if key not in checked})
            if header["version"] < 3 and recipe.method == "subspace":
                recipe = replace(recipe, method="chebyshev")
            recipe.plan(said["rank"], (said["rank"], said["rank"]))  # raises where they do not fit
            if recipe.init == "sklearn" and not (recipe.n_iter is not None and 0 <= recipe.seed < 2**32):
                raise ValueError(f"scikit-learn does not take n_iter {recipe.n_iter} and seed {recipe.seed}")
        except ValueError as error:
            damaged(path, f"module {name!r}: {error}", error)
        yield name, {key: said[key] for key in numbers}, recipe


def singular_values(A: Tensor) -> Tensor:
    """The norms of the rows of A (r,), fp32: for A = S V^T the singular values S."""
    return torch.linalg.vector_norm(A.float(), dim=1)


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
        """Of the factors of one module."""
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
