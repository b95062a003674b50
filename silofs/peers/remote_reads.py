"""Reads that need a peer: pages that are still there (fetch), and reads that its owner answers (forward_read).

This is what the engine calls; its deadlines are the engine's. A forwarded read is asked anew when its session ends; one
that the other side does not answer at the moment (it is in the middle of a switch-over) is asked again after a pause.
"""

from __future__ import annotations

import logging

import trio

from silofs.engine import VolumeState
from silofs.errors import PeerUnreachable, SiloError
from silofs.layers.catalog import Role
from silofs.layers.reader import ReadTxn
from silofs.migrate.messages import ReadAsk, ReadReply, VolumeEpoch
from silofs.migrate.source import SourceMachine
from silofs.peers import content
from silofs.peers.hub import Link
from silofs.peers.migrations import Migrations
from silofs.peers.mover import Mover

log = logging.getLogger(__name__)

AGAIN_S = 0.05
ANSWERS_MAX = 64  # forwarded reads answered at a time
OVER = bytes(16)  # stands for the migration in a read of a volume whose migration is over


class RemoteReads:
    """engine.Remote over the open migrations."""

    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations
        self._request = 0
        self._asked: dict[tuple[bytes, int], tuple[trio.Event, list[bytes | None]]] = {}
        self._answers = trio.CapacityLimiter(ANSWERS_MAX)
        self._uuids: dict[int, bytes] = {}

    # Pages

    async def fetch(self, volume: VolumeState, layer_id: int, page: int) -> bytes:
        """The bytes of a page that this layer has as REMOTE. PeerUnreachable if no migration here knows the layer."""
        uuid = self._uuids.get(layer_id)
        if uuid is None:
            uuid = self._uuids[layer_id] = self._migrations.engine.reads.txn.layer(layer_id).uuid
        for mover in self._migrations.movers.values():
            record = mover.record
            if record is not None and any(segment.uuid == uuid for segment in record.segments):
                mover.demand(uuid, page)
                return await self._migrations.arrivals.wait(uuid, page)
        raise PeerUnreachable(f"page {page} of {volume.name} is at a peer, and no migration that brings it is open")

    # Forwarding

    async def forward_read(self, volume: VolumeState, offset: int, length: int) -> bytes:
        """A read that the owner answers. Waits for a session; PeerUnreachable if this store does not know the owner."""
        while True:
            mover = self._mover(volume.uuid)
            if mover is None:
                return await self._from_new_home(volume, offset, length)
            link = self._migrations.hub.link(mover.peer)
            if link is None:
                await self._migrations.hub.wait_moved()
                continue
            volumes = tuple(each for each in mover.machine.volumes if each.uuid == volume.uuid)
            data = await self._ask(link, mover.id, volumes, offset, length)
            if data is not None:
                return data
            await trio.sleep(AGAIN_S)

    def _mover(self, uuid: bytes) -> Mover | None:
        return next((mover for mover in self._migrations.movers.values() if uuid in mover.uuids), None)

    async def _from_new_home(self, volume: VolumeState, offset: int, length: int) -> bytes:
        """A read of a volume that has left for good: who it left for answers while it owns it at that epoch."""
        record = self._migrations.engine.reads.txn.ownership(volume.uuid)
        if record is None or record.role is not Role.RETIRED or not record.peer:
            raise PeerUnreachable("the volume is elsewhere, and no migration of it is open here")
        peer = self._migrations.book.get(bytes.fromhex(record.peer))
        if peer is None:
            raise PeerUnreachable("the host that the volume went to is not paired any more")
        link = await self._migrations.hub.connect(peer)
        data = await self._ask(link, OVER, (VolumeEpoch(volume.uuid, record.epoch),), offset, length)
        if data is None:
            raise PeerUnreachable("the host that the volume went to does not answer for it")
        return data

    async def _ask(
        self, link: Link, migration: bytes, volumes: tuple[VolumeEpoch, ...], offset: int, length: int
    ) -> bytes | None:
        self._request = (self._request + 1) & 0xFFFFFFFF
        key = (link.id, self._request)
        done, answer = trio.Event(), list[bytes | None]()
        self._asked[key] = (done, answer)
        link.session.send(ReadAsk(migration, link.id, volumes, self._request, offset, length))
        try:
            await done.wait()
        finally:
            del self._asked[key]
        return answer[0] if answer else None

    def replied(self, link: Link, message: ReadReply) -> None:
        waiting = self._asked.get((link.id, message.request))
        if waiting is not None:
            waiting[1].append(message.data)
            waiting[0].set()

    def disconnected(self, link: Link) -> None:
        for (session, _), (done, _) in list(self._asked.items()):
            if session == link.id:
                done.set()

    # Answering

    async def answer(self, link: Link, message: ReadAsk) -> None:
        """A peer's read of a volume that is here, or was until the peer has it."""
        async with self._answers:
            try:
                data = await self._read(link, message)
            except SiloError as error:
                log.warning("a read for %s was not answered: %s", link.peer.hex()[:8], error)
                data = None
        reply = ReadReply(message.migration, message.session, message.volumes, message.request, data)
        link.session.send(reply)

    async def _read(self, link: Link, message: ReadAsk) -> bytes | None:
        if len(message.volumes) != 1:
            return None
        if message.migration == OVER:
            return await self._read_owned(link, message)
        mover = self._migrations.movers.get(message.migration)
        if mover is None or mover.peer != link.peer:
            return None
        uuid = message.volumes[0].uuid
        if uuid not in mover.uuids:
            return None
        if isinstance(mover.machine, SourceMachine) and not mover.machine.answers_reads:
            return None
        volume = self._migrations.engine.open_volume(uuid)
        if volume.local:
            return bytes(await self._migrations.engine.read(volume, message.offset, message.length))
        record = self._migrations.engine.reads.txn.ownership(uuid)
        if record is None or record.role is not Role.CEDED:
            return None
        final = record.layer

        def read(reader: ReadTxn) -> bytes | None:
            layer = reader.layer_by_uuid(final)
            return content.read_layer(reader, layer.id, message.offset, message.length) if layer is not None else None

        return await self._migrations.threads.read(read)

    async def _read_owned(self, link: Link, message: ReadAsk) -> bytes | None:
        """For the old home of a volume, which keeps a retired copy: only that peer, only at the epoch it left with."""
        asked = message.volumes[0]
        record = self._migrations.engine.reads.txn.ownership(asked.uuid)
        if record is None or record.role is not Role.OWNER:
            return None
        if record.epoch != asked.epoch or record.peer != link.peer.hex():
            return None
        volume = self._migrations.engine.open_volume(asked.uuid)
        if not volume.local:
            return None
        return bytes(await self._migrations.engine.read(volume, message.offset, message.length))
