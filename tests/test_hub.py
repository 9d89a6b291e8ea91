"""Adapters on the Hub, by huggingface_hub's own client against a small hub on this machine; folders and their cards."""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hubstub
import pytest
import torch
from test_adapter_file import mlp
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels.card import ABOUT, is_as_written
from loraxs_kernels.hub import download

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def trained():
    model = lx.attach(mlp(), 4, target_modules=["0", "2"], modules_to_save=["3"], alpha=8, init_std=1.0)
    nn.init.normal_(model[3].weight)
    return model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with hubstub.running(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(6, 20)
    return torch.equal(a(x), b(x))


# --- folders


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_gets_the_adapter_and_a_card(trained, tmp_path, made):
    folder = tmp_path / "out"
    if made:
        folder.mkdir()
    lx.save_adapter(trained, folder if made else f"{folder}{os.sep}")
    assert sorted(each.name for each in folder.iterdir()) == ["README.md", "adapter.safetensors"]
    for path in (folder, str(folder), folder / "adapter.safetensors"):
        assert same(lx.load_adapter(mlp(), path), trained)
    lx.save_adapter(trained, tmp_path / "plain.safetensors")
    assert (folder / "adapter.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


CARD = f"""---
library_name: loraxs_kernels
tags:
- lora-xs
- loraxs_kernels
---

# LoRA-XS adapter

{ABOUT}

| | |
|---|---|
| base model | not known |
| adapted modules | 2: 1 0, 1 2 |
| rank r | 3, 4 |
| scaling s = alpha / r | 2, 2.66667 |
| A and B | svd |
| parameters in R | 25 |
| trained whole | 1 (0 numbers), 3 (105 numbers) |
| written by | loraxs_kernels {lx.__version__} |

## Load it

```python
import loraxs_kernels as lx

model = ...  # the base model that the adapter was trained on
lx.load_adapter(model, OUT)
```

Install the library with `pip install loraxs_kernels`.
"""


def test_a_card_says_what_the_adapter_is(tmp_path):
    model = lx.attach(mlp(), 4, rank_pattern={"2": 3}, alpha=8, target_modules=["0", "2"], modules_to_save=["1", "3"])
    lx.save_adapter(model, f"{tmp_path}/out/")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.rpartition("<!--")[0] == CARD.replace("OUT", '"out"') and is_as_written(tmp_path / "out" / "README.md")


@pytest.mark.parametrize("name", ["bert/base", "/home/somebody/bert", ""])
def test_the_code_of_a_card_works_and_only_a_base_model_of_the_hub_is_named_in_front(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()
    model = copy.deepcopy(base)
    model.config._name_or_path = name
    lx.attach(model, 4, init_std=1.0)
    lx.save_adapter(model, "out/")
    text = Path("out/README.md").read_text()
    assert ('\nbase_model: "bert/base"\n' in text) == (name == "bert/base")
    shown = {"bert/base": "[bert/base](https://huggingface.co/bert/base)", "": "not known"}.get(name, name)
    assert f"| base model | {shown} |\n" in text and f"\n# LoRA-XS adapter{f' for {name}' if name else ''}\n" in text
    code = re.search(r"```python\n(.*)```", text, re.DOTALL)[1]
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options, name=name)
        return base

    monkeypatch.setattr(transformers.BertForSequenceClassification, "from_pretrained", from_pretrained)
    made = {} if name else {"model": base}
    exec(code if name else code.replace("model = ...", "#"), made)
    assert asked == ({"name": name, "dtype": "float32", "num_labels": 3} if name else {})
    ids = torch.arange(6)[None]
    assert torch.equal(made["model"](ids).logits, model(ids).logits)
    model.config.quantization_config = {"load_in_4bit": True}
    Path("bert/base").mkdir(parents=True)
    lx.save_adapter(model, "out/")
    text = Path("out/README.md").read_text()
    assert "\nbase_model" not in text, "it is a folder here"
    assert "from_pretrained" not in text and "was trained on, quantised as it was then\n" in text


@pytest.mark.parametrize("name", ["/odd|name\n---\nlicense: mit", "/no utf-8: \udcff", "a" * 300 + "/b"])
def test_any_name_of_a_base_model_can_be_saved(name, trained, tmp_path):
    trained.config = SimpleNamespace(_name_or_path=name)
    lx.save_adapter(trained, tmp_path / "plain.safetensors")
    lx.save_adapter(trained, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n---\n") == 1 and "\nlicense" not in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))
    assert same(lx.load_adapter(mlp(), tmp_path), trained)


def test_an_edited_card_stays(trained, tmp_path, recwarn, monkeypatch):
    readme = tmp_path / "README.md"
    lx.save_adapter(trained, tmp_path)
    written = readme.read_text()
    assert is_as_written(readme)
    lx.save_adapter(trained, tmp_path)  # nobody has edited it
    assert not recwarn.list and readme.read_text() == written
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and Path(path) == readme))
    for edited in (written.replace("LoRA-XS adapter", "My adapter"), written + "more\n", "# Mine\n", "\udcff"):
        readme.write_bytes(edited.encode(errors="surrogateescape"))
        trained[0].R.data += 1
        with pytest.warns(UserWarning, match=r"README\.md: was not written by save_adapter, or was edited") as caught:
            lx.save_adapter(trained, tmp_path)
        assert caught[0].filename == __file__
        assert readme.read_bytes() == edited.encode(errors="surrogateescape")
        assert same(lx.load_adapter(mlp(), tmp_path), trained)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .* has no adapter\.safetensors$"):
        lx.load_adapter(mlp(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it is an adapter of PEFT"):
        lx.load_adapter(mlp(), tmp_path)
    for call in (lx.load_adapter, lx.save_adapter):
        with pytest.raises(TypeError, match="path: got a NoneType, must be the path of an adapter"):
            call(mlp(), None)
    with pytest.raises(TypeError, match="basis: got a int, must be the path of a basis file"):
        lx.attach(mlp(), 2, basis=3)
    with pytest.raises(ValueError, match="path: got '', must be the path of an adapter"):
        lx.load_adapter(mlp(), "")


# --- the Hub


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, trained):
    url = lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN, dtype="bf16")
    assert url.endswith("/user/name/commit/1") and hub.message == "Upload a LoRA-XS adapter"
    assert not hub.private
    files = hub.repos["user/name"]["main"]
    assert files.keys() == {"adapter.safetensors", "README.md"}
    assert 'lx.load_adapter(model, "user/name")' in files["README.md"].decode()
    expected = lx.load_adapter(mlp(), lx.save_adapter(trained, "a.safetensors", dtype="bf16") or "a.safetensors")
    assert same(lx.load_adapter(mlp(), "user/name"), expected)
    assert Path("a.safetensors").read_bytes() == files["adapter.safetensors"]


def test_a_branch_of_a_private_repository(hub, trained):
    options = dict(private=True, token=hubstub.TOKEN, revision="v2", commit_message="Second")
    for _ in range(2):
        lx.push_to_hub(trained, "user/name", **options)
    assert hub.private == {"user/name"} and hub.message == "Second"
    assert hub.repos["user/name"]["v2"].keys() == {"adapter.safetensors", "README.md"}
    assert not hub.repos["user/name"]["main"]
    assert same(lx.load_adapter(mlp(), "user/name", revision="v2", token=hubstub.TOKEN), trained)
    with pytest.raises(FileNotFoundError, match=r"^user/name: the repository on the Hub has no file adapter\.safetens"):
        lx.load_adapter(mlp(), "user/name", token=hubstub.TOKEN)
    with pytest.raises(FileNotFoundError, match=r"^user/name: the repository on the Hub has no revision 'v3'"):
        lx.load_adapter(mlp(), "user/name", revision="v3", token=hubstub.TOKEN)
    with pytest.raises(
        FileNotFoundError,
        match=r"^user/name: is not here, and the Hub has .* a private one: log in .* token=",
    ):
        lx.load_adapter(mlp(), "user/name")


def test_an_edited_card_on_the_hub_stays(hub, trained):
    push = lambda: lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN)  # noqa: E731
    push()
    files = hub.repos["user/name"]["main"]
    written, files["README.md"] = files["README.md"], b"# Mine\n"
    trained[0].R.data += 1
    with pytest.warns(UserWarning, match=r"user/name: its README\.md was edited and stays"):
        push()
    assert files["README.md"] == b"# Mine\n" and same(lx.load_adapter(mlp(), "user/name"), trained)
    files["README.md"] = written
    trained.config = SimpleNamespace(_name_or_path="user/base")
    push()
    assert is_as_written(download("user/name", "README.md")) and b"user/base" in files["README.md"]


