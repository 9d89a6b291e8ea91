"""Saving, uploading and loading adapter files, which hold R and what it takes to recognise its A and B."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import card
from .acceptance import aligned, can_align, mismatch
from .accounting import summary
from .adapter_contents import HAS_BANK, as_given, packed_adapter, whole_R
from .adapter_format import NUMBERS, read
from .basis import ACCEPT, ALIGNED, is_flat, same_base, singular_values
from .factors import WORKSPACE, WORKSPACE_IN_BYTES, compute_options
from .files import SEPARATORS, check_replaces, is_finite, named, target_of, write_atomically
from .hub import FILE, Token, local_file, upload
from .linear import LoraXSLinear, makers_of_R
from .matching import adapted_layers, base_name, by_base_name, has_adapters, is_inside, saved_modules, unwrapped
from .model import Attachment, basis_for, check_not_in_ddp, install
from .naming import DTYPES, aliases, label_of
from .sharding import assign, check_writable, written
from .transaction import keep, transaction
from .weights import weight_of

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger(__package__)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    portable: bool = False,
    save_factors: bool = False,
) -> None:
    """Save the adapter of a model: every R, the modules_to_save, and a fingerprint of A and B.

    Args:
        model: with adapters from `attach`, merged or not, as it is or inside torch.compile or DistributedDataParallel.
            If FSDP2 or DeepSpeed's ZeRO-3 has sharded R, every rank must call: R and the modules_to_save are gathered
            one by one, and each rank then writes the file at the path it was given.  Inside a GatheredParameters of all
            parameters that train, it is enough if one rank calls.
        path: a file, by convention *.safetensors, or a folder: one that exists, or a path that ends in "/".  The folder
            gets adapter.safetensors and a model card, README.md, for the Hugging Face Hub.  A README.md that was edited
            stays as it is, with a warning.  Each file is replaced in one step: whatever stops this process, a reader
            finds the whole old file or the whole new one.  So all ranks may give the same path.  A file that is no
            adapter is not replaced, unless it is empty.
        dtype: of R in the file, fp32 or bf16; None: the dtype that R has.
        portable: add random projections of the singular vectors (8 columns for each side).  With them `load_adapter`
            can align R to slightly different A and B, such as those of the same weights in a different dtype.
        save_factors: add A and B themselves (large).  A and B that were given to `attach`, not computed, are always in
            the file.  Where the singular values of a weight are nearly equal, a load that attaches takes the file's.

    Raises ValueError, before anything is written, if the model has no adapters, if R or a parameter of the
    modules_to_save is not finite, or if there is a file that is no adapter.  Warns if other parameters train, which no
    file holds; if A and B can no longer be made from the weights, so that the file holds them; and if the base weights
    were rounded since A and B were made (fp32 moved to bf16, even if moved back): the file then loads only into a model
    whose weights are as they were before.
    """
    named(path, "path", "an adapter")
    folder = Path(path) if os.path.isdir(path) or os.fspath(path).endswith(SEPARATORS) else None
    check_replaces(path if folder is None else folder / FILE, "loraxs", "LoRA-XS adapter")
    if folder is None:
        parts, _ = packed_adapter(model, str(path), dtype, portable, save_factors)
        write_atomically(path, *parts)
        return
    readme = folder / card.NAME
    if not readme.is_file() or card.is_as_written(readme):  # an edited one stays, so that it need not be writable
        readme = target_of(readme)
    parts, text = packed_adapter(model, folder.resolve().name, dtype, portable, save_factors)
    write_atomically(folder / FILE, *parts)
    if readme.exists() and not card.is_as_written(readme):
        warnings.warn(f"{readme}: was not written by save_adapter, or was edited, and stays as it is", stacklevel=2)
    else:
        write_atomically(readme, text.encode())


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: Token = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dtype: torch.dtype | str | None = None,
    portable: bool = False,
    save_factors: bool = False,
) -> str:
    """Upload the adapter of a model to the Hugging Face Hub: adapter.safetensors and a model card, in one commit.

        lx.push_to_hub(model, "user/name")
        lx.load_adapter(fresh, "user/name")

    Args:
        model: as for `save_adapter`.  If torch.distributed runs several processes, every rank must call; rank 0
            uploads.
        repo_id: "user/name".  The repository is created if it does not exist.
        private: whether a repository that is created is private; None: the account's default.
        token: for the Hub; None: that of `hf auth login`.
        revision: the branch to commit to, created if it does not exist; None: main.
        commit_message: None: "Upload a LoRA-XS adapter".
        dtype, portable, save_factors: as for `save_adapter`.

    Returns the URL of the commit.  A model card that was edited on the Hub stays as it is, with a warning.

    Raises what `save_adapter` raises, before anything is uploaded; ImportError if huggingface_hub is not installed,
    PermissionError if the Hub refuses the token, ConnectionError if the Hub cannot be reached.
    """
    # The Hub also takes a bare name, by which `load_adapter` would not find the adapter.
    if not (isinstance(repo_id, str) and card.HUB_ID.fullmatch(repo_id)):
        raise ValueError(f'repo_id: got {repo_id!r}, must be "user/name", which does not end in .safetensors')
    parts, text = packed_adapter(model, repo_id, dtype, portable, save_factors)
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        return ""
    where = {"private": private, "token": token, "revision": revision, "message": commit_message}
    return upload(repo_id, b"".join(parts), text, **where)


@aliases(workspace=WORKSPACE_IN_BYTES)
@torch.no_grad()
def load_adapter(
    model: M,
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: Token = None,
    basis: str | os.PathLike | None = None,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    workspace_gib: float = WORKSPACE / 2**30,
    progress: bool = True,
) -> M:
    """Load an adapter into a model, in place; if the model has no adapters, they are attached first.

        lx.load_adapter(model, "adapter.safetensors")
        lx.load_adapter(model, "folder")  # with an adapter.safetensors
        lx.load_adapter(model, "user/name")  # from the Hugging Face Hub

    A and B are recomputed from the model's own weights by the recipe in the file and checked: the estimated relative
    error of delta W = s B R A must be at most 1e-3.  If it is larger and the file was saved with portable=True or
    save_factors=True, R is aligned to the recomputed A and B.  An error of up to 3e-2 is then accepted, with a warning
    that gives it.  Otherwise the file is refused.

    Args:
        model: the base model the adapter was trained on, without adapters, or with adapters for the same modules and
            ranks.  If FSDP2 or DeepSpeed's ZeRO-3 has sharded it, every rank must call, and all get the values that
            rank 0 reads.  Before deepspeed.initialize it is enough if rank 0 calls inside a GatheredParameters(...,
            modifier_rank=0) of all parameters that train; later that is a RuntimeError, because the values would not
            reach the optimizer.
        path: the file, a folder with an adapter.safetensors, or a repository "user/name" on the Hub.  If there is a
            file or folder of that name, it is read, and not the Hub.
        revision: a branch, tag or commit of the repository.
        token: for the Hub; None: that of `hf auth login`.
        basis: a file from `loraxs init`, as in `attach`.  A and B are then read, not computed.  Only for a model
            without adapters.
        device, workspace_gib, progress: for the SVD, as in `attach`, if the adapters are attached by this call.

    Raises:
        FileNotFoundError: there is no such file, folder or repository.
        ConnectionError, PermissionError: the Hub cannot be reached, or refuses.
        ImportError: the path names a repository on the Hub, and huggingface_hub is not installed.
        ValueError: the file is damaged, its version is not supported, or its modules are not the model's.
        AdapterMismatch: A and B of this model are not those that the adapter was trained with.
    Warns if the model has modules_to_save that the file has no values for: they stay as they are.
    After an error the model is as it was.  For that, memory holds the old values of modules_to_save until the end.
    """
    given, model = model, unwrapped(model)
    if any(isinstance(m, LoraXSLinear) and m.seat is not None and m.seat.put_on for m in model.modules()):
        raise ValueError(f"model: {HAS_BANK}; add(name, path) of the bank takes the file in")
    path = local_file(path, revision, token)
    entries, modules_to_save, saved = read(path)
    fresh = not has_adapters(model)
    if fresh:
        check_not_in_ddp(given)
    if basis is not None and not fresh:
        raise ValueError("basis: got a file for a model that has adapters already, with their A and B; must be None")
    # Earlier files of compiled blocks had the names of their wrappers.
    entries, saved = ({base_name(name): each for name, each in found.items()} for found in (entries, saved))
    modules_to_save = [base_name(name) for name in modules_to_save]
    check_shared(model, entries, path)
    compute = compute_options(device, workspace_gib, progress)
    with transaction(model) as undo:
        if fresh:
            with naming_file(path):
                attach_as(model, entries, modules_to_save, basis, **compute)
        layers = dict(adapted_layers(model))
        settled, worst = _settle(layers, entries, path, fresh)
        with naming_file(path):
            values = saved_values(model, modules_to_save, saved)
        _record_saved(model, modules_to_save, path)
        if worst > ACCEPT:
            warnings.warn(
                f"{path}: A and B of this model differ slightly from those that the adapter was trained with; R was "
                f"aligned to them, with an estimated relative error of delta W of up to {worst:.1e}",
                stacklevel=4,  # past the wrappers of no_grad and `aliases`
            )
        trained = [p for layer in layers.values() for p in makers_of_R(layer)]
        changing = [*trained, *(target for target, _ in values)]
        check_writable(changing)
        keep(undo, changing)
        users: dict[int, str] = {}
        for name, R in settled.items():
            layer = layers[name]
            for other in {users.setdefault(id(p), name) for p in makers_of_R(layer)}:
                if not torch.equal(settled[other], R):
                    raise ValueError(
                        f"{path}: does not fit this model: modules {other!r} and {name!r} share one R here, and have "
                        "two that differ in the file; load it into a model in which each has its own"
                    )
            layer.alpha, layer.scaling = float(entries[name]["alpha"]), entries[name]["alpha"] / layer.rank
            if parametrize.is_parametrized(layer, "R"):
                R = R.to(whole_R(layer))  # before: DeepSpeed frees the parameters whenever R has been made of them
                _check_expressed(layer, R, path)
                with written(makers_of_R(layer)):
                    layer.R = R
            else:
                assign(layer.R, R)
        for target, value in values:
            assign(target, value)
    if logger.isEnabledFor(logging.INFO):
        logger.info("load_adapter: %s: %s; delta W is off by at most %.1e", path, summary(model), worst)
    return given


def check_shared(model: nn.Module, entries: Mapping[str, dict], path: Path) -> None:
    """ValueError where modules that were one in the model of a file are several in this one: only one would adapt."""
    modules = by_base_name(model)
    for name, entry in entries.items():
        for other in entry.get("shared", ()):
            if modules.get(other, modules.get(name)) is not modules.get(name):
                raise ValueError(
                    f"{path}: does not fit this model: modules {name!r} and {other!r} are two here, but are one in the "
                    "model that the file was saved from; share the module, as it was there"
                )


def _check_expressed(layer: LoraXSLinear, R: Tensor, path: Path) -> None:
    """ValueError where the parametrization of a layer's R has no values for this one, so that it would set another."""
    steps, made = layer.parametrizations.R, R
    for step in reversed(steps):
        made = step.right_inverse(made)
    for step in steps:
        made = step(*made) if isinstance(made, Sequence) else step(made)
    lost = float((made - R).norm())
    if not lost <= max(ACCEPT, 8 * torch.finfo(R.dtype).eps) * float(R.norm()):
        raise ValueError(
            f"{path}: does not fit this model: the parametrization of R in {layer.label} "
            f"({', '.join(type(step).__name__ for step in steps)}) cannot express the R of the file, and would be off "
            f"by {lost:.1e} in norm; load the adapter into a model without this parametrization"
        )


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Errors in the block, which puts what a file has into a model, are ValueErrors that name the file."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from error


