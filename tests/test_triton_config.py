"""The table of Triton configurations: what is picked, from which table, and how a table is made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from loraxs_kernels.backends import tuned
from loraxs_kernels.backends.triton import config
from loraxs_kernels.backends.triton.config import Config, Device, Row, pick_config
from loraxs_kernels.tuning import tiles

H200, SMALL, FUTURE = Device((9, 0), 132), Device((8, 6), 20), Device((13, 0), 300)


@pytest.fixture(autouse=True)
def no_table_of_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAXS_TUNED", str(tmp_path / "tuned.json"))
    tuned.forget()
    yield tmp_path / "tuned.json"
    tuned.forget()


def write(path: Path, device: Device, *rows: Row) -> None:
    """A table of the user's own, made on the device."""
    plain = [config.plain(row) for row in rows]
    tuned.write({"made_on": tuned.machine(device), "tiles": plain, "choices": [], "measured": []}, path)
    tuned.forget()


@pytest.mark.parametrize("device", [H200, SMALL, FUTURE], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["forward", "backward"])
def test_something_valid_is_picked_for_everything(device, dtype, layout):
    for T in (1, 16, 17, 512, 8192, 10**7):
        for N, K in ((1, 1), (1000, 7), (14336, 4096)):
            for r in (1, 4, 16, 17, 25, 64, 128):
                cut = pick_config(T, N, K, r, dtype, layout, device)
                if dtype == torch.float32:  # not by TF32 instructions, unless torch is told to
                    assert cut is None
                    continue
                assert cut == pick_config(T, N, K, r, dtype, layout, device)
                assert cut.split_k <= min(config.MOST, -(-K // cut.block_k))
                assert cut.split_n <= -(-N // cut.block_n)
            assert pick_config(T, N, K, 129, dtype, layout, device) is None


def test_few_rows_fill_the_chip_and_many_take_one_launch():
    for T in (1, 16, 64, 256, 512, 1024, 2048):
        cut = pick_config(T, 4096, 4096, 64, torch.bfloat16, "forward", H200)
        blocks = -(-T // cut.block_t)
        assert not cut.one_launch
        assert 0.2 * H200.multiprocessors <= blocks * cut.split_k <= H200.multiprocessors
        assert 0.4 * H200.multiprocessors <= blocks * cut.split_n <= H200.multiprocessors
    assert pick_config(8192, 4096, 4096, 64, torch.bfloat16, "forward", H200).one_launch


def test_fp32_follows_torchs_setting():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert config.precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert config.precision(torch.float32) == "tf32"
        assert pick_config(8, 8, 8, 64, torch.float32, "forward", H200) is not None
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("value", "expected"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_fp32_follows_torchs_newer_setting(fp32_precision, value, expected):
    """Once it has been used, torch.get_float32_matmul_precision() raises."""
    fp32_precision["cuda"].fp32_precision = value
    assert config.precision(torch.float32) == expected


OWN = Row("wgmma", "half", "forward", 64, 257, Config(32, 32, 32, 8, 2), 1, "mine")


def test_a_table_of_the_users_own_goes_first(no_table_of_the_users):
    """Where it says something: for its layout, its rank, its rows and its family; the committed one has the rest."""
    committed = {key: pick_config(*key) for key in problems()}
    write(no_table_of_the_users, H200, OWN)
    for key, before in committed.items():
        if key[-1] != H200:
            continue  # for another GPU it is not a table at all
        now = pick_config(*key)
        if key == (*(8192, 4096, 4096, 64, torch.bfloat16), "forward", H200):
            assert now == OWN.tiles
        else:
            assert now == before


def problems() -> list[tuple]:
    return [
        (T, 4096, 4096, r, torch.bfloat16, layout, device)
        for T in (16, 8192)
        for r in (16, 64)
        for layout in ("forward", "backward")
        for device in (H200, SMALL)
    ]


def test_a_row_that_does_not_fit_is_not_picked(no_table_of_the_users):
    key = (8192, 4096, 4096, 64, torch.bfloat16, "forward")
    for device, fits in ((SMALL, False), (Device((8, 0), 108), True)):  # 99 and 163 KiB
        write(no_table_of_the_users, device, OWN._replace(family="mma", shared=100 * 1024))
        assert (pick_config(*key, device) == OWN.tiles) == fits


def test_a_table_reads_as_it_was_written(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(config.text(config.committed_table()))
    assert config.read(path) == config.committed_table()
    assert path.read_text() == config.TABLE.read_text()


def test_the_committed_table_is_made_anew_without_losing_what_was_measured(monkeypatch, tmp_path):
    """Rows that were counted are compiled for all GPUs that would pick them; test_triton_aot.py does so for real."""
    counted = [row for row in config.committed_table() if row.source == "counted, not measured"]
    capabilities = {}

    def shared(row, found, layouts):
        capabilities[row[:5]] = list(found)
        return 7

    class Here:  # in place of other processes
        __init__ = __exit__ = lambda self, *_, **__: None
        __enter__, map = lambda self: self, map

    monkeypatch.setattr(tiles, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(tiles, "shared", shared)
    monkeypatch.setattr(config, "TABLE", tmp_path / "configs.json")
    mine, old, new = (OWN._replace(rank=rank, source="measured on an H100") for rank in (16, 32, 32))
    config.TABLE.write_text(config.text([mine, old, *counted]))
    write(tmp_path / "tuned.json", H200, new._replace(shared=2))
    tiles.main([str(tmp_path / "tuned.json")])
    assert config.read(config.TABLE) == (new._replace(shared=2), mine, *(row._replace(shared=7) for row in counted))
    assert capabilities["mma", "half", "any", 16, 1] == [(8, 0), (9, 0), (10, 0), (12, 0)]
    assert capabilities["mma", "half", "any", 64, 16385] == [(8, 0), (12, 0)]
    assert capabilities["mma", "tf32", "any", 64, 257] == [(8, 0), (9, 0), (10, 0), (12, 0)]
    assert capabilities["wgmma", "half", "any", 64, 16385] == [(9, 0)]
    assert all(row.source.startswith("measured on ") for row in config.committed_table() if row not in counted)


def test_the_search_finds_what_is_fastest_and_leaves_out_what_fails():
    best = Config(128, 64, 32, 8, 2)

    def cost(cut: Config) -> float:
        if cut.block_k == 128:
            return float("inf")
        return 1.0 + sum(a != b for a, b in zip(dataclasses.astuple(cut), dataclasses.astuple(best), strict=True))

    times = tiles.search(OWN.tiles, cost)
    assert min(times, key=times.__getitem__) == best and times[best] == 1.0
    assert all(each.block_k != 128 for each in times)


def test_new_rows_take_the_place_of_old_ones():
    other = OWN._replace(tokens=2049)
    again = OWN._replace(tiles=Config(16, 16, 16, 4, 2))
    assert tiles.merged([again], [OWN, other]) == [again, other]


def test_rows_are_json_that_people_can_read():
    row = json.loads(config.TABLE.read_text())["rows"][0]
    assert set(row) == {"family", "precision", "layout", "rank", "tokens", "tiles", "shared", "source"}
