"""attach, detach, merge, unmerge on whole models: what is matched, what trains, and that a failure changes nothing."""

from __future__ import annotations

import copy
import gc
import io
import re
import warnings
import weakref
from contextlib import suppress

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import loraxs_kernels as lx
from loraxs_kernels import LoraXSLinear
from loraxs_kernels.matching import match, targets_for, unwrapped
from loraxs_kernels.transaction import transaction

pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save. the head .classifier. of this:UserWarning")


@pytest.fixture
def bert():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).eval()


IDS = torch.arange(12).view(2, 6)


def adapters(model: nn.Module) -> dict[str, LoraXSLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraXSLinear)}


def snapshot(model: nn.Module):
    return (
        [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        model.training,
        sorted(model.__dict__),
    )


def randomise(model: nn.Module) -> nn.Module:
    for layer in adapters(model).values():
        nn.init.normal_(layer.R, std=0.5)
    return model


def test_offloaded_by_accelerate(bert):
    accelerate = pytest.importorskip("accelerate")
    expected = randomise(lx.attach(copy.deepcopy(bert), 4, target_modules=["query", "dense"]))
    accelerate.cpu_offload(bert, execution_device="cpu")
    lx.attach(bert, 4, target_modules=["query", "dense"])
    for a, b in zip(adapters(bert).values(), adapters(expected).values(), strict=True):
        assert a.base_layer.weight.is_meta and torch.equal(a.A, b.A)
        a.R.data.copy_(b.R)
    y = expected(IDS).logits
    torch.testing.assert_close(bert(IDS).logits, y, atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="is not in memory"):
        lx.merge(bert)
    accelerate.cpu_offload(expected, execution_device="cpu", offload_buffers=True)  # the adapters, too
    torch.testing.assert_close(expected(IDS).logits, y, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="is not in memory"):
        lx.save_adapter(expected, "never-written.safetensors")


def test_attach_says_what_its_arguments_did_not_do(bert):
    with pytest.warns(UserWarning, match="rank_pattern: no adapted module matches 'key'"):
        lx.attach(bert, 4, target_modules=["query"], rank_pattern={"key": 2})
    if transformers.__version__.startswith("4."):
        pytest.skip("the experts of transformers 4 are linear layers")
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out model\.layers\.0\.mlp\.experts and 1 more, experts"):
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        lx.attach(MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=40)), 4, target_modules="all-linear")


def test_the_name_of_a_model_is_no_model(tmp_path):
    for call, *more in ((lx.attach, 4), (lx.summary,), (lx.save_adapter, tmp_path), (lx.load_adapter, tmp_path)):
        with pytest.raises(TypeError, match=r"model: got 'gpt2', must be an nn\.Module"):
            call("gpt2", *more)


def test_attach_trains_R_and_the_saved_modules_alone(bert):
    y = bert(IDS).logits
    assert lx.attach(bert, 4, target_modules=["query", "value"], modules_to_save=["classifier"], alpha=8) is bert
    layers = adapters(bert)
    assert len(layers) == 4 and all(layer.scaling == 2 and not layer.training for layer in layers.values())
    trained = [name for name, p in bert.named_parameters() if p.requires_grad]
    assert trained == [*(f"{name}.R" for name in layers), "classifier.weight", "classifier.bias"]
    torch.testing.assert_close(bert(IDS).logits, y, atol=1e-4, rtol=0)  # R starts at 1e-5
    bert(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in bert.parameters() if p.requires_grad)
    assert not torch.equal(*(layer.R for layer in list(layers.values())[:2]))


