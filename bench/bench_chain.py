"""How near does x -> A -> R -> B, without W, come to the memory's speed?

python bench/bench_chain.py [options]     what `loraxs bench chain [options]` does
pytest bench/ --benchmark-only            one point, as a pytest-benchmark group
"""

import sys

import pytest
import torch

from loraxs_kernels import backends
from loraxs_kernels.bench import timer
from loraxs_kernels.bench.chain import PATHS, Case
from loraxs_kernels.bench.shapes import Shape
from loraxs_kernels.cli import main


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("path", PATHS)
def test_chain(benchmark, path, direction):
    if path in backends.NAMES and (reason := backends.unavailable(path)):
        pytest.skip(reason)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = Case(Shape(1024, 1024), 64, 16, direction, dtype, device)
    chain = PATHS[path]()
    assert not case.wrong(chain)
    each = case.prepare(chain)
    benchmark.group = f"chain, T 64, 1024 x 1024, r 16, {direction}"
    benchmark(lambda: (each.run(), timer.synchronize()))


if __name__ == "__main__":
    sys.exit(main(["bench", "chain", *sys.argv[1:]]))
