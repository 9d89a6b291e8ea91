"""Which backend is chosen where: the rules of the table, and how measurements become its rows."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import loraxs_kernels as lx
from loraxs_kernels import backends
from loraxs_kernels.backends import choice, tuned
from loraxs_kernels.backends import torch as torch_backend
from loraxs_kernels.backends.choice import Row, pick
from loraxs_kernels.backends.cuda import core
from loraxs_kernels.backends.device import Device
from loraxs_kernels.bench import choice as question
from loraxs_kernels.bench import questions, timer
from loraxs_kernels.bench.choice import decide
from loraxs_kernels.bench.shapes import Shape

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import choices

H100 = Device((9, 0), 132)
MEASURED = Row(
    *(H100.capability, H100.multiprocessors, "bfloat16", "forward", True, 16, 512, (1024, 14336), (4096, 14336)),
    *("triton", 1.2, tuned.kernels("triton"), "h100/some.json"),
)
CALL = (512, 4096, 4096, 16, torch.bfloat16, "forward", True, H100)


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Write a table of the user's own."""
    path = tmp_path / "tuned.json"

    def write(*rows: Row) -> None:
        plain = [row._asdict() for row in rows]
        tuned.write({"made_on": tuned.machine(H100), "tiles": [], "choices": plain, "measured": []}, path)
        tuned.forget()

    monkeypatch.setenv("LORAXS_TUNED", str(path))
    tuned.forget()
    yield write
    tuned.forget()


@pytest.fixture
def table(monkeypatch, own):
    """Put rows in the place of the committed ones; every backend can run."""

    def put(*rows: Row) -> None:
        monkeypatch.setattr(choice, "committed", lambda: rows)
        monkeypatch.setattr(backends, "unavailable", lambda name: None)
        tuned.forget()

    return put


def test_a_row_is_for_its_kind_of_call_alone(table):
    table(MEASURED)
    T, N, K, r, dtype, direction, weight, device = CALL
    assert pick(*CALL) == "triton"
    alike = [(T - 255, N, K, r), (T, 1024, 14336, 4), (T, 14336, 4096, 9)]
    assert {pick(*sizes, dtype, direction, weight, device) for sizes in alike} == {"triton"}
    others = [(T + 1, N, K, r), (256, N, K, r), (T, N, K, 17), (T, 1023, K, r), (T, 14337, K, r), (T, N, 4095, r)]
    assert {pick(*sizes, dtype, direction, weight, device) for sizes in others} == {"torch"}
    for changed in ({4: torch.float16}, {4: torch.float32}, {5: "backward"}, {6: False}, {7: Device((9, 0), 114)}):
        assert pick(*(changed.get(i, value) for i, value in enumerate(CALL))) == "torch"


def test_the_same_calls_get_the_same_answers_in_any_order(table):
    table(MEASURED, MEASURED._replace(tokens=1024, backend="cuda", kernels=tuned.kernels("cuda")))
    calls = [(T, *CALL[1:]) for T in (16, 300, 512, 700, 1024, 1025)]
    first = {call: pick(*call) for call in calls}
    tuned.forget()
    assert first == {call: pick(*call) for call in reversed(calls)}
    assert list(first.values()) == ["torch", "triton", "triton", "cuda", "cuda", "torch"]


def test_buckets_are_powers_of_two():
    found = {T: choice.bucket(T) for T in (0, 1, 16, 17, 32, 33, 8191, 8192, 8193, 32769, 10**9)}
    assert found == {
        **{0: 16, 1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 8191: 8192, 8192: 8192, 8193: 16384},
        **{32769: 32768, 10**9: 32768},
    }


def test_kernels_that_changed_or_cannot_run_lose_their_rows(table, monkeypatch):
    table(MEASURED._replace(kernels="of another version"))
    assert pick(*CALL) == "torch"
    table(MEASURED)
    with monkeypatch.context() as patch:
        patch.setattr(backends.triton, "interpreted", lambda: True)  # by which no GPU is used
        assert pick(*CALL) == "torch"
    monkeypatch.setattr(backends, "unavailable", lambda name: "no compiler")
    tuned.forget()
    assert pick(*CALL) == "torch"


def test_kernels_are_known_by_the_content_of_all_their_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "ROOT", tmp_path)
    monkeypatch.setattr(core, "sources", lambda: None)
    (tmp_path / "cuda").mkdir()
    found, names = [], ("kernels.py", "more.py", "configs.json", "aot.py", "notes.txt")
    for changed in (None, *names):
        for name in names:
            (tmp_path / "cuda" / name).write_text("other" if name == changed else "one")
        found.append(tuned.kernels.__wrapped__("cuda"))
    monkeypatch.setattr(core, "sources", lambda: "of csrc/")
    assert tuned.kernels.__wrapped__("cuda") not in found
    assert (
        len(set(found)) == 4
        and found[0] == found[4] == found[5]
        and all(map(re.compile("[0-9a-f]{16}").fullmatch, found))
    )


