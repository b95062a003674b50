"""What a migration keeps in the store, and the one function that writes it: `apply`, inside one transaction.

The machines (silofs/migrate) speak of store ids and migrations as 16 bytes; the catalog keeps them as hex. A machine's
record is msgpack in the table `migration` under the migration's id in hex; what is only for the operator (when it
began, how long a retired copy stays) is beside it in `host`.

Layers that a migration has received, builds on or will name are pinned under its id until it is over; the final
layer of a volume that was ceded is pinned for its new owner, who may still pull from it (docs/protocol.md, I9).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import msgspec

from silofs.blocks import pages_for
from silofs.errors import Busy, ProtocolError
from silofs.extents import Extents
from silofs.layers import catalog, schema
from silofs.layers.reader import ReadTxn
from silofs.layers.transaction import WriteTxn
from silofs.migrate.events import Commit
from silofs.migrate.messages import Base, MapPart, PageKind, SnapshotInfo
from silofs.migrate.states import MigrationRecord, Ownership, Phase, Role, Side

TABLE = "migration"
ID_PREFIX = "m-"
RENAMES_MAX = 1000


class BaseGone(Busy):
    """A state that the target had said it has complete was deleted before its record could pin it."""


def _arriving(uuid: bytes) -> catalog.Ownership:
    """What a volume is made with; its real record follows in the same transaction."""
    return catalog.Ownership(uuid, catalog.Role.INCOMING, 0)


def shown_id(migration: bytes) -> str:
    """A migration's id as the operator sees it."""
    return ID_PREFIX + migration.hex()[:12]


def from_catalog(record: catalog.Ownership) -> Ownership:
    return Ownership(
        record.uuid,
        Role(record.role),
        record.epoch,
        record.offered_epoch,
        bytes.fromhex(record.peer),
        bytes.fromhex(record.migration),
        record.last_lsn,
        record.generation,
        bytes.fromhex(record.lineage),
    )


def ownership(reader: ReadTxn, uuid: bytes) -> Ownership:
    """The record of a volume; of one that was never here, NONE at epoch 0."""
    found = reader.ownership(uuid)
    return from_catalog(found) if found is not None else Ownership(uuid, Role.NONE, 0)


def stored(reader: ReadTxn) -> list[MigrationRecord]:
    """Every open migration."""
    return [msgspec.msgpack.decode(data, type=MigrationRecord) for data in reader.values(TABLE).values()]


def moving(reader: ReadTxn) -> set[bytes]:
    """The volumes of open migrations."""
    if not reader.state.rows.get(TABLE):
        return set()
    return {volume.uuid for record in stored(reader) for volume in record.volumes}


def needed(reader: ReadTxn) -> set[bytes]:
    """Those of them that have to stay what they are: all, but those that are complete here and wait for the source."""
    if not reader.state.rows.get(TABLE):
        return set()
    found = [record for record in stored(reader) if record.side is Side.SOURCE or record.phase is not Phase.COMPLETE]
    return {volume.uuid for record in found for volume in record.volumes}


def apply(txn: WriteTxn, commit: Commit, record: MigrationRecord | None) -> set[bytes]:
    """Everything that a `Commit` asks for; `record` is the machine's latest one. Returns the uuids of the volumes
    whose records, names or content changed.

    Raises what the store raises; then nothing of it is stored.
    """
    changed: set[bytes] = set()
    if commit.record is not None:
        record = commit.record
        if record.side is Side.TARGET:
            _receive(txn, record)
    for part in commit.maps:
        assert record is not None, "a map belongs to a migration"
        _put_map(txn, record, part)
    for mine in commit.ownership:
        assert record is not None, "an ownership record changes in a migration only"
        before = ownership(txn, mine.uuid)
        if mine.role is Role.INCOMING:
            _announce(txn, record, mine)
        elif mine.role is Role.OWNER and record.side is Side.TARGET and before.epoch < mine.epoch:
            _take_over(txn, record, mine)
        elif mine.role is Role.NONE and before.role is Role.INCOMING:
            _forget(txn, mine.uuid)
        elif mine.role is Role.CEDED:
            _pin_final(txn, record, mine.uuid)
        _put_ownership(txn, mine, record)
        changed.add(mine.uuid)
    if commit.record is not None:
        txn.put_value(TABLE, commit.record.id.hex(), msgspec.msgpack.encode(commit.record))
    for migration in commit.drop:
        _drop(txn, migration)
    return changed


