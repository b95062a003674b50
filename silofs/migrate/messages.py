"""Every message of the migration protocol (docs/protocol.md lists them with sender, effect and answer).

Each is a tagged, array-like msgpack struct with bounded fields, so that a decoded message is never larger than
`limits` says and never has a field of another type; what does not decode is a `ProtocolError` in `wire`. Every message
of a migration starts with the same four facts: migration, session, and the (uuid, epoch) of its volumes, the epoch
being the one that the migration grants. Bulk pages are frames of their own (`wire.PagesFrame`).
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from silofs import limits

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
NoId = Annotated[bytes, Meta(max_length=16)]  # b"" where there is none
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
Text = Annotated[str, Meta(max_length=512)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Epoch = Annotated[int, Meta(ge=0, le=(1 << 62))]
Page = Annotated[int, Meta(ge=0, le=limits.SIZE_MAX // 4096)]
Request = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class PageKind(enum.IntEnum):
    """State of the pages of a run in a travelling map. Pages in no run are holes: they fall through to the parent."""

    DATA = 1  # its bytes are to be pulled: `remote` at the receiver until they arrive
    ZERO = 2
    LOST = 3  # damaged at the sender: EIO at the receiver until overwritten


class Priority(enum.IntEnum):
    """Who waits for a page; smaller goes first."""

    DEMAND = 0  # a reader waits
    HINT = 1  # near what a reader asked for
    SWEEP = 2


class Refusal(enum.StrEnum):
    """Why something was refused; the shell maps it to an error class of errors.py."""

    NAME = "name"  # the name is taken at the destination
    SPACE = "space"
    AUTHORISATION = "authorisation"
    EPOCH = "epoch"
    ROLE = "role"  # the node owns it, or has ceded it
    VERSION = "version"
    LIMIT = "limit"
    BUSY = "busy"  # a writer, another migration
    USAGE = "usage"
    BASE = "base"  # the common state that a GRANT builds on is gone
    STORE = "store"  # the store failed
    TRY_AGAIN = "try_again"
    DIGEST = "digest"  # what was read back is not what was sent
    LOST = "lost"  # pages that the source could not read wait for `accept-lost`
    CONVERGE = "converge"  # the writer outruns the link
    CHANGED = "changed"  # renamed, deleted or rolled back meanwhile
    CANCELLED = "cancelled"


class VolumeEpoch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A volume of the group and the epoch at which the receiver shall own it."""

    uuid: Id
    epoch: Epoch


