"""How many parameters LoRA-XS trains on a model, or would on that of a configuration, beside LoRA and VeRA.

What trains, summed over the adapted layers with W (N, K), as the LoRA-XS paper counts it (arXiv 2405.17604; its
equations 5 and 6 are LoRA's and VeRA's, for square weights):

    LoRA-XS   r^2         R
    LoRA      r (N + K)   both factors
    VeRA      N + r       a vector on each side of a pair of factors that all layers share
"""

from __future__ import annotations

import copy
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .linear import LoraXSLinear
from .matching import (
    adapted_layers,
    base_name,
    check_patterns,
    check_unadapted,
    choose,
    embeddings,
    is_inside,
    no_adapter,
    pattern_value,
    saved_modules,
    stacked_experts,
    unwrapped,
)
from .naming import FLOATS, aliases, as_dtype, first_line, kinds, label_of
from .recipe import check_rank
from .weights import is_linear, is_unread_linear, weight_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = {"loraxs": "LoRA-XS", "lora": "LoRA", "vera": "VeRA"}

EXPERTS = "experts, stacked in one parameter"

MOST_MODULES = 300_000  # in a model; the largest mixtures of experts have a third of that
# If a configuration names no class, the first of these that knows it is taken.  Encoders come before the decoders that
# most of them can also be built as.
HEADS = ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: what there is, and what each method trains on the same modules at the same ranks.

    modules: how many layers are adapted.
    base: all parameters of the model without adapters, shared ones once, quantised weights by their N x K.
    loraxs, lora, vera: what the adapters train, without `saved`.
    saved: of modules_to_save, which train whole beside any of them.
    """

    modules: int
    base: int
    loraxs: int
    lora: int
    vera: int
    saved: int

    def nbytes(self, dtype: torch.dtype | str = torch.float32, method: str = "loraxs") -> int:
        """Bytes of one adapter's trained numbers, `saved` included, in a dtype.

        method: "loraxs", "lora" or "vera", else ValueError.  A file of `save_adapter` holds r + 8 fp32 numbers a module
        and a header more, for the check when it is loaded.
        """
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, must be one of {', '.join(METHODS)}")
        return (getattr(self, method) + self.saved) * as_dtype("dtype", dtype, FLOATS).itemsize


@aliases(r="rank")
def count_parameters(
    model: nn.Module | PretrainedConfig,
    rank: int | None = None,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> Parameters:
    """Count the parameters that `attach` would train on a model, and those of LoRA and VeRA on the same modules.

        config = AutoConfig.from_pretrained("mistralai/Mistral-7B-v0.1")
        lx.count_parameters(config, 16).loraxs  # 57,344

    Args:
        model: an nn.Module on any device (the meta device, too), or a transformers configuration.  The model of a
            configuration is made on the meta device: of the first class in its `architectures` that transformers has,
            otherwise with a language model's head (masked, sequence-to-sequence or causal), otherwise without a head.
            Nothing is allocated, changed or downloaded.  If the model has adapters, these are counted: then leave out
            the other arguments.
        rank, target_modules, exclude_modules, rank_pattern, modules_to_save: as in `attach`; target_modules None:
            "all-linear".

    Returns the numbers of parameters as attributes: `loraxs`, `lora` and `vera` that the adapters train, `saved` in
    modules_to_save, `base` in the whole model without adapters; and `modules`, how many layers are adapted.  Its
    `nbytes(dtype, method)` is the size of one adapter.

    Raises TypeError or ValueError if `attach` with init="svd" would for these arguments, if a model with adapters is
    counted with other arguments, or if transformers cannot make a model of the configuration.
    """
    if not isinstance(model, nn.Module):
        model = from_config(model)
    model = unwrapped(model)
    adapted = [m for m in model.modules() if isinstance(m, LoraXSLinear)]
    if adapted:
        asked = dict(rank=rank, target_modules=target_modules, exclude_modules=exclude_modules)
        asked |= dict(rank_pattern=rank_pattern, modules_to_save=modules_to_save)
        for argument, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{argument}: got {value!r} for a model with LoRA-XS adapters, which are counted as they are; "
                    "leave it out, or lx.detach(model) first"
                )
        layers = [(layer.out_features, layer.in_features, layer.rank) for layer in adapted]
        saved = saved_modules(model)
    else:
        if rank is None:
            raise ValueError("rank: must be given, because the model has no LoRA-XS adapters to count")
        check_unadapted(model)
        check_patterns(rank_pattern=rank_pattern)
        targets = "all-linear" if target_modules is None else target_modules

        def rank_of(name: str) -> int:
            return pattern_value(rank_pattern, name, rank)

        names, saved, _ = choose(model, targets, exclude_modules, modules_to_save, rank_of)
        layers = []
        for name in names:
            N, K = weight_of(model.get_submodule(name), label_of(name)).shape
            r = rank_of(name)
            check_rank(r, label_of(name), (N, K))
            layers.append((N, K, r))
    sizes = _sizes(model)
    of_adapters = {id(p) for layer in adapted for p in _trained(layer)}
    return Parameters(
        modules=len(layers),
        base=sum(size for p, size in sizes.items() if p not in of_adapters),
        loraxs=sum(sizes[p] for p in of_adapters) if adapted else sum(r * r for _, _, r in layers),
        lora=sum(r * (N + K) for N, K, r in layers),
        vera=sum(N + r for N, _, r in layers),
        saved=sum(sizes[p] for p in {id(p) for name in saved for p in model.get_submodule(name).parameters()}),
    )


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; `str` of it is one line.

    ranks: {name of an adapted module: its rank}.
    skipped: {name of a linear layer that has no adapter: why}.
    R: how many parameters of the adapters train.  beside: {name of a module: how many of its parameters train, too}.
    total: all parameters of the model, those of the adapters included; a quantised weight counts N x K.
    """

    ranks: Mapping[str, int]
    skipped: Mapping[str, str]
    R: int
    beside: Mapping[str, int]
    total: int

    @property
    def trainable(self) -> int:
        """How many parameters train in all."""
        return self.R + sum(self.beside.values())

    def __str__(self) -> str:
        linear = len(self.ranks) + sum(why != EXPERTS for why in self.skipped.values())
        ranks = sorted(set(self.ranks.values()))
        line = f"{len(self.ranks)} of {linear} linear layers have an adapter "
        line += f"({kinds(self.ranks)}) "
        line += f"of rank {', '.join(map(str, ranks))}; {self.trainable:,} of {self.total:,} parameters train: "
        line += ", ".join([f"{self.R:,} in R", *_counts(self.beside)])
        alike = defaultdict(list)
        for name, why in self.skipped.items():
            alike[name.rpartition(".")[2], why].append(name)
        left = [
            f"{names[0] if len(names) == 1 else f'{len(names)} {kind}'} ({why})" for (kind, why), names in alike.items()
        ]
        return line + (f"; no adapter: {', '.join(left)}" if left else "")


