"""What a source's machine asks the store and the engine for: seal, freeze, hash, describe. One function per action.

Each returns the event that answers the action. Long work is a thread's, over a read transaction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import trio

from silofs import failpoints
from silofs.engine import Engine
from silofs.errors import SiloError
from silofs.layers.reader import ReadTxn
from silofs.layers.transaction import WriteTxn
from silofs.limits import RUNS_MAX
from silofs.migrate import events as ev
from silofs.migrate.messages import Base, MapPart, Segment, SegmentDigest, SnapshotInfo
from silofs.peers import content

T = TypeVar("T")


class Threads:
    """Threads for what migrations read, apart from those that serve the mount's reads."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self._engine = engine
        self._limiter = trio.CapacityLimiter(threads)

    async def read(self, job: Callable[[ReadTxn], T]) -> T:
        """`job(transaction)` in a thread. A long one calls `check_cancelled` now and then."""

        def run() -> T:
            reader = self._engine.store.reader()
            try:
                return job(reader)
            finally:
                reader.close()

        return await trio.to_thread.run_sync(run, limiter=self._limiter)


def _tops(txn: WriteTxn, volumes: Iterable[ev.Above]) -> dict[bytes, int]:
    """Seal every head; the id of the newest sealed layer of each."""
    return {above.volume: txn.seal(above.volume).id for above in volumes}


def _describe(
    reader: ReadTxn, tops: dict[bytes, int], volumes: Iterable[ev.Above], round_number: int, with_snapshots: bool
) -> tuple[list[Segment], list[SnapshotInfo]]:
    segments: list[Segment] = []
    snapshots: list[SnapshotInfo] = []
    for above in volumes:
        named = content.snapshot_infos(reader, above.volume) if with_snapshots else []
        cuts = {info.segment for info in named}
        top = tops[above.volume]
        segments += content.segments_above(reader, above.volume, top, above.above, round_number, boundaries=cuts)
        chain = {layer.uuid for layer in reader.chain(top)}
        snapshots += [info for info in named if info.segment in chain]
    return segments, snapshots


async def seal(engine: Engine, threads: Threads, action: ev.Seal) -> ev.Event:
    """Seal the heads, durably; what was written since the last round is the new segments."""
    failpoints.hit("precopy.before_seal")
    tops = await engine.transact(lambda txn: _tops(txn, action.volumes))
    failpoints.hit("precopy.after_seal")

    def describe(reader: ReadTxn) -> ev.Sealed:
        segments, snapshots = _describe(reader, tops, action.volumes, action.round, action.snapshots)
        offered = tuple(content.offered(reader, above.volume) for above in action.volumes)
        return ev.Sealed(action.token, tuple(segments), tuple(snapshots), offered)

    return await threads.read(describe)


async def freeze(engine: Engine, threads: Threads, action: ev.Freeze) -> ev.Event:
    """The volumes are frozen already (by the caller, in the step that performs the action): commit, seal, describe."""
    tops = await engine.transact(lambda txn: _tops(txn, action.volumes))
    failpoints.hit("freeze.after_seal")

    def describe(reader: ReadTxn) -> ev.Frozen:
        segments, snapshots = _describe(reader, tops, action.volumes, action.round, action.snapshots)
        heads = tuple(Base(above.volume, reader.layer(tops[above.volume]).uuid) for above in action.volumes)
        finals = {head.base for head in heads}
        maps: list[MapPart] = []
        room = RUNS_MAX
        for segment in segments:
            if segment.uuid in finals and room >= 512:
                part = content.map_part(reader, segment, 0, runs_max=room)
                maps.append(part)
                room -= len(part.runs)
        lsns = tuple(reader.volume(above.volume).applied_lsn for above in action.volumes)
        offered = tuple(content.offered(reader, above.volume) for above in action.volumes)
        return ev.Frozen(action.token, tuple(segments), tuple(snapshots), offered, heads, lsns, tuple(maps), writers=0)

    frozen = await threads.read(describe)
    writers = sum(engine.writers(above.volume) for above in action.volumes)
    return ev.Frozen(
        frozen.token,
        frozen.segments,
        frozen.snapshots,
        frozen.offered,
        frozen.heads,
        frozen.last_lsns,
        frozen.maps,
        writers,
    )


async def digests(
    threads: Threads, token: int, bases: tuple[Base, ...], segments: tuple[Segment, ...], *, lost: bool
) -> ev.Event:
    """Hash every base's chain and every segment. `lost`: also count the pages that were given up in the segments."""

    def work(reader: ReadTxn) -> ev.DigestsReady:
        found: list[SegmentDigest] = []
        for digest in content.digests(reader, bases, segments):
            trio.from_thread.check_cancelled()
            if digest is not None:
                found.append(digest)
        count = content.lost_pages(reader, segments) if lost else 0
        return ev.DigestsReady(token, tuple(found), count)

    return await threads.read(work)


async def describe(threads: Threads, action: ev.Describe) -> ev.Event:
    """The ceded chains anew, as segments over other bases."""

    def work(reader: ReadTxn) -> ev.Described:
        bases = {base.volume: base.base for base in action.bases}
        segments: list[Segment] = []
        for head in action.heads:
            layer = reader.layer_by_uuid(head.base)
            if layer is None:
                raise SiloError("the layer that was ceded is gone")
            cuts = {info.segment for info in action.snapshots if info.volume == head.volume}
            segments += content.segments_above(reader, head.volume, layer.id, bases[head.volume], 1, boundaries=cuts)
        finals = {head.base for head in action.heads}
        maps = tuple(
            content.map_part(reader, segment, 0, runs_max=max(512, RUNS_MAX // len(finals)))
            for segment in segments
            if segment.uuid in finals
        )
        return ev.Described(action.token, action.bases, tuple(segments), maps)

    return await threads.read(work)
