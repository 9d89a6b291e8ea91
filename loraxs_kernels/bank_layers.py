"""What a bank puts on a model: layers that compute with the adapters selected, and a call that takes `adapter_ids`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .indexed import NONE, RowIndex
from .linear import LoRAXSLinear, adapted

if TYPE_CHECKING:
    from .bank import AdapterBank

# Arguments of a model's forward with one entry of the first dimension for each sample, as transformers names them.
BATCHED = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


class Source(Protocol):
    """Where the R of selected adapters are: the slots of a bank, or those that it trains."""

    n: int
    reached: set[int] | None  # to which backward passes add the places of what they made gradients of

    def bring(self, names: Sequence[str]) -> dict[str, int]:
        """The places of these adapters, which they keep until `release`; KeyError for an unknown name."""

    def release(self, names: Sequence[str]) -> None: ...

    def holds(self, places: Mapping[str, int]) -> bool:
        """Whether these adapters are still in these places."""

    def table(self, module: int, device: torch.device) -> Tensor:
        """R of a module for all places, (n, r, r) fp32, in place: what is brought later is written into it."""


class Slots:
    """A table on each device of the model for a few adapters, into which those that are asked for are copied.

    The adapter that has not been used for longest gives its slot to one that is not there, unless it is in use.
    """

    reached = None

    def __init__(self, bank: AdapterBank, n: int) -> None:
        self.n, self.bank = n, bank
        self._there: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # slot and digest, the latest used last
        self._free = list(range(n))
        self._users: dict[str, int] = {}
        self._tables: dict[torch.device, Tensor] = {}
        self._views: dict[torch.device, list[Tensor]] = {}
        self._staged = torch.empty(0, device="cpu")
        self._events: dict[tuple[torch.device, int], torch.cuda.Event] = {}

    def bring(self, names: Sequence[str]) -> dict[str, int]:
        wanted = dict.fromkeys(names)
        digests = self.bank.digests(wanted)
        if len(wanted) > self.n:
            raise ValueError(
                f"adapter_ids: got {len(wanted)} different adapters, must be at most {self.n}, the slots of "
                "bank.attach(model, slots=...)"
            )
        self._follow(self.bank.devices())
        places = {}
        stale = [name for name in wanted if name in self._there and self._there[name][1] != digests[name]]
        for name in stale:
            if self._users.get(name):
                raise RuntimeError(f"adapter {name!r}: has changed in the bank while another selection uses it")
            self._free.append(self._there.pop(name)[0])
        idle = [name for name in self._there if name not in wanted and not self._users.get(name)]
        missing = [name for name in wanted if name not in self._there]
        if len(missing) > len(self._free) + len(idle):
            left = self.n - sum(name not in wanted for name in self._users)
            raise RuntimeError(
                f"adapter_ids: got {len(wanted)} different adapters, must be at most {left}: of {self.n} slots the "
                "others are in use by selections that are open"
            )
        for name in missing:
            if not self._free:
                self._free.append(self._there.pop(idle.pop(0))[0])
            slot = self._free[-1]
            self._copy(name, slot)
            self._there[name] = (self._free.pop(), digests[name])
        for name in wanted:
            self._there.move_to_end(name)
            places[name] = self._there[name][0]
            self._users[name] = self._users.get(name, 0) + 1
        return places

    def release(self, names: Sequence[str]) -> None:
        for name in dict.fromkeys(names):
            if self._users[name] == 1:
                del self._users[name]
            else:
                self._users[name] -= 1
        for device in self._tables:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                self._events[device, stream.cuda_stream] = stream.record_event()

    def holds(self, places: Mapping[str, int]) -> bool:
        return all(self._there.get(name, (None,))[0] == place for name, place in places.items())

    def table(self, module: int, device: torch.device) -> Tensor:
        return self._views[device][module]

    def _follow(self, devices: set[torch.device]) -> None:
        """Have tables on the devices of the model's layers, which may have moved."""
        if devices == self._tables.keys():
            return
        if self._users:
            raise RuntimeError("model: was moved to another device while adapters of its bank were selected")
        self._there.clear()
        self._free, self._events = list(range(self.n)), {}
        ranks = [rank for _, rank in self.bank.modules]
        size = sum(rank * rank for rank in ranks)
        self._tables = {device: torch.zeros(self.n, size, device=device) for device in devices}
        self._views = {device: split(table, ranks) for device, table in self._tables.items()}
        on_gpu = any(device.type == "cuda" for device in devices)
        self._staged = torch.empty(size, pin_memory=on_gpu, device="cpu")

    def _copy(self, name: str, slot: int) -> None:
        self.bank.read(name, self._staged)
        for device, table in self._tables.items():
            for (used_on, _), event in self._events.items():  # other streams may still read what is there
                if used_on == device:
                    torch.cuda.current_stream(device).wait_event(event)
            table[slot].copy_(self._staged)  # has been read when this returns


