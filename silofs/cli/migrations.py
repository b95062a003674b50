"""Verbs on migrations. The work is the daemon's: a command that goes away leaves it running."""

from __future__ import annotations

from typing import Any

import click

from silofs.cli.output import App, pairs, table
from silofs.cli.runner import call
from silofs.cli.sizes import parse_bandwidth, parse_duration, parse_volume, show_size
from silofs.cli.verbs import common
from silofs.errors import Exit, Interrupted

EXITS = {"complete": Exit.OK, "cancelled": Exit.FAILED, "failed": Exit.FAILED}


@click.command("migrate", short_help="Move volumes to another host.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--to", "to", required=True, metavar="PEER", help="A paired peer's name, or its HOST:PORT.")
@click.option("--mode", type=click.Choice(["auto", "precopy", "postcopy"]), default="auto", show_default=True)
@click.option("--max-bandwidth", metavar="RATE", help="Bytes per second, for example 200M.")
@click.option("--switchover", type=click.Choice(["auto", "now", "manual"]), default="auto", show_default=True)
@click.option("--fence-writer", is_flag=True, help="Cut off a writer that still has a volume open here (ESTALE).")
@click.option("--no-snapshots", is_flag=True, help="Leave the named snapshots here, with the old copy.")
@click.option("--retain", default="1h", show_default=True, metavar="TIME", help="Keep the old copy this long.")
@click.option("--detach", is_flag=True, help="Return once it runs.")
@common("migrate")
def migrate_command(
    app: App,
    names: tuple[str, ...],
    to: str,
    mode: str,
    max_bandwidth: str | None,
    switchover: str,
    fence_writer: bool,
    no_snapshots: bool,
    retain: str,
    detach: bool,
) -> int:
    """Move volumes to a paired host while their VM runs. Several names move as one."""
    args = {
        "names": [parse_volume(name) for name in dict.fromkeys(names)],
        "to": to,
        "mode": mode,
        "max_bandwidth": None if max_bandwidth is None else parse_bandwidth(max_bandwidth),
        "switchover": switchover,
        "fence_writer": fence_writer,
        "snapshots": not no_snapshots,
        "retain": parse_duration(retain),
        "detach": detach,
    }
    seen: dict[str, Any] = {}

    def progress(fields: dict[str, Any]) -> None:
        seen.update(fields)
        app.progress(fields)

    try:
        fields = call(app.store, "migrate", args, progress=progress, offline=False)
    except KeyboardInterrupt:
        name = seen.get("migration", "ID")
        hint = f"silofs migration show {name} follows it, silofs migration cancel {name} ends it"
        raise Interrupted("the migration goes on without this command", hint=hint) from None
    app.result(fields, long=True)
    code = _finish(app, fields)
    if fields["left_snapshots"]:
        some = ", ".join(fields["left_snapshots"])
        app.warn(f"no longer on the volume's chain, and left here: {some} (kept until silofs rm)")
    return code or (Exit.WARNINGS if fields["left_snapshots"] else Exit.OK)


def _finish(app: App, fields: dict[str, Any]) -> int:
    state = fields["state"]
    if state == "complete":
        pause = fields.get("pause_ms")
        paused = f", paused for {pause} ms" if pause is not None else ""
        sent = show_size(fields["bytes_sent"])
        verified = "and verified" if fields.get("verified") else "but NOT verified"
        app.note(f"complete {verified}: {sent} sent in {fields['seconds']} s{paused}")
    elif state in EXITS:
        app.note(f"the migration {fields.get('migration', '')} ended: {state}")
        for line in (fields.get("error"), fields.get("hint")):
            if line:
                app.note(str(line))
    else:
        app.note(f"{fields['migration']} runs ({state}); silofs migration show {fields['migration']} follows it")
    return EXITS.get(state, Exit.OK)


@click.group("migration", short_help="Follow and steer migrations.")
def migration_command() -> None:
    """Follow and steer migrations."""


