"""Every error that silofs raises on purpose, and what each becomes outside (docs/errors.md is this table in prose).

The class says whose fault it is: the user's (`UserError`), the store's or the disk's (`StoreError`), a peer's
(`PeerError`). Whatever else escapes is a bug of ours: it becomes EIO, exit code 1 and a log line. A class carries
`code` (the stable name in --json), `errno` (what a system call on the mount gets), `exit_code` (docs/cli.md), `retry`
(whether the same call may succeed later unchanged) and a `hint` that an instance can replace.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class Exit:
    """Exit codes of the command line (docs/cli.md)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    WARNINGS = 3
    DAMAGE = 4
    NOT_FOUND = 10
    BUSY = 11
    NOT_AUTHORISED = 12
    UNREACHABLE = 13
    TRY_AGAIN = 75
    INTERRUPTED = 130


class SiloError(Exception):
    """Base of all. `str(error)` is the one line that says what is wrong; `hint` the one that says what to do."""

    code: ClassVar[str] = "failed"
    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = Exit.FAILED
    retry: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint


# The user's


class UserError(SiloError):
    """The call cannot be done as it was asked for; nothing was changed."""

    code = "invalid"
    errno = _errno.EINVAL
    exit_code = Exit.USAGE


class NoSuchVolume(UserError):
    code = "no_such_volume"
    errno = _errno.ENOENT
    exit_code = Exit.NOT_FOUND
    default_hint = "silofs ls lists the volumes of this store"


class NoSuchSnapshot(UserError):
    code = "no_such_snapshot"
    errno = _errno.ENOENT
    exit_code = Exit.NOT_FOUND
    default_hint = "silofs info NAME lists the snapshots of a volume"


class NoSuchThing(UserError):
    """A peer, migration or file that is named but not there."""

    code = "not_found"
    errno = _errno.ENOENT
    exit_code = Exit.NOT_FOUND


class Exists(UserError):
    code = "exists"
    errno = _errno.EEXIST
    exit_code = Exit.BUSY
    default_hint = "choose another name, or remove the old one first"


class BadName(UserError):
    code = "bad_name"
    errno = _errno.EPERM
    default_hint = "names are 1-128 of A-Z a-z 0-9 . _ - and start with a letter or digit"


class BadSize(UserError):
    code = "bad_size"
    default_hint = "a size is a multiple of 512 bytes, at least 4096: for example 20G, 512MiB or 20GB"


class BadImage(UserError):
    code = "bad_image"
    default_hint = "qemu-img check FILE says what is wrong with it"


class BadStream(UserError):
    """What `silofs export --format stream` wrote did not arrive as it was written, or is something else."""

    code = "bad_stream"
    default_hint = "export it again; what was imported of it before is kept, and not sent twice"


class Busy(UserError):
    """In use, or in a state that forbids the call for now."""

    code = "busy"
    errno = _errno.EBUSY
    exit_code = Exit.BUSY


class NotOwner(UserError):
    """The volume has left this host, or has not arrived: it has its one writer elsewhere."""

    code = "not_owner"
    errno = _errno.ESTALE
    exit_code = Exit.BUSY
    default_hint = "silofs info NAME says where the volume is; use it there"


class ReadOnly(UserError):
    code = "read_only"
    errno = _errno.EROFS
    exit_code = Exit.BUSY


class TooManyOpen(UserError):
    code = "too_many_open"
    errno = _errno.ENFILE
    exit_code = Exit.BUSY
    default_hint = "close files on this mount first"


class NoLocks(UserError):
    code = "no_locks"
    errno = _errno.ENOLCK
    exit_code = Exit.BUSY
    default_hint = "close files on this mount, or unlock ranges of them"


class Unsupported(UserError):
    code = "unsupported"
    errno = _errno.EOPNOTSUPP


class NotAuthorised(UserError):
    code = "not_authorised"
    errno = _errno.EACCES
    exit_code = Exit.NOT_AUTHORISED
    default_hint = "silofs peer allow PEER VOLUME in|out|read on the host that refused"


class TryAgain(UserError):
    code = "try_again"
    errno = _errno.EAGAIN
    exit_code = Exit.TRY_AGAIN
    retry = True


class NoDaemon(UserError):
    code = "no_daemon"
    exit_code = Exit.FAILED
    default_hint = "silofs mount MOUNTPOINT starts one"


class Interrupted(UserError):
    code = "interrupted"
    errno = _errno.EINTR
    exit_code = Exit.INTERRUPTED


# The store's and the disk's


class StoreError(SiloError):
    code = "store_error"


class StoreLocked(StoreError):
    code = "store_locked"
    errno = _errno.EBUSY
    exit_code = Exit.BUSY
    default_hint = "another silofs has this store open: silofs status says which, or name another --store"


class StoreFull(StoreError):
    code = "store_full"
    errno = _errno.ENOSPC
    retry = True
    default_hint = "remove snapshots or volumes (silofs du), or make room on the store's file system"


class NoStore(StoreError):
    code = "no_store"
    errno = _errno.ENOENT
    exit_code = Exit.NOT_FOUND
    default_hint = "silofs init makes one; --store or $SILOFS_STORE names it"


class BadFormat(StoreError):
    """The store is of an unknown version, or is no store, or is cut short. It was not touched."""

    code = "bad_format"
    default_hint = "use the silofs version that wrote it, or restore the store from a copy"


class Damaged(StoreError):
    """A checksum, count or presence record does not agree with what is stored, or the journal has lost what was synced.

    The message names the place.
    """

    code = "damaged"
    exit_code = Exit.DAMAGE
    default_hint = "silofs check says what else is damaged; restore the volume from a copy or overwrite the range"


class ObjectMissing(Damaged):
    """A reference leads to no object. To an old snapshot that is normal once: renew it, resolve and read again."""

    code = "damaged"


class StoreBroken(StoreError):
    """LMDB failed under us; the store is closed to changes until it is reopened and verified (docs/write-path.md)."""

    code = "store_broken"
    errno = _errno.EROFS
    default_hint = "see the log for the disk's error; then silofs restart"


# A peer's


class PeerError(SiloError):
    code = "peer_error"


class PeerUnreachable(PeerError):
    code = "peer_unreachable"
    errno = _errno.EIO
    exit_code = Exit.UNREACHABLE
    retry = True
    default_hint = "check that silofs is mounted with --listen there and that the address can be reached"


class PeerRefused(PeerError):
    """The peer answered, and said no; the message carries its reason."""

    code = "peer_refused"


class ProtocolError(PeerError):
    """The peer sent what the protocol does not allow; the session is closed and nothing was changed."""

    code = "protocol_error"


class FetchTimeout(PeerError):
    """A page that is still at the peer did not arrive before its deadline."""

    code = "fetch_timeout"
    retry = True


def error_of(code: str) -> type[SiloError]:
    """The class with this `code`, for an error that travelled between our own processes; SiloError if none has it."""

    def find(base: type[SiloError]) -> type[SiloError] | None:
        if base.code == code:
            return base
        return next(filter(None, map(find, base.__subclasses__())), None)

    return find(SiloError) or SiloError
