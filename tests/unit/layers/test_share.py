"""Shared copies: what is read afterwards, what it costs, and that every reference is on record."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Damaged, Unsupported
from silofs.layers import schema
from silofs.layers.share import share
from tests.storerig import Rig, page_bytes, read_layer
from tests.unit.layers.test_store_packs import keys, load, mixed

PAGES = 4 * LEAF_PAGES


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "store")
    yield rig
    rig.close()


def volume(rig: Rig, name: str, pages: int = PAGES) -> bytes:
    return rig.store.write(lambda txn: txn.create_volume(name, pages * PAGE)).uuid


def copy(rig: Rig, source: bytes, first: int, target: bytes, to: int, count: int) -> int:
    return rig.store.write(lambda txn: share(txn, txn.volume(source).head, first, target, to, count))


def stored(rig: Rig) -> int:
    """Pages that values of every kind take."""
    return 32 * (keys(rig, schema.OBJECT) + keys(rig, schema.CONTAINER)) + keys(rig, schema.PAGES)


def test_a_copy_of_pages_on_their_own_moves_them(rig: Rig) -> None:
    a, b = volume(rig, "a"), volume(rig, "b")
    rig.put(a, range(620))
    before, content = stored(rig), rig.read("a")
    assert copy(rig, a, 0, b, 0, 620) == 620
    assert rig.read("b") == rig.read("a") == content
    assert stored(rig) <= before + 32
    assert rig.findings() == []
    c = volume(rig, "c")
    between = stored(rig)
    assert copy(rig, b, 0, c, 700, 620) == 620
    assert stored(rig) == between and rig.findings() == []
    rig.put(a, [5, 6], seed=3)
    assert rig.read("b") == content and rig.read("c")[700 * PAGE :][: 620 * PAGE] == content[: 620 * PAGE]
    for uuid in (a, b, c):
        rig.store.write(lambda txn, uuid=uuid: txn.delete_volume(uuid))
        assert rig.findings() == []
    for table in (schema.CONTAINER, schema.USE, schema.USER, schema.BLOCK, schema.OBJECT, schema.PAGES, schema.NAME):
        assert keys(rig, table) == 0, table.name


def test_holes_and_zeros_are_copied_as_such(rig: Rig) -> None:
    a, b = volume(rig, "a"), volume(rig, "b")
    rig.put(a, [0, 3, 600])
    rig.put(b, range(700), seed=1)
    rig.store.write(lambda txn: txn.take_snapshot(b, "s"))
    rig.zero(a, 3, 4)
    rig.commit()
    assert copy(rig, a, 0, b, 0, 700) == 700
    assert rig.read("b") == rig.read("a")
    with rig.store.reader() as txn:
        assert txn.volume(b).data_pages == 2
        snapshot = txn.find_snapshot(b, "s")
        assert read_layer(txn, snapshot.layer, snapshot.size)[: 700 * PAGE] == b"".join(
            page_bytes(page, 1) for page in range(700)
        )
    assert rig.findings() == []


@pytest.mark.parametrize(("first", "to"), [(0, 100), (100, 0), (0, 16), (3, 5)])
def test_within_one_volume(rig: Rig, first: int, to: int) -> None:
    a = volume(rig, "a")
    rig.put(a, range(400))
    content = bytearray(rig.read("a"))
    content[to * PAGE : (to + 300) * PAGE] = content[first * PAGE : (first + 300) * PAGE]
    assert copy(rig, a, first, a, to, 300) == 300
    assert rig.read("a") == content and rig.findings() == []


def test_pages_of_a_sealed_layer_below_others(rig: Rig) -> None:
    a = volume(rig, "a")
    rig.put(a, range(200))
    layer = rig.store.write(lambda txn: txn.take_snapshot(a, "s")).layer
    rig.put(a, range(50, 60), seed=1)
    rig.store.write(lambda txn: txn.clone(layer, "clone"))
    b = volume(rig, "b")
    contents = {name: rig.read(name) for name in ("a", "clone")}
    assert copy(rig, a, 0, b, 512, 200) == 200
    assert {name: rig.read(name) for name in contents} == contents
    assert rig.read("b")[512 * PAGE :][: 200 * PAGE] == contents["a"][: 200 * PAGE]
    assert rig.findings() == []
    rig.put(a, range(0, 200, 7), seed=2)
    assert rig.read("clone") == contents["clone"] and rig.findings() == []


def test_of_a_packed_image(rig: Rig) -> None:
    data = mixed(40)
    layer, _ = load(rig, data)
    b = volume(rig, "b")
    before = stored(rig)
    assert rig.store.write(lambda txn: share(txn, layer, 3, b, 10, 500)) == 500
    assert stored(rig) <= before + 10
    assert rig.read("b")[10 * PAGE : 510 * PAGE] == data[3 * PAGE : 503 * PAGE]
    assert rig.findings() == []


def test_few_pages_are_copied(rig: Rig) -> None:
    a, b = volume(rig, "a"), volume(rig, "b")
    rig.put(a, range(100))
    assert copy(rig, a, 7, b, 9, 2) == 2
    assert keys(rig, schema.CONTAINER) == 0 and rig.findings() == []
    assert rig.read("b")[9 * PAGE : 11 * PAGE] == page_bytes(7) + page_bytes(8)


def test_short_counts_and_refusals(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = volume(rig, "a", 300), volume(rig, "b", 10)
    rig.put(a, range(300))
    assert copy(rig, a, 200, b, 0, 500) == 100
    with rig.store.reader() as txn:
        assert txn.volume(b).size == 100 * PAGE
    assert copy(rig, a, 300, b, 0, 5) == copy(rig, a, 400, b, 0, 5) == 0
    monkeypatch.setattr("silofs.layers.share.SHARE_MOVED_PAGES", 64)
    assert copy(rig, a, 0, b, 0, 200) == 64
    monkeypatch.setattr("silofs.layers.share.SHARE_PAGES", 20)
    assert copy(rig, a, 0, b, 0, 200) == 20

    def receive(txn):  # type: ignore[no-untyped-def]
        layer = txn.receive_layer(random.randbytes(16), 0, 40 * PAGE, 40 * PAGE)
        txn.pin(layer.id, "test")
        txn.put_map(layer.id, [(5, 30, schema.REMOTE)], mapped=40)
        return layer.id

    layer = rig.store.write(receive)
    assert rig.store.write(lambda txn: share(txn, layer, 0, b, 0, 20)) == 5
    with pytest.raises(Unsupported):
        rig.store.write(lambda txn: share(txn, layer, 5, b, 0, 20))
    assert rig.findings() == []


def test_a_page_that_cannot_be_read_ends_the_copy(rig: Rig) -> None:
    a, b = volume(rig, "a"), volume(rig, "b")
    rig.put(a, range(31))

    def spoil(txn):  # type: ignore[no-untyped-def]
        key = next(txn.scan_keys(schema.OBJECT))
        value = bytearray(txn.object(schema.KEY.unpack(key)[0]))
        value[schema.HEADER_BYTES + 4 * PAGE] ^= 1
        txn._put(schema.OBJECT, key, bytes(value))

    rig.store.write(spoil)
    assert copy(rig, a, 0, b, 0, 31) == 4
    with pytest.raises(Damaged):
        copy(rig, a, 4, b, 4, 27)
    assert rig.findings(read_data=False) == []


def test_many_references_to_one_page(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that has its fill of references is copied."""
    monkeypatch.setattr("silofs.layers.use_records.CONTAINER_REFS_MAX", 4)
    layer, _ = load(rig, mixed(40))
    b = volume(rig, "b")
    for to in range(0, 120, 6):
        assert rig.store.write(lambda txn, to=to: share(txn, layer, 16, b, to, 6)) == 6
    assert rig.findings() == []
    content = rig.read("b")
    assert content[: 120 * PAGE] == content[: 6 * PAGE] * 20


def test_random_copies_against_arrays(rig: Rig) -> None:
    rng = random.Random(5)
    a, b = volume(rig, "a"), volume(rig, "b")
    rig.put(a, [page for page in range(1100) if page % 97 > 20])
    model = {"a": bytearray(rig.read("a")), "b": bytearray(rig.read("b"))}
    uuids = {"a": a, "b": b}
    for step in range(60):
        source, target = rng.choice("ab"), rng.choice("ab")
        first, to, count = rng.randrange(900), rng.randrange(900), rng.randrange(1, 200)
        done = copy(rig, uuids[source], first, uuids[target], to, count)
        assert done == count
        model[target][to * PAGE : (to + done) * PAGE] = bytes(model[source][first * PAGE : (first + done) * PAGE])
        if step % 5 == 0:
            pages = np.unique([rng.randrange(1100) for _ in range(10)]).tolist()
            rig.put(uuids[target], pages, seed=step)
            for page in pages:
                model[target][page * PAGE : (page + 1) * PAGE] = page_bytes(page, step)
            assert rig.findings(read_data=False) == []
        assert {name: rig.read(name) for name in model} == model
    assert rig.findings() == []
