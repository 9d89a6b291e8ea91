"""The reference implementation of LoRA-XS (MohammadrezaBanaei/LoRA-XS, a patch of PEFT's LoRA layers) and plain LoRA.

    load_reference_adapter      a checkpoint of the reference, into a base model
    replace_reference_layers    a model that the reference has initialised, to LoRA-XS as a PEFT method
    export_as_lora              an adapter, to a folder that PEFT, vLLM and whatever else knows LoRA read

The reference keeps A and B in lora_A and lora_B and puts R between them, as a module of the layer that PEFT does not
know.  PEFT saves it all the same, and loads such a checkpoint without R: as LoRA with delta B A, and without a word.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ..adapter_file import AdapterMismatch, fitted, saved_modules, saved_values
from ..basis import ACCEPT, ALIGNED, Recipe, align_by_factors, dtype_name, probes, residual, singular_values
from ..factors import WORKSPACE, compute_devices
from ..files import check_finite, damaged, read_json, write_atomically
from ..linear import LoRAXSLinear
from ..matching import matches, pattern_value
from ..model import adapted_layers, detach, install, unwrapped
from ..transaction import keep, transaction
from ..weights import FLOATS, is_conv1d, weight_of, whole

OTHER_WEIGHT = 0.5  # relative error of A = B^T W: about 0.1 on a base that was quantised since, about 1 on another one
PREFIX = "base_model.model."  # what PEFT puts before the names of a base model's modules
# What PEFT saves by the type of the task, too; up to 0.10, which the reference asks for, its config does not say so.
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
# The keys of A, B and R, a dot in front: of a saved adapter, of a model's state dict, and as the reference's scripts
# rename the ones to the others.  R of q_proj is q_proj_lora_latent_mapping.weight where PEFT up to 0.17 saved it, which
# took every ".default" for the adapter's name, and q_proj.default_lora_latent_mapping.weight since.
KEY = re.compile(r"(.*?)(?:\.lora_([AB])(?:\.[^.]+)?|(?:\.default)*_lora_latent_mapping)\.weight")

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", bound="PeftModel")
Part = tuple[str, nn.Module, Tensor, Tensor, Tensor, float]  # of a model: a layer's name, base layer, A, R, B and s

if TYPE_CHECKING:
    from peft import PeftModel

    from .peft import LoraXSLinearLayer


@dataclass(frozen=True)
class Trained:
    """One layer of a checkpoint: A (r, K), R (r, r), B (N, r) in its dtypes, and alpha = s r."""

    A: Tensor
    R: Tensor
    B: Tensor
    alpha: float


@torch.no_grad()
def load_reference_adapter(
    model: M,
    folder: str | os.PathLike,
    *,
    basis: str = "file",
    tolerance: float = ALIGNED,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    workspace: int = WORKSPACE,
    progress: bool = True,
) -> M:
    """Load a checkpoint of the reference implementation into the base model it was trained on, in place.

    Afterwards the model is as `attach` leaves one: LoRAXSLinear layers, of which R trains, and the modules_to_save of
    the checkpoint (a classifier head), with their values.

    Args:
        model: the plain base model, without PEFT around it.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin), as save_pretrained or the Trainer
            left them.  reconstr_config.json, there or one folder up, is read where it is.
        basis: "file": the A and B of the checkpoint, and its R as it is; they go into the files of `save_adapter`, too.
            "recompute": A' and B' from the SVD of the model's weights, and R' = B'^+ B R A A'^+, so that adapter files
            hold R alone.  With scikit-learn installed the SVD is the reference's own, on the CPU, and loading such a
            file needs scikit-learn too.  Where that does not give the checkpoint's A and B (other weights than it was
            trained on, or a model in bf16), the SVD is that of `attach`: the last vectors of the reference's have not
            converged, on the weights of real models often by more than the tolerance, and delta W changes by as much.
        tolerance: the largest relative error of delta W that may come of rounding A and B, or of another basis; it is
            estimated for every layer as adapter files do.  Above 1e-3 a warning gives it.
        dtype: of A and B; None: the weight's.  The reference trains A and B in fp32, which a model in bf16 rounds: a
            relative error of delta W of about 2e-3, less than that of W.  torch.float32 keeps them, at the cost of a
            separate pass.
        device, workspace, progress: of the SVD, as in `attach`.

    Raises:
        FileNotFoundError: there is no checkpoint.  ValueError: it is damaged, none of the reference's, or of another
        model.  The reference writes no checksum: a bit that has flipped in R, and leaves it finite, is not seen.
        AdapterMismatch: A is not B^T W, so that the base model is another, or the tolerance is exceeded.
        The model is then as it was.
    """
    if basis not in ("file", "recompute"):
        raise ValueError(f'basis: got {basis!r}, must be "file" or "recompute"')
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype: got {dtype}, must be bf16, fp16, fp32, fp64 or None")
    if any(isinstance(m, LoRAXSLinear) for m in model.modules()):
        raise ValueError("model: already has LoRA-XS adapters; lx.detach(model) takes them off")
    if hasattr(model, "get_base_model") or any("base_layer" in m._modules for m in model.modules()):
        raise ValueError(
            f"model: got a {type(model).__name__} with PEFT in it, must be the plain base model: this function adds "
            "the adapters itself. model.load_adapter(folder, 'default') loads a checkpoint of the reference into "
            "layers that replace_reference_layers has made"
        )
    folder = Path(folder)
    config, tensors = _read(folder)
    trained, others = _trained(config, tensors, folder)
    described = _described(folder)
    _check_base(model, trained, described, folder)
    saved = _modules_to_save(model, config, others, folder)
    try:
        head = saved_values(model, saved, others)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    dropout = _dropout(config, folder)
    devices = None if device is None else compute_devices(device)

    def errors_with(recipe: Recipe | None) -> dict[str, float]:
        """Attach with A and B by this recipe, or those of the checkpoint; the relative error of every delta W."""
        options = {
            name: {
                "rank": each.R.shape[0],
                "alpha": each.alpha,
                "dropout": dropout,
                "init": replace(recipe, name=name) if recipe else (each.A, each.B),
                "dtype": dtype,
            }
            for name, each in trained.items()
        }
        install(model, options, saved, devices=devices, workspace=workspace, progress=progress)
        errors = {}
        for name, layer in adapted_layers(model):
            each = trained[name]
            layer.R.copy_(_expressed(each, layer.A, layer.B) if recipe else each.R)
            errors[name] = residual(probes(each.A, each.R, each.B), layer.A, layer.R, layer.B)
        return errors

    with transaction(model) as undo:
        errors = None
        if basis == "recompute" and (recipe := _own_recipe(model, trained, described)):
            errors = errors_with(recipe)
            if not max(errors.values()) <= ACCEPT:
                detach(model)
                errors = None
        if errors is None:
            errors = errors_with(Recipe() if basis == "recompute" else None)
        worst = max(errors, key=errors.__getitem__)
        found = f"{folder}: the estimated relative error of delta W in module {worst!r} is {errors[worst]:.1e}"
        why = "its A and B are rounded to the model's dtype; dtype=torch.float32 keeps them"
        if basis == "recompute":
            why = 'A and B of this model\'s weights are not quite those it was trained on; basis="file" keeps them'
        if not errors[worst] <= tolerance:
            raise AdapterMismatch(f"{found}, more than the tolerance of {tolerance:.0e}: {why}")
        keep(undo, [target for target, _ in head])
        for target, value in head:
            target.copy_(value)
        if errors[worst] > ACCEPT and not (basis == "file" and dtype):
            warnings.warn(f"{found}: {why}", stacklevel=3)  # past torch.no_grad
    return model


def replace_reference_layers(model: P) -> P:
    """Turn a PeftModel that the reference has initialised, trained or not, into one of our PEFT method, in place.

    The layers get faster and need less memory, and become what PEFT takes them for: the type of the adapter is LORAXS,
    save_pretrained writes R with its A and B (init="given"), disable_adapter() leaves A and B frozen, where the
    reference's train afterwards.  A, R, B, base layers, scales and modules_to_save stay as they are.  Every R is the
    same Parameter as before, so that an optimizer and its state go on.  One in half precision is widened to fp32, in
    place, and needs a new optimizer.

    Raises TypeError or ValueError, naming the module, where a LoRA layer is not one of the reference's, is merged, not
    active or shared, where there is another adapter beside "default", or LoRA with options that the reference's
    forward leaves out.  The model is then as it was.
    """
    from peft.utils import _get_submodules

    from .peft import LoraXSConfig, LoraXSLinearLayer, LoraXSModel

    if LoraXSModel.tuner_layer_cls is not LoraXSLinearLayer:
        raise ValueError("model: this PEFT has a LORAXS of its own, whose layers are not ours to make")
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

    An adapter that keeps A and B in its file takes all three.  Any other keeps its own A and B, and R is expressed on
    them, as `load_reference_adapter` does with basis="recompute".  Nothing happens where the state dict has no such
    keys.

    Args:
        state_dict: what torch loads, its own copy of the caller's.
        layers: by their names in the state dict; keys of other modules are left alone.
        whole_model: whether these are all layers of the model, so that the state dict must have R for each, and for
            no other module.

    Raises ValueError where a layer's set is not whole, does not fit the adapter, or the layer has several adapters, and
    AdapterMismatch where R makes another delta W on the adapter's own A and B.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key in state_dict:
        if part := _part(key):
            found.setdefault(part[0], []).append((part[1], key))
    with_R = {name for name, parts in found.items() if "R" in dict(parts)}
    if whole_model and with_R and (other := sorted(with_R ^ layers.keys())):
        what = "has an adapter, but the state dict has no R"
        if other[0] not in layers:
            what = "the state dict has R, but the model no adapter"
        raise ValueError(
            f"module {other[0]!r}: {what} for it; a checkpoint of the reference is for a model with the same "
            "target_modules"
        )
    for name in sorted(found.keys() & layers.keys()):
        layer, label = layers[name], f"module {name!r}"
        if sorted(letter for letter, _ in found[name]) != ["A", "B", "R"]:
            raise ValueError(
                f"{label}: the state dict has {sorted(key.removeprefix(f'{name}.') for _, key in found[name])}, must "
                "have lora_A, lora_B and default_lora_latent_mapping (R), as the reference saves them: R means nothing "
                "without its exact A and B, and LoRA without R is no LoRA-XS"
            )
        if len(layer.loraxs_R) != 1:
            raise ValueError(
                f"{label}: has the adapters {list(layer.loraxs_R)}, must have one to load the reference's keys into, "
                "which do not say which adapter they are for"
            )
        (adapter,) = layer.loraxs_R
        if adapter not in layer.loraxs_R._parameters:
            raise ValueError(f"{label}: a parametrization makes its R; remove it before loading the reference's keys")
        if f"{name}.loraxs_R.{adapter}" in state_dict:
            raise ValueError(f"{label}: the state dict has R both as the reference and as LoRA-XS in PEFT spells it")
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
            R, error = fitted(entry, own["A"], own["B"])
            if error > ALIGNED:
                raise AdapterMismatch(
                    f"{label}: on the adapter's own A and B, R of the state dict makes another delta W than on those "
                    f"it was trained with (estimated relative error {error:.1e}). Adapters that take A and B have "
                    "save_factors=True in their config; replace_reference_layers makes such"
                )
            if error > ACCEPT:
                warnings.warn(f"{label}: the estimated relative error of delta W is {error:.1e}", stacklevel=2)
            new, A, B = {"R": R}, own["A"], own["B"]
        for letter, t in new.items():
            state_dict[f"{name}.loraxs_{letter}.{adapter}"] = t.to(own[letter].dtype)
        if adapter not in layer.loraxs_fingerprint._non_persistent_buffers_set:
            fingerprint = torch.cat([singular_values(A), probes(A, R, B)])
            state_dict[f"{name}.loraxs_fingerprint.{adapter}"] = fingerprint


@torch.no_grad()
def export_as_lora(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    task_type: str | None = None,
    adapter: str = "default",
) -> None:
    """Write the adapters of a model as plain LoRA: a folder with adapter_config.json and adapter_model.safetensors.

        lora_A = A (r x K),  lora_B = s B R (N x r),  lora_alpha = r

    in every layer, so that LoRA's own scaling is 1 and the delta is s B R A, also to readers that know no rank_pattern.
    What trains from there is LoRA: such a folder has no R.

    Args:
        model: with LoRAXSLinear layers of any init, or a PeftModel with our PEFT method; merged or not.  Where FSDP2
            has sharded R, every rank must call.
        folder: made where it is missing; files in it of these names are replaced, each in one step, the config last.
            If that is stopped in between, no reader takes the folder: it is never half of one adapter and half of
            another.
        dtype: of lora_A and lora_B; None: fp32 (fp64 for fp64 layers), which keeps delta W to rounding.  bf16 is half
            the size at a relative error of delta W of about 2e-3.  s B R is made in fp64 either way.
        task_type: as in PEFT ("CAUSAL_LM", "SEQ_CLS", ...), for AutoPeftModel and the like; None: a PeftModel's own,
            else none.
        adapter: which one of a PeftModel.

    PEFT need not be installed.  Raises ValueError, before anything is written, where the model has no adapters or a
    factor is not finite in that dtype.
    """
    model = unwrapped(model)
    if isinstance(model, LoRAXSLinear):
        raise ValueError("model: is itself a LoRAXSLinear, must have such layers below it")
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        layers, saved = _parts_of_peft(model, adapter)
        task_type = task_type or model.peft_config[adapter].task_type
        write_lora(model.get_base_model(), folder, layers, saved, dtype=dtype, task_type=task_type)
        return
    layers = [
        (name, layer.base_layer, layer.A, layer.R, layer.B, layer.scaling) for name, layer in adapted_layers(model)
    ]
    saved = {name: model.get_submodule(name).state_dict(keep_vars=True) for name in saved_modules(model)}
    write_lora(model, folder, layers, saved, dtype=dtype, task_type=task_type)


@torch.no_grad()
def write_lora(
    model: nn.Module,
    folder: str | os.PathLike,
    layers: Iterable[Part],
    saved: Mapping[str, Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    task_type: str | None = None,
) -> None:
    """`export_as_lora` of adapters and modules_to_save (name: state dict), whatever holds them.

    The names are those of the base model's modules, which `model.named_modules()` gives.
    """
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype: got {dtype}, must be bf16, fp16, fp32, fp64 or None")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file, must be a folder or not there")
    tensors, ranks, conv1d = {}, {}, False
    for name, base, A, R, B, s in layers:
        to = dtype or torch.promote_types(A.dtype, torch.float32)
        factors = A, s * B.double() @ whole(R).double()
        for which, t in zip("AB", factors, strict=True):
            t = t.to("cpu", to, copy=True).contiguous()
            if not torch.isfinite(t).all():
                raise ValueError(f"module {name!r}: lora_{which} has NaN or Inf values in {to}; nothing was written")
            tensors[f"{PREFIX}{name}.lora_{which}.weight"] = t
        ranks[name] = A.shape[0]
        conv1d |= is_conv1d(base)
    for name, state in saved.items():
        tensors |= {f"{PREFIX}{name}.{key}": whole(t).to("cpu", copy=True).contiguous() for key, t in state.items()}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) in ranks and first[id(module)] != name:
            raise ValueError(
                f"module {first[id(module)]!r} is also module {name!r}; PEFT would put plain LoRA on one of the two"
            )
    rank = max(ranks.values())  # the largest, so that readers that know no rank_pattern make room enough
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model, list(ranks)),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    data, text = safetensors.torch.save(tensors, {"format": "pt"}), json.dumps(config, indent=2).encode()
    file = folder / "adapter_config.json"
    before = file.read_bytes() if file.is_file() else text
    if before != text:  # that of another adapter would be read with the new weights, if this were stopped in between
        write_atomically(file, b'{"unfinished": "export_as_lora was writing here"}')
    try:
        write_atomically(folder / "adapter_model.safetensors", data)
    except BaseException:
        if before != text:
            write_atomically(file, before)
        raise
    write_atomically(file, text)


def _parts_of_peft(model: PeftModel, adapter: str) -> tuple[list[Part], dict[str, dict[str, Tensor]]]:
    """The layers of one adapter of our PEFT method and its modules_to_save."""
    layers: list[Part] = []
    saved = {}
    for name, m in model.get_base_model().named_modules():
        if adapter in getattr(m, "loraxs_R", ()):
            m.check_fingerprints([adapter])  # of what was loaded and not used yet
            A, R, B = m.loraxs_A[adapter], m.loraxs_R[adapter], m.loraxs_B[adapter]
            layers.append((name, m.base_layer, A, R, B, m.scaling[adapter]))
        elif isinstance(wrapped := getattr(m, "modules_to_save", None), nn.ModuleDict) and adapter in wrapped:
            saved[name] = wrapped[adapter].state_dict()
    if not layers:
        raise ValueError(f"model: has no LoRA-XS adapter {adapter!r} of our PEFT method")
    if (bias := model.peft_config[adapter].bias) != "none":
        raise ValueError(f"model: adapter {adapter!r} trains biases (bias={bias!r}), which are not written")
    return layers, saved


def _reference_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The reference's layers by the names of the base model's modules, after everything that could be in the way."""
    from peft import PeftModel
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel) or not isinstance(model.base_model, lora.LoraModel):
        raise TypeError(
            f"model: got a {type(model).__name__}, must be a PeftModel with LoRA, as get_peft_model makes it"
        )
    if list(model.peft_config) != ["default"]:
        raise ValueError(f"model: has the adapters {list(model.peft_config)}, must have 'default' alone")
    config = model.peft_config["default"]
    for option in ("use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters"):
        if getattr(config, option, None):
            raise ValueError(f"model: is LoRA with {option}={getattr(config, option)!r}, which the reference has not")
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
                f"module {name!r}: is a {type(layer).__name__} of PEFT without R (default_lora_latent_mapping), must "
                "be a layer that the reference has initialised, as every adapted layer of the model"
            )
        if layer.merged:
            raise ValueError(f"module {name!r}: is merged; model.unmerge_adapter() first")
        if layer.disable_adapters or list(layer.active_adapters) != ["default"]:
            raise ValueError(
                f"module {name!r}: its adapter is disabled or not active; model.set_adapter('default') first"
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
                f"module {name!r}: stands in another place of the model, too, where PEFT has not adapted it; LoRA-XS "
                "as a PEFT method would adapt both"
            )
        layers[name] = layer
    return layers


