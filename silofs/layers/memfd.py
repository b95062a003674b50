"""The memfd that a holder keeps for its daemons: what outlives a daemon, and where in it each thing lies.

Little-endian; every area starts on a multiple of 4096:

    superblock     4096   magic, version, lock slots, ring bytes, handle slots, note slots, secret, store uuid, checksum
    tail slots     4096   two slots of 64 bytes at 0 and 64, the counter of handle ids at 128 (silofs/layers/log.py)
    handle table   handle slots x 64 bytes (silofs/layers/handles.py)
    ring           the records of the write log
    lock table     64 bytes, then lock slots x 64 (silofs/layers/locks.py)       } since version 2
    notes          note slots x 64 bytes (silofs/layers/notes.py)                }

A version adds areas behind those that there were, and moves none. So a log of an earlier version, which a daemon of an
earlier program has left, is read as it is, and becomes one of this version in place (`upgrade`): the file is made
longer, then the superblock is replaced, in one write(2) of less than a page, which a kill does not cut in two. The
version of the records is another number (log.py).
"""

from __future__ import annotations

import mmap
import os
from struct import Struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest as checksum

from silofs import failpoints
from silofs.errors import BadFormat
from silofs.limits import LOCKS_MAX, NOTES_MAX

VERSION: Final = 2
KNOWN: Final = (1, 2)
"""Versions that this program can take over."""
MAGIC: Final = b"silolog\0"

AREA: Final = 4096
TAILS: Final = AREA
COUNTER: Final = TAILS + 128
HANDLES: Final = 2 * AREA
SLOT: Final = 64  # bytes, of a handle, a lock and a note

_SUPER = Struct("<8sIIQIIQ16s")
_SUM = Struct("<Q")
_SIZE = _SUPER.size + _SUM.size


class Superblock(NamedTuple):
    """What says how the memfd is laid out. In version 1 there were no locks and no notes: 0 slots of them."""

    magic: bytes
    version: int
    locks: int
    ring_bytes: int
    handles: int
    notes: int
    secret: int
    store: bytes

    @property
    def ring_at(self) -> int:
        return HANDLES + self.handles * SLOT

    @property
    def locks_at(self) -> int:
        return (self.ring_at + self.ring_bytes + AREA - 1) & -AREA

    @property
    def notes_at(self) -> int:
        return self.locks_at + (1 + self.locks) * SLOT

    @property
    def total(self) -> int:
        """Bytes of the whole."""
        return self.ring_at + self.ring_bytes if self.version == 1 else self.notes_at + self.notes * SLOT

    def encode(self) -> bytes:
        raw = _SUPER.pack(*self)
        return raw + _SUM.pack(checksum(raw))


class Memfd:
    """The mapped areas. The descriptor belongs to the caller, and stays open as long as this is used."""

    def __init__(self, fd: int) -> None:
        """BadFormat when this is no log of a version that is known; nothing is touched."""
        self._fd = fd
        self.superblock = block = _read(fd)
        self._view = memoryview(mmap.mmap(fd, block.ring_at + block.ring_bytes))
        self.tails = self._view[TAILS:COUNTER]
        self.counter = self._view[COUNTER : COUNTER + 8]
        self.handles = self._view[HANDLES : block.ring_at]
        self.ring = self._view[block.ring_at :]
        if block.locks:
            self._map_rest()

    def _map_rest(self) -> None:
        block = self.superblock
        rest = memoryview(mmap.mmap(self._fd, block.total - block.locks_at, offset=block.locks_at))
        self.locks = rest[: block.notes_at - block.locks_at]
        self.notes = rest[block.notes_at - block.locks_at :]

    @staticmethod
    def format(fd: int, store_uuid: bytes, *, ring_bytes: int, handle_slots: int) -> Superblock:
        """Lay the areas out in an empty memfd. The caller fills them, and then calls `seal`."""
        secret = int.from_bytes(os.urandom(8), "little")
        block = Superblock(MAGIC, VERSION, LOCKS_MAX, ring_bytes, handle_slots, NOTES_MAX, secret, store_uuid)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, block.total)
        return block

    @staticmethod
    def seal(fd: int, block: Superblock) -> None:
        """The superblock last: a daemon killed before this leaves a memfd that is no log, not a half-made one."""
        os.pwrite(fd, block.encode(), 0)

    def upgrade(self) -> None:
        """Make it one of this version, in place. Once that is done, no earlier program takes it any more."""
        if self.superblock.version == VERSION:
            return
        block = self.superblock._replace(version=VERSION, locks=LOCKS_MAX, notes=NOTES_MAX)
        os.ftruncate(self._fd, block.total)
        failpoints.hit("log.upgrade")
        os.pwrite(self._fd, block.encode(), 0)
        self.superblock = block
        self._map_rest()


def _read(fd: int) -> Superblock:
    raw = os.pread(fd, _SIZE, 0)
    if len(raw) != _SIZE or raw[: len(MAGIC)] != MAGIC:
        raise BadFormat("this memfd holds no write log")
    block = Superblock(*_SUPER.unpack_from(raw))
    if block.version not in KNOWN:
        known = " and ".join(map(str, KNOWN))
        raise BadFormat(f"the write log has version {block.version}; this silofs knows {known}")
    if _SUM.unpack_from(raw, _SUPER.size)[0] != checksum(raw[: _SUPER.size]):
        raise BadFormat("the write log's superblock is damaged")
    size = os.fstat(fd).st_size
    # An upgrade that was killed has made it longer already, and nothing else.
    if size < block.total or (size > block.total and block.version == VERSION):
        raise BadFormat("the write log is cut short")
    return block
