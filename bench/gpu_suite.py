"""Everything a GPU machine is needed for, in one call, without a network.

    python bench/gpu_suite.py --out DIR [--budget SECONDS] [--commit NAME] [--only STEP ...]

Builds the CUDA core in place where there is one, runs the tests marked `gpu`, then the benches, the most valuable
first, until the budget is spent.  DIR/<date>-<commit>.json is a report of loraxs_kernels/bench/report.py with the rows
of all benches and the tests' results, DIR/suite.log has every line that was printed.  The report on the disk is never
older than a few seconds: stop at any moment, by Ctrl-C, kill or pulling the plug.  Copy it to bench/results/<device>/
and run bench/render.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # it must run where nothing is installed

import status  # noqa: E402
import torch  # noqa: E402

from loraxs_kernels.bench import BenchError, report, tax  # noqa: E402
from loraxs_kernels.bench.paths import PATHS  # noqa: E402
from loraxs_kernels.info import environment  # noqa: E402

GRACE = 15.0  # seconds a bench has to save and print when its time is up
EVERY = 3.0  # seconds between two looks at what a running bench has written
TAIL = 25  # lines of the log that are shown when a command broke
LEAST = 20.0  # seconds under which nothing more is started
WIDE_T = ["1", "16", "64", "256", "1024", "2048", "32768"]
WIDE_R = ["4", "8", "12", "20", "25", "32", "128", "256"]
RIVALS = ["reference", "addmm"]
WAY = ["--tokens", "512", "8192", "--rank", "64", "--mode", "graph", "--paths", *RIVALS]
ONE = ["--shape", "4096x4096"]  # compiling takes far longer than timing
SVDS = [
    "loraxs-svd",
    "loraxs-precise",
    "loraxs-krylov",
    "loraxs-subspace",
    "svd-lowrank-4",
    "svd-lowrank-r",
    "svd-full",
]
# (name, seconds it may take at most, arguments of `loraxs bench`); the headline first.
# All of it takes more than ten minutes: with less, call twice, each time with some steps (--only).
BENCHES: list[tuple[str, float, list[str]]] = [
    ("tax", 140, ["layer", "--tokens", "512", "8192", "--rank", "16", "64"]),
    ("chain", 100, ["chain", "--tokens", "16", "512", "8192", "--rank", "16", "64", "--mode", "graph"]),
    ("gemm", 90, ["gemm", "--tokens", "512", "8192", "--rank", "16", "64", "--mode", "graph", "--paths", "addmm"]),
    ("group", 45, ["group", "--tokens", "512", "8192", "--rank", "16", "64"]),
    ("host", 60, ["host"]),
    ("svd", 150, ["svd", "--rank", "64", "--paths", "loraxs-svd", "loraxs-eigh-gpu", "sklearn", "svd-lowrank"]),
    ("decode", 90, ["layer", "--tokens", "1", "16", "64", "--rank", "16", "--direction", "forward"]),
    ("step", 300, ["model", "--rank", "64", "--paths", "reference-fp32", "reference", "peft-lora", "compile"]),
    ("tokens", 120, ["layer", "--tokens", *WIDE_T, "--rank", "64", "--mode", "graph", "--paths", *RIVALS]),
    ("ranks", 120, ["layer", "--tokens", "8192", "--rank", *WIDE_R, "--mode", "graph", "--paths", *RIVALS]),
    ("forward", 60, ["layer", *WAY, "--direction", "forward"]),
    ("backward", 60, ["layer", *WAY, "--direction", "backward"]),
    ("gemm-fp16", 45, ["gemm", "--dtype", "fp16", "--tokens", "8192", "--rank", "64", "--paths", "addmm"]),
    ("svd-ranks", 200, ["svd", "--rank", "4", "16", "256", "--paths", "loraxs-svd", "svd-lowrank"]),
    ("svd-paths", 120, ["svd", *ONE, "--rank", "64", "256", "--paths", *SVDS]),
    ("compile", 90, ["layer", "--tokens", "8192", "--rank", "64", "--paths", "reference", "compile"]),
    ("compile-max", 120, ["layer", *ONE, "--tokens", "8192", "--rank", "64", "--paths", "reference", "compile-max"]),
]
OURS = ["torch", "triton", "cuda"]


class Suite:
    """The report in the making, what was printed, and how much time is left."""

    def __init__(self, out: Path, budget: float, commit: str | None, device: str) -> None:
        self.started, self.device, self.cut = time.monotonic(), device, False
        self.end = self.started + budget
        found = report.source()
        self.data: dict[str, Any] = {
            **{"format": report.FORMAT, "version": report.VERSION},
            **environment(device),
            **{"commit": commit or found[0], "dirty": None if commit else found[1]},
            **{"settings": {"suite": [], "left_out": {}}, "ceilings": None, "complete": False, "seconds": 0.0},
            **{"build": {}, "tests": {}, "rows": []},
        }
        self.path = report.free(out / f"{self.data['date'][:10]}-{self.data['commit']}.json")
        self.log = (out / "suite.log").open("a")
        self.save()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.started, 1)
        report.save(self.data, self.path)

    def run(self, name: str, command: list[str], seconds: float, watch: Path | None = None) -> int:
        """Run one command, its output into the log; when its time is up it is asked to stop, then made to."""
        seconds = min(seconds, self.left - GRACE)
        began, rows = time.monotonic(), list(self.data["rows"])
        self.say(f"[{began - self.started:4.0f} s] {name}: {' '.join(command[1:])} (at most {seconds:.0f} s)")
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None and time.monotonic() - began < seconds:
                try:
                    process.wait(min(EVERY, max(0.1, seconds - (time.monotonic() - began))))
                except subprocess.TimeoutExpired:
                    self.take(name, watch, rows)
        finally:
            if process.poll() is None:
                self.cut = True
                self.say(f"  {name}: its time is up")
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            self.take(name, watch, rows)
        self.say(f"  {name}: exit {process.returncode} after {time.monotonic() - began:.0f} s")
        if process.returncode not in (0, 1):  # 1: something failed, and says so in the report
            self.cut = True
            print("\n".join(self.path.with_name("suite.log").read_text().splitlines()[-TAIL:]), flush=True)
        return process.returncode

    def take(self, name: str, part: Path | None, rows: list[dict]) -> None:
        """The rows before this bench and those it has written until now."""
        if part is None or not part.exists():
            return
        found = report.load(part)
        self.data["rows"] = rows + [{"run": name, **row} for row in found["rows"]]
        self.data["ceilings"] = self.data["ceilings"] or found["ceilings"]
        self.data["settings"]["left_out"] |= found["settings"]["left_out"]
        self.save()

    def build(self) -> None:
        """The CUDA core in place: setup.py's record of what came of it, and how long it took."""
        noted, whole = ROOT / "loraxs_kernels" / "_build.json", not (ROOT / "build" / "core").exists()
        began = time.monotonic()
        code = self.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 300)
        seconds = round(time.monotonic() - began, 1)
        found = {"built": False, "why": f"setup.py ended with {code} and left no record, see suite.log"}
        if code == 0 and noted.exists():  # else it is an earlier build's
            found = json.loads(noted.read_text())
        machine = {"cores": len(os.sched_getaffinity(0)), "MAX_JOBS": os.environ.get("MAX_JOBS")}
        self.data["build"] = found | {"seconds": seconds, "whole": whole} | machine
        importlib.invalidate_caches()  # the core is asked for below, in this process too
        self.save()

    def tests(self, folder: Path) -> None:
        """pytest -m gpu; results by component, which tests/conftest.py writes beside each."""
        results = folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "-p", "no:cacheprovider"]
        code = self.run("tests", [*command, f"--junitxml={results}", "tests"], 400)
        self.data["tests"] = by_component(results) if results.exists() else {}
        if code not in (0, 1):  # stopped or crashed: what passed until then proves nothing
            for component in status.COMPONENTS:
                if status.sources(component):
                    found = self.data["tests"].setdefault(component, outcome(component))
                    found["failed"] += 1
                    found["why"] = f"pytest ended with {code} before its end"
        self.save()

    def bench(self, folder: Path, name: str, seconds: float, arguments: list[str]) -> None:
        part = folder / f"{name}.json"
        if "--paths" in arguments:
            arguments = [*arguments, *(path for path in OURS if PATHS[path].missing() is None)]
        self.data["settings"]["suite"].append(arguments)
        command = [sys.executable, "-m", "loraxs_kernels", "bench", *arguments, "--out", str(part)]
        self.run(name, [*command, "--device", self.device, "--commit", self.data["commit"]], seconds, part)


