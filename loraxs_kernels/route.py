"""From an adapted layer to the primitive, which computes the whole layer if it can, and otherwise only the delta."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import parallel
from .backends.device import in_forward_mode, transformed
from .backends.torch import results_are_kept
from .functional import Adapter, run
from .indexed import RowIndex
from .naming import label_of
from .ops import autocast_on
from .weights import held, weight_view

# Hooks of all modules; torch has a function that says whether there are any, but not in each version.
_OF_ALL_MODULES = [
    getattr(nn.modules.module, f"_global_{when}_hooks")
    for when in ("forward_pre", "forward", "backward_pre", "backward")
]


def layer_output(
    base: nn.Module,
    x: Tensor,
    adapters: Sequence[Adapter],
    name: str,
    index: RowIndex | None,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """base(x, *args, **kwargs) + sum over the adapters of s B R A dropout_p(x), (..., N), of a frozen linear layer.

    The primitive computes base and the first adapter as one if it can; other deltas are added.  With an index the
    first R is a stack, of which each row of x uses the matrix that the index says, or none.

    Raises, naming the layer `name`: ValueError if x does not fit; TypeError if base returns anything but a tensor of
    shape (..., N); RuntimeError if x requires a gradient and base passes none to it.
    """
    A, R, B, s, p = adapters[0]
    W = None if args or kwargs else computed_weight(base, A, p)
    if W is not None:
        hook = base.__dict__.get("_hf_hook")
        if hook is None or x.device == W.device:
            y = run(x, W, A, R, B, s, held(base, "bias"), None, name, index)
        else:  # accelerate's, which moves x to the layer and y back
            h = hook.pre_forward(base, x)[0][0]
            y = hook.post_forward(base, run(h, W, A, R, B, s, held(base, "bias"), None, name, index))
    else:
        plain = weight_view(base) is not None and not (_hooked(base) or any(_OF_ALL_MODULES))
        if not plain and parallel.is_cut(base):
            return _cut_output(base, x, adapters, name, index, args, kwargs)
        y = base(x, *args, **kwargs)
        if not plain:
            _check_output(base, x, y, B.shape[0], name)
        y = plus_delta(y, x, adapters[0], name, index, in_place=plain)
    for adapter in adapters[1:]:
        y = plus_delta(y, x, adapter, name)
    return y


def computed_weight(base: nn.Module, A: Tensor, p: float) -> Tensor | None:
    """W (N, K) of a layer that the primitive computes whole, hooks that only move x and y aside; else None."""
    W = weight_view(base)
    if W is None or not _is_one_primitive(W, A, p) or does_more(base):
        return None
    return W


def _is_one_primitive(W: Tensor, A: Tensor, p: float) -> bool:
    """Whether the primitive computes x W^T and the delta as one."""
    return W.dtype == A.dtype and not W.requires_grad and p == 0.0


def plus_delta(
    y: Tensor,
    x: Tensor,
    adapter: Adapter,
    name: str,
    index: RowIndex | None = None,
    *,
    in_place: bool = False,
    dropout: parallel.Dropout = F.dropout,
) -> Tensor:
    """y + s B R A dropout_p(x), in y's dtype; in_place where nothing else needs y as it was."""
    A, R, B, s, p = adapter
    h = dropout(x, p) if p > 0.0 else x
    if in_place and x.device != A.device:
        raise ValueError(f"A: got device {A.device} for {label_of(name)}, must be {x.device} like x")
    h = h.to(A.device) if autocast_on(x) else h.to(A.device, A.dtype)  # base may have moved x by itself
    in_place = in_place and y.dtype == h.dtype and not (torch.compiler.is_compiling() or results_are_kept())
    # Under vmap h or R may be a batch, and y not; torch.func.linearize keeps y as a constant.
    if in_place and not (in_forward_mode() or transformed()):
        return run(h, None, A, R, B, s, None, y, name, index)
    return y + run(h, None, A, R, B, s, None, None, name, index).to(y.device, y.dtype)


