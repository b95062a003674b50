"""Whether a migration may begin: at the source by command, at the target by OFFER or GRANT. Functions of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from silofs.errors import Busy, ProtocolError, UserError
from silofs.migrate import messages as ms
from silofs.migrate import plan
from silofs.migrate.states import Options, Ownership, Role, Switchover


def may_start(
    ownership: Iterable[Ownership], peer: bytes, options: Options, *, writers: int, remote_pages: int, origin: bytes
) -> None:
    """Busy or UserError (usage) unless these volumes may be offered to `peer` now. `origin`: of a RETURN, else b""."""
    for record in ownership:
        if record.role is not Role.OWNER:
            raise UserError("a volume of the group is not owned by this host")
        if record.migration != origin or (origin and record.peer != peer):
            raise Busy("a volume of the group is in another migration already")
    if remote_pages and not origin:  # its rest is at another host, which serves this one only
        raise Busy("a volume of the group has not arrived completely yet", hint="wait, or cancel that migration")
    if writers and options.switchover is Switchover.AUTO:
        raise UserError(
            "the volume is open for writing, and ownership cannot follow the writer here",
            hint="--switchover manual, or now with --fence-writer",
        )
    if writers and options.switchover is Switchover.NOW and not options.fence_writer:
        raise Busy("the volume is open for writing", hint="close it, or --fence-writer cuts the writer off")


def offer_refusal(ownership: Mapping[bytes, Ownership], peer: bytes, offer: ms.Offer) -> ms.Refusal | None:
    """Why the records do not allow this OFFER; None: they do. ProtocolError if it contradicts itself."""
    if sorted(offered.uuid for offered in offer.offered) != sorted(volume.uuid for volume in offer.volumes):
        raise ProtocolError("an OFFER describes other volumes than it names")
    for volume in offer.volumes:
        record = ownership[volume.uuid]
        if offer.returning:
            if record.role is not Role.CEDED or record.peer != peer or record.migration != offer.origin:
                return ms.Refusal.ROLE
            if volume.epoch != record.epoch + 1:
                return ms.Refusal.EPOCH
        elif record.role not in (Role.NONE, Role.RETIRED, Role.INCOMING):
            return ms.Refusal.ROLE
        elif record.epoch >= volume.epoch:
            return ms.Refusal.EPOCH
        elif record.role is Role.INCOMING and record.peer != peer and volume.epoch <= record.offered_epoch:
            return ms.Refusal.BUSY
    return None


def check_grant(grant: ms.Grant) -> None:
    """ProtocolError unless the GRANT's manifest, final layers and maps fit together."""
    plan.check_manifest(grant.volumes, grant.bases, grant.segments)
    tips = plan.tips((volume.uuid for volume in grant.volumes), grant.bases, grant.segments)
    if {head.volume: head.base for head in grant.heads} != tips:
        raise ProtocolError("a GRANT whose final layers are not its newest ones")
    if {offered.uuid for offered in grant.offered} != {volume.uuid for volume in grant.volumes}:
        raise ProtocolError("a GRANT describes other volumes than it names")
    segments = {segment.uuid: segment for segment in grant.segments}
    for part in grant.maps:
        if part.segment not in segments:
            raise ProtocolError("a GRANT with the map of a layer that it does not name")
        plan.map_after(segments.pop(part.segment), part.first, part)
