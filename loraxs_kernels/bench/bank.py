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
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import reference
from ..bank import AdapterBank
from ..functional import run
from ..indexed import RowIndex
from ..model import attach
from . import BenchError, tables, timer
from .compare import Candidate, Results, Row, compare, errors, failure, figures, some
from .paths import Layer, Operands, calls, forward_and_backward
from .question import Point, Question, grid
from .request import Request
from .roofline import DIRECTIONS
from .shapes import Shape
from .tables import Table, over

SHAPES, TOKENS = (Shape(4096, 4096), Shape(11008, 4096)), (1, 16, 64, 512)  # where none are asked for
RECORDS = (1, 1_000, 100_000)
SAMPLES = 64  # in a batch on a bank, and slots of the bank
MODULES, ADAPTERS, SIZE = 224, 1_000, 64  # a bank of whole adapters: linears, records, and the linears are SIZE x SIZE
PEFT_TOKENS = 64  # rows up to which PEFT's layer is measured: it holds a LoRA for each
CHUNK = 10_000  # records in a transaction
FLAT_SECONDS = 4  # so many times the seconds of other passes: the figures are meant to part by less than 5 %

Make = Callable[[Operands, Tensor, list[int]], Layer]


def mix(name: str, T: int) -> list[int]:
    """Which of T adapters each row uses: one of them, all, or one for half of the rows and others for the rest."""
    alike = {"alike": T, "different": 0, "skewed": T - T // 2}[name]
    index = [0] * alike + list(range(bool(alike), T + bool(alike) - alike))
    random.Random(0).shuffle(index)
    return index


def _one(o: Operands, Rs: Tensor, index: list[int]) -> Layer:
    return _indexed(o, Rs[0])


def _indexed(o: Operands, Rs: Tensor, index: list[int] | None = None) -> Layer:
    Rs, laid_out = Rs.clone().requires_grad_(), index and RowIndex(index, len(Rs), Rs.device)
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
PATHS: dict[str, tuple[str, Make, str]] = {
    "one": ("alike", _one, "one adapter for all rows, called without an index"),
    "alike": ("alike", _indexed, "an index that is the same for all rows"),
    "different": ("different", _indexed, "an adapter for each row"),
    "skewed": ("skewed", _indexed, "one adapter for half of the rows, and one for each of the others"),
    "loop": ("different", _loop, "an adapter for each row, by a call for each adapter"),
    "peft": ("different", _peft, "an adapter for each row, PEFT's LoRA layer with adapter_names"),
}

APART = ("loop", "peft")  # their products of single rows are summed in other orders than those of many


def check(request: Request) -> Request:
    """Asked alone and without a model, it has shapes and tokens of its own."""
    if importlib.util.find_spec("lmdb") is None:
        raise BenchError("question: 'bank' needs the package lmdb: pip install lmdb")
    own = request.questions == ("bank",) and not request.model
    return replace(
        request,
        shapes=request.shapes or (SHAPES if own else ()),
        tokens=request.tokens or (TOKENS if own else ()),
        records=tuple(sorted(set(request.records))) or RECORDS,
    )


def plan(request: Request) -> list[Point]:
    """Layers first; then banks by their records, on the first shape, and one with adapters of many modules."""
    where = {"r": request.ranks[0], "direction": "forward", "mode": "eager"}
    directions = ("forward", "both") if request.direction == "both" else (request.direction,)
    banks = (_by_records, _whole_adapter)
    return [*grid(request, _mixed, direction=directions), *(Point(where, partial(each, request)) for each in banks)]


def _mixed(request: Request, shape: Shape, T: int, r: int, direction: str) -> Iterator[Row]:
    """Rows of different adapters in one layer, each way."""
    make = partial(operands, shape=shape, T=T, r=r, request=request)
    # For both modes:
    sets = cache(lambda: timer.in_sets(make, request.device, lambda each: each[0].bytes))
    known = cache(lambda which, apart: expected(*sets()[0], mix(which, T), apart))

    @cache
    def build(name: str) -> Candidate:
        which, make, _ = PATHS[name]
        layers = [make(o, Rs, mix(which, T)) for o, Rs in sets()]
        found = check_layer(layers[0], sets()[0][0], known(which, name in APART))
        return Candidate(partial(calls, layers, [o for o, _ in sets()], direction), found)

    for mode in request.modes:
        # PEFT's layer trains no R, no graph has what it does, and it holds a LoRA for each row.
        able = direction == "forward" and mode == "eager" and T <= PEFT_TOKENS and importlib.util.find_spec("peft")
        names = [name for name in PATHS if name != "peft" or able]
        rows = compare(request, names, sets, lambda _, name: build(name), ("one",), modes=(mode,))
        yield from ({"mode": mode} | row for row in rows)


def operands(seed: int, shape: Shape, T: int, r: int, request: Request) -> tuple[Operands, Tensor]:
    """Operands, and T random R (T, r, r)."""
    g = torch.Generator(request.device).manual_seed(seed)
    Rs = torch.randn(T, r, r, generator=g, device=request.device) / r**0.5
    return Operands.random(T, shape.N, shape.K, r, request.dtype, request.device, seed), Rs


def expected(o: Operands, Rs: Tensor, index: list[int], apart: bool = False) -> tuple[Results, Results]:
    """y and gX on some rows, and gR, from the specification: in the dtype of x, row by row if `apart`, and in fp64."""
    of, at = torch.tensor(index, device=Rs.device), some(o.x)

    def results(dtype: torch.dtype, rows: int) -> Results:
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


def check_layer(layer: Layer, o: Operands, known: tuple[Results, Results]) -> dict[str, dict[str, float]]:
    """The errors of y and gX on some rows, and of gR."""
    y, gX, *gR = forward_and_backward(layer, o)
    got = {"y": y[some(o.x)], "gX": gX[some(o.x)]}
    if gR:
        got["gR"] = gR[0].view(-1, *gR[0].shape[-2:])
    rounded, exact = ({what: each[what][: len(t)] for what, t in got.items()} for each in known)
    return errors(got, rounded, exact, o.x.dtype)


# --- banks


def _enough(records: int) -> int:
    """A bank has at least as many records as two batches of different samples, of which the slots hold one."""
    return max(records, 2 * SAMPLES)


@torch.no_grad()
def _by_records(request: Request) -> Iterator[Row]:
    """Warm and cold batches, and reading one record, each beside the bank with the fewest records."""
    shape, r = request.shapes[0], request.ranks[0]
    layer = {"N": shape.N, "K": shape.K, "T": SAMPLES}
    o = Operands.random(SAMPLES, shape.N, shape.K, r, request.dtype, request.device, seed=0)
    x, batches, reads = o.x.detach(), {}, {}
    with ExitStack() as stack:
        for n in sorted({*request.records, *map(_enough, request.records)}):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = _filled(folder, nn.Sequential(o.linear()), r, n, torch.float32)
            if n in request.records:
                bank, R = stack.enter_context(AdapterBank(folder)), torch.empty(r * r)
                reads["read", n] = _each(lambda name, bank=bank, R=R: bank.read(name, R), names)
            for path in ("warm", "cold") if n == _enough(n) else ():
                bank = stack.enter_context(AdapterBank(folder))
                model = bank.attach(nn.Sequential(o.linear()), SAMPLES, progress=False)
                if broken := _wrong_batch(bank, model, o, names[-SAMPLES:]):
                    yield layer | {"records": n} | failure(path, f"not timed, it is wrong: {broken}")
                    continue
                last = SAMPLES if path == "warm" else n - n % SAMPLES
                groups = [names[i : i + SAMPLES] for i in range(0, last, SAMPLES)]
                batches[path, n] = _each(lambda ids, model=model: model(x, adapter_ids=ids), groups)
        for ways, device in ((batches, request.device), (reads, torch.device("cpu"))):
            samples = _samples(ways, device, request)
            for (path, n), own in samples.items():
                beside = {"fewest": samples[path, min(m for p, m in samples if p == path)]}
                beside |= {"warm": samples["warm", n]} if ("warm", n) in samples else {}
                what, absolute = ({"bytes": 4 * r * r}, True) if path == "read" else (layer, request.gpu)
                yield {"records": n} | what | figures(path, own, beside, absolute)


def _each(call: Callable[[Any], Any], things: list[Any]) -> timer.Call:
    """What calls with one of the things after another, again and again."""
    things = cycle(things)
    return lambda: call(next(things))


def _samples(ways: dict[Any, timer.Call], device: torch.device, request: Request) -> dict[Any, Tensor]:
    passes = {key: timer.prepare(lambda call=call: [call], device) for key, call in ways.items()}
    return timer.interleave(passes, device, FLAT_SECONDS * request.seconds)


def _wrong_batch(bank: AdapterBank, model: nn.Sequential, o: Operands, names: list[str]) -> str:
    """What breaks the accuracy rule in a batch of different adapters, each read for itself; "": nothing."""
    (layer,), y = model, model(o.x, adapter_ids=names)
    Rs = torch.stack([bank.read(name) for name in names]).view(len(names), layer.rank, layer.rank).to(y.device)
    known = expected(replace(o, A=layer.A, B=layer.B, s=layer.scaling), Rs, list(range(len(names))))
    found = errors({"y": y[some(y)]}, *known, y.dtype)
    return ", ".join(Candidate(list, found).wrong)


@torch.no_grad()
def _whole_adapter(request: Request) -> Iterator[Row]:
    """An adapter of many modules, in bf16, brought to a slot that another had: what a user's first call waits for."""
    r = request.ranks[0]
    linear = nn.Linear(max(SIZE, r), max(SIZE, r), bias=False, device=request.device)
    with tempfile.TemporaryDirectory() as folder:
        names = _filled(Path(folder), _copies(linear), r, ADAPTERS, torch.bfloat16)
        with AdapterBank(folder) as bank:
            model = bank.attach(_copies(linear), 1, progress=False)

            def call(name: str) -> None:
                with bank.select([name]):
                    pass

            (samples,) = _samples({"": _each(call, names)}, request.device, request).values()
            bank.detach(model)
    what = {"records": ADAPTERS, "modules": MODULES, "dtype": "bf16", "bytes": 2 * MODULES * r * r}
    yield what | figures("adapter", samples, {}, True)


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


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    """Many adapters in one batch, over one adapter; then what depends on how many records a bank has."""
    mixed, banks = ([row for row in rows if of_banks == ("records" in row)] for of_banks in (False, True))
    mixed = sorted(mixed, key=itemgetter("direction", "T", "N", "K", "r"))
    names = tables.present(PATHS, mixed)
    for mode, group in tables.grouped(mixed).items():
        said = (row | {"direction": DIRECTIONS[row["direction"]]} for row in group)
        columns = [(name, name, partial(over, other="one")) for name in names if name != "one"]
        notes = [
            *(f"{name}: {PATHS[name][2]}." for name in names),
            tables.ratios_to("one"),
        ]
        points = tables.labelled(said, "{dtype} {direction}, T {T}, {N} x {K}, r {r}")
        yield tables.compared(f"One layer, T rows of different adapters, {mode}", points, columns, *notes)
    lines = []
    for row in banks:
        size = f" of {row['bytes'] / 1024:g} KiB" if "bytes" in row else ""
        which = f" {row['dtype']}" if row["path"] in ("warm", "cold") else ""
        took = tables.quartiles(row["seconds"], 3, scale=1e3) if "seconds" in row else tables.NO_FIGURE
        what = f"{row['path']}{which}, {row['records']:,} records{size}"
        lines.append([what, took, *(over(row, other) for other in ("fewest", "warm"))])
    if lines:
        notes = (
            f"warm: select {SAMPLES} names that are all in slots, and run one layer. cold: the same, with none of them "
            f"in a slot. read: read and check one record. adapter: select one name, in no slot, of {MODULES} modules. "
            f"The files are in the page cache. {tables.QUARTILES}",
        )
        yield Table("A bank, by its records", ["", "ms", "over the fewest records", "over warm"], lines, notes)


QUESTION = Question(
    name="bank",
    plan=plan,
    tables=show,
    options=("records",),
    check=check,
    how="Banks: random R; every path is checked against an fp64 oracle first, and all take turns.",
)
