"""The holder: a small process that owns a mount while the daemons that serve it come and go.

It keeps the descriptors whose last close would lose something: /dev/fuse (the mount and the requests waiting in it),
the store's lock, and the memfd with the write log and the table of open handles. A daemon gets them over a socket when
its turn has come. When it dies, the kernel is told to queue again what it had read and not answered
(FUSE_NOTIFY_RESEND, while nobody reads), and the next daemon is given its place: it replays the log, takes the
requests, and a running VM has seen a pause.

A successor is started ahead of its time and waits *warm*: imported, its FUSE session initialised with the kernel's
INIT request, with neither store nor mount. INIT is replayed to it over a socket; its reply has to be, byte for byte,
the first daemon's, since the kernel goes by that one for as long as the mount lives. So a crash costs the opening of
the store, and an upgrade is refused before the old daemon is stopped if the new one would speak another FUSE dialect.

Rules that keep it alive: it imports neither trio nor LMDB, never opens anything on its mount, never waits for a daemon,
and has an oom_score_adj of -900. It ends when the mount is gone *and* a daemon said that the log is committed; before
that it starts daemons for as long as it takes. docs/mount.md has the table of deaths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silofs import limits
from silofs.errors import SiloError
from silofs.mount import kernel, logfile, prepare
from silofs.mount.backoff import Backoff
from silofs.mount.channel import ChannelError, Message
from silofs.mount.child import Child, Stage
from silofs.mount.watches import Watches


class Holder:
    """One mount from mount(2) to the last commit after umount(2). `run` is the whole life of the process."""

    def __init__(self, store: Path, mountpoint: Path, options: kernel.Options, module: str, arguments: Sequence[str]):
        self._store, self._mountpoint, self._options = store, mountpoint, options
        self._module, self._arguments = module, [*arguments, "--store", str(store), "--mountpoint", str(mountpoint)]
        self._ready: Callable[[dict[str, Any]], None] | None = None
        self._backoff = Backoff()
        self._watches = Watches()
        self._current: Child | None = None  # the one that has the store
        self._spares: list[Child] = []  # successors, the preferred one first
        self._fuse = -1
        self._log = -1
        self._lock = -1
        self._init: kernel.Init | None = None
        self._init_reply: bytes | None = None
        self._abilities: tuple[str, ...] = ()  # of the daemon whose reply that was
        self._generations = 0  # daemons that served
        self._deaths = 0  # of daemons that had the store, by whatever they had not been asked for
        self._promote_at = 0.0
        self._ping_at = 0.0
        self._restart: tuple[Child, int] | None = None  # the successor that a `restart` waits for, and its id
        self._unusable = ""  # why the last daemon that was started could not take over
        self._format = 0  # of the store, as the last daemon said that served
        self._last_exit = ""
        self._killed = 0  # the signal that ended the last daemon
        self._refused: dict[str, Any] | None = None  # what the last daemon said that could not open the store,
        self._refused_at = 0.0  # and when it had been started
        self._over: int | None = None  # exit status once everything is done
        self._wakeup, wakeup_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        self._watches.add(self._wakeup, self._signalled)

    # The start

    def run(self, ready: Callable[[dict[str, Any]], None]) -> int:
        """Hold the mount until it is gone; the exit code. `ready` is told once, when the mount answers.

        Raises SiloError when it cannot come up: nothing is mounted then.
        """
        self._ready = ready
        prepare.file_sizes()
        self._lock = prepare.lock_store(self._store)
        try:
            prepare.mountpoint(self._store, self._mountpoint, self._options)
            self._new_log()
            self._current = self._spawn()
            self._open(self._current)
            while self._over is None:
                self._turn()
        finally:
            self._end()
        return self._over

    def _new_log(self) -> None:
        """An empty memfd; the daemon lays the write log out in it."""
        self._log = os.memfd_create("silofs-log", os.MFD_CLOEXEC)

    def _mount(self) -> None:
        try:
            self._fuse = kernel.mount(str(self._mountpoint), str(self._store), self._options)
        except OSError as error:
            raise SiloError(f"cannot mount on {self._mountpoint}: {error.strerror}") from error
        self._init = kernel.read_init(self._fuse, timeout_s=10.0)

    # Daemons

    def _spawn(self) -> Child:
        child = Child(self._module, self._arguments)
        child.enter(Stage.BOOTING, time.monotonic())
        self._watches.add(child.pidfd, lambda: self._died(child))
        self._watches.add(child.channel.fileno(), lambda: self._messages(child))
        self._watches.add(child.session.fileno(), lambda: self._init_replied(child))
        return child

    def _spare(self) -> Child:
        """A successor, shown INIT at once."""
        assert self._init is not None
        child = self._spawn()
        child.show_init(self._init)
        return child

    def _open(self, child: Child) -> None:
        child.enter(Stage.OPENING, time.monotonic())
        child.channel.send("open", [self._lock, self._log], killed=self._killed)

    def _serve(self, child: Child) -> None:
        assert self._init is not None
        capabilities = [*self._init.capabilities, *self._abilities]
        child.channel.send(
            "serve",
            [self._fuse],
            restarts=self._generations,
            deaths=self._deaths,
            capabilities=capabilities,
            refused=self._refusal_before(child),
        )

    def _refusal_before(self, child: Child) -> dict[str, Any] | None:
        """Why the program of a restart could not open the store, and this daemon, which is older, serves."""
        return self._refused if child.started_at < self._refused_at else None

    def _promote(self) -> None:
        """Give the place of a dead daemon to the first successor that is warm; start one if there is none."""
        assert self._init is not None
        if kernel.disconnected(self._fuse):
            self._discard_spares()
            self._current = self._spawn()  # only to commit what the log still holds: it is never shown the mount
            self._open(self._current)
            return
        if not self._spares:
            self._spares.append(self._spare())
        child = next((spare for spare in self._spares if spare.stage is Stage.WARM), None)
        if child is not None:
            if self._init.can_resend:
                kernel.resend(self._fuse)
            self._spares.remove(child)
            self._current = child
            self._open(child)

    def _discard_spares(self) -> None:
        for child in self._spares:
            child.enter(Stage.LEAVING, time.monotonic())
            child.kill()
        self._spares.clear()

    # What happens

    def _messages(self, child: Child) -> None:
        try:
            for message in child.messages():
                self._message(child, message)
        except ChannelError as error:
            self._note(f"daemon {child.pid}: {error}")
            child.kill()
        self._watches.remove_closed(child.channel.fileno())

    def _message(self, child: Child, message: Message) -> None:
        now = time.monotonic()
        op = message.op
        if op == "opened" and child is self._current:
            child.enter(Stage.OPENED, now)
            if message.fields.get("learnt"):
                self._backoff.learnt()
            if self._init is None:
                self._mount()
                assert self._init is not None
                child.show_init(self._init)
            elif kernel.disconnected(self._fuse):
                child.channel.send("quit")
            else:
                self._serve(child)
        elif op == "serving" and child is self._current:
            child.enter(Stage.SERVING, now)
            child.unanswered = 0
            self._format, self._unusable = int(message.fields.get("format", 0)), ""
            self._generations += 1
            self._refused = self._refusal_before(child)
            self._backoff.served()
            for older in [spare for spare in self._spares if spare.started_at < child.started_at]:
                self._drop_spare(older, "a newer daemon serves")  # after a restart: it would be the old program
            self._note(f"daemon {child.pid} serves {self._mountpoint}")
            self._publish()
            if self._ready is not None:
                ready, self._ready = self._ready, None
                ready({"ok": True, "holder_pid": os.getpid(), "daemon_pid": child.pid})
        elif op == "able":
            child.abilities = tuple(str(word) for word in message.fields.get("abilities", ()))
            child.logs = tuple(int(version) for version in message.fields.get("logs", child.logs))
            child.formats = tuple(int(version) for version in message.fields.get("formats", ()))
        elif op == "failed":
            child.refusal = {key: message.fields.get(key) for key in ("code", "message", "hint", "exit")}
        elif op == "pong":
            child.unanswered = 0
        elif op == "bye":
            child.clean = bool(message.fields.get("clean"))
            child.enter(Stage.LEAVING, now)
        elif op == "restart" and child is self._current:
            self._begin_restart(int(message.fields.get("id", 0)))

    def _init_replied(self, child: Child) -> None:
        try:
            reply = child.init_reply()
        except BlockingIOError:
            return
        self._watches.remove(child.session.fileno())
        if reply is None:
            return  # it is dying; its pidfd says so too
        self._messages(child)  # its abilities, which it named before it replied
        if self._init_reply is None:
            assert self._init is not None
            self._init_reply, self._abilities = reply, child.abilities
            os.write(self._fuse, kernel.widen(self._init, reply, child.abilities))
            self._serve(child)
            return
        why = self._unfit(child, reply)
        if not why:
            self._unusable = ""
            child.enter(Stage.WARM, time.monotonic())
            self._warm(child)
            return
        self._note(f"daemon {child.pid} is not used: {why}")
        self._unusable = why
        self._promote_at = time.monotonic() + self._backoff.failed()
        self._drop_spare(child, why)
        if self._current is None:
            self._publish()

    def _unfit(self, child: Child, reply: bytes) -> str:
        """Why a new daemon cannot take the present one's place; empty when it can."""
        lost = [word for word in self._abilities if word not in child.abilities]
        version = prepare.log_version(self._log)
        if lost:
            return f"the new daemon cannot do what the mount was made with: {', '.join(lost)}"
        if version not in child.logs:
            return f"the new daemon does not know version {version} of the write log"
        if self._format and child.formats and self._format not in child.formats:
            return f"the new daemon does not know version {self._format} of the store's format"
        if reply != self._init_reply:
            return "the new daemon speaks another FUSE dialect than the mount was made with"
        return ""

    def _begin_restart(self, request: int) -> None:
        """A daemon started from the program as it is now, shown INIT; only then is the present one told to go."""
        if self._restart is not None and self._current is not None:
            self._current.channel.send("answer", id=request, error="another restart is under way")
            return
        child = self._spare()
        self._spares.insert(0, child)  # an older spare stays: it takes over should the new one fail to open the store
        self._restart = (child, request)

    def _warm(self, child: Child) -> None:
        if self._restart is not None and self._restart[0] is child:
            self._restart = None
            if self._current is not None:
                self._current.channel.send("drain")
        if self._current is None and time.monotonic() >= self._promote_at:
            self._promote()

    def _drop_spare(self, child: Child, why: str) -> None:
        if self._restart is not None and self._restart[0] is child:
            if self._current is not None:
                self._current.channel.send("answer", id=self._restart[1], error=why)
            self._restart = None
        if child in self._spares:
            self._spares.remove(child)
            child.enter(Stage.LEAVING, time.monotonic())
            child.kill()

    def _died(self, child: Child) -> None:
        self._messages(child)  # its last words
        for fd in (child.pidfd, child.channel.fileno(), child.session.fileno()):
            self._watches.remove(fd)
        status = child.reap()
        if child is not self._current:
            if child in self._spares:
                self._note(f"waiting daemon {child.pid} ended with status {status}")
                self._promote_at = time.monotonic() + self._backoff.failed()
                self._publish()
            self._drop_spare(child, f"the new daemon ended with status {status}")
            return
        self._current = None
        now = time.monotonic()
        self._last_exit = child.ending(status)
        self._killed = max(0, -status)
        self._deaths += not child.clean
        self._note(f"daemon {child.pid} {self._last_exit}")
        if self._generations == 0:
            raise child.error(self._last_exit)
        if kernel.disconnected(self._fuse) and child.clean:
            self._over = 0
            return
        delay = 0.0
        if child.refusal is not None:
            self._refused, self._refused_at = child.refusal, child.started_at
            delay = self._backoff.failed()
            if any(spare.stage is Stage.WARM for spare in self._spares):
                delay = 0.0  # after a restart: the program of before may well be able to
        elif not child.clean:
            served = now - child.changed_at if child.stage is Stage.SERVING else 0.0
            delay = self._backoff.died(now, served_s=served)
        if delay:
            self._note(f"requests are held; the next start is in {delay:.0f} s")
        self._promote_at = now + delay
        if not delay:
            self._promote()
        self._publish()

    def _signalled(self) -> None:
        """SIGTERM and SIGINT ask for what `silofs umount` does; while files are open they change nothing."""
        os.read(self._wakeup, 64)
        if self._init is None:
            raise SiloError("interrupted before the mount was made")
        try:
            kernel.unmount(str(self._mountpoint), lazy=False)
        except OSError as error:
            self._note(f"asked to end, but {self._mountpoint} cannot be unmounted: {error.strerror}")
        self._promote_at = time.monotonic()  # with no daemon there, the log is to be committed now

    # The loop

    def _turn(self) -> None:
        """Wait for the next event or the next due time, and do what it asks for."""
        due = self._due()
        for then in self._watches.wait(None if due is None else max(0.0, due - time.monotonic()) + 0.001):
            self._attempt(then)
        self._attempt(lambda: self._timers(time.monotonic()))

    def _attempt(self, then: Callable[[], None]) -> None:
        """A fault of ours must not take the mount of running VMs along: it is reported, and the holder goes on."""
        try:
            then()
        except Exception as error:
            if self._generations == 0:
                raise
            self._note(f"{type(error).__name__}: {error}")
            time.sleep(0.1)  # so that a fault which repeats itself leaves the processor to others

    def _due(self) -> float | None:
        times = []
        current = self._current
        if current is None:
            if any(spare.stage is Stage.WARM for spare in self._spares) or not self._spares:
                times.append(self._promote_at)
            else:
                times.append(self._spares[0].changed_at + limits.START_S)
        elif current.stage is Stage.SERVING:
            times.append(self._ping_at)
            if not self._spares:
                times.append(max(current.changed_at + limits.STANDBY_S, self._promote_at))
        else:
            times.append(current.changed_at + _patience(current))
        return min(times, default=None)

    def _timers(self, now: float) -> None:
        current = self._current
        if self._over is not None:
            return
        if current is None:
            if now >= self._promote_at and self._generations:
                self._promote()
        elif current.stage is Stage.SERVING:
            if not self._spares and now >= max(current.changed_at + limits.STANDBY_S, self._promote_at):
                self._spares.append(self._spare())
            if now >= self._ping_at:
                self._ping(current, now)
                self._rotate()
        elif now >= current.changed_at + _patience(current):
            if not current.held_up:
                self._note(f"daemon {current.pid} is stuck while {current.stage.value}")
                current.kill()
            current.enter(current.stage, now)
        for spare in [spare for spare in self._spares if spare.stage is Stage.BOOTING]:
            if now >= spare.changed_at + limits.START_S:
                self._drop_spare(spare, "the new daemon did not come up")

    def _ping(self, current: Child, now: float) -> None:
        self._ping_at = now + limits.PING_DAEMON_S
        # Pings are counted and not seconds, since this process may have been held up itself. And whoever was held up a
        # moment ago gets the whole time to answer.
        if current.unanswered and current.held_up:
            current.unanswered = 0
        elif current.unanswered * limits.PING_DAEMON_S >= limits.PONG_DAEMON_S:
            self._note(f"daemon {current.pid} gave no sign of life for {limits.PONG_DAEMON_S:.0f} s")
            current.kill()
            current.unanswered = 0
        current.channel.send("ping", n=int(now * 1000))
        current.unanswered += 1

    # What others see

    def _rotate(self) -> None:
        """Begin a new log file once the old one is long enough."""
        if not logfile.due(self._store):
            return
        fd = logfile.rotate(self._store)
        for child in (*self._spares, *filter(None, [self._current])):
            child.channel.send("log", [fd])
        os.close(fd)

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the disk that the log is on may be full: no reason to end the mount
            print(f"silofs holder: {text}", file=sys.stderr, flush=True)

    def _publish(self) -> None:
        current = self._current
        serving = current is not None and current.stage is Stage.SERVING
        waiting = "holding" if self._backoff.holding else "starting"
        about: dict[str, Any] = {
            "state": "serving" if serving else waiting,
            "holder_pid": os.getpid(),
            "daemon_pid": current.pid if current is not None else None,
            "mountpoint": str(self._mountpoint),
            "restarts": max(0, self._generations - 1),
            "deaths": self._deaths,
            "last_exit": self._last_exit,
            "refused": self._refused,
        }
        if not serving and waiting == "holding":
            about["why"] = self._unusable or f"the last daemon {self._last_exit}"
            at = datetime.fromtimestamp(time.time() + max(0.0, self._promote_at - time.monotonic()), UTC)
            about["next_try"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            prepare.publish(self._store, about)
        except OSError as error:  # a full disk must not end a mount
            self._note(f"cannot write {prepare.STATE_FILE}: {error.strerror}")

    def _end(self) -> None:
        """Leave nothing behind: no daemon, no file, and no mount unless it goes on being used lazily."""
        self._discard_spares()
        if self._current is not None:
            self._current.kill()
            self._current.reap()
        if self._fuse >= 0 and not kernel.disconnected(self._fuse):
            try:
                kernel.unmount(str(self._mountpoint), lazy=True)
            except OSError as error:
                self._note(f"cannot unmount {self._mountpoint}: {error.strerror}")
        (self._store / prepare.STATE_FILE).unlink(missing_ok=True)


def _patience(child: Child) -> float:
    """How long a daemon may stay in its stage before it counts as stuck."""
    return limits.DRAIN_S * 6 if child.stage is Stage.LEAVING else limits.START_S


def _spare_from_the_oom_killer() -> None:
    """The daemon can be replaced and the holder cannot. Children set their own value back (docs/mount.md)."""
    try:
        Path("/proc/self/oom_score_adj").write_text("-900")
    except OSError:
        pass  # not root


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="silofs-holder")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--mountpoint", type=Path, required=True)
    parser.add_argument("--options", default="")
    parser.add_argument("--daemon", default="silofs.daemon", help="the module that is run as daemon")
    parser.add_argument("--ready-fd", type=int, default=-1, help="where to tell the launcher that the mount answers")
    parser.add_argument("rest", nargs="*", help="after --: options of the daemon")
    args = parser.parse_args(argv)

    def tell(about: dict[str, Any]) -> None:
        if args.ready_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # it waits no more: the disk was not there for a minute
                os.write(args.ready_fd, json.dumps(about).encode() + b"\n")
            os.close(args.ready_fd)

    if args.ready_fd >= 0:
        os.set_inheritable(args.ready_fd, False)
    _spare_from_the_oom_killer()
    os.chdir("/")  # a working directory on some mount would pin it
    try:
        options = kernel.Options.parse(args.options, root=os.geteuid() == 0)
        holder = Holder(args.store.absolute(), args.mountpoint, options, args.daemon, args.rest)
        return holder.run(tell)
    except SiloError as error:
        print(f"silofs: {error.message}\n{error.hint}", file=sys.stderr, flush=True)
        tell(
            {
                "ok": False,
                "code": error.code,
                "message": error.message,
                "hint": error.hint,
                "exit": error.exit_code,
            }
        )
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
