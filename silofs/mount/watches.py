"""What the holder waits for: descriptors that become readable, each with what is to be done then. poll(2)."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator

Then = Callable[[], None]


class Watches:
    """Descriptors by number; the callers close them."""

    def __init__(self) -> None:
        self._poller = select.poll()
        self._then: dict[int, Then] = {}

    def add(self, fd: int, then: Then) -> None:
        self._then[fd] = then
        self._poller.register(fd, select.POLLIN)

    def remove(self, fd: int) -> None:
        """Nothing if it is not watched."""
        if self._then.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def remove_closed(self, fd: int) -> None:
        """Watch it no longer if its other end is closed: it would be readable for ever."""
        poller = select.poll()
        poller.register(fd, 0)
        if fd in self._then and any(events & select.POLLHUP for _fd, events in poller.poll(0)):
            self.remove(fd)

    def wait(self, timeout_s: float | None) -> Iterator[Then]:
        """What is to be done now. Returns when something is readable, or the time is over."""
        ready = [
            (fd, self._then.get(fd)) for fd, _ in self._poller.poll(None if timeout_s is None else timeout_s * 1000)
        ]
        for fd, then in ready:
            # What was done for another may have closed it, and its number may be another descriptor's by now.
            if then is not None and self._then.get(fd) is then:
                yield then
