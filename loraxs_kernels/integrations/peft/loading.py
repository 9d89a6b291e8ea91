"""Checks of a state dict for a model with adapters of the PEFT method, all of them before the first layer changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import basis
from ...matching import is_peft_layer
from ...naming import FLOATS, label_of
from ...sharding import is_dtensor
from ..peft_files import PREFIX
from ..reference_repo.layers import translate
from .config import LoraXSConfig

if TYPE_CHECKING:
    from .layer import LoraXSLinearLayer

NO_FILES: Mapping[str, str] = {}
_FSDP1 = "_fsdp_wrapped_module."  # its wrapper: in the names of modules, and of tensors in a state dict only in front


def check_before_loading(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Check the tensors of all layers before the first one is loaded, so that a refused state dict changes nothing.

    The keys of the reference implementation are translated here too: some stand beside a layer, where it does not look.
    """
    layers = {  # by the names in state dicts, from which torch leaves out its wrapper for activation checkpointing
        prefix + name.replace("_checkpoint_wrapped_module.", ""): module
        for name, module in model.named_modules(remove_duplicate=False)
        if is_peft_layer(module)
    }
    if layers:  # it may have been unloaded
        translate(state_dict, layers, whole_model=True)
        _rename_biases(model, state_dict, prefix)
        configs = {name: config for layer in layers.values() for name, config in layer.config.items()}
        files = {name: c._loaded[0] for name, c in configs.items() if _is_what_was_loaded(c, name, state_dict, prefix)}
        _fill_in(layers, state_dict)
        for name, layer in layers.items():
            check_layer(layer, state_dict, f"{name}.", files)
        if not any(".base_layer." in key for key in state_dict):  # else perhaps one shard of a whole model
            _warn_of_modules(layers, state_dict, configs)
        for name, file in files.items():
            _check_all_belongs(model, state_dict, prefix, file)
            configs[name]._loaded = None  # later state dicts are not known to be this file


