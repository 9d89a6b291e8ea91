"""However a command of `loraxs` ends, it ends with the right status, and where it fails with one line that says why."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import loraxs_kernels
from loraxs_kernels import cli
from loraxs_kernels.cli import main

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder "toy" with one matrix, below the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    safetensors.torch.save_file({"q.weight": torch.randn(20, 24)}, "toy/model.safetensors")
    return tmp_path


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def raising(error: BaseException):
    def run(arguments):
        print("a line")
        raise error

    return run


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["params", "--help"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(monkeypatch, capsys, arguments, buffered):
    monkeypatch.setattr(sys, "stdout", stdout := closed_pipe())
    stdout.reconfigure(write_through=not buffered)
    assert main(arguments) == 141
    assert capsys.readouterr().err == ""
    stdout.close()  # as Python does when it ends: nothing is left that could fail
    assert sys.stdout is stdout


@needs_full
@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys, buffered):
    monkeypatch.setattr(sys, "stdout", stdout := open("/dev/full", "w"))  # noqa: SIM115
    stdout.reconfigure(write_through=not buffered)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "loraxs info: standard output: No space left on device\n"
    stdout.close()


@needs_full
def test_a_process_ends_with_these_statuses_too():
    """Python itself writes what is buffered when it ends, and has a status of its own, 120, where that fails."""
    command = [sys.executable, "-m", "loraxs_kernels", "info"]
    with closed_pipe() as stdout:
        ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (141, b"")
    with open("/dev/full", "w") as stdout:
        ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 1)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_streams_may_be_closed(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    assert main(["info"]) == 0
    assert main(["params", "--model", "tiny", "-r", "4", "--adapters", "0"]) == 1
    if stream == "stderr":
        monkeypatch.setattr(sys, stream, closed_pipe())
        assert main(["params", "--model", "tiny", "-r", "4", "--adapters", "0"]) == 1


def test_an_ascii_terminal_shows_other_letters_escaped(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["init", "toy", "-r", "4", "-o", "é.safetensors", "--device", "cpu"]) == 0
    assert stdout.buffer.getvalue().startswith(b"\\xe9.safetensors: A and B of 1 modules")
    assert (checkpoint / "é.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(28, "No space left on device", "there.safetensors"), 1, "there.safetensors: No space left on device"),
        (OSError(18, "Cross-device link", ".x.tmp", None, "there"), 1, "there: Cross-device link"),
        (OSError("a sentence"), 1, "a sentence"),
        (PermissionError(13, "Permission denied", "there\udcff"), 1, "there\\udcff: Permission denied"),
        (BrokenPipeError(32, "Broken pipe", "a fifo"), 1, "a fifo: Broken pipe"),
        (ValueError("rank: got 0,\n  must be 1"), 1, "rank: got 0, must be 1"),
        (ImportError("a bank needs the package lmdb"), 1, "a bank needs the package lmdb"),
        (MemoryError("8 EiB"), 1, "out of memory: 8 EiB"),
        (torch.OutOfMemoryError("8 EiB"), 1, "out of memory: 8 EiB"),
    ],
)
def test_what_a_command_raises_is_one_line(monkeypatch, capsys, error, status, message):
    monkeypatch.setattr(cli, "_info", raising(error))
    assert main(["info"]) == status
    assert capsys.readouterr() == ("a line\n", f"loraxs info: {message}\n")


@pytest.mark.parametrize("kind", [TypeError, AttributeError, RuntimeError, AssertionError])
def test_mistakes_of_the_program_keep_their_traceback(monkeypatch, kind):
    monkeypatch.setattr(cli, "_info", raising(kind("oops")))
    with pytest.raises(kind, match="oops"):
        main(["info"])


@pytest.mark.parametrize("code", ["import no_such_package", "from loraxs_kernels.info import no_such_name"])
def test_an_import_that_is_broken_keeps_its_traceback(monkeypatch, code):
    monkeypatch.setattr(cli, "_info", lambda arguments: exec(code, {}))
    with pytest.raises(ImportError, match="no_such"):
        main(["info"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workspace-gib", "inf"], "workspace_gib: got inf, must be a number of GiB above 0 and below 2^33"),
        (["--workspace", "1e400"], "workspace_gib: got inf"),
        (["--workspace-gib", "nan"], "workspace_gib: got nan"),
        (["--workspace", "-1"], "workspace_gib: got -1"),  # the name it had
        (["--dtype", "int8"], "dtype: got 'int8', must be one of bfloat16"),
        (["--n-iter", "1000000"], "n_iter: got 1000000, must be an integer from 0 to 1000"),
        (["--rank", "0"], "rank: got 0 for module 'q', must be an integer of at least 1\n"),
        (["--out", "toy"], "out: toy is a folder"),
        (["--out", ""], "out: . is a folder"),
        (["--out", "\udcff"], "out: got '\\udcff', must be a name in UTF-8"),
        (["--out", "toy/model.safetensors/x"], "out: toy/model.safetensors/x is in "),
    ],
)
def test_arguments_of_init_out_of_range(checkpoint, capsys, arguments, message):
    assert main(["init", "toy", "-r", "4", "-o", "basis.safetensors", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"loraxs init: {message}") and error.count("\n") == 1
    assert [path.name for path in checkpoint.rglob("*")] == ["toy", "model.safetensors"]


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[]", "config.json: is damaged, no JSON object but a list"),
        (b"\xff\xfe{}", "config.json: is damaged, no JSON"),
        (b"[" * 100_000, "config.json: is damaged, no JSON"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, must be at most 100000"),
        (LLAMA | {"num_labels": 10**9}, "num_labels is 1000000000"),
        (LLAMA | {"num_hidden_layers": 200}, "LlamaForCausalLM can be made: it has more than 1,000 modules"),
        (LLAMA | {"hidden_size": 10**30}, "LlamaForCausalLM can be made: "),
        (LLAMA | {"architectures": ["pipeline", "LlamaTokenizer", "__dict__", "LlamaModel"]}, None),
    ],
)
def test_a_config_that_is_none_or_wild(tmp_path, monkeypatch, capsys, config, message):
    pytest.importorskip("transformers")
    from loraxs_kernels import accounting

    monkeypatch.setattr(accounting, "MOST_MODULES", 1000)
    (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    assert main(["params", "--model", str(tmp_path), "-r", "4"]) == (message is not None)
    error = capsys.readouterr().err  # the packages that transformers imports may have logged something before
    assert message is None or re.search(rf"^loraxs params: model: .*{re.escape(message)}", error, re.MULTILINE)
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--adapters", "9" * 400], ["--adapters", "-1"], ["-r", "0"], ["-r", "9" * 30]])
def test_arguments_of_params_out_of_range(capsys, arguments):
    pytest.importorskip("transformers")
    assert main(["params", "--model", "tiny", "-r", "4", *arguments]) == 1
    assert f": got {arguments[-1]}" in capsys.readouterr().err


def test_an_option_that_is_given_twice_counts_twice(capsys):
    pytest.importorskip("transformers")
    twice = ["-r", "4", "--target-modules", "q_proj", "-r", "8", "--target-modules", "v_proj"]
    assert main(["params", "--model", "tiny", *twice]) == 0
    printed = capsys.readouterr().out
    assert ", 4 linear layers adapted" in printed and "\n4  LoRA-XS" in printed and "\n8  LoRA-XS" in printed
    assert main(["roofline", "--gpu", "H200", "--tokens", "16", "--tokens", "32", "--rank", "4"]) == 0
    assert re.search(r"ms T 16 r 4 +ms T 32 r 4 +% T 16 r 4 +% T 32 r 4\n", capsys.readouterr().out)


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"loraxs_kernels {loraxs_kernels.__version__}\n"


@pytest.mark.parametrize("config", ["3", "[" * 100_000, '{"num_hidden_layers": 1, "max_position_embeddings": "x"}'])
def test_a_config_that_bench_cannot_read(tmp_path, capsys, config):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(config)
    assert main(["bench", "model", "--model", str(tmp_path), "--device", "cpu"]) == 1
    assert f"loraxs bench: model: {tmp_path}/config.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens", "--rank", "--shape"])
def test_sizes_of_roofline_past_any_tensors(capsys, option):
    size = "9" * 400
    assert main(["roofline", option, f"{size}x4" if option == "--shape" else size]) == 1
    assert f"loraxs roofline: {option[2:]}: got" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [{"ceilings": 3}, {"ceilings": {"bandwidth": 0}}, {"rows": [3]}, {"rows": 3}])
def test_a_report_that_roofline_cannot_use(tmp_path, capsys, spoil):
    report = {"format": "loraxs-bench", "version": 2, "date": "", "machine": {}, "versions": {}, "commit": ""}
    report |= {"settings": {}, "ceilings": None, "complete": True, "seconds": 0, "rows": []} | spoil
    if isinstance(report["ceilings"], dict):
        report["ceilings"] = {"name": "a GPU", "half": 1.0, "single": 1.0, "source": "measured"} | report["ceilings"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["roofline", "--ceilings", str(tmp_path / "report.json")]) == 1
    assert "report.json" in capsys.readouterr().err


def test_the_demo_needs_a_device_that_computes():
    from loraxs_kernels import demo

    with pytest.raises(demo.DemoError, match="device: got 'meta', which computes nothing"):
        demo._device("meta")


def test_bytes_are_shown_in_the_largest_unit_that_fits():
    shown = {0: "0.0 B", 1: "1.0 B", 1023: "1,023.0 B", 1024: "1.0 KiB", 2**20 - 1: "1,024.0 KiB", 2**20: "1.0 MiB"}
    shown |= {2**50: "1.0 PiB", 2**60: "1,024.0 PiB"}
    assert {size: cli._binary(size) for size in shown} == shown
