"""transformers' Trainer, and TRL's, on models from `attach`: checkpoints of R alone, and how far R has moved.

    trainer = Trainer(model=lx.attach(model, 16, ...), ..., callbacks=[LoraXSCallback()])
    trainer.train(resume_from_checkpoint=True)

What a checkpoint then holds beside the state of optimizer, schedule and random numbers:

    adapter.safetensors   an adapter file, for `lx.load_adapter`
    model.safetensors     what Trainer itself loads, by the names in the model: every tensor that training may change,
                          and for each module a fingerprint of A and B, so that R never resumes on another basis

and no config.json, so that from_pretrained refuses such a folder and does not make a model out of R alone.

Trainer saves and loads through `model.save_pretrained` and `model.load_state_dict`; both are taught what is above, for
the checkpoints of this run alone, and both are as they were when training ends.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from .. import basis
from ..adapter_file import AdapterMismatch, save_adapter
from ..files import write_atomically
from ..linear import LoRAXSLinear
from ..transaction import transaction
from ..weights import is_dtensor, weight_of, whole

ADAPTER_NAME = "adapter.safetensors"
FINGERPRINT = "loraxs_basis"  # the last part of a fingerprint's name in model.safetensors


class LoraXSCallback(TrainerCallback):
    """Checkpoints that hold R and not the base model, and three figures beside every logged loss:

        loraxs_R_norm       (sum over modules of |R|_F^2)^(1/2)
        loraxs_delta_mean   |s B R A|_F / |W|_F, its mean over the modules
        loraxs_delta_max    and its maximum

    A run that is resumed from such a checkpoint continues as if it had not been interrupted, to the bit where the
    device computes alike.  Models that are no PreTrainedModel keep Trainer's whole checkpoints, with the adapter file
    beside them.  With LoRA-XS as a PEFT method PEFT saves, R alone already, and the figures are what is left to do.

    With reentrant gradient checkpointing the output of the frozen embeddings is made to require grad while training
    lasts, without which no R would get a gradient; if none does at the first step, that is an error.

    Raises, when training begins: ValueError where the model has no adapters, or they are merged or sharded (FSDP,
    ZeRO-3), or safetensors are switched off.  Warns of parameters that train and that no adapter file would hold.
    While resuming: ValueError where the checkpoint has no R for a module, AdapterMismatch where it is of another basis.
    """

    def __init__(self) -> None:
        self._sizes: _Sizes | None = None
        self._unchecked = False  # whether the gradients of R are still to be looked at
        self._undo: list[Any] = []

    def add_to(self, trainer: Any) -> None:
        """Put this callback before all others of a Trainer, in place of `callbacks=[LoraXSCallback()]`.

        Trainer calls its reporters (`report_to`) before the callbacks it is given; only from here do they get the
        three figures, which are in `trainer.state.log_history` and the printed logs either way.
        """
        others = [c for c in trainer.callback_handler.callbacks if c is not self]
        known = len(others) < len(trainer.callback_handler.callbacks)
        trainer.callback_handler.callbacks[:] = [self, *others]
        if not known:
            self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Trainer resumes before training begins, so what checks a checkpoint has to be there now."""
        root = extract_model_from_parallel(model, keep_torch_compile=False)
        if any(isinstance(m, LoRAXSLinear) for m in root.modules()):
            self._hook(root)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self._clean()  # of a training that was given up
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        adapters = _adapters(model)
        attached = any(isinstance(m, LoRAXSLinear) for m in model.modules())
        _check(model, adapters, attached, args)
        self._sizes = _Sizes(adapters)
        self._unchecked = not getattr(args, "deepspeed_plugin", None)  # DeepSpeed keeps gradients elsewhere
        with transaction(model):
            if _reentrant(model):
                self._undo.append(model.get_input_embeddings().register_forward_hook(_require_grad).remove)
            if attached:
                self._hook(model)
            if attached and isinstance(model, PreTrainedModel):
                before = model.__dict__.get("save_pretrained")  # somebody else's, or of a training that was given up
                if isinstance(before, functools.partial) and before.func is _save_pretrained:
                    before = None
                    del model.save_pretrained
                run = Path(args.output_dir).absolute()
                save = functools.partial(_save_pretrained, model, model.save_pretrained, run)
                self._undo.append(functools.partial(_put_back, model, before))
                model.save_pretrained = save

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if self._unchecked:
            self._unchecked = False
            _check_gradients(_adapters(extract_model_from_parallel(model, keep_torch_compile=False)))

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
        attached = any(isinstance(m, LoRAXSLinear) for m in model.modules())
        if args.should_save and attached and not isinstance(model, PreTrainedModel):
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            if folder.is_dir():  # a hyperparameter search has folders of its own
                save_adapter(model, folder / ADAPTER_NAME)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clean()
        self._sizes = None

    def _hook(self, model: nn.Module) -> None:
        self._undo.append(model.register_load_state_dict_pre_hook(_check_checkpoint).remove)
        self._undo.append(model.register_load_state_dict_post_hook(_forgive_the_frozen).remove)

    def _clean(self) -> None:
        while self._undo:
            self._undo[-1]()  # each can be done again, if this is interrupted
            self._undo.pop()


