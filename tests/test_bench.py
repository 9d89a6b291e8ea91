"""loraxs bench and roofline: every path is right, figures are what was measured, and nothing measured is lost."""

from __future__ import annotations

import ast
import base64
import dataclasses
import errno
import graphlib
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loraxs_kernels import LoraXSLinear, backends, indexed, reference
from loraxs_kernels.bench import (
    BenchError,
    bank,
    chain,
    compare,
    gemm,
    group,
    layer,
    model,
    page,
    paths,
    plots,
    question,
    questions,
    report,
    roofline,
    svd,
    tables,
    tax,
    timer,
)
from loraxs_kernels.bench.questions import QUESTIONS, plots_of, tables_of
from loraxs_kernels.bench.request import Request
from loraxs_kernels.bench.shapes import MODELS, Shape
from loraxs_kernels.cli import main

SAMPLE = Path(__file__).parent / "data" / "bench-report.json"
LOWRANKS = ["svd-lowrank", "svd-lowrank-2", "svd-lowrank-4"]
TINY = ["--shape", "48x64", "--tokens", "1", "33", "--rank", "4", "--seconds", "0.01"]


def tiny(**changes) -> Request:
    return questions.check(**(dict(shapes=["48x64"], tokens=[33], ranks=[4], seconds=0.01, device="cpu") | changes))


def rows_of(request: Request) -> list[dict]:
    (name,) = request.questions
    return [row for point in QUESTIONS[name].plan(request) for row in QUESTIONS[name].at(request, point)]


def planted(make, missing=lambda: None) -> question.Path:
    """A path in the place of addmm."""
    return question.Path("addmm", "", "", missing=missing, make=make)


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """The benches collect garbage, which takes longer than all else where much was imported."""
    with timer.short_collections():
        yield


@pytest.fixture(autouse=True)
def one_call_a_sample(monkeypatch):
    monkeypatch.setattr(timer, "SAMPLE", 1e-6)


@pytest.fixture
def compiled_in_python(monkeypatch):
    """What torch.compile captures, run as it is: a C++ compiler takes longer than all else."""
    real = torch.compile
    quick = lambda call, mode=None, **how: real(call, backend="eager", **how)  # noqa: E731
    monkeypatch.setattr(torch, "compile", quick)


# --- the paths


NOT_ONE_R = ("frozen", "peft-lora", "peft-tinylora", "vera", "two", "two-compile", "two-frozen-compile")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, path in paths.PATHS.items() if path.make])
def test_every_path_agrees_with_the_oracle(name, dtype, compiled_in_python):
    path = paths.PATHS[name]
    if reason := path.missing():
        pytest.skip(f"{name}: {reason}")
    request = tiny(dtype=dtype, paths=[name])
    sets = layer.operands(request, Shape(48, 64), 33, 4)
    candidate = layer.candidate(request, sets, name)
    assert candidate.wrong == []
    assert {"y", "gX"} <= set(candidate.errors) <= {"y", "gX", "gR"}
    assert ("gR" in candidate.errors) == (name not in NOT_ONE_R)


@pytest.mark.parametrize("wrong", ["no scale", "no adapter", "R transposed"])
def test_a_wrong_path_is_found_out_and_not_timed(monkeypatch, wrong):
    def build(o: paths.Operands) -> paths.Layer:
        R = o.R.clone().requires_grad_()
        s, used = (1.0 if wrong == "no scale" else o.s), (R.T if wrong == "R transposed" else R)
        A = o.A * 0 if wrong == "no adapter" else o.A
        return paths.Layer(lambda x: reference.lowrank_linear(x, o.W, A, used, o.B, s)[0], (R,), (o.A, R, o.B), o.s)

    monkeypatch.setitem(paths.PATHS, "addmm", planted(build))
    rows = {row["path"]: row for row in rows_of(tiny(questions=["layer"], paths=["addmm", "reference"]))}
    assert rows["addmm"]["status"] == "failed" and rows["addmm"]["reason"] == "not timed, it is wrong: y, gX, gR"
    assert rows["reference"]["status"] == rows["frozen"]["status"] == "ok"


def test_one_path_out_of_memory_costs_the_others_nothing(monkeypatch):
    def build(o):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setitem(paths.PATHS, "addmm", planted(build))
    rows = {row["path"]: row for row in rows_of(tiny(questions=["layer"], paths=["addmm", "torch"]))}
    assert (rows["addmm"]["status"], rows["addmm"]["reason"]) == ("failed", "out of memory")
    assert rows["torch"]["status"] == "ok" and rows["torch"]["over"]["frozen"]["median"] > 0


def test_a_point_too_large_is_skipped_and_said(monkeypatch):
    def random(T, *rest):
        if T == 33:
            raise torch.OutOfMemoryError("no room")
        return real(T, *rest)

    real = paths.Operands.random
    monkeypatch.setattr(paths.Operands, "random", random)
    rows = rows_of(tiny(questions=["layer"], tokens=[33, 5], paths=["torch"]))
    assert [(row["T"], row["status"]) for row in rows] == [(33, "failed")] * 2 + [(5, "ok")] * 2
    assert "out of memory" in rows[0]["reason"]


@pytest.mark.parametrize("direction", roofline.DIRECTIONS)
def test_directions_do_what_they_say(direction):
    request = tiny(direction=direction)
    sets = layer.operands(request, Shape(48, 64), 33, 4)
    built = paths.PATHS["torch"].make(sets[0])
    (call,) = paths.calls([built], sets, direction)
    got = call()
    if direction == "forward":
        assert got is None  # nothing is kept, and no graph is made
    else:
        assert [g.shape for g in got] == [(33, 64), (4, 4)]
        assert all(torch.equal(a, b) for a, b in zip(got, call(), strict=True))


# --- the clock


def test_interleave_takes_turns_and_divides_by_calls(monkeypatch):
    """With a clock that charges each name a known time, the figures are those times, whatever the repeats and sets."""
    cost, turns = {"a": 1e-3, "b": 4e-3}, []

    def clock(runs):
        turns.append([each.run() for each, _ in runs])
        return [cost[each.run()] * repeats * each.length for each, repeats in runs]

    monkeypatch.setattr(timer, "_host_clock", clock)
    passes = {name: timer.Pass(lambda name=name: name, length) for name, length in (("a", 3), ("b", 1))}
    samples = timer.interleave(passes, torch.device("cpu"), seconds=1.0, min_rounds=4)
    rounds = turns[2:]  # after one look at each
    assert len(samples["a"]) == len(samples["b"]) == len(rounds) >= 4
    assert rounds[:2] == [["a", "b"], ["b", "a"]]
    for name in cost:
        torch.testing.assert_close(samples[name], torch.full_like(samples[name], cost[name]))


def test_noise_is_told():
    steady, wild = torch.tensor([1.0, 1.01, 0.99, 1.0]), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    assert not timer.noisy(timer.spread(steady)) and timer.noisy(timer.spread(wild))
    assert timer.spread(wild) == {"low": 1.0, "median": 1.0, "high": 2.0}


