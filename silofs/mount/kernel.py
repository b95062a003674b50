"""What the kernel's FUSE interface asks of whoever owns a mount: mount, INIT, resend, unmount (fuse(4), mount(2)).

Used by the holder, so nothing here imports more than the standard library, and nothing touches a path on a mount of
ours except mount(2) and umount(2) themselves: a process that waits for its own mount would wait for ever.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from silofs import limits
from silofs.errors import SiloError, UserError

FSTYPE = "fuse.silofs"
MESSAGE_BYTES = limits.REQUEST_BYTES_MAX + 4096  # the kernel refuses reads into less than it may send

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 1, 2, 4, 8, 1024
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extension length, padding
OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique
INIT_IN = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2
INIT_OUT = struct.Struct("<IIIIHHIIHHI")  # major … flags (3), max_background, congestion_threshold, … flags2 (10)
OPCODE_INIT = 26
NOTIFY_RESEND = 7
POSIX_LOCKS = 1 << 1  # flags of INIT; libfuse asks for it only when its own table has the operations
INIT_EXT = 1 << 30  # there are flags2
HAS_RESEND = 1 << (39 - 32)  # in flags2; Linux 6.9
DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)  # in flags2; Linux 6.6

# Options of fstab(5) and mount(8) that mean nothing to a mount that is being made.
_FSTAB_NOISE = {"defaults", "auto", "noauto", "rw", "nofail", "_netdev", "user", "nouser", "users", "async", "relatime"}
_FLAGS = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
}


@dataclass(frozen=True)
class Options:
    """`-o` of `silofs mount`, parsed."""

    flags: int = MS_NOSUID | MS_NODEV
    allow_other: bool = False
    nonempty: bool = False

    @classmethod
    def parse(cls, text: str, *, root: bool) -> Options:
        """UserError for an option that nobody knows. root: the mounter is, so that VMs of other users are let in."""
        flags, allow_other, nonempty = cls.flags, root, False
        for word in filter(None, text.split(",")):
            if word in _FLAGS:
                flags |= _FLAGS[word]
            elif word in ("allow_other", "noallow_other"):
                allow_other = word == "allow_other"
            elif word == "nonempty":
                nonempty = True
            elif word not in _FSTAB_NOISE and word != "default_permissions" and not word.startswith(("x-", "comment=")):
                raise UserError(f"unknown mount option {word!r}", hint="known: " + ", ".join(known_options()))
        return cls(flags, allow_other, nonempty)


def known_options() -> Sequence[str]:
    return (*_FLAGS, "allow_other", "noallow_other", "nonempty")


@dataclass(frozen=True)
class Mounted:
    """A silofs mount as /proc/self/mountinfo shows it; `source` is the path of its store."""

    mountpoint: str
    source: str
    device: int


def absolute(path: Path) -> Path:
    """`path` as the mount table would show it. Symbolic links are followed, but a mount is asked nothing."""
    parent, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - resolve() would ask the mount itself
    found = Path(os.path.realpath(parent)) / name
    try:
        link = found.readlink()
    except OSError:
        return found
    return Path(os.path.realpath(found.parent / link))


def mounts() -> list[Mounted]:
    """The silofs mounts of this mount namespace, oldest first. Touches none of them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        words, about = before.split(" "), after.split(" ")
        if about[0] == FSTYPE:
            minor = int(words[2].partition(":")[2])
            found.append(Mounted(_unescape(words[4]), _unescape(about[1]), minor))
    return found


def _unescape(text: str) -> str:
    """Undo the octal escapes of mountinfo (proc(5)): blank, tab, newline, backslash."""
    for code in ("040", "011", "012"):
        text = text.replace("\\" + code, chr(int(code, 8)))
    return text.replace("\\134", "\\")


_libc = ctypes.CDLL(None, use_errno=True)


