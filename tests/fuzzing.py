"""How the fuzzers run hypothesis: the same cases each time, or LORAXS_FUZZ=20000 new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def cases(usually: int) -> settings:
    """The settings of a fuzzer that tries so many cases where LORAXS_FUZZ says nothing else."""
    return settings(
        max_examples=int(os.environ.get("LORAXS_FUZZ", usually)),
        derandomize="LORAXS_FUZZ" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
