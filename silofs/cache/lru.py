"""A bounded map that keeps what is used, at the price of a dict lookup a hit. Pure.

Two generations instead of a linked list: a hit in the young one costs nothing more than the lookup, a hit in the old
one moves the entry over, and when the young one has half the bound it becomes the old one and the rest goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRU(Generic[K, V]):
    """At most `bound` entries. `young` may be looked up directly on a hot path; `get` must follow where it misses."""

    __slots__ = ("_half", "_old", "hits", "misses", "young")

    def __init__(self, bound: int) -> None:
        if bound < 2:
            raise ValueError("the bound is at least 2")
        self._half = bound // 2
        self.young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self.hits = 0
        self.misses = 0

    def get(self, key: K) -> V | None:
        value = self.young.get(key)
        if value is None:
            value = self._old.pop(key, None)
            if value is None:
                self.misses += 1
                return None
            self.put(key, value)
        self.hits += 1
        return value

    def put(self, key: K, value: V) -> None:
        young = self.young
        young[key] = value
        if self._old:
            self._old.pop(key, None)
        if len(young) >= self._half:
            # Emptied in place: callers keep a reference to `young`.
            self._old = young.copy()
            young.clear()

    def drop(self, key: K) -> None:
        """Forget one entry, if it is there."""
        self.young.pop(key, None)
        self._old.pop(key, None)

    def drop_range(self, start: K, end: K) -> None:
        """Forget every entry with start <= key < end. O(entries): for rare events."""
        for generation in (self.young, self._old):
            for key in [k for k in generation if start <= k < end]:  # type: ignore[operator]
                del generation[key]

    def age(self) -> None:
        """Forget what was not used since the last call, however few entries there are."""
        self._old = self.young.copy()
        self.young.clear()

    def clear(self) -> None:
        self.young.clear()
        self._old.clear()

    def __contains__(self, key: K) -> bool:
        return key in self.young or key in self._old

    def __iter__(self) -> Iterator[K]:
        yield from tuple(self.young)
        yield from tuple(self._old)

    def __len__(self) -> int:
        return len(self.young) + len(self._old)

    def statistics(self) -> dict[str, int]:
        return {"entries": len(self), "hits": self.hits, "misses": self.misses}
