"""Checks of a state dict for a model with adapters of the PEFT method, all of them before the first layer changes."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..peft_files import PREFIX
from ..reference_repo.layers import translate
from .config import LoraXSConfig
from .layer import LoraXSLinearLayer


def check_before_loading(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Check the tensors of all layers before the first one is loaded, so that a refused state dict changes nothing.

    The keys of the reference implementation are translated here too: some stand beside a layer, where it does not look.
    """
    layers = {
        f"{prefix}{name}": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoraXSLinearLayer)
    }
    if layers:  # it may have been unloaded
        translate(state_dict, layers, whole_model=True)
        configs = {name: config for layer in layers.values() for name, config in layer.config.items()}
        files = {name: c._loaded[0] for name, c in configs.items() if _is_what_was_loaded(c, name, state_dict, prefix)}
        for name, layer in layers.items():
            layer.check_state_dict(state_dict, f"{name}.", files)
        for name, file in files.items():
            _check_all_belongs(model, state_dict, prefix, file)
            configs[name]._loaded = None  # later state dicts are not known to be this file


def _is_what_was_loaded(config: LoraXSConfig, adapter: str, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Whether a state dict has for this adapter exactly the tensors of the file that the config was loaded with."""
    if config._loaded is None or len(state_dict) != config._loaded[2]:
        return False
    ending = f".loraxs_R.{adapter}"
    with_R = (key for key in state_dict if key.endswith(ending))
    return config._loaded[1] == {key.removeprefix(prefix).removesuffix(ending) for key in with_R}


def _check_all_belongs(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, file: str) -> None:
    """Raise a ValueError if a tensor of an adapter's file has no place in the model, or another shape or kind there."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {f"{prefix}{name}": t for name, t in tensors}
    for key, t in state_dict.items():
        if not key.startswith(prefix) or key.endswith("_extra_state"):
            continue
        if ".loraxs_" in key and key.rpartition(".loraxs_")[2].count(".") > 1:
            continue  # of another adapter, which PEFT 0.18 saves too, or what a parametrization makes R of
        what = f"{file}: tensor {key.removeprefix(PREFIX)!r}"
        if key not in own:
            if key.endswith(".bias") and (".modules_to_save." in key or ".original_module." in key):
                continue  # PEFT saves biases of heads a second time, by names without the adapter's
            raise ValueError(f"{what} belongs to no part of this model")
        if hasattr(own[key], "ds_id"):  # ZeRO-3 holds a part of it
            continue
        shape, floats = tuple(own[key].shape), own[key].is_floating_point()
        if tuple(t.shape) != shape or t.is_floating_point() != floats:
            kind = "a floating point type" if floats else f"{own[key].dtype}"
            raise ValueError(f"{what} has shape {tuple(t.shape)} and {t.dtype}, must have {shape} and {kind}")
