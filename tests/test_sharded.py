"""Models that FSDP1, FSDP2 and DeepSpeed's ZeRO-3 have sharded over two ranks, against the same model on one."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import loraxs_kernels as lx
from loraxs_kernels import adapter_file


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same small model at every call."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).to(dtype)


def attached(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return lx.attach(llama(dtype), 4, target_modules="all-linear", modules_to_save=["lm_head"], init_std=0.1)


def through_peft(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    from peft import get_peft_model

    from loraxs_kernels.integrations.peft import LoraXSConfig

    config = LoraXSConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_std=0.1)
    return get_peft_model(llama(dtype), config, **options)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(step: int) -> torch.Tensor:
    return torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(step))


class Alone:
    """The model on one process, which takes the mean of the losses of all ranks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(trained(self.model), lr=0.3)

    def step(self, step: int) -> float:
        self.optimizer.zero_grad()
        loss = sum(self.model(ids, labels=ids).loss for ids in batch(step).split(1)) / 2
        loss.backward()
        self.optimizer.step()
        return loss.item()


def mean_loss(rank: int, model: nn.Module, step: int, backward=torch.Tensor.backward) -> float:
    ids = batch(step)[rank : rank + 1]
    loss = model(ids, labels=ids).loss
    backward(loss)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / 2


def check_training(rank: int, model: nn.Module, alone: Alone, steps: int, atol: float) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=0.3)
    for step in range(steps):
        optimizer.zero_grad()
        assert mean_loss(rank, model, step) == pytest.approx(alone.step(step), abs=atol)
        optimizer.step()


def gathered_state(model: nn.Module, cpu_offload: bool = True) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)  # with cpu_offload on rank 0 alone


def in_bf16(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, lx.LoraXSLinear):
            layer.R.data = layer.R.data.bfloat16()
    return model