def test_figures_are_ratios_within_rounds_and_noisy_by_time_and_floor():
    steady, wild = torch.ones(4), torch.tensor([1.0, 2.0, 1.0, 3.0])
    samples = {"frozen": 2 * wild, "torch": wild, "addmm": 4 * steady}
    beside = {name: samples[name] for name in ("frozen", "addmm")}
    found = {name: compare.figures(name, own, beside, False) for name, own in samples.items()}
    assert found["torch"]["over"]["frozen"] == {"low": 0.5, "median": 0.5, "high": 0.5}
    assert "seconds" not in found["torch"] and found["torch"]["path"] == "torch" and found["torch"]["rounds"] == 4
    assert {name: row["noisy"] for name, row in found.items()} == {"frozen": False, "torch": False, "addmm": True}
    on_a_gpu = compare.figures("torch", wild, {"addmm": samples["addmm"]}, True)
    assert on_a_gpu["seconds"]["median"] == 1.5 and on_a_gpu["noisy"]
    shown = {q: tables.over({"over": {"x": dict(low=1, median=1.1, high=q)}, "noisy": q == 1.1}, "x") for q in (1.1, 2)}
    assert shown == {1.1: "1.10 (1.00 to 1.10)", 2: "1.10~ (1.00 to 2.00)"}  # by the figure's own quartiles


def test_enough_sets_to_leave_the_cache(monkeypatch):
    fake = type("Properties", (), {"L2_cache_size": 50})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: fake)
    gpu = torch.device("cuda")
    for each in (1, 7, 49, 149):
        assert (timer.sets_needed(gpu, each) - 1) * each >= 3 * 50  # one set may be in use, the others fill it
    assert timer.sets_needed(gpu, 1000) == 1 and timer.sets_needed(torch.device("cpu"), 1) == 1


def test_ceilings_are_of_this_machine():
    found = timer.ceilings(torch.device("cpu"), size=64)
    assert found.bandwidth > 1e8 and found.half > 0 and found.single > 0 and "measured" in found.source


# --- the other questions


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chain_rows_are_checked_and_timed_both_ways(dtype):
    rows = rows_of(tiny(questions=["chain"], dtype=dtype))
    found = [(row["direction"], row["path"], row["status"]) for row in rows]
    assert sorted(found) == [(way, path, "ok") for way in ("backward", "forward") for path in ("reference", "torch")]
    itemsize = {"fp32": 4, "bf16": 2}[dtype]
    assert all(row["bytes"] == itemsize * (33 * (48 + 64) + 4 * (48 + 64)) for row in rows)
    assert all(row["over"]["reference"]["median"] > 0 for row in rows)


@pytest.mark.parametrize("model", ["", "tiny"])
def test_group_rows(model):
    request = questions.check(
        **dict(questions=["group"], tokens=[33], ranks=[4], seconds=0.01, device="cpu"),
        **(dict(model=model) if model else dict(shapes=["48x64"])),
    )
    rows = rows_of(request)
    sizes = [[256, 128, 128], [512, 512]] if model else [[48, 48, 48]]
    assert [(row["N"], row["path"], row["status"]) for row in rows] == [
        (size, path, "ok") for size in sizes for path in group.PATHS
    ]
    assert len(sizes) == len(group.QUESTION.plan(request))
    assert all(row["over"]["separate"]["median"] > 0 for row in rows)


def test_a_wrong_group_is_not_timed(monkeypatch):
    def wrong(x, *layers):
        return tuple(y * (1 + i / 10) for i, y in enumerate(group._separate(x, *layers)))

    monkeypatch.setitem(group.PATHS, "together", wrong)
    why = {row["path"]: row.get("reason") for row in rows_of(tiny(questions=["group"]))}
    wrong = "not timed, it is wrong: y of layer 1, y of layer 2, gX, gR of layer 1, gR of layer 2"
    assert why == {"together": wrong, "frozen": None, "separate": None}


@pytest.mark.parametrize("what", ["y", "z", "gram"])
def test_a_wrong_chain_is_not_timed(monkeypatch, what):
    def wrong(*operands):
        results = dict(zip(("y", "z", "gram"), chain._reference(*operands), strict=True))
        if results[what] is not None:
            results[what] = results[what] * 1.1
        return tuple(results.values())

    monkeypatch.setitem(chain.PATHS, "torch", lambda: wrong)
    rows = rows_of(tiny(questions=["chain"], direction="backward"))
    assert {row["path"]: row.get("reason") for row in rows} == {
        "torch": f"not timed, it is wrong: {what}",
        "reference": None,
    }


@pytest.fixture
def small_bank(monkeypatch):
    """A request of the question bank: 5 rows, and banks of 1 and 200 records."""
    pytest.importorskip("lmdb")
    monkeypatch.setattr(bank, "MODULES", 3)
    monkeypatch.setattr(bank, "ADAPTERS", 5)
    return tiny(questions=["bank"], tokens=[5], records=[200, 1], seconds=0.001)


def test_bank_rows_are_checked_and_timed(small_bank):
    rows = rows_of(small_bank)
    assert {row["status"] for row in rows} == {"ok"}
    mixed = [(row["direction"], row["path"]) for row in rows if "records" not in row]
    ours = [name for name in bank.PATHS if name != "peft"]
    peft = [("forward", "peft")] if bank.importlib.util.find_spec("peft") else []
    assert mixed == [("forward", name) for name in ours] + peft + [("both", name) for name in ours]
    assert all(row["over"]["one"]["median"] > 0 for row in rows if "records" not in row)
    banks = {(row["path"], row["records"]): row for row in rows if "records" in row}
    batches = [(path, n) for n in (128, 200) for path in ("warm", "cold")]  # two batches of different samples
    assert list(banks) == [*batches, ("read", 1), ("read", 200), ("adapter", 5)]
    assert banks["cold", 200]["over"].keys() == {"fewest", "warm"} and banks["read", 200]["over"].keys() == {"fewest"}
    assert banks["warm", 200]["over"]["warm"]["median"] == 1
    assert (banks["read", 1]["bytes"], banks["adapter", 5]["bytes"]) == (4 * 4**2, 3 * 2 * 4**2)
    assert banks["adapter", 5]["seconds"]["median"] > 0
    assert len(bank.QUESTION.plan(small_bank)) == 4


def test_the_rows_of_a_mix(small_bank):
    assert bank.mix("alike", 5) == [0] * 5 and sorted(bank.mix("different", 5)) == [0, 1, 2, 3, 4]
    assert sorted(bank.mix("skewed", 5)) == [0, 0, 0, 1, 2] and bank.mix("skewed", 1) == [0]


