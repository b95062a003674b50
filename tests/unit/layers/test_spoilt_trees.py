"""A spoilt page of LMDB's own trees: LMDB refuses the whole transaction then, silofs only what is below that page."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from silofs.blocks import LEAF_BYTES, LEAF_PAGES, PAGE
from silofs.layers import schema
from silofs.layers.scrub import scrub
from tests.storerig import Rig, page_bytes

LEAVES = 400  # their records fill several pages of a tree
HEADER = struct.Struct("<10xHH")  # of a page: its type, and where the offsets of its records end


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """Volume `vm` with a page in every leaf, the last of which are in a spoilt page of the tree, and `other`."""
    rig = Rig(tmp_path / "store")
    other = rig.store.write(lambda txn: txn.create_volume("other", LEAF_BYTES))
    vm = rig.store.write(lambda txn: txn.create_volume("vm", LEAVES * LEAF_BYTES))
    rig.put(vm.uuid, range(0, LEAVES * LEAF_PAGES, LEAF_PAGES))
    rig.put(other.uuid, [0])
    with rig.store.reader() as txn:
        record = txn.fetch(schema.LEAF, schema.leaf_key(vm.head, LEAVES - 1))
        assert record is not None
        last = bytes(record)
    rig.close()
    spoil(tmp_path / "store" / "data" / "data.mdb", last)
    return Rig(tmp_path / "store")


def spoil(file: Path, record: bytes) -> None:
    """Make LMDB find a page of an impossible type where it looks for the record."""
    data = bytearray(file.read_bytes())
    pages = [at for at in range(2 * PAGE, len(data), PAGE) if record in data[at : at + PAGE]]
    # Not those that were used again, for a small table, and have it in what is left over.
    crowded = [at for at in pages if HEADER.unpack_from(data, at)[1] > 100]
    assert crowded
    for at in crowded:
        HEADER.pack_into(data, at, 0, HEADER.unpack_from(data, at)[1])
    file.write_bytes(data)


def test_a_reader_goes_on(rig: Rig) -> None:
    with rig.store.reader() as txn:
        vm = txn.volume_by_name("vm")
        lost = txn.resolve(vm.head, LEAVES - 1)
        assert (schema.kinds(lost) == schema.LOST).all()
        sound = txn.resolve(vm.head, 0)
        assert bytes(txn.page(int(sound[0]))) == page_bytes(0)
        assert txn.volume_by_name("other").size == LEAF_BYTES


def test_a_write_there_does_not_hold_up_others(rig: Rig) -> None:
    with rig.store.reader() as txn:
        vm, other = txn.volume_by_name("vm"), txn.volume_by_name("other")
    rig.write(vm.uuid, (LEAVES - 1) * LEAF_BYTES + 10, b"part of a page")
    rig.write(other.uuid, PAGE, page_bytes(1, 7))
    result = rig.commit()
    assert set(result.failed) == {vm.uuid}
    assert not rig.store.broken
    assert rig.read("other")[PAGE : 2 * PAGE] == page_bytes(1, 7)
    rig.write(vm.uuid, 10, b"part of a sound page")
    assert not rig.commit().failed
    with rig.store.reader() as txn:
        sound = txn.resolve(txn.volume(vm.uuid).head, 0)
        assert bytes(txn.page(int(sound[0])))[10:30] == b"part of a sound page"


def test_removing_the_volume_does_not_end_all_writing(rig: Rig) -> None:
    with rig.store.reader() as txn:
        vm, other = txn.volume_by_name("vm"), txn.volume_by_name("other")
    rig.store.write(lambda txn: txn.delete_volume(vm.uuid))
    rig.reopen()
    rig.put(other.uuid, [2], seed=3)
    assert not rig.store.broken
    assert rig.read("other")[2 * PAGE : 3 * PAGE] == page_bytes(2, 3)


def test_a_check_that_lmdb_ends_is_a_finding_and_ends_nobody_else(rig: Rig) -> None:
    found = scrub(rig.path)
    died = [each.message for each in found.findings if "the check itself died (SIGABRT)" in each.message]
    assert len(died) == 1 and "Assertion" in died[0], "what LMDB said is in the finding, not on the terminal"
    assert rig.read("other")[:PAGE] == page_bytes(0)


def test_a_check_of_a_sound_store_counts_what_there_is(tmp_path: Path) -> None:
    sound = Rig(tmp_path / "sound")
    volume = sound.store.write(lambda txn: txn.create_volume("vm", LEAF_BYTES))
    sound.put(volume.uuid, [0, 1])
    steps: list[tuple[int, int]] = []
    found = scrub(sound.path, read_data=True, progress=lambda done, total: steps.append((done, total)))
    assert found == ([], 1, 1)
    assert steps[0][0] == 0 and {total for _, total in steps} == {13}
