"""What a bank puts on a model: layers that compute with the adapters selected, and a call that takes `adapter_ids`."""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..indexed import NONE, RowIndex, plain_tensors
from ..linear import LoraXSLinear
from ..route import layer_output
from ..weights import held

if TYPE_CHECKING:
    from .adapter_bank import AdapterBank

# Arguments of a model's forward with one entry of the first dimension for each sample, as transformers names them.
BATCHED = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")
# Types of transformers models whose layers get (length, samples, features), or samples in parts of others.
SEQUENCE_FIRST = ("xlnet", "longformer", "led", "fsmt", "mask2former", "oneformer")
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention, nn.RNNBase)


class Source(Protocol):
    """Where the R of selected adapters are: the slots of a bank, or those that it trains."""

    n: int

    def bring(self, names: Sequence[str], instead: Sequence[str] = ()) -> dict[str, int]:
        """The places of these adapters, which they keep until `release`; KeyError for an unknown name.

        instead: of adapters that are released by the same step.  After an error they are still where they were.
        """

    def release(self, names: Sequence[str]) -> None: ...

    def state(self, names: Iterable[str]) -> dict[str, tuple[int, bytes | None]]:
        """Where these adapters are, and what tells one R from another; without those that are nowhere."""

    def table(self, module: int, device: torch.device) -> Tensor:
        """R of a module for all places, (n, r, r) fp32, in place: what is brought later is written into it."""


class Slots:
    """A table on each device of the model for a few adapters, into which those that are asked for are copied.

    The adapter that has not been used for longest gives its slot to one that is not there, unless it is in use.
    """

    def __init__(self, bank: AdapterBank, n: int) -> None:
        self.n, self.bank = n, bank
        self._there: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # slot and digest, the latest used last
        self._free = list(range(n))
        self._users: dict[str, int] = {}
        self._tables: dict[torch.device, Tensor] = {}
        self._views: dict[torch.device, list[Tensor]] = {}
        self._staged = torch.empty(0, device="cpu")
        self._events: dict[tuple[torch.device, int], torch.cuda.Event] = {}

    def bring(self, names: Sequence[str], instead: Sequence[str] = ()) -> dict[str, int]:
        wanted = dict.fromkeys(names)
        digests = self.bank.digests(wanted)
        if len(wanted) > self.n:
            raise ValueError(
                f"adapter_ids: got {len(wanted)} different adapters, must be at most {self.n}, the slots of "
                "bank.attach(model, slots=...)"
            )
        self._follow(self.bank.devices())
        places, users = {}, Counter(self._users)
        users.subtract({*instead})
        stale = [name for name in wanted if name in self._there and self._there[name][1] != digests[name]]
        for name in stale:
            if users[name]:
                raise RuntimeError(f"adapter {name!r}: has changed in the bank while another selection uses it")
        idle = [name for name in self._there if name not in wanted and not users[name]]
        missing = [name for name in wanted if name not in self._there or name in stale]
        if len(missing) > len(self._free) + len(stale) + len(idle):
            left = self.n - sum(name not in wanted for name in +users)
            raise RuntimeError(
                f"adapter_ids: got {len(wanted)} different adapters, must be at most {left}: the other "
                f"{self.n - left} of {self.n} slots are in use by open selections"
            )
        # Where slots in use are written to, what can fail comes first.
        records = {name: self.bank.read(name) for name in missing} if instead else {}
        self._free += [self._there.pop(name)[0] for name in stale]
        self.release(instead)
        for name in missing:
            if not self._free:
                self._free.append(self._there.pop(idle.pop(0))[0])
            slot = self._free[-1]
            self._copy(name, slot, records.get(name))
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

    def state(self, names: Iterable[str]) -> dict[str, tuple[int, bytes | None]]:
        return {name: self._there[name] for name in names if name in self._there}

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
        ranks, size = [rank for _, rank in self.bank.modules], self.bank.size
        with plain_tensors():
            self._tables = {device: torch.zeros(self.n, size, dtype=torch.float32, device=device) for device in devices}
            self._views = {device: split(table, ranks) for device, table in self._tables.items()}
            on_gpu = any(device.type == "cuda" for device in devices)
            self._staged = torch.empty(size, dtype=torch.float32, pin_memory=on_gpu, device="cpu")

    def _copy(self, name: str, slot: int, record: Tensor | None) -> None:
        if record is None:
            self.bank.read(name, self._staged)
        else:
            self._staged.copy_(record)
        for device, table in self._tables.items():
            for (used_on, _), event in self._events.items():  # other streams may still read what is there
                if used_on == device:
                    torch.cuda.current_stream(device).wait_event(event)
            with torch.no_grad():
                table[slot].copy_(self._staged)  # has been read when this returns


