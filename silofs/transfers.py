"""Verbs that take long, in the daemon: import, export and diff. The work runs in a thread beside the event loop.

What is read stands still meanwhile: a volume's head is sealed first, as for a clone, and the layers are pinned under
one holder until the work is over. Pins of a daemon that was killed are let go by the next import (images.reap).
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import trio

from silofs import (
    diffs,
    failpoints,
    images,
    limits,
    packing,
    raw_out,
    states,
    stream_fill,
    stream_in,
    stream_out,
    verbs,
)
from silofs.control import Call
from silofs.engine.volume import VolumeState
from silofs.errors import TryAgain, UserError
from silofs.facts import Fields, View
from silofs.layers.catalog import Volume
from silofs.layers.log import WriteLog
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.sink import Source
from silofs.stream import Decoder
from silofs.verbs import Args

T = TypeVar("T")

REPORT_S = 0.25  # between two progress lines of work that runs in a thread


class Volumes(Protocol):
    """What verbs in the daemon need of silofs.engine.Engine."""

    @property
    def store(self) -> Store: ...

    @property
    def log(self) -> WriteLog: ...

    @property
    def dirty_bytes(self) -> int: ...

    def volumes(self) -> Iterable[VolumeState]: ...

    def shown(self, record: Volume) -> tuple[Volume, int, int]: ...

    async def transact(self, fn: Callable[[WriteTxn], T]) -> T: ...


class Layers(Protocol):
    """What a transfer reads."""

    @property
    def layers(self) -> set[int]: ...


Held = TypeVar("Held", bound=Layers)


class Transfers:
    """Handlers of `import`, `export` and `diff`."""

    def __init__(self, engine: Volumes, view: Callable[[], View]) -> None:
        self._engine = engine
        self._view = view
        self._running = 0  # of them

    async def load(self, args: Args, call: Call) -> Fields:
        """`import`: an image into a layer, then a volume on it."""
        fd, store, view = one_file(call), self._engine.store, self._view()
        verbs.name_in(args, "name")
        wanted = verbs.optional_size(args, "size")
        loaded: images.Loaded | None = None

        def work(progress: images.Progress, cancelled: images.Cancelled) -> None:
            nonlocal loaded
            batch = packing.SHARED_BATCH_BYTES
            loaded = images.load(store, fd, wanted, progress=progress, cancelled=cancelled, batch_bytes=batch)

        await self._reap()
        self._running += 1
        try:
            await in_thread(call, work)
            held, loaded = loaded, None
            assert held is not None
            try:
                return await self._engine.transact(lambda txn: verbs.adopt(txn, args, view, held))
            except BaseException:
                loaded = held
                raise
        finally:
            self._running -= 1
            if loaded is not None:
                left = loaded
                with trio.CancelScope(shield=True):
                    await self._engine.transact(lambda txn: images.let_go(txn, [left.layer], left.holder))

    async def unload(self, args: Args, call: Call) -> Fields:
        """`export`: a volume or a snapshot as a raw image."""
        fd, store = one_file(call), self._engine.store
        async with self._held(lambda txn: states.exported(txn, args)) as state:
            return await in_thread(
                call,
                lambda progress, cancelled: raw_out.write(store, state, fd, progress=progress, cancelled=cancelled),
            )

    async def send(self, args: Args, call: Call) -> Fields:
        """`export --format stream`."""
        fd, store = one_file(call), self._engine.store
        async with self._held(lambda txn: states.sent(txn, args)) as sent:
            return await in_thread(
                call,
                lambda progress, cancelled: stream_out.write(store, sent, fd, progress=progress, cancelled=cancelled),
            )

    async def receive(self, args: Args, call: Call) -> Fields:
        """`import` of a stream. Short steps between transactions of the engine; in `stream_in` what they leave."""
        fd, store, view = one_file(call), self._engine.store, self._view()
        verbs.name_in(args, "name")
        source = Source(fd, images.never)

        def read_head(progress: images.Progress, cancelled: images.Cancelled) -> Decoder:
            source.cancelled = cancelled
            return Decoder(source.read)

        decoder = await in_thread(call, read_head)
        target = await self._engine.transact(lambda txn: stream_in.begin(txn, args, decoder.head, view))
        failpoints.hit("stream.begun")

        def read_frames(progress: images.Progress, cancelled: images.Cancelled) -> stream_fill.Stored:
            source.cancelled = cancelled
            batch, total = packing.SHARED_BATCH_BYTES, images.image_size(fd)
            return stream_fill.fill(
                store, target, decoder, source, progress=progress, total=total, batch_bytes=batch
            )

        stored = await in_thread(call, read_frames)
        failpoints.hit("stream.before_publish")
        fields = await self._engine.transact(lambda txn: stream_in.publish(txn, target, self._view()))
        failpoints.hit("stream.published")
        return {**fields, **stored.fields(), "snapshot": decoder.head.snapshot}

    async def abandon(self, args: Args, call: Call) -> Fields:
        """`import --abandon`."""
        return await self._engine.transact(lambda txn: stream_in.abandon(txn, args, self._view()))

    async def diff(self, args: Args, call: Call) -> Fields:
        """`diff`: the changed extents go into the caller's file."""
        fd, store = one_file(call), self._engine.store
        async with self._held(lambda txn: states.compared(txn, args)) as pair:
            return await in_thread(
                call,
                lambda progress, cancelled: diffs.write(store, pair, fd, progress=progress, cancelled=cancelled),
            )

    @asynccontextmanager
    async def _held(self, choose: Callable[[WriteTxn], Held]) -> AsyncIterator[Held]:
        """What `choose` finds in a transaction that commits all pending writes, held until the block ends."""
        holder = images.PIN_EXPORT + uuid.uuid4().hex

        def hold(txn: WriteTxn) -> Held:
            found = choose(txn)
            for layer in found.layers:
                txn.pin(layer, holder)
            return found

        self._running += 1
        try:
            found = await self._engine.transact(hold)
            try:
                yield found
            finally:
                layers = found.layers
                with trio.CancelScope(shield=True):
                    await self._engine.transact(lambda txn: images.let_go(txn, layers, holder))
        finally:
            self._running -= 1

    async def _reap(self) -> None:
        """Drop what a daemon that was killed had loaded; nobody but this daemon can have work under way."""
        if not self._running:
            await self._engine.transact(images.reap)


