"""An engine on a real store and a real memfd, that can be killed and started again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from silofs.blocks import PAGE
from silofs.engine import Engine, Remote, Threads, VolumeState
from silofs.engine.threads import Then
from silofs.layers.catalog import Ownership, Role
from silofs.layers.log import WriteLog
from silofs.layers.pending import Buffer
from silofs.layers.schema import REMOTE
from silofs.layers.store import Store

T = TypeVar("T")

MIB = 1 << 20


class Inline(Threads):
    """Everything in place, so that the same seed gives the same trace. `hold` keeps commits in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs = 0
        self.release = trio.Event()
        self.release.set()

    def hold(self) -> None:
        self.release = trio.Event()

    async def run(self, job: Callable[[], T]) -> T:
        self.jobs += 1
        await trio.lowlevel.checkpoint()
        return job()

    async def wait(self, future: Future[T]) -> T:
        await trio.lowlevel.checkpoint()
        await self.release.wait()
        return future.result()

    def start(self, job: Callable[[], None], then: Then) -> None:
        """Begun now, and ended in the loop's next turn."""
        try:
            job()
        except Exception as error:
            self.bell.ring(then, error)
        else:
            self.bell.ring(then, None)


class Rig:
    """`async with rig.running()` serves; leaving it is the daemon's death: the rest is in the memfd only."""

    def __init__(self, path: Path, *, ring: int = 4 * MIB, remote: Remote | None = None, journal: bool = False) -> None:
        self.path = path
        self.journal = journal
        self.remote = remote
        self.threads: Threads = Inline()
        Store.create(path)
        self.ring = ring
        self.fd = os.memfd_create("log")
        self.store: Store
        self.log: WriteLog
        self.engine: Engine

    @property
    def inline(self) -> Inline:
        assert isinstance(self.threads, Inline)
        return self.threads

    def start(self) -> Engine:
        logged = WriteLog.formatted(self.fd)
        self.store = Store.open(self.path, replay=not logged)
        if not logged:
            WriteLog.format(self.fd, self.store.uuid, self.ring)
        self.log = WriteLog.open(self.fd, self.store.uuid)
        self.engine = Engine(self.store, self.log, remote=self.remote, threads=self.threads, journal=self.journal)
        self.engine.recover()
        self.engine.background.turns.clear()  # comes when it likes; tests of it run their own
        return self.engine

    def cut_power(self) -> None:
        """After `stop`: the memfd is gone as well."""
        os.close(self.fd)
        self.fd = os.memfd_create("log")

    def stop(self) -> None:
        self.engine.close()
        self.store.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        engine = self.start()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                yield engine
                nursery.cancel_scope.cancel()
        finally:
            self.stop()

    async def volume(self, size: int = MIB, name: str = "vm") -> VolumeState:
        record = await self.engine.transact(lambda txn: txn.create_volume(name, size))
        return self.engine.open_volume(record.uuid)

    async def set_role(self, volume: VolumeState, role: Role, epoch: int = 1) -> None:
        await self.engine.transact(lambda txn: txn.put_ownership(Ownership(volume.uuid, role, epoch)))

    async def remote_volume(self, pages: int = 8, name: str = "vm") -> tuple[VolumeState, int]:
        """A volume whose every page is still at a peer, and the layer that they belong to."""

        def receive(txn: Any) -> Any:
            layer = txn.receive_layer(name.encode().ljust(16, b"L"), 0, pages * PAGE, pages * PAGE)
            txn.put_map(layer.id, [(0, pages, REMOTE)], mapped=pages)
            return txn.create_volume(name, pages * PAGE, parent=layer.id), layer.id

        record, layer_id = await self.engine.transact(receive)
        return self.engine.open_volume(record.uuid), layer_id


async def write(engine: Engine, volume: VolumeState, offset: int, data: bytes) -> None:
    """As the mount does it."""
    if not engine.write_now(volume, offset, data):
        await engine.write(volume, offset, data)


async def read(engine: Engine, volume: VolumeState, offset: int, length: int) -> bytes:
    data: Buffer | None = engine.read_now(volume, offset, length)
    if data is None:
        data = await engine.read(volume, offset, length)
    return bytes(data)


async def extents(engine: Engine, volume: VolumeState, start: int = 0) -> list[tuple[int, int]]:
    """The data of a volume in bytes, found as `cp` and `qemu-img` do: by seeking from one to the next."""
    found = []
    at: int | None = start
    while (begin := await engine.seek(volume, at, data=True)) is not None:
        at = await engine.seek(volume, begin, data=False)
        assert at is not None and begin < at <= volume.size
        found.append((begin, at))
        if at == volume.size:
            break
    return found


async def holes(engine: Engine, volume: VolumeState) -> list[tuple[int, int]]:
    """What is between."""
    edges = [0, *(edge for extent in await extents(engine, volume) for edge in extent), volume.size]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


async def outcome(call: Coroutine[Any, Any, Any]) -> Any:
    """What a call returns or raises."""
    try:
        return await call
    except Exception as error:
        return error


def page(number: int) -> bytes:
    """A page's bytes that say which one it is."""
    return number.to_bytes(8, "little") * (PAGE // 8)
