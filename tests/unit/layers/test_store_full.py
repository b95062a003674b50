"""A file system that is really full: an error that says so, nothing half done, and a way out."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.blocks import PAGE
from silofs.errors import StoreFull
from silofs.layers import writer
from silofs.limits import CELL_OBJECTS_MIN, GIB, HELD_LEAVES_BYTES, MIB
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


def test_blocks_of_free_cells_come_back_where_that_takes_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full XFS: what is held and not claimed is let go for it, and held again."""
    rig = Rig(tmp_path / "store")
    held, cells = rig.store.held, rig.store._environment.cells
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    pages = range(31 * CELL_OBJECTS_MIN)
    rig.put(vm, pages)
    assert held.top_up(0)
    refused, punched, punch = [], [], cells.punch

    def full(first: int, count: int) -> None:
        if not refused:
            refused.append(first)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        punched.append(first)
        punch(first, count)

    monkeypatch.setattr(cells, "punch", full)
    monkeypatch.setattr(writer, "CELLS_KEPT", 0)
    rig.put(vm, pages, seed=1)
    for number in range(3):
        rig.put(vm, [number], seed=2)
    assert refused and punched[0] == refused[0] and not rig.store._writer._told
    assert held.claim(MIB), "it is held again"
    held.let_go(MIB)
    assert rig.read("vm")[3 * PAGE : 4 * PAGE] == page_bytes(3, 1) and rig.findings() == []
    rig.close()
