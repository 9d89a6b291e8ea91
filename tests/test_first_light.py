"""First light: every kernel alone, on small problems whose wrong results name what was read instead (tests/rungs.py).

These tests run first on a GPU: `python bench/gpu_suite.py --only ladder --out DIR`, where one that hangs or crashes
costs only itself.  Without a GPU the problems are smaller: LORAXS_EMULATED=1 and TRITON_INTERPRET=1 run the kernels
themselves, and without either plain torch takes their place, which tests the rungs.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import rungs
import torch
from helpers import EMULATED, INTERPRETED

from loraxs_kernels import backends
from loraxs_kernels.backends import cuda, triton
from loraxs_kernels.backends import torch as plain
from loraxs_kernels.backends.cuda.config import TILES, Decode

GPU = pytest.mark.gpu("first light", limit=60)  # the first of a process also takes what CUDA and Triton take to start
in_the_core = pytest.mark.skipif(INTERPRETED, reason="runs kernels of the core, not Triton's")
of_triton = pytest.mark.skipif(EMULATED, reason="runs Triton's kernels, not those of the core")
plain_only = pytest.mark.skipif(EMULATED or INTERPRETED, reason="runs no kernel")

# (T, N, K, r).  The first without remainders; more tiles than an H100 has multiprocessors; multiples of only TMA's 8.
TAILS = [(512, 1024, 512, 64), (2100, 4096, 4096, 64)]
TAILS += [(129, 264, 72, 1), (1000, 1024, 1000, 12), (90, 8, 8, 25), (301, 520, 136, 64), (777, 1096, 1000, 130)]
SMALL_TAILS = [(70, 40, 64, 12), (140, 264, 72, 16)]
SMALL_TAILS += [(69, 40, 72, 1), (70, 24, 40, 12), (67, 8, 8, 25), (66, 16, 136, 64), (65, 24, 40, 130)]
DECODES = [(1, 4096, 1000, 16), (17, 4096, 1000, 16), (64, 4096, 1000, 16)]
DECODES += [(17, 1000, 4096, 12), (64, 264, 4096, 64), (64, 264, 72, 128)]
SHRINKS = [(300, 0, 1088, 64), (1000, 0, 1000, 12), (65, 0, 72, 1)]


def on(shapes: list[rungs.Shape], small: list[rungs.Shape]) -> pytest.MarkDecorator:
    """On a GPU the shapes, on a CPU the small ones."""
    cases = [pytest.param("cuda:0", shape, marks=GPU, id=f"gpu {shape}") for shape in shapes]
    cases += [pytest.param("cpu", shape, id=f"cpu {shape}") for shape in small]
    return pytest.mark.parametrize(("device", "shape"), cases)


def variants(**found: dict) -> pytest.MarkDecorator:
    cases = [pytest.param(how, id=name.replace("_", " ")) for name, how in found.items()]
    return pytest.mark.parametrize("how", cases)


@pytest.fixture
def device():
    """For tests that run on a CPU alone."""
    return "cpu"


# What a right kernel computes.


def shrink(x, A, R, s, other, split, overlap, programs):
    y, z, gram = plain.lowrank_linear(x, None, A, R, torch.eye(len(A), dtype=x.dtype), s, other=other)
    return z, y, gram


def gemm_tail(x, W, u, B, bias, tile, overlap):
    y = u.float() @ B.float().T + (0 if W is None else x.float() @ W.float().T)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def decode(plan, x, A, R, B, s, bias, out, index):
    z = x.float() @ A.float().T
    R = R.float() if index is None else torch.where((index < 0)[:, None, None], 0, R[index.clamp(min=0).long()].float())
    u = s * torch.einsum("tij,tj->ti", R.expand(len(x), *R.shape[-2:]), z)
    y = u.to(x.dtype).float() @ B.float().T + sum(t.float() for t in (bias, out) if t is not None)
    return y.to(x.dtype), z


def low_rank(config, x, A, R, B, s, bias, out, other):
    return plain.lowrank_linear(x, None, A, R, B, s, bias, out, other)


@pytest.fixture
def kernels(device, poisoned):
    """What the rungs call: of the backends, or on a CPU without their kernels what computes the same."""
    own = SimpleNamespace(
        device=torch.device(device),
        **{"shrink": cuda.shrink, "gemm_tail": cuda.gemm_tail, "decode": cuda._decode, "low_rank": triton.low_rank},
    )
    if device == "cpu" and not EMULATED:
        own.shrink, own.gemm_tail, own.decode = shrink, gemm_tail, decode
    if device == "cpu" and not INTERPRETED:
        own.low_rank = low_rank
    return own


def needs(device: str, backend: str = "cuda", hopper: bool = True) -> None:
    """Skips where this GPU has not what a rung needs."""
    if device == "cpu":
        return
    if reason := backends.unavailable(backend):
        pytest.skip(f"{backend} backend: {reason}")
    if hopper and (torch.cuda.get_device_capability() != (9, 0) or "90a" not in cuda.core.architectures()):
        pytest.skip("needs a Hopper GPU and a core built for sm_90a")


def passes(rung) -> None:
    """All checks of a rung run, also those after one that fails; what they found is told if a later one raises."""
    found = []
    try:
        found += filter(None, rung)
    except Exception as error:
        found.append(f"then {type(error).__name__}: {error}")
    if found:
        pytest.fail("\n".join(found))


@in_the_core
@on(DECODES, [(1, 40, 72, 16), (33, 24, 40, 12)])
@variants(one_R={}, seven={"slots": 7}, transposed={"slots": 7, "transposed": True, "dtype": torch.float16})
@pytest.mark.parametrize("cluster", [1, 8])
def test_decode(kernels, device, shape, how, cluster):
    needs(device, hopper=cluster > 1)
    passes(rungs.decode(kernels, shape, Decode(cluster, 1 if device == "cpu" else 4), **how))


@in_the_core
@on(SHRINKS, [(70, 0, 192, 64), (130, 0, 72, 12), (65, 0, 40, 1)])
@variants(
    once={},
    transposed={"transposed": True},
    split={"split": 4},
    split_overlap={"split": 4, "transposed": True, "overlap": True},
    gram={"gram": True},
    gram_split={"split": 4, "gram": True},
    tma={"programs": 2},
    tma_gram={"programs": 2, "transposed": True, "gram": True},
)
def test_shrink(kernels, device, shape, how):
    needs(device, hopper=bool({"overlap", "programs"} & set(how)))
    passes(rungs.shrink(kernels, shape, torch.float16 if shape[3] == 12 else torch.bfloat16, **how))


@in_the_core
@on(TAILS, SMALL_TAILS)
@variants(bf16={}, transposed={"transposed": True}, fp16={"dtype": torch.float16})
@pytest.mark.parametrize("tile", TILES)
def test_tail(kernels, device, shape, how, tile):
    needs(device)
    passes(rungs.tail(kernels, shape, tile, **how))


@in_the_core
@on([TAILS[0], *TAILS[2:4]], [SMALL_TAILS[0], *SMALL_TAILS[2:4]])
@pytest.mark.parametrize("tile", TILES)
def test_tail_with_a_bias(kernels, device, shape, tile):
    needs(device)
    passes(rungs.tail_bias(kernels, shape, tile))


@of_triton
@on([(300, 1000, 1032, 64)], [(20, 40, 72, 12)])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("splits", [1, 4])
def test_triton(kernels, device, shape, splits, transposed):
    needs(device, "triton", hopper=False)
    passes(rungs.triton_chain(kernels, shape, splits, transposed))


# What a wrong result is said to be.


def column_off(y, *_):
    y[:, 3] = y[:, 4]
    return y


def without_tail(y, x, W, u, B, *_):
    return y if W is None else (x.float() @ W.float().T).to(x.dtype)


def tail_twice(y, x, W, u, B, *_):
    return y + u @ B.T


def unwritten(y, *_):
    y[-1, 0] = torch.nan
    return y


def tail(kernels):
    return rungs.tail(kernels, SMALL_TAILS[0], 1)


FAULTS = {
    "another column's": (tail, "gemm_tail", column_off, r"it is B\[4, 0\], must be B\[3, 0\]"),
    "no tail beside W": (tail, "gemm_tail", without_tail, r"beside W = 0 .*it is nothing, must be B\[0, 0\]"),
    "the tail twice": (tail, "gemm_tail", tail_twice, r"it is twice B\[0, 0\]"),
    "the tail twice, among random numbers": (tail, "gemm_tail", tail_twice, r"^y, random, with W: relative error"),
    "not written": (tail, "gemm_tail", unwritten, r"at \[69, 0\].* memory that nobody wrote"),
    "a bias that lies elsewhere": (
        lambda kernels: rungs.tail_bias(kernels, SMALL_TAILS[0], 0),
        "gemm_tail",
        lambda y, x, W, u, B, bias, *_: y if bias is None else y.roll(1, 1),
        r"it is bias\[39, 0\], must be bias\[0, 0\]",
    ),
    "R as it lies, not transposed": (
        lambda kernels: rungs.decode(kernels, (33, 24, 40, 12), Decode(1, 1)),
        "decode",
        lambda y, plan, x, A, R, *more: decode(plan, x, A, R.mT, *more)[0],
        r"y of R.*it is R\[0, 1\], must be R\[1, 0\]",
    ),
    "s left out": (
        lambda kernels: rungs.decode(kernels, (33, 24, 40, 12), Decode(1, 1)),
        "decode",
        lambda y, plan, x, A, R, B, s, *more: decode(plan, x, A, R, B, 1.0, *more)[0],
        r"^y, random: relative error",
    ),
    "another token's R": (
        lambda kernels: rungs.decode(kernels, (33, 24, 40, 12), Decode(8, 1), 7),
        "decode",
        lambda y, plan, x, A, R, B, s, bias, out, index: decode(plan, x, A, R, B, s, bias, out, index.flip(0))[0],
        r"it is R\[2, 0, 1\], must be R\[4, 0, 1\]",
    ),
    "z of other columns": (
        lambda kernels: rungs.shrink(kernels, (70, 0, 192, 64)),
        "shrink",
        lambda z, x, A, *_: x.float() @ A.float().roll(1, 1).T,
        r"^z at .* it is A\[0, 191\], must be A\[0, 0\]",
    ),
    "z of half precision": (
        lambda kernels: rungs.shrink(kernels, (70, 0, 192, 64)),
        "shrink",
        lambda z, *_: z.bfloat16().float(),
        r"^z, random: relative error .*, allowed 1\.00e-05; at \[",
    ),
}


@plain_only
def test_what_was_found_is_told_though_a_later_check_raises():
    def rung():
        yield ""
        yield "y: it is B[4, 0], must be B[3, 0]"
        raise RuntimeError("CUDA error")

    with pytest.raises(pytest.fail.Exception, match=r"^y: it is B\[4, 0\].*\nthen RuntimeError: CUDA error$"):
        passes(rung())
    passes(iter(["", ""]))


@plain_only
@pytest.mark.parametrize("what", FAULTS)
def test_a_wrong_result_names_what_was_read(kernels, what):
    """And how far off it is, where the numbers are random."""
    rung, kernel, change, message = FAULTS[what]
    own = getattr(kernels, kernel)

    def spoilt(*args):
        """Something is wrong in its first result."""
        made = own(*args)
        return change(made, *args) if isinstance(made, torch.Tensor) else (change(made[0], *args), *made[1:])

    setattr(kernels, kernel, spoilt)
    texts = list(rung(kernels))
    assert any(re.search(message, text) for text in texts), texts


@plain_only
def test_two_elements_added_up():
    coded = rungs.Coded("W", 300, 400, dtype=torch.bfloat16, device="cpu")
    first, second = (coded.passes[:, n, k].tolist() for n, k in ((7, 390), (299, 1)))
    assert coded.element(first) == "W[7, 390]" and coded.element(second) == "W[299, 1]"
    both = [a + b for a, b in zip(first, second, strict=True)]
    assert coded.meaning(both, first) == "W[7, 390] and W[299, 1] added up"
    assert coded.meaning([0.5, 1, 1, 1], first) == "no element of W"
    assert coded.element([251, 251, 1, 1]) is None


@plain_only
def test_the_wrong_tiles_are_named():
    expected = torch.randn(700, 1500, dtype=torch.float64)
    got = expected.clone()
    got[600, 1300:] += 5
    got[699, 0] = torch.nan
    text = rungs.within("y", got, expected, 1e-3, (128, 256))
    assert re.search(r"at \[600, 1300\]: got .*; 201 wrong, in 2 of 36 tiles of 128 x 256: \[4, 5\], \[5, 0\]$", text)
    coded = rungs.Coded("W", 300, 400, dtype=torch.float32, device="cpu")
    text = rungs.exact("y", coded.passes.roll(1, 2), coded.passes, coded, (128, 256))
    assert text.startswith("y at [0, 0]: it is W[0, 399], must be W[0, 0] (got ")
    assert text.endswith("; 120000 wrong, in 6 of 6 tiles of 128 x 256: [0, 0], [0, 1], [1, 0], [1, 1], ...")


@plain_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poison_is_nan_in_every_dtype(poisoned, dtype):
    for shape in ((3, 5), (200_000,), (0, 4)):
        for backend in (cuda, triton):
            t = backend.empty(torch.empty(0), shape, dtype)
            assert t.shape == shape and t.dtype == dtype and t.isnan().all()
