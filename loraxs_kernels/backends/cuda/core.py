"""The CUDA core, the module loraxs_kernels._core: whether it is here, for which GPUs, and why not.

setup.py leaves a record beside it, or in its place, _build.json:

    {"built": true, "architectures": ["80", "90a"], "nvcc": "13.0", "cutlass": "4.2.0", "sources": HASH}
    {"built": false, "why": "nvcc was not found by PATH or /usr/local/cuda; install ..."}
"""

from __future__ import annotations

import hashlib
import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

RECORD = Path(__file__).parents[2] / "_build.json"


@cache
def load() -> ModuleType:
    """The core.  Raises ImportError where it is missing."""
    return importlib.import_module("loraxs_kernels._core")


@cache
def missing() -> str | None:
    """Why the core cannot be used here, as a sentence for a person; None: it can be loaded.  It asks for no GPU."""
    record = _record()
    if record is None:
        return "the CUDA core was not built: this source tree was never installed; pip install -e . where nvcc is"
    if not record["built"]:
        return f"the CUDA core was not built: {record['why']}"
    if (now := sources()) and record.get("sources") != now:
        return "the CUDA core was built for another version of this source tree: python setup.py build_ext --inplace"
    try:
        load()
    except ImportError as error:
        return f"the CUDA core was built but does not load: {error}; install loraxs_kernels again"
    return None


@cache
def architectures() -> tuple[str, ...]:
    """What it has machine code for, ("80", "90a"); nothing where it is missing."""
    return () if missing() else tuple(load().architectures.split(";"))


def state() -> str:
    """What `lx.info` says of it."""
    if reason := missing():
        return reason.removeprefix("the CUDA core was ")
    record = _record()
    cutlass = f", CUTLASS {record['cutlass']}" if record["cutlass"] else ""
    return f"built for {', '.join(f'sm_{each}' for each in architectures())} (nvcc {record['nvcc']}{cutlass})"


def sources() -> str | None:
    """A hash of what is compiled, csrc/ and CMakeLists.txt, where this is a source tree: it may have moved on since.

    setup.py runs this file alone for it, before it compiles: this module imports nothing of the package.
    """
    root = RECORD.parents[1]
    files = [file for file in sorted(root.glob("csrc/**/*")) if file.suffix in (".cpp", ".cu", ".cuh", ".h")]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in [root / "CMakeLists.txt", *files]:
        text = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def compiled() -> str | None:
    """The hash of what the core that is installed was compiled from; None: there is no core."""
    record = _record()
    return record["sources"] if record and record["built"] else None


def _record() -> dict[str, Any] | None:
    try:
        record = json.loads(RECORD.read_text())
        whole = {"architectures", "nvcc", "cutlass", "sources"} if record["built"] else {"why"}
        return record if whole <= record.keys() else {"built": False, "why": f"{RECORD} is damaged"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {"built": False, "why": f"{RECORD} is damaged"}
