"""Basis files: A and B of a base model, computed once from its checkpoint, without its class (`loraxs init`).

Layout, format version 3: a safetensors file (files.py says how it is checked) with, for each module, the tensors NAME.A
(r, K), NAME.B (N, r) and NAME.W (8,), fp64 probes of the weight that A and B were made from.  The header, under
"loraxs_basis", has the base model's name, the recipe that all modules share ("recipe") and for each module what is its
own ("modules").  Version 2 had a field more in the recipe, `tier`; version 1 was version 2 without NAME.W, without a
checksum and without `rounded` and `weight_dtype` in the recipe.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import basis
from .factors import WORKSPACE, Job, compute_options, factor
from .files import (
    check_finite,
    check_replaces,
    damaged,
    has_shape,
    metadata_of,
    named,
    opened,
    read_json,
    sealed,
    tensor_of,
    unsealed,
    write_atomically,
)
from .matching import check_patterns, is_everything, matches, warn_of_unmatched
from .naming import FLOATS, as_dtype, dtype_name, label_of
from .recipe import Factors, Recipe, as_header, check_range, check_rank, modules_in
from .weights import Weight

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers prefers the first
# By the model_type of config.json: models of Conv1D layers, whose weights are stored (K, N).
CONV1D_MODELS = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
# Last parts of names that "all-linear" leaves out: matrices of embeddings and output embeddings.
EMBEDDINGS = re.compile(
    r"(.*_)?embed(ding)?s?|embed_(tokens|positions|in|out)|lm_head|output_projection|wte|wpe|shared|relative_attention_bias"
)


@dataclass(frozen=True)
class Basis:
    """An open basis file: its path, the base model's name, and of each module the rank and recipe."""

    path: Path
    base_model: str
    modules: Mapping[str, tuple[int, Recipe]]
    file: Any  # open, so that a file that replaces it does not matter

    def find(self, name: str) -> str:
        """The module of the file that a model's module is: by its name, else by the one whose name ends alike.

        A checkpoint says model.layers.0.q_proj where the model without its head says layers.0.q_proj, and
        language_model.model.layers.0.q_proj where transformers 5 says model.language_model.layers.0.q_proj.  `read`
        finds out where a name misleads.  Raises ValueError where there is none, or more than one.
        """
        if name in self.modules:
            return name
        found = [there for there in self.modules if there.endswith(f".{name}") or name.endswith(f".{there}")]
        if not found:
            found = self._alike(name.split("."))
        if len(found) != 1:
            what = "no module" if not found else f"{len(found)} modules, {', '.join(found[:3])},"
            raise ValueError(
                f"basis: {self.path} has {what} for module {name!r}; it is for another model or targets, or the model "
                "gives the tensors of its checkpoint other names: attach without basis"
            )
        return found[0]

    def _alike(self, parts: Sequence[str]) -> list[str]:
        """The modules of the file that may be this one by another name.

        Their names have the same numbers and the same last two parts, and one of the two names has all parts of the
        other.  Of several the one with the most last parts in common is taken, then that with the most parts.
        """
        shared = {}
        for there in self.modules:
            others = there.split(".")
            inside = {*parts} <= {*others} or {*others} <= {*parts}  # else they may belong to two towers
            numbers = [list(filter(str.isdigit, each)) for each in (others, parts)]
            if inside and others[-2:] == parts[-2:] and numbers[0] == numbers[1]:
                ends = next((i for i, (a, b) in enumerate(zip(parts[::-1], others[::-1], strict=False)) if a != b), 0)
                shared[there] = ends, len({*parts} & {*others})
        return [there for there, each in shared.items() if each == max(shared.values())]

    def read(self, there: str, W: Weight, label: str) -> Factors:
        """A and B of one module, on the weight's device; ValueError where they were made from another weight.

        The weight must have the same values as the one they were made from, in whatever dtype: an adapter file is
        loaded by making A and B again from the weight.  A file of version 1 has no probes of the weight, so A and B are
        computed again to check it.
        """
        A, B = (self.file.get_tensor(f"{there}.{which}").to(W.device) for which in "AB")
        (N, K), (rank, recipe) = W.shape, self.modules[there]
        if tuple(A.shape) != (rank, K) or tuple(B.shape) != (N, rank):
            raise ValueError(
                f"basis: {self.path} has A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} for {label}, "
                f"must be {(rank, K)} and {(N, rank)}"
            )
        for which, t in (("A", A), ("B", B)):
            check_finite(t, self.path, f"tensor '{there}.{which}'")
        if f"{there}.W" in self.file.keys():  # noqa: SIM118
            off, limit = basis.weight_distance(self.file.get_tensor(f"{there}.W"), W.read()), basis.SAME_WEIGHT
        else:
            off, limit = basis.distance((A, B), recipe.round(recipe.factors(W, rank))), basis.ACCEPT
        if not off <= limit:
            made, now = recipe.weight_dtype, dtype_name(W.dtype)
            remedy = "run loraxs init on this model's checkpoint"
            if off > basis.DIFFERENT:
                why = f"this model has different weights than the base model of the file, {self.base_model!r}; {remedy}"
            elif made not in (None, now):
                why = f"they were made from weights in {made}; run loraxs init with --weight-dtype {now}"
            else:
                why = f"the weights have changed since; {remedy}"
            raise ValueError(
                f"basis: A and B in {self.path} do not fit the weight of {label}, with a relative error of {off:.1e}, "
                f"must be at most {limit:.0e}: {why}"
            )
        return A, B


