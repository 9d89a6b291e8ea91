"""Calls of a model that has a bank: `adapter_ids` taken out of the arguments, and checked against the batch."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .seat import refuse_export
from .selection import Selection

if TYPE_CHECKING:
    from .adapter_bank import AdapterBank

# Arguments of a model's forward with one entry of the first dimension for each sample, as transformers names them.
BATCHED = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")
PACKED = ("generate_batch", "init_continuous_batching")
# In the names of a model's arguments of which a sample may have any number.
MEDIA = re.compile("pixel|patches|input_features|input_values|audio_|^(image|video|sound)s?$")


@dataclass(frozen=True)
class Attached:
    """What `attach` leaves on a model, as `model.loraxs_bank`."""

    bank: AdapterBank
    whole: bool  # whether this is the model, and not a transformers model inside of it
    put_on: bool  # whether the layers are the bank's own
    trained: tuple[str, ...]  # parameters that required a gradient before
    unmixed: str | None  # why the samples of a batch cannot have different adapters
    beside: str | None  # a module of the bank that is no part of the text decoder, where there is one


@cache
def with_adapter_ids(kind: type[nn.Module]) -> type[nn.Module]:
    """A model's class whose calls, and `generate` where there is one, take `adapter_ids`; zero_grad knows what trains.

    As torch.nn.utils.parametrize does, it takes the place of the class of one model, so that no other model changes
    and copies of this one keep it.
    """

    def inside(run: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with calling(self, kwargs.pop("adapter_ids", None), args, kwargs):
            return run(self, *args, **kwargs)

    def selected(run: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with _selecting(self, names := kwargs["adapter_ids"]) as selection:
            if names is not None and not run.__module__.startswith("transformers.models."):
                selection.method = run.__name__  # an `encode` may sort the samples by length
            return run(self, *args, **kwargs)  # with the names, for calls that it may make later or in another thread

    uncompiled = torch._disable_dynamo(inside, recursive=False)  # the model that it calls is still compiled

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_export()
        return (uncompiled if torch.compiler.is_compiling() else inside)(kind.__call__, self, args, kwargs)

    def taking(run: Callable[..., Any], how: Callable[..., Any]) -> Callable[..., Any]:
        eager = torch._disable_dynamo(how, recursive=False)

        @wraps(run)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if "adapter_ids" not in kwargs:  # which `__call__` has taken out
                return run(self, *args, **kwargs)
            return (eager if torch.compiler.is_compiling() else how)(run, self, args, kwargs)

        return method

    @wraps(kind.zero_grad)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.zero_grad(self, *args, **kwargs)
        if (attached := self.loraxs_bank).whole and (training := attached.bank._training) is not None:
            training.zero_grad()  # of parameters that are not the model's, when Trainer asks

    body = {name: taking(run, selected) for name, run in methods_with_kwargs(kind).items()}
    body |= {"__call__": __call__, "forward": taking(kind.forward, inside), "zero_grad": zero_grad}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    if callable(getattr(kind, "generate", None)):

        @wraps(kind.generate)
        def generate(self: Any, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
            standard = kind.generate.__module__ == "transformers.generation.utils"
            with generating(self, adapter_ids, args, kwargs, standard):
                return kind.generate(self, *args, **kwargs)

        def expand(self: Any, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
            if (selection := self.loraxs_bank.bank.selections.current()) is not None:
                selection.factor = expand_size  # the copies of a sample lie side by side
            return super(made, self)._expand_inputs_for_generation(expand_size, *args, **kwargs)

        body |= {"generate": generate, "_expand_inputs_for_generation": expand}
        body |= {name: unpacked(getattr(kind, name)) for name in PACKED if hasattr(kind, name)}
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:

        def __reduce_ex__(self: Any, protocol: Any) -> tuple:
            """pickle, which cannot find this class by its name, comes to the bank, whose error says what to do."""
            return copied, (kind,), *kind.__reduce_ex__(self, protocol)[2:]

        body |= {"__reduce_ex__": __reduce_ex__}
    made = type(kind.__name__, (kind,), body)
    return made


def copied(kind: type[nn.Module]) -> nn.Module:
    """What deepcopy fills with the state of a model of this class that has a bank."""
    return nn.Module.__new__(with_adapter_ids(kind))


def methods_with_kwargs(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods of a model, such as get_text_features, that would take `adapter_ids` for one of their **kwargs."""
    own = (each for each in kind.__mro__ if not each.__module__.startswith(("torch.", "transformers.")))
    models = (each for each in kind.__mro__ if each.__module__.startswith("transformers.models."))
    found = {}
    for name in {name for each in (*own, *models) for name in vars(each) if not name.startswith("_")}:
        run = inspect.getattr_static(kind, name)
        if isinstance(run, FunctionType) and inspect.getfullargspec(run).varkw is not None:
            found[name] = run
    return found


