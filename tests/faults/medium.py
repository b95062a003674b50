"""A directory on a medium of which some pages cannot be read: a file system in a process of its own, passing through.

    python -m tests.faults.medium BELOW MOUNTPOINT BAD      serves the files of BELOW on MOUNTPOINT

BAD is a file with a line `NAME PAGE` for each page (of 4 KiB) whose reads fail with EIO; it is looked at every time.
Writing such a page makes it good, as a disk does that has spare sectors.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import ROOT_INODE, EntryAttributes, FileInfo, FUSEError

ROOT = Path(__file__).parents[2]
PAGE = 4096


class Medium(pyfuse3.Operations):
    enable_writeback_cache = False

    def __init__(self, below: Path, bad: Path) -> None:
        super().__init__()
        self._below, self._bad = below, bad
        self._names: dict[int, str] = {ROOT_INODE: "."}

    def _path(self, inode: int) -> Path:
        return self._below / self._names[inode]

    def _attributes(self, path: Path) -> EntryAttributes:
        try:
            found = path.stat()
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        attr = EntryAttributes()
        attr.st_ino = ROOT_INODE if path == self._below else found.st_ino
        self._names[attr.st_ino] = path.name if path != self._below else "."
        for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "atime_ns", "ctime_ns", "mtime_ns"):
            setattr(attr, f"st_{name}", getattr(found, f"st_{name}"))
        attr.entry_timeout = attr.attr_timeout = 0
        return attr

    async def lookup(self, parent_inode, name, ctx=None):  # type: ignore[no-untyped-def]
        return self._attributes(self._below / os.fsdecode(name))

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        return self._attributes(self._path(inode))

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        if fields.update_size:
            os.truncate(self._path(inode), attr.st_size)
        return self._attributes(self._path(inode))

    async def statfs(self, ctx):  # type: ignore[no-untyped-def]
        found, data = os.statvfs(self._below), pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(data, f"f_{name}", getattr(found, f"f_{name}"))
        return data

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        return inode

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
        for number, path in enumerate(sorted(self._below.iterdir()), 1):
            if number > start_id and not pyfuse3.readdir_reply(
                token, os.fsencode(path.name), self._attributes(path), number
            ):
                return

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        # Not to be kept: what was read before is asked of the medium again.
        return FileInfo(fh=os.open(self._path(inode), flags & ~os.O_CREAT & ~os.O_DIRECT), keep_cache=False)

    async def create(self, parent_inode, name, mode, flags, ctx):  # type: ignore[no-untyped-def]
        path = self._below / os.fsdecode(name)
        fd = os.open(path, flags | os.O_CREAT, mode)
        return FileInfo(fh=fd), self._attributes(path)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        name = Path(f"/proc/self/fd/{fh}").readlink().name
        for line in self._bad.read_text().splitlines():
            which, page = line.split()
            if which == name and off < (int(page) + 1) * PAGE and int(page) * PAGE < off + size:
                raise FUSEError(errno.EIO)
        return os.pread(fh, size, off)

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
        name = Path(f"/proc/self/fd/{fh}").readlink().name
        written = {f"{name} {page}" for page in range(off // PAGE, -(-(off + len(buf)) // PAGE))}
        lines = self._bad.read_text().splitlines()
        if written & set(lines):
            self._bad.write_text("".join(f"{line}\n" for line in lines if line not in written))
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        os.fsync(fh)

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        pass

    async def release(self, fh):  # type: ignore[no-untyped-def]
        os.close(fh)


@contextmanager
def medium(below: Path, mountpoint: Path, bad: Path) -> Iterator[None]:
    """Serve it in another process, until the context is left."""
    bad.touch()
    mountpoint.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.faults.medium", str(below), str(mountpoint), str(bad)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(mountpoint)], check=False)
            process.terminate()


def main(below: str, mountpoint: str, bad: str) -> None:
    pyfuse3.init(Medium(Path(below), Path(bad)), mountpoint, {"fsname=medium"})
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
