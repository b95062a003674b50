"""The life of the requests that pyfuse3 does not see: taken from the extension, handled in a task each, answered.

They are outside pyfuse3's count of tasks and outside its drain, so both are looked after here: there are never more
than the kernel lets processes have in flight, and `serving` does not end before they are answered. Only those that wait
for a lock, perhaps for ever, are given up then without an answer; the kernel sends them again to the next daemon.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from pyfuse3 import FUSEError

from silofs.mount import extension, raw

log = logging.getLogger(__name__)

Handler = Callable[[raw.Request], Awaitable[bytes]]


class Answers:
    """Answers requests on the session's descriptor `fd`. `handler` gives a reply's body, or raises FUSEError."""

    def __init__(self, fd: int, handler: Handler) -> None:
        self._fd = fd
        self._handler = handler
        self._nursery: trio.Nursery | None = None
        self._running: dict[int, trio.CancelScope | None] = {}  # by number; None: it cannot be interrupted
        self._leaving = False
        extension.install(self.take)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Requests are taken inside, and answered at its end."""
        self._leaving = False
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                self._leaving = True
                for unique in self._running:
                    self._interrupt(unique)

    def take(self, message: bytes) -> bool:
        """Called by the extension inside pyfuse3's loop. What is not taken goes to libfuse, which knows an answer."""
        found = raw.parse(message)
        if found is None or self._nursery is None:
            return False
        unique, request = found
        if isinstance(request, raw.Interrupt):
            return self._interrupt(request.unique)
        # Known before its task runs: the interrupt may be the very next request.
        waits = isinstance(request, raw.SetLock) and request.wait
        self._running[unique] = trio.CancelScope() if waits else None
        self._nursery.start_soon(self._answer, unique, request)
        return True

    def _interrupt(self, unique: int) -> bool:
        """Let a request end early if it can; False when it is none of these."""
        scope = self._running.get(unique)
        if scope is not None:
            scope.cancel()
        return unique in self._running

    async def _answer(self, unique: int, request: raw.Request) -> None:
        body, error = b"", 0
        try:
            with self._running[unique] or trio.CancelScope() as scope:
                body = await self._handler(request)
        except FUSEError as refusal:
            error = refusal.errno
        finally:
            del self._running[unique]
        if scope.cancelled_caught:
            if self._leaving:
                return
            error = errno.EINTR
        try:
            os.write(self._fd, raw.reply(unique, body, error=error))
        except OSError as gone:
            if gone.errno != errno.ENOENT:  # its process was killed, or the mount is gone
                log.error("request %d could not be answered: %s", unique, gone)
