"""Trainer, TRL and accelerate on attached models: R-only checkpoints that resume to the bit, gradients that arrive."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import logging
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch
from helpers import interrupted_at
from safetensors.torch import load_file, save_file
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels.matching import adapted_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from loraxs_kernels.integrations.transformers import LoraXSCallback  # noqa: E402

VOCABULARY, LENGTH, CLASSES = 40, 8, 3
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_attention_heads=2)
TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
FIGURES = ("loraxs_R_norm", "loraxs_delta_mean", "loraxs_delta_max")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def llama(dropout: float = 0.25, layers: int = 2) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES, **TOKENS, num_hidden_layers=layers, attention_dropout=dropout)
    return transformers.LlamaForCausalLM(config)


def roberta() -> nn.Module:
    torch.manual_seed(1)
    sizes = SIZES | dict(num_hidden_layers=2, max_position_embeddings=LENGTH + 4)
    config = transformers.RobertaConfig(**sizes, num_labels=CLASSES)
    return transformers.RobertaForSequenceClassification(config)


def attached(model: nn.Module | None = None, **options) -> nn.Module:
    options = {"target_modules": "all-linear", "dropout": 0.1, "progress": False} | options
    return lx.attach(llama() if model is None else model, 4, **options)


def with_peft(model: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    from loraxs_kernels.integrations.peft import LoraXSConfig

    defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, LoraXSConfig(r=4, **defaults | options))


def texts(n: int = 16) -> list[dict]:
    ids = torch.randint(3, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def labelled(n: int = 16) -> list[dict]:
    return [{"input_ids": each["input_ids"], "labels": each["input_ids"][0] % CLASSES} for each in texts(n)]


def arguments(folder: Path, **options):
    defaults = dict(output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2)
    defaults |= dict(save_steps=2, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, seed=3)
    return transformers.TrainingArguments(**defaults | options)


def trainer_of(model: nn.Module, folder: Path, data: list | None = None, callbacks: list | None = None, **options):
    return transformers.Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data or texts(),
        eval_dataset=(data or texts())[:4],
        callbacks=[LoraXSCallback()] if callbacks is None else callbacks,
    )


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_resumes(make, folder: Path, **options):
    """The trainer of a whole run, and one that went on from its second step, with the same result to the bit."""
    whole = trainer_of(make(), folder / "whole", **options)
    whole.train()
    resumed = trainer_of(make(), folder / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    assert same(trained(resumed.model), trained(whole.model))
    return whole, resumed


def parts_in(checkpoint: Path) -> set[str]:
    """What model.safetensors has of each module."""
    return {name.rpartition(".")[2] for name in load_file(checkpoint / "model.safetensors")}


def own(model: nn.Module) -> tuple:
    """What somebody might leave on a model."""
    hooks = [
        len(hooks)
        for m in model.modules()
        for hooks in (m._forward_hooks, m._load_state_dict_pre_hooks, m._load_state_dict_post_hooks)
    ]
    return hooks, model.__dict__.get("save_pretrained")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of 8 steps with a checkpoint after every second one, from which tests resume."""
    trainer = trainer_of(attached(), tmp_path_factory.mktemp("whole"), num_train_epochs=2)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [2, 4])  # in the middle of an epoch and at the end of one
def test_resumes_to_the_bit(whole, tmp_path, step, caplog):
    end = trained(whole.model)
    initial = trained(attached())
    assert not any(torch.equal(end[name], initial[name]) for name in end)

    model = attached()
    before = own(model)
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
    with caplog.at_level(logging.WARNING, "transformers"):
        resumed = trainer_of(model, tmp_path / "resumed", num_train_epochs=2)
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(model), end) and own(model) == before
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert resumed.state.log_history[step:-1] == whole.state.log_history[step:-1]  # the last one has times


