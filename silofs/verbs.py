"""What each verb does, as a function over one transaction: in the daemon and without one the same code runs.

A verb gets the transaction, its arguments as they came (from the control socket: anything at all, so every argument is
taken out by `_text` and its like, which raise UserError) and the `View`. It returns the fields of its result
(docs/cli.md). Sizes are bytes, times RFC 3339 in UTC.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from silofs import limits
from silofs.blocks import PAGE
from silofs.errors import Busy, Exists, Interrupted, NoSuchVolume, NotOwner, UserError
from silofs.images import Cancelled, Loaded, Progress, never
from silofs.layers import check as invariants
from silofs.layers.catalog import Layer, Ownership, Role, Snapshot, Volume
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.names import check_name, check_size

Args = dict[str, Any]
Fields = dict[str, Any]

ROLES: Final = {
    Role.NONE: "none",
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
    opens: Mapping[bytes, int] = field(default_factory=dict)  # open handles by volume
    peer: Callable[[str], str] = str  # the name of a peer, by what ownership records call it
    shown: Callable[[Volume], Shown] = _as_stored

    def path(self, name: str) -> str | None:
        return None if self.mountpoint is None else f"{self.mountpoint}/{name}{limits.IMAGE_SUFFIX}"


# Arguments


def _text(args: Args, key: str) -> str:
    value = args.get(key)
    if not isinstance(value, str):
        raise UserError(f"the argument {key!r} is a text")
    return value


def name_in(args: Args, key: str) -> str:
    return check_name(_text(args, key))


def optional_name(args: Args, key: str) -> str | None:
    return None if args.get(key) is None else name_in(args, key)


def flag(args: Args, key: str) -> bool:
    value = args.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"the argument {key!r} is true or false")
    return value


def size_in(args: Args, key: str) -> int:
    value = args.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"the argument {key!r} is a whole number of bytes")
    return check_size(value)


# Facts about volumes


def rfc3339(ns: int) -> str:
    """Nanoseconds since 1970 as RFC 3339, UTC, whole seconds."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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
            "peer": self._view.peer(ownership.peer) if ownership is not None and ownership.peer else None,
            "remote": sum(layer.remote_pages for layer in chain) * PAGE,
            "lost": sum(layer.lost_pages for layer in chain) * PAGE,
            "open_count": self._view.opens.get(volume.uuid, 0),
            "parent": self.parent(volume, chain),
            "created": rfc3339(volume.created_ns),
            "modified": rfc3339(volume.mtime_ns),
            "snapshots": [snapshot_fields(snapshot) for snapshot in snapshots],
        }

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


def _tombstone(ownership: Ownership, view: View) -> Fields:
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
        "parent": None,
        "created": None,
        "modified": changed,
        "snapshots": [],
    }


def _left(txn: ReadTxn) -> Iterator[Ownership]:
    """Records of volumes that went elsewhere and are no more here, by name."""
    for ownership in sorted(txn.ownerships(), key=lambda record: record.name):
        if ownership.role is Role.RETIRED and ownership.name and not txn.has_volume(ownership.uuid):
            yield ownership


def owned(txn: ReadTxn, name: str, what: str) -> Volume:
    """The volume, if this store may change or copy it. Raises NotOwner after it was ceded, Busy before it arrived."""
    volume = txn.volume_by_name(name)
    ownership = txn.ownership(volume.uuid)
    role = Role.NONE if ownership is None else ownership.role
    if role is Role.INCOMING:
        hint = "silofs migration ls shows how far it is"
        raise Busy(f"{name} has not arrived yet: {what} waits for the switch-over", hint=hint)
    if role in (Role.CEDED, Role.RETIRED):
        raise NotOwner(f"{name} has moved to another host: {what} is refused here")
    if role is not Role.OWNER:
        raise NotOwner(f"{name} is {ROLES[role]} here: {what} is refused")
    return volume


def optional_size(args: Args, key: str) -> int | None:
    return None if args.get(key) is None else size_in(args, key)


# Verbs that read


def ls(txn: ReadTxn, args: Args, view: View) -> Fields:
    facts = Facts(txn, view)
    volumes = [facts.info(volume) for volume in sorted(txn.volumes(), key=lambda volume: volume.name)]
    return {"volumes": volumes}


