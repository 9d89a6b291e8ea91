"""LoraXSModel: a model with LoRA-XS adapters, as PEFT's tuners are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import _set_adapter
from torch import Tensor, nn

from ...fast_path import settle_fast_paths
from ...linear import LoraXSLinear
from ...matching import (
    embeddings,
    has_adapters,
    no_adapter,
    pattern_value,
    why_not_mixed,
)
from ...model import fill, warn_of_zeros
from ...naming import label_of
from ...recipe import Recipe
from ...svd import plan
from ...transaction import transaction
from ...weights import is_linear, is_unread_linear, unread, weight_of, weight_view
from .buffers import Fingerprints, PaddedBuffers
from .config import LoraXSConfig
from .layer import LoraXSLinearLayer
from .loading import check_before_loading
from .merging import Unmerged
from .samples import BASE, MixedCalls
from .targets import WHOLE, spell_out_all_linear, warn_of_head
from .weighted import check_sum

try:
    from peft.utils import quantization_utils
except ImportError:  # before peft 0.20, which cannot merge into quantised layers for a method from elsewhere
    quantization_utils = None

MIXABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what PEFT can run a part of a batch through


class LoraXSModel(BaseTuner):
    """A model with LoRA-XS adapters: the `base_model` of what get_peft_model(model, LoraXSConfig(...)) returns.

    A layer that stands in several places is adapted in all of them, by one R.  A and B of all layers are made
    together, as `lx.attach` makes them.  If adding, merging, unmerging, unloading or deleting an adapter fails or is
    interrupted, or if loading one fails, the model is as it was.  There is one exception: an adapter whose delta W is
    not the one it was trained with is refused after its R has been loaded.
    """

    prefix = "loraxs_"
    tuner_layer_cls = LoraXSLinearLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _sum: tuple[tuple[str, float], ...] = ()  # while an adapter is added that is the sum of others

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT, and transformers' add_adapter, have noted the adapter before this call; a failure takes that back too.
        config, loaded = self.peft_config.pop(adapter_name), getattr(model, "_hf_peft_config_loaded", False)
        if loaded and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False
        filled_in = ("target_modules", "modules_to_save", "svd_recipe", "weight_dtype")
        with transaction(self) as undo:
            undo.callback(vars(config).update, {name: copy.copy(getattr(config, name)) for name in filled_in})
            self.peft_config[adapter_name] = config
            if loaded:
                model._hf_peft_config_loaded = True
            _check_name(adapter_name)
            if has_adapters(model):
                raise ValueError(
                    "model: already has LoRA-XS adapters that lx.attach put on, which PEFT would freeze; take them off "
                    "with lx.detach(model), or start from a fresh model"
                )
            self._new: list[LoraXSLinear] = []  # those that still need A, B and R
            self._refused = no_adapter(model)
            for whole in self._trained_whole().values():
                self._refused |= {id(m): WHOLE for m in whole.modules()}
            spell_out_all_linear(config, model, self._refused)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for name, whole in self._trained_whole().items():
                for inner, module in whole.named_modules():
                    if inner and isinstance(module, (LoraXSLinearLayer, AuxiliaryTrainingWrapper)):
                        raise ValueError(
                            f"modules_to_save: matches {label_of(name)} while {label_of(f'{name}.{inner}')} has "
                            "adapters or is one of modules_to_save, too; PEFT copies it with the module, and could not "
                            "save or load both; must match modules without such parts"
                        )
            warn_of_head(config, model)
            settle_fast_paths(model)
            # TRL's reference model (DPO, KTO, GRPO, RLOO): it copies what has ".default." in its name, as R has not.
            if adapter_name == "ref" and config is self.peft_config.get("default"):
                for layer in self._layers():
                    layer.copy_adapter("default", "ref")
            elif self._sum:
                for layer in self._layers():
                    layer.add_up(adapter_name, self._sum)
            else:
                fill(model, self._new)
                if not config.inference_mode:
                    warn_of_zeros(self._new, stacklevel=3)
                if not config._from_file:  # which says what the adapter was made with
                    made = {adapter.recipe.weight_dtype for adapter in self._new}
                    config.weight_dtype = made.pop() if len(made) == 1 else None
                shares = {id(adapter.base_layer): adapter.shares for adapter in self._new}
                for layer in self._layers():
                    layer.shares = shares.get(id(layer.base_layer), layer.shares)
            del self._new, self._refused
            if all(each.hook is not check_before_loading for each in model._load_state_dict_pre_hooks.values()):
                model.register_load_state_dict_pre_hook(check_before_loading)

    def _layers(self) -> list[LoraXSLinearLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraXSLinearLayer)]

    def _check_known(self, names: str | Iterable[str]) -> None:
        """Raise a ValueError for a name that no adapter has.  PEFT merges or activates those that it finds."""
        for name in [names] if isinstance(names, str) else names:
            if name not in self.peft_config:
                raise ValueError(f"adapter names: got {name!r}, must be among {', '.join(self.peft_config)}")

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **options: Any) -> None:
        """As in PEFT, in all modules or none."""
        self._check_known(adapter_name)
        for module in self._trained_whole().values():
            module.check_set_adapter(adapter_name)  # only one adapter of several may have it
        super().set_adapter(adapter_name, *args, **options)

    @contextmanager
    def _all_or_none(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Put every layer back if one of them cannot be merged, unmerged or unloaded, or on an interruption."""
        self._check_known(names or ())
        with transaction(self) as undo:
            for layer in self._layers():
                undo.callback(Unmerged(layer.base_layer).put_back, layer)
            settings = getattr(getattr(self.model, "config", None), "__dict__", {})
            undo.callback(settings.update, dict(settings))  # PEFT unties embeddings there
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose delta W is the weighted sum of those of others, which stay as they are:

            R = sum over i of weights[i] (s_i / s) R_i

        with the config of adapters[0], and its s.  The sum is exact, to rounding, because adapters of the same modules
        with the same rank, init and svd_seed have the same A and B.  As in PEFT, the new adapter is frozen and not
        active; `set_adapter` makes it both trainable and active.

        Raises ValueError, before anything is changed, if A or B differ, an adapter has modules_to_save (which cannot be
        added up) or does not exist, adapter_name is taken, or combination_type is another of LoRA's.
        """
        names = list(adapters)
        check_sum(self, names, weights, adapter_name, combination_type)
        with transaction(self):
            self._sum = tuple(zip(names, weights, strict=True))
            self.peft_config[adapter_name] = replace(self.peft_config[names[0]])
            self.inject_adapter(self.model, adapter_name)
            for layer in self._layers():
                if adapter_name in layer.r:
                    layer.loraxs_R[adapter_name].requires_grad_(False)
            del self._sum

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **options: Any) -> None:
        """All layers or none."""
        with self._all_or_none(adapter_names):
            super().merge_adapter(adapter_names, *args, **options)

    def unmerge_adapter(self) -> None:
        """All layers or none."""
        with self._all_or_none():
            super().unmerge_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """From all layers or none; refused while it is merged, as it is by PEFT 0.21.

        If no other is active, the first of those that are left is, by their names, in all layers.
        """
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise ValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        active = self.active_adapters
        with transaction(self):
            super().delete_adapter(adapter_name)
            if adapter_name in active:  # PEFT chooses for each layer by itself, and layers have different adapters
                active = [name for name in active if name != adapter_name] or sorted(self.peft_config)[:1]
                for layer in self._layers():
                    layer.set_adapter(active)
                if active:  # else PEFT has done so
                    _set_adapter(self.model, active)
                self.active_adapter = active

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> nn.Module:
        """All layers or none: until all are merged, memory holds a second copy of the adapted weights."""
        names = options.get("adapter_names")
        with self._all_or_none(names):
            if names:  # else PEFT takes modules_to_save of the active adapter
                _set_adapter(self.model, list(names))
            model = super()._unload_and_optionally_merge(*args, **options)
            settle_fast_paths(model)
            _note_untied(model)
            return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: Any = None, **__: Any) -> Iterator[None]:
        """PEFT calls this around a forward or `generate`: with adapter_names each sample has an adapter of its own.

        Raises TypeError or ValueError, before anything runs, if this model or these names cannot be used so.
        """
        if adapter_names is None:
            yield
            return
        self._check_mixed(adapter_names)
        calls = MixedCalls.of(self)
        with calls.open(adapter_names, partial(self._tell_of, calls)):
            yield

    def _tell_of(self, calls: MixedCalls, undo: ExitStack) -> None:
        """Let the layers and `generate` know of calls with adapter_names."""
        for layer in (layers := self._layers()):
            undo.callback(setattr, layer, "_mixed_calls", None)
            layer._mixed_calls = calls
        hooks = [(self, calls.check), (self.model, calls.check)]
        for module in self._trained_whole().values():
            hooks.append((module, calls.tell))
            # PEFT 0.18 disables those that the active adapter does not have.
            undo.callback(setattr, module, "_disable_adapters", module._disable_adapters)
            module._disable_adapters = layers[0]._disable_adapters
        for module, hook in hooks:
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if expand := getattr(self.model, "_expand_inputs_for_generation", None):
            undo.callback(vars(self.model).pop, "_expand_inputs_for_generation", None)
            self.model._expand_inputs_for_generation = partial(calls.expanded, expand)

    def _check_mixed(self, names: Any) -> None:
        """Raise a TypeError or ValueError if a name is unknown, or if this model cannot mix adapters now."""
        if not (isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)):
            raise TypeError(
                f"adapter_names: got {names!r}, must be a list with one name for each sample, an adapter's or {BASE!r}"
            )
        if unknown := sorted({*names} - {BASE, *self.peft_config}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. adapter_names takes "
                f"{', '.join(self.peft_config)} and {BASE}"
            )
        layers = self._layers()
        if any(layer.merged_adapters for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        # Gradient checkpointing runs layers again in the backward, when the names are no longer known.
        again = [m for m in self.model.modules() if vars(m).get("gradient_checkpointing")]
        if any(module.training for module in [*layers, *again]):
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first")
        if why := why_not_mixed(self.model):
            raise ValueError(f"adapter_names: cannot be used here: {why}")
        for name, module in self._trained_whole().items():
            if not isinstance(module.original_module, MIXABLE):
                raise TypeError(
                    "Mixed batching is only supported for the following modules: "
                    f"{', '.join(kind.__name__ for kind in MIXABLE)}. {label_of(name)}, one of modules_to_save, is a "
                    f"{type(module.original_module).__name__}"
                )

    def _trained_whole(self) -> dict[str, AuxiliaryTrainingWrapper]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}

    def _create_and_replace(
        self,
        config: LoraXSConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base = target.base_layer if isinstance(target, LoraXSLinearLayer) else target
        if is_unread_linear(base):
            raise TypeError(f"target_modules: matches module {current_key!r}, {unread(base)}")
        if why := self._refused.get(id(target)):
            raise TypeError(f"target_modules: matches module {current_key!r} {why}")
        if isinstance(base, BaseTunerLayer) or not is_linear(base):
            raise TypeError(
                f"target_modules: matches module {current_key!r}, a {type(base).__name__}; must match only linear "
                "layers without adapters of another method; leave it out with exclude_modules"
            )
        adapter = _new_adapter(base, config, current_key)
        if isinstance(target, LoraXSLinearLayer):
            target.add(adapter_name, adapter, config)
        else:
            layer = LoraXSLinearLayer(base, _backend_of(base, self.model))
            layer.add(adapter_name, adapter, config)
            self._replace_module(parent, target_name, layer, target)
        if config.init != "given":
            self._new.append(adapter)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        for module in list(self.model.modules()):
            for name, each in module._modules.items():
                if each is child:
                    module._modules[name] = new_module

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Convert R to fp32; or, with autocast_adapter_dtype=False, to the base layer's dtype, as FSDP1 needs it.

        A and B stay in the base layer's dtype either way: in another one they would cost a separate pass.
        """
        for layer in self._layers():
            if adapter_name in layer.loraxs_R:
                layer.cast_R(adapter_name, autocast_adapter_dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: LoraXSConfig, adapter_name: str, **options: Any
    ) -> dict[str, Tensor]:
        """What is saved of an adapter.  PEFT 0.21 and later asks for it before it writes anything."""
        layers = {
            name: m for name, m in model.named_modules() if isinstance(m, LoraXSLinearLayer) and adapter_name in m.r
        }
        for layer in layers.values():
            layer.check_scaling(adapter_name, config)
        saved = super()._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, **options)
        changed = [] if config.save_factors else [m for m in layers.values() if not m.can_make(adapter_name)]
        if changed:
            warnings.warn(
                f"adapter {adapter_name!r}: A and B of {len(changed)} modules, the first "
                f"{label_of(changed[0].recipe[adapter_name].name)}, are not what its config makes of the weights as "
                "they are now: A, B or the weights were changed, loaded or rounded since. The adapter is saved with A "
                "and B (save_factors=True), and is larger for that",
                stacklevel=4,  # past get_peft_model_state_dict and save_pretrained
            )
            config.save_factors = True
        # Those of a state dict that was made before are missing there.
        for name, layer in layers.items() if config.save_factors else ():
            for factor in ("loraxs_A", "loraxs_B"):
                saved.setdefault(f"{name}.{factor}.{adapter_name}", getattr(layer, factor)[adapter_name].contiguous())
        return saved

    def reset_parameters(self) -> None:
        """Make A, B and R of all adapters, for a model that was adapted on the meta device and then got its weights."""
        for layer in self._layers():
            layer.reset_parameters()


