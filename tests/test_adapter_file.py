"""Adapter files: small, exact, checked against the basis they are loaded on, and never half written."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import safetensors.torch
import standin
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import loraxs_kernels as lx
from loraxs_kernels import AdapterMismatch, LoraXSLinear, adapter_format, basis
from loraxs_kernels.acceptance import aligned, aligned_to
from loraxs_kernels.files import sealed, tensors_of, unsealed, write_atomically
from loraxs_kernels.inspection import inspected
from loraxs_kernels.integrations.reference_repo import export_as_lora
from loraxs_kernels.matching import adapted_layers, saved_modules, unwrapped

TARGETS = ["query", "value", "attention.output.dense", "intermediate.dense"]


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.delta_weight().double() for name, layer in adapted_layers(model)}


def worst_error(model: nn.Module, expected: dict[str, torch.Tensor]) -> float:
    return max(((d - expected[name]).norm() / expected[name].norm()).item() for name, d in deltas(model).items())


def randomise(model: nn.Module) -> nn.Module:
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.R, std=0.3)
    return model


def mlp() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.Linear(20, 5))


@pytest.fixture
def trained(tmp_path):
    """A small adapted model with different ranks and a head, and its file."""
    model = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3}, alpha=8, modules_to_save=["3"])
    nn.init.normal_(randomise(model)[3].weight)
    lx.save_adapter(model, tmp_path / "adapter.safetensors")
    return model, tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_has_the_base_models_names(trained, tmp_path, wrap):
    model, path = trained
    wrapped = wrap(model)
    lx.save_adapter(wrapped, tmp_path / "wrapped.safetensors")
    assert (tmp_path / "wrapped.safetensors").read_bytes() == path.read_bytes()
    fresh = wrap(mlp())
    assert lx.load_adapter(fresh, path) is fresh
    x = torch.randn(3, 20)
    torch.testing.assert_close(fresh(x), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "module, kind, names",
    [
        ("lightning.fabric.wrappers", "_FabricModule", ["_forward_module", "_original_module"]),
        ("deepspeed.runtime.engine", "DeepSpeedEngine", ["module"]),
        ("opacus.grad_sample.gsm_base", "AbstractGradSampleModule", ["_module"]),
    ],
)
def test_wrappers_of_other_libraries_are_not_in_the_names(trained, tmp_path, module, kind, names):
    """Lightning Fabric's, DeepSpeed's and Opacus'.  A user's own class of such a name is a model."""
    model, path = trained

    def wrapped(inner: nn.Module, module: str) -> nn.Module:
        wrapper = type("Derived", (type(kind, (nn.Module,), {"__module__": module}),), {})()
        for name in names:
            wrapper.add_module(name, inner)
        return wrapper

    lx.save_adapter(wrapped(model, module), tmp_path / "wrapped")
    assert (tmp_path / "wrapped").read_bytes() == path.read_bytes()
    lx.load_adapter(wrapped(model, module), path)
    own = wrapped(nn.Linear(6, 6), "models")
    assert unwrapped(own) is own


def test_wrappers_of_parts_are_not_in_the_names(trained, tmp_path):
    """Compiled and checkpointed blocks, an averaged model: the file is the same, and loads into either."""
    model, path = trained

    def wrapped(inner: nn.Sequential, compiled: list[int]) -> nn.Module:
        for i in compiled:
            inner[i] = torch.compile(inner[i], backend="eager")
        inner[2] = checkpoint_wrapper(inner[2])
        return AveragedModel(inner)

    x = torch.randn(3, 20)
    expected, fresh = model(x), wrapped(mlp(), [3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.load_adapter(fresh, path)
        lx.load_adapter(fresh, path)
    torch.testing.assert_close(fresh(x), expected)
    for name, each in (("loaded", fresh), ("attached", wrapped(model, [0, 3]))):
        lx.save_adapter(each, tmp_path / name)
        assert (tmp_path / name).read_bytes() == path.read_bytes()
    for change in (lx.detach, lambda model: lx.attach(wrapped(mlp(), [0]), 4)):
        no_svd = patch("loraxs_kernels.model.fill", side_effect=AssertionError)
        with no_svd, pytest.raises(ValueError, match="is compiled by itself, and would still be called"):
            change(model)


def test_names_of_an_fsdp1_wrapper_are_not_written(trained, tmp_path):
    wrapped = nn.Module()
    wrapped._fsdp_wrapped_module = trained[0]
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        lx.save_adapter(wrapped, tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


def unchanged(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], v) for k, v in state.items())


def test_a_fresh_model_gets_the_whole_adapter(trained):
    model, path = trained
    x = torch.randn(6, 20)
    fresh = lx.load_adapter(mlp(), path)
    assert torch.equal(fresh(x), model(x))
    assert [(layer.rank, layer.scaling) for _, layer in adapted_layers(fresh)] == [(4, 2.0), (3, 8 / 3)]
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == ["0.R", "2.R", "3.weight", "3.bias"]
    again = path.with_name("again.safetensors")
    lx.save_adapter(fresh, again)
    assert again.read_bytes() == path.read_bytes()


def test_an_adapted_model_takes_R_and_alpha(trained):
    model, path = trained
    other = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3})
    assert lx.load_adapter(other, path) is other
    x = torch.randn(6, 20)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("init", ["random", "given"])
def test_other_inits(init, tmp_path):
    factors = init if init == "random" else {"0": (torch.randn(4, 20), torch.randn(30, 4))}
    model = randomise(lx.attach(mlp(), 4, target_modules=["0"], init=factors, seed=5))
    lx.save_adapter(model, tmp_path / "a.safetensors")
    fresh = lx.load_adapter(mlp(), tmp_path / "a.safetensors")
    assert torch.equal(fresh[0].A, model[0].A) and torch.equal(fresh[0].delta_weight(), model[0].delta_weight())


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_part_adapted_and_the_whole_saved(init, tmp_path):
    """attach on a part, save and load on the whole: the recipe keeps the names that the random numbers came from."""
    part = lx.attach(mlp(), 4, target_modules=["0"], init=init, modules_to_save=["3"], n_iter=2)
    whole = nn.Sequential(nn.Identity(), randomise(part))
    lx.save_adapter(whole, tmp_path / "a.safetensors")
    fresh = lx.load_adapter(nn.Sequential(nn.Identity(), mlp()), tmp_path / "a.safetensors")
    x = torch.randn(6, 20)
    assert torch.equal(fresh(x), whole(x)) and fresh[1][0].recipe == part[0].recipe
    assert fresh[1][3].weight.requires_grad
    lx.detach(whole)
    assert all(p.requires_grad for p in whole.parameters())


def reseeded(model: nn.Module) -> None:
    init = model[0].recipe.init
    model.load_state_dict(lx.attach(mlp(), 4, target_modules=["0", "2"], init=init, seed=1).state_dict())


CHANGED_SINCE = {
    "A edited": ("svd", lambda model: model[0].A.mul_(1.01)),
    "weights loaded": ("svd", lambda model: nn.init.normal_(model[2].base_layer.weight)),
    "a state dict of another seed": ("svd", reseeded),
    "a random one of another seed": ("random", reseeded),
    "float8": ("svd", lambda model: model.to(torch.float8_e4m3fn)),
    "float8 and back": ("svd", lambda model: model.to(torch.float8_e4m3fn).float()),
}


@pytest.mark.parametrize("case", CHANGED_SINCE)
def test_A_and_B_that_no_load_could_make_are_in_the_file(tmp_path, case):
    """The trained R is worth nothing without them."""
    init, change = CHANGED_SINCE[case]
    model, path = lx.attach(mlp(), 4, target_modules=["0", "2"], init=init), tmp_path / "a.safetensors"
    with torch.no_grad():
        change(randomise(model))
    with pytest.warns(UserWarning, match=r"A and B of [12] modules, .* are not what their recipe makes") as seen:
        lx.save_adapter(model, path)
    assert seen[0].filename == __file__ and len(seen) == 1
    assert worst_error(lx.load_adapter(mlp(), path), deltas(model.float())) < 1e-6


def test_A_and_B_of_another_seed_on_a_quantised_base_are_in_the_file(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")

    def attached(seed: int = 0) -> nn.Sequential:
        quantization.quantize_(model := mlp(), quantization.Int8WeightOnlyConfig())
        return randomise(lx.attach(model, 4, target_modules=["0", "2"], seed=seed, n_iter=0))

    model, path, x = attached(), tmp_path / "a.safetensors", torch.randn(6, 20)
    for seed in (0, 1):
        others = attached(seed).state_dict()
        model.load_state_dict({key: t for key, t in others.items() if key[-1] in "ABR"}, strict=False)
        with pytest.warns(UserWarning, match="A and B of 2 modules") if seed else nullcontext():
            lx.save_adapter(model, path)
        fresh = lx.load_adapter(lx.detach(attached()), path)
        torch.testing.assert_close(fresh(x), model(x))


def test_a_state_dict_with_the_weights_of_its_A_and_B_is_saved_without_them(tmp_path):
    other, path = randomise(lx.attach(mlp(), 4, target_modules=["0", "2"])), tmp_path / "a.safetensors"
    model = mlp()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[2].weight)
    lx.attach(model, 4, target_modules=["0", "2"]).load_state_dict(other.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.save_adapter(model, path)
    assert worst_error(lx.load_adapter(mlp(), path), deltas(model)) < 1e-6


@pytest.mark.parametrize("dim", [0, 1])
def test_zeros_where_a_weight_is_looked_at_are_no_other_weight(tmp_path, dim):
    layer, path = nn.Linear(*((96, 192) if dim == 0 else (192, 96))), tmp_path / "a.safetensors"
    with torch.no_grad():
        layer.weight.index_fill_(dim, torch.linspace(0, 191, basis.SAMPLED).round().long(), 0)  # pruned
    model = randomise(lx.attach(nn.Sequential(layer), 8, n_iter=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.save_adapter(model, path)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_an_SVD_that_has_not_converged_is_still_that_of_the_weight(tmp_path, shape):
    model, path = randomise(lx.attach(nn.Sequential(nn.Linear(*shape)), 8, n_iter=0)), tmp_path / "a.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.save_adapter(model, path)
    assert inspected(path)["recipes"][0]["init"] == "svd"


def test_random_factors_do_not_depend_on_the_default_dtype():
    expected = lx.attach(mlp(), 4, target_modules=["0"], init="random")[0]
    try:
        torch.set_default_dtype(torch.float64)
        made = lx.attach(mlp().float(), 4, target_modules=["0"], init="random")[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made.A, expected.A) and torch.equal(made.B, expected.B) and torch.equal(made.R, expected.R)


def test_a_part_of_what_was_adapted_keeps_its_head(tmp_path):
    inner = mlp()
    lx.attach(nn.ModuleDict({"model": inner}), 4, target_modules=["0"], modules_to_save=["3"])
    nn.init.normal_(inner[3].weight)
    lx.save_adapter(inner, tmp_path / "a.safetensors")
    assert torch.equal(lx.load_adapter(mlp(), tmp_path / "a.safetensors")[3].weight, inner[3].weight)


def test_the_next_attach_says_anew_what_is_saved():
    """Also where only the part without the head was detached."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(20, 8)), "head": nn.Linear(8, 2)})
    lx.attach(model, 4, target_modules=["0"], modules_to_save=["head"])
    lx.detach(model["body"])
    lx.attach(model, 4, target_modules=["0"], modules_to_save=[])
    assert saved_modules(model) == []
    assert all(p.requires_grad for p in lx.detach(model).parameters())


