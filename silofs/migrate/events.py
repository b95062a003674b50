"""What goes into the two machines (events) and what comes out (actions).

`machine.handle(event, now) -> list[Action]`, `machine.deadline() -> float | None`, `machine.tick(now) -> list[Action]`.
The shell performs the actions in the order given and feeds each outcome back as an event that carries the action's
`token`; an outcome with a token that the machine no longer waits for is ignored. Actions without a token have no
outcome. The shell never performs an action of a machine that was dropped, and never reorders `Commit`s of one machine.
"""

from __future__ import annotations

import enum

import msgspec

from silofs.migrate.messages import (
    Base,
    Hello,
    MapPart,
    MigrationMessage,
    Offered,
    Priority,
    Refusal,
    Run,
    Segment,
    SegmentDigest,
    SnapshotInfo,
    VolumeEpoch,
)
from silofs.migrate.states import MigrationRecord, Ownership, Phase


class Event(msgspec.Struct, frozen=True):
    """Input of a machine."""


class Action(msgspec.Struct, frozen=True):
    """Output of a machine."""


# Events of both machines


class Received(Event, frozen=True):
    """A message of this migration arrived from its peer (any session: the machine drops other sessions' ones)."""

    message: MigrationMessage


class Connected(Event, frozen=True):
    """A new authenticated session with the peer; it replaces any other."""

    session: bytes
    hello: Hello


class Disconnected(Event, frozen=True):
    """The session is gone. One that is not the current session is ignored."""

    session: bytes


class Committed(Event, frozen=True):
    """The `Commit` with this token is synced, and the engine's gates follow its ownership records."""

    token: int


class CommitFailed(Event, frozen=True):
    """The `Commit` failed, or its outcome is unknown. Nothing may be concluded from what the store now shows.

    Except for the reason BASE: the transaction found that a base of `record` is not complete here (any more), and
    changed nothing. A target's commit looks for that whenever its record is new or has other bases than the stored one.
    """

    token: int
    reason: Refusal = Refusal.STORE


class OperatorCancel(Event, frozen=True):
    """`migration cancel ID`. Before CEDED the migration ends; after it the volumes come back (RETURN)."""


class OperatorPause(Event, frozen=True):
    """`migration pause ID`: no new rounds, no sweep; demand goes on."""


class OperatorResume(Event, frozen=True):
    """`migration resume ID`."""


# Events of the source


class Sealed(Event, frozen=True):
    """Answer to `Seal`: durable layers. `segments`: the new ones of all volumes, parents before children, each volume's
    newly sealed head last of its own."""

    token: int
    segments: tuple[Segment, ...]
    snapshots: tuple[SnapshotInfo, ...]  # all named snapshots that travel, as of now
    offered: tuple[Offered, ...]  # names and sizes as of now


class SealFailed(Event, frozen=True):
    token: int
    reason: Refusal = Refusal.STORE


class Frozen(Event, frozen=True):
    """Answer to `Freeze`: mutations wait, everything admitted is durable, the heads are sealed (and durable)."""

    token: int
    segments: tuple[Segment, ...]  # the new ones, final layers included
    snapshots: tuple[SnapshotInfo, ...]
    offered: tuple[Offered, ...]
    heads: tuple[Base, ...]  # per volume the uuid of its final layer
    last_lsns: tuple[int, ...]  # per volume, in the order of `heads`
    maps: tuple[MapPart, ...]  # first parts of the final layers' maps: at most RUNS_MAX runs in all
    writers: int  # as `Writers`, counted under the freeze


class FreezeFailed(Event, frozen=True):
    """The shell has thawed again."""

    token: int
    reason: Refusal = Refusal.STORE


class Writers(Event, frozen=True):
    """How many handles at the source would be cut off by a switch-over now. Sent whenever it changes."""

    count: int


class VolumeChanged(Event, frozen=True):
    """A volume of the group was renamed, deleted or rolled back (possible before the freeze only)."""

    uuid: bytes


class OperatorSwitchover(Event, frozen=True):
    """`migration switchover ID [--fence-writer]`."""

    fence_writer: bool = False


