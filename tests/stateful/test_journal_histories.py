"""Histories of writes, syncs, commits, failing disks, dead daemons and power cuts, against a model of a disk.

What the model allows after a power cut, of each volume by itself: the writes up to some moment, in order, and that
moment is not before the last sync that returned. After the death of a daemon alone: every write. A power cut in the
middle of a write to the journal leaves any set of its sectors; one in the middle of a commit leaves the store before it
or after it.
"""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from silofs import failpoints
from silofs.blocks import PAGE
from silofs.engine import Engine, commits
from silofs.errors import SiloError
from silofs.layers import journal
from silofs.layers.check import check
from silofs.layers.store import Store
from tests.unit.engine.rig import Rig, read, write

MIB = 1 << 20
PAGES = 12
RING = 128 * 1024  # about thirty pages: laps come often
SECTOR = 512
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where stores can be synced for nothing: what a power cut leaves is played here, not had."""


class Disk:
    """One volume: what it held after each of its mutations."""

    def __init__(self) -> None:
        self.states = [bytes(PAGES * PAGE)]
        self.synced = 0

    def put(self, offset: int, data: bytes) -> None:
        now = bytearray(self.states[-1])
        now[offset : offset + len(data)] = data
        self.states.append(bytes(now))

    def found(self, content: bytes, *, power: bool) -> None:
        """After a restart: it is one of the states allowed, and the only one from here on."""
        allowed = self.states[self.synced :] if power else self.states[-1:]
        assert content in allowed, "a synced write is lost, or the order is not kept"
        self.states, self.synced = [content], 0


step = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, PAGES - 3), st.sampled_from([1, 2, 3])),
    st.tuples(st.just("patch"), st.integers(0, 1), st.integers(0, PAGES * PAGE - 900), st.integers(1, 900)),
    st.tuples(st.just("discard"), st.integers(0, 1), st.integers(0, PAGES - 2), st.sampled_from([1, 2])),
    st.tuples(st.just("sync"), st.integers(0, 1)),
    st.tuples(st.just("sync"), st.integers(0, 1)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("change"), st.integers(0, 1)),
    st.tuples(st.just("fill"), st.integers(0, 1)),
    st.tuples(st.just("kill")),
    st.tuples(st.just("power")),
    st.tuples(st.just("fail"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("cut"), st.integers(0, 1), st.integers(0, 1 << 32)),
    st.tuples(st.just("torn commit"), st.booleans()),
    st.tuples(st.just("wait")),
    st.tuples(st.just("offline")),
)


@contextmanager
def writing(how: Any) -> Iterator[None]:
    """Writes of records to the journal go to `how` (fd, buffers, position) instead."""
    real = journal._write

    def write(fd: int, buffers: list[Any], position: int) -> None:
        (how if position else real)(fd, buffers, position)  # at 0 is a superblock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_write", write)
        yield


class History:
    """Runs the steps. A step that ends in a restart says how."""

    def __init__(self, path: Path) -> None:
        self.rig = Rig(path, ring=RING, journal=True)
        self.disks = [Disk(), Disk()]
        self.uuids: list[bytes] = []
        self.count = 0

    async def run(self, steps: list[tuple[Any, ...]]) -> None:
        todo = list(steps)
        while True:
            ended = ""
            async with self.rig.running() as engine:
                if not self.uuids:
                    self.uuids = [(await self.rig.volume(PAGES * PAGE, name=name)).uuid for name in ("one", "two")]
                with trio.move_on_after(1):
                    while not engine.commits.journal.takes():
                        await trio.sleep(0.01)
                while todo and not ended:
                    ended = await self.step(engine, *todo.pop(0))
            if ended in ("power", "offline"):
                self.rig.cut_power()
            if ended == "offline":
                Store.open(self.rig.path).close()
            async with self.rig.running() as engine:
                for disk, uuid in zip(self.disks, self.uuids, strict=True):
                    content = await read(engine, engine.open_volume(uuid), 0, PAGES * PAGE)
                    disk.found(content, power=ended in ("power", "offline"))
                with self.rig.store.reader() as txn:
                    assert not check(txn, read_data=True)
            if not todo:
                return

    async def step(self, engine: Engine, what: str, *args: Any) -> str:
        """One step; how the daemon ended, if it did."""
        if what in ("kill", "power", "offline"):
            return what
        if what == "wait":
            await trio.sleep(100)
        elif what == "commit":
            await engine.commit_all()
            self.all_synced()
        elif what == "torn commit":
            return await self.torn_commit(engine, landed=args[0])
        else:
            await getattr(self, what)(engine, *args)
            if what == "cut":
                return "power"
        return ""

    def all_synced(self) -> None:
        for disk in self.disks:
            disk.synced = len(disk.states) - 1

    def fresh(self, length: int) -> bytes:
        self.count += 1
        return random.Random(self.count).randbytes(length)

    async def put(self, engine: Engine, which: int, offset: int, data: bytes) -> None:
        await write(engine, engine.open_volume(self.uuids[which]), offset, data)
        self.disks[which].put(offset, data)

    async def write(self, engine: Engine, which: int, page: int, pages: int) -> None:
        await self.put(engine, which, page * PAGE, self.fresh(pages * PAGE))

    async def patch(self, engine: Engine, which: int, offset: int, length: int) -> None:
        await self.put(engine, which, offset, self.fresh(length))

    async def fill(self, engine: Engine, which: int) -> None:
        """About a third of the ring."""
        for page in range(10):
            await self.put(engine, which, page * PAGE, self.fresh(PAGE))

    async def discard(self, engine: Engine, which: int, page: int, pages: int) -> None:
        await engine.discard(engine.open_volume(self.uuids[which]), page * PAGE, pages * PAGE)
        self.disks[which].put(page * PAGE, bytes(pages * PAGE))

    async def sync(self, engine: Engine, which: int) -> None:
        await engine.flush(engine.open_volume(self.uuids[which]))
        self.disks[which].synced = len(self.disks[which].states) - 1

    async def change(self, engine: Engine, which: int) -> None:
        """A snapshot: a transaction that commits the log of all volumes first."""
        self.count += 1
        name = f"s{self.count}"
        await engine.transact(lambda txn: txn.take_snapshot(self.uuids[which], name))
        self.all_synced()

    async def fail(self, engine: Engine, which: int, arrived: bool) -> None:
        """The next write to the journal fails, and may have arrived all the same; the fsync is true nevertheless."""
        real = journal._write

        def fails(fd: int, buffers: list[Any], position: int) -> None:
            if arrived:
                real(fd, buffers, position)
            raise OSError(errno.EIO, "Input/output error")

        with writing(fails):
            await self.sync(engine, which)

    async def cut(self, engine: Engine, which: int, seed: int) -> None:
        """The power goes in the middle of an fsync's write: any of its sectors are on the disk."""
        pick = random.Random(seed)

        def torn(fd: int, buffers: list[Any], position: int) -> None:
            for buffer in buffers:
                for at in range(0, len(buffer), SECTOR):
                    if pick.random() < 0.6:
                        _put_sector(fd, buffer[at : at + SECTOR], position + at)
                position += len(buffer)
            raise PowerCut

        with writing(torn), pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.commits, "_commit", _no_power)
            with trio.move_on_after(1):
                await engine.flush(engine.open_volume(self.uuids[which]))

    async def torn_commit(self, engine: Engine, *, landed: bool) -> str:
        """The power goes in the middle of a commit; what was written while it was in flight is synced."""
        failpoints.rearm(f"{'commit.durable' if landed else 'commit.before'}:raise")
        try:
            await engine.commits.commit()
        except (failpoints.FailpointReached, SiloError):
            pass
        else:
            return ""
        finally:
            failpoints.rearm("")
        return "power"


class PowerCut(Exception):
    """Nothing of this process goes on."""


async def _no_power(_: object) -> None:
    raise PowerCut


def _put_sector(fd: int, data: Any, position: int) -> None:
    """Past O_DIRECT's alignment."""
    with Path(f"/proc/self/fd/{fd}").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, position)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, min_size=3, max_size=30))
def test_no_synced_write_is_ever_lost(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "COMMIT_AGE_S", 50.0)
        history = History(Path(directory) / "store")
        try:
            trio.run(history.run, steps, clock=MockClock(autojump_threshold=0))
        finally:
            os.close(history.rig.fd)
