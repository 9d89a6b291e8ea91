"""The JSON of a run, version 2: one object, written anew after every row, so that a run may stop at any moment.

    format, version          "loraxs-bench", 2
    date, machine, versions  when and where (info.environment): date in UTC; on a GPU its driver and memory too
    commit, dirty            of the source, where it is a git checkout; else the package's version, and null
    kernels                  a hash of what decides what each backend launches (backends/tuned.py)
    settings                 what was asked for
    ceilings                 bandwidth (bytes/s), half and single (flop/s) of this GPU, measured in this run, or null
    complete, seconds        whether the run came to its end, and how long it took
    rows                     a list, below
    tests                    of bench/gpu_suite.py only: for each component a hash of its files, how many of its tests
                             passed, failed, crashed, timed out, were not reached or skipped, and which (names, skips:
                             bench/outcomes.py); its rows have the `run` that they are of
    build                    of bench/gpu_suite.py only: whether there is a CUDA core, and why not; architectures, nvcc,
                             cutlass; if it was built there: seconds, cores, MAX_JOBS, and whether nothing was there
                             before (whole)
    ladder                   of bench/gpu_suite.py until 2026-11-27: what became of first light, in the words of `tests`

Every row has `question`, `path`, `model`, `dtype`, and `status`: "ok" or "failed" with a `reason`.  Spreads are {low,
median, high}: quartiles over rounds.  Sizes are in elements, times in seconds, memory in bytes.  Rows that
loraxs_kernels/bench/compare.py has timed say besides, where it applies: mode; errors {result: error, and what the
accuracy rule allows}; rounds; seconds (a spread; on a GPU alone: on a shared CPU ratios are kept); over {other path:
spread of the ratio}; noisy; gauges before and after (MHz, C, W).  And of each question:

    layer, host  layers, count (of this shape in a block), N, K, T, r, direction; over {frozen, reference, peft-lora,
                 torch}; sets, peak_bytes (on a GPU); host on a GPU: kernels {forward, backward}
    chain        N, K, T, r, direction, bytes (that must move)
    gemm         layers, count, N, K, T, r, direction, over {frozen}; flops (of the path), floor_flops (of x W^T alone),
                 tile (rows, columns of y), picked (the cuda backend would use this path here)
    group        N (a list), K, T, r, over {frozen, separate}
    choice       layers, count, N, K, T, r, weight (whether there is a W), over {torch}; directions are of the
                 primitive: backward makes gX and gR
    model        blocks, r, T (a step's tokens), sequence, checkpointing, again (the floor once more); peak_bytes; loss,
                 trained (parameters), gR_difference (from the reference layers')
    svd          N, K, r, over {loraxs-svd}; sigma_error (largest relative error of a singular value), excess (of the
                 reconstruction's squared error over the best of that rank, relative); bytes (of every read of W, ours
                 alone), peak_bytes (on a GPU, beyond weights and results); for a whole model matrices in place of N and
                 K, and the errors of the last
    bank         N, K, T, r, direction, over {one}.  Of banks with `records`: paths warm and cold, over {fewest, warm}:
                 the bank with the fewest records, and warm with as many; read (r alone, one record; over {fewest}) and
                 adapter (modules): bytes of a record, and seconds on a CPU, too
    experiments  until 2026-11-28: experiment, the sizes it has (N, K, T, r, direction), over {path}; where there is a
                 prediction unit ("s", "x": a ratio, "B/s"), measured (a spread), predicted {low, high, why} and ratio
                 (of measured to the middle of predicted, a spread); swizzle: tile, waves, wave_bytes (of x and W that a
                 wave asks of memory)

Files are added, never changed: a name that is taken gets a number.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends import tuned
from ..files import write_atomically
from ..info import environment
from . import BenchError
from .questions import QUESTIONS
from .request import Request

FORMAT, VERSION = "loraxs-bench", 2
_FIELDS = ("date", "machine", "versions", "commit", "settings", "ceilings", "complete", "seconds", "rows")


class Report:
    """A run in the making; every `add` is on the disk when it returns."""

    def __init__(self, request: Request, out: Path | None, commit: str | None = None) -> None:
        self.started = time.perf_counter()
        self.data: dict[str, Any] = {
            **head(FORMAT, VERSION, request.device, commit),
            "kernels": {name: tuned.kernels(name) for name in ("triton", "cuda")},
            "settings": request.plain(),
            "ceilings": None,
            "complete": False,
            "seconds": 0.0,
            "rows": [],
        }
        try:
            self.path = _target(out, self.data)
            self.save()
        except OSError as error:
            raise BenchError(f"out: {error.filename} cannot be written: {error.strerror}") from error

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        self.save()

    def save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.started, 1)
        save(self.data, self.path)


def head(format: str, version: int = 1, device: Any = "cpu", commit: str | None = None) -> dict[str, Any]:
    """What every report begins with: its format, when and where it is made, with what, and from which source."""
    if commit is not None and not re.fullmatch(r"\w[\w.+-]*", commit):  # it becomes a part of a file's name
        raise BenchError(f"commit: got {commit!r}, must be letters, digits, '_', '.', '+' and '-'")
    found = (commit, None) if commit else source()
    return {"format": format, "version": version, **environment(device), "commit": found[0], "dirty": found[1]}


def keep(data: dict[str, Any], out: Path, what: str) -> None:
    """Write <out>/<date>-<commit>-<what>.json, and print its name."""
    path = free(out / f"{data['date'][:10]}-{data['commit']}-{what}.json")
    save(data, path)
    print(path)


def save(data: dict[str, Any], path: Path) -> None:
    write_atomically(path, dumps(data).encode())


def dumps(data: dict[str, Any]) -> str:
    """JSON with a line for each row: small, and readable in a diff."""
    head = {key: value for key, value in data.items() if key != "rows"}
    text = json.dumps(head, indent=1)
    rows = ",\n".join("  " + json.dumps(_short(row)) for row in data["rows"])
    return f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _short(value: Any) -> Any:
    """Numbers to five figures: the sixth is noise.  JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def load(path: Path) -> dict[str, Any]:
    """A report, checked.  Raises BenchError, naming the file, where it is not one this version reads."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{path}: cannot be read as a report: {error}") from error
    if not is_report(data) or data.get("version") != VERSION:
        got = f", and is of version {data.get('version')!r}" if is_report(data) else ""
        raise BenchError(f"{path}: must be a report of `loraxs bench`, version {VERSION}{got}")
    if missing := [field for field in _FIELDS if field not in data]:
        raise BenchError(f"{path}: has no {', '.join(missing)}")
    if not isinstance(data["rows"], list) or not all(isinstance(row, dict) for row in data["rows"]):
        raise BenchError(f"{path}: rows must be a list of JSON objects")
    for i, row in enumerate(data["rows"]):
        ok = row.get("status") == "ok" or (row.get("status") == "failed" and row.get("reason"))
        if row.get("question") not in QUESTIONS or not row.get("path") or not ok:
            raise BenchError(
                f"{path}: row {i} must have a question, a path, and the status ok, or failed with a reason"
            )
    return data


def is_report(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == FORMAT


def source() -> tuple[str, bool | None]:
    """(commit, whether files differ from it) of the checkout this package runs from, else (its version, None)."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return __version__, None

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return __version__, None


def folder(device: str) -> str:
    """The folder of a device's results: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _target(out: Path | None, data: dict[str, Any]) -> Path:
    """Where to write: the file asked for, which must not be there; or a new one in <folder asked for>/<device>/."""
    name = f"{data['date'][:10]}-{data['commit']}.json"
    if named := out is not None and out.suffix == ".json":
        path = out
    else:
        path = Path(f"loraxs-bench-{name}") if out is None else out / folder(data["machine"]["device"]) / name
    if named and out.exists():
        raise BenchError(f"out: {out} is there already, and measurements are never overwritten; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"out: the folder {path.parent} cannot be made: {error}") from error
    return path if named else taken(path)


def taken(path: Path) -> Path:
    """A new file of this name, with a number if that is taken: no other run gets it meanwhile."""
    while True:
        with suppress(FileExistsError):
            found = free(path)
            found.touch(exist_ok=False)
            return found


def free(path: Path) -> Path:
    """The path, with a number if it is taken."""
    numbered = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
