"""What a target's machine asks the store for: may this come here, what is missing. One function per action."""

from __future__ import annotations

from collections.abc import Callable

from silofs import failpoints
from silofs.blocks import PAGE
from silofs.engine import Engine
from silofs.errors import BadName, BadSize
from silofs.layers.reader import ReadTxn
from silofs.limits import PULL_PAGES, PULL_RUNS_MAX, SIZE_MAX
from silofs.migrate import events as ev
from silofs.migrate.messages import Base, Refusal
from silofs.migrate.states import Role
from silofs.names import check_name
from silofs.peers import content
from silofs.peers.records import BaseGone, hold_named, ownership
from silofs.peers.source_ops import Threads

SPACE_FACTOR_NUMERATOR, SPACE_FACTOR_DENOMINATOR = 9, 8  # of the pages' bytes: objects, leaves, tree
Allowed = Callable[[bytes, str], bool]


async def check_offer(engine: Engine, threads: Threads, action: ev.CheckOffer, allowed: Allowed) -> ev.Event:
    """Authorisation first, so that whoever may not bring a name here learns nothing about it."""

    def refuse(reason: Refusal, detail: str) -> ev.OfferChecked:
        return ev.OfferChecked(action.token, reason, detail)

    def work(reader: ReadTxn) -> ev.OfferChecked:
        if not action.returning:
            for offer in action.offered:
                if not allowed(action.peer, offer.name):
                    return refuse(Refusal.AUTHORISATION, f"{offer.name} may not be brought here by this peer")
        bases = []
        needed = 0
        for offer in action.offered:
            mine = ownership(reader, offer.uuid)
            if not action.granted and not action.returning:
                taken = [volume for volume in reader.volumes() if volume.name == offer.name]
                if any(volume.uuid != offer.uuid for volume in taken):
                    return refuse(Refusal.NAME, f"there is another volume {offer.name} here")
            try:
                check_name(offer.name)
            except (BadName, BadSize) as error:
                return refuse(Refusal.NAME, str(error))
            if not 0 <= offer.size <= SIZE_MAX:
                return refuse(Refusal.LIMIT, "the volume is too large")
            base = content.common_state(reader, offer.states)
            if action.returning:
                base = _ceded_layer(reader, offer.uuid) if mine.role is Role.CEDED else b""
                if base not in offer.states:
                    return refuse(Refusal.BASE, "the state that was ceded is not in what comes back")
            bases.append(Base(offer.uuid, base))
            have = reader.layer_by_uuid(base).data_pages if base else 0  # type: ignore[union-attr]
            needed += max(0, offer.data_pages - have)
        if not action.granted and not _has_space(engine, needed):
            return refuse(Refusal.SPACE, "the destination has too little space")
        return ev.OfferChecked(action.token, None, "", tuple(bases))

    return await threads.read(work)


def _ceded_layer(reader: ReadTxn, uuid: bytes) -> bytes:
    record = reader.ownership(uuid)
    return record.layer if record is not None else b""


def _has_space(engine: Engine, pages: int) -> bool:
    return pages * PAGE * SPACE_FACTOR_NUMERATOR // SPACE_FACTOR_DENOMINATOR <= engine.store.room()


async def check_prepare(engine: Engine, migration: bytes, action: ev.CheckPrepare) -> ev.Event:
    """Whether the rest would fit, and the named states below it are here still: a merge may have taken one. Those that

    are here stay until the migration is over. Space is not held: what does not fit pauses the sweep, and loses no page.
    """
    refusal: Refusal | None = None
    try:
        if action.named:
            failpoints.hit("prepare.before_commit")
            await engine.transact(lambda txn: hold_named(txn, migration, action.named))
            failpoints.hit("prepare.after_commit")
        if not _has_space(engine, action.pages):
            refusal = Refusal.SPACE
    except BaseGone:
        refusal = Refusal.BASE
    except OSError:
        refusal = Refusal.STORE
    return ev.PrepareChecked(action.token, refusal)


async def find_missing(threads: Threads, action: ev.FindMissing) -> ev.Event:
    """The next remote pages of a segment. One that is not here (any more) has none."""

    def work(reader: ReadTxn) -> ev.MissingPages:
        try:
            runs, after = content.missing_runs(reader, action.segment, action.first, PULL_PAGES, PULL_RUNS_MAX)
        except content.NotHere:
            runs, after = [], None
        return ev.MissingPages(action.token, action.segment, tuple(runs), after)

    return await threads.read(work)