class OperatorAcceptLost(Event, frozen=True):
    """`migration accept-lost ID`: COMPLETE with lost pages may retire the source."""


class OriginSettled(Event, frozen=True):
    """To a restored RETURN: the machine of its `origin` has confirmed what it rewrote (is not `unsettled`).

    Until then the RETURN waits: that machine's commit, repeated, would write OWNER over the CEDED of this one.
    Repeating it is harmless; the shell sends it after a restart, and after each `Committed` of a TargetMachine.
    """


class DigestsReady(Event, frozen=True):
    """Answer to `ComputeDigests` (at the target: of `Verify`)."""

    token: int
    digests: tuple[SegmentDigest, ...]
    lost: int = 0  # pages in state LOST among them (target)


class DigestsFailed(Event, frozen=True):
    token: int
    reason: Refusal = Refusal.STORE


class Described(Event, frozen=True):
    """Answer to `Describe`: the manifest of the ceded chains anew, over other bases."""

    token: int
    bases: tuple[Base, ...]
    segments: tuple[Segment, ...]
    maps: tuple[MapPart, ...]


# Events of the target


class OfferChecked(Event, frozen=True):
    """Answer to `CheckOffer`."""

    token: int
    refusal: Refusal | None
    detail: str = ""
    bases: tuple[Base, ...] = ()


class PrepareChecked(Event, frozen=True):
    """Answer to `CheckPrepare`."""

    token: int
    refusal: Refusal | None


class MissingPages(Event, frozen=True):
    """Answer to `FindMissing`: remote pages of the segment from `first` on, PULL_PAGES in all at most.

    `next_page` None: the segment was looked through to its end.
    """

    token: int
    segment: bytes
    runs: tuple[Run, ...]
    next_page: int | None


class PagesDurable(Event, frozen=True):
    """Pages that answer the PULL `request` of this session are durable. `last`: nothing more comes for it."""

    session: bytes
    request: int
    segment: bytes
    runs: tuple[Run, ...]
    last: bool


class PagesFailed(Event, frozen=True):
    """Pages for that PULL arrived but could not be stored (no space, store failed): the sweep pauses for a while."""

    session: bytes
    request: int
    segment: bytes
    reason: Refusal = Refusal.STORE


class Demand(Event, frozen=True):
    """A reader waits for pages of the segment (or, as a hint, one may come for them). Repeating it is harmless."""

    segment: bytes
    run: Run
    priority: Priority = Priority.DEMAND


class ReturnStarted(Event, frozen=True):
    """A RETURN of these volumes runs at this node: no sweep and no COMPLETE until it ended."""


class ReturnEnded(Event, frozen=True):
    """The RETURN was cancelled or refused; the volumes stay."""


# Actions of both machines


class Send(Action, frozen=True):
    """On the current session. If there is none any more, drop it."""

    message: MigrationMessage


class Commit(Action, frozen=True):
    """One synced transaction: all of it or nothing; answered by `Committed` or `CommitFailed`.

    Contains: `ownership` records; this machine's migration `record` (None: unchanged); `drop`: migration records to
    delete (on `Committed` the shell also drops the machines of *other* migrations named there). Target: a `record`
    creates the layers of its segments that are not there, and deletes those of the record it replaces that it has no
    more (a segment is the same iff uuid and parent are); then `maps` go into them. An INCOMING record creates the
    volume (its name visible, not writable); an OWNER one puts a head on each of `record.heads`, takes size and
    snapshots from `record`, and renames to `name.N` where the name was taken meanwhile; NONE from INCOMING deletes the
    volume's name.
    `rewrite`: an earlier commit of this may or may not be on disk: reopen the store first (unless it was opened since),
    then write this, whatever the store shows. Before `Committed` the shell sets the engine's gate of each volume to its
    role (a frozen one stays frozen as OWNER); after a failure it leaves the gates as they are.
    """

    token: int
    ownership: tuple[Ownership, ...] = ()
    record: MigrationRecord | None = None
    drop: tuple[bytes, ...] = ()
    maps: tuple[MapPart, ...] = ()
    rewrite: bool = False


