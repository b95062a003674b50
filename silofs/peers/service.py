"""The peers of one daemon: puts the parts together and runs them beside the mount."""

from __future__ import annotations

from typing import Any

import trio

from silofs.engine import Engine
from silofs.peers import identity, records, tls
from silofs.peers.book import Book
from silofs.peers.hub import Hub
from silofs.peers.listener import Listener
from silofs.peers.migrations import Migrations
from silofs.peers.remote_reads import RemoteReads
from silofs.peers.verbs import Verbs, own_name, reachable
from silofs.service import Service


class Peers:
    """Everything about peers in one daemon. Made before the engine runs, which asks it which volumes are on the move;

    `start` it in the daemon's nursery before the mount serves requests.
    """

    def __init__(self, engine: Engine, listen: str | None) -> None:
        self._identity = identity.ensure(engine.store.path)
        self._book = Book(engine.store, self._changed)
        self._hub = Hub(engine.store, self._identity, self._book, name=own_name(), listening=self.listening)
        self._migrations = Migrations(engine, self._hub, self._book, self._identity)
        self._hub.bind(self._migrations)
        reads = RemoteReads(self._migrations)
        self._migrations.reads = reads
        engine.attach(reads)
        engine.moving = records.moving
        self._listener: Listener | None = None
        if listen is not None:
            self._listener = Listener(
                listen,
                context=lambda: tls.server_context(
                    self._identity,
                    [peer.certificate for peer in self._book.all()],
                    inviting=self._hub.invitations.answering(trio.current_time()),
                ),
                wanted=lambda: bool(len(self._book)) or self._inviting(),
                handler=self._hub.accepted,
            )
        self._verbs = Verbs(self._identity, self._book, self._hub, self._listener, self._migrations)

    async def start(self, nursery: trio.Nursery, service: Service) -> None:
        """Resume what was open, listen if asked to, and serve the verbs."""
        await nursery.start(self._migrations.run)
        nursery.start_soon(self._hub.run)
        if self._listener is not None:
            nursery.start_soon(self._listener.run)
            nursery.start_soon(self._expire_invitations)
        self._verbs.register(service)

    def listening(self) -> str | None:
        """The address for peers, as others can dial it; None without a listener."""
        return reachable(self._listener.address) if self._listener is not None else None

    def migrations(self) -> list[dict[str, Any]]:
        return self._migrations.listed()

    def statistics(self) -> dict[str, Any]:
        found: dict[str, Any] = {"sessions": len(self._hub.links()), "sessions_begun": self._hub.sessions_begun}
        if self._listener is not None:
            found["listener"] = self._listener.statistics()
        return found

    def _inviting(self) -> bool:
        return self._hub.invitations.inviting(trio.current_time())

    def _changed(self) -> None:
        """A peer came or went."""
        if self._listener is not None:
            self._listener.update()

    async def _expire_invitations(self) -> None:
        """The port closes when the last invitation has expired and nobody is paired."""
        assert self._listener is not None
        while True:
            now = trio.current_time()
            soonest = self._hub.invitations.next_expiry(now)
            await trio.sleep(1.0 if soonest is None else min(max(soonest - now, 0.1), 1.0))
            if self._listener.open and not (len(self._book) or self._inviting()):
                self._listener.update()
