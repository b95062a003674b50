"""The file of cells, read with pread(2): what the medium cannot give is said, where the map would end the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from silofs.blocks import PAGE
from silofs.layers.cells import FILE
from silofs.layers.schema import CELL_BYTES, CELL_PAD

CELL_PAGES: Final = CELL_BYTES // PAGE


class RawCells:
    """The file beside one data file, as long as it was when it was opened; one that is missing has no cells.

    A context manager.
    """

    def __init__(self, data_file: Path) -> None:
        """OSError when it is there and cannot be opened."""
        self.path = data_file.with_name(FILE)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd = -1
        self.size = os.fstat(self._fd).st_size if self._fd >= 0 else 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RawCells:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def exists(self) -> bool:
        return self._fd >= 0

    @property
    def cells(self) -> int:
        """How many the file has, whole ones."""
        return self.size // CELL_BYTES

    def page(self, number: int) -> bytes | None:
        """A page, None when it cannot be read, or the file ends before it does."""
        raw = self._read(number * PAGE, PAGE)
        return raw if raw is not None and len(raw) == PAGE else None

    def unreadable(self, cell: int) -> list[int]:
        """The numbers of the pages of a cell that cannot be read."""
        raw = self._read(cell * CELL_BYTES, CELL_BYTES)
        if raw is not None and len(raw) == CELL_BYTES:
            return []
        first = cell * CELL_PAGES
        return [number for number in range(first, first + CELL_PAGES) if self.page(number) is None]

    def object(self, cell: int) -> bytes:
        """What is in a cell, not verified; zeros for pages that cannot be read: the checksum was of others."""
        raw = self._read(cell * CELL_BYTES, CELL_BYTES)
        if raw is None or len(raw) < CELL_BYTES:
            first = cell * CELL_PAGES
            raw = b"".join(self.page(number) or bytes(PAGE) for number in range(first, first + CELL_PAGES))
        return raw[CELL_PAD:]

    def _read(self, at: int, length: int) -> bytes | None:
        if self._fd < 0:
            return None
        try:
            return os.pread(self._fd, length, at)
        except (OSError, OverflowError):  # the number of a cell may be anything
            return None
