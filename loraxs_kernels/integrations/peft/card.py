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

from ...adapter_contents import base_model
from ...card import ABOUT, NAME, base_model_code
from ...files import write_atomically
from .layer import LoraXSLinearLayer
from .tuner import LoraXSModel

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
    base = model.get_base_model()
    adapted = (m for m in base.modules() if isinstance(m, LoraXSLinearLayer))
    imports, load = base_model_code(
        base, base_model(base), {r.weight_dtype for m in adapted for r in m.recipe.values()}
    )
    return "\n".join(
        [
            "# LoRA-XS adapter",
            "",
            ABOUT,
            "",
            "```python",
            "import loraxs_kernels.integrations.peft  # makes the method known to PEFT",
            "from peft import PeftModel",
            *imports,
            "",
            load,
            f"model = PeftModel.from_pretrained(model, {json.dumps(name)}{subfolder})",
            "```",
            "",
            "Install both packages with `pip install loraxs_kernels peft`.",
        ]
    )
