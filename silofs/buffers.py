"""What malloc keeps of the memory that requests were read into: enough for the usual load, and no more for long."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path
from typing import Final

from silofs import limits

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
STATM: Final = Path("/proc/self/statm")


def keep() -> None:
    """Let malloc keep what requests of up to 1 MiB were read into, instead of mapping it anew for each.

    A fresh mapping costs 256 page faults a request. And while the kernel faults a buffer in to copy a request there, a
    SIGKILL of this process ends that request with EIO; into memory that is there it copies without looking at signals.
    """
    with suppress(OSError, AttributeError):  # another C library has its own ways
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * limits.MIB)  # the most that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 64 * limits.MIB)


def own_bytes() -> int:
    """What this process holds in memory of its own: no files, and nothing that is shared."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * mmap.PAGESIZE


def give_back() -> bool:
    """After many large requests have waited at once: return what is free between what is not. Whether that was done.

    Takes some 0.1 s a GiB, in which malloc waits: for a thread, and not often.
    """
    if own_bytes() < limits.MEMORY_KEPT_BYTES:
        return False
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    return True
