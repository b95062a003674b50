"""Records of `silofs freeze`: who holds a volume's mutations, and until when. docs/freeze.md has the rules.

A record is in the store's `host` table, so that every verb sees it in its own transaction and the next daemon finds it.
Times are by the wall clock there, since nothing else outlives the host; a daemon that runs counts its own time.
"""

from __future__ import annotations

import time
from typing import Any, Final
from uuid import UUID

import msgspec

from silofs.errors import Busy
from silofs.layers.catalog import Volume
from silofs.layers.reader import ReadTxn
from silofs.layers.transaction import WriteTxn
from silofs.times import rfc3339

TABLE: Final = "host"
PREFIX: Final = "freeze:"


class Freeze(msgspec.Struct, frozen=True):
    """One freeze in force."""

    uuid: str  # of the volume
    name: str  # of the volume, when it was frozen
    owner: str  # what the caller calls itself; the command that ran silofs if it said nothing
    reason: str
    pid: int  # of that command
    uid: int  # whose it is, as the kernel told
    since_ns: int
    until_ns: int

    @property
    def holder(self) -> str:
        return f"{self.owner} (process {self.pid}, uid {self.uid})" + (f": {self.reason}" if self.reason else "")

    def left_s(self, now_ns: int) -> float:
        """Seconds until its end; 0 when it is over, and when the clock was set back to before its beginning."""
        return max(0, self.until_ns - now_ns) / 1e9 if now_ns >= self.since_ns else 0.0

    def fields(self) -> dict[str, Any]:
        """As `info`, `freeze` and `status` show it."""
        times = {"since": rfc3339(self.since_ns), "until": rfc3339(self.until_ns)}
        return {"owner": self.owner, "reason": self.reason, "pid": self.pid, "uid": self.uid, **times}


def found(txn: ReadTxn, uuid: bytes) -> Freeze | None:
    """The freeze of a volume, if there is one and it is not over."""
    data = txn.value(TABLE, PREFIX + str(UUID(bytes=uuid)))
    freeze = None if data is None else msgspec.json.decode(data, type=Freeze)
    return freeze if freeze is not None and freeze.left_s(time.time_ns()) else None


def recorded(txn: ReadTxn) -> list[Freeze]:
    """All records, also of freezes that are over."""
    values = txn.values(TABLE)
    return [msgspec.json.decode(data, type=Freeze) for key, data in values.items() if key.startswith(PREFIX)]


def put(txn: WriteTxn, freeze: Freeze) -> None:
    txn.put_value(TABLE, PREFIX + freeze.uuid, msgspec.json.encode(freeze))


def remove(txn: WriteTxn, uuid: bytes) -> None:
    txn.delete_value(TABLE, PREFIX + str(UUID(bytes=uuid)))


def check(txn: ReadTxn, volume: Volume, what: str) -> None:
    """Raises Busy while somebody holds the volume."""
    freeze = found(txn, volume.uuid)
    if freeze is not None:
        until = freeze.fields()["until"]
        raise Busy(
            f"{volume.name} is frozen by {freeze.holder}, until {until}: {what} is refused",
            hint=f"silofs thaw {volume.name} ends that",
        )
