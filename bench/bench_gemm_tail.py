"""What does u B^T cost beside x W^T: in the library's GEMMs, and as a tail of the base GEMM's own sum?

python bench/bench_gemm_tail.py [options]     what `loraxs bench gemm [options]` does
pytest bench/ --benchmark-only                one point, as a pytest-benchmark group
"""

import sys

import pytest
import torch

from loraxs_kernels import backends
from loraxs_kernels.bench import gemm, timer
from loraxs_kernels.bench.shapes import Shape
from loraxs_kernels.cli import main


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("path", gemm.PATHS)
def test_gemm_tail(benchmark, path, direction):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if path in gemm.TILES and (reason := backends.unavailable("cuda") or gemm.missing(dtype, device)):
        pytest.skip(reason)
    case = gemm.Case(Shape(1024, 1024), 64, 16, direction, dtype, device)
    assert not case.wrong(gemm.PATHS[path])
    each = case.prepare(gemm.PATHS[path])
    benchmark.group = f"gemm, T 64, 1024 x 1024, r 16, {direction}"
    benchmark(lambda: (each.run(), timer.synchronize()))


if __name__ == "__main__":
    sys.exit(main(["bench", "gemm", *sys.argv[1:]]))
