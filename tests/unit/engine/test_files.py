"""A volume is a file: what was written is read, at every stage of its way to the disk."""

from __future__ import annotations

import os

import pytest
from trio.testing import MockClock

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.errors import BadSize, Damaged, NoSuchVolume, ReadOnly

from .rig import MIB, Rig, outcome, page, read, write


async def test_a_write_is_read_while_it_waits_while_it_is_committed_and_after(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 3 * PAGE, page(1))
        assert engine.read_now(volume, 3 * PAGE, PAGE) == page(1)
        await engine.flush(volume)
        assert await read(engine, volume, 3 * PAGE, PAGE) == page(1)
        assert await read(engine, volume, 2 * PAGE, 3 * PAGE) == bytes(PAGE) + page(1) + bytes(PAGE)
        await write(engine, volume, 3 * PAGE + 100, b"xyz")
        expected = page(1)[:100] + b"xyz" + page(1)[103:]
        assert await read(engine, volume, 3 * PAGE, PAGE) == expected
        await engine.flush(volume)
        assert await read(engine, volume, 3 * PAGE, PAGE) == expected


async def test_a_warm_page_is_read_without_a_thread(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1) + page(2))
        await engine.flush(volume)
        assert await read(engine, volume, 0, PAGE) == page(1)
        jobs = rig.inline.jobs
        assert bytes(engine.read_now(volume, PAGE, PAGE) or b"") == page(2)
        assert bytes(engine.read_now(volume, 10, PAGE) or b"") == (page(1) + page(2))[10 : 10 + PAGE]
        assert rig.inline.jobs == jobs


