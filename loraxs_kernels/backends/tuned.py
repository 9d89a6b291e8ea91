"""What `loraxs tune` measured on the user's own GPU: a file for each GPU, used only where it was measured.

    {"format": "loraxs-tuned", "version": 1,
     "made_on": {...},      what the figures depend on, see `machine`
     "tiles": [...],        of the Triton kernels, rows of triton/config.py
     "choices": [...],      of backends, rows of choice.py
     "measured": [...]}     what was measured, so that a run can go on where the last one stopped (tuning/run.py)

The rows of a file go before those that come with the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..files import write_atomically
from .cuda import core
from .device import Device, facts

FORMAT, VERSION = "loraxs-tuned", 1
LISTS = ("tiles", "choices", "measured")
ROOT = Path(__file__).parent

Row = TypeVar("Row")
_tables: dict[Device, dict[str, Any]] = {}  # what a file has, or `install` has put in its place
_rows: dict[tuple[Device, str], tuple] = {}  # parsed
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def rows(device: Device, name: str, parse: Callable[[dict[str, Any]], Row]) -> tuple[Row, ...]:
    """The rows of one list of the user's table for such a device, parsed and kept.

    There are none where there is no table.  A table that is damaged, or that was measured under other conditions, is
    ignored, with one warning in a process that says why.
    """
    key = (device, name)
    if (found := _rows.get(key)) is not None:
        return found
    with _lock:
        if key not in _rows:
            try:
                _rows[key] = _parsed(device, name, parse)
            except Warning:  # if warnings are errors, this one is raised once, too
                _rows[key] = ()
                raise
        return _rows[key]


def _parsed(device: Device, name: str, parse: Callable[[dict[str, Any]], Row]) -> tuple[Row, ...]:
    table = _table(device)
    try:
        return tuple(map(parse, table.get(name, ())))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _ignore(f"{table['path']}: {name} has a row that cannot be ({type(error).__name__}: {error})")
        return ()


def _table(device: Device) -> dict[str, Any]:
    if device not in _tables:
        _tables[device] = {}
        here = machine(device)
        path = user_path(here["gpu"])
        try:
            table = {} if path is None else read(path)
        except FileNotFoundError:
            table = {}
        except ValueError as error:
            table = {}
            _ignore(str(error))
        if table and (why := differences(table["made_on"], here)):
            _ignore(f"{path}: was measured under other conditions ({why})")
        elif table:
            _tables[device] = table | {"path": path}
    return _tables[device]


def install(table: dict[str, Any]) -> None:
    """Use a table, which names its file at "path", in this process from now on, whatever the user's file has."""
    made_on = table["made_on"]
    with _lock:
        _tables[Device(tuple(made_on["capability"]), made_on["multiprocessors"])] = table
        _changed()


def forget() -> None:
    """Read the files again when a row is next asked for."""
    with _lock:
        _tables.clear()
        _changed()


def _changed() -> None:
    from . import choice
    from .triton import config

    _rows.clear()
    choice.forget()
    config.forget()


def differences(made_on: dict[str, Any], here: dict[str, Any]) -> str:
    """What a table depends on and is not the same here, in words; "": nothing."""
    others = {name: now for name, now in here.items() if made_on.get(name) != now}
    return "; ".join(f"{name}: {made_on.get(name)}, here {now}" for name, now in others.items())


def _ignore(why: str) -> None:
    warnings.warn(f"{why}. It is ignored; `loraxs tune` makes a new one, or delete it", stacklevel=2)


def machine(device: Device) -> dict[str, Any]:
    """What the figures of a table depend on; "gpu" is the name of the first GPU that is such a device, or None."""
    from . import NAMES, unavailable

    there = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    gpu = next((torch.cuda.get_device_name(each) for each in there if facts(each) == device), None)
    return {
        **{"gpu": gpu, "capability": list(device.capability), "multiprocessors": device.multiprocessors},
        **{name: version(name) for name in ("torch", "triton")},
        **{f"{name} kernels": kernels(name) for name in ("triton", "cuda")},
        "backends": [name for name in NAMES if unavailable(name) is None],
    }


@cache
def kernels(name: str) -> str:
    """A hash of a backend's own files, and of cuda the core's sources too."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / name).glob("*")) if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]:
        if file.suffix in (".py", ".json") and file.name != "aot.py":  # aot.py is for tests
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
    if name == "cuda":
        digest.update(str(core.sources() or core.compiled()).encode())
    return digest.hexdigest()[:16]


def version(package: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def user_path(gpu: str | None) -> Path | None:
    """Where the table for a GPU is: $LORAXS_TUNED, or <its name>.json in loraxs_kernels below $XDG_CONFIG_HOME.

    None: there is no GPU, or this user has no home folder.
    """
    if named := os.environ.get("LORAXS_TUNED"):
        return Path(named)
    if gpu is None:
        return None
    try:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        return None
    return home / "loraxs_kernels" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def read(path: Path) -> dict[str, Any]:
    """A table, its rows unparsed.  Raises FileNotFoundError, or a ValueError that names a file that is no table."""
    try:
        table = json.loads(path.read_text())
        if (table["format"], table["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {table['format']!r}, version {table['version']!r}")
        if not isinstance(table["made_on"], dict) or not all(isinstance(table[name], list) for name in LISTS):
            raise TypeError(f"made_on must be an object, {', '.join(LISTS)} lists")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: not a table of `loraxs tune` ({type(error).__name__}: {error})") from error
    return table


def write(table: dict[str, Any], path: Path) -> None:
    """Write a table with a line for each row, in one step."""
    head = {"format": FORMAT, "version": VERSION, "made_on": table["made_on"]}
    write_atomically(path, dumps(head, {name: table[name] for name in LISTS}).encode())


def dumps(head: dict[str, Any], lists: dict[str, list[dict[str, Any]]]) -> str:
    """A JSON object with a line for each entry of the lists."""
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, entries in lists.items():
        inside = ",\n  ".join(map(json.dumps, entries))
        parts.append(f'"{name}": [' + (f"\n  {inside}\n" if entries else "") + "]")
    return "{" + ",\n ".join(parts) + "}\n"
