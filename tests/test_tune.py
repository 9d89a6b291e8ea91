"""`loraxs tune` and `lx.tune`: what is measured and in which order, the table that comes of it, and what goes wrong.

There is no GPU: two backends plugged in where Triton's and CUDA's would be run on the CPU, and every time is made up.
"""

from __future__ import annotations

import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import interrupted_at
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels import backends
from loraxs_kernels.backends import choice, tuned
from loraxs_kernels.backends import torch as torch_backend
from loraxs_kernels.backends.device import facts
from loraxs_kernels.backends.triton import config
from loraxs_kernels.bench import BenchError, chain, timer
from loraxs_kernels.bench import choice as question
from loraxs_kernels.bench.shapes import Shape
from loraxs_kernels.cli import main
from loraxs_kernels.tuning import run, tiles
from loraxs_kernels.tuning.model import of_model

CPU = torch.device("cpu")
SHAPES = {16: (Shape(24, 40, 2), Shape(40, 24))}
BF16 = torch.bfloat16


@dataclass
class World:
    """What is timed takes a second of a made-up clock for each shape; `speed` says how fast a backend is there."""

    path: Path
    speed: Callable[[str, chain.Case], float] = lambda name, case: {"torch": 1.0, "triton": 2.0, "cuda": 1.5}[name]
    now: float = 0.0
    timed: list[tuple] = field(default_factory=list)  # (T, N, K, whether there is a W, whether backward)

    def run(self, shapes=None, tokens=(16,), **more) -> list[choice.Row]:
        table = run.run(shapes or SHAPES, tokens, path=self.path, progress=more.pop("progress", False), **more)
        return list(map(choice.parse, table["choices"]))

    def table(self) -> dict:
        return tuned.read(self.path)

    def pick(self, T: int, direction: str = "forward", weight: bool = True, N: int = 40, K: int = 40) -> str:
        return choice.pick(T, N, K, 12, BF16, direction, weight, facts(CPU))


def plug_in(monkeypatch, path: Path) -> World:
    world, cases = World(path), []
    for name in ("triton", "cuda"):
        full = f"{backends.__name__}.{name}"
        module = types.ModuleType(full)
        module.unavailable, module.lowrank_linear = lambda: None, torch_backend.lowrank_linear
        monkeypatch.setitem(sys.modules, full, module)

    def measure_case(*args):
        cases[:] = [chain.Case(*args)]
        return cases[0]

    def interleave(passes, *_):
        if not passes:
            return {}
        (case,) = cases
        x, W, A, _, B, *_, other = case.sets[0]
        world.timed.append((len(x), len(B), A.shape[1], W is not None, other is not None))
        world.now += 1.0
        speeds = {name: world.speed(name, case) for name in passes}
        return {name: torch.full((9,), 1 / speed, dtype=torch.float64) for name, speed in speeds.items()}

    monkeypatch.setattr(question, "Case", measure_case)
    monkeypatch.setattr(timer, "interleave", interleave)
    monkeypatch.setattr(run, "clock", lambda: world.now)
    monkeypatch.setattr(run, "release", lambda: None)  # collects garbage, which takes a while
    monkeypatch.setattr(run, "_gpu", lambda: CPU)
    monkeypatch.setattr(tiles, "can_be_measured", lambda: False)
    monkeypatch.setenv("LORAXS_TUNED", str(path))
    tuned.forget()
    return world


@pytest.fixture
def world(monkeypatch, tmp_path):
    yield plug_in(monkeypatch, tmp_path / "deep" / "tuned.json")
    monkeypatch.undo()
    tuned.forget()


