"""The leaves that the writer thread keeps between commits: own and resolved entries of heads. Pure.

Only the writer changes a head, so what it last wrote is what is stored; a transaction that fails takes its entries
with it (`WarmLeaves.update` is called after the commit). Arrays in here are shared and never changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from silofs.layers.schema import Refs

Entry = tuple[Refs, Refs]  # a head's own references of a leaf, and the resolved ones


class WarmLeaves:
    """(head, leaf) -> entry; the least recently written go first."""

    def __init__(self, entries_max: int) -> None:
        self._max = entries_max
        self._entries: OrderedDict[tuple[int, int], Entry] = OrderedDict()

    def get(self, head: int, leaf: int) -> Entry | None:
        return self._entries.get((head, leaf))

    def leaves_of(self, head: int) -> list[int]:
        return [leaf for at, leaf in self._entries if at == head]

    def update(self, entries: Mapping[tuple[int, int], Entry | None]) -> None:
        """Take over what a transaction left; None forgets."""
        for key, entry in entries.items():
            if entry is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = entry
                self._entries.move_to_end(key)
        while len(self._entries) > self._max:
            self._entries.popitem(last=False)

    def drop_leaves(self, leaves: Iterable[int]) -> None:
        """Forget those leaves of every head: a layer below has changed."""
        wanted = set(leaves)
        for key in [key for key in self._entries if key[1] in wanted]:
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
