"""Before a mount, and beside it: the store's lock, a usable mountpoint, and what the holder says of itself."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

from silofs.errors import Busy, NoStore, StoreLocked, UserError
from silofs.mount import kernel

STATE_FILE = "holder.json"
STATE_BYTES = 4096  # of the file, blanks at its end: written over in place where there is no room for a new one
LOG_HEAD = struct.Struct("<8sI")  # magic, version (silofs/layers/memfd.py)


def lock_store(store: Path) -> int:
    """Lock the store. The description is shared with every daemon: free only when all of us are gone."""
    try:
        lock = os.open(store / "lock", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NoStore(f"there is no store at {store}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreLocked(f"the store {store} is in use") from None
    return lock


def file_sizes() -> None:
    """Lift a limit on the size of files (setrlimit(2), ulimit -f) from this process and those that it starts.

    What is acknowledged has its space, but not where a file may not grow. UserError when that is not allowed.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        hint = "mount it from a shell without that limit"
        raise UserError(f"files may not be larger than {soft} bytes here (ulimit -f)", hint=hint) from None


def mountpoint(store: Path, path: Path, options: kernel.Options) -> None:
    """Detach what a dead holder of this store left behind; refuse what is not an empty directory.

    The caller holds the store's lock, so whoever served a mount of this store is dead.
    """
    for mounted in reversed(kernel.mounts()):
        if mounted.mountpoint == str(path):
            if mounted.source != str(store):
                raise Busy(f"{path} is the mount of the store {mounted.source}", hint=f"silofs umount {path}")
            kernel.unmount(str(path), lazy=True)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory", hint="make it, or name another mountpoint")
    if not options.nonempty and any(path.iterdir()):
        hint = "mount on an empty directory, or add -o nonempty to hide what is in there"
        raise Busy(f"{path} is not empty", hint=hint)


def log_version(memfd: int) -> int:
    """The version of the write log in the memfd."""
    return int(LOG_HEAD.unpack(os.pread(memfd, LOG_HEAD.size, 0))[1])


def publish(store: Path, about: dict[str, Any]) -> None:
    """Leave in the store what a command can show while there is no daemon to ask.

    Whole or not at all, as long as there is room for a second file. On a full file system it is written over the first.
    """
    text = json.dumps(about).encode().ljust(STATE_BYTES - 1) + b"\n"
    path, new = store / STATE_FILE, store / f"{STATE_FILE}.new"
    try:
        new.write_bytes(text)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        with path.open("r+b") as file:
            file.write(text)


def published(store: Path) -> dict[str, Any] | None:
    """What `publish` left, if its holder lives."""
    try:
        about = json.loads((store / STATE_FILE).read_text())
        cmdline = Path(f"/proc/{int(about['holder_pid'])}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(about) if b"silofs.mount.holder" in cmdline else None
