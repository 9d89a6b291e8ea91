"""The reference implementation of LoRA-XS (MohammadrezaBanaei/LoRA-XS, a patch of PEFT's LoRA layers) and plain LoRA.

    load_reference_adapter      a checkpoint of the reference, into a base model
    replace_reference_layers    a model that the reference has initialised, to LoRA-XS as a PEFT method
    export_as_lora              an adapter, to a folder that PEFT, vLLM and whatever else knows LoRA read

The reference keeps A and B in lora_A and lora_B and puts R between them, as a module of the layer that PEFT does not
know.  PEFT saves it all the same, and loads such a checkpoint without R: as LoRA with delta B A, and without a word.
"""

from .checkpoint import load_reference_adapter
from .layers import replace_reference_layers
from .lora import export_as_lora

__all__ = ["export_as_lora", "load_reference_adapter", "replace_reference_layers"]