def _cut_output(
    base: nn.Module,
    x: Tensor,
    adapters: Sequence[Adapter],
    name: str,
    index: RowIndex | None,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """`layer_output` of a layer that tensor parallelism has cut, whose deltas are added where it multiplies."""

    def product(
        x: Tensor, W: Tensor, bias: Tensor | None, adapters: list[Adapter], dropout: parallel.Dropout
    ) -> Tensor:
        A, R, B, s, p = adapters[0]
        if _is_one_primitive(W, A, p):
            y = run(x, W, A, R, B, s, bias, None, name, index)
        else:
            y = plus_delta(F.linear(x, W, bias), x, adapters[0], name, index, in_place=True, dropout=dropout)
        for adapter in adapters[1:]:
            y = plus_delta(y, x, adapter, name, dropout=dropout)
        return y

    differ = index is not None and len(index) > 1
    return parallel.output(base, x, adapters, product, name, differ, *args, **kwargs)


def _check_output(base: nn.Module, x: Tensor, y: Any, N: int, name: str) -> None:
    """Raise where y = base(x) is nothing that a delta can be added to, or passes no gradient on; see `layer_output`."""
    if not (isinstance(y, Tensor) and y.shape == (*x.shape[:-1], N)):
        found = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise TypeError(
            f"{label_of(name)}: its base layer, a {type(base).__name__}, returned {found} for x of shape "
            f"{tuple(x.shape)}, must return a tensor of shape {(*x.shape[:-1], N)} to take an adapter; leave "
            "it out (exclude_modules)"
        )
    if torch.is_grad_enabled() and x.requires_grad and not _passes_gradient(base, x, y):
        weight = getattr(base, "weight", None)
        of = "" if weight is None else f" with a {type(weight).__name__} weight"
        raise RuntimeError(
            f"{label_of(name)}: its base layer, a {type(base).__name__}{of}, passes "
            "no gradient to its input, so that every adapter before it would train on a wrong gradient. Layers that "
            "quantise their input do so: quantise only the weights, for example with torchao's Int8WeightOnlyConfig"
        )


def _passes_gradient(base: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether y = base(x) has a gradient for x.  A bias that trains makes y require one without it."""
    if torch.compiler.is_compiling() or not (y.requires_grad and any(p.requires_grad for p in base.parameters())):
        return y.requires_grad
    wanted = torch.autograd.graph.get_gradient_edge(x).node
    seen, ahead = {None}, [y.grad_fn]
    while ahead:
        if (node := ahead.pop()) is wanted:
            return True
        if node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return False


_KINDS = ("forward", "forward_pre", "backward", "backward_pre")


def _hooked(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class's forward: hooks, or a forward replaced on the instance."""
    own = layer.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def does_more(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class's forward and moving x and y between devices."""
    return _hooked(layer) and not only_moves(layer)


def check_merge(layer: nn.Module, label: str, *, called: bool) -> None:
    """TypeError, naming a hook, where merging into a layer would leave that out or give it another x than the adapter.

    called: whether the merged layer is called, and with it its hooks on y and on gradients.  Hooks of accelerate that
    move x and y, or weights, are no hindrance.
    """
    if hooks := hooks_of(layer, ("forward_pre",) if called else _KINDS):
        raise TypeError(
            f"{label}: calling its base layer also runs {hooks[0]} (a hook, or a forward set on the layer), which "
            "merging would leave out or change the meaning of; remove it first. The adapter stays unmerged"
        )


def hooks_of(layer: nn.Module, kinds: Sequence[str] = _KINDS) -> list[str]:
    """The names of a layer's hooks, and of a forward set on it, but for accelerate's that move x and y, or weights."""
    own = layer.__dict__
    hooks = [*chain(*(own[f"_{kind}_hooks"].values() for kind in kinds))]
    forward = own.get("forward")  # accelerate leaves that of the class behind
    if not (forward in (None, MethodType(type(layer).forward, layer)) or _is_moved(layer, weights_too=True)):
        hooks.append(own.get("_hf_hook", forward))
    return [getattr(each, "__qualname__", repr(each)) for each in hooks]


def only_moves(layer: nn.Module) -> bool:
    """Whether a layer is hooked by accelerate's device_map alone, which moves x to the layer's device and y back."""
    return _is_moved(layer) and not any(layer.__dict__[f"_{kind}_hooks"] for kind in _KINDS)


def _is_moved(layer: nn.Module, weights_too: bool = False) -> bool:
    """Whether a layer's forward is accelerate's around that of its class, and only moves x and y, or weights too.

    Told without importing accelerate.
    """
    own = layer.__dict__
    forward, inner = own.get("forward"), own.get("_old_forward")
    return (
        type(forward) is partial
        and forward.func.__module__ == "accelerate.hooks"
        and forward.args[0] is layer
        and getattr(inner, "__func__", None) is type(layer).forward
        and inner.__self__ is layer
        and _is_moving(own.get("_hf_hook"), weights_too)
    )


def _is_moving(hook: Any, weights_too: bool) -> bool:
    kind = type(hook)
    if kind.__module__ != "accelerate.hooks" or hook.no_grad:
        return False
    if kind.__name__ == "SequentialHook":
        return all(_is_moving(each, weights_too) for each in hook.hooks)
    return kind.__name__ == "AlignDevicesHook" and (weights_too or not hook.offload)
