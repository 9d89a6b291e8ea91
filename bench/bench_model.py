"""What does a whole training step cost?

python bench/bench_model.py [options]     what `loraxs bench model [options]` does
pytest bench/ --benchmark-only            one tiny model, as a pytest-benchmark group
"""

import sys

import pytest

from loraxs_kernels.bench import model, settings, timer
from loraxs_kernels.cli import main


@pytest.mark.benchmark(group="model, tiny, r 16: one step")
@pytest.mark.parametrize("path", ["frozen", "reference-fp32", "reference", "peft-lora", "torch"])
def test_model(benchmark, path):
    pytest.importorskip("transformers")
    if path == "peft-lora":
        pytest.importorskip("peft")
    request = settings.check(["model"], model="tiny")
    with model.adapted(model.build(request), path, 16, checkpointing=False) as adapted:
        step = model.Trainer(adapted, request).step
        benchmark(lambda: (step(), timer.synchronize()))


if __name__ == "__main__":
    sys.exit(main(["bench", "model", *sys.argv[1:]]))
