"""A store small enough to copy: layers of a few pages, what is synced and what only the operating system has.

`cache` is what the process and its successor see; it survives SIGKILL. `disk` is what a power cut leaves. A commit that
fails may have reached neither or the first. Page values are write numbers (>= 1); negative ones are states.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from silofs.migrate import messages as ms
from silofs.migrate.events import Commit
from silofs.migrate.states import MigrationRecord, Ownership, Role, Side

ZERO, REMOTE, LOST = 0, -1, -2
PAGES = 6  # of a volume
SIZE = PAGES * 4096

Pages = dict[int, int]


@dataclass(frozen=True)
class Layer:
    parent: bytes
    pages: Pages  # never changed in place


@dataclass
class State:
    """One consistent state of a store."""

    layers: dict[bytes, Layer] = field(default_factory=dict)
    heads: dict[bytes, Layer] = field(default_factory=dict)
    snapshots: dict[bytes, dict[str, bytes]] = field(default_factory=dict)
    own: dict[bytes, Ownership] = field(default_factory=dict)
    migrations: dict[bytes, MigrationRecord] = field(default_factory=dict)

    def copy(self) -> State:
        names = {volume: dict(named) for volume, named in self.snapshots.items()}
        return State(dict(self.layers), dict(self.heads), names, dict(self.own), dict(self.migrations))

    def ownership(self, volume: bytes) -> Ownership:
        return self.own.get(volume, Ownership(volume, Role.NONE, 0))

    def chain(self, uuid: bytes, above: bytes = b"") -> list[bytes]:
        """Layers from `uuid` down to, excluding, `above`."""
        found = []
        while uuid != above:
            found.append(uuid)
            uuid = self.layers[uuid].parent
        return found

    def flatten(self, uuid: bytes, above: bytes) -> Pages:
        pages: Pages = {}
        for layer in reversed(self.chain(uuid, above)):
            pages.update(self.layers[layer].pages)
        if not above:
            pages = {page: value for page, value in pages.items() if value != ZERO}
        return pages

    def complete(self, uuid: bytes) -> bool:
        at = uuid
        while at:
            if at not in self.layers or REMOTE in self.layers[at].pages.values():
                return False
            at = self.layers[at].parent
        unfinished = {
            segment.uuid
            for record in self.migrations.values()
            if record.side is Side.TARGET
            for segment, at_page in zip(record.segments, record.map_next, strict=True)
            if at_page != -1
        }
        return not unfinished & set(self.chain(uuid))

    def read(self, volume: bytes) -> Pages:
        """Content as the head shows it; REMOTE where it has not arrived."""
        head = self.heads[volume]
        pages = self.flatten(head.parent, b"") | head.pages
        return {page: value for page, value in pages.items() if value != ZERO}

    def remote(self, volume: bytes) -> int:
        head = self.heads[volume]
        return sum(list(self.layers[uuid].pages.values()).count(REMOTE) for uuid in self.chain(head.parent))

    def digest(self, uuid: bytes, above: bytes) -> ms.SegmentDigest:
        text = repr(sorted(self.flatten(uuid, above).items())).encode()
        return ms.SegmentDigest(uuid, hashlib.blake2b(text, digest_size=32).digest())

    # Changes, on a copy

    def apply(self, commit: Commit) -> State:
        """What the docstring of `Commit` says."""
        new = self.copy()
        record = commit.record
        if record is not None:
            old = self.migrations.get(record.id)
            if record.side is Side.TARGET:
                kept = {(s.uuid, s.parent) for s in record.segments}
                for segment in old.segments if old is not None else ():
                    if (segment.uuid, segment.parent) not in kept:
                        new.layers.pop(segment.uuid, None)
                for segment in record.segments:
                    if segment.uuid not in new.layers:
                        new.layers[segment.uuid] = Layer(segment.parent, {})
            new.migrations[record.id] = record
        for part in commit.maps:
            layer = new.layers[part.segment]
            pages = dict(layer.pages)
            for run in part.runs:
                value = {ms.PageKind.DATA: REMOTE, ms.PageKind.ZERO: ZERO, ms.PageKind.LOST: LOST}[run.kind]
                pages.update((page, value) for page in range(run.first, run.first + run.count) if page not in pages)
            new.layers[part.segment] = Layer(layer.parent, pages)
        for owner in commit.ownership:
            was = self.ownership(owner.uuid).role
            new.own[owner.uuid] = owner
            arrives = record is not None and record.side is Side.TARGET
            if owner.role is Role.OWNER and was is not Role.OWNER and arrives and record is not None:
                tops = {head.volume: head.base for head in record.heads}
                new.heads[owner.uuid] = Layer(tops[owner.uuid], {})
                new.snapshots[owner.uuid] = {s.name: s.segment for s in record.snapshots if s.volume == owner.uuid}
            if owner.role is Role.NONE:
                new.heads.pop(owner.uuid, None)
        for migration in commit.drop:
            new.migrations.pop(migration, None)
        if commit.drop:
            new.collect()
        return new

    def collect(self) -> None:
        """Delete the layers that nothing names (in place)."""
        roots = {head.parent for head in self.heads.values()}
        roots |= {uuid for named in self.snapshots.values() for uuid in named.values()}
        for record in self.migrations.values():
            roots |= {base.base for base in record.bases} | {head.base for head in record.heads}
            roots |= {segment.uuid for segment in record.segments}
        live: set[bytes] = set()
        for root in roots:
            at = root
            while at and at not in live and at in self.layers:
                live.add(at)
                at = self.layers[at].parent
        golden = {uuid for uuid in self.layers if uuid.startswith(b"golden")}
        self.layers = {uuid: layer for uuid, layer in self.layers.items() if uuid in live | golden}

    def write(self, volume: bytes, page: int, value: int) -> State:
        new = self.copy()
        head = new.heads[volume]
        new.heads[volume] = Layer(head.parent, head.pages | {page: value})
        return new

    def fill(self, uuid: bytes, pages: Pages) -> State:
        if uuid not in self.layers:
            return self
        new = self.copy()
        layer = new.layers[uuid]
        arrived = {page: value for page, value in pages.items() if layer.pages.get(page) == REMOTE}
        new.layers[uuid] = Layer(layer.parent, layer.pages | arrived)
        return new

    def seal(self, volume: bytes, uuid: bytes) -> State:
        new = self.copy()
        head = new.heads[volume]
        new.layers[uuid] = Layer(head.parent, head.pages)
        new.heads[volume] = Layer(uuid, {})
        return new

    # What the source describes

    def segments(self, volume: bytes, top: bytes, above: bytes, round_: int, named: bool) -> list[ms.Segment]:
        """The chain from `top` down to `above` as segments, cut at the named snapshots, parents first."""
        cuts = set(self.snapshots.get(volume, {}).values()) if named else set()
        found: list[ms.Segment] = []
        parent = above
        for uuid in reversed(self.chain(top, above)):
            if uuid in cuts or uuid == top:
                pages = sum(1 for value in self.flatten(uuid, parent).values() if value != ZERO)
                found.append(ms.Segment(volume, uuid, parent, SIZE, SIZE, pages, round_))
                parent = uuid
        return found

    def map_part(self, segment: ms.Segment, first: int, runs_max: int) -> ms.MapPart:
        kinds = {ZERO: ms.PageKind.ZERO, LOST: ms.PageKind.LOST}
        content = sorted(self.flatten(segment.uuid, segment.parent).items())
        runs = [ms.MapRun(page, 1, kinds.get(value, ms.PageKind.DATA)) for page, value in content if page >= first]
        more = len(runs) > runs_max
        runs = runs[:runs_max]
        return ms.MapPart(segment.uuid, first, runs[-1].first + 1 if more else None, tuple(runs))
