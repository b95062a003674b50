"""Where a verb runs: in the daemon of the store if there is one, else in a child of this process on the store itself.

While a holder lives without its daemon (it is being restarted, or it crashed) nobody opens the store: the command
waits a moment and then ends with exit code 75 (docs/cli.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from silofs import limits
from silofs.cli.client import Connection, Gone, Progress, connect, request
from silofs.errors import NoDaemon, NoStore, StoreLocked, TryAgain

LOOKS: Final = {"ls", "info", "df", "du", "free_name", "status", "peer_ls", "migration_ls", "migration_show"}
"""Verbs that change nothing."""


def call(
    store: Path,
    verb: str,
    args: dict[str, Any],
    *,
    fds: Sequence[int] = (),
    progress: Progress | None = None,
    offline: bool = True,
) -> dict[str, Any]:
    """The result of a verb. `offline`: it can be done without a daemon. `fds` are lent, not given away.

    A verb that only looks is asked again of the successor when a daemon dies over it; of others nobody knows whether
    they were done, and Gone says so.
    """
    give_up = time.monotonic() + limits.HOLDER_WAIT_S
    while True:
        try:
            return _call(store, verb, args, fds, progress, offline=offline)
        except Gone:
            if verb not in LOOKS or time.monotonic() > give_up:
                raise


def _call(
    store: Path,
    verb: str,
    args: dict[str, Any],
    fds: Sequence[int],
    progress: Progress | None,
    *,
    offline: bool,
) -> dict[str, Any]:
    sock = daemon(store, needed=not offline)
    if sock is not None:
        with sock:
            return request(sock, verb, args, fds=fds, progress=progress)
    from silofs import offline as direct

    give_up = time.monotonic() + limits.HOLDER_WAIT_S
    while True:
        try:
            return direct.call(store, verb, args, fds=fds, progress=progress)
        except StoreLocked:
            # Another command that has the store open for a moment, or a daemon that has just come up.
            if time.monotonic() > give_up:
                raise _held(store) from None
            sock = daemon(store, needed=False)
            if sock is not None:
                with sock:
                    return request(sock, verb, args, fds=fds, progress=progress)
            time.sleep(0.02)


def daemon(store: Path, *, needed: bool) -> Connection | None:
    """A connection to the store's daemon; None if nobody holds the store.

    Raises TryAgain while a holder lives without a daemon, and NoDaemon if the verb cannot be done without one.
    """
    give_up = time.monotonic() + limits.HOLDER_WAIT_S
    while True:
        sock = connect(store)
        if sock is not None:
            return sock
        if lock_owner(store) is None:
            if not needed:
                return None
            if not (store / "data").is_dir():
                raise NoStore(f"there is no store in {store}")
            raise NoDaemon(f"no daemon serves the store in {store}")
        if not needed or time.monotonic() > give_up:
            # Without need, the caller tries the lock itself: the owner may be a command that is about to end.
            if not needed:
                return None
            raise _held(store)
        time.sleep(0.02)


def _held(store: Path) -> TryAgain:
    pid = lock_owner(store)
    who = f" by process {pid}" if pid else ""
    return TryAgain(
        f"the store in {store} is held{who}, but no daemon answers",
        hint="its daemon is starting, or it keeps dying: try again, then see silofs status and the log",
    )


def holder_says(store: Path) -> dict[str, Any] | None:
    """What the holder left in the store for the time in which there is no daemon to ask."""
    from silofs.mount import launcher

    about = launcher.holder_state(store)
    if about is None:
        return None
    fields = {**about, "store": str(store), "volumes": None}
    if fields.get("state") == "serving":
        fields["state"] = "starting"  # as far as anybody can be asked
    return fields


def lock_owner(store: Path) -> int | None:
    """The process that took the store's lock (the holder), 0 if it cannot be named, None if nobody has it.

    Read from /proc/locks (proc_locks(5)): taking the lock to see whether it is free would get in a daemon's way.
    """
    try:
        about = (store / "lock").stat()
        text = Path("/proc/locks").read_text()
    except OSError:
        return None
    device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(about.st_ino):
            pid = max(0, int(fields[4]))
            # The same number on another file system is another file; and some (btrfs) tell stat(2) another device.
            if fields[5].startswith(f"{device}:") or _has_open(pid, about):
                return pid
    return None


def _has_open(pid: int, about: os.stat_result) -> bool:
    try:
        return any(os.path.samestat(link.stat(), about) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
