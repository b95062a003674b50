"""Where an export writes and an import reads one byte after the other: files, pipes, sockets, block devices.

A reader or writer at the other end that is slow, or stands still, does not keep a cancelled transfer alive: nothing
here blocks for longer than a moment.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable
from typing import Final

from silofs.errors import Interrupted, StoreFull, UserError
from silofs.images import Cancelled

POLL_MS: Final = 200
PIPE_BYTES: Final = 4096  # a pipe that can be written to takes this many bytes without blocking (pipe(7), PIPE_BUF)


def nothing() -> None:
    pass


class Sink:
    """Writes to a descriptor that may be a pipe. `idle` is called now and then while nobody reads there."""

    def __init__(self, fd: int, cancelled: Cancelled, *, idle: Callable[[], None] = nothing) -> None:
        self._fd = fd
        self._cancelled = cancelled
        self._idle = idle
        mode = os.fstat(fd).st_mode
        self._waits = not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))

    def write(self, data: bytes | memoryview) -> None:
        """All of it. Raises Interrupted, StoreFull, UserError when nobody reads any more, OSError."""
        view = memoryview(data)
        try:
            while view:
                if self._cancelled():
                    raise Interrupted("the export was stopped")
                if self._waits:
                    if not _ready(self._fd, select.POLLOUT):
                        self._idle()
                        continue
                    view = view[os.write(self._fd, view[:PIPE_BYTES]) :]
                else:
                    view = view[os.write(self._fd, view) :]
        except BrokenPipeError as error:
            raise UserError("whoever reads the export has gone away", hint="look at what the pipe leads to") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StoreFull("no room for the export", hint="make room where it goes") from error
            raise


class Source:
    """Reads a descriptor that may be a pipe. `idle` is called now and then while nothing comes."""

    def __init__(self, fd: int, cancelled: Cancelled) -> None:
        self.cancelled = cancelled  # replaced, as `idle` is, by whoever goes on with it
        self.idle: Callable[[], None] = nothing
        self._fd = fd

    def read(self, length: int) -> bytes:
        """So many bytes, fewer only at the end. Raises Interrupted."""
        parts: list[bytes] = []
        while length:
            if self.cancelled():
                raise Interrupted("the import was stopped")
            if not _ready(self._fd, select.POLLIN):
                self.idle()
                continue
            part = os.read(self._fd, length)
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _ready(fd: int, event: int) -> bool:
    """Whether a descriptor can be read or written, or has come to its end; waits a moment for it."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(POLL_MS))
