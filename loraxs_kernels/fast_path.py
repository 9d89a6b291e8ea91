"""torch's encoder layers compute with the weights of linear1 and linear2 in eval mode, without calling these layers.

So that adapters there count, an adapted nn.TransformerEncoderLayer is kept from that fast path, and the
nn.TransformerEncoder around it from the nested tensors that only the fast path understands.  Both are settings that
torch asks for in each forward, and copies and pickles of a model have them.
"""

from __future__ import annotations

from torch import nn

from .linear import LoraXSLinear
from .matching import is_peft_layer

# The setting of each class, and its value that keeps the class from its fast path.
_SETTINGS = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def settle_fast_paths(model: nn.Module) -> None:
    """Keep what has adapters from its fast path, and let what has none any more use its own again."""
    for module in model.modules():
        for kind, (setting, off) in _SETTINGS.items():
            if not isinstance(module, kind):
                continue
            own = vars(module)
            if any(isinstance(m, LoraXSLinear) or is_peft_layer(m) for m in module.modules()):
                if own.get(setting, off) != off:
                    own["loraxs_fast_path"] = own[setting]
                    own[setting] = off
            elif "loraxs_fast_path" in own:
                own[setting] = own.pop("loraxs_fast_path")
