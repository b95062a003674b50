"""States of volumes: what exports write, diffs compare and streams carry. Each says which layers it has to be held by.

Chosen in one transaction, from the arguments of a verb. A snapshot stands still; a volume's head is sealed first where
it goes on changing meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from silofs.blocks import PAGE
from silofs.layers.reader import ReadTxn
from silofs.layers.transaction import WriteTxn
from silofs.stream import Head
from silofs.verbs import Args, name_in, optional_name, owned


@dataclass(frozen=True)
class State:
    """A volume or snapshot as it was at one moment: what an export writes and a diff compares."""

    name: str  # as it was asked for: vm1, vm1@daily
    layer: int
    size: int  # bytes
    data_bytes: int

    @property
    def layers(self) -> set[int]:
        return {self.layer}


@dataclass(frozen=True)
class Pair:
    """Two states that are compared."""

    old: State
    new: State

    @property
    def layers(self) -> set[int]:
        return {self.old.layer, self.new.layer}


def state_of(txn: ReadTxn, name: str, snapshot: str | None, what: str) -> State:
    """That state of a volume; in a WriteTxn its head is sealed first, since it goes on changing."""
    volume = owned(txn, name, what)
    if snapshot is None:
        layer = txn.seal(volume.uuid).id if isinstance(txn, WriteTxn) else volume.head
        return State(name, layer, volume.size, volume.data_pages * PAGE)
    taken = txn.find_snapshot(volume.uuid, snapshot)
    return State(f"{name}@{snapshot}", taken.layer, taken.size, taken.data_pages * PAGE)


def exported(txn: ReadTxn, args: Args) -> State:
    """What an export is to write."""
    return state_of(txn, name_in(args, "volume"), optional_name(args, "snapshot"), "an export")


def compared(txn: ReadTxn, args: Args) -> Pair:
    """The two states of a diff. Without a second one the first one's volume as it is now."""
    name = name_in(args, "volume")
    other, other_snapshot = optional_name(args, "other") or name, optional_name(args, "other_snapshot")
    old = state_of(txn, name, name_in(args, "snapshot"), "a diff")
    return Pair(old, state_of(txn, other, other_snapshot, "a diff"))


@dataclass(frozen=True)
class Sent:
    """What a stream is to carry."""

    head: Head
    layer: int
    base: int  # layer; 0: the whole snapshot
    data_bytes: int

    @property
    def layers(self) -> set[int]:
        return {self.layer, self.base} - {0}


def sent(txn: ReadTxn, args: Args) -> Sent:
    """The snapshot that a stream is to carry, and the one that it is to be a change of; nothing may have changed."""
    name = name_in(args, "volume")
    volume = owned(txn, name, "an export")
    taken = txn.find_snapshot(volume.uuid, name_in(args, "snapshot"))
    layer = txn.layer(taken.layer)
    since, since_snapshot = optional_name(args, "since"), optional_name(args, "since_snapshot")
    if since is None or since_snapshot is None:
        head = Head(name, taken.name, layer.uuid, layer.size, taken.created_ns)
        return Sent(head, layer.id, 0, taken.data_pages * PAGE)
    older = txn.layer(txn.find_snapshot(owned(txn, since, "an export").uuid, since_snapshot).layer)
    head = Head(
        name,
        taken.name,
        layer.uuid,
        layer.size,
        taken.created_ns,
        base=older.uuid,
        base_name=f"{since}@{since_snapshot}",
        base_size=older.size,
    )
    return Sent(head, layer.id, older.id, 0)
