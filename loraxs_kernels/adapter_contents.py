"""What an adapter file has of a model: R, the modules_to_save, and for each module its numbers and its recipe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_format import NUMBERS, described
from .basis import ACCEPT, distance, distance_from_svd
from .files import is_finite
from .linear import LoraXSLinear, makers_of_R
from .matching import adapted_layers, base_name, by_base_name, saved_modules
from .naming import DTYPES, FLOATS
from .recipe import Recipe, check
from .sharding import gathered, is_gathered, whole
from .weights import weight_of, weight_view

HAS_BANK = "has a bank of adapters, whose layers have no adapter of their own"


def layers_to_save(model: nn.Module) -> Iterator[tuple[str, LoraXSLinear]]:
    """`adapted_layers`; ValueError for a layer that is not in memory, or whose name a wrapper has changed."""
    for name, layer in adapted_layers(model):
        if layer.seat is not None and layer.seat.put_on:
            raise ValueError(f"model: {HAS_BANK}; export(name, path) of the bank writes one of its adapters")
        if "_fsdp_wrapped_module" in name:
            raise ValueError(
                f"model: is wrapped by FullyShardedDataParallel (module {name!r}), whose names no other model has; use "
                "FSDP2 (fully_shard), or save the model inside the wrapper"
            )
        if layer.R.is_meta or layer.A.is_meta:
            raise ValueError(
                f"module {name!r}: R or A is not in memory (meta device), must be in memory to be saved: load the "
                "weights, call reset_parameters(), or remove accelerate's offloading"
            )
        yield name, layer


def whole_R(layer: LoraXSLinear) -> Tensor:
    """A copy of R.  If R, or what a parametrization makes it of, is sharded over ranks, a collective gathers it.

    Of an R in half precision under ZeRO-3 it is the fp32 copy that DeepSpeed's optimizer has, unless the caller has
    gathered R, perhaps to save it on one rank.
    """
    R = layer._parameters.get("R")
    if hasattr(R, "_z3_optimizer") and R.requires_grad and R.dtype != torch.float32:
        from deepspeed.utils import safe_get_full_fp32_param

        if not is_gathered(R):
            return safe_get_full_fp32_param(R).clone()
    with gathered(makers_of_R(layer)):
        return whole(layer.R.detach()).clone()


def warn_of_unsaved(model: nn.Module, stacklevel: int) -> None:
    """Say which parameters train that are in no adapter file, if there are any: neither R nor in modules_to_save."""
    kept = {id(p) for _, layer in adapted_layers(model) for p in makers_of_R(layer)}
    kept |= {id(p) for name in saved_modules(model) for p in model.get_submodule(name).parameters()}
    if lost := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]:
        warnings.warn(
            f"model: {len(lost)} parameters train, the first {lost[0]!r}, that no adapter file will hold (a state "
            "dict, or a checkpoint of Trainer, will). Name their modules in attach(..., modules_to_save=[...])",
            stacklevel=stacklevel,
        )


def shared_names(model: nn.Module) -> dict[str, list[str]]:
    """The other names of adapted layers that have several, by the first."""
    shared: dict[str, list[str]] = {}
    first = {id(layer): name for name, layer in adapted_layers(model)}
    for name, m in by_base_name(model).items():
        if first.get(id(m), name) != name:
            shared.setdefault(first[id(m)], []).append(name)
    return shared


def base_model(model: nn.Module) -> str:
    """The name that a transformers model was loaded by, else nothing."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or ""