class PhaseChanged(Action, frozen=True):
    """For progress, logs and failpoints."""

    phase: Phase
    round: int


class Command(enum.StrEnum):
    SWITCHOVER = "switchover"
    CANCEL = "cancel"
    ACCEPT_LOST = "accept-lost"
    MIGRATE = "migrate"


class Replied(Action, frozen=True):
    """Outcome of an operator's command (`refusal` None: accepted). MIGRATE: something the operator must see."""

    command: Command
    refusal: Refusal | None
    detail: str = ""


class Finished(Action, frozen=True):
    """The machine is done; its record is gone. CANCELLED and FAILED say why. Source, COMPLETE: keep the layers for
    `--retain`, then they may go. Target, COMPLETE: the source acknowledged."""

    phase: Phase
    reason: Refusal | None = None
    detail: str = ""
    lost: int = 0


# Actions of the source


class Above(msgspec.Struct, frozen=True):
    """Where the new segments of a volume start: the layer `above` (newest announced one, else the base; b"": none)."""

    volume: bytes
    above: bytes


class Seal(Action, frozen=True):
    """Seal the heads durably. Snapshot boundaries above `above` make segments of their own (if they travel)."""

    token: int
    volumes: tuple[Above, ...]
    round: int
    snapshots: bool


class Freeze(Action, frozen=True):
    """Hold mutations (lock them out from `deadline` at the latest only if CEDED was submitted), drain, commit, seal.

    No network call inside. The answer after the deadline is worth nothing: the machine will have sent `Thaw`.
    """

    token: int
    volumes: tuple[Above, ...]
    round: int
    snapshots: bool
    deadline: float


class Thaw(Action, frozen=True):
    """Undo `Freeze` (also one that has not been answered yet): the volumes are written again here."""


class ServeMap(Action, frozen=True):
    """Answer a MAP_ASK: send `Map(request, part)` with at most RUNS_MAX runs, in bulk."""

    session: bytes
    request: int
    segment: Segment
    first: int


class ServePages(Action, frozen=True):
    """Answer a PULL from the store: page frames of the segment, `Lost` for what is damaged; the last frame says so."""

    session: bytes
    request: int
    segment: Segment
    runs: tuple[Run, ...]
    priority: Priority


class ComputeDigests(Action, frozen=True):
    """Hash every base's chain and every segment, in this order."""

    token: int
    bases: tuple[Base, ...]
    segments: tuple[Segment, ...]


class Describe(Action, frozen=True):
    """Describe the ceded chains (down from `heads`) as segments over `bases` (b"": to the bottom)."""

    token: int
    heads: tuple[Base, ...]
    bases: tuple[Base, ...]
    snapshots: tuple[SnapshotInfo, ...]


# Actions of the target


class CheckOffer(Action, frozen=True):
    """Name, space, limits, authorisation; and the newest common state of each volume (complete here, and verified).

    RETURN: the base is the layer that was ceded, which must be complete here. `granted`: the source has ceded already
    and this node knows nothing of it (any more): authorisation and the common states count, name and space do not.
    """

    token: int
    offered: tuple[Offered, ...]
    volumes: tuple[VolumeEpoch, ...]
    peer: bytes
    returning: bool
    granted: bool


class CheckPrepare(Action, frozen=True):
    """Whether `pages` more would fit, and the states `named` are here: those stay until the migration is over."""

    token: int
    pages: int
    named: tuple[bytes, ...]


class FindMissing(Action, frozen=True):
    token: int
    segment: bytes
    first: int


class Verify(Action, frozen=True):
    """Read everything back from the disk and hash it, as `ComputeDigests`."""

    token: int
    bases: tuple[Base, ...]
    segments: tuple[Segment, ...]


class StartReturn(Action, frozen=True):
    """Start a RETURN of these volumes to the peer: `SourceMachine.start(..., origin=this migration)`, switch-over NOW.

    Then `ReturnStarted` to this machine; `ReturnEnded` if it could not start (a writer here, a clone that still needs
    remote pages) and whenever it finishes CANCELLED or FAILED. After a restart with both: `ReturnStarted` again.
    """

    volumes: tuple[VolumeEpoch, ...]