def info(txn: ReadTxn, args: Args, view: View) -> Fields:
    name = name_in(args, "name")
    try:
        return Facts(txn, view).info(txn.volume_by_name(name))
    except NoSuchVolume:
        for ownership in _left(txn):
            if ownership.name == name:
                return _tombstone(ownership, view)
        raise


def free_name(txn: ReadTxn, args: Args, view: View) -> Fields:
    """Nothing, or Exists: asked before long work that ends in a new volume."""
    name = name_in(args, "name")
    if any(volume.name == name for volume in txn.volumes()):
        raise Exists(f"there is a volume {name!r} already")
    return {}


def count(txn: ReadTxn, args: Args, view: View) -> Fields:
    """What `status` says of the store."""
    return {"volumes": len(txn.volumes())}


def df(txn: ReadTxn, args: Args, view: View) -> Fields:
    space = os.statvfs(view.store)
    free = space.f_bavail * space.f_frsize
    volumes = txn.volumes()
    files = [path for path in (view.store / "data").iterdir() if path.is_file()]
    return {
        "store": str(view.store),
        "total": space.f_blocks * space.f_frsize,
        "used": (space.f_blocks - space.f_bfree) * space.f_frsize,
        "free": free,
        "available": max(0, free - limits.SPACE_FLOOR_BYTES),
        "file_bytes": sum(path.stat().st_blocks * 512 for path in files),
        "data_bytes": sum(layer.own_pages for layer in txn.layers()) * PAGE,
        "volumes": len(volumes),
        "virtual_bytes": sum(volume.size for volume in volumes),
    }


def du(txn: ReadTxn, args: Args, view: View) -> Fields:
    name = optional_name(args, "name")
    facts = Facts(txn, view)
    chosen = [txn.volume_by_name(name)] if name is not None else sorted(txn.volumes(), key=lambda v: v.name)
    rows = []
    for volume in chosen:
        shown = facts.info(volume)
        row = {key: shown[key] for key in ("name", "virtual_size", "allocated", "unique", "shared", "snapshots")}
        rows.append({**row, "freed_by_rm": facts.exclusive(volume, txn.chain(volume.head))})
    return {"volumes": rows, "stored": sum(layer.own_pages for layer in txn.layers()) * PAGE}


def check(store: Store, args: Args, progress: Progress, cancelled: Cancelled = never) -> Fields:
    """Every invariant of the store, in one long read transaction."""
    read_data = flag(args, "read_data")

    def step(done: int, total: int) -> None:
        if cancelled():
            raise Interrupted("the check was stopped", hint="run it again")
        progress({"stage": "checking", "steps_done": done, "steps_total": total})

    with contextlib.closing(store.reader()) as txn:
        found = invariants.check(txn, read_data=read_data, progress=step)
        counted = {"volumes": len(txn.volumes()), "layers": len(txn.layers())}
    findings = [
        {"code": f.code, "message": f.message, "volume": f.volume or None, "layer": f.layer, "page": f.page}
        for f in found
    ]
    return {"findings": findings, "damaged": len(findings), "read_data": read_data, **counted}


# Verbs that change


