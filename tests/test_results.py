"""bench/: documents that quote figures, the status of each component, and the suite for a GPU machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraxs_kernels.bench import BenchError, report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_suite  # noqa: E402
import render  # noqa: E402
import status  # noqa: E402

SAMPLE = Path(__file__).parent / "data" / "bench-report.json"


def test_every_document_says_what_the_reports_say(capsys):
    """README.md, bench/results/README.md and STATUS.md; if this fails: make results."""
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_an_edited_figure_is_found_out():
    benches, demos = render.read()
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- figures: ") >= 2
    for block in render.BLOCK.finditer(text):
        figure = re.compile(r"\d\.\d").search(text, text.index("\n|", block.start()))
        edited = text[: figure.start()] + "9.9" + text[figure.end() :]
        assert render.readme(edited, benches, demos) == text


def test_a_block_without_its_report_is_refused():
    text = "<!-- figures: cpu/none.json -->\n<!-- end of figures -->"
    with pytest.raises(BenchError, match=r"there is no report bench/results/cpu/none\.json"):
        render.readme(text, {}, {})
    with pytest.raises(BenchError, match="has nothing on model"):
        data = report.load(SAMPLE) | {"rows": []}
        render.readme("<!-- figures: a.json model -->\n<!-- end of figures -->", {"a.json": data}, {})


def test_a_report_renders_into_a_readme():
    text = "before\n<!-- figures: gpu/a.json layer host -->\nold 1.23\n<!-- end of figures -->\nafter"
    made = render.readme(text, {"gpu/a.json": report.load(SAMPLE)}, {})
    assert "old 1.23" not in made and "Adapter tax" in made and "Host: issuing" in made and "Truncated" not in made
    assert "commit 0000000, `bench/results/gpu/a.json`" in made and made.startswith("before") and made.endswith("after")


def outcome(component: str, passed: int, failed: int, date: str = "2026-01-02", sources: str | None = None) -> dict:
    result = gpu_suite.outcome(component) | {"passed": passed, "failed": failed}
    result |= {"sources": sources} if sources else {}
    return report.load(SAMPLE) | {"date": date, "tests": {component: result}}


def line(reports: dict) -> str:
    return next(line for line in status.render(reports).splitlines() if line.startswith("| truncated_svd"))


def test_newer_results_take_the_place_of_older_ones_only_where_they_have_them():
    def of(*runs: str, date: str, complete: bool = True) -> dict:
        rows = [{"question": "layer", "path": "torch", "status": "ok", "dtype": "bf16", "run": run} for run in runs]
        return {"date": date, "complete": complete, "rows": rows}

    a, b = of("tax", "host", date="1"), of("host", date="2")
    assert set(render._newest({"gpu/a": a, "gpu/b": b})) == {"gpu/a", "gpu/b"}
    assert set(render._newest({"gpu/a": b, "gpu/b": a})) == {"gpu/b"}
    assert set(render._newest({"gpu/a": b, "cpu/b": a})) == {"gpu/a", "cpu/b"}
    assert set(render._newest({"gpu/a": b, "gpu/b": of("host", date="3", complete=False)})) == {"gpu/a", "gpu/b"}


def test_status_is_not_flattering():
    good = outcome("truncated_svd", 5, 0)
    assert "**not yet run on a GPU**" in line({})
    assert "passed all 5, 2026-01-02, commit 0000000, Sample GPU" in line({"a": good}) and "stale" not in line(
        {"a": good}
    )
    assert "**stale: its files have changed since**" in line({"a": outcome("truncated_svd", 5, 0, sources="0")})
    bad = outcome("truncated_svd", 4, 1, "2026-01-03")
    both = line({"b": bad, "a": good})
    assert "**failed** 1 of 5, 2026-01-03" in both and "last passed 2026-01-02" in both
    assert "never passed" in line({"b": bad}) and "**failed**" in line({"a": outcome("truncated_svd", 0, 0)})


def test_a_component_without_files_does_not_exist(monkeypatch):
    assert all(map(status.sources, status.COMPONENTS))
    monkeypatch.setitem(status.COMPONENTS, "demo", (["loraxs_kernels/none"], ""))
    assert "does not exist yet" in status.render({})


def test_every_gpu_test_belongs_to_a_component():
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    script = """
import sys, pytest
class Collect:
    def pytest_collection_modifyitems(self, items):
        print("\\n".join("component " + value for item in items for name, value in item.user_properties))