def test_what_trains_and_is_in_no_file_is_named(trained):
    model, path = trained
    model[0].base_layer.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match="1 parameters train, the first '0.base_layer.bias', that no adapter") as seen:
        lx.save_adapter(model, path)
    assert seen[0].filename == __file__


def test_an_adapter_of_a_part_is_told_by_the_names(trained):
    with pytest.raises(ValueError, match=r"no module '0', but .* is a part of the other: there is 'model\.0' here"):
        lx.load_adapter(nn.ModuleDict({"model": mlp()}), trained[1])


def test_modules_to_save_that_are_tied_where_they_are_loaded(tmp_path):
    def layers(tied):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        model[2].weight = model[1].weight if tied else model[2].weight
        return model

    model = lx.attach(layers(False), 2, target_modules=["0"], modules_to_save=["1", "2"])
    lx.save_adapter(model, tmp_path / "two")
    with pytest.raises(ValueError, match=r"2\.weight: is one with 1\.weight in this model, and has another value"):
        lx.load_adapter(layers(True), tmp_path / "two")
    model[2].weight.data.copy_(model[1].weight)
    lx.save_adapter(model, tmp_path / "alike")
    assert torch.equal(lx.load_adapter(layers(True), tmp_path / "alike")[2].weight, model[1].weight)
    for name in ("saved", "fresh"):  # a NaN in a buffer is another value than itself
        model = layers(False)
        model[1].register_buffer("mask", torch.tensor([0.0, torch.nan]))
        if name == "saved":
            lx.save_adapter(lx.attach(model, 2, target_modules=["0"], modules_to_save=["1"]), tmp_path / "mask")
    assert lx.load_adapter(model, tmp_path / "mask")[1].mask.isnan().any()


def test_what_is_offloaded_is_neither_loaded_nor_saved(trained, tmp_path):
    """As accelerate leaves parameters that it has offloaded: copy_ into them does nothing, and says nothing."""
    model, file = trained
    other = copy.deepcopy(model)
    other[0].R = nn.Parameter(other[0].R.to("meta"))
    with pytest.raises(ValueError, match=r"module '0' is not in memory"):
        lx.load_adapter(other, file)
    fresh = mlp()
    fresh[3].to("meta")
    with pytest.raises(ValueError, match=r"does not fit this model: 3\.weight: is not in memory"):
        lx.load_adapter(fresh, file)
    assert type(fresh[0]) is nn.Linear
    model[3].to("meta")
    with pytest.raises(ValueError, match=r"model: 3\.weight is not in memory"):
        lx.save_adapter(model, tmp_path / "new.safetensors")


