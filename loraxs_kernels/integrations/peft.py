"""LoRA-XS as a PEFT method: get_peft_model(model, LoraXSConfig(r=16, target_modules="all-linear")).

Importing this module makes the method known to PEFT (0.18 or later), so do that before a saved adapter is loaded.  The
layers compute with LoRAXSLinear's own forward, the factors of all of them are made together as in `attach`, and what
`save_pretrained` writes holds R (r x r) of every layer and a fingerprint of its basis: A and B are recomputed and
checked when it is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import peft
import torch
from huggingface_hub import hf_hub_download
from packaging.version import Version
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    PeftType,
    register_peft_method,
)
from torch import Tensor, nn

from .. import basis, parallel
from ..adapter_file import fitted, mismatch
from ..basis import MUST, Recipe, integer, is_number
from ..factors import WORKSPACE
from ..files import read_json, sha256_of, write_atomically
from ..indexed import NONE, RowIndex
from ..linear import LoRAXSLinear, adapted, label_of, only_moves, plus_delta, sparing_what_trains
from ..matching import classification_head, matches, pattern_value, warn_of_experts, warn_of_unread, why_no_adapter
from ..model import fill
from ..ops import autocast_on
from ..padding import padded_rows
from ..svd import plan
from ..transaction import transaction
from ..weights import (
    FLOATS,
    assign,
    held,
    is_conv1d,
    is_dtensor,
    is_linear,
    is_unread_linear,
    mergeable_weight,
    unread,
    weight_of,
    weight_view,
    whole,
)
from .reference_repo import PREFIX, read_tensors, translate

try:
    from peft.utils import quantization_utils
except ImportError:  # before peft 0.20, which cannot merge into quantised layers for a method from elsewhere
    quantization_utils = None

if Version(peft.__version__).release < (0, 18):
    raise ImportError(f"loraxs_kernels.integrations.peft: got peft {peft.__version__}, must be 0.18 or later")

NO_FILES: Mapping[str, str] = {}
WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)  # the first is what PEFT loads where there are both
BASE = "__base__"  # what PEFT calls the base model in adapter_names
MIXABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what PEFT can run a part of a batch through
SEQUENCE_FIRST = ("xlnet", "longformer", "led")  # models that swap samples and positions on the way to some layers
REMEDY = "save_factors=True in its config (check_fingerprint=False in adapter_config.json takes it as it is)"

# For each layer and the names of two adapters: the factors that were compared, their versions then, whether they are
# the same.
_COMPARED: WeakKeyDictionary[LoraXSLinearLayer, dict] = WeakKeyDictionary()


def _plain(value: Any) -> Any:
    """A field's value as JSON has it, but for sets."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        kind = set if isinstance(value, (set, frozenset)) else tuple if isinstance(value, tuple) else list
        return kind(map(_plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
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


# What the fields of a configuration may be; PEFT looks at none of them, wherever they come from.
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
    "save_factors": (lambda v: v in (True, False), "True or False"),
    "check_fingerprint": (lambda v: v in (True, False), "True or False"),
    "inference_mode": (lambda v: v in (True, False, None), "True, False or None"),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "a name or None"),
    "sha256": (lambda v: isinstance(v, dict), "a dictionary, as save_pretrained writes it"),
}

# What no checksum covers: users edit these by hand, PEFT changes them, or they are for training alone.
FREE = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type", "auto_mapping"),
    *("peft_version", "loraxs_dropout", "init_std", "check_fingerprint", "sha256"),
}


def _reads_tiers(config: type[LoraXSConfig]) -> type[LoraXSConfig]:
    """The class, with an svd_tier taken from files of earlier versions, which have it in each entry of svd_recipe too.

    It is dropped: A and B by either tier are the same, far within what a load accepts.  What was "subspace" then is
    "chebyshev".  A file has a peft_type; a caller passes none, and to a caller svd_tier is an unknown argument.
    """
    init = config.__init__

    @wraps(init)
    def __init__(self: LoraXSConfig, *args: Any, **said: Any) -> None:
        if "svd_tier" in said and "peft_type" in said:
            tier, recipe = said.pop("svd_tier"), said.get("svd_recipe", {})
            basis.check("tier", tier, "svd_tier")
            self._earlier = {"svd_tier": tier, "svd_recipe": recipe}
            with suppress(AttributeError):  # what is no dictionary is refused as it is
                said["svd_recipe"] = {
                    at: {
                        key: "chebyshev" if value == "subspace" else value
                        for key, value in how.items()
                        if (key, value) != ("tier", tier)
                    }
                    for at, how in recipe.items()
                }
        init(self, *args, **said)

    config.__init__ = __init__
    return config


