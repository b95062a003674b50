"""A call that is sent a second time, to the daemon that did it or to its successor, changes nothing more."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pyfuse3 import FUSEError
from trio.testing import MockClock

from silofs import failpoints
from silofs.facts import View
from silofs.layers import requests as store
from silofs.mount.extension import RESENT
from silofs.mount.files import Space, Volumes
from silofs.mount.fuse import Adapter
from silofs.mount.requests import READS_AT_MOST, Requests
from silofs.mount.tree import ROOT
from tests.unit.engine.rig import Rig

CTX: Any = Mock(uid=0, gid=0)
FILE = b"vm1.img"


class Daemons:
    """Daemons of one mount, one after the other."""

    def __init__(self, path: Path) -> None:
        self.rig = Rig(path)
        self.number: int | None = None
        self.adapter: Adapter
        self.requests: Requests

    @asynccontextmanager
    async def daemon(self, *, settled: bool = True) -> AsyncIterator[Adapter]:
        async with self.rig.running() as engine:
            mount = self.rig.log.memory.superblock.secret
            self.requests = Requests(mount, lambda: self.number, lambda: engine.reads.txn)
            if settled:
                self.requests.seen(0, True)
            self.adapter = Adapter()
            view, space = View(self.rig.path), Space(1 << 30, 1 << 30)
            handles = self.rig.log.handles

            async def allowed(verb: str, name: str) -> None:
                pass

            self.adapter.bind(Volumes(engine, handles, None, lambda: view, lambda: space, allowed, self.requests))
            yield self.adapter

    async def request(self, number: int | None, call: Callable[[], Awaitable[Any]]) -> Any:
        self.number = number
        return await call()

    async def killed(self, number: int, place: str, call: Callable[[], Awaitable[Any]]) -> None:
        """The call comes to that place, and its answer never leaves."""
        failpoints.rearm(f"{place}:raise")
        try:
            with pytest.raises(FUSEError):
                await self.request(number, call)
            assert failpoints.spent(place)
        finally:
            failpoints.rearm("")

    @property
    def names(self) -> list[str]:
        return [volume.name for volume in self.rig.engine.reads.txn.volumes()]


@pytest.fixture
def daemons(tmp_path: Path) -> Daemons:
    return Daemons(tmp_path / "store")


async def make(daemons: Daemons, name: bytes = FILE, number: int | None = None) -> int:
    """A new file, closed again; its inode."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    info, attributes = await daemons.request(number, lambda: daemons.adapter.create(ROOT, name, 0o600, flags, CTX))
    await daemons.adapter.release(info.fh)
    return int(attributes.st_ino)


async def test_a_second_unlink_leaves_the_new_file_alone(daemons: Daemons, autojump_clock: MockClock) -> None:
    async with daemons.daemon() as adapter:
        await make(daemons)
        await daemons.killed(10, "unlink.committed", lambda: adapter.unlink(ROOT, FILE, CTX))
    async with daemons.daemon(settled=False) as adapter:
        inode = await make(daemons, number=12)
        await daemons.request(10 | RESENT, lambda: adapter.unlink(ROOT, FILE, CTX))
        assert (await adapter.lookup(ROOT, FILE, CTX)).st_ino == inode
        # But the next one is another request.
        await daemons.request(14, lambda: adapter.unlink(ROOT, FILE, CTX))
        assert not daemons.names


async def test_a_second_rename_moves_nothing(daemons: Daemons, autojump_clock: MockClock) -> None:
    async with daemons.daemon():
        await make(daemons)
        move = lambda: daemons.adapter.rename(ROOT, FILE, ROOT, b"vm2.img", 0, CTX)  # noqa: E731
        await daemons.killed(10, "rename.committed", move)
    async with daemons.daemon(settled=False):
        inode = await make(daemons)
        await daemons.request(10 | RESENT, move)
        assert sorted(daemons.names) == ["vm1", "vm2"]
        assert (await daemons.adapter.lookup(ROOT, FILE, CTX)).st_ino == inode


@pytest.mark.parametrize("place", ["create.committed", "open.noted", "request.done"])
async def test_a_second_create_gives_the_first_ones_file_and_handle(
    daemons: Daemons, place: str, autojump_clock: MockClock
) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL

    async def create() -> Any:
        return await daemons.adapter.create(ROOT, FILE, 0o600, flags, CTX)

    async with daemons.daemon():
        await daemons.killed(10, place, create)
        (volume,) = daemons.rig.engine.reads.txn.volumes()
    async with daemons.daemon(settled=False) as adapter:
        await daemons.request(None, lambda: adapter.rename(ROOT, FILE, ROOT, b"vm2.img", 0, CTX))
        info, attributes = await daemons.request(10 | RESENT, create)
        assert attributes.st_ino == volume.inode and daemons.names == ["vm2"]
        again, _ = await daemons.request(10 | RESENT, create)
        assert again.fh == info.fh and len(daemons.rig.log.handles) == 1
        await adapter.release(info.fh)
        assert len(daemons.rig.log.handles) == 0


