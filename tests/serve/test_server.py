"""vLLM's server with a bank, without an engine: names resolved for each request, versions held, weights by HTTP."""

from __future__ import annotations

import asyncio
import errno
import threading
import types

import pytest
import torch
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels.matching import adapted_layers

pytest.importorskip("vllm")
pytest.importorskip("lmdb")

import httpx
import msgspec
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.exceptions import VLLMNotFoundError, VLLMServerError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import LoRARequestStates
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from loraxs_kernels.integrations import vllm_server
from loraxs_kernels.integrations.vllm import Version, adapter, name_of
from loraxs_kernels.integrations.vllm_server import BankModels, BankRequest, Endpoint

SECRET = "0123456789abcdef"
pytestmark = pytest.mark.anyio  # runs those that are coroutines; vLLM's own packages bring its plugin


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def trained(seed: int) -> nn.Module:
    torch.manual_seed(0)
    model = lx.attach(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), 4, target_modules=["0", "2"])
    torch.manual_seed(seed)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.R)
    return model


def R_of(seed: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((4, 4), float(seed)) for name in ("0", "2")}


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """A bank of a, b, c, ... j, which the server of these tests is started with."""
    with lx.AdapterBank.create(tmp_path / "bank", trained(0)) as bank:
        bank.add_many((name, R_of(i)) for i, name in enumerate("abcdefghij"))
    monkeypatch.setenv("LORAXS_BANK", str(tmp_path / "bank"))
    monkeypatch.setenv("LORAXS_TOKEN", SECRET)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    monkeypatch.setattr(OpenAIServingModels, "__new__", OpenAIServingModels.__new__)
    monkeypatch.setattr(LoRARequestStates, "_request_update", LoRARequestStates._request_update)
    vllm_server.install()
    yield vllm_server.Store(tmp_path / "bank", "a")


class Engine:
    """What of an AsyncLLM is used; `calls` are those of the engine, `held` what it holds after them."""

    def __init__(self, most: int = 2, **parallel: int) -> None:
        lora = types.SimpleNamespace(max_cpu_loras=most)
        parallel = types.SimpleNamespace(**{"_api_process_count": 1, "data_parallel_size": 1} | parallel)
        self.vllm_config = types.SimpleNamespace(lora_config=lora, parallel_config=parallel)
        self.model_config = types.SimpleNamespace(max_model_len=64)
        self.renderer = self.input_processor = None
        self.calls, self.held, self.error, self.gate = [], {}, None, None

    async def add_lora(self, request: LoRARequest) -> bool:
        self.calls.append(("add", request.lora_name.partition("#")[0]))
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.held[request.lora_int_id] = request.lora_path
        return True

    async def remove_lora(self, id: int) -> bool:
        path = self.held.pop(id, None)
        self.calls.append(("remove", path and Version.of(path).name))
        return path is not None


def served(engine: Engine | None = None, **options) -> BankModels:
    return OpenAIServingModels(engine or Engine(), [BaseModelPath("base", "/models/base")], **options)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def models(bank, engine) -> BankModels:
    return served(engine)


async def settled() -> None:
    """Until the tasks that evict have come to their end."""
    for _ in range(10):
        await asyncio.sleep(0)


def ask(model: str | None) -> types.SimpleNamespace:
    return types.SimpleNamespace(model=model)


def serving(models: BankModels, kind: type[BaseServing] = BaseServing) -> BaseServing:
    """vLLM's own half of what finds the adapter of a request."""
    found = object.__new__(kind)
    found.models, found.request_logger = models, None
    return found


