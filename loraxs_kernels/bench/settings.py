"""What a run was asked to measure, checked before anything is measured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import BenchError, bank, gemm
from .paths import HOST_ONLY, PATHS
from .roofline import DIRECTIONS
from .shapes import MODELS, Shape, parse
from .svd import METHODS

QUESTIONS = ("layer", "chain", "gemm", "group", "host", "choice", "svd", "model", "bank", "experiments")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("eager", "graph")


@dataclass(frozen=True)
class Settings:
    """A checked request; `check` makes one."""

    questions: tuple[str, ...]
    model: str  # a name of shapes.MODELS, a folder with a Hugging Face model, or "" for shapes given one by one
    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    dtype_name: str
    direction: str
    paths: tuple[str, ...]  # of paths.PATHS
    svd_paths: tuple[str, ...]  # of svd.METHODS
    left_out: dict[str, str]  # paths that were not asked for by name and cannot run here: why
    modes: tuple[str, ...]
    device: torch.device
    seconds: float  # for each path at each point
    blocks: int | None  # of the model, where not all
    sequence: int  # of the question model: tokens of a sequence, and sequences of a step
    batch: int
    records: tuple[int, ...]  # of the question bank: how many the banks have


def check(
    questions: Sequence[str] = (),
    model: str | None = None,
    shapes: Sequence[str] = (),
    tokens: Sequence[int] = (),
    ranks: Sequence[int] = (),
    dtype: str | None = None,
    direction: str = "both",
    paths: Sequence[str] = (),
    modes: Sequence[str] = (),
    device: str | None = None,
    seconds: float | None = None,
    blocks: int | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    records: Sequence[int] = (),
) -> Settings:
    """Fill in what was not asked for, by what the device can do in about a minute; refuse what cannot be.

    Raises BenchError, naming the option, what it was and what it must be.
    """
    there = _device(device)
    gpu = there.type == "cuda"
    _known("question", questions, QUESTIONS)
    _known("direction", [direction], DIRECTIONS)
    _known("path", paths, (*PATHS, *METHODS, "all"))
    _known("mode", modes, MODES)
    one_of("model", model, "shape", shapes)
    model = model or ("" if shapes else "mistral-7b" if gpu else "tiny" if "model" in questions else "")
    if model and model not in MODELS and not (Path(model) / "config.json").is_file():
        known = ", ".join(MODELS)
        raise BenchError(f"model: got {model!r}, must be one of {known}, or a folder with a Hugging Face model")
    if model and model not in MODELS and set(questions) != {"model"}:
        raise BenchError(f"model: got the folder {model!r}, which answers the question model alone")
    if "graph" in modes and not gpu:
        raise BenchError("mode: got 'graph' on a CPU, CUDA graphs need a GPU")
    dtype = dtype or ("bf16" if gpu else "fp32")
    _known("dtype", [dtype], DTYPES)
    if "experiments" in questions and not gpu:
        raise BenchError("question: 'experiments' needs a GPU, and there is none in use here")
    if "experiments" in questions and dtype == "fp32":
        raise BenchError("dtype: got 'fp32', the question experiments takes bf16 or fp16")
    at_least_one(tokens=tokens, rank=ranks, blocks=[blocks], sequence=[sequence], batch=[batch], records=records)
    if seconds is not None and not 0 < seconds < 3600:
        raise BenchError(f"seconds: got {seconds:g}, must be above 0 and below 3600")
    given = tuple(map(parse, shapes))
    bank_alone = set(questions) == {"bank"} and not model
    if not given and bank_alone:
        given = bank.SHAPES
    if not given:
        given = MODELS[model].shapes if model in MODELS else (Shape(1024, 1024), Shape(1024, 4096))
    longest = _longest_sequence(model) if "model" in questions else None
    if sequence and longest and sequence > longest:
        raise BenchError(f"sequence: got {sequence}, must be at most {longest}, what {model} takes")
    questions = tuple(questions) or ("layer", "host")
    # Asking whether a path can run may import what it needs.
    chosen, left_out = _paths(paths, PATHS) if set(questions) - {"svd", "experiments"} else ((), {})
    if "gemm" in questions and "cuda" in chosen and (why := gemm.missing(DTYPES[dtype], there)):
        left_out |= {"cuda, of the question gemm": why}
    chosen_svd, left_out_svd = _paths(paths, METHODS) if "svd" in questions else ((), {})
    return Settings(
        questions=questions,
        model=model,
        shapes=given,
        tokens=tuple(tokens) or (bank.TOKENS if bank_alone else (512, 8192) if gpu else (64, 512)),
        ranks=tuple(ranks) or ((16, 64) if gpu else (16,)),
        dtype=DTYPES[dtype],
        dtype_name=dtype,
        direction=direction,
        paths=chosen,
        svd_paths=chosen_svd,
        left_out=left_out | left_out_svd,
        modes=tuple(modes) or (MODES if gpu else MODES[:1]),
        device=there,
        seconds=seconds or (0.1 if gpu else 0.5),
        blocks=blocks,
        sequence=sequence or min(2048 if gpu else 64, longest or 2048),
        batch=batch or (4 if gpu else 2),
        records=tuple(sorted(set(records))) or bank.RECORDS,
    )


def one_of(name: str, value: object, other: str, other_value: object) -> None:
    """Refuse two options of which one makes the other meaningless."""
    if value and other_value:
        raise BenchError(f"{name} and {other}: got {value} and {other_value}, give one of the two")


def model_or_shapes(model: str | None, shapes: Sequence[str]) -> tuple[str, tuple[Shape, ...]]:
    """A known model's name (default mistral-7b) and its shapes, or those given in their place."""
    one_of("model", model, "shape", shapes)
    model = model or "mistral-7b"
    if model not in MODELS:
        raise BenchError(f"model: got {model!r}, must be one of {', '.join(MODELS)}")
    return model, tuple(map(parse, shapes)) or MODELS[model].shapes