def _as_adapter(layer: nn.Module, name: str, dropout: float) -> LoRAXSLinear:
    """The reference's layer as one of ours, with the same tensors, R in fp32 at least."""
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    R = layer.default_lora_latent_mapping.weight.detach()
    R = R.to(torch.promote_types(torch.promote_types(R.dtype, A.dtype), torch.float32))
    rank, s, alpha = R.shape[0], layer.scaling["default"], layer.lora_alpha["default"]
    alpha = alpha if alpha / rank == s else s * rank  # rsLoRA, a scale that was set
    recipe = Recipe("given", name=name)
    return LoRAXSLinear(
        layer.base_layer, A.contiguous(), R, B.contiguous(), alpha=alpha, dropout=dropout, recipe=recipe
    )


def _as_loraxs(kind: type, inner: nn.Module, lora: Any, adapters: Mapping[str, LoRAXSLinear]) -> Any:
    """The configuration of the same adapters as a PEFT method, in which A and B are given."""
    (rank, alpha), _ = Counter((a.rank, a.alpha) for a in adapters.values()).most_common(1)[0]
    dtypes = {a.A.dtype for a in adapters.values()}
    own = all(a.A.dtype == weight_of(a.base_layer).dtype for a in adapters.values())
    return kind(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(name)}": a.rank for name, a in adapters.items() if a.rank != rank},
        alpha_pattern={f"^{re.escape(name)}": a.alpha for name, a in adapters.items() if a.alpha != alpha},
        target_modules=_target_modules(inner, list(adapters)),
        loraxs_dropout=lora.lora_dropout,
        init="given",
        save_factors=True,
        dtype=None if own else dtype_name(reduce(torch.promote_types, dtypes)),
        task_type=lora.task_type,
        base_model_name_or_path=lora.base_model_name_or_path,
        revision=lora.revision,
        inference_mode=lora.inference_mode,
    )


