"""`silofs freeze` and `silofs thaw` in the daemon: gates that are shut until a deadline (docs/freeze.md).

The gate is the engine's own: mutations wait at it, reads and other volumes go on, and a migration's or a resize's
freeze nests in it. A gate is shut before its record is written and opened after the record is gone; only a deadline
opens it first, since a store that cannot be written must not hold a guest for longer than was promised.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import trio

from silofs import failpoints, freezes, limits
from silofs.control import Call
from silofs.engine import Engine
from silofs.engine.volume import VolumeState
from silofs.errors import Busy, SiloError, UserError
from silofs.facts import Fields
from silofs.freezes import Freeze
from silofs.layers.catalog import Role
from silofs.layers.transaction import WriteTxn
from silofs.service import Service
from silofs.times import rfc3339
from silofs.verbs import Args, name_in, owned

log = logging.getLogger(__name__)

REMEMBERED: Final = 8  # freezes that a deadline ended, for `status` and for who comes to thaw them
RETRY_S: Final = 1.0


@dataclass(frozen=True)
class Held:
    """A gate that is shut. The volume may go meanwhile (an old copy is dropped): its state is kept to be opened."""

    freeze: Freeze
    deadline: float
    state: VolumeState


class Freezes:
    """Handlers of `freeze` and `thaw`, and the clock that ends what nobody thaws."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[bytes, Held] = {}
        self._expired: deque[Freeze] = deque(maxlen=REMEMBERED)
        self._leftover: set[bytes] = set()  # records of freezes that are over
        self._changed = trio.Event()
        self._guard: Callable[[str, str], Awaitable[None]]

    def register(self, service: Service) -> None:
        service.register("freeze", self.freeze)
        service.register("thaw", self.thaw)
        service.frozen = self.shown
        self._guard = service.guard

    def restore(self) -> None:
        """Shut the gates that were shut when the last daemon ended. Before anything is served."""
        now = time.time_ns()
        reader = self._engine.reads.txn
        for freeze in freezes.recorded(reader):
            uuid = UUID(freeze.uuid).bytes
            left = freeze.left_s(now)
            ownership = reader.ownership(uuid)
            if left and reader.has_volume(uuid) and ownership is not None and ownership.role is Role.OWNER:
                self._shut(uuid, freeze, left)
                log.info("%s stays frozen by %s for %.1f s", freeze.name, freeze.holder, left)
            elif left:
                self._leftover.add(uuid)  # it has gone
            else:
                self._over(uuid, freeze)

    def _over(self, uuid: bytes, freeze: Freeze) -> None:
        """A deadline has passed, with this daemon or before it: say so, and forget the record."""
        self._expired.append(freeze)
        self._leftover.add(uuid)
        log.warning("%s is thawed by its deadline; it was frozen by %s", freeze.name, freeze.holder)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """End freezes at their deadlines, for ever."""
        self.restore()
        task_status.started()
        while True:
            for uuid, held in list(self._held.items()):
                if held.deadline <= trio.current_time():
                    self._open(uuid)
                    self._over(uuid, held.freeze)
            wait = min((held.deadline for held in self._held.values()), default=math.inf)
            if self._leftover and not await self._forget():
                wait = min(wait, trio.current_time() + RETRY_S)
            with trio.move_on_at(wait):
                await self._changed.wait()
            self._changed = trio.Event()

    async def _forget(self) -> bool:
        """Remove the records of freezes that are over."""
        over = set(self._leftover)

        def remove(txn: WriteTxn) -> None:
            for uuid in over:
                freezes.remove(txn, uuid)

        try:
            await self._engine.transact(remove)
        except SiloError as error:
            log.error("the record of a freeze that is over stays for now: %s", error)
            return False
        self._leftover -= over
        return True

    # Verbs

    async def freeze(self, args: Args, call: Call) -> Fields:
        """Hold a volume's mutations from now on; what was acknowledged is durable when this returns."""
        name = name_in(args, "name")
        timeout = _timeout(args)
        await self._guard("freeze", name)
        reader = self._engine.reads.txn
        volume = owned(reader, name, "a freeze")
        self._check_held(volume.uuid, name)
        now = time.time_ns()
        freeze = Freeze(
            uuid=str(UUID(bytes=volume.uuid)),
            name=name,
            owner=_word(args, "owner") or "somebody",
            reason=_word(args, "reason"),
            pid=_pid(args),
            uid=call.uid,
            since_ns=now,
            until_ns=now + int(timeout * 1e9),
        )
        self._shut(volume.uuid, freeze, timeout)

        def record(txn: WriteTxn) -> None:
            owned(txn, name, "a freeze")
            freezes.put(txn, freeze)

        try:
            await self._engine.transact(record)
            failpoints.hit("hold.recorded")
            await self._guard("freeze", name)  # a migration that began meanwhile was there first
            if volume.uuid not in self._held:
                raise Busy(f"{name} was thawed by its deadline at once", hint="freeze it with a longer --timeout")
        except BaseException:
            if self._open(volume.uuid):
                self._leftover.add(volume.uuid)
                self._wake()
            raise
        log.info("%s is frozen by %s, for at most %.1f s", name, freeze.holder, timeout)
        return {"name": name, "timeout_seconds": timeout, **freeze.fields()}

    def _check_held(self, uuid: bytes, name: str) -> None:
        if uuid in self._held:
            freeze = self._held[uuid].freeze
            until = rfc3339(freeze.until_ns)
            hint = f"wait, or end that with silofs thaw {name}"
            raise Busy(f"{name} is frozen by {freeze.holder}, until {until}", hint=hint)

    async def thaw(self, args: Args, call: Call) -> Fields:
        """Let a volume's mutations go on."""
        name = name_in(args, "name")
        uuid = self._engine.reads.txn.volume_by_name(name).uuid
        if uuid not in self._held:
            raise self._not_frozen(uuid, name)
        held = self._held[uuid]
        await self._engine.transact(lambda txn: freezes.remove(txn, uuid))
        failpoints.hit("hold.removed")
        if self._held.get(uuid) is not held or not self._open(uuid):
            raise self._not_frozen(uuid, name)
        seconds = (time.time_ns() - held.freeze.since_ns) / 1e9
        log.info("%s is thawed after %.1f s", name, seconds)
        return {"name": name, "seconds": round(seconds, 3), **held.freeze.fields()}

    def _not_frozen(self, uuid: bytes, name: str) -> SiloError:
        last = next((each for each in reversed(self._expired) if UUID(each.uuid).bytes == uuid), None)
        if last is None:
            return Busy(f"{name} is not frozen", hint="silofs status shows what is")
        hint = "what was copied since may not be of one moment: freeze it again, with a longer --timeout"
        return Busy(f"{name} is not frozen any more: its deadline passed at {rfc3339(last.until_ns)}", hint=hint)

    def shown(self) -> Fields:
        """What `status` says: the freezes in force, and the last ones that their deadlines ended."""
        held = [held.freeze for held in self._held.values()]
        frozen, expired = ([{"volume": each.name, **each.fields()} for each in some] for some in (held, self._expired))
        return {"frozen": frozen, "expired_freezes": expired}

    # Gates

    def _shut(self, uuid: bytes, freeze: Freeze, seconds: float) -> None:
        state = self._engine.open_volume(uuid)
        state.freeze()
        self._leftover.discard(uuid)
        self._held[uuid] = Held(freeze, trio.current_time() + seconds, state)
        self._wake()

    def _open(self, uuid: bytes) -> bool:
        """Open a gate; False if somebody has done so."""
        held = self._held.pop(uuid, None)
        if held is None:
            return False
        held.state.thaw()
        self._wake()
        return True

    def _wake(self) -> None:
        self._changed.set()


def _timeout(args: Args) -> float:
    value = args.get("timeout", limits.HOLD_S)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limits.HOLD_MAX_S:
        hint = f"at most {limits.HOLD_MAX_S:.0f} s: a guest whose writes hang for longer gives its disk up"
        raise UserError("a freeze needs a deadline", hint=hint)
    return float(value)


def _word(args: Args, key: str) -> str:
    """A short text for people, made of printable characters."""
    value = args.get(key, "")
    if not isinstance(value, str) or len(value) > limits.HOLD_TEXT_MAX or not (value.isprintable() or not value):
        raise UserError(f"{key} is one line of at most {limits.HOLD_TEXT_MAX} characters")
    return value


def _pid(args: Args) -> int:
    value = args.get("pid", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise UserError("the argument 'pid' is the number of a process")
    return value