async def test_each_request_gets_the_record_of_its_own_moment(bank, engine, models):
    """vLLM's own two steps, with an await between them, in tasks side by side; nothing is left for later ones."""

    async def request(name):
        assert await serves._check_model(ask(name)) is None
        await asyncio.sleep(0.01)
        found = serves._maybe_get_adapters(ask(name), supports_default_mm_loras=name == "base")
        return models.model_name(found), found

    serves = serving(models)
    results = await asyncio.gather(*map(request, ["a", "b", "a", "base", None]))  # a task for each
    assert [name for name, _ in results] == ["a", "b", "a", "base", "base"]
    first = results[0][1]
    assert results[2][1] is first and results[3][1] is None and type(first) is BankRequest
    assert Version.of(first.lora_path) == Version("a", bank.digests(["a"])["a"])
    assert (list(models.lora_requests), "a" in models.lora_requests) == ([], False)
    bank.add("a", R_of(99), replace=True)
    _, second = await asyncio.create_task(request("a"))
    assert second.lora_path != first.lora_path and name_of(second.lora_name) == "a"
    bank.remove("a")
    assert (await serves._check_model(ask("a"))).error.code == 404
    assert engine.held.keys() >= {first.lora_int_id, second.lora_int_id}  # both are in use


async def test_a_pooling_server_resolves_names_too(bank):
    PoolingBaseServing.__abstractmethods__ = frozenset()
    serves = serving(served(), PoolingBaseServing)
    await serves._check_model(ask("a"))
    assert serves._maybe_get_adapters(ask("a")).lora_path.endswith(":a")
    await serves._check_model(ask("nobody"))
    with pytest.raises(VLLMNotFoundError):
        serves._maybe_get_adapters(ask("nobody"))


async def test_a_version_is_added_once_and_by_all_who_wait_for_it(engine, models):
    engine.gate = asyncio.Event()
    tasks = [asyncio.create_task(models.resolve_lora("a")) for _ in range(3)]
    while not engine.calls:
        await asyncio.sleep(0.001)
    tasks[0].cancel()
    await settled()
    engine.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError) and results[1] is results[2]
    assert engine.calls == [("add", "a")]


async def test_what_is_in_flight_stays_and_what_was_idle_longest_goes(bank):
    engine = Engine()
    versions = served(engine).versions
    in_flight = await versions.request("a")
    for name in "bcd":
        await versions.request(name)
        await settled()
    assert [name for call, name in engine.calls if call == "remove"] == ["b", "c"]
    all_in_flight = [await versions.request(name) for name in "adbc"]
    await settled()
    assert all_in_flight[0] is in_flight and len(engine.held) == 4
    del all_in_flight, in_flight
    await versions.request("a")
    await settled()
    assert sorted(Version.of(path).name for path in engine.held.values()) == ["a", "c"]


async def test_a_version_is_removed_a_turn_after_it_was_found_idle_unless_a_request_came_back_to_it(bank):
    """In that turn vLLM sends the abort of a request that a stop string has ended."""
    engine = Engine(3)
    versions = served(engine).versions
    for name in "abc":
        await versions.request(name)
    versions.most = 2
    evicting = asyncio.create_task(versions._evict())
    await asyncio.sleep(0)
    assert len(engine.held) == 3
    again = versions._at_hand(next(iter(versions._held)))
    await evicting
    assert engine.calls[3:] == [("remove", "b")] and again.lora_int_id in engine.held


async def test_nothing_grows_with_the_names_that_were_asked_for(engine, models):
    for i in range(200):
        assert (await models.resolve_lora(f"unknown-{i}")).error.code == 404
    for name in ("", "x" * 600, "nul\0", "half \ud800"):
        assert (await models.resolve_lora(name)).error.code == 404
    for name in "abcdefghij" * 2:
        assert name_of((await models.resolve_lora(name)).lora_name) == name
        await settled()
    assert len(engine.held) == len(models.versions._held) == 2
    assert not models.versions._adding and not models.lora_resolver_lock
    counts = LoRARequestStates(log_stats=True)
    counts.request_running("id", "a#0123")
    assert not counts.requests  # else every set of adapters that ever ran is a label of a metric for good


async def test_a_damaged_record_is_the_servers_fault_and_never_gets_to_the_engine(bank, engine, models):
    bank._run(lambda txn: txn.put(b"b", bytes(txn.get(b"b"))[:-1] + b"!"), write=True)
    with pytest.raises(VLLMServerError, match="adapter 'b' cannot be served: the bank: adapter 'b': is damaged"):
        await models.resolve_lora("b")
    assert not engine.calls and await models.resolve_lora("a")


