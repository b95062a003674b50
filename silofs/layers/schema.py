"""The format of a store: tables, keys, references, byte layouts and checksums. docs/format.md is this module in prose.

Everything else in the store goes through here. Integers in keys are big-endian, so that they sort; in values they are
little-endian. Two rules make damage visible: a checksum is seeded with the place that its bytes belong to, so that a
sound record in a wrong place fails as a torn one does; and whatever may be absent is recorded as present elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from silofs.blocks import PAGE
from silofs.errors import Damaged

FORMAT_VERSION: Final = 3
ENGINE: Final = "lmdb-0.9"  # which of the engines that py-lmdb bundles wrote the file: they cannot read each other's
ENGINE_MAJOR: Final = 0  # as lmdb.open(lib_version=) wants it

Refs = npt.NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview

U64: Final = Struct("<Q")
KEY: Final = Struct(">Q")
PAIR: Final = Struct(">QQ")


# Tables


@dataclass(frozen=True, slots=True, eq=False)  # compared and hashed by identity: it is looked up for every key
class Table:
    """One LMDB table. `number` seeds the checksums of its records and is never given to another table."""

    name: str
    number: int
    counted: bool = False  # a catalog table: State.rows says how many records it has
    key_bytes: int = 0  # length of every key; 0 = they differ
    since: int = 1  # the format version that brought it: older stores get it, empty, when they are opened


META: Final = Table("meta", 1)
OBJECT: Final = Table("object", 2, key_bytes=8)
PAGES: Final = Table("page", 3, key_bytes=8)
NAME: Final = Table("name", 4, key_bytes=8)
LIVE: Final = Table("live", 5, key_bytes=8)
LEAF: Final = Table("leaf", 6, key_bytes=16)
PRESENCE: Final = Table("presence", 7, key_bytes=16)
VOLUME: Final = Table("volume", 8, counted=True, key_bytes=16)
VOLUME_NAME: Final = Table("volume_name", 9, counted=True)
LAYER: Final = Table("layer", 10, counted=True, key_bytes=8)
LAYER_UUID: Final = Table("layer_uuid", 11, counted=True, key_bytes=16)
SNAPSHOT: Final = Table("snapshot", 12, counted=True)
OWNERSHIP: Final = Table("ownership", 13, counted=True, key_bytes=16)
PIN: Final = Table("pin", 14, counted=True)
DOOMED: Final = Table("doomed", 15, counted=True, key_bytes=8)
PEER: Final = Table("peer", 16, counted=True)
MIGRATION: Final = Table("migration", 17, counted=True)
OUTBOX: Final = Table("outbox", 18, counted=True)
HOST: Final = Table("host", 19, counted=True)
LEAF_SUM: Final = Table("leaf_sum", 20, key_bytes=16)
REQUEST: Final = Table("request", 21, counted=True, key_bytes=8, since=2)
CONTAINER: Final = Table("container", 22, key_bytes=8, since=2)
USE: Final = Table("use", 23, key_bytes=8, since=2)
USER: Final = Table("user", 24, key_bytes=24, since=2)
BLOCK: Final = Table("block", 25, key_bytes=32, since=2)
MERGE: Final = Table("merge", 26, counted=True, key_bytes=8, since=2)
VOID: Final = Table("void", 27, key_bytes=16, since=2)
CELL: Final = Table("cell", 28, key_bytes=8, since=3)
CELL_MAP: Final = Table("cell_map", 29, counted=True, key_bytes=8, since=3)

TABLES: Final = (
    META, OBJECT, PAGES, NAME, LIVE, LEAF, LEAF_SUM, PRESENCE, VOID, VOLUME, VOLUME_NAME, LAYER, LAYER_UUID, SNAPSHOT,
    OWNERSHIP, PIN, DOOMED, PEER, MIGRATION, OUTBOX, HOST, REQUEST, CONTAINER, USE, USER, BLOCK, MERGE, CELL, CELL_MAP,
)  # fmt: skip
VALUE_TABLES: Final = {table.name: table for table in (PEER, MIGRATION, OUTBOX, HOST)}

META_FORMAT: Final = b"format"
META_STATE: Final = b"state"


# References: what a leaf says of one page, in 56 bits. kind: bits 0-3, slot: bits 4-11, object id: bits 12-55.

HOLE: Final = 0  # not in this layer; the whole reference is 0
ZERO: Final = 1
DATA: Final = 2  # slot of an object
LONE: Final = 3  # a page with a record of its own
REMOTE: Final = 4  # still at a peer; the object field is the id of the layer that the page belongs to
LOST: Final = 5  # damaged and given up: an error until it is overwritten
PACKED: Final = 6  # slot of a container: 16 times the block's number in it, plus the page's in the block

STORED: Final = (DATA, LONE, PACKED)  # the kinds whose bytes are here

KIND_MASK: Final = 15
SLOT_SHIFT: Final = 4
SLOT_MASK: Final = 0xFF
OBJECT_SHIFT: Final = 12
REF_BYTES: Final = 7
OBJECT_ID_MAX: Final = (1 << 44) - 1
SLOT_STEP: Final = 1 << SLOT_SHIFT


def ref(kind: int, object_id: int = 0, slot: int = 0) -> int:
    return object_id << OBJECT_SHIFT | slot << SLOT_SHIFT | kind


def kind_of(reference: int) -> int:
    return reference & KIND_MASK


def slot_of(reference: int) -> int:
    return reference >> SLOT_SHIFT & SLOT_MASK


def object_of(reference: int) -> int:
    """The object's id; of a REMOTE reference the layer's."""
    return reference >> OBJECT_SHIFT


def kinds(refs: Refs) -> Refs:
    """The kind of every reference of an array."""
    return refs & np.uint64(KIND_MASK)


def stepping(refs: Refs) -> npt.NDArray[np.bool_]:
    """Which references go up by one slot a page in a run: DATA and PACKED, which differ in one bit."""
    found: npt.NDArray[np.bool_] = refs & np.uint64(KIND_MASK ^ DATA ^ PACKED) == DATA
    return found


def stored(refs: Refs) -> npt.NDArray[np.bool_]:
    """Which references are to bytes that are here."""
    found: npt.NDArray[np.bool_] = stepping(refs) | (kinds(refs) == LONE)
    return found


def count_data(refs: Refs) -> int:
    """How many references are neither hole nor zero: what `data_pages` counts."""
    return int(np.count_nonzero(refs > np.uint64(ZERO)))


# Checked records: an 8-byte checksum, then the payload.


def seed_of(table: Table, key: bytes) -> int:
    """What binds a record to its place."""
    return xxh3_64_intdigest(key, table.number)


def seal_record(table: Table, key: bytes, payload: Buffer) -> bytes:
    """The value to store for `payload`."""
    return U64.pack(xxh3_64_intdigest(payload, seed_of(table, key))) + payload


def open_record(table: Table, key: bytes, value: Buffer) -> memoryview:
    """The payload of a stored value; Damaged when its checksum is another's or wrong."""
    if len(value) >= 8:
        payload = memoryview(value)[8:]
        if xxh3_64_intdigest(payload, seed_of(table, key)) == U64.unpack_from(value)[0]:
            return payload
    raise Damaged(f"record {key.hex()} of table {table.name} does not match its checksum")


