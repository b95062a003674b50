"""The file system calls of a mount, over the engine: names and attributes, handles, reads and writes.

Every handler turns what it raises into a FUSEError in one place (`refusal`): a SiloError into its errno, anything else
into EIO, a log line and a counter. That matters more than it looks: an exception of another class that reaches pyfuse3
ends its loop, and with it the disks of all VMs. trio.Cancelled passes: the daemon is ending, and the kernel sends the
request again to the next one.

`read` and `write` are the hot path: one dictionary look-up, then the engine, inline. A reply is sent by pyfuse3 right
after the handler returned, with no await in between, so it may be a view of a page that the next commit frees.

Files are opened with direct_io: guests cache for themselves, and nothing stale survives a move to another host. Entry
and attribute time-outs are 0, so that a size changed by `silofs resize` is seen at once.

A call that changes a name and whose daemon dies before it answered is done twice: the kernel sends it again, and a
`rm` that worked can report that there is no such file. pyfuse3 does not show the number by which the two could be told
to be one (docs/mount.md).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from silofs.blocks import PAGE
from silofs.engine import Engine, VolumeState
from silofs.errors import Busy, Exists, NoSuchVolume, ReadOnly, SiloError, Unsupported
from silofs.layers.catalog import Snapshot, Volume
from silofs.layers.handles import Handle, HandleTable
from silofs.mount import tree
from silofs.mount.session import Hooks
from silofs.mount.tree import ROOT, SNAPSHOTS, SNAPSHOTS_NAME, Entry, Tree

log = logging.getLogger(__name__)

SECTORS_PER_PAGE = PAGE // 512
DOT, DOTDOT = 1, 2  # positions in a listing; an entry's is its inode plus 2
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Counters:
    """What went wrong in handlers since this daemon started."""

    refused: int = 0  # requests answered with an error that silofs raised on purpose
    bugs: int = 0  # requests answered with EIO because a handler failed


@dataclass(frozen=True)
class Space:
    """What statfs(2) tells, in bytes: `free` is what can still be written."""

    total: int
    free: int


def guarded(handler: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """A handler out of which nothing but FUSEError and trio's own BaseExceptions comes."""

    @wraps(handler)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            adapter = args[0]
            assert isinstance(adapter, Adapter)
            raise adapter.refusal(error) from None

    return call


class _File:
    """One open handle of this mount, in this daemon."""

    __slots__ = ("state", "sync", "writable")

    def __init__(self, state: VolumeState, flags: int) -> None:
        self.state = state
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.sync = bool(flags & (os.O_SYNC | os.O_DSYNC))


