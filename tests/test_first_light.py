"""bench/first_light.py without a GPU: the runner with planted rungs, what wrong results are said to be, every rung.

With LORAXS_EMULATED=1 and TRITON_INTERPRET=1 the rungs run on the kernels themselves, else on plain torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import EMULATED, INTERPRETED

from loraxs_kernels.backends import cuda, triton
from loraxs_kernels.backends import torch as plain

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import first_light  # noqa: E402
import rungs  # noqa: E402

CPU = torch.device("cpu")
SMALL = {
    "alone": [(40, 24, 16, 16)],
    "tail": [(70, 40, 64, 12)],
    "waves": [(140, 264, 72, 16)],
    "ragged": [(69, 40, 72, 1), (70, 24, 40, 12), (67, 8, 8, 25), (66, 16, 136, 64), (65, 24, 40, 130)],
    "overlap": [(130, 24, 304, 25)],
    "graph": [(70, 16, 64, 12)],
    "decode": [(1, 40, 72, 16), (33, 24, 40, 12)],
    "shrink": [(70, 0, 192, 64), (130, 0, 72, 12), (65, 0, 40, 1)],
    "triton": [(20, 40, 72, 12)],
    "svd": [(0, 60, 100, 8)],
}
plain_only = pytest.mark.skipif(EMULATED or INTERPRETED, reason="not of kernels")


# What a wrong result is said to be.


def shrink(x, A, R, s, other, split, overlap, programs=0, ready=None):
    y, z, gram = plain.lowrank_linear(x, None, A, R, torch.eye(len(A), dtype=x.dtype), s, other=other)
    return z, y, gram


def gemm_tail(x, W, u, B, bias, tile, overlap, swizzle=1, raster=0, multiprocessors=None, ready=None):
    y = u.float() @ B.float().T + (0 if W is None else x.float() @ W.float().T)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def decode(plan, x, A, R, B, s, bias, out, index):
    z = x.float() @ A.float().T
    R = R.float() if index is None else torch.where((index < 0)[:, None, None], 0, R[index.clamp(min=0).long()].float())
    u = s * torch.einsum("tij,tj->ti", R.expand(len(x), *R.shape[-2:]), z)
    y = u.to(x.dtype).float() @ B.float().T + sum(t.float() for t in (bias, out) if t is not None)
    return y.to(x.dtype), z


def low_rank(config, x, A, R, B, s, bias, out, other):
    return plain.lowrank_linear(x, None, A, R, B, s, bias, out, other)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(rungs, "SHAPES", SMALL)
    monkeypatch.setattr(rungs, "CLUSTERS", 1)
    made = rungs.Bench(CPU, tmp_path / "out-rung", lambda state: json.dumps(state))
    if not EMULATED:
        made.cuda = SimpleNamespace(shrink=shrink, gemm_tail=gemm_tail, _decode=decode)
    if not INTERPRETED:
        made.triton = SimpleNamespace(low_rank=low_rank)
    return made


def ours(name: str) -> bool:
    """Whether a rung's kernels run in this process."""
    if EMULATED:
        return rungs.RUNGS[name].needs in ("core", "hopper")
    return rungs.RUNGS[name].needs == "triton" or not INTERPRETED


@pytest.mark.parametrize("name", [name for name in rungs.RUNGS if ours(name)])
def test_every_rung_passes_on_kernels_that_are_right(bench, name):
    with rungs.poisoned(CPU):
        rungs.RUNGS[name].run(bench)
    assert bench.state["failed"] == [] and bench.state["saved"] == []
    assert bench.state["checks"] > 0 or name == "ceilings"
    assert 0 <= bench.state["worst"] <= 1


def spoilt(own, change):
    """A kernel with something wrong in its first result."""

    def call(*args):
        made = own(*args)
        return change(made, *args) if isinstance(made, torch.Tensor) else (change(made[0], *args), *made[1:])

    return call


def column_off(y, *_):
    y[:, 3] = y[:, 4]
    return y


def without_tail(y, x, W, u, B, *_):
    return y if W is None else (x.float() @ W.float().T).to(x.dtype)


def tail_twice(y, x, W, u, B, *_):
    return y + u @ B.T


def unwritten(y, *_):
    y[-1, 0] = torch.nan
    return y


