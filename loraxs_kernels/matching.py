"""Which modules of a model have an adapter, which ones target_modules means, as PEFT reads it, and which take none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .linear import LoraXSLinear
from .naming import label_of
from .reads import held_beside, read_or_asked
from .recipe import check_rank
from .weights import is_linear, is_unread_linear, unread, weight_of


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a regular expression matches the whole name, or the name is or ends with one of a list."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def is_inside(name: str, names: Iterable[str]) -> bool:
    """Whether a name is one of these, or that of a part of one of them."""
    return f"{name}.".startswith(tuple(f"{each}." for each in names))


def check_patterns(**given: Any) -> None:
    """TypeError or ValueError, naming the argument, for what is neither a regular expression nor names."""
    for argument, patterns in given.items():
        mapping = argument.endswith("_pattern")
        if mapping and not (patterns is None or isinstance(patterns, Mapping)):
            raise TypeError(f"{argument}: got {patterns!r}, must be a mapping from regular expressions to values")
        if not (patterns is None or isinstance(patterns, Collection)):  # a generator has its names only once
            raise TypeError(f"{argument}: got {patterns!r}, must be a list of names or a regular expression")
        for pattern in (patterns or ()) if mapping else [patterns] if isinstance(patterns, str) else ():
            try:
                re.compile(f"(.*)({pattern})" if mapping else pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"{argument}: got {pattern!r}, must be a regular expression: {error}") from error


def warn_of_unmatched(names: Collection[str], stacklevel: int, **given: str | Sequence[str] | None) -> None:
    """Warn, by argument, of a regular expression that matches none of the names, and of such entries of a list."""
    for argument, patterns in given.items():
        each = {patterns: patterns} if isinstance(patterns, str) else {entry: [entry] for entry in patterns or ()}
        unmatched = [key for key, own in each.items() if not any(matches(name, own) for name in names)]
        if unmatched and not is_everything(patterns):
            warnings.warn(f"{argument}: no module matches {', '.join(sorted(unmatched))}", stacklevel=stacklevel)


def targets_for(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The target_modules by which PEFT finds these modules and no others: the last parts of their names if that is
    enough, else the names, else a regular expression."""
    inside = tuple(f"{name}." for name in names)
    there = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in there if matches(name, candidate)} == set(names):
            return candidate
    return "|".join(re.escape(name) for name in names)