def test_the_users_own_rows_go_first(table, own):
    table(MEASURED)
    own(MEASURED._replace(backend="torch", gain=1.0))
    assert pick(*CALL) == "torch"
    own(MEASURED._replace(tokens=1024, backend="cuda", kernels=tuned.kernels("cuda")))
    assert pick(*CALL) == "triton"
    assert pick(1024, *CALL[1:]) == "cuda"


def test_amd_gpus_have_no_committed_rows(table, monkeypatch):
    table(MEASURED)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert pick(*CALL) == "torch"


@pytest.fixture
def on_h100(table, monkeypatch):
    """The measured row, a call that it is for, and tensors that all say that they are on an H100."""
    table(MEASURED)
    monkeypatch.setattr(backends, "facts", lambda device: H100)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return torch.empty(512, 4096, dtype=torch.bfloat16), 4096, 16


def test_choose_follows_the_table_on_a_gpu_alone(on_h100, monkeypatch):
    assert backends.choose(*on_h100) == "triton"
    assert backends.choose(torch.nn.Parameter(on_h100[0]), *on_h100[1:]) == "triton"
    assert backends.choose(*on_h100, has_weight=False) == "torch"
    assert backends.choose(*on_h100, direction="backward") == "torch"
    with lx.backend("torch"):
        assert backends.choose(*on_h100) == "torch"
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    assert backends.choose(*on_h100) == "torch"


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_a_trace_and_a_tensor_of_another_class_take_the_torch_backend(on_h100):
    """The sizes of a trace are tensors, and a FakeTensor may say that it is on a GPU where there is none."""
    x, N, r = on_h100
    chosen = []

    def call(x: torch.Tensor) -> torch.Tensor:
        chosen.append(backends.choose(x, N, r))
        return x.detach()

    torch.jit.trace(call, x, check_trace=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(mode.from_tensor(x))
    assert chosen == ["torch", "torch"]


DAMAGES = [
    *({"N": [9, 8]}, {"K": [9, 8]}, {"N": [1.5, 14336]}, {"K": [-1, 9]}, {"capability": [9]}, {"rank": 17}),
    *({"backend": "cublas"}, {"tokens": 500}, {"weight": 1}, {"dtype": "float32"}, {"direction": "both"}),
    *({"gain": 0.0}, {"gain": float("inf")}, {"more": 1}),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damaged_rows_are_ignored_with_one_warning(table, own, damage, tmp_path):
    table()
    own(MEASURED)
    path = tmp_path / "tuned.json"
    data = json.loads(path.read_text())
    data["choices"][0] |= damage
    path.write_text(json.dumps(data))
    tuned.forget()
    with pytest.warns(UserWarning, match=r"tuned.json: choices has a row that cannot be .*`loraxs tune`") as caught:
        assert pick(*CALL) == "torch"
        assert pick(513, *CALL[1:]) == "torch"
    assert len(caught) == 1


def test_the_committed_table_has_no_row_twice_and_gains_that_are_worth_it():
    rows = choice.committed()
    assert len({row[:9] for row in rows}) == len(rows)
    assert all(row.gain >= 1.03 and row.backend != "torch" for row in rows)


SHAPES = [(4096, 4096, 2), (14336, 4096, 2), (4096, 14336, 1)]
GAINS = {"triton": 0.8, "cuda": 0.9}  # time over torch's


def measured(
    overs: dict[str, float] = GAINS, eager: dict[str, float] = GAINS, shapes: list = SHAPES, **more: object
) -> list[dict]:
    """Rows of the question choice, of backends that take so much of torch's time for every layer."""
    rows = []
    for mode, found in (("graph", overs), ("eager", eager)):
        for N, K, count in shapes:
            for path, over in {"torch": 1.0, **found}.items():
                where = {"question": "choice", "status": "ok", "path": path, "mode": mode, "count": count}
                where |= {"N": N, "K": K, "T": 512, "r": 12, "dtype": "bf16", "direction": "forward", "weight": True}
                spread = {"low": over, "median": over, "high": over}
                rows.append(where | {"over": {"torch": spread}, "seconds": {"median": over * N * K}} | more)
    return rows


HASHES = {"triton": "1", "cuda": "2"}


def test_the_fastest_backend_gets_the_row():
    (row,) = decide(measured(), H100, HASHES, "report")
    expected = (
        *H100,
        "bfloat16",
        "forward",
        True,
        16,
        512,
        (4096, 14336),
        (4096, 14336),
        "triton",
        1.25,
        "1",
        "report",
    )
    assert row == expected
    (row,) = decide(measured({"triton": 0.9, "cuda": 0.8}), H100, HASHES, "report")
    assert (row.backend, row.kernels) == ("cuda", "2")


def test_a_backward_is_told_by_its_own_sizes():
    """Whose x is gY: rows of a report have the layer's N and K."""
    shapes = [(14336, 4096, 2), (1024, 4096, 1)]
    (row,) = decide(measured(shapes=shapes, direction="backward"), H100, HASHES, "")
    assert (row.N, row.K) == ((4096, 4096), (1024, 14336))


def test_what_is_not_worth_it_or_loses_somewhere_gets_no_row():
    assert decide(measured({"triton": 0.98, "cuda": 1.2}), H100, HASHES, "") == []
    assert decide(measured(dtype="fp32"), H100, HASHES, "") == []
    assert decide(measured(T=500), H100, HASHES, "") == []
    slow_one_by_one = measured({"triton": 0.8, "cuda": 0.9}, eager={"triton": 1.1, "cuda": 1.0})
    assert [row.backend for row in decide(slow_one_by_one, H100, HASHES, "")] == ["cuda"]
    fails_one_by_one = measured(eager={"cuda": 0.9})
    assert [row.backend for row in decide(fails_one_by_one, H100, HASHES, "")] == ["cuda"]
    one_layer_loses = measured(shapes=SHAPES[:2]) + measured({"triton": 1.05, "cuda": 1.0}, shapes=SHAPES[2:])
    assert decide(one_layer_loses, H100, HASHES, "")[-1].backend == "cuda"
    not_everywhere = measured(shapes=SHAPES[:2]) + measured({"cuda": 0.9}, shapes=SHAPES[2:])
    assert decide(not_everywhere, H100, HASHES, "")[-1].backend == "cuda"
    failed = [row | {"status": "failed"} if row["path"] == "triton" else row for row in measured()]
    assert [row.backend for row in decide(failed, H100, HASHES, "")] == ["cuda"]


def test_a_layer_for_which_another_backend_is_better_has_a_row_of_its_own(table):
    """Before the one for all layers, and for its own size alone."""
    long = SHAPES[2:]
    rows = decide(measured(shapes=SHAPES[:2]) + measured({"triton": 1.0, "cuda": 0.8}, shapes=long), H100, HASHES, "")
    assert [(row.backend, row.N, row.K) for row in rows] == [
        ("cuda", (4096, 4096), (14336, 14336)),
        ("triton", (4096, 14336), (4096, 14336)),
    ]
    table(*(row._replace(kernels=tuned.kernels(row.backend)) for row in rows))
    found = {
        size: pick(512, *size, 16, torch.bfloat16, "forward", True, H100) for size in ((4096, 14336), (4096, 4096))
    }
    assert found == {(4096, 14336): "cuda", (4096, 4096): "triton"}
    alike = measured(shapes=SHAPES[:2]) + measured({"triton": 0.8, "cuda": 0.79}, shapes=long)
    assert [row.backend for row in decide(alike, H100, HASHES, "")] == ["triton"]
    nothing_for_all = measured({"triton": 1.2, "cuda": 1.2}, shapes=SHAPES[:2]) + measured(shapes=long)
    (row,) = decide(nothing_for_all, H100, HASHES, "")
    assert (row.backend, row.N, row.K) == ("triton", (4096, 4096), (14336, 14336))


def test_a_layer_that_was_not_measured_in_graphs_is_not_covered():
    eager = [row for row in measured(shapes=[(64, 64, 1)]) if row["mode"] == "eager"]
    (row,) = decide(measured(shapes=SHAPES[:2]) + eager, H100, HASHES, "")
    assert (row.backend, row.N, row.K) == ("triton", (4096, 14336), (4096, 4096))


@pytest.mark.parametrize("beside", [1.0, 2.9, None])
def test_the_copies_that_follow_a_long_call_are_taken_off(monkeypatch, beside):
    """With them torch's takes 3 s, Triton's 2; where they take most of that, or have no time, nothing is known."""
    calls, rest = [], []
    monkeypatch.setattr(question, "_copies", lambda case, work: [lambda: calls.append("copies")])
    monkeypatch.setattr(backends, "primitive", lambda name: torch_backend.lowrank_linear)

    def prepare(make, *_):
        for call in make():
            call()
        return timer.Pass(lambda: None, 1)

    def interleave(passes, *_):
        rest.extend(passes)
        seconds = {"torch": 3.0, "triton": 2.0} | ({question.BESIDE: beside} if beside else {})
        return {name: torch.full((9,), each, dtype=torch.float64) for name, each in seconds.items()}

    monkeypatch.setattr(timer, "prepare", prepare)
    monkeypatch.setattr(timer, "interleave", interleave)
    asked = questions.check(["choice"], shapes=["8x16"], tokens=[4], ranks=[4], device="cpu", dtype="bf16")
    request = dataclasses.replace(asked, paths=("torch", "triton"), modes=("graph",))
    rows = {row["path"]: row for row in question.measure(request, Shape(8, 16), 4, 4, True, "forward")}
    assert rest == ["torch", "triton", question.BESIDE] and calls == ["copies"] * 3
    if beside == 1.0:
        assert rows["triton"]["over"]["torch"]["median"] == pytest.approx(0.5) and rows["torch"]["status"] == "ok"
    else:
        assert all(row["reason"].startswith(question.LOST) for row in rows.values()) and len(rows) == 2


def report(day: int, rows: list[dict], **more: object) -> dict:
    machine = {"capability": "9.0", "multiprocessors": 132}
    kernels = {name: tuned.kernels(name) for name in ("triton", "cuda")}
    return {"date": f"2026-11-{day}", "machine": machine, "tests": {}, "kernels": kernels, "rows": rows} | more


def test_of_reports_that_disagree_the_newest_counts():
    old, new = report(26, measured()), report(27, measured({"triton": 1.0, "cuda": 0.9}))
    assert [row.backend for row in choices.rows({"old": old})] == ["triton"]
    assert [(row.backend, row.source) for row in choices.rows({"new": new, "old": old})] == [("cuda", "new")]
    assert choices.rows({"old": old, "new": report(27, measured({"triton": 1.0, "cuda": 1.0}))}) == []
    elsewhere = report(28, measured(T=1024))
    assert [(row.tokens, row.source) for row in choices.rows({"a": old, "b": elsewhere})] == [(512, "a"), (1024, "b")]


def test_a_report_of_other_kernels_or_not_of_the_suite_gives_no_rows():
    assert choices.rows({"": report(26, measured(), kernels={"triton": "other", "cuda": "other"})}) == []
    mine = report(26, measured())
    del mine["tests"]
    assert choices.rows({"": mine}) == []


def test_no_home_folder_or_one_that_cannot_be_read_means_no_table(table, monkeypatch, tmp_path):
    table(MEASURED)
    monkeypatch.delenv("LORAXS_TUNED")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(tuned, "machine", lambda device: {"gpu": "a GPU"})

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert pick(*CALL) == "triton"

    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc")
    assert tuned.user_path("NVIDIA H100!") == Path("/etc/loraxs_kernels/nvidia-h100.json")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "read_text", unreadable)
    tuned.forget()
    with pytest.warns(UserWarning, match=r"a-gpu.json: not a table of `loraxs tune` \(PermissionError"):
        assert pick(*CALL) == "triton"


def test_a_warning_raised_as_an_error_does_not_come_again(table, own, tmp_path):
    table(MEASURED)
    own(MEASURED._replace(backend="torch"))
    assert pick(*CALL) == "torch"
    whole = (tmp_path / "tuned.json").read_text()
    damages = {'"version": 1': '"version": 2', '"tiles": []': '"tiles": {}', '"made_on": {': '"made_on": 1, "on": {'}
    for old, new in (damages | {whole: "[]", '"forward"': '"both"'}).items():
        assert old in whole
        (tmp_path / "tuned.json").write_text(whole.replace(old, new))
        tuned.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"not a table of|choices has a row that cannot be"):
                pick(*CALL)
            assert pick(*CALL) == "triton"


