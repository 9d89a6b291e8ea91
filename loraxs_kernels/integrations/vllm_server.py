"""vLLM's server with a bank: adapters found by name for each request, versions held by the engine, new weights by HTTP.

`BankModels` stands in the place of vLLM's OpenAIServingModels, which knows the models by the names that clients say.
Each request asks the bank for the record that its name has then (10 us), so that all writers are seen at once, from
whichever process.  (vLLM's LoRAResolverRegistry would be asked once for a name, and not again when it has another
record.)  The engine holds a version from `add_lora` to `remove_lora`; an exception in a step of the engine ends it, so
no request gets there whose version is not held, and none is removed that a request in flight uses.

What is in flight is known by the LoRARequest: a version has one object, which the coroutine of the request holds, then
the generator of its outputs and vLLM's RequestState, until the engine has finished it or was sent its abort.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import itertools
import os
import tempfile
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList, ModelPermission
from vllm.exceptions import VLLMServerError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.tasks import GENERATION_TASKS, POOLING_TASKS
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import LoRARequestStates

from ..acceptance import AdapterMismatch
from ..bank import Store
from .vllm import BANK, TOKEN, Version, name_of, token

LISTED = 1000  # names in /v1/models
PATH = "/v1/loraxs/adapters/{name:path}"
HEADER = "LoraXS-Token"
RUNTIME = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # makes vLLM ask `resolve_lora` for names that it does not know

T = TypeVar("T")
logger = init_logger("vllm.loraxs")  # below vLLM's own logger, which has the handler


def install() -> None:
    """Let every OpenAIServingModels that is made in this process be a BankModels."""
    if envs.VLLM_USE_RUST_FRONTEND:
        raise RuntimeError("VLLM_USE_RUST_FRONTEND is set: that server does not know the bank; unset it")
    OpenAIServingModels.__new__ = staticmethod(lambda cls, *args, **kwargs: object.__new__(BankModels))
    # These counts become labels of a metric, which keeps every set of adapters that ever ran together for good.
    LoRARequestStates._request_update = lambda self, req_id, lora_name, waiting, running: None


class BankRequest(LoRARequest, weakref=True):
    """The LoRARequest of a version: while there is a reference to it, a request may use that version."""


class Versions:
    """The versions of adapters that the engine holds: the `most` used last, or all that are in use where they are more.

    Everything here runs in the event loop.  Calls of the engine go through one socket and are done in order; those of
    one version never overlap.
    """

    def __init__(self, store: Store, engine: EngineClient, most: int) -> None:
        self.store, self.engine, self.most = store, engine, most
        self._held: OrderedDict[Version, tuple[int, weakref.ref[BankRequest]]] = OrderedDict()
        self._ids, self._free = itertools.count(1), []  # vLLM keeps them in 32 bits, so they are used again
        self._adding: dict[Version, asyncio.Task[BankRequest]] = {}
        self._evicting: asyncio.Task[None] | None = None

    async def request(self, name: str) -> BankRequest:
        """A request for the record that an adapter has now, by a version that the engine holds.

        Raises KeyError where there is no adapter of that name, ValueError where its record is damaged, and what the
        engine raises; the engine holds nothing then.
        """
        failed = None
        while True:
            version = Version(name, self.store.digests([name])[name])
            try:
                request = self._at_hand(version) or await self._added(version)
            except EngineDeadError:
                raise
            except Exception:
                if version == failed:
                    raise
                failed = version  # it may have been replaced or removed before it was read
            else:
                if len(self._held) > self.most and self._evicting is None:
                    self._evicting = asyncio.create_task(self._evict())
                return request

    def _at_hand(self, version: Version) -> BankRequest | None:
        if version not in self._held:
            return None
        self._held.move_to_end(version)
        id, reference = self._held[version]
        request = reference()
        if request is None:
            request = _request(version, id)
            self._held[version] = id, weakref.ref(request)
        return request

    async def _added(self, version: Version) -> BankRequest:
        """As `_add`, once for all requests that wait for it; those that are cancelled leave the others alone."""
        if version not in self._adding:
            self._adding[version] = asyncio.create_task(self._add(version))
        return await asyncio.shield(self._adding[version])

    async def _add(self, version: Version) -> BankRequest:
        try:
            # A damaged record is known here, and the workers find it in memory and do not wait for the disk.
            await asyncio.to_thread(self.store.read, version.name, digest=version.digest)
            id = self._free.pop() if self._free else next(self._ids)
            request = _request(version, id)
            try:
                await self.engine.add_lora(request)
            except Exception:
                await self._remove(version, id)  # some of the workers may hold it
                raise
            self._held[version] = id, weakref.ref(request)
            return request
        finally:
            del self._adding[version]

    async def _evict(self) -> None:
        """Remove those that have been idle longest, until there are no more than `most`."""
        try:
            while len(self._held) > self.most:
                version = next((each for each, (_, request) in self._held.items() if request() is None), None)
                if version is None:
                    return
                await asyncio.sleep(0)  # vLLM may send the abort of a request that a stop string ended one turn later
                id, request = self._held[version]
                if request() is None:
                    del self._held[version]
                    await self._remove(version, id)
        finally:
            self._evicting = None

    async def _remove(self, version: Version, id: int) -> None:
        try:
            await self.engine.remove_lora(id)
            self._free.append(id)
        except EngineDeadError:
            pass
        except Exception:
            logger.exception("Adapter %r could not be removed from the engine", version.label)


def _request(version: Version, id: int) -> BankRequest:
    return BankRequest(lora_name=version.label, lora_int_id=id, lora_path=version.path)


class Resolved(Mapping[str, LoRARequest]):
    """Where vLLM looks up a model's name: it has what the task that asks has resolved itself, and lists nothing.

    vLLM checks the name of a request and gets its LoRARequest in one task, with other awaits between them.
    """

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[asyncio.Task, LoRARequest] = weakref.WeakKeyDictionary()

    def put(self, request: LoRARequest) -> None:
        self._of[asyncio.current_task()] = request

    def __getitem__(self, name: str) -> LoRARequest:
        request = self._of.get(asyncio.current_task())
        if request is None or name_of(request.lora_name) != name:
            raise KeyError(name)
        return request

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class BankModels(OpenAIServingModels):
    """The base model and the adapters of the bank, by the names that clients say."""

    def __init__(
        self,
        engine_client: EngineClient,
        base_model_paths: list[BaseModelPath],
        *,
        lora_modules: list[LoRAModulePath] | None = None,
    ) -> None:
        if lora_modules:
            raise ValueError("--lora-modules, --default-mm-loras: are set, must not be: all adapters are the bank's")
        check_server(engine_client.vllm_config)
        super().__init__(engine_client, base_model_paths)
        self.lora_requests = Resolved()
        self.store = Store(os.environ[BANK], "a" if token() else "r")
        for model in base_model_paths:
            if model.name in self.store:
                raise ValueError(
                    f"{self.store.path}: has an adapter {model.name!r}, which is the name of the base model here; "
                    "give the base model another by --served-model-name"
                )
        os.environ[RUNTIME] = "1"  # from here on: the routes are made before, and none to load adapters by path
        self.versions = Versions(self.store, engine_client, engine_client.vllm_config.lora_config.max_cpu_loras)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return super().model_name() if lora_request is None else name_of(lora_request.lora_name)

    async def show_available_models(self) -> ModelList:
        models = await super().show_available_models()
        base = self.base_model_paths[0].name
        for name in itertools.islice(self.store, LISTED):
            models.data.append(ModelCard(id=name, root=name, parent=base, permission=[ModelPermission()]))
        return models

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        try:
            self.store.check_name(lora_name)
        except ValueError:
            return _unknown(lora_name)
        try:
            request = await self.versions.request(lora_name)
        except KeyError:
            return _unknown(lora_name)
        except EngineDeadError:
            raise
        except Exception as error:
            logger.error("Adapter %r cannot be served: %s", lora_name, error)
            raise VLLMServerError(f"adapter {lora_name!r} cannot be served: {public(error, self.store)}") from error
        self.lora_requests.put(request)
        return request

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> ErrorResponse:
        return _forbidden()

    async def unload_lora_adapter(self, request: Any) -> ErrorResponse:
        return _forbidden()


def check_server(config: VllmConfig) -> None:
    """Raise ValueError, naming the option, for servers that a bank is not served by; the workers check the rest."""
    why = "must be 1: one server process knows which adapters the engine holds"
    refused = {
        "--enable-lora": (config.lora_config is None, "must be set to serve a bank"),
        "--api-server-count": (config.parallel_config._api_process_count > 1, why),
        "--data-parallel-size": (config.parallel_config.data_parallel_size > 1, why),
        "VLLM_SKIP_MODEL_NAME_VALIDATION": (
            envs.VLLM_SKIP_MODEL_NAME_VALIDATION,
            "must not be set: vLLM would answer from the base model for every name",
        ),
    }
    for option, (is_so, must) in refused.items():
        if is_so:
            raise ValueError(f"{option}: {must}")


def public(error: BaseException, store: Store) -> str:
    """What an error says, without the folder of the bank."""
    return str(error).replace(str(store.path), "the bank")


def _unknown(name: str) -> ErrorResponse:
    return create_error_response(f"The model `{name}` does not exist.", "NotFoundError", HTTPStatus.NOT_FOUND, "model")


def _forbidden() -> ErrorResponse:
    message = (
        "Adapters are those of the server's bank and are not loaded by path. They are written by `loraxs bank add`, or "
        f"by POST {PATH.partition('{')[0]}NAME if the server was started with {TOKEN}."
    )
    return create_error_response(message, "ForbiddenError", HTTPStatus.FORBIDDEN)


def _unauthorized() -> JSONResponse:
    """Returned and not raised: vLLM logs a traceback of what is raised, and this is for anybody to ask for."""
    error = {"message": f"The header {HEADER} must have the server's {TOKEN}.", "type": "Unauthorized", "code": 401}
    return JSONResponse({"error": error}, HTTPStatus.UNAUTHORIZED)


class Endpoint:
    """New weights while the server runs: the plugin of vLLM that adds POST and DELETE on PATH, if there is a token."""

    name = "loraxs"
    required_tasks = (*GENERATION_TASKS, *POOLING_TASKS)

    def attach_router(self, app: FastAPI) -> None:
        self._token = token() if os.environ.get(BANK) else None
        if self._token is None:
            return
        self._writer = ThreadPoolExecutor(1, "loraxs-writer")  # others wait for it, and not in the loop's own threads
        app.add_api_route(PATH, self.post, methods=["POST"])
        app.add_api_route(PATH, self.delete, methods=["DELETE"])

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Nothing: the bank is that of state.openai_serving_models."""

    async def post(self, name: str, request: Request) -> JSONResponse:
        """Store an adapter file, the body, under a name: all requests that come later see it whole."""
        if not self._knows_token(request):
            return _unauthorized()
        store = self._checked(name, request)
        body = await _body(request, most_bytes(store))

        def write() -> tuple[bool, bytes]:
            there = name in store
            with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
                file.write(body)
                file.flush()
                try:
                    store.add(name, file.name, replace=True)
                except ValueError as error:
                    if file.name not in str(error):
                        raise  # the bank's own fault
                    status = HTTPStatus.CONFLICT if isinstance(error, AdapterMismatch) else HTTPStatus.BAD_REQUEST
                    raise HTTPException(status, public(error, store).replace(file.name, "the adapter")) from error
            return there, store.digests([name])[name]

        there, digest = await self._written(name, store, write)
        logger.info("Adapter %r was written", name)
        status = HTTPStatus.OK if there else HTTPStatus.CREATED
        return JSONResponse({"name": name, "digest": digest.hex()}, status)

    async def delete(self, name: str, request: Request) -> JSONResponse:
        """Delete an adapter: requests that come later do not find it, those in flight go on with it."""
        if not self._knows_token(request):
            return _unauthorized()
        store = self._checked(name, request)
        await self._written(name, store, lambda: store.remove(name))
        logger.info("Adapter %r was deleted", name)
        return JSONResponse({"name": name})

    def _knows_token(self, request: Request) -> bool:
        return hmac.compare_digest(request.headers.get(HEADER, "").encode("latin-1"), self._token)

    def _checked(self, name: str, request: Request) -> Store:
        """The bank, for a name that an adapter can have."""
        models: BankModels = request.app.state.openai_serving_models
        try:
            models.store.check_name(name)
        except ValueError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
        if models.is_base_model(name):
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"name: got {name!r}, which is the base model")
        return models.store

    async def _written(self, name: str, store: Store, write: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writer, write)
        except KeyError:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"There is no adapter {name!r}.") from None
        except (OSError, ValueError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            logger.exception("Adapter %r could not be written", name)
            status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.INTERNAL_SERVER_ERROR
            what = "the disk is full" if full else public(error, store)
            raise HTTPException(status, f"The bank was not changed: {what}") from error


def most_bytes(store: Store) -> int:
    """No adapter file for this bank is larger, unless it was saved with save_factors=True."""
    modules = sum(2**14 + 8 * rank * (rank + 32) for _, rank in store.modules)
    return 2**20 + modules + sum(2**10 + tensor.nbytes for tensor in store.saved.values())


async def _body(request: Request, most: int) -> bytearray:
    body = bytearray()
    said = request.headers.get("content-length", "")
    if not (said.isdecimal() and int(said) > most):
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                break
        else:
            return body
    raise HTTPException(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"An adapter file for this bank has at most {most} bytes; save it without save_factors.",
    )
