"""The C library that lets silofs see requests before libfuse does. Optional; dispatch.c says how, docs/mount.md why.

Import this before pyfuse3. Without the library (not built, switched off with SILOFS_EXTENSION=off) everything here is
there and says nothing: `available` is false, no request has a number, no write has flags.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("dispatch.so")
SWITCH = "SILOFS_EXTENSION"  # "off", or the path of another build of it, for tests
RESENT = 1 << 63  # in a request's number: the kernel sent it again, since the daemon that had read it died

NUMBER, FLAGS, HANDLE, OFFSET, LENGTH, AT = range(6)
"""What the words of `request` are."""
_WORDS = 6
_ROOM = 2
_TAKE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int)
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


def _load() -> ctypes.CDLL | None:
    wanted = os.environ.get(SWITCH) or str(LIBRARY)
    if wanted == "off" or "pyfuse3" in sys.modules or not Path(wanted).exists():
        return None
    try:
        return ctypes.CDLL(wanted, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        log.error("the C extension cannot be loaded: %s", error)
        return None


_library = _load()
available = _library is not None
ABILITIES = ("fallocate", "lseek", "copy_file_range", "locks", "write_flags", "request_ids")
abilities: tuple[str, ...] = ABILITIES if available else ()
"""What a mount has by it: told to the holder, shown as capabilities. A later daemon of the mount must have them all."""


def _variable(name: str, words: int) -> memoryview:
    """64-bit words of the library; without it, some that nobody reads."""
    kind = ctypes.c_uint64 * words
    return memoryview(kind.in_dll(_library, name) if _library else kind()).cast("B").cast("Q")


request = _variable("silofs_request", _WORDS)
"""The request whose handler runs, until that handler first awaits. FLAGS are those of a write: the file's open flags,
with O_DSYNC or O_SYNC where this one write has RWF_DSYNC or RWF_SYNC. 0 where there is none."""

room = _variable("silofs_room", _ROOM)
"""[first byte, end] of what is free in the ring for the next write's bytes; kept by the write log."""

_kept: list[object] = []


def request_unique() -> int | None:
    """FUSE's number of the request that is being handled, RESENT in it; to be asked before the handler's first await.

    One request has one number for the life of the mount, so that its second coming is known. None: it cannot be told.
    """
    return request[NUMBER] or None


def install(take: Callable[[bytes], bool]) -> None:
    """Let `take` have the requests that pyfuse3 does not know: a whole request as the kernel wrote it (linux/fuse.h).

    It is called from within pyfuse3's loop and must neither wait nor raise; what it takes (True) it answers itself.
    """
    if _library is None:
        return

    def call(address: int, length: int) -> int:
        try:
            return take(ctypes.string_at(address, length))
        except Exception:
            log.exception("a request was not taken")
            return False

    pointer = _TAKE(call)
    _kept.append(pointer)  # C has its address from here on
    ctypes.c_void_p.in_dll(_library, "silofs_take").value = ctypes.cast(pointer, ctypes.c_void_p).value


def read_into(ring: memoryview, write: Callable[[], bool]) -> None:
    """Let the kernel copy the bytes of writes into `ring`, where `room` says, and offer each to `write`.

    It finds what was asked for in `request`, and the bytes at AT; what it takes (True) is answered as done. It neither
    waits nor raises; what it does not take goes on to pyfuse3's handler. Call this from a thread: the ring is mapped
    page by page first, since a read into a page that is not ends with EIO when the process is killed in it.
    """
    if _library is None:
        return
    memory = ctypes.c_char.from_buffer(ring)
    address, libc = ctypes.addressof(memory), ctypes.CDLL(None, use_errno=True)
    begin = address & -mmap.PAGESIZE
    length = ctypes.c_size_t(address + len(ring) - begin)
    if libc.madvise(ctypes.c_void_p(begin), length, _POPULATE_WRITE):
        log.info("writes are copied: %s", os.strerror(ctypes.get_errno()))
        return
    pointer = _WRITE(write)
    _kept.extend((memory, pointer))
    ctypes.c_void_p.in_dll(_library, "silofs_write").value = ctypes.cast(pointer, ctypes.c_void_p).value
    ctypes.c_void_p.in_dll(_library, "silofs_ring").value = address
