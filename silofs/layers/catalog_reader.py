"""The catalog as one transaction sees it: volumes, snapshots, layers, ownership.

LMDB can lose a key silently when a page of it is damaged. So a record that something names and that is not there is
damage; and where nothing names it, "there is none" is said only after the table's records were counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb
import numpy as np
import numpy.typing as npt

from silofs.blocks import pages_for
from silofs.errors import Damaged, NoSuchSnapshot, NoSuchVolume, StoreBroken
from silofs.layers import catalog, schema
from silofs.layers.catalog import Layer, Merge, Ownership, R, Snapshot, State, Volume
from silofs.layers.environment import Environment
from silofs.layers.quarantine import Quarantine, describe
from silofs.layers.schema import Table

NO_FLOOR: Final = 1 << 62


class CatalogReader:
    """Look-ups over one LMDB transaction, with what was read of layers kept as long as it."""

    def __init__(self, environment: Environment, txn: lmdb.Transaction[memoryview] | None = None) -> None:
        self._environment = environment
        self._reads_only = txn is None
        self._notes = environment.notes
        self._note = self._notes.take() if self._reads_only else self._notes.writer
        self._begin(txn or environment.begin())

    def _begin(self, txn: lmdb.Transaction[memoryview]) -> None:
        self._txn = txn
        self.txn_id = txn.id()
        self.spoilt: Damaged | None = None  # LMDB met a damaged page, and refuses whatever else this transaction asks
        self._layers: dict[int, Layer] = {}
        self._chains: dict[int, list[Layer]] = {}
        self._floor_maps: dict[int, dict[int, int]] = {}
        self._bitmaps: dict[tuple[int, int], bytes | bytearray] = {}
        self._sums: dict[tuple[int, int], npt.NDArray[np.uint32] | None] = {}
        self._counted: set[str] = set()

    def renew(self) -> None:
        """See the store as it is now. Every view given out before is void."""
        self._txn.abort()
        self._begin(self._environment.begin())

    def close(self) -> None:
        """End the transaction; idempotent."""
        self._txn.abort()
        if self._reads_only:
            self._notes.give_back(self._note)

    def __enter__(self) -> CatalogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def room(self) -> int:
        """Bytes that writes may still take, as of this state; less than 0 when the reserve is touched."""
        return self._environment.held.room(self._environment.unused_bytes(self._txn, self._note))

    def held_bytes(self) -> int:
        """Of the store's blocks those that are only held for writes to come."""
        return self._environment.held.statistics().held_bytes

    @property
    def bad(self) -> Quarantine | None:
        """What must not be looked at; another object when that has changed."""
        return self._environment.bad

    def quarantined(self) -> list[str]:
        """What of the store the medium cannot give, a line each."""
        return [describe(place) for place in self._environment.bad or ()]

    def mark_loop(self) -> memoryview:
        """Where the event loop says which object it reads, by view: see Notes."""
        return self._notes.mark_loop()

    @property
    def data_file(self) -> Path:
        """LMDB's file; that of cells is beside it."""
        return self._environment.data_file

    @property
    def map_bytes(self) -> int:
        """Size of the map. When it changes, the map may have moved."""
        return self._environment.map_bytes

    @property
    def disk_full(self) -> bool:
        """Whether the store's disk had no more room when it was last asked for some."""
        return self._environment.held.full

    # Records

    def fetch(self, table: Table, key: bytes) -> memoryview | None:
        """The raw value, None when there is none; Damaged when LMDB's tree is, or the medium cannot give it."""
        self._look_up(table, key)
        handle = self._environment.tables.get(table)
        if handle is None:
            return None  # the store is of a version that did not have it
        try:
            return self._txn.get(key, db=handle)
        except lmdb.Error as error:
            raise self._unreadable(table, error) from error

    def _look_up(self, table: Table, key: bytes) -> None:
        """Before pages of the map are touched for a key: say so. Damaged when a daemon is known to die of that."""
        self._note.look_up(table, key)
        bad = self._environment.bad
        if bad is not None:
            bad.refuse(table, key)

    def _unreadable(self, table: Table, error: lmdb.Error) -> Damaged:
        """What to raise. Another transaction takes the place of one that only reads, if it shows the same state.

        Pages of that state stay in place all the while, so views that were given out stay good.
        """
        damage = Damaged(f"table {table.name} cannot be read: {error}")
        self.spoilt = self.spoilt or damage
        if self._reads_only:
            try:
                fresh = self._environment.begin()
            except (lmdb.Error, StoreBroken):
                return damage
            if fresh.id() == self.txn_id:
                self._txn, fresh, self.spoilt = fresh, self._txn, None
            fresh.abort()
        return damage

    def _get(self, table: Table, key: bytes, kind: type[R]) -> R | None:
        value = self.fetch(table, key)
        return None if value is None else catalog.decode(table, key, value, kind)

    def scan(self, table: Table, prefix: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
        """Every (key, value) whose key starts with `prefix`, ascending. Changes nothing while it runs."""
        if (bad := self._environment.bad) is not None:
            bad.refuse_scan(table, prefix=prefix)
        handle = self._environment.tables.get(table)
        if handle is None:
            return
        try:
            self._note.go_through(table.number)
            cursor = self._txn.cursor(db=handle)
            found = cursor.set_range(prefix) if prefix else cursor.first()
            while found:
                key, value = cursor.item()
                if prefix and bytes(key[: len(prefix)]) != prefix:
                    return
                name = checked_key(table, key)
                yield name, value
                self._note.go_through(table.number, name)
                found = cursor.next()
        except lmdb.Error as error:
            raise self._unreadable(table, error) from error

    def scan_keys(self, table: Table, start: bytes = b"") -> Iterator[bytes]:
        """Every key from `start` on, ascending. Values are not touched: of large ones that is much cheaper."""
        if (bad := self._environment.bad) is not None:
            bad.refuse_scan(table, start=start, values=False)
        handle = self._environment.tables.get(table)
        if handle is None:
            return
        try:
            self._note.go_through(table.number)
            cursor = self._txn.cursor(db=handle)
            if start and not cursor.set_range(start):
                return
            for key in cursor.iternext(keys=True, values=False):
                name = checked_key(table, key)
                yield name
                self._note.go_through(table.number, name)
        except lmdb.Error as error:
            raise self._unreadable(table, error) from error

    def entries(self, table: Table) -> int:
        """How many records a table has, by LMDB's own count."""
        handle = self._environment.tables.get(table)
        return 0 if handle is None else int(self._txn.stat(handle)["entries"])

    def _scan_records(self, table: Table, kind: type[R], prefix: bytes = b"") -> Iterator[tuple[bytes, R]]:
        for key, value in self.scan(table, prefix):
            yield key, catalog.decode(table, key, value, kind)

    def _prove_absence(self, table: Table) -> None:
        """Damaged unless the table has as many records as the store's state says."""
        if table.name in self._counted:
            return
        found = sum(1 for _ in self.scan(table))
        expected = self.state.rows.get(table.name, 0)
        if found != expected:
            raise Damaged(f"table {table.name} has {found} records where {expected} are on record")
        self._counted.add(table.name)

    @property
    def state(self) -> State:
        state = self._get(schema.META, schema.META_STATE, State)
        if state is None:
            raise Damaged("the store's state record is missing")
        return state

    @property
    def last_lsn(self) -> int:
        """The highest sequence number that any commit has applied: a new write log goes on above it."""
        return self.state.lsn

    # Volumes and snapshots

    def has_volume(self, uuid: bytes) -> bool:
        if self._get(schema.VOLUME, uuid, Volume) is not None:
            return True
        self._prove_absence(schema.VOLUME)
        return False

    def volume(self, uuid: bytes) -> Volume:
        volume = self._get(schema.VOLUME, uuid, Volume)
        if volume is None:
            self._prove_absence(schema.VOLUME)
            raise NoSuchVolume(f"there is no volume with uuid {uuid.hex()}")
        return volume

    def volume_by_name(self, name: str) -> Volume:
        uuid = self._uuid_of(name)
        if uuid is None:
            raise NoSuchVolume(f"there is no volume '{name}'")
        return self.volume(uuid)

    def _uuid_of(self, name: str) -> bytes | None:
        key = name.encode()
        found = self._get(schema.VOLUME_NAME, key, catalog.Value)
        if found is None:
            self._prove_absence(schema.VOLUME_NAME)
            return None
        return found.data

    def volumes(self) -> list[Volume]:
        """The volumes that have a name."""
        return [volume for volume in self._all_volumes() if not volume.orphan]

    def orphans(self) -> list[Volume]:
        """The volumes that were removed while they were open, and still are, or were when the last mount ended."""
        return [volume for volume in self._all_volumes() if volume.orphan]

    def _all_volumes(self) -> list[Volume]:
        self._prove_absence(schema.VOLUME)
        return [volume for _, volume in self._scan_records(schema.VOLUME, Volume)]

    def snapshots(self, uuid: bytes) -> list[Snapshot]:
        """The snapshots of a volume, by name."""
        self._prove_absence(schema.SNAPSHOT)
        return [snapshot for _, snapshot in self._scan_records(schema.SNAPSHOT, Snapshot, uuid)]

    def named(self, layer_id: int) -> list[tuple[bytes, Snapshot]]:
        """(key, snapshot) of every snapshot that names a layer, of whatever volume. Looks at all there are."""
        self._prove_absence(schema.SNAPSHOT)
        return [(key, each) for key, each in self._scan_records(schema.SNAPSHOT, Snapshot) if each.layer == layer_id]

    def find_snapshot(self, uuid: bytes, name: str) -> Snapshot:
        snapshot = self._get(schema.SNAPSHOT, catalog.snapshot_key(uuid, name), Snapshot)
        if snapshot is None:
            self._prove_absence(schema.SNAPSHOT)
            raise NoSuchSnapshot(f"there is no snapshot '{name}' of volume '{self.volume(uuid).name}'")
        return snapshot

    # Ownership and what others keep here

    def ownership(self, uuid: bytes) -> Ownership | None:
        """None only for a volume that this store never had."""
        record = self._get(schema.OWNERSHIP, uuid, Ownership)
        if record is None:
            self._prove_absence(schema.OWNERSHIP)
        return record

    def ownerships(self) -> list[Ownership]:
        self._prove_absence(schema.OWNERSHIP)
        return [record for _, record in self._scan_records(schema.OWNERSHIP, Ownership)]

    def value(self, table: str, key: str) -> bytes | None:
        """A value kept for another part of silofs; `table` is peer, migration, outbox or host."""
        found = self._get(schema.VALUE_TABLES[table], key.encode(), catalog.Value)
        if found is None:
            self._prove_absence(schema.VALUE_TABLES[table])
            return None
        return found.data

    def values(self, table: str) -> dict[str, bytes]:
        self._prove_absence(schema.VALUE_TABLES[table])
        found = self._scan_records(schema.VALUE_TABLES[table], catalog.Value)
        return {key.decode(): value.data for key, value in found}

    # Layers

    def layer(self, layer_id: int) -> Layer:
        """The record of a layer that something names; Damaged when it is not there."""
        layer = self._layers.get(layer_id)
        if layer is None:
            layer = self._get(schema.LAYER, catalog.layer_key(layer_id), Layer)
            if layer is None:
                raise Damaged(f"layer {layer_id} is missing")
            self._layers[layer_id] = layer
        return layer

    def layer_by_uuid(self, uuid: bytes) -> Layer | None:
        found = self._get(schema.LAYER_UUID, uuid, catalog.Value)
        if found is None:
            self._prove_absence(schema.LAYER_UUID)
            return None
        return self.layer(schema.KEY.unpack(found.data)[0])

    def layers(self) -> list[Layer]:
        self._prove_absence(schema.LAYER)
        return [layer for _, layer in self._scan_records(schema.LAYER, Layer)]

    def merges(self) -> list[Merge]:
        """Merges under way."""
        return [merge for _, merge in self._scan_records(schema.MERGE, Merge)]

    def layers_from(self, layer_id: int) -> Iterator[Layer]:
        """Layers by id, from that id on."""
        for key in self.scan_keys(schema.LAYER, catalog.layer_key(layer_id)):
            yield self.layer(schema.KEY.unpack(key)[0])

    def chain(self, layer_id: int) -> list[Layer]:
        """The layers from that one down to its base."""
        chain = self._chains.get(layer_id)
        if chain is None:
            chain = [self.layer(layer_id)]
            while chain[-1].parent:
                chain.append(self.layer(chain[-1].parent))
                if chain[-1].depth >= chain[-2].depth:
                    raise Damaged(f"layer {chain[-1].id} cannot be below layer {chain[-2].id}")
            self._chains[layer_id] = chain
        return chain

    def _floors(self, layer_id: int) -> dict[int, int]:
        """For every layer of a chain the first page that the clips of those above it hide."""
        floors = self._floor_maps.get(layer_id)
        if floors is None:
            floors, floor = {}, NO_FLOOR
            for layer in self.chain(layer_id):
                floors[layer.id] = floor
                floor = min(floor, pages_for(layer.clip))
            self._floor_maps[layer_id] = floors
        return floors


def checked_key(table: Table, key: memoryview) -> bytes:
    """A key that LMDB returned; Damaged when it is none of this table's."""
    if table.key_bytes and len(key) != table.key_bytes:
        raise Damaged(f"table {table.name} has keys of another")
    return bytes(key)


def verify_catalog(txn: CatalogReader) -> None:
    """Damaged unless the catalog is, record for record, what the newest transaction left.

    A sound record of the past in the place of the newest one passes its own checksum; it does not pass this. A record
    that only its own checksum gives away is left to those who ask for it: the others are served.
    """
    state = txn.state
    if state.txn != txn.txn_id:
        raise Damaged(f"the store's state is of transaction {state.txn}, the file of {txn.txn_id}")
    total = 0
    for table in schema.TABLES:
        if table.counted:
            for _, value in txn.scan(table):
                total ^= schema.stored_sum(value)
    if total != state.catalog:
        raise Damaged("the catalog is not the one that was last written", hint="silofs check lists what is wrong")
