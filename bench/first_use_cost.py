"""What the check of a backend at its first use costs: backends/first_use.py.

    python bench/first_use_cost.py --out bench/results/cpu                                    on a CPU
    python bench/first_use_cost.py --backend triton --out bench/results/<device>              on a GPU

On a CPU, where no other backend runs, the torch backend is checked against itself.  DIR/<date>-<commit>-first-use.json
has milliseconds, medians: `call` of a call without the check, `first` of the first call of a case, and for a small
layer `later`, what the check adds to every later call; on a GPU also the bytes that a call takes beside its operands.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from loraxs_kernels import backends  # noqa: E402
from loraxs_kernels.backends import first_use  # noqa: E402
from loraxs_kernels.backends import torch as torch_backend  # noqa: E402
from loraxs_kernels.bench import report, timer  # noqa: E402
from loraxs_kernels.bench.chain import Case  # noqa: E402
from loraxs_kernels.bench.shapes import Shape  # noqa: E402

FORMAT = "loraxs-first-use"
POINTS = [(1, 64, 64), (1, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096), (8192, 4096, 4096)]  # T, N, K; r = 16
TIMES = 7


def checked(name: str) -> first_use.Checked:
    """The check as in a new process."""
    if name != "torch":
        return first_use.Checked(name, "forward")
    found = first_use.Checked("torch", "forward")
    found.backend = SimpleNamespace(lowrank_linear=torch_backend.lowrank_linear, plan=lambda x, A, B: "torch")
    return found


def milliseconds(calls: list[Any]) -> float:
    return round(1e3 * statistics.median(map(timer.once, calls)), 4)


def measure(name: str, device: torch.device, T: int, N: int, K: int) -> dict[str, Any]:
    case = Case(Shape(N, K), T, 16, "forward", torch.bfloat16, device, weight=True)
    operands = case.sets[0]
    plain, known = partial(backends.primitive(name), *operands), partial(checked(name), *operands)
    row: dict[str, Any] = {"T": T, "N": N, "K": K, "r": 16, "dtype": "bf16"}
    many = 2000 if N <= 64 else 1  # a small call is timed many times in a row

    def repeated(call: Any) -> None:
        for _ in range(many):
            call()

    for call in (plain, known):
        call()
    assert list(known.func.right.values()) == [True], "not checked, or wrong"
    row["call"] = milliseconds([partial(repeated, plain)] * TIMES) / many
    if many > 1:
        row["later"] = milliseconds([partial(repeated, known)] * TIMES) / many - row["call"]
    row["first"] = milliseconds([partial(checked(name), *operands) for _ in range(TIMES)])
    if device.type == "cuda":
        for what, call in (("call_bytes", plain), ("first_bytes", partial(checked(name), *operands))):
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            row[what] = torch.cuda.max_memory_allocated(device) - held
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--backend", default="torch", choices=backends.NAMES, help="torch: on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.backend == "torch" else "cuda")
    points = [point for point in POINTS if device.type == "cuda" or point[0] <= 512]
    head = report.head(FORMAT, device=device)
    with torch.no_grad():
        rows = [measure(arguments.backend, device, *point) for point in points]
    report.keep(head | {"backend": arguments.backend, "unit": "ms", "rows": rows}, arguments.out, "first-use")


if __name__ == "__main__":
    main()
