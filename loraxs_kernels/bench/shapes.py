"""The linear layers of the models people fine-tune: their shapes, and how often each occurs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from . import BenchError


@dataclass(frozen=True)
class Shape:
    """Linears of one shape: weight (N, K), `count` of them in each of the model's blocks."""

    N: int
    K: int
    count: int = 1
    names: str = ""

    def __str__(self) -> str:
        return f"{self.N}x{self.K}"

    @property
    def where(self) -> dict[str, Any]:
        """What the rows of a report say of it."""
        return {"layers": self.names, "count": self.count, "N": self.N, "K": self.K}


@dataclass(frozen=True)
class Model:
    """A transformer by its linears; `config` are the sizes of its Hugging Face configuration (of `model_type`)."""

    name: str
    model_type: str
    blocks: int
    shapes: tuple[Shape, ...]
    config: dict[str, int]


def _decoder(
    name: str, model_type: str, blocks: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int, **more: int
) -> Model:
    """A Llama-like block: q, k, v, o and a gated MLP; heads have hidden / heads columns, or head_dim."""
    columns = more.get("head_dim", hidden // heads)
    q, kv = heads * columns, kv_heads * columns
    shapes = [Shape(q, hidden, 1, "q"), Shape(kv, hidden, 2, "k v"), Shape(hidden, q, 1, "o")]
    if q == hidden:
        shapes = [Shape(hidden, hidden, 2, "q o"), Shape(kv, hidden, 2, "k v")]
    shapes += [Shape(mlp, hidden, 2, "gate up"), Shape(hidden, mlp, 1, "down")]
    config = dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=heads)
    return Model(
        name, model_type, blocks, tuple(shapes), config | dict(num_key_value_heads=kv_heads, vocab_size=vocab) | more
    )


# Sizes from the models' published configurations.
MODELS = {
    model.name: model
    for model in (
        _decoder("mistral-7b", "mistral", 32, hidden=4096, mlp=14336, heads=32, kv_heads=8, vocab=32000),
        _decoder("llama-3-8b", "llama", 32, hidden=4096, mlp=14336, heads=32, kv_heads=8, vocab=128256),
        _decoder("gemma-7b", "gemma", 28, hidden=3072, mlp=24576, heads=16, kv_heads=16, vocab=256000, head_dim=256),
        Model(
            *("roberta-large", "roberta", 24),
            (Shape(1024, 1024, 4, "q k v o"), Shape(4096, 1024, 1, "intermediate"), Shape(1024, 4096, 1, "output")),
            dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
            | dict(vocab_size=50265, max_position_embeddings=514),
        ),
        # GPT-3's sizes are from its paper; the layout is OPT's, a public copy: q, k and v are layers of their own.
        Model(
            *("gpt-3", "opt", 96),
            (Shape(12288, 12288, 4, "q k v o"), Shape(49152, 12288, 1, "up"), Shape(12288, 49152, 1, "down")),
            dict(hidden_size=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96, vocab_size=50257)
            | dict(word_embed_proj_dim=12288, max_position_embeddings=2048),
        ),
        # Not a model anyone uses: a block small enough to run everything on a CPU in seconds.
        _decoder("tiny", "mistral", 2, hidden=256, mlp=512, heads=4, kv_heads=2, vocab=512),
    )
}


def parse(text: str) -> Shape:
    """The shape written "NxK", as in 4096x14336; BenchError for anything else."""
    match = re.fullmatch(r"(\d{1,18})x(\d{1,18})", text)
    if match is None or 0 in (N_K := tuple(map(int, match.groups()))):
        raise BenchError(f"shape: got {text!r}, must be NxK, out-features by in-features, such as 4096x14336")
    return Shape(*N_K)
