"""Two real machines' worth of hosts, a hostile wire between them, and the checker that looks at both after each step.

A `Node` is the shell of the machines over a `store.State`, with every outcome delayed, failed or cut off as the world
decides. A `World` picks one enabled step at a time from a seeded generator; `calm` then removes the faults and runs to
the end (I6). Whatever it checks, it checks on what a process sees and on what a power cut would leave.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from silofs.errors import SiloError
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import strays
from silofs.migrate.machine import Machine, blocked
from silofs.migrate.plan import newest_common
from silofs.migrate.source import SourceMachine
from silofs.migrate.states import Mode, Options, Ownership, Phase, Role, Side, Switchover
from silofs.migrate.target import TargetMachine
from silofs.migrate.wire import FrameReader, FrameWriter
from tests.sim.store import LOST, PAGES, REMOTE, SIZE, Layer, State

HELLO = ms.Hello((1, 1), b"s" * 16, b"s" * 16, (), (), ())


class Violation(AssertionError):
    """An invariant does not hold; the message starts with its name."""


@dataclass(frozen=True)
class Bulk:
    """Page frames of one answer, on the lane of their own."""

    session: bytes
    migration: bytes
    segment: bytes
    request: int
    pages: tuple[tuple[int, int], ...]
    last: bool


@dataclass
class Node:
    """One host: store, machines and what waits to be done. Everything but `cache` and `disk` dies with the process."""

    name: str
    id: bytes
    cache: State
    disk: State
    up: bool = True
    session: bytes | None = None
    machines: dict[bytes, Machine] = field(default_factory=dict)
    pending: list[tuple[Machine, ev.Action]] = field(default_factory=list)
    gates: dict[bytes, str] = field(default_factory=dict)  # open, frozen, shut
    writers: int = 0
    deferred: list[bytes] = field(default_factory=list)  # volumes whose retired data may go


class World:
    """`classes` replaces the machines' classes (mutants); `trace` keeps what happened."""

    def __init__(
        self,
        seed: int,
        *,
        volumes: int = 1,
        golden: bool = False,
        source: type[SourceMachine] = SourceMachine,
        target: type[TargetMachine] = TargetMachine,
    ) -> None:
        self.random = random.Random(seed)
        self.source, self.target = source, target
        self.now = 100.0
        self.trace: list[str] = []
        self.counts: Counter[str] = Counter()
        self.numbers = 0
        self.volumes = tuple(b"volume-%09d" % i for i in range(volumes))
        layers = {b"golden----------": Layer(b"", {0: self.number(), 1: self.number()})}
        both = State(layers=dict(layers))
        mine = State(layers=dict(layers))
        for volume in self.volumes:
            parent = b"golden----------" if golden else b""
            mine.heads[volume] = Layer(parent, {page: self.number() for page in range(2, 5)})
            mine.own[volume] = Ownership(volume, Role.OWNER, 1)
            mine.snapshots[volume] = {}
        self.a = Node("A", b"A" * 16, mine, mine, gates=dict.fromkeys(self.volumes, "open"))
        self.b = Node("B", b"B" * 16, both, both)
        self.nodes = (self.a, self.b)
        self.wire: dict[str, deque[Any]] = {"A": deque(), "B": deque()}  # control, towards that node
        self.lanes: dict[str, deque[Bulk]] = {"A": deque(), "B": deque()}
        self.old: deque[tuple[str, Any]] = deque(maxlen=64)  # what was ever sent, for replays
        self.acked = {volume: mine.read(volume) for volume in self.volumes}
        self.synced = {volume: dict(pages) for volume, pages in self.acked.items()}
        self.epoch_owner: dict[tuple[bytes, int], str] = {(volume, 1): "A" for volume in self.volumes}
        self.disk_epochs: dict[tuple[str, bytes], int] = {}
        self.damaged: set[bytes] = set()
        self.failures = 0.0  # chance that a commit fails
        self.landed: bool | None = None  # whether one that fails is visible all the same; None: by chance
        self.hostility = 0.16  # chance that a step is a fault or a command
        self.returns = 0.2  # chance that a command is a cancel
        self.sent_pages: Counter[tuple[str, bytes, int]] = Counter()
        self.finished: list[tuple[str, ev.Finished]] = []
        self.replies: list[tuple[str, ev.Replied]] = []

    # Small things

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def fresh(self, kind: bytes) -> bytes:
        return kind + b"-%0*d" % (15 - len(kind), self.number())

    def other(self, node: Node) -> Node:
        return self.b if node is self.a else self.a

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now:9.3f} {text}")

    def machine(self, node: Node, kind: type[Machine]) -> Any:
        return next((m for m in node.machines.values() if isinstance(m, kind)), None)

    # The wire

    def connect(self) -> None:
        if not (self.a.up and self.b.up):
            return
        session = self.fresh(b"s")
        self.say(f"connect {session!r}")
        self._clear_wire()
        for node in self.nodes:
            node.session = session
        for node in self.nodes:
            for machine in list(node.machines.values()):
                self.drive(node, machine, ev.Connected(session, HELLO))

    def _clear_wire(self) -> None:
        for queue in (*self.wire.values(), *self.lanes.values()):
            queue.clear()

    def disconnect(self, *, silent: Node | None = None) -> None:
        """The session breaks. `silent`: that node does not notice yet (half-open)."""
        self._clear_wire()
        for node in self.nodes:
            session, was_up = node.session, node.up
            if node is silent or session is None or not was_up:
                continue
            node.session = None
            self.say(f"disconnect at {node.name}")
            for machine in list(node.machines.values()):
                self.drive(node, machine, ev.Disconnected(session))

    def send(self, node: Node, message: Any) -> None:
        frame = FrameWriter().encode(message)
        (decoded,) = FrameReader().feed(frame)
        assert decoded == message
        self.wire[self.other(node).name].append(message)
        self.old.append((self.other(node).name, message))

    def receive(self, node: Node, message: Any) -> None:
        machine = node.machines.get(message.migration)
        self.say(f"{node.name} <- {type(message).__name__}")
        self.counts[type(message).__name__] += 1
        if machine is None:
            if message.session != node.session:
                return
            if isinstance(message, ms.Offer | ms.Grant):
                if blocked(node.machines.values(), (volume.uuid for volume in message.volumes)):
                    return
                owners = tuple(node.cache.ownership(volume.uuid) for volume in message.volumes)
                created = self.target.create(message.migration, self.other(node).id, message.volumes, owners)
                node.machines[message.migration] = created
                self.drive(node, created, ev.Connected(message.session, HELLO))
                self.drive(node, created, ev.Received(message))
            else:
                answer = strays.reply(message, node.cache.own)
                if answer is not None:
                    self.send(node, answer)
            return
        self.drive(node, machine, ev.Received(message))

    # Driving a machine

    def drive(self, node: Node, machine: Machine, event: ev.Event) -> None:
        if node.machines.get(machine.migration) is machine:
            self.perform(node, machine, machine.handle(event, self.now))

    def perform(self, node: Node, machine: Machine, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.Send():
                    if node.session is not None and action.message.session == node.session:
                        self.send(node, action.message)
                case ev.Freeze():
                    for above in action.volumes:
                        assert node.gates[above.volume] == "open", "a freeze of what is not open"
                        node.gates[above.volume] = "frozen"
                    node.pending.append((machine, action))
                case ev.Thaw():
                    self._thaw(node, machine)
                case ev.PhaseChanged():
                    self.say(f"{node.name} phase {action.phase} round {action.round}")
                case ev.Replied():
                    self.say(f"{node.name} {action.command} -> {action.refusal}")
                    self.replies.append((node.name, action))
                case ev.Finished():
                    self._finished(node, machine, action)
                case _:
                    node.pending.append((machine, action))

    def _thaw(self, node: Node, machine: Machine) -> None:
        self.say(f"{node.name} thaw")
        node.pending = [(m, p) for m, p in node.pending if not (m is machine and isinstance(p, ev.Freeze))]
        for volume in machine.volumes:
            assert node.gates[volume.uuid] == "frozen", "a thaw of what is not frozen"
            node.gates[volume.uuid] = "open"

    def _finished(self, node: Node, machine: Machine, action: ev.Finished) -> None:
        self.say(f"{node.name} finished {type(machine).__name__} {action.phase} {action.reason}")
        self.finished.append((node.name, action))
        node.machines.pop(machine.migration, None)
        if isinstance(machine, SourceMachine):
            if action.phase is Phase.COMPLETE:
                node.deferred.extend(volume.uuid for volume in machine.volumes)
            elif machine.record.returning:
                origin = node.machines.get(machine.record.origin)
                if origin is not None:
                    self.drive(node, origin, ev.ReturnEnded())

    def start(self, node: Node, options: Options, *, origin: bytes = b"") -> str:
        """`silofs migrate`. "" or why not."""
        volumes = self.volumes
        owners = tuple(node.cache.ownership(volume) for volume in volumes)
        offered = tuple(self._offered(node, volume, origin) for volume in volumes if volume in node.cache.heads)
        if len(offered) < len(volumes) or any(node.gates.get(volume) != "open" for volume in volumes):
            return "not here"
        if blocked(node.machines.values(), volumes):
            return "another migration is not settled"
        remote = sum(node.cache.remote(volume) for volume in volumes)
        try:
            machine, actions = self.source.start(
                migration=self.fresh(b"m"),
                peer=self.other(node).id,
                ownership=owners,
                offered=offered,
                options=options,
                writers=node.writers,
                remote_pages=remote,
                now=self.now,
                origin=origin,
            )
        except SiloError as error:
            return str(error)
        self.say(f"{node.name} starts {machine.migration!r} {options.switchover} {options.mode} origin {origin!r}")
        node.machines[machine.migration] = machine
        self.perform(node, machine, actions)
        if node.session is not None:
            self.drive(node, machine, ev.Connected(node.session, HELLO))
        return ""

    def _offered(self, node: Node, volume: bytes, origin: bytes) -> ms.Offered:
        head = node.cache.heads[volume]
        chain = node.cache.chain(head.parent)
        if origin:
            record = node.cache.migrations[origin]
            chain = [top.base for top in record.heads if top.volume == volume]
        return ms.Offered(volume, "vm", SIZE, 0, tuple(chain))

    # Performing what waits

    def run(self, node: Node, at: int, *, calm: bool = False) -> None:
        machine, action = node.pending.pop(at)
        if node.machines.get(machine.migration) is not machine and not isinstance(action, ev.Commit):
            return
        self.say(f"{node.name} does {type(action).__name__}")
        state = node.cache
        match action:
            case ev.Commit():
                self._commit(node, machine, action, calm)
            case ev.Seal():
                event = self._seal(node, action)
                self.drive(node, machine, event)
            case ev.Freeze():
                self.drive(node, machine, self._freeze(node, action))
            case ev.ServeMap():
                if action.segment.uuid in state.layers and node.session == action.session:
                    part = state.map_part(action.segment, action.first, self.random.randint(1, 3))
                    header = (machine.migration, action.session, machine.volumes)
                    self.send(node, ms.Map(*header, action.request, part))
            case ev.ServePages():
                self._serve(node, machine, action)
            case ev.ComputeDigests() | ev.Verify():
                digests = [state.digest(base.base, b"") for base in action.bases if base.base]
                digests += [state.digest(segment.uuid, segment.parent) for segment in action.segments]
                lost = sum(
                    list(state.flatten(segment.uuid, segment.parent).values()).count(LOST)
                    for segment in action.segments
                )
                self.drive(node, machine, ev.DigestsReady(action.token, tuple(digests), lost))
            case ev.Describe():
                self._describe(node, machine, action)
            case ev.CheckOffer():
                bases = tuple(
                    ms.Base(offered.uuid, newest_common(offered.states, self._complete(node)))
                    for offered in action.offered
                )
                refused = action.returning and not all(base.base for base in bases)
                self.drive(
                    node, machine, ev.OfferChecked(action.token, ms.Refusal.BASE if refused else None, "", bases)
                )
            case ev.CheckPrepare():
                self.drive(node, machine, ev.PrepareChecked(action.token, None))
            case ev.FindMissing():
                pages = state.layers[action.segment].pages if action.segment in state.layers else {}
                missing = sorted(page for page, value in pages.items() if value == REMOTE and page >= action.first)
                runs = tuple(ms.Run(page, 1) for page in missing[:2])
                more = missing[2] if len(missing) > 2 else None
                self.drive(node, machine, ev.MissingPages(action.token, action.segment, runs, more))
            case ev.StartReturn():
                if not isinstance(machine, TargetMachine) or not machine.may_return:
                    return
                refused_ = self.start(node, Options(), origin=machine.migration)
                self.drive(node, machine, ev.ReturnEnded() if refused_ else ev.ReturnStarted())
            case _:
                raise AssertionError(action)

    def _complete(self, node: Node) -> set[bytes]:
        return {uuid for uuid in node.cache.layers if node.cache.complete(uuid)}

    def _commit(self, node: Node, machine: Machine, action: ev.Commit, calm: bool) -> None:
        roll = 1.0 if calm else self.random.random()
        if action.record is not None and action.record.side is Side.TARGET:
            stored = node.cache.migrations.get(action.record.id)
            if stored is None or stored.bases != action.record.bases:
                bases = {base.base for base in action.record.bases} - {b""}
                if not bases <= self._complete(node):
                    self.drive(node, machine, ev.CommitFailed(action.token, ms.Refusal.BASE))
                    return
        applied = node.cache.apply(action)
        current = node.machines.get(machine.migration) is machine
        if roll < self.failures:
            landed = self.random.random() < 0.5 if self.landed is None else self.landed
            if landed:  # its outcome is not known: it is there, but not synced
                self._check_change(node, node.cache, applied)
                node.cache = applied
            self.say(f"{node.name} commit fails")
            if current:
                self.drive(node, machine, ev.CommitFailed(action.token))
            return
        self._check_change(node, node.cache, applied)
        node.cache = node.disk = applied
        self._now_synced(node)
        for owner in action.ownership:
            gate = "open" if owner.role is Role.OWNER else "shut"
            if not (gate == "open" and node.gates.get(owner.uuid) == "frozen"):
                node.gates[owner.uuid] = gate
        if getattr(machine, "serves_anyway", False):  # a mutant's
            node.gates.update((volume.uuid, "open") for volume in machine.volumes)
        for migration in action.drop:
            if migration != machine.migration:
                node.machines.pop(migration, None)
        if current:
            self.drive(node, machine, ev.Committed(action.token))
            self._origins(node)

    def _origins(self, node: Node) -> None:
        for machine in list(node.machines.values()):
            if isinstance(machine, SourceMachine):
                origin = node.machines.get(machine.record.origin)
                if origin is None or not origin.unsettled:
                    self.drive(node, machine, ev.OriginSettled())

    def _now_synced(self, node: Node) -> None:
        for volume in self.volumes:
            if node.disk.ownership(volume).role in (Role.OWNER, Role.CEDED) and node.gates.get(volume) != "shut":
                self.synced[volume] = dict(self.acked[volume])

    def _seal(self, node: Node, action: ev.Seal | ev.Freeze) -> ev.Sealed:
        segments: list[ms.Segment] = []
        for above in action.volumes:
            node.cache = node.cache.seal(above.volume, self.fresh(b"r"))
            top = node.cache.heads[above.volume].parent
            segments += node.cache.segments(above.volume, top, above.above, action.round, action.snapshots)
        node.disk = node.cache
        self._now_synced(node)
        named = tuple(
            ms.SnapshotInfo(above.volume, name, uuid, SIZE, 0)
            for above in action.volumes
            for name, uuid in node.cache.snapshots.get(above.volume, {}).items()
            if action.snapshots
        )
        offered = tuple(ms.Offered(above.volume, "vm", SIZE, 0, ()) for above in action.volumes)
        return ev.Sealed(action.token, tuple(segments), named, offered)

    def _freeze(self, node: Node, action: ev.Freeze) -> ev.Frozen:
        sealed = self._seal(node, action)
        tops = {above.volume: node.cache.heads[above.volume].parent for above in action.volumes}
        maps = [
            node.cache.map_part(segment, 0, self.random.choice((1, 8)))
            for segment in sealed.segments
            if segment.uuid in tops.values() and self.random.random() < 0.8
        ]
        heads = tuple(ms.Base(volume, top) for volume, top in tops.items())
        return ev.Frozen(
            action.token,
            sealed.segments,
            sealed.snapshots,
            sealed.offered,
            heads,
            tuple(7 for _ in heads),
            tuple(maps),
            node.writers,
        )

    def _serve(self, node: Node, machine: Machine, action: ev.ServePages) -> None:
        if node.session != action.session or action.segment.uuid not in node.cache.layers:
            return
        content = node.cache.flatten(action.segment.uuid, action.segment.parent)
        wanted = [(page, content[page]) for run in action.runs for page in range(run.first, run.end)]
        for page, value in wanted:
            assert value > 0 or value == LOST, f"page {page} is asked for where there is none to send"
            self.sent_pages[(node.name, action.segment.uuid, page)] += 1
        lane = self.lanes[self.other(node).name]
        cut = self.random.randint(0, len(wanted))
        for part, last in ((wanted[:cut], False), (wanted[cut:], True)):
            if part or last:
                lane.append(
                    Bulk(action.session, machine.migration, action.segment.uuid, action.request, tuple(part), last)
                )

    def bulk(self, node: Node, frame: Bulk) -> None:
        machine = node.machines.get(frame.migration)
        runs = tuple(ms.Run(page, 1) for page, _ in frame.pages)
        if not isinstance(machine, TargetMachine):
            return
        if not machine.expects(frame.session, frame.request, frame.segment, runs):
            return
        self.say(f"{node.name} <- {len(runs)} pages of {frame.segment!r}")
        node.cache = node.cache.fill(frame.segment, dict(frame.pages))
        if self.random.random() < 0.9:
            node.disk = node.cache
            self._now_synced(node)
        self.drive(node, machine, ev.PagesDurable(frame.session, frame.request, frame.segment, runs, frame.last))

    def _describe(self, node: Node, machine: Machine, action: ev.Describe) -> None:
        segments: list[ms.Segment] = []
        bases = {base.volume: base.base for base in action.bases}
        for head in action.heads:
            segments += node.cache.segments(head.volume, head.base, bases[head.volume], 1, bool(action.snapshots))
        self.drive(node, machine, ev.Described(action.token, action.bases, tuple(segments), ()))

    # Life and death

    def crash(self, node: Node, *, power: bool = False) -> None:
        """SIGKILL, or a power cut. A commit that was under way may have landed."""
        if not node.up:
            return
        self.say(f"{node.name} {'power cut' if power else 'crash'}")
        for machine, action in node.pending:
            if isinstance(action, ev.Commit) and self.random.random() < 0.5:
                if node.machines.get(machine.migration) is machine:
                    applied = node.cache.apply(action)
                    self._check_change(node, node.cache, applied)
                    node.cache = applied
                    if power and self.random.random() < 0.5:
                        node.disk = applied
                        self._now_synced(node)
                break
        node.up = False
        node.machines.clear()
        node.pending.clear()
        node.session = None
        node.gates = dict.fromkeys(node.gates, "shut")
        self._clear_wire()
        if power:
            node.cache = node.disk
            for volume in self.volumes:
                if node.cache.ownership(volume).role is Role.OWNER:
                    self._adopt(node, volume)
        self.check()

    def _adopt(self, node: Node, volume: bytes) -> None:
        """A power cut may take what was not synced, and nothing else."""
        left = self.content(node, volume)
        for page, value in self.synced[volume].items():
            if left.get(page, 0) < value and left.get(page) != LOST:
                raise Violation(f"I2 power cut at {node.name}: page {page} is {left.get(page)}, synced was {value}")
        self.acked[volume] = left
        self.synced[volume] = dict(left)

    def restart(self, node: Node) -> None:
        if node.up:
            return
        self.say(f"{node.name} restarts")
        node.up = True
        other = self.other(node)
        if other.session is not None:
            self.disconnect()
        roles = {volume: node.cache.ownership(volume).role for volume in self.volumes}
        node.gates = {volume: "open" if role is Role.OWNER else "shut" for volume, role in roles.items()}
        made: list[tuple[Machine, list[ev.Action]]] = []
        for record in node.cache.migrations.values():
            owners = tuple(node.cache.ownership(volume.uuid) for volume in record.volumes)
            machine: Machine
            if record.side is Side.SOURCE:
                machine, actions = self.source.restore(record, owners, self.now)
            else:
                machine, actions = self.target.restore(record, owners, self.now)
                if record.phase is Phase.PULLING:
                    node.gates.update((volume.uuid, "shut") for volume in record.volumes)
            node.machines[machine.migration] = machine
            made.append((machine, actions))
        for machine, actions in made:
            self.perform(node, machine, actions)
            if isinstance(machine, SourceMachine) and machine.record.origin in node.machines:
                self.drive(node, node.machines[machine.record.origin], ev.ReturnStarted())
        self._origins(node)

    # The checker

    def content(self, node: Node, volume: bytes) -> dict[int, int]:
        """What the owner's guest would read, pages that are at the peer included (I4)."""
        head = node.cache.heads[volume]
        pages: dict[int, int] = {}
        for uuid in reversed(node.cache.chain(head.parent)):
            for page, value in node.cache.layers[uuid].pages.items():
                pages[page] = self._at_peer(node, volume, uuid, page) if value == REMOTE else value
        pages |= head.pages
        return {page: value for page, value in pages.items() if value != 0}

    def _at_peer(self, node: Node, volume: bytes, segment: bytes, page: int) -> int:
        """The remote page's value, from the one that must have it, durably and pinned (I4, I9)."""
        peer = self.other(node)
        mine = node.cache.ownership(volume)
        for state in (peer.cache, peer.disk):
            theirs = state.ownership(volume)
            if theirs.role is not Role.CEDED or theirs.epoch != mine.epoch:
                raise Violation(f"I4 missing pages have no source: peer is {theirs.role}({theirs.epoch})")
            record = state.migrations.get(mine.migration)
            found = None
            if record is not None:
                found = next((s for s in record.segments if s.uuid == segment), None)
            if record is None or found is None or theirs.peer != node.id:
                raise Violation(f"I9 {peer.name} holds no pin of {segment!r} for {node.name}")
            value = state.flatten(found.uuid, found.parent).get(page)
            if value is None or (value <= 0 and value != LOST):
                raise Violation(f"I4 page {page} of {segment!r} is not at the peer")
        assert value is not None
        return value

    def check(self) -> None:
        """I1-I5, I7, I9 after every step."""
        for volume in self.volumes:
            owners = []
            for node in self.nodes:
                roles = (node.cache.ownership(volume).role, node.disk.ownership(volume).role)
                if Role.OWNER in roles:
                    owners.append(node)
                key = (node.name, volume)
                epoch = node.disk.ownership(volume).epoch
                if epoch < self.disk_epochs.get(key, 0):
                    raise Violation(f"I3 the epoch of {node.name} fell from {self.disk_epochs[key]} to {epoch}")
                self.disk_epochs[key] = epoch
                for state in (node.cache, node.disk):
                    record = state.ownership(volume)
                    if record.role is Role.OWNER:
                        first = self.epoch_owner.setdefault((volume, record.epoch), node.name)
                        if first != node.name:
                            raise Violation(f"I3 epoch {record.epoch} has two owners")
                if node.up and node.gates.get(volume) == "open" and roles != (Role.OWNER, Role.OWNER):
                    raise Violation(f"I1 {node.name} admits writes as {roles}")
            if len(owners) > 1:
                raise Violation("I1 two owners, now or after a power cut")
            for node in owners:
                if node.cache.ownership(volume).role is Role.OWNER:
                    content = self.content(node, volume)
                    if content != self.acked[volume]:
                        raise Violation(f"I2 {node.name} has {content}, acknowledged was {self.acked[volume]}")

    def _check_change(self, node: Node, old: State, new: State) -> None:
        """I3, I5, I7 of one transaction."""
        peer = self.other(node)
        for volume in self.volumes:
            was, now = old.ownership(volume), new.ownership(volume)
            if now.epoch < was.epoch:
                raise Violation(f"I3 {node.name}: epoch falls from {was.epoch} to {now.epoch}")
            if now.role is Role.OWNER and was.role is not Role.OWNER:
                theirs = peer.disk.ownership(volume)
                if theirs.role is not Role.CEDED or theirs.epoch != now.epoch or theirs.peer != node.id:
                    raise Violation(f"I5 {node.name} owns at {now.epoch}; the peer is {theirs.role}({theirs.epoch})")
            if now.role is Role.RETIRED and was.role is Role.CEDED:
                theirs = peer.disk.ownership(volume)
                if theirs.role is Role.OWNER and theirs.epoch == now.epoch and peer.disk.remote(volume):
                    raise Violation("I7 the source retires and the owner's disk still misses pages")

    def retire(self, node: Node) -> None:
        """The time of --retain is over: data of a RETIRED volume goes (unless it came back)."""
        volume = node.deferred.pop()
        if node.cache.ownership(volume).role is Role.RETIRED:
            node.cache = node.cache.copy()
            node.cache.heads.pop(volume, None)
            node.cache.snapshots.pop(volume, None)
            node.cache.collect()
            self.say(f"{node.name} deletes retired data")

    # Steps

    def write(self, node: Node) -> None:
        open_ = [volume for volume in self.volumes if node.up and node.gates.get(volume) == "open"]
        if open_:
            volume = self.random.choice(open_)
            page, value = self.random.randrange(PAGES), self.number()
            node.cache = node.cache.write(volume, page, value)
            self.acked[volume] = self.acked[volume] | {page: value}
            self.counts["write"] += 1

    def sync(self, node: Node) -> None:
        if node.up:
            node.disk = node.cache
            self._now_synced(node)

    def snapshot(self, node: Node) -> None:
        for volume in self.volumes:
            source = self.machine(node, SourceMachine)
            free = node.up and node.gates.get(volume) == "open" and (source is None or not source.locked)
            if free and len(node.cache.snapshots[volume]) < 3:
                node.cache = node.cache.seal(volume, self.fresh(b"n"))
                node.cache.snapshots[volume][f"s{self.number()}"] = node.cache.heads[volume].parent

    def tick(self) -> None:
        """Time passes to the next deadline."""
        due = [
            (machine.deadline(), node, machine)
            for node in self.nodes
            for machine in node.machines.values()
            if machine.deadline() is not None
        ]
        if not due:
            self.now += 1.0
            return
        at, node, machine = min(due, key=lambda entry: entry[0] or 0.0)
        assert at is not None
        self.now = max(self.now, at)
        self.say(f"{node.name} tick {type(machine).__name__}")
        self.perform(node, machine, machine.tick(self.now))

    def deliver(self, node: Node) -> bool:
        if node.up and self.wire[node.name]:
            self.receive(node, self.wire[node.name].popleft())
            return True
        return False

    def deliver_bulk(self, node: Node) -> bool:
        if node.up and self.lanes[node.name]:
            self.bulk(node, self.lanes[node.name].popleft())
            return True
        return False

    def progress(self) -> bool:
        """One step without faults; False: nothing but time can happen."""
        for node in self.random.sample(self.nodes, 2):
            if self.deliver(node) or self.deliver_bulk(node):
                break
            if node.pending:
                self.run(node, 0, calm=True)
                break
        else:
            return False
        self.now += 0.001
        self.check()
        return True

    def step(self) -> None:
        """One random step, faults included."""
        r = self.random
        node = r.choice(self.nodes)
        roll = r.random()
        self.now += r.choice((0.0, 0.001, 0.02))
        if r.random() < 0.1:
            self._heal()
        if r.random() < self.hostility:
            self._fault(node, r.random())
        elif roll < 0.50:
            if not self.deliver(node) and node.pending:
                self._some(node)
        elif roll < 0.72:
            if node.pending:
                self._some(node)
        elif roll < 0.84:
            self.deliver_bulk(node)
        elif roll < 0.93:
            self.write(node)
        elif roll < 0.95:
            self.sync(node)
        else:
            self.tick()
        self.check()

    def _some(self, node: Node) -> None:
        """Any of the waiting actions; commits of one machine in their order."""
        at = self.random.randrange(len(node.pending))
        machine, action = node.pending[at]
        if isinstance(action, ev.Commit):
            at = next(i for i, (m, a) in enumerate(node.pending) if m is machine and isinstance(a, ev.Commit))
        self.run(node, at)

    def _heal(self) -> None:
        """What operators and init systems see to: daemons run, peers are connected, somebody migrates."""
        r = self.random
        down = [node for node in self.nodes if not node.up]
        if down:
            self.restart(r.choice(down))
        elif self.a.session is None or self.a.session != self.b.session:
            self.connect()
        elif r.random() < self.returns * 0.5:
            for node in self.nodes:
                target = self.machine(node, TargetMachine)
                if target is not None and target.may_return and not target.held:
                    self.drive(node, target, ev.OperatorCancel())
        elif r.random() < 0.3:
            switchover = r.choice(list(Switchover))
            options = Options(r.choice(list(Mode)), switchover, r.random() < 0.5, r.random() < 0.8)
            self.start(r.choice(self.nodes), options)

    def _fault(self, node: Node, roll: float) -> None:
        r = self.random
        wire = self.wire[node.name]
        if roll < 0.12:
            self.crash(node, power=r.random() < 0.5)
        elif roll < 0.22:
            self.disconnect(silent=r.choice((None, None, *self.nodes)))
        elif roll < 0.26:
            self.connect()
        elif roll < 0.34 and wire:
            wire.popleft()
        elif roll < 0.42 and wire:
            wire.append(r.choice(wire))
        elif roll < 0.54 and self.old:
            name, message = r.choice(self.old)
            target = self.a if name == "A" else self.b
            if target.up and message.session == target.session:
                self.receive(target, message)  # a duplicate, as late as you like
            elif target.up:
                machine = target.machines.get(message.migration)
                if machine is not None:
                    self.drive(target, machine, ev.Received(message))
        elif roll < 0.58 and self.lanes[node.name]:
            self.lanes[node.name].popleft()
        elif roll < 0.62:
            node.writers = r.choice((0, 0, 1))
            for machine in list(node.machines.values()):
                if isinstance(machine, SourceMachine):
                    self.drive(node, machine, ev.Writers(node.writers))
        elif roll < 0.84 and node.up:
            self.operate(node)
        elif roll < 0.92:
            self.snapshot(node)
        elif node.deferred and node.up:
            self.retire(node)

    def operate(self, node: Node) -> None:
        """A command at a random migration of the node."""
        if not node.machines:
            return
        machine = self.random.choice(list(node.machines.values()))
        event: ev.Event = self.random.choice(
            (
                ev.OperatorSwitchover(self.random.random() < 0.7),
                ev.OperatorSwitchover(True),
                ev.OperatorPause(),
                ev.OperatorResume(),
                ev.Demand(self._any_segment(node), ms.Run(self.random.randrange(PAGES), 1)),
            )
        )
        late = machine.phase in (Phase.CEDED, Phase.PULLING)
        if self.random.random() < (self.returns if late else 0.05):
            event = ev.OperatorCancel()
        if isinstance(event, ev.Demand):
            layer = node.cache.layers.get(event.segment)
            if layer is None or layer.pages.get(event.run.first) != REMOTE:
                return
        self.say(f"{node.name} operator {type(event).__name__}")
        self.drive(node, machine, event)

    def _any_segment(self, node: Node) -> bytes:
        return self.random.choice(list(node.cache.layers) or [b""])

    def chaos(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def calm(self, limit: int = 4000) -> None:
        """Faults end: I6."""
        self.failures = 0.0
        for node in self.nodes:
            self.restart(node)
            node.writers = 0
        self.connect()
        for machine in [m for node in self.nodes for m in node.machines.values()]:
            node = next(n for n in self.nodes if n.machines.get(machine.migration) is machine)
            self.drive(node, machine, ev.OperatorResume())
        for _ in range(limit):
            if self.progress():
                continue
            if self.settled():
                return
            for node in self.nodes:
                source = self.machine(node, SourceMachine)
                if source is not None and not source.commanded:
                    self.drive(node, source, ev.OperatorSwitchover(True))
            self.tick()
            self.check()
        raise Violation("I6 no owner with all pages is reached: " + self.describe())

    def settled(self) -> bool:
        """Every volume has an owner with all pages, and no migration is left."""
        if any(node.machines or node.pending for node in self.nodes):
            return False
        for volume in self.volumes:
            roles = [node.cache.ownership(volume).role for node in self.nodes]
            if roles.count(Role.OWNER) != 1:
                raise Violation(f"I6 it ends with {roles}")
            owner = self.nodes[roles.index(Role.OWNER)]
            if owner.cache.remote(volume) or owner.gates.get(volume) != "open":
                raise Violation("I6 it ends with an owner that misses pages or does not serve")
            if owner.cache.migrations:
                raise Violation("I6 it ends with a migration on record")
        return True

    def settled_pair(self) -> bool:
        """No machine is left at either end."""
        return all(node.up and not node.machines for node in self.nodes)

    def until(self, reached: Callable[[], bool], limit: int = 2000) -> None:
        """Steps without faults until `reached`."""
        for _ in range(limit):
            if reached():
                return
            if not self.progress():
                self.tick()
                self.check()
        raise Violation("I6 the state that the test waits for is not reached: " + self.describe())

    def describe(self) -> str:
        return "; ".join(
            f"{node.name}: "
            + ", ".join(f"{type(m).__name__} {getattr(m, 'state', None)}" for m in node.machines.values())
            + f" pending {[type(a).__name__ for _, a in node.pending]}"
            for node in self.nodes
        )
