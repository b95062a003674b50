"""`silofs check --repair`: a sound store out of what can be read of a damaged one, and a list of what is given up.

The repaired store is built beside the damaged one and takes its place in one step, so there is nothing to undo. Records
that are sound are taken over; what follows from others (presence, sums, live slots, counts, names) is made anew; and
what can be proved to have been there and cannot be read becomes LOST: an error, never zeros and never older data.
docs/cli.md has the verb, docs/format.md what a crash leaves at each step.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from silofs import failpoints
from silofs.blocks import LEAF_PAGES, LEAF_SHIFT, PAGE, pages_for
from silofs.errors import Damaged, StoreError
from silofs.extents import Extents
from silofs.layers import catalog, containers, leaves, presence, schema
from silofs.layers.catalog import Layer
from silofs.layers.changes import pages_of
from silofs.layers.directory import DATA_DIRECTORY
from silofs.layers.environment import DATA_FILE
from silofs.layers.filesystem import sync_directory
from silofs.layers.format import Format
from silofs.layers.journal import DIRECTORY as JOURNAL_DIRECTORY
from silofs.layers.reader import ReadTxn
from silofs.layers.repair_catalog import CatalogRepair, Loss
from silofs.layers.replay import salvage_journal
from silofs.layers.salvage import Salvage
from silofs.layers.schema import CHUNK_BYTES, CHUNK_LEAVES, CHUNK_SHIFT, SUM_LEAVES, SUM_SHIFT, Refs, Table
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.layers.use_records import Use
from silofs.limits import MIB

REPAIR_DIRECTORY: Final = "repair"
KEPT_DIRECTORY: Final = "data.damaged"
BATCH_BYTES: Final = 16 * MIB
BATCH_LEAVES: Final = 256
SUMS_PER_CHUNK: Final = CHUNK_LEAVES // SUM_LEAVES

_AT_FDCWD: Final = -100
_EXCHANGE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Repaired:
    """A repaired store, not yet in place."""

    losses: list[Loss]
    rebuilt: list[str]  # tables of which records were damaged, with how many
    volumes: int
    snapshots: int
    journal: Path | None  # that the damaged store names, and the repaired one does not need any more


class Repair(CatalogRepair):
    """Builds. The store is locked by the caller, and nobody has it open."""

    def __init__(self, path: Path, uuid: bytes) -> None:
        super().__init__(path)
        self._uuid = uuid
        self._new = path / REPAIR_DIRECTORY
        self._live: dict[int, np.ndarray[tuple[int], np.dtype[np.uint32]]] = {}
        self._lone: set[int] = set()
        self._lost: dict[int, set[int]] = {}  # layer -> leaves in which something was given up
        self._by_layer: dict[Table, dict[int, dict[int, bytes]]] = {}

    def build(self) -> Repaired:
        """Everything but putting it in place."""
        shutil.rmtree(self._new, ignore_errors=True)
        Store.create(self._new)
        self._old = Salvage(self._path / DATA_DIRECTORY / DATA_FILE)
        try:
            with Store.open(self._new) as store:
                self._store = store
                self._copy_pages()
                self._choose()
                self._catalog()
                for layer in sorted(self._layers.values(), key=lambda layer: layer.depth):
                    self._map(layer)
                self._finish()
            with Store.open(self._new, replay=False) as store:
                self._store = store
                journal, given_up = salvage_journal(store, self._path / JOURNAL_DIRECTORY)
                self._losses += [Loss("journal", each.volume, str(each)) for each in given_up]
                self._name_losses()
        finally:
            self._old.close()
        failpoints.hit("repair.built")
        rebuilt = [f"{count} records of table {name}" for name, count in sorted(self._old.damaged.items())]
        return Repaired(self._losses, rebuilt, len(self._volumes), len(self._snapshots), journal)

    # Pages

    def _copy_pages(self) -> None:
        """Objects, lone pages, names and containers as they are; what nothing refers to goes at the end."""
        for table in (schema.OBJECT, schema.PAGES, schema.NAME, schema.CONTAINER):
            for batch in _batches(self._old.records(table)):
                self._store.write(lambda txn, table=table, batch=batch: _put_all(txn, table, batch))  # type: ignore[misc]
        with closing(self._store.reader()) as txn:
            ids = [schema.KEY.unpack(key)[0] for key in txn.scan_keys(schema.CONTAINER)]
            pages = {each: sum(e.pages.bit_count() for e in _entries(txn.container(each), each)) for each in ids}
        empty = np.zeros(containers.SLOTS, np.int64)

        def begin(txn: WriteTxn) -> None:
            for each, count in pages.items():
                key = schema.KEY.pack(each)
                txn._put(schema.USE, key, schema.seal_record(schema.USE, key, Use(0, count, empty).payload()))

        self._store.write(begin)

    # Maps

    def _map(self, layer: Layer) -> None:
        """The leaves of a layer: sound ones, lost ones, void ones."""
        void, unknown = self._voids(layer)
        found = self._leaves(layer)
        lost = (self._missing(layer, set(found)) | unknown) - void
        end = pages_for(layer.size)
        numbers = sorted((set(found) | lost) - void)
        for at in range(0, len(numbers), BATCH_LEAVES):
            some = numbers[at : at + BATCH_LEAVES]
            with closing(self._store.reader()) as txn:
                rows = [
                    leaves.LOST_LEAF if leaf in lost else self._sound(txn, layer, leaf, found[leaf]) for leaf in some
                ]
            matrix = np.stack(rows)
            for row, leaf in enumerate(some):
                matrix[row, max(0, min(LEAF_PAGES, end - (leaf << LEAF_SHIFT))) :] = schema.HOLE
            self._store.write(lambda txn, some=some, matrix=matrix: _put_rows(txn, layer.id, some, matrix))  # type: ignore[misc]
        if layer.parent and void:

            def zero(txn: WriteTxn) -> None:
                for leaf in sorted(void):
                    txn.void_holes(layer.id, leaf, leaf + 1)

            self._store.write(zero)
        if lost:
            self._lost.setdefault(layer.id, set()).update(lost)

    def _voids(self, layer: Layer) -> tuple[set[int], set[int]]:
        """(void leaves, leaves of which that is not known, and that may show what was discarded)."""
        void: set[int] = set()
        unknown: set[int] = set()
        sound = self._of_layer(schema.VOID, layer.id)
        for chunk in presence.chunk_numbers(layer.voids):
            value, first = sound.get(chunk), chunk << CHUNK_SHIFT
            if value is not None and schema.short_sum(value) == presence.chunk_sum(layer.voids, chunk):
                void.update(first + at for at in presence.bits(value[8 : 8 + CHUNK_BYTES]))
            else:
                unknown.update(range(first, min(first + CHUNK_LEAVES, -(-pages_for(layer.size) // LEAF_PAGES))))
        return void, unknown

    def _leaves(self, layer: Layer) -> dict[int, Refs]:
        """The sound leaf records that are not older than what leads to them."""
        sums = self._of_layer(schema.LEAF_SUM, layer.id)
        found = {}
        for leaf, value in self._of_layer(schema.LEAF, layer.id).items():
            row = sums.get(leaf >> SUM_SHIFT)
            if row is not None:
                (expected,) = np.frombuffer(row, "<u4", 1, 8 + 4 * (leaf & (SUM_LEAVES - 1))).tolist()
                if expected != schema.short_sum(value):
                    continue
            try:
                found[leaf] = leaves.decode(memoryview(value)[8:])
            except Damaged:
                continue
        return found

    def _missing(self, layer: Layer, found: set[int]) -> set[int]:
        """Leaves that were there, and are not among those found."""
        bitmaps = self._of_layer(schema.PRESENCE, layer.id)
        sums = self._of_layer(schema.LEAF_SUM, layer.id)
        there: set[int] = set()
        doubtful: list[int] = []
        for chunk in presence.chunk_numbers(layer.chunks):
            value = bitmaps.get(chunk)
            if value is not None and schema.short_sum(value) == presence.chunk_sum(layer.chunks, chunk):
                there.update((chunk << CHUNK_SHIFT) + at for at in presence.bits(value[8:]))
                continue
            for group in range(chunk * SUMS_PER_CHUNK, (chunk + 1) * SUMS_PER_CHUNK):
                if group in sums:
                    row = np.frombuffer(sums[group], "<u4", SUM_LEAVES, 8)
                    there.update((group << SUM_SHIFT) + at for at in np.flatnonzero(row).tolist())
                else:
                    doubtful.append(group)
        # The layer's own count proves that nothing more is missing, or that it may be anywhere in what is not known.
        if doubtful and len(there | found) != layer.leaves:
            end = -(-pages_for(layer.size) // LEAF_PAGES)
            for group in doubtful:
                there.update(range(group << SUM_SHIFT, min((group + 1) << SUM_SHIFT, end)))
        return there - found

    def _of_layer(self, table: Table, layer_id: int) -> dict[int, bytes]:
        """The sound records of a table that belong to a layer, by their number in it."""
        if table not in self._by_layer:
            found: dict[int, dict[int, bytes]] = {}
            for key, value in self._old.records(table):
                owner, number = schema.PAIR.unpack(key)
                found.setdefault(owner, {})[number] = value
            self._by_layer[table] = found
        return self._by_layer[table].get(layer_id, {})

    def _sound(self, txn: ReadTxn, layer: Layer, leaf: int, refs: Refs) -> Refs:
        """The entries; those that lead to no sound page of theirs are LOST."""
        kept = refs.copy()
        for at in np.flatnonzero((schema.kinds(refs) != schema.ZERO) & (refs != schema.HOLE)).tolist():
            reference = int(refs[at])
            kind = schema.kind_of(reference)
            sound = kind == schema.LOST or (kind == schema.REMOTE and schema.object_of(reference) == layer.id)
            if kind in schema.STORED:
                try:
                    txn.page(reference)
                    sound = kind == schema.PACKED or self._claim(txn, reference, (layer.id, (leaf << LEAF_SHIFT) + at))
                except Damaged:
                    sound = False
            if not sound:
                kept[at] = schema.LOST
                self._lost.setdefault(layer.id, set()).add(leaf)
        return kept

    def _claim(self, txn: ReadTxn, reference: int, place: tuple[int, int]) -> bool:
        """Whether a page is that entry's, and no other one's yet."""
        object_id, slot = schema.object_of(reference), schema.slot_of(reference)
        key = schema.KEY.pack(object_id)
        names = schema.open_name(key, txn.fetch(schema.NAME, key) or b"")
        if slot >= len(names) or names[slot] != place:
            return False
        if schema.kind_of(reference) == schema.LONE:
            taken = object_id in self._lone
            self._lone.add(object_id)
            return not taken
        row = self._live.setdefault(object_id >> schema.LIVE_SHIFT, np.zeros(schema.LIVE_OBJECTS, np.uint32))
        at, bit = object_id & (schema.LIVE_OBJECTS - 1), 1 << slot
        taken = bool(int(row[at]) & bit)
        row[at] |= np.uint32(bit)
        return not taken

    # The end

    def _finish(self) -> None:
        """Live slots, the end of what nothing refers to, the index of blocks, and the counts of data pages."""
        live = {
            (group << schema.LIVE_SHIFT) + at
            for group, row in self._live.items()
            for at in np.flatnonzero(row).tolist()
        }
        keep: dict[Table, set[int]] = {schema.OBJECT: live, schema.PAGES: self._lone, schema.NAME: live | self._lone}
        blocks = dict(self._old.records(schema.BLOCK))

        def write(txn: WriteTxn) -> None:
            for table, ids in keep.items():
                for key in [key for key in txn.scan_keys(table) if schema.KEY.unpack(key)[0] not in ids]:
                    txn._delete(table, key)
            for group, row in self._live.items():
                key = schema.KEY.pack(group)
                txn._put(schema.LIVE, key, schema.seal_record(schema.LIVE, key, row.astype("<u4").tobytes()))
            for key in list(txn.scan_keys(schema.CONTAINER)):
                if not txn.use(schema.KEY.unpack(key)[0]).leaves:
                    txn._delete(schema.CONTAINER, key)
                    txn._delete(schema.USE, key)
            for key, value in blocks.items():
                if _is_there(txn, key, value):
                    txn._put(schema.BLOCK, key, value)

        self._store.write(write)
        self._store.write(self._count_data)

        def name(txn: WriteTxn) -> None:
            """The uuid that the store had, so that its log, its journal and its peers know it."""
            key = schema.META_FORMAT
            record = Format(schema.FORMAT_VERSION, schema.ENGINE, self._uuid)
            txn._put(schema.META, key, catalog.encode(schema.META, key, record))

        self._store.write(name)

    def _count_data(self, txn: WriteTxn) -> None:
        counted: dict[int, int] = {}

        def count(layer_id: int) -> int:
            if layer_id not in counted:
                numbers = list(txn.chain_leaves(layer_id))
                counted[layer_id] = sum(schema.count_data(txn.resolve(layer_id, leaf)) for leaf in numbers)
            return counted[layer_id]

        for uuid, volume in self._volumes.items():
            txn.put_record(schema.VOLUME, uuid, msgspec.structs.replace(volume, data_pages=count(volume.head)))
        for key, snapshot in self._snapshots.items():
            txn.put_record(schema.SNAPSHOT, key, msgspec.structs.replace(snapshot, data_pages=count(snapshot.layer)))
        for layer in self._layers.values():
            if layer.sealed and layer.data_pages != catalog.UNCOUNTED:
                txn.change_layer(layer.id, data_pages=count(layer.id))

    def _name_losses(self) -> None:
        """Which bytes of which volumes and snapshots are errors now."""
        with closing(self._store.reader()) as txn:
            shown = [("volume", each.name, each.head, each.size) for each in self._volumes.values()]
            for snapshot in self._snapshots.values():
                name = f"{self._volumes[snapshot.volume].name}@{snapshot.name}"
                shown.append(("snapshot", name, snapshot.layer, snapshot.size))
            for what, name, top, size in shown:
                numbers = sorted({leaf for layer in txn.chain(top) for leaf in self._lost.get(layer.id, ())})
                gone = Extents()
                for leaf in numbers:
                    for at in np.flatnonzero(txn.resolve(top, leaf) == schema.LOST).tolist():
                        gone.add(((leaf << LEAF_SHIFT) + at) * PAGE, min(size, ((leaf << LEAF_SHIFT) + at + 1) * PAGE))
                if gone:
                    total = sum(end - first for first, end in gone)
                    self._losses.append(Loss(what, name, f"{total} bytes of {what} '{name}' are lost", list(gone)))


def drop(path: Path) -> None:
    """Forget a repaired store that is not wanted, or whose making failed."""
    shutil.rmtree(path / REPAIR_DIRECTORY, ignore_errors=True)


def put_in_place(path: Path, journal: Path | None = None) -> Path:
    """Let the repaired store take the damaged one's place, in one step; where the damaged one is now, with its journal.

    Nothing of a damaged store is removed here, whatever ends this and whenever: not that of an earlier repair either.
    """
    data, new, kept = path / DATA_DIRECTORY, path / REPAIR_DIRECTORY / DATA_DIRECTORY, _unused(path)
    (new / "lock.mdb").unlink(missing_ok=True)
    sync_directory(new)
    new.rename(kept)  # from here on `repair` may be removed: it never holds the damaged store
    failpoints.hit("repair.moved")
    if _libc.renameat2(_AT_FDCWD, os.fsencode(data), _AT_FDCWD, os.fsencode(kept), _EXCHANGE):
        error = ctypes.get_errno()
        kept.rename(new)
        raise StoreError(f"the repaired store cannot take its place: {os.strerror(error)}")
    sync_directory(path)
    failpoints.hit("repair.exchanged")
    if journal is not None:
        journal.rename(kept / journal.name)
        sync_directory(kept)
    (path / "quarantine.json").unlink(missing_ok=True)
    shutil.rmtree(path / REPAIR_DIRECTORY)
    sync_directory(path)
    return kept


def _unused(path: Path) -> Path:
    """`data.damaged`, or `data.damaged.2` and so on where that is there already."""
    names = (f"{KEPT_DIRECTORY}.{number}" if number > 1 else KEPT_DIRECTORY for number in itertools.count(1))
    return next(path / name for name in names if not (path / name).exists())


def _batches(records: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """In pieces of some MiB."""
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in records:
        batch.append((key, value))
        size += len(value) + 64
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _put_all(txn: WriteTxn, table: Table, records: Iterable[tuple[bytes, bytes]]) -> None:
    for key, value in records:
        txn._put(table, key, value)


def _put_rows(txn: WriteTxn, layer_id: int, numbers: list[int], matrix: Refs) -> None:
    """New leaves of a layer."""
    pages = np.concatenate([pages_of(leaf) for leaf in numbers])
    flat = matrix.reshape(-1)
    txn.account(layer_id, pages, np.zeros_like(flat), flat)
    txn.put_leaves(layer_id, numbers, matrix, [False] * len(numbers))


def _entries(value: memoryview, container_id: int) -> list[containers.Entry]:
    try:
        return containers.entries(container_id, value)
    except Damaged:
        return []


def _is_there(txn: WriteTxn, key: bytes, value: bytes) -> bool:
    """Whether everything that the index says of a block is so."""
    try:
        places = containers.read_places(key, value)
        return all(containers.entry(each, number, txn.container(each)).hash == key for each, number in places)
    except Damaged:
        return False
