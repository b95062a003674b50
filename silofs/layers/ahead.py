"""Writing ahead: pages of long writes are put into cells before the commit that takes them.

A commit's time is the disk's for the most part, and the disk would be idle from the end of one commit until the next
one has put its pages together. So what will be committed is written while it comes in, to cells that nothing refers to;
the commit *adopts* what is still the newest of it, which costs it names and leaves only, and waits for less. What was
written ahead is worth nothing by itself: the pages stay in the log until a commit has landed, and after a crash the
cells are free as they were (docs/write-path.md, "Writing ahead").
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from silofs import failpoints
from silofs.blocks import PAGE
from silofs.layers.cells import CellsFailed
from silofs.layers.native import Source, zero_pages
from silofs.layers.schema import OBJECT_PAGES

if TYPE_CHECKING:
    from silofs.layers.cell_map import CellMap
    from silofs.layers.environment import Environment

log = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

Run = tuple[int, int, int]  # (first page, end, ring position) of pages that lie in the ring one after the other

Trust = tuple["CellMap | None", int]


def spread(runs: Sequence[Run]) -> tuple[Numbers, Numbers]:
    """(page numbers, ring positions) of some runs, page by page in their order."""
    first, end, position = np.array(runs, np.int64).reshape(-1, 3).T
    counts = end - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within, np.repeat(position, counts) + within * PAGE


class Ahead:
    """Objects in cells that no transaction refers to: pages of one volume, 31 to an object. For the writer's thread.

    When nobody has it any more (its volume was deleted), the cells are free again, unless a transaction has taken them.
    """

    def __init__(self, store: WritingAhead, first_id: int, cells: list[int], pages: Numbers, at: Numbers) -> None:
        self.first_id = first_id
        self.cells = cells
        self.pages = pages  # their numbers, ascending
        self.at = at  # where they lie in the log's ring
        self.mark = 0  # for CellFile.sync
        self.spent = False  # a transaction that refers to it has landed, or perhaps has
        self._store = store
        self._trust = store.trust()

    @property
    def usable(self) -> bool:
        """Whether the cells are its own: the environment is open, and no write or sync of cells has failed since."""
        return not self.spent and not self._store.stopped and self._trust == self._store.trust()

    def newest(self, numbers: Numbers, positions: Numbers) -> tuple[Numbers, Flags]:
        """(where its pages are in `numbers`, which of them a commit of the pages at `positions` would store).

        `numbers` ascend, and there are some. Places of pages that are not among them mean nothing.
        """
        places = np.minimum(np.searchsorted(numbers, self.pages), len(numbers) - 1)
        return places, (numbers[places] == self.pages) & (positions[places] == self.at)

    def give_up(self) -> None:
        """Nothing of it will be adopted."""
        if not self.spent:
            self.spent = True
            self._store.abandoned.append((self._trust, self.cells))

    def __del__(self) -> None:
        self.give_up()


class _Job(NamedTuple):
    future: Future[Ahead | None]
    ring: memoryview
    runs: list[Run]


class WritingAhead:
    """What is to be written ahead, of one environment, by a thread of its own, and the ids of objects.

    `lock` is held by whoever takes free cells, gives some back, or changes what is known of them.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.stopped = False
        self._stopping = threading.Lock()
        self._writing = False
        self._next_id = 0  # of objects: above all that were given out, in transactions and ahead of them
        self.lock = threading.RLock()
        self.abandoned: deque[tuple[Trust, list[int]]] = deque()

    def take_ids(self, count: int, above: int = 0) -> int:
        """The first of so many ids, none of which was given out; `above`: the store's own counter."""
        with self.lock:
            first = max(self._next_id, above)
            self._next_id = first + count
        return first

    def trust(self) -> Trust:
        """Changes when cells that were written can no longer be relied on."""
        return self._environment.free_cells, self._environment.cells.rests

    @property
    def busy(self) -> bool:
        """Whether something is being written, or synced: what comes now had better be gathered. Any thread."""
        return not self._jobs.empty() or self._writing or self._environment.cells.syncing

    def put(self, ring: memoryview, runs: list[Run]) -> Future[Ahead | None]:
        """Whole pages in the log's ring, in the order in which they came; None: they could not be written."""
        future: Future[Ahead | None] = Future()
        with self._stopping:
            if self.stopped or not self._started():
                future.set_result(None)
            else:
                self._jobs.put(_Job(future, ring, runs))
        return future

    def _started(self) -> bool:
        """Whether the thread runs, which is started when it is first needed."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="silofs-ahead", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.error("long writes are not written ahead of their commit: %s", error)
                return False
            self._thread = thread
        return True

    def stop(self) -> None:
        """End the thread. Nobody adopts anything from here on, and what is not being written yet never is."""
        with self._stopping:
            self.stopped = True
            self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._writing = True
            try:
                job.future.set_result(None if self.stopped else self._write(job))
            except Exception:
                log.exception("long writes could not be written ahead of their commit, which goes without")
                job.future.set_result(None)
            self._writing = False
            del job  # and what it wrote, which this thread must not keep alive

    def _write(self, job: _Job) -> Ahead | None:
        pages, at = spread(job.runs)
        order = np.argsort(pages, kind="stable")
        pages, at = pages[order], at[order]
        some = np.flatnonzero(~zero_pages(Source(job.ring, at)))
        with self.lock:
            cells = self._environment.take_cells(-(-len(some) // OBJECT_PAGES))
            if not cells:
                return None
            some = some[: len(cells) * OBJECT_PAGES]
            ahead = Ahead(self, self.take_ids(len(cells)), cells, pages[some], at[some])
        file = self._environment.cells
        try:
            ahead.mark = file.write(ahead.first_id, Source(job.ring, ahead.at), cells)
        except CellsFailed:
            ahead.give_up()
            return None
        failpoints.hit("ahead.written")
        file.begin_sync(ahead.mark)
        return ahead

    def free_abandoned(self, free: CellMap) -> None:
        """Let cells be used again that were written ahead for nothing. The lock is held."""
        while self.abandoned:
            trust, cells = self.abandoned.popleft()
            if trust[0] is free:
                free.undone(cells)