def test_modules_to_save_of_a_file_and_of_the_model_that_it_is_loaded_into(trained, tmp_path):
    _, path = trained
    other = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3}, modules_to_save=[])
    bare = tmp_path / "bare.safetensors"
    lx.save_adapter(other, bare)
    lx.load_adapter(other, path)
    lx.save_adapter(other, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.warns(UserWarning, match=r"has no values for 3 of this model's modules_to_save") as seen:
        lx.load_adapter(other, bare)
    assert seen[0].filename == __file__


def test_real_model_through_a_bf16_file(minilm, tmp_path):
    base = copy.deepcopy(minilm)
    lx.attach(minilm, 16, target_modules=TARGETS)
    randomise(minilm)
    lx.save_adapter(minilm, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.load_adapter(base, tmp_path / "a.safetensors")
    for (_, a), (_, b) in zip(adapted_layers(minilm), adapted_layers(base), strict=True):
        assert torch.equal(a.R.bfloat16().float(), b.R) and b.R.dtype == torch.float32
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B)


def test_224_modules_are_112_kib_and_a_fingerprint(tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = nn.Module(), nn.Module()
            for parent, names in ((self.self_attn, "qkvo"), (self.mlp, ("gate", "up", "down"))):
                for name in names:
                    setattr(parent, f"{name}_proj", nn.Linear(16, 16))

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(Layer() for _ in range(32))  # the module names of Mistral-7B
    lx.attach(model, 16, target_modules="all-linear", init="random")
    path = tmp_path / "a.safetensors"
    lx.save_adapter(model, path, dtype=torch.bfloat16)
    R, fingerprint = 224 * 16 * 16 * 2, 224 * (16 + 8) * 4
    assert R == 112 * 1024
    assert path.stat().st_size - fingerprint <= 1.1 * R


def test_threads_do_not_matter(minilm, tmp_path):
    base = copy.deepcopy(minilm)
    torch.set_num_threads(1)
    randomise(lx.attach(minilm, 16, target_modules=TARGETS))
    lx.save_adapter(minilm, tmp_path / "a.safetensors")
    torch.set_num_threads(2)
    lx.load_adapter(base, tmp_path / "a.safetensors")
    assert worst_error(base, deltas(minilm)) < 2e-4


@pytest.mark.gpu("adapter files")
@pytest.mark.parametrize("real", [False, True], ids=["mlp", "stand-in" if standin.MISSING else "minilm"])
@pytest.mark.parametrize("there", [("cpu", "cuda"), ("cuda", "cpu")])
def test_devices_do_not_matter(request, tmp_path, there, real):
    model = request.getfixturevalue("minilm") if real else mlp()
    base = copy.deepcopy(model).to(there[1])
    randomise(lx.attach(model.to(there[0]), 16 if real else 4, target_modules=TARGETS if real else "all-linear"))
    lx.save_adapter(model, tmp_path / "a.safetensors")
    lx.load_adapter(base, tmp_path / "a.safetensors")
    assert worst_error(base.cpu(), deltas(model.cpu())) < 2e-4


def test_the_recipe_in_a_file_leaves_nothing_open(trained):
    """So that it means the same when the defaults of truncated_svd are others."""
    model, path = trained
    with safetensors.safe_open(path, framework="pt") as f:
        header = json.loads(f.metadata()["loraxs"])
    layer = header["layer"]
    assert {key: layer[key] for key in ("init", "seed", "method", "block", "n_iter", "dtype")} == {
        "init": "svd",
        "seed": 0,
        "method": "krylov",
        "block": 12,
        "n_iter": 5,
        "dtype": None,
    }
    assert not any("name" in each for each in header["modules"].values())  # the modules' own say it
    named = dataclasses.replace(model[0].recipe, name="svd")  # as a module that is called what a field holds
    assert adapter_format.described(vars(model[0]), named, "svd")["init"] == "svd"


def test_a_dtype_chosen_for_A_and_B_is_part_of_the_recipe(tmp_path):
    """Rounded to bf16 they are another basis than in fp32, by more than a file accepts."""
    model = randomise(lx.attach(mlp(), 4, target_modules=["0", "2"], dtype=torch.bfloat16, n_iter=1))
    lx.save_adapter(model, tmp_path / "a.safetensors")
    loaded = lx.load_adapter(mlp(), tmp_path / "a.safetensors")
    for (_, layer), (_, saved) in zip(adapted_layers(loaded), adapted_layers(model), strict=True):
        assert layer.A.dtype == torch.bfloat16 and torch.equal(layer.A, saved.A) and layer.recipe == saved.recipe
        assert layer.recipe.n_iter == 1


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# The base, A and B as they are attached, where the model is moved before it is saved; the bases that load the file.
MOVES = {
    "a checkpoint in bf16": ("bf16", None, [], {"bf16": True, "fp32": True, "fp16": True}),
    "trained in fp32, moved": ("fp32", None, ["bf16"], {"fp32": True, "bf16": False}),
    "moved and back": ("fp32", None, ["bf16", "fp32"], {"fp32": True}),
    "moved twice": ("fp32", None, ["fp16", "bf16"], {"fp32": True, "bf16": False}),
    "A in fp32, moved to fp16": ("bf16", "fp32", ["fp16"], {"bf16": True, "fp16": True}),
    "A in fp32": ("bf16", "fp32", [], {"bf16": True}),
    "A in bf16": ("fp32", "bf16", [], {"fp32": True}),
    "A in fp32, moved to fp64": ("bf16", "fp32", ["fp64"], {"bf16": True}),
    "assigned": ("fp32", None, "A and B in bf16", {"fp32": True}),
}


@pytest.mark.parametrize("case", MOVES)
def test_the_recipe_follows_the_dtype_of_A_and_B(minilm, tmp_path, case):
    """The same roundings are made again, so that the file loads where the weights have the values A was made from."""
    start, dtype, moves, loads = MOVES[case]
    bases = {"fp32": minilm.to(DTYPES[start]).float()}
    bases |= {name: copy.deepcopy(bases["fp32"]).to(DTYPES[name]) for name in ("bf16", "fp16")}
    model = copy.deepcopy(bases[start])
    randomise(lx.attach(model, 16, target_modules=TARGETS, dtype=dtype and DTYPES[dtype]))
    if moves == "A and B in bf16":
        for _, layer in adapted_layers(model):
            layer.A, layer.B = layer.A.bfloat16(), layer.B.bfloat16()
    else:
        for to in moves:
            model.to(DTYPES[to])
    path = tmp_path / "a.safetensors"
    loses = start == "fp32" and isinstance(moves, list) and "bf16" in moves
    if loses:
        made, now = "float32", "bfloat16"
        with pytest.warns(
            UserWarning, match=f"were made from weights in {made}, rounded to {now} since. .*save_factors=True"
        ):
            lx.save_adapter(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if loses else "error")
        lx.save_adapter(model, path)
        for name, fits in loads.items():
            if fits:
                lx.load_adapter(bases[name], path)
                assert worst_error(bases[name], deltas(model)) < 1e-3
                kinds = {layer.A.dtype for _, layer in adapted_layers(bases[name])}
                assert kinds <= {DTYPES[name], DTYPES[dtype or start], next(adapted_layers(model))[1].A.dtype}
                lx.save_adapter(bases[name], tmp_path / "again.safetensors")
                lx.load_adapter(copy.deepcopy(lx.detach(bases[name])), tmp_path / "again.safetensors")
            else:
                with pytest.raises(AdapterMismatch, match=rf"weights in {made}, this model's from .* {now}\. Load"):
                    lx.load_adapter(bases[name], path)


def test_a_weight_of_equal_singular_values_is_warned_of_and_named(tmp_path):
    """Rounding decides what their vectors are: another number of threads is as good as another weight."""
    path, weights = tmp_path / "adapter.safetensors", [nn.init.orthogonal_(torch.empty(40, 40)) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        models = [nn.Sequential(nn.Linear(40, 40)).to(dtype) for _ in weights]
        for model, W in zip(models, weights, strict=True):
            model[0].weight.data.copy_(W)
        lx.attach(models[0], 3)[0].R.data.normal_()
        with pytest.warns(UserWarning, match="A and B of 1 modules, the first module '0', depend on rounding"):
            lx.save_adapter(models[0], path)
        with pytest.raises(AdapterMismatch, match="values of its weight are nearly equal, so that rounding decides on"):
            lx.load_adapter(models[1], path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank in (1, 4):
            lx.save_adapter(lx.attach(nn.Sequential(nn.Linear(40, 40)), rank), path)
        lx.save_adapter(models[0], path, save_factors=True)
        lx.load_adapter(models[1], path)  # whose own A and B would span another space
    assert torch.equal(models[1][0].delta_weight(), models[0][0].delta_weight())
    with pytest.raises(lx.AdapterMismatch, match="module '0'"):  # of other singular values
        lx.load_adapter(nn.Sequential(nn.Linear(40, 40)), path)


def test_the_message_says_what_was_found(trained):
    """Different weights are called that, whatever their dtype; nothing is advised that the file has already."""
    model, path = trained
    shutil.copy(path, path.with_name("plain"))
    lx.save_adapter(model, path, portable=True)
    turned = torch.linalg.qr(torch.randn(20, 20)).Q
    for file in (path, path.with_name("plain")):
        for dtype in (torch.float32, torch.bfloat16):
            other = mlp().to(dtype)
            other[0].weight.data = other[0].weight @ turned.to(dtype)  # of the same singular values
            message = (
                r"is \d\.\de[+-]\d\d: this model has different weights\. The adapter .* file does not name: load its "
                "weights, in the dtype and the quantisation that they had then"
            )
            with pytest.raises(AdapterMismatch, match=message) as refusal:
                lx.load_adapter(other, file)
            assert "float" not in str(refusal.value) and "portable" not in str(refusal.value)
    skew = torch.randn(20, 20)
    turned = torch.linalg.matrix_exp(0.02 * (skew - skew.mT))  # a little
    for file, advised in ((path, False), (path.with_name("plain"), True)):
        other = mlp()
        other[0].weight.data = other[0].weight @ turned
        with pytest.raises(AdapterMismatch, match="the weights were edited or quantised") as refusal:
            lx.load_adapter(other, file)
        assert ("portable=True" in str(refusal.value)) == advised
    with pytest.raises(AdapterMismatch, match="A and B were not rounded, this model's were rounded to bfloat16"):
        rounded = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3}, dtype=torch.bfloat16)
        lx.load_adapter(rounded, path.with_name("plain"))
    for how, what in (
        (dict(init="random"), "init 'random', .*init 'svd', "),
        (dict(n_iter=0), "n_iter 0, .* n_iter 5"),
    ):
        attached = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3}, **how)
        with pytest.raises(
            AdapterMismatch, match=rf"A and B were made with {what}.*Load the adapter into a model without"
        ):
            lx.load_adapter(attached, path)


