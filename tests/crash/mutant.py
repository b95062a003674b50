"""Daemons with a mistake in them, that tests have to notice, and such as do sooner what is rare.

`environment(directory, name)` makes a mount use one. The directory gets a `sitecustomize` (see the module site), which
the daemon's interpreter imports at its start.
"""

from __future__ import annotations

from pathlib import Path

from tests.harness import ROOT

SITE = """
import os, sys

if "silofs.daemon" in sys.orig_argv:
    from tests.crash import mutant

    (mutant.MUTANTS | mutant.VARIANTS)[os.environ["SILOFS_MUTANT"]]()
"""


def environment(directory: Path, name: str) -> dict[str, str]:
    assert name in MUTANTS | VARIANTS
    (directory / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": f"{directory}:{ROOT}", "SILOFS_MUTANT": name}


def hasty_fsync() -> None:
    """An fsync returns when the journal's write has begun."""
    from silofs.layers.journal import Journal

    Journal.write = lambda self, parts: None  # type: ignore[method-assign]


def volatile_journal() -> None:
    """The journal is written, and not synced."""
    import os

    from silofs.layers import journal

    journal._open = lambda path: os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def early_mark() -> None:
    """A commit says that it has everything up to where the log is when it lands, not to where it was cut."""
    import time
    from threading import current_thread

    from silofs.engine.journalling import NONE, Journalling

    class Late:
        def __init__(self, journal: Journalling, number: int) -> None:
            self._log, self.journal = journal._log, number

        @property
        def mark(self) -> object:
            if current_thread().name == "silofs-writer":
                time.sleep(0.05)  # for somebody to write and sync meanwhile
            return self._log.mark()

    entry = Journalling.entry

    def late(self: Journalling, mark: object) -> object:
        right = entry(self, mark)  # type: ignore[arg-type]
        return right if right is NONE else Late(self, right.journal)

    Journalling.entry = late  # type: ignore[method-assign,assignment]


def eager_ahead() -> None:
    """No mistake: what takes 16 MiB of long writes takes a quarter of one, so that a short story has it, too."""
    from silofs.engine import commits

    commits.COMMIT_BYTES, commits.COMMIT_AHEAD_BYTES, commits.AHEAD_BYTES = 1 << 18, 1 << 20, 31 << 12


def unsynced_ahead() -> None:
    """A commit does not wait for what was written ahead of it."""
    from silofs.layers.ahead import Ahead, WritingAhead
    from silofs.layers.cells import CellFile

    eager_ahead()
    write = WritingAhead._write

    def forget(self: WritingAhead, job: object) -> Ahead | None:
        begin = CellFile.begin_sync
        CellFile.begin_sync = lambda self, mark: None  # type: ignore[method-assign]
        try:
            ahead = write(self, job)  # type: ignore[arg-type]
        finally:
            CellFile.begin_sync = begin  # type: ignore[method-assign]
        if ahead is not None:
            ahead.mark = 0
        return ahead

    WritingAhead._write = forget  # type: ignore[method-assign,assignment]


MUTANTS = {each.__name__: each for each in (hasty_fsync, volatile_journal, early_mark, unsynced_ahead)}
VARIANTS = {eager_ahead.__name__: eager_ahead}