@_reads_tiers
@dataclass
class LoraXSConfig(PeftConfig):
    """What PEFT is to know of a LoRA-XS adapter: y = W x + s B R A x, s = lora_alpha / r, only R (r x r) trains.

    Args:
        r: rank of every adapter, unless rank_pattern says otherwise.
        target_modules: names or name endings, a regular expression, "all-linear", or None for PEFT's choice for LoRA on
            that architecture (often the query and value projections alone; the paper adapts every linear layer of
            a language model).
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as for LoRA in PEFT.
        lora_alpha: s = lora_alpha / r; None: s = 1.
        rank_pattern, alpha_pattern: {regular expression for the end of a module's name: value}.
        bias: which biases train too: "none", "all" or "loraxs_only".
        loraxs_dropout: on the adapter's input, while training.
        init: where A and B come from: "svd" (A = S_r V_r^T, B = U_r of W), "random" (the paper's ablation), or "given",
            for adapters whose A and B are in the file.
        init_std: R ~ N(0, init_std^2).
        svd_n_iter, svd_oversample, svd_seed: of lx.truncated_svd, whose block is r + svd_oversample; None: chosen by
            rank and shape.  svd_seed also draws R and random factors.
        svd_recipe: what was chosen, by rank and shape of a weight; filled in when the adapter is made, so that the file
            means the same tomorrow.  Not to be set.
        dtype: of A and B, by torch's name; None: the weight's.  Another dtype than the weight's costs a separate pass.
        save_factors: keep A and B in the file (large), which are then taken from there, rounded to the base's dtype.
        check_fingerprint: refuse a saved adapter where A and B of this model make another delta W of its R, and one
            without the fingerprints to tell by.
        sha256: of the weights beside the file, and of the fields that decide what the adapter computes; filled in when
            it is saved, checked and emptied when it is loaded.  Not to be set.
    """

    r: int = field(default=16, metadata={"help": "rank of the adapters: R is r x r"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": 'names or name endings, a regular expression, or "all-linear"'}
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
    save_factors: bool = field(default=False, metadata={"help": "keep A and B in the adapter's file"})
    check_fingerprint: bool = field(default=True, metadata={"help": "check A and B when an adapter is loaded"})
    sha256: dict = field(default_factory=dict, metadata={"help": "of the files and fields; not to be set"})

    # The file that this was loaded with, the modules that have an R there, and the number of its tensors.  A state dict
    # of just these is what PEFT loads from there, and must have the whole adapter and nothing else.
    _loaded = None
    _earlier: ClassVar[dict[str, Any]] = {}  # fields of a file of an earlier version that decided its checksum

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORAXS
        self.check()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: got one without layers_to_transform, which must say which of its layers")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform: got one beside a regular expression, needs target_modules as a list")
        if self.init == "given" and not self.save_factors:
            raise ValueError('save_factors: got False beside init="given", must be True: nothing else holds A and B')
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f'bias: got {self.bias!r}, must be "none": peft {peft.__version__} would not save biases')
        said, found = self.sha256.get("fields"), self._digest(**self._earlier)
        if said not in (None, found):
            raise ValueError(
                f"sha256: the fields are not those that were saved (SHA-256 {found}, must be {said}): damaged, "
                "changed by hand, or of a later version; without the entry sha256 they are taken as they are"
            )
        self.sha256 = {name: digest for name, digest in self.sha256.items() if name != "fields"}

    def check(self) -> None:
        """ValueError, naming the field, where one is not what it must be; numpy's numbers become Python's."""
        for name, (fits, must) in FIELDS.items():
            setattr(self, name, value := _plain(getattr(self, name)))
            if not fits(value):
                raise ValueError(f"{name}: got {value!r}, must be {must}")

    def _digest(self, **earlier: Any) -> str:
        """The SHA-256 of the fields that decide what the adapter computes, of those of an earlier version if need be.

        None counts as if there were no such field, so that a later version can add some and read the files of this one.
        """
        names = [each.name for each in fields(__class__) if each.name not in FREE]  # also where a subclass has more
        decide = {name: value for name in names if (value := getattr(self, name)) is not None} | earlier
        return hashlib.sha256(json.dumps(decide, sort_keys=True, default=sorted).encode()).hexdigest()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json, in one step, with the checksums of its fields and of the weights beside it.

        The latter where PeftModel.save_pretrained calls, which has written the weights before and says so by its
        argument.  With any other caller, such as transformers, the weights of the folder may still be old ones.
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
        """As PEFT's; ValueError, naming the file, where it or the weights beside it are not what was saved."""
        file = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        if not file.is_file():
            options, *_ = cls._split_kwargs(kwargs)
            for name in (*WEIGHTS, CONFIG_NAME):
                with suppress(Exception):  # most have one of the two; and PEFT says below if there is no config
                    there = hf_hub_download(pretrained_model_name_or_path, name, subfolder=subfolder, **options)
                    file = Path(there).with_name(CONFIG_NAME)
        said = read_json(file.read_bytes(), str(file)) if file.is_file() else {}
        if not isinstance(kind := said.get("peft_type", "LORAXS"), str):
            raise ValueError(f"{file}: peft_type is {kind!r}, must be a name such as 'LORAXS'")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from error
        if not isinstance(config, cls):
            return config
        for each in _weights_in(file.parent)[:1]:
            config._check_weights(each)
        config.sha256 = {}
        return config

    def _check_weights(self, file: Path) -> None:
        """Look at the weights that PEFT is about to load, and note what they are."""
        if self.sha256 and (said := self.sha256.get(file.name)) != (found := sha256_of(file)):
            if said is None:
                raise ValueError(f"{file}: is of an earlier save than {', '.join(self.sha256)} beside it; remove it")
            raise ValueError(
                f"{file}: is damaged, or of another save than {CONFIG_NAME} beside it: its SHA-256 is {found}, that "
                f"file says {said}; without the entry sha256 there it is taken as it is"
            )
        tensors = read_tensors(file)
        with_R = (key for key in tensors if key.endswith(".loraxs_R"))
        self._loaded = str(file), {key.removeprefix(PREFIX).removesuffix(".loraxs_R") for key in with_R}, len(tensors)
        if not any(key.endswith(".loraxs_R") for key in tensors):
            raise ValueError(f"{file}: has no R (loraxs_R) of any module")
        for key in tensors:
            name, _, kind = key.rpartition(".")
            bare = self.check_fingerprint and self.init != "given" and f"{name}.loraxs_fingerprint" not in tensors
            if bare and kind == "loraxs_R":
                raise ValueError(
                    f"{file}: has no fingerprint of A and B for module {name.removeprefix(PREFIX)!r}, so that nothing "
                    f"tells whether its R fits this model; check_fingerprint=False in {CONFIG_NAME} takes it as it is"
                )


def _weights_in(folder: Path) -> list[Path]:
    return [file for name in WEIGHTS if (file := folder / name).is_file()]


class LoraXSLinearLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its LoRA-XS adapters by name: y = base_layer(x) + sum over active ones of s B R A x.

    base_layer is never written.  Merging puts another weight into it and keeps the old one, so that unmerging gives
    the very same tensor back: in bf16, subtracting what was added would not.  A quantised weight is merged into by
    `quantization_backend`, PEFT's own (0.20 or later), which quantises the sum anew.

    Attributes, each by the adapter's name: loraxs_R (r, r), trains, fp32 unless PEFT was called with
        autocast_adapter_dtype=False; loraxs_A (r, K) and loraxs_B (N, r), frozen, in the base layer's dtype;
        loraxs_fingerprint (r + 8,), fp32: the singular values in A and 8 probes of B R A; r, lora_alpha, scaling,
        recipe, config.  unchecked: the names of adapters that came with an R and were not compared with A and B yet.

    In a call with adapter_names each sample, an entry of x's first dimension, has an adapter of its own or none.  Those
    adapters whose A and B are the same then share one pass, by the primitive with an index.
    """

    adapter_layer_names = ("loraxs_R",)
    other_param_names = ("loraxs_A", "loraxs_B", "loraxs_fingerprint", "r", "lora_alpha", "scaling", "recipe", "config")
    cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting turns it off

    def __init__(self, base_layer: nn.Module, quantization_backend: Any = None) -> None:
        super().__init__()
        self.base_layer, self.quantization_backend = base_layer, quantization_backend
        self.loraxs_R = nn.ParameterDict()
        self.unchecked: set[str] = set()
        self._latest: set[str] = set()  # those in the last state dict that torch loaded
        self.loraxs_A, self.loraxs_B, self.loraxs_fingerprint = _Buffers(), _Buffers(), _Fingerprints(self.unchecked)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.recipe: dict[str, Recipe] = {}
        self.config: dict[str, LoraXSConfig] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: _Unmerged | None = None
        self._samples: _Samples | None = None  # during a call with adapter_names
        self.shares: Any = None  # as that of LoRAXSLinear
        self.register_load_state_dict_post_hook(_check_what_was_loaded)
        self.train(base_layer.training)

    def add(self, name: str, adapter: LoRAXSLinear, config: LoraXSConfig) -> None:
        """Take over the tensors of an adapter that was made for base_layer."""
        self.r[name], self.lora_alpha[name], self.scaling[name] = adapter.rank, adapter.alpha, adapter.scaling
        self.recipe[name], self.config[name] = adapter.recipe, config
        self.in_features, self.out_features = adapter.in_features, adapter.out_features
        self.loraxs_R[name] = adapter.R
        self.loraxs_A.register_buffer(name, adapter.A, config.save_factors)
        self.loraxs_B.register_buffer(name, adapter.B, config.save_factors)
        fingerprint = torch.zeros(adapter.rank + basis.PROBES, device=adapter.A.device)
        self.loraxs_fingerprint.register_buffer(name, fingerprint, config.init != "given")

    def discard(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if name in (by_name := getattr(self, attribute)):
                del by_name[name]

    def adapter(self, name: str) -> LoRAXSLinear:
        """One adapter as a layer of its own, which shares base_layer and all tensors with this one."""
        A, R, B = self.loraxs_A[name], self.loraxs_R[name], self.loraxs_B[name]
        p, std = self.config[name].loraxs_dropout, self.config[name].init_std
        return LoRAXSLinear(
            self.base_layer, A, R, B, alpha=self.lora_alpha[name], dropout=p, init_std=std, recipe=self.recipe[name]
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Straight from the dictionaries: nn.Module.__getattr__ costs more than a small product does.
        base, R, samples = self._modules["base_layer"], self._modules["loraxs_R"], self._samples
        used = self.active_adapters if samples is None else samples.adapters
        if self.unchecked and not self._disable_adapters:
            self.check_fingerprints(used)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        active = [name for name in used if name in self.r]
        if self._disable_adapters or self.merged_adapters or not active:
            return base(x, *args, **kwargs)
        if not self.cast_input_dtype_enabled and not autocast_on(x):
            for name in active:
                if x.dtype != (dtype := self._modules["loraxs_A"]._buffers[name].dtype):
                    label = label_of(self.recipe[name].name)
                    raise ValueError(f"x: got {x.dtype} for {label}, must be {dtype} while casting inputs is disabled")
        with self._onloaded() if "_hf_hook" in R.__dict__ else nullcontext():
            if samples is not None:
                return self._mixed(x, samples, active, *args, **kwargs)
            first, *others = map(self._operands, active)
            return adapted(base, x, *first, self.recipe[active[0]].name, None, others, *args, **kwargs)

    @torch.compiler.disable
    def _mixed(self, x: Tensor, samples: _Samples, active: list[str], /, *args: Any, **kwargs: Any) -> Tensor:
        """base_layer(x) + s B R A x, in which each sample has its own adapter.  No dropout: no layer is in training.

        The adapters with the A and B that most of them share are one pass with base_layer; those with another A and B
        then add their delta to the rows of their samples.
        """
        name = self.recipe[active[0]].name
        if x.dim() < 2 or len(x) != len(samples.names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(samples.names)} "
                f"names and x of shape {tuple(x.shape)} in {label_of(name)}. A layer that does not have the samples of "
                "the batch in its first dimension cannot take adapter_names"
            )
        first, *others = self._alike(active)
        if others and parallel.is_cut(self.base_layer):
            raise ValueError(
                f"adapter_names: {', '.join(repr(each[0]) for each in (first, *others))} have different A and B in "
                f"{label_of(name)}, which is cut over ranks; must have the same there (same rank and svd_seed)"
            )
        _, index = samples.laid_out(first, x.device, whole=True)
        A, B, R, s = self._stack(first, index)
        y, parts = adapted(self.base_layer, x, A, R, B, s, 0.0, name, index, (), *args, **kwargs), []
        for group in others:
            rows, index = samples.laid_out(group, x.device)
            A, B, R, s = self._stack(group, index)
            own = y.index_select(0, rows), x.index_select(0, rows)
            parts.append((rows, plus_delta(*own, A, R, B, s, 0.0, index, in_place=True)))
        return y.index_copy(0, *map(torch.cat, zip(*parts, strict=True))) if parts else y

    def _stack(self, group: tuple[str, ...], index: RowIndex | None) -> tuple[Tensor, Tensor, Tensor, float]:
        """A, B, R and s of adapters that share A and B; R is a stack where there is an index."""
        A, R, B, s, _ = self._operands(group[0])
        if index is None:
            return A, B, R, s
        stack = [(R, s) for _, R, _, s, _ in map(self._operands, group)]
        if any(each != s for _, each in stack):
            stack, s = [(R.to(torch.promote_types(R.dtype, torch.float32)) * each, 1.0) for R, each in stack], 1.0
        return A, B, torch.stack([R for R, _ in stack]), s

    def _alike(self, names: list[str]) -> list[tuple[str, ...]]:
        """The adapters in groups that have the same A and B, the largest group first."""
        groups: list[list[str]] = []
        for name in names:
            group = next((each for each in groups if self._same_factors(each[0], name)), None)
            groups.append([name]) if group is None else group.append(name)
        return sorted(map(tuple, groups), key=len, reverse=True)

    def _same_factors(self, one: str, other: str) -> bool:
        """Whether two adapters have the same A and the same B, which is remembered until one of these is changed."""
        factors = [each._buffers[name] for each in (self.loraxs_A, self.loraxs_B) for name in (one, other)]
        A, A2, B, B2 = factors
        if (A.shape, A.dtype, A.device) != (A2.shape, A2.dtype, A2.device) or A.is_meta:
            return False
        compared = _COMPARED.setdefault(self, {})
        versions = [None if t.is_inference() else t._version for t in factors]  # which an inference tensor has not
        before, then, same = compared.get((one, other), ((), None, False))
        unchanged = versions == then and all(t is kept() for t, kept in zip(factors, before, strict=True))
        if None in versions or not unchanged:
            same = torch.equal(A, A2) and torch.equal(B, B2)
            compared[one, other] = [ref(t) for t in factors], versions, same
        return same

    @contextmanager
    def _onloaded(self) -> Iterator[None]:
        """The adapters in place where accelerate has offloaded them, which it does for each module's own forward."""
        dicts = (self.loraxs_R, self.loraxs_A, self.loraxs_B)
        hooked = [each for each in dicts if hasattr(each, "_hf_hook") and not only_moves(each)]
        for each in hooked:
            each._hf_hook.pre_forward(each)
        try:
            yield
        finally:
            for each in hooked:
                each._hf_hook.post_forward(each, None)

    def _operands(self, name: str) -> tuple[Tensor, Tensor, Tensor, float, float]:
        A, R, B = (self._modules[each] for each in ("loraxs_A", "loraxs_R", "loraxs_B"))
        p = self.config[name].loraxs_dropout if self.training else 0.0
        trained = held(R, name)
        trained = trained if self.shares is None else parallel.averaged(trained, self.shares)
        return A._buffers[name], trained, B._buffers[name], self.scaling[name], p

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + sum of s B R A into base_layer, summed in fp32 and rounded once; `unmerge` puts W itself back.

        The result is always checked, whatever safe_merge says: ValueError where it is not finite, TypeError where
        W is neither a dense tensor nor one that PEFT can quantise again; the layer is then as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loraxs_R]
        if not names:
            return
        self.check_fingerprints(names)
        if before := list(self.merged_adapters):
            self.unmerge()
        try:
            self._merge([*before, *names])
        except BaseException:
            if before:
                self._merge(before)
            raise

    @property
    def _requantises(self) -> bool:
        return self.quantization_backend is not None and self.quantization_backend.supports_merge

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Tensor:
        """W + sum of s B R A (N, K) for a layer that is not merged; see `merge` for what it raises."""
        base, label = self.base_layer, label_of(self.recipe[names[0]].name)
        if self._requantises:
            weight = weight_of(base, label)
            W, dtype = weight.read(), weight.dtype
        else:
            W = mergeable_weight(base, label)
            dtype = W.dtype
        total = sum(self.adapter(name).delta_weight() for name in names).add(W).to(dtype)
        if not torch.isfinite(total).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {' and '.join(names)} seems to be broken: {label} "
                "would have NaN or Inf values, and stays unmerged"
            )
        return total

    def _merge(self, names: list[str]) -> None:
        base, total = self.base_layer, self.merged_weight(names)
        unmerged = _Unmerged(base)
        try:
            if self._requantises:
                self.quantization_backend.set_base_weight(self, total)
            else:
                # A new Parameter, since the old one may be another module's too, such as the embedding's.
                total = total.t() if is_conv1d(base) else total
                base.weight = nn.Parameter(total.contiguous(), requires_grad=False)
        except BaseException:
            unmerged.put_back(self)
            raise
        unmerged.note_changes()
        self._unmerged = unmerged
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Back to the base weight, the same tensor as before, and separate adapters."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_unmerge()
        self._unmerged.put_back(self)
        self._unmerged = None
        self.merged_adapters = []

    def check_unmerge(self) -> None:
        """Raise a ValueError if the layer is merged and cannot be unmerged."""
        if self._unmerged is not None:
            self._unmerged.check(self.base_layer, label_of(self.recipe[self.merged_adapters[0]].name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B R A in the layout of base_layer.weight, in the dtype of A."""
        self.check_fingerprints([adapter])
        delta = self.adapter(adapter).delta_weight().to(self.loraxs_A[adapter].dtype)
        return delta.t() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def reset_parameters(self) -> None:
        """Make A, B and R of all adapters from the base weight: for a layer that was made on the meta device."""
        for name in self.loraxs_R:
            device = self.base_layer.weight.device
            for each in (self.loraxs_A, self.loraxs_B, self.loraxs_fingerprint):
                each[name] = torch.empty_like(each[name], device=device) if each[name].is_meta else each[name]
            if (R := self.loraxs_R[name]).is_meta:
                self.loraxs_R[name] = nn.Parameter(torch.empty_like(R, device=device), requires_grad=R.requires_grad)
            self.loraxs_B[name] = padded_rows(self.loraxs_B[name])
            self.adapter(name).reset_parameters()

    @torch.no_grad()
    def check_fingerprints(self, names: Iterable[str]) -> None:
        """Compare the delta of those adapters that were loaded with their file's probes; a flipped sign is mended in R.

        Raises AdapterMismatch, naming the layer, where delta W is off by more than 1e-3 (3e-2 for an adapter that
        brings its own A and B; a rounding of R more where R is in half precision), and again whenever such an adapter
        is to be used; the others of the layer stay usable.
        """
        for name in sorted(self.unchecked.intersection(names)):
            A, R, B = self.loraxs_A[name], self.loraxs_R[name], self.loraxs_B[name]
            self.loraxs_B[name] = padded_rows(B)
            if any(t.is_meta for t in (A, R, B)):
                continue
            config = self.config[name]
            if config.check_fingerprint:
                S, probe = self.loraxs_fingerprint[name].split([self.r[name], basis.PROBES])
                entry = {"R": whole(R), "S": S, "probe": probe, "base_model": config.base_model_name_or_path}
                label = self.recipe[name].name
                if not torch.isfinite(entry["R"]).all():
                    raise ValueError(f"adapter {name!r}: R of {label_of(label)} has NaN or Inf values")
                aligned, error = fitted(entry, A, B)
                accepted = basis.ACCEPT + torch.finfo(R.dtype).eps / 2  # R may have been rounded when it was loaded
                limit = basis.ALIGNED if config.save_factors else accepted
                if error > limit or not basis.same_base(S, A):  # R = 0 makes the same delta on any base
                    if entry["R"].any() and not (S.any() or probe.any()):
                        raise ValueError(
                            f"adapter {name!r}: the fingerprint of A and B for {label_of(label)} is empty, as where "
                            "DeepSpeed has gathered parameters for save_pretrained by itself: save it on one rank, "
                            "inside deepspeed.zero.GatheredParameters of all that trains"
                        )
                    raise mismatch(f"adapter {name!r}", label, entry, error, basis.singular_values(A), REMEDY)
                if error > accepted:  # its own A and B, rounded to this model's dtype
                    warnings.warn(
                        f"adapter {name!r}: the estimated relative error of delta W in {label_of(label)} is "
                        f"{error:.1e}",
                        stacklevel=2,
                    )
                assign(R, aligned)
            self.unchecked.discard(name)

    def cast_R(self, name: str, autocast_adapter_dtype: bool) -> None:
        """R in fp32; or in the dtype of the base weight, that of A where the weight is quantised.

        R in fp64, and one that a parametrization makes, stay as they are.
        """
        R, W = self.loraxs_R._parameters.get(name), getattr(self.base_layer, "weight", None)
        if autocast_adapter_dtype:
            dtype = torch.float32
        else:
            dtype = W.dtype if isinstance(W, Tensor) and W.dtype in FLOATS else self.loraxs_A[name].dtype
        if R is not None and R.dtype != dtype and R.dtype != torch.float64:
            self.loraxs_R[name] = nn.Parameter(R.detach().to(dtype), requires_grad=R.requires_grad)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, config in self.config.items():  # before PEFT writes the weights: fields may have been set since
            try:
                config.check()
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}") from error
        # Before the children write theirs.  What came from a file and was not checked yet is kept as it came.
        for name, R in self.loraxs_R.items():
            A, B = self.loraxs_A[name], self.loraxs_B[name]
            for each in (self.loraxs_A, self.loraxs_B):  # save_factors may have been set after the adapter was made
                each.register_buffer(name, each[name], self.config[name].save_factors)
            if name in self.unchecked or any(t.is_meta for t in (A, R, B)):
                continue
            if _is_in_parts(R):  # for DeepSpeed's own checkpoints, which have the parts elsewhere
                continue
            fingerprint = torch.cat([basis.singular_values(A), basis.probes(A, whole(R), B)])
            self.loraxs_fingerprint[name] = fingerprint
            if name not in self.loraxs_R._parameters:  # for models without the parametrization that makes it
                destination[f"{prefix}loraxs_R.{name}"] = R.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def check_state_dict(self, state_dict: dict[str, Tensor], prefix: str, files: Mapping[str, str] = NO_FILES) -> None:
        """Raise a ValueError, naming the layer, where an adapter in a state dict is not whole or does not fit this one.

        Adapters that the state dict has nothing of are left alone, unless it is known to come from their file (`files`,
        by their names).  The R that a parametrization has made is taken out of the state dict, where what it was made
        of is there too.
        """
        for name, r in self.r.items():
            label, file = label_of(self.recipe[name].name), files.get(name)
            which_one = f"{file}: adapter {name!r}" if file else f"adapter {name!r}"
            shapes = {"A": (r, self.in_features), "R": (r, r), "B": (self.out_features, r)}
            shapes["fingerprint"] = (r + basis.PROBES,)
            keys = {which: f"{prefix}loraxs_{which}.{name}" for which in shapes}
            there = {which for which, key in keys.items() if key in state_dict}
            if name not in self.loraxs_R._parameters:  # a parametrization makes it
                if any(key.startswith(f"{prefix}loraxs_R.parametrizations.{name}.") for key in state_dict):
                    state_dict.pop(keys["R"], None)
                    there.add("R")
                elif "R" in there:
                    raise ValueError(
                        f"adapter {name!r}: got an R for {label}, where a parametrization makes R; remove it before "
                        "loading"
                    )
            if not there and not file:
                continue
            if name in self.merged_adapters:
                raise ValueError(f"adapter {name!r}: is merged into {label}; unmerge_adapter() before loading it")
            needed = {"A", "R", "B"} if self.config[name].init == "given" else {"R"}
            if missing := sorted(needed - there):
                raise ValueError(f"{which_one}: has no {' and '.join(missing)} for {label}")
            for which in shapes:
                if (t := state_dict.get(keys[which])) is None:
                    continue
                what = f"{which_one}: {which} for {label}"
                if which == "R" and hasattr(R := self.loraxs_R._parameters.get(name), "ds_id"):
                    if _is_in_parts(R) and t.shape == R.shape:  # DeepSpeed's own checkpoints have the parts elsewhere
                        continue
                    if _is_in_parts(R) or hasattr(R, "_z3_optimizer"):
                        raise ValueError(
                            f"{what} cannot be loaded while ZeRO-3 has it in parts; must be before deepspeed.initialize"
                        )
                if tuple(t.shape) != shapes[which]:
                    raise ValueError(f"{what} has shape {tuple(t.shape)}, must be {shapes[which]}")
                if t.dtype not in FLOATS:
                    raise ValueError(f"{what} is of {t.dtype}, must be of bf16, fp16, fp32 or fp64")
                if not (t.is_meta or is_dtensor(t) or torch.isfinite(t).all()):
                    raise ValueError(f"{what} has NaN or Inf values")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        translate(state_dict, {prefix[:-1]: self}, whole_model=False)
        self.check_state_dict(state_dict, prefix)
        in_parts = {name for name, R in self.loraxs_R._parameters.items() if _is_in_parts(R)}
        self._latest = {name for name in self.r if f"{prefix}loraxs_fingerprint.{name}" in state_dict} - in_parts
        self.unchecked |= self._latest
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> LoraXSLinearLayer:
        frozen = [*self.base_layer.parameters(), *self.base_layer.buffers()]
        frozen += [*self.loraxs_A.values(), *self.loraxs_B.values()]
        super()._apply(sparing_what_trains(fn, frozen), recurse)
        self._pad()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a copy: its B is padded, but no longer known to be
        self._pad()

    def _pad(self) -> None:
        for name, B in self.loraxs_B.items():
            self.loraxs_B[name] = padded_rows(B)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """What PEFT calls after it has loaded an adapter.  No dtype is changed: R, A and B stay as they are."""
        if adapter_name not in self.loraxs_R:
            return
        if device is None:
            W = self.base_layer._parameters.get("weight")
            offloaded = W is None or hasattr(self.base_layer, "_hf_hook")
            device = (self.loraxs_A[adapter_name] if offloaded else W).device  # A may have come from a file just now
        if self.loraxs_R[adapter_name].is_meta and device.type != "meta":
            label = label_of(self.recipe[adapter_name].name)
            raise ValueError(f"adapter {adapter_name!r}: has no R for {label}")
        self.loraxs_R[adapter_name] = self.loraxs_R[adapter_name].to(device)
        for each in (self.loraxs_A, self.loraxs_B, self.loraxs_fingerprint):
            if not each[adapter_name].is_meta:
                each[adapter_name] = each[adapter_name].to(device)
        self.check_fingerprints([adapter_name])

    def extra_repr(self) -> str:
        parts = [f"{name}: rank={r}, alpha={self.lora_alpha[name]:g}" for name, r in self.r.items()]
        if self.quantization_backend is not None:
            parts.append(f"quantization_backend='{self.quantization_backend.backend_name}'")
        return ", ".join(parts)


class _Samples:
    """The adapter of each sample of a batch, while a call with adapter_names runs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.adapters = [name for name in dict.fromkeys(names) if name != BASE]
        self._laid_out: dict[tuple, tuple[Tensor | None, RowIndex | None]] = {}

    def expand(self, times: int) -> None:
        """As many neighbouring samples in the place of each, as `generate` makes them for beams and sequences."""
        self.names = [name for name in self.names for _ in range(times)]
        self._laid_out.clear()

    def laid_out(
        self, group: tuple[str, ...], device: torch.device, whole: bool = False
    ) -> tuple[Tensor | None, RowIndex | None]:
        """The samples that use adapters of a group, and which of the group's each of them uses.

        The former are None for the whole batch, where -1 stands for samples without an adapter of the group; the latter
        is None where the group has one adapter and all these samples use it.
        """
        if (key := (group, device, whole)) not in self._laid_out:
            place = {name: i for i, name in enumerate(group)}
            index, rows = [place.get(name, NONE) for name in self.names], None
            if not whole:
                rows = torch.tensor([row for row, i in enumerate(index) if i != NONE], device=device)
                index = [i for i in index if i != NONE]
            self._laid_out[key] = rows, RowIndex(index, len(group), device) if any(index) else None
        return self._laid_out[key]

    def check(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A ValueError where a model is called with another number of samples, as far as its arguments tell."""
        if main := getattr(model, "main_input_name", None):
            given = [*args[:1], kwargs.get(main), kwargs.get("inputs_embeds")]
        else:
            given = [*args, *kwargs.values()]
        lengths = [len(each) for each in given if isinstance(each, Tensor) and each.dim()]
        if lengths and len(self.names) not in (lengths[:1] if main else lengths):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {lengths[0]} respectively."
            )

    def tell(self, module: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Pass the names to one of modules_to_save; those of adapters that have none mean the base model there."""
        return args, kwargs | {"adapter_names": [n if n in module._adapters else BASE for n in self.names]}


class LoraXSModel(BaseTuner):
    """A model with LoRA-XS adapters, as PEFT's tuners are: what get_peft_model(model, LoraXSConfig(...)) holds.

    A layer that stands in several places is adapted in all of them, by one R.  The factors of all layers are made
    together, as `lx.attach` makes them.  If adding an adapter fails, or is interrupted, the model is as it was, and so
    it is if one cannot be merged, unmerged, unloaded, deleted or loaded.  Only an adapter that makes another delta W
    here is refused after its R is in place.
    """

    prefix = "loraxs_"
    tuner_layer_cls = LoraXSLinearLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # What PEFT and transformers' add_adapter have said beforehand is no part of what a failure leaves.
        config, loaded = self.peft_config.pop(adapter_name), getattr(model, "_hf_peft_config_loaded", False)
        if loaded and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False
        said = {
            field: copy.copy(getattr(config, field)) for field in ("target_modules", "modules_to_save", "svd_recipe")
        }
        with transaction(self) as undo:
            undo.callback(vars(config).update, said)
            self.peft_config[adapter_name] = config
            if loaded:
                model._hf_peft_config_loaded = True
            _check_name(adapter_name)
            if any(isinstance(m, LoRAXSLinear) for m in model.modules()):
                raise ValueError(
                    "model: already has LoRA-XS adapters that lx.attach put on, which would freeze beneath others; "
                    "lx.detach(model) takes them off"
                )
            self._new: list[LoRAXSLinear] = []  # those that still need A, B and R
            self._spell_out_all_linear(config, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            fill(model, self._new, None, None, WORKSPACE, progress=True)
            shares = {id(adapter.base_layer): adapter.shares for adapter in self._new}
            for layer in self._layers():
                layer.shares = shares.get(id(layer.base_layer), layer.shares)
            del self._new
            if all(each.hook is not _check_before_loading for each in model._load_state_dict_pre_hooks.values()):
                model.register_load_state_dict_pre_hook(_check_before_loading)

    def _spell_out_all_linear(self, config: LoraXSConfig, model: nn.Module) -> None:
        """Put the names that "all-linear" means in its place: what it means to PEFT, and as `attach` has it.

        Layers that take no adapter are left out; a classification head trains whole, as one of modules_to_save.
        """
        targets = config.target_modules
        if not (isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND):
            return
        _maybe_include_all_linear_layers(config, model)
        config.target_modules -= {
            f"{name}.{child}".removeprefix(".")
            for name, parent in model.named_modules()
            for child in parent._modules
            if why_no_adapter(parent, child)
        }
        # What transformers' add_adapter trains whole its load_adapter does not load: there a head is adapted.
        alone = config.modules_to_save == [] or getattr(model, "_hf_peft_config_loaded", False)
        head = [] if alone else classification_head(model)
        inside = tuple(f"{name}." for name in head)
        config.target_modules -= {name for name in config.target_modules if f"{name}.".startswith(inside)}
        if new := [name for name in head if not matches(name, config.modules_to_save or [])]:
            config.modules_to_save = [*(config.modules_to_save or []), *new]
        if not config.target_modules:
            raise ValueError("target_modules: got 'all-linear' for a model without a linear layer that can be adapted")
        warn_of_experts(model, stacklevel=3)
        warn_of_unread([(n, m) for n, m in model.named_modules() if is_unread_linear(m)], stacklevel=3)

    def _layers(self) -> list[LoraXSLinearLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraXSLinearLayer)]

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Put every layer back if one of them cannot be merged, unmerged or unloaded, or if that is interrupted."""
        with transaction(self) as undo:
            for layer in self._layers():
                undo.callback(_Unmerged(layer.base_layer).put_back, layer)
            settings = getattr(getattr(self.model, "config", None), "__dict__", {})
            undo.callback(settings.update, dict(settings))  # PEFT unties embeddings there
            yield

    def merge_adapter(self, *args: Any, **options: Any) -> None:
        """All layers or none."""
        with self._all_or_none():
            super().merge_adapter(*args, **options)

    def unmerge_adapter(self) -> None:
        """All layers or none."""
        with self._all_or_none():
            super().unmerge_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """From all layers or none."""
        with transaction(self):
            super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> nn.Module:
        """All layers or none: the weights as they were are kept until all are merged, a second copy of those."""
        with self._all_or_none():
            return super()._unload_and_optionally_merge(*args, **options)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: Any = None, **__: Any) -> Iterator[None]:
        """What PEFT calls around a forward or `generate`: with adapter_names each sample has an adapter of its own.

        Raises TypeError or ValueError, before anything runs, where there can be no such batch.
        """
        if adapter_names is None:
            yield
            return
        self._check_mixed(adapter_names)
        samples = _Samples(adapter_names)
        with ExitStack() as undo:
            for layer in (layers := self._layers()):
                undo.callback(setattr, layer, "_samples", layer._samples)
                layer._samples = samples
            hooks = [(self, samples.check), (self.model, samples.check)]
            for module in self._trained_whole().values():
                hooks.append((module, samples.tell))
                # PEFT 0.18 disables those that the active adapter does not have.
                undo.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                module._disable_adapters = layers[0]._disable_adapters
            for module, hook in hooks:
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if expand := getattr(self.model, "_expand_inputs_for_generation", None):
                undo.callback(vars(self.model).pop, "_expand_inputs_for_generation", None)
                self.model._expand_inputs_for_generation = partial(_expanded, expand, samples)
            yield

    def _check_mixed(self, names: Any) -> None:
        """Raise a TypeError or ValueError where the names are none of this model's, or it cannot mix adapters now."""
        if not (isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)):
            raise TypeError(
                f"adapter_names: got {names!r}, must be a list with one name for each sample, an adapter's or {BASE!r}"
            )
        if unknown := sorted({*names} - {BASE, *self.peft_config}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. adapter_names takes "
                f"{', '.join(self.peft_config)} and {BASE}"
            )
        layers = self._layers()
        if any(layer.merged_adapters for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        # Gradient checkpointing would run layers again in the backward, when they have forgotten the names.
        again = [m for m in self.model.modules() if vars(m).get("gradient_checkpointing")]
        if any(module.training for module in [*layers, *again]):
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first")
        kind = getattr(getattr(self.model, "config", None), "model_type", None)
        if kind in SEQUENCE_FIRST:
            raise ValueError(f"adapter_names: a model of type {kind} has layers whose first dimension is not the batch")
        for name, module in self.model.named_modules():
            if isinstance(module, LoraXSLinearLayer) and "experts" in name.split("."):
                raise ValueError(
                    f"adapter_names: {label_of(name)} is part of an expert, which gets tokens of any samples"
                )
        for name, module in self._trained_whole().items():
            if not isinstance(module.original_module, MIXABLE):
                raise TypeError(
                    "Mixed batching is only supported for the following modules: "
                    f"{', '.join(kind.__name__ for kind in MIXABLE)}. {label_of(name)}, one of modules_to_save, is a "
                    f"{type(module.original_module).__name__}"
                )

    def _trained_whole(self) -> dict[str, AuxiliaryTrainingWrapper]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}

    def _create_and_replace(
        self,
        config: LoraXSConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base = target.base_layer if isinstance(target, LoraXSLinearLayer) else target
        if is_unread_linear(base):
            raise TypeError(f"target_modules: matches module {current_key!r}, {unread(base)}")
        if why := why_no_adapter(parent, target_name):
            raise TypeError(f"target_modules: matches module {current_key!r} {why}")
        if isinstance(base, BaseTunerLayer) or not is_linear(base):
            raise TypeError(
                f"target_modules: matches module {current_key!r}, a {type(base).__name__}; must match linear "
                "layers without an adapter of another method (exclude_modules leaves one out)"
            )
        adapter = _new_adapter(base, config, current_key)
        if isinstance(target, LoraXSLinearLayer):
            target.add(adapter_name, adapter, config)
        else:
            layer = LoraXSLinearLayer(base, _backend_of(base, self.model))
            layer.add(adapter_name, adapter, config)
            self._replace_module(parent, target_name, layer, target)
        if config.init != "given":
            self._new.append(adapter)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        for module in list(self.model.modules()):
            for name, each in module._modules.items():
                if each is child:
                    module._modules[name] = new_module

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """R in fp32, or in the base layer's dtype, as FSDP1 needs it, where autocast_adapter_dtype is False.

        A and B belong in the base layer's dtype either way: in another they cost a separate pass.
        """
        for module in self.model.modules():
            if isinstance(module, LoraXSLinearLayer) and adapter_name in module.loraxs_R:
                module.cast_R(adapter_name, autocast_adapter_dtype)

    def reset_parameters(self) -> None:
        """Make A, B and R of all adapters, for a model that was adapted on the meta device and has its weights now."""
        for module in self.model.modules():
            if isinstance(module, LoraXSLinearLayer):
                module.reset_parameters()


def _expanded(expand: Callable[..., Any], samples: _Samples, *args: Any, **kwargs: Any) -> Any:
    """What `generate` calls to repeat its inputs for beams and returned sequences; the encoder has run by then."""
    inputs = expand(*args, **kwargs)
    samples.expand(args[0] if args else kwargs.get("expand_size", 1))
    return inputs


def _new_adapter(base: nn.Module, config: LoraXSConfig, name: str) -> LoRAXSLinear:
    """An adapter for one layer as the config has it, still to be filled; what its SVD will do goes into the config."""
    r = pattern_value(config.rank_pattern, name, config.r)
    options = {
        "alpha": pattern_value(config.alpha_pattern, name, config.lora_alpha),
        "dropout": config.loraxs_dropout,
        "init_std": config.init_std,
        "dtype": config.dtype and getattr(torch, config.dtype),
        "name": name,
        "fill": False,
    }
    weight = weight_of(base, label_of(name))
    if config.init == "given":
        N, K = weight.shape
        factors = (torch.zeros(*size, dtype=weight.dtype, device=weight.device) for size in ((r, K), (N, r)))
        adapter = LoRAXSLinear.from_linear(base, r, init=tuple(factors), **options)
        nn.init.zeros_(adapter.R)
        return adapter
    recipe = Recipe(config.init, config.svd_seed, name)
    if config.init == "svd":
        at = f"{r} {weight.shape[0]}x{weight.shape[1]}"
        block = None if config.svd_oversample is None else r + config.svd_oversample
        asked = {"block": block, "n_iter": config.svd_n_iter}
        known = config.svd_recipe.get(at)
        if known is None or any(value not in (None, known[key]) for key, value in asked.items()):
            config.svd_recipe[at] = asdict(plan(r, weight.shape, **asked))
        recipe = replace(recipe, **config.svd_recipe[at])
    return LoRAXSLinear.from_linear(base, r, init=recipe, **options)


def _backend_of(base: nn.Module, model: nn.Module) -> Any:
    """PEFT's way of merging into a quantised layer; None for other layers, and where nothing can quantise it anew."""
    if quantization_utils is None or weight_view(base) is not None:
        return None
    try:
        return quantization_utils.resolve_quantization_backend(
            base, **quantization_utils.get_quantization_kwargs(model)
        )
    except (ImportError, ValueError):  # a torchao that this PEFT does not know, or one that quantised by itself and
        return None  # not for transformers, which would know how to do it again


class _Unmerged:
    """A layer's weight before it is merged into, and what PEFT's backends overwrite beside it, to be put back."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.weight = layer, layer._parameters.get("weight")
        self.of_layer = dict(vars(layer))
        parts = (self.weight, getattr(layer, "state", None))  # on which bitsandbytes keeps notes, too
        self.of_parts = [(each, dict(vars(each))) for each in parts if each is not None]

    def note_changes(self) -> None:
        """Keep of the layer only what merging has changed: the rest, such as `training`, may change while merged."""
        now = vars(self.layer)
        self.of_layer = {key: value for key, value in self.of_layer.items() if now.get(key) is not value}

    def check(self, merged: nn.Module, label: str) -> None:
        """Let the weight follow where the layer was moved in the meantime; ValueError if that is no dense one."""
        now = merged._parameters.get("weight")
        if self.weight is None or (self.weight.device, self.weight.dtype) == (now.device, now.dtype):
            return
        if type(self.weight) is not nn.Parameter:
            raise ValueError(
                f"{label}: got a merged weight on {now.device} in {now.dtype}, must be on {self.weight.device} in "
                f"{self.weight.dtype} as before merging: a quantised weight does not follow"
            )
        self.weight = nn.Parameter(self.weight.to(now), requires_grad=self.weight.requires_grad)

    def put_back(self, owner: LoraXSLinearLayer) -> None:
        vars(self.layer).update(self.of_layer)
        for each, before in self.of_parts:
            vars(each).clear()
            vars(each).update(before)
        if self.weight is not None:
            self.layer.weight = self.weight
        owner.base_layer = self.layer


class _Buffers(BufferDict):
    """PEFT's BufferDict, in which each entry is part of the state dict or is not, as `register_buffer` was told."""

    def __setitem__(self, name: str, t: Tensor) -> None:
        self._buffers[name] = t

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._buffers:
            if (key := prefix + name) in destination:  # B may be a view of wider storage
                destination[key] = destination[key].contiguous()


class _Fingerprints(_Buffers):
    """Fingerprints by adapter; the names of those that are assigned as attributes go into the layer's `unchecked`.

    torch copies what it loads or assigns it so, transformers always assigns.  Whatever is kept here beside the
    fingerprints needs a name that no adapter has, as __unchecked does: Python spells it _Fingerprints__unchecked.
    """

    def __init__(self, unchecked: set[str]) -> None:
        super().__init__()
        self.__unchecked = unchecked

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.__unchecked.discard(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self.__unchecked.add(name)


def _check_before_loading(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Look at all layers before the first of them is loaded, so that what is refused changes none.

    Only from here are the keys seen that the reference puts beside a layer.
    """
    layers = {
        f"{prefix}{name}": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoraXSLinearLayer)
    }
    if layers:  # it may have been unloaded
        translate(state_dict, layers, whole_model=True)
        configs = {name: config for layer in layers.values() for name, config in layer.config.items()}
        files = {name: c._loaded[0] for name, c in configs.items() if _is_what_was_loaded(c, name, state_dict, prefix)}
        for name, layer in layers.items():
            layer.check_state_dict(state_dict, f"{name}.", files)
        for name, file in files.items():
            _check_all_belongs(model, state_dict, prefix, file)
            configs[name]._loaded = None  # the next ones come from elsewhere


def _is_what_was_loaded(config: LoraXSConfig, adapter: str, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Whether a state dict has, for this adapter, just the tensors of the file that the config was loaded with."""
    if config._loaded is None or len(state_dict) != config._loaded[2]:
        return False
    ending = f".loraxs_R.{adapter}"
    with_R = (key for key in state_dict if key.endswith(ending))
    return config._loaded[1] == {key.removeprefix(prefix).removesuffix(ending) for key in with_R}


def _check_all_belongs(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, file: str) -> None:
    """Raise a ValueError where a tensor of an adapter's file is none of the model's, or of another shape or kind."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {f"{prefix}{name}": t for name, t in tensors}
    for key, t in state_dict.items():
        if not key.startswith(prefix) or key.endswith("_extra_state"):
            continue
        if ".loraxs_" in key and key.rpartition(".loraxs_")[2].count(".") > 1:
            continue  # of another adapter, which PEFT 0.18 saves too, or what a parametrization makes R of
        what = f"{file}: tensor {key.removeprefix(PREFIX)!r}"
        if key not in own:
            if key.endswith(".bias") and (".modules_to_save." in key or ".original_module." in key):
                continue  # PEFT saves biases of heads a second time, by names without the adapter's
            raise ValueError(f"{what} belongs to no part of this model")
        if hasattr(own[key], "ds_id"):  # of which ZeRO-3 holds a part
            continue
        shape, floats = tuple(own[key].shape), own[key].is_floating_point()
        if tuple(t.shape) != shape or t.is_floating_point() != floats:
            kind = "a floating point type" if floats else f"{own[key].dtype}"
            raise ValueError(f"{what} has shape {tuple(t.shape)} and {t.dtype}, must have {shape} and {kind}")


def _check_what_was_loaded(layer: LoraXSLinearLayer, _: Any) -> None:
    layer.check_fingerprints(layer._latest)


def _is_in_parts(R: Tensor | None) -> bool:
    """Whether DeepSpeed's ZeRO-3 has left R empty."""
    return hasattr(R, "ds_id") and R.shape != R.ds_shape


def _check_name(name: str) -> None:
    """Refuse, before anything is changed, a name that means the base model or under which torch can hold no tensor."""
    taken = any(hasattr(each, name) for each in (nn.ParameterDict(), _Fingerprints(set())))
    if not name or "." in name or name == BASE or taken:
        raise ValueError(
            f"adapter_name: got {name!r}, must be a name without a dot that is no attribute of nn.ParameterDict or of "
            f"PEFT's BufferDict, which hold the adapters by name, and not {BASE!r}, the base model in adapter_names"
        )


def _register(config: type, model: type) -> tuple[type, type]:
    """Make the method known to PEFT; if PEFT has a LORAXS of its own, that one stays and is what this module offers."""
    own = PEFT_TYPE_TO_CONFIG_MAPPING.get("LORAXS")
    if own is not None:
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


LoraXSConfig, LoraXSModel = _register(LoraXSConfig, LoraXSModel)
