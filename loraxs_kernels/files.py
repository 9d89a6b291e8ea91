"""Files that are written whole or not at all, and checked against their SHA-256 when they are read.

An adapter or basis file is a safetensors file with an entry in its metadata, the header: a JSON object, whose name says
what the file is.  Its first field is the SHA-256 of the whole file, computed with zeros in its place.  Another entry is
the version of this library that wrote the file.  Earlier files have none, and only `loraxs inspect` reads it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Version 1 had no checksum, and up to version 2 a recipe had a tier.  Version 4 is only for models with a module in
# several places: a reader of version 3 would adapt one of the places where the other model has two modules.
FORMAT_VERSION, NEWEST = 3, 4
WRITER, METADATA = "loraxs_kernels", b'{"__metadata__":{'
WRITERS = 8  # of a file's temporary names, how many are searched for leftovers of killed writers
MOST_LOST = 8  # new files that one write may lose: a file system that mistakes its own files would take any number
# The errors by which a file system, such as one on a network, says that it cannot flush a folder.
UNFLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
SHOWN = 1000  # characters of what is wrong with a file, which may quote what is in it
SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))
UNKNOWN = "0" * 64  # in the place of a digest that is being computed


def write_atomically(path: str | os.PathLike, *parts: bytes | memoryview) -> None:
    """Replace the file by one that holds `parts`, in one step: a reader finds the old file or the new one, whole.

    The parts go to a temporary file in the same folder, which is flushed to the disk and then renamed.  A file that
    exists keeps its mode, and a symbolic link stays one: the file it points to is replaced.  What a killed process has
    left behind of the same file is removed.  Raises ValueError where the path is no regular file, OSError where the
    disk does not take it, and PermissionError for a file that may not be written.
    """
    target = target_of(path)
    try:
        _replace(target, parts)
    except OSError as error:
        if error.errno:  # a full disk has no name, and the temporary file has one that says nothing
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _replace(target: Path, parts: Sequence[bytes | memoryview]) -> None:
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    target.parent.mkdir(parents=True, exist_ok=True)
    f = _temporary(target)
    try:
        with nullcontext() if fcntl else f:  # Windows moves and removes no open file; elsewhere closing unlocks it
            for part in map(memoryview, parts):
                while part:
                    part = part[f.write(part) :]
            if mode is not None:
                os.chmod(f.name, mode)
            os.fsync(f.fileno())
        os.replace(f.name, target)
    except BaseException:
        Path(f.name).unlink(missing_ok=True)
        raise
    finally:
        f.close()
    try:  # the rename itself, too, where that can be; Windows opens no folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in UNFLUSHED:
            raise


def named(path: str | os.PathLike, argument: str, what: str) -> Path:
    """A path as a Path; TypeError for what is none, ValueError for '', which Path takes for the current folder."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument}: got a {type(path).__name__}, must be the path of {what}")
    if not os.fspath(path):
        raise ValueError(f"{argument}: got '', must be the path of {what}")
    return Path(path)


def target_of(path: str | os.PathLike, argument: str = "path") -> Path:
    """The file that a path, or the link there, names.

    Raises TypeError or ValueError, naming the argument, where no file can be written, PermissionError where one is
    that may not be written, or a folder that may not.
    """
    named(path, argument, "a file")
    try:
        target = Path(os.path.realpath(path))
        str(target).encode()
    except ValueError:  # a null byte, or a surrogate
        raise ValueError(
            f"{argument}: got {str(path)!r}, must be a name in UTF-8 without a null byte, for safetensors"
        ) from None
    if target.is_symlink():
        raise ValueError(f"{argument}: {path} is a link to itself, must be the name of a file")
    if os.fspath(path).endswith(SEPARATORS):
        raise ValueError(f"{argument}: got {str(path)!r}, must be the name of a file")
    parts = Path(path).parts
    if len(parts) > 1 and parts[0].startswith("~") and not os.path.exists(parts[0]):
        raise ValueError(f"{argument}: got {str(path)!r}, must be without ~, as os.path.expanduser makes it")
    if os.path.exists(path) and not target.is_file():  # /dev/stdout may exist where its target does not: a pipe
        what = "a folder" if target.is_dir() else "no regular file"
        raise ValueError(f"{argument}: {path} is {what}, must be the name of a file")
    if target.exists() and not os.access(target, os.W_OK):  # a rename needs no permission of the file that it replaces
        raise PermissionError(errno.EACCES, f"{argument} is a file without permission to write", str(path))
    above = next(each for each in target.parents if each.exists())
    if not above.is_dir():
        raise ValueError(f"{argument}: {path} is in {above}, which is no folder")
    if not os.access(above, os.W_OK):
        raise PermissionError(errno.EACCES, f"{argument} is in a folder without permission to write", str(path))
    return target


