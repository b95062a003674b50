"""Who may change and read a volume while it changes hosts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from silofs.blocks import PAGE
from silofs.engine import Gate, VolumeState
from silofs.errors import Busy, FetchTimeout, NotOwner, PeerUnreachable, ReadOnly
from silofs.layers.catalog import Ownership, Role
from silofs.layers.schema import REMOTE
from silofs.layers.transaction import WriteTxn
from silofs.limits import CEDED_READ_WAIT_S, FETCH_DEADLINE_S, INCOMING_WRITE_WAIT_S

from .rig import Rig, outcome, page, read, write


class Owner:
    """The volume's owner, at the other end."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.answer = b"A"
        self.waits = trio.Event()
        self.waits.set()
        self.error: Exception | None = None

    async def fetch(self, volume: VolumeState, layer_id: int, page: int) -> bytes:
        raise AssertionError("nothing is remote here")

    async def forward_read(self, volume: VolumeState, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        answer = self.answer
        await self.waits.wait()
        if self.error is not None:
            raise self.error
        return answer * length


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def rig(make_rig: Callable[..., Rig], owner: Owner) -> Rig:
    return make_rig(remote=owner)


async def test_a_frozen_volume_is_read_and_its_mutations_wait(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        engine.freeze(volume.uuid)
        engine.freeze(volume.uuid)
        assert volume.gate is Gate.FROZEN
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.write, volume, 0, page(2))
            nursery.start_soon(engine.discard, volume, PAGE, PAGE)
            await wait_all_tasks_blocked()
            appended = engine.log.appended
            assert not engine.write_now(volume, 0, page(3))
            assert await read(engine, volume, 0, PAGE) == page(1)
            await engine.flush(volume)
            layer = await engine.transact(lambda txn: txn.seal(volume.uuid))
            assert volume.gate is Gate.FROZEN
            engine.thaw(volume.uuid)
            await wait_all_tasks_blocked()
            assert engine.log.appended == appended
            engine.thaw(volume.uuid)
        assert await read(engine, volume, 0, PAGE) == page(2)
        assert await read(engine, engine.open_layer(volume.uuid, layer.id), 0, PAGE) == page(1)


async def test_mutations_that_waited_for_a_cede_are_refused(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        engine.freeze(volume.uuid)
        results: list[object] = []

        async def attempt() -> None:
            results.append(await outcome(engine.write(volume, 0, page(2))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt)
            nursery.start_soon(attempt)
            await wait_all_tasks_blocked()
            await rig.set_role(volume, Role.CEDED, 2)
        assert [type(result) for result in results] == [NotOwner, NotOwner]
        engine.thaw(volume.uuid)
        assert volume.gate is Gate.RELEASED
        assert volume.epoch == 2
        with pytest.raises(NotOwner):
            engine.check_writer(volume)
        assert isinstance(await outcome(engine.resize(volume, 0)), NotOwner)
        assert isinstance(await outcome(engine.discard(volume, 0, PAGE)), NotOwner)
        await engine.flush(volume)  # nothing is dirty: QEMU's own migration flushes after the cede


async def test_reads_of_a_ceded_volume_wait_for_the_new_owner(
    rig: Rig, owner: Owner, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        assert await read(engine, volume, 0, PAGE) == page(1)
        await rig.set_role(volume, Role.CEDED, 2)
        started = trio.current_time()
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), NotOwner)
        assert trio.current_time() - started == pytest.approx(CEDED_READ_WAIT_S)
        assert not owner.reads
        got = []

        async def reader() -> None:
            got.append(await read(engine, volume, 5, 10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            engine.acknowledged([volume.uuid])
        assert got == [b"A" * 10]
        owner.error = PeerUnreachable("gone")
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), NotOwner)
        assert await read(engine, volume, volume.size, 10) == b""


async def test_reads_of_a_retired_volume_are_forwarded_at_once(
    rig: Rig, owner: Owner, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await rig.set_role(volume, Role.RETIRED, 2)
        assert await read(engine, volume, 0, 3) == b"AAA"


async def test_a_read_that_was_forwarded_before_the_role_changed_is_repeated(
    rig: Rig, owner: Owner, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(5))
        await rig.set_role(volume, Role.INCOMING, 0)
        assert volume.gate is Gate.INCOMING
        owner.waits = trio.Event()
        got = []

        async def reader() -> None:
            got.append(await read(engine, volume, 0, PAGE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            assert owner.reads == [(0, PAGE)]
            await rig.set_role(volume, Role.OWNER, 2)
            owner.waits.set()
        assert got == [page(5)]


async def test_a_read_whose_migration_is_cancelled_is_answered_by_the_new_role(
    rig: Rig, owner: Owner, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(5))
        await rig.set_role(volume, Role.INCOMING, 0)
        owner.waits = trio.Event()
        owner.error = PeerUnreachable("no migration of it is open here")
        got = []

        async def reader() -> None:
            got.append(await outcome(read(engine, volume, 0, PAGE)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            await rig.set_role(volume, Role.NONE, 0)
            owner.waits.set()
        assert isinstance(got[0], NotOwner)


async def test_a_volume_that_has_not_arrived(rig: Rig, owner: Owner, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await rig.set_role(volume, Role.INCOMING, 0)
        assert engine.read_now(volume, 0, PAGE) is None
        for _ in range(2):  # never cached
            assert await read(engine, volume, 0, PAGE) == b"A" * PAGE
        assert len(owner.reads) == 2
        engine.check_writer(volume)  # an open for writing is admitted, the first mutation waits, but not for ever
        started = trio.current_time()
        assert isinstance(await outcome(engine.write(volume, 0, page(1))), Busy)
        assert trio.current_time() - started == pytest.approx(INCOMING_WRITE_WAIT_S)
        owner.waits = trio.Event()
        started = trio.current_time()
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), FetchTimeout)
        assert trio.current_time() - started == pytest.approx(FETCH_DEADLINE_S)


async def test_a_write_that_comes_before_the_grant_waits_for_it(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await rig.set_role(volume, Role.INCOMING, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, engine, volume, 0, page(6))
            await trio.sleep(1)
            await rig.set_role(volume, Role.OWNER, 2)
        assert await read(engine, volume, 0, PAGE) == page(6)


async def test_a_fenced_volume_is_read_only(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await rig.set_role(volume, Role.FENCED, 3)
        assert await read(engine, volume, 0, PAGE) == page(1)
        assert isinstance(await outcome(engine.write(volume, 0, page(2))), ReadOnly)


async def test_gates_follow_records_that_changed_beside_the_engine(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volumes = [await rig.volume(name=name) for name in ("a", "b")]

        def cede(txn: object) -> None:
            for volume in volumes:
                txn.put_ownership(Ownership(volume.uuid, Role.CEDED, 2))  # type: ignore[attr-defined]

        rig.store.write(cede)
        assert all(volume.gate is Gate.OPEN for volume in volumes)
        engine.apply_ownership([volume.uuid for volume in volumes])
        assert all(volume.gate is Gate.RELEASED for volume in volumes)
    async with rig.running() as engine:
        assert engine.open_volume(volumes[0].uuid).gate is Gate.RELEASED


async def test_writers_are_counted(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        engine.opened(volume, True)
        engine.opened(volume, True)
        engine.opened(volume, False)
        engine.closed(volume, True)
        assert engine.writers(volume.uuid) == 1
        assert volume.open_count == 2
        assert engine.writers(b"?" * 16) == 0


async def test_a_volume_that_comes_back_shows_nothing_that_was_cached_before(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await write(engine, volume, 0, page(1))
        await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s"))  # what was cached still exists
        assert await read(engine, volume, 0, PAGE) == page(1)
        await rig.set_role(volume, Role.CEDED, 2)

        def come_back(txn: WriteTxn) -> None:
            layer = txn.receive_layer(b"L" * 16, 0, volume.size, volume.size)
            txn.put_map(layer.id, [(0, 1, REMOTE)], mapped=volume.size // PAGE)
            txn.fill(layer.id, {0: page(7)})
            txn.rollback(volume.uuid, layer.id)
            txn.put_ownership(Ownership(volume.uuid, Role.OWNER, 3))

        rig.store.write(come_back)
        engine.apply_ownership([volume.uuid])
        assert await read(engine, volume, 0, PAGE) == page(7)
        assert volume.epoch == 3
        await write(engine, volume, 0, page(8))
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, PAGE) == page(8)
