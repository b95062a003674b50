"""Requests that change names or attributes, remembered until their answer is known to have arrived.

A daemon that dies between such a change and its answer leaves the kernel waiting; it sends the request again, to the
next daemon, with a mark. Done twice, it would do harm: a second `unlink` removes whatever has the name by then, a
second truncation what somebody else wrote since. So the transaction that makes the change also stores the request's
number, and what the answer needs; the second coming finds it, and is answered from it.

A number belongs to one mount (the secret of its memfd): a fresh mount drops what it finds of others. A record goes in
the transaction of a later request, once its own was answered; so there are about as many as there are requests at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from silofs.layers import catalog, schema
from silofs.layers.catalog import Record
from silofs.layers.catalog_reader import CatalogReader
from silofs.layers.transaction import WriteTxn


class Done(Record, frozen=True, array_like=True):
    """What became of a request. Key: FUSE's number of it, without the mark of a resent one."""

    mount: int
    call: str  # for those who look at a store: unlink, create …
    volume: bytes = b""  # uuid of what was made or opened


def find(txn: CatalogReader, mount: int, number: int) -> Done | None:
    """What that request of this mount did; None when it did nothing, or its answer is known to have arrived."""
    key = schema.KEY.pack(number)
    value = txn.fetch(schema.REQUEST, key)
    if value is None:
        return None
    done = catalog.decode(schema.REQUEST, key, value, Done)
    return done if done.mount == mount else None


def put(txn: WriteTxn, number: int, done: Done) -> None:
    txn.put_record(schema.REQUEST, schema.KEY.pack(number), done)


def forget(txn: WriteTxn, numbers: Iterable[int]) -> None:
    """Drop the records of these requests; those that have none are none."""
    for number in numbers:
        txn.delete_record(schema.REQUEST, schema.KEY.pack(number))


def remembered(txn: CatalogReader) -> dict[int, Done]:
    """Every record, by number."""
    return {
        schema.KEY.unpack(key)[0]: catalog.decode(schema.REQUEST, key, value, Done)
        for key, value in txn.scan(schema.REQUEST)
    }
