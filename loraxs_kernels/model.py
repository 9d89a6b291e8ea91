"""LoRA-XS on a whole model, in place: attach, detach, merge, unmerge."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from . import parallel, pretrained
from .accounting import summary
from .basis_file import Basis, read_basis
from .factors import WORKSPACE, WORKSPACE_IN_BYTES, Job, compute_options, factor
from .fast_path import settle_fast_paths
from .linear import LoraXSLinear
from .matching import (
    adapted_layers,
    check_patterns,
    check_unadapted,
    choose,
    embeddings,
    pattern_value,
    unwrapped,
    warn_of_idle_head,
)
from .naming import Former, aliases
from .recipe import Factors
from .route import hooks_of
from .transaction import transaction
from .weights import registered_reader, weight_of

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger(__package__)


@dataclass(frozen=True)
class Attachment:
    """What `attach` leaves on the model (as `model.loraxs`) for `detach` and for adapter files.

    Each module of modules_to_save also has an Attachment, in which "" is the module itself, so that a part of the model
    can be saved by itself.
    """

    modules_to_save: tuple[str, ...]
    trainable_before: frozenset[str]


@aliases(r="rank", lora_alpha="alpha", sigma=Former("init_std"), workspace=WORKSPACE_IN_BYTES)
def attach(
    model: M,
    rank: int,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    init: str | Mapping[str, Factors] = "svd",
    init_std: float = 1e-5,
    seed: int = 0,
    n_iter: int | None = None,
    dtype: torch.dtype | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    basis: str | os.PathLike | None = None,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    workspace_gib: float = WORKSPACE / 2**30,
    progress: bool = True,
) -> M:
    """Put a LoRA-XS adapter on the linear layers of a model, in place, and freeze everything else.

    Args:
        model: any nn.Module that contains nn.Linear or transformers Conv1D layers, dense or quantised (bitsandbytes,
            torchao), or layers of a type that `register_weight_reader` was called for.  Weights that are sharded over
            ranks (tensor parallelism, FSDP2, ZeRO-3) are gathered one at a time, and the ranks take turns at the SVD:
            every rank must then call with the same arguments.
        rank: r of every adapter that `rank_pattern` does not match.  `r` means the same.
        target_modules: as in PEFT: a list of names or name endings ("q_proj" is every module of that name), or a
            regular expression that matches the whole name, or "all-linear": every linear layer except the output
            embeddings and, with a warning, layers that are too small for their rank.  In a transformers model for
            classification "all-linear" leaves out the head, too; all weights of the head then train, as if it were
            named in `modules_to_save`.
        exclude_modules: names, name endings or a regular expression of modules that get no adapter.
        rank_pattern, alpha_pattern: {regular expression for the end of a name: value}, as in PEFT.
        alpha: the scale is s = alpha / r; None: alpha = r, so s = 1 everywhere.  `lora_alpha` means the same.
        dropout, init_std, n_iter, dtype: as in LoraXSLinear.from_linear.
        init: "svd", "random", or {module name: (A, B)} with a pair for every target.
        seed: for all random numbers: the SVD's start, and R and random A and B, which each layer draws for itself.
        modules_to_save: names or name endings of modules all of whose weights train (a classifier head).  They have no
            adapter, and are saved in the adapter file beside R.  []: only R trains, whatever target_modules is.
        basis: a file from `loraxs init` with A and B for every target.  A and B are then read, not computed, and each
            pair is checked against its weight.  The file has a recipe of its own: `seed` and `n_iter` given here are
            ignored.
        device: where the SVD runs: one device, or several that share the layers.  A and B end up on their layer's
            device.  Weights on a CPU are streamed through the GPU, also if they are larger than its memory in sum.
            None: the SVD of each weight runs on the weight's own device.
        workspace_gib: how many GiB the SVD may use on each GPU, beside the weights that are there already.
        progress: show a bar if this takes more than a second.

    Returns:
        `model`.  A module that is used in several places gets one adapter; modules that share a weight get one each,
        whose A and B are the same if they are from the SVD.  In a model inside the wrappers of torch.compile or
        DataParallel, names are those of the base model.  What was done is logged at level INFO by the logger
        "loraxs_kernels"; `lx.summary(model)` says the same at any time.

    Raises:
        TypeError, ValueError: an argument is wrong, or a layer cannot be adapted; the message names it.
        RuntimeError: a different rank could not read its weights or compute their SVD.
    After an error the model is as it was.
    """
    given, model = model, unwrapped(model)
    check_not_in_ddp(given)
    if not isinstance(init, (str, Mapping)):
        raise TypeError(f'init: got {init!r}, must be "svd", "random" or {{module name: (A, B)}}')
    check_patterns(rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    check_unadapted(model)
    rank_of = (lambda name: pattern_value(rank_pattern, name, rank)) if init == "svd" else None
    names, saved, idle = choose(model, target_modules, exclude_modules, modules_to_save, rank_of)
    warn_of_idle_head(model, idle, modules_to_save, stacklevel=4)  # past the wrapper of `aliases`
    options: dict[str, dict[str, Any]] = {}
    for name in names:
        if not isinstance(init, str) and name not in init:
            raise ValueError(f"init: has no pair (A, B) for module {name!r}")
        r, a = pattern_value(rank_pattern, name, rank), pattern_value(alpha_pattern, name, alpha)
        options[name] = {"rank": r, "alpha": a, "init": init if isinstance(init, str) else init[name], "dtype": dtype}
        options[name] |= {"dropout": dropout, "init_std": init_std, "seed": seed, "n_iter": n_iter}
    for argument, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        unused = [p for p in patterns or () if not any(pattern_value({p: True}, name, False) for name in names)]
        if unused:
            warnings.warn(f"{argument}: no adapted module matches {', '.join(map(repr, unused))}", stacklevel=3)
    opened = None if basis is None else basis_for(basis, options)
    with transaction(model):  # which the warning may end
        install(model, options, saved, opened, **compute_options(device, workspace_gib, progress))
        warn_of_zeros((layer for _, layer in adapted_layers(model)), stacklevel=4)
    if logger.isEnabledFor(logging.INFO):  # counting takes as long as a small model's SVD
        logger.info("attach: %s", summary(model))
    return given


def basis_for(path: str | os.PathLike, options: dict[str, dict[str, Any]]) -> Basis:
    """The basis file, with every module's recipe put into its options."""
    found = read_basis(path)
    for name, o in options.items():
        init = getattr(o["init"], "init", o["init"])  # of a Recipe
        if not isinstance(init, str) or init != "svd":
            shown = init if isinstance(init, str) else "(A, B)"
            raise ValueError(f'init: got {shown!r} together with basis, must be "svd"')
        rank, recipe = found.modules[found.find(name)]
        if o["rank"] != rank:
            raise ValueError(f"rank: got {o['rank']} for module {name!r}, must be {rank} as in the basis file {path}")
        o["init"] = replace(recipe, name=name)
    return found


