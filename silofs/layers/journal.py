"""The journal: a durable copy of a stretch of the write log's ring, in a file. What makes an fsync one write.

    STORE/journal/<id>           a journal, named by the id in its superblock (16 hex digits)
    STORE/journal/<id>.retired   one that could not be written to: only ever read again
    STORE/journal/new            one that is being made

A journal has the ring's bytes at the ring's places, behind a superblock: the same records (silofs/layers/records.py),
read back by the same routine. It is filled with zeros once, so its space is held, and later writes change nothing but
data: no metadata of the file system has to follow them. Which file counts, and from where it is replayed, is said by
`State.journal` and `State.mark`, in the transaction that applied everything before that mark. Hence what is left of an
earlier lap, of an earlier log (its records have another secret) or in a file that nobody names is never replayed.
docs/write-path.md has the table of crashes.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest as checksum

from silofs import failpoints
from silofs.errors import BadFormat, StoreError
from silofs.layers.ending import Ending, look_behind
from silofs.layers.filesystem import sync_directory
from silofs.layers.records import WRAP, Mark, Record, walk
from silofs.limits import MIB

DIRECTORY: Final = "journal"
NEW: Final = "new"
RETIRED: Final = ".retired"

VERSION: Final = 1
MAGIC: Final = b"siljrnl\0"
BLOCK: Final = 4096  # unit of writes, and what the superblock takes: O_DIRECT wants both aligned

Buffer = memoryview | mmap.mmap
Parts = list[tuple[int, list[Buffer]]]
"""What one write is made of: places in the file, and bytes for each."""

_SUPER = Struct("<8sIIQQQ16s")  # magic, version, -, ring bytes, id, secret of the log, store uuid
_SUM = Struct("<Q")


class Journal:
    """A journal that is written to. One thread at a time calls `write`, with the pieces of one `stretch`."""

    def __init__(self, path: Path, fd: int, journal_id: int) -> None:
        self.id = journal_id
        self._path = path
        self._fd = fd
        self._last_block = mmap.mmap(-1, BLOCK)

    @classmethod
    def make(cls, directory: Path, secret: int, store: bytes, ring_bytes: int) -> Journal:
        """A new and empty one for a log; durable, and named by nobody yet. OSError, and then there is none."""
        if ring_bytes % BLOCK:
            raise ValueError(f"a ring of {ring_bytes} bytes is not made of blocks")
        directory.mkdir(mode=0o700, exist_ok=True)
        new = directory / NEW
        new.unlink(missing_ok=True)
        journal_id = int.from_bytes(os.urandom(8), "little") | 1
        path = directory / f"{journal_id:016x}"
        try:
            _fill(new, BLOCK + ring_bytes)
            failpoints.hit("journal.filled")
            fd = _open(new)
            try:
                block = mmap.mmap(-1, BLOCK)
                fields = _SUPER.pack(MAGIC, VERSION, 0, ring_bytes, journal_id, secret, store)
                block[: _SUPER.size + _SUM.size] = fields + _SUM.pack(checksum(fields))
                _write(fd, [block], 0)
                new.rename(path)
                sync_directory(directory)
                sync_directory(directory.parent)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            for left in (new, path):
                left.unlink(missing_ok=True)
            raise
        failpoints.hit("journal.formatted")
        return cls(path, fd, journal_id)

    @classmethod
    def reuse(cls, directory: Path, journal_id: int, secret: int, store: bytes, ring_bytes: int) -> Journal | None:
        """The journal that an earlier daemon wrote for the same log, if it is still good for that."""
        path = directory / f"{journal_id:016x}"
        try:
            if _superblock(path) != (ring_bytes, journal_id, secret, store):
                return None
            return cls(path, _open(path), journal_id)
        except (OSError, BadFormat):
            return None

    def stretch(self, ring: memoryview, start: Mark, end: Mark) -> Parts:
        """What to write so that the journal has the records from `start` to `end`.

        Whole blocks. The last one is copied now: behind the end of its last record more will be appended while it is
        written. The others do not change, since the log keeps their records until a commit has landed.
        """
        first, whole = start.position & -BLOCK, end.position & -BLOCK
        parts: Parts = []
        if end.lap != start.lap:
            parts.append((BLOCK + first, [ring[first:]]))
            first = 0
        last: list[Buffer] = []
        if whole < end.position:
            self._last_block[:] = ring[whole : whole + BLOCK]
            last = [self._last_block]
        if first < whole or last:
            parts.append((BLOCK + first, [*([ring[first:whole]] if first < whole else []), *last]))
        return parts

    def write(self, parts: Parts) -> None:
        """Make what `stretch` gave durable. After an OSError nothing is known of it: `retire`."""
        failpoints.hit("journal.before_write")
        for position, buffers in parts:
            _write(self._fd, buffers, position)
        failpoints.hit("journal.durable")

    def retire(self) -> None:
        """Never write to this file again, in any daemon. What it has counts for as long as it is named."""
        os.close(self._fd)
        try:
            self._path.rename(self._path.with_name(self._path.name + RETIRED))
        except OSError:
            pass  # the disk is failing; then the next daemon may try this file once more, and fail once more
        failpoints.hit("journal.retired")

    def close(self) -> None:
        os.close(self._fd)


def remove_others(directory: Path, *ids: int) -> None:
    """Remove every file but the journals with those ids."""
    kept = {f"{journal_id:016x}" for journal_id in ids}
    try:
        found = list(directory.iterdir())
    except FileNotFoundError:
        return
    for path in found:
        if path.name.removesuffix(RETIRED) not in kept:
            path.unlink(missing_ok=True)


class Replay:
    """The records of a journal from a mark on, read into memory; what recovery goes over when there is no memfd."""

    def __init__(self, directory: Path, journal_id: int, store: bytes, mark: Mark) -> None:
        """FileNotFoundError when the file is gone; BadFormat or StoreError when it is there and cannot be read."""
        path = directory / f"{journal_id:016x}"
        if not path.exists():
            path = path.with_name(path.name + RETIRED)
        self.path = path
        hint = f"restore it from a copy; or remove {path} to go on without what was synced since the last commit"
        try:
            size, its_id, self._secret, its_store = _superblock(path)
            if (its_id, its_store) != (journal_id, store) or mark.position > size:
                raise BadFormat(f"{path} belongs to another store")
            self._mark = self._end = mark
            self.ring = memoryview(bytearray(size))
            with path.open("rb", buffering=0) as file:
                self._read(file.fileno())
        except FileNotFoundError:
            raise
        except BadFormat as error:
            raise BadFormat(error.message, hint=hint) from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}", hint=hint) from error

    def _read(self, fd: int) -> None:
        for at in range(0, len(self.ring), MIB):
            piece = self.ring[at : at + MIB]
            if os.preadv(fd, [piece], BLOCK + at) != len(piece):
                raise OSError(errno.EIO, "it is cut short")

    def records(self) -> Iterator[Record]:
        """In order, up to the first place that does not hold the next one."""
        for record, after in walk(self.ring, self._secret, self._mark):
            self._end = after
            if record.kind != WRAP:
                yield record

    def ending(self) -> Ending:
        """What is behind the last one, once `records` has come to it."""
        return look_behind(self.ring, self._secret, self._end)


def _superblock(path: Path) -> tuple[int, int, int, bytes]:
    """(ring bytes, id, secret, store uuid); OSError, or BadFormat when it is not one of this version, whole."""
    with path.open("rb", buffering=0) as file:
        block = file.read(_SUPER.size + _SUM.size)
        length = os.fstat(file.fileno()).st_size
    if len(block) < _SUPER.size + _SUM.size or block[:8] != MAGIC:
        raise BadFormat(f"{path} is no journal")
    _, version, _, ring_bytes, journal_id, secret, store = _SUPER.unpack_from(block)
    if version != VERSION:
        raise BadFormat(f"the journal {path} has version {version}; this silofs knows {VERSION}")
    if _SUM.unpack_from(block, _SUPER.size)[0] != checksum(block[: _SUPER.size]):
        raise BadFormat(f"the superblock of {path} is damaged")
    if length != BLOCK + ring_bytes:
        raise BadFormat(f"the journal {path} is cut short")
    return ring_bytes, journal_id, secret, store


def _fill(path: Path, length: int) -> None:
    """A file of zeros, durable, whose blocks are all written."""
    zeros = bytes(MIB)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, length)  # as one piece if it can be had
        for at in range(0, length, MIB):
            piece = zeros[: min(MIB, length - at)]
            if os.pwrite(fd, piece, at) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    """For durable writes, past the page cache where the file system can."""
    flags = os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def _write(fd: int, buffers: list[Buffer], position: int) -> None:
    length = sum(len(buffer) for buffer in buffers)
    if os.pwritev(fd, buffers, position) != length:
        raise OSError(errno.EIO, "a write was cut short")
