"""The CUDA core for a CPU: shrink and decode emulated, the GEMM as plain loops; with a C++ compiler and torch alone.

With LORAXS_EMULATED=1 tests/conftest.py puts it in the place of loraxs_kernels._core and every layer on the cuda
backend: `make test` runs some of the tests that way, in a process of their own.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = [CSRC / "shrink.cu", CSRC / "decode.cu"]
_PYTHON = [sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]  # torch's pybind11


def build(folder: Path, kernels: list[Path] = KERNELS, name: str = "_core") -> ModuleType:
    """Compile into `folder`, which is new, and import.

    `kernels`: instead of the repository's own; then under another `name`, as pybind11 makes a module of a name once.
    """
    sources = [*kernels, CSRC / "bindings.cpp", HERE / "gemm_tail.cpp"]
    return linked(folder, name, sources, [CSRC, HERE, *_PYTHON])


def recorded(folder: Path, objects: list[Path], toolkit: Path) -> ModuleType:
    """The real core, of objects that nvcc has made, in the hands of recorder.cpp; toolkit: where CUDA's headers are."""
    sources = [CSRC / "bindings.cpp", HERE / "recorder.cpp"]
    return linked(folder, "_recorded", sources, [CSRC, toolkit, *_PYTHON], objects)


def linked(folder: Path, name: str, sources: list[Path], includes: list, objects: list[Path] = ()) -> ModuleType:
    """The extension module `name` of these sources and objects."""

    def compiled(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-D_core={name}", *(f"-I{i}" for i in includes)]
        run(["c++", *flags, "-x", "c++", "-c", source, "-o", to])
        return to

    def run(command: list) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(compiled, sources))
    library = folder / f"{name}.so"
    run(["c++", "-shared", "-o", library, *made, *objects])
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