def attach_as(
    model: nn.Module,
    entries: dict[str, dict],
    modules_to_save: list[str],
    basis: str | os.PathLike | None,
    **compute: Any,
) -> None:
    """Attach the adapters of a file to a model that has none; compute: options of `factor`."""
    modules = by_base_name(model)
    for name in [*entries, *modules_to_save]:
        if name not in modules:
            like = next((each for each in modules if each.endswith(f".{name}") or name.endswith(f".{each}")), None)
            part = f", or one of the two is a part of the other: there is {like!r} here" if like else ""
            raise ValueError(
                f"model: has no module {name!r}, but the adapter has: it is for a different base model{part}"
            )
        if not name:
            raise ValueError(
                "model: is a layer without an adapter, but the file holds the adapter of a single LoraXSLinear; pass "
                "LoraXSLinear.from_linear(model, rank)"
            )
    options = {}
    for name, entry in entries.items():
        recipe = entry["recipe"]
        options[name] = {key: entry[key] for key in NUMBERS} | {"init": recipe}
        if recipe.init == "given":
            options[name] |= {"init": (entry["A"], entry["B"]), "dtype": recipe.dtype and DTYPES[recipe.dtype]}
        elif can_align(entry) and not (recipe.rounded or recipe.dtype):  # R is aligned, so A and B take the weight's
            options[name]["dtype"] = weight_of(modules[name], label_of(name)).dtype
    opened = None if basis is None else basis_for(basis, options)
    for name, entry in entries.items() if opened else ():  # rounded further, as in the file
        made, there = options[name]["init"], entry["recipe"]
        if there.rounded[: len(made.rounded)] == made.rounded:
            options[name]["init"] = replace(made, rounded=there.rounded, dtype=there.dtype)
    here = {id(m): name for name, m in model.named_modules()}
    options = {here[id(modules[name])]: each for name, each in options.items()}
    install(model, options, [here[id(modules[name])] for name in modules_to_save], opened, **compute)


