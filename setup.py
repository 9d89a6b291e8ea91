"""Builds the package and, where nvcc is, the CUDA core.  CMakeLists.txt knows how; this only runs CMake and ninja.

It is also the build backend that pyproject.toml names: setuptools', but CMake, ninja, pybind11 and CUTLASS are asked
for only where a core will be built.

    LORAXS_BUILD_CUDA   auto: a core where nvcc is, and where that fails the package without it; 1: or fail; 0: no core
    LORAXS_CUDA_ARCHS   80;90a unless it is set
    CUTLASS_DIR         a checkout of CUTLASS, or its include folder; else the wheel nvidia-cutlass
    CUDACXX, CUDA_HOME, CUDA_PATH   nvcc, or the toolkit; else PATH, /usr/local/cuda
    LORAXS_TRACE        1: kernels that note what each program does, for bench/kernel_trace.py
    MAX_JOBS            how many compilers run at once

_build.json, beside the core or in its place, says what came of it (loraxs_kernels/backends/cuda/core.py).
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import DistributionFinder, MetadataPathFinder
from pathlib import Path
from typing import Any

import setuptools

# setuptools.__version__ is not asked: within pip 24.3 to 26.2 it is the version of this checkout.
_beside = DistributionFinder.Context(name="setuptools", path=[str(Path(setuptools.__file__).parents[1])])
_versions = [each.version for each in MetadataPathFinder.find_distributions(_beside) if each.version]
# There may be more than one, or one without metadata: folders that an update has left behind.
if _versions and all(int(each.partition(".")[0]) < 77 for each in _versions):  # --no-build-isolation brings no other
    raise SystemExit(
        f"loraxs_kernels: setuptools: got {', '.join(_versions)}, must be 77 or later: pip install -U setuptools"
    )
from setuptools import Extension, build_meta, setup
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "core"  # kept, so that ninja compiles what has changed
CUTLASS = "nvidia-cutlass==4.2.0.0"
COMPILERS = ("CC", "CXX", "CUDAHOSTCXX", "NVCC_CCBIN", "CFLAGS", "CXXFLAGS", "CUDAFLAGS")  # CMake reads them once
FROM_SOURCE = (
    "LORAXS_BUILD_CUDA=1 pip install . in a checkout, or, of a release on PyPI, "
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary loraxs_kernels loraxs_kernels"
)
_lock = None


class NoCore(Exception):
    """Why there will be no CUDA core, as a sentence for a person."""


class BadSetting(NoCore):
    """A setting that cannot be met: refused, whatever LORAXS_BUILD_CUDA says."""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return requirements() + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return requirements() + build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(*arguments: Any, **named: Any) -> str:
    """setuptools' `build_wheel` from an empty folder: modules that an earlier version had would stay in the wheel."""
    for left in (ROOT / "build").glob("lib*"):
        shutil.rmtree(left)
    return build_meta.build_wheel(*arguments, **named)


def requirements() -> list[str]:
    """What pip must install to build the core: nothing where none will be built."""
    try:
        find_nvcc()
    except NoCore as reason:
        refuse_if_required(reason)
        return []
    tools = [tool for tool in ("cmake", "ninja") if not runs(tool)]
    hopper = "90" in (os.environ.get("LORAXS_CUDA_ARCHS") or "90a")
    return ["pybind11>=2.12", *tools, *([CUTLASS] if hopper and not os.environ.get("CUTLASS_DIR") else [])]


def refuse_if_required(reason: NoCore) -> None:
    """With LORAXS_BUILD_CUDA=1 there is no package without the core, nor with a setting that cannot be met."""
    if os.environ.get("LORAXS_BUILD_CUDA") == "1":
        raise SystemExit(f"loraxs_kernels: LORAXS_BUILD_CUDA=1, but the CUDA core cannot be built: {reason}")
    if isinstance(reason, BadSetting):
        raise SystemExit(f"loraxs_kernels: {reason}")


