"""How long do the factors take, and how exact are they?  truncated_svd beside scikit-learn's and torch's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import basis
from ..model import attach, detach
from ..recipe import Factors
from ..svd import basis_size, truncated_svd
from ..svd import plan as svd_plan
from . import BenchError, plots, tables, timer
from .compare import Candidate, Row, compare, failure, figures
from .question import Path, Point, Question, colour, earlier
from .request import Request
from .shapes import MODELS, Shape
from .tables import Table, over

OURS = "loraxs-svd"
SPIKES = 256
WHOLE_ROUNDS = 2  # of ours; a rival takes one more run after the one that is looked at
MIN_ROUNDS = 5  # a full decomposition may take minutes

Triplets = tuple[Tensor, Tensor, Tensor]


def _sklearn(W: Tensor, r: int) -> Triplets:
    """As the LoRA-XS reference calls it: n_iter = 10, on the CPU, the vectors from the fitted transform."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(n_components=r, n_iter=10, random_state=42)
    U = svd.fit_transform(W.float().cpu().numpy()) / svd.singular_values_
    return tuple(torch.from_numpy(t).to(W.device) for t in (U, svd.singular_values_, svd.components_))


def _no_sklearn() -> str | None:
    return None if importlib.util.find_spec("sklearn") else "the package scikit-learn is not installed"


def _lowrank(name: str, colour: str, niter: int, more: int = 10, run: str = "default", note: str = "") -> Path:
    def compute(W: Tensor, r: int) -> Triplets:
        U, S, V = torch.svd_lowrank(W.float(), q=min(r + more, *W.shape), niter=niter)
        return U[:, :r], S[:r], V[:, :r].T

    what = f"torch.svd_lowrank, niter = {niter}{note}, q = r{f' + {more}' if more else ''}"
    return Path(name, colour, what, run, make=compute)


