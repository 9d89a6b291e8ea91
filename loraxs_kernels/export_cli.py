"""The `loraxs export` command: an adapter for software that does not know LoRA-XS."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from torch import nn

from . import adapter_file, adapter_format
from .files import named
from .hub import local_file
from .integrations.reference_repo import export_as_lora
from .model import detach
from .naming import first_line

TASKS = {  # by the end of the name of the model's class; AutoPeftModel asks for it
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# The ends of the names of files that a merged model does not take over: other weights, and what is said of them.
LEFT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json", "README.md")


def add_export(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loraxs export`."""
    parser.add_argument("model", help="folder of the transformers model that the adapter was trained on")
    parser.add_argument("adapter", help="a file or folder of lx.save_adapter, or user/name on the Hub")
    parser.add_argument("-o", "--out", required=True, help="the folder to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dtype", metavar="DTYPE", help="of lora_A and lora_B, such as bfloat16; default: float32")
    how.add_argument("--merge", action="store_true", help="write the whole model, merged, and its tokenizer instead")


def command(arguments: argparse.Namespace) -> None:
    """Write an adapter as LoRA or, merged, as a model; a failure leaves `out` as it was."""
    out = named(arguments.out, "out", "a folder")
    adapter = local_file(named(arguments.adapter, "adapter", "an adapter"))
    if arguments.merge and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out: {out} is there already, must be a new or empty folder")
    folder = named(arguments.model, "model", "a model")
    then = "lx.detach(model, merge=True)" if arguments.merge else "export_as_lora(model, FOLDER)"
    model = model_of(folder, adapter, then)
    adapter_file.load_adapter(model, adapter, progress=False)
    if arguments.merge:
        _save_merged(model, folder, out)
        print(f"{out}: the model with the adapter merged into it")
    else:
        task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
        export_as_lora(model, out, dtype=arguments.dtype, task_type=task)
        print(f"{out}: the adapter as LoRA")


def _save_merged(model: nn.Module, folder: Path, out: Path) -> None:
    """The merged model, and the other files of its folder (tokenizer, chat template), in one step."""
    detach(model, merge=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".loraxs-") as temporary:
        new = Path(temporary, "new")
        model.save_pretrained(new)
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith(LEFT) and not (new / file.name).exists():
                shutil.copy(file, new / file.name)
        if out.exists():
            out.rmdir()  # it is empty
        new.rename(out)


def model_of(folder: Path, adapter: Path, then: str) -> nn.Module:
    """The model in a folder, of the class that its config.json names, in the dtype that the adapter was trained in.

    then: what to do in Python after lx.load_adapter(model, ADAPTER), for the error.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("reading a model needs the package transformers: pip install transformers") from error
    entries, _, _ = adapter_format.read(adapter)
    dtypes = {entry["recipe"].weight_dtype for entry in entries.values()} - {None}
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(transformers, config.architectures[0])
        return kind.from_pretrained(folder, dtype=dtypes.pop() if len(dtypes) == 1 else "auto", local_files_only=True)
    except Exception as error:  # there are many kinds, as for `loraxs params`
        raise ValueError(
            f"model: {folder} cannot be loaded as a transformers model ({first_line(error)}); in Python: load it, then "
            f"lx.load_adapter(model, ADAPTER) and {then}"
        ) from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
