"""LoraXSCallback, for transformers' Trainer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...adapter_contents import warn_of_unsaved
from ...adapter_file import save_adapter
from ...linear import LoraXSLinear
from ...matching import has_adapters, is_peft_layer
from ...reads import read_or_asked
from ...sharding import is_dtensor
from ...transaction import transaction
from .checkpoints import changing, check_checkpoint, forgive_the_frozen, save_pretrained
from .monitor import Adapter, Sizes, adapters_of, check_gradients

NEW = 1e-3  # adapters from `attach` change no weight by as much: R starts at 1e-5


class LoraXSCallback(TrainerCallback):
    """Writes checkpoints that hold R instead of the whole model, and logs three figures with every loss:

        loraxs_R_norm       (sum over modules of |R|_F^2)^(1/2)
        loraxs_delta_mean   the mean over the modules of |s B R A|_F / |W|_F
        loraxs_delta_max    its maximum

    A run resumed from such a checkpoint continues as if it had not been interrupted: to the bit, if the device's
    results are reproducible.  A model that is not a PreTrainedModel keeps Trainer's whole checkpoints, and the adapter
    file is written beside them.  In a PeftModel, PEFT itself saves only R, and the callback only logs the figures.

    With reentrant gradient checkpointing no R would get a gradient, so the output of the frozen embeddings is made to
    require grad during training.  If no R has a gradient after the first step, that is an error.  (This is not checked
    with DeepSpeed and with optimizers that step within the backward: LOMO, AdaLOMO, layerwise GaLore and APOLLO.)

    When training begins, raises ValueError if the model has no adapters or nothing in it trains, if the adapters are
    merged or sharded (FSDP, ZeRO-3), if an adapter would have no effect because something reads the weight of its layer
    without calling the layer (as TRL's fused lm_head does), or if safetensors are switched off; warns if parameters
    train that an adapter file does not hold, if no R trains, and if an R trains in half precision. When a run is
    resumed, raises ValueError if the checkpoint has no R for a module, or is the callback's and has one for a module
    without an adapter, and AdapterMismatch if its R was trained with different A and B or a different alpha.
    """

    def __init__(self) -> None:
        self._sizes: Sizes | None = None
        self._unchecked = False  # whether the gradients of R have yet to be checked
        self._undo: list[Any] = []

    def add_to(self, trainer: Any) -> None:
        """Put this callback first in a Trainer, instead of passing `callbacks=[LoraXSCallback()]`.

        Trainer calls its loggers (`report_to`) before the callbacks that it was given.  So the loggers get the three
        figures only if this callback is first.  `trainer.state.log_history` and the printed logs always have them.

        Raises ValueError if the trainer has a reference model (DPO, KTO, GRPO) that is the base model without the
        adapters that the model has: TRL loads it so where it is given no `ref_model`.
        """
        _check_reference(trainer)
        others = [c for c in trainer.callback_handler.callbacks if c is not self]
        known = len(others) < len(trainer.callback_handler.callbacks)
        trainer.callback_handler.callbacks[:] = [self, *others]
        if not known:
            self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Hook the loading of checkpoints already now: Trainer loads the one it resumes from before training begins."""
        root = extract_model_from_parallel(model, keep_torch_compile=False)
        if has_adapters(root):
            self._hook(root)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self._clean()  # after a training that was broken off
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        adapters = adapters_of(model)
        attached = has_adapters(model)
        _check(model, adapters, attached, args)
        self._sizes = Sizes(adapters)
        kept = not any(name in getattr(args, "optim", "") for name in ("lomo", "layerwise"))  # after the backward
        self._unchecked = kept and not getattr(args, "deepspeed_plugin", None)  # DeepSpeed keeps gradients elsewhere
        with transaction(model):
            if _reentrant(model):
                self._undo.append(model.get_input_embeddings().register_forward_hook(_require_grad).remove)
            if attached:
                self._hook(model)
            if attached and isinstance(model, PreTrainedModel):
                before = model.__dict__.get("save_pretrained")  # from a training that was broken off, or not ours
                if isinstance(before, functools.partial) and before.func is save_pretrained:
                    before = None
                    del model.save_pretrained
                run = Path(args.output_dir).absolute()
                save = functools.partial(save_pretrained, model, model.save_pretrained, run)
                self._undo.append(functools.partial(_put_back, model, before))
                model.save_pretrained = save

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if self._unchecked:
            self._unchecked = False
            check_gradients(adapters_of(extract_model_from_parallel(model, keep_torch_compile=False)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._sizes is not None and logs is not None and "loss" in logs:
            figures = self._sizes.figures()
            logs.update(figures)  # for the callbacks after this one
            last = state.log_history[-1] if state.log_history else {}
            if "loss" in last and last.get("step") == state.global_step:  # Trainer has put a copy of logs there
                last.update(figures)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        attached = has_adapters(model)
        if args.should_save and attached and not isinstance(model, PreTrainedModel):
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            if folder.is_dir():  # a hyperparameter search has folders of its own
                save_adapter(model, folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clean()
        self._sizes = None

    def _hook(self, model: nn.Module) -> None:
        self._undo.append(model.register_load_state_dict_pre_hook(check_checkpoint).remove)
        self._undo.append(model.register_load_state_dict_post_hook(forgive_the_frozen).remove)

    def _clean(self) -> None:
        while self._undo:
            self._undo[-1]()  # each can be done again, if this is interrupted
            self._undo.pop()


def _check(model: nn.Module, adapters: list[Adapter], attached: bool, args: TrainingArguments) -> None:
    if not adapters:
        raise ValueError("model: has no LoRA-XS adapters; lx.attach(model, ...) puts them on, before Trainer is made")
    if any(adapter.layer.seat is not None and adapter.layer.seat.put_on for adapter in adapters):
        raise ValueError(
            "model: its adapters are a bank's, must be the model's own for LoraXSCallback; leave the callback out, and "
            "train with bank.train(names), whose optimizer's state holds R"
        )
    for adapter in adapters:
        R, r = adapter.R(), adapter.layer.rank
        if (attached and is_dtensor(R)) or hasattr(R, "ds_id") or R.shape != (r, r):
            raise _sharded(f"R of module {adapter.name!r}")
    if not any(adapter.trained for adapter in adapters):
        frozen = (
            "model: no R trains; load the adapter with is_trainable=True through PEFT, or set requires_grad of R, "
            "before Trainer is made"
        )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(frozen)
        warnings.warn(frozen, stacklevel=4)
    coarse = [adapter.name for adapter in adapters if any(p.dtype.itemsize < 4 for p in adapter.trained)]
    if coarse and not getattr(args, "deepspeed_plugin", None):  # which steps in fp32, and rounds for the model
        warnings.warn(
            f"model: R of {len(coarse)} modules, the first {coarse[0]!r}, trains in half precision, in which small "
            "steps are lost. TRL converts what trains in a quantised model to bf16; once the trainer is made, and "
            "before train(), p.data = p.data.float() for each parameter p that trains takes that back",
            stacklevel=4,
        )
    read = read_or_asked(model)
    for name, m in model.named_modules():
        if not (isinstance(m, LoraXSLinear) or is_peft_layer(m)):
            continue
        if m.merged:
            undo = "lx.unmerge(model)" if attached else "model.unmerge_adapter()"
            raise ValueError(f"model: module {name!r} is merged, so its R would not train; call {undo} first")
        if why := read.get(id(m)):
            raise ValueError(f"model: module {name!r} is {why}; leave it out of target_modules")
    if not attached:
        return
    if cut := [name for name, t in changing(model) if is_dtensor(t)]:
        raise _sharded(f"{cut[0]!r}, which trains,")
    if not getattr(args, "save_safetensors", True):
        raise ValueError("args: got save_safetensors=False, must be True for LoraXSCallback")
    warn_of_unsaved(model, stacklevel=4)


def _check_reference(trainer: Any) -> None:
    """Refuse a reference model that is the base without adapters, where those of the model have a delta already."""
    if getattr(trainer, "ref_model", None) is None or trainer.state.global_step > 0:
        return
    model, reference = (
        extract_model_from_parallel(each, keep_torch_compile=False) for each in (trainer.model, trainer.ref_model)
    )
    adapters, plain = adapters_of(model), dict(reference.named_modules())
    bare = any(_same_weight(adapter.layer.base_layer, plain.get(adapter.name)) for adapter in adapters)
    if bare and (size := Sizes(adapters).figures().get("loraxs_delta_max", 0.0)) > NEW:
        raise ValueError(
            f"trainer: its ref_model is the base model without adapters, but the model's adapters change weights by up "
            f"to {size:.1e} of their size; pass ref_model= with a second model that has the same adapters, such as "
            "lx.load_adapter(fresh_base, file), or callbacks=[LoraXSCallback()], not add_to, if the base model is "
            "the reference that you want"
        )


def _same_weight(base_layer: nn.Module, layer: nn.Module | None) -> bool:
    W, other = getattr(base_layer, "weight", None), getattr(layer, "weight", None)
    if isinstance(layer, LoraXSLinear) or W is None or other is None or W.shape != other.shape:
        return False
    return not (is_dtensor(W) or is_dtensor(other)) and torch.equal(W, other.to(W.device, W.dtype))


def _sharded(what: str) -> ValueError:
    return ValueError(
        f"model: {what} is sharded, must be whole on every rank, as with DDP and ZeRO-2; under FSDP and ZeRO-3 train "
        "without LoraXSCallback and let Trainer save in their own formats"
    )


def _reentrant(model: nn.Module) -> bool:
    """Whether gradient checkpointing is reentrant, so that it needs an input that requires grad."""
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and getattr(module, "gradient_checkpointing", False):
            return getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
    return False


def _require_grad(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    output.requires_grad_(True)


def _put_back(model: PreTrainedModel, save_pretrained: Callable | None) -> None:
    if save_pretrained is None:
        model.__dict__.pop("save_pretrained", None)
    else:
        model.save_pretrained = save_pretrained
