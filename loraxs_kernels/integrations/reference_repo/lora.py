"""LoRA-XS adapters written as plain LoRA."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...adapter_contents import base_model, layers_to_save, plain, saved_tensors, tied_to_saved, whole_R
from ...files import named, write_atomically
from ...linear import LoraXSLinear
from ...matching import base_name, targets_for, unwrapped
from ...naming import FLOATS, as_dtype
from ...sharding import whole
from ...weights import is_conv1d
from ..peft_files import PREFIX
from .keys import part

if TYPE_CHECKING:
    from peft import PeftModel

Part = tuple[str, nn.Module, Tensor, Tensor, Tensor, float]  # of a model: a layer's name, base layer, A, R, B and s


@torch.no_grad()
def export_as_lora(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    task_type: str | None = None,
    adapter: str = "default",
) -> None:
    """Write the adapters of a model as plain LoRA: a folder with adapter_config.json and adapter_model.safetensors.

        lora_A = A (r x K),  lora_B = s B R (N x r),  lora_alpha = r

    in every layer, with rows of lora_A and columns of lora_B that are zero where another layer has a higher rank.  So
    every layer has the same rank, and LoRA's own scaling, lora_alpha / r, is 1: the delta is s B R A, even for software
    that ignores rank_pattern or alpha_pattern.  The folder has no R: training that continues from it trains LoRA.

    Args:
        model: a model from `attach`, or a PeftModel with LoraXSConfig; merged or not.  If FSDP2 has sharded R, every
            rank must call.
        folder: made if it is missing; its files of these names are replaced, each in one step, the config last, but not
            those of a LoRA-XS adapter.  If this is interrupted, the folder cannot be loaded: it is never half of one
            adapter and half of another.
        dtype: of lora_A and lora_B; None: fp32 (fp64 for fp64 layers).  bf16 halves the size, with a relative error of
            delta W of about 2e-3.  s B R is computed in fp64 in both cases.
        task_type: as in PEFT ("CAUSAL_LM", "SEQ_CLS", ...), needed by AutoPeftModel; None: a PeftModel's own, or none.
        adapter: the name of the adapter, if model is a PeftModel.

    PEFT need not be installed.  Raises ValueError, before anything is written, if the model has no adapters of its own
    (but a bank's, for example) or a factor is not finite in that dtype.
    """
    model, dtype, folder = unwrapped(model), as_dtype("dtype", dtype, FLOATS), named(folder, "folder", "an adapter")
    if isinstance(model, LoraXSLinear):
        raise ValueError("model: is itself a LoraXSLinear, must be a model that contains such layers")
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        layers, saved = _parts_of_peft(model, adapter)
        task_type = task_type or model.peft_config[adapter].task_type
        model = model.get_base_model()
    else:
        layers = [
            (name, layer.base_layer, layer.A, whole_R(layer), layer.B, layer.scaling)
            for name, layer in layers_to_save(model)
        ]
        names, tensors = saved_tensors(model)
        saved = {
            name: {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            for name in names
        }
        # PEFT trains copies of the modules_to_save, and would leave what is tied to them as it was.
        saved |= {name: module.state_dict() for name, module in tied_to_saved(model, names).items()}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file, must be a folder or not there")
    _check_no_R(folder / "adapter_model.safetensors")
    rank = max(len(A) for _, _, A, *_ in layers)
    tensors, adapted, conv1d = {}, [], False
    for name, base, A, R, B, s in layers:
        to, more = dtype or torch.promote_types(A.dtype, torch.float32), rank - len(A)
        factors = F.pad(A, (0, 0, 0, more)), F.pad(s * B.double() @ whole(R).double(), (0, more))
        for which, t in zip("AB", factors, strict=True):
            t = t.to("cpu", to, copy=True).contiguous()
            if not torch.isfinite(t).all():
                raise ValueError(f"module {name!r}: lora_{which} has NaN or Inf values in {to}; nothing was written")
            tensors[f"{PREFIX}{name}.lora_{which}.weight"] = t
        adapted.append(name)
        conv1d |= is_conv1d(base)
    for name, state in saved.items():
        tensors |= {f"{PREFIX}{name}.{base_name(key)}": plain(t) for key, t in state.items()}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        name = base_name(name)
        if first.setdefault(id(module), name) in adapted and first[id(module)] != name:
            raise ValueError(
                f"module {first[id(module)]!r} is also module {name!r}; PEFT would put LoRA on only one of the two"
            )
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model(model) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets_for(model, adapted),
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


def _check_no_R(file: Path) -> None:
    """ValueError for a file with the R of an adapter of PEFT's or the reference's: no LoRA in its place has that."""
    keys: list[str] = []
    with suppress(safetensors.SafetensorError, OSError), safetensors.safe_open(file, framework="pt") as f:
        keys = f.keys()
    for key in keys:
        if key.endswith(".loraxs_R") or (part(key) or ("", ""))[1] == "R":
            raise ValueError(f"folder: {file} holds R of a LoRA-XS adapter ({key!r}), must be another folder")


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
