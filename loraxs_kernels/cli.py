"""The `loraxs` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run `loraxs info`, `init`, `demo`, `bench`, `roofline` or `tune`; returns the exit status."""
    from .bench import BenchError, command, tune

    parser = argparse.ArgumentParser(prog="loraxs", description="Fast LoRA-XS for PyTorch and Hugging Face models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, which backends can run here, and why not")
    _add_init(commands.add_parser("init", help="compute A and B of a checkpoint, for attach(..., basis=FILE)"))
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
    if arguments.command == "init":
        return _init(arguments)
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


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of a model with *.safetensors, or one such file")
    parser.add_argument("-r", "--rank", type=int, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the basis file to write, *.safetensors")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="names or their endings; default: all but embeddings",
    )
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="names or name endings to leave out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-iter", type=int, help="of the SVD; default: by rank and shape")
    parser.add_argument("--tier", choices=("standard", "precise"), default="standard", help="of the SVD")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of A and B; default: the weight's")
    parser.add_argument("--device", nargs="+", help="one or several; default: all GPUs, else the CPU")
    parser.add_argument("--workspace", type=float, metavar="GIB", default=4.0, help="on each GPU, in GiB (default: 4)")


def _init(arguments: argparse.Namespace) -> int:
    import torch

    from .basis_file import make_basis
    from .factors import compute_devices

    try:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        names = make_basis(
            arguments.model,
            arguments.rank,
            arguments.out,
            target_modules=arguments.target_modules or "all-linear",
            exclude_modules=arguments.exclude_modules,
            seed=arguments.seed,
            n_iter=arguments.n_iter,
            tier=arguments.tier,
            dtype=arguments.dtype and getattr(torch, arguments.dtype),
            devices=compute_devices(arguments.device or there),
            workspace=int(arguments.workspace * 2**30),
        )
    except (ValueError, OSError) as error:
        print(f"loraxs init: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: A and B of {len(names)} modules, {arguments.out.stat().st_size / 2**20:.1f} MiB")
    return 0
