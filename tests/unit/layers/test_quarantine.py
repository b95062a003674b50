"""Pages that the medium cannot give: which keys need them, what is remembered of them, and who is refused what."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Damaged, StoreBroken
from silofs.layers import catalog, schema
from silofs.layers.memfd import SLOT
from silofs.layers.notes import Left, Notes
from silofs.layers.quarantine import FILE, Quarantine, describe, learn
from silofs.layers.rawtree import FREE, MAIN, RawTree, Unreadable
from silofs.limits import NOTES_MAX
from tests.storerig import Rig, page_bytes

LEAVES = 400
Tell = Callable[[Notes, bytes], None]


@pytest.fixture
def wide(rig: Rig) -> Rig:
    """A volume with enough leaves for a tree of two levels, and a few whole objects."""
    volume = rig.store.write(lambda txn: txn.create_volume("vm", LEAVES * LEAF_PAGES * PAGE))
    rig.put(volume.uuid, range(0, LEAVES * LEAF_PAGES, LEAF_PAGES))
    rig.put(volume.uuid, range(1, 100))
    return rig


def data_file(rig: Rig) -> Path:
    return rig.path / "data" / "data.mdb"


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From then on those pages of LMDB's file, or of that of cells, cannot be read with pread(2)."""
    real = os.pread

    def spoil(*pages: int, file: str = "data.mdb") -> None:
        def pread(fd: int, length: int, offset: int) -> bytes:
            asked = range(offset // PAGE, (offset + length - 1) // PAGE + 1)
            if any(page in asked for page in pages) and Path(f"/proc/self/fd/{fd}").readlink().name == file:
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, length, offset)

        monkeypatch.setattr(os, "pread", pread)

    return spoil


class Walk(RawTree):
    """Knows which pages it has been to."""

    def __init__(self, file: Path) -> None:
        self.seen: list[int] = []
        super().__init__(file)
        self.seen.clear()

    def page(self, number: int) -> bytes | None:
        self.seen.append(number)
        return super().page(number)


def pages_of(rig: Rig, table: schema.Table, key: bytes) -> set[int]:
    with Walk(data_file(rig)) as tree:
        assert not list(tree.on_the_way(table.name, key))
        return set(tree.seen)


def keys_of(rig: Rig, table: schema.Table) -> list[bytes]:
    with rig.store.reader() as txn:
        return list(txn.scan_keys(table))


def test_a_range_is_that_of_the_keys_that_need_the_page(wide: Rig, spoil: Callable[..., None]) -> None:
    keys = keys_of(wide, schema.LEAF)
    needs = {key: pages_of(wide, schema.LEAF, key) for key in keys}
    tree_pages = set.union(*needs.values())
    assert len(tree_pages) > 5, "the tree has levels"
    found_ranges = set()
    for page in tree_pages:
        spoil(page)
        needing = {key for key in keys if page in needs[key]}
        with RawTree(data_file(wide)) as tree:
            found = {place for key in needing for place in tree.on_the_way("leaf", key)}
            (place,) = {each for each in found if each.page == page}
            assert place in set(tree.all_of(place.table))
        if place.table == "leaf":
            assert {key for key in keys if place.low <= key and (place.high is None or key < place.high)} == needing
            found_ranges.add((place.low, place.high))
        else:
            assert place.table == MAIN and needing == set(keys)
    assert (b"", None) in found_ranges and len(found_ranges) > 3


def test_a_value_with_pages_of_its_own_is_one_key(wide: Rig, spoil: Callable[..., None]) -> None:
    keys = keys_of(wide, schema.OBJECT)
    pages = pages_of(wide, schema.OBJECT, keys[1]) - pages_of(wide, schema.OBJECT, keys[0])
    assert len(pages) == 32, "a header and 31 pages"
    spoil(max(pages))
    with RawTree(data_file(wide)) as tree:
        assert not list(tree.on_the_way("object", keys[0]))
        (place,) = tree.on_the_way("object", keys[1])
        assert place == Unreadable("object", keys[1], keys[1] + b"\0", max(pages))
        assert not list(tree.all_of("object")), "values are not looked at"
    assert keys[1].hex() in describe(place)


@contextmanager
def reopened(rig: Rig) -> Iterator[Rig]:
    rig.reopen()
    yield rig