def test_saving_does_not_read_the_base(tmp_path):
    """Which may have been packed, sharded or wrapped since the adapters were attached."""
    model = randomise(lx.attach(mlp(), 4, target_modules=["0", "2"]))
    for _, layer in adapted_layers(model):
        layer.base_layer.__class__ = type("Packed", (nn.Module,), {})
    with pytest.raises(TypeError, match="got a Packed"):
        model[0].reset_parameters()
    lx.save_adapter(model, tmp_path / "a.safetensors")
    assert worst_error(lx.load_adapter(mlp(), tmp_path / "a.safetensors"), deltas(model)) == 0


def test_the_factors_of_a_loaded_adapter_can_be_computed_elsewhere(trained):
    loaded = lx.load_adapter(mlp(), trained[1], device=["cpu"], workspace_gib=1)
    assert worst_error(loaded, deltas(trained[0])) == 0
    model = mlp()
    with pytest.raises(ValueError, match="device: got 'meta'"):
        lx.load_adapter(model, trained[1], device="meta")
    assert not any(isinstance(m, LoraXSLinear) for m in model.modules())


@pytest.mark.parametrize("how", [dict(portable=True), dict(save_factors=True)], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_another_dtype_needs_and_gets_alignment(minilm, tmp_path, dtypes, how):
    base = copy.deepcopy(minilm).to(dtypes[1])
    minilm.to(dtypes[0])
    randomise(lx.attach(minilm, 16, target_modules=TARGETS))
    path = tmp_path / "a.safetensors"
    lx.save_adapter(minilm, path)
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(AdapterMismatch, match=r"error of delta W in module '.*' is \d\.\de-0\d.*portable=True"):
        lx.load_adapter(base, path)
    assert unchanged(base, state) and all(p.requires_grad for p in base.parameters())
    lx.save_adapter(minilm, path, **how)
    with pytest.warns(
        UserWarning, match=r"aligned to them, with an estimated relative error of delta W of up to"
    ) as seen:
        lx.load_adapter(base, path)
    assert seen[0].filename == __file__
    assert worst_error(base, deltas(minilm)) < 3e-2


@pytest.mark.parametrize("how", [dict(portable=True), dict(save_factors=True)], ids=str)
def test_a_load_turns_R_where_rounding_decides_on_A_and_B(tmp_path, how):
    """Four equal singular values: A and B of the rounded weight are others, and R as it is makes another delta."""
    base, path = mlp(), tmp_path / "a.safetensors"
    U, S, Vh = torch.linalg.svd(base[0].weight.detach(), full_matrices=False)
    base[0].weight.data = U * torch.where(torch.arange(len(S)) < 4, 2.0, 0.1) @ Vh
    model = randomise(lx.attach(copy.deepcopy(base), 4, target_modules=["0"]))
    lx.save_adapter(model, path)
    with pytest.raises(AdapterMismatch, match="nearly equal, so that rounding decides"):
        lx.load_adapter(copy.deepcopy(base).bfloat16(), path)
    lx.save_adapter(model, path, **how)
    with pytest.warns(UserWarning, match="R was aligned"):
        loaded = lx.load_adapter(copy.deepcopy(base).bfloat16(), path)
    assert worst_error(loaded, deltas(model)) < 5e-3


def test_a_flipped_sign_is_mended_by_the_probes_alone(trained):
    """No rule for signs is safe, so one pair of vectors the other way round is found and undone."""
    model, path = trained
    expected = deltas(model)
    model[0].A[2].neg_()
    model[0].B[:, 2].neg_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.load_adapter(model, path)
    assert worst_error(model, expected) < 1e-6


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_residuals_of_all_flips_are_known_at_once(orthogonal):
    """What each flip alone would leave, for factors of an SVD and for given ones; the best of them is taken."""
    A, B, R = torch.randn(6, 300), torch.randn(200, 6), torch.randn(6, 6)
    if orthogonal:
        A, B = torch.linspace(3, 1, 6)[:, None] * torch.linalg.qr(A.T).Q.T, torch.linalg.qr(B).Q
    here = basis.Fingerprint.of(A, B)
    entry = {"R": R, "S": here.S, "probe": here.probes(basis.flipped(R, 4) + 0.3 * torch.randn(6, 6))}
    each = [here.residual(entry["probe"], basis.flipped(R, k)) for k in range(6)]
    torch.testing.assert_close(here.flipped_residuals(entry["probe"], R), torch.stack(each), rtol=1e-6, atol=0)
    found, error = aligned(entry, A, B)
    assert torch.equal(found, basis.flipped(R, 4)) and error == each[4] == min(each)


def test_the_products_of_a_layer_that_does_not_fit_do_not_grow_in_number():
    """As many for each rank: none of them is made once for each sign."""

    class Products(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
            return func(*args, **(kwargs or {}))

    counts = []
    for rank in (3, 12):
        here = basis.Fingerprint.of(torch.randn(rank, 40), torch.randn(50, rank))
        with Products() as products:
            _, error = aligned_to({"R": torch.randn(rank, rank), "S": here.S, "probe": torch.randn(8)}, here)
        assert error > basis.ACCEPT
        counts.append(products.made)
    assert 0 < counts[0] == counts[1]


def scaled_by(factor):
    return lambda model: model[0].weight.data.mul_(factor)


def other_weights(model):
    nn.init.normal_(model[2].weight)


OTHER_BASES = {
    "another model": (
        other_weights,
        r"module '2' is .*, and the singular values of the weight differ: this model has different weights",
    ),
    "edited weights": (
        scaled_by(1.01),
        r"module '0' is 1\.\de-02, more than 1e-03: the weights were edited .* save the adapter from its own",
    ),
    "quantised weights": (
        lambda m: m[0].weight.data.copy_((m[0].weight / 0.03).round() * 0.03),
        r"module '0' is .*, more than 1e-03: the weights were edited or quantised",
    ),
}


@pytest.mark.parametrize("case", OTHER_BASES)
@pytest.mark.parametrize("attached", [False, True])
def test_another_base_is_refused_and_nothing_changes(trained, case, attached):
    change, message = OTHER_BASES[case]
    model = mlp()
    change(model)
    if attached:
        lx.attach(model, 4, target_modules=["0", "2"], rank_pattern={"2": 3})
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterMismatch, match=message):
        lx.load_adapter(model, trained[1])
    assert unchanged(model, state)


def test_modules_that_do_not_match_are_named(trained):
    _, path = trained
    with pytest.raises(ValueError, match="adapts other modules than the model's adapters do; only one of them has '2'"):
        lx.load_adapter(lx.attach(mlp(), 4, target_modules=["0"]), path)
    with pytest.raises(ValueError, match="module '2' has rank 3 in the file and 4 in the model"):
        lx.load_adapter(lx.attach(mlp(), 4, target_modules=["0", "2"]), path)
    with pytest.raises(ValueError, match="model: has no module '3', but the adapter has"):
        lx.load_adapter(mlp()[:3], path)
    model = nn.Sequential(*mlp()[:3], nn.Linear(20, 6))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"3\.weight: is of shape \(5, 20\) in the file, must be of shape \(6, 20\)"):
        lx.load_adapter(model, path)
    assert unchanged(model, state)
    merged = lx.merge(lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3}))
    with pytest.raises(ValueError, match="module '0' is merged; unmerge it"):
        lx.load_adapter(merged, path)


