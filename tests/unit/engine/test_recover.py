"""Replaying the log of a daemon that died."""

from __future__ import annotations

import os

import pytest
from trio.testing import MockClock

from silofs.blocks import PAGE
from silofs.layers.catalog import Ownership, Role
from silofs.layers.log import WriteLog
from silofs.layers.records import WRITE

from .rig import Rig, page, read, write


async def test_a_new_memfd_numbers_its_records_above_what_the_store_has_applied(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        for number in range(50):
            await write(engine, volume, 0, page(number))
        await engine.flush(volume)
        last = volume.last_lsn
    os.close(rig.fd)
    rig.fd = os.memfd_create("log")  # the holder is gone as well, as after a power cut
    WriteLog.format(rig.fd, rig.store.uuid, 1 << 20)
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        await write(engine, volume, 0, page(99))
        assert volume.last_lsn > last
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, PAGE) == page(99)


async def test_what_is_applied_is_skipped_and_what_is_not_is_applied(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        with monkeypatch.context() as patch:
            patch.setattr(WriteLog, "release", lambda *_: None)  # killed before the log's space was given back
            await engine.flush(volume)
        await write(engine, volume, PAGE, page(2))
    rig.start()
    assert await read(rig.engine, rig.engine.open_volume(volume.uuid), 0, 2 * PAGE) == page(1) + page(2)
    rig.stop()


async def test_recovery_can_be_repeated(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await write(engine, volume, PAGE, b"x")
        await engine.discard(volume, 0, PAGE)
        await write(engine, volume, PAGE - 1, b"yz")
        image = os.pread(rig.fd, os.fstat(rig.fd).st_size, 0)
    for _ in range(3):
        os.pwrite(rig.fd, image, 0)  # killed after the commit of the recovery, before the log was emptied
        async with rig.running() as engine:
            volume = engine.open_volume(volume.uuid)
            assert await read(engine, volume, 0, 2 * PAGE) == bytes(PAGE - 1) + b"yz" + bytes(PAGE - 1)


async def test_records_after_a_gap_or_of_another_epoch_or_volume_are_dropped(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        one = await rig.volume(name="one")
        two = await rig.volume(name="two")
        gone = await rig.volume(name="gone")
        for volume in (one, two, gone):
            await write(engine, volume, 0, page(1))
        log = engine.log
        log.append(WRITE, one.uuid, one.epoch, one.last_lsn - 1, PAGE, PAGE, page(2))  # a gap
        log.append(WRITE, one.uuid, one.epoch, log.next_lsn - 1, 2 * PAGE, PAGE, page(3))
        lsn, _ = log.append(WRITE, two.uuid, two.epoch + 1, two.last_lsn, PAGE, PAGE, page(2))
        log.append(WRITE, two.uuid, two.epoch, lsn, 2 * PAGE, PAGE, page(3))
        rig.store.write(lambda txn: txn.delete_volume(gone.uuid))
    found = rig.start().recover  # `start` has recovered; the figures are of a second run, over an empty log
    assert found().applied == 0
    for volume in (one, two):
        assert await read(rig.engine, rig.engine.open_volume(volume.uuid), 0, 3 * PAGE) == page(1) + bytes(2 * PAGE)
    assert rig.log.used == 0
    rig.stop()


async def test_a_ceded_volume_takes_nothing_from_the_log(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        rig.store.write(lambda txn: txn.put_ownership(Ownership(volume.uuid, Role.CEDED, 2)))
    with rig.start().store.reader() as txn:
        assert not txn.resolve(txn.volume(volume.uuid).head, 0).any()
    rig.stop()
