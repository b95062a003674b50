"""The table of open file handles, in the memfd of the write log: it survives the daemon.

A slot is 64 bytes: id, flags, volume uuid, layer (0 for a volume, the sealed layer for a snapshot), FUSE request id of
its OPEN, 8 unused, checksum. A slot is in use iff its checksum is right and its id is not 0, so one that was torn by a
kill is free: the OPEN was not answered, and the kernel sends it again. Ids come from a counter beside the table and are
never reused, so a late RELEASE cannot hit another handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest as checksum

from silofs.errors import TooManyOpen
from silofs.layers.memfd import SLOT

_SLOT = Struct("<QQ16sQQ8x")
_SUM = Struct("<Q")
assert _SLOT.size + _SUM.size == SLOT


class Handle(NamedTuple):
    """One open file. `layer` is 0 for a volume; for a snapshot the id of its sealed layer."""

    id: int
    flags: int
    uuid: bytes
    layer: int
    request: int


class HandleTable:
    """Handles by id. Lookups are a dict's; the table behind it is written through.

    closing: called with a handle's id before it is forgotten, for what hangs on it (its locks).
    """

    __slots__ = ("_by_id", "_by_request", "_counter", "_free", "_table", "_where", "closing")

    def __init__(self, table: memoryview, counter: memoryview) -> None:
        self.closing: Callable[[int], None] = lambda fh: None
        self._table = table
        self._counter = counter
        self._by_id: dict[int, Handle] = {}
        self._by_request: dict[int, int] = {}
        self._where: dict[int, int] = {}
        self._free: list[int] = []
        for at in range(len(table) - SLOT, -1, -SLOT):
            raw = bytes(table[at : at + _SLOT.size])
            handle = Handle(*_SLOT.unpack(raw))
            if handle.id and _SUM.unpack_from(table, at + _SLOT.size)[0] == checksum(raw):
                self._remember(handle, at)
            else:
                self._free.append(at)

    def _remember(self, handle: Handle, at: int) -> None:
        self._by_id[handle.id] = handle
        self._where[handle.id] = at
        if handle.request:
            self._by_request[handle.request] = handle.id

    def allocate(self, uuid: bytes, flags: int, *, layer: int = 0, request: int = 0) -> int:
        """A new handle's id. A `request` (FUSE's unique id of the OPEN) that has a handle gets that one again: the
        kernel resends an OPEN whose answer it did not see."""
        if request and request in self._by_request:
            return self._by_request[request]
        self.expect_room()
        fh = int.from_bytes(self._counter, "little")
        # The counter first: killed in between, an id is lost, and never given twice.
        self._counter[:] = (fh + 1).to_bytes(8, "little")
        handle = Handle(fh, flags, uuid, layer, request)
        at = self._free.pop()
        raw = _SLOT.pack(*handle)
        self._table[at : at + SLOT] = raw + _SUM.pack(checksum(raw))
        self._remember(handle, at)
        return fh

    def of_request(self, request: int) -> int | None:
        """The handle that an OPEN or CREATE of this number has made."""
        return self._by_request.get(request) if request else None

    def expect_room(self) -> None:
        """TooManyOpen when another handle would be refused."""
        if not self._free:
            raise TooManyOpen(f"{len(self._by_id)} files are open on this mount")

    def get(self, fh: int) -> Handle | None:
        return self._by_id.get(fh)

    def release(self, fh: int) -> Handle | None:
        """Forget a handle; None when there is none (a resent RELEASE)."""
        handle = self._by_id.get(fh)
        if handle is None:
            return None
        self.closing(fh)
        del self._by_id[fh]
        at = self._where.pop(fh)
        self._by_request.pop(handle.request, None)
        self._table[at : at + 8] = bytes(8)
        self._free.append(at)
        return handle

    def items(self) -> Iterator[Handle]:
        """Every open handle."""
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)
