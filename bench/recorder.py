"""What becomes of every test marked `gpu`, on the disk as it happens: `pytest -p recorder`.

Every process that runs tests appends lines of JSON to the file LORAXS_OUTCOMES, the last line of a test says what has
become of it: that it was collected, has started, or how it ended; a file that cannot be collected has lines as a test
has, one for each component that it names.  What has started and not ended is a crash, or ran longer than its limit, of
which <file>.<pid> has the traceback.  A test may take LIMIT seconds, or those of its mark,
`gpu("component", limit=90)`; then its process ends, also inside C code that keeps the interpreter to itself.  After
each test the GPU is waited for: a sticky CUDA error fails that test, and its process ends, so that it fails no other.
With a core built by `LORAXS_TRACE=1 python setup.py build_ext --inplace`, either reason also says what the programs of
the last launches were doing (bench/kernel_trace.py), unless the process was killed by a signal or hangs in C code that
keeps the interpreter to itself.  Where several of one test, or of one component, have cost their processes, the rest of
it is not run: it would only take the others' time.

LORAXS_COMPONENTS (names between commas) chooses tests.  pytest-xdist puts a new process in the place of one that ended.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import outcomes
import pytest

LIMIT = 30.0  # seconds a test may take: Triton's compilations are most of the longest


class Recorder:
    """The hooks of a process that runs tests; `path` gets a line for everything that happens."""

    def __init__(self, path: Path) -> None:
        self.path, self.wanted = path, os.environ["LORAXS_COMPONENTS"].split(",")
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.trace = open(f"{path}.{os.getpid()}", "w")  # noqa: SIM115 - as long as the process
        self.reports: list[pytest.TestReport] = []
        self.story: Callable[[], str] = str  # of the kernels, where the core traces them
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with pytest, and pytest with the suite

    def note(self, test: str, component: str, outcome: str, reason: str = "", lost: bool = False) -> None:
        facts = {"test": test, "component": component, "outcome": outcome, "reason": reason, "lost": lost}
        os.write(self.file, f"{json.dumps(facts | {'pid': os.getpid()})}\n".encode())  # at once, and in one piece

    def pytest_sessionstart(self) -> None:
        faulthandler.enable(self.trace)  # pytest's own writes to stderr

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        report = yield
        if not report.passed:
            text = collector.path.read_text(errors="replace") if collector.path.is_file() else ""
            file = collector.nodeid.partition("::")[0] or collector.path.name  # outside the root it has none
            for each in outcomes.named(text, self.wanted):
                self.note(file, each, report.outcome, f"not collected: {reason(report)}")
        return report

    @pytest.hookimpl(trylast=True)  # after -m and conftest.py
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[each for each in items if component(each) not in self.wanted])
        items[:] = [each for each in items if component(each) in self.wanted]
        if os.environ.get("PYTEST_XDIST_WORKER") == "gw0":  # the others find the same, and none has begun
            for each in items:
                self.note(each.nodeid, component(each), "not reached")
        core = sys.modules.get("loraxs_kernels.backends.cuda.core")
        if core and not core.missing() and hasattr(core.load(), "trace"):
            import kernel_trace  # and so numpy, for which other processes do not wait

            records = kernel_trace.begin(core.load())
            self.story = lambda: "; ".join(["", *kernel_trace.story(records.copy())])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.reports, of = [], (item.nodeid, component(item))
        if hopeless := outcomes.why_not(self.path, component(item), item.nodeid):
            item.add_marker(pytest.mark.skip(reason=hopeless))
        self.note(*of, "started")
        faulthandler.dump_traceback_later(limit(item), exit=True, file=self.trace)
        late = threading.Timer(0.9 * limit(item), lambda: self.note(*of, "started", self.story()))
        if self.story is not str:  # no test has a thread beside it for nothing
            late.start()
        result = yield
        sticky = wait()
        late.cancel()
        if late.is_alive():  # it tells what it has to tell before the test's last line
            late.join()
        faulthandler.cancel_dump_traceback_later()
        if sticky:
            self.note(*of, "failed", f"a sticky CUDA error: {sticky}{self.story()}", lost=True)
            os._exit(1)
        outcome, why = verdict(self.reports)
        self.note(*of, "not reached" if hopeless else outcome, why)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get("LORAXS_OUTCOMES"):
        config.pluginmanager.register(Recorder(Path(path)))


def component(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("gpu")
    return mark.args[0] if mark else None


def limit(item: pytest.Item) -> float:
    mark = item.get_closest_marker("gpu")
    return (mark and mark.kwargs.get("limit")) or LIMIT


def wait() -> str | None:
    """Wait for the GPU and free memory for other processes; returns the error if that fails."""
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:
        return outcomes.short(str(error))


def verdict(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """(outcome, why) of a test from its setup, call and teardown."""
    for outcome in ("failed", "skipped"):
        for each in reports:
            if each.outcome == outcome:
                return outcome, reason(each)
    return "passed", ""


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why something has failed, or was skipped."""
    said = report.longrepr
    if isinstance(said, tuple):
        return outcomes.short(said[2].removeprefix("Skipped: "))
    if crash := getattr(said, "reprcrash", None):
        return outcomes.short(crash.message)
    lines = str(said).splitlines() or [""]
    return outcomes.short(next((line[1:] for line in reversed(lines) if line.startswith("E ")), lines[-1]))
