"""The records of who refers to a container, and how often (docs/format.md, "Containers"). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.errors import Damaged
from silofs.layers import schema
from silofs.layers.containers import BLOCK_SHIFT, SLOTS
from silofs.layers.schema import Buffer
from silofs.limits import CONTAINER_LEAVES_MAX, CONTAINER_REFS_MAX

Counts = npt.NDArray[np.int64]
USER: Final = Struct(">QQQ")  # key: container, layer, leaf
USER_COUNT: Final = Struct("<H")
USE_HEAD: Final = Struct("<II")  # leaves, pages
_COUNTS: Final = np.dtype("<u2")


@dataclass
class Use:
    """How many leaf entries refer to each slot of a container, and in how many leaves they are; the pages it holds."""

    leaves: int
    pages: int
    counts: Counts

    def offered(self, number: int) -> bool:
        """Whether more leaves may refer to a block of it: with very many, moving its pages would be no bounded step."""
        most = self.counts[number << BLOCK_SHIFT : (number + 1) << BLOCK_SHIFT].max()
        return self.leaves < CONTAINER_LEAVES_MAX and int(most) < CONTAINER_REFS_MAX

    def payload(self) -> bytes:
        return USE_HEAD.pack(self.leaves, self.pages) + self.counts.astype(_COUNTS).tobytes()


def referred(counts: Counts, number: int) -> int:
    """The pages of a block that anything refers to, as a mask."""
    live = counts[number << BLOCK_SHIFT : (number + 1) << BLOCK_SHIFT] > 0
    return int(np.packbits(live, bitorder="little").view("<u2")[0])


def read_use(key: bytes, value: Buffer | None) -> Use:
    """A container's record; Damaged when it is missing or not sound."""
    if value is None:
        raise Damaged(f"container {schema.KEY.unpack(key)[0]} has no record of its use")
    payload = schema.open_record(schema.USE, key, value)
    if len(payload) != USE_HEAD.size + SLOTS * _COUNTS.itemsize:
        raise Damaged(f"use {key.hex()} has a wrong length")
    counts = np.frombuffer(payload, _COUNTS, offset=USE_HEAD.size)
    leaves, pages = USE_HEAD.unpack_from(payload)
    return Use(leaves, pages, counts.astype(np.int64))


def read_user(key: bytes, value: Buffer) -> int:
    """How many entries of a leaf refer to a container."""
    return int(USER_COUNT.unpack(schema.open_record(schema.USER, key, value))[0])
