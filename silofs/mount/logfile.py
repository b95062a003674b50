"""STORE/silofs.log, which the holder and its daemons write to, kept below a bound. Standard library only.

The file is every process's stderr. When it has become too long it is renamed to silofs.log.1, in the place of the one
before, and a new file takes its place; the holder then gives that to its daemons. Nothing is copied, and no line lost.

| killed | left |
|---|---|
| before the new file has its name | the log as it was, and perhaps an empty silofs.log.new |
| the old one is renamed, the new one not yet | silofs.log.1, and the next mount makes a new one |
| before a daemon was given the new file | that daemon goes on writing to silofs.log.1 |
"""

from __future__ import annotations

import os
from pathlib import Path

from silofs import limits

LOG_FILE = "silofs.log"
STDOUT, STDERR = 1, 2


def open_log(path: Path) -> int:
    """A descriptor that appends to the log; the file is made if it is not there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def due(store: Path) -> bool:
    """Whether this process's stderr is the store's log, and that is too long."""
    here = os.fstat(STDERR)
    if here.st_size <= limits.LOG_FILE_BYTES:
        return False
    try:
        there = (store / LOG_FILE).stat()
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def rotate(store: Path) -> int:
    """Begin a new log, also for this process; a descriptor of it, for others. OSError: nothing has changed."""
    path = store / LOG_FILE
    new = path.with_suffix(".log.new")
    fd = open_log(new)  # first, since this is what a full disk refuses
    path.replace(path.with_suffix(".log.1"))
    new.replace(path)
    use(fd)
    return fd


def use(fd: int) -> None:
    """Write messages there from now on."""
    for standard in (STDOUT, STDERR):
        os.dup2(fd, standard)