def _target_modules(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """What means these modules and no others to PEFT: last parts of names if they do, else names, else a pattern."""
    inside = tuple(f"{name}." for name in names)
    there = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in there if matches(name, candidate)} == set(names):
            return candidate
    return "|".join(re.escape(name) for name in names)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a checkpoint, on the CPU."""
    weights = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    file = next((each for each in weights if each.is_file()), None)
    if file is None or not (folder / "adapter_config.json").is_file():
        what = "adapter_model.safetensors or adapter_model.bin" if file is None else "adapter_config.json"
        raise FileNotFoundError(f"folder: {folder} has no {what}")
    config = _json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: is of PEFT's type {config.get('peft_type')!r}, the reference's are of 'LORA'")
    return config, read_tensors(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of PEFT's weights, a safetensors file or a .bin, on the CPU; nothing in them is run.

    Raises ValueError, naming the file, where it is not whole, or holds something that is no dense tensor, or not
    finite.
    """
    try:
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            tensors = safetensors.torch.load_file(file)
    except Exception as error:  # of a dozen kinds, by where the damage is
        raise ValueError(f"{file}: is not a whole file of tensors ({error or type(error).__name__})") from error
    if not isinstance(tensors, dict):
        damaged(file, f"it holds a {type(tensors).__name__}, no state dict")
    for key, t in tensors.items():
        if not isinstance(key, str) or type(t) not in (Tensor, nn.Parameter):
            damaged(file, f"{key!r} is a {type(t).__name__}, no tensor")
        if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu":
            damaged(file, f"tensor {key!r} is no dense tensor")
        check_finite(t, file, f"tensor {key!r}")
    return tensors


