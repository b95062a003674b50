"""Pages that come in: checked against what was asked for, given to who waits for them, and stored in batches.

The store's writer gets one transaction at a time for the sweep, with whatever has arrived meanwhile in it, and another
for what readers wait for; so a demand waits for at most one batch of bulk. A reader gets its page as soon as it is
here: it is what the peer holds durably (docs/protocol.md, I4), whether or not this store has it on disk yet.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from silofs import failpoints
from silofs.blocks import PAGE
from silofs.errors import Damaged, SiloError, StoreFull
from silofs.extents import Extents
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.migrate.events import PagesDurable, PagesFailed
from silofs.migrate.messages import Lost, Refusal, Run
from silofs.migrate.wire import PagesFrame
from silofs.peers.book import write
from silofs.peers.bulk import Pages

log = logging.getLogger(__name__)

BATCH_PAGES = 1024  # of the sweep in one transaction: 4 MiB
Filled = dict[int, list[int]]  # layer id -> pages
Taken = Callable[[int], None]


class Receiver(Protocol):
    """The migration that pages belong to (mover.py)."""

    def expects(self, session: bytes, request: int, segment: bytes, runs: tuple[Run, ...]) -> bool: ...

    def stored(self, event: PagesDurable | PagesFailed, nbytes: int) -> None: ...


@dataclass
class _Waiter:
    came: trio.Event = field(default_factory=trio.Event)
    data: bytes | None = None


@dataclass
class _Batch:
    receiver: Receiver
    session: bytes
    request: int
    segment: bytes
    pages: Pages
    last: bool
    taken: Taken


class Arrivals:
    """All pages that arrive at this store. `filled` is called on the loop after pages of a layer were stored."""

    def __init__(self, store: Store, filled: Callable[[Filled], None]) -> None:
        self._store = store
        self._filled = filled
        self._waiting: dict[tuple[bytes, int], _Waiter] = {}
        self._queues: dict[bool, deque[_Batch]] = {False: deque(), True: deque()}
        self._wake = {False: trio.Event(), True: trio.Event()}
        self.batches = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._store_queue, False)
            nursery.start_soon(self._store_queue, True)

    # Readers that wait

    async def wait(self, segment: bytes, page: int) -> bytes:
        """The 4096 bytes of a page once it comes. Damaged if the peer says that it is lost. No deadline of its own."""
        waiter = self._waiting.setdefault((segment, page), _Waiter())
        try:
            await waiter.came.wait()
        finally:
            if self._waiting.get((segment, page)) is waiter and waiter.came.is_set():
                del self._waiting[segment, page]
        if waiter.data is None:
            raise Damaged(f"page {page} was damaged where it came from", hint="overwrite it, or restore it from a copy")
        return waiter.data

    def _wake_readers(self, segment: bytes, pages: dict[int, memoryview]) -> None:
        if not self._waiting:
            return
        for page, data in pages.items():
            waiter = self._waiting.pop((segment, page), None)
            if waiter is not None:
                waiter.data = bytes(data)
                waiter.came.set()

    # What arrives

    def pages(self, receiver: Receiver, frame: PagesFrame, pages: Pages, taken: Taken, *, demand: bool) -> None:
        """Take the pages of a frame; dropped if nobody asked for them. `taken` is called with their bytes once they
        are stored, or dropped."""
        if not receiver.expects(frame.session, frame.request, frame.segment, pages.runs):
            taken(pages.nbytes)
            return
        self._wake_readers(frame.segment, pages.data)
        batch = _Batch(receiver, frame.session, frame.request, frame.segment, pages, frame.last, taken)
        self._queues[demand].append(batch)
        self._wake[demand].set()

    async def lost(self, receiver: Receiver, message: Lost) -> None:
        """Pages that the peer cannot read: LOST here as well, durably."""
        if not receiver.expects(message.session, message.request, message.segment, message.runs):
            return
        extents = Extents((run.first, run.end) for run in message.runs)

        def mark(txn: WriteTxn) -> Filled:
            layer = txn.layer_by_uuid(message.segment)
            if layer is None:
                return {}
            txn.mark_lost(layer.id, extents)
            return {layer.id: [page for start, end in extents for page in range(start, end)]}

        self._filled(await write(self._store, mark))
        for start, end in extents:
            for page in range(start, end):
                waiter = self._waiting.pop((message.segment, page), None)
                if waiter is not None:
                    waiter.came.set()
        event = PagesDurable(message.session, message.request, message.segment, message.runs, False)
        receiver.stored(event, 0)

    # The store

    async def _store_queue(self, demand: bool) -> None:
        queue = self._queues[demand]
        while True:
            while not queue:
                self._wake[demand] = trio.Event()
                await self._wake[demand].wait()
            batch = [queue.popleft()]
            size = len(batch[0].pages.data)
            while queue and size + len(queue[0].pages.data) <= BATCH_PAGES:
                size += len(queue[0].pages.data)
                batch.append(queue.popleft())
            await self._fill(batch, demand)

    async def _fill(self, batch: list[_Batch], demand: bool) -> None:
        wanted: dict[bytes, dict[int, memoryview]] = {}
        for part in batch:
            wanted.setdefault(part.segment, {}).update(part.pages.data)
        wanted = {segment: pages for segment, pages in wanted.items() if pages}

        def fill(txn: WriteTxn) -> Filled:
            found: Filled = {}
            for segment, pages in wanted.items():
                layer = txn.layer_by_uuid(segment)
                if layer is not None:
                    txn.fill(layer.id, pages)
                    found[layer.id] = list(pages)
            return found

        failed: Refusal | None = None
        try:
            if wanted:
                nbytes = sum(map(len, wanted.values())) * PAGE
                self._filled(await write(self._store, fill, nbytes=nbytes))
                self.batches += 1
                failpoints.hit("demand.after_batch" if demand else "sweep.after_batch")
        except StoreFull as error:
            log.warning("pages that arrived wait for room: %s", error)
            failed = Refusal.SPACE
        except SiloError as error:
            log.error("pages that arrived cannot be stored: %s", error)
            failed = Refusal.STORE
        except Exception:
            log.exception("pages that arrived were not stored by an error of ours")
            failed = Refusal.STORE
        for part in batch:
            part.taken(part.pages.nbytes)
            if failed is not None:
                part.receiver.stored(PagesFailed(part.session, part.request, part.segment, failed), 0)
            else:
                durable = PagesDurable(part.session, part.request, part.segment, part.pages.runs, part.last)
                part.receiver.stored(durable, part.pages.nbytes)
