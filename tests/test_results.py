"""bench/: documents that quote figures, the status of each component, and the suite for a GPU machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loraxs_kernels.bench import BenchError, command, gemm, question, questions, report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import costs  # noqa: E402
import gpu_suite  # noqa: E402
import kernel_trace  # noqa: E402
import outcomes  # noqa: E402
import recorder  # noqa: E402
import render  # noqa: E402
import status  # noqa: E402

SAMPLE = Path(__file__).parent / "data" / "bench-report.json"


def test_every_document_says_what_the_reports_say(capsys):
    """docs/, bench/results/README.md and STATUS.md; if this fails: make results."""
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_an_edited_figure_is_found_out():
    reports = render.read()
    texts = [path.read_text() for path in render.quoting()]
    assert texts and ROOT / "docs" / "paper.md" in render.quoting()
    for text in texts:
        assert len(render.BLOCK.findall(text)) == text.count("<!-- figures: ") == text.count("<!-- end of figures -->")
        for block in render.BLOCK.finditer(text):
            figure = re.compile(r"\d\.\d").search(text, text.index("\n|", block.start()))
            edited = text[: figure.start()] + "9.9" + text[figure.end() :]
            assert render.filled(edited, reports) == text


def test_files_that_are_no_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "list.json").write_text("[]")
    assert render.read() == {}
    (tmp_path / "cpu" / "half.json").write_text('{"format": "loraxs-')
    assert render.main(["--check"]) == 1
    assert "render: cpu/half.json: cannot be read as a report: " in capsys.readouterr().err


def test_a_block_without_its_report_is_refused():
    text = "<!-- figures: cpu/none.json -->\n<!-- end of figures -->"
    with pytest.raises(BenchError, match=r"there is no report bench/results/cpu/none\.json"):
        render.filled(text, {})
    with pytest.raises(BenchError, match=r"^a\.json has nothing on model"):
        data = report.load(SAMPLE) | {"rows": []}
        render.filled("<!-- figures: a.json model -->\n<!-- end of figures -->", {"a.json": data})


def test_a_report_renders_into_a_readme():
    text = "before\n<!-- figures: gpu/a.json layer host -->\nold 1.23\n<!-- end of figures -->\nafter"
    made = render.filled(text, {"gpu/a.json": report.load(SAMPLE)})
    assert "old 1.23" not in made and "Adapter tax" in made and "Host: issuing" in made and "Truncated" not in made
    assert "commit 0000000, `bench/results/gpu/a.json`" in made and made.startswith("before") and made.endswith("after")


def outcome(component: str, passed: int, failed: int = 0, date: str = "2026-01-02", **more: object) -> dict:
    """A report with what older ones say of a component's tests, and `more`."""
    result = {"sources": status.sources(component), "passed": passed, "failed": failed, "skipped": 0} | more
    return report.load(SAMPLE) | {"date": date, "tests": {component: result}}


def line(reports: dict, component: str = "truncated_svd") -> str:
    return next(line for line in status.render(reports).splitlines() if line.startswith(f"| {component} "))


def test_newer_results_take_the_place_of_older_ones_only_where_they_have_them():
    def of(*runs: str, date: str, complete: bool = True) -> dict:
        rows = [{"question": "layer", "path": "torch", "status": "ok", "dtype": "bf16", "run": run} for run in runs]
        return {"date": date, "complete": complete, "rows": rows}

    a, b = of("tax", "host", date="1"), of("host", date="2")
    assert set(render.newest({"gpu/a": a, "gpu/b": b})) == {"gpu/a", "gpu/b"}
    assert set(render.newest({"gpu/a": b, "gpu/b": a})) == {"gpu/b"}
    assert set(render.newest({"gpu/a": b, "cpu/b": a})) == {"gpu/a", "cpu/b"}
    assert set(render.newest({"gpu/a": b, "gpu/b": of("host", date="3", complete=False)})) == {"gpu/a", "gpu/b"}


def test_status_is_not_flattering():
    good = outcome("truncated_svd", 5, 0)
    assert "**not yet run on a GPU**" in line({})
    text = line({"a": good})
    assert "passed all 5, 2026-01-02, commit 0000000, Sample GPU" in text and "stale" not in text
    old = outcome("truncated_svd", 5, 0, sources="0")
    assert "**stale: its files have changed since; not run on a GPU so**" in line({"a": old})
    core = outcome("cuda backend", 5, 0)
    for compiled, stale in ((gpu_suite.core.sources(), False), ("0", True)):  # CMakeLists.txt says with which flags
        text = status.render({"a": core | {"build": {"built": True, "sources": compiled}}})
        assert ("stale" in text) == stale
    bad = outcome("truncated_svd", 4, 1, "2026-01-03")
    both = line({"b": bad, "a": good})
    assert "**failed**: 4 passed, 1 failed, 2026-01-03" in both and "last passed 2026-01-02" in both
    assert "never passed" in line({"b": bad})


