"""Sessions with all peers: who is dialled, who is let in, and that there is one session with each.

A session counts as up only when its two bulk lanes are up as well (one for each direction, opened by whoever dialled),
so nothing above has to know about half a connection. A new session with a peer replaces the old one: the peer is the
judge of whether the old one still lives. When both dial at the same moment, the dial of the lower store id wins.

Peers are dialled while somebody wants them (a migration that is not over), or all the time where this store has no
listener of its own and so could not be reached otherwise.
"""

from __future__ import annotations

import logging
import math
import os
import random
import ssl
import threading
from collections.abc import Callable
from typing import Protocol

import trio

from silofs.errors import NotAuthorised, PeerError, PeerUnreachable, ProtocolError, SiloError
from silofs.layers.store import Store
from silofs.limits import HANDSHAKE_S
from silofs.migrate import wire
from silofs.migrate.messages import AnyMessage, Hello
from silofs.peers import tls
from silofs.peers.book import Book, Peer
from silofs.peers.bulk import Frame, Inbound, Outbound, Pages
from silofs.peers.identity import Identity, fingerprint_of
from silofs.peers.pairing import Invitations, Reason, receive_join, refuse, split_address, welcome
from silofs.peers.session import Session
from silofs.peers.tls import BlockingLane, TlsStream

log = logging.getLogger(__name__)

BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
DIAL_S = 10.0
BULK_NICE = 10
TRIES = 3  # dials that fail before whoever waits for a session is told
LANE_TO_ACCEPTOR = b">"
LANE_TO_DIALLER = b"<"
LANE_HELLO_BYTES = 17
LANE_OK = b"\x01"


class Above(Protocol):
    """What uses the sessions (migrations.py). All of it is called on the loop and does not wait."""

    def hello(self, peer: bytes, session: bytes) -> Hello: ...

    def connected(self, link: Link) -> None: ...

    def disconnected(self, link: Link) -> None: ...

    async def received(self, link: Link, message: AnyMessage | wire.PagesFrame) -> None: ...

    def delivered(self, link: Link, frame: Frame, pages: Pages) -> None: ...


class Link:
    """A session that is up, and its lanes."""

    def __init__(self, session: Session, outbound: Outbound, inbound: Inbound) -> None:
        self.session = session
        self.outbound = outbound
        self.inbound = inbound

    @property
    def peer(self) -> bytes:
        return self.session.peer

    @property
    def id(self) -> bytes:
        return self.session.id


class _Arriving:
    """A session that was accepted and waits for its lanes."""

    def __init__(self, peer: bytes) -> None:
        self.peer = peer
        self.lanes: dict[bytes, BlockingLane] = {}
        self.complete = trio.Event()

    def add(self, direction: bytes, lane: BlockingLane) -> None:
        self.lanes[direction] = lane
        if len(self.lanes) == 2:
            self.complete.set()

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()