FAULTS = {
    "another column's": ("tail-alone-128x128", "gemm_tail", column_off, r"it is B\[4, 0\], must be B\[3, 0\]"),
    "no tail beside W": ("tail-with-W-128x128", "gemm_tail", without_tail, r"it is nothing, must be B\[0, 0\]"),
    "the tail twice": ("tail-with-W-128x128", "gemm_tail", tail_twice, r"it is twice B\[0, 0\]"),
    "not written": ("tail-ragged-128x256", "gemm_tail", unwritten, r"at \[68, 0\].* memory that nobody wrote"),
    "a bias that lies elsewhere": (
        "tail-bias-128x256",
        "gemm_tail",
        lambda y, x, W, u, B, bias, *_: y if bias is None else y.roll(1, 1),
        r"it is bias\[39, 0\], must be bias\[0, 0\]",
    ),
    "R as it lies, not transposed": (
        "decode-1",
        "_decode",
        lambda y, plan, x, A, R, *more: decode(plan, x, A, R.mT, *more)[0],
        r"u?y of R.*it is R\[0, 1\], must be R\[1, 0\]",
    ),
    "another token's R": (
        "decode-8",
        "_decode",
        lambda y, plan, x, A, R, B, s, bias, out, index: (
            y if index is None else decode(plan, x, A, R, B, s, bias, out, index.flip(0))[0]
        ),
        r"it is R\[2, 0, 1\], must be R\[4, 0, 1\]",
    ),
    "z of other columns": (
        "shrink",
        "shrink",
        lambda z, x, A, *_: x.float() @ A.float().roll(1, 1).T,
        r"^z, .* it is A\[0, 191\], must be A\[0, 0\]",
    ),
}


@plain_only
@pytest.mark.parametrize("what", FAULTS)
def test_a_wrong_result_names_what_was_read(bench, what):
    name, kernel, change, message = FAULTS[what]
    setattr(bench.cuda, kernel, spoilt(getattr(bench.cuda, kernel), change))
    with rungs.poisoned(CPU):
        rungs.RUNGS[name].run(bench)
    texts = bench.state["failed"]
    assert any(re.search(message, text) for text in texts), texts


@plain_only
def test_two_elements_added_up():
    coded = rungs.Coded("W", 300, 400, dtype=torch.bfloat16, device=CPU)
    first, second = (coded.passes[:, n, k].tolist() for n, k in ((7, 390), (299, 1)))
    assert coded.element(first) == "W[7, 390]" and coded.element(second) == "W[299, 1]"
    both = [a + b for a, b in zip(first, second, strict=True)]
    assert coded.meaning(both, first) == "W[7, 390] and W[299, 1] added up"
    assert coded.meaning([0.5, 1, 1, 1], first) == "no element of W"
    assert coded.element([251, 251, 1, 1]) is None


@plain_only
def test_what_is_saved_of_a_failure(bench):
    """The first mismatch, the surroundings, and the error of every tile."""
    expected = torch.randn(700, 1500, dtype=torch.float64)
    got = expected.clone()
    got[600, 1300:] += 5
    got[699, 0] = torch.nan
    bench.within("y", got, expected, 1e-3, (128, 256))
    bench.exact("bits", got[None], expected[None], None, (128, 256))
    assert bench.state["saved"] == ["out-rung-0.npz", "out-rung-1.npz"]
    for name in bench.state["saved"]:
        path = bench.stem.with_name(name)
        saved = np.load(path)
        assert path.stat().st_size < rungs.SAVED
        assert saved["first"].tolist() == [600, 1300]
        at = tuple(saved["first"] - saved["corner"])
        assert saved["got"][0][at] == np.float32(got[600, 1300]) and saved["expected"][0][at] != saved["got"][0][at]
        wrong = saved["errors"] > 1e-3
        assert saved["errors"].shape == (6, 6) and np.isinf(saved["errors"][5, 0])
        assert sorted(zip(*np.nonzero(wrong), strict=True)) == [(4, 5), (5, 0)]