async def test_what_the_engine_refuses_is_held_nowhere(engine, models):
    engine.error = RuntimeError("no room")
    with pytest.raises(VLLMServerError, match="adapter 'a' cannot be served: no room"):
        await models.resolve_lora("a")
    assert engine.calls == [("add", "a"), ("remove", None)] * 2 and not models.versions._held
    engine.error = None
    assert isinstance(await models.resolve_lora("a"), LoRARequest)
    engine.error = EngineDeadError()
    with pytest.raises(EngineDeadError):
        await models.resolve_lora("b")


async def test_a_record_that_is_replaced_while_it_is_added_is_asked_for_anew(bank, engine, models):
    """The workers refuse another record than that of the version."""
    engine.gate, engine.error = asyncio.Event(), KeyError("was replaced")
    task = asyncio.create_task(models.resolve_lora("a"))
    while not engine.calls:
        await asyncio.sleep(0.001)
    bank.add("a", R_of(99), replace=True)
    engine.gate.set()
    while len(engine.calls) < 2:
        await asyncio.sleep(0)
    engine.error = None
    assert Version.of((await task).lora_path).digest == bank.digests(["a"])["a"]


def test_requests_are_sent_to_the_engine_as_vllms_own(bank):
    version = Version("a", bytes(32))
    ours = BankRequest(lora_name=version.label, lora_int_id=7, lora_path=version.path)
    theirs = LoRARequest(version.label, 7, version.path)

    def sent(lora):
        whole = EngineCoreRequest("id", [1], None, None, None, 0.0, lora, None, None)
        return [bytes(part) for each in (whole, (0, 1, "add_lora", (lora,))) for part in MsgpackEncoder().encode(each)]

    assert sent(ours) == sent(theirs) and hash(ours) == hash(theirs)
    assert msgspec.convert(MsgpackDecoder().decode(MsgpackEncoder().encode(ours)), LoRARequest) == theirs
    assert adapter("a").lora_path == Version("a", bank.digests(["a"])["a"]).path
    with pytest.raises(KeyError):
        adapter("nobody", bank.path)


def test_models_are_the_base_and_the_first_names(bank, monkeypatch):
    monkeypatch.setattr(vllm_server, "LISTED", 3)
    cards = asyncio.run(served().show_available_models()).data
    assert [(card.id, card.root, card.parent) for card in cards] == [("base", "/models/base", None)] + [
        (name, name, "base") for name in "abc"
    ]


def test_vllms_own_ways_to_load_adapters_are_refused(bank):
    for call in (served().load_lora_adapter, served().unload_lora_adapter):
        answer = asyncio.run(call(types.SimpleNamespace(lora_name="x", lora_path="/tmp/x")))
        assert isinstance(answer, ErrorResponse) and answer.error.code == 403
    with pytest.raises(ValueError, match=r"^--lora-modules"):
        served(lora_modules=["x"])


@pytest.mark.parametrize("option", ["_api_process_count", "data_parallel_size"])
def test_several_servers_or_engines_are_refused(bank, option):
    with pytest.raises(ValueError, match=rf"^--{option.strip('_').split('_')[0]}.*: must be 1"):
        served(Engine(**{option: 2}))


def test_other_servers_are_refused(bank, monkeypatch):
    engine = Engine()
    engine.vllm_config.lora_config = None
    with pytest.raises(ValueError, match=r"^--enable-lora: must be set"):
        served(engine)
    bank.add("base", R_of(1))
    with pytest.raises(ValueError, match="has an adapter 'base', which is the name of the base model"):
        served()
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(ValueError, match=r"^VLLM_SKIP_MODEL_NAME_VALIDATION: must not be set"):
        served()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(RuntimeError, match="VLLM_USE_RUST_FRONTEND"):
        vllm_server.install()


# New weights while it runs


