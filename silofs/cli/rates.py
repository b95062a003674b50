"""What went on between two looks at a daemon's figures, by volume: the rows of `silofs top`. Pure.

A daemon that was replaced in between counts from zero: what it has counted so far is what is known of the interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from silofs.cli.output import table
from silofs.cli.sizes import show_size

Figures = Mapping[str, Any]
Row = dict[str, Any]

RATES: Final = {  # of what is counted, a second
    "read_rate": "read_bytes",
    "write_rate": "written_bytes",
    "read_iops": "reads",
    "write_iops": "writes",
    "flush_iops": "flushes",
}
ENDED: Final = ("complete", "cancelled", "failed")
MIGRATION: Final = ("migration", "volumes", "direction", "peer", "phase", "round", "rate", "bytes_sent", "bytes_left")
HEADERS: Final = ("VOLUME", "READ/s", "WRITE/s", "READS", "WRITES", "FSYNCS", "WAITING", "OPEN", "MIGRATION")
RIGHT: Final = frozenset(range(1, 8))


def between(before: Figures, after: Figures) -> Row:
    """One refresh: volumes by name, what all of them did together, and the migrations that are not over."""
    seconds = max(1e-6, after["monotonic_s"] - before["monotonic_s"])
    same = before["pid"] == after["pid"]
    earlier = {volume["uuid"]: volume for volume in before["volumes"]} if same else {}
    running = [{key: each.get(key) for key in MIGRATION} for each in after["migrations"] if each["phase"] not in ENDED]
    moving = {name: each for each in running for name in each["volumes"]}
    volumes = [
        {
            "name": volume["name"],
            **_rates(earlier.get(volume["uuid"], {}), volume, seconds),
            "waiting_bytes": volume["waiting_bytes"],
            "open_count": volume["open_count"],
            "migration": moving[volume["name"]]["migration"] if volume["name"] in moving else None,
        }
        for volume in after["volumes"]
    ]
    total = {
        **_rates(before["engine"]["served"] if same else {}, after["engine"]["served"], seconds),
        "waiting_bytes": after["waiting_bytes"],
        "open_count": after["daemon"]["open_handles"],
    }
    return {
        "state": after["daemon"]["state"],
        "daemon_pid": after["pid"],
        "interval_seconds": round(seconds, 3),
        "volumes": volumes,
        "total": total,
        "migrations": running,
    }


def _rates(before: Figures, after: Figures, seconds: float) -> Row:
    found: Row = {}
    for name, counted in RATES.items():
        rate = max(0, after[counted] - before.get(counted, 0)) / seconds
        found[name] = int(rate) if name.endswith("_rate") else round(rate, 1)
    return found


def rows(refresh: Row) -> list[Sequence[str]]:
    """The cells of the table: the volumes that do the most first, and the total behind them."""
    moving = {each["migration"]: each for each in refresh["migrations"]}
    busiest = sorted(refresh["volumes"], key=lambda row: (-row["read_rate"] - row["write_rate"], row["name"]))
    cells = [(row["name"], *_cells(row), _move(moving.get(row["migration"]))) for row in busiest]
    return [*cells, ("total", *_cells(refresh["total"]), "")]


def _cells(row: Row) -> Iterable[str]:
    sizes = (show_size(row["read_rate"]), show_size(row["write_rate"]))
    counts = (f"{row[key]:,.0f}" for key in ("read_iops", "write_iops", "flush_iops"))
    return (*sizes, *counts, show_size(row["waiting_bytes"]), str(row["open_count"]))


def _move(migration: Row | None) -> str:
    if migration is None:
        return ""
    way = "to" if migration["direction"] == "out" else "from"
    rate = f" {show_size(migration['rate'])}/s," if migration["rate"] else ""
    return f"{migration['phase']} {way} {migration['peer']},{rate} {show_size(migration['bytes_left'])} left"


def text(refresh: Row) -> str:
    """A plain table."""
    return table(HEADERS, rows(refresh), right=RIGHT)