def split(table: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Records (n, sum of r^2) as a view (n, r, r) for each module."""
    parts = table.split([rank * rank for rank in ranks], dim=1)
    return [part.unflatten(1, (rank, rank)) for part, rank in zip(parts, ranks, strict=True)]


class Use:
    """The adapters that a selection has brought, as the graphs hold them that are made with it."""

    def __init__(self, selection: Selection) -> None:
        self.selection, self.source, self.names = selection, selection.source, selection.names
        self.state = self.source.state(_named(self.names))
        self.ahead = 0  # of the graphs: how many layers no backward pass has been through

    def is_current(self) -> bool:
        """Whether the selection, whose block may have ended, still has them, where and as they were."""
        has = self.selection.source, self.selection.names
        return has == (self.source, self.names) and self.source.state(_named(self.names)) == self.state

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
        self._places: dict[str, int] = {}
        self.use: Use | None = None
        self._indices: dict[torch.device, RowIndex] = {}
        self._leave: Callable[[], None] | None = None
        self.task = -1  # the backward pass in which it was opened
        self.thread = 0
        self.batch: tuple[int, int] | None = None  # samples and rows of each in the call of the model that runs
        self.factor = 1  # by how much `generate` repeats each sample

    def __enter__(self) -> Selection:
        return self.open(nested=False)

    def __exit__(self, *_: Any) -> None:
        self.close()

    def open(self, nested: bool) -> Selection:
        """nested: whether another selection may be open in this thread."""
        if self._leave is not None:
            raise RuntimeError("select: this selection is open already; make one for each block and thread")
        self.task, self.thread = torch._C._current_graph_task_id(), threading.get_ident()
        if (source := self.bank.source_of(self.names)) is not self.source:  # a training began or ended since
            self.source, self._places, self._indices = source, {}, {}
        self._leave = self.bank.enter(self, nested)
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
        names = self.bank._names(names)
        if len(names) != len(self.names):
            raise ValueError(f"names: got {len(names)}, must be {len(self.names)} as before")
        with self.bank._lock:
            self._places = self.source.bring(_named(names), _named(self.names))
            self.names = names
            self._used()
            for index in self._indices.values():
                index.change(self._numbers())

    def bring(self) -> None:
        before, self._places = self._places, self.source.bring(_named(self.names))
        self._used()
        if before != self._places:
            self._indices = {}

    def _used(self) -> None:
        if self.use is None or not self.use.is_current():
            self.use = Use(self)

    def release(self) -> None:
        self.source.release(_named(self.names))

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
        if len(index) == 1 and self._tokens is None:  # all samples use the same
            return index
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
    def during(self, batch: tuple[int, int] | None, factor: int) -> Iterator[None]:
        """While the model runs on so many samples, and so many rows of each, or generates."""
        before = self.batch, self.factor
        self.batch, self.factor = batch, factor
        try:
            yield
        finally:
            self.batch, self.factor = before


def _named(names: Iterable[str | None]) -> list[str]:
    return [name for name in names if name is not None]


class Seat:
    """What a bank puts on a LoraXSLinear: within a selection each sample uses the R of its own adapter.

    put_on: whether the layer is the bank's own, so that R of the layer itself is not anybody's.
    """

    def __init__(self, bank: AdapterBank, module: int, put_on: bool) -> None:
        self.bank, self.module, self.put_on = bank, module, put_on

    def __deepcopy__(self, memo: dict) -> Seat:
        return self

    def output(self, layer: LoraXSLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of the layer, for the samples of the selection that this call belongs to, or by the layer's own R."""
        if torch.compiler.is_compiling():
            return _uncompiled(self, layer, x, *args, **kwargs)
        selection = self.bank.current()
        base, A, B = layer._modules["base_layer"], layer._buffers["A"], layer._buffers["B"]
        s, index = layer.scaling, None
        if selection is not None:
            self.refuse_merged(layer)
            if torch.jit.is_tracing():
                raise RuntimeError(
                    "torch.jit.trace: adapters are selected, which would be those of the trace for good; trace outside "
                    "of selections, with the adapter in the model itself (lx.load_adapter)"
                )
            index, s = selection.index(x, A.device, layer.label), self.bank.scalings[self.module]
            R = selection.source.table(self.module, A.device)
        elif layer.merged:
            return F.linear(x, layer.merged_weight, base.bias, *args, **kwargs)
        else:
            R = held(layer, "R")
        p = layer.dropout if layer.training else 0.0
        y = layer_output(base, x, ((A, R, B, s, p),), layer.recipe.name, index, args, kwargs)
        if y.requires_grad:
            self.bank.remember(y, selection)
        return y

    def check_merge(self, layer: LoraXSLinear) -> None:
        if self.bank.is_open():
            raise RuntimeError(
                f"{layer.label}: adapters of its bank are selected; leave bank.select(...) before merging"
            )

    def refuse_merged(self, layer: LoraXSLinear) -> None:
        if layer.merged:
            raise RuntimeError(f"{layer.label}: is merged; lx.unmerge(model) before adapters are selected")


# What is selected changes from call to call: compiled code is interrupted for it.
_uncompiled = torch._disable_dynamo(Seat.output)


@cache
def with_adapter_ids(kind: type[nn.Module]) -> type[nn.Module]:
    """A model's class whose calls, and `generate` where there is one, take `adapter_ids`.

    As torch.nn.utils.parametrize does, it takes the place of the class of one model, so that no other model changes
    and copies of this one keep it.
    """

    def inside(run: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        attached, names = self.loraxs_bank, kwargs.pop("adapter_ids", None)
        with attached.bank.calling(self, names, args, kwargs):
            return run(self, *args, **kwargs)

    uncompiled = torch._disable_dynamo(inside, recursive=False)  # what it calls is compiled

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_compiling() else inside)(kind.__call__, self, args, kwargs)

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "adapter_ids" not in kwargs:  # which `__call__` has taken out
            return kind.forward(self, *args, **kwargs)
        return (uncompiled if torch.compiler.is_compiling() else inside)(kind.forward, self, args, kwargs)

    body = {"__call__": __call__, "forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    body["__qualname__"] = kind.__qualname__
    if callable(getattr(kind, "generate", None)):

        @wraps(kind.generate)
        def generate(self: Any, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
            standard = kind.generate.__module__ == "transformers.generation.utils"
            with self.loraxs_bank.bank.generating(adapter_ids, args, kwargs, standard):
                return kind.generate(self, *args, **kwargs)

        def expand(self: Any, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
            self.loraxs_bank.bank.expanding(expand_size)
            return super(made, self)._expand_inputs_for_generation(expand_size, *args, **kwargs)

        body |= {"generate": generate, "_expand_inputs_for_generation": expand}
    made = type(kind.__name__, (kind,), body)
    return made


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


def why_not_mixed(model: nn.Module) -> str | None:
    """Why the samples of a batch cannot have different adapters on this model, as far as that can be told; else None.

    It is for layers that get rows of several samples in an order that their shape does not show.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in SEQUENCE_FIRST:
        return f"a model of type {kind} has layers whose first dimension is not the batch"
    for name, module in model.named_modules():
        seated = any(isinstance(m, LoraXSLinear) and m.seat is not None for m in module.modules())
        if seated and name.rpartition(".")[2] == "experts":
            return f"module {name!r} gives each expert tokens of any samples"
        if seated and isinstance(module, TORCH_LAYERS) and not getattr(module, "batch_first", True):
            return f"module {name!r} has batch_first=False, so that its first dimension is not the batch"
    return None