async def test_a_second_truncation_takes_nothing_of_what_came_after(
    daemons: Daemons, autojump_clock: MockClock
) -> None:
    async with daemons.daemon() as adapter:
        inode = await make(daemons)
        fh = (await daemons.request(8, lambda: adapter.open(inode, os.O_RDWR, CTX))).fh
        await adapter.write(fh, 0, b"old" * 2000)
        truncate = lambda: daemons.adapter.open(inode, os.O_RDWR | os.O_TRUNC, CTX)  # noqa: E731
        await daemons.killed(10, "open.noted", truncate)
    async with daemons.daemon(settled=False) as adapter:
        await adapter.write(fh, 0, b"new" * 2000)
        second = (await daemons.request(10 | RESENT, truncate)).fh
        assert bytes(await adapter.read(second, 0, 10000)) == b"new" * 2000


@pytest.mark.parametrize("place", ["open.noted", "request.done"])
async def test_a_second_create_of_a_file_that_was_there_truncates_nothing(
    daemons: Daemons, place: str, autojump_clock: MockClock
) -> None:
    """What `> vm1.img` of a shell asks for."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC

    async def create() -> Any:
        return await daemons.adapter.create(ROOT, FILE, 0o600, flags, CTX)

    async with daemons.daemon() as adapter:
        inode = await make(daemons)
        fh = (await daemons.request(8, lambda: adapter.open(inode, os.O_RDWR, CTX))).fh
        await adapter.write(fh, 0, b"old" * 2000)
        await daemons.killed(10, place, create)
    async with daemons.daemon(settled=False) as adapter:
        await adapter.write(fh, 0, b"new" * 2000)
        info, attributes = await daemons.request(10 | RESENT, create)
        assert attributes.st_ino == inode and info.fh != fh
        assert bytes(await adapter.read(info.fh, 0, 10000)) == b"new" * 2000


async def test_what_was_not_done_before_is_done(daemons: Daemons, autojump_clock: MockClock) -> None:
    async with daemons.daemon() as adapter:
        await make(daemons)
        await daemons.request(10 | RESENT, lambda: adapter.unlink(ROOT, FILE, CTX))
        assert not daemons.names


def remembered(daemons: Daemons) -> set[int]:
    return set(store.remembered(daemons.rig.engine.reads.txn))


async def test_only_what_may_not_have_been_answered_is_remembered(daemons: Daemons, autojump_clock: MockClock) -> None:
    async with daemons.daemon() as adapter:
        for number in range(2, 40, 2):
            await make(daemons, b"vm%d.img" % number, number)
            assert remembered(daemons) == {number}
        await daemons.killed(50, "unlink.committed", lambda: adapter.unlink(ROOT, b"vm2.img", CTX))
        assert remembered(daemons) == {50}
        await daemons.request(52, lambda: adapter.unlink(ROOT, b"vm4.img", CTX))
        assert remembered(daemons) == {50, 52}
    async with daemons.daemon(settled=False) as adapter:
        assert remembered(daemons) == {50, 52}
        daemons.requests.seen(0, True)
        await daemons.request(60, lambda: adapter.unlink(ROOT, b"vm6.img", CTX))
        assert remembered(daemons) == {60}


async def test_another_mount_has_other_requests(daemons: Daemons, autojump_clock: MockClock) -> None:
    async with daemons.daemon():
        await make(daemons, number=10)
        txn = daemons.rig.engine.reads.txn
        mount = daemons.rig.log.memory.superblock.secret
        assert store.find(txn, mount, 10) is not None and store.find(txn, mount ^ 1, 10) is None


async def test_settled_means_that_all_that_was_left_is_answered(daemons: Daemons, autojump_clock: MockClock) -> None:
    async with daemons.daemon(settled=False):
        requests = daemons.requests
        assert not requests.seen(64, False) and not requests.settled.is_set()
        with requests.handle(names=True), requests.handle():
            assert requests.seen(0, True), "nobody has to tell it any more"
            with requests.handle(names=True):
                pass  # came later
            assert not requests.settled.is_set()
        assert requests.settled.is_set()
    async with daemons.daemon(settled=False):
        with daemons.requests.handle():
            daemons.requests.seen(0, True)
            assert daemons.requests.settled.is_set(), "a size may have to wait for a command"
    async with daemons.daemon(settled=False):
        assert not daemons.requests.seen(READS_AT_MOST - 1, False)
        assert daemons.requests.seen(1, False), "the queue was never seen empty, and yet it is past what was left"
        assert daemons.requests.settled.is_set()
