"""truncated_svd on hard spectra in every dtype, against the full SVD in fp64 and beside scikit-learn's TruncatedSVD."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import assert_svd_no_worse_than_scikit_learn
from torch import Tensor

METHODS = ["krylov", "subspace"]
RANKS = (32, 64)


def noise(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@functools.cache
def orthonormal(m: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(m, k, seed)).Q


def with_spectrum(m: int, n: int, spectrum: Tensor) -> Tensor:
    """An (m, n) matrix with these singular values and random vectors."""
    k = min(m, n)
    return (orthonormal(m, k, 1) * spectrum[:k]) @ orthonormal(n, k, 2).T


i = torch.arange(1, 1001, dtype=torch.float64)
POWER = i**-0.6
# The matrix in fp64, before it is rounded to a dtype, as a function of torch.finfo of the dtype, and the ranks.
SPECTRA = {
    "a spike over a power law": (lambda _: with_spectrum(900, 1000, torch.where(i == 1, 1e3, POWER)), (100,)),
    "i^-2": (lambda _: with_spectrum(900, 1000, i**-2), (100,)),
    "10^(-i/4)": (lambda _: with_spectrum(420, 490, 10 ** (-i / 4)), RANKS),
    "graded to 1e-12": (lambda _: with_spectrum(420, 490, 10 ** (-12 * i / 420)), RANKS),
    "graded to 1e-12 within the rank": (lambda _: with_spectrum(420, 490, 10 ** (-12 * i / 58)), RANKS),
    "power law, tall": (lambda _: with_spectrum(490, 420, POWER), RANKS),
    "flat": (lambda _: with_spectrum(420, 490, torch.ones_like(i)), RANKS),
    "gaps of 1e-4": (lambda _: with_spectrum(420, 490, 1 - 1e-4 * i), RANKS),
    "clusters": (lambda _: with_spectrum(420, 490, 2 ** -(i // 12) * (1 - 1e-6 * (i % 12))), RANKS),
    "repeated, tall": (lambda _: with_spectrum(490, 420, 2 ** -(i // 16)), RANKS),
    "spikes over a floor": (lambda _: with_spectrum(420, 490, torch.where(i <= 20, 1e4 / i, i**-0.1)), RANKS),
    "a cliff at 64": (lambda _: with_spectrum(420, 490, torch.where(i <= 64, 1 / i, 1e-6 * POWER)), RANKS),
    "a cliff past 120": (lambda _: with_spectrum(420, 490, torch.where(i <= 120, 1, 1e-6 * POWER)), RANKS),
    "a cliff at 20": (lambda _: with_spectrum(420, 490, torch.where(i <= 20, 1, 1e-6 * POWER)), RANKS),
    "three levels": (
        lambda _: with_spectrum(420, 490, torch.where(i <= 10, 1, torch.where(i <= 60, 1e-4, 1e-7))),
        RANKS,
    ),
    "a step past the block": (
        lambda _: with_spectrum(420, 490, torch.where(i <= 10, 1, torch.where(i <= 120, 0.5, 0.1))),
        RANKS,
    ),
    "random": (lambda _: noise(420, 490, 0), RANKS),
    "large columns": (lambda _: with_spectrum(420, 490, POWER) * torch.where(i[:490] % 105 == 0, 100, 1), RANKS),
    "rank 20 exactly": (lambda _: noise(420, 20, 1).sign() @ noise(20, 490, 2).sign(), RANKS),
    "40 x 60 in zeros": (
        lambda _: torch.nn.functional.pad(with_spectrum(40, 60, POWER), (200, 230, 280, 100)),
        RANKS,
    ),
    "ones": (lambda _: torch.ones(221, 211).double(), (1, 9, 40)),
    "identity": (lambda _: torch.eye(185, 176).double(), (4, 30)),
    "one in fifty": (lambda _: noise(145, 104, 0) * (noise(145, 104, 1) > 2.054), (14, 60)),
    "very tall": (lambda _: with_spectrum(3000, 256, POWER), RANKS),
    "very wide": (lambda _: with_spectrum(256, 3000, POWER), RANKS),
    "one row": (lambda _: POWER[None, :500], (1,)),
    "denormal": (lambda dtype: with_spectrum(221, 211, POWER) * dtype.tiny * 16, (9, 40)),  # slow to multiply
    "huge": (lambda dtype: with_spectrum(420, 490, POWER) * dtype.max**0.8, RANKS),  # 1e31 in fp32 and bf16
}


AS_ON = ("float32", "float32 on a GPU", "bfloat16", "float64")
# In fp64 ten steps leave 1e-13 of what is below this step, and five or six 1e-8; in fp32 that is rounding.
SLOW = ("a step past the block", "float64")


@functools.lru_cache(maxsize=1)
def made(kind: str, dtype: torch.dtype) -> Tensor:
    """The same tensor for both tests of a dtype: what it is compared with is computed once."""
    return SPECTRA[kind][0](torch.finfo(dtype)).to(dtype)


@pytest.mark.parametrize("kind, as_on", [each for each in itertools.product(SPECTRA, AS_ON) if each != SLOW])
def test_hard_spectra(request, kind, as_on):
    pytest.importorskip("sklearn.decomposition")
    dtype = getattr(torch, as_on.split()[0])
    if as_on.endswith("GPU"):
        request.getfixturevalue("as_on_a_gpu")
    assert_svd_no_worse_than_scikit_learn(made(kind, dtype), SPECTRA[kind][1], METHODS)


@pytest.mark.parametrize("name", ["attention.self.query", "intermediate.dense"])
def test_default_method_on_real_weights(minilm, name):
    pytest.importorskip("sklearn.decomposition")
    W = minilm.encoder.layer[2].get_submodule(name).weight.detach()  # 384 x 384 and 1536 x 384
    assert_svd_no_worse_than_scikit_learn(W, (32, 64, 100, 256))
