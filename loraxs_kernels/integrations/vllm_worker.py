"""LoRA-XS in vLLM's workers: layers that hold A and B once, and a table of the R that a step uses.

vLLM gives each step an id for every row (0: the base model) and asks its LoRA manager to have the adapters of these ids
in slots.  Here a slot is a row of one table, with R of all modules one after another, so that bringing an adapter in is
one copy (224 KiB for a 7B model at r = 16).  The layers are vLLM's own LoRA layers, with its rules for merged
projections and tensor parallelism; only what they add to the output is ours.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora import utils
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models import supports_multimodal

from ..backends.torch import cast, shrink
from ..bank import Store
from ..indexed import NONE, Blocks, RowIndex, mix
from ..recipe import Factors
from .vllm import BANK, BASIS, Version, check_config
from .vllm_factors import served_factors

logger = init_logger("vllm.loraxs")

OUTDATED = "the base weights were replaced, and A and B are those of the old ones: restart the server"


@dataclass
class Record:
    """An adapter as vLLM's manager keeps it: R of all modules, fp32, on the host."""

    id: int
    R: Tensor
    path: str | None = None  # its lora_path; None: of vLLM's warm-up


class Rows:
    """Which slot each row of a step uses; stands where vLLM has its punica wrapper."""

    def __init__(self, most: int, device: torch.device, slots: int) -> None:
        self.slots = torch.full((most,), NONE, dtype=torch.int32, device=device)  # at one address, for CUDA graphs
        self.n, self.values, self.used = slots, [], False
        self._blocks: dict[int, Blocks] = {}

    def update_metadata(self, mapping: Any, lora_index_to_id: Sequence[int | None], *_: Any) -> None:
        """What vLLM's manager calls before a step whose mapping or slots are not those of the last."""
        slot_of = {id: slot for slot, id in enumerate(lora_index_to_id) if id is not None} | {0: NONE}
        self.values, self._blocks = [slot_of[id] for id in mapping.index_mapping], {}
        self.used = any(slot != NONE for slot in self.values)
        if self.slots.is_cuda:
            host = torch.full(self.slots.shape, NONE, dtype=torch.int32, pin_memory=True)
            host[: len(self.values)] = torch.tensor(self.values, dtype=torch.int32)
            self.slots.copy_(host, non_blocking=True)

    def blocks(self, T: int) -> Blocks | None:
        """T rows in blocks of one slot; rows past the step's are padding.  None: no row uses an adapter."""
        if len(self.values) > T:
            raise RuntimeError(f"a layer got {T} rows in a step of {len(self.values)}, must be all of them")
        if not self.used:
            return None
        if self.slots.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.alone(T)
        if T not in self._blocks:
            values = self.values + [NONE] * (T - len(self.values))
            self._blocks[T] = RowIndex(values, self.n, self.slots.device).blocks(T)
        return self._blocks[T]

    def alone(self, T: int) -> Blocks:
        """T rows in a block each: a CUDA graph that is recorded with these reads the slots of later steps."""
        slots = self.slots[:T]
        owner, idle = slots.clamp_min(0), (slots == NONE)[:, None, None]
        return Blocks(1, owner, order=None, back=None, idle=idle, members=owner, places=owner)


@dataclass
class Part:
    """What m modules of one rank that share x add to a layer's output, y += (R_i A_i x)_i in blocks of columns of B."""

    A: Tensor  # (m r, K): of all m, one after another
    B: Tensor  # (N, m r): of all m, each in the rows of its own slice and zero elsewhere
    R: Tensor  # (slots, m, r, r), of the table, times s

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        if (blocks := rows.blocks(len(x))) is None:
            return
        u = mix(shrink(x, self.A.t()), self.R, blocks, 1.0)
        y.addmm_(cast(u, x.dtype), self.B.t())


