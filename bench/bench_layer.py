"""What does the adapter cost next to its frozen linear?

python bench/bench_layer.py [options]     what `loraxs bench layer [options]` does
pytest bench/ --benchmark-only            one point, as a pytest-benchmark group
"""

import sys

import pytest

from loraxs_kernels.bench import settings
from loraxs_kernels.cli import main


@pytest.mark.benchmark(group="layer, T 64, 1024 x 1024, r 16: forward + backward")
@pytest.mark.parametrize("path", settings.check().paths)
def test_layer(time_layer, path):
    time_layer(path, 1024, 1024, T=64, r=16)


if __name__ == "__main__":
    sys.exit(main(["bench", "layer", *sys.argv[1:]]))
