"""Every kernel, as every configuration that can be picked, compiled to machine code for GPUs that are not here."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if VERSION < (3, 6):
    pytest.skip("the table was compiled with Triton 3.6; older ones spill here and there", allow_module_level=True)

from loraxs_kernels.backends import triton as triton_backend  # noqa: E402
from loraxs_kernels.backends import triton_indexed  # noqa: E402
from loraxs_kernels.backends.triton import aot, config  # noqa: E402
from loraxs_kernels.backends.triton.aot import Compiled, Problem, compile_problem, fp32_matmul_precision  # noqa: E402
from loraxs_kernels.backends.triton.config import Config, Device, Row  # noqa: E402
from loraxs_kernels.tuning.tiles import SETTING  # noqa: E402

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]
FORWARD_AND_BACKWARD = ("forward", "backward")
TILES = {"half": (16, 32, 64, 128), "tf32": (16, 32, 64)}  # ranks that fill a tile
BELOW = {"half": (4, 8, 12, 20, 25, 100), "tf32": (12,)}  # the paper's ranks that do not, and one more
# What newer versions of Triton may do, of which the table knows nothing (3.8 does): spill so many bytes of a thread,
# and use more shared memory than the row says, but no more than every GPU has.
SPILLED, SHARED = (0, 0) if VERSION == (3, 6) else (16, config.shared_memory((0, 0)))
MATRIX = {"wgmma.mma_async", "mma.sync", "tcgen05.mma"}
OWN = {(9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma"}  # what Hopper and Blackwell have instead of mma.sync


class Job(NamedTuple):
    capability: tuple[int, int]
    precision: str
    problem: Problem
    indexed: bool = False  # whether each row has an R of its own

    @property
    def row(self) -> Row:
        """What is picked of the table for it."""
        p, device = self.problem, Device(self.capability, 132)
        return config.pick_row(config.committed_table(), p.T, config.padded(p.r), self.precision, p.layout, device)

    @property
    def config(self) -> Config:
        """What pick_config says for it."""
        p = self.problem
        with fp32_matmul_precision(p.matmul_precision):
            return config.pick_config(p.T, p.N, p.K, p.r, p.dtype, p.layout, Device(self.capability, 132))

    def compiled(self) -> list[Compiled]:
        low_rank = with_an_index if self.indexed else triton_backend.low_rank
        with mock.patch.object(triton_backend, "low_rank", low_rank), mock.patch.object(aot, "_looked_at", looked_at):
            return compile_problem(self.problem, self.capability, self.config)

    def __str__(self) -> str:
        p = self.problem
        text = f"sm_{self.capability[0]}{self.capability[1]}-{self.precision}-{p.T}x{p.N}x{p.K}-r{p.r}-{p.layout}"
        return text + ("" if p.padded else "-as-it-is") + ("-indexed" if self.indexed else "")


def looked_at(name: str, compiled: Any, own=aot._looked_at, tool=aot._disassembled) -> Compiled:
    """As aot.py does it, but for copies and reads, whose widths stand in the PTX and are no choice of ptxas: to
    disassemble a kernel takes as long as to compile one."""
    with mock.patch.object(aot, "_disassembled", lambda cubin, what: "" if what == "-sass" else tool(cubin, what)):
        found, ptx = own(name, compiled), compiled.asm["ptx"]
    assert not found.copies and not found.short_reads  # from no disassembly
    copies = Counter(8 * int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\], (\w+)", ptx))
    reads = re.findall(r"\bld\.global(?!\S*\.v[248]\.)\S*\.[bfsu](?:8|16)\b", ptx)
    return found._replace(copies=copies, short_reads=len(reads))


def with_an_index(config: Config, x, A, R, B, s, bias, out, other):
    """In place of low_rank: R is of a table in which the matrices lie apart; there is no gram."""
    table = R.new_empty(8, 3, *R.shape)[:, 1]
    table = table if R.stride(1) == 1 else table.mT
    return triton_indexed.low_rank(config, x, A, table, B, s, x.new_empty(len(x), dtype=torch.int32), bias, out)


def jobs() -> list[Job]:
    """Each row of the table, in one launch and in two; the paper's ranks below their tile; fp16; `out`.

    A row is compiled for the first GPU that takes it with the same instruction, and at the widest rank for all.  A rank
    below its tile, and what is special, is compiled for one GPU: what is masked and how wide the copies are does not
    depend on the GPU.
    """
    found, rows = [], set()
    for i, capability in enumerate(CAPABILITIES):
        for precision, (dtype, matmul) in SETTING.items():
            tiles, below = TILES[precision], BELOW[precision][i :: len(CAPABILITIES)]
            for T, r, layout in product((8, 500, 100_000), (*tiles, *below), FORWARD_AND_BACKWARD):
                job = Job(capability, precision, Problem(T, 4096, 14336, r, dtype, layout, matmul))
                row = job.row, T, layout, T > 8 and OWN.get(capability)
                if T > 8 if r in below else r == tiles[-1] or row not in rows:
                    found.append(job)
                rows.add(row)
        found.append(Job(capability, "half", Problem(500, 4096, 4096, 25, torch.float16)))
    special = [
        Problem(500, 4096, 4096, 64, out=True),
        Problem(500, 4096, 4096, 64, bias=True),
        Problem(100_000, 4096, 4096, 16, out=True),
        *(Problem(500, 4096, 4096, 12, layout=layout, padded=False) for layout in FORWARD_AND_BACKWARD),
    ]
    return found + [Job(CAPABILITIES[0], "half", problem) for problem in special]


def indexed_jobs() -> list[Job]:
    """Each row with an R of its own: in one launch and in three, the widest ranks of both; one below its tile."""
    grid = [(each, "half", *rank) for each in CAPABILITIES[:3] for rank in ((64, 100_000), (128, 8), (128, 100_000))]
    grid.append((CAPABILITIES[3], "half", 128, 100_000))  # by the instructions of the first
    few = [("half", 20, 8), ("half", 20, 1000), ("half", 20, 100_000), ("half", 64, 8), ("tf32", 64, 8)]
    grid += [(CAPABILITIES[0], *each) for each in (*few, ("tf32", 64, 100_000))]
    found = []
    for (capability, precision, r, T), layout in product(grid, FORWARD_AND_BACKWARD):
        dtype, matmul = SETTING[precision]
        found.append(Job(capability, precision, Problem(T, 4096, 14336, r, dtype, layout, matmul), indexed=True))
    return found


@pytest.mark.parametrize("job", jobs() + indexed_jobs(), ids=str)
def test_compiles_for_a_gpu_that_is_not_here(job):
    """No spilled registers, matrix instructions, no address in fewer than 64 bits, and copies of 16 bytes alone.

    Nothing is read by two bytes at a time, but for a bias and for a B that is not a layer's own and whose rank is no
    multiple of 16.  mix_kernel copies nothing in the background: most of its programs read one R.  A row of the table
    that understates its shared memory would be picked where it cannot run.
    """
    p, room = job.problem, config.shared_memory(job.capability)
    kernels = job.compiled()
    assert kernels
    for each in kernels:
        assert each.spilled <= SPILLED, each
        assert each.shared <= room, each
        assert not each.narrow, each
        assert {word for word, count in each.instructions.items() if count} & MATRIX, each
        assert set(each.copies) == (set() if each.kernel == "mix_kernel" else {128}) or not p.padded, each
    if not p.bias:
        assert any(each.short_reads for each in kernels) == (not p.padded), kernels
    names = [each.kernel for each in kernels]
    if job.indexed:
        three = ["shrink_kernel", "mix_kernel", "expand_mixed_kernel"]
        assert names == (["chain_indexed_kernel"] if p.T == 100_000 and p.r <= 64 else three)
        return
    assert max(each.shared for each in kernels) <= max(job.row.shared, SHARED), job.row
    if p.T == 100_000 and job.precision == "half" and job.capability in OWN:
        assert names == ["chain_kernel"] and kernels[0].instructions[OWN[job.capability]] > 0


def test_every_row_of_the_table_is_reached():
    """A row nobody picks is dead."""
    table, reached = config.committed_table(), {job.row for job in jobs()}
    for job in jobs():
        p = job.problem
        assert config.split(job.row.tiles, p.T, p.N, p.K, 132) == job.config
    layouts: dict[tuple, set[str]] = {}
    for row in table:
        layouts.setdefault((row.family, row.precision, row.rank, row.tokens), set()).add(row.layout)
    measured = {key for key, found in layouts.items() if found >= set(FORWARD_AND_BACKWARD)}
    for row in table:
        hidden = row.layout == "any" and (row.family, row.precision, row.rank, row.tokens) in measured
        assert row in reached or hidden, row
