"""Digests of what a chain of layers holds, computed alike at both ends of a migration. Pure.

A segment is a slice of a chain that travels as one layer. Its digest is a tree: page states and bytes make a leaf's,
the leaves make the segment's, and the segments from the bottom make the root. A leaf of holes is left out. A hole is
not a zero page, because what lies below a segment shows through it; where nothing lies below, the caller makes zero
pages holes first. What is skipped in a transfer counts as one segment, flattened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Final

import numpy as np
from blake3 import blake3

from silofs.layers.schema import Buffer, Refs

_U64: Final = Struct("<Q")
_SEGMENT: Final = Struct("<8sQQ")


@dataclass(frozen=True, slots=True)
class Segment:
    """A slice of a chain: what it is at its upper end, and the layers in it, top first."""

    size: int  # bytes
    clip: int  # bytes: what lies below the slice reads as zero beyond it
    layers: tuple[int, ...]


def leaf_digest(leaf: int, states: Refs, pages: Iterable[Buffer]) -> bytes:
    """`states`: 512 of HOLE, ZERO and DATA; `pages`: the bytes of the data pages in order, in buffers of any length."""
    hasher = blake3(_U64.pack(leaf))
    hasher.update(states.astype(np.uint8).tobytes())
    for page in pages:
        hasher.update(page)
    return hasher.digest()


def segment_digest(size: int, clip: int, leaves: Iterable[tuple[int, bytes]]) -> bytes:
    """From (leaf, digest) of every leaf that has one, ascending."""
    hasher = blake3(_SEGMENT.pack(b"silofsSD", size, clip))
    for leaf, digest in leaves:
        hasher.update(_U64.pack(leaf))
        hasher.update(digest)
    return hasher.digest()


def root_digest(segments: Iterable[bytes]) -> bytes:
    """From the digests of the segments, the bottom one first."""
    hasher = blake3(b"silofsRD")
    for digest in segments:
        hasher.update(digest)
    return hasher.digest()