def read_basis(path: str | os.PathLike) -> Basis:
    """Open a basis file.

    FileNotFoundError: there is none.  ValueError: it is damaged or no basis file.  TypeError: the path is none.
    """
    path = named(path, "basis", "a basis file")
    header, f = unsealed(path, "loraxs_basis", "LoRA-XS basis; `loraxs init` makes one", "basis")
    left, modules = set(f.keys()), {}
    for name, numbers, recipe in modules_in(header, "recipe", ["rank"], path):
        rank = numbers["rank"]
        try:
            if recipe.init != "svd":
                raise ValueError(f"init is {recipe.init!r}, must be 'svd'")
            A = _check_shape(f, f"{name}.A", (rank, None), FLOATS)
            _check_shape(f, f"{name}.B", (None, rank), (A,))
            if header["version"] > 1:
                _check_shape(f, f"{name}.W", (basis.PROBES,), (torch.float64,))
        except ValueError as error:
            damaged(path, f"module {name!r}: {error}", error)
        # Version 1 does not say how A and B were rounded, but this is where it shows.
        modules[name] = rank, replace(recipe.cast(A), dtype=recipe.dtype)
        left -= {f"{name}.{which}" for which in "ABW"}
    if left:
        damaged(path, f"its header does not mention the tensor {min(left)!r}")
    return Basis(path, header["base_model"], modules, f)


