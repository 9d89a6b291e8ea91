"""Everything a GPU machine is needed for, in one call, without a network.

    python bench/gpu_suite.py --out DIR [--only STEP ...] [--kit gpu-kit] [--commit NAME] [--after REPORT ...]
                              [--budget SECONDS]

The most valuable steps come first, until the budget is spent: tests/test_first_light.py (the step "ladder"), the other
tests marked `gpu` (all but those under NVIDIA's checker, a step of their own and the last), and the benches.  With
--only the steps that are named share the budget.  The benches leave out a backend of which a test hung or crashed;
wrong results they find out before they time them.  With --after, components that passed in an earlier report, and whose
files are the same, are not tested again.  The CUDA core must have been built: by `make gpu-kit`, whose folder --kit
names, or here by `python setup.py build_ext --inplace`.

DIR/<date>-<commit>.json is a report of loraxs_kernels/bench/report.py with the rows of all benches and what became of
the tests; DIR/suite.log has every line that was printed, and the tables of the benches; DIR/<date>-<commit>/ what each
step wrote.  The report on the disk is never older than a few seconds: stop at any moment, by Ctrl-C, kill or pulling
the plug.  Copy it to bench/results/<device>/ and run bench/render.py.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # it must run where nothing is installed

import gpu_kit  # noqa: E402
import outcomes  # noqa: E402
import status  # noqa: E402
import torch  # noqa: E402

from loraxs_kernels.backends import NAMES as OURS  # noqa: E402
from loraxs_kernels.backends.cuda import core  # noqa: E402
from loraxs_kernels.bench import BenchError, report  # noqa: E402
from loraxs_kernels.bench.paths import PATHS  # noqa: E402
from loraxs_kernels.bench.questions import QUESTIONS  # noqa: E402

GRACE = 15.0  # seconds a bench has to save and print when its time is up
EVERY = 3.0  # seconds between two looks at what a running step has written
TAIL = 25  # lines of a command's output that are shown when it broke
LEAST = 20.0  # seconds under which nothing more is started
SHOWN, WIDTH = 40, 200  # tests that did not pass whose lines are shown; characters of such a line
WORKERS, RESTARTS = 8, 100  # processes that run tests, at most; that may end, more than outcomes.TRIES allow
TESTS = ROOT / "tests"
PYTEST = ["-m", "pytest", "-c", "pyproject.toml", "-m", "gpu", "-q", "--tb=short", "-p", "recorder"]
PYTEST += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=0", "--dist", "worksteal"]
PYTEST += ["--continue-on-collection-errors"]  # the others run, and the recorder tells of it
LIBC = ctypes.CDLL(None)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WIDE_T = ["1", "16", "64", "256", "1024", "2048", "32768"]
WIDE_R = ["4", "8", "12", "20", "25", "32", "128", "256"]
BUCKETS = ["8192", "4096", "1024", "2048", "256", "16384", "512", "64", "16", "128", "32", "32768"]
RIVALS = ["reference", "addmm"]
MODELS = ["reference-fp32", "reference", "peft-lora"]
WAY = ["--tokens", "512", "8192", "--rank", "64", "--mode", "graph", "--paths", *RIVALS]
ONE = ["--shape", "4096x4096"]  # compiling takes far longer than timing
LOWRANKS = ["svd-lowrank", "svd-lowrank-2", "svd-lowrank-4"]
SVDS = ["loraxs-svd", "loraxs-krylov", "loraxs-subspace", "svd-lowrank-4", "svd-lowrank-r", "svd-full"]
# {step: (seconds it may take where others wait, arguments of `loraxs bench`, paths last)}; the headline first.
BENCHES: dict[str, tuple[float, list[str]]] = {
    "tax": (140, ["layer", "--tokens", "512", "8192", "--rank", "16", "64"]),
    "chain": (100, ["chain", "--tokens", "16", "512", "8192", "--rank", "16", "64", "--mode", "graph"]),
    "gemm": (90, ["gemm", "--tokens", "512", "8192", "--rank", "16", "64", "--mode", "graph", "--paths", "addmm"]),
    "group": (45, ["group", "--tokens", "512", "8192", "--rank", "16", "64"]),
    "host": (60, ["host"]),
    "svd": (80, ["svd", "--rank", "64", "--paths", "loraxs-svd", *LOWRANKS]),
    "choice": (280, ["choice", "--tokens", *BUCKETS, "--rank", "64", "16", "--seconds", "0.03"]),
    "decode": (90, ["layer", "--tokens", "1", "16", "64", "--rank", "16", "--direction", "forward"]),
    "step": (150, ["model", "--rank", "64", "--paths", *MODELS]),
    "step-chosen": (60, ["model", "--rank", "64", "--blocks", "8", "--paths", "chosen"]),
    "tokens": (120, ["layer", "--tokens", *WIDE_T, "--rank", "64", "--mode", "graph", "--paths", *RIVALS]),
    "ranks": (120, ["layer", "--tokens", "8192", "--rank", *WIDE_R, "--mode", "graph", "--paths", *RIVALS]),
    "forward": (60, ["layer", "--direction", "forward", *WAY]),
    "backward": (60, ["layer", "--direction", "backward", *WAY]),
    "gemm-fp16": (45, ["gemm", "--dtype", "fp16", "--tokens", "8192", "--rank", "64", "--paths", "addmm"]),
    "svd-sklearn": (120, ["svd", "--rank", "64", "--paths", "loraxs-svd", "sklearn"]),
    "svd-ranks": (200, ["svd", "--rank", "4", "16", "256", "--paths", "loraxs-svd", *LOWRANKS]),
    "svd-paths": (120, ["svd", *ONE, "--rank", "64", "256", "--paths", *SVDS]),
    "step-compile": (300, ["model", "--rank", "64", "--paths", *MODELS, "compile"]),
    "compile": (90, ["layer", "--tokens", "8192", "--rank", "64", "--paths", "reference", "compile"]),
    "compile-max": (120, ["layer", *ONE, "--tokens", "8192", "--rank", "64", "--paths", "reference", "compile-max"]),
}
# {step: seconds it may take where others wait}, in the order of a run that names none.
STEPS: dict[str, float] = {
    **{"ladder": 60, "tests": 240},
    **{name: seconds for name, (seconds, _) in BENCHES.items()},
    "sanitizer": 180,
}
SIDE_BY_SIDE = [name for name, each in QUESTIONS.items() if each.paths is PATHS]  # the questions that time those


class Suite:
    """The report in the making, what was printed, and how much time is left."""

    def __init__(self, out: Path, budget: float, commit: str | None, device: str) -> None:
        self.started, self.budget, self.device, self.cut = time.monotonic(), budget, device, False
        self.after: dict[str, dict[str, Any]] = {}  # what became of the tests in an earlier report
        self.data: dict[str, Any] = {
            **report.head(report.FORMAT, report.VERSION, device, commit),
            "kernels": {},
            "settings": {"left_out": {}},
            "ceilings": None,
            "complete": False,
            "seconds": 0.0,
            "build": {"built": False, "why": why} if (why := core.missing()) else json.loads(core.RECORD.read_text()),
            "tests": {},
            "rows": [],
        }
        name = f"{self.data['date'][:10]}-{self.data['commit']}"
        self.folder, self.path = report.free(out / name), report.free(out / f"{name}.json")
        self.folder.mkdir()
        self.log = (out / "suite.log").open("a")
        self.save()

    @property
    def left(self) -> float:
        """Seconds until nothing is to run any more."""
        return self.started + self.budget - GRACE - time.monotonic()

    def say(self, text: str) -> None:
        print(text, file=self.log, flush=True)
        show_text(text)

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.started, 1)
        report.save(self.data, self.path)

    def run(
        self, name: str, command: list[str], seconds: float, look: Callable[[], None], ask: bool = True, **more: str
    ) -> int:
        """Run Python in a session of its own, its output into the log, with a look at what it writes now and then.

        When its time is up it is asked to stop, where it would save something, and made to; nothing that it started
        outlives it, nor does it outlive this process.  more: variables of its environment.  Returns its exit status.
        """
        began = time.monotonic()
        self.say(f"[{began - self.started:4.0f} s] {name}: {' '.join(command)} (at most {seconds:.0f} s)")
        log = self.path.with_name("suite.log")
        said = log.stat().st_size
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=inherited | {"PYTHONUNBUFFERED": "1"} | more,
            start_new_session=True,
            preexec_fn=partial(LIBC.prctl, 1, signal.SIGKILL),  # PR_SET_PDEATHSIG
        )
        with ExitStack() as at_the_end:  # also where it is stopped a second time
            at_the_end.callback(kill, process)
            at_the_end.callback(look)  # before that: a test that was killed would look as if it had crashed
            try:
                while process.poll() is None and (rest := began + seconds - time.monotonic()) > 0:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(min(EVERY, rest))
                    look()
            finally:
                if process.poll() is None:
                    self.cut = True
                    self.say(f"  {name}: its time is up")
                    if ask:
                        process.send_signal(signal.SIGINT)
                        with suppress(subprocess.TimeoutExpired):
                            process.wait(GRACE)
        self.say(f"  {name}: exit {process.returncode} after {time.monotonic() - began:.0f} s")
        if process.returncode not in (0, 1):  # 1: something failed, and says so in the report
            show_text("\n".join(log.read_bytes()[said:].decode(errors="replace").splitlines()[-TAIL:]))
        return process.returncode

    def tests(self, name: str, components: list[str], pattern: str, seconds: float) -> None:
        """The tests of some components, in processes side by side.

        bench/recorder.py notes what becomes of each, and `take_outcomes` reads that while they run.
        """
        if not components:
            self.say(f"{name}: nothing is left to test")
            return
        path, cores = self.folder / f"{name}.jsonl", len(os.sched_getaffinity(0))
        workers = min(WORKERS, cores)
        files = [str(file) for file in sorted(TESTS.glob(pattern)) if "mark.gpu(" in file.read_text()]
        more = {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": str(cores // workers),
            "LORAXS_OUTCOMES": str(path),
            "LORAXS_COMPONENTS": ",".join(components),
        }
        how = ["-n", str(workers), "--max-worker-restart", str(RESTARTS)]
        self.run(name, [*PYTEST, *how, *files], seconds, partial(self.take_outcomes, path), ask=False, **more)
        found = [self.data["tests"].get(each, {"not reached": True}) for each in components]
        self.cut |= any(each["not reached"] for each in found)

    def take_outcomes(self, path: Path) -> None:
        """What has become of the tests until now."""
        for component, record in outcomes.read(path).items():
            self.data["tests"][component] = {"sources": status.sources(component)} | record
        self.save()

    def left_out(self) -> dict[str, str]:
        """{backend: what became of its tests, or of those of first light} where some of them hung or crashed."""
        known = outcomes.newest([self.after, self.data["tests"]])
        records = {backend: known.get(f"{backend} backend", {}) for backend in OURS}
        lost = {name: each for name, each in records.items() if each.get("crashed") or each.get("timed out")}
        why = {name: f"its tests: {outcomes.told(each)}" for name, each in lost.items()}
        first = known.get(status.FIRST_LIGHT, {}).get("names", {})
        for test in [test for outcome in ("crashed", "timed out") for test in first.get(outcome, ())]:
            why.setdefault("triton" if "::test_triton" in test else "cuda", f"first light lost {test}")
        return why

    def bench(self, name: str, seconds: float) -> None:
        """One bench, without the backends that are left out."""
        left_out, part = self.left_out(), self.folder / f"{name}.json"
        arguments = with_paths(BENCHES[name][1], left_out)
        self.data["settings"]["left_out"] |= left_out
        command = ["-m", "loraxs_kernels", "bench", *arguments, "--out", str(part)]
        command += ["--device", self.device, "--commit", self.data["commit"]]
        self.cut |= self.run(name, command, seconds, partial(self.take, name, part)) not in (0, 1)

    def take(self, name: str, part: Path) -> None:
        """The rows that a bench has written until now, after those of the benches before it."""
        if not part.exists():
            return
        found = report.load(part)
        others = [row for row in self.data["rows"] if row["run"] != name]
        self.data["rows"] = others + [{"run": name, **row} for row in found["rows"]]
        self.data["ceilings"] = self.data["ceilings"] or found["ceilings"]
        self.data["kernels"] |= found["kernels"]
        self.data["settings"]["left_out"] |= found["settings"]["left_out"]
        self.save()


def show_text(text: str) -> None:
    """Print it; once the reader of the output has gone, print nothing from then on."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def kill(process: subprocess.Popen) -> None:
    """End a process, and all that it has started."""
    with deaf():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds on to does not die
            process.wait(GRACE)


