"""Layers that nothing names are put together: all ways, from every side, with crashes between the steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from silofs.blocks import LEAF_BYTES, LEAF_PAGES, PAGE
from silofs.layers import schema, volumes
from silofs.layers.aged import Pack
from silofs.layers.catalog import Layer, Way
from silofs.layers.merge import MergeLayers
from silofs.layers.policies import drain
from silofs.layers.rewrite import Reap
from silofs.layers.schema import REMOTE
from silofs.limits import MERGE_DEPTH, RETAIN_S
from tests.storerig import Rig, page_bytes, read_layer

LEAVES = 3
SIZE = LEAVES * LEAF_BYTES
PAGES = LEAVES * LEAF_PAGES
FEW = [3, LEAF_PAGES + 1, LEAF_PAGES + 2]


def create(rig: Rig, name: str = "vm", size: int = SIZE) -> bytes:
    return rig.store.write(lambda txn: txn.create_volume(name, size)).uuid


def spread(count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(PAGES), count))


def snapshot(rig: Rig, vm: bytes, name: str) -> Layer:
    return rig.store.write(lambda txn: txn.layer(txn.take_snapshot(vm, name).layer))


def remove(rig: Rig, vm: bytes, name: str) -> None:
    rig.store.write(lambda txn: txn.remove_snapshot(vm, name))


def chain(rig: Rig, vm: bytes) -> list[Layer]:
    with rig.store.reader() as txn:
        return list(txn.chain(txn.volume(vm).head))


def merge(rig: Rig, policy: MergeLayers | None = None) -> None:
    drain(rig.store, [policy or MergeLayers(), Reap()])


def pages_stored(rig: Rig) -> int:
    with rig.store.reader() as txn:
        return sum(layer.own_pages for layer in txn.layers())


def shown(rig: Rig, vm: bytes) -> dict[str, bytes]:
    """What the volume and its snapshots read."""
    with rig.store.reader() as txn:
        volume = txn.volume(vm)
        layers = {each.name: each.layer for each in txn.snapshots(vm)} | {"": volume.head}
        return {name: read_layer(txn, layer, txn.layer(layer).size) for name, layer in layers.items()}


def test_what_only_a_removed_snapshot_held_comes_back(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(PAGES))
    snapshot(rig, vm, "s")
    rig.put(vm, range(0, PAGES, 2), seed=1)
    before = shown(rig, vm)
    assert pages_stored(rig) == PAGES * 3 // 2
    remove(rig, vm, "s")
    merge(rig)
    assert pages_stored(rig) == PAGES
    assert shown(rig, vm)[""] == before[""]
    # The head went on: what it hides by now is given back as well, and the layer below goes with its last page.
    policy = MergeLayers()
    rig.put(vm, range(PAGES), seed=2)
    merge(rig, policy)
    assert pages_stored(rig) == PAGES
    assert len(chain(rig, vm)) == 1
    assert shown(rig, vm)[""] == b"".join(page_bytes(page, 2) for page in range(PAGES))


@pytest.mark.parametrize(("below", "above", "way"), [(40, 900, Way.UP), (900, 40, Way.DOWN)])
def test_a_snapshot_in_the_middle_goes(rig: Rig, below: int, above: int, way: Way) -> None:
    vm = create(rig)
    rig.put(vm, spread(300, 1))
    snapshot(rig, vm, "base")
    rig.put(vm, [page for page in spread(below, 2) if below > above or page < 2 * LEAF_PAGES], seed=2)
    snapshot(rig, vm, "middle")
    rig.put(vm, [page for page in spread(above, 3) if above > below or page < 2 * LEAF_PAGES], seed=3)
    rig.zero(vm, 5, 9)
    rig.commit()
    top = snapshot(rig, vm, "top")
    rig.put(vm, FEW, seed=4)
    before = shown(rig, vm)
    remove(rig, vm, "middle")
    policy = MergeLayers()
    rig.store.step(policy).result()
    with rig.store.reader() as txn:
        assert [merge.way for merge in txn.merges()] == [way]
    merge(rig, policy)
    del before["middle"]
    assert shown(rig, vm) == before
    layers = chain(rig, vm)
    assert [layer.uuid for layer in layers[1:2]] == [top.uuid], "the upper layer's name is the result's"
    assert len(layers) == 3
    with rig.store.reader() as txn:
        found = txn.layer_by_uuid(top.uuid)
        assert found is not None
        assert (found.id == top.id) == (way is Way.UP)
        assert found.data_pages == sum(schema.count_data(txn.resolve(found.id, leaf)) for leaf in range(LEAVES))


def resized(rig: Rig, vm: bytes, *sizes: int) -> None:
    for size in sizes:
        rig.store.write(lambda txn, size=size: txn.resize(vm, size))


CUTS: list[tuple[int, ...]] = [
    (2 * LEAF_BYTES, SIZE),
    (2 * LEAF_BYTES + 7 * PAGE + 100, SIZE),
    (LEAF_BYTES + 5 * PAGE,),
    (0, SIZE),
    (SIZE + 3 * LEAF_BYTES,),
    (PAGE, SIZE + LEAF_BYTES),
]


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("when", ["below", "above", "both"])
@pytest.mark.parametrize("heavy", ["below", "above"])
def test_a_clip_goes_on_hiding_what_it_hid(rig: Rig, sizes: tuple[int, ...], when: str, heavy: str) -> None:
    vm = create(rig)
    rig.put(vm, range(0, PAGES, 3))
    snapshot(rig, vm, "base")
    if when in ("below", "both"):
        resized(rig, vm, *sizes)
    rig.put(vm, range(1, PAGES, 7) if heavy == "below" else FEW, seed=2)
    snapshot(rig, vm, "middle")
    if when in ("above", "both"):
        resized(rig, vm, *sizes)
    rig.put(vm, range(2, PAGES, 5) if heavy == "above" else [1], seed=3)
    snapshot(rig, vm, "top")
    before = shown(rig, vm)
    remove(rig, vm, "middle")
    merge(rig)
    del before["middle"]
    assert shown(rig, vm) == before
    assert len(chain(rig, vm)) == 3
    remove(rig, vm, "base")
    remove(rig, vm, "top")
    merge(rig)
    assert shown(rig, vm) == {"": before[""]}
    resized(rig, vm, SIZE + 9 * LEAF_BYTES)
    assert shown(rig, vm)[""].rstrip(b"\0") == before[""].rstrip(b"\0")


def test_a_layer_that_clones_share_stays_until_one_is_left(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(PAGES))
    layer = snapshot(rig, vm, "s")
    clones = [rig.store.write(lambda txn, name=name: txn.clone(layer.id, name)).uuid for name in ("one", "two")]
    for seed, clone in enumerate(clones):
        rig.put(clone, spread(500, seed), seed=seed + 5)
    remove(rig, vm, "s")
    rig.store.write(lambda txn: txn.delete_volume(vm))
    before = [shown(rig, clone) for clone in clones]
    stored = pages_stored(rig)
    merge(rig)
    assert pages_stored(rig) == stored
    rig.store.write(lambda txn: txn.delete_volume(clones[1]))
    merge(rig)
    assert shown(rig, clones[0]) == before[0]
    assert pages_stored(rig) == PAGES


def test_several_clones_on_the_upper_layer_follow_it_down(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(PAGES))
    snapshot(rig, vm, "big")
    rig.put(vm, FEW, seed=1)
    top = snapshot(rig, vm, "small")
    clones = [rig.store.write(lambda txn, number=number: txn.clone(top.id, f"c{number}")).uuid for number in range(5)]
    rig.put(clones[2], [4, 5], seed=7)
    before = [shown(rig, clone) for clone in clones]
    remove(rig, vm, "big")
    merge(rig)
    assert [shown(rig, clone) for clone in clones] == before
    assert {len(chain(rig, clone)) for clone in clones} == {2}
    assert {chain(rig, clone)[1].uuid for clone in clones} == {top.uuid}


@pytest.mark.parametrize("hold", ["lower", "upper"])
def test_what_a_migration_holds_stays(rig: Rig, hold: str) -> None:
    vm = create(rig)
    rig.put(vm, range(900))
    lower = snapshot(rig, vm, "a")
    rig.put(vm, range(300), seed=1)
    upper = snapshot(rig, vm, "b")
    held = {"lower": lower, "upper": upper}[hold]
    rig.store.write(lambda txn: txn.pin(held.id, "m"))
    remove(rig, vm, "a")
    merge(rig)
    with rig.store.reader() as txn:
        assert txn.layer_by_uuid(lower.uuid) is not None
    rig.store.write(lambda txn: txn.unpin(held.id, "m"))
    merge(rig)
    with rig.store.reader() as txn:
        assert txn.layer_by_uuid(lower.uuid) is None
        assert txn.layer_by_uuid(upper.uuid) is not None


def test_the_end_waits_for_whoever_holds_the_upper_layer_by_its_id(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(900))
    snapshot(rig, vm, "a")
    rig.put(vm, [1], seed=1)
    upper = snapshot(rig, vm, "b")
    remove(rig, vm, "a")
    policy = MergeLayers()
    rig.store.step(policy).result()
    rig.store.write(lambda txn: txn.pin(upper.id, "export"))
    merge(rig, policy)
    with rig.store.reader() as txn:
        assert not txn.layer(upper.id).leaves
        assert txn.layer_by_uuid(upper.uuid) == txn.layer(upper.id)
    rig.store.write(lambda txn: txn.unpin(upper.id, "export"))
    merge(rig, policy)
    assert len(chain(rig, vm)) == 2


def test_pages_at_a_peer_keep_layers_apart(rig: Rig) -> None:
    def receive(txn: Any) -> bytes:
        lower = txn.receive_layer(b"l" * 16, 0, SIZE, SIZE)
        txn.put_map(lower.id, [(0, 4, REMOTE)], mapped=PAGES)
        upper = txn.receive_layer(b"u" * 16, lower.id, SIZE, SIZE)
        txn.put_map(upper.id, [(2, 4, REMOTE)], mapped=PAGES)
        txn.change_layer(lower.id, kept_ns=0)
        return txn.create_volume("vm", SIZE, parent=upper.id).uuid  # type: ignore[no-any-return]

    vm = rig.store.write(receive)
    merge(rig)
    assert len(chain(rig, vm)) == 3
    for uuid, first in ((b"l", 0), (b"u", 2)):
        with rig.store.reader() as txn:
            layer = txn.layer_by_uuid(uuid * 16)
        assert layer is not None
        rig.store.write(
            lambda txn, layer=layer, first=first: txn.fill(
                layer.id, {page: page_bytes(page, first) for page in range(first, first + 4)}
            )
        )
    before = shown(rig, vm)
    merge(rig)
    assert shown(rig, vm) == before
    assert len(chain(rig, vm)) == 2


@pytest.mark.parametrize("end", ["time", "full disk"])
def test_layers_that_a_volume_may_go_back_from_are_kept_for_a_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Or until the room that they take is needed."""
    vm = create(rig)
    for seed in range(3):
        rig.put(vm, range(200), seed=seed)
        rig.store.write(lambda txn: txn.seal(vm))
    rig.put(vm, range(200), seed=9)
    policy = MergeLayers()
    merge(rig, policy)
    assert len(chain(rig, vm)) == 4
    if end == "time":
        later = time.time_ns() + int(RETAIN_S * 1e9) + 1
        monkeypatch.setattr(time, "time_ns", lambda: later)
        policy = MergeLayers()
    else:
        rig.store.held.full = True
    merge(rig, policy)
    assert len(chain(rig, vm)) == 1
    assert pages_stored(rig) == 200