async def test_an_object_that_was_not_looked_up_lately_is_read_by_a_thread(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        for number in range(40):
            await write(engine, volume, number * PAGE, page(number + 1))
        await engine.flush(volume)
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        assert engine.read_now(volume, 0, PAGE) is None
        assert await read(engine, volume, 0, PAGE) == page(1)
        jobs = rig.inline.jobs
        assert engine.read_now(volume, PAGE, PAGE) == page(2)  # of the same object
        assert engine.read_now(volume, 39 * PAGE, PAGE) is None
        assert await read(engine, volume, 0, 40 * PAGE) == b"".join(page(number + 1) for number in range(40))
        assert rig.inline.jobs == jobs + 1
        engine.reads.age()
        assert engine.read_now(volume, 0, PAGE) == page(1)
        engine.reads.age()
        engine.reads.age()
        assert engine.read_now(volume, 0, PAGE) is None


async def test_nothing_is_read_beyond_the_end_and_nothing_short_before_it(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(2 * PAGE + 512)
        await write(engine, volume, 2 * PAGE, b"e" * 512)
        for _ in range(2):
            assert await read(engine, volume, 2 * PAGE, PAGE) == b"e" * 512
            assert await read(engine, volume, PAGE, 2 * PAGE) == bytes(PAGE) + b"e" * 512
            assert await read(engine, volume, 2 * PAGE + 512, PAGE) == b""
            assert await read(engine, volume, 10 * PAGE, 1) == b""
            assert await read(engine, volume, 0, 1) == b"\0"
            await engine.flush(volume)


async def test_a_write_beyond_the_end_grows_the_volume(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(0)
        await write(engine, volume, 0, b"a" * 1000)
        await write(engine, volume, 1000, b"b" * 5000)
        assert volume.size == 6000
        await engine.flush(volume)
        assert engine.store.reader().volume(volume.uuid).size == 6000
        await write(engine, volume, 3 * PAGE, b"c")
        assert await read(engine, volume, 0, MIB) == b"a" * 1000 + b"b" * 5000 + bytes(3 * PAGE - 6000) + b"c"
        too_far = await outcome(engine.write(volume, 1 << 50, b"x"))
        assert isinstance(too_far, BadSize)
    async with rig.running() as engine:  # the last one was never committed: it is replayed
        volume = engine.open_volume(volume.uuid)
        assert volume.size == 3 * PAGE + 1
        assert (await read(engine, volume, 0, MIB))[-2:] == b"\0c"


async def test_a_long_write_and_a_long_read(rig: Rig, autojump_clock: MockClock) -> None:
    data = os.urandom(MIB + 12345)
    async with rig.running() as engine:
        volume = await rig.volume(8 * MIB)
        await engine.write(volume, LEAF_BYTES - 70000, data)
        for _ in range(2):
            assert await read(engine, volume, LEAF_BYTES - 70000, len(data)) == data
            assert await read(engine, volume, LEAF_BYTES - 70000 + 5, MIB) == data[5 : 5 + MIB]
            await engine.flush(volume)
        await write(engine, volume, LEAF_BYTES, b"P" * PAGE)
        await write(engine, volume, LEAF_BYTES + 9, b"q")
        mixed = bytearray(data)
        mixed[70000 : 70000 + PAGE] = b"P" * 9 + b"q" + b"P" * (PAGE - 10)
        assert await read(engine, volume, LEAF_BYTES - 70000, len(data)) == mixed


async def test_holes_are_read_inline_and_cost_no_page(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(1 << 40)
        assert await read(engine, volume, 1 << 39, MIB) == bytes(MIB)
        data = engine.read_now(volume, (1 << 39) + 4096, MIB)
        assert isinstance(data, memoryview)
        assert data == bytes(MIB)


async def test_discard_makes_zeros_and_frees(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(64 * PAGE)
        for number in range(64):
            await write(engine, volume, number * PAGE, page(number + 1))
        await engine.flush(volume)
        assert engine.shown(volume.record)[2] == 64  # type: ignore[arg-type]
        await engine.discard(volume, 10 * PAGE + 100, 20 * PAGE)
        expected = bytearray(b"".join(page(number + 1) for number in range(64)))
        expected[10 * PAGE + 100 : 30 * PAGE + 100] = bytes(20 * PAGE)
        assert engine.shown(volume.record)[2] == 64 - 19  # type: ignore[arg-type]
        for _ in range(2):
            assert await read(engine, volume, 0, 64 * PAGE) == expected
            await engine.flush(volume)
        assert engine.shown(volume.record)[2] == 64 - 19  # type: ignore[arg-type]
        await engine.discard(volume, 62 * PAGE + 1, 1 << 45)
        await engine.discard(volume, 5, 7)
        await engine.discard(volume, 1 << 45, 7)
        expected[62 * PAGE + 1 :] = bytes(2 * PAGE - 1)
        expected[5:12] = bytes(7)
        assert await read(engine, volume, 0, 64 * PAGE) == expected
        await engine.discard(volume, 0, 64 * PAGE)
        await engine.flush(volume)
        assert engine.shown(volume.record)[2] == 0  # type: ignore[arg-type]


async def test_a_huge_discard_is_one_record(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(1 << 45)
        await write(engine, volume, 1 << 44, page(1))
        await engine.flush(volume)
        before = engine.log.appended
        await engine.discard(volume, 0, 1 << 45)
        assert engine.log.appended == before + 1
        assert await read(engine, volume, 1 << 44, PAGE) == bytes(PAGE)
        await engine.flush(volume)
        assert await read(engine, volume, 1 << 44, PAGE) == bytes(PAGE)


async def test_shrink_then_grow_shows_zeros(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(3 * LEAF_BYTES)
        for at in range(0, 3 * LEAF_BYTES, LEAF_BYTES // 2):
            await write(engine, volume, at, page(at + 1))
        assert await read(engine, volume, 0, PAGE) == page(1)
        await engine.resize(volume, LEAF_BYTES + 1000)
        assert volume.size == LEAF_BYTES + 1000
        await engine.resize(volume, 3 * LEAF_BYTES)
        expected = bytearray(3 * LEAF_BYTES)
        expected[:PAGE] = page(1)
        expected[LEAF_BYTES // 2 : LEAF_BYTES // 2 + PAGE] = page(LEAF_BYTES // 2 + 1)
        expected[LEAF_BYTES : LEAF_BYTES + 1000] = page(LEAF_BYTES + 1)[:1000]
        assert await read(engine, volume, 0, 3 * LEAF_BYTES) == expected
        refused = await outcome(engine.resize(volume, 1 << 51))
        assert isinstance(refused, BadSize)
        assert volume.writable


async def test_a_shrink_into_the_last_page_of_a_leaf(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(2 * LEAF_BYTES)
        await write(engine, volume, LEAF_BYTES - PAGE, page(7))
        await engine.flush(volume)
        assert await read(engine, volume, LEAF_BYTES - PAGE, PAGE) == page(7)
        await engine.resize(volume, LEAF_BYTES - 50)
        await engine.resize(volume, 2 * LEAF_BYTES)
        assert await read(engine, volume, LEAF_BYTES - PAGE, PAGE) == page(7)[:-50] + bytes(50)


async def test_a_snapshot_keeps_what_was(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        snapshot = await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s"))
        view = engine.open_layer(volume.uuid, snapshot.layer)
        await write(engine, volume, 0, page(2))
        for _ in range(2):
            assert await read(engine, view, 0, PAGE) == page(1)
            assert await read(engine, volume, 0, PAGE) == page(2)
            await engine.flush(volume)
        assert isinstance(await outcome(engine.write(view, 0, b"x")), ReadOnly)
        assert engine.open_layer(volume.uuid, snapshot.layer) is view
        await engine.flush(view)
        await engine.transact(lambda txn: txn.remove_snapshot(volume.uuid, "s"))
        assert await read(engine, volume, 0, PAGE) == page(2)
        assert await read(engine, volume, PAGE, PAGE) == bytes(PAGE)


async def test_a_seal_leaves_the_cache_warm_and_a_rollback_does_not(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        snapshot = await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s"))
        assert await read(engine, volume, 0, PAGE) == page(1)
        jobs = rig.inline.jobs
        await engine.transact(lambda txn: txn.seal(volume.uuid))
        assert await read(engine, volume, 0, PAGE) == page(1)
        assert rig.inline.jobs == jobs
        await write(engine, volume, 0, page(2))
        await write(engine, volume, PAGE, page(3))
        await engine.flush(volume)
        await write(engine, volume, 2 * PAGE, page(4))
        await engine.transact(lambda txn: txn.rollback(volume.uuid, snapshot.layer))
        assert await read(engine, volume, 0, 3 * PAGE) == page(1) + bytes(2 * PAGE)


async def test_a_deleted_volume_is_gone(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        version = engine.catalog_version
        await engine.transact(lambda txn: txn.delete_volume(volume.uuid))
        assert engine.catalog_version != version
        assert engine.catalog() == ([], [])
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), NoSuchVolume)
        assert isinstance(await outcome(engine.write(volume, 0, b"x")), NoSuchVolume)
        with pytest.raises(NoSuchVolume):
            engine.open_volume(volume.uuid)
        await engine.flush(volume)


async def test_attributes_show_what_is_not_committed_yet(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(MIB)
        record = volume.record
        assert record is not None
        assert engine.shown(record) == (record, MIB, 0)
        await write(engine, volume, 0, page(1))
        await write(engine, volume, MIB, page(1))
        shown, size, pages = engine.shown(record)
        assert (size, pages) == (MIB + PAGE, 2)
        assert shown.mtime_ns > record.mtime_ns
        assert engine.dirty_bytes == 2 * PAGE
        await engine.flush(volume)
        assert volume.record is not None
        assert volume.record.mtime_ns >= shown.mtime_ns
        assert engine.shown(record)[1:] == (MIB + PAGE, 2)
        assert engine.dirty_bytes == 0
        await engine.transact(lambda txn: txn.set_attr(volume.uuid, mtime_ns=5, mode=0o640))
        assert engine.shown(record)[0].mtime_ns == 5


async def test_a_damaged_page_is_an_error_also_where_it_was_warm(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, b"".join(page(number + 1) for number in range(20)))
        await engine.flush(volume)
        assert await read(engine, volume, 0, 20 * PAGE)
        data = rig.path / "data" / "data.mdb"
        at = data.read_bytes().index(page(5)) + 77
        with data.open("r+b") as file:
            file.seek(at)
            file.write(b"!")
        assert engine.read_now(volume, 4 * PAGE, PAGE) is None
        for offset, length in ((4 * PAGE, PAGE), (0, 20 * PAGE), (4 * PAGE + 5, 1)):
            assert isinstance(await outcome(read(engine, volume, offset, length)), Damaged)
        assert await read(engine, volume, 3 * PAGE, PAGE) == page(4)
        assert await read(engine, volume, 5 * PAGE, 15 * PAGE) == b"".join(page(number + 1) for number in range(5, 20))
        # Part of it is written: the rest cannot be made up. Healed by writing all of it.
        await write(engine, volume, 4 * PAGE, b"part")
        assert isinstance(await outcome(read(engine, volume, 4 * PAGE, PAGE)), Damaged)
        await engine.flush(volume)
        assert isinstance(await outcome(read(engine, volume, 4 * PAGE, PAGE)), Damaged)
        await write(engine, volume, 4 * PAGE, page(5))
        for _ in range(2):
            assert await read(engine, volume, 4 * PAGE, PAGE) == page(5)
            await engine.flush(volume)


async def test_damage_below_what_was_overwritten_harms_nobody(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, b"".join(page(number + 1) for number in range(20)))
        await engine.flush(volume)
        data = rig.path / "data" / "data.mdb"
        at = data.read_bytes().index(page(5)) + 77
        with data.open("r+b") as file:
            file.seek(at)
            file.write(b"!")
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        await write(engine, volume, 4 * PAGE, page(99))
        got = await read(engine, volume, 0, 20 * PAGE)
        assert got[4 * PAGE : 5 * PAGE] == page(99)
