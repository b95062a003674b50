"""What the source proposes: OFFER, PREPARE, GRANT. The target checks each, and agrees or says why not.

And the way back: an offer that is not to be is forgotten, durably.
"""

from __future__ import annotations

from silofs.migrate import admission, states
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.states import MigrationRecord, Options, Ownership, Phase, Role, Side
from silofs.migrate.target_states import OWNS, State, Target


class Offers(Target):
    """By the ownership records at once, by what the store has and has room for when the shell has looked."""

    def __init__(
        self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: dict[bytes, Ownership]
    ) -> None:
        super().__init__(migration, peer, volumes, ownership)
        self._offer: ms.Offer | None = None
        self._prepare: tuple[int, int] = (0, 0)  # token, attempt
        self._grant: ms.Grant | None = None
        self._cancel_wanted = False
        self._forget_pending = False

    # What the source says

    def _offered(self, message: ms.Offer, now: float) -> None:
        refusal = admission.offer_refusal(self.ownership, self.peer, message)
        if self.state is State.INCOMING and not self._cancel_wanted:
            assert self.record is not None
            self._send(ms.Ready(*self._header, self.record.bases))
            return
        if self.state is not State.NEW:
            return  # under way, or (a late duplicate) long past
        if refusal is not None:
            self._refuse(refusal, "the destination's record of the volume does not allow it")
            return
        self._offer = message
        self.returning = message.returning
        self.state = State.CHECKING
        self._wait = self._next()
        self._do(ev.CheckOffer(self._wait, message.offered, self.volumes, self.peer, message.returning, False))

    def _refuse(self, reason: ms.Refusal, detail: str) -> None:
        if self.session is not None:
            self._send(ms.Refuse(*self._header, reason, detail[:512]))
        self._finish(Phase.FAILED, reason, detail)

    def _prepare_asked(self, message: ms.Prepare) -> None:
        self._prepare = (self._next(), message.attempt)
        self._do(ev.CheckPrepare(self._prepare[0], message.pages, message.named))

    def _granted(self, message: ms.Grant) -> None:
        admission.check_grant(message)
        if self.state in OWNS:
            self._send(ms.Ack(*self._header))
            return
        if self.state not in (State.NEW, State.INCOMING):
            return  # RECORDING and so on: it is repeated
        held = [(owner.role, owner.epoch) for owner in self.ownership.values()]
        if held == [(Role.OWNER, volume.epoch) for volume in self.volumes]:
            self._send(ms.Ack(*self._header))
            self._finish(Phase.COMPLETE, None)
            return
        for volume in self.volumes:
            record = self.ownership[volume.uuid]
            if not states.may_accept(record, self.peer, volume.epoch, returning=message.returning):
                own = tuple(ms.VolumeEpoch(uuid, record.epoch) for uuid, record in self.ownership.items())
                self._send(ms.Nack(*self._header, ms.Refusal.EPOCH, own))
                if self.state is State.NEW:
                    self._finish(Phase.FAILED, ms.Refusal.EPOCH)
                return
        self._grant = message
        self.returning = message.returning
        if self.record is not None and self.record.bases == message.bases:
            self.state = State.GRANTED
        else:
            self.state = State.CHECKING
            self._wait = self._next()
            self._do(ev.CheckOffer(self._wait, message.offered, self.volumes, self.peer, message.returning, True))

    # What the shell found

    def _checked(self, event: ev.OfferChecked) -> None:
        if self._grant is not None:
            bases = {base.volume: base.base for base in event.bases}
            gone = any(base.base and bases.get(base.volume) != base.base for base in self._grant.bases)
            if event.refusal is None and not gone:
                self.state = State.GRANTED
                return
            own = tuple(ms.VolumeEpoch(uuid, record.epoch) for uuid, record in self.ownership.items())
            reason = event.refusal or ms.Refusal.BASE
            if self.session is not None:
                self._send(ms.Nack(*self._header, reason, own))
            self._grant = None
            if self.record is not None:
                self.state = State.INCOMING
            else:
                self._finish(Phase.FAILED, reason, event.detail)
            return
        offer = self._offer
        assert offer is not None
        if event.refusal is not None:
            self._refuse(event.refusal, event.detail)
            return
        assert {base.volume for base in event.bases} == {volume.uuid for volume in self.volumes}
        self.state = State.RECORDING
        owners, drop = self._incoming() if not self.returning else ((), ())
        record = self._new_record(offer.offered, event.bases, offer.origin)
        self._commit(owners, record, drop=drop)

    def _check_again(self) -> None:
        """A common state was deleted after it was found: nothing was committed, and another is looked for."""
        assert self.state in (State.NEW, State.RECORDING, State.GRANTED, State.OWNING)
        self._retry = self._committing = None
        granted = self._grant is not None
        about = self._grant if granted else self._offer
        if about is None:  # the session ended meanwhile: all of it comes again
            self._finish(Phase.CANCELLED, ms.Refusal.TRY_AGAIN)
            return
        self.state = State.CHECKING
        self._wait = self._next()
        self._do(ev.CheckOffer(self._wait, about.offered, self.volumes, self.peer, self.returning, granted))

    def _incoming(self) -> tuple[tuple[Ownership, ...], tuple[bytes, ...]]:
        owners = tuple(
            states.incoming(self.ownership[volume.uuid], self.migration, self.peer, volume.epoch)
            for volume in self.volumes
        )
        old = {owner.migration for owner in self.ownership.values() if owner.role is Role.INCOMING}
        return owners, tuple(sorted(old - {self.migration, b""}))

    def _new_record(
        self, offered: tuple[ms.Offered, ...], bases: tuple[ms.Base, ...], origin: bytes
    ) -> MigrationRecord:
        return MigrationRecord(
            id=self.migration,
            side=Side.TARGET,
            peer=self.peer,
            phase=Phase.OFFERED,
            volumes=self.volumes,
            options=Options(),
            offered=offered,
            returning=self.returning,
            origin=origin,
            bases=bases,
        )

    # The way back

    def _ungrant(self) -> None:
        """OFFER and GRANT come again with the next session; until then this is what it was before."""
        self._grant = None
        self.state = State.INCOMING if self.record is not None else State.NEW
        if self.state is State.NEW and not self._busy:
            self._finish(Phase.CANCELLED, ms.Refusal.TRY_AGAIN)

    def _forget(self) -> None:
        self.state = State.FORGETTING
        self._forget_pending = True
        self._due = None

    def _forget_now(self) -> None:
        self._forget_pending = False
        owners = tuple(
            states.forgotten(owner)
            for owner in self.ownership.values()
            if owner.role is Role.INCOMING and owner.migration == self.migration
        )
        self._commit(owners, None, drop=(self.migration,))