def mount(mountpoint: str, source: str, options: Options) -> int:
    """Mount and return the descriptor of /dev/fuse, non-blocking. Raises OSError, or SiloError from fusermount3."""
    if os.geteuid() != 0:
        return _mount_as_user(mountpoint, source, options)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
        if options.allow_other:
            data += ",allow_other"
        done = _libc.mount(os.fsencode(source), os.fsencode(mountpoint), FSTYPE.encode(), options.flags, data.encode())
        if done != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), mountpoint)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_as_user(mountpoint: str, source: str, options: Options) -> int:
    """The same through the set-uid helper, which sends the descriptor over the socket named by _FUSE_COMMFD."""
    words = ["default_permissions", "subtype=silofs", "fsname=" + source.replace("\\", "\\\\").replace(",", "\\,")]
    words += [word for word, flag in _FLAGS.items() if options.flags & flag]
    if options.allow_other:
        words.append("allow_other")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", ",".join(words), "--", mountpoint],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        if done.returncode == 0:
            fds = socket.recv_fds(ours, 1, 1)[1]
            if fds:
                os.set_blocking(fds[0], False)
                return fds[0]
    reason = done.stderr.strip() or "it gave no reason"
    raise SiloError(f"fusermount3 could not mount {mountpoint}: {reason}", hint="mount as root, or see fusermount3(1)")


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Detach the mount; OSError EBUSY while files are open on it, unless lazy. EINVAL: it is not mounted."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), mountpoint)
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        code = errno.EBUSY if "busy" in done.stderr else errno.EINVAL
        raise OSError(code, done.stderr.strip() or os.strerror(code), mountpoint)


@dataclass(frozen=True)
class Init:
    """The kernel's first request on a new mount, kept to be shown to every daemon."""

    request: bytes

    @property
    def can_resend(self) -> bool:
        """The kernel knows FUSE_NOTIFY_RESEND (6.9 and later): requests survive the daemon that read them."""
        return bool(self._flags()[1] & HAS_RESEND)

    @property
    def can_mmap(self) -> bool:
        """It lets files without a page cache be mapped shared (6.6 and later)."""
        return bool(self._flags()[1] & DIRECT_IO_ALLOW_MMAP)

    @property
    def can_lock(self) -> bool:
        """It passes fcntl(2) locks on."""
        return bool(self._flags()[0] & POSIX_LOCKS)

    @property
    def capabilities(self) -> list[str]:
        """What `status` shows of it."""
        return ["resend"] * self.can_resend + ["mmap"] * self.can_mmap

    def _flags(self) -> tuple[int, int]:
        """What it offers: flags and flags2; the latter 0 from a kernel that is too old to have them."""
        if len(self.request) < IN_HEADER.size + INIT_IN.size:
            return 0, 0
        _major, _minor, _readahead, flags, flags2 = INIT_IN.unpack_from(self.request, IN_HEADER.size)
        return flags, flags2 if flags & INIT_EXT else 0


def read_init(fd: int, *, timeout_s: float) -> Init:
    """The INIT request of a mount just made. Raises SiloError when something else comes, or nothing."""
    if not select.select([fd], [], [], timeout_s)[0]:
        raise SiloError("the kernel sent no INIT request")
    request = os.read(fd, MESSAGE_BYTES)
    if IN_HEADER.unpack_from(request)[1] != OPCODE_INIT:
        raise SiloError("the kernel's first request is not INIT")
    return Init(request)


def widen(init: Init, reply: bytes, abilities: Sequence[str]) -> bytes:
    """A daemon's INIT reply with what libfuse does not say.

    - Limits on background requests: libfuse leaves them at 12, and then a dozen reads that wait for a peer would stop
      the asynchronous I/O of every other file on the mount.
    - Shared mappings of files that are opened with direct_io.
    - Locks, if "locks" is among the daemon's abilities: it answers them itself (silofs/mount/extension).
    """
    if len(reply) < OUT_HEADER.size + INIT_OUT.size:
        raise SiloError("the daemon refused the kernel's INIT request", hint="its log says why")
    fields = list(INIT_OUT.unpack_from(reply, OUT_HEADER.size))
    background = limits.FUSE_MAX_BACKGROUND
    fields[4:6] = background, background * 3 // 4
    if init.can_lock and "locks" in abilities:
        fields[3] |= POSIX_LOCKS
    if init.can_mmap:
        fields[3] |= INIT_EXT
        fields[10] |= DIRECT_IO_ALLOW_MMAP
    widened = bytearray(reply)
    INIT_OUT.pack_into(widened, OUT_HEADER.size, *fields)
    return bytes(widened)


def resend(fd: int) -> None:
    """Queue again what was read and never answered. Only while no daemon reads, or it may be handled twice."""
    os.write(fd, OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0))


def disconnected(fd: int) -> bool:
    """The mount behind this descriptor is gone: no request can come any more."""
    poller = select.poll()
    poller.register(fd, 0)
    return bool(poller.poll(0))
