"""What does a call cost the host?

python bench/bench_host.py [options]      what `loraxs bench host [options]` does
pytest bench/ --benchmark-only            one point, as a pytest-benchmark group
"""

import sys

import pytest

from loraxs_kernels.bench import host, settings
from loraxs_kernels.cli import main


@pytest.mark.benchmark(group="host, one token, r 16: forward + backward")
@pytest.mark.parametrize("path", [*settings.check().paths, "operator"])
def test_host(time_layer, path):
    time_layer(path, host.SHAPE.N, host.SHAPE.K, T=host.TOKENS, r=16)


if __name__ == "__main__":
    sys.exit(main(["bench", "host", *sys.argv[1:]]))
