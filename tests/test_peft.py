"""LoRA-XS as a PEFT method: what people do with PEFT adapters, on small models of real architectures."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from helpers import assert_all_or_nothing, interrupted_at
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from test_adapter_file import mlp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import loraxs_kernels as lx
import loraxs_kernels.route
from loraxs_kernels.card import ABOUT
from loraxs_kernels.integrations import peft as loraxs_peft  # skips nothing: peft is a requirement of the tests
from loraxs_kernels.integrations.peft.merging import Unmerged
from loraxs_kernels.integrations.peft.mixed import alike
from loraxs_kernels.integrations.peft.samples import MixedCalls
from loraxs_kernels.matching import classification_head
from loraxs_kernels.padding import readable_columns

LoraXSConfig, LoraXSLinearLayer = loraxs_peft.LoraXSConfig, loraxs_peft.LoraXSLinearLayer

IDS = torch.arange(20).view(2, 10) % 17
LLAMA = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def llama(**changes) -> LlamaForCausalLM:
    """The same small model at every call."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | {"num_key_value_heads": 2} | changes))).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def config(**changes) -> LoraXSConfig:
    return LoraXSConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def layers(model: nn.Module) -> dict[str, LoraXSLinearLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraXSLinearLayer)}


@torch.no_grad()
def randomise(model: nn.Module, adapter: str = "default", std: float = 0.5) -> nn.Module:
    for layer in layers(model).values():
        if adapter in layer.loraxs_R:
            layer.loraxs_R[adapter].normal_(std=std)
    return model


@pytest.fixture
def trained():
    return randomise(get_peft_model(llama(), config(rank_pattern={"down_proj": 3}, lora_alpha=8))).eval()


@pytest.fixture
def saved(trained, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def snapshot(model: nn.Module):
    return (
        [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
    )


def edited(folder, **fields):
    """Edit adapter_config.json; None takes a field out."""
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))


def rewritten(folder, change):
    """Change the tensors of a folder, which then has no checksum, as those of earlier versions."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    edited(folder, sha256=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_what_attach_computes_to_the_bit(dtype):
    ours = lx.attach(llama().to(dtype), 4, target_modules="all-linear", alpha=8)
    model = get_peft_model(llama().to(dtype), config(lora_alpha=8))
    adapters = layers(model.base_model.model)
    assert len(adapters) == 14
    for name, layer in adapters.items():
        other = ours.get_submodule(name)
        assert (layer.out_features, layer.in_features) == tuple(layer.base_layer.weight.shape)
        assert layer.loraxs_R["default"].dtype == torch.float32 and layer.loraxs_A["default"].dtype == dtype
        assert torch.equal(layer.loraxs_R["default"], other.R) and torch.equal(layer.loraxs_A["default"], other.A)
        assert torch.equal(layer.loraxs_B["default"], other.B)
        with torch.no_grad():
            other.R.copy_(layer.loraxs_R["default"].normal_(std=0.5))
    y, expected = model(IDS).logits, ours(IDS).logits
    assert torch.equal(y, expected) and not torch.equal(y, llama().to(dtype)(IDS).logits)
    y.float().sum().backward()
    expected.float().sum().backward()
    for name, layer in adapters.items():
        assert torch.equal(layer.loraxs_R["default"].grad, ours.get_submodule(name).R.grad)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 14 and all(name.endswith("loraxs_R.default") for name in trainable)


def test_the_file_holds_R_and_a_fingerprint_alone(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert len(tensors) == 28 and kinds == {"loraxs_R", "loraxs_fingerprint"}
    assert sum(t.numel() for key, t in tensors.items() if key.endswith("R")) == 12 * 16 + 2 * 9
    written = json.loads((saved / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORAXS"
    assert written["svd_recipe"]["3 32x48"] == {"method": "krylov", "block": 11, "n_iter": 5}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_gives_the_same_model(trained, saved, low_cpu_mem_usage):
    loaded = PeftModel.from_pretrained(llama(), saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(trained))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(layer.unchecked for layer in layers(loaded).values())
    assert any(p.requires_grad for p in PeftModel.from_pretrained(llama(), saved, is_trainable=True).parameters())


def test_bf16_base_loads_R_unrounded(tmp_path):
    model = randomise(get_peft_model(llama().bfloat16(), config()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    for a, b in zip(layers(model).values(), layers(loaded).values(), strict=True):
        assert (
            torch.equal(a.loraxs_R["default"], b.loraxs_R["default"]) and a.loraxs_A["default"].dtype == torch.bfloat16
        )
    assert torch.equal(logits(loaded), logits(model))


def test_a_file_says_what_the_svd_did_whatever_is_the_default_later(saved, trained, monkeypatch):
    def tomorrow(rank, shape, **given):
        raise AssertionError("the defaults of another day were asked for")

    monkeypatch.setattr(loraxs_peft.tuner, "plan", tomorrow)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved)), logits(trained))


@pytest.fixture
def saved_with_base(trained, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    for c in trained.peft_config.values():
        c.base_model_name_or_path = str(tmp_path / "base")
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_auto_peft_model(trained, saved_with_base):
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved_with_base / "adapter")
    assert torch.equal(logits(loaded), logits(trained))


@pytest.mark.usefixtures("transformers_takes_peft")
def test_transformers_own_loading(trained, saved_with_base):
    expected = logits(trained)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved_with_base / "adapter")), expected)
    model = AutoModelForCausalLM.from_pretrained(saved_with_base / "base")
    model.load_adapter(str(saved_with_base / "adapter"), adapter_name="mine")
    assert torch.equal(logits(model), expected)
    assert not any(layer.unchecked for layer in layers(model).values())  # checked at the first forward
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.usefixtures("transformers_takes_peft")
def test_a_failed_add_adapter_can_be_tried_again():
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"module 'model.layers.0.mlp.down_proj'"):
        model.add_adapter(config())
    rest = dict(exclude_modules=["down_proj"])
    model.add_adapter(config(**rest))
    assert len(layers(model)) == 12
    with pytest.raises(ValueError, match="rank: got 99"):
        model.add_adapter(config(r=99, **rest), "second")
    assert list(model.peft_config) == ["default"]
    model.add_adapter(config(r=3, **rest), "second")


@pytest.mark.usefixtures("transformers_takes_peft")
def test_transformers_add_adapter_trains_and_saves(tmp_path):
    model = llama()
    model.add_adapter(config(target_modules=["q_proj", "v_proj"]), adapter_name="mine")
    randomise(model, "mine")
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), logits(model)) and not torch.equal(logits(model), logits(llama()))


def test_another_base_model_is_refused_and_stays_unusable(saved):
    torch.manual_seed(7)
    other = LlamaForCausalLM(llama().config)
    with pytest.raises(lx.AdapterMismatch, match=r"module 'model.layers.0.self_attn.q_proj'"):
        PeftModel.from_pretrained(other, saved)
    with pytest.raises(lx.AdapterMismatch):  # caught or not, nothing is computed with it
        other(IDS)
    unchecked = json.loads((saved / "adapter_config.json").read_text()) | {"check_fingerprint": False}
    (saved / "adapter_config.json").write_text(json.dumps(unchecked))
    torch.manual_seed(7)
    assert logits(PeftModel.from_pretrained(LlamaForCausalLM(llama().config), saved)).isfinite().all()


@pytest.mark.usefixtures("transformers_takes_peft")
def test_a_base_in_another_dtype_is_refused_as_that(trained, saved):
    """Also by transformers' own loading, and by a file that says nothing of it, as those of earlier versions."""
    message = "were made from weights in float32, this model's from weights in bfloat16"
    with pytest.raises(lx.AdapterMismatch, match=rf"{message}.* the model in float32 \(and quantised, if it was\)"):
        PeftModel.from_pretrained(llama().bfloat16(), saved)
    with pytest.raises(lx.AdapterMismatch, match=message):
        other = llama().bfloat16()
        other.load_adapter(str(saved))
        other(IDS)
    loaded = PeftModel.from_pretrained(llama(), saved, is_trainable=True)
    loaded.save_pretrained(saved.parent / "again")
    assert PeftConfig.from_pretrained(saved.parent / "again").weight_dtype == "float32"
    other = dataclasses.replace(trained.peft_config["default"], r=2)  # for another model
    assert get_peft_model(llama().bfloat16(), other).peft_config["default"].weight_dtype == "bfloat16"
    old = json.loads((saved / "adapter_config.json").read_text())
    assert old.pop("weight_dtype") == trained.peft_config["default"].weight_dtype == "float32"
    (saved / "adapter_config.json").write_text(json.dumps(old))
    with pytest.raises(lx.AdapterMismatch, match="the weights were edited, quantised or converted to another dtype"):
        PeftModel.from_pretrained(llama().bfloat16(), saved)


def test_an_adapter_of_a_base_that_was_converted_later_is_an_ordinary_one_again(tmp_path):
    """model.to() rounds A and B; a load makes them again, of the weights as they are, and files need not hold them."""
    saved = randomise(get_peft_model(llama().bfloat16(), config()))
    saved.save_pretrained(tmp_path)
    model = get_peft_model(llama(), config()).bfloat16()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), logits(saved))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adapter")
        model.save_pretrained(tmp_path / "again")
    assert len(load_file(tmp_path / "again" / "adapter_model.safetensors")) == 28
    assert torch.equal(logits(PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "again")), logits(saved))


def test_an_adapter_that_was_refused_leaves_the_others_usable(saved, tmp_path):
    def other():
        torch.manual_seed(7)
        return LlamaForCausalLM(llama().config).eval()

    model = randomise(get_peft_model(other(), config(r=3))).eval()
    model.save_pretrained(tmp_path / "own")
    y = logits(model)
    with pytest.raises(lx.AdapterMismatch, match="adapter 'foreign'"):
        model.load_adapter(saved, "foreign")
    assert torch.equal(logits(model), y)
    model.load_adapter(tmp_path / "own", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), y)
    model.set_adapter("foreign")
    for use in (lambda: model(IDS), model.merge_adapter):
        with pytest.raises(lx.AdapterMismatch, match="adapter 'foreign'"):
            use()
    with pytest.raises(lx.AdapterMismatch, match="adapter 'foreign'"):
        next(iter(layers(model).values())).get_delta_weight("foreign")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(other()))
    model.set_adapter("again")
    model.delete_adapter("foreign")
    model.add_adapter("foreign", config())
    model.set_adapter("foreign")
    torch.testing.assert_close(logits(model), logits(other()), atol=1e-3, rtol=0)


def flipped(at):
    """Flip the lowest bit of a byte of the weights."""

    def damage(folder):
        (path,) = folder.glob("adapter_model.*")
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def emptied(folder):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + bytes(len(data) - start))


def of_another_save(folder):
    randomise(get_peft_model(llama(), config(rank_pattern={"down_proj": 3}, lora_alpha=8)), std=0.4).save_pretrained(
        folder / "x"
    )
    (folder / "x" / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")


DAMAGES = {
    "a bit": (flipped(-9), r"adapter_model\.\w+: is damaged, or was not saved .*its SHA-256 is \w{64}"),
    "zeros": (emptied, r"adapter_model\.safetensors: is damaged, or was not saved together"),
    "another save": (of_another_save, r"adapter_model\.safetensors: is damaged, or was not saved together"),
    "alpha": (lambda f: edited(f, lora_alpha=9), r"adapter_config\.json: sha256: the fields are not those"),
    "no alpha": (lambda f: edited(f, lora_alpha=None), r"adapter_config\.json: sha256: the fields are not those"),
    "wrong type": (lambda f: edited(f, r="16"), r"adapter_config\.json: r: got '16', must be an integer"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_before_anything_is_changed(case, trained, saved):
    damage, message = DAMAGES[case]
    damage(saved)
    model = llama()
    before, y = snapshot(model), snapshot(trained)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, saved)
    with pytest.raises(ValueError, match=message):
        trained.load_adapter(saved, "second")
    assert snapshot(model) == before and snapshot(trained) == y


def test_a_damaged_pickle_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(trained))
    flipped(5000)(tmp_path)
    for sha256 in ({}, None):  # the file without checksum, too
        with pytest.raises(ValueError, match=r"adapter_model\.bin: is "):
            PeftModel.from_pretrained(llama(), tmp_path)
        (tmp_path / "adapter_model.bin").write_bytes(b"PK\3\4" + bytes(100))
        edited(tmp_path, sha256=sha256)


def test_what_users_edit_and_earlier_versions_wrote_still_loads(trained, saved):
    edited(saved, check_fingerprint=False, base_model_name_or_path="mine", loraxs_dropout=0.1, inference_mode=False)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved)), logits(trained))
    settings = LoraXSConfig.from_pretrained(saved)
    assert settings.sha256 == {} and dataclasses.replace(settings, r=2).r == 2
    edited(saved, sha256=None)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved)), logits(trained))


TIER = Path(__file__).parent / "data" / "peft_tier"  # saved by a version whose SVD had one


