"""Decisions about rounds and manifests that need no state: when rounds end, what is common, what is well-formed."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from msgspec.structs import replace

from silofs import limits
from silofs.blocks import PAGE, pages_for
from silofs.errors import ProtocolError
from silofs.migrate import messages as ms
from silofs.migrate.states import MAP_COMPLETE, MigrationRecord, Mode

SHRINK = 0.9  # a round that is not at least a tenth smaller than the one before does not shrink


class Verdict(enum.Enum):
    AGAIN = "again"  # another round
    SWITCH = "switch"  # the rest is for the switch-over and the pull
    GIVE_UP = "give up"


def verdict(mode: Mode, rounds: Sequence[int], rate: float) -> Verdict:
    """Whether to seal another round. `rounds`: pages of each so far; `rate`: bytes per second of the last, measured.

    What is left for the switch-over is about what was written while the last round travelled. So a last round that
    fits the pause budget leaves less than the budget, and one that did not shrink promises no better.
    """
    last = rounds[-1]
    if mode is Mode.POSTCOPY or last * PAGE <= rate * limits.PAUSE_BUDGET_S:
        return Verdict.SWITCH
    if len(rounds) >= limits.ROUNDS_MAX:
        return Verdict.GIVE_UP if mode is Mode.PRECOPY else Verdict.SWITCH
    if mode is Mode.AUTO and len(rounds) > 1 and last > rounds[-2] * SHRINK:
        return Verdict.SWITCH
    return Verdict.AGAIN


def newest_common(states: Iterable[bytes], complete: AbstractSet[bytes]) -> bytes:
    """The first of `states` (newest first) that is complete at the target; b"" if none is."""
    return next((uuid for uuid in states if uuid in complete), b"")


def tips(volumes: Iterable[bytes], bases: Iterable[ms.Base], segments: Iterable[ms.Segment]) -> dict[bytes, bytes]:
    """Per volume the layer on which the next segment builds: its newest segment, else its base, else b""."""
    above = dict.fromkeys(volumes, b"")
    above.update((base.volume, base.base) for base in bases)
    above.update((segment.volume, segment.uuid) for segment in segments)
    return above


def check_manifest(
    volumes: tuple[ms.VolumeEpoch, ...], bases: tuple[ms.Base, ...], segments: tuple[ms.Segment, ...]
) -> None:
    """ProtocolError unless every segment is of the group, is named once, and comes after its parent."""
    group = {volume.uuid for volume in volumes}
    if {base.volume for base in bases} != group or len(bases) != len(group):
        raise ProtocolError("a manifest names other volumes than its migration")
    known = {(base.volume, base.base) for base in bases} | {(uuid, b"") for uuid in group}
    seen: set[bytes] = {base.base for base in bases}
    for segment in segments:
        if segment.volume not in group or (segment.volume, segment.parent) not in known or segment.uuid in seen:
            raise ProtocolError("a manifest is not a chain of layers of its migration")
        if segment.size > limits.SIZE_MAX or segment.clip > segment.size:
            raise ProtocolError("a layer has an impossible size")
        seen.add(segment.uuid)
        known.add((segment.volume, segment.uuid))


def check_runs(segment: ms.Segment, runs: Sequence[ms.Run]) -> None:
    """ProtocolError unless the runs are ascending, disjoint, inside the segment and a PULL's worth at most."""
    at = total = 0
    for run in runs:
        if run.first < at:
            raise ProtocolError("runs of pages overlap or are out of order")
        at = run.end
        total += run.count
    if at > pages_for(segment.size) or total > limits.PULL_PAGES:
        raise ProtocolError("pages outside of a layer, or too many at once")


def map_after(segment: ms.Segment, expected: int, part: ms.MapPart) -> int:
    """The next page to ask for once `part` is applied. ProtocolError unless it continues the map at `expected`."""
    if part.segment != segment.uuid or part.first != expected:
        raise ProtocolError("a part of a map is not the one that was asked for")
    at = part.first
    for run in part.runs:
        if run.first < at:
            raise ProtocolError("a map overlaps itself or is out of order")
        at = run.first + run.count
    if at > pages_for(segment.size):
        raise ProtocolError("a map goes beyond the end of its layer")
    if part.next_page is None:
        return MAP_COMPLETE
    if part.next_page < at or part.next_page <= part.first:
        raise ProtocolError("a map does not go on")
    return part.next_page


def carry_over(
    old: tuple[ms.Segment, ...], old_next: tuple[int, ...], new: tuple[ms.Segment, ...]
) -> tuple[int, ...]:
    """How far the maps of `new` have arrived, given those of `old`: a segment is the same iff uuid and parent are."""
    arrived = {(segment.uuid, segment.parent): at for segment, at in zip(old, old_next, strict=True)}
    return tuple(arrived.get((segment.uuid, segment.parent), 0) for segment in new)


def with_parts(record: MigrationRecord, parts: Iterable[ms.MapPart]) -> MigrationRecord:
    """The target's record once these parts of maps are durable. ProtocolError if one is not what comes next."""
    after = list(record.map_next)
    for part in parts:
        at = next((i for i, segment in enumerate(record.segments) if segment.uuid == part.segment), None)
        if at is None:
            raise ProtocolError("a part of a map of another layer")
        after[at] = map_after(record.segments[at], after[at], part)
    return replace(record, map_next=tuple(after))


def maps_complete(record: MigrationRecord) -> bool:
    """Every map of the manifest is durable at the target."""
    return all(at == MAP_COMPLETE for at in record.map_next)
