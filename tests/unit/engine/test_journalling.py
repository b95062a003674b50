"""Fsyncs by way of the journal: quick, and true after a power cut whatever happened on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from silofs.blocks import PAGE
from silofs.engine import VolumeState, commits
from silofs.engine.journalling import NONE
from silofs.errors import Damaged
from silofs.layers import journal as journal_module
from silofs.layers.catalog import Ownership, Role
from silofs.layers.journal import BLOCK, Journal
from silofs.layers.records import WRITE
from silofs.layers.store import Store
from silofs.limits import JOURNAL_BYTES, JOURNAL_RETRY_S

from .rig import MIB, Rig, page, read, write


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig(journal=True)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit by age: on the tests' clock that would be at every pause."""
    monkeypatch.setattr(commits, "COMMIT_AGE_S", AGE_S)


AGE_S = 600.0


async def settled(rig: Rig) -> None:
    """Until the journal is there and a commit has named it."""
    journalling = rig.engine.commits.journal
    while not (journalling.recorded.journal and not journalling.absent):
        await trio.sleep(0.01)
    await rig.engine.commit_all()  # the one that was asked for, to name it


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, nth: int = 1) -> Iterator[list[int]]:
    """The nth write to a journal fails, and a part of it may have arrived; yields how many were begun."""
    begun = [0]
    real = journal_module._write

    def fails(fd: int, buffers: list[Any], position: int) -> None:
        begun[0] += 1
        if begun[0] == nth:
            os.pwrite(fd, buffers[0][:512], position)
            raise OSError(errno.EIO, "Input/output error")
        real(fd, buffers, position)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "_write", fails)
        yield begun


