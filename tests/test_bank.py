"""AdapterBank on a model: mixed batches, generation, slots, checkpointing, training, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import os
import pickle
import shutil
import signal
import threading
from functools import partial

import pytest
import torch
from helpers import interrupted_at
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import loraxs_kernels as lx
from loraxs_kernels import linear
from loraxs_kernels.integrations.reference_repo import export_as_lora
from loraxs_kernels.linear import LoraXSLinear
from loraxs_kernels.matching import adapted_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("lmdb")

NAMES = ["alice", "bob", "carol", "dave", "eve"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(0, 96, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def tuned(base):
    """A model for each name, with an adapter of its own; None: the base model."""
    attached = lx.attach(copy.deepcopy(base), 4, target_modules=TARGETS, rank_pattern={"down_proj": 6}, progress=False)
    models = {None: base}
    for seed, name in enumerate(NAMES):
        models[name], g = copy.deepcopy(attached), torch.Generator().manual_seed(seed)
        for _, layer in adapted_layers(models[name]):
            layer.R.data = torch.randn(layer.R.shape, generator=g)
    return models


@pytest.fixture(scope="module")
def folder(tuned, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank"
    with lx.AdapterBank.create(path, tuned["alice"]) as bank:
        bank.add_many({name: tuned[name] for name in NAMES})
    return path


@pytest.fixture
def bank(folder, tmp_path):
    """A bank of one's own to write to."""
    shutil.copytree(folder, tmp_path / "bank")
    with lx.AdapterBank(tmp_path / "bank", "a") as opened:
        yield opened


@pytest.fixture
def model(base, bank):
    return bank.attach(copy.deepcopy(base), slots=4, progress=False)


@contextlib.contextmanager
def serving(plain, folder, names=NAMES[:2], rank=4, **how):
    """A model for each name as `tuned` has them; a bank of their adapters; and the base model with that bank."""
    attached = lx.attach(copy.deepcopy(plain), rank, progress=False, **how)
    models = {None: plain} | {name: copy.deepcopy(attached) for name in names}
    for name in names:
        for _, layer in adapted_layers(models[name]):
            nn.init.normal_(layer.R)
    with lx.AdapterBank.create(folder / "bank", attached) as bank:
        bank.add_many({name: models[name] for name in names})
        yield models, bank, bank.attach(copy.deepcopy(plain), progress=False)


def alone(tuned, names, ids=IDS):
    return torch.cat([tuned[name](ids[i : i + 1]).logits for i, name in enumerate(names)])


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_mixed_batch_gives_each_sample_its_own_adapter(model, tuned, base, bank):
    for names in (["alice", None, "bob", "alice"], ["carol", "dave", "eve", "bob"], [None] * 4, ["eve"] * 4):
        assert_close(model(IDS, adapter_ids=names).logits, alone(tuned, names))
    with bank.select(["bob", "bob", None, "carol"]):
        assert_close(model(input_ids=IDS).logits, alone(tuned, ["bob", "bob", None, "carol"]))
        assert model.model.layers[0].self_attn.q_proj(torch.zeros(0, 32)).shape == (0, 32)  # of no sample
        assert_close(model(IDS, adapter_ids=["eve"] * 4).logits, alone(tuned, ["eve"] * 4))
        with pytest.raises(RuntimeError, match="a block is open in this thread"), bank.select(["eve"] * 4):
            pass
        assert_close(model(IDS).logits, alone(tuned, ["bob", "bob", None, "carol"]))
    assert_close(model(IDS).logits, base(IDS).logits)


@torch.no_grad()
def test_packed_sequences_have_an_index_for_each_token(model, tuned, bank):
    lengths, names = [7, 5, 7, 3], ["alice", None, "bob", "alice"]
    packed = torch.cat([IDS[i, :n] for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]
    tokens = torch.tensor([0, -1, 1, 0]).repeat_interleave(torch.tensor(lengths))
    with bank.select(["alice", "bob"], tokens=tokens):
        logits = model(packed, position_ids=positions, attention_mask=blocks).logits[0]
    for i, part in enumerate(logits.split(lengths)):
        assert_close(part, tuned[names[i]](IDS[i : i + 1, : lengths[i]]).logits[0])
    for tokens in ([0] * 5, [0] * 4 + [1]):
        with (
            bank.select(["alice", "bob"], tokens=tokens),
            pytest.raises(ValueError, match="must have a row for each of 5 t"),
        ):
            model(IDS[:1, :6])


GREEDY_IN_EFFECT = {"do_sample": True, "temperature": 1e-4}  # one token has all the probability


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, GREEDY_IN_EFFECT | {"num_return_sequences": 3}],
    ids=str,
)
def test_generation_expands_the_names_as_it_does_the_prompts(model, tuned, options):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | options
    names = ["alice", None, "bob", "carol"]
    got = model.generate(IDS, adapter_ids=names, **options)
    expected = [tuned[name].generate(IDS[i : i + 1], **options) for i, name in enumerate(names)]
    longest = max(each.shape[1] for each in expected)
    assert torch.equal(got, torch.cat([F.pad(each, (0, longest - each.shape[1])) for each in expected]))


