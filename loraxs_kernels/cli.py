"""The `loraxs` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import nn

from . import __version__, demo, hub
from .bench import BenchError
from .demo import DemoError
from .files import read_json
from .naming import FLOATS, as_dtype, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .accounting import Parameters


MOST_ADAPTERS = 10**15
MOST_LAYERS = 10**5  # or labels
_DTYPES = "bfloat16, float16, float32 or float64, or bf16 and so on"
_SEVERAL_NAMES = {"nargs": "+", "action": "extend", "metavar": "NAME"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands (`loraxs --help` lists them); returns the status.

    0: all went well.  1: an error, told in one line on stderr.  130: stopped by Ctrl-C.  141: the reader of the output
    has gone, as in `loraxs params ... | head -1`; nothing is printed, and shells report the same number, 128 + SIGPIPE,
    for `cat` and `grep`, so that scripts need no special case.  Wrong usage ends by argparse's SystemExit, with 2.  An
    exception of any other kind is a mistake in this program and comes out with its traceback.
    """
    output = None if sys.stdout is None else _Output(sys.stdout)
    command = "loraxs"
    try:
        with redirect_stdout(output):
            try:
                arguments = _arguments(sys.argv[1:] if argv is None else list(argv))
                command = f"loraxs {arguments.command}"
                return arguments.run(arguments) or 0
            finally:
                if output is not None:
                    output.flush()
    except KeyboardInterrupt:
        return _failed(command, "stopped", 130)
    except (DemoError, BenchError) as error:  # may go on for more lines with what to type
        return _failed(command, str(error), 1)
    except OSError as error:
        if error.filename == _Output.NAME:
            output.close()
            if isinstance(error, BrokenPipeError):
                return 141
        what = error.filename2 or error.filename
        return _failed(command, _line(f"{what}: {error.strerror}" if what else error), 1)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _failed(command, _line(f"out of memory: {error}"), 1)
    except (ValueError, ImportError) as error:
        if isinstance(error, ImportError) and error.name is not None:  # raised by Python: a broken import
            raise
        return _failed(command, _line(error), 1)  # an ImportError of this package says which package to install


class _Output:
    """A stream as all commands print to it: what it cannot encode is escaped, and its errors name standard output."""

    NAME = "standard output"

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None  # the last one, which `flush` raises again if a caller swallowed it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        return self._named(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        self._named(self.stream.flush)
        if self.error is not None:
            raise self.error

    def _named(self, call: Callable[..., Any], *arguments: str) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            error.filename, self.error = self.NAME, error
            raise

    def close(self) -> None:
        """Discard what is still buffered, so that Python does not try and fail to write it when it ends."""
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _failed(command: str, message: str, status: int) -> int:
    if sys.stderr is not None:
        with suppress(OSError):  # there is nowhere left to say so
            print(f"{command}: {message}", file=_Output(sys.stderr), flush=True)
    return status


def _arguments(argv: list[str]) -> argparse.Namespace:
    """What was typed; as `others` what `loraxs serve` does not know, which is for vLLM, in its order."""
    parser = _parser()
    end = argv.index("--") if argv[:1] == ["serve"] and "--" in argv else len(argv)
    arguments, others = parser.parse_known_args(argv[:end])
    arguments.others = others + argv[end:]
    if others and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others and argv.index(others[0]) < argv.index(arguments.model):
        parser.error(f"serve: MODEL must come before vLLM's options, got {others[0]} first")
    return arguments


