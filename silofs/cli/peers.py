"""Verbs on peers: pairing, and what a paired peer may do."""

from __future__ import annotations

import click

from silofs.cli.output import App, table
from silofs.cli.runner import call
from silofs.cli.verbs import common
from silofs.errors import BadName, NoSuchThing
from silofs.names import check_name


@click.group("peer", short_help="Pair with other hosts, and say what they may do.")
def peer_command() -> None:
    """Pair with other hosts, and say what they may do. Paired is not permitted: nothing is allowed at first."""


@peer_command.command("invite", short_help="Make a pairing token.")
@click.option("--address", metavar="HOST:PORT", help="Where the other host reaches this one, if not at --listen.")
@common("peer_invite")
def invite_command(app: App, address: str | None) -> None:
    """Make a token that another host joins with. It works once, for ten minutes. Needs a mount with --listen."""
    fields = call(app.store, "peer_invite", {"address": address}, offline=False)
    app.result(fields, lambda: str(fields["token"]))
    app.note("on the other host: silofs peer join TOKEN (once, within ten minutes)")


@peer_command.command("join", short_help="Pair with the host that made a token.")
@click.argument("token")
@common("peer_join")
def join_command(app: App, token: str) -> None:
    """Pair with the host that made the token."""
    fields = call(app.store, "peer_join", {"token": token.strip()}, offline=False)
    app.result(fields, lambda: str(fields["name"]))
    app.note(f"paired with {fields['name']}")


@peer_command.command("ls", short_help="List the paired hosts.")
@common("peer_ls")
def ls_command(app: App) -> None:
    """List the paired hosts and what each may do."""
    fields = call(app.store, "peer_ls", {}, offline=False)
    rows = []
    for peer in fields["peers"]:
        allowed = [f"{a['pattern']}:{'+'.join(k for k in ('in', 'out', 'read') if a.get(k))}" for a in peer["allow"]]
        state = "connected" if peer.get("connected") else "-"
        rows.append((peer["name"], peer.get("address") or "-", state, " ".join(allowed) or "nothing"))
    app.result(fields, lambda: table(("NAME", "ADDRESS", "STATE", "ALLOWED"), rows) if rows else None)


@peer_command.command("allow", short_help="Let a peer send, take or read volumes.")
@click.argument("peer")
@click.argument("pattern", metavar="VOLUME|PATTERN")
@click.argument("direction", type=click.Choice(["in", "out", "read"]))
@common("peer_allow")
def allow_command(app: App, peer: str, pattern: str, direction: str) -> None:
    """Let a peer migrate volumes in here, take them out, or read them. PATTERN may contain * and ?."""
    check_pattern(pattern)
    args = {"peer": peer, "pattern": pattern, "direction": direction}
    app.result(call(app.store, "peer_allow", args, offline=False))
    app.note(f"{peer} may {direction} {pattern}")


@peer_command.command("rm", short_help="Forget a paired host.")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common("peer_rm")
def rm_command(app: App, name: str, yes: bool) -> None:
    """Forget a paired host. Refused while a volume's record names it."""
    if not any(peer["name"] == name for peer in call(app.store, "peer_ls", {}, offline=False)["peers"]):
        raise NoSuchThing(f"there is no peer {name!r}", hint="silofs peer ls lists the paired hosts")
    app.confirm(f"{name} has to be paired anew after this", "forget it", yes=yes)
    app.result(call(app.store, "peer_rm", {"name": name}, offline=False))
    app.note(f"forgot {name}")


def check_pattern(pattern: str) -> str:
    """A volume's name in which * and ? may stand for more. Raises BadName."""
    try:
        check_name(pattern.replace("*", "a").replace("?", "a"))
    except BadName as error:
        raise BadName(f"{pattern[:140]!r} is no name or pattern", hint="for example vm1, web-* or *") from error
    return pattern
