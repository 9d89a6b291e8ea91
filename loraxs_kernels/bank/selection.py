"""Which adapter each sample of a batch uses, and which selection a layer that is called now belongs to."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..indexed import NONE, RowIndex
from .slots import Source

if TYPE_CHECKING:
    from .adapter_bank import AdapterBank

_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 has none


class Use:
    """The adapters that a selection brought in; the graphs that are made under it hold this object."""

    def __init__(self, selection: Selection) -> None:
        self.selection, self.source, self.names = selection, selection.source, selection.names
        self.state = self.source.state(_adapters(self.names))
        self.ahead = 0  # how many layer calls in these graphs no backward pass has reached yet

    def is_current(self) -> bool:
        """Whether the selection, whose block may have ended, still has them, where and as they were."""
        has = self.selection.source, self.selection.names
        return has == (self.source, self.names) and self.source.state(_adapters(self.names)) == self.state

    def has_same(self, other: Use) -> bool:
        """Whether another selection has the same adapters, wherever they are."""
        mine, theirs = ([use.names, {name: R for name, (_, R) in use.state.items()}] for use in (self, other))
        return self.source is other.source and mine == theirs


class Selection(AbstractContextManager):
    """Which adapter each sample of a batch uses, for the calls inside the block; made by `AdapterBank.select`.

    Each thread makes its own.  Backward passes may run after the block has ended.
    """

    def __init__(
        self, bank: AdapterBank, source: Source, names: tuple[str | None, ...], tokens: list[int] | None, fixed: bool
    ) -> None:
        self.bank, self.source, self.names, self.fixed = bank, source, names, fixed
        self._tokens = tokens
        self.places: dict[str, int] = {}
        self.entered = False
        self.before: Selection | None = None  # what was selected in this thread
        self.use: Use | None = None  # while it is open; later only graphs hold it, which end with their outputs
        self._last: Callable[[], Use | None] = lambda: None
        self._indices: dict[torch.device, RowIndex] = {}
        self.task = -1  # the backward pass in which it was opened
        self.thread = 0
        self.batch: tuple[int, int] | None = None  # samples and rows of each in the call of the model that runs
        self.factor = 1  # by how much `generate` repeats each sample
        self.counted = True  # whether calls must be of as many samples; a model's own `generate` may end some of them
        self.method: str | None = None  # the method that got the names, if the samples of its calls may be in any order

    def __enter__(self) -> Selection:
        return self.open(nested=False)

    def open(self, nested: bool) -> Selection:
        """nested: whether another selection may be open in this thread."""
        if torch.compiler.is_dynamo_compiling():  # is_compiling() would be true in `_uncompiled`, too, in an export
            return _uncompiled(self, nested)
        if self.entered:
            raise RuntimeError("select: this selection is open already; make one for each block and thread")
        self.task, self.thread = torch._C._current_graph_task_id(), threading.get_ident()
        if (source := self.bank.source_of(self.names)) is not self.source:  # a training began or ended since
            self.source, self.places, self._indices = source, {}, {}
        try:
            self.bank.selections.enter(self, nested)
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: Any) -> None:
        """End it, as far as it has begun."""
        try:
            self.bank.selections.leave(self)
        except BaseException:  # Ctrl-C
            self.bank.selections.leave(self)
            raise

    close = __exit__

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
            self.places = self.source.bring(_adapters(names), self.bank.selections.used(self), changing=True)
            self.names = names
            self._used()
            for index in self._indices.values():
                index.change(self._numbers())

    def bring(self) -> None:
        self.bank.refuse_merged()
        places = self.source.bring(_adapters(self.names), self.bank.selections.used(self))
        if places != self.places:
            self._indices = {}
        self.places = places
        self._used()

    def _used(self) -> None:
        self.use = self._last()
        if self.use is None or not self.use.is_current():
            self.use = Use(self)
            self._last = weakref.ref(self.use)

    def _numbers(self) -> list[int]:
        by_name = [NONE if name is None else self.places[name] for name in self.names]
        return by_name if self._tokens is None else [by_name[i] for i in self._tokens]

    def index(self, x: Tensor, device: torch.device, label: str) -> RowIndex:
        """The index of the rows of x (..., K); ValueError, naming the layer, where they cannot be told apart."""
        if device not in self._indices:
            numbers = self._numbers()
            numbers = numbers if self.mixed or self.fixed else numbers[:1]
            self._indices[device] = RowIndex(numbers, self.source.n, device, fixed=self.fixed)
        index, rows = self._indices[device], math.prod(x.shape[:-1])
        if not rows or (len(index) == 1 and self._tokens is None):  # all samples use the same
            return index
        if self.method is not None:
            raise ValueError(
                f"adapter_ids: got different adapters for {self.method}, which has not passed them on to a call of the "
                "model, and may call it on the samples in another order; must be the same for all samples, or be "
                "passed on"
            )
        samples = len(index if self._tokens is None else self._tokens)
        batch, length = self.batch or (samples, 1)
        if self._tokens is not None:
            fits = rows == samples
        elif x.dim() > 2:
            fits = x.shape[0] in (samples, batch)
        else:
            fits = rows in (samples, batch, batch * length)
        if not fits:
            what = f"one sample in each entry of its first dimension of {samples} for different adapters"
            what = f"a row for each of {samples} tokens" if self._tokens else what
            raise ValueError(
                f"{label}: got x of shape {tuple(x.shape)}, must have {what}. "
                "Layers that get windows, images or routed rows can use one adapter for the whole batch, or be left "
                "out of the bank (exclude_modules)"
            )
        return index

    @contextmanager
    def during(self, batch: tuple[int, int] | None, factor: int, counted: bool) -> Iterator[None]:
        """While the model runs on so many samples, and so many rows of each, or generates."""
        before = self.batch, self.factor, self.counted
        self.batch, self.factor, self.counted = batch, factor, counted
        try:
            yield
        finally:
            self.batch, self.factor, self.counted = before


# Dynamo would trace how adapters are read, inside a compiled model that is called with names.
_uncompiled = torch._disable_dynamo(Selection.open)


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
        self._in_graphs: weakref.WeakSet[Use | Unselected] = weakref.WeakSet()
        _follow_forks()
        _all.add(self)

    def forget_other_threads(self) -> None:
        """In a child of fork, which has only the thread that forked."""
        self.lock = threading.RLock()
        for selection in [each for each in self._open if each.thread != threading.get_ident()]:
            self._open.remove(selection)
            selection.entered = False  # also for this thread, which may have a copy of the other's context

    def any_open(self) -> bool:
        """Whether a selection is open, in any thread."""
        return bool(self._open)

    def used(self, but: Selection) -> set[int]:
        """The places that open selections have in the source of this one, without its own."""
        others = [each for each in [*self._open] if each is not but and each.source is but.source]
        return {place for each in others for place in each.places.values()}

    def enter(self, selection: Selection, nested: bool) -> None:
        """Open a selection in this thread."""
        selection.before = self._selected.get()
        if not nested and selection.before is not None and selection.before.entered:
            raise RuntimeError("select: a block is open in this thread; leave it, or give the call its adapter_ids")
        with self.lock:
            selection.bring()
            self._open.append(selection)
            selection.entered = True
        self._selected.set(selection)

    def leave(self, selection: Selection) -> None:
        """Undo what `enter` has done, if anything."""
        if self._selected.get() is selection:  # not in another context, as when an asyncio task closes a generator
            self._selected.set(selection.before)
        with self.lock:
            selection.entered, selection.use, selection.before = False, None, None
            if selection in self._open:
                self._open.remove(selection)
                selection.source.release()

    def current(self) -> Selection | None:
        """The selection that a layer called now belongs to; None: there is none."""
        selection, task = self._selected.get(), torch._C._current_graph_task_id()
        if task != -1 and (selection is None or selection.task != task):
            return self._of_recomputation()
        if task != -1 and torch.is_grad_enabled():
            self._check_recomputed(selection)
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

    def remember(self, y: Tensor, x: Tensor, selection: Selection | None) -> None:
        """Note that the graph of a layer's y used the selection, or none: checkpointing may call its layers again."""
        if torch._C._current_graph_task_id() != -1:
            return
        with self.lock:
            unselected = (u for u in self._in_graphs if isinstance(u, Unselected))
            used = next(unselected, None) or Unselected() if selection is None else selection.use
            used.ahead += 1
            self._in_graphs.add(used)

        def passed(*_: Any) -> None:  # holds `used` as long as the graph is there
            if getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", bool)():  # another backward pass comes
                return
            with self.lock:
                used.ahead -= 1
                if not used.ahead:
                    self._in_graphs.discard(used)

        _primitive_of(y, x).register_hook(passed)

    def _check_recomputed(self, selection: Selection) -> None:
        """Refuse a selection that a backward pass has made, to compute a call again, with other adapters by now."""
        if not any(isinstance(use, Use) and use.has_same(selection.use) for use in list(self._in_graphs)):
            raise RuntimeError(
                "gradient checkpointing: a backward pass makes a call again, and no graph is there that was made with "
                f"the adapters {list(selection.names)} as they are now: they were changed in the bank since, or it is "
                "use_reentrant=True, which must be False"
            )

    def _of_recomputation(self) -> Selection | None:
        """The selection of a layer that is called by a backward pass, in whichever thread that runs."""
        if _hooks is None:
            raise RuntimeError(
                f"gradient checkpointing: torch {torch.__version__} does not tell how a layer is called again, so that "
                "a bank's model cannot be checkpointed; torch must be newer"
            )
        if _hooks(False) is None:
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
        if not found[0].is_current():
            raise RuntimeError(
                "gradient checkpointing: the slots of the batch's adapters hold different ones by now; run the "
                "backward pass inside the block of bank.select(...), and before change(...)"
            )
        return found[0].selection


def _primitive_of(y: Tensor, x: Tensor) -> Any:
    """The node of a layer's graph that asks for what the layer kept, so that it is called again before this has passed.

    Views and sums keep nothing: they pass earlier.
    """
    nodes, seen = [y.grad_fn], {x.grad_fn, None}
    for node in nodes:  # which grows
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return node
        below = dict.fromkeys(each for each, _ in node.next_functions if each not in seen)
        seen.update(below)
        nodes += below
    return y.grad_fn


_all: weakref.WeakSet[Selections] = weakref.WeakSet()
_held: list[Selections] = []  # while a process forks


@cache
def _follow_forks() -> None:
    """Let no fork come while adapters are brought in.

    Registered after the functions of environment.py, so that it runs before them: Python runs the last one first.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    every = sorted(_all, key=id)
    for each in every:
        each.lock.acquire()
    _held[:] = every


def _after_fork() -> None:
    while _held:
        _held.pop().lock.release()


def _after_fork_in_child() -> None:
    """The threads that had the other selections open are not there."""
    while _held:
        _held.pop().forget_other_threads()
