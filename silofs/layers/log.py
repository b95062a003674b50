"""The write log: a ring of checksummed records in a memfd that outlives the daemon, and the table of open handles.

The ring *is* the write buffer. A write is copied here once, and is acknowledged; the engine keeps only an index of
positions over it, and a commit reads the pages from here. A daemon that is killed leaves the memfd with the holder, and
its successor replays it (docs/write-path.md). A power cut takes it all, as it takes the cache of a disk.

Layout of the memfd, little-endian (every area starts on a multiple of 4096):

    superblock     4096   magic, version, ring bytes, handle slots, secret, store uuid, checksum
    tail slots     4096   two slots of 64 bytes at 0 and 64, the counter of handle ids at 128
    handle table   HANDLES_MAX x 64 bytes (silofs/layers/handles.py)
    ring           the records

A record is a header of 128 bytes and a payload padded to 64. The payload is copied first and the header last, and the
header's checksum covers both, so any prefix of these stores is either the whole record or none. A record never wraps:
where it does not fit, a WRAP record (or less than a header's room) ends the lap.

What keeps a leftover from being replayed: each record carries its lap and a store-wide sequence number (LSN) without
gaps, and replay accepts exactly the next one. The checksums are seeded with a secret drawn at `format`, so that bytes
which a guest wrote cannot pass for a record when they lie where the next header is expected.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest as checksum

from silofs.errors import BadFormat
from silofs.layers.handles import SLOT, HandleTable
from silofs.limits import HANDLES_MAX, LOG_BYTES, LOG_RECORD_MAX

VERSION: Final = 1
MAGIC: Final = b"silolog\0"
RECORD_MAGIC: Final = 0x474F4C53  # "SLOG"

WRITE: Final = 1  # `length` bytes of payload at `offset`
ZERO: Final = 2  # `length` zero bytes at `offset`; no payload
WRAP: Final = 3  # the lap ends here
EXTEND: Final = 4  # as WRITE, and the volume is at least `offset + length` long from here on
_KINDS: Final = (WRITE, ZERO, WRAP, EXTEND)

_AREA = 4096
_TAILS = _AREA
_COUNTER = _TAILS + 128
_HANDLES = 2 * _AREA

HEADER: Final = 128
ALIGN: Final = 64

_SUPER = Struct("<8sIIQIIQ16s")  # magic, version, -, ring bytes, handle slots, -, secret, store uuid
_SUPER_SUM = Struct("<Q")
_TAIL = Struct("<QQQQ")  # sequence, lap, position, LSN of the record expected there
_RECORD = Struct("<IHHQQQ16sQQQQ40x")  # magic, version, kind, lap, lsn, prev, uuid, epoch, offset, length, payload sum
_SUM = Struct("<Q")
assert _RECORD.size + _SUM.size == HEADER


class Mark(NamedTuple):
    """A place in the log: everything before it has lower LSNs."""

    lap: int
    position: int
    lsn: int


class Record(NamedTuple):
    """One replayed record. `position` is where its payload begins in the ring (of WRITE and EXTEND)."""

    kind: int
    lsn: int
    prev_lsn: int
    uuid: bytes
    epoch: int
    offset: int
    length: int
    position: int


class WriteLog:
    """The ring and the handle table over one memfd. One thread, no locks: the event loop's.

    Between `append` and `release` the bytes of a record do not change, so a commit may read them from another thread.
    """

    __slots__ = (
        "_lap",
        "_map",
        "_next_lsn",
        "_pos",
        "_secret",
        "_sequence",
        "_size",
        "_tail",
        "appended",
        "handles",
        "ring",
    )

    def __init__(self, area: mmap.mmap) -> None:
        view = memoryview(area)
        self._map = view
        _, _, _, size, slots, _, self._secret, _ = _SUPER.unpack_from(view)
        start = _HANDLES + slots * SLOT
        self._size: int = size
        self.ring = view[start : start + size]
        self.handles = HandleTable(view[_HANDLES:start], view[_COUNTER : _COUNTER + 8])
        self._sequence, self._tail = self._newest_tail()
        self._lap, self._pos, self._next_lsn = self._tail
        self.appended = 0
        for _ in self.replay():  # finds the head: the place after the last whole record
            pass

    @staticmethod
    def format(fd: int, store_uuid: bytes, ring_bytes: int = LOG_BYTES, handle_slots: int = HANDLES_MAX) -> None:
        """Make an empty log in the memfd `fd`. `ring_bytes` is a multiple of 64."""
        if ring_bytes % ALIGN or ring_bytes < 4 * HEADER:
            raise ValueError(f"a ring of {ring_bytes} bytes cannot hold records")
        os.ftruncate(fd, 0)
        start = _HANDLES + handle_slots * SLOT
        os.ftruncate(fd, start + ring_bytes)
        secret = int.from_bytes(os.urandom(8), "little")
        tail = _TAIL.pack(1, 1, 0, 1)
        os.pwrite(fd, tail + _SUM.pack(checksum(tail, secret)), _TAILS + ALIGN)
        os.pwrite(fd, (1).to_bytes(8, "little"), _COUNTER)
        # The superblock last: a holder killed before this leaves a memfd that is no log, not a half-made one.
        header = _SUPER.pack(MAGIC, VERSION, 0, ring_bytes, handle_slots, 0, secret, store_uuid)
        os.pwrite(fd, header + _SUPER_SUM.pack(checksum(header)), 0)

    @classmethod
    def open(cls, fd: int, store_uuid: bytes) -> WriteLog:
        """The log in `fd`, which must be one of this version and this store; else BadFormat, and nothing is touched."""
        header = os.pread(fd, _SUPER.size + _SUPER_SUM.size, 0)
        if len(header) != _SUPER.size + _SUPER_SUM.size or header[:8] != MAGIC:
            raise BadFormat("this memfd holds no write log")
        _, version, _, size, slots, _, _, owner = _SUPER.unpack_from(header)
        if version != VERSION:
            raise BadFormat(f"the write log has version {version}; this silofs knows {VERSION}")
        if _SUPER_SUM.unpack_from(header, _SUPER.size)[0] != checksum(header[: _SUPER.size]):
            raise BadFormat("the write log's superblock is damaged")
        if owner != store_uuid:
            raise BadFormat("the write log belongs to another store")
        total = _HANDLES + slots * SLOT + size
        if os.fstat(fd).st_size != total:
            raise BadFormat("the write log is cut short")
        return cls(mmap.mmap(fd, total))

    # Appending

    @property
    def next_lsn(self) -> int:
        return self._next_lsn

    def raise_lsn(self, lsn: int) -> None:
        """Number the next record at least `lsn`: a new memfd starts at 1, below what the store has applied.

        Only on an empty log, since LSNs in the ring have no gaps.
        """
        if lsn > self._next_lsn:
            if self.used:
                raise ValueError("the log is not empty")
            self._next_lsn = lsn
            self.release(self.mark())

    @property
    def used(self) -> int:
        """Bytes of the ring between tail and head."""
        return (self._lap - self._tail.lap) * self._size + self._pos - self._tail.position

    @property
    def size(self) -> int:
        return self._size

    def room(self, payload: int) -> bool:
        """Whether a record with so many bytes of payload fits now."""
        need = (HEADER + payload + ALIGN - 1) & -ALIGN
        if self._pos + need > self._size:
            need += self._size - self._pos
        tail = self._tail
        return (self._lap - tail.lap) * self._size + self._pos - tail.position + need <= self._size

    def append(
        self,
        kind: int,
        uuid: bytes,
        epoch: int,
        prev_lsn: int,
        offset: int,
        length: int,
        payload: bytes | memoryview = b"",
    ) -> tuple[int, int]:
        """Log one record; (its LSN, ring position of its payload). The caller has asked `room(len(payload))`.

        `prev_lsn` is the LSN of the volume's record before this one: a gap shows at replay.
        """
        count = len(payload)
        position = self._pos
        if position + HEADER + count > self._size:
            self._wrap()
            position = 0
        lsn = self._next_lsn
        body = position + HEADER
        ring = self.ring
        ring[body : body + count] = payload
        header = _RECORD.pack(
            RECORD_MAGIC,
            VERSION,
            kind,
            self._lap,
            lsn,
            prev_lsn,
            uuid,
            epoch,
            offset,
            length,
            checksum(payload, self._secret),
        )
        ring[position:body] = header + _SUM.pack(checksum(header, self._secret))
        self._next_lsn = lsn + 1
        self._pos = (body + count + ALIGN - 1) & -ALIGN
        self.appended += 1
        return lsn, body

    def _wrap(self) -> None:
        if self._pos + HEADER <= self._size:
            empty = checksum(b"", self._secret)
            header = _RECORD.pack(RECORD_MAGIC, VERSION, WRAP, self._lap, self._next_lsn, 0, bytes(16), 0, 0, 0, empty)
            self.ring[self._pos : self._pos + HEADER] = header + _SUM.pack(checksum(header, self._secret))
        self._lap += 1
        self._pos = 0

    # Freeing

    def mark(self) -> Mark:
        """The place after the last record."""
        return Mark(self._lap, self._pos, self._next_lsn)

    def release(self, mark: Mark) -> None:
        """Give the space before `mark` back: everything there is durable in the store, and published.

        Two slots are written in turn: killed inside the store of one, the other still names an earlier tail, from where
        replay only sees more records that are applied already.
        """
        sequence = self._sequence + 1
        slot = _TAILS + (sequence & 1) * ALIGN
        tail = _TAIL.pack(sequence, *mark)
        self._map[slot : slot + _TAIL.size + _SUM.size] = tail + _SUM.pack(checksum(tail, self._secret))
        self._sequence = sequence
        self._tail = mark

    def _newest_tail(self) -> tuple[int, Mark]:
        best: tuple[int, Mark] | None = None
        for slot in (_TAILS, _TAILS + ALIGN):
            tail = bytes(self._map[slot : slot + _TAIL.size])
            (expected,) = _SUM.unpack_from(self._map, slot + _TAIL.size)
            if checksum(tail, self._secret) == expected:
                sequence, lap, position, lsn = _TAIL.unpack(tail)
                if best is None or sequence > best[0]:
                    best = sequence, Mark(lap, position, lsn)
        if best is None:
            raise BadFormat("both tail slots of the write log are damaged")
        return best

    # Replaying

    def replay(self) -> Iterator[Record]:
        """Every record from the tail, in order, up to the first place that does not hold the next one.

        Sets the head there: what follows is overwritten by the next append.
        """
        lap, position, lsn = self._tail
        while True:
            if position + HEADER > self._size:
                lap, position = lap + 1, 0
            record = self._record_at(lap, position, lsn)
            if record is None:
                break
            if record.kind == WRAP:
                lap, position = lap + 1, 0
                continue
            lsn += 1
            end = record.position + (0 if record.kind == ZERO else record.length)
            position = (end + ALIGN - 1) & -ALIGN
            # The head moves with the iterator, so that a caller that stops early has lost nothing but the rest.
            self._lap, self._pos, self._next_lsn = lap, position, lsn
            yield record
        self._lap, self._pos, self._next_lsn = lap, position, lsn

    def _record_at(self, lap: int, position: int, lsn: int) -> Record | None:
        header = bytes(self.ring[position : position + _RECORD.size])
        magic, version, kind, its_lap, its_lsn, prev, uuid, epoch, offset, length, payload_sum = _RECORD.unpack(header)
        if magic != RECORD_MAGIC or its_lap != lap or its_lsn != lsn:
            return None
        (expected,) = _SUM.unpack_from(self.ring, position + _RECORD.size)
        if checksum(header, self._secret) != expected:
            return None
        if version != VERSION or kind not in _KINDS:
            raise BadFormat(f"the write log has a record of an unknown version or kind ({version}, {kind})")
        body = position + HEADER
        payload = 0 if kind == ZERO else length
        if payload > LOG_RECORD_MAX or body + payload > self._size:
            raise BadFormat("a record of the write log is longer than any that is written")
        if checksum(self.ring[body : body + payload], self._secret) != payload_sum:
            return None
        return Record(kind, its_lsn, prev, uuid, epoch, offset, length, body)

    def statistics(self) -> dict[str, int]:
        return {
            "size": self._size,
            "used": self.used,
            "lap": self._lap,
            "next_lsn": self._next_lsn,
            "appended": self.appended,
            "handles": len(self.handles),
        }
