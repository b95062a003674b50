from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silofs import limits
from silofs.errors import BadName
from silofs.layers.catalog import Snapshot, Volume
from silofs.mount.tree import ROOT, SNAPSHOTS, Tree, is_directory, new_volume_name, snapshot_name, volume_name


def volume(name: str, inode: int) -> Volume:
    return Volume(inode.to_bytes(16, "big"), name, inode, 1 << 20, inode, 0, 0, 0, 0, 0o600)


def snapshot(of: Volume, name: str, inode: int) -> Snapshot:
    return Snapshot(of.uuid, name, inode, of.size, 0, inode, 0)


def test_lookup_by_name_and_by_inode() -> None:
    vm1, vm2 = volume("vm1", 2), volume("vm2", 3)
    daily = snapshot(vm1, "daily", 4)
    tree = Tree([vm1, vm2], [daily])
    assert tree.child(ROOT, b"vm1.img") is vm1
    assert tree.child(ROOT, b"vm1") is None
    assert tree.child(ROOT, b"vm1@daily.img") is None
    assert tree.child(SNAPSHOTS, b"vm1@daily.img") is daily
    assert tree.child(SNAPSHOTS, b"vm1.img") is None
    assert tree.child(2, b"vm1.img") is None
    assert tree.get(3) is vm2 and tree.get(4) is daily and tree.get(ROOT) is None
    assert is_directory(ROOT) and is_directory(SNAPSHOTS) and not is_directory(2)


def test_a_listing_goes_on_where_it_stopped_although_names_came_and_went() -> None:
    volumes = [volume(f"v{number}", number) for number in range(2, 12)]
    first = Tree(volumes).list(ROOT, 0)[:4]
    changed = Tree([v for v in volumes if v.inode not in (3, 6)] + [volume("new", 12)])
    rest = changed.list(ROOT, first[-1][1].inode)
    assert [entry.inode for _, entry in first] == [2, 3, 4, 5]
    assert [entry.inode for _, entry in rest] == [7, 8, 9, 10, 11, 12]


def test_a_snapshot_whose_volume_is_gone_is_not_shown() -> None:
    assert not Tree([], [snapshot(volume("vm1", 2), "daily", 3)]).list(SNAPSHOTS, 0)


@pytest.mark.parametrize(
    "name",
    [
        b"vm1",
        b"vm1.img.img",
        b".img",
        b"-rf.img",
        b"a/b.img",
        b"\xff.img",
        b"a\0.img",
        b"x" * 129 + b".img",
        b"",
        b"v@s.img",
    ],
)
def test_only_names_of_volumes_can_be_made(name: bytes) -> None:
    assert volume_name(name) is None
    with pytest.raises(BadName):
        new_volume_name(ROOT, name)


def test_volumes_are_made_in_the_root_only() -> None:
    assert new_volume_name(ROOT, b"vm-1.2_x.img") == "vm-1.2_x"
    with pytest.raises(BadName):
        new_volume_name(SNAPSHOTS, b"vm1.img")


@given(st.binary(max_size=200))
def test_whatever_is_accepted_is_a_name(name: bytes) -> None:
    stem = volume_name(name)
    if stem is not None:
        assert limits.NAME.fullmatch(stem)
        assert stem.encode() + b".img" == name


def test_names_of_snapshots() -> None:
    assert snapshot_name(b"vm1@daily.img") == ("vm1", "daily")
    for name in (b"vm1.img", b"@daily.img", b"vm1@.img", b"vm1@daily", b"a@b@c.img", b"vm1.img@daily.img"):
        assert snapshot_name(name) is None