def choose(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    modules_to_save: Sequence[str] | None,
    rank_of: Callable[[str], int] | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """The names of the modules to adapt, of those that train whole, and of a head that does neither; see `attach`.

    rank_of: gives the rank of the SVD of a module of that name, for which "all-linear" leaves out small layers.
    """
    saved, head = names_to_save(model, modules_to_save or ()), classification_head(model)
    everything, keeps = is_everything(target_modules), modules_to_save is not None and not modules_to_save
    if everything and not keeps:
        saved += [name for name in head if name not in saved]
    names = match(model, target_modules, exclude_modules, [*saved, *head] if everything else saved, rank_of)
    idle = []
    for name in () if keeps else head:
        parts = [
            f"{name}.{n}".rstrip(".")
            for n, m in model.get_submodule(name).named_modules()
            if any(True for _ in m.parameters(recurse=False))
        ]
        left = [p for p in parts if not is_inside(p, [*saved, *names])]
        idle += [name] if left == parts else left
    return names, saved, idle


def match(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    without: Sequence[str] = (),
    rank_of: Callable[[str], int] | None = None,
) -> list[str]:
    """The names of the modules that `target_modules` means in this model, none of those in `without`; see `attach`.

    Raises TypeError for a match that is no linear layer or one that cannot be read, ValueError for no match at all.  A
    list entry that matches nothing is a warning, since lists are shared between architectures, and so are layers that
    "all-linear" has to leave out.
    """
    if target_modules is None:
        raise TypeError('target_modules: got None, must be "all-linear", names or a regular expression')
    check_patterns(target_modules=target_modules, exclude_modules=exclude_modules)
    modules = dict(model.named_modules())
    everything = is_everything(target_modules)
    without = {id(m) for name in without for m in model.get_submodule(name).modules()}
    head = embeddings(model, "output")
    refused = no_adapter(model)
    names, unsuited, small = [], [], {}
    for name, module in modules.items():
        if not name or id(module) in without or (exclude_modules and matches(name, exclude_modules)):
            continue
        if everything:
            if module is head or not (is_linear(module) or is_unread_linear(module)):
                continue
            if why := unread(module) if is_unread_linear(module) else refused.get(id(module)):
                unsuited.append((name, why))
                continue
        elif not matches(name, target_modules):
            continue
        elif is_unread_linear(module):
            raise TypeError(f"target_modules: matches module {name!r}, {unread(module)}")
        elif not is_linear(module):
            raise TypeError(
                f"target_modules: matches module {name!r}, a {type(module).__name__}; must match only linear layers"
            )
        elif why := refused.get(id(module)):
            raise TypeError(f"target_modules: matches module {name!r} {why}")
        names.append(name)
        if everything and rank_of and (why := too_small(name, module, rank_of(name))):
            small[name] = why
            continue
        # An adapter inside this layer would have a name that a model without adapters does not have.
        refused |= {id(m): f"inside {name!r}, which has an adapter itself" for m in module.modules() if m is not module}
    if len(small) < len(names):  # else the rank is wrong
        names = [name for name in names if name not in small]
        unsuited += small.items()
    if not names and unsuited:
        name, why = unsuited[0]
        raise TypeError(f"target_modules: 'all-linear' finds only layers such as {name!r}, {why}")
    if not names:
        linear = [name for name, m in modules.items() if name and is_linear(m)]
        if is_linear(model) and not linear:
            raise ValueError(
                f"model: is itself a {type(model).__name__}, must contain the layers to adapt; "
                "LoraXSLinear.from_linear(layer, rank) adapts one layer"
            )
        shown = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:12]) or "none"
        if exclude_modules:
            shown += f"; exclude_modules {exclude_modules!r} may leave out all that it matches"
        raise ValueError(
            f"target_modules: got {target_modules!r}, which matches no module of the model; its linear layers: {shown}"
        )
    warn_of_unmatched(modules, 6, target_modules=target_modules, exclude_modules=exclude_modules)
    if everything:
        warn_of_left_out(model, unsuited, stacklevel=6)
    return names


def too_small(name: str, layer: nn.Module, rank: int) -> str | None:
    """Why a layer has no SVD of this rank, as the end of a sentence; None: it has."""
    check_rank(rank, label_of(name))
    N, K = weight_of(layer, label_of(name)).shape
    if rank <= min(N, K):
        return None
    return f"of shape {N} x {K}, too small for rank {rank}, and stays frozen (modules_to_save would train it whole)"


def classification_head(model: nn.Module) -> list[str]:
    """The names of what transformers models for classification have beside their backbone, by the names of their class.

    Such a head is seldom pretrained: its random weights are not worth a basis, and have to train.
    """
    names = []
    for prefix, m in model.named_modules():  # asked by type: wrappers of PEFT 0.18 that have no adapter yet raise
        if not (hasattr(type(m), "base_model_prefix") and any(map(_CLASSIFIES.search, _names(m)))):
            continue
        backbone = getattr(m, m.base_model_prefix, None)
        bodies = [c for c in m.children() if any(hasattr(type(each), "base_model_prefix") for each in c.modules())]
        bodies = bodies if backbone is None else [backbone]
        names += [
            f"{prefix}.{name}".removeprefix(".")
            for name, child in m.named_children()
            if not any(child is body for body in bodies)
            and (any(True for _ in child.parameters()) if bodies else is_linear(child))
        ]
    return names


