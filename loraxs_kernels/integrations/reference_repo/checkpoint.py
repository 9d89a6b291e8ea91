"""A checkpoint of the reference, loaded into its base model."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...acceptance import AdapterMismatch
from ...adapter_contents import tied_to_saved
from ...adapter_file import saved_values
from ...basis import ACCEPT, ALIGNED, align_by_factors, probes, residual
from ...factors import WORKSPACE, WORKSPACE_IN_BYTES, compute_options
from ...files import named, read_json
from ...matching import adapted_layers, has_adapters, matches, pattern_value
from ...model import detach, install
from ...naming import FLOATS, Former, aliases, as_dtype
from ...recipe import Recipe
from ...transaction import keep, transaction
from ...weights import weight_of
from ..peft_files import PREFIX, read_tensors
from .keys import part

OTHER_WEIGHT = 0.5  # relative error of A = B^T W: about 0.1 on a base that was quantised since, about 1 on another one
# What PEFT saves by the type of the task, too; up to 0.10, which the reference asks for, its config does not say so.
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Trained:
    """One layer of a checkpoint: A (r, K), R (r, r), B (N, r) in its dtypes, and alpha = s r."""

    A: Tensor
    R: Tensor
    B: Tensor
    alpha: float


@aliases(workspace=WORKSPACE_IN_BYTES, basis=Former("factors"))
@torch.no_grad()
def load_reference_adapter(
    model: M,
    folder: str | os.PathLike,
    *,
    factors: str = "file",
    tolerance: float = ALIGNED,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    workspace_gib: float = WORKSPACE / 2**30,
    progress: bool = True,
) -> M:
    """Load a checkpoint of the reference implementation into the base model it was trained on, in place.

    Afterwards the model is as after `attach`: it has LoraXSLinear layers, whose R train, and the modules_to_save of the
    checkpoint (a classifier head) with their values.

    Args:
        model: the plain base model, without PEFT around it.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin), as save_pretrained or the Trainer
            wrote them.  reconstr_config.json is read if it is there or one folder up.
        factors: where A and B come from.
            "file": A, B and R as the checkpoint has them; the files of `save_adapter` then hold all three.
            "recompute": A' and B' from the SVD of the model's weights, and R' = B'^+ B R A A'^+; the files of
            `save_adapter` then hold only R.  If scikit-learn is installed, and its SVD gives the checkpoint's A and B
            again, that SVD is used, on the CPU; loading such a file needs scikit-learn too.  Otherwise (other weights
            than those of the training, or a model in bf16) the SVD is that of `attach`.  Then delta W changes, often
            by more than the tolerance, because the reference's last singular vectors have not converged.
        tolerance: the largest relative error of delta W that rounding or recomputing A and B may cause.  The error is
            estimated for every layer, as for adapter files; if it is above 1e-3, a warning states it.
        dtype: of A and B; None: the weight's.  The reference trains with A and B in fp32.  A model in bf16 rounds them,
            with a relative error of delta W of about 2e-3, less than that of W.  torch.float32 keeps them in fp32; the
            delta then costs one more pass over y.
        device, workspace_gib, progress: for the SVD, as in `attach`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, was not written by the reference, or is for another model.  The reference writes no
            checksum: a flipped bit that leaves R finite is not noticed.
        AdapterMismatch: A is not B^T W, so the base model is a different one (only a warning if no reconstr_config.json
            says whether A and B are random); or the tolerance is exceeded.
    After an error the model is as it was.
    """
    if factors not in ("file", "recompute"):
        raise ValueError(f'factors: got {factors!r}, must be "file" or "recompute"')
    if not (isinstance(tolerance, (int, float)) and tolerance >= 0):
        raise ValueError(f"tolerance: got {tolerance!r}, must be a number of at least 0")
    dtype = as_dtype("dtype", dtype, FLOATS)
    if has_adapters(model):
        raise ValueError("model: already has LoRA-XS adapters; lx.detach(model) takes them off")
    if hasattr(model, "get_base_model") or any("base_layer" in m._modules for m in model.modules()):
        raise ValueError(
            f"model: got a {type(model).__name__} with PEFT in it, must be the plain base model: this function adds "
            "the adapters itself. To load a checkpoint into layers that replace_reference_layers has made, call "
            "model.load_adapter(folder, 'default')"
        )
    folder = named(folder, "folder", "a checkpoint")
    config, tensors = _read(folder)
    trained, others = _trained(config, tensors, folder)
    described = _described(folder)
    _check_base(model, trained, described, folder)
    saved = _modules_to_save(model, config, others, folder)
    try:
        head = saved_values(model, saved, others)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if tied := tied_to_saved(model, saved):
        raise ValueError(
            f"{folder}: has values for {', '.join(saved)}, which PEFT trained as copies, and in this model "
            f"{next(iter(tied))!r} shares them; give that a weight of its own first: module.weight = nn.Parameter("
            "module.weight.detach().clone()), and config.tie_word_embeddings = False"
        )
    dropout = _dropout(config, folder)
    compute = compute_options(device, workspace_gib, progress)

    def errors_with(recipe: Recipe | None) -> dict[str, float]:
        """Attach, with A and B by this recipe or from the checkpoint; return the relative error of every delta W."""
        options = {
            name: {
                "rank": each.R.shape[0],
                "alpha": each.alpha,
                "dropout": dropout,
                "init": replace(recipe, name=name) if recipe else (each.A, each.B),
                "dtype": dtype,
            }
            for name, each in trained.items()
        }
        install(model, options, saved, **compute)
        errors = {}
        for name, layer in adapted_layers(model):
            each = trained[name]
            layer.R.copy_(_expressed(each, layer.A, layer.B) if recipe else each.R)
            errors[name] = residual(probes(each.A, each.R, each.B), layer.A, layer.R, layer.B)
        return errors

    with transaction(model) as undo:
        errors = None
        if factors == "recompute" and (recipe := _own_recipe(model, trained, described)):
            errors = errors_with(recipe)
            if not max(errors.values()) <= ACCEPT:
                detach(model)
                errors = None
        if errors is None:
            errors = errors_with(Recipe() if factors == "recompute" else None)
        worst = max(errors, key=errors.__getitem__)
        found = f"{folder}: the estimated relative error of delta W in module {worst!r} is {errors[worst]:.1e}"
        why = "its A and B are rounded to the model's dtype; dtype=torch.float32 keeps them"
        if factors == "recompute":
            why = 'A and B of this model\'s weights are not quite those it was trained on; factors="file" keeps them'
        if not errors[worst] <= tolerance:
            raise AdapterMismatch(f"{found}, more than the tolerance of {tolerance:.0e}: {why}")
        keep(undo, [target for target, _ in head])
        for target, value in head:
            target.copy_(value)
        if errors[worst] > ACCEPT and not (factors == "file" and dtype):
            warnings.warn(f"{found}: {why}", stacklevel=4)  # past the wrappers of no_grad and `aliases`
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a checkpoint, on the CPU."""
    weights = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    file = next((each for each in weights if each.is_file()), None)
    if file is None or not (folder / "adapter_config.json").is_file():
        what = "adapter_model.safetensors or adapter_model.bin" if file is None else "adapter_config.json"
        raise FileNotFoundError(f"folder: {folder} has no {what}")
    config = _json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder}: peft_type is {config.get('peft_type')!r}, must be 'LORA' as the reference saves it"
        )
    return config, read_tensors(file)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file.read_bytes(), str(file))