def test_wrong_rows_of_a_bank_are_not_timed(small_bank, monkeypatch):
    mix = indexed.mix
    monkeypatch.setattr(indexed, "mix", lambda z, R, blocks, s: mix(z, R.roll(1, 0), blocks, s))
    found = {row["path"]: row.get("reason") for row in rows_of(small_bank) if row["path"] != "peft"}
    wrong = "not timed, it is wrong: y"
    assert found == {
        **{"one": None, "loop": None, "read": None, "adapter": None, "warm": wrong, "cold": wrong},
        **dict.fromkeys(("alike", "different", "skewed"), wrong + ", gX"),
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gemm_rows_are_checked_and_timed_both_ways(dtype):
    rows = rows_of(tiny(questions=["gemm"], dtype=dtype, paths=["addmm", "torch"]))
    found = [(row["direction"], row["path"], row["status"]) for row in rows]
    assert sorted(found) == sorted(
        (way, path, "ok") for way in ("forward", "backward") for path in ("frozen", "addmm", "torch")
    )
    for row in rows:
        N, K = (48, 64) if row["direction"] == "forward" else (64, 48)
        assert row["floor_flops"] == 2 * 33 * N * K and not row["picked"]  # there is no cuda backend here
        assert row["flops"] == 2 * 33 * N * (K + (0 if row["path"] == "frozen" else 4))
        assert row["over"]["frozen"]["median"] > 0


def with_tail(monkeypatch, gemm_tail, **changes) -> list[dict]:
    """Rows as where the core is: on a CPU, by a stand-in for its GEMM."""
    monkeypatch.setattr(gemm.core, "architectures", lambda: ("90a",))
    monkeypatch.setattr(gemm.cuda, "runs_here", lambda x: True)
    monkeypatch.setattr(gemm.cuda, "gemm_tail", gemm_tail)
    request = tiny(**dict(questions=["gemm"], dtype="bf16", paths=["torch"]) | changes)
    assert gemm.missing(request.dtype, request.device) is None
    return rows_of(dataclasses.replace(request, paths=(*request.paths, "cuda")))


@pytest.mark.parametrize("T, picks", [(33, None), (65, "torch"), (2048, "a tile")])
def test_gemm_times_every_tile_and_says_which_is_picked(monkeypatch, T, picks):
    asked, ways = set(), []

    def gemm_tail(x, W, u, B, bias, tile, overlap):
        asked.add(tile)
        assert bias is None and overlap is False
        assert gemm.cuda.lies(x) == gemm.cuda.lies(u) == 0
        ways.append((gemm.cuda.lies(W), gemm.cuda.lies(B)))
        return F.linear(x, W) + F.linear(u, B)

    rows = with_tail(monkeypatch, gemm_tail, shapes=["1024x64"], tokens=[T], direction="forward")
    rows += with_tail(monkeypatch, gemm_tail, shapes=["64x1024"], tokens=[T], direction="backward")
    assert set(ways) == {(0, 0), (1, 1)}  # nothing is laid anew within a call
    assert asked == set(gemm.config.TILES) == set(gemm.TILES.values())
    for way in ("forward", "backward"):
        found = {row["path"]: row for row in rows if row["direction"] == way}
        assert set(found) == {"frozen", "torch", *gemm.TILES} and {row["status"] for row in found.values()} == {"ok"}
        picked = [name for name, row in found.items() if row["picked"]]
        assert (
            len(picked) == 1 and picked[0] in gemm.TILES if picks == "a tile" else picked == ([picks] if picks else [])
        )
        for name in gemm.TILES:
            assert found[name]["flops"] == 2 * T * 1024 * (64 + 64)  # 4 columns of u take a whole step
            assert found[name]["tile"] == gemm.config.TILES[gemm.TILES[name]][:2]


@pytest.mark.parametrize("wrong", ["no tail", "a row", "NaN"])
def test_a_wrong_tail_is_not_timed(monkeypatch, wrong):
    def gemm_tail(x, W, u, B, bias, tile, overlap):
        y = F.linear(x, W) + (0 if wrong == "no tail" else F.linear(u, B))
        if wrong != "no tail" and tile == 0:
            y[-1] = torch.nan if wrong == "NaN" else 0
        return y

    why = {row["path"]: row.get("reason") for row in with_tail(monkeypatch, gemm_tail)}
    assert why["frozen"] is why["torch"] is None and why["cuda-128x256"] == "not timed, it is wrong: y"


def test_a_tail_that_cannot_run_is_said(monkeypatch):
    assert gemm.missing(torch.bfloat16, torch.device("cpu")) == "the GEMM with a tail runs on a GPU"

    def gemm_tail(*operands, **more):
        raise RuntimeError("loraxs gemm_tail: no kernel image")

    failed = [row for row in with_tail(monkeypatch, gemm_tail) if row["status"] == "failed"]
    assert {row["path"] for row in failed} == set(gemm.TILES) and "no kernel image" in failed[0]["reason"]
    odd = [row for row in with_tail(monkeypatch, gemm_tail, shapes=["48x65"]) if row["status"] == "failed"]
    assert {row["reason"] for row in odd} == {"N and K must be multiples of 8"}
    monkeypatch.setitem(paths.PATHS, "cuda", dataclasses.replace(paths.PATHS["cuda"], missing=lambda: None))
    assert "bf16 and fp16" in tiny(questions=["gemm"], dtype="fp32").left_out["cuda, of the question gemm"]
    assert "cuda, of the question gemm" not in tiny(questions=["gemm"], dtype="fp16").left_out
    monkeypatch.setattr(gemm.core, "architectures", lambda: ("80",))
    request = tiny(questions=["gemm"], dtype="bf16", paths=["cuda"])
    assert "built for sm_90a" in request.left_out["cuda, of the question gemm"]
    assert {row["path"] for row in rows_of(request)} == {"frozen"}


def test_host_measures_each_path(compiled_in_python):
    rows = {row["path"]: row for row in rows_of(tiny(questions=["host"], paths=["reference", "torch"]))}
    assert set(rows) == {"frozen", "reference", "torch"}
    assert all(row["status"] == "ok" and "seconds" not in row for row in rows.values())  # ratios alone on a CPU
    assert rows["reference"]["over"]["reference"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    compiled = tiny(questions=["host"], paths=["two", "two-compile", "two-frozen-compile"])
    rows = {row["path"]: row for row in rows_of(compiled)}
    assert {name for name, row in rows.items() if row["over"]["two"]["median"] > 0} == set(rows) >= {"two-compile"}


@pytest.mark.parametrize("shape", [Shape(96, 64), Shape(64, 96)], ids=str)
def test_svd_errors_tell_good_from_bad(shape):
    request = tiny()
    W = svd.weight(shape, request)
    sigma, energy = svd.truth(W)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(W.double()))
    full = svd.accuracy(W, *svd.METHODS["svd-full"].make(W, 8), sigma, energy)
    assert full["sigma_error"] < 1e-5 and abs(full["excess"]) < 1e-5
    U, S, Vh = svd.METHODS["svd-full"].make(W, 9)
    second_best = svd.accuracy(W, U[:, 1:], S[1:], Vh[1:], sigma, energy)
    assert second_best["sigma_error"] > 0.1 and second_best["excess"] > 0.1


def test_svd_rows(monkeypatch):
    rows = rows_of(tiny(questions=["svd"], ranks=[4, 1000]))
    ok = {row["path"]: row for row in rows if row["r"] == 4}
    assert {"loraxs-svd", *LOWRANKS} <= set(ok) and all(row["sigma_error"] < 1e-2 for row in ok.values())
    assert {row["reason"] for row in rows if row["r"] == 1000} == {"rank 1000 is above min(N, K) = 48"}
    request = tiny(questions=["svd"], model="tiny", shapes=[], blocks=1)
    whole = list(svd._whole(request, 4))
    assert [row["path"] for row in whole] == ["loraxs-svd", *LOWRANKS]
    assert all((row["status"], row["matrices"]) == ("ok", 7) and row["sigma_error"] < 1e-2 for row in whole)
    assert whole[0]["over"]["loraxs-svd"]["median"] == pytest.approx(1)
    assert all(row["over"]["loraxs-svd"]["median"] > 0 for row in whole)
    monkeypatch.setitem(svd.WHOLE, "loraxs-svd", lambda linears, r: 1 / 0)  # the others are measured all the same
    whole = {row["path"]: row for row in svd._whole(request, 4)}
    assert whole.pop("loraxs-svd")["reason"] == "ZeroDivisionError: division by zero"
    assert [(name, row["over"]) for name, row in whole.items()] == [(name, {}) for name in LOWRANKS]


def test_svd_table_and_plot_have_every_path_and_those_of_earlier_versions():
    data = report.load(SAMPLE)
    row = next(row for row in data["rows"] if row["path"] == "svd-lowrank")
    more = ["svd-lowrank-2", "svd-lowrank-4", "loraxs-eigh-gpu"]
    found = [row, *(row | {"path": name} for name in more)]
    found += [each for each in data["rows"] if each["path"] in ("sklearn", "loraxs-svd")]
    table = next(svd.show(data, found))
    assert {f"{name}: excess" for name in ("sklearn", "svd-lowrank", *more)} <= set(table.head)
    assert "svd-lowrank-2: torch.svd_lowrank, niter = 2 (its default), q = r + 10." in table.notes
    assert "loraxs-eigh-gpu: truncated_svd, its eigenproblem on the GPU." in table.notes
    axes = next(svd.draw(data, found)).figure.axes[0]
    assert set(more) <= set(axes.get_legend_handles_labels()[1])


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_models(name):
    """Against the architectures themselves, as transformers builds them."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModel

    known = MODELS[name]
    config = AutoConfig.for_model(known.model_type, **known.config)
    with torch.device("meta"):
        built = AutoModel.from_config(config)
    blocks = next(m for m in built.modules() if isinstance(m, nn.ModuleList) and len(m) == known.blocks)
    found = Counter(tuple(m.weight.shape) for m in blocks.modules() if isinstance(m, nn.Linear))
    expected: Counter = Counter()
    for shape in known.shapes:
        expected[shape.N, shape.K] += shape.count * known.blocks
    assert found == expected


def test_a_model_from_a_folder(tmp_path, monkeypatch):
    """A real one's configuration and weights, in the dtype asked for, as many blocks as asked for."""
    transformers = pytest.importorskip("transformers")
    sizes = MODELS["tiny"].config | {"num_hidden_layers": 3, "max_position_embeddings": 32}
    saved = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    saved.save_pretrained(tmp_path)
    asked = dict(questions=["model"], model=str(tmp_path), shapes=[], dtype="bf16", sequence=8, batch=1, blocks=2)
    request = tiny(**asked)
    built = model.build(request)
    weight = built.model.layers[1].mlp.up_proj.weight
    assert len(built.model.layers) == 2 and not weight.requires_grad
    assert torch.equal(weight, saved.model.layers[1].mlp.up_proj.weight.bfloat16())
    monkeypatch.setattr(model, "STEPS", 2)
    rows = rows_of(dataclasses.replace(request, paths=("frozen", "torch"), dtype=torch.float32))  # bf16 is slow here
    assert {(row["path"], row["status"]) for row in rows} == {("frozen", "ok"), ("torch", "ok")}
    with pytest.raises(BenchError, match="sequence: got 33, must be at most 32"):
        tiny(**asked | {"sequence": 33})
    transformers.GPT2Config(n_positions=32).save_pretrained(tmp_path)  # by another name
    with pytest.raises(BenchError, match="sequence: got 33, must be at most 32"):
        tiny(**asked | {"sequence": 33})


@pytest.fixture(scope="module")
def tiny_model():
    pytest.importorskip("transformers")
    return model.build(tiny(questions=["model"], model="tiny", shapes=[]))


@pytest.mark.parametrize("name", ["frozen", "reference-fp32", "reference", "peft-lora", "torch"])
def test_a_model_is_as_it_was_after_each_way(tiny_model, name):
    if name == "peft-lora":
        pytest.importorskip("peft")

    def state() -> dict:
        each = tiny_model.named_modules()
        return {key: (type(m), id(getattr(m, "weight", None)), len(m._forward_hooks)) for key, m in each}

    before = state()
    with model.adapted(tiny_model, name, 4, checkpointing=True) as changed:
        trained = sum(p.numel() for p in changed.parameters() if p.requires_grad)
        linears = 2 * 7
        expected = {"frozen": 0, "peft-lora": None}.get(name, linears * 4 * 4)
        assert trained == expected if expected is not None else trained > linears * 4 * 4
        assert set(tiny_model.parameters()) <= set(changed.parameters())  # none is copied
        with model.adapted(tiny_model, "frozen", 0, checkpointing=False):
            assert backends.forced() == ("torch" if name == "torch" else None)
    assert state() == before
    assert not any(p.requires_grad for p in tiny_model.parameters())


def test_a_step_of_another_function_is_found_out(tiny_model, monkeypatch):
    request = dataclasses.replace(tiny(questions=["model"], model="tiny", shapes=[]), sequence=8, paths=())
    monkeypatch.setattr(model, "build", lambda request: tiny_model)
    steps = model.Steps(request)
    *_, first = steps.steps("reference", 4, False)
    *_, second = steps.steps("torch", 4, False)
    assert first["gR_difference"] < 1e-4 and 0 < second["gR_difference"] < 1e-4
    forward = LoraXSLinear.forward
    monkeypatch.setattr(LoraXSLinear, "forward", lambda self, x: forward(self, x) * 0.5)
    with pytest.raises(BenchError, match="it is wrong: gR differs"):
        steps.steps("torch", 4, False)


def test_on_a_gpu_a_step_is_over_the_first_of_the_frozen_model(monkeypatch):
    times = {"frozen": [1.0, 1.1], "torch": [2.0], "frozen+compile": [0.5, 0.6], "torch+compile": [1.0]}

    def steps(self, name, *_):
        samples = torch.full((7,), times[name].pop(0), dtype=torch.float64)
        return samples, samples, {"loss": 1.0}

    built = type("Model", (), {"config": type("Config", (), {"num_hidden_layers": 3})})
    monkeypatch.setattr(model, "build", lambda request: built)
    monkeypatch.setattr(model.Steps, "steps", steps)
    request = tiny(questions=["model"], model="tiny", shapes=[], paths=["torch", "compile"])
    on_a_gpu = dataclasses.replace(request, device=torch.device("cuda"))
    points = [point for point in model.plan(on_a_gpu) if not point.where["checkpointing"]]
    rows = [row for point in points for row in point.rows()]
    assert [(row["path"], row["again"]) for row in rows] == [
        *(("frozen", False), ("torch", False), ("frozen", True)),
        *(("frozen+compile", False), ("torch+compile", False), ("frozen+compile", True)),
    ]
    assert [row["over"]["frozen"]["median"] for row in rows] == pytest.approx([1.0, 2.0, 1.1, 0.5, 1.0, 0.6])
    assert [row["over"]["frozen+compile"]["median"] for row in rows[3:]] == pytest.approx([1.0, 2.0, 1.2])
    assert [row["seconds"]["median"] for row in rows[:3]] == [1.0, 2.0, 1.1] and rows[0]["blocks"] == 3

    def no_room(request):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "build", no_room)
    rows = [row for point in model.plan(on_a_gpu) for row in point.rows()]
    assert {row["reason"] for row in rows} == {"out of memory"} and len(rows) == len(model.plan(on_a_gpu))


