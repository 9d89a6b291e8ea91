"""PEFT's files of weights, read without PEFT."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import check_finite, damaged

PREFIX = "base_model.model."  # what PEFT puts before the names of a base model's modules


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
