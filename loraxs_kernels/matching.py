"""Which modules a list of names, or a pattern, means: as PEFT reads target_modules and rank_pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a regular expression matches the whole name, or the name is or ends with one of a list."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the name or an end of it that begins after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
