"""The format does not change by accident: the worked example of docs/format.md, and a store of every released version.

`python -m tests.golden.test_store_format` prints the example, for the page; `... sample` makes the sample anew, which
only a new format version may do.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.layers import catalog, containers, leaves, schema
from silofs.layers.catalog import Layer, Ownership, Role, Value, Volume
from silofs.layers.containers import BLOCK_PAGES, Block
from silofs.layers.share import share
from silofs.layers.use_records import USER, USER_COUNT, Use
from silofs.limits import GIB, MIB
from tests.storerig import Rig, read_layer
from tests.unit.layers.test_store_packs import load

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = Path(__file__).parent
UUID = bytes(range(16))
CELLS = [0, 9, *range(10, 19)]
"""Of the objects in cells of the sample of version 3: of those that were stored first only two are still needed."""


def dump(title: str, key: bytes, value: bytes, shown: int = 1 << 20) -> Iterator[str]:
    yield f"{title}: key {key.hex()}, {len(value)} bytes"
    for at in range(0, min(len(value), shown), 16):
        yield f"  {at:04x}  {value[at : at + 16].hex(' ')}"
    if len(value) > shown:
        yield "  ...."


def worked_example() -> str:
    """Volume "vm1" of 1 GiB with layer 1 as head: pages 0 to 30 written, then page 40, then pages 2 and 3 discarded.

    Beside it a container with a block as it is, whose page 1 the second leaf of layer 2 refers to twice.
    """
    lines: list[str] = []
    pages = [bytes([number + 1]) * PAGE for number in range(31)]
    lone = bytes(range(256)) * 16
    first, second = schema.KEY.pack(1), schema.KEY.pack(2)
    header = schema.object_header(1, [schema.page_sum(page, 1, slot) for slot, page in enumerate(pages)])
    lines += dump("object 1, its header", first, header, 64)
    lines += dump("name 1", first, schema.object_names(1, 1, range(31))[0][1], 64)
    lines += dump("name 2, of a lone page", second, schema.lone_name(second, 2, 1, 40, lone))

    refs = leaves.HOLES.copy()
    refs[:31] = schema.ref(schema.DATA, 1) + np.arange(31) * schema.SLOT_STEP
    refs[40] = schema.ref(schema.LONE, 2)
    refs[2:4] = schema.HOLE
    place = schema.leaf_key(1, 0)
    leaf = schema.seal_record(schema.LEAF, place, leaves.encode(refs))
    lines += dump("leaf 0 of layer 1", place, leaf)
    sums = np.zeros(schema.SUM_LEAVES, "<u4")
    sums[0] = schema.short_sum(leaf)
    lines += dump("leaf sums 0 of layer 1", place, schema.seal_record(schema.LEAF_SUM, place, sums.tobytes()), 32)
    bitmap = bytes([1]) + bytes(schema.CHUNK_BYTES - 1)
    presence = schema.seal_record(schema.PRESENCE, place, bitmap)
    lines += dump("presence 0 of layer 1", place, presence, 32)
    live = np.zeros(schema.LIVE_OBJECTS, "<u4")
    live[1] = schema.FULL_MASK & ~0b1100
    group = schema.KEY.pack(0)
    lines += dump("live bitmaps 0", group, schema.seal_record(schema.LIVE, group, live.tobytes()), 32)

    chunks = schema.short_sum(presence).to_bytes(4, "little")
    layer = Layer(1, 0, GIB, GIB, leaves=1, chunks=chunks, own_pages=30, mapped=GIB // PAGE)
    volume = Volume(UUID, "vm1", 1, GIB, 2, 10**18, 10**18, 0, 0, 0o600, applied_lsn=7, data_pages=30)
    owner = Ownership(UUID, Role.OWNER, 1, changed_ns=10**18)
    lines += dump("layer 1", first, catalog.encode(schema.LAYER, first, layer))
    lines += dump("volume", UUID, catalog.encode(schema.VOLUME, UUID, volume))
    lines += dump("volume_name", b"vm1", catalog.encode(schema.VOLUME_NAME, b"vm1", Value(UUID)))
    lines += dump("ownership", UUID, catalog.encode(schema.OWNERSHIP, UUID, owner))

    third = schema.KEY.pack(3)
    block = Block(containers.hash_block(0b11, b"".join(pages[:2])), 0b11, b"".join(pages[:2]))
    (pieces,) = containers.place([block])
    lines += dump("container 3, its header", third, containers.container(3, pieces)[: schema.HEADER_BYTES], 80)
    counts = np.zeros(containers.SLOTS, np.int64)
    counts[1] = 2
    use = Use(leaves=1, pages=2, counts=counts)
    lines += dump("use 3", third, schema.seal_record(schema.USE, third, use.payload()), 32)
    user = USER.pack(3, 2, 1)
    lines += dump("user", user, schema.seal_record(schema.USER, user, USER_COUNT.pack(2)))
    found = schema.seal_record(schema.BLOCK, block.hash, containers.PLACE.pack(3, 0))
    lines += dump("block", block.hash, found)
    return "\n".join(lines)


def test_worked_example_is_in_the_docs() -> None:
    assert f"```\n{worked_example()}\n```" in (ROOT / "docs" / "format.md").read_text()


def test_every_table_and_field_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    for table in schema.TABLES:
        assert f"`{table.name}`" in page, table.name
    for record in (Volume, Layer, catalog.Snapshot, Ownership, catalog.Pin, catalog.State):
        fields = ", ".join(f"{name}" for name in record.__struct_fields__)
        assert f"`{record.__name__}`: {fields}" in page, record.__name__


def stamped(page: int, seed: int = 0) -> bytes:
    """A page that says which it is, and packs well."""
    return (page << 8 | seed | 1 << 32).to_bytes(8, "little") * (PAGE // 8)


def fill_sample(rig: Rig) -> None:
    """Something of everything, small: the same in every version."""

    def put(uuid: bytes, pages: Iterable[int], seed: int = 0) -> None:
        for page in pages:
            rig.write(uuid, page * PAGE, stamped(page, seed))
        rig.commit()

    vm = rig.store.write(lambda txn: txn.create_volume("vm", 3 * LEAF_PAGES * PAGE, uuid=UUID)).uuid
    put(vm, [*range(40), LEAF_PAGES, 3 * LEAF_PAGES - 1])
    layer = rig.store.write(lambda txn: txn.take_snapshot(vm, "first").layer)
    put(vm, [1, 2], 1)
    rig.zero(vm, 5, 8)
    rig.commit()
    rig.store.write(lambda txn: txn.resize(vm, 2 * LEAF_PAGES * PAGE + 100))
    other = rig.store.write(lambda txn: txn.clone(layer, "clone", size=GIB)).uuid
    put(other, range(0, 100, 7), 2)
    rig.store.write(lambda txn: txn.put_value("peer", "hostB", b"{}"))
    layer, _ = load(rig, packed_blocks(), size=4 * LEAF_PAGES * PAGE)
    copy = rig.store.write(lambda txn: txn.clone(layer, "packed")).uuid
    rig.store.write(lambda txn: txn.unpin(layer, "test"))
    rig.store.write(lambda txn: share(txn, layer, 1, copy, 600, 40))
    rig.store.write(lambda txn: share(txn, txn.volume(vm).head, 0, copy, 700, 40))
    large = rig.store.write(lambda txn: txn.create_volume("large", LEAF_PAGES * PAGE)).uuid
    put(large, range(300), 3)  # in cells, and some of these are given up
    put(large, range(20, 290), 4)


def packed_blocks() -> bytes:
    """Blocks that pack, twice each, and one that does not."""
    return b"".join(stamped(at // 2, 7) * BLOCK_PAGES for at in range(20)) + random.Random(1).randbytes(16 * PAGE)


def sample_pages(version: int) -> dict[str, dict[int, bytes]]:
    first = {page: stamped(page) for page in [*range(40), LEAF_PAGES, 3 * LEAF_PAGES - 1]}
    vm = {page: data for page, data in first.items() if page not in (5, 6, 7) and page < 2 * LEAF_PAGES}
    vm |= {page: stamped(page, 1) for page in (1, 2)}
    pages = {"vm": vm, "first": first, "clone": first | {page: stamped(page, 2) for page in range(0, 100, 7)}}
    if version >= 2:
        blocks = packed_blocks()
        packed = {at: blocks[at * PAGE : (at + 1) * PAGE] for at in range(len(blocks) // PAGE)}
        shared = {600 + at: packed[1 + at] for at in range(40)}
        pages["packed"] = packed | shared | {700 + page: data for page, data in vm.items() if page < 40}
    if version >= 3:
        pages["large"] = {page: stamped(page, 4 if 20 <= page < 290 else 3) for page in range(300)}
    return pages


def test_samples_of_released_versions_open(tmp_path: Path) -> None:
    samples = sorted(SAMPLES.glob("store-v*.tar.xz"))
    assert samples[-1].name == f"store-v{schema.FORMAT_VERSION}.tar.xz"
    for version, sample in enumerate(samples, 1):
        shutil.unpack_archive(sample, tmp_path)
        stored = sum(path.stat().st_blocks * 512 for path in (tmp_path / "store").rglob("*"))
        assert stored < 16 * MIB, "the file of cells is 1 GiB long, and nearly all of it holes"
        rig = Rig(tmp_path / "store")
        assert rig.findings() == []
        with rig.store.reader() as txn:
            snapshot = txn.find_snapshot(UUID, "first")
            shown = {"first": (snapshot.layer, snapshot.size)}
            shown |= {volume.name: (volume.head, volume.size) for volume in txn.volumes()}
            for name, pages in sample_pages(version).items():
                data = read_layer(txn, shown[name][0], min(shown[name][1], 4 * LEAF_PAGES * PAGE))
                found = {at: data[at * PAGE : (at + 1) * PAGE] for at in range(len(data) // PAGE)}
                assert {at: page for at, page in found.items() if page != bytes(PAGE)} == pages, name
            assert txn.volume(UUID).size == 2 * LEAF_PAGES * PAGE + 100
            assert txn.values("peer") == {"hostB": b"{}"}
            assert [schema.open_cell(key, value) for key, value in txn.scan(schema.CELL)] == (
                CELLS if version >= 3 else []
            )
        rig.put(UUID, range(10), seed=3)
        assert rig.findings() == []
        rig.close()
        shutil.rmtree(tmp_path / "store")


if __name__ == "__main__":
    if sys.argv[1:] == ["sample"]:
        made = Path("store")
        fill_sample(rig := Rig(made))
        rig.close()
        (made / "data" / "lock.mdb").unlink()
        archive = SAMPLES / f"store-v{schema.FORMAT_VERSION}.tar.xz"
        subprocess.run(["tar", "--sparse", "--format=gnu", "--sort=name", "-cJf", archive, made], check=True)
        shutil.rmtree(made)
    else:
        print(worked_example())
