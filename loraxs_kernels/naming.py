"""Names: other and earlier names of an argument, dtypes by name, and what people are told of modules."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what layers and the SVD compute with
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


def label_of(name: str) -> str:
    """What errors call the layer of that name in its model."""
    return f"module {name!r}" if name else "linear"


def first_line(error: Exception) -> str:
    """The first line of what an error says; if it says nothing, its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Former:
    """An earlier name of an argument that is now called `new`.

    convert: makes the new argument's value of the old one's and of the other arguments of the call; None: it is the
        same value.
    """

    new: str
    convert: Callable[[Any, Mapping[str, Any]], Any] | None = None


def kinds(names: Iterable[str]) -> str:
    """ "2 q_proj, 2 v_proj": how many modules have each last part of a name."""
    found = Counter(name.rpartition(".")[2] or "the model itself" for name in names)
    return ", ".join(f"{n} {kind}" for kind, n in found.items())


def aliases(**names: str | Former) -> Callable[[F], F]:
    """Decorator: the function also takes these names in place of its own.  Its signature shows its own names only.

        @aliases(r="rank", sigma=Former("init_std"))
        def attach(model, rank, *, init_std=1e-5): ...

    A plain string is a name as good as the other, a Former an old one: a FutureWarning then names the new one.  Giving
    both names is a TypeError, as it is for any argument that is given twice.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for name in names.keys() & options.keys():
                former = names[name] if isinstance(names[name], Former) else None
                new, value = former.new if former else names[name], options.pop(name)
                given = signature.bind_partial(*args, **{k: v for k, v in options.items() if k not in names}).arguments
                if new in given:
                    raise TypeError(f"{function.__name__}: got both {new} and {name}, which mean the same; give one")
                if former:
                    warnings.warn(f"{function.__name__}: {name} is now called {new}", FutureWarning, stacklevel=2)
                    value = former.convert(value, given) if former.convert else value
                options[new] = value
            return function(*args, **options)

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """A property for the earlier name of an attribute, with a FutureWarning."""

    def warn() -> None:
        warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=3)

    def read(self: Any) -> Any:
        warn()
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn()
        setattr(self, new, value)

    return property(read, write, doc=f"Earlier name of `{new}`.")


def as_dtype(argument: str, value: Any, allowed: Sequence[torch.dtype], of: str = "") -> torch.dtype | None:
    """The dtype that a caller gave as torch.bfloat16, "bfloat16" or "bf16"; None stays None.

    Raises ValueError, naming the argument and what it is `of`, for anything else or a dtype that is not allowed.
    """
    if value is None:
        return None
    name = SHORT.get(value, value) if isinstance(value, str) else value
    for dtype in allowed:
        if name is dtype or name == dtype_name(dtype):
            return dtype
    names, where = ", ".join(map(dtype_name, allowed)), f" for {of}" if of else ""
    raise ValueError(f"{argument}: got {value!r}{where}, must be one of {names} (as torch's dtype or by name)")
