"""`tune` and `loraxs tune`: measure on this GPU which backend is fastest for a model's layers, and use it from then on.

    model.py      a model's layers
    run.py        measuring all backends on them, within a budget, and keeping the table
    tiles.py      the fastest tiles of the Triton kernels
    command.py    the command line

`import loraxs_kernels` imports none of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files import named
from ..naming import as_dtype

if TYPE_CHECKING:
    from ..backends.choice import Row


def tune(
    model: nn.Module,
    *,
    rank: int | Sequence[int] | None = None,
    tokens: int | Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    budget: float = 300.0,
    path: str | os.PathLike | None = None,
    again: bool = False,
    progress: bool = True,
) -> list[Row]:
    """Measure on the current GPU which backend is fastest for a model's layers, and use it from then on.

    Only the shapes and dtypes of the layers are used; the operands are made for the measurement.  So the model may be
    on any device and is not changed.  The resulting table is the one that `loraxs tune` makes.  It is used at once in
    this process, and in later processes on this kind of GPU, until the package, torch or Triton changes.  A later
    call continues where this one stopped.  A call for a different model adds that model's layers.  For each kind of
    call the table has the backend that is fastest for all layers together, and exceptions for single layers that a
    different backend computes at least 3 % faster.  If torch.distributed runs several processes, all must call; rank
    0 measures and writes, and all use its table.

    Args:
        model: with adapters (of `attach` or PEFT), whose layers, ranks and dtype are used; or without adapters, and
            then the linear layers are used that `attach` adapts by "all-linear".
        rank: one or several, the most important first; only for a model without adapters, which needs it.
        tokens: how many rows x has, one number or several; each is rounded up to a power of two from 16 to 32,768.
            None: all, first those of training and decoding.
        dtype: torch.bfloat16 or torch.float16, if calls do not have the layers' own dtype (under autocast).
        budget: seconds, with imports and compilation; what has begun by then is finished.
        path: the file of the table; None: the one that is used by default.
        again: measure again what the file has already.
        progress: show the progress on stderr.

    Returns the rows of the table: for which calls, which backend, and how many times as fast as the torch backend it
        is.
    Raises RuntimeError if there is no GPU or no backend to choose from, ValueError or TypeError for wrong arguments,
    and OSError if the file cannot be written, before anything is measured.
    """
    from ..backends import choice
    from .model import of_model, together
    from .run import Table, run

    dtype = as_dtype("dtype", dtype, (torch.bfloat16, torch.float16))

    def work(step: Callable[[], None]) -> Table:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}, must be an nn.Module")
        file = None if path is None else named(path, "path", "a file, or None")
        rows_of_x = _integers("tokens", tokens)
        found = of_model(model, _integers("rank", rank))
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype or found.dtype)
        if name is None:
            raise ValueError(
                f"dtype: got {found.dtype}, that of the layers, must be torch.bfloat16 or torch.float16: in others "
                "there is nothing to choose. Name the one that autocast computes in, if it is used"
            )
        weights = (True, False) if found.dense else (False, True)
        more = dict(weights=weights, again=again, progress=progress, step=step)
        return run(found.shapes, rows_of_x, name, budget, file, **more)

    return [choice.parse(row) for row in together(work)["choices"]]


def _integers(name: str, value: Any) -> list[int]:
    """One or several integers, or none, as a list."""
    found = [value] if isinstance(value, int) else [] if value is None else value
    if not (isinstance(found, Sequence) and all(type(n) is int for n in found)):
        raise TypeError(f"{name}: got {value!r}, must be an integer, several of them, or None")
    return list(found)
