"""The one thread that writes to LMDB. A transaction begins, runs and ends in one call on it.

LMDB ties a write transaction to its thread: one begun here and committed there reports success, and the next one
blocks for ever. So functions come to the thread, never transactions to the functions.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import lmdb

from silofs.errors import Damaged, SiloError, StoreBroken, StoreFull
from silofs.layers.cell_map import CellMap
from silofs.layers.cells import CellFile, CellsFailed
from silofs.layers.environment import Environment
from silofs.layers.filesystem import free_bytes
from silofs.layers.gate import Gate
from silofs.layers.held import no_room
from silofs.layers.transaction import RunAgain, WriteTxn
from silofs.layers.usage import Usage
from silofs.layers.warm import WarmLeaves
from silofs.layers.writeback import Writeback
from silofs.limits import CELLS_KEPT, CELLS_PUNCHED, MIB, WRITER_LEAVES

log = logging.getLogger(__name__)

T = TypeVar("T")

GROW_WAIT_S: Final = 5.0  # for readers to end, when the map must grow
SPOILT: Final = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError)
FULL_BYTES: Final = 2 * MIB  # with less than this free, an error of LMDB's is taken for a full disk (it says EIO)


class Writer:
    """Runs functions, each in one durable transaction, in the order in which they were submitted."""

    def __init__(self, environment: Environment, gate: Gate, usage: Usage) -> None:
        self._environment = environment
        self._gate = gate
        self._queue: queue.SimpleQueue[tuple[Callable[[WriteTxn], Any], Future[Any], int] | None] = queue.SimpleQueue()
        self._usage = usage
        self.warm = WarmLeaves(WRITER_LEAVES)
        self._writeback = Writeback(environment.data_file)
        self.broken: StoreBroken | None = None
        self.unused_bytes = 0  # of the file, as of the last commit
        self.commits = 0
        self.commit_seconds = 0.0
        self._told = False  # that blocks of cells cannot be given back
        self._thread = threading.Thread(target=self._run, name="silofs-writer", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[WriteTxn], T], *, cost: int = 0) -> Future[T]:
        """`cost`: bytes that the transaction may take, if nobody has claimed them for it."""
        future: Future[T] = Future()
        if self._thread.is_alive():
            self._queue.put((function, future, cost))
        else:
            future.set_exception(self.broken or StoreBroken("the store is closed"))
        return future

    def stop(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._writeback.close()

    def _run(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            function, future, cost = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._claimed(cost):
                    value = self._transact(function)
                future.set_result(value)
            except BaseException as error:
                future.set_exception(error)

    def _transact(self, function: Callable[[WriteTxn], T]) -> T:
        """One transaction; again in a larger map when this one was full."""
        if self.broken is not None:
            raise self.broken
        while True:
            try:
                return self._attempt(function)
            except (RunAgain, CellsFailed):
                continue
            except lmdb.MapFullError as error:
                self._grow(error)
            except lmdb.TxnFullError as error:
                raise StoreFull("the change is too large for one transaction", hint="do it in parts") from error
            except lmdb.Error as error:
                raise self._diagnose(error) from error

    def _grow(self, error: lmdb.MapFullError) -> None:
        with self._gate.empty(GROW_WAIT_S) as alone:
            if not alone:
                hint = "silofs restart makes it larger"
                raise StoreFull("the store's map is full, and cannot grow while it is read", hint=hint) from error
            if not self._environment.grow():
                raise StoreFull("the store has reached its largest size") from error
        log.info("the map grew to %d bytes", self._environment.map_bytes)

    def _attempt(self, function: Callable[[WriteTxn], T]) -> T:
        txn = self._environment.begin(write=True)
        free_cells = self._environment.free_cells
        write, committing = None, False
        try:
            write = WriteTxn(self._environment, txn, self.warm, self._usage)
            value = function(write)
            write.finish()
            unused = self._environment.unused_bytes(txn, self._environment.notes.writer)
            started = time.monotonic()
            with self._writeback.during(write.put_bytes):
                committing = True
                txn.commit()
        except BaseException:
            txn.abort()
            if write is not None and committing:
                # It may have landed all the same: then its cells are in use.
                self._spend(write)
                if write.cells_taken:
                    self._environment.cells.rest()
            elif write is not None and write.cells_taken and free_cells is not None:
                with self._environment.ahead.lock:
                    free_cells.undone(write.cells_taken)
            raise
        finally:
            self._environment.notes.writer.clear()
        self._spend(write)
        if write.cells_unused and free_cells is not None:
            with self._environment.ahead.lock:
                free_cells.undone(write.cells_unused)
        if write.cells_given_up and free_cells is not None:
            free_cells.given_up(write.txn_id, write.cells_given_up)
        if write.changed:
            self._measure(unused)
            self._tidy_cells()
        self.commits += write.changed
        self.commit_seconds += time.monotonic() - started
        self.warm.drop_leaves(write.chilled)
        self.warm.update(write.warmed)
        self._usage.update(write.settled)
        return value

    @staticmethod
    def _spend(write: WriteTxn) -> None:
        for ahead in write.adopted:
            ahead.spent = True

    def _measure(self, unused: int) -> None:
        """Tell the ledger of space what the commit has left."""
        self.unused_bytes = unused
        held = self._environment.held
        held.committed(self._environment.used_bytes, unused)
        if held.low:
            held.top_up(0)
        if held.full:
            self.count_room()

    def _tidy_cells(self) -> None:
        """Let cells that nobody can see any more be used again, and give the blocks of all but some of them back."""
        file, free, ahead = self._environment.cells, self._environment.free_cells, self._environment.ahead
        if free is None:
            return
        with ahead.lock:
            ahead.free_abandoned(free)
            self._give_back(file, free)

    def _give_back(self, file: CellFile, free: CellMap) -> None:
        """Of a map whose lock is held."""
        if free.waiting:
            # Only what was given up before the newest transaction, as LMDB's own pages: who was about to renew its
            # snapshot when that landed is in nobody's table for a moment, and may still look through older views.
            free.ripen(min(self._environment.oldest_reader(), self._environment.newest()) - 1)
        held = self._environment.held
        # Where what is written in place needs new blocks all the same, kept ones are of no use on a nearly full disk.
        full = held.full or (held.holds is False and not file.has_room(CELLS_KEPT))
        try:
            for first, count in free.excess(0 if full else CELLS_KEPT, CELLS_PUNCHED):
                try:
                    file.punch(first, count)
                except OSError as error:
                    # On XFS it takes blocks to give some back.
                    if error.errno != errno.ENOSPC or not held.spare():
                        raise
                    file.punch(first, count)
                    held.top_up(0)  # first of all again what deletion and the cleaner may need
                free.punched(first, count)
        except OSError as error:
            if not self._told:
                log.warning("free cells of %s keep their blocks: %s", file.path, error)
            self._told = True

    def count_room(self) -> None:
        """Find room inside the file, when it cannot be made longer. On this thread only."""
        self._environment.held.count_inside(self._environment.oldest_reader())

    @contextmanager
    def _claimed(self, cost: int) -> Iterator[None]:
        """Have so many bytes set aside meanwhile; StoreFull when they cannot be had."""
        held = self._environment.held
        if cost and not held.claim(cost):
            if not held.top_up(cost):
                self._tidy_cells()
                held.top_up(cost)
                self.count_room()
            if not held.claim(cost):
                raise no_room()
        try:
            yield
        finally:
            held.let_go(cost)

    def _diagnose(self, error: lmdb.Error) -> SiloError:
        """What a failed transaction means. LMDB says EIO when the disk is full; and after any other failure it may call

        the next commit a success although pages of this one never reached the disk: nothing more is written then.
        """
        self.warm.clear()
        if isinstance(error, SPOILT):
            # Of a page that was read: LMDB gives such a transaction up before it writes anything.
            return Damaged(f"the store's trees are damaged: {error}")
        if free_bytes(self._environment.path) < FULL_BYTES or getattr(error, "code", 0) == errno.ENOSPC:
            return StoreFull("the file system of the store is full")
        self.broken = StoreBroken(f"the store cannot be written to: {error}")
        log.error("%s", self.broken)
        return self.broken