def _json(file: Path) -> dict[str, Any]:
    return read_json(file.read_bytes(), str(file))


def _trained(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Trained], dict[str, Tensor]]:
    """A, R, B by the names of the base model's modules, and all other tensors by theirs."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, t in tensors.items():
        key = key.removeprefix(PREFIX)
        if part := _part(key):
            name, letter = part
            if letter in found.setdefault(name, {}):
                raise ValueError(f"{folder}: has {letter} for module {name!r} twice, in two spellings")
            found[name][letter] = t
        else:
            others[key] = t
    if not any("R" in each for each in found.values()):
        raise ValueError(f"{folder}: has no R (lora_latent_mapping); a plain LoRA adapter is for PEFT to load")
    trained = {}
    for name, each in found.items():
        if missing := sorted(set("ARB") - set(each)):
            raise ValueError(
                f"{folder}: has no {' and '.join(missing)} for module {name!r}; R means nothing without its exact A "
                "and B, which an SVD of today need not give again. Take the file as the reference saved it, with all"
            )
        A, R, B = (each[letter] for letter in "ARB")
        r = A.shape[0] if A.dim() == B.dim() == 2 else 0
        if r < 1 or B.shape[1] != r or tuple(R.shape) != (r, r):
            shapes = ", ".join(str(tuple(t.shape)) for t in (A, R, B))
            raise ValueError(f"{folder}: A, R and B of module {name!r} have shapes {shapes}, which do not fit")
        if any(t.dtype not in FLOATS for t in (A, R, B)):
            kinds = ", ".join(str(t.dtype) for t in (A, R, B))
            raise ValueError(
                f"{folder}: A, R and B of module {name!r} are of {kinds}, must be bf16, fp16, fp32 or fp64"
            )
        trained[name] = Trained(A, R, B, _alpha(config, name, r, folder))
    return trained, others


def _part(key: str) -> tuple[str, str] | None:
    """The layer's name and "A", "R" or "B", where the key is of one of the reference's tensors."""
    match = KEY.fullmatch(f".{key}")
    return match and (match[1][1:], match[2] or "R")


def _alpha(config: dict[str, Any], name: str, rank: int, folder: Path) -> float:
    """alpha = s r for a layer of this rank; s by the configuration's numbers, which PEFT goes by."""
    try:
        r = pattern_value(config.get("rank_pattern"), name, config["r"])
        alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
        alpha = alpha * rank / (math.sqrt(r) if config.get("use_rslora") else r)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}")
        return alpha
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError, re.error, RecursionError) as error:
        raise ValueError(f"{folder}: adapter_config.json does not say r and lora_alpha ({error!r})") from error


