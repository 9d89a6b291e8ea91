"""What is installed, what can run here, and on which machine: for people, and for the reports of demo and bench."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import backends
from .backends import choice
from .backends.device import Device, facts
from .backends.tuned import version

PACKAGES = ("loraxs_kernels", "torch", "triton", "safetensors", "transformers", "peft", "scikit-learn")


def info() -> dict[str, str]:
    """Versions and devices; whether the CUDA core and each backend can run here, or why not; which backend is chosen.

    For each kind of GPU in this machine, the result says which backend common calls get (bf16, 4096 x 4096, with W),
    and which table that choice is from.  `loraxs info` prints it; this function prints nothing.
    """
    from .backends.cuda import core

    report = {"python": platform.python_version()}
    report |= {name: version(name) or "not installed" for name in PACKAGES}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["devices"] = ", ".join(["cpu", *devices])
    report["cuda core"] = core.state()
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        report[f"backend {name}"] = f"not available: {reason}" if reason else "available"
    gpus = {facts(torch.device("cuda", i)): name for i, name in enumerate(devices)}
    for device, name in gpus.items():
        report |= {f"{name}, {call}": chosen for call, chosen in _chosen(device)}
    if not gpus:
        report["chosen"] = "torch, everywhere: there is no GPU"
    return report


def _chosen(device: Device) -> Iterator[tuple[str, str]]:
    """(a common call, the backend that computes it and why) on a GPU."""
    for r in (16, 64):
        for T in (1, 64, 512, 8192):
            for direction in choice.DIRECTIONS:
                row = choice.row_for(T, 4096, 4096, r, torch.bfloat16, direction, True, device)
                chosen = "torch, where nothing was measured to be faster"
                if row and row.backend != "torch":
                    chosen = f"{row.backend}, {row.gain:.2f} times as fast as torch"
                yield f"{direction} T {T} r {r}", chosen + (f" ({row.source})" if row else "")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """When and where a measurement was made: date (UTC), machine and versions, as plain data for a JSON report."""
    device = torch.device(device)
    machine = {"device": device.type, "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "L2_bytes": found.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    versions = {name: found for name in PACKAGES if (found := version(name))}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {"python": platform.python_version()} | versions,
    }


def _driver() -> str | None:
    """The NVIDIA driver's version by nvidia-smi; None if that does not run."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _cpu() -> str:
    """The processor's name; if the system tells none, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
