"""Records of streams whose import was interrupted: for which volume, of which stream, in which layer.

The layer is held by a pin of the record's name until the import is finished, given up, or too old (docs/stream.md).
"""

from __future__ import annotations

import time
from typing import Final

import msgspec

from silofs.blocks import PAGE
from silofs.layers.reader import ReadTxn
from silofs.layers.transaction import WriteTxn
from silofs.limits import STREAM_KEEP_S

TABLE: Final = "host"
PREFIX: Final = "stream:"


class Arriving(msgspec.Struct, frozen=True):
    """What is kept of a stream that has not come to its end. Key: uuid of its content."""

    name: str  # of the volume that it is for
    header: bytes  # of the stream: another one begins anew
    layer: int
    since_ns: int


def key_of(uuid: bytes) -> str:
    """Of the record, and of the pin, by the uuid of the content."""
    return PREFIX + uuid.hex()


def found(txn: ReadTxn) -> dict[str, Arriving]:
    """All of them, by key."""
    values = txn.values(TABLE).items()
    return {key: msgspec.msgpack.decode(data, type=Arriving) for key, data in values if key.startswith(PREFIX)}


def put(txn: WriteTxn, key: str, record: Arriving) -> None:
    txn.put_value(TABLE, key, msgspec.msgpack.encode(record))


def forget(txn: WriteTxn, key: str, layer: int) -> None:
    """The record and its hold on the layer, which goes when nothing else reaches it."""
    txn.delete_value(TABLE, key)
    txn.unpin(layer, key)


def forget_old(txn: WriteTxn) -> None:
    """Drop what nobody came back for."""
    for key, record in found(txn).items():
        if time.time_ns() - record.since_ns > STREAM_KEEP_S * 1e9:
            forget(txn, key, record.layer)


def forget_of(txn: WriteTxn, name: str) -> int:
    """Drop what is kept for a volume; the bytes that were stored for it."""
    stored = 0
    for key, record in found(txn).items():
        if record.name == name:
            stored += txn.layer(record.layer).own_pages * PAGE
            forget(txn, key, record.layer)
    return stored
