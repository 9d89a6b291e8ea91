"""The build, with nvcc and without; and what is in the CUDA core of this checkout, which no GPU is needed to read."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from loraxs_kernels.backends.cuda import core

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
SETTINGS = ("LORAXS_BUILD_CUDA", "LORAXS_CUDA_ARCHS", "CUTLASS_DIR", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")
NO_NVCC = {"CUDA_HOME": "/nowhere"}
BACKEND = "import setup; setup.get_requires_for_build_wheel()"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup, release = load("setup"), load("release")
try:
    NVCC = setup.find_nvcc()
except setup.NoCore:
    NVCC = None
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_tools = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")


def run(*command: str | Path, cwd: Path, **settings: str) -> subprocess.CompletedProcess:
    """Run with these settings of the build and no others."""
    kept = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "PYTHONPATH")}
    if NVCC and not {"CUDACXX", "CUDA_HOME", "CUDA_PATH"} & {*settings}:
        kept["CUDACXX"] = NVCC
    return subprocess.run(list(map(str, command)), cwd=cwd, env=kept | settings, capture_output=True, text=True)


def passed(process: subprocess.CompletedProcess) -> str:
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A source distribution of this checkout, made where a core has been built."""
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "gpu-kit", "_core.*")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in ("loraxs_kernels/_core.so", "loraxs_kernels/_build.json", "build/core/_core.so", "tests/.cache/a.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("{}")
    passed(run(PYTHON, "-c", "import setup; setup.build_sdist('dist')", cwd=tree))
    return next((tree / "dist").glob("*.tar.gz"))


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    with tarfile.open(sdist) as archive:
        members = [each for each in archive if "/bench/results/" not in each.name]  # megabytes that no build reads
        archive.extractall(tmp_path, members, filter="data")
    return next(tmp_path.glob("loraxs_kernels-*"))


def installed(wheel: Path, folder: Path) -> str:
    """What lx.info() says of the core in a wheel."""
    zipfile.ZipFile(wheel).extractall(folder)
    script = "import loraxs_kernels as lx; print(lx.__file__, lx.info()['cuda core'], sep='\\n')"
    file, said = passed(run(PYTHON, "-c", script, cwd=folder, PYTHONPATH=str(folder))).splitlines()
    assert Path(file).is_relative_to(folder)
    return said


def noted(tree: Path) -> str:
    """Why the core of a source tree cannot be used, or nothing."""
    script = "import runpy; print(runpy.run_path('loraxs_kernels/backends/cuda/core.py')['missing']() or '')"
    return passed(run(PYTHON, "-c", script, cwd=tree, PYTHONPATH=str(tree))).strip()


def test_an_sdist_is_the_repository(sdist):
    """All of it but what release.LEFT_OUT names, with its reason; and nothing that was built."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of the files")
    listed = passed(run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)).splitlines()
    files = {name for name in listed if (ROOT / name).exists()}
    release.check_sdist(sdist, files)
    with pytest.raises(
        release.ReleaseError, match=r"^MANIFEST.in: left out \['docs/new.md'\], must hold them; took in \["
    ):
        release.check_sdist(sdist, files - {"csrc/core.cpp"} | {"docs/new.md"})


def test_the_page_on_PyPI_leads_nowhere_that_is_not_there(sdist):
    """Of an sdist and its wheels, as twine sends it: README.md with no link that is relative."""
    with tarfile.open(sdist) as archive:
        page = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page, flags=re.M | re.S)
    assert "# loraxs_kernels\n" in text
    targets = re.findall(r"""\]\(([^)\s]+)|(?:src|href)=["']?([^"'\s>]+)""", text)
    assert targets and [each for each in map("".join, targets) if not each.startswith(("https://", "#"))] == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"LORAXS_BUILD_CUDA": "0"},
            f"it was switched off (LORAXS_BUILD_CUDA=0); to build it where nvcc is: {setup.FROM_SOURCE}",
        ),
        (NO_NVCC, "nvcc was not found by CUDA_HOME; install the CUDA toolkit, then this package again"),
    ],
    ids=["switched-off", "no-nvcc"],
)
def test_without_a_core_the_wheel_is_pure_and_says_why(settings, why, source, tmp_path):
    assert "[]" in passed(run(PYTHON, "-c", BACKEND.replace("setup.g", "print(setup.g") + ")", cwd=source, **settings))
    # Of an earlier version: the package would be imported in place of the module recipe.py.
    left = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/loraxs_kernels/recipe"
    left.mkdir(parents=True)
    (left / "__init__.py").touch()
    passed(run(PYTHON, "-c", "import setup; setup.build_wheel('dist')", cwd=source, **settings))
    wheel = next((source / "dist").iterdir())
    assert wheel.name.endswith("-py3-none-any.whl")
    assert installed(wheel, tmp_path / "site") == f"not built: {why}"
    assert not [*(tmp_path / "site").rglob("_core*"), *(tmp_path / "site").rglob("recipe/")]