class SharedVolume(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """In HELLO: one volume for which the sender has an ownership record that names the receiver."""

    uuid: Id
    role: Annotated[str, Meta(max_length=16)]
    epoch: Epoch
    generation: Epoch


class Offered(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """In OFFER: one volume. `states`: uuids of its sealed layers, newest first, for the newest common state."""

    uuid: Id
    name: Name
    size: Count  # bytes
    data_pages: Count
    states: Annotated[tuple[Id, ...], Meta(max_length=limits.STATES_MAX)]


class Base(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The newest common state of one volume: the layer's uuid, b"" where nothing is skipped."""

    volume: Id
    base: NoId


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One layer as it travels: the chain from the layer `uuid` down to, excluding, the layer `parent`, flattened."""

    volume: Id
    uuid: Id
    parent: NoId  # the segment or base below; b"": none
    size: Count  # bytes
    clip: Count  # bytes; what is below reads as zero beyond
    pages: Count  # data pages of its own
    round: Count


class SnapshotInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A named snapshot that travels: `segment` is the uuid of its sealed layer (a segment, or one below the base)."""

    volume: Id
    name: Name
    segment: Id
    size: Count
    created_ns: Count


class Run(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Pages [first, first + count)."""

    first: Page
    count: Annotated[int, Meta(ge=1, le=limits.SIZE_MAX // 4096)]

    @property
    def end(self) -> int:
        return self.first + self.count


class MapRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Pages [first, first + count) of a map, all of one kind."""

    first: Page
    count: Annotated[int, Meta(ge=1, le=limits.SIZE_MAX // 4096)]
    kind: PageKind


class MapPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The map of a segment over [first, next_page), sorted and disjoint; `next_page` None: to its end."""

    segment: Id
    first: Page
    next_page: Page | None
    runs: Annotated[tuple[MapRun, ...], Meta(max_length=limits.RUNS_MAX)]


class SegmentDigest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """blake3 over a segment's content; `uuid` of a base stands for the whole chain from it down."""

    uuid: Id
    digest: Digest


Volumes = Annotated[tuple[VolumeEpoch, ...], Meta(min_length=1, max_length=limits.GROUP_MAX)]
Segments = Annotated[tuple[Segment, ...], Meta(max_length=limits.SEGMENTS_MAX)]
Snapshots = Annotated[tuple[SnapshotInfo, ...], Meta(max_length=limits.SNAPSHOTS_MAX)]
Bases = Annotated[tuple[Base, ...], Meta(max_length=limits.GROUP_MAX)]
Runs = Annotated[tuple[Run, ...], Meta(min_length=1, max_length=limits.PULL_RUNS_MAX)]


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="hello"):
    """First message of either side on a control stream. `versions`: the lowest and highest spoken."""

    versions: tuple[Count, Count]
    store: Id
    session: Id  # drawn by the side that connected; the acceptor repeats it
    capabilities: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=32)]
    volumes: Annotated[tuple[SharedVolume, ...], Meta(max_length=limits.HELLO_VOLUMES_MAX)]
    migrations: Annotated[tuple[Id, ...], Meta(max_length=limits.HELLO_VOLUMES_MAX)]


class Ping(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ping"):
    """Application keep-alive; answered by PONG with the same number. The machines never see either."""

    number: Count


class Pong(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="pong"):
    number: Count


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every message of a migration starts with."""

    migration: Id
    session: Id
    volumes: Volumes


# Source to target


class Offer(Message, frozen=True, tag="offer"):
    """Asks to become the next owner's host. Epochs are exactly one above the sender's."""

    offered: Annotated[tuple[Offered, ...], Meta(min_length=1, max_length=limits.GROUP_MAX)]
    returning: bool  # RETURN: only the CEDED peer of the sender's own epoch accepts
    origin: NoId  # RETURN: the migration that brought the volumes to the sender


class Announce(Message, frozen=True, tag="announce"):
    """Round `round` is sealed. Lists every segment so far, parents before children. `pages`: wait for pages too."""

    round: Count
    bases: Bases
    segments: Segments
    pages: bool


class Prepare(Message, frozen=True, tag="prepare"):
    """The source is about to freeze; may the rest (`pages`) come? `named`: states of snapshots that are not sent, since

    they lie below what both ends have. The receiver may have merged one away, and could not take over then.
    """

    attempt: Count
    pages: Count
    named: Annotated[tuple[Id, ...], Meta(max_length=limits.SNAPSHOTS_MAX)]


class Grant(Message, frozen=True, tag="grant"):
    """The receiver owns the volumes. The sender is durably CEDED. `maps`: of the final layers, as far as they fit."""

    offered: Annotated[tuple[Offered, ...], Meta(min_length=1, max_length=limits.GROUP_MAX)]  # names, sizes at the end
    bases: Bases
    segments: Segments
    heads: Annotated[tuple[Base, ...], Meta(max_length=limits.GROUP_MAX)]  # per volume: uuid of its final layer
    snapshots: Snapshots
    maps: Annotated[tuple[MapPart, ...], Meta(max_length=limits.GROUP_MAX)]
    returning: bool


class Cancelled(Message, frozen=True, tag="cancelled"):
    """The migration is over and nothing was ceded under it."""

    reason: Refusal


class Map(Message, frozen=True, tag="map"):
    """Answer to MAP_ASK."""

    request: Request
    part: MapPart


class Lost(Message, frozen=True, tag="lost"):
    """Answer to PULL for pages that the sender cannot read (damaged there)."""

    request: Request
    segment: Id
    runs: Runs


class Unserved(Message, frozen=True, tag="unserved"):
    """Answer to PULL or MAP_ASK for a segment that the sender does not (now) serve; ask again later."""

    request: Request
    segment: Id


class Digests(Message, frozen=True, tag="digests"):
    """Answer to DIGEST_ASK: bases first, then segments in the order of the GRANT."""

    digests: Annotated[tuple[SegmentDigest, ...], Meta(max_length=limits.SEGMENTS_MAX + limits.GROUP_MAX)]


class CompleteAck(Message, frozen=True, tag="complete_ack"):
    """The sender is durably RETIRED (or past it)."""


class ReturnAsk(Message, frozen=True, tag="return_ask"):
    """`cancel` at the old home after CEDED: please bring it back."""


# Target to source


class Ready(Message, frozen=True, tag="ready"):
    """INCOMING is durable. `bases`: what will not be sent."""

    bases: Bases


class Refuse(Message, frozen=True, tag="refuse"):
    """The OFFER is refused as a whole."""

    reason: Refusal
    detail: Text


class RoundDone(Message, frozen=True, tag="round_done"):
    """Every map (and, unless ANNOUNCE said otherwise, page) of that round and those before is durable here."""

    round: Count


class Prepared(Message, frozen=True, tag="prepared"):
    """Answer to PREPARE; `refusal` None: space is reserved."""

    attempt: Count
    refusal: Refusal | None


class MapAsk(Message, frozen=True, tag="map_ask"):
    """Send the map of the segment from page `first` on."""

    request: Request
    segment: Id
    first: Page


class Pull(Message, frozen=True, tag="pull"):
    """Send these pages of the segment. Answered from the store only."""

    request: Request
    segment: Id
    runs: Runs
    priority: Priority


class Ack(Message, frozen=True, tag="ack"):
    """The sender durably owned the volumes at these epochs."""


class Nack(Message, frozen=True, tag="nack"):
    """The GRANT is refused; `own`: epochs of the sender for these volumes."""

    reason: Refusal
    own: Volumes


class DigestAsk(Message, frozen=True, tag="digest_ask"):
    """Every page is here; what should it hash to?"""


class Complete(Message, frozen=True, tag="complete"):
    """Every page is durable here, read back and equal. Repeated until acknowledged. `lost`: pages given up."""

    lost: Count


class CancelAsk(Message, frozen=True, tag="cancel_ask"):
    """`cancel` at the destination before CEDED."""


# Reads that one side answers for the other (the shell's; the machines only say whether they may be answered)


class ReadAsk(Message, frozen=True, tag="read_ask"):
    """A read of the volume's live state at its owner. One volume; never forwarded a second time."""

    request: Request
    offset: Count
    length: Annotated[int, Meta(ge=0, le=limits.REQUEST_BYTES_MAX)]


class ReadReply(Message, frozen=True, tag="read_reply"):
    """`data` None: not answered here (not the owner, or an error)."""

    request: Request
    data: Annotated[bytes, Meta(max_length=limits.REQUEST_BYTES_MAX)] | None


ToTarget = (
    Offer | Announce | Prepare | Grant | Cancelled | Map | Lost | Unserved | Digests | CompleteAck | ReturnAsk
)
ToSource = (
    Ready | Refuse | RoundDone | Prepared | MapAsk | Pull | Ack | Nack | DigestAsk | Complete | CancelAsk
)
MigrationMessage = ToTarget | ToSource
AnyMessage = Hello | Ping | Pong | MigrationMessage | ReadAsk | ReadReply
