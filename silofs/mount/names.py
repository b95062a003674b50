"""What the mount shows of the catalog, as the engine has it now: files by name and by inode, and what stat(2) says.

A look-up asks the engine's snapshot of the store, so that a volume made, renamed or removed by anybody is seen at once.
Only listings, and inodes that the kernel remembers from an earlier daemon, need all names: that tree is kept until the
next commit.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from silofs.blocks import pages_for
from silofs.engine import Engine, VolumeState
from silofs.errors import NoSuchSnapshot, NoSuchVolume, SiloError
from silofs.layers.catalog import Snapshot, Volume
from silofs.mount.tree import ROOT, SNAPSHOTS, Entry, Tree, snapshot_name, volume_name

STAT_WAIT_S = 1.0  # stat(2) of a volume with buffered writes waits so long for their commit, then it estimates


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
            volumes = txn.volumes()
            snapshots = [snapshot for volume in volumes for snapshot in txn.snapshots(volume.uuid)]
            self._tree = Tree(volumes, snapshots)
            self._tree_of = txn.txn_id
            self._uuids.update((volume.inode, volume.uuid) for volume in volumes)
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
        """The volume or snapshot with this inode, or None."""
        uuid = self._uuids.get(inode)
        if uuid is None:
            return self.tree().get(inode)
        try:
            return self._engine.reads.txn.volume(uuid)
        except NoSuchVolume:
            return None

    def snapshot(self, uuid: bytes, layer: int) -> Snapshot:
        """The snapshot of a volume that names this layer: how a handle remembers it. Raises NoSuchSnapshot."""
        for snapshot in self._engine.reads.txn.snapshots(uuid):
            if snapshot.layer == layer:
                return snapshot
        raise NoSuchSnapshot("the snapshot was removed")

    async def shown(self, entry: Entry) -> Shown:
        """The attributes of a file. Buffered writes are committed first, which is how their pages are counted."""
        if isinstance(entry, Snapshot):
            owner = self._engine.reads.txn.volume(entry.volume)
            mode, when = owner.mode & 0o444, entry.created_ns
            return Shown(entry.inode, mode, owner.uid, owner.gid, entry.size, entry.data_pages, when)
        volume = self._engine.open_volume(entry.uuid)
        buffered = await self._settle(volume)
        record = volume.record
        if not isinstance(record, Volume):
            raise NoSuchVolume(f"{entry.name} was deleted")
        pages = min(record.data_pages + buffered, pages_for(volume.size))
        return Shown(record.inode, record.mode, record.uid, record.gid, volume.size, pages, record.mtime_ns)

    async def _settle(self, volume: VolumeState) -> int:
        """Commit what is buffered; the number of pages for which that was not possible in time."""
        if volume.durable_lsn == volume.last_lsn:
            return 0
        try:
            with trio.move_on_after(STAT_WAIT_S):
                await self._engine.flush(volume)
                return 0
        except SiloError:
            pass  # the write that fails on this is the one to report it
        flushing = volume.flushing.pages if volume.flushing is not None else {}
        return len(volume.pending.pages) + len(flushing)
