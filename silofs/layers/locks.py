"""Byte range locks of open files, in the memfd: they survive the daemon, and die with their handle.

The rules are those of fcntl(2), "Advisory record locking" and "Open file description locks". A lock belongs to an
*owner*, the kernel's number for an open file description or for a process; a lock of one owner never conflicts with
another lock of that owner, it takes its place wherever the two overlap, which may shorten or split the older one; and
neighbours of one kind become one. Locks of different owners on one file conflict where they overlap, unless both are
for reading.

A file is a volume, or a snapshot's layer. A lock is also bound to the handle through which it was set, and goes when
that is released: a killed holder of a lock sends no unlock, but the kernel closes its files. (So a process's own locks
stay until the file is closed that they were set through; fcntl(2) drops them with any other that it has open.)

**What a kill leaves.** A change of the table may write several slots (unlocking the middle of a range takes one away
and adds two), and must be seen as a whole or not at all, since another owner's request may be answered before this one
is sent again. So a slot says at which version of the table it was *born* and at which it *died*, and one word in front
of the table says which version is current:

| step of a change to version v + 1 | killed after it, the next daemon finds |
|---|---|
| the new locks are written into free slots, born at v + 1 | version v: slots born later are free |
| what they replace is marked as having died at v + 1 | version v: slots that die later live |
| the current version becomes v + 1 (one store of 8 bytes) | version v + 1 |

A free slot is taken in this order: born "never", the lock, "has not died", born at v + 1.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from silofs import failpoints
from silofs.errors import NoLocks
from silofs.layers.handles import Handle, HandleTable
from silofs.limits import LOCKS_HANDLE_MAX

READ: Final = fcntl.F_RDLCK
WRITE: Final = fcntl.F_WRLCK
UNLOCK: Final = fcntl.F_UNLCK
TO_EOF: Final = (1 << 63) - 1
"""The last byte that a file can have; a range that ends here covers whatever the file grows to."""

_WORDS: Final = 8  # of 8 bytes, in a slot and in the header
_BORN, _DIED, _HANDLE, _OWNER, _START, _END, _KIND = range(7)
_NEVER: Final = (1 << 64) - 1

_File = tuple[bytes, int]


class Lock(NamedTuple):
    """One lock. `start` and `end` are its first and last byte; `kind` is READ or WRITE; `pid` is the locker's."""

    handle: int
    owner: int
    start: int
    end: int
    kind: int
    pid: int

    def overlaps(self, start: int, end: int) -> bool:
        return self.start <= end and start <= self.end