@pytest.mark.gpu("neighbours")
def test_resumes_on_a_gpu(tmp_path):
    whole = trainer_of(attached(), tmp_path / "whole", use_cpu=False, bf16=True)
    whole.train()
    resumed = trainer_of(attached(), tmp_path / "resumed", use_cpu=False, bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(p.is_cuda for p in resumed.model.parameters())
    end, again = trained(whole.model), trained(resumed.model)
    for name, R in end.items():  # attention's own gradient need not have the same bits twice there
        torch.testing.assert_close(again[name], R, atol=1e-4, rtol=0)
    logged = whole.state.log_history[0]
    assert logged["loraxs_R_norm"] > 0 and logged["loraxs_delta_max"] > 0


def test_resumes_the_last_of_an_interrupted_run(tmp_path):
    """Tied and trained embeddings, a head, a parametrization of R, running statistics and mixed precision too."""

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    def model() -> nn.Module:
        made = llama()
        made.config.tie_word_embeddings = True
        made.tie_weights()
        made.model.norm = Statistics(16)
        return attached(made, modules_to_save=["embed_tokens"])

    def model_of_halves() -> nn.Module:
        made = attached(roberta(), target_modules=["query", "value"], modules_to_save=["classifier"])
        for _, layer in adapted_layers(made):
            nn.utils.parametrize.register_parametrization(layer, "R", Half())
        return made

    for number, (make, data) in enumerate([(model, texts()), (model_of_halves, labelled())]):
        options = dict(data=data, save_total_limit=1, bf16=True, max_steps=6)
        whole = trainer_of(make(), tmp_path / f"whole{number}", **options)
        whole.train()
        folder = tmp_path / f"interrupted{number}"
        interrupted = trainer_of(make(), folder, callbacks=[LoraXSCallback(), Interrupt()], **options)
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()
        assert [each.name for each in folder.iterdir()] == ["checkpoint-4"]
        resumed = trainer_of(make(), folder, **options)
        resumed.train(resume_from_checkpoint=True)
        assert same(resumed.model.state_dict(), whole.model.state_dict())


class Statistics(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.mT).mT


class Half(nn.Module):
    def forward(self, R):
        return R / 2

    def right_inverse(self, R):
        return 2 * R


def test_a_checkpoint_holds_the_adapter_alone(whole):
    checkpoint = Path(whole.args.output_dir) / "checkpoint-8"
    names = {each.name for each in checkpoint.iterdir()}
    assert {"adapter.safetensors", "model.safetensors", "README.md", "optimizer.pt", "trainer_state.json"} <= names
    assert parts_in(checkpoint) == {"R", "loraxs_basis", "loraxs_scaling"}
    ids = texts()[0]["input_ids"][None]
    fresh = lx.load_adapter(llama().eval(), checkpoint / "adapter.safetensors", progress=False)
    assert torch.equal(fresh(ids).logits, whole.model.eval()(ids).logits)
    with pytest.raises((OSError, ValueError)):  # and not a model made of R
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint)