@torch.inference_mode(False)  # or R could never train, nor take the values of a file
@torch.no_grad()
def install(
    model: M,
    options: Mapping[str, Mapping[str, Any]],
    modules_to_save: Sequence[str],
    basis: Basis | None = None,
    **compute: Any,
) -> M:
    """Adapt the named modules, each with its own options of LoraXSLinear.from_linear; all of them or none.

    compute: options of `factor`.
    """
    check_unadapted(model)
    modules = dict(model.named_modules())
    trainable_before = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, m in modules.items():  # what an earlier `attach` froze, whose adapters `detach` took off part by part
        if attachment := m.__dict__.get("loraxs"):
            trainable_before |= {f"{name}.{each}".removeprefix(".") for each in attachment.trainable_before}
    layers: dict[int, LoraXSLinear] = {}
    with transaction(model):
        for name in options:
            layers[id(modules[name])] = LoraXSLinear.from_linear(modules[name], name=name, fill=False, **options[name])
        places = [(m, key, layers[id(c)]) for m in modules.values() for key, c in m._modules.items() if id(c) in layers]
        for parent, child_name, _ in places:
            _check_called(parent, child_name)
        fill(model, list(layers.values()), basis, **compute)
        for parent, child_name, layer in places:
            parent._modules[child_name] = layer
        settle_fast_paths(model)
        model.requires_grad_(False)
        for module in model.modules():
            module.__dict__.pop("loraxs", None)
        for layer in layers.values():
            layer.R.requires_grad_(True)
        for name in modules_to_save:
            saved = model.get_submodule(name)
            for p in saved.parameters():
                with torch.inference_mode(p.is_inference()):  # of a model that was made in inference mode
                    p.requires_grad_(True)
            before = (each for each, _ in saved.named_parameters() if f"{name}.{each}" in trainable_before)
            saved.loraxs = Attachment(("",), frozenset(before))
        model.loraxs = Attachment(tuple(modules_to_save), frozenset(trainable_before))
        pretrained.prepare(model)
    return model