def test_an_encoder_decoder_generates(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    plain = transformers.T5ForConditionalGeneration(config).eval()
    with serving(plain, tmp_path, target_modules=["q", "v", "wo"]) as (models, _, model):
        names, options = ["alice", None, "bob"], {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5}
        got = model.generate(IDS[:3], adapter_ids=names, **options)
        expected = [models[name].generate(IDS[i : i + 1], **options) for i, name in enumerate(names)]
        assert torch.equal(got, torch.cat(expected))
        loss = model(input_ids=IDS[:3], labels=IDS[:3, :4].contiguous(), adapter_ids=names).loss
        each = [
            models[name](input_ids=IDS[i : i + 1], labels=IDS[i : i + 1, :4].contiguous()).loss
            for i, name in enumerate(names)
        ]
        assert_close(loss, torch.stack(each).mean())


def test_a_classifier_of_flattened_and_pooled_rows(tmp_path):
    """A module that no transformers class is, with rows of (samples * length, features) and of (samples, features)."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.flat, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, ids):
            hidden = self.flat(self.embed(ids).flatten(0, 1)).view(*ids.shape, 16)
            return self.head(hidden.mean(1))

    torch.manual_seed(0)
    plain, ids = Model(), torch.randint(0, 9, (3, 4))
    with serving(plain, tmp_path, rank=2, target_modules=["flat", "head"]) as (models, bank, model):
        names = ["bob", None, "alice"]
        assert_close(model(ids, adapter_ids=names), torch.cat([models[n](ids[i : i + 1]) for i, n in enumerate(names)]))
        with (
            bank.select(names),
            pytest.raises(ValueError, match=r"'flat'.* one sample in each entry of its first dimension of 3"),
        ):
            model.flat(torch.randn(5, 16))


def test_slots_go_to_those_used_last_and_are_filled_once(model, bank, monkeypatch):
    read, brought = bank.read, []
    monkeypatch.setattr(bank, "read", lambda name, out: (brought.append(name), read(name, out)))
    for names in (["alice", "bob"], ["carol", "dave"], ["alice", "bob"], ["eve", "alice"], ["bob", "carol"]):
        with torch.no_grad():
            model(IDS[:2], adapter_ids=names)
    assert brought == ["alice", "bob", "carol", "dave", "eve", "carol"]  # eve took carol's, carol then dave's


@torch.no_grad()
def test_slots_in_use_are_not_taken(model, tuned, bank):
    with bank.select(["alice", "bob", "carol", None]):
        assert_close(model(IDS[:1], adapter_ids=["dave"]).logits, alone(tuned, ["dave"]))
        assert_close(model(IDS[:1], adapter_ids=["eve"]).logits, alone(tuned, ["eve"]))
        with pytest.raises(RuntimeError, match="got 2 different adapters, must be at most 1: the other 3 of 4"):
            model(IDS[:2], adapter_ids=["dave", "eve"])
        assert_close(model(IDS).logits, alone(tuned, ["alice", "bob", "carol", None]))


@torch.no_grad()
def test_what_changes_in_the_bank_is_seen(model, tuned, folder, bank):
    assert_close(model(IDS[:1], adapter_ids=["alice"]).logits, alone(tuned, ["alice"]))
    bank.add("alice", tuned["bob"], replace=True)
    assert_close(model(IDS[:1], adapter_ids=["alice"]).logits, alone(tuned, ["bob"]))
    bank.remove("alice")
    with pytest.raises(KeyError, match="alice"):
        model(IDS[:1], adapter_ids=["alice"])


@torch.no_grad()
def test_what_is_replaced_while_it_is_used_has_two_slots_until_then(model, tuned, bank):
    def call(name):
        assert_close(model(IDS[:1], adapter_ids=["alice"]).logits, alone(tuned, [name]))

    with bank.select(["alice", "eve"]):
        for name in ("bob", "carol", "dave"):  # in more versions than there are slots, of which one is used at a time
            bank.add("alice", tuned[name], replace=True)
            call(name)
        assert_close(model(IDS[:2]).logits, alone(tuned, ["alice", "eve"]))
    with bank.select(["alice", "bob", "carol", "dave"], fixed=True) as selection:  # all slots are free again
        bank.add("alice", tuned["bob"], replace=True)
        selection.change(["alice", "bob", "eve", None])
        assert_close(model(IDS).logits, alone(tuned, ["bob", "bob", "eve", None]))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["alice", "mallory", None, None], KeyError, "mallory"),
        (["alice"], ValueError, "adapter_ids: got 1 names for a batch of 4 samples"),
        (["alice"] * 2, ValueError, "adapter_ids: got 2 names for a batch of 4 samples"),
        (NAMES, ValueError, "adapter_ids: got 5 different adapters, must be at most 4"),
        ("alic", TypeError, "adapter_ids: got 'alic', must be a list"),
        ([0, 1, 2, 3], TypeError, "adapter_ids: got 0, must be a name"),
        ([], TypeError, r"adapter_ids: got \[\], must be a list"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_before_anything_runs(model, bank, names, error, message):
    ran = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=message):
        model(IDS, adapter_ids=names)
    with pytest.raises(TypeError, match="adapter_names: is an argument of PEFT's"):
        model(IDS, adapter_names=names)
    assert not ran and not bank.is_open()


@torch.no_grad()
def test_an_error_in_the_model_leaves_nothing_selected(model, base, bank):
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS, adapter_ids=["alice"] * 4)
    hook.remove()
    assert not bank.is_open()
    assert_close(model(IDS).logits, base(IDS).logits)


@torch.no_grad()
def test_threads_have_their_own_selections(model, tuned, bank):
    results = {}

    def serve(name):
        for _ in range(5):
            results[name] = model(IDS, adapter_ids=[name] * 4).logits

    threads = [threading.Thread(target=serve, args=(name,)) for name in NAMES[:4]]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for name in NAMES[:4]:
        assert_close(results[name], alone(tuned, [name] * 4))
    refused = []

    def forgets():
        try:
            model(IDS)
        except RuntimeError as error:
            refused.append(str(error))

    with bank.select(["alice"] * 4):
        thread = threading.Thread(target=forgets)
        thread.start()
        thread.join()
    assert "selected in another thread" in refused[0]


def status_of_child(work) -> int:
    """0 where a forked child does this work, something else where it raises or takes too long."""
    child = os.fork()
    if not child:
        signal.alarm(10)
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            work()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@torch.no_grad()
def test_a_fork_waits_for_what_is_brought_and_forgets_other_threads(model, bank, tuned, monkeypatch):
    read, reading, opened, end = bank.read, threading.Event(), threading.Event(), threading.Event()

    def slow(name, out=None):
        reading.set()
        opened.wait(0.2)  # the fork comes now, if it does not wait
        return read(name, out)

    def select():
        with bank.select(["alice", "bob", "carol", "dave"]):  # all slots
            opened.set()
            end.wait()

    monkeypatch.setattr(bank, "read", slow)
    thread = threading.Thread(target=select)
    thread.start()
    reading.wait()

    def work():
        assert_close(model(IDS, adapter_ids=["eve"] * 4).logits, alone(tuned, ["eve"] * 4))
        assert_close(model(IDS).logits, tuned[None](IDS).logits)

    assert status_of_child(work) == 0
    with pytest.raises(RuntimeError, match="in another thread or task"):
        model(IDS)
    end.set()
    thread.join()
    model(IDS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@torch.no_grad()
def test_what_another_thread_has_selected_has_ended_in_a_child(model, bank):
    """Also where the thread that forks has a copy of the other's context, as with asyncio.to_thread."""
    statuses = []

    def work():
        with pytest.raises(RuntimeError, match="has ended"):
            model(IDS)

    with bank.select(["alice"] * 4):
        run = contextvars.copy_context().run
        thread = threading.Thread(target=lambda: statuses.append(run(status_of_child, work)))
        thread.start()
        thread.join()
        model(IDS)
    assert statuses == [0]


def test_merging_and_selections_exclude_each_other(model, bank):
    with bank.select(["alice"]), pytest.raises(RuntimeError, match=r"leave bank\.select"):
        lx.merge(model)
    lx.merge(model)
    with pytest.raises(RuntimeError, match=r"is merged; lx\.unmerge"):
        model(IDS, adapter_ids=["alice"] * 4)
    lx.unmerge(model)
    model(IDS, adapter_ids=["alice"] * 4)


def test_attach_and_detach_leave_the_model_as_it_was(base, bank, tmp_path):
    model = copy.deepcopy(base)
    before, kinds = model.state_dict(), [type(m) for m in model.modules()]
    bank.attach(model, progress=False)
    with pytest.raises(ValueError, match=r"export\(name, path\) of the bank"):
        export_as_lora(model, tmp_path / "lora")
    assert isinstance(model, type(base)) and type(model).__name__ == type(base).__name__
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="belongs to a bank of adapters; detach"):
        lx.detach(model)
    model.later = nn.Linear(2, 2)
    bank.detach(model)
    assert model.later.weight.requires_grad and not (tmp_path / "lora").exists()
    del model.later
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.raises(ValueError, match="does not have this bank"):
        bank.detach(model)


