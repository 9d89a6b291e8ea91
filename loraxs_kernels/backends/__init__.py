"""Which implementation of the primitive runs: one module a backend, each with the same functions.

    unavailable() -> str | None                                  why it cannot run here, or None
    lowrank_linear(x, W, A, R, B, s, bias=None, out=None, other=None) -> (y, z, gram)
                                                                 the primitive, see backends/torch.py
    plan(x, A, B)                                                not of torch's: which kernels a call takes and how they
                                                                 are cut, hashable; None: the torch backend computes it

A backend is a module of this package, found by its name in NAMES; nothing is registered and nothing is imported
before it is asked for.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor
from torch.jit import is_tracing
from torch.nn import Parameter

from . import choice, first_use
from . import torch as torch_backend
from .device import facts

NAMES = ("torch", "triton", "cuda")

Primitive = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
Forced = str | Primitive | None  # a backend, a primitive that is none of a backend's (the benches have one), or neither

# A plain global and not a ContextVar: torch.compile guards on globals and cannot trace ContextVar.get (torch 2.13).
_forced: str | None = None
# The open blocks of `backend` in the order in which they began, each with the name that it asked for.
_blocks: dict[object, str | None] = {}
_blocks_lock = threading.RLock()


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every LoRA-XS layer called inside the block on one backend: "torch", "triton" or "cuda".

    None gives the choice back to `choose`.  The setting is process-wide, as torch's own precision settings are, and
    holds for the calls made inside the block, their backward included whenever that runs.  Of several open blocks, in
    whichever threads, the one that began last decides; each ends only its own setting, in any order.
    Raises ValueError for an unknown name, BackendUnavailable with the reason when it cannot run here.
    """
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"backend: got {name!r}, must be one of {', '.join(map(repr, NAMES))} or None")
        if reason := unavailable(name):
            raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")
    block = object()
    # Each lock on one line: between the lines of a longer block Ctrl-C can come before the lock is let go.
    try:
        try:
            with _blocks_lock: _force(block, name)  # fmt: skip  # noqa: E701
            yield
        finally:
            with _blocks_lock: _release(block)  # fmt: skip  # noqa: E701
    finally:  # once more, if Ctrl-C has stopped that
        with _blocks_lock: _release(block)  # fmt: skip  # noqa: E701


def _force(block: object, name: str | None) -> None:
    global _forced
    _blocks[block] = _forced = name


def _release(block: object) -> None:
    global _forced
    _blocks.pop(block, None)
    _forced = next(reversed(_blocks.values()), None)


def _after_fork() -> None:
    global _blocks_lock
    _blocks_lock = threading.RLock()  # another thread may have held it; what its block has forced stays forced


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run here, as a sentence for a person; None: it can."""
    return load(name).unavailable()


def load(name: str) -> ModuleType:
    """The module of a backend."""
    return importlib.import_module(f"{__name__}.{name}")


def select(x: Tensor, N: int, r: int, has_weight: bool, direction: str, forced: Forced) -> Primitive:
    """The primitive for x (T, K), N features, rank r: the forced one, else that of the backend that `choose` names.

    A backend that nobody asked for by name is checked against the torch backend at its first use (first_use.py); one
    that is forced runs as it is, unless LORAXS_CHECK=always.  Under selective checkpointing, and while
    torch's FlopCounterMode counts, it is always torch's.
    forced: what `forced()` was when the forward ran; its backward asks with the same.
    """
    if callable(forced):
        return forced
    name = forced or choose(x, N, r, has_weight, direction)
    if name != "torch" and torch_backend.results_are_kept():  # into which a kernel would write behind torch's back
        name = "torch"
    if name == "torch" or (forced and first_use.setting() != "always"):
        return primitive(name)
    return first_use.checked(name, direction)


def forced() -> str | None:
    """The backend that an open block of `backend` asks for; None: `choose` decides."""
    return _forced


def choose(x: Tensor, N: int, r: int, has_weight: bool = True, direction: str = "forward") -> str:
    """The name of the backend for x (T, K), N features, rank r: the forced one, or the fastest by what was measured.

    Where none is forced, a pure function of sizes, dtype, direction and device, which always returns a backend that can
    run: on a GPU the one that choice.py has a row for, else "torch".

    has_weight: whether x W^T is part of the call.  direction: "forward", or "backward" where x is gY and N counts the
    features of gX, and gR is asked for.
    """
    if _forced or not x.is_cuda:
        return _forced or "torch"
    if type(x) not in (Tensor, Parameter) or is_tracing():  # a FakeTensor has no GPU, the sizes of a trace are tensors
        return "torch"
    T, K = x.shape
    return choice.pick(T, N, K, r, x.dtype, direction, has_weight, facts(x.device))


def primitive(name: str) -> Primitive:
    """The `lowrank_linear` of a backend."""
    return torch_backend.lowrank_linear if name == "torch" else load(name).lowrank_linear