def _new_adapter(base: nn.Module, config: LoraXSConfig, name: str) -> LoraXSLinear:
    """An adapter for one layer, still without A, B and R; how its SVD will be computed is noted in the config."""
    r = pattern_value(config.rank_pattern, name, config.r)
    options = {
        "alpha": pattern_value(config.alpha_pattern, name, config.lora_alpha),
        "dropout": config.loraxs_dropout,
        "init_std": config.init_std,
        "dtype": config.dtype and getattr(torch, config.dtype),
        "name": name,
        "fill": False,
    }
    weight = weight_of(base, label_of(name))
    if config.init == "given":
        N, K = weight.shape
        factors = (torch.zeros(*size, dtype=weight.dtype, device=weight.device) for size in ((r, K), (N, r)))
        adapter = LoraXSLinear.from_linear(base, r, init=tuple(factors), **options)
        nn.init.zeros_(adapter.R)
        return adapter
    recipe = Recipe(config.init, config.svd_seed, name)
    if config.init == "svd":
        at = f"{r} {weight.shape[0]}x{weight.shape[1]}"
        block = None if config.svd_oversample is None else r + config.svd_oversample
        asked = {"block": block, "n_iter": config.svd_n_iter}
        known = config.svd_recipe.get(at)
        if known is None or any(value not in (None, known[key]) for key, value in asked.items()):
            config.svd_recipe[at] = asdict(plan(r, weight.shape, **asked))
        recipe = replace(recipe, **config.svd_recipe[at])
    return LoraXSLinear.from_linear(base, r, init=recipe, **options)