sys.exit(pytest.main(sys.argv[1:], plugins=[Collect()]))
"""
    run = subprocess.run([sys.executable, "-c", script, *command[3:]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {text.removeprefix("component ") for text in run.stdout.splitlines() if text.startswith("component ")}
    assert found == set(status.COMPONENTS)


def test_results_by_component(tmp_path):
    xml = tmp_path / "tests.xml"
    case = (
        '<testcase name="{}"><properties><property name="component" value="truncated_svd"/></properties>{}</testcase>'
    )
    cases = [case.format("a", ""), case.format("b", "<failure/>"), case.format("c", "<error/>")]
    cases += [case.format("d", "<skipped/>"), '<testcase name="e"/>']
    xml.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    found = gpu_suite.by_component(xml)
    expected = {"sources": status.sources("truncated_svd"), "passed": 1, "failed": 2, "skipped": 1}
    assert found == {"truncated_svd": expected}


@pytest.mark.parametrize("code", [-2, -11, 2, 3])
def test_tests_that_did_not_end_prove_nothing(tmp_path, monkeypatch, code):
    """Interrupted or crashed: a component whose tests had passed until then has not passed."""
    suite = gpu_suite.Suite(tmp_path, 100, "abc1234", "cpu")

    def run(name, command, seconds):
        case = '<testcase name="a"><properties><property name="component" value="demo"/></properties></testcase>'
        (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
        return code

    monkeypatch.setattr(suite, "run", run)
    suite.tests(tmp_path)
    assert suite.data["tests"]["demo"]["passed"] == 1
    assert {each["failed"] for each in suite.data["tests"].values()} == {1}
    text = status.render({"a": report.load(suite.path)})
    assert (
        text.count(f"pytest ended with {code} before its end") == len(suite.data["tests"]) and "passed all" not in text
    )


@pytest.mark.parametrize("code, kept", [(0, False), (0, True), (-2, True)])
def test_the_suite_notes_how_long_the_build_took(tmp_path, monkeypatch, code, kept):
    """Of a build that did not come to its end the record is an earlier one's."""
    suite = gpu_suite.Suite(tmp_path, 100, "abc1234", "cpu")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    (tmp_path / "loraxs_kernels").mkdir()
    if kept:
        (tmp_path / "build" / "core").mkdir(parents=True)
    record = {"built": True, "architectures": ["90a"], "nvcc": "13.0", "cutlass": "4.2.0"}

    def run(name, command, seconds):
        (tmp_path / "loraxs_kernels" / "_build.json").write_text(json.dumps(record))
        return code

    monkeypatch.setattr(suite, "run", run)
    suite.build()
    found = report.load(suite.path)["build"]
    assert found["built"] is (code == 0) and found["whole"] is not kept and found["cores"] >= 1
    assert 0 <= found["seconds"] < 60 and ("architectures" in found) is (code == 0)


def test_a_bench_that_crashes_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "BENCHES", [("crash", 20, ["layer", "--rank", "many"])])
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc1234", "--budget", "60", "--only", "crash"]
    assert gpu_suite.main(arguments) == 1
    assert "invalid int value: 'many'" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert not report.load(path)["complete"]


def test_the_suite_keeps_what_was_measured_when_time_runs_out(tmp_path, monkeypatch, capsys):
    ranks = [str(r) for r in range(1, 64)]
    endless = ["layer", "--shape", "48x64", "--tokens", "5", "--seconds", "0.3", "--rank", *ranks, "--paths", "torch"]
    monkeypatch.setattr(gpu_suite, "BENCHES", [("endless", 10, endless), ("never", 9, [])])
    monkeypatch.setattr(gpu_suite, "LEAST", 20.0)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc1234", "--budget", "40"]
    assert gpu_suite.main([*arguments, "--only", "endless", "never"]) == 1
    (path,) = tmp_path.glob("*.json")
    data = report.load(path)
    assert data["rows"] and all(row["run"] == "endless" and row["status"] == "ok" for row in data["rows"])
    assert not data["complete"] and data["commit"] == "abc1234"
    printed = capsys.readouterr().out
    assert "endless: its time is up" in printed and "never: not started, the budget is spent" in printed
    assert "One layer, forward + backward" in (tmp_path / "suite.log").read_text()  # it saved and told before it went


def test_the_suite_sums_up_in_a_few_lines():
    data = report.load(SAMPLE)
    data["tests"] = {"truncated_svd": {"sources": "0", "passed": 3, "failed": 1, "skipped": 0}}
    text = gpu_suite.summary(data)
    assert "truncated_svd: 3 passed, 1 failed, 0 skipped" in text and len(text.splitlines()) < 40
    assert "tax % T 8192 r 64 bf16 graph: reference 38.2" in text and "svd 224 matrices r 64 loraxs-svd: 1.50 s" in text
    assert "u B^T, % added forward T 8192 r 64 bf16 graph: addmm 10.0, torch 8.0, cuda-128x256 3.3" in text
    assert "failed: layer compile: out of memory" in text


def test_the_suite_needs_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}, cwd="/")
    assert run.returncode == 1 and "gpu_suite: no GPU here" in run.stderr
    assert not (tmp_path / "out").exists()