def fsdp1(rank: int, folder: str) -> None:
    """With a bf16 base R must be in bf16 too; or the base in fp32, which FSDP1 then computes with in bf16."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    warnings.simplefilter("ignore")  # of frozen and trained parameters in one unit, which costs memory

    def wrapped(model: nn.Module, **options) -> nn.Module:
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        options |= {"auto_wrap_policy": policy, "use_orig_params": True, "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(copy.deepcopy(model), **options)

    bf16 = torch.bfloat16
    for make in (attached, through_peft):
        with pytest.raises(ValueError, match="Must flatten tensors with uniform dtype"):
            wrapped(make(bf16))
    check_training(rank, wrapped(attached()), Alone(attached()), 3, 1e-5)
    mixed = wrapped(attached(), mixed_precision=MixedPrecision(param_dtype=bf16))
    check_training(rank, mixed, Alone(attached()), 3, 2e-3)
    assert all(p.dtype == torch.float32 for p in trained(mixed))
    for model in (in_bf16(attached(bf16)), through_peft(bf16, autocast_adapter_dtype=False)):
        sharded, alone = wrapped(model), Alone(model)
        check_training(rank, sharded, alone, 3, 2e-3)
        state = gathered_state(sharded, cpu_offload=False)  # with it this FSDP1 crashes on CPUs, whatever the model
        if rank == 0:
            check_saved(folder, model, alone.model, state)
    with pytest.raises(ValueError, match="whose names no other model has; use FSDP2"):
        lx.save_adapter(mixed, Path(folder, "never-written"))


def check_saved(folder: str, model: nn.Module, alone: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """On one process: what was gathered makes an adapter, which a plain model loads."""
    dtype = alone.get_input_embeddings().weight.dtype
    if hasattr(model, "peft_config"):
        from peft import PeftModel

        model.save_pretrained(Path(folder, "peft"), state_dict=state)
        loaded = PeftModel.from_pretrained(llama(dtype), Path(folder, "peft"))
    else:
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert unexpected == [] and not any(name.endswith(".R") for name in missing)
        lx.save_adapter(model, Path(folder, "lx.safetensors"))
        loaded = lx.load_adapter(llama(dtype), Path(folder, "lx.safetensors"))
    check_same(loaded, alone)


@torch.no_grad()
def check_same(model: nn.Module, other: nn.Module) -> None:
    y = other(batch(9)).logits
    atol = 1e-5 if y.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(batch(9)).logits, y, atol=atol, rtol=0)


def fsdp2_through_peft(rank: int, folder: str) -> None:
    """Its save_pretrained gets the gathered state, its load_adapter takes a whole one; R in fp32, the base in bf16."""
    from torch.distributed.fsdp import fully_shard

    model = through_peft(torch.bfloat16)
    alone = Alone(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in (*model.get_base_model().model.layers, model):
        fully_shard(block, mesh=mesh)
    check_training(rank, model, alone, 3, 1e-4)
    state = gathered_state(model)
    if rank == 0:
        check_saved(folder, model, alone.model, state)
    dist.barrier()
    for p in trained(model):
        nn.init.zeros_(p)
    model.load_adapter(Path(folder, "peft"), "default")
    for ours, theirs in zip(trained(model), trained(alone.model), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs)


def fsdp(rank: int, folder: str) -> None:
    fsdp1(rank, f"{folder}/1")
    fsdp2_through_peft(rank, f"{folder}/2")


def test_fsdp(tmp_path):
    on_ranks(2, fsdp, str(tmp_path))


def zero3(rank: int, folder: str) -> None:
    """With every parameter partitioned, and with those kept whole that are small, as DeepSpeed does by default."""
    for persistent in (0, 10**5):
        zero3_beside(persistent, rank, f"{folder}/{persistent}")
    zero3_odd(rank, f"{folder}/odd")


class Twice(nn.Module):
    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return 2 * X

    def right_inverse(self, X: torch.Tensor) -> torch.Tensor:
        return X / 2


def zero3_odd(rank: int, folder: str) -> None:
    """Parts of different sizes, files that differ from rank to rank, a parametrized R, all gathered by the caller."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    def odd(value: float, parametrized: bool = False) -> nn.Sequential:
        torch.manual_seed(0)
        model = lx.attach(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), 3, target_modules="0", modules_to_save=["1"])
        if parametrized:
            nn.utils.parametrize.register_parametrization(model[0], "R", Twice())
        nn.init.constant_(R(model), value)
        nn.init.constant_(model[1].bias, value)
        return model

    def values() -> list[float]:
        """Of each parameter that trains, which has one value throughout: of the parameter and of the fp32 copy."""
        with deepspeed.zero.GatheredParameters(trained(model)):
            found = [p.detach().clone() for p in (R(model), model[1].bias)]
        found += [safe_get_full_fp32_param(p) for p in (R(model), model[1].bias)] if running else []
        assert all((t == t.flatten()[0]).all() for t in found)
        return [t.flatten()[0].item() for t in found]

    def R(model: nn.Sequential) -> nn.Parameter:
        return next(p for name, p in model[0].named_parameters() if name in ("R", "parametrizations.R.original"))

    own, again = f"{folder}/{rank}.safetensors", f"{folder}/{rank}-again.safetensors"
    lx.save_adapter(odd(5.0 + rank), own)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
    for running, parametrized in ((True, False), (True, True), (False, False)):
        model = odd(0.0, parametrized)
        if running:
            optimizer = torch.optim.SGD(trained(model), lr=0.3)
            deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            refused = pytest.raises(RuntimeError, match="call this outside of it, on every rank")
            with deepspeed.zero.GatheredParameters(trained(model)), refused:
                lx.load_adapter(model, own)
        else:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        assert not any(values())
        lx.load_adapter(model, own)
        assert values() == [2.5 if parametrized else 5.0, 5.0] * (1 + running), "of rank 0"
        lx.save_adapter(model, again)
        assert (lx.load_adapter(odd(0.0), again)[0].R == 5).all()
    with deepspeed.zero.GatheredParameters(trained(model), modifier_rank=0), torch.no_grad():
        if rank == 0:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(adapter_file, "assign", interrupted_at_the_third(adapter_file.assign))
                for p in trained(model):
                    p.zero_()
                lx.load_adapter(model, own)
    assert values() == [0.0, 0.0]
    with deepspeed.zero.GatheredParameters(trained(model), modifier_rank=0):
        if rank == 0:
            lx.load_adapter(model, own)
    assert values() == [5.0, 5.0]
    model, running, config["zero_optimization"] = odd(0.0), True, {"stage": 2}  # parameters are whole, fp32 copies not
    deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained(model), lr=0.3), config=config)
    assert len(values()) == 4 and not any(values())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapter_file, "assign", interrupted_at_the_third(adapter_file.assign))
        lx.load_adapter(model, f"{folder}/0.safetensors")
    assert not any(values())
    lx.load_adapter(model, f"{folder}/0.safetensors")
    assert values() == [5.0] * 4


