"""`pytest bench/ --benchmark-only`: the questions of `loraxs bench`, a small point each, as pytest-benchmark groups."""

from __future__ import annotations

import pytest

from loraxs_kernels.bench import layer, settings, timer


@pytest.fixture
def time_layer(benchmark):
    """Time one path of a layer, once it is found right."""

    def run(name: str, N: int, K: int, T: int, r: int) -> None:
        request = settings.check()
        sets = layer.operands(request, settings.Shape(N, K), T, r)
        layers, facts = layer.build(name, sets, request)
        assert not facts["wrong"]
        each = layer.ready(name, layers, sets, request)
        benchmark.group = f"{benchmark.group or benchmark.name.partition('[')[0]} {request.dtype_name}"
        with each.within():
            benchmark(lambda: (each.run(), timer.synchronize()))

    return run
