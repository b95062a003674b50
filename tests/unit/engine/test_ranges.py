"""Where data and holes are, in every state that a page can be in; and fallocate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.engine import Engine, Threads, VolumeState, ranges
from silofs.errors import NoSuchVolume, NotOwner
from silofs.layers.catalog import Role
from silofs.limits import TIB

from .rig import MIB, Rig, extents, outcome, page, read, write


async def put(engine: Engine, volume: VolumeState, *pages: int) -> None:
    for number in pages:
        await write(engine, volume, number * PAGE, page(number + 1))


def runs(*pairs: tuple[int, int]) -> list[tuple[int, int]]:
    """Page ranges in bytes."""
    return [(first * PAGE, end * PAGE) for first, end in pairs]


async def nothing(engine: Engine, volume: VolumeState) -> None:
    pass


async def commit(engine: Engine, volume: VolumeState) -> None:
    await engine.commit_all()


async def forget(engine: Engine, volume: VolumeState) -> None:
    """Committed, and no leaf resolved."""
    await engine.commit_all()
    engine.reads.forget(volume)


@pytest.mark.parametrize("then", [nothing, commit, forget])
async def test_data_is_found_whatever_has_become_of_it(
    rig: Rig, then: Callable[[Engine, VolumeState], Awaitable[None]]
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(5 * LEAF_BYTES)
        await put(engine, volume, 0, 3, 4, 511, 512, 1300)
        await then(engine, volume)
        expected = runs((0, 1), (3, 5), (511, 513), (1300, 1301))
        assert await extents(engine, volume) == expected
        assert await extents(engine, volume, 4 * PAGE + 7) == [(4 * PAGE + 7, 5 * PAGE), *expected[2:]]
        await engine.discard(volume, 4 * PAGE, 508 * PAGE)  # up to the end of the first leaf
        await put(engine, volume, 7)
        expected = runs((0, 1), (3, 4), (7, 8), (512, 513), (1300, 1301))
        assert await extents(engine, volume) == expected
        await then(engine, volume)
        assert await extents(engine, volume) == expected


async def test_what_is_being_committed_lies_below_what_is_pending(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(LEAF_BYTES)
        await put(engine, volume, 1, 2, 3, 20)
        await engine.commit_all()
        rig.inline.hold()
        await put(engine, volume, 8, 9)
        await engine.discard(volume, 2 * PAGE, PAGE)
        engine.commits.kick()
        while volume.flushing is None:
            await trio.lowlevel.checkpoint()
        await engine.discard(volume, 9 * PAGE, 4 * PAGE)
        await put(engine, volume, 2, 30)
        expected = runs((1, 4), (8, 9), (20, 21), (30, 31))
        assert await extents(engine, volume) == expected
        rig.inline.release.set()
        await engine.commit_all()
        assert await extents(engine, volume) == expected


async def test_the_end_of_a_volume_is_a_hole_and_nothing_follows_it(rig: Rig) -> None:
    async with rig.running() as engine:
        size = 3 * PAGE + 512
        volume = await rig.volume(size)
        for data in (True, False):
            assert await engine.seek(volume, size, data=data) is None
            assert await engine.seek(volume, 1 << 62, data=data) is None
        assert await engine.seek(volume, 0, data=True) is None
        assert await engine.seek(volume, 5, data=False) == 5
        await write(engine, volume, 3 * PAGE, b"x")
        for _ in range(2):
            assert await extents(engine, volume) == [(3 * PAGE, size)]
            assert await engine.seek(volume, size - 1, data=True) == size - 1
            assert await engine.seek(volume, size - 1, data=False) == size
            await engine.commit_all()


async def test_a_sparse_giant_is_searched_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(64 * TIB)
        places = [0, 7 * TIB, 64 * TIB - PAGE]
        for place in places:
            await write(engine, volume, place, page(1))
        await forget(engine, volume)
        await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s"))  # and through a chain
        await write(engine, volume, 9 * TIB, page(1))
        monkeypatch.setattr(ranges, "SEEK_LEAVES", 2)
        jobs = rig.inline.jobs
        found = await extents(engine, volume)
        assert found == [(place, place + PAGE) for place in sorted([*places, 9 * TIB])]
        assert rig.inline.jobs - jobs < 16


async def test_a_long_search_goes_in_bounded_steps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(40 * LEAF_BYTES)
        for leaf in range(32):
            await write(engine, volume, leaf * LEAF_BYTES, page(1) * 512)
            await engine.commit_all()
        engine.reads.forget(volume)
        monkeypatch.setattr(ranges, "SEEK_LEAVES", 4)
        jobs = rig.inline.jobs
        assert await engine.seek(volume, 0, data=False) == 32 * LEAF_BYTES
        assert 8 <= rig.inline.jobs - jobs <= 10


async def test_a_full_volume_is_not_searched(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(3 * LEAF_BYTES + 512)
        await write(engine, volume, 0, page(1) * (3 * 512) + bytes([1] * 512))
        await forget(engine, volume)
        snapshot = await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s"))
        jobs = rig.inline.jobs
        for each in (volume, engine.open_layer(volume.uuid, snapshot.layer)):
            assert await extents(engine, each, 7) == [(7, volume.size)]
        assert rig.inline.jobs == jobs
        await engine.discard(volume, LEAF_BYTES, PAGE)
        for _ in range(2):
            assert await extents(engine, volume) == [(0, LEAF_BYTES), (LEAF_BYTES + PAGE, volume.size)]
            await engine.commit_all()
        await engine.resize(volume, 4 * LEAF_BYTES)
        assert (await extents(engine, volume))[-1] == (LEAF_BYTES + PAGE, (3 * 512 + 1) * PAGE)


async def test_pages_at_a_peer_are_data(rig: Rig) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume(pages=8)
        await engine.discard(volume, 2 * PAGE, PAGE)
        assert await extents(engine, volume) == runs((0, 2), (3, 8))
        await engine.commit_all()
        assert await extents(engine, volume) == runs((0, 2), (3, 8))


async def test_a_volume_that_is_elsewhere_is_data_throughout(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(MIB)
        await rig.set_role(volume, Role.CEDED)
        assert await extents(engine, volume, 5) == [(5, MIB)]
        assert isinstance(await outcome(engine.allocate(volume, 0, 2 * MIB, zero=False, extend=True)), NotOwner)
        assert isinstance(await outcome(engine.allocate(volume, 0, PAGE, zero=False, extend=False)), NotOwner)


async def test_a_deleted_volume_has_neither(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(MIB)
        await engine.transact(lambda txn: txn.delete_volume(volume.uuid))
        assert isinstance(await outcome(engine.seek(volume, 0, data=True)), NoSuchVolume)


async def test_searches_beside_commits_with_real_threads(rig: Rig) -> None:
    """Page 1 is data and page 3 is not, at every moment, whatever the others do and wherever their commit is."""
    rig.threads = Threads(2)
    async with rig.running() as engine:
        volume = await rig.volume(4 * LEAF_BYTES)
        await put(engine, volume, 1)

        async def churn() -> None:
            for number in range(150):
                await put(engine, volume, 1, 600 + number)
                await engine.discard(volume, 2 * PAGE, 4 * PAGE)
                if number % 3 == 0:
                    await engine.commit_all()
                engine.reads.forget(volume)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(churn)
            for _ in range(300):
                assert await engine.seek(volume, 0, data=True) == PAGE
                assert await engine.seek(volume, PAGE, data=False) == 2 * PAGE
                await trio.lowlevel.checkpoint()


async def test_allocating(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(MIB)
        await put(engine, volume, 0, 1, 2)
        await engine.allocate(volume, 0, 3 * MIB, zero=False, extend=False)
        assert volume.size == MIB and await extents(engine, volume) == runs((0, 3))
        await engine.allocate(volume, PAGE, MIB, zero=False, extend=True)
        assert volume.size == MIB + PAGE and await extents(engine, volume) == runs((0, 3))
        await engine.allocate(volume, PAGE, PAGE, zero=True, extend=False)
        assert await extents(engine, volume) == runs((0, 1), (2, 3))
        await engine.allocate(volume, PAGE + 100, 2 * MIB, zero=True, extend=True)
        assert volume.size == 2 * MIB + PAGE + 100
        await engine.commit_all()
        assert await extents(engine, volume) == runs((0, 1))
        assert await read(engine, volume, 0, 4 * MIB) == page(1).ljust(volume.size, b"\0")
        assert engine.open_volume(volume.uuid).record is not None
        await engine.allocate(volume, 0, MIB, zero=True, extend=True)  # never shorter
        assert volume.size == 2 * MIB + PAGE + 100
