"""System calls of a daemon that fail while it runs: strace(1) attaches to it and tampers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.harness import Mount


@contextmanager
def injected(mount: Mount, calls: str, fault: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Calls (strace's names) on files of the store, by default data file and journal, fail as `fault` says."""
    pid = int(mount.status()["daemon_pid"])
    below = files or [mount.store / "data" / "data.mdb", *(mount.store / "journal").glob("*")]
    paths = [word for path in below for word in ("-P", str(path))]
    command = ["strace", "-f", "-p", str(pid), "-o", "/dev/null", *paths]
    command += ["-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        try:
            said = strace.stderr.readline()
            assert "attached" in said, said
            yield
        finally:
            strace.terminate()
            strace.stderr.read()
