"""examples/quickstart.ipynb: its cells run in order, shortened, and compute what they say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import PACKAGE

from loraxs_kernels import demo

NOTEBOOK = PACKAGE.parent / "examples" / "quickstart.ipynb"
SHORT = {"STEPS = 150": "STEPS = 20", "BATCH = 32": "BATCH = 16", "TEST_QUESTIONS = 500": "TEST_QUESTIONS = 60"}


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_has_no_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in demo.PACKAGES["minilm"]),
    reason="needs the demo's packages, which `make test` installs",
)
def test_its_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join("".join(cell["source"]) for cell in cells("code"))
    for long, short in SHORT.items():
        assert code.count(long) == 1
        code = code.replace(long, short)
    made: dict = {}
    exec(compile(code, str(NOTEBOOK), "exec"), made)
    printed = capsys.readouterr().out
    assert made["accuracy"] > made["before"] + 0.2
    assert sum(made["losses"][-5:]) < 0.8 * sum(made["losses"][:5])
    assert torch.equal(made["loaded"], made["predicted"])
    assert (made["merged"] != made["predicted"]).sum() <= 1
    assert set(made["answers"]) <= set(made["trec"].CLASSES)
    assert {path.name for path in Path("my-adapter").iterdir()} == {"adapter.safetensors", "README.md"}
    assert "trainable params: 11,526 || all params: 22,576,902" in printed
    assert "beside R: 2,310 in head" in printed
    assert "  parameters in R    9,216, as float32" in printed