def test_matching_is_pefts(bert):
    """The same modules, ranks and scales as PEFT itself picks for LoRA, for every way to say it."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    cases = [
        dict(target_modules=["query", "value"]),
        dict(target_modules=["output.dense"]),
        dict(target_modules=r".*layer\.1\..*(key|dense)"),
        dict(target_modules="all-linear", modules_to_save=["classifier"]),
        dict(target_modules=["query", "dense"], exclude_modules=["pooler.dense", "intermediate.dense"]),
        dict(target_modules=["query", "key"], exclude_modules=r".*layer\.0.*"),
        dict(
            target_modules=["query", "value", "dense"],
            rank_pattern={"query": 2, r"layer\.1\.output\.dense": 3},
            alpha_pattern={"value": 5, "attention.output.dense": 6},
        ),
    ]
    for case in cases:
        ours = lx.attach(copy.deepcopy(bert), 4, alpha=16, **case)
        theirs = get_peft_model(copy.deepcopy(bert), LoraConfig(r=4, lora_alpha=16, **case)).base_model.model
        expected = {
            name: (m.r["default"], m.scaling["default"])
            for name, m in theirs.named_modules()
            if isinstance(m, LoraLayer)
        }
        assert {name: (m.rank, m.scaling) for name, m in adapters(ours).items()} == expected, case


def test_the_targets_for_some_modules_name_no_others():
    part = lambda *names: nn.ModuleDict({name: nn.Linear(2, 2) for name in names})  # noqa: E731
    model = nn.ModuleDict({"a": part("q", "k"), "b": part("q"), "k": nn.Linear(2, 2)})
    assert targets_for(model, ["b.q", "a.q"]) == ["q"] and targets_for(model, ["b.q"]) == ["b.q"]
    assert targets_for(model, ["k"]) == "k", "the list would name a.k, too"


def test_all_linear_leaves_the_output_embeddings_out(gpt2):
    assert len(match(gpt2, "all-linear")) == 8 and "lm_head" not in match(gpt2, "all-linear")
    y = gpt2(IDS).logits
    lx.attach(gpt2, 4, target_modules="all-linear")  # Conv1D
    torch.testing.assert_close(gpt2(IDS).logits, y, atol=1e-4, rtol=0)
    merged = lx.merge(randomise(gpt2))
    separate = lx.unmerge(copy.deepcopy(gpt2))
    torch.testing.assert_close(merged(IDS).logits, separate(IDS).logits, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(merged(IDS).logits, y, atol=1e-3)


SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
WORDS = dict(input_ids=torch.arange(12).view(2, 6) + 2, labels=torch.tensor([0, 1]))
SPEECH = dict(conv_dim=(16,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1, vocab_size=9)
SPEECH |= dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=16)
HEADS = {
    "Bert": (SMALL | dict(vocab_size=50), WORDS, ["classifier"], True),
    "Roberta": (SMALL | dict(vocab_size=50), WORDS, ["classifier"], False),
    "DistilBert": (
        dict(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=50),
        WORDS,
        ["pre_classifier", "classifier"],
        False,
    ),
    "GPT2": (dict(n_embd=32, n_layer=1, n_head=2, vocab_size=50, pad_token_id=0), WORDS, ["score"], False),
    "ViT": (
        SMALL | dict(image_size=8, patch_size=4),
        dict(pixel_values=torch.randn(2, 3, 8, 8), labels=WORDS["labels"]),
        ["classifier"],
        False,
    ),
    "Wav2Vec2": (
        SMALL | SPEECH,
        dict(input_values=torch.randn(2, 400), labels=WORDS["labels"]),
        ["projector", "classifier"],
        False,
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_all_linear_trains_a_classification_head_whole(kind, tmp_path):
    sizes, inputs, head, pooler = HEADS[kind]
    task = "ForImageClassification" if kind == "ViT" else "ForSequenceClassification"
    model = getattr(transformers, kind + task)(getattr(transformers, kind + "Config")(**sizes))
    base, bodies = copy.deepcopy(model), [name for name, _ in model.named_children() if name not in head]
    assert lx.attach(model, 4, target_modules="all-linear").loraxs.modules_to_save == tuple(head)
    names = set(adapters(model))
    assert (
        names
        and all(name.split(".")[0] in bodies for name in names)
        and (f"{bodies[0]}.pooler.dense" in names) == pooler
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.R" for name in names} | {
        n for n, _ in base.named_parameters() if n.split(".")[0] in head
    }
    model.train()
    model(**inputs).loss.backward()
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).sub_(model.get_parameter(name).grad)
    lx.save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = lx.load_adapter(base.eval(), tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(**inputs).logits, model.eval()(**inputs).logits)


def test_what_else_may_be_said_of_a_classification_head(bert):
    def attach(**options):
        model = lx.attach(copy.deepcopy(bert), 2, **options)
        return model.loraxs.modules_to_save, "classifier" in adapters(model)

    pooler = ["bert.pooler"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert attach(target_modules="all-linear", modules_to_save=pooler) == (("bert.pooler", "classifier"), False)
        assert attach(target_modules="all-linear", modules_to_save=[]) == ((), False)
        assert attach(target_modules=["query"], modules_to_save=[]) == ((), False)
        assert attach(target_modules=["query"], modules_to_save=["classifier"]) == (("classifier",), False)
        assert attach(target_modules=["query", "classifier"]) == ((), True)
    for options in (dict(target_modules=["query"]), dict(target_modules=".*query", modules_to_save=pooler)):
        whole = re.escape(str([*options.get("modules_to_save", ()), "classifier"]))
        with pytest.warns(
            UserWarning, match=rf"\(classifier\) of this BertForSeq\w+ will not .*modules_to_save={whole}"
        ):
            attach(**options)


class Sentiment(BertForSequenceClassification):
    pass


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


def test_a_classification_head_is_found_in_derived_classes_and_inside_wrappers(bert, tmp_path):
    derived = Sentiment(bert.config)
    for model, head in (
        (derived, "classifier"),
        (Around(bert), "inner.classifier"),
        (torch.compile(copy.deepcopy(bert)), "classifier"),
        (nn.DataParallel(copy.deepcopy(bert)), "classifier"),
    ):
        base = unwrapped(model)
        fresh = copy.deepcopy(base)
        assert lx.attach(model, 2, target_modules="all-linear") is model
        assert base.loraxs.modules_to_save == (head,) and head not in adapters(base)
        nn.init.normal_(base.get_submodule(head).weight)
        lx.save_adapter(randomise(model), tmp_path / "adapter.safetensors")
        loaded, state = lx.load_adapter(fresh, tmp_path / "adapter.safetensors").state_dict(), base.state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], t) for name, t in state.items())


def test_a_head_that_trains_in_part_is_warned_of():
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, vocab_size=50))
    for options in (dict(target_modules=["query", "dense"]), dict(modules_to_save=["classifier.dense"])):
        with pytest.warns(
            UserWarning, match=r"the head \(classifier\.out_proj\) of this Roberta.*'classifier\.out_proj'\]"
        ):
            lx.attach(copy.deepcopy(model), 2, **(dict(target_modules=["query"]) | options))


def test_a_head_of_more_than_linear_layers_beside_a_backbone_of_another_name(bert):
    class TwoPartsForSequenceClassification(nn.Module):
        base_model_prefix = "model"  # names nothing

        def __init__(self):
            super().__init__()
            self.text, self.norm = bert.bert, nn.LayerNorm(32)
            self.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    model = lx.attach(TwoPartsForSequenceClassification(), 2, target_modules="all-linear")
    assert model.loraxs.modules_to_save == ("norm", "head") and all(n.startswith("text.") for n in adapters(model))


def test_detach_gives_the_very_same_model_back(bert):
    bert.bert.embeddings.requires_grad_(False)
    before, y = snapshot(bert), bert(IDS).logits
    lx.attach(bert, 4, target_modules="all-linear", modules_to_save=["classifier"])
    randomise(bert)
    assert not torch.equal(bert(IDS).logits, y)
    assert lx.detach(bert) is bert
    assert snapshot(bert) == before and torch.equal(bert(IDS).logits, y)


def test_merge_unmerge_restores_to_the_bit(bert):
    y = bert(IDS).logits
    lx.attach(bert.bfloat16(), 4, target_modules=["query", "dense"])
    bits = {name: p.clone() for name, p in bert.named_parameters()}
    adapted = randomise(bert)(IDS).logits
    assert not torch.equal(adapted, y)
    torch.testing.assert_close(lx.merge(bert)(IDS).logits, adapted, atol=5e-2, rtol=5e-2)
    lx.unmerge(bert)
    assert torch.equal(bert(IDS).logits, adapted)
    assert all(torch.equal(p, bits[name]) for name, p in bert.named_parameters() if not name.endswith(".R"))


def test_detach_of_a_merged_model_needs_the_choice(bert):
    y = bert(IDS).logits
    lx.merge(randomise(lx.attach(bert, 4, target_modules=["query", "dense"])))
    adapted = bert(IDS).logits
    with pytest.raises(ValueError, match="detach\\(model, merge=True\\) keeps the merged weights"):
        lx.detach(bert)
    restored = lx.detach(lx.unmerge(copy.deepcopy(bert)))
    assert torch.equal(restored(IDS).logits, y)
    lx.detach(bert, merge=True)
    assert not adapters(bert) and torch.equal(bert(IDS).logits, adapted)
    assert all(p.requires_grad for p in bert.parameters())


def test_detach_with_merge_from_separate_adapters(gpt2):
    randomise(lx.attach(gpt2, 4, target_modules=["c_attn", "c_fc"]))
    adapted = gpt2(IDS).logits
    lx.detach(gpt2, merge=True)
    assert not adapters(gpt2)
    torch.testing.assert_close(gpt2(IDS).logits, adapted, atol=1e-4, rtol=1e-3)


def copied(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy, copied], ids=["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_from_pretrained_loads_a_merged_model_and_a_separate_one_is_warned_of(kind, way, request, tmp_path):
    model = request.getfixturevalue(kind)  # gpt2: Conv1D, and tied embeddings
    lx.attach(model, 2, target_modules="all-linear")
    model = way(randomise(model))
    y = model(IDS).logits
    with pytest.warns(UserWarning, match=r"random weights in the place .* lx\.save_adapter.* lx\.merge"):
        model.save_pretrained(tmp_path / "separate")
    lx.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    loaded, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(loaded(IDS).logits, y, atol=1e-4, rtol=1e-3)
    lx.save_adapter(model, tmp_path / "adapter.safetensors")
    assert torch.equal(lx.unmerge(model)(IDS).logits, y)
    fresh = lx.load_adapter(lx.detach(model), tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(IDS).logits, y)


@pytest.mark.parametrize("way", [lx.merge, lambda model: lx.detach(model, merge=True)], ids=["merge", "detach"])
@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_merged_head_is_not_tied_to_the_embeddings_again(kind, way, tmp_path):
    sizes = SMALL | dict(vocab_size=50, tie_word_embeddings=True)
    of = getattr(transformers, kind + ("ForCausalLM" if kind == "Llama" else "ForMaskedLM"))
    model = of(getattr(transformers, kind + "Config")(**sizes)).eval()
    if kind == "Bert":  # which ties the bias of its head, too
        nn.init.normal_(model.get_output_embeddings().bias)
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    way(randomise(lx.attach(model, 4, target_modules=[head])))
    tied = model.config.tie_word_embeddings
    assert tied == (way is lx.merge)
    model.save_pretrained(tmp_path)
    assert model.config.tie_word_embeddings is tied
    assert not type(model.config).from_pretrained(tmp_path).tie_word_embeddings
    assert torch.equal(of.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)


def test_saving_needs_nothing_on_the_model(bert, tmp_path, monkeypatch):
    """A temporary model, a copy of the module alone, a part that was adapted, a state dict of before."""
    lx.attach(bert.bert, 2, target_modules=["query"])
    assert not {"save_pretrained", "_hf_peft_config_loaded"} & (bert.__dict__.keys() | bert.bert.__dict__.keys())
    with pytest.warns(UserWarning, match="random weights") as warned:
        bert.save_pretrained(tmp_path / "whole")
        bert.save_pretrained(tmp_path / "given", state_dict=bert.state_dict())
    assert [each.filename for each in warned] == 2 * [__file__]
    separate = bert.state_dict()
    lx.merge(randomise(bert))
    with pytest.warns(UserWarning, match="random weights"):
        bert.save_pretrained(tmp_path / "of before", state_dict=separate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = {name: t.clone() for name, t in bert.state_dict().items()}
        lx.unmerge(bert).save_pretrained(tmp_path / "merged before", state_dict=merged)
        lx.detach(bert).save_pretrained(tmp_path / "base", max_shard_size="20KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
        copied = copy.copy(bert)
        copied.classifier = nn.Linear(32, 2)
        copied.save_pretrained(tmp_path / "copy")
        lx.merge(
            lx.attach(type(bert).from_pretrained(tmp_path / "base").bert, 2, target_modules=["query"])
        ).save_pretrained(tmp_path / "temporary")
    saved = type(bert).from_pretrained(tmp_path / "copy")
    assert torch.equal(saved.classifier.weight, copied.classifier.weight)
    patched = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", patched.__wrapped__)  # as before any `attach`
    lx.attach(bert.bert.encoder.layer[0], 2, target_modules=["query"])  # has no save_pretrained of its own
    with pytest.warns(UserWarning, match="random weights") as warned:
        bert.save_pretrained(tmp_path / "part")
    assert len(warned) == 1


def test_what_trained_before_is_known_after_parts_were_detached(bert):
    bert.bert.embeddings.requires_grad_(False)
    before, layers = snapshot(bert), bert.bert.encoder.layer
    for whole in (bert, layers):
        lx.attach(whole, 2, target_modules=["query"])
        for layer in layers:
            lx.detach(layer)
        lx.attach(bert, 2, target_modules=["query"])
        lx.detach(layers[0])
        lx.attach(layers[0], 2, target_modules=["query"])
        lx.detach(bert)
        assert snapshot(bert) == before


def test_detach_lets_train_what_trained_before_and_leaves_what_came_later(bert):
    bert.classifier.requires_grad_(False)
    lx.attach(bert, 2, target_modules=["query"], modules_to_save=["classifier"])
    bert.head = nn.Linear(8, 8)
    lx.detach(bert.bert.encoder.layer[0])
    query = bert.bert.encoder.layer[0].attention.self.query
    assert query.weight.requires_grad and query.bias.requires_grad
    lx.detach(bert)
    assert [n for n, p in bert.named_parameters() if not p.requires_grad] == ["classifier.weight", "classifier.bias"]
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].bias.requires_grad_(False)
    model[0] = LoraXSLinear.from_linear(model[0], 2)
    lx.detach(model, merge=True)
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    lx.attach(nn.Sequential(part := nn.Sequential(nn.Linear(8, 8), model[0])), 2, modules_to_save=["0.1"])
    assert part[1].bias.requires_grad and not lx.detach(part)[1].bias.requires_grad


def test_detach_refuses_to_lose_a_hook(bert):
    lx.attach(bert, 2, target_modules=["query"])
    layer = next(iter(adapters(bert).values()))
    handle = layer.register_forward_hook(lambda *_: None)
    before = snapshot(bert)
    with pytest.raises(
        ValueError, match=r"'bert\.encoder\.layer\.0\..*query' has a hook.*test_detach_refuses.*lambda>, tha"
    ):
        lx.detach(bert)
    assert snapshot(bert) == before
    handle.remove()
    lx.detach(bert)


def test_nothing_keeps_an_adapted_model_alive():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    gc.collect()
    gc.disable()
    try:
        alive = [weakref.ref(m) for m in lx.attach(model, 4, target_modules="all-linear").modules()]
        del model
        assert not any(each() is not None for each in alive)
    finally:
        gc.enable()


class Tied(nn.Module):
    """One Linear in two places, and another Linear with the same weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = self.a
        self.blocks = nn.ModuleList([self.a, nn.Linear(12, 12, bias=False)])
        self.blocks[1].weight = self.a.weight

    def forward(self, x):
        return self.blocks[1](self.b(self.a(x)))