@pytest.mark.parametrize("word", ["failed", "crashed", "timed out", "not reached"])
def test_a_component_has_passed_only_when_all_its_tests_have(word):
    text = line({"a": outcome("truncated_svd", 4, **{word: 2})})
    assert f"4 passed, 2 {word}, 2026-01-02" in text and "never passed" in text and "passed all" not in text
    assert ("**not finished**" if word == "not reached" else "**failed**") in text


def test_what_did_not_run_leaves_the_run_before_it():
    """A checker that is refused has not failed, and a run that was cut before a component says nothing of it."""
    good = outcome("truncated_svd", 5, 0)
    later = outcome("truncated_svd", 0, 0, "2026-01-03", **{"not reached": 5})
    assert "passed all 5, 2026-01-02" in line({"a": good, "b": later})
    assert "**not yet run on a GPU**: 5 not reached" in line({"b": later})
    refused = outcome("truncated_svd", 0, 0, "2026-01-03", skipped=2, skips={"a driver | says no": 2})
    assert "**not yet run on a GPU**: a driver / says no" in line({"b": refused})


def test_the_files_of_a_component_are_there():
    assert all((ROOT / name).exists() for names, _ in status.COMPONENTS.values() for name in names)


def test_every_gpu_test_belongs_to_a_component():
    """As their files say it, in words: collecting them all would take half a minute."""
    texts = [file.read_text() for file in (ROOT / "tests").glob("test_*.py") if file.name != Path(__file__).name]
    marks = [mark for text in texts for mark in re.findall(r"""mark\.gpu\(\s*(f?["'][^"']+["'])?""", text)]
    assert "" not in marks
    found = [outcomes.named(f"gpu({mark}", status.COMPONENTS) for mark in marks]
    assert all(found) and {name for names in found for name in names} == set(status.COMPONENTS)


# Good tests do nothing, so that no machine is too slow for them; the others never end, or end at once.
PLANTED = """
import ctypes, os, sys
from types import SimpleNamespace
import pytest

@pytest.mark.gpu("demo")
@pytest.mark.parametrize("i", range(6))
def test_good(i): pass

@pytest.mark.gpu("demo", limit=1)
@pytest.mark.parametrize("i", range(4))
def test_hang(i): ctypes.PyDLL(None).sleep(3600)  # and lets no other thread run

@pytest.mark.gpu("bench")
def test_crash(): os.abort()

@pytest.mark.gpu("bench")
def test_killed(): os.kill(os.getpid(), 9)

@pytest.mark.gpu("neighbours")
def test_wrong(): assert not "planted"

@pytest.mark.gpu("neighbours")
def test_skipped(): pytest.skip("planted")

def sticky(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.gpu("neighbours")
def test_sticky():  # passes, but for what comes after it; with this in torch's place processes start soon
    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=sticky))

@pytest.mark.gpu("neighbours")
@pytest.mark.parametrize("i", range(6))
def test_behind(i): assert type(sys.modules.get("torch")) is not SimpleNamespace

@pytest.mark.gpu("compute-sanitizer")
def test_of_another_step(): pass

def test_on_a_cpu(): raise AssertionError
"""


def planted(tmp_path, monkeypatch, text: str, more=(), only=("tests",), workers: int = 1) -> tuple[int, dict]:
    """The suite on planted tests, of the components that `text` names: its exit status, and its report."""
    pytest.importorskip("xdist")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "test_planted.py").write_text(text)
    for name, other in dict(more).items():
        (tmp_path / "planted" / name).write_text(other)
    monkeypatch.setattr(gpu_suite, "TESTS", tmp_path / "planted")
    monkeypatch.setattr(gpu_suite, "WORKERS", workers)
    named = {name: each for name, each in status.COMPONENTS.items() if f'"{name}"' in text}
    monkeypatch.setattr(status, "COMPONENTS", named)
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--out", str(out), "--commit", "abc1234", "--budget", "3000", "--only", *only]
    code = gpu_suite.main(arguments)
    (path,) = out.glob("*.json")
    return code, report.load(path)


def told(data: dict) -> dict[str, str]:
    return {name: outcomes.told(each) for name, each in data["tests"].items()}


