"""What can be done to volumes and snapshots, each as a function over one write transaction.

A seal, and so a snapshot and a clone, changes a handful of records whatever the volume's size. What goes with the
size of something: shrinking (leaves of the chain beyond the new size) and dropping a layer (its own leaves; beyond
`DROP_LEAVES` of them that is left to `reap`, bounded steps in the background).
"""

from __future__ import annotations

import time
from typing import Final
from uuid import uuid4

import msgspec
import numpy as np

from silofs.blocks import LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, PAGE, PAGE_SHIFT, pages_for
from silofs.errors import BadName, BadSize, Busy, Damaged, Exists
from silofs.layers import catalog, schema
from silofs.layers.catalog import Layer, Ownership, Role, Snapshot, Value, Volume
from silofs.layers.changes import pages_of
from silofs.layers.heads import ROWS, HeadWriter
from silofs.layers.native import Source
from silofs.layers.voids import VoidChanges
from silofs.limits import CHAIN_DEPTH_MAX, IMAGE_SUFFIX, NAME, RETAIN_S, SIZE_MAX

DROP_LEAVES: Final = 256
"""A layer with more leaves is emptied in steps of as many."""


def checked_name(name: str) -> str:
    """The name, if it may name a volume or a snapshot."""
    if not NAME.fullmatch(name) or name.endswith(IMAGE_SUFFIX):
        raise BadName(f"'{name[:140]}' cannot be a name")
    return name


def checked_size(size: int) -> int:
    if not 0 <= size <= SIZE_MAX:
        raise BadSize(f"{size} bytes is more than a volume can have")
    return size


def kept_until() -> int:
    """Until when a layer that is sealed or arrives now is kept as it is."""
    return time.time_ns() + int(RETAIN_S * 1e9)


