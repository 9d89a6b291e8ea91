"""The CUDA core for a CPU: shrink and decode emulated, the GEMM as plain loops; with a C++ compiler and torch alone.

With LORAXS_EMULATED=1 tests/conftest.py puts it in the place of loraxs_kernels._core and every layer on the cuda
backend: `make test` runs some of the tests that way, in a process of their own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = [CSRC / "shrink.cu", CSRC / "decode.cu"]
_PYTHON = [sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]  # torch's pybind11


def build(folder: Path) -> ModuleType:
    """Compile into `folder`, which is new, and import."""
    sources = [*KERNELS, CSRC / "bindings.cpp", HERE / "gemm_tail.cpp"]
    return linked(folder, "_core", sources, [CSRC, HERE, *_PYTHON])


def rebuilt(core: ModuleType, source: Path) -> ModuleType:
    """What `build` has made with this source, which is in a folder of its own, in place of the one of its name.

    The module has the folder's name too, as pybind11 makes a module of a name once.
    """
    objects = [each for each in Path(core.__file__).parent.glob("*.o") if each.stem != source.stem]
    return linked(source.parent, f"{source.parent.name}._core", [source], [CSRC, HERE], objects)


def fenced(t: Tensor, aligned: int = 16) -> Tensor:
    """The same numbers and strides amid NaN, with the end of memory after them: to use what is there fails.

    aligned: begins at a multiple of this, in bytes; less than that may be left before the end.
    """
    size, steps = t.element_size(), zip(t.shape, t.stride(), strict=True)
    extent = size * (1 + sum((count - 1) * stride for count, stride in steps))
    length = -(-extent // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=t.dtype, count=length // size)
    fence = ctypes.c_void_p(whole.data_ptr() + length), ctypes.c_size_t(mmap.PAGESIZE)
    if ctypes.CDLL(None, use_errno=True).mprotect(*fence, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    whole.fill_(float("nan") if t.is_floating_point() else 1 << 30)
    return whole.as_strided(t.shape, t.stride(), (length - extent) // aligned * aligned // size).copy_(t)


def recorded(folder: Path, objects: list[Path], toolkit: Path) -> ModuleType:
    """The real core, of objects that nvcc has made, in the hands of recorder.cpp; toolkit: where CUDA's headers are."""
    sources = [CSRC / "bindings.cpp", HERE / "recorder.cpp"]
    return linked(folder, "_recorded", sources, [CSRC, toolkit, *_PYTHON], objects)


def linked(folder: Path, name: str, sources: list[Path], includes: list, objects: list[Path] = ()) -> ModuleType:
    """The extension module `name` of these sources and objects."""
    last = name.rpartition(".")[2]

    def compiled(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-D_core={last}", *(f"-I{i}" for i in includes)]
        if source.suffix == ".cu":
            flags.append("-fsanitize=alignment")  # linked without: gemm_tail.cpp says what it calls
        run(["c++", *flags, "-x", "c++", "-c", source, "-o", to])
        return to

    def run(command: list) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(compiled, sources))
    library = folder / f"{last}.so"
    run(["c++", "-shared", "-o", library, *made, *objects])
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
