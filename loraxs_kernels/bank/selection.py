"""Which adapter each sample of a batch uses, and which selection a layer that is called now belongs to."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..indexed import NONE, RowIndex
from .slots import Source

if TYPE_CHECKING:
    from .adapter_bank import AdapterBank


class Selection(AbstractContextManager):
    """Which adapter each sample of a batch uses, for the calls inside the block; made by `AdapterBank.select`.

    Each thread makes its own.  Backward passes may run after the block has ended.
    """

    def __init__(
        self, bank: AdapterBank, source: Source, names: tuple[str | None, ...], tokens: list[int] | None, fixed: bool
    ) -> None:
        self.bank, self.source, self.names, self.fixed = bank, source, names, fixed
        self._tokens = tokens
        self._places: dict[str, int] = {}
        self._state: Any = None  # of the source, when they were brought
        self._indices: dict[torch.device, RowIndex] = {}
        self._leave: Callable[[], None] | None = None
        self.task = -1  # the backward pass in which it was opened
        self.batch: tuple[int, int] | None = None  # samples and rows of each in the call of the model that runs
        self.ahead = 0  # of its graphs: how many layers no backward pass has been through
        self.factor = 1  # by how much `generate` repeats each sample

    def __enter__(self) -> Selection:
        return self.open(nested=False)

    def __exit__(self, *_: Any) -> None:
        self.close()

    def open(self, nested: bool) -> Selection:
        """nested: whether another selection may be open in this thread."""
        if self._leave is not None:
            raise RuntimeError("select: this selection is open already; make one for each block and thread")
        self.task = torch._C._current_graph_task_id()
        if (source := self.bank.source_of(self.names)) is not self.source:  # a training began or ended since
            self.source, self._places, self._indices = source, {}, {}
        self._leave = self.bank.selections.enter(self, nested)
        return self

    def close(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    @property
    def entered(self) -> bool:
        return self._leave is not None

    @property
    def samples(self) -> int | None:
        """How many there are; None: the rows are given one by one."""
        return len(self.names) if self._tokens is None else None

    @property
    def mixed(self) -> bool:
        """Whether different samples use different adapters, or some use none."""
        return len(set(self.names if self._tokens is None else (self.names[i] for i in self._tokens))) > 1

    def change(self, names: Sequence[str | None]) -> None:
        """Other adapters for the same samples, in the same tensors, so that a recorded CUDA graph follows.

        Only with `fixed=True`, and while the block is open.
        """
        if not (self.fixed and self.entered and self._tokens is None):
            raise RuntimeError("select: change() needs a selection made with fixed=True, by sample, that is open")
        names = checked(names)
        if len(names) != len(self.names):
            raise ValueError(f"names: got {len(names)}, must be {len(self.names)} as before")
        with self.bank.selections.lock:
            before = self.names
            self.release()
            try:
                self.names = names
                self._bring()
            except BaseException:
                self.names = before
                self._bring()
                raise
            finally:
                for index in self._indices.values():
                    index.change(self._numbers())

    def bring(self) -> None:
        self.bank.refuse_merged()
        before = self._places
        self._bring()
        if before != self._places:
            self._indices = {}

    def _bring(self) -> None:
        self._places = self.source.bring(_adapters(self.names))
        self._state = self.source.state(_adapters(self.names))

    def release(self) -> None:
        self.source.release(_adapters(self.names))

    def can_be_used_again(self) -> bool:
        """Whether the adapters are still where and what they were in the block, which may have ended."""
        return self.source.state(_adapters(self.names)) == self._state

    def _numbers(self) -> list[int]:
        by_name = [NONE if name is None else self._places[name] for name in self.names]
        return by_name if self._tokens is None else [by_name[i] for i in self._tokens]

    def index(self, x: Tensor, device: torch.device, label: str) -> RowIndex:
        """The index of the rows of x (..., K); ValueError, naming the layer, where they cannot be told apart."""
        if device not in self._indices:
            numbers = self._numbers()
            numbers = numbers if self.mixed or self.fixed else numbers[:1]
            self._indices[device] = RowIndex(numbers, self.source.n, device, fixed=self.fixed)
        index, rows = self._indices[device], math.prod(x.shape[:-1])
        if len(index) == 1:  # all samples use the same
            return index
        samples, (batch, length) = len(index), self.batch or (len(index), 1)
        if self._tokens is not None:
            fits = rows == samples
        elif x.dim() > 2:
            fits = x.shape[0] in (samples, batch)
        else:
            fits = rows in (samples, batch, batch * length)
        if not fits:
            what = "a row for each token" if self._tokens else "one sample in each entry of its first dimension"
            raise ValueError(
                f"{label}: got x of shape {tuple(x.shape)}, must have {what} of {samples} for different adapters. "
                "Layers that get windows, images or routed rows can use one adapter for the whole batch, or be left "
                "out of the bank (exclude_modules)"
            )
        return index

    @contextmanager
    def during(self, batch: tuple[int, int] | None, factor: int) -> Iterator[None]:
        """While the model runs on so many samples, and so many rows of each, or generates."""
        before = self.batch, self.factor
        self.batch, self.factor = batch, factor
        try:
            yield
        finally:
            self.batch, self.factor = before


def _adapters(names: Iterable[str | None]) -> list[str]:
    return [name for name in names if name is not None]


def checked(names: Sequence[str | None]) -> tuple[str | None, ...]:
    """The names as a tuple; TypeError for anything else than a list with a name or None for each sample."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or not names:
        raise TypeError(f"adapter_ids: got {names!r}, must be a list with a name or None for each sample")
    for name in names:
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"adapter_ids: got {name!r}, must be a name, or None for the base model")
    return tuple(names)


