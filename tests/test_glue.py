"""The GLUE scripts of examples/, run as a user would, offline: tiny random models and a few lines of data."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from test_examples import QUIET, lines, losses, save_model, save_tokenizer, script

import loraxs_kernels as lx
from loraxs_kernels import paper

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SHORT = ["--num_train_epochs", "2", "--learning_rate", "0.02", "--classifier_learning_rate", "0.01"]
VOWELS = [{"sentence": c * 10, "label": int(c in "aeiou")} for c in "abcdefghijklmnopqrstuvwxyz"]
PAIRS = [{"sentence1": c * 3, "sentence2": c, "label": i / 2} for i, c in enumerate("abcdef")]
MNLI = [{"premise": c * 3, "hypothesis": c, "label": i % 3} for i, c in enumerate("abcdef")]


@pytest.fixture(scope="module")
def example():
    return script("train_glue")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("roberta"), "roberta")


def files(folder: Path, records: list[dict], validation: list[dict] | None = None) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = lines(folder / "train.jsonl", records), lines(folder / "dev.jsonl", validation or records)
    return ["--train_file", str(paths[0]), "--validation_file", str(paths[1])]


def classifier(folder: Path, labels: int, adapter: Path | None = None):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    return lx.load_adapter(model, adapter).eval() if adapter else model.eval()


def shown(example, capsys, *arguments: str) -> tuple[dict, str]:
    example.main([*arguments, "--show_recipe"])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_every_row_of_the_papers_tables_is_a_command(example, capsys):
    """All of tables 4 and 5, as the command line is parsed."""
    settings = {
        "model_name_or_path": "FacebookAI/roberta-large",
        "max_length": 128,
        "warmup_ratio": 0.06,
        "per_device_train_batch_size": 32,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "loraxs_alpha": 8,
        "loraxs_target_modules": ["query", "value", "attention.output.dense", "output.dense"],
    }
    rows = [row | {"init": row.get("init", "svd")} for table in ("table4", "table5") for row in paper.TABLES[table]]
    assert len(rows) == 60 and sum(row["init"] == "random" for row in rows) == 12
    for row in rows:
        found, told = shown(
            example, capsys, "--task", row["task"], "--loraxs_r", str(row["rank"]), "--init", row["init"]
        )
        expected = settings | {name: value for name, value in row.items() if name != "rank"}
        assert {name: found.get(name) for name in expected} == expected and found["loraxs_r"] == row["rank"]
        assert found["metric_for_best_model"] == {"cola": "matthews", "stsb": "pearson"}.get(row["task"], "accuracy")
        start = f"The paper starts {row['task']} from an adapter trained on MNLI: --mnli_adapter.\n"
        assert told == (start if row["task"] in ("mrpc", "rte", "stsb") else "")


def test_the_recipe_is_what_the_command_line_makes_of_it(example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--task", "cola", "--loraxs_r", "14", "--learning_rate", "0.5", "--loraxs_target_modules", "query", "key"]
    found, told = shown(example, capsys, *given, "--max_steps", "7", "--output_dir", "there", "--mnli_adapter", "a")
    assert told == "Table 4 of the paper has no r = 14 for cola: taking its row for r = 12.\n"
    expected = {"learning_rate": 0.5, "loraxs_target_modules": ["query", "key"], "max_steps": 7, "mnli_adapter": "a"}
    expected |= {
        "max_grad_norm": 1.0,
        "loraxs_r": 14,
        "classifier_learning_rate": 0.005,
        "num_train_epochs": 50,
        "seed": 42,
    }
    assert {name: found[name] for name in expected} == expected
    assert not {"output_dir", "seeds", "show_recipe", "save_steps"} & found.keys()
    assert not list(tmp_path.iterdir())  # nothing was made

    found, told = shown(example, capsys, "--task", "qqp", "--loraxs_r", "16")
    assert (found["learning_rate"], found["classifier_learning_rate"], found["num_train_epochs"]) == (1e-3, 1e-3, 10)
    assert told == "The paper has no row for qqp: taking QNLI's rates and 10 epochs.\n"
    row = paper.glue("qqp", 14)
    assert (row.task, row.init, row.rank) == ("qqp", "svd", 12) and " for qnli: taking its row for r = 12." in row.note
    found, _ = shown(example, capsys, "--task", "cola", "--warmup_steps", "5")
    assert (found["warmup_steps"], found["warmup_ratio"]) == (5, 0.0)
    found, _ = shown(example, capsys, "--task", "cola", "--warmup_steps", "0")
    assert (found["warmup_steps"], found["warmup_ratio"]) == (0, 0.0)


def test_what_the_tables_lack_needs_all_three_values(example, capsys):
    with pytest.raises(ValueError, match="init: got 'given', must be 'svd' or 'random'"):
        paper.glue("cola", 4, "given")
    for arguments, words in (
        (["--task", "cola", "--loraxs_r", "32"], "loraxs_r: got 32; table 4 .* has ranks 4 to 25 for cola"),
        (["--task", "cola", "--loraxs_r", "3", *SHORT[:4]], "loraxs_r: got 3; table 4"),
        (["--task", "mrpc", "--init", "random"], "task: got 'mrpc'; table 5 .* has sst2, cola, qnli"),
    ):
        with pytest.raises(
            ValueError, match=words + ".*all of --learning_rate, --classifier_learning_rate, --num_train"
        ):
            example.main([*arguments, "--show_recipe"])
    found, _ = shown(example, capsys, "--task", "mrpc", "--init", "random", "--loraxs_r", "64", *SHORT)
    assert (found["init"], found["loraxs_r"], found["learning_rate"]) == ("random", 64, 0.02)


def test_the_optimizer_and_the_warmup_are_the_recipes(example, tmp_path, roberta):
    """The rates arrive at the parameters, the warm-up at the schedule, and another optimizer where one is named."""
    arguments = ["--task", "cola", "--model_name_or_path", str(roberta), "--output_dir", str(tmp_path), *QUIET]
    task, recipe, *_ = example.parse(arguments)
    assert recipe.get_warmup_steps(1000) == 60
    for option, value, steps in (("steps", "5", 5), ("steps", "0", 0), ("steps", "0.2", 200), ("ratio", "0.1", 100)):
        assert example.parse([*arguments, f"--warmup_{option}", value])[1].get_warmup_steps(1000) == steps
    model = example.attached(task, recipe, 2)
    made = example.optimizer(model, task, recipe)
    assert type(made) is torch.optim.AdamW
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in made.param_groups] == [
        (1e-3, 0.01, (0.9, 0.999)),
        (1e-2, 0.01, (0.9, 0.999)),
    ]
    R, head = (group["params"] for group in made.param_groups)
    assert (
        len(R) == 8
        and {p.shape for p in R} == {(16, 16)}
        and {id(p) for p in head} == {id(p) for p in model.classifier.parameters()}
    )
    assert {(m.recipe.init, m.recipe.seed, m.alpha) for _, m in lx.model.adapted_layers(model)} == {("svd", 42, 8)}
    task, recipe, *_ = example.parse([*arguments, "--init", "random", "--seed", "7", "--loraxs_alpha", "3"])
    model = example.attached(task, recipe, 2)
    assert {(m.recipe.init, m.recipe.seed, m.alpha) for _, m in lx.model.adapted_layers(model)} == {("random", 7, 3)}
    _, other, *_ = example.parse([*arguments, "--optim", "sgd"])
    assert type(example.optimizer(model, task, other)) is torch.optim.SGD


def test_glue(example, roberta, tmp_path, capsys):
    data = tmp_path / "letters.csv"
    data.write_text("sentence,label\n" + "".join(f"{each['sentence']},{each['label']}\n" for each in VOWELS * 2))
    arguments = ["--task", "cola", "--model_name_or_path", str(roberta), "--loraxs_r", "4", *QUIET]
    arguments += ["--train_file", str(data), "--validation_file", str(data), *SHORT, "--num_train_epochs", "15"]
    arguments += ["--per_device_train_batch_size", "13", "--learning_rate", "0.1", "--logging_steps", "1"]
    out = tmp_path / "out"
    result = example.main([*arguments, "--output_dir", str(out)])
    assert "128 parameters in 8 adapters train" in capsys.readouterr().out  # 2 layers x 4 modules x 4 x 4
    fell = losses(out)
    assert len(fell) == 60 and sum(fell[-4:]) < sum(fell[:4])
    assert result["eval_matthews"] == json.loads((out / "result.json").read_text())["eval_matthews"] > 0

    fresh = classifier(roberta, 2, out / "adapter.safetensors")
    assert measured(example, fresh, roberta, "cola", VOWELS)["matthews"] == pytest.approx(result["eval_matthews"])

    resumed = example.main([*arguments, "--output_dir", str(out), "--resume_from_checkpoint", "true"])
    assert resumed["eval_matthews"] == result["eval_matthews"]


def measured(example, model, folder: Path, task: str, records: list[dict]) -> dict:
    """The metrics of a model, without the script's own loop."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    columns = [name for name in records[0] if name != "label"]
    with torch.no_grad():
        inputs = [tokenizer(*(each[name] for name in columns))["input_ids"] for each in records]
        logits = torch.cat([model(torch.tensor([ids])).logits for ids in inputs])
    labels = torch.tensor([each["label"] for each in records])
    return example.metrics(task, transformers.EvalPrediction(logits.numpy(), labels.numpy()))


