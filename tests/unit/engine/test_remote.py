"""Pages that are still at a peer: fetched once, in time, and never over what was written here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from silofs.blocks import PAGE
from silofs.engine import VolumeState
from silofs.errors import Damaged, FetchTimeout, PeerUnreachable, ProtocolError
from silofs.limits import FETCH_DEADLINE_S

from .rig import Rig, outcome, page, read, write


class Peer:
    """Has page(1000 + n) for page n; answers while `open` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.open = trio.Event()
        self.open.set()
        self.error: Exception | None = None
        self.length = PAGE

    async def fetch(self, volume: VolumeState, layer_id: int, number: int) -> bytes:
        self.asked.append((layer_id, number))
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return page(1000 + number)[: self.length]

    async def forward_read(self, volume: VolumeState, offset: int, length: int) -> bytes:
        raise AssertionError("this store owns the volume")


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def rig(make_rig: Callable[..., Rig], peer: Peer) -> Rig:
    return make_rig(remote=peer)


def remote(*numbers: int) -> bytes:
    return b"".join(page(1000 + number) for number in numbers)


async def test_readers_of_one_page_share_a_fetch(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, layer_id = await rig.remote_volume()
        assert volume.remote
        peer.open = trio.Event()
        got: list[bytes] = []

        async def reader(offset: int, length: int) -> None:
            got.append(await read(engine, volume, offset, length))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader, PAGE, PAGE)
            nursery.start_soon(reader, 0, 3 * PAGE)
            await wait_all_tasks_blocked()
            peer.open.set()
        assert sorted(peer.asked) == [(layer_id, 0), (layer_id, 1), (layer_id, 2)]
        assert got.count(remote(1)) == 5
        assert remote(0, 1, 2) in got
        assert await read(engine, volume, PAGE, PAGE) == remote(1)  # kept, although the store does not have it yet
        assert len(peer.asked) == 3


async def test_a_page_that_does_not_come_is_an_error_in_time(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        peer.open = trio.Event()
        started = trio.current_time()
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), FetchTimeout)
        assert trio.current_time() - started == pytest.approx(FETCH_DEADLINE_S)
        peer.open.set()
        assert await read(engine, volume, 0, PAGE) == remote(0)


