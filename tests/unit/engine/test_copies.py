"""copy_file_range: whole pages by reference, ends by bytes, over what is pending and below what comes after."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.engine.engine import Engine
from silofs.engine.volume import VolumeState
from silofs.errors import NotOwner, SiloError, Unsupported
from silofs.layers import schema
from silofs.layers.catalog import Role
from silofs.layers.check import check
from silofs.limits import MIB
from tests.unit.engine.rig import Rig, read, write


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "store")


async def copy_all(engine: Engine, source: VolumeState, target: VolumeState) -> int:
    """As cp does it; how many calls it took."""
    at = calls = 0
    while done := await engine.copy_range(source, at, target, at, 1 << 30):
        at, calls = at + done, calls + 1
    return calls


async def test_a_copy_of_a_file(rig: Rig) -> None:
    size = 3 * MIB + 700
    content = random.Random(1).randbytes(2 * MIB) + bytes(MIB) + b"e" * 700
    async with rig.running() as engine:
        a, b = await rig.volume(size, "a"), await rig.volume(0, "b")
        await write(engine, a, 0, content)
        await engine.commit_all()
        await write(engine, a, 5 * PAGE + 10, b"pending")
        content = content[: 5 * PAGE + 10] + b"pending" + content[5 * PAGE + 17 :]
        assert await copy_all(engine, a, b) == 2
        assert b.size == size and await read(engine, b, 0, size) == content == await read(engine, a, 0, size)
        # Both go on by themselves, in the cache and in the store.
        await write(engine, a, 0, b"x" * PAGE)
        await write(engine, b, PAGE + 7, b"y")
        await engine.commit_all()
        assert await read(engine, a, 0, 2 * PAGE) == b"x" * PAGE + content[PAGE : 2 * PAGE]
        assert await read(engine, b, 0, 2 * PAGE) == content[: PAGE + 7] + b"y" + content[PAGE + 8 : 2 * PAGE]
        with engine.store.reader() as txn:
            assert check(txn, read_data=True) == []
            assert sum(1 for _ in txn.scan_keys(schema.CONTAINER)) >= 16
    async with rig.running() as engine:
        with engine.store.reader() as txn:
            b = engine.open_volume(txn.volume_by_name("b").uuid)
        assert await read(engine, b, 2 * PAGE, size) == content[2 * PAGE :]


async def test_what_is_pending_at_the_target_is_overwritten(rig: Rig) -> None:
    async with rig.running() as engine:
        a, b = await rig.volume(MIB, "a"), await rig.volume(MIB, "b")
        await write(engine, a, 0, b"a" * MIB)
        await write(engine, b, 0, b"b" * MIB)
        assert await read(engine, b, 0, PAGE) == b"b" * PAGE
        assert await engine.copy_range(a, PAGE, b, 4 * PAGE, 100 * PAGE) == 100 * PAGE
        expected = b"b" * (4 * PAGE) + b"a" * (100 * PAGE) + b"b" * (MIB - 104 * PAGE)
        assert await read(engine, b, 0, MIB) == expected
        await engine.commit_all()
        assert await read(engine, b, 0, MIB) == expected


async def test_ends_and_offsets(rig: Rig) -> None:
    content = random.Random(2).randbytes(MIB)
    async with rig.running() as engine:
        a, b = await rig.volume(MIB, "a"), await rig.volume(2 * MIB, "b")
        await write(engine, a, 0, content)
        assert await engine.copy_range(a, 100, b, PAGE + 100, 1 << 20) == PAGE - 100
        assert await engine.copy_range(a, PAGE, b, 2 * PAGE, 50 * PAGE + 5) == 50 * PAGE
        assert await engine.copy_range(a, 51 * PAGE, b, 52 * PAGE, 5) == 5
        assert await read(engine, b, PAGE + 100, 51 * PAGE - 95) == content[100 : 51 * PAGE + 5]
        assert await read(engine, b, 52 * PAGE + 5, 5) == bytes(5)
        assert await engine.copy_range(a, MIB, b, 0, 5) == await engine.copy_range(a, 2 * MIB, b, 0, 5) == 0
        with pytest.raises(Unsupported):
            await engine.copy_range(a, 0, b, 100, 10 * PAGE)


async def test_from_a_snapshot_and_within_a_file(rig: Rig) -> None:
    async with rig.running() as engine:
        a = await rig.volume(2 * LEAF_BYTES, "a")
        await write(engine, a, 0, b"1" * MIB)
        snapshot = await engine.transact(lambda txn: txn.take_snapshot(a.uuid, "s"))
        await write(engine, a, 0, b"2" * MIB)
        view = engine.open_layer(a.uuid, snapshot.layer)
        assert await engine.copy_range(view, 0, a, LEAF_BYTES, MIB) == MIB
        assert await engine.copy_range(a, 0, a, MIB, MIB) == MIB
        for offset, byte in ((0, b"2"), (MIB, b"2"), (LEAF_BYTES, b"1")):
            assert await read(engine, a, offset, MIB) == byte * MIB
        assert await read(engine, view, 0, MIB) == b"1" * MIB


async def test_who_may(rig: Rig) -> None:
    async with rig.running() as engine:
        a, b = await rig.volume(MIB, "a"), await rig.volume(MIB, "b")
        away, _ = await rig.remote_volume(name="away")
        with pytest.raises(Unsupported):
            await engine.copy_range(away, 0, b, 0, PAGE)
        await rig.set_role(b, Role.RETIRED)
        with pytest.raises(SiloError):
            await engine.copy_range(a, 0, b, 0, PAGE)
        engine.apply_ownership([b.uuid])
        with pytest.raises(NotOwner):
            await engine.copy_range(a, 0, b, 0, PAGE)
