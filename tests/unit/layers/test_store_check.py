"""`check` finds what is wrong, says where, and goes on. Each case spoils one thing that a commit keeps together."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from silofs.blocks import LEAF_PAGES
from silofs.layers import catalog, leaves, schema
from silofs.layers.catalog import Layer, Pin, Snapshot, Value, Volume
from silofs.layers.check import Finding, check
from silofs.layers.environment import Environment
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import GIB
from tests.storerig import Rig

Spoil = Callable[[WriteTxn], None]


def first_key(table: schema.Table) -> Callable[[WriteTxn], bytes]:
    return lambda txn: next(txn.scan_keys(table))


def removed(table: schema.Table) -> Spoil:
    return lambda txn: txn._delete(table, first_key(table)(txn)) and None


def torn(table: schema.Table) -> Spoil:
    def spoil(txn: WriteTxn) -> None:
        key = first_key(table)(txn)
        value = bytearray(txn.fetch(table, key) or b"")
        value[len(value) // 2] ^= 4
        txn._put(table, key, bytes(value))

    return spoil


def added(table: schema.Table, key: bytes, value: bytes) -> Spoil:
    return lambda txn: txn._put(table, key, value)


def changed(table: schema.Table, kind: type[catalog.R], **changes: object) -> Spoil:
    """A catalog record that is sound and wrong."""

    def spoil(txn: WriteTxn) -> None:
        key = first_key(table)(txn)
        record = catalog.decode(table, key, txn.fetch(table, key) or b"", kind)
        txn.put_record(table, key, msgspec.structs.replace(record, **changes))

    return spoil


def leaf_changed(at: int, reference: int) -> Spoil:
    """An entry of the head's first leaf that its counts and names do not know of."""

    def spoil(txn: WriteTxn) -> None:
        head = txn.volume_by_name("vm").head
        refs = txn.own_leaf(head, 0)
        assert refs is not None
        refs = refs.copy()
        refs[at] = reference
        txn.put_leaves(head, [0], refs.reshape(1, LEAF_PAGES), [True])

    return spoil


def live_changed(txn: WriteTxn) -> None:
    key = first_key(schema.LIVE)(txn)
    row = np.frombuffer(bytes(schema.open_record(schema.LIVE, key, txn.fetch(schema.LIVE, key) or b"")), "<u4").copy()
    row[1] ^= 1
    txn._put(schema.LIVE, key, schema.seal_record(schema.LIVE, key, row.tobytes()))


def older_leaf(txn: WriteTxn) -> None:
    key = first_key(schema.LEAF)(txn)
    refs = leaves.HOLES.copy()
    refs[1] = schema.ZERO
    txn._put(schema.LEAF, key, schema.seal_record(schema.LEAF, key, leaves.encode(refs)))


