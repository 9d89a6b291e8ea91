"""AdapterBank: very many adapters on one base model, mixed in one batch.

A and B depend on the base model alone, so samples that use different adapters share every large product; only the
r x r matrix between A and B is a sample's own (indexed.py).  The adapters lie in a folder (store.py).  A model has
a table of a few of them on its device, into which those of a batch are copied when they are not there (slots.py).
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import adapter_file
from ..factors import WORKSPACE, WORKSPACE_IN_BYTES, compute_options
from ..linear import LoraXSLinear
from ..matching import adapted_layers, embeddings, has_adapters, unwrapped, why_not_mixed
from ..model import detach
from ..naming import aliases
from ..sharding import assign, whole
from ..transaction import keep, transaction
from .calls import MEDIA, Attached, turn, with_adapter_ids
from .seat import Seat
from .selection import Selection, Selections, checked
from .slots import Slots, Source
from .store import Store
from .training import Training

M = TypeVar("M", bound=nn.Module)


class AdapterBank(Store):
    """A folder of adapters by name for one base model; a batch may mix any of them.

        bank = lx.AdapterBank.create("bank", model)         # a model with adapters from lx.attach
        bank.add("alice", "alice.safetensors")

        bank = lx.AdapterBank("bank")
        bank.attach(base_model, slots=64)
        base_model(input_ids, adapter_ids=["alice", None, "bob"])     # None: the base model

    path, mode, and the methods that add, remove and read adapters, are those of `Store`.
    """

    def __init__(self, path: str | os.PathLike, mode: str = "r") -> None:
        super().__init__(path, mode)
        self.scalings = [self.alphas[name] / rank for name, rank in self.modules]
        self._slots: Slots | None = None
        self._training: Training | None = None
        self._models: weakref.WeakKeyDictionary[nn.Module, list[LoraXSLinear]] = weakref.WeakKeyDictionary()
        self.selections = Selections()

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
                modules_to_save of a base model get the bank's values; a model with adapters must have these already.
            slots: how many adapters a device holds at a time, at least as many as there are different ones in a
                batch; a slot takes 4 bytes for each element of R.  A bank has the same number of slots on all its
                models.
            basis, device, workspace_gib, progress: as in `load_adapter`.

        Returns:
            `model`.  Its call takes `adapter_ids`, a list with one name for each sample (None: the base model), and so
            do its methods with **kwargs, such as get_text_features, and `generate` of transformers' models, with one
            name for each prompt.  Without `adapter_ids`, and outside of `select`, the model computes as before: as the
            base model, or with the adapters that it had.  But the modules_to_save of a base model, such as a head of
            its own, are the bank's from here on, after `detach`, too.

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
        put_on = not has_adapters(model)
        if basis is not None and not put_on:
            raise ValueError("basis: got a file for a model that has adapters already, A and B included; must be None")
        compute = compute_options(device, workspace_gib, progress)
        adapter_file.check_shared(model, self.entries, self.path)
        with transaction(model) as undo:
            trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
            if put_on:
                with adapter_file.naming_file(self.path):
                    adapter_file.attach_as(model, self.entries, self.modules_to_save, basis, **compute)
            layers = dict(adapted_layers(model))
            if name := next((name for name, layer in layers.items() if layer.A.is_meta), None):
                raise ValueError(
                    f"model: module {name!r} is on the meta device, must be in memory: load the weights first"
                )
            self.check_basis(layers)
            with adapter_file.naming_file(self.path):
                values = adapter_file.saved_values(model, self.modules_to_save, self.saved)
            if put_on:
                keep(undo, [target for target, _ in values])
                for target, value in values:
                    assign(target, value)
                for layer in layers.values():
                    layer.R.zero_()
            elif not all(torch.equal(whole(target).cpu(), value.to(target.dtype)) for target, value in values):
                raise ValueError(
                    f"model: its modules_to_save ({', '.join(self.modules_to_save)}) have other values than the "
                    "bank's, which all adapters of the bank share; attach the bank to the base model, or load them"
                )
            for module, (name, _) in enumerate(self.modules):
                layers[name].seat = Seat(self, module, put_on)
            seated = {id(layer) for layer in layers.values()}
            parts = [
                part
                for part in model.modules()
                if part is not model
                and hasattr(part, "base_model_prefix")  # a transformers model, which may be called by itself
                and any(id(m) in seated for m in part.modules())
            ]
            decoder = None
            with suppress(AttributeError, NotImplementedError, ValueError):  # the model has no decoder
                decoder = model.get_decoder()
                if any(map(MEDIA.search, inspect.signature(decoder.forward).parameters)):  # its parts for media, too
                    decoder = getattr(decoder, "layers", None)
            inside = {id(m) for m in decoder.modules()} if decoder is not None else set()
            inside.add(id(embeddings(model, "output")))  # its input is the decoder's output
            beside = next((name for name, layer in layers.items() if id(layer) not in inside), None)
            told = {"put_on": put_on, "trained": trained, "unmixed": why_not_mixed(model), "beside": beside}
            for part in [*parts, model]:
                turn(part, with_adapter_ids(type(part)), undo)
                part.loraxs_bank = Attached(self, whole=part is model, **told)
            model.requires_grad_(False)
            if not len(self._models):
                self._slots = Slots(self, slots)
            undo.callback(self._models.pop, model, None)
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
            self.know(model)
            undo.callback(self._models.__setitem__, model, self._models[model])
            del self._models[model]
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
                p.requires_grad_(p.requires_grad or name in attached.trained)
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
        names = checked(names)
        if fixed and self._training is not None:
            raise ValueError(
                "fixed: got True while adapters train, must be False: a CUDA graph cannot replay training steps"
            )
        if not len(self._models):
            raise RuntimeError(
                "select: the bank is on no model; bank.attach(model) puts it there (a copy of such a model counts from "
                "its first call)"
            )
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
            names = (*names, None)  # -1 means the last one
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

        Returns a `Training`.  While it is open, selections of these names and of None use the Parameters.  Other names
        in the same batch are a ValueError; a batch without these names uses the bank's records.
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

    def is_open(self) -> bool:
        """Whether adapters are selected, in any thread."""
        return self.selections.any_open()

    # What the layers and the model's call ask.

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
        """The devices of the layers that the bank is on."""
        devices = {layer.A.device for layers in self._models.values() for layer in layers}
        if torch.device("meta") in devices:
            raise RuntimeError("model: has adapted layers on the meta device (offloaded, or without weights)")
        return devices

    def refuse_merged(self) -> None:
        """Raise a RuntimeError if a layer that the bank is on is merged."""
        for layers in self._models.values():
            for layer in layers:
                layer.seat.refuse_merged(layer)
