"""The requests that pyfuse3 does not know, as the kernel writes them, and the replies to them (linux/fuse.h). Pure.

Integers are the machine's own; a layout, once in the kernel, stays. Fields that a later kernel appends to a request are
ignored. Offsets and lengths are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple

IN_HEADER: Final = Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extension length, padding
OUT_HEADER: Final = Struct("=IiQ")  # length, error, unique

GETLK, SETLK, SETLKW, INTERRUPT, FALLOCATE, LSEEK, COPY_FILE_RANGE = 31, 32, 33, 36, 43, 46, 47

_LOCK = Struct("=QQQQII")  # handle, owner, first byte, last byte, type, pid
_LOCK_OUT = Struct("=QQII")
_FALLOCATE = Struct("=QQQI")
_SEEK = Struct("=QQI")
_COPY = Struct("=QQQQQQQ")
_U64 = Struct("=Q")
_U32 = Struct("=II")


class Lock(NamedTuple):
    """fcntl(2) on a range, last byte included. `kind` is F_RDLCK, F_WRLCK or F_UNLCK."""

    fh: int
    owner: int
    start: int
    end: int
    kind: int
    pid: int


class GetLock(NamedTuple):
    """F_GETLK, F_OFD_GETLK: what would be in the way of this lock?"""

    lock: Lock


class SetLock(NamedTuple):
    """F_SETLK and F_OFD_SETLK; with `wait` F_SETLKW and F_OFD_SETLKW."""

    lock: Lock
    wait: bool


class Allocate(NamedTuple):
    """fallocate(2)."""

    fh: int
    offset: int
    length: int
    mode: int


class Seek(NamedTuple):
    """lseek(2) with SEEK_DATA or SEEK_HOLE; the kernel answers the others itself."""

    fh: int
    offset: int
    whence: int


class Copy(NamedTuple):
    """copy_file_range(2)."""

    fh: int
    offset: int
    to_fh: int
    to_offset: int
    length: int


class Interrupt(NamedTuple):
    """A signal has come for the process that made the request with this number."""

    unique: int


Request = GetLock | SetLock | Allocate | Seek | Copy | Interrupt


def parse(message: bytes) -> tuple[int, Request] | None:
    """(number, request) of what the kernel wrote; None when it is none of the above, or cut short."""
    if len(message) < IN_HEADER.size:
        return None
    _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
    known = _BODIES.get(opcode)
    if known is None or len(message) < IN_HEADER.size + known[0].size:
        return None
    layout, make = known
    return unique, make(*layout.unpack_from(message, IN_HEADER.size))


_BODIES: Final[dict[int, tuple[Struct, Callable[..., Request]]]] = {
    GETLK: (_LOCK, lambda *lock: GetLock(Lock(*lock))),
    SETLK: (_LOCK, lambda *lock: SetLock(Lock(*lock), False)),
    SETLKW: (_LOCK, lambda *lock: SetLock(Lock(*lock), True)),
    INTERRUPT: (_U64, Interrupt),
    FALLOCATE: (_FALLOCATE, Allocate),
    LSEEK: (_SEEK, Seek),
    COPY_FILE_RANGE: (
        _COPY,
        lambda fh, offset, _node, to_fh, to_offset, length, _flags: Copy(fh, offset, to_fh, to_offset, length),
    ),
}


def reply(unique: int, body: bytes = b"", *, error: int = 0) -> bytes:
    """What is written to /dev/fuse. `error` is an errno, positive; there is no body then."""
    if error:
        return OUT_HEADER.pack(OUT_HEADER.size, -error, unique)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


# Bodies of replies


def found_lock(start: int, end: int, kind: int, pid: int) -> bytes:
    """To GetLock: the lock in the way; kind F_UNLCK: none is."""
    return _LOCK_OUT.pack(start, end, kind, pid)


def found_offset(offset: int) -> bytes:
    """To Seek."""
    return _U64.pack(offset)


def copied(length: int) -> bytes:
    """To Copy: how much of it was done."""
    return _U32.pack(length, 0)
