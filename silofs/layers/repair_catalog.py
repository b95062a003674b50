"""The catalog of a store that is repaired: which volumes, snapshots and layers are kept, and what follows from them.

A volume or snapshot without a whole chain of layer records cannot be kept; a head whose volume has lost its record, and
a layer whose snapshot has, is kept under a name of ours.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from silofs.layers import catalog, schema
from silofs.layers.catalog import Layer, Ownership, Pin, Record, Role, Snapshot, State, Value, Volume
from silofs.layers.salvage import Salvage
from silofs.layers.schema import Table
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn

_PAGED: Final = (schema.OBJECT, schema.PAGES, schema.NAME, schema.CONTAINER)


@dataclass
class Loss:
    """Something that is given up. `ranges`: bytes [first, end) that read as errors."""

    what: str  # volume, snapshot, name, journal or other
    name: str
    message: str
    ranges: list[tuple[int, int]] = field(default_factory=list)


class CatalogRepair:
    """What is kept of the catalog. `_old` and `_store` are there before anything is asked for."""

    _old: Salvage
    _store: Store

    def __init__(self, path: Path) -> None:
        self._path = path
        self._losses: list[Loss] = []
        self._layers: dict[int, Layer] = {}
        self._volumes: dict[bytes, Volume] = {}
        self._snapshots: dict[bytes, Snapshot] = {}

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
        if not self._old.newest_known:
            message = "a header of the data file is damaged: its last commit may be lost; what that did is not named"
            self._losses.append(Loss("other", "header", message))
        states = list(self._states())
        if not states:
            message = "the state record is lost: volumes of which nothing else is left are not named"
            self._losses.append(Loss("other", "state", message))
        rows = max((state.rows.get(schema.VOLUME.name, 0) for state in states), default=0)
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
