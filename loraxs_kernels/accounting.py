"""How many parameters LoRA-XS trains on a model, beside LoRA and VeRA: from shapes alone, before anything is loaded.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .linear import LoRAXSLinear, check_rank, label_of
from .matching import choose, pattern_value
from .naming import aliases, as_dtype
from .weights import FLOATS, is_linear, weight_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = {"loraxs": "LoRA-XS", "lora": "LoRA", "vera": "VeRA"}

MOST_MODULES = 300_000  # of a model; the largest mixtures of experts have a third of that
# Of a configuration that names no class: the first of these that knows it.  Encoders come before the decoders that
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
    """How many parameters `attach` would train on a model, and LoRA and VeRA on the same modules.

        config = AutoConfig.from_pretrained("mistralai/Mistral-7B-v0.1")
        lx.count_parameters(config, 16).loraxs  # 57,344

    Args:
        model: an nn.Module, on the meta device or any other, or a transformers configuration, whose model is made on
            the meta device: by the first of its `architectures` that transformers has, else with the head of its kind
            (masked, sequence-to-sequence or causal language model), else without one.  Nothing is allocated, changed
            or downloaded.  A model that has adapters is counted as it is: leave out all that follows.
        rank, target_modules, exclude_modules, rank_pattern, modules_to_save: as in `attach`; target_modules None:
            "all-linear".

    Raises TypeError or ValueError where `attach` would with init="svd", where a model with adapters comes with
    arguments for others, and where transformers can make no model of the configuration.
    """
    if not isinstance(model, nn.Module):
        model = from_config(model)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoRAXSLinear)}
    if adapted:
        asked = dict(rank=rank, target_modules=target_modules, exclude_modules=exclude_modules)
        asked |= dict(rank_pattern=rank_pattern, modules_to_save=modules_to_save)
        for argument, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{argument}: got {value!r} for a model with LoRA-XS adapters, which are counted as they are; "
                    "leave it out, or lx.detach(model) first"
                )
        layers = [(layer.out_features, layer.in_features, layer.rank) for layer in adapted.values()]
        saved = [
            submodule.get_submodule(name)
            for submodule in model.modules()
            if "loraxs" in submodule.__dict__
            for name in submodule.loraxs.modules_to_save
        ]
    else:
        if rank is None:
            raise ValueError("rank: must be given, because the model has no LoRA-XS adapters to count")
        targets = "all-linear" if target_modules is None else target_modules
        names, saved, _ = choose(model, targets, exclude_modules, modules_to_save)
        saved = [model.get_submodule(name) for name in saved]
        layers = []
        for name in names:
            N, K = weight_of(model.get_submodule(name), label_of(name)).shape
            r = pattern_value(rank_pattern, name, rank)
            check_rank(r, label_of(name), (N, K))
            layers.append((N, K, r))
    sizes = _sizes(model)
    of_adapters = {id(p) for layer in adapted.values() for p in _trained(layer)}
    return Parameters(
        modules=len(layers),
        base=sum(size for p, size in sizes.items() if p not in of_adapters),
        loraxs=sum(sizes[p] for p in of_adapters) if adapted else sum(r * r for _, _, r in layers),
        lora=sum(r * (N + K) for N, K, r in layers),
        vera=sum(N + r for N, _, r in layers),
        saved=sum(sizes[p] for p in {id(p) for module in saved for p in module.parameters()}),
    )


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
        raise ValueError(f"model: got {what}, of which transformers has no class; build it and hand in the module")
    made, thread = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        if threading.get_ident() == thread and (made := made + 1) > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_MODULES:,} modules")

    counting = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))  # which models write to
    except Exception as error:  # sizes that do not fit each other fail as they like in there
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"model: got {what}, of which no {kind.__name__} can be made: {why}") from error
    finally:
        counting.remove()


def _model_class(transformers: ModuleType, name: str) -> type[nn.Module] | None:
    """The model's class of this name; a configuration may name anything else that the package has."""
    try:
        found = getattr(transformers, name, None)
    except Exception:  # as the import of a module raises
        return None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _trained(layer: LoRAXSLinear) -> list[nn.Parameter]:
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
