"""What an adapter file, a basis file or a bank holds, without its model: `loraxs inspect`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .adapter_format import read_opened
from .basis import PROBES
from .basis_file import read_basis
from .files import WRITER, opened, unsealed
from .hub import local_file
from .naming import dtype_name, kinds
from .recipe import Recipe

# {name of the header in a file's metadata: what the file is}.
KINDS = {"loraxs": "LoRA-XS adapter", "loraxs_basis": "basis file", "loraxs_bank": "part of a bank"}


def inspected(path: str, revision: str | None = None) -> dict[str, Any]:
    """What there is to know of an adapter (a file, a folder or a name on the Hub), a basis file or a bank's folder.

    Everything is checked as it is when it is loaded, its checksum first.  Raises FileNotFoundError and ValueError,
    naming the file, as `load_adapter` does, and ImportError for a bank without lmdb.
    """
    if (Path(path) / "data.mdb").is_file() and revision is None:
        return _bank(path)
    file = local_file(path, revision)
    kind = _kind(file)
    found = {"path": str(path), "kind": KINDS[kind], "bytes": file.stat().st_size}
    if kind == "loraxs_bank":
        raise ValueError(f"{file}: is a part of a bank; inspect its folder, {file.parent}")
    return found | (_basis_file(file) if kind == "loraxs_basis" else _adapter(file))


def _kind(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f'path: there is no regular file or folder {file}; a name on the Hub is "user/name"')
    with opened(file) as f:
        names = f.metadata() or {}
    if found := next((kind for kind in KINDS if kind in names), None):
        return found
    raise ValueError(f"{file}: is a safetensors file, but neither a LoRA-XS adapter nor a basis file")


def _adapter(file: Path) -> dict[str, Any]:
    header, f = unsealed(file, "loraxs", KINDS["loraxs"])
    seal = _seal(f, "loraxs")
    entries, names, saved = read_opened(header, f, file)
    modules = list(entries.values())
    whole = {name: sum(t.numel() for key, t in saved.items() if key.startswith(f"{name}.")) for name in names}
    return seal | {
        "base_model": modules[0]["base_model"],
        "modules": {
            name: {key: each[key] for key in ("rank", "alpha", "dropout", "init_std")}
            | ({"shape": [each["B"].shape[0], each["A"].shape[1]]} if "A" in each else {})
            for name, each in entries.items()
        },
        "parameters": sum(each["R"].numel() for each in modules),
        "modules_to_save": whole,
        "dtype": ", ".join(dict.fromkeys(dtype_name(each["R"].dtype) for each in modules)),
        "recipes": _recipes(each["recipe"] for each in modules),
        "portable": all("U" in each or "A" in each for each in modules),
        "factors": all("A" in each for each in modules),
        "probes": PROBES,
    }


def _basis_file(file: Path) -> dict[str, Any]:
    found = read_basis(file)
    f = found.file
    shapes = {
        name: [f.get_slice(f"{name}.B").get_shape()[0], f.get_slice(f"{name}.A").get_shape()[1]]
        for name in found.modules
    }
    return _seal(f, "loraxs_basis") | {
        "base_model": found.base_model,
        "modules": {name: {"rank": rank, "shape": shapes[name]} for name, (rank, _) in found.modules.items()},
        "recipes": _recipes(recipe for _, recipe in found.modules.values()),
    }


def _bank(path: str | os.PathLike) -> dict[str, Any]:
    from .bank import Store

    with Store(path) as bank:
        return {
            "path": str(path),
            "kind": "bank of LoRA-XS adapters",
            "bytes": sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file()),
            "base_model": bank.base_model,
            "adapters": len(bank),
            "modules": {name: {"rank": rank, "alpha": bank.alphas[name]} for name, rank in bank.modules},
            "parameters": bank.size,
            "modules_to_save": list(bank.modules_to_save),
            "dtype": dtype_name(bank.dtype),
            "recipes": _recipes(entry["recipe"] for entry in bank.entries.values()),
        }


def _seal(f: Any, kind: str) -> dict[str, Any]:
    """The file's format version, the package version that wrote it, and its checksum, which has been checked."""
    header = json.loads(f.metadata()[kind])
    return {
        "format_version": header["version"],
        "written_by": f.metadata().get(WRITER),
        "sha256": header.get("sha256"),
    }


def _recipes(recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
    """The different ways in which A and B are made, names aside."""
    ways = {}
    for recipe in recipes:
        way = {key: value for key, value in vars(recipe).items() if key != "name"}
        ways.setdefault(json.dumps(way), way)
    return list(ways.values())


def as_text(found: Mapping[str, Any]) -> Iterator[str]:
    """What `inspected` has found, as lines for people."""
    modules = found["modules"]
    yield f"{found['path']}: {found['kind']}, {found['bytes']:,} bytes"
    facts: dict[str, str] = {}
    if "format_version" in found:
        writer = found["written_by"]
        by = f"loraxs_kernels {writer}" if writer else "a version of loraxs_kernels that did not note itself"
        facts["written by"] = f"{by}; format version {found['format_version']}"
        facts["checksum"] = f"ok, SHA-256 {found['sha256']}" if found["sha256"] else "none, as in format version 1"
    if "adapters" in found:
        facts["adapters"] = f"{found['adapters']:,}"
    facts["base model"] = found["base_model"] or "not named"
    facts["modules"] = f"{len(modules)}: {kinds(modules)}"
    shapes = Counter("{} x {}".format(*each["shape"]) for each in modules.values() if "shape" in each)
    if shapes:
        facts["shapes (out x in)"] = ", ".join(f"{n} of {shape}" for shape, n in shapes.items())
    facts["rank r"] = _numbers(each["rank"] for each in modules.values())
    for key in ("alpha", "dropout", "init_std"):
        if all(key in each for each in modules.values()):
            facts[key] = _numbers(each[key] for each in modules.values())
    if "parameters" in found:
        facts["parameters in R"] = f"{found['parameters']:,}, as {found['dtype']}"
        saved = found["modules_to_save"]
        saved = [f"{name} ({n:,} numbers)" for name, n in saved.items()] if isinstance(saved, dict) else saved
        facts["modules_to_save"] = ", ".join(saved) or "none"
    facts["A and B"] = "; ".join(map(_way, found["recipes"]))
    if "portable" in found:
        how = "has A and B" if found["factors"] else "has a sketch of the singular vectors"
        facts["portable"] = f"yes, {how}" if found["portable"] else "no: loads only where A and B are the same"
        facts["checked by"] = f"{found['probes']} probes of delta W and the singular values of each module"
    for key, value in facts.items():
        # A file from a stranger may hold line breaks that forge a line, or commands to the terminal.
        yield f"  {key:18} {''.join(c if c.isprintable() else ascii(c)[1:-1] for c in value)}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def _way(recipe: Mapping[str, Any]) -> str:
    """How A and B are made, in words."""
    words = [recipe["init"]]
    if recipe["init"] != "given":
        words.append(f"seed {recipe['seed']}")
    if recipe["init"] == "svd":
        words.append(f"{recipe['method']}, block {recipe['block']}, n_iter {recipe['n_iter']}")
    if recipe["weight_dtype"]:
        words.append(f"from {recipe['weight_dtype']} weights")
    if recipe["rounded"]:
        words.append(f"rounded to {' and then '.join(recipe['rounded'])}")
    return ", ".join(words)
