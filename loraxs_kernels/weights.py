"""W (N, K) of a layer, whatever holds it: a dense parameter, a quantised one, one sharded over ranks, or a layer of a
type that a user has registered.

    weight_view    W itself, where it is plain and dense: what the forward computes with, and what merging changes
    weight_of      what is known of W before it is read, and the way to read it: what A and B are made from

What is read is for making A and B, one layer at a time; the forward of a layer without a plain W calls the layer.
Other packages are recognised by the names of their classes, and imported only to read one of their layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .naming import FLOATS
from .quantised import Quantised, float_dtype, kind_of, quantised, what
from .sharding import gathered, groups_of, is_dtensor, whole

Shape = tuple[int, int]
Read = Callable[[nn.Module], Tensor]
ShapeOf = Callable[[nn.Module], Shape]

_PLAIN = (nn.Parameter, Tensor, FakeTensor)  # the last is what torch.export puts in their place
_registered: dict[type[nn.Module], tuple[Read, ShapeOf]] = {}


@dataclass(frozen=True)
class Weight:
    """W of one layer, known by its shape until it is read.

    shape: (N, K).
    dtype: in which the layer computes, one of FLOATS; the default for A and B.
    device: of the layer, and of what `read` returns.
    copies: whether `read` makes a new tensor, and does not return the one that the layer holds.
    read: makes W (N, K) as a dense tensor without a gradient, in one of FLOATS, which need not be `dtype`: W itself
        where it is plain (not to be written), else a copy that nothing here keeps.  A collective for a weight that is
        sharded over ranks: every rank must read the same layers in the same order.
    groups: the process groups of the ranks that it is sharded over, one for each dimension of their mesh; () where
        it is not.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    copies: bool
    read: Callable[[], Tensor]
    groups: tuple[Any, ...] = ()


def weight_view(layer: nn.Module) -> Tensor | None:
    """W (N, K) of a layer that computes x W^T + bias, as a view; None where no plain dense weight can be read."""
    conv1d = type(layer).forward is not nn.Linear.forward
    if conv1d and not is_conv1d(layer):
        return None
    weight = held(layer, "weight")
    if type(weight) not in _PLAIN or not weight.is_floating_point() or weight.dim() != 2:
        return None
    return weight.t() if conv1d else weight


