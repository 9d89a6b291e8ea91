"""Operands of every awkward kind, and the accuracy rule as an assertion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraxs_kernels import reference

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


def gradients(o: Operands, call, bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """y, gX, gR of `call(x, W, A, R, B, s, bias)` on these operands."""
    x, R = o.x.detach().requires_grad_(), o.R.detach().requires_grad_()
    y = call(x, o.W, o.A, R, o.B, o.s, o.bias if bias else None)
    gX, gR = torch.autograd.grad(y, (x, R), o.gY)
    return y.detach(), gX, gR


def unfused(x, W, A, R, B, s, bias=None):
    """The chain of separate torch ops, differentiated by autograd, in the dtype of x."""
    return reference.lowrank_linear(x, W, A, R.to(x.dtype), B, s, bias)[0]


def assert_accurate(got: Tensor, chain: Tensor, oracle: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """The accuracy rule of loraxs_kernels/reference.py."""
    assert got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}, must be {tuple(oracle.shape)}"
    error, allowed = reference.relative_error(got, oracle), reference.allowed_error(chain, oracle, dtype)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