def test_a_folder_of_an_earlier_version_loads_and_its_tier_is_dropped(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(mlp(), TIER)
        settings = PeftConfig.from_pretrained(TIER)  # which asks for the class alone, as transformers does
    assert settings.svd_recipe == model.peft_config["default"].svd_recipe
    other = {"method": "subspace", "block": 8, "n_iter": 2, "tier": "standard"}  # a name of then
    there = LoraXSConfig(peft_type="LORAXS", svd_tier="standard", svd_recipe={"4 32x32": other})
    assert there.svd_recipe == {"4 32x32": {"method": "chebyshev", "block": 8, "n_iter": 2}}
    R = load_file(TIER / "adapter_model.safetensors")["base_model.model.0.loraxs_R"]
    assert torch.equal(model.base_model.model[0].loraxs_R["default"], R)
    model.save_pretrained(tmp_path / "new")
    assert "tier" not in (tmp_path / "new" / "adapter_config.json").read_text()
    x = torch.randn(3, 20)
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path / "new")(x), model(x))


@pytest.mark.parametrize("merged", [False, True])
def test_a_module_that_an_earlier_version_pickled(merged):
    """torch.save of a whole model: it holds this package's classes and hooks by their names of then."""
    file = Path(__file__).parent / "data" / "peft_module.pt"
    then = torch.load(file, weights_only=False)  # made when integrations/peft was one file
    model, x, y = then[f"merged={merged}"], then["x"], then["y"]
    torch.testing.assert_close(model(x), y)
    for layer in layers(model).values():
        assert layer.merged == merged and readable_columns(layer.loraxs_B["default"]) == 16
        if merged:
            layer.unmerge()
    assert torch.equal(model(x), then["merged=False"](x))
    twin = copy.deepcopy(model)
    twin.load_state_dict({key: t + 1 for key, t in model.state_dict().items() if "loraxs_R" in key}, strict=False)
    assert not torch.allclose(twin(x), y, atol=1e-2)


@pytest.mark.parametrize("recipe", [{}, {"svd_recipe": [{"tier": "standard"}]}], ids=["", "no dictionary"])
@pytest.mark.parametrize("tier", ["standard", "fast", []])
def test_another_tier_than_was_saved_is_refused(tmp_path, tier, recipe):
    shutil.copytree(TIER, tmp_path / "adapter")
    edited(tmp_path / "adapter", svd_tier=tier, **recipe)
    message = "svd_recipe: got" if tier == "standard" else "tier: got .* for svd_tier, must be"
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        LoraXSConfig.from_pretrained(tmp_path / "adapter")
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'svd_tier'"):
        config(svd_tier=tier)


def test_checksums_wherever_a_folder_comes_from(trained, tmp_path, monkeypatch):
    (tmp_path / "models--me--mine" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("0" * 40)
    hub = tmp_path / "models--me--mine" / "snapshots" / ("0" * 40)
    trained.save_pretrained(hub)  # as huggingface_hub keeps what it has downloaded
    trained.save_pretrained(hub / "deep")
    trained.save_pretrained(tmp_path / "outer" / "inner")
    asked, download = set(), loraxs_peft.config.hf_hub_download
    monkeypatch.setattr(
        loraxs_peft.config, "hf_hub_download", lambda repo, name, **how: asked.add(name) or download(repo, name, **how)
    )
    places = [
        (hub, "me/mine", {"cache_dir": tmp_path}),
        (tmp_path / "outer" / "inner", tmp_path / "outer", {"subfolder": "inner"}),
    ]
    for folder, name, where in places:
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), name, **where)), logits(trained))
        flipped(-9)(folder)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: is damaged"):
            PeftModel.from_pretrained(llama(), name, **where)
    assert asked == {"adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"}
    flipped(-9)(hub / "deep")
    with pytest.raises(ValueError, match=r"deep/adapter_model\.safetensors: is damaged"):
        LoraXSConfig.from_pretrained("me/mine", "deep", cache_dir=tmp_path)


def loaded_by(card: str, **where) -> nn.Module:
    """What the code in a model card makes, with these further options of PeftModel.from_pretrained."""
    code = card.partition("```python\n")[2].partition("```")[0]
    for option, value in where.items():
        code = re.sub(r"(PeftModel.from_pretrained\(.*)\)", rf"\1, {option}={str(value)!r})", code)
    names = {}
    exec(code, names)
    return names["model"].eval()


def test_a_model_card_says_what_it_is_and_how_to_load_it(trained, saved_with_base):
    folder = saved_with_base / "adapter"
    trained.base_model.model.config._name_or_path = str(saved_with_base / "base")
    trained.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("Model Card for Model ID", "Written by me"))
    trained.save_pretrained(folder)  # over it: each section once, and what users have written stays
    card = ModelCard.load(folder / "README.md")
    assert {"lora-xs", "loraxs_kernels", "transformers"} <= {*card.data.tags} and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation" and "Written by me" in card.text and "- PEFT " in card.text
    assert str(card).count("arxiv.org/abs/2405.17604") == str(card).count("```python") == 1
    beginning = f"# LoRA-XS adapter\n\n{ABOUT}\n\n```python\nimport loraxs_kernels.integrations.peft  # makes"
    assert (
        beginning in card.text
        and "\n```\n\nInstall both packages with `pip install loraxs_kernels peft`.\n" in card.text
    )
    assert torch.equal(logits(loaded_by(card.text)), logits(trained))
    base = AutoModelForCausalLM.from_pretrained(saved_with_base / "base")
    named = randomise(get_peft_model(base, config(), adapter_name="mine"), "mine").eval()
    named.save_pretrained(folder / "named")
    assert torch.equal(logits(loaded_by((folder / "named" / "README.md").read_text())), logits(named))
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    assert "LoRA-XS" not in (folder / "lora" / "README.md").read_text()


def test_pushed_to_the_hub_and_loaded_from_there(saved_with_base, tmp_path, monkeypatch):
    """The card is that of PEFT and ours, where transformers has put its own in the meantime."""
    from transformers.utils import hub

    commit = tmp_path / "cache" / "models--me--mine" / "snapshots" / ("0" * 40)
    (commit.parents[1] / "refs").mkdir(parents=True)
    (commit.parents[1] / "refs" / "main").write_text("0" * 40)

    def create_commit(self, repo_id, operations, **_):
        for each in operations:
            (commit / each.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(each.path_or_fileobj, commit / each.path_in_repo)

    api = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="me/mine"))
    api.create_commit = MethodType(create_commit, api)
    if hasattr(hub, "hf_api"):  # transformers 5.20
        monkeypatch.setattr(hub, "hf_api", lambda: api)
    else:
        monkeypatch.setattr(hub, "create_repo", api.create_repo)
        monkeypatch.setattr(hub, "create_commit", api.create_commit)
    generic = ModelCard("---\nlibrary_name: transformers\ntags: []\n---\n# pushed by transformers")
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: generic)
    base = AutoModelForCausalLM.from_pretrained(saved_with_base / "base", dtype=torch.bfloat16)
    model = randomise(get_peft_model(base, config())).eval()
    model.push_to_hub("mine")
    card = ModelCard.load(commit / "README.md")
    assert card.data.library_name == "peft" and {"lora-xs", "loraxs_kernels"} <= {*card.data.tags}
    assert 'PeftModel.from_pretrained(model, "me/mine")' in card.text and "pushed by transformers" in card.text
    assert torch.equal(logits(loaded_by(card.text, cache_dir=tmp_path / "cache")), logits(model))


def test_a_config_saved_by_itself_says_nothing_of_weights(trained, saved):
    settings = trained.peft_config["default"]
    settings.save_pretrained(saved)  # what transformers does before it writes new weights there
    assert list(json.loads((saved / "adapter_config.json").read_text())["sha256"]) == ["fields"]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved)), logits(trained))
    settings.save_pretrained(saved / "alone")
    assert LoraXSConfig.from_pretrained(saved / "alone") == dataclasses.replace(settings)
    LoraConfig(r=3).save_pretrained(saved / "of LoRA")
    assert LoraXSConfig.from_pretrained(saved / "of LoRA").r == 3  # PEFT's classes, too, read any method's
    for kind in (3, ["LORA"], "LORAYS"):
        edited(saved / "alone", peft_type=kind)
        with pytest.raises(ValueError, match=r"adapter_config\.json: peft_type is .*, must be the name of a method of"):
            LoraXSConfig.from_pretrained(saved / "alone")
    trained.peft_config["default"].task_type = None
    trained.save_pretrained(saved / "of no task")
    of_base = json.loads((saved / "of no task" / "adapter_config.json").read_text())["auto_mapping"]
    assert of_base["base_model_class"] == "LlamaForCausalLM"  # which AutoPeftModel asks for
    with pytest.raises(ValueError, match=r"save_directory: .* is a file"):
        settings.save_pretrained(saved / "adapter_model.safetensors")