def summary(model: nn.Module) -> Summary:
    """Say which layers of a model have adapters and which do not, with the reasons, and how many parameters train.

        print(lx.summary(model))

    `attach` logs the same at level INFO.  No weight is read.  Raises ValueError if the model has no adapters from
    `attach`.
    """
    model = unwrapped(model)
    adapted, saved, sizes = dict(adapted_layers(model)), saved_modules(model), _sizes(model)
    own = {id(p) for layer in adapted.values() for p in _trained(layer)}
    beside: Counter[str] = Counter()
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in own:
            whole = next((each for each in saved if is_inside(base_name(name), [each])), None)
            beside[whole or name.rpartition(".")[0] or name] += sizes[id(p)]
    return Summary(
        ranks={name: layer.rank for name, layer in adapted.items()},
        skipped=_skipped(model, adapted, saved),
        R=sum(sizes[id(p)] for layer in adapted.values() for p in _trained(layer) if p.requires_grad),
        beside=dict(beside),
        total=sum(sizes.values()),
    )


def _skipped(model: nn.Module, adapted: Mapping[str, LoraXSLinear], saved: Sequence[str]) -> dict[str, str]:
    """The linear layers without an adapter, and why."""
    inside = {id(m) for layer in adapted.values() for m in layer.modules()}
    trained = {id(m) for name in saved for m in model.get_submodule(name).modules()}
    output, refused, skipped = embeddings(model, "output"), no_adapter(model), {}
    for parent_name, parent in model.named_modules():
        for child, m in parent._modules.items():
            if m is None or id(m) in inside or not (is_linear(m) or is_unread_linear(m)):
                continue
            inside.add(id(m))
            if id(m) in trained:
                why = "trains whole"
            elif m is output:
                why = "the output embeddings"
            elif is_unread_linear(m):
                why = f"a {type(m).__name__}, see lx.register_weight_reader"
            else:
                why = refused.get(id(m), "not a target")
            skipped[f"{parent_name}.{child}".removeprefix(".")] = why
    return skipped | dict.fromkeys(stacked_experts(model), EXPERTS)


