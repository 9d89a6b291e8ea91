"""Changes of a model that happen as a whole or not at all, whatever stops them: an error, Ctrl-C, a warning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_gathered


@contextmanager
def transaction(model: nn.Module) -> Iterator[ExitStack]:
    """Put a model back as it was if the block does not come to its end.

    Modules, parameters and buffers are put back where they stood, with their requires_grad, and the attributes of every
    module, with what is in those that are dictionaries, lists or sets.  No tensor is copied here: a block that writes
    into tensors first calls `keep`, which copies them.  What is not part of the model is put back by callbacks that the
    block adds to the ExitStack it gets.
    """
    before = [(m, dict(vars(m)), _contents(m)) for m in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    with ExitStack() as undo:
        undo.callback(_put_back, before, trained)
        yield undo
        undo.pop_all()


def keep(undo: ExitStack, tensors: Iterable[Tensor]) -> None:
    """Let a transaction write back the values that tensors have now; of a sharded tensor each rank keeps its part."""
    for t in tensors:
        if hasattr(t, "_z3_optimizer") and t.requires_grad:  # DeepSpeed's ZeRO-3: its fp32 copy of a part
            undo.callback(t._z3_optimizer.set_local_hp_param, t._z3_optimizer.get_local_fp32_param(t).clone(), t)
        if (mapping := getattr(t, "_hp_mapping", None)) is not None:  # that of ZeRO-1 and ZeRO-2
            undo.callback(_write, mapping.hp_fragment.data, mapping.hp_fragment.detach().clone())
        part = t if is_gathered(t) else getattr(t, "ds_tensor", t)
        undo.callback(_write, part, part.detach().clone())


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    # By the kind's constructor: DeepSpeed's ZeRO-3 has dictionaries that cannot copy themselves.  By the type: a proxy
    # whose object is gone has no class.
    held = vars(module).values()
    return [(each, kind(each)) for each in held for kind in (dict, list, set) if issubclass(type(each), kind)]


def _put_back(before: list[tuple[nn.Module, dict[str, Any], list]], trained: list[tuple[Tensor, bool]]) -> None:
    for module, attributes, contents in before:
        vars(module).clear()
        vars(module).update(attributes)
        for held, content in contents:
            if not _same(held, content):  # what is as it was may refuse to be written, as diffusers' configurations do
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)
    for p, requires_grad in trained:
        if p.requires_grad != requires_grad:  # a parameter may refuse to be set, such as one that is not initialized
            with torch.inference_mode(p.is_inference()):
                p.requires_grad_(requires_grad)


def _same(a: Any, b: Any) -> bool:
    """Whether two dictionaries, lists or sets have the very same content, in the same order."""
    if isinstance(a, dict) and not all(map(is_, a.values(), b.values())):
        return False
    return len(a) == len(b) and all(map(is_, a, b))


@torch.no_grad()
def _write(t: Tensor, value: Tensor) -> None:
    t.copy_(value)