def test_the_model_itself_is_saved_whole(tmp_path):
    """By save_pretrained, after training and, anywhere but into a checkpoint, while it lasts or was given up."""

    class Save(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            model.save_pretrained(tmp_path / "during")
            model.save_pretrained(tmp_path / "elsewhere" / "checkpoint-1")
            model.save_pretrained(tmp_path / "run" / "best")
            model.save_pretrained(tmp_path / "run" / "checkpoint-1", state_dict=model.state_dict())  # as with DeepSpeed
            raise KeyboardInterrupt

    model = attached()
    state, before = set(model.state_dict()), model.save_pretrained
    with pytest.warns(UserWarning, match="random weights") as warned, pytest.raises(KeyboardInterrupt):
        trainer_of(model, tmp_path / "run", callbacks=[LoraXSCallback(), Save()]).train()
    assert sum("random weights" in str(each.message) for each in warned) == 3  # once a call
    small = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors").keys()
    assert state & small == {key for key in state if key.endswith(".R")}
    with pytest.warns(UserWarning, match="random weights"):
        model.save_pretrained(tmp_path / "given up")
    given_up = copy.deepcopy(model)
    assert given_up.save_pretrained.args[0] is given_up
    lx.detach(given_up).save_pretrained(tmp_path / "run" / "checkpoint-9")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-9")
    trainer = trainer_of(model, tmp_path / "run", max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="save_pretrained")
        trainer.train()
    assert model.save_pretrained == before and "save_pretrained" not in model.__dict__
    with pytest.warns(UserWarning, match="random weights"):
        trainer.save_model(tmp_path / "after")
    for folder in ("during", "elsewhere/checkpoint-1", "run/best", "given up", "after"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == state
        assert (tmp_path / folder / "config.json").exists()
    model.save_pretrained = patched = functools.partial(model.save_pretrained)
    trainer_of(model, tmp_path / "run", max_steps=1).train()
    assert model.__dict__["save_pretrained"] is patched
    del model.save_pretrained
    lx.merge(model)
    trainer.save_model(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = texts()[0]["input_ids"][None]
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_the_best_model_is_loaded(tmp_path, caplog):
    options = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="worst")
    trainer = trainer_of(attached(), tmp_path, save_total_limit=1, save_only_model=True, **options)
    scores = iter([0.0, 1.0, 0.5, 0.4, 0.3, 0.2])
    trainer.compute_metrics = lambda _: {"worst": next(scores)}
    with caplog.at_level(logging.WARNING, "transformers"):
        trainer.train()
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    now = trained(trainer.model)
    assert all(torch.equal(best[name], R) for name, R in now.items()) and "missing keys" not in caplog.text
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()


def test_another_basis_is_not_resumed(whole, tmp_path):
    other = llama()
    nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    turned = attached()  # one pair of singular vectors: the same B A, another B R A
    layer = turned.model.layers[0].mlp.down_proj
    layer.A[0].neg_()
    layer.B[:, 0].neg_()
    more = attached(modules_to_save=["lm_head"])
    fewer = attached(exclude_modules=["layers.0.self_attn.v_proj"])
    for model, error, message in [
        (attached(init="random"), lx.AdapterMismatch, "A and B of module 'model.layers.0.self_attn.q_proj'"),
        (attached(other), lx.AdapterMismatch, "A and B of module 'model.layers.1.mlp.up_proj'"),
        (turned, lx.AdapterMismatch, "A and B of module 'model.layers.0.mlp.down_proj'"),
        (more, ValueError, "no values for 'lm_head.weight'"),
        (fewer, ValueError, "an adapter for 'model.layers.0.self_attn.v_proj', which has none here"),
        (attached(alpha=32), lx.AdapterMismatch, r"alpha of module '.*' is 32, must be 4, with which its R"),
    ]:
        before, trainer = trained(model), trainer_of(model, tmp_path, callbacks=[])
        LoraXSCallback().add_to(trainer)
        with pytest.raises(error, match=message):
            trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
        assert same(trained(model), before)


def test_a_model_from_model_init_is_looked_at_too(whole, tmp_path):
    """Trainer makes it after the callback, and loads the checkpoint before training begins."""
    trainer = transformers.Trainer(
        model_init=lambda: attached(init="random"),
        args=arguments(tmp_path),
        train_dataset=texts(),
        callbacks=[LoraXSCallback()],
    )
    with pytest.raises(lx.AdapterMismatch, match=r"A and B of module 'model\.layers\.0\.self_attn\.q_proj'"):
        trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")


def test_a_checkpoint_that_is_read_by_hand_is_compared_in_its_dtype(whole):
    """s = 0.3 / 4 is another number in bf16, and so is what it says of A and B."""
    tensors = load_file(f"{whole.args.output_dir}/checkpoint-2/model.safetensors")
    model, meta = attached(alpha=0.3), attached(llama().to("meta"))
    for key in tensors:
        if key.endswith("scaling"):
            tensors[key].fill_(0.3 / 4)
    assert not model.load_state_dict({key: t.bfloat16() for key, t in tensors.items()}, strict=False).unexpected_keys
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(
        lx.AdapterMismatch, match=r"alpha of module 'model\.layers\.0\.self_attn\.q_proj' is 0.3, must be 4"
    ):
        layer.load_state_dict({"loraxs_scaling": torch.tensor(1.0)}, strict=False)
    near = {"loraxs_basis": 1.005 * tensors["model.layers.0.self_attn.q_proj.loraxs_basis"]}
    with pytest.raises(lx.AdapterMismatch, match=r"\(relative error [1-9]\..e-03, must be at most 1e-03\)"):
        layer.load_state_dict(near, strict=False)
    with pytest.raises(ValueError, match=r"A and B of module '.*q_proj' are on the meta device, must be made before"):
        meta.load_state_dict({key: t for key, t in tensors.items() if "scaling" not in key}, strict=False)


CHANGES = {
    "NaN": lambda t: t.fill_(torch.nan),
    "another shape": lambda t: torch.ones(3, 3),
}


def test_a_checkpoint_of_an_earlier_version_has_no_scaling(whole, tmp_path):
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-8", tmp_path / "checkpoint-8")
    path = tmp_path / "checkpoint-8" / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.endswith("_scaling")}, path, {"format": "pt"})
    resumed = trainer_of(attached(), tmp_path, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=True)
    assert same(trained(resumed.model), trained(whole.model))


