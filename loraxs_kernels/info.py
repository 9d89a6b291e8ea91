"""What is installed and what can run here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import backends


def info() -> dict[str, str]:
    """Versions, devices, and for each backend "available" or the reason why it is not.  Prints nothing."""
    report = {"loraxs_kernels": _version("loraxs_kernels"), "python": platform.python_version()}
    report |= {name: _version(name) for name in ("torch", "triton", "safetensors", "transformers", "peft")}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["devices"] = ", ".join(["cpu", *devices])
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        report[f"backend {name}"] = f"not available: {reason}" if reason else "available"
    return report


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
