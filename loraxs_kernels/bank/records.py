"""What an adapter bank knows of its A and B, and the records of adapters on them; store.py keeps those by name.

`basis.safetensors` is written once: what is known of A and B (basis.Fingerprint), sealed as
files.py does.  Header: {"base_model", "dtype", "modules_to_save", "layer", "modules"} under "loraxs_bank".  Tensors:

    S/r, left/r, right/r, gram_A/r, gram_B/r    the fields of basis.Fingerprint, stacked over the modules of rank r
    A/i, B/i                                    the factors of module i, where they were given and not computed
    model/NAME                                  every tensor of the modules_to_save, by its name in the model

A record is

    SHA-256 (32 bytes) of the digest of basis.safetensors, the name and what follows
    version, n (u32 each), n times (module u32, alpha f64) for the modules whose alpha is not the bank's
    R of all modules in the order of the header, each r x r by rows, in the bank's dtype

all little-endian.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapter_contents, adapter_format, basis
from ..acceptance import HOW, AdapterMismatch, aligned_to, mismatch
from ..basis import ACCEPT, DIFFERENT, PROBES, Fingerprint
from ..files import damaged, is_finite, named, sha256_of, tensors_of, unsealed
from ..hub import local_file
from ..linear import LoraXSLinear
from ..matching import unwrapped
from ..naming import DTYPES, FLOATS, dtype_name
from ..sharding import whole

KIND = "loraxs_bank"
BASIS = "basis.safetensors"
STORED = (torch.float32, torch.bfloat16)  # the dtypes that R may have in a bank
LAYOUT = 1  # the version of a record's layout
LONGEST = 511  # bytes of a key that LMDB takes
HEAD, ALPHA = struct.Struct("<II"), struct.Struct("<Id")
DIGEST = 32
FINGERPRINT = tuple(each.name for each in fields(Fingerprint))


class Records:
    """The records of adapters on one basis: made, checked and opened.

    path: of the bank's folder, whose basis.safetensors is read.
    """

    def __init__(self, path: Path) -> None:
        self.path, file = path, path / BASIS
        header, f = unsealed(file, KIND, "basis of an adapter bank")
        self._digest = bytes.fromhex(sha256_of(file))
        dtype = header.pop("dtype", None)
        if dtype not in map(dtype_name, STORED):
            damaged(file, f"dtype is {dtype!r} in its header, must be float32 or bfloat16")
        found = adapter_format.unpacked(header, tensors_of(f, file), _stacked, file)
        self.entries, self.modules_to_save, self.saved = found
        self.dtype, self.base_model = DTYPES[dtype], header["base_model"]
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

    def _record_from(self, name: str, what: Any) -> bytearray:
        """The record of an adapter, checked."""
        if isinstance(what, nn.Module):
            where = f"adapter {name!r}"
            entries, names, saved = self._entries_of(unwrapped(what), where)
        elif isinstance(what, Mapping):
            where = f"adapter {name!r}"
            return self._packed(name, self._matrices(what, where), {}, where)
        elif isinstance(what, (str, os.PathLike)):
            where = str(what)
            entries, names, saved = adapter_format.read(local_file(named(what, "what", "an adapter")))
        else:
            raise TypeError(
                f"what: got a {type(what).__name__} for {name!r}, must be the path of an adapter, a model with "
                "adapters or a mapping of R by module"
            )
        self._check_names(entries, where)
        for module, entry in entries.items():
            if entry["rank"] != self.entries[module]["rank"]:
                there = self.entries[module]["rank"]
                raise ValueError(f"{where}: module {module!r} has rank {entry['rank']} there and {there} in the bank")
        differ = (each for each, entry in entries.items() if entry["dropout"] != self.entries[each]["dropout"])
        if module := next(differ, None):
            warnings.warn(  # without the adapter's name, so that it is shown once
                f"dropout: is {entries[module]['dropout']:g} in module {module!r} of an adapter and "
                f"{self.entries[module]['dropout']:g} in the bank, which keeps one for all adapters: bank.train and "
                "bank.export use the bank's",
                stacklevel=5,  # past this, _put, add_many and no_grad's wrapper
            )
        if sorted(names) != sorted(self.modules_to_save):
            raise ValueError(f"{where}: its modules_to_save are {names}, must be the bank's: {self.modules_to_save}")
        for key in sorted(saved.keys() | self.saved.keys()):
            if key not in saved or key not in self.saved or not _same(saved[key], self.saved[key]):
                raise ValueError(
                    f"{where}: tensor {key!r} of its modules_to_save is not the bank's; a bank has one for all adapters"
                )
        alphas = {module: float(entry["alpha"]) for module, entry in entries.items()}
        return self._packed(name, self._aligned(entries, where), alphas, where)

    def _entries_of(self, model: nn.Module, where: str) -> tuple[dict[str, dict], list[str], dict[str, Tensor]]:
        """What an adapter file of a model would have."""
        entries = {}
        for name, layer in adapter_contents.layers_to_save(model):
            numbers = adapter_contents.description(layer, name, layer.recipe)
            R = adapter_contents.whole_R(layer)
            entry = {"R": R, "S": basis.singular_values(layer.A), "probe": basis.probes(layer.A, R, layer.B)}
            entries[name] = {key: t.cpu() for key, t in entry.items()}
            entries[name] |= {"recipe": layer.recipe, **{key: numbers[key] for key in ("rank", "alpha", "dropout")}}
            entries[name]["base_model"] = adapter_contents.base_model(model)
            if not is_finite(R):
                raise ValueError(f"{where}: module {name!r}: R has NaN or Inf values")
        return entries, *adapter_contents.saved_tensors(model)

    def _check_names(self, modules: Mapping[str, Any], where: str) -> None:
        if differ := sorted(map(str, modules.keys() ^ self.entries.keys())):
            raise ValueError(f"{where}: is for other modules than the bank; the first difference: {differ[0]!r}")

    def _matrices(self, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        self._check_names(given, where)
        for module, rank in self.modules:
            R = given[module]
            if not isinstance(R, Tensor):
                raise TypeError(f"{where}: R of module {module!r} is a {type(R).__name__}, must be a tensor")
            if R.shape != (rank, rank) or R.dtype not in FLOATS or R.is_meta or R.layout != torch.strided:
                got = f"{R.dtype} of shape {tuple(R.shape)}, {R.layout}, on {R.device}"
                must = f"dense, of shape ({rank}, {rank}) and a floating-point dtype, and in memory"
                raise ValueError(f"{where}: R of module {module!r} is {got}, must be {must}")
        return {module: whole(given[module]).cpu() for module, _ in self.modules}

    def _aligned(self, entries: Mapping[str, dict[str, Any]], where: str) -> dict[str, Tensor]:
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
                    settled[module], error = aligned_to(entries[module], self._fingerprints[module])
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
        value[:DIGEST] = self._checksum(key_of(name), memoryview(value)[DIGEST:])
        return value

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


def packed_basis(model: nn.Module, dtype: torch.dtype) -> tuple[tuple[bytes | memoryview, ...], list[LoraXSLinear]]:
    """The parts of basis.safetensors for the A and B of a model, and its layers whose weights were rounded since.

    Raises ValueError for a model without adapters, or one whose A, B or alpha no bank can have.
    """
    descriptions, records, factors, moved = {}, {}, {}, []
    for name, layer in adapter_contents.layers_to_save(model):
        recipe = adapter_contents.lasting_recipe(layer)
        descriptions[name] = adapter_contents.description(layer, name, recipe)
        if not layer.alpha:
            raise ValueError(f"module {name!r}: alpha is 0, must not be: the R of other adapters are scaled to it")
        records[name] = {key: t.cpu() for key, t in vars(Fingerprint.of(layer.A, layer.B)).items()}
        if not all(map(is_finite, records[name].values())):
            raise ValueError(f"module {name!r}: A or B is not finite")
        if recipe.init == "given":
            factors[name] = adapter_contents.plain(layer.A), adapter_contents.plain(layer.B)
        elif layer.why_no_load():
            moved.append(layer)
    header = {"base_model": adapter_contents.base_model(model), "dtype": dtype_name(dtype)}
    header["shared"] = adapter_contents.shared_names(model)
    saved = adapter_contents.saved_tensors(model)
    parts = adapter_format.packed(KIND, header, descriptions, records, factors, *saved)
    return parts, moved


def _stacked(rank: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype]]]:
    sizes = {"S": (rank,), "left": (rank, PROBES), "right": (rank, PROBES)}
    sizes |= {"gram_A": (rank, rank), "gram_B": (rank, rank)}
    return {key: (size, (torch.float32 if key == "S" else torch.float64,)) for key, size in sizes.items()}


def key_of(name: object) -> bytes:
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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