def _note_untied(model: nn.Module) -> None:
    """If the head no longer has the weight of the embeddings, let the configurations say so, or a load ties them.

    PEFT 0.21 does that, in the outer configuration; earlier versions do not.
    """
    config = getattr(model, "config", None)
    of_text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    tied = [each for each in (config, of_text) if getattr(each, "tie_word_embeddings", False)]
    if tied:
        head, table = (getattr(embeddings(model, each), "weight", None) for each in ("output", "input"))
        holders = sum(each is table for m in model.modules() for each in m._parameters.values())
        both = isinstance(head, Tensor) and isinstance(table, Tensor)
        if both and head.data_ptr() != table.data_ptr() and holders == 1:  # else an encoder's and a decoder's are tied
            for each in tied:
                each.tie_word_embeddings = False


def _backend_of(base: nn.Module, model: nn.Module) -> Any:
    """PEFT's backend for merging into a quantised layer; None if the layer is dense or cannot be quantised again."""
    if quantization_utils is None or weight_view(base) is not None:
        return None
    try:
        return quantization_utils.resolve_quantization_backend(
            base, **quantization_utils.get_quantization_kwargs(model)
        )
    except (ImportError, ValueError):
        # This PEFT does not know this torchao, or torchao quantised the layer without transformers, so that nothing
        # says how to quantise it again.
        return None


def _check_name(name: str) -> None:
    """Refuse a name that means the base model, or by which torch's containers cannot hold a tensor."""
    taken = any(hasattr(each, name) for each in (nn.ParameterDict(), PaddedBuffers(), Fingerprints(set())))
    if not name or "." in name or name == BASE or taken:
        raise ValueError(
            f"adapter_name: got {name!r}, must be a name without a dot, not an attribute of nn.ParameterDict or PEFT's "
            f"BufferDict (which hold adapters by name), and not {BASE!r} (the base model in adapter_names)"
        )
