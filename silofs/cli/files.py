"""Files that an export makes: beside their place until they are whole; and signals that end such work cleanly."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from silofs.errors import Busy


@contextlib.contextmanager
def ended_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end this work as ^C does: what was begun is taken back."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def beside(file: Path) -> Iterator[tuple[int, Path]]:
    """A new file in the directory of `file`, readable by its owner only, that is gone afterwards unless renamed."""
    temporary = file.parent / f".{file.name[:200]}.{os.getpid()}.{os.urandom(4).hex()}"
    fd = _made(temporary, os.O_EXCL, file)
    try:
        yield fd, temporary
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _made(path: Path, flags: int, file: Path) -> int:
    """A descriptor of a file beside `file`. OSError, of the name that the user knows."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def publish(temporary: Path, file: Path) -> None:
    """Give a finished file its name, durably, with the mode that a new file gets here."""
    mask = os.umask(0)
    os.umask(mask)
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o666 & ~mask)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def part_of(file: Path) -> Path:
    """Where an export that did not come to its end has left what it has."""
    return file.parent / f"{file.name[:240]}.part"


@contextlib.contextmanager
def partial(file: Path) -> Iterator[tuple[int, Path]]:
    """What there is of `file` so far, under a name beside it, to be continued and kept until it is whole."""
    path = part_of(file)
    fd = _made(path, os.O_NOFOLLOW, file)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Busy(f"{path} is being written by another export", hint="wait for it, or name another file") from None
    try:
        yield fd, path
    finally:
        if not os.fstat(fd).st_size:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # nothing to continue
        os.close(fd)
