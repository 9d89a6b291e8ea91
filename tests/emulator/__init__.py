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
_INCLUDES = [CSRC, HERE, sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]  # torch's pybind11


def build(folder: Path, kernels: list[Path] = KERNELS, name: str = "_core") -> ModuleType:
    """Compile into `folder`, which is new, and import.

    `kernels`: instead of the repository's own; then under another `name`, as pybind11 makes a module of a name once.
    """

    def compiled(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-D_core={name}"]
        flags += [f"-I{each}" for each in _INCLUDES]
        run(["c++", *flags, "-x", "c++", "-c", str(source), "-o", str(to)])
        return to

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    with ThreadPoolExecutor() as pool:
        objects = [str(each) for each in pool.map(compiled, [*kernels, CSRC / "bindings.cpp", HERE / "gemm_tail.cpp"])]
    library = folder / f"{name}.so"
    run(["c++", "-shared", "-o", str(library), *objects])
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
