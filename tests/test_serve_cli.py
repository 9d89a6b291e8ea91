"""`loraxs serve` becomes vLLM's server with the right options and environment, or says in one line why not."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels import serve_cli
from loraxs_kernels.basis_file import make_basis
from loraxs_kernels.cli import main
from loraxs_kernels.integrations.vllm import TESTED, adapter

pytest.importorskip("lmdb")

SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
DEFAULTS = ["--enable-lora", "--max-loras=256", "--max-cpu-loras=1024"]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A folder with a bank and a basis; what was started in the end: (program, environment)."""
    monkeypatch.chdir(tmp_path)
    for name in ("LORAXS_BANK", "LORAXS_BASIS", "LORAXS_TOKEN", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    lx.AdapterBank.create("bank", lx.attach(model, 2, target_modules=["0"])).close()
    monkeypatch.setattr(serve_cli, "find_spec", lambda name: object())
    monkeypatch.setattr(serve_cli, "entry_points", lambda group: [])
    found = []
    monkeypatch.setattr(os, "execve", lambda path, program, environment: found.append((path, program, environment)))
    monkeypatch.setattr(serve_cli, "command", lambda arguments, command=serve_cli.command: command(arguments) or 0)
    return found


@pytest.mark.parametrize(
    "typed, becomes",
    [
        (["M", "--bank", "bank"], ["M", *DEFAULTS]),
        (["--bank=bank", "M", "--port", "80"], ["M", *DEFAULTS, "--port", "80"]),
        (
            ["M", "-tp", "2", "--x", "-1", "--bank", "bank", "--json", '{"a": 1}', "-O3", "y z"],
            ["M", *DEFAULTS, "-tp", "2", "--x", "-1", "--json", '{"a": 1}', "-O3", "y z"],
        ),
        (["M", "--bank", "bank", "--max-loras", "8"], ["M", DEFAULTS[0], DEFAULTS[2], "--max-loras", "8"]),
        (["M", "--bank", "bank", "--max_cpu_loras=9"], ["M", *DEFAULTS[:2], "--max_cpu_loras=9"]),
        (["M", "--bank", "bank", "--config", "f"], ["M", DEFAULTS[0], "--config", "f"]),
        (["M", "--bank", "bank", "--ban", "x"], ["M", *DEFAULTS, "--ban", "x"]),
        (["M", "--bank", "bank", "--a", "--", "--bank", "N"], ["M", *DEFAULTS, "--a", "--", "--bank", "N"]),
    ],
)
def test_what_is_not_ours_goes_to_vllm_in_its_order(started, typed, becomes):
    assert main(["serve", *typed]) == 0
    ((path, program, environment),) = started
    assert (path, program) == (sys.executable, SERVE + becomes)
    assert environment["LORAXS_BANK"] == os.path.abspath("bank") and environment["VLLM_PLUGINS"] == "loraxs"
    assert environment.keys() - os.environ.keys() == {"LORAXS_BANK", "VLLM_PLUGINS"}


def test_a_basis_is_checked_and_named(started, tmp_path, capsys):
    import safetensors.torch

    safetensors.torch.save_file({"q.weight": torch.randn(20, 24)}, "model.safetensors")
    make_basis("model.safetensors", 2, "basis.safetensors")
    assert main(["serve", "M", "--bank", "bank", "--basis", "basis.safetensors"]) == 0
    assert started[0][2]["LORAXS_BASIS"] == str(tmp_path / "basis.safetensors")
    assert main(["serve", "M", "--bank", "bank", "--basis", "model.safetensors"]) == 1
    assert "is a safetensors file, but no LoRA-XS basis" in capsys.readouterr().err and len(started) == 1


@pytest.mark.parametrize(
    "named, becomes",
    [(None, "one,two,loraxs"), ("", "loraxs"), ("mine", "mine,loraxs"), ("loraxs,mine", "loraxs,mine")],
)
def test_no_plugin_is_turned_off(started, monkeypatch, named, becomes):
    groups = {
        "vllm.general_plugins": ["one", "loraxs"],
        "vllm.stat_logger_plugins": ["two"],
        "vllm.endpoint_plugins": ["x"],
    }
    found = {group: [EntryPoint(name, "module:f", group) for name in names] for group, names in groups.items()}
    monkeypatch.setattr(serve_cli, "entry_points", lambda group: found.get(group, []))
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    assert main(["serve", "M", "--bank", "bank"]) == 0
    assert sorted(started[0][2]["VLLM_PLUGINS"].split(",")) == sorted(becomes.split(","))


def test_what_is_missing_is_told_before_anything_starts(started, monkeypatch, capsys):
    def refused(*typed: str) -> str:
        assert main(["serve", "M", *typed]) == 1 and not started
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("loraxs serve: ")
        return line

    assert "path: there is no bank none" in refused("--bank", "none")
    assert "path: got ''" in refused("--bank", "")
    monkeypatch.setenv("LORAXS_TOKEN", "short")
    assert refused("--bank", "bank").startswith("loraxs serve: LORAXS_TOKEN: must be 16 or more characters")
    monkeypatch.delenv("LORAXS_TOKEN")

    def no_lmdb(path: object) -> None:
        raise ImportError('an adapter bank needs the package lmdb: pip install "loraxs_kernels[bank]"')

    monkeypatch.setattr(serve_cli, "Store", no_lmdb)
    assert "needs the package lmdb" in refused("--bank", "bank")
    monkeypatch.setattr(serve_cli, "find_spec", lambda name: None)
    assert refused("--bank", "bank").endswith(f"pip install vllm=={TESTED[0]} lmdb")


@pytest.mark.parametrize(
    "typed, says",
    [
        (["M"], "the following arguments are required: --bank"),
        (["--bank", "bank"], "the following arguments are required: MODEL"),
        (["--port", "80", "M", "--bank", "bank"], "MODEL must come before vLLM's options, got --port first"),
    ],
)
def test_wrong_usage(started, capsys, typed, says):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *typed])
    assert ended.value.code == 2 and says in capsys.readouterr().err and not started
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0 and "loraxs serve MODEL --bank DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["info", "--bank", "bank"])
    assert "unrecognized arguments: --bank bank" in capsys.readouterr().err


def test_a_request_without_a_bank_says_what_to_set(monkeypatch):
    monkeypatch.delenv("LORAXS_BANK", raising=False)
    with pytest.raises(ValueError, match="bank: got None, must be a folder, or LORAXS_BANK must be set"):
        adapter("alice")