def stored_sum(value: Buffer) -> int:
    """The checksum in a stored record, unverified."""
    return int(U64.unpack_from(value)[0]) if len(value) >= U64.size else 0


def short_sum(value: Buffer) -> int:
    """32 bits of a stored record's checksum, never 0: what another record keeps to tell it from its older selves."""
    return (stored_sum(value) & 0xFFFFFFFF) or 1


# Objects: 31 pages behind a header, sized so that LMDB (16 bytes of its own before a large value) uses exactly 32 pages
# and every data page lies 4 KiB aligned in the file.

OBJECT_PAGES: Final = 31
OBJECT_PAGES_MIN: Final = 16  # fewer are stored as lone pages
HEADER_BYTES: Final = PAGE - 16
OBJECT_BYTES: Final = HEADER_BYTES + OBJECT_PAGES * PAGE
OBJECT_MAGIC: Final = b"SILOOBJ1"
HEADER: Final = Struct("<8sQII")  # magic, id, pages, reserved
SUMS_AT: Final = 32  # 31 checksums, one for each slot
SUMS: Final = [Struct(f"<{count}Q") for count in range(OBJECT_PAGES + 1)]
HEADER_SUM_AT: Final = HEADER_BYTES - 8


def page_sum(data: Buffer, object_id: int, slot: int) -> int:
    """Checksum of a page, bound to where it is stored."""
    return xxh3_64_intdigest(data, object_id << 8 | slot)