def warn_of_idle_head(model: nn.Module, idle: Sequence[str], saved: Sequence[str] | None, stacklevel: int) -> None:
    """Say that parts of a classification head neither train nor have an adapter, if there are any."""
    if idle:
        warnings.warn(
            f"modules_to_save: the head ({', '.join(idle)}) of this {type(model).__name__} will not train "
            f"and has no adapter. Pass modules_to_save={[*(saved or ()), *idle]} to train it whole, or [] to "
            "keep it as it is",
            stacklevel=stacklevel,
        )


_CLASSIFIES = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|SentencePrediction|Regression|CTC|XVector)"
)


def is_everything(target_modules: str | Sequence[str]) -> bool:
    """Whether target_modules is "all-linear"."""
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def stacked_experts(model: nn.Module) -> list[str]:
    """The experts whose weights are stacked in one parameter, as in transformers 5: no linear layers."""
    return [
        name
        for name, m in model.named_modules()
        if "experts" in type(m).__name__.lower() and any(p.dim() == 3 for p in m._parameters.values() if p is not None)
    ]


def warn_of_left_out(model: nn.Module, layers: Sequence[tuple[str, str]], stacklevel: int) -> None:
    """Say that "all-linear" leaves out stacked experts and layers that take no adapter (their names, and why)."""
    if stacked := stacked_experts(model):
        others = f" and {len(stacked) - 1} more" if len(stacked) > 1 else ""
        warnings.warn(
            f"target_modules: 'all-linear' leaves out {stacked[0]}{others}, experts whose weights are stacked in one "
            "parameter; LoRA-XS adapts linear layers",
            stacklevel=stacklevel,
        )
    if layers:
        (name, why), plural = layers[0], "s"[: len(layers) - 1]
        warnings.warn(
            f"target_modules: 'all-linear' leaves out {len(layers)} layer{plural} that cannot be adapted; the first, "
            f"{name!r}, is {why}",
            stacklevel=stacklevel,
        )


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module: the first pattern that matches the end of its name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def names_to_save(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """The names of the modules that modules_to_save means; every entry must match."""
    if isinstance(endings, str) or not isinstance(endings, Collection):
        raise TypeError(f"modules_to_save: got {endings!r}, must be a list of module names")
    names = [name for name, _ in model.named_modules() if name and matches(name, endings)]
    for ending in endings:
        if not any(matches(name, [ending]) for name in names):
            raise ValueError(f"modules_to_save: no module of the model is named {ending!r}")
    return names


# Linear layers whose weight the model changes without calling them: RwkvModel rescales these in eval mode.
_CHANGED_BY_MODEL = {"output": "RwkvSelfAttention", "value": "RwkvFeedForward"}

# Classes derived from nn.Linear whose forward is no linear map from (..., K) to (..., N).
_NO_LINEAR_MAP = {"Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear"}


def no_adapter(model: nn.Module) -> dict[int, str]:
    """{id of a linear layer that takes no adapter: why not, as the end of a sentence that begins with its name}."""
    around = held_beside(model) | read_or_asked(model)
    found = {}
    for parent in model.modules():
        for name, layer in parent._modules.items():
            if layer is None or not is_linear(layer):
                continue
            of = f"of a {type(parent).__name__}, "
            if _NO_LINEAR_MAP & _names(layer):
                found[id(layer)] = f"{of}a {type(layer).__name__}, whose forward is no linear map"
            elif _CHANGED_BY_MODEL.get(name) in _names(parent):
                found[id(layer)] = (
                    f"{of}whose weight the model rescales in eval mode: the delta of an adapter would not be rescaled"
                )
            elif id(layer) in around:
                found[id(layer)] = around[id(layer)]
    return found


# Types of transformers models whose layers get (length, samples, features), or samples in parts of others.
_SEQUENCE_FIRST = {"xlnet", "longformer", "led", "fsmt", "bros"}
_SEQUENCE_FIRST |= {"mask2former", "oneformer", "omdet-turbo", "mlcd", "mlcd_vision_model"}
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def why_not_mixed(model: nn.Module) -> str | None:
    """Why the samples of a batch cannot have different adapters in a model with adapters; None: no reason is known.

    Some layers get the rows of several samples in an order that the shape of x does not show.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _SEQUENCE_FIRST:
        return f"a model of type {kind} has layers whose first dimension is not the batch"
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            why = "gives each expert tokens of any samples"
        elif isinstance(module, _TORCH_LAYERS) and not module.self_attn.batch_first:
            why = "has batch_first=False, so that its first dimension is not the batch"
        else:
            continue
        if any(isinstance(m, LoraXSLinear) or is_peft_layer(m) for m in module.modules()):
            return f"module {name!r} {why}"
    return None


def _names(module: nn.Module | None) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def check_unadapted(model: nn.Module) -> None:
    """Refuse a model that has adapters, from here or through PEFT: new ones would nest, and freeze them."""
    for m in model.modules():
        if isinstance(m, LoraXSLinear):
            raise ValueError("model: already has LoRA-XS adapters; lx.detach(model) takes them off")
        if is_peft_layer(m):
            raise ValueError(
                "model: already has LoRA-XS adapters through PEFT; unload() or merge_and_unload() of the PeftModel, or "
                "delete_adapter(name) of a transformers model, gives a model without them"
            )
        if "base_layer" in m._modules and hasattr(m, "active_adapters"):
            raise ValueError(
                f"model: has adapters of PEFT (in a {type(m).__name__}); call merge_and_unload() or unload() first"
            )


def embeddings(model: nn.Module, which: str) -> nn.Module | None:
    """The "input" or "output" embeddings of a transformers model, where it has any."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:  # what transformers says where there are none, as in models for speech
        return None


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraXSLinear]]:
    """Every LoraXSLinear of a model with its base name, in order, each once.

    ValueError if there are none, TypeError for what is no module.
    """
    unwrapped(model)  # raises
    found = [(base_name(name), m) for name, m in model.named_modules() if isinstance(m, LoraXSLinear)]
    if not found and any(map(is_peft_layer, model.modules())):
        raise ValueError("model: its LoRA-XS adapters are PEFT's; must be from lx.attach(model, ...)")
    if not found:
        raise ValueError("model: has no LoRA-XS adapters; lx.attach(model, ...) puts them on")
    yield from found


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has LoraXSLinear layers."""
    return any(isinstance(m, LoraXSLinear) for m in model.modules())


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters of integrations.peft, which is not imported."""
    return hasattr(module, "loraxs_R")


