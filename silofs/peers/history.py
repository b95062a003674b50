"""What is kept of migrations beside their records: how they were asked for, how they ended, when a copy may go.

Kept in the store's table `host` as msgpack, one value per migration and one per retired volume. A retired copy is
removed once its time is over; it is only ever one whose new owner has reported everything durable and verified
(docs/protocol.md, I7), so a clock that was wrong costs nothing but the chance to look at it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
import trio

from silofs.engine import Engine
from silofs.errors import SiloError
from silofs.layers.catalog import Role
from silofs.layers.transaction import WriteTxn
from silofs.limits import RETAIN_S
from silofs.peers.records import shown_id

log = logging.getLogger(__name__)

TABLE = "host"
MIGRATION = "migration "
RETAINED = "retained "
ENDED_MAX = 64
LOOK_S = 60.0


class Extras(msgspec.Struct, array_like=True):
    """How a migration was asked for, and, once it is over, how it ended."""

    retain_s: float = RETAIN_S
    bandwidth: int | None = None
    started: float = msgspec.field(default_factory=time.time)
    ended: dict[str, Any] | None = None


class History:
    """Remembers migrations across restarts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        values = engine.reads.txn.values(TABLE)
        self._known = {
            bytes.fromhex(key.removeprefix(MIGRATION)): msgspec.msgpack.decode(data, type=Extras)
            for key, data in values.items()
            if key.startswith(MIGRATION)
        }
        self._retained = {
            bytes.fromhex(key.removeprefix(RETAINED)): float(msgspec.msgpack.decode(data))
            for key, data in values.items()
            if key.startswith(RETAINED)
        }
        self._send, self._receive = trio.open_memory_channel[Any](1024)
        self._look = trio.Event()

    def extras(self, migration: bytes) -> Extras:
        return self._known.get(migration) or Extras()

    def begin(self, migration: bytes, extras: Extras) -> None:
        self._known[migration] = extras
        self._save(migration)

    def end(
        self,
        migration: bytes,
        fields: dict[str, Any],
        retire: set[bytes],
        retain_s: float,
        kept: AbstractSet[bytes] = frozenset(),
    ) -> None:
        """A migration is over. `retire`: volumes whose copy here may go after `retain_s` seconds; `kept`: never."""
        extras = self.extras(migration)
        extras.ended = fields
        self._known[migration] = extras
        self._save(migration)
        over = [known for known, each in self._known.items() if each.ended is not None]
        for oldest in over[: max(0, len(over) - ENDED_MAX)]:
            del self._known[oldest]
            self._write(MIGRATION + oldest.hex(), None)
        for uuid in kept & self._retained.keys():
            del self._retained[uuid]
            self._write(RETAINED + uuid.hex(), None)
        for uuid in retire:
            self._retained[uuid] = time.time() + retain_s
            self._write(RETAINED + uuid.hex(), msgspec.msgpack.encode(self._retained[uuid]))
        self._look.set()

    def close(
        self, txn: WriteTxn, migration: bytes, fields: dict[str, Any], retire: set[bytes], retain_s: float
    ) -> None:
        """`end`, in the transaction that deletes the migration's record: for a daemon that dies right after it."""
        extras = self.extras(migration)
        closed = Extras(extras.retain_s, extras.bandwidth, extras.started, fields)
        txn.put_value(TABLE, MIGRATION + migration.hex(), msgspec.msgpack.encode(closed))
        for uuid in retire:
            txn.put_value(TABLE, RETAINED + uuid.hex(), msgspec.msgpack.encode(time.time() + retain_s))

    def ended(self) -> list[dict[str, Any]]:
        return [extras.ended for extras in self._known.values() if extras.ended is not None]

    def find(self, text: str) -> dict[str, Any] | None:
        """How the migration with that id, or beginning of an id, ended."""
        for migration, extras in self._known.items():
            if extras.ended is not None and shown_id(migration).startswith(text):
                return extras.ended
        return None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_all)
            nursery.start_soon(self._expire)

    def _save(self, migration: bytes) -> None:
        self._write(MIGRATION + migration.hex(), msgspec.msgpack.encode(self._known[migration]))

    def _write(self, key: str, data: bytes | None) -> None:
        try:
            self._send.send_nowait((key, data))
        except trio.WouldBlock:
            log.warning("a migration's history is not kept: too much is waiting to be written")

    async def _write_all(self) -> None:
        async for key, data in self._receive:

            def put(txn: WriteTxn, key: str = key, data: bytes | None = data) -> None:
                if data is None:
                    txn.delete_value(TABLE, key)
                else:
                    txn.put_value(TABLE, key, data)

            try:
                await self._engine.transact(put)
            except SiloError as error:
                log.error("a migration's history is not kept: %s", error)

    async def _expire(self) -> None:
        while True:
            now = time.time()
            for uuid, until in list(self._retained.items()):
                if until <= now:
                    await self._remove(uuid)
            self._look = trio.Event()
            soonest = min((until - time.time() for until in self._retained.values()), default=LOOK_S)
            with trio.move_on_after(min(max(soonest, 0.0), LOOK_S)):
                await self._look.wait()

    async def _remove(self, uuid: bytes) -> None:
        """The copy goes, the tombstone stays; a volume that has come back is left alone."""

        def remove(txn: WriteTxn) -> None:
            record = txn.ownership(uuid)
            gone = record is not None and record.role in (Role.RETIRED, Role.NONE)
            if gone and txn.has_volume(uuid):
                for snapshot in txn.snapshots(uuid):
                    txn.remove_snapshot(uuid, snapshot.name)
                txn.delete_volume(uuid)
            txn.delete_value(TABLE, RETAINED + uuid.hex())

        try:
            await self._engine.transact(remove)
            del self._retained[uuid]
        except SiloError as error:
            log.error("a retired copy cannot be removed: %s", error)
            self._retained[uuid] = time.time() + LOOK_S
