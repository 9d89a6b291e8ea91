"""Which modules a list of names, or a pattern, means: as PEFT reads target_modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a regular expression matches the whole name, or the name is or ends with one of a list."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def targets_for(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The target_modules by which PEFT finds these modules and no others: the last parts of their names if that is
    enough, else the names, else a regular expression."""
    inside = tuple(f"{name}." for name in names)
    there = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in there if matches(name, candidate)} == set(names):
            return candidate
    return "|".join(re.escape(name) for name in names)
