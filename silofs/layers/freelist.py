"""LMDB's list of free pages, read out of its file: what later transactions can write to without growing it.

LMDB tells nobody, so the tree that it keeps the list in is walked here, with plain reads. Only right after a commit, on
the thread that writes: then the newest header page and all that it leads to stay as they are. Layouts are those of
engine 0.9 with 4 KiB pages (struct MDB_meta, MDB_page and MDB_node in its mdb.c).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.blocks import PAGE

Pages = npt.NDArray[np.uint64]

_META: Final = Struct("<16x4s20x40xQ48xQQ")  # magic, root of the list's tree, last page, transaction
_META_MAGIC: Final = b"\xde\xc0\xef\xbe"
_PAGE: Final = Struct("<QHHHH")  # its number, -, kind, end of the node offsets, -
_NODE: Final = Struct("<HHHH")  # low and high half of a size, flags, length of the key
_BRANCH: Final = 1
_LEAF: Final = 2
_ELSEWHERE: Final = 1  # flag of a node: its value is in pages of its own
_NONE: Final = (1 << 64) - 1
_DEPTH_MAX: Final = 32


def free_pages(data_file: Path, oldest: int) -> Pages:
    """The pages, ascending, that the next transaction may use while some reader still sees transaction `oldest`.

    What the newest transaction freed is not among them. Nothing when the file does not look as it should: this is asked
    to find room, and none is found then.
    """
    with data_file.open("rb") as file:
        fd = file.fileno()
        metas = [_META.unpack_from(os.pread(fd, _META.size, at)) for at in (0, PAGE)]
        magic, root, _, newest = max(metas, key=lambda meta: meta[3])
        lists: list[Pages] = []
        try:
            if magic == _META_MAGIC and root != _NONE:
                lists = [pages for freed, pages in _records(fd, root, _DEPTH_MAX) if freed < min(newest, oldest)]
        except (ValueError, IndexError):
            lists = []
    return np.sort(np.concatenate(lists)) if lists else np.zeros(0, np.uint64)


def _records(fd: int, number: int, depth: int) -> Iterator[tuple[int, Pages]]:
    """(transaction, pages that it freed) of the tree below a page."""
    raw = os.pread(fd, PAGE, number * PAGE)
    stored, _, kind, lower, _ = _PAGE.unpack_from(raw)
    if stored != number or not depth:
        raise ValueError(number)
    for at in np.frombuffer(raw, "<u2", (lower - _PAGE.size) // 2, _PAGE.size).tolist():
        low, high, flags, key_bytes = _NODE.unpack_from(raw, at)
        if kind == _BRANCH:
            yield from _records(fd, low | high << 16 | flags << 32, depth - 1)
        elif kind == _LEAF and key_bytes == 8:
            key_at = at + _NODE.size
            size, data_at = low | high << 16, key_at + key_bytes
            data = raw[data_at : data_at + size]
            if flags & _ELSEWHERE:
                (page,) = np.frombuffer(raw, "<u8", 1, data_at).tolist()
                data = os.pread(fd, size, page * PAGE + _PAGE.size)
            words = np.frombuffer(data, "<u8")
            yield int.from_bytes(raw[key_at:data_at], "little"), words[1 : int(words[0]) + 1]
        else:
            raise ValueError(kind)


def in_runs(pages: Pages, length: int) -> int:
    """How many of the pages (ascending) lie in whole runs of `length` consecutive ones."""
    if not len(pages):
        return 0
    edges = np.flatnonzero(np.diff(pages) != 1) + 1
    runs = np.diff(np.concatenate(([0], edges, [len(pages)])))
    return int((runs // length).sum()) * length
