"""What the store says about segments: which there are, their maps, what is missing of them, and their digests.

Everything here is synchronous over a read transaction, for threads: no event loop, no network. A segment is the slice
of a chain from a sealed layer down to, excluding, its parent's layer (docs/protocol.md, "What travels").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from silofs.blocks import LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, PAGE, pages_for
from silofs.errors import Damaged
from silofs.layers import schema
from silofs.layers.catalog import Layer, Volume
from silofs.layers.digest import segment_digest
from silofs.layers.reader import ReadTxn
from silofs.limits import RUNS_MAX, STATES_MAX
from silofs.migrate.messages import (
    Base,
    MapPart,
    MapRun,
    Offered,
    PageKind,
    Run,
    Segment,
    SegmentDigest,
    SnapshotInfo,
)

MAP_LEAVES_MAX = 8192  # leaves that one part of a map looks at (16 GiB of volume), so that no part takes long
_KINDS = {
    schema.DATA: PageKind.DATA,
    schema.ZERO: PageKind.ZERO,
    schema.LOST: PageKind.LOST,
}


class NotHere(Exception):
    """The segment's layers are not in this store (any more)."""


def slice_of(reader: ReadTxn, segment: Segment) -> tuple[int, int]:
    """(layer id of the segment, layer id of its parent or 0). NotHere if one of them is gone."""
    layer = reader.layer_by_uuid(segment.uuid)
    parent = reader.layer_by_uuid(segment.parent) if segment.parent else None
    if layer is None or (segment.parent and parent is None):
        raise NotHere(segment.uuid.hex())
    return layer.id, parent.id if parent is not None else 0


def offered(reader: ReadTxn, uuid: bytes) -> Offered:
    """What an OFFER says of a volume. `states` are its complete sealed layers, newest first."""
    volume = reader.volume(uuid)
    sealed = [layer.uuid for layer in reader.chain(volume.head) if layer.uuid]
    return Offered(uuid, volume.name, volume.size, volume.data_pages, tuple(sealed[:STATES_MAX]))


def snapshot_infos(reader: ReadTxn, uuid: bytes) -> list[SnapshotInfo]:
    """The volume's named snapshots, as they travel."""
    return [
        SnapshotInfo(uuid, snap.name, reader.layer(snap.layer).uuid, snap.size, snap.created_ns)
        for snap in reader.snapshots(uuid)
    ]


def passed_over(reader: ReadTxn, uuid: bytes) -> list[str]:
    """Snapshots that a rollback has left behind, as vm1@daily: they are on no chain that travels."""
    volume = reader.volume(uuid)
    chain = {layer.id for layer in reader.chain(volume.head)}
    return [f"{volume.name}@{snap.name}" for snap in reader.snapshots(uuid) if snap.layer not in chain]


def segments_above(
    reader: ReadTxn, uuid: bytes, top: int, above: bytes, round_number: int, *, boundaries: Iterable[bytes] = ()
) -> list[Segment]:
    """The segments from the layer `above` (b"": the bottom) up to the sealed layer `top`, parents before children.

    Each layer named in `boundaries` ends a segment, so that it can be named at the destination as well.
    """
    cuts = set(boundaries)
    slices: list[list[Layer]] = []
    for layer in reader.chain(top):
        if above and layer.uuid == above:
            break
        if not slices or layer.uuid in cuts:
            slices.append([])
        slices[-1].append(layer)
    else:
        if above:
            raise NotHere(above.hex())
    segments: list[Segment] = []
    parent, parent_id = above, 0
    if above:
        below = reader.layer_by_uuid(above)
        assert below is not None
        parent_id = below.id
    for part in reversed(slices):
        newest = part[0]
        clip = min(layer.clip for layer in part)
        pages = newest.own_pages + newest.remote_pages + newest.lost_pages
        if len(part) > 1:
            pages = count_pages(reader, newest.id, parent_id)
        segments.append(Segment(uuid, newest.uuid, parent, newest.size, clip, pages, round_number))
        parent, parent_id = newest.uuid, newest.id
    return segments


def count_pages(reader: ReadTxn, layer: int, above: int) -> int:
    """Pages of a slice that are neither hole nor zero."""
    return sum(
        int(np.count_nonzero(reader.resolve(layer, leaf, above=above) > schema.ZERO))
        for leaf in reader.chain_leaves(layer, above=above)
    )


def map_part(reader: ReadTxn, segment: Segment, first: int, *, runs_max: int = RUNS_MAX) -> MapPart:
    """The segment's map from page `first` (a leaf's first page) on: at most `runs_max` runs. NotHere."""
    layer, above = slice_of(reader, segment)
    end = pages_for(segment.size)
    runs: list[tuple[int, int, PageKind]] = []
    for seen, leaf in enumerate(reader.chain_leaves(layer, first >> LEAF_SHIFT, above=above)):
        start = leaf << LEAF_SHIFT
        if start >= end:
            break
        if len(runs) + LEAF_PAGES > runs_max or seen >= MAP_LEAVES_MAX:
            return MapPart(segment.uuid, first, start, tuple(MapRun(*run) for run in runs))
        for at, count, kind in _leaf_runs(reader.resolve(layer, leaf, above=above), bottom=not above):
            page, count = start + at, min(count, end - start - at)
            if count <= 0:
                break
            if runs and runs[-1][0] + runs[-1][1] == page and runs[-1][2] == kind:
                runs[-1] = (runs[-1][0], runs[-1][1] + count, kind)
            else:
                runs.append((page, count, kind))
    return MapPart(segment.uuid, first, None, tuple(MapRun(*run) for run in runs))