def held(layer: nn.Module, name: str) -> Any:
    """layer.name, in a tenth of the time where it is a plain parameter (a parametrization or pruning takes it out)."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name)


def mergeable_weight(layer: nn.Module, label: str) -> Tensor:
    """W (N, K), as a view, of a layer that an adapter can be merged into, or a TypeError that names it."""
    W = weight_view(layer)
    # A parametrization or pruning makes it anew.
    if W is None or "weight" not in layer._parameters or W.dtype not in FLOATS:
        raise TypeError(
            f"{label}: got {what(layer)}, must be an nn.Linear or Conv1D with that class's forward and a dense "
            "2-dimensional weight in bf16, fp16, fp32 or fp64 that is a parameter, not made from others (parametrize, "
            "weight_norm, prune), to merge into; the adapter stays unmerged"
        )
    if W.is_meta:
        raise TypeError(
            f"{label}: got a weight that is not in memory (meta device, as accelerate offloads weights), must be in "
            "memory to merge into"
        )
    return W.detach()


def is_still_plain(layer: nn.Module) -> bool:
    """Whether a layer that was mergeable has not been quantised, pruned or parametrized since; it may be sharded."""
    own = layer._parameters
    if not (type(layer).forward is nn.Linear.forward or is_conv1d(layer)):
        return False
    if (weight := own.get("weight")) is not None:
        return not _dequantises(weight)
    # It is in FSDP1's flat parameter, or was freed; but what is parametrized or pruned has others in its place.
    return "parametrizations" not in layer._modules and not any(name.startswith("weight_") for name in own)


def weight_of(layer: nn.Module, label: str = "layer") -> Weight:
    """What is known of W before it is read, and the way to read it; nothing is read, dequantised or gathered here.

    Readers that were registered go first.  Otherwise nn.Linear and transformers' Conv1D are known, with the weights
    below (of classes derived from nn.Linear with their own forward, only dense weights of shape (out_features,
    in_features)):
        a dense weight;
        tensor subclasses that dequantise themselves (torchao), in their own dtype;
        weights that accelerate has offloaded, read from where they are; device: where the layer computes;
        DTensor (FSDP2, tensor parallelism) and DeepSpeed's ZeRO-3, gathered for the read, a collective;
    and the quantised layers of bitsandbytes and transformers that quantised.py lists.

    Raises TypeError, naming `label`, what the layer is and what it must be, where W cannot be read as the layer is now.
    """
    if (reader := registered_reader(layer)) is not None:
        return _registered_weight(layer, label, *reader)
    known = quantised(layer, label)
    return _linear(layer, label) if known is None else _quantised(layer, label, known)


def register_weight_reader(layer_type: type[nn.Module], read: Read | None, *, shape: ShapeOf | None = None) -> None:
    """Teach loraxs_kernels to read the weight of one more type of linear layer, so that `attach` can adapt such layers.

        lx.register_weight_reader(HQQLinear, lambda layer: layer.dequantize())

    Args:
        layer_type: the class.  The reader is also used for subclasses that have no reader of their own.  It takes
            precedence over the readers of this library: a reader for nn.Linear reads every kind of nn.Linear.
        read: a function of the layer that returns W (N, K), a dense bf16, fp16, fp32 or fp64 tensor; None removes the
            reader.  It is called when A and B of the layer are made, and never in the forward pass, which calls the
            layer and adds the delta.  What it returns is copied, so it may fill one buffer for every layer.
        shape: a function of the layer that returns (N, K) without reading W; None: (layer.out_features,
            layer.in_features).

    A and B get the dtype `layer.compute_dtype`, or if there is none, that of the layer's first floating-point parameter
    or buffer.  Raises TypeError if layer_type is not a subclass of nn.Module, or if read is neither a function nor
    None.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise TypeError(f"layer_type: got {layer_type!r}, must be a subclass of nn.Module")
    for argument, value in (("read", read), ("shape", shape)):
        if not (value is None or callable(value)):
            raise TypeError(
                f"{argument}: got {value!r} for {layer_type.__name__}, must be a function of a layer or None"
            )
    if read is None:
        _registered.pop(layer_type, None)
    else:
        _registered[layer_type] = (read, shape or _features)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one by its type, so that asking for its weight makes sense."""
    if isinstance(layer, torch.jit.ScriptModule):  # whose class has no forward to ask for
        return False
    return (
        isinstance(layer, nn.Linear)
        or is_conv1d(layer)
        or weight_view(layer) is not None
        or registered_reader(layer) is not None
    )


def is_unread_linear(layer: nn.Module) -> bool:
    """Whether a layer looks like a linear one, as quantised layers do, of a type that nothing here can read."""
    if is_linear(layer) or layer._modules or not (layer._parameters or layer._buffers):
        return False
    if all(isinstance(n, int) for n in _features(layer)):
        return True
    weight = layer._parameters.get("weight")  # torch_geometric's Linear has in_channels, for example
    return type(layer).__name__.endswith("Linear") and getattr(weight, "ndim", 0) == 2


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), a linear layer with its weight stored (in, out); transformers is not imported."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def unread(layer: nn.Module) -> str:
    """What is wrong with a layer that `is_unread_linear`, and what to do about it."""
    kind = type(layer).__name__
    return (
        f"a {kind_of(layer)}, whose weight nothing here can read: lx.register_weight_reader({kind}, read) changes "
        "that, with read(layer) -> its dense weight (out_features, in_features)"
    )


def registered_reader(layer: nn.Module) -> tuple[Read, ShapeOf] | None:
    """What `register_weight_reader` was given for a layer's type, so that its weight need not be its parameter."""
    return next((_registered[kind] for kind in type(layer).__mro__ if kind in _registered), None)


def _registered_weight(layer: nn.Module, label: str, read: Read, shape_of: ShapeOf) -> Weight:
    shape = shape_of(layer)
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(n, int) for n in shape)):
        raise TypeError(
            f"{label}: the shape of its weight, a {type(layer).__name__}'s, is given as {shape!r}, must be two "
            "integers (N, K): its out_features and in_features, or what lx.register_weight_reader(..., shape=...) says"
        )
    held = [*layer.parameters(), *layer.buffers()]
    device = held[0].device if held else torch.device("cpu")
    dtype = float_dtype(getattr(layer, "compute_dtype", None), *(t.dtype for t in held))
    weight = _weight(layer, label, tuple(shape), dtype, device, lambda: read(layer))
    # Several weights are on their way at a time, and a reader may fill one buffer again for every layer.
    return replace(weight, read=lambda: weight.read().clone())


def _features(layer: nn.Module) -> tuple:
    return getattr(layer, "out_features", None), getattr(layer, "in_features", None)


def _linear(layer: nn.Module, label: str) -> Weight:
    """nn.Linear and Conv1D, whose forward is x W^T + bias, and classes derived from nn.Linear that hold W as it does.

    A class with a forward of its own may do more with W than that: its forward is called.
    """
    conv1d = is_conv1d(layer)
    weight = _made_anew(layer) if "weight" in vars(layer) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not (conv1d or isinstance(layer, nn.Linear)):
        raise _unreadable(layer, label)
    if nn.parameter.is_lazy(weight):
        raise TypeError(
            f"{label}: got a {type(layer).__name__} whose weight has no shape yet, must have one: call the model once"
        )
    shape = getattr(weight, "ds_shape", weight.shape)
    plain = type(weight) in (nn.Parameter, Tensor)
    if plain:
        _check_whole(weight, len(shape) == 2, layer, label)
    if len(shape) != 2 or not (weight.dtype in FLOATS if plain else is_dtensor(weight) or _dequantises(weight)):
        raise _unreadable(layer, label)
    if not conv1d and type(layer).forward is not nn.Linear.forward:
        dense = plain or is_dtensor(weight)
        if not dense or tuple(shape) != (layer.out_features, layer.in_features):  # quantised, packed or transposed
            raise _unreadable(layer, label)
    N, K = reversed(shape) if conv1d else shape
    hook = _offloading(layer)
    device = weight.device if hook is None else torch.device(hook.execution_device)

    def read() -> Tensor:
        W = _gathered(weight, _dense) if hook is None else hook.weights_map["weight"].to(device)
        return W.t() if conv1d else W

    copies = not plain or hasattr(weight, "ds_id") or hook is not None
    return _weight(layer, label, (N, K), float_dtype(weight.dtype), device, read, copies)


