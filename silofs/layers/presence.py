"""Bitmaps that say which leaves a layer has, and the list of bitmaps that its own record keeps. Pure.

A page that is not in a layer falls through to its parent, so "not found" must be provable: a leaf whose bit is set
and whose record is missing is damage. The layer's record says in the same way which bitmaps exist, and with a short
checksum of each that it is the newest one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from silofs.layers.schema import CHUNK_SHIFT


def has(bitmap: bytes | bytearray, index: int) -> bool:
    return bool(bitmap[index >> 3] >> (index & 7) & 1)


def bits(bitmap: bytes | bytearray, first: int = 0, end: int | None = None) -> list[int]:
    """The numbers of the set bits in [first, end), ascending."""
    return _between(np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")), first, end)


def _between(found: np.ndarray[tuple[int], np.dtype[np.intp]], first: int, end: int | None) -> list[int]:
    if first:
        found = found[found >= first]
    if end is not None:
        found = found[found < end]
    return found.tolist()


# The list of chunks in a layer's record: a u32 each


def chunk_sum(chunks: bytes, chunk: int) -> int:
    """The short checksum of a chunk's record, 0 when there is no such chunk."""
    return int.from_bytes(chunks[4 * chunk : 4 * chunk + 4], "little")


def with_chunk(chunks: bytes, chunk: int, value: int) -> bytes:
    """The list with one sum changed."""
    words = bytearray(chunks.ljust(4 * chunk + 4, b"\0"))
    words[4 * chunk : 4 * chunk + 4] = value.to_bytes(4, "little")
    while words and not any(words[-4:]):
        del words[-4:]
    return bytes(words)


def chunk_numbers(chunks: bytes, first: int = 0, end: int | None = None) -> list[int]:
    """The chunks that exist, in [first, end), ascending."""
    return _between(np.flatnonzero(np.frombuffer(chunks, "<u4")), first, end)


def chunks_between(chunks: bytes, first_leaf: int, end_leaf: int | None) -> Iterator[tuple[int, int, int | None]]:
    """(chunk, first, end) of the existing chunks that a range of leaves touches; first and end count in the chunk."""
    first_chunk = first_leaf >> CHUNK_SHIFT
    end_chunk = None if end_leaf is None else ((end_leaf - 1) >> CHUNK_SHIFT) + 1
    for chunk in chunk_numbers(chunks, first_chunk, end_chunk):
        start = chunk << CHUNK_SHIFT
        yield chunk, max(0, first_leaf - start), None if end_leaf is None else end_leaf - start