def _leaf_runs(refs: schema.Refs, *, bottom: bool) -> Iterator[tuple[int, int, PageKind]]:
    kinds = (refs & np.uint64(schema.KIND_MASK)).astype(np.uint8)
    kinds[schema.stored(refs)] = schema.DATA
    if bottom:  # nothing is below: zero and hole read the same
        kinds[kinds == schema.ZERO] = schema.HOLE
    if (kinds == schema.REMOTE).any():
        raise Damaged("a segment with pages that are still at a peer cannot be sent")
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for start, stop in itertools.pairwise(edges):
        if kinds[start]:
            yield start, stop - start, _KINDS[int(kinds[start])]


def missing_runs(
    reader: ReadTxn, uuid: bytes, first: int, pages_max: int, runs_max: int
) -> tuple[list[Run], int | None]:
    """(remote pages of the segment's layer from `first` on, next page to ask from or None at the end)."""
    layer = reader.layer_by_uuid(uuid)
    if layer is None:
        raise NotHere(uuid.hex())
    runs: list[Run] = []
    left = pages_max
    if not layer.remote_pages:
        return [], None
    for leaf in reader.present_leaves(layer.id, first >> LEAF_SHIFT):
        for start, stop in reader.missing(layer.id, leaf, leaf + 1):
            begin = max(start, first)
            if begin >= stop:
                continue
            count = min(stop - begin, left)
            if len(runs) == runs_max and (not runs or runs[-1].end != begin):
                return runs, begin
            if runs and runs[-1].end == begin:
                runs[-1] = Run(runs[-1].first, runs[-1].count + count)
            else:
                runs.append(Run(begin, count))
            left -= count
            if not left:
                return runs, begin + count
    return runs, None


def common_state(reader: ReadTxn, states: Iterable[bytes]) -> bytes:
    """The first of the states that is complete here down to its bottom; b"" if none is."""
    for uuid in states:
        layer = reader.layer_by_uuid(uuid)
        if layer is not None and layer.sealed and all(part.complete for part in reader.chain(layer.id)):
            return uuid
    return b""


def digests(
    reader: ReadTxn, bases: Iterable[Base], segments: Iterable[Segment], renew_every: int = 64
) -> Iterator[SegmentDigest | None]:
    """The digest of each base's whole chain, then of each segment; None now and then between leaves, so that the
    caller can stop, and the transaction is renewed there: what is hashed never changes, only its place does.
    Damaged for a page that cannot be read; NotHere."""
    for base in bases:
        if base.base:
            layer = reader.layer_by_uuid(base.base)
            if layer is None:
                raise NotHere(base.base.hex())
            yield from _digest(reader, base.base, layer.id, 0, renew_every)
    for segment in segments:
        yield from _digest(reader, segment.uuid, *slice_of(reader, segment), renew_every)


def _digest(reader: ReadTxn, uuid: bytes, layer: int, above: int, renew_every: int) -> Iterator[SegmentDigest | None]:
    part = reader.segment(layer, above)
    hashed: list[tuple[int, bytes]] = []
    leaves = list(reader.chain_leaves(layer, above=above))
    for number, leaf in enumerate(leaves):
        digest = reader.leaf_digest(layer, leaf, above=above)
        if digest is not None:
            hashed.append((leaf, digest))
        if number % renew_every == renew_every - 1:
            yield None
            reader.renew()
    yield SegmentDigest(uuid, segment_digest(part.size, part.clip, hashed))


def lost_pages(reader: ReadTxn, segments: Iterable[Segment]) -> int:
    """Pages of the segments that were given up as unreadable."""
    found = (reader.layer_by_uuid(segment.uuid) for segment in segments)
    return sum(layer.lost_pages for layer in found if layer is not None)


def remote_pages(reader: ReadTxn, uuid: bytes) -> int:
    """Pages of a volume's chain that are still at a peer."""
    return sum(layer.remote_pages for layer in reader.chain(reader.volume(uuid).head))


def dependents(reader: ReadTxn, segments: Iterable[Segment], group: Iterable[bytes]) -> list[str]:
    """Names of the volumes outside the group that reach pages of these segments that are still at a peer."""
    found = (reader.layer_by_uuid(segment.uuid) for segment in segments)
    missing = {layer.id for layer in found if layer is not None and layer.remote_pages}
    others = [volume for volume in reader.volumes() if volume.uuid not in set(group)] if missing else []
    return [volume.name for volume in others if not missing.isdisjoint(_reached(reader, volume))]


def _reached(reader: ReadTxn, volume: Volume) -> set[int]:
    tops = [volume.head, *(snap.layer for snap in reader.snapshots(volume.uuid))]
    return {layer.id for top in tops for layer in reader.chain(top)}


def read_layer(reader: ReadTxn, layer: int, offset: int, length: int) -> bytes:
    """Bytes of a sealed layer's chain, clamped to its size. Damaged."""
    length = min(length, reader.layer(layer).size - offset)
    if length <= 0:
        return b""
    first, end = offset // PAGE, pages_for(offset + length)
    data = bytearray()
    for page in range(first, end):
        refs = reader.resolve(layer, page >> LEAF_SHIFT)
        data += reader.page(int(refs[page & LEAF_MASK]))
    start = offset - first * PAGE
    return bytes(data[start : start + length])
