"""`silofs import` and `silofs export`: images come in and go out through files of this process's own rights.

The daemon gets open descriptors, never a path: so it reads and writes nothing that the caller could not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from silofs.cli.output import App
from silofs.cli.runner import call
from silofs.cli.sizes import parse_size, parse_target, parse_volume, show_size
from silofs.cli.verbs import common
from silofs.errors import Interrupted, UserError

FORMATS = ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc"]


@click.command("import", short_help="Make a volume out of an image file.")
@click.argument("file", metavar="FILE|-")
@click.argument("name")
@click.option("--size", metavar="SIZE", help="Make the volume larger than the image.")
@click.option("--format", "claimed", type=click.Choice(FORMATS), help="The image's format; found out if not given.")
@click.option("--follow-backing", is_flag=True, help="Read the backing files that the image names as well.")
@common("import")
def import_command(app: App, file: str, name: str, size: str | None, claimed: str | None, follow_backing: bool) -> None:
    """Make a volume out of an image: raw, qcow2, vmdk, vdi or vhdx, or - for raw on stdin.

    The volume appears when all of it has arrived; a failed import leaves nothing behind.
    """
    from silofs import convert

    volume = parse_volume(name)
    wanted = None if size is None else parse_size(size)
    call(app.store, "free_name", {"name": volume})
    try:
        with _ended_cleanly(), contextlib.ExitStack() as stack:
            if file == "-":
                convert.check_raw(claimed)
                if sys.stdin is None:
                    raise UserError("stdin is closed", hint="name an image file, or send one through a pipe")
                fd = sys.stdin.fileno()
            else:
                fd = stack.enter_context(
                    convert.raw(
                        Path(file), app.store, claimed=claimed, follow_backing=follow_backing, progress=app.progress
                    )
                )
            fields = call(app.store, "import", {"name": volume, "size": wanted}, fds=[fd], progress=app.progress)
    except KeyboardInterrupt:
        raise Interrupted("the import was stopped", hint="nothing was left behind: run it again") from None
    app.result(fields, long=True)
    app.note(f"imported {name}, {show_size(fields['virtual_size'])}, {show_size(fields['allocated'])} allocated")


@click.command("export", short_help="Write a volume or snapshot to an image file.")
@click.argument("source", metavar="NAME[@SNAP]")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True)
@click.option("-f", "--force", "-y", "--yes", "force", is_flag=True, help="Replace FILE if it is there.")
@common("export")
def export_command(app: App, source: str, file: Path, kind: str, force: bool) -> None:
    """Write a volume, or one of its snapshots, to an image file. FILE appears when all of it is there."""
    volume, snapshot = parse_target(source)
    if os.path.lexists(file):
        if not file.is_file():
            from silofs.errors import Exists

            raise Exists(f"{file} is there and is no regular file", hint="choose another name")
        app.confirm(f"{file} exists", "replace it", yes=force)
    try:
        with _ended_cleanly(), _beside(file) as (fd, temporary):
            args = {"volume": volume, "snapshot": snapshot}
            fields = call(app.store, "export", args, fds=[fd], progress=app.progress)
            if kind != "raw":
                from silofs import convert

                with _beside(file) as (_, converted):
                    convert.to_format(temporary, converted, kind, progress=app.progress)
                    converted.replace(temporary)
            _publish(temporary, file)
    except KeyboardInterrupt:
        raise Interrupted("the export was stopped", hint="nothing was left behind: run it again") from None
    app.result({**fields, "file": str(file), "format": kind}, long=True)
    app.note(f"exported {source} to {file}, {show_size(fields['size'])}")


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end this work as ^C does: what was begun is taken back."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[tuple[int, Path]]:
    """A new file in the directory of `file`, readable by its owner only, that is gone afterwards unless renamed."""
    temporary = file.parent / f".{file.name[:200]}.{os.getpid()}.{os.urandom(4).hex()}"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd, temporary
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _publish(temporary: Path, file: Path) -> None:
    """Give a finished file its name, durably, with the mode that a new file gets here."""
    mask = os.umask(0)
    os.umask(mask)
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o666 & ~mask)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
