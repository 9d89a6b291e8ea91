"""LoRA-XS on a whole model, in place: attach, detach, merge, unmerge."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import parallel
from .accounting import summary
from .basis import Factors
from .basis_file import Basis, read_basis
from .factors import WORKSPACE, WORKSPACE_IN_BYTES, Job, compute_devices, factor, workspace_bytes
from .fast_path import settle_fast_paths
from .linear import LoraXSLinear
from .matching import adapted_layers, choose, embeddings, pattern_value, unwrapped
from .naming import Former, aliases
from .transaction import transaction
from .weights import weight_of

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger(__package__)


@dataclass(frozen=True)
class Attachment:
    """What `attach` leaves on the model (as `model.loraxs`) for `detach` and for adapter files."""

    modules_to_save: tuple[str, ...]
    trainable_before: frozenset[str]


def _pretends(model: nn.Module) -> bool:
    """Whether `attach` has marked a quantised model as transformers marks one that has PEFT's adapters.

    Trainer refuses to train a quantised model without that mark.
    """
    return model.__dict__.get("_hf_peft_config_loaded", False) and not hasattr(model, "peft_config")


def _is_quantised_for_training(model: nn.Module) -> bool:
    """Whether transformers has quantised the model, in a way in which it can be trained through."""
    trainable = getattr(getattr(model, "hf_quantizer", None), "is_trainable", False)
    return trainable and getattr(model, "is_quantized", False) and hasattr(model, "_hf_peft_config_loaded")


def _teach_saving(model: nn.Module) -> None:
    """Make `save_pretrained` know adapters, in the classes that define it for the model and for what it is a part of.

    Each class is changed once, and nothing is left on the model, so that copies of it save themselves.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    for kind in {type(module) for module in model.modules()} | {getattr(modeling, "PreTrainedModel", nn.Module)}:
        owner = next((each for each in kind.__mro__ if "save_pretrained" in vars(each)), None)
        if owner is not None and not hasattr(owner.save_pretrained, "loraxs_knows_adapters"):
            owner.save_pretrained = _knowing_adapters(owner.save_pretrained)


def _knowing_adapters(save: Callable[..., Any]) -> Callable[..., Any]:
    """A `save_pretrained` that does as `save`, but warns where from_pretrained could not load what is saved."""

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        layers = [m for m in self.modules() if isinstance(m, LoraXSLinear)] if isinstance(self, nn.Module) else []
        if not layers:
            return save(self, *args, **options)
        given = next((each for each in (*args, options.get("state_dict")) if isinstance(each, Mapping)), None)
        if any("base_layer." in key for key in given) if given else not all(layer.merged for layer in layers):
            warnings.warn(
                "save_pretrained: the model has LoRA-XS adapters, and from_pretrained would put random weights in the "
                "place of every adapted layer. Save the adapter with lx.save_adapter(model, file) or, where the base "
                "layers are plain and dense, call lx.merge(model) first; in Trainer, LoraXSCallback saves R",
                stacklevel=2,
            )
        pretends, tying = _pretends(self), [config for config in _tying(self) if embeddings(self, "output").merged]
        if pretends:  # or transformers would look for PEFT's adapters and save those alone
            del self._hf_peft_config_loaded
        try:
            for config in tying:
                config.tie_word_embeddings = False
            return save(self, *args, **options)
        finally:
            for config in tying:
                config.tie_word_embeddings = True
            if pretends:
                self._hf_peft_config_loaded = True

    save_pretrained.loraxs_knows_adapters = True
    return save_pretrained


