"""Long writes that are put into cells ahead of their commit: what is adopted, and what becomes of the rest."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from silofs.blocks import PAGE
from silofs.layers import schema
from silofs.layers.ahead import Ahead
from silofs.layers.native import write_cells
from silofs.layers.pending import Pending
from silofs.layers.schema import OBJECT_PAGES
from silofs.layers.store import CommitResult
from tests.storerig import Rig, page_bytes
from tests.unit.layers.test_cells import taken

PAGES = 10 * OBJECT_PAGES
SIZE = 2 * PAGES * PAGE


def long_write(rig: Rig, uuid: bytes, first: int, count: int, seed: int = 0) -> bytes:
    data = b"".join(page_bytes(page, seed) for page in range(first, first + count))
    rig.write(uuid, first * PAGE, data)
    return data


def ahead(rig: Rig, uuid: bytes) -> Future[Ahead | None]:
    pending = rig.pendings[uuid]
    future = rig.store.write_ahead(memoryview(rig.ring), pending.take_long())
    pending.ahead.append(future)
    return future


def cells_of(future: Future[Ahead | None]) -> tuple[int, list[int]]:
    """(first id, cells), without keeping what was written ahead."""
    found = future.result()
    assert found is not None
    return found.first_id, list(found.cells)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "store")
    rig.store.write(lambda txn: txn.create_volume("vm", SIZE))
    yield rig
    rig.close()


@pytest.fixture
def uuid(rig: Rig) -> bytes:
    with rig.store.reader() as txn:
        return txn.volume_by_name("vm").uuid


def sound(rig: Rig) -> dict[int, int]:
    """Objects in cells, after every look that there is."""
    assert not rig.findings()
    return taken(rig)


def test_a_commit_adopts_what_was_written_ahead(rig: Rig, uuid: bytes) -> None:
    data = long_write(rig, uuid, 0, PAGES)
    first_id, cells = cells_of(ahead(rig, uuid))
    with rig.store.reader() as txn:
        assert not txn.entries(schema.CELL), "nothing refers to it yet"
    before = rig.store._environment.cells._syncer
    assert before is not None
    written = before._written
    rig.commit()
    assert before._written == written, "no page is written twice"
    assert sound(rig) == dict(enumerate(cells, first_id))
    assert rig.read("vm") == data.ljust(SIZE, b"\0")
    rig.reopen()
    assert sound(rig) == dict(enumerate(cells, first_id))
    assert rig.read("vm") == data.ljust(SIZE, b"\0")


def test_what_was_overwritten_meanwhile_is_not_seen(rig: Rig, uuid: bytes) -> None:
    expected = bytearray(long_write(rig, uuid, 0, PAGES).ljust(SIZE, b"\0"))
    first_id, cells = cells_of(ahead(rig, uuid))
    expected[0 : OBJECT_PAGES * PAGE] = long_write(rig, uuid, 0, OBJECT_PAGES, seed=1)  # the first object, whole
    rig.write(uuid, 40 * PAGE, page_bytes(40, 2))
    expected[40 * PAGE : 41 * PAGE] = page_bytes(40, 2)
    rig.write(uuid, 50 * PAGE + 100, b"part")
    expected[50 * PAGE + 100 : 50 * PAGE + 104] = b"part"
    rig.zero(uuid, 60, 64)
    expected[60 * PAGE : 64 * PAGE] = bytes(4 * PAGE)
    rig.commit()
    assert rig.read("vm") == expected
    found = sound(rig)
    assert first_id not in found and cells[0] not in found.values(), "an object without a page is not stored"
    assert found.items() >= dict(list(enumerate(cells, first_id))[1:]).items()
    rig.reopen()
    assert rig.read("vm") == expected
    sound(rig)


def test_a_page_that_was_written_ahead_twice_is_the_newer_one(rig: Rig, uuid: bytes) -> None:
    long_write(rig, uuid, 0, PAGES)
    ahead(rig, uuid)
    data = long_write(rig, uuid, 0, PAGES, seed=1)
    first_id, cells = cells_of(ahead(rig, uuid))
    rig.commit()
    assert rig.read("vm") == data.ljust(SIZE, b"\0")
    rig.put(uuid, range(PAGES, PAGES + 4))
    assert sound(rig) == dict(enumerate(cells, first_id))


def test_objects_of_another_transaction_in_between(rig: Rig, uuid: bytes) -> None:
    """Their ids are above those that were given out ahead, so that the adopted ones are not the last of their table."""
    rig.store.write(lambda txn: txn.create_volume("other", SIZE))
    with rig.store.reader() as txn:
        other = txn.volume_by_name("other").uuid
    data = long_write(rig, uuid, 0, PAGES)
    ahead(rig, uuid)
    late = rig.pendings.pop(uuid)
    theirs = long_write(rig, other, 0, PAGES, seed=3)
    pending = rig.pendings.pop(other)
    rig.store.commit([pending], memoryview(rig.ring)).result()
    rig.store.commit([late], memoryview(rig.ring)).result()
    assert len(sound(rig)) == 20
    assert rig.read("vm") == data.ljust(SIZE, b"\0")
    assert rig.read("other") == theirs.ljust(SIZE, b"\0")


def test_a_transaction_that_fails_leaves_it_to_the_next(rig: Rig, uuid: bytes) -> None:
    data = long_write(rig, uuid, 0, PAGES)
    first_id, cells = cells_of(ahead(rig, uuid))
    pendings = list(rig.pendings.values())

    def fail(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rig.store.commit(pendings, memoryview(rig.ring), fail).result()
    rig.commit()
    assert sound(rig) == dict(enumerate(cells, first_id))
    assert rig.read("vm") == data.ljust(SIZE, b"\0")


def test_cells_of_writes_that_are_not_committed_are_free_again(rig: Rig, uuid: bytes) -> None:
    long_write(rig, uuid, 0, PAGES)
    ahead(rig, uuid).result()
    rig.pendings.clear()  # the volume was deleted
    rig.put(uuid, range(4))
    assert not sound(rig), "and all cells are in one state"


def test_a_power_cut_leaves_the_cells_free(rig: Rig, uuid: bytes) -> None:
    rig.put(uuid, range(PAGES), seed=7)
    before, used = rig.read("vm"), sound(rig)
    long_write(rig, uuid, 0, PAGES)
    ahead(rig, uuid).result()
    rig.reopen()
    assert rig.read("vm") == before
    assert sound(rig) == used


def test_a_failed_sync_makes_it_worthless(rig: Rig, uuid: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says it once, of whatever it was: nothing that was written ahead is believed any more."""
    fail = threading.Event()
    fail.set()

    def fdatasync(fd: int) -> None:
        if fail.is_set():
            fail.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    data = long_write(rig, uuid, 0, PAGES)
    ahead(rig, uuid).result()
    rig.commit()
    assert not fail.is_set()
    assert rig.read("vm") == data.ljust(SIZE, b"\0")
    rig.put(uuid, range(PAGES, PAGES + 4))
    assert not sound(rig), "all is in LMDB, and the cells are free"