V1, V2 = (Path(__file__).parent / "data" / f"adapter_v{version}.safetensors" for version in (1, 2))


def edited(path: Path, change) -> None:
    """Rewrite the file with a changed header or changed tensors and the checksum that belongs to them."""
    header, f = unsealed(path, "loraxs", "adapter")
    tensors = tensors_of(f, path)
    metadata = change(header, tensors)
    if isinstance(metadata, dict) and "loraxs" in metadata:
        safetensors.torch.save_file(tensors, path, metadata)
    elif header["version"] == 1:
        safetensors.torch.save_file(tensors, path, {"loraxs": json.dumps(header)})
    else:
        write_atomically(path, *sealed(tensors, "loraxs", header))


def in_header(**values):
    return lambda p: edited(p, lambda h, t: h.update(values))


def in_layer(**values):
    return lambda p: edited(p, lambda h, t: h["layer"].update(values))


def in_tensors(change):
    return lambda p: edited(p, lambda h, t: change(t))


def set_to(key, value):
    return lambda t: t.update({key: torch.full_like(t[key], value)})


NO_ADAPTERS = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is not a whole safetensors file"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "is not a whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a whole safetensors file"),
    "a pickle": (lambda p: torch.save({"R": torch.ones(2)}, p), "is not a whole safetensors file"),
    "foreign": (lambda p: safetensors.torch.save_file({"x": torch.ones(1)}, p), "no LoRA-XS adapter"),
    "a newer version": (in_header(version=5), "is of format version 5, this loraxs_kernels reads 1 to 4; upgrade it"),
    "a version that is no number": (in_header(version="2"), "is of format version '2'"),
    "a header that is no object": (lambda p: edited(p, lambda h, t: {"loraxs": "[1]"}), "no JSON object but a list"),
    "a header that is no JSON": (lambda p: edited(p, lambda h, t: {"loraxs": "{"}), "is damaged, no JSON"),
    "a header too deep": (lambda p: edited(p, lambda h, t: {"loraxs": '{"a":' * 9000}), "is damaged, no JSON"),
}
# What a checksum would tell too, and is told without one, so that files of version 1 are checked as well.
DAMAGES = {
    "no modules": (in_header(modules={}), "has no modules"),
    "modules that are a list": (in_header(modules=["0"]), "has no modules, or does not describe them"),
    "a module too many": (
        lambda p: edited(p, lambda h, t: h["modules"].update({"9": {}})),
        r"'R/4' has shape \(1, 4, 4\)",
    ),
    "a module too few": (
        lambda p: edited(p, lambda h, t: h["modules"].pop("2")),
        "header does not mention the tensor '.*/3'",
    ),
    "modules_to_save dropped": (
        in_header(modules_to_save=[]),
        "header does not mention the tensor 'model/3.bias'",
    ),
    "modules_to_save a string": (in_header(modules_to_save="3"), "modules_to_save is '3' in its header"),
    "modules_to_save of lists": (in_header(modules_to_save=[["3"]]), r"modules_to_save is \[\['3'\]\] in its header"),
    "modules_to_save without a name": (in_header(modules_to_save=["3", ""]), r"modules_to_save is \['3', ''\] in its"),
    "a field that is not known": (in_header(extra=1), "its header has 'extra', which is not known"),
    "a field of version 4": (in_header(shared={}), "its header has 'shared', which is not known"),
    "modules_to_save twice": (in_header(modules_to_save=["3", "3"]), r"modules_to_save is \['3', '3'\] in its header"),
    "alpha past all floats": (in_layer(alpha=10**400), "alpha: got 1000.*, must be a finite number"),
    "base_model a number": (in_header(base_model=1), "base_model is 1 in its header"),
    # safetensors 0.4 cannot write a file without tensors
    "all tensors missing": (in_tensors(lambda t: t.clear()), "tensor 'R/4' is missing|InvalidHeader"),
    "half a sketch": (in_tensors(lambda t: t.update({"U/4": torch.ones(1, 4, 8)})), "tensor 'V/4' is missing"),
    "A without B": (in_tensors(lambda t: t.update({"A/0": torch.ones(4, 20)})), "tensor 'B/0' is missing"),
    "R of another shape": (
        in_tensors(lambda t: t.update({"R/4": torch.ones(1, 2, 4)})),
        r"'R/4' has shape \(1, 2, 4\)",
    ),
    "R of integers": (
        in_tensors(lambda t: t.update({"R/4": t["R/4"].int()})),
        "'R/4' has shape .* and int32, must have",
    ),
    "probes in fp64": (in_tensors(lambda t: t.update({"probe/4": t["probe/4"].double()})), "'probe/4' has .* float64"),
    "a foreign tensor": (
        in_tensors(lambda t: t.update({"x": torch.ones(1)})),
        "header does not mention the tensor 'x'",
    ),
    "R not finite": (in_tensors(set_to("R/4", torch.nan)), "tensor 'R/4' has NaN or Inf"),
    "probes not finite": (in_tensors(set_to("probe/4", torch.inf)), "tensor 'probe/4' has NaN or Inf"),
    "a head not finite": (
        in_tensors(set_to("model/3.bias", torch.nan)),
        r"3\.bias: has values in the file that are NaN or Inf",
    ),
    "all zeros": (
        in_tensors(lambda t: [v.zero_() for v in t.values()]),
        "different weights|were made with",
    ),
    "a head of integers": (
        in_tensors(lambda t: t.update({"model/3.bias": t["model/3.bias"].long()})),
        r"3\.bias: is of torch\.int64 in the file, must be of torch\.float32",
    ),
    "a head with a part too many": (
        in_tensors(lambda t: t.update({"model/3.scale": torch.ones(1)})),
        "model: has no tensor '3.scale'",
    ),
    "an init unknown here": (in_layer(init="pissa"), "module '0': init: got 'pissa'"),
    "an init that has no factors": (in_layer(init="given"), "tensor 'A/0' is missing"),
    "alpha missing": (lambda p: edited(p, lambda h, t: h["layer"].pop("alpha")), "alpha is missing in the header"),
    "a field too many": (in_layer(beta=1), "beta is not known in the header"),
    "alpha null": (in_layer(alpha=None), "alpha: got None, must be a finite number"),
    "alpha infinite": (in_layer(alpha=float("inf")), "alpha: got inf, must be a finite number"),
    "rank a string": (
        lambda p: edited(p, lambda h, t: h["modules"]["2"].update(rank="3")),
        "module '2': rank: got '3'",
    ),
    "rank a truth": (in_layer(rank=True), "module '0': rank: got True"),
    "dropout of one": (in_layer(dropout=1.0), r"dropout: got 1\.0, must be in \[0, 1\)"),
    "a seed of fractions": (in_layer(seed=0.5), r"seed: got 0\.5, must be an integer"),
    "a seed without end": (in_layer(seed=10**40), "seed: got 1000.* must be an integer of at most 128 bits"),
    "iterations without end": (in_layer(n_iter=10**6), "n_iter: got 1000000, must be an integer from 0 to 1000"),
    "a block without end": (in_layer(block=10**9), "block: got 1000000000, must be"),
    "a block below the rank": (
        in_layer(block=2),
        "module '0': block: got 2, must be at least the rank, 4",
    ),
    "a seed that scikit-learn does not take": (
        in_layer(init="sklearn", n_iter=5, seed=2**32),
        "scikit-learn does not take n_iter 5 and seed 4294967296",
    ),
    "scikit-learn without iterations": (in_layer(init="sklearn", n_iter=None), "does not take n_iter None and seed 0"),
    "an unknown method": (in_layer(method="lanczos"), "method: got 'lanczos'"),
    "an unknown tier": (in_layer(tier="fast"), "tier: got 'fast', must be|tier is not known in the header"),
    "a field of another version": (
        lambda p: edited(
            p, lambda h, t: h["layer"].pop("tier") if h["version"] < 3 else h["layer"].update(tier="standard")
        ),
        "tier is (missing|not known) in the header",
    ),
    "a rounding to no float": (in_layer(rounded=["int8"]), r"rounded: got \('int8',\)|rounded is not known"),
    "roundings without end": (in_layer(rounded=["bfloat16"] * 9), "rounded: got .* at most 8|rounded is not known"),
    "an unknown dtype": (in_layer(dtype="int8"), "dtype: got 'int8', must be one of bfloat16"),
    "a module of another model": (
        lambda p: edited(p, lambda h, t: h["modules"].update({"7": h["modules"].pop("2")})),
        "does not fit this model: model: has no module '7'",
    ),
    "a module that is no linear layer": (
        lambda p: edited(p, lambda h, t: h["modules"].update({"1": h["modules"].pop("2")})),
        "does not fit this model: module '1': got a ReLU",
    ),
}


