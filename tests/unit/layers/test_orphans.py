"""A volume that was removed while it was open: it has no name, and everything else."""

from __future__ import annotations

import pytest

from silofs import verbs
from silofs.errors import Busy, NoSuchVolume
from silofs.facts import View
from silofs.layers.catalog import Role
from silofs.layers.check import check
from tests.storerig import Rig


def create(rig: Rig, name: str) -> bytes:
    return rig.store.write(lambda txn: txn.create_volume(name, 1 << 20)).uuid


@pytest.fixture
def orphan(rig: Rig) -> bytes:
    volume = create(rig, "vm1")
    rig.store.write(lambda txn: verbs.unlink(txn, txn.volume_by_name("vm1"), View(rig.store.path)))
    return volume


def test_an_orphan_has_no_name(rig: Rig, orphan: bytes) -> None:
    with rig.store.reader() as txn:
        assert not txn.volumes() and [volume.uuid for volume in txn.orphans()] == [orphan]
        assert txn.volume(orphan).orphan
        with pytest.raises(NoSuchVolume):
            txn.volume_by_name("vm1")
        assert not check(txn)
    second = create(rig, "vm1")
    with rig.store.reader() as txn:
        assert txn.volume_by_name("vm1").uuid == second
        assert not check(txn)


def test_an_orphan_goes_without_a_trace(rig: Rig, orphan: bytes) -> None:
    second = create(rig, "vm1")
    rig.store.write(lambda txn: verbs.bury(txn, orphan))
    rig.store.write(lambda txn: verbs.bury(txn, orphan))
    rig.store.write(lambda txn: verbs.bury(txn, second))  # it has a name
    with rig.store.reader() as txn:
        assert not txn.orphans() and [volume.uuid for volume in txn.volumes()] == [second]
        ownership = txn.ownership(orphan)
        assert ownership is not None and ownership.role is Role.NONE
        assert len(txn.layers()) == 1 and not check(txn)


def test_snapshots_keep_a_name(rig: Rig) -> None:
    volume = create(rig, "vm1")
    rig.store.write(lambda txn: txn.take_snapshot(volume, "one"))
    with pytest.raises(Busy, match="snapshots"):
        rig.store.write(lambda txn: verbs.unlink(txn, txn.volume_by_name("vm1"), View(rig.store.path)))