def _dropout(config: dict[str, Any], folder: Path) -> float:
    p = config.get("lora_dropout", 0.0)
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"{folder}: lora_dropout in adapter_config.json is {p!r}, must be in [0, 1)")
    return float(p)


def _described(folder: Path) -> dict[str, Any] | None:
    """reconstr_config.json, where it is."""
    places = [each / "reconstr_config.json" for each in (folder, folder.resolve().parent)]
    return next((_json(file) for file in places if file.is_file()), None)


def _random(described: dict[str, Any] | None) -> bool:
    """Whether A and B are random ones, in part or whole."""
    return any((described or {}).get(key) for key in ("replacement_module_random_init", "half_init_dec"))


def _expressed(each: Trained, A: Tensor, B: Tensor) -> Tensor:
    """R on other A and B."""
    return align_by_factors(each.R.double(), (each.A, each.B), A, B)


def _own_recipe(model: nn.Module, trained: Mapping[str, Trained], described: dict[str, Any] | None) -> Recipe | None:
    """How the reference made A and B, where scikit-learn makes them again here; tried on the smallest layer."""
    svd = (described or {}).get("svd") or {"n_iter": 10, "random_state": 42}
    bounds = {"n_iter": 1000, "random_state": 2**32 - 1}  # of scikit-learn's seeds
    said = isinstance(svd, dict) and all(
        type(value := svd.get(key)) is int and 0 <= value <= most for key, most in bounds.items()
    )
    if not said or _random(described) or find_spec("sklearn") is None:
        return None
    recipe = Recipe("sklearn", svd["random_state"], n_iter=svd["n_iter"])
    name, each = min(trained.items(), key=lambda item: item[1].A.shape[1] * item[1].B.shape[0])
    A, B = recipe.factors(weight_of(model.get_submodule(name), f"module {name!r}"), each.A.shape[0])
    error = residual(probes(each.A, each.R, each.B), A, _expressed(each, A, B), B)
    return recipe if error <= ACCEPT else None