# --- how they lie together


def imports(path: Path) -> set[str]:
    """The files of its own folder that a file names in its imports."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {name for node in nodes if node.level == 1 for name in (node.module, *(each.name for each in node.names))}
    return {name for name in names if name and path.with_name(f"{name}.py").exists()}


def test_no_file_needs_one_that_needs_it():
    """And none that knows no question by name needs one, nor one question a question that is not a part of it."""
    folder = Path(questions.__file__).parent
    found = {path.stem: imports(path) for path in folder.glob("*.py") if path.stem != "__init__"}
    order = tuple(graphlib.TopologicalSorter(found).static_order())  # raises where there is a circle
    assert {"compare", "request"} <= found["layer"] and order.index("request") < order.index("compare")
    assert not any(set(QUESTIONS) & found[name] for name in ("request", "compare", "question", "tables", "plots"))


def test_every_question_and_script_is_listed():
    root = Path(__file__).parents[1]
    text = (root / "bench" / "README.md").read_text()
    assert set(re.findall(r"\| `loraxs_kernels/bench/(\w+)\.py` \|", text)) == set(questions.ASKED)
    scripts = {path.name for path in (root / "bench").glob("*.py")} - {"bench_questions.py"}
    assert scripts == {name for name in re.findall(r"`(?:python bench/)?(\w+\.py)", text)}


def test_an_option_that_no_question_reads_is_refused():
    for name, value in (("records", [3]), ("blocks", 1), ("sequence", 8), ("batch", 2)):
        with pytest.raises(BenchError, match=f"{name}: got .*, and none of layer, host takes it"):
            tiny(**{name: value})
    assert tiny(questions=["layer", "bank"], records=[3, 1, 3]).records == (1, 3)


# --- a run


def test_a_run_from_the_command_line(tmp_path, capsys):
    out, html = tmp_path / "run.json", tmp_path / "run.html"
    assert main(["bench", "layer", "host", "svd", *TINY, "--out", str(out), "--html", str(html)]) == 0
    printed = capsys.readouterr().out
    data = report.load(out)
    assert data["complete"] and data["ceilings"] is None
    assert {row["question"] for row in data["rows"]} == {"layer", "host", "svd"}
    assert {row["T"] for row in data["rows"] if row["question"] == "layer"} == {1, 33}
    for text in ("One layer, forward + backward", "Host: issuing", "Truncated SVD", "ratios alone", str(out)):
        assert text in printed
    ratio = next(row for row in data["rows"] if row["path"] == "torch")["over"]["reference"]["median"]
    assert f"{ratio:.2f}" in printed
    assert "<img" in html.read_text()
    page.check(html)  # it may be replaced by another page
    before = out.read_bytes()
    assert main(["bench", "layer", *TINY, "--out", str(out)]) == 1  # measurements are never overwritten
    assert "is there already" in capsys.readouterr().err and out.read_bytes() == before


def test_results_get_a_name_of_their_own(tmp_path):
    first, second = (report.Report(tiny(), tmp_path, "abc1234").path for _ in range(2))
    date = json.loads(first.read_text())["date"][:10]
    assert first == tmp_path / "cpu" / f"{date}-abc1234.json"
    assert second == tmp_path / "cpu" / f"{date}-abc1234-2.json"


def test_two_runs_at_once_get_two_names(tmp_path, monkeypatch):
    """Also if both have looked for a name before either has written."""
    looked = iter(["a.json", "a.json", "a-2.json"])
    monkeypatch.setattr(report, "free", lambda path: tmp_path / next(looked))
    assert [report.taken(tmp_path / "a.json").name for _ in range(2)] == ["a.json", "a-2.json"]


def test_what_is_asked_twice_is_measured_once_and_what_is_asked_apart_together(tmp_path):
    out = tmp_path / "run.json"
    twice = ["--tokens", "1", "1", "--rank", "2", "--rank", "3", "2", "--shape", "8x8", "--paths", "torch"]
    assert main(["bench", "layer", "layer", *twice, "--seconds", "0.001", "--device", "cpu", "--out", str(out)]) == 0
    rows = report.load(out)["rows"]
    assert [(row["r"], row["path"]) for row in rows] == [(r, path) for r in (2, 3) for path in ("frozen", "torch")]


def break_off(monkeypatch, error) -> None:
    """The question layer has an end after its second row."""

    def compared(*given):
        yield from list(real(*given))[:2]
        raise error

    real = layer.compare
    monkeypatch.setattr(layer, "compare", compared)


def test_a_stopped_run_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    break_off(monkeypatch, KeyboardInterrupt)
    out = tmp_path / "run.json"
    assert main(["bench", "layer", *TINY, "--out", str(out)]) == 130
    data = report.load(out)
    assert len(data["rows"]) == 2 and not data["complete"]
    assert "stopped" in capsys.readouterr().err
    assert "stopped before its end" in page.page(data)


def test_a_disk_that_is_full_leaves_what_was_measured_on_the_screen(tmp_path, monkeypatch, capsys):
    def full(self):
        if len(self.data["rows"]) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(report.Report, "save", full)
    assert main(["bench", "layer", *TINY, "--out", str(tmp_path / "run.json")]) == 1
    captured = capsys.readouterr()
    assert "3 rows" not in captured.out and "One layer, forward + backward" in captured.out
    assert captured.err == f"loraxs bench: {tmp_path / 'run.json'}: No space left on device\n"


def test_what_breaks_a_question_leaves_the_others(tmp_path, monkeypatch, capsys):
    break_off(monkeypatch, RuntimeError("a device-side assert"))
    out = tmp_path / "run.json"
    assert main(["bench", "layer", "host", *TINY, "--out", str(out)]) == 1
    data = report.load(out)
    assert [row["status"] for row in data["rows"] if row["question"] == "layer"] == ["ok", "ok", "failed"] * 2
    assert {row["status"] for row in data["rows"] if row["question"] == "host"} == {"ok"}
    assert "RuntimeError: a device-side assert" in capsys.readouterr().out


def test_paths_of_one_question_leave_another_its_own(tmp_path):
    request = questions.check(["layer", "svd"], shapes=["48x64"], paths=["torch"], device="cpu")
    assert request.paths[:2] == ("frozen", "torch") and "loraxs-svd" in request.paths
    assert timer.interleave({}, torch.device("cpu"), 1.0) == {}


def test_a_failed_path_shows_in_the_exit_status_and_the_table(tmp_path, monkeypatch, capsys):
    def build(o):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(paths.PATHS, "addmm", planted(build))
    out = tmp_path / "run.json"
    assert main(["bench", "layer", *TINY, "--paths", "addmm", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in printed and "and more" not in printed
    assert [row["status"] for row in report.load(out)["rows"]].count("ok") == 2  # the floor at both points


BAD = {
    "an unknown question": (
        ["quality"],
        "question: got 'quality', must be one of layer, chain, gemm, group, host, choice, svd, model, bank\n",
    ),
    "a question that is answered": (
        ["layer", "experiments"],
        "question: 'experiments' is asked no more, the predictions and what was measured of them are in the "
        "repository, in bench/results/NOTES.md\n",
    ),
    "an unknown model": (["--model", "gpt-9"], "model: got 'gpt-9', must be one of mistral-7b"),
    "a folder, for shapes": (["layer", "--model", "{tmp}"], "model: got "),
    "an unknown path": (["--paths", "magic"], "path: got 'magic', must be one of frozen"),
    "a path that cannot run": (["--paths", "triton"], "path: 'triton' cannot run here: "),
    "an unknown dtype": (["--dtype", "fp8"], "dtype: got 'fp8', must be one of bf16, fp16, fp32"),
    "an unknown direction": (["--direction", "up"], "direction: got 'up', must be one of both, forward, backward"),
    "an unknown mode": (["--mode", "warp"], "mode: got 'warp', must be one of eager, graph"),
    "graphs on a CPU": (["--mode", "graph", "--device", "cpu"], "mode: got 'graph' on a CPU, CUDA graphs need a GPU"),
    "a shape of one number": (["--shape", "4096"], "shape: got '4096', must be NxK"),
    "an empty shape": (["--shape", "0x64"], "shape: got '0x64', must be NxK"),
    "two sources of shapes": (["--shape", "4x4", "--model", "tiny"], "model and shape: got tiny and ['4x4']"),
    "no tokens": (["--tokens", "0"], "tokens: got 0, must be at least 1"),
    "a negative rank": (["--rank", "4", "-1"], "rank: got -1, must be at least 1"),
    "a bank of nothing": (["bank", "--records", "0"], "records: got 0, must be at least 1"),
    "a bank without lmdb": (["bank"], "question: 'bank' needs the package lmdb: pip install lmdb"),
    "no time": (["--seconds", "0"], "seconds: got 0, must be above 0"),
    "a device that is not there": (["--device", "cuda:99"], "device: 'cuda:99' cannot be used here"),
    "too long a sequence": (
        ["model", "--model", "roberta-large", "--sequence", "513"],
        "sequence: got 513, must be at",
    ),
    "more blocks than there are": (["model", "--blocks", "3", "--model", "tiny"], "blocks: got 3, must be at most 2"),
    "a model of shapes": (["model", "--shape", "4x4"], "question: 'model' needs a model"),
    "a name in another folder": (["host", "--commit", "../../x"], "commit: got '../../x', must be letters, digits"),
    "no name": (["host", "--commit", ""], "commit: got '', must be letters, digits"),
    "a call of one token": (["host", "--tokens", "512"], "tokens: none of host reads it, leave it out"),
    "one direction": (["group", "svd", "--direction", "forward"], "direction: none of group, svd reads it, leave it"),
    "a page in no folder": (["--html", "{tmp}/no/page.html"], "html: got "),
    "a page in another file's place": (["--html", "{tmp}/notes"], "html: {tmp}/notes is there and is no page of"),
    "a file for a folder": (["--out", "{tmp}/file/sub"], "out: the folder "),
    "a place no one writes to": (["--out", "/proc/run.json"], "out: /proc/run.json cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_anything_runs(case, tmp_path, capsys, monkeypatch):
    arguments, message = BAD[case]
    if case == "a path that cannot run":
        monkeypatch.setitem(
            paths.PATHS, "triton", dataclasses.replace(paths.PATHS["triton"], missing=lambda: "made up")
        )
    if case == "a bank without lmdb":
        monkeypatch.setattr(bank.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").write_text("mine")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"loraxs bench: {message.format(tmp=tmp_path)}") and captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes"]
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_page_without_matplotlib_is_refused_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--html", str(tmp_path / "page.html")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- reports


def test_a_stored_report_reads_and_writes_the_same():
    data = report.load(SAMPLE)
    assert report.dumps(data) == SAMPLE.read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(version=1), "must be a report of `loraxs bench`, version 2"),
        (dict(format="other"), "must be a report of `loraxs bench`"),
        (dict(rows=[{"question": "layer", "path": "torch", "status": "failed"}]), "row 0 must have"),
        (dict(rows=[{"question": "fun", "path": "torch", "status": "ok"}]), "row 0 must have"),
        (dict(ceilings=...), "has no ceilings"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, change, message):
    data = {key: value for key, value in (report.load(SAMPLE) | change).items() if value is not ...}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BenchError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        report.load(path)
    path.write_text("{")
    with pytest.raises(BenchError, match="cannot be read as a report"):
        report.load(path)


def _layers(data: dict) -> list[dict]:
    return [row for row in data["rows"] if row["question"] == "layer"]


def test_the_tax_is_weighted_by_how_often_a_shape_occurs():
    """By hand, from the stored rows."""
    data = report.load(SAMPLE)
    rows = [row for row in data["rows"] if row["question"] == "layer" and row.get("T") == 8192 and row["r"] == 64]
    total = {
        path: sum(row["count"] * row["seconds"]["median"] for row in rows if row["path"] == path and "seconds" in row)
        for path in ("frozen", "torch")
    }
    expected = 100 * (total["torch"] / total["frozen"] - 1)
    table = next(iter(tables_of(data)))
    line = next(cells for cells in table.rows if cells[0].startswith("torch"))
    assert line[table.head.index("T 8192 r 64")].split()[0] == f"{expected:.1f}"
    at, paths_at = next((at, each) for at, each in tax.points(_layers(data)).items() if (at.T, at.r) == (8192, 64))
    found = tax.measured(paths_at, "torch")
    assert found["low"] < found["median"] == pytest.approx(expected, rel=1e-3) and found["median"] < found["high"]
    limit = roofline.Ceilings(**data["ceilings"])
    added = sum(
        row["count"] * (1 if path == "torch" else -1) * roofline.floor(limit, path, 8192, row["N"], row["K"], 64)
        for row in rows
        if row["path"] == "frozen"
        for path in ("torch", "frozen")
    )
    assert tax.least(data, at, paths_at, "torch") == pytest.approx(100 * added / total["frozen"])
    assert "~" not in line[1]
    assert tax.noisy(dict(low=3.0, median=4.0, high=4.1))  # goals differ by a few percent
    assert not tax.noisy(dict(low=3.5, median=4.0, high=4.4)) and not tax.noisy(dict(low=36, median=40, high=45))


def test_a_missing_shape_leaves_the_tax_open():
    """Of one path; and of all where the run was cut before a shape's turn: part of a block is not the model."""
    data = report.load(SAMPLE)
    everything = data["rows"]
    data["rows"] = [row for row in everything if not (row["path"] == "torch" and row.get("N") == 1024)]
    line = next(cells for cells in next(iter(tables_of(data))).rows if cells[0].startswith("torch"))
    assert set(line[1:]) == {tables.NO_FIGURE}
    data["rows"] = [row for row in everything if not (row.get("N") == 1024 and row.get("T") == 512)]
    assert [at.T for at in tax.points(_layers(data))] == [8192, 8192]


