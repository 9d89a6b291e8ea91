"""Other names of arguments: those that PEFT's users write, and those that this library had once."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels import LoraXSLinear
from loraxs_kernels.naming import Former, aliases, as_dtype, first_line


def mlp() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))


@aliases(r="rank", old=Former("new"), twice=Former("half", lambda value, given: value / given["rank"]))
def call(model, rank, *, new=1, half=None):
    return model, rank, new, half


def test_a_function_takes_other_names_and_shows_its_own():
    assert list(inspect.signature(call).parameters) == ["model", "rank", "new", "half"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(0, r=3) == (0, 3, 1, None) == call(0, 3) == call(model=0, r=3)
    with pytest.warns(FutureWarning, match=r"^call: old is now called new$") as caught:
        assert call(0, 3, old=5) == (0, 3, 5, None)
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="half"):
        assert call(0, 4, twice=2) == (0, 4, 1, 0.5)


@pytest.mark.parametrize(
    ("args", "options", "names"),
    [
        ((0, 3), {"r": 3}, "rank and r"),
        ((0,), {"rank": 3, "r": 4}, "r"),
        ((0, 3), {"new": 1, "old": 1}, "old"),
    ],
)
def test_both_names_are_an_error_that_names_both(args, options, names):
    with pytest.raises(TypeError, match=rf"^call: got both .*{names}, which mean the same"):
        call(*args, **options)


def test_attach_as_pefts_users_write_it():
    model = lx.attach(mlp(), r=4, lora_alpha=8)
    assert [(layer.rank, layer.scaling) for layer in (model[0], model[2])] == [(4, 2.0)] * 2  # all-linear
    assert lx.count_parameters(mlp(), r=4).loraxs == 32
    with pytest.raises(TypeError, match="attach: got both alpha and lora_alpha"):
        lx.attach(mlp(), 4, alpha=8, lora_alpha=8)


@pytest.mark.parametrize("integer", [int, torch.tensor])
def test_a_block_of_any_integer_type_is_the_rank_and_the_oversampling(integer):
    W = torch.randn(64, 48)
    with pytest.warns(FutureWarning, match="block is now called oversample"):
        former = lx.truncated_svd(W, integer(4), method="subspace", block=integer(6), n_iter=1)
    for a, b in zip(former, lx.truncated_svd(W, 4, method="subspace", oversample=2, n_iter=1), strict=True):
        assert torch.equal(a, b)


def test_earlier_names_still_work():
    with pytest.warns(FutureWarning, match="sigma is now called init_std"):
        layer = LoraXSLinear.from_linear(nn.Linear(20, 30), 4, sigma=0.5)
    assert layer.init_std == 0.5
    with pytest.warns(FutureWarning, match="sigma is now called init_std"):
        assert layer.sigma == 0.5
    with pytest.warns(FutureWarning, match="sigma is now called init_std"):
        layer.sigma = 0.0
    layer.reset_R()
    assert not layer.R.any()
    with pytest.warns(FutureWarning, match="workspace is now called workspace_gib"):
        lx.attach(mlp(), 4, workspace=2**40)  # bytes; as GiB it would be refused
    with (
        pytest.warns(FutureWarning, match="workspace is now called workspace_gib"),
        pytest.raises(ValueError, match="workspace_gib: got 0"),
    ):
        lx.attach(mlp(), 4, workspace=0)
    W = torch.randn(20, 30)
    with pytest.warns(FutureWarning, match="block is now called oversample"):
        former = lx.truncated_svd(W, 4, method="subspace", block=6, n_iter=1)
    found = lx.truncated_svd(W, 4, method="subspace", oversample=2, n_iter=1)
    assert all(torch.equal(a, b) for a, b in zip(former, found, strict=True))
    assert not torch.equal(found[1], lx.truncated_svd(W, 4, method="subspace", oversample=8, n_iter=1)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16"])
def test_a_dtype_by_any_of_its_names(dtype, tmp_path):
    assert as_dtype("dtype", dtype, (torch.float32, torch.bfloat16)) is torch.bfloat16
    model = lx.attach(mlp(), 4, dtype=dtype)
    assert model[0].A.dtype == torch.bfloat16
    lx.save_adapter(model, tmp_path / "a.safetensors", dtype=dtype)
    assert lx.load_adapter(mlp(), tmp_path / "a.safetensors")[0].A.dtype == torch.bfloat16
    assert lx.count_parameters(model).nbytes(dtype) == 64


@pytest.mark.parametrize("dtype", ["bf17", "torch.bfloat16", torch.float16, torch.int8, 16])
def test_a_dtype_that_is_none_is_named(dtype):
    assert as_dtype("dtype", None, (torch.bfloat16,)) is None
    with pytest.raises(ValueError, match=r"^weight_dtype: got .* for module 'x', must be one of bfloat16, float32 \("):
        as_dtype("weight_dtype", dtype, (torch.bfloat16, torch.float32), "module 'x'")


@pytest.mark.parametrize("said, line", [("", "OSError"), ("\n two\nlines", "two"), ("one", "one")])
def test_the_first_line_of_an_error_is_never_empty(said, line):
    assert first_line(OSError(said)) == line
