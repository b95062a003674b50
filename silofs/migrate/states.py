"""What is durable about who owns a volume, and how it may change (docs/protocol.md, "Records").

`Ownership` is one volume's record, kept for ever; `MigrationRecord` is what a machine needs after a crash. Both are
values: the functions here return the changed record and assert the invariants I3 and I5 on the way, so that no caller
can build an illegal one. The shell stores them (all records of a group in one transaction) and hands them back.
"""

from __future__ import annotations

import enum

import msgspec
from msgspec.structs import replace

from silofs.migrate.messages import Base, Offered, Segment, SnapshotInfo, VolumeEpoch


class Role(enum.StrEnum):
    """Role of this node for one volume. Only an OWNER admits writes."""

    NONE = "none"
    OWNER = "owner"
    INCOMING = "incoming"
    CEDED = "ceded"
    RETIRED = "retired"
    FENCED = "fenced"


class Ownership(msgspec.Struct, frozen=True, array_like=True):
    """Ownership record of one volume. `epoch` changes with GRANT, CEDED and force only, and never falls."""

    uuid: bytes
    role: Role
    epoch: int
    offered_epoch: int = 0  # of the OFFER that made it INCOMING
    peer: bytes = b""  # store id of the node that the role refers to
    migration: bytes = b""  # the migration in which it takes part; b"": none
    last_lsn: int = 0  # CEDED: log records at or below are applied, later ones void
    generation: int = 0  # raised by a force only
    lineage: bytes = b""


class Side(enum.StrEnum):
    SOURCE = "source"
    TARGET = "target"


class Phase(enum.StrEnum):
    """Phase of a migration as the operator sees it (CLI), and as its record stores it."""

    OFFERED = "offered"
    PRECOPY = "precopy"
    FROZEN = "frozen"  # never stored: a restart finds PRECOPY
    CEDED = "ceded"
    PULLING = "pulling"
    COMPLETE = "complete"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Mode(enum.StrEnum):
    """How much is copied before the switch-over."""

    AUTO = "auto"  # rounds until the rest fits the pause budget or stops shrinking
    PRECOPY = "precopy"  # rounds until it fits, else give up
    POSTCOPY = "postcopy"  # maps only


class Switchover(enum.StrEnum):
    AUTO = "auto"  # like NOW; refused while something has a volume open for writing
    NOW = "now"  # as soon as the rounds have converged
    MANUAL = "manual"  # at `migration switchover`


class Options(msgspec.Struct, frozen=True, array_like=True):
    mode: Mode = Mode.AUTO
    switchover: Switchover = Switchover.AUTO
    fence_writer: bool = False
    snapshots: bool = True


class MigrationRecord(msgspec.Struct, frozen=True, array_like=True):
    """One migration at one of its two ends. `volumes` carry the epochs that it grants."""

    id: bytes
    side: Side
    peer: bytes
    phase: Phase
    volumes: tuple[VolumeEpoch, ...]
    options: Options
    offered: tuple[Offered, ...]
    returning: bool = False
    origin: bytes = b""  # RETURN: the migration that brought the volumes
    bases: tuple[Base, ...] = ()
    segments: tuple[Segment, ...] = ()  # parents before children
    map_next: tuple[int, ...] = ()  # target: per segment the next page of its map to ask for; MAP_COMPLETE: all here
    heads: tuple[Base, ...] = ()  # per volume its final layer, once sealed
    snapshots: tuple[SnapshotInfo, ...] = ()
    round: int = 0
    acked: bool = False  # source: the target said that it owns
    lost: int = 0  # pages given up as unreadable at the source


MAP_COMPLETE = -1


def _changed(old: Ownership, new: Ownership) -> Ownership:
    assert new.uuid == old.uuid
    assert new.epoch >= old.epoch, "I3: an epoch never falls"
    if new.role is Role.OWNER and old.role is not Role.OWNER:
        assert new.epoch > old.epoch, "I5: ownership comes with a higher epoch only"
    return new


def joined(record: Ownership, migration: bytes, peer: bytes) -> Ownership:
    """An owner takes part in a migration (one at a time)."""
    assert record.role is Role.OWNER and record.migration in (b"", migration)
    return _changed(record, replace(record, migration=migration, peer=peer))


def left(record: Ownership, migration: bytes) -> Ownership:
    """The owner's migration ended without a cession."""
    assert record.role is Role.OWNER and record.migration in (b"", migration)
    return _changed(record, replace(record, migration=b"", peer=b""))


def incoming(record: Ownership, migration: bytes, peer: bytes, epoch: int) -> Ownership:
    """OFFER accepted. `epoch` is only noted: raised here, the GRANT at the same epoch would be refused for ever."""
    assert record.role in (Role.NONE, Role.RETIRED, Role.INCOMING) and record.epoch < epoch
    return _changed(record, replace(record, role=Role.INCOMING, offered_epoch=epoch, peer=peer, migration=migration))


def forgotten(record: Ownership) -> Ownership:
    """INCOMING ends without a GRANT. The tombstone keeps the epoch."""
    assert record.role is Role.INCOMING
    return _changed(record, replace(record, role=Role.NONE, offered_epoch=0, peer=b"", migration=b""))


def ceded(record: Ownership, expected: bytes, migration: bytes, peer: bytes, last_lsn: int) -> Ownership:
    """The commit point: the owner gives up, for exactly one peer, at exactly the next epoch.

    `expected` is the migration that its record names: `migration` itself, of a RETURN the one that it ends.
    """
    assert record.role is Role.OWNER and record.migration == expected
    return _changed(
        record,
        replace(record, role=Role.CEDED, epoch=record.epoch + 1, peer=peer, migration=migration, last_lsn=last_lsn),
    )


def may_accept(record: Ownership, peer: bytes, epoch: int, *, returning: bool) -> bool:
    """Whether a GRANT at `epoch` from `peer` makes this node the owner (docs/protocol.md, Records)."""
    if record.epoch >= epoch:
        return False
    if record.role in (Role.NONE, Role.RETIRED):
        return True
    if record.role is Role.INCOMING:
        return record.peer == peer  # the pinned peer only
    if record.role is Role.CEDED:
        return returning and record.peer == peer and epoch == record.epoch + 1
    return False


def owned(record: Ownership, migration: bytes, peer: bytes, epoch: int, *, returning: bool) -> Ownership:
    """GRANT accepted: this node is the owner at the granted epoch; `peer` is who holds what is still remote."""
    assert may_accept(record, peer, epoch, returning=returning), "I5: only an acceptable GRANT makes an owner"
    return _changed(
        record,
        replace(record, role=Role.OWNER, epoch=epoch, offered_epoch=0, peer=peer, migration=migration, last_lsn=0),
    )


def settled(record: Ownership, migration: bytes) -> Ownership:
    """The owner has every page and no migration any more. `peer` stays: the old home, whose readers it answers."""
    assert record.role is Role.OWNER and record.migration == migration
    return _changed(record, replace(record, migration=b""))


def retired(record: Ownership) -> Ownership:
    """COMPLETE arrived: the tombstone stays for ever."""
    assert record.role is Role.CEDED
    return _changed(record, replace(record, role=Role.RETIRED, migration=b""))
