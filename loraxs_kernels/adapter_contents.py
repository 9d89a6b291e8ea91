"""What an adapter file has of a model: R, the modules_to_save, and for each module its numbers and its recipe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import card
from .adapter_format import NUMBERS, described, packed
from .basis import ACCEPT, distance, distance_from_svd, is_flat, probes, singular_values, sketch
from .files import is_finite
from .linear import LoraXSLinear, makers_of_R
from .matching import adapted_layers, base_name, by_base_name, is_inside, saved_modules, unwrapped
from .naming import DTYPES, FLOATS, as_dtype
from .recipe import Recipe, check
from .sharding import gathered, is_gathered, whole
from .weights import weight_of, weight_view

HAS_BANK = "has a bank of adapters, whose layers have no adapter of their own"
# Of A and B of some modules: why they are in the file, or why a load of it may be refused.
CHANGED = (
    "are not what their recipe makes of the weights as they are now: A, B or the weights were changed, loaded or "
    "rounded after attach. The file holds these A and B, and is larger for that; no load can tell whether a model has "
    "the right weights"
)
MOVED = (
    "{}. The file will load into a model with the weights that A and B were made from, but not into this one as it is "
    "now; for that, save with save_factors=True"
)
FLAT = (
    "depend on rounding, since the singular values of each weight are nearly equal. The file may not load on another "
    "device or with another number of threads; for that, save with save_factors=True"
)


@torch.no_grad()
def packed_adapter(
    model: nn.Module, where: str, dtype: torch.dtype | str | None, portable: bool, save_factors: bool
) -> tuple[tuple[bytes | memoryview, ...], str]:
    """The parts of an adapter file and the text of its card; `where` is what the card loads."""
    dtype = as_dtype("dtype", dtype, (torch.float32, torch.bfloat16))
    model = unwrapped(model)
    descriptions, records, factors = {}, {}, {}
    doubtful: dict[str, list[LoraXSLinear]] = {why: [] for why in (CHANGED, MOVED, FLAT)}
    for name, layer in layers_to_save(model):
        R = whole_R(layer)
        if not torch.isfinite(R).all():
            raise ValueError(f"module {name!r}: R has NaN or Inf values; nothing was written")
        R = R.to(dtype or R.dtype)
        record = {"R": R, "S": singular_values(layer.A), "probe": probes(layer.A, R, layer.B)}
        if portable:
            record["U"], record["V"] = sketch(layer.A, layer.B)
        if not all(map(is_finite, record.values())):
            largest = R.abs().max().item()
            raise ValueError(
                f"module {name!r}: A or B is not finite, or R has values too large for a file (up to {largest:.1e}); "
                "nothing was written"
            )
        records[name] = {key: t.cpu() for key, t in record.items()}
        recipe = lasting_recipe(layer)
        if recipe.init != layer.recipe.init:
            doubtful[CHANGED].append(layer)
        if save_factors or recipe.init == "given":
            factors[name] = tuple(plain(t if t.dtype in FLOATS else t.float()) for t in (layer.A, layer.B))
        elif not portable and layer.why_no_load():
            doubtful[MOVED].append(layer)
        elif recipe.init == "svd" and is_flat(record["S"]):
            doubtful[FLAT].append(layer)
        descriptions[name] = description(layer, name, recipe)
    names, tensors = saved_tensors(model)
    base = base_model(model)
    header = {"base_model": base, "shared": shared_names(model)}
    parts = packed("loraxs", header, descriptions, records, factors, names, tensors)
    sizes = {name: sum(t.numel() for key, t in tensors.items() if key.startswith(f"{name}.")) for name in names}
    warn_of_unsaved(model, stacklevel=5)  # past this, no_grad's wrapper and the caller
    for why, layers in doubtful.items():
        if layers:
            which, why = f"{len(layers)} modules, the first {layers[0].label}", why.format(layers[0].why_no_load())
            warnings.warn(f"{where}: A and B of {which}, {why}", stacklevel=4)  # past no_grad's wrapper and the caller
    return parts, card.card(model, base, descriptions, sizes, where)


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
        if any(id(p) in trained for p in module.parameters(recurse=False)) and not is_inside(base_name(name), names)
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