def test_a_test_that_hangs_or_crashes_costs_only_itself(tmp_path, monkeypatch, capsys):
    code, data = planted(tmp_path, monkeypatch, PLANTED)
    assert code == 1 and not data["complete"]
    assert told(data) == {
        "demo": "6 passed, 2 timed out, 2 not reached",  # after two that hang the others are
        "bench": "2 crashed",
        "neighbours": "6 passed, 2 failed, 1 skipped",
    }
    names = {name: each["names"] for name, each in data["tests"].items()}
    test = "::test_"
    assert all(f"{test}hang" in name for name in names["demo"]["timed out"])
    assert re.search(r"Timeout \(0:00:01\)! at test_planted\.py:\d+ test_hang", str(names["demo"]))
    assert "Fatal Python error: Aborted at test_planted.py" in str(names["bench"])
    assert "was killed" in str(names["bench"])
    assert "a sticky CUDA error: CUDA error: an illegal memory access" in str(names["neighbours"])
    assert data["tests"]["neighbours"]["skips"] == {"planted": 1}
    last = [name.partition(test)[2].split(":")[0] for name in capsys.readouterr().out.splitlines()[-6:]]
    assert last == ["hang[0]", "hang[1]", "crash", "killed", "wrong", "sticky"]
    text = status.render({"a": data})
    assert "passed all" not in text and text.count("**failed**") == 3


GOOD = """
import pytest
@pytest.mark.gpu("demo")
def test_good(): pass
@pytest.mark.gpu("bench")
def test_too(): pass
"""


def test_a_file_that_cannot_be_imported_has_failed(tmp_path, monkeypatch):
    mark = '\npytestmark = pytest.mark.gpu("demo")'
    more = {"test_broken.py": f"import no_such_module, pytest{mark}"}
    more["test_without.py"] = f"import pytest; pytest.importorskip('no_such_module'){mark}"
    code, data = planted(tmp_path, monkeypatch, GOOD, more, workers=2)
    assert code == 1 and told(data) == {"demo": "1 passed, 1 failed, 1 skipped", "bench": "1 passed"}
    ((file, why),) = data["tests"]["demo"]["names"]["failed"].items()
    assert file.endswith("test_broken.py")
    assert why == "not collected: ModuleNotFoundError: No module named 'no_such_module'"
    assert "passed all" not in line({"a": data}, "demo")


def test_what_has_cost_too_many_processes_is_not_run_again(tmp_path, monkeypatch):
    lines = [{"test": f"test_{i}[{j}]", "component": "demo"} for i in range(4) for j in range(2)]
    lines = [each | {"outcome": "started", "lost": False, "pid": 1} for each in lines]
    monkeypatch.setattr(outcomes, "alive", lambda pid: False)
    path = tmp_path / "tests.jsonl"

    def why(lines: list[dict], test: str, component: str = "demo") -> str:
        path.write_text("".join(f"{json.dumps(each)}\n" for each in lines) + '{"test": "test_5", "com')
        return outcomes.why_not(path, component, test)

    assert why(lines[:2], "test_0[7]") == "2 of this test have cost their processes" and not why(lines[:7], "test_4")
    assert why(lines, "test_4") == "8 of this component have cost their processes" and not why(lines, "test_4", "bench")
    sticky = [lines[0] | {"outcome": "failed", "lost": True}, lines[1] | {"outcome": "failed"}]
    assert not why(sticky, "test_0[7]") and why([lines[1], sticky[0]], "test_0[7]")
    monkeypatch.setattr(outcomes, "alive", lambda pid: True)
    assert not why(lines, "test_0[7]")


def test_a_file_of_tests_names_its_components():
    asked = ["torch backend", "cuda backend", "demo", "bench"]
    assert outcomes.named('marks=pytest.mark.gpu("demo", limit=3)\n@pytest.mark.gpu("neighbours")', asked) == ["demo"]
    assert outcomes.named('pytest.mark.gpu(f"{name} backend")', asked) == asked[:2]
    assert outcomes.named('pytest.mark.gpu("neighbours")', asked) == []
    assert outcomes.named("pytest.mark.gpu(NAME)", asked) == asked


def test_a_component_without_a_record_makes_the_run_cut(tmp_path, monkeypatch):
    code, data = planted(tmp_path, monkeypatch, f'{GOOD}# "neighbours"')
    assert code == 1 and not data["complete"] and set(data["tests"]) == {"demo", "bench"}


def test_processes_that_end_before_their_first_test_do_not_take_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "RESTARTS", 2)
    text = GOOD.replace("import pytest", "import os, pytest\nos.abort()")
    code, data = planted(tmp_path, monkeypatch, text)
    assert code == 1 and not data["complete"] and data["tests"] == {}