def test_tables_say_the_same_in_every_form():
    for table in tables_of(report.load(SAMPLE)):
        for form in (table.plain(), table.markdown(), table.html()):
            for cell in (cell for row in table.rows for cell in row):
                assert cell in form.replace("&#x27;", "'").replace("&quot;", '"').replace("&gt;", ">")
        assert len({line.count("|") for line in table.markdown().splitlines() if line.startswith("|")}) == 1


def test_the_chain_table_tells_the_bandwidth():
    (table,) = tables_of(report.load(SAMPLE), ["chain"])
    (row,) = table.rows
    assert dict(zip(table.head, row, strict=True)) == {
        "": "bf16 forward T 8192, 4096 x 4096, r 64",
        "reference, TB/s": "1.35 (34%)",  # 135 MB in 100 us, of the sample's 4 TB/s
        "torch, TB/s": "1.69 (42%)",
        "triton, TB/s": "3.38 (85%)",
        "torch over reference": "0.80 (0.78 to 0.82)",
        "triton over reference": "0.40 (0.39 to 0.41)",
    }


def test_the_gemm_table_tells_speed_and_what_is_picked():
    (table,) = tables_of(report.load(SAMPLE), ["gemm"])
    block, square, narrow, *_ = (dict(zip(table.head, row, strict=True)) for row in table.rows)
    assert block[""] == "bf16 forward T 8192 r 64, the linears of mistral-7b"
    assert square == {
        "": "bf16 forward T 8192 r 64, 4096 x 4096",
        "frozen, TFLOP/s": "700",
        "addmm, % added": "10.0 (9.9 to 10.1)",
        "torch, % added": "8.0 (7.9 to 8.1)",
        "cuda-128x256, TFLOP/s": "686 (98.0%)",  # of the sample's: 1.6 % more to multiply in 3.6 % more time
        "cuda-128x256, % added": "3.6 (3.5 to 3.7)",
        "cuda-128x128, TFLOP/s": "630 (90.0%)",
        "cuda-128x128, % added": "12.9 (12.7 to 13.0)",
        "cuda, TFLOP/s": "686 (98.0%)",
        "cuda, % added": "3.6 (3.5 to 3.7)",
    }
    assert narrow["cuda, TFLOP/s"] == narrow["cuda-128x128, TFLOP/s"]
    rows = [row for row in report.load(SAMPLE)["rows"] if row["question"] == "gemm"]
    times = {
        name: sum(
            row["count"] * row["seconds"]["median"] for row in rows if row["path"] == name or name == row["picked"]
        )
        for name in ("frozen", True)
    }
    assert block["cuda, % added"].split()[0] == f"{100 * (times[True] / times['frozen'] - 1):.1f}"