class LockTable:
    """The locks of one mount. Handles that are not open have none, and can set none.

    released: called whenever locks may have gone, for whoever waits for one.
    """

    def __init__(self, area: memoryview, handles: HandleTable) -> None:
        """`area`: a multiple of 64 bytes, at least 128; all zero is an empty table."""
        self._words = area.cast("Q")
        self._handles = handles
        self._locks: dict[_File, dict[int, Lock]] = {}  # slot -> lock
        self._counts: dict[int, int] = {}  # locks by handle
        self._free: list[int] = []
        self.released: Callable[[], None] = lambda: None
        self._version = self._words[0]
        handles.closing = self.drop
        for slot in range(len(self._words) // _WORDS - 1, 0, -1):
            self._load(slot)

    def _load(self, slot: int) -> None:
        """Take over what an earlier daemon left in a slot."""
        words, at = self._words, slot * _WORDS
        born, died = words[at + _BORN], words[at + _DIED]
        if not 0 < born <= self._version or 0 < died <= self._version:
            words[at + _BORN] = 0  # else it lives once the table comes to that version
            self._free.append(slot)
            return
        words[at + _DIED] = 0
        fh, owner, start, end, kind = words[at + _HANDLE : at + _KIND + 1].tolist()
        lock = Lock(fh, owner, start, end, kind & 0xFF, kind >> 32)
        handle = self._handles.get(lock.handle)
        if handle is None:  # it was released, and the daemon killed before the locks were
            words[at + _BORN] = 0
            self._free.append(slot)
        else:
            self._remember(_file(handle), slot, lock)

    def _remember(self, file: _File, slot: int, lock: Lock) -> None:
        self._locks.setdefault(file, {})[slot] = lock
        self._counts[lock.handle] = self._counts.get(lock.handle, 0) + 1

    # What may be asked

    def test(self, handle: int, owner: int, start: int, end: int, kind: int) -> Lock | None:
        """The lock that keeps `owner` from having [start, end] for `kind`: the one that begins first. None if none."""
        found = self._handles.get(handle)
        if found is None or kind == UNLOCK:
            return None
        conflicts = (
            lock
            for lock in self._locks.get(_file(found), {}).values()
            if lock.owner != owner and lock.overlaps(start, end) and WRITE in (lock.kind, kind)
        )
        return min(conflicts, key=lambda lock: (lock.start, lock.end, lock.owner), default=None)

    def items(self, uuid: bytes, layer: int = 0) -> Iterator[Lock]:
        """The locks of a file."""
        return iter(tuple(self._locks.get((uuid, layer), {}).values()))

    def __len__(self) -> int:
        return sum(self._counts.values())

    # What changes them

    def set(self, handle: int, owner: int, start: int, end: int, kind: int, pid: int = 0) -> Lock | None:
        """Lock or unlock [start, end] (inclusive); the lock that forbids it, or None when it was done.

        Raises NoLocks when there is no room for what it would leave; nothing has changed then.
        """
        found = self._handles.get(handle)
        if found is None or not 0 <= start <= end <= TO_EOF:
            raise ValueError(f"handle {handle} cannot be locked from {start} to {end}")
        conflict = self.test(handle, owner, start, end, kind)
        if conflict is None:
            wanted = Lock(handle, owner, start, end, kind, pid)
            self._replace(_file(found), wanted)
            if kind != WRITE:
                self.released()
        return conflict

    def drop(self, handle: int) -> None:
        """Every lock that was set through a handle: the handle table calls it before it forgets one."""
        found = self._handles.get(handle)
        if found is not None and self._counts.get(handle):
            locks = self._locks[_file(found)]
            self._change(_file(found), [slot for slot, lock in locks.items() if lock.handle == handle], ())
            self.released()

    def _replace(self, file: _File, wanted: Lock) -> None:
        """What the owner has in the range becomes `wanted`; what sticks out on either side stays."""
        gone: list[int] = []
        left: list[Lock] = []
        start, end = wanted.start, wanted.end
        for slot, lock in self._locks.get(file, {}).items():
            if lock.owner != wanted.owner:
                continue
            alike = lock.kind == wanted.kind and lock.handle == wanted.handle
            if alike and lock.overlaps(wanted.start - 1, wanted.end + 1):
                gone.append(slot)
                start, end = min(start, lock.start), max(end, lock.end)
            elif lock.overlaps(wanted.start, wanted.end):
                gone.append(slot)
                if lock.start < wanted.start:
                    left.append(lock._replace(end=wanted.start - 1))
                if lock.end > wanted.end:
                    left.append(lock._replace(start=wanted.end + 1))
        if wanted.kind != UNLOCK:
            left.append(wanted._replace(start=start, end=end))
        if gone or left:
            self._change(file, gone, left)

    def _change(self, file: _File, gone: Sequence[int], new: Sequence[Lock]) -> None:
        """The one way in which the table changes; the module's docstring has what a kill leaves."""
        self._expect_room(len(gone), new)
        words, version = self._words, self._version + 1
        taken = [(self._free.pop(), lock) for lock in new]
        for slot, lock in taken:
            at = slot * _WORDS
            words[at + _BORN] = _NEVER
            for index, word in enumerate((lock.handle, lock.owner, lock.start, lock.end, lock.kind | lock.pid << 32)):
                words[at + _HANDLE + index] = word
            words[at + _DIED] = 0
            words[at + _BORN] = version
        failpoints.hit("locks.written")
        for slot in gone:
            words[slot * _WORDS + _DIED] = version
        failpoints.hit("locks.marked")
        words[0] = self._version = version
        locks = self._locks.setdefault(file, {})
        for slot in gone:
            self._counts[locks.pop(slot).handle] -= 1
            self._free.append(slot)
        for slot, lock in taken:
            self._remember(file, slot, lock)
        if not locks:
            del self._locks[file]

    def _expect_room(self, gone: int, new: Sequence[Lock]) -> None:
        # Slots that go are free only afterwards, so that what a kill leaves in them can still be read.
        if len(new) > len(self._free):
            raise NoLocks(f"{len(self)} ranges are locked on this mount")
        if len(new) > gone and new and self._counts.get(new[-1].handle, 0) >= LOCKS_HANDLE_MAX:
            raise NoLocks(f"{LOCKS_HANDLE_MAX} ranges are locked through one open file")


def _file(handle: Handle) -> _File:
    return (b"", handle.layer) if handle.layer else (handle.uuid, 0)
