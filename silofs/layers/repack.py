"""Gives the space of containers back that few leaf entries refer to: what is left of them moves together into others.

How full a container is, is counted in distinct pages that anything refers to. A block of which everything is referred
to moves as it is stored; of one that lost pages, those that are left are packed anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from silofs.blocks import LEAF_SHIFT
from silofs.errors import Damaged, ObjectMissing
from silofs.layers import containers, schema
from silofs.layers.containers import BLOCK_SHIFT, NO_HASH, ZSTD, Block
from silofs.layers.rewrite import Budget, Policy, rewrite
from silofs.layers.transaction import WriteTxn
from silofs.layers.use_records import read_use, referred
from silofs.limits import REPACK_BELOW, REPACK_LOOK_S

log = logging.getLogger(__name__)

READ = 512  # records of use read in a step
GAIN = 0.75  # containers that are made for each that goes, at most


@dataclass(frozen=True, slots=True)
class _Left:
    """What is left of a block, and where it was."""

    container: int
    number: int
    block: Block


class Repack(Policy):
    """Goes through the records of use again and again, and rewrites what it finds nearly empty."""

    name = "repack"

    def __init__(self, *, look_s: float = REPACK_LOOK_S) -> None:
        self._look_s = look_s
        self._from: int | None = None  # the next container to look at; None: a round is over
        self._ended = float("-inf")
        self._victims: list[int] = []
        self.freed = 0

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        if self._from is None:
            if time.monotonic() - self._ended < self._look_s:
                return False
            self._from = 0
        self._look(txn)
        if self._from is not None and len(self._victims) < READ:
            return True
        victims, self._victims = self._victims, []
        while victims:
            some = self._some(txn, victims, budget)
            if len(some) > 1:
                self.freed += _repack(txn, some)
            if budget.spent:
                break
        self._victims = victims
        return bool(victims) or self._from is not None

    def _look(self, txn: WriteTxn) -> None:
        """Read some records; remember the containers that are worth it."""
        assert self._from is not None
        keys = list(islice(txn.scan_keys(schema.USE, schema.KEY.pack(self._from)), READ))
        for key in keys:
            try:
                use = read_use(key, txn.fetch(schema.USE, key))
            except Damaged as error:
                log.error("%s; it is not repacked", error)
                continue
            if np.count_nonzero(use.counts) < REPACK_BELOW * use.pages:
                self._victims.append(schema.KEY.unpack(key)[0])
        if len(keys) < READ:
            self._from, self._ended = None, time.monotonic()
        else:
            self._from = schema.KEY.unpack(keys[-1])[0] + 1

    def _some(self, txn: WriteTxn, victims: list[int], budget: Budget) -> list[int]:
        """The next ones, as many as the budget allows; two at least, because one alone gives nothing back."""
        some: list[int] = []
        while victims and (len(some) < 2 or not budget.spent):
            container_id = victims.pop()
            try:
                use = txn.use(container_id)
            except Damaged:
                continue  # it went meanwhile
            some.append(container_id)
            budget.spend(leaves=use.leaves, pages=int(np.count_nonzero(use.counts)))
        return some

    def statistics(self) -> dict[str, int]:
        return {"waiting": len(self._victims), "freed_containers": self.freed}


def _repack(txn: WriteTxn, victims: list[int]) -> int:
    """Move what is left of containers together; how many fewer there are then."""
    left: list[_Left] = []
    moved: list[int] = []
    entries: list[tuple[int, int, int]] = []
    for container_id in victims:
        try:
            mine = _entries(txn, container_id)
            left += list(_left(txn, container_id))
            entries += mine
            moved.append(container_id)
        except (Damaged, ObjectMissing) as error:
            if txn.spoilt is not None:
                raise
            log.error("%s; container %d stays as it is", error, container_id)
            left = [each for each in left if each.container != container_id]
    bins = containers.place([each.block for each in left])
    if len(bins) > GAIN * len(moved):
        return 0
    new: dict[int, int] = {}  # by old reference
    places: dict[int, list[tuple[int, int]]] = {}
    for pieces in bins:
        made = txn.store_container(pieces)
        for number, piece in enumerate(pieces):
            was = left[piece.block]
            places.setdefault(piece.block, []).append((made, number))
            for slot in containers.slots_of(0, piece.pages):
                old = schema.ref(schema.PACKED, was.container, was.number << BLOCK_SHIFT | slot)
                new[old] = schema.ref(schema.PACKED, made, number << BLOCK_SHIFT | slot)
    for index, where in places.items():
        was = left[index]
        if was.block.hash != NO_HASH:
            txn.move_block(was.block.hash, (was.container, was.number), where)
    rewrite(txn, [(layer, page, old, new[old]) for layer, page, old in entries])
    return len(moved) - len(bins)


def _left(txn: WriteTxn, container_id: int) -> Iterator[_Left]:
    """The blocks of a container that anything refers to. Copies: the transaction's next change voids its views."""
    counts = txn.use(container_id).counts
    value = txn.container(container_id)
    for number, entry in enumerate(containers.entries(container_id, value)):
        pages = referred(counts, number)
        if not pages:
            continue
        if pages == entry.pages:
            plain = bytes(containers.plain_pages(container_id, number, entry, value))
            stored = bytes(value[entry.offset : entry.offset + entry.length]) if entry.codec == ZSTD else None
            yield _Left(container_id, number, Block(entry.hash, pages, plain, stored))
        else:
            kept = containers.some_pages(container_id, number, entry, value, pages)
            yield _Left(container_id, number, containers.prepare(pages, kept, NO_HASH))


def _entries(txn: WriteTxn, container_id: int) -> list[tuple[int, int, int]]:
    """(layer, page, reference) of every leaf entry that refers to a container."""
    entries: list[tuple[int, int, int]] = []
    for layer, leaf in list(txn.users(container_id)):
        own = txn.own_leaf(layer, leaf)
        if own is None:
            raise Damaged(f"leaf {leaf} of layer {layer} refers to container {container_id}, and is not there")
        mine = (schema.kinds(own) == schema.PACKED) & (own >> np.uint64(schema.OBJECT_SHIFT) == container_id)
        pages = ((leaf << LEAF_SHIFT) + np.flatnonzero(mine)).tolist()
        entries += [(layer, page, ref) for page, ref in zip(pages, own[mine].tolist(), strict=True)]
    return entries
