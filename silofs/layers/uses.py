"""Containers in a write transaction: stored, found again, referred to by leaf entries, removed with the last of them.

A leaf entry may refer to any page of a container, and any number of entries to the same one. Two records say which do:
the container's `use` record counts the entries of every slot, and the leaves they are in; a `user` record for each of
those leaves counts its entries. So a container whose pages move elsewhere knows the leaves to change, and `check` can
prove all three from one another. Records are kept back and written by `settle`, which also removes containers that
nothing refers to, with what the index says of their blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import lmdb
import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_SHIFT
from silofs.errors import Damaged
from silofs.layers import containers, schema
from silofs.layers.containers import (
    BLOCK_MASK,
    BLOCK_PAGES,
    NO_HASH,
    PLACE,
    SLOTS,
    Block,
    Entry,
    Piece,
    read_places,
)
from silofs.layers.environment import Environment
from silofs.layers.objects import ObjectChanges
from silofs.layers.schema import Refs
from silofs.layers.use_records import USER, USER_COUNT, Use, read_user

log = logging.getLogger(__name__)


class ContainerChanges(ObjectChanges):
    """Stores containers, and keeps account of who refers to them."""

    def __init__(self, environment: Environment, txn: lmdb.Transaction[memoryview]) -> None:
        super().__init__(environment, txn)
        self._uses: dict[int, Use | None] = {}  # None: its record is damaged, and the container stays
        self._users: dict[bytes, int] = {}  # entries that leaves got more, or less

    # Storing and finding

    def store_container(self, pieces: Sequence[Piece]) -> int:
        """Store a container; its id. The caller refers to its pages in this same transaction."""
        container_id = self.take_ids(1)
        assert container_id <= schema.OBJECT_ID_MAX
        key = schema.KEY.pack(container_id)
        self._put(schema.CONTAINER, key, containers.container(container_id, pieces), append=True)
        pages = sum(piece.pages.bit_count() for piece in pieces)
        self._uses[container_id] = Use(0, pages, np.zeros(SLOTS, np.int64))
        return container_id

    def index_block(self, digest: bytes, places: Sequence[tuple[int, int]]) -> None:
        """Let a block be found from now on: (container, block in it) of its pieces."""
        payload = b"".join(PLACE.pack(*place) for place in places)
        self._put(schema.BLOCK, digest, schema.seal_record(schema.BLOCK, digest, payload))

    def find_block(self, block: Block) -> Refs | None:
        """References of a block's 16 pages (0 where it has none) to where it is stored already, or None."""
        found = self.look_up(block.hash, block.pages)
        if found is None:
            return None
        refs = np.zeros(BLOCK_PAGES, np.uint64)
        for container_id, number, pages in found:
            refs |= piece_refs(container_id, number, pages)
        return refs

    def move_block(self, digest: bytes, old: tuple[int, int], new: Sequence[tuple[int, int]]) -> None:
        """A piece of a block is stored elsewhere, perhaps in several pieces: what the index says follows it."""
        value = self.fetch(schema.BLOCK, digest)
        places = read_places(digest, value) if value is not None else []
        if old in places:
            self.index_block(digest, [place for place in places if place != old] + list(new))

    # Referring

    def refer(self, layer_id: int, pages: npt.NDArray[np.int64], refs: Refs, change: int) -> None:
        """Entries of a layer refer to containers, or (-1) no longer do; references of other kinds are ignored."""
        packed = schema.kinds(refs) == schema.PACKED
        if not packed.any():
            return
        refs, leaves = refs[packed], pages[packed] >> LEAF_SHIFT
        ids = (refs >> np.uint64(schema.OBJECT_SHIFT)).astype(np.int64)
        slots = ((refs >> np.uint64(schema.SLOT_SHIFT)) & np.uint64(schema.SLOT_MASK)).astype(np.intp)
        for container_id in np.unique(ids).tolist():
            mine = ids == container_id
            use = self._use(container_id)
            if use is not None:
                use.counts += change * np.bincount(slots[mine], minlength=SLOTS)
            numbers, counts = np.unique(leaves[mine], return_counts=True)
            for leaf, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                key = USER.pack(container_id, layer_id, leaf)
                self._users[key] = self._users.get(key, 0) + change * count

    def use(self, container_id: int) -> Use:
        """The container's record as this transaction has changed it."""
        use = self._use(container_id)
        if use is None:
            raise Damaged(f"the record of the use of container {container_id} is damaged")
        return use

    def _use(self, container_id: int) -> Use | None:
        """The same; None when it cannot be read."""
        if container_id not in self._uses:
            try:
                self._uses[container_id] = super().use(container_id)
            except Damaged as error:
                log.error("%s; it stays on disk", error)
                self._uses[container_id] = None
        return self._uses[container_id]

    def users(self, container_id: int) -> Iterator[tuple[int, int]]:
        """(layer, leaf) of the leaves whose entries refer to a container, as of the last `settle`."""
        for key, _ in self.scan(schema.USER, schema.KEY.pack(container_id)):
            _, layer, leaf = USER.unpack(key)
            yield layer, leaf

    # The end

    def settle(self) -> None:
        """Bring the records of use up to date; remove containers that nothing refers to."""
        super().settle()
        for key in sorted(self._users):
            self._settle_user(key, self._users[key])
        for container_id in sorted(self._uses):
            use = self._uses[container_id]
            if use is not None:
                self._settle_use(container_id, use)
        self._users = {}
        self._uses = {}

    def _settle_user(self, key: bytes, change: int) -> None:
        if not change:
            return
        value = self.fetch(schema.USER, key)
        try:
            before = 0 if value is None else read_user(key, value)
        except Damaged as error:
            log.error("%s; its container stays on disk", error)
            self._uses[USER.unpack(key)[0]] = None
            return
        after = before + change
        if after < 0:
            log.error("leaf entries of %s gave up more of a container than they had", key.hex())
            self._uses[USER.unpack(key)[0]] = None
            return
        if after:
            self._put(schema.USER, key, schema.seal_record(schema.USER, key, USER_COUNT.pack(after)))
        elif before:
            self._delete(schema.USER, key)
        use = self._uses.get(USER.unpack(key)[0])
        if use is not None:
            use.leaves += bool(after) - bool(before)

    def _settle_use(self, container_id: int, use: Use) -> None:
        key = schema.KEY.pack(container_id)
        if (use.counts < 0).any() or use.leaves < 0:
            log.error("pages of container %d were given up that nobody had; it stays on disk", container_id)
        elif use.counts.any():
            self._put(schema.USE, key, schema.seal_record(schema.USE, key, use.payload()))
        else:
            for found in self._entries(container_id):
                self._forget_block(container_id, found)
            self._remove(schema.CONTAINER, key)
            self._remove(schema.USE, key)

    def _entries(self, container_id: int) -> list[Entry]:
        try:
            return containers.entries(container_id, self.container(container_id))
        except Damaged as error:
            log.error("%s; the index still names its blocks", error)
            return []

    def _forget_block(self, container_id: int, found: Entry) -> None:
        """Take a block out of the index, if that is where the index says it is."""
        value = self.fetch(schema.BLOCK, found.hash) if found.hash != NO_HASH else None
        if value is None:
            return
        try:
            if container_id not in dict(read_places(found.hash, value)):
                return
        except Damaged as error:
            log.error("%s", error)
        self._delete(schema.BLOCK, found.hash)


def piece_refs(container_id: int, number: int, pages: int) -> Refs:
    """References of the 16 pages of a block to a piece of it, 0 where that has none."""
    refs = np.zeros(BLOCK_PAGES, np.uint64)
    slots = np.array(containers.slots_of(number, pages))
    refs[slots & BLOCK_MASK] = [schema.ref(schema.PACKED, container_id, slot) for slot in slots.tolist()]
    return refs