LAST = "base_model.model.model.layers.1.mlp.down_proj"
OTHER = f"{LAST.replace('1', '2')}.loraxs"
UNFIT = {
    "nothing of ours": (lambda t: t.clear() or t.update(a=torch.ones(1)), r"has no R \(loraxs_R\) of any module"),
    "names that PEFT drops": (
        lambda t: [t.update({key.removeprefix("base_model."): t.pop(key)}) for key in list(t)],
        r"has no R \(loraxs_R\) of any module",
    ),
    "no R": (lambda t: t.pop(f"{LAST}.loraxs_R"), r"adapter 'default': has no R for module '.*1\.mlp\.down_proj'"),
    "no R nor fingerprint": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(LAST)],
        r"adapter 'default': has no R for module '.*1\.mlp\.down_proj'",
    ),
    "no R, and a tensor that PEFT drops": (
        lambda t: t.update(other=t.pop(f"{LAST}.loraxs_R")),
        r"adapter 'default': has no R for module '.*1\.mlp\.down_proj'",
    ),
    "no fingerprint": (lambda t: t.pop(f"{LAST}.loraxs_fingerprint"), "has no fingerprint of A and B for module"),
    "NaN": (lambda t: t[f"{LAST}.loraxs_R"].fill_(torch.nan), r"is damaged: tensor '.*loraxs_R' has NaN or Inf"),
    "integers": (
        lambda t: t.update({f"{LAST}.loraxs_R": torch.ones(3, 3, dtype=torch.int32)}),
        "is of torch.int32, must",
    ),
    "a number": (lambda t: t.update({f"{LAST}.loraxs_R": torch.ones(())}), r"has shape \(\), must be \(3, 3\)"),
    "another module": (
        lambda t: t.update({f"{OTHER}_R": torch.ones(3, 3)}),
        "has no fingerprint of A and B for module 'model.layers.2",
    ),
    "another module's fingerprint": (
        lambda t: t.update({f"{OTHER}_fingerprint": torch.ones(11)}),
        r"tensor 'model\.layers\.2\..*' belongs to no part",
    ),
    "another tensor": (
        lambda t: t.update({"base_model.model.model.other": torch.ones(1)}),
        r"tensor 'model\.other' belongs to no part",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_without_a_checksum(case, saved, low_cpu_mem_usage):
    change, message = UNFIT[case]
    rewritten(saved, change)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{message}"):
        PeftModel.from_pretrained(llama(), saved, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}, {"r": 2}],
    ids=str,
)
def test_a_vocabulary_of_another_size_is_loaded_with_the_adapter(changes, low_cpu_mem_usage, tmp_path, monkeypatch):
    """PEFT saves the embeddings with it, those that train twice; each model has other random values in the new rows.

    Extra state of the embeddings comes with them, but for the case in which PEFT does not save it.
    """
    said = []
    monkeypatch.setattr(nn.Embedding, "get_extra_state", lambda m: torch.ones(2))
    monkeypatch.setattr(nn.Embedding, "set_extra_state", lambda m, state: said.append(state))

    def larger(seed: int) -> nn.Module:
        base = llama()
        base.resize_token_embeddings(44, mean_resizing=False)
        torch.manual_seed(seed)
        for m in (base.get_input_embeddings(), base.get_output_embeddings()):
            nn.init.normal_(m.weight.data[40:])
        return base

    model = randomise(get_peft_model(larger(0), config(**changes)))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(larger(1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    head = [m.get_output_embeddings() for m in (model, loaded)]
    assert not torch.equal(larger(0).lm_head.weight, larger(1).lm_head.weight)
    assert torch.equal(*(each(torch.eye(32)) for each in head))
    assert said or "lm_head" in changes.get("target_modules", "")


def test_a_head_of_another_kind_is_refused(tmp_path):
    model = get_peft_model(llama(), config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    message = r"'lm_head\.modules_to_save\.default\.weight' has shape .* must have \(40, 32\) and a floating point type"
    for t in (torch.ones(40, 32, dtype=torch.int64), torch.ones(40, 31)):
        rewritten(tmp_path, lambda tensors, t=t: tensors.update({"base_model.model.lm_head.weight": t}))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(llama(), tmp_path)


def test_a_file_of_zeros_is_of_another_base(saved):
    rewritten(saved, lambda tensors: [t.zero_() for t in tensors.values()])
    with pytest.raises(lx.AdapterMismatch, match="singular values"):
        PeftModel.from_pretrained(llama(), saved)


def test_a_loaded_config_asks_nothing_of_other_state_dicts(trained, saved, tmp_path):
    """It may be used for a new model, whose state dicts need not be the adapter's file."""
    settings = LoraXSConfig.from_pretrained(saved)
    settings.inference_mode = False
    model = get_peft_model(llama(), settings)
    every = {key: 2 * t for key, t in trained.state_dict().items() if "loraxs_R" in key}
    model.load_state_dict(every | {"base_model.model.extra.w": torch.ones(1)}, strict=False)
    part = {key: t for key, t in every.items() if "layers.0" in key}
    with pytest.warns(UserWarning, match=r"'default': the state dict has no R for 7 of its modules, .*layers\.1"):
        model.load_state_dict(part | {"extra.w": torch.ones(1)}, strict=False)
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(trained))
    half = {key: t for key, t in get_peft_model_state_dict(trained).items() if "layers.0" in key}
    set_peft_model_state_dict(model, half)
    assert torch.equal(model.state_dict()[next(iter(part))], part[next(iter(part))] / 2)
    fewer = get_peft_model(llama(), config(target_modules=["q_proj"], lora_alpha=8))
    with pytest.warns(UserWarning, match="has R for 12 modules that have no such adapter here, .*: left out"):
        fewer.load_adapter(saved, "default")  # as Trainer resumes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(saved, "default")


def test_layers_in_torchs_wrapper_for_checkpointing_are_found_in_a_state_dict(trained):
    """It leaves its own name out of state dicts."""
    model = get_peft_model(llama(), config(rank_pattern={"down_proj": 3}, lora_alpha=8))
    blocks = model.base_model.model.model.layers
    blocks[1] = checkpoint_wrapper(blocks[1])
    tensors = {key: t for key, t in trained.state_dict().items() if "loraxs_" in key}
    before, last = logits(model), "base_model.model.model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=r"R for module 'model\.layers\.1\.mlp\.up_proj' has shape"):
        model.load_state_dict(tensors | {f"{last}.loraxs_R.default": torch.ones(2, 2)}, strict=False)
    assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(tensors, strict=False)
    assert torch.equal(logits(model), logits(trained))


def test_a_file_is_blamed_for_its_own_damage_alone(trained, saved, tmp_path):
    model = PeftModel.from_pretrained(llama(), saved)
    trained.save_pretrained(tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "adapter_model.safetensors")
    next(t for key, t in tensors.items() if "loraxs_R" in key)[0, 0] = torch.nan
    save_file(tensors, tmp_path / "other" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"R for module .* has NaN or Inf values") as refusal:
        model.load_adapter(tmp_path / "other", "default")
    assert str(saved / "adapter_model") not in str(refusal.value)


def test_weights_of_an_earlier_save_in_the_other_format(trained, tmp_path):
    """PEFT loads adapter_model.safetensors where there are both: only the one that was saved last is right."""
    trained.save_pretrained(tmp_path, safe_serialization=False)
    randomise(trained)
    trained.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(trained))
    trained.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"\.safetensors: is older than adapter_model\.bin.*; remove it"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_numbers_of_other_packages_are_fields_like_others(tmp_path):
    numpy = pytest.importorskip("numpy")
    settings = config(
        r=numpy.int64(4), lora_alpha=numpy.float32(8), loraxs_dropout=numpy.float32(0.25), target_modules=["q_proj"]
    )
    settings.layers_to_transform = range(2)
    settings.base_model_name_or_path = tmp_path
    settings.save_pretrained(tmp_path)
    again = LoraXSConfig.from_pretrained(tmp_path)
    assert (again.r, again.lora_alpha, again.loraxs_dropout, again.layers_to_transform) == (4, 8.0, 0.25, [0, 1])
    model = get_peft_model(llama(), config())
    model.peft_config["default"].lora_alpha = float("nan")
    with pytest.raises(ValueError, match="lora_alpha: got nan, must be a finite number or None"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never" / "adapter_model.safetensors").exists()


def test_a_state_dict_in_memory_may_hold_R_alone(trained):
    average = {key: 2 * t for key, t in trained.state_dict().items() if "loraxs_R" in key}
    trained.load_state_dict(average, strict=False)
    assert all(torch.equal(trained.state_dict()[key], t) for key, t in average.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = {key: t for key, t in trained.state_dict().items() if "layers.0" in key}  # a shard of a whole model
        trained.load_state_dict(first, strict=False)
        trained.get_base_model().load_state_dict({"lm_head.weight": torch.ones(40, 32)}, strict=False)
    with pytest.warns(UserWarning, match="has R for 1 modules that have no such adapter here"):
        trained.load_state_dict({f"{LAST}.loraxs_R.other": torch.ones(3, 3)}, strict=False)
    average[next(iter(average))][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"R for module 'model.layers.0.self_attn.q_proj' has NaN or Inf"):
        trained.load_state_dict(average, strict=False)


@pytest.mark.usefixtures("transformers_takes_peft")
def test_transformers_looks_at_the_fields_too(saved, tmp_path):
    model = llama()
    model.add_adapter(config(), "mine")
    for _ in range(2):
        randomise(model, "mine").save_pretrained(tmp_path)  # over weights that a checksum would be of
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    edited(saved, lora_alpha=9)
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="sha256: the fields are not those that were saved"):
        model.load_adapter(str(saved))
    assert snapshot(model) == before


def test_saved_factors_fit_a_base_in_bf16_with_a_warning(tmp_path):
    model = randomise(get_peft_model(llama(), config(save_factors=True)))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its A and B were rounded to this model's torch.bf") as seen:
        PeftModel.from_pretrained(llama().bfloat16(), tmp_path)
    assert len({str(each.message) for each in seen if "rounded" in str(each.message)}) == 1  # for all modules


def test_an_R_that_is_not_finite_is_refused(trained, tmp_path):
    list(layers(trained).values())[3].loraxs_R["default"].data[0, 0] = torch.nan
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tensor 'base_model.*0.self_attn.o_proj.loraxs_\w+' has NaN"):
        PeftModel.from_pretrained(llama(), tmp_path)
    list(layers(trained).values())[3].unchecked.add("default")  # as transformers leaves it, which loads by itself
    with pytest.raises(ValueError, match=r"adapter 'default': R of module '.*0.self_attn.o_proj' has NaN"):
        trained(IDS)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_names_of_attach_mean_the_same(dtype, tmp_path):
    with pytest.warns(FutureWarning, match="sigma is now called init_std") as warned:
        short = LoraXSConfig(rank=3, alpha=6, dropout=0.1, sigma=0.2, seed=5, n_iter=2, oversample=7, dtype=dtype)
    assert [each.filename for each in warned] == [__file__]
    fields = dict(r=3, lora_alpha=6, loraxs_dropout=0.1, init_std=0.2, svd_seed=5, svd_n_iter=2, svd_oversample=7)
    assert short == LoraXSConfig(**fields, dtype="bfloat16", target_modules="all-linear")
    assert LoraXSConfig(lora_dropout=0.1).loraxs_dropout == 0.1
    short.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written | fields | {"dtype": "bfloat16"} == written and not {"rank", "alpha", "sigma"} & written.keys()
    assert LoraXSConfig.from_pretrained(tmp_path) == short


def test_a_config_used_again_means_what_it_says():
    settings = config()
    get_peft_model(llama(), settings)
    settings.svd_n_iter = 1
    get_peft_model(llama(), settings)
    assert {recipe["n_iter"] for recipe in settings.svd_recipe.values()} == {1}


def test_a_flipped_singular_vector_is_mended(trained, saved):
    def turn(tensors):
        for key in tensors:
            if key.endswith("loraxs_R"):  # as if trained on a basis with the first pair negated
                tensors[key][0] *= -1
                tensors[key][:, 0] *= -1

    rewritten(saved, turn)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), saved)), logits(trained), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_saved_factors_are_taken_from_the_file(init, tmp_path):
    model = randomise(get_peft_model(llama(), config(r=5, save_factors=True, init=init)))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 14 * 4
    assert all(t.is_contiguous() for name, t in model.state_dict().items() if "loraxs" in name)
    for low in (False, True):
        torch.manual_seed(7)
        other = PeftModel.from_pretrained(LlamaForCausalLM(llama().config), tmp_path, low_cpu_mem_usage=low)
        for a, b in zip(layers(model).values(), layers(other).values(), strict=True):
            assert torch.equal(a.get_delta_weight("default"), b.get_delta_weight("default"))
            assert readable_columns(b.loraxs_B["default"]) == 16


@pytest.mark.parametrize("save_factors", [False, True])
def test_low_cpu_mem_usage_loads_onto_the_device_of_the_base(save_factors, tmp_path):
    get_peft_model(llama(), config(save_factors=save_factors)).save_pretrained(tmp_path)
    with torch.device("meta"):
        base = LlamaForCausalLM(llama().config)  # the one device beside the CPU that is everywhere
    loaded = PeftModel.from_pretrained(base, tmp_path, torch_device="cpu", low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "again", torch_device="cpu", low_cpu_mem_usage=True)
    for name, t in [*loaded.named_parameters(), *loaded.named_buffers()]:
        assert t.is_meta, name


def test_low_cpu_mem_usage_leaves_no_layer_without_R(trained):
    state = {key: t for key, t in get_peft_model_state_dict(trained).items() if "0.mlp.down_proj" not in key}
    model = get_peft_model(llama(), config(rank_pattern={"down_proj": 3}, lora_alpha=8), low_cpu_mem_usage=True)
    with (
        pytest.warns(UserWarning, match="no R for 1 of its modules"),
        pytest.raises(ValueError, match=r"adapter 'default': has no R for module 'model\.layers\.0\.mlp\.down_proj'"),
    ):
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)


def test_factors_can_be_saved_after_all(trained, saved, tmp_path):
    """What the refusal of a base in another dtype tells one to do."""
    with pytest.raises(lx.AdapterMismatch, match="save_factors=True in its config") as refused:
        PeftModel.from_pretrained(llama().bfloat16(), saved)
    assert "portable" not in str(refused.value)
    trained.peft_config["default"].save_factors = True
    trained.save_pretrained(tmp_path)
    torch.manual_seed(7)
    other = PeftModel.from_pretrained(LlamaForCausalLM(llama().config), tmp_path)
    for a, b in zip(layers(trained).values(), layers(other).values(), strict=True):
        assert torch.equal(a.get_delta_weight("default"), b.get_delta_weight("default"))


def test_several_adapters_of_other_ranks_and_targets(trained, tmp_path):
    alone = logits(trained)
    trained.add_adapter("wide", config(r=6, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(trained), alone)  # added, not activated
    randomise(trained, "wide")
    trained.set_adapter("wide")
    wide = logits(trained)
    trainable = [name for name, p in trained.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all(name.endswith("loraxs_R.wide") for name in trainable)
    assert not torch.equal(wide, alone)
    trained.base_model.set_adapter(["default", "wide"])
    both, expected = logits(trained), llama()
    with torch.no_grad():
        for name, layer in layers(trained.base_model.model).items():
            for adapter in layer.loraxs_R:
                expected.get_submodule(name).weight += layer.get_delta_weight(adapter)
    torch.testing.assert_close(both, logits(expected), atol=1e-5, rtol=0)
    trained.save_pretrained(tmp_path, selected_adapters=["wide"])
    trained.delete_adapter("default")
    trained.set_adapter("wide")
    assert torch.equal(logits(trained), wide)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "wide")), wide)
    assert all(set(layer.loraxs_A.keys()) <= {"wide"} for layer in layers(trained).values())


MIXED = ["second", "__base__", "default", "narrow", "second"]
BATCH = torch.arange(50).view(5, 10) % 17


@pytest.fixture
def mixed(trained):
    """`trained` with two more adapters: one with the same A and B, one of another rank on fewer layers."""
    trained.add_adapter("second", config(rank_pattern={"down_proj": 3}, lora_alpha=4))
    trained.add_adapter("narrow", config(r=2, target_modules=["q_proj", "up_proj"]))
    for name in ("second", "narrow"):
        randomise(trained, name)
    return trained.eval()