@plain_only
def test_no_more_than_so_many_failures_are_saved(bench):
    for _ in range(rungs.KEPT + 2):
        bench.exact("y", torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
    assert len(bench.state["failed"]) == rungs.KEPT + 2 and len(bench.state["saved"]) == rungs.KEPT


@plain_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poison_is_nan_in_every_dtype(dtype):
    own = cuda.empty, triton.empty
    with rungs.poisoned(CPU):
        for shape in ((3, 5), (200_000,), (0, 4)):
            t = cuda.empty(torch.empty(0), shape, dtype)
            assert t.shape == shape and t.dtype == dtype and t.isnan().all()
    assert (cuda.empty, triton.empty) == own


# The runner.

PLANTED = """
import ctypes, os, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.append(PLACE)
import first_light, rungs, torch
from rungs import Rung

def right(bench):
    bench.exact("y", torch.ones(1, 2, 2), torch.ones(1, 2, 2))

def wrong(bench):
    coded = rungs.Coded("W", 8, 8, dtype=torch.bfloat16, device=bench.device)
    bench.exact("y", coded.passes.roll(1, 2), coded.passes, coded)
    bench.doing("what comes after")
    bench.exact("z", torch.ones(1, 2, 2), torch.ones(1, 2, 2))

def raises(bench):
    raise ValueError("planted")

def seen():
    part = Path(os.environ["SEEN"] + ".part")
    part.write_text(str(os.getpid()))
    part.rename(os.environ["SEEN"])

def hangs(bench):
    bench.doing("a long sleep")
    print("before the sleep", flush=True)
    seen()
    time.sleep(3600)

def crashes(bench):
    bench.doing("a fall")
    os.abort()

def alone(bench):
    return "a figure of its own"

class Missing(Rung):
    def missing(self, device):
        return "no such thing here"

class Traced(Rung):
    def missing(self, device):
        return None

def trace(address, count):
    records = (ctypes.c_char * (count * first_light.RECORD.itemsize)).from_address(address)
    first_light.np.frombuffer(records, first_light.RECORD)[0] = (4, 3, 1, 77, 1000, 2000, 0, 0, 2)

core = SimpleNamespace(trace=trace)
first_light.core = SimpleNamespace(missing=lambda: None, load=lambda: core)

first_light.SCRIPT = Path(__file__)
rungs.RUNGS = {
    "alone": Rung(alone, alone=True), "right": Rung(right), "wrong": Rung(wrong), "raises": Rung(raises),
    "hangs": Traced(hangs, "core"), "crashes": Rung(crashes), "missing": Missing(right), "last": Rung(right),
}
if __name__ == "__main__":
    sys.exit(first_light.main())
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.replace("PLACE", repr(str(ROOT / "bench"))))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return [sys.executable, str(script), "--device", "cpu", "--out", str(tmp_path / "out.json")]


@plain_only
def test_each_outcome_is_told_apart_and_costs_only_itself(planted, tmp_path):
    """One process a rung; a hang is killed, a crash ends alone, a wrong result is saved, the rest goes on."""
    run = subprocess.run([*planted, "--limit", "8", "--jobs", "2", "--trace"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == ""
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["format"] == "loraxs-first-light" and data["complete"] and data["machine"]["device"] == "cpu"
    rows = {row["name"]: row for row in data["rows"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        **{"alone": "passed", "right": "passed", "wrong": "failed", "raises": "failed", "hangs": "timed out"},
        **{"crashes": "crashed", "missing": "not run", "last": "passed"},
    }
    assert rows["alone"]["figure"] == "a figure of its own"
    assert rows["wrong"]["why"].endswith("it is W[0, 7], must be W[0, 0] (1 of 2 checks failed)")
    assert rows["raises"]["why"] == "ValueError: planted, in: starting"
    assert rows["hangs"]["why"] == "in: a long sleep" and rows["hangs"]["seconds"] >= 2
    assert "before the sleep" in rows["hangs"]["printed"]
    assert any("in hangs" in line for line in rows["hangs"]["printed"])  # where it hung
    assert rows["hangs"]["trace"] == [  # which outlives the process
        "launch 1, tail GEMM: 1 programs, 1 started, 1 wait, 0 ended, 2 tiles",
        "  program 3 on SM 77: started at 0.0 us, waiting from 1.0 us, 2 tiles",
    ]
    assert rows["crashes"]["trace"] == ["no launch was traced"]
    assert rows["crashes"]["why"] == "SIGABRT in: a fall"
    assert rows["missing"]["why"] == "no such thing here"
    assert [path.name for path in tmp_path.glob("out-*.npz")] == rows["wrong"]["saved"] == ["out-wrong-0.npz"]
    *_, last = run.stdout.split("\n\n")
    assert "3 passed, 2 failed, 1 timed out, 1 crashed, 1 not run" in last
    assert "timed out: hangs" in last and "not run: missing" in last and "passed: " not in last


@plain_only
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_stopped_at_any_moment(planted, tmp_path, how):
    """What is known is on the disk, and no process is left behind."""

    with subprocess.Popen([*planted, "--only", "right", "hangs", "last"], stdout=subprocess.PIPE, text=True) as ladder:
        while not (seen := tmp_path / "seen").exists():
            assert ladder.poll() is None
            time.sleep(0.05)
        hanging = int(seen.read_text())
        ladder.send_signal(how)
        text = ladder.stdout.read()
    for _ in range(600):
        if not Path(f"/proc/{hanging}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {hanging} is still there")
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["outcome"] for row in data["rows"]] == ["passed", "not reached", "not reached"]
    assert not data["complete"]
    if how == signal.SIGTERM:
        assert ladder.returncode == 1 and "not reached: hangs" in text


@plain_only
def test_a_process_that_never_begins_ends_the_climb(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_light, "SCRIPT", tmp_path / "not there.py")
    monkeypatch.setattr(rungs, "RUNGS", {name: rungs.Rung(rungs.svd) for name in ("first", "second")})
    assert first_light.main(["--device", "cpu", "--out", str(tmp_path / "out.json")]) == 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["crashed", "not reached"]
    assert "exit 2 in: importing torch" in rows[0]["why"]
    assert "nothing more is started" in capsys.readouterr().out


@plain_only
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "wing"], "only: got 'wing', must be a rung"),
        (["--limit", "0"], "limit and jobs: got 0 and 1, must be above 0"),
        (["--jobs", "0"], "limit and jobs: got 20 and 0, must be above 0"),
        (["--out", "out.txt"], "out: got out.txt, must be a .json file"),
        (["--out", str(ROOT / "bench" / "here.json")], "is there already and is not overwritten"),
        (["--device", "cuda"], "no GPU here"),
        (["--trace"], "trace: needs a CUDA core built by LORAXS_TRACE=1"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(first_light.core, "missing", lambda: "no core")
    monkeypatch.setattr(first_light, "Running", None)
    monkeypatch.chdir(tmp_path)
    if arguments[-1].endswith("here.json"):
        (tmp_path / "here.json").write_text("mine")
        arguments = ["--out", "here.json"]
    assert first_light.main(["--out", "new.json", "--device", "cpu", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert [path.read_text() for path in tmp_path.iterdir()] in ([], ["mine"])


@plain_only
def test_what_a_trace_tells():
    """A launch that ended, one whose programs wait, one that never started."""
    records = np.zeros(20, first_light.RECORD)
    for i, launch in enumerate([1, 1, 2, 2, 2, 3]):
        records[i]["launch"], records[i]["program"] = launch, i - {1: 0, 2: 2, 3: 5}[launch]
    records["kernel"][:6] = [1, 1, 4, 4, 4, 2]
    records["start"][:5], records["tiles"][:5] = [1000, 1100, 2000, 2100, 0], [8, 8, 1, 2, 0]
    records["end"][:3] = [3000, 3100, 4000]
    records["waiting"][2:4], records["waited"][2:4] = [2500, 3600], [2600, 2700]
    records["multiprocessor"][3] = 77
    assert first_light.story(records) == [
        "launch 1, shrink: 2 programs, 2 started, 0 wait, 2 ended, 16 tiles",
        "launch 2, tail GEMM: 3 programs, 2 started, 1 wait, 1 ended, 3 tiles",
        "  program 1 on SM 77: started at 1.1 us, waiting from 2.6 us, 2 tiles",
        "launch 3, shrink's second launch: 1 programs, 0 started, 0 wait, 0 ended, 0 tiles",
    ]
    assert first_light.story(np.zeros(20, first_light.RECORD)) == ["no launch was traced"]


@plain_only
def test_records_are_read_as_the_core_writes_them():
    source = (ROOT / "csrc" / "trace.h").read_text()
    struct = re.search(r"struct Record \{(.*?)\};", source, re.DOTALL)[1]
    fields = re.findall(r"(uint32_t|uint64_t) ([\w, ]+);", struct)
    declared = [(name, np.dtype(kind[:-2])) for kind, names in fields for name in names.split(", ")]
    assert declared == [(name, first_light.RECORD[name]) for name in first_light.RECORD.names]
    assert re.findall(r"kTrace\w+ = (\d)", source) == [str(n) for n in first_light.KERNELS]


@plain_only
def test_names_and_beginnings_of_names():
    assert first_light.chosen(None) == list(rungs.RUNGS)
    assert first_light.chosen(["svd", "decode"]) == ["decode-1", "decode-8", "svd"]
    assert first_light.chosen(["shrink-gram"]) == ["shrink-gram", "shrink-gram-split"]


@plain_only
def test_it_runs_where_nothing_is_installed(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "first_light.py"), "--device", "cpu", "--out", "out.json"]
    run = subprocess.run(
        [*command, "--only", "ceilings", "triton-forward-1"],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and run.stderr == ""  # of what cannot run here nothing is known
    assert re.search(r"^ceilings +passed .* copy ", run.stdout, re.M)
    assert re.search(r"^triton-forward-1 +not run .*no GPU here", run.stdout, re.M)
