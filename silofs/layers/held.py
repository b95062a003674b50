"""The space that acknowledged writes will need, held before they are acknowledged. Any thread.

A commit writes to free pages inside the data file and, where those do not do, behind its last page. So blocks are
allocated there ahead, past the end of the file (fallocate(2) with FALLOC_FL_KEEP_SIZE): nobody else can take them, and
LMDB writes into them. A figure of free space alone is a race with every other program on the file system.

The ledger: what is allocated behind the last page, plus what is certainly free inside, minus what was claimed for
writes that are not committed yet, minus a reserve that only deletion, the cleaner and catalog records use. A claim is
the worst that committing a write can cost. Pages inside are counted only when no more can be allocated, and then
conservatively: those that any reader may still need are not, nor those that lie in no run of an object's length.

Where fallocate holds nothing, as on copy-on-write file systems, the ledger goes by statvfs(3). docs/write-path.md.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from silofs.blocks import PAGE
from silofs.errors import StoreFull
from silofs.layers.filesystem import allocate, free_bytes, holds_space
from silofs.layers.freelist import free_pages, in_runs
from silofs.limits import HELD_AHEAD_BYTES, HELD_LEAVES_BYTES, HELD_RESERVE_BYTES, MIB, SPACE_FLOOR_BYTES

log = logging.getLogger(__name__)

BYTE_COST: Final = 3
"""Written by a commit, at most, for a byte that waits for it: itself, and for each page that it replaces two pages of
LMDB's trees, with a live bitmap or the two records of a lone page."""
WRITE_COST: Final = 4 * PAGE
"""And for each record: its leaf, and the pages of the trees that lead to leaf, sums and presence."""
COMMIT_COST: Final = 4 * MIB
"""And for each commit."""
FREELIST_SHARE: Final = 256
"""LMDB may rewrite its list of free pages in a commit: 8 bytes a page, twice."""

OBJECT_RUN: Final = 32  # pages of LMDB's that an object takes, in a row
STEP_MIN: Final = 1 * MIB  # an allocation that fails is tried with half of it, down to this
SAMPLE_S: Final = 0.1  # how old a figure of statvfs may be


def worst_case(nbytes: int, records: int = 1) -> int:
    """Bytes that committing `nbytes` of writes may take."""
    return nbytes * BYTE_COST + records * WRITE_COST


def no_room() -> StoreFull:
    return StoreFull("the file system of the store has no room for another write")


@dataclass(frozen=True, slots=True)
class Space:
    """The ledger's figures, for `status`; bytes."""

    held: bool | None  # whether space can be held here
    held_bytes: int  # allocated behind the file's last page
    inside_bytes: int  # counted on inside the file, once nothing more can be allocated
    claimed_bytes: int  # set aside for what is acknowledged and not committed
    reserve_bytes: int  # only for deletion, the cleaner and catalog records
    full: bool


