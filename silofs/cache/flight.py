"""Single flight: one piece of work for all who want the same thing at one time. Pure: the caller brings the waiting.

`join` says whether the caller leads (and must `land` the flight, whatever happens) or follows. A flight that was made
*stale* while it was up brings what was true before something changed: who gets it must not keep it, and asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
W = TypeVar("W")


class Flight(Generic[W]):
    """One piece of work under way. `waiter` is whatever the caller waits on (an event, a box for the result)."""

    __slots__ = ("followers", "stale", "waiter")

    def __init__(self, waiter: W) -> None:
        self.waiter = waiter
        self.stale = False
        self.followers = 0


class Flights(Generic[K, W]):
    """Flights by key."""

    __slots__ = ("_make", "_up", "joined", "started")

    def __init__(self, make: Callable[[], W]) -> None:
        self._make = make
        self._up: dict[K, Flight[W]] = {}
        self.started = 0
        self.joined = 0

    def join(self, key: K) -> tuple[Flight[W], bool]:
        """(the flight, whether the caller leads it)."""
        flight = self._up.get(key)
        if flight is not None:
            flight.followers += 1
            self.joined += 1
            return flight, False
        flight = self._up[key] = Flight(self._make())
        self.started += 1
        return flight, True

    def land(self, key: K, flight: Flight[W]) -> None:
        """The work is over, well or not: the next `join` starts anew."""
        if self._up.get(key) is flight:
            del self._up[key]

    def land_key(self, key: K) -> None:
        """As `land`, for flights that are never spoilt."""
        self._up.pop(key, None)

    def spoil(self, key: K) -> None:
        """What the flight of `key` brings is no longer true; who joins from now on starts a new one."""
        flight = self._up.pop(key, None)
        if flight is not None:
            flight.stale = True

    def __iter__(self) -> Iterator[K]:
        """The keys of what is up."""
        return iter(tuple(self._up))

    def spoil_all(self) -> None:
        for flight in self._up.values():
            flight.stale = True
        self._up.clear()

    def __bool__(self) -> bool:
        return bool(self._up)

    def __len__(self) -> int:
        return len(self._up)

    def statistics(self) -> dict[str, int]:
        return {"up": len(self._up), "started": self.started, "joined": self.joined}
