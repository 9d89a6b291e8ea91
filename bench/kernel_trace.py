"""What the programs of a kernel that hangs are at, told by a core that was built with LORAXS_TRACE=1 (csrc/trace.h).

bench/recorder.py calls `begin` before the tests, and `story` shortly before the limit of a test.
"""

from __future__ import annotations

import mmap
from types import ModuleType

import numpy as np

# Times in ns, 0: not come so far.
RECORD = np.dtype(
    [(name, np.uint32) for name in ("kernel", "program", "launch", "multiprocessor")]
    + [(name, np.uint64) for name in ("start", "waiting", "waited", "end", "tiles")]
)
KERNELS = {1: "shrink", 2: "shrink's second launch", 3: "decode", 4: "tail GEMM"}
RECORDS = 1 << 16
SHOWN = 8  # programs of a launch that did not end, and launches at the end


def begin(core: ModuleType) -> np.ndarray:
    """The records of this process's launches from now on, in memory of its own, which the GPU writes to."""
    records = np.frombuffer(mmap.mmap(-1, RECORDS * RECORD.itemsize), RECORD)  # whole pages, never moved
    core.trace(records.ctypes.data, RECORDS)
    return records


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
