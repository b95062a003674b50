"""Space of the store that is set aside for writes before they are acknowledged (docs/write-path.md, "Space").

A write is admitted on credit, so that most of them cost a comparison; what is claimed ahead is given back when nothing
more is written. What a cut has claimed is its own until it has landed.
"""

from __future__ import annotations

from silofs.layers.held import Held
from silofs.limits import ADMIT_BYTES


class Claims:
    """Of the writes that are pending. `credit` is what the hot path of writes looks at, and takes from."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.credit = 0  # claimed and not used yet, in bytes of the worst case
        self._claimed = 0  # for what is pending, `credit` included

    def admits(self, cost: int) -> bool:
        """Have credit for so many bytes, if the space can be had."""
        if cost <= self.credit:
            return True
        # Near the end every write asks for itself.
        for ahead in (max(cost, ADMIT_BYTES), cost):
            if self._held.claim(ahead):
                self._claimed += ahead
                self.credit += ahead
                return True
        return False

    def cut(self) -> int:
        """What the writes so far have claimed, for `landed`."""
        used = self._claimed - self.credit
        self._claimed = self.credit
        return used

    def landed(self, used: int) -> None:
        """What a cut has claimed is not needed any more."""
        self._held.let_go(used)

    def give_back(self) -> None:
        """Claim nothing ahead: there may be no next write."""
        self._held.let_go(self.credit)
        self._claimed -= self.credit
        self.credit = 0
