"""One daemon process as the holder sees it: its descriptors, how far its start has come, and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from silofs.errors import SiloError, error_of
from silofs.mount import kernel
from silofs.mount.channel import Channel, Message

HELD_UP: Final = ("T", "t", "D")
"""States of a thread, proc_pid_stat(5): stopped, traced by a debugger, in a sleep of the kernel that nothing ends."""


class Stage(Enum):
    """How far a daemon is. The first of a mount opens the store before it is shown INIT, its successors after it."""

    BOOTING = "booting"  # importing; for a successor: its reply to INIT is outstanding
    WARM = "warm"  # its reply to INIT is the first generation's; it holds neither store, log nor mount
    OPENING = "opening"
    OPENED = "opened"  # the store is open and the log replayed; only the first generation stays here for long
    SERVING = "serving"
    LEAVING = "leaving"  # told to end


class Child:
    """A started daemon. Nothing here waits except `reap`, which is for after the pidfd became readable."""

    def __init__(self, module: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.channel, theirs = Channel.pair()
        session, daemon_session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session.setblocking(False)
        self.session = session
        with theirs, daemon_session:
            fds = (theirs.fileno(), daemon_session.fileno())
            command = [sys.executable, "-P", "-m", module, *arguments]
            command += ["--channel", str(fds[0]), "--session", str(fds[1])]
            self._process = subprocess.Popen(
                command, pass_fds=fds, stdin=subprocess.DEVNULL, cwd="/", env=environment, start_new_session=True
            )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.stage = Stage.BOOTING
        self.started_at = time.monotonic()
        self.changed_at = 0.0  # when the present stage began; the holder's clock
        self.unanswered = 0  # pings since something was heard of it, or it was seen to be held up
        self.abilities: tuple[str, ...] = ()  # what it does beyond libfuse; said before its reply to INIT
        self.logs: tuple[int, ...] = (1,)  # versions of the write log that it knows; said with them
        self.formats: tuple[int, ...] = ()  # versions of the store's format, likewise; an earlier program does not say
        self.clean = False  # it said that everything is committed
        self.refusal: dict[str, Any] | None = None  # why it could not open the store: code, message, hint, exit

    def enter(self, stage: Stage, now: float) -> None:
        self.stage = stage
        self.changed_at = now

    def show_init(self, init: kernel.Init) -> None:
        self.session.send(init.request)
        self.channel.send("init")

    def init_reply(self) -> bytes | None:
        """What the daemon answered to INIT; None when its end is closed. BlockingIOError: nothing yet."""
        try:
            return self.session.recv(kernel.MESSAGE_BYTES) or None
        except ConnectionError:
            return None

    def messages(self) -> list[Message]:
        """All that has come."""
        found: list[Message] = []
        while True:
            try:
                message = self.channel.receive()
            except BlockingIOError:
                return found
            if message is None:
                return found
            found.append(message)

    @property
    def held_up(self) -> bool:
        """Whether its silence is no sign of a fault: somebody stopped it, or one of its threads waits for a disk.

        Any of them, since it may hold Python's lock meanwhile (LMDB writes to a mapped file when a snapshot is taken).
        Nothing would be gained by killing it: the kernel lets it go only when the disk has answered.
        """
        try:
            threads = [*Path(f"/proc/{self.pid}/task").iterdir()]
        except OSError:
            return False
        return any(_state(thread) in HELD_UP for thread in threads)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def reap(self) -> int:
        """Wait for its end; the exit status as subprocess gives it. Closes every descriptor of it."""
        status = self._process.wait()
        self.channel.close()
        self.session.close()
        os.close(self.pidfd)
        return status

    def ending(self, status: int) -> str:
        """How it ended, for people."""
        if self.refusal is not None:
            return f"could not open the store: {self.refusal['message']}"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return "ended as it was asked to" if self.clean else f"ended with status {status}"

    def error(self, ending: str) -> SiloError:
        """Why it did not come up: what it said of the store, or how it ended."""
        refusal = self.refusal
        if refusal is None:
            return SiloError(f"the daemon {ending}", hint="silofs.log in the store says more")
        return error_of(str(refusal["code"]))(str(refusal["message"]), hint=str(refusal["hint"] or ""))


def _state(thread: Path) -> str:
    """The state of a thread, one letter; empty when it has ended."""
    try:
        status = (thread / "stat").read_text()
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[0]
