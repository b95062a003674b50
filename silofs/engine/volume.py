"""One open volume (or snapshot) as the engine sees it: where it stands, who may change it, what waits for a commit."""

from __future__ import annotations

from enum import Enum
from typing import Final

import trio

from silofs.engine.served import Served
from silofs.errors import Busy, Damaged, NoSuchVolume, NotOwner, ReadOnly, SiloError
from silofs.layers.catalog import Role, Volume
from silofs.layers.pending import Patch, Pending

KEY_SHIFT: Final = 32  # a key of the leaf cache is a volume's key << 32 | leaf: leaves of a volume are below 2^29


def again(error: SiloError) -> SiloError:
    """A copy of an error that one task had, for another to raise: an exception carries its own traceback."""
    return type(error)(error.message, hint=error.hint)


class Gate(Enum):
    """What a volume lets through (docs/protocol.md gives the reasons)."""

    OPEN = "open"
    FROZEN = "frozen"  # mutations wait; reads go on
    RELEASED = "released"  # it left: mutations are refused, reads go to the new owner
    INCOMING = "incoming"  # it has not arrived: mutations are refused, reads go to the owner
    FENCED = "fenced"  # lost a dispute after a force: read-only
    SEALED = "sealed"  # a snapshot: read-only for ever
    GONE = "gone"  # deleted


_BY_ROLE: Final = {
    Role.OWNER: Gate.OPEN,
    Role.INCOMING: Gate.INCOMING,
    Role.CEDED: Gate.RELEASED,
    Role.RETIRED: Gate.RELEASED,
    Role.FENCED: Gate.FENCED,
    Role.NONE: Gate.RELEASED,  # an old copy, left over by a way back that was cancelled
}