@pytest.mark.parametrize("case", CHANGES)
def test_a_damaged_checkpoint_is_not_resumed(whole, tmp_path, case):
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-2", tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    key = [each for each in tensors if each.endswith(".R")][-1]
    tensors[key] = CHANGES[case](tensors[key])
    save_file(tensors, path, {"format": "pt"})
    model = attached()
    before = trained(model)
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint: '{key}' has shape"):
        trainer_of(model, tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert same(trained(model), before)


def test_an_interrupted_start_leaves_the_model_as_it_was(tmp_path):
    model = attached(target_modules=["q_proj"])
    model.save_pretrained = mine = lambda *_, **__: None
    trainer = trainer_of(model, tmp_path)
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, LoraXSCallback))
    begin = functools.partial(callback.on_train_begin, trainer.args, trainer.state, trainer.control, model=model)
    end = functools.partial(callback.on_train_end, trainer.args, trainer.state, trainer.control)
    end()
    before, undone = own(model), 0
    for k in itertools.count(1):
        if not interrupted_at(k, begin, within="/integrations/transformers/callback.py"):
            break
        undone += own(model) == before
        end()
        assert own(model) == before, k
    assert own(model) != before and undone > 20
    end()
    assert own(model) == before and model.save_pretrained is mine


def test_figures_are_logged_everywhere(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            seen.append(dict(logs))

    trainer = trainer_of(attached(alpha=-8), tmp_path, callbacks=[Reporter()], max_steps=3)  # sizes know no sign
    callback = LoraXSCallback()
    callback.add_to(trainer)
    callback.add_to(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    layers = [layer for _, layer in adapted_layers(trainer.model)]
    ratios = [layer.delta_weight().norm() / layer.base_layer.weight.norm() for layer in layers]
    expected = torch.cat([layer.R.flatten() for layer in layers]).norm(), sum(ratios) / len(ratios), max(ratios)
    for logged in (trainer.state.log_history[2], seen[2]):
        torch.testing.assert_close(
            tuple(torch.tensor(logged[name]) for name in FIGURES), tuple(map(torch.Tensor.detach, expected))
        )
    assert not any(name in trainer.state.log_history[-1] for name in FIGURES)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][1]["loraxs_R_norm"] > 0


def test_with_peft_the_figures_are_logged_and_peft_saves(tmp_path):
    whole = trainer_of(with_peft(llama(), lora_alpha=8), tmp_path / "whole", max_steps=4)
    whole.model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged, so its R would not train; call model.unmerge_adapter\(\) first"):
        whole.train()
    whole.model.unmerge_adapter()
    whole.train()
    plain = attached(llama(), alpha=8, dropout=0.0)
    values = {
        name.replace("base_model.model.", "").replace("loraxs_R.default", "R"): R
        for name, R in trained(whole.model).items()
    }
    plain.load_state_dict(values, strict=False)
    layers = [layer for _, layer in adapted_layers(plain)]
    ratios = [(layer.delta_weight().norm() / layer.base_layer.weight.norm()).item() for layer in layers]
    logged = whole.state.log_history[3]
    assert logged["loraxs_delta_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert logged["loraxs_delta_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    resumed = trainer_of(with_peft(llama(), lora_alpha=8), tmp_path / "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(resumed.model), trained(whole.model))


def test_figures_without_the_weights_of_a_layer(tmp_path):
    class Opaque(nn.Linear):
        def forward(self, x):
            return x @ self.weight

    model = llama()
    layer = model.model.layers[0].mlp
    layer.up_proj = Opaque(16, 24, bias=False)
    layer.up_proj.weight = nn.Parameter(torch.randn(16, 24))
    nn.init.zeros_(layer.gate_proj.weight)
    factors = {"model.layers.0.mlp.up_proj": (torch.randn(4, 16), torch.randn(24, 4))}
    trainer = trainer_of(attached(model, target_modules=["layers.0.mlp.up_proj"], init=factors), tmp_path, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loraxs_R_norm"] > 0 and "loraxs_delta_max" not in logged
    model = lx.attach(lx.detach(model), 4, target_modules=["layers.0.mlp.gate_proj", "down_proj"], progress=False)
    trainer = trainer_of(model, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loraxs_delta_max"] < 1  # of the two that are not zero


@pytest.mark.parametrize("how", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_gradients_pass_checkpointed_layers(tmp_path, how):
    """The same bits as without, where no dropout is; and nothing stays on the model."""
    ends = []
    for options in ({}, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=how)):
        model = attached(llama(dropout=0.0), dropout=0.0)
        model.main_input_name = "pixel_values"  # or transformers 5 itself lets the embeddings' output require grad
        trainer_of(model, tmp_path, max_steps=2, **options).train()
        ends.append(trained(model))
    assert same(*ends)


def test_adapters_without_gradients_are_an_error(tmp_path):
    """What reentrant checkpointing does to a frozen model, while its head learns happily."""
    model = attached(modules_to_save=["lm_head"])
    model.model.register_forward_hook(
        lambda module, args, output: setattr(output, "last_hidden_state", output[0].detach())
    )
    with pytest.raises(RuntimeError, match="no R got a gradient in the first step"):
        trainer_of(model, tmp_path).train()
    first = attached()
    first.model.layers[0].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.warns(UserWarning, match=r"R of 7 of 14 modules, the first 'model.layers.0.self_attn.q_proj'"):
        trainer_of(first, tmp_path, max_steps=1).train()


def test_gradients_that_are_gone_before_the_step_are_not_missed(tmp_path):
    """By DeepSpeed, whether --deepspeed or accelerate's own configuration has brought it, and by optimizers that step
    within the backward."""
    for gone in ({}, {"deepspeed_plugin": object()}, {"optim": "lomo"}, {"optim": "galore_adamw_layerwise"}):
        callback = LoraXSCallback()
        args = types.SimpleNamespace(output_dir=str(tmp_path), **{"deepspeed_plugin": None, **gone})
        callback.on_train_begin(args, None, None, model=attached())
        with contextlib.nullcontext() if gone else pytest.raises(RuntimeError, match="no R got a gradient"):
            callback.on_pre_optimizer_step(args, None, None, model=attached())


def test_an_R_in_half_precision_is_warned_of(tmp_path):
    """TRL makes it so in quantised models."""
    model = attached()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.requires_grad else p.data
    with pytest.warns(UserWarning, match=r"R of 14 modules, the first 'model\..*', trains in half precision"):
        trainer_of(model, tmp_path, max_steps=1).train()


def test_a_frozen_adapter_is_no_training(tmp_path):
    """As PEFT loads one without is_trainable; with checkpointing, Trainer itself would not tell."""
    model = attached().requires_grad_(False)
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="no R trains; load the adapter with is_trainable=True"):
        trainer_of(model, tmp_path).train()
    model.lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match="no R trains"):
        trainer_of(model, tmp_path, max_steps=1).train()


def test_refuses_before_it_trains(tmp_path):
    bank = lx.AdapterBank.create(tmp_path / "bank", attached(dropout=0.0))
    served = bank.attach(llama(), progress=False)
    for model, message in [
        (llama(), "has no LoRA-XS adapters"),
        (lx.merge(attached()), "is merged"),
        (served, "are a bank's, must be the model's own for LoraXSCallback"),
    ]:
        model.lm_head.requires_grad_(True)
        with pytest.raises(ValueError, match=message):
            trainer_of(model, tmp_path).train()
    args = types.SimpleNamespace(output_dir=str(tmp_path), save_safetensors=False)  # which transformers 4 has
    with pytest.raises(ValueError, match="args: got save_safetensors=False, must be True"):
        LoraXSCallback().on_train_begin(args, None, None, model=attached())
    sharded = attached()
    sharded.model.layers[1].mlp.up_proj.R.ds_id = 0  # as of DeepSpeed's ZeRO-3
    with pytest.raises(ValueError, match=r"R of module 'model\.layers\.1\.mlp\.up_proj' is sharded, must be whole"):
        trainer_of(sharded, tmp_path).train()
    model = attached()
    model.model.norm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 parameters train, the first 'model.norm.weight', that no adapter file"):
        trainer_of(model, tmp_path, max_steps=2).train()
    other = attached()
    other.model.norm.requires_grad_(True)
    with pytest.warns(UserWarning):
        trainer_of(other, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert same(trained(other), trained(model))


def fused_head(self, input_ids, labels, **_):
    """As TRL's and Liger's, which never call the head."""
    head = self.get_output_embeddings()
    logits = nn.functional.linear(self.model(input_ids).last_hidden_state, head.weight)
    return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("put_on", [attached, with_peft])
def test_an_adapter_of_a_head_that_is_never_called_is_refused(tmp_path, put_on):
    base = llama()
    model = put_on(base, target_modules=["q_proj", "lm_head"])
    base.forward = types.MethodType(fused_head, base)
    with pytest.raises(ValueError, match=r"module '.*lm_head' is of a LlamaForCausalLM, which .* an adapter there has"):
        trainer_of(model, tmp_path).train()
    other = attached()
    other.forward = types.MethodType(fused_head, other)
    trainer_of(other, tmp_path, max_steps=1).train()


def test_a_reference_without_the_models_adapters_is_refused(tmp_path):
    """TRL loads the bare base model as the reference where it is given none."""
    file = tmp_path / "adapter.safetensors"
    lx.save_adapter(attached(init_std=0.3), file)

    def add(model: nn.Module, reference: nn.Module | None, steps: int = 0) -> None:
        trainer = trainer_of(model, tmp_path, callbacks=[])
        trainer.ref_model, trainer.state.global_step = reference, steps
        LoraXSCallback().add_to(trainer)

    with pytest.raises(
        ValueError, match=r"trainer: its ref_model is the base model without adapters, .* pass ref_model="
    ):
        add(lx.load_adapter(llama(), file), llama())
    add(lx.load_adapter(llama(), file), lx.load_adapter(llama(), file))
    add(lx.load_adapter(llama(), file), lx.detach(lx.load_adapter(llama(), file), merge=True))
    add(lx.load_adapter(llama(), file), None)
    add(lx.load_adapter(llama(), file), llama(), steps=1)  # it has trained: what it started from is not known here
    add(attached(), llama())  # a new adapter: the base is where it starts


def test_compiled_models(tmp_path):
    """By the user, whose names then begin with _orig_mod., and by Trainer."""

    def run(folder: Path, **resume) -> nn.Module:
        model = attached(llama(layers=1))
        compiled = torch.compile(model, backend="eager")
        trainer_of(compiled, folder, remove_unused_columns=False, max_steps=4).train(**resume)
        return model

    whole, checkpoint = run(tmp_path / "whole"), tmp_path / "whole" / "checkpoint-2"
    assert same(trained(run(tmp_path / "resumed", resume_from_checkpoint=str(checkpoint))), trained(whole))
    assert parts_in(checkpoint) == {"R", "loraxs_basis", "loraxs_scaling"}
    lx.load_adapter(llama(layers=1), checkpoint / "adapter.safetensors", progress=False)
    trainers = dict(torch_compile=True, torch_compile_backend="eager", max_steps=4)
    assert_resumes(lambda: attached(llama(layers=1)), tmp_path / "trainer's", **trainers)


def test_a_module_that_is_no_pretrained_model(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

        def forward(self, input_ids, labels):
            logits = self.linear(self.embedding(input_ids))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return attached(Plain(), target_modules=["linear"])

    assert_resumes(plain, tmp_path, max_steps=4)
    torch.manual_seed(0)
    lx.load_adapter(Plain(), tmp_path / "whole" / "checkpoint-4" / "adapter.safetensors", progress=False)


def quantised(kind: str, folder: Path) -> nn.Module:
    if not folder.exists():
        torch.manual_seed(1)
        sizes = SIZES | TOKENS | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, to quantise as it does")
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, to quantise as it does")
        config = transformers.BitsAndBytesConfig(**{kind: True})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    if not model.hf_quantizer.is_trainable:
        pytest.skip("this transformers does not train models that are quantised so")
    return model


@pytest.mark.parametrize("put_on", [attached, with_peft])
@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit", "torchao"])
def test_quantised_models_train_and_resume(tmp_path, kind, put_on):
    def make() -> nn.Module:
        return put_on(quantised(kind, tmp_path / "base"))

    whole, resumed = assert_resumes(make, tmp_path, max_steps=4, learning_rate=3e-2, data=4 * texts(4))
    losses = [each["loss"] for each in whole.state.log_history if "loss" in each]
    assert losses[-1] < losses[0] and set(FIGURES) <= whole.state.log_history[0].keys()
    if put_on is with_peft:
        return
    assert parts_in(tmp_path / "whole" / "checkpoint-2") == {"R", "loraxs_basis", "loraxs_scaling"}
    with pytest.warns(UserWarning, match="random weights"):
        whole.save_model(tmp_path / "saved")  # as transformers saves a quantised model, not as one of PEFT's
    assert (tmp_path / "saved" / "config.json").exists()
    lx.detach(copy.deepcopy(resumed.model)).save_pretrained(tmp_path / "detached")
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(lx.detach(resumed.model), tmp_path)


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    model = attached()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    loader = torch.utils.data.DataLoader(texts(), batch_size=4)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in [*loader] * 8:
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4]) and all(R.dtype == torch.float32 for R in trained(model).values())
    lx.save_adapter(accelerator.unwrap_model(prepared), tmp_path / "a.safetensors")
    fresh = lx.load_adapter(llama(), tmp_path / "a.safetensors", progress=False)
    assert same(trained(fresh), trained(model))


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [{"prompt": f"count to {n}:", "completion": " " + " ".join(map(str, range(n)))} for n in range(1, 9)]
    )

    def trainer_in(folder: Path):
        options = dict(learning_rate=1e-2, save_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False)
        return trl.SFTTrainer(
            model=attached(),
            args=trl.SFTConfig(output_dir=str(folder), per_device_train_batch_size=4, max_length=32, **options),
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[LoraXSCallback()],
        )

    whole = trainer_in(tmp_path / "whole")
    whole.train()
    history = whole.state.log_history
    assert history[-2]["loraxs_R_norm"] > history[0]["loraxs_R_norm"] > 0
    resumed = trainer_in(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(trained(resumed.model), trained(whole.model))
    assert (tmp_path / "whole" / "checkpoint-2" / "adapter.safetensors").exists()


def tokenizer():
    """Of bytes, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    names |= {c: i + 4 for i, c in enumerate("0123456789 :Ġabcdefnortuxyz")}
    made = Tokenizer(models.BPE(names, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
