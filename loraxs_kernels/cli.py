"""The `loraxs` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run `loraxs info`, `demo`, `bench`, `roofline` or `tune`; returns the exit status."""
    from .bench import BenchError, command, tune

    parser = argparse.ArgumentParser(prog="loraxs", description="Fast LoRA-XS for PyTorch and Hugging Face models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, which backends can run here, and why not")
    demo = commands.add_parser("demo", help="fine-tune a real model on real questions, offline")
    demo.add_argument("--model", choices=("minilm", "smollm2"), default="minilm")
    length = demo.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewer steps and rows of the table, under a minute")
    length.add_argument("--full", action="store_true", help="three seeds")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the plot, the report, the adapter")
    demo.add_argument("--device", default=None, help="default: the GPU where there is one, else the CPU")
    command.add_bench(commands.add_parser("bench", help="time LoRA-XS layers and their neighbours, side by side"))
    command.add_roofline(commands.add_parser("roofline", help="what bandwidth and flops alone allow, path by path"))
    tune.add_tune(commands.add_parser("tune", help="find the fastest tiles of the Triton kernels for this GPU"))
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        from .info import info

        for key, value in info().items():
            print(f"{key:16} {value}")
        return 0
    from . import demo as demos

    try:
        if arguments.command == "bench":
            return command.bench(arguments)
        if arguments.command == "roofline":
            return command.show_roofline(arguments)
        if arguments.command == "tune":
            return tune.tune(arguments)
        demos.run(arguments.model, arguments.out, arguments.quick, arguments.full, arguments.device)
    except (demos.DemoError, BenchError) as error:
        print(f"loraxs {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0
