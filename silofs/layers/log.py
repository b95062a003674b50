"""The write log: a ring of checksummed records in a memfd that outlives the daemon, and the table of open handles.

The ring *is* the write buffer. A write is copied here once, and is acknowledged; the engine keeps only an index of
positions over it, and a commit reads the pages from here. A daemon that is killed leaves the memfd with the holder, and
its successor replays it (docs/write-path.md). A power cut takes it all, as it takes the cache of a disk.

What a record looks like, and why a leftover is never replayed: silofs/layers/records.py. Where in the memfd each thing
lies: silofs/layers/memfd.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from struct import Struct

from xxhash import xxh3_64_intdigest as checksum

from silofs.errors import BadFormat
from silofs.layers.handles import HandleTable
from silofs.layers.locks import LockTable
from silofs.layers.memfd import COUNTER, MAGIC, TAILS, Memfd
from silofs.layers.records import ALIGN, HEADER, WRAP, Mark, Record, header, span, walk
from silofs.limits import HANDLES_MAX, LOG_BYTES

_TAIL = Struct("<QQQQ")  # sequence, lap, position, LSN of the record expected there
_SUM = Struct("<Q")


class WriteLog:
    """The ring and the handle table over one memfd. One thread, no locks: the event loop's.

    Between `append` and `release` the bytes of a record do not change, so a commit may read them from another thread.
    """

    __slots__ = (
        "_lap",
        "_next_lsn",
        "_pos",
        "_room",
        "_secret",
        "_sequence",
        "_size",
        "_tail",
        "appended",
        "handles",
        "locks",
        "memory",
        "ring",
        "synced",
    )

    def __init__(self, memory: Memfd) -> None:
        self.memory = memory
        self._secret = memory.superblock.secret
        self._size = memory.superblock.ring_bytes
        self.ring = memory.ring
        self.handles = HandleTable(memory.handles, memory.counter)
        self.locks = self._lock_table()
        self._sequence, self._tail = self._newest_tail()
        self._lap, self._pos, self._next_lsn = self._tail
        self.appended = 0
        self._room = memoryview(bytearray(16)).cast("Q")
        self.synced = 0  # records below are durable, as far as whoever syncs has said; each new record says so
        for _ in self.replay():  # finds the head: the place after the last whole record
            pass

    def _lock_table(self) -> LockTable | None:
        return LockTable(self.memory.locks, self.handles) if self.memory.superblock.locks else None

    def upgrade(self) -> None:
        """Make a log that an earlier program left one of this version. `locks` is a table afterwards."""
        self.memory.upgrade()
        if self.locks is None:
            self.locks = self._lock_table()

    @staticmethod
    def format(fd: int, store_uuid: bytes, ring_bytes: int = LOG_BYTES, handle_slots: int = HANDLES_MAX) -> None:
        """Make an empty log in the memfd `fd`. `ring_bytes` is a multiple of 64."""
        if ring_bytes % ALIGN or ring_bytes < 4 * HEADER:
            raise ValueError(f"a ring of {ring_bytes} bytes cannot hold records")
        block = Memfd.format(fd, store_uuid, ring_bytes=ring_bytes, handle_slots=handle_slots)
        tail = _TAIL.pack(1, 1, 0, 1)
        os.pwrite(fd, tail + _SUM.pack(checksum(tail, block.secret)), TAILS + ALIGN)
        os.pwrite(fd, (1).to_bytes(8, "little"), COUNTER)
        Memfd.seal(fd, block)

    @staticmethod
    def formatted(fd: int) -> bool:
        """Whether `format` has come to its end on this memfd. Before, it holds nothing."""
        return os.pread(fd, len(MAGIC), 0) == MAGIC

    @classmethod
    def open(cls, fd: int, store_uuid: bytes) -> WriteLog:
        """The log in `fd`, which must be of a known version and of this store; else BadFormat, and nothing is touched.

        One of an earlier version is used as it is, without what came later, until `upgrade`.
        """
        memory = Memfd(fd)
        if memory.superblock.store != store_uuid:
            raise BadFormat("the write log belongs to another store")
        return cls(memory)

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
        return span(self._tail, self.mark(), self._size)

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
        *,
        placed: bool = False,
    ) -> tuple[int, int]:
        """Log one record; (its LSN, ring position of its payload). The caller has asked `room(len(payload))`.

        `prev_lsn` is the LSN of the volume's record before this one: a gap shows at replay. `placed`: the payload is
        what `placed` gave, and so needs no copy.
        """
        count = len(payload)
        position = self._pos
        if position + HEADER + count > self._size:
            self._wrap()
            position = 0
        lsn = self._next_lsn
        body = position + HEADER
        ring = self.ring
        if not placed:
            ring[body : body + count] = payload
        ring[position:body] = header(
            self._secret, kind, self._lap, lsn, prev_lsn, uuid, epoch, offset, length, payload, self.synced
        )
        self._next_lsn = lsn + 1
        self._pos = end = (body + count + ALIGN - 1) & -ALIGN
        self._room[0] = end + HEADER
        self.appended += 1
        return lsn, body

    def placed(self, position: int, length: int) -> memoryview | None:
        """The ring's own bytes there, as the payload for the next `append`; None when that is not their place."""
        if position != self._pos + HEADER or position + length > self._room[1]:
            return None
        return self.ring[position : position + length]

    def show_room(self, words: memoryview) -> None:
        """Keep in `words` where the next record's payload goes, and how far that may be written to by anybody."""
        self._room = words
        self._show_room()

    def _show_room(self) -> None:
        self._room[0] = self._pos + HEADER
        self._room[1] = self._size if self._lap == self._tail.lap else self._tail.position

    def _wrap(self) -> None:
        if self._pos + HEADER <= self._size:
            wrap = header(self._secret, WRAP, self._lap, self._next_lsn, 0, bytes(16), 0, 0, 0, b"", self.synced)
            self.ring[self._pos : self._pos + HEADER] = wrap
        self._lap += 1
        self._pos = 0
        self._show_room()

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
        slot = (sequence & 1) * ALIGN
        tail = _TAIL.pack(sequence, *mark)
        self.memory.tails[slot : slot + _TAIL.size + _SUM.size] = tail + _SUM.pack(checksum(tail, self._secret))
        self._sequence = sequence
        self._tail = mark
        self._show_room()

    def _newest_tail(self) -> tuple[int, Mark]:
        best: tuple[int, Mark] | None = None
        tails = self.memory.tails
        for slot in (0, ALIGN):
            tail = bytes(tails[slot : slot + _TAIL.size])
            (expected,) = _SUM.unpack_from(tails, slot + _TAIL.size)
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
        for record, after in walk(self.ring, self._secret, self._tail):
            # The head moves with the iterator, so that a caller that stops early has lost nothing but the rest.
            self._lap, self._pos, self._next_lsn = after
            if record.kind != WRAP:
                yield record
        self._show_room()

    def statistics(self) -> dict[str, int]:
        return {
            "size": self._size,
            "used": self.used,
            "lap": self._lap,
            "next_lsn": self._next_lsn,
            "appended": self.appended,
            "handles": len(self.handles),
        }
