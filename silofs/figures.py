"""What a daemon has counted and what it holds, gathered for `silofs metrics` and `silofs top`.

Nothing is counted here: the long-lived objects have their `statistics()`, and this puts them side by side. What is in
memory is read in one step on the event loop; what the store's records say, in a thread. Counters begin at zero with
each daemon; `pid` tells which one it was, `monotonic_s` when, by the clock that all processes of a host share.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import trio

from silofs.blocks import PAGE
from silofs.control import Call
from silofs.engine import Engine
from silofs.engine.served import Served
from silofs.errors import StoreError
from silofs.facts import ROLES, Fields
from silofs.layers.catalog import Role
from silofs.service import Host, Service


class Figures:
    """The verb `statistics` of one daemon. `peers` and `migrations`: what those who know say of them."""

    def __init__(
        self,
        engine: Engine,
        host: Host,
        *,
        peers: Callable[[], Fields] = dict,
        migrations: Callable[[], list[Fields]] = list,
    ) -> None:
        self._engine = engine
        self._host = host
        self._peers = peers
        self._migrations = migrations
        self._began = time.time()

    def register(self, service: Service) -> None:
        service.register("statistics", self.statistics)

    async def statistics(self, args: dict[str, Any], call: Call) -> Fields:
        engine = self._engine
        found: Fields = {
            "pid": os.getpid(),
            "monotonic_s": time.monotonic(),
            "began": self._began,
            "daemon": self._host.status(),
            "engine": engine.statistics(),
            "waiting_bytes": engine.dirty_bytes,
            "space": dataclasses.asdict(engine.store.held.statistics()),
            "migrations": self._migrations(),
            "peers": self._peers(),
        }
        opened = {
            volume.uuid: {
                "virtual_size": volume.size,
                "open_count": volume.open_count,
                "waiting_bytes": volume.waiting_bytes,
                **volume.served.figures(),
            }
            for volume in engine.volumes()
        }
        try:
            return found | await trio.to_thread.run_sync(self._stored, opened)
        except StoreError:  # a store that cannot be read is no reason to say nothing
            return found | {"store": None, "volumes": []}

    def _stored(self, opened: dict[bytes, dict[str, int]]) -> Fields:
        """What takes a look into the store. Volumes that were removed and are still open have no name, and are not
        listed: what was served of them is in the total alone."""
        store = self._engine.store
        unopened = {"open_count": 0, "waiting_bytes": 0, **Served().figures()}
        reader = store.reader()
        try:
            volumes = []
            for record in reader.volumes():
                ownership = reader.ownership(record.uuid)
                volumes.append(
                    {
                        "name": record.name,
                        "uuid": str(UUID(bytes=record.uuid)),
                        "role": ROLES[Role.NONE if ownership is None else ownership.role],
                        "virtual_size": record.size,
                        "allocated": record.data_pages * PAGE,  # as of the last commit: a scrape adds nothing up
                        **opened.get(record.uuid, unopened),
                    }
                )
        finally:
            reader.close()
        about = {**store.statistics(), "available_bytes": max(0, store.room())}
        return {"store": about, "volumes": sorted(volumes, key=lambda volume: str(volume["name"]))}
