"""How long the CUDA core takes to compile here, from nothing, for each of some architectures.

    python bench/build_time.py --out bench/results/cpu [--archs 80 90a]

Needs nvcc and what setup.py asks for (CMake, ninja, pybind11, CUTLASS).  DIR/<date>-<commit>-build.json holds seconds,
seconds of processor time, and the memory of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from loraxs_kernels.bench import report  # noqa: E402

FORMAT = "loraxs-build"


def measure(archs: str) -> tuple[dict, dict]:
    """One build in a copy of the sources: (its row, the record it leaves)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "results", "_core.*"))
        environ = os.environ | {"LORAXS_BUILD_CUDA": "1", "LORAXS_CUDA_ARCHS": archs}
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=environ, check=True)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads((tree / "loraxs_kernels" / "_build.json").read_text())
    row = {
        "architectures": ";".join(record["architectures"]),
        "seconds": round(seconds, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "largest_bytes": 1024 * after.ru_maxrss,
    }
    return row, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--archs", nargs="+", default=["80", "90a"], help="as in LORAXS_CUDA_ARCHS, each a build")
    arguments = parser.parse_args()
    head = report.head(FORMAT)
    measured = [measure(archs) for archs in arguments.archs]
    record = measured[-1][1]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    head |= {"nvcc": record["nvcc"], "cutlass": record["cutlass"], "jobs": jobs}
    report.keep(head | {"rows": [row for row, _ in measured]}, arguments.out, "build")


if __name__ == "__main__":
    main()
