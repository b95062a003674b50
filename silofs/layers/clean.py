"""The cleaner: gives the space of overwritten pages back, and packs lone ones.

An object goes when its last live page does; under random overwriting that alone leaves a store at four times its live
data. The cleaner moves what is live of the emptiest objects into full ones. Pages are moved to other objects under
the same layer and number: nothing that a reader can see changes.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Final

import numpy as np

from silofs.errors import Damaged
from silofs.layers import schema
from silofs.layers.native import Source
from silofs.layers.objects import read_live, tally
from silofs.layers.rewrite import Budget, Policy, rewrite
from silofs.layers.schema import LIVE_SHIFT, OBJECT_PAGES
from silofs.layers.transaction import WriteTxn
from silofs.layers.usage import Usage
from silofs.limits import CLEAN_AT, CLEAN_SLACK_PAGES, LONE_AGE

log = logging.getLogger(__name__)

READ_GROUPS: Final = 1024  # live bitmaps read in a step after a start: 1 MiB
CHOICE: Final = 16  # groups whose objects a step chooses from
KEEP: Final = 24  # an object with more live pages than that is full enough
HURRY_MAX: Final = 32.0
LONE_BATCH: Final = 8 * OBJECT_PAGES  # fewer old lone pages than this wait for more

Place = tuple[int, int, int]  # layer, page, reference


class Clean(Policy):
    """Holds what objects take at `at` times what is live in them, and `slack` pages more."""

    name = "clean"

    def __init__(
        self,
        usage: Usage,
        *,
        at: float = CLEAN_AT,
        slack: int = CLEAN_SLACK_PAGES,
        lone_age: int = LONE_AGE,
        lone_batch: int = LONE_BATCH,
    ) -> None:
        self._usage = usage
        self._at = at
        self._slack = slack
        self._lone_age = lone_age
        self._lone_batch = lone_batch
        self._damaged: set[int] = set()  # objects that cannot be moved
        self._lone_from = 0
        self.moved = 0
        self.lone_packed = 0

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        if not self._usage.complete:
            self._learn(txn)
            return True
        if self._excess() > 0:
            return self._clean(txn, budget)
        return self._pack_lone(txn, budget)

    def hurry(self) -> float:
        excess = self._excess()
        return min(HURRY_MAX, 1 + 4 * excess / CLEAN_SLACK_PAGES) if excess > 0 else 0

    def _excess(self) -> float:
        """LMDB pages that objects take beyond what they may."""
        return self._usage.stored_pages - self._at * self._usage.live - self._slack

    def _learn(self, txn: WriteTxn) -> None:
        """Read some of the live bitmaps."""
        found = {}
        start = self._usage.read_to
        for key in islice(txn.scan_keys(schema.LIVE, schema.KEY.pack(start)), READ_GROUPS):
            group = schema.KEY.unpack(key)[0]
            try:
                found[group] = tally(read_live(key, txn.fetch(schema.LIVE, key)))
            except Damaged as error:
                log.error("%s; its objects are not cleaned", error)
                found[group] = 0, 0
        self._usage.learn(found, max(found) + 1 if len(found) == READ_GROUPS else None)

    # Objects

    def _clean(self, txn: WriteTxn, budget: Budget) -> bool:
        """Move what is live of the emptiest objects, as many as fill whole objects within the budget."""
        places: list[Place] = []
        data: list[bytes] = []
        for _, object_id, mask in sorted(self._victims(txn)):
            if len(places) >= budget.pages or budget.spent:
                break
            try:
                self._gather(txn, object_id, mask, places, data)
            except Damaged as error:
                if txn.spoilt is not None:
                    raise
                log.error("%s; object %d stays as it is", error, object_id)
                self._damaged.add(object_id)
        whole = len(places) // OBJECT_PAGES * OBJECT_PAGES
        if not whole:
            return False
        self.moved += move(txn, places[:whole], data[:whole])
        return True

    def _victims(self, txn: WriteTxn) -> list[tuple[int, int, int]]:
        """(live pages, object id, live slots) of objects that are worth it."""
        found = []
        for group in self._usage.emptiest(CHOICE):
            key = schema.KEY.pack(group)
            try:
                row = read_live(key, txn.fetch(schema.LIVE, key))
            except Damaged as error:
                log.error("%s; its objects are not cleaned", error)
                continue
            for at in np.flatnonzero(row).tolist():
                mask, object_id = int(row[at]), (group << LIVE_SHIFT) + at
                if mask.bit_count() <= KEEP and object_id not in self._damaged:
                    found.append((mask.bit_count(), object_id, mask))
        return found

    def _gather(self, txn: WriteTxn, object_id: int, mask: int, places: list[Place], data: list[bytes]) -> None:
        """Add the live pages of an object, all of them or, when one is damaged, none."""
        key = schema.KEY.pack(object_id)
        name = txn.fetch(schema.NAME, key)
        if name is None:
            raise Damaged(f"object {object_id} has no name record")
        names = schema.open_name(key, name)
        value = txn.object(object_id)
        slots = [slot for slot in range(len(names)) if mask >> slot & 1]
        pages = [bytes(schema.object_page(object_id, slot, value)) for slot in slots]
        places += [(*names[slot], schema.ref(schema.DATA, object_id, slot)) for slot in slots]
        data += pages

    # Lone pages

    def _pack_lone(self, txn: WriteTxn, budget: Budget) -> bool:
        """Put lone pages that have lived for a while into objects: a record for 31 pages instead of one for each."""
        end = txn.state.next_object - self._lone_age
        places: list[Place] = []
        data: list[bytes] = []
        if end <= self._lone_from or txn.entries(schema.PAGES) < self._lone_batch:
            return False
        last = end
        for key in islice(txn.scan_keys(schema.PAGES, schema.KEY.pack(self._lone_from)), budget.pages):
            object_id = schema.KEY.unpack(key)[0]
            if object_id >= end:
                break
            last = object_id + 1
            try:
                name = txn.fetch(schema.NAME, key)
                if name is None:
                    raise Damaged(f"lone page {object_id} has no name record")
                reference = schema.ref(schema.LONE, object_id)
                layer, page = schema.open_name(key, name)[0]
                data.append(bytes(txn.page(reference)))
                places.append((layer, page, reference))
            except Damaged as error:
                if txn.spoilt is not None:
                    raise
                log.error("%s; it stays as it is", error)
        if len(places) < self._lone_batch:
            return False
        whole = len(places) // OBJECT_PAGES * OBJECT_PAGES
        self.lone_packed += move(txn, places[:whole], data[:whole])
        self._lone_from = schema.object_of(places[whole][2]) if whole < len(places) else last
        return True

    def statistics(self) -> dict[str, int]:
        usage = self._usage
        return {
            "known": int(usage.complete),
            "objects": usage.objects,
            "stored_pages": usage.stored_pages,
            "live_pages": usage.live,
            "amplification_percent": 100 * usage.stored_pages // usage.live if usage.live else 0,
            "backlog_pages": max(0, int(self._excess())),
            "moved_pages": self.moved,
            "lone_packed": self.lone_packed,
        }


def move(txn: WriteTxn, places: list[Place], data: list[bytes]) -> int:
    """Store pages again, neighbours together, and exchange their entries; how many were still what they had been."""
    order = sorted(range(len(places)), key=lambda at: places[at][:2])
    refs = txn.store_mixed([places[at][:2] for at in order], Source.of([data[at] for at in order])).tolist()
    return rewrite(txn, [(*places[at], new) for at, new in zip(order, refs, strict=True)])
