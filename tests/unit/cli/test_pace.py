"""Rate and remaining time, out of reports at made-up times."""

from __future__ import annotations

from silofs.cli.output import progress_line
from silofs.cli.pace import Pace

MIB = 1 << 20


def test_a_steady_pace() -> None:
    pace = Pace()
    assert pace.of({"bytes_done": 0, "bytes_total": 100 * MIB}, 50.0) == {}
    assert pace.of({"bytes_done": MIB, "bytes_total": 100 * MIB}, 50.1) == {}  # too early to tell
    for second in range(1, 60):
        found = pace.of({"bytes_done": second * MIB, "bytes_total": 100 * MIB}, 50.0 + second)
        assert found == {"rate": MIB, "eta_seconds": 100.0 - second}
    assert pace.of({"bytes_done": 60 * MIB}, 110.0) == {"rate": MIB}


def test_what_was_long_ago_does_not_count() -> None:
    pace = Pace()
    for second in range(100):
        pace.of({"bytes_done": second * MIB}, float(second))
    for second in range(100, 110):
        found = pace.of({"bytes_done": 100 * MIB + (second - 100) * 8 * MIB}, float(second))
    assert found["rate"] == 8 * MIB


def test_a_new_stage_begins_anew_and_a_rate_that_is_given_stays() -> None:
    pace = Pace()
    pace.of({"stage": "converting", "bytes_done": 0}, 0.0)
    assert pace.of({"stage": "converting", "bytes_done": MIB}, 1.0) == {"rate": MIB}
    assert pace.of({"bytes_done": 2 * MIB}, 2.0) == {}
    assert pace.of({"bytes_done": 0}, 3.0) == {}
    assert pace.of({"bytes_done": 5, "rate": 7}, 4.0) == {}
    assert pace.of({"steps_done": 5}, 4.0) == {}


def test_how_it_is_drawn() -> None:
    line = progress_line({"bytes_done": MIB, "bytes_total": 4 * MIB, "rate": 1024, "eta_seconds": 3072.0})
    assert line == "1.0 MiB of 4.0 MiB (25 %)  1.0 KiB/s  51:12 left"
    assert progress_line({"bytes_done": 0, "eta_seconds": 7322.4}).endswith("2:02:02 left")