@torch.no_grad()
def alone(model: nn.Module, run, names=MIXED) -> list:
    """What each sample gets where its adapter has the whole batch: run(model, number of the sample)."""
    results = []
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            results.append(run(model, i))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("minimal", [False, True])
def test_each_sample_has_its_own_adapter(mixed, dtype, minimal):
    """All kinds of groups: two adapters in one pass, one for itself, none; and one adapter for all."""
    names = ["narrow"] * 5 if minimal else MIXED
    mixed.to(dtype)
    expected = torch.cat(alone(mixed, lambda model, i: model(BATCH[i : i + 1]).logits, names))
    with torch.no_grad():
        y = mixed(BATCH, adapter_names=names).logits
    torch.testing.assert_close(y, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
    assert all(layer._mixed_calls is None for layer in layers(mixed).values())
    mixed.set_adapter("default")
    assert torch.equal(logits(mixed), logits(copy.deepcopy(mixed)))


def test_adapters_with_the_same_factors_share_a_pass(mixed, monkeypatch):
    layer = mixed.base_model.model.model.layers[0].self_attn.q_proj
    compared = []
    monkeypatch.setattr(torch, "equal", lambda a, b, equal=torch.equal: compared.append(a) or equal(a, b))
    groups = [("default", "second"), ("narrow",)]
    for _ in range(2):
        assert alike(layer, ["narrow", "default", "second"]) == groups
        assert len(compared) == 2  # A and B, once
    layer.loraxs_A["second"][0, 0] += 1
    assert alike(layer, ["default", "second"]) == [("default",), ("second",)]
    layer.loraxs_A["second"] = layer.loraxs_A["default"].clone()
    assert alike(layer, ["default", "second"]) == groups[:1]


def test_gradients_of_a_mixed_batch(mixed):
    for p in (layer.loraxs_R[name] for layer in layers(mixed).values() for name in layer.loraxs_R):
        p.requires_grad_()
    wanted = [p for p in mixed.parameters() if p.requires_grad]
    total = sum(mixed(BATCH[i : i + 1], adapter_names=[name]).logits.square().sum() for i, name in enumerate(MIXED))
    expected = torch.autograd.grad(total, wanted)
    got = torch.autograd.grad(mixed(BATCH, adapter_names=MIXED).logits.square().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


GENERATE = dict(max_new_tokens=6, min_new_tokens=6, pad_token_id=0)


@pytest.mark.parametrize("how", ["greedy", "beams", "beams in the model's settings", "sequences"])
def test_generates_with_an_adapter_for_each_sample(mixed, how):
    options, many = dict(GENERATE), 1
    if how == "beams":
        options |= dict(num_beams=3, num_return_sequences=2)
        many = 2
    elif how == "beams in the model's settings":
        mixed.generation_config.num_beams = 3
    elif how == "sequences":  # sampling, from one token at a time
        many = 3
        options |= dict(do_sample=True, top_k=1, num_return_sequences=many)
    expected = torch.cat(alone(mixed, lambda model, i: model.generate(input_ids=BATCH[i : i + 1], **options)))
    y = mixed.generate(input_ids=BATCH, adapter_names=MIXED, **options)
    assert y.shape == (5 * many, 16) and torch.equal(y, expected)
    assert len(y[:, 10:].unique(dim=0)) > 2  # the adapters differ
    assert "_expand_inputs_for_generation" not in vars(mixed.base_model.model)
    assert not mixed.base_model.model._forward_pre_hooks and not mixed.base_model._forward_pre_hooks


def t5():
    torch.manual_seed(1)
    sizes = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False)).eval()
    nn.init.normal_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_encoder_and_a_decoder(num_beams):
    model = get_peft_model(t5(), config(task_type="SEQ_2_SEQ_LM")).eval()
    model.add_adapter("second", config(task_type="SEQ_2_SEQ_LM", rank_pattern={"wi": 6}))
    names = ["second", "__base__", "default"]
    for name in names[::2]:
        randomise(model, name, 1.0)
    ids = BATCH[:3]
    expected = torch.cat(
        alone(model, lambda m, i: m(input_ids=ids[i : i + 1], decoder_input_ids=ids[i : i + 1, :4]).logits, names)
    )
    with torch.no_grad():
        y = model(input_ids=ids, decoder_input_ids=ids[:, :4], adapter_names=names).logits
    torch.testing.assert_close(y, expected, atol=3e-5, rtol=1e-5)
    options = GENERATE | dict(num_beams=num_beams)
    expected = torch.cat(alone(model, lambda m, i: m.generate(input_ids=ids[i : i + 1], **options), names))
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **options), expected)
    assert len(expected.unique(dim=0)) > 1


@pytest.mark.parametrize("active", ["default", "headless"])
def test_each_sample_has_the_head_of_its_adapter(active):
    """Whichever adapter is active otherwise; one without a head of its own has the base model's."""
    with_head = dict(modules_to_save=["classifier"], task_type=None)  # SEQ_CLS would give all of them one
    model = get_peft_model(bert(), config(target_modules=["query", "value"], **with_head)).eval()
    model.add_adapter("second", config(target_modules=["query"], **with_head))
    model.add_adapter("headless", config(target_modules=["query", "value"], task_type=None))
    names = ["second", "__base__", "default", "headless", "second"]
    for name in dict.fromkeys(names):
        randomise(model, name)
    for head in model.base_model.model.classifier.modules_to_save.values():
        nn.init.normal_(head.weight)
    expected = torch.cat(alone(model, lambda m, i: m(BATCH[i : i + 1]).logits, names))
    model.set_adapter(active)
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH, adapter_names=names).logits, expected, atol=1e-5, rtol=1e-5)
    assert not model.base_model.model.classifier._forward_pre_hooks


@pytest.mark.parametrize("load_in", ["load_in_8bit", "load_in_4bit"])
def test_an_adapter_for_each_sample_of_a_quantised_model(load_in, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    options = dict(quantization_config=BitsAndBytesConfig(**{load_in: True}), device_map="cpu")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, **options), config()).eval()
    model.add_adapter("second", config())
    model.add_adapter("narrow", config(r=2))
    for name in {*MIXED} - {"__base__"}:
        randomise(model, name)
    expected = alone(model, lambda m, i: m(BATCH).logits[i])  # of the whole batch, since 8 bits are rounded by it
    with torch.no_grad():
        y = model(BATCH, adapter_names=MIXED).logits
    torch.testing.assert_close(y, torch.stack(expected), atol=0.1, rtol=0)


def test_adapters_from_files_share_a_pass(mixed, tmp_path):
    mixed.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    for name in ("second", "narrow"):
        loaded.load_adapter(tmp_path / name, name)
    with torch.no_grad():
        y = loaded(BATCH, adapter_names=MIXED).logits
        torch.testing.assert_close(y, mixed(BATCH, adapter_names=MIXED).logits)
    for layer in layers(loaded).values():
        assert alike(layer, ["default", "second"]) == [("default", "second")]


def test_an_adapter_of_another_base_is_refused_in_a_mixed_batch(mixed):
    layer = mixed.base_model.model.model.layers[1].mlp.up_proj
    mixed.state_dict()  # which makes the fingerprints
    layer.unchecked.add("second")
    mixed(BATCH, adapter_names=MIXED)
    assert not layer.unchecked
    layer.unchecked.add("second")
    layer.loraxs_fingerprint["second"].mul_(2)
    mixed(BATCH, adapter_names=["default"] * 5)
    with pytest.raises(ValueError, match=r"adapter 'second'.*layers\.1\.mlp\.up_proj"):
        mixed(BATCH, adapter_names=MIXED)


def test_disabled_adapters_come_before_names():
    model = get_peft_model(bert(), config(target_modules=["query"], task_type="SEQ_CLS")).eval()
    nn.init.normal_(randomise(model).base_model.model.classifier.modules_to_save["default"].weight)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(IDS, adapter_names=["default"] * 2).logits, logits(bert()))
        model.base_model.disable_adapter_layers()
        assert torch.equal(model(IDS, adapter_names=["default"] * 2).logits, logits(bert()))


@pytest.mark.filterwarnings("error:Dynamo does not know how to trace")
def test_a_compiled_model_follows_the_names():
    torch._dynamo.reset()
    model, x = get_peft_model(net(), config(target_modules=["0", "2"], task_type=None)).eval(), torch.randn(3, 8)
    model.add_adapter("second", config(r=2, target_modules=["2"], task_type=None))
    for name in ("default", "second"):
        randomise(model, name)
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        expected, plain = model(x, adapter_names=names), model(x)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), plain, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(compiled(x, adapter_names=names), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(compiled(x, adapter_names=names[::-1])[1], expected[1], atol=1e-5, rtol=1e-5)


class SequenceFirst(nn.Module):
    """Reads (samples, positions), as transformers does, and goes on in (positions, samples, features)."""

    main_input_name = "ids"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = nn.Embedding(17, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.proj(self.embed(ids).transpose(0, 1)).transpose(0, 1)


def test_batches_that_cannot_be_mixed_are_refused(mixed):
    ran = []
    mixed.base_model.model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    two = ["default", "second"]
    for names, error, message in [
        (["default", "secnod"], ValueError, "non-existing adapter.*: secnod.*takes default, second, narrow and __base"),
        ("ab", TypeError, "adapter_names: got 'ab', must be a list"),
        ([], TypeError, r"adapter_names: got \[\], must be a list"),
        (["default", None], TypeError, "adapter_names: got .*, must be a list"),
        ([*two, "default"], ValueError, "same as the number of inputs, but got 3 and 2"),
        (["__base__"], ValueError, "same as the number of inputs, but got 1 and 2"),
    ]:
        for call in (mixed, mixed.generate):
            with pytest.raises(error, match=message):
                call(input_ids=IDS, adapter_names=names)
    mixed.train()
    with pytest.raises(ValueError, match="training mode"):
        mixed(IDS, adapter_names=two)
    mixed.eval().base_model.model.model.layers[1].train().gradient_checkpointing = True
    with pytest.raises(ValueError, match="training mode"):
        mixed(IDS, adapter_names=two)
    mixed.eval().merge_adapter(["second"])
    with pytest.raises(ValueError, match="merged adapters"):
        mixed(IDS, adapter_names=two)
    assert not ran and all(layer._mixed_calls is None for layer in layers(mixed).values())


def test_calls_in_two_threads_do_not_mix_their_adapters(mixed):
    """The others run whole while the first waits between two layers; one without adapter_names is refused."""
    names = "default", "narrow"
    expected = dict(zip(names, alone(mixed, lambda model, _: logits(model), names), strict=True))

    def meanwhile(*_):
        hook.remove()  # or the calls below would wait, too
        torch.testing.assert_close(mixed(IDS, adapter_names=["narrow"] * len(IDS)).logits, expected["narrow"])
        with ThreadPoolExecutor() as pool:
            found["narrow"] = pool.submit(lambda: mixed(IDS, adapter_names=["narrow"] * len(IDS)).logits).result()
            with pytest.raises(RuntimeError, match="runs on this model in another thread"):
                pool.submit(mixed, IDS).result()
            with pytest.raises(RuntimeError, match="copy or pickle it afterwards"):
                copy.deepcopy(mixed)

    found = {}
    hook = mixed.base_model.model.model.layers[1].register_forward_pre_hook(meanwhile)
    found["default"] = mixed(IDS, adapter_names=["default"] * len(IDS)).logits
    for name, y in expected.items():
        torch.testing.assert_close(found[name], y, atol=1e-5, rtol=0)
    mixed.set_adapter("default")
    assert torch.equal(logits(mixed), expected["default"])


def test_ctrl_c_ends_a_call_with_names():
    """At any line but that which begins the end."""
    model = get_peft_model(net(), config(target_modules=["0", "2"], task_type=None)).eval()
    x, calls, k, left = torch.randn(3, 8), MixedCalls.of(model.base_model), 0, 0
    y = model(x)
    while interrupted_at(k := k + 1, lambda: model(x, adapter_names=["default"] * 3), "/peft/samples"):
        left += len(calls._of_thread)
        calls._of_thread.clear()
        calls._installed.close()
        assert torch.equal(model(x), y) and not model.base_model._forward_pre_hooks
    assert k > 30 and left <= 1


def test_layers_that_do_not_have_the_samples_first_are_refused():
    model = get_peft_model(SequenceFirst(), config(task_type=None)).eval()
    with pytest.raises(ValueError, match=r"got 2 names and x of shape \(10, 2, 8\) in module 'proj'"):
        model(IDS, adapter_names=["default", "__base__"])
    sizes = dict(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16)
    model = get_peft_model(XLNetForSequenceClassification(XLNetConfig(**sizes)), config(task_type=None)).eval()
    with pytest.raises(ValueError, match="adapter_names: cannot be used here: a model of type xlnet"):
        model(IDS[:, :2], adapter_names=["default", "__base__"])
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])})
    model = get_peft_model(model, config(task_type=None)).eval()
    with pytest.raises(ValueError, match=r"module 'experts' gives each expert tokens of any samples"):
        model(IDS, adapter_names=["default", "__base__"])
    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16)})
    model = get_peft_model(model, config(task_type=None)).eval()
    with pytest.raises(ValueError, match="module 'layer' has batch_first=False"):
        model(IDS, adapter_names=["default", "__base__"])


def test_heads_that_cannot_take_a_part_of_a_batch_are_refused(mixed):
    mixed.add_adapter("norm", config(modules_to_save=["model.norm"]))
    with pytest.raises(TypeError, match=r"Conv3d\. module 'model\.norm', one of modules_to_save, is a Llama"):
        mixed.eval()(IDS, adapter_names=["default", "norm"])


@pytest.mark.parametrize("adapter_too", [False, True])
def test_offloaded_by_accelerate(trained, adapter_too):
    from accelerate import cpu_offload

    y = logits(trained)
    if adapter_too:
        cpu_offload(trained, execution_device="cpu", offload_buffers=True)
        model = trained
    else:
        base = llama()
        cpu_offload(base, execution_device="cpu")
        model = get_peft_model(base, config(rank_pattern={"down_proj": 3}, lora_alpha=8))
        with torch.no_grad():
            for a, b in zip(layers(model).values(), layers(trained).values(), strict=True):
                a.loraxs_R["default"].copy_(b.loraxs_R["default"])
        model.eval()
    assert all(layer.base_layer.weight.is_meta for layer in layers(model).values())
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", ["dispatch", "adapter"])
def test_layers_that_a_device_map_has_hooked_stay_fused(trained, monkeypatch, first):
    """With `adapter`, all that the hooks find has one: R, A and B are hooked too, as PeftModel.from_pretrained does."""
    from accelerate import dispatch_model

    y, passes, run = logits(trained), [], loraxs_kernels.route.run
    model = llama() if first == "dispatch" else trained
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if first == "dispatch":
        model = get_peft_model(model, config(rank_pattern={"down_proj": 3}, lora_alpha=8)).eval()
        model.load_state_dict(trained.state_dict())
    assert all("_hf_hook" in vars(layer.base_layer) for layer in layers(model).values())
    monkeypatch.setattr(loraxs_kernels.route, "run", lambda x, W, *rest: passes.append(W) or run(x, W, *rest))
    assert torch.equal(logits(model), y)
    assert len(passes) == len(layers(model)) and all(W is not None for W in passes)


