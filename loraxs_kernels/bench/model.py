"""What does a whole training step cost?  A model of real shapes, random weights, with every linear adapted.

One model is adapted in one way after another; the frozen model (forward, and gradients for its input alone) is timed
first and once more at the end, which tells how far the machine drifted meanwhile.
"""

from __future__ import annotations

import dataclasses
import importlib.util
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
GROSS = 0.25  # relative difference of the first step's gR, over all layers, from that of the first way measured
DRIFT = 0.03  # of the frozen model between start and end: more, and the run is noisy
STEPS = 7


def points(settings: Settings) -> int:
    return len(settings.ranks) * len(_ways(settings)) * 2


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each way to adapt, rank, and with and without activation checkpointing."""
    if importlib.util.find_spec("transformers") is None:
        raise BenchError("question: 'model' needs the package transformers: pip install transformers")
    where = {"question": "model", "model": settings.model, "dtype": settings.dtype_name, "direction": "step"}
    where |= {"sequence": settings.sequence, "T": settings.sequence * settings.batch}
    try:
        model = build(settings)
    except torch.OutOfMemoryError as error:
        yield where | failure("frozen", error)
        return
    where["blocks"] = model.config.num_hidden_layers
    for checkpointing in (False, True):
        first, gradients = None, {}
        for name in (*_ways(settings), "frozen"):
            for r in settings.ranks if name != "frozen" else (0,):
                row = where | {"path": name, "r": r, "checkpointing": checkpointing}
                try:
                    samples, facts = steps(model, name, r, checkpointing, settings, gradients)
                except Exception as error:
                    yield row | failure(name, error)
                    continue
                own = timer.Spread.of(samples)
                first = first or (own if name == "frozen" else None)
                row |= {"status": "ok", "rounds": len(samples), "noisy": own.noisy, "over": {}} | facts
                if settings.device.type == "cuda":
                    row["seconds"] = dataclasses.asdict(own)
                if first:
                    row["over"]["frozen"] = dataclasses.asdict(timer.Spread.of(samples / first.median))
                    if name == "frozen" and abs(own.median / first.median - 1) > DRIFT:
                        row["noisy"] = True
                yield row


def _ways(settings: Settings) -> list[str]:
    """The paths that make sense for a model; when `compile` is asked for, the main ones with compiled blocks too."""
    names = [name for name in settings.paths if name in ADAPTERS or name in backends.NAMES]
    if "compile" in settings.paths:
        names += [f"{name}+compile" for name in names if name != "peft-lora"]
    return names


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
    kind = AutoModelForMaskedLM if config.model_type == "roberta" else AutoModelForCausalLM
    with settings.device:
        if settings.model in MODELS:
            model = kind.from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
        else:
            model = kind.from_pretrained(Path(settings.model), dtype=settings.dtype)
    return model.to(settings.device).requires_grad_(False)


@contextmanager
def _fused(model: nn.Module, r: int, name: str) -> Iterator[nn.Module]:
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
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        changed = stack.enter_context((ADAPTERS.get(way) or partial(_fused, name=way))(model, r))
        if compiled:
            stack.enter_context(_compiled(model))
        yield changed.train()


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

    def step(self) -> None:
        self.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def steps(
    model: nn.Module, name: str, r: int, checkpointing: bool, settings: Settings, gradients: dict[int, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Time training steps of the model adapted one way: seconds of each, and what else is known.

    `gradients` keeps, for each rank, gR of the first LoRA-XS way that came by; later ones are compared with it.
    """
    with adapted(model, name, r, checkpointing) as changed:
        trainer = Trainer(changed, settings)
        trained = trainer.trained
        facts = {"loss": trainer.backward().item(), "trained": sum(p.numel() for p in trained)}
        if not math.isfinite(facts["loss"]):
            raise BenchError(f"the loss is {facts['loss']}")
        if trained and name != "peft-lora":
            gR = torch.cat([p.grad.flatten().double() for p in trained])
            facts["gR_difference"] = relative_error(gR, gradients.setdefault(r, gR))
            if not facts["gR_difference"] <= GROSS:
                raise BenchError(f"not timed, it is wrong: gR differs by {facts['gR_difference']:.2g}")
        trainer.step()
        if settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(settings.device)
        samples = torch.tensor([timer.once(trainer.step) for _ in range(STEPS)], dtype=torch.float64)
        if settings.device.type == "cuda":
            facts["peak_bytes"] = torch.cuda.max_memory_allocated(settings.device)
        del trainer, trained, changed
    release()
    return samples, facts
