"""Verbs on volumes, snapshots and the store as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from silofs.cli.output import App, pairs, table
from silofs.cli.runner import call
from silofs.cli.sizes import parse_size, parse_snapshot, parse_target, parse_volume, show_size
from silofs.cli.verbs import common
from silofs.errors import Busy, Exit


@click.command("init", short_help="Make a store and its identity.")
@common("init")
def init_command(app: App) -> None:
    """Make a store and its identity. The first mount does it as well."""
    from silofs.offline import init

    fields = init(app.store)
    app.result(fields)
    app.note(f"made a store in {app.store}")


@click.command("create", short_help="Make an empty volume.")
@click.argument("name")
@click.option("--size", required=True, metavar="SIZE", help="For example 20G, 512MiB, 20GB.")
@common("create")
def create_command(app: App, name: str, size: str) -> None:
    """Make an empty volume. It is thin: nothing is allocated."""
    fields = call(app.store, "create", {"name": parse_volume(name), "size": parse_size(size)})
    app.result(fields)
    app.note(f"created {name}, {show_size(fields['virtual_size'])}")


@click.command("ls", short_help="List the volumes.")
@common("ls")
def ls_command(app: App) -> None:
    """List the volumes of the store."""
    fields = call(app.store, "ls", {})
    app.result(fields, lambda: _volume_table(fields["volumes"]))


def _volume_table(volumes: Sequence[dict[str, Any]]) -> str | None:
    if not volumes:
        return None
    rows = [
        (v["name"], show_size(v["virtual_size"]), show_size(v["allocated"]), show_size(v["unique"]), _role(v))
        + (len(v["snapshots"]), v["parent"] or "-")
        for v in volumes
    ]
    headers = ("NAME", "SIZE", "ALLOCATED", "UNIQUE", "ROLE", "SNAPSHOTS", "PARENT")
    return table(headers, rows, right=frozenset({1, 2, 3, 5}))


def _role(v: dict[str, Any]) -> str:
    return f"{v['role']}, frozen" if v["frozen"] else str(v["role"])


@click.command("info", short_help="Show one volume.")
@click.argument("name")
@common("info")
def info_command(app: App, name: str) -> None:
    """Show one volume: sizes, snapshots, and who may write to it."""
    fields = call(app.store, "info", {"name": parse_volume(name)})
    app.result(fields, lambda: _volume_text(fields))


def _volume_text(v: dict[str, Any]) -> str:
    text = pairs(
        [
            ("name", v["name"]),
            ("uuid", v["uuid"]),
            ("path", v["path"] or "- (not mounted)"),
            ("size", show_size(v["virtual_size"])),
            ("allocated", show_size(v["allocated"])),
            ("unique", show_size(v["unique"])),
            ("shared", show_size(v["shared"])),
            ("chain depth", v["chain_depth"]),
            ("parent", v["parent"] or "-"),
            ("role", f"{v['role']} (epoch {v['epoch']})"),
            ("open", v["open_count"]),
            *([("created", v["created"])] if v["created"] else []),
            *([("frozen", f"by {v['frozen']['owner']} until {v['frozen']['until']}")] if v["frozen"] else []),
        ]
    )
    if v["snapshots"]:
        rows = [(s["name"], show_size(s["size"]), s["created"]) for s in v["snapshots"]]
        text += "\n\n" + table(("SNAPSHOT", "SIZE", "CREATED"), rows, right=frozenset({1}))
    return text


@click.command("df", short_help="Show the space of the store.")
@common("df")
def df_command(app: App) -> None:
    """Show how full the store and its file system are."""
    fields = call(app.store, "df", {})
    app.result(
        fields,
        lambda: pairs(
            [
                ("store", fields["store"]),
                ("file system", f"{show_size(fields['total'])}, {show_size(fields['free'])} free"),
                ("can be written", show_size(fields["available"])),
                ("store's files", show_size(fields["file_bytes"])),
                *(
                    [("to be reclaimed", show_size(fields["reclaimable"]))]
                    if fields["reclaimable"] is not None
                    else []
                ),
                ("volumes", f"{fields['volumes']}, {show_size(fields['virtual_bytes'])} of virtual size"),
            ]
        ),
    )


@click.command("du", short_help="Show what volumes take.")
@click.argument("name", required=False)
@common("du")
def du_command(app: App, name: str | None) -> None:
    """Show what each volume takes, alone and shared, and what removing it would free."""
    fields = call(app.store, "du", {"name": None if name is None else parse_volume(name)})
    columns = ("allocated", "unique", "shared", "freed_by_rm")
    app.result(
        fields,
        lambda: table(
            ("NAME", "ALLOCATED", "UNIQUE", "SHARED", "FREED BY RM"),
            [(v["name"], *(show_size(v[c]) for c in columns)) for v in fields["volumes"]],
            right=frozenset({1, 2, 3, 4}),
        ),
    )
    if fields["held"] != fields["stored"]:
        app.note(f"{show_size(fields['held'])} of pages take {show_size(fields['stored'])} in the store")
    for kept in fields["arriving"]:
        what = f"{show_size(kept['bytes'])} of an interrupted import of {kept['name']} are kept"
        app.note(f"{what}: run it again, or silofs import --abandon {kept['name']}")


@click.command("snapshot", short_help="Keep the present state of volumes.")
@click.argument("targets", nargs=-1, required=True, metavar="NAME@SNAP...")
@common("snapshot")
def snapshot_command(app: App, targets: tuple[str, ...]) -> None:
    """Keep the present state of a volume under a name. Takes no time and no space at first.

    Several are taken together, all or none: no write to one of the volumes is in its snapshot without every write to
    the others that was acknowledged before it began.
    """
    wanted = [dict(zip(("volume", "snapshot"), parse_snapshot(target), strict=True)) for target in targets]
    app.result(call(app.store, "snapshot", {"targets": wanted} if len(wanted) > 1 else wanted[0]))
    app.note(f"kept {' '.join(targets)}")


@click.command("clone", short_help="Make a volume out of another.")
@click.argument("source", metavar="NAME[@SNAP]")
@click.argument("new", metavar="NEW")
@common("clone")
def clone_command(app: App, source: str, new: str) -> None:
    """Make a new volume with the content of another, or of its snapshot. Takes no time; pages are shared."""
    volume, snapshot = parse_target(source)
    args = {"source": volume, "snapshot": snapshot, "new": parse_volume(new)}
    fields = call(app.store, "clone", args)
    app.result(fields)
    app.note(f"cloned {source} to {new}")


@click.command("rollback", short_help="Set a volume back to a snapshot.")
@click.argument("target", metavar="NAME@SNAP")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common("rollback")
def rollback_command(app: App, target: str, yes: bool) -> None:
    """Set a volume back to one of its snapshots. What was written since is lost, unless a later snapshot has it."""
    volume, snapshot = parse_snapshot(target)
    found = call(app.store, "info", {"name": volume})["snapshots"]
    if any(each["name"] == snapshot for each in found):
        app.confirm(f"what was written to {volume} since {snapshot} will be lost", "go on", yes=yes)
    app.result(call(app.store, "rollback", {"volume": volume, "snapshot": snapshot}))
    app.note(f"{volume} is as it was at {snapshot}")


@click.command("rm", short_help="Remove a volume or a snapshot.")
@click.argument("target", metavar="NAME[@SNAP]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common("rm")
def rm_command(app: App, target: str, yes: bool) -> None:
    """Remove a volume, or one of its snapshots. Clones of it stay as they are."""
    volume, snapshot = parse_target(target)
    if snapshot is None and not yes:
        snapshots = call(app.store, "info", {"name": volume})["snapshots"]
        if snapshots:
            count = len(snapshots)
            app.confirm(f"{volume} has {count} snapshot{'s' if count > 1 else ''}", "remove it with them")
            yes = True
    fields = call(app.store, "rm", {"volume": volume, "snapshot": snapshot, "force": yes})
    app.result(fields)
    app.note(f"removed {target}")


@click.command("rename", short_help="Rename a volume.")
@click.argument("old")
@click.argument("new")
@common("rename")
def rename_command(app: App, old: str, new: str) -> None:
    """Give a volume another name. A running VM keeps it open."""
    app.result(call(app.store, "rename", {"old": parse_volume(old), "new": parse_volume(new)}))
    app.note(f"renamed {old} to {new}")


@click.command("resize", short_help="Change the size of a volume.")
@click.argument("name")
@click.argument("size")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before data is cut off.")
@common("resize")
def resize_command(app: App, name: str, size: str, yes: bool) -> None:
    """Change the size of a volume. Cutting off its end asks first; what is added reads as zeros."""
    volume, wanted = parse_volume(name), parse_size(size)
    if not yes:
        present = call(app.store, "info", {"name": volume})["virtual_size"]
        if wanted < present:
            lost = show_size(present - wanted)
            app.confirm(f"this cuts the last {lost} off {volume}", "go on")
            yes = True
    fields = call(app.store, "resize", {"name": volume, "size": wanted, "shrink": yes})
    app.result(fields)
    app.note(f"{volume} has {show_size(wanted)} now")


@click.command("check", short_help="Check every invariant of the store.")
@click.option("--read-data", is_flag=True, help="Read every page as well, and verify its checksum.")
@click.option("--repair", is_flag=True, help="Make a sound store of what can be read; nobody may have it mounted.")
@click.option("--yes", is_flag=True, help="Repair without being asked.")
@common("check")
def check_command(app: App, read_data: bool, repair: bool, yes: bool) -> int:
    """Check every invariant of the store. Exit code 4 if one is broken."""
    if repair:
        return _repair(app, yes)
    fields = call(app.store, "check", {"read_data": read_data}, progress=app.progress)
    findings = fields["findings"]
    app.result(fields, lambda: "\n".join(finding["message"] for finding in findings), long=True)
    if findings:
        app.warn(f"{len(findings)} thing{'s' if len(findings) > 1 else ''} damaged in {app.store}")
        return Exit.DAMAGE
    app.note("no damage found")
    return Exit.OK


def _repair(app: App, yes: bool) -> int:
    """Repair the store, once it was said what that gives up. Exit code 3 if something is, 4 if damage remains."""
    from silofs.cli.runner import daemon
    from silofs.offline import repair

    sock = daemon(app.store, needed=False)
    if sock is not None:
        sock.close()
        raise Busy(f"the store {app.store} is mounted", hint="silofs umount MOUNTPOINT first")

    def agree(fields: dict[str, Any]) -> None:
        for loss in fields["losses"]:
            app.note(loss["message"])
            for first, end in loss["ranges"]:
                app.note(f"  bytes {first} to {end - 1} of {loss['name']} become errors")
        if fields["losses"]:
            app.confirm(f"repairing {app.store} gives up the above", "go on", yes=yes)

    fields = repair(app.store, agree)
    app.result(fields, lambda: "\n".join(loss["message"] for loss in fields["losses"]), long=True)
    for message in fields["findings"]:
        app.warn(f"still damaged: {message}")
    if fields["findings"]:
        return Exit.DAMAGE
    app.note(f"repaired; the damaged store is in {fields['damaged_store']}: remove it when you need it no more")
    return Exit.WARNINGS if fields["losses"] else Exit.OK
