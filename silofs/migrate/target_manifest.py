"""The manifest at the target: as announced or granted, then durable with its maps; and with the last of them, OWNER."""

from __future__ import annotations

from msgspec.structs import replace

from silofs.errors import ProtocolError
from silofs.migrate import messages as ms
from silofs.migrate import plan, states
from silofs.migrate.states import MigrationRecord, Ownership, Phase
from silofs.migrate.target_offer import Offers
from silofs.migrate.target_states import State
from silofs.migrate.transfer import Transfer


class Manifest(Offers):
    """What is to arrive, and how far its maps have."""

    def __init__(
        self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: dict[bytes, Ownership]
    ) -> None:
        super().__init__(migration, peer, volumes, ownership)
        self.transfer = Transfer()
        self._announce: ms.Announce | None = None
        self._done_sent: int | None = None  # the round of the last ROUND_DONE in this session

    def _announced(self, message: ms.Announce) -> None:
        assert self.record is not None
        if message.bases != self.record.bases:
            raise ProtocolError("a round builds on other states than were agreed")
        plan.check_manifest(self.volumes, message.bases, message.segments)
        self._announce = message
        self._done_sent = None

    @property
    def _manifest_current(self) -> bool:
        """The durable manifest is the one that the source last told."""
        if self.record is None:
            return False
        if self.state is State.GRANTED:
            return self._grant is not None and self._matches(self.record, self._grant)
        if self.state is State.INCOMING:
            return self._announce is not None and self.record.segments == self._announce.segments
        return True

    def _matches(self, record: MigrationRecord, grant: ms.Grant) -> bool:
        return (record.bases, record.segments, record.heads, record.snapshots) == (
            grant.bases,
            grant.segments,
            grant.heads,
            grant.snapshots,
        )

    @property
    def _maps_complete(self) -> bool:
        return self.record is not None and plan.maps_complete(self.record)

    # Commits

    def _advance_record(self) -> None:
        """The one commit that is due, if any."""
        record = self.record
        if self.state is State.GRANTED:
            grant = self._grant
            assert grant is not None
            if record is None or not self._matches(record, grant):
                self._take_manifest(record, grant)
                return
            if self._maps_complete and (self.transfer.swept or not self.returning):
                self._own(record, ())
                return
        elif self.state is State.INCOMING and record is not None and self._announce is not None:
            announce = self._announce
            if record.segments != announce.segments:
                arrived = plan.carry_over(record.segments, record.map_next, announce.segments)
                self.transfer.drop_maps()
                new = replace(
                    record,
                    phase=Phase.PRECOPY,
                    segments=announce.segments,
                    map_next=arrived,
                    round=announce.round,
                )
                self._commit((), new)
                self._enter(Phase.PRECOPY, announce.round)
                return
        pulling = self.state in (State.INCOMING, State.GRANTED, State.PULLING)
        if self.transfer.has_parts and record is not None and pulling:
            parts = self.transfer.take_parts()
            self._commit((), plan.with_parts(record, parts), maps=parts)

    def _take_manifest(self, record: MigrationRecord | None, grant: ms.Grant) -> None:
        """The GRANT's manifest becomes ours; with its maps in the same transaction if they fit, and OWNER too."""
        old = record if record is not None else self._new_record(grant.offered, grant.bases, b"")
        same_bases = old.bases == grant.bases
        arrived = plan.carry_over(
            old.segments if same_bases else (), old.map_next if same_bases else (), grant.segments
        )
        new = replace(
            old,
            phase=Phase.PRECOPY,
            offered=grant.offered,
            bases=grant.bases,
            segments=grant.segments,
            map_next=arrived,
            heads=grant.heads,
            snapshots=grant.snapshots,
        )
        self.transfer.drop_maps()
        at = {segment.uuid: next_page for segment, next_page in zip(new.segments, arrived, strict=True)}
        parts = tuple(part for part in grant.maps if at.get(part.segment) == part.first)
        new = plan.with_parts(new, parts)
        if not self.returning and plan.maps_complete(new):
            self._own(new, parts)
        else:
            owners, drop = ((), ()) if self.returning else self._incoming()
            self._commit(owners, new, drop=drop, maps=parts)

    def _own(self, record: MigrationRecord, maps: tuple[ms.MapPart, ...]) -> None:
        """OWNER, durably; then, and only then, serve and ACK."""
        owners = tuple(
            states.owned(
                self.ownership[volume.uuid], self.migration, self.peer, volume.epoch, returning=self.returning
            )
            for volume in self.volumes
        )
        old = {owner.migration for owner in self.ownership.values()} - {self.migration, b""}
        self.state = State.OWNING
        self._commit(owners, replace(record, phase=Phase.PULLING), drop=tuple(sorted(old)), maps=maps)
