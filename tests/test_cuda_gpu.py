"""The CUDA backend on a GPU, beyond what tests/test_functional.py asks of every backend."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_accurate, backward, gradients, operands, unfused

from loraxs_kernels import backends, reference
from loraxs_kernels.backends import cuda as backend
from loraxs_kernels.backends.cuda.config import TILES, UNIT, Decode, Rows
from loraxs_kernels.functional import lora_xs_linear

pytestmark = pytest.mark.gpu("cuda backend")


@pytest.fixture(autouse=True)
def on_cuda():
    if reason := backends.unavailable("cuda"):
        pytest.skip(f"cuda backend: {reason}")
    with backends.backend("cuda"):
        yield


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0) or "90a" not in backend.core.architectures():
        pytest.skip("needs a Hopper GPU and a core built for sm_90a")


@pytest.fixture
def tails(monkeypatch):
    """How the GEMM with a tail was called."""
    found, own = [], backend.gemm_tail
    monkeypatch.setattr(backend, "gemm_tail", lambda *args: found.append(args) or own(*args))
    return found


# Whole tiles and none, ranks of one step of the tail and of several, fewer rows than a tile has.
TAILS = [(2100, 4096, 4096, 64), (1000, 1024, 4096, 12), (129, 264, 72, 1), (777, 4096, 1000, 130), (90, 8, 8, 25)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TAILS, ids=str)
def test_every_tile_forward_and_backward(hopper, poisoned, tails, monkeypatch, shape, dtype, tile, overlap):
    T, *_, r = shape
    monkeypatch.setattr(backend, "pick", lambda *_: Rows(0 if r > 64 else 1 if T > 2000 else 3, tile, overlap))
    o = operands(*shape, dtype, device="cuda")
    results = gradients(o, lora_xs_linear), gradients(o, unfused), gradients(o.to(torch.float64), unfused)
    for name, *three in zip(("y", "gX", "gR"), *results, strict=True):
        assert_accurate(*three, dtype, name)
    assert [args[5:7] for args in tails] == [(tile, overlap)] * 2


@pytest.mark.parametrize("programs", [3, 4])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in TAILS if shape[3] <= 64], ids=str)
def test_u_made_beside_the_gemm(hopper, poisoned, tails, monkeypatch, shape, dtype, tile, programs):
    monkeypatch.setattr(backend, "pick", lambda *_: Rows(0, tile, True, 2, 2, programs))
    o = operands(*shape, dtype, device="cuda")
    results = gradients(o, lora_xs_linear), gradients(o, unfused), gradients(o.to(torch.float64), unfused)
    for name, *three in zip(("y", "gX", "gR"), *results, strict=True):
        assert_accurate(*three, dtype, name)
    assert all(args[-1] is not None for args in tails) and len(tails) == 2


@pytest.mark.parametrize("tile", TILES)
def test_u_made_beside_the_gemm_has_the_same_bits_every_time(hopper, tile):
    """Many launches of changing sizes on memory that is used again, beside other work: a flag or a row of u that is an
    earlier call's would show.  Without W the GEMM waits for u from its first tile on."""
    sizes = [(8192, 1024, 1024, 64), (300, 4096, 512, 16), (4100, 256, 2048, 8), (129, 520, 8192, 64)]
    problems = [operands(*shape, torch.bfloat16, device="cuda", seed=seed) for seed, shape in enumerate(sizes)]

    def made(W, early):
        found = []
        for o in problems:
            ready = backend.empty(o.x, (-(-len(o.x) // UNIT),), torch.int32)
            u = backend.shrink(o.x, o.A, o.R, o.s, None, 1, True, 4, ready)[1]
            found.append(backend.gemm_tail(o.x, o.W if W else None, u, o.B, None, tile, early, 2, 2, 128, ready))
        return found

    noise, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for W in (True, False):
        expected = made(W, False)  # the GEMM starts when all of u is there
        for _ in range(50):
            with torch.cuda.stream(side):
                noise @ noise
            assert all(torch.equal(a, b) for a, b in zip(expected, made(W, True), strict=True))


def test_what_the_programs_read_is_not_given_to_y(hopper, monkeypatch):
    """Of a rank that is no multiple of 8 A is copied, into the one free block that holds y, too."""
    o = backward(operands(4096, 14336, 4096, 60, torch.bfloat16, device="cuda"))
    found = []
    for overlap in (False, True, True):
        monkeypatch.setattr(backend, "pick", lambda *_, overlap=overlap: Rows(0, 0, overlap, 4, 2, 4))
        torch.cuda.empty_cache()
        del [torch.empty(4096 * 4096 * 2 + (4 << 20), dtype=torch.uint8, device="cuda")][:]
        found.append(backend.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s)[:2])
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("tile", TILES)
def test_the_tail_waits_for_u(hopper, poisoned, tails, monkeypatch, tile, split):
    """Without W the GEMM is at u at once, long before a shrink of so many columns is; bits as when it starts later."""
    problems = [operands(4096, 256, 14336, 64, torch.bfloat16, device="cuda", seed=seed) for seed in range(2)]

    def made(overlap):
        monkeypatch.setattr(backend, "pick", lambda *_: Rows(split, tile, overlap))
        torch.cuda.synchronize()
        return [backend.lowrank_linear(o.x, None, o.A, o.R, o.B, o.s)[0] for o in problems]

    for late, early in zip(made(False), made(True), strict=True):
        assert torch.equal(late, early) and not late.isnan().any()
    assert len(tails) == 4


@pytest.mark.parametrize("W", [False, True])
def test_added_to_an_output(hopper, monkeypatch, W):
    monkeypatch.setattr(backend, "pick", lambda *_: Rows(1, 1, True))
    o = operands(500, 264, 136, 20, torch.bfloat16, device="cuda")
    y = backend.lowrank_linear(o.x, o.W if W else None, o.A, o.R, o.B, o.s, None, out := o.gY.clone())[0]
    assert y is out

    def expected(dtype):
        x, W_, A, R, B, gY = (t.to(dtype) for t in (o.x, o.W, o.A, o.R, o.B, o.gY))
        return gY + reference.lowrank_linear(x, W_ if W else None, A, R, B, o.s)[0]

    assert_accurate(y, expected(torch.bfloat16), expected(torch.float64), torch.bfloat16)


@pytest.mark.parametrize("shape", [(4096, 4096, 4096, 64), (300, 1024, 4096, 16), (64, 4096, 4096, 16)], ids=str)
def test_the_backends_agree_on_identical_inputs(shape):
    o = operands(*shape, torch.bfloat16, device="cuda")
    oracle, chain = gradients(o.to(torch.float64), unfused), gradients(o, unfused)
    for name in backends.NAMES:
        if backends.unavailable(name) is None:
            with backends.backend(name):
                found = gradients(o, lora_xs_linear)
            for what, *three in zip(("y", "gX", "gR"), found, chain, oracle, strict=True):
                assert_accurate(*three, torch.bfloat16, f"{name} {what}")


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("r", [1, 12, 16, 64, 128])
@pytest.mark.parametrize("T", [1, 17, 64])
def test_every_token_its_own_adapter(request, poisoned, monkeypatch, T, r, cluster):
    if cluster > 1:
        request.getfixturevalue("hopper")
    monkeypatch.setattr(backend, "pick", lambda *_: Decode(cluster, 4))
    o = operands(T, 4096, 1000, r, torch.bfloat16, device="cuda")
    Rs = torch.randn(1000, r, r, device="cuda") / r**0.5
    index = torch.randint(-1, 1000, (T,), dtype=torch.int32, device="cuda")
    y, z = backend.decode(o.x, o.A, Rs, o.B, o.s, None, o.gY.clone(), index)

    def expected(dtype):
        z = o.x.to(dtype) @ o.A.to(dtype).T
        chosen = torch.where((index < 0)[:, None, None], 0, Rs[index.clamp(min=0).long()].to(dtype))
        return o.gY.to(dtype) + o.s * torch.einsum("tij,tj->ti", chosen, z) @ o.B.to(dtype).T

    assert_accurate(y, expected(torch.bfloat16), expected(torch.float64), torch.bfloat16)
    assert reference.relative_error(z, o.x.double() @ o.A.double().T) < 1e-5


@pytest.mark.parametrize("T", [8192, 300, 64])
def test_same_bits_every_time_also_where_launches_overlap(T):
    """Many calls in a row on memory that is used again: whoever does not wait for u reads the last call's."""
    problems = [operands(T, 1024, 4096, 64, torch.bfloat16, device="cuda", seed=seed) for seed in range(3)]
    expected = [gradients(o, lora_xs_linear) for o in problems]
    torch.cuda.synchronize()
    for _ in range(30):
        for o, first in zip(problems, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(gradients(o, lora_xs_linear), first, strict=True))


@pytest.mark.parametrize(
    "T, N, tile", [(2048, 1024, None), (40, 1024, None), (4096, 4096, None), *((2048, 1024, tile) for tile in TILES)]
)
def test_in_a_graph_and_on_another_stream(T, N, tile, request, monkeypatch):
    """With what is picked, which for the largest, on Hopper, makes u beside the GEMM: replays find the flags of the
    replay before.  And with each tile."""
    if tile is not None:
        request.getfixturevalue("hopper")
        monkeypatch.setattr(backend, "pick", lambda *_: Rows(3, tile, True))
    o = operands(T, N, 4096 if N < 4096 else 14336, 12, torch.bfloat16, device="cuda")
    operand = (o.x, o.W, o.A, o.R, o.B, o.s, o.bias)
    expected = backend.lowrank_linear(*operand)[0]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(backend.lowrank_linear(*operand)[0], expected)
    stream.synchronize()
    with torch.cuda.graph(graph):
        y = backend.lowrank_linear(*operand)[0]
    for _ in range(3):
        o.x.copy_(o.x.roll(1, 0))
        graph.replay()
        assert torch.equal(y, backend.lowrank_linear(*operand)[0])
    assert not torch.equal(y, expected)


def test_a_launch_that_fails_says_so(hopper):
    """And leaves nothing behind that a later call would trip over."""
    o = operands(300, 64, 64, 8, torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="loraxs gemm_tail: there is no kernel"):
        backend.gemm_tail(o.x, o.W, torch.zeros(300, 8, device="cuda").bfloat16(), o.B, None, 99, False)
    with pytest.raises(RuntimeError, match="loraxs decode: "):
        backend._decode(Decode(64, 1), o.x[:4], o.A, o.R, o.B, o.s, None, None, None)  # no cluster is so large
    torch.cuda.synchronize()
    got, chain = (call(o.x, o.W, o.A, o.R, o.B, o.s) for call in (lora_xs_linear, unfused))
    assert_accurate(got, chain, unfused(*(t.double() for t in (o.x, o.W, o.A, o.R, o.B)), o.s), torch.bfloat16)