def _settle(
    layers: dict[str, LoraXSLinear], entries: dict[str, dict], path: Path, fresh: bool
) -> tuple[dict[str, Tensor], float]:
    """R for every layer, aligned to its A and B if need be, and the worst relative error of a delta.

    fresh: whether the load has attached the layers, so that they may get the file's A and B.
    """
    if layers.keys() != entries.keys():
        only = sorted(layers.keys() ^ entries.keys())
        raise ValueError(f"{path}: adapts other modules than the model's adapters do; only one of them has {only[0]!r}")
    settled, errors, refused = {}, {}, {}
    for name, entry in entries.items():
        layer = layers[name]
        if layer.rank != entry["rank"]:
            raise ValueError(
                f"{path}: module {name!r} has rank {entry['rank']} in the file and {layer.rank} in the model"
            )
        if layer.A.is_meta or any(p.is_meta for p in makers_of_R(layer)):  # whose copy_ does nothing
            raise ValueError(f"model: module {name!r} is not in memory (meta device); load its weights first")
        if layer.merged:
            raise ValueError(f"model: module {name!r} is merged; unmerge it before loading an adapter")
        if parametrize.is_parametrized(layer, "R") and not all(
            hasattr(p, "right_inverse") for p in layer.parametrizations.R
        ):
            raise ValueError(
                f"model: the parametrization of R in module {name!r} has no right_inverse, which is needed to set R"
            )
        by_rounding = fresh and layer.recipe.init == "svd" and is_flat(entry["S"])
        if by_rounding and "A" in entry and same_base(entry["S"], layer.A):  # no R can be aligned to another subspace
            layer.A, layer.B, layer.recipe = entry["A"].to(layer.A), entry["B"].to(layer.A), as_given(layer.recipe)
        settled[name], errors[name] = aligned(entry, layer.A, layer.B)
        if errors[name] > (ALIGNED if can_align(entry) else ACCEPT) or not same_base(entry["S"], layer.A):
            refused[name] = errors[name]
    if refused:
        worst = max(refused, key=refused.__getitem__)
        layer = layers[worst]
        raise mismatch(str(path), worst, entries[worst], refused[worst], singular_values(layer.A), recipe=layer.recipe)
    return settled, max(errors.values())