class Site:
    """The server's application with the endpoint, and with vLLM's own handlers of errors."""

    def __init__(self, token: str = SECRET) -> None:
        self.app = FastAPI()
        Endpoint().attach_router(self.app)
        init_exception_handler(self.app)
        self.app.state.args = types.SimpleNamespace(log_error_stack=False)
        self.engine = Engine()
        self.models = self.app.state.openai_serving_models = served(self.engine)
        self.headers = {vllm_server.HEADER: token}

    def __call__(self, method: str, name: str, content: object = b"", **headers: str) -> httpx.Response:
        return asyncio.run(self.send(method, name, content, **headers))

    async def send(self, method: str, name: str, content: object = b"", **headers: str) -> httpx.Response:
        where = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=where, base_url="http://server") as client:
            headers = self.headers | headers
            return await client.request(method, f"/v1/loraxs/adapters/{name}", content=content, headers=headers)


def file_of(tmp_path, seed: int, **options) -> bytes:
    lx.save_adapter(trained(seed), tmp_path / "adapter.safetensors", **options)
    return (tmp_path / "adapter.safetensors").read_bytes()


async def test_new_weights_are_whole_for_the_next_request_and_old_ones_for_those_in_flight(bank, tmp_path):
    site = Site()
    answer = await site.send("POST", "team/zoë", file_of(tmp_path, 1))
    assert (answer.status_code, answer.json()["name"]) == (201, "team/zoë")
    first = await site.models.resolve_lora("team/zoë")
    assert Version.of(first.lora_path).digest.hex() == answer.json()["digest"]
    answer = await site.send("POST", "team/zoë", file_of(tmp_path, 2))
    assert answer.status_code == 200
    second = await site.models.resolve_lora("team/zoë")
    assert Version.of(second.lora_path).digest.hex() == answer.json()["digest"] and second != first
    assert site.engine.held.keys() >= {first.lora_int_id, second.lora_int_id}
    R = torch.cat([layer.R.detach().flatten() for _, layer in adapted_layers(trained(2))])
    assert torch.equal(bank.read("team/zoë"), R)
    assert (await site.send("DELETE", "team/zoë")).status_code == 200
    assert (await site.send("DELETE", "team/zoë")).status_code == 404
    assert (await site.models.resolve_lora("team/zoë")).error.code == 404


@pytest.mark.parametrize("token", ["", SECRET[:-1], SECRET + "x", SECRET.upper(), "é" * 16])
def test_whoever_lacks_the_token_changes_nothing_and_is_not_listened_to(bank, tmp_path, token):
    async def body():
        raise AssertionError("the body was read")
        yield b""

    before = bank.digests("abcdefghij")
    site = Site()
    site.headers = {vllm_server.HEADER: token.encode("latin-1")} if token else {}
    for method, name in (("POST", "a"), ("POST", "new"), ("DELETE", "a"), ("DELETE", "none"), ("POST", "\0")):
        answer = site(method, name.replace("\0", "%00"), body())
        assert answer.status_code == 401 and SECRET not in answer.text
    assert bank.digests("abcdefghij") == before and len(bank) == 10


def test_without_a_token_there_is_no_such_route(bank, monkeypatch):
    monkeypatch.setenv("LORAXS_TOKEN", "")
    assert Site("")("POST", "a", b"x").status_code == 404 and Site("")("DELETE", "a").status_code == 404
    assert "a" in bank
    for short in ("0123456789abcde", "with a space in it", "new\nline 0123456789"):
        monkeypatch.setenv("LORAXS_TOKEN", short)
        with pytest.raises(ValueError, match=r"^LORAXS_TOKEN: must be 16 or more"):
            Site()


def test_the_token_goes_beside_an_api_key(bank, tmp_path):
    site = Site()
    site.app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    assert site("POST", "new", file_of(tmp_path, 1)).status_code == 401
    assert site("POST", "new", file_of(tmp_path, 1), Authorization="Bearer key").status_code == 201
    assert site("POST", "new", b"", Authorization=f"Bearer {SECRET}").status_code == 401