class LoraXSLayer:
    """Goes before one of vLLM's LoRA layers: A and B held once in the place of a copy of each for every slot."""

    parts: Sequence[Part] = ()
    rows: Rows
    key: str
    called = False

    def set_mapping(self, punica_wrapper: Rows) -> None:
        self.rows = punica_wrapper

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        y = output.view(-1, output.shape[-1])
        if torch.compiler.is_compiling():
            torch.ops.loraxs.vllm_add(y, x.reshape(-1, x.shape[-1]), self.key)
        else:
            self.add(y, x.reshape(-1, x.shape[-1]))
        return output

    def add(self, y: Tensor, x: Tensor) -> None:
        self.__dict__["called"] = True
        for part in self.parts:
            part.add(y, x, self.rows)


_layers: weakref.WeakValueDictionary[str, LoraXSLayer] = weakref.WeakValueDictionary()
_managers = itertools.count()


def _add(y: Tensor, x: Tensor, key: str) -> None:
    _layers[key].add(y, x)


_library = torch.library.Library("loraxs", "FRAGMENT")
_library.define("vllm_add(Tensor(a!) y, Tensor x, str key) -> ()")
_library.impl("vllm_add", _add, "CompositeExplicitAutograd")
torch.library.register_fake("loraxs::vllm_add", lambda y, x, key: None, lib=_library)


@cache
def layer_class(kind: type[BaseLinearLayerWithLoRA]) -> type[BaseLinearLayerWithLoRA]:
    """One of vLLM's LoRA layers with A and B held once."""
    return type(f"LoraXS{kind.__name__}", (LoraXSLayer, kind), {})


