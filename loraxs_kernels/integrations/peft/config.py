"""LoraXSConfig: what PEFT knows of a LoRA-XS adapter, and the file adapter_config.json that holds it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from ...files import read_json, sha256_of, write_atomically
from ...naming import SHORT, dtype_name
from ...recipe import MUST, check, integer, is_number
from ..peft_files import PREFIX, read_tensors

WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)  # the first is what PEFT loads where there are both


def _plain(value: Any) -> Any:
    """A field's value in the types that JSON has, or a set."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        kind = set if isinstance(value, (set, frozenset)) else tuple if isinstance(value, tuple) else list
        return kind(map(_plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    # numpy's numbers and arrays, told without importing it
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(each, str) for each in value)


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def _patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(_pattern(k) and fits(v) for k, v in value.items()))


def _recipe(value: Any) -> bool:
    fields = ("method", "block", "n_iter")
    return isinstance(value, dict) and value.keys() == {*fields} and all(MUST[each][0](value[each]) for each in fields)


# What the fields of a configuration may be, whether a caller or a file sets them; PEFT itself checks none.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (integer(1, 2**16), "an integer from 1 to 65536"),
    "target_modules": (lambda v: v is None or _names(v) or _pattern(v), "names, a regular expression or None"),
    "exclude_modules": (lambda v: v is None or _names(v) or _pattern(v), "names, a regular expression or None"),
    "lora_alpha": (lambda v: v is None or is_number(v), "a finite number or None"),
    "rank_pattern": (
        lambda v: _patterns(v, integer(1, 2**16)),
        "{regular expression: integer from 1 to 65536}",
    ),
    "alpha_pattern": (
        lambda v: _patterns(v, lambda alpha: alpha is None or is_number(alpha)),
        "{regular expression: finite number or None}",
    ),
    "layers_to_transform": (
        lambda v: v is None or all(map(integer(-(2**31), 2**31), v if isinstance(v, (list, tuple, set)) else [v])),
        "an integer, a list of such or None",
    ),
    "layers_pattern": (lambda v: v is None or isinstance(v, str) or _names(v), "a name, a list of names or None"),
    "modules_to_save": (lambda v: v is None or _names(v), "a list of names or None"),
    "bias": (lambda v: v in ("none", "all", "loraxs_only"), '"none", "all" or "loraxs_only"'),
    "loraxs_dropout": MUST["dropout"],
    "init": (lambda v: v in ("svd", "random", "given"), '"svd", "random" or "given"'),
    "init_std": MUST["init_std"],
    "svd_n_iter": MUST["n_iter"],
    "svd_oversample": (lambda v: v is None or integer(0, 2**16)(v), "an integer from 0 to 65536, or None"),
    "svd_seed": MUST["seed"],
    "svd_recipe": (
        lambda v: isinstance(v, dict) and all(map(_recipe, v.values())),
        "{rank and shape: the method, block and n_iter of an SVD}",
    ),
    "dtype": (lambda v: v in (None, "bfloat16", "float16", "float32"), "bfloat16, float16, float32 or None"),
    "weight_dtype": MUST["dtype"],
    "save_factors": (lambda v: v in (True, False), "True or False"),
    "check_fingerprint": (lambda v: v in (True, False), "True or False"),
    "inference_mode": (lambda v: v in (True, False, None), "True, False or None"),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "a name or None"),
    "sha256": (lambda v: isinstance(v, dict), "a dictionary, as save_pretrained writes it"),
}


# Fields without a checksum: users edit them by hand, PEFT changes them, or they only matter in training.
FREE = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type", "auto_mapping"),
    *("peft_version", "loraxs_dropout", "init_std", "check_fingerprint", "weight_dtype", "sha256"),
}

