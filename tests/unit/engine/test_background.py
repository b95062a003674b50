"""Background work beside reads and writes: seen at once, not in the way of a switch-over, harmless when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from silofs.engine.background import Background
from silofs.engine.commits import Commits
from silofs.layers.native import Source
from silofs.layers.rewrite import Budget, Policy, rewrite
from silofs.limits import COMMIT_BYTES, LOG_BYTES, MIB
from tests.unit.engine.rig import Rig, page, read, write


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "store")


class Moving(Policy):
    """Moves page 0 of a head to another place, again and again."""

    name = "moving"

    def __init__(self, head: int) -> None:
        self.head = head
        self.steps = 0

    def step(self, txn: Any, budget: Budget) -> bool:
        self.steps += 1
        own = txn.own_leaf(self.head, 0)
        if own is None or not own[0]:
            return False
        old = int(own[0])
        new = txn.store_pages(self.head, [0], Source.of([bytes(txn.page(old))]))
        assert rewrite(txn, [(self.head, 0, old, int(new[0]))]) == 1
        return True


class Failing(Policy):
    name = "failing"

    def step(self, txn: Any, budget: Budget) -> bool:
        raise RuntimeError("a bug")


async def test_what_is_moved_under_reads_and_writes_stays_what_was_written(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        policy = Moving(volume.head)
        background = Background(rig.store, engine.commits, lambda: True, [policy])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run)
            for number in range(200):
                await write(engine, volume, 0, page(number))
                if number % 3 == 0:
                    await engine.flush(volume)
                await trio.sleep(0.001)
                assert await read(engine, volume, 0, 4096) == page(number)
            await engine.flush(volume)
            nursery.cancel_scope.cancel()
        assert policy.steps > 10
        assert await read(engine, volume, 0, 4096) == page(199)


async def test_nothing_moves_while_a_volume_is_frozen(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.flush(volume)
        policy = Moving(volume.head)
        engine.freeze(volume.uuid)
        background = Background(rig.store, engine.commits, engine._quiet, [policy])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run)
            await trio.sleep(0.05)
            assert policy.steps == 0
            engine.thaw(volume.uuid)
            with trio.fail_after(5):
                while policy.steps == 0:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()


async def test_a_commit_that_will_soon_be_due_goes_first(tmp_path: Path) -> None:
    """A step that begins just before a commit does would hold up everybody who waits for room in the ring."""
    rig = Rig(tmp_path / "store", ring=LOG_BYTES)
    async with rig.running() as engine:
        volume = await rig.volume(COMMIT_BYTES)
        commits = engine.commits
        assert not commits.busy
        for number in range(COMMIT_BYTES // 2 // MIB):
            assert not commits.busy
            assert engine.write_now(volume, number * MIB, bytes(MIB - 1) + b"x")
        assert commits.busy
        await engine.flush(volume)
        await commits.round()
        assert not commits.busy
        commits.kick()
        assert commits.busy


class Hurried(Moving):
    name = "hurried"

    def hurry(self) -> float:
        return 1


async def test_a_policy_in_a_hurry_does_not_wait_behind_one_that_is_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits that never pause keep the others away, and must not keep it away through them."""
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.flush(volume)
        monkeypatch.setattr(Commits, "busy", True)
        calm, hurried = Moving(volume.head), Hurried(volume.head)
        background = Background(rig.store, engine.commits, lambda: True, [calm, hurried])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run)
            with trio.fail_after(5):
                while hurried.steps < 3:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        assert not calm.steps


async def test_a_policy_in_a_hurry_that_fails_keeps_nobody_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.flush(volume)
        calm, failing = Moving(volume.head), Failing()
        monkeypatch.setattr(failing, "hurry", lambda: 1.0)
        background = Background(rig.store, engine.commits, lambda: True, [calm, failing])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run)
            with trio.fail_after(5):
                while calm.steps < 5 or not background.turns[1].failures:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()


async def test_a_policy_that_fails_is_left_alone_for_a_while(rig: Rig) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.flush(volume)
        moving = Moving(volume.head)
        background = Background(rig.store, engine.commits, lambda: True, [Failing(), moving])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run)
            with trio.fail_after(5):
                while moving.steps < 5:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        assert background.turns[0].failures == 1
        assert not engine.store.broken
        assert await read(engine, volume, 0, 4096) == page(1)