def test_disabled_adapters_are_the_base_model(trained):
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(llama()))
    assert not torch.equal(logits(trained), logits(llama()))
    assert all(layer.loraxs_R["default"].requires_grad for layer in layers(trained).values())
    assert not any(layer.loraxs_A["default"].requires_grad for layer in layers(trained).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(trained, dtype):
    trained.to(dtype)
    before = {name: p for name, p in trained.named_parameters() if "base_layer" in name}
    kept = {name: p.clone() for name, p in before.items()}
    y = logits(trained)
    trained.merge_adapter()
    merged = {name: p for name, p in trained.named_parameters() if "base_layer" in name}
    assert all(not p.requires_grad and not torch.equal(p, kept[name]) for name, p in merged.items())
    torch.testing.assert_close(
        logits(trained).float(), y.float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )
    trained.unmerge_adapter()
    after = {name: p for name, p in trained.named_parameters() if "base_layer" in name}
    assert all(p is before[name] and torch.equal(p, kept[name]) for name, p in after.items())
    with pytest.warns(UserWarning, match="Already unmerged"):
        trained.unmerge_adapter()
    assert torch.equal(logits(trained), y)
    trained.merge_adapter()
    trained.double().unmerge_adapter()  # the weights that were kept go where the model went
    after = {name: p for name, p in trained.named_parameters() if name in kept}
    assert {p.dtype for p in after.values()} == {torch.float64}
    assert all(torch.equal(p, kept[name].double()) for name, p in after.items())


def test_merging_rounds_once_however_many_adapters(trained):
    trained.add_adapter("second", config())
    randomise(trained, "second")
    layer = next(iter(layers(trained.bfloat16()).values()))
    W = layer.base_layer.weight.clone()
    trained.merge_adapter(["default"])
    trained.merge_adapter(["second"])
    total = W.float() + sum(layer.adapter(name).delta_weight() for name in ("default", "second"))
    assert torch.equal(layer.base_layer.weight, total.bfloat16())
    trained.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, W)


def test_merge_and_unload_gives_a_plain_model(trained):
    y = logits(trained)
    plain = trained.merge_and_unload()
    assert type(plain) is LlamaForCausalLM and not layers(plain)
    torch.testing.assert_close(logits(plain), y, atol=1e-5, rtol=0)
    again = get_peft_model(plain, config())
    assert torch.equal(logits(again.unload()), logits(plain))


def test_adapters_are_merged_by_their_names():
    """With the heads of those that are named, where PEFT takes the active one's; and no name is passed over."""
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    model.add_adapter("head", config(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        randomise(model, "head").base_model.model.lm_head.modules_to_save["head"].weight.mul_(2)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="adapter names: got 'none', must be among default, head"):
            merge(adapter_names=["head", "none"])
    model.set_adapter("head")
    y = logits(model)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["head"])), y)


def test_adapters_are_activated_in_all_modules_or_none():
    model = randomise(get_peft_model(llama(), config(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    model.add_adapter("second", config(target_modules=["v_proj"], modules_to_save=["norm", "lm_head"]))
    with torch.no_grad():
        randomise(model, "second").base_model.model.model.norm.modules_to_save["second"].weight.mul_(2)
    before, y = snapshot(model), logits(model)
    for names, message in [
        (["default", "second"], "Only one adapter can be set at a time"),
        (["default", "none"], "adapter names: got 'none', must be among default, second"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.base_model.set_adapter(names)
        assert snapshot(model) == before and torch.equal(logits(model), y) and model.active_adapters == ["default"]


def test_a_merged_head_is_loaded_as_one_of_its_own(tmp_path):
    """Its configurations, the outer and that of the text, no longer tie it to the embeddings."""
    text = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, tie_word_embeddings=True)
    ).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    merged = randomise(get_peft_model(model, config(target_modules=["lm_head"]))).merge_and_unload()
    assert not merged.config.tie_word_embeddings and not merged.config.text_config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path)), logits(merged))


def test_a_model_without_embeddings_is_merged(monkeypatch):
    """transformers 4 says of all models that their embeddings are tied, and for speech that it knows of none."""

    def none(self):
        raise NotImplementedError("`get_input_embeddings` not auto-handled")

    model = bert()
    monkeypatch.setattr(BertForSequenceClassification, "get_input_embeddings", none)
    model.config.tie_word_embeddings = True
    trained = randomise(get_peft_model(model, LoraXSConfig(r=2, target_modules=["query"], modules_to_save=[])))
    expected = logits(trained)
    assert torch.allclose(logits(trained.merge_and_unload()), expected, atol=1e-5)


def test_a_merged_adapter_is_not_deleted(trained, monkeypatch):
    monkeypatch.setattr("peft.tuners.tuners_utils._check_adapters_not_merged", lambda *_: None, raising=False)  # 0.18
    trained.add_adapter("second", config())
    trained.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        trained.delete_adapter("default")
    trained.unmerge_adapter()
    trained.delete_adapter("default")
    assert trained.active_adapters == ["second"]


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_is_not_finite_changes_no_layer(trained, merge):
    *_, broken = layers(trained).values()
    broken.loraxs_R["default"].data.fill_(torch.inf)
    before = snapshot(trained)
    with pytest.raises(ValueError, match=r"module 'model.layers.1.mlp.down_proj'.*NaN or Inf"):
        getattr(trained, merge)()
    assert snapshot(trained) == before and not any(layer.merged for layer in layers(trained).values())
    trained.add_adapter("second", config())
    randomise(trained, "second")
    trained.merge_adapter(["second"])
    merged = logits(trained)
    with pytest.raises(ValueError, match="NaN or Inf"):
        getattr(trained, merge)(adapter_names=["second", "default"])
    assert all(layer.merged_adapters == ["second"] for layer in layers(trained).values())
    assert torch.equal(logits(trained), merged)


def test_training_while_merged_is_warned_of(trained):
    trained.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(trained)
        trained.eval()(IDS)
        with torch.no_grad():
            trained.train()(IDS)
    with pytest.warns(UserWarning, match="the adapters are merged, so that R gets no gradient"):
        trained(IDS)


def test_a_merge_that_would_mislead_a_hook_is_refused(trained):
    first = next(iter(layers(trained).values()))
    handle = first.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    y = logits(trained)
    for merge in (trained.merge_adapter, trained.merge_and_unload):
        with pytest.raises(TypeError, match=r"calling its base layer also runs test_a_merge_.*<lambda>"):
            merge()
    assert torch.equal(logits(trained), y)
    handle.remove()
    first.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    y = logits(trained)
    trained.merge_adapter()
    torch.testing.assert_close(logits(trained), y, atol=1e-4, rtol=0)


def test_layers_are_unmerged_all_or_none(trained, monkeypatch):
    trained.merge_adapter()
    *_, last = layers(trained).values()

    def refuse(*_):
        raise ValueError("not this one")

    monkeypatch.setattr(last._unmerged, "check", refuse)
    with pytest.raises(ValueError, match="not this one"):
        trained.unmerge_adapter()
    assert all(layer.merged for layer in layers(trained).values())


def others(trained: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of another R for every layer."""
    state_dict = {key: t.clone() for key, t in randomise(copy.deepcopy(trained)).state_dict().items()}
    return {key: t for key, t in state_dict.items() if "loraxs_" in key}


def without_R(state_dict):
    del state_dict[[key for key in state_dict if "loraxs_R" in key][-1]]


def with_a_smaller_R(state_dict):
    state_dict[[key for key in state_dict if "loraxs_R" in key][-1]] = torch.ones(2, 2)


LOADS = {
    "no R for the last": (without_R, r"has no R for module 'model.layers.1.mlp.down_proj'"),
    "another shape": (with_a_smaller_R, r"R for module '.*down_proj' has shape \(2, 2\), must be \(3, 3\)"),
    "merged": (
        lambda state_dict: None,
        r"is merged into module 'model.*0.self_attn.q_proj'; call unmerge_adapter",
    ),
}


@pytest.mark.parametrize("within", ["PeftModel", "the base model"])
@pytest.mark.parametrize("case", LOADS)
def test_a_load_that_is_refused_changes_no_layer(trained, case, within):
    damage, message = LOADS[case]
    state_dict = others(trained)
    damage(state_dict)
    if case == "merged":
        trained.merge_adapter()
    model, y = trained, logits(trained)
    if within != "PeftModel":
        model = trained.get_base_model()
        state_dict = {key.removeprefix("base_model.model."): t for key, t in state_dict.items()}
    before = {key: t.clone() for key, t in trained.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state_dict, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in trained.state_dict().items())
    assert torch.equal(logits(trained), y)


def test_an_R_that_a_parametrization_makes_is_saved_and_loaded(tmp_path):
    class Twice(nn.Module):
        def forward(self, R):
            return 2 * R

    def made():
        model = get_peft_model(llama(), config())
        for layer in list(layers(model).values())[1:]:  # some modules have one, and one does not
            parametrize.register_parametrization(layer.loraxs_R, "default", Twice())
        return model

    model, again = made(), made()
    for layer in list(layers(model).values())[1:]:
        nn.init.normal_(layer.loraxs_R.parametrizations["default"].original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict({key: t for key, t in model.state_dict().items() if "loraxs_" in key}, strict=False)
    assert torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="where a parametrization makes R; remove the parametrization"):
        again.load_adapter(tmp_path, "default")


@pytest.mark.filterwarnings("ignore:adapter 'default'. the state dict has no R for 13")
def test_an_R_that_zero3_has_partitioned_is_loaded_no_more(trained):
    """As the attributes that DeepSpeed gives a parameter say."""
    key, R = next((key, p) for key, p in trained.named_parameters() if "loraxs_R" in key)
    whole, fingerprint = R.detach().clone(), key.replace("loraxs_R", "loraxs_fingerprint")
    first = {key: torch.empty(0), fingerprint: trained.state_dict()[fingerprint]}
    R.ds_id, R.ds_shape = 0, R.shape
    trained.load_state_dict({key: 2 * whole}, strict=False)
    assert torch.equal(R, 2 * whole)
    with pytest.raises(ValueError, match=r"R for module .* has NaN or Inf values"):
        trained.load_state_dict({key: whole * torch.nan}, strict=False)
    R.data = torch.empty(0)
    trained.load_state_dict(first, strict=False)  # a checkpoint of DeepSpeed's own
    for gathered in (False, True):
        if gathered:
            R.data, R._z3_optimizer = whole, None
        with pytest.raises(ValueError, match=r"R for module .* cannot be loaded once ZeRO-3 has partitioned it"):
            trained.load_state_dict({key: whole}, strict=False)


def test_a_config_is_as_it_was_where_an_adapter_cannot_be_added():
    asked = config(r=200)
    with pytest.raises(ValueError, match="rank: got 200"):
        get_peft_model(llama(), asked)
    assert (asked.target_modules, asked.modules_to_save, asked.svd_recipe) == ("all-linear", None, {})
    with pytest.raises(ValueError, match="without a linear layer that can be adapted"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config(task_type=None))


def test_all_linear_leaves_no_part_of_a_head_idle():
    sizes = dict(vocab_size=50, d_model=32, n_layer=1, n_head=2, d_inner=48)
    model = get_peft_model(XLNetForSequenceClassification(XLNetConfig(**sizes)), config(task_type="SEQ_CLS"))
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "loraxs" not in name}
    assert trained == {"sequence_summary", "logits_proj"}


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "SEQ_CLS", None])
def test_all_linear_leaves_a_head_to_train_whole(task_type, tmp_path):
    def bert():
        torch.manual_seed(1)
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
        kind = BertForSequenceClassification if task_type == "SEQ_CLS" else BertForTokenClassification
        return kind(BertConfig(**sizes)).eval()

    model = randomise(get_peft_model(bert(), config(task_type=task_type)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "loraxs_R" not in name}
    assert trained == {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))


def test_weights_of_zeros_are_warned_of_where_an_adapter_is_to_be_trained(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(base[1].weight)
    fresh = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="A has only zeros in module '1', as it has where the weight has"):
        get_peft_model(base, loraxs_peft.LoraXSConfig(r=2, target_modules=["0", "1"])).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*only zeros")
        PeftModel.from_pretrained(fresh, tmp_path)


def test_a_head_that_does_not_train_is_warned_of():
    model, query = bert(), dict(target_modules=["query"])
    with pytest.warns(
        UserWarning, match=r"head \(classifier\) of this BertForS.* Pass modules_to_save=\['classifier'\]"
    ):
        get_peft_model(model, config(**query, task_type=None))
    tokens = BertForTokenClassification(model.config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "modules_to_save")
        get_peft_model(bert(), config(**query, task_type="SEQ_CLS"))
        get_peft_model(tokens, config(**query, task_type="TOKEN_CLS"))
        for options in (query | {"modules_to_save": []}, query | {"inference_mode": True}, {}):
            get_peft_model(bert(), config(**options, task_type=None))


@pytest.mark.usefixtures("transformers_takes_peft")
def test_a_head_that_all_linear_leaves_out_through_add_adapter_is_warned_of():
    with pytest.warns(UserWarning, match=r"head \(classifier\)"):
        bert().add_adapter(config(r=2, task_type="SEQ_CLS"))


def test_a_head_is_looked_for_beside_modules_that_cannot_be_asked_yet():
    """As PEFT 0.18's wrappers of modules_to_save cannot while their adapter is being added."""

    class Wrapper(nn.Module):
        def __getattr__(self, name):
            raise IndexError("list index out of range")

    model = bert()
    model.dropout = Wrapper()
    assert classification_head(model) == ["classifier"]


def test_a_layer_in_two_places_and_a_shared_weight():
    model = llama(tie_word_embeddings=True)
    attention = model.model.layers[0].self_attn
    attention.v_proj = attention.k_proj
    wrapped = get_peft_model(model, config(target_modules=["k_proj", "v_proj", "lm_head"]))
    assert attention.v_proj is attention.k_proj and isinstance(attention.v_proj, LoraXSLinearLayer)
    randomise(wrapped)
    embedding, y = model.get_input_embeddings().weight.clone(), logits(wrapped)
    plain = wrapped.merge_and_unload()
    assert plain.model.layers[0].self_attn.v_proj is plain.model.layers[0].self_attn.k_proj
    assert not layers(plain) and torch.equal(plain.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(logits(plain), y, atol=1e-5, rtol=0)


def test_a_layer_in_two_places_is_saved_and_loaded(tmp_path):
    def twice() -> nn.Module:
        attention = (model := llama()).model.layers[0].self_attn
        attention.v_proj = attention.k_proj
        return model

    model = randomise(get_peft_model(twice(), config(target_modules=["k_proj", "v_proj", "q_proj"])))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        assert torch.equal(logits(PeftModel.from_pretrained(twice(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match=r"module 'model.layers.0.self_attn.v_proj'"):
        PeftModel.from_pretrained(llama(), tmp_path)  # where the two are not one


def test_dropout_acts_while_training_alone():
    model = randomise(get_peft_model(llama(), config(loraxs_dropout=0.5)))
    plain = get_peft_model(llama(), config())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(plain))  # new adapters are in the mode of their layer
    assert not torch.equal(logits(model.train()), logits(plain))
    assert next(iter(layers(model).values())).adapter("default").dropout == 0.5


def test_gpt2_conv1d(tmp_path):
    def gpt2():
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).eval()

    model = randomise(get_peft_model(gpt2(), config()))
    assert len(layers(model)) == 8
    assert all((layer.in_features, layer.out_features) == tuple(layer.weight.shape) for layer in layers(model).values())
    y = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), y)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, atol=1e-5, rtol=0)


@pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_learnable_bias_state_dict"), reason="this peft would not save biases, and we refuse"
)
def test_biases_train_and_are_saved_if_asked_for(tmp_path):
    def biased():
        return llama(attention_bias=True)

    model = get_peft_model(biased(), config(target_modules=["q_proj"], bias="loraxs_only"))
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias
    assert bias.requires_grad
    model(IDS).logits.sum().backward()
    assert bias.grad is not None
    nn.init.normal_(bias)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(biased(), tmp_path)), logits(model))


@pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_learnable_bias_state_dict"), reason="this peft would not save biases, and we refuse"
)
def test_biases_of_layers_that_another_adapter_is_on_are_saved_and_loaded(tmp_path):
    """Their names depend on whether any adapter is on the layer."""
    model = get_peft_model(llama(attention_bias=True), config(target_modules=["q_proj"], bias="all"))
    model.add_adapter("other", config(target_modules=["v_proj"]))
    bias = model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.bias
    nn.init.normal_(bias)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path)
    assert torch.equal(logits(alone), logits(model))
    alone.save_pretrained(tmp_path / "alone")
    second = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / "other", adapter_name="other")
    second.load_adapter(tmp_path / "alone", "default")
    second.set_adapter("default")
    assert torch.equal(logits(second), logits(model))


def test_a_forward_without_the_adapters_weights_is_refused():
    model = get_peft_model(llama(), config(), low_cpu_mem_usage=True)
    layer = next(iter(layers(model).values()))
    layer.base_layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.base_model.reset_parameters()
    with torch.no_grad(), pytest.raises(ValueError, match=r"A, R, B: not all are in memory .* load the adapter's weig"):
        model(IDS)


def test_model_made_on_the_meta_device(trained):
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    settings = config(rank_pattern={"down_proj": 3}, lora_alpha=8, init_std=0.1)
    model = get_peft_model(model, copy.copy(settings))
    assert all(t.is_meta for t in model.state_dict().values())
    model.load_state_dict({key: t for key, t in model.state_dict().items() if "loraxs_R" in key}, strict=False)
    weights = {f"base_model.model.{name}": t for name, t in llama().state_dict().items()}
    for key in list(weights):
        if (owner := key.rpartition(".")[0]) in layers(model):
            weights[f"{owner}.base_layer.weight"] = weights.pop(key)
    model.load_state_dict(weights, strict=False, assign=True)
    model.base_model.reset_parameters()
    buffers = {name: b for name, b in llama().named_buffers() if "rotary" in name}
    for name, b in buffers.items():
        model.get_submodule(f"base_model.model.{name.rpartition('.')[0]}").register_buffer(
            "inv_freq", b, persistent=False
        )
    assert not any(t.is_meta for layer in layers(model).values() for t in (*layer.parameters(), *layer.buffers()))
    expected = get_peft_model(llama(), settings)
    assert torch.equal(logits(model.eval()), logits(expected))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = randomise(get_peft_model(llama(), config())).train()
        torch.manual_seed(0)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([layer.loraxs_R["default"].grad for layer in layers(model).values()])
    for a, b in zip(*gradients, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(b, a)


def test_compiles_whole():
    torch._dynamo.reset()
    model = randomise(get_peft_model(llama(num_hidden_layers=1), config(rank_pattern={"down_proj": 3}, lora_alpha=8)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-5, rtol=0)


def test_dtype_moves_and_copies(trained):
    R = {name: layer.loraxs_R["default"].clone() for name, layer in layers(trained).items()}
    trained.to(torch.bfloat16)
    for name, layer in layers(trained).items():
        assert torch.equal(layer.loraxs_R["default"], R[name])
        assert layer.loraxs_A["default"].dtype == layer.loraxs_B["default"].dtype == torch.bfloat16
    twin = copy.deepcopy(trained)
    for each in layers(trained).values(), layers(twin).values():
        assert all(readable_columns(layer.loraxs_B["default"]) == 16 for layer in each)
    assert torch.equal(logits(twin), logits(trained))
    randomise(twin)
    assert not torch.equal(logits(twin), logits(trained))


def run(model, folder, **changes):
    options = dict(output_dir=folder, per_device_train_batch_size=2, max_steps=6, save_steps=3, learning_rate=0.05)
    options |= dict(report_to=[], disable_tqdm=True, save_strategy="steps", use_cpu=True, seed=3, logging_steps=1)
    data = [{"input_ids": row, "labels": row} for row in (torch.arange(60).view(12, 5) * 7) % 40]
    return Trainer(model=model, args=TrainingArguments(**(options | changes)), train_dataset=data)


@pytest.mark.usefixtures("fresh_accelerate")
def test_trainer_resumes_to_the_bit(tmp_path):
    settings = dict(loraxs_dropout=0.1)
    whole = get_peft_model(llama(), config(**settings))
    trainer = run(whole, tmp_path / "whole")
    trainer.train()
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    resumed = get_peft_model(llama(), config(**settings))
    run(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(layers(whole).values(), layers(resumed).values(), strict=True):
        assert torch.equal(a.loraxs_R["default"], b.loraxs_R["default"])
        assert not torch.equal(a.loraxs_R["default"], a.recipe["default"].initial_R(4, 1e-5))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_reference_that_trl_makes_of_a_trained_adapter_computes_what_that_does():
    """DPOTrainer adds an adapter "ref" with the config of "default", and copies parameters by names R does not have."""
    model = randomise(get_peft_model(llama(), config()))
    for layer in layers(model).values():  # neither what its config says nor what an SVD would give
        layer.scaling["default"] = 3.0
        layer.loraxs_B["default"].mul_(2)
    y = logits(model)
    for name, same in (("other", False), ("ref", True)):
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
        assert torch.equal(logits(model), y) is same
    with torch.no_grad():
        for layer in layers(model).values():
            layer.loraxs_R["default"].zero_()
            layer.loraxs_B["default"].zero_()
    assert torch.equal(logits(model), y)  # a copy of its own
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y)  # with the scaling of the forward
    model.unmerge_adapter()
    model.delete_adapter("ref")
    model.add_adapter("ref", config(r=3))  # not TRL's: an adapter like any other
    assert next(iter(layers(model).values())).loraxs_R["ref"].any()


def test_a_weighted_sum_of_adapters_is_exact_and_an_adapter_like_any_other(tmp_path):
    patterns = dict(rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 2})
    model = randomise(get_peft_model(llama(), config(lora_alpha=8, **patterns)))
    model.add_adapter("other", config(**patterns))
    randomise(model, "other")
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.load_adapter(tmp_path / "other", "loaded")
    first = layers(model)["base_model.model.model.layers.0.self_attn.v_proj"]
    first.scaling["default"] = 3.0  # as users set it; the sum's own stays what its config says
    model.add_weighted_adapter(["default", "other", "loaded"], [0.7, -0.5, 0.25], "sum")
    assert model.active_adapters == ["default"]
    assert not any(layer.loraxs_R["sum"].requires_grad for layer in layers(model).values())
    for layer in layers(model).values():
        delta = 0.7 * layer.get_delta_weight("default") - 0.25 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), delta)
    model.set_adapter("sum")
    assert all(layer.loraxs_R["sum"].requires_grad for layer in layers(model).values())
    first.scaling["default"] = 2.0  # before peft 0.21 no adapter is saved otherwise
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "sum")), logits(model))


def test_scales_are_set_as_those_of_lora(tmp_path):
    """By diffusers, for example: set_adapters with weights, and the scale of a call."""
    model = randomise(get_peft_model(llama(), config(lora_alpha=6)))
    model.add_adapter("other", config(target_modules=["q_proj"]))
    y, found = logits(model), layers(model).values()
    for layer in found:
        layer.set_scale("default", 0.5)
        layer.set_scale("other", 3)
        layer.set_scale("none", 3)
    assert {layer.scaling["default"] for layer in found} == {0.75}
    assert {layer.scaling.get("other", 3.0) for layer in found} == {3.0}
    for layer in found:
        layer.unscale_layer()
        layer.scale_layer(0.7)
    assert all(layer.scaling["default"] == 1.5 * 0.7 for layer in found) and not torch.equal(logits(model), y)
    with pytest.raises(ValueError, match=r"scaling of module 'model.layers.0.* is 1.0\d*, must be 1.5"):
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    for layer in found:
        layer.unscale_layer(0.7)
        layer.set_scale("other", 1)
        layer.scaling["default"] *= 1 + 1e-15  # as rounding may leave it
    torch.testing.assert_close(logits(model), y)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("saved", ["lm_head", "v_proj"])
def test_what_another_adapter_trains_whole_takes_no_adapter(saved, tmp_path):
    """PEFT holds it twice, under names that no fresh model has: an adapter there was lost, and broke saving both."""
    model = get_peft_model(llama(), config(target_modules=["q_proj"], modules_to_save=[saved]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.add_adapter("all", config())
    told = "leaves out 2 layers .* 'model.layers.0.self_attn.v_proj', is in modules_to_save of another"
    assert any(re.search(told, str(warning.message)) for warning in seen) is (saved == "v_proj")
    assert not any(saved in name for name in layers(model))
    for name in ("default", "all"):
        randomise(model, name).save_pretrained(tmp_path, selected_adapters=[name])
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), logits(model))
    for targets in ([saved], rf".*{saved}\.original_module"):
        with pytest.raises(TypeError, match=rf"matches module '.*{saved}.*' in modules_to_save of another adapter"):
            model.add_adapter("new", config(target_modules=targets))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dict(target_modules=["dense"]), ["pooler"]),
        (dict(modules_to_save=["dense"]), ["pooler"]),
        (dict(modules_to_save=["pooler"]), ["dense"]),
        ({}, ["dense", "pooler"]),
    ],
)
def test_modules_that_train_whole_hold_no_adapters(first, second):
    """PEFT copies those with the module: saving or loading then failed, or lost R under names no fresh model has."""
    model = randomise(get_peft_model(bert(), LoraXSConfig(**{"r": 2, "target_modules": ["query"]} | first)))
    before, y = snapshot(model), logits(model)
    told = "matches module 'bert.pooler' while module 'bert.pooler.*dense' has adapters|list index out of range"
    with pytest.raises((ValueError, IndexError), match=told):  # the latter is peft 0.18's own, of the last case
        model.add_adapter("new", LoraXSConfig(r=2, target_modules=["query"], modules_to_save=second))
    assert snapshot(model) == before and torch.equal(logits(model), y)