@torch.no_grad()
@pytest.mark.parametrize("replaced", [False, True])
def test_a_model_that_has_its_own_adapters_keeps_them_outside_of_selections(tuned, bank, replaced):
    """Also where forwards were replaced before, as by accelerate's hooks, which keep the bound forward of the layer."""
    model = copy.deepcopy(tuned["dave"])
    for _, layer in adapted_layers(model) if replaced else ():
        layer.forward = layer.forward
    bank.attach(model, progress=False)
    for names in (["alice", None, "bob", None], None):
        assert_close(model(IDS, adapter_ids=names).logits, alone(tuned, names or ["dave"] * 4))
    bank.detach(model)
    assert_close(model(IDS).logits, alone(tuned, ["dave"] * 4))
    assert all(type(layer) is LoraXSLinear and layer.R.requires_grad for _, layer in adapted_layers(model))


def test_own_adapters_are_computed_as_without_a_bank(tuned, bank, monkeypatch):
    """R of a layer that FSDP2 has cut is averaged over ranks, and training while merged is warned of."""
    model = bank.attach(copy.deepcopy(tuned["dave"]), progress=False)
    _, layer = next(adapted_layers(model))
    layer.shares = "a mesh"
    with monkeypatch.context() as patch:
        patch.setattr(linear.parallel, "averaged", lambda R, mesh: 0 * R if mesh == "a mesh" else R)
        with torch.no_grad():
            x = torch.randn(3, 32)
            assert torch.equal(layer(x), layer.base_layer(x))
    layer.shares = None
    layer.R.requires_grad_(True)
    lx.merge(model.train())
    with pytest.warns(UserWarning, match="merged"):
        model(IDS)


def test_a_model_that_has_its_own_adapters_must_have_the_bank_s_head(tmp_path):
    own = lx.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), 2, target_modules=["0"], modules_to_save=["1"])
    with lx.AdapterBank.create(tmp_path / "bank", own) as bank:
        other = copy.deepcopy(own)
        nn.init.normal_(other[1].weight)
        with pytest.raises(ValueError, match=r"its modules_to_save \(1\) have other values than the bank's"):
            bank.attach(other)
        assert other[0].seat is None and other[1].weight.requires_grad
        bank.attach(own)


def test_another_base_model_is_refused_and_left_as_it_was(base, bank):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(torch.randn_like(other.model.layers[1].mlp.down_proj.weight))
    with pytest.raises(lx.AdapterMismatch, match=r"layers\.1\.mlp\.down_proj"):
        bank.attach(other, progress=False)
    assert not any(isinstance(m, LoraXSLinear) for m in other.modules()) and type(other) is type(base)


@pytest.mark.parametrize("slots", [0, True, 1.5, "4"])
def test_slots_must_be_a_count(base, bank, slots):
    with pytest.raises(ValueError, match="slots: got"):
        bank.attach(base, slots=slots)


@torch.no_grad()
def test_a_copy_of_the_model_has_the_bank_too(model, tuned, bank):
    twin = copy.deepcopy(model)
    assert twin.loraxs_bank.bank is bank
    assert_close(twin(IDS, adapter_ids=["alice", "bob", None, None]).logits, alone(tuned, ["alice", "bob", None, None]))
    bank.detach(copy.deepcopy(model))  # which no call has told the bank of
    with pytest.raises(TypeError, match=r"nor can a model that has one; bank\.detach\(model\) first"):
        pickle.dumps(model)
    del twin
    gc.collect()
    assert len(bank._models) == 1
    twin = copy.deepcopy(model)
    bank.detach(model)
    with pytest.raises(RuntimeError, match=r"on no model.*a copy of such a model counts from its first call"):
        bank.select(["bob"])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(twin.generate(IDS, adapter_ids=["bob"] * 4, **options), tuned["bob"].generate(IDS, **options))


