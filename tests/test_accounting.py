"""count_parameters and `loraxs params`: the LoRA-XS paper's own figures, what attach trains, and what PEFT trains."""

from __future__ import annotations

import copy
import json

import hubstub
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import loraxs_kernels as lx
from loraxs_kernels.accounting import Parameters, from_config
from loraxs_kernels.bench.shapes import MODELS
from loraxs_kernels.cli import main

transformers = pytest.importorskip("transformers")

ROBERTA = ["query", "value", "attention.output.dense", "output.dense"]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(name: str):
    return transformers.AutoConfig.for_model(MODELS[name].model_type, **MODELS[name].config)


@pytest.fixture
def bert():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- the figures of the paper


@pytest.mark.parametrize(
    ("name", "targets", "figures"),
    [
        ("roberta-large", ROBERTA, {25: 60_000, 20: 38_400, 16: 24_576, 12: 13_824, 8: 6_144, 4: 1_536}),
        ("mistral-7b", DECODER, {64: 917_504, 32: 229_376, 16: 57_344}),
        ("gemma-7b", DECODER, {64: 802_816, 32: 200_704, 16: 50_176}),
    ],
)
def test_the_columns_of_the_paper(name, targets, figures):
    model = from_config(config(name))
    counts = {r: lx.count_parameters(model, r, target_modules=targets) for r in figures}
    assert {r: count.loraxs for r, count in counts.items()} == figures
    assert {count.modules for count in counts.values()} == {(4 if targets is ROBERTA else 7) * MODELS[name].blocks}
    assert all(p.is_meta for p in model.parameters())


def test_lora_and_vera_are_the_papers_equations():
    """L blocks, q and v of n x n: LoRA 2 n r a module, VeRA n + r."""
    n, L = 1024, 24
    for r in (8, 256):
        count = lx.count_parameters(config("roberta-large"), r, target_modules=["query", "value"])
        assert (count.modules, count.lora, count.vera) == (2 * L, 2 * L * 2 * n * r, 2 * L * (n + r))
    # W (N, K) of all shapes of a block: q o 4096 x 4096, k v 1024 x 4096, gate up 14336 x 4096, down 4096 x 14336
    r, count = 16, lx.count_parameters(config("mistral-7b"), 16, target_modules="all-linear")
    assert count.lora == 32 * r * (2 * (4096 + 4096) + 2 * (1024 + 4096) + 3 * (14336 + 4096))
    assert count.vera == 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096 + 7 * r)
    assert count.base == 7_241_732_096


def test_a_million_adapters_for_gpt_3():
    """96 GB against 144 TB in the paper: 96 KiB and 144 MiB an adapter, in 16 bits."""
    count = lx.count_parameters(config("gpt-3"), 16, target_modules=["q_proj", "v_proj"])
    assert (count.modules, count.loraxs, count.lora) == (192, 192 * 16**2, 192 * 2 * 12288 * 16)
    assert 174.5e9 < count.base < 175.5e9
    for dtype in (torch.bfloat16, torch.float16):
        assert count.nbytes(dtype) == 96 * 2**10 and count.nbytes(dtype, "lora") == 144 * 2**20
    assert count.nbytes() == 2 * 96 * 2**10  # fp32, as R trains
    assert count.nbytes(torch.bfloat16) * 10**6 == 98_304_000_000


# --- against attach, and against PEFT


CASES = [
    dict(target_modules=["query", "value"]),
    dict(target_modules="all-linear", exclude_modules=["classifier"]),
    dict(target_modules=r".*layer\.1\..*dense", rank_pattern={"output.dense": 2}),
    dict(target_modules=["query", "dense"], exclude_modules=r".*\.0\..*", modules_to_save=["classifier", "pooler"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["target_modules"]))
def test_counts_what_attach_trains(bert, case):
    before = {name: (id(p), p.requires_grad) for name, p in bert.named_parameters()}
    expected = lx.count_parameters(bert, 4, **case)
    assert {name: (id(p), p.requires_grad) for name, p in bert.named_parameters()} == before
    assert expected.base == sum(p.numel() for p in bert.parameters())
    assert lx.count_parameters(bert.to("meta"), 4, **case) == expected
    attached = lx.attach(bert, 4, **case, progress=False)
    assert trained(attached) == expected.loraxs + expected.saved
    head, pooler = 32 * 2 + 2, 32 * 32 + 32
    assert expected.saved == (head if case["target_modules"] == "all-linear" else 0) + (
        head + pooler if "modules_to_save" in case else 0
    )
    assert lx.count_parameters(attached) == expected  # what is there
    assert lx.count_parameters(lx.detach(attached), 4, **case) == expected


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: str(case["target_modules"]))
def test_counts_what_peft_trains_as_lora(bert, case):
    peft = pytest.importorskip("peft")
    count = lx.count_parameters(bert, 4, **case)
    assert trained(peft.get_peft_model(bert, peft.LoraConfig(r=4, **case))) == count.lora


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "intermediate.dense"]], ids=str)
def test_counts_what_peft_trains_as_vera(bert, targets):
    peft = pytest.importorskip("peft")
    if peft.__version__.startswith("0.20."):
        pytest.skip("this VeRA imports what torchao 0.18 no longer has")
    count = lx.count_parameters(bert, 4, target_modules=targets)
    assert trained(peft.get_peft_model(bert, peft.VeraConfig(r=4, target_modules=targets))) == count.vera


