"""Volumes, snapshots and clones: what they cost and what they share."""

from __future__ import annotations

import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import BadName, BadSize, Damaged, Exists, NoSuchSnapshot, NoSuchVolume
from silofs.layers import schema
from silofs.layers.catalog import Role
from silofs.layers.policies import drain
from silofs.layers.rewrite import Reap
from silofs.limits import GIB, TIB
from tests.storerig import Rig, object_keys, page_bytes


def create(rig: Rig, name: str = "vm", size: int = GIB) -> bytes:
    return rig.store.write(lambda txn: txn.create_volume(name, size)).uuid


def head(rig: Rig, uuid: bytes) -> int:
    with rig.store.reader() as txn:
        return txn.volume(uuid).head


@pytest.mark.parametrize("scattered", [0, 2000])
def test_snapshot_and_clone_change_a_bounded_number_of_keys(rig: Rig, scattered: int) -> None:
    vm = create(rig, size=TIB)
    step = TIB // PAGE // max(1, scattered)
    rig.put(vm, [number * step for number in range(scattered)])
    rig.put(vm, range(40))

    def both(txn):  # type: ignore[no-untyped-def]
        before = txn.keys_changed
        layer = txn.take_snapshot(vm, "s").layer
        txn.clone(layer, "other")
        txn.finish()
        return txn.keys_changed - before

    assert rig.store.write(both) < 25


def test_sealing_an_empty_head_adds_nothing(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, [1])
    first = rig.store.write(lambda txn: txn.seal(vm))
    assert rig.store.write(lambda txn: txn.seal(vm)) == rig.store.write(lambda txn: txn.seal(vm))
    rig.store.write(lambda txn: txn.resize(vm, 2 * GIB))
    assert rig.store.write(lambda txn: txn.seal(vm)).id != first.id, "another size is another content"


def test_clones_share_until_the_last_one_goes(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(31))
    layer = rig.store.write(lambda txn: txn.take_snapshot(vm, "s").layer)
    other = rig.store.write(lambda txn: txn.clone(layer, "other")).uuid
    rig.put(other, range(3), seed=1)
    rig.store.write(lambda txn: txn.delete_volume(vm))
    assert rig.read("other")[: 4 * PAGE] == b"".join([*(page_bytes(page, 1) for page in range(3)), page_bytes(3)])
    assert rig.findings() == []
    rig.store.write(lambda txn: txn.delete_volume(other))
    with rig.store.reader() as txn:
        assert txn.layers() == []
        assert not object_keys(txn)


def test_pinned_layers_stay(rig: Rig) -> None:
    vm = create(rig)
    rig.put(vm, range(31))
    layer = rig.store.write(lambda txn: txn.take_snapshot(vm, "s").layer)
    rig.store.write(lambda txn: txn.pin(layer, "m-1"))
    rig.store.write(lambda txn: txn.pin(layer, "m-1"))
    rig.store.write(lambda txn: txn.delete_volume(vm))
    assert rig.findings() == []
    with rig.store.reader() as txn:
        assert [pin.holder for pin in txn.pins(layer)] == ["m-1"]
        assert bytes(txn.page(int(txn.resolve(layer, 0)[0]))) == page_bytes(0)
    rig.store.write(lambda txn: txn.unpin(layer, "m-1"))
    with rig.store.reader() as txn:
        assert txn.layers() == []


def test_big_layers_are_removed_in_steps(rig: Rig) -> None:
    vm = create(rig, size=2 * GIB)
    rig.put(vm, range(0, 700 * LEAF_PAGES, LEAF_PAGES))
    rig.store.write(lambda txn: txn.delete_volume(vm))
    with rig.store.reader() as txn:
        assert txn.volumes() == []
    assert rig.findings() == []
    rig.reopen()
    assert rig.store.statistics()["doomed_layers"] == 1
    assert drain(rig.store, [Reap()]) == 4, "three with work, one that finds none"
    with rig.store.reader() as txn:
        assert txn.layers() == []
        assert not list(txn.scan_keys(schema.PAGES))


