"""The model card of a PeftModel, README.md: PEFT writes it, this adds what LoRA-XS is and code that loads the adapter.

PEFT writes a card when a model is saved, and when Trainer makes the card of a training.  During `push_to_hub`
transformers then replaces that card by one that says nothing of PEFT, so both are written again before the upload.
"""

from __future__ import annotations

import json
import os
import re
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from ...files import write_atomically
from .layer import LoraXSLinearLayer
from .tuner import LoraXSModel

NAME = "README.md"
TAGS = {"lora-xs", "loraxs_kernels"}
START, END = "<!-- written by loraxs_kernels: -->", "<!-- end -->"  # what lies between is written anew at each save


def extend_cards() -> None:
    """Let every card that PEFT writes of a model with LoRA-XS adapters say so."""
    write, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str | os.PathLike) -> None:
        write(self, output_dir)
        if isinstance(self.base_model, LoraXSModel):
            _extend(self, Path(output_dir), Path(output_dir).as_posix())

    @wraps(upload)
    def _upload_modified_files(
        self: PeftModel, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(self.base_model, LoraXSModel):
            write(self, working_dir)
            _extend(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files


def _extend(model: PeftModel, folder: Path, name: str) -> None:
    """Add our tags and section to the card in a folder that PEFT has written; the adapters can be loaded by `name`."""
    card = ModelCard.load(folder / NAME)
    card.data.tags = sorted(TAGS.union(card.data.tags or ()))
    rest = re.sub(rf"\n*{re.escape(START)}.*?{re.escape(END)}\n*", "\n", card.text, flags=re.DOTALL).strip("\n")
    card.text = f"{START}\n{_section(model, name)}\n{END}\n\n{rest}\n"
    write_atomically(folder / NAME, str(card).encode())


def _section(model: PeftModel, name: str) -> str:
    first = next(iter(model.peft_config))  # any but "default" has a folder of its own
    subfolder = "" if first == "default" else f", subfolder={json.dumps(first)}"
    return "\n".join(
        [
            "# LoRA-XS adapter",
            "",
            "[LoRA-XS](https://arxiv.org/abs/2405.17604) trains one small matrix R (r x r) for each adapted weight W, "
            "in y = W x + s B R A x. A and B are frozen and come from the singular value decomposition of W. The "
            "adapter's file holds R; loading it computes A and B again from the base model's weights and checks that "
            "they are the ones that R was trained with.",
            "",
            "```python",
            "import loraxs_kernels.integrations.peft  # makes the method known to PEFT",
            "from peft import PeftModel",
            *_base(model),
            f"model = PeftModel.from_pretrained(model, {json.dumps(name)}{subfolder})",
            "```",
            "",
            "Install both packages with `pip install loraxs_kernels peft`.",
        ]
    )


def _base(model: PeftModel) -> list[str]:
    """The lines of Python that load the base model."""
    base = model.get_base_model()
    kind, config = type(base).__name__, getattr(base, "config", None)
    name = getattr(config, "_name_or_path", "")
    if not (name and type(base).__module__.startswith("transformers.")) or hasattr(config, "quantization_config"):
        return ["", "model = ...  # the base model, in the dtype and with the quantisation that it had in training"]
    options = [json.dumps(name)]
    adapted = (m for m in base.modules() if isinstance(m, LoraXSLinearLayer))
    dtypes = {recipe.weight_dtype for m in adapted for recipe in m.recipe.values()} - {None}
    if len(dtypes) == 1:
        options.append(f"dtype={json.dumps(dtypes.pop())}")
    if "Classification" in kind and config.num_labels != 2:
        options.append(f"num_labels={config.num_labels}")
    return [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({', '.join(options)})"]
