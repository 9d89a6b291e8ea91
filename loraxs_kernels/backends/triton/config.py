"""How a kernel is cut for a problem: data, looked up by a pure function.

configs.json holds tiles by family of matrix instructions, precision, layout, padded rank and number of rows;
`pick_config` adds how many programs share K and N, from the number of rows and of multiprocessors.  bench/tune.py makes
the table; `loraxs tune` makes one of the user's own (../tuned.py), whose rows go before it.  Nothing here needs Triton
or a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import tuned
from ..device import Device

TABLE = Path(__file__).with_name("configs.json")
# By precision, the largest padded rank whose chain stays on chip, in tiles that do not read A and B too often.
WIDEST = {"half": 128, "tf32": 64, "ieee": 0}
_NEW_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")
MOST = 32  # parts of z at most: every program of the expand reads them all


@dataclass(frozen=True)
class Config:
    """Tiles, warps and pipeline stages of a launch, and how many programs share K (shrink) and N (expand).

    Where both are 1 the whole chain is one launch, a program for each block of rows.
    """

    block_t: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    split_n: int = 1

    @property
    def one_launch(self) -> bool:
        return self.split_k == self.split_n == 1


class Row(NamedTuple):
    """A row of the table: for which problems, which tiles, and where they come from."""

    family: str
    precision: str
    layout: str  # "forward", "backward" or "any"
    rank: int  # padded
    tokens: int  # this many or more, up to the next such row
    tiles: Config
    shared: int  # bytes of shared memory that the largest of its kernels uses, as compiled (bench/tune.py)
    source: str

    def fits(self, precision: str, layout: str, rank: int, T: int, device: Device) -> bool:
        """Whether it may be picked: it is for such a problem, and the GPU has the memory."""
        return (
            (self.precision, self.rank) == (precision, rank)
            and self.family in (family(device.capability), "mma")
            and self.layout in (layout, "any")
            and self.tokens <= T
            and self.shared <= shared_memory(device.capability)
        )


def pick_config(T: int, N: int, K: int, r: int, dtype: torch.dtype, layout: str, device: Device) -> Config | None:
    """The launch for x (T, K), A (r, K), B (N, r); None: a rank past WIDEST, or fp32 without TF32 instructions.

    layout: "forward" where A lies as stored, "backward" where it is B^T.  Of the rows that fit, in the user's table or
    else in the committed one, those of the GPU's own family go before those of "mma", which every GPU has, and then the
    one for the most rows.  The same arguments and tables give the same answer, always.
    """
    which, rank = precision(dtype), padded(r)
    return _pick(T, N, K, rank, which, layout, device) if rank <= WIDEST[which] else None


@lru_cache(maxsize=4096)
def _pick(T: int, N: int, K: int, rank: int, which: str, layout: str, device: Device) -> Config:
    row = pick_row(tuned.rows(device, "tiles", parse), T, rank, which, layout, device)
    row = row or pick_row(committed_table(), T, rank, which, layout, device)
    assert row is not None, (T, rank, which, layout, device)  # tests/test_triton_config.py: something always fits
    return split(row.tiles, T, N, K, device.multiprocessors)


def pick_row(table: Iterable[Row], T: int, rank: int, precision: str, layout: str, device: Device) -> Row | None:
    """The row of one table for a padded rank; None where none fits."""
    rows = [row for row in table if row.fits(precision, layout, rank, T, device)]
    return max(rows, key=lambda row: (row.family != "mma", row.tokens), default=None)


def split(tiles: Config, T: int, N: int, K: int, multiprocessors: int) -> Config:
    """Share K and N among as many programs as fill the chip, each with two tiles of K and one of N at least."""
    free = multiprocessors // -(-T // tiles.block_t)
    if free < 2:
        return tiles
    split_k, split_n = -(-K // (2 * tiles.block_k)), -(-N // tiles.block_n)
    return dataclasses.replace(tiles, split_k=min(free, split_k, MOST), split_n=min(free, split_n))


def family(capability: tuple[int, int]) -> str:
    """Which matrix instructions a GPU has, which decides what stays in registers: "wgmma", "tcgen05" or "mma"."""
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(capability[0], "mma")


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may use; of an unknown GPU, what all have."""
    large = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
    return 1024 * large.get(capability, 99)


def precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: "half" ones; fp32 ones by "tf32" instructions, where torch may; or "ieee": by none.

    Torch may where torch.set_float32_matmul_precision says so, or torch.backends.cuda.matmul.fp32_precision, which
    newer versions have and which follows both.
    """
    if dtype is not torch.float32:
        return "half"
    if _NEW_PRECISION:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def padded(r: int) -> int:
    """The width of a tile for rank r: a power of two, at least 16."""
    return max(16, 1 << (r - 1).bit_length())


@lru_cache(maxsize=1)
def committed_table() -> tuple[Row, ...]:
    return read(TABLE)


def forget() -> None:
    """The user's table has changed."""
    _pick.cache_clear()


def read(path: Path) -> tuple[Row, ...]:
    """The rows of the committed table; ValueError that names the file where it is not one."""
    try:
        return tuple(map(parse, json.loads(path.read_text())["rows"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a table of configurations ({error})") from error


def parse(entry: dict[str, Any]) -> Row:
    """A row as it stands in a file; ValueError, TypeError or KeyError where it cannot be one."""
    row = Row(**entry | {"tiles": Config(**entry["tiles"])})
    numbers = dataclasses.astuple(row.tiles)
    sizes = (*numbers[:4], row.rank)  # which Triton wants to be powers of two
    if not (
        all(type(n) is int and n > 0 for n in (*numbers, row.rank, row.tokens))
        and all(n & (n - 1) == 0 for n in sizes)
        and type(row.shared) is int
        and row.precision in WIDEST
        and row.layout in ("forward", "backward", "any")
    ):
        raise ValueError(f"got {entry}")
    return row


def plain(row: Row) -> dict[str, Any]:
    """A row as it stands in a file."""
    tiles = {name: value for name, value in dataclasses.asdict(row.tiles).items() if not name.startswith("split")}
    return row._asdict() | {"tiles": tiles}


def text(rows: Iterable[Row]) -> str:
    """The committed table as JSON, a row a line."""
    return tuned.dumps({}, {"rows": [plain(row) for row in rows]})