def test_a_wrapped_model_is_counted_as_it_is_adapted():
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    for targets in ("all-linear", r"transformer\.h\.0\.attn\.c_\w+"):
        counts = lx.count_parameters(nn.DataParallel(model), 4, target_modules=targets)
        assert counts == lx.count_parameters(model, 4, target_modules=targets)


def test_a_transposed_layer_has_the_shape_of_its_map():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50))
    peft = pytest.importorskip("peft")
    count = lx.count_parameters(model, 4, target_modules="all-linear")
    assert (count.modules, count.vera) == (8, 2 * (96 + 32 + 128 + 32 + 4 * 4))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert trained(adapted) == count.lora


def test_shared_parameters_count_once(bert):
    layers = bert.bert.encoder.layer
    layers[1].attention.self.query = layers[0].attention.self.query  # one module twice
    layers[1].attention.self.value.weight = layers[0].attention.self.value.weight  # two modules, one weight
    count = lx.count_parameters(bert, 4, target_modules=["query", "value"])
    assert (count.modules, count.loraxs) == (3, 48)
    assert count.base == sum(p.numel() for p in bert.parameters())
    assert trained(lx.attach(bert, 4, target_modules=["query", "value"], progress=False)) == 48


class Doubled(nn.Module):
    """R from a vector of two numbers."""

    def forward(self, v):
        return v.sum() * torch.eye(4)

    def right_inverse(self, R):
        return R.new_zeros(2)


def test_a_parametrized_R_counts_as_what_trains(bert):
    lx.attach(bert, 4, target_modules=["query"], progress=False)
    for layer in bert.bert.encoder.layer:
        parametrize.register_parametrization(layer.attention.self.query, "R", Doubled(), unsafe=True)
    count = lx.count_parameters(bert)
    assert (count.modules, count.loraxs) == (2, 4) and count.lora == 2 * 4 * 64
    assert count.base == lx.count_parameters(lx.detach(bert), 4, target_modules=["query"]).base


def test_a_quantised_weight_counts_as_its_shape():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, bias=False), nn.Linear(32, 8))
    model.to("cpu")  # which is what quantises
    assert model[0].weight.numel() < 64 * 32
    assert lx.count_parameters(model, 4, target_modules=["0"]) == Parameters(
        modules=1, base=64 * 32 + 32 * 8 + 8, loraxs=16, lora=4 * 96, vera=36, saved=0
    )


def test_a_sharded_weight_counts_whole(bert):
    """ZeRO-3 leaves an empty parameter that knows what it is a part of."""
    expected = lx.count_parameters(bert, 4, target_modules=["query"], modules_to_save=["classifier"])
    for p in bert.parameters():
        p.ds_id, p.ds_shape, p.ds_numel, p.data = 0, p.shape, p.numel(), torch.empty(0)
    assert lx.count_parameters(bert, 4, target_modules=["query"], modules_to_save=["classifier"]) == expected


# --- models from configurations


