"""What became of the tests marked `gpu`: read from the file of bench/recorder.py, while they run and afterwards."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BAD = ("failed", "crashed", "timed out")
WORDS = ("passed", *BAD, "not reached", "skipped")
LONGEST = 300  # characters of a reason
TRIES = {"test": 2, "component": 8}  # how many may cost their processes


def last(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(component, test): the last line of it} of a file of outcomes, without a line that is still being written."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            event = json.loads(line)
            found[event["component"], event["test"]] = event
    return found


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{component: how many tests passed, failed, crashed, timed out, were not reached or skipped, and which and why}.

    A test that a process which still lives is at counts as not reached: that is what it is once the run is cut.
    A file that is not collected counts as one test, that failed or was skipped, of every component that it names.
    `names` has {outcome: {test: reason}}, for "not reached" {test without its parameters: how many}; `skips` has
    {reason: how many}.
    """
    found: dict[str, dict[str, Any]] = {}
    for (component, test), event in last(path).items():
        outcome, reason = ended(path, event) if event["outcome"] == "started" else (event["outcome"], event["reason"])
        each = found.setdefault(component, dict.fromkeys(WORDS, 0) | {"names": {}, "skips": Counter()})
        each[outcome] += 1
        if outcome in BAD:
            each["names"].setdefault(outcome, {})[test] = reason
        elif outcome == "not reached":
            each["names"].setdefault(outcome, Counter())[without_parameters(test)] += 1
        elif outcome == "skipped":
            each["skips"][reason] += 1
    return found


def why_not(path: Path, component: str, test: str) -> str:
    """Why a test is not worth running, if it is not: too many of it, or of its component, have cost their processes."""
    own = [each for each in last(path).values() if each["component"] == component]
    gone = [each["test"] for each in own if each["lost"] or (each["outcome"] == "started" and not alive(each["pid"]))]
    same = [each for each in gone if without_parameters(each) == without_parameters(test)]
    for what, found in (("test", same), ("component", gone)):
        if len(found) >= TRIES[what]:
            return f"{TRIES[what]} of this {what} have cost their processes"
    return ""


def named(text: str, asked: Iterable[str]) -> list[str]:
    """The components asked for that a file of tests names in gpu("..."); all of them, if it names none."""
    names = re.findall(r"""\bgpu\(\s*f?["']([^"']+)["']""", text)
    found = [re.compile(".+".join(map(re.escape, re.split(r"{.*?}", name)))) for name in names]
    return [name for name in asked if not found or any(each.fullmatch(name) for each in found)]


def without_parameters(test: str) -> str:
    return test.partition("[")[0]


def passed(record: dict[str, Any]) -> bool:
    """Whether a component has passed: some of its tests did, and none did not; records of older reports too."""
    return bool(record["passed"]) and not bad(record) and not record.get("not reached")


def bad(record: dict[str, Any]) -> bool:
    """Whether a test of a component failed, crashed or took too long."""
    return any(record.get(word) for word in BAD)


def newest(runs: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The last verdict on each component: a record that says neither good nor bad is none."""
    return {name: each for run in runs for name, each in run.items() if passed(each) or bad(each)}


def told(record: dict[str, Any]) -> str:
    """ "12 passed, 1 timed out": what there is of each outcome."""
    return ", ".join(f"{record[word]} {word}" for word in WORDS if record.get(word)) or "none"


def ended(path: Path, event: dict[str, Any]) -> tuple[str, str]:
    """What has become of a test that has started, and not ended."""
    trace = Path(f"{path}.{event['pid']}")
    text = trace.read_text(errors="replace") if trace.exists() else ""
    if text:
        return "timed out" if text.startswith("Timeout") else "crashed", story(text) + event["reason"]
    return ("not reached", "") if alive(event["pid"]) else ("crashed", "its process was killed")


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