def _check_base(
    model: nn.Module, trained: Mapping[str, Trained], described: dict[str, Any] | None, folder: Path
) -> None:
    """That the model has the modules and that A = B^T W, as the reference's are, converged or not, on their own W."""
    modules = dict(model.named_modules())
    errors = {}
    for name, each in trained.items():
        if name not in modules:
            raise ValueError(f"model: has no module {name!r}, which {folder} is for; it is of another base model")
        try:
            weight = weight_of(modules[name], f"module {name!r}")
        except TypeError:
            continue  # what cannot be read can still be given its factors
        if weight.device.type == "meta":
            raise ValueError(f"model: module {name!r} is on the meta device; load its weights first")
        N, K = weight.shape
        if (each.B.shape[0], each.A.shape[1]) != (N, K):
            raise ValueError(
                f"model: module {name!r} has a weight of shape {N} x {K}, {folder} is for "
                f"{each.B.shape[0]} x {each.A.shape[1]}; it is of another base model"
            )
        if not _random(described):
            W = weight.read()
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            A, B = each.A.to(W), each.B.to(W)
            errors[name] = float(((B.t() @ W - A).norm() / A.norm()).nan_to_num(nan=torch.inf))
    worst = max(errors, key=errors.__getitem__, default=None)
    if worst is None or errors[worst] <= OTHER_WEIGHT:
        return
    found = f"{folder}: A of module {worst!r} is not B^T W of this model (relative error {errors[worst]:.1e})"
    if described:
        raise AdapterMismatch(f"{found}; load the weights the adapter was trained on")
    warnings.warn(
        f"{found}, and there is no reconstr_config.json to say whether its factors are random ones, as without "
        "SVD; otherwise these are not the weights the adapter was trained on",
        stacklevel=4,
    )


def _modules_to_save(model: nn.Module, config: dict[str, Any], others: Mapping[str, Tensor], folder: Path) -> list[str]:
    """The modules that the tensors beside A, R and B are of; every one must be of one."""
    asked, task = config.get("modules_to_save") or [], config.get("task_type")
    if not (isinstance(asked, list) and all(isinstance(each, str) for each in asked)):
        raise ValueError(f"{folder}: modules_to_save in adapter_config.json is {asked!r}, must be a list of names")
    endings = sorted({*asked, *(HEADS.get(task, []) if isinstance(task, str) else [])})
    names = [
        name
        for name, _ in model.named_modules()
        if matches(name, endings) and any(key.startswith(f"{name}.") for key in others)
    ]
    for key in others:
        if not any(key.startswith(f"{name}.") for name in names):
            raise ValueError(
                f"{folder}: has a tensor {key!r}, which is of no layer of the reference's and of none of the "
                f"modules_to_save {endings}, as far as this model has them"
            )
    return names
