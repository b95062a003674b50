"""Every table damaged in turn: what is repaired is sound, and what it does not show as it was is what was said."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import lmdb
import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import BadFormat, Damaged
from silofs.layers import heads, schema
from silofs.layers.check import check
from silofs.layers.policies import drain
from silofs.layers.repack import Repack
from silofs.layers.repair import Repair, Repaired, put_in_place
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import MIB
from silofs.packing import BlockWriter
from tests.storerig import Rig

SIZE = 24 * MIB
HARMS = ["flip", "remove", "swap"]
EMPTY = {"meta", "peer", "migration", "outbox", "request", "pin", "doomed", "merge"}  # or of no consequence here
IN_CELLS = range(5100, 5100 + 31 * 8)  # pages of "golden" whose objects are in cells, in that order
TABLES = [table for table in schema.TABLES if table.name not in EMPTY]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A store with something in nearly every table."""
    monkeypatch.setattr(heads, "VOID_LEAVES", 0)
    rig = Rig(tmp_path / "store")
    golden = rig.store.write(lambda txn: txn.create_volume("golden", SIZE)).uuid
    rig.put(golden, [*range(40), *range(600, 700), 1025, 2000, *range(5000, 5040)])
    rig.put(golden, range(IN_CELLS.start, IN_CELLS.stop))
    base = rig.store.write(lambda txn: txn.take_snapshot(golden, "v1"))
    vm = rig.store.write(lambda txn: txn.clone(base.layer, "vm")).uuid
    rig.put(vm, [3, 4, 650, 3000, *range(4000, 4064)], seed=1)
    rig.zero(vm, LEAF_PAGES, 3 * LEAF_PAGES)
    rig.commit()
    rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    rig.put(vm, [5, 2001], seed=2)
    layer = rig.store.write(lambda txn: _received(txn))
    with BlockWriter(rig.store, layer) as writer:
        writer.add(0, b"".join((b"%d" % at * PAGE)[:PAGE] for at in range(64)))
    rig.store.write(lambda txn: (txn.clone(layer, "packed"), txn.unpin(layer, "test")))
    rig.store.write(lambda txn: txn.put_value("host", "name", b"here"))
    yield rig
    rig.close()


