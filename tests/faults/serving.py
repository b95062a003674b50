"""An engine that serves while calls fail: writes, fsyncs in between, and what the last fsync that succeeded covers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio
from trio.testing import MockClock

from silofs.engine import Engine
from silofs.errors import SiloError
from silofs.layers.log import WriteLog
from silofs.layers.store import Store
from tests.storerig import page_bytes
from tests.unit.engine.rig import Inline, write

PAGE: Final = 4096
RING: Final = 1 << 20
WRITES: Final = 9
LATER_S: Final = 10.0  # of a clock that jumps: what failed has been tried again by then


def written(number: int) -> tuple[int, bytes]:
    """(offset, bytes) of the write of that number."""
    return (number * 37 % 500) * PAGE, page_bytes(number, 30) + page_bytes(number, 31)


def states(content: bytes) -> list[bytes]:
    """The volume before the first write, and after each."""
    found = [content]
    for number in range(WRITES):
        offset, data = written(number)
        found.append(found[-1][:offset] + data + found[-1][offset + len(data) :])
    return found


def serve(path: Path, arm: Callable[[], None], disarm: Callable[[], None], end: Callable[[int], None]) -> None:
    """Write to "vm"; `end` gets the number of writes that an fsync has covered, and does not return.

    A write that is refused ends the writing: what comes after it would not be a prefix. At the end nothing fails any
    more, and an fsync after a while may cover everything after all.
    """
    trio.run(_serve, path, arm, disarm, end, clock=MockClock(autojump_threshold=0))


async def _serve(path: Path, arm: Callable[[], None], disarm: Callable[[], None], end: Callable[[int], None]) -> None:
    store = Store.open(path)
    fd = os.memfd_create("log")
    WriteLog.format(fd, store.uuid, RING)
    engine = Engine(store, WriteLog.open(fd, store.uuid), threads=Inline())
    engine.recover()
    arm()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        with store.reader() as txn:
            volume = engine.open_volume(txn.volume_by_name("vm").uuid)
        issued = synced = 0
        for number in range(WRITES):
            try:
                await write(engine, volume, *written(number))
            except SiloError:
                break
            issued = number + 1
            try:
                if number % 2:
                    await engine.flush(volume)
                    synced = issued
                if number == WRITES // 2:
                    await trio.sleep(LATER_S)
            except SiloError:
                continue
        disarm()
        await trio.sleep(LATER_S)
        try:
            await engine.flush(volume)
            synced = issued
        except SiloError:
            pass
        end(synced)
