"""The demo, quick, as a user runs it; and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import standin
import torch

import loraxs_kernels as lx
from loraxs_kernels import demo
from loraxs_kernels.cli import main
from loraxs_kernels.demo import DemoError, report, trec

needs_data = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in demo.PACKAGES["minilm"]),
    reason="needs the demo's packages, which `make test` installs",
)


@needs_data
def test_the_questions_are_the_published_ones_and_the_parts_are_disjoint():
    split = trec.load()
    assert [len(part) for part in split] == [4081, 300, 1000]
    assert len({question.text for part in split for question in part}) == 5381
    assert {question.label for question in split.test} == set(range(6))
    assert split == trec.load()


@needs_data
def test_quick_demo(tmp_path, monkeypatch, capsys):
    """With fewer steps and questions than a user gets."""
    from loraxs_kernels.demo import minilm
    from loraxs_kernels.demo.training import Schedule

    questions = trec.load()
    questions = trec.Split(questions.train, questions.validation[:60], questions.test[:200])
    monkeypatch.setattr(trec, "load", lambda: questions)
    monkeypatch.setattr(minilm, "Schedule", lambda **how: Schedule(**how | dict(steps=28, warmup=3, validate_every=14)))
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert_learned(tmp_path, capsys.readouterr().out, 0.8)


@pytest.mark.gpu("demo", limit=80)
@pytest.mark.parametrize("data", [pytest.param(None, id="cuda-stand-in" if standin.MISSING else "cuda")])
def test_quick_demo_on_a_gpu(tmp_path, data, monkeypatch):
    if standin.MISSING:
        standin.demo_packages(tmp_path / "packages")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    command = [sys.executable, "-m", "loraxs_kernels", "demo", "--quick", "--device", "cuda", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_learned(tmp_path, run.stdout, 0.88)


def assert_learned(folder: Path, said: str, accuracy: float) -> None:
    """LoRA-XS learns real questions: well above the same steps on the head alone, and the adapter survives the disk."""
    report = json.loads((folder / "report.json").read_text())
    svd, head = report["rows"]["svd"], report["rows"]["head"]
    assert svd["adapter_parameters"] == 24 * 16 * 16
    assert svd["accuracy"] >= accuracy
    assert svd["accuracy"] >= head["accuracy"] + 0.08
    assert (
        report["checks"]["loaded"]["different_predictions"] == report["checks"]["merged"]["different_predictions"] == 0
    )
    assert report["bytes"]["adapter_file"] < report["bytes"]["lora"] / 20
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for figure in (svd["accuracy"], head["accuracy"]):
        assert f"{figure:.1%}" in said


@needs_data
def test_quick_demo_of_many(tmp_path, monkeypatch, capsys):
    """Each adapter of a mixed batch answers as it does exported and loaded alone, and the bank holds what is said.

    With fewer questions, adapters and steps than a user gets.
    """
    pytest.importorskip("lmdb")
    from loraxs_kernels.demo import many

    questions = trec.Split(*(part[:400] for part in trec.load()))
    monkeypatch.setattr(trec, "load", lambda: questions)
    monkeypatch.setitem(many.SIZES, "quick", many.Size(8, 40, 8, 16, 400, 1))
    monkeypatch.setattr(many, "ASKED", 40)
    monkeypatch.setattr(many, "TESTED", 64)
    out = tmp_path / "out"
    command = ["demo", "--many", "--quick", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    report, said = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    checks, disk, memory = report["checks"], report["disk"], report["memory"]
    assert len(checks["adapters"]) == 8 and checks["questions"] == 40
    for each in checks["adapters"].values():
        assert each["different_predictions"] == 0 and each["largest_logit_difference"] < 1e-4
        assert each["accuracy_mixed"] == each["accuracy_alone"] > 0.5
    assert len({each["accuracy_mixed"] for each in checks["adapters"].values()}) > 1  # they are different adapters
    assert sum(last - first for first, last in report["losses"].values()) < 0
    with lx.AdapterBank(out / "bank") as bank:
        assert len(bank) == disk["adapters"] == 40 and disk["record"] == 24 * 16 * 16 * 4
        first, mixed = bank.read("trained-00"), bank.read("mixture-0000")
        assert not torch.equal(first, mixed) and len([name for name in bank if name.startswith("trained")]) == 8
    assert disk["bank"] == (out / "bank" / "data.mdb").stat().st_size < 1.5 * 40 * disk["record"]
    assert list(memory) == ["before the bank", "8 adapters", "40 adapters"]
    if None not in memory.values():
        assert memory["40 adapters"] - memory["8 adapters"] < 2**26  # a model takes more than that
    assert "8 trained, 32 mixtures of them" in said
    for kind in report["throughput"].values():
        assert f"{kind['questions_per_second']:,.0f}" in said
    assert main(command) == 1 and f"out: {out / 'bank'} is there already" in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "smollm2"], "model: got 'smollm2' for many adapters, must be minilm"),
        (["--full"], "full: cannot be given with many"),
    ],
)
def test_many_is_refused_for_what_it_is_not(tmp_path, options, message, capsys):
    assert main(["demo", "--many", *options, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_stand_ins_are_a_model_and_questions_of_its_words(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from loraxs_kernels.demo import minilm

    standin.demo_packages(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    job = minilm.job_for(demo.Settings("minilm", tmp_path, "quick", torch.device("cpu"), time.perf_counter()))
    assert 1 not in {token for question in job.test.tokens for token in question}  # the unknown word
    model = job.fresh()
    assert model(**job.train.batch([0, 1])).shape == (2, 6)
    weight = model.encoder.encoder.layer[2].intermediate.dense.weight.detach()
    spectrum = torch.linalg.svdvals(weight.double())
    assert spectrum[15] / spectrum[16] == pytest.approx((17 / 16) ** 0.4, rel=1e-3)  # told apart at rank 16


def test_a_missing_package_is_named_with_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(demo.PACKAGES, "minilm", {"no_such_package": "--no-deps no-such-package==1.0"})
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "loraxs demo: packages are missing" in (printed := capsys.readouterr().err)
    assert "pip install --no-deps no-such-package==1.0" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "report.json", "curves.png"])
def test_only_an_earlier_demo_s_files_are_replaced(tmp_path, monkeypatch, name):
    monkeypatch.setitem(demo.PACKAGES, "minilm", {})
    monkeypatch.setitem(sys.modules, "loraxs_kernels.demo.minilm", SimpleNamespace(run=lambda settings: "runs"))
    (tmp_path / name).write_text("{}")
    with pytest.raises(DemoError, match=f"out: .*{name} is there and is no earlier demo's"):
        demo.run("minilm", tmp_path, quick=True, full=False, device="cpu")
    settings = demo.Settings("minilm", tmp_path, "quick", torch.device("cpu"), time.perf_counter())
    report.write(report.header(settings, "x"), settings)
    assert demo.run("minilm", tmp_path, quick=True, full=False, device="cpu") == "runs"


def test_a_result_that_could_not_be_written_is_refused_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.PACKAGES, "minilm", {})
    settings = demo.Settings("minilm", tmp_path, "quick", torch.device("cpu"), time.perf_counter())
    report.write(report.header(settings, "x"), settings)  # an earlier demo's folder
    (tmp_path / report.PLOT).mkdir()
    with pytest.raises(DemoError, match=r"out: .*curves\.png is a folder, must be the name of a file"):
        demo.run("minilm", tmp_path, quick=True, full=False, device="cpu")


def test_a_demo_that_was_stopped_can_be_run_again(tmp_path, monkeypatch):
    def stopped(settings):
        (settings.out / report.ADAPTER).touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(demo.PACKAGES, "minilm", {})
    monkeypatch.setitem(sys.modules, "loraxs_kernels.demo.minilm", SimpleNamespace(run=stopped))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.run("minilm", tmp_path / "new", quick=True, full=False, device="cpu")


@needs_data
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DemoError, match="device: 'cuda:99' cannot be used here"):
        demo.run("minilm", tmp_path, quick=True, full=False, device="cuda:99")


@pytest.mark.parametrize("content", ["", "WHAT:x Is this it ?\n", "DESC:def What is it ?\n" * 3])
def test_another_questions_file_is_refused(tmp_path, monkeypatch, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "question_labels.txt").write_text(content)
    monkeypatch.setattr(trec, "package_folder", lambda name: tmp_path)
    with pytest.raises(DemoError, match=r"question_labels\.txt"):
        trec.load()
