"""loraxs bench experiments: predictions as counted, products checked, one failure costs one experiment."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from loraxs_kernels.bench import BenchError, compare, experiments, question, questions, report, timer
from loraxs_kernels.bench.experiments import Cut
from loraxs_kernels.bench.request import Request
from loraxs_kernels.cli import main

SIZES = dict(shapes=["768x64", "64x768"], tokens=[1024, 256], ranks=[8, 16], seconds=1e-4)


def request(**changes) -> Request:
    """A request that is refused by `check`, as there is no GPU."""
    asked = questions.check(**(dict(questions=["gemm"], device="cpu", dtype="bf16", paths=["torch"]) | SIZES | changes))
    return dataclasses.replace(asked, questions=("experiments",))


def gemm_tail(x, W, u, B, bias, tile, overlap, swizzle=1, raster=0, multiprocessors=None, ready=None):
    return (F.linear(x.float(), W.float()) + F.linear(u.float(), B.float())).to(x.dtype)


def shrink(x, A, R, s, other, split, overlap, programs=0, ready=None):
    z = x.float() @ A.float().t()
    return z, (s * z @ R.t()).to(x.dtype), None if other is None else (s * z.t() @ other)[None]


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the core, which are fast: T x N x K is multiplied in fp32 on a CPU."""
    monkeypatch.setattr(experiments.gemm, "missing", lambda dtype, device: None)
    monkeypatch.setattr(experiments.core, "architectures", lambda: ("90a",))
    for kernel in (gemm_tail, shrink):
        real = getattr(experiments.cuda, kernel.__name__)
        assert list(inspect.signature(kernel).parameters) == list(inspect.signature(real).parameters)
        monkeypatch.setattr(experiments.cuda, kernel.__name__, kernel)
    monkeypatch.setattr(timer, "MIN_ROUNDS", 2)
    monkeypatch.setattr(timer, "SAMPLE", 1e-6)
    for module in (compare, question):  # a collection takes longer than all else
        monkeypatch.setattr(module, "release", lambda: None)
    return monkeypatch


def taking(monkeypatch, cost) -> None:
    """Times by `cost(name)` in place of a clock."""

    def interleave(passes, *_):
        return {name: torch.full((4,), cost(name), dtype=torch.float64) for name in passes}

    monkeypatch.setattr(timer, "interleave", interleave)


def only(name: str, asked: Request, **where) -> list[dict]:
    (each,) = (
        each
        for each in experiments.plan(asked)
        if each.where["experiment"] == name and where.items() <= each.where.items()
    )
    return [each.where | row for row in each.rows()]


# --- what is counted