@pytest.mark.parametrize("case", [*NO_ADAPTERS, *DAMAGES])
@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("attached", [False, True])
def test_damaged_files_are_refused_by_name_and_nothing_changes(trained, case, version, attached):
    damage, message = (NO_ADAPTERS | DAMAGES)[case]
    path = trained[1]
    if version == 1:
        shutil.copy(V1, path)
    damage(path)
    model = mlp()
    if attached:
        lx.attach(model, 4, target_modules=["0", "2"], rank_pattern={"2": 3}, modules_to_save=["3"])
        if "does not fit this model" in message:
            message = "error of delta W in|other modules than the model's"
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as refusal:
        lx.load_adapter(model, path)
    assert str(path) in str(refusal.value) and unchanged(model, state)
    assert any(isinstance(m, LoraXSLinear) for m in model.modules()) is attached


def test_every_flipped_bit_is_seen(trained):
    """A checksum of the whole file: of R, of the head, of alpha and the recipe, of the tensors' names."""
    path = trained[1]
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            lx.load_adapter(mlp(), path)
    path.write_bytes(whole)
    assert lx.load_adapter(mlp(), path)


def test_a_checksum_that_is_none_is_refused(trained):
    path, whole = trained[1], trained[1].read_bytes()
    digest = re.search(rb"[0-9a-f]{64}", whole)[0]
    for other in (b"\\\\ud800" * 9 + b"a", b"G" * 64):
        path.write_bytes(whole.replace(digest, other))
        with pytest.raises(ValueError, match=f"{path}: is damaged: its header has .* for a SHA-256"):
            lx.load_adapter(mlp(), path)


def test_a_file_that_is_replaced_while_it_is_opened_is_no_damaged_one(trained, monkeypatch):
    """A reader finds the old file or the new one, whole, in whichever moment another one takes its place."""
    model, path = trained
    lx.save_adapter(randomise(model), other := path.with_name("other"))
    own, opened = safetensors.safe_open, []

    def replacing(*args, **options):
        opened.append(own(*args, **options))
        if len(opened) == 1:
            os.replace(other, path)
        return opened[-1]

    monkeypatch.setattr(safetensors, "safe_open", replacing)
    assert worst_error(lx.load_adapter(mlp(), path), deltas(model)) == 0 and len(opened) == 2


def test_a_file_that_is_written_over_in_place_changes_nothing_that_was_read(trained):
    """As cp does it, while A and B are computed."""
    _, path = trained
    tensors = tensors_of(unsealed(path, "loraxs", "adapter")[1], path)
    before = {key: t.clone() for key, t in tensors.items()}
    with open(path, "r+b") as f:
        f.write(b"\x11" * path.stat().st_size)
    assert tensors and all(torch.equal(t, before[key]) for key, t in tensors.items())


def test_values_that_a_head_cannot_hold_are_refused(tmp_path):
    """A parameter that is Inf here is damage; a buffer may be of Inf, as masks are."""

    def model(dtype):
        m = mlp().to(dtype)
        m[3].register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        return m

    path = tmp_path / "a.safetensors"
    m = lx.attach(model(torch.float32), 4, target_modules=["0"], modules_to_save=["3"], init="random")
    m[3].bias.data[1] = 1e5
    lx.save_adapter(m, path)
    assert torch.equal(lx.load_adapter(model(torch.float32), path)[3].bias, m[3].bias)
    with pytest.raises(ValueError, match=r"3\.bias: has values in the file that are NaN or Inf in torch\.float16"):
        lx.load_adapter(model(torch.float16), path)
    m[0].R.data[0] = 3e38
    with pytest.raises(ValueError, match=r"module '0': .* R has values too large for a file \(up to 3\.0e\+38\)"):
        lx.save_adapter(m, path)
    nn.init.zeros_(m[0].R)
    m[0].scaling = 7.0
    with pytest.raises(ValueError, match=r"module '0': scaling is 7\.0, must be alpha / rank = 1\.0"):
        lx.save_adapter(m, path)
    m[0].alpha = float("nan")
    with pytest.raises(ValueError, match="alpha: got nan for module '0', must be a finite number"):
        lx.save_adapter(m, path)
    m[0].alpha = 28.0
    m[3].bias.data[1] = torch.inf
    with pytest.raises(ValueError, match=r"tensor '3\.bias' has NaN or Inf values; nothing was written"):
        lx.save_adapter(m, path)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_in_another_dtype_brings_its_own_roundings(minilm, tmp_path, assign):
    """A and B of an fp32 model, in one that was attached in bf16: they are not what its weights gave."""
    base, path = copy.deepcopy(minilm), tmp_path / "a.safetensors"
    source = randomise(lx.attach(copy.deepcopy(base), 16, target_modules=TARGETS))
    model = lx.attach(minilm.bfloat16(), 16, target_modules=TARGETS)
    model.load_state_dict(source.state_dict(), assign=assign)
    if assign:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lx.save_adapter(model, path)
    else:
        with pytest.warns(UserWarning, match="were made from weights in float32, rounded to bfloat16 since"):
            lx.save_adapter(model, path)
    assert worst_error(lx.load_adapter(base, path), deltas(model)) < 1e-3


