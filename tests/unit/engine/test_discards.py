"""Large discards through the engine: zeros at once, counts that follow, room for others."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.engine.background import Background
from silofs.layers import heads
from silofs.layers.reclaim import Reclaim
from tests.unit.engine.rig import Rig, page, read, write

LEAVES = 40


async def test_a_large_discard_shows_at_once_and_is_counted_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "VOID_LEAVES", 4)
    rig = Rig(tmp_path / "store")
    async with rig.running() as engine:
        volume = await rig.volume(size=LEAVES * LEAF_BYTES)
        for leaf in range(LEAVES):
            await write(engine, volume, leaf * LEAF_BYTES, page(leaf + 1))
        await engine.flush(volume)
        assert await read(engine, volume, 5 * LEAF_BYTES, PAGE) == page(6)
        await engine.discard(volume, LEAF_BYTES, (LEAVES - 1) * LEAF_BYTES)
        assert await read(engine, volume, 5 * LEAF_BYTES, PAGE) == bytes(PAGE)
        await engine.flush(volume)
        assert await read(engine, volume, 5 * LEAF_BYTES, PAGE) == bytes(PAGE)
        await write(engine, volume, 7 * LEAF_BYTES + PAGE, page(99))
        await engine.flush(volume)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Background(engine.store, engine.commits, lambda: True, [Reclaim()]).run)
            with trio.fail_after(10):
                while volume.record is None or engine.shown(volume.record)[2] != 2:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        assert await read(engine, volume, 7 * LEAF_BYTES, 2 * PAGE) == bytes(PAGE) + page(99)
        assert await read(engine, volume, 0, PAGE) == page(1)
