"""A file that remembers: serves one file over FUSE and appends every write and flush to a log, with its moment.

    python -m tests.crash.recorder IMAGE LOG MOUNTPOINT

MOUNTPOINT/disk has the content of IMAGE, which is not changed. The log is a sequence of headers (`ENTRY`: moment in
CLOCK_MONOTONIC ns, offset, length, kind), each followed by the data of a write. An entry is in the log before the
request is answered. The process ends when MOUNTPOINT is unmounted.

QEMU's blklogwrites over its FUSE export would do the same, but with QEMU 7.2 a request that arrives while another is
written takes over its buffer, and the log (and the disk) then holds data that was never written there.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import time

import pyfuse3
import trio

ENTRY = struct.Struct("<QQII")
WRITE, FLUSH = 1, 2
ROOT, DISK = pyfuse3.ROOT_INODE, pyfuse3.ROOT_INODE + 1


class Recorder(pyfuse3.Operations):  # type: ignore[misc]
    """The directory, and in it one file."""

    def __init__(self, image: str, log: str) -> None:
        super().__init__()
        with open(image, "rb") as file:
            self._content = bytearray(file.read())
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        if parent_inode != ROOT or name != b"disk":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(DISK)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o700 if inode == ROOT else stat.S_IFREG | 0o600
        entry.st_size = 0 if inode == ROOT else len(self._content)
        entry.st_nlink = 1
        return entry

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return await self.getattr(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=DISK, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return bytes(self._content[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        os.writev(self._log, [ENTRY.pack(time.monotonic_ns(), off, len(buf), WRITE), buf])
        self._content[off : off + len(buf)] = buf
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        os.write(self._log, ENTRY.pack(time.monotonic_ns(), 0, 0, FLUSH))


def main(image: str, log: str, mountpoint: str) -> None:
    pyfuse3.init(Recorder(image, log), mountpoint, {"fsname=silofs-test-disk", *pyfuse3.default_options})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
