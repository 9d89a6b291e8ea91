"""Adapter files: R alone, in one safetensors file, with what it takes to know its A and B again.

Layout, format version 1.  Metadata: one JSON object under "loraxs".  Tensors, stacked over the modules of one rank r
in the order of the metadata's list:

    R/r        (n, r, r)  as trained, fp32 or the dtype asked for
    S/r        (n, r)     fp32 norms of the rows of A: for the SVD init the singular values
    probe/r    (n, 8)     fp32 bilinear probes of B R A, from R as stored (basis.probes)
    U/r, V/r   (n, r, 8)  fp32 sketches of the singular vectors, with portable=True (basis.sketch)
    A/i, B/i              the factors of module i, with save_factors=True
    model/NAME            every tensor of the modules_to_save, by its name in the model

Stacking keeps the header small: 224 modules of r = 16 in bf16 are 112 KiB of R.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import basis
from .basis import Recipe
from .factors import WORKSPACE, compute_devices
from .files import write_atomically
from .linear import LoRAXSLinear
from .model import adapted_layers, detach, install, unwrapped
from .weights import assign, whole

FORMAT_VERSION = 1

M = TypeVar("M", bound=nn.Module)


class AdapterMismatch(ValueError):
    """The adapter was trained on another basis than this model has; the message says how far off and what to do."""


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    save_factors: bool = False,
) -> None:
    """Write the adapter of a model: every R, the modules_to_save, and a fingerprint of the basis.

    Args:
        model: with adapters from `attach`, merged or not, bare or inside torch.compile or DistributedDataParallel.
            Where FSDP2 has sharded R, every rank must call.
        path: of the file, by convention *.safetensors.  It is replaced in one step: whoever reads it, and whatever
            stops this process, finds the old file or the new one, whole.
        dtype: of R in the file, fp32 or bf16; None: as trained.
        portable: add a sketch of the singular vectors (8 columns for each side), with which `load_adapter` can align
            R to a slightly different basis, such as one from the weights in another dtype.
        save_factors: add A and B themselves (large).  Always so for factors that were given and not computed.

    Raises ValueError, before anything is written, where the model has no adapters or an R is not finite.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, must be torch.float32, torch.bfloat16 or None")
    model, path = unwrapped(model), Path(path)
    if path.is_dir():
        raise ValueError(f"path: {path} is a directory, must be the name of a file")
    stacks: dict[str, list[Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    descriptions = {}
    for i, (name, layer) in enumerate(adapted_layers(model)):
        if "_fsdp_wrapped_module" in name:
            raise ValueError(
                f"model: is wrapped by FullyShardedDataParallel (module {name!r}), whose names no other model has; use "
                "FSDP2 (fully_shard), or save the model inside the wrapper"
            )
        if layer.R.is_meta or layer.A.is_meta:
            raise ValueError(
                f"module {name!r}: R or A is not there (meta device), must be in memory to be saved: load the weights, "
                "reset_parameters(), or take accelerate's offloading off"
            )
        R = whole(layer.R.detach())
        if not torch.isfinite(R).all():
            raise ValueError(f"module {name!r}: R has NaN or Inf values; nothing was written")
        R = R.to(dtype or R.dtype)
        record = {"R": R, "S": basis.singular_values(layer.A), "probe": basis.probes(layer.A, R, layer.B)}
        if portable:
            record["U"], record["V"] = basis.sketch(layer.A, layer.B)
        for key, t in record.items():
            stacks.setdefault(f"{key}/{layer.rank}", []).append(t.cpu())
        if save_factors or layer.recipe.init == "given":
            tensors |= {f"A/{i}": _plain(layer.A), f"B/{i}": _plain(layer.B)}
        descriptions[name] = _description(layer, name)
    tensors |= {key: torch.stack(stack) for key, stack in stacks.items()}
    modules_to_save = saved_modules(model)
    for name in modules_to_save:
        state = model.get_submodule(name).state_dict()
        tensors |= {f"model/{name}.{key}": _plain(t) for key, t in state.items()}
    first = next(iter(descriptions.values()))
    common = {key: value for key, value in first.items() if key != "name"}
    header = {
        "version": FORMAT_VERSION,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or "",
        "modules_to_save": modules_to_save,
        "layer": common,
        "modules": {
            name: {key: value for key, value in d.items() if key not in common or common[key] != value}
            for name, d in descriptions.items()
        },
    }
    write_atomically(path, safetensors.torch.save(tensors, {"loraxs": json.dumps(header, separators=(",", ":"))}))


@torch.no_grad()
def load_adapter(
    model: M,
    path: str | os.PathLike,
    *,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    workspace: int = WORKSPACE,
    progress: bool = True,
) -> M:
    """Load an adapter file into a model, in place; the adapters are attached first where the model has none.

    A and B are recomputed from the model's own weights by the recipe in the file and checked: the estimated relative
    error of delta W must be at most 1e-3.  Above that, R is aligned to today's basis if the file can (portable=True or
    save_factors=True) and taken, with a warning that gives the figure, up to 3e-2.  Anything else is refused.

    Args:
        model: the base model the adapter was trained on, without adapters or with ones for the same modules and ranks.
        path: of the file.
        device, workspace, progress: of the SVD, as in `attach`, where the adapters are attached here.

    Raises:
        FileNotFoundError: there is no such file.  ValueError: it is no whole adapter file of a version known here, or
        its modules are not the model's.  AdapterMismatch: the basis is another.  The model is then as it was.
    """
    given, model, path = model, unwrapped(model), Path(path)
    header, entries, tensors = _read(path)
    fresh = not any(isinstance(m, LoRAXSLinear) for m in model.modules())
    if fresh:
        devices = None if device is None else compute_devices(device)
        _attach(model, header, entries, devices=devices, workspace=workspace, progress=progress)
    try:
        layers = dict(adapted_layers(model))
        settled, worst = _settle(layers, entries, path)
        saved = {key.removeprefix("model/"): t for key, t in tensors.items()}
        values = saved_values(model, header["modules_to_save"], saved)
    except BaseException:
        if fresh:
            detach(model)
        raise
    for name, R in settled.items():
        layer = layers[name]
        layer.alpha, layer.scaling = entries[name]["alpha"], entries[name]["alpha"] / layer.rank
        if parametrize.is_parametrized(layer, "R"):
            layer.R = R.to(layer.R)
        else:
            assign(layer.R, R)
    for target, value in values:
        target.copy_(value)
    if worst > basis.ACCEPT:
        warnings.warn(
            f"{path}: this model's basis is not quite the one the adapter was trained on; R was aligned to it, with "
            f"an estimated relative error of delta W of up to {worst:.1e}",
            stacklevel=3,  # past no_grad's wrapper
        )
    return given


def saved_modules(model: nn.Module) -> list[str]:
    """The modules_to_save, by their names in this model, whichever part of it `attach` was called on."""
    attached = [(name, m.__dict__["loraxs"]) for name, m in model.named_modules() if "loraxs" in m.__dict__]
    return [f"{name}.{saved}" if name else saved for name, a in attached for saved in a.modules_to_save]


def _description(layer: LoRAXSLinear, name: str) -> dict[str, Any]:
    """The numbers and the recipe of one layer; the recipe's name only where it is not the module's."""
    recipe = {k: v for k, v in asdict(layer.recipe).items() if k != "name" or v != name}
    return {"rank": layer.rank, "alpha": layer.alpha, "dropout": layer.dropout, "sigma": layer.sigma, **recipe}


def _attach(model: nn.Module, header: dict, entries: dict[str, dict], **how: Any) -> None:
    """Attach the adapters of a file to a model that has none."""
    modules = dict(model.named_modules())
    for name in [*entries, *header["modules_to_save"]]:
        if name not in modules:
            raise ValueError(f"model: has no module {name!r}, which the adapter is for; it is of another base model")
    options = {}
    for name, entry in entries.items():
        init = (entry["A"], entry["B"]) if entry["recipe"].init == "given" else entry["recipe"]
        options[name] = {key: entry[key] for key in ("rank", "alpha", "dropout", "sigma")} | {"init": init}
    install(model, options, header["modules_to_save"], **how)


def _settle(layers: dict[str, LoRAXSLinear], entries: dict[str, dict], path: Path) -> tuple[dict[str, Tensor], float]:
    """R for every layer, aligned to its basis where need be, and the worst relative error of a delta."""
    if layers.keys() != entries.keys():
        only = sorted(layers.keys() ^ entries.keys())
        raise ValueError(f"{path}: is for other modules than the model's adapters; the first difference: {only[0]!r}")
    settled, errors = {}, {}
    for name, entry in entries.items():
        layer = layers[name]
        if layer.rank != entry["rank"]:
            raise ValueError(f"{path}: module {name!r} has rank {entry['rank']} there and {layer.rank} in the model")
        if layer.merged:
            raise ValueError(f"model: module {name!r} is merged; unmerge it before loading an adapter")
        if parametrize.is_parametrized(layer, "R") and not all(
            hasattr(p, "right_inverse") for p in layer.parametrizations.R
        ):
            raise ValueError(f"model: the parametrization of R in module {name!r} has no right_inverse to set R by")
        settled[name], errors[name] = fitted(entry, layer.A, layer.B)
    worst = max(errors, key=errors.__getitem__)
    entry, layer = entries[worst], layers[worst]
    can_align = ("A" in entry or "U" in entry) and basis.same_base(entry["S"], layer.A)
    if errors[worst] > (basis.ALIGNED if can_align else basis.ACCEPT):
        raise mismatch(str(path), worst, entry, errors[worst], layer.A)
    return settled, errors[worst]


def mismatch(
    where: str,
    name: str,
    entry: dict[str, Any],
    error: float,
    A: Tensor,
    keeping: str = "portable=True or save_factors=True",
) -> AdapterMismatch:
    """What to raise for a module whose delta W is off by `error`.

    where: names the adapter.  entry: as for `fitted`.  keeping: what to save it with, so that it fits.
    """
    found = f"{where}: the estimated relative error of delta W in module {name!r} is {error:.1e}"
    if not basis.same_base(entry["S"], A):
        return AdapterMismatch(
            f"{found}, and its singular values are not those the adapter was trained on: the base model (its name "
            f"there: {entry['base_model']!r}) or its weights are others. Load the weights it was trained on"
        )
    if error > basis.ALIGNED:
        return AdapterMismatch(
            f"{found}, more than {basis.ALIGNED:.0e}: the weights differ (edited, quantised or in another dtype) "
            "or the adapters were attached with another recipe. Load the weights in the dtype it was trained on "
            f"and let the adapter file attach, or save it with {keeping}"
        )
    return AdapterMismatch(
        f"{found}, more than {basis.ACCEPT:.0e}, and the file has nothing to align R by. Load the weights in "
        f"the dtype it was trained on, or save the adapter again with {keeping}"
    )


def fitted(entry: dict[str, Any], A: Tensor, B: Tensor) -> tuple[Tensor, float]:
    """R as it is if that reproduces the delta, else the best of its alignments; and the relative error it leaves.

    entry: R (r, r), S (r,) and probe of the adapter as saved; U and V, or A and B, where it can be aligned.
    """
    R = entry["R"].to(A.device, torch.promote_types(entry["R"].dtype, torch.float32))
    candidates = [R]
    if basis.residual(entry["probe"], A, R, B) > basis.ACCEPT and basis.same_base(entry["S"], A):
        candidates += basis.single_flips(R)
        if "A" in entry:
            candidates.append(basis.align_by_factors(R, (entry["A"], entry["B"]), A, B))
        elif "U" in entry:
            for cluster in (0.0, basis.CLUSTER):
                candidates.append(basis.align_by_sketch(R, entry["S"], (entry["U"], entry["V"]), A, B, cluster))
    errors = [basis.residual(entry["probe"], A, candidate, B) for candidate in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best], errors[best]


def saved_values(model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its saved value) for everything in the modules_to_save; ValueError where they differ."""
    pairs = []
    for name in names:
        try:
            state = model.get_submodule(name).state_dict()
        except AttributeError:
            raise ValueError(f"model: has no module {name!r}, which the adapter file has values for") from None
        for key, target in state.items():
            value = tensors.get(f"{name}.{key}")
            if value is None or value.shape != target.shape:
                there = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(f"{name}.{key}: is {there} in the file, must be of shape {tuple(target.shape)}")
            pairs.append((target, value))
    return pairs


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The header, everything about each module by its name, and all tensors of an adapter file."""
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            header = (f.metadata() or {}).get("loraxs")
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error
    if header is None:
        raise ValueError(f"{path}: is a safetensors file, but no LoRA-XS adapter (its metadata has no 'loraxs')")
    try:
        header = json.loads(header)
        version = header["version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: is of format version {version}, this loraxs_kernels reads {FORMAT_VERSION}; upgrade it"
            )
        return header, _entries(header, tensors), tensors
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is damaged, its header and tensors do not agree ({error!r})") from error


def _entries(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """{module name: its description, R, S, probe and, where the file has them, U and V or A and B}."""
    entries, position = {}, {}
    for i, (name, difference) in enumerate(header["modules"].items()):
        entry = {"base_model": header["base_model"], "name": name, **header["layer"], **difference}
        rank = entry["rank"]
        row = position[rank] = position.get(rank, -1) + 1
        entry |= {key: tensors[f"{key}/{rank}"][row] for key in ("R", "S", "probe")}
        entry |= {key: tensors[f"{key}/{rank}"][row] for key in ("U", "V") if f"{key}/{rank}" in tensors}
        entry |= {key: tensors[f"{key}/{i}"] for key in ("A", "B") if f"{key}/{i}" in tensors}
        if entry["init"] == "given" and not {"A", "B"} <= entry.keys():
            raise KeyError(f"A and B of module {name!r}")
        entry["recipe"] = Recipe(**{f.name: entry[f.name] for f in fields(Recipe)})
        if entry["R"].shape != (rank, rank):
            raise IndexError(f"R of module {name!r} has shape {tuple(entry['R'].shape)}")
        entries[name] = entry
    return entries


def _plain(t: Tensor) -> Tensor:
    """A copy that shares memory with nothing, on the CPU."""
    return t.detach().to("cpu", copy=True).contiguous()
