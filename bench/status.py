"""Which component last passed its tests on a GPU, and whether its files have changed since: STATUS.md.

A component is what the tests marked `gpu("<component>")` test.  bench/gpu_suite.py notes in its report what became of
them (bench/outcomes.py), and a hash of the component's files; STATUS.md is rendered from all reports by
bench/render.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import outcomes

from loraxs_kernels.backends.cuda import core

ROOT = Path(__file__).parents[1]
FIRST_LIGHT, SANITIZER = "first light", "compute-sanitizer"  # which gpu_suite runs first and last


def _package(*names: str) -> list[str]:
    return [f"loraxs_kernels/{name}" for name in names]


# Its files or folders, and what is known of it beyond its tests.
COMPONENTS = {
    FIRST_LIGHT: (
        [*_package("backends/cuda", "backends/triton", "backends/device.py"), "csrc"],
        "every kernel on small problems; a wrong result names the element that was read. Reports to 2026-11-27 have it "
        "as `ladder`, which ran in processes of its own",
    ),
    "torch backend": (
        _package("backends/torch.py", "ops.py", "functional.py", "route.py", "together.py"),
        "on CUDA it uses `torch.mm(..., out_dtype=float32)`, which no CPU test reaches",
    ),
    "triton backend": (
        _package("backends/triton", "backends/device.py", "padding.py"),
        "interpreted and compiled ahead of time on a CPU; its tiles are counted, not measured; never run on an AMD GPU",
    ),
    "cuda backend": (
        [*_package("backends/cuda", "backends/device.py"), "csrc"],
        "on Hopper; for other GPUs compiled (sm_80), and shrink and decode emulated on a CPU",
    ),
    "adapter bank": (
        _package("indexed.py", "bank", "backends/triton_indexed"),
        "its kernels interpreted and compiled ahead of time on a CPU, their costs counted",
    ),
    "truncated_svd": (
        _package("svd.py", "svd_math.py", "exact_matmul.py", "rademacher.py", "factors.py", "upload.py"),
        "split products, groups, streams from the host, several GPUs",
    ),
    "adapter files": (
        _package(
            "adapter_file.py", "adapter_contents.py", "adapter_format.py", "acceptance.py", "basis.py", "recipe.py"
        ),
        "across devices",
    ),
    "neighbours": (_package("integrations"), "PEFT's method, Trainer's checkpoints, the reference implementation"),
    "parallel": (
        _package("parallel.py"),
        "tensor parallelism and FSDP2 with several ranks: on CPUs alone, by gloo; a test marked `gpu` has one rank. "
        "NCCL between GPUs has not been tried",
    ),
    "demo": (_package("demo"), ""),
    "bench": (_package("bench", "tuning"), "CUDA events, graph mode, kernel counts, ceilings"),
    SANITIZER: (
        [*_package("backends", "padding.py"), "csrc"],
        "NVIDIA's memcheck, initcheck and, where TMA is not used, racecheck, over one small run of every kernel",
    ),
}


def sources(component: str) -> str:
    """A hash of the component's files."""
    digest = hashlib.sha256()
    for name in COMPONENTS[component][0]:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_dir() and file.suffix not in (".pyc", ".so"):
                digest.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def unchanged(component: str, report: dict[str, Any]) -> bool:
    """Whether the component's files are those that the report's tests ran on; of a core also how it was compiled."""
    compiled = report.get("build", {}).get("sources") if "csrc" in COMPONENTS[component][0] else None
    return report["tests"][component]["sources"] == sources(component) and compiled in (None, core.sources())


def render(reports: dict[str, dict[str, Any]]) -> str:
    """STATUS.md from every report, {path below bench/results: report}."""
    lines = []
    for component, (files, note) in COMPONENTS.items():
        where = ", ".join(f"`{name}`" for name in files)
        lines.append(f"| {component} ({where}) | {_state(component, reports)} | {note} |")
    body = "\n".join(lines)
    return f"""# What has run on a GPU

Made by bench/render.py from the reports of bench/gpu_suite.py; never edited. A component has passed when all its tests
marked `gpu` have: none failed, crashed, took longer than its limit or was not reached. What has not run on a GPU may
not work on one.

| component | on a GPU | note |
|---|---|---|
{body}
"""


def _state(component: str, reports: dict[str, dict[str, Any]]) -> str:
    runs = [(data["date"], path, data) for path, data in reports.items() if component in data.get("tests", {})]
    records = [(path, data, data["tests"][component]) for _, path, data in sorted(runs, key=lambda run: run[0])]
    ran = [each for each in records if any(each[2].get(word) for word in ("passed", *outcomes.BAD))]
    if not ran:
        last = records[-1][2] if records else {}
        why = ("; ".join(last.get("skips", ())) or outcomes.told(last)) if last else ""
        return f"**not yet run on a GPU**{why and ': '}{why.replace('|', '/')}"
    path, data, last = ran[-1]
    at = f"{data['date'][:10]}, commit {data['commit']}, {data['machine']['device']} (`{path}`)"
    if not outcomes.passed(last):
        good = [f"{data['date'][:10]}, commit {data['commit']}" for _, data, each in ran if outcomes.passed(each)]
        passed = f"last passed {good[-1]}" if good else "never passed"
        what = "failed" if outcomes.bad(last) else "not finished"
        return f"**{what}**: {outcomes.told(last)}, {at}; {passed}"
    stale = "" if unchanged(component, data) else "; **stale: its files have changed since; not run on a GPU so**"
    skipped = f" ({last['skipped']} skipped)" if last.get("skipped") else ""
    return f"passed all {last['passed']}{skipped}, {at}{stale}"