def _tying(model: nn.Module) -> list[Any]:
    """The configurations by which from_pretrained would tie an adapted head to the input embeddings again."""
    config = getattr(model, "config", None)
    head = embeddings(model, "output")
    if config is None or not isinstance(head, LoraXSLinear):
        return []
    weight = head.base_layer._parameters.get("weight")
    if sum(each is weight for m in model.modules() for each in m._parameters.values() if each is not None) > 2:
        return []  # an encoder's and a decoder's embeddings are tied by the same setting, and have to stay so
    of_text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return [each for each in (config, of_text) if getattr(each, "tie_word_embeddings", False)]


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
            embeddings.  In a transformers model for classification "all-linear" leaves out the head, too; all weights
            of the head then train, as if it were named in `modules_to_save`.
        exclude_modules: names, name endings or a regular expression of modules that get no adapter.
        rank_pattern, alpha_pattern: {regular expression for the end of a name: value}, as in PEFT.
        alpha: the scale is s = alpha / r; None: alpha = r, so s = 1 everywhere.  `lora_alpha` means the same.
        dropout, init_std, n_iter, dtype: as in LoraXSLinear.from_linear.
        init: "svd", "random", or {module name: (A, B)} with a pair for every target.
        seed: for all random numbers (the SVD's start, random A and B, R); each layer draws different ones.
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
        `model`.  A module or weight that is used in several places gets one adapter.  In a model inside the wrappers of
        torch.compile or DataParallel, names are those of the base model.  What was done is logged at level INFO by the
        logger "loraxs_kernels"; `lx.summary(model)` says the same at any time.

    Raises:
        TypeError, ValueError: an argument is wrong, or a layer cannot be adapted; the message names it.
        RuntimeError: a different rank could not read its weights or compute their SVD.
    After an error the model is as it was.
    """
    given, model = model, unwrapped(model)
    _check_unadapted(model)
    names, saved, idle = choose(model, target_modules, exclude_modules, modules_to_save)
    if idle:
        warnings.warn(
            f"modules_to_save: the head ({', '.join(idle)}) of this {type(model).__name__} will not train "
            f"and has no adapter. Pass modules_to_save={[*(modules_to_save or ()), *idle]} to train it whole, or [] to "
            "keep it as it is",
            stacklevel=3,  # past the wrapper of `aliases`
        )
    options: dict[str, dict[str, Any]] = {}
    for name in names:
        r = pattern_value(rank_pattern, name, rank)
        a = pattern_value(alpha_pattern, name, alpha)
        options[name] = {"rank": r, "alpha": a, "init": init}
        if not isinstance(init, str):
            if name not in init:
                raise ValueError(f"init: has no pair (A, B) for module {name!r}")
            options[name]["init"] = init[name]
        options[name] |= {"dropout": dropout, "init_std": init_std, "seed": seed, "n_iter": n_iter, "dtype": dtype}
    for argument, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        unused = [p for p in patterns or () if not any(pattern_value({p: True}, name, False) for name in names)]
        if unused:
            warnings.warn(f"{argument}: no adapted module matches {', '.join(map(repr, unused))}", stacklevel=3)
    opened = None if basis is None else basis_for(basis, options)
    devices = None if device is None else compute_devices(device)
    how = {"devices": devices, "workspace": workspace_bytes(workspace_gib), "progress": progress}
    install(model, options, saved, basis=opened, **how)
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


def install(
    model: M,
    options: Mapping[str, Mapping[str, Any]],
    modules_to_save: Sequence[str],
    *,
    basis: Basis | None = None,
    devices: Sequence[torch.device] | None = None,
    workspace: int = WORKSPACE,
    progress: bool = True,
) -> M:
    """Adapt the named modules, each with its own options of LoraXSLinear.from_linear; all of them or none."""
    _check_unadapted(model)
    modules = dict(model.named_modules())
    trainable_before = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, m in modules.items():  # what an earlier `attach` froze, whose adapters `detach` took off part by part
        if attachment := m.__dict__.get("loraxs"):
            trainable_before |= {f"{name}.{each}".removeprefix(".") for each in attachment.trainable_before}
    layers: dict[int, LoraXSLinear] = {}
    with transaction(model):
        for name in options:
            layers[id(modules[name])] = LoraXSLinear.from_linear(modules[name], name=name, fill=False, **options[name])
        fill(model, list(layers.values()), basis, devices, workspace, progress)
        for parent in modules.values():
            for child_name, child in list(parent._modules.items()):
                if id(child) in layers:
                    parent._modules[child_name] = layers[id(child)]
        settle_fast_paths(model)
        model.requires_grad_(False)
        for layer in layers.values():
            layer.R.requires_grad_(True)
        for name in modules_to_save:
            model.get_submodule(name).requires_grad_(True)
        model.loraxs = Attachment(tuple(modules_to_save), frozenset(trainable_before))
        for module in model.modules():
            if _is_quantised_for_training(module) and not module._hf_peft_config_loaded:
                module._hf_peft_config_loaded = True
        _teach_saving(model)
    return model


def _check_unadapted(model: nn.Module) -> None:
    """Refuse a model that has adapters, from here or through PEFT: new ones would nest, and freeze them."""
    for m in model.modules():
        if isinstance(m, LoraXSLinear):
            raise ValueError("model: already has LoRA-XS adapters; lx.detach(model) takes them off")
        if hasattr(m, "loraxs_R"):  # a layer of integrations.peft, told without importing it
            raise ValueError(
                "model: already has LoRA-XS adapters through PEFT; unload() or merge_and_unload() of the PeftModel "
                "gives a model without them"
            )
        if "base_layer" in m._modules and hasattr(m, "active_adapters"):
            raise ValueError(
                f"model: has adapters of PEFT (in a {type(m).__name__}); call merge_and_unload() or unload() first"
            )


def fill(
    model: nn.Module,
    layers: Sequence[LoraXSLinear],
    basis: Basis | None,
    devices: Sequence[torch.device] | None,
    workspace: int,
    progress: bool,
) -> None:
    """A, B and R of new layers for a model: from the basis file, or by the SVD, all together."""
    fsdp = parallel.below_fsdp(model)
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
            held = layer.base_layer._parameters.get("weight")
            whose = id(layer.base_layer if held is None else held)
            key = whose, type(layer.base_layer), layer.rank, replace(layer.recipe, name="")
            if first.setdefault(key, layer) is not layer:
                others.append((layer, first[key]))
    made = list(first.values())
    jobs = [Job(each.label, weight_of(each.base_layer, each.label), each.rank, each.recipe) for each in made]

    @torch.no_grad()
    def deliver(i: int, A: Tensor, B: Tensor) -> None:
        made[i].set_factors(A, B)

    factor(jobs, deliver, devices=devices, workspace=workspace, progress=progress)
    for layer in made:
        layer.reset_R()  # only now: it comes from the host, and each would have waited for the GPU
    for layer, like in others:
        layer.reset_parameters((like.A, like.B))
    for layer in layers:
        layer.shares = parallel.shares(layer.base_layer, fsdp)


def detach(model: M, *, merge: bool = False) -> M:
    """Take the adapters off, in place: every base layer is back as it was, and trains again if it did before.

    modules_to_save keep their trained values.

    Args:
        model: with adapters from `attach`.
        merge: first add each adapter to its weight, W + s B R A.  All merged weights are computed before the first one
            takes its place, so that nothing is lost if one of them cannot be computed; meanwhile memory holds a second
            copy of the adapted weights.  A module that shares a weight with an adapted layer keeps the weight without
            the adapter.  If the adapted head of a transformers model was tied to its embeddings,
            config.tie_word_embeddings becomes False.

    If the model is merged when you call this, say which weights you want: merge=True keeps the merged ones; call
    `unmerge` first to get the original ones.

    Returns `model`.  Raises ValueError if a merged weight would not be finite, or if the model is merged and merge is
    False; TypeError if a base layer has no dense weight to merge into.  The model is then as it was.
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
    if isinstance(model, LoraXSLinear):
        raise ValueError("model: is itself a LoraXSLinear; its base_layer is what detach would give back")
    with transaction(model) as undo:
        if merge:
            untied = []
            for module in model.modules():
                if configs := _tying(module):
                    untied.append(embeddings(module, "output").base_layer)
                for config in configs:
                    undo.callback(setattr, config, "tie_word_embeddings", True)
                    config.tie_word_embeddings = False
            for _, layer in adapted:
                layer.merge()
            for _, layer in adapted:
                layer.base_layer.weight = nn.Parameter(layer.weight.contiguous(), requires_grad=False)
            for head in untied:  # its bias may be tied, too, and would be saved by its other name alone
                if head.bias is not None:
                    head.bias = nn.Parameter(head.bias.detach().clone(), head.bias.requires_grad)
        for parent in list(model.modules()):
            for child_name, child in list(parent._modules.items()):
                if isinstance(child, LoraXSLinear):
                    child.unmerge()
                    parent._modules[child_name] = child.base_layer
        settle_fast_paths(model)
        for module in reversed(list(model.modules())):  # the record of the whole model is the one that counts
            if attachment := module.__dict__.pop("loraxs", None):
                for name, p in module.named_parameters():
                    p.requires_grad_(name in attachment.trainable_before)
            if _pretends(module):
                del module._hf_peft_config_loaded
    what = "added to the weights and taken off" if merge else "taken off"
    logger.info("detach: %d adapters %s", len(adapted), what)
    return model


def merge(model: M) -> M:
    """Put W + s B R A in the place of every adapted weight W, so that the model runs at the speed of the base model.

    The original weights are kept, so that memory holds two copies of the adapted weights; `unmerge` restores them to
    the bit.  While the model is merged, the state dict of every adapted layer holds only its merged weight and bias,
    without A, B and R: save_pretrained writes what from_pretrained loads.

    Returns `model`.  Raises ValueError, naming the layer, if a merged weight would not be finite; TypeError if a base
    layer has no dense weight.  The model is then as it was.
    """
    with transaction(model):
        for _, layer in (adapted := [*adapted_layers(model)]):
            layer.merge()
    logger.info("merge: %d adapters added to the weights", len(adapted))
    return model


def unmerge(model: M) -> M:
    """Undo `merge`: restore the original weights, to the bit, with separate adapters.  Returns `model`."""
    with transaction(model):
        for _, layer in (adapted := [*adapted_layers(model)]):
            layer.unmerge()
    logger.info("unmerge: %d adapters beside the original weights again", len(adapted))
    return model
