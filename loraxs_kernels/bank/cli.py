"""The `loraxs bank` commands."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

from .. import adapter_file
from ..export_cli import model_of
from ..files import named
from ..hub import FILE, local_file
from .adapter_bank import AdapterBank


def add_bank(parser: argparse.ArgumentParser) -> None:
    """Add the commands, with the function that runs each as `act`."""
    commands = parser.add_subparsers(dest="action", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.add_argument("bank", help="folder of the bank")
        added.set_defaults(act=globals()[f"_{name}"])
        return added

    create = add("create", "make an empty bank for a model, with the modules, ranks and alphas of an adapter")
    create.add_argument("--model", required=True, help="folder of a transformers model")
    create.add_argument("--adapter", required=True, help="a file or folder of lx.save_adapter for it")
    create.add_argument("--dtype", metavar="DTYPE", default="float32", help="the dtype of R: float32 or bfloat16")
    adding = add("add", "store adapters by the names of their files without .safetensors, all of them or none")
    adding.add_argument("files", nargs="+", help="adapter files, folders of them or of lx.save_adapter")
    adding.add_argument("--replace", action="store_true", help="adapters of the same names")
    add("list", "print the names of the adapters, one a line, as JSON if one has control characters")
    add("verify", "read every adapter; exit 1 if one is damaged")
    export = add("export", "write an adapter to a file for lx.load_adapter")
    export.add_argument("name")
    export.add_argument("-o", "--out", type=Path, required=True, help="the file to write, *.safetensors")
    add("remove", "delete an adapter").add_argument("name")


def command(arguments: argparse.Namespace) -> None:
    """Run `loraxs bank`; an unknown name is an error in one line like any other."""
    try:
        arguments.act(arguments)
    except KeyError as error:
        raise ValueError(error.args[0]) from error


def _create(arguments: argparse.Namespace) -> None:
    adapter = local_file(named(arguments.adapter, "adapter", "an adapter"))
    folder = named(arguments.model, "model", "a model")
    model = model_of(folder, adapter, "lx.AdapterBank.create(BANK, model)")
    adapter_file.load_adapter(model, adapter, progress=False)
    with AdapterBank.create(arguments.bank, model, dtype=arguments.dtype) as bank:
        print(f"{arguments.bank}: a bank for {len(bank.modules)} modules, {bank.size:,} numbers an adapter")


def _add(arguments: argparse.Namespace) -> None:
    files = [each for path in arguments.files for each in _files(named(path, "files", "adapters"))]
    with AdapterBank(arguments.bank, "a") as bank:
        pairs = ((file.name.removesuffix(".safetensors"), file) for file in files)
        count = bank.add_many(pairs, replace=arguments.replace)
    print(f"{arguments.bank}: {count} adapters added")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (files := sorted(path.glob("*.safetensors"))):
        raise ValueError(f"files: the folder {path} has no *.safetensors")
    if files == [path / FILE]:  # the folder is one of save_adapter
        return [Path(os.path.abspath(path))]
    if others := sorted({*path.iterdir()} - {*files}):
        what = f"{len(others)} not named *.safetensors left out, the first {others[0].name!r}"
        warnings.warn(f"files: of {path}, {what}", stacklevel=2)
    return files


def _list(arguments: argparse.Namespace) -> None:
    with AdapterBank(arguments.bank) as bank:
        for name in bank:
            print(name if name.isprintable() else json.dumps(name))  # a line for each


def _verify(arguments: argparse.Namespace) -> None:
    with AdapterBank(arguments.bank) as bank:
        if wrong := bank.verify():
            more = f"; {len(wrong)} are damaged in all: {', '.join(map(repr, wrong))}" if len(wrong) > 1 else ""
            raise ValueError(f"{next(iter(wrong.values()))}{more}")
        print(f"{arguments.bank}: {len(bank)} adapters, all whole")


def _export(arguments: argparse.Namespace) -> None:
    with AdapterBank(arguments.bank) as bank:
        bank.export(arguments.name, arguments.out)


def _remove(arguments: argparse.Namespace) -> None:
    with AdapterBank(arguments.bank, "a") as bank:
        bank.remove(arguments.name)