@torch.no_grad()
def test_half_precision(base, tuned, bank):
    model = bank.attach(copy.deepcopy(base), progress=False).to(torch.bfloat16)
    names = ["alice", None, "bob", "carol"]
    expected = torch.cat([copy.deepcopy(tuned[n]).bfloat16()(IDS[i : i + 1]).logits for i, n in enumerate(names)])
    torch.testing.assert_close(model(IDS, adapter_ids=names).logits, expected, atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@torch.no_grad()
def test_torch_compile_runs_the_layers_as_they_are(model, tuned, bank):
    compiled = torch.compile(model, backend="eager")
    for names in (["alice", "bob", None, "carol"], ["bob", "alice", "dave", None]):
        assert_close(compiled(IDS, adapter_ids=names).logits, alone(tuned, names))
    bank.detach(model)
    assert_close(compiled(IDS).logits, alone(tuned, [None] * 4))
    with pytest.raises(ValueError, match="for a model whose bank was detached"):
        compiled(IDS, adapter_ids=["alice"] * 4)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_fixed_selection_changes_in_place(model, tuned, bank):
    with bank.select(["alice", None, "bob", "bob"], fixed=True) as selection:
        model(IDS)
        table = model.model.layers[0].self_attn.q_proj.seat.bank._slots.table(0, torch.device("cpu"))
        held = [(index.rows(28), index.blocks(28).owner) for index in selection._indices.values()]
        selection.change([None, "eve", "alice", "carol"])
        assert table is bank._slots.table(0, torch.device("cpu"))
        assert [(index.rows(28), index.blocks(28).owner) for index in selection._indices.values()] == held
        assert_close(model(IDS).logits, alone(tuned, [None, "eve", "alice", "carol"]))
        with pytest.raises(KeyError, match="mallory"):
            selection.change(["mallory", None, None, None])
        with pytest.raises(ValueError, match="names: got 3, must be 4 as before"):
            selection.change(["alice"] * 3)
        with pytest.raises(TypeError, match="adapter_ids: got 'abcd', must be a list"):
            selection.change("abcd")
        assert_close(model(IDS).logits, alone(tuned, [None, "eve", "alice", "carol"]))
    with pytest.raises(RuntimeError, match="fixed=True"):
        selection.change(["alice"] * 4)


@torch.no_grad()
def test_names_reach_the_model_by_every_way_into_it(model, tuned):
    names = ["alice", None, "bob", "carol"]
    expected = alone(tuned, names)
    assert_close(model.forward(IDS, adapter_ids=names).logits, expected)
    assert_close(model.lm_head(model.model(IDS, adapter_ids=names).last_hidden_state), expected)
    for call in (model.forward, model.model):
        with pytest.raises(KeyError, match="mallory"):
            call(IDS, adapter_ids=["mallory"] * 4)


def test_generation_refuses_what_it_cannot_follow(model):
    with pytest.raises(ValueError, match="got 2 names for 4 prompts"):
        model.generate(IDS, adapter_ids=["alice", "bob"], max_new_tokens=2)

    def guided(model, input_ids, **_):
        return model(input_ids.repeat(2, 1)).logits

    with pytest.raises(ValueError, match="must be the same for all samples: custom_generate"):
        model.generate(IDS, adapter_ids=["alice", "bob", None, None], custom_generate=guided)
    with pytest.raises(ValueError, match="got 4 names for a batch of 8 samples"):
        model.generate(IDS, adapter_ids=["alice"] * 4, custom_generate=guided)


def test_batches_that_a_model_makes_of_the_samples_itself(base, tuned, bank):
    class Own(type(base)):
        def generate(self, ids, **_):  # as Whisper's, for which some samples end before others
            return torch.cat([self(ids[:3]).logits, self(ids[3:]).logits])

    model = Own(base.config).eval()
    model.load_state_dict(base.state_dict())
    bank.attach(model, progress=False)
    with torch.no_grad():
        assert_close(model.generate(IDS, adapter_ids=["alice"] * 4), alone(tuned, ["alice"] * 4))
    with pytest.raises(ValueError, match="a generate that is the model's own"):
        model.generate(IDS, adapter_ids=["alice", None, None, None])
    for names in (["alice"] * 4, None):
        with bank.select(["alice"] * 4) if names is None else contextlib.nullcontext():
            with pytest.raises(ValueError, match=r"generate_batch \(continuous batching\) packs the prompts"):
                model.generate_batch(IDS.tolist(), adapter_ids=names)
            with pytest.raises(ValueError, match=r"init_continuous_batching \(continuous batching\)"):
                model.init_continuous_batching(adapter_ids=names)


def test_every_method_that_would_ignore_the_names_takes_them(tuned, bank, base):
    class Own(type(base)):
        def scored(self, ids, **kwargs):
            return self(ids, **kwargs).logits

        def features(self, ids, **_):
            return self(ids).logits

        def streamed(self, ids, **kwargs):  # which calls when its names have been taken
            yield self(ids, **kwargs).logits

        async def later(self, ids, **kwargs):
            return self(ids, **kwargs).logits

        def weighted(self, weights, ids, **kwargs):  # by position, and of another length
            return self(ids, **kwargs).logits

        @staticmethod
        def named(**names):
            return names

    class Narrower(Own):
        def scored(self, ids):
            return self(ids, adapter_ids=["bob"] * 4).logits

    names = ["alice", None, "bob", "eve"]
    model, narrower = Own(base.config).eval(), Narrower(base.config).eval()
    for each in (model, narrower):
        each.load_state_dict(base.state_dict())
        bank.attach(each, progress=False)
    with torch.no_grad():
        assert_close(model.scored(IDS, adapter_ids=names), alone(tuned, names))
        for call in (model.features, narrower.features):  # they might sort the samples, as an `encode` does
            assert_close(call(IDS, adapter_ids=["eve"] * 4), alone(tuned, ["eve"] * 4))
            with pytest.raises(ValueError, match="for features, which has not passed them on to a call of the model"):
                call(IDS, adapter_ids=names)
            assert_close(call(IDS, adapter_ids=None), base(IDS).logits)
            with bank.select(names):
                assert_close(call(IDS, adapter_ids=None), alone(tuned, names))
        assert_close(next(model.streamed(IDS, adapter_ids=names)), alone(tuned, names))
        assert_close(asyncio.run(model.later(IDS, adapter_ids=names)), alone(tuned, names))
        assert_close(model(IDS, adapter_ids=names, adapter_names=None).logits, alone(tuned, names))
        assert_close(model.weighted(torch.ones(9, 2), IDS, adapter_ids=names), alone(tuned, names))
        assert_close(narrower.scored(IDS), alone(tuned, ["bob"] * 4))
    assert model.named(adapter_ids=1) == {"adapter_ids": 1}


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        y, first = torch.zeros_like(x), x.sum(-1) > 0
        y[first], y[~first] = self.experts[0](x[first]), self.experts[1](x[~first])
        return y


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    "plain, why",
    [
        (Routed(), "module 'experts' gives each expert tokens of any samples"),
        (SequenceFirst(), "module 'layer' has batch_first=False"),
    ],
)
def test_models_that_mix_the_rows_of_samples_can_use_one_adapter(tmp_path, plain, why):
    x, how = torch.randn(3, 3, 8), {"target_modules": r".*(experts\.\d|linear1)"}
    with serving(plain, tmp_path, ["alice"], 2, **how) as (models, _, model):
        assert_close(model(x, adapter_ids=["alice"] * 3), models["alice"](x))
        with pytest.raises(ValueError, match=why):
            model(x, adapter_ids=["alice", None, "alice"])


@torch.no_grad()
def test_as_many_positions_as_samples_are_not_taken_for_samples(tmp_path):
    """MLCD's out_proj gets the sequence first."""
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    plain = transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    pixels = torch.randn(5, 3, 16, 16)  # 4 patches of each of 5 images, and its class
    with serving(plain, tmp_path, ["alice"], 2) as (models, _, model):
        found = model(pixels, adapter_ids=["alice"] * 5).last_hidden_state
        assert_close(found, models["alice"](pixels).last_hidden_state)
        with pytest.raises(ValueError, match="whose first dimension is not the batch"):
            model(pixels, adapter_ids=["alice", None, None, None, None])


def test_the_first_use_may_be_in_inference_mode(model, tuned):
    with torch.inference_mode():
        model(IDS, adapter_ids=["alice"] * 4)
    with torch.no_grad():
        assert_close(model(IDS, adapter_ids=["bob"] * 4).logits, alone(tuned, ["bob"] * 4))


