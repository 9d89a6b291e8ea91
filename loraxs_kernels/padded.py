"""What moving and copying leave as it was in a layer: B in padded rows (padding.py), and the precision of R."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

from torch import Tensor, nn

from .padding import padded_rows


class PaddedB(nn.Module):
    """A module that keeps B, one of its buffers, in padded rows, whether B is set, moved, copied or loaded.

    A state dict holds a contiguous copy of B.
    """

    def _names_of_B(self) -> Iterable[str]:
        return self._buffers.keys() & {"B"}

    def _pad(self) -> None:
        for name in self._names_of_B():
            self._buffers[name] = padded_rows(self._buffers[name])

    # torch calls this wherever B is set as an attribute, so also where it is loaded with assign=True.
    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._pad()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PaddedB:
        super()._apply(fn, recurse)
        self._pad()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a copy or a pickle, whose storage has lost the note
        self._pad()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names_of_B():
            if (key := prefix + name) in destination:
                destination[key] = destination[key].contiguous()


def sparing_what_trains(
    fn: Callable[[Tensor], Tensor], base_layer: nn.Module, *factors: nn.Module
) -> Callable[[Tensor], Tensor]:
    """fn of nn.Module._apply, except that R keeps its precision: `.to(bf16)` only moves it to the device.

    The base layer, and the buffers of the modules `factors`, which hold A and B, are converted as fn does.
    """
    frozen = chain(base_layer.parameters(), base_layer.buffers(), *(each.buffers(recurse=False) for each in factors))
    ids = {id(t) for t in frozen}

    def moved(t: Tensor) -> Tensor:
        result = fn(t)
        rounds = result.dtype.itemsize < 4 <= t.dtype.itemsize and id(t) not in ids
        return t.to(result.device) if rounds else result

    return moved