def test_what_is_fastest_is_picked_at_once_and_in_later_processes(world, monkeypatch):
    call, kernels = ("bfloat16", "forward", True, 16, 64, (1, 99), (1, 99)), tuned.kernels("cuda")
    committed = choice.Row(*facts(CPU), *call, "cuda", 2.0, kernels, "theirs")
    monkeypatch.setattr(choice, "committed", lambda: (committed,))
    assert (world.pick(9), world.pick(64)) == ("torch", "cuda")

    def speed(name, case):
        return {"torch": 1.0, "triton": 2.0 if len(case.sets[0][0]) == 16 else 0.5, "cuda": 0.9}[name]

    world.speed = speed
    rows = world.run(tokens=[10, 64])
    assert len({(row.tokens, row.direction, row.weight) for row in rows}) == len(rows) == 8
    best = {16: ("triton", 2.0), 64: ("torch", 1.0)}
    assert all((row.backend, row.gain) == best[row.tokens] for row in rows)
    assert all((row.N, row.K, row.rank, row.dtype) == ((24, 40), (24, 40), 16, "bfloat16") for row in rows)
    for _ in range(2):
        assert {world.pick(T, *call) for T in (1, 16) for call in (("backward", False), ())} == {"triton"}
        assert world.pick(64) == "torch"  # measured here, whatever the committed table has
        assert world.pick(64, N=50) == "cuda"  # not measured here
        tuned.forget()  # as in another process


def test_a_wrong_backend_is_not_timed_and_never_chosen(world, monkeypatch, capsys):
    def wrong(*args, **more):
        y, z, gram = torch_backend.lowrank_linear(*args, **more)
        return y + 1, z, gram

    monkeypatch.setattr(sys.modules[f"{backends.__name__}.triton"], "lowrank_linear", wrong)
    assert {row.backend for row in world.run(progress=True)} == {"cuda"}
    why = "triton is left out at T 16, r 16, forward with W, 24x40: not timed, it is wrong: y"
    assert why in capsys.readouterr().err
    assert {row["path"] for row in world.table()["measured"]} == {"torch", "cuda"}


def test_a_shape_that_does_not_fit_is_left_out_and_tried_again(world, monkeypatch, capsys):
    def small(shape, *more):
        if shape.N == 40:
            raise torch.OutOfMemoryError
        return own(shape, *more)

    own = question.Case
    monkeypatch.setattr(question, "Case", small)
    assert {row.N for row in world.run(progress=True) if row.direction == "forward"} == {(24, 24)}
    assert "torch is left out at T 16, r 16, forward with W, 40x24: out of memory" in capsys.readouterr().err
    monkeypatch.setattr(question, "Case", own)
    assert {row.N for row in world.run()} == {(24, 40)} and len(set(world.timed)) == len(world.timed) == 8


def test_a_backend_without_memory_is_left_out_and_tried_again(world, monkeypatch):
    """It is not chosen for the layers, one of which it did not compute, and the next run measures that one again."""

    def full(x, W, A, *more, **named):
        if A.shape[1] == 24:
            raise torch.OutOfMemoryError
        return own(x, W, A, *more, **named)

    module = sys.modules[f"{backends.__name__}.triton"]
    own = module.lowrank_linear
    monkeypatch.setattr(module, "lowrank_linear", full)
    rows = world.run()
    assert "triton" not in {row.backend for row in rows if row.N == row.K == (24, 40)}
    failed = [row for row in world.table()["measured"] if row["status"] == "failed"]
    assert failed and {(row["path"], row["reason"]) for row in failed} == {("triton", "out of memory")}
    monkeypatch.setattr(module, "lowrank_linear", own)
    before = len(world.timed)
    again = world.run()
    assert 0 < len(world.timed) - before < before
    assert {row.backend for row in again if row.N == (24, 40)} == {"triton"} and world.run() == again
    assert all(row["status"] == "ok" for row in world.table()["measured"])


def test_where_torch_itself_fails_the_run_ends(world, monkeypatch):
    monkeypatch.setattr(torch_backend, "lowrank_linear", None)
    with pytest.raises(BenchError, match="the torch backend failed at T 16, r 16, forward with W, 24x40: TypeError"):
        world.run()
    assert world.table()["measured"] == []


def test_the_most_valuable_calls_come_first():
    points = run.valuable([16, 64], [8192, 16], (True, False))
    assert points[:4] == [run.Kind(8192, r, True, each) for r in (16, 64) for each in ("forward", "backward")]
    assert points[4] == run.Kind(16, 16, True, "forward")
    assert all(point.T == 16 and point.direction == "backward" for point in points[-4:])
    assert len(points) == len(set(points)) == 16
    assert sorted(run.TOKENS) == [2**n for n in range(4, 16)]


