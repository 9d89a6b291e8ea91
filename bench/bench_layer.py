"""How does the fused layer compare with the unfused one on this CPU?

    python bench/bench_layer.py [--quick] [--out FILE]    paired runs; prints ratios, writes them as JSON
    pytest bench/ --benchmark-only                        the same calls as pytest-benchmark groups

A pair is two layers timed in turn, many times, in one process; the figure is the median ratio.  On a shared CPU
absolute times mean little and are not reported.  Groups: `layer` (forward and backward, real sizes), `host` (one token
on a tiny layer: the cost of the call itself, and of the torch.library operator, which eager calls avoid).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loraxs_kernels import LoRAXSLinear, ops
from loraxs_kernels.info import environment
from loraxs_kernels.reference import UnfusedLinear

RANK = 16
# (group, dtype, T, features in and out)
HOST = [("host", torch.float32, 1, 64)]
GRID = [
    *HOST,
    *(("layer", torch.float32, T, K) for T, K in itertools.product((64, 512, 4096), (1024, 4096))),
    # Larger ones take minutes a step on a CPU without bf16 instructions.
    *(("layer", torch.bfloat16, T, K) for T, K in ((64, 1024), (64, 4096), (512, 1024))),
]
QUICK = [*HOST, ("layer", torch.float32, 64, 1024)]


def layers(dtype: torch.dtype, K: int) -> dict[str, nn.Module | Callable[[Tensor], Tensor]]:
    """The same layer in every way: frozen alone, unfused, fused, fused through the operator, and as PEFT's LoRA."""
    torch.manual_seed(0)
    linear = nn.Linear(K, K).to(dtype)
    fused = LoRAXSLinear.from_linear(linear, RANK, init="random")
    unfused = UnfusedLinear(LoRAXSLinear.from_linear(linear, RANK, init=(fused.A, fused.B)))
    unfused.lora_latent.to(dtype)

    def operator(x: Tensor) -> Tensor:
        return ops.lowrank_linear(x, linear.weight, fused.A, fused.R, fused.B, 1.0, linear.bias, "torch")[0]

    paths = {"frozen": linear, "unfused": unfused, "fused": fused, "operator": operator}
    return paths | ({"peft_lora": _peft_lora(linear)} if importlib.util.find_spec("peft") else {})


def _peft_lora(linear: nn.Linear) -> nn.Module:
    """PEFT's LoRA layer of the same rank, which the LoRA-XS reference builds on; A and B train."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    return inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(linear)))[0].to(linear.weight.dtype)


def step(layer: nn.Module | Callable, dtype: torch.dtype, T: int, K: int) -> Callable[[], None]:
    """One forward and backward with gradients for x and R."""
    x, gY = torch.randn(T, K, dtype=dtype, requires_grad=True), torch.randn(T, K, dtype=dtype)

    def run() -> None:
        layer(x).backward(gY)

    return run


def paired(first: Callable[[], None], second: Callable[[], None], seconds: float) -> dict[str, float]:
    """How long `first` takes, as a multiple of `second`: the median and the quartiles over pairs run in turn."""
    for run in (first, second):
        run()
    times: list[tuple[float, float]] = []
    inner, end = _inner(second), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        pair = []
        for run in (first, second) if len(times) % 2 else (second, first):
            start = time.perf_counter()
            for _ in range(inner):
                run()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]) if len(times) % 2 else (pair[1], pair[0]))
    a, b = torch.tensor(times).unbind(1)
    low, ratio, high = (a / b).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"ratio": ratio, "low": low, "high": high, "pairs": len(times)}


def _inner(run: Callable[[], None]) -> int:
    """Repetitions that make one timing about 5 ms."""
    start = time.perf_counter()
    run()
    return max(1, int(5e-3 / (time.perf_counter() - start)))


def measure(grid: list[tuple], seconds: float) -> list[dict]:
    """A row for every pair of the grid, printed as it is known."""
    rows = []
    for group, dtype, T, K in grid:
        options = layers(dtype, K)
        pairs = [("fused", "unfused"), ("fused", "frozen")]
        pairs += [("fused", "peft_lora")] if "peft_lora" in options else []
        pairs += [("operator", "fused")] if group == "host" else []
        for first, second in pairs:
            result = paired(*(step(options[name], dtype, T, K) for name in (first, second)), seconds)
            name = str(dtype).removeprefix("torch.")
            row = {"group": group, "dtype": name, "T": T, "N": K, "K": K, "r": RANK, "path": first, "over": second}
            rows.append(row | result)
            print(
                f"{group:6} {name:9} T {T:5} N = K {K:5} r {RANK}: {first} / {second} = {result['ratio']:.2f} "
                f"(quartiles {result['low']:.2f} to {result['high']:.2f}, {result['pairs']} pairs)",
                flush=True,
            )
    return rows


@pytest.mark.parametrize("path", ["frozen", "unfused", "fused", "operator"])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_layer(benchmark, case, path):
    group, dtype, T, K = case
    benchmark.group = f"{group} {dtype} T={T} K={K}"
    benchmark(step(layers(dtype, K)[path], dtype, T, K))


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each pair")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    arguments = parser.parse_args()
    commit = {"commit": _git("rev-parse", "--short", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    report = {"version": 1, "question": "layer", **environment(), **commit, "direction": "forward + backward (gX, gR)"}
    report["rows"] = measure(QUICK if arguments.quick else GRID, arguments.seconds)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
