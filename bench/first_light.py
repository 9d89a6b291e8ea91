"""A ladder for the first minutes on a GPU: every kernel on small problems, each rung in a process of its own.

    python bench/first_light.py --out FILE.json [--only RUNG ...] [--limit 20] [--jobs 1] [--trace]
                                  [--commit NAME]

A rung that hangs is killed after --limit seconds and one that crashes ends alone: the others go on.  Rungs run from the
smallest (bench/rungs.py), one line is printed for each, and FILE.json is never older than the last line.  What a failed
rung made is saved beside it, FILE-<rung>-<number>.npz: got, expected, first (the first mismatch), corner (where the
saved part begins), errors (of every tile, relative), text.  Exit 0: every rung passed.

--trace, with a core built by `LORAXS_TRACE=1 python setup.py build_ext --inplace`: of a rung that hung or crashed, it
says which programs of which launches started, waited and ended, from records that outlive the process (csrc/trace.h).
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # it must run where nothing is installed

import numpy as np  # noqa: E402
import rungs  # noqa: E402
import torch  # noqa: E402

from loraxs_kernels.backends.cuda import core  # noqa: E402
from loraxs_kernels.bench import report  # noqa: E402
from loraxs_kernels.files import write_atomically  # noqa: E402
from loraxs_kernels.info import info  # noqa: E402

SCRIPT = Path(__file__)  # what a rung's process runs
START = 45.0  # seconds that a process may take to import torch and reach the GPU, before its limit begins
GOING = 10.0  # seconds that a killed process may take to go
TAIL = 15  # lines of what a process printed that are kept where it broke
BAD = ("failed", "timed out", "crashed")
# csrc/trace.h; times in ns, 0: not come so far.
RECORD = np.dtype(
    [(name, np.uint32) for name in ("kernel", "program", "launch", "multiprocessor")]
    + [(name, np.uint64) for name in ("start", "waiting", "waited", "end", "tiles")]
)
KERNELS = {1: "shrink", 2: "shrink's second launch", 3: "decode", 4: "tail GEMM"}
RECORDS = 1 << 16
MEMORY = Path("/dev/shm")  # where files are memory that a GPU may write to
SHOWN = 8  # programs of a launch that did not end, and launches at the end


class Running:
    """A rung in a process of its own; what it notes is in `folder`."""

    def __init__(self, name: str, stem: Path, folder: Path, limit: float, device: str, trace: bool) -> None:
        self.name, self.limit = name, limit
        self.noted, self.printed, self.records = (folder / f"{name}.{kind}" for kind in ("json", "log", "trace"))
        command = [sys.executable, str(SCRIPT), "--rung", name, "--out", str(self.noted), "--stem", str(stem)]
        command += ["--device", device, "--limit", str(limit)]
        if trace:
            self.records.write_bytes(bytes(RECORDS * RECORD.itemsize))
            command += ["--records", str(self.records)]
        self.started, self.began = time.monotonic(), None
        with self.printed.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ
            )

    def outcome(self) -> dict[str, Any] | None:
        """What came of it; None: it is still running, and may."""
        now, code = time.monotonic(), self.process.poll()
        if self.began is None and self.noted.exists():
            self.began = now
        late = now - (self.began or self.started) > (self.limit if self.began else START)
        if code is None and not late:
            return None
        gone = code is not None or self.kill()
        state = json.loads(self.noted.read_text()) if self.noted.exists() else {"doing": "importing torch"}
        row = {"name": self.name, "seconds": time.monotonic() - (self.began or self.started), **state}
        row["start"] = (self.began or now) - self.started
        if code is None:
            row |= {"outcome": "timed out", "why": f"in: {state['doing']}"}
            if self.began is None:
                row["why"] = f"it did not reach the GPU in {START:.0f} s"
            if not gone:
                row["why"] += f" (killed, but still there after {GOING:.0f} s)"
        elif "outcome" not in state:
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            row |= {"outcome": "crashed", "why": f"{how} in: {state['doing']}"}
        if row["outcome"] in ("timed out", "crashed"):
            row["printed"] = self.printed.read_text(errors="replace").splitlines()[-TAIL:]
            if self.records.exists():
                row["trace"] = story(np.fromfile(self.records, RECORD))
        self.records.unlink(missing_ok=True)
        return row

    def kill(self) -> bool:
        """End it, with all that it started; whether it is gone."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(GOING)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            return False
        return True


