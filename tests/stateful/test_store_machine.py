"""The store against the reference: random operations, power cuts and restarts, and `check` finds nothing at the end."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from silofs.blocks import LEAF_BYTES, LEAF_PAGES, PAGE, pages_for
from silofs.layers import cell_changes, cell_map, cells, heads, reclaim, schema, writer
from silofs.layers.aged import Pack
from silofs.layers.clean import Clean
from silofs.layers.merge import MergeLayers
from silofs.layers.policies import drain
from silofs.layers.reader import ReadTxn
from silofs.layers.reclaim import Reclaim
from silofs.layers.repack import Repack
from silofs.layers.rewrite import Budget, Reap, take
from silofs.layers.share import share
from silofs.layers.transaction import WriteTxn
from silofs.packing import BlockWriter
from tests.reference import Reference, nonzero_pages
from tests.storerig import Rig, page_bytes, read_layer

SIZE_MAX = 2 * LEAF_BYTES + 5 * PAGE
SIZES = st.sampled_from(
    [0, 100, PAGE, 5 * PAGE, LEAF_BYTES - PAGE, LEAF_BYTES, LEAF_BYTES + 512, LEAF_BYTES + 40 * PAGE + 1000, SIZE_MAX]
)
NAMES = ["a", "b", "c", "d"]
PAGES = st.one_of(st.integers(0, 8), st.integers(500, 524), st.integers(1020, 1030))


def packable(kind: int) -> bytes:
    """A block of 64 KiB that packs well; there are few."""
    return b"".join((f"{kind}.{at} ".encode() * PAGE)[:PAGE] for at in range(16))


class StoreMachine(RuleBasedStateMachine):
    """Writes wait in the rig and in `waiting` until a commit gives them to the store and to the reference."""

    def __init__(self) -> None:
        super().__init__()
        shm = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(dir=shm if shm.is_dir() else None))
        self.rig = Rig(self.path)
        self.reference = Reference()
        self.waiting: list[tuple[str, str, Any, Any]] = []
        self.seed = 0
        self.merging = MergeLayers()

    @initialize(size=SIZES)
    def first(self, size: int) -> None:
        self.create(max(size, PAGE))

    def uuid(self, name: str) -> bytes:
        with self.rig.store.reader() as txn:
            return txn.volume_by_name(name).uuid

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.reference.volumes)))

    def apply_waiting(self, then: Any = None) -> None:
        """Commit: the store takes what is pending and `then` in one transaction."""
        result = self.rig.commit(then)
        for kind, name, first, second in self.waiting:
            getattr(self.reference.volumes[name], kind)(first, second)
        self.waiting = []
        with self.rig.store.reader() as txn:
            for uuid, committed in result.volumes.items():
                if committed.record is None:
                    continue
                for leaf, refs in committed.leaves.items():
                    if then is None:
                        assert np.array_equal(refs, txn.resolve(committed.record.head, leaf)), (uuid, leaf)

    def free_name(self) -> str | None:
        return next((name for name in NAMES if name not in self.reference.volumes), None)

    # Data

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), page=PAGES, count=st.sampled_from([1, 2, 5, 16, 31, 33, 70]))
    def write_pages(self, data: st.DataObject, page: int, count: int) -> None:
        name = self.pick(data)
        self.seed += 1
        content = b"".join(page_bytes(page + index, self.seed) for index in range(count))
        self.write(name, page * PAGE, content)

    @precondition(lambda self: self.reference.volumes)
    @rule(
        data=st.data(),
        page=PAGES,
        start=st.integers(0, PAGE - 1),
        length=st.integers(1, 3 * PAGE),
        zero=st.booleans(),
    )
    def write_bytes(self, data: st.DataObject, page: int, start: int, length: int, zero: bool) -> None:
        self.seed += 1
        content = bytes(length) if zero else (page_bytes(page, self.seed) * 4)[:length]
        self.write(self.pick(data), page * PAGE + start, content)

    def write(self, name: str, offset: int, content: bytes) -> None:
        size = len(self.reference.volumes[name].data)
        content = content[: max(0, size - offset)]
        if content:
            self.rig.write(self.uuid(name), offset, content)
            self.waiting.append(("write", name, offset, content))

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), page=PAGES, count=st.sampled_from([1, 3, 100, 512, 2000]))
    def zero(self, data: st.DataObject, page: int, count: int) -> None:
        name = self.pick(data)
        self.rig.zero(self.uuid(name), page, page + count)
        self.waiting.append(("zero", name, page, page + count))

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), block=st.integers(0, 66), count=st.sampled_from([1, 3, 8]), kind=st.integers(0, 2))
    def write_blocks(self, data: st.DataObject, block: int, count: int, kind: int) -> None:
        """What packs well, and is often there already."""
        self.write(self.pick(data), block * 16 * PAGE, b"".join(packable(kind + at % 3) for at in range(count)))

    @rule()
    def commit(self) -> None:
        self.apply_waiting()

    # Volumes

    @precondition(lambda self: self.free_name())
    @rule(size=SIZES)
    def create(self, size: int) -> None:
        name = self.free_name()
        assert name is not None
        self.rig.store.write(lambda txn: txn.create_volume(name, size))
        self.reference.create(name, size)

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), size=SIZES)
    def resize(self, data: st.DataObject, size: int) -> None:
        name = self.pick(data)
        uuid = self.uuid(name)
        self.apply_waiting(lambda txn: txn.resize(uuid, size))
        self.reference.volumes[name].resize(size)

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), snapshot=st.sampled_from(["s1", "s2", "s3"]))
    def snapshot(self, data: st.DataObject, snapshot: str) -> None:
        name = self.pick(data)
        if snapshot not in self.reference.volumes[name].snapshots:
            uuid = self.uuid(name)
            self.apply_waiting(lambda txn: txn.take_snapshot(uuid, snapshot))
            self.reference.snapshot(name, snapshot)

    def snapshots(self) -> list[tuple[str, str]]:
        return sorted((name, each) for name, volume in self.reference.volumes.items() for each in volume.snapshots)

    @precondition(lambda self: self.snapshots())
    @rule(data=st.data())
    def remove_snapshot(self, data: st.DataObject) -> None:
        name, snapshot = data.draw(st.sampled_from(self.snapshots()))
        uuid = self.uuid(name)
        self.rig.store.write(lambda txn: txn.remove_snapshot(uuid, snapshot))
        del self.reference.volumes[name].snapshots[snapshot]

    @precondition(lambda self: self.snapshots() and self.free_name())
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        name, snapshot = data.draw(st.sampled_from(self.snapshots()))
        uuid, new = self.uuid(name), self.free_name()
        assert new is not None
        self.rig.store.write(lambda txn: txn.clone(txn.find_snapshot(uuid, snapshot).layer, new))
        self.reference.clone(name, snapshot, new)

    @precondition(lambda self: self.snapshots())
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        name, snapshot = data.draw(st.sampled_from(self.snapshots()))
        uuid = self.uuid(name)
        self.apply_waiting(lambda txn: txn.rollback(uuid, txn.find_snapshot(uuid, snapshot).layer))
        self.reference.rollback(name, snapshot)

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.pick(data)
        uuid = self.uuid(name)
        self.apply_waiting(lambda txn: txn.delete_volume(uuid))
        self.reference.delete(name)

    # Background work

    @rule(steps=st.sampled_from([1, 2, 50]))
    def clean(self, steps: int) -> None:
        """As hard as it can: nothing that anybody reads may change."""
        policy = Clean(self.rig.store.usage, at=1.0, slack=0, lone_age=0, lone_batch=31)
        for _ in range(steps):
            if not self.rig.store.step(policy).result().more:
                break

    @rule(steps=st.sampled_from([1, 2, 5, 50]), leaves=st.sampled_from([1, 2, 256]))
    def merge(self, steps: int, leaves: int) -> None:
        """Layers of removed snapshots, leaf by leaf, and so with whatever comes in between."""
        for _ in range(steps):
            stepped = self.rig.store.submit(lambda txn: take(self.merging, txn, Budget(leaves=leaves))).result()
            if not stepped.more:
                break

    @rule()
    def reap(self) -> None:
        drain(self.rig.store, [Reap()])

    # Packing and sharing

    @rule()
    def pack(self) -> None:
        drain(self.rig.store, [Pack(age_s=0, look_s=0), Repack(look_s=0)])

    @precondition(lambda self: self.free_name())
    @rule(seed=st.integers(0, 2), blocks=st.sampled_from([3, 20, 60]), first=st.sampled_from([0, 16, 5]))
    def load(self, seed: int, blocks: int, first: int) -> None:
        name, size = self.free_name(), SIZE_MAX
        assert name is not None
        content = b"".join(packable(seed + at) if at % 3 else page_bytes(at, seed) * 16 for at in range(blocks))
        content = content[: size - first * PAGE]

        def begin(txn: WriteTxn) -> int:
            layer = txn.receive_layer(uuid4().bytes, 0, size, size)
            txn.pin(layer.id, "test")
            txn.put_map(layer.id, [], mapped=pages_for(size))
            return layer.id

        layer = self.rig.store.write(begin)
        with BlockWriter(self.rig.store, layer) as writer:
            writer.add(first, content)
        self.rig.store.write(lambda txn: (txn.clone(layer, name), txn.unpin(layer, "test")))
        self.reference.create(name, size)
        self.reference.volumes[name].write(first * PAGE, content)

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), first=PAGES, to=PAGES, count=st.sampled_from([1, 20, 40, 512, 900]))
    def share(self, data: st.DataObject, first: int, to: int, count: int) -> None:
        source, target = self.pick(data), self.pick(data)
        one, two = self.uuid(source), self.uuid(target)
        count = min(count, pages_for(SIZE_MAX) - to)
        self.apply_waiting()
        count = min(count, len(self.reference.volumes[source].data) // PAGE - first)
        if count <= 0:
            return
        content = bytes(self.reference.volumes[source].data[first * PAGE : (first + count) * PAGE])
        done = self.rig.commit(lambda txn: share(txn, txn.volume(one).head, first, two, to, count)).value
        assert done == count
        volume = self.reference.volumes[target]
        volume.resize(max(len(volume.data), (to + count) * PAGE))
        volume.write(to * PAGE, content)

    @rule(steps=st.sampled_from([1, 3]), leaves=st.sampled_from([1, 64]))
    def reclaim(self, steps: int, leaves: int) -> None:
        """Settling what was made void changes nothing that anybody reads."""
        for _ in range(steps):
            self.rig.store.submit(lambda txn: Reclaim().step(txn, Budget(leaves=leaves))).result()

    # Restarts

    @rule()
    def power_cut(self) -> None:
        """What waited for a commit is gone; nothing else is."""
        self.rig.pendings = {}
        self.waiting = []
        self.rig.reopen()
        self.merging = MergeLayers()

    # What must hold

    @invariant()
    def agrees(self) -> None:
        with self.rig.store.reader() as txn:
            assert sorted(volume.name for volume in txn.volumes()) == sorted(self.reference.volumes)
            for volume in txn.volumes():
                expected = self.reference.volumes[volume.name]
                assert volume.size == len(expected.data)
                assert read_layer(txn, volume.head, volume.size) == expected.data, volume.name
                assert nonzero_pages(expected.data) <= volume.data_pages <= pages_for(volume.size)
                snapshots = {each.name: each for each in txn.snapshots(volume.uuid)}
                assert snapshots.keys() == expected.snapshots.keys()
                for name, content in expected.snapshots.items():
                    assert read_layer(txn, snapshots[name].layer, snapshots[name].size) == content, (volume.name, name)

    def teardown(self) -> None:
        try:
            assert self.rig.findings() == []
            for name in sorted(self.reference.volumes):
                uuid = self.uuid(name)
                self.rig.store.write(lambda txn, uuid=uuid: txn.delete_volume(uuid))
            drain(self.rig.store, [Reap()])
            assert self.rig.findings() == []
            with self.rig.store.reader() as txn:
                for table in (
                    schema.OBJECT, schema.CELL, schema.PAGES, schema.NAME, schema.LIVE, schema.LEAF, schema.LEAF_SUM,
                    schema.CONTAINER, schema.USE, schema.USER, schema.BLOCK, schema.VOID,
                ):  # fmt: skip
                    assert not list(txn.scan_keys(table)), table.name
                assert txn.layers() == []
        finally:
            self.rig.close()
            shutil.rmtree(self.path)


class VoidMachine(StoreMachine):
    """The same with every whole leaf that is zeroed made void."""

    def __init__(self) -> None:
        self.void_leaves, heads.VOID_LEAVES = heads.VOID_LEAVES, 0
        self.batch, reclaim.BATCH = reclaim.BATCH, 1
        super().__init__()

    @initialize()
    def large(self) -> None:
        self.create(SIZE_MAX)

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), pages=st.sampled_from([[0], [513], [7, 600, 1022], [511, 512, 1025]]))
    def spread(self, data: st.DataObject, pages: list[int]) -> None:
        name = self.pick(data)
        for page in pages:
            self.seed += 1
            self.write(name, page * PAGE, page_bytes(page, self.seed))

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), first=st.sampled_from([0, 1]), count=st.sampled_from([1, 2]), edge=st.sampled_from([0, 3]))
    def zero_leaves(self, data: st.DataObject, first: int, count: int, edge: int) -> None:
        name = self.pick(data)
        start, end = max(0, first * LEAF_PAGES - edge), (first + count) * LEAF_PAGES + edge
        self.rig.zero(self.uuid(name), start, end)
        self.waiting.append(("zero", name, start, end))

    @invariant()
    def sound(self) -> None:
        assert self.rig.findings(read_data=False) == []

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            heads.VOID_LEAVES, reclaim.BATCH = self.void_leaves, self.batch


class CellMachine(StoreMachine):
    """The same with every object in a cell, few free cells that keep their blocks, and readers of older states."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(cell_changes, "CELL_OBJECTS_MIN", 1)
        self.patch.setattr(writer, "CELLS_KEPT", 2)
        self.patch.setattr(cell_map, "STRIDE", 3)
        self.readers: list[tuple[ReadTxn, dict[str, bytes]]] = []
        super().__init__()

    @precondition(lambda self: self.reference.volumes and len(self.readers) < 3)
    @rule()
    def begin_to_read(self) -> None:
        now = {name: bytes(volume.data) for name, volume in self.reference.volumes.items()}
        self.readers.append((self.rig.store.reader(), now))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end_to_read(self, data: st.DataObject) -> None:
        reader, _ = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        reader.close()

    @precondition(lambda self: self.reference.volumes)
    @rule(data=st.data(), error=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def cells_fail(self, data: st.DataObject, error: int) -> None:
        """For one commit."""

        def fail(*_: object) -> None:
            raise OSError(error, "the disk fails")

        self.write_pages_of(self.pick(data))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cells, "write_cells", fail)
            self.apply_waiting()
        self.rig.store._environment.cells._again = 0.0  # it is a minute later

    def write_pages_of(self, name: str) -> None:
        self.seed += 1
        self.write(name, 0, b"".join(page_bytes(page, self.seed) for page in range(40)))

    @rule()
    def power_cut(self) -> None:
        self.readers = []
        super().power_cut()

    @invariant()
    def older_states_are_as_they_were(self) -> None:
        for reader, then in self.readers:
            found = {each.name: read_layer(reader, each.head, each.size) for each in reader.volumes()}
            assert found == then

    @invariant()
    def cells_are_in_one_state(self) -> None:
        free = self.rig.store._environment.free_cells
        with self.rig.store.reader() as txn:
            used = [schema.open_cell(key, value) for key, value in txn.scan(schema.CELL)]
        assert free is not None and free.cells == free.free + free.waiting + len(used)
        assert len(set(used)) == len(used)

    def teardown(self) -> None:
        try:
            for reader, _ in self.readers:
                reader.close()
            super().teardown()
        finally:
            self.patch.undo()


TestVoids = VoidMachine.TestCase
TestCells = CellMachine.TestCase
TestStore = StoreMachine.TestCase
TestStore.settings = TestVoids.settings = settings(
    max_examples=80,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)
TestCells.settings = settings(TestStore.settings, max_examples=30)
