"""Objects put together without holding Python's lock (objects.c), and in Python where that is not built.

The bytes of pages are handed around as a `Source`: one buffer, and where in it each page lies. What a guest wrote is in
the write log's ring already, so a commit passes the ring itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from silofs.blocks import PAGE
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
        return ctypes.CDLL(str(LIBRARY)).silofs_objects
    except OSError:
        return None


_objects = _load()
available = _objects is not None


def build_objects(values: bytearray, first_id: int, source: Source) -> None:
    """Write the objects `first_id`, `first_id` + 1, … to `values`, one after the other, 31 pages of `source` to each.

    `values` has room for them: schema.OBJECT_BYTES each. ValueError when a page does not lie in the source's buffer.
    """
    count = len(source.at)
    assert len(values) >= -(-count // schema.OBJECT_PAGES) * schema.OBJECT_BYTES
    if _objects is None:
        _in_python(values, first_id, source)
        return
    base = np.frombuffer(source.base, np.uint8)
    places = np.ascontiguousarray(source.at, np.int64)
    outside = _objects(
        (ctypes.c_char * len(values)).from_buffer(values),
        ctypes.c_uint64(first_id),
        ctypes.c_void_p(base.ctypes.data),
        ctypes.c_uint64(len(base)),
        ctypes.c_void_p(places.ctypes.data),
        ctypes.c_uint64(count),
    )
    if outside:
        raise ValueError("a page lies outside of its buffer")


def _in_python(values: bytearray, first_id: int, source: Source) -> None:
    for number, first in enumerate(range(0, len(source.at), schema.OBJECT_PAGES)):
        pages = [source.page(index) for index in range(first, min(first + schema.OBJECT_PAGES, len(source.at)))]
        if any(len(page) != PAGE for page in pages):
            raise ValueError("a page lies outside of its buffer")
        header = schema.object_header(first_id + number, schema.page_sums(pages, first_id + number))
        whole = b"".join((header, *pages)).ljust(schema.OBJECT_BYTES, b"\0")
        values[number * schema.OBJECT_BYTES : (number + 1) * schema.OBJECT_BYTES] = whole
