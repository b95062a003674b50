"""The engine: volumes that can be read, written, flushed and changed, over one store and one write log.

Everything here runs on one event loop. The parts own the state: `Reads` the caches and the loop's snapshot, `Writes`
the admission, `Commits` what is pending and in flight, and this class which volumes are open and what lets them pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import trio
from msgspec import structs

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.engine.background import Background
from silofs.engine.commits import Also, Commits
from silofs.engine.copies import Copies
from silofs.engine.gather import ZEROS
from silofs.engine.ranges import Ranges
from silofs.engine.reads import Reads
from silofs.engine.remote import Fetches, Nobody, Remote
from silofs.engine.served import Served
from silofs.engine.threads import Threads
from silofs.engine.volume import KEY_SHIFT, Gate, VolumeState
from silofs.engine.writes import Data, Writes
from silofs.errors import Damaged, NoSuchVolume
from silofs.layers.catalog import Role, Snapshot, Volume
from silofs.layers.catalog_reader import CatalogReader
from silofs.layers.log import WriteLog
from silofs.layers.pending import Buffer
from silofs.layers.policies import policies
from silofs.layers.reader import ReadTxn
from silofs.layers.replay import Recovered, recover
from silofs.layers.rewrite import Stepped
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import WARM_S

T = TypeVar("T")


class Engine:
    """Volumes by uuid, snapshots by layer. `recover` first, then `run` in a nursery, then the rest."""

    def __init__(
        self,
        store: Store,
        log: WriteLog,
        *,
        remote: Remote | None = None,
        threads: Threads | None = None,
        journal: bool = True,
    ) -> None:
        """`journal`: False for an engine that makes none, whose every fsync is a commit."""
        self.store = store
        self.log = log
        self._journal = journal
        self._threads = threads or Threads()
        self.bell = self._threads.bell
        self._fetches = Fetches(remote or Nobody())
        self.reads = Reads(store, log.ring, self._threads, self._fetches)
        self.commits = Commits(store, log, self.reads, self._threads)
        self.commits.refresh = self._refresh
        self.commits.replace = self._replace
        self.moving: Callable[[ReadTxn], Collection[bytes]] = lambda txn: ()  # volumes of unfinished migrations
        self.background = Background(store, self.commits, self._quiet, policies(store.usage, self._held))
        self.writes = Writes(log, self.reads, self.commits)
        self.ranges = Ranges(self.reads, self.writes, self.commits)
        self.copies = Copies(self.reads, self.writes, self.commits)
        self._volumes: dict[bytes, VolumeState] = {}
        self._layers: dict[int, VolumeState] = {}
        self._departed = Served()  # of volumes and snapshots that are gone
        self._keys = 0
        self.catalog_version = 0  # changes with whatever may change names, sizes or attributes
        # The hot paths, without a call in between.
        self.read_now = self.reads.read_now
        self.write_now = self.writes.write_now
        self.flush_now = self.commits.flush_now

    def recover(self) -> Recovered:
        """Replay what a dead daemon left in the log. Before anything else; raises what a commit raises."""
        assert not self._volumes, "recovery comes first"
        journal = self.commits.journal
        found = recover(self.store, self.log, journal.find() if self._journal else 0)
        journal.recovered()
        self.reads.renew()
        return found

    def attach(self, remote: Remote) -> None:
        """Who brings pages from peers, from now on."""
        self._fetches.remote = remote

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit in the background, and keep what fetches need running, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._fetches.nursery = nursery
            await self._threads.run(lambda: self.store.held.top_up(0))
            nursery.start_soon(self.commits.run)
            nursery.start_soon(self._age)
            nursery.start_soon(self.background.run)
            nursery.start_soon(self._threads.bell.run)
            if self._journal:
                nursery.start_soon(self.commits.journal.run)
            task_status.started()

    def _quiet(self) -> bool:
        """Whether background work may run: not while a volume is frozen, whose switch-over would have to wait."""
        return not any(volume.frozen for volume in self._volumes.values())

    async def _age(self) -> None:
        while True:
            await trio.sleep(WARM_S)
            self.reads.age()

    def close(self) -> None:
        """End the engine's transactions. What is pending stays in the log; `commit_all` leaves nothing there."""
        self._threads.close()
        self.commits.journal.close()
        self.reads.close()

    # Volumes

    def open_volume(self, uuid: bytes) -> VolumeState:
        """The state of a volume, one object for as long as it exists. Raises NoSuchVolume, Damaged."""
        volume = self._volumes.get(uuid)
        if volume is None:
            record = self.reads.txn.volume(uuid)
            volume = VolumeState(uuid, self._new_key())
            volume.last_lsn = volume.durable_lsn = record.applied_lsn
            self._show(volume, record, self.reads.txn)
            self._volumes[uuid] = volume
        return volume

    def open_layer(self, uuid: bytes, layer_id: int) -> VolumeState:
        """A read-only state of a volume's snapshot, by its sealed layer. Raises Damaged when there is no such layer."""
        view = self._layers.get(layer_id)
        if view is None:
            layer = self.reads.txn.layer(layer_id)
            view = VolumeState(uuid, self._new_key())
            view.name, view.size, view.head = f"layer {layer_id}", layer.size, layer_id
            view.remote = _has_remote(view, self.reads.txn)
            view.set_sealed()
            self._layers[layer_id] = view
        return view

    def volumes(self) -> Iterable[VolumeState]:
        """The open volumes."""
        return self._volumes.values()

    def catalog(self) -> tuple[list[Volume], list[Snapshot]]:
        """All volumes and snapshots of the store. Worth keeping while `catalog_version` stays the same."""
        volumes = self.reads.txn.volumes()
        return volumes, [snapshot for volume in volumes for snapshot in self.reads.txn.snapshots(volume.uuid)]

    def shown(self, record: Volume) -> tuple[Volume, int, int]:
        """(record, size in bytes, data pages) of a volume with what is acknowledged and not in the store yet."""
        volume = self._volumes.get(record.uuid)
        if volume is None or volume.record is None:
            return record, record.size, record.data_pages
        record = volume.record
        if volume.clean and volume.flushing is None:
            return record, volume.size, record.data_pages
        record = structs.replace(record, mtime_ns=max(record.mtime_ns, volume.written_ns))
        return record, volume.size, max(0, record.data_pages + self.reads.buffered_pages(volume))

    @property
    def dirty_bytes(self) -> int:
        """Bytes acknowledged that are not in the store."""
        return self.commits.unapplied

    def _new_key(self) -> int:
        self._keys += 1
        return self._keys << KEY_SHIFT

    # Reading and writing (the fast ways are read_now and write_now)

    async def read(self, volume: VolumeState, offset: int, length: int) -> Buffer:
        """See Reads.read."""
        return await self.reads.read(volume, offset, length)

    async def write(self, volume: VolumeState, offset: int, data: Data, *, sync: bool = False) -> None:
        """See Writes.write."""
        await self.writes.write(volume, offset, data, sync=sync)

    async def discard(self, volume: VolumeState, offset: int, length: int) -> None:
        """See Writes.discard."""
        await self.writes.discard(volume, offset, length)

    async def allocate(self, volume: VolumeState, offset: int, length: int, *, zero: bool, extend: bool) -> None:
        """See Ranges.allocate."""
        await self.ranges.allocate(volume, offset, length, zero=zero, extend=extend)

    async def copy_range(
        self, source: VolumeState, offset: int, target: VolumeState, to_offset: int, length: int
    ) -> int:
        """See Copies.copy_range."""
        return await self.copies.copy_range(source, offset, target, to_offset, length)

    async def seek(self, volume: VolumeState, offset: int, *, data: bool) -> int | None:
        """See Ranges.seek."""
        return await self.ranges.seek(volume, offset, data=data)

    async def flush(self, volume: VolumeState) -> None:
        """See Commits.flush."""
        await self.commits.flush(volume)

    async def commit_all(self) -> None:
        """Return when everything acknowledged so far, of all volumes, is durable and the log is empty up to here."""
        await self.commits.commit()

    async def resize(self, volume: VolumeState, size: int, also: Also = lambda txn: None) -> None:
        """Grow or shrink a volume; durable on return. `also`: what else is done in the same transaction, afterwards."""
        if size < volume.size and size & (PAGE - 1) and volume.remote:
            # The page that the end cuts through must be here to be cut.
            await self.writes.write(volume, size, ZEROS[: min(PAGE - size % PAGE, volume.size - size)])
        await self.commits.resize(volume, size, also)

    async def transact(self, fn: Callable[[WriteTxn], T]) -> T:
        """See Commits.transact. Afterwards every open volume stands as its records say, ownership included."""
        return await self.commits.transact(fn)

    # Ownership and migration

    def freeze(self, uuid: bytes) -> None:
        """Let mutations of a volume wait. Nothing is in flight afterwards: an admitted write is a logged write."""
        self.open_volume(uuid).freeze()

    def thaw(self, uuid: bytes) -> None:
        """Undo one `freeze`. The gate is then what the volume's role says."""
        self.open_volume(uuid).thaw()

    def check_writer(self, volume: VolumeState) -> None:
        """Raise what an open for writing is refused with. One that has not arrived yet may be opened: QEMU does."""
        refusal = volume.refusal()
        if refusal is not None and volume.gate is not Gate.INCOMING:
            raise refusal

    def opened(self, volume: VolumeState, writable: bool) -> None:
        """A handle was opened, or found again after a restart."""
        volume.opened(writable)

    def closed(self, volume: VolumeState, writable: bool) -> None:
        volume.closed(writable)

    def writers(self, uuid: bytes) -> int:
        """How many handles are open for writing."""
        volume = self._volumes.get(uuid)
        return volume.writers if volume is not None else 0

    def apply_ownership(self, uuids: Iterable[bytes]) -> None:
        """Switch the gates of these volumes to what their records say now, all in one step."""
        self._renew()
        self.catalog_version += 1
        with self.store.reader() as txn:
            for uuid in uuids:
                volume = self._volumes.get(uuid)
                if volume is not None:
                    self._reload(volume, txn)

    def acknowledged(self, uuids: Iterable[bytes]) -> None:
        """The new owner of these volumes has said that it owns them: their reads are forwarded to it from now on."""
        for uuid in uuids:
            self.open_volume(uuid).acknowledged()

    def filled(self, leaves: Iterable[int]) -> None:
        """Pages of these leaves have arrived in the store, in some layer: whatever has that layer will see them."""
        self._renew()
        numbers = list(leaves)
        with self.store.reader() as txn:
            for volume in (*self._volumes.values(), *self._layers.values()):
                if volume.remote:
                    for number in numbers:
                        self.reads.forget_leaves(volume, number, number + 1)
                    volume.remote = _has_remote(volume, txn)

    def _renew(self) -> None:
        """Let the loop's snapshot show what was committed beside the engine.

        Not while a commit of ours is under way: until its leaves are published the old ones are read, and the snapshot
        that they belong to is what keeps the pages which they name. The publication renews it anyway.
        """
        if not self.commits.under_way:
            self.reads.renew()

    def _replace(self, stepped: Stepped) -> None:
        """Called in the step that publishes background work: references have changed, content has not."""
        self.reads.forget_everywhere(stepped.chilled)
        if stepped.heads:
            volumes = {volume.head: volume for volume in self._volumes.values()}
            for (head, leaf), entry in stepped.heads.items():
                if head in volumes:
                    self.reads.replace(volumes[head], leaf, None if entry is None else entry[1])
        for layer_id, successor in stepped.succeeded.items():
            view = self._layers.pop(layer_id, None)
            if view is not None:
                view.head = successor
                if (other := self._layers.get(successor)) is not None:
                    self._departed.add(other.served)
                self._layers[successor] = view

    def _held(self, txn: ReadTxn) -> set[int]:
        """Layers not to be merged: open through the mount, or of volumes on the move. Called by the writer."""
        held = {handle.layer for handle in self.log.handles.items() if handle.layer}
        for uuid in self.moving(txn):
            if txn.has_volume(uuid):
                tops = [txn.volume(uuid).head, *(snapshot.layer for snapshot in txn.snapshots(uuid))]
                held |= {layer.id for top in tops for layer in txn.chain(top)}
        return held

    # What the records say

    def _refresh(self, chilled: Iterable[int]) -> None:
        """Called in the step that publishes a transaction. `chilled`: leaves that changed below heads."""
        self.catalog_version += 1
        self.reads.forget_everywhere(chilled)
        txn = self.reads.txn
        for volume in self._volumes.values():
            self._reload(volume, txn)
        for layer_id, view in list(self._layers.items()):
            try:
                gone = not txn.layer(layer_id).uuid  # removed, or its content moves
            except Damaged:
                gone = True
            if gone:
                view.set_gone()
                self._departed.add(view.served)
                del self._layers[layer_id]
            else:
                view.remote = view.remote and _has_remote(view, txn)
        for uuid in [uuid for uuid, volume in self._volumes.items() if volume.record is None]:
            self._departed.add(self._volumes.pop(uuid).served)

    def _reload(self, volume: VolumeState, txn: CatalogReader) -> None:
        """Bring one state up to its records."""
        try:
            record = txn.volume(volume.uuid)
            below = txn.layer(record.head).parent
            was_local, old_head, old_size = volume.local, volume.head, volume.size
            self._show(volume, record, txn)
        except NoSuchVolume:
            volume.record = None
            volume.set_gone()
            self.reads.forget(volume)
            return
        except Damaged as error:
            volume.damaged(error)
            return
        if (old_head != record.head and below != old_head) or not was_local:
            # More than a seal: the chain holds other pages, or may. Leaves that are being resolved find nobody.
            self.reads.forget(volume)
            volume.key = self._new_key()
        elif record.size < old_size:
            # From the leaf that the new end cuts through: its last page was zeroed beyond the end.
            self.reads.forget_leaves(volume, record.size // LEAF_BYTES, old_size // LEAF_BYTES + 1)

    def _show(self, volume: VolumeState, record: Volume, txn: CatalogReader) -> None:
        ownership = txn.ownership(volume.uuid)
        volume.record = record
        volume.name, volume.inode, volume.head = record.name, record.inode, record.head
        volume.remote = _has_remote(volume, txn)
        # Writes that came after the cut may have made it longer already.
        volume.size = max(record.size, volume.grown)
        if ownership is None:
            volume.set_role(Role.NONE, 0)
        else:
            volume.set_role(ownership.role, ownership.epoch)

    def served(self) -> Served:
        """Of all volumes and snapshots, those among them that are gone: it never falls."""
        total = Served()
        total.add(self._departed)
        for volume in (*self._volumes.values(), *self._layers.values()):
            total.add(volume.served)
        return total

    def statistics(self) -> dict[str, object]:
        return {
            "volumes": len(self._volumes),
            "served": self.served().figures(),
            "reads": self.reads.statistics(),
            "writes": self.writes.statistics(),
            "commits": self.commits.statistics(),
            "background": self.background.statistics(),
            "log": self.log.statistics(),
        }


def _has_remote(volume: VolumeState, txn: CatalogReader) -> bool:
    """Whether some page of the chain is still at a peer."""
    return any(layer.remote_pages for layer in txn.chain(volume.head))
