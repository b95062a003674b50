"""The requests under way that change names or attributes: which of them were done before, and when all are settled.

    with self._requests.handle(names=True) as request:  # before the handler's first await
        if request.before is not None:                   # an earlier daemon did it, and died before it answered
            return
        await engine.transact(lambda txn: (change(txn), request.note(txn, "unlink")))

Numbers come from the C extension. Without it every request is new, and what a daemon did and did not answer is done
again (docs/mount.md).

**Settled.** Until the kernel's second sending of what the last daemon left has been read and answered, a command could
come in between: remove a volume, make another of its name, and then be overtaken by a request from before. So commands
that change anything wait for `settled`: until those of these requests that change names are answered. (One that changes
a size may have to wait for a command itself, for the end of a freeze.) The kernel puts what it sends again at the head
of its queue, so all of it has been read once the queue was seen empty, or once more has been read than can have been
under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from silofs import failpoints
from silofs.layers import requests as store
from silofs.layers.catalog_reader import CatalogReader
from silofs.layers.requests import Done
from silofs.layers.transaction import WriteTxn
from silofs.limits import FUSE_MAX_TASKS
from silofs.mount.extension import RESENT

READS_AT_MOST = 4 * FUSE_MAX_TASKS  # requests under way, with the interrupts and forgets that are read among them


class Request:
    """One request. `number` is 0 where it cannot be told; `before` is what an earlier daemon did for it."""

    __slots__ = ("_mount", "answered", "before", "noted", "number")

    def __init__(self, mount: int, number: int, before: Done | None, answered: set[int]) -> None:
        self._mount = mount
        self.number = number
        self.before = before
        self.answered = answered  # numbers whose records can go
        self.noted = False

    def note(self, txn: WriteTxn, call: str, volume: bytes = b"") -> None:
        """Store in the change's own transaction that it was made; and drop what is not needed any more."""
        self.noted = True
        store.forget(txn, self.answered)
        if self.number:
            store.put(txn, self.number, Done(self._mount, call, volume))


class Requests:
    """Those of one daemon. mount: what tells this mount from others; current: the number of the request that begins."""

    def __init__(self, mount: int, current: Callable[[], int | None], txn: Callable[[], CatalogReader]) -> None:
        self.settled = trio.Event()
        self._mount = mount
        self._current = current
        self._txn = txn
        self._under_way: dict[Request, bool] = {}  # does it change names
        self._left: set[Request] | None = None  # of those that must be answered first; None: they may not all be read
        self._answered: set[int] = set()
        self._reads = 0  # of /dev/fuse

    @contextmanager
    def handle(self, *, names: bool = False) -> Iterator[Request]:
        """Around a handler, from before its first await to its answer. names: it changes one."""
        sent = self._current() or 0
        number = sent & ~RESENT
        before = store.find(self._txn(), self._mount, number) if sent & RESENT else None
        # A copy: the transaction reads it on another thread, and may do so twice.
        request = Request(self._mount, number, before, set(self._answered))
        self._under_way[request] = names
        try:
            yield request
            failpoints.hit("request.done")
            if request.noted:
                self._answered -= request.answered
                if number:
                    self._answered.add(number)  # pyfuse3 answers before any other task runs
        finally:
            # Also when it failed, which is an answer; or was cancelled, and the next daemon gets it again.
            self._leave(request)

    def _leave(self, request: Request) -> None:
        del self._under_way[request]
        if self._left is not None:
            self._left.discard(request)
            self._settle()

    def seen(self, reads: int, empty: bool) -> bool:
        """So many requests were read since the last call, and now there was none (or that was not looked at).

        True when nobody has to tell any more.
        """
        self._reads += reads
        if self._left is None and (empty or self._reads >= READS_AT_MOST):
            self._left = {request for request, names in self._under_way.items() if names}
            self._settle()
        return self._left is not None

    def _settle(self) -> None:
        if not self._left and not self.settled.is_set():
            # What earlier daemons noted and was not sent again had its answer.
            under_way = {request.number for request in self._under_way}
            self._answered |= store.remembered(self._txn()).keys() - under_way
            self.settled.set()
