"""Sets of half-open integer ranges. Pure; every set is sorted, disjoint and free of touching neighbours.

Used for zeroed page ranges that wait for a commit, for maps that travel as runs, and for what is still missing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Extents:
    """A set of integers kept as ranges. Lookup is O(log n) in the number of ranges, change O(n)."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add every integer of [start, end)."""
        if start >= end:
            return
        left = bisect_left(self._ends, start)
        right = bisect_right(self._starts, end)
        if left < right:
            start = min(start, self._starts[left])
            end = max(end, self._ends[right - 1])
        self._starts[left:right] = [start]
        self._ends[left:right] = [end]

    def remove(self, start: int, end: int) -> None:
        """Remove every integer of [start, end)."""
        if start >= end:
            return
        left = bisect_right(self._ends, start)
        right = bisect_left(self._starts, end)
        if left >= right:
            return
        starts, ends = [], []
        if self._starts[left] < start:
            starts.append(self._starts[left])
            ends.append(start)
        if self._ends[right - 1] > end:
            starts.append(end)
            ends.append(self._ends[right - 1])
        self._starts[left:right] = starts
        self._ends[left:right] = ends

    def __contains__(self, value: int) -> bool:
        at = bisect_right(self._starts, value) - 1
        return at >= 0 and value < self._ends[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(tuple(self._starts), tuple(self._ends), strict=True)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """Number of ranges (not of integers: see `total`)."""
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Extents({list(self)})"

    @property
    def total(self) -> int:
        """Number of integers in the set."""
        return sum(self._ends) - sum(self._starts)

    def overlap(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of the set that lie in [start, end)."""
        at = bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            yield max(start, self._starts[at]), min(end, self._ends[at])
            at += 1

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that are not in the set."""
        at = start
        for begin, stop in self.overlap(start, end):
            if at < begin:
                yield at, begin
            at = stop
        if at < end:
            yield at, end

    def copy(self) -> Extents:
        other = Extents()
        other._starts = self._starts.copy()
        other._ends = self._ends.copy()
        return other
