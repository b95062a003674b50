"""System calls that Python does not have."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def extents(fd: int) -> list[tuple[int, int]]:
    """(start, end) in bytes of the data of an open file, by SEEK_DATA and SEEK_HOLE."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data follows
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        assert at > start, "a search that stands still"
        found.append((start, at))
    return found


def allocated(path: Path) -> int:
    """Bytes, by st_blocks."""
    return path.stat().st_blocks * 512
