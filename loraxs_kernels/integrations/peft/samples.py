"""Batches in which each sample has an adapter of its own: what PEFT's argument adapter_names says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...indexed import NONE, RowIndex

BASE = "__base__"  # what PEFT calls the base model in adapter_names


class Samples:
    """The adapter of each sample of a batch, while a call with adapter_names runs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.adapters = [name for name in dict.fromkeys(names) if name != BASE]
        self._laid_out: dict[tuple, tuple[Tensor | None, RowIndex | None]] = {}

    def expand(self, times: int) -> None:
        """Repeat each sample's adapter, as `generate` repeats the samples for beams and returned sequences."""
        self.names = [name for name in self.names for _ in range(times)]
        self._laid_out.clear()

    def laid_out(
        self, group: tuple[str, ...], device: torch.device, whole: bool = False
    ) -> tuple[Tensor | None, RowIndex | None]:
        """The rows of the samples that use adapters of a group, and the index of the adapter that each row uses.

        With `whole` the rows are None, for all samples, and the index of a sample without an adapter of the group is
        -1.  The index is None if all these samples use the group's first adapter.
        """
        if (key := (group, device, whole)) not in self._laid_out:
            place = {name: i for i, name in enumerate(group)}
            index, rows = [place.get(name, NONE) for name in self.names], None
            if not whole:
                rows = torch.tensor([row for row, i in enumerate(index) if i != NONE], device=device)
                index = [i for i in index if i != NONE]
            self._laid_out[key] = rows, RowIndex(index, len(group), device) if any(index) else None
        return self._laid_out[key]

    def check(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise a ValueError if a model is called with another number of samples, as far as its arguments show."""
        if main := getattr(model, "main_input_name", None):
            given = [*args[:1], kwargs.get(main), kwargs.get("inputs_embeds")]
        else:
            given = [*args, *kwargs.values()]
        lengths = [len(each) for each in given if isinstance(each, Tensor) and each.dim()]
        if lengths and len(self.names) not in (lengths[:1] if main else lengths):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {lengths[0]} respectively."
            )

    def tell(self, module: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Pass the names on to one of modules_to_save; an adapter without it uses the base model's there."""
        return args, kwargs | {"adapter_names": [n if n in module._adapters else BASE for n in self.names]}


class MixedCalls:
    """The calls with adapter_names that run on a model, one in a thread."""

    def __init__(self) -> None:
        self._of_thread: dict[int, Samples] = {}
        self._lock, self._installed = RLock(), ExitStack()

    @staticmethod
    @torch.compiler.disable  # which would warn of the lock
    def of(model: nn.Module) -> MixedCalls:
        """Those of a model, in all threads."""
        return _of_model.setdefault(model, MixedCalls())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("adapter_names: a call with adapter_names runs on this model; copy or pickle it afterwards")

    @contextmanager
    def open(self, names: Sequence[str], install: Callable[[ExitStack], None]) -> Iterator[None]:
        """One call, in this thread.  `install` runs before the first of several; its stack is closed after the last."""
        thread, before = get_ident(), self._of_thread.get(get_ident())

        def end() -> None:
            if before is None:
                self._of_thread.pop(thread, None)
            else:
                self._of_thread[thread] = before
            if not self._of_thread:
                self._installed.close()

        try:
            with self._lock:
                if not self._of_thread:
                    install(self._installed)
                self._of_thread[thread] = Samples(names)
            yield
        finally:
            try:
                with self._lock: end()  # fmt: skip  # noqa: E701
            finally:  # once more, if Ctrl-C has stopped that
                with self._lock: end()  # fmt: skip  # noqa: E701

    @torch.compiler.disable
    def here(self) -> Samples:
        """The samples of the call in this thread; RuntimeError if there are only calls in others."""
        if (samples := self._of_thread.get(get_ident())) is None:
            raise RuntimeError(
                "adapter_names: a call with adapter_names runs on this model in another thread, and none in this one; "
                "give this call adapter_names, too, or wait for the other"
            )
        return samples

    def check(self, *call: Any) -> None:
        """A hook before the forward of the model."""
        self.here().check(*call)

    def tell(self, *call: Any) -> tuple[tuple, dict]:
        """A hook before the forward of one of modules_to_save."""
        return self.here().tell(*call)

    def expanded(self, expand: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Called by `generate` to repeat its inputs for beams and returned sequences, after the encoder has run."""
        inputs = expand(*args, **kwargs)
        self.here().expand(args[0] if args else kwargs.get("expand_size", 1))
        return inputs


_of_model: WeakKeyDictionary[nn.Module, MixedCalls] = WeakKeyDictionary()