def check_replaces(path: str | os.PathLike, kind: str, what: str, argument: str = "path") -> None:
    """Refuse a path where a file is that is not of this kind, and not empty: nothing else of the user's is replaced.

    kind, what: as for `unsealed`.
    """
    target = target_of(path, argument)
    if target.exists() and target.stat().st_size and kind not in metadata_of(target):
        raise ValueError(
            f"{argument}: {path} is there and is damaged or no {what}, so it is not replaced; must be another name"
        )


def metadata_of(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file; nothing for any other file."""
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            return f.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}


def _temporary(target: Path) -> FileIO:
    """A new file in the target's folder, locked where the file system has locks.

    Its name does not grow with the target's.  The names are the same each time, so that one that a killed process has
    left is found without reading the folder.
    """
    stem = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    paths = (target.with_name(f".loraxs-{stem}-{i}.tmp") for i in itertools.count())
    first = list(itertools.islice(paths, WRITERS))
    for path in first:
        _remove_if_left(path)
    lost = 0
    for path in itertools.chain(first, paths):
        try:
            f = open(path, "xb", buffering=0)  # noqa: SIM115
        except FileExistsError:  # another process is writing the same file
            continue
        if not _lock(f, wait=True) or _is_at(path, f):  # else another process took it for a leftover before that
            return f
        f.close()
        lost += 1
        if lost == MOST_LOST:
            raise OSError(errno.EBUSY, "no new file can be made beside it that stays where it is", str(target))


def _remove_if_left(temporary: Path) -> None:
    """Remove a temporary file if no process holds a lock on it."""
    try:
        with open(temporary, "rb", buffering=0) as f:
            if _lock(f, wait=False) and _is_at(temporary, f):
                temporary.unlink()
    except OSError:  # there is none, or it is another user's
        pass


def _is_at(path: Path, f: FileIO | BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
    except FileNotFoundError:
        return False


def _lock(f: FileIO, wait: bool) -> bool:
    """Lock an open file until it is closed or its process ends, however it ends; returns whether that was done."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (AttributeError, OSError):  # the system or the file system has no such locks, or another process holds it
        return False
    return True


def sealed(tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> tuple[bytes | memoryview, ...]:
    """The parts of a safetensors file of these tensors, with the header and its checksum under the name `kind`."""
    from . import __version__

    text = json.dumps({"sha256": UNKNOWN, "version": FORMAT_VERSION, **header}, separators=(",", ":"))
    data = safetensors.torch.save(dict(tensors), {kind: text})
    # safetensors writes several entries in any order, but the same adapter must make the same file.
    end = 8 + int.from_bytes(data[:8], "little")
    start = data[8:end].rstrip().replace(METADATA, METADATA + f'"{WRITER}":"{__version__}",'.encode(), 1)
    start += b" " * (-len(start) % 8)
    data = memoryview(b"".join((len(start).to_bytes(8, "little"), start, memoryview(data)[end:])))
    start = 8 + start.index(UNKNOWN.encode())
    return data[:start], hashlib.sha256(data).hexdigest().encode(), data[start + len(UNKNOWN) :]


def unsealed(path: Path, kind: str, what: str, argument: str = "path") -> tuple[dict[str, Any], Any]:
    """The header of a file that `sealed` made or that has an earlier version, and the open file, for `tensors_of`.

    kind: the name of the header.  what: the kind of file in words.  argument: the parameter that named it.  Raises
    FileNotFoundError where there is no such file, and ValueError, naming the file, where it is another kind of file, of
    an unknown version or not as it was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    for _ in range(100):
        with open(path, "rb") as raw:
            f = opened(path)
            if _is_at(path, raw):  # else another one has taken its place, before or after `f` was opened
                return _checked_header(path, kind, what, (f.metadata() or {}).get(kind), raw), f
    raise OSError(f"{path}: is replaced by other processes faster than it can be read")


def opened(path: Path) -> Any:
    """An open safetensors file, which a `with` block closes; ValueError, naming it, where it is not a whole one."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error


def _checked_header(path: Path, kind: str, what: str, text: str | None, raw: BinaryIO) -> dict[str, Any]:
    if text is None:
        raise ValueError(f"{path}: is a safetensors file, but no {what} (its metadata has no {kind!r})")
    header = read_json(text, str(path))
    version = header.get("version")
    if type(version) is not int or not 1 <= version <= NEWEST:
        raise ValueError(
            f"{path}: is of format version {version!r}, this loraxs_kernels reads 1 to {NEWEST}; upgrade it"
        )
    if version > 1:
        said = header.pop("sha256", None)
        if not (isinstance(said, str) and re.fullmatch("[0-9a-f]{64}", said)):
            damaged(path, f"its header has {said!r} for a SHA-256")
        if said != (found := _sha256(raw, said)):
            damaged(path, f"its SHA-256 is {found}, and its header says {said}")
    return header


def _sha256(f: BinaryIO, said: str) -> str:
    """The digest of a file with zeros in the place of the one that it holds."""
    length = f.read(8)
    start = length + f.read(int.from_bytes(length, "little"))
    return _digest_of_rest(f, hashlib.sha256(start.replace(said.encode(), UNKNOWN.encode(), 1)))


def sha256_of(path: Path) -> str:
    """The digest of a whole file."""
    with open(path, "rb") as f:
        return _digest_of_rest(f, hashlib.sha256())


def _digest_of_rest(f: BinaryIO, digest: Any) -> str:
    while chunk := f.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def tensors_of(f: Any, path: Path) -> dict[str, Tensor]:
    """All tensors of an open safetensors file; ValueError, naming the file, for one that cannot be read.

    They are copies: the file is mapped, and a program that writes over it in place, as cp does, would change them after
    they were checked, or crash this process.
    """
    return {key: tensor_of(f, key, path).clone() for key in f.keys()}  # noqa: SIM118


def tensor_of(f: Any, key: str, path: Path) -> Tensor:
    """One tensor of an open safetensors file; ValueError, naming the file, if it cannot be read."""
    try:
        return f.get_tensor(key)
    except Exception as error:  # of many kinds: a dtype that this torch does not have, a shape that does not fit
        damaged(path, f"tensor {key!r} cannot be read ({error})", error)


def check_finite(t: Tensor, path: Path, what: str) -> None:
    """ValueError, naming the file, where a tensor has NaN or Inf values."""
    if not is_finite(t):
        damaged(path, f"{what} has NaN or Inf values")


def is_finite(t: Tensor) -> bool:
    """Whether a tensor of any dtype has neither NaN nor Inf values."""
    if t.is_floating_point() and t.element_size() == 1:
        t = t.float()  # isfinite does not support float8
    return not (t.is_floating_point() or t.is_complex()) or bool(torch.isfinite(t).all())


def has_shape(shape: Sequence[int], must: Sequence[int | None]) -> bool:
    """Whether a shape is the one it must be; None: any size."""
    return len(shape) == len(must) and all(size in (None, n) for n, size in zip(shape, must, strict=True))


def read_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text; ValueError, beginning with `where`, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, nested too deep
        raise ValueError(f"{where}: is damaged, no JSON ({str(error) or type(error).__name__})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: is damaged, no JSON object but a {type(found).__name__}")
    return found


def damaged(path: str | os.PathLike, problem: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the ValueError for a file that is not what was written."""
    shown = problem if len(problem) <= SHOWN else f"{problem[:SHOWN]}..."
    raise ValueError(f"{path}: is damaged: {shown}") from cause
