"""What each verb does, as a function over one transaction: in the daemon and without one the same code runs.

A verb gets the transaction, its arguments as they came (from the control socket: anything at all, so every argument is
taken out by `_text` and its like, which raise UserError) and the `View`. It returns the fields of its result
(docs/cli.md). Sizes are bytes, times RFC 3339 in UTC.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from silofs import arriving, freezes, limits
from silofs.blocks import PAGE
from silofs.errors import Busy, Exists, Interrupted, NoSuchVolume, NotOwner, UserError
from silofs.facts import ROLES, Facts, Fields, View, departed, snapshot_fields, tombstone
from silofs.images import Cancelled, Loaded, Progress, never
from silofs.layers.catalog import Role, Volume
from silofs.layers.reader import ReadTxn
from silofs.layers.scrub import scrub
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.names import check_name, check_size
from silofs.peers.records import needed
from silofs.times import rfc3339

Args = dict[str, Any]

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


def optional_size(args: Args, key: str) -> int | None:
    return None if args.get(key) is None else size_in(args, key)


def owned(txn: ReadTxn, name: str, what: str) -> Volume:
    """The volume, if this store may change or copy it. Raises NotOwner after it was ceded, Busy before it arrived."""
    volume = txn.volume_by_name(name)
    ownership = txn.ownership(volume.uuid)
    role = Role.NONE if ownership is None else ownership.role
    if role is Role.INCOMING:
        hint = "silofs migration ls shows how far it is"
        raise Busy(f"{name} has not arrived yet: {what} waits for the switch-over", hint=hint)
    if role in (Role.CEDED, Role.RETIRED, Role.NONE):
        raise NotOwner(f"{name} has moved to another host: {what} is refused here")
    if role is not Role.OWNER:
        raise NotOwner(f"{name} is {ROLES[role]} here: {what} is refused")
    return volume


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
        for ownership in departed(txn):
            if ownership.name == name:
                return tombstone(ownership, view)
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
    doomed = sum(layer.own_pages for layer in txn.layers() if layer.doomed)
    return {
        "store": str(view.store),
        "total": space.f_blocks * space.f_frsize,
        "used": (space.f_blocks - space.f_bfree) * space.f_frsize,
        "free": free,
        "available": max(0, txn.room()),
        "file_bytes": sum(path.stat().st_blocks * 512 for path in files),
        "held_bytes": txn.held_bytes(),
        "data_bytes": sum(layer.own_pages for layer in txn.layers()) * PAGE,
        "reclaimable": None if view.dead_pages is None else (view.dead_pages + doomed) * PAGE,
        "volumes": len(volumes),
        "orphans": len(txn.orphans()),
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
    kept = [
        {"name": each.name, "bytes": txn.layer(each.layer).own_pages * PAGE, "since": rfc3339(each.since_ns)}
        for each in arriving.found(txn).values()
        if name in (None, each.name)
    ]
    orphaned = sum(facts.exclusive(volume, txn.chain(volume.head)) for volume in txn.orphans())
    held = sum(layer.own_pages for layer in txn.layers()) * PAGE
    return {"volumes": rows, "arriving": kept, "orphaned": orphaned, "held": held, "stored": txn.stored_bytes()}


def check(store: Store, args: Args, progress: Progress, cancelled: Cancelled = never) -> Fields:
    """Every invariant of the store, in a process of its own."""
    read_data = flag(args, "read_data")

    def step(done: int, total: int) -> None:
        if cancelled():
            raise Interrupted("the check was stopped", hint="run it again")
        progress({"stage": "checking", "steps_done": done, "steps_total": total})

    found = scrub(store.path, read_data=read_data, progress=step)
    store.look_again()  # the child has taken out of the quarantine what can be read
    findings = [
        {"code": f.code, "message": f.message, "volume": f.volume or None, "layer": f.layer, "page": f.page}
        for f in found.findings
    ]
    counted = {"volumes": found.volumes, "layers": found.layers}
    return {"findings": findings, "damaged": len(findings), "read_data": read_data, **counted}


# Verbs that change


def create(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = txn.create_volume(name_in(args, "name"), size_in(args, "size"), uid=os.geteuid(), gid=os.getegid())
    return Facts(txn, view).info(volume)


def targets(args: Args) -> list[tuple[str, str]]:
    """(volume, snapshot) of every snapshot that is to be taken, none twice."""
    several = args.get("targets")
    if several is None:
        return [(name_in(args, "volume"), name_in(args, "snapshot"))]
    if not isinstance(several, list) or not several or len(several) > limits.SNAPSHOTS_AT_ONCE:
        raise UserError(f"the argument 'targets' is a list of 1 to {limits.SNAPSHOTS_AT_ONCE} targets")
    found = []
    for target in several:
        if not isinstance(target, dict):
            raise UserError("a target is an object with 'volume' and 'snapshot'")
        found.append((name_in(target, "volume"), name_in(target, "snapshot")))
    twice = next((target for target in found if found.count(target) > 1), None)
    if twice is not None:
        raise UserError(f"{twice[0]}@{twice[1]} is asked for twice", hint="name each snapshot once")
    return found


def snapshot(txn: WriteTxn, args: Args, view: View) -> Fields:
    """All of them or none, as of one point in the order of all volumes' writes: what precedes this transaction."""
    taken = []
    for name, wanted in targets(args):
        volume = owned(txn, name, "a snapshot")
        fields = snapshot_fields(txn.take_snapshot(volume.uuid, wanted))
        taken.append({"volume": name, "snapshot": fields["name"], **fields})
    one = taken[0] if len(taken) == 1 else {}
    return {**one, "snapshots": taken, "lsn": txn.last_lsn}


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
    reading = view.snapshot_opens.get(volume.uuid, 0)
    if reading:
        times = "once" if reading == 1 else f"{reading} times"
        raise Busy(f"a snapshot of {name} is open {times}", hint="close what reads it first")
    count = len(txn.snapshots(volume.uuid))
    if count and not flag(args, "force"):
        plural = "s" if count > 1 else ""
        raise Busy(f"{name} has {count} snapshot{plural}", hint="repeat it with --yes to remove it with them")
    txn.delete_volume(volume.uuid)
    arriving.forget_of(txn, name)
    return {"volume": name, "snapshot": None, "snapshots_removed": count}


