"""What the backend launches, compiled to machine code for an NVIDIA GPU that need not be here.

The launcher's own calls are recorded, on meta tensors, and their arguments specialised as Triton does when it launches:
a 1 is a constant, multiples of 16 are known as such.  For the tests and for the table of configurations.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import triton as backend
from . import kernels
from .config import Config, Device

NAMES = ("chain_kernel", "shrink_kernel", "expand_kernel", "product_kernel")
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "tf32")
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Problem(NamedTuple):
    """x (T, K), A (r, K), B (N, r) of a dtype, at a setting of torch.set_float32_matmul_precision."""

    T: int
    N: int
    K: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "forward"  # or "backward": A, B and R are transposed views, there is a gram and no bias
    matmul_precision: str = "highest"
    out: bool = False  # whether the chain is added to an output that is there


class Launch(NamedTuple):
    """A kernel and what it was called with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]  # of the compiler


class Compiled(NamedTuple):
    """A kernel as machine code."""

    kernel: str
    registers: int  # of a thread
    spilled: int  # bytes of stack and local memory of a thread
    shared: int  # bytes of a program
    instructions: dict[str, int]  # how often each of INSTRUCTIONS occurs
    narrow: list[str]  # address computations in fewer than 64 bits


def compile_problem(problem: Problem, capability: tuple[int, int], config: Config | None) -> list[Compiled]:
    """Everything launched for a problem; None: a rank too wide for the chip."""
    return [compile_launch(launch, capability) for launch in launches(problem, capability, config)]


def launches(problem: Problem, capability: tuple[int, int], config: Config | None) -> list[Launch]:
    T, N, K, r, dtype, layout, matmul_precision, adds = problem

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if layout == "forward":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.empty(shape[::-1], dtype=dtype, device="meta").t()

    x = torch.empty(T, K, dtype=dtype, device="meta")
    A, R, B = meta(r, K), meta(r, r, dtype=torch.float32), meta(N, r)
    z = torch.empty(T, r, device="meta")
    out = torch.empty(T, N, dtype=dtype, device="meta") if adds else None
    bias, other = (torch.empty(N, dtype=dtype, device="meta"), None) if layout == "forward" else (None, z)
    with _recorded(capability) as found, fp32_matmul_precision(matmul_precision):
        if config is not None:
            backend.low_rank(config, x, A, R, B, 0.5, bias, out, other)
        else:
            backend.product(z, R.t(), 0.5, dtype)
            backend.product(z.t(), z, 0.5, torch.float32)
    return found


class _Recorder:
    """Stands where a kernel is."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            self.found.append(Launch(self.kernel, arguments, dict(num_warps=num_warps, num_stages=num_stages)))

        return launch


@contextmanager
def _recorded(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    found: list[Launch] = []
    recorders = {name: _Recorder(getattr(kernels, name), found) for name in NAMES}
    with (
        mock.patch.multiple(kernels, **recorders),
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


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Compiled:
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        specialised = not launch.kernel.params[i].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif (name.isupper() and len(name) > 1) or value is None or (value == 1 and specialised):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        whole = signature[name] in ("i32", "i64") and specialised and value % 16 == 0
        if isinstance(value, torch.Tensor) or whole:
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    registers, stack, local = _resources(compiled.asm["cubin"])
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"].splitlines()
    return Compiled(
        kernel=launch.kernel.__name__,
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        instructions={word: ptx.count(word) for word in INSTRUCTIONS},
        narrow=[line for line in ttir if "tt.addptr" in line and re.search(r", (tensor<[\dx]*i32>|i32)( loc|$)", line)],
    )


def _resources(cubin: bytes) -> tuple[int, ...]:
    """(registers, bytes of stack, bytes of local memory) of a thread, by the disassembler in Triton's own wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: re.search(rf"{name}:(\d+)", report) for name in ("REG", "STACK", "LOCAL")}
    return tuple(int(each[1]) for each in found.values())