def _rename_biases(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Let biases that were saved without weights have their names here.

    Any adapter on X makes X.bias X.base_layer.bias, there or here.
    """
    here = {f"{prefix}{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for key in [key for key in state_dict if key.endswith(".bias") and key not in here]:
        if f"{key.removesuffix('bias')}weight" in state_dict:
            continue
        layer = key.removesuffix(".bias").removesuffix(".base_layer")
        for new in {f"{layer}.bias", f"{layer}.base_layer.bias"} & here:
            state_dict[new] = state_dict.pop(key)


def _fill_in(layers: Mapping[str, LoraXSLinearLayer], state_dict: dict[str, Tensor]) -> None:
    """Give a layer that stands in several places by all its names what the state dict has by one.

    PEFT 0.21 and later saves it by the first alone.
    """
    names: dict[int, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(id(layer), []).append(name)
    for several in (each for each in names.values() if len(each) > 1):
        parts = [
            (name, key, t) for key, t in state_dict.items() for name in several if key.startswith(f"{name}.loraxs_")
        ]
        for name, key, t in parts:
            for other in several:
                state_dict.setdefault(other + key.removeprefix(name), t)


def _warn_of_modules(
    layers: Mapping[str, LoraXSLinearLayer], state_dict: dict[str, Tensor], adapters: Iterable
) -> None:
    """Warn if a state dict has R of an adapter, but not for exactly the modules that it adapts here."""
    layers = {name.replace(_FSDP1, ""): m for name, m in layers.items()}
    there: dict[str, set[str]] = {name: set() for name in adapters}
    strays = []
    for key in state_dict:
        module, found, adapter = key.replace(_FSDP1, "").rpartition(".loraxs_R")
        if found and adapter.count(".") < 2:  # else it is what a parametrization makes R of
            here = module in layers and adapter[1:] in layers[module].r  # PEFT adds the adapter's name only then
            there[adapter[1:]].add(module) if here else strays.append(key)
    if strays:
        warnings.warn(
            f"the state dict has R for {len(strays)} modules that have no such adapter here, the first {strays[0]!r}: "
            "left out",
            stacklevel=3,
        )
    for name, modules in there.items():
        left = [each for each, layer in layers.items() if name in layer.loraxs_R._parameters and each not in modules]
        if modules and left:
            warnings.warn(
                f"adapter {name!r}: the state dict has no R for {len(left)} of its modules, the first {left[0]!r}, "
                "which keep theirs",
                stacklevel=3,
            )


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
        if key.endswith("_extra_state"):
            continue
        if ".loraxs_" in key and key.rpartition(".loraxs_")[2].count(".") > 1:
            continue  # of another adapter, which PEFT 0.18 saves too, or what a parametrization makes R of
        what = f"{file}: tensor {key.removeprefix(PREFIX)!r}"
        if key not in own:
            if ".modules_to_save." in key or ".original_module." in key:
                continue  # PEFT saves embeddings and biases of heads a second time, by names without the adapter's
            raise ValueError(f"{what} belongs to no part of this model")
        if hasattr(own[key], "ds_id"):  # ZeRO-3 holds a part of it
            continue
        shape, floats = tuple(own[key].shape), own[key].is_floating_point()
        if tuple(t.shape) != shape or t.is_floating_point() != floats:
            kind = "a floating point type" if floats else f"{own[key].dtype}"
            raise ValueError(f"{what} has shape {tuple(t.shape)} and {t.dtype}, must have {shape} and {kind}")


def check_layer(
    layer: LoraXSLinearLayer, state_dict: dict[str, Tensor], prefix: str, files: Mapping[str, str] = NO_FILES
) -> None:
    """Raise a ValueError, naming the layer, if a state dict has an adapter in part, or one that does not fit.

    An adapter without any tensor in the state dict is left alone, unless the state dict is known to come from that
    adapter's file (`files`: by the adapters' names).  If a parametrization makes R, and the state dict has what it
    is made of, R itself is taken out of the state dict.
    """
    for name, r in layer.r.items():
        label, file = label_of(layer.recipe[name].name), files.get(name)
        which_one = f"{file}: adapter {name!r}" if file else f"adapter {name!r}"
        shapes = {"A": (r, layer.in_features), "R": (r, r), "B": (layer.out_features, r)}
        shapes["fingerprint"] = (r + basis.PROBES,)
        keys = {which: f"{prefix}loraxs_{which}.{name}" for which in shapes}
        there = {which for which, key in keys.items() if key in state_dict}
        if name not in layer.loraxs_R._parameters:  # a parametrization makes it
            if any(key.startswith(f"{prefix}loraxs_R.parametrizations.{name}.") for key in state_dict):
                state_dict.pop(keys["R"], None)
                there.add("R")
            elif "R" in there:
                raise ValueError(
                    f"adapter {name!r}: got an R for {label}, where a parametrization makes R; remove the "
                    "parametrization before loading"
                )
        if not there and not file:
            continue
        if name in layer.merged_adapters:
            raise ValueError(f"adapter {name!r}: is merged into {label}; call unmerge_adapter() before loading it")
        needed = {"A", "R", "B"} if layer.config[name].init == "given" else {"R"}
        if missing := sorted(needed - there):
            raise ValueError(f"{which_one}: has no {' and '.join(missing)} for {label}")
        for which in shapes:
            if (t := state_dict.get(keys[which])) is None:
                continue
            what = f"{which_one}: {which} for {label}"
            if which == "R" and hasattr(R := layer.loraxs_R._parameters.get(name), "ds_id"):
                if is_in_parts(R) and t.shape == R.shape:  # DeepSpeed's own checkpoints have the parts elsewhere
                    continue
                if is_in_parts(R) or hasattr(R, "_z3_optimizer"):
                    raise ValueError(
                        f"{what} cannot be loaded once ZeRO-3 has partitioned it; load it before deepspeed.initialize"
                    )
            if tuple(t.shape) != shapes[which]:
                raise ValueError(f"{what} has shape {tuple(t.shape)}, must be {shapes[which]}")
            if t.dtype not in FLOATS:
                raise ValueError(f"{what} is of {t.dtype}, must be of bf16, fp16, fp32 or fp64")
            if not (t.is_meta or is_dtensor(t) or torch.isfinite(t).all()):
                raise ValueError(f"{what} has NaN or Inf values")


def is_in_parts(R: Tensor | None) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned R, so that this rank's tensor is empty."""
    return hasattr(R, "ds_id") and R.shape != R.ds_shape
