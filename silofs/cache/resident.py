"""Which pages of which objects are believed to be in memory. Pure.

Touching a page of the store that is not in memory stops the event loop for a disk access, so warm pages are read
inline and the others by a thread. mincore(2) tells which is which; this remembers what it said, one bit a page, for a
while: the kernel may evict pages at any time, and then one read is slow, not wrong.
"""

from __future__ import annotations

from silofs.cache.lru import LRU


class Resident:
    """Bits by object id. `young` may be looked up directly on a hot path; `get` must follow where it misses."""

    __slots__ = ("_bits", "young")

    def __init__(self, bound: int) -> None:
        self._bits: LRU[int, int] = LRU(bound)
        self.young = self._bits.young

    def get(self, key: int) -> int:
        """The pages believed to be in memory, as bits; 0 when nothing is known."""
        return self._bits.get(key) or 0

    def note(self, key: int, bits: int) -> None:
        """Replace what is believed of an object."""
        if bits:
            self._bits.put(key, bits)
        else:
            self._bits.drop(key)

    def add(self, key: int, bits: int) -> None:
        """These pages were just touched."""
        self._bits.put(key, (self._bits.get(key) or 0) | bits)

    def age(self) -> None:
        """Forget the objects that nobody asked for since the last call: they may have been evicted meanwhile.

        What is asked for is kept, since being read keeps it in memory as well.
        """
        self._bits.age()

    def statistics(self) -> dict[str, int]:
        return self._bits.statistics()
