"""Making the method known to PEFT, which has a list of its methods and a type for each."""

from __future__ import annotations

import warnings

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

if Version(peft.__version__).release < (0, 18):
    raise ImportError(f"loraxs_kernels.integrations.peft: got peft {peft.__version__}, must be 0.18 or later")


def register(config: type, model: type) -> tuple[type, type]:
    """Make the method known to PEFT, and return its configuration and model.

    If PEFT has a LORAXS of its own, nothing is changed, a warning says so, and PEFT's own two are returned.
    """
    if own := PEFT_TYPE_TO_CONFIG_MAPPING.get("LORAXS"):
        warnings.warn(
            f"peft {peft.__version__} has its own LORAXS, which is used here in place of the fused layers of "
            "loraxs_kernels; lx.attach(model, ...) puts those on without PEFT",
            stacklevel=3,
        )
        return own, PEFT_TYPE_TO_TUNER_MAPPING["LORAXS"]
    if "LORAXS" not in PeftType.__members__:
        _add_member(PeftType, "LORAXS")
    register_peft_method(name="loraxs", config_cls=config, model_cls=model, prefix=model.prefix)
    return config, model


def _add_member(enumeration: type, name: str) -> None:
    """One more member of a string enumeration, a real one: PEFT reads the types in files by PeftType(name)."""
    member = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = enumeration._value2member_map_[name] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python 3.13
        enumeration._hashable_values_.append(name)
    if not hasattr(enumeration, name):  # where the class does not look its members up
        type.__setattr__(enumeration, name, member)