def test_a_core_that_could_not_be_built_is_told():
    data = report.load(SAMPLE) | {"build": {"built": False, "why": "nvcc was not found", "seconds": 1.0}}
    assert ["the CUDA core", "its build", "nvcc was not found"] in tables_of(data)[-1].rows


@pytest.mark.parametrize("threads, named", [(1, ", 1 thread"), (3, ", 3 threads"), (4, "")])
def test_a_cpu_is_named_with_the_threads_that_were_used(threads, named):
    machine = {"device": "cpu", "cpu": "AMD EPYC", "cores": 4, "threads": threads}
    assert page.machine({"machine": machine}) == "AMD EPYC, 4 cores" + named


def test_the_page_is_self_contained_and_has_every_plot():
    data = report.load(SAMPLE)
    text = page.page(data)
    names = [plot.name for plot in plots_of(data)]
    assert {"tax-by-T-graph", "tax-by-r-graph", "gemm-graph", "host", "svd"} <= set(names)
    assert re.findall(r'<img alt="[^"]+" id="([^"]+)"', text) == names
    assert not re.search(r"(src|href)=[\"'](?!data:)", text) and "@import" not in text
    for encoded in re.findall(r"base64,([^\"]+)", text):
        assert base64.b64decode(encoded).startswith(b"<?xml")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to open the page in (Debian: apt-get install chromium)")
