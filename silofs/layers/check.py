"""`silofs check`: every invariant of the store, and where one does not hold. Reads only; damage never ends it.

It looks at the store from both sides wherever two records must agree: a table and its count, presence bits and leaf
records, leaf entries and the names and live bits of what they refer to, layers and all that names them. What it
cannot read it reports, and goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np

from silofs.blocks import LEAF_PAGES, LEAF_SHIFT, pages_for
from silofs.errors import Damaged
from silofs.layers import catalog, leaves, presence, schema
from silofs.layers.catalog import Layer, Merge, Ownership, Pin, R, Snapshot, State, Value, Volume
from silofs.layers.catalog_reader import verify_catalog
from silofs.layers.check_cells import CellChecker
from silofs.layers.check_containers import ContainerChecker
from silofs.layers.objects import read_live
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import CHUNK_SHIFT, LIVE_OBJECTS, LIVE_SHIFT, Refs, Table

FINDINGS_MAX: Final = 1000  # after that only their number goes up

Masks = dict[int, np.ndarray[Any, np.dtype[np.uint32]]]  # group of object ids -> live slots of each


@dataclass(frozen=True)
class Finding:
    """One invariant that does not hold, and where. Empty or None: it is not about one."""

    code: str
    message: str
    volume: str = ""
    layer: int | None = None
    page: int | None = None


def check(
    txn: ReadTxn,
    *,
    read_data: bool = False,
    progress: Callable[[int, int], None] | None = None,
    into: list[Finding] | None = None,
) -> list[Finding]:
    """Everything that is wrong with the store as that transaction sees it. `read_data`: the bytes of pages as well.

    `progress` is called with (steps done, steps in all) now and then; `into` gets the findings as they are made. The
    transaction pins what is freed meanwhile.
    """
    checker = _Checker(txn, progress, [] if into is None else into)
    checker.run(read_data)
    return checker.findings


class _Checker:
    def __init__(self, txn: ReadTxn, progress: Callable[[int, int], None] | None, findings: list[Finding]) -> None:
        self.findings = findings
        self._txn = txn
        self._progress = progress
        self._state = State()
        self._layers: dict[int, Layer] = {}
        self._volumes: dict[bytes, Volume] = {}
        self._snapshots: list[Snapshot] = []
        self._merges: dict[int, Merge] = {}
        self._shown: dict[int, str] = {}  # layer -> a volume that shows it, for messages
        self._live: Masks = {}
        self._seen: Masks = {}
        self._lone: set[int] = set()
        self._uncovered: dict[int, int] = {}  # layer -> data pages that are void there, and counted still
        self._containers = ContainerChecker(txn, self._report)
        self._cells = CellChecker(txn, self._report)

    def run(self, read_data: bool) -> None:
        steps: list[Callable[[], None]] = [
            self._quarantine, self._counts, self._catalog, self._tree, self._live_records, self._leaf_records,
            self._void_records, self._objects, self._cells.check, self._containers.check, self._data_pages,
        ]  # fmt: skip
        if read_data:
            steps += [self._data, self._containers.read]
        for number, step in enumerate(steps):
            if self._progress is not None:
                self._progress(number, len(steps))
            with self._reporting("unreadable"):
                step()

    def _report(self, code: str, message: str, *, layer: int | None = None, page: int | None = None) -> None:
        if len(self.findings) < FINDINGS_MAX:
            volume = self._shown.get(layer, "") if layer is not None else ""
            self.findings.append(Finding(code, message, volume, layer, page))

    @contextmanager
    def _reporting(self, code: str, *, layer: int | None = None, page: int | None = None) -> Iterator[None]:
        try:
            yield
        except Damaged as error:
            self._report(code, str(error), layer=layer, page=page)

    def _records(self, table: Table, kind: type[R]) -> Iterator[tuple[bytes, R]]:
        """The readable records of a table; the others are reported."""
        for key, value in self._txn.scan(table):
            with self._reporting("record"):
                record = catalog.decode(table, key, value, kind)
                yield key, record

    # Catalog

    def _counts(self) -> None:
        self._state = self._txn.state
        with self._reporting("catalog"):
            verify_catalog(self._txn)
        for table in schema.TABLES:
            if table.counted:
                with self._reporting("unreadable"):
                    found = sum(1 for _ in self._txn.scan(table))
                    expected = self._state.rows.get(table.name, 0)
                    if found != expected:
                        self._report("count", f"table {table.name} has {found} records, {expected} are on record")

    def _quarantine(self) -> None:
        """What daemons have died of."""
        for line in self._txn.quarantined():
            self._report("quarantine", line)

    def _catalog(self) -> None:
        self._layers = {layer.id: layer for _, layer in self._records(schema.LAYER, Layer)}
        self._volumes = {volume.uuid: volume for _, volume in self._records(schema.VOLUME, Volume)}
        self._snapshots = [snapshot for _, snapshot in self._records(schema.SNAPSHOT, Snapshot)]
        self._merges = {merge.lower: merge for _, merge in self._records(schema.MERGE, Merge)}
        names = {key.decode(): value.data for key, value in self._records(schema.VOLUME_NAME, Value)}
        owned = {key for key, _ in self._records(schema.OWNERSHIP, Ownership)}
        uuids = {key: schema.KEY.unpack(value.data)[0] for key, value in self._records(schema.LAYER_UUID, Value)}
        for table in schema.VALUE_TABLES.values():
            for _ in self._records(table, Value):
                pass
        for volume in self._volumes.values():
            if not volume.orphan and names.pop(volume.name, None) != volume.uuid:
                self._report("name", f"volume '{volume.name}' is not found by its name")
            if volume.uuid not in owned:
                self._report("ownership", f"volume '{volume.name}' has no ownership record")
            if volume.inode >= self._state.next_inode:
                self._report("counter", f"inode {volume.inode} of volume '{volume.name}' was never given out")
        for name in names:
            self._report("name", f"the name '{name}' leads to no volume")
        for inode, count in Counter(volume.inode for volume in self._volumes.values()).items():
            if count > 1:
                self._report("inode", f"{count} volumes have inode {inode}")
        for layer in self._layers.values():
            if layer.uuid and uuids.pop(layer.uuid, None) != layer.id:
                self._report("layer_uuid", f"layer {layer.id} is not found by its uuid", layer=layer.id)
        for uuid in uuids:
            self._report("layer_uuid", f"uuid {uuid.hex()} leads to no layer")

    def _tree(self) -> None:
        """Layers against what names them."""
        for volume in self._volumes.values():
            layer_id = volume.head
            while layer_id in self._layers and layer_id not in self._shown:
                self._shown[layer_id] = volume.name
                layer_id = self._layers[layer_id].parent
        heads = Counter(volume.head for volume in self._volumes.values())
        children = Counter(layer.parent for layer in self._layers.values() if layer.parent)
        named = Counter(snapshot.layer for snapshot in self._snapshots)
        pinned = Counter(pin.layer for _, pin in self._records(schema.PIN, Pin))
        doomed = {schema.KEY.unpack(key)[0] for key, _ in self._records(schema.DOOMED, Value)}
        for volume in self._volumes.values():
            head = self._layers.get(volume.head)
            if head is None or head.sealed or head.doomed or heads[volume.head] != 1:
                self._report("head", f"volume '{volume.name}' has no head of its own", layer=volume.head)
            elif head.size != volume.size:
                self._report("size", f"volume '{volume.name}' and its head differ in size", layer=head.id)
        for snapshot in self._snapshots:
            layer = self._layers.get(snapshot.layer)
            if layer is None or not layer.sealed or layer.size != snapshot.size or snapshot.volume not in self._volumes:
                self._report("snapshot", f"snapshot '{snapshot.name}' does not fit what it names", layer=snapshot.layer)
        for layer in self._layers.values():
            self._check_layer(layer, heads[layer.id], layer.id in doomed)
            for code, found, recorded in (
                ("children", children[layer.id], layer.children),
                ("snapshots", named[layer.id], layer.snapshots),
                ("pins", pinned[layer.id], layer.pins),
            ):
                if found != recorded:
                    self._report(code, f"layer {layer.id} has {found} {code}, {recorded} on record", layer=layer.id)
        for merge in self._merges.values():
            lower, upper = self._layers.get(merge.lower), self._layers.get(merge.upper)
            if lower is None or upper is None or upper.parent != lower.id or lower.snapshots or lower.pins:
                self._report("merge", f"layers {merge.lower} and {merge.upper} cannot be merged", layer=merge.lower)
        for what, ids in (("a pin", pinned), ("a removal", dict.fromkeys(doomed))):
            for layer_id in ids:
                if layer_id not in self._layers:
                    self._report("reference", f"{what} names layer {layer_id}, which is missing", layer=layer_id)

    def _check_layer(self, layer: Layer, heads: int, doomed: bool) -> None:
        parent = self._layers.get(layer.parent)
        wrong = ""
        if layer.parent and (parent is None or not parent.sealed):
            wrong = f"is built on layer {layer.parent}, which is no sealed layer"
        elif layer.depth <= (parent.depth if parent else 0):
            wrong = "has a wrong depth"
        elif layer.id >= self._state.next_layer:
            wrong = "has an id that was never given out"
        elif layer.clip > layer.size or (layer.mapped > pages_for(layer.size)):
            wrong = "has a clip or a map beyond its size"
        elif layer.uuid and not layer.sealed:
            wrong = "has a uuid without being sealed"
        elif layer.merging != (layer.id in self._merges):
            wrong = "is sealed without a uuid, or is merged and has one"
        elif layer.doomed != doomed:
            wrong = "is to be removed in one record and not in another"
        elif not layer.doomed and not (heads if not layer.sealed else layer.referenced):
            wrong = "is reached by nothing"
        elif layer.doomed and (heads or layer.referenced):
            wrong = "is to be removed and still in use"
        if wrong:
            self._report("layer", f"layer {layer.id} {wrong}", layer=layer.id)

    # Leaves

    def _live_records(self) -> None:
        for key, value in self._txn.scan(schema.LIVE):
            with self._reporting("live"):
                self._live[schema.KEY.unpack(key)[0]] = read_live(key, value)

    def _leaf_records(self) -> None:
        """Leaf records against presence bits, one layer after the other; entries against what they refer to."""
        present = self._presence()
        sums = self._leaf_sums()
        counted: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
        numbers: Counter[int] = Counter()
        for key, value in self._txn.scan(schema.LEAF):
            layer_id, leaf = schema.PAIR.unpack(key)
            layer = self._layers.get(layer_id)
            if layer is None:
                self._report("leaf", f"leaf {leaf} belongs to layer {layer_id}, which is missing", layer=layer_id)
                continue
            numbers[layer_id] += 1
            if leaf not in present.get(layer_id, set()):
                self._report("presence", f"leaf {leaf} of layer {layer_id} is there and not present", layer=layer_id)
            present.get(layer_id, set()).discard(leaf)
            with self._reporting("leaf", layer=layer_id, page=leaf << LEAF_SHIFT):
                refs = leaves.decode(schema.open_record(schema.LEAF, key, value))
                if sums.pop((layer_id, leaf), 0) != schema.short_sum(value):
                    self._report("leaf", f"leaf {leaf} of layer {layer_id} is not the one on record", layer=layer_id)
                counts = counted.setdefault(layer_id, np.zeros(16, np.int64))
                counts += np.bincount(schema.kinds(refs).astype(np.intp), minlength=16)
                self._check_entries(layer, leaf, refs)
        for layer_id, leaf in sums:
            self._report("leaf_sum", f"leaf {leaf} of layer {layer_id} is on record and not there", layer=layer_id)
        for layer_id, missing in present.items():
            for leaf in sorted(missing):
                message = f"leaf {leaf} of layer {layer_id} is present and not there"
                self._report("presence", message, layer=layer_id, page=leaf << LEAF_SHIFT)
        for layer in self._layers.values():
            kinds = counted.get(layer.id, np.zeros(16, np.int64)).tolist()
            for what, found, recorded in (
                ("leaves", numbers[layer.id], layer.leaves),
                ("own pages", sum(kinds[kind] for kind in schema.STORED), layer.own_pages),
                ("remote pages", kinds[schema.REMOTE], layer.remote_pages),
                ("lost pages", kinds[schema.LOST], layer.lost_pages),
            ):
                if found != recorded:
                    self._report("count", f"layer {layer.id} has {found} {what}, {recorded} on record", layer=layer.id)

    def _leaf_sums(self) -> dict[tuple[int, int], int]:
        """The short checksums on record, by layer and leaf."""
        sums: dict[tuple[int, int], int] = {}
        for key, value in self._txn.scan(schema.LEAF_SUM):
            layer_id, group = schema.PAIR.unpack(key)
            with self._reporting("leaf_sum", layer=layer_id):
                row = np.frombuffer(schema.open_record(schema.LEAF_SUM, key, value), "<u4")
                for at in np.flatnonzero(row).tolist():
                    sums[layer_id, (group << schema.SUM_SHIFT) + at] = int(row[at])
        return sums

    def _presence(self) -> dict[int, set[int]]:
        """The leaves that are present by the bitmaps, by layer."""
        present: dict[int, set[int]] = {layer_id: set() for layer_id in self._layers}
        chunks = {layer.id: set(presence.chunk_numbers(layer.chunks)) for layer in self._layers.values()}
        for key, value in self._txn.scan(schema.PRESENCE):
            layer_id, chunk = schema.PAIR.unpack(key)
            with self._reporting("presence", layer=layer_id):
                if chunk not in chunks.get(layer_id, set()):
                    raise Damaged(f"presence bitmap {chunk} of layer {layer_id} is there and not on record")
                chunks[layer_id].discard(chunk)
                bitmap = bytes(schema.open_record(schema.PRESENCE, key, value))
                if schema.short_sum(value) != presence.chunk_sum(self._layers[layer_id].chunks, chunk):
                    raise Damaged(f"presence bitmap {chunk} of layer {layer_id} is an older one")
                present[layer_id].update((chunk << CHUNK_SHIFT) + at for at in presence.bits(bitmap))
        for layer_id, missing in chunks.items():
            for chunk in missing:
                message = f"presence bitmap {chunk} of layer {layer_id} is missing"
                self._report("presence", message, layer=layer_id)
        return present

    def _void_records(self) -> None:
        """Void bitmaps against the layers' records; what they cover is counted until it is settled."""
        for key in self._txn.scan_keys(schema.VOID):
            layer_id, chunk = schema.PAIR.unpack(key)
            layer = self._layers.get(layer_id)
            if layer is None or not presence.chunk_sum(layer.voids, chunk):
                message = f"void bitmap {chunk} of layer {layer_id} is there and not on record"
                self._report("void", message, layer=layer_id)
        for layer in self._layers.values():
            with self._reporting("void", layer=layer.id):
                void, unsettled = set(self._txn.void_leaves(layer.id)), list(self._txn.unsettled_leaves(layer.id))
                if any((leaf + 1) << LEAF_SHIFT > pages_for(layer.size) for leaf in void) or not void.issuperset(
                    unsettled
                ):
                    self._report("void", f"layer {layer.id} has void leaves that cannot be", layer=layer.id)
                if not layer.doomed and len(unsettled) != layer.unsettled:
                    message = f"layer {layer.id} has {len(unsettled)} unsettled leaves, {layer.unsettled} on record"
                    self._report("count", message, layer=layer.id)
                self._uncovered[layer.id] = sum(schema.count_data(self._txn.covered(layer.id, at)) for at in unsettled)
        unsettled_in_all = sum(layer.unsettled for layer in self._layers.values())
        if unsettled_in_all != self._state.unsettled:
            message = f"layers have {unsettled_in_all} unsettled leaves, {self._state.unsettled} are on record"
            self._report("count", message)

    def _check_entries(self, layer: Layer, leaf: int, refs: Refs) -> None:
        first = leaf << LEAF_SHIFT
        kinds = schema.kinds(refs)
        beyond = refs[max(0, min(LEAF_PAGES, pages_for(layer.size) - first)) :]
        if beyond.any() or (kinds > schema.PACKED).any():
            message = f"leaf {leaf} of layer {layer.id} has entries that cannot be"
            self._report("leaf", message, layer=layer.id, page=first)
        for at in np.flatnonzero(kinds == schema.REMOTE).tolist():
            if schema.object_of(int(refs[at])) != layer.id:
                self._report("remote", f"page {first + at} is remote in another layer", layer=layer.id, page=first + at)
        self._containers.count(layer.id, leaf, refs)
        stored = np.flatnonzero((kinds == schema.DATA) | (kinds == schema.LONE))
        by_object: dict[int, list[tuple[int, int]]] = {}
        for at, reference in zip(stored.tolist(), refs[stored].tolist(), strict=True):
            by_object.setdefault(reference >> schema.OBJECT_SHIFT, []).append((first + at, reference))
        for object_id, entries in by_object.items():
            with self._reporting("name", layer=layer.id, page=entries[0][0]):
                self._check_names(layer, object_id, entries)

    def _check_names(self, layer: Layer, object_id: int, entries: list[tuple[int, int]]) -> None:
        """Entries of one leaf that refer to one object: each must be the one that its slot names."""
        key = schema.KEY.pack(object_id)
        value = self._txn.fetch(schema.NAME, key)
        if value is None:
            raise Damaged(f"object {object_id} has no name record")
        names = schema.open_name(key, value)
        live = self._live.get(object_id >> LIVE_SHIFT)
        mask = int(live[object_id & (LIVE_OBJECTS - 1)]) if live is not None else 0
        for page, reference in entries:
            slot = schema.slot_of(reference)
            if slot >= len(names) or names[slot] != (layer.id, page):
                self._report("name", f"page {page} uses what another page owns", layer=layer.id, page=page)
            elif schema.kind_of(reference) == schema.LONE:
                self._lone.add(object_id)
            elif not mask >> slot & 1:
                self._report("live", f"page {page} uses a slot that is not live", layer=layer.id, page=page)
            else:
                seen = self._seen.setdefault(object_id >> LIVE_SHIFT, np.zeros(LIVE_OBJECTS, np.uint32))
                seen[object_id & (LIVE_OBJECTS - 1)] |= np.uint32(1 << slot)

    # Objects

    def _objects(self) -> None:
        """Everything stored is used: objects, lone pages and names against live bits and leaf entries."""
        nothing = np.zeros(LIVE_OBJECTS, np.uint32)
        for group, row in self._live.items():
            for at in np.flatnonzero(row & ~self._seen.get(group, nothing)).tolist():
                self._report("live", f"object {(group << LIVE_SHIFT) + at} has live slots that no page uses")
        expected = {
            (group << LIVE_SHIFT) + at for group, row in self._live.items() for at in np.flatnonzero(row).tolist()
        }
        inline, in_cells = self._used(schema.OBJECT, expected), self._used(schema.CELL, expected)
        lone, names = self._used(schema.PAGES, self._lone), self._used(schema.NAME, expected | self._lone)
        for object_id in sorted(inline & in_cells):
            self._report("cell", f"object {object_id} is in a cell and in table {schema.OBJECT.name} as well")
        for object_id in sorted(expected - inline - in_cells):
            self._report("object", f"object {object_id} is missing")
        for table, missing in ((schema.PAGES, self._lone - lone), (schema.NAME, (expected | self._lone) - names)):
            for object_id in sorted(missing):
                self._report("object", f"record {object_id} of table {table.name} is missing")

    def _used(self, table: Table, ids: set[int]) -> set[int]:
        """The ids in a table; those that are not among `ids`, or that cannot be, are reported."""
        found = {schema.KEY.unpack(key)[0] for key in self._txn.scan_keys(table)}
        for object_id in sorted(found - ids):
            self._report("object", f"record {object_id} of table {table.name} is used by nothing")
        if found and max(found) >= self._state.next_object:
            self._report("counter", f"an id in table {table.name} was never given out")
        return found

    def _data_pages(self) -> None:
        """The counts of data pages, resolved."""
        counted: dict[int, int] = {}
        for layer in self._layers.values():
            if not layer.sealed or layer.data_pages != catalog.UNCOUNTED:
                with self._reporting("leaf", layer=layer.id):
                    chain = self._txn.chain_leaves(layer.id)
                    count = sum(schema.count_data(self._txn.resolve(layer.id, leaf)) for leaf in chain)
                    late = sum(self._uncovered.get(below.id, 0) for below in self._txn.chain(layer.id))
                    counted[layer.id] = count + late
        for what, layer_id, recorded in (
            *((f"volume '{volume.name}'", volume.head, volume.data_pages) for volume in self._volumes.values()),
            *((f"snapshot '{each.name}'", each.layer, each.data_pages) for each in self._snapshots),
            *((f"layer {layer.id}", layer.id, layer.data_pages) for layer in self._layers.values() if layer.sealed),
        ):
            found = counted.get(layer_id, recorded)
            if found != recorded:
                self._report("count", f"{what} has {found} data pages, {recorded} on record", layer=layer_id)

    def _data(self) -> None:
        """The bytes: headers of objects, checksums of live pages."""
        for key in chain(self._txn.scan_keys(schema.OBJECT), self._txn.scan_keys(schema.CELL)):
            object_id = schema.KEY.unpack(key)[0]
            try:
                value = self._txn.object(object_id)
            except Damaged as error:
                self._report("data", str(error))
                continue
            with self._reporting("data"):
                schema.check_header(object_id, value)
            row = self._live.get(object_id >> LIVE_SHIFT)
            mask = int(row[object_id & (LIVE_OBJECTS - 1)]) if row is not None else 0
            for slot in range(schema.OBJECT_PAGES):
                if mask >> slot & 1:
                    self._check_page(key, schema.ref(schema.DATA, object_id, slot), slot)
        for key in self._txn.scan_keys(schema.PAGES):
            self._check_page(key, schema.ref(schema.LONE, schema.KEY.unpack(key)[0]), 0)

    def _check_page(self, key: bytes, reference: int, slot: int) -> None:
        try:
            self._txn.page(reference)
        except Damaged as error:
            with self._reporting("name"):
                value = self._txn.fetch(schema.NAME, key)
                names = schema.open_name(key, value) if value is not None else []
                layer, page = names[slot] if slot < len(names) else (None, None)
                self._report("data", str(error), layer=layer, page=page)
