"""Fused kernels, layers, initialisation and adapter files for LoRA-XS: y = W x + s B R A x, where only R trains."""

from . import functional, integrations
from .acceptance import AdapterMismatch
from .accounting import count_parameters, print_trainable_parameters, summary
from .adapter_file import load_adapter, push_to_hub, save_adapter
from .backends import BackendUnavailable, backend
from .bank import AdapterBank
from .info import info
from .linear import LoRAXSLinear as LoRAXSLinear  # its earlier spelling
from .linear import LoraXSLinear
from .model import attach, detach, merge, unmerge
from .svd import truncated_svd
from .together import forward_together
from .tuning import tune
from .weights import register_weight_reader

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "AdapterMismatch",
    "BackendUnavailable",
    "LoraXSLinear",
    "attach",
    "backend",
    "count_parameters",
    "detach",
    "forward_together",
    "functional",
    "info",
    "integrations",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "push_to_hub",
    "register_weight_reader",
    "save_adapter",
    "summary",
    "truncated_svd",
    "tune",
    "unmerge",
]
