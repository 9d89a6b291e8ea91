"""The Triton kernels with an index: interpreted on the CPU against the fp64 oracle, and a few tests on a GPU.

Interpreted in a process of their own (`TRITON_INTERPRET=1 pytest tests/test_triton_indexed.py`; `make test` does).
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import INTERPRETED, assert_accurate, backward, guard, operands

from loraxs_kernels import backends, reference
from loraxs_kernels.backends import triton, triton_indexed
from loraxs_kernels.backends.device import Device

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")
# How the rows are shared out, as (multiprocessors, ALONE).
CUTS = {"a program a row": (132, 512), "16 rows a program": (132, 0), "one launch": (1, 0)}
MIXES = {
    "alike": lambda T, n: torch.full((T,), n - 1),
    "different": lambda T, n: torch.arange(T).flip(0) % n,
    "skewed": lambda T, n: (torch.rand(T) ** 4 * n).long(),
    "without": lambda T, n: torch.randint(-1, n, (T,)).clamp(max=1) * 2 - 1,
}


def table(n, r, dtype=torch.float32, device="cpu"):
    """n matrices as a bank's table holds those of one layer: with the other layers' between them, here NaN."""
    wide = torch.full((n, 3, r, r), math.nan, device=device, dtype=dtype)
    wide[:, 1] = torch.randn(n, r, r, device=device) / r**0.5
    return wide[:, 1]


def index_of(mix, T, n, device="cpu"):
    return MIXES[mix](T, n).to(device, torch.int32)


def assert_indexed(o, R, index, results, W=True, out=None):
    """(y, z) against the oracle by the accuracy rule, as assert_primitive; `out`: what y was before."""

    def expected(at):
        x, A, B, R_, W_ = (t.to(at) for t in (o.x, o.A, o.B, R, o.W))
        bias = None if o.bias is None or out is not None else o.bias.to(at)
        y = x.new_zeros(len(x), len(B))
        for i in index.unique().tolist():
            rows = index == i
            own = R_[i] if i >= 0 else torch.zeros_like(R_[0])
            y[rows] = reference.lowrank_linear(x[rows], W_ if W else None, A, own, B, o.s, bias)[0]
        return y if out is None else y + out.to(at)

    (y, z), dtype = results, o.x.dtype
    assert y.dtype == dtype and z.dtype == torch.float32
    assert_accurate(y, expected(dtype), expected(torch.float64), dtype)
    assert reference.relative_error(z, o.x.double() @ o.A.double().T) < 1e-5


def call(o, R, index, W=True, out=None):
    return triton_indexed.lowrank_linear_indexed(o.x, o.W if W else None, o.A, R, o.B, o.s, index, o.bias, out)


@pytest.fixture(params=CUTS)
def cut(request, monkeypatch):
    processors, alone = CUTS[request.param]
    monkeypatch.setattr(triton, "facts", lambda _: Device((9, 0), processors))
    monkeypatch.setattr(triton_indexed, "ALONE", alone)
    return request.param


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@interpreted
@pytest.mark.parametrize(
    ("r", "T", "n", "mix"),
    [
        *((1, 1, 1, "alike"), (1, 100, 7, "skewed")),
        *((4, 3, 5, "different"), (4, 64, 9, "without")),
        *((8, 1, 3, "without"), (8, 64, 64, "different")),
        *((16, 100, 7, "without"), (16, 64, 64, "different")),
        *((20, 3, 3, "different"), (20, 100, 9, "skewed")),
        *((64, 100, 1, "alike"), (64, 64, 64, "different")),
        *((128, 3, 5, "without"), (128, 64, 7, "skewed")),
    ],
)
def test_every_rank_in_both_directions(cut, r, T, n, mix):
    o, R, index = operands(T, 67, 150, r, torch.bfloat16), table(n, r), index_of(mix, T, n)
    assert_indexed(o, R, index, call(o, R, index, W=False), W=False)
    o, R = backward(o), R.transpose(1, 2)
    assert_indexed(o, R, index, call(o, R, index))


@interpreted
@pytest.mark.parametrize("R_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_with_bias_or_out(cut, tf32, dtype, R_dtype):
    o, R, index = operands(40, 70, 130, 20, dtype), table(9, 20, R_dtype), index_of("without", 40, 9)
    assert_indexed(o, R, index, call(o, R, index))
    o.bias = None
    for out in (o.gY.clone(), o.gY.t().contiguous().t()):
        results = call(o, R, index, False, out)
        assert results[0] is out
        assert_indexed(o, R, index, results, False, o.gY)


@interpreted
def test_a_row_does_not_know_its_neighbours(cut):
    """Its bits are the same whatever the others use and hold; infinities and NaN of theirs do not reach it."""
    T, o, R = 40, operands(40, 70, 130, 20, torch.bfloat16), table(40, 20)
    own = torch.arange(T, dtype=torch.int32)
    first = call(o, R, own)
    for mine in (0, 17, T - 1):
        index = index_of("skewed", T, T)
        index[mine] = mine
        assert all(torch.equal(a[mine], b[mine]) for a, b in zip(call(o, R, index), first, strict=True))
    bad_R, bad_x = 5, 23
    R[bad_R], o.x[bad_x] = math.nan, math.inf
    assert (kept := torch.ones(T, dtype=torch.bool)).index_fill_(0, torch.tensor([bad_R, bad_x]), False).any()
    y, _ = call(o, R, own)
    assert torch.equal(y[kept], first[0][kept]) and not y[~kept].isfinite().any()


@interpreted
def test_a_row_without_gets_the_bias_alone_whatever_it_holds(cut):
    o, R = operands(40, 70, 130, 20, torch.bfloat16), table(3, 20)
    o.x[::2] = math.nan
    index = torch.full((40,), -1, dtype=torch.int32)
    index[1::4] = 2
    y, _ = call(o, R, index, W=False)
    assert torch.equal(y[index < 0], o.bias.expand(40, 70)[index < 0]) and not torch.equal(y[1], o.bias)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 33, 65, 12), (70, 9, 300, 100)], ids=str)
def test_writes_everything_and_nothing_else(cut, monkeypatch, shape):
    whole = guard(monkeypatch, triton_indexed)
    T, *_, r = shape
    o, R, index = operands(*shape, torch.bfloat16), table(5, r), index_of("without", T, 5)
    assert_indexed(o, R, index, call(o, R, index))
    assert whole()


@interpreted
def test_matrices_beyond_32_bits(cut):
    """The second one begins 2^31 elements after the first; the memory between is never touched."""
    far, o, near = 2**31 + 16, operands(5, 6, 24, 3, torch.float16), torch.randn(2, 3, 3).half()
    R = torch.empty(far + 9, dtype=torch.float16).as_strided((2, 3, 3), (far, 3, 1)).copy_(near)
    index = torch.tensor([1, 0, -1, 1, 1], dtype=torch.int32)
    assert_indexed(o, near, index, call(o, R, index))


@interpreted
def test_launches_do_not_depend_on_the_mix(cut, monkeypatch):
    from loraxs_kernels.backends.triton import launcher

    launches, own = [], launcher.launch

    def launch(kernel, grid, tensors, *rest):
        launches.append((kernel, grid, *rest))
        own(kernel, grid, tensors, *rest)

    monkeypatch.setattr(launcher, "launch", launch)
    o, R, kinds = operands(40, 70, 130, 20, torch.bfloat16), table(40, 20), []
    for mix in MIXES:
        call(o, R, index_of(mix, 40, 40))
        kinds.append(tuple(launches))
        launches.clear()
    assert len(set(kinds)) == 1 and len(kinds[0]) == (1 if cut == "one launch" else 3)


@interpreted
@pytest.mark.parametrize("what", ["fp64", "no rows", "a wide rank", "fp32 without TF32", "gaps in R", "R in fp64"])
def test_what_the_kernels_are_not_for_is_refused(what):
    dtype = {"fp64": torch.float64, "fp32 without TF32": torch.float32}.get(what, torch.bfloat16)
    T, r = 0 if what == "no rows" else 5, 129 if what == "a wide rank" else 4
    o, R, index = operands(T, 4, 6, r, dtype), table(3, r), torch.zeros(T, dtype=torch.int32)
    R = torch.zeros(3, r, r + 1)[:, :, :r] if what == "gaps in R" else R.double() if what == "R in fp64" else R
    assert not triton_indexed.runs(o.x, o.A, R, o.B)
    with pytest.raises(ValueError, match="ask `runs` first"):
        call(o, R, index)


@interpreted
def test_another_index_is_refused():
    o, R = operands(5, 4, 6, 2, torch.bfloat16), table(3, 2)
    assert triton_indexed.runs(o.x, o.A, R, o.B)
    for index in (torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"index: got shape .*, must be \(5,\) of torch.int32"):
            call(o, R, index)


def test_without_a_gpu_it_does_not_run():
    if not (INTERPRETED or torch.cuda.is_available()):
        o = operands(5, 4, 6, 2, torch.bfloat16)
        assert not triton_indexed.runs(o.x, o.A, table(3, 2), o.B)


@pytest.fixture
def on_gpu():
    if reason := backends.unavailable("triton"):
        pytest.skip(f"triton backend: {reason}")


@pytest.mark.gpu("adapter bank")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("r", [4, 16, 20, 64, 128])
@pytest.mark.parametrize("T", [1, 64, 300, 2000, 9000])
def test_both_directions_on_a_gpu(on_gpu, T, r, mix):
    o, R = operands(T, 1024, 2304, r, torch.bfloat16, device="cuda"), table(200, r, device="cuda")
    index = index_of(mix, T, 200, "cuda")
    for each, R_ in ((o, R), (backward(o), R.transpose(1, 2))):
        assert triton_indexed.runs(each.x, each.A, R_, each.B)
        for W in (True, False):
            assert_indexed(each, R_, index, call(each, R_, index, W), W)


@pytest.mark.gpu("adapter bank")
@pytest.mark.parametrize("T", [40, 1000, 9000])
def test_one_graph_for_every_mix_on_a_gpu(on_gpu, T):
    o, R = operands(T, 1024, 2304, 16, torch.bfloat16, device="cuda"), table(50, 16, device="cuda")
    index = index_of("alike", T, 50, "cuda")
    call(o, R, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = call(o, R, index)
    for mix in MIXES:
        index.copy_(index_of(mix, T, 50))
        R.copy_(R.roll(1, 0))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((y, z), call(o, R, index), strict=True))
        assert_indexed(o, R, index, (y, z))
