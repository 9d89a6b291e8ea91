"""How the layers of the PEFT method hold A, B and the fingerprints of several adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ...padded import PaddedB


class Buffers(BufferDict):
    """PEFT's BufferDict, except that each entry has its own `persistent`, which setting a new tensor keeps."""

    def __setitem__(self, name: str, t: Tensor) -> None:
        self._buffers[name] = t


class PaddedBuffers(PaddedB, Buffers):
    """The B of each adapter."""

    def _names_of_B(self) -> Iterable[str]:
        return list(self._buffers)

    def __setitem__(self, name: str, t: Tensor) -> None:
        super().__setitem__(name, t)
        self._pad()


class Fingerprints(Buffers):
    """Fingerprints by adapter.  Assigning one as an attribute adds its adapter's name to the layer's `unchecked`.

    That is how transformers loads every tensor, and torch with assign=True.  Any other attribute kept here needs a name
    that no adapter can have: __unchecked is one, because Python spells it _Fingerprints__unchecked.
    """

    def __init__(self, unchecked: set[str]) -> None:
        super().__init__()
        self.__unchecked = unchecked

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.__unchecked.discard(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self.__unchecked.add(name)