def test_a_browser_shows_the_plots(tmp_path):
    """Screenshots with and without the images differ by the colours of the paths that were plotted."""
    from matplotlib.image import imread

    text = page.page(report.load(SAMPLE))
    shown = {}
    for name, content in (("with", text), ("without", re.sub(r"<img [^>]*>", "", text))):
        (tmp_path / f"{name}.html").write_text(content)
        shot = tmp_path / f"{name}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,3000"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
        page_url = (tmp_path / f"{name}.html").as_uri()
        subprocess.run([CHROMIUM, *options, page_url], check=True, capture_output=True, timeout=600)
        pixels = (imread(shot)[..., :3] * 255).round().astype(int).reshape(-1, 3)
        shown[name] = Counter(map(tuple, pixels.tolist()))
    for path in ("torch", "reference", "addmm", "peft-lora"):
        colour = tuple(bytes.fromhex(paths.PATHS[path].colour[1:]))
        assert shown["with"][colour] > 200 > 20 > shown["without"][colour], path


def test_every_path_has_a_colour():
    """Of its own, where it may stand beside others."""
    for known in (paths.PATHS, svd.METHODS):
        own = [path.colour for path in known.values() if path.colour != question.GREY]
        assert len(own) == len(set(own)) >= len(known) - 1  # a new backend may have none yet
    assert len({gemm._colour(path) for path in gemm.PATHS}) == len(gemm.PATHS)


# --- floors

H200 = roofline.Ceilings("H200", 4.3e12, 790e12, 67e12, "figures of the design")


def test_floors_are_the_bytes_and_flops_written_out():
    T, N, K, r = 8192, 4096, 4096, 64
    assert roofline.floor(H200, "frozen", T, N, K, r, "forward") == pytest.approx(2 * T * N * K / 790e12)
    assert roofline.floor(H200, "frozen", 1, N, K, r, "forward") == pytest.approx(2 * (K + N * K + N) / 4.3e12)
    shrink, expand = (2 * T * K + 2 * r * K) / 4.3e12, (4 * T * N + 2 * r * N) / 4.3e12  # x, A; y twice, B
    addmm = roofline.floor(H200, "addmm", T, N, K, r, "forward")
    assert addmm == pytest.approx(2 * T * N * K / 790e12 + shrink + expand)
    one_pass = roofline.floor(H200, "one-pass", T, N, K, r)
    assert one_pass == pytest.approx(2 * (2 * T * N * K + 2 * T * r * (N + K + r)) / 790e12)


