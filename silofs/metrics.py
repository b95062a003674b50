"""The metrics of a store: what each is called, what it means, and where it is among the figures of a daemon. Pure.

`TABLE` is the whole list. Names are a contract, as those of the command line are: dashboards and alerts rely on them.
They follow Prometheus' conventions: base units (seconds, bytes), `_total` for what only rises while one daemon lives.
A daemon counts from zero; whoever computes rates knows that a counter which falls has begun anew.

Figures that are not there give no sample: an earlier daemon has fewer of them, and while there is no daemon only the
holder says anything. docs/metrics.md has the page for operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

Figures = Mapping[str, Any]
Labels = dict[str, str]
Sample = tuple[Labels, float]
Reader = Callable[[Figures], Iterator[Sample]]

DAEMON_STATES: Final = ("starting", "serving", "holding", "readonly", "stopping")
PAGE: Final = 4096


@dataclass(frozen=True)
class Metric:
    """One name, its kind (`gauge` or `counter`), and what it means in a sentence."""

    name: str
    kind: str
    help: str
    read: Reader


@dataclass(frozen=True)
class Family:
    """A metric with what was found of it."""

    metric: Metric
    samples: list[Sample]


def families(figures: Figures) -> list[Family]:
    """All metrics of which these figures say anything, in the order of the table."""
    found = []
    for metric in TABLE:
        # By labels: a series that came twice would spoil the whole scrape.
        samples = {tuple(labels.items()): (labels, value) for labels, value in metric.read(figures)}
        if samples:
            found.append(Family(metric, list(samples.values())))
    return found


# How they are read


def _at(figures: Any, path: str) -> Any:
    """What is at `a.b.c`; None when anything on the way is missing."""
    for key in path.split("."):
        figures = figures.get(key) if isinstance(figures, Mapping) else None
    return figures


def _one(path: str, *, times: int = 1, per: int = 1, **labels: str) -> Reader:
    """The number at `path`, brought to base units. A truth is 1 or 0, a list counts its items."""

    def read(figures: Figures) -> Iterator[Sample]:
        value = _at(figures, path)
        if isinstance(value, list):
            value = len(value)
        if isinstance(value, int | float):
            yield labels, (value / per if per > 1 else value * times)

    return read


def _several(*readers: Reader) -> Reader:
    return lambda figures: (sample for read in readers for sample in read(figures))


def _each(path: str, labels: Mapping[str, str], key: str, *, per: int = 1) -> Reader:
    """One sample for each thing in the list at `path`; `labels` says by which of its fields it is told from others."""
    value = _one(key, per=per)

    def read(figures: Figures) -> Iterator[Sample]:
        for each in _at(figures, path) or ():
            own = {label: str(each.get(field)) for label, field in labels.items()}
            yield from ((own, found) for _, found in value(each))

    return read


VOLUME: Final = {"volume": "name"}
MIGRATION: Final = {"migration": "migration", "direction": "direction", "peer": "peer"}


def _volume(key: str) -> Reader:
    return _each("volumes", VOLUME, key)


def _migration(key: str, *, per: int = 1) -> Reader:
    return _each("migrations", MIGRATION, key, per=per)


def _named(path: str, labels: Mapping[str, str]) -> Reader:
    """1 for each thing in the list at `path`, with what it is among its labels."""

    def read(figures: Figures) -> Iterator[Sample]:
        for each in _at(figures, path) or ():
            yield {label: str(each.get(field)) for label, field in labels.items()}, 1

    return read


def _policy(key: str, *, per: int = 1) -> Reader:
    """One sample for each policy of background work."""
    value = _one(key, per=per)

    def read(figures: Figures) -> Iterator[Sample]:
        for policy, own in (_at(figures, "engine.background") or {}).items():
            yield from (({"policy": policy}, found) for _, found in value(own))

    return read


def _clean(key: str) -> Reader:
    """Pages that the cleaner counts, in bytes."""
    return _one(f"engine.background.clean.{key}", times=PAGE)


def _state(figures: Figures) -> Iterator[Sample]:
    now = _at(figures, "daemon.state")
    if now is not None:
        yield from (({"state": state}, int(state == now)) for state in DAEMON_STATES)


def _up(figures: Figures) -> Iterator[Sample]:
    yield {}, int("pid" in figures)


def _info(figures: Figures) -> Iterator[Sample]:
    version = _at(figures, "daemon.version")
    if version is not None:
        yield {"version": str(version)}, 1


def _journal(figures: Figures) -> Iterator[Sample]:
    journal = _at(figures, "engine.commits.journal")
    if journal is not None:
        yield {}, int(journal.get("absent") is None)


def _gauge(name: str, help: str, read: Reader) -> Metric:
    return Metric(f"silofs_{name}", "gauge", help, read)


def _counter(name: str, help: str, read: Reader) -> Metric:
    return Metric(f"silofs_{name}_total", "counter", help, read)


TABLE: Final = (
    # The daemon
    _gauge("up", "Whether a daemon answered.", _up),
    _gauge("info", "The version of the daemon; always 1.", _info),
    _gauge("daemon_state", "1 for the state that the daemon is in.", _state),
    _gauge("daemon_start_time_seconds", "When this daemon began to serve, since 1970.", _one("began")),
    _counter("daemon_restarts", "Daemons that took over since the mount.", _one("daemon.restarts")),
    _counter("daemon_deaths", "Daemons that ended unasked since the mount.", _one("daemon.deaths")),
    _gauge("open_files", "Open handles of the mount.", _one("daemon.open_handles")),
    _counter(
        "requests",
        "Requests served through the mount, of volumes and snapshots.",
        _several(
            *(
                _one(f"engine.served.{key}", kind=kind)
                for key, kind in (("reads", "read"), ("writes", "write"), ("flushes", "flush"), ("discards", "discard"))
            )
        ),
    ),
    _counter(
        "requests_waited",
        "Reads that had to wait for the disk or a peer, and writes that had to wait for room, a freeze or a peer.",
        _several(_one("engine.reads.waited", kind="read"), _one("engine.writes.waited", kind="write")),
    ),
    _counter("requests_refused", "Requests that were answered with an error.", _one("daemon.requests_refused")),
    _counter("request_bugs", "Requests that were answered with EIO by a bug of silofs.", _one("daemon.handler_bugs")),
    # The store
    _gauge("store_volumes", "Volumes.", _one("store.volumes")),
    _gauge("store_snapshots", "Named snapshots.", _one("store.snapshots")),
    _gauge("store_layers", "Layers.", _one("store.layers")),
    _gauge("store_doomed_layers", "Layers that are being removed.", _one("store.doomed_layers")),
    _gauge("store_file_bytes", "Length of the data file.", _one("store.file_bytes")),
    _gauge("store_used_bytes", "Up to where the data file is in use.", _one("store.used_bytes")),
    _gauge("store_unused_bytes", "Free inside the data file, and used again.", _one("store.unused_bytes")),
    _gauge("store_cells_bytes", "Blocks of the file of cells.", _one("store.cells_bytes")),
    _gauge("store_free_cells_bytes", "Of these what no object is in, used again.", _one("store.free_cells_bytes")),
    _gauge("store_free_bytes", "Free on the file system of the store.", _one("store.free_bytes")),
    _gauge("store_available_bytes", "What can still be written, as statfs(2) says.", _one("store.available_bytes")),
    _gauge("store_map_bytes", "Address space of the memory map.", _one("store.map_bytes")),
    _gauge("store_held_bytes", "Allocated behind the data file for writes to come.", _one("space.held_bytes")),
    _gauge("store_inside_bytes", "Counted on inside the file of a full store.", _one("space.inside_bytes")),
    _gauge("store_claimed_bytes", "Set aside for writes that are not committed yet.", _one("space.claimed_bytes")),
    _gauge("store_reserve_bytes", "Kept for deletion and cleaning.", _one("space.reserve_bytes")),
    _gauge("store_full", "Whether the file system gave nothing more the last time.", _one("space.full")),
    _gauge("store_quarantined_places", "Places of the store that its disk cannot give.", _one("daemon.quarantined")),
    _gauge("store_live_bytes", "Pages in objects that are in use.", _clean("live_pages")),
    _gauge("store_stored_bytes", "Pages in objects.", _clean("stored_pages")),
    _counter("store_commits", "Transactions of the store that changed something.", _one("store.commits")),
    _counter("store_commit_seconds", "Time that they took to be made durable.", _one("store.commit_us", per=1_000_000)),
    _counter("store_commit_failures", "Commits that failed, and were tried again.", _one("engine.commits.failures")),
    _gauge("journal_present", "Whether an fsync need not be a commit.", _journal),
    _counter("journal_syncs", "Writes to the journal, each with its sync.", _one("engine.commits.journal.syncs")),
    _counter("journal_syncs_in_place", "Those while their client was alone.", _one("engine.commits.journal.in_place")),
    _counter("journal_written_bytes", "Bytes that went to the journal.", _one("engine.commits.journal.bytes")),
    _counter("journal_failures", "Journals that could not be written to.", _one("engine.commits.journal.failures")),
    _counter("background_steps", "Steps of background work that changed something.", _policy("steps")),
    _counter("background_seconds", "Time that they took.", _policy("ms", per=1000)),
    _gauge("background_failures", "Steps in a row that failed.", _policy("failures")),
    _gauge("background_backlog_bytes", "What the cleaner should move.", _clean("backlog_pages")),
    _counter("background_moved_bytes", "What the cleaner moved.", _clean("moved_pages")),
    # The write log
    _gauge("log_size_bytes", "Size of the write log's ring.", _one("engine.log.size")),
    _gauge("log_used_bytes", "How much of it is in use.", _one("engine.log.used")),
    _gauge("log_waiting_bytes", "Bytes acknowledged that are not in the store yet.", _one("waiting_bytes")),
    _counter("log_records", "Records appended.", _one("engine.log.appended")),
    # Volumes
    _gauge("volume_role", "1 for the part that this store has in it.", _named("volumes", VOLUME | {"role": "role"})),
    _gauge("volume_size_bytes", "Virtual size.", _volume("virtual_size")),
    _gauge("volume_allocated_bytes", "Pages that hold data, as of the last commit.", _volume("allocated")),
    _gauge("volume_open_files", "Open handles.", _volume("open_count")),
    _gauge("volume_waiting_bytes", "Bytes written that are not in the store yet.", _volume("waiting_bytes")),
    _counter("volume_reads", "Reads served.", _volume("reads")),
    _counter("volume_read_bytes", "Bytes of them.", _volume("read_bytes")),
    _counter("volume_writes", "Writes served.", _volume("writes")),
    _counter("volume_written_bytes", "Bytes of them.", _volume("written_bytes")),
    _counter("volume_flushes", "fsync(2) and fdatasync(2) calls served.", _volume("flushes")),
    _counter("volume_discards", "Ranges that were punched or zeroed.", _volume("discards")),
    _counter("volume_discarded_bytes", "Bytes of them.", _volume("discarded_bytes")),
    # Peers and migrations
    _gauge("peers_connected", "Peers that have a session with this store.", _one("peers.sessions")),
    _counter("peer_sessions", "Sessions with peers that began.", _one("peers.sessions_begun")),
    _counter(
        "listener_connections",
        "Connections to the port for peers.",
        _several(*(_one(f"peers.listener.{key}", outcome=key) for key in ("accepted", "turned_away", "failed"))),
    ),
    _gauge(
        "migration_phase",
        "1 for the phase that it is in, or ended in.",
        _named("migrations", MIGRATION | {"phase": "phase"}),
    ),
    _gauge("migration_round", "Rounds of pre-copy begun.", _migration("round")),
    _counter("migration_bytes", "Page bytes sent, or at a destination received.", _migration("bytes_sent")),
    _gauge("migration_left_bytes", "Page bytes that have not gone over yet.", _migration("bytes_left")),
    _gauge("migration_skipped_bytes", "Page bytes that the destination had.", _migration("bytes_skipped")),
    _gauge("migration_pause_seconds", "Freeze to first write at the destination.", _migration("pause_ms", per=1000)),
    _gauge("migration_lost_pages", "Pages that could not be read at the source.", _migration("lost_pages")),
)


# How they are shown


def text(found: Iterable[Family]) -> str:
    """The text exposition format, version 0.0.4."""
    lines: list[str] = []
    for family in found:
        metric = family.metric
        lines.append(f"# HELP {metric.name} {_escaped(metric.help)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for labels, value in family.samples:
            inside = ",".join(f'{name}="{_quoted(label)}"' for name, label in labels.items())
            lines.append(f"{metric.name}{{{inside}}} {value!r}" if inside else f"{metric.name} {value!r}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')


def fields(found: Iterable[Family]) -> dict[str, Any]:
    """The same as JSON: by name."""
    return {
        family.metric.name: {
            "type": family.metric.kind,
            "help": family.metric.help,
            "samples": [{"labels": labels, "value": value} for labels, value in family.samples],
        }
        for family in found
    }