async def test_who_joins_late_has_a_deadline_of_its_own(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        peer.open = trio.Event()
        results: list[object] = []

        async def reader() -> None:
            results.append(await outcome(read(engine, volume, 0, PAGE)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.sleep(FETCH_DEADLINE_S - 1)
            nursery.start_soon(reader)
            await trio.sleep(2)
            peer.open.set()
        assert isinstance(results[0], FetchTimeout)
        assert results[1] == remote(0)
        assert len(peer.asked) == 2


async def test_a_reader_that_is_cancelled_takes_nothing_from_the_others(
    rig: Rig, peer: Peer, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        peer.open = trio.Event()
        got: list[bytes] = []

        async def reader() -> None:
            got.append(await read(engine, volume, 0, PAGE))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                await read(engine, volume, 0, PAGE)
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            peer.open.set()
        assert got == [remote(0)]
        assert len(peer.asked) == 1


@pytest.mark.parametrize("error", [PeerUnreachable("gone"), Damaged("there too")])
async def test_what_the_peer_says_is_what_the_reader_hears(
    rig: Rig, peer: Peer, error: Exception, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        peer.error = error
        assert type(await outcome(read(engine, volume, 0, PAGE))) is type(error)
        peer.error, peer.length = None, 100
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), ProtocolError)
        peer.length = PAGE
        assert await read(engine, volume, 0, PAGE) == remote(0)


async def test_a_write_of_a_whole_page_wins_at_once(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, layer_id = await rig.remote_volume()
        assert engine.write_now(volume, PAGE, page(1) + page(2))
        assert engine.read_now(volume, PAGE, 2 * PAGE) == page(1) + page(2)
        await engine.flush(volume)
        assert await read(engine, volume, PAGE, 2 * PAGE) == page(1) + page(2)
        assert not peer.asked
        await engine.discard(volume, 5 * PAGE, PAGE)
        assert await read(engine, volume, 4 * PAGE, 3 * PAGE) == remote(4) + bytes(PAGE) + remote(6)
        # The page arrives all the same, for a snapshot perhaps: what was written here stays.
        engine.store.write(lambda txn: txn.fill(layer_id, {1: page(9), 5: page(9), 6: remote(6)}))
        engine.filled([0])
        assert await read(engine, volume, PAGE, 2 * PAGE) == page(1) + page(2)
        assert await read(engine, volume, 5 * PAGE, 2 * PAGE) == bytes(PAGE) + remote(6)


async def test_a_write_of_part_of_a_page_waits_for_the_page(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        peer.open = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.write, volume, PAGE + 100, b"x" * PAGE)  # the edges of two pages
            await wait_all_tasks_blocked()
            assert {number for _, number in peer.asked} == {1}
            peer.open.set()
        expected = bytearray(remote(1, 2))
        expected[100 : 100 + PAGE] = b"x" * PAGE
        for _ in range(2):
            assert await read(engine, volume, PAGE, 2 * PAGE) == expected
            await engine.flush(volume)
        await engine.write(volume, PAGE + 7, b"here")  # both are local now
        expected[7:11] = b"here"
        assert await read(engine, volume, PAGE, 2 * PAGE) == expected
        assert len(peer.asked) == 2


async def test_a_local_write_while_the_page_is_under_way_stays(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        peer.open = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.write, volume, 10, b"later")
            await wait_all_tasks_blocked()
            await write(engine, volume, 0, page(5))
            await engine.flush(volume)
            peer.open.set()
        expected = page(5)[:10] + b"later" + page(5)[15:]
        for _ in range(2):
            assert await read(engine, volume, 0, PAGE) == expected
            await engine.flush(volume)


async def test_a_page_that_arrived_is_not_fetched_again(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    """Not even where a cached leaf still says that it is at the peer."""
    async with rig.running() as engine:
        volume, layer_id = await rig.remote_volume()
        assert await read(engine, volume, 0, PAGE) == remote(0)
        await engine.transact(lambda txn: txn.fill(layer_id, {1: remote(1)}))
        assert await read(engine, volume, PAGE, PAGE) == remote(1)
        engine.store.write(lambda txn: txn.fill(layer_id, {2: remote(2)}))
        assert await read(engine, volume, 2 * PAGE, PAGE) == remote(2)
        assert [number for _, number in peer.asked] == [0]
        rest = {number: remote(number) for number in range(8)}
        engine.store.write(lambda txn: txn.fill(layer_id, rest))
        engine.filled([0])
        assert not volume.remote
        assert await read(engine, volume, 0, 8 * PAGE) == remote(*range(8))
        assert engine.write_now(volume, 3, b"no need to wait")


async def test_clones_and_snapshots_fetch_too(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, layer_id = await rig.remote_volume()
        await write(engine, volume, 0, page(1))
        snapshot = await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "s"))
        record = await engine.transact(lambda txn: txn.clone(snapshot.layer, "clone"))
        view, clone = engine.open_layer(volume.uuid, snapshot.layer), engine.open_volume(record.uuid)
        await write(engine, volume, PAGE, page(2))
        for each in (view, clone):
            assert each.remote
            assert await read(engine, each, 0, 3 * PAGE) == page(1) + remote(1, 2)
        await engine.write(clone, 3 * PAGE + 1, b"c")
        assert await read(engine, clone, 3 * PAGE, PAGE) == page(1003)[:1] + b"c" + page(1003)[2:]
        engine.store.write(lambda txn: txn.fill(layer_id, {number: remote(number) for number in range(8)}))
        engine.filled([0])
        assert not view.remote
        assert await read(engine, view, 0, 8 * PAGE) == page(1) + remote(*range(1, 8))


async def test_a_volume_with_remote_pages_is_resized_and_grown(rig: Rig, peer: Peer, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume(pages=4)
        await engine.resize(volume, 2 * PAGE + 100)
        assert await read(engine, volume, 2 * PAGE, PAGE) == remote(2)[:100]
        await engine.write(volume, 2 * PAGE + 50, b"g" * PAGE)
        assert volume.size == 3 * PAGE + 50
        expected = remote(2)[:50] + b"g" * PAGE
        for _ in range(2):
            assert await read(engine, volume, 2 * PAGE, 2 * PAGE) == expected
            await engine.flush(volume)


async def test_without_a_peer_a_remote_page_is_an_error(
    make_rig: Callable[..., Rig], autojump_clock: MockClock
) -> None:
    rig = make_rig()
    async with rig.running() as engine:
        volume, _ = await rig.remote_volume()
        assert isinstance(await outcome(read(engine, volume, 0, PAGE)), PeerUnreachable)
        engine.attach(Peer())
        assert await read(engine, volume, 0, PAGE) == remote(0)
