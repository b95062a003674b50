"""The part of `check` that looks at containers: leaf entries, `user` and `use` records, headers and the index agree.

Four records say the same from four sides: a leaf's entries refer to a container; its `user` record for that leaf counts
them; its `use` record counts them by slot, and the leaves; and its header has a page in every slot that is referred to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import numpy as np

from silofs.blocks import LEAF_SHIFT
from silofs.errors import Damaged, ObjectMissing
from silofs.layers import containers, schema
from silofs.layers.containers import BLOCK_SHIFT, NO_HASH, RAW, SLOTS
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import Refs
from silofs.layers.use_records import USER, Counts, read_use, read_user, referred

CODE: Final = "container"


class Report(Protocol):
    def __call__(self, code: str, message: str, *, layer: int | None = None, page: int | None = None) -> None: ...


class ContainerChecker:
    """Counts what leaves refer to, then compares with what is on record."""

    def __init__(self, txn: ReadTxn, report: Report) -> None:
        self._txn = txn
        self._report = report
        self._counts: dict[int, Counts] = {}  # container -> references to each slot
        self._users: dict[tuple[int, int, int], int] = {}  # container, layer, leaf -> entries

    @contextmanager
    def _reporting(self, *, layer: int | None = None, page: int | None = None) -> Iterator[None]:
        try:
            yield
        except (Damaged, ObjectMissing) as error:
            self._report(CODE, str(error), layer=layer, page=page)

    def count(self, layer_id: int, leaf: int, refs: Refs) -> None:
        """Take note of a leaf's entries."""
        packed = refs[schema.kinds(refs) == schema.PACKED]
        ids = packed >> np.uint64(schema.OBJECT_SHIFT)
        slots = ((packed >> np.uint64(schema.SLOT_SHIFT)) & np.uint64(schema.SLOT_MASK)).astype(np.intp)
        for container_id in np.unique(ids).tolist():
            mine = ids == container_id
            counts = self._counts.setdefault(container_id, np.zeros(SLOTS, np.int64))
            counts += np.bincount(slots[mine], minlength=SLOTS)
            self._users[container_id, layer_id, leaf] = int(np.count_nonzero(mine))

    def check(self) -> None:
        """Records against one another and against what leaves refer to."""
        users = self._check_users()
        self._check_uses(users)
        self._check_headers()
        self._check_index()

    def _check_users(self) -> dict[int, int]:
        """`user` records against leaves; how many leaves each container has by them."""
        expected = dict(self._users)
        leaves: dict[int, int] = {}
        for key, value in self._txn.scan(schema.USER):
            container_id, layer, leaf = place = USER.unpack(key)
            leaves[container_id] = leaves.get(container_id, 0) + 1
            found = expected.pop(place, 0)
            with self._reporting(layer=layer, page=leaf << LEAF_SHIFT):
                recorded = read_user(key, value)
                if recorded != found:
                    raise Damaged(
                        f"leaf {leaf} of layer {layer} refers to container {container_id} {found} times, "
                        f"{recorded} on record"
                    )
        for container_id, layer, leaf in expected:
            message = f"container {container_id} has no record that leaf {leaf} of layer {layer} refers to it"
            self._report(CODE, message, layer=layer, page=leaf << LEAF_SHIFT)
        return leaves

    def _check_uses(self, leaves: dict[int, int]) -> None:
        unseen = set(self._counts)
        for key, value in self._txn.scan(schema.USE):
            container_id = schema.KEY.unpack(key)[0]
            unseen.discard(container_id)
            with self._reporting():
                use = read_use(key, value)
                found = leaves.get(container_id, 0)
                if use.leaves != found:
                    raise Damaged(f"container {container_id} has {found} users, {use.leaves} on record")
                if not np.array_equal(use.counts, self._counts.get(container_id, np.zeros(SLOTS, np.int64))):
                    raise Damaged(f"references to container {container_id} are not as they are on record")
                if not use.counts.any():
                    raise Damaged(f"container {container_id} is kept and nothing refers to it")
        for container_id in sorted(unseen):
            self._report(CODE, f"container {container_id} has no record of its use")

    def _check_headers(self) -> None:
        """Every slot that is referred to has a page; every container is referred to."""
        found: set[int] = set()
        for key in self._txn.scan_keys(schema.CONTAINER):
            container_id = schema.KEY.unpack(key)[0]
            found.add(container_id)
            if container_id not in self._counts:
                self._report(CODE, f"container {container_id} is used by nothing")
                continue
            with self._reporting():
                there: set[int] = set()
                recorded = self._txn.use(container_id).pages
                for number, entry in enumerate(containers.entries(container_id, self._txn.container(container_id))):
                    there.update(containers.slots_of(number, entry.pages))
                if recorded != len(there):
                    raise Damaged(f"container {container_id} has {len(there)} pages, {recorded} on record")
                missing = set(np.flatnonzero(self._counts[container_id]).tolist()) - there
                if missing:
                    some = sorted(missing)[:8]
                    raise Damaged(f"container {container_id} has no pages {some}, and leaves refer to them")
        for container_id in sorted(set(self._counts) - found):
            self._report(CODE, f"container {container_id} is missing")
        if found and max(found) >= self._txn.state.next_object:
            self._report("counter", "the id of a container was never given out")

    def _check_index(self) -> None:
        """What the index says of a block is so."""
        for key, value in self._txn.scan(schema.BLOCK):
            with self._reporting():
                for container_id, number in containers.read_places(key, value):
                    entry = containers.entry(container_id, number, self._txn.container(container_id))
                    if entry.hash != key:
                        raise Damaged(f"block {number} of container {container_id} is not the one that the index says")

    def read(self) -> None:
        """The bytes of every block that is referred to, and whether they are what their hash says."""
        for container_id, counts in self._counts.items():
            with self._reporting():
                value = self._txn.container(container_id)
                for number in np.unique(np.flatnonzero(counts) >> BLOCK_SHIFT).tolist():
                    try:
                        self._read_block(container_id, number, value, referred(counts, number))
                    except Damaged as error:
                        for layer, page in self._places(container_id, number):
                            self._report(CODE, str(error), layer=layer, page=page)

    def _read_block(self, container_id: int, number: int, value: memoryview, wanted: int) -> None:
        """What is referred to can be read, and all of it is what its hash says. A page of a block that is stored as it
        is and that nothing refers to may be damaged: a repair leaves such, and nobody reads it."""
        entry = containers.entry(container_id, number, value)
        try:
            plain = containers.plain_pages(container_id, number, entry, value)
        except Damaged:
            if entry.codec != RAW or not entry.pages & ~wanted:
                raise
            containers.some_pages(container_id, number, entry, value, wanted & entry.pages)
            return
        whole = entry.hash != NO_HASH and self._whole(container_id, number, entry.hash)
        if whole and containers.hash_block(entry.pages, plain) != entry.hash:
            raise Damaged(f"block {number} of container {container_id} has another hash")

    def _places(self, container_id: int, number: int) -> Iterator[tuple[int, int]]:
        """(layer, page) of the first entry of each leaf that refers to a block."""
        first = schema.ref(schema.PACKED, container_id, number << BLOCK_SHIFT)
        for found, layer, leaf in self._users:
            own = self._txn.own_leaf(layer, leaf) if found == container_id else None
            if own is not None:
                inside = (own >= first) & (own < first + (schema.SLOT_STEP << BLOCK_SHIFT))
                for at in np.flatnonzero(inside & (schema.kinds(own) == schema.PACKED))[:1].tolist():
                    yield layer, (leaf << LEAF_SHIFT) + at

    def _whole(self, container_id: int, number: int, digest: bytes) -> bool:
        """Whether a block is indexed as being in one piece."""
        value = self._txn.fetch(schema.BLOCK, digest)
        return value is not None and containers.read_places(digest, value) == [(container_id, number)]
