"""The files of an adapter bank: what was committed is there and whole, and everything else is refused by name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fuzzing
import pytest
import torch
from helpers import interrupted_at
from hypothesis import event, given
from test_adapter_file import mlp
from test_fuzz_files import _change, _set, changed_bytes, damages
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels import AdapterMismatch
from loraxs_kernels.bank import environment as bank_environment
from loraxs_kernels.bank import store as bank_store
from loraxs_kernels.cli import main
from loraxs_kernels.files import sealed, tensors_of, unsealed
from loraxs_kernels.matching import adapted_layers

lmdb = pytest.importorskip("lmdb")

OPTIONS = dict(target_modules=["0", "2"], rank_pattern={"2": 3})
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def trained(seed: int = 1, alpha: float = 8.0, model: nn.Module | None = None, **options) -> nn.Module:
    """A small adapted model: the same A and B for each seed, another R."""
    model = lx.attach(model or mlp(), 4, alpha=alpha, modules_to_save=["3"], **(OPTIONS | options))
    torch.manual_seed(seed)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.R)
    return model


def R_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"0": torch.randn(4, 4, generator=generator), "2": torch.randn(3, 3, generator=generator)}


def flat(R: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([R["0"].flatten(), R["2"].flatten()])


def in_model(model: nn.Module) -> torch.Tensor:
    return flat({name: layer.R.detach() for name, layer in adapted_layers(model)})


@pytest.fixture
def bank(tmp_path):
    with lx.AdapterBank.create(tmp_path / "bank", trained()) as bank:
        yield bank


def child(code: str, *arguments: object, **options) -> subprocess.Popen:
    """A process that runs code after these imports; `path` is its first argument."""
    start = "import os, sys, torch\nimport loraxs_kernels as lx\npath = sys.argv[1]\n"
    start += "def R(i):\n    return {'0': torch.full((4, 4), float(i)), '2': torch.full((3, 3), float(i))}\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def ended(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trips(tmp_path, dtype):
    """From a model, a file and tensors, and back to a file, which loads as the model was."""
    model = trained(2, alpha=4.0)
    lx.save_adapter(model, tmp_path / "file.safetensors")
    with lx.AdapterBank.create(tmp_path / "bank", trained(), dtype=dtype) as bank:
        bank.add("model", model)
        bank.add("file", tmp_path / "file.safetensors")
        bank.add("tensors", R_of(3))
        assert (len(bank), list(bank), "file" in bank, "none" in bank) == (3, ["file", "model", "tensors"], True, False)
        assert bank.modules == (("0", 4), ("2", 3)) and bank.size == 25 and bank.alphas == {"0": 8.0, "2": 8.0}
        rounded = in_model(model).to(bank.dtype).float()
        assert torch.equal(bank.read("model"), rounded / 2) and torch.equal(bank.read("file"), rounded / 2)
        assert torch.equal(bank.read("tensors"), flat(R_of(3)).to(bank.dtype).float())
        out = torch.zeros(30)[5:]
        assert bank.read("file", out) is out and torch.equal(out, rounded / 2)
        stored, alphas = bank.record("model")
        assert alphas == {"0": 4.0, "2": 4.0} and {R.dtype for R in stored.values()} == {bank.dtype}
        bank.export("file", tmp_path / "again.safetensors")
    lx.save_adapter(model, tmp_path / "same.safetensors", dtype=dtype)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    loaded = lx.load_adapter(mlp(), tmp_path / "again.safetensors")
    assert torch.equal(in_model(loaded), rounded) and loaded[0].alpha == 4.0


def test_given_factors_travel_with_the_bank(tmp_path):
    torch.manual_seed(0)
    options = {"init": {"0": (torch.randn(4, 20), torch.randn(30, 4))}, "target_modules": ["0"], "rank_pattern": None}
    model = trained(**options)
    with lx.AdapterBank.create(tmp_path / "bank", model) as bank:
        bank.add("a", model)
        bank.export("a", tmp_path / "a.safetensors")
    loaded = lx.load_adapter(mlp(), tmp_path / "a.safetensors")
    assert torch.equal(loaded[0].A, model[0].A) and torch.equal(loaded[0].R, model[0].R)


def test_a_model_of_transformers(minilm, tmp_path):
    model = lx.attach(minilm, 8, target_modules=["query", "value"])
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.R)
    lx.save_adapter(model, tmp_path / "a.safetensors")
    with lx.AdapterBank.create(tmp_path / "bank", model) as bank:
        bank.add("a", tmp_path / "a.safetensors")
        bank.export("a", tmp_path / "b.safetensors")
        assert (
            bank.base_model and (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        )
        bank.check_basis(dict(adapted_layers(model)))
        entries, names, _ = bank.entries, bank.modules_to_save, bank.saved
        assert len(entries) == 12 and names == [] and all(entry["rank"] == 8 for entry in entries.values())


def test_turned_signs_are_found(bank):
    """Singular vectors of the same weights with one pair turned: the same delta W with R turned, too."""
    model, same = trained(5), trained(5)
    for _, layer in adapted_layers(model):
        layer.A[1] *= -1
        layer.B[:, 1] *= -1
    bank.add("turned", model)
    for name, layer in adapted_layers(same):
        own = dict(adapted_layers(model))[name]
        sign = torch.ones(layer.rank).index_fill(0, torch.tensor(1), -1)
        assert torch.allclose(bank.read("turned")[bank.places[name]].view_as(own.R), own.R * torch.outer(sign, sign))
    with pytest.raises(AdapterMismatch, match="delta W in module"):  # which the records of a bank were not
        bank.check_basis(dict(adapted_layers(model)))


def test_names(bank):
    names = ["a/b c", "Zoë", "\U0001f600", "é" * 255, "x" * 511, "..", "-1"]
    assert bank.add_many({name: R_of(i) for i, name in enumerate(names)}) == len(names)
    assert list(bank) == sorted(names)
    assert all(torch.equal(bank.read(name), flat(R_of(i))) for i, name in enumerate(names))
    for name in ("", "x" * 512, "a\0b", "\ud800"):
        with pytest.raises(ValueError, match=r"^name: "):
            bank.add(name, R_of(0))
        assert name not in bank
    with pytest.raises(TypeError, match="name: got a int"):
        bank.read(3)
    for call in (bank.read, bank.record, bank.remove, lambda name: bank.export(name, "never")):
        with pytest.raises(KeyError, match="has no adapter 'nobody'"):
            call("nobody")


def test_names_are_read_in_pages(bank, monkeypatch):
    monkeypatch.setattr(bank_store, "PAGE", 7)
    bank.add_many((f"{i:03}", R_of(i)) for i in range(50))
    names = iter(bank)
    assert next(names) == "000"
    bank.remove("049")
    bank.add("0000", R_of(0))
    assert list(names) == [f"{i:03}" for i in range(1, 49)]


def test_names_are_read_to_their_end_and_no_further(bank, monkeypatch):
    monkeypatch.setattr(bank_store, "PAGE", 3)
    bank.add_many((f"{i}", R_of(i)) for i in range(6))  # full pages alone
    for count in (6, 3, 1, 0):
        for name in list(bank)[count:]:
            bank.remove(name)
        assert list(bank) == [f"{i}" for i in range(count)]
    bank.add("a", R_of(0))
    for added, name in enumerate(bank):
        assert added < 3, "the loop follows the names that it adds"
        bank.add(name + "a", R_of(0))


def test_what_is_there_is_replaced_only_when_asked(bank):
    bank.add("a", R_of(1))
    with pytest.raises(ValueError, match=r"has an adapter 'a' already; replace=True"):
        bank.add_many({"b": R_of(2), "a": R_of(2)})
    assert list(bank) == ["a"]
    with pytest.raises(ValueError, match="has the name 'c' twice"):
        bank.add_many([("c", R_of(1)), ("c", R_of(2))])
    bank.add("a", R_of(2), replace=True)
    assert torch.equal(bank.read("a"), flat(R_of(2))) and len(bank) == 1
    bank.remove("a")
    assert len(bank) == 0 and list(bank) == []


def test_a_folder_of_files(bank, tmp_path):
    (tmp_path / "files").mkdir()
    for i in range(3):
        lx.save_adapter(trained(i), tmp_path / "files" / f"user.{i}.safetensors")
    assert bank.add_many(tmp_path / "files") == 3
    assert list(bank) == ["user.0", "user.1", "user.2"] and torch.equal(bank.read("user.2"), in_model(trained(2)))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        bank.add_many(tmp_path / "none")
    with pytest.raises(ValueError, match="items: got ''"):
        bank.add_many("")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        bank.add_many(tmp_path / "bank" / "..", replace=True)


def test_all_or_nothing_of_many(bank, monkeypatch):
    """Records that do not fit in memory wait in a file; one that is wrong takes all with it."""
    monkeypatch.setattr(bank_store, "IN_MEMORY", 1000)
    wrong = R_of(7) | {"2": torch.full((3, 3), torch.nan)}
    with pytest.raises(ValueError, match="adapter 'z': module '2': R has NaN or Inf values"):
        bank.add_many((f"n{i}" if i < 99 else "z", R_of(i) if i < 99 else wrong) for i in range(100))
    assert len(bank) == 0
    assert bank.add_many((f"n{i}", R_of(i)) for i in range(100)) == 100 == len(bank)
    assert torch.equal(bank.read("n42"), flat(R_of(42)))
    assert sorted(each.name for each in bank.path.iterdir()) == ["basis.safetensors", "data.mdb", "lock.mdb"]


def other_weights(seed: int = 3) -> nn.Module:
    model = mlp()
    torch.manual_seed(seed)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight)
    return model


def nearly() -> nn.Module:
    model = mlp()
    model[0].weight.data += 1e-2 * torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) * 0.2
    return model


REFUSED = {
    "another base": (lambda: trained(model=other_weights()), "another base model"),
    "a recipe": (lambda: trained(init="random"), "recipe than the bank's .init 'random' and not 'svd'"),
    "weights": (lambda: trained(model=nearly()), "not quite the bank's.*portable=True"),
    "modules": (lambda: trained(target_modules=["0"]), "other modules than the bank.*'2'"),
    "a rank": (lambda: trained(rank_pattern={"2": 2}), "module '2' has rank 2 there and 3 in the bank"),
}


@pytest.mark.parametrize("how", ["file", "model"])
@pytest.mark.parametrize("what", REFUSED)
def test_adapters_of_another_basis_are_refused(bank, tmp_path, what, how):
    make, message = REFUSED[what]
    model = make()
    lx.save_adapter(model, tmp_path / "other.safetensors", portable=True)
    given = model if how == "model" else tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=message) as refused:
        bank.add("a", given)
    assert (str(given) if how == "file" else "adapter 'a'") in str(refused.value)
    assert isinstance(refused.value, AdapterMismatch) == (what in ("another base", "a recipe", "weights"))
    assert len(bank) == 0


def test_a_dropout_that_a_bank_does_not_keep_is_told(bank, tmp_path):
    dropping = trained(dropout=0.25)
    lx.save_adapter(dropping, tmp_path / "a.safetensors")
    for what in (dropping, tmp_path / "a.safetensors"):
        with pytest.warns(UserWarning, match="dropout: is 0.25 in module '0' of an adapter and 0 in the bank") as seen:
            bank.add("alice", what, replace=True)
        assert len(seen) == 1
    bank.export("alice", tmp_path / "b.safetensors")
    assert lx.load_adapter(mlp(), tmp_path / "b.safetensors")[0].dropout == 0


@pytest.mark.parametrize("how", ["file", "model"])
def test_other_modules_to_save_are_refused(bank, tmp_path, how):
    model, without = trained(), lx.attach(mlp(), 4, **OPTIONS)
    with torch.no_grad():
        model[3].bias[0] += 1
    for each, message in (
        (model, r"'3\.bias' of its modules_to_save is not the bank's"),
        (without, "must be the bank"),
    ):
        lx.save_adapter(each, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=message):
            bank.add("a", each if how == "model" else tmp_path / "a.safetensors")
    assert len(bank) == 0


def test_tensors_that_cannot_be_R_are_refused(tmp_path):
    R = R_of(1)
    with lx.AdapterBank.create(tmp_path / "bank", trained(), dtype=torch.bfloat16) as bank:
        for what, message, *error in (
            (R | {"0": torch.zeros(4, 3)}, r"module '0' is torch.float32 of shape \(4, 3\), .*must be dense, of shape"),
            (R | {"2": torch.zeros(3, 3, device="meta")}, "module '2' .* on meta, must .* in memory"),
            (R | {"2": torch.eye(3).to_sparse()}, "module '2' .*torch.sparse_coo.*, must be dense"),
            (R | {"2": torch.zeros(3, 3, dtype=torch.int32)}, "module '2' is torch.int32.*floating-point"),
            (R | {"2": [[1.0]]}, "module '2' is a list, must be a tensor", TypeError),
            (R | {"2": torch.full((3, 3), torch.inf)}, "module '2': R has NaN or Inf"),
            (R | {"2": torch.full((3, 3), 3.4e38)}, r"module '2': R has values too large \(up to 3.4e\+38\)"),
            (R | {"1": torch.zeros(3, 3)}, "other modules than the bank.*'1'"),
            ({"0": R["0"]}, "other modules than the bank.*'2'"),
            (3, "what: got a int for 'a', must be the path", TypeError),
            (tmp_path / "none.safetensors", "none.safetensors", FileNotFoundError),
            (tmp_path, "the folder .* has no adapter.safetensors", FileNotFoundError),
            ("", "what: got '', must be the path of an adapter"),
        ):
            with pytest.raises((*error, ValueError)[0], match=message):
                bank.add("a", what)
        model = trained()
        with torch.no_grad():
            model[2].R[0, 0] = torch.nan
        with pytest.raises(ValueError, match="adapter 'a': module '2': R has NaN"):
            bank.add("a", model)
        big = R | {"2": torch.full((3, 3), 1e38)}
        bank.add("a", big)
        assert list(bank) == ["a"]
        for out in (torch.zeros(24), torch.zeros(25).double(), [0.0] * 25):
            with pytest.raises(ValueError, match=r"out: got .*, must be a tensor of torch.float32 and shape \(25,\)"):
                bank.read("a", out)
    model = trained(alpha=8000.0)  # R fits, and does not once it is scaled to the alphas of the bank
    with torch.no_grad():
        model[2].R.fill_(1e36)
    with lx.AdapterBank.create(tmp_path / "other", trained()) as bank, pytest.raises(ValueError, match="module '2'"):
        bank.add("a", model)


def test_a_models_layers_are_checked(bank):
    bank.check_basis(dict(adapted_layers(trained(4))))
    for make, message in REFUSED.values():
        kind = AdapterMismatch if "bank's" in message or "base" in message else ValueError
        with pytest.raises(kind, match=re.escape(str(bank.path)) + "|^model: "):
            bank.check_basis(dict(adapted_layers(make())))


def test_opening(tmp_path):
    path = tmp_path / "bank"
    with pytest.raises(FileNotFoundError, match="path: there is no bank"):
        lx.AdapterBank(path)
    with pytest.raises(ValueError, match=r"^model: has no LoRA-XS adapters"):
        lx.AdapterBank.create(path, mlp())
    with pytest.raises(ValueError, match="must be without ~"):
        lx.AdapterBank.create("~/bank", trained())
    for call in (lx.AdapterBank, lambda path: lx.AdapterBank.create(path, trained())):
        with pytest.raises(ValueError, match="path: got '', must be the path of a bank"):
            call("")
    assert main(["bank", "list", ""]) == 1
    with pytest.raises(ValueError, match=r"dtype: got torch.float16"):
        lx.AdapterBank.create(path, trained(), dtype=torch.float16)
    with pytest.raises(ValueError, match="module '0': alpha is 0"):
        lx.AdapterBank.create(path, trained(alpha=0.0))
    assert not path.exists()
    bank = lx.AdapterBank.create(path, trained())
    with pytest.raises(ValueError, match="is a bank already"):
        lx.AdapterBank.create(path, trained())
    with pytest.raises(ValueError, match=r"mode: got \"w\"|mode: got 'w'"):
        lx.AdapterBank(path, "w")
    reader = lx.AdapterBank(str(path) + "/../bank")
    bank.add("a", R_of(1))
    assert list(reader) == ["a"]
    for call in (lambda: reader.add("b", R_of(1)), lambda: reader.remove("a")):
        with pytest.raises(ValueError, match='open for reading, must be opened with mode="a"'):
            call()
    bank.close()
    bank.close()
    with pytest.raises(ValueError, match="the bank is closed"):
        bank.read("a")
    assert torch.equal(reader.read("a"), flat(R_of(1)))
    reader.close()
    shutil.copytree(path, tmp_path / "copy")
    shutil.rmtree(path)
    with lx.AdapterBank(tmp_path / "copy", "a") as copy:
        copy.add("b", R_of(2))
        assert list(copy) == ["a", "b"]


def test_weights_that_were_rounded_since_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"bank: A and B of 2 modules, the first .*'0'.* not to this model as it is"):
        lx.AdapterBank.create(tmp_path / "bank", trained().bfloat16().float()).close()


def test_files_that_do_not_belong_together(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        with lx.AdapterBank.create(tmp_path / name, trained(model=other_weights(seed))) as bank:
            bank.add("a", R_of(1))
    shutil.copy(tmp_path / "one" / "basis.safetensors", tmp_path / "two")
    with pytest.raises(ValueError, match=r"two: is damaged: basis.safetensors and data.mdb are not of the same bank"):
        lx.AdapterBank(tmp_path / "two")
    (tmp_path / "foreign").mkdir()
    with lmdb.open(str(tmp_path / "foreign")) as foreign, foreign.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(ValueError, match=r"data.mdb has records and is no bank's"):
        lx.AdapterBank.create(tmp_path / "foreign", trained())
    shutil.copy(tmp_path / "one" / "basis.safetensors", tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"foreign: is damaged: data.mdb is no bank's"):
        lx.AdapterBank(tmp_path / "foreign")
    data = (tmp_path / "one" / "data.mdb").read_bytes()
    (tmp_path / "one" / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"data.mdb: is damaged: it has \d+ bytes and must have \d+; copy it again"):
        lx.AdapterBank(tmp_path / "one")
    (tmp_path / "one" / "data.mdb").write_bytes(b"x" * len(data))
    with pytest.raises(ValueError, match=r"data.mdb: is damaged: LMDB says"):
        lx.AdapterBank(tmp_path / "one")


def test_without_lmdb(tmp_path):
    lx.AdapterBank.create(tmp_path / "bank", trained()).close()
    code = "sys.modules['lmdb'] = None\ntry:\n    lx.AdapterBank(path)\nexcept ImportError as error:\n    print(error)"
    said = ended(child(code, tmp_path / "bank"))
    assert said == 'an adapter bank needs the package lmdb: pip install "loraxs_kernels[bank]"\n'
    code = code.replace("sys.modules['lmdb'] = None", "import lmdb\nlmdb.__version__ = '2.2.1'")
    assert "needs lmdb 2.3 or later, got 2.2.1" in ended(child(code, tmp_path / "bank"))


def test_a_damaged_record_is_refused_by_name(bank):
    """Each byte of a value is under its checksum; the others are read, and verify names the one."""
    names = [f"n{i}" for i in range(20)]
    bank.add_many((name, R_of(i)) for i, name in enumerate(names))
    path, data = bank.path / "data.mdb", None
    value = bytes(bank._value("n7"))
    bank.close()
    data = path.read_bytes()
    at = data.rindex(value)
    for offset in (0, 33, 37, 40, len(value) - 1):
        path.write_bytes(data[: at + offset] + bytes([data[at + offset] ^ 4]) + data[at + offset + 1 :])
        with lx.AdapterBank(bank.path) as opened:
            with pytest.raises(ValueError, match="adapter 'n7': is damaged: its SHA-256"):
                opened.read("n7")
            assert list(opened.verify()) == ["n7"]
            assert all(torch.equal(opened.read(n), flat(R_of(i))) for i, n in enumerate(names) if n != "n7")


def test_records_that_no_bank_wrote(bank):
    """With the right checksum, as no accident would leave them: under another name, of another length or version."""
    bank.add("a", R_of(1))
    whole, key = bytes(bank._value("a")), b"a"

    def store(key: bytes, rest: bytes) -> None:
        value = bank._checksum(key, rest) + rest
        bank._run(lambda txn: txn.put(key, value), write=True)

    rest = whole[32:]
    for changed, message in (
        (rest[:-4], "its record has"),
        (b"\x02" + rest[1:], "is of version 2"),
        (rest[:4] + b"\xff\xff\xff\xff" + rest[8:], "its record has"),
        (rest[:4] + b"\x01" + rest[5:8] + b"\x09" + bytes(11) + rest[8:], "its alphas"),
        (rest[:4] + b"\x01" + rest[5:8] + bytes(4) + b"\xff" * 8 + rest[8:], "its alphas"),
        (b"", "SHA-256"),
        (rest[:-4] + b"\xff\xff\xff\xff", None),
    ):
        store(key, changed)
        if message:
            with pytest.raises(ValueError, match=message):
                bank.read("a")
        assert list(bank.verify()) == ["a"]
    bank.add("a", R_of(1), replace=True)
    bank._run(lambda txn: txn.put(b"b", whole), write=True)
    with pytest.raises(ValueError, match="adapter 'b': is damaged: its SHA-256"):
        bank.read("b")
    bank.remove("b")
    store(b"\xff", rest)
    assert [name.encode("utf-8", "surrogateescape") for name in bank.verify()] == [b"\xff"]
    with pytest.raises(ValueError, match="name that is not in UTF-8"):
        list(bank)


@posix
def test_what_was_committed_survives_kill(tmp_path):
    """100 writers killed at random moments: what each has told is there and whole, and the next one goes on."""
    path = tmp_path / "bank"
    lx.AdapterBank.create(path, trained()).close()
    code = """
