"""The transactions of a stream's import; nothing is seen of it before all of it is there.

What arrives goes into a layer that nothing shows, under the uuid that names the snapshot's content, on the layer of the
state that it changes. The layer is pinned, and a record says for whom: so an import that was interrupted keeps what is
durable, and the next one stores only what is missing. The end of the stream, verified, is one transaction: the volume
shows the layer, the snapshot has its name, pin and record are gone. Between the two stream_fill.py stores pages;
docs/stream.md has what a crash leaves.
"""

from __future__ import annotations

import os
import time

import msgspec

from silofs import arriving, stream
from silofs.arriving import Arriving
from silofs.blocks import pages_for
from silofs.errors import Busy, Exists, NoSuchSnapshot, NoSuchVolume, TryAgain, UserError
from silofs.facts import Facts, Fields, View
from silofs.layers.catalog import Volume
from silofs.layers.transaction import WriteTxn
from silofs.stream import Head
from silofs.verbs import Args, name_in, receiving


class Target(msgspec.Struct, frozen=True):
    """Where a stream goes. `layer` 0: the store has that content already, and nothing is stored."""

    head: Head
    name: str
    onto: bool
    layer: int
    base: int = 0  # layer


def begin(txn: WriteTxn, args: Args, head: Head, view: View) -> Target:
    """Check that the stream fits, and make or find the layer for it. Raises Busy (with what to do), Exists."""
    name, onto = name_in(args, "name"), args.get("onto") is True
    arriving.forget_old(txn)
    if onto:
        volume = receiving(txn, name, view)
        if txn.unchanged(volume.uuid) == head.uuid and _named(txn, volume, head):
            return Target(head, name, onto, 0)
        base = _base(txn, volume, head)
        if any(snapshot.name == head.snapshot for snapshot in txn.snapshots(volume.uuid)):
            raise Exists(f"{name} has a snapshot '{head.snapshot}', and it is another state", hint="remove it first")
    else:
        if head.base:
            hint = f"silofs import --onto NAME brings a volume from {head.base_name} to {head.name}"
            raise UserError(f"the stream has only what changed since {head.base_name}", hint=hint)
        if any(volume.name == name for volume in txn.volumes()):
            raise Exists(f"there is a volume {name!r} already")
        base = 0
    return Target(head, name, onto, _layer(txn, name, head, base), base)


def _base(txn: WriteTxn, volume: Volume, head: Head) -> int:
    """The layer of the state that the stream changes, which the volume has to be at."""
    if not head.base:
        raise UserError(f"the stream has all of {head.name}", hint="silofs import FILE NAME makes a volume of it")
    layer = txn.layer_by_uuid(head.base)
    if layer is None or not any(each.id == layer.id for each in txn.chain(volume.head)):
        hint = "export the whole snapshot, or what changed since one that is here: silofs info shows them"
        raise Busy(f"{volume.name} has never been at {head.base_name}", hint=hint)
    if txn.unchanged(volume.uuid) != head.base:
        names = [each.name for each in txn.snapshots(volume.uuid) if each.layer == layer.id]
        back = f"silofs rollback {volume.name}@{names[0]} --yes" if names else "a rollback to that state"
        hint = f"{back} goes back there; what was written since is lost then"
        raise Busy(f"{volume.name} is not at {head.base_name} any more: it was changed since", hint=hint)
    return layer.id


def _named(txn: WriteTxn, volume: Volume, head: Head) -> bool:
    try:
        found = txn.find_snapshot(volume.uuid, head.snapshot)
    except NoSuchSnapshot:
        return False
    return txn.layer(found.layer).uuid == head.uuid


def _layer(txn: WriteTxn, name: str, head: Head, base: int) -> int:
    """The layer that the stream is stored in, as an earlier attempt left it; 0 if the content is here."""
    key, header = arriving.key_of(head.uuid), stream.header_of(head)
    known, record = txn.layer_by_uuid(head.uuid), arriving.found(txn).get(key)
    if record is not None and (record.header != header or record.name != name):
        arriving.forget(txn, key, record.layer)
        known, record = txn.layer_by_uuid(head.uuid), None
    if known is not None and known.doomed:
        raise TryAgain(f"what is left of an older import of {head.name} is being removed", hint="try again soon")
    if known is not None and record is None:
        if any(not layer.complete for layer in txn.chain(known.id)):
            raise Busy(f"{head.name} is arriving here in another way", hint="silofs migration ls")
        return 0
    layer = txn.receive_layer(head.uuid, base, head.size, head.clip)
    txn.pin(layer.id, key)
    if record is None:
        arriving.put(txn, key, Arriving(name, header, layer.id, time.time_ns()))
    return layer.id


def abandon(txn: WriteTxn, args: Args, view: View) -> Fields:
    """Drop what interrupted imports have stored for a volume."""
    name = name_in(args, "name")
    if not any(record.name == name for record in arriving.found(txn).values()):
        raise NoSuchVolume(f"no import of {name!r} was interrupted", hint="there is nothing to abandon")
    return {"name": name, "bytes_dropped": arriving.forget_of(txn, name)}


def publish(txn: WriteTxn, target: Target, view: View) -> Fields:
    """The end: the volume is at the new state, and its snapshot has its name. Raises Busy as `begin` does."""
    head = target.head
    if target.onto:
        volume = receiving(txn, target.name, view)
        if txn.unchanged(volume.uuid) == head.uuid and _named(txn, volume, head):
            return Facts(txn, view).info(volume)
        _base(txn, volume, head)
    layer = txn.layer_by_uuid(head.uuid)
    if layer is None or layer.doomed:
        raise TryAgain(f"{head.name} was removed meanwhile", hint="send it again")
    if target.layer:
        layer = txn.put_map(layer.id, [], mapped=pages_for(head.size))
    if target.onto:
        volume = txn.rollback(volume.uuid, layer.id)
    else:
        volume = txn.create_volume(target.name, head.size, uid=os.geteuid(), gid=os.getegid(), parent=layer.id)
    txn.add_snapshot(volume.uuid, head.snapshot, layer.id, created_ns=head.created_ns)
    arriving.forget(txn, arriving.key_of(head.uuid), layer.id)
    return Facts(txn, view).info(txn.volume(volume.uuid))
