"""A process that writes to a volume until a failpoint kills it: `python victim.py STORE MEMFD SEED`.

Prints the offset, the length and the byte of each write before it, "done" once it is acknowledged, and "synced" once
all are durable.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import trio

from silofs.engine import Engine
from silofs.layers.log import WriteLog
from silofs.layers.store import Store

PAGE = 4096


async def main(path: Path, fd: int, seed: int) -> None:
    store = Store.open(path)
    engine = Engine(store, WriteLog.open(fd, store.uuid))
    engine.recover()
    print("recovered", flush=True)
    pick = random.Random(seed)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        volume = engine.open_volume(engine.catalog()[0][0].uuid)
        while True:
            offset, length, value = (
                pick.randrange(80 * PAGE),
                pick.choice((10, PAGE, 3 * PAGE + 5)),
                pick.randrange(256),
            )
            if pick.random() < 0.5:
                offset -= offset % PAGE
            print(offset, length, value, flush=True)
            await engine.write(volume, offset, bytes([value]) * length)
            print("done", flush=True)
            if pick.random() < 0.1:
                await engine.flush(volume)
                print("synced", flush=True)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