import random, signal, time
random.seed(0)
told = []
for _ in range(100):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        bank = lx.AdapterBank(path, "a")
        for i in range(len(told), len(told) + 1000):
            bank.add(f"n{i}", R(i), replace=True)
            os.write(writer, b"%d\\n" % i)
        os._exit(0)
    os.close(writer)
    first = os.read(reader, 1)
    time.sleep(random.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(reader) as f:
        told += (first.decode() + f.read()).split()
    with lx.AdapterBank(path) as bank:
        assert bank.verify() == {}
        for i in told[-100:]:
            assert torch.equal(bank.read(f"n{i}"), torch.full((25,), float(i)))
        assert set(bank) >= {f"n{i}" for i in told}
print(len(told))
"""
    assert int(ended(child(code, path, env=os.environ | {"OMP_NUM_THREADS": "1"}))) >= 100


@posix
def test_a_killed_create_can_be_made_again(tmp_path, monkeypatch):
    """Stopped before basis.safetensors, and after it: no bank is there until all is."""
    for k, (module, name) in enumerate([(bank_store, "write_atomically"), (bank_store, "sha256_of")]):
        path = tmp_path / f"bank{k}"
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)  # a child has none of the threads of the pool that it remembers
                setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                lx.AdapterBank.create(path, trained())
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert (path / "basis.safetensors").exists() == (k == 1)
        with pytest.raises((FileNotFoundError, ValueError), match=r"there is no bank|creation was not finished"):
            lx.AdapterBank(path)
        with lx.AdapterBank.create(path, trained()) as bank:
            bank.add("a", R_of(1))
            assert bank.verify() == {} and len(bank) == 1


@posix
def test_a_full_disk_leaves_what_was(tmp_path):
    with lx.AdapterBank.create(tmp_path / "bank", trained()) as bank:
        bank.add("a", R_of(1))
        size = os.path.getsize(bank.path / "data.mdb")
    code = """
import resource
bank = lx.AdapterBank(path, "a")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
for many in (False, True):
    try:
        for n in range(100):
            bank.add_many((f"b{many}{n}.{i}", R(i)) for i in range(1000 if many else 1))
    except OSError as error:
        assert path in str(error), error
    else:
        raise SystemExit("was not refused")
print(len(bank), bank.verify())
"""
    there, damaged = ended(child(code, bank.path, size + 8192)).split(maxsplit=1)
    assert damaged == "{}\n"
    with lx.AdapterBank(bank.path, "a") as bank:
        assert len(bank) == int(there) and bank.verify() == {} and torch.equal(bank.read("a"), flat(R_of(1)))
        bank.add_many((f"c{i}", R_of(i)) for i in range(2000))
        assert len(bank) == int(there) + 2000


READER = """
bank = lx.AdapterBank(path)
print("ready", flush=True)
last = 0
while last < 40:
    n = len(bank)
    assert n >= last
    last = n
    for name in bank:
        R = bank.read(name)
        assert (R == R[0]).all() and int(R[0]) == int(name.split('.')[0])
print(last)
"""


def test_a_map_that_cannot_grow_leaves_the_bank_usable(bank, monkeypatch):
    bank.add("a", R_of(1))
    grow = bank._environment._resize
    monkeypatch.setattr(bank._environment, "run", lambda *_: grow(2**62))
    with pytest.raises(OSError, match=r"LMDB cannot map .* MiB of the file, .*: '.*bank'"):
        bank.add("b", R_of(2))
    assert list(bank) == ["a"]
    bank.add("b", R_of(2))
    with lx.AdapterBank(bank.path) as again:
        assert list(again) == ["a", "b"]


@posix
def test_a_reader_that_was_killed_lets_the_file_grow_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_environment, "FIRST_MAP", 2**16)
    with lx.AdapterBank.create(tmp_path / "bank", trained()) as bank:
        pid = os.fork()
        if pid == 0:
            list(bank)
            reading = bank._environment.lmdb.begin()  # noqa: F841
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        for i in range(100):
            bank.add("a", R_of(i), replace=True)
        assert bank._environment.lmdb.info()["map_size"] <= 2**17


def test_ctrl_c_in_a_read_lets_the_map_grow_and_the_process_fork(bank):
    """At any line but that which ends the transaction for others, and is one step."""
    bank.add("a", R_of(1))
    gate, k, left = bank_environment._gate, 0, 0
    while interrupted_at(k := k + 1, lambda: bank.read("a"), "/bank/environment"):
        left += len(gate.inside)
        gate.inside.clear()
    assert k > 15 and left <= 1
    bank._environment._resize(2**22)
    assert torch.equal(bank.read("a"), flat(R_of(1)))


def test_ctrl_c_before_a_fork_keeps_nothing_shut(bank, monkeypatch):
    """Python forks all the same."""

    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bank_environment.time, "sleep", stopped)
    with pytest.raises(KeyboardInterrupt):
        bank._run(lambda _: bank_environment._before_fork())
    bank_environment._after_fork()
    assert not bank_environment._lock.locked() and list(bank) == []


def test_processes_read_while_one_writes_and_the_map_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_environment, "FIRST_MAP", 2**16)
    path = tmp_path / "bank"
    with lx.AdapterBank.create(path, trained()) as bank:
        readers = [child(READER, path) for _ in range(2)]
        assert [reader.stdout.readline() for reader in readers] == ["ready\n"] * 2
        first = bank._environment.lmdb.info()["map_size"]
        for i in range(40):
            bank.add(str(i), {name: torch.full((r, r), float(i)) for name, r in bank.modules})
            if i == 20:
                R = {name: torch.full((r, r), 1000.0) for name, r in bank.modules}
                bank.add_many((f"1000.{k}", R) for k in range(2000))
        assert bank._environment.lmdb.info()["map_size"] > 4 * first
        assert [int(ended(reader)) >= 40 for reader in readers] == [True] * 2


def test_threads_read_and_write(tmp_path, monkeypatch):
    """Readers of this process while the map moves: no memory of it is held outside of a transaction."""
    monkeypatch.setattr(bank_environment, "FIRST_MAP", 2**16)
    bank, R = lx.AdapterBank.create(tmp_path / "bank", trained()), R_of(0)
    bank.add_many((f"n{i}", R_of(i)) for i in range(50))
    first, wrong = bank._environment.lmdb.info()["map_size"], []
    expected = [flat(R_of(i)) for i in range(50)]
    stop = threading.Event()

    def read() -> None:
        with lx.AdapterBank(bank.path) as own:
            while not stop.is_set():
                for i in range(50):
                    if not torch.equal(own.read(f"n{i}"), expected[i]):
                        wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for k in range(8):
            bank.add_many((f"m{k}.{i}", R) for i in range(300))
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and bank._environment.lmdb.info()["map_size"] > 4 * first
    bank.close()


@posix
def test_a_fork_opens_the_bank_anew(tmp_path):
    """While threads of the parent read, so that locks are held and transactions under way."""
    path = tmp_path / "bank"
    lx.AdapterBank.create(path, trained()).close()
    code = """
import threading
bank, again = lx.AdapterBank(path, "a"), lx.AdapterBank(path)
bank.add("a", R(1))
stop = threading.Event()
def read():
    while not stop.is_set():
        assert again.read("a")[0] == 1
threads = [threading.Thread(target=read) for _ in range(3)]
for thread in threads:
    thread.start()
for i in range(20):
    pid = os.fork()
    if pid == 0:
        assert again.read("a")[0] == 1
        bank.add(f"child{i}", R(i))
        assert list(again) == list(bank) and f"child{i}" in again
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    bank.add(f"parent{i}", R(i))
stop.set()
for thread in threads:
    thread.join()
assert bank.verify() == {}
print(len(bank))
"""
    assert ended(child(code, path, env=os.environ | {"OMP_NUM_THREADS": "1"})) == "41\n"


@fuzzing.cases(300)
@given(damages())
def test_a_damaged_basis_is_refused(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        with lx.AdapterBank.create(folder, trained()) as bank:
            bank.add("a", R_of(1))
        shutil.copy(folder / "basis.safetensors", folder / "whole")
    path, whole = folder / "basis.safetensors", (folder / "whole").read_bytes()
    path.write_bytes(whole)
    _retie(folder)
    if damage["how"] in ("field", "tensor"):
        header, f = unsealed(path, "loraxs_bank", "file")
        tensors = tensors_of(f, path)
        if damage["how"] == "field":
            _set(header, damage["path"], damage["value"])
        else:
            _change(tensors, sorted(tensors)[int(damage["at"] * len(tensors))], damage["change"])
        data = b"".join(sealed(tensors, "loraxs_bank", header))
    else:
        data = changed_bytes(whole, damage)
    path.write_bytes(data)
    try:
        lx.AdapterBank(folder).close()
    except ValueError as refusal:
        event(f"{damage['how']} refused")
        assert str(folder) in str(refusal), refusal
    else:
        assert data == whole
    path.write_bytes(data)
    _retie(folder)  # as no accident would do it
    try:
        with lx.AdapterBank(folder) as bank:
            assert bank.entries and bank.verify().keys() <= {"a"}
    except ValueError as refusal:
        assert str(folder) in str(refusal), refusal


def _retie(folder: Path) -> None:
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as txn:
        digest = hashlib.sha256((folder / "basis.safetensors").read_bytes()).digest()
        txn.put(bank_store.TIE, bank_store.LAYOUT.to_bytes(4, "little") + digest)


def test_a_bank_of_an_earlier_version_serves(tmp_path):
    """One whose basis says a tier in its header, as format version 2 did."""
    lx.AdapterBank.create(tmp_path / "bank", trained()).close()
    file = tmp_path / "bank" / "basis.safetensors"
    header, f = unsealed(file, "loraxs_bank", "file")
    tensors = tensors_of(f, file)

    def say(tier: str) -> None:
        earlier = header | {"version": 2, "layer": header["layer"] | {"tier": tier}}
        file.write_bytes(b"".join(sealed(tensors, "loraxs_bank", earlier)))
        _retie(tmp_path / "bank")

    say("precise")
    with lx.AdapterBank(tmp_path / "bank", "a") as bank:
        bank.add("a", trained(2))
        bank.check_basis(dict(adapted_layers(trained())))
        bank.export("a", tmp_path / "a.safetensors")
    assert torch.equal(in_model(lx.load_adapter(mlp(), tmp_path / "a.safetensors")), in_model(trained(2)))
    say("fast")
    with pytest.raises(ValueError, match=r"basis\.safetensors: is damaged: .* tier: got 'fast', must be"):
        lx.AdapterBank(tmp_path / "bank")


def test_commands(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=50
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "files").mkdir()
    for i in range(3):
        model = transformers.BertModel.from_pretrained(tmp_path / "model")
        lx.attach(model, 4, target_modules=["query"])
        nn.init.normal_(next(adapted_layers(model))[1].R)
        lx.save_adapter(model, tmp_path / "files" / f"user{i}.safetensors")
    bank, file, model = (str(tmp_path / name) for name in ("bank", "files/user1.safetensors", "model"))

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["bank", *arguments]), *capsys.readouterr()

    (tmp_path / "folder").mkdir()
    shutil.copy(file, tmp_path / "folder" / "adapter.safetensors")
    for folder, adapter in ((f"{bank}-2", str(tmp_path / "folder")), (bank, file)):
        status, out, _ = run("create", folder, "--model", model, "--adapter", adapter)
        assert status == 0 and out.startswith(f"{folder}: a bank for 1 modules")
    assert run("add", bank, str(tmp_path / "files")) == (0, f"{bank}: 3 adapters added\n", "")
    status, out, err = run("add", bank, file)
    assert (status, out) == (1, "") and re.fullmatch(r"loraxs bank: .*has an adapter 'user1' already.*\n", err)
    assert run("add", bank, file, "--replace")[0] == 0
    assert run("list", bank) == (0, "user0\nuser1\nuser2\n", "")
    assert run("verify", bank) == (0, f"{bank}: 3 adapters, all whole\n", "")
    assert run("remove", bank, "user0")[0] == 0 and run("list", bank)[1] == "user1\nuser2\n"
    assert run("export", bank, "user1", "-o", str(tmp_path / "out.safetensors"))[0] == 0
    assert (tmp_path / "out.safetensors").read_bytes() == Path(file).read_bytes()
    for arguments in (
        ("list", "none"),
        ("export", bank, "nobody", "-o", "x"),
        ("remove", bank, "nobody"),
        ("add", bank, "none.safetensors"),
        ("add", bank, ""),
        ("create", bank, "--model", model, "--adapter", file),
        ("create", "x", "--model", model, "--adapter", ""),
        ("create", "x", "--model", "", "--adapter", file),
        ("create", "x", "--model", str(tmp_path), "--adapter", file),
    ):
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("loraxs bank: "), err
    with lx.AdapterBank(bank) as opened:
        value = bytes(opened._value("user2"))
    data = (tmp_path / "bank" / "data.mdb").read_bytes()
    (tmp_path / "bank" / "data.mdb").write_bytes(data.replace(value, value[:-1] + bytes([value[-1] ^ 1])))
    status, out, err = run("verify", bank)
    assert status == 1 and "'user2'" in err and err.count("\n") == 1


def test_the_name_of_a_file_is_all_of_it_but_the_ending(tmp_path, bank, capsys):
    bank.add("alice", R_of(1))
    before = bank.digests(["alice"])
    (tmp_path / "files").mkdir()
    for name in ("alice.v2", "files/bob.v2.safetensors", "files/carol.SAFETENSORS"):
        lx.save_adapter(trained(2), tmp_path / name)
    assert main(["bank", "add", str(bank.path), *(str(tmp_path / name) for name in ("alice.v2", "files"))]) == 0
    assert "1 not named *.safetensors left out, the first 'carol.SAFETENSORS'" in capsys.readouterr().err
    bank.add("x\ny", R_of(1))
    lx.save_adapter(trained(3), f"{tmp_path}/dave/")
    bank.add("eve", tmp_path / "dave")
    assert main(["bank", "add", str(bank.path), str(tmp_path / "dave")]) == 0
    assert torch.equal(bank.read("dave"), bank.read("eve"))
    capsys.readouterr()
    assert main(["bank", "list", str(bank.path)]) == 0
    assert capsys.readouterr().out == 'alice\nalice.v2\nbob.v2\ndave\neve\n"x\\ny"\n'
    assert bank.digests(["alice"]) == before


def test_what_is_not_the_bank_s_is_not_written_over(tmp_path, bank):
    bank.add("a", R_of(1))
    for file in ("basis.safetensors", "data.mdb", "lock.mdb"):
        for folder in (bank.path, shutil.copytree(bank.path, tmp_path / "copy", dirs_exist_ok=True)):
            with pytest.raises(ValueError, match=r"path: .* is a file of a bank"):
                bank.export("a", folder / file)
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match=r"path: .*config\.json is there and is damaged or no LoRA-XS adapter"):
        bank.export("a", config)
    assert config.read_text() == "{}"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "basis.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there and is no bank's"):
        lx.AdapterBank.create(tmp_path / "other", trained())
    assert (tmp_path / "other" / "basis.safetensors").read_bytes() == b"mine"


@posix
def test_copying_an_open_bank_takes_nobodys_locks(tmp_path):
    """The copy opens and closes lock.mdb in this process; then another process writes beside it."""
    with lx.AdapterBank.create(tmp_path / "bank", trained()) as bank:
        bank.add("before", R_of(0))
        shutil.copytree(bank.path, tmp_path / "copy")
        code = """
for i in range(50):
    with lx.AdapterBank(path, "a") as bank:
        bank.add(f"b{i}", R(i))
"""
        process = child(code, bank.path)
        mine = 0
        while process.poll() is None or mine < 50:
            bank.add(f"a{mine}", R_of(mine))
            mine += 1
        ended(process)
        assert len(bank) == 1 + 50 + mine and bank.verify() == {} and bank


def test_a_bank_that_was_replaced_takes_nothing(tmp_path):
    with lx.AdapterBank.create(tmp_path / "bank", trained()) as bank:
        shutil.rmtree(tmp_path / "bank")
        with pytest.raises((ValueError, FileNotFoundError), match="bank"):
            bank.add("a", R_of(1))
        if lmdb.__version__.startswith("2."):
            with pytest.raises(OSError, match=r"if data\.mdb was replaced, close the bank that was opened before"):
                lx.AdapterBank.create(tmp_path / "bank", trained())
            return
        with lx.AdapterBank.create(tmp_path / "bank", trained()) as new:
            with pytest.raises(ValueError, match=r"data\.mdb was replaced since the bank was opened"):
                bank.add("a", R_of(1))
            new.add("b", R_of(1))
            assert new.names() == ["b"]
