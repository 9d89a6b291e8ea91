"""Files that are whole or not there: what this library writes, it writes in one step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, data: bytes | Callable[[Path], None]) -> None:
    """Replace the file in one step: a temporary file beside it, flushed to the disk, then renamed.

    `data` is what to write, or a function that writes it all to the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as f:
            if isinstance(data, bytes):
                f.write(data)
                f.flush()
            else:
                data(temporary)
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
