"""`loraxs export`: what it writes computes what the adapted model does, without this library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels.cli import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def trained(tmp_path):
    """The logits of an adapted model, whose base and adapter are in the folder, as "base" and "alice.safetensors"."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "README.md", "pytorch_model.bin"):
        (tmp_path / "base" / name).write_text("{}")
    lx.attach(model, 4, rank_pattern={"q_proj": 2}, alpha=6, progress=False)
    for layer in model.modules():
        if isinstance(layer, lx.LoraXSLinear):
            nn.init.normal_(layer.R, std=0.5)
    lx.save_adapter(model, tmp_path / "alice.safetensors")
    return model(IDS).logits.detach()


def export(folder, *options: str) -> int:
    base, adapter, out = (str(folder / name) for name in ("base", "alice.safetensors", "out"))
    return main(["export", base, adapter, "-o", out, *options])


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_as_lora(trained, tmp_path, capsys):
    assert export(tmp_path) == 0 and capsys.readouterr().out == f"{tmp_path / 'out'}: the adapter as LoRA\n"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.peft_config["default"].peft_type == peft.PeftType.LORA
    torch.testing.assert_close(model(IDS).logits, trained)
    assert (loaded(tmp_path / "base")(IDS).logits - trained).norm() > 0.01 * trained.norm()
    assert export(tmp_path, "--dtype", "bf16") == 0
    model = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "out")
    assert 0 < (model(IDS).logits - trained).norm() < 0.01 * trained.norm()


def test_merged(trained, tmp_path, capsys):
    assert export(tmp_path, "--merge") == 0
    torch.testing.assert_close(loaded(tmp_path / "out")(IDS).logits, trained)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and not names & {"README.md", "pytorch_model.bin"}
    before = sorted(tmp_path.rglob("*"))
    assert export(tmp_path, "--merge") == 1
    assert "out is there already, must be a new or empty folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left", "out")))
        assert export(tmp_path, "--merge") == 1 and "no space left" in capsys.readouterr().err
    (tmp_path / "base" / "config.json").write_text("{}")
    for options, todo in (((), "export_as_lora(model, FOLDER)"), (("--merge",), "lx.detach(model, merge=True)")):
        assert export(tmp_path, *options) == 1
        error = capsys.readouterr().err
        assert "cannot be loaded as a transformers model" in error and error.endswith(f"and {todo}\n")
    assert main(["export", str(tmp_path / "base"), "", "-o", "x"]) == 1
    assert "adapter: got '', must be" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
