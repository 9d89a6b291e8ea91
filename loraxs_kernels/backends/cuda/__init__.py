"""The primitive with the CUDA core."""

from . import core


def unavailable() -> str | None:
    """Why this backend cannot run here; None: it can."""
    return core.missing() or "this version of loraxs_kernels has no cuda backend"
