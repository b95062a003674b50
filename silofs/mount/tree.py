"""The names and inodes of a mount: what is in its two directories. Pure.

    /                    NAME.img for every volume, and .snapshots
    /.snapshots          VOLUME@SNAPSHOT.img for every snapshot; read-only

Inodes come from the store's counter and are never used again, so the kernel may keep one for as long as it likes and
nothing has to count its look-ups. The names are a copy of the catalog, loaded whole and replaced whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from silofs import limits
from silofs.errors import BadName
from silofs.layers.catalog import Snapshot, Volume

ROOT = 1
SNAPSHOTS = 0xFFFF_FFFF  # above what the counter will reach, and still fit for programs with 32-bit inodes
SNAPSHOTS_NAME = b".snapshots"
SUFFIX = limits.IMAGE_SUFFIX.encode()

Entry = Volume | Snapshot


def is_directory(inode: int) -> bool:
    return inode in (ROOT, SNAPSHOTS)


def volume_name(name: bytes) -> str | None:
    """The volume that a file of this name in the root would be; None if none can have it."""
    if not name.endswith(SUFFIX):
        return None
    try:
        stem = name.removesuffix(SUFFIX).decode("ascii")
    except UnicodeDecodeError:
        return None
    if limits.NAME.fullmatch(stem) is None or stem.endswith(limits.IMAGE_SUFFIX):
        return None
    return stem


def snapshot_name(name: bytes) -> tuple[str, str] | None:
    """(volume, snapshot) of a file of this name among the snapshots; None if none can have it."""
    volume, at, rest = name.partition(b"@")
    stem, own = volume_name(volume + SUFFIX), volume_name(rest)
    return (stem, own) if at and stem is not None and own is not None else None


def new_volume_name(parent: int, name: bytes) -> str:
    """The name for a volume that is about to be made or renamed by a file call. Raises BadName (EPERM)."""
    stem = volume_name(name) if parent == ROOT else None
    if stem is None:
        shown = name[:140].decode("utf-8", "replace")
        raise BadName(f"{shown!r} cannot be made here: only NAME{limits.IMAGE_SUFFIX} in the root of the mount")
    return stem


def file_name(entry: Entry, volumes: dict[bytes, Volume]) -> bytes:
    """The name of an entry in its directory."""
    if isinstance(entry, Volume):
        return entry.name.encode() + SUFFIX
    return f"{volumes[entry.volume].name}@{entry.name}".encode() + SUFFIX


class Tree:
    """One state of the catalog, by inode and by name."""

    def __init__(self, volumes: Iterable[Volume] = (), snapshots: Iterable[Snapshot] = ()) -> None:
        self.volumes = {volume.uuid: volume for volume in volumes}
        kept = [snapshot for snapshot in snapshots if snapshot.volume in self.volumes]
        self._by_inode: dict[int, Entry] = {}
        self._names: dict[int, dict[bytes, Entry]] = {ROOT: {}, SNAPSHOTS: {}}
        self._order: dict[int, list[int]] = {ROOT: [], SNAPSHOTS: []}
        self._add(ROOT, self.volumes.values())
        self._add(SNAPSHOTS, kept)

    def _add(self, directory: int, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._by_inode[entry.inode] = entry
            self._names[directory][file_name(entry, self.volumes)] = entry
        self._order[directory] = sorted(entry.inode for entry in self._names[directory].values())

    def get(self, inode: int) -> Entry | None:
        """The volume or snapshot with this inode."""
        return self._by_inode.get(inode)

    def child(self, directory: int, name: bytes) -> Entry | None:
        return self._names.get(directory, {}).get(name)

    def list(self, directory: int, after: int) -> Sequence[tuple[bytes, Entry]]:
        """The entries with inodes above `after`, by inode: a listing that goes on after a change skips and repeats
        nothing that stayed."""
        order = self._order[directory]
        found = [self._by_inode[inode] for inode in order[bisect_right(order, after) :]]
        return [(file_name(entry, self.volumes), entry) for entry in found]