def test_a_broken_triton_is_a_reason_and_no_error(table, monkeypatch, tmp_path):
    table(MEASURED)
    monkeypatch.undo()
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert backends.unavailable("triton") == (
        "the package triton is installed and cannot be imported: libtriton.so: undefined symbol"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"built": true}', '{"built": false}'])
def test_a_damaged_record_of_the_core_is_a_reason_and_no_error(monkeypatch, tmp_path, text):
    (tmp_path / "_build.json").write_text(text)
    monkeypatch.setattr(core, "RECORD", tmp_path / "_build.json")
    core.missing.cache_clear()
    assert core.missing() == f"the CUDA core was not built: {tmp_path / '_build.json'} is damaged"
    assert core.compiled() is None
    core.missing.cache_clear()


def test_what_noise_can_explain_chooses_nothing():
    noisy = measured()
    for row in noisy:
        if row["path"] == "triton":
            row["over"]["torch"]["high"] = 1.05
    assert [row.backend for row in decide(noisy, H100, HASHES, "")] == ["cuda"]


def test_layers_that_torch_could_not_compute_choose_nothing():
    failed = [row for row in measured() if row["path"] != "torch" or row["N"] != 14336]
    for row in failed:
        if row["N"] == 14336:
            row["over"] = {}
    assert [row.backend for row in decide(failed, H100, HASHES, "")] == ["triton"]
