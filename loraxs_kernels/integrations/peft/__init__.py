"""LoRA-XS as a PEFT method: get_peft_model(model, LoraXSConfig(r=16, target_modules="all-linear")).

Importing this package makes the method known to PEFT (0.18 or later), so do that before a saved adapter is loaded.  The
layers compute as LoraXSLinear does, the factors of all of them are made together as in `attach`, and what
`save_pretrained` writes holds R (r x r) of every layer and a fingerprint of its basis: A and B are recomputed and
checked when it is loaded.

registration  makes the method known to PEFT
config        LoraXSConfig, and adapter_config.json
tuner         LoraXSModel: adding, merging, deleting and unloading adapters, in all layers or none
targets       what "all-linear" stands for
weighted      which adapters can be added up
layer         LoraXSLinearLayer: one layer with its adapters
scales        the scale of each adapter, as users change it
buffers       how a layer holds A, B and fingerprints
merging       what merging replaces in a layer, to be put back
loading       which state dicts are refused
samples       batches in which each sample has its own adapter
mixed         the output of a layer for such a batch
card          the model card beside a saved adapter
"""

from importlib.util import find_spec

if find_spec("peft") is None:  # which brings what else is imported here
    raise ImportError("LoRA-XS as a PEFT method needs the package peft: pip install peft")

from . import card, config, tuner
from .buffers import Buffers as _Buffers
from .buffers import Fingerprints as _Fingerprints
from .layer import LoraXSLinearLayer, _check_what_was_loaded
from .loading import check_before_loading as _check_before_loading
from .merging import Unmerged as _Unmerged
from .registration import register

__all__ = [
    "LoraXSConfig",
    "LoraXSLinearLayer",
    "LoraXSModel",
    # By these names models that earlier versions pickled (torch.save of a whole model) find their parts.
    "_Buffers",
    "_Fingerprints",
    "_Unmerged",
    "_check_before_loading",
    "_check_what_was_loaded",
]

LoraXSConfig, LoraXSModel = register(config.LoraXSConfig, tuner.LoraXSModel)
card.extend_cards()
