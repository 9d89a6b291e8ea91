"""Choosing a backend: the context manager, the honest reasons, and the seam a new backend plugs into."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from helpers import operands

import loraxs_kernels as lx
from loraxs_kernels import BackendUnavailable, backends
from loraxs_kernels.backends import torch as torch_backend
from loraxs_kernels.backends.device import plain
from loraxs_kernels.functional import lora_xs_linear


def test_unknown_names_are_refused():
    message = "backend: got 'cublas', must be one of 'torch', 'triton', 'cuda' or None"
    with pytest.raises(ValueError, match=message), lx.backend("cublas"):
        pass


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_runs_or_says_why_not(name):
    reason = backends.unavailable(name)
    if reason is None:
        with lx.backend(name):
            assert backends.choose(*chosen_by()) == name
    else:
        with (
            pytest.raises(BackendUnavailable, match=re.escape(f"backend '{name}' cannot run here: {reason}")),
            lx.backend(name),
        ):
            pass
    assert lx.info()[f"backend {name}"] == (f"not available: {reason}" if reason else "available")


def chosen_by():
    return torch.zeros(4, 6), 5, 2


def test_the_block_ends_the_choice_even_after_an_error():
    before = backends.choose(*chosen_by())
    with pytest.raises(KeyError), lx.backend("torch"), lx.backend(None):
        raise KeyError
    assert backends.choose(*chosen_by()) == before


@pytest.mark.parametrize("names", [("torch", "triton"), ("triton", "torch"), ("triton", None), ("torch", "torch")])
def test_overlapping_blocks_leave_nothing_forced(monkeypatch, names):
    """Two blocks in two threads end in the order in which they began; torch.compile has to see a plain global."""
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    before = backends._forced
    first, second = (lx.backend(name) for name in names)
    first.__enter__()
    second.__enter__()
    assert backends._forced == names[1]
    first.__exit__(None, None, None)
    assert backends._forced == names[1]
    second.__exit__(None, None, None)
    assert backends._forced == before


@pytest.fixture
def plugged_in(monkeypatch):
    """A backend put where its file would be, which counts its calls."""
    name = f"{backends.__name__}.triton"
    module = types.ModuleType(name)
    module.calls = []
    module.unavailable = lambda: None
    module.lowrank_linear = lambda *args, **more: (
        module.calls.append(args) or torch_backend.lowrank_linear(*args, **more)
    )
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backend_file_is_all_it_takes(plugged_in, compiled):
    """Forward and backward both run on the backend of the block, wherever the backward is called from."""
    o = operands(4, 5, 6, 2)
    call = torch.compile(lora_xs_linear, fullgraph=True, backend="aot_eager") if compiled else lora_xs_linear
    with lx.backend("triton"):
        y = call(o.x.requires_grad_(), o.W, o.A, o.R.requires_grad_(), o.B, o.s)
    assert len(plugged_in.calls) == 1
    y.backward(o.gY)
    assert len(plugged_in.calls) == 2
    assert plugged_in.calls[1][1].shape == (6, 5)  # W^T
    call(o.x, o.W, o.A, o.R, o.B, o.s)
    assert len(plugged_in.calls) == 2


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("again", [False, True])
def test_the_backward_computes_with_what_hooks_unpack(plugged_in, name, again):
    """Here W, A, R, B and z, all doubled: gX = gY (2 W) + s (gY 2 B) 2 R 2 A and gR = s (gY 2 B)^T 2 z."""
    o = operands(4, 5, 6, 2, torch.float64)
    x, R, gY = o.x.requires_grad_(), o.R.requires_grad_(), o.gY.requires_grad_()
    with lx.backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: 2 * t):
        y = lora_xs_linear(x, o.W, o.A, R, o.B, o.s)
    got = torch.autograd.grad(y, (x, R), gY, create_graph=again)
    v = gY @ (2 * o.B)
    for g, e in zip(
        got, (gY @ (2 * o.W) + o.s * v @ (2 * R) @ (2 * o.A), o.s * v.t() @ (2 * x @ o.A.t())), strict=True
    ):
        torch.testing.assert_close(g, e)
    if again:  # R and z are doubled apart from their graph
        (second,) = torch.autograd.grad(got[0].square().sum(), gY)
        once = 2 * o.W + 8 * o.s * o.B @ o.R.detach() @ o.A
        torch.testing.assert_close(second, 2 * gY @ once @ once.t())


def test_the_triton_backend_says_what_is_missing(monkeypatch):
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        assert backends.unavailable("triton") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU here" in backends.unavailable("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5, it must be at least 8.0" in backends.unavailable("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    module = backends.load("triton")
    monkeypatch.setattr(module, "cannot_compile", lambda: "no compiler")
    assert backends.unavailable("triton") == "no compiler"
    monkeypatch.setattr(module, "cannot_compile", lambda: None)
    assert backends.unavailable("triton") is None
    monkeypatch.setattr(triton, "__version__", "2.1.0")
    assert "triton 2.1.0 is too old, it must be at least 3.2" in backends.unavailable("triton")


def test_the_triton_backend_says_so_where_there_is_no_triton(monkeypatch):
    monkeypatch.setattr(backends, "triton", None, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or "backends.triton" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # so that importing it fails
    assert backends.unavailable("triton") == "the package triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("compilers", "CC", "headers", "reason"),
    [
        (["gcc"], None, True, None),
        (["clang"], None, True, None),
        (["mycc"], "mycc", True, None),
        ([], None, True, "Triton needs a C compiler, and there is no gcc or clang: install one, or set CC"),
        (["gcc"], "mycc", True, "Triton needs a C compiler, and there is none at CC=mycc: correct or unset CC"),
        (["gcc"], None, False, r"Triton needs the headers of this Python, and .* has no Python.h: install them"),
    ],
)
def test_triton_needs_a_c_compiler(monkeypatch, tmp_path, compilers, CC, headers, reason):
    pytest.importorskip("triton")
    module = backends.load("triton")
    monkeypatch.setattr(module.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    if CC:
        monkeypatch.setenv("CC", CC)
    if headers:
        (tmp_path / "Python.h").touch()
    found = module.cannot_compile.__wrapped__()
    assert found is None if reason is None else re.match(reason, found)
    (tmp_path / "cache" / "a launcher").mkdir(parents=True)
    (tmp_path / "cache" / "a launcher" / "it.so").touch()  # compiled before: such a machine may need no compiler
    assert module.cannot_compile.__wrapped__() is None


@pytest.mark.parametrize("name", ["W", "A", "R", "B", "bias", "z"])
def test_kernels_refuse_an_operand_on_another_device(name):
    o = operands(4, 5, 6, 2)
    given = {"W": o.W, "A": o.A, "R": o.R, "B": o.B, "bias": o.bias, "z": torch.zeros(4, 2)}
    assert plain(o.x, *given.values()) == (o.x, *given.values())
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name}: got device meta, must be cpu like x"):
        plain(o.x, *given.values())


def test_triton_launches_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on torch's current device: another one is made current for the call."""
    module = backends.load("triton")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert module.on(torch.device("cuda", 0)) is module.on(torch.device("cpu"))
    other = module.on(torch.device("cuda", 1))
    assert isinstance(other, torch.cuda.device) and other.idx == 1
