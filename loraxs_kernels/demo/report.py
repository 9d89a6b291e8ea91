"""What a demo leaves: progress lines and tables on the terminal, report.json and curves.png in the output folder.

report.json, version 1: what ran, where and when; the schedule; for each row of the table its accuracy (mean, standard
deviation and every seed's), its parameters, its training seconds, and its curves (a list for each seed: the loss of
every step, and [step, validation accuracy]); the checks of the adapter; sizes in bytes.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

from ..bench.tables import aligned
from ..files import write_atomically
from ..info import environment
from . import Settings

VERSION = 1
ADAPTER, REPORT, PLOT = "adapter.safetensors", "report.json", "curves.png"
SMOOTHING = 10  # steps over which the plotted loss is averaged
COLOURS = {
    "head": "#7f7f7f",
    "random": "#e69f00",
    "svd": "#0072b2",
    "unfused": "#000000",
    "random4": "#f3cf80",
    "svd4": "#80b8d8",
}


def say(text: str) -> None:
    """One line of progress, at once even into a pipe."""
    print(text, flush=True)


def header(settings: Settings, what: str) -> dict[str, Any]:
    """What ran, where and when."""
    return {
        "version": VERSION,
        "what": what,
        "model": settings.model,
        "length": settings.length,
        "seeds": settings.seeds,
        **environment(settings.device),
    }


def finish(report: dict[str, Any], settings: Settings) -> None:
    """Print the tables, and write the plot and the report."""
    write_atomically(settings.out / PLOT, _plot(report))
    write(report, settings)
    say("\n" + "\n\n".join([_results(report), _storage(report), _checks(report)]) + "\n")
    say(f"{report['seconds']:.0f} s in all; {REPORT}, {PLOT} and {ADAPTER} are in {settings.out}")


def write(report: dict[str, Any], settings: Settings) -> None:
    """Write report.json, with the seconds that all has taken."""
    report["seconds"] = time.perf_counter() - settings.started
    write_atomically(settings.out / REPORT, json.dumps(report, indent=1).encode())


def _results(report: dict[str, Any]) -> str:
    tests = report["questions"]["test"]
    cells = [(report["what"], f"accuracy on {tests}", "trainable", "training s")]
    for row in report["rows"].values():
        accuracy = f"{row['accuracy']:.1%}"
        if row["accuracy_std"] is not None:
            accuracy += f" +- {row['accuracy_std']:.1%}"
        parts = [f"{row['adapter_parameters']:,}"] if row["adapter_parameters"] else []
        parts += [f"{row['head_parameters']:,} head"] if row["head_parameters"] else []
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        cells.append((row["label"], accuracy, " + ".join(parts) or "-", seconds))
    return aligned(cells)


def _storage(report: dict[str, Any]) -> str:
    sizes = report["bytes"]
    content = "R, head, fingerprint" if sizes["head"] else "R, fingerprint"
    rows = {
        f"LoRA-XS adapter file ({content})": sizes["adapter_file"],
        "LoRA, same layers and rank (computed)": sizes["lora"],
        "the whole model": sizes["model"],
    }
    cells = [("a fine-tuned copy on disk", "KiB", "times")]
    cells += [(what, f"{n / 1024:,.1f}", f"{n / sizes['adapter_file']:,.1f}") for what, n in rows.items()]
    return aligned(cells)


def _checks(report: dict[str, Any]) -> str:
    lines = []
    for key, what in (("loaded", "loaded into a fresh model"), ("merged", "then merged")):
        check = report["checks"][key]
        lines.append(
            f"{what}: {check['accuracy']:.1%}, {check['different_predictions']} of {report['questions']['test']} "
            f"predictions differ, logits by up to {check['largest_logit_difference']:.1e}"
        )
    if unfused := report["checks"].get("unfused"):
        lines.append(
            f"unfused against fused: losses differ by up to {unfused['largest_loss_difference']:.1e}, "
            f"a step takes {unfused['time_ratio']:.2f} times as long (median)"
        )
    return "\n".join(lines)


def _plot(report: dict[str, Any]) -> bytes:
    """Loss and validation accuracy over the steps, of the first seed, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, row in report["rows"].items():
        if not row["loss"]:
            continue
        dashed = key == "unfused"
        style = {"color": COLOURS[key], "linestyle": (0, (4, 4)) if dashed else "-", "linewidth": 1.4 if dashed else 2}
        loss = row["loss"][0]
        smooth = [sum(loss[i - SMOOTHING : i]) / SMOOTHING for i in range(SMOOTHING, len(loss) + 1)]
        left.plot(range(SMOOTHING, len(loss) + 1), smooth, **style)
        steps, accuracy = zip(*row["validation"][0], strict=True)
        right.plot(steps, [100 * a for a in accuracy], marker="o", markersize=3, label=row["label"], **style)
    left.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHING} steps", ylim=(0, None))
    right.set(xlabel="step", ylabel="validation accuracy, %")
    for axes in (left, right):
        axes.set_xlim(0, None)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(report["what"])
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()