def _parser() -> argparse.ArgumentParser:
    """The arguments of every command, and as `run` the function that runs it and returns a status other than 0."""
    from . import export_cli, serve_cli
    from .bank import cli as bank_cli
    from .bench import command
    from .tuning import command as tune

    parser = argparse.ArgumentParser(prog="loraxs", description="Fast LoRA-XS for PyTorch and Hugging Face models")
    parser.add_argument("--version", action="version", version=f"loraxs_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary)
        added.set_defaults(run=run)
        return added

    add("info", _info, "what is installed, which backends can run here, and why not")
    _add_init(add("init", _init, "compute A and B of a checkpoint, for attach(..., basis=FILE)"))
    _add_inspect(add("inspect", _inspect, "say what an adapter file, a basis file or a bank holds; no model is needed"))
    export_cli.add_export(add("export", _export, "write an adapter as plain LoRA, or merged into its model"))
    bank_cli.add_bank(add("bank", _bank, "very many adapters of one model, by name, in a folder"))
    serve_cli.add_serve(add("serve", serve_cli.command, "serve a model with all adapters of a bank, by vLLM"))
    _add_params(add("params", _params, "count what LoRA-XS trains on a model, beside LoRA and VeRA"))
    _add_demo(add("demo", _demo, "fine-tune a real model on real questions, offline"))
    command.add_bench(add("bench", command.bench, "time LoRA-XS layers and their neighbours, side by side"))
    command.add_roofline(add("roofline", command.show_roofline, "what bandwidth and flops alone allow, path by path"))
    tune.add_tune(add("tune", _tune, "measure which backend is fastest where on this GPU, and use it from then on"))
    return parser


def _info(arguments: argparse.Namespace) -> None:
    from .info import info

    for key, value in info().items():
        print(f"{key:16} {value}")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=("minilm", "smollm2"), default="minilm")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewer steps and rows of the table, about a minute")
    length.add_argument("--full", action="store_true", help="three seeds")
    add("--many", action="store_true", help="1,000 adapters in one bank, mixed in batches (minilm)")
    add("--out", type=Path, default=Path("demo-out"), help="folder for the plot, the report, the adapter")
    add("--device", default=None, help="default: the GPU where there is one, else the CPU")


def _demo(arguments: argparse.Namespace) -> None:
    demo.run(arguments.model, arguments.out, arguments.quick, arguments.full, arguments.device, arguments.many)


def _add_init(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="folder of a model with *.safetensors, or one such file")
    add("-r", "--rank", type=int, required=True)
    add("-o", "--out", type=Path, required=True, help="the basis file to write, *.safetensors")
    _add_modules(parser)
    add("--seed", type=int, default=0)
    add("--n-iter", type=int, help="iterations of the SVD; default: by rank and shape")
    add("--dtype", metavar="DTYPE", help=f"dtype of A and B: {_DTYPES}; default: the weight's")
    loaded = f"dtype in which the model will be loaded: {_DTYPES}; default: as the weights are stored"
    add("--weight-dtype", metavar="DTYPE", help=loaded)
    add("--device", nargs="+", action="extend", help="one or several; default: all GPUs, else the CPU")
    add("--workspace-gib", type=float, metavar="GIB", default=4.0, help="memory of the SVD on each GPU (default: 4)")
    add("--workspace", dest="workspace_gib", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_modules(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "names or their endings; default: all linear layers but the output embeddings"
    add("--target-modules", **_SEVERAL_NAMES, help=what)
    add("--exclude-modules", **_SEVERAL_NAMES, help="names or name endings to leave out")


def _targets(arguments: argparse.Namespace) -> str | list[str]:
    targets = arguments.target_modules or ["all-linear"]
    return "all-linear" if targets == ["all-linear"] else targets


def _init(arguments: argparse.Namespace) -> None:
    from .basis_file import make_basis

    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    with _told_in_lines("loraxs init"):
        names = make_basis(
            arguments.model,
            arguments.rank,
            arguments.out,
            target_modules=_targets(arguments),
            exclude_modules=arguments.exclude_modules,
            seed=arguments.seed,
            n_iter=arguments.n_iter,
            dtype=arguments.dtype,
            weight_dtype=arguments.weight_dtype,
            device=arguments.device or there,
            workspace_gib=arguments.workspace_gib,
        )
    print(f"{arguments.out}: A and B of {len(names)} modules, {_binary(arguments.out.stat().st_size)}")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="an adapter: a file, its folder or user/name on the Hub; a basis file; a bank")
    parser.add_argument("--revision", help="a branch, tag or commit of a repository on the Hub")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")


def _inspect(arguments: argparse.Namespace) -> None:
    from .inspection import as_text, inspected

    found = inspected(arguments.path, arguments.revision)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(as_text(found)))


def _export(arguments: argparse.Namespace) -> None:
    from . import export_cli

    with _told_in_lines("loraxs export"), _quiet_transformers():
        export_cli.command(arguments)


