"""Which modules a list of names, or a pattern, means: as PEFT reads target_modules."""

from __future__ import annotations

import re
from collections.abc import Sequence


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a regular expression matches the whole name, or the name is or ends with one of a list."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)
