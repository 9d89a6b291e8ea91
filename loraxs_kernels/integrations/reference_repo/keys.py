"""How the reference spells the keys of A, B and R."""

from __future__ import annotations

import re

# The keys of A, B and R, a dot in front: of a saved adapter, of a model's state dict, and as the reference's scripts
# rename the ones to the others.  R of q_proj is q_proj_lora_latent_mapping.weight where PEFT up to 0.17 saved it, which
# took every ".default" for the adapter's name, and q_proj.default_lora_latent_mapping.weight since.
KEY = re.compile(r"(.*?)(?:\.lora_([AB])(?:\.[^.]+)?|(?:\.default)*_lora_latent_mapping)\.weight")


def part(key: str) -> tuple[str, str] | None:
    """The layer's name and "A", "R" or "B", where the key is of one of the reference's tensors."""
    match = KEY.fullmatch(f".{key}")
    return match and (match[1][1:], match[2] or "R")
