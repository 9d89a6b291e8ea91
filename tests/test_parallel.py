"""Tensor parallelism and FSDP2 with real processes and real transformers models, measured against one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels.linear import LoRAXSLinear
from loraxs_kernels.model import adapted_layers
from loraxs_kernels.weights import whole

transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
TIGHT = 1e-5  # of losses and, in Frobenius norm, of gradients, in fp32


def llama(kind: str = "Llama", **more: int) -> nn.Module:
    """With biases, of which one that is added to a sum over ranks counts once."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    if kind == "Llama":
        more |= dict(attention_bias=True, mlp_bias=True)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=4, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.02)
    return model


def attached(model: nn.Module, targets: str | list[str] = TARGETS, **options: object) -> nn.Module:
    return lx.attach(model, 4, target_modules=targets, progress=False, **options)


def loss_of(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def trained(
    model: nn.Module,
    loss: Callable[[nn.Module], torch.Tensor] = loss_of,
    steps: int = 10,
    each: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of some steps of AdamW on R alone, and the gradients of all R, side by side, at each."""
    Rs = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, gradients = torch.optim.AdamW(Rs, lr=1e-2), [], []
    for _ in range(steps):
        of_step = loss(model)
        of_step.backward()
        each()
        losses.append(float(of_step))
        gradients.append(torch.cat([whole(R.grad).flatten() for R in Rs]))
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def assert_same(found: tuple, expected: tuple) -> None:
    assert len(found[0]) == len(expected[0]) > 0
    for loss, other in zip(found[0], expected[0], strict=True):
        assert abs(loss - other) <= TIGHT * abs(other)
    for gR, other in zip(found[1], expected[1], strict=True):
        assert (gR - other).norm() <= TIGHT * other.norm() > 0
    assert expected[0][-1] < expected[0][0]


def assert_same_basis(model: nn.Module, alone: nn.Module) -> None:
    for (_, layer), (_, other) in zip(adapted_layers(model), adapted_layers(alone), strict=True):
        assert torch.equal(layer.A, other.A) and torch.equal(layer.B, other.B)


def mesh_of(*sizes: int, names: Iterable[str] = ("tp",)) -> dist.DeviceMesh:
    return dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=tuple(names))


def plan(suffix: str = "", sequence: bool = False) -> dict:
    """Of a LLaMA's block; with `sequence` between the layers a rank has a part of each sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

    columns, rows = ColwiseParallel(), RowwiseParallel()
    styles = {f"self_attn.{each}_proj{suffix}": columns for each in "qkv"}
    styles |= {f"mlp.{each}_proj{suffix}": columns for each in ("gate", "up")}
    if sequence:
        rows = RowwiseParallel(output_layouts=Shard(1))
        styles |= dict(input_layernorm=SequenceParallel(), post_attention_layernorm=SequenceParallel())
        laid_out = dict(input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()})
        styles |= {"self_attn": PrepareModuleInput(**laid_out)}
        styles |= {"mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))}
    return styles | {f"self_attn.o_proj{suffix}": rows, f"mlp.down_proj{suffix}": rows}


def parallelized(model: nn.Module, mesh: dist.DeviceMesh, **how: object) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    for block in model.model.layers:
        parallelize_module(block, mesh, plan(**how))
    return model


def tensor_parallel(rank: int, folder: Path) -> None:
    alone = attached(llama())
    expected = trained(copy.deepcopy(alone))

    # transformers cuts the layers, `attach` follows.
    model = attached(transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", tp_plan="auto"))
    assert_same_basis(model, alone)
    assert_same(trained(model), expected)
    # Its adapter file is that of the model on one process, whichever rank writes it, and back.
    file = folder / f"{rank}.safetensors"
    lx.save_adapter(model, file)
    back = lx.load_adapter(llama(), file)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, back(IDS).logits)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", tp_plan="auto")
    lx.load_adapter(again, file)
    assert abs(float(loss_of(again)) - float(loss_of(back))) < TIGHT
    assert_same(trained(again, steps=4), trained(back, steps=4))  # resumed with another number of ranks

    mesh = mesh_of(dist.get_world_size())
    for how in ({}, {"suffix": ".base_layer"}):  # torch cuts them before `attach`, and after it
        model = llama()
        for step in (attached, functools.partial(parallelized, mesh=mesh, **how))[:: -1 if not how else 1]:
            step(model)
        assert_same_basis(model, alone)
        assert_same(trained(model), expected)

    # Activation checkpointing, a bias that trains, dropout
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(trained(model.train(), steps=2), trained(copy.deepcopy(alone).train(), steps=2)) if False else None


def test_tensor_parallel_models_train_like_whole_ones(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    on_ranks(2, tensor_parallel, tmp_path)
