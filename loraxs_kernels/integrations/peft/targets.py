"""What "all-linear" stands for in a LoraXSConfig, and the classification head beside it."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ...matching import (
    classification_head,
    embeddings,
    is_everything,
    matches,
    pattern_value,
    too_small,
    warn_of_idle_head,
    warn_of_left_out,
)
from ...weights import is_unread_linear, registered_reader, unread
from .config import LoraXSConfig

WHOLE = "in modules_to_save of another adapter, which trains it whole"  # the end of a sentence


def spell_out_all_linear(config: LoraXSConfig, model: nn.Module, no_adapter: Mapping[int, str]) -> None:
    """Replace "all-linear" by the names it stands for: those of PEFT, as far as `attach` adapts them.

    Layers that take no adapter are left out (no_adapter: why, by their id).  A classification head trains whole, as one
    of modules_to_save.
    """
    if not is_everything(config.target_modules):
        return
    _maybe_include_all_linear_layers(config, model)
    output = embeddings(model, "output")
    config.target_modules |= {  # which PEFT does not know
        name.removesuffix(".base_layer")
        for name, module in model.named_modules(remove_duplicate=False)
        if registered_reader(module) is not None and module is not output
    }
    # Through transformers' add_adapter only what modules_to_save names trains whole.
    alone = config.modules_to_save == [] or getattr(model, "_hf_peft_config_loaded", False)
    head = [] if alone else classification_head(model)
    inside = tuple(f"{name}." for name in head)
    config.target_modules -= {name for name in config.target_modules if f"{name}.".startswith(inside)}
    refused = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = {each for each in config.target_modules if each.startswith(f"{name}.")}
            config.target_modules -= held
            expected = module is output or matches(name, config.modules_to_save or [])
            if held and not expected:
                refused[name] = WHOLE
        elif id(module) in no_adapter and name in config.target_modules:
            refused[name] = no_adapter[id(module)]
    config.target_modules -= refused.keys()
    if config.init == "svd":
        wanted = {name for name in config.target_modules if not matches(name, config.exclude_modules or [])}
        layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if name in wanted}
        small = {}
        for name, layer in layers.items():
            rank = pattern_value(config.rank_pattern, name, config.r)
            if why := too_small(name, getattr(layer, "base_layer", layer), rank):
                small[name] = why
        if small.keys() != wanted:  # else the rank is wrong
            config.target_modules -= small.keys()
            refused |= small
    if new := [name for name in head if not matches(name, config.modules_to_save or [])]:
        config.modules_to_save = [*(config.modules_to_save or []), *new]
    if not config.target_modules:
        raise ValueError("target_modules: got 'all-linear' for a model without a linear layer that can be adapted")
    unread_layers = [(name, unread(m)) for name, m in model.named_modules() if is_unread_linear(m)]
    warn_of_left_out(model, [*unread_layers, *refused.items()], stacklevel=3)


def warn_of_head(config: LoraXSConfig, model: nn.Module) -> None:
    """Warn if a classification head, which is random in most models, will not train."""
    if config.inference_mode or config.modules_to_save == []:
        return
    saved = [*(config.modules_to_save or ())]
    if config.task_type in ("TOKEN_CLS", "QUESTION_ANS") and not getattr(model, "_hf_peft_config_loaded", False):
        saved += ["classifier", "score", "qa_outputs"]  # which get_peft_model adds once the adapter is there
    idle = [
        name
        for name in classification_head(model)
        if not matches(name, saved) and not any(p.requires_grad for p in model.get_submodule(name).parameters())
    ]
    warn_of_idle_head(model, idle, config.modules_to_save, stacklevel=3)
