"""The package as a whole: an inert import, the command line, and documents that name what exists."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import operator
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import loraxs_kernels as lx
from loraxs_kernels.cli import main

ROOT = Path(__file__).parents[1]


def test_import_is_inert():
    """No GPU touched, nothing printed, none of the optional packages and no compiler loaded."""
    script = """
import sys, torch
before = set(sys.modules)
import loraxs_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
optional = {"transformers", "peft", "matplotlib", "sklearn", "triton", "bitsandbytes", "torchao", "deepspeed",
    "lmdb"}
assert not new & optional, new
lazy = {"loraxs_kernels.bench", "loraxs_kernels.demo", "loraxs_kernels.tuning.run", "loraxs_kernels.tuning.tiles"}
assert not lazy & set(sys.modules)
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules), "a compiler was loaded"
assert not torch.cuda.is_initialized()
assert torch.get_float32_matmul_precision() == "highest"
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", ""), run.stderr


@pytest.mark.parametrize(("name", "packages"), {"peft": "peft", "transformers": "transformers accelerate"}.items())
def test_an_integration_without_its_packages_says_which(monkeypatch, name, packages):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"needs the packages? .*: pip install {packages}$") as error:
        runpy.run_path(str(ROOT / "loraxs_kernels" / "integrations" / name / "__init__.py"))
    assert error.value.name is None  # for the command line it is a sentence, and no broken import


def test_public_names():
    assert all(hasattr(lx, name) for name in lx.__all__)
    assert all(getattr(lx, name).__doc__ for name in lx.__all__)
    assert lx.__version__ == importlib.metadata.version("loraxs_kernels")


def test_documents_name_what_exists():
    for document in ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / document).read_text()
        for name in re.findall(r"\blx\.(\w+(?:\.\w+)*)", text):
            try:
                operator.attrgetter(name)(lx)
            except AttributeError:
                pytest.fail(f"{document} speaks of lx.{name}")
        for path in re.findall(r"`((?:bench|docs|examples|tests|loraxs_kernels|\.ci)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{document} speaks of {path}"


def test_info_command(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^backend torch +available$", printed, re.M)
    assert re.search(rf"^loraxs_kernels +{re.escape(lx.__version__)}$", printed, re.M)


def test_unknown_commands_are_refused(capsys):
    for arguments in ([], ["train"], ["demo", "--model", "llama"], ["demo", "--quick", "--full"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and "usage: loraxs" in capsys.readouterr().err
