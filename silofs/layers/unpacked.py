"""Blocks of containers as they were before packing, the ones last used, for all readers of a store.

Containers never change and their ids are not used again, so what is in here stays right whatever happens to the store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from silofs.layers.containers import BLOCK_SHIFT, Unpacked


class UnpackedBlocks:
    """At most so many blocks, 64 KiB each; those least recently used go first. Any thread."""

    def __init__(self, blocks_max: int) -> None:
        self._max = blocks_max
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Unpacked] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def get(self, container_id: int, slot: int) -> Unpacked | None:
        """The block that the slot is in."""
        key = container_id << BLOCK_SHIFT | slot >> BLOCK_SHIFT
        with self._lock:
            found = self._blocks.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._blocks.move_to_end(key)
            return found

    def put(self, container_id: int, slot: int, unpacked: Unpacked) -> None:
        with self._lock:
            self._blocks[container_id << BLOCK_SHIFT | slot >> BLOCK_SHIFT] = unpacked
            while len(self._blocks) > self._max:
                self._blocks.popitem(last=False)

    def statistics(self) -> dict[str, int]:
        return {"blocks": len(self._blocks), "hits": self.hits, "misses": self.misses}
