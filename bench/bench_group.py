"""What do layers that share their input gain from one read of it?

python bench/bench_group.py [options]     what `loraxs bench group [options]` does
pytest bench/ --benchmark-only            one point, as a pytest-benchmark group
"""

import sys

import pytest

from loraxs_kernels.bench import group, settings, timer
from loraxs_kernels.bench.shapes import Shape
from loraxs_kernels.cli import main


@pytest.mark.benchmark(group="group, T 64, three of 1024 x 1024, r 16: forward + backward")
@pytest.mark.parametrize("path", group.PATHS)
def test_group(benchmark, path):
    (operands, *_) = group.operands(settings.check(), (Shape(1024, 1024),) * 3, T=64, r=16)
    assert not group.wrong(*operands)
    benchmark(lambda: (group.step(path, *operands), timer.synchronize()))


if __name__ == "__main__":
    sys.exit(main(["bench", "group", *sys.argv[1:]]))
