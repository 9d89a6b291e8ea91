"""Checkpoints that hold R instead of the whole model, as Trainer writes and reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from ... import basis
from ...acceptance import FINGERPRINT, SCALING, check_resumed
from ...adapter_file import save_adapter
from ...files import write_atomically
from ...linear import LoraXSLinear
from ...matching import has_adapters


def save_pretrained(
    model: PreTrainedModel,
    whole_model: Callable,
    run: Path,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """model.save_pretrained during training: only R into a checkpoint of this run, the whole model anywhere else."""
    folder = Path(save_directory).absolute()
    of_run = run in folder.parents and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)
    if not of_run or not has_adapters(model):  # detached after a broken-off run
        return whole_model(save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
    if is_main_process:
        # The names must be those of Trainer's model, which a user may have compiled.
        compiled = state_dict is not None and all(key.startswith("_orig_mod.") for key in state_dict)
        tensors = {name: t.detach().cpu().contiguous() for name, t in changing(model)}
        for name, layer in model.named_modules():
            if isinstance(layer, LoraXSLinear):
                tensors[f"{name}.{FINGERPRINT}"] = basis.probes(
                    layer.A, basis.mixing(layer.rank, layer.A.device), layer.B
                ).cpu()
                tensors[f"{name}.{SCALING}"] = torch.tensor(layer.scaling, dtype=torch.float64)
        tensors = {("_orig_mod." if compiled else "") + name: t for name, t in tensors.items()}
        write_atomically(folder / SAFE_WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
        save_adapter(model, folder)
    return None


def changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that training may change, each once: trained parameters, and all buffers except A and B."""
    frozen = {id(b) for layer in model.modules() if isinstance(layer, LoraXSLinear) for b in layer.buffers()}
    saved = model.state_dict().keys()  # without the buffers that are not persistent
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in model.named_buffers() if id(b) not in frozen and name in saved)


@torch.no_grad()
def check_checkpoint(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before Trainer loads a checkpoint, not strictly: it must have all that trains, and fingerprints of these A and B.

    A hook of load_state_dict.
    """
    named = list(module.named_parameters(remove_duplicate=False))  # a file has a tied one by only one of its names
    present = {id(p) for name, p in named if prefix + name in state_dict}
    for name, p in named:
        if p.requires_grad and id(p) not in present:
            raise ValueError(f"resume_from_checkpoint: the checkpoint has no values for {name!r}, which trains")
        t = state_dict.get(prefix + name)
        if p.requires_grad and t is not None and not (t.shape == p.shape and torch.isfinite(t).all()):
            raise ValueError(
                f"resume_from_checkpoint: {name!r} has shape {tuple(t.shape)} in the checkpoint, or NaN or Inf values; "
                f"must be finite and have shape {tuple(p.shape)}"
            )
    for name, layer in module.named_modules():
        if isinstance(layer, LoraXSLinear):
            check_resumed(layer, state_dict, f"{prefix}{name}.")
    if others := [key for key in state_dict if key.endswith(f".{FINGERPRINT}")]:
        other = others[0].removeprefix(prefix).removesuffix(f".{FINGERPRINT}")
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint has an adapter for {other!r}, which has none here; attach "
            "adapters to the same modules"
        )


def forgive_the_frozen(module: nn.Module, keys: Any) -> None:
    """After loading: no warning if the keys that are missing are exactly those of the frozen tensors.

    A hook of load_state_dict.
    """
    absent = module.state_dict().keys() - {name for name, _ in changing(module)}
    for prefix in ("", "_orig_mod."):
        if set(keys.missing_keys) == {prefix + name for name in absent}:
            keys.missing_keys.clear()
