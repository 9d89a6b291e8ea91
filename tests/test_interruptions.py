"""Ctrl-C at any line of attach, load_adapter, merge, unmerge and detach leaves the model as it was, or wholly done."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import assert_all_or_nothing, interrupted_at
from torch import nn
from torch.nn.utils import parametrize

import loraxs_kernels as lx
from loraxs_kernels import backends, exact_matmul
from loraxs_kernels.matching import adapted_layers


class Tied(nn.Module):
    """A little of everything: a tied head with a configuration, a module of modules_to_save, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"tie_word_embeddings": True})()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 8))
        self.norm = nn.LayerNorm(8).requires_grad_(False)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embed(x))))


def model() -> Tied:
    torch.manual_seed(1)
    return Tied()


def attached() -> Tied:
    m = lx.attach(model(), 2, target_modules=["0", "1", "head"], modules_to_save=["norm"], progress=False)
    for _, layer in adapted_layers(m):
        nn.init.normal_(layer.R, std=0.5)
    return m


def parametrized() -> Tied:
    class Doubled(nn.Module):
        def forward(self, R):
            return 2 * R

        def right_inverse(self, R):
            return R / 2

    m = attached()
    parametrize.register_parametrization(m.body[1], "R", Doubled())
    return m


def state(m: Tied) -> dict[str, Any]:
    """Everything of a model that could be half done, as objects and as bits."""
    parts = {}
    for name, module in m.named_modules(remove_duplicate=False):
        parts[name] = (
            type(module).__name__,
            {k: v for k, v in vars(module).items() if k in ("alpha", "scaling", "loraxs")},
        )
        held = {**module._parameters, **module._buffers}
        parts[name] += ({k: None if t is None else (t.requires_grad, t.tolist()) for k, t in held.items()},)
    parts["config"] = m.config.tie_word_embeddings
    parts["y"] = m(torch.arange(12)).tolist()
    return parts


OPERATIONS = {
    "attach": (model, lambda m, file: lx.attach(m, 2, target_modules=["0", "1", "head"], progress=False)),
    "load into a base model": (model, lambda m, file: lx.load_adapter(m, file, progress=False)),
    "load into an adapted model": (parametrized, lambda m, file: lx.load_adapter(m, file)),
    "merge": (attached, lambda m, file: lx.merge(m)),
    "unmerge": (lambda: lx.merge(attached()), lambda m, file: lx.unmerge(m)),
    "detach": (attached, lambda m, file: lx.detach(m)),
    "detach, merging": (attached, lambda m, file: lx.detach(m, merge=True)),
    "detach, merged": (lambda: lx.merge(attached()), lambda m, file: lx.detach(m, merge=True)),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_an_interruption_leaves_nothing_half_done(tmp_path, case):
    make, operation = OPERATIONS[case]
    file = tmp_path / "adapter.safetensors"
    other = attached()
    for p in other.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    lx.save_adapter(other, file)
    assert_all_or_nothing(make, lambda m: operation(m, file), state, undone=10)


def test_dictionaries_that_cannot_copy_themselves():
    """DeepSpeed's ZeRO-3 puts such a one in the place of every module's parameters."""

    class Parameters(OrderedDict):
        def __init__(self, owner):
            super().__init__()

    m = attached()
    for module in m.modules():
        held = Parameters(module)
        held.update(module._parameters)
        module._parameters = held
    before = state(m)
    assert interrupted_at(30, lambda: lx.merge(m)) and state(m) == before
    assert state(lx.unmerge(lx.merge(m))) == before


@pytest.mark.parametrize("setting", ["exact_matmul", "backend"])
def test_settings_of_the_process_are_given_back_and_no_lock_is_kept(setting):
    def of_products() -> tuple[str, bool, int]:
        """With how many blocks of autocast torch believes to be in: the casts that it keeps go with the last."""
        blocks = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), blocks

    enter, lock, read = {
        "exact_matmul": (exact_matmul.exact_matmul, exact_matmul._exact_lock, of_products),
        "backend": (lambda: backends.backend("torch"), backends._blocks_lock, lambda: backends._forced),
    }[setting]
    k = 1

    def use():
        with enter():
            pass

    def is_free() -> bool:
        with ThreadPoolExecutor(1) as other:
            return other.submit(lambda: lock.acquire(blocking=False) and not lock.release()).result()

    with torch.autocast("cpu", enabled=setting == "exact_matmul"):
        before = read()
        while interrupted_at(k, use):
            assert read() == before and is_free(), f"line {k}"
            k += 1
    assert k > 5


def test_an_interrupted_forward_leaves_no_block_of_autocast():
    """torch drops the casts of weights that it keeps when its last block ends, or trains on with stale ones."""

    def blocks() -> int:
        torch.autocast_increment_nesting()
        return torch.autocast_decrement_nesting()

    layer, x, k = attached().body[0], torch.randn(3, 8), 1
    with torch.autocast("cpu", torch.bfloat16):
        while interrupted_at(k, lambda: layer(x), within="/"):  # torch's own lines, too
            assert blocks() == 1, f"line {k}"
            torch.set_autocast_enabled("cpu", True)
            k += 1
    assert k > 20