def test_a_body_has_a_limit_which_no_header_moves(bank, tmp_path):
    """Read no further than the limit, whatever the request says of its length."""
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 2**16
            yield bytes(2**16)

    site, most = Site(), vllm_server.most_bytes(bank)
    for headers in ({}, {"Content-Length": "1000"}):
        sent = 0
        answer = site("POST", "a", chunks(), **headers)
        assert answer.status_code == 413 and f"at most {most} bytes" in answer.text
        assert sent <= most + 2 * 2**16
    sent = 0
    assert site("POST", "a", chunks(), **{"Content-Length": str(10**12)}).status_code == 413 and sent == 0
    assert len(file_of(tmp_path, 1, portable=True)) < most


def test_a_client_that_goes_in_the_middle_changes_nothing(bank, tmp_path):
    site, body, before = Site(), file_of(tmp_path, 1), bank.digests("a")
    messages = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        assert message.get("status") != 200

    headers = [(vllm_server.HEADER.lower().encode(), SECRET.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/loraxs/adapters/a", "headers": headers, "query_string": b""}
    with pytest.raises(ClientDisconnect):
        asyncio.run(site.app(scope, receive, send))
    assert not messages and bank.digests("a") == before


def test_what_is_no_adapter_of_this_bank_is_refused_without_the_servers_paths(bank, tmp_path):
    site, before = Site(), bank.digests("abcdefghij")
    torch.manual_seed(5)
    other = lx.attach(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), 4, target_modules=["0", "2"])
    lx.save_adapter(other, tmp_path / "other.safetensors")
    nan = trained(1)
    next(layer for _, layer in adapted_layers(nan)).R.data[0, 0] = 1e30
    lx.save_adapter(nan, tmp_path / "large.safetensors")
    good = file_of(tmp_path, 1)
    refused = {
        b"": 400,
        b"no adapter": 400,
        good[:-1]: 400,
        good[:-1] + bytes([good[-1] ^ 1]): 400,
        (tmp_path / "other.safetensors").read_bytes(): 409,
    }
    for body, status in refused.items():
        answer = site("POST", "a", body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"].startswith("the adapter: ") and "/" not in answer.text
    for name in ("%00", "x" * 512, "", "base"):
        answer = site("POST", name, good)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("name: "), answer.text
    assert bank.digests("abcdefghij") == before and len(bank) == 10


@pytest.mark.parametrize(
    "error, status, says",
    [
        (OSError(errno.ENOSPC, "No space left", "PATH/data.mdb"), 507, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "PATH/lock.mdb"), 500, "the bank/lock.mdb"),
        (ValueError("PATH: data.mdb was replaced since the bank was opened; open it again"), 500, "the bank: data.mdb"),
    ],
)
def test_the_servers_own_troubles_are_not_the_clients(bank, tmp_path, monkeypatch, error, status, says):
    def add(*args, **kwargs):
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, error.filename.replace("PATH", str(bank.path)))
        raise ValueError(str(error).replace("PATH", str(bank.path)))

    monkeypatch.setattr(vllm_server.Store, "add", add)
    answer = Site()("POST", "a", file_of(tmp_path, 1))
    assert answer.status_code == status and says in answer.text and str(bank.path) not in answer.text


async def test_a_write_that_waits_for_another_process_leaves_the_server_free(bank, tmp_path):
    """LMDB has one writer at a time: names are resolved meanwhile."""
    site = Site()
    body, loop = file_of(tmp_path, 1), asyncio.get_running_loop()
    held, go = asyncio.Event(), threading.Event()

    def other(txn):
        loop.call_soon_threadsafe(held.set)
        assert go.wait(30)

    writer = asyncio.create_task(asyncio.to_thread(bank._run, other, True))
    await held.wait()
    post = asyncio.create_task(site.send("POST", "new", body))
    for name in "abcabc":
        assert name_of((await site.models.resolve_lora(name)).lora_name) == name
    assert not post.done()
    go.set()
    assert (await post).status_code == 201
    await writer
