"""How full the store's objects are, by groups of 256 ids: what the cleaner chooses from without reading the store.

Kept by the writer, changed with every commit, 12 bytes for each group (about 31 MiB of objects). After a start it is
read from the live bitmaps in bounded steps; until that is over, groups not yet read are unknown and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.layers import schema

Groups = npt.NDArray[np.int64]

OBJECT_LMDB_PAGES: Final = schema.OBJECT_PAGES + 1
WORTH: Final = 0.85  # groups that are fuller are left alone: moving six pages to free one is no gain


class Usage:
    """Objects and live slots of every group; totals."""

    def __init__(self) -> None:
        self._groups: Groups = np.zeros(0, np.int64)  # ascending
        self._objects: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._live: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)
        self.read_to = 0  # groups below it are known; all of them once `complete`
        self.complete = False
        self.objects = 0
        self.live = 0

    @property
    def stored_pages(self) -> int:
        """LMDB pages that objects take."""
        return self.objects * OBJECT_LMDB_PAGES

    @property
    def dead_pages(self) -> int | None:
        """Slots of objects that hold nothing any more; None while that is not known."""
        return self.objects * schema.OBJECT_PAGES - self.live if self.complete else None

    def learn(self, found: Mapping[int, tuple[int, int]], read_to: int | None) -> None:
        """What was read of the groups below `read_to`; None: there are no more."""
        self.read_to = self.read_to if read_to is None else read_to
        self.complete = read_to is None
        self._put(found)

    def update(self, changed: Mapping[int, tuple[int, int]]) -> None:
        """What a transaction left of the groups that it changed, once it is committed."""
        self._put({group: of for group, of in changed.items() if self.complete or group < self.read_to})

    def _put(self, changed: Mapping[int, tuple[int, int]]) -> None:
        if not changed:
            return
        groups = np.array(sorted(changed), np.int64)
        values = np.array([changed[group] for group in groups.tolist()], np.int64)
        known = np.isin(groups, self._groups, assume_unique=True)
        at = np.searchsorted(self._groups, groups[known])
        self.objects += int(values[:, 0].sum()) - int(self._objects[at].sum(dtype=np.int64))
        self.live += int(values[:, 1].sum()) - int(self._live[at].sum(dtype=np.int64))
        self._objects[at], self._live[at] = values[known, 0], values[known, 1]
        fresh = ~known & (values[:, 0] > 0)
        if fresh.any():
            # Nearly always new ids, which come last. Those that have emptied leave at the same time.
            kept = self._objects > 0
            merged = np.concatenate((self._groups[kept], groups[fresh]))
            order = np.argsort(merged, kind="stable")
            self._groups = merged[order]
            self._objects = np.concatenate((self._objects[kept], values[fresh, 0].astype(np.uint16)))[order]
            self._live = np.concatenate((self._live[kept], values[fresh, 1].astype(np.uint16)))[order]

    def emptiest(self, count: int) -> list[int]:
        """Groups worth cleaning, the best first: by what is freed for what is moved, weighed with how old they are.

        That is LFS's cost-benefit rule: young groups go on losing pages by themselves, and what has survived long will
        not be moved again soon.
        """
        slots = self._objects.astype(np.float64) * schema.OBJECT_PAGES
        some = np.flatnonzero(self._live < WORTH * slots)
        if not len(some):
            return []
        used = self._live[some] / slots[some]
        age = self._groups[-1] - self._groups[some] + 1
        best = some[np.argsort(-(1 - used) * age / (1 + used), kind="stable")[:count]]
        groups: list[int] = self._groups[best].tolist()
        return groups

    def clear(self) -> None:
        """Nothing is known."""
        self.__init__()  # type: ignore[misc]
