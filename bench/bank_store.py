"""How fast an adapter bank writes and reads records of 112 KiB (224 modules, r = 16, bf16), and how large it is.

    python bench/bank_store.py --out bench/results/cpu

DIR/<date>-<commit>-bank-store.json holds, in microseconds a record: adding R by module, one transaction each and all in
one (mean); `read` of every name once, in random order, after the file was taken out of the page cache ("cold": the
system reads ahead, so that many of these are there already; see percentile_99) and again ("warm"), medians; `verify`
(mean).  And the bytes of data.mdb beside those of R alone.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import loraxs_kernels as lx  # noqa: E402
from loraxs_kernels.bench import report  # noqa: E402

FORMAT = "loraxs-bank-store"
MODULES, RANK, RECORDS = 224, 16, 2000


def reads(bank: lx.AdapterBank, names: list[str], out: torch.Tensor) -> dict[str, float]:
    """Microseconds of each read."""
    took = []
    for name in names:
        began = time.perf_counter()
        bank.read(name, out)
        took.append((time.perf_counter() - began) * 1e6)
    tail = statistics.quantiles(took, n=100)[98]
    return {"microseconds": round(statistics.median(took), 1), "percentile_99": round(tail, 1)}


def forget(path: Path) -> None:
    """Take a file that nobody has mapped out of the page cache."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path) -> list[dict[str, Any]]:
    model = lx.attach(
        nn.Sequential(*(nn.Linear(32, 32) for _ in range(MODULES))), RANK, target_modules="all-linear", progress=False
    )
    R = {str(i): torch.randn(RANK, RANK) for i in range(MODULES)}
    names = [f"user{i:06}" for i in range(RECORDS)]
    rows = []
    for how in ("a transaction each", "one transaction"):
        with lx.AdapterBank.create(folder / how, model, dtype=torch.bfloat16) as bank:
            began = time.perf_counter()
            if how == "one transaction":
                bank.add_many((name, R) for name in names)
            else:
                for name in names:
                    bank.add(name, R)
            took = (time.perf_counter() - began) / RECORDS * 1e6
            rows.append({"what": f"add, {how}", "microseconds": round(took, 1)})
            size = bank.size * bank.dtype.itemsize
        data = folder / how / "data.mdb"
        rows.append({"what": f"size, {how}", "bytes": data.stat().st_size, "of_R": size * RECORDS})
        random.Random(0).shuffle(names)
        forget(data)
        with lx.AdapterBank(folder / how) as bank:
            out = torch.empty(bank.size)
            for cache in ("cold", "warm"):
                rows.append({"what": f"read, {cache}, after {how}", **reads(bank, names, out)})
            began = time.perf_counter()
            assert not bank.verify()
            rows.append({"what": "verify", "microseconds": round((time.perf_counter() - began) / RECORDS * 1e6, 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--folder", type=Path, help="where the banks are made; default: the system's temporary folder")
    arguments = parser.parse_args()
    import lmdb

    head = report.head(FORMAT)
    head |= {"lmdb": ".".join(map(str, lmdb.version())), "py-lmdb": lmdb.__version__}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder))
    report.keep(head | {"records": RECORDS, "rows": rows}, arguments.out, "bank-store")


if __name__ == "__main__":
    main()