class Ladder:
    """The report in the making; it has a row for every rung from the start."""

    def __init__(
        self, out: Path, names: list[str], limit: float, jobs: int, device: str, trace: bool, commit: str | None
    ) -> None:
        self.out, self.limit, self.jobs, self.device, self.trace = out, limit, jobs, device, trace
        self.started = time.monotonic()
        self.data = {
            **report.head("loraxs-first-light", 1, device, commit),
            **{"core": info()["cuda core"], "limit": limit, "jobs": jobs, "trace": trace},
            **{"complete": False, "seconds": 0.0},
            "rows": [{"name": name, "outcome": "not reached"} for name in names],
        }
        self.save()

    def save(self) -> None:
        self.data["seconds"] = time.monotonic() - self.started
        report.save(self.data, self.out)

    def climb(self) -> None:
        waiting, running = deque(enumerate(row["name"] for row in self.data["rows"])), {}
        with tempfile.TemporaryDirectory(dir=MEMORY if self.trace else None) as folder:
            try:
                while waiting or running:
                    while waiting and self.may_start(waiting[0][1], running):
                        i, name = waiting.popleft()
                        stem = self.out.with_name(f"{self.out.stem}-{name}")
                        running[i] = Running(name, stem, Path(folder), self.limit, self.device, self.trace)
                    for i, each in list(running.items()):
                        if row := each.outcome():
                            self.data["rows"][i] = row
                            del running[i]
                            self.save()
                            print(line(row), flush=True)
                            if each.began is None and waiting:
                                print("nothing more is started: a process did not come as far as its rung", flush=True)
                                waiting.clear()
                    time.sleep(0.02)
            finally:
                for each in running.values():
                    each.kill()
        self.data["complete"] = all(row["outcome"] != "not reached" for row in self.data["rows"])
        self.save()

    def may_start(self, name: str, running: dict[int, Running]) -> bool:
        if any(rungs.RUNGS[each.name].alone for each in running.values()):
            return False
        return not running if rungs.RUNGS[name].alone else len(running) < self.jobs

    def summary(self) -> str:
        rows = self.data["rows"]
        outcomes = ("passed", *BAD, "not run", "not reached")
        counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in outcomes}
        lines = [f"\n{', '.join(f'{n} {outcome}' for outcome, n in counts.items() if n)}; {self.data['seconds']:.0f} s"]
        lines += [f"{row['outcome']}: {row['name']}" for row in rows if row["outcome"] != "passed"]
        return "\n".join([*lines, str(self.out)])


def line(row: dict[str, Any]) -> str:
    """A rung in a line; of one that failed, the first mismatch; below it the trace, where there is one."""
    first = f"{row['name']:<32}{row['outcome']:<11}{row['seconds']:5.1f} s  {row.get('why') or row.get('figure') or ''}"
    return "\n    ".join([first, *row.get("trace", ())])


def story(records: np.ndarray) -> list[str]:
    """What the last launches did, and each before that has not ended; of these, what their programs were at."""
    launches = [records[records["launch"] == n] for n in np.unique(records["launch"]) if n]
    shown = [each for i, each in enumerate(launches) if i >= len(launches) - SHOWN or not each["end"].all()]
    if not shown:
        return ["no launch was traced"]
    starts = np.concatenate([each["start"] for each in shown])
    origin = starts[starts > 0].min(initial=np.iinfo(np.uint64).max)
    lines = []
    for each in shown:
        waits = (each["waiting"] > each["waited"]) & (each["end"] == 0)
        counts = [(each["start"] > 0, "started"), (waits, "wait"), (each["end"] > 0, "ended")]
        told = ", ".join(f"{n.sum()} {what}" for n, what in counts)
        name = KERNELS.get(int(each["kernel"][0]), "?")
        lines.append(f"launch {each['launch'][0]}, {name}: {len(each)} programs, {told}, {each['tiles'].sum()} tiles")
        for record in each[(each["end"] == 0) & (each["start"] > 0)][:SHOWN]:
            times = {name: f"{(int(record[name]) - int(origin)) / 1e3:.1f} us" for name in RECORD.names[4:7]}
            at = f"started at {times['start']}"
            at += f", waiting from {times['waiting']}" if record["waiting"] else ""
            at += f" to {times['waited']}" if record["waited"] > record["waiting"] else ""
            where = f"program {record['program']} on SM {record['multiprocessor']}"
            lines.append(f"  {where}: {at}, {record['tiles']} tiles")
    return lines


