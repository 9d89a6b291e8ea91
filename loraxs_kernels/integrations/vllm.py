"""LoRA-XS in vLLM: the adapters of a bank as models of one server, A and B of each layer held once.

vLLM finds this module through the entry points `vllm.general_plugins` (`register`, in every process) and
`vllm.endpoint_plugins` (vllm_server.py, in the server alone).  Nothing happens unless LORAXS_BANK names a bank;
`loraxs serve` sets it.  vllm_worker.py is what runs in the workers: the layers and their R.

A version of an adapter is its name with the SHA-256 of its record.  vLLM is given a LoRARequest for each version, by
whose name and path it also tells cached prefixes apart, so that a request computes with one version from its first
token to its last, whatever is written to the bank meanwhile.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import dataclass
from typing import Any

BANK = "LORAXS_BANK"  # the folder of the bank that is served
BASIS = "LORAXS_BASIS"  # a basis file of the base model, so that A and B are not computed at the start
TOKEN = "LORAXS_TOKEN"  # what a client must say to write adapters; without it nobody can
SCHEME = "loraxs"  # of the paths in LoRARequests

TESTED = ("0.32.0",)  # versions of vLLM
# What is replaced in vLLM ("replaced") or relied on beyond its documented interfaces ("used"): module, name, how.
NAMES: tuple[tuple[str, str, str], ...] = (
    ("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager", "replaced"),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.reset_lora_state", "replaced"),
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

    @property
    def id(self) -> int:
        """What a LoRARequest has as lora_int_id: the same in every process, above those of vLLM's own counters."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8], "big") >> 2 | 1 << 62

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
