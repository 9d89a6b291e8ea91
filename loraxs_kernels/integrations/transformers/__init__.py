"""transformers' Trainer, and TRL's, on models from `attach`: checkpoints of R alone, and how far R has moved.

    trainer = Trainer(model=lx.attach(model, 16, ...), ..., callbacks=[LoraXSCallback()])
    trainer.train(resume_from_checkpoint=True)

Besides the state of optimizer, schedule and random numbers, a checkpoint then holds:

    adapter.safetensors   an adapter file, for `lx.load_adapter`
    README.md             its model card
    model.safetensors     for Trainer to resume from, by the names in the model: every tensor that training may change,
                          and a fingerprint of A and B for each module, so that R never resumes with another A and B

It has no config.json, so that from_pretrained refuses such a folder and does not make a model of R without a base.

Trainer saves by `model.save_pretrained` and loads by `model.load_state_dict`.  While training lasts both are changed,
for the checkpoints of this run only; afterwards they are as they were.
"""

from importlib.util import find_spec

if _missing := [name for name in ("transformers", "accelerate") if find_spec(name) is None]:
    raise ImportError(
        f"LoraXSCallback needs the packages transformers and accelerate: pip install {' '.join(_missing)}"
    )

from ...hub import FILE as ADAPTER_NAME
from .callback import LoraXSCallback

__all__ = ["ADAPTER_NAME", "LoraXSCallback"]