def unpacked(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method that makes batches of its own in another thread, refused where adapters are selected for it."""

    @wraps(run)
    def checked(self: Any, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        if adapter_ids is not None or self.loraxs_bank.bank.selections.current() is not None:
            raise ValueError(
                f"adapter_ids: got names, or a selection is open, and {run.__name__} (continuous batching) packs the "
                "prompts as it goes, so that adapters cannot follow them; must be generate, with another cache"
            )
        return run(self, *args, **kwargs)

    return checked


def turn(module: nn.Module, kind: type[nn.Module], undo: Any) -> None:
    """Let a module be of another class, until `undo` is run."""
    undo.callback(setattr, module, "__class__", type(module))
    module.__class__ = kind


@contextmanager
def calling(
    model: nn.Module, names: Sequence[str | None] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Around a call of the model, or of a transformers model inside of it."""
    attached = model.__dict__.get("loraxs_bank")
    if attached is None and names is None:  # the model was compiled before the bank was detached
        yield
        return
    if attached is None:
        raise ValueError("adapter_ids: got names for a model whose bank was detached")
    if kwargs.get("adapter_names") is not None:  # most models would ignore it
        raise TypeError("adapter_names: is an argument of PEFT's; the names of a bank's adapters are adapter_ids")
    with _selecting(model, names) as selection:
        if selection is None:
            yield
            return
        batch, samples = batch_of(args, kwargs), selection.samples
        if selection.mixed:
            given = (
                dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) if attached.beside else {}
            )
            _refuse_mixed(attached, given | {**kwargs})
        expected = (samples, samples and samples * selection.factor)
        known = batch is not None and samples is not None and selection.counted and (attached.whole or selection.mixed)
        if known and batch[0] not in expected:
            raise ValueError(
                f"adapter_ids: got {samples} names for a batch of {batch[0]} samples, must be one for each"
            )
        with selection.during(batch, selection.factor, selection.counted):
            yield


def _refuse_mixed(attached: Attached, given: Mapping[str, Any]) -> None:
    """ValueError where the samples of a batch cannot have different adapters.

    given: the arguments.  Of images or sounds beside text a sample may have any number.
    """
    if attached.unmixed is not None:
        raise ValueError(f"adapter_ids: got different adapters for one batch, and {attached.unmixed}")
    has = {name for name, value in given.items() if not (value is None or isinstance(value, bool))}
    if attached.beside and any(map(MEDIA.search, has)) and has & {"input_ids", "inputs_embeds"}:
        raise ValueError(
            "adapter_ids: got different adapters for one batch with images or sounds, and module "
            f"{attached.beside!r} is not in the text decoder, so that its rows cannot be told apart by sample; leave "
            "it out of the bank (exclude_modules), or use one adapter for the batch"
        )


@contextmanager
def generating(
    model: nn.Module, names: Sequence[str | None] | None, args: Sequence[Any], kwargs: Mapping[str, Any], standard: bool
) -> Iterator[None]:
    """Around `generate`, which calls the model on each sample as often as there are beams or sequences.

    standard: whether it is the one of transformers that all models share.
    """
    with _selecting(model, names) as selection:
        if selection is None:
            yield
            return
        if selection.mixed and not (standard and kwargs.get("custom_generate") is None):
            raise ValueError(
                "adapter_ids: got different adapters for one batch, must be the same for all samples: "
                "custom_generate, or a generate that is the model's own, may change the order of the samples"
            )
        prompts = kwargs.get("inputs", args[0] if args else None)
        if selection.mixed:  # here, since it may call parts of the model by themselves, such as that for images
            _refuse_mixed(model.loraxs_bank, {getattr(model, "main_input_name", "inputs"): prompts} | {**kwargs})
        prompts = batch_of([] if prompts is None else [prompts], {k: kwargs[k] for k in BATCHED if k in kwargs})
        if prompts is not None and selection.samples not in (None, prompts[0]):
            raise ValueError(
                f"adapter_ids: got {selection.samples} names for {prompts[0]} prompts, must be one for each"
            )
        with selection.during(None, 1, standard):
            yield


@contextmanager
def _selecting(model: nn.Module, names: Sequence[str | None] | None) -> Iterator[Selection | None]:
    """The selection that a call belongs to: a new one of these names or, without names, the open one, if any."""
    bank = model.loraxs_bank.bank
    if model.loraxs_bank.whole:
        bank.know(model)  # which may be a copy that is called for the first time
    if names is None:
        yield bank.selections.current()
        return
    selection = bank.select(names)
    try:
        yield selection.open(nested=True)
    finally:
        try:
            selection.close()
        except BaseException:  # Ctrl-C as it begins
            selection.close()
            raise


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many samples, and rows of each, the arguments of a model's call have; None: they have no tensor."""
    tensors = [kwargs.get(name) for name in BATCHED] + [*args] + [*kwargs.values()]
    first = next((t for t in tensors if isinstance(t, Tensor) and t.dim() > 0), None)
    if first is None:
        return None
    rows = first.shape[1:-1] if first.is_floating_point() else first.shape[1:]
    return first.shape[0], math.prod(rows)
