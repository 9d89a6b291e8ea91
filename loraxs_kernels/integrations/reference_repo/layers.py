"""From the reference's layers to those of our PEFT method: a whole model, or the tensors of a state dict."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ...acceptance import AdapterMismatch, aligned
from ...basis import ACCEPT, ALIGNED, probes, singular_values
from ...linear import LoraXSLinear
from ...matching import targets_for
from ...naming import dtype_name
from ...recipe import Recipe
from ...transaction import transaction
from ...weights import weight_of
from .keys import part

if TYPE_CHECKING:
    from peft import PeftModel

    from ..peft import LoraXSLinearLayer

P = TypeVar("P", bound="PeftModel")


def replace_reference_layers(model: P) -> P:
    """Turn a PeftModel that the reference has initialised, trained or not, into one of our PEFT method, in place.

    The layers are faster and need less memory.  The adapter's type becomes LORAXS, so PEFT treats it as what it is:
    save_pretrained writes R with its A and B (init="given"), and A and B stay frozen after disable_adapter(), while
    those of the reference would train.  A, R, B, base layers, scales and modules_to_save stay as they are.  Every R
    is the same Parameter as before, so an optimizer keeps its state.  There is one exception: an R in half precision
    is converted to fp32, in place, and needs a new optimizer.

    Returns `model`.

    Raises TypeError or ValueError, naming the module, if a LoRA layer was not initialised by the reference, or is
    merged, inactive or shared; if there are other adapters than "default"; or if LoRA has options that the reference's
    forward ignores.  The model is then as it was.
    """
    from peft.utils import _get_submodules

    from ..peft import LoraXSConfig, LoraXSLinearLayer, LoraXSModel

    if LoraXSModel.tuner_layer_cls is not LoraXSLinearLayer:
        raise ValueError("model: the installed PEFT has its own method LORAXS, must be a PEFT without one")
    layers = _reference_layers(model)
    inner, lora = model.get_base_model(), model.peft_config["default"]
    adapters = {name: _as_adapter(layer, name, lora.lora_dropout) for name, layer in layers.items()}
    trained = [(p, p.requires_grad) for p in inner.parameters()]
    with transaction(model) as undo:
        del inner.peft_config
        for name, layer in layers.items():
            parent, _, child = _get_submodules(inner, name)
            parent._modules[child] = layer.base_layer
        config = _as_loraxs(LoraXSConfig, inner, lora, adapters)
        tuner = LoraXSModel(inner, {"default": config}, "default")
        config.modules_to_save = lora.modules_to_save  # only now: their wrappers are there already
        for name, adapter in adapters.items():
            layer = inner.get_submodule(name)
            layer.discard("default")
            layer.add("default", adapter, config)
            R = layers[name].default_lora_latent_mapping.weight
            undo.callback(_set, R, R.data, R.grad)
            _set(R, adapter.R.data, None if R.grad is None else R.grad.to(adapter.R.dtype))
            layer.loraxs_R["default"] = R
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)
        tuner.training = model.base_model.training
        model.base_model, model.peft_type = tuner, config.peft_type
    return model


def _set(R: Tensor, data: Tensor, grad: Tensor | None) -> None:
    R.grad = None  # which must be of the dtype of the data
    R.data = data
    R.grad = grad


@torch.no_grad()
def translate(state_dict: dict[str, Tensor], layers: Mapping[str, LoraXSLinearLayer], *, whole_model: bool) -> None:
    """Put the reference's A, R and B in a state dict under the keys of our PEFT method's layers, in place.

    An adapter with save_factors=True takes all three.  Any other keeps its own A and B, and R is converted to them, as
    `load_reference_adapter` does with factors="recompute".  Without such keys nothing happens.

    Args:
        state_dict: what torch loads, its own copy of the caller's.
        layers: by their names in the state dict; keys of other modules are left alone.
        whole_model: whether these are all layers of the model, so that the state dict must have R for each, and for
            no other module.

    Raises ValueError if a layer's three tensors are not all there or do not fit, or if the layer has several adapters;
    AdapterMismatch if delta W would change because the adapter keeps its own A and B.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key in state_dict:
        if at := part(key):
            found.setdefault(at[0], []).append((at[1], key))
    with_R = {name for name, parts in found.items() if "R" in dict(parts)}
    if whole_model and with_R and (other := sorted(with_R ^ layers.keys())):
        what = "has an adapter, but no R in the state dict"
        if other[0] not in layers:
            what = "has an R in the state dict, but no adapter"
        raise ValueError(
            f"module {other[0]!r}: {what}; the model must have the target_modules that the reference's checkpoint was "
            "trained with"
        )
    for name in sorted(found.keys() & layers.keys()):
        layer, label = layers[name], f"module {name!r}"
        if sorted(letter for letter, _ in found[name]) != ["A", "B", "R"]:
            raise ValueError(
                f"{label}: the state dict has {sorted(key.removeprefix(f'{name}.') for _, key in found[name])}, must "
                "have lora_A, lora_B and default_lora_latent_mapping (R), as the reference saves them: each is useless "
                "without the other two"
            )
        if len(layer.loraxs_R) != 1:
            raise ValueError(
                f"{label}: has the adapters {list(layer.loraxs_R)}, must have one: the reference's keys do not "
                "say which adapter they are for"
            )
        (adapter,) = layer.loraxs_R
        if adapter not in layer.loraxs_R._parameters:
            raise ValueError(f"{label}: a parametrization makes R; remove it before loading the reference's keys")
        if f"{name}.loraxs_R.{adapter}" in state_dict:
            raise ValueError(f"{label}: the state dict has R by the reference's key and by PEFT's; must have one")
        own = {letter: getattr(layer, f"loraxs_{letter}")[adapter] for letter in "ARB"}
        new = {letter: state_dict.pop(key) for letter, key in found[name]}
        A, R, B = (new[letter] for letter in "ARB")
        shapes, must = ([tuple(t.shape) for t in each] for each in ((A, R, B), own.values()))
        if shapes != must:
            raise ValueError(f"{label}: A, R and B of the state dict have shapes {shapes}, must have {must}")
        if not all(torch.isfinite(t).all() for t in (A, R, B)):
            raise ValueError(f"{label}: A, R or B of the state dict has NaN or Inf values")
        if adapter in layer.loraxs_A._non_persistent_buffers_set:
            entry = new | {"S": singular_values(A), "probe": probes(A, R, B)}
            R, error = aligned(entry, own["A"], own["B"])
            if error > ALIGNED:
                raise AdapterMismatch(
                    f"{label}: R of the state dict gives another delta W with the A and B of this adapter than with "
                    f"those it was trained with (estimated relative error {error:.1e}). To load A and B as well, set "
                    "save_factors=True in the adapter's config, or make the model by replace_reference_layers"
                )
            if error > ACCEPT:
                warnings.warn(f"{label}: the estimated relative error of delta W is {error:.1e}", stacklevel=2)
            new, A, B = {"R": R}, own["A"], own["B"]
        for letter, t in new.items():
            state_dict[f"{name}.loraxs_{letter}.{adapter}"] = t.to(own[letter].dtype)
        if adapter not in layer.loraxs_fingerprint._non_persistent_buffers_set:
            fingerprint = torch.cat([singular_values(A), probes(A, R, B)])
            state_dict[f"{name}.loraxs_fingerprint.{adapter}"] = fingerprint


