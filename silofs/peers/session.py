"""One authenticated session with one peer: HELLO both ways, then framed messages, over a TLS stream.

The session is the control lane and the demand lane: what it carries is small, or what a reader waits for. Bulk data
has connections of its own (bulk.py), so nothing here ever waits behind it. A silent peer is noticed by pings: one
every PING_S, and the session ends when nothing at all arrived for PING_MISSED_MAX of them.

A task of the session is the only reader and another the only writer of the stream. Anything that the protocol does not
allow ends the session with a ProtocolError before it reached anyone.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from silofs.errors import PeerError, PeerUnreachable, ProtocolError
from silofs.limits import PING_MISSED_MAX, PING_S
from silofs.migrate import wire
from silofs.migrate.messages import AnyMessage, Hello, Ping, Pong
from silofs.peers.tls import TlsStream

log = logging.getLogger(__name__)

QUEUED_MESSAGES_MAX = 8192  # not yet sent; a peer that lets more pile up does not read
QUEUED_PAGES_BYTES = 4 << 20  # of page frames not yet sent; who adds more waits
SEND_BYTES = 1 << 18  # joined into one send at most, so that a demand reply is on its way at once

Receive = Callable[[AnyMessage | wire.PagesFrame], Awaitable[None]]


class Session:
    """A live session. `id` and `hello` (the peer's) are set once `greet` returned."""

    def __init__(self, stream: TlsStream, peer: bytes, *, dialled: bool) -> None:
        self.peer = peer
        self.dialled = dialled
        self.id = b""
        self.hello: Hello | None = None
        self.closed = trio.Event()
        self.reason = ""
        self._stream = stream
        self._reader = wire.FrameReader()
        self._writer = wire.FrameWriter()
        self._held: deque[AnyMessage | wire.PagesFrame] = deque()  # decoded before `run`
        self._queue: deque[AnyMessage | wire.PagesFrame] = deque()
        self._queued_bytes = 0
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._heard = trio.current_time()
        self._scope = trio.CancelScope()
        self._round_trip = math.nan
        self._pinged = 0.0

    @property
    def remote_address(self) -> str:
        return self._stream.remote_address

    @property
    def round_trip(self) -> float:
        """Seconds of the last ping; nan before the first."""
        return self._round_trip

    async def greet(self, hello: Callable[[bytes], Hello], session: bytes) -> Hello:
        """Exchange HELLOs; the caller bounds the time. `session`: a fresh id where this side dialled, else b"".

        `hello(session id)` makes ours. ProtocolError unless the peer's is its first message, in a version that we
        speak and with the id of the certificate that it came with.
        """
        if self.dialled:
            await self._stream.send_all(self._writer.encode(hello(session)))
        theirs = await self._first()
        if not self.dialled:
            session = theirs.session
            await self._stream.send_all(self._writer.encode(hello(session)))
        if theirs.session != session:
            raise ProtocolError("the peer answered another HELLO")
        if theirs.store != self.peer:
            raise ProtocolError("the peer's HELLO names another store than its certificate")
        low, high = theirs.versions
        if not low <= wire.VERSION <= high:
            raise ProtocolError(
                f"the peer speaks protocol versions {low} to {high}, this silofs {wire.VERSION}",
                hint="use the same silofs version on both hosts",
            )
        self.id, self.hello = session, theirs
        return theirs

    async def _first(self) -> Hello:
        while not self._held:
            self._held.extend(self._reader.feed(await self._receive()))
        message = self._held.popleft()
        if not isinstance(message, Hello):
            raise ProtocolError("the first message is not HELLO")
        return message

    async def run(self, receive: Receive) -> None:
        """Serve until the session ends; never raises for what the peer or the network did (see `reason`)."""
        assert self.hello is not None
        self._heard = trio.current_time()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, receive)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._ping)
        except* PeerError as group:
            self.reason = self.reason or str(group.exceptions[0])
        except* Exception as group:
            # Whatever a peer's message set off in us ends its session, not the daemon.
            log.exception("a session ended by an error of ours")
            self.reason = self.reason or f"an error of ours: {group.exceptions[0]}"
        finally:
            self.closed.set()
            self._drained.set()
            with trio.CancelScope(shield=True):
                await self._stream.aclose()

    def close(self, reason: str) -> None:
        """End the session; harmless if it has ended."""
        self.reason = self.reason or reason
        self.closed.set()
        self._scope.cancel()

    def send(self, message: AnyMessage) -> None:
        """Queue a message. On a session that has ended it is dropped: whoever sent it sends it again on the next."""
        if self.closed.is_set():
            return
        if len(self._queue) >= QUEUED_MESSAGES_MAX:
            self.close("the peer does not read")
            return
        self._queue.append(message)
        self._wake.set()

    async def send_pages(self, frame: wire.PagesFrame) -> None:
        """Queue pages that somebody waits for; waits while too many are queued."""
        while self._queued_bytes > QUEUED_PAGES_BYTES and not self.closed.is_set():
            self._drained = trio.Event()
            await self._drained.wait()
        if self.closed.is_set():
            return
        self._queued_bytes += stored_bytes(frame)
        self._queue.append(frame)
        self._wake.set()

    async def _receive(self) -> bytes:
        data = await self._stream.receive_some()
        if not data:
            raise PeerUnreachable("the peer closed the session")
        return data

    async def _read(self, receive: Receive) -> None:
        while True:
            while self._held:
                message = self._held.popleft()
                if isinstance(message, Ping):
                    self.send(Pong(message.number))
                elif isinstance(message, Pong):
                    self._round_trip = trio.current_time() - self._pinged
                elif isinstance(message, Hello):
                    raise ProtocolError("a second HELLO")
                else:
                    await receive(message)
            self._held.extend(self._reader.feed(await self._receive()))
            self._heard = trio.current_time()

    async def _write(self) -> None:
        while True:
            while not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
            parts, size = [], 0
            while self._queue and size < SEND_BYTES:
                message = self._queue.popleft()
                if isinstance(message, wire.PagesFrame):
                    self._queued_bytes -= stored_bytes(message)
                parts.append(self._writer.encode(message))
                size += len(parts[-1])
            if self._queued_bytes <= QUEUED_PAGES_BYTES:
                self._drained.set()
            await self._stream.send_all(b"".join(parts))

    async def _ping(self) -> None:
        number = 0
        while True:
            number += 1
            self._pinged = trio.current_time()
            self.send(Ping(number))
            await trio.sleep(PING_S)
            if trio.current_time() - self._heard > PING_S * PING_MISSED_MAX:
                raise PeerUnreachable(f"nothing heard from the peer for {PING_S * PING_MISSED_MAX:.0f} s")


def stored_bytes(frame: wire.PagesFrame) -> int:
    """Bytes of the frame's blocks as they travel."""
    return sum(len(block.data) for block in frame.blocks)
