"""What merging an adapter into a layer replaces, and how unmerging puts it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .layer import LoraXSLinearLayer


class Unmerged:
    """A layer's weight before merging, and the other attributes that PEFT's backends overwrite."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.weight = layer, layer._parameters.get("weight")
        self.of_layer = dict(vars(layer))
        parts = (self.weight, getattr(layer, "state", None))  # on which bitsandbytes keeps notes, too
        self.of_parts = [(each, dict(vars(each))) for each in parts if each is not None]

    def note_changes(self) -> None:
        """Keep only those attributes that merging has changed: others, such as `training`, may change while merged."""
        now = vars(self.layer)
        self.of_layer = {key: value for key, value in self.of_layer.items() if now.get(key) is not value}

    def check(self, merged: nn.Module, label: str) -> None:
        """Move the kept weight to where the layer has been moved in the meantime; ValueError if it is not dense."""
        now = merged._parameters.get("weight")
        if self.weight is None or (self.weight.device, self.weight.dtype) == (now.device, now.dtype):
            return
        if type(self.weight) is not nn.Parameter:
            raise ValueError(
                f"{label}: got a merged weight on {now.device} in {now.dtype}, must be on {self.weight.device} in "
                f"{self.weight.dtype} as before merging: a quantised weight does not follow"
            )
        self.weight = nn.Parameter(self.weight.to(now), requires_grad=self.weight.requires_grad)

    def put_back(self, owner: LoraXSLinearLayer) -> None:
        vars(self.layer).update(self.of_layer)
        for each, before in self.of_parts:
            vars(each).clear()
            vars(each).update(before)
        if self.weight is not None:
            self.layer.weight = self.weight
        owner.base_layer = self.layer
