"""What does a whole training step cost?  A model of real shapes, random weights, with every linear adapted.

One model is adapted in one way after another.  The frozen model (forward, and gradients for its input alone) is the
floor: on a GPU it is timed first and once more at the end, which tells how far the machine drifted meanwhile; on a CPU
a frozen twin takes a step after every step.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import attach, backends
from ..linear import LoraXSLinear
from ..naming import first_line
from ..reference import UnfusedLinear, relative_error
from . import BenchError, paths, plots, tables, timer
from .compare import Row, failure, figures, release
from .question import Point, Question, colour
from .request import Request
from .shapes import MODELS
from .tables import Table, over

# Half precision accumulates over a whole model; this finds another function.  The fine check is the question layer's.
GROSS = 0.1  # relative difference of the first step's gR, over all layers, from the reference layers'
STEPS = 7


class Steps:
    """What the ways share: the model, made at the first of them, the frozen one's times, the reference layers' gR."""

    def __init__(self, request: Request) -> None:
        self.request, self.lost = request, ""  # why there is no model
        self.floors: dict[tuple[str, bool], Tensor] = {}  # the first times of the frozen model, plain and compiled
        self.gR: dict[int, Tensor] = {}  # by rank

    @cached_property
    def model(self) -> nn.Module:
        return build(self.request)

    @cached_property
    def twin(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def row(self, name: str, r: int, checkpointing: bool) -> Iterator[Row]:
        row: Row = {"again": (name, checkpointing) in self.floors}
        try:
            if self.lost:
                raise BenchError(self.lost)
            row["blocks"] = self.model.config.num_hidden_layers
            samples, beside, facts = self.steps(name, r, checkpointing)
        except Exception as error:
            row |= failure(name, error)
            if "blocks" not in row:
                self.lost = row["reason"]
            yield row
            return
        if name.startswith("frozen"):
            self.floors.setdefault((name, checkpointing), samples)
        others = {"frozen": beside}
        if self.request.gpu:
            floors = ((floor, self.floors.get((floor, checkpointing))) for floor in ("frozen", "frozen+compile"))
            others = {floor: its.median() for floor, its in floors if its is not None}
        row |= figures(name, samples, others, self.request.gpu) | facts
        yield row

    def steps(self, name: str, r: int, checkpointing: bool) -> tuple[Tensor, Tensor, Row]:
        """Seconds of training steps of the model adapted one way, those of the frozen twin, what else is known.

        A LoRA-XS way whose gR strays from the reference layers' is refused.
        """
        request = self.request
        expected = self.reference_gR(r) if r else None
        with ExitStack() as stack:
            trainer = Trainer(stack.enter_context(adapted(self.model, name, r, checkpointing)), request)
            facts: Row = {"loss": trainer.backward().item(), "trained": sum(p.numel() for p in trainer.trained)}
            if not math.isfinite(facts["loss"]):
                raise BenchError(f"the loss is {facts['loss']}")
            if expected is not None and name != "peft-lora":
                facts["gR_difference"] = relative_error(trainer.gR(), expected)
                if not facts["gR_difference"] <= GROSS:
                    raise BenchError(f"not timed, it is wrong: gR differs by {facts['gR_difference']:.2g}")
            runs = [trainer.step]
            if not request.gpu:
                runs.append(Trainer(stack.enter_context(adapted(self.twin, "frozen", 0, checkpointing)), request).step)
            for run in runs:
                run()
            if request.gpu:
                torch.cuda.reset_peak_memory_stats(request.device)
            samples = torch.tensor([[timer.once(run) for run in runs] for _ in range(STEPS)], dtype=torch.float64)
            if request.gpu:
                facts["peak_bytes"] = torch.cuda.max_memory_allocated(request.device)
            del trainer, runs
        release()
        return samples[:, 0], samples[:, -1], facts

    def reference_gR(self, r: int) -> Tensor:
        """gR of every layer in one vector, as the reference layers compute it; checkpointed, to take little memory."""
        if r not in self.gR:
            with adapted(self.model, "reference", r, checkpointing=True) as changed:
                trainer = Trainer(changed, self.request)
                trainer.backward()
                self.gR[r] = trainer.gR()
        return self.gR[r]


def check(request: Request) -> Request:
    """A model it must be, and no longer a sequence than it takes."""
    if importlib.util.find_spec("transformers") is None:
        raise BenchError("question: 'model' needs the package transformers: pip install transformers")
    if request.shapes:
        raise BenchError("question: 'model' needs a model, not shapes")
    model = request.model or ("mistral-7b" if request.gpu else "tiny")
    config = _config(model)
    stated = model not in MODELS or "max_position_embeddings" in MODELS[model].config  # else it is a class's default
    longest = getattr(config, "max_position_embeddings", None) if stated else None
    if not isinstance(longest, (int, type(None))):
        raise BenchError(f"model: {model}/config.json has {longest!r} max_position_embeddings, must be an integer")
    longest = longest and longest - 2 * (config.model_type == "roberta")  # whose positions start at 2
    if request.sequence and longest and request.sequence > longest:
        raise BenchError(f"sequence: got {request.sequence}, must be at most {longest}, what {model} takes")
    sequence = request.sequence or min(2048 if request.gpu else 64, longest or 2048)
    return replace(request, model=model, sequence=sequence, batch=request.batch or (4 if request.gpu else 2))


def _config(model: str) -> Any:
    """The model's Hugging Face configuration."""
    from transformers import AutoConfig

    if model in MODELS:
        return AutoConfig.for_model(MODELS[model].model_type, **MODELS[model].config)
    try:
        config = AutoConfig.from_pretrained(Path(model))
    except Exception as error:
        raise BenchError(f"model: {model}/config.json cannot be read: {first_line(error)}") from error
    if not hasattr(config, "num_hidden_layers"):
        raise BenchError(f"model: {model}/config.json has no num_hidden_layers, it must be of one transformer")
    return config


