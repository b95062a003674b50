"""The records of the store's catalog and the tables they live in (docs/format.md, "Catalog").

A record is msgpack of one of these structs, as an array: fields are only ever appended, with defaults. Its checksum
covers the table's name and the key, so that a record found in another's place is damage, not an answer.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import TypeVar

import msgspec

from silofs.blocks import pages_for
from silofs.errors import Damaged
from silofs.layers.records import Mark
from silofs.layers.schema import KEY, Buffer, Table, open_record, seal_record


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Base of all catalog records."""


R = TypeVar("R", bound=Record)

UNCOUNTED = -1
"""Layer.data_pages before anyone asked for it."""


class Volume(Record, frozen=True, array_like=True):
    """One image file. Key: its uuid."""

    uuid: bytes
    name: str
    head: int  # id of the one writable layer
    size: int  # bytes
    inode: int
    created_ns: int
    mtime_ns: int
    uid: int
    gid: int
    mode: int  # permission bits
    applied_lsn: int = 0  # records of the write log at or below it are in the store
    data_pages: int = 0  # pages that are neither hole nor zero, resolved through the chain; remote and lost ones count
    orphan: bool = False  # removed while it was open: it has no name, and goes with its last handle


class Layer(Record, frozen=True, array_like=True):
    """One copy-on-write layer. Key: its id, which is local and never used again."""

    id: int
    parent: int  # id; 0 = none
    size: int  # bytes: of the volume now (head), or when it was sealed
    clip: int  # bytes: the smallest size it ever had; what lies below reads as zero beyond it
    uuid: bytes = b""  # names the content of the chain at this point; drawn when it is sealed
    sealed: bool = False
    leaves: int = 0  # leaf records
    chunks: bytes = b""  # u32 of every presence chunk: 0, or the short checksum of its record; no trailing zeros
    own_pages: int = 0  # entries DATA, LONE or PACKED: pages that this layer has here
    remote_pages: int = 0  # entries REMOTE: still at a peer
    lost_pages: int = 0  # entries LOST
    mapped: int = 0  # pages from 0 whose state is known; less than the size spans only while a map is being received
    children: int = 0  # layers whose parent this is
    snapshots: int = 0  # snapshots that name it
    pins: int = 0  # migrations that hold it
    data_pages: int = UNCOUNTED  # of the chain resolved from here, as in Volume; set when it is sealed or first shown
    depth: int = 1  # a rank, more than the parent's: the layers from here to the base, and those merged since
    doomed: bool = False  # nothing reaches it; its leaves are being removed in bounded steps
    kept_ns: int = 0  # until then it is not merged: a volume that goes back where it came from is sent from it
    packed: int = 0  # leaves below this number have been packed as far as that is worth it
    voids: bytes = b""  # as `chunks`, of its void records
    unsettled: int = 0  # void leaves whose entries are still stored, and what they covered still counted

    @property
    def complete(self) -> bool:
        """Whether the state of every page is known and every page is here and sound."""
        return self.mapped >= pages_for(self.size) and not self.remote_pages and not self.lost_pages

    @property
    def merging(self) -> bool:
        """Whether it is the lower layer of a merge: its content is on the move, and nothing may name it."""
        return self.sealed and not self.uuid and not self.doomed

    @property
    def referenced(self) -> bool:
        """Whether anything but a volume's head keeps it."""
        return bool(self.children or self.snapshots or self.pins)


class Snapshot(Record, frozen=True, array_like=True):
    """A name for a sealed chain. Key: volume uuid + name."""

    volume: bytes
    name: str
    layer: int
    size: int
    created_ns: int
    inode: int
    data_pages: int


class Role(StrEnum):
    """What this store is to a volume (docs/protocol.md)."""

    NONE = "none"
    OWNER = "owner"
    INCOMING = "incoming"
    CEDED = "ceded"
    RETIRED = "retired"
    FENCED = "fenced"


class Ownership(Record, frozen=True, array_like=True):
    """Who may write a volume, as far as this store knows. Key: volume uuid. Kept for ever: a tombstone at the end."""

    uuid: bytes
    role: Role
    epoch: int
    offered_epoch: int = 0
    peer: str = ""
    migration: str = ""
    last_lsn: int = 0  # of the volume, when it was ceded
    generation: int = 0
    lineage: str = ""
    layer: bytes = b""  # uuid of the sealed final layer, when ceded
    name: str = ""  # of the volume, when it left: what a tombstone is shown as
    changed_ns: int = 0


class Way(StrEnum):
    """How two layers are put together (docs/background.md)."""

    UP = "up"
    DOWN = "down"
    SHED = "shed"


class Merge(Record, frozen=True, array_like=True):
    """Two layers that become one. Key: id of the lower one, which has no uuid meanwhile."""

    lower: int
    upper: int
    way: Way


class Pin(Record, frozen=True, array_like=True):
    """Holds a layer against deletion. Key: layer id + name of the holder."""

    layer: int
    holder: str


class Value(Record, frozen=True, array_like=True):
    """An opaque value that another part of silofs keeps in the store (peers, migrations, outbox, host)."""

    data: bytes


class State(Record, frozen=True, array_like=True):
    """The store's counters; one record, rewritten by nearly every transaction."""

    next_object: int = 1
    next_layer: int = 1
    next_inode: int = 2  # 1 is the mount's root
    lsn: int = 0  # the highest applied one of any volume, deleted ones included
    txn: int = 0  # id of the transaction that wrote this record, and with it all others
    catalog: int = 0  # all checksums of catalog records, XORed
    opens: int = 0
    rows: dict[str, int] = {}  # records per catalog table: what proves that one is not there
    journal: int = 0  # id of the journal that has what came after; 0 = none has
    mark: Mark = Mark(0, 0, 0)  # where it is replayed from: everything before is in the store
    unsettled: int = 0  # void leaves of all layers that are still to be settled


# Keys and values


def layer_key(layer: int) -> bytes:
    return KEY.pack(layer)


def snapshot_key(volume: bytes, name: str) -> bytes:
    return volume + name.encode()


def pin_key(layer: int, holder: str) -> bytes:
    return KEY.pack(layer) + holder.encode()


@cache
def _decoder(kind: type[R]) -> msgspec.msgpack.Decoder[R]:
    return msgspec.msgpack.Decoder(kind)


def encode(table: Table, key: bytes, record: Record) -> bytes:
    """The value to store for a record."""
    return seal_record(table, key, msgspec.msgpack.encode(record))


def decode(table: Table, key: bytes, value: Buffer, kind: type[R]) -> R:
    """The record of a stored value; Damaged when it is not one, or another's."""
    payload = open_record(table, key, value)
    try:
        record: R = _decoder(kind).decode(payload)
    except msgspec.MsgspecError as error:
        raise Damaged(f"record {key.hex()} of table {table.name} cannot be read: {error}") from error
    return record
