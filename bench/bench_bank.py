"""What do many adapters in one batch cost beside one?

python bench/bench_bank.py [options]      what `loraxs bench bank [options]` does
pytest bench/ --benchmark-only            one point, as a pytest-benchmark group
"""

import sys

import pytest

from loraxs_kernels.bench import bank, paths, settings, timer
from loraxs_kernels.cli import main


@pytest.mark.parametrize("path", bank.PATHS)
def test_bank(benchmark, path):
    if path == "peft":
        pytest.importorskip("peft")
    request = settings.check()
    which, build, _ = bank.PATHS[path]
    index, ((o, Rs), *_) = bank.mix(which, 16), bank.operands(request, settings.Shape(1024, 1024), 16, 16)
    layer = build(o, Rs, index)
    assert not bank.wrong(layer, o, bank.expected(o, Rs, index, path in bank.APART))
    each = timer.prepare(lambda: paths.calls([layer], [o], "forward"), request.device)
    benchmark.group = f"16 rows, 1024 x 1024, r 16, {request.dtype_name}: forward"
    benchmark(lambda: (each.run(), timer.synchronize()))


if __name__ == "__main__":
    sys.exit(main(["bench", "bank", *sys.argv[1:]]))