def _trained(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Trained], dict[str, Tensor]]:
    """A, R, B by the names of the base model's modules, and all other tensors by theirs."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, t in tensors.items():
        key = key.removeprefix(PREFIX)
        if at := part(key):
            name, letter = at
            if letter in found.setdefault(name, {}):
                raise ValueError(f"{folder}: has {letter} for module {name!r} twice, by two keys")
            found[name][letter] = t
        else:
            others[key] = t
    if not any("R" in each for each in found.values()):
        raise ValueError(f"{folder}: has no R (lora_latent_mapping); load a plain LoRA adapter by PEFT")
    trained = {}
    for name, each in found.items():
        if missing := sorted(set("ARB") - set(each)):
            raise ValueError(
                f"{folder}: has no {' and '.join(missing)} for module {name!r}. R is useless without its exact A and "
                "B, which another SVD need not give again; use the complete file that the reference saved"
            )
        A, R, B = (each[letter] for letter in "ARB")
        r = A.shape[0] if A.dim() == B.dim() == 2 else 0
        if r < 1 or B.shape[1] != r or tuple(R.shape) != (r, r):
            shapes = ", ".join(str(tuple(t.shape)) for t in (A, R, B))
            raise ValueError(f"{folder}: A, R and B of module {name!r} have shapes {shapes}, which do not fit")
        if any(t.dtype not in FLOATS for t in (A, R, B)):
            kinds = ", ".join(str(t.dtype) for t in (A, R, B))
            raise ValueError(
                f"{folder}: A, R and B of module {name!r} are of {kinds}, must be bf16, fp16, fp32 or fp64"
            )
        trained[name] = Trained(A, R, B, _alpha(config, name, r, folder))
    return trained, others


def _alpha(config: dict[str, Any], name: str, rank: int, folder: Path) -> float:
    """alpha = s r for a layer of this rank, where s is what PEFT makes of the configuration."""
    try:
        r = pattern_value(config.get("rank_pattern"), name, config["r"])
        alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
        alpha = alpha * rank / (math.sqrt(r) if config.get("use_rslora") else r)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}")
        return alpha
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError, re.error, RecursionError) as error:
        raise ValueError(f"{folder}: adapter_config.json does not say r and lora_alpha ({error!r})") from error


def _dropout(config: dict[str, Any], folder: Path) -> float:
    p = config.get("lora_dropout", 0.0)
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"{folder}: lora_dropout in adapter_config.json is {p!r}, must be in [0, 1)")
    return float(p)


def _described(folder: Path) -> dict[str, Any] | None:
    """What reconstr_config.json says, if there is one."""
    places = [each / "reconstr_config.json" for each in (folder, folder.resolve().parent)]
    return next((_json(file) for file in places if file.is_file()), None)


def _random(described: dict[str, Any] | None) -> bool:
    """Whether A or B, or both, are random."""
    return any((described or {}).get(key) for key in ("replacement_module_random_init", "half_init_dec"))


def _expressed(each: Trained, A: Tensor, B: Tensor) -> Tensor:
    """R converted to another A and B."""
    return align_by_factors(each.R.double(), (each.A, each.B), A, B)


def _own_recipe(model: nn.Module, trained: Mapping[str, Trained], described: dict[str, Any] | None) -> Recipe | None:
    """The reference's recipe for A and B, if scikit-learn gives the same again here; tried on the smallest layer."""
    svd = (described or {}).get("svd") or {"n_iter": 10, "random_state": 42}
    bounds = {"n_iter": 1000, "random_state": 2**32 - 1}  # of scikit-learn's seeds
    said = isinstance(svd, dict) and all(
        type(value := svd.get(key)) is int and 0 <= value <= most for key, most in bounds.items()
    )
    if not said or _random(described) or find_spec("sklearn") is None:
        return None
    recipe = Recipe("sklearn", svd["random_state"], n_iter=svd["n_iter"])
    name, each = min(trained.items(), key=lambda item: item[1].A.shape[1] * item[1].B.shape[0])
    A, B = recipe.factors(weight_of(model.get_submodule(name), f"module {name!r}"), each.A.shape[0])
    error = residual(probes(each.A, each.R, each.B), A, _expressed(each, A, B), B)
    return recipe if error <= ACCEPT else None