LADDER = """
import ctypes, sys, time
from types import SimpleNamespace
import kernel_trace, numpy, pytest

def trace(address, count):
    records = (ctypes.c_char * (count * kernel_trace.RECORD.itemsize)).from_address(address)
    numpy.frombuffer(records, kernel_trace.RECORD)[0] = (4, 3, 1, 77, 1000, 2000, 0, 0, 2)

core = SimpleNamespace(missing=lambda: None, load=lambda: SimpleNamespace(trace=trace))
sys.modules["loraxs_kernels.backends.cuda.core"] = core

@pytest.mark.gpu("first light", limit=1)
def test_hang(): time.sleep(3600)

@pytest.mark.gpu("first light")
def test_right(): pass
"""


def test_first_light_comes_first_and_a_traced_core_tells_what_a_kernel_that_hangs_was_at(tmp_path, monkeypatch):
    text = GOOD.replace('"bench"', '"first light"')
    code, data = planted(tmp_path, monkeypatch, text, {"test_first_light.py": LADDER}, ("ladder", "tests"))
    assert code == 1 and data["complete"]
    assert told(data) == {"first light": "1 passed, 1 timed out", "demo": "1 passed"}  # and not once more by "tests"
    (reason,) = data["tests"]["first light"]["names"]["timed out"].values()
    assert reason.startswith("Timeout (0:00:01)! at test_first_light.py:")
    assert "; launch 1, tail GEMM: 1 programs, 1 started, 1 wait, 0 ended, 2 tiles;   program 3 on SM 77: " in reason
    assert reason.endswith("started at 0.0 us, waiting from 1.0 us, 2 tiles")


def test_a_test_that_ends_while_its_kernels_are_told_of_has_ended(tmp_path, monkeypatch):
    own, begun, ended = object.__new__(recorder.Recorder), threading.Event(), threading.Event()
    own.path, own.trace = tmp_path / "outcomes", None
    own.file = os.open(own.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    own.story = lambda: f"{begun.set()}{ended.wait(0.1)}"
    quiet = SimpleNamespace(dump_traceback_later=lambda *_, **__: None, cancel_dump_traceback_later=lambda: None)
    monkeypatch.setattr(recorder, "faulthandler", quiet)
    monkeypatch.setattr(recorder, "limit", lambda item: 0)  # so that it is late at once
    test = own.pytest_runtest_protocol(SimpleNamespace(nodeid="test_a", get_closest_marker=lambda _: None))
    next(test)
    assert begun.wait(60)
    with pytest.raises(StopIteration):
        test.send(None)
    ended.set()
    for each in threading.enumerate():
        if isinstance(each, threading.Timer):
            each.join()
    os.close(own.file)
    assert [json.loads(line)["outcome"] for line in own.path.read_text().splitlines()] == ["started"] * 2 + ["passed"]


def test_what_a_trace_tells():
    """A launch that ended, one whose programs wait, one that never started."""
    records = np.zeros(20, kernel_trace.RECORD)
    for i, launch in enumerate([1, 1, 2, 2, 2, 3]):
        records[i]["launch"], records[i]["program"] = launch, i - {1: 0, 2: 2, 3: 5}[launch]
    records["kernel"][:6] = [1, 1, 4, 4, 4, 2]
    records["start"][:5], records["tiles"][:5] = [1000, 1100, 2000, 2100, 0], [8, 8, 1, 2, 0]
    records["end"][:3] = [3000, 3100, 4000]
    records["waiting"][2:4], records["waited"][2:4] = [2500, 3600], [2600, 2700]
    records["multiprocessor"][3] = 77
    assert kernel_trace.story(records) == [
        "launch 1, shrink: 2 programs, 2 started, 0 wait, 2 ended, 16 tiles",
        "launch 2, tail GEMM: 3 programs, 2 started, 1 wait, 1 ended, 3 tiles",
        "  program 1 on SM 77: started at 1.1 us, waiting from 2.6 us, 2 tiles",
        "launch 3, shrink's second launch: 1 programs, 0 started, 0 wait, 0 ended, 0 tiles",
    ]
    assert kernel_trace.story(np.zeros(20, kernel_trace.RECORD)) == ["no launch was traced"]


def test_records_are_read_as_the_core_writes_them():
    source = (ROOT / "csrc" / "trace.h").read_text()
    struct = re.search(r"struct Record \{(.*?)\};", source, re.DOTALL)[1]
    fields = re.findall(r"(uint32_t|uint64_t) ([\w, ]+);", struct)
    declared = [(name, np.dtype(kind[:-2])) for kind, names in fields for name in names.split(", ")]
    assert declared == [(name, kernel_trace.RECORD[name]) for name in kernel_trace.RECORD.names]
    assert re.findall(r"kTrace\w+ = (\d)", source) == [str(n) for n in kernel_trace.KERNELS]


@pytest.fixture
def clock(monkeypatch):
    """The suite's clock, which goes on by as many seconds as are added to the list."""
    more = [0.0]
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(more)))
    return more


