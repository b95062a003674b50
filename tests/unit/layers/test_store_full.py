"""A file system that is really full: an error that says so, nothing half done, and a way out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.blocks import PAGE
from silofs.errors import StoreFull
from silofs.limits import GIB, HELD_LEAVES_BYTES, MIB
from tests.smallfs import free, small
from tests.storerig import Rig, page_bytes


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with small("tmpfs", 12, tmp_path) as point:
        yield point


def test_a_full_file_system(place: Path) -> None:
    rig = Rig(place / "store")
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    other = rig.store.write(lambda txn: txn.create_volume("other", GIB)).uuid
    rig.put(other, range(100))
    assert not rig.store.held.top_up(1) and not rig.store.held.claim(1)
    with pytest.raises(StoreFull):
        rig.store.submit(lambda txn: None, nbytes=PAGE).result()
    committed = 0
    with pytest.raises(StoreFull):
        for start in range(0, 10_000, 100):
            rig.put(vm, range(start, start + 100))
            committed = start + 100
    assert committed
    assert not rig.store.broken
    assert rig.read("vm")[: committed * PAGE] == b"".join(page_bytes(page) for page in range(committed))
    assert rig.findings() == []
    full = rig.store.room()
    rig.store.write(lambda txn: txn.delete_volume(vm))
    rig.store.write(lambda txn: txn.set_attr(other, uid=1))
    with rig.store.reader() as txn:
        assert txn.room() == rig.store.room() > full, "what was deleted can be written again, and df says so"
    rig.put(other, range(committed // 2), seed=1)
    assert rig.findings() == []
    rig.reopen()
    assert rig.read("other")[:PAGE] == page_bytes(0, 1)
    rig.close()


def test_not_all_of_a_disk_is_held_and_what_nobody_counts_on_can_be_spared(tmp_path: Path) -> None:
    """For sockets and logs; and XFS takes blocks even to give some back."""
    with small("tmpfs", 64, tmp_path) as place:
        rig = Rig(place / "store")
        held = rig.store.held
        assert not held.top_up(64 * MIB)
        left = free(place)
        assert HELD_LEAVES_BYTES <= left < HELD_LEAVES_BYTES + 2 * MIB
        assert held.claim(MIB)
        assert not rig.store.write(lambda txn: held.spare()) and free(place) == left, "somebody counts on it"
        held.let_go(MIB)
        assert rig.store.write(lambda txn: held.spare()) and free(place) > left + 16 * MIB
        assert not held.claim(MIB)
        vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
        rig.put(vm, range(100))
        assert held.top_up(MIB) and held.claim(MIB)
        held.let_go(MIB)
        assert rig.findings() == []
        rig.close()
