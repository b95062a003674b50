"""Named places where a test can make the daemon die, fail or stand still. Off unless SILOFS_FAIL is set.

    SILOFS_FAIL=cede.before_commit:kill,sweep.after_batch:raise@3

Each entry is NAME:ACTION or NAME:ACTION@N (the Nth time that the place is reached; 1 when left out). Actions: `kill`
(SIGKILL to this process: no handler, no flush), `raise` (FailpointReached, as an unexpected error of ours would come),
`stop` (SIGSTOP to this process: a peer that hangs with its connections open), `hang` (this thread never returns, as in
a deadlock of ours).

`*:mark` lets everything go on, and appends each name that is reached, with the moment (CLOCK_MONOTONIC, ns), to `marks`
in SILOFS_FAIL_DIR: a test of power cuts then knows where the steps are in its recording.

The holder restarts a dead daemon with the same environment. So that a failpoint fires once in a test and not in every
successor, SILOFS_FAIL_DIR can name a directory: firing creates NAME there first, and a name that exists is spent. Tests
wait for that file instead of sleeping.

The names of migrations are listed in docs/peers.md; `hit` costs next to nothing while none is set.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

ENV = "SILOFS_FAIL"
ENV_DIR = "SILOFS_FAIL_DIR"
ACTIONS = ("kill", "raise", "stop", "hang")
MARK = "*:mark"
MARKS = "marks"
HANG_S = 3600.0


class FailpointReached(RuntimeError):
    """Raised by a failpoint with the action `raise`; deliberately no SiloError: it stands for a bug of ours."""


@dataclass
class _Armed:
    action: str
    at: int
    hits: int = 0


def parse(text: str) -> dict[str, _Armed]:
    """The armed failpoints of a SILOFS_FAIL value. ValueError on an entry that is not NAME:ACTION[@N]."""
    armed: dict[str, _Armed] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if entry == MARK:
            armed["*"] = _Armed("mark", 0)
            continue
        name, colon, rest = entry.partition(":")
        action, _, count = rest.partition("@")
        if not name or not colon or action not in ACTIONS or (count and not count.isdigit()):
            raise ValueError(f"{ENV}: {entry!r} is not NAME:{'|'.join(ACTIONS)}[@N]")
        armed[name] = _Armed(action, int(count or 1))
    return armed


_armed = parse(os.environ.get(ENV, ""))


def rearm(text: str) -> None:
    """Replace what is armed in this process (tests of the failpoints themselves)."""
    _armed.clear()
    _armed.update(parse(text))


def spent(name: str) -> bool:
    """Whether the failpoint has fired in this process."""
    armed = _armed.get(name)
    return armed is not None and armed.hits >= armed.at


def hit(name: str) -> None:
    """The code has reached the place `name`: does what was armed for it, else nothing."""
    if not _armed:
        return
    if "*" in _armed:
        _mark(name)
    armed = _armed.get(name)
    if armed is None:
        return
    armed.hits += 1
    if armed.hits != armed.at or not _claim(name):
        return
    if armed.action == "raise":
        raise FailpointReached(name)
    if armed.action == "hang":
        time.sleep(HANG_S)
        return
    os.kill(os.getpid(), signal.SIGKILL if armed.action == "kill" else signal.SIGSTOP)


def _mark(name: str) -> None:
    """One line, in one system call: holders' successors and threads append to the same file."""
    fd = os.open(Path(os.environ[ENV_DIR]) / MARKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f"{name} {time.monotonic_ns()}\n".encode())
    os.close(fd)


def _claim(name: str) -> bool:
    directory = os.environ.get(ENV_DIR)
    if not directory:
        return True
    try:
        os.close(os.open(Path(directory) / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True
