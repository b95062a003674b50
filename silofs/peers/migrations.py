"""All migrations of this store: starts, resumes and ends their movers, and routes what peers send to them.

After a restart every migration whose record is in the store goes on by itself: its machine is restored from the
record and its peer is dialled until it answers. A resume needs nothing else: the target asks for what it misses.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from silofs import failpoints, freezes
from silofs.engine import Engine
from silofs.errors import Busy, NoSuchThing, PeerUnreachable, ProtocolError, SiloError, StoreBroken
from silofs.layers.catalog import UNCOUNTED
from silofs.limits import HELLO_VOLUMES_MAX
from silofs.migrate import events as ev
from silofs.migrate import strays, wire
from silofs.migrate.codec import Codec
from silofs.migrate.machine import blocked
from silofs.migrate.messages import (
    AnyMessage,
    Grant,
    Hello,
    Lost,
    MigrationMessage,
    Offer,
    ReadAsk,
    ReadReply,
    SharedVolume,
)
from silofs.migrate.source import SourceMachine
from silofs.migrate.states import MigrationRecord, Mode, Options, Phase, Side, Switchover
from silofs.migrate.target import TargetMachine
from silofs.peers import content, records
from silofs.peers.arrivals import Arrivals, Filled
from silofs.peers.authorise import Direction, allows
from silofs.peers.book import Book, Peer
from silofs.peers.bulk import Bandwidth, Frame, Pages, PagesJob, unpack
from silofs.peers.history import Extras, History
from silofs.peers.hub import Hub, Link
from silofs.peers.identity import Identity
from silofs.peers.mover import Machine, Mover
from silofs.peers.progress import Progress
from silofs.peers.source_ops import Threads
from silofs.verbs import owned

if TYPE_CHECKING:
    from silofs.peers.remote_reads import RemoteReads

log = logging.getLogger(__name__)

WORK_THREADS = 3  # digests, maps, segments
DEMAND_THREADS = 4  # pages that a peer's readers wait for
WRITERS_POLL_S = 0.1
REVIVE_S = 2.0
PER_PEER_MAX = 64  # migrations that one peer may have open here
CAPABILITIES = ("zstd",)


class Migrations:
    """The hub's `Above`, and what the control verbs act on. `run` first."""

    def __init__(self, engine: Engine, hub: Hub, book: Book, identity: Identity) -> None:
        self.engine = engine
        self.hub = hub
        self.book = book
        self.threads = Threads(engine, WORK_THREADS)
        self.movers: dict[bytes, Mover] = {}
        self.history = History(engine)
        self.reads: RemoteReads
        self._identity = identity
        self._demand = Threads(engine, DEMAND_THREADS)
        self._codecs = threading.local()
        self._session_codec = Codec()
        self._arrivals = Arrivals(engine.store, self._filled)
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._arrivals.run)
            nursery.start_soon(self.history.run)
            nursery.start_soon(self._watch_writers)
            self._resume()
            task_status.started()

    @property
    def arrivals(self) -> Arrivals:
        return self._arrivals

    # Starting

    def start(self, peer: Peer, names: list[str], options: Options, *, retain_s: float, bandwidth: int | None) -> Mover:
        """Begin to move volumes to a peer. NoSuchVolume, Busy, UserError."""
        reader = self.engine.reads.txn
        volumes = [reader.volume_by_name(name) for name in names]
        for volume in volumes:
            if any(volume.uuid in mover.uuids for mover in self.movers.values()):
                raise Busy(f"{volume.name} is in another migration already", hint="silofs migration ls")
            owned(reader, volume.name, "a migration")
            freezes.check(reader, volume, "a migration")
        machine, actions = SourceMachine.start(
            migration=os.urandom(16),
            peer=peer.store_id,
            ownership=tuple(records.ownership(reader, volume.uuid) for volume in volumes),
            offered=tuple(content.offered(reader, volume.uuid) for volume in volumes),
            options=options,
            writers=sum(self.engine.writers(volume.uuid) for volume in volumes),
            remote_pages=sum(content.remote_pages(reader, volume.uuid) for volume in volumes),
            now=trio.current_time(),
        )
        extras = Extras(retain_s=retain_s, bandwidth=bandwidth)
        self.history.begin(machine.migration, extras)
        return self._add(machine, names, options, actions, extras)

    def start_return(self, origin: Mover) -> None:
        """The volumes go back to where they came from (docs/protocol.md, RETURN)."""
        reader = self.engine.reads.txn
        uuids = [volume.uuid for volume in origin.machine.volumes]
        options = Options(mode=Mode.AUTO, switchover=Switchover.NOW, fence_writer=True)
        try:
            self.may_return(origin)
            machine, actions = SourceMachine.start(
                migration=os.urandom(16),
                peer=origin.peer,
                ownership=tuple(records.ownership(reader, uuid) for uuid in uuids),
                offered=tuple(content.offered(reader, uuid) for uuid in uuids),
                options=options,
                writers=sum(self.engine.writers(uuid) for uuid in uuids),
                remote_pages=sum(content.remote_pages(reader, uuid) for uuid in uuids),
                now=trio.current_time(),
                origin=origin.id,
            )
        except SiloError as error:
            log.error("migration %s cannot be returned: %s", origin.name, error)
            origin.post(ev.ReturnEnded())
            return
        self._add(machine, origin.progress.names, options, actions, Extras())
        origin.post(ev.ReturnStarted())

    def may_return(self, origin: Mover) -> None:
        """Busy while a clone made here still needs pages of the old home: after a RETURN nothing would bring them."""
        segments = origin.record.segments if origin.record is not None else ()
        names = content.dependents(self.engine.reads.txn, segments, origin.uuids)
        if names:
            raise Busy(
                f"{', '.join(names)} still needs pages that are at the peer",
                hint="wait until the migration is complete, or remove what was cloned",
            )

    def _add(
        self, machine: Machine, names: list[str], options: Options, actions: list[ev.Action], extras: Extras
    ) -> Mover:
        side = Side.SOURCE if isinstance(machine, SourceMachine) else Side.TARGET
        peer = self.book.name_of(machine.peer)
        progress = Progress(machine.migration, side, peer, names, options, retain_s=extras.retain_s)
        progress.started = extras.started
        progress.phase = machine.phase
        mover = Mover(self, machine, progress)
        mover.context.bandwidth = Bandwidth(extras.bandwidth)
        self.movers[machine.migration] = mover
        self.hub.want(machine.peer)
        link = self.hub.link(machine.peer)
        if link is not None:
            assert link.session.hello is not None
            mover.post(ev.Connected(link.id, link.session.hello))
        self._nursery.start_soon(mover.run, actions)
        return mover

    def _resume(self) -> None:
        """Every migration in the store goes on."""
        found = records.stored(self.engine.reads.txn)
        for record in found:
            mover = self._restore(record)
            if mover is not None:
                log.info("migration %s goes on (%s, %s)", mover.name, record.side.value, record.phase.value)
        for record in found:
            if record.returning and record.side is Side.SOURCE:
                origin = self.movers.get(record.origin)
                if origin is None:
                    self.settled(record.origin)
                else:
                    origin.post(ev.ReturnStarted())

    def settled(self, origin: bytes) -> None:
        """No commit of this target's machine is unconfirmed (or it is gone): a restored RETURN of it may begin."""
        for mover in self.movers.values():
            record = mover.record
            if mover.side is Side.SOURCE and record is not None and record.origin == origin:
                mover.post(ev.OriginSettled())

    def _restore(self, record: MigrationRecord) -> Mover | None:
        """Go on from a record. None when that cannot be: it stays as it is, its volumes too, and all others go on."""
        reader = self.engine.reads.txn
        owners = tuple(records.ownership(reader, volume.uuid) for volume in record.volumes)
        restore = SourceMachine.restore if record.side is Side.SOURCE else TargetMachine.restore
        try:
            machine, actions = restore(record, owners, trio.current_time())
        except (AssertionError, ProtocolError):
            log.exception("migration %s cannot go on, and stays as it is", records.shown_id(record.id))
            return None
        extras = self.history.extras(record.id)
        return self._add(machine, records.names_of(record), record.options, actions, extras)

    # Ending

    def ended(self, mover: Mover) -> None:
        """The mover's task is over."""
        if self.movers.get(mover.id) is mover:
            del self.movers[mover.id]
            if mover.failed is None:  # else it is revived, and rewrites its records first
                self.settled(mover.id)
        self.hub.unwant(mover.peer)
        record = mover.record
        if mover.failed is not None:
            self._nursery.start_soon(self._revive, mover)
            return
        if mover.machine.done and not (mover.side is Side.TARGET and record is None):
            retire = mover.uuids if mover.side is Side.SOURCE and mover.progress.phase is Phase.COMPLETE else set()
            kept = records.left_behind(self.engine.reads.txn, record) if retire else set()
            self.history.end(mover.id, mover.progress.fields(), retire - kept, mover.progress.retain_s, kept)
        if record is not None and record.returning and mover.side is Side.SOURCE:
            origin = self.movers.get(record.origin)
            if origin is not None and mover.progress.phase in (Phase.CANCELLED, Phase.FAILED):
                origin.post(ev.ReturnEnded())

    def superseded(self, migration: bytes) -> None:
        """Another migration's commit has deleted this one's record."""
        mover = self.movers.pop(migration, None)
        if mover is not None:
            mover.progress.finished(ev.Finished(Phase.CANCELLED))
            self.history.end(mover.id, mover.progress.fields(), set(), mover.progress.retain_s)
            mover.stop()
            self.settled(migration)

    async def _revive(self, mover: Mover) -> None:
        """A mover that died of an error of ours starts again from its record, as after a crash of the daemon.

        What it had frozen stays so until the record says whose the volumes are: a CEDED may have been submitted.
        """
        await trio.sleep(REVIVE_S)
        while self.engine.store.broken:
            await trio.sleep(REVIVE_S)
        reader = self.engine.reads.txn
        record = next((record for record in records.stored(reader) if record.id == mover.id), None)
        if record is None or mover.id in self.movers:
            mover.thaw()
            return
        revived = self._restore(record)
        if revived is not None:
            revived.inherit(mover)
            log.info("migration %s goes on after an error of ours", revived.name)

    # What movers need

    def may_bring(self, store_id: bytes, name: str) -> bool:
        peer = self.book.get(store_id)
        return peer is not None and allows(peer.rules, name, Direction.IN)

    async def reopened(self) -> None:
        """Before a record is written again whose fate is unknown."""
        if self.engine.store.broken:
            raise StoreBroken("the store failed and has not been reopened")

    async def serve_demand(self, link: Link, job: PagesJob) -> None:
        """Pages that a reader at the peer waits for: a thread reads them, the session carries them."""
        await guarded(link, self._serve_demand, link, job)

    async def _serve_demand(self, link: Link, job: PagesJob) -> None:
        frames = await self._demand.read(lambda reader: list(job.frames(reader, self._codec())))
        for frame in frames:
            if isinstance(frame, wire.PagesFrame):
                job.context.traffic.demand += sum(len(block.sums) for block in frame.blocks) * 4096
                await link.session.send_pages(frame)
            else:
                link.session.send(frame)
        failpoints.hit("demand.after_reply")

    def _codec(self) -> Codec:
        codec: Codec | None = getattr(self._codecs, "codec", None)
        if codec is None:
            codec = self._codecs.codec = Codec()
        return codec

    def _filled(self, filled: Filled) -> None:
        leaves = {page >> 9 for pages in filled.values() for page in pages}
        if leaves:
            self.engine.filled(leaves)

    async def _watch_writers(self) -> None:
        """Tell the sources how many writers a switch-over would cut off, whenever that changes."""
        told: dict[bytes, int] = {}
        while True:
            for mover in list(self.movers.values()):
                if mover.side is Side.SOURCE:
                    count = sum(self.engine.writers(uuid) for uuid in mover.uuids)
                    if told.get(mover.id, 0) != count:
                        told[mover.id] = count
                        mover.post(ev.Writers(count))
            told = {migration: count for migration, count in told.items() if migration in self.movers}
            await trio.sleep(WRITERS_POLL_S)

    # What the hub says (Hub.Above)

    def hello(self, peer: bytes, session: bytes) -> Hello:
        reader = self.engine.reads.txn
        shared = [
            SharedVolume(mine.uuid, mine.role.value, mine.epoch, mine.generation)
            for mine in reader.ownerships()
            if mine.peer == peer.hex()
        ]
        open_here = tuple(mover.id for mover in self.movers.values() if mover.peer == peer)
        return Hello(
            versions=(wire.VERSION, wire.VERSION),
            store=self._identity.store_id,
            session=session,
            capabilities=CAPABILITIES,
            volumes=tuple(shared[:HELLO_VOLUMES_MAX]),
            migrations=open_here[:HELLO_VOLUMES_MAX],
        )

    def connected(self, link: Link) -> None:
        assert link.session.hello is not None
        for mover in self.movers.values():
            if mover.peer == link.peer:
                mover.post(ev.Connected(link.id, link.session.hello))
        self._nursery.start_soon(guarded, link, self.book.seen, link.peer)

    def disconnected(self, link: Link) -> None:
        for mover in self.movers.values():
            if mover.peer == link.peer:
                mover.post(ev.Disconnected(link.id))
        self.reads.disconnected(link)

    def delivered(self, link: Link, frame: Frame, pages: Pages) -> None:
        """From a bulk lane's thread, on the loop."""
        if isinstance(frame, wire.PagesFrame):
            self._pages(link, frame, pages, demand=False)
            return
        try:
            self._message(link, frame)
        except ProtocolError as error:
            link.session.close(str(error))

    async def received(self, link: Link, message: AnyMessage | wire.PagesFrame) -> None:
        if isinstance(message, wire.PagesFrame):
            self._pages(link, message, unpack(message, self._session_codec), demand=True)
        else:
            self._message(link, message)

    def _pages(self, link: Link, frame: wire.PagesFrame, pages: Pages, *, demand: bool) -> None:
        def taken(nbytes: int) -> None:
            if not demand:
                link.inbound.taken(nbytes)

        mover = self._mover(link, frame.migration)
        if mover is None or frame.session != link.id:
            taken(pages.nbytes)
            return
        if demand:
            mover.progress.traffic.received_demand += pages.nbytes
        self._arrivals.pages(mover, frame, pages, taken, demand=demand)

    def _message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, ReadAsk):
            self._nursery.start_soon(guarded, link, self.reads.answer, link, message)
        elif isinstance(message, ReadReply):
            self.reads.replied(link, message)
        elif isinstance(message, Lost):
            mover = self._mover(link, message.migration)
            if mover is not None:
                self._nursery.start_soon(guarded, link, self._arrivals.lost, mover, message)
        elif isinstance(message, MigrationMessage):
            mover = self._mover(link, message.migration)
            if mover is None:
                mover = self._stray(link, message)
            if mover is not None:
                mover.post(ev.Received(message))
        else:
            raise ProtocolError("a message that has no place here")

    def _mover(self, link: Link, migration: bytes) -> Mover | None:
        mover = self.movers.get(migration)
        return mover if mover is not None and mover.peer == link.peer else None

    def _stray(self, link: Link, message: MigrationMessage) -> Mover | None:
        """A message without a machine: an OFFER or GRANT makes one, the others are answered by the records.

        Not where the migration has a record all the same: its machine is being made again, or cannot be.
        """
        reader = self.engine.reads.txn
        if message.migration not in self.movers and reader.value(records.TABLE, message.migration.hex()) is not None:
            return None
        owners = {volume.uuid: records.ownership(reader, volume.uuid) for volume in message.volumes}
        if not isinstance(message, Offer | Grant) or message.migration in self.movers:
            answer = strays.reply(message, owners)
            if answer is not None:
                link.session.send(answer)
            return None
        if message.session != link.id:
            return None
        if sum(mover.peer == link.peer for mover in self.movers.values()) >= PER_PEER_MAX:
            raise ProtocolError("the peer has too many migrations open")
        if blocked((mover.machine for mover in self.movers.values()), owners):
            return None  # an older machine may yet rewrite these records; the message comes again
        machine = TargetMachine.create(message.migration, link.peer, message.volumes, tuple(owners.values()))
        names = [offer.name for offer in message.offered]
        extras = Extras()
        return self._add(machine, names, Options(), [], extras)

    # What the verbs and the mount need

    def find(self, text: str) -> Mover | None:
        """By id as shown, or a prefix of it. None if no open migration has it; NoSuchThing if several have."""
        found = [mover for mover in self.movers.values() if mover.name.startswith(text)]
        if len(found) > 1:
            raise NoSuchThing(f"{text} is the beginning of several migrations")
        return found[0] if found else None

    def listed(self) -> list[dict[str, object]]:
        """For `migration ls`: those that are over and still remembered, then those that are not."""
        return [*self.history.ended(), *(self.fields(mover) for mover in self.movers.values())]

    def fields(self, mover: Mover) -> dict[str, object]:
        """For `migration show`, with what only the store knows."""
        reader = self.engine.reads.txn
        record, progress = mover.record, mover.progress
        progress.look(mover.machine)
        if record is not None:
            skipped = 0
            for base in record.bases:
                layer = reader.layer_by_uuid(base.base) if base.base else None
                if layer is not None and layer.data_pages != UNCOUNTED:
                    skipped += layer.data_pages
            progress.skipped = skipped * 4096
            if mover.side is Side.TARGET:
                found = (reader.layer_by_uuid(segment.uuid) for segment in record.segments)
                progress.left = sum(layer.remote_pages for layer in found if layer is not None) * 4096
        return progress.fields()

    def open_records(self) -> list[MigrationRecord]:
        return [mover.record for mover in self.movers.values() if mover.record is not None]

    async def guard(self, uuid: bytes, change: str) -> None:
        """Before a volume is renamed, resized, removed, rolled back or snapshotted. Busy while that is not possible.

        A rename, removal or rollback before the freeze ends the attempt instead; then this returns when its record is
        gone, so that a crash cannot leave the one without the other. Only a RETURN refuses a clone. A freeze by command
        and a migration exclude each other, but for a volume that is owned here and still arriving.
        """
        ended: list[Mover] = []
        for mover in self.movers.values():
            if uuid not in mover.uuids:
                continue
            if change == "clone":
                if mover.side is Side.SOURCE and mover.record is not None and mover.record.returning:
                    raise Busy(f"it goes back in migration {mover.name}", hint=f"silofs migration show {mover.name}")
                continue
            owning = mover.side is Side.TARGET and mover.progress.phase in (Phase.PULLING, Phase.COMPLETE)
            if change == "freeze" and not owning:
                raise Busy(f"it is in migration {mover.name}", hint=f"silofs migration show {mover.name}")
            if mover.machine.locked and not (owning and change in ("snapshot", "rename", "resize")):
                raise Busy(f"it is in migration {mover.name}", hint=f"silofs migration show {mover.name}")
            if mover.side is Side.SOURCE and change in ("rename", "rm", "rollback"):
                ended.append(mover)
        for mover in ended:
            await mover.end(ev.VolumeChanged(uuid))

    def volumes_changed(self, mover: Mover, uuids: set[bytes]) -> None:
        """Ownership records of these volumes changed."""
        log.info("migration %s: %d ownership records written", mover.name, len(uuids))

    def no_link(self, mover: Mover) -> PeerUnreachable:
        return PeerUnreachable(f"peer {mover.progress.peer} is not connected")


async def guarded(link: Link, work: Callable[..., Awaitable[object]], *args: object) -> None:
    """Do something that a peer set off: an error of ours ends its session, not the daemon."""
    try:
        await work(*args)
    except SiloError as error:
        log.warning("peer %s: %s", link.peer.hex()[:8], error)
    except Exception as error:
        log.exception("an error of ours in serving a peer")
        link.session.close(f"an error of ours: {error}")
