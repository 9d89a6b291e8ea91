"""Adapter banks: very many adapters on one base model, mixed in one batch.

adapter_bank.py    AdapterBank: put on a model, adapters selected for each sample of a batch
slots.py           tables on the device for the R of a few adapters
selection.py       which adapter each sample uses, and which selection a layer's call belongs to
seat.py            what the bank puts on each layer
calls.py           what the call of a model with a bank does: `adapter_ids`
training.py        training many adapters at once
store.py           Store: adapters by name, in a folder
records.py         what a bank knows of its A and B, and the record of one adapter
environment.py     the LMDB environment of a folder, shared by processes and threads
cli.py             the command `loraxs bank`
"""

from .adapter_bank import AdapterBank
from .store import Store

__all__ = ["AdapterBank", "Store"]