class VolumeChanges(VoidChanges):
    """Create, delete, rename, resize, seal, snapshot, clone."""

    def create_volume(
        self,
        name: str,
        size: int,
        *,
        uuid: bytes | None = None,
        uid: int = 0,
        gid: int = 0,
        mode: int = 0o600,
        parent: int = 0,
        ownership: Ownership | None = None,
    ) -> Volume:
        """A volume: empty, or showing the sealed layer `parent`. Owned here (epoch 1) unless `ownership` is given."""
        self._check_free(checked_name(name))
        uuid = uuid4().bytes if uuid is None else uuid
        if self.has_volume(uuid):
            raise Exists(f"there is a volume with uuid {uuid.hex()} already")
        data_pages = self.count_data_pages(parent) if parent else 0
        head = self._new_head(parent, checked_size(size))
        now = time.time_ns()
        inode = self.state.next_inode
        self.count(next_inode=inode + 1)
        volume = Volume(
            uuid, name, head.id, size, inode, now, now, uid, gid, mode, applied_lsn=self.last_lsn, data_pages=data_pages
        )
        self.put_record(schema.VOLUME, uuid, volume)
        self.put_record(schema.VOLUME_NAME, name.encode(), Value(uuid))
        if ownership is None:
            known = self.ownership(uuid)
            assert known is None, "a uuid that was here before says itself whose it is"
            ownership = Ownership(uuid, Role.OWNER, 1, changed_ns=now)
        self.put_ownership(ownership)
        return volume

    def _check_free(self, name: str) -> None:
        if self._uuid_of(name) is not None:
            raise Exists(f"there is a volume '{name}' already")

    def _new_head(self, parent: int, size: int) -> Layer:
        """An empty head on a sealed layer, or on nothing. Below, only what is within both sizes shows."""
        depth, clip = 1, size
        if parent:
            below = self.layer(parent)
            assert below.sealed, "only a sealed layer can be built upon"
            if below.doomed or below.merging:
                raise Busy("the layer is being removed")
            if below.depth >= CHAIN_DEPTH_MAX and len(self.chain(parent)) >= CHAIN_DEPTH_MAX:
                hint = "remove snapshots, and wait until their layers are merged"
                raise Busy(f"the chain has {len(self.chain(parent))} layers and takes no more", hint=hint)
            depth, clip = below.depth + 1, min(size, below.size)
            self.change_layer(parent, children=below.children + 1)
        layer = Layer(self.new_layer_id(), parent, size, clip, depth=depth, mapped=pages_for(size))
        self.put_layer(layer)
        return layer

    def delete_volume(self, uuid: bytes) -> None:
        """Remove a volume with its snapshots; layers that clones share stay. Its ownership becomes a tombstone."""
        volume = self.volume(uuid)
        for snapshot in self.snapshots(uuid):
            self.remove_snapshot(uuid, snapshot.name)
        self.delete_record(schema.VOLUME, uuid)
        if not volume.orphan:
            self.delete_record(schema.VOLUME_NAME, volume.name.encode())
        ownership = self.ownership(uuid)
        if ownership is not None and ownership.role == Role.OWNER:
            self.put_ownership(
                msgspec.structs.replace(ownership, role=Role.NONE, name=volume.name, changed_ns=time.time_ns())
            )
        self._drop(volume.head)

    def orphan_volume(self, uuid: bytes) -> None:
        """Take a volume's name away: it stays as it is for who has it open, and is deleted when nobody has."""
        volume = self.volume(uuid)
        self.delete_record(schema.VOLUME_NAME, volume.name.encode())
        self._change_volume(volume, orphan=True)

    def rename(self, uuid: bytes, name: str) -> Volume:
        volume = self.volume(uuid)
        if name == volume.name:
            return volume
        self._check_free(checked_name(name))
        self.delete_record(schema.VOLUME_NAME, volume.name.encode())
        self.put_record(schema.VOLUME_NAME, name.encode(), Value(uuid))
        return self._change_volume(volume, name=name)

    def _change_volume(self, volume: Volume, **changes: object) -> Volume:
        volume = msgspec.structs.replace(volume, **changes)
        self.put_record(schema.VOLUME, volume.uuid, volume)
        return volume

    def set_attr(
        self,
        uuid: bytes,
        *,
        uid: int | None = None,
        gid: int | None = None,
        mode: int | None = None,
        mtime_ns: int | None = None,
    ) -> Volume:
        """Change what is not None."""
        given = {"uid": uid, "gid": gid, "mode": mode, "mtime_ns": mtime_ns}
        changes = {name: value for name, value in given.items() if value is not None}
        return self._change_volume(self.volume(uuid), **changes)

    # Size

    def resize(self, uuid: bytes, size: int) -> Volume:
        """Grow (zeros appear) or shrink (what is cut off is gone: growing again shows zeros).

        Busy when the cut goes through a page that is still at a peer.
        """
        volume = self.volume(uuid)
        head = self.layer(volume.head)
        if checked_size(size) >= volume.size:
            self.change_layer(head.id, size=size, mapped=pages_for(size))
            return self._change_volume(volume, size=size, mtime_ns=time.time_ns())
        writer = HeadWriter(self, volume)
        if size & (PAGE - 1):
            self._zero_tail(writer, size)
        end = pages_for(size)
        # While voids are not settled the volume's count says too much, so that it cannot be taken as a whole.
        whole = not end and not any(layer.unsettled for layer in self.chain(head.id))
        gone = writer.data_pages if whole else self._count_beyond(head.id, end)
        self._cut(head.id, end)
        self.change_layer(head.id, size=size, clip=min(self.layer(head.id).clip, size), mapped=end)
        return writer.finish(size=size, mtime_ns=time.time_ns(), less=gone)

    def _zero_tail(self, writer: HeadWriter, size: int) -> None:
        """Zero the last page beyond the new end, so that growing shows nothing old."""
        page, kept = size >> PAGE_SHIFT, size & (PAGE - 1)
        reference = writer.reference(page)
        kind = schema.kind_of(reference)
        if kind == schema.REMOTE:
            raise Busy(f"page {page} of volume '{writer.volume.name}' is still remote")
        if kind not in schema.STORED:
            return
        try:
            data = bytes(self.page(reference)[:kept])
        except Damaged:
            writer.lose(np.array([page]))
            return
        writer.write(np.array([page]), Source.of([data.ljust(PAGE, b"\0")]), np.array([not data.strip(b"\0")]))

    def _count_beyond(self, layer_id: int, end_page: int) -> int:
        """Data pages from `end_page` on, resolved: work for every leaf that the chain has there."""
        count = 0
        for leaf in self.chain_leaves(layer_id, end_page >> LEAF_SHIFT):
            first = max(end_page - (leaf << LEAF_SHIFT), 0)
            count += schema.count_data(self.resolve(layer_id, leaf)[first:])
        return count

    def _cut(self, head: int, end_page: int) -> None:
        """Remove the head's own entries from `end_page` on."""
        self.end_voids_from(head, (end_page + LEAF_MASK) >> LEAF_SHIFT)
        edge = end_page >> LEAF_SHIFT
        numbers = list(self.present_leaves(head, edge))
        if self.is_void(head, edge) and edge not in numbers[:1]:
            numbers.insert(0, edge)
        for at in range(0, len(numbers), ROWS):
            some = numbers[at : at + ROWS]
            rows = self.stack_leaves(head, [self.peek_leaf(head, leaf) for leaf in some])
            existed: list[bool] = np.any(rows, axis=1).tolist()
            keep = np.zeros(rows.shape, bool)
            if some[0] == end_page >> LEAF_SHIFT:
                keep[0, : end_page & LEAF_MASK] = True
            old = rows[~keep]
            rows[~keep] = schema.HOLE
            pages = np.stack([pages_of(leaf) for leaf in some])
            self.account(head, pages[~keep], old, rows[~keep])
            self.put_leaves(head, some, rows, existed)
        self.chill_head(head, end_page // LEAF_PAGES)

    # Layers

    def seal(self, uuid: bytes) -> Layer:
        """Make what the volume now is a layer that never changes, under an empty head. A handful of records.

        An empty head adds nothing to the layer below: that one is returned, and nothing is changed.
        """
        volume = self.volume(uuid)
        head = self.layer(volume.head)
        if self.unchanged(uuid):
            return self.layer(head.parent)
        layer = self.change_layer(
            head.id,
            uuid=uuid4().bytes,
            sealed=True,
            size=volume.size,
            mapped=pages_for(volume.size),
            data_pages=volume.data_pages,
            kept_ns=kept_until(),
        )
        self.put_record(schema.LAYER_UUID, layer.uuid, Value(schema.KEY.pack(layer.id)))
        self._change_volume(volume, head=self._new_head(layer.id, volume.size).id)
        return self.layer(layer.id)

    def unchanged(self, uuid: bytes) -> bytes:
        """The uuid of the sealed state that the volume is exactly; empty if it was changed since."""
        volume = self.volume(uuid)
        head = self.layer(volume.head)
        same_size = head.parent and head.clip == volume.size == self.layer(head.parent).size
        return self.layer(head.parent).uuid if same_size and not head.leaves and not head.voids else b""

    def take_snapshot(self, uuid: bytes, name: str) -> Snapshot:
        """Seal, and name what was sealed."""
        known = self.unchanged(uuid)
        layer = self.seal(uuid)
        if not known:
            self.change_layer(layer.id, kept_ns=0)  # it has a name; without that there is no reason to keep it
        return self.add_snapshot(uuid, name, layer.id)

    def add_snapshot(self, uuid: bytes, name: str, layer_id: int, *, created_ns: int | None = None) -> Snapshot:
        """Name a sealed layer as a snapshot of a volume, also one that travelled here with it."""
        key = catalog.snapshot_key(uuid, checked_name(name))
        if self.fetch(schema.SNAPSHOT, key) is not None:
            raise Exists(f"volume '{self.volume(uuid).name}' has a snapshot '{name}' already")
        layer = self.layer(layer_id)
        assert layer.sealed, "only a sealed layer can be named"
        inode = self.state.next_inode
        self.count(next_inode=inode + 1)
        created_ns = time.time_ns() if created_ns is None else created_ns
        data_pages = self.count_data_pages(layer_id)
        snapshot = Snapshot(uuid, name, layer_id, layer.size, created_ns, inode, data_pages)
        self.put_record(schema.SNAPSHOT, key, snapshot)
        self.change_layer(layer_id, snapshots=layer.snapshots + 1)
        return snapshot

    def remove_snapshot(self, uuid: bytes, name: str) -> None:
        """Remove the name, and the layer when nothing else reaches it."""
        snapshot = self.find_snapshot(uuid, name)
        self.delete_record(schema.SNAPSHOT, catalog.snapshot_key(uuid, name))
        layer = self.layer(snapshot.layer)
        self.change_layer(layer.id, snapshots=layer.snapshots - 1)
        self.drop_if_free(layer.id)

    def clone(
        self, layer_id: int, name: str, *, size: int | None = None, uid: int = 0, gid: int = 0, mode: int = 0o600
    ) -> Volume:
        """A new volume that shows a sealed layer; a larger `size` reads as zero beyond it."""
        wanted = self.layer(layer_id).size if size is None else size
        if wanted < self.layer(layer_id).size:
            raise BadSize("a clone is at least as large as what it is made of: make it, then shrink it")
        return self.create_volume(name, wanted, uid=uid, gid=gid, mode=mode, parent=layer_id)

    def rollback(self, uuid: bytes, layer_id: int) -> Volume:
        """The volume becomes what that sealed layer holds; what was written since and is not named is gone."""
        volume = self.volume(uuid)
        size = self.layer(layer_id).size
        data_pages = self.count_data_pages(layer_id)
        head = self._new_head(layer_id, size)
        changed = self._change_volume(
            volume, head=head.id, size=size, data_pages=data_pages, mtime_ns=time.time_ns()
        )
        self._drop(volume.head)
        return changed

    def count_data_pages(self, layer_id: int) -> int:
        """Data pages of a sealed chain: known of what was sealed here, counted once, by leaf, of what was received."""
        uncounted: list[Layer] = []
        for layer in self.chain(layer_id):
            if layer.data_pages != catalog.UNCOUNTED:
                break
            uncounted.append(layer)
        for layer in reversed(uncounted):
            count = 0
            if layer.parent:
                end = pages_for(layer.clip)
                count = self.layer(layer.parent).data_pages
                if layer.clip < self.layer(layer.parent).size:
                    count -= self._count_beyond(layer.parent, end)
            for leaf in sorted({*self.present_leaves(layer.id), *self.void_leaves(layer.id)}):
                count += schema.count_data(self.resolve(layer.id, leaf))
                if layer.parent:
                    visible = max(pages_for(layer.clip) - (leaf << LEAF_SHIFT), 0)
                    count -= schema.count_data(self.resolve(layer.parent, leaf)[:visible])
            self.change_layer(layer.id, data_pages=count)
        return self.layer(layer_id).data_pages

    # Removal

    def drop_if_free(self, layer_id: int) -> None:
        """Remove a sealed layer that nothing reaches any more, and so on down its chain."""
        layer = self.layer(layer_id)
        if layer.sealed and not layer.referenced and not layer.doomed:
            self._drop(layer_id)

    def _drop(self, layer_id: int) -> None:
        """Remove a layer that nothing reaches: at once when it is small, else it is doomed."""
        self.forget_voids(layer_id)
        if self.layer(layer_id).leaves > DROP_LEAVES:
            self.change_layer(layer_id, doomed=True)
            self.put_record(schema.DOOMED, catalog.layer_key(layer_id), Value(b""))
            return
        while not self.drop_leaves(layer_id, DROP_LEAVES):
            pass
        self._drop_emptied(layer_id)

    def _drop_emptied(self, layer_id: int) -> None:
        parent = self.layer(layer_id).parent
        self.drop_layer(layer_id)
        if parent:
            self.change_layer(parent, children=self.layer(parent).children - 1)
            self.drop_if_free(parent)

    def reap(self, most: int = DROP_LEAVES) -> bool:
        """Remove up to `most` leaves of a doomed layer; whether there may be more to do."""
        for key, _ in self.scan(schema.DOOMED):
            layer_id = schema.KEY.unpack(key)[0]
            break
        else:
            return False
        if self.drop_leaves(layer_id, most):
            self.delete_record(schema.DOOMED, catalog.layer_key(layer_id))
            self._drop_emptied(layer_id)
        return True

    # Ownership

    def put_ownership(self, record: Ownership) -> None:
        """Store what this store is to a volume. Records are never removed."""
        self.put_record(schema.OWNERSHIP, record.uuid, record)
