"""Where the R of selected adapters are: tables on the devices of the model, which hold a few adapters at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..indexed import plain_tensors

if TYPE_CHECKING:
    from .adapter_bank import AdapterBank


class Source(Protocol):
    """Where the R of selected adapters are: the slots of a bank, or those that it trains."""

    n: int

    def bring(self, names: Sequence[str], used: Collection[int], changing: bool = False) -> dict[str, int]:
        """The places of these adapters; KeyError for an unknown name.

        used: places that open selections have, which keep what they hold.  changing: whether a selection is open whose
        places are not among these: after an error they hold what they held.
        """

    def release(self) -> None:
        """Note that places which were in use may be written to from here on."""

    def state(self, names: Iterable[str]) -> dict[str, tuple[int, bytes | None]]:
        """Where these adapters are, and what tells one R from another; without those that are nowhere."""

    def table(self, module: int, device: torch.device) -> Tensor:
        """R of a module for all places, (n, r, r) fp32, in place: what is brought later is written into it."""


class Slots:
    """A table on each device of the model for a few adapters, into which those that are asked for are copied.

    The adapter that has not been used for longest gives its slot to one that is not there, unless it is in use.  An
    adapter that is replaced in the bank while it is in use keeps its slot until then, and the new record gets another.
    A slot is free if no adapter is there and no open selection uses it: nothing is counted.
    """

    def __init__(self, bank: AdapterBank, n: int) -> None:
        self.n, self.bank = n, bank
        self._there: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # slot and digest, the latest used last
        self._tables: dict[torch.device, Tensor] = {}
        self._views: dict[torch.device, list[Tensor]] = {}
        self._staged = torch.empty(0, device="cpu")
        self._events: dict[tuple[torch.device, int], torch.cuda.Event] = {}

    def bring(self, names: Sequence[str], used: Collection[int], changing: bool = False) -> dict[str, int]:
        wanted = dict.fromkeys(names)
        digests = self.bank.digests(wanted)
        if len(wanted) > self.n:
            raise ValueError(
                f"adapter_ids: got {len(wanted)} different adapters, must be at most {self.n}, the slots of "
                "bank.attach(model, slots=...)"
            )
        self._follow(self.bank.devices(), in_use=bool(used) or changing)
        missing = [name for name in wanted if name not in self._there or self._there[name][1] != digests[name]]
        kept = {self._there[name][0] for name in wanted.keys() - {*missing}}
        if len(missing) > self.n - len(kept.union(used)):
            left = self.n - len({*used} - kept)
            raise RuntimeError(
                f"adapter_ids: got {len(wanted)} different adapters, must be at most {left}: the other "
                f"{self.n - left} of {self.n} slots are in use by open selections"
            )
        # Where slots in use are written to, what can fail comes first.
        records = {name: self.bank.read(name) for name in missing} if changing else {}
        if changing:
            self.release()
        for name in missing:
            self._there.pop(name, None)
        if missing:
            free: list[int] = []
            if len(self._there) < self.n:  # else every slot has an adapter
                held = {slot for slot, _ in self._there.values()}
                free = [slot for slot in range(self.n) if slot not in held and slot not in used]
            idle = (name for name, (slot, _) in [*self._there.items()] if name not in wanted and slot not in used)
            for name in missing:
                slot = free.pop() if free else self._there.pop(next(idle))[0]
                self._copy(name, slot, records.get(name))
                self._there[name] = slot, digests[name]
        for name in wanted:
            self._there.move_to_end(name)
        return {name: self._there[name][0] for name in wanted}

    def release(self) -> None:
        for device in self._tables:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                self._events[device, stream.cuda_stream] = stream.record_event()

    def state(self, names: Iterable[str]) -> dict[str, tuple[int, bytes | None]]:
        return {name: self._there[name] for name in names if name in self._there}

    def table(self, module: int, device: torch.device) -> Tensor:
        return self._views[device][module]

    def _follow(self, devices: set[torch.device], in_use: bool) -> None:
        """Have tables on the devices of the model's layers, which may have moved."""
        if devices == self._tables.keys():
            return
        if in_use:
            raise RuntimeError("model: was moved to another device while adapters of its bank were selected")
        self._there.clear()
        self._events = {}
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
