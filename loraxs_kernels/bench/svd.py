"""How long do the factors take, and how exact are they?  truncated_svd beside scikit-learn's and torch's own."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import basis
from ..basis import Factors
from ..model import attach, detach
from ..svd import basis_size, plan, truncated_svd
from . import timer
from .layer import Row, failure, release
from .shapes import MODELS, Shape

if TYPE_CHECKING:
    from .settings import Settings

SPIKES = 256
WHOLE_ROUNDS = 2
MIN_ROUNDS = 5  # a full decomposition may take minutes

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """`run(W, r)` gives U (N, r), S (r,), Vh (r, K), on the device of W unless it says otherwise."""

    what: str
    run: Callable[[Tensor, int], Triplets]
    default: bool = True
    missing: Callable[[], str | None] = lambda: None


def _sklearn(W: Tensor, r: int) -> Triplets:
    """As the LoRA-XS reference calls it: n_iter = 10, on the CPU, the vectors from the fitted transform."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(n_components=r, n_iter=10, random_state=42)
    U = svd.fit_transform(W.float().cpu().numpy()) / svd.singular_values_
    return tuple(torch.from_numpy(t).to(W.device) for t in (U, svd.singular_values_, svd.components_))


def _ours(**options: Any) -> Callable[[Tensor, int], Triplets]:
    return lambda W, r: truncated_svd(W, r, **options)


def _svd_lowrank(niter: int, more: int) -> Callable[[Tensor, int], Triplets]:
    def run(W: Tensor, r: int) -> Triplets:
        U, S, V = torch.svd_lowrank(W.float(), q=min(r + more, *W.shape), niter=niter)
        return U[:, :r], S[:r], V[:, :r].T

    return run


