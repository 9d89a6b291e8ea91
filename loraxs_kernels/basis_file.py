"""Basis files: A and B of a base model, computed once from its checkpoint, without its class (`loraxs init`).

Layout, format version 1: a safetensors file with the tensors NAME.A (r, K) and NAME.B (N, r) for each module, and one
JSON object under "loraxs_basis" in the metadata: the version, the base model's name, the recipe that all modules share
("recipe") and for each module what is its own ("modules").
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import basis
from .basis import Factors, Recipe
from .factors import WORKSPACE, Job, factor
from .files import write_atomically
from .matching import matches
from .weights import FLOATS, Weight

FORMAT_VERSION = 1
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
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

    def find(self, name: str) -> str:
        """The module of the file that a model's module is: by its name, else by the one whose name ends alike.

        A checkpoint says model.layers.0.q_proj where the model without its head says layers.0.q_proj.  Raises
        ValueError where there is none, or more than one.
        """
        if name in self.modules:
            return name
        found = [there for there in self.modules if there.endswith(f".{name}") or name.endswith(f".{there}")]
        if len(found) != 1:
            what = "no module" if not found else f"{len(found)} modules, {', '.join(found[:3])},"
            raise ValueError(f"basis: {self.path} has {what} for module {name!r}; it is for another model or targets")
        return found[0]

    def read(self, there: str, W: Weight, label: str) -> Factors:
        """A and B of one module, on the weight's device, checked against the weight; ValueError where they differ."""
        with _opened(self.path) as f:
            A, B = (f.get_tensor(f"{there}.{which}").to(W.device) for which in "AB")
        N, K = W.shape
        rank = self.modules[there][0]
        if tuple(A.shape) != (rank, K) or tuple(B.shape) != (N, rank):
            raise ValueError(
                f"basis: {self.path} has A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} for {label}, "
                f"must be {(rank, K)} and {(N, rank)}"
            )
        off = basis.distance(W.read(), A, B)
        if not off <= basis.ALIGNED:
            raise ValueError(
                f"basis: {self.path} was made from another weight than that of {label}: A and B are off by {off:.1e}, "
                f"must be within {basis.ALIGNED:.0e}. Run loraxs init on this model's checkpoint"
            )
        return A, B


