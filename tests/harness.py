"""One store and its mount, served by the shipped command from processes of their own.

A test never touches its mount from the process that serves it: that would deadlock. Leaving the context unmounts, and
ends what does not end by itself, by pid.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from silofs.layers.directory import LOCK_FILE

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


class Failed(AssertionError):
    """A verb exited with an error; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Mount:
    """A context manager: starts on entry, unmounts on leaving. The store outlives `stop`, for a `start` after it.

    `directory` gets `store/` and `mount/`. `listen` opens a port for peers on 127.0.0.1. `environment` is added to that
    of holder and daemon (SILOFS_FAIL, for one).
    """

    def __init__(self, directory: Path, *, listen: bool = False, environment: Mapping[str, str] | None = None) -> None:
        self.store = directory / "store"
        self.mountpoint = directory / "mount"
        self.address = f"127.0.0.1:{_free_port()}" if listen else None
        self.environment = {**os.environ, **(environment or {}), "SILOFS_STORE": str(self.store)}
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self._holder = 0

    def __enter__(self) -> Mount:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if os.path.ismount(self.mountpoint):
                self.stop()
        except Failed:
            if kind is None:
                raise
        finally:
            self._end()

    def start(self, *options: str) -> None:
        """`silofs mount`: returns when the mount answers."""
        listen = ("--listen", self.address) if self.address else ()
        self._holder = int(self.silofs_json("mount", *listen, *options, str(self.mountpoint))["holder_pid"])

    def stop(self) -> None:
        """`silofs umount`: returns when everything is committed. Failed while files are open."""
        self.silofs("umount", str(self.mountpoint))

    def status(self) -> dict[str, Any]:
        return self.silofs_json("status")

    def kill_daemon(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the daemon that serves now, or as soon as one does; returns its pid."""

        def serving() -> int:
            done = self.run("status", "--json")
            return int(json.loads(done.stdout)["daemon_pid"]) if done.returncode == 0 else 0

        pid = until(serving, "a daemon serves")
        os.kill(pid, number)
        return pid

    def kill_host(self, known: Mapping[str, Any] | None = None) -> None:
        """What a power cut leaves of the processes: nothing. The mount is gone, what was not committed is lost.

        `known`: a status from before, where there is no time to ask.
        """
        status = known or self.status()
        for role in ("holder_pid", "daemon_pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(status[role]), signal.SIGKILL)
        self._end()
        # Whoever is in the middle of a write to the disk finishes it first, and has the store's lock until then.
        until(lambda: _unlocked(self.store), "holder and daemon are gone")

    def image(self, volume: str) -> Path:
        return self.mountpoint / f"{volume}.img"

    def silofs(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run one verb; its stdout. Failed when it exits with an error."""
        done = self.run(*arguments, timeout=timeout)
        if done.returncode != 0:
            said = f"silofs {' '.join(arguments)} exited {done.returncode}: {done.stdout}{done.stderr}"
            raise Failed(f"{said}\nlog: {self.log()[-3000:]}", done.returncode)
        return done.stdout

    def silofs_json(self, *arguments: str, timeout: float = 60.0) -> dict[str, Any]:
        """Run one verb with --json; the last object that it printed."""
        result: dict[str, Any] = json.loads(self.silofs(*arguments, "--json", timeout=timeout).splitlines()[-1])
        return result

    def run(self, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run one verb, whatever it exits with. Failed, with the stacks of holder and daemons, when it does not end."""
        command = [Path(sys.executable).parent / "silofs", *arguments]
        try:
            return subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            message = (
                f"silofs {' '.join(arguments)} did not end in {timeout:.0f} s\n{self._stacks()}\n{self.log()[-3000:]}"
            )
            raise Failed(message, -1) from None

    def log(self) -> str:
        """What holder and daemons have logged so far."""
        path = self.store / "silofs.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def pair(self, other: Mount) -> str:
        """Pair with `other` and let each take in every volume of its peer; the other's name here."""
        token = self.silofs_json("peer", "invite")["token"]
        self_there = other.silofs_json("peer", "join", token)["name"]
        other.silofs("peer", "allow", self_there, "*", "in")
        other_here: str = self.silofs_json("peer", "ls")["peers"][0]["name"]
        self.silofs("peer", "allow", other_here, "*", "in")
        return other_here

    def _stacks(self) -> str:
        """What the processes of this store are doing, as py-spy sees it."""
        own = [pid for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")) if _serves(pid, self.store)]
        py_spy = Path(sys.executable).parent / "py-spy"
        dumps = (
            subprocess.run([py_spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=30, check=False)
            for pid in own
        )
        return "\n".join(dump.stdout + dump.stderr for dump in dumps)

    def _end(self) -> None:
        """Take the mount away and end the holder, if they are still there."""
        for _ in range(3):
            if os.path.ismount(self.mountpoint) or _disconnected(self.mountpoint):
                subprocess.run(["umount", "--lazy", self.mountpoint], check=False, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 5
        while _serves(self._holder, self.store) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _serves(self._holder, self.store):
            os.kill(self._holder, signal.SIGKILL)


def until(happened: Callable[[], T], what: str, timeout: float = 30.0) -> T:
    """The first true value of `happened()`; an AssertionError that says `what` when there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := happened()):
        assert time.monotonic() < deadline, f"not in {timeout:.0f} s: {what}"
        time.sleep(0.02)
    return value


def _disconnected(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return True
    return False


def _unlocked(store: Path) -> bool:
    with (store / LOCK_FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _serves(pid: int, store: Path) -> bool:
    try:
        return pid > 0 and str(store).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
