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
from torch.nn import functional as F

import loraxs_kernels as lx
from loraxs_kernels.matching import adapted_layers
from loraxs_kernels.parallel import piece
from loraxs_kernels.sharding import is_dtensor, whole
from loraxs_kernels.together import forward_together

transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
TOKENS = dict(bos_token_id=0, eos_token_id=1)
TIGHT = 1e-5  # of losses and, in Frobenius norm, of gradients, in fp32


MORE = {
    "Llama": dict(attention_bias=True, mlp_bias=True),
    "Mixtral": dict(num_local_experts=4),
    "DeepseekV2": dict(
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
    ),
}


def causal_lm(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "GPT2":
        sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes, **TOKENS))
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=4, **MORE[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, p in model.named_parameters():  # one that is added to a sum over ranks counts once
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.02)
    return model


llama = functools.partial(causal_lm, "Llama")


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def attached(model: nn.Module, targets: str | list[str] = TARGETS, **options: object) -> nn.Module:
    return lx.attach(model, 4, target_modules=targets, progress=False, **options)


def loss_of(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def trained(
    model: nn.Module,
    loss: Callable[[nn.Module], torch.Tensor] = loss_of,
    steps: int = 4,
    state: list[dict] | None = None,
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of some steps of AdamW on R alone, and the gradients of all R, side by side, at each.

    state: gets the optimizer's in the end; what is there goes on.
    """
    Rs = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, gradients = torch.optim.AdamW(Rs, lr=1e-2), [], []
    if state:
        optimizer.load_state_dict(state.pop())
    for _ in range(steps):
        of_step = loss(model)
        of_step.backward()
        losses.append(float(of_step))
        gradients.append(torch.cat([whole(R.grad).flatten() for R in Rs]))
        optimizer.step()
        optimizer.zero_grad()
    if state is not None:
        state.append(optimizer.state_dict())
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
        laid_out = dict(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        )
        styles |= {"self_attn": PrepareModuleInput(**laid_out)}
        styles |= {"mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))}
    return styles | {f"self_attn.o_proj{suffix}": rows, f"mlp.down_proj{suffix}": rows}


def parallelized(model: nn.Module, mesh: dist.DeviceMesh, **how: object) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    for block in model.model.layers:
        parallelize_module(block, mesh, plan(**how))
    return model


def loss_of_parts(model: nn.Module, mesh: dist.DeviceMesh) -> torch.Tensor:
    """`loss_of` a LLaMA between whose layers each rank has a part of every sequence."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def laid_out(x: torch.Tensor, now: object, then: object) -> torch.Tensor:
        return DTensor.from_local(x, mesh, [now], run_check=False).redistribute(placements=[then]).to_local()

    x, length = model.model.embed_tokens(IDS), IDS.shape[1]
    positions = model.model.rotary_emb(x, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    x = laid_out(x, Replicate(), Shard(1))
    for block in model.model.layers:
        x = block(x, attention_mask=mask, position_embeddings=positions)
    logits = model.lm_head(model.model.norm(laid_out(x, Shard(1), Replicate())))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def cut_by_transformers(rank: int, folder: Path) -> None:
    def cut(kind: str, how: str | dict = "auto") -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(folder / kind, tp_plan=how)

    alone = attached(llama())
    expected = trained(copy.deepcopy(alone))
    model = attached(cut("Llama"))
    assert_same_basis(model, alone)
    assert_same(trained(model), expected)

    # An adapter's file is that of the model on one process, whichever rank writes it.
    if rank == 1:
        lx.save_adapter(model, folder / "adapter.safetensors")
    dist.barrier()
    back = lx.load_adapter(llama(), folder / "adapter.safetensors", progress=False)
    with torch.no_grad():  # another way through transformers' layers
        torch.testing.assert_close(model(IDS).logits, back(IDS).logits)
    again = lx.load_adapter(cut("Llama"), folder / "adapter.safetensors", progress=False)
    assert_same(trained(again, steps=3), trained(back, steps=3))
    # A run goes on with another number of ranks: R and the state of the optimizer of either belong to both.
    model, one, states = attached(cut("Llama")), attached(llama()), []
    trained(model, steps=2, state=states)
    with torch.no_grad():
        for (_, layer), (_, of_one) in zip(adapted_layers(model), adapted_layers(one), strict=True):
            of_one.R.copy_(layer.R)
    rest = trained(one, steps=2, state=states)
    assert_same(rest, tuple(each[2:] for each in expected))

    dense = TARGETS[:4]  # all but the experts, which are no linear layers
    assert_same(trained(attached(cut("Mixtral"), dense)), trained(attached(causal_lm("Mixtral"), dense)))
    # Layers that are whole, of which the gradient of a part of the output is summed in the wrapped call alone.
    targets = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    assert_same(trained(attached(cut("DeepseekV2"), targets)), trained(attached(causal_lm("DeepseekV2"), targets)))

    model = cut("Llama", {"model.layers.*.mlp.up_proj": "replicated_with_grad_allreduce"})
    refused(model, ValueError, r"up_proj' is cut over ranks by transformers' style ReplicatedWithGradAllReduce")

    peft = pytest.importorskip("peft")
    from loraxs_kernels.integrations.peft import LoraXSConfig

    models = [peft.get_peft_model(each, LoraXSConfig(r=4, target_modules=TARGETS)) for each in (cut("Llama"), llama())]
    assert_same(*map(trained, models))
    other = LoraXSConfig(r=3, target_modules=TARGETS, svd_seed=3, lora_alpha=6, loraxs_dropout=0.2)
    found = []
    for each in models:
        each.add_adapter("other", other)
        each.base_model.set_adapter(["default", "other"])
        torch.manual_seed(5)  # of the masks, which are those of one process
        found.append(trained(each.train()))
    assert_same(*found)
    names = ["default", "other", "__base__", "default"]
    with pytest.raises(ValueError, match=r"'default', 'other' have different A and B in module .* cut over ranks"):
        models[0].eval()(input_ids=IDS, adapter_names=names)
    for each in models:
        each.delete_adapter("other")
        each.set_adapter("default")
    models[0].save_pretrained(folder / f"peft-{rank}")
    loaded = peft.PeftModel.from_pretrained(llama(), folder / f"peft-{rank}")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, models[0](input_ids=IDS).logits)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def cut_by_torch(rank: int) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, alone = mesh_of(dist.get_world_size()), attached(llama())
    expected = trained(copy.deepcopy(alone))

    def cut(**how: object) -> nn.Module:
        return parallelized(llama(), mesh, **how)

    after = parallelized(attached(llama()), mesh, suffix=".base_layer")
    compiled, checkpointed = attached(cut()), attached(cut())
    for block in compiled.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (after, compiled, checkpointed.train()):
        assert_same_basis(model, alone)
        assert_same(trained(model), expected)
    assert_same(trained(attached(cut(sequence=True)), functools.partial(loss_of_parts, mesh=mesh)), expected)

    models = [attached(cut()), copy.deepcopy(alone)]
    for model in models:  # those of some layers are cut, those of others are added to a sum over ranks
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or name.endswith("bias"))
    assert_same(*map(trained, models))

    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 9))  # no multiples of the number of ranks

    def error(model: nn.Module) -> torch.Tensor:
        return (model(x) - 1).square().mean()

    x = torch.randn(7, 10, generator=torch.Generator().manual_seed(3))
    styles = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    found = []
    for model in (parallelize_module(mlp(), mesh, styles), mlp()):
        attached(model, "all-linear", dropout=0.3)
        for _, layer in adapted_layers(model):
            nn.init.normal_(layer.R, std=0.3, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(5)  # of the masks, which are those of one process
        found.append(trained(model.train(), error))
    assert_same(*found)

    model = attached(cut())
    with pytest.raises(RuntimeError, match="summed over the ranks, cannot be differentiated again"):
        torch.autograd.grad(loss_of(model), [next(adapted_layers(model))[1].R], create_graph=True)

    model = cut()
    cut_otherwise = DTensor.from_local(torch.randn(48, 32), mesh, [Partial()])
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(cut_otherwise)
    refused(model, ValueError, r"module 'model\.layers\.1\.mlp\.up_proj' is cut over ranks by placements \(Partial")
    model = cut()
    model.model.layers[1].mlp.up_proj.__class__ = Doubled
    refused(model, ValueError, r"up_proj' is cut over ranks by placements .* in a Doubled")
    model = llama()  # as transformers before 5.17 leaves it, whose weights are parts and no DTensors
    model.model.layers[1].mlp.up_proj._hf_tp_plan = "colwise"
    refused(model, ValueError, r"up_proj' is cut over ranks by this transformers' style 'colwise'")

    for blocks in (2, 1):  # what one rank finds wrong with its weights, of which it may have the whole, all raise
        model = llama()
        for block in model.model.layers[:blocks]:
            parallelize_module(block, mesh, plan())
        W = model.model.layers[1].mlp.up_proj.weight.detach()
        if rank == 1:
            (W.to_local() if is_dtensor(W) else W)[0, 0] = torch.nan
        # One rank has factored it.
        refused(model, (ValueError, RuntimeError), r"module 'model\.layers\.1\.mlp\.up_proj': W: .* magnitude of nan")

    model = cut()
    refused_on_all_ranks(model, 1)
    asked = []

    def without_a_collective(layer: nn.Module) -> torch.Tensor:
        asked.append(layer)
        raise OSError("no such disk")

    refused(model, OSError, "^no such disk", without_a_collective)
    assert len(asked) == 1, "the next weight would be gathered with those who still wait to gather this one"
    assert_same_basis(attached(model), alone)
    assert_same_basis(*[attached(each.bfloat16()) for each in (cut(), llama())])


def refused(
    model: nn.Module,
    error: type[Exception] | tuple[type[Exception], ...],
    match: str,
    read: Callable[[nn.Module], torch.Tensor] | None = None,
) -> None:
    """`attach`, which reads weights by `read`, raises, and the model is as it was."""
    before = [(name, m) for name, m in model.named_modules()], [(p, p.requires_grad) for p in model.parameters()]
    lx.register_weight_reader(nn.Linear, read)
    try:
        with pytest.raises(error, match=match):
            attached(model)
    finally:
        lx.register_weight_reader(nn.Linear, None)
    assert [(name, m) for name, m in model.named_modules()] == before[0]
    assert all(p is q and p.requires_grad == r for p, (q, r) in zip(model.parameters(), before[1], strict=True))


def refused_on_all_ranks(model: nn.Module, one: int) -> None:
    """What one rank raises with a weight that it has gathered."""
    failing = model.model.layers[0].self_attn.o_proj

    def read(layer: nn.Module) -> torch.Tensor:
        W = layer.weight.full_tensor()
        if dist.get_rank() == one and layer is failing:
            raise OSError("no such disk")
        return W

    own, others = (OSError, "^no such disk"), (RuntimeError, "another process .*could not .*: OSError: no such disk")
    refused(model, *(own if dist.get_rank() == one else others), read)


def sharded(model: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_share(mesh: dist.DeviceMesh, parts: int = 1) -> Callable[[nn.Module], torch.Tensor]:
    """The loss on this rank's rows of the batch; in several parts, of which all but the last call backward."""
    rows = IDS.chunk(mesh.size())[mesh.get_local_rank()] if mesh.ndim == 1 else IDS.chunk(mesh.size())[dist.get_rank()]

    def loss(model: nn.Module) -> torch.Tensor:
        *first, last = rows.chunk(parts)
        done = [loss_of(model, each) / parts for each in first]
        for each in done:
            each.backward()
        return loss_of(model, last) / parts + sum(each.detach() for each in done)

    return loss


def mean_over(mesh: dist.DeviceMesh, found: tuple) -> tuple:
    losses = torch.tensor(found[0], dtype=torch.float64)
    for i in range(mesh.ndim):
        dist.all_reduce(losses, group=mesh.get_group(i))
    return (losses / mesh.size()).tolist(), found[1]


def test_models_that_transformers_has_cut_train_like_whole_ones(tmp_path):
    for kind in ("Llama", "Mixtral", "DeepseekV2"):
        causal_lm(kind).save_pretrained(tmp_path / kind)
    on_ranks(2, cut_by_transformers, tmp_path)


def test_models_that_torch_has_cut_train_like_whole_ones():
    on_ranks(2, cut_by_torch)


class Together(nn.Module):
    """Layers of one x, which are made together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((y - 1).square().mean() for y in forward_together(x, *self.layers))


def fsdp_first(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = mesh_of(dist.get_world_size(), names=("data",))
    for make in (llama, functools.partial(causal_lm, "GPT2"), t5):
        alone = attached(make(), "all-linear")
        expected = trained(copy.deepcopy(alone))
        model = attached(sharded(make(), mesh), "all-linear")
        assert_same_basis(model, alone)
        # With other Parameters in the place of R, as a state dict may bring them
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
        assert_same(mean_over(mesh, trained(model, of_share(mesh, parts=2))), expected)

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    # Cut as one, so that all weights are whole when the layers are made together
    together = attached(fully_shard(Together(), mesh=mesh), "all-linear", init="random")
    found, alone = trained(together, lambda model: model(x.chunk(2)[rank])), Together()
    assert_same(mean_over(mesh, found), trained(attached(alone, "all-linear", init="random"), lambda model: model(x)))

    one = nn.Sequential(nn.Linear(8, 6))
    bank = lx.AdapterBank.create(folder / f"of-one-{rank}", attached(copy.deepcopy(one), "all-linear"))
    bank.add("alice", {"0": torch.eye(4)})
    outputs, x = [], torch.stack([x, x + 1], dim=1)  # a rank has as many rows as there are samples in all
    for each, rows in (
        (one, x),
        (distribute_module(copy.deepcopy(one), mesh), distribute_tensor(x, mesh, [Shard(0)])),
    ):
        bank.attach(each)
        outputs.append(each(rows, adapter_ids=["alice", None, None, "alice"]))
    torch.testing.assert_close(outputs[1].full_tensor(), outputs[0])

    bank = lx.AdapterBank.create(folder / f"bank-{rank}", model)
    bank.attach(model)
    with pytest.raises(RuntimeError, match="is sharded by FSDP2, so that each rank"):
        bank.train(["alice"], create=True)


def test_fsdp2_before_attach_trains_like_one_process(tmp_path):
    on_ranks(2, fsdp_first, tmp_path)


def two_dimensions(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, alone = mesh_of(2, 2, names=("data", "tp")), attached(llama())
    data, expected = mesh["data"], trained(copy.deepcopy(alone))
    cut = functools.partial(parallelized, mesh=mesh["tp"])
    cut_after = functools.partial(parallelized, mesh=mesh["tp"], suffix=".base_layer")
    shard = functools.partial(sharded, mesh=data)
    for order in ([cut, attached, shard], [cut, shard, attached], [attached, cut_after, shard]):
        model = llama()
        for step in order:
            step(model)
        assert_same_basis(model, alone)
        found = trained(model, of_share(data))
        assert_same(mean_over(data, found), expected)
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        assert not float(whole(norm))  # all gradients have been used, and can be clipped together
    refused_on_all_ranks(shard(cut(llama())), 3)
    file = folder / f"{rank}.safetensors"
    lx.save_adapter(model, file)  # R is cut over "data": every rank calls
    one = lx.load_adapter(llama(), file, progress=False)  # and goes on with other numbers of ranks
    model = attached(sharded(llama(), mesh_of(4, names=("data",))))
    lx.load_adapter(model, file)
    share = of_share(mesh_of(4, names=("data",)))
    assert_same(mean_over(mesh_of(4, names=("data",)), trained(model, share, steps=3)), trained(one, steps=3))

    line = mesh_of(4)
    for n in (4, 5, 6, 9):  # of which ranks have parts of other sizes, or none
        t = torch.arange(2 * n).view(2, n)
        assert torch.equal(piece(t, 1, line), distribute_tensor(t, line, [Shard(1)]).to_local())

    model = llama()
    W = model.model.layers[1].mlp.up_proj.weight.detach()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(distribute_tensor(W, mesh, [Shard(0), Shard(1)]))
    refused(model, ValueError, r"up_proj' is cut over ranks by placements \(Shard\(dim=0\), Shard\(dim=1\)\)")

    grid = mesh_of(2, 2, names=("copies", "data"))  # two copies of the model, each of two shards
    assert_same(mean_over(grid, trained(attached(sharded(llama(), grid)), of_share(grid))), expected)


def test_fsdp2_over_tensor_parallel(tmp_path):
    on_ranks(4, two_dimensions, tmp_path)


@pytest.mark.gpu("parallel")
def test_one_rank_on_a_gpu():
    """All that a single GPU can show: the ways through DTensors there and its kernels on their local tensors."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))
        ids, models = IDS.cuda(), [causal_lm("Llama").cuda().bfloat16() for _ in range(3)]
        parallelized(models[1], mesh)
        sharded(models[2], mesh)
        expected, *found = [trained(attached(each), functools.partial(loss_of, ids=ids), 3) for each in models]
        for losses, gradients in found:
            torch.testing.assert_close(losses, expected[0], rtol=1e-3, atol=0)
            for gR, other in zip(gradients, expected[1], strict=True):
                assert (gR - other).norm() <= 0.05 * other.norm() > 0
    finally:
        dist.destroy_process_group()
