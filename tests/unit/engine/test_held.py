"""What was acknowledged has its space, whoever else fills the file system meanwhile; a full store can be emptied."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from silofs.blocks import PAGE
from silofs.errors import StoreFull
from silofs.layers.check import check
from silofs.layers.held import worst_case
from tests.smallfs import KINDS, fill, free, make_room, small
from tests.unit.engine.rig import MIB, Rig, outcome, page, read, write


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MiB."""
    with small(request.param, 300, tmp_path) as point:
        yield point


def findings(rig: Rig) -> list[object]:
    with rig.store.reader() as txn:
        return list(check(txn, read_data=True))


async def test_what_is_acknowledged_is_committed_although_another_program_filled_the_disk(place: Path) -> None:
    rig = Rig(place / "store", ring=24 * MIB)
    async with rig.running() as engine:
        volume = await rig.volume(size=1 << 34)
        rig.inline.hold()  # no commit ends from here on
        pages = random.Random(1).sample(range(1 << 22), 4000)  # a leaf each: the dearest writes there are
        for number in pages:
            await write(engine, volume, number * PAGE, page(number))
        assert fill(place) and free(place) < MIB
        rig.inline.release.set()
        await engine.flush(volume)
        assert engine.commits.failures == 0
        for number in pages:
            assert await read(engine, volume, number * PAGE, PAGE) == page(number)
    with rig_opened(rig):
        assert findings(rig) == []


async def test_a_write_that_finds_no_room_is_refused_and_goes_through_once_there_is_some(place: Path) -> None:
    rig = Rig(place / "store")
    async with rig.running() as engine:
        volume = await rig.volume(size=1 << 30)
        fill(place)
        done, refused = 0, None
        while refused is None and done < 100_000:
            result = await outcome(write(engine, volume, done * PAGE, page(done)))
            refused, done = result, done + (result is None)
        assert isinstance(refused, StoreFull)
        await engine.flush(volume)  # never a false success: all of it is there
        assert engine.commits.failures == 0
        for number in range(0, done, 97):
            assert await read(engine, volume, number * PAGE, PAGE) == page(number)
        assert isinstance(await outcome(write(engine, volume, done * PAGE, page(done))), StoreFull)
        make_room(place)
        await write(engine, volume, done * PAGE, page(done))
        await engine.flush(volume)


async def test_a_full_store_can_be_emptied(place: Path) -> None:
    rig = Rig(place / "store")
    async with rig.running() as engine:
        volumes = [await rig.volume(size=1 << 30, name=f"vm{number}") for number in range(2)]
        refused, done = None, 0
        while refused is None:
            for volume in volumes:
                refused = refused or await outcome(write(engine, volume, done * PAGE, page(done)))
            done += 1
        assert isinstance(refused, StoreFull)
        fill(place)
        await engine.flush(volumes[0])
        await engine.transact(lambda txn: txn.delete_volume(volumes[0].uuid))
        with trio.fail_after(30):
            while isinstance(await outcome(write(engine, volumes[1], 0, page(1))), StoreFull):
                await trio.sleep(0.05)
        # As many as the deleted volume had, give or take: what it freed inside the file is used again.
        again = 0
        with trio.fail_after(60):
            while again < done // 3:
                at = (done + again) * PAGE
                while isinstance(await outcome(write(engine, volumes[1], at, page(again))), StoreFull):
                    await engine.flush(volumes[1])
                    await trio.sleep(0.02)
                again += 1
        await engine.flush(volumes[1])
        assert engine.commits.failures == 0
        assert await read(engine, volumes[1], 0, PAGE) == page(1)
    with rig_opened(rig):
        assert findings(rig) == []


async def test_held_space_is_given_back_at_the_end_and_held_again_after_a_kill(place: Path) -> None:
    rig = Rig(place / "store")
    data = rig.path / "data" / "data.mdb"
    before = data.stat().st_blocks * 512
    async with rig.running() as engine:
        volume = await rig.volume()
        held = engine.store.held
        assert held.holds and held.statistics().held_bytes >= 80 * MIB
        assert data.stat().st_blocks * 512 > before + 80 * MIB > data.stat().st_size
        await write(engine, volume, 0, page(1))
        assert engine.store.room() <= free(place) + held.statistics().held_bytes
    assert data.stat().st_blocks * 512 < before + MIB, "du tells the truth about a store that nobody uses"
    async with rig.running() as engine:
        assert engine.store.held.claim(worst_case(MIB))


class rig_opened:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def __enter__(self) -> None:
        self._rig.start()

    def __exit__(self, *_: object) -> None:
        self._rig.stop()