def plan(request: Request) -> list[Point]:
    """In the order of what matters most; rank 0: none.

    When the path `compile` is asked for, every way but PEFT's follows once more with compiled blocks.
    """
    shared = Steps(request)
    where: Row = {"sequence": request.sequence, "T": request.sequence * request.batch, "direction": "step"}
    ways = [name for name in request.paths if name in ADAPTERS]
    return [
        Point(
            {**where, "path": name + suffix, "r": r, "checkpointing": checkpointing},
            partial(shared.row, name + suffix, r, checkpointing),
        )
        for suffix in (("", "+compile") if "compile" in request.paths else ("",))
        for checkpointing in (False, True)
        for name in (*ways, "frozen")
        if not (suffix and name == "peft-lora")
        for r in (request.ranks if name != "frozen" else (0,))
    ]


def build(request: Request) -> nn.Module:
    """The model, on the device, frozen."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = _config(request.model)
    config.num_hidden_layers = request.blocks or config.num_hidden_layers
    kind = AutoModelForMaskedLM if config.model_type == "roberta" else AutoModelForCausalLM
    with request.device:
        if request.model in MODELS:
            model = kind.from_config(config, dtype=request.dtype, attn_implementation="sdpa")
        else:
            model = kind.from_pretrained(Path(request.model), config=config, dtype=request.dtype)
    return model.to(request.device).requires_grad_(False)


def _fused(model: nn.Module, r: int, dtype: torch.dtype | None = None) -> nn.Module:
    attach(model, r, target_modules="all-linear", init="random", init_std=r**-0.5, dtype=dtype, progress=False)
    return model


def _unfused(model: nn.Module, r: int, dtype: torch.dtype | None = None) -> nn.Module:
    for name, layer in list(_fused(model, r, dtype).named_modules()):
        if isinstance(layer, LoraXSLinear):
            unfused = UnfusedLinear(layer)
            unfused.lora_latent.to(layer.A.dtype)
            model.set_submodule(name, unfused)
    return model


def _peft_lora(model: nn.Module, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"))


ADAPTERS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "frozen": lambda model, r: model,
    "reference-fp32": partial(_unfused, dtype=torch.float32),
    "reference": _unfused,
    "peft-lora": _peft_lora,
    "chosen": _fused,
    **dict.fromkeys(backends.NAMES, _fused),
}


@contextmanager
def adapted(model: nn.Module, name: str, r: int, checkpointing: bool) -> Iterator[nn.Module]:
    """A copy of the model, adapted one way and in training mode; it has the model's own weights."""
    model = copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})
    way, _, compiled = name.partition("+")
    # Not backend(None), which would take its backend from another way that is open: the frozen twin runs beside one.
    forced = backends.backend(way) if way in backends.NAMES else nullcontext()
    with warnings.catch_warnings(), forced:
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns of its own names
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        changed = ADAPTERS[way](model, r)
        if compiled:
            torch._dynamo.reset()
            lists = (each for each in model.modules() if isinstance(each, nn.ModuleList))
            for block in next(each for each in lists if len(each) == model.config.num_hidden_layers):
                block.compile()  # all blocks share one compilation
        yield changed.train()