def find_nvcc() -> str:
    """The compiler, where a core is wanted: the first of these settings that is made decides, then the usual places."""
    wanted = os.environ.get("LORAXS_BUILD_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        raise BadSetting(f"LORAXS_BUILD_CUDA: got {wanted!r}, must be auto, 1 or 0")
    if wanted == "0":
        raise NoCore(f"it was switched off (LORAXS_BUILD_CUDA=0); to build it where nvcc is: {FROM_SOURCE}")
    if sys.platform != "linux":
        raise NoCore("it is for Linux")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named := os.environ.get("CUDACXX"):
        found = shutil.which(named)
    elif home:
        found = shutil.which("nvcc", path=f"{home}/bin")
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        where = "CUDACXX" if named else "CUDA_HOME" if home else "PATH or /usr/local/cuda"
        raise NoCore(f"nvcc was not found by {where}; install the CUDA toolkit, then this package again")
    return os.path.abspath(found)


def runs(tool: str) -> bool:
    """Whether it is there and works: under build isolation a script out of another environment does not."""
    try:
        return subprocess.run([tool, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def build_core() -> None:
    """The core and its record, in BUILD, which no other process changes until this one ends.  Raises NoCore."""
    nvcc = find_nvcc()
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"  # of an environment that is not activated
    for tool in ("cmake", "ninja"):
        if not runs(tool):
            raise NoCore(f"{tool} was not found: pip install {tool}")
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdigit() or int(jobs) == 0:
        raise BadSetting(f"MAX_JOBS: got {jobs!r}, must be a number from 1 on")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    compilers = [f"{name}={os.environ.get(name)}" for name in COMPILERS]
    settings, noted = "\n".join([str(ROOT), nvcc, version, *compilers]), BUILD / "settings.txt"
    lock_build()
    if not noted.exists() or noted.read_text() != settings:  # CMake does not survive a change of these
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
        noted.write_text(settings)
    variables = {
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        "PYTHON": sys.executable,
        "LORAXS_CUDA_ARCHS": os.environ.get("LORAXS_CUDA_ARCHS"),
        "CUTLASS_DIR": os.environ.get("CUTLASS_DIR"),
        "LORAXS_TRACE": os.environ.get("LORAXS_TRACE"),
    }
    defines = [f"-D{name}={value}" if value else f"-U{name}" for name, value in variables.items()]
    run("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *defines)
    run("ninja", "-C", str(BUILD), "-j", jobs)


def lock_build() -> None:
    """Wait for other builds of this tree; the lock goes when this process ends."""
    import fcntl  # where there is no core to build there may be none

    global _lock
    BUILD.parent.mkdir(exist_ok=True)
    _lock = (BUILD.parent / "core.lock").open("w")
    fcntl.flock(_lock, fcntl.LOCK_EX)


def first_error(output: str) -> str | None:
    """What a person should read of what CMake or a compiler said."""
    for pattern in (
        r"^.*(?:unsupported GNU version|nvcc fatal).*",
        r"^CMake Error.*:\n(?P<block>(?:(?:  .*)?\n)+)",
        r"^.*\berror\b.*",
    ):
        if found := re.search(pattern, output, re.M):
            text = " ".join((found.groupdict().get("block") or found[0]).split())
            return text if len(text) < 300 else f"{text[:300]}... (all of it: pip install -v)"
    return None


def run(*command: str) -> None:
    """Run and print; raises NoCore with the first error."""
    lines = []
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(command, **output) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.replace(f"{ROOT}/", ""))
        except BaseException:
            process.terminate()  # and with it the compilers
            raise
    if process.returncode:
        reason = first_error("".join(lines)) or f"{command[0]} failed, see pip install -v"
        refused = reason.partition(":")[0] in os.environ  # so CMakeLists.txt refuses a setting
        raise (BadSetting if refused else NoCore)(reason)


class Build(build_ext):
    """`build_ext`, which makes the core, or a record of why there is none."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / "loraxs_kernels"
        name = self.get_ext_filename("_core")
        core = runpy.run_path(str(ROOT / "loraxs_kernels" / "backends" / "cuda" / "core.py"))  # and so without torch
        sources = core["sources"]()  # first: a file may change while it is compiled
        try:
            build_core()
            record = json.loads((BUILD / "_build.json").read_text()) | {"sources": sources}
        except NoCore as reason:
            if not isinstance(reason, BadSetting):
                self.forget(package)
            refuse_if_required(reason)
            print(f"loraxs_kernels: without the CUDA core: {reason}")
            record = {"built": False, "why": str(reason)}
            self.distribution.ext_modules = None  # what is left is a wheel for every platform
            self.get_finalized_command("bdist_wheel").root_is_pure = True
        package.mkdir(parents=True, exist_ok=True)
        self.forget(package)
        if record["built"]:
            shutil.copy(BUILD / name, package / name)
        noted = package / "_build.json"
        noted.with_suffix(".part").write_text(json.dumps(record) + "\n")
        noted.with_suffix(".part").replace(noted)

    def forget(self, package: Path) -> None:
        """Remove an earlier core, its record first: a core without one is none, so that neither belies the other."""
        for old in (package / "_build.json", *package.glob("_core.*")):
            old.unlink(missing_ok=True)


def readme(text: str, repository: str | None, version: str) -> str:
    """README.md for a page outside the repository, as on PyPI, where a relative link leads nowhere.

    With the address of a repository (in GitHub's form) such links and images are those of the version's tag.  Without
    one, a link becomes its words, and an image goes.  Code is left alone.
    """

    def absolute(found: re.Match) -> str:
        image, words, path = found.groups()
        if path is None:  # code
            return found[0]
        if repository is None:
            return "" if image else words
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/v{version}/{path})"

    relative = r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)"
    return re.sub(rf"^```.*?^```|`[^`\n]*`|{relative}", absolute, text, flags=re.M | re.S)


def assigned(name: str, file: str) -> str | None:
    """The string that a line of a file assigns to a name."""
    found = re.search(rf'^{name} = "(.*)"', (ROOT / file).read_text(encoding="utf-8"), re.M)
    return found and found[1]


if __name__ == "__main__":
    version = assigned("__version__", "loraxs_kernels/__init__.py")
    setup(
        version=version,
        long_description=readme(
            (ROOT / "README.md").read_text(encoding="utf-8"), assigned("Repository", "pyproject.toml"), version
        ),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("loraxs_kernels._core", [])],
        cmdclass={"build_ext": Build},
    )
