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
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import trio

from silofs.engine.threads import Threads
from silofs.layers.journal import DIRECTORY, Journal, Parts, remove_others
from silofs.layers.log import WriteLog
from silofs.layers.records import Mark, span
from silofs.layers.store import Store
from silofs.limits import JOURNAL_BYTES, JOURNAL_RETRY_S

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
        self._line = _Line()
        self._file: Journal | None = None
        self._lost = trio.Event()  # there was a file, and it is retired
        self._landing: trio.Event | None = None  # of the write in flight
        self.recorded = NONE
        self._end = Mark(0, 0, 0)  # what the named journal has from `recorded.mark` on, ends here
        self.durable_lsn = 0  # records below are durable
        self.absent = "it is not made yet"  # why there is none; empty while there is
        self.syncs = 0
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
            await self._lost.wait()
            self._lost = trio.Event()
            await trio.sleep(JOURNAL_RETRY_S)

    async def _make(self) -> bool:
        memory, directory, named = self._log.memory.superblock, self._directory, self.recorded.journal

        def make() -> Journal:
            remove_others(directory, named)
            return Journal.make(directory, memory.secret, memory.store, memory.ring_bytes)

        try:
            self._file = await self._threads.wait(self._line.submit(make))
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
        self.durable_lsn = max(self.durable_lsn, entry.mark.lsn)
        if before not in (0, entry.journal):
            kept = (entry.journal, self._file.id if self._file is not None else 0)
            self._line.submit(lambda: remove_others(self._directory, *kept))

    # Syncing

    def takes(self) -> bool:
        """Whether what is in the log and not in the journal should go there, and can."""
        return (
            self._file is not None
            and self._file.id == self.recorded.journal
            and span(self._end, self._log.mark(), self._log.size) <= JOURNAL_BYTES
        )

    async def sync(self) -> None:
        """Let one write land: the one in flight, or one of everything that the log has now.

        The caller looks at `durable_lsn`, and at `takes` again when that is not yet enough.
        """
        if self._landing is not None:
            await self._landing.wait()
            return
        file = self._file
        assert file is not None, "takes() was asked"
        landing = self._landing = trio.Event()
        end = self._log.mark()
        parts = file.stretch(self._log.ring, self._end, end)
        self.syncs += 1
        try:
            with trio.CancelScope(shield=True):
                await self._threads.wait(self._line.submit(lambda: _write(file, parts)), urgent=True)
        except Exception as error:
            log.error("a write to the journal failed, and it is given up: %r", error)
            self._file = None
            self.failures += 1
            self.absent = "it could not be written to"
            self._lost.set()
            self._kick()
        else:
            self.written += span(self._end, end, self._log.size)
            # A commit may have landed meanwhile, and be ahead.
            if end.lsn > self._end.lsn:
                self._end = end
            self.durable_lsn = max(self.durable_lsn, end.lsn)
        finally:
            self._landing = None
            landing.set()

    def close(self) -> None:
        """End the thread. After `run` and every `sync` have ended."""
        self._line.stop()
        if self._file is not None:
            self._file.close()
            self._file = None

    def statistics(self) -> dict[str, object]:
        return {
            "syncs": self.syncs,
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


class _Line:
    """One thread, and what it is to do, in order."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="silofs-journal", daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._queue.put((job, future))
        return future

    def stop(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
