"""What the mount shows of the catalog, as the engine has it now: files by name and by inode, and what stat(2) says.

A look-up asks the engine's snapshot of the store, so that a volume made, renamed or removed by anybody is seen at once.
Only listings, and inodes that the kernel remembers from an earlier daemon, need all names: that tree is kept until the
next commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from silofs.engine import Engine
from silofs.errors import NoSuchSnapshot, NoSuchVolume
from silofs.layers.catalog import Snapshot
from silofs.mount.tree import ROOT, SNAPSHOTS, Entry, Tree, snapshot_name, volume_name


@dataclass(frozen=True)
class Shown:
    """What stat(2) says of one file. pages: data pages, each 8 blocks of 512 bytes."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    pages: int
    mtime_ns: int
    links: int = 1


class Names:
    """Entries of the mount over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._uuids: dict[int, bytes] = {}  # of volumes, by inode: never wrong, since neither is used again
        self._tree = Tree()
        self._tree_of = -1  # the transaction that it was read in

    def tree(self) -> Tree:
        """All names, as they are now."""
        txn = self._engine.reads.txn
        if txn.txn_id != self._tree_of:
            volumes, snapshots = self._engine.catalog()
            self._tree = Tree(volumes, snapshots)
            self._tree_of = txn.txn_id
            self._uuids.update((volume.inode, volume.uuid) for volume in (*volumes, *txn.orphans()))
        return self._tree

    def child(self, directory: int, name: bytes) -> Entry | None:
        """The entry with this name, or None."""
        txn = self._engine.reads.txn
        try:
            if directory == ROOT and (stem := volume_name(name)) is not None:
                volume = txn.volume_by_name(stem)
                self._uuids[volume.inode] = volume.uuid
                return volume
            if directory == SNAPSHOTS and (pair := snapshot_name(name)) is not None:
                return txn.find_snapshot(txn.volume_by_name(pair[0]).uuid, pair[1])
        except (NoSuchVolume, NoSuchSnapshot):
            pass
        return None

    def get(self, inode: int) -> Entry | None:
        """The volume or snapshot with this inode, or None. A volume that was removed while it was open is found too."""
        uuid = self._uuids.get(inode)
        if uuid is None:
            found = self.tree().get(inode)
            uuid = self._uuids.get(inode)
            if uuid is None:
                return found
        try:
            return self._engine.reads.txn.volume(uuid)
        except NoSuchVolume:
            return None

    def shown(self, entry: Entry) -> Shown:
        """The attributes of a file, with what is buffered."""
        if isinstance(entry, Snapshot):
            owner = self._engine.reads.txn.volume(entry.volume)
            mode, when = owner.mode & 0o444, entry.created_ns
            return Shown(entry.inode, mode, owner.uid, owner.gid, entry.size, entry.data_pages, when)
        record, size, pages = self._engine.shown(entry)
        links = 0 if record.orphan else 1
        return Shown(record.inode, record.mode, record.uid, record.gid, size, pages, record.mtime_ns, links)
