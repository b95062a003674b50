"""`silofs top`: what is worked out of two looks at a daemon, and what is printed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest

from silofs.cli import rates
from silofs.control import Call
from silofs.errors import TryAgain
from tests.unit.cli.commands import Silofs, daemon
from tests.unit.test_metrics import figures

Fields = dict[str, Any]


def later(before: Fields, seconds: float = 2.0, **volume: int) -> Fields:
    """The figures after so long, with so much more counted of vm1."""
    after = copy.deepcopy(before)
    after["monotonic_s"] += seconds
    for key, more in volume.items():
        after["volumes"][0][key] += more
        after["engine"]["served"][key] += more
    return after


def test_rates_are_over_the_time_between() -> None:
    before = figures()
    found = rates.between(before, later(before, read_bytes=81920, reads=20, flushes=3))
    assert found["interval_seconds"] == 2.0
    (row,) = found["volumes"]
    assert (row["name"], row["read_rate"], row["read_iops"], row["flush_iops"]) == ("vm1", 40960, 10.0, 1.5)
    assert (row["write_rate"], row["write_iops"], row["waiting_bytes"], row["open_count"]) == (0, 0.0, 4096, 1)
    assert {key: found["total"][key] for key in rates.RATES} == {key: row[key] for key in rates.RATES}


def test_what_a_new_daemon_has_counted_is_of_this_interval() -> None:
    before = figures()
    after = later(before)
    after["pid"] += 1
    after["volumes"][0]["read_bytes"] = after["engine"]["served"]["read_bytes"] = 8192  # less than before
    found = rates.between(before, after)
    assert (found["volumes"][0]["read_rate"], found["total"]["read_rate"]) == (4096, 4096)


def test_a_volume_of_the_same_name_is_not_the_one_that_was_removed() -> None:
    before = figures()
    after = later(before)
    after["volumes"][0] |= {"uuid": "u2", "writes": 1, "written_bytes": 4096}
    row = rates.between(before, after)["volumes"][0]
    assert (row["write_iops"], row["write_rate"]) == (0.5, 2048)


def test_migrations_that_are_over_are_not_shown() -> None:
    before = figures()
    found = rates.between(before, later(before))
    assert found["volumes"][0]["migration"] == found["migrations"][0]["migration"] == "m-7f3a"
    assert "precopy to hostb, 1.0 MiB/s, 4.0 KiB left" in rates.text(found)
    for phase in rates.ENDED:
        before["migrations"][0]["phase"] = phase
        found = rates.between(before, later(before))
        assert (found["volumes"][0]["migration"], found["migrations"]) == (None, [])


def test_the_busiest_come_first_and_the_total_last() -> None:
    before = figures()
    before["volumes"] += [{**before["volumes"][0], "name": name, "uuid": name} for name in ("b", "a")]
    after = later(before, seconds=1.0)
    after["volumes"][1]["written_bytes"] += 5 << 20
    lines = rates.text(rates.between(before, after)).splitlines()
    assert [line.split()[0] for line in lines] == ["VOLUME", "b", "a", "vm1", "total"]
    assert lines[1].split()[3:5] == ["5.0", "MiB"]
    assert len({len(line.rstrip()) for line in lines[2:3]}) == 1


def test_without_a_daemon(silofs: Silofs) -> None:
    assert silofs.fails(1, "top")["code"] == "no_daemon"
    for wrong in ("0", "99ms", "2h", "x"):
        assert silofs.fails(2, "top", "--interval", wrong)["code"] == "invalid"


def test_one_refresh(silofs: Silofs) -> None:
    looks = [figures(), later(figures(), read_bytes=8192)]

    async def statistics(args: Fields, call: Call) -> Fields:
        return looks.pop(0)

    with daemon(silofs.store, {"statistics": statistics}):
        shown = silofs.ok("top", "--once", "--interval", "100ms")
    assert (shown["schema"], shown["state"], shown["daemon_pid"]) == ("silofs.top/1", "serving", 7)
    assert shown["volumes"][0]["read_rate"] == 4096


def test_off_a_terminal_top_prints_one_plain_table(silofs: Silofs) -> None:
    async def statistics(args: Fields, call: Call) -> Fields:
        return figures()

    with daemon(silofs.store, {"statistics": statistics}):
        done = silofs("top", "--interval", "0.1")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == ["VOLUME", "vm1", "total"]


def test_a_stream_of_refreshes_outlives_a_daemon_that_is_replaced(silofs: Silofs) -> None:
    looks: list[Fields | Exception | type[BaseException]] = [figures(), TryAgain("not now"), later(figures())]

    async def statistics(args: Fields, call: Call) -> Fields:
        look = looks.pop(0) if looks else KeyError("the test is over")
        if isinstance(look, dict):
            return look
        raise look

    with daemon(silofs.store, {"statistics": statistics}):
        done = silofs("top", "--json", "--interval", "0.1")
    refresh, error = done.lines
    assert refresh["interval_seconds"] == 2.0
    assert "not now" in done.err
    assert (done.code, error["type"]) == (1, "error")


@pytest.mark.parametrize("heavy", ["rich", "trio", "lmdb", "numpy"])
def test_what_other_verbs_need_not_is_not_imported(heavy: str) -> None:
    program = f"""
import sys
from silofs.cli import verbs
for name in ("ls", "metrics", "top", "status"):
    assert verbs.Lazy("x").get_command(None, name)
assert {heavy!r} not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_json_of_a_refresh_is_plain() -> None:
    found = rates.between(figures(), later(figures()))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