class BankModelManager(LRUCacheLoRAModelManager):
    """vLLM's model manager for the adapters of a bank: wraps the bank's modules, and keeps the table of slots."""

    def __init__(self, **how: Any) -> None:
        self.store, self._number = Store(os.environ[BANK]), next(_managers)
        super().__init__(**how)

    @property
    def capacity(self) -> float:
        return float("inf")  # BankWorkerManager says what goes

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        self.supports_mm = hasattr(self.model, "get_mm_mapping")
        if supports_multimodal(self.model) and not self.supports_mm:
            raise ValueError(
                f"{type(self.model).__name__}: vLLM does not say which of its layers are the language model's"
            )
        self.supports_tower_connector_lora = False
        prefix = DEFAULT_LANGUAGE_WRAPPER_KEY
        if self.supports_mm:
            self.mm_mapping = self.model.get_mm_mapping()
            (prefix,) = self.mm_mapping.language_model
        self.punica_wrapper_mapping = {prefix: Rows(self.max_num_batched_tokens, self.device, self.lora_slots)}

    def _create_lora_modules(self) -> None:
        start, store = time.perf_counter(), self.store
        if store.modules_to_save:
            raise ValueError(
                f"{store.path}: has modules_to_save ({', '.join(store.modules_to_save)}), which vLLM's model does not "
                "take over; serve a bank without, on a base model that has their values"
            )
        self.table = torch.zeros(self.lora_slots, store.size, dtype=torch.float32, device=self.device)
        self.scale = torch.cat([torch.full((r * r,), store.alphas[module] / r) for module, r in store.modules])
        layers = {name: (self._wrapped(name, modules), modules) for name, modules in self._places().items()}
        factors = served_factors(layers, store, os.environ.get(BASIS) or None)
        for name, (layer, modules) in layers.items():
            layer.set_mapping(self._get_punica_wrapper(name))
            layer.parts = self._parts(layer, modules, factors)
            layer.key = f"{self._number}:{name}"
            _layers[layer.key] = layer
            utils.replace_submodule(self.model, name, layer)
            self.register_module(name, layer)
        took = time.perf_counter() - start
        logger.info("%s: A and B of %d modules in %.1f s", store.path, len(store.modules), took)

    def _places(self) -> dict[str, list[str | None]]:
        """By vLLM's layer, the bank's module for each of its slices, None for one that the bank leaves alone."""
        there: dict[str, LinearBase] = {}
        names: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, LinearBase):
                there[name] = module
                names.setdefault(id(module), []).append(name)
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        rename = (lambda name: name) if mapper is None else mapper.get_rename_mapper()._map_name
        packed: dict[str, list[tuple[str, int, int]]] = {}
        for parent, children in self.packed_modules_mapping.items():
            for at, child in enumerate(children):
                packed.setdefault(child, []).append((parent, at, len(children)))
        places: dict[str, list[str | None]] = {}
        missing = []
        for module, _ in self.store.modules:
            for name in (rename(module), f"model.{module}"):  # the latter of a model without its head
                above, dot, last = name.rpartition(".")
                found = [(f"{above}{dot}{parent}", at, count) for parent, at, count in packed.get(last, ())]
                found = [(name, 0, 1), *found] if name in there else [each for each in found if each[0] in there]
                if found:
                    place, at, count = found[0]
                    places.setdefault(place, [None] * count)[at] = module
                    break
            else:
                missing.append(module)
        if missing:
            raise ValueError(
                f"{self.store.path}: module {missing[0]!r} is no linear layer of vLLM's {type(self.model).__name__}"
                + (f", nor are {len(missing) - 1} more" if missing[1:] else "")
                + "; a bank to serve must leave out (exclude_modules) what is no linear layer there: experts, output "
                "embeddings"
            )
        for name in places:
            if len(same := names[id(there[name])]) > 1:
                raise ValueError(
                    f"module {name!r}: vLLM's {type(self.model).__name__} has it in several places "
                    f"({', '.join(same)}); leave it out of the bank"
                )
        return places

    def _wrapped(self, name: str, modules: list[str | None]) -> Any:
        """vLLM's LoRA layer for one of its layers, with A and B held once."""
        layer, packed = self.model.get_submodule(name), self.packed_modules_mapping.get(name.rpartition(".")[2], [])
        how = dict(source_layer=layer, lora_config=self.lora_config, packed_modules_list=packed)
        kind = next((k for k in utils._all_lora_classes if k.can_replace_layer(**how, model_config=None)), None)
        if kind is None or not issubclass(kind, BaseLinearLayerWithLoRA) or self._get_punica_wrapper(name) is None:
            raise ValueError(
                f"module {name!r}: vLLM has no LoRA for its {type(layer).__name__}; leave it out of the bank"
            )
        wrapped = layer_class(kind)(layer)
        if wrapped.n_slices == 1:
            wrapped.output_slices = (wrapped.output_size,)
        if len(wrapped.output_slices) != len(modules):
            raise ValueError(
                f"module {name!r}: vLLM cuts its {type(layer).__name__} into {len(wrapped.output_slices)} slices, and "
                f"the checkpoint into {len(modules)}; leave it out of the bank"
            )
        return wrapped

    def _parts(self, layer: Any, modules: Sequence[str | None], factors: Mapping[str, Factors]) -> list[Part]:
        """A and B of the modules in a layer, as much of them as this rank needs, and the R that go between."""
        pairs = [(None, None) if module is None else factors[module] for module in modules]
        A, B = [a for a, _ in pairs], [b for _, b in pairs]
        if layer.tp_size > 1 and layer.n_slices > 1:
            A, B = layer.slice_lora_a(A), layer.slice_lora_b(B)
        elif layer.tp_size > 1:
            A, B = [layer.slice_lora_a(A[0])], [layer.slice_lora_b(B[0])]
        stops = list(itertools.accumulate(layer.output_slices))
        groups: list[list[tuple[str, Tensor, Tensor]]] = []  # of modules whose R lie side by side in the table
        for module, a, b, width, stop in zip(modules, A, B, layer.output_slices, stops, strict=True):
            if module is not None:
                wide = b.new_zeros(stops[-1], len(a))
                wide[stop - width : stop] = b
                last = groups[-1][-1] if groups else None
                beside = last and self.store.places[last[0]].stop == self.store.places[module].start
                if not (beside and len(last[1]) == len(a)):
                    groups.append([])
                groups[-1].append((module, a, wide))
        return [self._part(group) for group in groups]

    def _part(self, group: Sequence[tuple[str, Tensor, Tensor]]) -> Part:
        modules, A, B = zip(*group, strict=True)
        places, r = [self.store.places[module] for module in modules], len(A[0])
        R = self.table[:, places[0].start : places[-1].stop].unflatten(1, (len(group), r, r))
        return Part(torch.cat(A), torch.cat(B, 1), R)

    def check_called(self) -> bool:
        """Whether the model has run; RuntimeError for a layer that it has not called then, which would add nothing."""
        if not any(layer.called for layer in self.modules.values()):
            return False
        for name, layer in self.modules.items():
            if not layer.called:
                raise RuntimeError(
                    f"module {name!r}: vLLM's {type(self.model).__name__} does not call it, so that adapters would do "
                    "nothing there; leave it out of the bank"
                )
        return True

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> Record:
        return Record(lora_id, torch.zeros(self.store.size))

    def _add_adapter(self, lora: Record) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        self.table[slot].copy_(self._registered_adapters[lora_id].R, non_blocking=True)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        return True


class BankWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's worker manager for the adapters of a bank.

    An adapter that `add_lora` brought stays until `remove_lora`: vllm_server.py knows when no request needs it.  One
    that a step brings, as where LLM.generate is given a LoRARequest, goes when `max_cpu_loras` others have come since.
    """

    _manager_cls = BankModelManager
    outdated, checked = False, False

    def __init__(self, vllm_config: VllmConfig, *how: Any) -> None:
        check_config(vllm_config)
        super().__init__(vllm_config, *how)
        self._brought: OrderedDict[int, None] = OrderedDict()  # by steps, the latest used last

    def _load_adapter(self, lora_request: LoRARequest) -> Record:
        version, manager = Version.of(lora_request.lora_path), self._adapter_manager
        R = manager.store.read(version.name, digest=version.digest).mul_(manager.scale)
        R = R.pin_memory() if self.device.type == "cuda" else R
        return Record(lora_request.lora_int_id, R, lora_request.lora_path)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """What `add_lora` calls."""
        new = self._bring(lora_request)
        self._brought.pop(lora_request.lora_int_id, None)
        return new

    def _bring(self, lora_request: LoRARequest) -> bool:
        if self.outdated:
            raise RuntimeError(OUTDATED)
        self.checked = self.checked or self._adapter_manager.check_called()
        there = self._adapter_manager._registered_adapters
        if (record := there.get(lora_request.lora_int_id)) is not None:
            if record.path not in (None, lora_request.lora_path):
                raise ValueError(
                    f"lora_int_id: got {record.id} for {lora_request.lora_path}, has {record.path} already"
                )
            return False
        return self._adapter_manager.add_adapter(self._load_adapter(lora_request))

    def remove_adapter(self, adapter_id: int) -> bool:
        self._brought.pop(adapter_id, None)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        self._brought.clear()
        super().remove_all_adapters()

    def _apply_adapters(self, adapter_requests: set[LoRARequest]) -> None:
        """Before a step: have its adapters in slots."""
        manager, wanted = self._adapter_manager, {each.lora_int_id: each for each in adapter_requests if each}
        if len(wanted) > manager.lora_slots:
            raise RuntimeError(f"a step has {len(wanted)} adapters, must be at most --max-loras = {manager.lora_slots}")
        for id, request in wanted.items():
            if self._bring(request):
                self._brought[id] = None
            elif id in self._brought:
                self._brought.move_to_end(id)
        for id in sorted(wanted, key=lambda id: id not in manager._active_adapters):  # those that are there first
            manager.activate_adapter(id)
        for id in list(self._brought)[: max(0, len(self._brought) - self.lora_config.max_cpu_loras)]:
            self.remove_adapter(id)


def refuse_new_weights(runner: Any) -> None:
    """In the place of what vLLM calls after it has replaced the base weights of a running model."""
    if runner.lora_config:
        runner.lora_manager.outdated = True
        raise RuntimeError(OUTDATED)
