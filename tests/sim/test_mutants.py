"""Negative controls: the checker that passes the real machines must catch every shortcut in mutants.py."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from silofs.migrate.source import SourceMachine
from silofs.migrate.target import TargetMachine
from tests.sim import mutants
from tests.sim.schedules import make, run
from tests.sim.traces import TRACES
from tests.sim.world import Violation

# Which of them a few hundred random schedules find on their own; the others need the script of their trace.
RANDOM = (
    "grant_before_cede",
    "ceded_not_durable",
    "volatile_owner",
    "auto_resume",
    "self_promote",
    "no_freeze",
    "early_complete",
    "no_tombstone",
    "grant_once",
    "maps_later",
    "no_retry",
)


@pytest.mark.parametrize("name", RANDOM)
def test_random_schedules_catch(name: str) -> None:
    with mutants.rule(*mutants.RULES[name]) if name in mutants.RULES else nullcontext():
        for seed in range(600):
            world = make(
                seed,
                source=mutants.SOURCES.get(name, SourceMachine),
                target=mutants.TARGETS.get(name, TargetMachine),
            )
            try:
                run(world)
            except Violation:
                return
    raise AssertionError(f"no schedule catches {name}")


@pytest.mark.parametrize("name", sorted({*mutants.SOURCES, *mutants.TARGETS, *mutants.RULES}))
def test_its_trace_catches(name: str) -> None:
    with (
        mutants.rule(*mutants.RULES[name]) if name in mutants.RULES else nullcontext(),
        pytest.raises(Violation),
    ):
        TRACES[name](mutants.SOURCES.get(name, SourceMachine), mutants.TARGETS.get(name, TargetMachine))


@pytest.mark.parametrize("name", sorted(TRACES))
def test_the_same_trace_on_the_real_machines(name: str) -> None:
    TRACES[name](SourceMachine, TargetMachine)
