"""The `loraxs serve` command: vLLM's server with a bank, in the place of this process."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from .bank import Store
from .basis_file import read_basis
from .integrations.vllm import BANK, BASIS, TESTED, TOKEN, token

DEFAULTS = {"--max-loras": "256", "--max-cpu-loras": "1024"}
# Where VLLM_PLUGINS is unset vLLM loads all plugins of these groups, and where it is set those that it names.
GROUPS = tuple(f"vllm.{each}_plugins" for each in ("general", "io_processor", "platform", "stat_logger"))
ABOUT = f"""Serve a model and all adapters of a bank with vLLM (tested: {", ".join(TESTED)}): a request names an adapter
as its model. All other options are those of `vllm serve` and come after MODEL. If --config is not given, the defaults
here are {" ".join(f"{option} {value}" for option, value in DEFAULTS.items())}. If {TOKEN} is set in the environment, to
16 characters or more, clients that send it in the header LoraXS-Token may write adapters: POST
/v1/loraxs/adapters/NAME, with a file of lx.save_adapter as the body."""


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.allow_abbrev = ABOUT, False
    parser.usage = "loraxs serve MODEL --bank DIR [--basis FILE] [vLLM's options]"
    parser.add_argument("model", metavar="MODEL", help="name or folder of the base model, before vLLM's options")
    parser.add_argument("--bank", required=True, metavar="DIR", help="folder of the bank")
    parser.add_argument(
        "--basis", type=Path, metavar="FILE", help="basis file of loraxs init; without one A and B are computed"
    )


def command(arguments: argparse.Namespace) -> NoReturn:
    """Check what can be checked before a model is loaded, then become vLLM's server."""
    if find_spec("vllm") is None:
        raise ValueError(f"serving needs the packages vllm and lmdb: pip install vllm=={TESTED[0]} lmdb")
    token()
    Store(arguments.bank).close()
    environment = {**os.environ, BANK: os.path.abspath(arguments.bank), "VLLM_PLUGINS": _plugins()}
    if arguments.basis is not None:
        read_basis(arguments.basis)
        environment[BASIS] = os.path.abspath(arguments.basis)
    given = {each.partition("=")[0].replace("_", "-") for each in arguments.others if each.startswith("--")}
    ours = [f"{option}={value}" for option, value in DEFAULTS.items() if not given & {option, "--config"}]
    program = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments.model, "--enable-lora"]
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os.execve(sys.executable, [*program, *ours, *arguments.others], environment)


def _plugins() -> str:
    """VLLM_PLUGINS with this package's plugins in it, and with no other plugin turned off by that."""
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        names = [each.name for group in GROUPS for each in entry_points(group=group)]
    else:
        names = [each for each in named.split(",") if each]
    return ",".join(dict.fromkeys([*names, "loraxs"]))