def test_from_mnli_only_R_is_taken(example, roberta, tmp_path, capsys):
    options = ["--model_name_or_path", str(roberta), "--loraxs_r", "4", *QUIET, *SHORT, "--warmup_ratio", "0"]
    mnli = ["--task", "mnli", *options, *files(tmp_path, MNLI), "--learning_rate", "0.5"]
    example.main([*mnli, "--output_dir", str(tmp_path / "mnli")])
    adapter = tmp_path / "mnli" / "adapter.safetensors"
    stsb = ["--task", "stsb", *options, *files(tmp_path / "stsb", PAIRS), "--seed", "7"]
    frozen = ["--learning_rate", "0", "--classifier_learning_rate", "0", "--mnli_adapter", str(adapter)]
    capsys.readouterr()
    result = example.main([*stsb, *frozen, "--output_dir", str(tmp_path / "out")])
    assert {"eval_pearson", "eval_spearman"} <= result.keys()
    assert "The paper starts" not in capsys.readouterr().err

    first, then = classifier(roberta, 3, adapter), classifier(roberta, 1, tmp_path / "out" / "adapter.safetensors")
    for name, layer in lx.model.adapted_layers(first):
        other = then.get_submodule(name)
        assert torch.equal(layer.R, other.R) and torch.equal(layer.A, other.A) and torch.equal(layer.B, other.B)
    assert layer.R.abs().max() > 0.1
    torch.manual_seed(7)
    transformers.set_seed(7)
    new = classifier(roberta, 1)  # as the seed makes it
    assert torch.equal(then.classifier.dense.weight, new.classifier.dense.weight)
    assert torch.equal(then.classifier.out_proj.weight, new.classifier.out_proj.weight)
    assert not torch.equal(then.classifier.dense.weight, first.classifier.dense.weight)

    example.main([*stsb, *frozen, "--keep_mnli_dense", "true", "--output_dir", str(tmp_path / "dense")])
    kept = classifier(roberta, 1, tmp_path / "dense" / "adapter.safetensors")
    assert torch.equal(kept.classifier.dense.weight, first.classifier.dense.weight)
    assert torch.equal(kept.classifier.dense.bias, first.classifier.dense.bias)
    assert torch.equal(kept.classifier.out_proj.weight, new.classifier.out_proj.weight)
    R = first.get_parameter("roberta.encoder.layer.1.output.dense.R")
    assert torch.equal(kept.get_parameter("roberta.encoder.layer.1.output.dense.R"), R)

    example.main([*stsb, "--mnli_adapter", str(adapter), "--output_dir", str(tmp_path / "trained")])
    trained = classifier(roberta, 1, tmp_path / "trained" / "adapter.safetensors")
    assert not torch.equal(trained.get_parameter("roberta.encoder.layer.1.output.dense.R"), R)
    assert not torch.equal(trained.classifier.dense.weight, new.classifier.dense.weight)


