"""Writes and discards: admitted, logged, indexed, acknowledged. What makes them durable is in commits.py.

`write_now` does all of it in one step without an await: space and gate are looked at, the record is in the ring and the
index names it before anybody else runs. The slow path waits for what was missing (a thaw, room, a page of a peer) and
then looks at everything anew.
"""

from __future__ import annotations

import trio

from silofs.blocks import PAGE, PAGE_SHIFT, pages_for, whole_pages
from silofs.engine.commits import Commits
from silofs.engine.gather import ZEROS, Wanted
from silofs.engine.reads import Reads
from silofs.engine.volume import Gate, VolumeState
from silofs.errors import BadSize
from silofs.layers.held import BYTE_COST, WRITE_COST, worst_case
from silofs.layers.log import WriteLog
from silofs.layers.records import EXTEND, WRITE, ZERO
from silofs.limits import CROWD_BYTES, INCOMING_WRITE_WAIT_S, REQUEST_BYTES_MAX, SIZE_MAX

Data = bytes | memoryview


class Writes:
    """Mutations of volumes."""

    def __init__(self, log: WriteLog, reads: Reads, commits: Commits) -> None:
        self._log = log
        self._reads = reads
        self._commits = commits
        self.waited = 0
        self.crowding = 0  # bytes of writes that wait for room in the log, each of which is held in memory
        self._eased: trio.Event | None = None  # for who waits until they are fewer

    # The hot path

    def write_now(self, volume: VolumeState, offset: int, data: Data, *, placed: bool = False) -> bool:
        """Admit a write if nothing has to be waited for; else False, nothing has happened: await `write`.

        `placed`: the data is in the log's ring already, as `WriteLog.placed` gave it.
        """
        length = len(data)
        commits = self._commits
        if not volume.writable or offset + length > volume.size or length > REQUEST_BYTES_MAX or not length:
            return False
        if (offset | length) & (PAGE - 1) and volume.remote:
            return False
        log = self._log
        cost = length * BYTE_COST + WRITE_COST
        if not log.room(length) or (cost > commits.claims.credit and not commits.admits(cost)):
            return False
        lsn, position = log.append(
            WRITE, volume.uuid, volume.epoch, volume.last_lsn, offset, length, data, placed=placed
        )
        volume.last_lsn = lsn
        volume.pending.write(offset, position, length, lsn)
        commits.claims.credit -= cost
        commits.waiting += length
        if volume.clean or commits.waiting >= commits.kick_at:
            commits.grew(volume)
        return True

    # The slow path

    async def write(self, volume: VolumeState, offset: int, data: Data, *, sync: bool = False) -> None:
        """Admit a write of any length, growing the volume where it goes beyond the end; durable on return if `sync`.

        Each page of it is seen whole or not at all; a write longer than REQUEST_BYTES_MAX may be seen in pieces. Raises
        NotOwner, Busy, ReadOnly, StoreFull, BadSize, or what fetching a page of a peer raises; then nothing of the
        piece in hand has happened.
        """
        if offset + len(data) > SIZE_MAX:
            raise BadSize(f"{volume.name} cannot be larger than {SIZE_MAX} bytes")
        self.waited += 1
        view = memoryview(data)
        for at in range(0, len(view), REQUEST_BYTES_MAX):
            await self._piece(volume, offset + at, view[at : at + REQUEST_BYTES_MAX])
        if sync:
            await self._commits.flush(volume)

    async def _piece(self, volume: VolumeState, offset: int, data: memoryview) -> None:
        """One record's worth."""
        wanted = Wanted(offset, len(data))
        while True:
            await self.admitted(volume)
            if volume.remote and offset + len(data) > volume.size:
                # Rare, and whole pages beyond the end are not logged: grow first.
                await self._commits.resize(volume, offset + len(data))
                continue
            # From here to `_record` nothing awaits, unless it starts over.
            if (offset | len(data)) & (PAGE - 1) and volume.remote:
                whole = self._with_edges(volume, offset, data, wanted)
                if whole is None:
                    await self._reads.bring(volume, wanted)
                    continue
            else:
                whole = offset, data
            if not self._log.room(len(whole[1])):
                await self._room(len(data))
                continue
            cost = worst_case(len(whole[1]))
            if not self._commits.admits(cost):
                await self._commits.make_room(cost)
                continue
            self._record(volume, EXTEND if offset + len(data) > volume.size else WRITE, *whole)
            return

    async def _room(self, length: int) -> None:
        """Wait for a commit, which makes room in the log; raise if it fails."""
        self.crowding += length
        try:
            await self._commits.landing()
        finally:
            self.crowding -= length
            if self.crowding <= CROWD_BYTES and self._eased is not None:
                self._eased.set()
                self._eased = None

    async def eased(self) -> None:
        """Return when no more than CROWD_BYTES wait for room. They do not wait for long: a commit lands, or fails."""
        while self.crowding > CROWD_BYTES:
            if self._eased is None:
                self._eased = trio.Event()
            await self._eased.wait()

    async def admitted(self, volume: VolumeState) -> None:
        """Return when the volume's gate is open; raise when it is shut, or when the volume does not arrive in time."""
        deadline = trio.current_time() + INCOMING_WRITE_WAIT_S
        while not volume.writable:
            refusal = volume.refusal()
            if refusal is None:
                await volume.moved.wait()
                continue
            # A writer may be here a moment before the GRANT is: it stopped at the old home and went on at the new one.
            if volume.gate is not Gate.INCOMING or trio.current_time() >= deadline:
                raise refusal
            with trio.move_on_at(deadline):
                await volume.moved.wait()

    def _with_edges(
        self, volume: VolumeState, offset: int, data: memoryview, wanted: Wanted
    ) -> tuple[int, Data] | None:
        """The write, filled up with what it does not cover of pages that are still at a peer.

        A page at a peer has no bytes here that a commit could merge with, so such a write is logged as whole pages.
        None when those bytes have not come yet.
        """
        wanted.clear()
        end = offset + len(data)
        first, last = offset >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        before = after = b""
        begin = offset
        if offset & (PAGE - 1):
            page = self._reads.page_state(volume, first, wanted)
            if page is None:
                return None
            if page:
                before, begin = page[: offset & (PAGE - 1)], first << PAGE_SHIFT
        if end & (PAGE - 1):
            page = self._reads.page_state(volume, last, wanted)
            if page is None:
                return None
            if page:
                after = page[end & (PAGE - 1) :]
        if not before and not after:
            return offset, data
        return begin, b"".join((before, data, after))

    def _record(self, volume: VolumeState, kind: int, offset: int, data: Data) -> None:
        length = len(data)
        lsn, position = self._log.append(kind, volume.uuid, volume.epoch, volume.last_lsn, offset, length, data)
        volume.last_lsn = lsn
        volume.pending.write(offset, position, length, lsn)
        if kind == EXTEND:
            volume.size = volume.grown = offset + length
        self._commits.claims.credit -= worst_case(length)
        self._commits.waiting += length
        self._commits.grew(volume)

    async def discard(self, volume: VolumeState, offset: int, length: int) -> None:
        """Make a range zero and free what it holds; beyond the volume's end nothing happens.

        One record however long the range is. It needs no space to be admitted: it is how space is made.
        """
        end = min(offset + length, volume.size)
        if end <= offset:
            return
        self.waited += 1
        first, stop = whole_pages(offset, end - offset)
        if end == volume.size:
            stop = pages_for(end)  # nothing but zeros follows in the last page
        if first >= stop:
            await self._piece(volume, offset, ZEROS[: end - offset])
            return
        if offset < first << PAGE_SHIFT:
            await self._piece(volume, offset, ZEROS[: (first << PAGE_SHIFT) - offset])
        if end > stop << PAGE_SHIFT:
            await self._piece(volume, stop << PAGE_SHIFT, ZEROS[: end - (stop << PAGE_SHIFT)])
        while True:
            await self.admitted(volume)
            if self._log.room(0):
                break
            await self._commits.landing()
        start, count = first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT
        lsn, _ = self._log.append(ZERO, volume.uuid, volume.epoch, volume.last_lsn, start, count)
        volume.last_lsn = lsn
        volume.pending.zero(first, stop, lsn)
        volume.overlaid = True
        self._commits.grew(volume)

    def statistics(self) -> dict[str, int]:
        return {"waited": self.waited, "crowding": self.crowding}