def test_what_is_quarantined_is_refused_and_nothing_else(wide: Rig, spoil: Callable[..., None]) -> None:
    (page,) = list(pages_of(wide, schema.OBJECT, keys_of(wide, schema.OBJECT)[1]))[-1:]
    victim = keys_of(wide, schema.OBJECT)[1]
    page = max(pages_of(wide, schema.OBJECT, victim))
    spoil(page)
    notes = Notes()
    notes.take().look_up(schema.OBJECT, victim)
    assert len(learn(wide.path, data_file(wide), notes)) == 1
    notes.take().look_up(schema.OBJECT, victim)
    assert not learn(wide.path, data_file(wide), notes), "it is known"
    wide.reopen()
    with wide.store.reader() as txn:
        with pytest.raises(Damaged, match=f"page {page} of the data file"):
            txn.object(schema.KEY.unpack(victim)[0])
        for key in keys_of(wide, schema.OBJECT):
            if key != victim:
                txn.object(schema.KEY.unpack(key)[0])
        with pytest.raises(Damaged):
            list(txn.scan(schema.OBJECT))
        assert len(list(txn.scan(schema.LEAF))) == LEAVES
    assert wide.store.quarantined() == [describe(Unreadable("object", victim, victim + b"\0", page))]
    assert [each.code for each in wide.findings(read_data=False)] == ["quarantine"]
    # What lay there can be written anew; the object keeps its space.
    with wide.store.reader() as txn:
        lost = [page for _, page in schema.open_name(victim, txn.fetch(schema.NAME, victim) or b"")]
        uuid = txn.volume_by_name("vm").uuid
    wide.put(uuid, lost, seed=5)
    assert wide.read("vm")[lost[0] * PAGE : (lost[0] + 1) * PAGE] == page_bytes(lost[0], 5)
    (wide.path / FILE).unlink()
    wide.reopen()
    wide.store.write(lambda txn: txn._delete(schema.OBJECT, victim))  # for the check at the end of the test


def cell_of(rig: Rig, key: bytes) -> int:
    with rig.store.reader() as txn:
        return schema.open_cell(key, txn.fetch(schema.CELL, key) or b"")


def in_cell(key: bytes, page: int) -> Unreadable:
    return Unreadable("cell", key, key + b"\0", page, True)


def tell_by_reader(notes: Notes, key: bytes) -> None:
    notes.take().look_up(schema.CELL, key)


def tell_by_loop(notes: Notes, key: bytes) -> None:
    notes.mark_loop()[1] = schema.KEY.unpack(key)[0]


def tell_by_writer(notes: Notes, key: bytes) -> None:
    notes.writer.look_up(schema.CELL, key)


