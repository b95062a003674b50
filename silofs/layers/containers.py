"""Containers: up to 16 blocks of up to 16 pages, compressed or as they are, in one value of the size of an object.

A block is what packing works on: the data pages of 64 KiB of a volume, as a mask of 16 bits and the pages in order. It
is found again by a cryptographic hash of both. One that does not get smaller by a fifth is stored as it is, and may
then be cut in two pieces in two containers, since two whole ones do not fit into one. The slot of a page is its block's
number in the container times 16, plus its place in the 64 KiB; its checksum is bound to container and slot as that of
an object's page is. Pure but for the compressors, of which every thread has its own. docs/format.md has the layout.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

import zstandard
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from silofs.blocks import PAGE, PAGE_SHIFT
from silofs.errors import Damaged
from silofs.layers.schema import (
    BLOCK,
    HEADER_BYTES,
    HEADER_SUM_AT,
    OBJECT_BYTES,
    SLOT_SHIFT,
    U64,
    Buffer,
    open_record,
    page_sum,
)

BLOCK_SHIFT: Final = 4
BLOCK_PAGES: Final = 1 << BLOCK_SHIFT
BLOCK_MASK: Final = BLOCK_PAGES - 1
BLOCKS_MAX: Final = 16
SLOTS: Final = BLOCKS_MAX * BLOCK_PAGES
ROOM: Final = OBJECT_BYTES - HEADER_BYTES
FULL: Final = (1 << BLOCK_PAGES) - 1

RAW: Final = 0
ZSTD: Final = 1
LEVEL: Final = 1  # of zstd: 3 makes blocks 4 % smaller and takes half as long again (docs/decisions/packing.md)
WORTH: Final = 0.8  # a block is compressed when that leaves this much of it at most

MAGIC: Final = b"SILOPAK1"
HEADER: Final = Struct("<8sQII")  # magic, id, blocks, reserved
ENTRY: Final = Struct("<32sHBxII")  # hash, pages, codec, offset in the value, length
ENTRIES_AT: Final = HEADER.size
SUMS_AT: Final = ENTRIES_AT + BLOCKS_MAX * ENTRY.size  # a checksum for each of the 256 slots, 0 where there is no page
PLACE: Final = Struct("<QB")  # in the index: container, block in it
NO_HASH: Final = bytes(32)
"""Of a piece that nobody may find: not a whole block as a volume had it."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block on its way into a container: `pages` says which of its 16 are in `plain`; `packed` is worth using.

    `anew`: it is in the store, and cannot be read there.
    """

    hash: bytes
    pages: int
    plain: Buffer
    packed: bytes | None = None
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What a container gets: a block, or some pages of one that is stored as it is. `block` is its number in a list."""

    block: int
    hash: bytes
    pages: int
    codec: int
    stored: Buffer
    plain: Buffer


@dataclass(frozen=True, slots=True)
class Entry:
    """What a container's header says of one of its blocks."""

    hash: bytes
    pages: int
    codec: int
    offset: int
    length: int


class _Tools(threading.local):
    """zstandard's objects must not be used by two threads at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False, write_checksum=False)
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


def hash_block(pages: int, plain: Buffer) -> bytes:
    """What a block is found by: blake3 of its mask and its pages."""
    return blake3(pages.to_bytes(2, "little")).update(plain).digest()


def prepare(pages: int, plain: Buffer, digest: bytes | None = None, *, anew: bool = False) -> Block:
    """A block ready to be stored. Any thread; most of the time without the interpreter's lock."""
    assert 0 < pages <= FULL and len(plain) == pages.bit_count() * PAGE, "a block is a mask and its pages"
    packed: bytes | None = _tools.compressor.compress(plain)
    if packed is not None and len(packed) > WORTH * len(plain):
        packed = None
    return Block(hash_block(pages, plain) if digest is None else digest, pages, plain, packed, anew)


# Filling containers


