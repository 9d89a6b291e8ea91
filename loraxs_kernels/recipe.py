"""How A and B of a layer are made: the recipe, what its fields may be, and how the headers of files hold it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import damaged
from .naming import DTYPES, FLOATS, dtype_name
from .svd import METHODS, MOST_ITERATIONS, NotFinite, Plan, plan, truncated_svd
from .weights import Weight

INITS = ("svd", "random")  # by name; only load_reference_adapter makes "sklearn", a pair (A, B) is "given"

Factors = tuple[Tensor, Tensor]  # A and B


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
        """A and B as they were made, rounded as the recipe says; `check_range` looks at what comes of it."""
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
            A, B = self.drawn(rank, (N, K))
            return A.to(weight.device, dtype), B.to(weight.device, dtype)
        if self.init == "sklearn":
            return self._factors_by_sklearn(weight.read(), rank)
        raise ValueError("init: A and B were given to attach, so they cannot be made again")

    def drawn(self, rank: int, shape: Sequence[int]) -> Factors:
        """The random A and B for a W of this shape (N, K), fp32, on the CPU."""
        N, K = shape
        on = {"dtype": torch.float32, "device": "cpu"}
        A = torch.empty(rank, K, **on).uniform_(-1, 1, generator=self.generator("A")) / math.sqrt(K)
        B = torch.empty(N, rank, **on).uniform_(-1, 1, generator=self.generator("B")) / math.sqrt(rank)
        return A, B

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
        return torch.randn(rank, rank, generator=self.generator("R"), dtype=torch.float32, device="cpu") * init_std

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


def check_rank(rank: int, label: str, shape: tuple[int, int] | None = None) -> None:
    """ValueError for a rank that is no integer above 0 or, given the shape (N, K) of W, too large for its SVD."""
    check("rank", rank, label)
    if shape is not None and rank > min(shape):
        N, K = shape
        raise ValueError(
            f"rank: got {rank} for {label} of shape {N} x {K}, must be at most {min(N, K)}; "
            "leave the module out or give it a smaller rank"
        )


def check_range(factors: Factors, label: str) -> None:
    """ValueError where A or B, which were finite, have become infinite in fp16, the one dtype of so little range."""
    if factors[0].dtype == torch.float16 and not all(t.is_meta or torch.isfinite(t).all() for t in factors):
        raise ValueError(
            f"dtype: got float16 for A and B of {label}, whose values go past its largest, 65504; must be another "
            'dtype, such as "bfloat16" or "float32"'
        )


def check_given(factors: Factors, rank: int, shape: tuple[int, int] | None, label: str, argument: str = "init") -> None:
    """TypeError or ValueError for A and B that are not a pair of finite tensors of the shapes of a layer."""
    if len(factors) != 2 or not all(isinstance(t, Tensor) and t.dtype in FLOATS for t in factors):
        found = ", ".join(str(t.dtype) if isinstance(t, Tensor) else type(t).__name__ for t in factors)
        raise TypeError(
            f"{argument}: got ({found}) for {label}, must be a pair (A, B) of tensors in bf16, fp16, fp32 or fp64"
        )
    A, B = factors
    N, K = shape or (B.shape[0], A.shape[-1])
    if tuple(A.shape) != (rank, K) or tuple(B.shape) != (N, rank):
        raise ValueError(
            f"{argument}: got A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} for {label}, "
            f"must be {(rank, K)} and {(N, rank)}"
        )
    if not all(torch.isfinite(t).all() for t in factors if not t.is_meta):
        raise ValueError(f"init: A or B for {label} has NaN or Inf values")
