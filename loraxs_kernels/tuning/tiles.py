"""Which tiles the Triton kernels run fastest with: the end of `loraxs tune` (run.py), and the committed table of them.

For each layout, rank and number of rows: begin with the tiles of the committed table, change one of their sizes at a
time, and keep what is fastest over the shapes of a model.  What is timed is the chain without W, from CUDA graphs, on
operands rotated past the L2 cache.  What does not compile, does not fit or is not right is left out; of the rest the
fastest that spills no register is taken.

In a checkout, this works on the committed table, loraxs_kernels/backends/triton/configs.json; it needs no GPU:

    python -m loraxs_kernels.tuning.tiles             compile its rows that were not measured, note their shared memory
    python -m loraxs_kernels.tuning.tiles FILE ...    and take over the tiles that `loraxs tune --out FILE` has found

Tiles that were not measured were counted on paper and are changed by hand in that file.  For few rows: the least that a
matrix instruction takes, and enough columns of x that a thread copies 16 bytes of them.  For more: as many rows as
registers hold without spilling, since each block of rows reads A and B anew, while the blocks fill a GPU; and stages
that keep the memory busy.  At T = 8192, N = K = 4096 and r = 128 these are 0.27 GB of reads of the L2 cache with 64
rows a block, 1.07 GB with 16.  Up to r = 32 they are few beside x.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backends import tuned
from ..backends.device import facts
from ..backends.triton import config, low_rank
from ..backends.triton.config import Config, Device, Row
from ..bench import BenchError, timer
from ..bench.chain import Case
from ..bench.shapes import Shape
from ..files import write_atomically

# From how many rows of x on a row of the table is meant, and with how many it is timed.
TYPICAL = {1: 32, 257: 512, 2049: 8192, 16385: 32768}
LAYOUTS = ("forward", "backward")
SECONDS = 0.02  # for each size tried
OPTIONS = {
    "block_t": (16, 32, 64, 128),
    "block_k": (32, 64, 128),
    "block_n": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]  # one of each generation of GPUs
SETTING = {"half": (torch.bfloat16, "highest"), "tf32": (torch.float32, "high")}


class Spills(RuntimeError):
    """A kernel needs more registers than there are."""


def can_be_measured() -> bool:
    """Whether this Triton can compile ahead of time, as `shared` needs it."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def measured(
    shapes: Iterable[Shape],
    rank: int,
    tokens: int,
    layout: str,
    device: torch.device,
    enough: Callable[[], bool] = lambda: False,
) -> Row:
    """The row of this GPU, in half precision (timed in bf16), for a padded rank, from so many rows on.

    Once `enough` says so, no more tiles are tried, and the best of those that were is taken.
    """
    gpu = facts(device)
    cases = [(shape.count, Case(shape, TYPICAL[tokens], rank, layout, torch.bfloat16, device)) for shape in shapes]

    def cost(tiles: Config) -> float:
        return math.inf if enough() else sum(count * time(case, tiles, gpu) for count, case in cases)

    start = config.pick_row(config.committed_table(), tokens, rank, "half", layout, gpu)
    if start is None:
        raise BenchError(f"no committed tiles to begin with for rank {rank}, {tokens} rows, {layout}")
    times = search(start.tiles, cost)
    for tiles in sorted(times, key=times.__getitem__):
        row = Row(config.family(gpu.capability), "half", layout, rank, tokens, tiles, 0, source(device))
        with suppress(Spills):
            return row._replace(shared=shared(row, [gpu.capability], [layout]))
    raise BenchError(f"no tiles run without spilling for rank {rank}, {tokens} rows, {layout}")


def search(tiles: Config, cost: Callable[[Config], float]) -> dict[Config, float]:
    """{tiles: seconds} of those that ran: one size is changed at a time, the best kept, until no change helps."""
    times, before = {tiles: cost(tiles)}, None
    while tiles != before:
        before = tiles
        for name, options in OPTIONS.items():
            others = [dataclasses.replace(tiles, **{name: option}) for option in options]
            times |= {other: cost(other) for other in others if other not in times}
            tiles = min(times, key=times.__getitem__)
    return {each: t for each, t in times.items() if t < math.inf}


def time(case: Case, tiles: Config, gpu: Device) -> float:
    """Seconds of one call; infinite where the tiles do not run or are wrong."""
    x, _, A, _, B, *_ = case.sets[0]
    cut = config.split(tiles, x.shape[0], B.shape[0], A.shape[1], gpu.multiprocessors)

    def chain(x: Tensor, W: None, *more: Any) -> tuple:
        return low_rank(cut, x, *more)

    try:
        candidate = case.candidate(chain)
        if candidate.wrong:
            return math.inf
        each = candidate.ready(case.device, "graph" if case.device.type == "cuda" else "eager")
        return timer.interleave({"": each}, case.device, SECONDS)[""].median().item()
    except Exception:  # does not compile, or does not fit: others will
        timer.synchronize()  # raises where the device itself is lost
        return math.inf


def shared(row: Row, capabilities: Iterable[tuple[int, int]], layouts: Iterable[str]) -> int:
    """The largest shared memory of a row's kernels, compiled for these GPUs; Spills where one needs more registers.

    For the padded rank, the next multiple of 4 below it, and sizes that are multiples of nothing: these cannot be
    copied to shared memory in the background, and may spill a little, as no model has them.
    """
    from ..backends.triton.aot import Problem, compile_problem

    (dtype, matmul), found = SETTING[row.precision], []
    sizes = [(4096, 4096, row.rank), (4096, 4096, row.rank - 4), (997, 1001, row.rank - 3)]
    for capability, layout, programs, (N, K, r) in itertools.product(capabilities, layouts, (1, 4), sizes):
        cut = dataclasses.replace(row.tiles, split_k=programs, split_n=programs)
        for each in compile_problem(Problem(1024, N, K, r, dtype, layout, matmul), capability, cut):
            if each.spilled and N == 4096:
                raise Spills(f"{row}: {each.kernel} spills {each.spilled} bytes on {capability} for rank {r}")
            found.append(each.shared)
    return max(found)


def source(device: torch.device) -> str:
    """What a row says of where it comes from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return f"measured on {name}, {datetime.now(timezone.utc):%Y-%m-%d}"


def merged(new: Iterable[Row], old: Iterable[Row]) -> list[Row]:
    """The new rows, and the old ones that they do not replace, in that order."""
    new = list(new)
    keys = {row[:5] for row in new}
    return [*new, *(row for row in old if row[:5] not in keys)]


def compiled(rows: Sequence[Row]) -> list[Row]:
    """The rows with the shared memory that they need, each compiled for all GPUs that pick it.  Raises Spills."""
    rows = [row._replace(shared=0) for row in rows]

    def pickers(row: Row) -> list[tuple[int, int]]:
        wanted = (rows, row.tokens, row.rank, row.precision, "forward")
        return [each for each in CAPABILITIES if config.pick_row(*wanted, Device(each, 1)) is row]

    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = pool.map(shared, rows, map(pickers, rows), itertools.repeat(LAYOUTS))
        sizes = tqdm(found, total=len(rows), desc="compiling", unit="row")
        return [row._replace(shared=size) for row, size in zip(rows, sizes, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, metavar="FILE")
    new = [config.parse(entry) for path in parser.parse_args(argv).tables for entry in tuned.read(path)["tiles"]]
    old = config.read(config.TABLE)
    measured = [row for row in old if row.source.startswith("measured")]
    counted = compiled([row for row in old if row not in measured])
    write_atomically(config.TABLE, config.text([*merged(new, measured), *counted]).encode())


if __name__ == "__main__":
    main()