def test_the_budget_ends_a_run_and_the_next_goes_on(world, capsys):
    """A call takes two seconds: with four there are two, though the second of them ends at the very last moment."""
    assert len(world.run(budget=4.0, progress=True)) == 2
    assert "the budget is spent, 2 of 4 kinds are left for another run" in capsys.readouterr().err
    assert len(world.run(budget=1e-20)) == 3  # one at least, so that every run comes further
    assert len(world.run()) == 4
    assert len(world.timed) == len(set(world.timed)) == 8
    world.run()
    assert len(world.timed) == 8
    before = world.table()
    world.run(tokens=[32])
    world.timed.clear()
    world.run(again=True)
    assert len(world.timed) == 8 and len(world.table()["measured"]) == 2 * 8 * 3
    assert [row for row in world.table()["measured"] if row["T"] == 16] == before["measured"]


def test_only_what_is_new_is_measured(world):
    """Another model's layers join those that are there: the rows are for both, as far as they agree."""
    world.run()
    world.timed.clear()
    world.run({16: (SHAPES[16][0], Shape(8, 8)), 64: (Shape(8, 8),)})
    assert {(N, K) for _, N, K, *_ in world.timed} == {(8, 8)} and len(world.timed) == 8
    rows = {(row.rank, row.direction, row.weight): row for row in tuned.rows(facts(CPU), "choices", choice.parse)}
    assert len(rows) == 8
    assert rows[16, "forward", True].N == (8, 40) and rows[64, "forward", True].N == (8, 8)


def test_what_another_process_has_measured_meanwhile_stays(world):
    def other():
        if not others:
            others.append(True)
            world.run({16: (Shape(48, 40),)}, weights=(True,))

    others = []
    world.run(weights=(True,), step=other)
    assert {(row["N"], row["direction"]) for row in world.table()["measured"]} == {
        (N, direction) for N in (24, 40, 48) for direction in choice.DIRECTIONS
    }


def test_a_table_of_other_conditions_is_replaced(world, capsys):
    world.run()
    table = world.table()
    table["made_on"]["torch"] = "1.0"
    tuned.write(table, world.path)
    tuned.forget()
    with pytest.warns(UserWarning, match=r"other conditions \(torch: 1.0, here \d.*`loraxs tune` makes a new one"):
        assert world.pick(16) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert world.pick(8) == "torch"
    world.timed.clear()
    world.run(progress=True)
    assert "was measured under other conditions (torch: 1.0, here " in capsys.readouterr().err
    assert len(world.timed) == 8 and world.pick(16) == "triton"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tiles", lambda row: {"family": "mma"}),
        ("measured", lambda row: "a letter"),
        ("measured", lambda row: {"T": 16}),
        ("measured", lambda row: {"search": 16}),
        ("measured", lambda row: row | {"direction": "up"}),
        ("measured", lambda row: row | {"over": {"torch": {"high": "1"}}}),
    ],
)
def test_a_damaged_table_is_replaced(world, capsys, name, damage):
    world.run()
    table = world.table()
    tuned.write(table | {name: [damage(row) for row in table["measured"]]}, world.path)
    world.run(progress=True)
    assert "tuned.json is damaged (" in capsys.readouterr().err
    assert world.table() == table


@pytest.mark.parametrize("text", ["a letter", "[1]", '{"format": "loraxs-tuned", "version": 2}'])
def test_what_is_no_table_is_not_overwritten(world, text):
    world.path.parent.mkdir()
    world.path.write_text(text)
    with pytest.raises(BenchError, match=r"not a table of `loraxs tune`.*it is not overwritten: delete it"):
        world.run()
    assert world.path.read_text() == text and not world.timed


def test_a_file_that_cannot_be_written_is_found_before_anything_is_measured(world, tmp_path):
    (tmp_path / "file").touch()
    for world.path in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises((OSError, ValueError, BenchError), match=str(world.path)):
            world.run()
    assert not world.timed