def test_a_selection_that_has_ended_is_no_base_model(model, bank):
    async def late():
        await asyncio.sleep(0)
        model(IDS)

    async def serve():
        with bank.select(["alice"] * 4):
            task = asyncio.create_task(late())
        await task

    with pytest.raises(RuntimeError, match="the block that this task was started in has ended"):
        asyncio.run(serve())
    assert not bank.is_open()
    selection = bank.select(["alice"])
    with selection, pytest.raises(RuntimeError, match="is open already"):
        selection.__enter__()


def test_what_would_take_the_layers_or_their_own_R_is_refused(model, folder, bank, tmp_path):
    with pytest.raises(ValueError, match="belongs to a bank"):
        lx.detach(model.model)
    for call in (lx.save_adapter, lx.load_adapter, export_as_lora, lambda model, path: bank.add("zed", model)):
        with pytest.raises(ValueError, match="has a bank of adapters"):
            call(model, tmp_path / "adapter.safetensors")
    with pytest.warns(UserWarning, match=r"They are a bank's, which holds the adapters: bank\.detach\(model\)"):
        model.save_pretrained(tmp_path / "model")


def test_gradients_are_those_of_the_adapters_of_the_forward_whatever_is_brought_in_later(model, tuned):
    names = ["alice", None, "bob", "carol"]
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    y = model(inputs_embeds=embeds, adapter_ids=names).logits
    with torch.no_grad():
        model(IDS, adapter_ids=["dave", "eve"] * 2)  # which take the free slot, and alice's
    y.square().sum().backward()
    for i, name in enumerate(names):
        own = embeds.detach()[i : i + 1].requires_grad_()
        tuned[name](inputs_embeds=own).logits.square().sum().backward()
        torch.testing.assert_close(embeds.grad[i : i + 1], own.grad, atol=1e-4, rtol=1e-4)


def test_a_torch_that_tells_nothing_of_recomputations_is_refused(model, monkeypatch):
    """As torch 2.6 does."""
    monkeypatch.setattr("loraxs_kernels.bank.selection._hooks", None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model.train()(inputs_embeds=embeds, adapter_ids=["alice"] * 4).logits.sum()
    with pytest.raises(RuntimeError, match=r"torch 2\..* must be newer"):
        loss.backward()


@pytest.mark.parametrize("how", ["another call", "change", "the same block again", "names inside"])
def test_a_recomputation_with_other_adapters_is_refused(model, tuned, bank, how):
    embeds, names = model.get_input_embeddings()(IDS).detach().requires_grad_(), ["alice"] * 4
    message, block = "slots of the batch's adapters hold different ones", bank.select(names, fixed=how == "change")
    if how == "names inside":
        message = "no graph is there that was made with the adapters"
        y = checkpoint(lambda x: model(inputs_embeds=x, adapter_ids=names).logits, embeds, use_reentrant=False)
    else:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with block:
            y = model(inputs_embeds=embeds).logits
            if how == "change":
                block.change(["bob"] * 4)
    bank.add("alice", tuned["bob"], replace=True)
    with torch.no_grad():
        if how == "the same block again":
            with block:
                model(IDS)
        elif how == "another call":
            model(IDS, adapter_ids=names)
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_a_checkpointed_call_with_names_is_made_again(model, bank):
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def call(x):
        return model(inputs_embeds=x, adapter_ids=["alice", None, "bob", "carol"]).logits

    expected = torch.autograd.grad(call(embeds).square().sum(), embeds)
    y = checkpoint(call, embeds, use_reentrant=False).square().sum()
    with torch.no_grad():
        model(IDS, adapter_ids=["eve"] * 4)  # takes alice's slot
    assert all(map(torch.equal, torch.autograd.grad(y, embeds), expected))


@pytest.mark.filterwarnings("ignore")  # of what torch.jit has to say
def test_a_trace_in_a_selection_and_an_export_are_refused(tmp_path):
    plain, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    with serving(plain, tmp_path, ["alice"], 2, target_modules=["0"]) as (_, bank, model):
        with bank.select(["alice", None]), pytest.raises(RuntimeError, match="adapters are selected, which would be"):
            torch.jit.trace(model, x, check_trace=False)

        def selecting(x: torch.Tensor) -> torch.Tensor:
            with bank.select(["alice", None]):
                return model(x)

        around = nn.ModuleList([model])
        around.forward = selecting
        for part in (model, model[0], around):
            with pytest.raises(RuntimeError, match=r"torch\.export: the model has a bank"):
                torch.export.export(part, (x,), strict=False)


@torch.no_grad()
def test_media_beside_text_are_told_by_their_names(tmp_path):
    class WithSounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def get_decoder(self):
            return self

        def forward(self, input_ids, audio_input_features=None, use_audio_in_video=False):
            return self.layer(input_ids.float() if audio_input_features is None else audio_input_features)

    ids, sounds = torch.ones(2, 8).long(), torch.randn(2, 8)
    with serving(WithSounds(), tmp_path, ["alice"], 2, target_modules=["layer"]) as (_, _, model):
        model(ids, sounds, adapter_ids=["alice", "alice"])
        model(ids, adapter_ids=["alice", None], use_audio_in_video=False)
        for args, kwargs in (((ids, sounds), {}), ((), {"input_ids": ids, "audio_input_features": sounds})):
            with pytest.raises(ValueError, match="for one batch with images or sounds, and module 'layer'"):
                model(*args, adapter_ids=["alice", None], **kwargs)


@torch.no_grad()
def test_generation_with_any_number_of_images_for_a_sample(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    parts = {
        "vision_config": transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        "text_config": transformers.LlamaConfig(**sizes, vocab_size=32),
    }
    torch.manual_seed(0)
    plain = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts, image_token_index=31)).eval()
    ids, pixels = torch.randint(30, (2, 9)), torch.randn(2, 3, 16, 16)
    ids[0, :8] = 31  # both images are the first sample's
    inputs = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels, "max_new_tokens": 2, "do_sample": False}
    for targets, refused in ((r".*(language_model.*q_proj|lm_head)", False), (r".*q_proj", True)):
        with serving(plain, tmp_path / str(refused), ["alice"], 2, target_modules=targets) as (models, _, model):
            if refused:
                with pytest.raises(ValueError, match=r"for one batch with images or sounds, and module 'model\.vision"):
                    model.generate(ids, adapter_ids=["alice", None], **inputs)
                continue
            found = model.generate(ids, adapter_ids=["alice", None], **inputs)
            assert torch.equal(found[0], models["alice"].generate(ids, **inputs)[0])
            assert torch.equal(found[1], plain.generate(ids, **inputs)[1])