@migration_command.command("ls", short_help="List the migrations.")
@common("migration_ls")
def ls_command(app: App) -> None:
    """List the migrations, out of and into this host."""
    fields = call(app.store, "migration_ls", {}, offline=False)
    rows = [
        (m["migration"], ",".join(m["volumes"]), m["direction"], m["peer"], m["phase"], show_size(m["bytes_sent"]))
        + (show_size(m["bytes_left"]),)
        for m in fields["migrations"]
    ]
    headers = ("ID", "VOLUMES", "WAY", "PEER", "PHASE", "SENT", "LEFT")
    app.result(fields, lambda: table(headers, rows, right=frozenset({5, 6})) if rows else None)


def _show(fields: dict[str, Any]) -> str:
    return pairs([(k, ", ".join(v) if isinstance(v, list) else v) for k, v in fields.items() if v not in (None, "")])


@migration_command.command("show", short_help="Show one migration.")
@click.argument("id")
@common("migration_show")
def show_command(app: App, id: str) -> None:
    """Show one migration."""
    fields = call(app.store, "migration_show", {"id": id}, offline=False)
    app.result(fields, lambda: _show(fields))


@migration_command.command("cancel", short_help="End a migration, and leave the source as it was.")
@click.argument("id")
@common("migration_cancel")
def cancel_command(app: App, id: str) -> int:
    """End a migration, and leave the source as it was. After the switch-over the volumes go back, with what was
    written since, as long as pages are missing at the destination."""
    fields = call(app.store, "migration_cancel", {"id": id}, offline=False)
    app.result(fields)
    if fields["phase"] in EXITS:
        app.note(f"{id} ended: {fields['phase']}")
        return Exit.OK
    app.note(f"{id} is asked to end, and is {fields['phase']} now; silofs migration show {id} follows it")
    if fields["direction"] == "in" or fields["phase"] not in ("ceded", "pulling"):
        return Exit.OK
    peer = fields["peer"]
    app.warn(f"{peer} owns the volumes and gives them back only if no clone there needs them: its log says if not")
    return Exit.WARNINGS


@migration_command.command("switchover", short_help="Hand the volume over now.")
@click.argument("id")
@click.option("--fence-writer", is_flag=True, help="Cut off a writer that still has a volume open here (ESTALE).")
@common("migration_switchover")
def switchover_command(app: App, id: str, fence_writer: bool) -> None:
    """Hand the volume over now, in a migration with --switchover manual or auto."""
    args = {"id": id, "fence_writer": fence_writer}
    app.result(call(app.store, "migration_switchover", args, offline=False))
    app.note(f"switch-over of {id} asked for")


@migration_command.command("pause", short_help="Stop sending, for now.")
@click.argument("id")
@common("migration_pause")
def pause_command(app: App, id: str) -> None:
    """Stop sending, for now. Pages that a reader waits for are still fetched."""
    app.result(call(app.store, "migration_pause", {"id": id}, offline=False))
    app.note(f"paused {id}; silofs migration resume {id} goes on")


@migration_command.command("resume", short_help="Go on with a paused migration.")
@click.argument("id")
@common("migration_resume")
def resume_command(app: App, id: str) -> None:
    """Go on with a paused migration."""
    app.result(call(app.store, "migration_resume", {"id": id}, offline=False))
    app.note(f"{id} goes on")


@migration_command.command("accept-lost", short_help="Let the old copy go although pages were lost.")
@click.argument("id")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common("migration_accept_lost")
def accept_lost_command(app: App, id: str, yes: bool) -> None:
    """Let the old copy go although some of its pages were damaged and could not be sent."""
    app.confirm("the pages that could not be sent read as errors at the new home", "let the old copy go", yes=yes)
    app.result(call(app.store, "migration_accept_lost", {"id": id}, offline=False))
    app.note(f"accepted what {id} lost")
