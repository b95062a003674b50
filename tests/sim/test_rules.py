"""Hypothesis drives two real machines by rules: it looks for the shortest schedule that breaks an invariant."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from silofs.migrate import events as ev
from silofs.migrate.states import Mode, Options, Phase, Switchover
from tests.sim.world import Node, World

nodes = st.sampled_from("AB")


class TwoHosts(RuleBasedStateMachine):
    """Every rule is one step of tests/sim/world.py."""

    world: World

    @initialize(golden=st.booleans(), volumes=st.integers(1, 2))
    def begin(self, golden: bool, volumes: int) -> None:
        self.world = World(0, volumes=volumes, golden=golden)
        self.world.connect()

    def node(self, name: str) -> Node:
        return self.world.a if name == "A" else self.world.b

    @rule(name=nodes, mode=st.sampled_from(Mode), switchover=st.sampled_from(Switchover), fence=st.booleans())
    def migrate(self, name: str, mode: Mode, switchover: Switchover, fence: bool) -> None:
        if self.node(name).up:
            self.world.start(self.node(name), Options(mode, switchover, fence))

    @rule(steps=st.integers(1, 40))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            if not self.world.progress():
                break

    @rule(name=nodes)
    def deliver(self, name: str) -> None:
        self.world.deliver(self.node(name))

    @rule(name=nodes)
    def deliver_pages(self, name: str) -> None:
        self.world.deliver_bulk(self.node(name))

    @rule(name=nodes, which=st.integers(0, 7))
    def perform(self, name: str, which: int) -> None:
        pending = self.node(name).pending
        if pending:
            machine, action = pending[which % len(pending)]
            first = (entry for entry in pending if entry[0] is machine and isinstance(entry[1], ev.Commit))
            chosen: Any = next(first) if isinstance(action, ev.Commit) else (machine, action)
            self.world.run(self.node(name), pending.index(chosen), calm=True)

    @rule(name=nodes, landed=st.booleans())
    def fail_commit(self, name: str, landed: bool) -> None:
        node = self.node(name)
        at = next((i for i, (_, action) in enumerate(node.pending) if isinstance(action, ev.Commit)), None)
        if at is not None:
            self.world.failures, self.world.landed = 1.0, landed
            self.world.run(node, at)
            self.world.failures, self.world.landed = 0.0, None

    @rule(name=nodes)
    def write(self, name: str) -> None:
        self.world.write(self.node(name))

    @rule(name=nodes)
    def snapshot(self, name: str) -> None:
        self.world.snapshot(self.node(name))

    @rule()
    def wait(self) -> None:
        self.world.tick()

    @rule(name=nodes, power=st.booleans())
    def crash(self, name: str, power: bool) -> None:
        self.world.crash(self.node(name), power=power)

    @rule(name=nodes)
    def restart(self, name: str) -> None:
        self.world.restart(self.node(name))

    @rule(silent=st.sampled_from((None, "A", "B")))
    def disconnect(self, silent: str | None) -> None:
        self.world.disconnect(silent=self.node(silent) if silent else None)

    @rule()
    def connect(self) -> None:
        self.world.connect()

    @rule(name=nodes, at=st.integers(0, 63))
    @precondition(lambda self: self.world.old)
    def replay(self, name: str, at: int) -> None:
        to, message = self.world.old[at % len(self.world.old)]
        if self.node(to).up:
            self.world.receive(self.node(to), message)

    @rule(name=nodes, event=st.sampled_from((ev.OperatorCancel(), ev.OperatorSwitchover(True), ev.OperatorPause())))
    def command(self, name: str, event: ev.Event) -> None:
        for machine in list(self.node(name).machines.values()):
            self.world.drive(self.node(name), machine, event)

    @invariant()
    def safe(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.calm()
            ends = {finished.phase for _, finished in self.world.finished}
            assert ends <= {Phase.COMPLETE, Phase.CANCELLED, Phase.FAILED}


TwoHosts.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, suppress_health_check=list(HealthCheck)
)
TestTwoHosts = TwoHosts.TestCase
