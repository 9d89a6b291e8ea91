"""Products as written, whatever the user has set: no autocast, no TF32, no sums in half precision."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

# The open blocks of `exact_matmul`, and the calls that put the user's settings back once there are none.
_exact: set[object] = set()
_users_settings: list[Callable[[], None]] = []
_exact_lock = threading.RLock()


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Products as written: neither autocast nor the user's TF32, bf16 or fp16 settings reach in.

    The settings of products belong to the whole process.  Of the blocks that are open at one time, in whichever
    threads, the first saves the user's settings and the last restores them.  Autocast belongs to a thread.
    """
    block = object()
    # torch.autocast(enabled=False) will not do: if Ctrl-C comes before its block is left, torch never again drops
    # the casts of weights that it keeps during a block of autocast, and training goes on with stale ones.
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cuda", "cpu")}
    # Each lock on one line: between the lines of a longer block Ctrl-C can come before the lock is let go.
    try:
        try:
            with _exact_lock: _begin(block)  # fmt: skip  # noqa: E701
            _set_autocast(dict.fromkeys(autocast, False))
            yield
        finally:
            _set_autocast(autocast)
            with _exact_lock: _end(block)  # fmt: skip  # noqa: E701
    finally:  # once more, if Ctrl-C has stopped that
        _set_autocast(autocast)
        with _exact_lock: _end(block)  # fmt: skip  # noqa: E701


def _set_autocast(enabled: dict[str, bool]) -> None:
    for kind, on in enabled.items():
        torch.set_autocast_enabled(kind, on)


def _begin(block: object) -> None:
    _multiply_exactly(save=not _exact)
    _exact.add(block)


def _end(block: object) -> None:
    _exact.discard(block)
    if not _exact:
        _restore_users_settings()


def _after_fork() -> None:
    """In a forked process the blocks of other threads do not go on: the user's settings come back."""
    global _exact_lock
    _exact_lock = threading.RLock()  # another thread may have held it
    _exact.clear()
    _restore_users_settings()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _restore_users_settings() -> None:
    while _users_settings:
        _users_settings[-1]()
        _users_settings.pop()  # only now: if Ctrl-C stops the call, the next one makes it again


def _restore(setting: Any, precision: str) -> None:
    """Put a setting back as it was; if it had inherited its value, it goes on inheriting."""
    setting.fp32_precision = "none"
    if setting.fp32_precision != precision:
        setting.fp32_precision = precision


def _multiply_exactly(save: bool) -> None:
    """Set how products are made in this process; save: and note the user's settings, each before it is changed."""
    cuda = torch.backends.cuda.matmul

    def restore(*call: Any) -> None:
        if save:
            _users_settings.append(partial(*call))

    if settings := _fp32_settings():
        for each in settings:
            restore(_restore, each, each.fp32_precision)
            each.fp32_precision = "ieee"
    else:
        restore(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
    if getattr(cuda, "allow_fp16_accumulation", False):
        restore(setattr, cuda, "allow_fp16_accumulation", True)
        cuda.allow_fp16_accumulation = False


def _fp32_settings() -> list[Any]:
    """What has torch 2.9's settings of fp32 products; once these have been used, torch's older functions raise."""
    each = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [where for where in each if hasattr(where, "fp32_precision")]
