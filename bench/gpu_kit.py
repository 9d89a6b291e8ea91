"""What a GPU machine without a network needs, made before, so that nothing is built in its minutes.

    make gpu-kit [KIT_PYTHON=python3.12]      here; the same as python bench/gpu_kit.py make
    python bench/gpu_kit.py use [gpu-kit]     there, in a checkout with that folder; no network, no compiler
    python bench/gpu_kit.py keep DIR          there, at the end: DIR/triton.tar.gz, what Triton has compiled
    make gpu-kit KIT_TRITON=DIR/triton.tar.gz here again, before the next such machine, which then compiles it no more

KIT_PYTHON, a command or a path, is a Python of the GPU machine's version, and LORAXS_CUDA_ARCHS (90a unless it is set)
its GPUs; build/kit-<version> is its environment with the tools of the build.  In gpu-kit:

    _core.<Python and platform>.so, _build.json   the CUDA core and its record (loraxs_kernels/backends/cuda/core.py)
    kit.json                                      {"commit": "1a2b3c4", "dirty": false, "date": ..., "python": "3.12.1"}
    triton.tar.gz                                 where one was given, to this kit or the one before it
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "gpu-kit"
PYTHON = "python3.12"
TRITON = "triton.tar.gz"


class KitError(ValueError):
    """Why a kit cannot be made or used, as a sentence for a person."""


def make() -> dict[str, Any]:
    """The kit of this tree, in place of an earlier one, which stays where this fails.  Returns its kit.json."""
    python = os.environ.get("KIT_PYTHON") or PYTHON
    version = version_of(python)
    triton = Path(os.environ.get("KIT_TRITON") or KIT / TRITON)
    if os.environ.get("KIT_TRITON") and not (triton.is_file() and tarfile.is_tarfile(triton)):
        raise KitError(f"KIT_TRITON: got {triton}, must be a {TRITON} that `python bench/gpu_kit.py keep` made")
    kit = {
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": version,
    }
    tools = ROOT / "build" / f"kit-{version}"
    if not (tools / "bin" / "python").exists():
        run(python, "-m", "venv", tools)
    python = tools / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run(*pip, "setuptools>=77")
    needs = run(python, "-c", "import setup; print(*setup.requirements(), sep='\\n')", stdout=subprocess.PIPE)
    run(*pip, *needs.split())
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        run(python, "setup.py", "build_ext", "--build-lib", folder)
        made = Path(folder) / "loraxs_kernels"
        (made / "kit.json").write_text(json.dumps(kit) + "\n")
        if triton.exists():
            shutil.copy(triton, made / TRITON)
        check(made)  # the sources may have changed meanwhile
        shutil.rmtree(KIT, ignore_errors=True)
        made.rename(KIT)
    return kit


def use(folder: Path) -> dict[str, Any]:
    """The kit's core in this checkout, in place of what is there.  Returns kit.json.

    Raises KitError, before anything is written, where it is no kit, or one of other sources or for another Python.
    """
    kit = check(folder)
    core = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not core.exists():
        remedy = f"make gpu-kit KIT_PYTHON=python3.{sys.version_info[1]}"
        raise KitError(f"kit: {folder} is for Python {kit['python']}, must hold {core.name} for this one: {remedy}")
    loaded = subprocess.run([sys.executable, "-c", "import _core"], cwd=folder, capture_output=True, text=True)
    if loaded.returncode:
        why = (loaded.stderr.strip().splitlines() or [f"it ended Python with {loaded.returncode}"])[-1]
        raise KitError(f"kit: the core of {folder} does not load here: {why}")
    package = ROOT / "loraxs_kernels"
    for old in (package / "_build.json", *package.glob("_core.*")):  # as setup.py: a core without its record is none
        old.unlink(missing_ok=True)
    shutil.copy(core, package)
    shutil.copy(folder / "_build.json", package)
    if (folder / TRITON).exists():
        unpack(folder / TRITON)
    return kit


def unpack(archive: Path) -> None:
    """What `keep` kept, where Triton looks for it."""
    cache = triton_cache()
    shutil.unpack_archive(archive, cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):  # the paths of the files beside it, as they were where it was made
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def keep(folder: Path) -> None:
    """What Triton has compiled on this machine, for the kit of the next one: the same Triton finds it by its hash."""
    if not triton_cache().is_dir():
        raise KitError(f"keep: {triton_cache()} is not there, Triton has compiled nothing")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.make_archive(str(folder / TRITON.partition(".")[0]), "gztar", triton_cache())


def triton_cache() -> Path:
    """Where Triton looks for what it has compiled, and puts it."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def check(folder: Path) -> dict[str, Any]:
    """kit.json of a kit whose core is of the sources here.  Raises KitError."""
    try:
        kit = json.loads((folder / "kit.json").read_text())
        sources = json.loads((folder / "_build.json").read_text())["sources"]
        at = f"{kit['commit']}{' and changes' * kit['dirty']}, for Python {kit['python']}"
    except (OSError, ValueError, KeyError, TypeError):
        raise KitError(f"kit: got {folder}, must be a folder that `make gpu-kit` made") from None
    core = runpy.run_path(str(ROOT / "loraxs_kernels" / "backends" / "cuda" / "core.py"))  # and so without torch
    if sources != core["sources"]():
        raise KitError(f"kit: {folder}, made of {at}, is of another csrc/ or CMakeLists.txt than here: make gpu-kit")
    return kit


def version_of(python: str) -> str:
    """The version of the Python that a kit is for."""
    command = [python, "-c", "import platform; print(platform.python_version())"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise KitError(
            f"KIT_PYTHON: got {python!r}, which does not run here, must be a Python's name or path"
        ) from None


def git(*command: str) -> str:
    """What git says of this tree; "" if it is no checkout."""
    try:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def run(*command: str | Path, **options: Any) -> str:
    """Run a step of `make`, printing what it prints."""
    settings = {"LORAXS_CUDA_ARCHS": os.environ.get("LORAXS_CUDA_ARCHS") or "90a", "LORAXS_BUILD_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, text=True, **options)
    if done.returncode:
        raise KitError(f"{' '.join(map(str, command))} ended with {done.returncode}; there is no new kit")
    return done.stdout or ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["make", "use", "keep"])
    parser.add_argument("folder", type=Path, nargs="?", default=KIT, help="default: gpu-kit in this checkout")
    arguments = parser.parse_args(argv)
    try:
        if arguments.what == "keep":
            keep(arguments.folder)
        elif arguments.what == "use":
            print(json.dumps(use(arguments.folder)))
        else:
            kit, size = make(), sum(file.stat().st_size for file in KIT.iterdir()) / 1e6
            print(f"{json.dumps(kit)}\ngpu-kit: {size:.1f} MB.  On the GPU machine, in this tree with that folder:")
            commit = f"--commit {kit['commit']}"
            print(f"    python bench/gpu_suite.py --kit gpu-kit {commit} --out DIR --budget 210 --only ladder tests")
    except KitError as error:
        print(f"gpu_kit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
