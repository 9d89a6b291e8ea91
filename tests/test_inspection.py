"""`loraxs inspect`: what a file holds, with everything about it checked and no model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import hubstub
import pytest
import safetensors.torch
import torch
from test_adapter_file import mlp

import loraxs_kernels as lx
from loraxs_kernels import files
from loraxs_kernels.cli import main


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(rank_pattern={"2": 3}, lora_alpha=8, modules_to_save=["3"], seed=5, init_std=0.5)
    return lx.attach(mlp(), 4, target_modules=["0", "2"], **options)


def inspected(capsys, *arguments: str) -> dict | str:
    assert main(["inspect", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


def test_a_file_of_somebody_elses_prints_no_lines_of_its_own(model, capsys):
    model.config = SimpleNamespace(_name_or_path="bert\n  checksum           ok\x1b[2J é \udcff")
    lx.save_adapter(model, "a.safetensors")
    text = inspected(capsys, "a.safetensors")
    assert "  base model         bert\\n  checksum           ok\\x1b[2J é \\udcff\n" in text


def test_an_adapter_file(model, capsys):
    lx.save_adapter(model, "a.safetensors", dtype="bf16")
    found = inspected(capsys, "a.safetensors", "--json")
    size = Path("a.safetensors").stat().st_size
    assert (found["kind"], found["path"], found["bytes"]) == ("LoRA-XS adapter", "a.safetensors", size)
    assert (found["format_version"], found["written_by"]) == (3, lx.__version__)
    assert found["modules"] == {
        "0": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "init_std": 0.5},
        "2": {"rank": 3, "alpha": 8.0, "dropout": 0.0, "init_std": 0.5},
    }
    assert (found["parameters"], found["dtype"], found["modules_to_save"]) == (25, "bfloat16", {"3": 105})
    assert (found["portable"], found["factors"], found["probes"]) == (False, False, 8)
    ways = [(way["init"], way["seed"], way["block"], way["weight_dtype"]) for way in found["recipes"]]
    assert ways == [("svd", 5, 12, "float32"), ("svd", 5, 11, "float32")]
    text = inspected(capsys, "a.safetensors")
    for line in (
        f"a.safetensors: LoRA-XS adapter, {size:,} bytes",
        f"  written by         loraxs_kernels {lx.__version__}; format version 3",
        f"  checksum           ok, SHA-256 {found['sha256']}",
        "  base model         not named",
        "  rank r             3, 4",
        "  init_std           0.5",
        "  parameters in R    25, as bfloat16",
        "  modules_to_save    3 (105 numbers)",
        "  portable           no: loads only where A and B are the same",
    ):
        assert line in text.splitlines()
    assert "svd, seed 5, krylov, block 12, n_iter 5, from float32 weights; svd, seed 5" in text


def test_what_makes_an_adapter_portable(model, capsys):
    lx.save_adapter(model, "sketch/", portable=True)
    found = inspected(capsys, "sketch", "--json")
    assert found["portable"] and not found["factors"]
    assert "yes, has a sketch of the singular vectors" in inspected(capsys, "sketch")
    lx.save_adapter(model, "factors/", save_factors=True)
    found = inspected(capsys, "factors", "--json")
    assert found["portable"] and found["factors"] and found["modules"]["2"]["shape"] == [20, 30]
    assert "  shapes (out x in)  1 of 30 x 20, 1 of 20 x 30" in inspected(capsys, "factors")


def test_a_basis_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    safetensors.torch.save_file({"q.weight": torch.randn(20, 24), "k.weight": torch.randn(20, 24)}, "toy/m.safetensors")
    assert main(["init", "toy", "-r", "4", "-o", "basis.safetensors", "--seed", "3", "--dtype", "bf16"]) == 0
    capsys.readouterr()
    found = inspected(capsys, "basis.safetensors", "--json")
    assert (found["kind"], found["base_model"], found["written_by"]) == ("basis file", "toy", lx.__version__)
    assert found["modules"] == {key: {"rank": 4, "shape": [20, 24]} for key in "kq"}
    assert [(way["seed"], way["rounded"]) for way in found["recipes"]] == [(3, ["bfloat16"])]
    assert "  shapes (out x in)  2 of 20 x 24" in inspected(capsys, "basis.safetensors")


def test_a_bank(model, capsys):
    pytest.importorskip("lmdb")
    lx.save_adapter(model, "a.safetensors")
    with lx.AdapterBank.create("bank", model, dtype="bf16") as bank:
        bank.add_many([("one", "a.safetensors"), ("two", "a.safetensors")])
    found = inspected(capsys, "bank", "--json")
    assert (found["adapters"], found["parameters"], found["dtype"]) == (2, 25, "bfloat16")
    assert found["modules"]["2"] == {"rank": 3, "alpha": 8.0} and found["modules_to_save"] == ["3"]
    assert "  adapters           2" in inspected(capsys, "bank").splitlines()
    assert main(["inspect", "bank/basis.safetensors"]) == 1
    assert "is a part of a bank; inspect its folder, bank" in capsys.readouterr().err
    assert main(["inspect", "bank", "--revision", "v2"]) == 1
    assert "revision: got 'v2' for the local path bank" in capsys.readouterr().err


def test_an_adapter_of_the_hub(model, capsys, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    with hubstub.running(monkeypatch, tmp_path / "cache") as hub:
        lx.push_to_hub(model, "user/name", token=hubstub.TOKEN, revision="v2")
        assert inspected(capsys, "user/name", "--revision", "v2", "--json")["parameters"] == 25
        assert main(["inspect", "user/name"]) == 1
        message = "user/name: the repository on the Hub has no file adapter.safetensors"
        assert capsys.readouterr().err == f"loraxs inspect: {message}\n"
        assert hub.repos.keys() == {"user/name"}


def test_a_file_that_does_not_name_what_wrote_it(model, capsys, monkeypatch):
    """As those of earlier versions: everything else is the same, and it loads."""
    lx.save_adapter(model, "new.safetensors")
    monkeypatch.setattr(files, "METADATA", b"\0")
    lx.save_adapter(model, "old.safetensors")
    found = inspected(capsys, "old.safetensors", "--json")
    assert found["written_by"] is None
    assert found | {"sha256": 0, "bytes": 0, "path": 0, "written_by": 0} == {
        **inspected(capsys, "new.safetensors", "--json"),
        **{"sha256": 0, "bytes": 0, "path": 0, "written_by": 0},
    }
    assert "did not note itself" in inspected(capsys, "old.safetensors")
    for name in ("old", "new"):
        assert torch.equal(lx.load_adapter(mlp(), f"{name}.safetensors")[0].R, model[0].R)


@pytest.mark.parametrize("what", ["damaged", "writer", "cut", "foreign", "missing", "empty folder"])
def test_errors_name_the_file(what, model, capsys):
    path = Path("a.safetensors")
    lx.save_adapter(model, path)
    data = path.read_bytes()
    if what == "damaged":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif what == "writer":
        path.write_bytes(data.replace(f'"{lx.__version__}"'.encode(), b'"9' + lx.__version__.encode()[1:] + b'"'))
    elif what == "cut":
        path.write_bytes(data[:-8])
    elif what == "foreign":
        safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    elif what == "missing":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    message = {
        "damaged": "is damaged: its SHA-256 is",
        "writer": "is damaged: its SHA-256 is",
        "cut": "is not a whole safetensors file",
        "foreign": "is a safetensors file, but neither a LoRA-XS adapter nor a basis file",
        "missing": "there is no regular file or folder",
        "empty folder": "has no adapter.safetensors",
    }[what]
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error and "a.safetensors" in error and error.count("\n") == 1


def test_the_checksum_is_of_the_whole_file(model, capsys):
    lx.save_adapter(model, "a.safetensors")
    said = inspected(capsys, "a.safetensors", "--json")["sha256"]
    assert int.from_bytes(Path("a.safetensors").read_bytes()[:8], "little") % 8 == 0  # tensors are aligned
    assert hashlib.sha256(Path("a.safetensors").read_bytes().replace(said.encode(), b"0" * 64)).hexdigest() == said
