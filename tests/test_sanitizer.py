"""A small run of every kernel under NVIDIA's compute-sanitizer: that it finds nothing, or why it could not look."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from loraxs_kernels import backends

ROOT = Path(__file__).parents[1]
SECONDS = 60.0  # a checker that takes longer tells nothing
TOOLS = {
    "memcheck": ["--report-api-errors", "no"],
    "initcheck": [],
    "racecheck": [],
}
# A regular expression for the names of our kernels; the GEMM's, an instance of CUTLASS's, names a type of ours.
OURS = {"triton": "(chain|chain_indexed|shrink|mix|expand|expand_mixed)_kernel", "cuda": "loraxs"}
WITHOUT_TMA = "(shrink|finish|decode)_kernel"  # whose barriers racecheck does not follow

# Few rows and many, odd sizes and even, both directions, and no product of the library's: racecheck breaks on its
# GEMMs, and initcheck would know nothing of what they write.  Operands are copied from the host.
SCRIPT = """
import sys; sys.path.insert(0, "tests")
import torch
from helpers import Operands, backward, operands
from loraxs_kernels import backends
from loraxs_kernels.backends import triton_indexed
name, tma, device = sys.argv[1], sys.argv[2] == "tma", sys.argv[3]
backend = backends.load(name)
for T, N, K, r in ((17, 65, 129, 12), (17, 320, 640, 64), (1100, 320, 640, 64), (9000, 64, 64, 24),
                   (1024, 2304, 256, 64), (1000, 256, 2304, 64)):
    o, z = operands(T, N, K, r, torch.bfloat16), None
    table, index = o.R.expand(2, r, r).contiguous().to(device), (torch.arange(T) % 3 - 1).int().to(device)
    o = Operands(*(t.to(device) for t in (o.x, o.W, o.A, o.R, o.B, o.bias, o.gY)), o.s)
    for each in (o, backward(o)):
        if name != "cuda":
            R = table if each is o else table.mT
            triton_indexed.lowrank_linear_indexed(each.x, None, each.A, R, each.B, each.s, index)
            z = backend.lowrank_linear(each.x, None, each.A, each.R, each.B, each.s, None, None, z)[1]
        elif T <= 64:
            backend.decode(each.x, each.A, each.R, each.B, each.s)
        else:
            for split in (1, 3):
                z = backend.shrink(each.x, each.A, each.R, each.s, z, split, True)[0]
            for tile in (0, 1) if tma else ():
                ready = backend.empty(each.x, (-(-T // 128),), torch.int32)
                z, u, _ = backend.shrink(each.x, each.A, each.R, each.s, z, 1, True, 4, ready)
                rest = (tile, True, 2, 2, 128, ready)
                backend.gemm_tail(each.x, each.W, u, each.B, None, *rest)
if device == "cuda":
    torch.cuda.synchronize()
print("ran", name)
"""


def check(name: str, tool: str, device: str = "cuda", seconds: float = SECONDS) -> str | None:
    """What the checker has found, None: nothing.  Skips the test where it is missing, slow or refused."""
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    kernels = WITHOUT_TMA if (name, tool) == ("cuda", "racecheck") else OURS[name]
    command = [checker, "--tool", tool, "--error-exitcode", "99", "--kernel-regex", f"kns={kernels}", *TOOLS[tool]]
    run = subprocess.Popen(
        [*command, sys.executable, "-c", SCRIPT, name, "no" if kernels == WITHOUT_TMA else "tma", device],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # it knows an allocation's bounds from the driver
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # in this process's group: what ends that ends it, too
    try:
        said = run.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took longer than {seconds:g} s")
    finally:
        if run.poll() is None:
            for pid in [*descendants(run.pid), run.pid]:  # the checker and what it checks
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    if found := re.search(r"Internal Sanitizer Error.*", said):
        pytest.skip(f"{tool} broke: {found[0]}")
    if run.returncode == 99 or re.search(r"SUMMARY: [1-9]", said):
        return said[-3000:]
    if run.returncode or f"ran {name}" not in said or "SUMMARY" not in said:
        lines = [line for line in said.splitlines() if line.strip()] or [f"exit {run.returncode}, no word"]
        pytest.skip(f"{tool} did not run: {next((line for line in lines if 'rror' in line), lines[-1])}")
    return None


def descendants(pid: int) -> list[int]:
    """The processes that one has started, and those that they have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


@pytest.mark.gpu("compute-sanitizer", limit=SECONDS + 60)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", OURS)
def test_the_checker_finds_nothing(name, tool):
    if reason := backends.unavailable(name):
        pytest.skip(f"{name} backend: {reason}")
    if found := check(name, tool):
        pytest.fail(found)


@pytest.mark.parametrize(
    "does, outcome",
    [
        ('{run}; echo "========= ERROR SUMMARY: 0 errors"', None),
        ('{run}; echo "========= ERROR SUMMARY: 2 errors"; exit 99', "2 errors"),
        ('{run}; echo "========= RACECHECK SUMMARY: 1 hazard displayed"', "1 hazard"),
        ('echo "========= Error: Device not supported"; exit 1', "did not run: ========= Error: Device not supported"),
        ("exit 3", "did not run: exit 3, no word"),
        ('echo "========= Internal Sanitizer Error: it failed"; echo "RACECHECK SUMMARY: 1 hazard"; exit 99', "broke"),
        ("sleep 3600", "took longer than"),
        ('echo "========= ERROR SUMMARY: 0 errors"', "did not run"),
    ],
)
def test_a_checker_that_is_refused_or_slow_has_not_failed(tmp_path, monkeypatch, does, outcome):
    """With a program in its place, and the torch backend on a CPU for the kernels it would watch."""
    monkeypatch.setitem(OURS, "torch", "none")
    program = tmp_path / "compute-sanitizer"
    run = f'while [ "$1" != "{sys.executable}" ]; do shift; done; "$@"'
    program.write_text(f"#!/bin/sh\n{does.replace('{run}', run)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seconds = 1 if does.startswith("sleep") else 3600
    if outcome is None or "errors" in outcome or "hazard" in outcome:
        found = check("torch", "memcheck", "cpu", seconds)
        assert found is None if outcome is None else outcome in found
    else:
        with pytest.raises(pytest.skip.Exception, match=re.escape(outcome)):
            check("torch", "memcheck", "cpu", seconds)


def alive(pid: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_checker_ends_with_what_it_started_and_with_what_started_it(tmp_path, monkeypatch):
    program, noted = tmp_path / "compute-sanitizer", tmp_path / "pids"
    program.write_text(f"#!/bin/sh\nsleep 3600 &\necho $$ $! > {noted}\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def communicate(run, timeout):
        while not (noted.exists() and noted.read_text()):
            time.sleep(0.01)
        assert all(os.getpgid(int(pid)) == os.getpgrp() for pid in noted.read_text().split())
        raise subprocess.TimeoutExpired(run.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(pytest.skip.Exception, match="took longer than"):
        check("triton", "memcheck")
    end = time.monotonic() + 120  # they have been killed: a moment, where they have
    while (left := [pid for pid in noted.read_text().split() if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def test_every_kernel_is_watched():
    """By its name in the sources: one that the filter misses would pass unseen."""
    for folder in ("triton", "triton_indexed"):
        triton = (ROOT / "loraxs_kernels" / "backends" / folder / "kernels.py").read_text()
        kernels = re.findall(r"@triton\.jit.*\ndef ([a-z]\w+)\(", triton)
        assert kernels and all(re.fullmatch(OURS["triton"], name) for name in kernels)
    files = [path for path in (ROOT / "csrc").glob("*.cu*") if "__global__" in path.read_text()]
    kernels = {name for path in files for name in re.findall(r"__global__ .*?(\w+_kernel)\(", path.read_text())}
    assert kernels == {"shrink_kernel", "finish_kernel", "decode_kernel", "shrink_tma_kernel"}
    assert {name for name in kernels if re.search(WITHOUT_TMA, name)} == kernels - {"shrink_tma_kernel"}
    assert all("namespace loraxs {" in path.read_text() for path in files)
