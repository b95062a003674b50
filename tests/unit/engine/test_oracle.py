"""Random operations against a bytearray, with the daemon killed in between: G2 and G4 of the README, in the small."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.engine import Engine, Threads, VolumeState
from silofs.limits import SIZE_MAX

from .rig import MIB, Rig, holes, read, write

SIZE = 2 * LEAF_BYTES + 5 * PAGE + 512


class Oracle:
    """What the volume must hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.data = bytearray(SIZE)
        self.snapshots: list[tuple[int, bytes]] = []

    def place(self) -> tuple[int, int]:
        """An offset and a length: near leaf borders more often than not, aligned half of the time."""
        pick = self.random
        base = pick.choice((0, LEAF_BYTES, 2 * LEAF_BYTES, pick.randrange(SIZE)))
        if pick.random() < 0.5:
            offset = max(0, base // PAGE + pick.randrange(-6, 6)) * PAGE
            return offset, pick.choice((1, 1, 1, 3, 20)) * PAGE
        return max(0, base + pick.randrange(-5 * PAGE, 5 * PAGE)), pick.choice((1, 100, 512, PAGE - 1, 3 * PAGE + 7))

    def bytes(self, length: int) -> bytes:
        kind = self.random.random()
        if kind < 0.1:
            return bytes(length)
        return self.random.randbytes(8) * (length // 8) + self.random.randbytes(length % 8)

    async def step(self, engine: Engine, volume: VolumeState) -> None:
        pick = self.random.random()
        offset, length = self.place()
        if pick < 0.5:
            data = self.bytes(length)
            await write(engine, volume, offset, data)
            self.put(offset, data)
        elif pick < 0.75:
            assert await read(engine, volume, offset, length) == self.data[offset : offset + length]
        elif pick < 0.83:
            length = self.random.choice((length, length, LEAF_BYTES + 3))
            await engine.discard(volume, offset, length)
            end = min(offset + length, len(self.data))
            if offset < end:
                self.data[offset:end] = bytes(end - offset)
        elif pick < 0.90:
            await engine.flush(volume)
        elif pick < 0.93:
            size = max(1, offset)
            await engine.resize(volume, size)
            del self.data[size:]
            self.data.extend(bytes(size - len(self.data)))
            if size < LEAF_BYTES:
                await engine.resize(volume, SIZE)
                self.data.extend(bytes(SIZE - len(self.data)))
        elif pick < 0.96:
            name = f"s{len(self.snapshots)}"
            snapshot = await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, name))
            self.snapshots.append((snapshot.layer, bytes(self.data)))
        elif self.snapshots:
            layer, data = self.random.choice(self.snapshots)
            view = engine.open_layer(volume.uuid, layer)
            assert await read(engine, view, offset, length) == data[offset : offset + length]

    def put(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data


async def check(engine: Engine, volume: VolumeState, oracle: Oracle) -> None:
    assert volume.size == len(oracle.data)
    for at in range(0, volume.size, MIB):
        assert await read(engine, volume, at, MIB) == oracle.data[at : at + MIB]
    for start, end in await holes(engine, volume):
        assert not any(oracle.data[start:end])


@pytest.mark.parametrize("seed", range(10))
async def test_random_operations_and_deaths(make_rig: Callable[..., Rig], seed: int, autojump_clock: MockClock) -> None:
    rig, oracle = make_rig(ring=(MIB // 4, 2 * MIB)[seed % 2]), Oracle(seed)
    async with rig.running() as engine:
        uuid = (await rig.volume(SIZE)).uuid
    for _ in range(6):
        async with rig.running() as engine:
            volume = engine.open_volume(uuid)
            await check(engine, volume, oracle)
            for _ in range(oracle.random.randrange(60)):
                await oracle.step(engine, volume)
            assert len(oracle.data) <= SIZE_MAX
    async with rig.running() as engine:
        volume = engine.open_volume(uuid)
        await check(engine, volume, oracle)
        await engine.flush(volume)
        await check(engine, volume, oracle)
        for layer, data in oracle.snapshots:
            view = engine.open_layer(uuid, layer)
            assert await read(engine, view, 0, 8 * MIB) == data


@pytest.mark.parametrize("seed", range(3))
async def test_writers_side_by_side_with_real_threads(make_rig: Callable[..., Rig], seed: int) -> None:
    """Each task owns some pages of two volumes; commits, fsyncs and cold reads overlap as they like."""
    rig = make_rig(ring=MIB)
    rig.threads = Threads(2)

    async def own(engine: Engine, volume: VolumeState, first: int, pick: random.Random) -> None:
        held = {first + 16 * at: bytes(PAGE) for at in range(40)}
        for _ in range(150):
            number = pick.choice(list(held))
            if pick.random() < 0.6:
                if pick.random() < 0.7:
                    held[number] = pick.randbytes(16) * (PAGE // 16)
                    await write(engine, volume, number * PAGE, held[number])
                else:
                    at = pick.randrange(PAGE - 20)
                    held[number] = held[number][:at] + b"+" * 20 + held[number][at + 20 :]
                    await write(engine, volume, number * PAGE + at, b"+" * 20)
            else:
                assert await read(engine, volume, number * PAGE, PAGE) == held[number]
            if pick.random() < 0.03:
                await engine.flush(volume)
            if pick.random() < 0.05:
                engine.reads.leaves.clear()
                engine.reads.warm.objects.clear()
        for number, data in held.items():
            assert await read(engine, volume, number * PAGE, PAGE) == data

    async with rig.running() as engine:
        volumes = [await rig.volume(4 * MIB, name) for name in ("a", "b")]
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for first in range(16):
                    nursery.start_soon(own, engine, volumes[first % 2], first, random.Random(seed * 100 + first))
    assert os.fstat(rig.fd).st_size


async def test_a_page_that_is_overwritten_while_a_thread_reads_it(
    make_rig: Callable[..., Rig], autojump_clock: MockClock
) -> None:
    """The thread's bytes are of before the commit; a patch that came after it must not lie over them."""
    rig = make_rig()
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, b"1" * PAGE)
        await engine.flush(volume)
        engine.reads.leaves.clear()
        engine.reads.warm.objects.clear()
        engine.reads.warm._lately = 1 << 60
        done = trio.Event()
        run = rig.inline.run

        async def late(job: Callable[[], object]) -> object:
            value = await run(job)
            await done.wait()
            return value

        rig.inline.run = late  # type: ignore[method-assign, assignment]
        got = b""

        async def reader() -> None:
            nonlocal got
            got = bytes(await engine.read(volume, 0, PAGE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            await write(engine, volume, 0, b"2" * PAGE)
            await engine.flush(volume)
            await write(engine, volume, 0, b"3" * 10)
            rig.inline.run = run  # type: ignore[method-assign]
            done.set()
        assert got == b"3" * 10 + b"2" * (PAGE - 10)