class _Bin:
    __slots__ = ("free", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.free = ROOM

    def takes(self, length: int) -> bool:
        return len(self.pieces) < BLOCKS_MAX and length <= self.free

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.free -= len(piece.stored)


OPEN: Final = 4  # containers that are filled at a time: what does not fit into one may fit into another


def place(blocks: Sequence[Block]) -> list[list[Piece]]:
    """The blocks by container. Neighbours mostly stay together, so that leaves have long runs."""
    bins: list[_Bin] = []

    def room(length: int) -> _Bin:
        for each in bins[-OPEN:]:
            if each.takes(length):
                return each
        bins.append(_Bin())
        return bins[-1]

    for number, block in enumerate(blocks):
        if block.packed is not None:
            packed = Piece(number, block.hash, block.pages, ZSTD, block.packed, block.plain)
            room(len(packed.stored)).add(packed)
            continue
        pages, plain = block.pages, memoryview(block.plain)
        cut = _cut(bins[-OPEN:], len(plain))
        if cut is not None:
            fits = cut.free >> PAGE_SHIFT
            lower = _lowest(pages, fits)
            size = fits << PAGE_SHIFT
            cut.add(Piece(number, block.hash, lower, RAW, plain[:size], plain[:size]))
            pages, plain = pages & ~lower, plain[size:]
        room(len(plain)).add(Piece(number, block.hash, pages, RAW, plain, plain))
    return [each.pieces for each in bins]


def _cut(bins: Sequence[_Bin], length: int) -> _Bin | None:
    """The container that takes the first part of a block which none takes whole."""
    if any(each.takes(length) for each in bins):
        return None
    fitting = [each for each in bins if each.takes(PAGE)]
    return max(fitting, key=lambda each: each.free, default=None)


def _lowest(pages: int, count: int) -> int:
    """The lowest `count` bits of a mask."""
    low = 0
    for _ in range(count):
        low |= (pages ^ low) & -(pages ^ low)
    return low


def worth(pieces: Sequence[Piece]) -> bool:
    """Whether a container takes less than its pages would on their own, or nearly; else they stay on their own."""
    return sum(len(piece.plain) for piece in pieces) >= ROOM * 3 // 4


def container(container_id: int, pieces: Sequence[Piece]) -> bytes:
    """A container's value. Pieces as they are lie first, 4 KiB aligned in the file; slots go by the given order."""
    value = bytearray(OBJECT_BYTES)
    HEADER.pack_into(value, 0, MAGIC, container_id, len(pieces), 0)
    at = HEADER_BYTES
    offsets = {}
    for number in sorted(range(len(pieces)), key=lambda number: pieces[number].codec):
        stored = pieces[number].stored
        value[at : at + len(stored)] = stored
        offsets[number] = at
        at += len(stored)
    assert at <= OBJECT_BYTES and len(pieces) <= BLOCKS_MAX, "a container was filled too far"
    for number, piece in enumerate(pieces):
        fields = piece.hash, piece.pages, piece.codec, offsets[number], len(piece.stored)
        ENTRY.pack_into(value, ENTRIES_AT + number * ENTRY.size, *fields)
        plain = memoryview(piece.plain)
        for index, slot in enumerate(slots_of(number, piece.pages)):
            page = plain[index << PAGE_SHIFT : (index + 1) << PAGE_SHIFT]
            U64.pack_into(value, SUMS_AT + 8 * slot, page_sum(page, container_id, slot))
    U64.pack_into(value, HEADER_SUM_AT, xxh3_64_intdigest(memoryview(value)[:HEADER_SUM_AT], container_id))
    return bytes(value)


def slots_of(number: int, pages: int) -> list[int]:
    """The slots of a block's pages, ascending."""
    return [number << BLOCK_SHIFT | at for at in range(BLOCK_PAGES) if pages >> at & 1]


# Reading


def read_places(key: bytes, value: Buffer) -> list[tuple[int, int]]:
    """(container, block in it) of the pieces of a block in the index."""
    payload = open_record(BLOCK, key, value)
    if not payload or len(payload) % PLACE.size:
        raise Damaged(f"block {key.hex()} has a wrong length")
    return list(PLACE.iter_unpack(payload))


def check_container(container_id: int, value: memoryview) -> int:
    """The number of blocks; Damaged when it is not that container, with a whole header."""
    if len(value) == OBJECT_BYTES:
        magic, stored_id, blocks, _ = HEADER.unpack_from(value)
        (stored_sum,) = U64.unpack_from(value, HEADER_SUM_AT)
        if (
            magic == MAGIC
            and stored_id == container_id
            and blocks <= BLOCKS_MAX
            and stored_sum == xxh3_64_intdigest(value[:HEADER_SUM_AT], container_id)
        ):
            return int(blocks)
    raise Damaged(f"container {container_id} has no sound header")


def entries(container_id: int, value: memoryview) -> list[Entry]:
    """What the header says of each block."""
    blocks = check_container(container_id, value)
    return [_entry(container_id, number, value) for number in range(blocks)]


def entry(container_id: int, number: int, value: memoryview) -> Entry:
    """What the header says of one block; Damaged when there is none, or sizes cannot be."""
    if number >= check_container(container_id, value):
        raise Damaged(f"container {container_id} has no block {number}")
    return _entry(container_id, number, value)


def _entry(container_id: int, number: int, value: memoryview) -> Entry:
    found = Entry(*ENTRY.unpack_from(value, ENTRIES_AT + number * ENTRY.size))
    size = found.pages.bit_count() << PAGE_SHIFT
    sound = size and found.offset >= HEADER_BYTES and found.offset + found.length <= OBJECT_BYTES
    if not sound or not (found.length == size if found.codec == RAW else found.codec == ZSTD and found.length < size):
        raise Damaged(f"block {number} of container {container_id} cannot be")
    return found


def plain_pages(container_id: int, number: int, found: Entry, value: memoryview) -> memoryview:
    """A block's pages in order, every one verified. Takes as much memory as they have, whatever is stored."""
    stored = value[found.offset : found.offset + found.length]
    size = found.pages.bit_count() << PAGE_SHIFT
    plain: Buffer = stored
    if found.codec == ZSTD:
        try:
            # A frame that says how large it is would be believed: ours do not say.
            if zstandard.get_frame_parameters(stored).content_size == zstandard.CONTENTSIZE_UNKNOWN:
                plain = _tools.decompressor.decompress(stored, max_output_size=size)
        except zstandard.ZstdError as error:
            raise Damaged(f"block {number} of container {container_id} cannot be unpacked: {error}") from error
    if len(plain) != size:
        raise Damaged(f"block {number} of container {container_id} has a wrong size")
    view = memoryview(plain)
    for index, slot in enumerate(slots_of(number, found.pages)):
        if not _page_sound(container_id, slot, view[index << PAGE_SHIFT : (index + 1) << PAGE_SHIFT], value):
            raise Damaged(f"page {slot} of container {container_id} does not match its checksum")
    return view


def raw_pages(container_id: int, slot: int, count: int, found: Entry, value: memoryview) -> memoryview:
    """Consecutive pages of a block that is stored as it is, each verified."""
    size = found.pages.bit_count() << PAGE_SHIFT
    pages = cut(container_id, slot, count, (found.pages, value[found.offset : found.offset + size]))
    for index in range(count):
        if not _page_sound(container_id, slot + index, pages[index << PAGE_SHIFT : (index + 1) << PAGE_SHIFT], value):
            raise Damaged(f"page {slot + index} of container {container_id} does not match its checksum")
    return pages


Unpacked = tuple[int, memoryview]
"""Which of a block's 16 pages there are, and their bytes in order."""


def some_pages(container_id: int, number: int, found: Entry, value: memoryview, wanted: int) -> bytes:
    """The pages of a block that are in a mask, in order, each verified. Of one that is stored as it is no other page is

    looked at: what nothing refers to may be damaged.
    """
    if found.codec == RAW:
        slots = slots_of(number, wanted)
        return b"".join(raw_pages(container_id, slot, 1, found, value) for slot in slots)
    plain = plain_pages(container_id, number, found, value)
    slots = slots_of(0, wanted)
    return b"".join(cut(container_id, slot, 1, (found.pages, plain)) for slot in slots)


def cut(container_id: int, slot: int, count: int, unpacked: Unpacked) -> memoryview:
    """Consecutive pages out of a block; Damaged when it does not have them."""
    pages, plain = unpacked
    at = slot & BLOCK_MASK
    wanted = ((1 << count) - 1) << at
    if pages & wanted != wanted or wanted > FULL:
        raise Damaged(f"container {container_id} has no pages {slot} to {slot + count - 1}")
    first = (pages & ((1 << at) - 1)).bit_count() << PAGE_SHIFT
    return plain[first : first + (count << PAGE_SHIFT)]


def same_block(ref: int, other: int) -> bool:
    """Whether two references are to pages of one block of one container."""
    return ref >> SLOT_SHIFT + BLOCK_SHIFT == other >> SLOT_SHIFT + BLOCK_SHIFT


def _page_sound(container_id: int, slot: int, page: memoryview, value: memoryview) -> bool:
    return page_sum(page, container_id, slot) == int(U64.unpack_from(value, SUMS_AT + 8 * slot)[0])
