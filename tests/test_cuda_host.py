"""What the real core tells CUDA: launches and TMA's descriptors, written down by tests/emulator/recorder.cpp.

The objects are those nvcc made for this checkout; operands are on the CPU and nothing runs.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path

import emulator
import pytest
import torch
from helpers import backward, operands

from loraxs_kernels import backends
from loraxs_kernels.backends import cuda as backend
from loraxs_kernels.backends.cuda.config import TILES, Decode, Rows

BUILT = Path(__file__).parents[1] / "build" / "core" / "CMakeFiles"
SHARED = 227 * 1024  # bytes that a block may have on Hopper


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    objects = [path for path in BUILT.glob("*.dir/csrc/*.o") if "bindings" not in path.name]
    if sum("gemm_tail" in str(path) for path in objects) != 4 * len(TILES):
        pytest.skip("needs a core compiled for Hopper in this checkout")
    if ninja := shutil.which("ninja"):
        plan = subprocess.run([ninja, "-C", BUILT.parent, "-n"], capture_output=True, text=True).stdout
        assert "csrc" not in plan, f"csrc is newer: python setup.py build_ext --inplace\n{plan}"
    compiler = next(BUILT.glob("*/CMakeCUDACompiler.cmake")).read_text()
    toolkit = re.search(r'CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES "([^";]*)', compiler)[1]
    return emulator.recorded(tmp_path_factory.mktemp("recorded"), objects, Path(toolkit))


@pytest.fixture
def calls(recorder, monkeypatch):
    """Runs the backend on the recorded core; `calls()`: what CUDA was told since."""
    library = ctypes.CDLL(recorder.__file__)
    library.recorder_take.restype = ctypes.c_char_p
    monkeypatch.setattr(backend.core, "load", lambda: recorder)
    monkeypatch.setattr(backend.core, "architectures", lambda: tuple(recorder.architectures.split(";")))
    monkeypatch.setattr(backend, "runs_here", lambda x: x.is_cpu)

    def take(kind: str) -> list[dict]:
        lines = map(json.loads, library.recorder_take().decode().splitlines())
        return [line for line in lines if line["call"] == kind or kind == "all"]

    take.fail = lambda call: library.recorder_fail(call.encode())
    take.last = library.recorder_last
    take("all")
    yield take
    take.fail("nothing")


def described(t: torch.Tensor) -> tuple:
    """Where a matrix lies, the sizes and the pitch TMA should be told, the contiguous dimension first."""
    t = t if t.stride(1) == 1 else t.t()
    return t.data_ptr(), [t.shape[1], t.shape[0]], t.stride(0) * t.element_size()


# Whole tiles and none, ranks of part of a step and of several.
PROBLEMS = [(8192, 4096, 4096, 64), (129, 264, 72, 1), (1000, 1024, 4096, 12), (300, 40, 8, 130)]


@pytest.mark.parametrize("W", [True, False])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_the_gemm_describes_its_operands_as_they_lie(calls, shape, direction, tile, W):
    T, _, _, r = shape
    meta = operands(8, *shape[1:], torch.bfloat16)
    o = meta if direction == "forward" else backward(meta)
    (N, _), K = o.B.shape, o.A.shape[1]
    x = torch.empty(T, K, dtype=torch.bfloat16)
    u, B = (backend._laid(t, way) for t, way in ((torch.empty(T, r).bfloat16(), 0), (o.B, backend.lies(o.W))))
    y = backend.gemm_tail(x, o.W if W else None, u, B, None, tile, True)
    found = calls("all")
    encoded = [each for each in found if each["call"] == "encode"]
    told = {(each["address"], *map(tuple, (each["sizes"], each["strides"]))) for each in encoded}
    for t in (u, B, y, *((x, o.W) if W else ())):
        address, sizes, pitch = described(t)
        assert (address, (*sizes, 1), (pitch, 0)) in told
    each_once = sorted(t.data_ptr() for t in (u, B, y, *((x, o.W) if W else ())))
    assert sorted(each["address"] for each in encoded) == each_once  # y is not read, too
    (launch,) = (each for each in found if each["call"] == "launch")
    rows, columns, *_ = TILES[tile]
    tiles = 2 * -(-T // (2 * rows)) * -(-N // columns)
    assert launch["cluster"] == 2 and launch["early"] and launch["threads"] == 384
    assert torch.Size(launch["grid"]).numel() == min(tiles, 132) and launch["shared"] <= SHARED
    assert calls("all") == []


def test_a_layer_is_a_shrink_and_a_gemm(calls, monkeypatch):
    o = operands(8, 4096, 4096, 64, torch.bfloat16)
    x = torch.empty(8192, 4096, dtype=torch.bfloat16)
    backend.lowrank_linear(x, o.W, o.A, o.R, o.B, o.s)
    (gemm,) = calls("launch")
    assert "TailMainloop" in gemm["kernel"] and not gemm["early"]
    monkeypatch.setattr(backend, "pick", lambda *_: Rows(8, 1, True))
    backend.lowrank_linear(x[:1000], o.W, o.A, o.R, o.B, o.s)
    shrink, finish, gemm = calls("launch")
    assert shrink["grid"] == [16, 8, 1] and finish["grid"] == [16, 1, 1] and "finish_kernel" in finish["kernel"]
    assert (shrink["early"], finish["early"], gemm["early"]) == (False, True, True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_u_beside_the_gemm(calls, monkeypatch, direction):
    """The programs that make u come first and leave the GEMM whole pairs; each box of x and A is as they lie."""
    monkeypatch.setattr(backend, "pick", lambda *_: Rows(0, 1, True, 2, 2, 4))
    o = operands(8, 1024, 4096, 12, torch.bfloat16)
    o = o if direction == "forward" else backward(o)
    x, other = torch.empty(8192, o.W.shape[1], dtype=torch.bfloat16), torch.empty(8192, 12)
    A = backend._laid(o.A, 0 if direction == "forward" else 1)
    backend.lowrank_linear(x, o.W, A, o.R, backend._laid(o.B, backend.lies(o.W)), o.s, None, None, other)
    found = calls("all")
    shrink, gemm = (each for each in found if each["call"] == "launch")
    assert "shrink_tma_kernel" in shrink["kernel"] and "TailMainloop" in gemm["kernel"]
    assert (shrink["grid"], shrink["cluster"], shrink["early"]) == ([4, 1, 1], 2, False)
    assert torch.Size(gemm["grid"]).numel() == 128 and gemm["early"] and shrink["shared"] <= SHARED
    encoded = [each for each in found if each["call"] == "encode"][:2]
    for each, t, box in zip(encoded, (x, A), ([64, 128], [64, 64]), strict=True):
        address, sizes, pitch = described(t)
        assert (each["address"], each["sizes"], each["strides"], each["box"]) == (address, sizes, [pitch], box)


def test_few_rows_are_one_launch_of_clusters(calls):
    o = operands(40, 300, 4096, 16, torch.bfloat16)
    backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias)
    (launch,) = calls("all")
    assert "decode_kernel" in launch["kernel"] and launch["shared"] <= 99 * 1024
    assert (launch["grid"], launch["cluster"], launch["early"]) == ([8, 1, 1], 8, False)


@pytest.mark.parametrize(
    ("plan", "kernel", "call"),
    [
        *((Rows(1, 0, False), "shrink", call) for call in ("attribute", "launch")),
        *((Rows(0, 1, False), "gemm_tail", call) for call in ("attribute", "launch", "encode")),
        *((Decode(1, 1), "decode", call) for call in ("attribute", "launch")),
    ],
    ids=str,
)
def test_no_error_is_lost_and_none_left_behind(calls, monkeypatch, plan, kernel, call):
    T = 40 if isinstance(plan, Decode) else 300
    o = operands(T, 64, 64, 64, torch.bfloat16)
    monkeypatch.setattr(backend, "pick", lambda *_: plan)
    calls.fail(call)
    words = "the driver refuses to describe an operand" if call == "encode" else "CUDA's own words"
    with pytest.raises(RuntimeError, match=f"loraxs {kernel}: {words}"):
        backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    assert calls.last() == 0
    calls.fail("nothing")
    backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s)


def test_a_driver_that_is_too_old_is_a_reason(calls, monkeypatch):
    monkeypatch.setattr(backend.core, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backends.unavailable("cuda") is None
    calls.fail("driver")
    assert backends.unavailable("cuda") == "the driver cannot run the CUDA core: other words of CUDA's"
    calls.fail("nothing")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5, it must be at least 8.0" in backends.unavailable("cuda")