def test_an_interruption_leaves_a_whole_table(world, monkeypatch):
    """At every so many lines; what was kept is not measured again, and the end is the same."""
    whole, k, stopped = world.run(), 400, 0
    world.path.unlink()
    while interrupted_at(k, world.run):
        stopped += 1
        k += 2003
        if world.path.exists():
            table = world.table()
            assert all(row in whole for row in map(choice.parse, table["choices"]))
            assert all(row in whole for row in tuned.rows(facts(CPU), "choices", choice.parse))
    assert stopped > 3 and world.run() == whole


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 1)])
def test_a_stopped_command_says_so(world, monkeypatch, capsys, error, status):
    def measured(*args):
        if len(world.timed) == 2:
            raise error
        return own(*args)

    own = question.measure
    monkeypatch.setattr(question, "measure", measured)
    assert main(["tune", "--shape", "24x40", "40x24", "--rank", "16", "--tokens", "16"]) == status
    assert "loraxs tune: stopped" in capsys.readouterr().err or status == 1
    assert len(world.table()["choices"]) == 1


def test_the_command_shows_what_it_found(world, capsys):
    out = str(world.path.with_name("other.json"))
    command = ["tune", "--shape", "24x40", "--rank", "12", "16", "--tokens", "16", "64", "--budget", "60", "--out", out]
    assert main(command) == 0
    shown, told = capsys.readouterr()
    assert shown.count("triton 2.00") == 8 and f"LORAXS_TUNED={out}" in shown
    assert "8 kinds of calls, 60 seconds at most" in told
    assert "T 16, r 16, forward with W: torch 1.00, triton 2.00" in told
    assert main(["tune", "--model", "tiny", "--tokens", "16", "--rank", "16", "--dtype", "fp16"]) == 0
    assert {row["dtype"] for row in world.table()["choices"]} == {"float16"}


def test_the_command_takes_the_shapes_of_a_configuration(world, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=100)
    transformers.LlamaConfig(**sizes).save_pretrained(tmp_path)
    assert main(["tune", "--model", str(tmp_path), "--tokens", "16", "--rank", "8"]) == 0
    found = {(entry["N"], entry["K"], entry["count"]) for entry in world.table()["measured"]}
    assert found == {(32, 32, 4), (48, 32, 2), (32, 48, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "rank: got 0, must be at least 1"),
        (["--rank", "16", "300"], "rank: got 300, must be at most 128"),
        (["--tokens", "-1"], "tokens: got -1, must be at least 1"),
        (["--budget", "nan"], "budget: got nan, must be a number of seconds above 0"),
        (["--model", "nobody"], "model: got 'nobody', must be one of"),
        (["--shape", "4096"], "shape: got '4096', must be NxK"),
        (["--shape", "8x8", "--model", "tiny"], "model and shape: got"),
    ],
)
def test_the_command_refuses_what_cannot_be(world, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(run, "facts", lambda device: choice.Device((8, 0), 108))
    assert main(["tune", *arguments]) == 1
    assert f"loraxs tune: {message}" in capsys.readouterr().err
    assert not world.path.exists() and not world.timed


def test_without_a_gpu_or_without_a_choice_it_says_so(world, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[f"{backends.__name__}.cuda"], "unavailable", lambda: "no core")
    assert {row.backend for row in world.run()} == {"triton"}
    monkeypatch.setattr(sys.modules[f"{backends.__name__}.triton"], "unavailable", lambda: "no compiler")
    assert main(["tune"]) == 1
    why = "only the torch backend can run here (triton: no compiler; cuda: no core)"
    assert why in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(capsys):
    assert main(["tune"]) == 1
    assert "loraxs tune: there is nothing to choose" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=r"only the torch backend can run here .*torch finds no GPU here"):
        lx.tune(body(), rank=4, dtype=BF16)


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40), *(nn.Linear(40, 40) for _ in range(2)), nn.ReLU())


