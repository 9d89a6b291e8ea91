"""Triton's own runtime without a GPU: a stub of NVIDIA's driver (driver.c), which notes launches down and runs none.

Kernels are compiled by Triton's own ptxas, for whichever compute capability; its binder, its caches and its compiled
launcher are the real ones, and take CPU tensors.  What is tested is all that happens up to the launch: which kernel, on
which grid, with which arguments.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("driver.c")
STREAM = 7  # what every launch goes to
_FORMATS = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
_FORMATS |= {"i1": "?", "u1": "?", "fp16": "e", "fp32": "f", "fp64": "d"}


class Launch(NamedTuple):
    """What the driver was told, and what the kernel was compiled for."""

    kernel: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    stream: int
    cluster: int
    early: bool
    cooperative: bool
    arguments: dict[str, int | float]  # those that the compiled kernel takes
    constants: dict[str, Any]  # those it was compiled for: tl.constexpr, None, and integers that were 1
    aligned: list[str]  # those it takes for multiples of 16
    rest: list[int]  # pointers to scratch memory, which Triton adds


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the stub cannot be used in this process; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if (version := importlib.metadata.version("triton")).startswith("3.2."):
        return f"triton {version} describes compiled kernels otherwise than those since, which the stub reads"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton interprets its kernels here (TRITON_INTERPRET=1)"
    if _compiler() is None:
        return "there is no C compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers (Python.h) are not installed, and Triton's launcher needs them"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return "NVIDIA's own driver is here, and a process has one"


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compile the library into `folder`, under both of the names by which Triton's versions link it, and load it.

    From then on it is this process's libcuda.so.1, found by its name wherever it lies, to the end of the process.  Once
    in a process, and only where `unavailable` has no objection.
    """
    import triton

    if reason := unavailable():
        raise RuntimeError(reason)

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([_compiler(), *flags, SOURCE, "-o", library], check=True)
    (folder / "libcuda.so").symlink_to(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    # Triton 3.8 unloads kernels that are no longer referred to, through the driver that is active then: here, none.
    if hasattr(triton.compiler.CompiledKernel, "__del__"):
        del triton.compiler.CompiledKernel.__del__
    return folder


def activate(monkeypatch, folder: Path, capability: tuple[int, int] = (9, 0)) -> Stub:
    """Make a GPU of this compute capability Triton's current device, until `monkeypatch` undoes it.

    folder: what `build` has made.  torch.cuda.is_available() stays False, as Triton does not ask once it has a driver.
    """
    from triton import runtime
    from triton.backends.nvidia import driver as nvidia

    device = capability[0] * 10 + capability[1]
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    for name in ("libcuda_dirs", "library_dirs"):  # they would remember where they looked
        found = getattr(nvidia, name)
        monkeypatch.setattr(nvidia, name, getattr(found, "__wrapped__", found))
    stub = Stub(ctypes.CDLL("libcuda.so.1"))
    driver = nvidia.CudaDriver()
    launcher = driver.launcher_cls

    def labelled(source, metadata):
        stub.expect(source)
        return launcher(source, metadata)

    driver.launcher_cls = labelled  # it is made just before its kernel is loaded
    monkeypatch.setattr(runtime.driver, "_active" if hasattr(runtime.driver, "_active") else "active", driver)
    return stub


class Stub:
    """The library: what was launched, and what shall fail."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.loaded: list[str] = []  # the kernels compiled, or read from the cache on the disk, since the start
        library.stub_take.restype = ctypes.c_char_p
        self.record(True)
        self.fail("")
        self.launches()

    def launches(self) -> list[Launch]:
        """Those since the last call."""
        return [_launch(**json.loads(line)) for line in self.library.stub_take().decode().splitlines()]

    def record(self, on: bool) -> None:
        """Whether launches are written down, which takes longer than all the rest of them: not where that is timed."""
        self.library.stub_record(on)

    def fail(self, call: str) -> None:
        """What fails from now on: "load", "launch", "pointer" (whether an address is the GPU's), or nothing: ""."""
        self.library.stub_fail(call.encode())

    def expect(self, source) -> None:
        """The kernel that is loaded next was compiled of this."""
        names = list(source.signature)
        self.loaded.append(source.name)
        label = dict(
            kinds={name: kind for name, kind in source.signature.items() if kind != "constexpr"},
            constants={names[path[0]]: value for path, value in source.constants.items()},
            aligned=[names[path[0]] for path, what in source.attrs.items() if ["tt.divisibility", 16] in what],
        )
        self.library.stub_label(json.dumps(label).encode())


def _launch(label: dict, parameters: list[str], grid: list[int], threads: list[int], **rest) -> Launch:
    kinds, values = label.pop("kinds"), list(map(bytes.fromhex, parameters))
    arguments = {name: _value(kind, value) for (name, kind), value in zip(kinds.items(), values, strict=False)}
    pointers = [_value("*", each) for each in values[len(kinds) :]]
    return Launch(grid=tuple(grid), threads=tuple(threads), arguments=arguments, rest=pointers, **label, **rest)


def _value(kind: str, value: bytes) -> int | float:
    return struct.unpack("Q" if kind.startswith("*") else _FORMATS[kind], value)[0]
