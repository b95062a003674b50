"""Commits: what they store, what they give up, and what they leave alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Busy, Damaged, ObjectMissing
from silofs.layers import heads, schema
from silofs.layers.pending import Pending
from silofs.layers.store import CommitResult
from silofs.layers.transaction import WriteTxn
from silofs.limits import GIB, TIB
from tests.storerig import Rig, object_keys, page_bytes


def records(rig: Rig, table: schema.Table) -> int:
    """Of a table; of objects, those in cells as well."""
    with rig.store.reader() as txn:
        return len(object_keys(txn)) if table is schema.OBJECT else sum(1 for _ in txn.scan_keys(table))


def volume(rig: Rig, size: int = GIB, name: str = "vm") -> bytes:
    return rig.store.write(lambda txn: txn.create_volume(name, size)).uuid


def kinds(rig: Rig, uuid: bytes, leaf: int = 0) -> list[int]:
    with rig.store.reader() as txn:
        return schema.kinds(txn.resolve(txn.volume(uuid).head, leaf)).tolist()


def test_pages_are_packed(rig: Rig) -> None:
    vm = volume(rig)
    rig.put(vm, range(31 + 16))
    assert (records(rig, schema.OBJECT), records(rig, schema.PAGES)) == (2, 0)
    rig.put(vm, range(100, 115))
    assert (records(rig, schema.OBJECT), records(rig, schema.PAGES)) == (2, 15)
    assert rig.read("vm")[: 31 * PAGE] == b"".join(page_bytes(page) for page in range(31))


def test_overwritten_pages_go_in_the_same_transaction(rig: Rig) -> None:
    vm = volume(rig)
    rig.put(vm, range(62))
    rig.put(vm, range(62), seed=1)
    assert (records(rig, schema.OBJECT), records(rig, schema.NAME), records(rig, schema.LIVE)) == (2, 2, 1)
    rig.put(vm, range(5), seed=2)
    assert (records(rig, schema.OBJECT), records(rig, schema.PAGES)) == (2, 5)
    rig.put(vm, range(5), seed=3)
    assert (records(rig, schema.OBJECT), records(rig, schema.PAGES)) == (2, 5)


def test_what_a_sealed_layer_holds_stays(rig: Rig) -> None:
    vm = volume(rig)
    rig.put(vm, range(31))
    rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    rig.put(vm, range(31), seed=1)
    rig.zero(vm, 0, 31)
    rig.commit()
    assert records(rig, schema.OBJECT) == 1
    assert kinds(rig, vm)[:32] == [schema.ZERO] * 31 + [schema.HOLE]


def test_zero_pages_are_not_stored(rig: Rig) -> None:
    vm = volume(rig)
    rig.write(vm, 0, bytes(20 * PAGE) + page_bytes(20))
    result = rig.commit()
    assert kinds(rig, vm)[:21] == [schema.HOLE] * 20 + [schema.LONE]
    assert result.volumes[vm].record is not None
    assert result.volumes[vm].record.data_pages == 1
    rig.write(vm, 20 * PAGE, bytes(PAGE - 1) + b"x")
    rig.commit()
    assert kinds(rig, vm)[20] == schema.LONE
    rig.write(vm, 21 * PAGE - 1, b"\0")
    rig.commit()
    assert kinds(rig, vm)[20] == schema.HOLE
    assert records(rig, schema.LEAF) == records(rig, schema.PRESENCE) == records(rig, schema.LEAF_SUM) == 0


def test_sub_page_writes_merge_with_what_is_stored(rig: Rig) -> None:
    vm = volume(rig)
    rig.put(vm, [3])
    rig.write(vm, 3 * PAGE + 100, b"abc")
    rig.write(vm, 3 * PAGE + 102, b"X" * 10)
    rig.commit()
    expected = bytearray(page_bytes(3))
    expected[100:112] = b"ab" + b"X" * 10
    assert rig.read("vm")[3 * PAGE : 4 * PAGE] == expected


def test_commit_is_applied_once(rig: Rig) -> None:
    vm = volume(rig)
    pending = Pending(vm)
    ring = memoryview(bytearray(page_bytes(1)))
    pending.write(PAGE, 0, PAGE, rig.lsn + 1)
    first = rig.store.commit([pending], ring).result()
    again: CommitResult[None] = rig.store.commit([pending], ring).result()
    assert again.volumes[vm].record == first.volumes[vm].record
    assert np.array_equal(again.volumes[vm].leaves[0], first.volumes[vm].leaves[0])
    assert records(rig, schema.PAGES) == 1


def test_several_pendings_of_a_volume_apply_in_order(rig: Rig) -> None:
    vm = volume(rig)
    ring = memoryview(bytearray(page_bytes(1) + page_bytes(2)))
    older, newer = Pending(vm), Pending(vm)
    older.write(0, 0, PAGE, 1)
    newer.write(0, PAGE, PAGE, 2)
    result = rig.store.commit([older, newer], ring).result()
    assert rig.read("vm")[:PAGE] == page_bytes(2)
    assert result.volumes[vm].record is not None
    assert result.volumes[vm].record.applied_lsn == 2
    assert records(rig, schema.PAGES) == 1


def test_pending_of_a_deleted_volume_is_dropped(rig: Rig) -> None:
    vm = volume(rig)
    rig.write(vm, 0, page_bytes(0))
    rig.store.write(lambda txn: txn.delete_volume(vm))
    assert rig.commit().volumes == {}


def test_discard_of_a_huge_range_costs_what_is_there(rig: Rig) -> None:
    vm = volume(rig, 100 * TIB)
    far = 90 * TIB // PAGE
    rig.put(vm, [0, 1, LEAF_PAGES, far])
    rig.zero(vm, 1, 99 * TIB // PAGE)
    result = rig.commit(lambda txn: txn.keys_changed)
    assert result.value is not None
    assert result.value < 30
    assert result.volumes[vm].record is not None
    assert result.volumes[vm].record.data_pages == 1


def test_large_discards_name_their_leaves_as_stale(rig: Rig) -> None:
    vm = volume(rig, 2 * GIB)
    rig.put(vm, range(0, 600 * LEAF_PAGES, LEAF_PAGES))
    rig.zero(vm, 0, 600 * LEAF_PAGES)
    committed = rig.commit().volumes[vm]
    assert not committed.leaves
    assert list(committed.stale) == [(0, 600)]
    rig.put(vm, [300 * LEAF_PAGES])
    assert kinds(rig, vm, 300)[0] == schema.LONE


def test_leaves_beyond_those_that_are_kept_are_named_stale(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "ROWS", 2)
    monkeypatch.setattr(heads, "WRITER_LEAVES", 4)
    vm = volume(rig, 16 * LEAF_PAGES * PAGE)
    for seed in (1, 2):  # the second time over what the first left, in part from memory
        rig.zero(vm, 9 * LEAF_PAGES, 9 * LEAF_PAGES + 2)  # resolved, and then overtaken by a leaf that is not kept
        for leaf in range(10):
            rig.write(vm, leaf * LEAF_PAGES * PAGE, page_bytes(leaf * LEAF_PAGES, seed))
        committed = rig.commit().volumes[vm]
        stale = {leaf for start, end in committed.stale for leaf in range(start, end)}
        assert set(committed.leaves) | stale == set(range(10))
        assert stale and not set(committed.leaves) & stale
        with rig.store.reader() as txn:
            head = txn.volume(vm).head
            for leaf, refs in committed.leaves.items():
                assert (refs == txn.resolve(head, leaf)).all()
        data = rig.read("vm")
        for leaf in range(10):
            assert data[leaf * LEAF_PAGES * PAGE :][:PAGE] == page_bytes(leaf * LEAF_PAGES, seed)
    assert not rig.findings()


def test_writes_beyond_the_end_are_dropped(rig: Rig) -> None:
    vm = volume(rig, 3 * PAGE)
    rig.put(vm, [1, 3, 700])
    assert kinds(rig, vm)[:5] == [0, schema.LONE, 0, 0, 0]


def test_an_old_reader_misses_objects_and_says_so(rig: Rig) -> None:
    vm = volume(rig)
    rig.put(vm, range(31))
    with rig.store.reader() as txn:
        old = txn.resolve(txn.volume(vm).head, 0)
        rig.put(vm, range(31), seed=1)
        assert bytes(txn.page(int(old[0]))) == page_bytes(0), "the snapshot still has it"
        txn.renew()
        with pytest.raises(ObjectMissing):
            txn.page(int(old[0]))


def test_views_are_as_long_as_what_is_stored_together(rig: Rig) -> None:
    vm = volume(rig)
    rig.put(vm, range(10, 10 + 62))
    with rig.store.reader() as txn:
        views = txn.views(txn.resolve(txn.volume(vm).head, 0)[:128])
        assert [len(view) // PAGE for view in views] == [10, 31, 31, 56]


def test_a_patch_of_a_remote_page_is_refused(rig: Rig) -> None:
    def receive(txn: WriteTxn) -> bytes:
        layer = txn.receive_layer(b"r" * 16, 0, GIB, GIB)
        txn.put_map(layer.id, [(5, 1, schema.REMOTE)], mapped=GIB // PAGE)
        return txn.create_volume("vm", GIB, parent=layer.id).uuid

    vm = rig.store.write(receive)
    rig.write(vm, 5 * PAGE + 7, b"x")
    with pytest.raises(Busy):
        rig.commit()
    rig.write(vm, 5 * PAGE, page_bytes(5))
    rig.commit()
    assert kinds(rig, vm)[5] == schema.LONE


def test_a_patch_of_a_damaged_page_is_lost_until_overwritten(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    vm = volume(rig)
    rig.put(vm, [5])

    def spoil(txn: WriteTxn) -> None:
        key = next(txn.scan_keys(schema.PAGES))
        txn._put(schema.PAGES, key, bytes(4080))

    rig.store.write(spoil)
    rig.write(vm, 5 * PAGE + 7, b"x")
    with caplog.at_level(logging.CRITICAL, logger="silofs"):
        result = rig.commit()
    assert result.volumes[vm].record is not None
    assert result.volumes[vm].record.applied_lsn == rig.lsn, "the log moves on"
    with rig.store.reader() as txn, pytest.raises(Damaged):
        txn.page(int(txn.resolve(txn.volume(vm).head, 0)[5]))
    rig.put(vm, [5], seed=1)
    assert rig.read("vm")[5 * PAGE : 6 * PAGE] == page_bytes(5, 1)


def test_a_lost_leaf_is_damage_and_heals_by_overwriting(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A leaf that LMDB no longer finds must not read as a hole: the parent's old pages would show through."""
    vm = volume(rig)
    rig.put(vm, range(3))
    rig.store.write(lambda txn: txn.take_snapshot(vm, "s"))
    rig.put(vm, range(LEAF_PAGES), seed=1)
    head = rig.store.write(lambda txn: txn.volume(vm).head)
    rig.store.write(lambda txn: txn._delete(schema.LEAF, schema.leaf_key(head, 0)))
    rig.reopen()
    with caplog.at_level(logging.CRITICAL, logger="silofs"):
        with rig.store.reader() as txn, pytest.raises(Damaged):
            txn.own_leaf(head, 0)
        assert kinds(rig, vm) == [schema.LOST] * LEAF_PAGES
        assert {finding.code for finding in rig.findings()} >= {"presence"}
        rig.put(vm, [7], seed=2)
        assert kinds(rig, vm) == [schema.LOST] * 7 + [schema.LONE] + [schema.LOST] * 504
        # What was lost stays on disk and on record as such; removing the volume clears all but the leaked objects.
        rig.store.write(lambda txn: txn.delete_volume(vm))
        left = rig.findings()
        assert left
        assert {finding.code for finding in left} <= {"live", "object"}

    def clear(txn: WriteTxn) -> None:
        for key in object_keys(txn):
            txn._remove_object(key)
        for table in (schema.NAME, schema.LIVE):
            for key in list(txn.scan_keys(table)):
                txn._delete(table, key)

    rig.store.write(clear)


@pytest.mark.parametrize("pages", [range(100, 103), range(100, 131), range(100, 100 + 9 * 31)])
def test_a_counter_of_the_past_stops_writes_and_loses_none(rig: Rig, pages: range) -> None:
    """As after damage. LMDB would leave out what is to be appended and does not come last, and say nothing."""
    vm = volume(rig, 8 << 20)
    rig.put(vm, range(600))
    before = rig.read("vm")
    now = rig.store.write(lambda txn: txn.state.next_object)
    rig.store.write(lambda txn: txn.count(next_object=2))
    rig.reopen()  # a running store has its own memory of it
    for page in pages:
        rig.write(vm, page * PAGE, b"new!" * (PAGE // 4))
    result = rig.commit()
    assert "behind the last id" in str(result.failed[vm])
    assert rig.read("vm") == before
    rig.store.write(lambda txn: txn.count(next_object=now))
    assert not rig.findings()