def one_file(call: Call) -> int:
    if len(call.fds) != 1:
        raise UserError("this verb takes one open file")
    return call.fds[0]


_busy = 0  # threads that in_thread has now


async def in_thread(call: Call, work: Callable[[images.Progress, images.Cancelled], T]) -> T:
    """Run long synchronous work in a thread; its progress goes to the client, and a cancel makes it stop by itself.

    Raises TryAgain when too many run: short verbs need threads of the same pool.
    """
    global _busy
    if _busy >= limits.TRANSFERS_MAX:
        raise TryAgain(f"{_busy} imports, exports or checks are running", hint="wait until one of them has ended")
    _busy += 1
    try:
        return await _in_thread(call, work)
    finally:
        _busy -= 1


async def _in_thread(call: Call, work: Callable[[images.Progress, images.Cancelled], T]) -> T:
    latest: list[Fields] = []  # the newest report, or nothing; one list operation each side
    stop = threading.Event()
    done: list[T] = []
    failed: list[Exception] = []

    def note(fields: Fields) -> None:
        latest[:] = [fields]

    async def report() -> None:
        try:
            while True:
                await trio.sleep(REPORT_S)
                if latest:
                    await call.progress(**latest.pop())
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        try:
            done.append(await trio.to_thread.run_sync(work, note, stop.is_set))
        except Exception as error:
            failed.append(error)
        nursery.cancel_scope.cancel()
    if failed:
        raise failed[0]
    return done[0]