class Unselected:
    """What graphs of calls without a selection hold, in the place of one."""

    ahead = 0


class Selections:
    """The selections of a bank that are open, in all threads, and those that graphs of autograd may ask for again."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._selected: ContextVar[Selection | None] = ContextVar("selected", default=None)
        self._open: list[Selection] = []
        self._in_graphs: weakref.WeakSet[Selection | Unselected] = weakref.WeakSet()

    def any_open(self) -> bool:
        """Whether a selection is open, in any thread."""
        return bool(self._open)

    def enter(self, selection: Selection, nested: bool) -> Callable[[], None]:
        """Open a selection in this thread; returns what closes it."""
        before = self._selected.get()
        if not nested and before is not None and before.entered:
            raise RuntimeError("select: a block is open in this thread; leave it, or give the call its adapter_ids")
        with self.lock:
            selection.bring()
            self._open.append(selection)
        token = self._selected.set(selection)

        def leave() -> None:
            with suppress(ValueError):  # in another context, as of an asyncio task that closes a generator
                self._selected.reset(token)
            with self.lock:
                self._open.remove(selection)
                selection.release()

        return leave

    def current(self) -> Selection | None:
        """The selection that a layer called now belongs to; None: there is none."""
        selection, task = self._selected.get(), torch._C._current_graph_task_id()
        if task != -1 and (selection is None or selection.task != task):
            return self._of_recomputation()
        if selection is not None:
            if not selection.entered:
                raise RuntimeError(
                    "select: the block that this task was started in has ended; give the call its adapter_ids"
                )
            return selection
        if self._open:
            raise RuntimeError(
                "adapter_ids: adapters of this bank are selected in another thread or task, and none in this one; give "
                "the call its adapter_ids, a list with None for each sample of the base model"
            )
        return None

    def remember(self, y: Tensor, selection: Selection | None) -> None:
        """Note that y's graph used the selection, or none: gradient checkpointing may call its layers again."""
        if torch._C._current_graph_task_id() != -1:
            return
        with self.lock:
            used = selection or next((u for u in self._in_graphs if isinstance(u, Unselected)), None) or Unselected()
            used.ahead += 1
            self._in_graphs.add(used)

        def passed(*_: Any) -> None:  # holds `used` as long as the graph is there
            if getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", bool)():  # for another backward pass
                return
            with self.lock:
                used.ahead -= 1
                if not used.ahead:
                    self._in_graphs.discard(used)

        y.grad_fn.register_hook(passed)

    def _of_recomputation(self) -> Selection | None:
        """The selection of a layer that is called by a backward pass, in whichever thread that runs."""
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            raise RuntimeError(
                "gradient checkpointing: a backward pass calls a layer again and does not know which adapters its "
                "forward pass had, as with use_reentrant=True; must be use_reentrant=False"
            )
        found = list(self._in_graphs)
        if len(found) != 1:
            raise RuntimeError(
                "gradient checkpointing: a backward pass calls a layer again, and "
                f"there are graphs of {len(found)} selections, must be of only one: run the backward pass of each call "
                "before the next call, and keep no loss or output of an earlier call"
            )
        if isinstance(found[0], Unselected):
            return None
        if not found[0].can_be_used_again():
            raise RuntimeError(
                "gradient checkpointing: the slots of the batch's adapters hold different ones by now; run the "
                "backward pass inside the block of bank.select(...)"
            )
        return found[0]