@torch.no_grad()
def test_a_selection_that_is_opened_again_follows_its_adapters_to_other_slots(base, tuned, bank):
    model = bank.attach(copy.deepcopy(base), slots=2, progress=False)
    selection, places = bank.select(["alice", "bob"]), []
    for others in (["alice", "carol"], ["dave"]), ():
        with selection:
            places.append(bank._slots.state(["alice", "bob"]))
            assert_close(model(IDS[:2]).logits, alone(tuned, ["alice", "bob"]))
        for names in others:  # first bob's slot is taken, then alice's
            model(IDS[: len(names)], adapter_ids=names)
    assert [places[0][name][0] for name in ("alice", "bob")] == [places[1][name][0] for name in ("bob", "alice")]


def test_a_change_that_fails_changes_nothing(base, tuned, bank, monkeypatch):
    model = bank.attach(copy.deepcopy(base), slots=2, progress=False)
    read = bank.read

    def damaged(name, out=None):
        if name == "dave":
            raise ValueError("is damaged")
        return read(name, out)

    monkeypatch.setattr(bank, "read", damaged)
    with torch.no_grad(), bank.select(["alice", "bob"], fixed=True) as selection:
        model(IDS[:2])
        bank.remove("alice")
        for names, error in ((["carol", "dave"], "is damaged"), (["carol", "nobody"], "has no adapter 'nobody'")):
            with pytest.raises((ValueError, KeyError), match=error):
                selection.change(names)
        with pytest.raises(RuntimeError, match="slots are in use by open selections"):
            model(IDS[:1], adapter_ids=["carol"])
        assert_close(model(IDS[:2]).logits, alone(tuned, ["alice", "bob"]))
    with torch.no_grad():
        assert_close(model(IDS[:1], adapter_ids=["carol"]).logits, alone(tuned, ["carol"]))


