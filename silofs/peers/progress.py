"""What an operator sees of a migration: phase, bytes, rate, what is left, how it ended. No I/O.

Bytes are page bytes, uncompressed: `bytes_sent` is what left the source (or, at the destination, arrived and was
stored), `bytes_left` what the peer has not been given yet. They count from the start of the daemon.
"""

from __future__ import annotations

import datetime
import time
from typing import Any

import trio

from silofs.blocks import PAGE
from silofs.migrate import events as ev
from silofs.migrate.messages import Refusal
from silofs.migrate.source import SourceMachine
from silofs.migrate.states import Options, Phase, Side
from silofs.migrate.target import TargetMachine
from silofs.peers.bulk import Traffic
from silofs.peers.records import shown_id

RATE_S = 1.0  # the rate is over about this long
REFUSAL_TEXT = {
    Refusal.NAME: "the name is taken at the destination",
    Refusal.SPACE: "the destination has too little space",
    Refusal.AUTHORISATION: "the destination does not allow this volume to be brought to it",
    Refusal.EPOCH: "the destination has a newer record of this volume",
    Refusal.ROLE: "the destination owns this volume already, or has ceded it",
    Refusal.VERSION: "the destination runs another version of silofs",
    Refusal.LIMIT: "a limit of the destination is exceeded",
    Refusal.BUSY: "something has the volume open for writing, or it is in another migration",
    Refusal.BASE: "the destination has no longer the state of a snapshot, or the one to build on",
    Refusal.STORE: "a store failed; its log says why",
    Refusal.TRY_AGAIN: "it could not be done now",
    Refusal.DIGEST: "what arrived is not what was sent",
    Refusal.LOST: "pages could not be read at the source",
    Refusal.CONVERGE: "the writer is faster than the link",
    Refusal.CHANGED: "the volume was renamed, rolled back or removed meanwhile",
    Refusal.CANCELLED: "cancelled",
    Refusal.USAGE: "it cannot be done as it was asked for",
}
HINTS = {
    Refusal.AUTHORISATION: "silofs peer allow PEER VOLUME in, on the destination",
    Refusal.NAME: "rename one of the two volumes",
    Refusal.SPACE: "make room at the destination (silofs df)",
    Refusal.BASE: "--no-snapshots leaves them here; or remove those that the destination has not",
    Refusal.BUSY: "close it, or --fence-writer cuts the writer off",
    Refusal.CONVERGE: "--mode auto or postcopy switches over with pages still at the source",
    Refusal.LOST: "silofs migration accept-lost ID gives them up",
    Refusal.STORE: "see silofs.log in the store's directory on both hosts",
}


def text_of(reason: Refusal) -> str:
    return REFUSAL_TEXT.get(reason, reason.value)


class Progress:
    """Of one migration at one end."""

    def __init__(
        self, migration: bytes, side: Side, peer: str, names: list[str], options: Options, *, retain_s: float
    ) -> None:
        self.migration = migration
        self.side = side
        self.peer = peer
        self.names = names
        self.options = options
        self.retain_s = retain_s
        self.traffic = Traffic()
        self.phase = Phase.OFFERED
        self.round = 0
        self.reason: Refusal | None = None
        self.detail = ""
        self.fault_text = ""
        self.trouble: Refusal | None = None  # why the sweep does not get on; it is tried again
        self.lost = 0
        self.verified = False
        self.skipped = 0  # bytes below the common states
        self.announced = 0  # bytes of all segments so far
        self.left: int | None = None  # bytes, where the store says it (destination)
        self.pause_s: float | None = None
        self.replies: list[ev.Replied] = []
        self.changed = trio.Event()
        self.started = time.time()
        self._started = trio.current_time()
        self._ended: float | None = None
        self._sample = (trio.current_time(), 0)
        self._rate = 0.0
        self._frozen_at: float | None = None

    def note(self) -> None:
        """Wake whoever follows this migration."""
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def look(self, machine: SourceMachine | TargetMachine) -> None:
        """Take over what the machine knows."""
        record = machine.record
        if record is not None:
            self.round = record.round
            self.announced = sum(segment.pages for segment in record.segments) * PAGE
        if isinstance(machine, SourceMachine) and machine.pause_s is not None:
            self.pause_s = machine.pause_s

    def froze(self, now: float) -> None:
        self._frozen_at = now

    def phase_changed(self, phase: Phase, round_number: int) -> None:
        self.phase = phase
        self.round = max(self.round, round_number)
        self.note()

    def replied(self, action: ev.Replied) -> None:
        self.replies.append(action)
        del self.replies[:-16]
        if action.command is ev.Command.MIGRATE and action.refusal is not None:
            self.reason, self.detail = action.refusal, action.detail
        self.note()

    def finished(self, action: ev.Finished) -> None:
        self.phase = action.phase
        self.reason, self.detail, self.lost = action.reason, action.detail, action.lost
        self.verified = action.phase is Phase.COMPLETE and not action.lost
        self._ended = trio.current_time()
        self.note()

    def fault(self, text: str) -> None:
        self.fault_text = text
        self.note()

    @property
    def done(self) -> bool:
        return self._ended is not None or bool(self.fault_text)

    @property
    def moved(self) -> int:
        """Bytes that went over, seen from this end."""
        return self.traffic.sent if self.side is Side.SOURCE else self.traffic.received

    @property
    def bytes_left(self) -> int:
        if self.phase in (Phase.COMPLETE, Phase.CANCELLED, Phase.FAILED):
            return 0
        return self.left if self.left is not None else max(0, self.announced - self.moved)

    def rate(self) -> float:
        """Bytes per second, over about the last second."""
        now = trio.current_time()
        at, moved = self._sample
        if now - at >= RATE_S:
            self._rate = (self.moved - moved) / (now - at)
            self._sample = (now, self.moved)
        return self._rate

    def fields(self) -> dict[str, Any]:
        """For `migration show`."""
        rate = self.rate()
        left = self.bytes_left
        reason = self.reason or (None if self.done else self.trouble)
        error = self.fault_text or (text_of(reason) if reason is not None else "")
        return {
            "migration": shown_id(self.migration),
            "volumes": self.names,
            "peer": self.peer,
            "direction": "out" if self.side is Side.SOURCE else "in",
            "phase": self.phase.value,
            # How, is the source's to say: the destination is not told.
            "mode": self.options.mode.value if self.side is Side.SOURCE else None,
            "switchover": self.options.switchover.value if self.side is Side.SOURCE else None,
            "round": self.round,
            "bytes_sent": self.moved,
            "bytes_wire": self.traffic.sent_wire,
            "bytes_demand": self.traffic.demand if self.side is Side.SOURCE else self.traffic.received_demand,
            "bytes_left": left,
            "bytes_skipped": self.skipped,
            "rate": int(rate),
            "eta_seconds": round(left / rate, 1) if rate else None,
            "pause_ms": None if self.pause_s is None else round(self.pause_s * 1000, 1),
            "started": datetime.datetime.fromtimestamp(self.started, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": round((self._ended or trio.current_time()) - self._started, 3),
            "verified": self.verified,
            "lost_pages": self.lost,
            "error": error + (f": {self.detail}" if self.detail else ""),
            "hint": HINTS.get(reason, "") if reason is not None else "",
        }
