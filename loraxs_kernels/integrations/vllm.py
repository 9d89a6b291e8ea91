"""LoRA-XS in vLLM: the adapters of a bank as models of one server, A and B of each layer held once.

vLLM finds this module through the entry points `vllm.general_plugins` (`register`, in every process) and
`vllm.endpoint_plugins` (vllm_server.py, in the server alone).  Nothing happens unless LORAXS_BANK names a bank;
`loraxs serve` sets it.  vllm_worker.py runs in the workers: the layers and their R; vllm_factors.py: their A and B.

A version of an adapter is its name with the SHA-256 of its record.  vLLM is given a LoRARequest for each version, by
whose name and path it also tells cached prefixes apart, so that a request computes with one version from its first
token to its last, whatever is written to the bank meanwhile.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from ..bank import Store

BANK = "LORAXS_BANK"  # the folder of the bank that is served
BASIS = "LORAXS_BASIS"  # a basis file of the base model, so that A and B are not computed at the start
TOKEN = "LORAXS_TOKEN"  # what a client must say to write adapters; without it nobody can
SCHEME = "loraxs"  # of the paths in LoRARequests

TESTED = ("0.32.0", "0.33.0")  # versions of vLLM; the second only in part: docs/serving.md
# What is replaced in vLLM ("replaced") or relied on beyond its documented interfaces ("used"): module, name, how.
NAMES: tuple[tuple[str, str, str], ...] = (
    ("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager", "replaced"),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.reset_lora_state", "replaced"),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._apply_adapters", "replaced"),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._load_adapter", "replaced"),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls", "replaced"),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_adapter", "replaced"),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.remove_adapter", "replaced"),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.remove_all_adapters", "replaced"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._add_adapter", "replaced"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._create_lora_modules", "replaced"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._get_punica_wrapper", "used"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._init_punica_wrapper", "replaced"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", "replaced"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.capacity", "replaced"),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.create_dummy_lora", "replaced"),
    ("vllm.lora.model_manager", "DEFAULT_LANGUAGE_WRAPPER_KEY", "used"),
    ("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_lora_to_output", "replaced"),
    ("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.set_mapping", "replaced"),
    ("vllm.lora.utils", "_all_lora_classes", "used"),
    ("vllm.lora.utils", "replace_submodule", "used"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", "replaced"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.is_base_model", "used"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.load_lora_adapter", "replaced"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", "replaced"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.resolve_lora", "replaced"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.show_available_models", "replaced"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.unload_lora_adapter", "replaced"),
    ("vllm.v1.metrics.stats", "LoRARequestStates._request_update", "replaced"),
    ("vllm.envs", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "used"),
    ("vllm.envs", "VLLM_SKIP_MODEL_NAME_VALIDATION", "used"),
    ("vllm.envs", "VLLM_USE_RUST_FRONTEND", "used"),
)


@dataclass(frozen=True)
class Version:
    """An adapter as a record of the bank has it: its name and the SHA-256 of the record."""

    name: str
    digest: bytes

    @property
    def path(self) -> str:
        """What a LoRARequest has as lora_path."""
        return f"{SCHEME}:{self.digest.hex()}:{self.name}"

    @property
    def label(self) -> str:
        """What a LoRARequest has as lora_name: vLLM takes requests of one lora_name for the same."""
        return f"{self.name}#{self.digest[:8].hex()}"

    @classmethod
    def of(cls, path: str) -> Version:
        """The version that a lora_path names; ValueError where it is another path."""
        scheme, _, rest = path.partition(":")
        digest, _, name = rest.partition(":")
        if scheme != SCHEME or len(digest) != 64 or not name:
            raise ValueError(f"lora_path: got {path!r}, which is no adapter of the bank; only those are served")
        return cls(name, bytes.fromhex(digest))


def name_of(label: str) -> str:
    """The adapter that a lora_name (`Version.label`) means."""
    return label.rpartition("#")[0]


def register() -> None:
    """Serve the bank that LORAXS_BANK names, if it names one: what vLLM calls in each of its processes.

    Raises RuntimeError where this vLLM is not one of TESTED, or does not have what is replaced in it.
    """
    if not os.environ.get(BANK):
        return
    check_vllm()
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    from . import vllm_server, vllm_worker

    mixin.LRUCacheWorkerLoRAManager = vllm_worker.BankWorkerManager
    mixin.LoRAModelRunnerMixin.reset_lora_state = vllm_worker.refuse_new_weights
    vllm_server.install()


def check_vllm() -> None:
    """Raise RuntimeError where this vLLM is not one of TESTED, or lacks one of NAMES."""
    import vllm

    if vllm.__version__.partition("+")[0] not in TESTED:
        raise RuntimeError(
            f"vllm: got version {vllm.__version__}, must be {' or '.join(TESTED)} to serve the bank in {BANK}: "
            "loraxs_kernels replaces parts of vLLM, and was tried with no other version"
        )
    for module, name, _ in NAMES:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            raise RuntimeError(f"vllm: {module} has no {name}, which loraxs_kernels needs to serve the bank in {BANK}")


def check_config(config: Any) -> None:
    """Raise ValueError for settings of vLLM under which the adapters of a bank are not served."""
    lora, parallel = config.lora_config, config.parallel_config
    refused = {
        "--fully-sharded-loras": lora.fully_sharded_loras,
        "--lora-target-modules": lora.target_modules,
        "--default-mm-loras": lora.default_mm_loras,
        "--enable-sleep-mode": config.model_config.enable_sleep_mode,
        "an encoder-decoder model": config.model_config.is_encoder_decoder,  # its layers get other rows than the text's
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,  # so do some layers with it
        "--kv-transfer-config": config.kv_transfer_config is not None,  # not all connectors tell adapters apart
        "--weight-transfer-config": config.weight_transfer_config is not None,
        "--enable-dbo": parallel.use_ubatching,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "VLLM_LORA_ENABLE_DUAL_STREAM": os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") not in ("0", ""),
    }
    for option, asked in refused.items():
        if asked:
            raise ValueError(f"{option}: cannot be used to serve the bank that {BANK} names")


def token() -> bytes | None:
    """What a client must say to write adapters; None where nobody can.  ValueError for what is too easily guessed."""
    given = os.fsencode(os.environ.get(TOKEN, ""))
    if not given:
        return None
    if not re.fullmatch(rb"[!-~]{16,}", given):
        raise ValueError(f"{TOKEN}: must be 16 or more characters of ASCII without spaces, or unset")
    return given


def adapter(name: str, bank: str | os.PathLike | None = None) -> LoRARequest:
    """A request for an adapter of a bank, for `LLM.generate(..., lora_request=adapter("alice"))`.

    Args:
        name: of the adapter.
        bank: the folder of the bank that the engine was started with; None: the one that LORAXS_BANK names.

    The request is for the version of the adapter that the bank has now.  If the adapter is replaced or removed before
    the engine has read it, the engine ends with an error.  Raises KeyError if there is no adapter of that name.
    """
    if not (bank := bank or os.environ.get(BANK)):
        raise ValueError(f"bank: got {bank!r}, must be a folder, or {BANK} must be set, before vllm is imported")
    from vllm.lora.request import LoRARequest

    version = Version(name, _store(os.path.abspath(bank)).digests([name])[name])
    return LoRARequest(lora_name=version.label, lora_int_id=_id(version), lora_path=version.path)


_ids = itertools.count(1)


@functools.cache  # two ids for one version would be an error in a step
def _id(version: Version) -> int:
    return next(_ids)


@functools.lru_cache(maxsize=1)
def _store(path: str) -> Store:
    from ..bank import Store

    return Store(path)
