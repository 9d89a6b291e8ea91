"""Adapter banks: very many adapters on one base model, mixed in one batch.

adapter_bank.py    AdapterBank: put on a model, adapters selected for each sample of a batch
layers.py          what the bank's layers and the model's call do: selections, the slots that hold R on the device
training.py        training many adapters at once
store.py           Store: adapters by name, in a folder
records.py         what a bank knows of its A and B, and the record of one adapter
environment.py     the LMDB environment of a folder, shared by processes and threads
cli.py             the command `loraxs bank`
"""

from .adapter_bank import AdapterBank
from .store import Store

__all__ = ["AdapterBank", "Store"]
