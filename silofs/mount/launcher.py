"""Starting a holder in the background, and waiting for one to end. Used by the command line; imports nothing heavy."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from silofs.errors import SiloError, TryAgain, error_of
from silofs.mount import kernel, prepare
from silofs.mount.logfile import LOG_FILE, open_log


def command(
    store: Path, mountpoint: Path, *, options: str = "", listen: str | None = None, daemon: str = "silofs.daemon"
) -> list[str]:
    """The holder's command line. Both paths become absolute without touching what they name.

    options: `-o` of mount(8); listen: HOST:PORT for peers; daemon: the module to run, for tests.
    """
    rest = ["--listen", listen] if listen else []
    return [
        *(sys.executable, "-P", "-m", "silofs.mount.holder"),
        *("--store", str(kernel.absolute(store)), "--mountpoint", str(kernel.absolute(mountpoint))),
        *("--options", options, "--daemon", daemon, "--", *rest),
    ]


def start(holder: Sequence[str], store: Path, *, timeout_s: float = 60.0) -> int:
    """Start a holder (of `command`) in the background and return its pid once the mount answers.

    Raises what kept it from coming up, with its exit code. Its messages and the daemon's go to STORE/silofs.log.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    at = list(holder).index("--")
    arguments = [*holder[:at], "--ready-fd", str(writer), *holder[at:]]
    try:
        output = subprocess.DEVNULL
        if store.is_dir():
            output = open_log(store / LOG_FILE)
        try:
            process = subprocess.Popen(
                arguments,
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )
        finally:
            if output >= 0:
                os.close(output)
    finally:
        os.close(writer)
    try:
        answer = _answer(reader, timeout_s)
    finally:
        os.close(reader)
    if answer.get("ok"):
        process.returncode = 0  # it outlives us on purpose: Popen need not warn that it still runs
        return process.pid
    process.wait()
    found = error_of(str(answer.get("code")))
    raise found(str(answer.get("message")), hint=str(answer.get("hint") or ""))


def foreground(holder: Sequence[str]) -> NoReturn:
    """Become the holder. Its messages go to this process's stderr."""
    os.execv(holder[0], list(holder))


def _answer(reader: int, timeout_s: float) -> dict[str, Any]:
    """The holder's one line; a made-up refusal when it died without one."""
    text = b""
    deadline = time.monotonic() + timeout_s
    while not text.endswith(b"\n"):
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TryAgain("the mount did not answer in time", hint="silofs status shows how far it has come")
        piece = os.read(reader, 65536)
        if not piece:
            return {"message": "the holder ended before the mount answered", "hint": f"see {LOG_FILE} in the store"}
        text += piece
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def holder_state(store: Path) -> dict[str, Any] | None:
    """What the holder of a store last said of itself (state, holder_pid, daemon_pid, mountpoint, restarts, deaths,
    last_exit, refused), or None when there is no holder. For commands that find no daemon to ask."""
    return prepare.published(store)


def store_of(mountpoint: Path) -> Path | None:
    """The store that is mounted there, read from the mount table: the mount itself is not touched."""
    path = str(kernel.absolute(mountpoint))
    found = [mounted.source for mounted in kernel.mounts() if mounted.mountpoint == path]
    return Path(found[-1]) if found else None


def wait_gone(pid: int, *, timeout_s: float) -> bool:
    """Wait until the process `pid`, child or not, has ended; False when it has not in time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def unmount(mountpoint: Path, *, lazy: bool) -> None:
    """umount(2) for commands that find no daemon to ask. Raises SiloError."""
    try:
        kernel.unmount(str(kernel.absolute(mountpoint)), lazy=lazy)
    except OSError as error:
        hint = "close the files that are open on it, or use --lazy"
        raise SiloError(f"cannot unmount {mountpoint}: {error.strerror}", hint=hint) from error
