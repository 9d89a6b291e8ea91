"""transformers' Trainer, and TRL's, on models from `attach`: checkpoints of R alone, and how far R has moved.

    trainer = Trainer(model=lx.attach(model, 16, ...), ..., callbacks=[LoraXSCallback()])
    trainer.train(resume_from_checkpoint=True)

What a checkpoint then holds beside the state of optimizer, schedule and random numbers:

    adapter.safetensors   an adapter file, for `lx.load_adapter`
    model.safetensors     what Trainer itself loads, by the names in the model: every tensor that training may change,
                          and for each module a fingerprint of A and B, so that R never resumes on another basis

and no config.json, so that from_pretrained refuses such a folder and does not make a model out of R alone.

Trainer saves and loads through `model.save_pretrained` and `model.load_state_dict`; both are taught what is above, for
the checkpoints of this run alone, and both are as they were when training ends.
"""

from .callback import LoraXSCallback
from .checkpoints import ADAPTER_NAME

__all__ = ["ADAPTER_NAME", "LoraXSCallback"]