def test_weights_made_anew_at_every_access_are_not_taken_for_tied_ones():
    """A parametrized weight is a new tensor each time, which may get the address of the last."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(40, 30)) for _ in range(6)))
    weights = [layer.weight.detach().clone() for layer in model]
    lx.attach(model, 4, target_modules="all-linear")
    for layer, W in zip(model, weights, strict=True):
        U, S, Vh = lx.truncated_svd(W, 4)
        assert torch.equal(layer.B, U) and torch.equal(layer.A, S[:, None] * Vh)


def test_a_linear_and_a_conv1d_with_one_weight_have_factors_of_their_own():
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(24, 24, bias=False), Conv1D(24, 24)
    conv.weight = linear.weight
    model = lx.attach(nn.Sequential(linear, conv), 4, target_modules="all-linear")
    torch.testing.assert_close(model[0].B @ model[0].A, (model[1].B @ model[1].A).T)


def test_shared_modules_and_tied_weights_are_handled_once(monkeypatch):
    from loraxs_kernels import model as models

    calls = []
    real = models.factor
    monkeypatch.setattr(models, "factor", lambda jobs, *a, **k: calls.extend(jobs) or real(jobs, *a, **k))
    model, x = Tied(), torch.randn(3, 12)
    y, weight = model(x), model.a.weight
    lx.attach(model, 4, target_modules="all-linear")
    assert len(calls) == 1 and len(adapters(model)) == 2
    assert model.a is model.b is model.blocks[0] and isinstance(model.a, LoraXSLinear)
    assert torch.equal(model.a.A, model.blocks[1].A) and not torch.equal(model.a.R, model.blocks[1].R)
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=0)
    adapted = randomise(model)(x)
    lx.merge(model)
    torch.testing.assert_close(model(x), adapted)
    lx.detach(lx.unmerge(model))
    assert model.a is model.b is model.blocks[0] and model.blocks[1].weight is model.a.weight is weight
    assert torch.equal(model(x), y)


def test_a_tied_head_with_an_adapter_is_tied_again_not_resized_and_not_saved_unmerged(gpt2, tmp_path):
    model = randomise(lx.attach(gpt2, 4, target_modules=["lm_head"]))
    y = model(IDS).logits
    with pytest.raises(ValueError, match="save_pretrained: the head has an adapter and shares its weight"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.warns(UserWarning, match="would put random weights"), suppress(RuntimeError):  # transformers 5's
        model.save_pretrained(tmp_path / "saved", safe_serialization=False)
    with pytest.warns(UserWarning, match="would put random weights"), suppress(RuntimeError):  # whose names are its own
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
    for _ in range(2):
        model.tie_weights()
        model.lm_head.out_features = 50  # as transformers 4 does then
        torch.testing.assert_close(model(IDS).logits, y, atol=1e-4, rtol=1e-4)
        before = snapshot(model)
        with pytest.raises(
            ValueError, match=r"resize_token_embeddings: the output embeddings \(module 'lm_head'\) have"
        ):
            model.resize_token_embeddings(60)
        assert snapshot(model) == before and model.resize_token_embeddings() is model.transformer.wte
        model.resize_token_embeddings(50, mean_resizing=False)  # len(tokenizer), as scripts do in any case
        assert isinstance(model.lm_head, LoraXSLinear) and model.lm_head.weight.shape == (50, 32)
        lx.merge(model)
    with pytest.raises(ValueError, match="got another weight, must keep that of its base layer"):
        model.lm_head.weight = nn.Parameter(torch.zeros(50, 32))
    with pytest.raises(ValueError, match="got out_features 60, must be 50"):
        model.lm_head.out_features = 60
    model = lx.detach(model, merge=True)
    assert model.resize_token_embeddings(new_num_tokens=60).weight.shape == (60, 32)
    assert model(IDS).logits.shape[-1] == 60
    with pytest.warns(UserWarning, match="would put random weights"):  # and not refused: the head has its own weight
        lx.attach(model, 4, target_modules=["lm_head"]).save_pretrained(tmp_path / "untied")


def triple(layer: nn.Module) -> None:
    layer.forward = lambda x: 3 * nn.functional.linear(x, layer.weight, layer.bias)


def scale_by_accelerate(layer: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module, y):
            return 2 * y

    hooks.add_hook_to_module(layer, Doubling())


HOOKS = {
    "pre": (lambda layer: layer.register_forward_pre_hook(lambda m, args: (2 * args[0],)), "lambda"),
    "forward": (lambda layer: layer.register_forward_hook(lambda m, args, y: y + 3), "lambda"),
    "backward": (lambda layer: layer.register_full_backward_hook(lambda *_: None), "lambda"),
    "replaced": (triple, "triple"),
    "accelerate": (scale_by_accelerate, "Doubling"),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_merging_neither_drops_nor_misleads_a_hook(kind):
    put, named = HOOKS[kind]
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    put(model[1])
    y = randomise(lx.attach(model, 4))(x)
    with pytest.raises(TypeError, match=f"module '1': calling its base layer also runs .*{named}"):
        lx.merge(model)
    assert not model[0].merged and torch.equal(model(x), y)
    if kind in ("forward", "backward"):  # the layer stays, and is called
        torch.testing.assert_close(lx.detach(model, merge=True)(x), y)
    else:
        with pytest.raises(TypeError, match=f"module '1': calling its base layer also runs .*{named}"):
            lx.detach(model, merge=True)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("state", ["device_map", "removed"])
def test_hooks_of_accelerate_that_only_move_do_not_prevent_merging(state):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    hooks.add_hook_to_module(model[1], hooks.AlignDevicesHook("cpu"))
    if state == "removed":
        hooks.remove_hook_from_module(model[1])
        assert "forward" in vars(model[1])  # still, though it is that of the class
    y = randomise(lx.attach(model, 4))(x)
    torch.testing.assert_close(lx.merge(model)(x), y)
    torch.testing.assert_close(lx.detach(lx.unmerge(model), merge=True)(x), y)


def test_merging_into_a_tied_head_leaves_the_embedding_alone(gpt2):
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    embedding = gpt2.transformer.wte.weight.detach().clone()
    randomise(lx.attach(gpt2, 4, target_modules=["lm_head"]))
    adapted = gpt2(IDS).logits
    lx.detach(gpt2, merge=True)
    torch.testing.assert_close(gpt2(IDS).logits, adapted, atol=1e-4, rtol=1e-3)
    assert torch.equal(gpt2.transformer.wte.weight, embedding)


def spoil_nan(model):
    model.bert.encoder.layer[1].output.dense.weight.data[3, 4] = float("nan")


FAILURES = {
    "NaN in one weight": (spoil_nan, {}, ValueError, r"module 'bert\.encoder\.layer\.1\.output\.dense': W: .* finite"),
    "rank too large for one": (None, dict(rank_pattern={r"layer\.1\.output\.dense": 33}), ValueError, "rank: got 33"),
    "not a linear layer": (None, dict(target_modules=["LayerNorm"]), TypeError, r"LayerNorm', a LayerNorm; must match"),
    "nothing matches": (None, dict(target_modules=["q_proj"]), ValueError, r"\['q_proj'\].*layers: classifier, dense"),
    "all left out": (None, dict(exclude_modules=".*"), ValueError, r"; exclude_modules '\.\*' may leave out all"),
    "no such module to save": (None, dict(modules_to_save=["score"]), ValueError, "no module of the model .* .score."),
    "modules_to_save a string": (None, dict(modules_to_save="score"), TypeError, "must be a list"),
    "rank": (None, dict(rank=0), ValueError, "rank: got 0 for module 'bert"),
    "init_std": (None, dict(init_std=float("nan")), ValueError, "init_std: got nan for module 'bert"),
    "dtype": (None, dict(dtype=torch.int32), ValueError, r"dtype: got torch\.int32 for module 'bert"),
    "init": (None, dict(init="pissa"), ValueError, "init: got 'pissa'"),
    "init without a pair": (None, dict(init={"x": 1}), ValueError, "init: has no pair"),
    "init of no kind": (None, dict(init=None), TypeError, "init: got None, must be"),
    "a glob": (None, dict(target_modules="*.query"), ValueError, r"target_modules: got '\*\.query', must be a regular"),
    "a glob to leave out": (None, dict(exclude_modules="*.query"), ValueError, "exclude_modules: got .* must be a reg"),
    "a glob with a rank": (None, dict(rank_pattern={"*": 2}), ValueError, r"rank_pattern: got '\*', must be a regular"),
    "patterns in a list": (None, dict(alpha_pattern=["query"]), TypeError, "alpha_pattern: got .* must be a mapping"),
    "device": (None, dict(device=0), ValueError, "device: got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_attach_changes_nothing(bert, case):
    spoil, options, error, message = FAILURES[case]
    if spoil:
        spoil(bert)
    bert.bert.pooler.requires_grad_(False)
    before = snapshot(bert)
    options = dict(rank=4, target_modules=["query", "output.dense"]) | options
    with pytest.raises(error, match=message):
        lx.attach(bert, options.pop("rank"), progress=False, **options)
    assert snapshot(bert) == before


def test_a_failed_merge_changes_nothing(bert):
    lx.attach(bert, 4, target_modules=["query", "value"])
    randomise(bert)
    y = bert(IDS).logits
    last = list(adapters(bert).values())[-1]
    R = last.R.detach().clone()
    last.R.data.fill_(float("nan"))
    for call in (lx.merge, lambda model: lx.detach(model, merge=True)):
        with pytest.raises(ValueError, match=r"module 'bert\.encoder\.layer\.1\.attention\.self\.value': the merged"):
            call(bert)
        assert len(adapters(bert)) == 4 and not any(layer.merged for layer in adapters(bert).values())
    last.R.data.copy_(R)
    assert torch.equal(bert(IDS).logits, y)


def test_calls_out_of_order_say_what_to_do(bert):
    for call in (lx.detach, lx.merge, lx.unmerge):
        with pytest.raises(TypeError, match=r"model: got 'bert', must be an nn\.Module"):
            call("bert")
        with pytest.raises(ValueError, match=r"has no LoRA-XS adapters; lx\.attach"):
            call(bert)
    lx.attach(bert, 4, target_modules=["query"])
    with pytest.raises(ValueError, match=r"already has LoRA-XS adapters; lx\.detach"):
        lx.attach(bert, 4, target_modules=["value"])
    lx.detach(bert)
    peft = pytest.importorskip("peft")
    before = [
        p.requires_grad for p in peft.get_peft_model(bert, peft.LoraConfig(target_modules=["query"])).parameters()
    ]
    with pytest.raises(ValueError, match=r"model: has adapters of PEFT \(in a Linear\); call merge_and_unload\(\)"):
        lx.attach(bert, 4, target_modules=["value"])
    assert [p.requires_grad for p in bert.parameters()] == before


def test_a_model_in_ddp_gets_no_new_adapters(tmp_path):
    """It would average no gradient of R: each rank would train its own."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
        lx.save_adapter(lx.attach(nn.Sequential(nn.Linear(8, 8)), 2), tmp_path / "a.safetensors")
        for put_on in (lambda: lx.attach(wrapped, 2), lambda: lx.load_adapter(wrapped, tmp_path / "a.safetensors")):
            with pytest.raises(ValueError, match=r"model: is inside a DistributedDataParallel, .* after its"):
                put_on()
        assert type(wrapped.module[0]) is nn.Linear and wrapped.module[0].weight.requires_grad
        engine = type("DeepSpeedEngine", (nn.Sequential,), {})(nn.Linear(8, 8))
        with pytest.raises(ValueError, match="model: is inside a DeepSpeedEngine"):
            lx.attach(engine, 2)
        adapted = nn.parallel.DistributedDataParallel(lx.attach(nn.Sequential(nn.Linear(8, 8)), 2))
        lx.save_adapter(adapted, tmp_path / "b.safetensors", save_factors=True)
        lx.load_adapter(adapted, tmp_path / "b.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def test_weights_that_only_one_rank_has_are_refused(monkeypatch):
    """As transformers loads them for accelerate's FSDP2; FSDP1 also sends what attach made from rank 0 to all."""
    dist = torch.distributed

    def attached(init: str = "svd") -> None:
        lx.attach(nn.Sequential(nn.Linear(8, 8)), 2, init=init)

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    attached()  # in one process
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.raises(ValueError, match=r"FSDP_CPU_RAM_EFFICIENT_LOADING: got true, .* must be false"):
        attached()
    attached("random")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    attached()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    attached()


@pytest.mark.parametrize("through", ["attach", "peft"])
def test_all_linear_leaves_out_what_is_too_small_for_its_rank(through):
    """Such as shared_expert_gate of Qwen's experts, which has one row."""
    if through == "peft":
        peft = pytest.importorskip("peft")
        from loraxs_kernels.integrations.peft import LoraXSConfig

    def adapted(rank: int, **options) -> list[str]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        if through == "attach":
            lx.attach(model, rank, **options)
        else:
            peft.get_peft_model(model, LoraXSConfig(r=rank, **options))
        return [name for name, m in model.named_children() if not isinstance(m, nn.Linear)]

    for options in ({}, {"rank_pattern": {"0": 3, "1": 2}}):
        with pytest.warns(
            UserWarning, match=r"'all-linear' leaves out 1 layer .* is of shape 1 x 8, too small for rank 2"
        ):
            assert adapted(2, **options) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank, options in ((2, {"rank_pattern": {"(.*)": 1}}), (2, {"rank_pattern": {"1": 1}}), (1, {})):
            assert adapted(rank, **options) == ["0", "1"]
        assert adapted(2, init="random") == ["0", "1"]
        assert adapted(2, exclude_modules=["1"]) == ["0"]
    for rank, options in ((9, {}), (2, {"target_modules": ["1"]})):
        with pytest.raises(ValueError, match="must be at most"):
            adapted(rank, **options)


def test_no_target_modules_are_refused_by_name():
    with pytest.raises(TypeError, match='target_modules: got None, must be "all-linear", names or a regular expressi'):
        lx.attach(nn.Sequential(nn.Linear(8, 8)), 2, target_modules=None)


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_that_can_be_read_only_once_are_refused(argument):
    must = "a list of module names" if argument == "modules_to_save" else "a list of names or a regular expression"
    with pytest.raises(TypeError, match=f"{argument}: got <generator .*, must be {must}"):
        lx.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 2, **{argument: (name for name in "01")})


