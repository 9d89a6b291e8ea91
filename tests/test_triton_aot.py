"""Every kernel, as every configuration that can be picked, compiled to machine code for GPUs that are not here."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    pytest.skip("the table was compiled with Triton 3.6; older ones spill here and there", allow_module_level=True)

from loraxs_kernels.backends import triton as triton_backend  # noqa: E402
from loraxs_kernels.backends import triton_indexed  # noqa: E402
from loraxs_kernels.backends.triton import config  # noqa: E402
from loraxs_kernels.backends.triton.aot import Compiled, Problem, compile_problem, fp32_matmul_precision  # noqa: E402
from loraxs_kernels.backends.triton.config import Config, Device  # noqa: E402
from loraxs_kernels.bench.tiles import SETTING  # noqa: E402

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]
FORWARD_AND_BACKWARD = ("forward", "backward")
RANKS = (4, 8, 12, 16, 20, 25, 32, 64, 100, 128)  # the paper's, and two more
MATRIX = {"wgmma.mma_async", "mma.sync", "tcgen05.mma"}


class Job(NamedTuple):
    capability: tuple[int, int]
    precision: str
    problem: Problem
    indexed: bool = False  # whether each row has an R of its own

    @property
    def config(self) -> Config:
        """What pick_config says for it."""
        p = self.problem
        with fp32_matmul_precision(p.matmul_precision):
            return config.pick_config(p.T, p.N, p.K, p.r, p.dtype, p.layout, Device(self.capability, 132))

    def compiled(self) -> list[Compiled]:
        with mock.patch.object(triton_backend, "low_rank", with_an_index if self.indexed else triton_backend.low_rank):
            return compile_problem(self.problem, self.capability, self.config)

    def __str__(self) -> str:
        p = self.problem
        text = f"sm_{self.capability[0]}{self.capability[1]}-{self.precision}-{p.T}x{p.N}x{p.K}-r{p.r}-{p.layout}"
        return text + ("" if p.padded else "-as-it-is") + ("-indexed" if self.indexed else "")


def with_an_index(config: Config, x, A, R, B, s, bias, out, other):
    """In place of low_rank: R is of a table in which the matrices lie apart; there is no gram."""
    table = R.new_empty(8, 3, *R.shape)[:, 1]
    table = table if R.stride(1) == 1 else table.mT
    return triton_indexed.low_rank(config, x, A, table, B, s, x.new_empty(len(x), dtype=torch.int32), bias, out)


def jobs() -> list[Job]:
    """Each row of the table, in one launch and in two; the paper's ranks below their tile; fp16; `out`."""
    found = []
    for capability in CAPABILITIES:
        for precision, (dtype, matmul) in SETTING.items():
            problems = [
                Problem(T, 4096, 14336, r, dtype, layout, matmul)
                for r in (RANKS if precision == "half" else (12, 16, 32, 64))
                for layout in FORWARD_AND_BACKWARD
                for T in ((8, 500, 100_000) if r in (16, 32, 64, 128) else (500, 100_000))
            ]
            found += [Job(capability, precision, problem) for problem in problems]
        half = [
            Problem(500, 4096, 4096, 25, torch.float16),
            Problem(500, 4096, 4096, 64, out=True),
            Problem(500, 4096, 4096, 64, bias=True),
            Problem(100_000, 4096, 4096, 16, out=True),
            *(Problem(500, 4096, 4096, 12, layout=layout, padded=False) for layout in FORWARD_AND_BACKWARD),
        ]
        found += [Job(capability, "half", problem) for problem in half]
    return found


def indexed_jobs() -> list[Job]:
    """Each row with an R of its own: in one launch and in three, the widest ranks of both."""
    found = []
    for capability in CAPABILITIES:
        for precision, ranks in (("half", (20, 64, 128)), ("tf32", (64,))):
            dtype, matmul = SETTING[precision]
            for r, layout in product(ranks, FORWARD_AND_BACKWARD):
                for T in (8, 1000, 100_000) if r == 20 else (8, 100_000):
                    problem = Problem(T, 4096, 14336, r, dtype, layout, matmul)
                    found.append(Job(capability, precision, problem, indexed=True))
    return found


@pytest.fixture(scope="module")
def compiling():
    """{job: what will have been compiled for it}, on every core."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield {job: pool.submit(job.compiled) for job in jobs() + indexed_jobs()}


@pytest.mark.parametrize("job", jobs() + indexed_jobs(), ids=str)
def test_compiles_for_a_gpu_that_is_not_here(compiling, job):
    """No spilled registers, matrix instructions, no address in fewer than 64 bits, and copies of 16 bytes alone.

    Nothing is read by two bytes at a time, but for a bias and for a B that is not a layer's own and whose rank is no
    multiple of 16.  mix_kernel copies nothing in the background: most of its programs read one R.
    """
    room = config.shared_memory(job.capability)
    kernels = compiling[job].result()
    assert kernels
    for each in kernels:
        assert each.spilled == 0, each
        assert each.shared <= room, each
        assert not each.narrow, each
        assert {word for word, count in each.instructions.items() if count} & MATRIX, each
        assert set(each.copies) == (set() if each.kernel == "mix_kernel" else {128}) or not job.problem.padded, each
    if not job.problem.bias:
        assert any(each.short_reads for each in kernels) == (not job.problem.padded), kernels


def test_hopper_and_blackwell_use_their_own_matrix_instructions(compiling):
    for job, own in (((9, 0), "wgmma.mma_async"), ((10, 0), "tcgen05.mma")):
        (chain,) = compiling[next(j for j in jobs() if j.capability == job and j.problem.T == 100_000)].result()
        assert chain.kernel == "chain_kernel" and chain.instructions[own] > 0


def test_an_index_takes_one_launch_or_three(compiling):
    for job in indexed_jobs():
        one = job.problem.T == 100_000 and job.problem.r <= 64
        three = ["shrink_kernel", "mix_kernel", "expand_mixed_kernel"]
        assert [each.kernel for each in compiling[job].result()] == (["chain_indexed_kernel"] if one else three)


def test_every_row_of_the_table_is_reached_and_tells_its_shared_memory(compiling):
    """A row nobody picks is dead; one that understates its memory would be picked where it cannot run."""
    table, needed = config.committed_table(), {}
    for job in jobs():
        p, device = job.problem, Device(job.capability, 132)
        row = config.pick_row(table, p.T, config.padded(p.r), job.precision, p.layout, device)
        assert config.split(row.tiles, p.T, p.N, p.K, 132) == job.config
        needed[row] = max([needed.get(row, 0), *(each.shared for each in compiling[job].result())])
    layouts: dict[tuple, set[str]] = {}
    for row in table:
        layouts.setdefault((row.family, row.precision, row.rank, row.tokens), set()).add(row.layout)
    measured = {key for key, found in layouts.items() if found >= set(FORWARD_AND_BACKWARD)}
    for row in table:
        hidden = row.layout == "any" and (row.family, row.precision, row.rank, row.tokens) in measured
        assert hidden or needed[row] <= row.shared, row