def test_an_mnli_adapter_that_does_not_fit_is_refused(example, roberta, tmp_path, monkeypatch):
    model = classifier(roberta, 3)
    targets = paper.TABLES["glue"]["loraxs_target_modules"]
    lx.attach(model, 4, target_modules=targets, alpha=16, modules_to_save=["classifier"])
    adapter = tmp_path / "adapter.safetensors"
    lx.save_adapter(model, adapter)
    stsb = ["--task", "stsb", "--model_name_or_path", str(roberta), "--loraxs_r", "4", *QUIET]
    stsb += [*files(tmp_path, PAIRS), "--output_dir", str(tmp_path / "out")]

    def refused(*more: str, words: str, error: type = ValueError) -> None:
        with pytest.raises(error, match=words):
            example.main([*stsb, *more])

    given = ["--mnli_adapter", str(adapter), "--loraxs_alpha", "16"]
    refused(*given, "--loraxs_target_modules", "query", words=r"module '.*' has rank and alpha \(4, 16.0\).* None")
    refused(*given, "--loraxs_target_modules", *targets, "key", words=r"module '.*key' has rank and alpha None there")
    random = tmp_path / "random.safetensors"
    lx.attach(lx.detach(model), 4, target_modules=targets, alpha=16, init="random", modules_to_save=["classifier"])
    lx.save_adapter(model, random)
    with monkeypatch.context() as patched:
        patched.setattr(example, "Model", None)  # before a model is loaded
        refused(
            *given[:2], words="needs --loraxs_r 4 --loraxs_alpha 16.0 --init svd, got --loraxs_r 4 --loraxs_alpha 8 "
        )
        refused(*given, "--loraxs_r", "8", words="needs --loraxs_r 4 .* got --loraxs_r 8 --loraxs_alpha 16 --init svd")
        refused(*given, "--init", "random", *SHORT, words="needs .* --init svd, got .* --init random")
        refused(*given[2:], "--mnli_adapter", str(random), words="needs .* --init random, got .* --init svd")
        refused("--mnli_adapter", str(tmp_path / "no"), words="mnli_adapter: there is no file", error=FileNotFoundError)
        refused("--keep_mnli_dense", "true", words="keep_mnli_dense: got True, must be left out without mnli_adapter")
        (tmp_path / "peft").mkdir()
        no_folder = dict(words="mnli_adapter: got .*peft, must be a file adapter.safetensors", error=FileNotFoundError)
        refused("--mnli_adapter", str(tmp_path / "peft"), **no_folder)
        (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORAXS", "r": 4, "lora_alpha": 16}')
        refused("--mnli_adapter", str(tmp_path / "peft"), **no_folder)
        (tmp_path / "peft" / "adapter_model.safetensors").touch()
        refused("--mnli_adapter", str(tmp_path / "peft"), words="is of PEFT's type LORAXS; the reference")
    assert not (tmp_path / "out").exists()


def test_from_the_references_mnli_checkpoint(example, tmp_path):
    """A BERT, whose head is a linear layer: R, A and B are the reference's, and the head is new."""
    import test_reference_repo as reference

    model = save_bert(tmp_path / "bert", "bert")
    theirs = reference.trained(model=classifier(model, 3))
    folder = reference.saved(theirs, tmp_path / "theirs")
    rte = [{"sentence1": c * 3, "sentence2": c, "label": i % 2} for i, c in enumerate("abcdef")]
    arguments = ["--task", "rte", "--model_name_or_path", str(model), "--loraxs_r", "4", *QUIET, *SHORT]
    arguments += [*files(tmp_path, rte), "--mnli_adapter", str(folder), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"needs --loraxs_r 4 --loraxs_alpha 16 .* got --loraxs_r 4 --loraxs_alpha 8 "):
        example.main(arguments)
    with pytest.raises(ValueError, match="module 'classifier' has no layer `dense`"):
        example.main([*arguments, "--loraxs_alpha", "16", "--keep_mnli_dense", "true"])
    frozen = ["--loraxs_alpha", "16", "--learning_rate", "0"]
    result = example.main([*arguments, *frozen])
    fresh = classifier(model, 2, tmp_path / "out" / "adapter.safetensors")
    for name, layer in reference.reference_layers(theirs).items():
        ours = fresh.get_submodule(name)
        assert torch.equal(ours.R, layer.default_lora_latent_mapping.weight) and ours.scaling == 4
        assert torch.equal(ours.A, layer.lora_A.default.weight) and torch.equal(ours.B, layer.lora_B.default.weight)
    assert fresh.classifier.weight.shape[0] == 2
    assert measured(example, fresh, model, "rte", rte)["accuracy"] == pytest.approx(result["eval_accuracy"])


def save_bert(folder: Path, kind: str) -> Path:
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    if kind == "bert":
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        config = transformers.BertConfig(**sizes, vocab_size=vocabulary, pad_token_id=2, initializer_range=0.2)
    else:
        sizes = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48)
        config = transformers.DistilBertConfig(**sizes, vocab_size=vocabulary, pad_token_id=2, initializer_range=0.2)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind, heads, targets",
    [
        ("bert", ["pooler", "classifier"], None),
        ("bert", ["classifier"], None),
        ("distilbert", ["pre_classifier", "classifier"], ["q_lin", "v_lin", "out_lin", "lin2"]),
    ],
)
def test_other_heads(example, tmp_path, kind, heads, targets):
    """What --classifier names trains and is in the file; the file gives the metric again."""
    folder = save_bert(tmp_path / "model", kind)
    arguments = ["--task", "sst2", "--model_name_or_path", str(folder), "--loraxs_r", "4", *QUIET, *SHORT]
    arguments += [*files(tmp_path, VOWELS), "--classifier", *heads, "--output_dir", str(tmp_path / "out")]
    result = example.main(arguments + (["--loraxs_target_modules", *targets] if targets else []))
    before, model = classifier(folder, 2), classifier(folder, 2, tmp_path / "out" / "adapter.safetensors")
    assert measured(example, model, folder, "sst2", VOWELS)["accuracy"] == pytest.approx(result["eval_accuracy"])
    assert [name.rpartition(".")[2] for name in model.loraxs.modules_to_save] == heads
    if kind == "bert":  # pretrained, so that it differs only where it has trained
        assert torch.equal(before.bert.pooler.dense.weight, model.bert.pooler.dense.weight) == (heads == ["classifier"])


