"""Blocks in containers: stored once, found again, counted, and gone with the last leaf entry that refers to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Damaged
from silofs.layers import containers, leaves, schema
from silofs.layers.containers import BLOCK_PAGES, FULL
from silofs.layers.pack import Laid, Packed
from silofs.layers.transaction import WriteTxn
from silofs.layers.use_records import USER, USER_COUNT, read_use
from silofs.packing import BlockWriter
from tests.storerig import Rig, object_keys, page_bytes, read_layer

SIZE = 4 * LEAF_PAGES * PAGE


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "store")
    yield rig
    rig.close()


def text(block: int, pages: int = BLOCK_PAGES) -> bytes:
    return b"".join((f"page {block}.{at} ".encode() * PAGE)[:PAGE] for at in range(pages))


def noise(block: int, pages: int = BLOCK_PAGES) -> bytes:
    return random.Random(block).randbytes(pages * PAGE)


def mixed(blocks: int, first: int = 0) -> bytes:
    """Blocks that pack and blocks that do not, all different."""
    return b"".join((text if at % 3 else noise)(first + at) for at in range(blocks))


def load(rig: Rig, data: bytes, first: int = 0, size: int = SIZE) -> tuple[int, Packed]:
    """A layer with these pages from number `first` on, held by a pin."""

    def begin(txn: WriteTxn) -> int:
        layer = txn.receive_layer(uuid4().bytes, 0, size, size)
        txn.pin(layer.id, "test")
        txn.put_map(layer.id, [], mapped=size // PAGE)
        return layer.id

    layer = rig.store.write(begin)
    with BlockWriter(rig.store, layer) as writer:
        writer.add(first, data)
    return layer, writer.stored


def show(rig: Rig, layer: int, size: int = SIZE) -> bytes:
    with rig.store.reader() as txn:
        return read_layer(txn, layer, size)


def keys(rig: Rig, table: schema.Table) -> int:
    """Records of a table; of objects, those in cells as well."""
    with rig.store.reader() as txn:
        return len(object_keys(txn)) if table is schema.OBJECT else sum(1 for _ in txn.scan_keys(table))


def empty(rig: Rig) -> None:
    for table in (schema.CONTAINER, schema.USE, schema.USER, schema.BLOCK, schema.OBJECT, schema.PAGES, schema.NAME):
        assert keys(rig, table) == 0, table.name


def test_what_is_loaded_is_read_and_goes(rig: Rig) -> None:
    data = mixed(40)
    layer, stored = load(rig, data)
    assert stored.packed + stored.raw == 40 * BLOCK_PAGES and stored.packed > 36 * BLOCK_PAGES
    assert keys(rig, schema.CONTAINER) < 40 * 16 / 31
    assert show(rig, layer) == data.ljust(SIZE, b"\0")
    assert rig.findings() == []
    rig.store.write(lambda txn: txn.unpin(layer, "test"))
    assert rig.findings() == []
    empty(rig)


def test_the_same_again_costs_records_only(rig: Rig) -> None:
    data = mixed(40)
    first, _ = load(rig, data)
    before = keys(rig, schema.CONTAINER), keys(rig, schema.BLOCK)
    again, stored = load(rig, data)
    assert (stored.found, stored.packed) == (before[1] * BLOCK_PAGES, 0)
    elsewhere, stored = load(rig, data, first=3 * BLOCK_PAGES)
    assert (stored.found, stored.packed) == (before[1] * BLOCK_PAGES, 0)
    assert (keys(rig, schema.CONTAINER), keys(rig, schema.BLOCK)) == before
    assert show(rig, again) == show(rig, first)
    assert show(rig, elsewhere) == (bytes(3 * BLOCK_PAGES * PAGE) + data).ljust(SIZE, b"\0")
    assert rig.findings() == []
    for layer in (first, again, elsewhere):
        rig.store.write(lambda txn, layer=layer: txn.unpin(layer, "test"))
        assert rig.findings() == []
    empty(rig)


def test_a_block_that_is_there_many_times_is_stored_once(rig: Rig) -> None:
    layer, stored = load(rig, text(1) * 5 + text(2) * 20 + noise(3) * 20)
    assert stored.packed <= 3 * BLOCK_PAGES and stored.found + stored.packed + stored.raw == 45 * BLOCK_PAGES
    assert rig.findings() == []
    assert show(rig, layer)[: 45 * BLOCK_PAGES * PAGE] == text(1) * 5 + text(2) * 20 + noise(3) * 20


def test_sparse_blocks_and_ends_stay_pages(rig: Rig) -> None:
    data = bytearray(40 * BLOCK_PAGES * PAGE + 100)
    for block in range(40):
        data[block * BLOCK_PAGES * PAGE : block * BLOCK_PAGES * PAGE + PAGE] = page_bytes(block)
    data[-100:] = b"x" * 100
    layer, stored = load(rig, bytes(data))
    assert (stored.packed, stored.found, stored.raw) == (0, 0, 41)
    assert show(rig, layer) == bytes(data).ljust(SIZE, b"\0")
    assert keys(rig, schema.CONTAINER) == 0 and rig.findings() == []


def test_only_what_a_layer_waits_for_is_stored(rig: Rig) -> None:
    layer, _ = load(rig, text(1, 5))
    rig.store.write(lambda txn: txn.put_map(layer, [(6, 2, schema.REMOTE), (9, 1, schema.ZERO)]))
    block = Laid(0, containers.prepare(FULL, text(7)))
    rig.store.write(lambda txn: txn.put_blocks(layer, [block]))
    once = show(rig, layer)
    assert once[: BLOCK_PAGES * PAGE] == text(1, 5) + text(7)[5 * PAGE : 9 * PAGE] + bytes(PAGE) + text(7)[10 * PAGE :]
    assert rig.findings() == []
    rig.store.write(lambda txn: txn.put_blocks(layer, [block]))
    assert show(rig, layer) == once and rig.findings() == []


def test_a_head_above_a_packed_layer(rig: Rig) -> None:
    data = mixed(64)
    layer, _ = load(rig, data)
    vm = rig.store.write(lambda txn: txn.clone(layer, "vm")).uuid
    rig.put(vm, [1, 17, 600], seed=4)
    rig.zero(vm, 32, 50)
    rig.commit()
    rig.store.write(lambda txn: txn.resize(vm, 40 * PAGE + 100))
    expected = bytearray(data[: 40 * PAGE])
    for page in (1, 17):
        expected[page * PAGE : (page + 1) * PAGE] = page_bytes(page, 4)
    expected[32 * PAGE :] = bytes(8 * PAGE)
    assert rig.read("vm") == bytes(expected) + bytes(100)
    assert rig.findings() == []


def test_leaves_of_packed_pages_are_short(rig: Rig) -> None:
    """Sixteen blocks in a row, packed in order, are one run."""
    layer, _ = load(rig, b"".join(text(at) for at in range(32)))
    with rig.store.reader() as txn:
        own = txn.own_leaf(layer, 0)
        assert own is not None and (schema.kinds(own) == schema.PACKED).all()
        assert len(leaves.encode(own)) < 50
        assert (leaves.decode(memoryview(leaves.encode(own))) == own).all()


def test_a_block_that_cannot_be_read_is_stored_anew(rig: Rig) -> None:
    data = mixed(30)
    first, _ = load(rig, data)

    def spoil(txn: WriteTxn) -> None:
        for key in list(txn.scan_keys(schema.CONTAINER)):
            value = bytearray(txn.container(schema.KEY.unpack(key)[0]))
            value[schema.HEADER_BYTES :] = bytes(containers.ROOM)
            txn._put(schema.CONTAINER, key, bytes(value))

    rig.store.write(spoil)
    again, stored = load(rig, data)
    assert stored.found == 0
    rig.reopen()  # what was unpacked before is forgotten
    assert show(rig, again)[: len(data)] == data
    with pytest.raises(Damaged):
        show(rig, first)


def test_a_container_with_many_users_gets_no_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silofs.layers.use_records.CONTAINER_LEAVES_MAX", 2)
    data = b"".join(text(at) for at in range(8))
    stored = [load(rig, data)[1].packed for _ in range(5)]
    assert stored == [128, 0, 128, 0, 128]
    assert rig.findings() == []


def test_dropping_a_layer_step_by_step(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silofs.layers.volumes.DROP_LEAVES", 1)
    layer, _ = load(rig, mixed(100))
    rig.store.write(lambda txn: txn.unpin(layer, "test"))
    while rig.store.write(lambda txn: txn.reap(1)):
        assert rig.findings() == []
    empty(rig)


# What check must see


def put_use(txn: WriteTxn, change: Callable[[np.ndarray], int]) -> None:  # type: ignore[type-arg]
    for key, value in list(txn.scan(schema.USE)):
        use = read_use(key, value)
        use.leaves += change(use.counts)
        txn._put(schema.USE, key, schema.seal_record(schema.USE, key, use.payload()))
        return


def more_counted(txn: WriteTxn) -> None:
    def change(counts: np.ndarray) -> int:  # type: ignore[type-arg]
        counts[0] += 1
        return 0

    put_use(txn, change)


def more_leaves(txn: WriteTxn) -> None:
    put_use(txn, lambda counts: 1)


def user_lost(txn: WriteTxn) -> None:
    txn._delete(schema.USER, next(txn.scan_keys(schema.USER)))


def user_of_another_leaf(txn: WriteTxn) -> None:
    key = next(txn.scan_keys(schema.USER))
    container, layer, leaf = USER.unpack(key)
    other = USER.pack(container, layer, leaf + 9)
    txn._delete(schema.USER, key)
    txn._put(schema.USER, other, schema.seal_record(schema.USER, other, USER_COUNT.pack(16)))


def use_lost(txn: WriteTxn) -> None:
    txn._delete(schema.USE, next(txn.scan_keys(schema.USE)))


def container_lost(txn: WriteTxn) -> None:
    txn._delete(schema.CONTAINER, next(txn.scan_keys(schema.CONTAINER)))


def container_unused(txn: WriteTxn) -> None:
    pieces = containers.place([containers.prepare(FULL, text(99))])[0]
    del txn._uses[txn.store_container(pieces)]


def index_of_another(txn: WriteTxn) -> None:
    first, second, *_ = list(txn.scan_keys(schema.BLOCK))
    value = txn.fetch(schema.BLOCK, second)
    assert value is not None
    txn.index_block(first, containers.read_places(second, bytes(value)))


def entry_of_another_slot(txn: WriteTxn) -> None:
    """A leaf entry changed without its records."""
    layer = next(layer for layer in txn.layers() if layer.leaves)
    own = txn.own_leaf(layer.id, 0)
    assert own is not None
    row = own.copy()
    row[0] = row[1]
    txn.put_leaves(layer.id, [0], row.reshape(1, -1), [True])


@pytest.mark.parametrize(
    "spoil",
    [
        more_counted, more_leaves, user_lost, user_of_another_leaf, use_lost, container_lost, container_unused,
        index_of_another, entry_of_another_slot,
    ],
)  # fmt: skip
def test_check_sees(rig: Rig, spoil: Callable[[WriteTxn], None]) -> None:
    load(rig, b"".join(text(at) for at in range(32)))
    rig.store.write(spoil)
    assert "container" in {finding.code for finding in rig.findings(read_data=False)}


def test_check_reads_packed_pages(rig: Rig) -> None:
    layer, _ = load(rig, mixed(32))

    def spoil(txn: WriteTxn) -> None:
        key = next(txn.scan_keys(schema.CONTAINER))
        value = bytearray(txn.container(schema.KEY.unpack(key)[0]))
        value[schema.HEADER_BYTES + 100] ^= 1
        txn._put(schema.CONTAINER, key, bytes(value))

    rig.store.write(spoil)
    assert rig.findings(read_data=False) == []
    (finding,) = rig.findings()
    assert (finding.code, finding.layer, finding.page) == ("container", layer, 0)


def test_a_record_that_is_damaged_keeps_what_it_is_about(rig: Rig) -> None:
    """Better a leak than a page that another leaf still needs."""
    data = mixed(30)
    first, _ = load(rig, data)
    second, _ = load(rig, data)
    rig.store.write(lambda txn: [txn._put(schema.USE, key, b"x" * 520) for key in list(txn.scan_keys(schema.USE))])
    rig.store.write(lambda txn: txn.unpin(first, "test"))
    assert show(rig, second)[: len(data)] == data
