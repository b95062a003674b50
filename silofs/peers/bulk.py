"""Bulk lanes: pages and maps that nobody waits for, on connections and threads of their own.

A lane belongs to a session and lives as long as it; data goes one way only. The sending thread reads pages through a
read transaction of its own, compresses and encrypts them, and blocks on the socket, all of it without the event loop
that serves the mount. The receiving thread decrypts, checks and decompresses, and hands what came to the loop, which
only passes it on to the store's writer. Credit is the target's: it asks for no more than BULK_WINDOW_BYTES that are not
durable yet (docs/protocol.md), so what is queued here is bounded by what it may ask for; one that asks for more than
any correct target would is cut off.

Demand never comes here: it is served on the session (session.py).
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from silofs import failpoints
from silofs.blocks import BLOCK_PAGES, LEAF_MASK, LEAF_SHIFT, PAGE
from silofs.errors import Damaged, ObjectMissing, ProtocolError
from silofs.extents import Extents
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import Refs
from silofs.layers.store import Store
from silofs.migrate import wire
from silofs.migrate.codec import Block, Codec
from silofs.migrate.messages import AnyMessage, Lost, Map, Run, Segment, Unserved, VolumeEpoch
from silofs.peers.content import NotHere, map_part, slice_of
from silofs.peers.tls import BlockingLane

log = logging.getLogger(__name__)

JOBS_MAX = 4096  # asked for and not yet sent
ARRIVED_BYTES_MAX = 8 << 20  # decoded by the receiving thread and not yet taken by the loop
BURST_S = 0.1  # of a bandwidth limit: what may go out at once
Frame = AnyMessage | wire.PagesFrame


@dataclass(frozen=True)
class Pages:
    """What a frame brought: page number -> 4096 bytes, and the same numbers as ascending runs."""

    data: dict[int, memoryview]
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return len(self.data) * PAGE


NOTHING = Pages({}, ())


class Bandwidth:
    """A limit in bytes per second for one migration; None: none. Used by one thread."""

    def __init__(self, rate: int | None) -> None:
        self.rate = rate
        self._free_at = 0.0

    def take(self, nbytes: int, now: float) -> float:
        """Seconds to wait before `nbytes` may be sent."""
        if not self.rate:
            return 0.0
        self._free_at = max(self._free_at, now - BURST_S) + nbytes / self.rate
        return max(0.0, self._free_at - now)


@dataclass
class Traffic:
    """Counters of one migration, in bytes. Written by one thread each, read by any."""

    sent: int = 0  # page bytes that were asked for and left, uncompressed
    sent_wire: int = 0  # the same as it went over the wire
    demand: int = 0  # of `sent`: what a reader waited for
    received: int = 0  # page bytes that arrived and were stored
    received_demand: int = 0


@dataclass
class Context:
    """What every answer of one migration carries, and where it is counted."""

    migration: bytes
    volumes: tuple[VolumeEpoch, ...]
    traffic: Traffic = field(default_factory=Traffic)
    bandwidth: Bandwidth = field(default_factory=lambda: Bandwidth(None))


@dataclass(frozen=True)
class PagesJob:
    """Answer a PULL."""

    context: Context
    session: bytes
    request: int
    segment: Segment
    runs: tuple[Run, ...]

    def frames(self, reader: ReadTxn, codec: Codec) -> Iterator[Frame]:
        """The frames of the answer; the last one says so. Damaged pages become LOST, which is never the end."""
        context, segment = self.context, self.segment
        header = (context.migration, self.session, context.volumes)
        try:
            layer, above = slice_of(reader, segment)
        except NotHere:
            yield Unserved(*header, self.request, segment.uuid)
            return
        part = _Slice(reader, layer, above)
        lost = Extents()
        blocks: list[Block] = []
        for number, pages in _by_block(self.runs):
            found, damaged = part.block(pages)
            for page in damaged:
                lost.add(page, page + 1)
            if found:
                if len(blocks) == wire.BLOCKS_MAX:
                    yield self._frame(blocks, last=False)
                    blocks = []
                blocks.append(codec.encode(segment.uuid, number, found))
        if lost:
            runs = tuple(Run(start, end - start) for start, end in lost)
            yield Lost(*header, self.request, segment.uuid, runs)
        yield self._frame(blocks, last=True)

    def _frame(self, blocks: list[Block], *, last: bool) -> wire.PagesFrame:
        traffic = self.context.traffic
        traffic.sent += sum(len(block.sums) for block in blocks) * PAGE
        traffic.sent_wire += sum(len(block.data) for block in blocks)
        return wire.PagesFrame(
            self.session, self.context.migration, self.segment.uuid, self.request, last, tuple(blocks)
        )


@dataclass(frozen=True)
class MapJob:
    """Answer a MAP_ASK."""

    context: Context
    session: bytes
    request: int
    segment: Segment
    first: int

    def frames(self, reader: ReadTxn, codec: Codec) -> Iterator[Frame]:
        context = self.context
        header = (context.migration, self.session, context.volumes)
        try:
            yield Map(*header, self.request, map_part(reader, self.segment, self.first))
        except (NotHere, Damaged) as error:
            log.error("a map cannot be sent: %s", error)
            yield Unserved(*header, self.request, self.segment.uuid)


Job = PagesJob | MapJob


class Outbound:
    """The sending half of a bulk lane. `run` is the thread; everything else may be called from any."""

    def __init__(self, store: Store, lane: BlockingLane) -> None:
        self._store = store
        self._lane = lane
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._writer = wire.FrameWriter()

    def put(self, job: Job) -> None:
        if self._jobs.qsize() >= JOBS_MAX:
            raise ProtocolError("the peer asks for more than it may")
        self._jobs.put(job)

    def stop(self) -> None:
        self._stopped.set()
        self._jobs.put(None)
        self._lane.stop()

    def run(self) -> None:
        """Send until stopped. PeerUnreachable when the lane breaks."""
        codec = Codec()
        try:
            while True:
                job = self._jobs.get()
                if job is None or self._stopped.is_set():
                    return
                # Encoded before anything waits: an open transaction keeps the store from using freed space again.
                reader = self._store.reader()
                try:
                    encoded = [self._writer.encode(frame) for frame in job.frames(reader, codec)]
                finally:
                    reader.close()
                for data in encoded:
                    wait = job.context.bandwidth.take(len(data), time.monotonic())
                    if wait and self._stopped.wait(wait):
                        return
                    self._lane.send(data)
                failpoints.hit("bulk.after_reply")
        finally:
            self._lane.close()


class Inbound:
    """The receiving half of a bulk lane. `run` is the thread; `deliver` is called on the loop, in order."""

    def __init__(self, lane: BlockingLane, deliver: Callable[[Frame, Pages], None]) -> None:
        self._lane = lane
        self._deliver = deliver
        self._reader = wire.FrameReader()
        self._token = trio.lowlevel.current_trio_token()
        self._room = threading.Condition()
        self._held = 0
        self._stopped = False

    def stop(self) -> None:
        with self._room:
            self._stopped = True
            self._room.notify_all()
        self._lane.stop()

    def taken(self, nbytes: int) -> None:
        """The loop is done with so many bytes that were delivered."""
        with self._room:
            self._held -= nbytes
            self._room.notify_all()

    def run(self) -> None:
        """Receive until the lane ends. ProtocolError for anything that is not exactly a frame."""
        codec = Codec()
        try:
            while data := self._lane.receive():
                for frame in self._reader.feed(data):
                    pages = unpack(frame, codec)
                    with self._room:
                        while self._held > ARRIVED_BYTES_MAX and not self._stopped:
                            self._room.wait()
                        if self._stopped:
                            return
                        self._held += pages.nbytes
                    self._token.run_sync_soon(self._deliver, frame, pages)
        except trio.RunFinishedError:
            pass
        finally:
            self._lane.close()


def unpack(frame: Frame, codec: Codec) -> Pages:
    """The pages of a frame, checked; none for a message. ProtocolError."""
    if not isinstance(frame, wire.PagesFrame):
        return NOTHING
    data: dict[int, memoryview] = {}
    for block in frame.blocks:
        data.update(codec.decode(frame.segment, block))
    runs: list[tuple[int, int]] = []
    for page in data:  # ascending: blocks come in order, and pages in a block do
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return Pages(data, tuple(Run(first, end - first) for first, end in runs))


def _by_block(runs: tuple[Run, ...]) -> Iterator[tuple[int, list[int]]]:
    """(block number, pages of it) of ascending runs, each block once."""
    pages = itertools.chain.from_iterable(range(run.first, run.end) for run in runs)
    for number, group in itertools.groupby(pages, key=lambda page: page // BLOCK_PAGES):
        yield number, list(group)


class _Slice:
    """Pages of a segment, its leaves resolved once each."""

    def __init__(self, reader: ReadTxn, layer: int, above: int) -> None:
        self._reader = reader
        self._layer = layer
        self._above = above
        self._number = -1
        self._leaf: Refs

    def block(self, pages: list[int]) -> tuple[dict[int, memoryview | bytes], list[int]]:
        """(the bytes of these pages, those that are damaged or lost here). Views are valid until the next call."""
        for attempt in (0, 1):
            found: dict[int, memoryview | bytes] = {}
            lost: list[int] = []
            for page in pages:
                try:
                    found[page] = self._reader.page(self._ref(page))
                except ObjectMissing as error:
                    if not attempt:
                        break  # moved meanwhile: once more from the start, because a renewal ends the other views too
                    log.error("page %d of layer %d cannot be sent: %s", page, self._layer, error)
                    lost.append(page)
                except Damaged as error:
                    log.error("page %d of layer %d cannot be sent: %s", page, self._layer, error)
                    lost.append(page)
            else:
                return found, lost
            self._reader.renew()
            self._number = -1
        raise AssertionError("the second attempt returns")

    def _ref(self, page: int) -> int:
        if page >> LEAF_SHIFT != self._number:
            self._leaf = self._reader.resolve(self._layer, page >> LEAF_SHIFT, above=self._above)
            self._number = page >> LEAF_SHIFT
        return self._leaf.item(page & LEAF_MASK)
