"""Plausible shortcuts in the machines, each of which the checker must catch (negative controls of tests/sim).

The first nine are those of the protocol's model check; the others are shortcuts that this implementation invites. They
live here and nowhere else: the product has no switch for any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from msgspec.structs import replace

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import states
from silofs.migrate.source import SourceMachine
from silofs.migrate.source import State as SourceState
from silofs.migrate.states import Ownership, Role
from silofs.migrate.target import State as TargetState
from silofs.migrate.target import TargetMachine


class GrantBeforeCede(SourceMachine):
    """GRANT goes out with the commit of CEDED, not after it."""

    def _cede(self, now: float) -> None:
        super()._cede(now)
        if self.state is SourceState.CEDING and self.session is not None:
            self.state = SourceState.CEDED
            self._grant(now)
            self.state = SourceState.CEDING
            self._due = None


class CededNotDurable(SourceMachine):
    """CEDED is kept in memory."""

    def _cede(self, now: float) -> None:
        super()._cede(now)
        for at, action in enumerate(self._actions):
            if isinstance(action, ev.Commit) and self.state is SourceState.CEDING:
                self._actions[at] = ev.Commit(action.token)


class VolatileOwner(TargetMachine):
    """OWNER is kept in memory; the shell is told to serve all the same."""

    def _own(self, record: Any, maps: Any) -> None:
        super()._own(record, maps)
        action = self._actions.pop()
        assert isinstance(action, ev.Commit)
        self._retry = replace(action, ownership=(), drop=(), record=replace(record, phase=states.Phase.PRECOPY))
        self._do(self._retry)
        self.ownership.update((owner.uuid, owner) for owner in action.ownership)
        self.serves_anyway = True


class AutoResume(SourceMachine):
    """No ACK for a while: the old owner takes the volumes back."""

    def _on_timeout(self, now: float) -> None:
        if self.state is SourceState.CEDED:
            self.ownership = {
                uuid: replace(owner, role=Role.OWNER, epoch=owner.epoch + 1) for uuid, owner in self.ownership.items()
            }
            self._cancel_as_owner()
        else:
            super()._on_timeout(now)

    def _cancel_as_owner(self) -> None:
        self.state = SourceState.CANCELLING
        self._due = None
        self._commit(tuple(self.ownership.values()), self.record, drop=(self.migration,))


class SelfPromote(TargetMachine):
    """The peer is silent: the target makes itself the owner."""

    def _on_disconnected(self, now: float) -> None:
        record = self.record
        if self.state is TargetState.INCOMING and record is not None and not self._busy and record.segments:
            heads = tuple(ms.Base(segment.volume, segment.uuid) for segment in record.segments)
            owners = tuple(replace(o, role=Role.OWNER, epoch=o.epoch + 2) for o in self.ownership.values())
            self.state = TargetState.OWNING
            self._commit(owners, replace(record, heads=heads))
        super()._on_disconnected(now)


class NoFreeze(SourceMachine):
    """The volumes are written on while they are given away."""

    def _frozen_now(self, event: ev.Frozen, now: float) -> None:
        self._do(ev.Thaw())
        super()._frozen_now(event, now)


class EarlyComplete(TargetMachine):
    """COMPLETE is sent as soon as the volumes are owned."""

    def _verify(self, now: float) -> None:
        raise NotImplementedError

    def _advance(self, now: float) -> None:
        if self.state is TargetState.PULLING and not self._busy:
            assert self.record is not None
            self.state = TargetState.COMPLETING
            owners = tuple(states.settled(owner, self.migration) for owner in self.ownership.values())
            self._commit(owners, replace(self.record, phase=states.Phase.COMPLETE))
            return
        super()._advance(now)


def forget_everything(record: Ownership) -> Ownership:
    """No tombstone: the record of a retired volume is deleted with it."""
    return Ownership(record.uuid, Role.NONE, 0)


def forget_epoch(record: Ownership) -> Ownership:
    """No tombstone for a cancelled arrival either."""
    return Ownership(record.uuid, Role.NONE, 0)


def only_incoming(record: Ownership, peer: bytes, epoch: int, *, returning: bool) -> bool:
    """GRANT is accepted as INCOMING only."""
    incoming = record.role is Role.INCOMING and record.peer == peer
    return record.epoch < epoch and (incoming or (returning and record.role is Role.CEDED))


class ThawOnUnknown(SourceMachine):
    """A commit of CEDED that failed is taken for one that did not happen."""

    def _commit_ended(self, event: ev.Committed | ev.CommitFailed, now: float) -> None:
        ours = event.token == self._wait and self.state is SourceState.CEDING
        if ours and isinstance(event, ev.CommitFailed):
            self.ownership = {
                uuid: replace(o, role=Role.OWNER, epoch=o.epoch - 1) for uuid, o in self.ownership.items()
            }
            self.state = SourceState.FREEZING
            self._thaw(now)
        else:
            super()._commit_ended(event, now)


class GrantOnUnknown(SourceMachine):
    """A commit of CEDED whose outcome is unknown is taken for one that happened."""

    def _commit_ended(self, event: ev.Committed | ev.CommitFailed, now: float) -> None:
        if event.token == self._wait and self.state is SourceState.CEDING:
            event = ev.Committed(event.token)
        super()._commit_ended(event, now)


class NoRewrite(SourceMachine):
    """After a restart CEDED is believed as the store shows it."""

    @classmethod
    def restore(cls, record: Any, ownership: Any, now: float) -> Any:
        machine, actions = super().restore(record, ownership, now)
        if machine.state is SourceState.CEDING:
            machine.state = SourceState.CEDED
            actions = []
        return machine, actions


class GrantOnce(SourceMachine):
    """GRANT is sent once and never repeated."""

    granted = False

    def _grant(self, now: float) -> None:
        if self.session is not None and self.granted:
            self._due = None
            return
        self.granted = self.session is not None
        super()._grant(now)


class CompleteOnce(TargetMachine):
    """COMPLETE is not in an outbox: it is sent once."""

    def _remind(self, now: float) -> None:
        if self.state is TargetState.COMPLETE and getattr(self, "told", False):
            return
        self.told = self.state is TargetState.COMPLETE
        super()._remind(now)


class MapsLater(TargetMachine):
    """Ownership is taken before the maps are here: what is missing falls through to what lies below."""

    @property
    def _maps_complete(self) -> bool:
        return self.state is TargetState.GRANTED or super()._maps_complete


class NoRetry(TargetMachine):
    """A page that was asked for is believed to have arrived."""

    def _on_event(self, event: ev.Event, now: float) -> None:
        if isinstance(event, ev.MissingPages) and event.runs and self.state is TargetState.PULLING:
            event = replace(event, runs=())
        super()._on_event(event, now)


class CompleteDuringReturn(TargetMachine):
    """COMPLETE is not held back by a RETURN under way."""

    @property
    def held(self) -> bool:
        return False

    @held.setter
    def held(self, value: bool) -> None:
        pass


@contextmanager
def rule(name: str, replacement: Any) -> Iterator[None]:
    """Replace a function of states.py."""
    with mock.patch.object(states, name, replacement):
        yield


SOURCES = {
    "grant_before_cede": GrantBeforeCede,
    "ceded_not_durable": CededNotDurable,
    "auto_resume": AutoResume,
    "no_freeze": NoFreeze,
    "thaw_on_unknown": ThawOnUnknown,
    "grant_on_unknown": GrantOnUnknown,
    "no_rewrite": NoRewrite,
    "grant_once": GrantOnce,
}
TARGETS = {
    "volatile_owner": VolatileOwner,
    "self_promote": SelfPromote,
    "early_complete": EarlyComplete,
    "complete_once": CompleteOnce,
    "maps_later": MapsLater,
    "no_retry": NoRetry,
    "complete_during_return": CompleteDuringReturn,
}
RULES = {
    "no_tombstone": ("retired", forget_everything),
    "no_tombstone_incoming": ("forgotten", forget_epoch),
    "grant_needs_incoming": ("may_accept", only_incoming),
}