def test_deep_chains_are_merged_whatever_it_gives_back(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(PAGES))
    states = []
    for seed in range(30):
        rig.put(vm, spread(20, seed), seed=seed)
        states.append(rig.store.write(lambda txn: txn.seal(vm)).uuid)
    before = shown(rig, vm)
    merge(rig)
    layers = chain(rig, vm)
    assert len(layers) == MERGE_DEPTH + 1
    assert layers[1].uuid == states[-1], "the newest state is still one"
    assert shown(rig, vm) == before


def test_snapshots_taken_and_removed_for_ever(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "CHAIN_DEPTH_MAX", 50)
    vm = create(rig)
    policy = MergeLayers()
    for number in range(120):
        if number % 10 == 0:
            rig.put(vm, [number % 700], seed=number)
        snapshot(rig, vm, "s")
        remove(rig, vm, "s")
        merge(rig, policy)
    assert len(chain(rig, vm)) <= 3
    assert rig.findings() == []


def test_a_merged_layer_is_not_what_an_empty_head_is_sealed_as(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(900))
    snapshot(rig, vm, "s")
    rig.put(vm, range(100), seed=1)
    remove(rig, vm, "s")
    policy = MergeLayers()
    rig.store.step(policy).result()
    rig.store.write(lambda txn: txn.resize(vm, 0))
    rig.store.write(lambda txn: txn.resize(vm, SIZE))
    before = shown(rig, vm)
    layer = snapshot(rig, vm, "t")
    assert layer.uuid
    merge(rig, policy)
    assert shown(rig, vm) == {"": before[""], "t": before[""]}


