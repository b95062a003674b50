"""The paired peers, as the store keeps them (table `peer`, one record per store id).

A record is msgpack of `Peer` as an array: fields are only ever appended, with defaults. The book holds all of them in
memory; a change is durable before it is visible. Names are local: what a peer calls itself is a suggestion, made
unique here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec
import trio
from msgspec.structs import replace

from silofs.errors import Busy, NoSuchThing
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import NAME
from silofs.peers.authorise import RULES_MAX, Rule, rule
from silofs.peers.identity import fingerprint_of, store_id_of

TABLE = "peer"
NAME_CHARS_MAX = 100  # of a suggestion, so that a suffix fits
T = TypeVar("T")


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """One paired store."""

    certificate: bytes  # DER
    name: str
    address: str = ""  # HOST:PORT where it listens; "" if it must call us
    rules: tuple[Rule, ...] = ()
    paired_s: float = 0.0  # Unix time
    seen_s: float = 0.0  # Unix time of the last session's start

    @property
    def store_id(self) -> bytes:
        return store_id_of(self.certificate)

    @property
    def fingerprint(self) -> bytes:
        return fingerprint_of(self.certificate)


class Book:
    """All paired peers. `changed` is called after every change."""

    def __init__(self, store: Store, changed: Callable[[], None]) -> None:
        self._store = store
        self._changed = changed
        reader = store.reader()
        try:
            found = [msgspec.msgpack.decode(data, type=Peer) for data in reader.values(TABLE).values()]
        finally:
            reader.close()
        self._peers = {peer.store_id: peer for peer in found}

    def __len__(self) -> int:
        return len(self._peers)

    def all(self) -> list[Peer]:
        return sorted(self._peers.values(), key=lambda peer: peer.name)

    def get(self, store_id: bytes) -> Peer | None:
        return self._peers.get(store_id)

    def by_fingerprint(self, fingerprint: bytes | None) -> Peer | None:
        """The peer whose whole certificate hashes to this (the store id alone would be half of the check)."""
        peer = self._peers.get(fingerprint[:16]) if fingerprint else None
        return peer if peer is not None and peer.fingerprint == fingerprint else None

    def name_of(self, store_id: bytes) -> str:
        peer = self._peers.get(store_id)
        return peer.name if peer is not None else store_id.hex()

    def find(self, text: str) -> Peer:
        """By name, store id in hex or HOST:PORT. NoSuchThing if none."""
        for peer in self._peers.values():
            if text in (peer.name, peer.address, peer.store_id.hex()):
                return peer
        raise NoSuchThing(f"there is no peer {text!r}", hint="silofs peer ls lists the paired ones")

    async def add(self, certificate: bytes, name: str, address: str) -> Peer:
        """A paired store; one that was known keeps its name and rules and gets the new address."""
        known = self._peers.get(store_id_of(certificate))
        if known is not None:
            return await self._put(replace(known, address=address or known.address))
        return await self._put(Peer(certificate, self._unique(name), address, paired_s=time.time()))

    async def allow(self, text: str, pattern: str, direction: str) -> Peer:
        peer = self.find(text)
        added = rule(pattern, direction)
        if added in peer.rules:
            return peer
        if len(peer.rules) >= RULES_MAX:
            raise Busy(f"peer {peer.name} has {RULES_MAX} rules already", hint="use patterns")
        return await self._put(replace(peer, rules=(*peer.rules, added)))

    async def seen(self, store_id: bytes) -> None:
        peer = self._peers.get(store_id)
        if peer is not None:
            await self._put(replace(peer, seen_s=time.time()))

    async def remove(self, text: str, naming: Callable[[WriteTxn, bytes], str | None]) -> Peer:
        """Forget a peer. Busy if `naming`, asked in the same transaction, says that a record still names it."""
        peer = self.find(text)

        def apply(txn: WriteTxn) -> None:
            reason = naming(txn, peer.store_id)
            if reason is not None:
                raise Busy(f"peer {peer.name} cannot be removed: {reason}")
            txn.delete_value(TABLE, peer.store_id.hex())

        await write(self._store, apply)
        del self._peers[peer.store_id]
        self._changed()
        return peer

    async def _put(self, peer: Peer) -> Peer:
        key, data = peer.store_id.hex(), msgspec.msgpack.encode(peer)
        await write(self._store, lambda txn: txn.put_value(TABLE, key, data))
        self._peers[peer.store_id] = peer
        self._changed()
        return peer

    def _unique(self, suggestion: str) -> str:
        plain = suggestion_to_name(suggestion)
        taken = {peer.name for peer in self._peers.values()}
        name, count = plain, 1
        while name in taken:
            count += 1
            name = f"{plain}-{count}"
        return name


def suggestion_to_name(text: str) -> str:
    """A name out of what a peer or the host calls itself."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:NAME_CHARS_MAX]
    return cleaned if NAME.fullmatch(cleaned) else "peer"


async def write(store: Store, fn: Callable[[WriteTxn], T], *, nbytes: int = 0) -> T:
    """`store.submit` awaited without a thread. Cancelling the wait does not undo the transaction."""
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()
    future = store.submit(fn, nbytes=nbytes)
    future.add_done_callback(lambda _: token.run_sync_soon(done.set))
    await done.wait()
    return future.result()