def test_a_model_that_is_a_layer_is_told_what_adapts_it():
    with pytest.raises(ValueError, match=r"model: is itself a Linear, .*; LoraXSLinear\.from_linear\(layer, rank\) ad"):
        lx.attach(nn.Linear(8, 8), 2)


def test_weights_of_zeros_are_warned_of(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for i in (1, 2):
        nn.init.zeros_(model[i].weight)
    fresh = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="A has only zeros in module '1' and 1 more") as warned:
        lx.attach(model, 2)
    assert [each.filename for each in warned] == [__file__]
    lx.save_adapter(model, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is to be trained here
        lx.load_adapter(fresh, tmp_path / "a.safetensors")
        lx.detach(fresh)
        with pytest.raises(UserWarning, match="only zeros"):
            lx.attach(fresh, 2)
    assert all(type(m) is nn.Linear for m in fresh)


class WithLayersInside(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def test_no_adapter_is_inside_another(tmp_path):
    base = nn.Sequential(WithLayersInside(), nn.Linear(8, 8))
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="leaves out 2 layers .* '0.down', is inside '0', which has an adapter itself"):
        lx.attach(model, 2, init_std=1.0)
    assert list(adapters(model)) == ["0", "1"]
    lx.save_adapter(model, tmp_path / "a.safetensors")
    x = torch.ones(1, 8)
    assert torch.equal(lx.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(x), model(x))
    with pytest.raises(TypeError, match=r"matches module '0\.up' inside '0', which has"):
        match(base, ["0", "up"])
    assert match(base, ["up"]) == ["0.up"]
    with pytest.raises(ValueError, match="its linear layers: down, up"):
        match(base[0], ["left"])


def test_a_scripted_layer_is_left_out():
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="leaves out 1 layer .* is a RecursiveScriptModule"):
        assert list(adapters(lx.attach(model, 2))) == ["1"]