def page_sums(pages: Sequence[Buffer], object_id: int) -> list[int]:
    """`page_sum` of all slots of an object."""
    return list(map(xxh3_64_intdigest, pages, range(object_id << 8, (object_id << 8) + len(pages))))


def object_header(object_id: int, sums: list[int]) -> bytes:
    header = bytearray(HEADER_BYTES)
    HEADER.pack_into(header, 0, OBJECT_MAGIC, object_id, len(sums), 0)
    SUMS[len(sums)].pack_into(header, SUMS_AT, *sums)
    U64.pack_into(header, HEADER_SUM_AT, xxh3_64_intdigest(memoryview(header)[:HEADER_SUM_AT], object_id))
    return bytes(header)


def check_header(object_id: int, value: memoryview) -> int:
    """The number of pages in an object; Damaged when it is not that object, whole."""
    if len(value) == OBJECT_BYTES:
        magic, stored_id, pages, _ = HEADER.unpack_from(value)
        (stored_sum,) = U64.unpack_from(value, HEADER_SUM_AT)
        if (
            magic == OBJECT_MAGIC
            and stored_id == object_id
            and pages <= OBJECT_PAGES
            and stored_sum == xxh3_64_intdigest(value[:HEADER_SUM_AT], object_id)
        ):
            return int(pages)
    raise Damaged(f"object {object_id} has no sound header")


def with_sound_header(object_id: int, value: bytes) -> bytes:
    """An object whose header is damaged, with a new one over the pages that match their sums; Damaged if none does."""
    view = memoryview(value)
    if len(view) == OBJECT_BYTES:
        pages = [view[at : at + PAGE] for at in range(HEADER_BYTES, OBJECT_BYTES, PAGE)]
        stored = list(SUMS[OBJECT_PAGES].unpack_from(view, SUMS_AT))
        sound = [stored[slot] == sum_ for slot, sum_ in enumerate(page_sums(pages, object_id))]
        if any(sound):
            count = OBJECT_PAGES - sound[::-1].index(True)
            return object_header(object_id, stored[:count]) + value[HEADER_BYTES:]
    raise Damaged(f"object {object_id} has no sound header")


def object_page(object_id: int, slot: int, value: memoryview) -> memoryview:
    """One page of an object's value, verified."""
    if len(value) == OBJECT_BYTES and slot < OBJECT_PAGES:
        at = HEADER_BYTES + slot * PAGE
        page = value[at : at + PAGE]
        if xxh3_64_intdigest(page, object_id << 8 | slot) == U64.unpack_from(value, SUMS_AT + 8 * slot)[0]:
            return page
    raise Damaged(f"page {slot} of object {object_id} does not match its checksum")


# Cells: places of one size in a file beside LMDB's, for an object each, which lies behind a pad of 16 bytes so that its
# pages are aligned there as well. Which cell an object has, by its id; which cells are in use, 1 GiB to a record.

CELL_PAD: Final = 16
CELL_BYTES: Final = CELL_PAD + OBJECT_BYTES
MAP_SHIFT: Final = 13
MAP_CELLS: Final = 1 << MAP_SHIFT
MAP_BYTES: Final = MAP_CELLS // 8


def cell_record(key: bytes, cell: int) -> bytes:
    """The record that says which cell an object has."""
    return seal_record(CELL, key, U64.pack(cell))


def open_cell(key: bytes, value: Buffer) -> int:
    """The cell of an object."""
    payload = open_record(CELL, key, value)
    if len(payload) != U64.size:
        raise Damaged(f"cell record {key.hex()} has a wrong length")
    return int(U64.unpack(payload)[0])


# Lone pages: the first 4080 bytes are the record (with LMDB's 16 exactly one page); the rest is in the name.

LONE_BYTES: Final = PAGE - 16


# Names: which leaf entry each slot is stored for.

NAME_HEAD: Final = Struct("<II")  # slots, kind
NAME_ENTRY: Final = Struct("<QQ")  # layer, page
LONE_NAME: Final = Struct("<IIQQQ16s")  # 1, LONE, layer, page, checksum of the page, its last 16 bytes