def test_a_card_that_cannot_be_seen_now_is_not_replaced(hub, trained):
    lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN)
    files = hub.repos["user/name"]["main"]
    assert is_as_written(download("user/name", "README.md"))  # so the cache says
    files["README.md"], hub.broken = b"# Mine\n", "README.md"
    before = dict(files)
    trained[0].R.data += 1
    with pytest.raises(ConnectionError, match=r"^user/name: the Hub cannot be reached"):
        lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN)
    assert files == before


def test_what_exists_here_goes_before_the_hub(hub, trained):
    lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN)
    trained[0].R.data += 1
    lx.save_adapter(trained, "user/name/")
    hub.requests.clear()
    assert same(lx.load_adapter(mlp(), "user/name"), trained) and not hub.requests
    with pytest.raises(ValueError, match=r"revision: got 'v1' for the local path user/name"):
        lx.load_adapter(mlp(), "user/name", revision="v1")
    with pytest.raises(FileNotFoundError, match=r"there is no file user/name\.safetensors"):
        lx.load_adapter(mlp(), "user/name.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file other/name"):
        lx.load_adapter(mlp(), Path("other/name"))  # a path is never a name on the Hub
    assert not hub.requests


def test_without_a_network_the_cache_serves_and_else_one_error_comes_soon(hub, trained, monkeypatch):
    lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN)
    lx.load_adapter(mlp(), "user/name")
    for name, value in (("broken", True), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(hub if name == "broken" else huggingface_hub.constants, name, value)
        assert same(lx.load_adapter(mlp(), "user/name"), trained)
        started, before = time.monotonic(), len(hub.requests)
        with pytest.raises(ConnectionError, match=r"^user/other: is not here, and (HF_HUB_OFFLINE is|the Hub cannot)"):
            lx.load_adapter(mlp(), "user/other")
        assert len(hub.requests) <= before + 1 and time.monotonic() - started < 5
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.broken = False
    hub.repos["user/name"].clear()  # what the Hub says goes before the cache
    with pytest.raises(FileNotFoundError, match=r"^user/name: the repository on the Hub has no revision"):
        lx.load_adapter(mlp(), "user/name")


def test_the_hub_refuses_a_wrong_token(hub, trained):
    with pytest.raises((PermissionError, FileNotFoundError), match=r"^user/name: .*log in \(hf auth login\) or pass"):
        lx.push_to_hub(trained, "user/name", token="hf_wrong")
    with pytest.raises(PermissionError, match=r"^user/name: the Hub refuses; log in .* must allow what you do"):
        lx.push_to_hub(trained, "user/name", token=hubstub.READS)
    assert not hub.repos


@pytest.mark.parametrize("name", ["name", "user/name.safetensors", "./user/name", "user\\name"])
def test_what_load_adapter_would_not_find_is_not_uploaded(hub, trained, name):
    with pytest.raises(ValueError, match=r"repo_id: got .* must be \"user/name\""):
        lx.push_to_hub(trained, name, token=hubstub.TOKEN)
    assert not hub.requests and not hub.repos


def test_a_name_with_an_underscore_in_front_goes_to_the_hub_and_comes_back(hub, trained):
    lx.push_to_hub(trained, "user/_name", token=hubstub.TOKEN)
    assert same(lx.load_adapter(mlp(), "user/_name"), trained)


def test_nothing_is_uploaded_of_an_adapter_that_cannot_be_saved(hub, trained):
    trained[0].R.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="R has NaN"):
        lx.push_to_hub(trained, "user/name", token=hubstub.TOKEN)
    with pytest.raises(ValueError, match="repo_id: got 'a//b', must be"):
        lx.push_to_hub(lx.attach(mlp(), 2), "a//b", token=hubstub.TOKEN)
    assert not hub.requests


def test_without_the_package_the_error_says_what_to_install(hub, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        lx.load_adapter(mlp(), "user/name")