# What lx.attach calls these fields.  The constructor takes either name; a file has the field's.
ATTACH = {"rank": "r", "alpha": "lora_alpha", "dropout": "loraxs_dropout", "sigma": "init_std"}
ATTACH |= {name: f"svd_{name}" for name in ("seed", "n_iter", "oversample")}
ATTACH |= {"lora_dropout": "loraxs_dropout"}  # as LoraConfig calls it


def _takes_other_names(config: type[LoraXSConfig]) -> type[LoraXSConfig]:
    """The class, with a constructor that also takes lx.attach's names, and svd_tier from files of earlier versions."""
    init = config.__init__

    @wraps(init)
    def __init__(self: LoraXSConfig, *args: Any, **given: Any) -> None:
        for name in ATTACH.keys() & given:
            if (field := ATTACH[name]) in given:
                raise ValueError(f"{name}: got {given[name]!r} beside {field}={given[field]!r}, must be one of the two")
            if name == "sigma":
                warnings.warn("LoraXSConfig: sigma is now called init_std", FutureWarning, stacklevel=2)
            given[field] = given.pop(name)
        if "peft_type" in given:  # which a file has, and no caller passes
            self._from_file = bool(given.get("sha256"))  # which dataclasses.replace passes empty
            given = _without_tier(self, given)
        init(self, *args, **given)

    config.__init__ = __init__
    return config


