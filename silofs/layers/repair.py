"""`silofs check --repair`: a sound store out of what can be read of a damaged one, and a list of what is given up.

The repaired store is built beside the damaged one and takes its place in one step, so there is nothing to undo. Records
that are sound are taken over; what follows from others (presence, sums, live slots, counts, names) is made anew; and
what can be proved to have been there and cannot be read becomes LOST: an error, never zeros and never older data. A
volume or snapshot without a whole chain of layer records cannot be kept. docs/cli.md has the verb, docs/format.md what
a crash leaves at each step.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec
import numpy as np

from silofs import failpoints
from silofs.blocks import LEAF_PAGES, LEAF_SHIFT, PAGE, pages_for
from silofs.errors import Damaged, StoreError
from silofs.extents import Extents
from silofs.layers import catalog, containers, leaves, presence, schema
from silofs.layers.catalog import Layer, Ownership, Pin, Record, Role, Snapshot, State, Value, Volume
from silofs.layers.changes import pages_of
from silofs.layers.environment import DATA_FILE
from silofs.layers.filesystem import sync_directory
from silofs.layers.format import Format
from silofs.layers.reader import ReadTxn
from silofs.layers.salvage import Salvage
from silofs.layers.schema import CHUNK_BYTES, CHUNK_LEAVES, CHUNK_SHIFT, SUM_LEAVES, SUM_SHIFT, Refs, Table
from silofs.layers.store import DATA_DIRECTORY, Store
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
class Loss:
    """Something that is given up. `ranges`: bytes [first, end) that read as errors."""

    what: str  # volume, snapshot or other
    name: str
    message: str
    ranges: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Repaired:
    """A repaired store, not yet in place."""

    losses: list[Loss]
    rebuilt: list[str]  # tables of which records were damaged, with how many
    volumes: int
    snapshots: int


class Repair:
    """Builds. The store is locked by the caller, and nobody has it open."""

    def __init__(self, path: Path, uuid: bytes) -> None:
        self._path = path
        self._uuid = uuid
        self._new = path / REPAIR_DIRECTORY
        self._losses: list[Loss] = []
        self._layers: dict[int, Layer] = {}
        self._volumes: dict[bytes, Volume] = {}
        self._snapshots: dict[bytes, Snapshot] = {}
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
                self._name_losses()
        finally:
            self._old.close()
        failpoints.hit("repair.built")
        rebuilt = [f"{count} records of table {name}" for name, count in sorted(self._old.damaged.items())]
        return Repaired(self._losses, rebuilt, len(self._volumes), len(self._snapshots))

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

    # Catalog

    def _choose(self) -> None:
        """Which volumes, snapshots and layers are kept."""
        old = self._old
        layers = {layer.id: layer for layer in old.decoded(schema.LAYER, Layer).values() if not layer.doomed}
        volumes = old.decoded(schema.VOLUME, Volume)
        names = {value.data: key.decode() for key, value in old.decoded(schema.VOLUME_NAME, Value).items()}
        snapshots = old.decoded(schema.SNAPSHOT, Snapshot)
        self._pins = {key: pin for key, pin in old.decoded(schema.PIN, Pin).items() if _chain(layers, pin.layer)}
        self._ownerships = old.decoded(schema.OWNERSHIP, Ownership)
        heads: Counter[int] = Counter(volume.head for volume in volumes.values())
        gone = {uuid: name for uuid, name in names.items() if uuid not in volumes}
        heads_left = [
            each for each in layers.values() if not each.sealed and not heads[each.id] and _chain(layers, each.id)
        ]
        for head in heads_left:
            volume = self._recovered(head, gone if len(gone) == len(heads_left) == 1 else {})
            volumes[volume.uuid] = volume
            heads[head.id] += 1
            gone.pop(volume.uuid, None)
        for name in gone.values():
            self._losses.append(Loss("volume", name, f"volume '{name}' cannot be kept: its record is lost"))
        rows = max((state.rows.get(schema.VOLUME.name, 0) for state in self._states()), default=0)
        nameless = rows - len(volumes.keys() | names.keys())
        if nameless > 0:
            self._losses.append(
                Loss("volume", "", f"{nameless} volumes cannot be kept: nothing is left of their records")
            )
        for uuid, volume in volumes.items():
            chain = _chain(layers, volume.head)
            if not chain or layers[volume.head].sealed or heads[volume.head] != 1:
                message = f"volume '{volume.name}' cannot be kept: a record of its layers is lost"
                self._losses.append(Loss("volume", volume.name, message))
            else:
                self._volumes[uuid] = volume
        for key, snapshot in snapshots.items():
            name = names.get(snapshot.volume, snapshot.volume.hex())
            if snapshot.volume in self._volumes and _chain(layers, snapshot.layer):
                self._snapshots[key] = snapshot
            else:
                message = (
                    f"snapshot '{name}@{snapshot.name}' cannot be kept: its volume or a record of its layers is lost"
                )
                self._losses.append(Loss("snapshot", f"{name}@{snapshot.name}", message))
        self._nameless(layers)
        tops = [volume.head for volume in self._volumes.values()]
        tops += [snapshot.layer for snapshot in self._snapshots.values()]
        tops += [pin.layer for pin in self._pins.values()]
        for top in tops:
            for layer in _chain(layers, top):
                self._layers[layer.id] = layer

    def _recovered(self, head: Layer, known: dict[bytes, str]) -> Volume:
        """A volume for a head that no record leads to: the one that is known by name, or one under a name of ours."""
        uuid, name = next(iter(known.items()), (uuid4().bytes, f"recovered-{head.id}"))
        now = time.time_ns()
        lsn = max((state.lsn for state in self._states()), default=0)
        inode = (1 << 40) + head.id  # beyond what is given out
        if uuid not in known:
            self._ownerships[uuid] = Ownership(uuid, Role.OWNER, 1, changed_ns=now)  # a copy: nobody else has it
        message = f"the record of a volume is lost: what it held is '{name}' now; its times, owner and mode are new"
        self._losses.append(Loss("name", name, message))
        return Volume(uuid, name, head.id, head.size, inode, now, now, os.geteuid(), os.getegid(), 0o600, lsn)

    def _nameless(self, layers: dict[int, Layer]) -> None:
        """Layers that count more snapshots than there are get one with a name of ours."""
        named = Counter(snapshot.layer for snapshot in self._snapshots.values())
        inodes = [volume.inode for volume in self._volumes.values()]
        inode = max([1, *inodes, *(snapshot.inode for snapshot in self._snapshots.values())])
        for volume in self._volumes.values():
            for layer in _chain(layers, volume.head):
                if layer.sealed and layer.snapshots > named[layer.id]:
                    named[layer.id] = layer.snapshots
                    inode += 1
                    name = f"recovered-{layer.id}"
                    snapshot = Snapshot(volume.uuid, name, layer.id, layer.size, time.time_ns(), inode, 0)
                    self._snapshots[catalog.snapshot_key(volume.uuid, name)] = snapshot
                    shown = f"{volume.name}@{name}"
                    message = f"a snapshot in the chain of '{volume.name}' has lost its name, and is '{shown}' now"
                    self._losses.append(Loss("name", shown, message))

    def _catalog(self) -> None:
        """Records that are taken over, and those that follow from them."""
        children = Counter(layer.parent for layer in self._layers.values() if layer.parent)
        named = Counter(snapshot.layer for snapshot in self._snapshots.values())
        pinned = Counter(pin.layer for pin in self._pins.values())
        heads = {volume.head for volume in self._volumes.values()}
        merges = {
            key: merge
            for key, merge in self._old.decoded(schema.MERGE, catalog.Merge).items()
            if merge.lower in self._layers and merge.upper in self._layers
        }
        merging = {merge.lower for merge in merges.values()}
        values = {table: self._old.decoded(table, Value) for table in schema.VALUE_TABLES.values()}
        states = [State(), *self._states()]
        if len(states) == 1 and any((self._path / "journal").glob("*")):
            message = "the state record is lost: what was written last, and is in the journal only, is given up"
            self._losses.append(Loss("other", "journal", message))

        def write(txn: WriteTxn) -> None:
            for layer in self._layers.values():
                uuid = layer.uuid
                if layer.id not in heads and not uuid and layer.id not in merging:
                    uuid = uuid4().bytes
                txn.put_layer(_bare(layer, uuid, children[layer.id], named[layer.id], pinned[layer.id]))
                if uuid:
                    txn.put_record(schema.LAYER_UUID, uuid, Value(schema.KEY.pack(layer.id)))
            for uuid, volume in self._volumes.items():
                volume = msgspec.structs.replace(volume, size=self._layers[volume.head].size)
                self._volumes[uuid] = volume
                txn.put_record(schema.VOLUME, uuid, volume)
                if not volume.orphan:
                    txn.put_record(schema.VOLUME_NAME, volume.name.encode(), Value(uuid))
                if uuid not in self._ownerships:
                    # Nobody knows whose it is: two writers would be worse than none.
                    self._ownerships[uuid] = Ownership(uuid, Role.FENCED, 1, name=volume.name)
                    message = (
                        f"volume '{volume.name}' is fenced: who owns it is lost; silofs clone makes a writable copy"
                    )
                    self._losses.append(Loss("other", volume.name, message))
            kept: list[tuple[Table, Mapping[bytes, Record]]] = [
                (schema.SNAPSHOT, self._snapshots), (schema.OWNERSHIP, self._ownerships), (schema.PIN, self._pins),
                (schema.MERGE, merges), *values.items(),
            ]  # fmt: skip
            for table, records in kept:
                for key, record in records.items():
                    txn.put_record(table, key, record)
            self._count(txn, states)

        self._store.write(write)

    def _states(self) -> Iterator[State]:
        """The state record, if it is sound."""
        for key, value in self._old.records(schema.META):
            if key == schema.META_STATE:
                yield catalog.decode(schema.META, key, value, State)

    def _count(self, txn: WriteTxn, states: list[State]) -> None:
        """The store's counters: beyond everything that was given out."""
        ids = [schema.KEY.unpack(key)[0] for table in _PAGED for key in txn.scan_keys(table)]
        inodes = [volume.inode for volume in self._volumes.values()]
        inodes += [snapshot.inode for snapshot in self._snapshots.values()]
        txn.count(
            next_object=max([*(state.next_object for state in states), *(each + 1 for each in ids)]),
            next_layer=max([*(state.next_layer for state in states), *(each + 1 for each in self._layers)]),
            next_inode=max([*(state.next_inode for state in states), *(each + 1 for each in inodes)]),
            lsn=max([*(state.lsn for state in states), *(volume.applied_lsn for volume in self._volumes.values())]),
            journal=states[-1].journal,
            mark=states[-1].mark,
        )

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