def test_multihead_attention_is_refused_where_an_adapter_would_do_nothing():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(TypeError, match=r"'self_attn\.out_proj' of a MultiheadAttention, which reads its weight"):
        lx.attach(model, 4, target_modules=["out_proj"])
    assert match(model, "all-linear") == ["linear1", "linear2"]


def test_layers_that_the_model_rescales_or_that_are_no_linear_map_are_left_out():
    options = SMALL | dict(vocab_size=50, attention_hidden_size=32, num_hidden_layers=2)
    rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(**options))
    names = {".".join(name.split(".")[-2:]) for name in match(rwkv, "all-linear")}
    assert names == {f"attention.{n}" for n in ("key", "value", "receptance")} | {
        "feed_forward.key",
        "feed_forward.receptance",
    }
    for name in ("attention.output", "feed_forward.value"):
        with pytest.raises(TypeError, match=rf"{name}' of a Rwkv\w+, whose weight the model rescales"):
            lx.attach(rwkv, 4, target_modules=[name])

    class Llama4Router(nn.Linear):  # by the name of the class
        pass

    model = nn.Sequential(nn.Linear(8, 8), Llama4Router(8, 8))
    assert match(model, "all-linear") == ["0"]
    with pytest.raises(TypeError, match="'1' of a Sequential, a Llama4Router, whose forward is no linear map"):
        lx.attach(model, 4, target_modules=["1"])


