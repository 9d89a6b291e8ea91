"""The kernels of csrc/, emulated on the CPU: against the fp64 oracle; what they write, where, and in which order.

In a process of its own (`LORAXS_EMULATED=1 pytest tests/test_cuda_kernels.py tests/test_functional.py`; `make test`
does).  The GEMM with a tail is plain loops here, which hold its callers to what it needs of its operands.
"""

from __future__ import annotations

import copy
import ctypes
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from helpers import EMULATED, Operands, assert_accurate, assert_primitive, backward, gradients, guard, operands, unfused
from torch import Tensor, nn

from loraxs_kernels import LoraXSLinear
from loraxs_kernels.functional import lora_xs_linear

if not EMULATED:
    pytest.skip("runs in a process of its own, with LORAXS_EMULATED=1", allow_module_level=True)

import emulator

from loraxs_kernels.backends import cuda as backend
from loraxs_kernels.backends.cuda.config import Decode, Rows

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def plans(monkeypatch):
    """What was picked; set `plans.forced` to have it picked."""

    class Plans(list):
        forced = None

    found, own = Plans(), backend.pick
    monkeypatch.setattr(backend, "pick", lambda *args: found.append(found.forced or own(*args)) or found[-1])
    return found


@pytest.fixture
def guarded(monkeypatch):
    """The padding of copies stays unwritten."""
    return guard(monkeypatch, backend, written=False)


# Rows and ranks that fill no tile; few columns, one step of them, many.
ROWS = [(65, 8, 8, 1), (70, 24, 264, 12), (130, 16, 1032, 25), (129, 40, 64, 64), (66, 8, 136, 100)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["forward", "backward"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("split, programs", [(1, 0), (7, 0), (0, 4)])
def test_many_rows(plans, guarded, shape, layout, split, programs, dtype):
    """Forward and backward, the GEMM with a tail; blocks that share K, with and without a share; u made beside it."""
    T, N, K, r = shape
    plans.forced = Rows(split, 1, True, programs=programs) if r <= 64 else Rows(0, 1, True)
    o = operands(T, N, K, r, dtype)
    o, other = (o, None) if layout == "forward" else (backward(o), torch.randn(T, r))
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias, None, other), other)
    assert plans and guarded()


def test_what_the_programs_read_lives_until_y_is_there(plans, monkeypatch, emulated_core):
    """They run on while the GEMM writes y: a copy that is freed before could be where y is."""
    plans.forced, copies, alive = Rows(0, 1, True, programs=4), [], []
    own, gemm_tail = backend._laid, backend.gemm_tail

    def laid(t: Tensor, way: int) -> Tensor:
        copies.append(weakref.ref(copy := own(t, way)))
        return copy

    monkeypatch.setattr(backend, "_laid", laid)
    monkeypatch.setattr(backend, "gemm_tail", lambda *args: alive.extend(each() for each in copies) or gemm_tail(*args))
    o = backward(operands(130, 16, 1032, 25, torch.bfloat16))
    assert backend.lies(o.A) is None
    backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, None, None, torch.randn(130, 25))
    assert any(each is not None and each.shape == o.A.shape for each in alive) and all(t is not None for t in alive)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("W", [False, True])
@pytest.mark.parametrize("T", [33, 70])
def test_out_and_no_weight(plans, monkeypatch, T, W, add):
    plans.forced, tails, own = None if T == 33 else Rows(1, 1, True), [], backend.gemm_tail
    monkeypatch.setattr(backend, "gemm_tail", lambda *args: tails.append(args) or own(*args))
    o = operands(T, 40, 64, 12, torch.bfloat16)
    out = o.gY.clone() if add else None
    y, z, gram = backend.lowrank_linear(o.x, o.W if W else None, o.A, o.R, o.B, o.s, None if add else o.bias, out)
    assert (y is out) == add and gram is None
    assert_primitive(o, (y, z, None), None, o.gY if add else None, W)
    assert isinstance(plans[0], Decode if T == 33 else Rows)
    assert len(tails) == (T == 70 and not add)  # what is added to is the library's