@pytest.mark.parametrize(
    ("name", "architectures", "kind"),
    [
        ("bert", None, "BertForMaskedLM"),
        ("bert", ["BertForSequenceClassification"], "BertForSequenceClassification"),
        ("bert", ["OfSomeoneElse"], "BertForMaskedLM"),
        ("t5", None, "T5ForConditionalGeneration"),
        ("gpt2", None, "GPT2LMHeadModel"),
        ("clip", None, "CLIPModel"),
    ],
)
def test_the_class_of_a_configuration(name, architectures, kind):
    config = transformers.AutoConfig.for_model(name)
    config.architectures = architectures
    before, state = dict(vars(config)), torch.get_rng_state()
    model = from_config(config)
    assert type(model).__name__ == kind and all(p.is_meta for p in model.parameters())
    assert vars(config) == before and torch.equal(torch.get_rng_state(), state)
    everything = lx.count_parameters(config, 1, target_modules="all-linear")
    output = model.get_output_embeddings() if name != "clip" else None
    output = model.classifier if kind == "BertForSequenceClassification" else output
    linear = [m for m in model.modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    assert everything.modules == len([m for m in linear if m is not output])


# --- what was made of a model


def test_the_summary_says_what_has_an_adapter_what_trains_and_what_was_left_out(bert, caplog):
    with caplog.at_level("INFO", logger="loraxs_kernels"):
        lx.attach(bert, 4, rank_pattern={"intermediate.dense": 2}, exclude_modules=["key"])
    found = lx.summary(torch.compile(bert))
    assert {name.rpartition("encoder.layer.")[2]: r for name, r in found.ranks.items()} == {
        **{f"{i}.attention.{name}": 4 for i in (0, 1) for name in ("self.query", "self.value", "output.dense")},
        **{f"{i}.{name}.dense": r for i in (0, 1) for name, r in (("intermediate", 2), ("output", 4))},
        "bert.pooler.dense": 4,
    }
    keys = {f"bert.encoder.layer.{i}.attention.self.key": "not a target" for i in (0, 1)}
    assert found.skipped == {**keys, "classifier": "trains whole"}
    R = 9 * 16 + 2 * 4
    assert (found.R, found.beside) == (R, {"classifier": 66})
    assert found.trainable == trained(bert) == R + 66
    assert found.total == sum(p.numel() for p in bert.parameters())
    line = (
        "11 of 14 linear layers have an adapter (2 query, 2 value, 7 dense) of rank 2, 4; "
        f"{R + 66} of {found.total:,} parameters train: {R} in R, 66 in classifier; "
        "no adapter: classifier (trains whole), 2 key (not a target)"
    )
    assert str(found) == line
    bert.bert.encoder.layer[0].attention.self.query.R.requires_grad_(False)
    assert (lx.summary(bert).R, lx.summary(bert).total) == (R - 16, found.total)
    assert caplog.messages == [f"attach: {line}"] and caplog.records[0].levelname == "INFO"


def test_the_summary_knows_why_a_layer_has_no_adapter():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    if transformers.__version__.startswith("4."):
        pytest.skip("the experts of transformers 4 are linear layers")
    model.extra = nn.MultiheadAttention(8, 2)
    with pytest.warns(UserWarning, match="experts"):
        lx.attach(model, 2)
    found = lx.summary(model)
    assert found.skipped["lm_head"] == "the output embeddings"
    assert "reads its weight without calling it" in found.skipped["extra.out_proj"]
    assert found.skipped["model.layers.0.mlp.experts"] == "experts, stacked in one parameter"
    assert f"{len(found.ranks)} of {len(found.ranks) + 2} linear layers" in str(found)


def test_nothing_is_logged_at_a_higher_level_or_counted_for_nothing(bert, caplog, monkeypatch):
    monkeypatch.setattr("loraxs_kernels.model.summary", lambda model: pytest.fail("nobody reads it"))
    with caplog.at_level("WARNING", logger="loraxs_kernels"):
        lx.detach(lx.unmerge(lx.merge(lx.attach(bert, 4))))
    assert not [each for each in caplog.records if each.name.startswith("loraxs")]


def test_the_other_calls_log_a_line_too(bert, caplog, tmp_path):
    lx.save_adapter(lx.attach(bert, 4), tmp_path / "a.safetensors")
    with caplog.at_level("INFO", logger="loraxs_kernels"):
        lx.detach(lx.unmerge(lx.merge(bert)))
        lx.load_adapter(bert, tmp_path / "a.safetensors")
        lx.detach(bert, merge=True)
    merged, unmerged, off, loaded, kept = caplog.messages
    assert merged == "merge: 13 adapters added to the weights"
    assert unmerged == "unmerge: 13 adapters beside the original weights again"
    assert off == "detach: 13 adapters taken off"
    assert loaded.startswith(f"load_adapter: {tmp_path / 'a.safetensors'}: 13 of 14 linear layers")
    assert loaded.endswith("delta W is off by at most 0.0e+00")
    assert kept == "detach: 13 adapters added to the weights and taken off"


def test_trainable_parameters_are_printed_as_by_peft(bert, capsys):
    peft = pytest.importorskip("peft")

    def ours_and_theirs(model):
        lx.print_trainable_parameters(model)
        ours = capsys.readouterr().out.splitlines()
        model.get_nb_trainable_parameters = lambda: peft.PeftModel.get_nb_trainable_parameters(model)
        peft.PeftModel.print_trainable_parameters(model)
        return ours, capsys.readouterr().out.splitlines()

    ours, theirs = ours_and_theirs(lx.attach(bert, 4, exclude_modules=["pooler.dense"]))
    assert ours == [*theirs, "beside R: 66 in classifier"]
    lx.detach(bert)
    lx.attach(bert, 4, target_modules=["query"], modules_to_save=[])
    ours, theirs = ours_and_theirs(bert)
    assert ours == theirs
    for name in ("pooler", "encoder.layer.0.output", "encoder.layer.1.output", "encoder.layer.0.intermediate"):
        bert.bert.get_submodule(f"{name}.dense").bias.requires_grad_(True)
    ours, theirs = ours_and_theirs(bert)
    assert ours[:1] == theirs
    layer = "bert.encoder.layer"
    shown = [f"48 in {layer}.0.intermediate.dense", f"32 in {layer}.0.output.dense", f"32 in {layer}.1.output.dense"]
    assert ours[1:] == [f"beside R: {', '.join(shown)}, 32 in 1 more modules"]


def test_trainable_parameters_of_a_quantised_model_are_printed_as_by_peft(capsys):
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, bias=False), nn.Linear(32, 8))
    model.to("cpu")  # which is what quantises
    lx.print_trainable_parameters(lx.attach(model, 4, target_modules=["0"]))
    assert capsys.readouterr().out == "trainable params: 16 || all params: 2,328 || trainable%: 0.6873\n"
    assert peft.PeftModel.get_nb_trainable_parameters(model) == (16, 2328)