def object_names(first_id: int, layer: int | Sequence[int], pages: Sequence[int]) -> list[tuple[bytes, bytes]]:
    """The name records, (key, value), of the objects `first_id`, `first_id` + 1, … that have 31 of these pages each.

    `layer`: of all pages, or one for each.
    """
    entries = np.empty((len(pages), 2), np.uint64)
    entries[:, 0] = layer
    entries[:, 1] = pages
    packed = entries.tobytes()
    step = OBJECT_PAGES * NAME_ENTRY.size
    names = []
    for object_id, at in enumerate(range(0, len(packed), step), first_id):
        key, some = KEY.pack(object_id), packed[at : at + step]
        names.append((key, seal_record(NAME, key, NAME_HEAD.pack(len(some) // NAME_ENTRY.size, DATA) + some)))
    return names


def object_refs(first_id: int, count: int) -> Refs:
    """The references to so many pages in the slots of the objects `first_id`, `first_id` + 1, …, 31 to each."""
    objects, slots = np.divmod(np.arange(count, dtype=np.uint64), np.uint64(OBJECT_PAGES))
    return (objects + np.uint64(first_id)) << np.uint64(OBJECT_SHIFT) | slots << np.uint64(SLOT_SHIFT) | np.uint64(DATA)


def open_name(key: bytes, value: Buffer) -> list[tuple[int, int]]:
    """(layer, page) of every slot."""
    payload = open_record(NAME, key, value)
    count, kind = NAME_HEAD.unpack_from(payload)
    if kind == LONE and len(payload) == LONE_NAME.size:
        return [NAME_ENTRY.unpack_from(payload, NAME_HEAD.size)]
    if kind != DATA or len(payload) != NAME_HEAD.size + count * NAME_ENTRY.size:
        raise Damaged(f"name {key.hex()} is of no known form")
    return list(NAME_ENTRY.iter_unpack(payload[NAME_HEAD.size :]))


def lone_name(key: bytes, object_id: int, layer: int, page: int, data: Buffer) -> bytes:
    payload = LONE_NAME.pack(1, LONE, layer, page, page_sum(data, object_id, 0), bytes(data[LONE_BYTES:]))
    return seal_record(NAME, key, payload)


def renamed(key: bytes, value: Buffer, layer: int, slots: Iterable[tuple[int, int]]) -> bytes:
    """The name record with some (slot, page) as that layer's."""
    payload = bytearray(open_record(NAME, key, value))
    for slot, page in slots:
        NAME_ENTRY.pack_into(payload, NAME_HEAD.size + slot * NAME_ENTRY.size, layer, page)
    return seal_record(NAME, key, payload)


def lone_page(key: bytes, object_id: int, value: Buffer, name: Buffer) -> bytes:
    """A lone page put together from its two records, verified."""
    payload = open_record(NAME, key, name)
    if len(payload) == LONE_NAME.size and len(value) == LONE_BYTES:
        _, kind, _, _, stored_sum, tail = LONE_NAME.unpack(payload)
        data: bytes = b"".join((value, tail))
        if kind == LONE and page_sum(data, object_id, 0) == stored_sum:
            return data
    raise Damaged(f"lone page {object_id} does not match its checksum")


# Live slots: one record for 256 consecutive object ids, a 32-bit bitmap of slots for each.

LIVE_SHIFT: Final = 8
LIVE_OBJECTS: Final = 1 << LIVE_SHIFT
FULL_MASK: Final = (1 << OBJECT_PAGES) - 1


# Presence: which leaves a layer has, a bit each, 8192 to a record (bit i of byte i >> 3).

CHUNK_SHIFT: Final = 13
CHUNK_LEAVES: Final = 1 << CHUNK_SHIFT
CHUNK_BYTES: Final = CHUNK_LEAVES // 8


# Voids: which leaves of a layer are zero throughout, whatever is in them or below, and which of these are still to be
# settled: two bitmaps of a presence bitmap's form, one after the other.

VOID_BYTES: Final = 2 * CHUNK_BYTES


# Leaf sums: the short checksum of every leaf record, 256 to a record. A page of LMDB's that is older than what leads to
# it holds sound records of the past; this is what tells them from those of now.

SUM_SHIFT: Final = 8
SUM_LEAVES: Final = 1 << SUM_SHIFT


def leaf_key(layer: int, leaf: int) -> bytes:
    """Key of a leaf; of a presence, void or leaf sum record with its number in place of the leaf's."""
    return PAIR.pack(layer, leaf)