class VolumeState:
    """State of one volume in this process. Only the engine changes it, on the event loop.

    `writable` and `local` are the gate as the hot paths want it: whether a mutation may be admitted right now, and
    whether this store may answer reads.
    """

    __slots__ = (
        "clean",
        "damage",
        "durable_lsn",
        "epoch",
        "flushing",
        "frozen",
        "gate",
        "gate_changes",
        "grown",
        "head",
        "inode",
        "key",
        "last_lsn",
        "local",
        "moved",
        "name",
        "open_count",
        "overlaid",
        "owner_known",
        "pending",
        "record",
        "remote",
        "role",
        "served",
        "size",
        "uuid",
        "writable",
        "writers",
        "written_ns",
    )

    def __init__(self, uuid: bytes, key: int) -> None:
        self.uuid = uuid
        self.key = key
        self.name = ""
        self.inode = 0
        self.size = 0  # bytes, unapplied writes beyond the stored end included
        self.grown = 0  # bytes: the size that pending writes beyond the end have made; 0 = none did
        self.damage: Damaged | None = None  # its records are damaged: nothing can be written to it
        self.head = 0  # id of the layer that reads begin at
        self.record: Volume | None = None
        self.role = Role.OWNER
        self.epoch = 0
        self.remote = False  # some page of the chain may still be at a peer
        self.pending = Pending(uuid)  # newest
        self.flushing: Pending | None = None  # being committed, or whose commit failed; older than `pending`
        self.overlaid = False  # `flushing` or zeroed ranges exist: a miss in pending.pages is not yet a miss
        self.clean = True  # nothing in `pending`
        self.last_lsn = 0  # of the last record admitted
        self.durable_lsn = 0  # everything up to it is in the store
        self.written_ns = 0  # when the first write came that is not in the store, by the wall clock
        self.served = Served()
        self.open_count = 0  # handles
        self.writers = 0  # of them for writing
        self.frozen = 0  # freezes in force
        self.gate = Gate.GONE
        self.gate_changes = 0
        self.writable = False
        self.local = False
        self.moved = trio.Event()  # set, and replaced, whenever who waits for the gate should look again
        self.owner_known = False  # RELEASED: the new owner has acknowledged, and can be asked

    def set_role(self, role: Role, epoch: int) -> None:
        if role is not self.role or epoch != self.epoch:
            self.owner_known = False
        self.role = role
        self.epoch = epoch
        self.owner_known |= role in (Role.RETIRED, Role.NONE)
        self._move(_BY_ROLE[role])

    def acknowledged(self) -> None:
        """The new owner said that it is one: reads may be forwarded to it."""
        self.owner_known = True
        self._wake()

    def set_gone(self) -> None:
        """It was deleted: nothing of it is answered or admitted any more, and what was pending is void."""
        self._drop_pending()
        self._move(Gate.GONE)

    def set_sealed(self) -> None:
        self._move(Gate.SEALED)

    def freeze(self) -> None:
        """Let mutations wait. Nests; every call needs its `thaw`."""
        self.frozen += 1
        if self.gate is Gate.OPEN:
            self._move(Gate.FROZEN)

    def thaw(self) -> None:
        assert self.frozen, "thaw without freeze"
        self.frozen -= 1
        if not self.frozen and self.gate is Gate.FROZEN:
            self._move(Gate.OPEN)

    def _move(self, gate: Gate) -> None:
        if gate is Gate.OPEN and self.frozen:
            gate = Gate.FROZEN
        if gate is self.gate:
            return
        self.gate = gate
        self.writable = gate is Gate.OPEN and self.damage is None
        self.local = gate in (Gate.OPEN, Gate.FROZEN, Gate.FENCED, Gate.SEALED)
        self.gate_changes += 1
        self._wake()

    def _wake(self) -> None:
        moved, self.moved = self.moved, trio.Event()
        moved.set()

    def refusal(self) -> SiloError | None:
        """Why a mutation is refused now; None when it is admitted or only has to wait."""
        if self.damage is not None:
            return again(self.damage)
        if self.gate is Gate.OPEN or self.gate is Gate.FROZEN:
            return None
        if self.gate is Gate.INCOMING:
            return Busy(f"{self.name} has not arrived here yet")
        if self.gate is Gate.RELEASED:
            return NotOwner(f"{self.name} has moved to another host")
        if self.gate is Gate.GONE:
            return NoSuchVolume(f"{self.name} was deleted")
        return ReadOnly(f"{self.name} is read-only")

    def damaged(self, error: Damaged) -> None:
        """Its records cannot be read: what is pending cannot be applied, and nothing more is admitted."""
        self.damage = error
        self.writable = False

    # What waits for a commit

    def lookup(self, page: int) -> int | Patch | None:
        """The newest of a page that is not in the store yet, as in Pending.lookup; a Patch may lie over `flushing`."""
        entry = self.pending.lookup(page)
        if entry is None and self.flushing is not None:
            return self.flushing.lookup(page)
        return entry

    def cut(self) -> Pending:
        """Hand what is pending to a commit and begin anew."""
        assert self.flushing is None, "one commit at a time"
        self.flushing, self.pending = self.pending, Pending(self.uuid)
        self.flushing.seal()
        self.clean = True
        self.overlaid = True
        return self.flushing

    def landed(self) -> None:
        """What was cut is in the store and its leaves are published."""
        self.flushing = None
        self.overlaid = bool(self.pending.zeros)

    def _drop_pending(self) -> None:
        self.pending = Pending(self.uuid)
        self.flushing = None
        self.clean = True
        self.overlaid = False
        self.durable_lsn = self.last_lsn

    @property
    def waiting_bytes(self) -> int:
        """What was written and is not in the store yet; pages that were overwritten meanwhile are counted again."""
        return self.pending.bytes + (self.flushing.bytes if self.flushing is not None else 0)

    # Handles

    def opened(self, writable: bool) -> None:
        self.open_count += 1
        self.writers += writable

    def closed(self, writable: bool) -> None:
        self.open_count -= 1
        self.writers -= writable
        assert 0 <= self.writers <= self.open_count, "a handle was closed twice"

    def __repr__(self) -> str:
        return f"VolumeState({self.name}, {self.gate.value}, head {self.head}, {self.size} bytes)"