def unlink(txn: WriteTxn, volume: Volume, view: View) -> None:
    """What unlink(2) does: as `rm`, but a volume that is open and owned here only loses its name until `bury`."""
    ownership = txn.ownership(volume.uuid)
    if ownership is None or ownership.role is not Role.OWNER:
        removable(txn, volume, view)
    freezes.check(txn, volume, "removing it")
    unmoved(txn, volume, "removing it")
    if txn.snapshots(volume.uuid):
        raise Busy(f"{volume.name} has snapshots", hint=f"silofs rm {volume.name} removes it with them")
    txn.orphan_volume(volume.uuid)
    arriving.forget_of(txn, volume.name)


def bury(txn: WriteTxn, uuid: bytes) -> None:
    """Delete a volume that `unlink` took the name of; nothing if that was done."""
    if txn.has_volume(uuid) and txn.volume(uuid).orphan:
        txn.delete_volume(uuid)


def unused(volume: Volume, view: View) -> None:
    """Raises Busy while somebody has the volume's file open."""
    count = view.opens.get(volume.uuid, 0)
    if count:
        times = "once" if count == 1 else f"{count} times"
        raise Busy(f"{volume.name} is open {times}", hint="stop the VM that uses it first")


def unmoved(txn: ReadTxn, volume: Volume, what: str) -> None:
    """Raises Busy while a migration relies on the volume: one that `before_change` has ended is over by now."""
    if volume.uuid in needed(txn):
        hint = "silofs migration ls shows it while the store is mounted, silofs migration cancel ends it"
        raise Busy(f"{volume.name} is in a migration that is not over: {what} waits for its end", hint=hint)


def removable(txn: ReadTxn, volume: Volume, view: View) -> None:
    """Raises Busy while the volume is in use or frozen, or a migration needs its data."""
    unused(volume, view)
    freezes.check(txn, volume, "removing it")
    ownership = txn.ownership(volume.uuid)
    role = Role.NONE if ownership is None else ownership.role
    if role in (Role.INCOMING, Role.CEDED):
        hint = "silofs migration ls shows the migration; it has to end first"
        raise Busy(f"{volume.name} is {ROLES[role]}: its migration is not over", hint=hint)
    unmoved(txn, volume, "removing it")


def receiving(txn: ReadTxn, name: str, view: View) -> Volume:
    """A volume that an import may bring to another state."""
    volume = owned(txn, name, "an import")
    unused(volume, view)
    freezes.check(txn, volume, "an import")
    unmoved(txn, volume, "an import")
    return volume


def adopt(txn: WriteTxn, args: Args, view: View, loaded: Loaded) -> Fields:
    """The end of an import: a volume on the layer that was loaded."""
    name = name_in(args, "name")
    made = txn.create_volume(name, loaded.size, uid=os.geteuid(), gid=os.getegid(), parent=loaded.layer)
    txn.unpin(loaded.layer, loaded.holder)
    return {**Facts(txn, view).info(made), "bytes_read": loaded.bytes_read}


def rollback(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = owned(txn, name_in(args, "volume"), "a rollback")
    unused(volume, view)
    freezes.check(txn, volume, "a rollback")
    unmoved(txn, volume, "a rollback")
    kept = txn.find_snapshot(volume.uuid, name_in(args, "snapshot"))
    return Facts(txn, view).info(txn.rollback(volume.uuid, kept.layer))


def rename(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = owned(txn, name_in(args, "old"), "renaming it")
    txn.rename(volume.uuid, name_in(args, "new"))
    return Facts(txn, view).info(txn.volume(volume.uuid))


def resize(txn: WriteTxn, args: Args, view: View) -> Fields:
    volume = owned(txn, name_in(args, "name"), "resizing it")
    freezes.check(txn, volume, "resizing it")
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