def _put_ownership(txn: WriteTxn, mine: Ownership, record: MigrationRecord) -> None:
    heads = {head.volume: head.base for head in record.heads}
    names = {offer.uuid: offer.name for offer in record.offered}
    txn.put_ownership(
        catalog.Ownership(
            uuid=mine.uuid,
            role=catalog.Role(mine.role.value),
            epoch=mine.epoch,
            offered_epoch=mine.offered_epoch,
            peer=mine.peer.hex(),
            migration=mine.migration.hex(),
            last_lsn=mine.last_lsn,
            generation=mine.generation,
            lineage=mine.lineage.hex(),
            layer=heads.get(mine.uuid, b"") if mine.role in (Role.CEDED, Role.RETIRED) else b"",
            name=txn.volume(mine.uuid).name if txn.has_volume(mine.uuid) else names.get(mine.uuid, ""),
            changed_ns=time.time_ns(),
        )
    )


def _announce(txn: WriteTxn, record: MigrationRecord, mine: Ownership) -> None:
    """INCOMING: the name becomes visible. A copy that is still here from an earlier stay keeps its layers."""
    if txn.has_volume(mine.uuid):
        return
    offer = next(offer for offer in record.offered if offer.uuid == mine.uuid)
    txn.create_volume(offer.name, offer.size, uuid=mine.uuid, ownership=_arriving(mine.uuid))


def _take_over(txn: WriteTxn, record: MigrationRecord, mine: Ownership) -> None:
    """OWNER: a new head on the final layer; size, name and snapshots as they were at the source at the end."""
    offer = next(offer for offer in record.offered if offer.uuid == mine.uuid)
    final = _layer(txn, next(head.base for head in record.heads if head.volume == mine.uuid))
    if not txn.has_volume(mine.uuid):
        name = free_name(txn, offer.name, mine.uuid)
        txn.create_volume(
            name,
            offer.size,
            uuid=mine.uuid,
            parent=final.id,
            ownership=_arriving(mine.uuid),
        )
    else:
        name = free_name(txn, offer.name, mine.uuid)
        if txn.volume(mine.uuid).name != name:
            txn.rename(mine.uuid, name)
        txn.rollback(mine.uuid, final.id)
    if txn.volume(mine.uuid).size != offer.size:
        txn.resize(mine.uuid, offer.size)
    for info in record.snapshots:
        if info.volume == mine.uuid:
            _name_snapshot(txn, info)


def _name_snapshot(txn: WriteTxn, info: SnapshotInfo) -> None:
    """One that came with the volume. What has its name here already and is another keeps its content as `name.N`."""
    layer = _layer(txn, info.segment)
    have = {snap.name: snap for snap in txn.snapshots(info.volume)}
    old = have.get(info.name)
    if old is not None and old.layer == layer.id:
        return
    if old is not None:
        other = next(name for name in (f"{info.name[:120]}.{n}" for n in itertools.count(2)) if name not in have)
        txn.add_snapshot(info.volume, other, old.layer, created_ns=old.created_ns)
        txn.remove_snapshot(info.volume, info.name)
    txn.add_snapshot(info.volume, info.name, layer.id, created_ns=info.created_ns)


def left_behind(reader: ReadTxn, record: MigrationRecord | None) -> set[bytes]:
    """Volumes with named snapshots here that did not travel: left by choice, or of a state that was rolled back."""
    if record is None:
        return set()
    went = {(info.volume, info.name) for info in record.snapshots}
    uuids = [volume.uuid for volume in record.volumes if reader.has_volume(volume.uuid)]
    return {uuid for uuid in uuids if any((uuid, snap.name) not in went for snap in reader.snapshots(uuid))}


def _forget(txn: WriteTxn, uuid: bytes) -> None:
    """INCOMING ended: the name goes, if it came with this migration. An old copy stays for its own time."""
    if txn.has_volume(uuid) and not txn.layer(txn.volume(uuid).head).parent:
        txn.delete_volume(uuid)


def _pin_final(txn: WriteTxn, record: MigrationRecord, uuid: bytes) -> None:
    for head in record.heads:
        if head.volume == uuid:
            txn.pin(_layer(txn, head.base).id, f"owner {record.peer.hex()}")


def _drop(txn: WriteTxn, migration: bytes) -> None:
    data = txn.value(TABLE, migration.hex())
    if data is None:
        return
    record = msgspec.msgpack.decode(data, type=MigrationRecord)
    txn.unpin_all(migration.hex())
    _unpin(txn, (head.base for head in record.heads), f"owner {record.peer.hex()}")
    txn.delete_value(TABLE, migration.hex())


def _unpin(txn: WriteTxn, layers: Iterable[bytes], holder: str) -> None:
    """From the newest: a layer that nothing else holds goes, and then its parent may."""
    for uuid in reversed([layer for layer in layers if layer]):
        layer = txn.layer_by_uuid(uuid)
        if layer is not None:
            txn.unpin(layer.id, holder)


