"""The shell around one machine: one task that feeds it events and performs its actions, in order.

The machine decides, this performs. What takes time runs in tasks of its own and comes back as an event with the
action's token; commits of one machine go through one queue, so that their order is the machine's. An error of ours in
here ends this migration's task and nothing else: its volumes stay as their records say, and a restart resumes it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from silofs import failpoints
from silofs.errors import Busy, Damaged, ProtocolError, SiloError, StoreFull
from silofs.layers.transaction import WriteTxn
from silofs.migrate import events as ev
from silofs.migrate.messages import Priority, Refusal, Run
from silofs.migrate.source import SourceMachine
from silofs.migrate.source_states import BEFORE_CEDING
from silofs.migrate.states import MigrationRecord, Phase, Role, Side
from silofs.migrate.target import TargetMachine
from silofs.peers import records, source_ops, target_ops
from silofs.peers.bulk import Context, MapJob, PagesJob
from silofs.peers.content import NotHere
from silofs.peers.progress import Progress

if TYPE_CHECKING:
    from silofs.peers.migrations import Migrations

log = logging.getLogger(__name__)

Machine = SourceMachine | TargetMachine

END_S = 10.0  # a migration that a change ends is over within this


class Mover:
    """One migration at this end. `progress` is what the operator sees; `over` is set when it has ended here."""

    def __init__(self, shop: Migrations, machine: Machine, progress: Progress) -> None:
        self.machine = machine
        self.progress = progress
        self.over = trio.Event()
        self.failed: BaseException | None = None
        self.context = Context(machine.migration, machine.volumes, progress.traffic)
        self._shop = shop
        self._inbox: deque[ev.Event] = deque()
        self._wake = trio.Event()
        self._commits: deque[ev.Commit] = deque()
        self._commit_wake = trio.Event()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery
        self._frozen: set[bytes] = set()
        self._wanted: set[tuple[bytes, int]] = set()
        self._last_demand: tuple[bytes, int] = (b"", -1)

    @property
    def id(self) -> bytes:
        return self.machine.migration

    @property
    def peer(self) -> bytes:
        return self.machine.peer

    @property
    def side(self) -> Side:
        return Side.SOURCE if isinstance(self.machine, SourceMachine) else Side.TARGET

    @property
    def record(self) -> MigrationRecord | None:
        return self.machine.record

    @property
    def uuids(self) -> set[bytes]:
        return {volume.uuid for volume in self.machine.volumes}

    @property
    def name(self) -> str:
        return records.shown_id(self.id)

    # Events

    def post(self, event: ev.Event) -> None:
        self._inbox.append(event)
        self._wake.set()

    async def end(self, event: ev.Event) -> None:
        """Post what ends it before its freeze, and wait until its record is gone. Busy when it was frozen already."""
        self.post(event)
        with trio.move_on_after(END_S):
            await self.over.wait()
        if not self.over.is_set():
            raise Busy(f"it is in migration {self.name}", hint=f"silofs migration show {self.name}")

    def stop(self) -> None:
        """Drop the machine: another one has superseded it, or the daemon ends."""
        self._scope.cancel()

    def expects(self, session: bytes, request: int, segment: bytes, runs: tuple[Run, ...]) -> bool:
        """Arrivals.Receiver."""
        return isinstance(self.machine, TargetMachine) and self.machine.expects(session, request, segment, runs)

    def stored(self, event: ev.PagesDurable | ev.PagesFailed, nbytes: int) -> None:
        """Arrivals.Receiver."""
        self.progress.traffic.received += nbytes
        self.progress.trouble = event.reason if isinstance(event, ev.PagesFailed) else None
        self.post(event)

    def demand(self, segment: bytes, page: int) -> None:
        """A reader waits for a page. Pages that are asked for in one turn of the loop become one request."""
        if not self._wanted:
            self._nursery.start_soon(self._ask)
        self._wanted.add((segment, page))

    async def _ask(self) -> None:
        await trio.lowlevel.checkpoint()
        wanted, self._wanted = sorted(self._wanted), set()
        runs: list[tuple[bytes, int, int]] = []
        for segment, page in wanted:
            if runs and runs[-1][0] == segment and runs[-1][2] == page:
                runs[-1] = (segment, runs[-1][1], page + 1)
            else:
                runs.append((segment, page, page + 1))
        for segment, first, end in runs:
            self.post(ev.Demand(segment, Run(first, end - first)))
        segment, first, end = runs[-1]
        if self._last_demand == (segment, first):  # a sequential reader: what comes next will be asked for next
            self.hint(segment, end, end - first)
        self._last_demand = (segment, end)

    def hint(self, segment: bytes, first: int, count: int) -> None:
        """A reader may come for these pages."""
        record = self.record
        known = next((part for part in record.segments if part.uuid == segment), None) if record else None
        if known is None:
            return
        end = min(first + count, -(-known.size // 4096))
        if end > first:
            self.post(ev.Demand(segment, Run(first, end - first), Priority.HINT))

    # The task

    async def run(self, actions: list[ev.Action]) -> None:
        """Until the machine is done, or stopped."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._commit_all)
                    self._perform_all(actions)
                    while not self.machine.done:
                        await self._step()
                    while self._commits:
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
        except Exception as error:
            log.exception("migration %s was given up by an error of ours", self.name)
            self.failed = error
            self.progress.trouble = Refusal.STORE
        finally:
            if self.machine.done:
                self.thaw()
            if self.failed is None:
                self.over.set()
            self._shop.ended(self)

    def inherit(self, dead: Mover) -> None:
        """Take over from one that died of an error of ours: who follows it, and what it had frozen."""
        self.over = dead.over
        self.progress.traffic = self.context.traffic = dead.progress.traffic
        self._frozen = dead._frozen
        if isinstance(self.machine, SourceMachine) and self.machine.state in BEFORE_CEDING:
            self.thaw()

    async def _step(self) -> None:
        deadline = self.machine.deadline()
        with trio.move_on_at(math.inf if deadline is None else deadline):
            if not self._inbox:
                self._wake = trio.Event()
                await self._wake.wait()
        await trio.lowlevel.checkpoint()
        while self._inbox and not self.machine.done:
            event = self._inbox.popleft()
            try:
                actions = self.machine.handle(event, trio.current_time())
            except ProtocolError as error:
                log.warning("migration %s: %s", self.name, error)
                self._shop.hub.disconnect(self.peer, str(error))
                continue
            self._perform_all(actions)
            if isinstance(event, ev.Committed) and self.side is Side.TARGET and not self.machine.unsettled:
                self._shop.settled(self.id)
        if not self.machine.done:
            self._perform_all(self.machine.tick(trio.current_time()))
        self.progress.look(self.machine)

    def _perform_all(self, actions: list[ev.Action]) -> None:
        for action in actions:
            self._perform(action)

    def _perform(self, action: ev.Action) -> None:
        shop, engine, threads = self._shop, self._shop.engine, self._shop.threads
        match action:
            case ev.Send():
                link = shop.hub.link(self.peer)
                if link is not None and link.id == action.message.session:
                    link.session.send(action.message)
            case ev.Commit():
                self._commits.append(action)
                self._commit_wake.set()
            case ev.ServePages():
                self._serve(PagesJob(self.context, action.session, action.request, action.segment, action.runs), action)
            case ev.ServeMap():
                self._serve(MapJob(self.context, action.session, action.request, action.segment, action.first), action)
            case ev.PhaseChanged():
                self._phase(action)
            case ev.Replied():
                self.progress.replied(action)
            case ev.Finished():
                self.progress.finished(action)
                failpoints.hit(f"{self.side.value}.finished")
            case ev.Seal():
                self._answer(lambda: source_ops.seal(engine, threads, action), ev.SealFailed, action.token)
            case ev.Freeze():
                self._freeze({above.volume for above in action.volumes})
                self._answer(lambda: source_ops.freeze(engine, threads, action), ev.FreezeFailed, action.token)
            case ev.Thaw():
                self.thaw()
            case ev.ComputeDigests():
                self._digests(action.token, action, lost=False)
            case ev.Verify():
                self._digests(action.token, action, lost=True)
            case ev.Describe():
                self._answer(lambda: source_ops.describe(threads, action), None, action.token)
            case ev.CheckOffer():
                self._answer(
                    lambda: target_ops.check_offer(engine, threads, action, shop.may_bring),
                    lambda token, reason: ev.OfferChecked(token, reason),
                    action.token,
                )
            case ev.CheckPrepare():
                self._answer(lambda: target_ops.check_prepare(engine, self.id, action), ev.PrepareChecked, action.token)
            case ev.FindMissing():
                self._answer(lambda: target_ops.find_missing(threads, action), None, action.token)
            case ev.StartReturn():
                shop.start_return(self)
            case _:
                raise AssertionError(f"an action that nobody performs: {action}")

    def _answer(
        self,
        work: Callable[[], Awaitable[ev.Event]],
        failed: Callable[[int, Refusal], ev.Event] | None,
        token: int,
    ) -> None:
        """Do the work in a task of its own and post its event, or the failure's."""

        async def run() -> None:
            event: ev.Event | None
            try:
                event = await work()
            except StoreFull as error:
                log.error("migration %s: %s", self.name, error)
                event = failed(token, Refusal.SPACE) if failed is not None else None
            except (SiloError, NotHere, trio.TooSlowError) as error:
                log.error("migration %s: %s", self.name, error)
                event = failed(token, Refusal.STORE) if failed is not None else None
            if event is not None:
                self.post(event)

        self._nursery.start_soon(run)

    def _digests(self, token: int, action: ev.ComputeDigests | ev.Verify, *, lost: bool) -> None:
        threads = self._shop.threads
        self._answer(
            lambda: source_ops.digests(threads, token, action.bases, action.segments, lost=lost),
            ev.DigestsFailed,
            token,
        )

    # What a peer asked for

    def _serve(self, job: PagesJob | MapJob, action: ev.ServePages | ev.ServeMap) -> None:
        link = self._shop.hub.link(self.peer)
        if link is None or link.id != action.session:
            return
        if isinstance(action, ev.ServePages) and action.priority is not Priority.SWEEP:
            assert isinstance(job, PagesJob)
            self._nursery.start_soon(self._shop.serve_demand, link, job)
            return
        try:
            link.outbound.put(job)
        except ProtocolError as error:
            link.session.close(str(error))

    # The freeze

    def _freeze(self, uuids: set[bytes]) -> None:
        """In the same step in which the machine went to FREEZING: nothing is admitted from here on."""
        self.thaw()
        for uuid in uuids:
            self._shop.engine.freeze(uuid)
        self._frozen = uuids
        self.progress.froze(trio.current_time())

    def thaw(self) -> None:
        """Let go of what `_freeze` held; the gates are then what the records say."""
        for uuid in self._frozen:
            try:
                self._shop.engine.thaw(uuid)
            except SiloError as error:
                log.error("migration %s: %s", self.name, error)
        self._frozen = set()

    def _phase(self, action: ev.PhaseChanged) -> None:
        log.info("migration %s: %s, round %d", self.name, action.phase.value, action.round)
        self.progress.phase_changed(action.phase, action.round)
        if action.phase is Phase.PULLING and self.side is Side.SOURCE:
            self._shop.engine.acknowledged(self.uuids)
        failpoints.hit(f"{self.side.value}.{action.phase.value}")

    # Commits

    async def _commit_all(self) -> None:
        while True:
            while not self._commits:
                self._commit_wake = trio.Event()
                await self._commit_wake.wait()
            commit = self._commits[0]
            step = _step_of(commit, self.side)
            failpoints.hit(f"{step}.before_commit")
            try:
                await self._commit(commit)
            except StoreFull as error:
                log.error("migration %s, %s: %s", self.name, step, error)
                self.post(ev.CommitFailed(commit.token, Refusal.SPACE))
            except records.BaseGone as error:
                log.warning("migration %s, %s: %s", self.name, step, error)
                self.post(ev.CommitFailed(commit.token, Refusal.BASE))
            except SiloError as error:
                log.error("migration %s, %s: %s", self.name, step, error)
                self.post(ev.CommitFailed(commit.token))
            else:
                failpoints.hit(f"{step}.after_commit")
                self.post(ev.Committed(commit.token))
            self._commits.popleft()

    async def _commit(self, commit: ev.Commit) -> None:
        shop = self._shop
        record = self.record
        if commit.rewrite:
            await shop.reopened()
        fields = self._closing(commit) if self.id in commit.drop else None
        retire = {mine.uuid for mine in commit.ownership if mine.role is Role.RETIRED}

        def apply(txn: WriteTxn) -> set[bytes]:
            changed = records.apply(txn, commit, record)
            if fields is not None:
                gone = retire - records.left_behind(txn, record)
                shop.history.close(txn, self.id, fields, gone, self.progress.retain_s)
            return changed

        changed = await shop.engine.transact(apply)
        # The gates follow the records in the step in which the transaction is published, and before anybody is told.
        shop.engine.apply_ownership(changed)
        if any(mine.role is Role.CEDED for mine in commit.ownership):
            self.thaw()
        if changed:
            shop.volumes_changed(self, changed)
        for migration in commit.drop:
            if migration != self.id:
                shop.superseded(migration)

    def _closing(self, commit: ev.Commit) -> dict[str, object]:
        """How the migration will have ended when this commit, which deletes its record, is durable."""
        fields = self._shop.fields(self)
        complete = self.progress.phase in (Phase.CEDED, Phase.PULLING, Phase.COMPLETE)
        phase = Phase.COMPLETE if complete else Phase.CANCELLED
        return fields | {"phase": phase.value, "verified": complete and not fields["lost_pages"], "bytes_left": 0}


def _step_of(commit: ev.Commit, side: Side) -> str:
    """The step of a migration that a commit is: the first half of the names of its failpoints."""
    roles = {mine.role for mine in commit.ownership}
    phase = commit.record.phase if commit.record is not None else None
    if Role.CEDED in roles:
        return "cede"
    if Role.RETIRED in roles:
        return "retire"
    if Role.INCOMING in roles:
        return "incoming"
    if phase is Phase.COMPLETE:
        return "complete"
    if Role.OWNER in roles and side is Side.TARGET:
        return "own"
    if phase is Phase.OFFERED:
        return "offer"
    if commit.maps:
        return "map"
    if commit.drop:
        return "close"
    return "round"


__all__ = ["Damaged", "Machine", "Mover"]
