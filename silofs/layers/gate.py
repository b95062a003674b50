"""Lets the writer have the map for itself for a moment: LMDB can make it larger only while nobody reads.

A reader that is renewed passes through the gate, so readers that are renewed now and then need not be closed for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Counts read transactions; any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._shut = False
        self.inside = 0

    def enter(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._shut)
            self.inside += 1

    def leave(self) -> None:
        with self._condition:
            self.inside -= 1
            self._condition.notify_all()

    @contextmanager
    def empty(self, timeout: float) -> Iterator[bool]:
        """Let nobody in, and wait for those inside to leave; whether they all did in time."""
        with self._condition:
            self._shut = True
            alone = self._condition.wait_for(lambda: not self.inside, timeout)
        try:
            yield alone
        finally:
            with self._condition:
                self._shut = False
                self._condition.notify_all()