def _layer(txn: ReadTxn, uuid: bytes) -> catalog.Layer:
    layer = txn.layer_by_uuid(uuid)
    if layer is None:
        raise ProtocolError("a layer that the migration names is not here")
    return layer


def _receive(txn: WriteTxn, record: MigrationRecord) -> None:
    """Create the layers of new segments; let go of those that the manifest does not name any more, or names anew."""
    before = txn.value(TABLE, record.id.hex())
    old = None if before is None else msgspec.msgpack.decode(before, type=MigrationRecord)
    if old is None or old.bases != record.bases:
        _hold_bases(txn, record, old.bases if old is not None else ())
    if old is not None:
        named = {(segment.uuid, segment.parent) for segment in record.segments}
        gone = (part.uuid for part in old.segments if (part.uuid, part.parent) not in named)
        _unpin(txn, gone, record.id.hex())
    for segment in record.segments:
        if txn.layer_by_uuid(segment.uuid) is None:
            parent = _layer(txn, segment.parent).id if segment.parent else 0
            layer = txn.receive_layer(segment.uuid, parent, segment.size, segment.clip)
            txn.pin(layer.id, record.id.hex())


def _hold_bases(txn: WriteTxn, record: MigrationRecord, before: Iterable[Base]) -> None:
    """Pin the states that nothing is sent of. Checked here, in the transaction: they were looked up in an earlier one,

    and whoever deleted the last name of one in between would leave a chain without its bottom. Raises BaseGone.
    """
    wanted = [base.base for base in record.bases if base.base]
    _pin_states(txn, wanted, record.id)
    _unpin(txn, (base.base for base in before if base.base not in wanted), record.id.hex())


def hold_named(txn: WriteTxn, migration: bytes, uuids: Iterable[bytes]) -> None:
    """Pin the states that will be named as snapshots and are not sent, before PREPARED says that they are here: without

    one that a merge or a deletion took meanwhile, the OWNER commit would fail for ever, and nobody own the volume.
    Raises BaseGone, also when the migration is over: nothing would let go of the pins.
    """
    if txn.value(TABLE, migration.hex()) is None:
        raise BaseGone(f"migration {shown_id(migration)} is over")
    _pin_states(txn, uuids, migration)


def _pin_states(txn: WriteTxn, uuids: Iterable[bytes], migration: bytes) -> None:
    for uuid in uuids:
        layer = txn.layer_by_uuid(uuid)
        if layer is None or layer.doomed or not all(part.complete for part in txn.chain(layer.id)):
            raise BaseGone(f"state {uuid.hex()} is not complete here any more")
        txn.pin(layer.id, migration.hex())


def _put_map(txn: WriteTxn, record: MigrationRecord, part: MapPart) -> None:
    """Note what the pages of a segment are."""
    segment = next(segment for segment in record.segments if segment.uuid == part.segment)
    layer = _layer(txn, segment.uuid)
    kinds = {PageKind.DATA: schema.REMOTE, PageKind.LOST: schema.REMOTE, PageKind.ZERO: schema.ZERO}
    spans = pages_for(segment.size)
    txn.put_map(
        layer.id,
        [(run.first, run.count, kinds[run.kind]) for run in part.runs],
        mapped=spans if part.next_page is None else min(part.next_page, spans),
    )
    lost = Extents((run.first, run.first + run.count) for run in part.runs if run.kind is PageKind.LOST)
    if lost:
        txn.mark_lost(layer.id, lost)


def free_name(reader: ReadTxn, wanted: str, uuid: bytes) -> str:
    """The name that a volume gets here: the wanted one, or `wanted.N` where another volume took it meanwhile."""
    taken = {volume.name for volume in reader.volumes() if volume.uuid != uuid}
    if wanted not in taken:
        return wanted
    stem = wanted[:120]
    return next(f"{stem}.{number}" for number in range(1, RENAMES_MAX) if f"{stem}.{number}" not in taken)


def names_of(record: MigrationRecord) -> list[str]:
    return [offer.name for offer in record.offered]


def names_peer(txn: ReadTxn, store_id: bytes) -> str | None:
    """Why a peer cannot be forgotten; None if no record needs it."""
    for record in stored(txn):
        if record.peer == store_id:
            return f"migration {shown_id(record.id)} is not over"
    for mine in txn.ownerships():
        if mine.peer == store_id.hex() and mine.role in (catalog.Role.CEDED, catalog.Role.INCOMING):
            return f"volume {mine.name or mine.uuid.hex()} is {mine.role.value}"
    return None
