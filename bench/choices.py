"""The committed table of backends, loraxs_kernels/backends/choices.json, as the reports of bench/gpu_suite.py give it.

bench/render.py writes it.  A row comes from the question choice (loraxs_kernels/bench/choice.py) of a suite's report;
of several that measured one kind of call on one kind of GPU the newest counts.  A backend whose files have changed
since has no rows.
"""

from __future__ import annotations

from typing import Any

from loraxs_kernels.backends import tuned
from loraxs_kernels.backends.choice import Row
from loraxs_kernels.backends.device import Device
from loraxs_kernels.bench.choice import decide, kinds


def rows(reports: dict[str, dict[str, Any]]) -> list[Row]:
    """What the reports, {path below bench/results: report}, say together, in the order of their keys."""
    found: dict[tuple, list[Row]] = {}
    for path, data in sorted(reports.items(), key=lambda each: each[1]["date"]):
        if "tests" not in data or not data.get("kernels"):  # not the suite's, or from before there was a choice
            continue
        machine = data["machine"]
        device = Device(tuple(map(int, machine["capability"].split("."))), machine["multiprocessors"])
        measured = [row for row in data["rows"] if row["question"] == "choice"]
        kernels = {name: kernels for name, kernels in data["kernels"].items() if kernels == tuned.kernels(name)}
        if kernels:
            found |= {key: [] for key in kinds(measured, device)}  # without a winner: none, whatever was before
            for row in decide(measured, device, kernels, path):
                found[row.key].append(row)
    return [row for _, rows in sorted(found.items()) for row in rows]


def text(reports: dict[str, dict[str, Any]]) -> str:
    """The whole file."""
    return tuned.dumps({}, {"rows": [row._asdict() for row in rows(reports)]})
