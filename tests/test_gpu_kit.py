"""bench/gpu_kit.py: a kit is made whole or not at all, and used where it fits or not at all.  Nothing is compiled."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_kit  # noqa: E402

from loraxs_kernels.backends.cuda import core  # noqa: E402

CORE = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
SETUP = f"""
import runpy, sys
from pathlib import Path

core = runpy.run_path("loraxs_kernels/backends/cuda/core.py")

def requirements():
    return ["pip"]

if __name__ == "__main__":
    record = '{{"built": true, "sources": "%s"}}' % core["sources"]()
    exec(Path("build/meanwhile.py").read_text())
    folder = Path(sys.argv[sys.argv.index("--build-lib") + 1]) / "loraxs_kernels"
    folder.mkdir()
    (folder / "{CORE}").write_text("no library")
    (folder / "_build.json").write_text(record)
"""


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A source tree whose build takes no time, with this environment for that of the kit."""
    for name in ("csrc", "loraxs_kernels/backends/cuda"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (tmp_path / "setup.py").write_text(SETUP)
    monkeypatch.setattr(gpu_kit, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_kit, "KIT", tmp_path / "gpu-kit")
    monkeypatch.setenv("KIT_PYTHON", sys.executable)
    python = tmp_path / "build" / f"kit-{gpu_kit.version_of(sys.executable)}" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    meanwhile(tmp_path, "")
    return tmp_path


def meanwhile(tree: Path, what: str) -> None:
    (tree / "build" / "meanwhile.py").write_text(what)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_kit_is_made_whole_or_the_earlier_one_stays(tree, capsys, monkeypatch):
    assert gpu_kit.main(["make"]) == 0
    assert "    python bench/gpu_suite.py --kit gpu-kit --commit unknown" in capsys.readouterr().out
    kit = contents(tree / "gpu-kit")
    assert {*kit} == {CORE, "_build.json", "kit.json"}
    assert json.loads(kit["kit.json"])["python"] == sys.version.split()[0]

    meanwhile(tree, "sys.exit('no nvcc')")
    assert gpu_kit.main(["make"]) == 1
    assert capsys.readouterr().err.endswith(" ended with 1; there is no new kit\n")
    meanwhile(tree, "Path('csrc/decode.cu').write_text('edited')")
    assert gpu_kit.main(["make"]) == 1
    assert "another csrc/ or CMakeLists.txt than here: make gpu-kit" in capsys.readouterr().err
    monkeypatch.setenv("KIT_PYTHON", "python1.5")
    assert gpu_kit.main(["make"]) == 1
    assert "KIT_PYTHON: got 'python1.5', which does not run here, must be" in capsys.readouterr().err
    monkeypatch.setenv("KIT_PYTHON", sys.executable)
    monkeypatch.setenv("KIT_TRITON", str(tree / "setup.py"))
    assert gpu_kit.main(["make"]) == 1
    assert f"KIT_TRITON: got {tree / 'setup.py'}, must be a triton.tar.gz that" in capsys.readouterr().err
    assert contents(tree / "gpu-kit") == kit


def test_a_kit_that_does_not_fit_is_refused_and_nothing_overwritten(tree):
    gpu_kit.make()
    package, kit = tree / "loraxs_kernels", tree / "gpu-kit"
    (package / "_core.so").write_text("of yesterday")
    (package / "_build.json").write_text("{}")
    before = contents(package)

    def refused(reason: str) -> None:
        with pytest.raises(gpu_kit.KitError, match=f"^kit: .*{reason}"):
            gpu_kit.use(kit)
        assert contents(package) == before

    refused(f"the core of {kit} does not load here: ImportError: ")
    (kit / CORE).rename(kit / "_core.cpython-35m.so")
    refused(f"is for Python 3.*, must hold {CORE} for this one: make gpu-kit KIT_PYTHON=python3")
    (tree / "CMakeLists.txt").write_text("edited")
    refused("is of another csrc/ or CMakeLists.txt than here: make gpu-kit")
    (kit / "_build.json").write_text("{}")
    refused(f"got {kit}, must be a folder that `make gpu-kit` made")


def test_a_kit_that_fits_takes_the_place_of_what_is_there(tree):
    if reason := core.missing():
        pytest.skip(reason)
    made, package = gpu_kit.make(), tree / "loraxs_kernels"
    shutil.copy(core.load().__file__, tree / "gpu-kit" / CORE)
    (package / "_core.abi3.so").write_text("of yesterday")
    assert gpu_kit.use(tree / "gpu-kit") == made
    assert {*contents(package)} == {CORE, "_build.json"}
    assert json.loads((package / "_build.json").read_text())["built"]


def test_what_triton_compiled_on_one_machine_is_not_compiled_on_the_next(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    from triton.compiler import ASTSource

    from loraxs_kernels.backends.triton import aot, kernels
    from loraxs_kernels.backends.triton.config import Config

    def compiled() -> list[aot.Compiled]:
        kernels.chain_kernel.device_caches.clear()
        return aot.compile_problem(aot.Problem(16, 64, 64, 16), (9, 0), Config(16, 32, 32, 4, 2))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "one"))
    assert gpu_kit.main(["keep", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("one is not there, Triton has compiled nothing\n")
    expected = compiled()
    assert gpu_kit.main(["keep", str(tmp_path / "out")]) == 0
    shutil.rmtree(tmp_path / "one")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    gpu_kit.unpack(tmp_path / "out" / "triton.tar.gz")
    monkeypatch.setattr(ASTSource, "make_ir", None)  # what compiling begins with
    assert compiled() == expected