REFUSED = {
    "required": (
        {"LORAXS_BUILD_CUDA": "1"} | NO_NVCC,
        "LORAXS_BUILD_CUDA=1, but .*: nvcc was not found by CUDA_HOME; .*",
    ),
    "unknown": ({"LORAXS_BUILD_CUDA": "yes"}, "LORAXS_BUILD_CUDA: got 'yes', must be auto, 1 or 0"),
}
REFUSED_BY_CMAKE = {
    "old GPU": (
        {"LORAXS_CUDA_ARCHS": "75"},
        r"LORAXS_CUDA_ARCHS: got 75, must be 90a \(Hopper\) or .* that nvcc .* knows",
    ),
    "no GPU": ({"LORAXS_CUDA_ARCHS": "80,hopper"}, "LORAXS_CUDA_ARCHS: got hopper, must be .*"),
    "no CUTLASS": ({"CUTLASS_DIR": "/nowhere"}, "CUTLASS_DIR: got /nowhere, must be a checkout of CUTLASS .*"),
    "no jobs": ({"MAX_JOBS": "0"}, "MAX_JOBS: got '0', must be a number from 1 on"),
}


def test_an_old_setuptools_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").touch()
    (tmp_path / "setuptools-65.5.0.dist-info").mkdir()
    (tmp_path / "setuptools-65.5.0.dist-info" / "METADATA").write_text("Name: setuptools\nVersion: 65.5.0\n")
    refused = run(PYTHON, "-c", "import setup", cwd=ROOT, PYTHONPATH=str(tmp_path))
    message = "loraxs_kernels: setuptools: got 65.5.0, must be 77 or later: pip install -U setuptools\n"
    assert (refused.returncode, refused.stderr) == (1, message)
    for name, version in (("setuptools-70.0.0", ""), ("setuptools-80.0.0", "Name: setuptools\nVersion: 80.0.0\n")):
        (tmp_path / f"{name}.dist-info").mkdir()  # what updates leave behind
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(version)
    assert (
        "cannot import name 'Extension'" in run(PYTHON, "-c", "import setup", cwd=ROOT, PYTHONPATH=str(tmp_path)).stderr
    )


def test_builds_where_text_is_ascii():
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    version = setup.assigned("__version__", "loraxs_kernels/__init__.py")
    assert passed(run(PYTHON, "setup.py", "--version", cwd=ROOT, **ascii_only)).endswith(f"{version}\n")


def test_builds_where_every_package_has_the_version_of_the_checkout(source):
    """As in pip 24.3 to 26.2, whose finder for a backend in the source tree answers every name with what lies there."""
    (source / "loraxs_kernels.egg-info").mkdir(exist_ok=True)
    (source / "loraxs_kernels.egg-info" / "PKG-INFO").write_text("Name: loraxs_kernels\nVersion: 0.1.0\n")
    finder = """
import importlib.metadata as metadata, sys
class Finder:
    def find_spec(self, *args): return None
    def find_distributions(self, context):
        return metadata.MetadataPathFinder.find_distributions(metadata.DistributionFinder.Context(path=["."]))
sys.meta_path.insert(0, Finder())
"""
    assert passed(run(PYTHON, "-c", f"{finder}print(metadata.version('setuptools'))", cwd=source)) == "0.1.0\n"
    passed(run(PYTHON, "-c", finder + BACKEND, cwd=source, LORAXS_BUILD_CUDA="0"))


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("way", [("-c", BACKEND), ("setup.py", "build_ext", "--inplace")], ids=["pip", "setup.py"])
def test_what_cannot_be_is_refused_in_one_sentence(way, settings, message, source):
    refused = run(PYTHON, *way, cwd=source, **settings)
    assert refused.returncode == 1 and re.fullmatch(f"loraxs_kernels: {message}\n", refused.stderr), refused.stderr
    assert not (source / "loraxs_kernels" / "_build.json").exists()