def test_floors_are_those_of_the_design():
    """The tax of a Mistral-7B block at T = 8192, in percent, as estimated when the kernels were planned."""
    shapes = MODELS["mistral-7b"].shapes
    estimated = {"reference-fp32": (78, 55), "reference": (25, 25), "addmm": (10, 10), "torch": (8, 8)}
    estimated |= {"cuda": (4.7, 4.7), "one-pass": (2.4, 0.6)}
    for path, taxes in estimated.items():
        for r, expected in zip((64, 16), taxes, strict=True):

            def block(name: str, r: int = r) -> float:
                each = (shape.count * roofline.floor(H200, name, 8192, shape.N, shape.K, r) for shape in shapes)
                return sum(each)

            assert 100 * (block(path) / block("frozen") - 1) == pytest.approx(expected, rel=0.15), (path, r)


def test_the_floor_of_the_cuda_backend_is_what_its_kernels_do():
    assert f"kTileK = {roofline.STEP}," in (Path(__file__).parents[1] / "csrc" / "gemm_tail.cuh").read_text()
    T, N, K = 8192, 4096, 4096
    for r, columns in ((4, 64), (64, 64), (65, 128)):  # whole steps of u; x once more, for u
        least = 2 * T * N * (K + columns) / 790e12 + (2 * T * K + 2 * r * K) / 4.3e12
        assert roofline.floor(H200, "cuda", T, N, K, r, "forward") == pytest.approx(least)
    few = roofline.floor(H200, "cuda", 64, N, K, 16, "forward") - roofline.floor(
        H200, "frozen", 64, N, K, 16, "forward"
    )
    assert few == pytest.approx((2 * 64 * (K + 2 * N) + 2 * 16 * (K + N)) / 4.3e12)  # x, y twice, A, B


@pytest.mark.parametrize("T", [512, 8192, 32768])
@pytest.mark.parametrize("r", [4, 64])
def test_less_traffic_means_a_lower_floor(T, r):
    order = ["frozen", "one-pass", "cuda", "triton", "torch", "addmm", "reference", "reference-fp32"]
    floors = [roofline.floor(H200, path, T, 1024, 4096, r) for path in order]
    assert floors == pytest.approx(sorted(floors), rel=1e-9)
    for path in order:
        ways = [roofline.floor(H200, path, T, 1024, 4096, r, way) for way in ("forward", "backward", "both")]
        assert ways[0] + ways[1] == pytest.approx(ways[2])


def test_roofline_command(capsys):
    assert main(["roofline", "--gpu", "H200", "--shape", "4096x4096", "--tokens", "8192", "--rank", "64"]) == 0
    printed = capsys.readouterr().out
    floor = roofline.floor(roofline.DATASHEETS["H200"], "frozen", 8192, 4096, 4096, 64)
    assert f"{1e3 * floor:.3f}" in printed and "datasheet" in printed
    assert main(["roofline", "--ceilings", str(SAMPLE)]) == 0
    assert "4.00 TB/s, 800 TFLOP/s" in capsys.readouterr().out
    for bad, message in (
        (["--gpu", "H900"], "gpu: got 'H900', must be one of B200, H200"),
        (["--model", "gpt-9"], "model: got 'gpt-9'"),
        (["--shape", "axb"], "shape: got 'axb'"),
        (["--tokens", "0"], "tokens: got 0, must be at least 1"),
        (["--gpu", "H200", "--ceilings", "r.json"], "gpu and ceilings: got H200 and r.json"),
        (["--ceilings", "/no/such/file"], "/no/such/file: cannot be read"),
    ):
        assert main(["roofline", *bad]) == 1
        assert f"loraxs roofline: {message}" in capsys.readouterr().err


@pytest.mark.gpu("bench", limit=60)
def test_a_run_on_a_gpu(tmp_path):
    out = tmp_path / "run.json"
    grid = ["--shape", "1024x512", "--tokens", "1", "300", "--rank", "12", "--device", "cuda", "--out", str(out)]
    assert main(["bench", "layer", "host", "svd", *grid]) == 0
    data = report.load(out)
    assert all(row["status"] == "ok" and row["seconds"]["median"] > 0 for row in data["rows"])
    layers = [row for row in data["rows"] if row["question"] == "layer"]
    assert {row["mode"] for row in layers} == {"eager", "graph"}
    assert all(row["sets"] > 1 for row in layers)
    kernels = {row["path"]: row["kernels"] for row in data["rows"] if row["question"] == "host"}
    assert 1 <= kernels["frozen"]["forward"] < kernels["reference"]["forward"]
    assert 1e11 < data["ceilings"]["bandwidth"] < 2e13 and 1e12 < data["ceilings"]["half"] < 1e16
    assert tables_of(data) and data["machine"]["driver"]


ON_A_GPU = dict(device="cuda", shapes=["1024x1024"])  # of a smaller one it would take thousands to leave the L2 cache


@pytest.mark.gpu("bench", limit=60)
@pytest.mark.parametrize("direction", roofline.DIRECTIONS)
def test_every_direction_in_a_graph_on_a_gpu(direction):
    request = tiny(
        **ON_A_GPU, questions=["layer"], direction=direction, modes=["graph"], paths=["reference", "addmm", "torch"]
    )
    rows = rows_of(request)
    assert [row["status"] for row in rows] == ["ok"] * 4, [row.get("reason") for row in rows]
    torch.cuda.synchronize()


@pytest.mark.gpu("bench", limit=60)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_tail_on_a_gpu(dtype):
    """Whatever can run here is right at ranks that are no multiple of anything, and timed from graphs."""
    request = tiny(questions=["gemm"], device="cuda", dtype=dtype, shapes=["1000x520"], tokens=[300], ranks=[12, 64])
    rows = rows_of(request)
    assert [row["status"] for row in rows] == ["ok"] * len(rows), [row.get("reason") for row in rows]
    tiles = "cuda" in request.paths and gemm.missing(request.dtype, request.device) is None
    assert {row["path"] for row in rows} == {"frozen", "addmm", "torch", *(gemm.TILES if tiles else ())}
    assert {row["mode"] for row in rows} == {"eager", "graph"}


@pytest.mark.gpu("bench")
def test_a_failed_capture_leaves_the_others_on_a_gpu(monkeypatch):
    def build(o: paths.Operands) -> paths.Layer:
        return paths.Layer(lambda x: (x.sum().item(), o.linear()(x))[1])  # waits for the device: cannot be captured

    monkeypatch.setitem(paths.PATHS, "addmm", planted(build))
    rows = rows_of(tiny(**ON_A_GPU, questions=["layer"], tokens=[33, 5], paths=["addmm", "torch"]))
    states = {(row["path"], row["mode"], row["T"]): row["status"] for row in rows}
    for T in (33, 5):
        assert states["addmm", "eager", T] == "ok" and states["addmm", "graph", T] == "failed"
        assert states["torch", "graph", T] == "ok"