def _without_tier(config: LoraXSConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file without svd_tier, which earlier versions wrote there and into each entry of svd_recipe.

    A and B by either tier differ far less than a load accepts.  The method that was "subspace" is "chebyshev" now.
    """
    if "svd_tier" not in given:
        return given
    tier, recipe = given.pop("svd_tier"), given.get("svd_recipe", {})
    check("tier", tier, "svd_tier")
    config._earlier = {"svd_tier": tier, "svd_recipe": recipe}
    with suppress(AttributeError):  # a recipe that is no dictionary is refused later, as it is
        given["svd_recipe"] = {
            at: {
                key: "chebyshev" if value == "subspace" else value
                for key, value in how.items()
                if (key, value) != ("tier", tier)
            }
            for at, how in recipe.items()
        }
    return given


@_takes_other_names
@dataclass
class LoraXSConfig(PeftConfig):
    """The settings of a LoRA-XS adapter for PEFT: y = W x + s B R A x, s = lora_alpha / r, where only R (r x r) trains.

    The names that `lx.attach` and `lx.truncated_svd` have for these settings are accepted too: rank, alpha, dropout,
    seed, n_iter and oversample; so are lora_dropout, as LoraConfig calls it, and sigma, the earlier name of init_std.

    Args:
        r: rank of every adapter, unless rank_pattern says otherwise.
        target_modules: "all-linear", as in the paper: every linear layer except the output embeddings and a
            classification head, all of whose weights then train; or names, name endings or a regular expression; or
            None for PEFT's choice for LoRA on that architecture (often only the query and value projections).
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as for LoRA in PEFT.
        lora_alpha: s = lora_alpha / r; None: s = 1.
        rank_pattern, alpha_pattern: {regular expression for the end of a module's name: value}.
        bias: which biases train too: "none", "all" or "loraxs_only".
        loraxs_dropout: on the adapter's input, while training.
        init: where A and B come from: "svd" (A = S_r V_r^T, B = U_r of W), "random" (the paper's ablation), or "given",
            for adapters whose A and B are in the file.
        init_std: R ~ N(0, init_std^2).
        svd_n_iter, svd_oversample, svd_seed: n_iter, oversample and seed of lx.truncated_svd; None: chosen by rank and
            shape.  svd_seed also determines R at the start, and random A and B.
        svd_recipe: the method, block and n_iter that were chosen for each rank and shape of a weight.  It is filled in
            when the adapter is made, so that later versions compute the same A and B.  Do not set it.
        dtype: of A and B: torch.bfloat16, "bfloat16" or "bf16", and likewise fp16 and fp32; None: the weight's.  With a
            dtype that differs from the weight's, the delta costs one more pass over y.
        weight_dtype: of the weights that A and B were made from, which a refusal to load names.  Do not set it.
        save_factors: save A and B in the file, too (large), and read them from there when the adapter is loaded,
            rounded to the base's dtype.
        check_fingerprint: refuse a saved adapter if A and B recomputed here change its delta W, or if its file has no
            fingerprints to compare with.
        sha256: checksums of the weights beside the file, and of the fields that decide what the adapter computes.
            Filled in when the adapter is saved; checked and emptied when it is loaded.  Do not set it.
    """

    r: int = field(default=16, metadata={"help": "rank of the adapters: R is r x r"})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": '"all-linear", names or name endings, or a regular expression'}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, name endings or a regular expression of modules to leave out"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "s = lora_alpha / r; None: s = 1"})
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "{regular expression for a name: its rank}"})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "{regular expression for a name: its alpha}"})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of the layers to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers that layers_to_transform counts in"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules that train whole and are saved, such as a classifier head"}
    )
    bias: str = field(default="none", metadata={"help": 'biases that train: "none", "all" or "loraxs_only"'})
    loraxs_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    init: str = field(default="svd", metadata={"help": 'A and B: "svd", "random" or "given"'})
    init_std: float = field(default=1e-5, metadata={"help": "R ~ N(0, init_std^2) at the start"})
    svd_n_iter: int | None = field(default=None, metadata={"help": "iterations of the SVD; None: by rank and shape"})
    svd_oversample: int | None = field(
        default=None, metadata={"help": "its block is r + this; None: by rank and shape"}
    )
    svd_seed: int = field(default=0, metadata={"help": "of the SVD's start, of R and of random factors"})
    svd_recipe: dict = field(default_factory=dict, metadata={"help": "what the SVD did; not to be set"})
    dtype: str | None = field(default=None, metadata={"help": "of A and B, such as bfloat16; None: the weight's"})
    weight_dtype: str | None = field(default=None, metadata={"help": "of the base's weights; not to be set"})
    save_factors: bool = field(default=False, metadata={"help": "keep A and B in the adapter's file"})
    check_fingerprint: bool = field(default=True, metadata={"help": "check A and B when an adapter is loaded"})
    sha256: dict = field(default_factory=dict, metadata={"help": "of the files and fields; not to be set"})

    # The file that this was loaded with, the modules that have an R there, and the number of its tensors.  PEFT then
    # loads a state dict of exactly these, which must be the whole adapter and nothing else.
    _loaded = None
    _from_file = False  # whether its fields come from a file, which transformers reads without noting the above
    _earlier: ClassVar[dict[str, Any]] = {}  # fields of a file of an earlier version that decided its checksum

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORAXS
        self.check()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform, which says which of these layers to adapt")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: cannot be combined with target_modules as a string; pass a list of module names"
            )
        if self.init == "given" and not self.save_factors:
            raise ValueError('save_factors: got False, must be True with init="given": only the file has A and B')
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f'bias: got {self.bias!r}, must be "none": peft {peft.__version__} would not save biases')
        said, found = self.sha256.get("fields"), self._digest(**self._earlier)
        if said not in (None, found):
            raise ValueError(
                f"sha256: the fields are not those that were saved (SHA-256 {found}, must be {said}). The file is "
                "damaged, was changed by hand, or comes from a later version; remove its entry sha256 to accept it"
            )
        self.sha256 = {name: digest for name, digest in self.sha256.items() if name != "fields"}

    def check(self) -> None:
        """Raise a ValueError, naming the field, if one is not what it must be; numpy's numbers become Python's."""
        self.dtype = SHORT.get(self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        for name, (fits, must) in FIELDS.items():
            setattr(self, name, value := _plain(getattr(self, name)))
            if not fits(value):
                raise ValueError(f"{name}: got {value!r}, must be {must}")

    def _digest(self, **earlier: Any) -> str:
        """The SHA-256 of the fields that decide what the adapter computes, and of `earlier` fields of the file.

        A field that is None is left out, so that a later version can add fields and still read today's files.
        """
        names = [each.name for each in fields(__class__) if each.name not in FREE]  # also where a subclass has more
        decide = {name: value for name in names if (value := getattr(self, name)) is not None} | earlier
        return hashlib.sha256(json.dumps(decide, sort_keys=True, default=sorted).encode()).hexdigest()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json, in one step, with checksums of its fields and of the weights beside it.

        The weights have a checksum only if PeftModel.save_pretrained calls, which has just written them and passes
        auto_mapping_dict.  With any other caller, such as transformers, the folder may still have older weights.
        """
        self.check()
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory: {folder} is a file, must be a folder or not there")
        written = self.to_dict()
        written["sha256"] = {"fields": self._digest()}
        if "auto_mapping_dict" in kwargs:
            written["auto_mapping"] = kwargs["auto_mapping_dict"] or written["auto_mapping"]
            if files := _weights_in(folder):  # beside one of an earlier save, in the other format
                newest = max(files, key=lambda file: file.stat().st_mtime_ns)
                written["sha256"][newest.name] = sha256_of(newest)
        text = json.dumps(written, indent=2, sort_keys=True, default=sorted)
        write_atomically(folder / CONFIG_NAME, text.encode())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As in PEFT; ValueError, naming the file, if it or the weights beside it are not what was saved."""
        file = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        if not file.is_file():
            options, *_ = cls._split_kwargs(kwargs)
            for name in (*WEIGHTS, CONFIG_NAME):
                with suppress(Exception):  # most have only one kind of weights; a missing config is PEFT's to report
                    there = hf_hub_download(pretrained_model_name_or_path, name, subfolder=subfolder, **options)
                    file = Path(there).with_name(CONFIG_NAME)
        said = read_json(file.read_bytes(), str(file)) if file.is_file() else {}
        if not (isinstance(kind := said.get("peft_type", "LORAXS"), str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING):
            raise ValueError(f"{file}: peft_type is {kind!r}, must be the name of a method of PEFT's, such as 'LORAXS'")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
        if not isinstance(config, cls):
            return config
        for each in _weights_in(file.parent)[:1]:
            config._check_weights(each)
        config.sha256 = {}
        return config

    def _check_weights(self, file: Path) -> None:
        """Check the file of weights that PEFT loads next, and note which tensors it has."""
        if self.sha256 and (said := self.sha256.get(file.name)) != (found := sha256_of(file)):
            if said is None:
                raise ValueError(f"{file}: is older than {', '.join(self.sha256)}, which was saved last; remove it")
            raise ValueError(
                f"{file}: is damaged, or was not saved together with {CONFIG_NAME}: its SHA-256 is {found}, must be "
                f"{said} as {CONFIG_NAME} says; remove the entry sha256 there to accept it"
            )
        tensors = read_tensors(file)
        own = [key for key in tensors if key.startswith(PREFIX)]  # PEFT drops the others
        with_R = {key.removeprefix(PREFIX).removesuffix(".loraxs_R") for key in own if key.endswith(".loraxs_R")}
        if not with_R:
            raise ValueError(f"{file}: has no R (loraxs_R) of any module")
        self._loaded = str(file), with_R, len(own)
        for key in tensors:
            name, _, kind = key.rpartition(".")
            bare = self.check_fingerprint and self.init != "given" and f"{name}.loraxs_fingerprint" not in tensors
            if bare and kind == "loraxs_R":
                raise ValueError(
                    f"{file}: has no fingerprint of A and B for module {name.removeprefix(PREFIX)!r}, so it is unknown "
                    f"whether its R fits this model; set check_fingerprint=False in {CONFIG_NAME} to accept it"
                )


def _weights_in(folder: Path) -> list[Path]:
    return [file for name in WEIGHTS if (file := folder / name).is_file()]
