"""Who writes its fsyncs in place: a client that nobody shares the daemon with, on a disk that answers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from trio.testing import MockClock

from silofs.blocks import PAGE
from silofs.engine import VolumeState, journalling
from silofs.engine.alone import Alone
from silofs.engine.served import Served
from silofs.engine.threads import Bell
from silofs.layers import journal as journal_module
from silofs.limits import ALONE_FLUSHES, IN_PLACE_BYTES, IN_PLACE_NS, IN_PLACE_REST

from .rig import Rig, page, read, write
from .test_journalling import failing, patience, settled  # noqa: F401


class Client:
    """Sends requests for one volume, as the session and the mount count them."""

    def __init__(self, bell: Bell, alone: Alone) -> None:
        self.bell, self.alone, self.served = bell, alone, Served()

    def write(self) -> None:
        self.bell.requests += 1
        self.served.writes += 1

    def flush(self) -> bool:
        self.bell.requests += 1
        in_place = self.alone.flushes(self.served)
        self.served.flushes += 1
        return in_place


@pytest.fixture
def clients() -> tuple[Client, Client]:
    bell = Bell()
    alone = Alone(bell)
    return Client(bell, alone), Client(bell, alone)


def until_in_place(client: Client) -> int:
    count = 1
    while not client.flush():
        client.write()
        count += 1
    return count


def test_after_so_many_flushes_with_nobody_between_them(clients: tuple[Client, Client]) -> None:
    one, other = clients
    assert until_in_place(one) == ALONE_FLUSHES + 1  # of the first it is not known who came before it
    assert one.flush()
    other.write()
    assert not one.flush()
    assert until_in_place(one) == ALONE_FLUSHES


def test_two_who_flush_in_turns_are_not_alone(clients: tuple[Client, Client]) -> None:
    for _ in range(10 * ALONE_FLUSHES):
        for client in clients:
            client.write()
            assert not client.flush()


def test_a_request_that_is_under_way_is_company(clients: tuple[Client, Client]) -> None:
    one, _ = clients
    until_in_place(one)
    one.bell.requests += 1  # of the same volume, even
    assert not one.flush()


def test_a_slow_disk_is_given_a_rest(clients: tuple[Client, Client]) -> None:
    one, other = clients
    until_in_place(one)
    one.alone.took(IN_PLACE_NS)
    assert one.flush()
    one.alone.took(IN_PLACE_NS + 1)
    for _ in range(IN_PLACE_REST // 2):
        assert not one.flush()
    other.write()  # somebody else does not make the disk faster
    one.flush()
    assert until_in_place(one) == IN_PLACE_REST // 2 + ALONE_FLUSHES


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig(journal=True)


async def fsync(rig: Rig, volume: VolumeState, at: int, value: int) -> bool:
    """A write and an fsync as the mount counts them; whether the fsync needed no second turn."""
    bell = rig.threads.bell
    bell.requests += 1
    await write(rig.engine, volume, at * PAGE, page(value))
    volume.served.writes += 1
    bell.requests += 1
    at_once = rig.engine.commits.flush_now(volume)
    if not at_once:
        await rig.engine.flush(volume)
    volume.served.flushes += 1
    return at_once


async def test_in_place_it_is_as_durable(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        at_once = [await fsync(rig, volume, number, number) for number in range(ALONE_FLUSHES + 5)]
        assert at_once == [False] * ALONE_FLUSHES + [True] * 5
        journal = engine.commits.journal
        assert (journal.in_place, journal.syncs) == (5, len(at_once))
        assert journal.durable_lsn == volume.last_lsn + 1
    rig.cut_power()
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        for number in range(len(at_once)):
            assert await read(engine, volume, number * PAGE, PAGE) == page(number)


async def test_a_failure_in_place_is_a_commit(
    rig: Rig, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        while not await fsync(rig, volume, 0, 1):
            pass
        before = engine.commits.commits
        with failing(monkeypatch) as begun:
            assert not await fsync(rig, volume, 1, 2)
        assert begun == [1] and engine.commits.journal.failures == 1
        assert engine.commits.commits > before and volume.durable_lsn == volume.last_lsn
    rig.cut_power()
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), PAGE, PAGE) == page(2)


async def test_what_is_large_is_the_threads(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        while not await fsync(rig, volume, 0, 1):
            pass
        before = engine.commits.journal.in_place
        await write(engine, volume, 0, page(2) * (IN_PLACE_BYTES // PAGE))
        rig.threads.bell.requests += 1
        volume.served.writes += 1
        assert not await fsync(rig, volume, 40, 3)
        assert engine.commits.journal.in_place == before
        assert await fsync(rig, volume, 40, 4)


async def test_after_a_slow_one_the_thread_does_it(
    rig: Rig, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]
    monkeypatch.setattr(journalling, "perf_counter_ns", lambda: now[0])
    real = journal_module._write

    def slow(fd: int, buffers: list[Any], position: int) -> None:
        now[0] += IN_PLACE_NS + 1
        real(fd, buffers, position)

    monkeypatch.setattr(journal_module, "_write", slow)
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        while not await fsync(rig, volume, 0, 1):
            pass
        for number in range(IN_PLACE_REST):
            assert not await fsync(rig, volume, 1, number)
        assert engine.commits.journal.in_place == 1
