"""Background packing of snapshots, and of what is left of containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs import failpoints
from silofs.blocks import LEAF_PAGES, PAGE
from silofs.layers import schema
from silofs.layers.aged import Pack
from silofs.layers.clean import Clean
from silofs.layers.policies import drain
from silofs.layers.repack import Repack
from silofs.layers.share import share
from tests.storerig import Rig, page_bytes, read_layer
from tests.unit.layers.test_store_packs import SIZE, keys, load, mixed, noise, show, text

PAGES = 4 * LEAF_PAGES


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "store")
    yield rig
    failpoints.rearm("")
    rig.close()


def packing() -> Pack:
    return Pack(age_s=0, look_s=0)


def put(rig: Rig, uuid: bytes, first: int, data: bytes) -> None:
    for at in range(0, len(data), 1 << 20):
        rig.write(uuid, first * PAGE + at, data[at : at + (1 << 20)])
        rig.commit()


def test_a_snapshot_is_packed_and_reads_the_same(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    put(rig, vm, 16, mixed(60))
    rig.store.write(lambda txn: txn.take_snapshot(vm, "old"))
    put(rig, vm, 100, noise(7, 40))
    content = rig.read("vm")
    objects = keys(rig, schema.OBJECT)
    assert drain(rig.store, [packing()]) > 1
    assert rig.read("vm") == content and rig.findings() == []
    # Two of three blocks pack well; the others stay as they are, and are put together.
    drain(rig.store, [Clean(rig.store.usage, at=1.0, slack=0)])
    assert rig.read("vm") == content and rig.findings() == []
    assert keys(rig, schema.OBJECT) < objects * 0.6 and 0 < keys(rig, schema.CONTAINER) <= 4
    for layer in rig.store.write(lambda txn: txn.layers()):
        assert layer.packed == (4 if layer.sealed else 0)
    before = keys(rig, schema.CONTAINER)
    drain(rig.store, [packing()])
    assert keys(rig, schema.CONTAINER) == before


def test_a_snapshot_of_what_was_imported_costs_nothing(rig: Rig) -> None:
    """The same blocks written by a guest and imported are one."""
    data = mixed(40)
    load(rig, data)
    containers = keys(rig, schema.CONTAINER)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    put(rig, vm, 0, data)
    rig.store.write(lambda txn: txn.take_snapshot(vm, "old"))
    drain(rig.store, [packing()])
    assert keys(rig, schema.CONTAINER) == containers and keys(rig, schema.OBJECT) <= 1
    assert rig.read("vm")[: len(data)] == data and rig.findings() == []


def test_young_ones_and_heads_are_left_alone(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    put(rig, vm, 0, text(1) * 20)
    assert drain(rig.store, [packing()]) == 1
    rig.store.write(lambda txn: txn.take_snapshot(vm, "new"))
    assert drain(rig.store, [Pack(look_s=0)]) == 1
    assert keys(rig, schema.CONTAINER) == 0


def test_a_crash_between_steps_goes_on_where_it_was(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    put(rig, vm, 0, mixed(120))
    layer = rig.store.write(lambda txn: txn.take_snapshot(vm, "old").layer)
    content = rig.read("vm")
    failpoints.rearm("rewrite.before_commit:raise@2")
    with pytest.raises(failpoints.FailpointReached):
        drain(rig.store, [packing()])
    failpoints.rearm("")
    rig.reopen()
    with rig.store.reader() as txn:
        assert 0 < txn.layer(layer).packed < 4
    assert rig.read("vm") == content and rig.findings() == []
    drain(rig.store, [packing()])
    assert rig.read("vm") == content and rig.findings() == []


def test_containers_that_few_refer_to_are_put_together(rig: Rig) -> None:
    data = mixed(100)
    layer, _ = load(rig, data)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    other = rig.store.write(lambda txn: txn.create_volume("other", SIZE)).uuid
    for page in range(0, 1600, 80):
        rig.store.write(lambda txn, page=page: share(txn, layer, page, vm, page, 16))
        rig.store.write(lambda txn, page=page: share(txn, layer, page + 1, other, page, 3))
    rig.store.write(lambda txn: txn.unpin(layer, "test"))
    before, contents = keys(rig, schema.CONTAINER), {name: rig.read(name) for name in ("vm", "other")}
    policy = Repack(look_s=0)
    while rig.store.step(policy).result().more:
        assert rig.findings(read_data=False) == []
    assert keys(rig, schema.CONTAINER) < before * 0.7 and policy.freed > 0
    assert {name: rig.read(name) for name in contents} == contents
    assert rig.findings() == []
    # What moved is still found, and goes as it came.
    again, stored = load(rig, contents["vm"])
    assert stored.found >= 256 and show(rig, again) == contents["vm"]
    for uuid in (vm, other):
        rig.store.write(lambda txn, uuid=uuid: txn.delete_volume(uuid))
    rig.store.write(lambda txn: txn.unpin(again, "test"))
    assert rig.findings() == []
    for table in (schema.CONTAINER, schema.USE, schema.USER, schema.BLOCK, schema.OBJECT):
        assert keys(rig, table) == 0, table.name


def test_single_pages_of_many_blocks(rig: Rig) -> None:
    """Of each block one page is left: what had a container for 16 blocks fits into few."""
    data = b"".join(text(at) for at in range(96))
    layer, _ = load(rig, data)
    rig.store.write(lambda txn: txn.clone(layer, "vm"))
    vm = rig.store.write(lambda txn: txn.volume_by_name("vm").uuid)
    single = rig.store.write(lambda txn: txn.create_volume("single", SIZE)).uuid
    for page in range(0, 96 * 16, 16):
        rig.store.write(lambda txn, page=page: share(txn, layer, page, single, page, 1))
    content = rig.read("single")
    rig.store.write(lambda txn: txn.delete_volume(vm))
    rig.store.write(lambda txn: txn.unpin(layer, "test"))
    assert keys(rig, schema.CONTAINER) == 6
    rig.store.step(Repack(look_s=0)).result()
    assert keys(rig, schema.CONTAINER) <= 6 and rig.findings() == []
    assert rig.read("single") == content


def test_a_container_that_cannot_be_read_stays(rig: Rig) -> None:
    data = mixed(60)
    layer, _ = load(rig, data)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    for page in range(0, 960, 64):
        rig.store.write(lambda txn, page=page: share(txn, layer, page, vm, page, 16))
    rig.store.write(lambda txn: txn.unpin(layer, "test"))

    def spoil(txn):  # type: ignore[no-untyped-def]
        key = next(txn.scan_keys(schema.CONTAINER))
        value = bytearray(txn.container(schema.KEY.unpack(key)[0]))
        value[10] ^= 1
        txn._put(schema.CONTAINER, key, bytes(value))
        return key

    key = rig.store.write(spoil)
    drain(rig.store, [Repack(look_s=3600)])
    with rig.store.reader() as txn:
        assert txn.fetch(schema.CONTAINER, key) is not None
    assert {finding.code for finding in rig.findings()} == {"container"}


def test_pages_of_a_snapshot_that_a_head_overwrites(rig: Rig) -> None:
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    put(rig, vm, 0, b"".join(text(at) for at in range(20)))
    snapshot = rig.store.write(lambda txn: txn.take_snapshot(vm, "old"))
    rig.put(vm, range(0, 320, 3), seed=9)
    drain(rig.store, [packing()])
    content = rig.read("vm")
    for page in range(0, 320, 3):
        assert content[page * PAGE : (page + 1) * PAGE] == page_bytes(page, 9)
    with rig.store.reader() as txn:
        assert read_layer(txn, snapshot.layer, SIZE)[: 320 * PAGE] == b"".join(text(at) for at in range(20))
    assert rig.findings() == []