@needs_nvcc
@needs_tools
@pytest.mark.parametrize(("settings", "message"), REFUSED_BY_CMAKE.values(), ids=REFUSED_BY_CMAKE)
def test_settings_that_cannot_be_met_are_refused(settings, message, source):
    test_what_cannot_be_is_refused_in_one_sentence(("setup.py", "build_ext", "--inplace"), settings, message, source)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "CMake Error at a.cmake:1 (message):\n  The compiler\n\n    /x/c++\n\n  is broken.\n\n-- no\n",
            "The compiler /x/c++ is broken.",
        ),
        (
            "CMake Error at b:\n  no\nhost_config.h:164: error: #error -- unsupported GNU version! gcc later\n",
            "host_config.h:164: error: #error -- unsupported GNU version! gcc later",
        ),
        (
            "[1/2] Building\nnvcc fatal   : Unsupported gpu architecture 'compute_90a'\nninja: stopped\n",
            "nvcc fatal : Unsupported gpu architecture 'compute_90a'",
        ),
        (
            "FAILED: x.o\ncsrc/a.cu(3): error: expected a ;\ncsrc/a.cu(9): error: more\n",
            "csrc/a.cu(3): error: expected a ;",
        ),
        ("Killed\n", None),
    ],
    ids=["CMake", "host compiler", "nvcc", "source", "nothing"],
)
def test_what_a_person_reads_of_a_failed_build(output, said):
    assert setup.first_error(output) == said


@needs_nvcc
@needs_tools
def test_in_place_only_what_changed_is_compiled_and_a_broken_build_leaves_no_core(source):
    """With sources that compile in a second: the real ones were compiled where these tests' environment was made."""
    package, csrc = source / "loraxs_kernels", source / "csrc"
    small, broken = csrc / "core.cpp", csrc / "decode.cu"
    command = (PYTHON, "setup.py", "build_ext", "--inplace")
    archs = {"LORAXS_CUDA_ARCHS": "80"}
    module = 'static PyModuleDef module{PyModuleDef_HEAD_INIT, "_core"};'
    module += "PyMODINIT_FUNC PyInit__core() { return PyModule_Create(&module); }"
    (csrc / "bindings.cpp").write_text(f"#include <Python.h>\n{module}\n")
    for name in ("core.cpp", "decode.cu", "shrink.cu"):
        (csrc / name).write_text(f"int {name.partition('.')[0]};\n")

    def compiled() -> list[str]:
        return re.findall(r"Building \w+ object .*/csrc/(\S+)\.o", passed(run(*command, cwd=source, **archs)))

    assert sorted(compiled()) == ["bindings.cpp", "core.cpp", "decode.cu", "shrink.cu"]
    assert json.loads((package / "_build.json").read_text())["architectures"] == ["80"]
    assert compiled() == []
    assert noted(source) == ""
    small.write_text(small.read_text() + "// changed\n")
    assert noted(source).startswith("the CUDA core was built for another version")
    assert compiled() == ["core.cpp"] and len(list(package.glob("_core.*"))) == 1
    assert noted(source) == ""
    broken.write_text("broken;\n" + broken.read_text())
    required = run(*command, cwd=source, LORAXS_BUILD_CUDA="1", **archs)
    sentence = (
        r"loraxs_kernels: LORAXS_BUILD_CUDA=1, but the CUDA core cannot be built: csrc/decode\.cu\(\d+\): error: .*\n"
    )
    assert required.returncode == 1 and re.fullmatch(sentence, required.stderr), required.stderr
    passed(run(*command, cwd=source, **archs))
    record = json.loads((package / "_build.json").read_text())
    assert not record["built"] and record["why"].startswith("csrc/decode.cu(")
    assert not list(package.glob("_core.*"))
    passed(run(PYTHON, "-c", "import setup; setup.build_wheel('dist')", cwd=source, **archs))
    assert next((source / "dist").iterdir()).name.endswith("-py3-none-any.whl")


BUILT = {"built": True, "architectures": ["90a"], "nvcc": "13.0", "cutlass": None, "sources": None}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            BUILT | {"sources": "of yesterday"},
            "built for another version of this source tree: python setup.py build_ext --inplace",
        ),
        (None, "not built: this source tree was never installed; pip install -e . where nvcc is"),
        ({"built": False, "why": "no time"}, "not built: no time"),
        (BUILT, "built but does not load: no libc; install loraxs_kernels again"),
    ],
    ids=["older", "no record", "not built", "does not load"],
)
def test_a_core_that_is_missing_says_why(record, said, tmp_path, monkeypatch):
    def load():
        raise ImportError("no libc")

    monkeypatch.setattr(core, "RECORD", tmp_path / "loraxs_kernels" / "_build.json")
    core.RECORD.parent.mkdir()
    if record and record.get("sources"):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "bindings.cpp").write_text("of today")
        (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(core, "load", load)
    if record:
        core.RECORD.write_text(json.dumps(record))
    monkeypatch.setattr(core, "missing", core.missing.__wrapped__)
    assert (
        core.state() == said
        and core.missing() == f"the CUDA core was {said}"
        and core.architectures.__wrapped__() == ()
    )


def test_a_core_is_known_by_all_that_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "RECORD", tmp_path / "loraxs_kernels" / "_build.json")
    assert core.sources() is None  # an installed package
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    csrc = tmp_path / "csrc"
    found = [core.sources()]
    for leftover in ("decode.cu~", ".decode.cu.swp", "notes.txt"):
        (csrc / leftover).write_text("of an editor")
    assert core.sources() == found[0]
    for file in [tmp_path / "CMakeLists.txt", *(csrc / each.name for each in (ROOT / "csrc").iterdir())]:
        file.write_text(file.read_text() + "\n")
        found.append(core.sources())
    (csrc / "decode.cu").rename(csrc / "another.cu")
    found.append(core.sources())
    assert len({*found}) == len(found) == 3 + len(list((ROOT / "csrc").iterdir()))


