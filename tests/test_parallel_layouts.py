"""Layers that are cut over ranks in ways beside the common plans, measured against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import nn
from torch.nn import functional as F

import loraxs_kernels as lx
from loraxs_kernels import route
from loraxs_kernels.functional import run
from loraxs_kernels.matching import adapted_layers
from loraxs_kernels.sharding import is_dtensor, whole

TIGHT = 1e-5  # in Frobenius norm, in fp32
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))  # 5: no two ranks have as much of it


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


def attached(model: nn.Module) -> nn.Module:
    lx.attach(model, 4, target_modules="all-linear", progress=False)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.R, generator=torch.Generator().manual_seed(2))
    return model


def results(model: nn.Module, y: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of all that trains, as one process has them."""
    y = y.full_tensor() if is_dtensor(y) else y
    y.square().mean().backward()
    return [y.detach(), *(whole(p.grad) for p in model.parameters() if p.requires_grad)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 1
    for t, other in zip(found, expected, strict=True):
        assert (t - other).norm() <= TIGHT * other.norm() > 0


def training(model: nn.Module) -> nn.Module:
    """Its last layer trains whole, beside R."""
    model[2].base_layer.requires_grad_(True)
    return model


def run_of_plain(x: torch.Tensor, *operands: object) -> torch.Tensor:
    """`run` of an x that a kernel may read: the collective that makes it has ended."""
    assert type(x) is torch.Tensor
    return run(x, *operands)


def layouts(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    n = dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (n,))
    alone = training(attached(model()))
    expected = results(alone, alone(X))

    def of_last(placement: object) -> nn.Module:
        """A model whose last weight and bias are DTensors of this placement."""
        m = model()
        for name, p in list(m[2].named_parameters()):
            t = DTensor.from_local(p.data / n, mesh, [placement]) if placement == Partial() else None
            t = distribute_tensor(p.data, mesh, [placement]) if t is None else t
            setattr(m[2], name, nn.Parameter(t))
        return m

    # A whole weight, x cut by rows of which the ranks have not as many, or by columns, or one part of a sum on each
    for placement in (Replicate(), Shard(1), Shard(2)):
        m = training(attached(of_last(Replicate())))
        h = DTensor.from_local(m[1](m[0](X)), mesh, [Replicate()], run_check=False)
        y = m[2](h.redistribute(placements=[placement]))
        assert y.placements == (placement if placement == Shard(1) else Replicate(),)
        assert_same(results(m, y), expected)
    m = training(attached(of_last(Replicate())))
    h = m[1](m[0](X)).detach()
    summed = DTensor.from_local(h if rank == 0 else torch.zeros_like(h), mesh, [Partial()])
    found = results(nn.Sequential(m[2]), m[2](summed))
    assert_same(found, [expected[0], *expected[-len(found) + 1 :]])

    # A hook that multiplies by another weight, with names for the arguments
    m = training(attached(of_last(Shard(0))))
    m[2].base_layer.register_forward_pre_hook(lambda *_: F.linear(input=X, weight=X[0]) is None or None)
    h = DTensor.from_local(m[1](m[0](X)), mesh, [Replicate()], run_check=False)
    with pytest.MonkeyPatch.context() as patch:  # x is there before the collective has ended, as from ColwiseParallel
        patch.setattr(route, "run", run_of_plain)
        early = h.redistribute(placements=[Shard(0)]).redistribute(placements=[Replicate()], async_op=True)
        assert_same(results(m, m[2](early)), expected)

    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):  # not with this rank's part of W
        m[2](X[..., :12])

    # A layer that does not multiply by its weight, or does so twice
    base = m[2].base_layer
    for times in (0, 2):
        base.forward = lambda x, times=times: [F.linear(x, base.weight) for _ in range(times)]
        with pytest.raises(RuntimeError, match=f"module '2': .* called F.linear with its weight {times} times"):
            m[2](h)

    # FSDP2 that has cut each layer by itself, before the adapters and after
    for order in ("before", "after"):
        m = model() if order == "before" else training(attached(model()))
        for i in (0, 2):
            fully_shard(m[i] if order == "before" else m[i].base_layer, mesh=mesh)
        fully_shard(m, mesh=mesh)
        m = training(attached(m)) if order == "before" else m
        assert_same(results(m, m(X)), expected)

    # What is cut in an unknown way after the adapters is refused, naming the layer.
    m = attached(model())
    m[2].base_layer = of_last(Partial())[2]
    h = DTensor.from_local(m[1](m[0](X)), mesh, [Replicate()], run_check=False)
    with pytest.raises(RuntimeError, match=r"module '2' is cut over ranks by placements \(Partial\(sum\),\)"):
        m[2](h)


def adapters_of_peft(rank: int) -> None:
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard

    from loraxs_kernels.integrations.peft import LoraXSConfig

    def second(m: nn.Module) -> nn.Module:
        """m with two adapters, of which the second, put on one layer while it does not train, does so then."""
        m = get_peft_model(m, LoraXSConfig(r=4, target_modules=["0", "2"]))
        m.add_adapter("second", LoraXSConfig(r=4, target_modules=["0"]))
        m.base_model.set_adapter(["default", "second"])
        return m

    alone, m = second(model()), model()
    expected = results(alone, alone(X))
    fully_shard(m)
    m = second(m)
    assert_same(results(m, m(X[rank : rank + 1]))[1:], expected[1:])


def test_adapters_of_peft_on_an_fsdp_model_may_train_later():
    pytest.importorskip("peft")
    on_ranks(2, adapters_of_peft)


def test_layers_cut_in_other_ways_match_one_process():
    on_ranks(2, layouts)
