"""Small file systems for tests of full ones: a tmpfs, or another on a loop device. Root only; skipped otherwise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KINDS = ("tmpfs", "ext4")


@contextmanager
def small(kind: str, mib: int, where: Path) -> Iterator[Path]:
    """A file system of so many MiB, mounted in a new directory of `where`."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    point = where / "small"
    point.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "silofs-test", str(point)]
    else:
        image = where / f"small.{kind}"
        with image.open("wb") as file:
            file.truncate(mib << 20)
        make = {"ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"], "btrfs": ["mkfs.btrfs", "-q"], "xfs": ["mkfs.xfs", "-q"]}
        subprocess.run([*make[kind], str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(point)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"a {kind} cannot be mounted here")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def fill(directory: Path, *, leave: int = 0) -> int:
    """Another program that takes all the room there is but `leave` bytes; how much it got."""
    taken = 0
    with (directory / "other-program").open("ab") as file:
        for step in (1 << 20, 1 << 12):
            try:
                while free(directory) > leave + step:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)
                    taken += step
            except OSError:
                pass
    return taken


def make_room(directory: Path) -> None:
    """That program goes."""
    (directory / "other-program").unlink()


def free(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
