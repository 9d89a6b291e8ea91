"""What may be added up by LoraXSModel.add_weighted_adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...naming import label_of
from ...recipe import is_number
from .mixed import alike

if TYPE_CHECKING:
    from .tuner import LoraXSModel


def check_sum(model: LoraXSModel, names: list[str], weights: Sequence[float], new: str, kind: str) -> None:
    """Raise a ValueError if these adapters have no exact weighted sum, or if the model already has one named `new`."""
    if kind != "linear":
        raise ValueError(f'combination_type: got {kind!r}, must be "linear", which is exact for LoRA-XS')
    if not names or len(weights) != len(names) or not all(map(is_number, weights)):
        raise ValueError(f"weights: got {weights!r}, must be a finite number for each of the adapters {names}")
    if new in model.peft_config:
        raise ValueError(f"adapter_name: got {new!r}, which the model has already; must be a new name")
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"adapters: got {name!r}, must be names among {', '.join(model.peft_config)}")
        if saved := model.peft_config[name].modules_to_save:
            raise ValueError(f"adapters: {name!r} has modules_to_save ({', '.join(saved)}), which have no such sum")
    for layer in model._layers():
        there = [name for name in names if name in layer.r]
        if there and (there != names or len(alike(layer, names)) > 1):
            raise ValueError(
                f"adapters: {', '.join(names)} do not all have the same A and B in "
                f"{label_of(layer.recipe[there[0]].name)}; must be adapters of the same modules, with the same rank, "
                "init and svd_seed"
            )