def _check_shape(f: Any, key: str, shape: tuple[int | None, ...], dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of a tensor in an open file; ValueError if it or the shape (None: any size) is not what it must be."""
    if key not in f.keys():  # noqa: SIM118
        raise ValueError(f"tensor {key!r} is missing")
    found = f.get_slice(key)
    got, dtype = found.get_shape(), DTYPES.get(found.get_dtype())
    if dtype not in dtypes or not has_shape(got, shape):
        raise ValueError(f"tensor {key!r} is of shape {tuple(got)} and dtype {found.get_dtype()}, must be of {shape}")
    return dtype


def make_basis(
    model: str | os.PathLike,
    rank: int,
    out: str | os.PathLike,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    seed: int = 0,
    n_iter: int | None = None,
    dtype: torch.dtype | str | None = None,
    weight_dtype: torch.dtype | str | None = None,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    workspace_gib: float = WORKSPACE / 2**30,
    progress: bool = True,
) -> list[str]:
    """Compute A and B from a checkpoint's weights, read from the disk one at a time, and write a basis file.

    Args:
        model: the folder of a model, or one safetensors file.  Of a folder that has model.safetensors, or else the
            index of such files, only those are read, as transformers does; else every *.safetensors.
        rank: r of every module.
        out: the file to write, in one step: a new one, or a basis file, which is replaced.
        target_modules, exclude_modules: as in `attach`, on the names of the tensors without ".weight"; "all-linear" is
            every matrix but embeddings and output embeddings, told by the last part of their names, and, with a
            warning, those that are too small for the rank.
        seed, n_iter: of `truncated_svd`.
        dtype: of A and B; None: of each weight.
        weight_dtype: that the model will be loaded in, to which weights are rounded first; None: as they are stored.
        device, workspace_gib, progress: as in `attach`; None: the CPU, where the weights are.

    Returns the names of the modules.  Raises FileNotFoundError or ValueError, naming the argument or the module, before
    anything is written.
    """
    dtype, weight_dtype = as_dtype("dtype", dtype, FLOATS), as_dtype("weight_dtype", weight_dtype, FLOATS)
    compute = compute_options(device, workspace_gib, progress)
    check_patterns(target_modules=target_modules, exclude_modules=exclude_modules)
    weights, base_model = _checkpoint(named(model, "model", "a model"), weight_dtype)
    check_replaces(out, "loraxs_basis", "LoRA-XS basis", "out")
    everything = is_everything(target_modules)
    jobs: list[Job] = []
    small: dict[str, tuple[int, int]] = {}
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind, weight) in weights.items():
        if everything:
            wanted = len(shape) == 2 and not EMBEDDINGS.fullmatch(name.rpartition(".")[2])
        else:
            wanted = matches(name, target_modules)
        if not wanted or (exclude_modules and matches(name, exclude_modules)):
            continue
        if weight is None:
            raise ValueError(
                f"target_modules: module {name!r} of {model} has a weight of shape {tuple(shape)} and dtype {kind}, "
                "must be a matrix of bf16, fp16, fp32 or fp64; leave it out, or attach to the loaded model"
            )
        check_rank(rank, label_of(name), None if everything else weight.shape)
        if rank > min(weight.shape):
            small[name] = weight.shape
            continue
        chosen = None if dtype in (None, weight.dtype) else dtype_name(dtype)
        recipe = Recipe("svd", seed, name, chosen, n_iter=n_iter, weight_dtype=dtype_name(weight.dtype))
        recipe = recipe.pinned(rank, weight.shape).cast(dtype or weight.dtype)
        jobs.append(Job(f"module {name!r}", _probed(name, weight, tensors), rank, recipe))
    if small and not jobs:
        check_rank(rank, label_of(min(small)), small[min(small)])
    if not jobs:
        raise ValueError(f"target_modules: got {target_modules!r}, which matches no matrix of {model}")
    warn_of_unmatched(weights, 3, target_modules=target_modules, exclude_modules=exclude_modules)
    if small:
        shape = " x ".join(map(str, small[min(small)]))
        warnings.warn(
            f"target_modules: 'all-linear' leaves out {len(small)} modules that are too small for rank {rank}; the "
            f"first is {min(small)!r}, of shape {shape}",
            stacklevel=2,
        )

    def keep(i: int, A: Tensor, B: Tensor) -> None:
        recipe, to = jobs[i].recipe, dtype or jobs[i].weight.dtype
        check_range(factors := recipe.round((A, B)), jobs[i].label)
        for which, t in zip("AB", factors, strict=True):
            tensors[f"{recipe.name}.{which}"] = t.to("cpu", to).contiguous()

    factor(jobs, keep, **compute)
    entries = {job.recipe.name: {"rank": job.rank} | asdict(job.recipe) for job in jobs}
    for entry in entries.values():
        del entry["name"]
    header = {"base_model": base_model, **as_header(entries, "recipe")}
    write_atomically(out, *sealed(tensors, "loraxs_basis", header))
    return list(entries)


def _probed(name: str, weight: Weight, tensors: dict[str, Tensor]) -> Weight:
    """The weight, whose probes are put among the tensors when it is read."""

    def read() -> Tensor:
        W = weight.read()
        tensors[f"{name}.W"] = basis.weight_probes(W)
        return W

    return replace(weight, read=read)


def _checkpoint(
    model: Path, rounded: torch.dtype | None
) -> tuple[dict[str, tuple[list[int], str, Weight | None]], str]:
    """{module: shape and dtype of its weight, and the weight itself if it is a matrix of floats}; the model's name."""
    files, index = _files(model), model / INDEX
    config = (model.parent if model.is_file() else model) / "config.json"
    described = read_json(config.read_bytes(), f"model: {config}") if config.is_file() else {}
    transposed = described.get("model_type") in CONV1D_MODELS
    weights: dict[str, tuple[list[int], str, Weight | None]] = {}
    for file, tensors in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"model: {index} names {file.name}, which does not exist")
        with opened(file) as f:
            if lost := {key for key in tensors.difference(f.keys()) if key.endswith(".weight")}:
                raise ValueError(f"model: {index} names a tensor {min(lost)!r} in {file.name}, which has none")
            for key in f.keys():  # noqa: SIM118
                name, _, kind = key.rpartition(".")
                if kind == "weight":
                    if name in weights:
                        raise ValueError(f"model: two files have a tensor {key!r}, the second is {file}")
                    tensor = f.get_slice(key)
                    shape, dtype = tensor.get_shape(), tensor.get_dtype()
                    weights[name] = shape, dtype, _weight(file, key, shape, dtype, transposed, rounded)
    base_model = described.get("_name_or_path")
    if not (isinstance(base_model, str) and base_model):
        base_model = model.stem if model.is_file() else model.resolve().name
    return weights, base_model