SSM = SMALL | dict(vocab_size=50, state_size=8, num_heads=4, head_dim=16, n_groups=1, num_key_value_heads=2)
SSM |= dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_num_heads=4)
SSM |= dict(mamba_head_dim=16, ssm_state_size=8, pad_token_id=0)


@pytest.mark.parametrize("way", ["attach", "peft"])
@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba", "FalconH1", "NemotronH"])
def test_every_adapter_of_a_mamba_gets_its_gradient(kind, way):
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"this transformers has no {kind}")
    sizes = SSM | (dict(layers_block_type=["mamba", "attention"]) if kind == "NemotronH" else {})
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).train()
    peft = pytest.importorskip("peft") if way == "peft" else None

    def attach(target_modules):
        if way == "attach":
            return lx.attach(model, 4, target_modules=target_modules)
        from loraxs_kernels.integrations.peft import LoraXSConfig

        return peft.get_peft_model(model, LoraXSConfig(r=4, target_modules=target_modules))

    mixers = [name for name, m in model.named_modules() if hasattr(m, "A_log")]
    assert mixers
    with pytest.raises(
        TypeError, match=rf"'{mixers[0]}\.out_proj' of a {kind}\w*Mixer, which reads its weight without"
    ):
        attach([f"{name}.out_proj" for name in mixers])
    adapted = attach("all-linear")
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: p.grad is not None for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(trained.values()) and any(".in_proj." in name for name in trained)