def _check_called(parent: nn.Module, name: str) -> None:
    """ValueError where a parent would go on calling a child that is replaced."""
    if name == "_orig_mod":
        raise ValueError(
            f"model: a {type(parent._modules[name]).__name__} is compiled by itself, and would still be called in the "
            "place of what replaces it; take torch.compile off that layer, or compile the block that contains it"
        )


def check_not_in_ddp(model: nn.Module) -> None:
    """ValueError for a model that is wrapped for several ranks already: gradients of a new R would not be averaged."""
    for m in model.modules():
        if isinstance(m, nn.parallel.DistributedDataParallel) or type(m).__name__ == "DeepSpeedEngine":
            raise ValueError(
                f"model: is inside a {type(m).__name__}, which averages the gradients of the parameters that it has "
                "found when it was made, and of no R that comes later; must be wrapped after its adapters are put on"
            )


def _check_loaded_by_all() -> None:
    """ValueError where transformers loads the weights of a model on one rank only, for accelerate's FSDP."""
    dist = torch.distributed
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if ranks > 1 and all(os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t") for name in names):
        raise ValueError(
            "FSDP_CPU_RAM_EFFICIENT_LOADING: got true, by which only one rank has the weights, must be false, since "
            "each makes A and B from them: set cpu_ram_efficient_loading=false in Trainer's fsdp_config or accelerate's"
        )


def fill(model: nn.Module, layers: Sequence[LoraXSLinear], basis: Basis | None = None, **compute: Any) -> None:
    """Make A, B and R of a model's new layers: A and B from the basis file, or by the SVD, all together."""
    check_not_in_ddp(model)
    fsdp = parallel.below_fsdp(model)
    if not fsdp and os.environ.get("FSDP_VERSION") != "1" and any(each.recipe.init == "svd" for each in layers):
        _check_loaded_by_all()
    parallel.check(((layer.label, layer.base_layer) for layer in layers), fsdp)
    first: dict[tuple, LoraXSLinear] = {}  # a weight that two layers share is factored once
    others: list[tuple[LoraXSLinear, LoraXSLinear]] = []
    for layer in layers:
        if layer.A.is_meta:
            continue
        if layer.recipe.init != "svd":
            layer.reset_parameters()
        elif basis is not None:
            there = basis.find(layer.recipe.name)
            layer.reset_parameters(basis.read(there, weight_of(layer.base_layer, layer.label), layer.label))
        else:
            # Only a parameter that the layer holds is the same object for as long: a property may make a new one.
            # What a registered reader makes of it is known to be one layer's alone.
            held = None if registered_reader(layer.base_layer) else layer.base_layer._parameters.get("weight")
            whose = id(layer.base_layer if held is None else held)
            key = whose, type(layer.base_layer), layer.rank, replace(layer.recipe, name="")
            if first.setdefault(key, layer) is not layer:
                others.append((layer, first[key]))
    made = list(first.values())
    jobs = [Job(each.label, weight_of(each.base_layer, each.label), each.rank, each.recipe) for each in made]
    factor(jobs, lambda i, A, B: made[i].set_factors(A, B), **compute)
    for layer in made:
        layer.reset_R()  # only now: it comes from the host and looks at A and B, and each would have waited for the GPU
    for layer, like in others:
        layer.reset_parameters((like.A, like.B))
    for layer in layers:
        layer.shares = parallel.shares(layer.base_layer, fsdp)


def warn_of_zeros(layers: Iterable[LoraXSLinear], stacklevel: int) -> None:
    """Say that new adapters would never train, since A has only zeros, if there are any such."""
    if idle := [layer.label for layer in layers if not (layer.A.is_meta or layer.A.any())]:
        others = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        warnings.warn(
            f"model: A has only zeros in {idle[0]}{others}, as it has where the weight has: the adapter has no effect "
            "there, and its R does not train. Load the weights before the adapters are put on, or leave such layers "
            "out (exclude_modules)",
            stacklevel=stacklevel,
        )


def detach(model: M, *, merge: bool = False) -> M:
    """Take the adapters off, in place: every base layer is back as it was, and trains again if it did before.

    modules_to_save keep their trained values.  Other parameters that `attach` froze train again only if you pass the
    model that you passed to `attach`, and not a part of it.

    Args:
        model: with adapters from `attach`.
        merge: first add each adapter to its weight, W + s B R A.  All merged weights are computed before the first one
            takes its place, so that nothing is lost if one of them cannot be computed; meanwhile memory holds a second
            copy of the adapted weights.  A module that shares a weight with an adapted layer keeps the weight without
            the adapter.  If the adapted head of a transformers model was tied to its embeddings,
            config.tie_word_embeddings becomes False.

    If the model is merged when you call this, say which weights you want: merge=True keeps the merged ones; call
    `unmerge` first to get the original ones.

    Returns `model`.  Raises ValueError if a merged weight would not be finite, if the model is merged and merge is
    False, or if an adapted layer has hooks; TypeError if a base layer has no dense weight to merge into, or has hooks
    that change its input or a forward of its own.  The model is then as it was.  Forward hooks of a base layer get its
    output with the adapter in it.
    """
    adapted = list(adapted_layers(model))
    if name := next((name for name, layer in adapted if layer.seat is not None), None):
        raise ValueError(
            f"model: module {name!r} belongs to a bank of adapters; detach(model) of the bank takes it off"
        )
    if not merge and any(layer.merged for _, layer in adapted):
        raise ValueError(
            "merge: the adapters are merged; detach(model, merge=True) keeps the merged weights, "
            "unmerge(model) before detach gives the original ones back"
        )
    for name, layer in adapted:
        if hooks := hooks_of(layer):
            raise ValueError(
                f"model: module {name!r} has a hook, or a forward of its own, {hooks[0]}, that would be gone with the "
                "adapter; remove it, detach, and put it on the layer that is there then"
            )
    if isinstance(model, LoraXSLinear):
        raise ValueError("model: is itself a LoraXSLinear; its base_layer is what detach would give back")
    with transaction(model) as undo:
        if merge:
            untied = []
            for module in model.modules():
                if configs := pretrained.tying(module):
                    untied.append(embeddings(module, "output").base_layer)
                for config in configs:
                    undo.callback(setattr, config, "tie_word_embeddings", True)
                    config.tie_word_embeddings = False
            for _, layer in adapted:
                layer.merge_to_be(called=True)
            for _, layer in adapted:
                layer.base_layer.weight = nn.Parameter(layer.weight.contiguous(), requires_grad=False)
            for head in untied:  # its bias may be tied, too, and would be saved by its other name alone
                if head.bias is not None:
                    head.bias = nn.Parameter(head.bias.detach().clone(), head.bias.requires_grad)
        for parent in list(model.modules()):
            for child_name, child in list(parent._modules.items()):
                if isinstance(child, LoraXSLinear):
                    _check_called(parent, child_name)
                    parent._modules[child_name] = child.base_layer
                    for name, p in child.base_layer.named_parameters() if child._trained is not None else ():
                        p.requires_grad_(name in child._trained)
        settle_fast_paths(model)
        for module in reversed(list(model.modules())):  # the record of the whole model is the one that counts
            if attachment := module.__dict__.pop("loraxs", None):
                whole = tuple(each and f"{each}." for each in attachment.modules_to_save)
                for name, p in module.named_parameters():  # what came to the model later is left as it is
                    if (before := name in attachment.trainable_before) or name.startswith(whole):
                        p.requires_grad_(before)
            pretrained.unmark(module)
    what = "added to the weights and taken off" if merge else "taken off"
    logger.info("detach: %d adapters %s", len(adapted), what)
    return model


def merge(model: M) -> M:
    """Put W + s B R A in the place of every adapted weight W, so that the model runs at the speed of the base model.

    The original weights are kept, so that memory holds two copies of the adapted weights; `unmerge` restores them to
    the bit.  While the model is merged, the state dict of every adapted layer holds only its merged weight and bias,
    without A, B and R: save_pretrained writes what from_pretrained loads.  Where the adapted head of a transformers
    model was tied to its embeddings, the state dict has two different tensors for them, of which load_state_dict of a
    model that ties them keeps one: make that model with tie_word_embeddings=False.

    Returns `model`.  Raises ValueError, naming the layer, if a merged weight would not be finite; TypeError if a base
    layer has no dense weight, or has hooks or a forward of its own: it is not called while merged.  The model is then
    as it was.
    """
    adapted = [*adapted_layers(model)]
    with transaction(model):
        for _, layer in adapted:
            layer.merge()
    logger.info("merge: %d adapters added to the weights", len(adapted))
    return model


def unmerge(model: M) -> M:
    """Undo `merge`: restore the original weights, to the bit, with separate adapters.  Returns `model`."""
    adapted = [*adapted_layers(model)]
    with transaction(model):
        for _, layer in adapted:
            layer.unmerge()
    logger.info("unmerge: %d adapters beside the original weights again", len(adapted))
    return model