@pytest.mark.parametrize("end", ["cap", "Ctrl-C", "SIGHUP"])
def test_the_end_of_the_time_costs_only_what_was_running(tmp_path, monkeypatch, clock, end):
    """One process, so that the tests run in the order of the file; the time is up when the one that hangs has begun."""
    monkeypatch.setattr(gpu_suite, "EVERY", 0.1)
    seen = gpu_suite.Suite.take_outcomes

    def look(suite, path):
        seen(suite, path)
        last = outcomes.last(path).values()
        if not sum(clock) and any("hang" in each["test"] and each["outcome"] == "started" for each in last):
            clock.append(9999)
            if end == "Ctrl-C":
                raise KeyboardInterrupt
            if end == "SIGHUP":
                signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(gpu_suite.Suite, "take_outcomes", look)
    text = PLANTED.replace("limit=1)", "limit=3600)").replace("range(6)", "range(3)")
    code, data = planted(tmp_path, monkeypatch, text)
    assert code == 1 and not data["complete"]
    assert told(data) == {"demo": "3 passed, 4 not reached", "bench": "2 not reached", "neighbours": "6 not reached"}
    assert list(data["tests"]["neighbours"]["names"]["not reached"].values()) == [1, 1, 1, 3]
    text = status.render({"a": data})
    assert "**failed**" not in text and "**not finished**: 3 passed, 4 not reached" in text


def test_a_report_knows_its_core(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite.core, "missing", lambda: "it was not built")
    assert report.load(gpu_suite.Suite(tmp_path, 100, "a", "cpu").path)["build"]["why"] == "it was not built"
    record = {"built": True, "architectures": ["90a"], "nvcc": "13.0", "cutlass": "4.2.0"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(gpu_suite.core, "missing", lambda: None)
    monkeypatch.setattr(gpu_suite.core, "RECORD", tmp_path / "_build.json")
    assert report.load(gpu_suite.Suite(tmp_path, 100, "b", "cpu").path)["build"] == record


def test_a_bench_that_crashes_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_suite.BENCHES, "crash", (20, ["layer", "--rank", "many"]))
    monkeypatch.setitem(gpu_suite.STEPS, "crash", 20)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc1234", "--budget", "60", "--only", "crash"]
    assert gpu_suite.main(arguments) == 1
    assert "invalid int value: 'many'" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert not report.load(path)["complete"]


def test_the_suite_keeps_what_was_measured_when_time_runs_out(tmp_path, monkeypatch, clock, capsys):
    """The time is up when the first rows are there, however long that took; GRACE is ample for saving and printing."""
    ranks = [str(r) for r in range(1, 64)]
    endless = ["layer", "--shape", "48x64", "--tokens", "5", "--seconds", "2", "--rank", *ranks, "--paths", "frozen"]
    for name, arguments in (("endless", endless), ("never", [])):
        monkeypatch.setitem(gpu_suite.BENCHES, name, (900, arguments))
        monkeypatch.setitem(gpu_suite.STEPS, name, 900)
    monkeypatch.setattr(gpu_suite, "GRACE", 300)
    monkeypatch.setattr(gpu_suite, "EVERY", 0.2)
    monkeypatch.setattr(gpu_suite, "OURS", ["torch"])
    seen = gpu_suite.Suite.take

    def take(suite, *arguments):
        seen(suite, *arguments)
        if suite.data["rows"] and not sum(clock):
            clock.append(9999)

    monkeypatch.setattr(gpu_suite.Suite, "take", take)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc1234", "--budget", "3000"]
    assert gpu_suite.main([*arguments, "--only", "endless", "never"]) == 1
    (path,) = tmp_path.glob("*.json")
    data = report.load(path)
    assert data["rows"] and all(row["run"] == "endless" and row["status"] == "ok" for row in data["rows"])
    assert len({*map(json.dumps, data["rows"])}) == len(data["rows"])  # each once, however often they were read
    assert not data["complete"] and data["commit"] == "abc1234"
    printed = capsys.readouterr().out
    assert "endless: its time is up" in printed and "never: not started, the budget is spent" in printed
    assert "One layer, forward + backward" in (tmp_path / "suite.log").read_text()  # it saved and told before it went


def test_the_suite_sums_up_in_a_few_lines():
    data = report.load(SAMPLE)
    data["tests"] = {"truncated_svd": {"sources": "0", "passed": 3, "failed": 1, "skipped": 0}}
    text = gpu_suite.summary(data)
    assert "truncated_svd: 3 passed, 1 failed" in text and len(text.splitlines()) < 20
    assert "failed: layer compile: out of memory" in text