@pytest.mark.parametrize("plan", [Decode(2, 1), Rows(1, 0, True), Rows(2, None, True)], ids=str)
def test_offsets_beyond_32_bits(plans, plan):
    """Rows of x, out and A, columns of B and adapters more than 2^31 elements apart; what is between is untouched."""
    plans.forced = plan
    far, o = 2**31 + 16, operands(2, 8, 64, 2, torch.float16)

    def spread(t: Tensor, *strides: int) -> Tensor:
        return torch.empty(far + 64, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)

    x, A, out = (spread(t, far, 1) for t in (o.x, o.A, o.gY))
    B = spread(o.B, 1, far)
    results = backend.lowrank_linear(x, None, A, o.R, B, o.s, None, out)
    assert_primitive(o, results, None, o.gY, W=False)
    if isinstance(plan, Decode):
        Rs = spread(torch.stack([o.R, -o.R]).half(), far, 2, 1)
        index = torch.tensor([1, 0], dtype=torch.int32)
        ys = [backend.decode(o.x, o.A, each, o.B, o.s, index=index)[0] for each in (Rs, Rs.contiguous())]
        assert torch.equal(*ys)


@pytest.mark.parametrize("T", [33, 70])
def test_out_may_be_x(plans, T):
    o = operands(T, 256, 256, 12, torch.bfloat16)
    plans.forced = Decode(1, 2) if T == 33 else None
    assert_primitive(o, backend.lowrank_linear(x := o.x.clone(), None, o.A, o.R, o.B, o.s, None, x), None, o.x, W=False)


@pytest.mark.parametrize("tile", [None, 0])
@pytest.mark.parametrize("kind", ["turned weight", "sliced weight", "sliced x", "expanded x", "turned x", "bias"])
def test_operands_the_copy_engine_cannot_read_as_they_lie(plans, kind, tile):
    """GPT-2's weights lie the other way than B; slices begin anywhere.  The emulated GEMM refuses what TMA would."""
    plans.forced = Rows(1, tile, True)
    layout = {"sliced x": "sliced", "expanded x": "expanded"}.get(kind, "contiguous")
    o = operands(70, 40, 64, 12, torch.bfloat16, layout)
    if kind == "turned weight":
        o.W = o.W.t().contiguous().t()
    elif kind == "sliced weight":
        o.W = torch.randn(50, 80).bfloat16()[3:43, 5:69]
    elif kind == "turned x":
        o.x = o.x.t().contiguous().t()
    elif kind == "bias":
        o.bias = torch.randn(43).bfloat16()[3:]
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias), None)
    o, other = backward(o), torch.randn(70, 12)
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, None, None, other), other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cluster", [1, 8])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (16, 130, 72, 16), (33, 40, 257, 25), (64, 17, 300, 64), (5, 100, 712, 100)]
)
def test_few_rows(plans, guarded, shape, layout, cluster, dtype):
    plans.forced = Decode(cluster, 2)
    o = operands(*shape, dtype, layout)
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias), None)
    o, other = backward(o), torch.randn(shape[0], shape[3])
    assert_primitive(o, backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, None, None, other), other)
    assert guarded()


