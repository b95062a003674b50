"""Ranges zeroed by a bit a leaf: what is read at once, what is settled later, and what damage does to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Damaged
from silofs.layers import heads, schema
from silofs.layers.policies import drain
from silofs.layers.reclaim import Reclaim
from silofs.layers.transaction import WriteTxn
from silofs.limits import GIB, TIB
from tests.storerig import Rig, object_keys, page_bytes

LEAVES = 600  # with a page in each: more than are changed one by one


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "store")
    yield rig
    rig.close()


def filled(rig: Rig, name: str = "vm") -> bytes:
    uuid = rig.store.write(lambda txn: txn.create_volume(name, 2 * GIB)).uuid
    rig.put(uuid, range(0, LEAVES * LEAF_PAGES, LEAF_PAGES))
    return uuid


def settle(rig: Rig) -> None:
    drain(rig.store, [Reclaim()])


def kinds(rig: Rig, uuid: bytes, leaf: int) -> list[int]:
    with rig.store.reader() as txn:
        return schema.kinds(txn.resolve(txn.volume(uuid).head, leaf)).tolist()


def test_a_void_reads_as_zeros_at_once_and_gives_its_space_back_in_steps(rig: Rig) -> None:
    vm = filled(rig)
    rig.zero(vm, 3, LEAVES * LEAF_PAGES)
    result = rig.commit(lambda txn: txn.keys_changed)
    assert result.value is not None and result.value < 30
    with rig.store.reader() as txn:
        volume = txn.volume(vm)
        layer = txn.layer(volume.head)
        assert (layer.own_pages, layer.unsettled, txn.state.unsettled) == (LEAVES, LEAVES - 1, LEAVES - 1)
        assert list(txn.chain_leaves(volume.head)) == [0], "nothing else may show anything"
        assert not txn.resolve(volume.head, 5).any() or set(txn.resolve(volume.head, 5).tolist()) == {schema.ZERO}
    assert rig.findings() == []
    rig.reopen()
    settle(rig)
    with rig.store.reader() as txn:
        volume = txn.volume(vm)
        layer = txn.layer(volume.head)
        assert (volume.data_pages, layer.own_pages, layer.leaves, layer.voids, txn.state.unsettled) == (1, 1, 1, b"", 0)
        assert len(object_keys(txn)) == 1
    assert rig.findings() == []


def test_a_void_of_a_clone_hides_what_is_below_for_good(rig: Rig) -> None:
    vm = filled(rig)
    snapshot = rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    clone = rig.store.write(lambda txn: txn.clone(snapshot.layer, "clone")).uuid
    rig.zero(clone, 0, LEAVES * LEAF_PAGES)
    rig.commit()
    rig.store.write(lambda txn: txn.take_snapshot(clone, "empty"))
    rig.put(clone, [7 * LEAF_PAGES + 5], seed=3)
    second = rig.store.write(lambda txn: txn.clone(txn.find_snapshot(clone, "empty").layer, "second")).uuid
    rig.store.write(lambda txn: txn.resize(second, 10 * PAGE))
    settle(rig)
    with rig.store.reader() as txn:
        counts = [txn.volume(uuid).data_pages for uuid in (vm, clone, second)]
        counts += [txn.find_snapshot(vm, "s").data_pages, txn.find_snapshot(clone, "empty").data_pages]
        assert counts == [LEAVES, 1, 0, LEAVES, 0]
        assert list(txn.chain_leaves(txn.volume(clone).head)) == [7]
    assert kinds(rig, clone, 7)[5] == schema.LONE and set(kinds(rig, clone, 7)[:5]) == {schema.ZERO}
    assert rig.read("vm")[:PAGE] == page_bytes(0)
    assert rig.findings() == []


def test_what_travels_of_a_void_is_a_run_of_zeros_and_stays_one(rig: Rig) -> None:
    base = rig.store.write(lambda txn: txn.receive_layer(b"B" * 16, 0, 4 * GIB, 4 * GIB)).id
    rig.store.write(lambda txn: txn.put_map(base, [(0, 2000 * LEAF_PAGES, schema.REMOTE)], mapped=2000 * LEAF_PAGES))
    top = rig.store.write(lambda txn: txn.receive_layer(b"T" * 16, base, 4 * GIB, 4 * GIB)).id

    zeros = [(5, 700 * LEAF_PAGES - 5, schema.ZERO), (700 * LEAF_PAGES + 4, 900 * LEAF_PAGES, schema.ZERO)]

    def receive(txn: WriteTxn) -> int:
        txn.put_map(top, [(700 * LEAF_PAGES + 1, 3, schema.REMOTE)])
        txn.pin(top, "test")
        before = txn.keys_changed
        for _ in range(2):  # a map that comes again changes nothing
            txn.put_map(top, [*zeros, (700 * LEAF_PAGES, 1, schema.ZERO)])
        return txn.keys_changed - before

    assert rig.store.write(receive) < 30
    rig.store.write(lambda txn: txn.put_map(top, [(9, 1, schema.REMOTE)]))
    with rig.store.reader() as txn:
        assert txn.layer(top).leaves == 3 and txn.layer(top).remote_pages == 3
        assert set(txn.resolve(top, 1, above=base).tolist()) == {schema.ZERO}
        edge = schema.kinds(txn.resolve(top, 700, above=base)).tolist()
        assert edge == [schema.ZERO] + 3 * [schema.REMOTE] + (LEAF_PAGES - 4) * [schema.ZERO]
        assert len(list(txn.chain_leaves(top, above=base))) == 1601
        assert len(list(txn.chain_leaves(top))) == 2000 - 1598
    assert rig.findings() == []


def test_many_discards_are_one_change_of_each_leaf(rig: Rig) -> None:
    vm = filled(rig)
    for page in range(0, 200 * LEAF_PAGES, 16):
        rig.zero(vm, page, page + 8)
    started = time.monotonic()
    result = rig.commit(lambda txn: txn.keys_changed)
    assert result.value is not None and result.value < 1200
    assert time.monotonic() - started < 5
    with rig.store.reader() as txn:
        assert txn.volume(vm).data_pages == LEAVES - 200
    assert rig.findings() == []


def test_a_terabyte(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "VOID_LEAVES", 8)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", TIB)).uuid
    rig.put(vm, range(0, TIB // PAGE, TIB // PAGE // 64))
    rig.zero(vm, 0, TIB // PAGE)
    result = rig.commit(lambda txn: txn.keys_changed)
    assert result.value is not None and result.value < 80  # one for each 16 GiB
    settle(rig)
    with rig.store.reader() as txn:
        assert txn.volume(vm).data_pages == 0
        assert not list(txn.scan_keys(schema.LEAF)) and not list(txn.scan_keys(schema.VOID))


@pytest.mark.parametrize("harm", ["flip", "remove", "older"])
def test_a_damaged_void_bitmap_never_shows_what_was_discarded(rig: Rig, harm: str) -> None:
    vm = filled(rig)
    rig.zero(vm, 0, 300 * LEAF_PAGES)
    rig.commit()
    with rig.store.reader() as txn:
        (key,) = txn.scan_keys(schema.VOID)
        older = bytes(txn.fetch(schema.VOID, key) or b"")
    rig.zero(vm, 0, LEAVES * LEAF_PAGES)
    rig.commit()

    def spoil(txn: WriteTxn) -> None:
        value = bytearray(txn.fetch(schema.VOID, key) or b"")
        value[20] ^= 1
        if harm == "remove":
            txn._delete(schema.VOID, key)
        else:
            txn._put(schema.VOID, key, older if harm == "older" else bytes(value))

    rig.store.write(spoil)
    for leaf in (0, 450):
        assert set(kinds(rig, vm, leaf)) == {schema.LOST}
    assert any(finding.code == "void" for finding in rig.findings())
    rig.write(vm, 0, page_bytes(1))
    assert isinstance(rig.commit().failed[vm], Damaged), "what could not be read back is not taken"