@dataclass
class _Adapter:
    """One adapter, from `attach` or of the PEFT method."""

    name: str
    layer: LoRAXSLinear
    R: Callable[[], Tensor]  # as it is now
    trained: list[nn.Parameter]  # R, or what a parametrization makes it of


def _adapters(model: nn.Module) -> list[_Adapter]:
    found = []
    for name, m in model.named_modules():
        if isinstance(m, LoRAXSLinear):
            trained = [p for p in m.parameters() if p.requires_grad]
            found.append(_Adapter(name, m, functools.partial(getattr, m, "R"), trained))
        elif hasattr(m, "loraxs_R"):  # LoraXSLinearLayer, told without importing peft
            for each in (each for each in m.active_adapters if each in m.loraxs_R):
                R = functools.partial(m.loraxs_R.__getitem__, each)
                found.append(_Adapter(f"{name}.{each}", m.adapter(each), R, [p for p in [R()] if p.requires_grad]))
    return found


class _Sizes:
    """|R| and |s B R A| / |W| of all adapters, from what never changes: A A^T, B^T B and |W|.

    |B R A|_F^2 = tr(R^T (B^T B) R (A A^T)),  r x r throughout
    """

    @torch.no_grad()
    def __init__(self, adapters: list[_Adapter]) -> None:
        self.groups: dict[tuple, list[tuple[_Adapter, Tensor, Tensor, Tensor]]] = {}
        for adapter in adapters:
            layer = adapter.layer
            A, B = layer.A.double(), layer.B.double()
            try:
                W = weight_of(layer.base_layer, layer.label).read()
            except TypeError:  # factors can be given to a layer that cannot be read
                size = A.new_tensor(torch.nan)
            else:
                size = torch.linalg.vector_norm(W, dtype=torch.float64)
                size = size.where(size > 0, torch.nan)
            record = (adapter, A @ A.t(), B.t() @ B, layer.scaling / size.to(A.device))
            self.groups.setdefault((layer.rank, A.device), []).append(record)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        squares, ratios = [], []
        for group in self.groups.values():
            adapters, *columns = zip(*group, strict=True)
            R = torch.stack([whole(adapter.R()).double() for adapter in adapters])
            G_A, G_B, scale = map(torch.stack, columns)
            squares.append(R.square().sum().cpu())
            deltas = (R.mT @ G_B @ R * G_A).sum((1, 2)).clamp(min=0).sqrt()
            ratios.append((deltas * scale)[~scale.isnan()].cpu())
        ratios = torch.cat(ratios)
        figures = {"loraxs_R_norm": float(sum(squares).sqrt())}
        if len(ratios):
            figures |= {"loraxs_delta_mean": float(ratios.mean()), "loraxs_delta_max": float(ratios.max())}
        return figures