def test_mnli_with_a_pooler_that_trains(example, tmp_path):
    """The pooler of the MNLI run is not taken over either: it starts as it was pretrained."""
    folder = save_bert(tmp_path / "model", "bert")
    options = ["--model_name_or_path", str(folder), "--loraxs_r", "4", *QUIET, *SHORT]
    mnli = ["--task", "mnli", *options, *files(tmp_path, MNLI), "--classifier", "pooler", "classifier"]
    example.main([*mnli, "--output_dir", str(tmp_path / "mnli")])
    rte = [{"sentence1": c * 3, "sentence2": c, "label": i % 2} for i, c in enumerate("abcdef")]
    rte = ["--task", "rte", *options, *files(tmp_path / "rte", rte)]
    rte += ["--mnli_adapter", str(tmp_path / "mnli" / "adapter.safetensors")]
    example.main([*rte, "--output_dir", str(tmp_path / "out")])
    before, model = classifier(folder, 2), classifier(folder, 2, tmp_path / "out" / "adapter.safetensors")
    assert model.loraxs.modules_to_save == ("classifier",)
    assert torch.equal(before.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    model = example.attached(*example.parse(rte)[:2], 2)
    trains = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".R")}
    assert trains == {"classifier.weight", "classifier.bias"}


def test_the_newest_whole_checkpoint_is_resumed_from(example, tmp_path):
    assert example.last_checkpoint(tmp_path / "none") is None
    for step, name in ((9, "trainer_state.json"), (10, "trainer_state.json"), (11, "other.json")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert example.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_several_seeds(example, roberta, tmp_path, monkeypatch, capsys):
    """Interrupted in the middle of the second seed and started again: to the bit what an uninterrupted run gives."""
    arguments = ["--task", "cola", "--model_name_or_path", str(roberta), "--loraxs_r", "4", *QUIET, *SHORT]
    arguments += [*files(tmp_path, VOWELS), "--num_train_epochs", "4", "--seed", "3", "--seeds", "3"]
    whole = example.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert json.loads((tmp_path / "whole" / "results.json").read_text()) == whole
    scores = [run["best"] for run in whole["runs"].values()]
    assert list(whole["runs"]) == ["3", "4", "5"] == [str(seed) for seed in whole["seeds"]] and len(set(scores)) > 1
    assert whole["median"] == statistics.median(scores) and whole["standard_deviation"] == statistics.stdev(scores)
    assert f"median {whole['median']}, deviation {whole['standard_deviation']}" in capsys.readouterr().out
    for seed, run in whole["runs"].items():
        assert [each["epoch"] for each in run["epochs"]] == [1, 2, 3, 4]
        assert run["best"] == max(each["matthews"] for each in run["epochs"])
        assert run["best"] == next(e["matthews"] for e in run["epochs"] if e["epoch"] == run["best_epoch"])
        model = classifier(roberta, 2, tmp_path / "whole" / f"seed-{seed}" / "adapter.safetensors")
        assert measured(example, model, roberta, "cola", VOWELS)["matthews"] == pytest.approx(run["best"])
    script("glue_results").main([str(tmp_path / "whole")])
    shown = f"{100 * whole['median']:.2f} ± {100 * whole['standard_deviation']:.2f}"
    assert f"| LoRA-XS, ours | 128 | 4 | - | - | {shown} | - |" in capsys.readouterr().out
    assert whole["parameters"]["R"] == 128 and whole["recipe"]["classifier_learning_rate"] == 0.01
    alone = example.main([*arguments[:-2], "--seed", "4", "--output_dir", str(tmp_path / "alone")])
    assert alone["eval_matthews"] == whole["runs"]["4"]["best"]  # a seed is what it is on its own

    class Stopped(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if args.seed == 4 and state.epoch and state.epoch >= 2:
                raise KeyboardInterrupt

    class Trainer(transformers.Trainer):
        def __init__(self, **options):
            super().__init__(**options, callbacks=[Stopped()])

    out = ["--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(example, "Trainer", Trainer)
        example.main([*arguments, *out])
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == ["3"]
    (tmp_path / "out" / "seed-4" / "checkpoint-9").mkdir()  # killed while it was written
    with pytest.raises(
        ValueError, match=r"results.json is of another recipe \(learning_rate is 0.02 there and 0.01 here"
    ):
        example.main([*arguments, *out, "--learning_rate", "0.01"])
    with pytest.raises(ValueError, match=r"of another recipe \(max_steps is None there and 3 here\)"):
        example.main([*arguments, *out, "--max_steps", "3"])
    began = []
    train = example.train
    monkeypatch.setattr(
        example, "train", lambda task, recipe, *data: began.append(recipe) or train(task, recipe, *data)
    )
    again = example.main([*arguments, *out])
    assert [(recipe.seed, bool(recipe.resume_from_checkpoint)) for recipe in began] == [(4, True), (5, False)]
    assert began[0].resume_from_checkpoint.endswith("checkpoint-2")
    assert again == whole
    for seed in ("seed-3", "seed-4", "seed-5"):
        ours, theirs = (tmp_path / each / seed / "adapter.safetensors" for each in ("out", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()

    began.clear()
    assert example.main([*arguments, *out]) == whole and not began  # nothing is left to do
    more = example.main([*arguments[:-1], "4", *out])
    assert [recipe.seed for recipe in began] == [6] and list(more["runs"]) == ["3", "4", "5", "6"]
    (tmp_path / "train.jsonl").write_text(json.dumps(VOWELS[0]) + "\n" + json.dumps(VOWELS[1]) + "\n")
    with pytest.raises(ValueError, match=r"is of another recipe \(sha256 is"):
        example.main([*arguments, *out])


def written(
    folder: Path, task: str = "cola", scores=((0.1, 0.5, 0.4), (0.2, 0.6, 0.6), (0.3, 0.3, 0.7)), **options
) -> str:
    """A results.json of three seeds and three epochs, as train_glue.py writes it."""
    metric = paper.GLUE_TASKS[task].metrics[0]
    row = paper.glue(task, options.get("loraxs_r", 16))
    recipe = {"task": task, "loraxs_r": 16, "init": "svd", **paper.TABLES["glue"], "mnli_adapter": None}
    recipe |= {"classifier": ["classifier"], "keep_mnli_dense": False, "weight_decay": 0.01, "eval_strategy": "epoch"}
    recipe |= {"metric_for_best_model": metric, "global_batch": 32, "seed": 42, "max_grad_norm": 1.0, "sha256": {}}
    recipe |= {name: getattr(row, name) for name in ("learning_rate", "classifier_learning_rate", "num_train_epochs")}
    runs = {}
    for seed, each in enumerate(scores):
        epochs = [{"epoch": i + 1.0, "loss": 1.0, metric: score} for i, score in enumerate(each)]
        best = max(epochs, key=lambda epoch: epoch[metric])
        runs[str(seed)] = {"best": best[metric], "best_epoch": best["epoch"], "epochs": epochs}
    found = {"loraxs_glue": 1, "recipe": recipe | options, "metric": metric, "runs": runs, "seeds": [*range(len(runs))]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found | {"parameters": {"R": 24576, "modules": 96, "head": 9}}))
    return str(folder)


def test_tables_beside_the_papers(tmp_path, capsys):
    results = script("glue_results")
    tasks = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
    six = [written(tmp_path / task, task, scores=[[i / 10] * 3] * 3) for i, task in enumerate(tasks, 1)]
    six[2] = written(tmp_path / "cola")
    random = written(tmp_path / "random", scores=[[0.25, 0.125, 0.5]], init="random", learning_rate=0.5)
    results.main([*six, written(tmp_path / "r4", loraxs_r=4), written(tmp_path / "mnli", "mnli"), random])
    said = capsys.readouterr().out.splitlines()
    header = "| Method | Trainable parameters | Rank | SST-2 | MRPC | CoLA | QNLI | RTE | STS-B | Avg. | MNLI |"
    at = said.index(header)
    assert said[at + 2 : at + 9] == [
        "| LoRA, paper | 786,432 | - | 96.2 | 90.2 | 68.2 | 94.8 | 85.2 | 92.3 | 87.8 | - |",
        "| VeRA, paper | 61,000 | - | 96.1 | 90.9 | 68.0 | 94.4 | 85.9 | 91.7 | 87.8 | - |",
        "| LoRA-XS, paper | 24,576 | 16 | 95.9 | 90.7 | 67.0 | 93.9 | 88.1 | 92.0 | 87.9 | - |",
        # The best of each seed: 50, 60, 70; the mean of 10, 20, 60, 40, 50, 60 is 40.
        "| LoRA-XS, ours | 24,576 | 16 | 10.00 ± 0.00 | 20.00 ± 0.00 | 60.00 ± 10.00 | 40.00 ± 0.00 | 50.00 ± 0.00 | "
        "60.00 ± 0.00 | 40.00 | 60.00 ± 10.00 |",
        "| LoRA-XS with random A and B, ours | 24,576 | 16 | - | - | 50.00 | - | - | - | - | - |",
        "| LoRA-XS, paper | - | 4 | - | - | - | - | - | - | - | - |",
        "| LoRA-XS, ours | 24,576 | 4 | - | - | 60.00 ± 10.00 | - | - | - | - | - |",
    ]
    assert paper.TABLES["table1_source"] in "\n".join(said)
    where = said.index("| CoLA | 16 | paper | - | - | - | - | - | - |")
    assert said[where + 1] == (
        "| CoLA | 16 | ours | 20.00 ± 10.00 | 50.00 ± 15.28 | 60.00 ± 10.00 | 25.00 | 12.50 | 50.00 |"
    )
    assert [line.split(" | ")[-1] for line in said if "/rte/" in line or "/cola/" in line] == [
        "nothing |",
        "no mnli_adapter |",
    ]
    assert next(line for line in said if "/random/" in line).endswith("| loraxs_r 16, learning_rate 0.5 |")


def test_what_differs_from_the_paper_is_named(example, tmp_path, capsys):
    """Of a recipe as train_glue.py shows it: nothing without options, else each of them, and the batch of all."""
    results = script("glue_results")

    def other(*options: str, batch: int = 32) -> str:
        recipe, _ = shown(example, capsys, "--task", "sst2", *options)
        results.main([written(tmp_path, **recipe, global_batch=batch)])
        return capsys.readouterr().out.strip().rpartition("| 3 | ")[2]

    assert other() == other("--train_file", "a", "--use_cpu", "true", "--seed", "7") == "nothing |"
    given = other("--gradient_accumulation_steps", "2", "--max_steps", "9", "--adam_beta2", "0.9", batch=64)
    assert given == "global_batch 64, adam_beta2 0.9, max_steps 9 |"
    given = other("--metric_for_best_model", "loss", "--weight_decay", "0", "--warmup_steps", "0")
    assert given == "warmup_ratio 0.0, weight_decay 0.0, metric_for_best_model loss, warmup_steps 0.0 |"
    given = other("--mnli_adapter", "a", "--keep_mnli_dense", "true", "--classifier", "pooler", "classifier")
    assert given == "classifier ['pooler', 'classifier'], keep_mnli_dense True |"


def test_learning_curves(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    results = script("glue_results")
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    given = [written(tmp_path / "a"), written(tmp_path / "b", "sst2"), written(tmp_path / "c", init="random")]
    results.main([*given, "--output", str(tmp_path / "r.md"), "--plot", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and "## Table 3" in (tmp_path / "r.md").read_text()
    first, second = drawn[0].axes
    assert (first.get_title(), second.get_title(), second.get_ylabel()) == ("SST-2", "CoLA", "matthews, %")
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["random, r = 16", "svd, r = 16"]
    curve, ones, best = first.lines
    assert list(zip(*curve.get_data(), strict=True)) == [(1, 20), (2, 50), (3, 60)]  # the median of the seeds
    assert list(zip(*ones.get_data(), strict=True)) == [(1, 20), (2, 50)]
    assert list(zip(*best.get_data(), strict=True)) == [(3, 60)]


def test_results_that_cannot_be_shown_are_refused(tmp_path):
    """And nothing is written."""
    results = script("glue_results")
    good, other = written(tmp_path / "good"), written(tmp_path / "other", model_name_or_path="roberta-base")
    foreign, damaged, half = (tmp_path / name for name in ("foreign.json", "damaged.json", "half.json"))
    foreign.write_text('{"recipe": {}}')
    found = json.loads(Path(good, "results.json").read_text())
    half.write_text(json.dumps(found | {"seeds": [0, 1, 2, 3, 4]}))
    del found["runs"]["1"]["best_epoch"]
    damaged.write_text(json.dumps(found))
    (tmp_path / "empty").mkdir()
    for given, error, words in (
        ([tmp_path / "empty"], FileNotFoundError, r"there is no file .*empty/results\.json; train_glue\.py --seeds"),
        ([tmp_path / "none"], FileNotFoundError, "there is no file .*none"),
        ([foreign], ValueError, r"foreign\.json is no results\.json of train_glue"),
        ([damaged], ValueError, r"damaged\.json is damaged \(KeyError: 'best_epoch'"),
        ([half], ValueError, r"half\.json has 3 of 5 seeds; start its run again"),
        ([good, good], ValueError, r"are both of \('cola', 16, 'svd'\)"),
        (
            [written(tmp_path / "sst2", "sst2"), other],
            ValueError,
            "other/.* has model_name_or_path roberta-base, .*sst2/",
        ),
        ([good, "--plot", tmp_path / "c.gif2"], ValueError, "plot: got a file of type .gif2"),
        ([good, "--plot", tmp_path / "r.md"], ValueError, "plot: got .*r.md, must be another file"),
        ([good, "--plot", Path(good, "results.json")], ValueError, "plot: got .*, must be another file"),
    ):
        with pytest.raises(error, match=words):
            results.main([*map(str, given), "--output", str(tmp_path / "r.md")])
    assert not (tmp_path / "r.md").exists() and not list(tmp_path.glob("c.*"))


def test_seeds_that_cannot_be_run_are_refused(example, tmp_path):
    arguments = ["--task", "cola", "--model_name_or_path", "no model", *files(tmp_path, VOWELS), *QUIET]
    arguments += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="seeds: got 0, must be 1 or greater"):
        example.main([*arguments, "--seeds", "0"])
    with pytest.raises(ValueError, match="resume_from_checkpoint, eval_strategy no: cannot be beside seeds"):
        example.main([*arguments, "--seeds", "2", "--resume_from_checkpoint", "true"])
    (tmp_path / "out" / "seed-42").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has folders of seeds and no results\.json"):
        example.main([*arguments, "--seeds", "2"])
    (tmp_path / "out" / "results.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"results\.json is of another recipe"):
        example.main([*arguments, "--seeds", "2"])
    (tmp_path / "out" / "results.json").write_text('{"loraxs_glue":')
    with pytest.raises(ValueError, match=r"results\.json: is damaged, no JSON"):
        example.main([*arguments, "--seeds", "2"])


def test_data(example, tmp_path):
    (tmp_path / "a.tsv").write_text('sentence1\tsentence2\tlabel\n"odd\tb\u2028\tentailment\nc\td\tnot_entailment\n')
    (tmp_path / "b.json").write_text(json.dumps([{"sentence1": "c", "sentence2": "d", "label": "not_entailment"}]))
    task = example.Task("rte", train_file=str(tmp_path / "a.tsv"), validation_file=str(tmp_path / "b.json"))
    rows = [('"odd', "b\u2028", 1), ("c", "d", 0)], [("c", "d", 0)]
    assert example.read_data(task) == (*rows, 2)
    (tmp_path / "c.csv").write_text('question,sentence,label\n"a, ""b""\nc",d,1\ne,f,0\n')
    task = example.Task("qnli", train_file=str(tmp_path / "c.csv"), validation_file=str(tmp_path / "c.csv"))
    assert example.read_data(task)[0] == [('a, "b"\nc', "d", 1), ("e", "f", 0)]
    save_tokenizer(tmp_path)
    encoded = example.encode([("abcdef", 1), ("g", 0)], transformers.AutoTokenizer.from_pretrained(tmp_path), 4)
    assert [(len(each["input_ids"]), each["labels"]) for each in encoded] == [(4, 1), (2, 0)]
    scores = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("0", 5, 3.5)]
    path = str(lines(tmp_path / "d.jsonl", scores))
    found = example.read_data(example.Task("stsb", train_file=path, validation_file=path))
    assert [label for *_, label in found[0]] == [0, 5, 3.5] and found[2] == 1


GOOD = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1)]
TRAIN, VALID = "train_file: .*", "validation_file: .*"


def other(**changes) -> dict:
    return GOOD[0] | changes


@pytest.mark.parametrize(
    "task, training, validation, words",
    [
        ("mnli", [*MNLI, MNLI[0] | {"label": 3}], MNLI, f"{TRAIN} has labels '0', '1', '2', '3', must have 3 diff"),
        ("rte", GOOD[:1], GOOD, f"{TRAIN} has labels '0', must have 2 different ones for rte"),
        ("rte", GOOD, [other(label=2)], f"{VALID} has label '2', must have those of the training data: 0, 1"),
        ("rte", GOOD, [other(label=-1)], f"{VALID}: record 1 has label -1, must be one of 2; -1 stands"),
        ("rte", [*GOOD, other(label=None)], GOOD, f"{TRAIN}: record 3 has label None"),
        ("rte", [*GOOD, other(label=float("nan"))], GOOD, f"{TRAIN}: record 3 has label nan"),
        ("rte", [*GOOD, {"sentence1": "a", "sentence2": "b"}], GOOD, f"{TRAIN}: record 3 has label None"),
        ("stsb", GOOD, [other(label=5.1)], f"{VALID}: record 1 has label 5.1, must be a number from 0 to"),
        ("stsb", GOOD, [other(label="high")], f"{VALID}: record 1 has label 'high', must be a number"),
        ("stsb", [other(label=float("nan"))], GOOD, f"{TRAIN}: record 1 has label nan, must be a number"),
        ("stsb", GOOD, GOOD[:1], f"{VALID} has 1 record, must have 2 or more: pearson needs them"),
        ("stsb", GOOD, [other(label=-1)], "record 1 has label -1, must be a number from 0 to 5"),
        ("rte", GOOD, [{"sentence1": "a", "label": 0}], f"{VALID} has columns sentence1, label, must have sent"),
        ("qnli", VOWELS, VOWELS, f"{TRAIN} has columns sentence, label, must have question, sentence and label"),
        ("cola", GOOD, GOOD, f"{TRAIN} has columns sentence1, sentence2, label, must have sentence and label"),
        ("rte", [*GOOD, other(sentence2=None)], GOOD, f"{TRAIN}: record 3 is .*, must have a text for each"),
        ("rte", GOOD, [], f"{VALID} has no records"),
        ("rte", [1, 2], GOOD, f"{TRAIN} has no records, or some without columns"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_data_that_do_not_fit_are_refused(example, tmp_path, task, training, validation, words):
    """Before a model is loaded: there is none."""
    paths = lines(tmp_path / "a.jsonl", training), lines(tmp_path / "b.jsonl", validation)
    given = ["--train_file", str(paths[0]), "--validation_file", str(paths[1])]
    with pytest.raises(ValueError, match=words):
        example.main(
            ["--task", task, "--model_name_or_path", "no model", *given, "--output_dir", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_are_refused(example, tmp_path, capsys):
    good = str(lines(tmp_path / "good.jsonl", GOOD))
    for name, text, words in (
        ("a.csv", "sentence1,sentence2,label\na,b,1,2\n", r"record 1 is .*\['2'\].*, must have a text for each of"),
        ("b.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\nc\n", "record 2 is"),
        ("c.csv", 'sentence1,sentence2,label\n"a,b,1\n', r"c.csv cannot be read as .csv \(unexpected end of data"),
        ("d.jsonl", '{"sentence1"\n', "d.jsonl cannot be read as .jsonl"),
        ("e.csv", "", "e.csv has no records"),
        ("f.csv", "sentence1,sentence2,label\n", "f.csv has no records"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"^validation_file: .*{words}"):
            example.read_data(example.Task("rte", train_file=good, validation_file=str(tmp_path / name)))
    (tmp_path / "g.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"train_file: .*g\.csv cannot be read as \.csv .*utf-8"):
        example.read_data(example.Task("rte", train_file=str(tmp_path / "g.csv"), validation_file=good))
    with pytest.raises(FileNotFoundError, match=r"validation_file: there is no file .*none\.csv"):
        example.read_data(example.Task("rte", train_file=good, validation_file=str(tmp_path / "none.csv")))
    with pytest.raises(ValueError, match="validation_file: got none, must be given where the other file is"):
        example.read_data(example.Task("rte", train_file=good))
    with pytest.raises(ValueError, match="train_file: got none"):
        example.read_data(example.Task("rte", validation_file=good))
    for wrong in (["--task", "wnli"], ["--task", "cola", "--init", "zeros"], ["--task", "cola", "--epochs", "2"]):
        with pytest.raises(SystemExit):
            example.main(wrong)
    assert "'wnli'" in capsys.readouterr().err
    for option, value, words in (
        ("--loraxs_alpha", "nan", "loraxs_alpha: got nan, must be greater than 0"),
        ("--max_length", "0", "max_length: got 0, must be 1 or greater"),
        ("--num_train_epochs", "0", "num_train_epochs: got 0.0, must be greater than 0"),
        ("--warmup_ratio", "1", "warmup_ratio: got 1.0, must be 0 or greater and less than 1"),
        ("--warmup_steps", "-1", "warmup_steps: got -1.0, must be 0 or greater"),
        ("--classifier_learning_rate", "-1", "classifier_learning_rate: got -1.0, must be 0 or greater"),
        ("--metric_for_best_model", "f2", "metric_for_best_model: got f2, must be one of matthews, loss for cola"),
    ):
        with pytest.raises(ValueError, match=words):
            example.main(["--task", "cola", option, value])


def test_metrics(example):
    def of(task, logits, labels):
        import numpy as np

        return example.metrics(task, transformers.EvalPrediction(np.array(logits), np.array(labels)))

    classes = [[1, 0], [0, 1], [0, 1], [0, 1]]
    assert of("mrpc", classes, [0, 1, 1, 0]) == {"accuracy": 0.75, "f1": pytest.approx(0.8)}
    assert of("cola", classes, [0, 1, 1, 0]) == {"matthews": pytest.approx(0.57735, abs=1e-5)}
    assert of("sst2", classes, [0, 1, 1, 0]) == {"accuracy": 0.75}
    assert of("stsb", [[1.0], [2.0], [4.0]], [1.0, 2.0, 3.0]) == {
        "pearson": pytest.approx(0.98198, abs=1e-5),
        "spearman": 1,
    }
    assert of("stsb", [[1.0], [1.0], [1.0]], [1.0, 2.0, 3.0]) == {
        "pearson": 0,
        "spearman": 0,
    }  # and no NaN, which stays best
