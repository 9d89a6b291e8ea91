"""What does a whole training step cost?  A model of real shapes, random weights, with every linear adapted.

One model is adapted in one way after another.  The frozen model (forward, and gradients for its input alone) is the
floor: on a GPU it is timed first and once more at the end, which tells how far the machine drifted meanwhile; on a CPU
a frozen twin takes a step after every step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import attach, backends, detach
from ..linear import LoRAXSLinear
from ..reference import UnfusedLinear, relative_error
from . import BenchError, timer
from .layer import Row, failure, release
from .shapes import MODELS

if TYPE_CHECKING:
    from .settings import Settings

# Half precision accumulates over a whole model; this finds another function.  The fine check is the question layer's.
GROSS = 0.1  # relative difference of the first step's gR, over all layers, from the reference layers'
DRIFT = 0.03  # of the frozen model between start and end: more, and the run is noisy
STEPS = 7


def points(settings: Settings) -> int:
    return sum(1 for _ in _plan(settings))


def _plan(settings: Settings) -> Iterator[tuple[str, int, bool]]:
    """(way, rank, checkpointing) in the order of what matters most; rank 0: none.

    When the path `compile` is asked for, every way follows once more with compiled blocks.
    """
    ways = [name for name in settings.paths if name in ADAPTERS or name in backends.NAMES]
    for suffix in ("", "+compile") if "compile" in settings.paths else ("",):
        for checkpointing in (False, True):
            for name in (*ways, "frozen"):
                if not (suffix and name == "peft-lora"):
                    for r in settings.ranks if name != "frozen" else (0,):
                        yield name + suffix, r, checkpointing


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each way to adapt, rank, and with and without activation checkpointing."""
    where: Row = {"question": "model", "model": settings.model, "dtype": settings.dtype_name, "direction": "step"}
    where |= {"sequence": settings.sequence, "T": settings.sequence * settings.batch}
    try:
        model = build(settings)
        expected = {r: reference_gR(model, r, settings) for r in settings.ranks}
    except torch.OutOfMemoryError as error:
        yield where | failure("frozen", error)
        return
    where["blocks"] = model.config.num_hidden_layers
    gpu = settings.device.type == "cuda"
    twin = None if gpu else copy.deepcopy(model)
    floors: dict[tuple[str, bool], timer.Spread] = {}  # the frozen model's first time, plain and compiled
    for name, r, checkpointing in _plan(settings):
        first = floors.get((name, checkpointing))
        row = where | {"path": name, "r": r, "checkpointing": checkpointing, "again": first is not None}
        try:
            samples, beside, facts = steps(model, name, r, checkpointing, settings, expected.get(r), twin)
        except Exception as error:
            yield row | failure(name, error)
            continue
        own = timer.Spread.of(samples)
        if name.startswith("frozen"):
            floors.setdefault((name, checkpointing), own)
        row |= {"status": "ok", "rounds": len(samples), "noisy": own.noisy, "over": {}} | facts
        if gpu:
            row["seconds"] = dataclasses.asdict(own)
            for floor in ("frozen", "frozen+compile"):
                if measured := floors.get((floor, checkpointing)):
                    row["over"][floor] = dataclasses.asdict(timer.Spread.of(samples / measured.median))
            row["noisy"] |= first is not None and abs(own.median / first.median - 1) > DRIFT
        else:
            row["over"]["frozen"] = dataclasses.asdict(timer.Spread.of(samples / beside))
        yield row