# Modules around a whole model, by the names of their packages and classes, and where they hold it.
_WRAPPERS = {
    "torch.OptimizedModule": "_orig_mod",
    "torch.AveragedModel": "module",
    "torch.DataParallel": "module",
    "torch.DistributedDataParallel": "module",
    "lightning._FabricModule": "_original_module",
    "lightning_fabric._FabricModule": "_original_module",
    "deepspeed.DeepSpeedEngine": "module",
    "opacus.AbstractGradSampleModule": "_module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all `_WRAPPERS`, which has the base model's names.

    TypeError for what is no module, such as the name of a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {repr(model)[:80]}, must be an nn.Module")
    while True:
        kinds = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__]
        held = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
        if held not in model._modules:
            return model
        model = model._modules[held]


def saved_modules(model: nn.Module) -> list[str]:
    """The modules_to_save, by their names in this model, whichever part of it, or whole around it, was attached to."""
    attached = [(name, m.__dict__["loraxs"]) for name, m in model.named_modules() if "loraxs" in m.__dict__]
    names = (base_name(f"{name}.{saved}".strip(".")) for name, a in attached for saved in a.modules_to_save)
    return list(dict.fromkeys(names))


def by_base_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model by each of its names, as they are where no part of it is compiled or checkpointed."""
    return {base_name(name): m for name, m in model.named_modules(remove_duplicate=False)}  # a wrapper's content last


def base_name(name: str) -> str:
    """The name that a module or tensor of a model has where no part of the model is compiled or checkpointed."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))