def test_a_backend_of_which_a_test_hung_or_crashed_is_left_out_of_the_benches(tmp_path, monkeypatch):
    """Benches would hang and crash as its tests do; a result that is wrong they find out."""
    for name in ("triton", "cuda"):
        monkeypatch.setitem(gpu_suite.PATHS, name, dataclasses.replace(gpu_suite.PATHS[name], missing=lambda: None))
    suite = gpu_suite.Suite(tmp_path, 3000, "abc1234", "cpu")
    suite.after = outcome("triton backend", 4, 0, **{"timed out": 1})["tests"]
    suite.data["tests"] = outcome("cuda backend", 4, 1)["tests"]
    suite.data["tests"] |= outcome("triton backend", 4, 0, **{"not reached": 9})["tests"]  # not a word of good or bad
    seen = {}

    def run(name, command, *_):
        seen[name] = command[command.index("--paths") + 1 : command.index("--out")]
        return 0

    monkeypatch.setattr(suite, "run", run)
    for name in ("tax", "tokens"):
        suite.bench(name, 60)
    assert "reference" in seen["tax"] and seen["tax"][-2:] == ["torch", "cuda"] and "triton" not in seen["tax"]
    assert seen["tokens"] == ["reference", "addmm", "torch", "cuda"]
    suite.save()
    assert report.load(suite.path)["settings"]["left_out"] == {"triton": "its tests: 4 passed, 1 timed out"}
    suite.data["tests"] = outcome("cuda backend", 4, 0, crashed=1)["tests"]
    suite.bench("tax", 60)
    assert "torch" in seen["tax"] and not {"triton", "cuda"} & set(seen["tax"])
    suite.after, suite.data["tests"] = {}, outcome("first light", 4, 0, crashed=1)["tests"]
    suite.data["tests"]["first light"]["names"] = {"crashed": {"test_first_light.py::test_triton[1]": ""}}
    assert suite.left_out() == {"triton": "first light lost test_first_light.py::test_triton[1]"}
    suite.data["tests"]["first light"]["names"] = {"timed out": {"test_first_light.py::test_tail[1]": ""}}
    assert list(suite.left_out()) == ["cuda"]


def test_what_passed_in_an_earlier_report_is_not_tested_again():
    other = {"sources": "0", "passed": 3, "failed": 0}
    good, bad = (outcome("demo", 3, failed)["tests"]["demo"] for failed in (0, 1))
    cut, partly = good | {"not reached": 1}, good | {"skipped": 1}
    everything = [name for name in status.COMPONENTS if name != status.SANITIZER]
    for runs in ([], [other], [bad, cut], [good, partly], [good, bad, cut]):
        assert gpu_suite.untested([{"demo": each} for each in runs]) == everything
    for runs in ([good], [good, cut], [bad, good], [bad, good, other]):
        assert gpu_suite.untested([{"demo": each} for each in runs]) == [name for name in everything if name != "demo"]
    for runs, last in (([good, bad], bad), ([bad, cut], bad), ([bad, good], good), ([good, cut], good)):
        assert outcomes.newest({"demo": each} for each in runs) == {"demo": last}


def test_earlier_reports_are_read_in_the_order_of_their_dates(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, date in zip(paths, ("2026-01-03", "2026-01-02"), strict=True):
        report.save(outcome("demo", int(date[-1]), date=date), path)
    asked = gpu_suite.request(["--device", "cpu", "--out", str(tmp_path), "--after", *map(str, paths)])
    assert [each["demo"]["passed"] for each in asked.earlier] == [2, 3] and asked.known["demo"]["passed"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [3]},
        *({"tests": each} for each in (None, {"demo": 3}, {"demo": {"failed": 3}}, {"demo": {"passed": 3}})),
    ],
)
def test_a_damaged_report_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, change):
    path, out = tmp_path / "a.json", tmp_path / "out"
    path.write_text(json.dumps(report.load(SAMPLE) | change))
    why = (
        f"{path}: rows must be a list of JSON objects" if "rows" in change else f"--after: got {path}, must be reports"
    )
    assert why in refused(capsys, out, "--device", "cpu", "--after", str(path))


def refused(capsys, out: Path, *arguments: str) -> str:
    """What the suite says of arguments that it refuses, before anything is written."""
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(out), *arguments])
    assert not out.exists()
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