async def test_an_fsync_is_no_commit(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        before = engine.commits.commits
        for number in range(20):
            await write(engine, volume, number * PAGE, page(number))
            await engine.flush(volume)
        assert engine.commits.commits == before
        assert engine.commits.journal.syncs == 20
        await engine.flush(volume)
        assert engine.commits.journal.syncs == 20  # nothing new
        await engine.write(volume, 0, page(50), sync=True)
        assert engine.commits.journal.syncs == 21


async def test_what_was_synced_survives_a_power_cut_and_the_rest_may_not(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await write(engine, volume, 0, page(1))
        await write(engine, volume, PAGE + 7, b"part")
        await engine.discard(volume, 5 * PAGE, PAGE)
        await engine.flush(volume)
        await write(engine, volume, 2 * PAGE, page(3))
    rig.cut_power()
    async with rig.running() as engine:
        found = await read(engine, engine.open_volume(volume.uuid), 0, 3 * PAGE)
        assert found == page(1) + b"part".rjust(11, b"\0").ljust(PAGE, b"\0") + bytes(PAGE)


async def test_growth_by_a_write_is_replayed(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume(PAGE)
        await settled(rig)
        await engine.write(volume, 3 * PAGE, page(9), sync=True)
    rig.cut_power()
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        assert volume.size == 4 * PAGE
        assert await read(engine, volume, 0, 4 * PAGE) == bytes(3 * PAGE) + page(9)


async def test_a_store_opened_without_a_daemon_has_it_all(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await engine.write(volume, 0, page(1), sync=True)
    for _ in range(2):
        with Store.open(rig.path) as store, store.reader() as txn:
            record = txn.volume(volume.uuid)
            assert bytes(txn.page(int(txn.resolve(record.head, 0)[0]))) == page(1)
            assert (txn.state.journal, tuple(txn.state.mark)) == (0, (0, 0, 0))


async def test_fsyncs_of_many_share_writes(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volumes = [await rig.volume(name=f"vm{number}") for number in range(20)]
        await settled(rig)

        async def work(volume: VolumeState) -> None:
            await write(engine, volume, 0, page(volume.inode))
            await engine.flush(volume)

        async with trio.open_nursery() as nursery:
            for volume in volumes:
                nursery.start_soon(work, volume)
        assert engine.commits.journal.syncs <= 3
    rig.cut_power()
    async with rig.running() as engine:
        for volume in volumes:
            assert await read(engine, engine.open_volume(volume.uuid), 0, PAGE) == page(volume.inode)


async def test_records_of_a_commit_in_flight_count_once_they_are_journalled_or_landed(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await write(engine, volume, 0, page(1))
        rig.inline.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.commit_all)
            await trio.testing.wait_all_tasks_blocked()
            await write(engine, volume, PAGE, page(2))
            await engine.flush(volume)  # returns although the commit is held
            assert engine.commits.under_way
            nursery.cancel_scope.cancel()
            rig.inline.release.set()
    rig.cut_power()
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, 2 * PAGE) == page(1) + page(2)


async def test_much_to_journal_is_a_commit(make_rig: Callable[..., Rig], autojump_clock: MockClock) -> None:
    rig = make_rig(journal=True, ring=2 * JOURNAL_BYTES + MIB)
    async with rig.running() as engine:
        volume = await rig.volume(4 * JOURNAL_BYTES)
        await settled(rig)
        engine.commits.kick_at = 1 << 40
        for at in range(0, JOURNAL_BYTES + MIB, MIB):
            await write(engine, volume, at, bytes([1 + at // MIB]) * MIB)
        syncs, before = engine.commits.journal.syncs, engine.commits.commits
        await engine.flush(volume)
        assert engine.commits.commits == before + 1
        assert engine.commits.journal.syncs == syncs


@pytest.mark.parametrize("arrived", [False, True])
async def test_a_write_that_fails_retires_the_file_and_the_fsync_is_a_commit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, arrived: bool
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        journalling = engine.commits.journal
        first = journalling.recorded.journal
        await engine.write(volume, 0, page(1), sync=True)
        with failing(monkeypatch) as begun:
            await engine.write(volume, PAGE, page(2), sync=True)
            await engine.write(volume, 2 * PAGE, page(3), sync=True)
            assert begun == [1]  # never tried again
        assert journalling.recorded == NONE
        assert journalling.absent
        assert journalling.failures == 1
        await trio.sleep(JOURNAL_RETRY_S + 1)
        assert journalling.recorded.journal not in (0, first)
        assert [path.name for path in (rig.path / "journal").iterdir()] == [f"{journalling.recorded.journal:016x}"]
        syncs = journalling.syncs
        await engine.write(volume, 3 * PAGE, page(4), sync=True)
        assert journalling.syncs == syncs + 1
    rig.cut_power()
    async with rig.running() as engine:
        found = await read(engine, engine.open_volume(volume.uuid), 0, 4 * PAGE)
        assert found == page(1) + page(2) + page(3) + page(4)


async def test_a_retired_file_stays_named_until_a_commit_has_what_was_synced_there(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """A commit that was cut early and lands late must not take the name from later syncs' file."""
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        journalling = engine.commits.journal
        named = journalling.recorded.journal
        await write(engine, volume, 0, page(1))
        early = engine.log.mark()
        await write(engine, volume, PAGE, page(2))
        await engine.flush(volume)
        with failing(monkeypatch):
            rig.inline.hold()
            await write(engine, volume, 2 * PAGE, page(3))
            with trio.move_on_after(0.1):
                await engine.flush(volume)
        assert journalling.entry(early).journal == named
        assert journalling.entry(engine.log.mark()) == NONE
        rig.inline.release.set()
        await engine.flush(volume)
        assert journalling.recorded == NONE


async def test_holder_and_daemon_die_after_a_failed_write_and_before_the_commit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await engine.write(volume, 0, page(1), sync=True)
        with failing(monkeypatch), monkeypatch.context() as patch:
            patch.setattr(engine.commits, "commit", trio.sleep_forever)
            await write(engine, volume, PAGE, page(2))
            with trio.move_on_after(0.1):
                await engine.flush(volume)
    assert [path.suffix for path in (rig.path / "journal").iterdir()] == [".retired"]
    rig.cut_power()
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, PAGE) == page(1)


async def test_a_daemon_goes_on_with_the_file_of_the_one_before_but_not_with_a_retired_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        first = engine.commits.journal.recorded.journal
        await engine.write(volume, 0, page(1), sync=True)
    async with rig.running() as engine:
        volume = engine.open_volume(volume.uuid)
        assert engine.commits.journal.recorded.journal == first
        await engine.write(volume, PAGE, page(2), sync=True)
        assert engine.commits.journal.syncs == 1
        with failing(monkeypatch), monkeypatch.context() as patch:
            patch.setattr(engine.commits, "commit", trio.sleep_forever)
            await write(engine, volume, 2 * PAGE, page(3))
            with trio.move_on_after(0.1):
                await engine.flush(volume)
    async with rig.running() as engine:
        await settled(rig)
        assert engine.commits.journal.recorded.journal != first
        volume = engine.open_volume(volume.uuid)
        assert await read(engine, volume, 0, 3 * PAGE) == page(1) + page(2) + page(3)


async def test_without_space_for_a_journal_every_fsync_is_a_commit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with rig.running() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "_fill", full)
            volume = await rig.volume()
            await engine.write(volume, 0, page(1), sync=True)
            assert engine.commits.journal.syncs == 0
            assert "No space" in engine.commits.journal.absent
        await trio.sleep(JOURNAL_RETRY_S + 1)
        assert not engine.commits.journal.absent
        await engine.write(volume, 0, page(2), sync=True)
        assert engine.commits.journal.syncs == 1


async def test_nothing_is_replayed_over_what_came_after(rig: Rig, autojump_clock: MockClock) -> None:
    """Snapshot, shrink, delete, cede: the journal still holds the older records, whole, and no replay begins there."""
    async with rig.running() as engine:
        kept, shrunk, gone, ceded = [await rig.volume(name=name) for name in ("kept", "shrunk", "gone", "ceded")]
        await settled(rig)
        for volume in (kept, shrunk, gone, ceded):
            await engine.write(volume, 0, page(1), sync=True)
            await engine.write(volume, 8 * PAGE, page(2), sync=True)
        await engine.transact(lambda txn: txn.take_snapshot(kept.uuid, "s"))
        await engine.resize(shrunk, PAGE)
        await engine.resize(shrunk, MIB)
        await engine.transact(lambda txn: txn.delete_volume(gone.uuid))
        await rig.set_role(ceded, Role.CEDED, 2)
        before = {}
        for volume in (kept, shrunk):
            before[volume.uuid] = await read(engine, volume, 0, 9 * PAGE)
        with rig.store.reader() as txn:
            applied = txn.volume(ceded.uuid).applied_lsn
    rig.cut_power()
    with Store.open(rig.path) as store, store.reader() as txn:
        assert not txn.has_volume(gone.uuid)
        assert txn.volume(ceded.uuid).applied_lsn == applied
    async with rig.running() as engine:
        for uuid, content in before.items():
            assert await read(engine, engine.open_volume(uuid), 0, 9 * PAGE) == content
        assert before[shrunk.uuid] == page(1) + bytes(8 * PAGE)


async def test_records_of_another_epoch_or_a_volume_that_is_gone_are_dropped(
    rig: Rig, autojump_clock: MockClock
) -> None:
    """As if a daemon had gone on to sync after its volume was taken from it."""
    async with rig.running() as engine:
        one, two = await rig.volume(name="one"), await rig.volume(name="two")
        await settled(rig)
        for volume in (one, two):
            await engine.write(volume, 0, page(1), sync=True)
        rig.store.write(lambda txn: txn.put_ownership(Ownership(one.uuid, Role.OWNER, one.epoch + 1)))
        rig.store.write(lambda txn: txn.delete_volume(two.uuid))
    rig.cut_power()
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(one.uuid), 0, PAGE) == bytes(PAGE)


async def test_a_gap_ends_what_counts_of_a_volume(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await engine.write(volume, 0, page(1), sync=True)
        log = engine.log
        log.append(WRITE, volume.uuid, volume.epoch, volume.last_lsn - 1, PAGE, PAGE, page(2))
        volume.last_lsn = log.next_lsn - 1
        await engine.flush(volume)
    rig.cut_power()
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, 2 * PAGE) == page(1) + bytes(PAGE)


async def test_the_mark_moves_with_records_that_need_no_commit(rig: Rig, autojump_clock: MockClock) -> None:
    """Space of the ring is given back only up to a mark that is durable, even where nothing is left to apply."""
    async with rig.running() as engine:
        gone, kept = await rig.volume(name="gone"), await rig.volume(name="kept")
        await settled(rig)
        await write(engine, gone, 0, page(1))
        gone.set_gone()
        await engine.commit_all()
        assert engine.commits.journal.recorded.mark == engine.log.mark()
        with rig.store.reader() as txn:
            assert txn.state.mark == engine.log.mark()
        await engine.write(kept, 0, page(2), sync=True)
    rig.cut_power()
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(kept.uuid), 0, PAGE) == page(2)


async def test_an_unreadable_journal_is_no_hindrance_to_a_daemon_that_has_the_log(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await engine.write(volume, 0, page(1), sync=True)
    (path,) = (rig.path / "journal").iterdir()
    path.write_bytes(bytes(100))
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, PAGE) == page(1)
        await settled(rig)


async def test_records_say_what_was_durable_before_them(rig: Rig, autojump_clock: MockClock) -> None:
    """By a commit or by the journal; and of what is only written, nothing."""
    async with rig.running() as engine:
        log, journalling, volume = engine.log, engine.commits.journal, await rig.volume()
        await settled(rig)
        await write(engine, volume, 0, page(1))
        await engine.commit_all()
        assert log.synced == log.next_lsn == journalling.durable_lsn
        await write(engine, volume, PAGE, page(2))
        await write(engine, volume, 2 * PAGE, page(3))
        assert log.synced == log.next_lsn - 2
        await engine.flush(volume)
        assert log.synced == log.next_lsn == journalling.durable_lsn
    async with rig.running() as engine:
        assert engine.log.synced == engine.log.next_lsn == engine.commits.journal.durable_lsn


async def test_a_spoilt_record_that_was_synced_keeps_a_store_closed(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        first = engine.log.mark().position
        for number in range(3):
            await engine.write(volume, number * PAGE, page(number + 1), sync=True)
    rig.cut_power()
    (path,) = (rig.path / "journal").iterdir()
    content = bytearray(path.read_bytes())
    content[BLOCK + first + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match="'vm'"):
        rig.start()
    content[BLOCK + first + 2000] ^= 1
    path.write_bytes(content)
    async with rig.running() as engine:
        assert await read(engine, engine.open_volume(volume.uuid), 0, 3 * PAGE) == page(1) + page(2) + page(3)


async def test_commits_go_on_by_age(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await engine.write(volume, 0, page(1), sync=True)
        before = engine.commits.commits
        await trio.sleep(AGE_S + 1)
        assert engine.commits.commits == before + 1
        assert volume.durable_lsn == volume.last_lsn


async def test_making_it_is_interrupted(rig: Rig, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """Left behind: one that is half made, and one that is whole and that no commit has named."""
    Journal.make(rig.path / "journal", 1, b"S" * 16, 4 * MIB).close()
    (rig.path / "journal" / "new").write_bytes(b"half")
    async with rig.running() as engine:
        volume = await rig.volume()
        await settled(rig)
        await engine.write(volume, 0, page(1), sync=True)
        assert len(list((rig.path / "journal").iterdir())) == 1
