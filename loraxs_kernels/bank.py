"""AdapterBank: very many adapters on one basis."""

from __future__ import annotations

from .bank_store import Store


class AdapterBank(Store):
    __doc__ = Store.__doc__
