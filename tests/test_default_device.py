"""Another default device (torch.set_default_device("cuda"), here "meta") changes nothing for a model on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import loraxs_kernels as lx
from loraxs_kernels.basis_file import make_basis
from loraxs_kernels.demo.training import Encoded
from loraxs_kernels.demo.trec import Question
from loraxs_kernels.integrations.peft import LoraXSConfig, LoraXSLinearLayer


@contextmanager
def by_setting() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=[by_setting, lambda: torch.device("meta")], ids=["set_default_device", "with torch.device"])
def elsewhere(request):
    return request.param


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.Linear(20, 5))


def llama() -> nn.Module:
    torch.manual_seed(1)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def assert_same(found, expected) -> None:
    """The same bits, on the CPU; of tensors, models' state dicts, and what holds them."""
    if isinstance(expected, torch.Tensor):
        assert found.device == expected.device == torch.device("cpu") and torch.equal(found, expected)
    elif isinstance(expected, nn.Module):
        assert_same(found.state_dict(), expected.state_dict())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    else:
        assert len(found) == len(expected)
        for each, other in zip(found, expected, strict=True):
            assert_same(each, other)


def singular(tmp_path: Path, base: nn.Module):
    W = base[0].weight.detach()
    return [lx.truncated_svd(t, 4, method=how) for t in (W, W.double(), W.bfloat16()) for how in ("krylov", "subspace")]


def attached(tmp_path: Path, base: nn.Module, **options):
    lx.attach(base, 4, target_modules=["0", "2"], init_std=0.3, modules_to_save=["3"], **options)
    return base, base(torch.ones(2, 20, device="cpu"))


def merged(tmp_path: Path, base: nn.Module):
    attached(tmp_path, base)
    lx.merge(base)
    y = base(torch.ones(2, 20, device="cpu"))
    lx.unmerge(base)
    return y, lx.detach(base, merge=True)


def given(tmp_path: Path, base: nn.Module):
    A, B = (torch.full(size, 0.5, device="cpu") for size in ((4, 20), (30, 4)))
    return lx.LoraXSLinear.from_linear(base[0], 4, init=(A, B))


def saved(tmp_path: Path, base: nn.Module):
    fresh = copy.deepcopy(base)
    attached(tmp_path, base)
    lx.save_adapter(base, tmp_path / "adapter.safetensors", portable=True, save_factors=True)
    return (tmp_path / "adapter.safetensors").read_bytes() and lx.load_adapter(fresh, tmp_path / "adapter.safetensors")


def aligned(tmp_path: Path, base: nn.Module):
    """Loaded on the weights in another dtype."""
    fresh = copy.deepcopy(base).bfloat16()
    attached(tmp_path, base)
    lx.save_adapter(base, tmp_path / "portable.safetensors", portable=True)
    return lx.load_adapter(fresh, tmp_path / "portable.safetensors")


def from_basis_file(tmp_path: Path, base: nn.Module):
    safetensors.torch.save_file(base.state_dict(), tmp_path / "model.safetensors")
    make_basis(tmp_path / "model.safetensors", 4, tmp_path / "basis.safetensors", progress=False)
    return lx.attach(base, 4, target_modules=["0", "2"], basis=tmp_path / "basis.safetensors")


@pytest.mark.parametrize(
    "work", [singular, attached, merged, given, saved, aligned, from_basis_file], ids=lambda f: f.__name__
)
def test_the_same_bits(work, elsewhere, tmp_path):
    expected, base = work(tmp_path, model()), model()
    with elsewhere():
        found = work(tmp_path, base)
    assert_same(found, expected)


@pytest.mark.parametrize("options", [dict(init="random"), dict(dtype=torch.bfloat16)], ids=str)
def test_attach_with_options(options, elsewhere, tmp_path):
    expected, base = attached(tmp_path, model(), **options), model()
    with elsewhere():
        found = attached(tmp_path, base, **options)
    assert_same(found, expected)


@torch.no_grad()
def with_peft(folder: Path, base: nn.Module, other: nn.Module, ids: torch.Tensor):
    wrapped = get_peft_model(base, LoraXSConfig(r=4, target_modules="all-linear", init_std=0.3))
    wrapped.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(other, folder)
    layers = [m for m in loaded.modules() if isinstance(m, LoraXSLinearLayer)]
    assert layers
    y = loaded(ids).logits
    return wrapped, loaded, y, loaded.merge_and_unload()


def test_peft(elsewhere, tmp_path):
    ids = torch.arange(10).view(1, 10)
    expected = with_peft(tmp_path / "expected", llama(), llama(), ids)
    models = llama(), llama()
    with elsewhere():
        found = with_peft(tmp_path / "found", *models, ids)
    assert_same(found, expected)


def test_batches_of_the_demo(elsewhere):
    data = Encoded([Question("a b", 0), Question("c", 1)], lambda texts: [list(range(len(t))) for t in texts], "cpu")
    expected = data.batch([0, 1])
    with elsewhere():
        assert_same(data.batch([0, 1]), expected)
