"""The Triton kernels, interpreted on the CPU: every configuration, against the fp64 oracle; what they write, and where.

In a process of its own (`TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py tests/test_functional.py`; `make test`
does): Triton looks at the variable when it is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from helpers import INTERPRETED, assert_primitive, backward, guard, operands
from torch import nn

from loraxs_kernels import LoraXSLinear, backends

if not INTERPRETED:
    pytest.skip("runs in a process of its own, with TRITON_INTERPRET=1", allow_module_level=True)

from loraxs_kernels.backends import triton as backend
from loraxs_kernels.backends.triton import config, launcher
from loraxs_kernels.bench.shapes import Shape
from loraxs_kernels.tuning import tiles

DTYPES = {"half": torch.bfloat16, "tf32": torch.float32}
ROWS = [row for row in config.committed_table() if row.layout in ("any", "forward")]


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("layout", ["forward", "backward"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.family}-{row.precision}-r{row.rank}-T{row.tokens}")
def test_every_configuration(row, layout, programs, matmul_precision):
    """More than one tile of everything, none of it whole; the rank a little less than its tile."""
    matmul_precision("high" if row.precision == "tf32" else "highest")
    cut = dataclasses.replace(row.tiles, split_k=programs, split_n=programs)
    T, N, K = cut.block_t + 5, cut.block_n + 21, 2 * cut.block_k + 3
    o = operands(T, N, K, row.rank - 3, DTYPES[row.precision])
    o = o if layout == "forward" else backward(o)
    other = None if layout == "forward" else torch.randn(T, row.rank - 3)
    assert_primitive(o, backend.low_rank(cut, o.x, o.A, o.R, o.B, o.s, o.bias, None, other), other, W=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "r"), [(1, 1), (1, 25), (40, 4), (40, 12), (40, 128)])
def test_any_rank(T, r, dtype, matmul_precision):
    check_rank(T, r, dtype, matmul_precision)


def check_rank(T, r, dtype, matmul_precision):
    matmul_precision("high")
    o = operands(T, 67, 71, r, dtype)
    out, other = torch.randn(T, 67).to(dtype), torch.randn(T, r)
    before = out.clone()
    y, z, gram = backend.lowrank_linear(o.x, None, o.A, o.R, o.B, o.s, None, out, other)
    assert y is out
    assert_primitive(o, (y, z, gram), other, before, W=False)
    o = backward(o)
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, None, None, other), other)


@pytest.mark.parametrize("r", [4, 12, 20, 25, 48])
@pytest.mark.parametrize("processors", [1, 132])
def test_zeros_beside_a_layers_own_B_are_read_and_nothing_beside_anothers(monkeypatch, processors, r):
    monkeypatch.setattr(backend, "facts", lambda _: config.Device((9, 0), processors))
    widths, own = [], launcher.launch

    def launch(kernel, grid, tensors, free, sizes, *more):
        widths.append(sizes[3 if kernel == "chain_kernel" else 2])
        own(kernel, grid, tensors, free, sizes, *more)

    monkeypatch.setattr(launcher, "launch", launch)
    o, wide = operands(70, 40, 48, r, torch.bfloat16), r + -r % 16
    layer = LoraXSLinear.from_linear(nn.Linear(48, 40).bfloat16(), r, init=(o.A, o.B))
    foreign = torch.full((40, wide), math.nan, dtype=torch.bfloat16)[:, :r].copy_(o.B)
    for o.B, width in ((layer.B, wide), (copy.deepcopy(layer).B, wide), (foreign, r), (layer.B[:, :3], 3)):
        o.A, o.R = o.A[: o.B.shape[1]], o.R[: o.B.shape[1], : o.B.shape[1]]
        for each, other in ((o, None), (backward(o), torch.randn(70, len(o.R)))):
            widths.clear()
            results = backend.lowrank_linear(each.x, each.W, each.A, each.R, each.B, o.s, each.bias, None, other)
            assert_primitive(each, results, other)
            assert set(widths) == {width}


def test_numbers_are_rounded_to_tf32_and_not_cut_off():
    """z, R and the z of the forward in turn are 1 + 3/4096, which has more bits: 1 + 4/4096 rounded, 1 cut off."""
    cut, near, rounded = config.Config(16, 16, 16, 4, 2), 1 + 3 / 4096, 1 + 4 / 4096
    one, A = torch.ones(1, 1), torch.ones(1, 2).half()
    for x, R, other in ((near, 1.0, 1.0), (1.0, near, 1.0), (1.0, 1.0, near)):
        x = torch.tensor([[1.0, x - 1.0]]).half()
        y, _, gram = backend.low_rank(cut, x, A, R * one, one.half(), 1.0, None, None, other * one)
        assert y.item() == (rounded if other == 1.0 else 1.0)
        assert gram.item() == (rounded if R == 1.0 else 1.0)


@pytest.fixture
def guarded(monkeypatch):
    return guard(monkeypatch, backend)


@pytest.mark.parametrize("layout", ["forward", "backward"])
@pytest.mark.parametrize(("T", "N", "K", "r"), [(1, 1, 1, 1), (17, 33, 65, 12), (67, 130, 257, 20), (70, 9, 300, 100)])
@pytest.mark.parametrize("processors", [1, 132])
def test_writes_everything_and_nothing_else(guarded, monkeypatch, processors, T, N, K, r, layout):
    monkeypatch.setattr(backend, "facts", lambda _: config.Device((9, 0), processors))
    o = operands(T, N, K, r, torch.bfloat16)
    o = o if layout == "forward" else backward(o)
    other = torch.randn(o.x.shape[0], r)
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias, None, other), other)
    assert guarded()


def test_out_is_written_in_place_and_nothing_around_it():
    o = operands(35, 67, 130, 12, torch.bfloat16)
    memory = torch.full((50, 90), 7.0, dtype=torch.bfloat16)
    out = memory[5:40, 11:78]
    out.copy_(o.gY)
    before = out.clone()
    assert_primitive(o, backend.lowrank_linear(o.x, None, o.A, o.R, o.B, o.s, None, out), None, before, W=False)
    memory[5:40, 11:78] = 7.0
    assert (memory == 7).all()


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("r", [12, 100])
def test_same_inputs_same_bits(monkeypatch, processors, r):
    monkeypatch.setattr(backend, "facts", lambda _: config.Device((9, 0), processors))
    o = operands(130, 70, 300, r, torch.bfloat16)
    other = torch.randn(130, r)
    first, second = (backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias, None, other) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("processors", [1, 132])
def test_offsets_beyond_32_bits(monkeypatch, processors):
    """Rows of x, y and A and columns of B more than 2^31 elements apart; the memory between is never touched."""
    monkeypatch.setattr(backend, "facts", lambda _: config.Device((9, 0), processors))
    far, o = 2**31 + 16, operands(2, 3, 24, 3, torch.float16)
    spread = torch.empty(far + 24, dtype=torch.float16)
    x, out = spread.as_strided((2, 24), (far, 1)), torch.empty_like(spread).as_strided((2, 3), (far, 1))
    A, B = torch.empty_like(spread).as_strided((2, 24), (far, 1)), torch.empty_like(spread).as_strided((3, 2), (1, far))
    for there, here in ((x, o.x), (A, o.A[:2]), (B, o.B[:, :2]), (out, o.gY)):
        there.copy_(here)
    o.x, o.A, o.B, o.R = o.x, o.A[:2], o.B[:, :2], o.R[:2, :2]
    assert_primitive(o, backend.lowrank_linear(x, None, A, o.R, B, o.s, None, out), None, o.gY, W=False)


@pytest.mark.parametrize("what", ["fp64", "no rows", "a wide rank", "fp32 without TF32", "out in columns"])
def test_what_the_kernels_are_not_for_goes_to_the_torch_backend(monkeypatch, matmul_precision, what):
    monkeypatch.setattr(backend, "low_rank", None)
    matmul_precision("highest")
    dtype = {"fp64": torch.float64, "fp32 without TF32": torch.float32}.get(what, torch.bfloat16)
    o = operands(0 if what == "no rows" else 5, 4, 6, 129 if what == "a wide rank" else 2, dtype)
    outs = [o.gY.t().contiguous().t() if what == "out in columns" else None for _ in range(2)]
    y, z, _ = backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias, outs[0])
    expected = backends.torch_backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias, outs[1])
    assert torch.equal(y, expected[0]) and torch.equal(z, expected[1])


def test_tune_leaves_out_tiles_that_fail_or_are_wrong(monkeypatch):
    """The whole search, on a small problem: what it takes are tiles that run, are right and are the fastest."""
    spoiled, own = 32, backend.low_rank

    def spoil(cut, *operands):
        y, z, gram = own(cut, *operands)
        return (y + 1 if cut.block_n == spoiled else y), z, gram

    times = {}
    monkeypatch.setattr(tiles, "low_rank", spoil)
    monkeypatch.setattr(tiles, "shared", lambda row, *_: 1000 + row.tiles.block_k)
    monkeypatch.setattr(tiles, "TYPICAL", {1: 20})
    monkeypatch.setattr(tiles, "OPTIONS", {"block_t": (16, 24), "block_n": (16, spoiled), "block_k": (16, 32)})
    real = tiles.search
    monkeypatch.setattr(tiles, "search", lambda *args: times.update(real(*args)) or times)
    monkeypatch.setattr(tiles, "facts", lambda device: config.Device((9, 0), 8))
    monkeypatch.setattr(tiles, "SECONDS", 1e-3)
    row = tiles.measured([Shape(40, 48)], 16, 1, "backward", torch.device("cpu"))
    assert row.tiles == min(times, key=times.__getitem__)
    assert all(each.block_t == 16 and each.block_n != spoiled for each in times)  # 24 is no power of two
    assert len(times) >= 4 and row.shared == 1000 + row.tiles.block_k
    assert row[:5] == ("wgmma", "half", "backward", 16, 1) and row.source.startswith("measured on this CPU, ")
