"""The example scripts, run as a user would, offline: tiny random models and a few lines of data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from packaging.version import Version

import loraxs_kernels as lx
from loraxs_kernels.paper import TABLES

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[1]
QUIET = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of bytes; returns how many tokens it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "</s>", "<pad>", "<unk>"]
    names = {c: i for i, c in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(names, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A </s> $B", [("<s>", 0), ("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(names)


def save_model(folder: Path, kind: str) -> Path:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=2)
    sizes |= dict(vocab_size=save_tokenizer(folder), bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        config = transformers.RobertaConfig(**sizes, max_position_embeddings=80, initializer_range=0.2)
        model = transformers.RobertaForMaskedLM(config)
    model.save_pretrained(folder)
    return folder


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [each["loss"] for each in history if "loss" in each]


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_causal_lm(tmp_path, capsys):
    model = save_model(tmp_path / "model", "llama")
    sums = [{"query": f"{a}+{b}", "response": "z" * 12} for a in range(4) for b in range(4)]
    data = lines(tmp_path / "sums.jsonl", [*sums, {"query": "x" * 300, "response": "cut off"}])
    arguments = ["--model_name_or_path", str(model), "--data_path", str(data), "--loraxs_r", "8", *QUIET]
    arguments += ["--max_length", "224", "--gradient_accumulation_steps", "2", "--learning_rate", "0.2"]
    save = "5" if Version(transformers.__version__) >= Version("5.10") else "4"  # older: only from an epoch's end
    arguments += ["--gradient_checkpointing", "true", "--save_steps", save]
    out, saved = tmp_path / "out", f"checkpoint-{save}"
    script("train_causal_lm").main([*arguments, "--output_dir", str(out)])
    said = capsys.readouterr().out
    assert "16 examples; 1 left out" in said and "896 of " in said  # 2 layers x 7 modules x 8 x 8
    fell = losses(out)  # 2 epochs of 16 / (2 x 2)
    assert len(fell) == 8 and fell[-1] < fell[0] - 0.3
    assert not (out / "checkpoint-8" / "tokenizer.json").exists()

    script("train_causal_lm").main(
        [*arguments, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(out / saved)]
    )
    adapter = (out / "adapter.safetensors").read_bytes()
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == adapter
    assert (out / "checkpoint-8" / "adapter.safetensors").read_bytes() == adapter

    fresh, base = (transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    lx.load_adapter(fresh, out / "adapter.safetensors")
    ids = torch.arange(20)[None]
    assert not torch.allclose(fresh(ids).logits, base(ids).logits, atol=1e-2)


def test_causal_lm_data(tmp_path):
    example = script("train_causal_lm")
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "data").mkdir()
    records = [{"question": "1+1", "answer": "2\u2028"}, {"question": "q", "answer": "a"}]
    lines(tmp_path / "data" / "b.jsonl", records)
    (tmp_path / "data" / "a.json").write_text(json.dumps(records[1:]))
    read = example.read_records(tmp_path / "data")
    assert read == [records[1], *records]
    task = example.Task("m", "d", data_fields=["question", "answer"])
    first = example.encode(read, task, tokenizer)[0]
    prompt = tokenizer(example.PROMPT.format("q"))["input_ids"]
    answer = [tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id]
    assert first == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    batch = example.collate([first, {"input_ids": [5, 6], "labels": [-100, 6]}], pad=2)
    assert batch["labels"][1].tolist() == [-100, 6] + [-100] * len(prompt)
    assert batch["attention_mask"].sum(1).tolist() == [len(prompt) + 2, 2] and batch["input_ids"][1, 2:].eq(2).all()
    with pytest.raises(ValueError, match="dtype: got 'half', must be auto, float32, bfloat16, float16"):
        example.Task("m", "d", dtype="half")
    with pytest.raises(ValueError, match="max_samples: got -1, must be at least 1"):
        example.Task("m", "d", max_samples=-1)
    with pytest.raises(ValueError, match="max_length: got 3, must leave room for a response"):
        example.encode(read, example.Task("m", "d", data_fields=["question", "answer"], max_length=3), tokenizer)
    with pytest.raises(FileNotFoundError, match="data_path: there is no file or folder"):
        example.read_records(tmp_path / "none.json")
    with pytest.raises(ValueError, match="record 0 has no field 'query'; it has question, answer"):
        example.encode(read, example.Task("m", "d"), tokenizer)
    with pytest.raises(ValueError, match="'answer' of record 0 is None, must be text"):
        example.encode([{"question": "q", "answer": None}], task, tokenizer)
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), tmp_path / "c.parquet")
    assert example.read_records(tmp_path / "c.parquet") == records


def test_causal_lm_response_follows_the_prompt(tmp_path):
    """As in the reference, without the space that tokenizers like Mistral's put before a text of its own."""
    from tokenizers import pre_tokenizers

    example = script("train_causal_lm")
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made = example.encode([{"query": "q", "response": "a"}], example.Task("m", "d"), tokenizer)[0]
    answer = [token for token in made["labels"] if token != -100]
    assert answer == [tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id]


