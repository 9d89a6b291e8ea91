"""Seat: what a bank puts on a LoraXSLinear, so that it computes with the adapters selected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linear import LoraXSLinear
from ..ops import exporting
from ..route import layer_output

if TYPE_CHECKING:
    from .adapter_bank import AdapterBank


class Seat:
    """What a bank puts on a LoraXSLinear: within a selection each sample uses the R of its own adapter.

    put_on: whether the layer is the bank's own, so that the layer's own R is no adapter.
    """

    def __init__(self, bank: AdapterBank, module: int, put_on: bool) -> None:
        self.bank, self.module, self.put_on = bank, module, put_on

    def __deepcopy__(self, memo: dict) -> Seat:
        return self

    def output(self, layer: LoraXSLinear, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """y of the layer, for the samples of the selection that this call belongs to, or by the layer's own R."""
        refuse_export()
        if torch.compiler.is_compiling():
            return _uncompiled(self, layer, x, args, kwargs)
        selection = self.bank.selections.current()
        if selection is None:
            y = layer.own_output(x, args, kwargs)
        else:
            self.refuse_merged(layer)
            if torch.jit.is_tracing():
                raise RuntimeError(
                    "torch.jit.trace: adapters are selected, which would be those of the trace for good; trace outside "
                    "of selections, with the adapter in the model itself (lx.load_adapter)"
                )
            A, B = layer._buffers["A"], layer._buffers["B"]
            index, s = selection.index(x, A.device, layer.label), self.bank.scalings[self.module]
            R, p = selection.source.table(self.module, A.device), layer.dropout if layer.training else 0.0
            y = layer_output(layer.base_layer, x, ((A, R, B, s, p),), layer.recipe.name, index, args, kwargs)
        if y.requires_grad:
            self.bank.selections.remember(y, x, selection)
        return y

    def check_merge(self, layer: LoraXSLinear) -> None:
        if self.bank.is_open():
            raise RuntimeError(
                f"{layer.label}: adapters of its bank are selected; leave bank.select(...) before merging"
            )

    def refuse_merged(self, layer: LoraXSLinear) -> None:
        if layer.merged:
            raise RuntimeError(f"{layer.label}: is merged; lx.unmerge(model) before adapters are selected")


def refuse_export() -> None:
    """RuntimeError while torch.export is at work, whose program would not follow the bank."""
    if exporting():
        raise RuntimeError(
            "torch.export: the model has a bank of adapters, whose selections no program can hold; export it after "
            "bank.detach(model), or with one adapter by lx.load_adapter"
        )


# What is selected changes from call to call: compiled code is interrupted for it.
_uncompiled = torch._disable_dynamo(Seat.output)