@contextmanager
def deaf() -> Iterator[None]:
    """Nothing that asks this process to stop is heard meanwhile."""
    before = {each: signal.signal(each, signal.SIG_IGN) for each in STOPS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def with_paths(arguments: list[str], left_out: dict[str, str]) -> list[str]:
    """The arguments of a bench, with its paths named if it names some itself or if some are left out."""
    if arguments[0] not in SIDE_BY_SIDE or not ("--paths" in arguments or left_out):
        return arguments
    there = [name for name, path in PATHS.items() if path.missing() is None]
    ours = [name for name in OURS if name in there and name not in left_out]
    others = [name for name in there if PATHS[name].run == "default" and name not in OURS]
    return [*arguments, *([] if "--paths" in arguments else ["--paths", *others]), *ours]


def summary(data: dict[str, Any]) -> str:
    """A few lines: what passed, what failed; the tests that did not pass come last."""
    lines = [f"{name}: {outcomes.told(each)}" for name, each in data["tests"].items()] or ["no test ran"]
    lines += [f"{name}: {why}" for name, each in data["tests"].items() for why in each.get("skips", ())]
    if build := data.get("build"):
        lines.append(f"core: {build.get('why') or build['architectures']}")
    lines += [f"without {name}: {why}" for name, why in data["settings"]["left_out"].items()]
    failed = [row for row in data["rows"] if row["status"] == "failed"]
    lines += [f"failed: {row['question']} {row['path']}: {row['reason']}" for row in failed[:10]]
    counts = f"{len(data['rows'])} rows, {len(failed)} failed"
    lines.append(f"{counts}; {data['seconds']:.0f} s; complete: {data['complete']}")
    bad = [
        f"{outcome}: {test}{why and f': {why}'}"
        for each in data["tests"].values()
        for outcome in outcomes.BAD
        for test, why in each.get("names", {}).get(outcome, {}).items()
    ]
    more = [f"and {len(bad) - SHOWN} more, in the report"] if len(bad) > SHOWN else []
    return "\n".join([*lines, *(line[:WIDTH] for line in bad[:SHOWN]), *more])


def request(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, or a refusal; with `steps`, {step: seconds it may take where others wait}, and what became of the
    tests: `earlier`, in each of the reports of --after, the oldest first, `known`, in all of them, and what is left,
    `untested`."""
    parser = argparse.ArgumentParser(prog="gpu_suite", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the report and the log")
    add("--only", nargs="+", choices=STEPS, default=[], metavar="STEP", help=", ".join(STEPS))
    add("--budget", type=float, default=540, help="seconds in all (default: 540)")
    add("--after", type=Path, nargs="+", default=[], metavar="REPORT", help="what passed in these is not tested again")
    add("--kit", type=Path, metavar="FOLDER", help="that `make gpu-kit` made: the CUDA core, for this machine")
    add("--commit", help="what to note as the source, where it is not a git checkout")
    add("--device", default="cuda")
    asked = parser.parse_args(argv)
    if not LEAST + GRACE <= asked.budget < math.inf:
        parser.error(f"--budget: got {asked.budget:g}, must be at least {LEAST + GRACE:g} seconds")
    asked.steps = {name: STEPS[name] for name in asked.only or STEPS}
    if asked.only:
        share = min(1, (asked.budget - GRACE) / sum(asked.steps.values()))
        asked.steps = {name: share * seconds for name, seconds in asked.steps.items()}
    if asked.out.exists() and not asked.out.is_dir():
        parser.error(f"--out: {asked.out} is a file, must be a folder, or not there yet")
    if {"ladder", "tests", "sanitizer"} & set(asked.steps) and importlib.util.find_spec("xdist") is None:
        parser.error("the tests need pytest-xdist: pip install pytest-xdist")
    if asked.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU here; on a CPU use `loraxs bench`")
    try:
        asked.earlier = [each["tests"] for each in sorted(map(report.load, asked.after), key=lambda each: each["date"])]
        asked.known, asked.untested = outcomes.newest(asked.earlier), untested(asked.earlier)
    except (AttributeError, KeyError, TypeError):
        parser.error(f"--after: got {', '.join(map(str, asked.after))}, must be reports that this suite wrote")
    except BenchError as error:
        parser.error(str(error))
    return asked


def untested(earlier: list[dict[str, dict[str, Any]]]) -> list[str]:
    """The components, the checker's aside, except those whose last verdict, on the files as they are, was that all
    their tests passed; one of which a test was skipped, say without a core, has not."""
    now = {name: status.sources(name) for name in status.COMPONENTS if name != status.SANITIZER}
    last = outcomes.newest(
        {name: each for name, each in tests.items() if each["sources"] == now.get(name)} for tests in earlier
    )
    good = {name for name, each in last.items() if outcomes.passed(each) and not each.get("skipped")}
    return [name for name in now if name not in good]


def main(argv: list[str] | None = None) -> int:
    asked = request(argv)
    try:
        kit = {"kit": gpu_kit.use(asked.kit)} if asked.kit else {}
        asked.out.mkdir(parents=True, exist_ok=True)
        suite = Suite(asked.out, asked.budget, asked.commit, asked.device)
    except (gpu_kit.KitError, BenchError, OSError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 1
    for each in STOPS[1:]:
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(each, signal.default_int_handler)
    suite.after = asked.known
    suite.data["build"] |= kit
    waiting = sum(asked.steps.values())
    try:
        for step, seconds in asked.steps.items():
            waiting -= seconds
            seconds = min(max(seconds, suite.left - waiting), suite.left)  # longer where nothing waits for what is left
            if suite.left < LEAST:
                suite.cut = True
                suite.say(f"{step}: not started, the budget is spent")
                continue
            untried = [name for name in asked.untested if name not in suite.data["tests"]]
            if step == "ladder":
                first = [name for name in untried if name == status.FIRST_LIGHT]
                suite.tests(step, first, "test_first_light.py", seconds)
            elif step == "tests":
                suite.tests(step, untried, "test_*.py", seconds)
            elif step == "sanitizer":
                suite.tests(step, [status.SANITIZER], "test_sanitizer.py", seconds)
            else:
                suite.bench(step, seconds)
        suite.data["complete"] = not suite.cut
    except KeyboardInterrupt:
        suite.say("stopped")
    with deaf():
        suite.save()
        suite.say(f"\n{suite.path}\n{summary(suite.data)}")
    return 1 if suite.cut or any(map(outcomes.bad, suite.data["tests"].values())) else 0


if __name__ == "__main__":
    sys.exit(main())
