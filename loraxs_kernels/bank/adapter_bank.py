"""AdapterBank: very many adapters on one base model, mixed in one batch.

A and B depend on the base model alone, so samples that use different adapters share every large product; only the
r x r matrix between A and B is a sample's own (indexed.py).  The adapters lie in a folder (store.py).  A model has
a table of a few of them on its device, into which those of a batch are copied when they are not there (layers.py).
"""

from __future__ import annotations

import inspect
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import adapter_file
from ..factors import WORKSPACE, WORKSPACE_IN_BYTES, compute_devices, workspace_bytes
from ..linear import LoraXSLinear
from ..model import adapted_layers, detach, unwrapped
from ..naming import aliases
from ..sharding import assign
from ..transaction import keep, transaction
from .layers import BATCHED, Seat, Selection, Slots, Source, Use, batch_of, turn, why_not_mixed, with_adapter_ids
from .store import Store
from .training import Training

M = TypeVar("M", bound=nn.Module)
# In the names of a model's arguments of which a sample may have any number.
MEDIA = re.compile("pixel|patches|input_features|input_values|audio_|^image$")


@dataclass(frozen=True)
class Attached:
    """What `attach` leaves on a model, as `model.loraxs_bank`."""

    bank: AdapterBank
    whole: bool  # whether this is the model, and not a transformers model inside of it
    put_on: bool  # whether the layers are the bank's own
    trained: tuple[str, ...]  # parameters that required a gradient before
    unmixed: str | None  # why the samples of a batch cannot have different adapters
    beside: str | None  # a module of the bank that is no part of the text decoder, where there is one


class Unselected:
    """What graphs of calls without a selection hold, in the place of one."""

    ahead = 0


_banks: weakref.WeakSet[AdapterBank] = weakref.WeakSet()
_held: list[AdapterBank] = []  # while a process forks


