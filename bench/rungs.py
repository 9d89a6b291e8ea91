"""The rungs of bench/first_light.py: small problems whose wrong results say what went wrong.

Coded inputs: x has one 1 in each row, and another operand holds integers that name their own place (`Coded`), so that
y[t, n] is one element of it, exactly, in bf16 too.  A wrong y then names the element that was read instead.  Random
inputs follow, checked by the accuracy rule of loraxs_kernels/reference.py; R, u and B are of order 1 there and W is
left out as well, because the rule cannot see a missing low-rank part that is small beside x W^T.

All that the backends allocate starts as NaN, written beforehand, so that it shows what a kernel does not write or reads
too early.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loraxs_kernels import backends, reference
from loraxs_kernels.backends import cuda, triton
from loraxs_kernels.backends.cuda.config import TILES, UNIT, Decode, aligned
from loraxs_kernels.backends.device import facts
from loraxs_kernels.backends.triton.config import pick_config
from loraxs_kernels.bench import timer
from loraxs_kernels.svd import truncated_svd

BASE = 251  # codes are 1 to 251, integers that bf16 holds exactly; 0 is what nobody added
POOL = 1 << 26  # 32-bit words that are poisoned at a time
SAVED = 2_000_000  # bytes of a failure that are kept, at most
CLUSTERS = 4  # that share the columns of a decode
KEPT = 8  # failures of a rung that are saved
# (T, N, K, r).  `waves`: more tiles than an H100 has multiprocessors.  `ragged`: multiples of nothing but TMA's 8.
SHAPES: dict[str, list[tuple[int, int, int, int]]] = {
    "alone": [(256, 512, 64, 64)],
    "tail": [(512, 1024, 512, 64)],
    "waves": [(2100, 4096, 4096, 64)],
    "ragged": [(129, 264, 72, 1), (1000, 1024, 1000, 12), (90, 8, 8, 25), (301, 520, 136, 64), (777, 1096, 1000, 130)],
    "overlap": [(4096, 256, 14336, 64)],
    "graph": [(2048, 1024, 4096, 12)],
    "decode": [(T, 4096, 1000, 16) for T in (1, 17, 64)]
    + [(17, 1000, 4096, 12), (64, 264, 4096, 64), (64, 264, 72, 128)],
    "shrink": [(300, 0, 1088, 64), (1000, 0, 1000, 12), (65, 0, 72, 1)],
    "triton": [(300, 1000, 1032, 64)],
    "svd": [(0, 1024, 4096, 64)],
}


@dataclass(frozen=True)
class Rung:
    """run(bench) returns a figure to print; needs: "core", "hopper" or "triton"; alone: nothing may run beside it."""

    run: Callable[[Bench], str | None]
    needs: str = ""
    alone: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None: it can."""
        if self.needs == "triton":
            return backends.unavailable("triton")
        if self.needs and (reason := backends.unavailable("cuda")):
            return reason
        if self.needs == "hopper" and (facts(device).capability != (9, 0) or "90a" not in cuda.core.architectures()):
            return "the GEMM with a tail needs a GPU of compute capability 9.0, and a core built for sm_90a"
        return None


