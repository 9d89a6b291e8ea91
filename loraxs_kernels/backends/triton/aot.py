"""What the backend launches, compiled to machine code for an NVIDIA GPU that need not be here.

The launcher itself runs, on meta tensors, and Triton compiles for a driver that stands in for that GPU's.  For the
tests and for the table of configurations.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ...padding import padded_rows
from .. import triton as backend
from . import launcher
from .config import Config, Device
from .launcher import compile_kernel

INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "tf32")


class Problem(NamedTuple):
    """x (T, K), A (r, K), B (N, r) of a dtype, at a setting of torch.set_float32_matmul_precision."""

    T: int
    N: int
    K: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "forward"  # or "backward": A, B and R are transposed views, and there is a gram
    matmul_precision: str = "highest"
    out: bool = False  # whether the chain is added to an output that is there
    padded: bool = True  # whether B of rank r lies as a layer keeps it
    bias: bool = False


class Compiled(NamedTuple):
    """A kernel as machine code."""

    kernel: str
    registers: int  # of a thread
    spilled: int  # bytes of stack and local memory of a thread
    shared: int  # bytes of a program
    instructions: dict[str, int]  # how often each of INSTRUCTIONS occurs
    narrow: list[str]  # address computations in fewer than 64 bits
    copies: dict[int, int]  # how many copies to shared memory in the background there are, by their width in bits
    short_reads: int  # how many reads of global memory take two bytes or less


def compile_problem(problem: Problem, capability: tuple[int, int], config: Config) -> list[Compiled]:
    """Everything launched for a problem."""
    T, N, K, r, dtype, layout, matmul_precision, adds, padded, biased = problem

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, A, R, B, other = meta(T, K), meta(r, K), meta(r, r, dtype=torch.float32), meta(N, r), None
    B = padded_rows(B) if padded else B
    if layout == "backward":
        A, R, B = meta(K, r), R.t(), meta(r, N).t()
        A, other = (padded_rows(A) if padded else A).t(), meta(T, r, dtype=torch.float32)
    out, bias = meta(T, N) if adds else None, meta(N) if biased else None
    with _compiling(capability) as found, fp32_matmul_precision(matmul_precision):
        backend.low_rank(config, x, A, R, B, 0.5, bias, out, other)
    return [_looked_at(name, compiled) for name, compiled in found]


@contextmanager
def _compiling(capability: tuple[int, int]) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile alone; what they compile is listed, by its kernel's name."""
    found: list[tuple[str, Any]] = []
    sm = 10 * capability[0] + capability[1]
    there = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", sm, 32),
        get_current_device=lambda: sm,  # Triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
    )

    def launch(
        kernel: str, grid: tuple, tensors: tuple, free: tuple, sizes: tuple, constants: tuple, config: Config
    ) -> None:
        types = tuple(None if t is None else t.dtype for t in tensors)
        found.append((kernel, compile_kernel(kernel, sm, types, sizes, constants, config.num_warps, config.num_stages)))

    with (
        mock.patch.object(driver, "_active" if hasattr(driver, "_active") else "active", there),
        mock.patch.object(launcher, "launch", launch),
        mock.patch.object(backend, "facts", lambda _: Device(capability, 132)),
    ):
        yield found


@contextmanager
def fp32_matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _looked_at(name: str, compiled: Any) -> Compiled:
    cubin, ptx, ttir = compiled.asm["cubin"], compiled.asm["ptx"], compiled.asm["ttir"].splitlines()
    registers, stack, local = _resources(cubin)
    code = _disassembled(cubin, "-sass")
    return Compiled(
        kernel=name,
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        instructions={word: ptx.count(word) for word in INSTRUCTIONS},
        narrow=[line for line in ttir if "tt.addptr" in line and re.search(r", (tensor<[\dx]*i32>|i32)( loc|$)", line)],
        copies=Counter(_width(suffixes) for suffixes in re.findall(r"\bLDGSTS([.\w]*)", code)),
        short_reads=len(re.findall(r"\bLDG\.E\.[US](?:8|16)\b", code)),
    )


def _width(suffixes: str) -> int:
    """Of a copy, in bits: ".E.BYPASS.128"."""
    return next((width for width in (128, 64) if str(width) in suffixes.split(".")), 32)


def _resources(cubin: bytes) -> tuple[int, ...]:
    """(registers, bytes of stack, bytes of local memory) of a thread."""
    report = _disassembled(cubin, "-res-usage")
    found = {name: re.search(rf"{name}:(\d+)", report) for name in ("REG", "STACK", "LOCAL")}
    return tuple(int(each[1]) for each in found.values())


def _disassembled(cubin: bytes, what: str) -> str:
    """What the disassembler in Triton's own wheel says of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