class Held:
    """The ledger of one data file. `holds` is None until the first allocation was tried."""

    def __init__(self, data_file: Path) -> None:
        self.data_file = data_file
        self.holds: bool | None = None
        self.full = False  # nothing more could be allocated, the last time it was tried
        self._lock = threading.Lock()  # of the figures
        self._topping = threading.Lock()  # of the allocating
        self._used = 0  # end of the newest commit's last page
        self._end = 0  # up to where blocks are allocated
        self._unused = 0  # bytes of the file that no table uses
        self._inside = 0  # of these, what can be counted on
        self._claimed = 0
        self._free = 0
        self._free_at = float("-inf")

    # Claims

    def claim(self, cost: int) -> bool:
        """Set `cost` bytes aside if they are there; allocates nothing, and waits for nothing."""
        with self._lock:
            if self._available() < cost:
                return False
            self._claimed += cost
            return True

    def let_go(self, cost: int) -> None:
        """What was claimed is committed, or not needed."""
        with self._lock:
            self._claimed -= cost

    def _available(self) -> int:
        held = max(0, self._end - self._used) + self._inside
        there = held if self.holds else self._sample() + self._unused // 2
        return there - self._reserve() - self._claimed

    def _reserve(self) -> int:
        reserve = SPACE_FLOOR_BYTES if self.holds is False else HELD_RESERVE_BYTES
        return reserve + COMMIT_COST + self._unused // FREELIST_SHARE

    def _sample(self) -> int:
        """Free bytes of the file system."""
        if time.monotonic() - self._free_at >= SAMPLE_S:
            self._free = free_bytes(self.data_file)
            self._free_at = time.monotonic()
        return self._free

    # Allocating

    @property
    def low(self) -> bool:
        """Whether `top_up` should be called before somebody has to wait for it."""
        with self._lock:
            return bool(self.holds) and self._available() < HELD_AHEAD_BYTES // 2

    def top_up(self, cost: int) -> bool:
        """Allocate until `cost` more bytes can be claimed, and some ahead; whether they can. May touch the disk."""
        with self._topping:
            if self.holds is None:
                self._try_out()
            if self.holds:
                with self._lock:
                    start = self._end
                    # What is counted inside is left out: it serves when there is nothing else.
                    end = max(self._used, start) + cost + HELD_AHEAD_BYTES - (self._available() - self._inside)
                if not start:
                    # Pages that were freed before they were written are holes of the file: those are filled as well.
                    status = self.data_file.stat()
                    start = 0 if status.st_blocks * 512 < status.st_size else self._used
                if end > start:
                    self._allocate(start, end)
            with self._lock:
                self._free_at = float("-inf")
                return self._available() >= cost

    def _try_out(self) -> None:
        try:
            self.holds = holds_space(self.data_file.parent)
        except OSError as error:
            log.warning("whether space can be held could not be tried: %s", error)
            self.holds = False
        if not self.holds:
            log.warning("space cannot be held on this file system: writes are admitted by accounting")

    def _allocate(self, start: int, end: int) -> None:
        """Allocate from `start` to `end`, as far as there is room; no more than an ordinary user could, nor all.

        HELD_LEAVES_BYTES are left to what is made beside the data: on XFS even a socket needs blocks.
        """
        end = -(-end // STEP_MIN) * STEP_MIN
        step = end - start
        fd = os.open(self.data_file, os.O_RDWR | os.O_CLOEXEC)
        try:
            while start < end and step >= STEP_MIN:
                room = free_bytes(self.data_file) - HELD_LEAVES_BYTES
                if room < STEP_MIN:
                    break
                step = min(step, end - start, room // STEP_MIN * STEP_MIN)
                error = allocate(fd, start, step)
                if not error:
                    start += step
                elif error in (errno.ENOSPC, errno.EDQUOT):
                    step //= 2
                elif error != errno.EINTR:
                    # The disk fails. What is held already counts, reads go on, and who needs more tries again.
                    log.error("space in %s cannot be held: %s", self.data_file, os.strerror(error))
                    break
        finally:
            os.close(fd)
        full = start < end
        if full and not self.full:
            log.warning("the file system of the store is full: nothing more can be held")
        with self._lock:
            self.full = full
            self._end = max(self._end, start)
            if not full:
                self._inside = 0

    # What the writer says

    def committed(self, used: int, unused: int) -> None:
        """The newest commit ends its file at `used` bytes, and uses all but `unused` of them."""
        with self._lock:
            self._used, self._unused = used, unused

    def count_inside(self, oldest: int) -> None:
        """Count what can be written inside the file, while it cannot be made longer. On the writer's thread.

        `oldest`: the oldest transaction that any reader still sees.
        """
        pages = in_runs(free_pages(self.data_file, oldest), OBJECT_RUN)
        with self._lock:
            # Less than that: LMDB breaks runs up for single pages before it has looked through its whole list.
            self._inside = pages * PAGE // 4 * 3 if self.full else 0

    def give_back(self) -> None:
        """Free what is allocated behind the end of the file. Only when nobody writes to it any more."""
        with self._topping, self._lock:
            if self._end:
                # Blocks beyond the end go even when the size stays (ext4, XFS, tmpfs).
                os.truncate(self.data_file, self.data_file.stat().st_size)
            self._end = 0

    def spare(self) -> bool:
        """Let others have what is held, if nobody counts on it; whether that gave them anything.

        On the writer's thread, or where there is none: only so is the file not made longer meanwhile.
        """
        with self._topping, self._lock:
            if self._claimed:
                return False
            before = self.data_file.stat()
            os.truncate(self.data_file, before.st_size)
            self._end = 0
            self._free_at = float("-inf")
            return self.data_file.stat().st_blocks < before.st_blocks

    # What is told

    def room(self, unused: int) -> int:
        """Bytes that writes may still take, less than 0 when the reserve is touched; `unused` as in `committed`."""
        with self._lock:
            held = max(0, self._end - self._used)
            inside = self._inside if self.full else unused // 2
            return free_bytes(self.data_file) + held + inside - self._reserve() - self._claimed

    def statistics(self) -> Space:
        with self._lock:
            held = max(0, self._end - self._used)
            return Space(self.holds, held, self._inside, self._claimed, self._reserve(), self.full)
