"""What the command line prints: data on stdout, everything else on stderr.

With --json a verb prints one object with `"schema": "silofs.<verb>/1"`; a long verb prints one object per line, each
with a `type` (progress, then result or error). Progress is shown on a terminal only, and never with -q, --no-progress
or NO_COLOR.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from silofs.cli.pace import Pace
from silofs.cli.sizes import show_size
from silofs.errors import Busy, Interrupted, SiloError

PROGRESS_INTERVAL_S = 0.1  # a terminal is redrawn no more often
JSON_PROGRESS_INTERVAL_S = 0.5


def default_store() -> Path:
    """$SILOFS_STORE, else /var/lib/silofs for root, else $XDG_DATA_HOME/silofs."""
    named = os.environ.get("SILOFS_STORE")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/silofs")
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "silofs"


@dataclass
class App:
    """One invocation: the verb, where its store is, and how it may talk."""

    verb: str
    store: Path
    json: bool = False
    quiet: bool = False
    no_progress: bool = False
    debug: bool = False
    _pace: Pace = field(default_factory=Pace, repr=False)
    _shown: float = field(default=0.0, repr=False)
    _phase: object = field(default=None, repr=False)
    _drawn: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        global _stream
        _stream = None

    @property
    def schema(self) -> str:
        return f"silofs.{self.verb}/1"

    @property
    def draws(self) -> bool:
        """Whether a progress line may be drawn on stderr."""
        if self.json or self.quiet or self.no_progress or "NO_COLOR" in os.environ:
            return False
        return sys.stderr.isatty()

    def result(
        self, fields: Mapping[str, Any], show: Callable[[], str | None] | None = None, *, long: bool = False
    ) -> None:
        """The verb's one result: as JSON, or as the text that `show` makes (data: printed even with -q)."""
        self.clear()
        if self.json:
            kind = {"type": "result"} if long else {}
            emit({"schema": self.schema, **kind, **{k: v for k, v in fields.items() if k not in ("schema", "type")}})
        elif show is not None:
            text = show()
            if text:
                with writing():
                    print(text)

    def talk_on_stderr(self) -> None:
        """From now on stdout is for the data that the verb itself writes there; JSON goes to stderr."""
        global _stream
        _stream = sys.stderr

    def note(self, text: str) -> None:
        """What was done, for people; not data."""
        if not self.json and not self.quiet:
            self.clear()
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        self.clear()
        print(f"warning: {text}", file=sys.stderr)

    def progress(self, fields: Mapping[str, Any]) -> None:
        """One step of long work, as the daemon or the store reports it."""
        now = time.monotonic()
        fields = {**fields, **self._pace.of(fields, now)}
        if self.json:
            if now - self._shown >= JSON_PROGRESS_INTERVAL_S or fields.get("phase") != self._phase:
                self._shown, self._phase = now, fields.get("phase")
                emit({"schema": self.schema, **fields, "type": "progress"})
        elif self.draws and now - self._shown >= PROGRESS_INTERVAL_S:
            self._shown = now
            self._drawn = True
            print(f"\r\x1b[K{progress_line(fields)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take a drawn progress line off the terminal."""
        if self._drawn:
            self._drawn = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def confirm(self, fact: str, question: str, *, yes: bool = False) -> None:
        """Ask before something is lost. Raises Busy where nobody can be asked, Interrupted when the answer is no."""
        if yes:
            return
        if self.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise Busy(fact, hint="repeat it with --yes to do it without being asked")
        self.clear()
        print(f"{fact}: {question}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Interrupted("nothing was changed", hint="")


_stream: TextIO | None = None  # where JSON goes; None: stdout


class OutputLost(SiloError):
    """What goes to stdout cannot be written there, and neither can the error."""


def close_stdout() -> None:
    """Keep the interpreter from complaining about output that nobody takes."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Around what writes to stdout: an error of that is not one of the store's disk. BrokenPipeError comes through."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        close_stdout()
        hint = "what the command was to do is done; make room where its output goes"
        raise OutputLost(f"the output cannot be written: {error.strerror}", hint=hint) from error


def emit(line: Mapping[str, Any]) -> None:
    with writing():
        print(json.dumps(line, allow_nan=False), file=_stream, flush=True)


def progress_line(fields: Mapping[str, Any]) -> str:
    """One line for a terminal out of whatever a verb reports."""
    done, total = fields.get("bytes_done"), fields.get("bytes_total")
    parts = [str(fields[key]) for key in ("phase", "stage") if fields.get(key)]
    if isinstance(fields.get("steps_total"), int):
        parts.append(f"step {fields['steps_done'] + 1} of {fields['steps_total']}")
    if isinstance(fields.get("round"), int):
        parts.append(f"round {fields['round']}")
    if isinstance(done, int):
        of = f" of {show_size(total)} ({100 * done // max(1, total)} %)" if isinstance(total, int) and total else ""
        parts.append(show_size(done) + of)
    if isinstance(fields.get("bytes_sent"), int):
        parts.append(f"{show_size(fields['bytes_sent'])} sent")
    if isinstance(fields.get("bytes_left"), int):
        parts.append(f"{show_size(fields['bytes_left'])} left")
    if isinstance(fields.get("rate"), int | float):
        parts.append(f"{show_size(int(fields['rate']))}/s")
    if isinstance(fields.get("eta_seconds"), int | float):
        minutes, seconds = divmod(round(fields["eta_seconds"]), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")
    return "  ".join(parts)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: frozenset[int] = frozenset()) -> str:
    """Aligned columns; those whose index is in `right` are set to the right."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(headers))]
    lines = []
    for row in cells:
        line = [c.rjust(w) if at in right else c.ljust(w) for at, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def pairs(fields: Sequence[tuple[str, object]]) -> str:
    """`name  value` lines, the values aligned."""
    width = max((len(name) for name, _ in fields), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in fields)


def report_error(error: SiloError, *, verb: str, as_json: bool) -> None:
    """One line that says what, one that says what to do."""
    if as_json:
        line: dict[str, Any] = {"schema": f"silofs.{verb}/1", "type": "error", "code": error.code}
        emit({**line, "message": error.message, "hint": error.hint})
        return
    print(f"silofs: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