def test_shrinking_hides_the_chain_below(rig: Rig) -> None:
    vm = create(rig, size=4 * LEAF_PAGES * PAGE)
    rig.put(vm, [0, 5, LEAF_PAGES, 3 * LEAF_PAGES])
    rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    rig.store.write(lambda txn: txn.resize(vm, 5 * PAGE + 100))
    record = rig.store.write(lambda txn: txn.resize(vm, 4 * LEAF_PAGES * PAGE))
    assert record.data_pages == 2
    data = rig.read("vm")
    assert data[5 * PAGE :].rstrip(b"\0") == page_bytes(5)[:100].rstrip(b"\0")
    rig.store.write(lambda txn: txn.take_snapshot(vm, "t"))
    rig.put(vm, [LEAF_PAGES], seed=1)
    assert rig.read("vm")[LEAF_PAGES * PAGE :][:PAGE] == page_bytes(LEAF_PAGES, 1)
    with rig.store.reader() as txn:
        kind = schema.kinds(txn.resolve(txn.volume(vm).head, 1))[1]
    assert kind == schema.HOLE


def test_resizing_to_nothing_and_back(rig: Rig) -> None:
    vm = create(rig, size=3 * PAGE)
    rig.put(vm, range(3))
    assert rig.store.write(lambda txn: txn.resize(vm, 0)).data_pages == 0
    rig.store.write(lambda txn: txn.resize(vm, 3 * PAGE))
    assert rig.read("vm") == bytes(3 * PAGE)


def test_names(rig: Rig) -> None:
    vm = create(rig)
    for name in ("", ".hidden", "a/b", "../up", "a" * 129, "-rf", "vm.img", "a\0b", "é"):
        with pytest.raises(BadName):
            create(rig, name)
        with pytest.raises(BadName):
            rig.store.write(lambda txn, name=name: txn.rename(vm, name))
    with pytest.raises(Exists):
        create(rig, "vm")
    rig.store.write(lambda txn: txn.rename(vm, "new"))
    with rig.store.reader() as txn:
        assert txn.volume_by_name("new").uuid == vm
        with pytest.raises(NoSuchVolume):
            txn.volume_by_name("vm")
        with pytest.raises(NoSuchSnapshot):
            txn.find_snapshot(vm, "none")
    with pytest.raises(BadSize):
        create(rig, "big", 1 << 60)


def test_ownership_outlives_the_volume(rig: Rig) -> None:
    vm = create(rig)
    with rig.store.reader() as txn:
        record = txn.ownership(vm)
        assert record is not None
        assert (record.role, record.epoch) == (Role.OWNER, 1)
        assert txn.ownership(b"?" * 16) is None
    rig.store.write(lambda txn: txn.delete_volume(vm))
    with rig.store.reader() as txn:
        record = txn.ownership(vm)
        assert record is not None
        assert (record.role, record.epoch, record.name) == (Role.NONE, 1, "vm")


def test_a_failed_function_leaves_nothing(rig: Rig) -> None:
    def half(txn):  # type: ignore[no-untyped-def]
        txn.create_volume("a", GIB)
        txn.create_volume("a", GIB)

    with pytest.raises(Exists):
        rig.store.write(half)
    with rig.store.reader() as txn:
        assert txn.volumes() == []


def test_a_lost_record_is_no_absence(rig: Rig) -> None:
    """LMDB with a damaged tree forgets keys without a word; the counts tell."""
    vm = create(rig)
    key = b"vm"
    value = rig.store.write(lambda txn: bytes(txn.fetch(schema.VOLUME_NAME, key)))
    rig.store.write(lambda txn: txn._delete(schema.VOLUME_NAME, key))
    with rig.store.reader() as txn:
        with pytest.raises(Damaged):
            txn.volume_by_name("vm")
        with pytest.raises(Damaged):
            txn.volume_by_name("never")
        assert txn.volume(vm).name == "vm"
    assert {finding.code for finding in rig.findings()} == {"catalog", "count", "name"}
    rig.store.write(lambda txn: txn._put(schema.VOLUME_NAME, key, value))


def test_values(rig: Rig) -> None:
    rig.store.write(lambda txn: txn.put_value("peer", "b", b"1"))
    rig.store.write(lambda txn: txn.put_value("peer", "b", b"2"))
    with rig.store.reader() as txn:
        assert txn.values("peer") == {"b": b"2"}
        assert txn.value("outbox", "b") is None
    assert rig.store.write(lambda txn: txn.delete_value("peer", "b"))
    assert not rig.store.write(lambda txn: txn.delete_value("peer", "b"))