def test_paper_recipe(tmp_path):
    """The defaults, and that the warmup arrives, whatever transformers calls it."""
    example = script("train_causal_lm")
    recipe = example.Recipe(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert (recipe.learning_rate, recipe.lr_scheduler_type, recipe.weight_decay) == (4e-3, "cosine", 0)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (2, 64)
    assert recipe.num_train_epochs == 2
    assert recipe.global_batch == 128
    assert recipe.get_warmup_steps(1000) == 20 and "adamw" in recipe.optim


def test_show_recipe(tmp_path, capsys):
    """The paper's values and what the command line changes, as JSON; neither the model nor the data need be there."""
    arguments = ["--model_name_or_path", "none", "--data_path", "none", "--output_dir", str(tmp_path), *QUIET]
    arguments += ["--show_recipe", "--loraxs_r", "16", "--weight_decay", "0.1"]
    script("train_causal_lm").main(arguments)
    shown = json.loads(capsys.readouterr().out)
    paper = TABLES["instruction"] | {"loraxs_r": 16}
    assert {key: shown[key] for key in paper} == paper and len(paper) == 9
    assert shown["weight_decay"] == 0.1 and shown["gradient_accumulation_steps"] == 64
    assert shown["model_name_or_path"] == shown["data_path"] == "none" and "show_recipe" not in shown


def test_global_batch(tmp_path, monkeypatch):
    """128 examples a step, whatever the number of processes; or what was asked for."""
    example = script("train_causal_lm")
    assert [example.accumulation(2, n) for n in (1, 2, 8, 64)] == [64, 32, 8, 1]
    for per_device, processes in ((2, 3), (2, 128), (3, 1), (0, 1)):
        with pytest.raises(ValueError, match=f"per_device_train_batch_size: got {per_device}, with {processes} pro"):
            example.accumulation(per_device, processes)

    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 4)
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    recipe = example.Recipe(**common, per_device_train_batch_size=4)
    assert recipe.gradient_accumulation_steps == 8 and recipe.global_batch == 128
    recipe = example.Recipe(**common, gradient_accumulation_steps=64)
    assert recipe.gradient_accumulation_steps == 64 and recipe.global_batch == 512
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)  # DataParallel in each
    assert example.Recipe(**common).global_batch == 128


def test_fsdp1_is_refused_before_it_trains(tmp_path, monkeypatch):
    """And not when the adapter is saved; FSDP itself needs GPUs in Trainer."""
    example = script("train_causal_lm")

    class Sharded(transformers.Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.is_fsdp_enabled, self.accelerator.state.fsdp_plugin = True, types.SimpleNamespace(fsdp_version=1)

    monkeypatch.setattr(example, "Trainer", Sharded)
    model = save_model(tmp_path / "model", "llama")
    arguments = ["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out"), "--loraxs_r", "4", *QUIET]
    arguments += ["--data_path", str(lines(tmp_path / "sums.jsonl", [{"query": "1+1", "response": "2"}]))]
    with pytest.raises(ValueError, match="fsdp: got FSDP1"):
        example.main(arguments)


def test_causal_lm_in_two_processes(tmp_path):
    """torchrun with two processes trains as one process does: on the same batches, to the same R."""
    model = save_model(tmp_path / "model", "llama")
    sums = [{"query": f"{a}+{b}", "response": "z" * (a % 7)} for a in range(32) for b in range(8)]
    arguments = ["--model_name_or_path", str(model), "--data_path", str(lines(tmp_path / "sums.jsonl", sums)), *QUIET]
    arguments += ["--loraxs_r", "8", "--max_length", "180", "--learning_rate", "0.2", "--warmup_ratio", "0"]
    arguments += ["--per_device_train_batch_size", "16"]
    one, two = tmp_path / "one", tmp_path / "two"
    script("train_causal_lm").main([*arguments, "--output_dir", str(one)])

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "examples" / "train_causal_lm.py"), *arguments, "--output_dir", str(two)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as launched:
        try:
            said, errors = launched.communicate(timeout=120)
        finally:
            launched.terminate()  # torchrun ends its workers then, which it has put into sessions of their own
    assert launched.returncode == 0, errors
    assert said.count("takes 128 examples: 16 a batch, 4 batches one after the other, 2 at a time") == 1
    expected, found = losses(one), losses(two)
    assert len(found) == 4 and found[-1] < found[0] - 0.1  # 2 epochs of 256 / 128
    assert found == pytest.approx(expected, abs=1e-4)
    files = [safetensors.torch.load_file(folder / "adapter.safetensors") for folder in (one, two)]
    torch.testing.assert_close(files[1]["R/8"], files[0]["R/8"], atol=1e-4, rtol=0)
    assert [path.name for path in sorted(two.glob("*.safetensors"))] == ["adapter.safetensors"]


def test_many_users_train_as_each_does_alone(tmp_path, capsys, monkeypatch):
    """8 users for 6 steps in fp32: the losses of two of them are those of training alone, and the bank has all."""
    from loraxs_kernels import demo
    from loraxs_kernels.demo import trec

    if not all(importlib.util.find_spec(name) for name in (*demo.PACKAGES["minilm"], "lmdb")):
        pytest.skip("needs the demo's packages, which `make test` installs")
    questions = trec.Split(*(part[:200] for part in trec.load()))
    monkeypatch.setattr(trec, "load", lambda: questions)
    report, bank = tmp_path / "report.json", tmp_path / "bank"
    arguments = ["--users", "8", "--steps", "6", "--batch", "2", "--lr", "5e-4", "--alone", "2", "--tested", "1"]
    arguments += ["--device", "cpu"]
    script("train_many").main([*arguments, "--bank", str(bank), "--report", str(report)])
    found = json.loads(report.read_text())
    assert found["alone"]["users"] == 2 and found["alone"]["largest_loss_difference"] <= 1e-5
    assert len(found["losses"]) == 8 and all(len(each) == 6 for each in found["losses"].values())
    with lx.AdapterBank(bank) as opened:
        assert len(opened) == 8 and not opened.verify()
        opened.export("user-0007", tmp_path / "adapter.safetensors")
    assert "8 at once: 6 steps" in capsys.readouterr().out
