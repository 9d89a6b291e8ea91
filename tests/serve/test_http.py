"""vLLM's server with a bank: what it answers is what our own layers say, whatever else it does meanwhile."""

from __future__ import annotations

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
import requests
import torch

pytest.importorskip("vllm")

from serving import BASE, PATIENCE, PROMPTS, SECRET, Layers, answer_of, joined, random_R, run
from transformers import AutoModelForCausalLM

import loraxs_kernels as lx
from loraxs_kernels.files import sealed, tensors_of, unsealed, write_atomically

LONG = " ".join(f"{i} times {i} is {i * i}." for i in range(2, 20))


def test_more_adapters_than_slots_and_the_base_model_at_once(server, ours):
    names = [*(f"user{i}" for i in range(11)), None, None]
    answers = server.ask_all((name, PROMPTS[i % 2]) for i, name in enumerate(names))
    ours.check(answers)
    assert len({answer.text for answer in answers}) > 8


def test_long_prompts_come_in_chunks(server, ours):
    """Of 64 tokens at most a step, of which other requests take some."""
    answers = server.ask_all([("user11", LONG), (None, LONG), ("user12", LONG), ("user11", PROMPTS[0])])
    assert len(answers[0].prompt) > 3 * 64
    ours.check(answers)


def cached(server) -> float:
    lines = requests.get(f"{server.url}/metrics", timeout=PATIENCE).text.splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:prefix_cache_hits_total"))
    return float(line.split()[-1])


def test_cached_prefixes_are_those_of_the_adapter(server, ours, writer):
    """And of its version: that of one that was replaced is not used."""
    names, before = ["user13", "user14", None], cached(server)
    first = [server.ask(name, f"Sums: {LONG}")[0] for name in names]
    assert cached(server) == before
    again = [server.ask(name, f"Sums: {LONG}")[0] for name in names]
    assert cached(server) - before > 2 * len(first[0].prompt)
    ours.check(first)
    for one, two in zip(first, again, strict=True):
        assert one.tokens == two.tokens and one.logprobs == pytest.approx(two.logprobs, abs=2 * ours.most)
    for seed in (1005, 1006):
        writer.add("replaced", random_R(writer.modules, seed), replace=True)
        ours.check(server.ask("replaced", f"Sums: {LONG}"))


def test_a_stream_is_what_is_answered_at_once(server, ours):
    whole = server.ask("user15", PROMPTS[3])[0]
    chunks = list(server.stream("user15", PROMPTS[3]))
    assert len(chunks) >= 8 and joined("user15", chunks) == whole
    ours.check([whole])


def test_sampling(server, ours):
    how = {"temperature": 1.0, "max_tokens": 12, "n": 2, "seed": 7}
    two, again = (server.ask("user16", PROMPTS[1], **how) for _ in range(2))
    other = server.ask("user16", PROMPTS[1], **how | {"seed": 70})
    assert [answer.tokens for answer in two] == [answer.tokens for answer in again]
    assert len({tuple(answer.tokens) for answer in [*two, *other]}) == 4
    ours.check([*two, *other], greedy=False)


def test_stop_and_logprobs(server):
    whole = server.ask("user17", PROMPTS[5])[0].text
    word = whole.split()[3]
    body = {"model": "user17", "prompt": PROMPTS[5], "temperature": 0, "max_tokens": 16, "stop": [word], "logprobs": 3}
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == whole[: whole.index(word)]
    assert all(len(top) == 3 and max(top.values()) <= 0 for top in choice["logprobs"]["top_logprobs"])


def test_chat(server, ours, tokenizer):
    messages = [{"role": "user", "content": "Name a colour."}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 16, "logprobs": True, "return_token_ids": True}
    answers = []
    for name in ("user18", None):
        answer = server.post("/v1/chat/completions", model=name or BASE, **body).json()
        assert answer["model"] == (name or BASE)
        answers.append(answer_of(name, answer["choices"][0] | {"prompt_token_ids": answer["prompt_token_ids"]}))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answers[0].prompt == answers[1].prompt == prompt
    ours.check(answers)