def read_basis(path: str | os.PathLike) -> Basis:
    """Open a basis file.  FileNotFoundError: there is none.  ValueError: it is no whole basis file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"basis: there is no file {path}")
    with _opened(path) as f:
        header = (f.metadata() or {}).get("loraxs_basis")
        keys = set(f.keys())
    if header is None:
        raise ValueError(f"basis: {path} is a safetensors file, but no LoRA-XS basis; `loraxs init` makes one")
    try:
        header = json.loads(header)
        if header["version"] != FORMAT_VERSION:
            raise ValueError(
                f"basis: {path} is of format version {header['version']}, this loraxs_kernels reads {FORMAT_VERSION}"
            )
        modules = {}
        for name, own in header["modules"].items():
            entry = header["recipe"] | own
            rank = entry.pop("rank")
            modules[name] = rank, Recipe(name=name, **entry)
            if not {f"{name}.A", f"{name}.B"} <= keys:
                raise KeyError(f"A and B of {name}")
        return Basis(path, header["base_model"], modules)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"basis: {path} is damaged, its header and tensors do not agree ({error!r})") from error


def make_basis(
    model: str | os.PathLike,
    rank: int,
    out: str | os.PathLike,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    seed: int = 0,
    n_iter: int | None = None,
    tier: str = "standard",
    dtype: torch.dtype | None = None,
    devices: Sequence[torch.device] | None = None,
    workspace: int = WORKSPACE,
    progress: bool = True,
) -> list[str]:
    """Compute A and B from a checkpoint's weights, read from the disk one at a time, and write a basis file.

    Args:
        model: the folder of a model with *.safetensors, or one such file.
        rank: r of every module.
        out: the file to write, in one step.
        target_modules, exclude_modules: as in `attach`, on the names of the tensors without ".weight"; "all-linear" is
            every matrix but embeddings and output embeddings, told by the last part of their names.
        seed, n_iter, tier: of `truncated_svd`.
        dtype: of A and B; None: of each weight.
        devices: to compute on, sharing the modules; None: the CPU.
        workspace, progress: as in `attach`.

    Returns the names of the modules.  Raises FileNotFoundError or ValueError, naming the argument or the module, before
    anything is written.
    """
    weights, base_model = _checkpoint(Path(model))
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    jobs: list[Job] = []
    for name, (shape, kind, weight) in weights.items():
        if exclude_modules and matches(name, exclude_modules):
            continue
        if everything and (len(shape) != 2 or EMBEDDINGS.fullmatch(name.rpartition(".")[2])):
            continue
        if not everything and not matches(name, target_modules):
            continue
        if weight is None:
            raise ValueError(
                f"target_modules: module {name!r} of {model} has a weight of shape {tuple(shape)} and dtype {kind}, "
                "must be a matrix of bf16, fp16, fp32 or fp64; leave it out, or attach to the loaded model"
            )
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(
                f"rank: got {rank} for module {name!r} of shape {weight.shape}, must be from 1 to {min(weight.shape)}; "
                "leave the module out with exclude_modules"
            )
        chosen = None if dtype in (None, weight.dtype) else basis.dtype_name(dtype)
        recipe = Recipe("svd", seed, name, chosen, n_iter=n_iter, tier=tier).pinned(rank, weight.shape)
        jobs.append(Job(f"module {name!r}", weight, rank, recipe))
    if not jobs:
        raise ValueError(f"target_modules: got {target_modules!r}, which matches no matrix of {model}")
    tensors: dict[str, Tensor] = {}

    def keep(i: int, A: Tensor, B: Tensor) -> None:
        name, to = jobs[i].recipe.name, dtype or jobs[i].weight.dtype
        tensors[f"{name}.A"], tensors[f"{name}.B"] = (t.to(to).cpu().contiguous() for t in (A, B))

    factor(jobs, keep, devices=devices, workspace=workspace, progress=progress)
    entries = {job.recipe.name: _entry(job) for job in jobs}
    common = next(iter(entries.values()))
    header = {
        "version": FORMAT_VERSION,
        "base_model": base_model,
        "recipe": common,
        "modules": {
            name: {key: value for key, value in entry.items() if common[key] != value}
            for name, entry in entries.items()
        },
    }
    metadata = {"loraxs_basis": json.dumps(header, separators=(",", ":"))}
    write_atomically(out, safetensors.torch.save(tensors, metadata))
    return list(entries)


def _entry(job: Job) -> dict[str, Any]:
    return {"rank": job.rank} | {key: value for key, value in asdict(job.recipe).items() if key != "name"}


def _checkpoint(model: Path) -> tuple[dict[str, tuple[list[int], str, Weight | None]], str]:
    """{module: the shape and dtype of its weight, and where it is a matrix of floats, itself}; the model's name."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    index = model / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [model / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"model: {index} is no index of safetensors files ({error!r})") from error
    if not files:
        raise FileNotFoundError(f"model: {model} is no safetensors file and no folder that has any")
    config = model / "config.json"
    described = json.loads(config.read_text()) if config.is_file() else {}
    transposed = described.get("model_type") in CONV1D_MODELS
    weights: dict[str, tuple[list[int], str, Weight | None]] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"model: {index} names {file.name}, which is not there")
        with _opened(file) as f:
            for key in f.keys():  # noqa: SIM118
                name, _, kind = key.rpartition(".")
                if kind == "weight":
                    tensor = f.get_slice(key)
                    shape, dtype = tensor.get_shape(), tensor.get_dtype()
                    weights[name] = shape, dtype, _weight(file, key, shape, dtype, transposed)
    return weights, described.get("_name_or_path") or (model.stem if model.is_file() else model.resolve().name)


def _weight(file: Path, key: str, shape: list[int], dtype: str, transposed: bool) -> Weight | None:
    if len(shape) != 2 or DTYPES.get(dtype) not in FLOATS:
        return None

    def read() -> Tensor:
        with _opened(file) as f:
            W = f.get_tensor(key)
        return W.mT if transposed else W

    N, K = reversed(shape) if transposed else shape
    return Weight((N, K), DTYPES[dtype], torch.device("cpu"), copies=True, sharded=False, read=read)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            yield f
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error