def zero3_beside(persistent: int, rank: int, folder: str) -> None:
    # It wants an address, though the group is there, and would take a GPU for the device.
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    # An operator that only inference calls, and that it would compile for a minute wherever it is new.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistent},
        "zero_allow_untested_optimizer": True,
    }

    def engine_of(model: nn.Module):
        optimizer = torch.optim.SGD(trained(model), lr=0.3)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    model = attached()
    alone, engine = Alone(model), engine_of(model)

    def train(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            loss = mean_loss(rank, engine, step, engine.backward)
            assert loss == pytest.approx(alone.step(step), abs=1e-5)
            for p, q in zip(trained(model), trained(alone.model), strict=True):
                torch.testing.assert_close(safe_get_full_grad(p), q.grad, atol=1e-6, rtol=1e-5)
            engine.step()

    train(0, 3)
    own, file = f"{folder}/{rank}.safetensors", f"{folder}/both.safetensors"
    lx.save_adapter(model, own)
    lx.save_adapter(model, file)
    with deepspeed.zero.GatheredParameters(trained(model)):
        if rank == 0:
            lx.save_adapter(model, f"{folder}/gathered.safetensors")
    dist.barrier()
    for name in (own, f"{folder}/gathered.safetensors"):
        assert Path(name).read_bytes() == Path(file).read_bytes()
    check_same(lx.load_adapter(llama(), file), alone.model)
    # Into the engine, whose optimizer has an fp32 copy of its own, and on from there.
    for p in trained(alone.model):
        nn.init.zeros_(p)
    lx.save_adapter(alone.model, own)
    lx.load_adapter(model, own)
    assert not any(safe_get_full_fp32_param(p).any() for p in trained(model))
    zeros = Path(own).read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapter_file, "assign", interrupted_at_the_third(adapter_file.assign))
        lx.load_adapter(model, file)
    lx.save_adapter(model, own)
    assert Path(own).read_bytes() == zeros and not any(safe_get_full_fp32_param(p).any() for p in trained(model))
    for each in (model, alone.model):
        lx.load_adapter(each, file)
    train(3, 2)
    through_peft_and_zero3(rank, folder, engine_of)
    config["bf16"] = {"enabled": True}
    model = attached(torch.bfloat16)
    engine = engine_of(model)
    mean_loss(rank, engine, 0, engine.backward)
    engine.step()
    lx.save_adapter(model, own)
    loaded, R = trained(lx.load_adapter(llama(torch.bfloat16), own))[0], trained(model)[0]
    assert R.dtype == torch.bfloat16 and torch.equal(loaded, safe_get_full_fp32_param(R)), "of the optimizer, in fp32"
    mean_loss(rank, engine, 1, engine.backward)
    engine.step()
    assert not torch.equal(safe_get_full_fp32_param(R), loaded)
    lx.load_adapter(model, own)
    assert torch.equal(safe_get_full_fp32_param(R), loaded), "as the file has it, not as R holds it"
    with deepspeed.zero.GatheredParameters(trained(model)):
        if rank == 0:
            lx.save_adapter(model, own)
            assert torch.equal(trained(lx.load_adapter(llama(torch.bfloat16), own))[0], R.float())


def interrupted_at_the_third(call):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        call(*args)

    return interrupted


def through_peft_and_zero3(rank: int, folder: str, engine_of) -> None:
    """Its parameters gathered by the caller, one rank saves; DeepSpeed's own checkpoints have parts of R."""
    import deepspeed

    model = through_peft()
    alone, engine = Alone(model), engine_of(model)
    assert mean_loss(rank, engine, 0, engine.backward) == pytest.approx(alone.step(0), abs=1e-5)
    engine.step()
    state = engine._zero3_consolidated_16bit_state_dict()  # what Trainer hands to save_pretrained
    if rank == 0:
        with pytest.raises(ValueError, match=r"(?s)fingerprint of A and B .* is empty\. .*GatheredParameters"):
            check_saved(folder, model, alone.model, state)
    engine.save_checkpoint(f"{folder}/engine")
    mean_loss(rank, engine, 1, engine.backward)
    engine.step()
    engine.load_checkpoint(f"{folder}/engine")  # and back
    with deepspeed.zero.GatheredParameters(trained(model)):
        if rank == 0:
            check_saved(folder, model, alone.model, model.state_dict())
    dist.barrier()
    with pytest.raises(ValueError, match=r"R for .* cannot be loaded once ZeRO-3 has partitioned it"):
        model.load_adapter(f"{folder}/peft", "default")


def test_zero3(tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    on_ranks(2, zero3, str(tmp_path))