def test_an_unused_name_in_the_list_is_a_warning(bert):
    targets, left_out = ["query", "value", "q_proj", "v_proj"], ["value", "k_proj"]  # value is there, and left out
    with pytest.warns(UserWarning, match="no module matches") as warned:
        lx.attach(bert, 4, target_modules=targets, exclude_modules=left_out)
    said = [str(each.message) for each in warned if "no module matches" in str(each.message)]
    assert said == [
        "target_modules: no module matches q_proj, v_proj", "exclude_modules: no module matches k_proj"
    ]  # fmt: skip
    assert {each.filename for each in warned} == {__file__}


def test_what_is_attached_or_loaded_in_inference_mode_trains_outside(bert, tmp_path):
    other = copy.deepcopy(bert)
    with torch.inference_mode():
        lx.attach(bert, 4, target_modules=["query"], progress=False)
        lx.save_adapter(bert, tmp_path / "a.safetensors")
        lx.load_adapter(other, tmp_path / "a.safetensors", progress=False)
        layer = LoraXSLinear.from_linear(nn.Linear(6, 5), 2)
    for model in (bert, other):
        model(IDS).logits.sum().backward()
        assert all(m.R.grad is not None for m in adapters(model).values())
        lx.load_adapter(model, tmp_path / "a.safetensors")
    layer(torch.randn(3, 6)).sum().backward()
    with torch.inference_mode():  # parameters made in it can be set to train there alone
        served = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        lx.attach(served, 2, target_modules=["0"], modules_to_save=["1"], progress=False)
    assert served[1].weight.requires_grad and not served[0].base_layer.weight.requires_grad


def test_a_rollback_hides_no_error():
    with torch.inference_mode():
        served = nn.Sequential(nn.Linear(6, 5))
    lazy = nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(3))  # the latter's parameters refuse to be set
    for model in (served, lazy):
        with pytest.raises(ValueError, match="rank: got 20 for module '0'"):
            lx.attach(model, 20, target_modules=["0"], progress=False)
        assert model[0].weight.requires_grad


