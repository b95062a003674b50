"""Fsyncs by way of the journal: one durable write of what the log has and the journal has not, for all who wait.

The journal counts only in the name of a commit: `State` says which file it is and from which mark on it is replayed.
So each commit asks `entry` what to record, and tells `landed` that it has. What is durable is then everything before
that mark, and what the journal has from there on without a gap; `durable_lsn` is the end of it.

A file to which a write has failed is retired: nothing is written to it again, it stays named for as long as it holds
what no commit has, and fsyncs are commits until a new one is made and named. Where there is no room for one, or the
ring is too full of what was not journalled, they are commits as well (docs/write-path.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns
from typing import NamedTuple

import trio

from silofs.engine.alone import Alone
from silofs.engine.served import Served
from silofs.engine.threads import Threads
from silofs.layers.journal import DIRECTORY, Journal, Parts, remove_others
from silofs.layers.log import WriteLog
from silofs.layers.records import Mark, span
from silofs.layers.store import Store
from silofs.limits import IN_PLACE_BYTES, JOURNAL_BYTES, JOURNAL_RETRY_S

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What a commit records of the journal: its id, and from where it is replayed. NONE: no journal counts."""

    journal: int
    mark: Mark


NONE = Entry(0, Mark(0, 0, 0))


class Journalling:
    """The journal of a write log, as the event loop sees it. `kick`: asks for a commit, which names a new file."""

    def __init__(self, store: Store, write_log: WriteLog, threads: Threads, kick: Callable[[], None]) -> None:
        self._store = store
        self._directory = store.path / DIRECTORY
        self._log = write_log
        self._threads = threads
        self._kick = kick
        self._alone = Alone(threads.bell)
        self._file: Journal | None = None
        self._changed = trio.Event()  # it was retired, or another one named
        self._landing: trio.Event | None = None  # of the write in flight
        self.recorded = NONE
        self._end = Mark(0, 0, 0)  # what the named journal has from `recorded.mark` on, ends here
        self.durable_lsn = 0  # records below are durable
        self.absent = "it is not made yet"  # why there is none; empty while there is
        self.syncs = 0
        self.in_place = 0  # of them
        self.written = 0  # bytes
        self.failures = 0

    # At the start

    def find(self) -> int:
        """The id of the journal that an earlier daemon used for this log, 0 when there is none. Before recovery."""
        with self._store.reader() as txn:
            named = txn.state.journal
        memory = self._log.memory.superblock
        if named:
            self._file = Journal.reuse(self._directory, named, memory.secret, memory.store, memory.ring_bytes)
        return self._file.id if self._file else 0

    def recovered(self) -> None:
        """The log was replayed, and the journal that `find` found is named from its end on."""
        if self._file is not None:
            self.absent = ""
            self.landed(Entry(self._file.id, self._log.mark()))

    async def run(self) -> None:
        """Make a journal whenever there is none; for ever."""
        while True:
            if self._file is None and not await self._make():
                await trio.sleep(JOURNAL_RETRY_S)
                continue
            self._changed = trio.Event()
            await self._changed.wait()
            if self._file is None:
                await trio.sleep(JOURNAL_RETRY_S)
            else:
                kept = self.recorded.journal, self._file.id
                await self._threads.run(partial(remove_others, self._directory, *kept))

    async def _make(self) -> bool:
        memory, directory, named = self._log.memory.superblock, self._directory, self.recorded.journal

        def make() -> Journal:
            remove_others(directory, named)
            return Journal.make(directory, memory.secret, memory.store, memory.ring_bytes)

        try:
            self._file = await self._threads.run(make)
        except OSError as error:
            self.absent = f"it cannot be made: {error.strerror}"
            log.warning("there is no journal, and every fsync is a commit: %s", self.absent)
            return False
        self.absent = ""
        self._kick()
        return True

    # What commits record

    def entry(self, mark: Mark) -> Entry:
        """What a commit of everything before `mark` is to record."""
        own = self._file.id if self._file is not None else 0
        named = self.recorded.journal
        if named and named != own and mark.lsn < self.durable_lsn:
            # A retired one, which alone has something that was synced after this commit was cut.
            own = named
        return Entry(own, mark) if own else NONE

    def landed(self, entry: Entry) -> None:
        """A commit has recorded `entry`."""
        before, self.recorded = self.recorded.journal, entry
        if entry.journal != before or entry.mark.lsn > self._end.lsn:
            self._end = entry.mark
        self._is_durable(entry.mark.lsn)
        if before != entry.journal:
            self._changed.set()

    def _is_durable(self, lsn: int) -> None:
        """Records below are in a commit that has landed, or in the journal: those that follow bear witness to it."""
        if lsn > self.durable_lsn:
            self.durable_lsn = self._log.synced = lsn

    # Syncing

    def takes(self) -> bool:
        """Whether what is in the log and not in the journal should go there, and can."""
        return (
            self._file is not None
            and self._file.id == self.recorded.journal
            and span(self._end, self._log.mark(), self._log.size) <= JOURNAL_BYTES
        )

    def sync_now(self, served: Served) -> None:
        """As `sync`, without a turn of the loop: two of them cost more than half of what the disk takes.

        A small one in place for a client that is alone (alone.py). By the thread for others, and waited for as long as
        no other request comes. served: what the volume was served that is flushed.
        """
        if self._landing is not None:
            return
        small = span(self._end, self._log.mark(), self._log.size) <= IN_PLACE_BYTES
        if not self._alone.flushes(served) or not small:
            self._begin()
            self._threads.bell.wait()
            return
        file, parts, end = self._next()
        begun, error = perf_counter_ns(), None
        try:
            _write(file, parts)
        except Exception as failure:
            error = failure
        self._alone.took(perf_counter_ns() - begun)
        self.in_place += 1
        self._ended(end, error)

    async def sync(self) -> None:
        """Let one write land: the one in flight, or one of everything that the log has now.

        The caller looks at `durable_lsn`, and at `takes` again when that is not yet enough.
        """
        if self._landing is None:
            self._begin()
        if self._landing is not None:
            await self._landing.wait()

    def _next(self) -> tuple[Journal, Parts, Mark]:
        """A write of what the log has and the journal has not, to what file; and where it ends."""
        file, end = self._file, self._log.mark()
        assert file is not None, "takes() was asked"
        self.syncs += 1
        return file, file.stretch(self._log.ring, self._end, end), end

    def _begin(self) -> None:
        """Let the thread do one."""
        file, parts, end = self._next()
        landing = self._landing = trio.Event()

        def ended(error: BaseException | None) -> None:
            self._landing = None
            self._ended(end, error)
            landing.set()

        self._threads.start(partial(_write, file, parts), ended)

    def _ended(self, end: Mark, error: BaseException | None) -> None:
        """A write up to `end` has ended."""
        if error is not None:
            log.error("a write to the journal failed, and it is given up: %r", error)
            self._file = None
            self.failures += 1
            self.absent = "it could not be written to"
            self._changed.set()
            self._kick()
        elif end.lsn > self._end.lsn:  # a commit may have landed meanwhile, and be ahead
            self.written += span(self._end, end, self._log.size)
            self._end = end
            self._is_durable(end.lsn)

    def close(self) -> None:
        """After `run` and every `sync` have ended, and the thread."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def statistics(self) -> dict[str, object]:
        return {
            "syncs": self.syncs,
            "in_place": self.in_place,
            "bytes": self.written,
            "failures": self.failures,
            "absent": self.absent or None,
        }


def _write(file: Journal, parts: Parts) -> None:
    try:
        file.write(parts)
    except BaseException:
        file.retire()
        raise
