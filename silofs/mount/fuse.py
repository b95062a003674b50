"""The file system calls of a mount, over the engine: names, attributes and directories; files.py has the open files.

Files are opened with direct_io: guests cache for themselves, and nothing stale survives a move to another host. Entry
and attribute time-outs are 0, so that a size changed by `silofs resize` is seen at once.

A call that changes a name or an attribute is done once, also when its daemon dies before it answered: see requests.py.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from silofs import failpoints, verbs
from silofs.blocks import PAGE
from silofs.errors import Exists, NoSuchVolume, ReadOnly
from silofs.layers.catalog import Snapshot, Volume
from silofs.layers.transaction import WriteTxn
from silofs.mount import tree
from silofs.mount.files import Files, Volumes
from silofs.mount.guard import guarded
from silofs.mount.names import Names
from silofs.mount.requests import Request
from silofs.mount.tree import ROOT, SNAPSHOTS, SNAPSHOTS_NAME, Entry

SECTORS_PER_PAGE = PAGE // 512
TIME_MIN, TIME_MAX = -(1 << 63), (1 << 63) - 1  # ns; what a record holds
DOT, DOTDOT = 1, 2  # positions in a listing; an entry's is its inode plus 2


class Adapter(Files):
    """pyfuse3's operations. Made before the store is open (the session needs it for INIT), `bind` follows."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def bind(self, volumes: Volumes) -> None:
        super().bind(volumes)
        self._names = Names(volumes.engine)

    # Opening

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        with self._volumes.requests.handle() as request:
            return await self._open(self._entry(inode), flags, request)

    async def _open(self, entry: Entry, flags: int, request: Request) -> FileInfo:
        handles = self._volumes.handles
        fh = handles.of_request(request.number)
        if fh is None:
            uuid, layer = await self._openable(entry, flags, request)
            # No await from here to the reply: a daemon that dies leaves no handle but one that is found again.
            fh = handles.allocate(uuid, flags, layer=layer, request=request.number)
            handle = handles.get(fh)
            assert handle is not None
            try:
                self._register(handle)
            except BaseException:
                handles.release(fh)
                raise
            failpoints.hit("open.noted")
        return FileInfo(fh=fh, direct_io=True, keep_cache=False)

    async def _openable(self, entry: Entry, flags: int, request: Request) -> tuple[bytes, int]:
        """(volume, layer) for a handle. Raises why it cannot be opened in that way; O_TRUNC is done here."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if isinstance(entry, Snapshot):
            if writable or flags & os.O_TRUNC:
                raise ReadOnly("a snapshot cannot be written")
            return entry.volume, entry.layer
        state = self._engine.open_volume(entry.uuid)
        if entry.orphan and not state.open_count:
            raise FUSEError(errno.ESTALE)  # its last handle has gone, and it is being deleted
        if writable:
            self._engine.check_writer(state)
        if flags & os.O_TRUNC and state.size and request.before is None:
            await self._resize(entry, 0, lambda txn: request.note(txn, "open", entry.uuid))
        return entry.uuid, 0

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        with self._volumes.requests.handle(names=True) as request:
            entry: Entry
            if request.before is not None:
                entry = self._engine.reads.txn.volume(request.before.volume)
            else:
                entry = await self._create(parent_inode, name, mode, flags, ctx, request)
            attributes = self._attributes(entry)
            return await self._open(entry, flags, request), attributes

    async def _create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext, request: Request
    ) -> Entry:
        """The volume of that name, made if there is none."""
        stem = tree.new_volume_name(parent_inode, name)
        entry = self._names.child(ROOT, name)
        if entry is not None:
            if flags & os.O_EXCL:
                raise Exists(f"{stem} exists")
            return entry
        self._volumes.handles.expect_room()  # nothing is made that cannot be opened
        uid, gid, permissions = ctx.uid, ctx.gid, stat.S_IMODE(mode)

        def make(txn: WriteTxn) -> Volume:
            made = txn.create_volume(stem, 0, uid=uid, gid=gid, mode=permissions)
            request.note(txn, "create", made.uuid)
            return made

        made = await self._engine.transact(make)
        failpoints.hit("create.committed")
        return made

    # Names

    def _entry(self, inode: int) -> Entry:
        entry = self._names.get(inode)
        if entry is None:
            raise FUSEError(errno.EISDIR if tree.is_directory(inode) else errno.ESTALE)
        return entry

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if parent_inode == ROOT and name == SNAPSHOTS_NAME:
            return self._directory(SNAPSHOTS)
        entry = self._names.child(parent_inode, name)
        if entry is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(entry)

    async def forget(self, inode_list: Iterable[tuple[int, int]]) -> None:
        """Inodes are never used again, so nobody has to know which ones the kernel remembers."""

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """EBUSY while it has snapshots: `rm` must not be a way to lose them (`silofs rm` asks)."""
        with self._volumes.requests.handle(names=True) as request:
            if request.before is not None:
                return
            volume = self._volume(parent_inode, name)
            await self._volumes.before_change("rm", volume.name)
            view = self._volumes.view()

            def remove(txn: WriteTxn) -> None:
                verbs.unlink(txn, volume, view)
                request.note(txn, "unlink")

            await self._engine.transact(remove)
            failpoints.hit("unlink.committed")
            # Looked at only now: it can have been opened before its name was gone, and not after.
            await self._bury(self._engine.open_volume(volume.uuid))

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
        with self._volumes.requests.handle(names=True) as request:
            if request.before is not None:
                return
            volume = self._volume(parent_inode_old, name_old)
            stem = tree.new_volume_name(parent_inode_new, name_new)
            if flags & ~pyfuse3.RENAME_NOREPLACE:
                raise FUSEError(errno.EINVAL)
            if stem == volume.name:
                return
            if self._names.child(ROOT, name_new) is not None:
                raise Exists(f"{stem} exists")
            await self._volumes.before_change("rename", volume.name)
            view = self._volumes.view()

            def rename(txn: WriteTxn) -> None:
                verbs.rename(txn, {"old": volume.name, "new": stem}, view)
                request.note(txn, "rename")

            await self._engine.transact(rename)
            failpoints.hit("rename.committed")

    def _volume(self, parent: int, name: bytes) -> Volume:
        """The volume that a call wants to change by its name."""
        entry = self._names.child(parent, name)
        if isinstance(entry, Volume):
            return entry
        if entry is not None or parent == SNAPSHOTS:
            raise ReadOnly("snapshots are changed with silofs, not through the mount")
        raise FUSEError(errno.EISDIR) if name == SNAPSHOTS_NAME else NoSuchVolume("no such file")

    # Attributes

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._directory(inode) if tree.is_directory(inode) else self._attributes(self._entry(inode))

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if tree.is_directory(inode):
            raise FUSEError(errno.EPERM)
        with self._volumes.requests.handle() as request:
            entry = self._entry(inode)
            if isinstance(entry, Snapshot):
                raise ReadOnly("a snapshot cannot be changed")
            if request.before is None:
                await self._change(entry, attr, fields, request)
            return self._attributes(self._entry(inode))

    async def _change(self, volume: Volume, attr: EntryAttributes, fields: SetattrFields, request: Request) -> None:
        """Size and attributes, in one transaction."""
        changes: dict[str, int] = {}
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_mode:
            changes["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_mtime:
            changes["mtime_ns"] = max(TIME_MIN, min(attr.st_mtime_ns, TIME_MAX))

        def change(txn: WriteTxn) -> None:
            if changes:
                txn.set_attr(volume.uuid, **changes)
            request.note(txn, "setattr")

        if fields.update_size:
            await self._resize(volume, attr.st_size, change)
        elif changes:
            await self._engine.transact(change)
        failpoints.hit("setattr.committed")

    async def _resize(self, volume: Volume, size: int, also: Callable[[WriteTxn], None]) -> None:
        await self._volumes.before_change("resize", volume.name)
        await self._engine.resize(self._engine.open_volume(volume.uuid), size, also)

    def _attributes(self, entry: Entry) -> EntryAttributes:
        shown = self._names.shown(entry)
        attr = EntryAttributes()
        attr.entry_timeout = attr.attr_timeout = 0
        attr.st_ino = shown.inode
        attr.st_mode = stat.S_IFREG | shown.mode
        attr.st_nlink = shown.links
        attr.st_uid, attr.st_gid = shown.uid, shown.gid
        attr.st_size, attr.st_blocks = shown.size, shown.pages * SECTORS_PER_PAGE
        attr.st_mtime_ns = attr.st_ctime_ns = attr.st_atime_ns = shown.mtime_ns
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
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        failpoints.hit("mount.statfs")
        space = self._volumes.space()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = space.total // PAGE
        data.f_bfree = data.f_bavail = space.free // PAGE
        data.f_files = len(self._names.tree().volumes)
        data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 128 + len(tree.SUFFIX)
        return data

    # Directories

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if not tree.is_directory(inode):
            raise FUSEError(errno.ENOTDIR)
        return inode  # a listing has no state, so that it outlives the daemon

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        if start_id < DOT and not pyfuse3.readdir_reply(token, b".", self._directory(fh), DOT):
            return
        if start_id < DOTDOT and not pyfuse3.readdir_reply(token, b"..", self._directory(ROOT), DOTDOT):
            return
        after = start_id - DOTDOT
        for name, entry in self._names.tree().list(fh, after):
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
