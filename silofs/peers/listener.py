"""The TCP port of a store: open only while there is somebody who could come, and stingy with strangers.

The socket exists only while a peer is paired or an invitation is open; otherwise the port is closed. Until it has
proved who it is, a connection is one of at most UNAUTHENTICATED_MAX and lives for at most HANDSHAKE_S; what comes on
top is closed at once. So a port scan, garbage, or a thousand idle connections cost a bounded amount of memory for a
bounded time and touch neither the sessions that exist nor the mount.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable

import trio

from silofs.errors import SiloError
from silofs.limits import HANDSHAKE_S, UNAUTHENTICATED_MAX
from silofs.peers.pairing import split_address
from silofs.peers.tls import TlsStream

log = logging.getLogger(__name__)

BACKLOG = 64
ACCEPT_PAUSE_S = 0.1  # after EMFILE and the like: descriptors come back when others close theirs
_NO_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

Authenticated = Callable[[], None]
Handler = Callable[[TlsStream, Authenticated], Awaitable[None]]


class Listener:
    """Accepts connections for one address and gives them, after their TLS handshake, to a handler.

    `context()` makes the TLS context of the moment; `wanted()` says whether anybody could come. The handler gets the
    stream and a function that it calls as soon as the other side has proved who it is; it owns the stream while it
    runs, and the listener closes it afterwards. What the handler raises ends that connection only.
    """

    def __init__(
        self, address: str, *, context: Callable[[], ssl.SSLContext], wanted: Callable[[], bool], handler: Handler
    ) -> None:
        self.host, self.port = split_address(address)
        self._context = context
        self._wanted = wanted
        self._handler = handler
        self._changed = trio.Event()
        self._opened = trio.Event()
        self._unauthenticated = 0
        self._accepted = 0
        self._turned_away = 0
        self._failed = 0

    @property
    def address(self) -> str:
        """HOST:PORT as it is bound (a port 0 is replaced once the socket was open)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def open(self) -> bool:
        return self._opened.is_set()

    def update(self) -> None:
        """Ask `wanted` again: a peer or an invitation came or went."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_open(self) -> None:
        await self._opened.wait()

    def statistics(self) -> dict[str, int]:
        return {
            "accepted": self._accepted,
            "turned_away": self._turned_away,
            "failed": self._failed,
            "unauthenticated": self._unauthenticated,
        }

    async def run(self) -> None:
        """Opens and closes the port as it is wanted; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._changed
                if not self._wanted():
                    await changed.wait()
                    continue
                async with trio.open_nursery() as ports:
                    try:
                        sockets = await self._bind()
                    except OSError as error:
                        log.error("cannot listen on %s: %s", self.address, error)
                        await trio.sleep(5.0)
                        continue
                    self._opened.set()
                    log.info("listening for peers on %s", self.address)
                    for bound in sockets:
                        ports.start_soon(self._accept, bound, nursery)
                    while self._wanted():
                        changed = self._changed
                        await changed.wait()
                    self._opened = trio.Event()
                    ports.cancel_scope.cancel()

    async def _bind(self) -> list[trio.SocketListener]:
        listeners = await trio.open_tcp_listeners(self.port, host=self.host, backlog=BACKLOG)
        if self.port == 0:
            self.port = listeners[0].socket.getsockname()[1]
            for other in listeners[1:]:  # each would have got a port of its own
                await other.aclose()
            del listeners[1:]
        return listeners

    async def _accept(self, bound: trio.SocketListener, nursery: trio.Nursery) -> None:
        async with bound:
            while True:
                try:
                    stream = await bound.accept()
                except OSError as error:
                    if error.errno in _NO_RESOURCES:
                        log.warning("no resources for another connection: %s", error)
                        await trio.sleep(ACCEPT_PAUSE_S)
                        continue
                    raise
                self._accepted += 1
                if self._unauthenticated >= UNAUTHENTICATED_MAX:
                    self._turned_away += 1
                    await trio.aclose_forcefully(stream)
                    continue
                self._unauthenticated += 1
                nursery.start_soon(self._serve, stream)

    async def _serve(self, raw: trio.SocketStream) -> None:
        counted = True

        def authenticated() -> None:
            nonlocal counted
            if counted:
                counted = False
                self._unauthenticated -= 1
                scope.deadline = float("inf")

        with trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_S) as scope:
            try:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                stream = TlsStream(raw, self._context(), server_side=True)
                await stream.handshake()
                await self._handler(stream, authenticated)
            except SiloError as error:
                self._failed += 1
                log.info("closed a connection: %s", error)
            except Exception:
                self._failed += 1
                log.exception("a connection ended by an error of ours")
            finally:
                if counted:
                    self._unauthenticated -= 1
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(raw)
