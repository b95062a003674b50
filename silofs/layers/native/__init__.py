"""Objects put together and written without holding Python's lock (objects.c), and in Python where that is not built.

The bytes of pages are handed around as a `Source`: one buffer, and where in it each page lies. What a guest wrote is in
the write log's ring already, so a commit passes the ring itself.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from silofs.blocks import PAGE, ZERO_PAGE
from silofs.layers import schema
from silofs.layers.schema import Buffer

LIBRARY = Path(__file__).with_name("objects.so")

Places = npt.NDArray[np.int64]


class Source(NamedTuple):
    """Bytes of pages: page i is `base[at[i] : at[i] + 4096]`."""

    base: Buffer
    at: Places

    @classmethod
    def of(cls, data: Sequence[Buffer]) -> Source:
        """Of pages that lie apart; copies them."""
        return cls(b"".join(data), np.arange(0, len(data) * PAGE, PAGE, dtype=np.int64))

    def page(self, index: int) -> memoryview:
        at = int(self.at[index])
        return memoryview(self.base)[at : at + PAGE]


def _load() -> Any:
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None


_library = _load()
available = _library is not None


def build_objects(values: bytearray, first_id: int, source: Source) -> None:
    """Write the objects `first_id`, `first_id` + 1, … to `values`, one after the other, 31 pages of `source` to each.

    `values` has room for them: schema.OBJECT_BYTES each. ValueError when a page does not lie in the source's buffer.
    """
    count = len(source.at)
    assert len(values) >= -(-count // schema.OBJECT_PAGES) * schema.OBJECT_BYTES
    if _library is None:
        _in_python(values, first_id, source)
        return
    outside = _library.silofs_objects(
        (ctypes.c_char * len(values)).from_buffer(values), ctypes.c_uint64(first_id), *_pages(source)
    )
    if outside:
        raise ValueError("a page lies outside of its buffer")


def write_cells(fd: int, first_id: int, source: Source, cells: Sequence[int]) -> None:
    """Write the objects `first_id`, `first_id` + 1, … to cells of a file, 31 pages of `source` to each. Not durable.

    ValueError when a page does not lie in the source's buffer. OSError; what is in the cells then is not known.
    """
    assert len(cells) == -(-len(source.at) // schema.OBJECT_PAGES)
    if _library is None:
        _cells_in_python(fd, first_id, source, cells)
        return
    places = np.array(cells, np.uint64)
    error = _library.silofs_cells(
        fd, ctypes.c_uint64(first_id), *_pages(source), ctypes.c_void_p(places.ctypes.data)
    )
    if error < 0:
        raise ValueError("a page lies outside of its buffer")
    if error:
        raise OSError(error, os.strerror(error))


def zero_pages(source: Source) -> npt.NDArray[np.bool_]:
    """Which pages are all zeros. ValueError when one does not lie in the source's buffer."""
    zero = np.zeros(len(source.at), np.bool_)
    if _library is None:
        for index in range(len(zero)):
            page = source.page(index)
            if len(page) != PAGE:
                raise ValueError("a page lies outside of its buffer")
            zero[index] = page == ZERO_PAGE
    elif _library.silofs_zeros(*_pages(source), zero.ctypes.data_as(ctypes.c_void_p)):
        raise ValueError("a page lies outside of its buffer")
    return zero


def touch(address: int, length: int) -> None:
    """Read a byte of every page there, without Python's lock where that can be: the disk may have to be waited for."""
    if _library is None:
        ctypes.string_at(address, length)
    else:
        _library.silofs_touch(ctypes.c_void_p(address), ctypes.c_uint64(length))


def _pages(source: Source) -> tuple[Any, ...]:
    """A source as arguments: its buffer, the buffer's length, where pages lie, how many."""
    base = np.frombuffer(source.base, np.uint8)
    places = np.ascontiguousarray(source.at, np.int64)
    return (
        base.ctypes.data_as(ctypes.c_void_p),  # which keep what they point to
        ctypes.c_uint64(len(base)),
        places.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_uint64(len(places)),
    )


def _in_python(values: bytearray, first_id: int, source: Source) -> None:
    for number, first in enumerate(range(0, len(source.at), schema.OBJECT_PAGES)):
        pages = [source.page(index) for index in range(first, min(first + schema.OBJECT_PAGES, len(source.at)))]
        if any(len(page) != PAGE for page in pages):
            raise ValueError("a page lies outside of its buffer")
        header = schema.object_header(first_id + number, schema.page_sums(pages, first_id + number))
        whole = b"".join((header, *pages)).ljust(schema.OBJECT_BYTES, b"\0")
        values[number * schema.OBJECT_BYTES : (number + 1) * schema.OBJECT_BYTES] = whole


def _cells_in_python(fd: int, first_id: int, source: Source, cells: Sequence[int]) -> None:
    value = bytearray(schema.OBJECT_BYTES)
    for number, cell in enumerate(cells):
        first = number * schema.OBJECT_PAGES
        pages = source.at[first : first + schema.OBJECT_PAGES]
        build_objects(value, first_id + number, Source(source.base, pages))
        left = memoryview(bytes(schema.CELL_PAD) + value)
        at = cell * schema.CELL_BYTES
        while left:
            written = os.pwrite(fd, left, at)
            left, at = left[written:], at + written
