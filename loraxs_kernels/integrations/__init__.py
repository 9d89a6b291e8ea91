"""Integrations with other libraries.  Each is imported when it is first used, because it needs its library.

peft            LoRA-XS as a PEFT method: get_peft_model(model, LoraXSConfig(...))
reference_repo  models and checkpoints of the reference implementation; export as a plain LoRA adapter
transformers    Trainer, TRL and accelerate on models from `attach`
vllm            adapters of a bank in vLLM, which loads this through its entry points
"""

from __future__ import annotations

import importlib
from types import ModuleType

NEIGHBOURS = ("peft", "reference_repo", "transformers", "vllm")


def __getattr__(name: str) -> ModuleType:
    if name in NEIGHBOURS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *NEIGHBOURS})