class Trainer:
    """Training steps on random input: forward, backward (down to the input, in the frozen model too), AdamW."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        device, size = request.device, (request.batch, request.sequence)
        g = torch.Generator(device).manual_seed(0)
        self.model = model
        embeds = torch.randn(*size, model.config.hidden_size, generator=g, device=device)
        self.embeds = embeds.to(request.dtype).requires_grad_()
        self.labels = torch.randint(model.config.vocab_size, size, generator=g, device=device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None

    def backward(self) -> Tensor:
        loss = self.model(inputs_embeds=self.embeds, labels=self.labels, use_cache=False).loss
        loss.backward()
        self.embeds.grad = None
        return loss.detach()

    def gR(self) -> Tensor:
        """What the last backward left, of all that trains, in one vector."""
        return torch.cat([p.grad.flatten().double() for p in self.trained])

    def step(self) -> None:
        self.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


# --- what is shown


def show(report: dict[str, Any], rows: list[Row]) -> Iterator[Table]:
    for with_it, group in _by_checkpointing(rows):
        first = group[0]
        compiled = ["over it compiled"] if any("frozen+compile" in row["over"] for row in group) else []
        cost = ["tokens/s", "peak GiB"] if tables.gpu(report) else []
        lines = []
        for row in group:
            line = [row["path"] + ", again" * row["again"], str(row["r"] or tables.NO_FIGURE), f"{row['trained']:,}"]
            if cost:
                line += [f"{row['T'] / row['seconds']['median']:,.0f}", f"{row['peak_bytes'] / 2**30:.1f}"]
            lines.append([*line, over(row, "frozen"), *([over(row, "frozen+compile")] if compiled else [])])
        yield Table(
            f"A training step of {first['model']}, {first['blocks']} blocks, random weights, {first['dtype']}, "
            f"{first['T']} tokens in sequences of {first['sequence']}, {with_it} activation checkpointing",
            ["", "r", "trained", *cost, "time over the frozen model", *compiled],
            lines,
            [
                "Timed one way after another, by the host's clock. A step of the frozen model is its forward and the "
                f"gradient of its input. {tables.QUARTILES}"
            ],
        )


def _by_checkpointing(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    return [("with" if it else "without", group) for it, group in tables.grouped(rows, "checkpointing").items()]


def draw(report: dict[str, Any], rows: list[Row]) -> Iterator[plots.Plot]:
    """Time and, on a GPU, memory."""
    rows = [row for row in rows if "frozen" in row["over"] and not row["again"]]
    for with_it, group in _by_checkpointing(rows):
        times, memory = "time, as a multiple of the frozen model's", "peak memory, GiB"
        panels: dict[str, list[plots.Bar]] = {times: []}
        for row in group:
            name = f"{row['path']}, r {row['r']}" if row["r"] else row["path"]
            own = (colour(paths.PATHS, row["path"].partition("+")[0]), name)
            panels[times].append((*own, row["over"]["frozen"]))
            if "peak_bytes" in row:
                spread = dict.fromkeys(("low", "median", "high"), row["peak_bytes"] / 2**30)
                panels.setdefault(memory, []).append((*own, spread))
        first = group[0]
        title = f"A training step of {first['model']} ({first['dtype']}, T = {first['T']}), {with_it} checkpointing"
        yield plots.bars(f"step-{with_it}-checkpointing", title, panels, {times: 1})


QUESTION = Question(
    name="model",
    plan=plan,
    tables=show,
    plots=draw,
    paths=paths.PATHS,
    options=("blocks", "sequence", "batch"),
    unread=("tokens", "direction", "modes", "seconds"),
    folders=True,
    check=check,
    how="Steps: gR of the first step is compared with the reference layers' over the whole model.",
)
