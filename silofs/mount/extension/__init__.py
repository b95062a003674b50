"""The C library that lets silofs see requests before libfuse does. Optional; dispatch.c says how, docs/mount.md why.

Import this before pyfuse3. Without the library (not built, switched off with SILOFS_EXTENSION=off) everything here is
there and says nothing: `available` is false, no request has a number, no write has flags.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("dispatch.so")
SWITCH = "SILOFS_EXTENSION"  # "off", or the path of another build of it, for tests
RESENT = 1 << 63  # in a request's number: the kernel sent it again, since the daemon that had read it died

_WORDS = 2  # silofs_request: number, flags of a write
_TAKE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)


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

_words = (ctypes.c_uint64 * _WORDS).in_dll(_library, "silofs_request") if _library else (ctypes.c_uint64 * _WORDS)()
request = memoryview(_words).cast("B").cast("Q")
"""[number, flags] of the request whose handler runs, until that handler first awaits. Flags are those of a write: the
file's open flags, with O_DSYNC or O_SYNC where this one write has RWF_DSYNC or RWF_SYNC. 0 where there is none."""

_kept: list[object] = []


def request_unique() -> int | None:
    """FUSE's number of the request that is being handled, RESENT in it; to be asked before the handler's first await.

    One request has one number for the life of the mount, so that its second coming is known. None: it cannot be told.
    """
    return request[0] or None


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