def _full(W: Tensor, r: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


_krylov, _subspace = (partial(truncated_svd, method=how) for how in ("krylov", "subspace"))
_SKLEARN = "scikit-learn TruncatedSVD, n_iter = 10, on the CPU (the paper's)"
# `make(W, r)` gives U (N, r), S (r,), Vh (r, K), on the device of W unless it says otherwise.
METHODS: dict[str, Path] = {
    each.name: each
    for each in (
        earlier("loraxs-eigh-gpu", "#9e9ac8", "truncated_svd, its eigenproblem on the GPU"),
        Path(OURS, "#1f77b4", "truncated_svd", make=truncated_svd),
        Path("loraxs-krylov", "#6baed6", "truncated_svd, krylov", "all", make=_krylov),
        Path("loraxs-subspace", "#2ca02c", "truncated_svd, subspace", "all", make=_subspace),
        Path("sklearn", "#e6550d", _SKLEARN, missing=_no_sklearn, make=_sklearn),
        _lowrank("svd-lowrank", "#b8860b", 10),
        _lowrank("svd-lowrank-2", "#f2c14e", 2, note=" (its default)"),
        _lowrank("svd-lowrank-4", "#d9a441", 4),
        _lowrank("svd-lowrank-r", "#8c6d31", 10, more=0, run="all"),
        Path("svd-full", "#000000", "torch.linalg.svd", "all", make=_full),
    )
}


def plan(request: Request) -> list[Point]:
    """On a GPU first the linears of the whole model, by each of WHOLE; then each shape, at every rank."""
    every = request.model in MODELS and (request.gpu or request.model == "tiny")
    whole = [Point({"r": r}, partial(_whole, request, r)) for r in request.ranks if every]
    return whole + [Point(shape.where, partial(_one, request, shape)) for shape in request.shapes]


def _one(request: Request, shape: Shape) -> Iterator[Row]:
    """A row for each method and rank, on one weight."""

    @cache
    def made() -> tuple[Tensor, Tensor, float]:
        W = weight(shape, request)
        return W, *truth(W)

    def build(made: tuple[Tensor, Tensor, float], name: str, r: int) -> Candidate:
        W, *known = made
        if r > min(W.shape):
            raise BenchError(f"rank {r} is above min(N, K) = {min(W.shape)}")
        call = partial(METHODS[name].make, W, r)
        found, peak = _peak(call, request)
        facts = accuracy(W, *found, *known) | peak | ({"bytes": bytes_read(W, r)} if name == OURS else {})
        return Candidate(lambda: [call], facts=facts, warm=False)  # it has just been called

    names = [name for name in METHODS if name in request.paths]
    for r in request.ranks:
        how = dict(modes=("eager",), min_rounds=MIN_ROUNDS)
        rows = compare(request, names, made, partial(build, r=r), (OURS,), **how)
        yield from ({"r": r} | row for row in rows)


def weight(shape: Shape, request: Request, seed: int = 0) -> Tensor:
    """A random matrix with the spectrum of a trained weight: a slowly decaying head over a Gaussian bulk."""
    g = torch.Generator(request.device).manual_seed(seed)
    k = min(SPIKES, shape.N, shape.K)

    def rand(rows: int, columns: int, over: int) -> Tensor:
        return torch.randn(rows, columns, generator=g, device=request.device) / over**0.5

    U, V, bulk = rand(shape.N, k, shape.N), rand(shape.K, k, shape.K), rand(shape.N, shape.K, shape.K)
    head = 10 / (1 + torch.arange(k, device=request.device)) ** 0.5
    return (bulk + (U * head) @ V.T).to(request.dtype)


def truth(W: Tensor) -> tuple[Tensor, float]:
    """All singular values of W, descending, and the sum of their squares, from the fp64 Gram of its shorter side."""
    W = W.double()
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return squares.sqrt(), squares.sum().item()


def bytes_read(W: Tensor, r: int) -> int:
    """Every read of W by truncated_svd: for its peak, and twice a step or, where Q is all of its smaller side, once."""
    how, m = svd_plan(r, W.shape), min(W.shape)
    return W.nbytes * (2 if basis_size(m, how) == m else 1 + 2 * (how.n_iter + 1))


def _peak(call: Callable[[], Any], request: Request) -> tuple[Any, Row]:
    """What a call makes, and on a GPU the memory it took beyond that."""
    if not request.gpu:
        return call(), {}
    made, most, kept = timer.peak(call, request.device)
    return made, {"peak_bytes": most - kept}


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


def _whole(request: Request, r: int) -> Iterator[Row]:
    """Every linear of the model, resident in its dtype: `attach` and a fingerprint of each layer, beside a loop.

    The accuracy is that of the last of them.
    """
    model = MODELS[request.model]
    blocks = request.blocks or model.blocks
    linears = nn.ModuleList()
    for i in range(blocks):
        for shape in model.shapes:
            for j in range(shape.count):
                linear = nn.Linear(shape.K, shape.N, bias=False, device="meta")
                linear.weight = nn.Parameter(weight(shape, request, 7 * i + j), requires_grad=False)
                linears.append(linear)
    last = linears[-1].weight
    sigma, energy = truth(last)
    samples: dict[str, Tensor] = {}
    for name in (name for name in WHOLE if name in request.paths):
        call = partial(WHOLE[name], linears, r)
        try:
            WHOLE[name](linears[: len(linears) // blocks], r)  # warm-up: one block
            made, peak = _peak(call, request)
            A, B = made[-1]
            del made
            S = A.float().norm(dim=1)
            facts = accuracy(last, B.float(), S, A.float() / S[:, None], sigma, energy) | peak
            took = [timer.once(call) for _ in range(WHOLE_ROUNDS if name == OURS else 1)]
        except Exception as error:
            yield {"matrices": len(linears)} | failure(name, error)
            continue
        samples[name] = torch.tensor(took, dtype=torch.float64)
        beside = {OURS: samples[OURS].quantile(0.5)} if OURS in samples else {}
        row = figures(name, samples[name], beside, request.gpu) | facts
        row |= {"bytes": sum(bytes_read(each.weight, r) for each in linears)} if name == OURS else {}
        yield {"matrices": len(linears)} | row


def _attached(linears: nn.ModuleList, r: int) -> list[Factors]:
    """A and B of every layer by `attach`, and what an adapter file knows them by."""
    attach(linears, r, target_modules="all-linear", progress=False)
    layers = list(linears)
    for layer in layers:
        basis.singular_values(layer.A)
        basis.probes(layer.A, layer.R, layer.B)
    detach(linears)
    return [(layer.A, layer.B) for layer in layers]


def _looped(method: Path) -> Callable[[nn.ModuleList, int], list[Factors]]:
    def run(linears: nn.ModuleList, r: int) -> list[Factors]:
        made = []
        for W in (linear.weight for linear in linears):
            U, S, Vh = method.make(W, r)
            made.append(((S[:, None] * Vh).to(W.dtype), U.to(W.dtype)))
        return made

    return run


# How the factors of a whole model are made.
WHOLE = {OURS: _attached} | {name: _looped(METHODS[name]) for name in ("svd-lowrank", "svd-lowrank-2", "svd-lowrank-4")}


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """How long the factors take, and how exact they are: of one weight, and of all of a model."""
    one, all_of_them = ([row for row in rows if whole == ("matrices" in row)] for whole in (False, True))
    if one:
        yield _table(report, "Truncated SVD of one weight", one, "{N} x {K}, {dtype}, r {r}", ".")
    if all_of_them:
        title, what = f"Factors of every linear of {all_of_them[-1]['model']}", "{matrices} linears, {dtype}, r {r}"
        yield _table(report, title, all_of_them, what, "; both of the last linear.")


def _table(report: dict[str, Any], title: str, rows: list[Row], what: str, which: str) -> Table:
    points = tables.labelled(rows, what)
    rivals = [name for name in tables.present(METHODS, rows) if name != OURS]
    notes = [
        "time: divided by truncated_svd's, quartiles in brackets; error: the largest relative error of a singular "
        f"value; excess: how far the squared reconstruction error is above the least of that rank, relative{which}"
    ]
    cells: list[tuple[str, Callable[[Row], str]]] = []
    if tables.gpu(report):
        cells = [
            ("ms", lambda row: tables.figure(f"{1e3 * row['seconds']['median']:.1f}", row["noisy"])),
            ("peak MiB", lambda row: f"{row['peak_bytes'] / 2**20:,.0f}"),
            ("W read at, TB/s", partial(tables.bandwidth, report=report)),
        ]
        notes.append(f"W read at: the bytes of all reads of W divided by the whole time; {tables.OF_COPY}.")
    errors = [
        ("error", lambda row: f"{row['sigma_error']:.1e}"),
        ("excess", lambda row: tables.NO_FIGURE if row["excess"] is None else f"{row['excess']:.1e}"),
    ]
    columns = [(head, OURS, cell) for head, cell in (*cells, *errors)]
    theirs = (("time", partial(over, other=OURS)), *errors)
    columns += [(f"{name}: {head}", name, cell) for name in rivals for head, cell in theirs]
    notes += [f"{name}: {METHODS[name].what}." for name in rivals]
    return tables.compared(title, points, columns, *notes)


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    points = tables.labelled((row for row in rows if "matrices" not in row), "{N} x {K} {dtype}, r = {r}")
    if points:
        yield plots.panels("svd", "Truncated SVD: time against error", points, _panel)


def _panel(axes: Any, point: dict[str, Row]) -> None:
    for row in point.values():
        if time := row["over"].get(OURS):
            style = {"color": colour(METHODS, row["path"]), "label": row["path"], "markersize": 8}
            axes.plot(time["median"], max(row["sigma_error"], 1e-9), "o", **style)
    axes.set(xscale="log", yscale="log", xlabel="time over truncated_svd")
    axes.set_ylabel("largest relative error of a singular value")


QUESTION = Question(
    name="svd",
    plan=plan,
    tables=show,
    plots=draw,
    paths=METHODS,
    options=("blocks",),
    unread=("tokens", "direction", "modes"),
    how="SVD: random weights, a decaying head over a Gaussian bulk; the truth is an fp64 eigensolver's.",
)
