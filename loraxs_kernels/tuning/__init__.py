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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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

    What is measured are the shapes of the layers, on operands of their own: the model is only read, may be on any
    device, and needs no memory for it.  The result is the table that `loraxs tune` makes, in force in this process at
    once and in later ones on this kind of GPU, until the package, torch or Triton changes.  A later call goes on where
    this one stopped.  A call for another model adds its layers: for each kind of call the table has one backend for
    all its layers together, and before it one for each single layer that another backend computes at least 3 % faster.
    Where torch.distributed runs several processes all must call; rank 0 measures and writes, and its table is
    everybody's.

    Args:
        model: with adapters (`attach`, or PEFT's), whose layers, ranks and dtype are taken; or without, and then all
            linear layers that "all-linear" means to `attach`.
        rank: one or several, the most valuable first; for a model without adapters, which needs it.
        tokens: how many rows x has, one number or several; each counts as the power of two above it.  Default: all,
            training's and decoding's first.
        dtype: torch.bfloat16 or torch.float16, where that is not the layers': under autocast.
        budget: seconds, imports and compilation included; what has begun by then is finished.
        path: of the file; default: the one that is used from then on.
        again: measure anew what the file has.
        progress: whether to show it on stderr.

    Returns the rows of the table: for which calls which backend, and how many times as fast as torch's it is.  Raises
    RuntimeError where there is no GPU or nothing to choose from, ValueError or TypeError for wrong arguments, and
    OSError for a file that cannot be written, before anything is measured.
    """
    from ..backends import choice
    from .model import of_model, together
    from .run import Table, run

    dtype = as_dtype("dtype", dtype, (torch.bfloat16, torch.float16))

    def work(step: Callable[[], None]) -> Table:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}, must be an nn.Module")
        if path is not None and (not isinstance(path, (str, os.PathLike)) or not os.fspath(path)):
            raise TypeError(f"path: got {path!r}, must be the path of a file, or None")
        rows_of_x = _integers("tokens", tokens)
        found = of_model(model, _integers("rank", rank))
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype or found.dtype)
        if name is None:
            raise ValueError(
                f"dtype: got {found.dtype}, that of the layers, must be torch.bfloat16 or torch.float16: in others "
                "there is nothing to choose. Name the one that autocast computes in, if it is used"
            )
        file, weights = path and Path(path), (True, False) if found.dense else (False, True)
        more = dict(weights=weights, again=again, progress=progress, step=step)
        return run(found.shapes, rows_of_x, name, budget, file, **more)

    return [choice.parse(row) for row in together(work)["choices"]]


def _integers(name: str, value: Any) -> list[int]:
    """One or several integers, or none, as a list."""
    found = [value] if isinstance(value, int) else [] if value is None else value
    if not (isinstance(found, Sequence) and all(type(n) is int for n in found)):
        raise TypeError(f"{name}: got {value!r}, must be an integer, several of them, or None")
    return list(found)
