"""copy_file_range(2): whole pages by reference, the ragged ends by their bytes.

The pending writes of every volume are committed in the transaction that shares the pages, so the copy is what was
acknowledged before it, and writes that come meanwhile lie over it.
"""

from __future__ import annotations

from silofs import failpoints
from silofs.blocks import PAGE, PAGE_SHIFT
from silofs.engine.commits import Commits
from silofs.engine.reads import Reads
from silofs.engine.volume import VolumeState
from silofs.engine.writes import Writes
from silofs.errors import NotOwner, Unsupported
from silofs.layers.catalog import Role
from silofs.layers.share import share
from silofs.layers.transaction import WriteTxn


class Copies:
    """Copies between any two volumes, or from a snapshot."""

    def __init__(self, reads: Reads, writes: Writes, commits: Commits) -> None:
        self._reads = reads
        self._writes = writes
        self._commits = commits

    async def copy_range(
        self, source: VolumeState, offset: int, target: VolumeState, to_offset: int, length: int
    ) -> int:
        """Copy bytes of a volume into one that it may be itself; how many: 0 at the source's end, often fewer than

        asked for. Durable on return but for ragged ends. Unsupported (the kernel copies) where pages cannot be shared:
        other offsets in a page, or what is still at a peer.
        """
        length = min(length, source.size - offset)
        if length <= 0:
            return 0
        if not source.local:
            raise Unsupported(f"{source.name} is elsewhere, and its pages cannot be shared")
        head = -offset % PAGE
        if (offset - to_offset) % PAGE:
            raise Unsupported("pages can only be shared between like offsets")
        if head or length < PAGE:
            return await self._copy(source, offset, target, to_offset, min(length, head or PAGE))
        while True:
            refusal = target.refusal()
            if refusal is not None:
                raise refusal
            if not target.frozen:
                break
            await target.moved.wait()
        done = await self._commits.transact(
            lambda txn: _share(txn, source, offset >> PAGE_SHIFT, target, to_offset >> PAGE_SHIFT, length >> PAGE_SHIFT)
        )
        failpoints.hit("share.durable")
        return done << PAGE_SHIFT

    async def _copy(self, source: VolumeState, offset: int, target: VolumeState, to_offset: int, length: int) -> int:
        data = bytes(await self._reads.read(source, offset, length))
        await self._writes.write(target, to_offset, data)
        return len(data)


def _share(txn: WriteTxn, source: VolumeState, first: int, target: VolumeState, to: int, count: int) -> int:
    """The copy, as part of a commit. What the volumes are is as of now: this may have waited."""
    ownership = txn.ownership(target.uuid)
    if ownership is None or ownership.role is not Role.OWNER:
        raise NotOwner(f"{target.name} has moved")
    layer = txn.volume(source.uuid).head if source.record is not None else source.head
    count = min(count, (txn.layer(layer).size >> PAGE_SHIFT) - first)
    done = share(txn, layer, first, target.uuid, to, count)
    failpoints.hit("share.before_commit")
    return done
