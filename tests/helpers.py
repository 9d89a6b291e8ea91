"""Operands of every awkward kind, and the accuracy rules of the layer and of the SVD as assertions."""

from __future__ import annotations

import faulthandler
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from loraxs_kernels import reference, truncated_svd

PACKAGE = Path(reference.__file__).parent
EMULATED = os.environ.get("LORAXS_EMULATED") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# (T, N, K, r): empty, single, prime, rank above the features, the paper's ranks, a little of everything.
SHAPES = [
    (0, 8, 8, 2),
    (1, 1, 1, 1),
    (1, 64, 32, 4),
    (3, 5, 7, 1),
    (4, 6, 5, 9),
    (17, 33, 65, 12),
    (64, 48, 96, 25),
    (130, 257, 129, 20),
    (2, 96, 384, 64),
]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Operands:
    x: Tensor
    W: Tensor
    A: Tensor
    R: Tensor
    B: Tensor
    bias: Tensor
    gY: Tensor
    s: float = 0.75

    def to(self, dtype: torch.dtype) -> Operands:
        """The same numbers in another dtype; R too."""
        return Operands(*(getattr(self, k).detach().to(dtype) for k in ("x", "W", "A", "R", "B", "bias", "gY")), self.s)


def operands(
    T: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
) -> Operands:
    """Random operands, y of order 1; `layout` is that of x, and "transposed" turns W, A, B and gY too."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, to)

    def laid(*shape: int) -> Tensor:
        return rand(*shape[::-1]).t() if layout == "transposed" else rand(*shape)

    x = laid(T, K)
    if layout == "sliced":
        x = rand(2 * T, K + 3)[::2, 1 : K + 1]
    elif layout == "expanded":
        x = rand(1, K).expand(T, K)
    W, A, B = laid(N, K) / K**0.5, laid(r, K) / K**0.5, laid(N, r) / r**0.5
    R = rand(r, r, to=torch.promote_types(dtype, torch.float32)) / r**0.5
    return Operands(x, W, A, R, B, rand(N), laid(T, N))


def backward(o: Operands) -> Operands:
    """The operands of the backward pass, as views: its x is gY, its bias none."""
    return Operands(o.gY, o.W.t(), o.B.t(), o.R.t(), o.A.t(), None, o.x, o.s)


def gradients(o: Operands, call, bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """y, gX, gR of `call(x, W, A, R, B, s, bias)` on these operands."""
    x, R = o.x.detach().requires_grad_(), o.R.detach().requires_grad_()
    y = call(x, o.W, o.A, R, o.B, o.s, o.bias if bias else None)
    gX, gR = torch.autograd.grad(y, (x, R), o.gY)
    return y.detach(), gX, gR


def oracle_gradients(o: Operands, bias: bool = True) -> tuple[Tensor, ...]:
    """y, gX, gR in fp64, every sum in the opposite order: where the operands are fp64 too, a chain in the same order
    would be equal to it and its own rounding, by which the rule measures, would not show."""

    def turned(t: Tensor) -> Tensor:
        return t.flip(*range(t.dim()))

    names = ("x", "W", "A", "R", "B", "bias", "gY")
    o = Operands(*(turned(getattr(o, name).detach().double()) for name in names), o.s)
    return tuple(map(turned, gradients(o, unfused, bias)))


def unfused(x, W, A, R, B, s, bias=None):
    """The chain of separate torch ops, differentiated by autograd, in the dtype of x."""
    return reference.lowrank_linear(x, W, A, R.to(x.dtype), B, s, bias)[0]


def assert_accurate(got: Tensor, chain: Tensor, oracle: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """The accuracy rule of loraxs_kernels/reference.py."""
    assert got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}, must be {tuple(oracle.shape)}"
    error, allowed = reference.relative_error(got, oracle), reference.allowed_error(chain, oracle, dtype)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def assert_primitive(
    o: Operands, results: tuple, other: Tensor | None, out: Tensor | None = None, W: bool = True
) -> None:
    """y, z and the gram of a backend against the oracle, by the accuracy rule; `out`: what y was before; W: whether it
    took part.  z is fp32, and as exact, whatever the operands."""
    dtype = o.x.dtype

    def expected(at: torch.dtype) -> tuple:
        x, A, R, B = (t.detach().to(at) for t in (o.x, o.A, o.R, o.B))
        bias = None if o.bias is None or out is not None else o.bias.to(at)
        y, z = reference.lowrank_linear(x, o.W.to(at) if W else None, A, R, B, o.s, bias)
        y = y if out is None else out.to(at) + y
        return y, z, None if other is None else o.s * z.T @ other.to(at)

    for name, got, chain, oracle in zip("yzg", results, expected(dtype), expected(torch.float64), strict=True):
        if oracle is not None:
            assert_accurate(got, chain, oracle, dtype, name)
    y, z, gram = results
    assert y.dtype == dtype and z.dtype == torch.float32
    assert gram is None or gram.dtype == torch.float32
    assert reference.relative_error(z, expected(torch.float64)[1]) < 1e-5


def svd_errors(W: Tensor, values: Tensor, S: Tensor, left: Tensor, right: Tensor, eps: float) -> tuple[float, float]:
    """The sigma error of S and the excess of the low-rank matrix `left @ right`, both beyond rounding.

    `values` are the singular values s of W; everything is fp64, and `eps` is that of the dtype of the results.

    sigma error: the largest |S_i - s_i| / s_i.  Of the difference only what exceeds `svd_rounding` counts.  Values
    below 8 eps s_1 count as 8 eps s_1, because `truncated_svd` returns those as zeros.

    excess: by how much |W - left right| exceeds the least error of a matrix of this rank, relative to that least error,
    which is the norm of the values past the rank.  (All norms are Frobenius norms.)  To the square of the least error
    is added what rounding costs.  Rounding U, S or Vh moves the low-rank matrix within its own columns or rows, which
    are orthogonal to the rest of W, so that squares add up: `svd_rounding` for each of the r directions.  Directions
    whose values are within 2 roundings of the first value past the rank may be exchanged for others as near to them.
    Values below 8 eps s_1 may be left out.  The least error itself is known to the rounding of the oracle times |W|.
    """
    r, zero = len(S), 8 * eps * values[0]
    kept, rest = values[:r], values[r:]
    rounding = svd_rounding(W, values, eps)[:r]
    truth = kept.clamp(min=zero)
    sigma = (((S.clamp(min=zero) - truth).abs() - rounding).clamp(min=0) / truth).max()
    lost = rest.square().sum() + rounding.square().sum() + kept[kept < zero + rounding].square().sum()
    lower = (kept - 2 * rounding).clamp(min=0)
    lost += (kept.square() - lower.square())[lower < rest[:1].sum()].sum()
    least = lost.sqrt() + svd_oracle(W) * values.norm()
    return sigma.item(), (torch.linalg.norm(W - left @ right) / least - 1).clamp(min=0).item()


def svd_rounding(W: Tensor, values: Tensor, eps: float) -> Tensor:
    """How far rounding may move each singular value.

    An entry of W^T Q is rounded to about eps times the norms of the two vectors that it multiplies.  For a column of
    the product this is eps |W|, and a singular value moves by no more than the product does.  The columns of Q are
    orthonormal to the random errors of at most max(m, n) reflections, eps each, which grow as the square root of their
    number; they change a singular value in proportion.  The oracle has such errors relative to s_1.
    """
    return eps * (values.norm() + max(W.shape) ** 0.5 * values) + svd_oracle(W) * values[0]


def svd_oracle(W: Tensor) -> float:
    """The rounding of the oracle, relative to s_1: max(m, n) reflections in fp64."""
    return max(W.shape) ** 0.5 * torch.finfo(torch.float64).eps


def assert_svd_no_worse_than_scikit_learn(W: Tensor, ranks: Iterable[int], methods: Iterable[str] = ("auto",)) -> None:
    """`truncated_svd` by each method has at most the errors (`svd_errors`) of scikit-learn's TruncatedSVD(n_iter=10).

    And what holds without a peer: orthonormal vectors, descending values, none above the truth by more than rounding,
    so that the values of exact zeros are below it.  The truth is the full SVD in fp64 of W as rounded to its dtype.
    Scikit-learn, which has no bf16, gets fp32; it also gets W scaled by a power of two, so that only `truncated_svd`
    meets the ends of the range of a dtype.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    eps, near = torch.finfo(dtype).eps, {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    exact, values = _scaled_and_values(W)
    rounding = svd_rounding(exact, values, eps)
    faults = []
    for rank in ranks:
        theirs = _errors_of_scikit_learn(W, rank)
        for method in methods:
            factors = truncated_svd(W, rank, method=method)
            assert all(t.dtype == dtype for t in factors)
            U, S, Vh = factors[0].double(), _scaled(factors[1], W), factors[2].double()
            ours = svd_errors(exact, values, S, U * S, Vh, eps)
            skew = max((each.mT @ each - torch.eye(rank).double()).abs().max().item() for each in (U, Vh.mT))
            above = ((S - values[:rank]) / rounding[:rank]).max().item()
            for what, got, most in (
                ("sigma error", ours[0], theirs[0]),
                ("excess", ours[1], theirs[1]),
                ("not orthonormal by", skew, near),
                ("above the truth, in roundings, by", above, 1),
                ("ascending by", S.diff().amax().item() if rank > 1 else 0, 0),
            ):
                if not got <= most:
                    faults.append(f"rank {rank}, {method}: {what} {got:.2g}, must be at most {most:.2g}")
    assert not faults, "\n".join(faults)


def _scaled(t: Tensor, W: Tensor) -> Tensor:
    """In fp64, by the power of two that brings the largest entry of W near 1."""
    return torch.from_numpy(np.ldexp(t.double().numpy(), -int(torch.frexp(W.abs().max().double()).exponent)))


@functools.lru_cache(maxsize=1)
def _scaled_and_values(W: Tensor) -> tuple[Tensor, Tensor]:
    """W scaled, and its singular values; kept for who asks of the same tensor next."""
    exact = _scaled(W, W)
    return exact, torch.linalg.svdvals(exact)


@functools.lru_cache(maxsize=4)
def _errors_of_scikit_learn(W: Tensor, rank: int) -> tuple[float, float]:
    from sklearn.decomposition import TruncatedSVD

    (exact, values), dtype = _scaled_and_values(W), torch.promote_types(W.dtype, torch.float32)
    peer = TruncatedSVD(rank, n_iter=10, random_state=42)
    with np.errstate(divide="ignore", invalid="ignore"):  # it divides by a variance, which may be 0
        left = torch.from_numpy(peer.fit_transform(exact.to(dtype).numpy())).double()
    S, right = (torch.from_numpy(each).double() for each in (peer.singular_values_, peer.components_))
    return svd_errors(exact, values, S, left, right, torch.finfo(dtype).eps)


def guard(monkeypatch, backend, written: bool = True):
    """Poison everything a backend allocates with NaN, between guard bands; returns what checks those.

    written: whether it checks that no NaN is left, too.
    """
    held = []

    def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size, band = torch.Size(shape).numel(), 1 << 12
        memory = torch.full((size + 2 * band,), 7.0, dtype=dtype)
        memory[band : band + size] = float("nan") if dtype.is_floating_point else -1
        held.append((memory, band))
        return memory[band : band + size].view(shape)

    def whole() -> bool:
        bands = len(held) > 0 and all((m[:band] == 7).all() and (m[-band:] == 7).all() for m, band in held)
        return bands and not (written and any(m.isnan().any() for m, _ in held))

    monkeypatch.setattr(backend, "empty", empty)
    return whole


def on_each_line(act: Callable[[FrameType], None], call: Callable[[], object], within: str) -> None:
    """Call, and act before each line that is executed in files whose path has `within`."""

    def trace(frame, event, _):
        if within not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            act(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


def interrupted_at(k: int, call: Callable[[], object], within: str = "/loraxs_kernels/") -> bool:
    """Call, with Ctrl-C at the k-th line executed in files whose path has `within`; False if it ends before that."""
    lines = itertools.count(1)

    def stop(frame: FrameType) -> None:
        if next(lines) == k:
            raise KeyboardInterrupt

    try:
        on_each_line(stop, call, within)
    except KeyboardInterrupt:
        return True
    return False


def assert_all_or_nothing(
    make: Callable, call: Callable, state: Callable, undone: int, within: str = "/loraxs_kernels/"
) -> None:
    """Ctrl-C at any line of `call(model)` leaves the model as it was, the same objects, or wholly done.

    A line that is executed several times is interrupted the first and the last time.

    make: a model.  state: what of it must be as before, or as after.  undone: how often it must at least be as before.
    within: the files whose lines count; those that only compute need not be interrupted for each of their callers.
    """
    call(make())  # what only a first call executes is not counted
    done, model, lines = make(), make(), itertools.count(1)
    times: dict[tuple[CodeType, int], list[int]] = defaultdict(list)
    on_each_line(lambda at: times[at.f_code, at.f_lineno].append(next(lines)), lambda: call(done), within)
    before, after, left = state(model), state(done), undone
    for k in sorted({k for each in times.values() for k in (each[0], each[-1])}):
        identity = [id(t) for t in [*model.modules(), *model.parameters()]]
        interrupted_at(k, lambda model=model: call(model), within)
        if state(model) == after:
            model = make()
        else:
            assert state(model) == before, f"half done at line {k}"
            assert [id(t) for t in [*model.modules(), *model.parameters()]] == identity, f"other objects at line {k}"
            left -= 1
    call(model)
    assert state(model) == after != before and left <= 0


def on_ranks(n: int, function: Callable[..., None], *args: object, limit: float = 300) -> None:
    """function(rank, *args) in n processes, the ranks of one gloo group on the CPU; the first error is raised here.

    function: of a module's top level.  Every rank's error is printed.  Nothing hangs: a collective waits for a minute,
    all of it for `limit` seconds, and then the processes are killed.
    """
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a process of their own that has imported what takes seconds, once for all tests.
        imported = ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "peft"]
        multiprocessing.set_forkserver_preload(imported)
        ranks = torch.multiprocessing.start_processes(
            _rank, (n, f"{folder}/store", function, args), nprocs=n, join=False, start_method="forkserver"
        )
        end = time.monotonic() + limit
        try:
            while not ranks.join(timeout=1):
                assert time.monotonic() < end, f"{function.__name__}: not done in {limit} s"
        finally:
            for process in ranks.processes:
                process.kill()


def _rank(rank: int, n: int, store: str, function: Callable[..., None], args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))  # which some libraries ask for
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    try:
        function(rank, *args)
        dist.barrier()
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    os._exit(0)  # in the ordinary way a thread of torch's own, not yet joined, aborts the process now and then