def at_least_one(**options: Sequence[int | None]) -> None:
    """Refuse numbers below 1, and those that no tensor's size can be; None: not given."""
    for name, numbers in options.items():
        for number in numbers:
            if number is not None and not 1 <= number < 2**63:
                raise BenchError(f"{name}: got {number}, must be at least 1" + " and below 2^63" * (number > 1))


def _longest_sequence(model: str) -> int | None:
    """How many positions the model takes, where it says; BenchError where the question model cannot be asked."""
    if importlib.util.find_spec("transformers") is None:
        raise BenchError("question: 'model' needs the package transformers: pip install transformers")
    if not model:
        raise BenchError("question: 'model' needs a model, not shapes")
    if model in MODELS:
        config = {"model_type": MODELS[model].model_type, **MODELS[model].config}
    else:
        try:
            config = json.loads((Path(model) / "config.json").read_bytes())
        except (ValueError, RecursionError) as error:
            raise BenchError(f"model: {model}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or "num_hidden_layers" not in config:
        raise BenchError(f"model: {model}/config.json has no num_hidden_layers, it must be of one transformer")
    longest = config.get("max_position_embeddings")
    if not isinstance(longest, (int, type(None))):
        raise BenchError(f"model: {model}/config.json has {longest!r} max_position_embeddings, must be an integer")
    return longest and longest - 2 * (config.get("model_type") == "roberta")  # whose positions start at 2


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise BenchError(f"{what}: got {name!r}, must be one of {', '.join(known)}")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BenchError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"device: got {name!r}, must be a CPU or a CUDA device")
    return device


def _paths(asked: Sequence[str], known: dict) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which of `known` to run, the floor always among them, and those left out because they cannot run here."""
    wanted = {name for name in known if name in asked}
    if "all" in asked:
        wanted |= {name for name in known if name not in HOST_ONLY}
    elif not wanted:
        wanted |= {name for name in known if known[name].default}
    wanted |= {"frozen"} & set(known)
    missing = {name: why for name in known if name in wanted and (why := known[name].missing())}
    for name in missing:
        if name in asked:
            raise BenchError(f"path: {name!r} cannot run here: {missing[name]}")
    return tuple(name for name in known if name in wanted and name not in missing), missing
