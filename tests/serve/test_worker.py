"""The worker's half without an engine: what a layer adds, which adapters stay, and what is refused at the start."""

from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.lora.model_manager import AdapterLRUCache  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

import loraxs_kernels as lx  # noqa: E402
from loraxs_kernels.bank import Store  # noqa: E402
from loraxs_kernels.integrations import vllm as ours  # noqa: E402
from loraxs_kernels.integrations import vllm_worker as worker  # noqa: E402

NAMES = [f"user-{i}" for i in range(6)]


def mapping(ids):
    return SimpleNamespace(index_mapping=tuple(ids))


def rows_of(slots, ids, most=64):
    rows = worker.Rows(most, torch.device("cpu"), slots)
    rows.update_metadata(mapping(ids), [10 + slot for slot in range(slots)], 0, 0)
    return rows


def part_of(m, r, K, N, slots, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(m * r, K, generator=g) / K**0.5
    B = torch.block_diag(*(torch.randn(N // m, r, generator=g) for _ in range(m)))
    table = torch.randn(slots, 3 + m * r * r, generator=g)  # as in the table, where other modules lie beside
    return worker.Part(A.to(dtype), B.to(dtype), table[:, 3:].unflatten(1, (m, r, r)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [[10, 0, 12, 11, 10, 0], [11] * 5, [10] * 3 + [0] * 2 + [12] * 3 + [10], [0, 0]])
def test_what_a_layer_adds_is_that_of_each_rows_adapter(dtype, ids):
    part, T, padding = part_of(3, 4, 32, 48, 3, dtype), len(ids), 2
    x, y = torch.randn(T + padding, 32).to(dtype), torch.randn(T + padding, 48).to(dtype)
    right, size = y.double(), y.double().abs()
    for t, id in enumerate(ids):
        if id:
            z = (part.A.double() @ x[t].double()).view(3, 4, 1)
            right[t] += part.B.double() @ (part.R[id - 10].double() @ z).flatten()
            of_terms = (part.A.double().abs() @ x[t].double().abs()).view(3, 4, 1)
            size[t] += part.B.double().abs() @ (part.R[id - 10].double().abs() @ of_terms).flatten()
    found = [y.clone(), y.clone()]
    rows = rows_of(3, ids)
    part.add(found[0], x, rows)
    rows.slots[:T] = torch.tensor([id - 10 if id else -1 for id in ids])
    rows.blocks = rows.alone  # what a CUDA graph records
    part.add(found[1], x, rows)
    for each in found:
        assert ((each.double() - right).abs() <= 2 * torch.finfo(dtype).eps * size).all()
        idle = [t for t in range(T + padding) if t >= T or not ids[t]]
        assert torch.equal(each[idle], y[idle])


def test_a_nan_of_one_row_stays_there():
    part, x, y = part_of(1, 4, 32, 16, 2, torch.float32), torch.randn(4, 32), torch.zeros(4, 16)
    x[0], x[2] = torch.nan, torch.inf
    part.add(y, x, rows_of(2, [0, 11, 10, 11]))
    assert torch.equal(y[0], torch.zeros(16)) and y[[1, 3]].isfinite().all() and not y[2].isfinite().any()


def test_a_layer_that_sees_other_rows_than_the_step_has_is_refused():
    part = part_of(1, 4, 32, 16, 2, torch.float32)
    with pytest.raises(RuntimeError, match="3 rows in a step of 4"):
        part.add(torch.zeros(3, 16), torch.zeros(3, 32), rows_of(2, [10, 10, 11, 0]))


def test_compiled_code_calls_one_operator():
    layer = worker.LoraXSLayer()
    layer.parts, layer.rows, layer.key = [part_of(2, 4, 32, 16, 2, torch.float32)], rows_of(2, [10, 11, 0]), "test:a"
    worker._layers[layer.key] = layer
    x, y = torch.randn(3, 32), torch.randn(3, 16)
    expected = layer._apply_lora_to_output(x, y.clone())
    compiled = torch.compile(
        lambda x, y: layer._apply_lora_to_output(x, y + 0) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, y), 2 * expected)
    assert not torch.equal(expected, y)


@pytest.fixture
def manager(tmp_path):
    """The worker's manager of a bank with two slots, without a model."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lx.attach(model, rank=2, target_modules=["0"], progress=False)
    with lx.AdapterBank.create(tmp_path / "bank", model) as bank:
        bank.add_many((name, {"0": torch.full((2, 2), float(i + 1))}) for i, name in enumerate(NAMES))
    models = object.__new__(worker.BankModelManager)
    models.store, models.lora_config = Store(tmp_path / "bank"), SimpleNamespace(max_loras=2, max_cpu_loras=2)
    models.table, models.scale = torch.zeros(2, 4), torch.ones(4)
    models._registered_adapters = AdapterLRUCache(models.capacity, models.deactivate_adapter)
    models._active_adapters = AdapterLRUCache(2, models._deactivate_adapter)
    models.lora_index_to_id, models._last_mapping, models._last_slot_layout = [None, None], None, None
    workers = object.__new__(worker.BankWorkerManager)
    workers._adapter_manager, workers.lora_config, workers.device = models, models.lora_config, torch.device("cpu")
    workers._brought = worker.OrderedDict()
    models.modules, workers._cached_dummy_lora, workers.embedding_modules = {}, None, {}
    return workers


def request(manager, name):
    return ours.adapter(name, manager._adapter_manager.store.path)


def in_slots(manager):
    models = manager._adapter_manager
    return {models.table[slot, 0].item() for slot, id in enumerate(models.lora_index_to_id) if id is not None}


def test_a_step_has_its_adapters_in_slots_and_keeps_those_that_are_there(manager):
    first, second, third = (request(manager, name) for name in NAMES[:3])
    manager._apply_adapters({first, second})
    assert in_slots(manager) == {1, 2}
    manager._adapter_manager.table[manager._adapter_manager.lora_index_to_id.index(first.lora_int_id)] += 0.5
    manager._apply_adapters({third, first})  # `first` is the older of the two there, and is used
    assert in_slots(manager) == {1.5, 3}  # so it was not copied again
    with pytest.raises(RuntimeError, match="3 adapters, must be at most --max-loras = 2"):
        manager._apply_adapters({first, second, third})


def test_adapters_of_steps_give_way_and_those_that_were_added_stay(manager):
    added = request(manager, NAMES[0])
    assert manager.add_adapter(added) and not manager.add_adapter(added)
    for name in NAMES[1:]:
        manager._apply_adapters({request(manager, name)})
    kept = {each.lora_int_id for each in (added, *(request(manager, name) for name in NAMES[-2:]))}
    assert manager.list_adapters() == kept
    assert manager.remove_adapter(added.lora_int_id) and len(manager.list_adapters()) == 2
    manager.remove_all_adapters()
    assert not manager.list_adapters() and not manager._brought and in_slots(manager) == set()


def test_a_version_is_what_it_was_when_it_was_asked_for(manager):
    old = request(manager, NAMES[0])
    manager.add_adapter(old)
    with lx.AdapterBank(manager._adapter_manager.store.path, "a") as bank:
        bank.add(NAMES[0], {"0": torch.full((2, 2), 9.0)}, replace=True)
    new = request(manager, NAMES[0])
    assert new.lora_int_id != old.lora_int_id and new.lora_name != old.lora_name and new != old
    manager._apply_adapters({old, new})  # in one step
    assert in_slots(manager) == {1, 9}
    manager.remove_adapter(old.lora_int_id)
    with pytest.raises(KeyError, match="'user-0' was replaced"):
        manager.add_adapter(old)


def test_no_adapter_is_used_on_new_base_weights(manager):
    held = request(manager, NAMES[0])
    manager.add_adapter(held)
    with pytest.raises(RuntimeError, match="restart the server"):
        worker.refuse_new_weights(SimpleNamespace(lora_config=True, lora_manager=manager))
    for use in (manager.add_adapter, lambda each: manager._apply_adapters({each})):
        with pytest.raises(RuntimeError, match="restart the server"):
            use(held)
    manager._apply_adapters(set())  # the base model is what it is


@pytest.mark.parametrize("path", ["/some/folder", "loraxs:12:user-0", "loraxs:" + "0" * 64 + ":", "org/name"])
def test_other_paths_than_the_banks_are_refused(manager, path):
    with pytest.raises(ValueError, match="only those are served"):
        manager.add_adapter(LoRARequest("a", 1, path))


def test_versions_survive_their_way_through_a_request():
    for name in ("alice", "a:b#c", "grün", "x" * 400):
        version = ours.Version(name, bytes(range(32)))
        assert ours.Version.of(version.path) == version and ours.name_of(version.label) == name


@pytest.fixture
def served(monkeypatch, tmp_path):
    monkeypatch.setenv(ours.BANK, str(tmp_path))


def test_without_a_bank_nothing_is_replaced(monkeypatch):
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    before = mixin.LRUCacheWorkerLoRAManager
    monkeypatch.delenv(ours.BANK, raising=False)
    monkeypatch.setattr(ours, "TESTED", ())
    ours.register()
    assert mixin.LRUCacheWorkerLoRAManager is before


def test_another_vllm_is_refused(monkeypatch, served):
    monkeypatch.setattr(vllm, "__version__", "0.99")
    with pytest.raises(RuntimeError, match=r"got version 0\.99, must be 0\.32\.0 or"):
        ours.register()


@pytest.mark.parametrize("at", range(len(ours.NAMES)))
def test_a_name_that_vllm_has_moved_is_refused(monkeypatch, served, at):
    module, name, _ = ours.NAMES[at]
    moved = [*ours.NAMES]
    moved[at] = (module, f"{name}_moved", "used")
    monkeypatch.setattr(ours, "NAMES", tuple(moved))
    with pytest.raises(RuntimeError, match=f"has no {name}_moved"):
        ours.register()


def config(**changes):
    lora = SimpleNamespace(fully_sharded_loras=False, target_modules=None, default_mm_loras=None)
    model = SimpleNamespace(enable_sleep_mode=False, is_encoder_decoder=False)
    cache = SimpleNamespace(kv_sharing_fast_prefill=False)
    rest = {"kv_transfer_config": None, "weight_transfer_config": None, "cache_config": cache}
    parallel = SimpleNamespace(use_ubatching=False, pipeline_parallel_size=1, enable_expert_parallel=False)
    whole = SimpleNamespace(lora_config=lora, model_config=model, parallel_config=parallel, **rest)
    for name, value in changes.items():
        next(part for part in (lora, model, parallel, cache, whole) if hasattr(part, name)).__dict__[name] = value
    return whole


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("fully_sharded_loras", True, "--fully-sharded-loras"),
        ("target_modules", ["q_proj"], "--lora-target-modules"),
        ("default_mm_loras", {"audio": "x"}, "--default-mm-loras"),
        ("enable_sleep_mode", True, "--enable-sleep-mode"),
        ("use_ubatching", True, "--enable-dbo"),
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("enable_expert_parallel", True, "--enable-expert-parallel"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
        ("weight_transfer_config", object(), "--weight-transfer-config"),
    ],
)
def test_settings_under_which_a_bank_is_not_served(option, value, said):
    ours.check_config(config())
    with pytest.raises(ValueError, match=said):
        ours.check_config(config(**{option: value}))


def test_an_id_means_one_adapter(manager):
    first, second = (request(manager, name) for name in NAMES[:2])
    assert (
        first.lora_int_id < second.lora_int_id < 2**31 and request(manager, NAMES[0]).lora_int_id == first.lora_int_id
    )
    manager.add_adapter(first)
    with pytest.raises(ValueError, match=r"has loraxs:[0-9a-f]+:user-0 already"):
        manager.add_adapter(LoRARequest(second.lora_name, first.lora_int_id, second.lora_path))


def test_vllms_warm_up_has_adapters_of_its_own(manager):
    warm_up = {LoRARequest(f"warmup_{id}", id, "/not/a/real/path") for id in (1, 2)}
    for each in warm_up:
        manager.add_dummy_lora(each, 8)
    manager._apply_adapters(warm_up)
    assert manager.list_adapters() == {1, 2} and in_slots(manager) == {0}


def test_a_layer_that_vllm_does_not_call_is_refused(manager):
    layers = {name: worker.LoraXSLayer() for name in ("mlp.up_proj", "mlp.gate")}
    manager._adapter_manager.modules, manager._adapter_manager.model = layers, object()
    first = request(manager, NAMES[0])
    assert manager.add_adapter(first)  # nothing has run yet
    layers["mlp.up_proj"].add(None, None)
    for use in (manager.add_adapter, lambda each: manager._apply_adapters({each})):
        with pytest.raises(RuntimeError, match=r"'mlp\.gate': vLLM's object does not call it"):
            use(first)
    layers["mlp.gate"].add(None, None)
    assert manager.add_adapter(request(manager, NAMES[1]))
