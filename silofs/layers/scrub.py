"""`check` in a process of its own, because LMDB ends the process that meets certain damage.

A cursor that steps onto a page of the wrong type fails an assertion of LMDB's (SIGABRT), and a page that the disk
cannot read is a SIGBUS. The process that serves volumes must not die of looking for damage, so a child looks; what it
died of is a finding as well. The child only reads: it sees the newest commit at the moment when it begins. What the
medium cannot give goes into quarantine (quarantine.py), as when a daemon dies of it, and another child begins anew.

The child is of the program as it is installed, which need not be the one that asks: so a store of an earlier version is
looked at as it is, and the child says first which version of the format it knows, if it is asked. One that does not is
an earlier program's, and what it would find is not believed.

The child's output is msgpack: ("format", version), ("step", done, total), ("finding", code, message, volume, layer,
page), then ("counted", volumes, layers).
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from silofs.errors import StoreError
from silofs.layers.check import Finding, check
from silofs.layers.directory import DATA_DIRECTORY
from silofs.layers.environment import DATA_FILE, Environment
from silofs.layers.format import read_format
from silofs.layers.memfd import SLOT
from silofs.layers.notes import Notes
from silofs.layers.quarantine import learn
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import FORMAT_VERSION
from silofs.limits import NOTES_MAX

log = logging.getLogger(__name__)

LENGTH: Final = 4
ASKS_FORMAT: Final = "--format"  # the child says first which it knows; an earlier program's does not know that


class Scrubbed(NamedTuple):
    """What a check found, and how much there was to check (0 when the child did not get so far)."""

    findings: list[Finding]
    volumes: int
    layers: int


def scrub(store: Path, *, read_data: bool = False, progress: Callable[[int, int], None] | None = None) -> Scrubbed:
    """Check the store in a child. An exception of `progress` ends the child and comes out here."""
    fd = os.memfd_create("notes", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, NOTES_MAX * SLOT)
        with mmap.mmap(fd, 0) as area:
            while True:
                found, status = _scrub(store, fd, read_data, progress)
                if status != -signal.SIGBUS or not _learn(store, area):
                    return found
    finally:
        os.close(fd)


def _learn(store: Path, area: mmap.mmap) -> list[str]:
    """What a child died of, as far as it was not known before."""
    with memoryview(area) as view:
        notes = Notes(view)
        try:
            places = learn(store, store / DATA_DIRECTORY / DATA_FILE, notes)
        finally:
            notes.release()
    for place in places:
        log.error("%s: it is left alone from now on", place)
    return places


def _scrub(
    store: Path, notes: int, read_data: bool, progress: Callable[[int, int], None] | None
) -> tuple[Scrubbed, int]:
    """One child, and how it ended."""
    command = [sys.executable, "-P", "-m", __name__, str(store), str(notes), ASKS_FORMAT]
    command += ["--read-data"] if read_data else []
    findings: list[Finding] = []
    volumes = layers = 0
    done = total = 0
    complete = known = False
    with (
        tempfile.TemporaryFile() as complaints,
        # A group of its own: ^C is for the caller, which ends the child itself.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            process_group=0,
            pass_fds=(notes,),
        ) as child,
    ):
        assert child.stdout is not None
        try:
            while len(head := child.stdout.read(LENGTH)) == LENGTH:
                body = child.stdout.read(int.from_bytes(head, "little"))
                kind, *fields = msgspec.msgpack.decode(body)
                known = known or (kind == "format" and fields == [FORMAT_VERSION])
                if not known:
                    hint = "silofs restart, then again"
                    raise StoreError("the installed silofs is not the one that serves", hint=hint)
                if kind == "step":
                    done, total = fields
                    if progress is not None:
                        progress(done, total)
                elif kind == "finding":
                    findings.append(Finding(*fields))
                elif kind == "counted":
                    (volumes, layers), complete = fields, True
        except BaseException:
            child.kill()
            raise
        status = child.wait()
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
    if not complete:
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        where = f"the check itself died ({cause}) in step {done + 1} of {total}"
        findings.append(Finding("unreadable", ": ".join([where, *last])))
    return Scrubbed(findings, volumes, layers), status


def main(arguments: list[str]) -> None:
    """The child."""
    out = sys.stdout.buffer

    def say(*fields: Any) -> None:
        body = msgspec.msgpack.encode(fields)
        out.write(len(body).to_bytes(LENGTH, "little") + body)

    said = 0
    found: list[Finding] = []

    def tell() -> None:
        nonlocal said
        for each in found[said:]:
            say("finding", each.code, each.message, each.volume, each.layer, each.page)
        said = len(found)
        out.flush()

    def step(done: int, total: int) -> None:
        say("step", done, total)
        tell()

    if ASKS_FORMAT in arguments:
        say("format", FORMAT_VERSION)
    notes = Notes(memoryview(mmap.mmap(int(arguments[1]), 0)))
    notes.writer.go_through(0)
    version = read_format(Path(arguments[0]) / DATA_DIRECTORY).version
    with closing(ReadTxn(Environment(Path(arguments[0]) / DATA_DIRECTORY, version=version, notes=notes))) as txn:
        check(txn, read_data="--read-data" in arguments, progress=step, into=found)
        tell()
        say("counted", len(txn.volumes()), len(txn.layers()))
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