def test_a_models_layers_are_what_is_measured(world):
    plain = of_model(body(), (4, 64))
    assert plain.shapes.keys() == {16, 64} and plain.dtype == torch.float32 and plain.dense
    assert set(plain.shapes[16]) == {Shape(24, 40), Shape(40, 24), Shape(40, 40, 2)}
    model = lx.attach(body().bfloat16(), 4, target_modules=["0", "2", "3"], rank_pattern={"0": 20}, progress=False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = of_model(model, ())
    assert found == ({16: (Shape(40, 40),), 32: (Shape(24, 40),)}, BF16, True)
    assert list(found.shapes) == [16, 32]
    model[2].dropout = model[3].dropout = 0.1
    assert not of_model(model, ()).dense  # most calls are without W
    rows = lx.tune(model, tokens=5, progress=False)
    assert {(row.rank, row.tokens, row.backend) for row in rows} == {(r, 16, "triton") for r in (16, 32)}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_layers_of_peft_are_measured_too():
    peft = pytest.importorskip("peft")
    from loraxs_kernels.integrations.peft import LoraXSConfig

    model = peft.get_peft_model(body().bfloat16(), LoraXSConfig(r=4, target_modules=["0", "1"]))
    assert of_model(model, ()) == ({16: (Shape(24, 40), Shape(40, 24))}, BF16, True)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (dict(rank=[]), ValueError, "rank: must be given"),
        (dict(rank=0), ValueError, "rank: got 0"),
        (dict(rank=4), ValueError, "dtype: got torch.float32, that of the layers, must be torch.bfloat16"),
        (dict(rank=4, dtype=BF16, budget=-1), ValueError, "budget: got -1, must be a number of seconds above 0"),
        (dict(rank=4, dtype=BF16, tokens=0), BenchError, "tokens: got 0"),
        (dict(rank=4, dtype=BF16, tokens=[16, 2.5]), TypeError, "tokens: got .*, must be an integer, several of them"),
        (dict(rank=4, dtype=BF16, path=3), TypeError, "path: got a int, must be the path of a file, or None"),
        (dict(rank=4, dtype=BF16, budget="long"), ValueError, "budget: got 'long', must be a number of seconds"),
    ],
)
def test_lx_tune_refuses_what_cannot_be(world, given, kind, message):
    with pytest.raises(kind, match=message):
        lx.tune(body(), **given)
    with pytest.raises(ValueError, match=r"rank: got \[8\] for a model with LoRA-XS adapters"):
        lx.tune(lx.attach(body(), 4, target_modules=["0"], progress=False), rank=8)
    with pytest.raises(TypeError, match=r"model: got a dict, must be an nn.Module"):
        lx.tune({})
    assert not world.path.exists() and not world.timed


TILES = config.Row("wgmma", "half", "forward", 16, 1, config.Config(16, 32, 32, 4, 2), 99, "mine")


@pytest.mark.parametrize("gain", [1.5, 1.0])
def test_new_tiles_are_kept_where_calls_gain_by_them(world, monkeypatch, gain):
    """Searched where Triton is near the fastest: forward here, where other tiles may make it the fastest."""
    searched = []

    def measured(shapes, rank, tokens, layout, *_, **more):
        searched.append((shapes, rank, tokens, layout))
        return TILES

    def speed(name, case):
        own = tuned.rows(facts(CPU), "tiles", config.parse) == (TILES,)
        backward = case.sets[0][-1] is not None
        return {"torch": 1.0, "cuda": 1.6, "triton": 0.5 if backward else 1.5 * (gain if own else 1.0)}[name]

    world.speed = speed
    monkeypatch.setattr(tiles, "can_be_measured", lambda: True)
    monkeypatch.setattr(tiles, "measured", measured)
    rows = world.run(tokens=[16, 32])
    assert searched == [(SHAPES[16], 16, 1, "forward")]
    forward = {(row.backend, row.gain) for row in rows if row.direction == "forward"}
    assert forward == ({("triton", 2.25)} if gain > 1 else {("cuda", 1.6)})
    kept = world.table()["tiles"]
    assert kept == ([config.plain(TILES)] if gain > 1 else [])
    assert tuned.rows(facts(CPU), "tiles", config.parse) == ((TILES,) if gain > 1 else ())
    world.timed.clear()
    assert world.run(tokens=[16, 32]) == rows
    assert len(searched) == 1 and not world.timed


