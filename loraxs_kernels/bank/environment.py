"""LMDB for adapter banks: one environment for each file in a process, which grows, forks and is copied without harm."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ..files import damaged

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DATA, LOCK = "data.mdb", "lock.mdb"
FIRST_MAP = 2**20  # bytes of address space, doubled whenever they are full
READERS = 4096  # transactions at a time, of all processes
ATTEMPTS = 1000  # milliseconds to wait for another thread that closes an environment

T = TypeVar("T")


@functools.cache
def load_lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError('an adapter bank needs the package lmdb: pip install "loraxs_kernels[bank]"') from error
    # Before 2.0 it hangs or fails after a fork, and opens a file twice at once without an error; 2.2 loses its handle
    # when the map grows.
    if tuple(map(int, lmdb.__version__.split(".")[:2])) < (2, 3):
        raise ImportError(f"an adapter bank needs lmdb 2.3 or later, got {lmdb.__version__}: pip install -U lmdb")
    if hasattr(os, "register_at_fork"):
        parts = {"before": _before_fork, "after_in_parent": _after_fork, "after_in_child": _after_fork_in_child}
        os.register_at_fork(**parts)
    return lmdb


class _Gate:
    """Transactions of this process run together; what must not meet one (a new map, a fork) shuts the gate, waits for
    those inside, and keeps others out.

    A transaction takes its token out of `inside` by one step that Ctrl-C cannot divide, or all would wait for it.
    """

    def __init__(self) -> None:
        self.inside: set[object] = set()
        self._shut = threading.Lock()

    def enter(self, token: object) -> None:
        self.inside.add(token)  # before it is asked whether the gate is shut, so that `shut` sees it
        while self._shut.locked():
            self.inside.discard(token)
            with self._shut:
                pass
            self.inside.add(token)

    def shut(self) -> None:
        self._shut.acquire()
        try:
            while self.inside:
                time.sleep(0.0001)
        except BaseException:  # Ctrl-C
            self._shut.release()
            raise

    def open(self) -> None:
        self._shut.release()


class Environment:
    """An LMDB environment, of which a process may have one for a file: all banks on that file share it.

    It closes with the last of them.  No memory that LMDB maps is left outside of a transaction, since the map moves
    when it grows.

    LMDB tells by a lock on the first byte of its lock file that others have the environment open.  That lock is the
    process's, so that the system drops it when the process opens and closes that file again, as a copy of the folder
    does; the next process would then begin a new lock file under the feet of this one.  A second lock, which belongs to
    an open file of its own, stays.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.process, self.lock = path, os.getpid(), None
        readonly = (path / DATA).exists() and not os.access(path / DATA, os.W_OK)
        size = 0 if (path / DATA).exists() else FIRST_MAP  # 0: as it is
        with _explained(path, unless="already open"):
            self.lmdb = load_lmdb().open(
                str(path), size, readonly=readonly, create=False, max_readers=READERS, max_spare_txns=0
            )
            self.main = self.lmdb.open_db(None)
            self.lmdb.reader_check()  # forget readers that were killed
        self.identity = identity_of(path)
        with suppress(OSError, AttributeError):  # where the system has such locks, and the file can be read
            self.lock = os.open(path / LOCK, os.O_RDONLY)
            fcntl.fcntl(self.lock, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 1, 0))
        info, page = self.lmdb.info(), self.lmdb.stat()["psize"]
        must, size = (info["last_pgno"] + 1) * page, os.path.getsize(path / DATA)
        if size < must:
            damaged(path / DATA, f"it has {size} bytes and must have {must}; copy it again")

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, there is no `os`
        if self.lock is not None:
            close(self.lock)

    @classmethod
    def at(cls, path: Path, create: bool = False) -> Environment:
        """The environment of a folder, which is opened if this process does not have it open."""
        with _lock:
            try:
                there = _environments.get(identity_of(path))
            except FileNotFoundError:
                if not create:
                    raise
                there = None
            for attempt in itertools.count():
                try:
                    if there is None:
                        there = cls(path)
                        _environments[there.identity] = there
                    return there
                except load_lmdb().Error as error:  # if it is "already open", another thread is about to close it
                    if attempt == ATTEMPTS or "already open" not in str(error):
                        raise OSError(
                            f"{path}: LMDB says {error}; if {DATA} was replaced, close the bank that was opened before"
                        ) from error
                    time.sleep(0.001)

    def run(self, call: Callable[[Any], T], write: bool = False, room: int = 0) -> T:
        """What a call returns for a transaction, which is committed then; room: bytes that it will write.

        Where the map is too small the call is made again in a larger one.
        """
        lmdb = load_lmdb()
        while True:
            gate, token = _gate, object()
            try:
                try:
                    gate.enter(token)
                    with _explained(self.path), self.lmdb.begin(write=write, buffers=True) as txn:
                        return call(txn)
                finally:
                    gate.inside.discard(token)
            except lmdb.MapFullError:
                if not self.lmdb.reader_check():  # else readers that were killed kept pages from being used again
                    self._resize(2 * self.lmdb.info()["map_size"] + room)
            except lmdb.MapResizedError:  # another process has made it larger
                self._resize(0)

    def _resize(self, size: int) -> None:
        _gate.shut()
        try:
            self.lmdb.set_mapsize(size)
        except load_lmdb().MemoryError as error:  # it can be used no more, and must be opened anew
            self.lmdb.close()
            self.process = None
            _environments.pop(self.identity, None)
            what = f"LMDB cannot map {size / 2**20:,.0f} MiB of the file, as below a limit of addresses (ulimit -v)"
            raise OSError(errno.ENOMEM, what, str(self.path)) from error
        finally:
            _gate.open()


_gate = _Gate()
_lock = threading.Lock()  # guards _environments
_environments: weakref.WeakValueDictionary[tuple[int, int], Environment] = weakref.WeakValueDictionary()


def identity_of(path: Path) -> tuple[int, int]:
    stat = os.stat(path / DATA)
    return stat.st_dev, stat.st_ino


@contextmanager
def _explained(path: Path, unless: str | None = None) -> Iterator[None]:
    """LMDB's errors as a ValueError (a damaged file) or an OSError that names the file; not those that say `unless`."""
    lmdb = load_lmdb()
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError):
        raise
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError) as error:
        damaged(path / DATA, f"LMDB says {error}", error)
    except lmdb.DiskError as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    except lmdb.Error as error:
        if unless is not None and unless in str(error):
            raise
        if isinstance(error, lmdb.ReadonlyError) or "Permission denied" in str(error):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / LOCK)) from error
        raise OSError(f"{path}: LMDB says {error}") from error


def _before_fork() -> None:
    _lock.acquire()
    _gate.shut()


def _after_fork() -> None:
    with suppress(RuntimeError):  # it is open where Ctrl-C has stopped `_before_fork`, after which Python forks, too
        _gate.open()
    _lock.release()


def _after_fork_in_child() -> None:
    """LMDB allows a child nothing but to open the file anew, which Store._run of store.py does."""
    global _gate, _lock
    for each in list(_environments.values()):
        each.lmdb.close()
        if each.lock is not None:
            os.close(each.lock)
            each.lock = None
    _environments.clear()
    _gate, _lock = _Gate(), threading.Lock()
