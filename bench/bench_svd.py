"""How long do the factors take, and how exact are they?

python bench/bench_svd.py [options]       what `loraxs bench svd [options]` does
pytest bench/ --benchmark-only            one point, as a pytest-benchmark group
"""

import sys

import pytest

from loraxs_kernels.bench import settings, svd, timer
from loraxs_kernels.cli import main


@pytest.mark.benchmark(group="svd, 512 x 512, r 16")
@pytest.mark.parametrize("method", settings.check(["svd"]).svd_paths)
def test_svd(benchmark, method):
    W = svd.weight(settings.Shape(512, 512), settings.check())
    benchmark(lambda: (svd.METHODS[method].run(W, 16), timer.synchronize()))


if __name__ == "__main__":
    sys.exit(main(["bench", "svd", *sys.argv[1:]]))
