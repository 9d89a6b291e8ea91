"""What became of the tests marked `gpu`: read from the file of bench/recorder.py, while they run and afterwards."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BAD = ("failed", "crashed", "timed out")
WORDS = ("passed", *BAD, "not reached", "skipped")
LONGEST = 300  # characters of a reason


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{component: how many tests passed, failed, crashed, timed out, were not reached or skipped, and which and why}.

    A test that a process which still lives is at counts as not reached: that is what it is once the run is cut.
    A file that is not collected counts as one test, that failed or was skipped, of every component that it names.
    `names` has {outcome: {test: reason}}, for "not reached" {test without its parameters: how many}; `skips` has
    {reason: how many}.
    """
    state: dict[str, tuple[str, str]] = {}
    of: dict[str, str] = {}
    files: dict[tuple[str, str], tuple[str, str]] = {}
    for event in events(path):
        for test, name in event.get("collected", ()):
            of[test] = name
            state.setdefault(test, ("not reached", ""))
        if test := event.get("start"):
            of[test] = event["component"]
            state[test] = ended(Path(f"{path}.{event['pid']}"), event["pid"])
        if test := event.get("late"):
            state[test] = state[test][0], state[test][1] + event["story"]
        if test := event.get("end"):
            state[test] = event["outcome"], event["reason"]
        for name in event.get("components", ()):
            files[name, event["file"]] = event["outcome"], event["reason"]
    found: dict[str, dict[str, Any]] = {}
    known = [(of[test], test, *each) for test, each in state.items()]
    known += [(*which, *each) for which, each in files.items()]
    for name, test, outcome, reason in known:
        each = found.setdefault(name, dict.fromkeys(WORDS, 0) | {"names": {}, "skips": {}})
        each[outcome] += 1
        if outcome in BAD:
            each["names"].setdefault(outcome, {})[test] = reason
        if outcome == "not reached":
            several = each["names"].setdefault(outcome, Counter())
            several[without_parameters(test)] += 1
        if outcome == "skipped":
            each["skips"][reason] = each["skips"].get(reason, 0) + 1
    return found


def unstarted(path: Path) -> set[str]:
    """The tests that were collected, and that no process has begun."""
    found = events(path)
    return {test for event in found for test, _ in event.get("collected", ())} - {event.get("start") for event in found}


def named(text: str, asked: Iterable[str]) -> list[str]:
    """Those of the components asked for that a file of tests is of, by its gpu("..."); all, where it does not say."""
    names = re.findall(r"""\bgpu\(\s*f?["']([^"']+)["']""", text)
    found = [re.compile(".+".join(map(re.escape, re.split(r"{.*?}", name)))) for name in names]
    return [name for name in asked if not found or any(each.fullmatch(name) for each in found)]


def lost(path: Path) -> Counter[tuple[str, str]]:
    """How many tests have cost their processes: of (component, test without parameters), and of (component, "")."""
    found: Counter[tuple[str, str]] = Counter()
    running: dict[str, dict[str, Any]] = {}
    for event in events(path):
        if test := event.get("start"):
            running[test] = event
        if (test := event.get("end")) and not event["lost"]:
            del running[test]
    for test, event in running.items():
        if not alive(event["pid"]):
            found[event["component"], without_parameters(test)] += 1
            found[event["component"], ""] += 1
    return found


def without_parameters(test: str) -> str:
    return test.partition("[")[0]


def passed(record: dict[str, Any]) -> bool:
    """Whether a component has passed: some of its tests did, and none did not; records of older reports too."""
    return bool(record["passed"]) and not bad(record) and not record.get("not reached")


def bad(record: dict[str, Any]) -> bool:
    """Whether a test of a component failed, crashed or took too long."""
    return any(record.get(word) for word in BAD)


def newest(runs: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The last record of each component; one that says neither good nor bad does not hide a bad one before it."""
    known: dict[str, dict[str, Any]] = {}
    for run in runs:
        for component, record in run.items():
            if passed(record) or bad(record) or not bad(known.get(component, {})):
                known[component] = record
    return known


def told(record: dict[str, Any]) -> str:
    """ "12 passed, 1 timed out": what there is of each outcome."""
    return ", ".join(f"{record[word]} {word}" for word in WORDS if record.get(word)) or "none"


def events(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of outcomes; one that is still being written counts for nothing."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def ended(trace: Path, pid: int) -> tuple[str, str]:
    """What has become of a test that has started, and not ended."""
    text = trace.read_text(errors="replace") if trace.exists() else ""
    if text:
        return "timed out" if text.startswith("Timeout") else "crashed", story(text)
    return ("not reached", "") if alive(pid) else ("crashed", "its process was killed")


def story(text: str) -> str:
    """The first line of faulthandler's, and where the thread that ran the test was, innermost first."""
    threads = re.split(r"^(?:Current thread|Thread) .*\n", text, flags=re.M)
    thread = next((each for each in threads if "in pytest_runtest_call" in each), threads[-1])
    frames = re.findall(r'File ".*?([^/"]+)", line (\d+) in (\S+)', thread.partition("in pytest_pyfunc_call")[0])
    return short(f"{text.splitlines()[0]} at " + " < ".join(f"{file}:{line} {name}" for file, line, name in frames[:4]))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def short(text: str) -> str:
    """In one line, and without the machine's own paths to this checkout."""
    text = " ".join(text.replace(f"{ROOT}/", "").split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