def _received(txn: WriteTxn) -> int:
    layer = txn.receive_layer(uuid4().bytes, 0, SIZE, SIZE).id
    txn.pin(layer, "test")
    txn.put_map(layer, [], mapped=SIZE // PAGE)
    return layer


def contents(store: Store) -> dict[str, list[bytes | None]]:
    """Every page of every volume and snapshot, None for one that is lost."""
    found: dict[str, list[bytes | None]] = {}
    reader = store.reader()
    for volume in reader.volumes():
        for name, top in [
            (volume.name, volume.head),
            *((f"{volume.name}@{each.name}", each.layer) for each in reader.snapshots(volume.uuid)),
        ]:
            pages: list[bytes | None] = []
            for leaf in range(SIZE // PAGE // LEAF_PAGES):
                for reference in reader.resolve(top, leaf).tolist():
                    try:
                        pages.append(bytes(reader.page(reference)))
                    except Damaged:
                        pages.append(None)
            found[name] = pages
    reader.close()
    return found


def repaired(rig: Rig) -> tuple[Repaired, Store]:
    rig.store.close()
    result = Repair(rig.path, rig.store.uuid).build()
    put_in_place(rig.path)
    rig.store = Store.open(rig.path)
    return result, rig.store


def compare(before: dict[str, list[bytes | None]], result: Repaired, store: Store) -> None:
    """Nothing is gone that was not said to be."""
    after = contents(store)
    gone = {loss.name for loss in result.losses if not loss.ranges}
    renamed = {loss.name for loss in result.losses if loss.what == "name"}
    assert len(set(before) - set(after) - gone) <= len(renamed)
    for name in renamed:
        assert after.pop(name) in before.values(), "what it held is there, under that name"
    for name, pages in after.items():
        ranges = [pair for loss in result.losses if loss.name == name for pair in loss.ranges]
        for number, (old, new) in enumerate(zip(before[name], pages, strict=True)):
            said = any(first <= number * PAGE < end for first, end in ranges)
            assert new == (None if said else old), (name, number)


def harm(rig: Rig, table: schema.Table, how: str, index: int) -> bool:
    """Damage one record of a table; whether there was one."""
    with rig.store.reader() as txn:
        keys = list(txn.scan_keys(table))
        if not keys:
            return False
        key, other = keys[index % len(keys)], keys[(index + 1) % len(keys)]
        value, another = bytearray(txn.fetch(table, key) or b""), bytes(txn.fetch(table, other) or b"")
    if len(value) != len(another) or key == other:
        how = "flip" if how == "swap" else how  # nothing that could be mistaken for it

    def spoil(txn: WriteTxn) -> None:
        if how == "remove":
            txn._delete(table, key)
        elif how == "swap":
            txn._put(table, key, another)
            txn._put(table, other, bytes(value))
        else:
            value[len(value) // 2] ^= 0x10
            txn._put(table, key, bytes(value))

    rig.store.write(spoil)
    return True


def test_a_sound_store_is_repaired_to_itself(rig: Rig) -> None:
    before = contents(rig.store)
    result, store = repaired(rig)
    assert result.losses == [] and result.rebuilt == [] and result.volumes == 3
    compare(before, result, store)
    with store.reader() as txn:
        assert check(txn, read_data=True) == []
        assert txn.value("host", "name") == b"here"
        golden = txn.volume_by_name("golden").uuid
    rig.put(golden, [7], seed=9)
    assert rig.findings() == []


@pytest.mark.parametrize("how", HARMS)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_each_table(rig: Rig, table: schema.Table, how: str) -> None:
    before = contents(rig.store)
    rng = random.Random(table.number)
    harmed = [harm(rig, table, how, rng.randrange(100)) for _ in range(2)]
    assert any(harmed), "there is something to damage"
    result, store = repaired(rig)
    compare(before, result, store)
    with store.reader() as txn:
        assert check(txn, read_data=True) == [], "what was repaired is sound"
    kept = {loss.what for loss in result.losses if not loss.ranges}
    assert table.counted or not kept, "a damaged map or page costs no volume"


def test_a_volume_whose_record_is_lost_keeps_its_name_and_its_pages(rig: Rig) -> None:
    before = contents(rig.store)["packed"]
    with rig.store.reader() as txn:
        uuid = txn.volume_by_name("packed").uuid
    rig.store.write(lambda txn: txn._delete(schema.VOLUME, uuid))
    result, store = repaired(rig)
    assert [(loss.what, loss.name) for loss in result.losses] == [("name", "packed")]
    assert contents(store)["packed"] == before
    with store.reader() as txn:
        assert txn.volume_by_name("packed").uuid == uuid and check(txn, read_data=True) == []


@pytest.mark.parametrize("seed", range(12))
def test_pages_of_the_file(rig: Rig, seed: int) -> None:
    """Damage that LMDB itself would stumble over."""
    before = contents(rig.store)
    rig.store.close()
    rng = random.Random(seed)
    path = rig.path / "data" / "data.mdb"
    pages = path.stat().st_size // PAGE
    with path.open("r+b") as file:
        for _ in range(3):
            at = rng.randrange(2, pages) * PAGE
            file.seek(at)
            file.write([bytes(PAGE), rng.randbytes(PAGE)][seed % 2])
    result, store = repaired(rig)
    compare(before, result, store)
    with store.reader() as txn:
        assert check(txn, read_data=True) == []


def spoil_pages(rig: Rig, first: int, content: bytes) -> None:
    rig.store.close()
    with (rig.path / "data" / "data.mdb").open("r+b") as file:
        file.seek(first * PAGE)
        file.write(content)


@pytest.mark.parametrize("content", [bytes(PAGE), random.Random(5).randbytes(PAGE)], ids=["zeros", "noise"])
@pytest.mark.parametrize("header", [0, 1])
def test_a_spoilt_header_is_not_followed_and_is_said(rig: Rig, header: int, content: bytes) -> None:
    """LMDB has two, without checksums: random bytes look newer than anything."""
    before = contents(rig.store)
    rig.store.write(lambda txn: txn.put_value("host", "name", b"there"))  # whatever header is left shows the volumes
    spoil_pages(rig, header, content)
    result, store = repaired(rig)
    assert [loss.name for loss in result.losses] == ["header"]
    compare(before, result, store)


@pytest.mark.parametrize("content", [bytes(2 * PAGE), random.Random(5).randbytes(2 * PAGE), None])
def test_a_store_of_which_nothing_is_found_is_not_made_an_empty_one(rig: Rig, content: bytes | None) -> None:
    spoil_pages(rig, 0, content or b"")
    data = rig.path / "data" / "data.mdb"
    if content is None:
        data.write_bytes(b"")
    damaged = data.read_bytes()
    with pytest.raises(BadFormat, match="nothing of a store"):
        Repair(rig.path, rig.store.uuid).build()
    assert data.read_bytes() == damaged


def test_a_lost_state_record_is_said(rig: Rig) -> None:
    """It is what says how many volumes there were."""
    before = contents(rig.store)
    rig.store.close()
    env = lmdb.Environment(str(rig.path / "data"), max_dbs=1, lib_version=schema.ENGINE_MAJOR)
    with closing(env), env.begin(write=True) as txn:
        txn.delete(schema.META_STATE, db=env.open_db(schema.META.name.encode(), txn=txn, create=False))
    result, store = repaired(rig)
    assert [loss.name for loss in result.losses] == ["state"]
    compare(before, result, store)


# Objects in cells


def cells_file(rig: Rig) -> Path:
    return rig.path / "data" / "cells"


def lost(result: Repaired) -> dict[str, list[tuple[int, int]]]:
    return {loss.name: loss.ranges for loss in result.losses}


def everywhere(*ranges: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
    """Pages of IN_CELLS by number there, as losses of all who have them."""
    found = [((IN_CELLS.start + first) * PAGE, (IN_CELLS.start + end) * PAGE) for first, end in ranges]
    return dict.fromkeys(("golden", "golden@v1", "vm", "vm@s"), found)


def test_objects_in_cells_are_in_lmdb_afterwards(rig: Rig) -> None:
    before = contents(rig.store)
    with rig.store.reader() as txn:
        assert txn.entries(schema.CELL) == len(IN_CELLS) // 31
        objects = txn.entries(schema.OBJECT) + txn.entries(schema.CELL)
    result, store = repaired(rig)
    compare(before, result, store)
    with store.reader() as txn:
        assert (txn.entries(schema.OBJECT), txn.entries(schema.CELL)) == (objects, 0)
    assert not cells_file(rig).exists() and (rig.path / "data.damaged" / "cells").exists()


def test_without_the_file_of_cells_what_was_in_it_is_lost(rig: Rig) -> None:
    before = contents(rig.store)
    rig.store.close()
    cells_file(rig).unlink()
    with pytest.raises(BadFormat, match="cells is missing"):
        Store.open(rig.path)
    result, store = repaired(rig)
    assert lost(result) == everywhere((0, len(IN_CELLS)))
    compare(before, result, store)
    assert rig.findings() == []


@pytest.mark.parametrize(("length", "kept"), [(3 * schema.CELL_BYTES, 3 * 31), (3 * schema.CELL_BYTES + 5 * PAGE, 97)])
def test_of_a_file_of_cells_that_was_cut_short_the_beginning_is_kept(rig: Rig, length: int, kept: int) -> None:
    before = contents(rig.store)
    rig.store.close()
    os.truncate(cells_file(rig), length)
    result, store = repaired(rig)
    assert lost(result) == everywhere((kept, len(IN_CELLS)))
    compare(before, result, store)


def test_pages_of_cells_that_cannot_be_read_are_given_up_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(rig.store)
    number, sound = cells_file(rig).stat().st_ino, os.pread
    bad = [2 * 32 + 1 + 7, 2 * 32 + 1 + 8, 5 * 32]  # two pages of the third object, the header of the sixth

    def pread(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == number and any(
            offset < (page + 1) * PAGE and page * PAGE < offset + length for page in bad
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sound(fd, length, offset)

    rig.store.close()
    monkeypatch.setattr(os, "pread", pread)
    result, store = repaired(rig)
    assert lost(result) == everywhere((2 * 31 + 7, 2 * 31 + 9), (5 * 31, 6 * 31))
    compare(before, result, store)


PADDING = schema.SUMS_AT + 8 * schema.OBJECT_PAGES + 100
FOURTH = schema.SUMS_AT + 8 * 3


@pytest.mark.parametrize(
    ("at", "gone"), [(0, 0), (8, 0), (16, 0), (PADDING, 0), (FOURTH, 1), (schema.HEADER_SUM_AT, 0)]
)
@pytest.mark.parametrize("place", ["cell", "LMDB"])
def test_pages_are_kept_whose_object_has_a_damaged_header(rig: Rig, place: str, at: int, gone: int) -> None:
    """At its magic, its id, its count, its padding, a page's checksum, its own checksum."""
    before = contents(rig.store)
    file = cells_file(rig) if place == "cell" else rig.path / "data" / "data.mdb"
    rig.store.close()
    with file.open("r+b") as stream:
        content = stream.read()
        header = content.index(schema.HEADER.pack(schema.OBJECT_MAGIC, *_first(content)))
        stream.seek(header + at)
        stream.write(bytes([content[header + at] ^ 1]))
    result, store = repaired(rig)
    assert bool(result.losses) == bool(gone) and result.rebuilt == ["1 records of table object"]
    assert all([end - first for first, end in loss.ranges] == [PAGE] for loss in result.losses)
    compare(before, result, store)


def _first(content: bytes) -> tuple[int, int, int]:
    """Id, pages and the rest of the first object of a file that has all its pages."""
    at = -1
    while True:
        at = content.index(schema.OBJECT_MAGIC, at + 1)
        _, object_id, pages, rest = schema.HEADER.unpack_from(content, at)
        if pages == schema.OBJECT_PAGES:
            return object_id, pages, rest


def test_a_cell_with_another_object_is_none_of_the_first_one(rig: Rig) -> None:
    """As when the table of cells is of the past."""
    before = contents(rig.store)
    rig.store.close()
    with cells_file(rig).open("r+b") as file:
        os.pwrite(file.fileno(), os.pread(file.fileno(), schema.CELL_BYTES, 0), schema.CELL_BYTES)
    result, store = repaired(rig)
    assert lost(result) == everywhere((31, 62)) and result.rebuilt == ["1 records of table object"]
    compare(before, result, store)


# Containers with blocks that are stored as they are: what a repair gives up is pages, not blocks


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Rig]:
    """A volume of blocks that do not get smaller, in two containers."""
    rig = Rig(tmp_path / "store")
    layer = rig.store.write(lambda txn: _received(txn))
    with BlockWriter(rig.store, layer) as writer:
        writer.add(0, random.Random(1).randbytes(60 * PAGE))
    rig.store.write(lambda txn: (txn.clone(layer, "packed"), txn.unpin(layer, "test")))
    yield rig
    rig.close()


def _place(rig: Rig, page: int) -> int:
    """The page of the data file that holds a page of the volume; it is in a container."""
    with closing(rig.store.reader()) as txn:
        reference = int(txn.resolve(txn.volume_by_name("packed").head, 0)[page])
        assert schema.kind_of(reference) == schema.PACKED
        content = bytes(txn.page(reference))
    at = (rig.path / "data" / "data.mdb").read_bytes().index(content)
    assert not at % PAGE
    return at // PAGE


def _findings(store: Store) -> list[str]:
    with closing(store.reader()) as txn:
        return [finding.message for finding in check(txn, read_data=True)]


@pytest.mark.parametrize("how", ["flip", "medium"])
def test_bad_pages_of_raw_blocks_are_given_up_alone(raw: Rig, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, bad = contents(raw.store), [3, 17, 18, 59]
    places = [_place(raw, page) for page in bad]
    data_file = raw.path / "data" / "data.mdb"
    raw.store.close()
    if how == "flip":
        with data_file.open("r+b") as file:
            for place in places:
                byte = os.pread(file.fileno(), 1, place * PAGE + 100)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 1]), place * PAGE + 100)
        raw.store = Store.open(raw.path)
        assert _findings(raw.store)
    else:
        number, sound = data_file.stat().st_ino, os.pread

        def pread(fd: int, length: int, offset: int) -> bytes:
            if os.fstat(fd).st_ino == number and any(
                offset < (place + 1) * PAGE and place * PAGE < offset + length for place in places
            ):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return sound(fd, length, offset)

        monkeypatch.setattr(os, "pread", pread)
    result, store = repaired(raw)
    (loss,) = result.losses
    assert loss.name == "packed"
    assert loss.ranges == [(3 * PAGE, 4 * PAGE), (17 * PAGE, 19 * PAGE), (59 * PAGE, 60 * PAGE)]
    assert not _findings(store)
    compare(before, result, store)

    # What is left of such a block can be moved, and the same block can be stored again.
    uuid = next(volume.uuid for volume in store.reader().volumes())
    raw.put(uuid, [page for page in range(60) if page not in bad and page % 16 > 1])
    raw.commit()
    drain(store, [Repack()])
    assert not _findings(store)
    again = store.write(lambda txn: _received(txn))
    with BlockWriter(store, again) as writer:
        writer.add(0, random.Random(1).randbytes(60 * PAGE))
    store.write(lambda txn: (txn.clone(again, "again"), txn.unpin(again, "test")))
    assert contents(store)["again"][:60] == before["packed"][:60]
    assert not _findings(store)
