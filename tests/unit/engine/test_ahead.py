"""When an engine writes ahead of its commits, and that nobody sees a difference."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from silofs.blocks import PAGE
from silofs.limits import AHEAD_BYTES, COMMIT_AHEAD_BYTES, COMMIT_BYTES, LOG_BYTES, MIB
from tests.unit.engine.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "store", ring=LOG_BYTES)


def block(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


async def test_a_stream_is_written_ahead_and_committed_in_larger_pieces(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(LOG_BYTES)
        commits, number = engine.commits, 0
        while commits.waiting < COMMIT_AHEAD_BYTES:
            assert not commits._kicked.is_set()
            await engine.write(volume, number * MIB, block(number))
            number += 1
            assert (len(volume.pending.ahead) > 0) == (commits.waiting >= AHEAD_BYTES)
        assert commits._kicked.is_set()
        commits_before, pending = commits.commits, volume.pending
        await engine.flush(volume)
        assert commits.commits == commits_before + 1
        written = [future.result() for future in pending.ahead]
        assert sum(len(each.pages) * PAGE for each in written if each) > COMMIT_AHEAD_BYTES - AHEAD_BYTES
        assert all(each is not None and each.spent for each in written), "the commit has adopted them"
        for each in range(number):
            assert bytes(await engine.read(volume, each * MIB, MIB)) == block(each)
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        for each in range(number):
            assert bytes(await engine.read(volume, each * MIB, MIB)) == block(each)


async def test_short_writes_and_a_few_long_ones_wait_for_their_commit(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(LOG_BYTES)
        commits = engine.commits
        for number in range(AHEAD_BYTES // MIB - 1):
            await engine.write(volume, number * MIB, block(number))
        at = AHEAD_BYTES
        while commits.waiting < COMMIT_BYTES:
            assert not commits._kicked.is_set()
            await engine.write(volume, at, b"short".ljust(PAGE, b"s"))
            at += PAGE
        assert commits._kicked.is_set()
        assert not volume.pending.ahead
        await engine.flush(volume)


async def test_a_kill_between_writing_ahead_and_the_commit_loses_nothing(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(LOG_BYTES)
        for number in range(COMMIT_BYTES // MIB):
            await engine.write(volume, number * MIB, block(number))
        await engine.write(volume, 5 * MIB, block(500))
        assert volume.pending.ahead
        for future in volume.pending.ahead:
            assert future.result() is not None
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        for number in range(COMMIT_BYTES // MIB):
            expected = block(500 if number == 5 else number)
            assert bytes(await engine.read(volume, number * MIB, MIB)) == expected


async def test_a_volume_that_is_deleted_in_between_leaves_its_cells_free(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(LOG_BYTES)
        other = await rig.volume(LOG_BYTES, "other")
        for number in range(COMMIT_BYTES // MIB):
            await engine.write(volume, number * MIB, block(number))
        aheads = volume.pending.ahead
        await engine.transact(lambda txn: txn.delete_volume(volume.uuid))
        results = [future.result() is not None for future in aheads]
        assert results and all(results)
        aheads.clear()
        for number in range(2):
            await engine.write(other, number * PAGE, bytes(PAGE - 1) + b"x")
            await engine.commits.commit()
        free = rig.store._environment.free_cells
        assert free is not None
        assert free.free == free.cells