def saved_tensors(model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """The modules_to_save and their tensors, by their names in the model; ValueError for NaN or Inf."""
    names, tensors = saved_modules(model), {}
    for name in names:
        module = model.get_submodule(name)
        masks = {key for key, _ in module.named_buffers()}  # which may be of -Inf
        for key, t in module.state_dict(keep_vars=True).items():
            if key.endswith("_extra_state"):
                raise ValueError(
                    f"model: {name}.{key}, of get_extra_state, has no place in an adapter file; leave the module "
                    "out of modules_to_save"
                )
            if t.is_meta:
                raise ValueError(
                    f"model: {name}.{key} is not in memory (meta device, or offloaded), must be in memory to be saved"
                )
            tensors[f"{name}.{base_name(key)}"] = t = plain(t)
            if key not in masks and not is_finite(t):
                raise ValueError(f"tensor '{name}.{key}' has NaN or Inf values; nothing was written")
    return names, tensors


def tied_to_saved(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules, by their names, that share a parameter with these modules_to_save and are no parts of them."""
    trained = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    return {
        base_name(name): module
        for name, module in model.named_modules()
        if any(id(p) in trained for p in module.parameters(recurse=False))
        and not f"{base_name(name)}.".startswith(tuple(f"{each}." for each in names))
    }


def description(layer: LoraXSLinear, name: str, recipe: Recipe) -> dict[str, Any]:
    """The numbers and the recipe of one layer, checked; the recipe's name only if it is not the module's."""
    for key in NUMBERS:
        check(key, getattr(layer, key), f"module {name!r}")
    if layer.scaling != layer.alpha / layer.rank:
        raise ValueError(
            f"module {name!r}: scaling is {layer.scaling}, must be alpha / rank = {layer.alpha / layer.rank}; a file "
            "holds alpha, so set alpha as well"
        )
    return described(vars(layer), recipe, name)


def lasting_recipe(layer: LoraXSLinear) -> Recipe:
    """A recipe by which a load has these A and B again: the layer's or, where that would make others, "given"."""
    recipe = layer.recipe.cast(layer.A.dtype)  # A may have been assigned
    if recipe.init == "given" or _makes(recipe, layer):
        return recipe
    return as_given(recipe)


def as_given(recipe: Recipe) -> Recipe:
    """The recipe of the same A and B where a file holds them and a load takes them as they are."""
    return replace(recipe, init="given", method="auto", block=None, n_iter=None, rounded=())


def _makes(recipe: Recipe, layer: LoraXSLinear) -> bool:
    """Whether a recipe makes A and B of a layer, as far as the weight can be read without gathering or loading it.

    Its weight may have been rounded since, as `why_no_load` says, but A and B only by what the recipe names.  Those
    that a state dict has brought may be of another seed, and are made again, once.
    """
    A, B, shape, coarsest = layer.A, layer.B, (layer.out_features, layer.in_features), layer._coarsest
    if A.dtype not in FLOATS or (coarsest not in (None, *FLOATS) and torch.equal(A, A.to(coarsest).to(A.dtype))):
        return False  # in float8, which no recipe names
    if recipe.init == "random":
        made_A, made_B = recipe.round(recipe.drawn(layer.rank, shape))
        return distance((A, B), (made_A.to(A.device), made_B.to(A.device))) <= ACCEPT
    W = weight_view(layer.base_layer)
    if W is not None:
        if W.is_meta or W.shape != shape:
            return True
        roundings = [A.dtype, coarsest or W.dtype, *(DTYPES[each] for each in recipe.rounded)]
        if distance_from_svd(W, A, B) > max(ACCEPT, *(2 * torch.finfo(each).eps for each in roundings)):
            return False
    if recipe.init == "svd" and layer._as_made is None and not layer.why_no_load():
        try:
            weight = weight_of(layer.base_layer, layer.label)
        except TypeError:  # bitsandbytes may have packed it anew since
            return True
        if weight.groups:
            return True
        layer._as_made = distance((A, B), recipe.round(recipe.factors(weight, layer.rank))) <= ACCEPT
    return layer._as_made is not False


def plain(t: Tensor) -> Tensor:
    """A contiguous copy on the CPU with storage of its own; a collective for a tensor that is sharded over ranks."""
    return whole(t).to("cpu", copy=True).contiguous()
