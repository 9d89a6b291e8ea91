"""How a kernel is started: past Triton's own binding of arguments, which takes the host longer than all the rest.

Triton looks at every argument of every call to find out for which types, alignments and sizes a kernel must be compiled
anew.  Here only the number of rows differs between the calls of a layer, so what was compiled is kept for the rest.
On a CPU the binding takes two thirds of a launch (bench/results/cpu/2026-11-26-fec50bf-launch.json).
"""

from __future__ import annotations

from functools import cache, lru_cache
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from . import kernels
from .config import Config

# Versions in which a compiled kernel was seen to take what `launch` hands it; others bind for themselves.
TRIED = ((3, 3), (3, 9))
# Where a profiler leaves what Triton is to call before and after each launch.
_hooks = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel
_loading = Lock()


def launch(
    kernel: str,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    free: tuple[int | float, ...],
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    config: Config,
) -> None:
    """Start a kernel of kernels.py on the current device and stream; arguments in the kernel's own order.

    free: numbers for which nothing is compiled anew, the number of rows first.  constants: its constexprs.
    """
    if direct() and free[0] < 2**31 and not _watched():
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        if not any([address & 15 for address in addresses]):
            types = tuple([None if t is None else t.dtype for t in tensors])
            device = torch.cuda.current_device()
            run, *handles = loaded(kernel, device, types, sizes, constants, config.num_warps, config.num_stages)
            stream = driver.active.get_current_stream(device)
            run(*grid, stream, *handles, None, None, None, *addresses, *free, *sizes, *constants)
            return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    getattr(kernels, kernel)[grid](*tensors, *free, *sizes, *constants, **options)


@cache
def direct() -> bool:
    """Whether `launch` keeps compiled kernels: not in the interpreter, nor on AMD.

    For an AMD GPU Triton also compiles for whether a tensor's memory is below 2 GB.
    """
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    compiles = isinstance(kernels.chain_kernel, triton.JITFunction)
    return compiles and torch.version.hip is None and TRIED[0] <= version <= TRIED[1]


def _watched() -> bool:
    """Whether a profiler or a debugger wants Triton's own launch."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or getattr(_hooks, "debug", False))


@lru_cache(maxsize=4096)
def loaded(*key: Any) -> tuple[Any, Any, Any]:
    """The kernel of `compile_kernel`, loaded: what starts it, and what that wants to be handed after the stream."""
    with _loading:  # Triton sets `run` before it loads, and another thread must not see that
        compiled = compile_kernel(*key)
        compiled._init_handles()
        return compiled.run, compiled.function, compiled.packed_metadata


def compile_kernel(
    kernel: str,
    device: int,
    types: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> Any:
    """The kernel as Triton compiles it for the current device, which is `device`, or finds it in its cache.

    types: of tensors, at addresses that are multiples of 16; None: no tensor.
    """
    function = getattr(kernels, kernel)
    free = [1.0 if name == "s" else 2 for name in function.arg_names if name in ("T", "s", "shares")]
    return function.warmup(*types, *free, *sizes, *constants, grid=(1, 1, 1), num_warps=warps, num_stages=stages)
