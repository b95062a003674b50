"""The metrics of a store, out of figures that are given: names, values, labels, and the format."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from silofs import metrics
from tests.exposition import described, golden, parse


def figures() -> dict[str, Any]:
    """Of a daemon that has something to say to each metric."""
    served = {"reads": 5, "read_bytes": 20480, "writes": 3, "written_bytes": 12288, "flushes": 2}
    served |= {"discards": 1, "discarded_bytes": 8192}
    policy = {"steps": 4, "ms": 1500, "longest_us": 9, "failures": 0}
    clean = {**policy, "stored_pages": 20, "live_pages": 10, "backlog_pages": 3, "moved_pages": 7}
    volume = {"name": "vm1", "uuid": "u1", "role": "owner", "virtual_size": 1 << 30, "allocated": 4096}
    return {
        "pid": 7,
        "monotonic_s": 100.0,
        "began": 1700000000.25,
        "waiting_bytes": 4096,
        "daemon": {
            "state": "serving",
            "version": "0.1.0",
            "restarts": 2,
            "deaths": 1,
            "open_handles": 1,
            "requests_refused": 0,
            "handler_bugs": 0,
            "quarantined": ["object 5", "object 6"],
        },
        "store": {
            **dict.fromkeys(("volumes", "snapshots", "layers", "doomed_layers", "commits"), 1),
            **dict.fromkeys(("file_bytes", "used_bytes", "unused_bytes", "free_bytes", "map_bytes"), 8192),
            **dict.fromkeys(("cells_bytes", "free_cells_bytes"), 8192),
            "available_bytes": 8192,
            "commit_us": 1250,
        },
        "space": {
            "held": True,
            "held_bytes": 1,
            "inside_bytes": 2,
            "claimed_bytes": 3,
            "reserve_bytes": 4,
            "full": False,
        },
        "engine": {
            "served": served,
            "reads": {"waited": 2},
            "writes": {"waited": 1},
            "commits": {
                "failures": 0,
                "journal": {"syncs": 2, "in_place": 1, "bytes": 8192, "failures": 0, "absent": None},
            },
            "background": {"clean": clean, "reap": policy},
            "log": {"size": 1 << 20, "used": 4096, "appended": 3},
        },
        "volumes": [{**volume, "open_count": 1, "waiting_bytes": 4096, **served}],
        "peers": {
            "sessions": 1,
            "sessions_begun": 2,
            "listener": {"accepted": 3, "turned_away": 0, "failed": 1, "unauthenticated": 0},
        },
        "migrations": [
            {
                "migration": "m-7f3a",
                "volumes": ["vm1"],
                "direction": "out",
                "peer": "hostb",
                "phase": "precopy",
                "round": 2,
                "rate": 1 << 20,
                "bytes_sent": 1 << 20,
                "bytes_left": 4096,
                "bytes_skipped": 0,
                "pause_ms": 6.5,
                "lost_pages": 0,
            }
        ],
    }


def exposed(figures: dict[str, Any]) -> str:
    return metrics.text(metrics.families(figures)) + "\n"  # print() ends the last line


def test_names_kinds_and_labels_are_as_promised() -> None:
    assert described(parse(exposed(figures()))) == golden()
    assert len({metric.name for metric in metrics.TABLE}) == len(metrics.TABLE)


def test_values_are_in_base_units() -> None:
    found = parse(exposed(figures()))
    assert found["silofs_up"].value() == 1
    assert found["silofs_daemon_start_time_seconds"].value() == 1700000000.25
    assert found["silofs_daemon_state"].value(state="serving") == 1
    assert sum(found["silofs_daemon_state"].samples.values()) == 1
    assert found["silofs_store_commit_seconds_total"].value() == 0.00125
    assert found["silofs_store_quarantined_places"].value() == 2
    assert found["silofs_store_full"].value() == 0
    assert found["silofs_store_live_bytes"].value() == 40960
    assert found["silofs_background_seconds_total"].value(policy="reap") == 1.5
    assert found["silofs_requests_total"].value(kind="flush") == 2
    assert found["silofs_volume_written_bytes_total"].value(volume="vm1") == 12288
    assert found["silofs_volume_role"].value(volume="vm1", role="owner") == 1
    assert found["silofs_migration_phase"].value(migration="m-7f3a", phase="precopy") == 1
    assert found["silofs_migration_pause_seconds"].value(direction="out") == 0.0065
    assert found["silofs_journal_present"].value() == 1


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\\nb", "a,b}", "ä{}", ""])
def test_values_of_labels_are_escaped(name: str) -> None:
    given = figures()
    given["volumes"][0]["name"] = name
    assert parse(exposed(given))["silofs_volume_size_bytes"].value(volume=name) == 1 << 30


def test_a_series_that_would_come_twice_comes_once() -> None:
    given = figures()
    again = copy.deepcopy(given["migrations"][0])
    given["migrations"].append({**again, "bytes_sent": 2 << 20})
    assert parse(exposed(given))["silofs_migration_bytes_total"].value() == 2 << 20


def test_what_is_not_known_is_left_out() -> None:
    """As with the daemon of an earlier program, a store that cannot be read, and a migration that did not pause."""
    given = figures()
    given["store"], given["volumes"], given["daemon"]["deaths"] = None, [], None
    given["migrations"][0]["pause_ms"] = None
    del given["engine"]["served"], given["peers"]["listener"]
    found = parse(exposed(given))
    missing = golden().keys() - found.keys()
    assert {"silofs_daemon_deaths_total", "silofs_requests_total", "silofs_migration_pause_seconds"} < missing
    assert {"silofs_store_commits_total", "silofs_volume_reads_total"} < missing
    assert "silofs_store_held_bytes" in found


def test_without_a_daemon_the_holder_has_its_say() -> None:
    found = parse(exposed({"daemon": {"state": "holding", "restarts": 50, "deaths": 51, "volumes": None}}))
    assert found["silofs_up"].value() == 0
    assert found["silofs_daemon_state"].value(state="holding") == 1
    assert found["silofs_daemon_deaths_total"].value() == 51
    assert set(found) == {
        "silofs_up",
        "silofs_daemon_state",
        "silofs_daemon_restarts_total",
        "silofs_daemon_deaths_total",
    }


def test_json_says_the_same() -> None:
    found = metrics.families(figures())
    as_json = metrics.fields(found)
    assert as_json.keys() == golden().keys()
    reads = as_json["silofs_volume_reads_total"]
    assert (reads["type"], reads["samples"]) == ("counter", [{"labels": {"volume": "vm1"}, "value": 5}])


@pytest.mark.parametrize(
    "spoilt",
    [
        "silofs_up 1\n",  # no TYPE
        "# HELP a b\n# TYPE a gauge\na 1",  # no end
        "# HELP a b\n# TYPE a gauge\na 1\na 1\n",
        "# HELP a b\n# TYPE a counter\na 1\n",
        '# HELP a b\n# TYPE a gauge\na{x="\\y"} 1\n',
        '# HELP a b\n# TYPE a gauge\na{x="1",} 1\n',
        "# HELP a b\n# TYPE a gauge\na None\n",
        "# HELP a b\n# TYPE a gauge\n",
    ],
)
def test_the_reader_of_these_tests_is_strict(spoilt: str) -> None:
    with pytest.raises(AssertionError):
        parse(spoilt)