Change = Callable[[Rig, bytes], None]


def roll_back(rig: Rig, vm: bytes) -> None:
    rig.store.write(lambda txn: txn.rollback(vm, txn.find_snapshot(vm, "base").layer))


def delete(rig: Rig, vm: bytes) -> None:
    rig.store.write(lambda txn: txn.delete_volume(vm))


def overwrite(rig: Rig, vm: bytes) -> None:
    rig.put(vm, range(0, PAGES, 2), seed=77)


def seal(rig: Rig, vm: bytes) -> None:
    rig.put(vm, [1, 2], seed=78)
    snapshot(rig, vm, "late")


def shrink(rig: Rig, vm: bytes) -> None:
    resized(rig, vm, LEAF_BYTES + 3 * PAGE, SIZE)


def remove_all(rig: Rig, vm: bytes) -> None:
    for name in list(shown(rig, vm)):
        if name:
            remove(rig, vm, name)


@pytest.mark.parametrize("way", ["up", "down", "shed"])
@pytest.mark.parametrize("change", [roll_back, delete, overwrite, seal, shrink, remove_all])
def test_what_happens_meanwhile(rig: Rig, way: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """One leaf a step, a power cut after every other, and in the middle a change of what is being merged."""
    monkeypatch.setattr("silofs.layers.rewrite.STEP_LEAVES", 1)
    for after in (1, 4):
        vm = create(rig, f"vm{after}")
        rig.put(vm, range(0, PAGES, 5))
        snapshot(rig, vm, "base")
        rig.put(vm, range(1, PAGES if way == "down" else 2 * LEAF_PAGES, 3), seed=1)
        snapshot(rig, vm, "middle")
        rig.put(vm, range(1, PAGES if way == "up" else 2 * LEAF_PAGES, 4), seed=2)
        if way != "shed":
            snapshot(rig, vm, "top")
            rig.put(vm, FEW, seed=3)
        remove(rig, vm, "middle")
        policy = MergeLayers()
        expected = shown(rig, vm)
        for step in range(60):
            if step == after:
                change(rig, vm)
                if change is delete:
                    drain(rig.store, [policy, Reap()])
                    break
                expected = shown(rig, vm)
            if step % 2:
                rig.reopen()
                policy = MergeLayers()
            if not rig.store.step(policy).result().more and step > after:
                break
            assert shown(rig, vm) == expected, step
            assert step % 3 or rig.findings(read_data=False) == [], step
        merge(rig)
        if change is not delete:
            assert shown(rig, vm) == expected
            delete(rig, vm)
    drain(rig.store, [Reap()])
    with rig.store.reader() as txn:
        assert txn.layers() == []
        assert txn.merges() == []
        assert not list(txn.scan_keys(schema.NAME))


def test_a_damaged_leaf_ends_the_merge_and_is_not_rewritten(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(900))
    lower = snapshot(rig, vm, "a")
    rig.put(vm, range(300), seed=1)
    snapshot(rig, vm, "b")
    key = schema.leaf_key(lower.id, 0)
    with rig.store.reader() as txn:
        sound = bytes(txn.fetch(schema.LEAF, key) or b"")
    rig.store.write(lambda txn: txn._put(schema.LEAF, key, sound[:-1] + b"?"))
    remove(rig, vm, "a")
    policy = MergeLayers()
    with pytest.raises(Exception, match="checksum"):
        merge(rig, policy)
    merge(rig, policy)
    assert len(chain(rig, vm)) == 3
    rig.store.write(lambda txn: txn._put(schema.LEAF, key, sound))
    merge(rig)
    assert len(chain(rig, vm)) == 2


@pytest.mark.parametrize(("below", "above"), [(PAGES, 40), (40, PAGES)])
def test_pages_in_containers_change_hands(rig: Rig, below: int, above: int) -> None:
    vm = create(rig)
    text = b"much the same, again and again. " * (PAGE // 32)
    packing = Pack(age_s=0, look_s=0)
    for seed, (name, count) in enumerate((("a", below), ("b", above))):
        for page in range(10, min(10 + count, PAGES)):
            rig.write(vm, page * PAGE, seed.to_bytes(8, "little") + page.to_bytes(8, "little") + text[16:])
        rig.commit()
        snapshot(rig, vm, name)
        drain(rig.store, [packing])
    with rig.store.reader() as txn:
        assert (schema.kinds(txn.resolve(txn.volume(vm).head, 0)) == schema.PACKED).any()
    rig.put(vm, FEW, seed=4)
    before = shown(rig, vm)
    remove(rig, vm, "a")
    merge(rig)
    assert shown(rig, vm) == {name: before[name] for name in ("", "b")}
    assert rig.findings() == []
    assert len(chain(rig, vm)) == 2
    remove(rig, vm, "b")
    merge(rig)
    assert shown(rig, vm)[""] == before[""]
    delete(rig, vm)
    drain(rig.store, [Reap()])
    with rig.store.reader() as txn:
        for table in (schema.CONTAINER, schema.USE, schema.USER, schema.BLOCK, schema.OBJECT, schema.CELL):
            assert not list(txn.scan_keys(table)), table.name