def _full(W: Tensor, r: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


METHODS = {
    "loraxs-svd": Method("truncated_svd", truncated_svd),
    "loraxs-krylov": Method("truncated_svd, krylov", _ours(method="krylov"), default=False),
    "loraxs-subspace": Method("truncated_svd, subspace", _ours(method="subspace"), default=False),
    "sklearn": Method(
        "scikit-learn TruncatedSVD, n_iter = 10, on the CPU (the paper's)",
        _sklearn,
        missing=lambda: None if importlib.util.find_spec("sklearn") else "the package scikit-learn is not installed",
    ),
    "svd-lowrank": Method("torch.svd_lowrank, niter = 10, q = r + 10", _svd_lowrank(10, 10)),
    "svd-lowrank-2": Method("torch.svd_lowrank, niter = 2 (its default), q = r + 10", _svd_lowrank(2, 10)),
    "svd-lowrank-4": Method("torch.svd_lowrank, niter = 4, q = r + 10", _svd_lowrank(4, 10)),
    "svd-lowrank-r": Method("torch.svd_lowrank, niter = 10, q = r", _svd_lowrank(10, 0), default=False),
    "svd-lowrank-4-r": Method("torch.svd_lowrank, niter = 4, q = r", _svd_lowrank(4, 0), default=False),
    "svd-full": Method("torch.linalg.svd", _full, default=False),
}
# What the paths of all reports are; the first can only be found in a report of an earlier version.
WHAT = {"loraxs-eigh-gpu": "truncated_svd, its eigenproblem on the GPU"} | {
    name: method.what for name, method in METHODS.items()
}


def points(settings: Settings) -> int:
    return len(settings.shapes) * len(settings.ranks) + (len(settings.ranks) if _whole(settings) else 0)


def rows(settings: Settings) -> Iterator[Row]:
    """On a GPU the linears of the whole model, by each of WHOLE; then one row for each method, shape and rank."""
    if _whole(settings):
        for r in settings.ranks:
            yield from whole(settings, r)
    for shape in settings.shapes:
        highest = min(shape.N, shape.K)
        for r in (r for r in settings.ranks if r > highest):
            lost = f"rank {r} is above min(N, K) = {highest}"
            yield from (_where(settings, shape, r) | failure(name, lost) for name in settings.svd_paths)
        ranks = [r for r in settings.ranks if r <= highest]
        try:
            W = weight(shape, settings)
            sigma, energy = truth(W)
        except torch.OutOfMemoryError as error:
            lost = failure("", error)["reason"]
            yield from (_where(settings, shape, r) | failure(name, lost) for r in ranks for name in settings.svd_paths)
            continue
        for r in ranks:
            yield from point(settings, shape, W, r, sigma, energy)
        del W
        release()


def _where(settings: Settings, shape: Shape, r: int) -> Row:
    where = {"question": "svd", "model": settings.model, "layers": shape.names, "count": shape.count}
    return where | {"N": shape.N, "K": shape.K, "r": r, "dtype": settings.dtype_name}


def _whole(settings: Settings) -> bool:
    return settings.model in MODELS and (settings.device.type == "cuda" or settings.model == "tiny")


def weight(shape: Shape, settings: Settings, seed: int = 0) -> Tensor:
    """A random matrix with the spectrum of a trained weight: a slowly decaying head over a Gaussian bulk."""
    g = torch.Generator(settings.device).manual_seed(seed)
    k = min(SPIKES, shape.N, shape.K)

    def rand(rows: int, columns: int, over: int) -> Tensor:
        return torch.randn(rows, columns, generator=g, device=settings.device) / over**0.5

    U, V, bulk = rand(shape.N, k, shape.N), rand(shape.K, k, shape.K), rand(shape.N, shape.K, shape.K)
    head = 10 / (1 + torch.arange(k, device=settings.device)) ** 0.5
    return (bulk + (U * head) @ V.T).to(settings.dtype)


def truth(W: Tensor) -> tuple[Tensor, float]:
    """All singular values of W, descending, and the sum of their squares, from the fp64 Gram of its shorter side."""
    W = W.double()
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return squares.sqrt(), squares.sum().item()


def point(settings: Settings, shape: Shape, W: Tensor, r: int, sigma: Tensor, energy: float) -> Iterator[Row]:
    where, passes, facts = _where(settings, shape, r), {}, {}
    for name in settings.svd_paths:

        def call(method: Method = METHODS[name]) -> Triplets:
            return method.run(W, r)

        try:
            made, peak = _peak(call, settings)
            facts[name] = accuracy(W, *made, sigma, energy) | peak
            del made
            passes[name] = timer.Pass(call, 1)
        except Exception as error:
            yield where | failure(name, error)
    if "loraxs-svd" in facts:
        facts["loraxs-svd"]["bytes"] = bytes_read(W, r)
    try:
        samples = timer.interleave(passes, settings.device, settings.seconds, MIN_ROUNDS)
    except Exception as error:
        lost = failure("", error)["reason"]
        yield from (where | failure(name, lost) for name in passes)
        return
    for name, own in samples.items():
        row = where | {"path": name, "status": "ok", "rounds": len(own)} | facts[name]
        if settings.device.type == "cuda":
            row["seconds"] = dataclasses.asdict(timer.Spread.of(own))
        row["over"] = {other: dataclasses.asdict(timer.Spread.of(own / samples[other])) for other in samples}
        yield row | {"noisy": timer.Spread.of(own).noisy}


def bytes_read(W: Tensor, r: int) -> int:
    """Every read of W by truncated_svd: for its peak, and twice a step or, where Q is all of its smaller side, once."""
    how, m = plan(r, W.shape), min(W.shape)
    return W.nbytes * (2 if basis_size(m, how) == m else 1 + 2 * (how.n_iter + 1))


def _peak(call: Callable[[], Any], settings: Settings) -> tuple[Any, Row]:
    """What a call makes, and on a GPU the memory it took beyond that."""
    if settings.device.type != "cuda":
        return call(), {}
    torch.cuda.synchronize(settings.device)
    held = torch.cuda.memory_allocated(settings.device)
    torch.cuda.reset_peak_memory_stats(settings.device)
    made = call()
    torch.cuda.synchronize(settings.device)
    results = torch.cuda.memory_allocated(settings.device) - held
    return made, {"peak_bytes": torch.cuda.max_memory_allocated(settings.device) - held - results}


def accuracy(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, sigma: Tensor, energy: float) -> Row:
    """The largest relative error of a singular value; how much the reconstruction loses beyond the best of its rank."""
    r = len(S)
    U, S, Vh = U.double(), S.double(), Vh.double()
    best = energy - sigma[:r].square().sum().item()
    lost = (W.double() - (U * S) @ Vh).square().sum().item()
    return {
        "sigma_error": ((S - sigma[:r]).abs() / sigma[:r]).max().item(),
        "excess": lost / best - 1 if best > 0 else None,
    }


def whole(settings: Settings, r: int) -> Iterator[Row]:
    """Every linear of the model, resident in its dtype: `attach` and a fingerprint of each layer, beside a loop.

    The accuracy is that of the last of them.
    """
    model = MODELS[settings.model]
    where = {"question": "svd", "model": model.name, "r": r, "dtype": settings.dtype_name}
    blocks = settings.blocks or model.blocks
    linears = None
    try:
        linears = nn.ModuleList()
        for i in range(blocks):
            for shape in model.shapes:
                for j in range(shape.count):
                    linear = nn.Linear(shape.K, shape.N, bias=False, device="meta")
                    linear.weight = nn.Parameter(weight(shape, settings, 7 * i + j), requires_grad=False)
                    linears.append(linear)
        where["matrices"] = len(linears)
        last = linears[-1].weight
        sigma, energy = truth(last)
        samples: dict[str, Tensor] = {}
        for name in (name for name in WHOLE if name in settings.svd_paths):

            def call(make: Callable[..., list[Factors]] = WHOLE[name]) -> list[Factors]:
                return make(linears, r)

            try:
                WHOLE[name](linears[: len(linears) // blocks], r)  # warm-up: one block
                made, peak = _peak(call, settings)
                A, B = made[-1]
                del made
                S = A.float().norm(dim=1)
                facts = accuracy(last, B.float(), S, A.float() / S[:, None], sigma, energy) | peak
                rounds = WHOLE_ROUNDS if name == "loraxs-svd" else 1
                samples[name] = torch.tensor([timer.once(call) for _ in range(rounds)])
            except Exception as error:
                yield where | failure(name, error)
                continue
            row = where | {"path": name, "status": "ok", "rounds": rounds, "over": {}} | facts
            if settings.device.type == "cuda":
                row["seconds"] = dataclasses.asdict(timer.Spread.of(samples[name]))
            if name == "loraxs-svd":
                row["bytes"] = sum(bytes_read(each.weight, r) for each in linears)
            if "loraxs-svd" in samples:
                ours = timer.Spread.of(samples["loraxs-svd"]).median
                row["over"]["loraxs-svd"] = dataclasses.asdict(timer.Spread.of(samples[name] / ours))
            yield row | {"noisy": timer.Spread.of(samples[name]).noisy}
    except Exception as error:
        yield where | failure("loraxs-svd", error)
    finally:
        linears = None
        release()


def _attached(linears: nn.ModuleList, r: int) -> list[Factors]:
    """A and B of every layer by `attach`, and what an adapter file knows them by."""
    attach(linears, r, target_modules="all-linear", progress=False)
    layers = list(linears)
    for layer in layers:
        basis.singular_values(layer.A)
        basis.probes(layer.A, layer.R, layer.B)
    detach(linears)
    return [(layer.A, layer.B) for layer in layers]


def _looped(method: Method) -> Callable[[nn.ModuleList, int], list[Factors]]:
    def run(linears: nn.ModuleList, r: int) -> list[Factors]:
        made = []
        for W in (linear.weight for linear in linears):
            U, S, Vh = method.run(W, r)
            made.append(((S[:, None] * Vh).to(W.dtype), U.to(W.dtype)))
        return made

    return run


# How the factors of a whole model are made.
WHOLE = {"loraxs-svd": _attached} | {
    name: _looped(METHODS[name]) for name in ("svd-lowrank", "svd-lowrank-2", "svd-lowrank-4")
}
