"""LMDB's trees, read with pread(2): which page of the file a key needs, and which pages the medium cannot give.

A read through the map ends the process when a page cannot be had; a plain read says EIO. Only the newest state is
walked, by the header page with the higher transaction. Layouts are those of engine 0.9 with 4 KiB pages (struct
MDB_meta, MDB_page, MDB_node and MDB_db in its mdb.c); keys are compared as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from silofs.blocks import PAGE

FREE: Final = ""  # in place of a table's name: the list of free pages
MAIN: Final = "main"  # the tree that leads to all tables

_META: Final = Struct("<16xII16x40xQ40xQQQ")  # magic, version, roots of free list and main tree, last page, transaction
_MAGIC: Final = 0xBEEFC0DE, 1
_LAST_MAX: Final = 1 << 48  # of the numbers of pages that a node can hold
_PAGE: Final = Struct("<QHHHH")  # its number, -, kind, end of the node offsets, -
_NODE: Final = Struct("<HHHH")  # low and high half of a size, flags, length of the key
_OVERFLOW_PAGES: Final = Struct("<12xI")
_ROOT_AT: Final = 40  # of the root's number in a tree's record of 48 bytes
_BRANCH, _LEAF = 1, 2
_ELSEWHERE: Final = 1  # flags of a node: its value is in pages of its own
_NONE: Final = (1 << 64) - 1
_NO_HEADER: Final = *_MAGIC, _NONE, _NONE, 0, 0
_DEPTH_MAX: Final = 32


class Unreadable(NamedTuple):
    """A page that cannot be read, and the keys of a table for which it is needed: from `low` up to, not with, `high`.

    `high` is None when there is none above. The page is one of LMDB's file, or of the file of cells (`in_cells`).
    """

    table: str
    low: bytes
    high: bytes | None
    page: int
    in_cells: bool = False


class _Node(NamedTuple):
    key: bytes
    child: int  # of a branch
    value: bytes  # of a leaf; of one with pages of its own the number of the first
    elsewhere: bool
    size: int  # of a leaf's value


class RawTree:
    """One data file, open for reading. A context manager."""

    def __init__(self, data_file: Path) -> None:
        """OSError when the headers cannot be read. The newest that makes sense counts; without one there are no trees.

        `headers` says how many make sense; `newest_known`, whether the state that is shown is certainly the newest.
        """
        self._fd = os.open(data_file, os.O_RDONLY | os.O_CLOEXEC)
        metas = [_META.unpack(os.pread(self._fd, _META.size, at).ljust(_META.size, b"\0")) for at in (0, PAGE)]
        sound = [meta for number, meta in enumerate(metas) if self._is_header(number, meta)]
        *_, self._free, self._main, self._last, self.state = max(sound or [_NO_HEADER], key=lambda meta: meta[-1])
        self.headers = len(sound)
        # Each commit writes the header that is not the newest, and counts one on; a new file has two zeros.
        first, second = metas[0][-1], metas[1][-1]
        self.newest_known = len(sound) == len(metas) and (abs(first - second) == 1 or first == second == 0)

    def _is_header(self, number: int, meta: tuple[int, ...]) -> bool:
        """Whether a header page is one, and leads to trees. Nothing of LMDB's has a checksum."""
        magic, version, free, main, last, state = meta
        if (magic, version) != _MAGIC or last >= _LAST_MAX or (state and state & 1 != number):
            return False
        self._last = last  # what `page` goes by
        return all(root == _NONE or self._is_tree(root) for root in (free, main))

    def _is_tree(self, number: int) -> bool:
        raw = self.page(number)
        return raw is None or (_PAGE.unpack_from(raw)[0] == number and _parse(raw)[0] != 0)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> RawTree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def page(self, number: int) -> bytes | None:
        """A page, None when it cannot be read. One that the file does not have is of zeros: nothing leads there."""
        if number > self._last:
            return bytes(PAGE)
        try:
            raw = os.pread(self._fd, PAGE, number * PAGE)
        except OSError:
            return None
        return raw if len(raw) == PAGE else None

    def on_the_way(self, table: str, key: bytes) -> Iterator[Unreadable]:
        """What cannot be read of what a look-up of `key` needs: one of the tree's pages, or some of a value's."""
        number, found = self._root(table)
        yield from found
        low, high = b"", None
        for _ in range(_DEPTH_MAX):
            if number == _NONE:
                return
            raw = self.page(number)
            if raw is None:
                yield Unreadable(table, low, high, number)
                return
            kind, nodes = _parse(raw)
            if kind == _BRANCH:
                at = max([index for index, node in enumerate(nodes) if not index or node.key <= key])
                low = nodes[at].key if at else low
                high = nodes[at + 1].key if at + 1 < len(nodes) else high
                number = nodes[at].child
                continue
            for node in nodes:
                if node.key == key and node.elsewhere:
                    yield from self._value(table, node)
            return

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value of a record, not verified; None when there is none, or it cannot be had."""
        number, _ = self._root(table)
        for _ in range(_DEPTH_MAX):
            raw = self.page(number) if number != _NONE else None
            kind, nodes = _parse(raw) if raw is not None else (0, [])
            if kind != _BRANCH:
                found = next((node for node in nodes if node.key == key), None)
                return None if found is None else self._whole(found) if found.elsewhere else found.value
            number = max((index, node.child) for index, node in enumerate(nodes) if not index or node.key <= key)[1]
        return None

    def all_of(self, table: str) -> Iterator[Unreadable]:
        """Every page of a table's tree that cannot be read, values in pages of their own not looked at."""
        number, found = self._root(table)
        yield from found
        yield from self._below(table, number, b"", None, _DEPTH_MAX)

    def after(self, table: str, key: bytes) -> Iterator[Unreadable]:
        """What cannot be read of the values of the first two keys from `key` on."""
        number, _ = self._root(table)
        seen = 0
        for _, nodes in self._leaves(number, _DEPTH_MAX):
            for node in nodes:
                if node.key >= key and seen < 2:
                    seen += 1
                    yield from self._value(table, node) if node.elsewhere else ()
            if seen == 2:
                return

    def records(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of every record of a table that can be had, in the tree's order; nothing of it is verified."""
        number, _ = self._root(table)
        for _, nodes in self._leaves(number, _DEPTH_MAX):
            for node in nodes:
                yield node.key, self._whole(node) if node.elsewhere else node.value

    def _whole(self, node: _Node) -> bytes:
        """A value in pages of its own; zeros for those that cannot be read: they are not what the checksum was of."""
        first = int.from_bytes(node.value[:8], "little")
        if first > self._last:
            return b""
        try:
            raw = os.pread(self._fd, node.size, first * PAGE + _PAGE.size)
        except OSError:
            raw = b""
        if len(raw) < node.size:
            count = -(-(_PAGE.size + node.size) // PAGE)
            raw = b"".join(self.page(number) or bytes(PAGE) for number in range(first, first + count))
            raw = raw[_PAGE.size : _PAGE.size + node.size]
        return raw

    def _root(self, table: str) -> tuple[int, list[Unreadable]]:
        """The root of a table's tree, _NONE if it has none; what could not be read on the way to it."""
        if table in (FREE, MAIN):
            return (self._free if table == FREE else self._main), []
        found = list(self.all_of(MAIN))
        if not found:
            for _, nodes in self._leaves(self._main, _DEPTH_MAX):
                for node in nodes:
                    if node.key == table.encode() and len(node.value) >= _ROOT_AT + 8:
                        return int.from_bytes(node.value[_ROOT_AT : _ROOT_AT + 8], "little"), []
        return _NONE, found

    def _leaves(self, number: int, depth: int) -> Iterator[tuple[int, list[_Node]]]:
        raw = self.page(number) if number != _NONE and depth else None
        if raw is None:
            return
        kind, nodes = _parse(raw)
        if kind == _LEAF:
            yield number, nodes
        for node in nodes if kind == _BRANCH else ():
            yield from self._leaves(node.child, depth - 1)

    def _below(self, table: str, number: int, low: bytes, high: bytes | None, depth: int) -> Iterator[Unreadable]:
        if number == _NONE or not depth:
            return
        raw = self.page(number)
        if raw is None:
            yield Unreadable(table, low, high, number)
            return
        kind, nodes = _parse(raw)
        for index, node in enumerate(nodes if kind == _BRANCH else ()):
            above = nodes[index + 1].key if index + 1 < len(nodes) else high
            yield from self._below(table, node.child, node.key if index else low, above, depth - 1)

    def _value(self, table: str, node: _Node) -> Iterator[Unreadable]:
        first = int.from_bytes(node.value[:8], "little")
        raw = self.page(first)
        count = 1 if raw is None else _OVERFLOW_PAGES.unpack_from(raw)[0]
        for number in range(first, first + count):
            if self.page(number) is None:
                yield Unreadable(table, node.key, node.key + b"\0", number)


def _parse(raw: bytes) -> tuple[int, list[_Node]]:
    """(kind, nodes) of a page; no nodes where there are none that make sense."""
    _, _, kind, lower, _ = _PAGE.unpack_from(raw)
    nodes = []
    for at in range(_PAGE.size, min(lower, PAGE - 1), 2):
        place = int.from_bytes(raw[at : at + 2], "little")
        if place + _NODE.size > PAGE:
            return 0, []
        low, high, flags, length = _NODE.unpack_from(raw, place)
        start = place + _NODE.size
        key, value_at = raw[start : start + length], start + length
        elsewhere = kind == _LEAF and bool(flags & _ELSEWHERE)
        value = raw[value_at : value_at + (8 if elsewhere else low | high << 16)] if kind == _LEAF else b""
        nodes.append(_Node(key, low | high << 16 | flags << 32, value, elsewhere, low | high << 16))
    return (kind & (_BRANCH | _LEAF) if nodes else 0), nodes
