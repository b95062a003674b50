from __future__ import annotations

from silofs import limits
from silofs.mount.backoff import Backoff


def test_a_single_death_costs_no_delay() -> None:
    backoff = Backoff()
    assert backoff.died(100.0, served_s=5000.0) == 0.0
    assert not backoff.holding


def test_a_loop_is_held_at_doubling_intervals() -> None:
    backoff = Backoff()
    for number in range(limits.CRASH_DEATHS):
        assert backoff.died(number * 0.1, served_s=0.1) == 0.0
    delays = [backoff.died(6.0 + number * 0.1, served_s=0.1) for number in range(8)]
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert backoff.holding


def test_daemons_that_never_serve_are_a_loop_however_slowly_they_die() -> None:
    backoff = Backoff()
    for number in range(limits.CRASH_STARTS):
        assert backoff.died(number * 60.0, served_s=0.0) == 0.0
    assert backoff.died(601.0, served_s=0.0) == limits.CRASH_DELAY_S
    assert backoff.died(602.0, served_s=0.0) == 2 * limits.CRASH_DELAY_S
    assert backoff.holding
    backoff.served()
    assert not backoff.holding
    assert backoff.died(603.0, served_s=0.0) == 0.0


def test_deaths_grow_old() -> None:
    backoff = Backoff()
    for number in range(limits.CRASH_DEATHS * 4):
        assert backoff.died(number * (limits.CRASH_WINDOW_S / limits.CRASH_DEATHS) * 1.1, served_s=0.5) == 0.0


def test_a_daemon_that_served_for_long_starts_a_new_count() -> None:
    backoff = Backoff()
    for number in range(limits.CRASH_DEATHS + 3):
        backoff.died(number * 0.1, served_s=0.1)
    assert backoff.holding
    assert backoff.died(50.0, served_s=limits.CRASH_WINDOW_S + 1) == 0.0
    assert not backoff.holding


def test_a_store_that_cannot_be_opened_is_not_tried_at_once() -> None:
    backoff = Backoff()
    assert backoff.failed() == limits.CRASH_DELAY_S
    assert backoff.failed() == 2 * limits.CRASH_DELAY_S
    assert backoff.holding
    backoff.served()
    assert not backoff.holding


def test_the_delay_has_an_upper_bound() -> None:
    backoff = Backoff()
    assert max(backoff.failed() for _ in range(200)) == limits.CRASH_DELAY_MAX_S


def test_a_death_that_taught_something_does_not_count() -> None:
    backoff = Backoff()
    for number in range(limits.CRASH_DEATHS * 3):
        assert backoff.died(number * 0.1, served_s=0.1) == 0.0
        backoff.learnt()
