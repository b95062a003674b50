"""What a store and its daemon know of volumes, as the fields that `info` and `ls` show (docs/cli.md).

Sizes are bytes, times RFC 3339 in UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from silofs import freezes, limits
from silofs.blocks import PAGE
from silofs.layers.catalog import Layer, Ownership, Role, Snapshot, Volume
from silofs.layers.reader import ReadTxn
from silofs.times import rfc3339

Fields = dict[str, Any]

ROLES: Final = {
    Role.NONE: "tombstone",  # it has left, and a way back was cancelled
    Role.OWNER: "owner",
    Role.INCOMING: "incoming",
    Role.CEDED: "released",
    Role.RETIRED: "tombstone",
    Role.FENCED: "fenced",
}

Shown = tuple[Volume, int, int]  # record, size in bytes, data pages: what is buffered included


def _as_stored(volume: Volume) -> Shown:
    return volume, volume.size, volume.data_pages


@dataclass(frozen=True)
class View:
    """What a verb shows that is not in the store."""

    store: Path
    mountpoint: str | None = None
    opens: Mapping[bytes, int] = field(default_factory=dict)  # open handles by volume, without those of snapshots
    peer: Callable[[str], str] = str  # the name of a peer, by what ownership records call it
    shown: Callable[[Volume], Shown] = _as_stored
    dead_pages: int | None = None  # in objects that still hold live ones; None while nobody knows
    snapshot_opens: Mapping[bytes, int] = field(default_factory=dict)  # the same of their snapshots, all together

    def path(self, name: str) -> str | None:
        return None if self.mountpoint is None else f"{self.mountpoint}/{name}{limits.IMAGE_SUFFIX}"


class Facts:
    """`info` of volumes out of one transaction. Looks every snapshot up once, for `parent`."""

    def __init__(self, txn: ReadTxn, view: View) -> None:
        self._txn = txn
        self._view = view
        # By layer: the volumes whose snapshots name it, and the oldest such snapshot with its volume.
        self._namers: dict[int, set[bytes]] = {}
        self._first: dict[int, tuple[Volume, Snapshot]] = {}
        for volume in txn.volumes():
            for snapshot in txn.snapshots(volume.uuid):
                self._namers.setdefault(snapshot.layer, set()).add(volume.uuid)
                first = self._first.get(snapshot.layer)
                if first is None or snapshot.created_ns < first[1].created_ns:
                    self._first[snapshot.layer] = volume, snapshot

    def info(self, volume: Volume) -> Fields:
        txn = self._txn
        chain = txn.chain(volume.head)  # as of this transaction, whatever is shown below
        ownership = txn.ownership(volume.uuid)
        volume, size, pages = self._view.shown(volume)
        allocated = pages * PAGE
        unique = min(allocated, self.exclusive(volume, chain))
        snapshots = sorted(txn.snapshots(volume.uuid), key=lambda snapshot: (snapshot.created_ns, snapshot.name))
        return {
            "name": volume.name,
            "uuid": str(UUID(bytes=volume.uuid)),
            "path": self._view.path(volume.name),
            "virtual_size": size,
            "allocated": allocated,
            "unique": unique,
            "shared": allocated - unique,
            "chain_depth": len(chain),
            "role": ROLES[ownership.role if ownership is not None else Role.NONE],
            "epoch": 0 if ownership is None else ownership.epoch,
            "peer": self._elsewhere(ownership),
            "remote": sum(layer.remote_pages for layer in chain) * PAGE,
            "lost": sum(layer.lost_pages for layer in chain) * PAGE,
            "open_count": self._view.opens.get(volume.uuid, 0),
            "frozen": freeze.fields() if (freeze := freezes.found(txn, volume.uuid)) is not None else None,
            "parent": self.parent(volume, chain),
            "created": rfc3339(volume.created_ns),
            "modified": rfc3339(volume.mtime_ns),
            "snapshots": [snapshot_fields(snapshot) for snapshot in snapshots],
        }

    def _elsewhere(self, ownership: Ownership | None) -> str | None:
        """The peer that has a part in the volume now: the old home, which a settled owner's record names, has none."""
        if ownership is None or not ownership.peer or (ownership.role is Role.OWNER and not ownership.migration):
            return None
        return self._view.peer(ownership.peer)

    def exclusive(self, volume: Volume, chain: Sequence[Layer]) -> int:
        """Bytes stored for layers of the chain that only this volume and its snapshots reach: what rm would free."""
        own = 0
        for layer in chain:
            namers = self._namers.get(layer.id, ())
            if layer.children > 1 or len(namers) > 1 or (namers and volume.uuid not in namers):
                break
            own += layer.own_pages
        return own * PAGE

    def parent(self, volume: Volume, chain: Sequence[Layer]) -> str | None:
        """The nearest snapshot of another volume below this one's head, as `golden@v1`.

        A layer may have several names (a snapshot of a fresh clone names what its source named): the first one counts.
        """
        for layer in chain[1:]:
            first = self._first.get(layer.id)
            if first is not None and first[0].uuid != volume.uuid:
                return f"{first[0].name}@{first[1].name}"
        return None


def snapshot_fields(snapshot: Snapshot) -> Fields:
    return {
        "name": snapshot.name,
        "created": rfc3339(snapshot.created_ns),
        "size": snapshot.size,
        "allocated": snapshot.data_pages * PAGE,
    }


def tombstone(ownership: Ownership, view: View) -> Fields:
    """`info` of a volume that has left and of which only the record of its ownership is kept."""
    zero = dict.fromkeys(("virtual_size", "allocated", "unique", "shared", "chain_depth", "remote", "lost"), 0)
    changed = rfc3339(ownership.changed_ns)
    return {
        "name": ownership.name,
        "uuid": str(UUID(bytes=ownership.uuid)),
        "path": None,
        **zero,
        "role": ROLES[ownership.role],
        "epoch": ownership.epoch,
        "peer": view.peer(ownership.peer) if ownership.peer else None,
        "open_count": 0,
        "frozen": None,
        "parent": None,
        "created": None,
        "modified": changed,
        "snapshots": [],
    }


def departed(txn: ReadTxn) -> Iterator[Ownership]:
    """Records of volumes that went elsewhere and are no more here, by name."""
    for ownership in sorted(txn.ownerships(), key=lambda record: record.name):
        if ownership.role is Role.RETIRED and ownership.name and not txn.has_volume(ownership.uuid):
            yield ownership
