"""The open files of a mount: handles, and what is done through them.

Every handler turns what it raises into a FUSEError in one place (`refusal` in guard.py): a SiloError into its errno,
anything else into EIO, a log line and a counter. trio.Cancelled passes: the daemon is ending, and the kernel sends the
request again to the next one.

`read` and `write` are the hot path: one dictionary look-up, then the engine, inline. A reply is sent by pyfuse3 right
after the handler returned, with no await in between, so it may be a view of a page that the next commit frees.

A write is durable before its reply if its handle was opened O_SYNC or O_DSYNC, or if it says so itself (RWF_SYNC,
RWF_DSYNC): the kernel sends no FSYNC for those on direct_io files (docs/mount.md).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pyfuse3 import FUSEError

from silofs.engine import Engine, VolumeState
from silofs.errors import SiloError
from silofs.facts import View
from silofs.layers.handles import Handle, HandleTable
from silofs.mount import extension
from silofs.mount.guard import Guarded, guarded

log = logging.getLogger(__name__)

SYNC = os.O_SYNC | os.O_DSYNC
WRITE_FLAGS = 1  # where they are in extension.request


@dataclass(frozen=True)
class Space:
    """What statfs(2) tells, in bytes: `free` is what can still be written."""

    total: int
    free: int


@dataclass(frozen=True)
class Volumes:
    """What the operations work on; made when the store is open.

    before_change: awaited with (verb, volume's name) before a `rm`, `rename` or `resize`: a migration may refuse it.
    """

    engine: Engine
    handles: HandleTable
    view: Callable[[], View]
    space: Callable[[], Space]
    before_change: Callable[[str, str], Awaitable[None]]


class File:
    """One open handle of this mount, in this daemon."""

    __slots__ = ("state", "sync", "writable")

    def __init__(self, state: VolumeState, flags: int) -> None:
        self.state = state
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.sync = flags & SYNC


class Files(Guarded):
    """The operations that are given a handle. Made before the store is open, `bind` follows."""

    def __init__(self) -> None:
        super().__init__()
        self._volumes: Volumes
        self._engine: Engine
        self._files: dict[int, File] = {}
        self._request = extension.request

    def bind(self, volumes: Volumes) -> None:
        """Take the engine, and the handles that were open when the last daemon died."""
        self._volumes = volumes
        self._engine = volumes.engine
        for handle in volumes.handles.items():
            try:
                self._register(handle)
            except SiloError as error:
                # The volume is gone or cannot be opened: its handle answers EBADF, the others go on.
                log.error("handle %d of an earlier daemon is lost: %s", handle.id, error)

    # The hot path

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            state = self._files[fh].state
            data = self._engine.read_now(state, off, size)
            if data is None:
                data = await self._engine.read(state, off, size)
            return data  # type: ignore[return-value]  # any contiguous buffer will do
        except Exception as error:
            raise self._lost(fh, error) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            file = self._files[fh]
            sync = file.sync or self._request[WRITE_FLAGS] & SYNC
            if not self._engine.write_now(file.state, off, buf):
                await self._engine.write(file.state, off, buf)
            if sync:
                await self._engine.flush(file.state)
            return len(buf)
        except Exception as error:
            raise self._lost(fh, error) from None

    def _lost(self, fh: int, error: Exception) -> FUSEError:
        """`refusal`, and EBADF for a handle that is not known: looked at only now, to keep reads and writes short."""
        return FUSEError(errno.EBADF) if fh not in self._files else self.refusal(error)

    # Handles

    def _file(self, fh: int) -> File:
        file = self._files.get(fh)
        if file is None:
            raise FUSEError(errno.EBADF)
        return file

    def _register(self, handle: Handle) -> None:
        engine = self._engine
        state = engine.open_layer(handle.uuid, handle.layer) if handle.layer else engine.open_volume(handle.uuid)
        file = self._files[handle.id] = File(state, handle.flags)
        engine.opened(state, file.writable)

    @guarded
    async def release(self, fh: int) -> None:
        self._volumes.handles.release(fh)
        file = self._files.pop(fh, None)
        if file is not None:
            self._engine.closed(file.state, file.writable)

    @guarded
    async def flush(self, fh: int) -> None:
        """close(2) waits for no disk here, so the kernel need not ask: a program that starts another one closes its
        files in the child, and would hang in that while requests are held."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._engine.flush(self._file(fh).state)
