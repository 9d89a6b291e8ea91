"""The files of an adapter bank: very many R on one basis, by name.

A bank is a folder.  `basis.safetensors` is written once (records.py).  `data.mdb` and `lock.mdb` are an LMDB
environment: a key is the name of an adapter in UTF-8, its value a record (records.py).  One more key, which cannot
be a name, holds the version of a record's layout, little-endian, and the digest of basis.safetensors.  It is written
last: a folder without it is no bank.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import adapter_format
from ..files import check_replaces, damaged, is_finite, named, sha256_of, target_of, unsealed, write_atomically
from ..matching import unwrapped
from ..naming import as_dtype
from .environment import DATA, LOCK, Environment, identity_of, load_lmdb
from .records import BASIS, DIGEST, KIND, LAYOUT, STORED, Records, key_of, packed_basis

TIE = b"\0loraxs_bank"
PAGE = 1000  # names read in one transaction
IN_MEMORY = 2**26  # bytes of records that wait in memory, and not in a temporary file, for their transaction

T = TypeVar("T")


class Store(Records):
    """A folder of adapters by name, which all have the same A and B.  The docstring of its module describes the files.

    Args:
        path: the folder of a bank that `create` has made.
        mode: "r" to read, "a" to add and remove, too.

    Any number of processes and threads may read while one writes; writers wait for each other.  When a call returns,
    what it has written is on the disk; a call that fails or is killed has written nothing.  A process made by fork
    opens the bank again by itself.  Needs the package lmdb.

    Attributes:
        path, mode: as given.
        base_model: the name of the base model.
        dtype: of R in the file.
        modules: (name, rank) of each module, in the order in which a record has them.
        places: for each module, the slice of a record that is its R.
        size: how many numbers a record has.
        alphas: {module: alpha} of the bank; `read` scales R to these.
        entries: {module: what the bank knows of it}, as for an adapter file: its rank, alpha, dropout, init_std and
            recipe, A and B if they were given, and R = basis.mixing(rank) with its probe.
        modules_to_save: their names.
        saved: their tensors.

    Raises FileNotFoundError if there is no bank at path, ValueError if its files are damaged or do not belong together,
    ImportError if lmdb is not installed.
    """

    def __init__(self, path: str | os.PathLike, mode: str = "r") -> None:
        if mode not in ("r", "a"):
            raise ValueError(f'mode: got {mode!r}, must be "r" or "a"')
        self.path, self.mode = named(path, "path", "a bank").absolute(), mode
        file = self.path / BASIS
        if not (file.is_file() and (self.path / DATA).is_file()):
            raise FileNotFoundError(
                f"path: there is no bank {path}; AdapterBank.create(path, model), or loraxs bank create, makes one"
            )
        super().__init__(self.path)
        self._environment: Environment | None = Environment.at(self.path)
        tie = self._environment.run(lambda txn: _copy(txn.get(TIE)))
        if tie is None:
            damaged(self.path, f"{DATA} is no bank's, or its creation was not finished")
        if tie[:4] != LAYOUT.to_bytes(4, "little"):
            version = int.from_bytes(tie[:4], "little")
            raise ValueError(f"{path}: is of version {version}, this loraxs_kernels reads {LAYOUT}; upgrade it")
        if tie[4:] != self._digest:
            damaged(self.path, f"{BASIS} and {DATA} are not of the same bank")

    @classmethod
    @torch.no_grad()
    def create(cls: type[T], path: str | os.PathLike, model: nn.Module, *, dtype: torch.dtype | str | None = None) -> T:
        """Make a bank without adapters, and open it to add some.

        Args:
            path: the folder, which is made if it does not exist.
            model: with adapters from `attach`.  The bank gets its A and B, its alphas (to which `read` scales R) and
                its modules_to_save, which all adapters share.  Its R is not stored: call `add` for that.
            dtype: of R in the bank, fp32 or bf16; None: fp32.

        Raises ValueError, before anything is written, if there is a bank at path already or the model has no adapters.
        If the call is interrupted, there is no bank, and you can call again.  Warns, as `save_adapter` does, if the
        base weights were rounded since A and B were made.
        """
        dtype = as_dtype("dtype", dtype, STORED) or torch.float32
        model, path = unwrapped(model), named(path, "path", "a bank")
        load_lmdb()  # before a folder is made
        if target_of(path / BASIS).exists():
            _refuse_foreign(path / BASIS)
        parts, moved = packed_basis(model, dtype)
        path.mkdir(parents=True, exist_ok=True)
        environment = Environment.at(path, create=True)

        def seal(txn: Any) -> None:
            if txn.get(TIE) is not None:
                raise ValueError(f"path: {path} is a bank already, must be a new folder")
            if txn.cursor().first():
                raise ValueError(f"path: {path / DATA} has records and is no bank's, must be a new folder")
            write_atomically(path / BASIS, *parts)
            txn.put(TIE, LAYOUT.to_bytes(4, "little") + bytes.fromhex(sha256_of(path / BASIS)))

        if moved:
            warnings.warn(
                f"{path}: A and B of {len(moved)} modules, the first {moved[0].label}, {moved[0].why_no_load()}. The "
                "bank attaches where the weights are those that A and B were made from, and not to this model as it is",
                stacklevel=3,  # past no_grad's wrapper
            )
        environment.run(seal, write=True)
        return cls(path, "a")

    def close(self) -> None:
        """Close the files.  Every later call raises ValueError; a second `close` does nothing."""
        self._environment = None

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _run(self, call: Callable[[Any], T], write: bool = False, room: int = 0) -> T:
        """What a call returns for a transaction; room: bytes that it will write."""
        self._check_open(write)
        anew = self._environment.process != os.getpid()  # after a fork, or where the map could not grow
        if (write or anew) and identity_of(self.path) != self._environment.identity:
            raise ValueError(f"{self.path}: {DATA} was replaced since the bank was opened; open it again")
        if anew:
            self._environment = Environment.at(self.path)
        return self._environment.run(call, write, room)

    def _check_open(self, write: bool) -> None:
        if self._environment is None:
            raise ValueError(f"{self.path}: the bank is closed")
        if write and self.mode != "a":
            raise ValueError(f'{self.path}: the bank is open for reading, must be opened with mode="a"')

    # Reading

    def __len__(self) -> int:
        return self._run(lambda txn: txn.stat(self._environment.main)["entries"]) - 1

    def __contains__(self, name: object) -> bool:
        try:
            key = key_of(name)
        except (TypeError, ValueError):
            return False
        return self._run(lambda txn: txn.get(key) is not None)

    def __bool__(self) -> bool:
        return True  # empty or not

    def __iter__(self) -> Iterator[str]:
        """The names of all adapters, sorted.  Those that are added or removed meanwhile may be among them or not."""
        return map(self._name, self._keys())

    def names(self) -> list[str]:
        """The names of all adapters, sorted."""
        return list(self)

    def _keys(self) -> Iterator[bytes]:
        keys, full = [TIE], True
        while full:  # a page that is not full is the last, so that a loop that adds a name for each name ends
            keys = self._run(partial(_keys_after, keys[-1]))
            yield from keys
            full = len(keys) == PAGE

    def _name(self, key: bytes) -> str:
        try:
            return key.decode()
        except UnicodeDecodeError as error:
            damaged(self.path / DATA, f"has a name that is not in UTF-8, {key!r}", error)

    def read(self, name: str, out: Tensor | None = None, *, digest: bytes | None = None) -> Tensor:
        """R of all modules of an adapter in one fp32 tensor of shape (size,), scaled to the alphas of the bank.

        Args:
            name: of the adapter.
            out: a tensor of shape (size,), fp32, on any device, which is written and returned; None: a new one.
            digest: the SHA-256 that its record must have, from an earlier call of `digests`; None: any.

        `places` has the slice of each module.  Raises KeyError if there is no adapter of that name, or if its record
        does not have the SHA-256 `digest`; ValueError if its record is damaged.
        """
        if out is not None and not (
            isinstance(out, Tensor) and out.shape == (self.size,) and out.dtype == torch.float32
        ):
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"out: got {got}, must be a tensor of torch.float32 and shape ({self.size},)")
        value = self._value(name)
        if digest not in (None, bytes(value[:DIGEST])):
            raise KeyError(f"{self.path}: adapter {name!r} was replaced since its SHA-256 was {digest.hex()}")
        R, alphas = self._opened(name, value)
        R = R.float()
        for module, alpha in alphas.items():
            R[self.places[module]] *= alpha / self.alphas[module]
        if out is None:
            return R
        with torch.no_grad():
            return out.copy_(R)

    def check_name(self, name: str) -> None:
        """Raise TypeError or ValueError for what cannot be the name of an adapter."""
        key_of(name)

    def digests(self, names: Iterable[str]) -> dict[str, bytes]:
        """The SHA-256 of each adapter's record as it is written there: another one for another record.

        Raises KeyError where there is no adapter of a name.
        """
        keys = {name: key_of(name) for name in names}

        def digest(txn: Any, name: str) -> bytes:
            value = txn.get(keys[name])
            if value is None:
                raise self._unknown(name)
            return bytes(value[:DIGEST])

        return self._run(lambda txn: {name: digest(txn, name) for name in keys})

    def record(self, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """{module: R} of an adapter as it is stored, and {module: alpha} of its own alphas.  Raises as `read` does."""
        R, alphas = self._opened(name, self._value(name))
        stored = {module: R[self.places[module]].view(rank, rank) for module, rank in self.modules}
        return stored, self.alphas | alphas

    def _value(self, name: str) -> bytearray:
        key = key_of(name)
        value = self._run(lambda txn: _copy(txn.get(key)))
        if value is None:
            raise self._unknown(name)
        return value

    def _unknown(self, name: str) -> KeyError:
        return KeyError(f"{self.path}: has no adapter {name!r}")

    def verify(self) -> dict[str, str]:
        """Read every record; return {name: what is wrong} of those that are damaged."""
        wrong = {}
        for key in self._keys():
            name = key.decode("utf-8", "surrogateescape")
            value = self._run(lambda txn, key=key: _copy(txn.get(key)))
            if value is None:  # was removed meanwhile
                continue
            try:
                R, _ = self._opened(name, value)
                if not is_finite(R):
                    damaged(f"{self.path}: adapter {name!r}", "R has NaN or Inf values")
                self._name(key)
            except ValueError as error:
                wrong[name] = str(error)
        return wrong

    # Writing

    def add(
        self, name: str, what: str | os.PathLike | nn.Module | Mapping[str, Tensor], *, replace: bool = False
    ) -> None:
        """Store an adapter.

        Args:
            name: 1 to 511 bytes in UTF-8, without a null byte.
            what: the path of an adapter (a file or folder of `save_adapter`), a model with adapters, or {module: R}.  R
                of a file or a model is checked: with the bank's A and B it must make the same delta W = s B R A, to a
                relative error of 1e-3.  R in a mapping is not checked: it must have been trained with the bank's own A,
                B and alpha.
            replace: whether to replace an adapter of that name; if False, such an adapter is an error.

        Raises ValueError, or AdapterMismatch if A and B are not the bank's, naming the file and the module; nothing is
        stored then.
        """
        self.add_many([(name, what)], replace=replace)

    @torch.no_grad()
    def add_many(
        self,
        items: Mapping[str, Any] | Iterable[tuple[str, Any]] | str | os.PathLike,
        *,
        replace: bool = False,
    ) -> int:
        """Store many adapters in one transaction: all of them or, if anything is wrong, none.

        Args:
            items: a mapping {name: what}, or an iterable of pairs (name, what), with `what` as for `add`; or a
                folder: its *.safetensors are adapter files, and their names without .safetensors are the adapters'
                names.
            replace: as for `add`.

        Returns the number of adapters.  LMDB keeps a whole transaction in memory while it is committed: if the adapters
        are larger than that, split them into several calls.
        """
        return len(self._put(items, replace, {}))

    def _put(self, items: Any, replace: bool, read: Mapping[str, bytes | None]) -> dict[str, bytes]:
        """`add_many`; returns the SHA-256 of each record.

        read: of records that were read before, their SHA-256, None where there was none.  A record that would be the
        same is not written, and if one is another by now, that is a ValueError.
        """
        self._check_open(write=True)
        digests: dict[str, bytes] = {}
        places: dict[bytes, tuple[int, int]] = {}
        with self._naming_folder(), tempfile.SpooledTemporaryFile(IN_MEMORY, dir=self.path) as waiting:
            for name, what in _pairs(items):
                key = key_of(name)
                if key in places:
                    raise ValueError(f"items: has the name {name!r} twice")
                if not replace and name in self:
                    raise self._exists(name)
                value = self._record_from(name, what)
                digests[name] = bytes(value[:DIGEST])
                if digests[name] == read.get(name):
                    continue
                places[key] = waiting.tell(), len(value)
                waiting.write(value)

            def put(txn: Any) -> None:
                for key in sorted(places):
                    if (name := key.decode()) in read and bytes((txn.get(key) or b"")[:DIGEST]) != (read[name] or b""):
                        raise ValueError(
                            f"{self.path}: adapter {name!r} was changed or removed by another since it was read, and "
                            f"nothing was written; commit the others by their names, or add({name!r}, ..., "
                            "replace=True)"
                        )
                    start, length = places[key]
                    waiting.seek(start)
                    if not txn.put(key, waiting.read(length), overwrite=replace):
                        raise self._exists(key.decode())

            if places:
                self._run(put, write=True, room=sum(length for _, length in places.values()))
        return digests

    def remove(self, name: str) -> None:
        """Delete an adapter.  Raises KeyError if there is none of that name."""
        key = key_of(name)
        if not self._run(lambda txn: txn.delete(key), write=True):
            raise self._unknown(name)

    def _exists(self, name: str) -> ValueError:
        return ValueError(
            f"name: {self.path} has an adapter {name!r} already; replace=True (--replace) takes its place"
        )

    @contextmanager
    def _naming_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno and error.filename is None:  # a full disk, met by the temporary file
                error.filename = str(self.path)
            raise

    # Between a bank and adapter files or models

    @torch.no_grad()
    def export(self, name: str, path: str | os.PathLike) -> None:
        """Write an adapter to a file for `load_adapter`, as `save_adapter` does: R and alpha as they are stored.

        Records have no dropout and no init_std: the file gets those of the model that the bank was created from.

        Raises KeyError if there is no adapter of that name, ValueError if its record is damaged, or if there is a file
        at path that is no adapter.
        """
        target = target_of(path)
        if target.name in (BASIS, DATA, LOCK) and (target.parent / DATA).exists():
            raise ValueError(f"path: {path} is a file of a bank, must be another")
        check_replaces(path, "loraxs", "LoRA-XS adapter")
        stored, alphas = self.record(name)
        descriptions, records, factors = {}, {}, {}
        for module, R in stored.items():
            entry, known = self.entries[module], self._fingerprints[module]
            descriptions[module] = adapter_format.described(entry | {"alpha": alphas[module]}, entry["recipe"], module)
            records[module] = {"R": R, "S": known.S, "probe": known.probes(R)}
            if not is_finite(records[module]["probe"]):
                raise ValueError(f"{self.path}: adapter {name!r}: R of module {module!r} is too large for a file")
            if "A" in entry:
                factors[module] = entry["A"], entry["B"]
        shared = {module: entry["shared"] for module, entry in self.entries.items() if "shared" in entry}
        header = {"base_model": self.base_model, "shared": shared}
        saved = self.modules_to_save, self.saved
        write_atomically(path, *adapter_format.packed("loraxs", header, descriptions, records, factors, *saved))


def _refuse_foreign(file: Path) -> None:
    """ValueError for a file in the place of a basis that no `create`, killed or not, has left there."""
    try:
        unsealed(file, KIND, "basis of an adapter bank")
    except ValueError as error:
        raise ValueError(f"path: {file} is there and is no bank's; must be a new folder") from error


def _pairs(items: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(items, Mapping):
        return items.items()
    if not isinstance(items, (str, os.PathLike)):
        return _checked_pairs(items)
    folder = named(items, "items", "a folder of adapters")
    if not folder.is_dir():
        raise FileNotFoundError(f"items: there is no folder {items}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"items: the folder {items} has no *.safetensors")
    return ((file.stem, file) for file in files)


def _checked_pairs(items: Any) -> Iterator[tuple[str, Any]]:
    must = "a mapping, pairs of a name and an adapter, or a folder"
    if not isinstance(items, Iterable):
        raise TypeError(f"items: got a {type(items).__name__}, must be {must}")
    for pair in items:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"items: got {pair!r} among them, must be {must}")
        yield tuple(pair)


def _keys_after(key: bytes, txn: Any) -> list[bytes]:
    """The next PAGE keys, or as many as there are."""
    cursor = txn.cursor()
    there = cursor.set_range(key + b"\0")  # the least key after it; if there is none, iternext would begin anew
    return [bytes(each) for each in islice(cursor.iternext(values=False), PAGE)] if there else []


def _copy(value: memoryview | None) -> bytearray | None:
    return None if value is None else bytearray(value)
