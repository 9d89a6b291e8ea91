"""The `loraxs` command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from .accounting import Parameters


def main(argv: Sequence[str] | None = None) -> int:
    """Run `loraxs info`, `init`, `params`, `demo`, `bench`, `roofline` or `tune`; returns the exit status."""
    from .bench import BenchError, command, tune

    parser = argparse.ArgumentParser(prog="loraxs", description="Fast LoRA-XS for PyTorch and Hugging Face models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, which backends can run here, and why not")
    _add_init(commands.add_parser("init", help="compute A and B of a checkpoint, for attach(..., basis=FILE)"))
    _add_params(commands.add_parser("params", help="count what LoRA-XS trains on a model, beside LoRA and VeRA"))
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
    if arguments.command == "params":
        return _params(arguments)
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
    _add_modules(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-iter", type=int, help="of the SVD; default: by rank and shape")
    parser.add_argument("--tier", choices=("standard", "precise"), default="standard", help="of the SVD")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of A and B; default: the weight's")
    parser.add_argument("--device", nargs="+", help="one or several; default: all GPUs, else the CPU")
    parser.add_argument("--workspace", type=float, metavar="GIB", default=4.0, help="on each GPU, in GiB (default: 4)")


def _add_modules(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "names or their endings; default: all linear layers but the output embeddings"
    add("--target-modules", nargs="+", metavar="NAME", help=what)
    add("--exclude-modules", nargs="+", metavar="NAME", help="names or name endings to leave out")


def _targets(arguments: argparse.Namespace) -> str | list[str]:
    targets = arguments.target_modules or ["all-linear"]
    return "all-linear" if targets == ["all-linear"] else targets


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
            target_modules=_targets(arguments),
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


def _add_params(parser: argparse.ArgumentParser) -> None:
    from .bench.shapes import MODELS

    parser.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(MODELS)}; or a folder with a config.json, such a file, or a name on Hugging Face's hub",
    )
    parser.add_argument("-r", "--rank", type=int, nargs="+", required=True, metavar="R")
    _add_modules(parser)
    parser.add_argument(
        "--modules-to-save", nargs="+", metavar="NAME", help="modules that train whole beside any method"
    )
    parser.add_argument("--adapters", type=int, default=1, metavar="N", help="also the bytes of that many adapters")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the bytes")


def _params(arguments: argparse.Namespace) -> int:
    import torch

    from .accounting import count_parameters, from_config

    try:
        if arguments.adapters < 1:
            raise ValueError(f"adapters: got {arguments.adapters}, must be at least 1")
        model = from_config(_configuration(arguments.model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            counts = {
                r: count_parameters(
                    model,
                    r,
                    target_modules=_targets(arguments),
                    exclude_modules=arguments.exclude_modules,
                    modules_to_save=arguments.modules_to_save,
                )
                for r in arguments.rank
            }
    except (ValueError, TypeError) as error:
        print(f"loraxs params: {error}", file=sys.stderr)
        return 1
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"loraxs params: {text}", file=sys.stderr)
    print("\n".join(_params_table(arguments.model, counts, getattr(torch, arguments.dtype), arguments.adapters)))
    return 0


def _configuration(name: str) -> PretrainedConfig:
    """Of a model by its name here, its folder, its config.json or its name on the hub; ValueError for anything else."""
    from .bench.shapes import MODELS

    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError("model: reading one needs the package transformers: pip install transformers") from error
    if name in MODELS:
        return AutoConfig.for_model(MODELS[name].model_type, **MODELS[name].config)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such file, no such name, no network, no JSON, no model_type
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model: got {name!r}, must be one of {', '.join(MODELS)}, a folder with a config.json, such a file, or a "
            f"name on Hugging Face's hub: {reason}"
        ) from error


def _params_table(name: str, counts: dict[int, Parameters], dtype: torch.dtype, adapters: int) -> Iterator[str]:
    from .accounting import METHODS

    head = ["r", "method", "trainable", "of the model", "an adapter"] + [f"{adapters:,} adapters"] * (adapters > 1)
    rows = [head]
    for r, count in counts.items():
        for method, title in METHODS.items():
            trainable, size = getattr(count, method), count.nbytes(dtype, method)
            rows.append([str(r), title, f"{trainable:,}", f"{trainable / count.base:.5%}", _binary(size)])
            rows[-1] += [_binary(size * adapters)] * (adapters > 1)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield f"{name}: {count.base:,} parameters, {count.modules} linear layers adapted"
    if count.saved:
        yield f"modules to save: {count.saved:,} parameters more, which train with any method and count as bytes"
    yield ""
    for cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[1] = cells[1].ljust(widths[1])
        yield "  ".join(padded)
    yield ""
    yield f"Bytes: the trained numbers in {dtype}. A file of lx.save_adapter has r + 8 fp32 numbers"
    yield "a layer besides, by which it is checked when it is loaded."


def _binary(size: int) -> str:
    """Bytes in the largest unit that leaves at least 1 before the point."""
    power = min(max(size.bit_length() - 1, 0) // 10, 5)
    return f"{size / 2 ** (10 * power):,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
