"""`silofs diff`: extents are printed as they are read, since there may be millions of them."""

from __future__ import annotations

import json
import tempfile
from typing import Any, BinaryIO

import click

from silofs.cli.output import App, writing
from silofs.cli.runner import call
from silofs.cli.sizes import parse_snapshot, parse_target, show_size
from silofs.cli.verbs import common

OFFSET_WIDTH, LENGTH_WIDTH = 16, 16


@click.command("diff", short_help="Show what changed since a snapshot.")
@click.argument("old", metavar="NAME@A")
@click.argument("new", metavar="[NAME@B|NAME]", required=False)
@common("diff")
def diff_command(app: App, old: str, new: str | None) -> None:
    """Show the extents that changed between a snapshot and a later one, or the volume as it is now.

    OFFSET and LENGTH are bytes; an extent of kind zero reads as zeros now. The two may be of different volumes.
    """
    volume, snapshot = parse_snapshot(old)
    other, other_snapshot = (volume, None) if new is None else parse_target(new)
    args = {"volume": volume, "snapshot": snapshot, "other": other, "other_snapshot": other_snapshot}
    with tempfile.TemporaryFile() as file:
        fields = call(app.store, "diff", args, fds=[file.fileno()], progress=None if app.json else app.progress)
        app.clear()
        file.seek(0)
        with writing():
            _print(app, fields, file)
    for kind in ("data", "zero"):
        fields[kind] = show_size(fields[f"{kind}_bytes"])
    extents = "extent" if fields["count"] == 1 else "extents"
    app.note(f"{fields['count']} {extents}: {fields['data']} of data, {fields['zero']} of zeros")


def _print(app: App, fields: dict[str, Any], file: BinaryIO) -> None:
    from silofs import diffs

    if app.json:
        # One object, as of every verb that is not long; put together by hand, as it does not fit into memory.
        print(json.dumps({"schema": app.schema, **fields})[:-1], end=', "extents": [')
        for number, extent in enumerate(diffs.read(file)):
            print(", " if number else "", json.dumps(extent), sep="", end="")
        print("]}")
        return
    if fields["count"]:
        print(f"{'OFFSET':>{OFFSET_WIDTH}}  {'LENGTH':>{LENGTH_WIDTH}}  KIND")
    for extent in diffs.read(file):
        print(f"{extent['offset']:>{OFFSET_WIDTH}}  {extent['length']:>{LENGTH_WIDTH}}  {extent['kind']}")
