"""First light: every kernel alone, on small problems whose wrong results name what was read instead (tests/rungs.py).

These tests run first on a GPU: `python bench/gpu_suite.py --only ladder --out DIR`, where one that hangs or crashes
costs only itself.  Without a GPU the problems are smaller, and run with LORAXS_EMULATED=1 or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import rungs
import torch
from helpers import EMULATED, INTERPRETED

from loraxs_kernels import backends
from loraxs_kernels.backends import cuda, triton
from loraxs_kernels.backends.cuda.config import TILES, Decode

GPU = pytest.mark.gpu("first light", limit=60)  # the first of a process also takes what CUDA and Triton take to start
emulated = pytest.mark.skipif(not EMULATED, reason="runs kernels of the core: needs a GPU, or LORAXS_EMULATED=1")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs Triton's kernels: needs a GPU, or TRITON_INTERPRET=1")
pytestmark = pytest.mark.usefixtures("poisoned")

# (T, N, K, r).  The first without remainders; more tiles than an H100 has multiprocessors; multiples of only TMA's 8.
TAILS = [(512, 1024, 512, 64), (2100, 4096, 4096, 64)]
TAILS += [(129, 264, 72, 1), (1000, 1024, 1000, 12), (90, 8, 8, 25), (301, 520, 136, 64), (777, 1096, 1000, 130)]
SMALL_TAILS = [(70, 40, 64, 12), (140, 264, 72, 16)]
SMALL_TAILS += [(69, 40, 72, 1), (70, 24, 40, 12), (67, 8, 8, 25), (66, 16, 136, 64), (65, 24, 40, 130)]
DECODES = [(1, 4096, 1000, 16), (17, 4096, 1000, 16), (64, 4096, 1000, 16)]
DECODES += [(17, 1000, 4096, 12), (64, 264, 4096, 64), (64, 264, 72, 128)]
SHRINKS = [(300, 0, 1088, 64), (1000, 0, 1000, 12), (65, 0, 72, 1)]


def on(shapes: list[rungs.Shape], small: list[rungs.Shape], here: pytest.MarkDecorator = emulated):
    """On a GPU the shapes, on a CPU the small ones."""
    cases = [pytest.param("cuda:0", shape, marks=GPU, id=f"gpu {shape}") for shape in shapes]
    cases += [pytest.param("cpu", shape, marks=here, id=f"cpu {shape}") for shape in small]
    return pytest.mark.parametrize(("device", "shape"), cases)


def variants(**found: dict) -> pytest.MarkDecorator:
    cases = [pytest.param(how, id=name.replace("_", " ")) for name, how in found.items()]
    return pytest.mark.parametrize("how", cases)


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


@on(DECODES, [(1, 40, 72, 16), (33, 24, 40, 12)])
@variants(one_R={}, seven={"slots": 7}, transposed={"slots": 7, "transposed": True, "dtype": torch.float16})
@pytest.mark.parametrize("cluster", [1, 8])
def test_decode(device, shape, how, cluster):
    needs(device, hopper=cluster > 1)
    passes(rungs.decode(device, shape, Decode(cluster, 1 if device == "cpu" else 4), **how))


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
def test_shrink(device, shape, how):
    needs(device, hopper=bool({"overlap", "programs"} & set(how)))
    passes(rungs.shrink(device, shape, dtype=torch.float16 if shape[3] == 12 else torch.bfloat16, **how))


@on(TAILS, SMALL_TAILS)
@variants(bf16={}, transposed={"transposed": True}, fp16={"dtype": torch.float16})
@pytest.mark.parametrize("tile", TILES)
def test_tail(device, shape, how, tile):
    needs(device)
    passes(rungs.tail(device, shape, tile, **how))


@on([TAILS[0], *TAILS[2:4]], [SMALL_TAILS[0], *SMALL_TAILS[2:4]])
@pytest.mark.parametrize("tile", TILES)
def test_tail_with_a_bias(device, shape, tile):
    needs(device)
    passes(rungs.tail_bias(device, shape, tile))


@on([(300, 1000, 1032, 64)], [(20, 40, 72, 12)], interpreted)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("splits", [1, 4])
def test_triton(device, shape, splits, transposed):
    needs(device, "triton", hopper=False)
    passes(rungs.triton_chain(device, shape, splits, transposed))


# What a wrong result is said to be.


def spoilt(change):
    """A kernel whose result, or the first of several, is changed."""

    def kernel(own, *args):
        made = own(*args)
        return change(made, *args) if isinstance(made, torch.Tensor) else (change(made[0], *args), *made[1:])

    return kernel


def column_off(y, *_):
    y[:, 3] = y[:, 4]
    return y


def without_tail(y, x, W, *_):
    return y if W is None else (x.float() @ W.float().T).to(x.dtype)


def tail_twice(y, x, W, u, B, *_):
    return y + u @ B.T


def unwritten(y, *_):
    y[-1, 0] = torch.nan
    return y


TAIL = (rungs.tail, (SMALL_TAILS[0], 1), "gemm_tail")
DECODE = (rungs.decode, ((33, 24, 40, 12), Decode(1, 1)), "_decode")
SHRINK = (rungs.shrink, ((70, 0, 192, 64),), "shrink")
# A rung and its arguments, the kernel that is spoilt, how, and what is said of it.
FAULTS = {
    "another column's": (*TAIL, spoilt(column_off), r"it is B\[4, 0\], must be B\[3, 0\]"),
    "no tail beside W": (*TAIL, spoilt(without_tail), r"beside W = 0 .*it is nothing, must be B\[0, 0\]"),
    "the tail twice": (*TAIL, spoilt(tail_twice), r"it is twice B\[0, 0\]"),
    "the tail twice, among random numbers": (*TAIL, spoilt(tail_twice), r"^y, random, with W: relative error"),
    "not written": (*TAIL, spoilt(unwritten), r"at \[69, 0\].* memory that nobody wrote"),
    "a bias that lies elsewhere": (
        *(rungs.tail_bias, (SMALL_TAILS[0], 0), "gemm_tail"),
        lambda own, x, W, u, B, bias, *more: own(x, W, u, B, bias if bias is None else bias.roll(1), *more),
        r"it is bias\[39, 0\], must be bias\[0, 0\]",
    ),
    "R as it lies, not transposed": (
        *DECODE,
        lambda own, plan, x, A, R, *more: own(plan, x, A, R.mT.contiguous(), *more),
        r"y of R.*it is R\[0, 1\], must be R\[1, 0\]",
    ),
    "s left out": (
        *DECODE,
        lambda own, plan, x, A, R, B, s, *more: own(plan, x, A, R, B, 1.0, *more),
        r"^y, random: relative error",
    ),
    "another token's R": (
        *(rungs.decode, ((33, 24, 40, 12), Decode(8, 1), 7), "_decode"),
        lambda own, *args: own(*args[:-1], args[-1].flip(0)),
        r"it is R\[2, 0, 1\], must be R\[4, 0, 1\]",
    ),
    "z of other columns": (
        *SHRINK,
        spoilt(lambda z, x, A, *_: x.float() @ A.float().roll(1, 1).T),
        r"^z at .* it is A\[0, 191\], must be A\[0, 0\]",
    ),
    "z of half precision": (
        *SHRINK,
        spoilt(lambda z, *_: z.bfloat16().float()),
        r"^z, random: relative error .*, allowed 1\.00e-05; at \[",
    ),
}


def test_what_was_found_is_told_though_a_later_check_raises():
    def rung():
        yield ""
        yield "y: it is B[4, 0], must be B[3, 0]"
        raise RuntimeError("CUDA error")

    with pytest.raises(pytest.fail.Exception, match=r"^y: it is B\[4, 0\].*\nthen RuntimeError: CUDA error$"):
        passes(rung())
    passes(iter(["", ""]))


@emulated
@pytest.mark.parametrize("what", FAULTS)
def test_a_wrong_result_names_what_was_read(monkeypatch, what):
    """And how far off it is, where the numbers are random."""
    rung, arguments, kernel, fault, message = FAULTS[what]
    monkeypatch.setattr(cuda, kernel, partial(fault, getattr(cuda, kernel)))
    texts = list(rung("cpu", *arguments))
    assert any(re.search(message, text) for text in texts), texts


def test_two_elements_added_up():
    coded = rungs.Coded("W", 300, 400, dtype=torch.bfloat16, device="cpu")
    first, second = (coded.passes[:, n, k].tolist() for n, k in ((7, 390), (299, 1)))
    assert coded.element(first) == "W[7, 390]" and coded.element(second) == "W[299, 1]"
    both = [a + b for a, b in zip(first, second, strict=True)]
    assert coded.meaning(both, first) == "W[7, 390] and W[299, 1] added up"
    assert coded.meaning([0.5, 1, 1, 1], first) == "no element of W"
    assert coded.element([251, 251, 1, 1]) is None


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poison_is_nan_in_every_dtype(poisoned, dtype):
    for shape in ((3, 5), (200_000,), (0, 4)):
        for backend in (cuda, triton):
            t = backend.empty(torch.empty(0), shape, dtype)
            assert t.shape == shape and t.dtype == dtype and t.isnan().all()