@cache
def _follow_forks() -> None:
    """Let no fork come while adapters are brought.  It must be told after LMDB's part, to run before that."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    banks = sorted(_banks, key=id)
    for bank in banks:
        bank._lock.acquire()
    _held[:] = banks


def _after_fork() -> None:
    while _held:
        _held.pop()._lock.release()


def _after_fork_in_child() -> None:
    """The threads that had the other selections open are not there."""
    while _held:
        bank = _held.pop()
        bank._lock = threading.RLock()
        gone = [selection for selection in bank._open if selection.thread != threading.get_ident()]
        for selection in gone:
            bank._open.remove(selection)
            with suppress(RuntimeError):  # of CUDA, which no child can use
                selection.release()


class AdapterBank(Store):
    """A folder of adapters by name for one base model; a batch may mix any of them.

        bank = lx.AdapterBank.create("bank", model)         # a model with adapters from lx.attach
        bank.add("alice", "alice.safetensors")

        bank = lx.AdapterBank("bank")
        bank.attach(base_model, slots=64)
        base_model(input_ids, adapter_ids=["alice", None, "bob"])     # None: the base model

    The methods that add, remove and read adapters are those of `Store`.
    """

    def __init__(self, path: str | os.PathLike, mode: str = "r") -> None:
        super().__init__(path, mode)
        self.scalings = [self.alphas[name] / rank for name, rank in self.modules]
        self._lock = threading.RLock()
        self._slots: Slots | None = None
        self._training: Training | None = None
        self._models: weakref.WeakKeyDictionary[nn.Module, list[LoraXSLinear]] = weakref.WeakKeyDictionary()
        self._selected: ContextVar[Selection | None] = ContextVar("selected", default=None)
        self._open: list[Selection] = []  # in all threads
        self._in_graphs: weakref.WeakSet[Use | Unselected] = weakref.WeakSet()
        _follow_forks()
        _banks.add(self)

    def __deepcopy__(self, memo: dict) -> AdapterBank:
        return self  # for a copy of a model that has the bank

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("AdapterBank: cannot be pickled, nor can a model that has one; bank.detach(model) first")

    @aliases(workspace=WORKSPACE_IN_BYTES)
    @torch.no_grad()
    def attach(
        self,
        model: M,
        slots: int = 64,
        *,
        basis: str | os.PathLike | None = None,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        workspace_gib: float = WORKSPACE / 2**30,
        progress: bool = True,
    ) -> M:
        """Put the bank's layers on a model, in place, and freeze all of it.

        Args:
            model: the base model, or a model that already has adapters for the same modules and ranks.  A and B are
                made by the bank's recipe and checked against its fingerprint, once for all adapters.  The
                modules_to_save of a base model get the bank's values.
            slots: how many adapters a device holds at a time, at least as many as there are different ones in a
                batch; a slot takes 4 bytes for each element of R.  A bank has the same number of slots on all its
                models.
            basis, device, workspace_gib, progress: as in `load_adapter`.

        Returns:
            `model`.  Its call takes `adapter_ids`, a list with one name for each sample (None: the base model), and so
            does `generate` of transformers' models, with one name for each prompt.  Without `adapter_ids`, and outside
            of `select`, the model computes as before: as the base model, or with the adapters that it had.  But the
            modules_to_save of a base model, such as a head of its own, are the bank's from here on, after `detach`,
            too.

        Raises:
            TypeError, ValueError: an argument or a module is wrong, or the model has a bank already.
            AdapterMismatch: A and B of this model are not the bank's.
        After an error the model is as it was.
        """
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ValueError(f"slots: got {slots!r}, must be an integer of at least 1")
        given, model = model, unwrapped(model)
        if any("loraxs_bank" in m.__dict__ for m in model.modules()):
            raise ValueError("model: has a bank already; detach(model) of that bank takes it off")
        if self._training is not None:
            raise RuntimeError("model: adapters of this bank train on another one; close() the training first")
        if len(self._models) and self._slots.n != slots:
            raise ValueError(f"slots: got {slots}, must be {self._slots.n} as on the model that has this bank already")
        put_on = not any(isinstance(m, LoraXSLinear) for m in model.modules())
        if basis is not None and not put_on:
            raise ValueError("basis: got a file for a model that has adapters already, A and B included; must be None")
        devices, workspace = None if device is None else compute_devices(device), workspace_bytes(workspace_gib)
        with transaction(model) as undo:
            trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
            if put_on:
                with adapter_file.named(self.path):
                    how = {"devices": devices, "workspace": workspace, "progress": progress}
                    adapter_file.attach_as(model, self.entries, self.modules_to_save, basis, how)
            layers = dict(adapted_layers(model))
            if name := next((name for name, layer in layers.items() if layer.A.is_meta), None):
                raise ValueError(
                    f"model: module {name!r} is on the meta device, must be in memory: load the weights first"
                )
            self.check_basis(layers)
            if put_on:
                with adapter_file.named(self.path):
                    values = adapter_file.saved_values(model, self.modules_to_save, self.saved)
                keep(undo, [target for target, _ in values])
                for target, value in values:
                    assign(target, value)
                for layer in layers.values():
                    layer.R.zero_()
            for module, (name, _) in enumerate(self.modules):
                layers[name].seat = Seat(self, module, put_on)
            seated = {id(layer) for layer in layers.values()}
            parts = [
                part
                for part in model.modules()
                if part is not model
                and hasattr(part, "base_model_prefix")  # of transformers, which may be called by itself
                and any(id(m) in seated for m in part.modules())
            ]
            decoder = None
            with suppress(AttributeError, NotImplementedError, ValueError):  # of models that have none
                decoder = model.get_decoder()
                if any(map(MEDIA.search, inspect.signature(decoder.forward).parameters)):  # its parts for media, too
                    decoder = getattr(decoder, "layers", None)
            inside = set() if decoder is None else {id(m) for m in decoder.modules()}
            beside = next((name for name, layer in layers.items() if id(layer) not in inside), None)
            told = put_on, trained, why_not_mixed(model), beside
            for part in [*parts, model]:
                turn(part, with_adapter_ids(type(part)), undo)
                part.loraxs_bank = Attached(self, part is model, *told)
            model.requires_grad_(False)
        if not len(self._models):
            self._slots = Slots(self, slots)
        self.know(model)
        return given

    def detach(self, model: M) -> M:
        """Take the bank and the layers that it put on a model off again, in place; what trained before trains again.

        The modules_to_save keep the bank's values.
        """
        given, model = model, unwrapped(model)
        attached = model.__dict__.get("loraxs_bank")
        if attached is None or attached.bank is not self or not attached.whole:
            raise ValueError("model: does not have this bank")
        if self.is_open():
            raise RuntimeError("model: adapters of its bank are selected; leave bank.select(...) first")
        if self._training is not None:
            raise RuntimeError("model: adapters of its bank train; close() the training first")
        if any(layer.merged for _, layer in adapted_layers(model)):
            raise ValueError("model: is merged; lx.unmerge(model) before bank.detach")
        with transaction(model) as undo:
            for part in model.modules():
                if "loraxs_bank" in part.__dict__:
                    before = type(part).__mro__[1]
                    if type(part) is not with_adapter_ids(before):
                        raise ValueError(f"model: the class of a {type(part).__name__} was changed after bank.attach")
                    turn(part, before, undo)
                    del part.loraxs_bank
            for _, layer in adapted_layers(model):
                del layer.seat
            if attached.put_on:
                detach(model)
            for name, p in model.named_parameters():
                p.requires_grad_(name in attached.trained)
        self._models.pop(model, None)
        return given

    def select(
        self, names: Sequence[str | None], *, tokens: Sequence[int] | Tensor | None = None, fixed: bool = False
    ) -> Selection:
        """Select the adapters of the samples in a batch, for the calls of the model inside a `with` block.

            with bank.select(["alice", None, "bob"]):
                model(input_ids)                        # three samples; None: the base model

        Args:
            names: one for each sample, None for the base model.  With `tokens`: the names that its numbers refer to.
            tokens: for packed sequences, the name of each row of x, as an index into `names`; -1: the base model.
            fixed: all shapes depend only on the batch, not on the names.  So a CUDA graph that is recorded in the block
                can be replayed for other names, after `change(names)` of the object that `with` returns.

        A block is for the thread, or asyncio task, that opened it.  A thread that is started inside does not inherit
        it, and a generator must not yield inside it: there, pass `adapter_ids` to each call.  Inside a block, the
        `adapter_ids` of a call take precedence over the block's names.

        Raises:
            KeyError: the bank does not have one of the names; nothing has run.
            ValueError: there are more different names than slots, or an entry of tokens is not an index into names.
            RuntimeError: the bank is on no model, the model is merged, or a block is open in this thread already.
        """
        names = self._names(names)
        if fixed and self._training is not None:
            raise ValueError(
                "fixed: got True while adapters train, must be False: a CUDA graph cannot replay training steps"
            )
        if not len(self._models):
            raise RuntimeError("select: the bank is on no model; bank.attach(model) puts it there")
        source = self.source_of(names)
        if source is self._slots:
            self.digests([name for name in names if name is not None])
        if tokens is not None:
            tokens = (tokens.reshape(-1) if isinstance(tokens, Tensor) else torch.as_tensor(tokens)).tolist()
            wrong = [i for i in tokens if isinstance(i, bool) or not isinstance(i, int) or not -1 <= i < len(names)]
            if wrong or not tokens:
                found = repr(wrong[0]) if wrong else "none"
                raise ValueError(
                    f"tokens: got {found}, must be -1 (the base model) to {len(names) - 1}, one for each row"
                )
            names = (*names, None)  # which -1 means
        return Selection(self, source, names, tokens, fixed)

    def train(self, names: Sequence[str], *, create: bool = False) -> Training:
        """Train these adapters together, with Parameters for their R in the place of the slots, until `close`.

            with bank.train(["alice", "bob"]) as training:
                optimizer = training.optimizer(lr=1e-3)
                loss = model(**batch, adapter_ids=[...]).loss
                loss.backward(); optimizer.step(); optimizer.zero_grad()
                training.commit()

        Args:
            names: of the adapters.
            create: a name that the bank does not have begins with an R as `lx.attach` draws it; if False, such a name
                is a KeyError.

        Returns a `Training`.  While it is open, selections of these names and of None use the Parameters; other names
        are a ValueError.
        """
        if self.mode != "a":
            raise ValueError(f"names: the bank {self.path} was opened with mode {self.mode!r}, must be 'a' to train")
        if self._training is not None:
            raise RuntimeError("train: adapters of this bank train already; close() that first")
        listed = [] if isinstance(names, (str, bytes)) else list(names)
        if not listed or not all(isinstance(name, str) for name in listed) or len({*listed}) != len(listed):
            raise ValueError(f"names: got {names!r}, must be a list of different names")
        for name in listed:
            self.check_name(name)
        if any(layer.shares is not None for layers in self._models.values() for layer in layers):
            raise RuntimeError(
                "model: is sharded by FSDP2, so that each rank has different samples and adapters; to train, a bank "
                "must be on a model of one process or of tensor parallelism"
            )
        if len(self._models) != 1:
            raise RuntimeError(
                f"train: the bank is on {len(self._models)} models (copies that were called count), must be on one; "
                "detach it from the others"
            )
        if self.is_open():
            raise RuntimeError("train: adapters of this bank are selected; leave bank.select(...) first")
        (layers,) = self._models.values()
        self._training = Training(self, layers, listed, create)
        return self._training

    def _end(self, training: Training) -> None:
        if self._training is training:
            self._training = None

    # What the layers and the model's call ask.

    def _names(self, names: Sequence[str | None]) -> tuple[str | None, ...]:
        if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or not names:
            raise TypeError(f"adapter_ids: got {names!r}, must be a list with a name or None for each sample")
        for name in names:
            if not (name is None or isinstance(name, str)):
                raise TypeError(f"adapter_ids: got {name!r}, must be a name, or None for the base model")
        return tuple(names)

    def source_of(self, names: Sequence[str | None]) -> Source:
        """Where a selection of these names finds its R now."""
        return self._slots if self._training is None else self._training.source_of(names, self._slots)

    def know(self, model: nn.Module) -> None:
        """Count a model as one that has this bank: after `attach`, and when a copy of such a model is called."""
        if model not in self._models:
            self._models[model] = sorted(
                (layer for _, layer in adapted_layers(model)), key=lambda layer: layer.seat.module
            )

    def devices(self) -> set[torch.device]:
        """Of the layers that the bank is on."""
        devices = {layer.A.device for layers in self._models.values() for layer in layers}
        if torch.device("meta") in devices:
            raise RuntimeError("model: has adapted layers on the meta device (offloaded, or without weights)")
        return devices

    def is_open(self) -> bool:
        """Whether a selection is open, in any thread."""
        return bool(self._open)

    def enter(self, selection: Selection, nested: bool) -> Callable[[], None]:
        """Open a selection in this thread; returns what closes it."""
        before = self._selected.get()
        if not nested and before is not None and before.entered:
            raise RuntimeError("select: a block is open in this thread; leave it, or give the call its adapter_ids")
        with self._lock:
            for layers in self._models.values():
                for layer in layers:
                    layer.seat.refuse_merged(layer)
            selection.bring()
            self._open.append(selection)
        token = self._selected.set(selection)

        def leave() -> None:
            with suppress(ValueError):  # in another context, as of an asyncio task that closes a generator
                self._selected.reset(token)
            with self._lock:
                self._open.remove(selection)
                selection.release()

        return leave

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

    def remember(self, y: Tensor, selection: Selection | None) -> None:
        """That a graph is there in which the selection, or none, was used: gradient checkpointing may need it again."""
        if torch._C._current_graph_task_id() != -1:
            return
        with self._lock:
            unselected = (u for u in self._in_graphs if isinstance(u, Unselected))
            used = next(unselected, None) or Unselected() if selection is None else selection.use
            used.ahead += 1
            self._in_graphs.add(used)

        def passed(*_: Any) -> None:  # holds `used` as long as the graph is there
            if getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", bool)():  # for another backward pass
                return
            with self._lock:
                used.ahead -= 1
                if not used.ahead:
                    self._in_graphs.discard(used)

        y.grad_fn.register_hook(passed)

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
        if not found[0].is_current():
            raise RuntimeError(
                "gradient checkpointing: the slots of the batch's adapters hold different ones by now; run the "
                "backward pass inside the block of bank.select(...), and before change(...)"
            )
        return found[0].selection

    @contextmanager
    def calling(
        self, model: nn.Module, names: Sequence[str | None] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Around a call of the model, or of a transformers model inside of it."""
        attached = model.loraxs_bank
        if attached.whole:
            self.know(model)
        with self._selecting(names):
            selection = self.current()
            if selection is None:
                yield
                return
            batch, samples = batch_of(args, kwargs), selection.samples
            if selection.mixed:
                if attached.unmixed is not None:
                    raise ValueError(f"adapter_ids: got different adapters for one batch, and {attached.unmixed}")
                given = {**kwargs}
                if attached.beside and args:
                    given |= dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
                has = {name for name, value in given.items() if not (value is None or isinstance(value, bool))}
                if attached.beside and any(map(MEDIA.search, has)) and has & {"input_ids", "inputs_embeds"}:
                    raise ValueError(
                        "adapter_ids: got different adapters for one batch with images or sounds, and module "
                        f"{attached.beside!r} is not in the text decoder, so that its rows cannot be told apart by "
                        "sample; leave it out of the bank (exclude_modules), or use one adapter for the batch"
                    )
            expected = (samples, samples and samples * selection.factor)
            told = batch is not None and samples is not None and (attached.whole or selection.mixed)
            if told and batch[0] not in expected:
                raise ValueError(
                    f"adapter_ids: got {samples} names for a batch of {batch[0]} samples, must be one for each"
                )
            with selection.during(batch, selection.factor):
                yield

    @contextmanager
    def generating(
        self, names: Sequence[str | None] | None, args: Sequence[Any], kwargs: Mapping[str, Any], standard: bool
    ) -> Iterator[None]:
        """Around `generate`, which calls the model on each sample as often as there are beams or sequences.

        standard: whether it is the one of transformers that all models share.
        """
        with self._selecting(names):
            selection = self.current()
            if selection is None:
                yield
                return
            if selection.mixed and not (standard and kwargs.get("custom_generate") is None):
                raise ValueError(
                    "adapter_ids: got different adapters for one batch, must be the same for all samples: "
                    "custom_generate, or a generate that is the model's own, may change the order of the samples"
                )
            prompts = kwargs.get("inputs", args[0] if args else None)
            prompts = batch_of([] if prompts is None else [prompts], {k: kwargs[k] for k in BATCHED if k in kwargs})
            if prompts is not None and selection.samples not in (None, prompts[0]):
                raise ValueError(
                    f"adapter_ids: got {selection.samples} names for {prompts[0]} prompts, must be one for each"
                )
            with selection.during(None, 1):
                yield

    def expanding(self, factor: int) -> None:
        """That `generate` repeats each sample so many times from here on, the copies side by side."""
        if (selection := self.current()) is not None:
            selection.factor = factor

    @contextmanager
    def _selecting(self, names: Sequence[str | None] | None) -> Iterator[None]:
        if names is None:
            yield
            return
        selection = self.select(names).open(nested=True)
        try:
            yield
        finally:
            selection.close()
