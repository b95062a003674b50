"""`silofs freeze` and `silofs thaw`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from silofs.cli.output import App
from silofs.cli.runner import call
from silofs.cli.sizes import parse_duration, parse_volume
from silofs.cli.verbs import common


@click.command("freeze", short_help="Hold a volume's writes for a while.")
@click.argument("name")
@click.option("--timeout", metavar="TIME", help="Thaw it by itself after this long; 30s if not given, 1h at most.")
@click.option("--owner", default="", metavar="TEXT", help="Who holds it; the command that runs silofs if not given.")
@click.option("--reason", default="", metavar="TEXT", help="What for.")
@common("freeze")
def freeze_command(app: App, name: str, timeout: str | None, owner: str, reason: str) -> None:
    """Hold a volume's writes: those that were acknowledged are durable, new ones wait until thaw or the deadline.

    Reads go on, and so do all other volumes.
    """
    pid = os.getppid()
    args = {"name": parse_volume(name), "owner": owner or _command(pid), "reason": reason, "pid": pid}
    if timeout is not None:
        args["timeout"] = parse_duration(timeout)
    fields = call(app.store, "freeze", args, offline=False)
    app.result(fields)
    app.note(f"{name} is frozen until {fields['until']}; silofs thaw {name} ends that")


@click.command("thaw", short_help="Let a frozen volume's writes go on.")
@click.argument("name")
@common("thaw")
def thaw_command(app: App, name: str) -> None:
    """Let the writes of a frozen volume go on. Fails (11) if it is not frozen, or not any more."""
    fields = call(app.store, "thaw", {"name": parse_volume(name)}, offline=False)
    app.result(fields)
    app.note(f"thawed {name} after {fields['seconds']} s")


def _command(pid: int) -> str:
    """The name of the program that runs this one."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
