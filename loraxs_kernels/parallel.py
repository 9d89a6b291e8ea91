"""Weights that are cut over ranks: tensor parallelism, and FSDP2 where it came before the adapters.

Tensor parallelism makes the weight of a layer a DTensor and wraps the layer's call: what comes first lays out x, what
comes last collects y.  On rank p

    cut by rows (ColwiseParallel)       y_p = x W_p^T + s (x A^T) R^T B_p^T              B_p: the same rows of B
    cut by columns (RowwiseParallel)    y = sum_p (x_p W_p^T + s (x_p A_p^T) R^T B^T)    A_p: the same columns of A

The adapter is added where the layer multiplies, between the two, so that a forward has no collective of its own: the
parts of y travel with the layer's.  A, R and B are whole on every rank, A_p and B_p are views.  What a rank knows of
the gradient of R is one part of a sum, which the backward makes: r x r numbers a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .functional import Adapter
from .naming import label_of
from .ops import refuse_create_graph
from .sharding import is_dtensor
from .weights import held

Dropout = Callable[[Tensor, float], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None, Sequence[Adapter], Dropout], Tensor]  # of x, W, bias, adapters


def is_cut(base: nn.Module) -> bool:
    """Whether a layer is one of tensor parallelism: its weight is a DTensor, or transformers has wrapped its call.

    FSDP2 puts whole weights in place while its modules run, so that there this is False.
    """
    return is_dtensor(getattr(base, "weight", None)) or _wrapping(base) is not None


def output(
    base: nn.Module,
    x: Tensor,
    adapters: Sequence[Adapter],
    product: Product,
    name: str,
    all_rows: bool,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """base(x, ...) of a layer that is cut, in which `product` takes the place of F.linear, on this rank's pieces.

    product: called with x, W and bias as this rank multiplies them, the adapters with the rows of B or the columns of A
        that belong to W, and what to drop parts of x by.
    all_rows: whether it must get the rows of all ranks, since they differ; else a weight that each rank has whole
        multiplies the rows that the rank has.

    Raises RuntimeError, naming the layer, where base does not multiply by its weight through F.linear, once.
    """
    inside = _Inside(base, adapters, product, name, all_rows)
    with inside:
        y = base(x, *args, **kwargs)
    if inside.calls != 1:
        raise RuntimeError(
            f"{label_of(name)}: its base layer, a {type(base).__name__} cut over ranks, called F.linear with its "
            f"weight {inside.calls} times, must do so once for an adapter to be added there; leave it out "
            "(exclude_modules)"
        )
    return y


class _Inside(TorchFunctionMode):
    """Puts `product` in the place of the layer's one F.linear, wherever in the layer's call it comes."""

    def __init__(
        self, base: nn.Module, adapters: Sequence[Adapter], product: Product, name: str, all_rows: bool
    ) -> None:
        super().__init__()
        self.all_rows = all_rows
        self.weight = getattr(base, "weight", None)  # before the layer's call may put a local one in its place
        self.base, self.adapters, self.product, self.name, self.calls = base, adapters, product, name, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear or (args[1] if len(args) > 1 else kwargs["weight"]) is not held(self.base, "weight"):
            return func(*args, **kwargs)
        self.calls += 1
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, W, cut = input, weight, weight if is_dtensor(weight) else self.weight
        A, _, B, *_ = self.adapters[0]
        N, K = B.shape[0], A.shape[1]
        if not is_dtensor(W) and W.shape == (N, K):  # FSDP2 alone has cut the layer, and for the call made W whole
            return self.product(x, W, bias, self.adapters, F.dropout)
        if not (torch.compiler.is_compiling() or _is_known(cut)):  # a test that cannot be traced
            raise RuntimeError(f"{label_of(self.name)} is cut over ranks by {_laid_out(cut)}; {_MUST}")
        if is_dtensor(W) and not is_dtensor(x):
            return F.linear(x, W, bias)  # an error of torch's, which says so
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        mesh, dim = cut.device_mesh, _dim(cut)
        last, laid_out = x.dim() - 1, is_dtensor(x)
        shape = (*x.shape[:-1], N)
        if laid_out:
            there = x.placements[0]
            rows = there if there.is_shard() and there.dim != last and not self.all_rows else Replicate()
            wanted = {0: Replicate(), 1: Shard(last), None: rows}[dim]
            if x.placements != (wanted,):
                x = x.redistribute(placements=[wanted])
            # Of x as a whole each rank has the gradient through its own rows of W.
            x = _waited(x.to_local(grad_placements=[Partial()] if dim == 0 else None))
        part = dim is not None or wanted.is_shard()  # of the sum that is the gradient of R
        of_whole = [Partial()] if part and dim is None else None  # that of a weight or bias, if it trains
        after = None
        if is_dtensor(bias):
            if dim != 1:
                bias = bias.to_local(grad_placements=of_whole)
            elif bias.requires_grad:
                bias, after = None, bias
            else:  # once in the sum
                bias = bias.to_local() if mesh.get_local_rank() == 0 else None
        if is_dtensor(W):
            W = W.to_local(grad_placements=of_whole)
        adapters, dropout = [], F.dropout
        for A, R, B, *rest in self.adapters:
            if dim is not None:
                A, B = (A, piece(B, 0, mesh)) if dim == 0 else (piece(A, 1, mesh), B)
            adapters.append((A, _Reduced.apply(R, mesh, 1) if part and _has_gradient(R) else R, B, *rest))
        if dim == 1:  # this rank's part of the mask that is drawn on one process, so that all ranks draw alike

            def dropout(x: Tensor, p: float) -> Tensor:
                return x * piece(F.dropout(x.new_ones(*x.shape[:-1], K), p), -1, mesh)

        y = self.product(x, W, bias, adapters, dropout)
        if not laid_out:
            return y
        placement = {0: Shard(last), 1: Partial(), None: wanted}[dim]
        strides = torch.empty(shape, device="meta").stride()  # what other ranks have may be of another size
        y = DTensor.from_local(y, mesh, [placement], run_check=False, shape=shape, stride=strides)
        return y if after is None else y + after


def piece(t: Tensor, dim: int, mesh: Any) -> Tensor:
    """This rank's part of a tensor that is cut over a mesh of one dimension, as DTensor's Shard(dim) cuts it."""
    parts, rank = t.chunk(mesh.size(), dim), mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else t.narrow(dim, 0, 0)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _waited(t: Tensor) -> Tensor:
    """t, once the collective that makes it has ended: torch hands such a tensor out before, to be waited for."""
    return _Wait.apply(t) if type(t).__name__ == "AsyncCollectiveTensor" else t


def _dim(weight: Tensor) -> int | None:
    """The dimension in which a DTensor W (N, K) is cut; None: it is whole on every rank."""
    placement = weight.placements[0]
    return placement.dim % weight.dim() if placement.is_shard() else None


def _is_known(weight: Tensor) -> bool:
    """Whether a DTensor W is cut in a way for which the sums above hold."""
    from torch.distributed.tensor import Replicate, Shard

    return len(weight.placements) == 1 and type(weight.placements[0]) in (Shard, Replicate)


def _laid_out(weight: Tensor) -> str:
    return f"placements {weight.placements} on {weight.device_mesh}"


_MUST = (
    "must be an nn.Linear whose weight is cut by rows or by columns over one dimension, as ColwiseParallel and "
    "RowwiseParallel do. Leave it out (exclude_modules)"
)


def _wrapping(layer: nn.Module) -> str | None:
    """The name of the style by which transformers' tensor parallelism has wrapped a layer's call, if it has."""
    forward = layer.__dict__.get("forward")
    ours = (getattr(forward, "__module__", None) or "").startswith("transformers.distributed.")
    return forward.__qualname__.partition(".")[0] if ours else None


def check(layers: Iterable[tuple[str, nn.Module]], fsdp: set[int]) -> None:
    """Refuse layers, given with what errors call them, that are cut in a way for which no sum above is known.

    Raises ValueError, naming the module and how it is cut.
    """
    for label, base in layers:
        weight, style = getattr(base, "weight", None), _wrapping(base)
        if style == "ReplicatedWithGradAllReduce":
            how = f"transformers' style {style}, in which each rank has only a part of the gradient"
        elif not is_dtensor(weight):
            if "_hf_tp_plan" not in vars(base):
                continue
            how = f"this transformers' style {base._hf_tp_plan!r} (5.17 and later keep weights as DTensors)"
        elif id(base) in fsdp:
            continue
        elif type(base).forward is not nn.Linear.forward:
            how = f"placements {weight.placements} in a {type(base).__name__}"
        elif not _is_known(weight):
            how = _laid_out(weight)
        else:
            continue
        raise ValueError(f"target_modules: {label} is cut over ranks by {how}; {_MUST}")


def below_fsdp(model: nn.Module) -> set[int]:
    """The ids of the modules whose weights FSDP2 (fully_shard) cuts, and puts back whole while they run."""
    if not any(map(is_dtensor, model.parameters())):
        return set()
    wrapped = [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]
    return {id(m) for each in wrapped for m in each.modules()}


def shares(base: nn.Module, fsdp: set[int]) -> Any:
    """The mesh of the ranks that share out the batch, where FSDP2 has cut a layer before it was adapted, else None.

    fsdp: `below_fsdp`.  The mesh of the weight begins with the dimensions over which the batch goes, the last of which
    is the first that FSDP2 cuts weights over; those of tensor parallelism follow.
    """
    weight = getattr(base, "weight", None)
    if id(base) not in fsdp or not is_dtensor(weight):
        return None
    mesh = weight.device_mesh
    last = next(i for i, placement in enumerate(weight.placements) if not placement.is_replicate())
    return mesh if last + 1 == mesh.ndim else mesh[mesh.mesh_dim_names[: last + 1]]


def averaged(R: Tensor, mesh: Any) -> Tensor:
    """R, whose gradient becomes the mean over the ranks of a mesh, since FSDP2 does not know R."""
    return _Reduced.apply(R, mesh, mesh.size()) if _has_gradient(R) else R


def _has_gradient(R: Tensor) -> bool:
    return R.requires_grad and torch.is_grad_enabled()


class _Reduced(torch.autograd.Function):
    """R, whose gradient is the sum of the ranks' over a mesh, divided by a number."""

    @staticmethod
    def forward(ctx: Any, R: Tensor, mesh: Any, number: int) -> Tensor:
        ctx.mesh, ctx.number = mesh, number
        return R.view_as(R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_create_graph("R: its gradient, which is summed over the ranks,")
        total = grad.clone()
        for i in range(ctx.mesh.ndim):
            dist.all_reduce(total, group=ctx.mesh.get_group(i))
        return total.div_(ctx.number), None, None