def build(settings: Settings) -> nn.Module:
    """The model, on the device, frozen."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    if settings.model in MODELS:
        known = MODELS[settings.model]
        config = AutoConfig.for_model(known.model_type, **known.config)
        config.num_hidden_layers = settings.blocks or known.blocks
    else:
        config = AutoConfig.from_pretrained(Path(settings.model))
        config.num_hidden_layers = settings.blocks or config.num_hidden_layers
    kind = AutoModelForMaskedLM if config.model_type == "roberta" else AutoModelForCausalLM
    with settings.device:
        if settings.model in MODELS:
            model = kind.from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
        else:
            model = kind.from_pretrained(Path(settings.model), config=config, dtype=settings.dtype)
    return model.to(settings.device).requires_grad_(False)


@contextmanager
def _fused(model: nn.Module, r: int, name: str | None) -> Iterator[nn.Module]:
    attach(model, r, target_modules="all-linear", init="random", sigma=r**-0.5, progress=False)
    try:
        with backends.backend(name):
            yield model
    finally:
        detach(model)


@contextmanager
def _unfused(model: nn.Module, r: int, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    attach(model, r, target_modules="all-linear", init="random", sigma=r**-0.5, dtype=dtype, progress=False)
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRAXSLinear)}
    try:
        for name, layer in adapted.items():
            unfused = UnfusedLinear(layer)
            unfused.lora_latent.to(layer.A.dtype)
            model.set_submodule(name, unfused)
        yield model
    finally:
        for name, layer in adapted.items():
            model.set_submodule(name, layer)
        detach(model)


@contextmanager
def _peft_lora(model: nn.Module, r: int) -> Iterator[nn.Module]:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"))
    try:
        yield wrapped
    finally:
        wrapped.unload()
        model.requires_grad_(False)


@contextmanager
def _frozen(model: nn.Module, r: int) -> Iterator[nn.Module]:
    yield model


ADAPTERS: dict[str, Callable[..., Any]] = {
    "frozen": _frozen,
    "reference-fp32": partial(_unfused, dtype=torch.float32),
    "reference": _unfused,
    "peft-lora": _peft_lora,
    "chosen": partial(_fused, name=None),
}


@contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    """Every block under torch.compile: they share one compilation."""
    torch._dynamo.reset()
    blocks = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def adapted(model: nn.Module, name: str, r: int, checkpointing: bool) -> Iterator[nn.Module]:
    """The model, adapted one way, in training mode; afterwards it is as it was."""
    way, _, compiled = name.partition("+")
    with ExitStack() as stack:
        stack.callback(_restore_hooks, model.get_input_embeddings(), dict(model.get_input_embeddings()._forward_hooks))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        changed = stack.enter_context((ADAPTERS.get(way) or partial(_fused, name=way))(model, r))
        if compiled:
            stack.enter_context(_compiled(model))
        yield changed.train()


def _restore_hooks(embeddings: nn.Module, hooks: dict) -> None:
    """Checkpointing and PEFT both hook the embeddings, and lose track of each other's hooks."""
    for key in set(embeddings._forward_hooks) - set(hooks):
        del embeddings._forward_hooks[key]


class Trainer:
    """Training steps on random input: forward, backward (down to the input, in the frozen model too), AdamW."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        device, size = settings.device, (settings.batch, settings.sequence)
        g = torch.Generator(device).manual_seed(0)
        self.model = model
        embeds = torch.randn(*size, model.config.hidden_size, generator=g, device=device)
        self.embeds = embeds.to(settings.dtype).requires_grad_()
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


def reference_gR(model: nn.Module, r: int, settings: Settings) -> Tensor:
    """gR of every layer in one vector, as the reference layers compute it; checkpointed, to take little memory."""
    with adapted(model, "reference", r, checkpointing=True) as changed:
        trainer = Trainer(changed, settings)
        trainer.backward()
        return trainer.gR()


def steps(
    model: nn.Module,
    name: str,
    r: int,
    checkpointing: bool,
    settings: Settings,
    expected: Tensor | None,
    twin: nn.Module | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Time training steps of the model adapted one way: seconds of each, those of the frozen twin, what else is known.

    `expected` is `reference_gR`; a LoRA-XS way that strays from it is refused.
    """
    gpu = settings.device.type == "cuda"
    with ExitStack() as stack:
        trainer = Trainer(stack.enter_context(adapted(model, name, r, checkpointing)), settings)
        facts: dict[str, Any] = {"loss": trainer.backward().item()}
        facts["trained"] = sum(p.numel() for p in trainer.trained)
        if not math.isfinite(facts["loss"]):
            raise BenchError(f"the loss is {facts['loss']}")
        if expected is not None and name != "peft-lora":
            facts["gR_difference"] = relative_error(trainer.gR(), expected)
            if not facts["gR_difference"] <= GROSS:
                raise BenchError(f"not timed, it is wrong: gR differs by {facts['gR_difference']:.2g}")
        runs = [trainer.step]
        if twin is not None:
            runs.append(Trainer(stack.enter_context(adapted(twin, "frozen", 0, checkpointing)), settings).step)
        for run in runs:
            run()
        if gpu:
            torch.cuda.reset_peak_memory_stats(settings.device)
        samples = torch.tensor([[timer.once(run) for run in runs] for _ in range(STEPS)], dtype=torch.float64)
        if gpu:
            facts["peak_bytes"] = torch.cuda.max_memory_allocated(settings.device)
        del trainer, runs
    release()
    return samples[:, 0], samples[:, -1], facts