def test_an_adapter_of_an_fp64_model_takes_the_dtype_of_an_fp32_one(tmp_path):
    model = randomise(lx.attach(mlp().double(), 4, target_modules=["0"]))
    lx.save_adapter(model, tmp_path / "a.safetensors")
    loaded = lx.load_adapter(mlp(), tmp_path / "a.safetensors")
    assert {loaded[0].A.dtype, loaded[0].R.dtype} == {torch.float32} and worst_error(loaded, deltas(model)) < 1e-5


def test_A_and_B_put_in_place_of_meta_ones_are_compared_with_their_recipe(tmp_path):
    """As from_pretrained of transformers puts them, in a class that attaches in its __init__."""
    source = randomise(lx.attach(mlp(), 4, seed=3))
    with torch.device("meta"):
        model = lx.attach(mlp(), 4)
    for name, t in source.state_dict().items():
        module, _, own = name.rpartition(".")
        held = model.get_submodule(module)
        setattr(held, own, nn.Parameter(t) if own in held._parameters else t)
    with pytest.warns(UserWarning, match="A and B of 3 modules, .* are not what their recipe makes"):
        lx.save_adapter(model, tmp_path / "a")
    fresh, x = lx.load_adapter(mlp(), tmp_path / "a"), torch.randn(3, 20)
    torch.testing.assert_close(fresh(x), source(x))


def test_any_move_of_dtype_is_taken(trained):
    model, path = trained
    for _ in range(70):
        model.to(torch.bfloat16).to(torch.float16)
    model.float()
    assert model[0].recipe.rounded == ("bfloat16", "float16")
    with pytest.warns(UserWarning, match="made from weights in float32, rounded to bfloat16"):
        lx.save_adapter(model, path)
    assert worst_error(lx.load_adapter(mlp(), path), deltas(model)) < 1e-3
    model.to(torch.float8_e4m3fn).float()
    with pytest.warns(UserWarning, match="are not what their recipe makes"):
        lx.save_adapter(model, path)
    assert worst_error(lx.load_adapter(mlp(), path), deltas(model)) < 1e-3


