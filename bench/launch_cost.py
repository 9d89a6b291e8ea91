"""How long the host takes to launch a Triton kernel: by Triton's own call, and by backends/triton/launcher.py.

    python bench/launch_cost.py --out bench/results/cpu

Needs no GPU: the launches go to tests/stubdriver, in the place of NVIDIA's driver, whose own time is left out so.
DIR/<date>-<commit>-launch.json holds microseconds of processor time for a call, the least of many rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import triton

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import stubdriver  # noqa: E402

from loraxs_kernels.backends import triton as backend  # noqa: E402
from loraxs_kernels.backends.triton import launcher  # noqa: E402
from loraxs_kernels.backends.triton.config import Config  # noqa: E402
from loraxs_kernels.bench import report  # noqa: E402

FORMAT = "loraxs-launch"
T, N, K, r = 64, 64, 64, 16  # as in `loraxs bench experiments`: nothing here depends on them
CALLS, ROUNDS = 300, 100
ONE, TWO = Config(64, 64, 64, 4, 3), Config(16, 64, 64, 4, 3, split_k=2, split_n=2)


def microseconds(call: Callable[[], object]) -> float:
    call()
    return round(min(timeit.repeat(call, number=CALLS, repeat=ROUNDS, timer=time.process_time)) / CALLS * 1e6, 2)


def measure(patch: pytest.MonkeyPatch) -> dict[str, float]:
    """{what: microseconds}."""
    x, A, B = (torch.randn(*shape).bfloat16() for shape in ((T, K), (r, K), (N, r)))
    R, z = torch.randn(r, r), torch.randn(T, r)
    operands = {
        "forward": (x, A, R, B, 0.5, None, None, None),
        "backward": (x, B.t(), R.t(), A.t(), 0.5, None, None, z),
    }
    found, arguments = {}, []
    launch = launcher.launch
    patch.setattr(launcher, "launch", lambda *given: arguments.append(given))
    backend.low_rank(ONE, *operands["forward"])
    patch.setattr(launcher, "launch", launch)
    for way, direct in {"direct": True, "by Triton": False}.items():
        patch.setattr(launcher, "direct", lambda direct=direct: direct)
        found[f"chain_kernel, {way}"] = microseconds(partial(launch, *arguments[0]))
        for launches, config in (("one launch", ONE), ("two launches", TWO)):
            for direction, o in operands.items():
                found[f"low_rank {direction}, {launches}, {way}"] = microseconds(partial(backend.low_rank, config, *o))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    arguments = parser.parse_args()
    head = report.head(FORMAT)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        stub = stubdriver.activate(patch, stubdriver.build(Path(folder)))
        stub.record(False)
        rows = [{"what": what, "microseconds": each} for what, each in measure(patch).items()]
    report.keep(head | {"triton": triton.__version__, "rows": rows}, arguments.out, "launch")


if __name__ == "__main__":
    main()
