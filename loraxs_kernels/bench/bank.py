"""What do many adapters in one batch cost beside one adapter, and does it matter how many there are in the bank?

First one layer, W included: T rows, one for each sample as in decoding, which use the same adapter or others.  Then a
bank on a model of one layer, by the number of its records: `select` of SAMPLES different names and a forward of a row
for each, where they are in the slots (warm) and where none is (cold: its record is read from the page cache, checked
and copied to a slot), and reading one record.  Last, one adapter of many modules is brought to a slot.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import reference
from ..bank import AdapterBank
from ..functional import run
from ..indexed import RowIndex
from ..model import attach
from . import timer
from .layer import Row, failure, figures, release, timed
from .paths import ROWS, Layer, Operands, calls
from .shapes import Shape

if TYPE_CHECKING:
    from .settings import Settings

SHAPES, TOKENS = (Shape(4096, 4096), Shape(11008, 4096)), (1, 16, 64, 512)  # where none are asked for
RECORDS = (1, 1_000, 100_000)
SAMPLES = 64  # of a batch on a bank, and slots
MODULES, ADAPTERS, SIZE = 224, 1_000, 64  # of the bank of whole adapters: linears, SIZE x SIZE, and records
PEFT_TOKENS = 64  # rows up to which PEFT's layer is measured: it holds a LoRA for each
CHUNK = 10_000  # records in a transaction
FLAT_SECONDS = 4  # so many times the seconds of other passes: the figures are meant to part by less than 5 %

Results = tuple[dict[str, Tensor], dict[str, Tensor]]
Build = Callable[[Operands, Tensor, list[int]], Layer]


def mix(name: str, T: int) -> list[int]:
    """Which of T adapters each row uses: one of them, all, or one for half of the rows and others for the rest."""
    alike = {"alike": T, "different": 0, "skewed": T - T // 2}[name]
    index = [0] * alike + list(range(bool(alike), T + bool(alike) - alike))
    random.Random(0).shuffle(index)
    return index


def _one(o: Operands, Rs: Tensor, index: list[int]) -> Layer:
    R = Rs[0].clone().requires_grad_()
    return Layer(lambda x: run(x, o.W, o.A, R, o.B, o.s, name=""), (R,))


def _indexed(o: Operands, Rs: Tensor, index: list[int]) -> Layer:
    Rs, laid_out = Rs.clone().requires_grad_(), RowIndex(index, len(Rs), Rs.device)
    return Layer(lambda x: run(x, o.W, o.A, Rs, o.B, o.s, name="", index=laid_out), (Rs,))


def _loop(o: Operands, Rs: Tensor, index: list[int]) -> Layer:
    """x W^T once, then for each adapter its rows of the delta; the rows are brought together and back at once."""
    Rs, of = Rs.clone().requires_grad_(), torch.tensor(index, device=Rs.device)
    order, counts = of.argsort(stable=True), of.bincount(minlength=len(Rs)).tolist()

    def call(x: Tensor) -> Tensor:
        parts = zip(x.index_select(0, order).split(counts), Rs.unbind(), strict=True)
        deltas = [run(rows, None, o.A, R, o.B, o.s, name="") for rows, R in parts if len(rows)]
        return F.linear(x, o.W).index_add_(0, order, torch.cat(deltas))

    return Layer(call, (Rs,))


def _peft(o: Operands, Rs: Tensor, index: list[int]) -> Layer:
    """PEFT's own LoRA layer with an adapter for each R, lora_A = R A and lora_B = B, as it is called in a model."""
    from peft import LoraConfig, get_peft_model

    r, names = Rs.shape[1], [f"user-{i}" for i in range(len(Rs))]
    config = LoraConfig(r=r, lora_alpha=o.s * r, target_modules=["0"])
    model = get_peft_model(nn.Sequential(o.linear()), config, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, R in zip(names, Rs, strict=True):
        layer.lora_A[name].weight.data.copy_(R @ o.A.float())
        layer.lora_B[name].weight.data.copy_(o.B)
    wanted = [names[i] for i in index]
    return Layer(lambda x: layer(x, adapter_names=wanted))


# By path the rows' adapters, how it is built, and what it is.
PATHS: dict[str, tuple[str, Build, str]] = {
    "one": ("alike", _one, "one adapter for all rows, called without an index"),
    "alike": ("alike", _indexed, "an index that is the same for all rows"),
    "different": ("different", _indexed, "an adapter for each row"),
    "skewed": ("skewed", _indexed, "one adapter for half of the rows, and one for each of the others"),
    "loop": ("different", _loop, "an adapter for each row, by a call for each adapter"),
    "peft": ("different", _peft, "an adapter for each row, PEFT's LoRA layer with adapter_names"),
}

APART = ("loop", "peft")  # their products of single rows are summed in other orders than those of many


def points(settings: Settings) -> int:
    banks = len(settings.records) + len(set(map(_enough, settings.records))) + 1
    return len(settings.shapes) * len(settings.tokens) * len(settings.ranks) + banks


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each path, direction and mode at each point of the grid; then those of banks, on the first shape."""
    for T in settings.tokens:
        for r in settings.ranks:
            for shape in settings.shapes:
                yield from _point(settings, shape, T, r)
                release()
    for question in (_by_records, _whole_adapter):
        try:
            yield from question(settings)
        except Exception as error:
            yield {"question": "bank", "dtype": settings.dtype_name} | failure("select", error)
        release()


def _point(settings: Settings, shape: Shape, T: int, r: int) -> Iterator[Row]:
    names = [name for name in PATHS if name != "peft" or (T <= PEFT_TOKENS and importlib.util.find_spec("peft"))]
    where: Row = {
        **{"question": "bank", "model": settings.model, "N": shape.N, "K": shape.K, "T": T, "r": r},
        **{"dtype": settings.dtype_name},
    }
    try:
        sets = operands(settings, shape, T, r)
    except torch.OutOfMemoryError:
        yield from (where | failure(name, "out of memory: the operands alone") for name in names)
        return
    layers: dict[str, list[Layer]] = {}
    known: dict[tuple, Results] = {}
    for name in names:
        try:
            which, build, _ = PATHS[name]
            index = mix(which, T)
            kind = which, name in APART
            if kind not in known:
                known[kind] = expected(*sets[0], index, *kind[1:])
            layers[name] = [build(o, Rs, index) for o, Rs in sets]
            if broken := wrong(layers[name][0], sets[0][0], known[kind]):
                yield where | failure(name, f"not timed, it is wrong: {', '.join(broken)}")
                del layers[name]
        except Exception as error:  # a path that cannot run must not cost the others their figures
            yield where | failure(name, error)
    del known
    for direction in ("forward", "both") if settings.direction == "both" else (settings.direction,):
        for mode in settings.modes:
            this, passes = where | {"direction": direction, "mode": mode}, {}
            for name, each in layers.items():
                if name == "peft" and (direction != "forward" or mode == "graph"):
                    continue  # it trains no R, and what it does on the host is in no graph
                try:
                    make = partial(calls, each, [o for o, _ in sets], direction)
                    passes[name] = timer.prepare(make, settings.device, mode == "graph")
                except Exception as error:
                    yield this | failure(name, error)
            samples, lost = timed(passes, settings)
            yield from (this | failure(name, lost) for name in passes if lost)
            yield from (this | {"path": name} | _figures(samples, name, settings.device, ("one",)) for name in samples)


def operands(settings: Settings, shape: Shape, T: int, r: int) -> list[tuple[Operands, Tensor]]:
    """Operands, and T random R (T, r, r), in as many sets as leave the cache."""

    def make(seed: int) -> tuple[Operands, Tensor]:
        o = Operands.random(T, shape.N, shape.K, r, settings.dtype, settings.device, seed)
        g = torch.Generator(settings.device).manual_seed(seed)
        return o, torch.randn(T, r, r, generator=g, device=settings.device) / r**0.5

    first = make(0)
    return [first, *map(make, range(1, timer.sets_needed(settings.device, first[0].bytes)))]


def expected(o: Operands, Rs: Tensor, index: list[int], apart: bool = False) -> Results:
    """y and gX on some rows, and gR, from the specification: in the dtype of x, row by row if `apart`, and in fp64."""
    of, at = torch.tensor(index, device=Rs.device), _some(o)

    def results(dtype: torch.dtype, rows: int) -> dict[str, Tensor]:
        x, gY, W, A, B, R = (t.detach().to(dtype) for t in (o.x, o.gY, o.W, o.A, o.B, Rs))

        def chain(x: Tensor, *operands: Tensor) -> Tensor:
            parts = zip(x[at].split(rows), of[at].split(rows), strict=True)
            return torch.cat([reference.lowrank_linear(part, *operands, o.s, index=i)[0] for part, i in parts])

        v, z = (torch.cat([part @ M for part in t.split(rows)]) for t, M in ((gY, B), (x, A.T)))
        return {
            "y": chain(x, W, A, R, B),
            "gX": chain(gY, W.T, B.T, R.transpose(1, 2), A.T),
            "gR": torch.zeros_like(R).index_add_(0, of, o.s * torch.einsum("ti,tj->tij", v, z)),
        }

    return results(o.x.dtype, 1 if apart else len(index)), results(torch.float64, len(index))


def wrong(layer: Layer, o: Operands, known: Results) -> list[str]:
    """Which results break the accuracy rule: y and gX on some rows, and gR."""
    y = layer.call(o.x)
    gX, *gR = torch.autograd.grad(y, (o.x, *layer.trained), o.gY)
    got = {"y": y.detach()[_some(o)], "gX": gX[_some(o)]}
    if gR:
        got["gR"] = gR[0].view(-1, *gR[0].shape[-2:])
    chain, oracle = ({what: known[i][what][: len(t)] for what, t in got.items()} for i in range(2))
    return [
        what
        for what, t in got.items()
        if not reference.relative_error(t, oracle[what])
        <= reference.allowed_error(chain[what], oracle[what], o.x.dtype)
    ]


def _some(o: Operands) -> Tensor:
    T = len(o.x)
    return torch.linspace(0, T - 1, min(T, ROWS), device=o.x.device).round().long()


# --- banks


def _enough(records: int) -> int:
    """A bank has at least as many records as two batches of different samples, of which the slots hold one."""
    return max(records, 2 * SAMPLES)


@torch.no_grad()
def _by_records(settings: Settings) -> Iterator[Row]:
    """Warm and cold batches, and reading one record, each beside the bank with the fewest records."""
    shape, r = settings.shapes[0], settings.ranks[0]
    where: Row = {"question": "bank", "dtype": settings.dtype_name, "direction": "forward", "mode": "eager", "r": r}
    layer = {"model": settings.model, "N": shape.N, "K": shape.K, "T": SAMPLES}
    o = Operands.random(SAMPLES, shape.N, shape.K, r, settings.dtype, settings.device, seed=0)
    x, batches, reads = o.x.detach(), {}, {}
    with ExitStack() as stack:
        for n in sorted({*settings.records, *map(_enough, settings.records)}):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = _filled(folder, nn.Sequential(o.linear()), r, n, torch.float32)
            if n in settings.records:
                bank, name, R = stack.enter_context(AdapterBank(folder)), cycle(names), torch.empty(r * r)
                reads[n] = partial(lambda bank, name, R: bank.read(next(name), R), bank, name, R)
            for path in ("warm", "cold") if n == _enough(n) else ():
                bank = stack.enter_context(AdapterBank(folder))
                model = bank.attach(nn.Sequential(o.linear()), SAMPLES, progress=False)
                if broken := _wrong_batch(bank, model, x, names[-SAMPLES:]):
                    yield where | layer | {"records": n} | failure(path, f"not timed, it is wrong: {broken}")
                    continue
                last = SAMPLES if path == "warm" else n - n % SAMPLES
                groups = cycle([names[i : i + SAMPLES] for i in range(0, last, SAMPLES)])
                batches[path, n] = partial(lambda model, groups: model(x, adapter_ids=next(groups)), model, groups)
        for device, calls in (
            (settings.device, batches),
            (torch.device("cpu"), {("read", n): reads[n] for n in reads}),
        ):
            passes = {key: timer.prepare(lambda call=call: [call], device) for key, call in calls.items()}
            samples = timer.interleave(passes, device, FLAT_SECONDS * settings.seconds)
            for (path, n), own in samples.items():
                beside = {"this": own, "fewest": samples[path, min(m for _, m in samples)]}
                beside |= {"warm": samples["warm", n]} if path == "cold" and ("warm", n) in samples else {}
                found = _figures(beside, "this", device, ("fewest", "warm"))
                found |= {"seconds": asdict(timer.Spread.of(own)), "bytes": 4 * r * r} if path == "read" else {}
                yield where | (layer if path != "read" else {}) | {"path": path, "records": n} | found


def _wrong_batch(bank: AdapterBank, model: nn.Sequential, x: Tensor, names: list[str]) -> str:
    """What breaks the accuracy rule in a batch of different adapters, each read for itself; "": nothing."""
    (layer,), y = model, model(x, adapter_ids=names)
    R = torch.stack([bank.read(name) for name in names]).view(len(names), layer.rank, layer.rank).to(x.device)

    def y_in(dtype: torch.dtype) -> Tensor:
        operands = (t.to(dtype) for t in (x, layer.weight, layer.A, R, layer.B))
        return reference.lowrank_linear(*operands, layer.scaling, index=torch.arange(len(x), device=x.device))[0]

    oracle = y_in(torch.float64)
    right = reference.relative_error(y, oracle) <= reference.allowed_error(y_in(x.dtype), oracle, x.dtype)
    return "" if right else "y"


@torch.no_grad()
def _whole_adapter(settings: Settings) -> Iterator[Row]:
    """An adapter of many modules, in bf16, brought to a slot that another had: what a user's first call waits for."""
    r = settings.ranks[0]
    where: Row = {"question": "bank", "dtype": "bf16", "direction": "forward", "mode": "eager", "r": r}
    linear = nn.Linear(max(SIZE, r), max(SIZE, r), bias=False, device=settings.device)
    with tempfile.TemporaryDirectory() as folder:
        names = _filled(Path(folder), _copies(linear), r, ADAPTERS, torch.bfloat16)
        with AdapterBank(folder) as bank:
            model, name = bank.attach(_copies(linear), 1, progress=False), cycle(names)

            def call() -> None:
                with bank.select([next(name)]):
                    pass

            passes = {"adapter": timer.prepare(lambda: [call], settings.device)}
            samples = timer.interleave(passes, settings.device, FLAT_SECONDS * settings.seconds)
            bank.detach(model)
    seconds = timer.Spread.of(samples["adapter"])
    found = _figures(samples, "adapter", settings.device, ())
    found |= {"seconds": asdict(seconds), "noisy": seconds.noisy, "bytes": 2 * MODULES * r * r}
    yield where | {"path": "adapter", "records": ADAPTERS, "modules": MODULES} | found


def _copies(linear: nn.Linear) -> nn.Sequential:
    return nn.Sequential(*(copy.deepcopy(linear) for _ in range(MODULES)))


def _filled(folder: Path, model: nn.Module, r: int, records: int, dtype: torch.dtype) -> list[str]:
    """Make a bank of random R in a folder; the names, in an order of chance."""
    attach(model, r, target_modules="all-linear", init="random", progress=False)
    names, g = [f"user-{i:07}" for i in range(records)], torch.Generator().manual_seed(0)
    with AdapterBank.create(folder, model, dtype=dtype) as bank:
        modules = [name for name, _ in bank.modules]
        for start in range(0, records, CHUNK):
            some = names[start : start + CHUNK]
            Rs = torch.randn(len(some), len(modules), r, r, generator=g) / r**0.5
            bank.add_many({name: dict(zip(modules, R, strict=True)) for name, R in zip(some, Rs, strict=True)})
    random.Random(0).shuffle(names)
    return names


def _figures(samples: dict[str, Tensor], name: str, device: torch.device, others: tuple[str, ...]) -> Row:
    row = figures(samples, name, device, others)
    return row | {"noisy": row["noisy"] or any(timer.Spread(**each).noisy for each in row["over"].values())}