def test_what_earlier_runs_have_left_is_not_overwritten(tmp_path):
    taken = [tmp_path / f"{report.head('')['date'][:10]}-abc1234{end}" for end in ("", "-2", ".json")]
    for path in taken[:2]:
        path.mkdir()
    taken[2].write_text("of yesterday")
    suite = gpu_suite.Suite(tmp_path, 100, "abc1234", "cpu")
    assert {suite.folder, suite.path}.isdisjoint(taken) and taken[2].read_text() == "of yesterday"
    assert suite.folder.is_dir() and report.load(suite.path)


# A step that hears no Ctrl-C, and has a process of its own.
DEAF = "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
DEAF += "child = subprocess.Popen(['sleep', '3600']); print('pid', child.pid, flush=True); time.sleep(3600)"


def gone(pid: int) -> bool:
    end = time.monotonic() + 120  # it has been killed: a moment, where it has
    while outcomes.alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not outcomes.alive(pid)


def test_a_second_signal_leaves_nothing_running(tmp_path, monkeypatch):
    """The first comes while the step runs, the second while it may still save something."""
    suite, said = gpu_suite.Suite(tmp_path, 3000, "abc1234", "cpu"), tmp_path / "suite.log"
    monkeypatch.setattr(gpu_suite, "EVERY", 0.05)
    send = subprocess.Popen.send_signal
    found = []

    def look():
        found[:] = re.findall(r"pid (\d+)", said.read_text())
        if found:
            raise KeyboardInterrupt

    def asked(process, number):
        found.append(process.pid)
        send(process, number)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "send_signal", asked)
    with pytest.raises(KeyboardInterrupt):
        suite.run("deaf", ["-c", DEAF], 900, lambda: None if found else look())
    assert len(found) == 2 and all(gone(int(pid)) for pid in found)


SUITE = "import sys; from pathlib import Path; sys.path.insert(0, 'bench'); import gpu_suite; "
SUITE += "suite = gpu_suite.Suite(Path(sys.argv[1]), 3000, 'abc1234', 'cpu'); "


def test_a_step_ends_with_a_suite_that_is_killed(tmp_path):
    script = f"{SUITE}suite.run('step', ['-c', sys.argv[2]], 900, dir)"
    step = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(3600)"
    suite = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), step], cwd=ROOT)
    log = tmp_path / "suite.log"
    while not (log.exists() and (found := re.search(r"pid (\d+)\n", log.read_text()))):
        assert suite.poll() is None
        time.sleep(0.05)
    suite.kill()
    suite.wait()
    assert gone(int(found[1]))


def test_a_closed_pipe_does_not_end_the_suite(tmp_path):
    script = f"{SUITE}suite.say('first'); suite.say('second')"
    command = [sys.executable, "-c", script, str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 0
    assert (tmp_path / "suite.log").read_text() == "first\nsecond\n"


def test_every_bench_of_the_suite_is_a_request_that_is_taken(monkeypatch):
    """As on a GPU, also without a backend."""
    monkeypatch.setattr(question, "_device", lambda name: torch.device("cuda"))
    for name in ("triton", "cuda"):
        monkeypatch.setitem(gpu_suite.PATHS, name, dataclasses.replace(gpu_suite.PATHS[name], missing=lambda: None))
    monkeypatch.setattr(gemm, "missing", lambda dtype, device: None)
    parser = argparse.ArgumentParser()
    command.add_bench(parser)
    for _, arguments in gpu_suite.BENCHES.values():
        for left_out in ({}, {"triton": "its tests hung"}):
            given = vars(parser.parse_args(gpu_suite.with_paths(arguments, left_out)))
            given = {key: value for key, value in given.items() if key not in ("out", "html", "commit")}
            questions.check_read(given["questions"], given)
            request = questions.check(**given)
            assert request.gpu and questions.QUESTIONS[request.questions[0]].plan(request)
            if arguments[0] in gpu_suite.SIDE_BY_SIDE:
                assert "frozen" in request.paths and "cuda" in request.paths
                assert ("triton" in request.paths) == (not left_out)


def test_steps_that_are_named_share_the_budget(tmp_path):
    def steps(*arguments: str) -> dict[str, float]:
        return gpu_suite.request(["--device", "cpu", "--out", str(tmp_path), *arguments]).steps

    assert steps() == gpu_suite.STEPS and [*gpu_suite.STEPS][-1] == "sanitizer"
    assert steps("--only", "step", "tax", "--budget", "900") == {"step": 150, "tax": 140}
    assert steps("--only", "step", "tax", "--budget", "160") == {"step": 75, "tax": 70}


def test_a_step_may_take_what_no_other_waits_for(tmp_path, monkeypatch, clock):
    seen = {}

    def bench(suite, name, seconds):
        seen[name] = round(seconds)
        clock.append(10)

    monkeypatch.setattr(gpu_suite.Suite, "bench", bench)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--only", "tax", "host", "svd", "--budget"]
    assert gpu_suite.main([*arguments, "815"]) == 0
    assert seen == {"tax": 660, "host": 710, "svd": 780}  # 800 seconds, less those of what waits
    assert gpu_suite.main([*arguments, "45"]) == 1
    assert seen == {"tax": 15, "host": 710, "svd": 780}  # 30 seconds, of which the first step took 10


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "tests", "nothing"], "--only: invalid choice: 'nothing' (choose from "),
        (["--budget", "5"], "--budget: got 5, must be at least 35 seconds"),
        (["--budget", "nan"], "--budget: got nan, must be at least 35 seconds"),
        (["--after", "/no/such/file"], "/no/such/file: cannot be read as a report"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, arguments, said):
    assert said in refused(capsys, tmp_path / "out", "--device", "cpu", *arguments)


