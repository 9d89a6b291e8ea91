"""LoraXSLinearLayer: a frozen linear layer with LoRA-XS adapters by name, as PEFT's tuners have them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ... import basis, parallel
from ...acceptance import aligned, mismatch
from ...adapter_contents import lasting_recipe
from ...functional import Adapter
from ...linear import LoraXSLinear, warn_of_training
from ...naming import DTYPES, FLOATS, dtype_name, label_of
from ...ops import autocast_on
from ...padded import sparing_what_trains
from ...recipe import Recipe
from ...route import check_merge, layer_output, only_moves
from ...sharding import assign, whole
from ...weights import held, is_conv1d, mergeable_weight, weight_of
from ..reference_repo.layers import translate
from .buffers import Buffers, Fingerprints, PaddedBuffers
from .config import LoraXSConfig
from .loading import check_layer, is_in_parts
from .merging import Unmerged
from .mixed import mixed_output
from .samples import MixedCalls
from .scales import Scales

REMEDY = "save_factors=True in its config (check_fingerprint=False in adapter_config.json accepts it as it is)"


class LoraXSLinearLayer(nn.Module, BaseTunerLayer, Scales):
    """A frozen linear layer with LoRA-XS adapters by name: y = base_layer(x) + sum over the active ones of s B R A x.

    The weight of base_layer is never written.  Merging replaces it and keeps the old tensor, which unmerging puts
    back: in bf16, subtracting what was added would not restore it.  `quantization_backend` (PEFT 0.20 or later)
    merges into a quantised weight and quantises the sum again.

    Attributes, each a dictionary by the adapter's name:
        loraxs_R: (r, r), trains; fp32 unless PEFT was called with autocast_adapter_dtype=False.
        loraxs_A, loraxs_B: (r, K) and (N, r), frozen, in the base layer's dtype.
        loraxs_fingerprint: (r + 8,), fp32: the singular values in A and 8 probes of B R A.
        r, lora_alpha, scaling, recipe, config.
    unchecked: names of the adapters whose R was loaded and has not been compared with A and B yet.

    With adapter_names each sample, an entry of x's first dimension, has an adapter of its own or none.  Adapters with
    the same A and B then share one pass.
    """

    adapter_layer_names = ("loraxs_R",)
    other_param_names = ("loraxs_A", "loraxs_B", "loraxs_fingerprint", "r", "lora_alpha", "scaling", "recipe", "config")
    cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting turns it off

    def __init__(self, base_layer: nn.Module, quantization_backend: Any = None) -> None:
        super().__init__()
        self.base_layer, self.quantization_backend = base_layer, quantization_backend
        self.loraxs_R = nn.ParameterDict()
        self.unchecked: set[str] = set()
        self._latest: set[str] = set()  # those in the last state dict that torch loaded
        self.loraxs_A, self.loraxs_B, self.loraxs_fingerprint = Buffers(), PaddedBuffers(), Fingerprints(self.unchecked)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.recipe: dict[str, Recipe] = {}
        self.config: dict[str, LoraXSConfig] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: Unmerged | None = None
        self._mixed_calls: MixedCalls | None = None  # while there are calls with adapter_names
        self.shares: Any = None  # as that of LoraXSLinear
        self.register_load_state_dict_post_hook(_check_what_was_loaded)
        self.train(base_layer.training)

    def add(self, name: str, adapter: LoraXSLinear, config: LoraXSConfig) -> None:
        """Take over the tensors of an adapter that was made for base_layer."""
        self.r[name], self.lora_alpha[name], self.scaling[name] = adapter.rank, adapter.alpha, adapter.scaling
        self.recipe[name], self.config[name] = adapter.recipe, config
        self.in_features, self.out_features = adapter.in_features, adapter.out_features
        self.loraxs_R[name] = adapter.R
        self.loraxs_A.register_buffer(name, adapter.A, config.save_factors)
        self.loraxs_B.register_buffer(name, adapter.B, config.save_factors)
        fingerprint = torch.zeros(adapter.rank + basis.PROBES, dtype=torch.float32, device=adapter.A.device)
        self.loraxs_fingerprint.register_buffer(name, fingerprint, config.init != "given")

    @torch.no_grad()
    def copy_adapter(self, source: str, name: str) -> None:
        """Let an adapter, if it is there, compute what another one with the same config does."""
        if name not in self.r:
            return
        self.check_fingerprints([source])
        for factors in (self.loraxs_A, self.loraxs_B):
            factors[name] = factors[source].clone()
        assign(self.loraxs_R[name], whole(self.loraxs_R[source]))
        for setting in (self.lora_alpha, self.scaling, self.recipe):
            setting[name] = setting[source]

    @torch.no_grad()
    def add_up(self, name: str, parts: Iterable[tuple[str, float]]) -> None:
        """Let an adapter, if it is there, compute the weighted sum of what others do that have the same A and B."""
        if name not in self.r:
            return
        (first, _), *_ = parts
        s, label = self.scaling[name], label_of(self.recipe[name].name)
        if not s:
            raise ValueError(f"adapters: {first!r} has lora_alpha 0 in {label}, must have another for a sum")
        self.check_fingerprints(each for each, _ in parts)
        total = sum(
            weight * self.scaling[each] / s * whole(self.loraxs_R[each]).to("cpu", torch.float64)
            for each, weight in parts
        )
        if not torch.isfinite(total.to(self.loraxs_R[name].dtype)).all():
            raise ValueError(f"weights: R of {label} would have NaN or Inf values")
        self.copy_adapter(first, name)
        self.scaling[name] = s
        assign(self.loraxs_R[name], total)

    def discard(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if name in (by_name := getattr(self, attribute)):
                del by_name[name]

    def adapter(self, name: str) -> LoraXSLinear:
        """One adapter as a LoraXSLinear that shares base_layer and all tensors with this layer."""
        A, R, B = self.loraxs_A[name], self.loraxs_R[name], self.loraxs_B[name]
        p, std = self.config[name].loraxs_dropout, self.config[name].init_std
        alpha, recipe = self.lora_alpha[name], self.recipe[name]
        adapter = LoraXSLinear(self.base_layer, A, R, B, alpha=alpha, dropout=p, init_std=std, recipe=recipe)
        adapter.scaling = self.scaling[name]  # which users set, as they do LoRA's
        return adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Straight from the dictionaries: nn.Module.__getattr__ costs more than a small product does.
        base, R = self._modules["base_layer"], self._modules["loraxs_R"]
        calls = self._mixed_calls  # once: another thread may end the last of them now
        samples = None if calls is None else calls.here()
        used = self.active_adapters if samples is None else samples.adapters
        if self.unchecked and not self._disable_adapters:
            self.check_fingerprints(used)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        active = [name for name in used if name in self.r]
        if self.merged_adapters and self.training and torch.is_grad_enabled():
            for name in self.merged_adapters:
                warn_of_training(held(R, name))
        if self._disable_adapters or self.merged_adapters or not active:
            return base(x, *args, **kwargs)
        if not self.cast_input_dtype_enabled and not autocast_on(x):
            for name in active:
                if x.dtype != (dtype := self._modules["loraxs_A"]._buffers[name].dtype):
                    label = label_of(self.recipe[name].name)
                    raise ValueError(f"x: got {x.dtype} for {label}, must be {dtype} while casting inputs is disabled")
        with self._onloaded() if "_hf_hook" in R.__dict__ else nullcontext():
            if samples is not None:
                return mixed_output(self, x, samples, active, args, kwargs)
            adapters = [self.operands(name) for name in active]
            return layer_output(base, x, adapters, self.recipe[active[0]].name, None, args, kwargs)

    @contextmanager
    def _onloaded(self) -> Iterator[None]:
        """Bring offloaded R, A and B back for one forward: accelerate does so only when their own module is called."""
        dicts = (self.loraxs_R, self.loraxs_A, self.loraxs_B)
        hooked = [each for each in dicts if hasattr(each, "_hf_hook") and not only_moves(each)]
        for each in hooked:
            each._hf_hook.pre_forward(each)
        try:
            yield
        finally:
            for each in hooked:
                each._hf_hook.post_forward(each, None)

    def operands(self, name: str) -> Adapter:
        """A, R, B, s and the dropout of an adapter, for one forward."""
        A, R, B = (self._modules[each] for each in ("loraxs_A", "loraxs_R", "loraxs_B"))
        p = self.config[name].loraxs_dropout if self.training else 0.0
        trained = held(R, name)
        trained = trained if self.shares is None else parallel.averaged(trained, self.shares)
        return A._buffers[name], trained, B._buffers[name], self.scaling[name], p

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W by W + sum of s B R A, summed in fp32 and rounded once; `unmerge` puts W back.

        The result is always checked, whatever safe_merge says: ValueError if it is not finite, TypeError if W is
        neither dense nor of a kind that PEFT can quantise again, or if base_layer has hooks that change its input or a
        forward of its own.  The layer is then as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loraxs_R]
        if not names:
            return
        self.check_fingerprints(names)
        if before := list(self.merged_adapters):
            self.unmerge()
        try:
            self._merge([*before, *names])
        except BaseException:
            if before:
                self._merge(before)
            raise

    @property
    def _requantises(self) -> bool:
        return self.quantization_backend is not None and self.quantization_backend.supports_merge

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Tensor:
        """W + sum of s B R A (N, K) of a layer that is not merged; raises as `merge` does."""
        base, label = self.base_layer, label_of(self.recipe[names[0]].name)
        if self._requantises:
            weight = weight_of(base, label)
            W, dtype = weight.read(), weight.dtype
        else:
            W = mergeable_weight(base, label)
            dtype = W.dtype
        check_merge(base, label, called=True)
        total = sum(self.adapter(name).delta_weight() for name in names).add(W).to(dtype)
        if not torch.isfinite(total).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {' and '.join(names)} seems to be broken: the "
                f"weight of {label} would have NaN or Inf values; it stays unmerged"
            )
        return total

    def _merge(self, names: list[str]) -> None:
        base, total = self.base_layer, self.merged_weight(names)
        unmerged = Unmerged(base)
        try:
            if self._requantises:
                self.quantization_backend.set_base_weight(self, total)
            else:
                # A new Parameter, since the old one may be another module's too, such as the embedding's.
                total = total.t() if is_conv1d(base) else total
                base.weight = nn.Parameter(total.contiguous(), requires_grad=False)
        except BaseException:
            unmerged.put_back(self)
            raise
        unmerged.note_changes()
        self._unmerged = unmerged
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Put the base weight back, the same tensor as before, and compute with separate adapters again.

        ValueError if that is quantised and the layer has been moved or converted since.
        """
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._unmerged.check(self.base_layer, label_of(self.recipe[self.merged_adapters[0]].name))
        self._unmerged.put_back(self)
        self._unmerged = None
        self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B R A in the layout of base_layer.weight, in the dtype of A.  ValueError if the adapter is not here."""
        if adapter not in self.r:
            label = label_of(self.recipe[next(iter(self.r))].name) if self.r else "this layer"
            raise ValueError(f"adapter {adapter!r}: is not on {label}; convert it in a model without others")
        self.check_fingerprints([adapter])
        delta = self.adapter(adapter).delta_weight().to(self.loraxs_A[adapter].dtype)
        return delta.t() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def reset_parameters(self) -> None:
        """Make A, B and R of all adapters from the base weight, for a layer that was made on the meta device."""
        for name, R in self.loraxs_R.items():
            adapter = self.adapter(name)
            adapter.reset_parameters()
            self.loraxs_A[name], self.loraxs_B[name] = adapter.A, adapter.B
            if (fingerprint := self.loraxs_fingerprint[name]).is_meta:
                self.loraxs_fingerprint[name] = torch.zeros_like(fingerprint, device=adapter.A.device)
            if R.is_meta:
                self.loraxs_R[name] = adapter.R.requires_grad_(R.requires_grad)

    @torch.no_grad()
    def check_fingerprints(self, names: Iterable[str]) -> None:
        """Check that the named adapters, if they were loaded, have the delta W that the probes in their file describe.

        If A and B differ from those of the training by the sign of singular vectors, R is corrected.  Raises
        AdapterMismatch, naming the layer, if the relative error of delta W is above 1e-3 (3e-2 for an adapter that
        brings its own A and B; plus the rounding of R in half precision).  It is raised again at every use of such an
        adapter; the layer's other adapters stay usable.
        """
        for name in sorted(self.unchecked.intersection(names)):
            A, R, B = self.loraxs_A[name], self.loraxs_R[name], self.loraxs_B[name]
            if any(t.is_meta for t in (A, R, B)):
                continue
            config = self.config[name]
            if config.check_fingerprint:
                S, probe = self.loraxs_fingerprint[name].split([self.r[name], basis.PROBES])
                entry = {"R": whole(R), "S": S, "probe": probe, "base_model": config.base_model_name_or_path}
                label = self.recipe[name].name
                if not torch.isfinite(entry["R"]).all():
                    raise ValueError(f"adapter {name!r}: R of {label_of(label)} has NaN or Inf values")
                accepted = basis.ACCEPT + torch.finfo(R.dtype).eps / 2  # R may have been rounded when it was loaded
                limit = basis.ALIGNED if config.save_factors else accepted
                R_aligned, error = aligned(entry, A, B)
                if (error > limit or not basis.same_base(S, A)) and self._make_again(name):
                    A, B = self.loraxs_A[name], self.loraxs_B[name]
                    R_aligned, error = aligned(entry, A, B)
                if error > limit or not basis.same_base(S, A):  # R = 0 makes the same delta on any base
                    if entry["R"].any() and not S.any():
                        raise ValueError(
                            f"adapter {name!r}: the fingerprint of A and B for {label_of(label)} is empty. DeepSpeed "
                            "saves it so when it gathers parameters for save_pretrained itself: save on one rank, "
                            "inside deepspeed.zero.GatheredParameters of all trained parameters"
                        )
                    recipe = self.recipe[name]
                    if config.weight_dtype in (None, recipe.weight_dtype):
                        recipe = None  # nothing is known that differs
                    else:
                        entry["recipe"] = replace(recipe, weight_dtype=config.weight_dtype)
                    raise mismatch(f"adapter {name!r}", label, entry, error, basis.singular_values(A), REMEDY, recipe)
                if error > accepted:  # in the same words for each module, so that Python shows them once
                    warnings.warn(
                        f"adapter {name!r}: its A and B were rounded to this model's {A.dtype}, so that the estimated "
                        f"relative error of delta W is more than {accepted:.0e}",
                        stacklevel=2,
                    )
                assign(R, R_aligned)
            self.unchecked.discard(name)

    def _make_again(self, name: str) -> bool:
        """Make A and B of the weight as it is now, if they are of another: files have weights of resized heads, too."""
        adapter = self.adapter(name)
        if self.config[name].save_factors or adapter.recipe.init != "svd" or self.can_make(name):
            return False
        weight = weight_of(self.base_layer, adapter.label)
        recipe = replace(adapter.recipe, rounded=(), weight_dtype=dtype_name(weight.dtype)).cast(adapter.A.dtype)
        made = recipe.round(recipe.factors(weight, adapter.rank))
        for each, t in zip((self.loraxs_A, self.loraxs_B), made, strict=True):
            each[name] = t.to(each[name])
        self.recipe[name] = recipe
        return True

    def cast_R(self, name: str, autocast_adapter_dtype: bool) -> None:
        """Convert R to fp32; or, if asked not to, to the dtype of the base weight (of A, if that is quantised).

        An R in fp64, or made by a parametrization, stays as it is.
        """
        R, W = self.loraxs_R._parameters.get(name), getattr(self.base_layer, "weight", None)
        if autocast_adapter_dtype:
            dtype = torch.float32
        else:
            dtype = W.dtype if isinstance(W, Tensor) and W.dtype in FLOATS else self.loraxs_A[name].dtype
        if R is not None and R.dtype != dtype and R.dtype != torch.float64:
            self.loraxs_R[name] = nn.Parameter(R.detach().to(dtype), requires_grad=R.requires_grad)

    def can_make(self, name: str) -> bool:
        """Whether a load makes A and B again, of the weight as it is now, as far as that can be read here."""
        if self.merged_adapters or self.loraxs_A[name].is_meta or hasattr(self.loraxs_R[name], "ds_id"):  # ZeRO-3's
            return True
        adapter = self.adapter(name)
        made, now = adapter.recipe.dtype or adapter.recipe.weight_dtype, torch.finfo(adapter.A.dtype).eps
        if adapter.recipe.init == "svd" and made and now > max(2 * basis.ACCEPT, torch.finfo(DTYPES[made]).eps):
            return False  # rounded since, which no load repeats
        return lasting_recipe(adapter).init == adapter.recipe.init

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # PEFT asks for the state dict before it says which adapter it saves; from 0.21 on it says so (tuner.py).
        checked = self.active_adapters if hasattr(BaseTuner, "_get_adapter_state_dict") else self.config
        for name, config in self.config.items():  # before PEFT writes the weights: fields may have been set since
            try:
                config.check()
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}") from error
            if name in checked:
                self.check_scaling(name, config)
        # Before the children write theirs.  What came from a file and was not checked yet is kept as it came.
        for name, R in self.loraxs_R.items():
            A, B = self.loraxs_A[name], self.loraxs_B[name]
            for each in (self.loraxs_A, self.loraxs_B):  # save_factors may have been set after the adapter was made
                each.register_buffer(name, each[name], self.config[name].save_factors)
            if name in self.unchecked or any(t.is_meta for t in (A, R, B)):
                continue
            if is_in_parts(R):  # for DeepSpeed's own checkpoints, which have the parts elsewhere
                continue
            fingerprint = torch.cat([basis.singular_values(A), basis.probes(A, whole(R), B)])
            self.loraxs_fingerprint[name] = fingerprint
            if name not in self.loraxs_R._parameters:  # for models without the parametrization that makes it
                destination[f"{prefix}loraxs_R.{name}"] = R.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        translate(state_dict, {prefix[:-1]: self}, whole_model=False)
        check_layer(self, state_dict, prefix)
        in_parts = {name for name, R in self.loraxs_R._parameters.items() if is_in_parts(R)}
        self._latest = {name for name in self.r if f"{prefix}loraxs_fingerprint.{name}" in state_dict} - in_parts
        self.unchecked |= self._latest
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> LoraXSLinearLayer:
        return super()._apply(sparing_what_trains(fn, self.base_layer, self.loraxs_A, self.loraxs_B), recurse)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mixed_calls = None
        self.loraxs_B.__class__ = PaddedBuffers  # in a pickle of an earlier version it is of the class Buffers
        self.loraxs_B._pad()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after it has loaded an adapter.  R, A and B move to the device and keep their dtypes."""
        if adapter_name not in self.loraxs_R:
            return
        if device is None:
            W = self.base_layer._parameters.get("weight")
            offloaded = W is None or hasattr(self.base_layer, "_hf_hook")
            device = (self.loraxs_A[adapter_name] if offloaded else W).device  # A may have come from a file just now
        if self.loraxs_R[adapter_name].is_meta and device.type != "meta":
            label = label_of(self.recipe[adapter_name].name)
            raise ValueError(f"adapter {adapter_name!r}: has no R for {label}")
        self.loraxs_R[adapter_name] = self.loraxs_R[adapter_name].to(device)
        for each in (self.loraxs_A, self.loraxs_B, self.loraxs_fingerprint):
            if not each[adapter_name].is_meta:
                each[adapter_name] = each[adapter_name].to(device)
        self.check_fingerprints([adapter_name])

    def extra_repr(self) -> str:
        parts = [f"{name}: rank={r}, alpha={self.lora_alpha[name]:g}" for name, r in self.r.items()]
        if self.quantization_backend is not None:
            parts.append(f"quantization_backend='{self.quantization_backend.backend_name}'")
        return ", ".join(parts)


def _check_what_was_loaded(layer: LoraXSLinearLayer, _: Any) -> None:
    layer.check_fingerprints(layer._latest)
