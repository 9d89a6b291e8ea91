"""Fixtures of the tests that serve: a real model, a bank, vLLM's server with it, and our own layers beside it.

`make test-serve` runs these tests in an environment with vLLM; everywhere else they are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import serving
import torch
from serving import MODULES, PROMPTS, SECRET, Layers, Server, random_R
from transformers import AutoModelForCausalLM, AutoTokenizer

import loraxs_kernels as lx

USERS = 300
STARTED: list[Server] = []  # of this session


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The end of each server's log beside a test that fails."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {server.url}", server.tail()) for server in STARTED]
    return report


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return serving.smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def adapted(smollm2):
    """SmolLM2 in fp32, in which every mistake is far above the rounding, with layers of our own, r = 4."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return lx.attach(model, 4, target_modules=MODULES, progress=False)


@pytest.fixture(scope="session")
def bank(adapted, tmp_path_factory) -> Path:
    """A bank of USERS adapters for SmolLM2."""
    path = tmp_path_factory.mktemp("served") / "bank"
    with lx.AdapterBank.create(path, adapted, dtype=torch.bfloat16) as made:
        made.add_many((f"user{i}", random_R(made.modules, i)) for i in range(USERS))
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """`start(model, bank, *options, **environment)`: a server, which ends with the session at the latest."""

    def start(*given, **environment):
        STARTED.append(Server(*given[:2], tmp_path_factory.mktemp("log") / "server.log", *given[2:], **environment))
        return STARTED[-1].wait()

    yield start
    for server in STARTED:
        server.stop()


@pytest.fixture(scope="session")
def server(start, smollm2, bank):
    """A server with few slots, small steps and cached prefixes, that takes new weights."""
    options = "--dtype float32 --enforce-eager --max-model-len 1024 --max-num-batched-tokens 64 --max-num-seqs 16"
    options += " --max-loras 4 --max-cpu-loras 8 --enable-prefix-caching --block-size 32"
    return start(smollm2, bank, *options.split(), LORAXS_TOKEN=SECRET)


@pytest.fixture(scope="session")
def ours(server, adapted, bank):
    """Our own layers with the bank, and the measure of what counts as agreement."""
    with lx.AdapterBank(bank) as opened:
        opened.attach(adapted, 16)
        layers = Layers(adapted)
        layers.calibrate(server.ask_all((None, prompt) for prompt in PROMPTS))
        yield layers


@pytest.fixture
def writer(bank):
    """The bank, open to be written to by another process than the server's: this one."""
    with lx.AdapterBank(bank, "a") as opened:
        yield opened
