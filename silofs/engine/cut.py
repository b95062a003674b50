"""What a commit takes: everything that was pending at one moment, and those who wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from silofs.engine.journalling import Entry
from silofs.engine.volume import VolumeState
from silofs.errors import SiloError
from silofs.layers.pending import Pending
from silofs.layers.records import Mark
from silofs.layers.transaction import WriteTxn

T = TypeVar("T")


class Batch:
    """Those who wait for one cut to be durable."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: SiloError | None = None

    def settle(self, error: SiloError | None = None) -> None:
        self.error = error
        self.done.set()


@dataclass
class Cut:
    """Everything that was pending at one moment."""

    mark: Mark
    volumes: list[VolumeState]
    pendings: list[Pending]
    length: int
    claimed: int  # of the store's space, for its writes
    grown: dict[bytes, int] = field(default_factory=dict)

    def then(self, entry: Entry, fn: Callable[[WriteTxn], T] | None) -> Callable[[WriteTxn], T | None]:
        """What its transaction does besides: times of writes, what replay goes by, then what it was asked for."""
        now = time.time_ns()

        def run(txn: WriteTxn) -> T | None:
            for pending in self.pendings:
                if txn.has_volume(pending.uuid):
                    txn.set_attr(pending.uuid, mtime_ns=now)
            txn.count(journal=entry.journal, mark=entry.mark)
            return None if fn is None else fn(txn)

        return run
