"""What one thing costs, for each of four: each writes a report of its own, DIR/<date>-<commit>-<command>.json.

    python bench/costs.py build --out bench/results/cpu [--archs 80 90a]
    python bench/costs.py launch --out bench/results/cpu
    python bench/costs.py first-use --out bench/results/cpu [--backend triton]
    python bench/costs.py bank-store --out bench/results/cpu [--folder DIR]

build: compiling the CUDA core here, from nothing, for each of some architectures: seconds, seconds of processor time,
and the memory of the largest process.  Needs nvcc and what setup.py asks for (CMake, ninja, pybind11, CUTLASS).

launch: launching a Triton kernel, by Triton's own call and by backends/triton/launcher.py, in microseconds of processor
time for a call, the least of many rounds.  Needs no GPU: the launches go to tests/stubdriver, in the place of NVIDIA's
driver, whose own time is left out so.

first-use: the check of a backend at its first use (backends/first_use.py), in milliseconds, medians: `call` of a call
without the check, `first` of the first call of a case, and for a small layer `later`, what the check adds to every
later call; on a GPU also the bytes that a call takes beside its operands.  By default the torch backend, on a CPU, is
checked against itself.

bank-store: an adapter bank of records of 112 KiB (224 modules, r = 16, bf16), in microseconds a record: adding R by
module, one transaction each and all in one (mean); `read` of every name once, in random order, after the file was taken
out of the page cache ("cold": the system reads ahead, so that many of these are there already; see percentile_99) and
again ("warm"), medians; `verify` (mean).  And the bytes of data.mdb beside those of R alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import loraxs_kernels as lx  # noqa: E402
from loraxs_kernels import backends  # noqa: E402
from loraxs_kernels.backends import first_use as check  # noqa: E402
from loraxs_kernels.backends import torch as torch_backend  # noqa: E402
from loraxs_kernels.bench import BenchError, report, timer  # noqa: E402
from loraxs_kernels.bench.chain import Case  # noqa: E402
from loraxs_kernels.bench.compare import Row  # noqa: E402
from loraxs_kernels.bench.shapes import Shape  # noqa: E402

BUILD = "loraxs-build"
POINTS = [(1, 64, 64), (1, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096), (8192, 4096, 4096)]  # T, N, K; r = 16
CALLS, ROUNDS = 300, 100  # of launch: calls in a round, and rounds
MANY, TIMES = 2000, 7  # of first-use: calls of a small layer that are timed in a row, and times
MODULES, RANK, RECORDS = 224, 16, 2000


def build(arguments: argparse.Namespace) -> Row:  # like the others: what the report has beside its head
    """Each build in a copy of the sources."""
    rows = []
    for archs in arguments.archs:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "results", "_core.*"))
            environ = os.environ | {"LORAXS_BUILD_CUDA": "1", "LORAXS_CUDA_ARCHS": archs}
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=environ, check=True)
            seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
            record = json.loads((tree / "loraxs_kernels" / "_build.json").read_text())
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row = {"architectures": ";".join(record["architectures"]), "seconds": round(seconds, 1)}
        rows.append(row | {"processor_seconds": round(processor, 1), "largest_bytes": 1024 * after.ru_maxrss})
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    return {"nvcc": record["nvcc"], "cutlass": record["cutlass"], "jobs": jobs, "rows": rows}


def launch(arguments: argparse.Namespace) -> Row:
    import pytest
    import stubdriver
    import triton

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        stub = stubdriver.activate(patch, stubdriver.build(Path(folder)))
        stub.record(False)
        rows = [{"what": what, "microseconds": each} for what, each in launches(patch.setattr)]
    return {"triton": triton.__version__, "rows": rows}


def launches(patch: Callable[..., None]) -> Iterator[tuple[str, float]]:
    """(what, microseconds) of a kernel, and of the primitive forward and backward, launched both ways."""
    from loraxs_kernels.backends import triton as backend
    from loraxs_kernels.backends.triton import launcher
    from loraxs_kernels.backends.triton.config import Config

    def microseconds(call: Callable[[], object]) -> float:
        call()
        return round(min(timeit.repeat(call, number=CALLS, repeat=ROUNDS, timer=time.process_time)) / CALLS * 1e6, 2)

    cases = {}
    for way in ("forward", "backward"):  # nothing here depends on the sizes
        x, _, *others = Case(Shape(64, 64), 64, 16, way, torch.bfloat16, torch.device("cpu")).sets[0]
        cases[way] = (x, *others)  # without W
    one, two = Config(64, 64, 64, 4, 3), Config(16, 64, 64, 4, 3, split_k=2, split_n=2)
    arguments, real = [], launcher.launch
    patch(launcher, "launch", lambda *given: arguments.append(given))
    backend.low_rank(one, *cases["forward"])
    patch(launcher, "launch", real)
    for way, direct in {"direct": True, "by Triton": False}.items():
        patch(launcher, "direct", lambda direct=direct: direct)
        yield f"chain_kernel, {way}", microseconds(partial(real, *arguments[0]))
        for many, config in (("one launch", one), ("two launches", two)):
            for direction, each in cases.items():
                call = partial(backend.low_rank, config, *each)
                yield f"low_rank {direction}, {many}, {way}", microseconds(call)


def first_use(arguments: argparse.Namespace) -> Row:
    points = [point for point in POINTS if arguments.device == "cuda" or point[0] <= 512]
    rows = [checked(arguments.backend, torch.device(arguments.device), *point) for point in points]
    return {"backend": arguments.backend, "unit": "ms", "rows": rows}


@torch.no_grad()
def checked(name: str, device: torch.device, T: int, N: int, K: int) -> Row:
    """A call of the primitive with and without the check."""
    operands = Case(Shape(N, K), T, 16, "forward", torch.bfloat16, device, weight=True).sets[0]

    def anew() -> Callable[[], Any]:
        """With the check, as in a new process."""
        found = check.Checked(name, "forward")
        if name == "torch":
            found.backend = SimpleNamespace(lowrank_linear=torch_backend.lowrank_linear, plan=lambda x, A, B: "torch")
        return partial(found, *operands)

    def milliseconds(calls: list[Callable]) -> float:
        return round(1e3 * statistics.median(map(timer.once, calls)), 4)

    plain, known = partial(backends.primitive(name), *operands), anew()
    many = MANY if N <= 64 else 1
    for call in (plain, known):
        call()
    if list(known.func.right.values()) != [True]:
        raise BenchError(f"backend: {name!r} was not checked at T {T}, {N} x {K}, or is wrong")
    calls = (partial(timeit.timeit, each, number=many) for each in (plain, known))
    without, later = (milliseconds([call] * TIMES) / many for call in calls)
    row: Row = {"T": T, "N": N, "K": K, "r": 16, "dtype": "bf16", "call": without}
    row |= {"later": later - without} if many > 1 else {}
    row["first"] = milliseconds([anew() for _ in range(TIMES)])
    if device.type == "cuda":
        row |= {"call_bytes": timer.peak(plain, device)[1], "first_bytes": timer.peak(anew(), device)[1]}
    return row


def bank_store(arguments: argparse.Namespace) -> Row:
    import lmdb

    head = {"lmdb": ".".join(map(str, lmdb.version())), "py-lmdb": lmdb.__version__, "records": RECORDS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return head | {"rows": list(banks(Path(folder)))}


def banks(folder: Path) -> Iterator[Row]:
    linears = nn.Sequential(*(nn.Linear(32, 32) for _ in range(MODULES)))
    model = lx.attach(linears, RANK, target_modules="all-linear", progress=False)
    R = {str(i): torch.randn(RANK, RANK) for i in range(MODULES)}
    names = [f"user{i:06}" for i in range(RECORDS)]

    def microseconds(call: Callable[[], Any]) -> float:
        return round(1e6 * timeit.timeit(call, number=1) / RECORDS, 1)

    def verify(bank: lx.AdapterBank) -> None:
        if wrong := bank.verify():
            raise BenchError(f"the bank has damaged records: {', '.join(wrong)}")

    adding = {
        "a transaction each": lambda bank: [bank.add(name, R) for name in names],
        "one transaction": lambda bank: bank.add_many((name, R) for name in names),
    }
    for how, add in adding.items():
        with lx.AdapterBank.create(folder / how, model, dtype=torch.bfloat16) as bank:
            yield {"what": f"add, {how}", "microseconds": microseconds(partial(add, bank))}
            size = bank.size * bank.dtype.itemsize
        data = folder / how / "data.mdb"
        yield {"what": f"size, {how}", "bytes": data.stat().st_size, "of_R": size * RECORDS}
        random.Random(0).shuffle(names)
        with open(data, "rb") as f:  # no process has it mapped: it leaves the page cache
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with lx.AdapterBank(folder / how) as bank:
            out = torch.empty(bank.size)
            for cache in ("cold", "warm"):
                took = [1e6 * timeit.timeit(partial(bank.read, name, out), number=1) for name in names]
                median, tail = statistics.median(took), statistics.quantiles(took, n=100)[98]
                row = {"what": f"read, {cache}, after {how}", "microseconds": round(median, 1)}
                yield row | {"percentile_99": round(tail, 1)}
            yield {"what": "verify", "microseconds": microseconds(partial(verify, bank))}


COSTS = {"build": build, "launch": launch, "first-use": first_use, "bank-store": bank_store}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="cost", required=True)
    add = {name: commands.add_parser(name).add_argument for name in COSTS}
    for argument in add.values():
        argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    add["build"]("--archs", nargs="+", default=["80", "90a"], help="as in LORAXS_CUDA_ARCHS, each a build")
    add["first-use"]("--backend", default="torch", choices=backends.NAMES, help="torch: on a CPU")
    add["bank-store"]("--folder", type=Path, help="where the banks are made; default: the system's temporary folder")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out: {arguments.out} is a file, must be a folder or not there")
    arguments.device = "cpu" if vars(arguments).get("backend", "torch") == "torch" else "cuda"
    head = report.head(f"loraxs-{arguments.cost}", device=arguments.device)
    report.keep(head | COSTS[arguments.cost](arguments), arguments.out, arguments.cost)


if __name__ == "__main__":
    main()