def climb_one(name: str, noted: Path, stem: Path, device: str, limit: float, records: Path | None) -> None:
    """In a rung's own process: run it and note what comes of it."""
    faulthandler.enable()
    if sys.platform == "linux":  # end with the ladder, however that ends: 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    rung, at = rungs.RUNGS[name], torch.device(device)

    def note(state: dict[str, Any]) -> None:
        write_atomically(noted, json.dumps(state).encode())

    if at.type == "cuda":
        at = torch.zeros(1, device=at).device  # with its number
        torch.cuda.synchronize()
    if reason := rung.missing(at):
        return note({"outcome": "not run", "why": reason, "doing": ""})
    faulthandler.dump_traceback_later(max(0.1, limit - 0.5))
    with rungs.poisoned(at):
        bench = rungs.Bench(at, stem, note)
        state = bench.state
        try:
            if records and rung.needs in ("core", "hopper"):
                with records.open("r+b") as f:
                    memory = mmap.mmap(f.fileno(), 0)  # open as long as this process
                core.load().trace(ctypes.addressof(ctypes.c_char.from_buffer(memory)), RECORDS)
            figure = rung.run(bench)
            if at.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            state |= {"outcome": "crashed" if dead(at) else "failed", "why": f"{_short(error)}, in: {state['doing']}"}
        else:
            checks, failed = state["checks"], state["failed"]
            counted = f"{checks} checks" + (f", at most {state['worst']:.2f} of the allowed error" if checks else "")
            state |= {"outcome": "failed" if failed else "passed", "figure": figure or counted}
        if state["failed"]:
            more = f" ({len(state['failed'])} of {state['checks']} checks failed)"
            state["why"] = f"{state['failed'][0]}{more}" + (f"; then {state['why']}" if "why" in state else "")
    note(state)


def dead(device: torch.device) -> bool:
    """Whether this process can use the GPU no more: a CUDA error that stays."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def chosen(wanted: list[str] | None) -> list[str]:
    """Names of rungs, in their order; `wanted` has names, or what they begin with ("tail", "tail-ragged").

    Raises ValueError for one that is not there.
    """
    for each in wanted or ():
        if not any(_begins(name, each) for name in rungs.RUNGS):
            raise ValueError(f"only: got {each!r}, must be a rung or how some begin: {', '.join(rungs.RUNGS)}")
    return [name for name in rungs.RUNGS if wanted is None or any(_begins(name, each) for each in wanted)]


def _begins(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the report, a .json file that is not there yet")
    parser.add_argument("--only", nargs="+", metavar="RUNG", help=", ".join(rungs.RUNGS))
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a rung may take (default 20)")
    parser.add_argument("--jobs", type=int, default=1, help="rungs that run at once (default 1)")
    parser.add_argument("--device", default="cuda", help="cpu is for tests")
    parser.add_argument("--commit", help="what to note as the source, where it is not a git checkout")
    parser.add_argument("--trace", action="store_true", help="say what the programs of a kernel that hung were at")
    parser.add_argument("--rung", help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stem", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rung:
        own = (arguments.stem, arguments.device, arguments.limit, arguments.records)
        climb_one(arguments.rung, arguments.out, *own)
        return 0
    try:
        names = chosen(arguments.only)
        if arguments.device != "cpu" and not torch.cuda.is_available():
            raise ValueError("no GPU here: torch.cuda.is_available() is False")
        if arguments.limit <= 0 or arguments.jobs < 1:
            raise ValueError(f"limit and jobs: got {arguments.limit:g} and {arguments.jobs}, must be above 0")
        if arguments.out.suffix != ".json":
            raise ValueError(f"out: got {arguments.out}, must be a .json file")
        if arguments.trace and (core.missing() or not hasattr(core.load(), "trace")):
            raise ValueError("trace: needs a CUDA core built by LORAXS_TRACE=1 python setup.py build_ext --inplace")
        if arguments.out.exists():
            raise ValueError(f"out: {arguments.out} is there already and is not overwritten; name another file")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        how = (arguments.limit, arguments.jobs, arguments.device, arguments.trace, arguments.commit)
        ladder = Ladder(arguments.out, names, *how)
    except (ValueError, OSError) as error:
        print(f"first_light: {error}", file=sys.stderr)
        return 1
    try:
        ladder.climb()
    except KeyboardInterrupt:
        print("stopped")
        ladder.save()
    print(ladder.summary(), flush=True)
    return 0 if all(row["outcome"] == "passed" for row in ladder.data["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
