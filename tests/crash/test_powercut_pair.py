"""The power of both hosts goes at one moment of a migration: never two owners, and the owner has what was synced."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from time import monotonic_ns

import pytest

from silofs import offline
from silofs.errors import SiloError
from silofs.layers.catalog import Role
from silofs.layers.check import check
from silofs.layers.reader import ReadTxn
from tests.crash.powercut import Disk, Replay
from tests.crash.telling import scratch
from tests.harness import Mount, until
from tests.storerig import read_layer

pytestmark = [pytest.mark.fuse, pytest.mark.crash]

MIB = 1 << 20
LEGAL = {
    (Role.OWNER, None),
    (Role.OWNER, Role.INCOMING),
    (Role.CEDED, Role.INCOMING),
    (Role.CEDED, Role.OWNER),
    (Role.RETIRED, Role.OWNER),
}
"""Roles of the volume at its old and its new home (docs/protocol.md)."""


def look(txn: ReadTxn) -> tuple[Role | None, bytes | None]:
    """The role of vm1, and what it holds, None where pages are still at the peer."""
    for volume in txn.volumes():
        ownership = txn.ownership(volume.uuid)
        assert ownership is not None
        try:
            return ownership.role, read_layer(txn, volume.head, volume.size)
        except SiloError:
            return ownership.role, None
    return next((each.role for each in txn.ownerships()), None), None


def test_never_two_owners(cuts: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(36)
    data = rng.randbytes(6 * MIB)
    seen: set[tuple[Role | None, Role | None]] = set()
    with scratch() as one, scratch() as two:
        with (
            Disk(one) as disk_a,
            Disk(two) as disk_b,
            Mount(disk_a.path, listen=True) as a,
            Mount(disk_b.path, listen=True) as b,
        ):
            there = a.pair(b)
            a.silofs("create", "vm1", "--size", "6M")
            with a.image("vm1").open("r+b", buffering=0) as image:
                os.pwrite(image.fileno(), data, 0)
                os.fsync(image.fileno())
            begun = monotonic_ns()
            identity = a.silofs_json("migrate", "vm1", "--to", there, "--switchover", "now", "--detach")["migration"]
            until(lambda: a.silofs_json("migration", "show", identity)["phase"] == "complete", "it is complete")
        sides = Replay(one), Replay(two)
        moments = [[entry.moment_ns for entry in side.entries] for side in sides]
        possible = [each for side in moments for each in side if each > begun]
        chosen = sorted(rng.sample(possible, min(len(possible), cuts // 8)))
        for moment in chosen:
            roles, contents = [], []
            for side, its in zip(sides, moments, strict=True):
                with (
                    side.cut(bisect_right(its, moment), rng) as place,
                    offline.open_store(place / "store") as store,
                    store.reader() as txn,
                ):
                    assert not check(txn, read_data=True)
                    role, content = look(txn)
                roles.append(role)
                contents.append(content)
            pair = roles[0], roles[1]
            assert pair in LEGAL
            seen.add(pair)
            owner = roles.index(Role.OWNER) if Role.OWNER in roles else 0
            assert contents[owner] == data or (owner == 1 and contents[1] is None and contents[0] == data)
    with capsys.disabled():
        print(f"\nboth cut at {len(chosen)} moments: {len(seen)} pairs of roles, all legal")
    assert len(seen) >= 3
