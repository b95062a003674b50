"""`silofs export`: images and streams go out through files of this process's own rights.

The daemon gets an open descriptor, never a path: so it writes nothing that the caller could not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from silofs.cli.client import Gone
from silofs.cli.files import beside, ended_cleanly, part_of, partial, publish
from silofs.cli.output import App
from silofs.cli.runner import call
from silofs.cli.sizes import parse_snapshot, parse_target, show_size
from silofs.cli.verbs import common
from silofs.errors import Exists, Interrupted, TryAgain, Unsupported, UserError

FORMATS = ["raw", "qcow2", "stream"]


@click.command("export", short_help="Write a volume or snapshot to an image file or a stream.")
@click.argument("source", metavar="NAME[@SNAP]")
@click.argument("file", metavar="FILE|-")
@click.option("--format", "kind", type=click.Choice(FORMATS), help="raw if not given; stream with --since.")
@click.option("--since", metavar="NAME@SNAP", help="Only what changed since that snapshot, as a stream.")
@click.option("-f", "--force", "-y", "--yes", "force", is_flag=True, help="Replace FILE if it is there.")
@common("export")
def export_command(app: App, source: str, file: str, kind: str | None, since: str | None, force: bool) -> None:
    """Write a volume, or one of its snapshots, to an image file or to stdout (-). FILE appears when it is whole.

    A stream is for `silofs import` of another store: a snapshot as a whole, or with --since what changed. An export of
    a stream to a file that was interrupted goes on where it was.
    """
    volume, snapshot = parse_target(source)
    args: dict[str, Any] = {"volume": volume, "snapshot": snapshot}
    kind = kind or ("raw" if since is None else "stream")
    if kind == "stream":
        if snapshot is None:
            parse_snapshot(source)  # says that a snapshot has to be named
        if since is not None:
            args["since"], args["since_snapshot"] = parse_snapshot(since)
    elif since is not None:
        raise UserError(f"{kind} cannot hold changes alone", hint="leave --format out: --since makes a stream")
    verb = "export_stream" if kind == "stream" else "export"
    if file == "-":
        fields = _to_stdout(app, verb, args, kind)
    else:
        path = Path(file)
        if path.is_symlink() or path.exists():
            if not path.is_file():
                raise Exists(f"{path} is there and is no regular file", hint="choose another name")
            app.confirm(f"{path} exists", "replace it", yes=force)
        fields = _to_stream_file(app, args, path) if kind == "stream" else _to_image(app, args, path, kind)
    app.result({**fields, "file": file, "format": kind}, long=True)
    kept = f", {show_size(fields['bytes_kept'])} were there from before" if fields.get("bytes_kept") else ""
    written = show_size(fields["bytes_written"])
    app.note(f"exported {source} to {file}, {show_size(fields['size'])}: {written} written{kept}")


def _to_stdout(app: App, verb: str, args: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "qcow2":
        raise Unsupported("qcow2 cannot be written to a pipe", hint="write it to a file, or send it as raw or stream")
    if sys.stdout is None or sys.stdout.isatty():
        raise UserError("stdout is a terminal", hint="redirect it to a file or a pipe")
    app.talk_on_stderr()
    try:
        with ended_cleanly():
            return call(app.store, verb, args, fds=[sys.stdout.fileno()], progress=app.progress)
    except KeyboardInterrupt:
        raise Interrupted("the export was stopped", hint="what came out of it is not whole") from None


def _to_image(app: App, args: dict[str, Any], file: Path, kind: str) -> dict[str, Any]:
    try:
        with ended_cleanly(), beside(file) as (fd, temporary):
            fields = call(app.store, "export", args, fds=[fd], progress=app.progress)
            if kind != "raw":
                from silofs import convert

                with beside(file) as (_, converted):
                    convert.to_format(temporary, converted, kind, progress=app.progress)
                    converted.replace(temporary)
            publish(temporary, file)
    except KeyboardInterrupt:
        raise Interrupted("the export was stopped", hint="nothing was left behind: run it again") from None
    return fields


def _to_stream_file(app: App, args: dict[str, Any], file: Path) -> dict[str, Any]:
    try:
        with ended_cleanly(), partial(file) as (fd, path):
            fields = call(app.store, "export_stream", args, fds=[fd], progress=app.progress)
            publish(path, file)
    except KeyboardInterrupt:
        raise Interrupted("the export was stopped", hint=_again(file)) from None
    except Gone as error:
        raise TryAgain(error.message, hint=_again(file)) from error
    return fields


def _again(file: Path) -> str:
    """What a second run of an export that did not come to its end will do."""
    kept = part_of(file)
    return f"run it again: it goes on after what is in {kept}" if kept.exists() else "nothing was left: run it again"