def _check(model: nn.Module, adapters: list[_Adapter], attached: bool, args: TrainingArguments) -> None:
    if not adapters:
        raise ValueError("model: has no LoRA-XS adapters; lx.attach(model, ...) puts them on, before Trainer is made")
    for adapter in adapters:
        R, r = adapter.R(), adapter.layer.rank
        if adapter.layer.merged:
            raise ValueError(
                f"model: module {adapter.name!r} is merged, so that its R would not train; lx.unmerge(model) first"
            )
        if (attached and is_dtensor(R)) or hasattr(R, "ds_id") or R.shape != (r, r):
            raise _sharded(f"R of module {adapter.name!r}")
    if not attached:
        return
    if cut := [name for name, t in _changing(model) if is_dtensor(t)]:
        raise _sharded(f"{cut[0]!r}, which trains,")
    if not getattr(args, "save_safetensors", True):
        raise ValueError("args: got save_safetensors=False, must be True for LoraXSCallback")
    kept = {id(p) for adapter in adapters for p in adapter.layer.parameters()}
    for m in model.modules():
        if attachment := m.__dict__.get("loraxs"):  # where attach was called
            kept |= {id(p) for saved in attachment.modules_to_save for p in m.get_submodule(saved).parameters()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        warnings.warn(
            f"model: {len(lost)} parameters train, the first {lost[0]!r}, that no adapter file holds; checkpoints to "
            "resume from do. Name their modules in attach(..., modules_to_save=[...])",
            stacklevel=3,
        )


def _sharded(what: str) -> ValueError:
    return ValueError(
        f"model: {what} is sharded, must be whole on every rank, as with DDP and ZeRO-2; under FSDP and ZeRO-3 train "
        "without LoraXSCallback and let Trainer save in their own formats"
    )


def _check_gradients(adapters: list[_Adapter]) -> None:
    """No R with a gradient means that nothing but a head would train, and the loss may fall all the same."""
    trained = [adapter for adapter in adapters if adapter.trained]
    without = [adapter.name for adapter in trained if all(p.grad is None for p in adapter.trained)]
    if trained and len(without) == len(trained):
        raise RuntimeError(
            "model: no R got a gradient in the first step. Reentrant gradient checkpointing does that where the inputs "
            'of the checkpointed layers need none: use gradient_checkpointing_kwargs={"use_reentrant": False}, or '
            "make the embeddings' output require grad"
        )
    if without:
        warnings.warn(
            f"model: R of {len(without)} of {len(trained)} modules, the first {without[0]!r}, got no gradient in the "
            "first step (as experts that no token has reached)",
            stacklevel=3,
        )


def _reentrant(model: nn.Module) -> bool:
    """Whether activations are checkpointed the old way, which needs an input with a gradient."""
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


def _save_pretrained(
    model: PreTrainedModel,
    whole_model: Callable,
    run: Path,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """model.save_pretrained while training: R alone into a checkpoint of this run, the whole model anywhere else."""
    folder = Path(save_directory).absolute()
    of_run = run in folder.parents and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)
    if not of_run or not any(isinstance(m, LoRAXSLinear) for m in model.modules()):  # detached after it was given up
        return whole_model(save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
    if is_main_process:
        # The names are those of the model that Trainer has, which a user may have compiled.
        compiled = state_dict is not None and all(key.startswith("_orig_mod.") for key in state_dict)
        tensors = {name: t.detach().cpu().contiguous() for name, t in _changing(model)}
        for name, layer in model.named_modules():
            if isinstance(layer, LoRAXSLinear):
                tensors[f"{name}.{FINGERPRINT}"] = basis.probes(
                    layer.A, basis.mixing(layer.rank, layer.A.device), layer.B
                ).cpu()
        tensors = {("_orig_mod." if compiled else "") + name: t for name, t in tensors.items()}
        write_atomically(folder / SAFE_WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
        save_adapter(model, folder / ADAPTER_NAME)
    return None


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model that training may change, each once: parameters that train, buffers but A and B."""
    frozen = {id(b) for layer in model.modules() if isinstance(layer, LoRAXSLinear) for b in layer.buffers()}
    saved = model.state_dict().keys()  # buffers can be left out of it
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in model.named_buffers() if id(b) not in frozen and name in saved)


@torch.no_grad()
def _check_checkpoint(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before Trainer loads one, and not strictly: what trains must be in it, and A and B, which are not, the same."""
    named = list(module.named_parameters(remove_duplicate=False))  # a tied one is there by one of its names
    present = {id(p) for name, p in named if prefix + name in state_dict}
    for name, p in named:
        if p.requires_grad and id(p) not in present:
            raise ValueError(f"resume_from_checkpoint: the checkpoint has no values for {name!r}, which trains")
        t = state_dict.get(prefix + name)
        if p.requires_grad and t is not None and not (t.shape == p.shape and torch.isfinite(t).all()):
            raise ValueError(
                f"resume_from_checkpoint: {name!r} has shape {tuple(t.shape)} in the checkpoint, or NaN or Inf values; "
                f"must be finite, of shape {tuple(p.shape)}"
            )
    for name, layer in module.named_modules():
        if not isinstance(layer, LoRAXSLinear):
            continue
        expected = state_dict.pop(f"{prefix}{name}.{FINGERPRINT}", None)
        if expected is None:  # a whole model, A and B included
            continue
        fits = expected.shape == (basis.PROBES,)
        R = basis.mixing(layer.rank, layer.A.device)
        error = basis.residual(expected, layer.A, R, layer.B) if fits else float("inf")
        if error > basis.ACCEPT:
            raise AdapterMismatch(
                f"resume_from_checkpoint: A and B of module {name!r} are not those of the checkpoint (relative error "
                f"{error:.1e}, must be at most {basis.ACCEPT:.0e}). Attach to the same weights, with the same seed"
            )


def _forgive_the_frozen(module: nn.Module, keys: Any) -> None:
    """After it: that nothing frozen was there, exactly, is as it should be and no reason for a warning."""
    absent = module.state_dict().keys() - {name for name, _ in _changing(module)}
    for prefix in ("", "_orig_mod."):
        if set(keys.missing_keys) == {prefix + name for name in absent}:
            keys.missing_keys.clear()