def test_names_of_models(server, ours, writer):
    odd = "team/Ünï 7?#"
    writer.add(odd, random_R(writer.modules, 1000))
    listed = requests.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"]
    assert {each["id"]: each["parent"] for each in listed} == {BASE: None} | dict.fromkeys(writer, BASE)
    ours.check(server.ask(odd, PROMPTS[0]))


def test_unknown_names_are_refused_and_cost_nothing(server, ours):
    with requests.Session() as session:

        def ask(name):
            body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 1}
            return session.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)

        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(ask, [*(f"nobody{i}" for i in range(1000)), "x" * 512, "a\0b", "user1/"]))
    assert {response.status_code for response in responses[:1000]} == {404}
    assert "nobody999" in responses[999].json()["error"]["message"]
    assert all(response.status_code in (400, 404) for response in responses[1000:])
    ours.check(server.ask("user19", PROMPTS[0]))


def test_what_another_process_writes_is_seen_by_the_next_request(server, ours, writer):
    asked = {"model": "late", "prompt": PROMPTS[0], "max_tokens": 1}
    assert server.post("/v1/completions", **asked).status_code == 404
    writer.add("late", random_R(writer.modules, 1001))
    first = server.ask("late", PROMPTS[0])
    ours.check(first)
    writer.add("late", random_R(writer.modules, 1002), replace=True)
    second = server.ask("late", PROMPTS[0])
    ours.check(second)
    assert first[0].tokens != second[0].tokens
    writer.remove("late")
    assert server.post("/v1/completions", **asked).status_code == 404


def test_a_stream_goes_on_with_the_version_it_began_with(server, ours, writer):
    """While its adapter is replaced, and then removed, and more others come than the engine has room for."""
    old, new = (random_R(writer.modules, seed) for seed in (1003, 1004))
    writer.add_many([("both", old), ("as-old", old), ("as-new", new)])
    stream = iter(server.stream("both", PROMPTS[6], max_tokens=200, ignore_eos=True))
    begun = [next(stream) for _ in range(3)]
    writer.add("both", new, replace=True)
    answers = server.ask_all([("both", PROMPTS[6]), *((f"user{i}", PROMPTS[6]) for i in range(20, 32))])
    writer.remove("both")
    assert server.post("/v1/completions", model="both", prompt=PROMPTS[6]).status_code == 404
    went_on = list(stream)
    assert len(went_on) > 3  # it had not ended before
    whole = joined("as-old", [*begun, *went_on])
    assert len(whole.tokens) == 200
    answers[0].name = "as-new"
    ours.check([whole])
    ours.check(answers)


def test_a_damaged_record_is_refused_and_no_other(server, ours, writer):
    value, data = bytes(writer._value("user40")), writer.path / "data.mdb"
    at = data.read_bytes().rindex(value) + len(value) - 1
    with data.open("r+b") as f:  # in place: the server has this file mapped

        def write(byte: int) -> None:
            f.seek(at)
            f.write(bytes([byte]))
            f.flush()

        write(value[-1] ^ 4)
        try:
            response = server.post("/v1/completions", model="user40", prompt=PROMPTS[0])
            assert response.status_code == 500 and "'user40': is damaged" in response.text
            assert str(writer.path) not in response.text
            ours.check(server.ask_all([("user41", PROMPTS[0]), (None, PROMPTS[0])]))
        finally:
            write(value[-1])
    ours.check(server.ask("user40", PROMPTS[0]))


def sent(server, name: str, body: bytes | None, token: str | None = SECRET, method: str = "POST") -> int:
    """The status of a request to the endpoint that writes."""
    url = f"{server.url}/v1/loraxs/adapters/{name}"
    headers = {} if token is None else {"LoraXS-Token": token}
    return requests.request(method, url, data=body, headers=headers, timeout=PATIENCE).status_code


