"""LoraXSLinear: a frozen linear layer with its LoRA-XS adapter, as an nn.Module."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import is_tensor_like

from . import parallel
from .acceptance import check_resumed
from .backends import forced
from .exact_matmul import exact_matmul
from .naming import DTYPES, FLOATS, Former, aliases, as_dtype, dtype_name, label_of, renamed_attribute
from .padded import PaddedB, sparing_what_trains
from .recipe import INITS, Factors, Recipe, check, check_given, check_range, check_rank
from .route import check_merge, layer_output
from .sharding import assign
from .svd import NotFinite
from .weights import held, is_conv1d, is_still_plain, mergeable_weight, weight_of


class LoraXSLinear(PaddedB):
    """y = W x + s B R A x (+ bias): W, A, B and bias are frozen, R (r x r, fp32) trains; s = alpha / r.

    Wraps the layer that it adapts (`base_layer`: an nn.Linear, a transformers Conv1D, or any layer that maps (..., K)
    to (..., N) linearly).  `base_layer` is frozen, and nothing else of it changes.  One operation computes the whole
    layer if W is a frozen dense tensor.  Otherwise (a quantised weight, a hooked or overridden forward, a W that
    trains, active dropout) base_layer computes its own output, and the delta is added to it.  Hooks of accelerate's
    device_map that only move x and y between devices do not prevent the one operation.

    Attributes:
        A (r, K), B (N, r): frozen buffers, by default in the dtype of W.
        R (r, r): the Parameter that trains, or what a parametrization (torch.nn.utils.parametrize) makes.
        rank, alpha, dropout, init_std, recipe: as given; scaling: alpha / rank.
        weight, bias: those that the layer computes with, in base_layer's layout; weight is W + s B R A while merged.

    `.to()` and `.half()` leave R in fp32 (or fp64): its steps are smaller than bf16 can hold.  If r is not a multiple
    of 16, B is a view of wider storage (padding.py), and a state dict holds a contiguous copy of B.  To change B, write
    to the buffer, not to the tensor in a state dict.  While merged, the state dict of the layer has only `weight` and
    `bias`.
    """

    base_layer: nn.Module
    A: Tensor
    B: Tensor
    R: nn.Parameter
    merged_weight: Tensor  # (N, K), only while merged: accelerate knows no buffers that are None
    _trained: frozenset[str] | None = None  # the parameters of base_layer that trained before; None: not known
    _coarsest: torch.dtype | None = None  # the least precise dtype that the base weight has had since
    _as_made: bool | None = True  # whether the recipe makes these A and B; None: they are from elsewhere, to be checked
    # Set by an adapter bank: computes with the adapters that the samples of a batch have selected (bank/seat.py).
    seat: Any = None
    # The mesh over which FSDP2 shares out the batch, if it has cut the base layer and does not know R (parallel.py).
    shares: Any = None

    @aliases(sigma=Former("init_std"))
    def __init__(
        self,
        base_layer: nn.Module,
        A: Tensor,
        R: Tensor,
        B: Tensor,
        *,
        alpha: float,
        dropout: float = 0.0,
        init_std: float = 1e-5,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.R = nn.Parameter(R)
        self.rank, self.alpha, self.scaling = R.shape[0], alpha, alpha / R.shape[0]
        self.dropout, self.init_std, self.recipe = dropout, init_std, recipe
        self._coarsest = dense_dtype(base_layer)
        if A.is_meta:
            self._as_made = None
        self.train(base_layer.training)

    sigma = renamed_attribute("sigma", "init_std")

    def __setstate__(self, state: dict) -> None:
        if "sigma" in state:  # a pickle of an earlier version
            state = {"init_std" if key == "sigma" else key: value for key, value in state.items()}
        super().__setstate__(state)

    @classmethod
    @aliases(r="rank", lora_alpha="alpha", sigma=Former("init_std"))
    @torch.inference_mode(False)  # or R could never train
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str | Factors | Recipe = "svd",
        init_std: float = 1e-5,
        seed: int = 0,
        n_iter: int | None = None,
        dtype: torch.dtype | str | None = None,
        name: str = "",
        fill: bool = True,
    ) -> LoraXSLinear:
        """Adapt one linear layer; it is frozen and kept as `base_layer`.

        Args:
            linear: nn.Linear or transformers' Conv1D, dense, quantised or sharded (`weights.weight_of` lists the
                kinds), or of a type that `register_weight_reader` was called for; with init=(A, B) any layer that
                maps (..., K) to (..., N) linearly.
            rank: r, 1 <= r <= min(N, K) (any r >= 1 if A and B are not from the SVD).
            alpha: s = alpha / rank; None: alpha = rank, s = 1.
            dropout: the probability of dropout on the adapter's input, while training.
            init: "svd", "random" (Kaiming uniform A and B), the pair (A, B), or a whole Recipe that makes them, which
                has its own seed and n_iter, and a dtype that is used if none is given here.
            init_std: R ~ N(0, init_std^2) at the start.
            seed: for the SVD's start, R, and random A and B; layers with the same seed and different names get a
                different R, and different random A and B.
            n_iter: as in `truncated_svd`.
            dtype: of A and B; None: the weight's, or for a quantised layer the dtype in which it computes.  With a
                dtype that differs from the weight's, the delta costs one more pass over y.
            name: the layer's name in its model, also used in errors.
            fill: False leaves A, B and R empty until `reset_parameters` is called.

        If the weight is on the meta device, A, B and R have only shapes; call `reset_parameters` once the weight is
        loaded.  Until then a call is a ValueError, or returns NaN if `to_empty` has been called.

        Raises TypeError or ValueError, naming the layer, before anything is changed.
        """
        label = label_of(name)
        check_rank(rank, label)
        alpha = rank if alpha is None else alpha
        for argument, value in {"alpha": alpha, "dropout": dropout, "init_std": init_std, "seed": seed}.items():
            check(argument, value, label)
        dtype = as_dtype("dtype", dtype, FLOATS, label)
        if not isinstance(linear, nn.Module):
            raise TypeError(f"linear: got a {type(linear).__name__}, must be an nn.Linear or Conv1D")
        if isinstance(linear, LoraXSLinear):
            raise ValueError(f"{label} already has a LoRA-XS adapter; detach it first")
        unknown = init.init == "given" if isinstance(init, Recipe) else isinstance(init, str) and init not in INITS
        if unknown:
            raise ValueError(f'init: got {init!r} for {label}, must be "svd", "random" or a pair (A, B)')
        given, recipe = None, init
        if not isinstance(init, Recipe):
            given = None if isinstance(init, str) else tuple(init) if isinstance(init, Iterable) else (init,)
            recipe = Recipe("given" if given else init, seed, name, n_iter=n_iter if init == "svd" else None)
        try:
            W = weight_of(linear, label)
        except TypeError:
            if not given:
                raise
            W = None  # A and B can be given even for a weight that cannot be read
        if given:
            check_given(given, rank, None if W is None else W.shape, label)
            dtype = dtype or (given[0].dtype if W is None else W.dtype)
            device = given[0].device if W is None else W.device
            A, B = (t.detach().to(device, dtype, copy=True).contiguous() for t in given)
        else:
            N, K = W.shape
            if recipe.init == "svd":
                check_rank(rank, label, (N, K))
            dtype, recipe = dtype or recipe.stored_in(W.dtype), recipe.pinned(rank, (N, K))
            A, B = (torch.empty(*size, dtype=dtype, device=W.device) for size in ((rank, K), (N, rank)))
        of_weight = None if W is None else W.dtype
        kept = None if of_weight in (None, dtype) else dtype_name(dtype)
        recipe = replace(recipe, dtype=kept, weight_dtype=of_weight and dtype_name(of_weight)).cast(dtype)
        R = torch.empty(rank, rank, dtype=torch.promote_types(A.dtype, torch.float32), device=A.device)
        layer = cls(
            linear, A, R, B, alpha=float(alpha), dropout=float(dropout), init_std=float(init_std), recipe=recipe
        )
        if fill and not A.is_meta:
            layer.reset_parameters()
        layer._trained = frozenset(name for name, p in linear.named_parameters() if p.requires_grad)
        linear.requires_grad_(False)
        return layer

    @torch.no_grad()
    def reset_parameters(self, factors: Factors | None = None) -> None:
        """Compute A and B again from the weight as it is now, by the layer's recipe, and draw R again.

        A quantised weight is dequantised, and a sharded one gathered, for this call only; if the weight is sharded, all
        ranks must call.  If `factors` is given, it is the pair (A, B), and nothing is computed.  A and B that were
        given to `from_linear` stay as they are.  What of A, B and R is on the meta device is made anew on the weight's
        device.  ValueError if the weight is on the meta device, or A and B that were given are; TypeError or ValueError
        for `factors` that do not fit.
        """
        if factors is not None:
            check_given(factors, self.rank, (self.out_features, self.in_features), self.label, "factors")
        elif self.recipe.init != "given" or self.A.is_meta or self.B.is_meta:
            weight = weight_of(self.base_layer, self.label)
            if weight.device.type == "meta":
                raise ValueError(f"{self.label}: its weight is on the meta device, must be loaded first")
            try:
                factors = self.recipe.factors(weight, self.rank)
            except NotFinite as error:
                raise ValueError(f"{self.label}: {error}") from error
        if any(t.is_meta for t in (self.A, self.B, self.R)):
            device = self.A.device if factors is None else factors[0].device
            self._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t, recurse=False)
        if factors is not None:
            self.set_factors(*factors)
        self.reset_R()

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Store A and B that were just made, rounded as the recipe says."""
        self._as_made = True
        for factor, t in zip((self.A, self.B), self.recipe.round((A, B)), strict=True):
            factor.copy_(t)

    @torch.no_grad()
    def reset_R(self) -> None:
        """Draw R again, for an A and B that are made: ValueError where their dtype could not hold them."""
        check_range((self.A, self.B), self.label)
        assign(self.R, self.recipe.initial_R(self.rank, self.init_std))

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor):
            x = kwargs.pop("input", None) if x is None else x  # as nn.Linear calls it
            if not is_tensor_like(x):
                found = "no x" if x is None else f"x of type {type(x).__name__}"
                raise TypeError(f"{self.label}: got {found}, must be a tensor of shape (..., {self.in_features})")
        return self.own_output(x, args, kwargs) if self.seat is None else self.seat.output(self, x, args, kwargs)

    def own_output(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """y by the layer's own R."""
        # Straight from the dictionaries: nn.Module.__getattr__ costs more than a small product does.
        base, buffers = self._modules["base_layer"], self._buffers
        if "merged_weight" in buffers:  # more arguments are a TypeError, as for nn.Linear
            if self.training and torch.is_grad_enabled():
                warn_of_training(held(self, "R"))
            return F.linear(x, self._merged(), base.bias, *args, **kwargs)
        p = self.dropout if self.training else 0.0
        A, R, B = buffers["A"], held(self, "R"), buffers["B"]
        if self.shares is not None:
            R = parallel.averaged(R, self.shares)
        return layer_output(base, x, ((A, R, B, self.scaling, p),), self.recipe.name, None, args, kwargs)

    @property
    def label(self) -> str:
        """What errors call this layer."""
        return label_of(self.recipe.name)

    @property
    def merged(self) -> bool:
        """Whether the adapter is part of the weight that the forward uses."""
        return "merged_weight" in self._buffers

    def _merged(self) -> Tensor:
        """W + s B R A (N, K) while merged; RuntimeError if code has quantised W, for example, which is not used now."""
        if not is_still_plain(base := self._modules["base_layer"]):
            raise RuntimeError(
                f"{self.label}: its base layer, now a {type(base).__name__}, was quantised, pruned or parametrized "
                "while its adapter was merged, and the merged weight was not; take the adapters off before that, with "
                "lx.detach(model, merge=True)"
            )
        return self._buffers["merged_weight"]

    @property
    def weight(self) -> Tensor:
        if not self.merged:
            return self.base_layer.weight
        return self._merged().t() if is_conv1d(self.base_layer) else self._merged()

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @out_features.setter
    def out_features(self, n: int) -> None:  # transformers sets it where it ties weights
        if n != self.out_features:
            raise ValueError(f"{self.label}: got out_features {n}, must be {self.out_features} with its adapter")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name not in ("weight", "bias"):
            super().register_parameter(name, param)
        elif param is not getattr(self.base_layer, name, None):  # which transformers may tie again
            raise ValueError(
                f"{self.label}: got another {name}, must keep that of its base layer while it has an adapter; detach, "
                "set it, and attach again"
            )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """delta W = s B R A, of shape (N, K), in fp32 (fp64 for fp64 layers), whatever autocast and TF32 are set to."""
        makers_of_R(self)
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        with exact_matmul():
            return self.B.to(dtype) @ (self.scaling * self.R.to(dtype) @ self.A.to(dtype))

    def merge(self) -> None:
        """Compute with W + s B R A from now on; W itself is kept, so that `unmerge` restores it to the bit.

        Holds a second copy of the weight while merged.  Raises ValueError if the merged weight would not be finite, and
        TypeError if W is not a dense tensor, or if the base layer has hooks or a forward of its own, since it is not
        called while merged; the layer is then as it was.
        """
        self.merge_to_be(called=False)

    @torch.inference_mode(False)  # or what is merged could never be trained through
    @torch.no_grad()
    def merge_to_be(self, *, called: bool) -> None:
        """`merge`; called: whether the base layer will be called with the merged weight, as it is after `detach`."""
        if not self.merged:
            if self.seat is not None:
                self.seat.check_merge(self)
            W, delta = mergeable_weight(self.base_layer, self.label), self.delta_weight()
            # Added in fp32, and rounded to W's dtype once.
            merged = delta.to(torch.promote_types(delta.dtype, W.dtype)).add_(W).to(W.dtype)
            if not torch.isfinite(merged).all():
                raise ValueError(f"{self.label}: the merged weight has NaN or Inf values; the adapter stays unmerged")
            check_merge(self.base_layer, self.label, called=called)
            if is_conv1d(self.base_layer):
                merged = merged.t().contiguous().t()  # so that `weight`, its transpose, is contiguous
            self.register_buffer("merged_weight", merged, persistent=False)

    def unmerge(self) -> None:
        """Compute with the original weight and a separate adapter again."""
        self._buffers.pop("merged_weight", None)

    def extra_repr(self) -> str:
        shown = {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
        shown |= {"s": f"{self.scaling:g}", "dtype": dtype_name(self.A.dtype)}
        if (backend := forced()) is not None:  # else it depends on the call
            shown["backend"] = backend
        shown["init"] = self.recipe.init
        if self.dropout:
            shown["dropout"] = f"{self.dropout:g}"
        return ", ".join(f"{key}={value}" for key, value in shown.items()) + (", merged" if self.merged else "")

    def _apply(self, fn: Any, recurse: bool = True) -> LoraXSLinear:
        dtype, meta = self.A.dtype, self.A.is_meta
        super()._apply(sparing_what_trains(fn, self.base_layer, self), recurse)
        if self.A.dtype != dtype:
            self.recipe = self.recipe.cast(self.A.dtype)
        self._coarsest = _coarser(self._coarsest, dense_dtype(self.base_layer))
        if meta and not self.A.is_meta:  # to_empty leaves what the memory had: with zeros, R would never train
            with torch.no_grad():
                self.A.fill_(torch.nan)
        return self

    def named_modules(self, memo: set | None = None, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """Within a model, the base layer first: code takes a model's dtype from its first parameter, and R is in fp32.

        A layer that is asked by itself comes first, as torch.export expects of what it is given.
        """
        found = [*super().named_modules(memo, *args, **options)]  # none where it has been listed already
        # Not `yield from`, which torch.compile of torch 2.14 cannot leave before its end.
        for each in found if memo is None else (*found[1:], *found[:1]):  # noqa: UP028
            yield each

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        if not self.merged:
            return super().state_dict(*args, **options)
        plain = nn.Module()
        plain.register_parameter("weight", nn.Parameter(self.weight, requires_grad=False))
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        plain.register_parameter("bias", bias)  # a copy, to be saved by this name even if it is tied to another
        return plain.state_dict(*args, **options)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(f"module {prefix[:-1]!r} is merged: unmerge it before loading a state dict")
        theirs = (f"{prefix}lora_", f"{prefix}default_lora_latent")
        if key := next((key for key in state_dict if key.startswith(theirs)), None):
            raise ValueError(
                f"module {prefix[:-1]!r}: got a state dict with {key!r}, must have A, R and B of a LoraXSLinear. A "
                "checkpoint of the reference implementation is loaded by load_reference_adapter(model, folder) of "
                "loraxs_kernels.integrations.reference_repo, into the plain base model"
            )
        check_resumed(self, state_dict, prefix)  # of a model that the callback does not know, as one from model_init
        A, W, dtype = state_dict.get(f"{prefix}A"), state_dict.get(f"{prefix}base_layer.weight"), self.A.dtype
        before = self.A.clone(), self.B.clone()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        for was, now in zip(before, (self.A, self.B), strict=True):
            if not now.is_meta and (was.device != now.device or not torch.equal(was, now)):
                self._as_made = None
        if A is not None and A.dtype in FLOATS and A.dtype != dtype:  # made for a layer in another dtype
            made = W.dtype if W is not None and W.dtype in FLOATS else None
            if made is not None:
                assigned = local_metadata.get("assign_to_params_buffers", False)
                self._coarsest = made if assigned else _coarser(made, dense_dtype(self.base_layer))
            recipe = replace(self.recipe, rounded=(), weight_dtype=made and dtype_name(made))
            self.recipe = recipe.cast(A.dtype).cast(self.A.dtype)

    def why_no_load(self) -> str | None:
        """Why A and B, made again from the weight as it is now, would not be these, as the end of a sentence."""
        made = self.recipe.weight_dtype
        if self.recipe.init in ("random", "given") or made is None or self._coarsest is None:
            return None
        rounded = torch.finfo(self._coarsest).eps > max(torch.finfo(DTYPES[made]).eps, torch.finfo(torch.float32).eps)
        return f"were made from weights in {made}, rounded to {dtype_name(self._coarsest)} since" if rounded else None


LoRAXSLinear = LoraXSLinear  # its earlier spelling, which pickles and code of users have


def makers_of_R(layer: LoraXSLinear) -> list[nn.Parameter]:
    """R, or the parameters that a parametrization makes it of.

    ValueError where a hook makes R, as those of prune and of the old weight_norm do: only the next forward would know
    what its parameters are now.
    """
    makers = [p for name, p in layer.named_parameters() if name == "R" or name.startswith("parametrizations.R.")]
    if not makers:
        raise ValueError(
            f"{layer.label}: R is made by a hook (torch.nn.utils.prune or weight_norm, perhaps), and is as it was in "
            "the last forward; must be a parameter, as after prune.remove(layer, 'R') or remove_weight_norm(layer, "
            "'R'), or have a parametrization (torch.nn.utils.parametrize)"
        )
    return makers


def warn_of_training(R: Tensor) -> None:
    """Warn, for a layer that is called to train while it is merged, that R gets no gradient."""
    if R.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            "the adapters are merged, so that R gets no gradient and does not train; unmerge before training, or call "
            "the model in eval mode or under torch.no_grad()",
            stacklevel=3,  # one place for all layers, so that it is shown once
        )


def dense_dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype of a layer's weight, if that is a floating-point tensor."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None


def _coarser(a: torch.dtype | None, b: torch.dtype | None) -> torch.dtype | None:
    return max((each for each in (a, b) if each is not None), key=lambda each: torch.finfo(each).eps, default=None)
