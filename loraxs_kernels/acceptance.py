"""Whether an adapter is accepted with A and B other than its own, how R is aligned to them, and what a refusal says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import basis
from .basis import ACCEPT, ALIGNED, DIFFERENT
from .recipe import Factors, Recipe

HOW = ("init", "seed", "method", "block", "n_iter")  # of a recipe: what decides A and B of one weight
# What a checkpoint of LoraXSCallback has of each layer beside R; earlier ones have no s.
FINGERPRINT, SCALING = "loraxs_basis", "loraxs_scaling"


class AdapterMismatch(ValueError):
    """A and B of this model are not those that the adapter was trained with; the message says why and what to do."""


def can_align(entry: dict[str, Any]) -> bool:
    """Whether an adapter has what it takes to align its R to other A and B."""
    return "A" in entry or "U" in entry


def mismatch(
    where: str,
    name: str,
    entry: dict[str, Any],
    error: float,
    S: Tensor,
    keeping: str = "portable=True or save_factors=True",
    recipe: Recipe | None = None,
    load: str = "Load the adapter",
) -> AdapterMismatch:
    """The error for a module whose delta W is off by `error`: by how much, why, and what to do.

    where: names the adapter.  entry: as for `aligned`, with base_model and, where it is known, recipe.  S: the singular
    values in the model's A.  keeping: what to save an adapter with, so that it can be aligned; "": nothing helps.
    recipe: by which the model's A was made.  load: what the user should do with the right model, in words.
    """
    found = f"{where}: the estimated relative error of delta W in module {name!r} is {error:.1e}"
    there, here = entry.get("recipe") or recipe, recipe or entry.get("recipe")
    names = ("name",) if there is not None and there.init == "random" else ()
    differs = [f for f in (*HOW, *names) if getattr(there, f, None) != getattr(here, f, None)]
    if differs:
        ours, theirs = (", ".join(f"{f} {getattr(each, f)!r}" for f in differs) for each in (here, there))
        return AdapterMismatch(
            f"{found}: this model's A and B were made with {ours}, the adapter's with {theirs}. {load} into a model "
            "without adapters and without basis=, so that A and B are made as the file says"
        )
    same_values = basis.same_values(entry["S"], S)
    if same_values and basis.is_flat(S):
        return AdapterMismatch(
            f"{found}: the singular values of its weight are nearly equal, so that rounding decides on A and B. {load} "
            "on the device, and with the number of threads, that it was saved with, and save it with save_factors=True"
        )
    if error > DIFFERENT or not same_values:
        base = entry["base_model"]
        why = "" if same_values else ", and the singular values of the weight differ"
        trained = f"the base model {base!r}" if base else "a base model that the file does not name"
        again = ", in the dtype and the quantisation that they had then" if same_values else ""
        return AdapterMismatch(
            f"{found}{why}: this model has different weights. The adapter was trained on {trained}: load its weights"
            f"{again}"
        )
    again = "" if can_align(entry) or not keeping else f", or save the adapter from its own model with {keeping}"
    more = f"{found}, more than {ALIGNED if can_align(entry) else ACCEPT:.0e}"
    dtypes = [each and each.weight_dtype for each in (there, here)]
    if None not in dtypes and dtypes[0] != dtypes[1]:
        return AdapterMismatch(
            f"{more}: the adapter's A and B were made from weights in {dtypes[0]}, this model's from weights in "
            f"{dtypes[1]}. {load} into the model in {dtypes[0]} (and quantised, if it was), which can be converted "
            f"afterwards{again}"
        )
    if there is not None and there.rounded != here.rounded:
        ways = [f"rounded to {' and then '.join(r)}" if r else "not rounded" for r in (there.rounded, here.rounded)]
        return AdapterMismatch(
            f"{more}: the adapter's A and B were {ways[0]}, this model's were {ways[1]}. {load} into a model "
            "without adapters and without basis=, so that A and B are rounded as the file says"
        )
    how = "edited or quantised" if None not in dtypes else "edited, quantised or converted to another dtype"
    return AdapterMismatch(
        f"{more}: the weights were {how}, or one of the two models has its A and B from a state dict. Load the weights "
        f"that the adapter was trained on{again}"
    )


def check_resumed(layer: Any, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Take what a checkpoint of LoraXSCallback has of a layer beside R out of a state dict, where it is `prefix`.

    AdapterMismatch if that R was trained with other A and B than the layer's, or with another s.
    """
    expected = state_dict.pop(f"{prefix}{FINGERPRINT}", None)
    scaling = state_dict.pop(f"{prefix}{SCALING}", None)
    if scaling is not None and not scaling.equal(torch.full_like(scaling, layer.scaling)):  # in the dtype it has there
        raise AdapterMismatch(
            f"resume_from_checkpoint: alpha of {layer.label} is {layer.alpha:g}, must be "
            f"{scaling.item() * layer.rank:g}, with which its R in the checkpoint was trained"
        )
    if expected is None:  # the state dict is a whole model, with A and B
        return
    if layer.A.is_meta:
        raise ValueError(
            f"resume_from_checkpoint: A and B of {layer.label} are on the meta device, must be made before R is loaded"
        )
    fits = expected.shape == (basis.PROBES,)
    error = basis.residual(expected, layer.A, basis.mixing(layer.rank, layer.A.device), layer.B) if fits else math.inf
    limit = max(ACCEPT, torch.finfo(expected.dtype).eps)
    if error > limit:
        raise AdapterMismatch(
            f"resume_from_checkpoint: A and B of {layer.label} are not those of the checkpoint (relative error "
            f"{error:.1e}, must be at most {limit:.0e}). Attach to the same weights, with the same seed"
        )


def aligned(entry: dict[str, Any], A: Tensor, B: Tensor) -> tuple[Tensor, float]:
    """R as it is if that reproduces the delta, else the best of its alignments; and the relative error it leaves.

    entry: R (r, r), S (r,) and probe of the adapter as saved; U and V, or A and B, where R can be aligned.
    """
    return aligned_to(entry, basis.Fingerprint.of(A, B), (A, B))


def aligned_to(entry: dict[str, Any], here: basis.Fingerprint, factors: Factors | None = None) -> tuple[Tensor, float]:
    """`aligned` to the fingerprint of A and B; without A and B themselves, only turned signs are found."""
    R = entry["R"].to(here.S.device, torch.promote_types(entry["R"].dtype, torch.float32))
    candidates, errors = [R], [float(here.residual(entry["probe"], R))]
    if errors[0] > ACCEPT and basis.same_values(entry["S"], here.S):
        candidates.append(basis.flipped(R, int(here.flipped_residuals(entry["probe"], R).argmin())))
        if factors is not None and "A" in entry:
            candidates.append(basis.align_by_factors(R, (entry["A"], entry["B"]), *factors))
        elif factors is not None and "U" in entry:
            for cluster in (0.0, basis.CLUSTER):
                candidates.append(basis.align_by_sketch(R, entry["S"], (entry["U"], entry["V"]), *factors, cluster))
        errors += [float(here.residual(entry["probe"], candidate)) for candidate in candidates[1:]]
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best], errors[best]
