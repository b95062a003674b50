"""The verbs inside the daemon: short ones as transactions of the engine, long ones in a thread beside it.

The functions are those of silofs.verbs and silofs.images, which also run without a daemon; here is only what the daemon
adds: a transaction that commits the volumes' pending writes first, progress, and cancelling. Other parts of the daemon
register the verbs that are theirs (restart, peers, migrations).
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import trio

from silofs import images, verbs
from silofs.control import Call, Handler
from silofs.engine.volume import VolumeState
from silofs.errors import StoreError, Unsupported, UserError
from silofs.facts import Fields, View
from silofs.layers.catalog import Volume
from silofs.layers.log import WriteLog
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.verbs import Args

T = TypeVar("T")

REPORT_S = 0.25  # between two progress lines of work that runs in a thread
CHANGES = frozenset({"snapshot", "clone", "rm", "rollback", "rename", "resize"})


class Volumes(Protocol):
    """What the service needs of silofs.engine.Engine."""

    @property
    def store(self) -> Store: ...

    @property
    def log(self) -> WriteLog: ...

    @property
    def dirty_bytes(self) -> int: ...

    def volumes(self) -> Iterable[VolumeState]: ...

    def shown(self, record: Volume) -> tuple[Volume, int, int]: ...

    async def transact(self, fn: Callable[[WriteTxn], T]) -> T: ...


class Host(Protocol):
    """What the service needs of the daemon that it is in."""

    async def restart(self) -> None: ...

    def status(self) -> Fields: ...


class Service:
    """All verbs of one daemon; without a `host` those that work on volumes.

    before_change: awaited before a snapshot, clone, rm, rollback, rename or resize of a volume, with (verb, name); a
    migration refuses there (Busy), or ends its attempt. migrations: counts those that are not over, for `status`.
    peer_name: what a peer is called here, by what ownership records call it.
    """

    def __init__(self, engine: Volumes, host: Host | None = None) -> None:
        self.migrations: Callable[[], int] = lambda: 0
        self.peer_name: Callable[[str], str] = str
        self.before_change: Callable[[str, str], Awaitable[None]] | None = None
        self._engine = engine
        self._host = host
        self._loads = 0  # imports and exports under way
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        for verb in verbs.READS:
            self._handlers[verb] = (self._reads(verb), True)
        for verb in verbs.WRITES:
            self._handlers[verb] = (self._writes(verb), False)
        self.register("status", self._status)
        self.register("restart", self._restart)
        self.register("sync", self._sync)
        self.register("import", self._import, cancellable=True)
        self.register("export", self._export, cancellable=True)
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
        if verb in CHANGES and self.before_change is not None:
            await self.before_change(verb, verbs.name_in(args, _SUBJECT.get(verb, "volume")))
        return await found[0](args, call)

    def view(self) -> View:
        """What verbs show beside the store's records, as of now."""
        opens = Counter(handle.uuid for handle in self._engine.log.handles.items() if not handle.layer)
        # Taken now, on the event loop: the verb may run in a thread.
        buffered = {
            v.uuid: self._engine.shown(v.record) for v in self._engine.volumes() if isinstance(v.record, Volume)
        }

        def shown(volume: Volume) -> tuple[Volume, int, int]:
            return buffered.get(volume.uuid) or (volume, volume.size, volume.data_pages)

        return View(self._engine.store.path, self._about().get("mountpoint"), opens, self.peer_name, shown)

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
        fields |= {"migrations": self.migrations(), "volumes": None, **self._about()}
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

    async def _import(self, args: Args, call: Call) -> Fields:
        fd, store, view = _one(call), self._engine.store, self.view()
        verbs.name_in(args, "name")
        wanted = verbs.optional_size(args, "size")
        loaded: images.Loaded | None = None

        def load(progress: images.Progress, cancelled: images.Cancelled) -> None:
            nonlocal loaded
            batch = images.SHARED_BATCH_BYTES
            loaded = images.load(store, fd, wanted, progress=progress, cancelled=cancelled, batch_bytes=batch)

        await self._reap()
        self._loads += 1
        try:
            await in_thread(call, load)
            held, loaded = loaded, None
            assert held is not None
            try:
                return await self._engine.transact(lambda txn: verbs.adopt(txn, args, view, held))
            except BaseException:
                loaded = held
                raise
        finally:
            self._loads -= 1
            if loaded is not None:
                left = loaded
                with trio.CancelScope(shield=True):
                    await self._engine.transact(lambda txn: images.let_go(txn, left.layer, left.holder))

    async def _export(self, args: Args, call: Call) -> Fields:
        fd, store = _one(call), self._engine.store
        holder = images.PIN_EXPORT + uuid.uuid4().hex

        def hold(txn: WriteTxn) -> tuple[int, int, int]:
            # The head goes on changing: what is exported is sealed first, as for a clone.
            layer, size, total = verbs.exported(txn, args)
            txn.pin(layer, holder)
            return layer, size, total

        self._loads += 1
        try:
            layer, size, total = await self._engine.transact(hold)
            try:
                written = await in_thread(
                    call,
                    lambda progress, cancelled: images.unload(
                        store, layer, size, fd, total=total, progress=progress, cancelled=cancelled
                    ),
                )
            finally:
                with trio.CancelScope(shield=True):
                    await self._engine.transact(lambda txn: images.let_go(txn, layer, holder))
        finally:
            self._loads -= 1
        return {"size": size, "bytes_written": written}

    async def _reap(self) -> None:
        """Drop what a daemon that was killed had loaded; nobody but this daemon can have work under way."""
        if not self._loads:
            await self._engine.transact(images.reap)


_SUBJECT = {"clone": "source", "rename": "old", "resize": "name"}


def _one(call: Call) -> int:
    if len(call.fds) != 1:
        raise UserError("this verb takes one open file")
    return call.fds[0]


async def in_thread(call: Call, work: Callable[[images.Progress, images.Cancelled], T]) -> T:
    """Run long synchronous work in a thread; its progress goes to the client, and a cancel makes it stop by itself."""
    latest: list[Fields] = []  # the newest report, or nothing; one list operation each side
    stop = threading.Event()
    done: list[T] = []
    failed: list[Exception] = []

    def note(fields: Fields) -> None:
        latest[:] = [fields]

    async def report() -> None:
        try:
            while True:
                await trio.sleep(REPORT_S)
                if latest:
                    await call.progress(**latest.pop())
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        try:
            done.append(await trio.to_thread.run_sync(work, note, stop.is_set))
        except Exception as error:
            failed.append(error)
        nursery.cancel_scope.cancel()
    if failed:
        raise failed[0]
    return done[0]