class Hub:
    """All sessions of this store. `run` serves until cancelled."""

    def __init__(
        self, store: Store, identity: Identity, book: Book, *, name: str, listening: Callable[[], str | None]
    ) -> None:
        self.invitations = Invitations()
        self._store = store
        self._identity = identity
        self._book = book
        self._name = name
        self._listening = listening
        self._links: dict[bytes, Link] = {}
        self._arriving: dict[bytes, _Arriving] = {}
        self._dialling: dict[bytes, trio.CancelScope] = {}
        self._wanted: dict[bytes, int] = {}
        self._loops: set[bytes] = set()
        self._moved = trio.Event()
        self._failures: dict[bytes, str] = {}
        self._failed: dict[bytes, int] = {}  # dials since somebody began to wait
        self._nursery: trio.Nursery | None = None
        self._above: Above | None = None
        self.sessions_begun = 0

    def bind(self, above: Above) -> None:
        self._above = above

    @property
    def above(self) -> Above:
        assert self._above is not None
        return self._above

    # What others ask

    def link(self, peer: bytes) -> Link | None:
        """The session with the peer, if one is up."""
        return self._links.get(peer)

    def links(self) -> list[Link]:
        return list(self._links.values())

    def want(self, peer: bytes) -> None:
        """Keep a session with the peer until `unwant`; nests."""
        self._wanted[peer] = self._wanted.get(peer, 0) + 1
        self.dial_wanted()

    def unwant(self, peer: bytes) -> None:
        self._wanted[peer] -= 1
        if not self._wanted[peer]:
            del self._wanted[peer]

    async def connect(self, peer: Peer, seconds: float = DIAL_S) -> Link:
        """The session with the peer, made if need be. PeerUnreachable after `seconds`, or TRIES dials that failed."""
        self.want(peer.store_id)
        self._failed.pop(peer.store_id, None)
        try:
            with trio.move_on_after(seconds):
                while (link := self.link(peer.store_id)) is None:
                    if self._failed.get(peer.store_id, 0) >= TRIES:
                        break
                    await self.wait_moved()
                else:
                    return link
        finally:
            self.unwant(peer.store_id)
        why = self._failures.get(peer.store_id)
        raise PeerUnreachable(
            f"peer {peer.name} cannot be reached at {peer.address or 'any address'}{': ' + why if why else ''}"
        )

    def disconnect(self, peer: bytes, reason: str) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.session.close(reason)

    async def wait_moved(self) -> None:
        """Until a session begins or ends."""
        await self._moved.wait()

    def dial_wanted(self) -> None:
        """Start a dialling loop for every peer that wants one and has none."""
        if self._nursery is None:
            return
        for peer in self._book.all():
            if self._wants(peer.store_id) and peer.store_id not in self._loops:
                self._loops.add(peer.store_id)
                self._nursery.start_soon(self._keep, peer.store_id)

    def _wants(self, store_id: bytes) -> bool:
        peer = self._book.get(store_id)
        return peer is not None and bool(peer.address) and (store_id in self._wanted or self._listening() is None)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.dial_wanted()
            await trio.sleep_forever()

    # Dialling

    async def _keep(self, store_id: bytes) -> None:
        """Dial until there is a session, and again when it ended, as long as it is wanted."""
        pause = BACKOFF_S
        try:
            while self._wants(store_id):
                if store_id in self._links:
                    pause = BACKOFF_S
                    await self._links[store_id].session.closed.wait()
                    await trio.sleep(BACKOFF_S * random.random())
                    continue
                peer = self._book.get(store_id)
                assert peer is not None
                try:
                    await self._dial(peer)
                except (SiloError, OSError) as error:
                    self._failures[store_id] = str(error)
                    self._failed[store_id] = self._failed.get(store_id, 0) + 1
                    self._move()
                    log.info("peer %s: %s", peer.name, error)
                if store_id not in self._links:
                    await trio.sleep(pause * (0.5 + random.random()))
                    pause = min(pause * 2, BACKOFF_MAX_S)
        finally:
            self._loops.discard(store_id)

    async def _dial(self, peer: Peer) -> None:
        with trio.CancelScope(deadline=trio.current_time() + DIAL_S) as scope:
            self._dialling[peer.store_id] = scope
            opened: list[TlsStream] = []
            try:
                stream = await self._connect(peer, tls.ALPN_SESSION)
                opened.append(stream)
                session = Session(stream, peer.store_id, dialled=True)
                await session.greet(lambda id: self.above.hello(peer.store_id, id), os.urandom(16))
                lanes = []
                for direction in (LANE_TO_ACCEPTOR, LANE_TO_DIALLER):
                    lane = await self._connect(peer, tls.ALPN_BULK)
                    opened.append(lane)
                    await lane.send_all(session.id + direction)
                    if await lane.receive_some(1) != LANE_OK:
                        raise ProtocolError("the peer refused a bulk lane")
                    lanes.append(lane)
                out, into = (lane.detach() for lane in lanes)
                opened.clear()
            finally:
                del self._dialling[peer.store_id]
                for half in opened:
                    await trio.aclose_forcefully(half)
            scope.deadline = math.inf
            self._begin(session, out, into)
            return
        raise PeerUnreachable(f"no answer from {peer.address} within {DIAL_S:.0f} s")

    async def _connect(self, peer: Peer, alpn: str) -> TlsStream:
        stream = await dial(peer.address, tls.client_context(self._identity, peer.certificate, alpn))
        if stream.peer_fingerprint != peer.fingerprint or stream.alpn != alpn:
            await trio.aclose_forcefully(stream)
            raise ProtocolError(f"whoever answers at {peer.address} is not {peer.name}")
        return stream

    # Being dialled

    async def accepted(self, stream: TlsStream, authenticated: Callable[[], None]) -> None:
        """The listener's handler."""
        if stream.alpn == tls.ALPN_PAIRING:
            await self._pair(stream)
            return
        peer = self._book.by_fingerprint(stream.peer_fingerprint)
        if peer is None:
            raise NotAuthorised("a connection without a paired certificate")
        if stream.alpn == tls.ALPN_SESSION:
            await self._accept_session(stream, peer, authenticated)
        elif stream.alpn == tls.ALPN_BULK:
            await self._accept_lane(stream, peer)
        else:
            raise ProtocolError("a connection for no purpose that is known here")

    async def _accept_session(self, stream: TlsStream, peer: Peer, authenticated: Callable[[], None]) -> None:
        if peer.store_id in self._dialling:
            if self._identity.store_id < peer.store_id:
                raise ProtocolError("both sides dialled; ours goes first")
            self._dialling[peer.store_id].cancel()
        session = Session(stream, peer.store_id, dialled=False)
        arriving = _Arriving(peer.store_id)
        await session.greet(lambda id: self._expect_lanes(id, arriving), b"")
        try:
            await arriving.complete.wait()
        except BaseException:
            arriving.close()
            raise
        finally:
            self._arriving.pop(session.id, None)
        authenticated()
        link = self._begin(session, arriving.lanes[LANE_TO_DIALLER], arriving.lanes[LANE_TO_ACCEPTOR])
        await link.session.closed.wait()

    def _expect_lanes(self, session: bytes, arriving: _Arriving) -> Hello:
        """Before our HELLO goes out: the lanes may come right after it."""
        if session in self._arriving:
            raise ProtocolError("a session id that is in use")
        self._arriving[session] = arriving
        return self.above.hello(arriving.peer, session)

    async def _accept_lane(self, stream: TlsStream, peer: Peer) -> None:
        opening = b""
        while len(opening) < LANE_HELLO_BYTES:
            data = await stream.receive_some(LANE_HELLO_BYTES - len(opening))
            if not data:
                raise ProtocolError("a bulk lane that says nothing")
            opening += data
        arriving = self._arriving.get(opening[:16])
        direction = opening[16:]
        if arriving is None or arriving.peer != peer.store_id or direction in arriving.lanes:
            raise ProtocolError("a bulk lane of no session")
        if direction not in (LANE_TO_ACCEPTOR, LANE_TO_DIALLER):
            raise ProtocolError("a bulk lane without direction")
        await stream.send_all(LANE_OK)
        arriving.add(direction, stream.detach())

    async def _pair(self, stream: TlsStream) -> None:
        """The inviter's half of a pairing: the token is spent first, then the peer is durable, then it is told."""
        message = await receive_join(stream)
        mine = self._identity.fingerprint
        joiner = fingerprint_of(message.certificate)
        outcome = self.invitations.spend(trio.current_time(), mine, joiner, message.proof)
        if isinstance(outcome, Reason):
            await refuse(stream, outcome)
            raise NotAuthorised(f"a pairing token was refused: {outcome.value}")
        peer = await self._book.add(message.certificate, message.name, message.address)
        log.info("paired with %s", peer.name)
        await welcome(stream, self._identity, self._name, outcome, joiner)

    # Sessions that are up

    def _begin(self, session: Session, out: BlockingLane, into: BlockingLane) -> Link:
        outbound = Outbound(self._store, out)
        inbound = Inbound(into, lambda frame, pages: self.above.delivered(link, frame, pages))
        link = Link(session, outbound, inbound)
        assert self._nursery is not None
        old = self._links.get(session.peer)
        if old is not None:
            old.session.close("a new session replaced it")
            self._ended(old)
        self._links[session.peer] = link
        self._failures.pop(session.peer, None)
        self.sessions_begun += 1
        self._nursery.start_soon(self._serve, link)
        return link

    async def _serve(self, link: Link) -> None:
        session = link.session
        name = self._book.name_of(session.peer)
        log.info("session with %s (%s)", name, session.remote_address)
        self.above.connected(link)
        self._move()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lane, link, link.outbound)
                nursery.start_soon(self._lane, link, link.inbound)
                await session.run(lambda message: self.above.received(link, message))
                link.outbound.stop()
                link.inbound.stop()
        finally:
            log.info("session with %s ended: %s", name, session.reason or "closed")
            session.close("closed")
            link.outbound.stop()
            link.inbound.stop()
            if self._links.get(session.peer) is link:
                self._ended(link)

    def _ended(self, link: Link) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self.above.disconnected(link)
            self._move()

    async def _lane(self, link: Link, lane: Outbound | Inbound) -> None:
        """The lane's thread, waited for even when cancelled: it holds a transaction of a store that will be closed."""

        def work() -> str:
            try:
                lane.run()
            except PeerError as error:
                return str(error)
            except Exception as error:
                log.exception("a bulk lane failed")
                return f"the bulk lane failed: {error}"
            return "the bulk lane ended"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when_cancelled, lane)
            link.session.close(await _in_own_thread(work))
            nursery.cancel_scope.cancel()

    def _move(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()


async def _in_own_thread(work: Callable[[], str]) -> str:
    """`work()` in a thread that gives way to every other (docs/decisions/bulk-threads.md); waited for in any case.

    Not one of trio's: those are used again for other work, and a thread's niceness cannot be taken back.
    """
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()
    results: list[str] = []

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BULK_NICE)
        results.append(work())
        try:
            token.run_sync_soon(done.set)
        except trio.RunFinishedError:
            pass

    threading.Thread(target=run, name="silofs-bulk", daemon=True).start()
    with trio.CancelScope(shield=True):
        await done.wait()
    return results[0]


async def _stop_when_cancelled(lane: Outbound | Inbound) -> None:
    """A cancellation cannot reach a thread; the end of its socket does."""
    try:
        await trio.sleep_forever()
    finally:
        lane.stop()


async def dial(address: str, context: ssl.SSLContext) -> TlsStream:
    """TCP and TLS to HOST:PORT. PeerUnreachable or PeerRefused."""
    host, port = split_address(address)
    with trio.move_on_after(HANDSHAKE_S):
        try:
            raw = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise PeerUnreachable(f"{address} cannot be reached: {error}") from error
        stream = TlsStream(raw, context, server_side=False)
        try:
            await stream.handshake()
        except BaseException:
            await trio.aclose_forcefully(raw)
            raise
        return stream
    raise PeerUnreachable(f"{address} does not answer")
