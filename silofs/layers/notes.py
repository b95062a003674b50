"""What of the store is being looked at, in the memfd: so that a successor knows what a daemon died of.

A page of the map that the medium cannot give is a SIGBUS: the process ends, and nothing tells it why. So who is about
to look something up says so first, in a slot of its own: the table and the key, or that it goes through the table.
Nothing is taken out again but by the next note; a successor verifies what it finds (silofs/layers/quarantine.py).

A slot is 64 bytes: table number (u8), length of the key (u8), whether all of the table is gone through (u8), 5 unused,
56 of the key. Slot 0 is the writer's, and empty while no transaction is open; slot 1 the event loop's, whose key is an
object id as a native u64, since that is one store to memory; the others are the readers'.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from silofs.layers.memfd import SLOT
from silofs.layers.schema import KEY, OBJECT, Table
from silofs.limits import NOTES_MAX

KEY_BYTES: Final = SLOT - 8
NATIVE: Final = 0xFF
_SCAN: Final = 1 << 16


class Left(NamedTuple):
    """What a slot said. `key` is cut at 56 bytes; `scan`: it goes through the table, and has come so far."""

    table: int
    key: bytes
    scan: bool
    writer: bool


class Note:
    """One slot. `words` is it as u64."""

    __slots__ = ("_raw", "_slot", "words")

    def __init__(self, slot: memoryview) -> None:
        self._slot = slot
        self._raw = slot[8:]
        self.words = slot.cast("Q")

    def look_up(self, table: Table, key: bytes) -> None:
        """Said before a record is looked up, stored or removed."""
        key = key[:KEY_BYTES]
        self._raw[: len(key)] = key
        self.words[0] = table.number | len(key) << 8

    def go_through(self, number: int, key: bytes = b"") -> None:
        """Said before each step of a scan, from that key on; number 0: the tree of all tables."""
        key = key[:KEY_BYTES]
        self._raw[: len(key)] = key
        self.words[0] = number | len(key) << 8 | _SCAN

    def clear(self) -> None:
        self.words[0] = 0

    def release(self) -> None:
        for view in (self.words, self._raw, self._slot):
            view.release()


class Notes:
    """All slots. Without a memfd (a command that opens the store itself) they are nobody's."""

    def __init__(self, area: memoryview | None = None) -> None:
        area = memoryview(bytearray(NOTES_MAX * SLOT)) if area is None else area
        self._notes = [Note(area[at : at + SLOT]) for at in range(0, len(area), SLOT)]
        self.writer, self.loop, *self._free = self._notes
        self._common = self._free.pop()  # of all for whom there is no other

    def take(self) -> Note:
        return self._free.pop() if self._free else self._common

    def give_back(self, note: Note) -> None:
        if note is not self._common and note not in self._free:
            note.clear()
            self._free.append(note)

    def left(self) -> Iterator[Left]:
        """What the slots say. For a successor, before it says anything itself."""
        for index, note in enumerate(self._notes):
            head = note.words[0]
            table, length, scan = head & 0xFF, head >> 8 & 0xFF, bool(head & _SCAN)
            if not head:
                continue
            key = KEY.pack(note.words[1]) if length == NATIVE else bytes(note.words.cast("B")[8 : 8 + length])
            yield Left(table, key, scan, index == 0)

    def mark_loop(self) -> memoryview:
        """The words of the event loop's slot: word 1 is the object that is being read."""
        self.loop.words[0] = OBJECT.number | NATIVE << 8
        return self.loop.words

    def clear(self) -> None:
        for note in self._notes:
            note.clear()

    def release(self) -> None:
        """Let go of the memory."""
        for note in self._notes:
            note.release()


assert sys.byteorder == "little"
