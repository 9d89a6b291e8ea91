"""The rungs of tests/test_first_light.py: each runs a kernel on a small problem and yields what it finds, "" if right.

Coded inputs: x has one 1 in each row, and another operand holds integers that name their own place (`Coded`), so that
y[t, n] is one element of it, exactly, in bf16 too.  A wrong y then names the element that was read instead.  Random
inputs follow, checked by the accuracy rule of loraxs_kernels/reference.py; R, u and B are of order 1 there and W is
left out as well, because the rule cannot see a missing low-rank part that is small beside x W^T.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from loraxs_kernels import reference
from loraxs_kernels.backends import cuda, triton
from loraxs_kernels.backends.cuda.config import TILES, Decode, aligned
from loraxs_kernels.backends.device import facts
from loraxs_kernels.backends.triton.config import pick_config

BASE = 251  # codes are 1 to 251, integers that bf16 holds exactly; 0 is what nobody added
TILE = 64, 128  # of a result whose kernel has several sizes
SHOWN = 4  # wrong tiles that are named

Shape = tuple[int, int, int, int]  # T, N, K, r


class Coded:
    """A matrix that names its places: element (n, k) of four passes is 1 + one of n % 251, n // 251, k % 251, k // 251.

    Of three dimensions, the first two are counted as one.
    """

    def __init__(self, name: str, *shape: int, dtype: torch.dtype, device: str) -> None:
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


def exact(what: str, got: Tensor, expected: Tensor, holds: Coded, tile: tuple[int, int] = TILE) -> str:
    """Passes (4, ..., columns) must be the same, number by number.  what: "y ...", holds: whose codes they are."""
    got, expected = got.float(), expected.float()
    bad = (got != expected).any(0)
    if not bad.any():
        return ""
    at = tuple(bad.nonzero()[0].tolist())
    found, wanted = (t[(slice(None), *at)].tolist() for t in (got, expected))
    meant = f"it is {holds.meaning(found, wanted)}, must be {holds.element(wanted) or 'nothing'}"
    return f"{what} at {list(at)}: {meant} (got {found}, must be {wanted}){_tiles(bad, tile)}"


def rule(what: str, got: Tensor, formula: Callable[..., Tensor], operands: tuple, tile: tuple[int, int] = TILE) -> str:
    """The accuracy rule: at most twice the error of the formula on these operands, against that in fp64."""
    chain, oracle = formula(*operands), formula(*(t if t is None else t.double() for t in operands))
    return within(what, got, oracle, reference.allowed_error(chain, oracle, chain.dtype), tile)


def within(what: str, got: Tensor, oracle: Tensor, allowed: float, tile: tuple[int, int] = TILE) -> str:
    error = reference.relative_error(got, oracle)
    if error <= allowed:
        return ""
    off = (got.double() - oracle.double()).abs().nan_to_num(nan=math.inf)
    bad = off > 8 * allowed * oracle.double().pow(2).mean().sqrt()
    bad = bad if bad.any() else off == off.max()
    at = tuple(bad.nonzero()[0].tolist())
    text = f"{what}: relative error {error:.2e}, allowed {allowed:.2e}; at {list(at)}: got {got[at].item():.5g}, "
    return f"{text}must be {oracle[at].item():.5g}{_tiles(bad, tile)}"


def _tiles(bad: Tensor, tile: tuple[int, int]) -> str:
    """Where the wrong elements of (..., columns) are."""
    bad = bad.flatten(0, -2)
    wrong = (bad.nonzero() // torch.tensor(tile, device=bad.device)).unique(dim=0).tolist()
    of = math.prod(-(-size // each) for size, each in zip(bad.shape, tile, strict=True))
    named = ", ".join(map(str, wrong[:SHOWN])) + ", ..." * (len(wrong) > SHOWN)
    return f"; {bad.sum()} wrong, in {len(wrong)} of {of} tiles of {tile[0]} x {tile[1]}: {named}"


def laid(t: Tensor, transposed: bool = False) -> Tensor:
    """A copy whose rows (or columns) lie side by side as the core wants them, with NaN between them."""
    if transposed:
        return laid(t.t()).t()
    storage = t.new_full((t.shape[0], aligned(t.shape[1])), math.nan)
    return storage[:, : t.shape[1]].copy_(t)


def hot(T: int, K: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x (T, K) with a single 1 in each row, and its column; rows near each other have columns far apart."""
    t = torch.arange(T, device=device)
    k = (37 * t + t // K) % K
    return laid(F.one_hot(k, K).to(dtype)), k


def random(*shape: int, dtype: torch.dtype, device: str, over: float = 1.0) -> Tensor:
    return (torch.randn(*shape) / over).to(device, dtype)


# The GEMM with a tail: y = x W^T + u B^T (+ bias).


def _tail(x: Tensor, W: Tensor | None, u: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula."""
    y = F.linear(u, B) if W is None else F.linear(x, W) + F.linear(u, B)
    return y if bias is None else y + bias


def tail(device: str, shape: Shape, tile: int, dtype=torch.bfloat16, transposed=False) -> Iterator[str]:
    """Coded B without W and beside a W of zeros, coded W, then random operands with and without W."""
    (T, N, K, r), size, of = shape, TILES[tile][:2], {"dtype": dtype, "device": device}
    (x, k), (u, i) = hot(T, K, **of), hot(T, r, **of)

    def call(x: Tensor, W: Tensor | None, u: Tensor, B: Tensor) -> Tensor:
        W = None if W is None else laid(W, transposed)
        return cuda.gemm_tail(x, W, u, laid(B, transposed), None, tile, False)

    B, W = Coded("B", N, r, **of), Coded("W", N, K, **of)
    no_B, no_W = torch.zeros_like(B.passes[0]), torch.zeros_like(W.passes[0])
    y = torch.stack([call(x, None, u, each) for each in B.passes])
    yield exact("y = u B^T", y, B.passes[:, :, i].mT, B, size)
    y = torch.stack([call(x, each, u, no_B) for each in W.passes])
    yield exact("y = x W^T", y, W.passes[:, :, k].mT, W, size)
    y = torch.stack([call(x, no_W, u, each) for each in B.passes])
    yield exact("y = u B^T beside W = 0", y, B.passes[:, :, i].mT, B, size)
    x, u = (laid(random(T, width, **of)) for width in (K, r))
    W, B = (random(N, width, over=width**0.5, **of) for width in (K, r))
    yield rule("y, random, without W", call(x, None, u, B), _tail, (x, None, u, B), size)
    yield rule("y, random, with W", call(x, W, u, B), _tail, (x, W, u, B), size)


def tail_bias(device: str, shape: Shape, tile: int) -> Iterator[str]:
    """A coded bias, where all else is zero; then random operands."""
    (T, N, K, r), size, of = shape, TILES[tile][:2], {"dtype": torch.bfloat16, "device": device}
    x, u, B = (laid(torch.zeros(each, **of)) for each in ((T, K), (T, r), (N, r)))
    bias = Coded("bias", N, 1, **of)
    y = [cuda.gemm_tail(x, None, u, B, each[:, 0].contiguous(), tile, False) for each in bias.passes]
    yield exact("y = bias", torch.stack(y), bias.passes.mT.expand(-1, T, -1), bias, size)
    x, u = (laid(random(T, width, **of)) for width in (K, r))
    W, B = (laid(random(N, width, over=width**0.5, **of)) for width in (K, r))
    bias = random(N, **of)
    y = cuda.gemm_tail(x, W, u, B, bias, tile, False)
    yield rule("y, random, with a bias", y, _tail, (x, W, u, B, bias), size)


# The chain x -> A -> R -> B: z = x A^T, u = s z R^T, y = u B^T (+ bias) (+ out), gram = s z^T other.

Call = Callable[..., tuple[Tensor, Tensor, Tensor | None]]  # (x, A, R, B, s, bias, out, index, other) -> y, z, gram


def chain(
    device: str, call: Call, shape: Shape, *,
    dtype=torch.bfloat16, transposed=False, slots=0, narrow=False, gram=False, more=False,
) -> Iterator[str]:  # fmt: skip
    """Coded A (seen in z), R and B (in y) and `other` (in the gram), then random operands.

    slots: each token has one of so many R, or none.  narrow: y is u, as if B were the identity.  gram: whether it is
    made.  more: also with a bias, and added to an output.
    """
    T, N, K, r = shape
    N, of, single = r if narrow else N, {"dtype": dtype, "device": device}, {"dtype": torch.float32, "device": device}
    named = "u" if narrow else "y"
    index, live, slot = None, 1, ()
    if slots:
        index = ((5 * torch.arange(T, device=device)) % (slots + 1) - 1).int()
        live, slot = (index >= 0)[:, None], (index.clamp(min=0).long()[:, None],)

    def run(x, A, R, B, s=1.0, bias=None, out=None, other=None) -> tuple[Tensor, Tensor, Tensor | None]:
        R = R.mT.contiguous().mT if transposed else R
        return call(x, laid(A, transposed), R, laid(B, transposed), s, bias, out, index, other)

    x, k = hot(T, K, **of)
    i, n = (k % r)[:, None], (torch.arange(N, device=device) % r)[None, :]
    eye = torch.eye(r, device=device).expand(*((slots,) if slots else ()), r, r).contiguous()
    one_A = F.one_hot(torch.arange(K, device=device) % r, r).t().to(dtype)  # z[t] has its 1 at i[t]
    one_B = F.one_hot(n[0], r).to(dtype)  # y[t, n] = u[t, n % r]

    A = Coded("A", r, K, **of)
    z = torch.stack([run(x, each, eye, one_B)[1] for each in A.passes])
    yield exact("z", z, A.passes[:, :, k].mT, A)
    R = Coded("R", *eye.shape, **single)
    y = torch.stack([run(x, one_A, each, one_B)[0] for each in R.passes])
    yield exact(f"{named} of R", y, R.passes[(slice(None), *slot, n, i)] * live, R)
    if not narrow:
        B = Coded("B", N, r, **of)
        y = torch.stack([run(x, one_A, eye, each)[0] for each in B.passes])
        yield exact("y of B", y, B.passes[:, :, i[:, 0]].mT * live, B)
    if gram:
        other = Coded("other", T, r, **single)
        got = torch.stack([run(x, one_A, eye, one_B, other=each)[2] for each in other.passes])
        rows = 64 if got.dim() == 4 else T  # parts, one for each 64 rows, or their sum
        z = F.one_hot(i[:, 0], r).double()
        parts = [a.mT @ b for a, b in zip(z.split(rows), other.passes.double().split(rows, 1), strict=True)]
        yield exact("gram", got, torch.stack(parts, 1) if got.dim() == 4 else parts[0], other)

    x, A = laid(random(T, K, **of)), random(r, K, over=K**0.5, **of)
    R = random(*eye.shape, over=r**0.5, **single)
    B = eye.view(-1, r, r)[0].to(dtype) if narrow else random(N, r, over=r**0.5, **of)
    bias, out = random(N, **of), random(T, N, **of)
    other = random(T, r, **single) if gram else None

    def formula(x: Tensor, A: Tensor, R: Tensor, B: Tensor, more: Tensor | None) -> Tensor:
        z, R = x @ A.T, R.to(x.dtype)
        u = z @ R.T if index is None else torch.einsum("tij,tj->ti", R[slot[0][:, 0]], z) * live
        return 0.75 * u @ B.T + (0 if more is None else more)

    def product(x: Tensor, A: Tensor, other: Tensor) -> Tensor:
        return 0.75 * (x @ A.T).T @ other.to(x.dtype)

    ways = [("random", None), ("random, with a bias", bias), ("random, added to an output", out)][: 3 if more else 1]
    for way, extra in ways:
        given = {} if extra is None else {"bias": bias} if extra is bias else {"out": out.clone()}
        y, z, made = run(x, A, R, B, 0.75, other=None if extra is out else other, **given)
        yield rule(f"{named}, {way}", y, formula, (x, A, R, B, extra))
        yield within(f"z, {way}", z, x.double() @ A.double().T, 1e-5)
        if made is not None:
            yield rule(f"gram, {way}", made.sum(0) if made.dim() == 3 else made, product, (x, A, other))


def decode(device: str, shape: Shape, plan: Decode, slots=0, **how) -> Iterator[str]:
    """One launch for few rows, with one R for all and with one for each token."""

    def call(x, A, R, B, s, bias, out, index, other) -> tuple:
        return *cuda._decode(plan, x, A, R, B, s, bias, out, index), None

    return chain(device, call, shape, slots=slots, more=True, **how)


def shrink(device: str, shape: Shape, split=1, overlap=False, programs=0, **how) -> Iterator[str]:
    """z, u and the gram of many rows, in one launch (split 1) or two, or by programs that take the rows in turn."""

    def call(x, A, R, B, s, bias, out, index, other) -> tuple:
        z, u, gram = cuda.shrink(x, A, R, s, other, split, overlap, programs)
        return u, z, gram

    return chain(device, call, shape, narrow=True, **how)


def triton_chain(device: str, shape: Shape, splits: int, transposed: bool) -> Iterator[str]:
    """The chain in one launch (splits 1) or two, with the forward's operands or, transposed, the backward's."""
    layout = "backward" if transposed else "forward"
    tiles = pick_config(*shape, torch.bfloat16, layout, facts(torch.device(device)))
    config = dataclasses.replace(tiles, split_k=splits, split_n=splits)

    def call(x, A, R, B, s, bias, out, index, other) -> tuple:
        return triton.low_rank(config, x, A, R, B, s, bias, out, other)

    return chain(device, call, shape, transposed=transposed, gram=True, more=True)
