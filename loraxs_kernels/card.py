"""The model card beside an adapter file: README.md with the YAML front matter that Hugging Face's Hub reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .naming import kinds

NAME = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<!\.safetensors)")  # else it is a file
ABOUT = (
    "[LoRA-XS](https://arxiv.org/abs/2405.17604) fine-tunes a model by training one small matrix R (r x r) for each "
    "adapted weight W. The layer computes y = W x + s B R A x, where A and B are frozen and, by default, made from the "
    "singular value decomposition of W. The adapter's file holds R; loading it computes A and B again from the base "
    "model's weights and checks that they are the ones that R was trained with."
)
# The last line of a card, by which it is known that nobody has changed it since.
SEAL = "<!-- Written by loraxs_kernels, SHA-256 {}: a card that was edited is not replaced. -->\n"


def card(
    model: nn.Module,
    base_model: str,
    modules: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, int],
    where: str,
) -> str:
    """The text of a card.

    Args:
        model: that the adapter was trained on.
        base_model: the name that it was loaded by, or nothing.
        modules: {name of an adapted module: its rank, alpha, init and weight_dtype}.
        saved: {name of a module in modules_to_save: how many numbers it has}.
        where: what `load_adapter` is given in the example: a folder or a name on the Hub.
    """
    from . import __version__

    # A folder's name may hold line breaks or bytes that are no UTF-8; os.path.exists takes names too long for a file.
    shown = " ".join(base_model.encode(errors="replace").decode().split())
    public = base_model if HUB_ID.fullmatch(base_model) and not os.path.exists(base_model) else ""
    ranks = sorted({each["rank"] for each in modules.values()})
    scales = sorted({each["alpha"] / each["rank"] for each in modules.values()})
    facts = {
        "base model": f"[{public}](https://huggingface.co/{public})" if public else shown or "not known",
        "adapted modules": f"{len(modules)}: {kinds(modules)}",
        "rank r": ", ".join(map(str, ranks)),
        "scaling s = alpha / r": ", ".join(f"{s:g}" for s in scales),
        "A and B": ", ".join(sorted({each["init"] for each in modules.values()})),
        "parameters in R": f"{sum(each['rank'] ** 2 for each in modules.values()):,}",
        "trained whole": ", ".join(f"{name} ({n:,} numbers)" for name, n in saved.items()) or "nothing",
        "written by": f"loraxs_kernels {__version__}",
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in facts.items())]
    imports, load = base_model_code(model, base_model, {each["weight_dtype"] for each in modules.values()})
    lines = ["---", *([f"base_model: {json.dumps(public)}"] if public else []), "library_name: loraxs_kernels"]
    lines += ["tags:", "- lora-xs", "- loraxs_kernels", "---", ""]
    lines += [f"# LoRA-XS adapter{f' for {shown}' if shown else ''}", "", ABOUT, "", *table, ""]
    lines += ["## Load it", "", "```python", *imports, "import loraxs_kernels as lx", "", load]
    lines += [f"lx.load_adapter(model, {json.dumps(where)})", "```", ""]
    text = "\n".join([*lines, "Install the library with `pip install loraxs_kernels`.", ""])
    return text + SEAL.format(_digest(text))


def base_model_code(model: nn.Module, name: str, dtypes: set[str | None]) -> tuple[list[str], str]:
    """The import, if there is one, and the line of Python that make the base model.

    name: by which it was loaded, or nothing.  dtypes: of the weights that A and B were made from, as far as known.
    """
    kind, config, dtypes = type(model).__name__, getattr(model, "config", None), dtypes - {None}
    quantised = hasattr(config, "quantization_config")  # perhaps as it was loaded: A and B of others do not fit
    if not (name and type(model).__module__.startswith("transformers.")) or quantised:
        like = ", quantised as it was then" if quantised else ""
        return [], f"model = ...  # the base model that the adapter was trained on{like}"
    options = [json.dumps(name)]
    if len(dtypes) == 1:
        options.append(f"dtype={json.dumps(*dtypes)}")
    if "Classification" in kind and getattr(config, "num_labels", 2) != 2:
        options.append(f"num_labels={config.num_labels}")
    return [f"from transformers import {kind}"], f"model = {kind}.from_pretrained({', '.join(options)})"


def is_as_written(file: Path) -> bool:
    """Whether the card in a file is as `card` has made it, so that nothing is lost if it is replaced."""
    text = file.read_bytes().decode(errors="replace")
    body, _, _ = text.rpartition(SEAL.partition("{}")[0])
    return text == body + SEAL.format(_digest(body))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