def test_a_model_without_adapters_has_no_summary(bert):
    for call in (lx.summary, lx.print_trainable_parameters):
        with pytest.raises(ValueError, match="model: has no LoRA-XS adapters"):
            call(bert)


# --- errors


def test_errors_name_the_argument(bert):
    for arguments, message in [
        (dict(), "rank: must be given"),
        (dict(rank=4, rank_pattern={"(": 2}), r"rank_pattern: got '\(', must be a regular expression"),
        (
            dict(rank=0, target_modules="all-linear"),
            "rank: got 0 for module 'bert.*', must be an integer of at least 1",
        ),
        (dict(rank=33, target_modules=["query"]), "rank: got 33 for module .* of shape 32 x 32, must be at most 32"),
        (dict(rank=4, target_modules=["no_proj"]), "target_modules: got .* matches no module"),
        (dict(rank=4, target_modules=["query"], modules_to_save=["head"]), "modules_to_save: no module .* 'head'"),
    ]:
        with pytest.raises(ValueError, match=message):
            lx.count_parameters(bert, **arguments)
    with pytest.raises(TypeError, match=r"target_modules: matches module .* a LayerNorm"):
        lx.count_parameters(bert, 4, target_modules=["LayerNorm"])
    with pytest.raises(TypeError, match=r"model: got a dict, must be an nn\.Module or a transformers configuration"):
        lx.count_parameters({"model_type": "bert"}, 4, target_modules="all-linear")
    peft = pytest.importorskip("peft")
    for config in (lx.integrations.peft.LoraXSConfig, peft.LoraConfig):
        with pytest.raises(ValueError, match=r"model: .*has .*adapters"):
            lx.count_parameters(peft.get_peft_model(copy.deepcopy(bert), config(r=4, target_modules=["query"])), 4)
    lx.attach(bert, 4, target_modules=["query"], progress=False)
    for name, value in dict(rank=8, exclude_modules=["key"], rank_pattern={"key": 2}, modules_to_save=["key"]).items():
        with pytest.raises(ValueError, match=f"{name}: got .* for a model with LoRA-XS adapters"):
            lx.count_parameters(bert, **{name: value})
    with pytest.raises(ValueError, match="method: got 'dora', must be one of loraxs, lora, vera"):
        lx.count_parameters(bert).nbytes(method="dora")


def test_a_configuration_of_no_model():
    odd = transformers.BertConfig(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match="configuration of a 'bert' model, from which no BertForMaskedLM can be made"):
        lx.count_parameters(odd, 4, target_modules="all-linear")

    class Unknown(transformers.PretrainedConfig):
        model_type = "unheard-of"

    with pytest.raises(ValueError, match="'unheard-of' model, for which transformers has no class"):
        lx.count_parameters(Unknown(), 4, target_modules="all-linear")


