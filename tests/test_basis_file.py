"""Basis files: `loraxs init` computes from a checkpoint what `attach` computes from the model, and it is checked."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels import basis_file
from loraxs_kernels.basis import weight_probes
from loraxs_kernels.basis_file import INDEX, make_basis, read_basis
from loraxs_kernels.cli import main
from loraxs_kernels.files import sealed, tensors_of, unsealed, write_atomically
from loraxs_kernels.linear import LoraXSLinear
from loraxs_kernels.recipe import Recipe


def model() -> nn.Module:
    torch.manual_seed(0)
    m = nn.Module()
    m.embed_tokens = nn.Embedding(50, 24)
    m.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(24, 60), "down": nn.Linear(60, 24)}) for _ in range(3))
    m.norm = nn.LayerNorm(24)
    return m


def factors(m: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in m.state_dict().items() if name.endswith((".A", ".B", ".R"))}


@pytest.fixture
def checkpoint(tmp_path):
    """A model of two shards, as save_pretrained leaves one."""
    folder = tmp_path / "toy"
    folder.mkdir()
    state = model().state_dict()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "stray.safetensors").write_bytes(b"of something else")
    return folder


def test_a_basis_file_gives_what_attach_computes(checkpoint, tmp_path, capsys):
    out = tmp_path / "basis.safetensors"
    options = ["--seed", "3", "--n-iter", "2", "--device", "cpu"]
    assert main(["init", str(checkpoint), "-r", "4", "-o", str(out), *options]) == 0
    assert "A and B of 6 modules" in capsys.readouterr().out
    assert main(["init", str(checkpoint / "a.safetensors"), "-r", "4", "-o", str(tmp_path / "part.safetensors")]) == 0
    assert read_basis(out).modules["layers.1.up"][1].n_iter == 2
    computed = lx.attach(model(), 4, target_modules=["up", "down"], seed=3, n_iter=2)
    read = lx.attach(model(), 4, target_modules=["up", "down"], basis=out)
    assert factors(computed).keys() == factors(read).keys() and len(factors(read)) == 18
    assert all(torch.equal(t, factors(computed)[name]) for name, t in factors(read).items())
    # The adapter trained on it needs the base model alone.
    for layer in read.modules():
        if isinstance(layer, LoraXSLinear):
            layer.R.data.normal_()
    lx.save_adapter(read, tmp_path / "adapter.safetensors")
    loaded = lx.load_adapter(model(), tmp_path / "adapter.safetensors")
    assert all(torch.equal(t, factors(read)[name]) for name, t in factors(loaded).items())


def test_names_that_differ_by_a_prefix_meet(checkpoint, tmp_path):
    make_basis(checkpoint, 4, tmp_path / "basis.safetensors", target_modules=["up"])
    found = read_basis(tmp_path / "basis.safetensors")
    assert found.find("layers.1.up") == found.find("model.layers.1.up") == "layers.1.up"
    whole = nn.Module()
    whole.model = model()
    lx.attach(whole, 4, target_modules=["up"], basis=tmp_path / "basis.safetensors")
    assert whole.model.layers[1].up.recipe.name == "model.layers.1.up"
    with pytest.raises(ValueError, match=r"has 3 modules, .* for module 'up'"):
        found.find("up")
    with pytest.raises(ValueError, match=r"basis: .* has no module for module 'layers.0.down'"):
        lx.attach(model(), 4, target_modules=["down"], basis=tmp_path / "basis.safetensors")


def test_names_that_transformers_has_changed_meet(tmp_path):
    """As of vision-language models, whose checkpoints on the Hub have the names of transformers 4."""
    ends = [f"layers.{i}.self_attn.q_proj" for i in (1, 11)]
    there = [f"{part}.{end}" for part in ("language_model.model", "vision.model") for end in ends]
    found = basis_file.Basis(tmp_path, "", dict.fromkeys(there, (4, Recipe())), None)
    here = [f"{part}.{end}" for part in ("model.language_model", "model.vision") for end in ends]
    assert list(map(found.find, here)) == there
    assert found.find(f"vision.{ends[1]}") == found.find(f"model.vision.encoder.{ends[1]}") == there[3]
    several = basis_file.Basis(tmp_path, "", dict.fromkeys((f"model.{ends[0]}", there[0]), (4, Recipe())), None)
    assert several.find(here[0]) == there[0]
    others = [f"model.audio.{ends[0]}", f"audio.encoder.{ends[0]}"]
    others += ["model.vision.layers.1.mlp.q_proj", "model.vision.layers.1.self_attn", f"model.vision.1.{ends[1]}"]
    for name in (*others, "vision.layers.2.self_attn.q_proj"):
        with pytest.raises(ValueError, match=f"basis: .* for module '{name}'; .* other names: attach w"):
            found.find(name)


@pytest.mark.parametrize("what", ["other weights", "another size", "rank", "init"])
def test_a_basis_that_does_not_fit_is_refused_and_the_model_is_as_it_was(checkpoint, tmp_path, what):
    make_basis(checkpoint, 4, tmp_path / "basis.safetensors")
    m, rank, init = model(), 4, "svd"
    if what == "other weights":
        with torch.no_grad():
            m.layers[2]["down"].weight.add_(0.05 * torch.randn(24, 60))
        message = r"weight of module .layers.2.down., .* has different weights than the base model of .*, .toy.; run"
    elif what == "another size":
        m.layers[2]["down"] = nn.Linear(50, 24)
        message = r"A of shape \(4, 60\) and B of shape \(24, 4\) for module 'layers.2.down', must be \(4, 50\) and"
    elif what == "rank":
        rank, message = 5, r"rank: got 5 for module 'layers.0.up', must be 4 as in the basis file"
    else:
        init, message = "random", "init: got 'random' together with basis"
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=message):
        lx.attach(m, rank, target_modules=["up", "down"], init=init, basis=tmp_path / "basis.safetensors")
    assert (
        all(torch.equal(t, before[name]) for name, t in m.state_dict().items())
        and m.state_dict().keys() == before.keys()
    )
    assert all(p.requires_grad for p in m.parameters())


def test_gpt2_stores_its_weights_the_other_way(tmp_path):
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    gpt2 = GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    gpt2.save_pretrained(tmp_path / "gpt2")
    for model in (tmp_path / "gpt2" / "model.safetensors", tmp_path / "gpt2"):
        names = make_basis(model, 4, tmp_path / "basis.safetensors")
        assert read_basis(tmp_path / "basis.safetensors").file.get_slice("h.0.mlp.c_fc.A").get_shape() == [4, 16]
    assert names == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    computed = lx.attach(copy.deepcopy(gpt2), 4, target_modules="all-linear")
    read = lx.attach(gpt2, 4, target_modules="all-linear", basis=tmp_path / "basis.safetensors")
    assert all(torch.equal(t, factors(computed)[name]) for name, t in factors(read).items())


def test_targets_dtype_and_what_is_read(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "basis.safetensors"
    opened = []
    real = basis_file.opened
    monkeypatch.setattr(basis_file, "opened", lambda path: opened.append(path.name) or real(path))
    with pytest.warns(UserWarning, match="target_modules: no module matches sideways"):
        make_basis(checkpoint, 4, out, target_modules=["up", "sideways"])
    with pytest.raises(ValueError, match=r"target_modules: got '\(', must be a regular expression: missing \)"):
        make_basis(checkpoint, 4, out, target_modules="(")
    opened.clear()
    names = make_basis(
        checkpoint,
        4,
        out,
        target_modules=["up", "down"],
        exclude_modules=["1.up"],
        dtype=torch.bfloat16,
    )
    assert len(names) == 5 and "layers.1.up" not in names and "stray.safetensors" not in opened
    with safe_open(out, framework="pt") as f:
        assert f.get_tensor("layers.0.up.A").dtype == torch.bfloat16
    m = lx.attach(model(), 4, target_modules=["down"], basis=out)
    assert m.layers[0]["down"].A.dtype == torch.bfloat16  # as the file says, in a model of fp32
    rank, recipe = read_basis(out).modules["layers.0.up"]
    assert (rank, recipe.method, recipe.block, recipe.n_iter) == (4, "krylov", 12, 5)


RANK = r"rank: got 30 for module 'layers\.\d\.\w+' of shape \d+ x \d+, must be at most 24; leave the module out"
BAD = {
    "no folder": (["nowhere", "-r", "4"], "model: nowhere is neither a safetensors file nor a folder"),
    "no name": (["", "-r", "4"], "model: got '', must be the path of a model"),
    "rank": (["toy", "-r", "30"], RANK),
    "no target": (["toy", "-r", "4", "--target-modules", "q"], r"target_modules: got \['q'\], which matches no"),
    "no matrix": (
        ["toy", "-r", "4", "--target-modules", "norm"],
        r"module 'norm' of toy has a weight of shape \(24,\)",
    ),
    "device": (["toy", "-r", "4", "--device", "cuda:77"], "device: got 'cuda:77', but torch sees"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_init_write_nothing(checkpoint, tmp_path, monkeypatch, capsys, case):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main(["init", *arguments, "-o", "basis.safetensors"]) == 1
    assert re.search(f"loraxs init: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "basis.safetensors").exists()


def test_all_linear_leaves_out_embeddings_alone(tmp_path):
    """As in attach: an expert that is shared is a linear layer, T5's bias by position is not."""
    matrices = ["embed_tokens", "0.relative_attention_bias", "lm_head", "shared", "0.shared_expert.up", "0.q_proj"]
    state = {f"{name}.weight": torch.randn(20, 24) for name in matrices} | {"norm.weight": torch.ones(24)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    names = make_basis(tmp_path, 4, tmp_path / "out" / "basis.safetensors")
    assert names == ["0.q_proj", "0.shared_expert.up"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantised_checkpoints_are_refused_and_not_skipped(tmp_path, dtype):
    state = {"0.gate.weight": torch.randn(8, 24), "0.q_proj.weight": torch.ones(20, 24).to(dtype)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"module '0.q_proj' of .* must be a matrix of bf16"):
        make_basis(tmp_path, 4, tmp_path / "basis.safetensors")
    assert make_basis(tmp_path, 4, tmp_path / "basis.safetensors", exclude_modules=["q_proj"]) == ["0.gate"]


def test_all_linear_leaves_out_what_is_too_small_for_the_rank(tmp_path):
    state = {"up.weight": torch.randn(32, 48), "gate.weight": torch.randn(1, 48)}  # as of some mixtures of experts
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="leaves out 1 modules .* for rank 4; the first is 'gate', of shape 1 x 48"):
        assert make_basis(tmp_path, 4, tmp_path / "basis.safetensors") == ["up"]
    with pytest.raises(ValueError, match="rank: got 4 for module 'gate' of shape 1 x 48, must be at most 1"):
        make_basis(tmp_path, 4, tmp_path / "basis.safetensors", target_modules=["up", "gate"])


def test_factors_past_the_range_of_fp16_are_refused(tmp_path):
    safetensors.torch.save_file({"up.weight": torch.full((32, 48), 3e4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"dtype: got float16 for A and B of module 'up', .* must be another dtype"):
        make_basis(tmp_path, 4, tmp_path / "basis.safetensors", dtype="float16")
    assert not (tmp_path / "basis.safetensors").exists()


def test_a_rank_that_is_no_integer_is_refused_before_anything_is_computed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(basis_file, "factor", lambda *_, **__: pytest.fail("computes"))
    for rank in ("4", None, 0, np.int64(4)):
        with pytest.raises(ValueError, match=r"rank: got .* for module 'layers.0.down', must be an integer of at"):
            make_basis(checkpoint, rank, tmp_path / "basis.safetensors")


def test_a_shard_that_is_missing_or_broken_is_named(checkpoint, tmp_path):
    whole = (checkpoint / INDEX).read_text()
    (checkpoint / INDEX).write_text(whole.replace("}}", ', "layers.3.up.weight": "b.safetensors"}}'))
    with pytest.raises(ValueError, match=r"names a tensor 'layers\.3\.up\.weight' in b\.safetensors, which has none"):
        make_basis(checkpoint, 4, tmp_path / "basis.safetensors")
    (checkpoint / INDEX).write_text(whole.replace("}}", ', "layers.3.inv_freq": "b.safetensors"}}'))
    make_basis(checkpoint, 4, tmp_path / "basis.safetensors")  # which needs no such tensor
    (checkpoint / INDEX).write_text(whole)
    (checkpoint / "b.safetensors").write_bytes((checkpoint / "b.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"b\.safetensors: is not a whole safetensors file"):
        make_basis(checkpoint, 4, tmp_path / "basis.safetensors")
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names b\.safetensors, which does not exist"):
        make_basis(checkpoint, 4, tmp_path / "basis.safetensors")


V1, V2 = (Path(__file__).parent / "data" / f"basis_v{version}.safetensors" for version in (1, 2))


def test_a_shard_that_is_replaced_meanwhile_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    def replace_shard(jobs, *more, **how):
        safetensors.torch.save_file({"other": torch.zeros(1)}, checkpoint / "a.safetensors")
        return factor(jobs, *more, **how)

    factor = basis_file.factor
    monkeypatch.setattr(basis_file, "factor", replace_shard)
    assert main(["init", str(checkpoint), "-r", "4", "-o", str(tmp_path / "basis.safetensors")]) == 1
    assert re.search(r"a\.safetensors: is damaged: tensor '.*' cannot be read", capsys.readouterr().err)


def test_adapters_and_files_of_this_library_are_no_checkpoint(tmp_path):
    safetensors.torch.save_file({"q.lora_A.weight": torch.randn(8, 16)}, tmp_path / "adapter_model.safetensors")
    for model in (V2, tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(FileNotFoundError, match="files of loraxs_kernels, and PEFT's adapters, do not count"):
            make_basis(model, 4, tmp_path / "basis.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_basis_in_bf16_serves_the_model_in_any_dtype(minilm, tmp_path, dtype):
    """A and B were rounded to bf16, as the recipe says: what is trained on them loads without the basis and with it."""
    minilm.to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    make_basis(
        tmp_path / "checkpoint", 16, tmp_path / "basis.safetensors", target_modules=["query", "intermediate.dense"]
    )
    base = minilm.to(dtype)
    targets = ["query", "intermediate.dense"]
    m = lx.attach(copy.deepcopy(base), 16, target_modules=targets, basis=tmp_path / "basis.safetensors")
    for layer in m.modules():
        if isinstance(layer, LoraXSLinear):
            assert layer.A.dtype == dtype and torch.equal(layer.A, layer.A.bfloat16().to(dtype))
            layer.R.data.normal_()
    lx.save_adapter(m, tmp_path / "adapter.safetensors")
    for basis in (None, tmp_path / "basis.safetensors"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = lx.load_adapter(copy.deepcopy(base), tmp_path / "adapter.safetensors", basis=basis)
        state = loaded.state_dict()
        # At most a rounding from what was trained: the SVD of the weight in another dtype is not the same to the bit.
        for name, t in m.state_dict().items():
            assert (state[name] - t).norm() <= 1e-3 * t.norm(), name
        if basis is not None:
            assert all(torch.equal(state[name], t) for name, t in m.state_dict().items())
    narrow = lx.attach(
        copy.deepcopy(base), 16, target_modules=targets, basis=tmp_path / "basis.safetensors", dtype=torch.bfloat16
    )
    lx.save_adapter(narrow, tmp_path / "narrow.safetensors")
    lx.load_adapter(copy.deepcopy(base), tmp_path / "narrow.safetensors", basis=tmp_path / "basis.safetensors")
    with pytest.raises(ValueError, match="basis: got a file for a model that has adapters already"):
        lx.load_adapter(loaded, tmp_path / "adapter.safetensors", basis=tmp_path / "basis.safetensors")


def test_a_basis_of_weights_that_are_rounded_since_is_refused_as_loading_would(checkpoint, tmp_path):
    out = tmp_path / "basis.safetensors"
    make_basis(checkpoint, 4, out)
    with pytest.raises(ValueError, match=r"made from weights in float32; run loraxs init with --weight-dtype bfloat16"):
        lx.attach(model().bfloat16(), 4, target_modules=["up", "down"], basis=out)
    assert main(["init", str(checkpoint), "-r", "4", "-o", str(out), "--weight-dtype", "bfloat16"]) == 0
    read = lx.attach(model().bfloat16(), 4, target_modules=["up", "down"], basis=out)
    computed = lx.attach(model().bfloat16(), 4, target_modules=["up", "down"])
    assert all(torch.equal(t, factors(computed)[name]) for name, t in factors(read).items())
    edited = model()
    edited.layers[0]["up"].weight.data.zero_()
    edited.layers[1]["up"].weight.data *= 1e-4
    safetensors.torch.save_file(edited.state_dict(), checkpoint / "a.safetensors")
    make_basis(checkpoint / "a.safetensors", 4, out)
    lx.detach(lx.attach(edited, 4, target_modules=["up", "down"], basis=out))
    edited.layers[1]["up"].weight.data[3] *= 1.001
    with pytest.raises(
        ValueError,
        match=r"the weight of module 'layers.1.up', with a relative error of \d\.\de-0\d, .* have changed since; run",
    ):
        lx.attach(edited, 4, target_modules=["up", "down"], basis=out)


def test_a_basis_of_version_1_serves(tmp_path):
    m = lx.attach(model(), 2, target_modules=["0.up", "1.down"], basis=V1)
    assert m.layers[0]["up"].recipe.rounded == ("bfloat16",) and m.layers[0]["up"].A.dtype == torch.bfloat16
    other = model()
    nn.init.normal_(other.layers[0]["up"].weight)
    with pytest.raises(ValueError, match=r"do not fit the weight of module 'layers\.0\.up'"):
        lx.attach(other, 2, target_modules=["0.up", "1.down"], basis=V1)
    path = tmp_path / "zero.safetensors"
    shutil.copy(V1, path)
    edited(path, lambda h, t: t["layers.0.up.A"].zero_())  # nothing but the weight tells
    with pytest.raises(ValueError, match=r"do not fit the weight of module 'layers\.0\.up'"):
        lx.attach(model(), 2, target_modules=["0.up", "1.down"], basis=path)


def test_a_basis_of_version_2_serves_and_its_tier_is_dropped(checkpoint, tmp_path):
    read = lx.attach(model(), 2, target_modules=["0.up", "1.down"], basis=V2)
    computed = lx.attach(model(), 2, target_modules=["0.up", "1.down"], dtype=torch.bfloat16)
    for name, t in factors(computed).items():
        torch.testing.assert_close(factors(read)[name], t, atol=1e-2, rtol=0)  # a rounding to bf16
    out = tmp_path / "basis.safetensors"
    make_basis(checkpoint, 2, out, target_modules=["0.up", "1.down"], dtype=torch.bfloat16)
    made = {name: (rank, replace(recipe, block=16)) for name, (rank, recipe) in read_basis(out).modules.items()}
    assert made == read_basis(V2).modules  # whose block was the default then
    shutil.copy(V2, out)
    edited(out, lambda h, t: h["recipe"].update(tier="fast"))
    with pytest.raises(ValueError, match=r"basis\.safetensors: is damaged: module .*: tier: got 'fast', must be"):
        read_basis(out)


def edited(path: Path, change) -> None:
    """Rewrite a basis file with a changed header or changed tensors, and the checksum that belongs to them."""
    header, f = unsealed(path, "loraxs_basis", "basis")
    tensors = tensors_of(f, path)
    change(header, tensors)
    if header["version"] == 1:
        safetensors.torch.save_file(tensors, path, {"loraxs_basis": json.dumps(header)})
    else:
        write_atomically(path, *sealed(tensors, "loraxs_basis", header))


DAMAGES = {
    "zeros": (lambda h, t: [v.zero_() for v in t.values()], "do not fit the weight of"),
    "not finite": (lambda h, t: t["layers.1.down.B"].fill_(torch.nan), "tensor 'layers.1.down.B' has NaN or Inf"),
    "no recipe": (lambda h, t: h.pop("recipe"), "does not describe them"),
    "no modules": (lambda h, t: h.update(modules={}), "has no modules"),
    "a module dropped": (
        lambda h, t: h["modules"].pop("layers.1.down"),
        "header does not mention the tensor 'layers.1.down.A'",
    ),
    "a module too many": (lambda h, t: h["modules"].update(x={}), "module 'x': tensor 'x.A' is missing"),
    "A of another shape": (
        lambda h, t: t.update({"layers.0.up.A": torch.ones(3, 24)}),
        r"'layers.0.up.A' is of shape \(3",
    ),
    "A in integers": (
        lambda h, t: t.update({"layers.0.up.A": torch.ones(2, 24).int()}),
        "'layers.0.up.A' .* dtype I32",
    ),
    "A and B of two dtypes": (
        lambda h, t: t.update({"layers.0.up.B": torch.ones(60, 2)}),
        "'layers.0.up.B' .* dtype F32",
    ),
    "init given": (lambda h, t: h["recipe"].update(init="given"), "init is 'given', must be 'svd'"),
    "rank": (lambda h, t: h["recipe"].update(rank=None), "rank: got None"),
    "iterations without end": (lambda h, t: h["recipe"].update(n_iter=10**6), "n_iter: got 1000000, must be"),
    "a name": (lambda h, t: h.update(base_model=None), "base_model is None in its header"),
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("version", [1, 3])
def test_damaged_basis_files_are_refused_by_name(checkpoint, tmp_path, case, version):
    change, message = DAMAGES[case]
    path = tmp_path / "basis.safetensors"
    if version == 1:
        shutil.copy(V1, path)
    else:
        make_basis(checkpoint, 2, path, target_modules=["0.up", "1.down"], dtype=torch.bfloat16)
    edited(path, change)
    m = model()
    with pytest.raises(ValueError, match=message) as refusal:
        lx.attach(m, 2, target_modules=["0.up", "1.down"], basis=path)
    assert str(path) in str(refusal.value)
    assert not any(isinstance(layer, LoraXSLinear) for layer in m.modules())


def test_every_flipped_bit_of_a_basis_is_seen(checkpoint, tmp_path):
    path = tmp_path / "basis.safetensors"
    make_basis(checkpoint, 2, path, target_modules=["0.up"], dtype=torch.bfloat16)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_basis(path)


def test_only_a_basis_is_written_over(checkpoint):
    before = {file: file.read_bytes() for file in checkpoint.iterdir()}
    for model, out in itertools.product((checkpoint, checkpoint / "a.safetensors"), before):
        with pytest.raises(ValueError, match=f"out: {out} is there and is damaged or no LoRA-XS basis"):
            make_basis(model, 4, out)
    assert {file: file.read_bytes() for file in checkpoint.iterdir()} == before
    out = checkpoint / "basis.safetensors"
    out.touch()  # as mktemp does
    make_basis(checkpoint, 4, out, target_modules=["0.up"])
    make_basis(checkpoint, 2, out, target_modules=["0.up"])  # it is no file of the checkpoint
    assert read_basis(out).modules["layers.0.up"][0] == 2


def test_the_weights_are_those_that_transformers_reads(tmp_path):
    one, other = torch.randn(20, 24), torch.randn(20, 24)
    for name, W in (("a", one), ("z", other)):
        safetensors.torch.save_file({"up.weight": W}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "basis.safetensors"
    with pytest.raises(ValueError, match=r"two files have a tensor 'up\.weight', the second is .*z\.safetensors"):
        make_basis(tmp_path, 4, out)
    (tmp_path / "a.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"up.weight": "z.safetensors"}}')
    for _ in range(2):  # the second time beside a basis
        make_basis(tmp_path, 4, out)
        with safe_open(out, framework="pt") as f:
            torch.testing.assert_close(f.get_tensor("up.W"), weight_probes(one))


def test_files_that_are_no_basis_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="basis: there is no file"):
        read_basis(tmp_path / "none.safetensors")
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({"x": torch.ones(2)}, plain)
    with pytest.raises(ValueError, match="but no LoRA-XS basis"):
        read_basis(plain)
    for header, message in (
        ('{"version": 9}', "is of format version 9"),
        ("[", "is damaged"),
        ('{"version": 1, "base_model": "", "recipe": {"rank": 4}, "modules": {"x": {}}}', "is damaged: module 'x'"),
    ):
        safetensors.torch.save_file({"x": torch.ones(2)}, plain, {"loraxs_basis": header})
        with pytest.raises(ValueError, match=message):
            read_basis(plain)