FAR = schema.leaf_key(1, 77)
CASES: dict[str, tuple[Spoil, str]] = {
    "object removed": (removed(schema.OBJECT), "object"),
    "object torn": (torn(schema.OBJECT), "data"),
    "object unused": (added(schema.OBJECT, schema.KEY.pack(9_999), bytes(schema.OBJECT_BYTES)), "object"),
    "lone page removed": (removed(schema.PAGES), "object"),
    "lone page torn": (torn(schema.PAGES), "data"),
    "name removed": (removed(schema.NAME), "name"),
    "name torn": (torn(schema.NAME), "name"),
    "live removed": (removed(schema.LIVE), "live"),
    "live torn": (torn(schema.LIVE), "live"),
    "live wrong": (live_changed, "live"),
    "leaf removed": (removed(schema.LEAF), "presence"),
    "leaf torn": (torn(schema.LEAF), "leaf"),
    "leaf of the past": (older_leaf, "leaf"),
    "leaf not present": (added(schema.LEAF, FAR, schema.seal_record(schema.LEAF, FAR, b"\1")), "presence"),
    "leaf of no layer": (added(schema.LEAF, schema.leaf_key(99, 0), b""), "leaf"),
    "leaf uses another's page": (leaf_changed(300, schema.ref(schema.DATA, 1, 4)), "name"),
    "leaf uses nothing": (leaf_changed(300, schema.ref(schema.LONE, 5_000)), "name"),
    "leaf remote elsewhere": (leaf_changed(300, schema.ref(schema.REMOTE, 77)), "remote"),
    "leaf lost uncounted": (leaf_changed(300, schema.LOST), "count"),
    "sums removed": (removed(schema.LEAF_SUM), "leaf"),
    "sums torn": (torn(schema.LEAF_SUM), "leaf_sum"),
    "bitmap removed": (removed(schema.PRESENCE), "presence"),
    "bitmap torn": (torn(schema.PRESENCE), "presence"),
    "volume removed": (removed(schema.VOLUME), "catalog"),
    "volume torn": (torn(schema.VOLUME), "record"),
    "volume counts wrong": (changed(schema.VOLUME, Volume, data_pages=3), "count"),
    "volume size wrong": (changed(schema.VOLUME, Volume, size=2 * GIB), "size"),
    "volume without head": (changed(schema.VOLUME, Volume, head=77), "head"),
    "volume with a used inode": (changed(schema.VOLUME, Volume, inode=1 << 40), "counter"),
    "name of a volume removed": (removed(schema.VOLUME_NAME), "name"),
    "layer removed": (removed(schema.LAYER), "catalog"),
    "layer torn": (torn(schema.LAYER), "record"),
    "layer children wrong": (changed(schema.LAYER, Layer, children=9), "children"),
    "layer snapshots wrong": (changed(schema.LAYER, Layer, snapshots=9), "snapshots"),
    "layer depth wrong": (changed(schema.LAYER, Layer, depth=9), "layer"),
    "layer leaves wrong": (changed(schema.LAYER, Layer, leaves=9), "count"),
    "layer without parent": (changed(schema.LAYER, Layer, parent=88, depth=2), "layer"),
    "uuid of a layer removed": (removed(schema.LAYER_UUID), "layer_uuid"),
    "snapshot removed": (removed(schema.SNAPSHOT), "count"),
    "snapshot wrong": (changed(schema.SNAPSHOT, Snapshot, size=1), "snapshot"),
    "ownership removed": (removed(schema.OWNERSHIP), "ownership"),
    "pin of nothing": (lambda txn: txn.put_record(schema.PIN, catalog.pin_key(55, "m"), Pin(55, "m")), "reference"),
    "removal of nothing": (lambda txn: txn.put_record(schema.DOOMED, schema.KEY.pack(55), Value(b"")), "reference"),
    "peer torn": (torn(schema.PEER), "record"),
    "cell removed": (removed(schema.CELL), "object"),
    "cell torn": (torn(schema.CELL), "cell"),
    "cell of an object that was never stored": (added(schema.CELL, schema.KEY.pack(9_999), b""), "counter"),
    "cell map removed": (removed(schema.CELL_MAP), "count"),
    "cell map torn": (torn(schema.CELL_MAP), "cell"),
}


def cell_changed(change: Callable[[int], int]) -> Spoil:
    """The first object in a cell is said to be in another."""

    def spoil(txn: WriteTxn) -> None:
        key = first_key(schema.CELL)(txn)
        cell = schema.open_cell(key, txn.fetch(schema.CELL, key) or b"")
        txn._put(schema.CELL, key, schema.cell_record(key, change(cell)))

    return spoil


def map_changed(cell: int, length: int = schema.MAP_BYTES) -> Spoil:
    """A bit of the first map is another, or the map has another length; its catalog record is sound."""

    def spoil(txn: WriteTxn) -> None:
        key = first_key(schema.CELL_MAP)(txn)
        value = txn.fetch(schema.CELL_MAP, key) or b""
        bitmap = bytearray(catalog.decode(schema.CELL_MAP, key, value, Value).data)
        bitmap[cell >> 3] ^= 1 << (cell & 7)
        txn.put_record(schema.CELL_MAP, key, Value(bytes(bitmap[:length])))

    return spoil


def stored_twice(txn: WriteTxn) -> None:
    key = first_key(schema.CELL)(txn)
    txn._put(schema.OBJECT, key, bytes(txn.object(schema.KEY.unpack(key)[0])))