def test_a_kit_is_used_or_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    def use(folder):
        if folder.name != "kit":
            raise gpu_suite.gpu_kit.KitError("kit: of another Python")
        return {"commit": "1234567"}

    monkeypatch.setattr(gpu_suite.gpu_kit, "use", use)
    monkeypatch.setattr(gpu_suite.core, "missing", lambda: "it was not built")
    monkeypatch.setattr(gpu_suite.Suite, "tests", lambda *_: None)
    arguments = ["--device", "cpu", "--only", "tests", "--out", str(tmp_path / "out"), "--kit"]
    assert gpu_suite.main([*arguments, "other"]) == 1
    assert capsys.readouterr().err == "gpu_suite: kit: of another Python\n" and not (tmp_path / "out").exists()
    assert gpu_suite.main([*arguments, "kit"]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    assert report.load(path)["build"]["kit"] == {"commit": "1234567"}


def test_a_file_in_the_place_of_the_folder_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    arguments = ["--device", "cpu", "--only", "host", "--out"]
    assert gpu_suite.main([*arguments, str(tmp_path / "out" / "deeper")]) == 1
    assert capsys.readouterr().err.startswith("gpu_suite: ")
    with pytest.raises(SystemExit):
        gpu_suite.main([*arguments, str(tmp_path / "out")])
    assert "out is a file, must be a folder, or not there yet" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
    assert gpu_suite.main([*arguments, str(tmp_path / "new"), "--commit", "../x"]) == 1
    assert capsys.readouterr().err.startswith("gpu_suite: commit: got '../x'")


def test_the_suite_needs_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}, cwd="/")
    assert run.returncode == 2 and "gpu_suite: error: no GPU here" in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_reason_names_no_path_of_the_machine():
    assert outcomes.short(f"File {ROOT}/tests/rungs.py,\n  line 3") == "File tests/rungs.py, line 3"


@pytest.mark.parametrize("cost", ["first-use", "bank-store"])
def test_a_cost_has_a_report_of_its_own(tmp_path, monkeypatch, cost):
    pytest.importorskip("lmdb")
    for name, few in {"POINTS": [(1, 64, 64), (3, 96, 80)], "MANY": 3, "TIMES": 2, "MODULES": 2, "RECORDS": 3}.items():
        monkeypatch.setattr(costs, name, few)
    costs.main([cost, "--out", str(tmp_path)])
    (path,) = tmp_path.glob(f"*-{cost}.json")
    data = json.loads(path.read_text())
    assert data["format"] == f"loraxs-{cost}" and data["machine"]["device"] == "cpu"
    if cost == "first-use":
        assert [(row["N"], "later" in row) for row in data["rows"]] == [(64, True), (96, False)]
        assert all(row["first"] > 0 and row["call"] > 0 for row in data["rows"])
    else:
        read = [row for row in data["rows"] if row["what"].startswith("read")]
        assert len(read) == 4 and all(0 < row["microseconds"] <= row["percentile_99"] for row in read)
        assert {row["of_R"] for row in data["rows"] if "of_R" in row} == {3 * 2 * 16 * 16 * 2}


def test_a_cost_that_is_not_what_it_says_is_not_kept(tmp_path, monkeypatch, capsys):
    """Also by `python -O`, which leaves out assertions."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        costs.main(["first-use", "--out", str(tmp_path / "file")])
    assert "is a file, must be a folder or not there" in capsys.readouterr().err
    monkeypatch.setattr(costs, "POINTS", [(1, 64, 64)])
    monkeypatch.setattr(costs.check, "setting", lambda: "0")  # as with LORAXS_CHECK=0
    with pytest.raises(costs.BenchError, match="backend: 'torch' was not checked at T 1, 64 x 64, or is wrong"):
        costs.main(["first-use", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
