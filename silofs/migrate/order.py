"""In which order pages are asked for: demand, then hints, then the sweep; with credit. Pure.

The target has at most `window` pages asked for and not durable. Demand may exceed it (a reader waits), nothing else.
A demand is not held back by a sweep request for the same page that is in flight: the sweep's answer may be megabytes
behind in the bulk lane. What arrives twice is stored once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from silofs import limits
from silofs.blocks import BLOCK_PAGES, PAGE
from silofs.extents import Extents
from silofs.migrate.messages import Priority, Run

WINDOW_PAGES = limits.BULK_WINDOW_BYTES // PAGE


class Wanted(msgspec.Struct, frozen=True):
    """Pages of one segment that go into one PULL."""

    segment: bytes
    runs: tuple[Run, ...]
    priority: Priority

    @property
    def pages(self) -> int:
        return sum(run.count for run in self.runs)


def split(runs: Iterable[Run], pages_max: int = limits.PULL_PAGES) -> Iterator[tuple[Run, ...]]:
    """Cut runs into PULLs of at most `pages_max` pages and PULL_RUNS_MAX runs; long runs at block boundaries."""
    batch: list[Run] = []
    room = pages_max
    for run in runs:
        first, left = run.first, run.count
        while left:
            count = min(left, room)
            aligned = (first + count) // BLOCK_PAGES * BLOCK_PAGES - first
            if count < left and aligned > 0:
                count = aligned
            batch.append(Run(first, count))
            first, left, room = first + count, left - count, room - count
            if left or not room or len(batch) == limits.PULL_RUNS_MAX:
                yield tuple(batch)
                batch, room = [], pages_max
    if batch:
        yield tuple(batch)


class Order:
    """What is to be asked for and what is in flight.

    `add` queues, `take` hands out what credit allows under new request numbers, `arrived` and `failed` report back,
    `reset` (the session is gone) forgets what was in flight and queues its demands again.
    """

    def __init__(self, window: int = WINDOW_PAGES) -> None:
        self.window = window
        self.pages_in_flight = 0
        self._queues: dict[Priority, deque[Wanted]] = {priority: deque() for priority in Priority}
        self._flying: dict[int, tuple[Wanted, Extents]] = {}
        self._request = 0

    def add(self, segment: bytes, runs: Iterable[Run], priority: Priority) -> None:
        """Queue pages. A demand or hint that is queued or in flight already as such is not queued again; beyond
        PULLS_MAX waiting ones it is dropped (its reader's deadline decides)."""
        queue = self._queues[priority]
        for batch in split(runs):
            wanted = Wanted(segment, batch, priority)
            if priority is not Priority.SWEEP:
                doubled = wanted in queue or any(wanted == flying for flying, _ in self._flying.values())
                if doubled or len(queue) >= limits.PULLS_MAX:
                    continue
            queue.append(wanted)

    def take(self, *, sweep: bool) -> Iterator[tuple[int, Wanted]]:
        """(request, pages) to send now, best first; `sweep` False: demand and hints only."""
        for priority in Priority:
            if priority is Priority.SWEEP and not sweep:
                return
            queue = self._queues[priority]
            while queue and len(self._flying) < limits.PULLS_MAX:
                if priority is not Priority.DEMAND and self.pages_in_flight + queue[0].pages > self.window:
                    break
                wanted = queue.popleft()
                self._request = (self._request + 1) & 0xFFFFFFFF
                self._flying[self._request] = (wanted, Extents((run.first, run.end) for run in wanted.runs))
                self.pages_in_flight += wanted.pages
                yield self._request, wanted

    def expects(self, request: int, segment: bytes, runs: Iterable[Run]) -> bool:
        """Whether these pages were asked for under this request and have not all arrived."""
        wanted, left = self._flying.get(request, (None, None))
        if wanted is None or left is None or wanted.segment != segment:
            return False
        return all(list(left.overlap(run.first, run.end)) == [(run.first, run.end)] for run in runs)

    def arrived(self, request: int, segment: bytes, runs: Iterable[Run], last: bool) -> bool:
        """Pages are durable. True if the request is known. A demand that ends short is queued again."""
        wanted, left = self._flying.get(request, (None, None))
        if wanted is None or left is None or wanted.segment != segment:
            return False
        before = left.total
        for run in runs:
            left.remove(run.first, run.end)
        self.pages_in_flight -= before - left.total
        if last or not left:
            self._close(request)
            if left and wanted.priority is Priority.DEMAND:
                self.add(segment, [Run(start, end - start) for start, end in left], Priority.DEMAND)
        return True

    def failed(self, request: int, segment: bytes) -> Wanted | None:
        """The request was not answered, or its pages could not be stored. What it had asked for, if it is known."""
        wanted, _ = self._flying.get(request, (None, None))
        if wanted is None or wanted.segment != segment:
            return None
        self._close(request)
        return wanted

    def reset(self) -> None:
        """Forget what is in flight, and the queued sweep (it is found again); demands and hints are queued again."""
        again = [wanted for wanted, _ in self._flying.values() if wanted.priority is not Priority.SWEEP]
        self._flying.clear()
        self.pages_in_flight = 0
        self._queues[Priority.SWEEP].clear()
        for wanted in reversed(again):
            self._queues[wanted.priority].appendleft(wanted)

    @property
    def sweep_idle(self) -> bool:
        """Nothing of the sweep is queued or in flight."""
        flying = any(wanted.priority is Priority.SWEEP for wanted, _ in self._flying.values())
        return not flying and not self._queues[Priority.SWEEP]

    @property
    def hungry(self) -> bool:
        """There is credit for more sweep than is queued."""
        queued = sum(wanted.pages for wanted in self._queues[Priority.SWEEP])
        return self.pages_in_flight + queued + limits.PULL_PAGES <= self.window

    @property
    def flying(self) -> int:
        """Requests in flight."""
        return len(self._flying)

    def _close(self, request: int) -> None:
        _, left = self._flying.pop(request)
        self.pages_in_flight -= left.total
