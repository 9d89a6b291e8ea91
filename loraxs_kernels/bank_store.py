"""The files of an adapter bank: very many R on one basis, by name.

A bank is a folder.  `basis.safetensors` is written once: what is known of A and B (basis.Fingerprint), sealed as
files.py does.  Header: {"base_model", "dtype", "modules_to_save", "layer", "modules"} under "loraxs_bank".  Tensors:

    S/r, left/r, right/r, gram_A/r, gram_B/r    the fields of basis.Fingerprint, stacked over the modules of rank r
    A/i, B/i                                    the factors of module i, where they were given and not computed
    model/NAME                                  every tensor of the modules_to_save, by its name in the model

`data.mdb` and `lock.mdb` are an LMDB environment.  A key is the name of an adapter in UTF-8, a value

    SHA-256 (32 bytes) of the digest of basis.safetensors, the name and what follows
    version, n (u32 each), n times (module u32, alpha f64) for the modules whose alpha is not the bank's
    R of all modules in the order of the header, each r x r by rows, in the bank's dtype

all little-endian.  One more key, which cannot be a name, holds the version of this layout and the digest of
basis.safetensors.  It is written last: a folder without it is no bank.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from . import adapter_file, basis
from .acceptance import HOW, AdapterMismatch, fitted_to, mismatch
from .bank_environment import DATA, LOCK, Environment, identity_of, load_lmdb
from .basis import ACCEPT, DIFFERENT, PROBES, Fingerprint
from .files import damaged, is_finite, sha256_of, tensors_of, unsealed, write_atomically
from .linear import LoraXSLinear
from .model import unwrapped
from .naming import as_dtype
from .weights import FLOATS, whole

KIND = "loraxs_bank"
BASIS = "basis.safetensors"
DTYPES = (torch.float32, torch.bfloat16)
LAYOUT = 1  # of the LMDB environment
TIE = b"\0loraxs_bank"
LONGEST = 511  # bytes of a key that LMDB takes
HEAD, ALPHA = struct.Struct("<II"), struct.Struct("<Id")
DIGEST = 32
PAGE = 1000  # names read in one transaction
IN_MEMORY = 2**26  # bytes of records that wait in memory, and not in a temporary file, for their transaction

T = TypeVar("T")


class Store:
    """A folder of adapters by name, which all have the same A and B.  bank_store.py describes its files.

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
        self.path, self.mode = Path(path).absolute(), mode
        file = self.path / BASIS
        if not (file.is_file() and (self.path / DATA).is_file()):
            raise FileNotFoundError(
                f"path: there is no bank {path}; AdapterBank.create(path, model), or loraxs bank create, makes one"
            )
        header, f = unsealed(file, KIND, "basis of an adapter bank")
        self._digest = bytes.fromhex(sha256_of(file))
        dtype = header.pop("dtype", None)
        if dtype not in map(basis.dtype_name, DTYPES):
            damaged(file, f"dtype is {dtype!r} in its header, must be float32 or bfloat16")
        found = adapter_file.unpacked(header, tensors_of(f, file), _stacked, file)
        self.entries, self.modules_to_save, self.saved = found
        self.dtype, self.base_model = basis.DTYPES[dtype], header["base_model"]
        self.modules = tuple((name, entry["rank"]) for name, entry in self.entries.items())
        self.alphas = {name: float(entry["alpha"]) for name, entry in self.entries.items()}
        self.places, self.size = {}, 0
        for name, rank in self.modules:
            self.places[name] = slice(self.size, self.size + rank**2)
            self.size += rank**2
        self._fingerprints = {}
        for name, entry in self.entries.items():
            if not entry["alpha"]:
                damaged(file, f"module {name!r}: alpha is 0 in its header")
            known = self._fingerprints[name] = Fingerprint(**{each: entry.pop(each) for each in FINGERPRINT})
            R = basis.mixing(entry["rank"], torch.device("cpu"))
            entry |= {"S": known.S, "R": R, "probe": known.probes(R)}
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
        dtype = as_dtype("dtype", dtype, DTYPES) or torch.float32
        model, path = unwrapped(model), Path(path)
        descriptions, records, factors, moved = {}, {}, {}, []
        load_lmdb()  # before a folder is made
        if (path / BASIS).exists():
            _refuse_foreign(path / BASIS)
        for name, layer in adapter_file.layers_to_save(model):
            descriptions[name] = adapter_file.description(layer, name)
            if not layer.alpha:
                raise ValueError(f"module {name!r}: alpha is 0, must not be: the R of other adapters are scaled to it")
            records[name] = {key: t.cpu() for key, t in vars(Fingerprint.of(layer.A, layer.B)).items()}
            if not all(map(is_finite, records[name].values())):
                raise ValueError(f"module {name!r}: A or B is not finite")
            if layer.recipe.init == "given":
                factors[name] = adapter_file.plain(layer.A), adapter_file.plain(layer.B)
            elif layer.why_no_load():
                moved.append(layer)
        header = {"base_model": adapter_file.base_model(model), "dtype": basis.dtype_name(dtype)}
        saved = adapter_file.saved_tensors(model)
        parts = adapter_file.packed(KIND, header, descriptions, records, factors, *saved)
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

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _run(self, call: Callable[[Any], T], write: bool = False, room: int = 0) -> T:
        """What a call returns for a transaction; room: bytes that it will write."""
        self._check_open(write)
        forked = self._environment.process != os.getpid()
        if (write or forked) and identity_of(self.path) != self._environment.identity:
            raise ValueError(f"{self.path}: {DATA} was replaced since the bank was opened; open it again")
        if forked:
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
            key = _key(name)
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
        after = TIE
        while True:

            def page(txn: Any, after: bytes = after) -> list[bytes]:
                cursor, keys = txn.cursor(), []
                there = cursor.set_range(after + b"\0")  # the least key after it
                while there and len(keys) < PAGE:
                    keys.append(bytes(cursor.key()))
                    there = cursor.next()
                return keys

            keys = self._run(page)
            yield from keys
            if len(keys) < PAGE:
                return
            after = keys[-1]

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
        _key(name)

    def digests(self, names: Iterable[str]) -> dict[str, bytes]:
        """The SHA-256 of each adapter's record as it is written there: another one for another record.

        Raises KeyError where there is no adapter of a name.
        """
        keys = {name: _key(name) for name in names}

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
        key = _key(name)
        value = self._run(lambda txn: _copy(txn.get(key)))
        if value is None:
            raise self._unknown(name)
        return value

    def _unknown(self, name: str) -> KeyError:
        return KeyError(f"{self.path}: has no adapter {name!r}")

    def _checksum(self, key: bytes, rest: bytearray | memoryview) -> bytes:
        digest = hashlib.sha256(self._digest + len(key).to_bytes(4, "little") + key)
        digest.update(rest)
        return digest.digest()

    def _opened(self, name: str, value: bytearray) -> tuple[Tensor, dict[str, float]]:
        """R of all modules in one tensor, and the alphas that are not the bank's, from the value of a record."""
        where = f"{self.path}: adapter {name!r}"
        if len(value) < DIGEST + HEAD.size or value[:DIGEST] != self._checksum(
            name.encode("utf-8", "surrogateescape"), memoryview(value)[DIGEST:]
        ):
            damaged(where, "its SHA-256 is not that of its record")
        version, count = HEAD.unpack_from(value, DIGEST)
        if version != LAYOUT:
            raise ValueError(f"{where}: is of version {version}, this loraxs_kernels reads {LAYOUT}; upgrade it")
        start = DIGEST + HEAD.size + count * ALPHA.size
        if len(value) != start + self.size * self.dtype.itemsize:
            damaged(where, f"its record has {len(value)} bytes")
        pairs = ALPHA.iter_unpack(value[DIGEST + HEAD.size : start]) if count else ()
        alphas = {self.modules[i][0]: alpha for i, alpha in pairs if i < len(self.modules) and math.isfinite(alpha)}
        if len(alphas) != count:
            damaged(where, "its alphas are not those of modules")
        return torch.frombuffer(value, dtype=self.dtype, offset=start), alphas

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
            what: the path of an adapter file, a model with adapters, or {module: R}.  R of a file or a model is
                checked: with the bank's A and B it must make the same delta W = s B R A, to a relative error of
                1e-3.  R in a mapping is not checked: it must have been trained with the bank's own A, B and alpha.
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
        self._check_open(write=True)
        places: dict[bytes, tuple[int, int]] = {}
        with self._named(), tempfile.SpooledTemporaryFile(IN_MEMORY, dir=self.path) as waiting:
            for name, what in _pairs(items):
                key = _key(name)
                if key in places:
                    raise ValueError(f"items: has the name {name!r} twice")
                if not replace and name in self:
                    raise self._exists(name)
                value = self._value_of(name, what)
                places[key] = waiting.tell(), len(value)
                waiting.write(value)

            def put(txn: Any) -> None:
                for key in sorted(places):
                    if not txn.put(key, _part(waiting, *places[key]), overwrite=replace):
                        raise self._exists(key.decode())

            if places:
                self._run(put, write=True, room=sum(length for _, length in places.values()))
        return len(places)

    def remove(self, name: str) -> None:
        """Delete an adapter.  Raises KeyError if there is none of that name."""
        key = _key(name)
        if not self._run(lambda txn: txn.delete(key), write=True):
            raise self._unknown(name)

    def _exists(self, name: str) -> ValueError:
        return ValueError(
            f"name: {self.path} has an adapter {name!r} already; replace=True (--replace) takes its place"
        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno and error.filename is None:  # a full disk, met by the temporary file
                error.filename = str(self.path)
            raise

    def _value_of(self, name: str, what: Any) -> bytearray:
        """The record of an adapter, checked."""
        if isinstance(what, nn.Module):
            where = f"adapter {name!r}"
            entries, names, saved = self._entries_of(unwrapped(what), where)
        elif isinstance(what, Mapping):
            where = f"adapter {name!r}"
            return self._packed(name, self._matrices(what, where), {}, where)
        elif isinstance(what, (str, os.PathLike)):
            where = str(what)
            entries, names, saved = adapter_file.read(Path(what))
        else:
            raise TypeError(
                f"what: got a {type(what).__name__} for {name!r}, must be the path of an adapter file, a model with "
                "adapters or a mapping of R by module"
            )
        self._check_names(entries, where)
        for module, entry in entries.items():
            if entry["rank"] != self.entries[module]["rank"]:
                there = self.entries[module]["rank"]
                raise ValueError(f"{where}: module {module!r} has rank {entry['rank']} there and {there} in the bank")
        if sorted(names) != sorted(self.modules_to_save):
            raise ValueError(f"{where}: its modules_to_save are {names}, must be the bank's: {self.modules_to_save}")
        for key in sorted(saved.keys() | self.saved.keys()):
            if key not in saved or key not in self.saved or not _same(saved[key], self.saved[key]):
                raise ValueError(
                    f"{where}: tensor {key!r} of its modules_to_save is not the bank's; a bank has one for all adapters"
                )
        alphas = {module: float(entry["alpha"]) for module, entry in entries.items()}
        return self._packed(name, self._fitted(entries, where), alphas, where)

    def _entries_of(self, model: nn.Module, where: str) -> tuple[dict[str, dict], list[str], dict[str, Tensor]]:
        """What an adapter file of a model would have."""
        entries = {}
        for name, layer in adapter_file.layers_to_save(model):
            numbers = adapter_file.description(layer, name)
            R = adapter_file.whole_R(layer)
            entry = {"R": R, "S": basis.singular_values(layer.A), "probe": basis.probes(layer.A, R, layer.B)}
            entries[name] = {key: t.cpu() for key, t in entry.items()}
            entries[name] |= {"recipe": layer.recipe, "rank": numbers["rank"], "alpha": numbers["alpha"]}
            entries[name]["base_model"] = adapter_file.base_model(model)
            if not is_finite(R):
                raise ValueError(f"{where}: module {name!r}: R has NaN or Inf values")
        return entries, *adapter_file.saved_tensors(model)

    def _check_names(self, modules: Mapping[str, Any], where: str) -> None:
        if differ := sorted(map(str, modules.keys() ^ self.entries.keys())):
            raise ValueError(f"{where}: is for other modules than the bank; the first difference: {differ[0]!r}")

    def _matrices(self, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        self._check_names(given, where)
        for module, rank in self.modules:
            R = given[module]
            if not isinstance(R, Tensor):
                raise TypeError(f"{where}: R of module {module!r} is a {type(R).__name__}, must be a tensor")
            if R.shape != (rank, rank) or R.dtype not in FLOATS:
                must = f"of shape ({rank}, {rank}) and a floating-point dtype"
                raise ValueError(
                    f"{where}: R of module {module!r} is {R.dtype} of shape {tuple(R.shape)}, must be {must}"
                )
        return {module: whole(given[module]).cpu() for module, _ in self.modules}

    def _fitted(self, entries: Mapping[str, dict[str, Any]], where: str) -> dict[str, Tensor]:
        """R of each module, or with its signs turned, if that makes the same delta on the bank's A and B."""
        ranks: dict[int, list[str]] = {}
        for module, rank in self.modules:
            ranks.setdefault(rank, []).append(module)
        settled, refused = {}, {}
        for modules in ranks.values():
            known = [vars(self._fingerprints[module]) for module in modules]
            here = Fingerprint(**{key: torch.stack([each[key] for each in known]) for key in FINGERPRINT})
            R, S, probe = (
                torch.stack([entries[module][key].float() for module in modules]) for key in ("R", "S", "probe")
            )
            right = (here.residual(probe, R) <= ACCEPT) & basis.same_values(S, here.S)
            for module, each, fits in zip(modules, R, right.tolist(), strict=True):
                settled[module] = each
                if not fits:
                    settled[module], error = fitted_to(entries[module], self._fingerprints[module])
                    if error > ACCEPT or not basis.same_values(entries[module]["S"], self._fingerprints[module].S):
                        refused[module] = error
        if refused:
            worst = max(refused, key=refused.__getitem__)
            raise self._mismatch(where, worst, entries[worst], refused[worst])
        return settled

    def _mismatch(self, where: str, module: str, entry: dict[str, Any], error: float) -> AdapterMismatch:
        found = f"{where}: the estimated relative error of delta W in module {module!r} is {error:.1e}"
        there, here = entry["recipe"], self.entries[module]["recipe"]
        differs = [f for f in HOW if getattr(there, f) != getattr(here, f)]
        if differs:
            what = ", ".join(f"{f} {getattr(there, f)!r} and not {getattr(here, f)!r}" for f in differs)
            return AdapterMismatch(
                f"{found}: its A and B were made by another recipe than the bank's ({what}). Train it on a model with "
                "the bank's, or create a bank from a model with its own"
            )
        if error > DIFFERENT or not basis.same_values(entry["S"], self._fingerprints[module].S):
            return AdapterMismatch(
                f"{found}: it was trained on another base model (its name there: {entry['base_model']!r}) or other "
                f"weights than the bank's ({self.base_model!r})"
            )
        return AdapterMismatch(
            f"{found}, more than {ACCEPT:.0e}: its A and B are not quite the bank's, as when the weights were edited, "
            "quantised or in another dtype. If its file was saved with portable=True or save_factors=True, load it "
            "into the model that the bank was created from, which aligns R, and add that model"
        )

    def _packed(self, name: str, matrices: Mapping[str, Tensor], alphas: Mapping[str, float], where: str) -> bytearray:
        """The value of a record."""
        own = [
            (i, alphas[m]) for i, (m, _) in enumerate(self.modules) if alphas.get(m, self.alphas[m]) != self.alphas[m]
        ]
        start = DIGEST + HEAD.size + len(own) * ALPHA.size
        value = bytearray(start + self.size * self.dtype.itemsize)
        HEAD.pack_into(value, DIGEST, LAYOUT, len(own))
        for i, pair in enumerate(own):
            ALPHA.pack_into(value, DIGEST + HEAD.size + i * ALPHA.size, *pair)
        R = torch.frombuffer(value, dtype=self.dtype, offset=start)
        R.copy_(torch.cat([matrices[module].flatten() for module, _ in self.modules]))
        scaled = R.to(torch.float32, copy=True)
        for i, alpha in own:
            module = self.modules[i][0]
            scaled[self.places[module]] *= alpha / self.alphas[module]
        if not is_finite(scaled):
            module = next(each for each, place in self.places.items() if not is_finite(scaled[place]))
            largest = matrices[module].abs().max().item()
            what = f"has values too large (up to {largest:.1e})" if math.isfinite(largest) else "has NaN or Inf values"
            raise ValueError(f"{where}: module {module!r}: R {what} for a bank of {self.dtype}")
        value[:DIGEST] = self._checksum(_key(name), memoryview(value)[DIGEST:])
        return value

    # Between a bank and adapter files or models

    @torch.no_grad()
    def export(self, name: str, path: str | os.PathLike) -> None:
        """Write an adapter to a file for `load_adapter`, as `save_adapter` does: R and alpha as they are stored.

        Raises KeyError if there is no adapter of that name, ValueError if its record is damaged or the path is one of
        the bank's own files.
        """
        own = {os.path.realpath(self.path / file) for file in (BASIS, DATA, LOCK)}
        if os.path.realpath(path) in own:
            raise ValueError(f"path: {path} is a file of the bank itself, must be another")
        stored, alphas = self.record(name)
        descriptions, records, factors = {}, {}, {}
        for module, R in stored.items():
            entry, known = self.entries[module], self._fingerprints[module]
            descriptions[module] = adapter_file.described(entry | {"alpha": alphas[module]}, entry["recipe"], module)
            records[module] = {"R": R, "S": known.S, "probe": known.probes(R)}
            if not is_finite(records[module]["probe"]):
                raise ValueError(f"{self.path}: adapter {name!r}: R of module {module!r} is too large for a file")
            if "A" in entry:
                factors[module] = entry["A"], entry["B"]
        header = {"base_model": self.base_model}
        saved = self.modules_to_save, self.saved
        write_atomically(path, *adapter_file.packed("loraxs", header, descriptions, records, factors, *saved))

    @torch.no_grad()
    def check_basis(self, layers: Mapping[str, LoraXSLinear]) -> None:
        """Check that a model's layers, by their names, have the bank's modules and ranks, and its A and B.

        Raises ValueError for other modules or ranks, AdapterMismatch for other A and B, by the rules of adapter files.
        """
        self._check_names(layers, "model")
        refused = {}
        for name, layer in layers.items():
            entry = self.entries[name]
            if layer.rank != entry["rank"]:
                raise ValueError(
                    f"{self.path}: module {name!r} has rank {entry['rank']} there and {layer.rank} in the model"
                )
            error = basis.residual(entry["probe"], layer.A, entry["R"].to(layer.A.device), layer.B)
            if error > ACCEPT or not basis.same_base(entry["S"], layer.A):
                refused[name] = error
        if refused:
            worst = max(refused, key=refused.__getitem__)
            S, recipe = basis.singular_values(layers[worst].A), layers[worst].recipe
            how = {"keeping": "", "recipe": recipe, "load": "Attach the bank"}
            raise mismatch(str(self.path), worst, self.entries[worst], refused[worst], S, **how)


FINGERPRINT = tuple(each.name for each in fields(Fingerprint))


def _refuse_foreign(file: Path) -> None:
    """ValueError for a file in the place of a basis that no `create`, killed or not, has left there."""
    try:
        unsealed(file, KIND, "basis of an adapter bank")
    except ValueError as error:
        raise ValueError(f"path: {file} is there and is no bank's; must be a new folder") from error


def _stacked(rank: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype]]]:
    sizes = {"S": (rank,), "left": (rank, PROBES), "right": (rank, PROBES)}
    sizes |= {"gram_A": (rank, rank), "gram_B": (rank, rank)}
    return {key: (size, (torch.float32 if key == "S" else torch.float64,)) for key, size in sizes.items()}


def _key(name: object) -> bytes:
    """A name as LMDB has it; TypeError or ValueError for what cannot be one."""
    if not isinstance(name, str):
        raise TypeError(f"name: got a {type(name).__name__}, must be a string")
    try:
        key = name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"name: got {name!r}, must be without surrogates, which UTF-8 cannot have") from None
    if not 1 <= len(key) <= LONGEST:
        raise ValueError(f"name: got {name[:60]!r} of {len(key)} bytes in UTF-8, must have 1 to {LONGEST}")
    if b"\0" in key:
        raise ValueError(f"name: got {name!r}, must be without a null byte")
    return key


def _pairs(items: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(items, Mapping):
        return items.items()
    if not isinstance(items, (str, os.PathLike)):
        return _checked_pairs(items)
    folder = Path(items)
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


def _part(f: BinaryIO, start: int, length: int) -> bytes:
    f.seek(start)
    return f.read(length)


def _copy(value: memoryview | None) -> bytearray | None:
    return None if value is None else bytearray(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
