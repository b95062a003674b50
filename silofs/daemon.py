"""The daemon: puts store, write log, engine, FUSE session and control socket together, and takes them apart again.

Started by the holder as `python -m silofs.daemon`, with two inherited sockets: the channel to the holder and the FUSE
session. Everything else comes over the channel when its time has come (silofs/mount/channel.py has the messages): the
store's lock and the log with `open`, the mount with `serve`. Until `open`, this process has nothing that another one
could miss, and may be killed or may wait for weeks as somebody's successor.

Order at the end: no request is read any more, those that were read are answered (at most DRAIN_S), everything is
committed, the store is closed, and `bye clean` tells the holder that the log is empty. A holder that died is noticed by
the channel's end: the daemon goes on serving, without anybody who would replace it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from silofs import __version__, buffers, control, limits
from silofs.engine import Engine
from silofs.errors import SiloError, TryAgain
from silofs.figures import Figures
from silofs.freezing import Freezes
from silofs.layers import memfd, schema
from silofs.layers.log import WriteLog
from silofs.layers.notes import Notes
from silofs.layers.requests import forget, remembered
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.mount import extension, logfile  # the first before pyfuse3 is imported
from silofs.mount.channel import Channel, ChannelError, Message
from silofs.mount.files import Space, Volumes
from silofs.mount.fuse import Adapter
from silofs.mount.requests import Requests
from silofs.mount.session import Session
from silofs.peers.service import Peers
from silofs.service import Service
from silofs.verbs import bury

log = logging.getLogger("silofs.daemon")

SOCKET = "control.sock"
SESSION_OPTIONS = {"fsname=silofs", "subtype=silofs"}  # the mount's real options are the holder's


class Holder:
    """The daemon's end of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._answers: dict[int, str] = {}
        self._asked = 0
        self._changed = trio.Event()
        self.pid: int | None = os.getppid()

    async def receive(self) -> Message | None:
        """The next message; None when the holder is gone."""
        while True:
            try:
                return self._channel.receive()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._channel.fileno())
            except ChannelError:
                log.exception("the holder sent what is no message")

    @property
    def gone(self) -> bool:
        """Whether it is dead, so that nothing of what it asked for is of use to anybody."""
        return self._channel.gone

    def send(self, op: str, **fields: Any) -> None:
        self._channel.send(op, **fields)

    def answered(self, message: Message) -> None:
        self._answers[int(message.fields.get("id", 0))] = str(message.fields.get("error", ""))
        self.changed()

    def changed(self) -> None:
        """Something happened that `restart` waits for."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def restart(self, draining: trio.Event) -> None:
        """Ask for a successor; returns when it is warm and this daemon was told to drain. Raises its refusal."""
        if self.pid is None:
            raise TryAgain("the holder is dead, so nobody could start another daemon", hint="stop the VMs and remount")
        self._asked += 1
        mine = self._asked
        self.send("restart", id=mine)
        while not draining.is_set():
            if mine in self._answers:
                raise SiloError(self._answers.pop(mine), hint="the present daemon goes on; see silofs.log in the store")
            await self._changed.wait()


class Daemon:
    """One generation of a mount's daemon."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._holder = Holder(Channel.inherited(args.channel))
        self._adapter = Adapter()
        self._session = Session(self._adapter, args.session, SESSION_OPTIONS)
        self._store: Store
        self._log: WriteLog
        self._engine: Engine
        self._learnt = 0  # places of the store that the last daemon died of
        self._state = "starting"
        self._draining = trio.Event()
        self._serving = trio.CancelScope()
        self._restarts = 0
        self._deaths: int | None = None
        self._refused: dict[str, Any] | None = None  # why the program of a restart is not the one that serves
        self._capabilities: list[str] = []

    # Coming up

    async def run(self) -> int:
        """The whole life of this process; its exit status."""
        opened = False
        while True:
            message = await self._holder.receive()
            if message is None:
                return 1  # the holder died before it was this daemon's turn
            if message.op == "init":
                if not await self._initialise():
                    return 1  # as above: nobody is there who could hear the answer
            elif message.op == "open":
                refused = self._open(*message.fds, killed=int(message.fields.get("killed", signal.SIGBUS)))
                if refused is not None:
                    return refused
                opened = True
                self._holder.send("opened", learnt=self._learnt)
            elif message.op == "serve" and opened:
                return await self._serve(message)
            elif message.op == "log":
                self._begin_log(*message.fds)
            elif message.op == "quit" and opened:
                self._close()  # recover() has committed the log, and nothing was admitted since
                return 0

    async def _initialise(self) -> bool:
        """Answer INIT; False when the holder is dead, as when it was killed with the serving daemon in that moment."""
        if self._holder.gone:
            return False
        formats = range(1, schema.FORMAT_VERSION + 1)
        self._holder.send("able", abilities=extension.abilities, logs=memfd.KNOWN, formats=[*formats])
        answered = True
        try:
            await self._session.initialise()
        except* OSError:
            if not self._holder.gone:
                raise
            answered = False
        return answered

    def _open(self, lock: int, memory: int, *, killed: int) -> int | None:
        """Open the store and replay the log; the exit status when that cannot be done, after the holder was told."""
        try:
            path, logged = Path(self._args.store), WriteLog.formatted(memory)
            notes = self._look_back(path, memfd.Memfd(memory), killed) if logged else None
            self._store = Store.open(path, lock_fd=lock, replay=not logged, notes=notes)
            if not logged:
                WriteLog.format(memory, self._store.uuid)
            self._log = WriteLog.open(memory, self._store.uuid)
            if notes is None and self._log.memory.superblock.notes:
                self._store.take_notes(Notes(self._log.memory.notes))
            self._engine = Engine(self._store, self._log)
            self._engine.recover()
        except (SiloError, OSError) as error:
            refusal = error if isinstance(error, SiloError) else SiloError(str(error))
            log.error("cannot open the store: %s", refusal)
            self._holder.send(
                "failed", code=refusal.code, message=refusal.message, hint=refusal.hint, exit=refusal.exit_code
            )
            return refusal.exit_code
        return None

    def _look_back(self, path: Path, memory: memfd.Memfd, killed: int) -> Notes | None:
        """The notes of the last daemon; what it died of is known afterwards. None: its program took none."""
        if not memory.superblock.notes:
            return None
        notes = Notes(memory.notes)
        if killed == signal.SIGBUS:
            places = Store.learn(path, notes)
            self._learnt = len(places)
            for place in places:
                log.error("%s: it is left alone from now on", place)
        return notes

    # Serving

    async def _serve(self, message: Message) -> int:
        (fuse,) = message.fds
        self._log.upgrade()  # not before it is known that this program can open the store: then the old one goes on
        self._restarts = int(message.fields.get("restarts", 0))
        self._deaths = message.fields.get("deaths")  # a holder of an earlier program does not say
        self._refused = message.fields.get("refused")
        self._capabilities = [str(word) for word in message.fields.get("capabilities", [])]
        service = Service(self._engine, host=self)
        held = Freezes(self._engine)
        held.register(service)

        async with trio.open_nursery() as nursery:
            peers = Peers(self._engine, self._args.listen)
            await nursery.start(self._engine.run)
            await nursery.start(held.run)
            await peers.start(nursery, service)
            Figures(self._engine, self, peers=peers.statistics, migrations=peers.migrations).register(service)
            requests = await self._take_up()
            service.settled = requests.settled.wait
            log, guard = self._log, service.guard
            self._adapter.bind(
                Volumes(self._engine, log.handles, log.locks, service.view, self._space, guard, requests)
            )
            log.show_room(extension.room)
            nursery.start_soon(trio.to_thread.run_sync, extension.read_into, log.ring, self._adapter.write_placed)
            await nursery.start(control.serve, self._store.path / SOCKET, service)
            nursery.start_soon(self._listen)
            nursery.start_soon(self._signals)
            nursery.start_soon(self._give_back)
            can_resend = "resend" in self._capabilities
            engine = self._engine
            crowd, bell = engine.writes, engine.bell
            self._session.attach(fuse, can_resend=can_resend, seen=requests.seen, bell=bell, crowd=crowd)
            self._state = "serving"
            self._holder.send("serving", format=schema.FORMAT_VERSION)  # a store of an earlier one was brought up to it
            with self._serving:
                await self._session.serve()
            self._state = "stopping"
            await self._engine.commit_all()
            nursery.cancel_scope.cancel()
        self._close()
        return 0

    async def _take_up(self) -> Requests:
        """Drop what belongs to mounts of the past, and volumes that were removed and that nobody has open any more."""
        mount = self._log.memory.superblock.secret
        txn = self._engine.reads.txn
        past = [number for number, done in remembered(txn).items() if done.mount != mount]
        opened = {handle.uuid for handle in self._log.handles.items()}
        orphans = [volume.uuid for volume in txn.orphans() if volume.uuid not in opened]

        def drop(txn: WriteTxn) -> None:
            forget(txn, past)
            for uuid in orphans:
                bury(txn, uuid)

        if past or orphans:
            await self._engine.transact(drop)
        return Requests(mount, extension.request_unique, lambda: self._engine.reads.txn)

    def _close(self) -> None:
        self._engine.close()
        self._store.close()
        self._holder.send("bye", clean=True)

    async def _listen(self) -> None:
        """What the holder says while this daemon serves."""
        while True:
            message = await self._holder.receive()
            if message is None:
                self._holder.pid = None
                log.warning("the holder is dead: this daemon goes on, but nobody will replace it")
                self._holder.changed()
                return
            if message.op == "ping":
                self._holder.send("pong", n=message.fields.get("n"))
            elif message.op == "log":
                self._begin_log(*message.fds)
            elif message.op == "drain":
                self._drain()
            elif message.op == "answer":
                self._holder.answered(message)

    @staticmethod
    def _begin_log(file: int) -> None:
        logfile.use(file)
        os.close(file)

    async def _signals(self) -> None:
        """SIGTERM drains; a second one does not wait for the requests that are still unanswered."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as arrived:
            async for _ in arrived:
                if self._draining.is_set():
                    self._serving.cancel()
                self._drain()

    @staticmethod
    async def _give_back() -> None:
        while True:
            await trio.sleep(limits.MEMORY_LOOK_S)
            await trio.to_thread.run_sync(buffers.give_back)

    def _drain(self) -> None:
        if self._draining.is_set():
            return
        self._draining.set()
        self._state = "stopping"
        # Requests that wait for a peer or a freeze are given up: the next daemon gets them again.
        self._serving.deadline = trio.current_time() + limits.DRAIN_S
        self._session.drain()
        self._holder.changed()

    # What the control socket's verbs need

    async def restart(self) -> None:
        """`silofs restart`: returns once a successor is ready and this daemon is leaving. Raises why it is not."""
        await self._holder.restart(self._draining)

    def status(self) -> dict[str, Any]:
        """The daemon's part of `silofs status`."""
        readonly = self._state == "serving" and self._store.broken
        return {
            "state": "readonly" if readonly else self._state,
            "version": __version__,
            "mountpoint": self._args.mountpoint,
            "store": str(self._store.path),
            "daemon_pid": os.getpid(),
            "holder_pid": self._holder.pid,
            "listen": self._args.listen,
            "restarts": self._restarts,
            "deaths": self._deaths,
            "refused": self._refused,
            "capabilities": self._capabilities,
            "open_handles": len(self._log.handles),
            "no_journal": self._engine.commits.journal.absent or None,
            "requests_refused": self._adapter.counters.refused,
            "background": self._engine.background.statistics(),
            "handler_bugs": self._adapter.counters.bugs,
            "quarantined": self._store.quarantined(),
        }

    def _space(self) -> Space:
        space = os.statvfs(self._store.path)
        return Space(total=space.f_blocks * space.f_frsize, free=max(0, self._store.room()))


class _Seldom(logging.Filter):
    """One record a minute, without its traceback: of trio's complaint, ten times a second, that it cannot accept."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._next:
            return False
        self._next = record.created + limits.SAME_COMPLAINT_S
        record.exc_info = None
        return True


def _be_killed_first() -> None:
    """Undo what was inherited from the holder: when memory is short, the daemon is the one that can be replaced."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="silofs-daemon")
    parser.add_argument("--store", required=True)
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--session", type=int, required=True)
    parser.add_argument("--listen")
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("trio.serve_listeners").addFilter(_Seldom())
    _be_killed_first()
    buffers.keep()
    os.set_inheritable(args.session, False)
    return trio.run(Daemon(args).run)


if __name__ == "__main__":
    sys.exit(main())