CELLS, FIRST = 10, 15  # how many the sound store has, and the object in the first
CELL_CASES: dict[str, tuple[Spoil, list[str]]] = {
    "two in one": (
        cell_changed(lambda cell: cell + 1),
        [
            f"objects {FIRST} and {FIRST + 1} are in the same cell, 1",
            "cell 0 is in use, and no object is there: their space is lost",
        ],
    ),
    "behind the end": (
        cell_changed(lambda cell: schema.MAP_CELLS),
        [
            "data/cells is cut short: 1 objects should be there",
            "cell 0 is in use, and no object is there: their space is lost",
            f"object {FIRST} is in cell {schema.MAP_CELLS}, which is free: it will be written over",
        ],
    ),
    "no number": (
        cell_changed(lambda cell: 1 << 63),
        [
            f"object {FIRST} is in cell {1 << 63}, which cannot be",
            "cell 0 is in use, and no object is there: their space is lost",
        ],
    ),
    "free": (map_changed(3), [f"object {FIRST + 3} is in cell 3, which is free: it will be written over"]),
    "lost": (map_changed(CELLS), [f"cell {CELLS} is in use, and no object is there: their space is lost"]),
    "a map too short": (map_changed(CELLS, 100), ["map 0 of cells has a wrong length"]),
    "in both places": (stored_twice, [f"object {FIRST} is in a cell and in table object as well"]),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "store"
    rig = Rig(path)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    rig.put(vm, [*range(40), LEAF_PAGES])
    rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    rig.put(vm, range(3, 6), seed=1)
    rig.put(vm, range(600, 600 + 31 * CELLS))
    rig.store.write(lambda txn: txn.put_value("peer", "b", b"x" * 40))
    assert rig.findings() == []
    rig.close()
    return path


class Undone(Exception):
    """Takes the spoilt transaction back, for the next case."""


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_damage_is_found(case: str, sound: Path) -> None:
    spoil, code = CASES[case]
    found: list[Finding] = []

    def run(txn: WriteTxn) -> None:
        spoil(txn)
        txn.finish()
        txn._begin(txn._txn)  # forget what was read before the damage
        found.extend(check(txn, read_data=True))
        raise Undone

    logging.disable()
    try:
        with Store.open(sound) as store, pytest.raises(Undone):
            store.write(run)
    finally:
        logging.disable(logging.NOTSET)
    assert code in {finding.code for finding in found}, found


def test_places_are_named(sound: Path) -> None:
    found: list[Finding] = []

    def run(txn: WriteTxn) -> None:
        torn(schema.PAGES)(txn)
        txn.finish()
        found.extend(check(txn, read_data=True))
        raise Undone

    with Store.open(sound) as store, pytest.raises(Undone):
        store.write(run)
    assert [(each.code, each.volume, each.layer, each.page) for each in found] == [("data", "vm", 1, 31)]


@pytest.mark.parametrize("case", CELL_CASES)
def test_cells_are_compared_from_all_sides(case: str, sound: Path) -> None:
    spoil, messages = CELL_CASES[case]
    found: list[Finding] = []

    def run(txn: WriteTxn) -> None:
        spoil(txn)
        txn.finish()
        found.extend(check(txn))
        raise Undone

    with Store.open(sound) as store, pytest.raises(Undone):
        store.write(run)
    assert {each.code for each in found} == {"cell"}
    assert [each.message.removeprefix(f"{sound}/") for each in found] == messages


def findings_of(path: Path, *, read_data: bool = False) -> list[Finding]:
    """Of a store that need not be fit to be opened, as the child of a check finds them."""
    environment = Environment(path / "data")
    with closing(environment), closing(ReadTxn(environment)) as txn:
        return check(txn, read_data=read_data)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """Of the sound store, to be damaged. The file of cells has holes, which need not be copied."""
    subprocess.run(["cp", "-r", "--sparse=always", sound, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


@pytest.mark.parametrize("length", [None, 0, 3 * schema.CELL_BYTES, 4 * schema.CELL_BYTES - 1])
def test_a_file_of_cells_that_is_cut_short_is_found(copy: Path, length: int | None) -> None:
    file = copy / "data" / "cells"
    if length is None:
        file.unlink()
    else:
        os.truncate(file, length)
    what, left = ("is missing", 0) if length is None else ("is cut short", length // schema.CELL_BYTES)
    said = Finding("cell", f"{file} {what}: {CELLS - left} objects should be there")
    assert findings_of(copy) == [said]
    first, *rest = findings_of(copy, read_data=True)
    assert first == said and len(rest) == CELLS - left
    assert {each.code for each in rest} == {"data"}, "what was in it is read, and not found"


def test_the_bytes_of_cells_are_read(copy: Path) -> None:
    def flip(fd: int, at: int) -> None:
        (byte,) = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte ^ 1]), at)

    with (copy / "data" / "cells").open("r+b") as file:
        flip(file.fileno(), 2 * schema.CELL_BYTES + 4096 * 5 + 77)
        flip(file.fileno(), 7 * schema.CELL_BYTES + schema.CELL_PAD + 60)
    assert findings_of(copy) == []
    page, header = findings_of(copy, read_data=True)[:2]
    assert (page.code, page.volume, page.page) == ("data", "vm", 600 + 2 * 31 + 4)
    assert header == Finding("data", f"object {FIRST + 7} has no sound header")
