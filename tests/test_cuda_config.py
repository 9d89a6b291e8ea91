"""Which kernels of the CUDA core a problem takes: pure functions, checked without the core or a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from loraxs_kernels.backends.cuda import config, lies
from loraxs_kernels.backends.cuda.config import Decode, Rows, pick, unsupported, workspace
from loraxs_kernels.backends.device import Device

H100, A100 = Device((9, 0), 132), Device((8, 0), 108)
BOTH = ("80", "90a")
TOKENS = [1, 16, 64, 65, 128, 256, 512, 1024, 2048, 8192, 32768, 10**6]
LAYERS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (384, 384), (50257, 768), (30, 7)]
RANKS = [1, 4, 8, 12, 16, 20, 25, 32, 64, 128, 129, 256]


def test_the_tiles_are_those_the_core_is_built_with():
    header = Path(__file__).parents[1] / "csrc" / "gemm_tail_tiles.h"
    found = re.findall(r"tile\((\d+), (\d+), (\d+), (\d+), \w+\)", header.read_text())
    assert {int(number): (int(rows), int(columns)) for number, rows, columns, _ in found} == {
        number: (rows, columns) for number, (rows, columns, *_) in config.TILES.items()
    }
    assert {int(cluster) for *_, cluster in found} == {config.PAIR}


@pytest.mark.parametrize("device", [H100, A100, Device((12, 0), 170), Device((8, 9), 1)], ids=str)
@pytest.mark.parametrize("architectures", [BOTH, ("80",), ("90a",)], ids=str)
def test_whatever_is_picked_can_run(device, architectures):
    for T in TOKENS:
        for N, K in LAYERS:
            for r in RANKS:
                plan = pick(T, N, K, r, torch.bfloat16, device, architectures)
                hopper = device.capability == (9, 0) and "90a" in architectures
                if isinstance(plan, Decode):
                    assert T <= config.TOKENS and r <= config.WIDEST_DECODE
                    assert plan.cluster in (1, 2, 4, 8) and (hopper or plan.cluster == 1)
                    assert plan.clusters == 1 or plan.cluster * plan.clusters <= device.multiprocessors
                elif isinstance(plan, Rows):
                    assert (plan.tile is None) != hopper and (plan.shrink == 0) == hopper
                    assert not (plan.shrink or plan.programs) or (r <= config.WIDEST_SHRINK and K % 8 == 0)
                    assert plan.shrink <= 1 or -(-T // 64) * plan.shrink <= device.multiprocessors
                    assert plan.tile is None or (hopper and N % 8 == 0 and K % 8 == 0)
                    assert hopper or not plan.programs
                    assert plan.overlap == (plan.programs > 0) and plan.programs < device.multiprocessors
                else:
                    assert T > config.TOKENS or r > config.WIDEST_DECODE


@pytest.mark.parametrize(
    ("problem", "plan"),
    {
        "z by the library, then the small tile": ((8192, 4096, 4096, 64), Rows(0, 1, False, 2, 2)),
        "a long sum: u is made beside the large tile": ((8192, 4096, 14336, 64), Rows(0, 0, True, 4, 2, 4)),
        "too few rows for that": ((2048, 4096, 14336, 64), Rows(0, 0, False, 4, 2)),
        "too wide a rank": ((8192, 4096, 14336, 128), Rows(0, 0, False, 4, 2)),
        "8 waves on all multiprocessors, 9 on fewer": ((8448, 4096, 14336, 64), Rows(0, 0, False, 1, 2)),
        "a narrow y: the large tile": ((8192, 1024, 4096, 64), Rows(0, 0, False, 4, 2)),
        "bands that would add a wave": ((768, 2816, 4096, 64), Rows(0, 1, False, 1, 2)),
        "few rows": ((512, 4096, 4096, 64), Rows(0, 1, False, 2, 2)),
        "too few tiles for the GPU: the library's GEMM": ((512, 1024, 4096, 64), None),
        "an output TMA cannot write": ((8192, 50257, 768, 16), None),
        "an input it cannot read": ((8192, 4096, 4095, 64), None),
        "a token": ((1, 4096, 4096, 16), Decode(8, 4)),
        "a narrow input: fewer programs share it": ((64, 14336, 100, 16), Decode(2, 56)),
        "nothing": ((0, 4096, 4096, 16), None),
    }.values(),
)
def test_what_a_hopper_gpu_gets(problem, plan):
    assert pick(*problem, torch.bfloat16, H100, BOTH) == plan
    assert pick(*problem, torch.float16, H100, BOTH) == plan
    assert pick(*problem, torch.float32, H100, BOTH) is None


LARGE, SMALL = (0, False, 1, 2), (1, False, 1, 2)
ORDERS = {  # T, N: tile, overlap, swizzle, raster for K = 4096, and for a sum that is four times as long as y is wide
    (512, 11008): ((1, False, 2, 2), (1, False, 2, 2)),
    (512, 14336): ((1, False, 2, 2), LARGE),
    (2100, 11008): (SMALL, LARGE),  # 17 rows of tiles: bands of 2 make 20 of them
    (2100, 14336): (SMALL, LARGE),
    (8192, 11008): ((1, False, 2, 2), LARGE),  # 43 columns of the large tile: bands of 4 make 44, and a wave more
    (8192, 14336): ((1, False, 2, 2), (0, True, 4, 2)),
}


@pytest.mark.parametrize("size", ORDERS, ids=str)
def test_the_order_of_the_tiles_adds_no_wave(size):
    T, N = size
    for K, expected in zip((4096, 4 * N), ORDERS[size], strict=True):
        plan = pick(T, N, K, 64, torch.bfloat16, H100, BOTH)
        assert (plan.tile, plan.overlap, plan.swizzle, plan.raster) == expected
        rows, columns, _, best = config.TILES[plan.tile]

        def waves(swizzle, rows=rows, columns=columns):
            """As CUTLASS pads and takes them: pairs of tiles below each other, whole bands both ways."""
            down = len(range(0, T, 2 * swizzle * rows)) * 2 * swizzle
            across = len(range(0, N, swizzle * columns)) * swizzle
            return len(range(0, down * across, H100.multiprocessors))

        assert waves(plan.swizzle) == waves(1)
        assert plan.swizzle == best or waves(best) > waves(1)


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ((8192, 64, 1, False), ((8192, 64), None, None)),
        ((100, 12, 3, True), ((100, 16), (3, 100, 12), (2, 12, 12))),
        ((1, 1, 1, True), ((1, 8), None, (1, 1, 1))),
    ],
)
def test_the_workspace(arguments, shapes):
    assert workspace(*arguments) == shapes


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("t", "way"),
    {
        "rows": (zeros(5, 16), 0),
        "columns": (zeros(5, 16).t(), 1),
        "padded rows": (zeros(5, 16)[:, :12], 0),
        "padded columns": (zeros(16, 24)[:, 8:20].t(), 1),
        "rows at odd places": (zeros(5, 12), None),
        "a beginning at an odd place": (zeros(5, 16)[:, 3:], None),
        "every second column": (zeros(5, 32)[:, ::2], None),
        "one row again and again": (zeros(1, 16).expand(5, 16), None),
        "rows that overlap": (zeros(100).as_strided((5, 16), (8, 1)), None),
    }.values(),
)
def test_how_a_matrix_lies(t, way):
    assert lies(t) == way


@pytest.mark.parametrize("device", [A100, Device((10, 0), 148)], ids=str)
def test_hopper_kernels_run_on_hopper_alone(device):
    assert pick(8192, 4096, 4096, 64, torch.bfloat16, device, BOTH) == Rows(1, None, False)
    assert pick(1, 4096, 4096, 64, torch.bfloat16, device, BOTH) == Decode(1, 32)
    assert pick(8192, 4096, 4096, 64, torch.bfloat16, H100, ("80",)) == Rows(1, None, False)


@pytest.mark.parametrize(
    ("capability", "architectures", "reason"),
    [
        ((9, 0), BOTH, None),
        ((9, 0), ("90a",), None),
        ((8, 9), BOTH, None),
        ((12, 0), BOTH, None),  # by the PTX of the lowest
        ((7, 5), BOTH, "the GPU has compute capability 7.5, it must be at least 8.0"),
        ((8, 0), ("90a",), "built for sm_90a, the GPU has compute capability 8.0: .* LORAXS_CUDA_ARCHS=80"),
        ((10, 0), ("90a",), "LORAXS_CUDA_ARCHS=100"),
        ((8, 0), ("86", "90a"), "built for sm_86, sm_90a"),
    ],
)
def test_the_reason_a_core_cannot_run_on_a_gpu(capability, architectures, reason):
    found = unsupported(capability, architectures)
    assert found is None if reason is None else re.search(reason, found)