# --- the command


def params(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["params", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table(capsys):
    targets = ["--target-modules", "q_proj", "v_proj"]
    status, out, err = params(capsys, "--model", "gpt-3", "-r", "16", *targets, "--adapters", "1000000")
    assert (status, err) == (0, "")
    assert out.splitlines()[:6] == [
        "gpt-3: 174,604,283,904 parameters, 192 linear layers adapted",
        "",
        " r  method    trainable  of the model  an adapter  1,000,000 adapters",
        "16  LoRA-XS      49,152      0.00003%    96.0 KiB            91.6 GiB",
        "16  LoRA     75,497,472      0.04324%   144.0 MiB           137.3 TiB",
        "16  VeRA      2,362,368      0.00135%     4.5 MiB             4.3 TiB",
    ]
    assert "the trained numbers in torch.bfloat16" in out


def test_tied_weights_of_a_configuration_count_once(monkeypatch):
    """As in transformers 5.0, where models that are made on the meta device do not tie them."""
    monkeypatch.setattr(transformers.PreTrainedModel, "init_weights", lambda self: None)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=5000)
    config.architectures = ["GPT2LMHeadModel"]
    assert lx.count_parameters(config, 4).base < 2 * 5000 * 32


def test_the_table_of_a_folder_or_a_file(capsys, tmp_path, bert):
    bert.config.save_pretrained(tmp_path)
    asked = ["-r", "4", "2", "--dtype", "float32", "--target-modules", "query", "nothing"]
    status, out, err = params(capsys, "--model", str(tmp_path), *asked, "--modules-to-save", "decoder")
    assert (status, err) == (0, "loraxs params: target_modules: no module matches nothing\n")
    assert "modules to save: 1,650 parameters more" in out  # 50 x 32, tied to the embeddings, and a bias
    rows = [line.split() for line in out.splitlines() if "LoRA-XS" in line]
    assert [row[:3] + row[4:] for row in rows] == [
        ["4", "LoRA-XS", "32", "6.6", "KiB"],
        ["2", "LoRA-XS", "8", "6.5", "KiB"],
    ]
    assert params(capsys, "--model", str(tmp_path / "config.json"), "-r", "4", "--target-modules", "all-linear")[0] == 0


def test_the_table_of_a_model_on_the_hub(capsys, tmp_path, monkeypatch, bert):
    """Its config.json alone is fetched; if the Hub cannot be reached, one question is asked and one line says so."""
    bert.config.save_pretrained(tmp_path)
    with hubstub.running(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["user/bert"] = {"main": {"config.json": (tmp_path / "config.json").read_bytes()}}
        assert params(capsys, "--model", "user/bert", "-r", "4")[::2] == (0, "")
        assert all("config.json" in each for each in hub.requests)
        hub.broken, asked = True, len(hub.requests)
        assert params(capsys, "--model", "user/bert", "-r", "4")[::2] == (0, "")  # from the cache
        status, out, err = params(capsys, "--model", "foo", "-r", "4")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "name on Hugging Face's hub: foo: is not here, and the Hub cannot be reached (" in err
        assert len(hub.requests) == asked + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/thing", "-r", "4"], "model: got 'no/such/thing', must be one of mistral-7b, "),
        (["--model", "{tmp}", "-r", "4"], "model: got '{tmp}', must be one of"),
        (["--model", "{tmp}/list.json", "-r", "4"], "model: got '{tmp}/list.json', must be one of"),
        (["--model", "{tmp}/odd.json", "-r", "4"], "model: got the configuration of a 'bert' model"),
        (["--model", "tiny", "-r", "0"], "rank: got 0 for module"),
        (["--model", "tiny", "-r", "1000"], "rank: got 1000 for module"),
        (["--model", "tiny", "-r", "4", "--target-modules", "c_attn"], "target_modules: got ['c_attn']"),
        (["--model", "tiny", "-r", "4", "--target-modules", "norm"], "target_modules: matches module 'model.norm'"),
        (["--model", "tiny", "-r", "4", "--adapters", "0"], "adapters: got 0, must be from 1 to"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, arguments, message):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text(json.dumps(dict(model_type="bert", hidden_size=30, num_attention_heads=4)))
    status, out, err = params(capsys, *(text.replace("{tmp}", str(tmp_path)) for text in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("loraxs params: " + message.replace("{tmp}", str(tmp_path))) and err.count("\n") == 1