def test_checkpointing_goes_with_every_graph_that_can_be_told(model, tuned, bank):
    """A call without a selection; a graph that is kept for a second backward; and two graphs, which are refused."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def call(names=None):
        return model(inputs_embeds=embeds, adapter_ids=names).logits.square().sum()

    (plain,) = torch.autograd.grad(call(), embeds)
    own = embeds.detach().clone().requires_grad_()
    torch.testing.assert_close(plain, *torch.autograd.grad(tuned[None](inputs_embeds=own).logits.square().sum(), own))
    y = call(["alice", None, "bob", "carol"])
    (first,) = torch.autograd.grad(y, embeds, retain_graph=True)
    assert torch.equal(first, *torch.autograd.grad(y, embeds, retain_graph=True))
    call(["bob"] * 4)  # whose graph ends here
    assert torch.equal(first, *torch.autograd.grad(y, embeds, retain_graph=True))
    other = call(["carol", "bob", None, "alice"])  # the same adapters, in another order
    with pytest.raises(RuntimeError, match="there are graphs of 2 selections"):
        torch.autograd.grad(y, embeds)
    del other


def test_a_checkpointed_block_that_ends_with_its_only_adapter(base, tmp_path):
    """The view or sum that its y is has passed before what the layer kept is asked for."""
    with serving(base, tmp_path, target_modules=["down_proj"]) as (models, _, model):
        embeds = base.get_input_embeddings()(IDS).detach().requires_grad_()

        def loss(model, **names):
            return model(inputs_embeds=embeds, **names).logits.square().sum()

        other = loss(model, adapter_ids=["alice"] * 4)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pytest.raises(RuntimeError, match="there are graphs of 2 selections"):
            torch.autograd.grad(other + loss(model, adapter_ids=["bob"] * 4), embeds)
        del other
        got = torch.autograd.grad(loss(model, adapter_ids=["bob"] * 4), embeds)
        torch.testing.assert_close(got, torch.autograd.grad(loss(models["bob"]), embeds), rtol=1e-4, atol=1e-5)


# Training.


def losses_of(logits, ids):
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def test_many_train_at_once_as_each_would_alone(base, tuned, bank):
    """20 steps in fp32, each adapter in some of them, with rates, decay, clipping and step counts of its own."""
    names = ["alice", "bob", "new", "newer"]
    rates = {name: 1e-3 * (i + 1) for i, name in enumerate(names)}
    g = torch.Generator().manual_seed(1)
    data = torch.randint(0, 96, (20, len(names), 2, 9), generator=g)
    present = [[i for i in range(len(names)) if (step + i) % 3] for step in range(20)]
    model = bank.attach(copy.deepcopy(base), slots=2, progress=False)
    losses = {name: [] for name in names}
    with bank.train(names, create=True) as training:
        optimizer = training.optimizer(rates, weight_decay=0.1, max_norm=0.5)
        for step, who in enumerate(present):
            ids = data[step, who].flatten(0, 1)
            each = losses_of(model(ids, adapter_ids=[names[i] for i in who for _ in range(2)]).logits, ids)
            own = each.view(len(who), 2).mean(1)
            optimizer.zero_grad()
            own.sum().backward()
            optimizer.step()
            for i, loss in zip(who, own.tolist(), strict=True):
                losses[names[i]].append(loss)
        training.commit()
    fresh = lx.attach(copy.deepcopy(base), 4, target_modules=TARGETS, rank_pattern={"down_proj": 6}, progress=False)
    for i, name in enumerate(names):
        single = copy.deepcopy(tuned.get(name, fresh))
        trained = [layer.R for _, layer in adapted_layers(single)]
        adamw, found = torch.optim.AdamW(trained, lr=rates[name], weight_decay=0.1), []
        for step in (step for step, who in enumerate(present) if i in who):
            loss = losses_of(single(data[step, i]).logits, data[step, i]).mean()
            adamw.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 0.5)
            adamw.step()
            found.append(loss.item())
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(found), atol=1e-5, rtol=0)
        with torch.no_grad():  # from the bank, to which it was committed
            torch.testing.assert_close(model(IDS, adapter_ids=[name] * 4).logits, single(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, bank, inside):
    names = ["alice", "bob", None, "carol"]
    with bank.train(["alice", "bob", "carol"]) as training:

        def gradients():
            for p in training.parameters:
                p.grad = None
            if inside:
                with bank.select(names):
                    model(IDS, labels=IDS).loss.backward()
            else:
                model(IDS, labels=IDS, adapter_ids=names).loss.backward()
            return [p.grad for p in training.parameters]

        expected = gradients()
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert all(map(torch.equal, gradients(), expected))


def test_what_backward_cannot_know_is_refused(model, bank):
    names = ["alice", "bob", None, "carol"]
    with bank.train(["alice", "bob", "carol"]):
        model.train()
        model.enable_input_require_grads()  # which transformers 4 does not do by itself
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(RuntimeError, match="must be use_reentrant=False"):
            model(IDS, labels=IDS, adapter_ids=names).loss.backward()


def test_the_optimizer_resumes_from_its_state(model, bank):
    with bank.train(["alice", "bob"]) as training:
        optimizer = training.optimizer({"alice": 1e-2, "bob": 1e-3})
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

        def step(by):
            by.zero_grad()
            losses_of(model(IDS, adapter_ids=["alice", "bob", "alice", None]).logits, IDS).sum().backward()
            by.step()

        step(optimizer)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 5e-3
        state = optimizer.state[training.parameters[0]]
        state |= {key: t.clone() for key, t in state.items()}  # as what moves it to the CPU and back
        step(optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        step(optimizer)
        expected = [p.detach().clone() for p in training.parameters]
    with bank.train(["alice", "bob"]) as training:
        again = training.optimizer({"alice": 1e-2, "bob": 1e-3})
        again.load_state_dict(state)  # with R as it was then, and not as it is in the bank
        step(again)
        for p, value in zip(training.parameters, expected, strict=True):
            assert torch.equal(p.detach(), value)
        training.device = torch.device("meta")  # in the place of a GPU, for a state that was read into memory
        again.load_state_dict(state)
        assert again.state[training.parameters[0]]["step"].is_meta
        state["state"][0]["R"] = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="must be of adapters of this bank"):
            again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="this training is closed"):
        again.load_state_dict(state)


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_step_has_its_own_gradients_where_only_a_module_s_are_zeroed(model, bank, wrapped):
    """As Trainer does, of the model or of one that holds it."""
    module = nn.ModuleDict({"inner": model}) if wrapped else model
    found = []
    for zeroing in (module, None):
        with bank.train(["alice", "bob"]) as training:
            optimizer = training.optimizer(1e-2)
            for _ in range(3):
                model(IDS, labels=IDS, adapter_ids=["alice", "bob"] * 2).loss.backward()
                optimizer.step()
                (zeroing or optimizer).zero_grad()
            found.append(torch.cat([p.detach().flatten() for p in training.parameters]))
    assert torch.equal(*found)


def test_a_step_makes_its_gradients_by_a_closure(model, bank):
    def closure():
        loss = model(IDS, labels=IDS, adapter_ids=["alice"] * 4).loss
        loss.backward()
        return loss

    with bank.train(["alice"]) as training:
        before = [p.detach().clone() for p in training.parameters]
        with torch.no_grad():
            loss = training.optimizer(1e-2).step(closure)
        assert loss.requires_grad and not any(map(torch.equal, before, training.parameters))


def test_zero_grad_of_the_model_is_that_of_what_trains(model, bank):
    with bank.train(["alice"]) as training:
        model(IDS, labels=IDS, adapter_ids=["alice"] * 4).loss.backward()
        assert all(p.grad is not None for p in training.parameters)
        model.model.zero_grad()  # of a part
        assert all(p.grad is not None for p in training.parameters)
        model.zero_grad()
        assert all(p.grad is None for p in training.parameters)
    model.zero_grad()


def test_gradients_decide_which_adapters_a_step_changes(model, bank):
    with bank.train(["alice", "bob"]) as training:
        optimizer = training.optimizer(1e-2, weight_decay=0.5)
        before = [p.detach().clone() for p in training.parameters]
        losses_of(model(IDS, adapter_ids=["alice"] * 4).logits, IDS).sum().backward()
        for p in training.parameters:
            p.grad = None
        optimizer.step()
        losses_of(model(IDS, adapter_ids=["bob"] * 4).logits, IDS).sum().backward()
        optimizer.step()
        for p, old in zip(training.parameters, before, strict=True):
            assert torch.equal(p[0], old[0]) and not torch.equal(p[1], old[1])
        assert optimizer.state[training.parameters[0]]["step"].tolist() == [0, 1]


def test_the_optimizer_s_state_is_that_of_its_adapters(model, bank):
    with bank.train(["alice", "bob"]) as training:
        state = training.optimizer(1e-2).state_dict()
    with bank.train(["alice", "carol"]) as training:
        with pytest.raises(ValueError, match=r"is of the adapters \['alice', 'bob'\], must be of \['alice', 'carol'\]"):
            training.optimizer(1e-2).load_state_dict(state)
        with pytest.raises(ValueError, match="takes only the adapters"):
            training.optimizer(1e-2).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_selection_follows_a_training_that_began_since(model, bank):
    selection = bank.select(["alice"] * 4)
    with bank.train(["alice"]) as training, torch.no_grad():
        before = model(IDS, adapter_ids=["alice"] * 4).logits
        training.parameters[0].mul_(2)
        with selection:
            assert not torch.allclose(model(IDS).logits, before)
        training.parameters[1].data = training.parameters[1].data.clone()
        training.parameters[1].grad = torch.ones_like(training.parameters[1])
        with pytest.raises(RuntimeError, match="parameters: their memory was replaced"):
            training.optimizer(1e-3).step()


def test_a_closed_training_changes_nothing(model, bank):
    with bank.train(["alice"]) as training:
        selection = bank.select(["alice"])
    with selection:  # of the bank's own R again
        pass
    for call in (training.commit, training.optimizer(1e-3).step):
        with pytest.raises(RuntimeError, match="this training is closed"):
            call()


def test_a_commit_takes_nothing_from_other_writers(model, bank, tuned):
    with bank.train(["alice", "bob", "carol", "new"], create=True) as training:
        bank.add("bob", tuned["eve"], replace=True)
        bank.remove("carol")
        training.commit()  # of which only "new" is not what was read
        assert "new" in bank and "carol" not in bank
        theirs = bank.digests(["bob"])
        for p in training.parameters:
            p.data += 1
        before = bank.digests(["alice"])
        for name in ("bob", "carol"):
            with pytest.raises(ValueError, match=f"adapter '{name}' was changed or removed by another"):
                training.commit(["alice", name])
        assert bank.digests(["alice", "bob"]) == before | theirs and "carol" not in bank
        training.commit(["alice", "new"])
        training.parameters[0].data += 1
        training.commit(["alice", "new"])  # what was read last is what it wrote itself
        assert torch.equal(bank.record("alice")[0][bank.modules[0][0]], training.parameters[0][0])


def test_training_refuses_what_it_cannot_do(model, bank, folder, base):
    with pytest.raises(KeyError, match="mallory"):
        bank.train(["alice", "mallory"])
    for names in ("alice", [], ["alice", "alice"], [None]):
        with pytest.raises(ValueError, match="names: got"):
            bank.train(names)
    for name in ("", "a\0b", "x" * 600):
        with pytest.raises(ValueError, match="name: got"):
            bank.train([name], create=True)
    with bank.train(["alice", "bob"]) as training:
        with pytest.raises(ValueError, match="fixed: got True"):
            bank.select(["alice"], fixed=True)
        with pytest.raises(RuntimeError, match="train already"):
            bank.train(["carol"])
        with pytest.raises(ValueError, match="adapter_ids: got 'carol', which is not in training"):
            model(IDS, adapter_ids=["alice", "carol", None, None])
        for lr in ({"alice": 1e-3}, {"alice": 1e-3, "bob": 1e-3, "eve": 1.0}):
            with pytest.raises(ValueError, match=r"lr: '(bob|eve)' is in only one of"):
                training.optimizer(lr)
        with pytest.raises(ValueError, match="lr: got -1"):
            training.optimizer(-1.0)
        with pytest.raises(KeyError, match="carol"):
            training.commit(["carol"])
        with torch.no_grad():
            training.parameters[2][1] = float("nan")
        with pytest.raises(ValueError, match=r"bob.*down_proj.*NaN"):
            training.commit()
    with lx.AdapterBank(folder) as readable:
        served = readable.attach(copy.deepcopy(base), progress=False)
        assert served.loraxs_bank.bank is readable
        with pytest.raises(ValueError, match="opened with mode 'r', must be 'a' to train"):
            readable.train(["alice"])
    with pytest.raises(RuntimeError, match="the bank is on no model"):
        lx.AdapterBank(folder).select(["alice"])


def test_a_module_with_two_names_is_one_where_a_bank_is_attached(tmp_path):
    """As for adapter files, one of which `export` writes; else only one of the two would be adapted."""
    block, path = nn.Linear(8, 8), tmp_path / "alice.safetensors"
    model, two = nn.Sequential(block, nn.ReLU(), block), nn.Sequential(block, nn.ReLU(), copy.deepcopy(block))
    fresh = copy.deepcopy(model)
    with lx.AdapterBank.create(tmp_path / "bank", lx.attach(model, 4)) as bank:
        bank.add("alice", model)
        bank.export("alice", path)
        for put_on in (bank.attach, lambda other: lx.load_adapter(other, path)):
            with pytest.raises(ValueError, match="modules '0' and '2' are two here, but are one in the model"):
                put_on(two)
        assert bank.attach(fresh) is fresh


def test_a_bank_refuses_calls_out_of_turn(bank, base, tuned):
    first = bank.attach(copy.deepcopy(base), slots=2, progress=False)
    with pytest.raises(ValueError, match=r"slots: got 3, must be 2 as on the model"):
        bank.attach(copy.deepcopy(base), slots=3)
    with pytest.raises(ValueError, match="model: has a bank already"):
        bank.attach(first, slots=2)
    with pytest.raises(ValueError, match="basis: got a file for a model that has adapters already"):
        bank.attach(copy.deepcopy(tuned["bob"]), slots=2, basis="basis.safetensors")
    for items, wrong in ((3, "a int"), ([("zoe",)], r"\('zoe',\) among them")):
        with pytest.raises(TypeError, match=f"items: got {wrong}, must be"):
            bank.add_many(items)
    with bank.select([None]):
        for call in (lambda: bank.detach(first), lambda: bank.train(NAMES)):
            with pytest.raises(RuntimeError, match=r"adapters of (its|this) bank are selected"):
                call()
    lx.merge(first)
    with pytest.raises(ValueError, match="model: is merged"):
        bank.detach(first)
    lx.unmerge(first)
    with bank.train(NAMES[:2]) as training:
        with pytest.raises(RuntimeError, match="adapters of this bank train on another"):
            bank.attach(copy.deepcopy(base), slots=2)
        with pytest.raises(RuntimeError, match="adapters of its bank train"):
            bank.detach(first)
        with pytest.raises(TypeError, match=r"names: got .alice., must be a list"):
            training.commit("alice")
        with pytest.raises(ValueError, match=r"betas: got 0\.9, must be two numbers"):
            training.optimizer(lr=1e-3, betas=0.9)
        assert training.optimizer(lr=1e-3).step(lambda: 7) == 7
    second = bank.attach(copy.deepcopy(base), slots=2, progress=False)
    with pytest.raises(RuntimeError, match="train: the bank is on 2 models"):
        bank.train(NAMES)
    kind = type(second)
    second.__class__ = type("Changed", (kind,), {})
    with pytest.raises(ValueError, match=r"the class of a Changed was changed after bank\.attach"):
        bank.detach(second)
    second.__class__ = kind
    bank.detach(second)
    bank.detach(first)
    assert [*first.state_dict()] == [*base.state_dict()] and type(first) is type(base)


@torch.no_grad()
@pytest.mark.parametrize("block", [False, True])
def test_ctrl_c_leaves_nothing_selected_and_no_slot_in_use(tmp_path, block):
    """At any line that brings adapters, opens a selection or closes it, except for the first of `close`."""
    plain, x, names = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), ["alice", "bob", "carol", "dave"]
    with serving(plain, tmp_path, names, 2, target_modules=["0"]) as (models, bank, model):
        bank.detach(model)
        bank.attach(model, slots=2, progress=False)

        def call(names):
            if not block:
                return model(x, adapter_ids=names)
            with bank.select(names):
                return model(x)

        k, at_first = 0, 0
        while interrupted_at(k := k + 1, lambda: call(["alice", "bob"]), "/bank/s"):
            at_first += bank.is_open()
            for selection in [*bank.selections._open]:
                selection.close()
            assert_close(model(x), plain(x))
            for two in (["carol", "dave"], ["alice", "carol"], ["bob", "dave"], ["carol", "dave"]):
                expected = [models[name](x[i : i + 1]) for i, name in enumerate(two)]
                assert_close(model(x, adapter_ids=two), torch.cat(expected))
        assert k > 100 and at_first <= block


@torch.no_grad()
@pytest.mark.parametrize("operation", ["attach", "detach"])
def test_ctrl_c_in_attach_and_detach_leaves_a_model_with_the_bank_or_without(tmp_path, operation):
    plain, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with serving(plain, tmp_path, ["alice"], 2, target_modules=["0"]) as (models, bank, model):
        bank.detach(model)
        k = found = 0
        while True:
            model = copy.deepcopy(plain)
            if operation == "detach":
                bank.attach(model, progress=False)
            act = {"attach": partial(bank.attach, model, progress=False), "detach": partial(bank.detach, model)}
            if not interrupted_at(k := k + 1, act[operation], "/bank/adapter_bank"):
                break
            has = "loraxs_bank" in vars(model)
            found |= 1 + has
            assert (model in bank._models) == has
            if not has:
                assert torch.equal(model(x), plain(x))
                bank.attach(model, progress=False)
            assert_close(model(x, adapter_ids=["alice"] * 2), models["alice"](x))
            bank.detach(model)
        assert k > 10 and found == 3