@pytest.mark.parametrize("tell", [tell_by_reader, tell_by_loop, tell_by_writer])
def test_a_page_of_a_cell_is_one_object(wide: Rig, spoil: Callable[..., None], tell: Tell) -> None:
    keys = keys_of(wide, schema.CELL)
    victim, cell = keys[3], cell_of(wide, keys[3])
    page = cell * 32 + 7
    spoil(page, page + 2, file="cells")
    notes = Notes()
    tell(notes, victim)
    assert learn(wide.path, data_file(wide), notes) == [
        f"page {each} of the file of cells, with record {victim.hex()} of table cell, cannot be read"
        for each in (page, page + 2)
    ]
    tell(notes, victim)
    assert not learn(wide.path, data_file(wide), notes), "it is known"
    tell(notes, keys[4])
    assert not learn(wide.path, data_file(wide), notes), "another object is sound"
    wide.reopen()
    with wide.store.reader() as txn:
        with pytest.raises(Damaged, match=f"page {page} of the file of cells"):
            txn.fetch(schema.CELL, victim)
        with pytest.raises(Damaged, match=f"page {page} of the file of cells"):
            txn.object(schema.KEY.unpack(victim)[0])
        for key in keys_of(wide, schema.OBJECT) + keys_of(wide, schema.CELL):
            if key != victim:
                txn.object(schema.KEY.unpack(key)[0])
        assert len(list(txn.scan(schema.CELL))) == len(keys), "the records are in LMDB's file"
        assert txn.quarantined() == [describe(in_cell(victim, each)) for each in (page, page + 2)]
    assert [each.code for each in wide.findings(read_data=False)] == ["quarantine", "quarantine"]
    assert [each.code for each in wide.findings()] == ["quarantine", "quarantine", "data"]
    # What lay there can be written anew; the object keeps its cell, which is used no more.
    with wide.store.reader() as txn:
        lost = [page for _, page in schema.open_name(victim, txn.fetch(schema.NAME, victim) or b"")]
        uuid = txn.volume_by_name("vm").uuid
    wide.put(uuid, lost, seed=5)
    with wide.store.reader() as txn:
        (reference,) = {int(txn.resolve(txn.volume_by_name("vm").head, lost[0] // LEAF_PAGES)[0])}
        assert bytes(txn.page(reference)) == page_bytes(lost[0], 5)
    assert cell_of_map(wide, cell)
    spoil()
    wide.reopen()
    assert not (wide.path / FILE).exists() and not wide.store.quarantined()
    wide.store.write(lambda txn: txn._remove_object(victim))  # for the check at the end of the test


def cell_of_map(rig: Rig, cell: int) -> bool:
    """Whether a cell is in use by the maps."""
    with rig.store.reader() as txn:
        key = schema.KEY.pack(cell >> schema.MAP_SHIFT)
        bitmap = catalog.decode(schema.CELL_MAP, key, txn.fetch(schema.CELL_MAP, key) or b"", catalog.Value).data
    return bool(bitmap[(cell & (schema.MAP_CELLS - 1)) >> 3] >> (cell & 7) & 1)


@pytest.mark.parametrize("length", [None, 0, 3 * schema.CELL_BYTES + 5 * PAGE + 1])
def test_a_file_of_cells_that_has_become_short_is_learnt(wide: Rig, length: int | None) -> None:
    """Under a process that has it mapped. The store is not opened again before it is repaired."""
    keys = keys_of(wide, schema.CELL)
    assert cell_of(wide, keys[3]) == 3
    file, kept = wide.path / "data" / "cells", wide.path / "data" / "kept"
    subprocess.run(["cp", "--sparse=always", file, kept], check=True)
    if length is None:
        file.unlink()
    else:
        os.truncate(file, length)
    first = 101 if length else 96
    notes = Notes()
    tell_by_loop(notes, keys[3])
    assert len(learn(wide.path, data_file(wide), notes)) == 128 - first
    assert set(Quarantine.load(wide.path, data_file(wide))) == {in_cell(keys[3], page) for page in range(first, 128)}
    kept.replace(file)
    assert not Quarantine.load(wide.path, data_file(wide))
    wide.reopen()


def test_places_of_older_versions_are_known(wide: Rig, spoil: Callable[..., None]) -> None:
    """They did not say in which file a page is."""
    victim = keys_of(wide, schema.OBJECT)[1]
    page = max(pages_of(wide, schema.OBJECT, victim))
    spoil(page)
    (wide.path / FILE).write_text(json.dumps([["object", victim.hex(), victim.hex() + "00", page]]))
    assert set(Quarantine.load(wide.path, data_file(wide))) == {Unreadable("object", victim, victim + b"\0", page)}


def test_a_cell_that_cannot_be_told_teaches_nothing(wide: Rig, spoil: Callable[..., None]) -> None:
    """The note may be of an object that is in none, and the record may be anything."""
    inline, victim = keys_of(wide, schema.OBJECT)[0], keys_of(wide, schema.CELL)[0]
    spoil(*range(64), file="cells")
    notes = Notes()
    tell_by_loop(notes, inline)
    assert not learn(wide.path, data_file(wide), notes)
    sound = cell_of(wide, victim)
    for value in (b"", b"x" * 16):
        wide.store.write(lambda txn, value=value: txn._put(schema.CELL, victim, value))  # type: ignore[misc]
        tell_by_loop(notes, victim)
        assert not learn(wide.path, data_file(wide), notes)
    spoil()
    wide.store.write(lambda txn: txn._put(schema.CELL, victim, schema.cell_record(victim, sound)))


def test_what_can_be_read_again_is_let_go(wide: Rig, spoil: Callable[..., None]) -> None:
    victim = keys_of(wide, schema.OBJECT)[1]
    spoil(max(pages_of(wide, schema.OBJECT, victim)))
    notes = Notes()
    notes.take().look_up(schema.OBJECT, victim)
    learn(wide.path, data_file(wide), notes)
    assert len(Quarantine.load(wide.path, data_file(wide))) == 1
    spoil()
    assert not Quarantine.load(wide.path, data_file(wide))
    assert not (wide.path / FILE).exists()


@pytest.mark.parametrize("name", [FREE, MAIN])
def test_without_the_pages_that_all_needs_nothing_is_opened(wide: Rig, spoil: Callable[..., None], name: str) -> None:
    with RawTree(data_file(wide)) as tree:
        root, _ = tree._root(name)
    spoil(root)
    notes = Notes()
    notes.writer.go_through(0)
    assert learn(wide.path, data_file(wide), notes)
    with pytest.raises(StoreBroken, match=f"page {root} of the data file"):
        wide.reopen()
    spoil()
    wide.reopen()


def test_a_death_of_something_else_teaches_nothing(wide: Rig) -> None:
    notes = Notes()
    for table in schema.TABLES:
        notes.take().look_up(table, b"\0" * 8)
    notes.writer.go_through(schema.LEAF.number)
    assert not learn(wide.path, data_file(wide), notes)
    assert not list(notes.left()) and not (wide.path / FILE).exists()


@pytest.mark.parametrize(
    "text", ["", "[", "{}", '[["leaf"]]', '[["leaf", "xx", null, 3]]', '[["leaf", "", null, 3, 0, 0]]', "null"]
)
def test_a_spoilt_file_is_an_empty_one(wide: Rig, text: str) -> None:
    (wide.path / FILE).write_text(text)
    assert not Quarantine.load(wide.path, data_file(wide))


def test_notes_are_found_by_a_successor() -> None:
    area = memoryview(bytearray(NOTES_MAX * SLOT))
    notes = Notes(area)
    first, second = notes.take(), notes.take()
    first.look_up(schema.LEAF, b"k" * 16)
    second.look_up(schema.VOLUME_NAME, b"n" * 100)
    notes.writer.go_through(schema.LIVE.number)
    notes.mark_loop()[1] = 77
    assert set(Notes(area).left()) == {
        Left(schema.LEAF.number, b"k" * 16, False, False),
        Left(schema.VOLUME_NAME.number, b"n" * 56, False, False),
        Left(schema.LIVE.number, b"", True, True),
        Left(schema.OBJECT.number, schema.KEY.pack(77), False, False),
    }
    notes.give_back(first)
    notes.give_back(first)
    taken = [notes.take() for _ in range(NOTES_MAX * 2)]
    assert len({id(note) for note in taken}) == NOTES_MAX - 3, "those who come too late share one"
