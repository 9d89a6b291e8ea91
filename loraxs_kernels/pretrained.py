"""transformers' models with adapters: `save_pretrained` warns of them, heads stay untied, Trainer takes quantised ones.

transformers is told by attributes and names, and never imported here.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .linear import LoraXSLinear
from .matching import embeddings


def prepare(model: nn.Module) -> None:
    """Teach `save_pretrained` and `resize_token_embeddings` about adapters; mark a quantised model for Trainer.

    These methods are changed once in each class that defines them for the model or a part of it.  Nothing is left on
    the model itself, so that copies of it save themselves.
    """
    for module in model.modules():
        if _is_quantised_for_training(module):
            module._hf_peft_config_loaded = True  # without this mark Trainer refuses to train a quantised model
    modeling = sys.modules.get("transformers.modeling_utils")
    knowing = {"save_pretrained": _knowing_adapters, "resize_token_embeddings": _keeping_adapted_heads}
    for kind in {type(module) for module in model.modules()} | {getattr(modeling, "PreTrainedModel", nn.Module)}:
        for name, make in knowing.items():
            owner = next((each for each in kind.__mro__ if name in vars(each)), None)
            if owner is not None and not hasattr(getattr(owner, name), "loraxs_knows_adapters"):
                setattr(owner, name, made := make(getattr(owner, name)))
                made.loraxs_knows_adapters = True


def unmark(module: nn.Module) -> None:
    """Take back the mark of `prepare`, if the module has it."""
    if _is_marked(module):
        del module._hf_peft_config_loaded


def tying(model: nn.Module) -> list[Any]:
    """The configurations by which from_pretrained would tie an adapted head to the input embeddings again."""
    config = getattr(model, "config", None)
    head = embeddings(model, "output")
    if not isinstance(head, LoraXSLinear):
        return []
    weight = head.base_layer._parameters.get("weight")
    if sum(each is weight for m in model.modules() for each in m._parameters.values() if each is not None) > 2:
        return []  # an encoder's and a decoder's embeddings are tied by the same setting, and have to stay so
    of_text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return [each for each in (config, of_text) if getattr(each, "tie_word_embeddings", False)]


def _is_quantised_for_training(model: nn.Module) -> bool:
    """Whether transformers has quantised the model by a method whose models can be trained through."""
    trainable = getattr(getattr(model, "hf_quantizer", None), "is_trainable", False)
    return trainable and getattr(model, "is_quantized", False) and hasattr(model, "_hf_peft_config_loaded")


def _is_marked(model: nn.Module) -> bool:
    """Whether a model has the mark of PEFT's adapters, which transformers sets, and no adapters of PEFT."""
    return model.__dict__.get("_hf_peft_config_loaded", False) and not hasattr(model, "peft_config")


def _keeping_adapted_heads(resize: Callable[..., Any]) -> Callable[..., Any]:
    """`resize_token_embeddings` as it was, except that it first refuses another size for a head with an adapter."""

    @functools.wraps(resize)
    def resize_token_embeddings(self: Any, *args: Any, **options: Any) -> Any:
        head = embeddings(self, "output")
        asked = [each for each in (*args, *options.values()) if each is not None and not isinstance(each, bool)]
        if isinstance(head, LoraXSLinear) and asked not in ([], [head.out_features]):
            raise ValueError(
                f"resize_token_embeddings: the output embeddings ({head.label}) have an adapter, whose A and B are of "
                "their size; resize before lx.attach, or take the adapters off (lx.detach)"
            )
        return resize(self, *args, **options)

    return resize_token_embeddings


def _knowing_adapters(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` as it was, except that it warns of, or refuses, what from_pretrained could not load."""

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        layers = [m for m in self.modules() if isinstance(m, LoraXSLinear)] if isinstance(self, nn.Module) else []
        if not layers:
            return save(self, *args, **options)
        given = next((each for each in (*args, options.get("state_dict")) if isinstance(each, Mapping)), None)
        lost = any("base_layer." in key for key in given) if given else not all(layer.merged for layer in layers)
        if lost:
            instead = (
                "Save the adapter with lx.save_adapter(model, file) or, where the base layers are plain and dense, "
                "call lx.merge(model) first; in Trainer, LoraXSCallback saves R"
            )
            if any(layer.seat is not None and layer.seat.put_on for layer in layers):
                instead = "They are a bank's, which holds the adapters: bank.detach(model) leaves the base model"
            head, table = (embeddings(self, which) for which in ("output", "input"))
            shared = isinstance(head, LoraXSLinear) and not head.merged and head.weight is getattr(table, "weight", 0)
            if shared and not given and options.get("safe_serialization") is not False:  # a pickle has both names
                raise ValueError(
                    "save_pretrained: the head has an adapter and shares its weight with the embeddings, which "
                    f"transformers does not save by the names of both. {instead}"
                )
            warnings.warn(
                "save_pretrained: the model has LoRA-XS adapters, and from_pretrained would put random weights in the "
                f"place of every adapted layer. {instead}",
                stacklevel=2,
            )
        marked, tied = _is_marked(self), [config for config in tying(self) if embeddings(self, "output").merged]
        if marked:  # or transformers would look for PEFT's adapters and save only those
            del self._hf_peft_config_loaded
        try:
            for config in tied:
                config.tie_word_embeddings = False
            return save(self, *args, **options)
        finally:
            for config in tied:
                config.tie_word_embeddings = True
            if marked:
                self._hf_peft_config_loaded = True

    return save_pretrained