class Coded:
    """A matrix that names its places: element (n, k) of four passes is 1 + one of n % 251, n // 251, k % 251, k // 251.

    Of three dimensions, the first two are counted as one.
    """

    def __init__(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.shape = name, shape
        n = torch.arange(math.prod(shape[:-1]), device=device)[:, None]
        k = torch.arange(shape[-1], device=device)[None, :]
        parts = (n % BASE, n // BASE, k % BASE, k // BASE)
        self.passes = torch.stack([1 + part.expand(len(n), k.numel()) for part in parts]).view(4, *shape).to(dtype)

    def element(self, codes: list[float]) -> str | None:
        """Which element has these four codes; None: no single one."""
        if not all(code in range(1, BASE + 1) for code in codes):
            return None
        n, k = (int(low) - 1 + BASE * (int(high) - 1) for low, high in (codes[:2], codes[2:]))
        rows = math.prod(self.shape[:-1])
        if n >= rows or k >= self.shape[-1]:
            return None
        place = (*divmod(n, self.shape[-2]), k) if len(self.shape) == 3 else (n, k)
        return f"{self.name}{list(place)}"

    def meaning(self, got: list[float], expected: list[float]) -> str:
        """What a result that should have had other codes holds."""
        if any(map(math.isnan, got)):
            return "NaN: memory that nobody wrote"
        if not any(got):
            return "nothing"
        if found := self.element(got):
            return found
        more = [a - b for a, b in zip(got, expected, strict=True)]
        if more == expected:
            return f"twice {self.element(expected)}"
        if found := self.element(more):
            return f"{self.element(expected)} and {found} added up"
        return f"no element of {self.name}"


class Bench:
    """What a rung works with: where it runs, what it calls, and where its checks go.

    note(state) is called before every check and after each failure, so that a process that is killed has said where it
    was; failures are saved as <stem>-<number>.npz.
    """

    def __init__(self, device: torch.device, stem: Path, note: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.stem, self.note = device, stem, note
        self.cuda, self.triton = cuda, triton
        self.state: dict[str, Any] = {"doing": "starting", "checks": 0, "failed": [], "saved": [], "worst": 0.0}
        self.generator = torch.Generator().manual_seed(0)
        self.note(self.state)

    def doing(self, what: str) -> None:
        self.state["doing"] = what
        self.note(self.state)

    def random(self, *shape: int, dtype: torch.dtype, over: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) / over).to(self.device, dtype)

    def exact(
        self, what: str, got: Tensor, expected: Tensor, holds: Coded | None = None, tile: tuple[int, int] = (64, 128)
    ) -> None:
        """Passes (n, ..., columns) must be the same, number by number.  what: "y ...", holds: whose codes they are."""
        got, expected = got.float(), expected.float()
        at = _first((got != expected).any(0))
        if at is None:
            return self._count(0.0)
        found, wanted = (t[(slice(None), *at)].tolist() for t in (got, expected))
        text = f"{what} at {list(at)}: got {found}, must be {wanted}"
        if holds is not None:
            text += f": it is {holds.meaning(found, wanted)}, must be {holds.element(wanted) or 'nothing'}"
        self._fail(text, got, expected, at, tile)

    def rule(
        self,
        what: str,
        got: Tensor,
        formula: Callable[..., Tensor],
        operands: tuple[Tensor | None, ...],
        tile: tuple[int, int] = (64, 128),
    ) -> None:
        """The accuracy rule: at most twice the error of the formula on these operands, against that in fp64."""
        chain, oracle = formula(*operands), formula(*(t if t is None else t.double() for t in operands))
        self.within(what, got, oracle, reference.allowed_error(chain, oracle, chain.dtype), tile)

    def within(self, what: str, got: Tensor, oracle: Tensor, allowed: float, tile: tuple[int, int] = (64, 128)) -> None:
        error = reference.relative_error(got, oracle)
        if error <= allowed:
            return self._count(error / allowed)
        off = (got.double() - oracle.double()).abs().nan_to_num(nan=math.inf)
        usual = 8 * allowed * oracle.double().pow(2).mean().sqrt()
        at = _first(off > usual) or _first(off == off.max())
        text = f"{what}: relative error {error:.2e}, allowed {allowed:.2e}; at {list(at)}: got {got[at].item():.5g}, "
        self._fail(text + f"must be {oracle[at].item():.5g}", got[None].float(), oracle[None].float(), at, tile)

    def _count(self, share: float) -> None:
        self.state["checks"] += 1
        self.state["worst"] = max(self.state["worst"], share)

    def _fail(self, text: str, got: Tensor, expected: Tensor, at: tuple[int, ...], tile: tuple[int, int]) -> None:
        """Note it, and keep y about the first mismatch and the error of every tile."""
        self.state["checks"] += 1
        self.state["failed"].append(text)
        if len(self.state["saved"]) < KEPT:
            path = self.stem.with_name(f"{self.stem.name}-{len(self.state['saved'])}.npz")
            row = int(np.ravel_multi_index(at[:-1], expected.shape[1:-1]))
            got, expected = got.flatten(1, -2), expected.flatten(1, -2)
            rows = min(got.shape[1], 256)
            columns = min(got.shape[2], max(1, SAVED // (8 * len(got) * rows)))
            top, left = row // rows * rows, at[-1] // columns * columns
            part = (slice(None), slice(top, top + rows), slice(left, left + columns))
            arrays = {"got": got[part], "expected": expected[part], "errors": errors(got, expected, tile)}
            np.savez_compressed(
                path,
                **{name: t.float().cpu().numpy() for name, t in arrays.items()},
                **{"first": at, "corner": (top, left), "tile": tile, "text": text},
            )
            self.state["saved"].append(path.name)
        self.note(self.state)


def _first(bad: Tensor) -> tuple[int, ...] | None:
    places = bad.nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def errors(got: Tensor, expected: Tensor, tile: tuple[int, int]) -> Tensor:
    """The relative error of each tile of (n, rows, columns), over all n; infinite where there is a NaN."""
    rows, columns = got.shape[1:]

    def sums(t: Tensor) -> Tensor:
        """Of squares, over each tile."""
        t = F.pad(t.double().pow(2).sum(0), (0, -columns % tile[1], 0, -rows % tile[0]))
        return t.unflatten(0, (-1, tile[0])).unflatten(2, (-1, tile[1])).sum((1, 3))

    found = (sums(got.double() - expected.double()) / sums(expected).clamp(min=1e-300)).sqrt()
    return found.nan_to_num(nan=math.inf)


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """All that the backends allocate has every bit set, which is NaN in each dtype, long before it is used."""
    words = POOL if device.type == "cuda" else 1 << 16
    left = [torch.full((words,), -1, dtype=torch.int32, device=device)]
    before = cuda.empty, triton.empty

    def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numbers = math.prod(shape)
        size = -(-numbers * dtype.itemsize // 256) * 64
        if size > len(left[0]):
            left[0] = torch.full((max(size, words),), -1, dtype=torch.int32, device=device)
        taken, left[0] = left[0].split([size, len(left[0]) - size])
        return taken.view(dtype)[:numbers].view(shape)

    cuda.empty = triton.empty = empty
    try:
        yield
    finally:
        cuda.empty, triton.empty = before


def laid(t: Tensor, transposed: bool = False) -> Tensor:
    """A copy whose rows (or columns) lie side by side as the core wants them, with NaN between them."""
    if transposed:
        return laid(t.t()).t()
    storage = t.new_full((t.shape[0], aligned(t.shape[1])), math.nan)
    return storage[:, : t.shape[1]].copy_(t)


def hot(T: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (T, K) with a single 1 in each row, and its column; rows near each other have columns far apart."""
    t = torch.arange(T, device=device)
    k = (37 * t + t // K) % K
    return laid(F.one_hot(k, K).to(dtype)), k


# The GEMM with a tail: y = x W^T + u B^T (+ more).


def _tail(x: Tensor, W: Tensor | None, u: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula."""
    y = F.linear(u, B) if W is None else F.linear(x, W) + F.linear(u, B)
    return y if bias is None else y + bias


def tail(bench: Bench, tile: int, shapes: str, dtype: torch.dtype = torch.bfloat16, transposed: bool = False) -> None:
    """Coded B without W and beside a W of zeros, coded W, then random operands with and without W."""
    size = TILES[tile][:2]
    for T, N, K, r in SHAPES[shapes]:
        where = f"T {T} N {N} K {K} r {r} {str(dtype)[6:]}"
        x, k = hot(T, K, dtype, bench.device)
        u, i = hot(T, r, dtype, bench.device)

        def call(x: Tensor, W: Tensor | None, u: Tensor, B: Tensor) -> Tensor:
            W = None if W is None else laid(W, transposed)
            return bench.cuda.gemm_tail(x, W, u, laid(B, transposed), None, tile, False)

        B, W = (Coded(name, N, width, dtype=dtype, device=bench.device) for name, width in (("B", r), ("W", K)))
        no_B, no_W = torch.zeros_like(B.passes[0]), torch.zeros_like(W.passes[0])
        bench.doing(f"coded B without W, {where}")
        y = torch.stack([call(x, None, u, each) for each in B.passes])
        bench.exact(f"y = u B^T, {where}", y, B.passes[:, :, i].mT, B, size)
        if shapes != "alone":
            bench.doing(f"coded W, {where}")
            y = torch.stack([call(x, each, u, no_B) for each in W.passes])
            bench.exact(f"y = x W^T, {where}", y, W.passes[:, :, k].mT, W, size)
            bench.doing(f"coded B beside W = 0, {where}")
            y = torch.stack([call(x, no_W, u, each) for each in B.passes])
            bench.exact(f"y = u B^T beside W = 0, {where}", y, B.passes[:, :, i].mT, B, size)
        x, u = (laid(bench.random(T, width, dtype=dtype)) for width in (K, r))
        W, B = (bench.random(N, width, dtype=dtype, over=width**0.5) for width in (K, r))
        for weight in (None,) if shapes == "alone" else (None, W):
            what = f"random, {'without' if weight is None else 'with'} W, {where}"
            bench.doing(what)
            bench.rule(f"y, {what}", call(x, weight, u, B), _tail, (x, weight, u, B), size)


def tail_bias(bench: Bench, tile: int) -> None:
    """A coded bias, where all else is zero; then random operands."""
    dtype, size, device = torch.bfloat16, TILES[tile][:2], bench.device
    for T, N, K, r in SHAPES["tail"] + SHAPES["ragged"][:2]:
        where = f"T {T} N {N} K {K} r {r}"
        x, u, B = (laid(torch.zeros(shape, dtype=dtype, device=device)) for shape in ((T, K), (T, r), (N, r)))
        bench.doing(f"coded bias, {where}")
        bias = Coded("bias", N, 1, dtype=dtype, device=device)
        y = torch.stack(
            [bench.cuda.gemm_tail(x, None, u, B, each[:, 0].contiguous(), tile, False) for each in bias.passes]
        )
        bench.exact(f"y = bias, {where}", y, bias.passes.mT.expand(-1, T, -1), bias, size)
        x, u = (laid(bench.random(T, width, dtype=dtype)) for width in (K, r))
        W, B = (laid(bench.random(N, width, dtype=dtype, over=width**0.5)) for width in (K, r))
        bias = bench.random(N, dtype=dtype)
        bench.doing(f"random, with a bias, {where}")
        y = bench.cuda.gemm_tail(x, W, u, B, bias, tile, False)
        bench.rule(f"y, random, with a bias, {where}", y, _tail, (x, W, u, B, bias), size)


def _lowrank(x: Tensor, W: Tensor | None, A: Tensor, R: Tensor, B: Tensor) -> Tensor:
    return reference.lowrank_linear(x, W, A, R.to(x.dtype), B, 0.75)[0]


def _operands(bench: Bench, T: int, N: int, K: int, r: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random x, W, A, R, B, y of order 1."""
    x, A = laid(bench.random(T, K, dtype=dtype)), laid(bench.random(r, K, dtype=dtype, over=K**0.5))
    W, B = (laid(bench.random(N, width, dtype=dtype, over=width**0.5)) for width in (K, r))
    return x, W, A, bench.random(r, r, dtype=torch.float32, over=r**0.5), B


def _two_launches(
    bench: Bench, operands: tuple[Tensor | None, ...], split: int, tile: int, overlap: bool, programs: int = 0
) -> Tensor:
    """y as the cuda backend makes it of many rows: shrink, then the GEMM with a tail, or beside it, where they overlap
    and `programs` make u.
    """
    x, W, A, R, B = operands
    beside = overlap and programs > 0
    ready = cuda.empty(x, (-(-len(x) // UNIT),), torch.int32) if beside else None
    u = bench.cuda.shrink(x, A, R, 0.75, None, split, overlap, programs, ready)[1]
    multiprocessors = facts(x.device).multiprocessors - programs * beside
    return bench.cuda.gemm_tail(x, W, u, B, None, tile, overlap, 2, 2, multiprocessors, ready)


def tail_overlap(bench: Bench, tile: int) -> None:
    """Two problems in a row whose launches overlap: the bits of those that do not overlap.

    Without W the GEMM is at u at once, long before a shrink of so many columns is: if it does not wait it finds NaN.
    """
    for shape in SHAPES["overlap"]:
        problems = [_operands(bench, *shape, torch.bfloat16) for _ in range(2)]
        for W in (False, True):
            given = problems if W else [(x, None, *rest) for x, _, *rest in problems]
            for split, programs in ((1, 0), (4, 0), (1, 4)):
                how = f"{programs} programs" if programs else f"split {split}"
                what, found = f"{how}, {'with' if W else 'without'} W, {shape}", []
                for overlap in (False, True):
                    bench.doing(f"{'' if overlap else 'no '}overlap, {what}")
                    made = [_two_launches(bench, each, split, tile, overlap, programs) for each in given]
                    found.append(torch.stack(made))
                for y, each in zip(found[0], given, strict=True):
                    bench.rule(f"y without overlap, {what}", y, _lowrank, each, TILES[tile][:2])
                bench.exact(f"bits of y with overlap, {what}", found[1], found[0], None, TILES[tile][:2])


def tail_graph(bench: Bench, tile: int) -> None:
    """In a CUDA graph, replayed on another x: the bits of a plain call."""
    for shape in SHAPES["graph"]:
        operands = _operands(bench, *shape, torch.bfloat16)
        call = partial(_two_launches, bench, operands, 3, tile, True)
        bench.doing("a plain call")
        y, replay = call(), call
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
            bench.doing("capture")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = call()
            replay = graph.replay
        operands[0].copy_(operands[0].flip(0))
        bench.doing("replay")
        made = replay()
        bench.exact("bits of y of a replay", (y if made is None else made)[None], call()[None], None, TILES[tile][:2])


# The chain x -> A -> R -> B: z = x A^T, u = s z R^T, y = u B^T (+ bias) (+ out), gram = s z^T other.

Chain = Callable[..., tuple[Tensor, Tensor, Tensor | None]]  # (x, A, R, B, s, bias, out, index, other) -> y, z, gram


def chain(
    bench: Bench,
    call: Chain,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    transposed: bool = False,
    slots: int = 0,
    narrow: bool = False,
    gram: bool = False,
    more: bool = False,
) -> None:
    """Coded A (seen in z), R and B (in y) and `other` (in the gram), then random operands.

    slots: each token has one of so many R, or none.  narrow: y is u, as if B were the identity.  gram: whether it is
    made.  more: also with a bias, and added to an output.
    """
    (T, N, K, r), device = shape, bench.device
    N = r if narrow else N
    where = f"T {T} N {N} K {K} r {r} {str(dtype)[6:]}{', transposed' if transposed else ''}"
    where += f", {slots} adapters" if slots else ""
    named = "u" if narrow else "y"
    index, live = None, 1
    if slots:
        index = ((5 * torch.arange(T, device=device)) % (slots + 1) - 1).int()
        live = (index >= 0)[:, None]
    slot = () if index is None else (index.clamp(min=0).long()[:, None],)

    def run(
        x: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float = 1.0, bias: Tensor | None = None,
        out: Tensor | None = None, other: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        R = R.mT.contiguous().mT if transposed else R
        return call(x, laid(A, transposed), R, laid(B, transposed), s, bias, out, index, other)

    x, k = hot(T, K, dtype, device)
    i, n = (k % r)[:, None], (torch.arange(N, device=device) % r)[None, :]
    eye = torch.eye(r, device=device).expand(*((slots,) if slots else ()), r, r).contiguous()
    one_A = F.one_hot(torch.arange(K, device=device) % r, r).t().to(dtype)  # z[t] has its 1 at i[t]
    one_B = F.one_hot(n[0], r).to(dtype)  # y[t, n] = u[t, n % r]

    bench.doing(f"coded A, {where}")
    A = Coded("A", r, K, dtype=dtype, device=device)
    z = torch.stack([run(x, each, eye, one_B)[1] for each in A.passes])
    bench.exact(f"z, {where}", z, A.passes[:, :, k].mT, A)
    bench.doing(f"coded R, {where}")
    R = Coded("R", *eye.shape, dtype=torch.float32, device=device)
    y = torch.stack([run(x, one_A, each, one_B)[0] for each in R.passes])
    bench.exact(f"{named} of R, {where}", y, R.passes[(slice(None), *slot, n, i)] * live, R)
    if not narrow:
        bench.doing(f"coded B, {where}")
        B = Coded("B", N, r, dtype=dtype, device=device)
        y = torch.stack([run(x, one_A, eye, each)[0] for each in B.passes])
        bench.exact(f"y of B, {where}", y, B.passes[:, :, i[:, 0]].mT * live, B)
    if gram:
        bench.doing(f"coded gram, {where}")
        other = Coded("other", T, r, dtype=torch.float32, device=device)
        got = torch.stack([run(x, one_A, eye, one_B, other=each)[2] for each in other.passes])
        rows = 64 if got.dim() == 4 else T  # parts, one for each 64 rows, or their sum
        z = F.one_hot(i[:, 0], r).double()
        parts = [a.mT @ b for a, b in zip(z.split(rows), other.passes.double().split(rows, 1), strict=True)]
        bench.exact(f"gram, {where}", got, torch.stack(parts, 1) if got.dim() == 4 else parts[0], other)

    x, A = laid(bench.random(T, K, dtype=dtype)), bench.random(r, K, dtype=dtype, over=K**0.5)
    R = bench.random(*eye.shape, dtype=torch.float32, over=r**0.5)
    B = eye.view(-1, r, r)[0].to(dtype) if narrow else bench.random(N, r, dtype=dtype, over=r**0.5)
    bias, out = bench.random(N, dtype=dtype), bench.random(T, N, dtype=dtype)
    other = bench.random(T, r, dtype=torch.float32) if gram else None

    def formula(x: Tensor, A: Tensor, R: Tensor, B: Tensor, more: Tensor | None) -> Tensor:
        z, R = x @ A.T, R.to(x.dtype)
        u = z @ R.T if index is None else torch.einsum("tij,tj->ti", R[slot[0][:, 0]], z) * live
        return 0.75 * u @ B.T + (0 if more is None else more)

    ways = [("", None), (", with a bias", bias), (", added to an output", out)][: 3 if more else 1]
    for name, extra in ways:
        bench.doing(f"random{name}, {where}")
        given = {} if extra is None else {"bias": bias} if extra is bias else {"out": out.clone()}
        y, z, made = run(x, A, R, B, 0.75, other=None if extra is out else other, **given)
        bench.rule(f"{named}, random{name}, {where}", y, formula, (x, A, R, B, extra))
        exact = x.double() @ A.double().T
        bench.within(f"z, random{name}, {where}", z, exact, 1e-5)
        if made is not None:
            made = made.sum(0) if made.dim() == 3 else made

            def of(x: Tensor, A: Tensor, other: Tensor) -> Tensor:
                return 0.75 * (x @ A.T).T @ other.to(x.dtype)

            bench.rule(f"gram, random{name}, {where}", made, of, (x, A, other))


def decode(bench: Bench, cluster: int) -> None:
    """One launch for few rows, with one R for all and with one for each token."""

    def call(x, A, R, B, s, bias, out, index, other) -> tuple:
        return *bench.cuda._decode(Decode(cluster, CLUSTERS), x, A, R, B, s, bias, out, index), None

    for shape in SHAPES["decode"]:
        for slots in (0, 7):
            chain(bench, call, shape, slots=slots, more=True)
    chain(bench, call, SHAPES["decode"][1], dtype=torch.float16, transposed=True, slots=7)


def shrink(
    bench: Bench,
    split: int = 1,
    transposed: bool = False,
    gram: bool = False,
    overlap: bool = False,
    programs: int = 0,
) -> None:
    """z, u and the gram of many rows, in one launch (split 1) or two, or by programs that take the rows in turn."""

    def call(x, A, R, B, s, bias, out, index, other) -> tuple:
        z, u, gram = bench.cuda.shrink(x, A, R, s, other, split, overlap, programs)
        return u, z, gram

    for shape in SHAPES["shrink"]:
        chain(bench, call, shape, narrow=True, transposed=transposed, gram=gram)
    chain(bench, call, SHAPES["shrink"][1], dtype=torch.float16, narrow=True, transposed=transposed, gram=gram)


def triton_chain(bench: Bench, splits: int, transposed: bool) -> None:
    """The chain in one launch (splits 1) or two, with the forward's operands or, transposed, the backward's."""
    for T, N, K, r in SHAPES["triton"]:
        layout = "backward" if transposed else "forward"
        tiles = pick_config(T, N, K, r, torch.bfloat16, layout, facts(bench.device))
        config = dataclasses.replace(tiles, split_k=splits, split_n=splits)

        def call(x, A, R, B, s, bias, out, index, other) -> tuple:
            return bench.triton.low_rank(config, x, A, R, B, s, bias, out, other)  # noqa: B023

        chain(bench, call, (T, N, K, r), transposed=transposed, gram=True, more=True)


# What is no kernel of ours.


def svd(bench: Bench) -> str:
    """truncated_svd of a weight with a decaying spectrum, against the eigenvalues of W W^T in fp64."""
    for _, m, n, rank in SHAPES["svd"]:
        scales = torch.arange(1, m + 1, dtype=torch.float32)[:, None] ** -0.6
        W = (bench.random(m, n, dtype=torch.float32, over=n**0.5) * scales.to(bench.device)).bfloat16()
        bench.doing("the SVD")
        U, S, Vh = (t.double().cpu() for t in truncated_svd(W, rank))
        bench.doing("the check")
        exact = W.double().cpu()
        sigma = torch.linalg.eigvalsh(exact @ exact.T).flip(0).clamp(min=0).sqrt()
        eye = torch.eye(rank, dtype=torch.float64)
        bench.within("U^T U", U.T @ U, eye, 1e-5)
        bench.within("Vh Vh^T", Vh @ Vh.T, eye, 1e-5)
        bench.within("S", S[None], sigma[None, :rank], 1e-4)
        best, got = sigma[rank:].norm(), (exact - (U * S) @ Vh).norm()
        bench.within("error of U S Vh", got.view(1, 1), best.view(1, 1), 1e-4)
    return f"error of the reconstruction over the best {(got / best - 1).item():.1e}"


def smi() -> dict[str, str]:
    """What the NVIDIA driver's own tool says of clocks, power and modes; nothing where it is not there."""
    fields = "driver_version,vbios_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit"
    fields += ",temperature.gpu,persistence_mode,compute_mode,ecc.mode.current,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return dict(zip(fields.split(","), map(str.strip, line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def ceilings(bench: Bench, size: int = 8192) -> str:
    """How fast this GPU copies and multiplies, and its clocks before and after."""
    before = {"smi": smi(), **timer.gauges(bench.device)}
    bench.state["facts"] = {"before": before}
    bench.doing(f"a large copy, and products of {size}^3")
    found = timer.ceilings(bench.device, size if bench.device.type == "cuda" else 256)
    after = {**timer.gauges(bench.device), "smi": smi()}
    bench.state["facts"] |= {"after": after, "ceilings": dataclasses.asdict(found)}
    clocks = " to ".join(str(each.get("MHz", each["smi"].get("clocks.sm", "?"))) for each in (before, after))
    rate = f"copy {found.bandwidth / 1e12:.2f} TB/s, bf16 {found.half / 1e12:.0f} TFLOP/s"
    return f"{rate}, fp32 {found.single / 1e12:.0f}, SM clock {clocks} MHz"


def _tails() -> dict[str, Rung]:
    """Of each tile, by its rows and columns."""
    found: dict[str, Callable[..., str | None]] = {
        "alone": partial(tail, shapes="alone"),
        "with-W": partial(tail, shapes="tail"),
        "fp16": partial(tail, shapes="tail", dtype=torch.float16),
        "transposed": partial(tail, shapes="tail", transposed=True),
        "ragged": partial(tail, shapes="ragged"),
        "ragged-transposed": partial(tail, shapes="ragged", transposed=True),
        "bias": tail_bias,
        "waves": partial(tail, shapes="waves"),
        "overlap": tail_overlap,
        "graph": tail_graph,
    }
    return {
        f"tail-{name}-{rows}x{columns}": Rung(partial(run, tile=tile), "hopper")
        for name, run in found.items()
        for tile, (rows, columns, *_) in TILES.items()
    }


# From the smallest.
RUNGS: dict[str, Rung] = {
    "ceilings": Rung(ceilings, alone=True),
    "decode-1": Rung(partial(decode, cluster=1), "core"),
    "decode-8": Rung(partial(decode, cluster=8), "hopper"),
    "shrink": Rung(shrink, "core"),
    "shrink-transposed": Rung(partial(shrink, transposed=True), "core"),
    "shrink-split": Rung(partial(shrink, split=4), "core"),
    "shrink-split-overlap": Rung(partial(shrink, split=4, transposed=True, overlap=True), "hopper"),
    "shrink-gram": Rung(partial(shrink, gram=True), "core"),
    "shrink-gram-split": Rung(partial(shrink, split=4, gram=True), "core"),
    "shrink-tma": Rung(partial(shrink, programs=2), "hopper"),
    "shrink-tma-gram": Rung(partial(shrink, programs=2, transposed=True, gram=True), "hopper"),
    **_tails(),
    "triton-forward-1": Rung(partial(triton_chain, splits=1, transposed=False), "triton"),
    "triton-forward-2": Rung(partial(triton_chain, splits=4, transposed=False), "triton"),
    "triton-backward-1": Rung(partial(triton_chain, splits=1, transposed=True), "triton"),
    "triton-backward-2": Rung(partial(triton_chain, splits=4, transposed=True), "triton"),
    "svd": Rung(svd),
}
