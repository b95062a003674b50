"""The table of role changes in docs/protocol.md: these, and no others."""

from __future__ import annotations

import pytest

from silofs.migrate import states
from silofs.migrate.states import Ownership, Role

V, M, PEER, OTHER = b"v" * 16, b"m" * 16, b"p" * 16, b"o" * 16


def record(role: Role, epoch: int = 3, migration: bytes = M, peer: bytes = PEER) -> Ownership:
    return Ownership(V, role, epoch, peer=peer, migration=migration)


@pytest.mark.parametrize("role", Role)
def test_offer(role: Role) -> None:
    if role in (Role.NONE, Role.RETIRED, Role.INCOMING):
        new = states.incoming(record(role), M, PEER, 4)
        assert (new.role, new.epoch, new.offered_epoch) == (Role.INCOMING, 3, 4)
    else:
        with pytest.raises(AssertionError):
            states.incoming(record(role), M, PEER, 4)


@pytest.mark.parametrize("role", Role)
def test_cede_and_retire(role: Role) -> None:
    for change, wanted in ((lambda r: states.ceded(r, M, M, PEER, 9), Role.OWNER), (states.retired, Role.CEDED)):
        if role is wanted:
            assert change(record(role)).epoch == (4 if role is Role.OWNER else 3)
        else:
            with pytest.raises(AssertionError):
                change(record(role))
    if role is Role.OWNER:
        assert states.ceded(record(role), M, M, PEER, 9).last_lsn == 9
        with pytest.raises(AssertionError):
            states.ceded(record(role), OTHER, M, PEER, 9)


@pytest.mark.parametrize(
    ("role", "peer", "epoch", "returning", "accepted"),
    [
        (Role.NONE, PEER, 4, False, True),
        (Role.NONE, PEER, 9, False, True),  # the receiver's own epoch only has to be lower
        (Role.NONE, PEER, 3, False, False),
        (Role.RETIRED, OTHER, 4, False, True),
        (Role.INCOMING, PEER, 4, False, True),
        (Role.INCOMING, OTHER, 4, False, False),  # not the pinned peer
        (Role.CEDED, PEER, 4, False, False),
        (Role.CEDED, PEER, 4, True, True),
        (Role.CEDED, PEER, 5, True, False),  # RETURN: exactly one higher
        (Role.CEDED, OTHER, 4, True, False),
        (Role.OWNER, PEER, 4, False, False),
        (Role.FENCED, PEER, 4, False, False),
    ],
)
def test_grant(role: Role, peer: bytes, epoch: int, returning: bool, accepted: bool) -> None:
    assert states.may_accept(record(role), peer, epoch, returning=returning) is accepted
    if accepted:
        new = states.owned(record(role), M, peer, epoch, returning=returning)
        assert (new.role, new.epoch, new.peer) == (Role.OWNER, epoch, peer)
    else:
        with pytest.raises(AssertionError):
            states.owned(record(role), M, peer, epoch, returning=returning)


def test_a_tombstone_keeps_its_epoch() -> None:
    assert states.forgotten(record(Role.INCOMING)).epoch == 3
    assert states.retired(record(Role.CEDED)).epoch == 3
    with pytest.raises(AssertionError):
        states._changed(record(Role.INCOMING), record(Role.NONE, epoch=2))


def test_one_migration_at_a_time() -> None:
    with pytest.raises(AssertionError):
        states.joined(record(Role.OWNER, migration=OTHER), M, PEER)
    assert states.joined(record(Role.OWNER, migration=b""), M, PEER).migration == M
    assert states.left(record(Role.OWNER), M).migration == b""
    settled = states.settled(record(Role.OWNER), M)
    assert (settled.migration, settled.peer) == (b"", PEER), "its old home may go on asking for reads"