@torch.no_grad()
def _made_anew(layer: nn.Module) -> Any:
    """`weight` as hooks of torch (the old weight_norm and spectral_norm, prune) make it of the parameters as they are.

    Before a forward that of the layer is of the last one, even if a state dict has been loaded since.
    """
    training, before = layer.training, vars(layer)["weight"]
    layer.training = False  # in True spectral_norm would change its vectors
    try:
        for hook in layer._forward_pre_hooks.values():
            if any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__):
                hook(layer, ())
        return layer.weight
    finally:
        layer.training, vars(layer)["weight"] = training, before


def _offloading(layer: nn.Module) -> Any:
    """accelerate's hook of a layer whose weight it keeps on the host or the disk and puts in place for each forward."""
    hook = getattr(layer, "_hf_hook", None)
    return hook if layer.weight.is_meta and getattr(hook, "weights_map", None) is not None else None


def _quantised(layer: nn.Module, label: str, known: Quantised) -> Weight:
    weight = layer.weight
    _check_whole(weight, known.whole, layer, label)

    def read() -> Tensor:
        return _gathered(weight, lambda weight: known.dequantise(_dense(weight).data))

    return _weight(layer, label, known.shape, known.dtype, weight.device, read)


def _weight(
    layer: nn.Module,
    label: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    read: Callable[[], Tensor],
    copies: bool = True,
) -> Weight:
    """A Weight whose read is checked: where it comes from is other people's code."""

    @torch.no_grad()
    def checked() -> Tensor:
        W = read()
        must = f"must be a dense tensor of shape {shape} in bf16, fp16, fp32 or fp64, with its values"
        dense = type(W) in (Tensor, nn.Parameter) and W.layout is torch.strided and not W.is_meta
        if not dense or W.dtype not in FLOATS:
            found = f"a {type(W).__name__} of {W.dtype}, {W.layout} on {W.device}" if isinstance(W, Tensor) else repr(W)
            raise TypeError(f"{label}: reading the weight of a {type(layer).__name__} gave {found}, {must}")
        if tuple(W.shape) != shape:
            raise ValueError(
                f"{label}: reading the weight of a {type(layer).__name__} gave shape {tuple(W.shape)}, {must}"
            )
        return W.detach()

    groups = next(filter(None, map(groups_of, layer.parameters(recurse=False))), ())
    return Weight(shape, dtype, device, copies, checked, groups)


def _gathered(weight: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
    """dense(weight), with all of the weight in place."""
    with gathered([weight]):
        return dense(weight).clone() if hasattr(weight, "ds_id") else dense(weight)


def _dense(weight: Tensor) -> Tensor:
    if is_dtensor(weight):
        return _dense(whole(weight))
    if not _dequantises(weight):
        return weight
    # The `dequantize` of torchao's NF4Tensor is of something else.  Its AWQ and SmoothQuant scale the input of a layer,
    # which is to scale the columns of its weight.
    W, of_input = getattr(weight, "get_original_weight", weight.dequantize)(), getattr(weight, "act_pre_scale", None)
    return W if of_input is None else W.float() * of_input.float()


def _dequantises(weight: Tensor) -> bool:
    """Every tensor has a `dequantize`; a quantised tensor subclass has its own."""
    return type(weight).dequantize is not Tensor.dequantize


def _check_whole(weight: Tensor, has_all: bool, layer: nn.Module, label: str) -> None:
    """TypeError for what FSDP1 leaves of a weight: a piece of its flat parameter (use_orig_params=True), or a view of
    memory that it has freed.

    has_all: whether the weight has as many elements as the layer's shape says.
    """
    if weight.is_meta or is_dtensor(weight):
        return
    freed = weight.numel() > 0 and weight.untyped_storage().nbytes() == 0
    if freed or (getattr(weight, "_fsdp_flattened", False) and not has_all):
        raise TypeError(
            f"{label}: got {what(layer)}, a part that FullyShardedDataParallel keeps here, must be whole: attach "
            "before the model is wrapped, or inside FullyShardedDataParallel.summon_full_params(model, writeback=False)"
        )


def _unreadable(layer: nn.Module, label: str) -> TypeError:
    return TypeError(
        f"{label}: got {what(layer)}, must be an nn.Linear or Conv1D with a 2-dimensional floating-point weight, of "
        "shape (out_features, in_features) where a class derived from nn.Linear has a forward of its own. "
        "If it is quantised, lx.register_weight_reader can teach this library to read it; or leave it out, or give its "
        "A and B with init=(A, B). If it is sharded, it must be gathered first"
    )
