"""Which cells are free, and in what order they are used. What a transaction did to cells counts once it has landed.

A free cell is *solid* while it may have blocks of the file system, *hollow* once it certainly has none. Solid ones are
used first, and of each kind the lowest, so that the file stays as short as what is in it. A cell that a transaction
gave up waits: a reader may still see the state before, and so what is in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.layers.schema import MAP_BYTES, MAP_CELLS, MAP_SHIFT

Bitmap = npt.NDArray[np.uint8]

STRIDE: Final = 1 << 16  # bytes of a bitmap looked at in one go


class _Bits:
    """A set of cell numbers, a bit each."""

    def __init__(self) -> None:
        self._bits: Bitmap = np.zeros(0, np.uint8)
        self._from = 0  # no bit is set in the bytes before it
        self.count = 0

    def extend(self, bitmap: Bitmap) -> None:
        """More cells behind the last one."""
        self._bits = np.concatenate((self._bits, bitmap))
        self.count += int.from_bytes(bitmap.tobytes(), "little").bit_count()

    def put(self, cells: npt.NDArray[np.int64], present: bool) -> None:
        """Add cells that are not in it, or remove cells that are."""
        masks = np.left_shift(np.uint8(1), (cells & 7).astype(np.uint8))
        at = cells >> 3
        if present:
            np.bitwise_or.at(self._bits, at, masks)
            self._from = min(self._from, int(at.min(initial=self._from)))
            self.count += len(cells)
        else:
            np.bitwise_and.at(self._bits, at, ~masks)
            self.count -= len(cells)

    def lowest(self, count: int) -> npt.NDArray[np.int64]:
        """The lowest ones, so many if there are."""
        found: list[npt.NDArray[np.int64]] = []
        left = min(count, self.count)
        for start in range(self._from, len(self._bits), STRIDE):
            if not left:
                break
            some = np.flatnonzero(self._bits[start : start + STRIDE])[:left] + start  # a cell in each at least
            if not found:
                self._from = int(some[0]) if len(some) else start + STRIDE
            if len(some):
                rows, columns = np.nonzero(np.unpackbits(self._bits[some], bitorder="little").reshape(-1, 8))
                found.append(((some[rows] << 3) + columns)[:left])
                left -= len(found[-1])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def runs_from_the_end(self) -> Iterator[tuple[int, int]]:
        """(first, count) of runs, the highest first, each within a stride."""
        for end in range(len(self._bits), 0, -STRIDE):
            start = max(0, end - STRIDE)
            bits = np.unpackbits(self._bits[start:end], bitorder="little")
            edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0))).tolist()
            for first, after in zip(edges[-2::-2], edges[-1::-2], strict=True):
                yield (start << 3) + first, after - first


class CellMap:
    """The free cells of one file. Who takes cells, or gives some back, holds `WritingAhead.lock`."""

    def __init__(self, cells: int, used: Mapping[int, bytes]) -> None:
        """`cells`: that the file has, whole maps of them. `used`: the records, by number; a map without one is free."""
        self._solid, self._hollow = _Bits(), _Bits()
        self._waiting: deque[tuple[int, npt.NDArray[np.int64]]] = deque()
        maps, none = cells >> MAP_SHIFT, bytes(MAP_BYTES)
        self.cells = maps * MAP_CELLS
        self._solid.extend(~np.frombuffer(b"".join(used.get(number, none) for number in range(maps)), np.uint8))
        self._hollow.extend(np.zeros(maps * MAP_BYTES, np.uint8))

    @property
    def free(self) -> int:
        return self._solid.count + self._hollow.count

    @property
    def solid(self) -> int:
        """Free cells that may have blocks."""
        return self._solid.count

    @property
    def waiting(self) -> int:
        """Cells that were given up, and that a reader may still see."""
        return sum(len(cells) for _, cells in self._waiting)

    def grow(self, cells: int) -> None:
        """The file has become longer by whole maps of cells, which have no blocks."""
        self._solid.extend(np.zeros(cells // 8, np.uint8))
        self._hollow.extend(np.full(cells // 8, 0xFF, np.uint8))
        self.cells += cells

    def take(self, count: int, *, hollow: bool) -> list[int]:
        """So many free cells, or as many as there are, ascending as long as they are of one kind.

        `hollow`: whether there is room for the blocks of those that have none.
        """
        cells = self._solid.lowest(count)
        self._solid.put(cells, False)
        if hollow and len(cells) < count:
            more = self._hollow.lowest(count - len(cells))
            self._hollow.put(more, False)
            cells = np.concatenate((cells, more))
        taken: list[int] = cells.tolist()
        return taken

    def undone(self, cells: Iterable[int]) -> None:
        """What a transaction took that did not land."""
        self._solid.put(np.array(list(cells), np.int64), True)

    def given_up(self, txn_id: int, cells: Iterable[int]) -> None:
        """What a transaction gave up that has landed."""
        self._waiting.append((txn_id, np.array(list(cells), np.int64)))

    def withhold(self, txn_id: int) -> None:
        """Somebody may see a state older than that transaction, and so anything in what is free: it waits, too."""
        cells = self._solid.lowest(self._solid.count)
        self._solid.put(cells, False)
        self._waiting.append((txn_id, cells))

    def ripen(self, oldest: int) -> None:
        """Nobody sees what was before transaction `oldest`: what was given up by then is free."""
        while self._waiting and self._waiting[0][0] <= oldest:
            self._solid.put(self._waiting.popleft()[1], True)

    def excess(self, keep: int, runs: int) -> list[tuple[int, int]]:
        """(first, count) of solid cells beyond so many, the highest first, so many runs at most."""
        found: list[tuple[int, int]] = []
        left = self._solid.count - keep
        if left > 0:
            for first, count in islice(self._solid.runs_from_the_end(), runs):
                some = min(count, left)
                found.append((first + count - some, some))
                left -= some
                if not left:
                    break
        return found

    def punched(self, first: int, count: int) -> None:
        """Those solid cells have no blocks any more."""
        cells = np.arange(first, first + count)
        self._solid.put(cells, False)
        self._hollow.put(cells, True)


def changed_map(bitmap: bytes, first: int, used: Iterable[int], free: Iterable[int]) -> tuple[bytes, list[int]]:
    """A map's record with some cells used and some free, and those of `free` that were so. `first`: its first cell."""
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    bits[np.array(list(used), np.int64) - first] = 1
    gone = np.array(list(free), np.int64) - first
    wrong = gone[bits[gone] == 0]
    bits[gone] = 0
    return np.packbits(bits, bitorder="little").tobytes(), (wrong + first).tolist()
