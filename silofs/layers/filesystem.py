"""The file system under a store: what kind it is, how much room it has, and whether room there can be held."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from silofs.errors import Unsupported
from silofs.limits import MIB

MOUNTS: Final = Path("/proc/self/mountinfo")
NETWORK: Final = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "ocfs2", "gfs2", "lustre"}
COPY_ON_WRITE: Final = {"btrfs", "zfs", "bcachefs", "nilfs2"}
"""These write to a new place every time: what is allocated is not where the bytes will go."""

PROBE_FILE: Final = "probe"
PROBE_BYTES: Final = 1 * MIB
COMPARED_BYTES: Final = 1 * MIB

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_GET_FLAGS: Final = 0x80086601  # FS_IOC_GETFLAGS of ioctl_iflags(2), and FS_IOC_SETFLAGS
_SET_FLAGS: Final = 0x40086602
_NO_COW: Final = 0x00800000
_libc = ctypes.CDLL(None, use_errno=True)


def kind_of(path: Path) -> str:
    """The kind of the file system that `path` is on, by the longest mount point above it (proc_pid_mountinfo(5)).

    Empty when it is not known.
    """
    real = str(path.resolve())
    best, kind = "", ""
    for line in MOUNTS.read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode("utf-8", "surrogateescape").decode("unicode_escape", "surrogateescape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split(" ")[0]
    return kind


def refuse_network(path: Path) -> None:
    """Unsupported on a file system of the network: LMDB's map and locks hold on one host only.

    A local FUSE file system is none of these.
    """
    kind = kind_of(path)
    if kind in NETWORK:
        hint = "put the store on a local disk"
        raise Unsupported(f"{path} is on {kind}, a file system of the network", hint=hint)


def free_bytes(path: Path) -> int:
    """What an unprivileged program may still allocate on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def allocate(fd: int, offset: int, length: int) -> int:
    """Allocate blocks without changing the file's size, as posix_fallocate cannot; 0, or the number of the error."""
    done = _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length))
    return 0 if done == 0 else ctypes.get_errno()


def punch(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back; it reads as zeros then, and the file stays as long as it is. OSError."""
    if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def holds_space(directory: Path) -> bool:
    """Whether blocks that are allocated there stay with the file that they are for. By the kind, then by trying."""
    if kind_of(directory) in COPY_ON_WRITE:
        return False
    path = directory / PROBE_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return True  # XFS looks for blocks for an inode as well; and of the other kinds hardly one holds nothing
        raise
    try:
        error = allocate(fd, 0, PROBE_BYTES)
        if error in (errno.ENOSPC, errno.EDQUOT):
            return True  # it looked for the blocks
        status = os.fstat(fd)
        return not error and status.st_size == 0 and status.st_blocks * 512 >= PROBE_BYTES
    finally:
        os.close(fd)
        path.unlink()


def write_in_place(directory: Path) -> bool:
    """Let what is made in `directory` from now on be written in place on btrfs (chattr +C); whether it now is.

    LMDB has its table of readers mapped for writing. On a full copy-on-write file system a write to a mapped page has
    nowhere to go, and ends the process (SIGBUS).
    """
    if kind_of(directory) != "btrfs":
        return False
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = bytearray(8)  # the kernel reads and writes an int, whatever the request's number says
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        flags[:4] = (int.from_bytes(flags[:4], sys.byteorder) | _NO_COW).to_bytes(4, sys.byteorder)
        fcntl.ioctl(fd, _SET_FLAGS, bytes(flags))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def on_the_medium(path: Path, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether the medium has what the page cache shows of some [start, end) of a file, multiples of 4096.

    After a failed write it may not have, and a plain read would not tell. True where O_DIRECT cannot be used (tmpfs).
    """
    try:
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return True
        raise
    try:
        with path.open("rb") as cached, mmap.mmap(-1, COMPARED_BYTES) as buffer:
            for start, end in ranges:
                for at in range(start, end, COMPARED_BYTES):
                    length = min(COMPARED_BYTES, end - at)
                    found = os.preadv(direct, [memoryview(buffer)[:length]], at)
                    if buffer[:found] != os.pread(cached.fileno(), length, at):
                        return False
    finally:
        os.close(direct)
    return True
