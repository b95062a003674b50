"""The compare-and-swap of leaf entries, and the frame that policies run in."""

from __future__ import annotations

from typing import Any

import pytest

from silofs import failpoints
from silofs.blocks import LEAF_PAGES
from silofs.layers import schema
from silofs.layers.native import Source
from silofs.layers.policies import drain
from silofs.layers.rewrite import Budget, Policy, Reap, rewrite
from tests.storerig import Rig, object_keys, page_bytes

PAGES = [0, 1, 2, LEAF_PAGES, 5 * LEAF_PAGES + 7]


def move_all(txn: Any, head: int, pages: list[int], *, expect: int = 0) -> int:
    """Store pages of a layer again, and exchange their entries; `expect` is added to what is expected there."""
    old = [int(txn.own_leaf(head, page // LEAF_PAGES)[page % LEAF_PAGES]) for page in pages]
    new = txn.store_pages(head, pages, Source.of([bytes(txn.page(ref)) for ref in old]))
    return rewrite(
        txn, [(head, page, was + expect, now) for page, was, now in zip(pages, old, new.tolist(), strict=True)]
    )


def objects(rig: Rig) -> int:
    with rig.store.reader() as txn:
        return len(object_keys(txn)) + txn.entries(schema.PAGES)


def test_moved_pages_read_the_same_and_leave_nothing_behind(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", 16 << 20))
    rig.put(vm.uuid, PAGES)
    before, stored = rig.read("vm"), objects(rig)
    assert rig.store.write(lambda txn: move_all(txn, vm.head, PAGES)) == len(PAGES)
    assert rig.read("vm") == before
    assert objects(rig) == stored
    # The writer's own idea of the head is the new one: a commit on top releases what is stored now.
    rig.put(vm.uuid, PAGES, seed=1)
    assert objects(rig) == stored


def test_an_entry_that_is_another_by_now_stays(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", 16 << 20))
    rig.put(vm.uuid, PAGES)
    before, stored = rig.read("vm"), objects(rig)
    assert rig.store.write(lambda txn: move_all(txn, vm.head, PAGES, expect=schema.SLOT_STEP)) == 0
    assert rig.read("vm") == before
    assert objects(rig) == stored, "what was stored for nothing is released"


def test_a_step_that_dies_before_its_commit_was_never_begun(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", 16 << 20))
    rig.put(vm.uuid, PAGES)
    stored = objects(rig)

    class Move(Policy):
        name = "move"

        def step(self, txn: Any, budget: Budget) -> bool:
            move_all(txn, vm.head, PAGES)
            return False

    failpoints.rearm("rewrite.before_commit:raise")
    try:
        with pytest.raises(failpoints.FailpointReached):
            rig.store.step(Move()).result()
    finally:
        failpoints.rearm("")
    rig.reopen()
    assert rig.findings() == []
    assert objects(rig) == stored
    assert rig.read("vm")[: 4096 * 3] == b"".join(page_bytes(page) for page in range(3))


def test_a_budget_ends_by_pages_by_leaves_and_by_time() -> None:
    assert not Budget(pages=2, leaves=2).spent
    for pages, leaves in ((2, 0), (0, 2)):
        budget = Budget(pages=2, leaves=2)
        budget.spend(pages=pages, leaves=leaves)
        assert budget.spent
    assert Budget(seconds=0).spent


def test_an_idle_step_writes_nothing(rig: Rig) -> None:
    commits = rig.store.commits
    assert drain(rig.store, [Reap()]) == 1
    assert rig.store.commits == commits
