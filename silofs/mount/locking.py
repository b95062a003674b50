"""fcntl(2) locks of a mount: the table of them outlives the daemon (silofs/layers/locks.py), who waits is known here.

A request that has to wait for a lock is answered when it has it, or with EINTR when the kernel says that a signal
came for its process. When the daemon ends it is not answered at all: the kernel sends it again, and it waits in the
next one.
"""

from __future__ import annotations

import errno

import trio
from pyfuse3 import FUSEError

from silofs.layers.locks import UNLOCK, LockTable
from silofs.mount import raw


class Locking:
    """Takes the place of whoever was told when locks of the table go."""

    def __init__(self, table: LockTable) -> None:
        self._table = table
        self._released = trio.Event()
        table.released = self._wake

    def _wake(self) -> None:
        released, self._released = self._released, trio.Event()
        released.set()

    def test(self, lock: raw.Lock) -> bytes:
        """F_GETLK: the reply's body, a lock in the way or none."""
        found = self._table.test(lock.fh, lock.owner, lock.start, lock.end, lock.kind)
        if found is None:
            return raw.found_lock(lock.start, lock.end, UNLOCK, 0)
        return raw.found_lock(found.start, found.end, found.kind, found.pid)

    async def set(self, lock: raw.Lock, *, wait: bool) -> None:
        """F_SETLK, F_SETLKW: FUSEError EAGAIN when another has it and nobody waits; NoLocks when the table is full.

        Nobody looks for processes that wait for each other: that is left to whoever interrupts them.
        """
        while self._table.set(lock.fh, lock.owner, lock.start, lock.end, lock.kind, lock.pid) is not None:
            if not wait:
                raise FUSEError(errno.EAGAIN)
            await self._released.wait()