def test_tiles_must_gain_over_all_the_rows_they_are_for(world, monkeypatch):
    """At 16 rows they lose more than they gain at 32; another model's layers, measured before, say nothing of it."""
    world.speed = lambda name, case: {"torch": 1.0, "cuda": 0.5, "triton": 9.0}[name]
    world.run({16: (Shape(8, 8),)}, tokens=[16, 32])
    gains = {16: 0.25, 32: 1.5}

    def speed(name, case):
        own = tuned.rows(facts(CPU), "tiles", config.parse) == (TILES,)
        return {"torch": 1.0, "cuda": 0.5, "triton": 2.0 * (gains[len(case.sets[0][0])] if own else 1.0)}[name]

    world.speed = speed
    monkeypatch.setattr(tiles, "can_be_measured", lambda: True)
    monkeypatch.setattr(tiles, "measured", lambda *_, **more: TILES)
    world.run(tokens=[16, 32])
    assert world.table()["tiles"] == []
    assert sum("search" in entry for entry in world.table()["measured"]) == 2
    gains |= {16: 1.1, 32: 1.1}
    world.run(tokens=[16, 32], again=True)
    assert world.table()["tiles"] == [config.plain(TILES)]


def test_a_search_of_tiles_that_fails_costs_nothing_else(world, monkeypatch, capsys):
    monkeypatch.setattr(tiles, "can_be_measured", lambda: True)
    monkeypatch.setattr(tiles, "measured", lambda *_, **more: 1 / 0)
    assert len(world.run(progress=True)) == 4
    told = "tiles for r 16, T >= 1, forward: none: ZeroDivisionError"
    assert told in capsys.readouterr().err
    world.run(progress=True)
    assert told not in capsys.readouterr().err


def test_a_search_of_tiles_that_is_stopped_leaves_the_old_ones(world, monkeypatch):
    def measured(*_, **more):
        monkeypatch.setattr(question, "measure", stop)
        return TILES

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiles, "can_be_measured", lambda: True)
    monkeypatch.setattr(tiles, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert len(world.table()["choices"]) == 4
    assert tuned.rows(facts(CPU), "tiles", config.parse) == ()


def two_ranks(rank: int, folder: str) -> None:
    """Rank 0 measures, and its table is everybody's; what it cannot do, nobody can."""
    monkeypatch = pytest.MonkeyPatch()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        world = plug_in(monkeypatch, Path(folder, f"{rank}.json"))
        model = body() if rank == 0 else nn.ReLU()
        rows = lx.tune(model, rank=16, tokens=16, dtype=BF16, progress=False)
        assert len(rows) == 4 and world.pick(16) == "triton"
        assert len(world.timed) == (12 if rank == 0 else 0) and world.path.exists() == (rank == 0)
        with pytest.raises(ValueError if rank == 0 else BenchError, match="rank: must be given"):
            lx.tune(model)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # in the ordinary way a thread of torch's own, not yet joined, aborts the process now and then


def test_two_ranks_have_one_table(tmp_path):
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    assert len(json.loads((tmp_path / "0.json").read_text())["choices"]) == 4


@pytest.mark.gpu("bench", limit=180)
def test_tuning_on_a_gpu(monkeypatch, tmp_path, capsys):
    """A few seconds of it; then `choose` says what the table says, in this process and from the file."""
    if {backends.unavailable(name) for name in ("triton", "cuda")}.isdisjoint({None}):
        pytest.skip("there is only the torch backend to choose from")
    monkeypatch.setenv("LORAXS_TUNED", str(tmp_path / "tuned.json"))
    tuned.forget()
    arguments = ["tune", "--shape", "1024x512", "--rank", "16", "--tokens", "64", "1024", "--budget", "12"]
    assert main(arguments) == 0
    assert "The fastest backend" in capsys.readouterr().out
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(2):
        rows = tuned.rows(facts(device), "choices", choice.parse)
        assert rows and all(row.gain >= 1.0 for row in rows)
        for row in rows:
            x = torch.empty(row.tokens, row.K[0], dtype=BF16, device=device)
            assert backends.choose(x, row.N[0], 16, row.weight, row.direction) == row.backend
        tuned.forget()
    monkeypatch.undo()
    tuned.forget()