def test_a_full_disk_is_no_reason_not_to_commit(rig: Rig, uuid: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = long_write(rig, uuid, 0, PAGES)
    with monkeypatch.context() as patch:
        patch.setattr("silofs.layers.cells.write_cells", full)
        assert ahead(rig, uuid).result() is None
    rig.commit()
    assert rig.read("vm") == data.ljust(SIZE, b"\0")
    rig.put(uuid, range(PAGES, PAGES + 4))
    assert not sound(rig)


def test_a_store_that_was_opened_anew_adopts_nothing(rig: Rig, uuid: bytes) -> None:
    """As after an error of LMDB's. By its maps those cells are free, and others have perhaps taken them."""
    data = long_write(rig, uuid, 0, PAGES)
    kept = ahead(rig, uuid).result()
    assert kept is not None and kept.usable
    rig.store.reopen()
    assert not kept.usable
    rig.commit()
    assert rig.read("vm") == data.ljust(SIZE, b"\0")
    sound(rig)


class Jobs(queue.SimpleQueue[Any]):
    """Says when the end of the jobs was put."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        if item is None:
            self.ended.set()


def test_what_was_being_written_when_the_store_was_opened_anew(
    rig: Rig, uuid: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it adopted, whether it was begun before that or would have been during it."""
    writing, environment, jobs = threading.Event(), rig.store._environment, Jobs()
    environment.ahead._jobs = jobs
    def slow(*arguments: Any) -> None:
        writing.set()
        jobs.ended.wait()
        write_cells(*arguments)

    first = long_write(rig, uuid, 0, PAGES)
    with monkeypatch.context() as patch:
        patch.setattr("silofs.layers.cells.write_cells", slow)
        begun = ahead(rig, uuid)
        writing.wait()
        second = long_write(rig, uuid, PAGES, PAGES)
        queued = ahead(rig, uuid)
        rig.store.reopen()
    kept = begun.result()
    assert kept is not None and not kept.usable
    assert queued.result() is None
    rig.commit()
    assert rig.read("vm") == first + second
    sound(rig)


def test_without_a_thread_for_it_nothing_is_written_ahead(
    rig: Rig, uuid: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    data = long_write(rig, uuid, 0, PAGES)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert ahead(rig, uuid).result() is None
    data += long_write(rig, uuid, PAGES, PAGES)
    first_id, places = cells_of(ahead(rig, uuid))
    rig.commit()
    assert sound(rig).items() >= dict(enumerate(places, first_id)).items()
    assert rig.read("vm") == data


def test_it_goes_on_while_a_transaction_waits_for_the_disk(
    rig: Rig, uuid: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, go_on, sync = threading.Event(), threading.Event(), os.fdatasync

    def fdatasync(fd: int) -> None:
        syncing.set()
        go_on.wait()
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    first = long_write(rig, uuid, 0, PAGES)
    committed: Future[CommitResult[None]] = rig.store.commit([rig.pendings.pop(uuid)], memoryview(rig.ring))
    syncing.wait()
    second = long_write(rig, uuid, PAGES, PAGES)
    first_id, cells = cells_of(ahead(rig, uuid))
    assert not committed.done()
    go_on.set()
    committed.result()
    rig.commit()
    assert sound(rig).items() >= dict(enumerate(cells, first_id)).items()
    assert rig.read("vm") == first + second


def test_pages_of_zeros_are_not_written(rig: Rig, uuid: bytes) -> None:
    data = long_write(rig, uuid, 0, PAGES) + bytes(PAGES * PAGE)
    rig.write(uuid, PAGES * PAGE, bytes(PAGES * PAGE))
    _, cells = cells_of(ahead(rig, uuid))
    assert len(cells) == PAGES // OBJECT_PAGES
    rig.commit()
    assert len(sound(rig)) == len(cells)
    assert rig.read("vm") == data


def test_pages_beyond_the_end_of_a_volume_that_was_cut(rig: Rig, uuid: bytes) -> None:
    data = long_write(rig, uuid, 0, PAGES)
    ahead(rig, uuid)
    rig.store.write(lambda txn: txn.resize(uuid, 100 * PAGE))
    rig.commit()
    assert len(sound(rig)) == -(-100 // OBJECT_PAGES)
    assert rig.read("vm") == data[: 100 * PAGE]


def test_long_writes_are_taken_in_whole_objects() -> None:
    pending = Pending(bytes(16))
    pending.write(100 * PAGE, 1 << 20, 20 * PAGE, 1)
    pending.write(PAGE, 2 << 20, PAGE, 2)  # a short one
    pending.write(0, 3 << 20, 20 * PAGE, 3)
    assert pending.take_long() == [(100, 120, 1 << 20), (0, 11, 3 << 20)]
    assert pending.long_pages == 9
    assert pending.take_long() == []
    pending.write(20 * PAGE, 4 << 20, 22 * PAGE, 4)
    assert pending.take_long() == [(11, 20, (3 << 20) + 11 * PAGE), (20, 42, 4 << 20)]


def test_ids_given_out_ahead_are_not_given_out_again(rig: Rig, uuid: bytes) -> None:
    long_write(rig, uuid, 0, PAGES)
    first_id, cells = cells_of(ahead(rig, uuid))
    rig.pendings.clear()
    rig.put(uuid, range(PAGES))
    assert min(sound(rig)) >= first_id + len(cells)
    with rig.store.reader() as txn:
        assert txn.state.next_object > max(schema.KEY.unpack(key)[0] for key in txn.scan_keys(schema.CELL))