def create(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = txn.create_volume(name_in(args, "name"), size_in(args, "size"), uid=os.geteuid(), gid=os.getegid())
    return Facts(txn, view).info(volume)


def snapshot(txn: WriteTxn, args: Args, view: View) -> Fields:
    name = name_in(args, "volume")
    volume = owned(txn, name, "a snapshot")
    made = txn.take_snapshot(volume.uuid, name_in(args, "snapshot"))
    fields = snapshot_fields(made)
    return {"volume": name, "snapshot": fields["name"], **fields}


def clone(txn: WriteTxn, args: Args, view: View) -> Fields:
    source, snapshot, new = name_in(args, "source"), optional_name(args, "snapshot"), name_in(args, "new")
    volume = owned(txn, source, "a clone")
    if snapshot is None:
        layer, size = txn.seal(volume.uuid).id, volume.size
    else:
        taken = txn.find_snapshot(volume.uuid, snapshot)
        layer, size = taken.layer, taken.size
    made = txn.clone(layer, new, size=size, uid=volume.uid, gid=volume.gid, mode=volume.mode)
    return Facts(txn, view).info(made)


def rm(txn: WriteTxn, args: Args, view: View) -> Fields:
    name, snapshot = name_in(args, "volume"), optional_name(args, "snapshot")
    volume = txn.volume_by_name(name)
    if snapshot is not None:
        owned(txn, name, "removing a snapshot")
        txn.remove_snapshot(volume.uuid, snapshot)
        return {"volume": name, "snapshot": snapshot, "snapshots_removed": 1}
    removable(txn, volume, view)
    count = len(txn.snapshots(volume.uuid))
    if count and not flag(args, "force"):
        plural = "s" if count > 1 else ""
        raise Busy(f"{name} has {count} snapshot{plural}", hint="repeat it with --yes to remove it with them")
    txn.delete_volume(volume.uuid)
    return {"volume": name, "snapshot": None, "snapshots_removed": count}


def unused(volume: Volume, view: View) -> None:
    """Raises Busy while somebody has the volume's file open."""
    count = view.opens.get(volume.uuid, 0)
    if count:
        times = "once" if count == 1 else f"{count} times"
        raise Busy(f"{volume.name} is open {times}", hint="stop the VM that uses it first")


def removable(txn: ReadTxn, volume: Volume, view: View) -> None:
    """Raises Busy while the volume is in use, or a migration needs its data."""
    unused(volume, view)
    ownership = txn.ownership(volume.uuid)
    role = Role.NONE if ownership is None else ownership.role
    if role in (Role.INCOMING, Role.CEDED):
        hint = "silofs migration ls shows the migration; it has to end first"
        raise Busy(f"{volume.name} is {ROLES[role]}: its migration is not over", hint=hint)


def adopt(txn: WriteTxn, args: Args, view: View, loaded: Loaded) -> Fields:
    """The end of an import: a volume on the layer that was loaded."""
    name = name_in(args, "name")
    made = txn.create_volume(name, loaded.size, uid=os.geteuid(), gid=os.getegid(), parent=loaded.layer)
    txn.unpin(loaded.layer, loaded.holder)
    return {**Facts(txn, view).info(made), "bytes_read": loaded.bytes_read}


def exported(txn: ReadTxn, args: Args) -> tuple[int, int, int]:
    """(layer, size, bytes of data) of what an export is to write; in a WriteTxn a head is sealed first."""
    name, snapshot = name_in(args, "volume"), optional_name(args, "snapshot")
    volume = owned(txn, name, "an export")
    if snapshot is None:
        layer = txn.seal(volume.uuid).id if isinstance(txn, WriteTxn) else volume.head
        return layer, volume.size, volume.data_pages * PAGE
    taken = txn.find_snapshot(volume.uuid, snapshot)
    return taken.layer, taken.size, taken.data_pages * PAGE


def rollback(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = owned(txn, name_in(args, "volume"), "a rollback")
    unused(volume, view)
    kept = txn.find_snapshot(volume.uuid, name_in(args, "snapshot"))
    return Facts(txn, view).info(txn.rollback(volume.uuid, kept.layer))


def rename(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = owned(txn, name_in(args, "old"), "renaming it")
    txn.rename(volume.uuid, name_in(args, "new"))
    return Facts(txn, view).info(txn.volume(volume.uuid))


def resize(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = owned(txn, name_in(args, "name"), "resizing it")
    size = size_in(args, "size")
    if size < volume.size and not flag(args, "shrink"):
        hint = "repeat it with --yes to cut its end off"
        raise Busy(f"{volume.name} is larger than that: {volume.size} bytes", hint=hint)
    txn.resize(volume.uuid, size)
    return Facts(txn, view).info(txn.volume(volume.uuid))


ReadVerb = Callable[[ReadTxn, Args, View], Fields]
WriteVerb = Callable[[WriteTxn, Args, View], Fields]

READS: Final[dict[str, ReadVerb]] = {"ls": ls, "info": info, "df": df, "du": du, "free_name": free_name, "count": count}
WRITES: Final[dict[str, WriteVerb]] = {
    "create": create,
    "snapshot": snapshot,
    "clone": clone,
    "rm": rm,
    "rollback": rollback,
    "rename": rename,
    "resize": resize,
}
