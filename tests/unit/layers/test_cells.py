"""Objects in cells: what a commit stores there, when a cell is used again, and what happens where none can be used."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from silofs.blocks import PAGE, leaves_for
from silofs.errors import BadFormat, Damaged, StoreError
from silofs.layers import catalog, cells, schema, writer
from silofs.layers.catalog import State, Value
from silofs.layers.cells import CellFile, CellsFailed
from silofs.layers.environment import Environment
from silofs.layers.native import Source
from silofs.layers.policies import drain
from silofs.layers.reader import ReadTxn
from silofs.layers.rewrite import Reap
from silofs.layers.schema import OBJECT_PAGES
from silofs.layers.store import Store
from silofs.layers.syncer import Syncer
from silofs.layers.transaction import RunAgain, WriteTxn
from silofs.limits import CELL_OBJECTS_MIN, CELLS_FLOOR_BYTES, CELLS_RETRY_S, GIB, MIB
from tests.storerig import Rig, page_bytes, read_layer

LARGE = range(10 * 31)
"""Pages of a commit that goes to cells: ten objects."""


def file_of(rig: Rig) -> Path:
    return rig.path / "data" / "cells"


def blocks(rig: Rig) -> int:
    """Bytes that the file takes."""
    return file_of(rig).stat().st_blocks * 512


def in_cells(txn: ReadTxn) -> dict[int, int]:
    """Objects in cells, and which."""
    found = {schema.KEY.unpack(key)[0]: schema.open_cell(key, value) for key, value in txn.scan(schema.CELL)}
    assert len(set(found.values())) == len(found), "a cell for each"
    return found


def taken(rig: Rig) -> dict[int, int]:
    """Objects in cells now, after a look at everything that must agree with that."""
    with rig.store.reader() as txn:
        found = in_cells(txn)
        inline = {schema.KEY.unpack(key)[0] for key in txn.scan_keys(schema.OBJECT)}
        maps = dict(txn._scan_records(schema.CELL_MAP, Value))
    assert not inline & found.keys(), "an object is in one place"
    used = {
        (schema.KEY.unpack(key)[0] << schema.MAP_SHIFT) + at
        for key, value in maps.items()
        for at in np.flatnonzero(np.unpackbits(np.frombuffer(value.data, np.uint8), bitorder="little")).tolist()
    }
    assert used == set(found.values()), "the maps say which cells are in use"
    free = rig.store._environment.free_cells
    if free is not None:
        assert free.cells == rig.store._environment.cells.cells
        assert free.free + free.waiting + len(used) == free.cells, "every cell is in one state"
    return found


def inline(rig: Rig) -> int:
    """How many objects are in LMDB."""
    with rig.store.reader() as txn:
        return txn.entries(schema.OBJECT)


def volume(rig: Rig, name: str = "vm") -> bytes:
    return rig.store.write(lambda txn: txn.create_volume(name, GIB)).uuid


def content(seed: int, pages: range = LARGE) -> bytes:
    return b"".join(page_bytes(page, seed) for page in pages)


def shown(rig: Rig, pages: range = LARGE) -> bytes:
    with rig.store.reader() as txn:
        return read(txn, pages)


def read(txn: ReadTxn, pages: range = LARGE) -> bytes:
    head = txn.volume_by_name("vm").head
    return b"".join(bytes(view) for leaf in range(leaves_for(pages.stop * PAGE)) for view in views(txn, head, leaf))[
        pages.start * PAGE : pages.stop * PAGE
    ]


def views(txn: ReadTxn, layer: int, leaf: int) -> list[memoryview | bytes]:
    return txn.views(txn.resolve(layer, leaf))


@pytest.fixture
def vm(rig: Rig) -> bytes:
    return volume(rig)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for the file of cells."""
    passed = 0.0
    real = time.monotonic

    def go_on(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr("silofs.layers.cells.time.monotonic", lambda: real() + passed)
    return go_on


# What goes where


def test_objects_of_a_large_commit_are_in_cells(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE)
    found = taken(rig)
    assert len(found) == 10 and inline(rig) == 0
    assert sorted(found.values()) == list(range(10)), "from the beginning of the file"
    assert shown(rig) == content(0)
    rig.reopen()
    assert taken(rig) == found and shown(rig) == content(0)


def test_a_cell_is_a_pad_and_an_object(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE)
    for object_id, cell in taken(rig).items():
        with file_of(rig).open("rb") as file:
            raw = os.pread(file.fileno(), schema.CELL_BYTES, cell * schema.CELL_BYTES)
        assert raw[: schema.CELL_PAD] == bytes(schema.CELL_PAD)
        value = memoryview(raw)[schema.CELL_PAD :]
        assert schema.check_header(object_id, value) == 31
        with rig.store.reader() as txn:
            assert txn.object(object_id) == value


def test_few_objects_stay_in_lmdb(rig: Rig, vm: bytes) -> None:
    pages = range((CELL_OBJECTS_MIN - 1) * 31)
    rig.put(vm, pages)
    assert taken(rig) == {} and inline(rig) == CELL_OBJECTS_MIN - 1
    assert not file_of(rig).exists(), "a file that is not needed is not made"
    rig.put(vm, range(CELL_OBJECTS_MIN * 31), seed=1)
    assert len(taken(rig)) == CELL_OBJECTS_MIN and inline(rig) == 0


@pytest.mark.parametrize("rest", [0, 1, 15, 16, 30])
def test_the_last_object_may_be_partial(rig: Rig, vm: bytes, rest: int) -> None:
    """Fewer pages than half an object are lone, as ever."""
    pages = range(9 * 31 + rest)
    rig.put(vm, pages, seed=rest)
    assert len(taken(rig)) == 9 + (rest >= schema.OBJECT_PAGES_MIN)
    assert shown(rig, pages) == content(rest, pages)
    # In a cell that has held a whole object, what lies behind a partial one's last page is not its own.
    rig.zero(vm, 0, len(pages))
    rig.commit()
    rig.put(vm, [600])
    rig.put(vm, pages, seed=99)
    rig.reopen()
    assert shown(rig, pages) == content(99, pages)


def test_a_store_without_objects_there_has_no_file(rig: Rig, vm: bytes) -> None:
    rig.put(vm, range(100))
    rig.reopen()
    assert not file_of(rig).exists() and taken(rig) == {}


# When a cell is used again


def test_a_reader_sees_its_state_for_as_long_as_it_lives(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE, seed=1)
    old = rig.store.reader()
    seen = set(in_cells(old).values())
    kept = views(old, old.volume_by_name("vm").head, 0)  # as a request holds them until it is answered
    for seed in range(2, 10):
        rig.put(vm, LARGE, seed=seed)
        assert not seen & set(taken(rig).values()), "the reader may still look there"
        assert read(old) == content(1)
        assert shown(rig) == content(seed)
    assert b"".join(kept)[: len(LARGE) * PAGE] == content(1)
    del kept
    old.close()
    rig.put(vm, LARGE, seed=10)
    rig.put(vm, LARGE, seed=11)
    assert seen == set(taken(rig).values()), "the lowest ones are taken first"


def test_readers_of_several_states(rig: Rig, vm: bytes) -> None:
    readers = []
    for seed in range(6):
        rig.put(vm, LARGE, seed=seed)
        readers.append((seed, rig.store.reader()))
    while readers:
        _, gone = readers.pop(len(readers) // 2)  # neither the oldest nor the newest
        gone.close()
        rig.put(vm, LARGE, seed=90 + len(readers))
        taken(rig)
        for seed, reader in readers:
            assert read(reader) == content(seed), seed


def test_a_reader_that_renews_gives_up_what_it_saw(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE, seed=1)
    first = set(taken(rig).values())
    with rig.store.reader() as reader:
        rig.put(vm, LARGE, seed=2)
        rig.put(vm, [500])
        reader.renew()
        rig.put(vm, LARGE, seed=3)
        rig.put(vm, LARGE, seed=4)
        assert set(taken(rig).values()) == first
        assert read(reader) == content(2)


def test_a_file_that_is_overwritten_stays_as_long_as_it_is(rig: Rig, vm: bytes) -> None:
    for seed in range(20):
        rig.put(vm, LARGE, seed=seed)
    assert max(taken(rig).values()) < 3 * 10, "what is there, what is written, and what the last one gave up"
    assert blocks(rig) <= 3 * 10 * schema.CELL_BYTES
    assert file_of(rig).stat().st_size == GIB
    assert shown(rig) == content(19)


def test_a_snapshot_keeps_its_cells(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE, seed=1)
    first = taken(rig)
    layer = rig.store.write(lambda txn: txn.take_snapshot(vm, "s").layer)
    for seed in (2, 3, 4):
        rig.put(vm, LARGE, seed=seed)
    assert taken(rig).items() >= first.items()
    with rig.store.reader() as txn:
        assert read_layer(txn, layer, len(LARGE) * PAGE) == content(1)


def test_cells_beyond_some_give_their_blocks_back(rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CELLS_KEPT", 4)
    other = volume(rig, "other")
    rig.put(other, LARGE, seed=7)
    rig.put(vm, range(1000))
    before = blocks(rig)
    assert before == len(taken(rig)) * schema.CELL_BYTES == 42 * schema.CELL_BYTES
    rig.store.write(lambda txn: txn.delete_volume(vm))
    drain(rig.store, [Reap()])
    rig.store.write(lambda txn: txn.set_attr(other, uid=1))
    assert len(taken(rig)) == 10
    assert blocks(rig) == (10 + 4) * schema.CELL_BYTES
    with rig.store.reader() as txn:
        assert read_layer(txn, txn.volume_by_name("other").head, len(LARGE) * PAGE) == content(7)
    rig.put(other, LARGE, seed=8)
    assert set(taken(rig).values()) >= {10, 11, 12, 13}, "those that have blocks are used first"


def test_on_a_full_disk_all_go_back(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE)
    rig.zero(vm, 0, len(LARGE))
    rig.commit()
    assert blocks(rig)
    rig.store.held.full = True
    rig.store.write(lambda txn: txn.set_attr(vm, uid=1))
    assert not blocks(rig) and not taken(rig)


def test_where_space_cannot_be_held_a_full_disk_gets_all_back(
    rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on btrfs: there free cells cannot be written in place, so kept they would be of no use to anybody."""
    rig.store.held.holds = False
    rig.put(vm, LARGE)
    for module in ("cells", "held", "writer"):
        monkeypatch.setattr(f"silofs.layers.{module}.free_bytes", lambda path: CELLS_FLOOR_BYTES // 2)
    rig.zero(vm, 0, len(LARGE))
    rig.commit()
    rig.put(vm, [600])
    assert not taken(rig) and not blocks(rig)


def test_opened_again_it_knows_what_is_free(rig: Rig, vm: bytes) -> None:
    for seed in range(3):
        rig.put(vm, LARGE, seed=seed)
    rig.put(vm, range(400, 800))
    before = taken(rig)
    rig.reopen()
    assert taken(rig) == before
    free = rig.store._environment.free_cells
    assert free is not None and free.waiting == 0
    for seed in range(3, 6):
        rig.put(vm, LARGE, seed=seed)
        assert taken(rig).items() >= {(each, cell) for each, cell in before.items() if cell in in_use(rig, 400, 800)}
    assert shown(rig) == content(5) and shown(rig, range(400, 800)) == content(0, range(400, 800))


def in_use(rig: Rig, first: int, end: int) -> set[int]:
    """Cells that pages of the volume are in."""
    with rig.store.reader() as txn:
        refs = np.concatenate([txn.resolve(txn.volume_by_name("vm").head, leaf) for leaf in range(2)])[first:end]
        where = in_cells(txn)
    return {where[schema.object_of(ref)] for ref in refs[schema.kinds(refs) == schema.DATA].tolist()}


# Transactions that do not land


class Stop(Exception):
    pass


def storing(vm: bytes, seed: int, then: Callable[[WriteTxn], None] = lambda txn: None) -> Callable[[WriteTxn], None]:
    """A transaction that stores pages, which the volume's head does not get, and gives them up again at once."""

    def run(txn: WriteTxn) -> None:
        source = pages_of(seed)
        refs = txn.store_pages(txn.volume(vm).head, list(LARGE), source)
        then(txn)
        txn.release(refs)

    return run


def pages_of(seed: int) -> Source:
    return Source(content(seed), np.arange(0, len(LARGE) * PAGE, PAGE, dtype=np.int64))


def test_a_transaction_that_fails_gives_its_cells_back(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE, seed=1)
    before = taken(rig)

    def fail(txn: WriteTxn) -> None:
        assert len(txn.cells_taken) == 10
        raise Stop

    for _ in range(3):
        with pytest.raises(Stop):
            rig.store.write(storing(vm, 2, fail))
        assert taken(rig) == before
    assert blocks(rig) == 20 * schema.CELL_BYTES, "the same cells each time"
    assert shown(rig) == content(1)
    rig.put(vm, LARGE, seed=3)
    assert sorted(taken(rig).values()) == list(range(10, 20)) and shown(rig) == content(3)


def test_a_transaction_that_runs_again(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE, seed=1)
    runs = 0

    def again(txn: WriteTxn) -> None:
        nonlocal runs
        runs += 1
        assert sorted(txn.cells_taken) == list(range(10, 20))
        if runs < 3:
            raise RunAgain

    rig.store.write(storing(vm, 2, again))
    assert runs == 3 and shown(rig) == content(1)
    assert sorted(taken(rig).values()) == list(range(10))


def test_a_transaction_that_takes_cells_and_gives_them_up(rig: Rig, vm: bytes) -> None:
    for seed in range(5):
        rig.store.write(storing(vm, seed))
        assert taken(rig) == {}
    assert blocks(rig) <= 20 * schema.CELL_BYTES


def test_a_map_of_lmdb_that_is_full(tmp_path: Path) -> None:
    """Found after cells were taken, in the same transaction: it runs again in a larger one."""
    rig = Rig(tmp_path / "store", map_bytes=1 * MIB)
    vm = volume(rig)
    rig.put(vm, LARGE, seed=1)
    attempts = []

    def then(txn: WriteTxn) -> None:
        attempts.append(sorted(txn.cells_taken))
        txn.put_value("peer", "large", bytes(3 * MIB))

    for page in LARGE:
        rig.write(vm, page * PAGE, page_bytes(page, 2))
    rig.commit(then)
    assert len(attempts) > 1 and rig.store._environment.map_bytes > MIB, "it was full"
    assert attempts == [list(range(10, 20))] * len(attempts)
    assert sorted(taken(rig).values()) == attempts[0] and shown(rig) == content(2)
    rig.reopen()
    assert sorted(taken(rig).values()) == attempts[0] and shown(rig) == content(2)
    assert rig.findings() == []
    rig.close()


# Cells that cannot be written


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write_cells", "fdatasync", "ftruncate"])
def test_after_an_error_objects_go_to_lmdb_for_a_while(
    rig: Rig, vm: bytes, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    if call != "ftruncate":
        rig.put(vm, LARGE, seed=1)
    before = taken(rig)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        target = cells if call == "write_cells" else os
        patch.setattr(target, call, fail)
        rig.put(vm, range(400, 800), seed=2)
        assert calls >= 1, "it was tried"
        assert taken(rig) == before and inline(rig) == 13
        failed = calls
        rig.put(vm, range(400, 800), seed=3)
        assert calls == failed, "and not tried again at once"
        assert inline(rig) == 13 and shown(rig, range(400, 800)) == content(3, range(400, 800))
    rig.put(vm, range(400, 800), seed=4)
    assert inline(rig) == 13, "nor when it would do"
    clock(CELLS_RETRY_S + 1)
    rig.put(vm, range(400, 800), seed=5)
    assert inline(rig) == 0 and len(taken(rig)) == len(before) + 13
    assert shown(rig, range(400, 800)) == content(5, range(400, 800))
    if before:
        assert shown(rig) == content(1)
    rig.reopen()
    assert shown(rig, range(400, 800)) == content(5, range(400, 800))


def test_an_error_in_the_middle_of_a_commit(rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its cells are written then, and worth nothing."""
    real = cells.write_cells

    def fail(fd: int, first_id: int, source: Source, places: list[int]) -> None:
        some = len(places) // 2
        real(fd, first_id, Source(source.base, source.at[: some * OBJECT_PAGES]), places[:some])
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(cells, "write_cells", fail)
    pages = range(1500)
    rig.put(vm, pages, seed=1)
    assert taken(rig) == {} and inline(rig) == 48
    assert shown(rig, pages) == content(1, pages)


def test_blocks_that_cannot_be_given_back_stay(rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(writer, "CELLS_KEPT", 0)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "punch", fail)
        for seed in range(4):
            rig.put(vm, LARGE, seed=seed)
        assert shown(rig) == content(3)
        assert blocks(rig) == 30 * schema.CELL_BYTES
    rig.put(vm, [500])
    rig.put(vm, [501])
    assert blocks(rig) == 10 * schema.CELL_BYTES
    assert len(taken(rig)) == 10


@pytest.mark.parametrize("holds", [True, False])
def test_with_little_space_new_cells_are_not_taken(
    rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    """Of those that have blocks some are, where what is written in place needs no new ones."""
    rig.put(vm, LARGE, seed=1)
    rig.store.held.holds = holds
    monkeypatch.setattr(cells, "free_bytes", lambda path: CELLS_FLOOR_BYTES + 3 * MIB)
    rig.put(vm, range(400, 1200), seed=2)
    assert len(taken(rig)) == 10 and inline(rig) == 26
    assert shown(rig, range(400, 1200)) == content(2, range(400, 1200))
    rig.put(vm, LARGE, seed=3)
    assert len(taken(rig)) == 10, "these do fit"
    monkeypatch.setattr(cells, "free_bytes", lambda path: CELLS_FLOOR_BYTES)
    rig.put(vm, [400])  # a commit, after which what the one before gave up is free
    rig.put(vm, LARGE, seed=4)
    assert len(taken(rig)) == (10 if holds else 0)
    assert shown(rig) == content(4)


def test_a_file_that_cannot_be_longer(rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.put(vm, LARGE, seed=1)
    free = rig.store._environment.free_cells
    assert free is not None
    rest = free.take(free.free - 4, hollow=True)  # another volume has them
    rig.store._environment.cells._map_bytes = GIB
    rig.put(vm, range(400, 800), seed=2)
    assert inline(rig) == 13 - 4, "as many as there is room for are in cells"
    assert shown(rig, range(400, 800)) == content(2, range(400, 800)) and shown(rig) == content(1)
    free.undone(rest)
    taken(rig)


def test_a_map_that_cannot_be_read_is_not_written_to(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "damaged")
    vm = volume(rig)
    rig.put(vm, LARGE, seed=1)
    before = taken(rig)
    key = schema.KEY.pack(0)
    with rig.store.reader() as txn:
        sound = bytes(txn.fetch(schema.CELL_MAP, key) or b"")
    rig.store.write(lambda txn: txn._put(schema.CELL_MAP, key, sound[:-1] + b"\x01"))
    rig.put(vm, range(400, 800), seed=2)
    assert inline(rig) == 13 and rig.store._environment.free_cells is None
    rig.put(vm, LARGE, seed=3)
    assert inline(rig) == 13 + 10
    assert shown(rig) == content(3) and shown(rig, range(400, 800)) == content(2, range(400, 800))
    rig.store.write(lambda txn: txn._put(schema.CELL_MAP, key, sound))
    with rig.store.reader() as txn:
        assert in_cells(txn) == {}, "they are gone; their cells stay used until a repair"
    rig.reopen()
    free = rig.store._environment.free_cells
    assert free is not None and free.free == free.cells - len(before)
    assert [finding.code for finding in rig.findings()] == ["cell"], "a check says that they are lost"
    rig.close()


# A file that is not the store's


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A closed store, of which ten cells are in use, from 10 on."""
    rig = Rig(tmp_path / "store")
    vm = volume(rig)
    rig.put(vm, LARGE, seed=1)
    rig.put(vm, LARGE, seed=2)
    assert sorted(taken(rig).values()) == list(range(10, 20))
    rig.close()
    yield rig.path


@pytest.mark.parametrize("size", [None, 0, 1, 19 * schema.CELL_BYTES, 20 * schema.CELL_BYTES - 1])
def test_a_file_that_is_missing_or_cut_short_is_refused(closed: Path, size: int | None) -> None:
    path = closed / "data" / "cells"
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    with pytest.raises(BadFormat) as raised:
        Store.open(closed)
    assert str(path) in str(raised.value) and ("missing" if size is None else "cut short") in str(raised.value)
    assert raised.value.hint and "copy" in raised.value.hint
    assert path.exists() == (size is not None), "it is not made anew"
    Store.open(closed, verify=False).close()


@pytest.mark.parametrize("size", [20, 21, 100, schema.MAP_CELLS - 1])
def test_a_file_that_is_shorter_than_its_maps_keeps_what_is_in_it(closed: Path, size: int) -> None:
    """All that is in use is there: a copy may end where the last block ends."""
    os.truncate(closed / "data" / "cells", size * schema.CELL_BYTES)
    rig = Rig(closed)
    with rig.store.reader() as txn:
        vm = txn.volume_by_name("vm").uuid
    rig.put(vm, range(400, 800), seed=3)
    assert shown(rig) == content(2) and shown(rig, range(400, 800)) == content(3, range(400, 800))
    taken(rig)
    assert rig.findings() == []
    rig.close()


def raw_map(path: Path, value: bytes | None) -> None:
    """Put another record in the place of the first map's, behind the store's back, as of the newest transaction."""
    with closing(Environment(path / "data")) as environment, environment.begin(write=True) as txn:
        key, table = schema.KEY.pack(0), environment.tables[schema.CELL_MAP]
        txn.delete(key, db=table) if value is None else txn.put(key, value, db=table)
        key, table = schema.META_STATE, environment.tables[schema.META]
        state = catalog.decode(schema.META, key, txn.get(key, db=table) or b"", State)
        txn.put(key, catalog.encode(schema.META, key, replace(state, txn=txn.id())), db=table)


def test_a_lost_map_is_damage(closed: Path) -> None:
    raw_map(closed, None)
    with pytest.raises(Damaged, match="the catalog is not the one"):
        Store.open(closed)


def test_an_older_map_is_damage(closed: Path) -> None:
    """Its checksum is right: it is what the store had before."""
    rig = Rig(closed)
    with rig.store.reader() as txn:
        older = bytes(txn.fetch(schema.CELL_MAP, schema.KEY.pack(0)) or b"")
    rig.put(rig.store.write(lambda txn: txn.volume_by_name("vm")).uuid, range(400, 800))
    rig.close()
    raw_map(closed, older)
    with pytest.raises(Damaged, match="the catalog is not the one"):
        Store.open(closed)


def test_a_map_of_another_length_is_damage(closed: Path) -> None:
    rig = Rig(closed)
    rig.store.write(lambda txn: txn.put_record(schema.CELL_MAP, schema.KEY.pack(0), Value(bytes(10))))
    rig.close()
    with pytest.raises(Damaged, match="the maps of cells"):
        Store.open(closed)


def test_an_object_whose_cell_lies_behind_the_end_is_damage(rig: Rig, vm: bytes) -> None:
    """Not SIGBUS."""
    rig.put(vm, LARGE)
    object_id = min(taken(rig))
    key = schema.KEY.pack(object_id)
    with rig.store.reader() as txn:
        sound = bytes(txn.fetch(schema.CELL, key) or b"")
    for cell in (schema.MAP_CELLS, 1 << 40, (1 << 64) - 1):
        record = schema.cell_record(key, cell)
        rig.store.write(lambda txn, record=record: txn._put(schema.CELL, key, record))  # type: ignore[misc]
        with rig.store.reader() as txn, pytest.raises(Damaged, match="behind the end"):
            txn.object(object_id)
    rig.store.write(lambda txn: txn._put(schema.CELL, key, sound))


def test_an_object_in_anothers_cell_is_damage(rig: Rig, vm: bytes) -> None:
    rig.put(vm, LARGE)
    (one, cell), (_, other) = sorted(taken(rig).items())[:2]
    key = schema.KEY.pack(one)
    rig.store.write(lambda txn: txn._put(schema.CELL, key, schema.cell_record(key, other)))
    with rig.store.reader() as txn, pytest.raises(Damaged):
        txn.page(schema.ref(schema.DATA, one, 0))
    rig.store.write(lambda txn: txn._put(schema.CELL, key, schema.cell_record(key, cell)))


def test_a_store_that_is_opened_without_proof_takes_no_cells(closed: Path) -> None:
    with Store.open(closed, verify=False) as store:
        rig = Rig.over(store)
        rig.put(store.write(lambda txn: txn.volume_by_name("vm")).uuid, range(400, 800))
        assert inline(rig) == 13


# The file


def test_a_reader_in_another_process_sees_that_the_file_has_grown(tmp_path: Path) -> None:
    reading = CellFile(tmp_path, map_bytes=4 * GIB)
    assert reading.cells == 0 and reading.stored_bytes == 0
    with pytest.raises(Damaged):
        reading.object(0)
    writing = CellFile(tmp_path, map_bytes=4 * GIB)
    for number in range(1, 5):
        assert writing.grow() == schema.MAP_CELLS
        cell = number * schema.MAP_CELLS - 1
        writing.write(number, pages_of(number), list(range(cell - 9, cell + 1)))
        writing.sync()
        assert schema.object_page(number, 0, reading.object(cell - 9)) == page_bytes(0, number)
    assert writing.grow() == 0, "at its limit"
    for file in (reading, writing):
        file.close()
        file.close()
        with pytest.raises(Damaged):
            file.object(0)


def test_a_file_that_was_not_written_to_can_be_closed(tmp_path: Path) -> None:
    file = CellFile(tmp_path, map_bytes=GIB)
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_new_file_is_made_durable_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when that has failed the first time."""
    synced = []

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "the disk fails")

    file = CellFile(tmp_path, map_bytes=GIB)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "sync_directory", fail)
        with pytest.raises(CellsFailed, match="fails"):
            file.grow()
    monkeypatch.setattr(cells, "sync_directory", synced.append)
    assert file.grow() == schema.MAP_CELLS
    assert synced == [tmp_path]
    file.close()


def test_what_fails_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CellFile(tmp_path, map_bytes=GIB)
    file.grow()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        file.write(1, pages_of(1), list(range(10)))
        with pytest.raises(CellsFailed):
            file.sync()
    assert not file.takes
    file.write(1, pages_of(1), list(range(10)))
    file.sync()
    file.close()


# The syncer


class Disk:
    """Stands in for fdatasync: waits until it is let go, and does what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began = threading.Semaphore(0)
        self._may_end = threading.Semaphore(0)
        self._outcomes: list[OSError | None] = []
        self.calls = 0
        monkeypatch.setattr("silofs.layers.syncer.os.fdatasync", self._fdatasync)

    def _fdatasync(self, fd: int) -> None:
        self.calls += 1
        self.began.release()
        self._may_end.acquire()
        outcome = self._outcomes.pop(0)
        if outcome is not None:
            raise outcome

    def end(self, outcome: OSError | None = None) -> None:
        """Let one call end."""
        self._outcomes.append(outcome)
        self._may_end.release()


class Waiting:
    """A thread in `wait`."""

    def __init__(self, syncer: Syncer) -> None:
        self.error: OSError | None = None
        self._syncer = syncer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._syncer.wait()
        except OSError as error:
            self.error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> OSError | None:
        self._thread.join(10)
        assert self.over
        return self.error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def syncer() -> Iterator[Syncer]:
    syncer = Syncer(-1)
    yield syncer
    syncer.close()
    assert syncer._thread is None or not syncer._thread.is_alive()


def begin(syncer: Syncer) -> None:
    """Something is written, and the disk told."""
    syncer.begin(syncer.written())


def test_nothing_is_synced_before_it_is_asked_for(syncer: Syncer, disk: Disk) -> None:
    marks = [syncer.written() for _ in range(3)]
    assert syncer._thread is None
    disk.end()
    syncer.wait(marks[0])
    assert disk.calls == 1
    syncer.wait(marks[2])
    assert disk.calls == 1, "what was written by then was synced along with it"


def test_without_a_write_there_is_nothing_to_wait_for(syncer: Syncer, disk: Disk) -> None:
    syncer.wait()
    assert disk.calls == 0


def test_a_sync_that_began_before_the_last_write_does_not_do(syncer: Syncer, disk: Disk) -> None:
    begin(syncer)
    disk.began.acquire()
    begin(syncer)
    waiting = Waiting(syncer)
    disk.end()
    disk.began.acquire()  # another one begins by itself
    assert not waiting.over
    disk.end()
    assert waiting.join() is None and disk.calls == 2


def test_many_writes_meanwhile_need_one_more(syncer: Syncer, disk: Disk) -> None:
    begin(syncer)
    disk.began.acquire()
    for _ in range(5):
        begin(syncer)
    disk.end()
    disk.end()
    syncer.wait()
    assert disk.calls == 2


def test_an_error_is_for_who_waits_next_and_for_nobody_else(syncer: Syncer, disk: Disk) -> None:
    first, second = OSError(errno.EIO, "first"), OSError(errno.ENOSPC, "second")
    begin(syncer)
    disk.began.acquire()
    begin(syncer)
    disk.end(first)
    disk.began.acquire()
    waiting = Waiting(syncer)
    disk.end()  # what the one before has lost is not made good
    assert waiting.join() is first
    syncer.wait()
    begin(syncer)
    disk.end(second)
    with pytest.raises(OSError, match="second"):
        syncer.wait()
    begin(syncer)
    disk.end()
    syncer.wait()


def test_what_was_written_is_synced_before_the_end(syncer: Syncer, disk: Disk) -> None:
    """Nobody waits for it any more; the thread does not stay, all the same."""
    begin(syncer)
    disk.end()
    syncer.close()
    assert disk.calls == 1
    syncer.close()


def test_a_syncer_that_was_never_needed_has_no_thread() -> None:
    syncer = Syncer(-1)
    syncer.wait()
    assert syncer._thread is None
    syncer.close()


def test_a_store_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    rig = Rig(tmp_path / "store")
    rig.put(volume(rig), LARGE)
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"silofs-syncer", "silofs-writer"}
    rig.reopen()
    rig.close()
    assert set(threading.enumerate()) <= before


def test_a_cell_is_not_written_to_by_the_very_next_transaction(rig: Rig, vm: bytes) -> None:
    """The event loop keeps views beyond its snapshots, and is in no table while it renews them."""
    rig.put(vm, LARGE)
    with rig.store.reader() as txn:
        view = txn.object(schema.KEY.unpack(next(txn.scan_keys(schema.CELL)))[0])
        before = bytes(view)
    rig.put(vm, LARGE, seed=1)
    for page in LARGE:
        rig.write(vm, page * PAGE, page_bytes(page, 2))
    assert rig.commit(lambda _: bytes(view) == before).value


def test_that_blocks_cannot_be_given_back_is_said_once(
    rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(cells, "punch", fail)
    monkeypatch.setattr(writer, "CELLS_KEPT", 0)
    for seed in range(5):
        rig.put(vm, LARGE, seed=seed)
    assert len([record for record in caplog.records if "keep their blocks" in record.message]) == 1


def test_a_reader_that_outlives_a_daemon_keeps_what_it_sees(
    rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child of a check, in a process of its own: the next daemon does not know what was given up since."""
    rig.put(vm, LARGE, seed=1)
    rig.put(vm, LARGE, seed=2)
    seen = rig.store._environment.newest() - 1
    with monkeypatch.context() as patch:
        patch.setattr(Environment, "oldest_reader", lambda self: seen)
        rig.reopen()
        free = rig.store._environment.free_cells
        assert free is not None and free.free == 0 and free.waiting == free.cells - 10
        rig.put(vm, LARGE, seed=3)
        assert min(taken(rig).values()) >= schema.MAP_CELLS, "the file has become longer"
        assert free.waiting > 8000
    rig.put(vm, [500])
    rig.put(vm, [501])
    assert free.waiting <= 10
    assert shown(rig) == content(3)


def test_a_file_that_cannot_be_opened_is_said_in_a_line(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "store")
    rig.close()
    path = rig.path / "data" / "cells"
    path.mkdir()
    with pytest.raises(StoreError, match=f"{path} cannot be opened: Is a directory"):
        Store.open(rig.path)
    path.rmdir()
    Store.open(rig.path).close()


def test_what_lies_behind_the_last_page_of_an_object_is_not_touched(
    rig: Rig, vm: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no blocks, and on a full tmpfs a page of zeros cannot be had: that was a SIGBUS."""
    touched: list[int] = []
    monkeypatch.setattr(cells, "touch", lambda address, length: touched.append(length))
    pages = range(9 * OBJECT_PAGES + 20)
    rig.put(vm, pages, seed=1)
    assert len(taken(rig)) == 10
    with rig.store.reader() as txn:
        for object_id in sorted(schema.KEY.unpack(key)[0] for key in txn.scan_keys(schema.CELL)):
            touched.clear()
            txn.object(object_id)
            assert touched == [schema.HEADER_BYTES, (20 if object_id == 10 else OBJECT_PAGES) * PAGE]
    assert shown(rig, pages) == content(1, pages)
