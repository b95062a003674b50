"""Records of the write log: how one looks in a ring, and the walk that finds them again.

A ring is a memfd's (silofs/layers/log.py) or a journal file's, which has the same records at the same places
(silofs/layers/journal.py); both are read back by `walk`, and by nothing else.

A record is a header of 128 bytes and a payload padded to 64. The payload is copied first and the header last, and the
header's checksum covers both, so any prefix of these stores is either the whole record or none. A record never wraps:
where it does not fit, a WRAP record (or less than a header's room) ends the lap.

What keeps a leftover from being replayed: each record carries its lap and a store-wide sequence number (LSN) without
gaps, and the walk accepts exactly the next one. The checksums are seeded with a secret drawn when the log was made, so
that bytes which a guest wrote cannot pass for a record when they lie where the next header is expected.

What tells a torn end from a damaged one: each record carries `synced`, the LSN below which all was durable when it was
appended (silofs/layers/ending.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest as checksum

from silofs.errors import BadFormat
from silofs.limits import LOG_RECORD_MAX

Buffer = bytes | bytearray | memoryview

RECORD_VERSION: Final = 1
RECORD_MAGIC: Final = 0x474F4C53  # "SLOG"

WRITE: Final = 1  # `length` bytes of payload at `offset`
ZERO: Final = 2  # `length` zero bytes at `offset`; no payload
WRAP: Final = 3  # the lap ends here
EXTEND: Final = 4  # as WRITE, and the volume is at least `offset + length` long from here on
_KINDS: Final = (WRITE, ZERO, WRAP, EXTEND)

HEADER: Final = 128
ALIGN: Final = 64

# magic, version, kind, lap, lsn, prev, uuid, epoch, offset, length, payload sum, synced (0 in records of early daemons)
_RECORD = Struct("<IHHQQQ16sQQQQQ32x")
_SUM = Struct("<Q")
assert _RECORD.size + _SUM.size == HEADER


class Mark(NamedTuple):
    """A place in a ring: everything before it has lower LSNs than `lsn`, which is that of the record expected there."""

    lap: int
    position: int
    lsn: int


class Record(NamedTuple):
    """One record that was found. `position` is where its payload begins in the ring (of WRITE and EXTEND)."""

    kind: int
    lsn: int
    prev_lsn: int
    uuid: bytes
    epoch: int
    offset: int
    length: int
    position: int


class Header(NamedTuple):
    """A sound header, wherever it was found: of a record that belongs there, or a leftover."""

    version: int
    lap: int
    synced: int
    payload_sum: int
    record: Record

    @property
    def place(self) -> tuple[int, int]:
        """(lap, position): places of a ring in the order in which they are written."""
        return self.lap, self.record.position - HEADER


def header(
    secret: int,
    kind: int,
    lap: int,
    lsn: int,
    prev_lsn: int,
    uuid: bytes,
    epoch: int,
    offset: int,
    length: int,
    payload: Buffer,
    synced: int,
) -> bytes:
    """The 128 bytes that stand before a payload."""
    fields = _RECORD.pack(
        RECORD_MAGIC,
        RECORD_VERSION,
        kind,
        lap,
        lsn,
        prev_lsn,
        uuid,
        epoch,
        offset,
        length,
        checksum(payload, secret),
        synced,
    )
    return fields + _SUM.pack(checksum(fields, secret))


def span(start: Mark, end: Mark, ring_bytes: int) -> int:
    """Bytes of the ring between two marks."""
    return (end.lap - start.lap) * ring_bytes + end.position - start.position


def walk(ring: memoryview, secret: int, start: Mark) -> Iterator[tuple[Record, Mark]]:
    """Every record from a mark on, WRAPs included, each with the mark after it; ends where the next one is not.

    BadFormat at a sound record of a version or kind that this silofs does not know.
    """
    lap, position, lsn = start
    while True:
        if position + HEADER > len(ring):
            lap, position = lap + 1, 0
        record = _record_at(ring, secret, lap, position, lsn)
        if record is None:
            return
        if record.kind == WRAP:
            lap, position = lap + 1, 0
        else:
            lsn += 1
            end = record.position + (0 if record.kind == ZERO else record.length)
            position = (end + ALIGN - 1) & -ALIGN
        yield record, Mark(lap, position, lsn)


def _record_at(ring: memoryview, secret: int, lap: int, position: int, lsn: int) -> Record | None:
    found = header_at(ring, secret, position)
    if found is None or found.lap != lap or found.record.lsn != lsn or not payload_is_sound(ring, secret, found):
        return None
    return found.record


def header_at(ring: memoryview, secret: int, position: int) -> Header | None:
    """The header there, if there is one of this log, and it is sound."""
    fields = bytes(ring[position : position + _RECORD.size])
    magic, version, kind, lap, lsn, prev, uuid, epoch, offset, length, payload_sum, synced = _RECORD.unpack(fields)
    if magic != RECORD_MAGIC:
        return None
    (expected,) = _SUM.unpack_from(ring, position + _RECORD.size)
    if checksum(fields, secret) != expected:
        return None
    record = Record(kind, lsn, prev, uuid, epoch, offset, length, position + HEADER)
    return Header(version, lap, synced, payload_sum, record)


def payload_is_sound(ring: memoryview, secret: int, found: Header) -> bool:
    """Whether the rest of the record is there. BadFormat when it is one that this silofs does not know."""
    record = found.record
    if found.version != RECORD_VERSION or record.kind not in _KINDS:
        raise BadFormat(f"the write log has a record of an unknown version or kind ({found.version}, {record.kind})")
    body, payload = record.position, 0 if record.kind == ZERO else record.length
    if payload > LOG_RECORD_MAX or body + payload > len(ring):
        raise BadFormat("a record of the write log is longer than any that is written")
    return checksum(ring[body : body + payload], secret) == found.payload_sum
