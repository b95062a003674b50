"""Demand before hints before the sweep, within credit, and never twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from silofs import limits
from silofs.migrate.messages import Priority, Run
from silofs.migrate.order import Order, split

A, B = b"a" * 16, b"b" * 16


def taken(order: Order, *, sweep: bool = True) -> list[tuple[Priority, bytes, tuple[Run, ...]]]:
    return [(wanted.priority, wanted.segment, wanted.runs) for _, wanted in order.take(sweep=sweep)]


def test_who_waits_goes_first() -> None:
    order = Order()
    order.add(A, [Run(0, 16)], Priority.SWEEP)
    order.add(A, [Run(100, 1)], Priority.HINT)
    order.add(B, [Run(7, 1)], Priority.DEMAND)
    assert [priority for priority, _, _ in taken(order)] == [Priority.DEMAND, Priority.HINT, Priority.SWEEP]
    assert taken(order) == []


def test_demand_passes_when_the_credit_is_used_up() -> None:
    order = Order(window=16)
    order.add(A, [Run(0, 32)], Priority.SWEEP)
    order.add(A, [Run(64, 16)], Priority.SWEEP)
    assert taken(order) == []  # more than the window: waits; a window is never smaller than one PULL in the product
    order = Order(window=256)
    order.add(A, [Run(0, 512)], Priority.SWEEP)
    assert len(taken(order)) == 1 and order.pages_in_flight == 256 and not order.hungry
    order.add(A, [Run(9, 1)], Priority.DEMAND)  # although it is in flight as sweep: that answer may be far behind
    order.add(A, [Run(9, 1)], Priority.DEMAND)
    assert taken(order) == [(Priority.DEMAND, A, (Run(9, 1),))]


def test_credit_comes_back_page_by_page() -> None:
    order = Order(window=256)
    order.add(A, [Run(0, 512)], Priority.SWEEP)
    ((request, wanted),) = order.take(sweep=True)
    assert order.expects(request, A, [Run(3, 2)]) and not order.expects(request, B, [Run(3, 2)])
    assert order.arrived(request, A, [Run(0, 255)], False)
    assert not order.expects(request, A, [Run(3, 2)]), "it has arrived"
    assert list(order.take(sweep=True)) == [] and order.pages_in_flight == 1
    assert order.arrived(request, A, [Run(255, 1)], False)
    assert order.pages_in_flight == 0 and order.flying == 0
    assert not order.arrived(request, A, [Run(0, 1)], True)
    assert len(taken(order)) == 1 and wanted.pages == 256


def test_a_demand_that_ends_short_is_asked_for_again_and_a_sweep_is_found_again() -> None:
    order = Order()
    order.add(A, [Run(0, 4)], Priority.DEMAND)
    order.add(A, [Run(64, 4)], Priority.SWEEP)
    (demand, _), (sweep, _) = order.take(sweep=True)
    order.arrived(demand, A, [Run(0, 2)], True)
    order.arrived(sweep, A, [], True)
    assert order.sweep_idle
    assert taken(order) == [(Priority.DEMAND, A, (Run(2, 2),))]


def test_a_new_session_keeps_what_readers_wait_for() -> None:
    order = Order()
    order.add(A, [Run(0, 4)], Priority.DEMAND)
    order.add(A, [Run(64, 4)], Priority.SWEEP)
    list(order.take(sweep=True))
    order.add(B, [Run(1, 1)], Priority.SWEEP)
    order.reset()
    assert order.pages_in_flight == 0 and order.sweep_idle
    assert taken(order) == [(Priority.DEMAND, A, (Run(0, 4),))]


def test_paused_means_no_sweep() -> None:
    order = Order()
    order.add(A, [Run(0, 4)], Priority.SWEEP)
    assert taken(order, sweep=False) == [] and not order.sweep_idle


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 1000)), max_size=20))
def test_split_loses_nothing_and_keeps_to_the_limits(gaps: list[tuple[int, int]]) -> None:
    at, runs = 0, []
    for gap, count in gaps:
        runs.append(Run(at + gap, count))
        at += gap + count + 1
    batches = list(split(runs))
    assert [page for run in runs for page in range(run.first, run.end)] == [
        page for batch in batches for run in batch for page in range(run.first, run.end)
    ]
    for batch in batches:
        assert 0 < sum(run.count for run in batch) <= limits.PULL_PAGES and len(batch) <= limits.PULL_RUNS_MAX


def test_long_runs_are_cut_between_blocks() -> None:
    assert [batch[0].first % 16 for batch in split([Run(5, 2000)])][1:] == [0] * 7