# --- The core of this checkout: whichever one the tests import.


@pytest.fixture(scope="module")
def built() -> Path:
    reason = core.missing()
    if reason is None:
        return Path(core.load().__file__)
    if NVCC and os.environ.get("LORAXS_BUILD_CUDA") != "0":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def cuobjdump(built):
    """What cuobjdump says of the core; it needs nvdisasm beside it, as Triton brings both."""
    triton = importlib.util.find_spec("triton")
    here = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    path = os.pathsep.join([str(here), os.environ["PATH"]])
    if shutil.which("cuobjdump", path=path) is None:
        pytest.skip("needs cuobjdump, which Triton and the CUDA toolkit have")

    @functools.cache  # one call disassembles the whole core, which takes some 10 seconds
    def said(option: str) -> str:
        return passed(run(shutil.which("cuobjdump", path=path), option, built, cwd=ROOT, PATH=path))

    return said


def test_no_kernel_spills_registers_or_uses_local_memory(cuobjdump):
    used = re.findall(r"Function (\S+):\n\s*REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert used
    assert [name for name, stack, local in used if (stack, local) != ("0", "0")] == []
    assert re.findall(r"^.*\b(?:LDL|STL)\b.*$", cuobjdump("-sass"), re.M) == []


def test_every_gemm_multiplies_with_wgmma(cuobjdump):
    if "90a" not in core.architectures():
        pytest.skip(f"the core was built for {core.architectures()}")
    tiles = re.findall(r"^ +tile\(\d+", (ROOT / "csrc" / "gemm_tail_tiles.h").read_text(), re.M)
    functions = re.split(r"^\s*Function : ", cuobjdump("-sass"), flags=re.M)[1:]
    gemms = [text for text in functions if "TailMainloop" in text.partition("\n")[0]]
    assert len(gemms) == 4 * len(tiles)
    assert all("HGMMA" in text for text in gemms)


def loops(function: str) -> list[list[str]]:
    """The instructions of each loop of a function, from where a branch goes back to up to that branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", function, re.M)]
    back = [(int(to, 16), at) for at, text in code for to in re.findall(r"\bBRA\b.* (0x[0-9a-f]+)", text)]
    return [[text for at, text in code if first <= at <= last] for first, last in back if first < last]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_shrink_issues_few_instructions_for_what_it_reads(cuobjdump, transposed):
    """At r = 64, for 64 rows of 32 columns of x (4 KB), 64 of them products."""
    kernel = re.compile(rf"shrink_kernelI\w*bf16ELi64ELb{int(transposed)}E")
    functions = re.split(r"^\s*Function : ", cuobjdump("-sass"), flags=re.M)[1:]
    found = [text for text in functions if kernel.search(text.partition("\n")[0])]
    assert len(found) == len(core.architectures())
    for text in found:
        both = [loop for loop in loops(text) if "LDGSTS" in "".join(loop) and "HMMA" in "".join(loop)]
        loop = min(both, key=len)
        products, copies = (sum(name in each for each in loop) for name in ("HMMA", "LDGSTS"))
        assert (products, copies) == (64, 16)
        assert len(loop) <= 300


def test_the_core_needs_no_cuda_library_and_exports_its_interface_alone(built):
    if not (shutil.which("readelf") and shutil.which("nm")):
        pytest.skip("needs readelf and nm")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", passed(run("readelf", "--dynamic", built, cwd=ROOT)))
    assert needed and not [name for name in needed if "cuda" in name or "cudart" in name]
    exported = passed(run("nm", "--dynamic", "--defined-only", "--format=just-symbols", built, cwd=ROOT)).split()
    interface = re.findall(r"^LORAXS_API .*?(\w+)\(", (ROOT / "csrc" / "loraxs.h").read_text(), re.M)
    assert sorted(exported) == sorted(["PyInit__core", *interface])