def split(table: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Records (n, sum of r^2) as a view (n, r, r) for each module."""
    parts = table.split([rank * rank for rank in ranks], dim=1)
    return [part.unflatten(1, (rank, rank)) for part, rank in zip(parts, ranks, strict=True)]


class Selection(AbstractContextManager):
    """Which adapter each sample of a batch uses, for the calls inside the block; made by `AdapterBank.select`.

    In threads each has its own.  Backward passes may run after the block has ended.
    """

    def __init__(
        self, bank: AdapterBank, source: Source, names: tuple[str | None, ...], tokens: list[int] | None, fixed: bool
    ) -> None:
        self.bank, self.source, self.names, self.fixed = bank, source, names, fixed
        self._tokens = tokens
        self._places: dict[str, int] = {}
        self._indices: dict[torch.device, RowIndex] = {}
        self._undo: list[Callable[[], None]] = []
        self.batch: tuple[int, int] | None = None  # samples and rows of each in the call of the model that runs
        self.expanding = False  # whether `generate` runs, which repeats samples

    def __enter__(self) -> Selection:
        self._undo.append(self.bank.enter(self))
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.pop()()

    @property
    def entered(self) -> bool:
        return bool(self._undo)

    @property
    def samples(self) -> int | None:
        """How many there are; None: the rows are given one by one."""
        return len(self.names) if self._tokens is None else None

    def change(self, names: Sequence[str | None]) -> None:
        """Other adapters for the same samples, in the same tensors, so that a recorded CUDA graph follows.

        Only with `fixed=True`, and while the block is open.
        """
        if not (self.fixed and self.entered and self._tokens is None):
            raise RuntimeError("select: change() needs a selection made with fixed=True, by sample, that is open")
        names = self.bank._names(names)
        if len(names) != len(self.names):
            raise ValueError(f"names: got {len(names)}, must be {len(self.names)} as before")
        with self.bank._lock:
            places = self.source.bring(_named(names))
            self.source.release(_named(self.names))
            self.names, self._places = names, places
            for index in self._indices.values():
                index.change(self._numbers())

    def bring(self) -> None:
        places = self.source.bring(_named(self.names))
        if places != self._places:
            self._places, self._indices = places, {}

    def release(self) -> None:
        self.source.release(_named(self.names))

    def can_be_used_again(self) -> bool:
        """Whether the adapters are still where they were in the block, which may have ended."""
        return self.source.holds(self._places)

    def _numbers(self) -> list[int]:
        by_name = [NONE if name is None else self._places[name] for name in self.names]
        return by_name if self._tokens is None else [by_name[i] for i in self._tokens]

    def index(self, x: Tensor, device: torch.device, label: str) -> RowIndex:
        """The index of the rows of x (..., K); ValueError, naming the layer, where they cannot be told apart."""
        if device not in self._indices:
            made = self._indices[device] = RowIndex(self._numbers(), self.source.n, device, fixed=self.fixed)
            made.reached = self.source.reached
        index, rows = self._indices[device], math.prod(x.shape[:-1])
        samples, (batch, length) = len(index), self.batch or (len(index), 1)
        if self._tokens is not None:
            fits = rows == samples
        elif x.dim() > 2:
            fits = x.shape[0] in (samples, batch)
        else:
            fits = rows in (samples, batch, batch * length)
        if not fits:
            what, must = (
                ("tokens", "a row for each")
                if self._tokens
                else ("samples", "one in each entry of its first dimension")
            )
            raise ValueError(
                f"{label}: got x of shape {tuple(x.shape)}, whose rows cannot be told to be those of {samples} {what}; "
                f"must have {must}"
            )
        return index

    def during(self, batch: tuple[int, int] | None, expanding: bool) -> AbstractContextManager[None]:
        """While the model runs on so many samples, and so many rows of each, or generates."""
        return _During(self, batch, expanding)


class _During(AbstractContextManager):
    def __init__(self, selection: Selection, batch: tuple[int, int] | None, expanding: bool) -> None:
        self.selection, self.now = selection, (batch, expanding)

    def __enter__(self) -> None:
        s = self.selection
        self.before = s.batch, s.expanding
        s.batch, s.expanding = self.now

    def __exit__(self, *_: Any) -> None:
        self.selection.batch, self.selection.expanding = self.before


def _named(names: Iterable[str | None]) -> list[str]:
    return [name for name in names if name is not None]


class BankedLinear(LoRAXSLinear):
    """A LoRAXSLinear on which a bank sits: within a selection each sample uses the R of its own adapter.

    Outside of one it computes with its own R.
    """

    seat: tuple[AdapterBank, int]  # the bank, and which of its modules this is

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _uncompiled(self, x, *args, **kwargs)
        bank, module = self.seat
        selection = bank.current()
        if selection is None:
            return super().forward(x, *args, **kwargs)
        self.refuse_merged()
        A, B = self._buffers["A"], self._buffers["B"]
        index = selection.index(x, A.device, self.label)
        R, p = selection.source.table(module, A.device), self.dropout if self.training else 0.0
        s, base, name = bank.scalings[module], self._modules["base_layer"], self.recipe.name
        y = adapted(base, x, A, R, B, s, p, name, index, *args, **kwargs)
        if y.requires_grad:
            bank.remember(y, selection)
        return y

    def merge(self) -> None:
        if self.seat[0].is_open():
            raise RuntimeError(
                f"{self.label}: adapters of its bank are selected; leave bank.select(...) before merging"
            )
        super().merge()

    def refuse_merged(self) -> None:
        if self.merged:
            raise RuntimeError(f"{self.label}: is merged; lx.unmerge(model) before adapters are selected")


# What is selected changes from call to call: compiled code is interrupted for these layers.
_uncompiled = torch._disable_dynamo(BankedLinear.forward)


@cache
def with_adapter_ids(kind: type[nn.Module]) -> type[nn.Module]:
    """A model's class whose calls, and `generate` where there is one, take `adapter_ids`.

    As torch.nn.utils.parametrize does, it takes the place of the class of one model, so that no other model changes
    and copies of this one keep it.
    """

    def call(self: Any, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        bank = self.loraxs_bank.bank
        bank.know(self)
        with bank.calling(adapter_ids, batch_of(args, kwargs)):
            return kind.__call__(self, *args, **kwargs)

    uncompiled = torch._disable_dynamo(call, recursive=False)  # what it calls is compiled

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_compiling() else call)(self, *args, **kwargs)

    def generate(self: Any, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        with self.loraxs_bank.bank.generating(adapter_ids):
            return kind.generate(self, *args, **kwargs)

    body = {
        "__call__": __call__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if callable(getattr(kind, "generate", None)):
        body["generate"] = generate
    return type(kind.__name__, (kind,), body)


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many samples, and rows of each, the arguments of a model's call have; None: they have no tensor."""
    tensors = [kwargs.get(name) for name in BATCHED] + [*args] + [*kwargs.values()]
    first = next((t for t in tensors if isinstance(t, Tensor) and t.dim() > 0), None)
    if first is None:
        return None
    rows = first.shape[1:-1] if first.is_floating_point() else first.shape[1:]
    return first.shape[0], math.prod(rows)


def turn(module: nn.Module, kind: type[nn.Module], undo: Any) -> None:
    """Let a module be of another class, until `undo` is run."""
    undo.callback(setattr, module, "__class__", type(module))
    module.__class__ = kind