def test_the_adapter_that_is_active_after_another_is_deleted_is_so_in_all_layers():
    """PEFT chooses for each layer alone: "b" in layers without "a", and the base's lm_head for "a"."""
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj", "o_proj"]), adapter_name="first")
    model.add_adapter("b", config())
    model.add_adapter("a", config(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    for name in ("a", "b"):
        randomise(model, name)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["a"].weight.mul_(2)
    model.set_adapter("a")
    y, which = logits(model), {name: p.requires_grad for name, p in model.named_parameters()}
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters == ["a"] and torch.equal(logits(model), y)
    assert {name: p.requires_grad for name, p in model.named_parameters()}.items() <= which.items()
    for name in ("a", "b"):
        model.delete_adapter(name)
    assert torch.equal(logits(model.base_model.model), logits(llama()))


def test_an_adapter_that_some_layers_do_not_have_is_not_converted():
    """PEFT's convert_to_lora asks every layer for its delta W."""
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    model.add_adapter("b", config(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"adapter 'b': is not on module 'model.layers.0.self_attn.q_proj'"):
        layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].get_delta_weight("b")


def test_what_cannot_be_added_up_is_refused():
    model = randomise(get_peft_model(llama(), config(lora_alpha=8)))
    model.add_adapter("seed", config(svd_seed=1))
    model.add_adapter("fewer", config(target_modules=["q_proj"]))
    model.add_adapter("rank", config(r=3))
    model.add_adapter("saved", config(modules_to_save=["lm_head"]))
    model.add_adapter("zero", config(lora_alpha=0))
    before = sorted(model.peft_config), snapshot(model)
    cases = [
        (["default"], [1], "new", "svd", "combination_type: got 'svd', must be \"linear\""),
        (["default"], [1, 2], "new", "linear", r"weights: got \[1, 2\], must be a finite number for each"),
        (["default"], [float("nan")], "new", "linear", "weights: got"),
        ([], [], "new", "linear", "weights: got"),
        (["default", "none"], [1, 1], "new", "linear", "adapters: got 'none', must be names among default, seed"),
        (["default"], [1], "rank", "linear", "adapter_name: got 'rank', which the model has already"),
        (["default", "seed"], [1, 1], "new", "linear", "same A and B in module 'model.layers.0.self_attn.q_proj'"),
        (["default", "fewer"], [1, 1], "new", "linear", "same A and B in module 'model.layers.0.self_attn.k_proj'"),
        (["default", "rank"], [1, 1], "new", "linear", "same A and B in"),
        (["default", "saved"], [1, 1], "new", "linear", r"'saved' has modules_to_save \(lm_head\)"),
        (["zero", "default"], [1, 1], "new", "linear", "'zero' has lora_alpha 0 in module 'model.layers.0"),
        (["default"], [1e300], "new", "linear", "weights: R of module 'model.layers.0.* would have NaN or Inf"),
    ]
    for *given, message in cases:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*given)
        assert (sorted(model.peft_config), snapshot(model)) == before


@pytest.mark.usefixtures("fresh_accelerate")
def test_trl_sft_trainer(tmp_path):
    pytest.importorskip("trl")
    from test_integration_transformers import tokenizer
    from trl import SFTConfig, SFTTrainer

    datasets = pytest.importorskip("datasets")
    options = dict(per_device_train_batch_size=2, max_steps=3, learning_rate=0.05, logging_steps=1, report_to=[])
    arguments = SFTConfig(output_dir=tmp_path, use_cpu=True, bf16=False, disable_tqdm=True, max_length=16, **options)
    data = datasets.Dataset.from_dict({"text": ["count to 10: 1 2 3", "and on: 4 5 6 7"] * 4})
    how = dict(args=arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config())
    trainer = SFTTrainer(llama(), **how)
    before = {name: layer.loraxs_R["default"].clone() for name, layer in layers(trainer.model).items()}
    assert len(before) == 14
    trainer.train()
    assert all(
        not torch.equal(layer.loraxs_R["default"], before[name]) for name, layer in layers(trainer.model).items()
    )
    trainer.save_model(tmp_path / "final")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "final")), logits(trainer.model.eval()))


def test_quantised_base_layers(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")

    def int8():
        model = llama()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    model = randomise(get_peft_model(int8(), config(target_modules=["q_proj", "down_proj"])))
    y = logits(model)
    assert not torch.equal(y, logits(int8()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(int8(), tmp_path)), y)
    with pytest.raises(TypeError, match="dense 2-dimensional"):
        model.merge_adapter()


def test_what_backends_note_beside_a_weight_is_put_back():
    """As bitsandbytes does on the weight and on `state`; what changes while merged and is not merging's stays."""
    layer = nn.Linear(2, 2).train()
    weight, layer.state, layer.mode = layer.weight, SimpleNamespace(SCB=1), "plain"
    weight.quant_state = "before"
    unmerged = Unmerged(layer)
    layer.weight, layer.mode = nn.Parameter(torch.zeros(2, 2)), "merged"
    weight.quant_state, layer.state.SCB, layer.state.more = "after", None, 2
    unmerged.note_changes()
    layer.eval()
    owner = SimpleNamespace(base_layer=None)
    unmerged.put_back(owner)
    assert owner.base_layer is layer and layer.weight is weight and weight.quant_state == "before"
    assert vars(layer.state) == {"SCB": 1} and layer.mode == "plain" and not layer.training


@pytest.mark.parametrize("kind", ["bitsandbytes 8 bit", "bitsandbytes 4 bit", "torchao"])
def test_merging_into_quantised_layers(kind, tmp_path, monkeypatch):
    if loraxs_peft.tuner.quantization_utils is None:
        pytest.skip("this peft has nothing that quantises again")
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantised = TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        quantised = BitsAndBytesConfig(**{f"load_in_{kind.split()[1]}bit": True})
    llama(initializer_range=0.2).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map={"": "cpu"})
    model = randomise(get_peft_model(base, config(target_modules=["q_proj", "down_proj"])))
    if next(iter(layers(model).values())).quantization_backend is None:
        pytest.skip("this peft does not know this torchao")
    model.add_adapter("second", config(target_modules=["q_proj"]))
    randomise(model, "second").train()  # bitsandbytes rounds 4-bit layers further for evaluation on a CPU
    adapters = list(layers(model).values())
    y = logits(model)
    with model.disable_adapter():
        plain = logits(model)

    def notes():
        layer_parts = [(m.base_layer.weight, getattr(m.base_layer, "state", None), m.base_layer) for m in adapters]
        return [{**vars(part), "training": None} for parts in layer_parts for part in parts if part is not None]

    def same(now, before):
        return all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(now, before, strict=True))

    weights, before = [layer.base_layer.weight for layer in adapters], notes()
    model.merge_adapter(["default"])
    merged = logits(model)
    assert (merged - y).norm() < 0.5 * (plain - y).norm()
    assert all(type(layer.base_layer.weight) is type(W) for layer, W in zip(adapters, weights, strict=True))
    weight = adapters[0].base_layer.weight
    adapters[0].base_layer.weight = nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match=r"got a merged weight on meta .* a quantised weight does not follow"):
        adapters[0].unmerge()
    adapters[0].base_layer.weight = weight
    model.merge_adapter(["second"])
    both = logits(model)
    assert not torch.equal(both, merged)
    model.eval()
    model.unmerge_adapter()
    assert same(notes(), before) and all(m.base_layer.weight is W for m, W in zip(adapters, weights, strict=True))
    assert not any(layer.base_layer.training for layer in adapters)
    assert torch.equal(logits(model.train()), y)

    def fails(owner, weight):
        type(owner.quantization_backend).set_base_weight(owner.quantization_backend, owner, weight)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(adapters[0].quantization_backend, "set_base_weight", fails)
        before = notes()
        with pytest.raises(RuntimeError, match="out of memory"):
            adapters[0].merge()
        assert same(notes(), before) and not adapters[0].merged and torch.equal(logits(model), y)
    model.merge_adapter(["default", "second"])  # quantised once, as it was above
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    adapters[0].loraxs_R["second"].data[0, 0] = torch.nan
    model.merge_adapter(["default"])
    with pytest.raises(
        ValueError, match=r"The adapter default and second seems.*module 'model.layers.0.self_attn.q_proj'"
    ):
        adapters[0].merge(adapter_names=["second"])
    assert adapters[0].merged_adapters == ["default"] and torch.equal(logits(model), merged)
    unloaded = model.merge_and_unload(adapter_names=["default"])
    assert not layers(unloaded) and torch.equal(logits(unloaded), merged)


@pytest.mark.gpu("neighbours")
def test_on_a_gpu(tmp_path):
    """Made on the CPU and moved, or made there: trained under autocast, saved, loaded across devices, merged."""
    model = get_peft_model(llama().bfloat16(), config()).to("cuda").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = IDS.cuda()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        y = model(ids).logits.float()
        for device in ("cpu", "cuda"):
            loaded = PeftModel.from_pretrained(llama().bfloat16().to(device), tmp_path).to("cuda").eval()
            torch.testing.assert_close(loaded(ids).logits.float(), y, atol=2e-2, rtol=0)
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits.float(), y, atol=5e-2, rtol=0)
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits.float(), y)
    assert not any(layer.loraxs_R["default"].abs().max() < 1e-3 for layer in layers(model).values())


def test_given_factors_need_their_file(tmp_path):
    with pytest.raises(ValueError, match=r'save_factors: got False, must be True with init="given"'):
        config(init="given")
    model = get_peft_model(llama(), config(init="given", save_factors=True))
    assert torch.equal(logits(model), logits(llama()))  # zeros until they are loaded
    model.save_pretrained(tmp_path)
    state_dict = {key: t for key, t in model.state_dict().items() if not key.endswith("loraxs_R.default")}
    with pytest.raises(ValueError, match=r"adapter 'default': has no R for module 'model.layers.0"):
        model.load_state_dict(state_dict)
    rewritten(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if not key.endswith("R")])
    with pytest.raises(ValueError, match=r"adapter 'default': has no A and B for module 'model.layers.0"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("second", [False, True])
def test_a_failed_injection_leaves_the_model_as_it_was(second):
    model = llama()
    if second:
        model = get_peft_model(model, config(target_modules=["q_proj"]))
    model.get_parameter(f"{'base_model.model.' * second}model.layers.1.mlp.down_proj.weight").data[0, 0] = torch.nan
    before = snapshot(model)
    bad = config(modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"module 'model.layers.1.mlp.down_proj'"):
        model.add_adapter("second", bad) if second else get_peft_model(model, bad)
    assert snapshot(model) == before


NAMES = ([None, {"q"}, r".*\.q"], [3, ["q", 3], ["q", None], "(", "x{99999999999}", "(" * 999, b"q"])
RECIPE = {"method": "chebyshev", "block": 8, "n_iter": 2}
FIELDS = {  # what it may be, and what not
    "r": ([1, 65536], [0, 65537, 4.0, "4", True, None]),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "lora_alpha": ([None, 2, -1.5, 0], ["2", float("inf")]),
    "rank_pattern": ([None, {}, {"q": 1, ".*k": 65536}], [["q"], {"q": 0}, {"q": 65537}, {"(": 3}, {3: 3}, "q"]),
    "alpha_pattern": ([None, {"q": None, "k": 2.5}], [{"q": "2"}, {"q": float("nan")}, {"(": 2}, ["q"]]),
    "layers_to_transform": (
        [None, 0, [0, -(2**31)], (2**31,), {1}],
        ["0", 0.5, [0, "x"], 2**31 + 1, -(2**31) - 1],
    ),
    "layers_pattern": ([None, "h", ["h"], ("h", "layers")], [3, [3]]),
    "modules_to_save": ([None, [], ["head"]], ["head", [1]]),
    "bias": (["none", "all", "loraxs_only"], ["lora_only", None]),
    "init": (["svd", "random"], ["pissa", None]),
    "svd_oversample": ([None, 0, 65536], [-1, 65537, 2.5]),
    "svd_recipe": (
        [{}, {"4 32x32": RECIPE}],
        [None, [RECIPE], {"4 32x32": 3}, {"4 32x32": RECIPE | {"n_iter": -1}}, {"4 32x32": RECIPE | {"seed": 0}}],
    ),
    "dtype": ([None, "bfloat16", "float16", "float32"], ["float64", "int8", 16]),
    "save_factors": ([True, False], [None, "yes"]),
    "check_fingerprint": ([True, False], [None, "yes"]),
    "inference_mode": ([True, False, None], ["yes", 2]),
    "base_model_name_or_path": ([None, "name"], [3, ["name"]]),
    "sha256": ([{}], [None, [], "0"]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_a_field_may_be(name, monkeypatch):
    around = {"target_modules": ["q"], "layers_to_transform": 0 if name == "layers_pattern" else None}
    fits, others = FIELDS[name]
    monkeypatch.setattr(BaseTuner, "_get_learnable_bias_state_dict", None, raising=False)  # as PEFT 0.21 has
    if fits is NAMES[0]:
        assert all(getattr(LoraXSConfig(**{name: kind("qk")}), name) == {"q", "k"} for kind in (list, tuple, set))
    assert all(getattr(LoraXSConfig(**around | {name: value}), name) == value for value in fits)
    for value in others:
        with pytest.raises(ValueError, match=f"^{name}: got .*, must be "):
            LoraXSConfig(**around | {name: value})
    if name == "bias":
        monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
        assert LoraXSConfig(bias="none").bias == "none"
        with pytest.raises(ValueError, match=r'bias: got \'all\', must be "none": peft .* would not save biases'):
            LoraXSConfig(bias="all")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(rank=8), ValueError, "rank: got 8 beside r=4, must be one of the two"),
        (dict(oversample="x"), ValueError, "svd_oversample: got 'x'"),
        (dict(lora_alpha=float("nan")), ValueError, "lora_alpha: got nan, must be a finite number or None"),
        (dict(lora_alpha=10**400), ValueError, "lora_alpha: got 1000"),
        (dict(rank_pattern=["q_proj"]), ValueError, "rank_pattern: got .*, must be {regular expression"),
        (dict(svd_recipe={"4 32x32": {"n_iter": 10**6}}), ValueError, "svd_recipe: got"),
        (dict(svd_n_iter=10**6), ValueError, "svd_n_iter: got 1000000, must be an integer from 0 to 1000, or None"),
        (dict(svd_seed=1.5), ValueError, "svd_seed: got 1.5, must be an integer of at most 128 bits"),
        (dict(loraxs_dropout="x"), ValueError, "loraxs_dropout: got 'x'"),
        (dict(layers_pattern="layers"), ValueError, "layers_pattern"),
        (dict(layers_to_transform=[0]), ValueError, "layers_to_transform: cannot be combined .* pass a list"),
        (dict(r=33), ValueError, "rank: got 33 for module 'model.layers.0.self_attn.q_proj'"),
        (dict(target_modules=["embed_tokens"]), TypeError, "module 'model.embed_tokens', a Embedding"),
        (dict(target_modules=["nothing"]), ValueError, "not found in the base model"),
    ],
)
def test_bad_settings_are_refused(changes, error, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**changes))
    assert snapshot(model) == before