def _check_base(
    model: nn.Module, trained: Mapping[str, Trained], described: dict[str, Any] | None, folder: Path
) -> None:
    """Refuse a model without these modules, or where A is not B^T W, as in the reference even without convergence."""
    modules = dict(model.named_modules())
    errors = {}
    for name, each in trained.items():
        if name not in modules:
            raise ValueError(f"model: has no module {name!r}, which {folder} adapts; that is of another base model")
        try:
            weight = weight_of(modules[name], f"module {name!r}")
        except TypeError:
            continue  # a layer whose weight cannot be read can still be given A and B
        if weight.device.type == "meta":
            raise ValueError(f"model: module {name!r} is on the meta device; load its weights first")
        N, K = weight.shape
        if (each.B.shape[0], each.A.shape[1]) != (N, K):
            raise ValueError(
                f"model: module {name!r} has a weight of shape {N} x {K}, {folder} is for "
                f"{each.B.shape[0]} x {each.A.shape[1]}; that is of another base model"
            )
        if not _random(described):
            W = weight.read()
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            A, B = each.A.to(W), each.B.to(W)
            if A.any() or W.any():  # else the weight is as it was
                errors[name] = float(((B.t() @ W - A).norm() / A.norm()).nan_to_num(nan=torch.inf))
    worst = max(errors, key=errors.__getitem__, default=None)
    if worst is None or errors[worst] <= OTHER_WEIGHT:
        return
    found = f"{folder}: A of module {worst!r} is not B^T W of this model (relative error {errors[worst]:.1e})"
    if described:
        raise AdapterMismatch(f"{found}; load the weights that the adapter was trained on")
    warnings.warn(
        f"{found}, and there is no reconstr_config.json to say whether A and B are random. If they are not, load the "
        "weights that the adapter was trained on",
        stacklevel=5,
    )


def _modules_to_save(model: nn.Module, config: dict[str, Any], others: Mapping[str, Tensor], folder: Path) -> list[str]:
    """The modules that the tensors other than A, R and B belong to; each must belong to one."""
    asked, task = config.get("modules_to_save") or [], config.get("task_type")
    if not (isinstance(asked, list) and all(isinstance(each, str) for each in asked)):
        raise ValueError(f"{folder}: modules_to_save in adapter_config.json is {asked!r}, must be a list of names")
    endings = sorted({*asked, *(HEADS.get(task, []) if isinstance(task, str) else [])})
    names = [
        name
        for name, _ in model.named_modules()
        if matches(name, endings) and any(key.startswith(f"{name}.") for key in others)
    ]
    for key in others:
        if not any(key.startswith(f"{name}.") for name in names):
            raise ValueError(
                f"{folder}: tensor {key!r} belongs neither to an adapted layer nor to one of modules_to_save "
                f"({endings}) in this model"
            )
    return names
