"""Layers that arrive from a peer: maps, pages, counts, and digests that are equal at both ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Busy, Damaged, Exists
from silofs.extents import Extents
from silofs.layers import schema
from silofs.layers.digest import root_digest, segment_digest
from silofs.layers.reader import ReadTxn
from silofs.layers.transaction import WriteTxn
from silofs.limits import GIB, TIB
from tests.storerig import Rig, page_bytes, read_layer

SIZE = 4 * LEAF_PAGES * PAGE
UUID = b"L" * 16


def receive(txn: WriteTxn, runs: list[tuple[int, int, int]], size: int = SIZE) -> int:
    layer = txn.receive_layer(UUID, 0, size, size)
    txn.pin(layer.id, "m")
    return txn.put_map(layer.id, runs, mapped=size // PAGE).id


def test_map_then_pages(rig: Rig) -> None:
    layer = rig.store.write(lambda txn: receive(txn, [(3, 600, schema.REMOTE), (700, 10, schema.ZERO)]))
    with rig.store.reader() as txn:
        record = txn.layer(layer)
        assert (record.leaves, record.remote_pages, record.own_pages, record.complete) == (2, 600, 0, False)
        assert list(txn.missing(layer)) == [(3, 603)]
        assert list(txn.missing(layer, 1)) == [(512, 603)]
        refs = txn.resolve(layer, 0)
        assert schema.object_of(int(refs[3])) == layer
    pages = {page: page_bytes(page) for page in range(3, 603)}
    assert rig.store.write(lambda txn: txn.fill(layer, pages)) == 600
    assert rig.store.write(lambda txn: txn.fill(layer, pages)) == 0, "what arrived arrives once"
    assert rig.store.write(lambda txn: txn.fill(layer, {0: bytes(PAGE), 705: bytes(PAGE)})) == 0
    with rig.store.reader() as txn:
        record = txn.layer(layer)
        assert (record.remote_pages, record.own_pages, record.complete) == (0, 600, True)
        assert not txn.missing(layer)
        assert read_layer(txn, layer, SIZE)[3 * PAGE : 603 * PAGE] == b"".join(pages.values())


def test_maps_can_be_sent_again(rig: Rig) -> None:
    layer = rig.store.write(lambda txn: receive(txn, [(3, 6, schema.REMOTE)]))
    rig.store.write(lambda txn: txn.fill(layer, {4: page_bytes(4)}))
    rig.store.write(lambda txn: receive(txn, [(3, 6, schema.REMOTE)]))
    with rig.store.reader() as txn:
        assert list(txn.missing(layer)) == [(3, 4), (5, 9)]
    with pytest.raises(Busy):
        rig.store.write(lambda txn: receive(txn, [(SIZE // PAGE - 1, 2, schema.ZERO)]))
    with pytest.raises(Exists):
        rig.store.write(lambda txn: txn.receive_layer(UUID, 0, SIZE, SIZE - PAGE))


def test_a_map_of_a_huge_volume_is_small(rig: Rig) -> None:
    layer = rig.store.write(lambda txn: receive(txn, [(0, 32 * GIB // PAGE, schema.REMOTE)], TIB))
    with rig.store.reader() as txn:
        assert txn.layer(layer).remote_pages == 32 * GIB // PAGE
        assert list(txn.missing(layer)) == [(0, 32 * GIB // PAGE)]


def test_a_volume_on_what_arrives(rig: Rig) -> None:
    """Writes win over arrivals, and its count of data pages stays what a check finds."""
    layer = rig.store.write(lambda txn: receive(txn, [(0, 40, schema.REMOTE)]))
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    record = rig.store.write(lambda txn: txn.set_base(vm, layer))
    assert record.data_pages == 40
    rig.put(vm, [0, 50], seed=1)
    rig.zero(vm, 1, 2)
    rig.commit()
    assert rig.findings() == []
    with rig.store.reader() as txn:
        kinds = schema.kinds(txn.resolve(txn.volume(vm).head, 0)).tolist()
        assert kinds[:3] == [schema.LONE, schema.ZERO, schema.REMOTE]
    rig.store.write(lambda txn: txn.fill(layer, {page: page_bytes(page) for page in range(40)}))
    rig.put(vm, [2], seed=2)
    data = rig.read("vm")
    assert data[:PAGE] == page_bytes(0, 1)
    assert data[PAGE : 2 * PAGE] == bytes(PAGE)
    assert data[2 * PAGE : 4 * PAGE] == page_bytes(2, 2) + page_bytes(3)
    with pytest.raises(Busy):
        rig.store.write(lambda txn: txn.set_base(vm, layer))
    with pytest.raises(Busy):
        rig.store.write(lambda txn: txn.put_map(layer, [(60, 1, schema.ZERO)]))


def test_commits_see_what_arrived_below_them(rig: Rig) -> None:
    """The writer keeps resolved leaves between commits; an arrival below makes it forget."""
    layer = rig.store.write(lambda txn: receive(txn, [(0, 40, schema.REMOTE)]))
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE, parent=layer)).uuid
    rig.put(vm, [0])
    rig.store.write(lambda txn: txn.fill(layer, {5: page_bytes(5)}))
    rig.write(vm, 5 * PAGE + 1, b"x")
    result = rig.commit(lambda txn: txn.fill(layer, {7: page_bytes(7)}))
    assert result.chilled == {0}
    rig.write(vm, 7 * PAGE + 1, b"x")
    rig.commit()
    with rig.store.reader() as txn:
        refs = txn.resolve(txn.volume(vm).head, 0)
        for page in (5, 7):
            assert bytes(txn.page(int(refs[page]))) == page_bytes(page)[:1] + b"x" + page_bytes(page)[2:]


def test_lost_pages_are_errors_until_overwritten(rig: Rig) -> None:
    layer = rig.store.write(lambda txn: receive(txn, [(0, 10, schema.REMOTE)]))
    assert rig.store.write(lambda txn: txn.mark_lost(layer, Extents([(2, 4), (9, 20)]))) == 3
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE, parent=layer)).uuid
    with rig.store.reader() as txn:
        assert (txn.layer(layer).lost_pages, txn.layer(layer).complete) == (3, False)
        refs = txn.resolve(txn.volume(vm).head, 0)
        with pytest.raises(Damaged):
            txn.page(int(refs[2]))
        with pytest.raises(AssertionError):
            txn.page(int(refs[0]))
    rig.put(vm, [2])


def digest(txn: ReadTxn, layer: int, above: int = 0) -> bytes:
    segment = txn.segment(layer, above)
    found = ((leaf, txn.leaf_digest(layer, leaf, above=above)) for leaf in txn.chain_leaves(layer, above=above))
    return segment_digest(segment.size, segment.clip, [(leaf, each) for leaf, each in found if each])


def transfer(txn: ReadTxn, rig: Rig, layer: int, above: int, parent: int) -> int:
    """Send a segment the way a migration does: its map, then its pages."""
    segment, record = txn.segment(layer, above), txn.layer(layer)
    runs, pages = [], {}
    for leaf in txn.chain_leaves(layer, above=above):
        refs = txn.resolve(layer, leaf, above=above)
        for at in np.flatnonzero(refs).tolist():
            page = leaf * LEAF_PAGES + at
            if refs[at] == schema.ZERO:
                runs.append((page, 1, schema.ZERO))
            else:
                runs.append((page, 1, schema.REMOTE))
                pages[page] = bytes(txn.page(int(refs[at])))

    def receive(txn: WriteTxn) -> int:
        layer = txn.receive_layer(record.uuid, parent, segment.size, segment.clip)
        txn.pin(layer.id, "m")
        txn.put_map(layer.id, runs, mapped=segment.size // PAGE)
        txn.fill(layer.id, pages)
        return layer.id

    return rig.store.write(receive)


def test_digests_agree_at_both_ends(rig: Rig, tmp_path: Path) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    rig.put(vm, range(600))
    rig.zero(vm, 5, 10)
    rig.commit()
    layers = [rig.store.write(lambda txn: txn.take_snapshot(vm, "a").layer)]
    rig.put(vm, range(500, 520), seed=1)
    rig.store.write(lambda txn: txn.seal(vm))
    rig.zero(vm, 510, 515)
    rig.store.write(lambda txn: txn.resize(vm, 520 * PAGE))
    rig.store.write(lambda txn: txn.resize(vm, SIZE))
    rig.commit()
    layers.append(rig.store.write(lambda txn: txn.take_snapshot(vm, "b").layer))

    other = Rig(tmp_path / "other")
    with rig.store.reader() as txn:
        assert len(txn.segment(layers[1], layers[0]).layers) == 2, "two layers travel as one"
        there = [transfer(txn, other, layers[0], 0, 0)]
        there.append(transfer(txn, other, layers[1], layers[0], there[0]))
        here = [digest(txn, layers[0]), digest(txn, layers[1], layers[0])]
        flat = digest(txn, layers[1])
        data = read_layer(txn, layers[1], SIZE)
    with other.store.reader() as txn:
        assert [digest(txn, there[0]), digest(txn, there[1], there[0])] == here
        assert digest(txn, there[1]) == flat
        assert read_layer(txn, there[1], SIZE) == data
        assert root_digest(here) != root_digest(reversed(here))
    moved = other.store.write(lambda txn: txn.create_volume("vm", SIZE, parent=there[1]))
    with rig.store.reader() as txn:
        assert moved.data_pages == txn.volume(vm).data_pages
    assert other.findings() == []
    other.close()


def test_a_digest_needs_every_page(rig: Rig) -> None:
    layer = rig.store.write(lambda txn: receive(txn, [(0, 10, schema.REMOTE)]))
    with rig.store.reader() as txn, pytest.raises(Damaged):
        txn.leaf_digest(layer, 0)
