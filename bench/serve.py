"""What it costs to serve many adapters: vLLM's server with a bank of 10,000, under load over the loopback.

    .venv-serve/bin/python bench/serve.py --out bench/results/cpu        in what `make test-serve` makes

SmolLM2-135M in bf16 on one thread of a CPU, R of rank 4 for all its projections, random.  The same prompts and lengths
for four kinds of names: the base model, one adapter for all requests, and for each request a name out of all, drawn
uniformly or by Zipf's law.  CLIENTS requests are in flight at a time, prefixes are not cached, and rounds of the four
alternate, since a shared machine is now faster and now slower; the first round is not counted.

DIR/<date>-<commit>-serve.json: for each kind `requests` (a second, {low, median, high} over rounds), `over_base` (a
round's rate over the base model's in it, spread likewise), milliseconds of a request (p50, p95, over all rounds), and
how many different names the rounds had.  And MiB of each process, as the system shares them out (PSS), once the server
has started and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serve")]

import aiohttp  # noqa: E402
import torch  # noqa: E402
from serving import BASE, MODULES, Server, random_R, smollm2  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import loraxs_kernels as lx  # noqa: E402
from loraxs_kernels.bench import report  # noqa: E402

RANK, EXPONENT = 4, 1.1
CLIENTS, PROMPT, ANSWER = 32, 32, 16  # requests in flight; tokens
KINDS = ("base", "one", "zipf", "uniform")


def make_bank(model_folder: Path, path: Path, adapters: int) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    lx.attach(model, RANK, target_modules=MODULES, progress=False)
    with lx.AdapterBank.create(path, model, dtype=torch.bfloat16) as bank:
        bank.add_many((f"user{i:06}", random_R(bank.modules, i)) for i in range(adapters))
        return bank.names()


def draw(kind: str, names: list[str], many: int, rng: random.Random) -> list[str]:
    """The models that the requests of a round name."""
    if kind == "base":
        return [BASE] * many
    if kind == "one":
        return [names[0]] * many
    weights = [1 / (i + 1) ** EXPONENT for i in range(len(names))] if kind == "zipf" else None
    return rng.choices(names, weights, k=many)


async def load(url: str, models: list[str], prompts: list[list[int]]) -> tuple[float, list[float]]:
    """Requests a second, and the seconds that each took."""
    waiting, took = iter(zip(models, itertools.cycle(prompts))), []

    async def client(session: aiohttp.ClientSession) -> None:
        for model, prompt in waiting:
            body = {"model": model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
            began = time.perf_counter()
            async with session.post(f"{url}/v1/completions", json=body) as response:
                said = await response.json()
            took.append(time.perf_counter() - began)
            if response.status != 200 or said["model"] != model or said["usage"]["completion_tokens"] != ANSWER:
                raise RuntimeError(f"{model}: status {response.status}: {said}")

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return len(took) / (time.perf_counter() - began), took


def memory(server: Server) -> dict[str, float]:
    """MiB of each of the server's processes."""
    found: dict[str, float] = {}
    for process in server.processes():
        info = process.memory_full_info()
        name = "API server" if process.pid == server.process.pid else process.name()
        found[name] = round(found.get(name, 0) + info.pss / 2**20, 1)
    return found


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"low": round(low, 3), "median": round(median, 3), "high": round(high, 3)}


def measure(url: str, names: list[str], requests: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    rng, end = random.Random(0), time.monotonic() + seconds
    prompts = [[rng.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(requests)]
    samples: dict[str, list[tuple]] = {kind: [] for kind in KINDS}  # the rate, the times and the models of each round
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for kind in KINDS[number % 4 :] + KINDS[: number % 4]:
            models = draw(kind, names, requests, rng)
            samples[kind].append((*asyncio.run(load(url, models, prompts)), models))
            print(f"round {number}, {kind}: {samples[kind][-1][0]:.2f} requests a second", flush=True)
    rows = []
    for kind in KINDS:
        rates, times, models = zip(*samples[kind][1:], strict=True)
        over = [rate / base for rate, (base, *_) in zip(rates, samples["base"][1:], strict=True)]
        cuts = statistics.quantiles(itertools.chain(*times), n=20)
        row = {"names": kind, "requests": spread([*rates]), "over_base": spread(over), "rounds": len(over)}
        row |= {"p50_ms": round(cuts[9] * 1e3), "p95_ms": round(cuts[18] * 1e3)}
        rows.append(row | {"different": len(set(itertools.chain(*models)))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--adapters", type=int, default=10_000, help="in the bank")
    parser.add_argument("--requests", type=int, default=128, help="of each kind of names in a round")
    parser.add_argument("--rounds", type=int, default=8, help="at most")
    parser.add_argument("--seconds", type=float, default=480, help="no further round begins after that")
    arguments = parser.parse_args()
    import vllm

    head = report.head("loraxs-serve")
    options = f"--dtype bfloat16 --max-model-len 128 --max-num-seqs {CLIENTS} --no-enable-prefix-caching"
    with tempfile.TemporaryDirectory() as folder:
        names = make_bank(smollm2(), Path(folder, "bank"), arguments.adapters)
        size = Path(folder, "bank", "data.mdb").stat().st_size
        server = Server(smollm2(), Path(folder, "bank"), Path(folder, "log"), *options.split())
        try:
            pss = {"at the start": memory(server.wait())}
            rows = measure(server.url, names, arguments.requests, arguments.rounds, arguments.seconds)
            pss["at the end"] = memory(server)
        finally:
            server.stop()
    head |= {"vllm": vllm.__version__, "model": "SmolLM2-135M-Instruct, bf16", "options": f"loraxs serve {options}"}
    head |= {"adapters": len(names), "rank": RANK, "bank_bytes": size, "zipf_exponent": EXPONENT, "clients": CLIENTS}
    head |= {"worker_threads": 1, "prompt_tokens": PROMPT, "answer_tokens": ANSWER}
    head |= {"requests_a_round": arguments.requests, "pss_mib": pss}
    report.keep(head | {"rows": rows}, arguments.out, "serve")


if __name__ == "__main__":
    main()