@pytest.mark.parametrize("file", [V1, V2], ids=["1, tier standard", "2, tier precise"])
def test_files_of_earlier_versions_load(file, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lx.load_adapter(mlp(), file)
        lx.save_adapter(model, tmp_path / "again.safetensors")
    assert worst_error(lx.load_adapter(mlp(), tmp_path / "again.safetensors"), deltas(model)) == 0
    with safetensors.safe_open(file, framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    assert torch.equal(model[0].R, tensors["R/4"][0]) and torch.equal(model[2].R, tensors["R/3"][0])
    assert torch.equal(model[3].weight, tensors["model/3.weight"]) and model[2].scaling == 8 / 3
    assert model[2].recipe.method == {V1: "krylov", V2: "chebyshev"}[file]  # in V2 by its name of then, "subspace"


def test_what_is_refused_late_changes_nothing(minilm, tmp_path):
    """A warning that is made an error, and the file of a single layer for a linear layer, which nothing can replace."""
    base = copy.deepcopy(minilm).bfloat16()
    head = ["pooler"]
    path = tmp_path / "a.safetensors"
    lx.save_adapter(
        randomise(lx.attach(minilm, 8, target_modules=["query"], modules_to_save=head)), path, portable=True
    )
    state = copy.deepcopy(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="R was aligned"):
            lx.load_adapter(base, path)
    assert unchanged(base, state) and all(p.requires_grad for p in base.parameters())

    layer = LoraXSLinear.from_linear(nn.Linear(6, 5), 2)
    nn.init.normal_(layer.R)
    lx.save_adapter(layer, path)
    linear = copy.deepcopy(layer.base_layer)
    with pytest.raises(ValueError, match="the file holds the adapter of a single LoraXSLinear"):
        lx.load_adapter(linear.requires_grad_(True), path)
    assert linear.weight.requires_grad and "loraxs" not in vars(linear)
    again = lx.load_adapter(LoraXSLinear.from_linear(linear, 2), path)
    assert torch.equal(again.R, layer.R)


def test_missing_files_and_folders(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lx.load_adapter(mlp(), tmp_path / "nowhere.safetensors")
    (tmp_path / "README.md").mkdir()
    with pytest.raises(ValueError, match=r"README\.md is a folder, must be the name of a file"):
        lx.save_adapter(trained[0], f"{tmp_path}/")
    lx.save_adapter(trained[0], tmp_path / "new" / "folder" / "a.safetensors")
    assert lx.load_adapter(mlp(), tmp_path / "new" / "folder" / "a.safetensors")


def test_a_file_that_is_no_adapter_is_not_replaced(trained, tmp_path):
    thesis = tmp_path / "thesis.txt"
    weights = tmp_path / "model" / "adapter.safetensors"
    weights.parent.mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, weights)
    thesis.write_text("chapter 1")
    for path, file in ((thesis, thesis), (weights, weights), (weights.parent, weights)):
        before = file.read_bytes()
        with pytest.raises(
            ValueError, match=f"path: {re.escape(str(file))} is there and is damaged or no LoRA-XS adapter"
        ):
            lx.save_adapter(trained[0], path)
        assert file.read_bytes() == before and [*weights.parent.iterdir()] == [weights]


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(trained):
    model, path = trained
    old = path.read_bytes()
    model[2].R.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="module '2': R has NaN or Inf values; nothing was written"):
        lx.save_adapter(model, path)
    with pytest.raises(ValueError, match=r"dtype: got torch\.float16"):
        lx.save_adapter(model, path, dtype=torch.float16)
    with pytest.raises(ValueError, match="has no LoRA-XS adapters"):
        lx.save_adapter(mlp(), path)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_at_any_moment_leaves_the_old_file_whole(trained, moment):
    _, path = trained
    old = path.read_bytes()
    script = f"""
import os, signal, sys
import loraxs_kernels as lx
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_adapter_file import mlp, randomise
model = randomise(lx.attach(mlp(), 4, target_modules=["0"]))
os.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
lx.save_adapter(model, {str(path)!r})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert path.read_bytes() == old
    lx.load_adapter(mlp(), path)


def test_a_failing_disk_leaves_the_old_file_and_no_rubbish(trained, monkeypatch):
    model, path = trained
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        lx.save_adapter(randomise(model), path)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


class Doubled(nn.Module):
    def forward(self, R):
        return 2 * R

    def right_inverse(self, R):
        return R / 2


def test_parametrised_R(trained):
    model, path = trained
    other = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3})
    parametrize.register_parametrization(other[0], "R", Doubled())
    lx.load_adapter(other, path)
    torch.testing.assert_close(other[0].R, model[0].R)
    lx.save_adapter(other, path)
    assert torch.equal(lx.load_adapter(mlp(), path)[0].R, other[0].R)

    refusing = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3})
    parametrize.register_parametrization(refusing[2], "R", Doubled())
    refusing[2].parametrizations.R[0].right_inverse = Mock(side_effect=RuntimeError("not today"))
    state = copy.deepcopy(refusing.state_dict())
    with pytest.raises(RuntimeError, match="not today"):
        lx.load_adapter(refusing, path)
    assert unchanged(refusing, state) and refusing[0].scaling == 1.0

    class Fixed(nn.Module):
        def forward(self, R):
            return R * 0

    parametrize.register_parametrization(other[2], "R", Fixed())
    with pytest.raises(ValueError, match="the parametrization of R in module '2' has no right_inverse"):
        lx.load_adapter(other, path)


class Symmetric(nn.Module):
    def forward(self, R):
        return R.triu() + R.triu(1).mT

    def right_inverse(self, R):
        return R.triu()


def test_a_parametrization_that_cannot_express_R_is_refused(trained):
    model, path = trained
    other = lx.attach(mlp(), 4, target_modules=["0", "2"], rank_pattern={"2": 3})
    parametrize.register_parametrization(other[2], "R", Symmetric())
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"parametrization of R in module '2' \(Symmetric\) cannot express the R"):
        lx.load_adapter(other, path)
    assert unchanged(other, state)
    with torch.no_grad():
        model[2].R.copy_(model[2].R + model[2].R.mT)  # which it can
    lx.save_adapter(model, path)
    assert torch.equal(lx.load_adapter(other, path)[2].R, model[2].R)


@pytest.mark.parametrize("pruned", [prune.identity, lambda layer, name: nn.utils.weight_norm(layer, name)])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_R_that_a_hook_makes_is_refused(trained, tmp_path, pruned):
    """It is as it was in the last forward: what the optimizer did since would be lost, and so would what is loaded."""
    model, path = trained
    pruned(model[0], "R")
    folder = tmp_path / "out"
    for use in (
        lambda: lx.save_adapter(model, folder / "a.safetensors"),
        lambda: lx.load_adapter(model, path),
        lambda: lx.merge(model),
        lambda: lx.detach(model, merge=True),
        lambda: export_as_lora(model, folder),
    ):
        with pytest.raises(ValueError, match=r"module '0'(: R is made by a hook .*prune\.remove| has a hook)"):
            use()
    assert not folder.exists() and not model[2].merged


def test_a_module_with_two_names_is_one_where_its_adapter_is_loaded(tmp_path):
    block, path = nn.Linear(8, 8), tmp_path / "a.safetensors"
    model = nn.Sequential(block, nn.ReLU(), block)
    fresh, two = copy.deepcopy(model), nn.Sequential(copy.deepcopy(block), nn.ReLU(), copy.deepcopy(block))
    lx.save_adapter(randomise(lx.attach(model, 4)), path)
    with pytest.raises(ValueError, match="modules '0' and '2' are two here, but are one in the model"):
        lx.load_adapter(two, path)
    x = torch.randn(3, 8)
    assert torch.equal(lx.load_adapter(fresh, path)(x), model(x)) and inspected(path)["format_version"] == 4
    for shared in ([["2"]], {"9": ["8"]}, {"0": "2"}, {"0": [2]}):
        in_header(shared=shared)(path)
        with pytest.raises(ValueError, match=re.escape(f"is damaged: shared is {shared} in its header")):
            lx.load_adapter(two, path)


def test_one_R_does_not_take_two_values(trained):
    _, path = trained
    model = lx.attach(mlp(), 3, target_modules=["0", "2"])
    lx.save_adapter(randomise(model), path)
    other = lx.attach(mlp(), 3, target_modules=["0", "2"])
    other[2].R = other[0].R
    R = other[0].R.detach().clone()
    with pytest.raises(ValueError, match="modules '0' and '2' share one R here, and have two that differ in the file"):
        lx.load_adapter(other, path)
    assert torch.equal(other[0].R, R)
    model[2].R = model[0].R
    lx.save_adapter(model, path)
    assert torch.equal(lx.load_adapter(other, path)[2].R, model[0].R)


def test_the_vectors_that_sketches_and_probes_are_made_with_stay_the_same():
    """Or the files, banks and checkpoints of earlier versions would no longer be recognised."""
    one, W = torch.ones(1, 1), torch.tensor([[0.0, 1.0]])
    made = [*basis.sketch(one, one), basis.weight_probes(W), basis.mixing(3, torch.device("cpu"))]
    signs = ["".join("+-"[int(x < 0)] for x in t.flatten()) for t in made]
    assert signs == ["-++++--+", "-+-++-++", "+-++++++", "--++++--+"]


def test_alignment_turns_R_within_a_cluster_of_singular_values():
    """Two copies of one SVD whose equal singular values were turned, and one pair negated: delta W is kept."""
    U, V = torch.linalg.qr(torch.randn(50, 6)).Q, torch.linalg.qr(torch.randn(70, 6)).Q
    S = torch.tensor([9.0, 5.0, 5.0, 5.0, 2.0, 1.0])
    A, B, R = S[:, None] * V.T, U, torch.randn(6, 6)
    turn = torch.block_diag(torch.eye(1), torch.linalg.qr(torch.randn(3, 3)).Q, -torch.eye(1), torch.eye(1))
    A_new, B_new = turn @ A, B @ turn.T
    sketch = basis.sketch(A, B)
    turned = basis.align_by_sketch(R, S, sketch, A_new, B_new, basis.CLUSTER)
    torch.testing.assert_close(B_new @ turned @ A_new, B @ R @ A, atol=1e-4, rtol=1e-4)
    signs_only = basis.align_by_sketch(R, S, sketch, A_new, B_new, 0.0)
    assert basis.residual(basis.probes(A, R, B), A_new, signs_only, B_new) > basis.ALIGNED
    by_factors = basis.align_by_factors(R, (A, B), A_new, B_new)
    torch.testing.assert_close(B_new @ by_factors @ A_new, B @ R @ A, atol=1e-4, rtol=1e-4)
    entry = {"R": R, "S": S, "probe": basis.probes(A, R, B)}
    assert aligned(entry, A_new, B_new)[1] > basis.ALIGNED
    for kept in (dict(zip("UV", sketch, strict=True)), {"A": A, "B": B}):
        assert aligned(entry | kept, A_new, B_new)[1] < 1e-5


def test_the_residual_estimates_the_true_error():
    """Over many perturbations of very different size, the 8 probes are right to within their sampling error."""
    A, B, R = torch.randn(8, 300), torch.randn(200, 8), torch.randn(8, 8)
    expected = basis.probes(A, R, B)
    ratios = []
    for i in range(60):
        noise = 10.0 ** -(1 + i % 4) * torch.randn(8, 8)
        true = ((B @ noise @ A).norm() / (B @ (R + noise) @ A).norm()).item()
        ratios.append(basis.residual(expected, A, R + noise, B) / true)
    ratios = torch.tensor(ratios)
    assert 0.85 < ratios.square().mean().sqrt() < 1.15 and ratios.min() > 0.2 and ratios.max() < 2.5


def test_zero_adapters_and_rank_deficient_bases():
    A, B = torch.zeros(3, 10), torch.linalg.qr(torch.randn(8, 3)).Q
    assert basis.residual(basis.probes(A, torch.ones(3, 3), B), A, torch.ones(3, 3), B) == 0.0
    sketch = basis.sketch(A, B)
    aligned = basis.align_by_sketch(torch.ones(3, 3), basis.singular_values(A), sketch, A, B, 0.0)
    assert aligned.isfinite().all()


def test_what_is_not_in_memory_or_has_no_place_in_a_file_is_refused_by_name(tmp_path):
    class WithExtraState(nn.Linear):
        def get_extra_state(self):
            return {"steps": 1}

    lx.save_adapter(lx.attach(nn.Sequential(nn.Linear(8, 8)), 2), tmp_path / "a")
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match=r"module '0' is not in memory \(meta device\); load its weights first"):
        lx.load_adapter(model, tmp_path / "a")
    assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(8, 8), WithExtraState(8, 3))
    lx.attach(model, 2, target_modules=["0"], modules_to_save=["1"])
    with pytest.raises(ValueError, match=r"1\._extra_state, of get_extra_state, has no place in an adapter file"):
        lx.save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
