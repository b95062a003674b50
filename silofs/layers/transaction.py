"""The write transaction as callers see it: everything that changes the store, over one LMDB transaction."""

from __future__ import annotations

from silofs.layers.pack import PackChanges


class RunAgain(Exception):
    """Raised by a function that has learnt what to leave out: this transaction is undone, and it runs in a new one."""


class WriteTxn(PackChanges):
    """Given to functions that `Store.submit` runs; gone when they return."""