@pytest.mark.parametrize("R_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "r", "cluster"), [(1, 4, 8), (20, 16, 8), (64, 12, 1), (50, 64, 4)])
def test_every_token_its_own_adapter(plans, T, r, cluster, R_dtype):
    plans.forced = Decode(cluster, 1)
    o = operands(T, 66, 160, r, torch.bfloat16)
    Rs = (torch.randn(5, r, r) / r**0.5).to(R_dtype)
    index = torch.randint(-1, 5, (T,), dtype=torch.int32)
    if R_dtype == torch.float64:
        with pytest.raises(TypeError, match=r"R: got torch.float64, must be float32, bfloat16 or float16"):
            backend.decode(o.x, o.A, Rs, o.B, o.s, index=index)
        return
    y, _ = backend.decode(o.x, o.A, Rs, o.B, o.s, None, out := o.gY.clone(), index)
    assert y is out

    def expected(dtype: torch.dtype) -> Tensor:
        z = o.x.to(dtype) @ o.A.to(dtype).T
        chosen = torch.where((index < 0)[:, None, None], 0, Rs[index.clamp(min=0).long()].to(dtype))
        return o.gY.to(dtype) + o.s * torch.einsum("tij,tj->ti", chosen, z) @ o.B.to(dtype).T

    assert_accurate(y, expected(torch.bfloat16), expected(torch.float64), torch.bfloat16)
    assert torch.equal(y[index < 0], o.gY[index < 0])
    one = backend.decode(o.x, o.A, Rs[2], o.B, o.s)[0]
    same = backend.decode(o.x, o.A, Rs, o.B, o.s, index=torch.full((T,), 2, dtype=torch.int32))[0]
    assert torch.equal(one, same)


def apart(t: Tensor, gap: int = 0) -> Tensor:
    """The same numbers amid NaN, in rows at multiples of 16 bytes and, of three dimensions, `gap` elements further."""
    pitch = -(-t.shape[-1] // 8) * 8 + 8
    strides = (t.shape[-2] * pitch + gap, pitch, 1)[-t.dim() :]
    return emulator.fenced(torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("r", [25, 12, 1])
def test_many_rows_use_nothing_but_their_operands(plans, r, split):
    """What lies between their rows and after the last; transposed, what lies between those of the rank."""
    plans.forced = Rows(split, None, True)  # the GEMM is the library's, which takes any N and K
    o = operands(70, 43, 75, r, torch.bfloat16)
    given = Operands(*(apart(t) for t in (o.x, o.W, o.A, o.R, o.B)), emulator.fenced(o.bias, 2), apart(o.gY), o.s)
    for each in (given, backward(given)):
        other = None if each is given else emulator.fenced(torch.randn(70, r), 4)
        results = backend.lowrank_linear(each.x, each.W, each.A, each.R, each.B, each.s, each.bias, None, other)
        assert_primitive(each, results, other)


@pytest.mark.parametrize("R_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("r", "cluster"), [(25, 1), (12, 4), (1, 8)])
def test_few_rows_use_nothing_but_their_operands(r, cluster, indexed, R_dtype):
    """Slots of R at any distance, y of an odd number of columns; the bits are those of tensors that are contiguous."""
    o = operands(5, 33, 73, r, torch.bfloat16)
    R = (torch.randn(4, r, r) if indexed else o.R).to(R_dtype)
    index = torch.tensor([3, 0, -1, 1, 3], dtype=torch.int32) if indexed else None
    expected = backend._decode(Decode(cluster, 1), o.x, o.A, R, o.B, o.s, o.bias, o.gY.clone(), index)
    x, A, apart_R, B, out = apart(o.x), apart(o.A), apart(R, gap=1), apart(o.B), apart(o.gY)
    bias, index = emulator.fenced(o.bias, 2), emulator.fenced(index, 4) if indexed else None
    bits = torch.empty(0, dtype=torch.int16).set_(out.untyped_storage())
    before = bits.clone()  # NaN around it is not what a kernel writes for NaN
    y, z = backend._decode(Decode(cluster, 1), x, A, apart_R, B, o.s, bias, out, index)
    assert y is out and torch.equal(y, expected[0]) and torch.equal(z, expected[1])
    out.copy_(o.gY)
    assert torch.equal(bits, before)


SPOILS = [float("nan"), float("inf"), 3e38]


@pytest.mark.parametrize(("T", "r", "cluster"), [(9, 1, 8), (5, 1, 1), (9, 25, 1), (9, 64, 8), (3, 128, 1)])
def test_what_spoils_a_token_of_few_spoils_no_other(T, r, cluster):
    """Its row of x or its adapter, whatever the numbers; and none of it comes to a token without an adapter."""
    o = operands(T, 33, 72, r, torch.bfloat16)
    Rs, index = torch.randn(T, r, r), torch.arange(T, dtype=torch.int32)

    def decode(x: Tensor, R: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        return backend._decode(Decode(cluster, 1), x, o.A, R, o.B, o.s, None, o.gY.clone(), index)

    expected, shared = decode(o.x, Rs, index), decode(o.x, o.R, None)
    for t in range(T):
        others = torch.arange(T) != t
        for value in SPOILS:
            x, R, without = o.x.clone(), Rs.clone(), index.clone()
            x[t, 0], R[t], without[t] = value, value, -1
            y, z = decode(o.x, R, index)
            assert torch.equal(y[others], expected[0][others]) and torch.equal(z, expected[1])
            y, z = decode(x, o.R, None)
            assert all(torch.equal(a[others], b[others]) for a, b in zip((y, z), shared, strict=True))
            y, z = decode(x, R, without)
            assert all(torch.equal(a[others], b[others]) for a, b in zip((y, z), expected, strict=True))
            assert torch.equal(y[t], o.gY[t])


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("r", [1, 25, 64])
def test_what_spoils_a_row_of_many_spoils_no_other(r, split):
    o = operands(70, 8, 104, r, torch.bfloat16)
    A = backend._laid(o.A, 0)
    expected = backend.shrink(o.x, A, o.R, o.s, None, split, False)
    for t in (0, 7, 8, 31, 63, 64, 69):
        others = torch.arange(70) != t
        for value in SPOILS:
            x = o.x.clone()
            x[t, 0] = value
            z, u, _ = backend.shrink(x, A, o.R, o.s, None, split, False)
            assert torch.equal(z[others], expected[0][others]) and torch.equal(u[others], expected[1][others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(65, 8).bfloat16()}, "x: got 65 rows, must be at most 64"),
        ({"x": torch.zeros(3, 8)}, "x: got torch.float32, must be bfloat16 or float16"),
        ({"A": torch.zeros(2, 8).half()}, "A: got torch.float16, must be bfloat16 or float16 like x"),
        ({"A": torch.zeros(2, 9).bfloat16()}, r"A: got shape \(2, 9\), must be \(2, 8\)"),
        ({"x": torch.zeros(1, 3, 8).bfloat16()}, r"x: got shape \(1, 3, 8\), must have 2 dimensions"),
        ({"R": torch.zeros(4, 2, 2)}, r"R: got shape \(4, 2, 2\), must have 2 dimensions"),
        ({"R": torch.zeros(()), "index": torch.zeros(3).int()}, r"R: got shape \(\), must have 3 dimensions"),
        ({"R": torch.zeros(3, 3)}, r"R: got shape \(3, 3\), must be \(2, 2\)"),
        ({"R": torch.zeros(4, 2, 3), "index": torch.zeros(3).int()}, r"R: got shape \(4, 2, 3\), must be \(4, 2, 2\)"),
        ({"R": torch.zeros(4, 2, 2), "index": torch.zeros(3)}, r"index: got shape \(3,\) of torch.float32"),
        ({"R": torch.zeros(4, 2, 2), "index": torch.zeros(4).int()}, r"index: got shape \(4,\) of torch.int32"),
        ({"out": torch.zeros(3, 6).bfloat16()}, r"out: got shape \(3, 6\), must be \(3, 5\)"),
        ({"out": torch.zeros(1, 5).bfloat16().expand(3, 5)}, r"out: .* strides \(0, 1\), must have memory of its own"),
        (
            {"B": (t := torch.zeros(5, 5).bfloat16())[:, :2], "out": t[2:]},
            "out: got a tensor that overlaps B in memory",
        ),
        ({"bias": (t := torch.zeros(15).bfloat16())[:5], "out": t.view(3, 5)}, "out: got a tensor that overlaps bias"),
        ({"bias": torch.zeros(5, device="meta").bfloat16()}, "bias: got device meta, must be cpu like x"),
        (
            {"A": torch.zeros(129, 8).bfloat16(), "B": torch.zeros(5, 129).bfloat16()},
            "B: got rank 129, must be at most 128",
        ),
    ],
)
def test_decode_names_a_wrong_operand(change, message):
    good = {"x": torch.zeros(3, 8), "A": torch.zeros(2, 8), "B": torch.zeros(5, 2)}
    given = {name: t.bfloat16() for name, t in good.items()} | {"R": torch.zeros(2, 2), "s": 1.0} | change
    with pytest.raises((TypeError, ValueError), match=message):
        backend.decode(**given)


@pytest.mark.parametrize("plan", [Rows(3, 1, True), Rows(0, 1, True, programs=4), Decode(2, 1)], ids=str)
@pytest.mark.parametrize("name", ["x", "W", "A", "R", "B", "bias", "gY"])
def test_negated_views_and_zero_tensors(plans, plan, name):
    plans.forced = plan
    o = operands(70 if isinstance(plan, Rows) else 17, 24, 304, 12, torch.bfloat16)
    t = getattr(o, name)
    for view in (torch._neg_view(-t), torch._efficientzerotensor(t.shape, dtype=t.dtype)):
        given, same = (gradients(Operands(**vars(o) | {name: each}), lora_xs_linear) for each in (view, view.clone()))
        assert all(map(torch.equal, given, same))


@pytest.mark.parametrize("name", ["x", "A", "R", "B", "bias"])
def test_decode_reads_negated_views_and_zero_tensors(name):
    o = operands(4, 24, 304, 12, torch.bfloat16)
    t = getattr(o, name)
    for view in (torch._neg_view(-t), torch._efficientzerotensor(t.shape, dtype=t.dtype)):
        given, same = (Operands(**vars(o) | {name: each}) for each in (view, view.clone()))
        ys = (backend.decode(each.x, each.A, each.R, each.B, each.s, each.bias)[0] for each in (given, same))
        assert torch.equal(*ys)


def test_no_rows_and_no_columns(plans):
    o = operands(3, 5, 8, 2, torch.bfloat16)
    y, z = backend.decode(o.x[:0], o.A, o.R, o.B, o.s)
    assert y.shape == (0, 5) and z.shape == (0, 2)
    y, z = backend.decode(o.x[:, :0], o.A[:, :0], o.R, o.B, o.s, o.bias)
    assert torch.equal(y, o.bias.expand(3, 5)) and torch.equal(z, torch.zeros(3, 2))
    assert plans == [None, None]


def test_what_the_core_refuses_is_an_error():
    o = operands(70, 8, 8, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match="loraxs gemm_tail: operands it cannot be called with"):
        backend.gemm_tail(o.x[:, 1:], o.W, torch.zeros(70, 2).bfloat16(), o.B, None, 0, False)


def test_a_layer_trains_on_it(plans):
    """Rank 12: B lives in padded rows, which neither a move nor a state dict shows, and is read as it lies."""
    layer = LoraXSLinear.from_linear(nn.Linear(96, 64).bfloat16(), 12, sigma=0.3)
    layer.load_state_dict(layer.state_dict())
    for moved in (layer, copy.deepcopy(layer).to("meta").to_empty(device="cpu"), layer.to(torch.bfloat16)):
        assert backend.lies(moved.B) == 0 and moved.B.shape == (64, 12)
        assert moved.state_dict()["B"].is_contiguous()
    o = operands(70, 64, 96, 12, torch.bfloat16)
    o = Operands(o.x, layer.weight, layer.A, layer.R.data, layer.B, layer.bias, o.gY, layer.scaling)
    plans.forced = Rows(1, 0, True)
    got = gradients(o, lambda x, W, A, R, B, s, bias: lora_xs_linear(x, W, A, R, B, s, bias))
    for name, *three in zip(
        ("y", "gX", "gR"), got, gradients(o, unfused), gradients(o.to(torch.float64), unfused), strict=True
    ):
        assert_accurate(*three, torch.bfloat16, name)
    assert len(plans) == 2


def test_what_faults_on_a_gpu_is_an_error():
    """Called past every check: an index that ends too early; an R and an x that begin where they may not."""
    o = operands(70, 8, 64, 2, torch.bfloat16)
    few = (Decode(1, 1), o.x[:5], o.A)
    with pytest.raises(RuntimeError, match="there is no memory at 0x"):
        backend._decode(*few, o.R[None], o.B, o.s, None, None, emulator.fenced(torch.zeros(4).int(), 4))
    R = torch.frombuffer(bytearray(18), dtype=torch.float32, offset=2).view(2, 2)
    with pytest.raises(RuntimeError, match=r"decode.cu:\d+: not aligned: 0x"):
        backend._decode(*few, R, o.B, o.s, None, None, None)
    with pytest.raises(RuntimeError, match=r"asynchronous copy .* not aligned"):
        backend.shrink(o.x[:, 1:], o.A[:, 1:], o.R, o.s, None, 1, False)
    assert backend._decode(*few, o.R, o.B, o.s, None, None, None)[0].isfinite().all()


def results(core) -> list[Tensor]:
    """Everything shrink and decode make of a few problems, on a core of its own."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.core, "load", lambda: core)
        for transposed in (False, True):
            o = operands(66, 16, 1096, 64, torch.bfloat16)
            A = o.A.t().contiguous().t() if transposed else o.A
            found += backend.shrink(o.x, A, o.R, o.s, torch.randn(66, 64), 2, False)
            o = operands(66, 16, 1001, 60, torch.bfloat16)  # no second launch; K and r fill no tile
            x, A = backend._laid(o.x, 0), backend._laid(o.A, int(transposed))
            found += backend.shrink(x, A, o.R, o.s, torch.randn(66, 60), 1, False)
        o = operands(40, 40, 400, 16, torch.bfloat16)
        found += backend._decode(Decode(4, 1), o.x, o.A, o.R, o.B, o.s, None, None, None)
        o = operands(10, 40, 504, 64, torch.bfloat16)  # more than is under way at once; not all warps read each step
        found += backend._decode(Decode(1, 1), o.x, o.A, o.R, o.B, o.s, None, None, None)
    return found


def differs(first: list[Tensor], second: list[Tensor]) -> bool:
    return not all(torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)) for a, b in zip(first, second, strict=True))


def test_same_bits_whatever_the_order_of_the_threads(emulated_core, monkeypatch):
    torch.manual_seed(0)
    expected = results(emulated_core)
    for order in range(1, 4):
        monkeypatch.setenv("LORAXS_EMULATOR_ORDER", str(order))
        torch.manual_seed(0)
        assert not differs(results(emulated_core), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_eight_lanes_that_share_a_cycle_of_shared_memory_fall_on_all_its_banks(emulated_core, r, transposed):
    """Every asynchronous copy's write, and every read of matrices, of a shrink with a gram and of a decode."""
    library = ctypes.CDLL(emulated_core.__file__)
    library.emulator_conflicts()
    o = operands(70, 16, 300, r, torch.bfloat16)
    x, A = backend._laid(o.x, 0), backend._laid(o.A, 0)
    if r <= 64:
        backend.shrink(x, backend._laid(o.A, 1) if transposed else A, o.R, o.s, torch.randn(70, r), 1, False)
    backend._decode(Decode(2, 1), x[:50], A, o.R, o.B, o.s, None, None, None)
    assert library.emulator_conflicts() == 0


BREAKS = {
    "an asynchronous copy that is not waited for": ("shrink.cu", r"copy_wait<[^;]*;", ""),
    "sums written where others still copy": ("shrink.cu", r"__syncthreads\(\);(\s*auto const sums)", r"\1"),
    "sums read before they are there": ("shrink.cu", r"\[3\]\};\n    \}\n  \}\n  __syncthreads\(\);", "[3]};}}"),
    "R written where others still read sums": ("shrink.cu", r"__syncthreads\(\);(\s*if \(gridDim)", r"\1"),
    "a decode's copy that is not waited for": ("decode.cu", r"copy_wait<[^;]*;", ""),
    "copies to where others still read": ("decode.cu", r"__syncthreads\(\);\n    copy\(step", "copy(step"),
    "z read before it is there": ("decode.cu", r"cluster_sync\(\);(\s*for)", r"__syncthreads();\1"),
    "u read before it is there": ("decode.cu", r"cluster_sync\(\);(?!\s*for)", "__syncthreads();"),
    "blocks that end while others read u": ("decode.cu", r"cluster_(leave|wait)\(\);", ""),
    "u written over z": ("decode.cu", r"memory \+ C::z_bytes\)", "memory + C::z_bytes / 2)"),
}


def test_the_emulator_finds_missing_barriers(tmp_path, emulated_core, monkeypatch):
    """Each of them, taken out of the source, changes results in some order of the threads."""

    def built(i: int, what: str) -> ModuleType:
        name, pattern, instead = BREAKS[what]
        broken, count = re.subn(pattern, instead, (emulator.CSRC / name).read_text(), flags=re.DOTALL)
        assert count, what
        source = tmp_path / f"broken_{i}" / name
        source.parent.mkdir()
        source.write_text(broken)
        return emulator.rebuilt(emulated_core, source)

    def made(core: ModuleType, order: int) -> list[Tensor]:
        monkeypatch.setenv("LORAXS_EMULATOR_ORDER", str(order))
        torch.manual_seed(0)
        return results(core)

    expected = made(emulated_core, 0)
    with ThreadPoolExecutor() as pool:
        cores = list(pool.map(built, range(len(BREAKS)), BREAKS))
    for what, core in zip(BREAKS, cores, strict=True):
        assert any(differs(made(core, order), expected) for order in range(8)), what
