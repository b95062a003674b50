"""What a diff of two layers says, against the bytes; and that it looks at nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from silofs.blocks import LEAF_BYTES, LEAF_PAGES, PAGE
from silofs.layers import diff, schema
from silofs.layers.reader import ReadTxn
from tests.storerig import Rig, page_bytes, read_layer

SIZE = 5 * LEAF_BYTES


def differences(txn: ReadTxn, old: int, new: int) -> dict[int, int]:
    """page -> kind"""
    found = {}
    for leaf in diff.suspects(txn, old, new):
        for first, count, kind in diff.runs(txn, old, new, leaf):
            found |= dict.fromkeys(range(first, first + count), kind)
    return found


def expected(before: bytes, after: bytes) -> dict[int, int]:
    """The pages whose bytes differ, as far as the newer size goes."""
    before = before[: len(after)].ljust(len(after), b"\0")
    found = {}
    for page in range(-(-len(after) // PAGE)):
        now = after[page * PAGE : (page + 1) * PAGE]
        if now != before[page * PAGE : (page + 1) * PAGE]:
            found[page] = schema.DATA if any(now) else schema.ZERO
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_two_states_against_their_bytes(tmp_path: Path, seed: int) -> None:
    """Writes, discards, resizes, rollbacks and clones at random; every pair of snapshots is compared."""
    rig, rng = Rig(tmp_path / "store"), random.Random(seed)
    vm1 = rig.store.write(lambda txn: txn.create_volume("vm1", SIZE)).uuid
    volumes, snapshots, serial = [vm1], [], 0
    for step in range(40):
        uuid = rng.choice(volumes)
        with rig.store.reader() as txn:
            size = txn.volume(uuid).size
        what = rng.randrange(10)
        if what < 5:
            for _ in range(rng.randrange(1, 20)):
                page = rng.randrange(max(1, size // PAGE))
                serial += 1
                data = bytes(PAGE) if rng.random() < 0.2 else page_bytes(page, serial)
                rig.write(uuid, page * PAGE, data)
            rig.commit()
        elif what == 5:
            first = rng.randrange(max(1, size // PAGE))
            rig.zero(uuid, first, min(size // PAGE, first + rng.randrange(1, 900)))
            rig.commit()
        elif what == 6:
            wanted = rng.randrange(8, SIZE // 512) * 512
            rig.store.write(lambda txn, uuid=uuid, wanted=wanted: txn.resize(uuid, wanted))
        elif what == 7 and snapshots:
            layer = rng.choice(snapshots)
            rig.store.write(lambda txn, uuid=uuid, layer=layer: txn.rollback(uuid, layer))
        elif what == 8 and snapshots and len(volumes) < 4:
            layer, name = rng.choice(snapshots), f"c{step}"
            volumes.append(rig.store.write(lambda txn, layer=layer, name=name: txn.clone(layer, name)).uuid)
        else:
            name = f"s{step}"
            snapshots.append(rig.store.write(lambda txn, uuid=uuid, n=name: txn.take_snapshot(uuid, n)).layer)
    snapshots = sorted(set(snapshots))
    with rig.store.reader() as txn:
        content = {layer: read_layer(txn, layer, txn.layer(layer).size) for layer in snapshots}
        for old in snapshots:
            for new in snapshots:
                wanted, found = expected(content[old], content[new]), differences(txn, old, new)
                # A page that was written again as it was is reported as well; nothing that changed is left out.
                assert {page: found.get(page) for page in wanted} == wanted
                for page in found.keys() - wanted.keys():
                    assert any(content[new][page * PAGE : (page + 1) * PAGE])
    rig.close()


def test_only_what_was_written_is_looked_at(tmp_path: Path) -> None:
    """A volume of 1 TiB with many leaves, of which two changed: two leaves are resolved."""
    rig = Rig(tmp_path / "store")
    uuid = rig.store.write(lambda txn: txn.create_volume("vm1", 1 << 40)).uuid
    rig.put(uuid, range(0, 300 * LEAF_PAGES, LEAF_PAGES))
    old = rig.store.write(lambda txn: txn.take_snapshot(uuid, "a")).layer
    far = (1 << 40) // PAGE - 1
    rig.put(uuid, [7 * LEAF_PAGES, far], seed=1)
    new = rig.store.write(lambda txn: txn.take_snapshot(uuid, "b")).layer
    with rig.store.reader() as txn:
        assert diff.suspects(txn, old, new) == [7, far // LEAF_PAGES]
        assert diff.suspects(txn, new, old) == [7, far // LEAF_PAGES]
        assert differences(txn, old, new) == {7 * LEAF_PAGES: schema.DATA, far: schema.DATA}
        assert diff.suspects(txn, old, old) == []
    rig.close()


def test_what_a_shrunk_size_cut_off(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "store")
    uuid = rig.store.write(lambda txn: txn.create_volume("vm1", SIZE)).uuid
    rig.put(uuid, [0, 3 * LEAF_PAGES, 4 * LEAF_PAGES])
    old = rig.store.write(lambda txn: txn.take_snapshot(uuid, "a")).layer
    rig.store.write(lambda txn: txn.resize(uuid, 2 * LEAF_BYTES))
    short = rig.store.write(lambda txn: txn.take_snapshot(uuid, "b")).layer
    rig.store.write(lambda txn: txn.resize(uuid, SIZE))
    long = rig.store.write(lambda txn: txn.take_snapshot(uuid, "c")).layer
    with rig.store.reader() as txn:
        assert differences(txn, old, short) == {}  # beyond its end there is nothing to differ
        assert differences(txn, old, long) == {3 * LEAF_PAGES: schema.ZERO, 4 * LEAF_PAGES: schema.ZERO}
        assert differences(txn, short, old) == {3 * LEAF_PAGES: schema.DATA, 4 * LEAF_PAGES: schema.DATA}
    rig.close()
