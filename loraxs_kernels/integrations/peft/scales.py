"""The scale s of each adapter of a layer, which users and diffusers change as they do LoRA's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...matching import pattern_value
from ...naming import label_of

if TYPE_CHECKING:
    from ...recipe import Recipe
    from .config import LoraXSConfig


class Scales:
    """What PEFT's LoraLayer has to change `scaling`, s by the adapter's name.  Adapters that are not there are skipped.

    The scale of a merged adapter takes effect when it is unmerged.
    """

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    recipe: dict[str, Recipe]
    active_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let s be `scale` times what lora_alpha says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of the active adapters by `scale`; None: let it be what lora_alpha says."""
        for name in self.active_adapters:
            if scale is None:
                self.set_scale(name, 1.0)
            elif name in self.scaling:
                self.scaling[name] /= scale

    def check_scaling(self, name: str, config: LoraXSConfig) -> None:
        """Raise a ValueError if the layer multiplies by another s than one that is made from the config would."""
        module, r = self.recipe[name].name, self.r[name]
        alpha = pattern_value(config.alpha_pattern, module, config.lora_alpha)
        s = 1.0 if alpha is None else alpha / r
        if not math.isclose(self.scaling[name], s):  # it may have been multiplied and divided
            raise ValueError(
                f"adapter {name!r}: scaling of {label_of(module)} is {self.scaling[name]}, must be {s}, as its config "
                f"(lora_alpha {config.lora_alpha}, alpha_pattern {config.alpha_pattern}) and its rank {r} say, to be "
                "saved: files hold only the config, not the scaling"
            )