class Adapter(Hooks):
    """pyfuse3's operations. Made before the store is open (the session needs it for INIT), `bind` follows."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()
        self._engine: Engine
        self._handles: HandleTable
        self._space: Callable[[], Space]
        self._files: dict[int, _File] = {}
        self._tree = Tree()
        self._tree_version = -1

    def bind(self, engine: Engine, handles: HandleTable, space: Callable[[], Space]) -> None:
        """Take the engine, and the handles that were open when the last daemon died."""
        self._engine = engine
        self._handles = handles
        self._space = space
        for handle in handles.items():
            try:
                self._register(handle)
            except SiloError as error:
                # The volume is gone or cannot be opened: its handle answers EBADF, the others go on.
                log.error("handle %d of an earlier daemon is lost: %s", handle.id, error)

    def refusal(self, error: Exception) -> FUSEError:
        """What the caller of the system call gets for `error`. The one place where errors become errno."""
        if isinstance(error, FUSEError):
            return error
        if isinstance(error, SiloError):
            self.counters.refused += 1
            return FUSEError(error.errno)
        self.counters.bugs += 1
        log.exception("a file system call failed", exc_info=error)
        return FUSEError(errno.EIO)

    # The hot path

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            state = self._files[fh].state
            data = self._engine.read_now(state, off, size)
            if data is None:
                data = await self._engine.read(state, off, size)
            return data  # type: ignore[return-value]  # any contiguous buffer will do
        except Exception as error:
            raise self._lost(fh, error) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            file = self._files[fh]
            if not self._engine.write_now(file.state, off, buf):
                await self._engine.write(file.state, off, buf)
            if file.sync:
                await self._engine.flush(file.state)
            return len(buf)
        except Exception as error:
            raise self._lost(fh, error) from None

    def _lost(self, fh: int, error: Exception) -> FUSEError:
        """`refusal`, and EBADF for a handle that is not known: looked at only now, to keep reads and writes short."""
        return FUSEError(errno.EBADF) if fh not in self._files else self.refusal(error)

    # Handles

    def _register(self, handle: Handle) -> None:
        state = self._engine.open_layer(handle.uuid, handle.layer) if handle.layer else None
        file = _File(state or self._engine.open_volume(handle.uuid), handle.flags)
        self._files[handle.id] = file
        self._engine.opened(file.state, file.writable)

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return await self._open(self._entry(inode), flags)

    async def _open(self, entry: Entry, flags: int) -> FileInfo:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if isinstance(entry, Volume):
            uuid, layer = entry.uuid, 0
            state = self._engine.open_volume(uuid)
            if writable:
                self._engine.check_writer(state)
            if flags & os.O_TRUNC and state.size:
                await self._engine.resize(state, 0)
        else:
            uuid, layer = entry.volume, entry.layer
            if writable or flags & os.O_TRUNC:
                raise ReadOnly("a snapshot cannot be written")
        # No await from here to the reply, so that a daemon that dies leaves no handle that nobody knows.
        fh = self._handles.allocate(uuid, flags, layer=layer)
        handle = self._handles.get(fh)
        assert handle is not None
        try:
            self._register(handle)
        except BaseException:
            self._handles.release(fh)
            raise
        return FileInfo(fh=fh, direct_io=True, keep_cache=False)

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        stem = tree.new_volume_name(parent_inode, name)
        entry = self._now().child(ROOT, name)
        if entry is None:
            uid, gid, permissions = ctx.uid, ctx.gid, stat.S_IMODE(mode)
            entry = await self._engine.transact(
                lambda txn: txn.create_volume(stem, 0, uid=uid, gid=gid, mode=permissions)
            )
        elif flags & os.O_EXCL:
            raise Exists(f"{stem} exists")
        info = await self._open(entry, flags & ~os.O_TRUNC if isinstance(entry, Volume) and not entry.size else flags)
        return info, self._attributes(self._entry(entry.inode))

    @guarded
    async def release(self, fh: int) -> None:
        self._handles.release(fh)
        file = self._files.pop(fh, None)
        if file is not None:
            self._engine.closed(file.state, file.writable)

    @guarded
    async def flush(self, fh: int) -> None:
        """close(2): nothing is lost by not waiting for the disk here, as with any file system."""

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        file = self._files.get(fh)
        if file is None:
            raise FUSEError(errno.EBADF)
        await self._engine.flush(file.state)

    # Names

    def _now(self) -> Tree:
        """The names as the catalog has them."""
        version = self._engine.catalog_version
        if version != self._tree_version:
            volumes, snapshots = self._engine.catalog()
            self._tree = Tree(volumes, snapshots)
            self._tree_version = version
        return self._tree

    def _entry(self, inode: int) -> Entry:
        entry = self._now().get(inode)
        if entry is None:
            raise FUSEError(errno.EISDIR if self._tree.is_directory(inode) else errno.ESTALE)
        return entry

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if parent_inode == ROOT and name == SNAPSHOTS_NAME:
            return self._directory(SNAPSHOTS)
        entry = self._now().child(parent_inode, name)
        if entry is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(entry)

    async def forget(self, inode_list: Iterable[tuple[int, int]]) -> None:
        """Inodes are never used again, so nobody has to know which ones the kernel remembers."""

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        volume = self._volume(parent_inode, name)
        if self._engine.open_volume(volume.uuid).open_count:
            raise Busy(f"{volume.name} is open")
        await self._engine.transact(lambda txn: txn.delete_volume(volume.uuid))

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Never over an existing volume (EEXIST): `mv` must not be a way to lose a disk. `rm` it first."""
        volume = self._volume(parent_inode_old, name_old)
        stem = tree.new_volume_name(parent_inode_new, name_new)
        if flags & pyfuse3.RENAME_EXCHANGE:
            raise FUSEError(errno.EINVAL)
        if stem == volume.name:
            return
        if self._now().child(ROOT, name_new) is not None:
            raise Exists(f"{stem} exists")
        await self._engine.transact(lambda txn: txn.rename(volume.uuid, stem))

    def _volume(self, parent: int, name: bytes) -> Volume:
        """The volume that a call wants to change by its name."""
        entry = self._now().child(parent, name)
        if isinstance(entry, Volume):
            return entry
        if entry is not None or parent == SNAPSHOTS:
            raise ReadOnly("snapshots are changed with silofs, not through the mount")
        raise FUSEError(errno.EISDIR) if name == SNAPSHOTS_NAME else NoSuchVolume("no such file")

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    # Attributes

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        tree_now = self._now()
        return self._directory(inode) if tree_now.is_directory(inode) else self._attributes(self._entry(inode))

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if self._now().is_directory(inode):
            raise FUSEError(errno.EPERM)
        entry = self._entry(inode)
        if not isinstance(entry, Volume):
            raise ReadOnly("a snapshot cannot be changed")
        uuid = entry.uuid
        if fields.update_size:
            await self._engine.resize(self._engine.open_volume(uuid), attr.st_size)
        changes: dict[str, int] = {}
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_mode:
            changes["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_mtime:
            changes["mtime_ns"] = attr.st_mtime_ns
        if changes:
            await self._engine.transact(lambda txn: txn.set_attr(uuid, **changes))
        return self._attributes(self._entry(inode))

    def _attributes(self, entry: Entry) -> EntryAttributes:
        attr = EntryAttributes()
        attr.entry_timeout = attr.attr_timeout = 0
        attr.st_ino = entry.inode
        if isinstance(entry, Snapshot):
            owner = self._tree.volumes[entry.volume]
            permissions, size, pages = owner.mode & 0o444, entry.size, entry.data_pages
            attr.st_mtime_ns = attr.st_ctime_ns = attr.st_atime_ns = entry.created_ns
        else:
            owner, size, pages = self._engine.shown(entry)
            permissions = owner.mode
            attr.st_mtime_ns = attr.st_ctime_ns = attr.st_atime_ns = owner.mtime_ns
        attr.st_mode = stat.S_IFREG | permissions
        attr.st_uid, attr.st_gid = owner.uid, owner.gid
        attr.st_size, attr.st_blocks = size, pages * SECTORS_PER_PAGE
        return attr

    def _directory(self, inode: int) -> EntryAttributes:
        attr = EntryAttributes()
        attr.entry_timeout = attr.attr_timeout = 0
        attr.st_ino = inode
        attr.st_mode = stat.S_IFDIR | (0o755 if inode == ROOT else 0o555)
        attr.st_nlink = 3 if inode == ROOT else 2
        attr.st_uid, attr.st_gid = os.geteuid(), os.getegid()
        return attr

    @guarded
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True  # the kernel checks owner and mode itself (default_permissions)

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self._space()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = space.total // PAGE
        data.f_bfree = data.f_bavail = space.free // PAGE
        data.f_files = len(self._now().volumes)
        data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 128 + len(tree.SUFFIX)
        return data

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        raise FUSEError(errno.ENOSYS)  # the kernel stops asking, which it would before every write

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        raise Unsupported("no extended attributes")

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        raise Unsupported("no extended attributes")

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise Unsupported("no extended attributes")

    # Directories

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if not self._now().is_directory(inode):
            raise FUSEError(errno.ENOTDIR)
        return inode  # a listing has no state, so that it outlives the daemon

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        now = self._now()
        if start_id < DOT and not pyfuse3.readdir_reply(token, b".", self._directory(fh), DOT):
            return
        if start_id < DOTDOT and not pyfuse3.readdir_reply(token, b"..", self._directory(ROOT), DOTDOT):
            return
        after = start_id - DOTDOT
        for name, entry in now.list(fh, after):
            if not pyfuse3.readdir_reply(token, name, self._attributes(entry), entry.inode + DOTDOT):
                return
        if fh == ROOT and after < SNAPSHOTS:
            pyfuse3.readdir_reply(token, SNAPSHOTS_NAME, self._directory(SNAPSHOTS), SNAPSHOTS + DOTDOT)

    @guarded
    async def releasedir(self, fh: int) -> None:
        pass

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass  # names change in durable transactions