def outcome(component: str) -> dict[str, Any]:
    return {"sources": status.sources(component), "passed": 0, "failed": 0, "skipped": 0}


def by_component(results: Path) -> dict[str, dict[str, Any]]:
    """{component: sources, passed, failed, skipped} from pytest's XML; those with nothing but skips are left out."""
    found: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        for name in (p.get("value") for p in case.iter("property") if p.get("name") == "component"):
            bad = case.find("failure") is not None or case.find("error") is not None
            what = "skipped" if case.find("skipped") is not None else "failed" if bad else "passed"
            found.setdefault(name, outcome(name))[what] += 1
    return {name: each for name, each in found.items() if each["passed"] or each["failed"]}


def summary(data: dict[str, Any]) -> str:
    """A few lines: what passed, and the figures that goals are set for."""
    counts = ("passed", "failed", "skipped")
    lines = [f"{name}: {', '.join(f'{each[c]} {c}' for c in counts)}" for name, each in data["tests"].items()]
    lines = ["gpu tests: " + ("; ".join(lines) or "none ran")]
    if build := data.get("build"):
        lines.append(f"build: {build.get('why') or build['architectures']}, {build['seconds']:.0f} s")
    for question, direction in (("layer", ("both",)), ("gemm", ("forward", "backward"))):
        for at, paths in tax.points(data["rows"], question).items():
            if at.T in (512, 8192) and at.r in (16, 64) and at.direction in direction:
                found = {path: tax.measured(paths, path) for path in paths if path != "frozen"}
                cells = ", ".join(f"{path} {100 * t.median:.1f}{'~' * t.noisy}" for path, t in found.items() if t)
                what = "tax %" if question == "layer" else f"u B^T, % added {at.direction}"
                lines.append(f"{at.run}: {what} T {at.T} r {at.r} {at.dtype} {at.mode}: {cells}")
    for row in data["rows"]:
        if row["status"] != "ok" or "seconds" not in row:
            continue
        if row["question"] == "host" and row["r"] == 16:
            cost = f"{1e6 * row['seconds']['median']:.0f} us, kernels {row.get('kernels')}"
            lines.append(f"host r 16 {row['path']}: {cost}")
        if row["question"] == "model":
            speed = f"{row['T'] / row['seconds']['median']:,.0f} tokens/s, {row['peak_bytes'] / 2**30:.1f} GiB"
            lines.append(f"step {row['path']} r {row['r']} checkpointing {row['checkpointing']}: {speed}")
        if "matrices" in row:
            size = f"{row['matrices']} matrices r {row['r']} {row['path']}"
            lines.append(f"svd {size}: {row['seconds']['median']:.2f} s, {row['peak_bytes'] / 2**30:.2f} GiB")
    failed = [row for row in data["rows"] if row["status"] == "failed"]
    lines += [f"failed: {row['question']} {row['path']}: {row['reason']}" for row in failed[:10]]
    counts = f"{len(data['rows'])} rows, {len(failed)} failed"
    lines.append(f"{counts}; {data['seconds']:.0f} s; complete: {data['complete']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    steps = ["build", "tests", *(name for name, _, _ in BENCHES)]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and the log")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default 540)")
    parser.add_argument("--commit", help="what to note as the source, where it is not a git checkout")
    parser.add_argument("--only", nargs="+", choices=steps, default=steps, metavar="STEP", help=", ".join(steps))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("gpu_suite: no GPU here; on a CPU use `loraxs bench`", file=sys.stderr)
        return 1
    if importlib.util.find_spec("pytest") is None and "tests" in arguments.only:
        print("gpu_suite: the tests need pytest: pip install pytest", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        suite = Suite(arguments.out, arguments.budget, arguments.commit, arguments.device)
    except BenchError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            for step in arguments.only:
                if suite.left < LEAST + GRACE:
                    suite.say(f"{step}: not started, the budget is spent")
                    suite.cut = True
                elif step == "build":
                    suite.build()
                elif step == "tests":
                    suite.tests(Path(folder))
                else:
                    suite.bench(Path(folder), *next(each for each in BENCHES if each[0] == step))
        suite.data["complete"] = not suite.cut
    except KeyboardInterrupt:
        suite.say("stopped")
    suite.save()
    suite.say(f"\n{summary(suite.data)}\n{suite.path}")
    return 1 if suite.cut or any(each["failed"] for each in suite.data["tests"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