def _counts(numbers: Mapping[str, int]) -> list[str]:
    """ "2,310 in classifier" for each module, the first three of them."""
    shown = [f"{n:,} in {name}" for name, n in numbers.items()]
    rest = sum([*numbers.values()][3:])
    return shown[:3] + ([f"{rest:,} in {len(shown) - 3} more modules"] if rest else [])


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, as PEFT does, and in a second line what trains beside R, if anything does.

    A quantised weight counts with the number of elements of its dense shape.  A shared parameter counts once.  Raises
    ValueError if the model has no adapters from `attach`.
    """
    found = summary(model)
    share = 100 * found.trainable / found.total
    print(f"trainable params: {found.trainable:,} || all params: {found.total:,} || trainable%: {share:.4f}")
    if found.beside:
        print(f"beside R: {', '.join(_counts(found.beside))}")


def from_config(config: PretrainedConfig) -> nn.Module:
    """The model of a transformers configuration on the meta device; see `count_parameters`."""
    transformers = sys.modules.get("transformers")  # without which there is no configuration of its
    if transformers is None or not isinstance(config, transformers.PretrainedConfig):
        raise TypeError(f"model: got a {type(config).__name__}, must be an nn.Module or a transformers configuration")
    named = config.architectures if isinstance(config.architectures, (list, tuple)) else ()
    kinds = [_model_class(transformers, name) for name in named]
    for mapping in (*(f"MODEL_FOR_{head}_MAPPING" for head in HEADS), "MODEL_MAPPING"):
        if type(config) in (known := getattr(transformers, mapping)):
            kinds.append(known[type(config)])
    kind = next((k[0] if isinstance(k, tuple) else k for k in kinds if k is not None), None)
    what = f"the configuration of a {config.model_type or 'nameless'!r} model"
    if kind is None:
        raise ValueError(f"model: got {what}, for which transformers has no class; build the model and pass it")
    made, thread = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        if threading.get_ident() == thread and (made := made + 1) > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_MODULES:,} modules")

    counting = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))  # a model may write into its configuration
            model.tie_weights()  # which transformers 5.0 leaves out on the meta device
            return model
    except Exception as error:  # sizes that do not fit each other fail as they like in there
        why = first_line(error)
        raise ValueError(f"model: got {what}, from which no {kind.__name__} can be made: {why}") from error
    finally:
        counting.remove()


def _model_class(transformers: ModuleType, name: str) -> type[nn.Module] | None:
    """The model's class of this name; a configuration may name anything else that the package has."""
    try:
        found = getattr(transformers, name, None)
    except Exception:  # whatever the import of a module raises
        return None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _trained(layer: LoraXSLinear) -> list[nn.Parameter]:
    """R of an adapter, or what its parametrization makes R of."""
    return [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]


def _sizes(model: nn.Module) -> dict[int, int]:
    """{id of a parameter: how many numbers it stands for}; a packed or sharded weight holds fewer."""
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    for module in model.modules():
        if is_linear(module) and (weight := module._parameters.get("weight")) is not None:
            try:
                N, K = weight_of(module).shape
            except TypeError:
                continue
            sizes[id(weight)] = N * K
    return sizes