def saved_values(model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its saved value) for everything in the modules_to_save; ValueError where they differ."""
    pairs, seen = [], {}
    for name in names:
        try:
            state = {base_name(k): t for k, t in model.get_submodule(name).state_dict(keep_vars=True).items()}
        except AttributeError:
            raise ValueError(f"model: has no module {name!r}, which the adapter file has values for") from None
        for key, target in state.items():
            value = tensors.get(f"{name}.{key}")
            shape = getattr(target, "ds_shape", target.shape)
            if value is None or value.shape != shape:
                there = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(f"{name}.{key}: is {there} in the file, must be of shape {tuple(shape)}")
            if value.dtype != target.dtype and not (value.is_floating_point() and target.is_floating_point()):
                raise ValueError(f"{name}.{key}: is of {value.dtype} in the file, must be of {target.dtype}")
            if target.is_meta:  # whose copy_ does nothing
                raise ValueError(f"{name}.{key}: is not in memory (meta device, or offloaded); load its values first")
            if not is_finite(value.to(target.dtype)) and is_finite(target):
                raise ValueError(f"{name}.{key}: has values in the file that are NaN or Inf in {target.dtype}")
            other, same = seen.setdefault(id(target), (f"{name}.{key}", value))
            if same is not value and (same.dtype != value.dtype or not torch.equal(same, value)):
                raise ValueError(
                    f"{name}.{key}: is one with {other} in this model, and has another value in the file; load it into "
                    "a model in which each has its own (tie_word_embeddings=False)"
                )
            pairs.append((target, value))
        for key in tensors:
            if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in state:
                raise ValueError(f"model: has no tensor {key!r}, which the adapter file has a value for")
    return pairs


def _record_saved(model: nn.Module, names: Sequence[str], path: Path) -> None:
    """Let what a file has of modules_to_save be saved again; warn of those of the model that it does not have."""
    known = saved_modules(model)
    for name in set(names).difference(known):
        module = model.get_submodule(name)
        module.loraxs = Attachment(("",), frozenset(each for each, p in module.named_parameters() if p.requires_grad))
    if left := [name for name in known if not is_inside(name, names)]:
        warnings.warn(
            f"{path}: has no values for {', '.join(left)} of this model's modules_to_save, which stay as they are now. "
            "If they have been trained or loaded with another adapter, the model is not the one that was saved",
            stacklevel=5,  # past this, no_grad's wrapper and that of `aliases`
        )