def _files(model: Path) -> dict[Path, set[str]]:
    """The safetensors files of a checkpoint, whether they are there or not, and the tensors that an index names."""
    index = model / INDEX
    files: dict[Path, set[str]] = {}
    if model.is_file() or (model / SINGLE).is_file():
        files[model / SINGLE if model.is_dir() else model] = set()
    elif index.is_file():
        names = read_json(index.read_bytes(), f"model: {index}").get("weight_map")
        if not (isinstance(names, dict) and names and all(isinstance(each, str) for each in names.values())):
            raise ValueError(f"model: {index} is not an index of safetensors files: it has no weight_map of file names")
        for key, name in sorted(names.items(), key=itemgetter(1)):
            files.setdefault(model / name, set()).add(key)
    else:
        files = {file: set() for file in sorted(model.glob("*.safetensors"))}
    files = {
        file: tensors
        for file, tensors in files.items()
        if file.name != "adapter_model.safetensors"  # PEFT's
        and not any(key.startswith("loraxs") for key in metadata_of(file))
    }
    if not files:
        raise FileNotFoundError(
            f"model: {model} is neither a safetensors file nor a folder with safetensors files; adapter, basis and "
            "bank files of loraxs_kernels, and PEFT's adapters, do not count, which hold no model"
        )
    return files


def _weight(
    file: Path, key: str, shape: list[int], dtype: str, transposed: bool, rounded: torch.dtype | None
) -> Weight | None:
    if len(shape) != 2 or DTYPES.get(dtype) not in FLOATS:
        return None

    def read() -> Tensor:
        with opened(file) as f:
            W = tensor_of(f, key, file).to(to)
        return W.mT if transposed else W

    to = rounded or DTYPES[dtype]
    N, K = reversed(shape) if transposed else shape
    return Weight((N, K), to, torch.device("cpu"), copies=True, read=read)