class Frozen(dict):
    """As a configuration of diffusers, which each of its models has."""

    def update(self, *_):
        raise TypeError("frozen")

    __setitem__ = setdefault = pop = update


def test_a_rollback_leaves_alone_what_did_not_change():
    model = nn.Sequential(nn.Linear(6, 5))
    model.settings, model.names, model.sizes, model.order = Frozen(layers=1), ["a"], {"a": 1}, {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="Ctrl-C"), transaction(model):
        model.names[0] = "b"
        model.sizes["a"] = 2
        model.order["a"] = model.order.pop("a")
        model.new = 1
        raise ValueError("Ctrl-C")
    assert (model.settings, model.names, model.sizes) == ({"layers": 1}, ["a"], {"a": 1})
    assert list(model.order) == ["a", "b"] and not hasattr(model, "new")


def test_given_factors(bert):
    names = match(bert, ["query"])
    pairs = {name: (torch.randn(4, 32), torch.randn(32, 4)) for name in names}
    lx.attach(bert, 4, target_modules=["query"], init=pairs)
    for name, layer in adapters(bert).items():
        assert torch.equal(layer.A, pairs[name][0]) and torch.equal(layer.B, pairs[name][1])
        assert 0 < layer.R.std() < 1e-4


def test_the_progress_bar_shows_only_when_asked_and_long(bert, capsys, monkeypatch):
    from loraxs_kernels import factors

    seen = []

    class Watched(factors.tqdm):
        def __init__(self, *args, **options):
            seen.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(factors, "tqdm", Watched)
    lx.attach(copy.deepcopy(bert), 4, target_modules=["query"])
    lx.attach(bert, 4, target_modules=["query"], progress=False)
    assert [(bar.n, bar.total, bar.delay) for bar in seen] == [(2, 2, 1)]
    assert "LoRA-XS" not in capsys.readouterr().err  # over in less than a second


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(bert, reentrant):
    lx.attach(bert, 4, target_modules="all-linear", modules_to_save=["classifier"])
    randomise(bert).train()
    for m in bert.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if hasattr(m, "dropout_prob"):  # transformers 4
            m.dropout_prob = 0.0
    expected = torch.autograd.grad(bert(IDS).logits.sum(), [m.R for m in adapters(bert).values()], allow_unused=True)
    if reentrant:
        bert.enable_input_require_grads()
    bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    bert(IDS).logits.sum().backward()
    for layer, gR in zip(adapters(bert).values(), expected, strict=True):
        torch.testing.assert_close(layer.R.grad, gR)


def test_compile_of_a_whole_model_sees_no_break(gpt2):
    lx.attach(gpt2, 4, target_modules="all-linear")
    randomise(gpt2)
    compiled = torch.compile(gpt2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, gpt2(IDS).logits)


def test_meta_model_gets_shapes_and_loads_a_state_dict(bert):
    other = copy.deepcopy(bert).to("meta")
    lx.attach(bert, 4, target_modules=["query"])
    lx.attach(other, 4, target_modules=["query"])
    assert all(layer.A.is_meta for layer in adapters(other).values())
    other.load_state_dict(bert.state_dict(), assign=True)
    other.bert.embeddings.position_ids = bert.bert.embeddings.position_ids
    other.bert.embeddings.token_type_ids = bert.bert.embeddings.token_type_ids
    assert torch.equal(other(IDS).logits, bert(IDS).logits)


def test_training_a_real_model_follows_the_unfused_formula(minilm):
    """MiniLM, 24 adapters, fp32: the same losses as four separate ops, to 1e-5, over a short run."""
    from loraxs_kernels.reference import UnfusedLinear

    ids, target = torch.randint(1000, 20000, (8, 12)), torch.randn(8, 384) / 10
    targets = ["query", "value", "attention.output.dense", "intermediate.dense"]
    lx.attach(minilm, 16, target_modules=targets, alpha=64)
    unfused = copy.deepcopy(minilm)
    for parent in list(unfused.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraXSLinear):
                setattr(parent, name, UnfusedLinear(child))
    histories = []
    for model in (minilm, unfused):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
        assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == 24 * 16 * 16
        history = []
        for _ in range(8):
            loss = (model(ids).last_hidden_state.mean(1) - target).square().mean() * 10
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(history)
    assert histories[0][-1] < 0.9 * histories[0][0]
    assert max(abs(a - b) for a, b in zip(*histories, strict=True)) < 1e-5


def test_an_adapted_head_of_an_encoder_and_decoder_is_saved_with_their_embeddings(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict(vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, max_position_embeddings=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()
    lx.attach(model, 4, target_modules=["q_proj", "lm_head"], init_std=0.3, progress=False)
    lx.detach(model, merge=True)
    model.save_pretrained(tmp_path)
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4 ties the head again, whatever the file has
        ids = torch.arange(8)[None]
        y = BartForConditionalGeneration.from_pretrained(tmp_path).eval()(ids).logits
        torch.testing.assert_close(y, model(ids).logits, atol=1e-5, rtol=0)


def test_what_a_layer_shows(gpt2):
    layer = lx.attach(gpt2.bfloat16(), 4, lora_alpha=8, dropout=0.25).transformer.h[0].attn.c_attn
    shown = "in_features=32, out_features=96, rank=4, s=2, dtype=bfloat16, init=svd, dropout=0.25"
    assert layer.extra_repr() == shown
    with lx.backend("torch"):
        assert "dtype=bfloat16, backend=torch, init=svd" in repr(layer)
    assert layer.to("meta").extra_repr() == shown


def test_the_integrations_are_listed():
    assert {"peft", "reference_repo", "transformers", "vllm"} <= set(dir(lx.integrations))
    assert lx.integrations.reference_repo.__name__ == "loraxs_kernels.integrations.reference_repo"