def _bank(arguments: argparse.Namespace) -> None:
    from .bank import cli as bank_cli

    loads_a_model = arguments.action == "create"  # or transformers, which takes a second to import, is not needed
    with _told_in_lines("loraxs bank"), _quiet_transformers() if loads_a_model else nullcontext():
        bank_cli.command(arguments)


def _add_params(parser: argparse.ArgumentParser) -> None:
    from .bench.shapes import MODELS

    add, known = parser.add_argument, ", ".join(MODELS)
    add("--model", required=True, help=f"{known}; or a folder with a config.json, such a file, or a name on the Hub")
    add("-r", "--rank", type=int, nargs="+", action="extend", required=True, metavar="R")
    _add_modules(parser)
    add("--modules-to-save", **_SEVERAL_NAMES, help="modules that train whole beside any method")
    add("--adapters", type=int, default=1, metavar="N", help="also the bytes of that many adapters")
    add("--dtype", metavar="DTYPE", default="bfloat16", help=f"dtype of the numbers in a file: {_DTYPES}")


def _params(arguments: argparse.Namespace) -> None:
    from .accounting import count_parameters

    dtype = as_dtype("dtype", arguments.dtype, FLOATS)
    if not 1 <= arguments.adapters <= MOST_ADAPTERS:
        raise ValueError(f"adapters: got {arguments.adapters}, must be from 1 to {MOST_ADAPTERS}")
    modules = {"target_modules": _targets(arguments), "exclude_modules": arguments.exclude_modules}
    with _model_of(arguments) as model:
        counts = {
            r: count_parameters(model, r, **modules, modules_to_save=arguments.modules_to_save) for r in arguments.rank
        }
    print("\n".join(_params_table(arguments.model, counts, dtype, arguments.adapters)))


def _tune(arguments: argparse.Namespace) -> None:
    from .bench.shapes import MODELS
    from .tuning.command import RANKS, command
    from .tuning.model import of_model

    shapes = None
    if arguments.model not in (None, *MODELS) and not arguments.shape:
        with _model_of(arguments) as model:
            shapes = of_model(model, arguments.rank or RANKS).shapes
    command(arguments, shapes)


@contextmanager
def _model_of(arguments: argparse.Namespace) -> Iterator[nn.Module]:
    """The model that --model names, on the meta device, for a block whose warnings and errors are about its layers."""
    from .accounting import from_config

    with _quiet_transformers():
        model = from_config(_configuration(arguments.model))
    with _told_in_lines(f"loraxs {arguments.command}"):
        try:
            yield model
        except TypeError as error:  # a target is no linear layer, or none can be adapted: a wrong argument, like others
            raise ValueError(str(error)) from error


@contextmanager
def _told_in_lines(command: str) -> Iterator[None]:
    """Each warning once, as one line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in caught):
                print(f"{command}: {text}", file=sys.stderr)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings, which are about running a model; from its errors one line is made."""
    if find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _configuration(name: str) -> PretrainedConfig:
    """The configuration of a model: by a known name, a folder, a config.json or a name on the Hub; else ValueError."""
    from .bench.shapes import MODELS

    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError("model: reading one needs the package transformers: pip install transformers") from error
    if name in MODELS:
        return AutoConfig.for_model(MODELS[name].model_type, **MODELS[name].config)
    try:
        path = Path(name) if os.path.exists(name) else hub.download(name, "config.json")
        path = path / "config.json" if path.is_dir() else path
        _check_config(path)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # there are many kinds: no such file, no such name, no network, no JSON, no model_type
        raise ValueError(
            f"model: got {name!r}, must be one of {', '.join(MODELS)}, a folder with a config.json, such a file, or a "
            f"name on Hugging Face's hub: {first_line(error)}"
        ) from error


def _check_config(path: Path) -> None:
    """Refuse a config.json that is no JSON object, or of so many layers or labels that they would fill the memory."""
    config = read_json(path.read_bytes(), str(path))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if ("layer" in key or "label" in key) and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"{path}: {key} is {value}, must be at most {MOST_LAYERS}")


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
    layers = " to ".join(map(str, sorted({each.modules for each in counts.values()})))
    yield f"{name}: {count.base:,} parameters, {layers} linear layers adapted"
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