def test_new_weights_over_http(server, ours, writer, tmp_path):
    writer.export("user50", tmp_path / "first.safetensors")
    writer.export("user51", tmp_path / "second.safetensors")
    first, second = ((tmp_path / f"{which}.safetensors").read_bytes() for which in ("first", "second"))
    header, f = unsealed(tmp_path / "first.safetensors", "loraxs", "adapter")
    found = tensors_of(f, tmp_path / "first.safetensors")
    other = {key: t * 1.5 if key.startswith("S") else t for key, t in found.items()}
    write_atomically(tmp_path / "other.safetensors", *sealed(other, "loraxs", header))
    before = writer.names()
    for token in (None, "", SECRET[:-1], SECRET + "x"):
        assert sent(server, "fresh", first, token) == 401
        assert sent(server, "user50", None, token, "DELETE") == 401
    assert sent(server, "fresh", first[:-1]) == 400
    assert sent(server, "fresh", b"") == 400
    assert sent(server, "fresh", (tmp_path / "other.safetensors").read_bytes()) == 409
    assert sent(server, "fresh", bytes(2**26)) == 413
    assert sent(server, BASE, first) == 400
    assert sent(server, "x" * 512, first) == 400
    assert sent(server, "nobody", None, method="DELETE") == 404
    assert writer.names() == before and server.post("/v1/completions", model="fresh", prompt="x").status_code == 404

    assert sent(server, "fresh", first) == 201
    (answer,) = server.ask("fresh", PROMPTS[0])
    assert answer.tokens == server.ask("user50", PROMPTS[0])[0].tokens
    assert sent(server, "fresh", second) == 200
    (answer,) = server.ask("fresh", PROMPTS[0])
    ours.check([answer])
    assert answer.tokens == server.ask("user51", PROMPTS[0])[0].tokens
    assert sent(server, "fresh", None, method="DELETE") == 200
    assert server.post("/v1/completions", model="fresh", prompt="x").status_code == 404
    assert writer.names() == before


def test_a_bank_that_another_takes_the_place_of_is_served_on_and_not_written_to(server, ours, writer, bank, tmp_path):
    writer.export("user61", tmp_path / "file.safetensors")
    file, aside = (tmp_path / "file.safetensors").read_bytes(), bank.with_name("aside")
    bank.rename(aside)
    try:
        shutil.copytree(aside, bank, ignore=shutil.ignore_patterns("lock.mdb"))
        assert sent(server, "late", file) == 500 and sent(server, "user60", None, method="DELETE") == 500
        ours.check(server.ask_all([("user60", PROMPTS[0]), (None, PROMPTS[0])]))
    finally:
        shutil.rmtree(bank)
        aside.rename(bank)


def test_a_killed_worker_ends_the_server_and_a_new_one_answers(server, ours, bank, start, smollm2, tmp_path):
    """The new one in bf16, with a basis file, and without --enforce-eager, which on a CPU changes nothing with LoRA."""
    ours.check(server.ask("user70", PROMPTS[0]))
    started = server.processes()
    (worker,) = (each for each in started if "Worker" in each.name())
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(server.post, "/v1/completions", model="user71", prompt=PROMPTS[1], max_tokens=500)
        time.sleep(1)
        worker.kill()
        with suppress(requests.ConnectionError):
            assert late.result().status_code >= 500
    server.process.wait(PATIENCE)
    _, alive = psutil.wait_procs(started, PATIENCE)
    assert not alive
    with pytest.raises(requests.ConnectionError):
        server.ask("user70", PROMPTS[0])

    basis = tmp_path / "basis.safetensors"  # in fp32, as the bank's own A and B
    run([sys.executable, "-m", "loraxs_kernels", "init", str(smollm2), "-r4", "--dtype=float32", f"-o{basis}"])
    options = "--dtype bfloat16 --max-model-len 256 --max-loras 4 --max-num-seqs 8"
    again = start(smollm2, bank, f"--basis={basis}", *options.split())
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    with lx.AdapterBank(bank) as opened:
        layers = Layers(opened.attach(model, 16, progress=False))
        layers.calibrate(again.ask_all((None, prompt) for prompt in PROMPTS))
        layers.check(again.ask_all((f"user{i}" if i % 3 else None, PROMPTS[i % 8]) for i in range(70, 77)))
