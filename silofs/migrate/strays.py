"""Answers to messages of a migration for which this node has no machine (docs/protocol.md, "Strays").

A machine is gone when its record is: after a cancel, a refusal, or an acknowledged COMPLETE. OFFER and GRANT are no
strays: they make a TargetMachine, which answers by the ownership records.
"""

from __future__ import annotations

from collections.abc import Mapping

from silofs.migrate import messages as ms
from silofs.migrate.states import Ownership, Role


def reply(message: ms.MigrationMessage, ownership: Mapping[bytes, Ownership]) -> ms.MigrationMessage | None:
    """The answer that needs no state, or None. `ownership`: this node's records of the message's volumes, if any."""
    header = (message.migration, message.session, message.volumes)
    match message:
        case ms.Complete():
            # "At or below": a tombstone answers for ever. CEDED at just that epoch has a machine, and needs a commit.
            for volume in message.volumes:
                record = ownership.get(volume.uuid)
                if record is None or record.epoch < volume.epoch:
                    return None
                if record.role is Role.CEDED and record.epoch == volume.epoch:
                    return None
            return ms.CompleteAck(*header)
        case ms.Ready() | ms.CancelAsk():
            # The source's record is durable before its OFFER, and goes only with a cancel or a COMPLETE.
            return ms.Cancelled(*header, ms.Refusal.CANCELLED)
        case ms.Pull() | ms.MapAsk():
            return ms.Unserved(*header, message.request, message.segment)
        case _:
            return None
