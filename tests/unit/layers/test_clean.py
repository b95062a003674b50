"""The cleaner: space comes back, content stays, and what is damaged is left where it is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from silofs import failpoints
from silofs.blocks import PAGE
from silofs.layers import rewrite, schema
from silofs.layers.clean import Clean
from silofs.layers.objects import read_live, tally
from silofs.layers.policies import drain
from silofs.layers.usage import Usage
from tests.storerig import Rig, page_bytes

PAGES = 31 * 40


def make(rig: Rig, pages: int = PAGES) -> bytes:
    volume = rig.store.write(lambda txn: txn.create_volume("vm", pages * PAGE))
    rig.put(volume.uuid, range(pages))
    return volume.uuid


def eager(rig: Rig, **options: Any) -> Clean:
    return Clean(rig.store.usage, **{"at": 1.1, "slack": 0, **options})


def counted(rig: Rig) -> tuple[int, int]:
    """(objects, live pages) as the tables say."""
    with rig.store.reader() as txn:
        tallies = [tally(read_live(key, value)) for key, value in txn.scan(schema.LIVE)]
    return sum(objects for objects, _ in tallies), sum(live for _, live in tallies)


def overwrite(rig: Rig, vm: bytes, share: float, seed: int = 1) -> None:
    rig.put(vm, sorted(random.Random(seed).sample(range(PAGES), int(PAGES * share))), seed=seed)


def test_the_space_of_overwritten_pages_comes_back(rig: Rig) -> None:
    vm = make(rig)
    overwrite(rig, vm, 0.5)
    before, (stored, live) = rig.read("vm"), counted(rig)
    assert stored > 55
    policy = eager(rig)
    assert drain(rig.store, [policy]) > 1
    assert rig.read("vm") == before
    objects, still = counted(rig)
    assert still == live == PAGES
    assert objects <= 46, "forty are full"
    assert 0 < policy.moved < PAGES


def test_usage_is_what_the_tables_say_and_is_found_again_after_a_restart(rig: Rig) -> None:
    vm = make(rig)
    overwrite(rig, vm, 0.3)
    rig.reopen()
    assert not rig.store.usage.complete
    overwrite(rig, vm, 0.3, seed=2)
    drain(rig.store, [eager(rig, at=9.0)])
    for seed in range(3, 6):
        overwrite(rig, vm, 0.3, seed=seed)
        assert (rig.store.usage.objects, rig.store.usage.live) == counted(rig)
    drain(rig.store, [eager(rig)])
    assert (rig.store.usage.objects, rig.store.usage.live) == counted(rig)


def test_pages_of_sealed_layers_move_under_snapshots_and_clones(rig: Rig) -> None:
    vm = make(rig)
    rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    overwrite(rig, vm, 0.4)
    clone = rig.store.write(lambda txn: txn.clone(txn.find_snapshot(vm, "s").layer, "clone")).uuid
    rig.put(clone, range(0, PAGES, 3), seed=9)
    for seed in (2, 3):
        overwrite(rig, vm, 0.4, seed=seed)
    before = rig.read("vm"), rig.read("clone")
    policy = eager(rig)
    drain(rig.store, [policy])
    assert policy.moved
    assert (rig.read("vm"), rig.read("clone")) == before
    rig.store.write(lambda txn: txn.rollback(vm, txn.find_snapshot(vm, "s").layer))
    assert rig.read("vm") == b"".join(page_bytes(page) for page in range(PAGES))


@pytest.mark.parametrize("power_cut", [False, True])
def test_a_step_is_done_or_it_was_never_begun(rig: Rig, power_cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "STEP_S", 60.0)  # on a busy machine one that only looks may use its time up
    vm = make(rig)
    overwrite(rig, vm, 0.5)
    before, stored = rig.read("vm"), counted(rig)
    policy = eager(rig)
    rig.store.step(policy).result()  # learns what there is
    failpoints.rearm("rewrite.before_commit:raise")
    try:
        with pytest.raises(failpoints.FailpointReached):
            rig.store.step(policy).result()
    finally:
        failpoints.rearm("")
    if power_cut:
        rig.reopen()
        policy = eager(rig)
    assert counted(rig) == stored
    drain(rig.store, [policy])
    assert rig.read("vm") == before
    assert counted(rig)[0] < stored[0]


def test_a_damaged_object_stays_and_the_others_are_cleaned(rig: Rig) -> None:
    vm = make(rig)
    overwrite(rig, vm, 0.5)
    with rig.store.reader() as txn:
        refs = txn.resolve(txn.volume(vm).head, 0)
        sparse = [ref for ref in refs.tolist() if schema.object_of(ref) <= 40]
        bad = sparse[0]
        name = bytes(txn.fetch(schema.NAME, schema.KEY.pack(schema.object_of(bad))) or b"")

    def spoil(txn: Any, value: bytes) -> None:
        txn._put(schema.NAME, schema.KEY.pack(schema.object_of(bad)), value)

    rig.store.write(lambda txn: spoil(txn, name[:-1] + b"?"))
    policy = eager(rig, at=1.0)
    drain(rig.store, [policy])
    assert policy.moved
    with rig.store.reader() as txn:
        assert bad in txn.resolve(txn.volume(vm).head, 0).tolist()
    rig.store.write(lambda txn: spoil(txn, name))


def test_lone_pages_are_packed_once_they_are_old(rig: Rig) -> None:
    vm = make(rig)
    for page in range(0, PAGES, 5):
        rig.put(vm, [page], seed=3)
    before = rig.read("vm")
    drain(rig.store, [eager(rig, at=9.0, lone_age=1 << 20, lone_batch=31)])
    with rig.store.reader() as txn:
        assert txn.entries(schema.PAGES) == len(range(0, PAGES, 5)), "too young"
    policy = eager(rig, at=9.0, lone_age=0, lone_batch=31)
    drain(rig.store, [policy])
    assert policy.lone_packed == 248
    assert rig.read("vm") == before
    with rig.store.reader() as txn:
        assert txn.entries(schema.PAGES) == 0


def test_old_and_empty_groups_come_first() -> None:
    usage = Usage()
    usage.learn({}, None)
    full = schema.LIVE_OBJECTS * schema.OBJECT_PAGES
    usage.update({1: (256, full), 2: (256, full // 2), 3: (256, full // 4), 9: (256, full // 4), 10: (256, full)})
    assert usage.emptiest(9) == [3, 2, 9]
    assert (usage.objects, usage.live) == (5 * 256, 3 * full)
    usage.update({2: (0, 0), 11: (1, 1)})
    assert usage.emptiest(9) == [3, 9, 11]
    assert usage.objects == 4 * 256 + 1
