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

from silofs import failpoints
from silofs.engine import Engine, VolumeState
from silofs.errors import Damaged, SiloError, Unsupported
from silofs.facts import View
from silofs.layers.handles import Handle, HandleTable
from silofs.layers.locks import LockTable
from silofs.layers.log import WriteLog
from silofs.limits import DAMAGE_TOLD_MAX, SIZE_MAX
from silofs.mount import extension, raw
from silofs.mount.extension import AT, FLAGS, HANDLE, LENGTH, OFFSET
from silofs.mount.guard import Guarded, guarded
from silofs.mount.locking import Locking
from silofs.mount.requests import Requests
from silofs.verbs import bury

log = logging.getLogger(__name__)

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # fallocate(2)
SYNC = os.O_SYNC | os.O_DSYNC


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
    locks: LockTable | None
    view: Callable[[], View]
    space: Callable[[], Space]
    before_change: Callable[[str, str], Awaitable[None]]
    requests: Requests


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
        self._log: WriteLog
        self._locking: Locking | None
        self._files: dict[int, File] = {}
        self._told: set[str] = set()
        self._request = extension.request

    def bind(self, volumes: Volumes) -> None:
        """Take the engine, and the handles that were open when the last daemon died."""
        self._volumes = volumes
        self._engine = volumes.engine
        self._log = volumes.engine.log
        self._locking = Locking(volumes.locks) if volumes.locks is not None else None
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
            served = state.served
            served.reads += 1
            served.read_bytes += len(data)
            return data  # type: ignore[return-value]  # any contiguous buffer will do
        except Exception as error:
            raise self._lost(fh, error) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            file = self._files[fh]
            sync = file.sync or self._request[FLAGS] & SYNC
            state = file.state
            if not self._engine.write_now(state, off, buf):
                await self._engine.write(state, off, buf)
            if sync and not self._engine.flush_now(state):
                await self._engine.flush(state)
            length = len(buf)
            served = state.served
            served.writes += 1
            served.written_bytes += length
            return length
        except Exception as error:
            raise self._lost(fh, error) from None

    def write_placed(self) -> bool:
        """A write whose bytes the kernel has put into the ring already, if it can be done at once; else False.

        `write` does those that are left, from a copy.
        """
        request = self._request
        try:
            file = self._files[request[HANDLE]]
            data = self._log.placed(request[AT], request[LENGTH])
            if data is None or file.sync or request[FLAGS] & SYNC:
                return False
            state = file.state
            if not self._engine.write_now(state, request[OFFSET], data, placed=True):
                return False
            served = state.served
            served.writes += 1
            served.written_bytes += len(data)
            return True
        except Exception:
            return False  # `write` meets the same, and says what it is

    def _lost(self, fh: int, error: Exception) -> FUSEError:
        """`refusal`, and EBADF for a handle that is not known: looked at only now, to keep reads and writes short."""
        file = self._files.get(fh)
        if file is None:
            return FUSEError(errno.EBADF)
        if isinstance(error, Damaged):
            self._tell(f"damaged data of {file.state.name}: {error}")
        return self.refusal(error)

    def _tell(self, damage: str) -> None:
        """Log damage, each once: a guest asks for the same page again and again."""
        if damage not in self._told and len(self._told) < DAMAGE_TOLD_MAX:
            self._told.add(damage)
            log.error(damage)

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
        failpoints.hit("release.closed")
        file = self._files.pop(fh, None)
        if file is not None:
            self._engine.closed(file.state, file.writable)
            await self._bury(file.state)
        failpoints.hit("release.done")

    async def _bury(self, state: VolumeState) -> None:
        """Delete a volume that was removed while it was open, once it is not open any more."""
        record = state.record
        if record is not None and record.orphan and not state.open_count:
            await self._engine.transact(lambda txn: bury(txn, state.uuid))

    @guarded
    async def flush(self, fh: int) -> None:
        """close(2) waits for no disk here, so the kernel need not ask: a program that starts another one closes its
        files in the child, and would hang in that while requests are held."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        state = self._file(fh).state
        if not self._engine.flush_now(state):
            await self._engine.flush(state)
        state.served.flushes += 1

    # What pyfuse3 does not know

    @guarded
    async def answer(self, request: raw.Request) -> bytes:
        match request:
            case raw.Allocate():
                await self._allocate(request)
                return b""
            case raw.Seek():
                return await self._seek(request)
            case raw.Copy():
                return await self._copy(request)
            case raw.GetLock(lock):
                return self._locks_of(lock).test(lock)
            case raw.SetLock(lock, wait):
                await self._locks_of(lock).set(lock, wait=wait)
                return b""
            case raw.Interrupt():
                raise AssertionError("an interrupt has no answer")

    def _locks_of(self, lock: raw.Lock) -> Locking:
        self._file(lock.fh)
        if self._locking is None:
            raise FUSEError(errno.ENOLCK)  # an earlier program's memfd, whose mount was never promised locks
        return self._locking

    async def _allocate(self, request: raw.Allocate) -> None:
        """EOPNOTSUPP for a mode that is not supported, and never another errno: QEMU then tries what is."""
        file = self._file(request.fh)
        if not file.writable:
            raise FUSEError(errno.EBADF)
        state, mode, end = file.state, request.mode, request.offset + request.length
        if mode == PUNCH_HOLE | KEEP_SIZE:
            await self._engine.discard(state, request.offset, request.length)
            zeroed = True
        elif mode & ~(ZERO_RANGE | KEEP_SIZE) == 0:
            extend = not mode & KEEP_SIZE
            if extend and end > state.size:
                if end > SIZE_MAX:
                    raise FUSEError(errno.EFBIG)
                await self._volumes.before_change("resize", state.name)
            zero = bool(mode & ZERO_RANGE)
            await self._engine.allocate(state, request.offset, request.length, zero=zero, extend=extend)
            zeroed = zero
        else:
            raise Unsupported(f"fallocate(2) with mode {mode:#x}")
        if zeroed:
            state.served.discards += 1
            state.served.discarded_bytes += max(0, min(end, state.size) - request.offset)

    async def _copy(self, request: raw.Copy) -> bytes:
        """EOPNOTSUPP: the kernel copies."""
        source, target = self._file(request.fh), self._file(request.to_fh)
        if not target.writable:
            raise FUSEError(errno.EBADF)
        length = min(request.length, SIZE_MAX - request.to_offset)
        if length <= 0:
            raise FUSEError(errno.EFBIG)
        if request.to_offset + length > target.state.size:
            await self._volumes.before_change("resize", target.state.name)
        done = await self._engine.copy_range(
            source.state, request.offset, target.state, request.to_offset, length
        )
        return raw.copied(done)

    async def _seek(self, request: raw.Seek) -> bytes:
        if request.whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FUSEError(errno.EINVAL)
        found = await self._engine.seek(
            self._file(request.fh).state, request.offset, data=request.whence == os.SEEK_DATA
        )
        if found is None:
            raise FUSEError(errno.ENXIO)
        return raw.found_offset(found)
