"""What becomes of every test marked `gpu`, on the disk as it happens: `pytest -p recorder`.

Every process that runs tests appends lines of JSON to the file LORAXS_OUTCOMES: the tests collected, the start of each
and its end, and each file that cannot be collected, with the components that it names.  What has no end is a crash, or
ran longer than its limit, of which <file>.<pid> has the traceback.  A test may take LIMIT seconds, or those of its
mark, `gpu("component", limit=90)`; then its process ends, also inside C code that keeps the interpreter to itself.
After each test the GPU is waited for: a sticky CUDA error fails that test, and its process ends, so that it fails no
other.  With a core built by `LORAXS_TRACE=1 python setup.py build_ext --inplace`, either reason also says what the
programs of the last launches were doing (bench/kernel_trace.py), unless the process was killed by a signal or hangs in
C code that keeps the interpreter to itself.  Where several of one test, or of one component, have
cost their processes, the rest of it is not run: it would only take the others' time.

LORAXS_COMPONENTS (names between commas) chooses tests, and those that the file says to have started before LORAXS_SINCE
(seconds of the epoch) are not run again.  pytest-xdist puts a new process in the place of one that ended; without it
bench/gpu_suite.py does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import status
from outcomes import events, lost, named, short, without_parameters

LIMIT = 30.0  # seconds a test may take: Triton's compilations are most of the longest
TRIES = {"test": 2, "component": 8}  # how many may cost their processes


class Recorder:
    """The hooks of a process that runs tests; `path` gets a line for everything that happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.trace = open(f"{path}.{os.getpid()}", "w")  # noqa: SIM115 - as long as the process
        self.reports: list[pytest.TestReport] = []
        self.hopeless = ""
        self.story: Callable[[], str] | None = None  # of the kernels, where the core traces them
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with pytest, and pytest with the suite

    def note(self, **facts: Any) -> None:
        os.write(self.file, f"{json.dumps(facts)}\n".encode())  # at once, and in one piece

    def pytest_sessionstart(self) -> None:
        faulthandler.enable(self.trace)  # pytest's own writes to stderr

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        report = yield
        if not report.passed:
            text = collector.path.read_text(errors="replace") if collector.path.is_file() else ""
            file = collector.nodeid.partition("::")[0] or collector.path.name  # outside the root it has none
            said = report.longrepr
            lines = (said[2] if isinstance(said, tuple) else str(said)).splitlines() or [""]
            why = next((line[1:] for line in reversed(lines) if line.startswith("E ")), lines[-1])
            how = {"outcome": report.outcome, "reason": short(f"not collected: {why.removeprefix('Skipped: ')}")}
            self.note(file=file, components=named(text, wanted()), **how)
        return report

    @pytest.hookimpl(trylast=True)  # after -m and conftest.py
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        since = float(os.environ.get("LORAXS_SINCE", 0))
        before = {event["start"] for event in events(self.path) if "start" in event and event["time"] < since}
        keep = {each for each in items if each.nodeid not in before and component(each) in wanted()}
        config.hook.pytest_deselected(items=[each for each in items if each not in keep])
        items[:] = [each for each in items if each in keep]
        if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":  # the others find the same
            self.note(collected=[[each.nodeid, component(each)] for each in items])
        core = sys.modules.get("loraxs_kernels.backends.cuda.core")
        if core and not core.missing() and hasattr(core.load(), "trace"):
            import kernel_trace  # and so numpy, for which other processes do not wait

            records = kernel_trace.begin(core.load())
            self.story = lambda: "; ".join(["", *kernel_trace.story(records.copy())])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.reports, began = [], time.monotonic()
        self.hopeless = self.why_not(item)
        self.note(start=item.nodeid, component=component(item), pid=os.getpid(), time=time.time())
        faulthandler.dump_traceback_later(limit(item), exit=True, file=self.trace)
        late = threading.Timer(0.9 * limit(item), lambda: self.note(late=item.nodeid, story=self.story()))
        if self.story:  # no test has a thread beside it for nothing
            late.start()
        result = yield
        sticky = wait()
        late.cancel()
        faulthandler.cancel_dump_traceback_later()
        outcome, reason = verdict(self.reports)
        if sticky:
            outcome, reason = "failed", f"a sticky CUDA error: {sticky}{self.story() if self.story else ''}"
        elif self.hopeless:
            outcome = "not reached"
        seconds = round(time.monotonic() - began, 2)
        self.note(end=item.nodeid, outcome=outcome, seconds=seconds, reason=reason, lost=bool(sticky))
        if sticky:
            os._exit(1)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self.hopeless:
            pytest.skip(self.hopeless)

    def why_not(self, item: pytest.Item) -> str:
        """Why it is not worth running, if it is not."""
        found = lost(self.path)
        for what, key in (("test", without_parameters(item.nodeid)), ("component", "")):
            if found[component(item), key] >= TRIES[what]:
                return f"{TRIES[what]} of this {what} have cost their processes"
        return ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        self.reports.append(report)
        return report


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get("LORAXS_OUTCOMES"):
        config.pluginmanager.register(Recorder(Path(path)))


def wanted() -> list[str]:
    """The components that are asked for."""
    return [name for name in os.environ.get("LORAXS_COMPONENTS", "").split(",") if name] or list(status.COMPONENTS)


def component(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("gpu")
    return mark.args[0] if mark else None


def limit(item: pytest.Item) -> float:
    mark = item.get_closest_marker("gpu")
    return (mark and mark.kwargs.get("limit")) or LIMIT


def wait() -> str | None:
    """Wait for the GPU and give back its memory, of which other processes want some; what it says if it cannot."""
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:
        return short(str(error))


def verdict(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """(outcome, why) of a test from its setup, call and teardown."""
    for outcome in ("failed", "skipped"):
        for each in reports:
            if each.outcome == outcome:
                said = each.longrepr
                crash = getattr(said, "reprcrash", None)
                text = crash.message if crash else said[2] if isinstance(said, tuple) else str(said)
                return outcome, short(text.removeprefix("Skipped: "))
    return "passed", ""