def test_a_wave_reads_what_its_tiles_need():
    """Counted by hand: 132 programs are 66 clusters of 256 rows."""
    T, N, K = 8192, 14336, 4096  # 32 clusters down, 56 tiles across: 1792 in 27.2 waves
    waves, total = Cut(0, 1, 2).reads(T, N, K, 132)
    assert waves == 28
    # Along N at swizzle 1 each wave passes all 56 columns, W whole, but the last one, with 10 clusters; of x two row
    # blocks, in waves that cross two ends of a row three.
    ends = [{c // 56 for c in range(first, min(first + 66, 1792))} for first in range(0, 1792, 66)]
    assert total == 2 * K * (256 * sum(map(len, ends)) + 27 * N + 10 * 256)
    one = Cut(0, 1, 2).reads(256, 256, 64, 132)
    assert one == (1, 2 * 64 * (256 + 256))
    ragged = Cut(1, 1, 1).reads(300, 130, 64, 132)  # only what is there: 300 rows, 130 columns
    assert ragged == (1, 2 * 64 * (300 + 130))


def test_a_swizzle_reads_less_and_every_tile_once():
    T, N, K = 8192, 14336, 4096
    per_wave = [Cut(0, swizzle, 2).reads(T, N, K, 132)[1] / 28 / 1e6 for swizzle in experiments.SWIZZLES]
    assert [round(each) for each in per_wave] == [118, 74, 45, 37]  # the docstring's
    for raster in experiments.RASTERS:
        for swizzle in experiments.SWIZZLES:
            _, total = Cut(1, swizzle, raster).reads(2048, 1024, 64, 2)  # a cluster at a time reads both its operands
            assert total == 2 * 64 * (8 * 8) * (256 + 128)
    assert [Cut(0, 4, 2, few).reads(T, 4096, K, 132)[0] for few in (None, 128)] == [8, 8]
    assert Cut(0, 1, 2).reads(T, 1024, K, 132)[0] == 2 and not Cut(0, 8, 2).distinct(T, 1024)


@pytest.mark.parametrize("bandwidth, slow", [(1e12, (1.0, 1.03)), (1e6, (1.1, 1.2))])
def test_swizzle_1_is_predicted_slow_where_it_asks_too_much_of_the_memory(kernels, bandwidth, slow):
    cost = {"copy": 8 * 65536 / bandwidth, "128x256 swizzle 1 along N": 2e-3, "128x128 swizzle 4 along T": 0.9e-3}
    cost |= {
        "128x128 swizzle 1 along N": 1.2e-3,
        "128x128 swizzle 1 along T": 1.2e-3,
        "on 128": 0.99e-3,
        "r 8": 0.81e-3,
    }
    taking(kernels, lambda name: cost.get(name, 1e-3))
    rows = only("swizzle", request(), N=768, T=1024, direction="forward")
    best, cuts = "128x128 swizzle 4 along T", [row for row in rows if "wave_bytes" in row]
    assert len(cuts) == 2 * 3 + 2 * 4  # three columns of tiles of 256: no swizzle 8
    lines = {row["path"]: row for row in rows if "predicted" in row}
    first, second, third, fourth = lines
    assert first.startswith("128x") and "swizzle 1" in first and first.endswith(f"over {best}")
    assert (lines[first]["predicted"]["low"], lines[first]["predicted"]["high"]) == slow
    assert second == f"{best} over frozen" and lines[second]["measured"]["median"] == pytest.approx(0.9)
    assert lines[second]["predicted"]["low"] == pytest.approx(1.005 + 64 / 64)
    assert third == f"{best}: 128 multiprocessors over 132" and lines[third]["measured"]["median"] == pytest.approx(1.1)
    assert fourth == f"{best}: r 8 over r 16" and lines[fourth]["ratio"]["median"] == pytest.approx(0.9)


def test_ranks_and_multiprocessors_are_compared_in_the_forward_alone(kernels):
    """Of a square layer both directions have the same N and K, but W lies another way."""
    taking(kernels, lambda name: 1e-3)
    kernels.setattr(experiments, "_beside", lambda *_: iter(()))
    rows = list(experiments.QUESTION.rows(request(shapes=["256x256"], tokens=[1024])))
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert {row["direction"] for row in rows if ": r 8 over r 16" in row["path"]} == {"forward"}


@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_the_gemm_beside_a_shrink(kernels, slower):
    """On a clock of its own, by which the GEMM takes 1 ms and a launch of the shrink, 256 rows, 10 us."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Stream(nullcontext):
        def wait_event(self, event):
            assert event.at is not None  # the GEMM is begun first

    def tail(*operands, **more):
        assert more["multiprocessors"] == 128 and more["swizzle"] == 4
        now[0] += 1e-3
        return gemm_tail(*operands, **more)

    def narrow(x, *more):
        assert len(x) == 256  # 64 for each multiprocessor that is free
        now[0] += 1e-5 * slower
        return shrink(x, *more)

    def prepare(make, device, graph):
        assert graph
        calls = make()
        return timer.Pass(lambda: [call() for call in calls], len(calls))

    for name, fake in dict(Event=Event, Stream=lambda device: Stream(), stream=lambda s: s).items():
        kernels.setattr(torch.cuda, name, fake)
    kernels.setattr(torch.cuda, "synchronize", lambda: None)
    kernels.setattr(torch.cuda, "_sleep", lambda cycles: now.__setitem__(0, now[0] + 20e-6), raising=False)
    kernels.setattr(timer, "prepare", prepare)
    kernels.setattr(experiments.cuda, "gemm_tail", tail)
    kernels.setattr(experiments.cuda, "shrink", narrow)
    rows = only("beside", request(), N=768, r=16)
    alone, together, rate = rows
    assert alone["path"].endswith("on 128, alone") and together["measured"]["median"] == pytest.approx(1)
    groups = int(0.9 * 0.98e-3 / (4e-5 * slower))  # of four launches; they are done before the GEMM is
    assert together["groups"] == groups and together["rows"] == groups * 4 * 256
    assert rate["measured"]["median"] == pytest.approx(256 * 64 * 2 / (1e-5 * slower))
    assert (rate["predicted"]["low"], rate["predicted"]["high"]) == (0.7 * 4 * 48e9, 4 * 48e9)
    assert rate["needed"] == pytest.approx(1024 * 64 * 2 / 1e-3) and rate["lasted"] < 1


# --- what is checked


def test_a_wrong_product_is_not_timed(kernels):
    def tail(*operands, swizzle=1, **more):
        return gemm_tail(*operands, **more) * (1.1 if swizzle == 2 else 1)

    kernels.setattr(experiments.cuda, "gemm_tail", tail)
    rows = only("swizzle", request(), N=64, T=1024, direction="backward")
    failed = {row["path"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert len(failed) == 4 and all("swizzle 2" in path for path in failed)
    assert set(failed.values()) == {"not timed, it is wrong: y"}


@pytest.mark.parametrize("wrong", ["z", "u"])
def test_a_wrong_shrink_is_not_timed(kernels, wrong):
    def narrow(*operands):
        z, u, _ = shrink(*operands)
        return (z * 1.1, u, None) if wrong == "z" else (z, u * 1.1, None)

    kernels.setattr(experiments.cuda, "shrink", narrow)
    with pytest.raises(BenchError, match=f"not timed, it is wrong: {wrong}$"):
        only("beside", request(), N=768, r=16)


def test_one_failure_costs_one_experiment(kernels):
    def broken(*_):
        raise RuntimeError("CUDA error: planted\nmore")

    kernels.setattr(experiments, "today", broken)
    kernels.setattr(experiments, "_beside", lambda *_: iter([{"path": "alone", "status": "ok"}]))
    rows = list(experiments.QUESTION.rows(request()))
    bad = {(row["experiment"], row["path"], row["reason"]) for row in rows if row["status"] == "failed"}
    assert bad == {("swizzle", "(the rest)", "RuntimeError: CUDA error: planted")}
    assert all(row["question"] == "experiments" and row["path"] for row in rows)
    order = [(row["experiment"], row["T"], row["direction"]) for row in rows]
    few = [("swizzle", 256, way) for way in ("forward", "backward")]
    wide, back = ("swizzle", 1024, "forward"), ("swizzle", 1024, "backward")
    assert order == [*[wide] * 2, *[("beside", 1024, "forward")] * 2, *[back] * 2, *few * 2]


def test_what_there_is_no_time_for_is_said(kernels):
    kernels.setattr(experiments, "BUDGET", -1.0)
    asked = request()
    rows = list(experiments.QUESTION.rows(asked))
    assert len(rows) == len(experiments.plan(asked))
    assert {(row["status"], row["reason"].split(":")[0]) for row in rows} == {("failed", "not begun")}


def test_a_missing_core_is_said():
    rows = list(experiments.QUESTION.rows(request(tokens=[64], shapes=["64x64"])))
    assert {row.get("reason") for row in rows} == {"the GEMM with a tail runs on a GPU"}


# --- what is shown


def test_the_tables(kernels):
    taking(kernels, lambda name: 1e-3)
    kernels.setattr(experiments, "_beside", lambda *_: iter(()))
    host = experiments.against(torch.full((4,), 1e-3), 4e-6, 8e-6, "s", "guessed")  # as in reports of before
    host |= {"question": "experiments", "experiment": "host", "N": 64, "K": 64, "T": 64, "r": 16}
    rows = [*experiments.QUESTION.rows(request(tokens=[1024])), host | {"path": "F.linear", "status": "ok"}]
    rows[-1:] = [rows[-1], rows[-1] | {"experiment": "counters", "unit": "B"}]
    data = {"rows": rows, "machine": {"device": "cpu"}, "ceilings": None}
    decided, cuts = questions.tables_of(data, ["experiments"])
    assert decided.head == ["", "predicted", "measured", "measured / predicted"]
    assert {row[0].split(":")[0] for row in decided.rows} == {"swizzle", "host", "counters"}
    assert decided.rows[-2] == [
        *("host: 64x64 T 64 r 16 F.linear", "4.000 to 8.000 us", "1000 (1000 to 1000) us", "166.67")
    ]
    assert cuts.head[1:] == [f"swizzle {n} {way}" for way in ("along N", "along T") for n in (1, 2, 4, 8)]
    assert len(cuts.rows) == 8 and cuts.rows[0][1] == "1.000" and "-" in cuts.rows[0]
    assert decided.plain() and cuts.markdown()
    short = dict(each.split(": ", 1) for each in experiments.in_short(rows))
    assert list(short) == ["swizzle", "host", "counters"]
    assert short["host"].endswith("F.linear: 4.000 to 8.000 us / 1000 (1000 to 1000) us / 166.67")
    assert "; all 12: " in short["swizzle"]


def test_a_gpu_is_needed(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "experiments"]) == 1
    assert capsys.readouterr().err == (
        "loraxs bench: question: 'experiments' needs a GPU, and there is none in use here\n"
    )


@pytest.mark.gpu("bench", limit=90)
def test_the_experiments_on_a_gpu(tmp_path):
    """All of them at a small size; those that need a core for this GPU may say so, nothing else may fail."""
    out = tmp_path / "run.json"
    sizes = ["--shape", "1024x512", "512x1024", "--tokens", "300", "2048", "--rank", "12", "64", "--seconds", "0.001"]
    main(["bench", "experiments", *sizes, "--device", "cuda", "--out", str(out)])
    rows = report.load(out)["rows"]
    bad = [(row["experiment"], row["path"], row["reason"]) for row in rows if row["status"] == "failed"]
    missing = experiments.gemm.missing(torch.bfloat16, torch.device("cuda"))
    assert [each for each in bad if each[2] != missing] == []
    assert all(row["measured"]["median"] > 0 for row in rows if "predicted" in row)
    assert missing or {row["experiment"] for row in rows if row["status"] == "ok"} == {"swizzle", "beside"}