def _reference_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The reference's layers by the names of the base model's modules; TypeError or ValueError for any other model."""
    from peft import PeftModel
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel) or not isinstance(model.base_model, lora.LoraModel):
        raise TypeError(
            f"model: got a {type(model).__name__}, must be a PeftModel with LoRA, as get_peft_model makes it"
        )
    if list(model.peft_config) != ["default"]:
        raise ValueError(f"model: has the adapters {list(model.peft_config)}, must have only 'default'")
    config = model.peft_config["default"]
    for option in ("use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters"):
        if getattr(config, option, None):
            raise ValueError(f"model: is LoRA with {option}={getattr(config, option)!r}, which the reference ignores")
    if config.bias != "none":
        raise ValueError(f"model: is LoRA with bias={config.bias!r}, must be 'none' as the reference has it")
    inner = model.get_base_model()
    places = Counter(id(m) for _, m in inner.named_modules(remove_duplicate=False))
    layers = {}
    for name, layer in inner.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not lora.Linear or not hasattr(layer, "default_lora_latent_mapping"):
            raise ValueError(
                f"module {name!r}: is a {type(layer).__name__} of PEFT without R (default_lora_latent_mapping); the "
                "reference must have initialised every adapted layer of the model"
            )
        if layer.merged:
            raise ValueError(f"module {name!r}: is merged; call model.unmerge_adapter() first")
        if layer.disable_adapters or list(layer.active_adapters) != ["default"]:
            raise ValueError(
                f"module {name!r}: its adapter is disabled or not active; call model.set_adapter('default') first"
            )
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        (r, K), N = A.shape, B.shape[0]
        R, shape = layer.default_lora_latent_mapping.weight, weight_of(layer.base_layer, f"module {name!r}").shape
        if B.shape[1] != r or tuple(R.shape) != (r, r) or shape != (N, K):
            raise ValueError(
                f"module {name!r}: A, R and B have shapes {tuple(A.shape)}, {tuple(R.shape)} and {tuple(B.shape)}, "
                f"which do not fit its weight of {shape[0]} x {shape[1]}"
            )
        if places[id(layer.base_layer)] > 1:
            raise ValueError(
                f"module {name!r}: also stands in another place of the model, where PEFT has not adapted it; our PEFT "
                "method would adapt both places"
            )
        layers[name] = layer
    return layers


def _as_adapter(layer: nn.Module, name: str, dropout: float) -> LoraXSLinear:
    """The reference's layer as a LoraXSLinear with the same tensors, except that R is in fp32 at least."""
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    R = layer.default_lora_latent_mapping.weight.detach()
    R = R.to(torch.promote_types(torch.promote_types(R.dtype, A.dtype), torch.float32))
    rank, s, alpha = R.shape[0], layer.scaling["default"], layer.lora_alpha["default"]
    alpha = alpha if alpha / rank == s else s * rank  # rsLoRA, a scale that was set
    recipe = Recipe("given", name=name)
    return LoraXSLinear(
        layer.base_layer, A.contiguous(), R, B.contiguous(), alpha=alpha, dropout=dropout, recipe=recipe
    )


def _as_loraxs(kind: type, inner: nn.Module, lora: Any, adapters: Mapping[str, LoraXSLinear]) -> Any:
    """The LoraXSConfig of these adapters, with init="given"."""
    (rank, alpha), _ = Counter((a.rank, a.alpha) for a in adapters.values()).most_common(1)[0]
    dtypes = {a.A.dtype for a in adapters.values()}
    own = all(a.A.dtype == weight_of(a.base_layer).dtype for a in adapters.values())
    return kind(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(name)}": a.rank for name, a in adapters.items() if a.rank != rank},
        alpha_pattern={f"^{re.escape(name)}": a.alpha for name, a in adapters.items() if a.alpha != alpha},
        target_modules=targets_for(inner, list(adapters)),
        loraxs_dropout=lora.lora_dropout,
        init="given",
        save_factors=True,
        dtype=None if own else dtype_name(reduce(torch.promote_types, dtypes)),
        task_type=lora.task_type,
        base_model_name_or_path=lora.base_model_name_or_path,
        revision=lora.revision,
        inference_mode=lora.inference_mode,
    )
