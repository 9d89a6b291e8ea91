"""The layout of adapter files: one safetensors file, made and read here, of tensors that are stacked over modules.

Layout, format version 3.  Version 4 has a field more in the header, `shared`: the other names of modules that have
several.  Version 2 had a field more in the recipe, `tier`; version 1 was version 2 without a checksum (files.py) and
without `rounded` and `weight_dtype` in the recipe.  Header: one JSON object under "loraxs".  Tensors,
stacked over the modules of one rank r in the order of the header's list:

    R/r        (n, r, r)  as trained, fp32 or the dtype asked for
    S/r        (n, r)     fp32 norms of the rows of A: for the SVD init the singular values
    probe/r    (n, 8)     fp32 bilinear probes of B R A, from R as stored (basis.probes)
    U/r, V/r   (n, r, 8)  fp32 sketches of the singular vectors, with portable=True (basis.sketch)
    A/i, B/i              the factors of module i, with save_factors=True
    model/NAME            every tensor of the modules_to_save, by its name in the model

Stacking keeps the header small: 224 modules of r = 16 in bf16 are 112 KiB of R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .basis import PROBES
from .files import NEWEST, check_finite, damaged, has_shape, sealed, tensors_of, unsealed
from .naming import FLOATS, dtype_name
from .recipe import Factors, Recipe, as_header, modules_in

# Of a module, beside its recipe: {its name here: in a file}.
NUMBERS = {"rank": "rank", "alpha": "alpha", "dropout": "dropout", "init_std": "sigma"}


def described(numbers: Mapping[str, Any], recipe: Recipe, name: str) -> dict[str, Any]:
    """The numbers and the recipe of one module, by its name, as a header has them."""
    recipe = {k: v for k, v in asdict(recipe).items() if k != "name" or v != name}
    return {there: numbers[here] for here, there in NUMBERS.items()} | recipe


def packed(
    kind: str,
    header: dict[str, Any],
    descriptions: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Mapping[str, Tensor]],
    factors: Mapping[str, Factors],
    modules_to_save: Sequence[str],
    saved: Mapping[str, Tensor],
) -> tuple[bytes | memoryview, ...]:
    """The parts of a file of what is known of each module: `records` are stacked by rank, as `unpacked` takes them.

    header: with `shared`, the other names of modules that have several; {}: there are none.
    """
    stacks: dict[str, list[Tensor]] = {}
    for name, record in records.items():
        for key, t in record.items():
            stacks.setdefault(f"{key}/{descriptions[name]['rank']}", []).append(t)
    tensors = {key: torch.stack(stack) for key, stack in stacks.items()}
    for i, name in enumerate(descriptions):
        if name in factors:
            tensors[f"A/{i}"], tensors[f"B/{i}"] = factors[name]
    tensors |= {f"model/{key}": t for key, t in saved.items()}
    header = {**header, "modules_to_save": list(modules_to_save), **as_header(descriptions, "layer")}
    if shared := header.pop("shared"):
        header |= {"version": NEWEST, "shared": shared}  # what reads less must not read on
    return sealed(tensors, kind, header)


def read(path: Path) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, Tensor]]:
    """What `unpacked` finds in an adapter file."""
    return read_opened(*unsealed(path, "loraxs", "LoRA-XS adapter"), path)


def read_opened(
    header: dict[str, Any], f: Any, path: Path
) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, Tensor]]:
    """`read` of a file that `unsealed` has opened."""
    tensors = tensors_of(f, path)

    def stacked(rank: int) -> dict[str, tuple[tuple[int, ...], Sequence[torch.dtype]]]:
        sizes = {"R": (rank, rank), "S": (rank,), "probe": (PROBES,)}
        if f"U/{rank}" in tensors or f"V/{rank}" in tensors:
            sizes |= {"U": (rank, PROBES), "V": (rank, PROBES)}
        return {key: (size, FLOATS if key == "R" else (torch.float32,)) for key, size in sizes.items()}

    return unpacked(header, tensors, stacked, path)


def unpacked(
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    stacked: Callable[[int], Mapping[str, tuple[tuple[int, ...], Sequence[torch.dtype]]]],
    path: Path,
) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, Tensor]]:
    """Everything about each module by its name, the modules_to_save, and their tensors, of a file that `packed` made.

    stacked: the shape and the dtypes, for one module, of each tensor that is stacked over the modules of a rank.  Every
    tensor of the file has a place in these, and is of the dtype and shape that the header says.
    """
    saved = header.pop("modules_to_save", None)
    names = isinstance(saved, list) and all(isinstance(each, str) and each for each in saved)
    if not (names and len(set(saved)) == len(saved)):
        damaged(path, f"modules_to_save is {saved!r} in its header, must be a list of names")
    shared = header.pop("shared", {}) if header["version"] > 3 else {}
    entries, stacks = {}, {}
    for i, (name, numbers, recipe) in enumerate(modules_in(header, "layer", [*NUMBERS.values()], path)):
        entry = entries[name] = {"base_model": header["base_model"], "recipe": recipe}
        entry |= {here: numbers[there] for here, there in NUMBERS.items()}
        stacks.setdefault(entry["rank"], []).append(entry)
        factors = {"A": (entry["rank"], None), "B": (None, entry["rank"])}
        if recipe.init == "given" or any(f"{key}/{i}" in tensors for key in factors):
            for key, size in factors.items():
                entry[key] = _taken(tensors, f"{key}/{i}", size, FLOATS, path)
    for rank, stack in stacks.items():
        for key, (size, dtypes) in stacked(rank).items():
            rows = _taken(tensors, f"{key}/{rank}", (len(stack), *size), dtypes, path)
            for entry, row in zip(stack, rows, strict=True):
                entry[key] = row
    lists = shared.values() if isinstance(shared, dict) and shared.keys() <= entries.keys() else [None]
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists):
        damaged(path, f"shared is {shared!r} in its header, must have lists of names for modules of the file")
    for name, others in shared.items():
        entries[name]["shared"] = others
    for key in tensors:
        if not key.startswith(tuple(f"model/{name}." for name in saved)):
            damaged(path, f"its header does not mention the tensor {key!r}")
    return entries, saved, {key.removeprefix("model/"): t for key, t in tensors.items()}


def _taken(
    tensors: dict[str, Tensor], key: str, shape: tuple[int | None, ...], dtypes: Sequence[torch.dtype], path: Path
) -> Tensor:
    """A tensor of a file, taken out of them all, if it is as the header says (None: any size)."""
    t = tensors.pop(key, None)
    if t is None:
        damaged(path, f"tensor {key!r} is missing")
    if not has_shape(t.shape, shape) or t.dtype not in dtypes:
        must = f"{shape} and {' or '.join(map(dtype_name, dtypes))}"
        damaged(path, f"tensor {key!r} has shape {tuple(t.shape)} and {dtype_name(t.dtype)}, must have {must}")
    check_finite(t, path, f"tensor {key!r}")
    return t