def put_in_place(path: Path) -> Path:
    """Let the repaired store take the damaged one's place, in one step; where the damaged one is now."""
    data, new, kept = path / DATA_DIRECTORY, path / REPAIR_DIRECTORY / DATA_DIRECTORY, path / KEPT_DIRECTORY
    (new / "lock.mdb").unlink(missing_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    sync_directory(new)
    if _libc.renameat2(_AT_FDCWD, os.fsencode(data), _AT_FDCWD, os.fsencode(new), _EXCHANGE):
        raise StoreError(f"the repaired store cannot take its place: {os.strerror(ctypes.get_errno())}")
    sync_directory(path)
    failpoints.hit("repair.exchanged")
    new.rename(kept)
    (path / "quarantine.json").unlink(missing_ok=True)
    shutil.rmtree(path / REPAIR_DIRECTORY)
    sync_directory(path)
    return kept


_PAGED: Final = (schema.OBJECT, schema.PAGES, schema.NAME, schema.CONTAINER)


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


def _chain(layers: dict[int, Layer], top: int) -> list[Layer]:
    """The layers from one down to its base; none when one of them is not there."""
    chain: list[Layer] = []
    while top:
        layer = layers.get(top)
        if layer is None or (chain and (layer.depth >= chain[-1].depth or not layer.sealed)):
            return []
        chain.append(layer)
        top = layer.parent
    return chain


def _bare(layer: Layer, uuid: bytes, children: int, snapshots: int, pins: int) -> Layer:
    """A layer before its leaves are put."""
    return msgspec.structs.replace(
        layer, uuid=uuid, children=children, snapshots=snapshots, pins=pins,
        leaves=0, chunks=b"", own_pages=0, remote_pages=0, lost_pages=0, voids=b"", unsettled=0, packed=0,
    )  # fmt: skip


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
