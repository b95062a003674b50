"""Pages that are still at a peer: what the engine asks of migration, and the single flight of each fetch."""

from __future__ import annotations

from typing import Protocol

import trio

from silofs.blocks import PAGE
from silofs.cache.flight import Flights
from silofs.cache.lru import LRU
from silofs.engine.volume import VolumeState
from silofs.errors import FetchTimeout, PeerUnreachable, ProtocolError, SiloError
from silofs.limits import FETCH_DEADLINE_S, FETCHED_PAGES


class Remote(Protocol):
    """What the migration drivers give to the engine."""

    async def fetch(self, volume: VolumeState, layer_id: int, page: int) -> bytes:
        """The 4096 bytes of a page that `layer_id` has as REMOTE, from the peer that has it. PeerError or Damaged."""

    async def forward_read(self, volume: VolumeState, offset: int, length: int) -> bytes:
        """A read answered by the volume's owner. Raises PeerError."""


class Nobody:
    """The remote of a store that has no peers."""

    async def fetch(self, volume: VolumeState, layer_id: int, page: int) -> bytes:
        raise PeerUnreachable(f"page {page} of {volume.name} is still at a peer, and none is connected")

    async def forward_read(self, volume: VolumeState, offset: int, length: int) -> bytes:
        raise PeerUnreachable(f"{volume.name} is at a peer, and none is connected")


class Box:
    """What one fetch brings."""

    __slots__ = ("came", "data", "error")

    def __init__(self) -> None:
        self.came = trio.Event()
        self.data: bytes | None = None
        self.error: SiloError | None = None


class Fetches:
    """Fetches under way, one for each page however many readers wait, and what they brought lately.

    A fetch runs in the engine's nursery, not in a reader's task: a reader that is interrupted takes nothing away from
    the others. A remote layer's content never changes, so what came may be kept until the store has it.
    """

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.nursery: trio.Nursery | None = None
        self._flights: Flights[tuple[int, int], Box] = Flights(Box)
        self._came: LRU[tuple[int, int], bytes] = LRU(FETCHED_PAGES)
        self.failed = 0

    async def get(self, volume: VolumeState, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """The bytes of (layer, page) pairs, all asked for at once; FetchTimeout when one is not there in time."""
        deadline = trio.current_time() + FETCH_DEADLINE_S
        boxes = {key: self._start(volume, key) for key in wanted}
        found = {}
        for key, box in boxes.items():
            while True:
                with trio.move_on_at(deadline):
                    await box.came.wait()
                if box.data is not None:
                    found[key] = box.data
                    break
                # Who joins a fetch late gets its own deadline, not what is left of the other's.
                if trio.current_time() >= deadline or not isinstance(box.error, FetchTimeout):
                    raise box.error or FetchTimeout(f"page {key[1]} of {volume.name} did not arrive in time")
                box = self._start(volume, key)
        return found

    def _start(self, volume: VolumeState, key: tuple[int, int]) -> Box:
        data = self._came.get(key)
        if data is not None:
            box = Box()
            box.data = data
            box.came.set()
            return box
        flight, leads = self._flights.join(key)
        if leads:
            assert self.nursery is not None, "Engine.run is not running"
            self.nursery.start_soon(self._fetch, volume, key, flight.waiter)
        return flight.waiter

    async def _fetch(self, volume: VolumeState, key: tuple[int, int], box: Box) -> None:
        layer_id, page = key
        try:
            with trio.move_on_after(FETCH_DEADLINE_S):
                data = await self.remote.fetch(volume, layer_id, page)
                if len(data) != PAGE:
                    raise ProtocolError(f"a peer sent {len(data)} bytes for a page")
                box.data = data
                self._came.put(key, data)
        except SiloError as error:
            box.error = error
        finally:
            # Landing and waking in one step: who joins from here on starts anew.
            self._flights.land_key(key)
            if box.data is None:
                self.failed += 1
                box.error = box.error or FetchTimeout(f"page {page} of {volume.name} did not arrive in time")
            box.came.set()

    def statistics(self) -> dict[str, int]:
        return self._flights.statistics() | {"failed": self.failed, "kept": len(self._came)}
