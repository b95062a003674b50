"""`silofs import`: images and streams come in through files of this process's own rights.

The daemon gets open descriptors, never a path: so it reads nothing that the caller could not.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from silofs.cli.client import Gone
from silofs.cli.files import ended_cleanly
from silofs.cli.output import App
from silofs.cli.runner import call
from silofs.cli.sizes import parse_size, parse_volume, show_size
from silofs.cli.verbs import common
from silofs.errors import Interrupted, TryAgain, UserError

FORMATS = ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "stream"]
KEPT = "run it again: what arrived is kept, and not stored twice"


@click.command("import", short_help="Make a volume out of an image, or bring one up to date.")
@click.argument("file", metavar="FILE|-", required=False)
@click.argument("name", required=False)
@click.option("--size", metavar="SIZE", help="Make the volume larger than the image.")
@click.option("--format", "claimed", type=click.Choice(FORMATS), help="The image's format; found out if not given.")
@click.option("--follow-backing", is_flag=True, help="Read the backing files that the image names as well.")
@click.option("--onto", metavar="NAME", help="Bring this volume from one snapshot to the next, by a stream.")
@click.option("--abandon", metavar="NAME", help="Drop what an interrupted import of a stream has stored for NAME.")
@common("import")
def import_command(
    app: App,
    file: str | None,
    name: str | None,
    size: str | None,
    claimed: str | None,
    follow_backing: bool,
    onto: str | None,
    abandon: str | None,
) -> None:
    """Make a volume out of an image: raw, qcow2, vmdk, vdi, vhdx or a stream, or - for stdin (raw, or a stream).

    The volume appears when all of it has arrived; a failed import leaves nothing behind. With --onto, a stream of what
    changed since a snapshot brings a volume that is at this snapshot to the next one.
    """
    if abandon is not None:
        if file is not None or onto is not None:
            raise UserError("--abandon takes nothing else", hint="silofs import --abandon NAME")
        fields = call(app.store, "import_abandon", {"name": parse_volume(abandon)})
        app.result(fields, long=True)
        app.note(f"dropped {show_size(fields['bytes_dropped'])} of an interrupted import of {abandon}")
        return
    wanted = onto or name
    if file is None or wanted is None or (onto and name):
        hint = "silofs import FILE NAME, or silofs import --onto NAME FILE"
        raise UserError("an import needs a file and one volume", hint=hint)
    volume = parse_volume(wanted)
    if onto is None:
        call(app.store, "free_name", {"name": volume})
    if onto is not None or claimed == "stream" or (claimed is None and file != "-" and _is_stream(Path(file))):
        if size is not None or follow_backing or claimed not in (None, "stream"):
            raise UserError("a stream has its size and format in itself", hint="leave these options out")
        _import_stream(app, file, volume, onto is not None)
    else:
        _import_image(app, file, volume, None if size is None else parse_size(size), claimed, follow_backing)


def _is_stream(path: Path) -> bool:
    from silofs import convert

    return path.is_file() and convert.identify(path, None) == "stream"


def _stdin() -> int:
    if sys.stdin is None:
        raise UserError("stdin is closed", hint="name an image file, or send one through a pipe")
    return sys.stdin.fileno()


def _import_image(
    app: App, file: str, volume: str, size: int | None, claimed: str | None, follow_backing: bool
) -> None:
    from silofs import convert

    try:
        with ended_cleanly(), contextlib.ExitStack() as stack:
            if file == "-":
                convert.check_raw(claimed)
                fd = _stdin()
            else:
                fd = stack.enter_context(
                    convert.raw(
                        Path(file), app.store, claimed=claimed, follow_backing=follow_backing, progress=app.progress
                    )
                )
            fields = call(app.store, "import", {"name": volume, "size": size}, fds=[fd], progress=app.progress)
    except KeyboardInterrupt:
        raise Interrupted("the import was stopped", hint="nothing was left behind: run it again") from None
    app.result(fields, long=True)
    app.note(f"imported {volume}, {show_size(fields['virtual_size'])}, {show_size(fields['allocated'])} allocated")


def _import_stream(app: App, file: str, volume: str, onto: bool) -> None:
    try:
        with ended_cleanly(), contextlib.ExitStack() as stack:
            if file == "-":
                fd = _stdin()
            else:
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
            args: dict[str, Any] = {"name": volume, "onto": onto}
            fields = call(app.store, "import_stream", args, fds=[fd], progress=app.progress)
    except KeyboardInterrupt:
        raise Interrupted("the import was stopped", hint=KEPT) from None
    except Gone as error:
        raise TryAgain(error.message, hint=KEPT) from error
    app.result(fields, long=True)
    skipped = f", {show_size(fields['bytes_skipped'])} were there already" if fields["bytes_skipped"] else ""
    app.note(f"{volume} is at {fields['snapshot']}: {show_size(fields['bytes_stored'])} stored{skipped}")
