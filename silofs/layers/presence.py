"""Bitmaps that say which leaves, and which chunks of leaves, a layer has. Pure.

A page that is not in a layer falls through to its parent, so "not found" must be provable: a leaf whose bit is set
and whose record is missing is damage. The layer's own record says in the same way which bitmaps exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from silofs.layers.schema import CHUNK_SHIFT


def has(bitmap: bytes | bytearray, index: int) -> bool:
    byte = index >> 3
    return byte < len(bitmap) and bool(bitmap[byte] >> (index & 7) & 1)


def with_bit(bitmap: bytes, index: int, value: bool) -> bytes:
    """A copy with one bit changed; without trailing zero bytes."""
    byte = index >> 3
    changed = bytearray(bitmap)
    if byte >= len(changed):
        changed.extend(bytes(byte + 1 - len(changed)))
    if value:
        changed[byte] |= 1 << (index & 7)
    else:
        changed[byte] &= ~(1 << (index & 7)) & 0xFF
    return bytes(changed).rstrip(b"\0")


def bits(bitmap: bytes | bytearray, first: int = 0, end: int | None = None) -> list[int]:
    """The numbers of the set bits in [first, end), ascending."""
    found = np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little"))
    if first:
        found = found[found >= first]
    if end is not None:
        found = found[found < end]
    return found.tolist()


def chunks_between(chunks: bytes, first_leaf: int, end_leaf: int | None) -> Iterator[tuple[int, int, int | None]]:
    """(chunk, first, end) of the existing chunks that a range of leaves touches; first and end count in the chunk."""
    first_chunk = first_leaf >> CHUNK_SHIFT
    end_chunk = None if end_leaf is None else ((end_leaf - 1) >> CHUNK_SHIFT) + 1
    for chunk in bits(chunks, first_chunk, end_chunk):
        start = chunk << CHUNK_SHIFT
        yield chunk, max(0, first_leaf - start), None if end_leaf is None else end_leaf - start
