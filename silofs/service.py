"""The verbs inside the daemon: short ones as transactions of the engine, long ones in a thread (transfers.py).

The functions are those of silofs.verbs, which also run without a daemon; here is only what the daemon adds: a
transaction that commits the volumes' pending writes first, progress, and cancelling. Other parts of the daemon
register the verbs that are theirs (restart, peers, migrations).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from silofs import verbs
from silofs.control import Call, Handler
from silofs.errors import StoreError, Unsupported
from silofs.facts import Fields, View
from silofs.layers.catalog import Volume
from silofs.transfers import Transfers, Volumes, in_thread
from silofs.verbs import Args

CHANGES: Final = frozenset({"snapshot", "clone", "rm", "rollback", "rename", "resize"})
UNCHANGING: Final = frozenset(
    {"status", "statistics", "restart", "sync", "check", "peer_ls", "migration_ls", "migration_show"}
)


class Host(Protocol):
    """What the service needs of the daemon that it is in."""

    async def restart(self) -> None: ...

    def status(self) -> Fields: ...


class Service:
    """All verbs of one daemon; without a `host` those that work on volumes.

    before_change: awaited before a snapshot, clone, freeze, rm, rollback, rename or resize of a volume, with (verb,
    name); a migration refuses there (Busy), or ends its attempt. settled: awaited before a verb that may change
    anything: what an earlier daemon left unanswered comes first. frozen: what `status` says of freezes. migrations:
    counts those that are not over, for `status`. peer_name: what a peer is called here, by what ownership records call
    it.
    """

    def __init__(self, engine: Volumes, host: Host | None = None) -> None:
        self.migrations: Callable[[], int] = lambda: 0
        self.peer_name: Callable[[str], str] = str
        self.before_change: Callable[[str, str], Awaitable[None]] | None = None
        self.frozen: Callable[[], Fields] = dict
        self.settled: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._engine = engine
        self._host = host
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        for verb in verbs.READS:
            self._handlers[verb] = (self._reads(verb), True)
        for verb in verbs.WRITES:
            self._handlers[verb] = (self._writes(verb), False)
        self.register("status", self._status)
        self.register("restart", self._restart)
        self.register("sync", self._sync)
        transfers = Transfers(engine, self.view)
        self.register("import", transfers.load, cancellable=True)
        self.register("export", transfers.unload, cancellable=True)
        self.register("import_stream", transfers.receive, cancellable=True)
        self.register("import_abandon", transfers.abandon)
        self.register("export_stream", transfers.send, cancellable=True)
        self.register("diff", transfers.diff, cancellable=True)
        self.register("check", self._check, cancellable=True)

    def register(self, verb: str, handler: Handler, *, cancellable: bool = False) -> None:
        """Serve a verb. cancellable: a client that goes away cancels it."""
        assert verb not in self._handlers, verb
        self._handlers[verb] = (handler, cancellable)

    def cancellable(self, verb: str) -> bool:
        found = self._handlers.get(verb)
        return found is not None and found[1]

    async def call(self, verb: str, args: Args, call: Call) -> Fields:
        """The result of a verb. Raises SiloError."""
        found = self._handlers.get(verb)
        if found is None:
            raise Unsupported(f"this daemon has no verb {verb[:64]!r}", hint="silofs version shows its version")
        if verb not in verbs.READS and verb not in UNCHANGING:
            await self.settled()
        if verb in CHANGES:
            for name in _subjects(verb, args):
                await self.guard(verb, name)
        return await found[0](args, call)

    async def guard(self, verb: str, name: str) -> None:
        """Ask whoever has a say before a volume changes; raises Busy."""
        if self.before_change is not None:
            await self.before_change(verb, name)

    def view(self) -> View:
        """What verbs show beside the store's records, as of now."""
        handles = list(self._engine.log.handles.items())
        opens = Counter(handle.uuid for handle in handles if not handle.layer)
        snapshots = Counter(handle.uuid for handle in handles if handle.layer)
        # Taken now, on the event loop: the verb may run in a thread.
        buffered = {
            v.uuid: self._engine.shown(v.record) for v in self._engine.volumes() if isinstance(v.record, Volume)
        }

        def shown(volume: Volume) -> tuple[Volume, int, int]:
            return buffered.get(volume.uuid) or (volume, volume.size, volume.data_pages)

        store = self._engine.store
        mountpoint = self._about().get("mountpoint")
        return View(store.path, mountpoint, opens, self.peer_name, shown, store.usage.dead_pages, snapshots)

    def _about(self) -> Fields:
        return {} if self._host is None else self._host.status()

    def _reads(self, verb: str) -> Handler:
        run = verbs.READS[verb]

        async def handle(args: Args, call: Call) -> Fields:
            view = self.view()

            def read() -> Fields:
                reader = self._engine.store.reader()
                try:
                    return run(reader, args, view)
                finally:
                    reader.close()

            return await trio.to_thread.run_sync(read)

        return handle

    def _writes(self, verb: str) -> Handler:
        run = verbs.WRITES[verb]

        async def handle(args: Args, call: Call) -> Fields:
            view = self.view()
            return await self._engine.transact(lambda txn: run(txn, args, view))

        return handle

    async def _status(self, args: Args, call: Call) -> Fields:
        fields = {"store": str(self._engine.store.path), "dirty_bytes": self._engine.dirty_bytes}
        fields |= {"migrations": self.migrations(), "volumes": None, **self.frozen(), **self._about()}
        fields["space"] = dataclasses.asdict(self._engine.store.held.statistics())
        if self._engine.store.broken and fields.get("state") == "serving":
            fields["state"] = "readonly"
        with contextlib.suppress(StoreError):  # a store that cannot be read is no reason to say nothing
            fields |= await self._reads("count")(args, call)
        return fields

    async def _restart(self, args: Args, call: Call) -> Fields:
        if self._host is None:
            raise Unsupported("nobody would start another daemon")
        await self._host.restart()
        return {}

    async def _sync(self, args: Args, call: Call) -> Fields:
        await self._engine.transact(lambda txn: None)
        return {}

    async def _check(self, args: Args, call: Call) -> Fields:
        store = self._engine.store
        return await in_thread(call, lambda progress, cancelled: verbs.check(store, args, progress, cancelled))


def _subjects(verb: str, args: Args) -> list[str]:
    """The volumes that a verb is going to change."""
    if verb == "snapshot":
        return [name for name, _ in verbs.targets(args)]
    return [verbs.name_in(args, _SUBJECT.get(verb, "volume"))]


_SUBJECT: Final = {"clone": "source", "rename": "old", "resize": "name"}
