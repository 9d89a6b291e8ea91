"""vLLM's LLM on a bank: tensor parallelism, biases, a bank of some modules, and what ends the start."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import transformers
from serving import MODULES, Ended, Layers, offline, random_R

import loraxs_kernels as lx

SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.15)
OPTIONS = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=128, enforce_eager=True, max_loras=3)
NAMES = [None, "user0", "user1", None, "user2", "user3", "user4"]


def made(folder: Path, kind: str, rank: int, modules: list[str], seed: int = 0) -> tuple[Path, lx.AdapterBank]:
    """A small model with random weights, in a folder, and a bank for it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder / "model")
    lx.attach(model, rank, target_modules=modules, progress=False)
    bank = lx.AdapterBank.create(folder / "bank", model)
    bank.add_many((name, random_R(bank.modules, int(name[4:]), 0.3)) for name in NAMES if name)
    return folder / "model", bank


def check(folder: Path, kind: str, rank: int, modules: list[str], **options: Any) -> None:
    """Compare the answers to prompts of different lengths, and to one prompt, with those of our own layers."""
    model, bank = made(folder, kind, rank, modules)
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(512, (20 + 5 * i,), generator=generator).tolist() for i in range(len(NAMES))]
    jobs = [*zip(NAMES, prompts, strict=True), *((name, prompts[0]) for name in NAMES)]
    answers = offline(model, bank.path, jobs, **OPTIONS | options)
    ours = Layers(bank.attach(transformers.AutoModelForCausalLM.from_pretrained(model), progress=False))
    ours.calibrate([answer for answer in answers if answer.name is None])
    ours.check(answers)


def test_two_workers(tmp_path):
    """Each with a part of every layer's weight: columns of W and A in some, rows of W and B in others."""
    check(tmp_path, "Llama", 16, MODULES, tensor_parallel_size=2)


def test_biases_and_a_bank_of_some_modules(tmp_path):
    """Of merged projections the bank has one, or two of three, and leaves others alone."""
    check(tmp_path, "Qwen2", 4, ["q_proj", "v_proj", "up_proj", "down_proj"])


def test_a_bank_that_is_not_the_models_ends_the_start(tmp_path):
    """Of the same modules on other weights; and of a module that is no linear layer in vLLM."""
    model, _ = made(tmp_path / "right", "Llama", 4, MODULES)
    _, other = made(tmp_path / "other", "Llama", 4, MODULES, seed=1)
    _, more = made(tmp_path / "more", "Llama", 4, [*MODULES, "lm_head"])

    def ending(served: lx.AdapterBank) -> str:
        with pytest.raises(Ended) as error:
            offline(model, served.path, [("user0", [1, 2, 3])], **OPTIONS)
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        weights, module = pool.map(ending, (other, more))
    assert "AdapterMismatch: " in weights and "weights" in weights
    assert "module 'lm_head' is no linear layer of vLLM's LlamaForCausalLM" in module
