"""When something becomes durable, who waits for it, and what a failure leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from silofs.blocks import PAGE
from silofs.engine import Engine, Gate, writes
from silofs.errors import BadSize, Exists, NotOwner, SiloError, StoreBroken, StoreError, StoreFull
from silofs.layers.catalog import Role
from silofs.layers.held import Held, worst_case
from silofs.limits import COMMIT_AGE_S, COMMIT_LEAVES, COMMIT_RETRY_S

from .rig import MIB, Inline, Rig, outcome, page, read, write


@contextmanager
def failing(rig: Rig, error: Exception) -> Iterator[None]:
    """Every commit fails; nothing of it reaches the store."""

    def refuse(*_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future

    commit, submit = rig.store.commit, rig.store.submit
    rig.store.commit = rig.store.submit = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        rig.store.commit, rig.store.submit = commit, submit  # type: ignore[method-assign]


def stored(engine: Engine, uuid: bytes, number: int) -> bytes:
    """A page as the store alone has it."""
    with engine.store.reader() as txn:
        return bytes(txn.page(txn.resolve(txn.volume(uuid).head, number >> 9).item(number & 511)))


async def test_a_write_is_committed_by_age(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await trio.sleep(COMMIT_AGE_S * 0.9)
        assert stored(engine, volume.uuid, 0) == bytes(PAGE)
        await trio.sleep(COMMIT_AGE_S * 0.2)
        assert stored(engine, volume.uuid, 0) == page(1)
        assert engine.log.used == 0
        commits = engine.commits.commits
        await trio.sleep(100 * COMMIT_AGE_S)
        assert engine.commits.commits == commits


async def test_much_is_committed_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    for name in ("COMMIT_BYTES", "AHEAD_BYTES"):
        monkeypatch.setattr(f"silofs.engine.commits.{name}", 10 * PAGE)
    async with rig.running() as engine:
        volume = await rig.volume()
        for number in range(10):
            await write(engine, volume, number * PAGE, page(number + 1))
        await trio.sleep(COMMIT_AGE_S / 100)
        assert stored(engine, volume.uuid, 9) == page(10)


async def test_many_leaves_are_committed_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("silofs.engine.commits.COMMIT_LEAVES", 20)
    assert COMMIT_LEAVES > 20
    async with rig.running() as engine:
        volume = await rig.volume(1 << 40)
        for number in range(21):
            await engine.write(volume, number << 30, b"x")
        await trio.sleep(COMMIT_AGE_S / 100)
        assert stored(engine, volume.uuid, 0)[:1] == b"x"


async def test_fsyncs_share_commits(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volumes = [await rig.volume(MIB, f"v{at}") for at in range(4)]
        before = engine.commits.commits

        async def writer(at: int) -> None:
            volume = volumes[at % 4]
            for number in range(5):
                data = page(100 * at + number + 1)
                await write(engine, volume, at * PAGE, data)
                await engine.flush(volume)
                assert stored(engine, volume.uuid, at) == data

        async with trio.open_nursery() as nursery:
            for at in range(20):
                nursery.start_soon(writer, at)
        assert engine.commits.flushes == 100
        assert engine.commits.commits - before <= 12


async def test_an_fsync_waits_for_the_commit_in_flight_that_has_its_writes(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        done = []

        async def flusher(name: str) -> None:
            await engine.flush(volume)
            done.append((name, engine.commits.commits))

        await write(engine, volume, 0, page(1))
        before = engine.commits.commits
        rig.inline.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flusher, "first")
            await wait_all_tasks_blocked()
            assert volume.flushing is not None
            nursery.start_soon(flusher, "second")  # nothing new: the same commit
            await wait_all_tasks_blocked()
            await write(engine, volume, PAGE, page(2))
            assert await read(engine, volume, 0, 2 * PAGE) == page(1) + page(2)
            nursery.start_soon(flusher, "third")  # something new: the next one
            await wait_all_tasks_blocked()
            assert not done
            rig.inline.release.set()
        assert sorted(done) == [("first", before + 1), ("second", before + 1), ("third", before + 2)]


async def test_a_discard_during_a_commit_is_seen_after_it(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1) + page(2))
        rig.inline.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.flush, volume)
            await wait_all_tasks_blocked()
            await engine.discard(volume, 0, PAGE)
            assert await read(engine, volume, 0, 2 * PAGE) == bytes(PAGE) + page(2)
            rig.inline.release.set()
        assert volume.flushing is None
        assert not volume.clean
        for length in (PAGE, 2 * PAGE):
            assert await read(engine, volume, 0, length) == (bytes(PAGE) + page(2))[:length]


async def test_an_fsync_does_not_wait_for_age_after_a_change_took_the_cut(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await trio.sleep(COMMIT_AGE_S / 10)  # the background task has seen that something is pending
        await engine.transact(lambda txn: txn.seal(volume.uuid))
        await write(engine, volume, 0, page(2))
        started = trio.current_time()
        await engine.flush(volume)
        assert trio.current_time() == started


async def test_nothing_dirty_needs_no_commit(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        commits = engine.commits.commits
        await engine.flush(volume)
        await engine.commit_all()
        assert rig.store.statistics()["commits"] == commits + 1  # the one that opening makes
        await engine.write(volume, 0, page(1), sync=True)
        assert stored(engine, volume.uuid, 0) == page(1)


async def test_a_full_ring_makes_writers_wait_for_a_commit(
    make_rig: Callable[..., Rig], autojump_clock: MockClock
) -> None:
    rig = make_rig(ring=16 * (PAGE + 128))
    async with rig.running() as engine:
        volume = await rig.volume()
        for number in range(100):
            await write(engine, volume, number * PAGE, page(number + 1))
        assert await read(engine, volume, 0, 100 * PAGE) == b"".join(page(number + 1) for number in range(100))
        assert engine.writes.waited >= 5
        rig.inline.hold()
        for number in range(20):
            if not engine.write_now(volume, number * PAGE, page(number)):
                break
        with trio.move_on_after(50) as scope:
            await engine.write(volume, 0, page(7))
        assert scope.cancelled_caught
        rig.inline.release.set()


async def test_a_full_store_refuses_before_it_acknowledges(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    left = 10 * worst_case(PAGE)

    def claim(held: Held, cost: int) -> bool:
        nonlocal left
        if cost > left:
            return False
        left -= cost
        return True

    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.flush(volume)
        monkeypatch.setattr(Held, "claim", claim)
        monkeypatch.setattr(Held, "let_go", lambda held, cost: None)
        monkeypatch.setattr(Held, "top_up", lambda held, cost: cost <= left)
        taken = 0
        while engine.write_now(volume, taken * PAGE, page(taken + 1)):
            taken += 1
        assert taken == 10
        before = engine.log.appended
        assert isinstance(await outcome(engine.write(volume, 0, page(9))), StoreFull)
        assert engine.log.appended == before
        await engine.discard(volume, 0, PAGE)  # room can always be made
        await engine.flush(volume)
        left = worst_case(PAGE)
        assert engine.write_now(volume, 0, page(5))
        assert await read(engine, volume, 0, 3 * PAGE) == page(5) + page(2) + page(3)


@pytest.mark.parametrize("error", [StoreFull("full"), StoreError("bad"), RuntimeError("bug")])
async def test_a_failed_commit_is_reported_and_never_forgotten(
    rig: Rig, error: Exception, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        with failing(rig, error):
            first = await outcome(engine.flush(volume))
            assert isinstance(first, SiloError)
            assert str(error.args[0]) in str(first)
            # No write is acknowledged, and no later fsync succeeds, while the data is only in the log.
            assert not engine.write_now(volume, PAGE, page(2))
            assert isinstance(await outcome(engine.write(volume, PAGE, page(2))), SiloError)
            assert isinstance(await outcome(engine.flush(volume)), SiloError)
            assert await read(engine, volume, 0, 2 * PAGE) == page(1) + bytes(PAGE)
            await trio.sleep(10 * COMMIT_RETRY_S)
            assert stored(engine, volume.uuid, 0) == bytes(PAGE)
        await engine.flush(volume)
        assert stored(engine, volume.uuid, 0) == page(1)
        await write(engine, volume, PAGE, page(2))
        await engine.flush(volume)
        assert engine.log.used == 0


async def test_what_a_failed_commit_leaves_is_replayed(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        with failing(rig, StoreError("bad")):
            await outcome(engine.flush(volume))
    async with rig.running() as engine:
        assert stored(engine, volume.uuid, 0) == page(1)


async def test_writers_that_wait_for_room_hear_of_the_failure(
    make_rig: Callable[..., Rig], autojump_clock: MockClock
) -> None:
    rig = make_rig(ring=8 * (PAGE + 128))
    async with rig.running() as engine:
        volume = await rig.volume()
        number = 0
        while engine.write_now(volume, number * PAGE, page(1)):
            number += 1
        with failing(rig, StoreFull("full")):
            assert isinstance(await outcome(engine.write(volume, 0, page(2))), StoreFull)
        await engine.write(volume, 0, page(2))


async def test_a_write_that_waits_for_room_goes_on_when_the_commit_in_flight_has_landed(
    make_rig: Callable[..., Rig], autojump_clock: MockClock
) -> None:
    """And not when the next one has, too: the disk would have nothing to do at the end of it."""
    rig = make_rig(ring=8 * (PAGE + 128))
    async with rig.running() as engine, trio.open_nursery() as nursery:
        volume = await rig.volume()
        for number in range(4):
            assert engine.write_now(volume, number * PAGE, page(1))
        rig.inline.hold()
        nursery.start_soon(engine.commits.commit)
        await wait_all_tasks_blocked()
        assert engine.commits.under_way
        number = 4
        while engine.write_now(volume, number * PAGE, page(1)):
            number += 1
        written = trio.Event()

        async def writer() -> None:
            await engine.write(volume, 0, page(2))
            written.set()

        nursery.start_soon(writer)
        await wait_all_tasks_blocked()
        assert not written.is_set()
        first = rig.inline.release
        rig.inline.hold()  # what begins from here on
        first.set()
        with trio.move_on_after(1):
            await written.wait()
        landed = written.is_set()
        rig.inline.release.set()
        assert landed


@pytest.mark.parametrize("fails", [False, True])
async def test_writes_that_wait_for_room_are_a_crowd_until_a_commit_has_ended(
    make_rig: Callable[..., Rig], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """What was read and waits is in memory: the session reads no further requests meanwhile, and goes on after it."""
    monkeypatch.setattr(writes, "CROWD_BYTES", 2 * PAGE)
    rig = make_rig(ring=8 * (PAGE + 128))
    async with rig.running() as engine:
        volume = await rig.volume()
        number = 0
        while engine.write_now(volume, number * PAGE, page(1)):
            number += 1
        outcomes, eased = [], []

        async def writer(number: int) -> None:
            outcomes.append(await outcome(engine.write(volume, number * PAGE, page(2))))

        async def session() -> None:
            await engine.writes.eased()
            eased.append(engine.writes.crowding)

        rig.inline.hold()
        with failing(rig, StoreFull("full")) if fails else nullcontext():
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    await engine.writes.eased()
                    nursery.start_soon(writer, number)
                    await wait_all_tasks_blocked()
                assert engine.writes.crowding == 3 * PAGE
                nursery.start_soon(session)
                await wait_all_tasks_blocked()
                assert not eased and not outcomes
                rig.inline.release.set()
        assert engine.writes.crowding == 0 and eased[0] <= 2 * PAGE
        assert [isinstance(each, StoreFull) for each in outcomes] == [fails] * 3


async def test_a_change_that_is_refused_does_not_take_the_writes_with_it(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        refused = await outcome(engine.transact(lambda txn: txn.create_volume("vm", 0)))
        assert isinstance(refused, Exists)
        assert stored(engine, volume.uuid, 0) == page(1)
        assert engine.commits.failed is None

        def bug(_: Any) -> None:
            raise KeyError("bug")

        await write(engine, volume, 0, page(2))
        assert isinstance(await outcome(engine.transact(bug)), KeyError)
        assert stored(engine, volume.uuid, 0) == page(2)
        assert isinstance(await outcome(engine.resize(volume, 1 << 52)), BadSize)
        assert volume.writable


async def test_a_change_sees_the_writes_before_it_and_not_those_after(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        rig.inline.hold()
        snapshots = []

        async def snapshot() -> None:
            snapshots.append(await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshot)
            await wait_all_tasks_blocked()
            await write(engine, volume, 0, page(2))
            rig.inline.release.set()
        view = engine.open_layer(volume.uuid, snapshots[0].layer)
        assert await read(engine, view, 0, PAGE) == page(1)
        assert await read(engine, volume, 0, PAGE) == page(2)


async def test_mutations_wait_while_a_volume_is_resized(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(8 * PAGE)
        await write(engine, volume, 6 * PAGE, page(1))
        rig.inline.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.resize, volume, 2 * PAGE)
            await wait_all_tasks_blocked()
            assert not engine.write_now(volume, 0, page(2))
            nursery.start_soon(engine.write, volume, 6 * PAGE, page(3))
            await wait_all_tasks_blocked()
            rig.inline.release.set()
        assert volume.size == 7 * PAGE
        assert await read(engine, volume, 0, 8 * PAGE) == bytes(6 * PAGE) + page(3)


async def test_a_caller_that_is_cancelled_leaves_a_whole_commit(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        rig.inline.hold()
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(self_release, rig.inline, scope)
                await engine.transact(lambda txn: txn.rename(volume.uuid, "other"))
        assert volume.name == "other"
        assert volume.flushing is None
        await write(engine, volume, 0, page(2))
        await engine.flush(volume)


async def self_release(threads: Inline, scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    scope.cancel()
    await wait_all_tasks_blocked()
    threads.release.set()


async def test_a_store_that_lmdb_failed_is_opened_anew_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.flush(volume)
        assert await read(engine, volume, 0, PAGE) == page(1)
        await write(engine, volume, 0, page(2))
        rig.store._writer.broken = StoreBroken("EIO")
        with rig.store.reader():  # somebody reads: it has to wait
            assert isinstance(await outcome(engine.flush(volume)), StoreBroken)
            await trio.sleep(3 * COMMIT_RETRY_S)
            assert rig.store.broken
            assert await read(engine, volume, 0, PAGE) == page(2)
            assert stored(engine, volume.uuid, 0) == page(1)
        await trio.sleep(2 * COMMIT_RETRY_S)
        assert not rig.store.broken
        assert stored(engine, volume.uuid, 0) == page(2)
        assert await read(engine, volume, 0, PAGE) == page(2)
        await write(engine, volume, 0, page(3))
        rig.store._writer.broken = StoreBroken("EIO")
        assert isinstance(await outcome(engine.flush(volume)), StoreBroken)
        await trio.sleep(100 * COMMIT_RETRY_S)
        assert isinstance(await outcome(engine.flush(volume)), StoreBroken)
        assert isinstance(await outcome(engine.write(volume, 0, page(4))), StoreBroken)
        assert await read(engine, volume, 0, PAGE) == page(3)
    async with rig.running() as engine:
        assert stored(engine, volume.uuid, 0) == page(3)


async def test_a_cede_whose_outcome_was_not_known_holds_if_it_was_done(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        commit = rig.store.commit

        def done_but_failed(*arguments: Any) -> Future[Any]:
            rig.store.commit = commit  # type: ignore[method-assign]
            commit(*arguments).result()
            rig.store._writer.broken = StoreBroken("EIO")
            return rig.store.submit(lambda txn: None)

        rig.store.commit = done_but_failed  # type: ignore[method-assign]
        engine.freeze(volume.uuid)
        assert isinstance(await outcome(rig.set_role(volume, Role.CEDED, 2)), StoreBroken)
        assert volume.gate is Gate.FROZEN
        await trio.sleep(2 * COMMIT_RETRY_S)
        assert volume.gate is Gate.RELEASED
        engine.thaw(volume.uuid)
        assert isinstance(await outcome(engine.write(volume, 0, page(2))), NotOwner)
        assert stored(engine, volume.uuid, 0) == page(1)
        assert engine.log.used == 0


async def test_statistics_are_plain_values(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        await rig.volume()
        figures = engine.statistics()
        assert figures["volumes"] == 1
        assert isinstance(figures["commits"], dict)
    assert os.fstat(rig.fd).st_size