def test_layers_of_another_method_are_refused():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), llama(), "lora")
    with pytest.raises(TypeError, match=r"module 'model.layers.0.self_attn.q_proj'.*another method"):
        inject_adapter_in_model(config(target_modules=["q_proj"]), model, "xs")


def test_not_on_top_of_attach_nor_the_other_way_round():
    attached = lx.attach(llama(), 4, target_modules=["q_proj"])
    before = snapshot(attached)
    with pytest.raises(ValueError, match=r"lx\.attach put on.*with lx\.detach\(model\), or start from a fresh"):
        get_peft_model(attached, config())
    with pytest.raises(ValueError, match=r"lx\.attach put on"):
        inject_adapter_in_model(config(target_modules=["o_proj"]), attached)
    assert snapshot(attached) == before and not hasattr(attached, "peft_config")
    lx.detach(attached)
    wrapped = get_peft_model(attached, config(target_modules=["q_proj"]))
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match="model: already has LoRA-XS adapters through PEFT; unload"):
        lx.attach(wrapped, 4, target_modules=["o_proj"])
    assert snapshot(wrapped) == before
    lx.attach(wrapped.unload(), 4, target_modules=["q_proj"])


@pytest.mark.parametrize("name", ["latest", "loaded", "put", "unchecked", "r", "scaling", "base_layer", "0", "a b"])
def test_what_layers_keep_beside_adapters_takes_no_name_from_them(name, tmp_path):
    model = randomise(get_peft_model(llama(), config(), adapter_name=name), name)
    y = logits(model)
    assert not torch.equal(y, logits(llama()))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), y) and not any(layer.unchecked for layer in layers(loaded).values())
    loaded.load_adapter(tmp_path / name, "another")
    loaded.delete_adapter(name)
    loaded.set_adapter("another")
    assert torch.equal(logits(loaded), y)


@pytest.mark.parametrize(
    "name", ["training", "forward", "keys", "_pad", "put.together", "", "__base__", "_Fingerprints__unchecked"]
)
def test_names_that_cannot_be_an_adapters_are_refused(name):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"adapter_name: got '{name}', must be a name without a dot"):
        get_peft_model(model, config(), adapter_name=name)
    assert snapshot(model) == before
    model = get_peft_model(model, config(target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name: got"):
        model.add_adapter(name, config())
    assert snapshot(model) == before and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_R_in_the_dtype_of_the_base_if_asked_for(low_cpu_mem_usage, tmp_path):
    def dtypes(model):
        return {layer.loraxs_R[name].dtype for layer in layers(model).values() for name in layer.loraxs_R}

    whole = randomise(get_peft_model(llama().bfloat16(), config(target_modules=["q_proj", "down_proj"])))
    assert dtypes(whole) == {torch.float32}
    whole.save_pretrained(tmp_path / "fp32")
    how = dict(autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage)
    rounded = PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "fp32", **how)
    rounded.load_adapter(tmp_path / "fp32", "again", **how)
    assert dtypes(rounded) == {torch.bfloat16}  # and taken, though delta W is not quite the file's
    assert not any(p.requires_grad for p in rounded.parameters())
    for a, b in zip(layers(whole).values(), layers(rounded).values(), strict=True):
        assert torch.equal(b.loraxs_R["default"], a.loraxs_R["default"].bfloat16())
    rounded.set_adapter("default")
    y = logits(rounded)
    rounded(IDS).logits.float().sum().backward()
    assert all(layer.loraxs_R["default"].grad.dtype == torch.bfloat16 for layer in layers(rounded).values())
    rounded.merge_adapter()
    torch.testing.assert_close(logits(rounded), y, atol=3e-2, rtol=0)
    rounded.unmerge_adapter()
    rounded.save_pretrained(tmp_path / "bf16")
    again = PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "bf16", low_cpu_mem_usage=low_cpu_mem_usage)
    assert dtypes(again) == {torch.float32} and torch.equal(logits(again), y)
    halves = get_peft_model(llama().half(), config(), autocast_adapter_dtype=False)
    assert dtypes(halves) == {torch.float16}
    assert all(p.requires_grad == ("loraxs_R" in name) for name, p in halves.named_parameters())


def test_fsdp1_takes_a_bf16_model_whose_R_is_bf16():
    from torch import distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = randomise(get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False))
    plain = copy.deepcopy(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options, blocks = dict(use_orig_params=True, device_id=torch.device("cpu")), model.base_model.model.model.layers
        blocks[0] = FSDP(blocks[0], **options)
        wrapped = FSDP(model, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the state dict has R for")  # whose names are without those of FSDP
            R = {key: t for key, t in plain.state_dict().items() if "loraxs_R" in key}
            wrapped.load_state_dict(R, strict=False)
        y = wrapped(IDS).logits
        y.float().sum().backward()
        gradients = [p.grad for name, p in wrapped.named_parameters() if "loraxs_R" in name]
    finally:
        dist.destroy_process_group()
    expected = plain(IDS).logits
    expected.float().sum().backward()
    torch.testing.assert_close(y, expected, atol=5e-3, rtol=0)  # the flat parameter lies otherwise in memory
    for a, layer in zip(gradients, layers(plain).values(), strict=True):
        torch.testing.assert_close(a, layer.loraxs_R["default"].grad, atol=2e-2, rtol=5e-2)


def test_the_cast_of_inputs_can_be_disabled():
    from peft.helpers import disable_input_dtype_casting

    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)).bfloat16(), config(target_modules=["0"], task_type=None))
    layer = model.base_model.model[0]
    layer.base_layer.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))  # as layerwise casting does
    x = torch.randn(3, 8)
    y = model(x.bfloat16())
    assert torch.equal(model(x), y)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x.bfloat16()), y)
        with pytest.raises(ValueError, match=r"x: got torch.float32 for module '0', must be torch.bfloat16"):
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    assert torch.equal(model(x), y)


def test_a_scaling_that_no_file_would_hold_is_not_saved(tmp_path):
    model = get_peft_model(llama(), config(lora_alpha=7, alpha_pattern={"q_proj": 3}, rank_pattern={"down_proj": 3}))
    model.save_pretrained(tmp_path / "saved")
    first = next(iter(layers(model).values()))
    first.scaling["default"] *= 2
    with pytest.raises(ValueError, match=r"scaling of module 'model.*0\.self_attn.q_proj' is 1\.5, must be 0\.75, as"):
        model.save_pretrained(tmp_path / "never")
    first.scaling["default"] /= 2
    model.peft_config["default"].lora_alpha = 8
    with pytest.raises(ValueError, match=r"k_proj' is 1\.75, must be 2\.0, as its config \(lora_alpha 8"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never" / "adapter_model.safetensors").exists()
    model.peft_config["default"].lora_alpha = 7
    model.add_adapter("other", config())
    first.scaling["other"] *= 2
    if hasattr(BaseTuner, "_get_adapter_state_dict"):  # peft tells which adapter is saved
        model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
        assert (tmp_path / "one" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"adapter 'other': scaling of module 'model.*0\.self_attn.q_proj' is 2\.0"):
        model.save_pretrained(tmp_path / "two", selected_adapters=["other"])
    assert not (tmp_path / "two" / "other" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="peft does not ask what to save")
def test_an_adapter_whose_weights_were_loaded_after_it_was_made_is_saved_with_its_A_and_B(tmp_path):
    def other() -> nn.Module:
        return llama(initializer_range=0.1)

    model = randomise(get_peft_model(llama(), config()))
    weights = dict(other().named_modules())
    for name, layer in layers(model.base_model.model).items():
        layer.base_layer.load_state_dict(weights[name].state_dict())
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")  # whose weights are not looked at
    model.unmerge_adapter()
    assert not model.peft_config["default"].save_factors
    with pytest.warns(
        UserWarning, match=r"adapter 'default': A and B of 14 modules, the first module 'model.*0"
    ) as seen:
        model.save_pretrained(tmp_path / "saved")
    assert seen[0].filename == __file__
    base = other()
    base.load_state_dict(
        {key.replace(".base_layer", ""): t for key, t in model.get_base_model().state_dict().items()}, False
    )
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "saved")), logits(model))


@pytest.mark.skipif(not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="peft does not ask what to save")
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.bfloat16, torch.float32)], ids=str)
def test_an_adapter_that_was_rounded_since_is_saved_with_its_A_and_B(tmp_path, dtypes):
    """No load would round A and B as these were."""
    model, base = randomise(get_peft_model(llama(), config())), llama()
    for dtype in dtypes:
        model.to(dtype)
        base.to(dtype)
    model.add_adapter("ref", model.peft_config["default"])  # one config for both, as TRL has it
    state = model.state_dict()  # from before A and B are known to be saved
    with pytest.warns(UserWarning, match="A and B of 14 modules"):
        model.save_pretrained(tmp_path, state_dict=state)
    for folder in (tmp_path, tmp_path / "ref"):
        assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), folder)), logits(model))


def test_settings_that_choose_modules():
    model = get_peft_model(
        llama(), config(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"])
    )
    assert [name for name in layers(model.base_model.model)] == ["model.layers.1.self_attn.q_proj"]
    default = get_peft_model(llama(), config(target_modules=None))
    assert {name.rpartition(".")[2] for name in layers(default)} == {"q_proj", "v_proj"}  # as for LoRA


def test_the_type_is_a_real_member_and_peft_comes_first(monkeypatch):
    assert PeftType("LORAXS") is PeftType.LORAXS and PeftType.LORAXS in list(PeftType)
    registration = loraxs_peft.registration
    assert registration.PEFT_TYPE_TO_CONFIG_MAPPING["LORAXS"] is LoraXSConfig
    theirs = type("Theirs", (PeftConfig,), {}), type("TheirModel", (BaseTuner,), {"prefix": "xs_"})
    monkeypatch.setitem(registration.PEFT_TYPE_TO_CONFIG_MAPPING, "LORAXS", theirs[0])
    monkeypatch.setitem(registration.PEFT_TYPE_TO_TUNER_MAPPING, "LORAXS", theirs[1])
    with pytest.warns(UserWarning, match="has its own LORAXS"):
        assert registration.register(LoraXSConfig, loraxs_peft.LoraXSModel) == theirs
    assert registration.PEFT_TYPE_TO_CONFIG_MAPPING["LORAXS"] is theirs[0]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))


def tuner(*adapters: str, merged: bool = False, **changes) -> nn.Module:
    """What PeftModel.base_model is, with these adapters."""
    settings = dict(r=2, target_modules=["0", "2"], modules_to_save=["3"], init_std=0.5, task_type=None) | changes
    model = get_peft_model(net(), config(**settings), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(**{"svd_seed": 1} | settings))
    if merged:
        model.merge_adapter()
    return model.base_model


def add(model: nn.Module) -> None:
    settings = config(r=3, target_modules=["0", "2"], modules_to_save=["3"], init_std=0.5, task_type=None)
    model.peft_config["b"] = settings  # as PeftModel does before it calls
    try:
        model.inject_adapter(model.model, "b")
    finally:
        if "b" not in next(m for m in model.modules() if isinstance(m, LoraXSLinearLayer)).r:
            model.peft_config.pop("b", None)  # where the interruption comes before the first step


OPERATIONS = {
    "inject": (lambda: tuner("a"), add),
    "merge": (lambda: tuner("a", "b"), lambda model: model.merge_adapter(["a", "b"])),
    "unmerge": (lambda: tuner("a", merged=True), lambda model: model.unmerge_adapter()),
    "unload": (lambda: tuner("a"), lambda model: model.merge_and_unload()),
    "delete": (lambda: tuner("a", "b"), lambda model: model.delete_adapter("a")),
    "sum": (
        lambda: tuner("a", "b", modules_to_save=None, svd_seed=0),
        lambda model: model.add_weighted_adapter(["a", "b"], [2, -1], "c"),
    ),
}


def outcome(model: nn.Module):
    """Everything there is to see of a small model, in values that can be compared."""
    inner = model.model
    tensors = [*inner.named_parameters(), *inner.named_buffers()]
    return (
        [
            (name, type(m), sorted(getattr(m, "r", ())), list(getattr(m, "merged_adapters", ())))
            for name, m in inner.named_modules()
        ],
        [(name, t.requires_grad, t.detach().numpy().tobytes()) for name, t in tensors],
        inner(torch.arange(24.0).view(3, 8)).detach().numpy().tobytes(),
        (sorted(model.peft_config), list(model.active_adapters), sorted(vars(inner))),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interruption_leaves_all_or_nothing(operation):
    make, call = OPERATIONS[operation]
    assert_all_or_nothing(make, call, outcome, undone=5, within="/loraxs_kernels/integrations/")
