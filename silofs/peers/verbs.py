"""The control socket's verbs on peers and migrations (docs/peers.md, docs/cli.md)."""

from __future__ import annotations

import datetime
import socket
from typing import Any

import trio

from silofs import errors
from silofs.control import Call
from silofs.errors import NoSuchThing, PeerRefused, SiloError, UserError
from silofs.limits import INVITE_S, RETAIN_S
from silofs.migrate import events as ev
from silofs.migrate.messages import Refusal
from silofs.migrate.states import Mode, Options, Phase, Side, Switchover
from silofs.migrate.target import TargetMachine
from silofs.peers import content, pairing, records, tls
from silofs.peers.authorise import Direction
from silofs.peers.book import Book, Peer, suggestion_to_name
from silofs.peers.hub import Hub, dial
from silofs.peers.identity import Identity
from silofs.peers.listener import Listener
from silofs.peers.migrations import Migrations
from silofs.peers.mover import Mover
from silofs.peers.progress import HINTS, text_of
from silofs.service import Service

PROGRESS_S = 0.25
COMMAND_S = 5.0  # an operator's command is answered by the machine within this
LISTEN_S = 5.0

_ERRORS: dict[Refusal, type[SiloError]] = {
    Refusal.AUTHORISATION: errors.NotAuthorised,
    Refusal.NAME: errors.Exists,
    Refusal.SPACE: errors.StoreFull,
    Refusal.BUSY: errors.Busy,
    Refusal.USAGE: errors.UserError,
    Refusal.TRY_AGAIN: errors.TryAgain,
    Refusal.ROLE: errors.Busy,
}


class Verbs:
    """Handlers of `peer_*`, `migrate` and `migration_*`."""

    def __init__(
        self, identity: Identity, book: Book, hub: Hub, listener: Listener | None, migrations: Migrations
    ) -> None:
        self._identity = identity
        self._book = book
        self._hub = hub
        self._listener = listener
        self._migrations = migrations

    def register(self, service: Service) -> None:
        service.register("peer_invite", self.invite)
        service.register("peer_join", self.join, cancellable=True)
        service.register("peer_ls", self.peers)
        service.register("peer_allow", self.allow)
        service.register("peer_rm", self.remove)
        service.register("migrate", self.migrate, cancellable=True)
        service.register("migration_ls", self.migrations)
        service.register("migration_show", self.show)
        service.register("migration_cancel", self.cancel)
        service.register("migration_pause", self.pause)
        service.register("migration_resume", self.resume)
        service.register("migration_switchover", self.switchover)
        service.register("migration_accept_lost", self.accept_lost)
        service.migrations = lambda: len(self._migrations.movers)
        service.before_change = self._before_change

    async def _before_change(self, verb: str, name: str) -> None:
        reader = self._migrations.engine.reads.txn
        found = [volume.uuid for volume in reader.volumes() if volume.name == name.partition("@")[0]]
        for uuid in found:
            await self._migrations.guard(uuid, verb)

    # Peers

    async def invite(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        if self._listener is None:
            raise UserError(
                "this mount has no listener, so nobody could answer the invitation",
                hint="silofs umount, then silofs mount --listen HOST:PORT",
            )
        secret = self._hub.invitations.invite(trio.current_time())
        self._listener.update()
        with trio.move_on_after(LISTEN_S):
            await self._listener.wait_open()
        if not self._listener.open:
            raise SiloError(f"cannot listen on {self._listener.address}", hint="silofs.log in the store says why")
        address = _text(args, "address", "") or reachable(self._listener.address)
        pairing.split_address(address)
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=INVITE_S)
        return {
            "token": pairing.Token(address, self._identity.fingerprint, secret).word(),
            "expires": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "address": address,
        }

    async def join(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        token = pairing.Token.parse(_text(args, "token"))
        if token.fingerprint == self._identity.fingerprint:
            raise UserError("this token is of this very store", hint="use it on the other host")
        mine = ""
        if self._listener is not None and self._listener.port:  # port 0 is not chosen before the port is open
            mine = reachable(self._listener.address)
        stream = await dial(token.address, tls.pairing_context())
        try:
            with trio.fail_after(LISTEN_S * 2):
                welcome = await pairing.join(stream, self._identity, token, own_name(), mine)
        except trio.TooSlowError:
            raise errors.PeerUnreachable(f"{token.address} does not answer") from None
        except tls.TlsFailed as error:
            raise PeerRefused(
                "the inviter takes no invitations now: the token has expired, or was used",
                hint="silofs peer invite on the other host makes a new one",
            ) from error
        finally:
            await stream.aclose()
        peer = await self._book.add(welcome.certificate, welcome.name, token.address)
        self._hub.dial_wanted()
        return {"name": peer.name, "address": peer.address, "fingerprint": peer.fingerprint.hex()}

    async def peers(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        return {"peers": [self._peer(peer) for peer in self._book.all()]}

    def _peer(self, peer: Peer) -> dict[str, Any]:
        link = self._hub.link(peer.store_id)
        patterns = dict.fromkeys(pattern for pattern, _ in peer.rules)
        seen = datetime.datetime.fromtimestamp(peer.seen_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "name": peer.name,
            "address": peer.address,
            "fingerprint": peer.fingerprint.hex(),
            "connected": link is not None,
            "last_seen": seen if peer.seen_s else None,
            "round_trip_ms": _ms(link.session.round_trip) if link is not None else None,
            "allow": [
                {"pattern": pattern}
                | {direction.value: (pattern, direction.value) in peer.rules for direction in Direction}
                for pattern in patterns
            ],
        }

    async def allow(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        pattern, direction = _text(args, "pattern"), _text(args, "direction")
        peer = await self._book.allow(_text(args, "peer"), pattern, direction)
        return {"peer": peer.name, "pattern": pattern, "direction": direction}

    async def remove(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        peer = await self._book.remove(_text(args, "name"), records.names_peer)
        self._hub.disconnect(peer.store_id, "the peer was removed")
        return {"name": peer.name}

    # Migrations

    async def migrate(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        """Starts it, and follows it to its end unless detached. The client may go away: the migration goes on."""
        peer = self._book.find(_text(args, "to"))
        names = args.get("names")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError("which volumes?", hint="silofs migrate NAME... --to PEER")
        options = Options(
            mode=_choice(Mode, args, "mode", Mode.AUTO),
            switchover=_choice(Switchover, args, "switchover", Switchover.AUTO),
            fence_writer=bool(args.get("fence_writer")),
            snapshots=bool(args.get("snapshots", True)),
        )
        reader = self._migrations.engine.reads.txn
        volumes = [reader.volume_by_name(name) for name in names]
        left = [name for volume in volumes for name in content.passed_over(reader, volume.uuid)]
        left = left if options.snapshots else []  # else it was asked for
        await self._hub.connect(peer)
        retain = float(args.get("retain", RETAIN_S))
        bandwidth = args.get("max_bandwidth")
        mover = self._migrations.start(peer, names, options, retain_s=retain, bandwidth=bandwidth)
        if args.get("detach"):
            return {**self._result(mover), "left_snapshots": left}
        while not mover.over.is_set():
            await call.progress(**self._progress(mover))
            changed = mover.progress.changed
            with trio.move_on_after(PROGRESS_S):
                await changed.wait()
        progress = mover.progress
        never_began = progress.round == 0 and progress.phase in (Phase.FAILED, Phase.CANCELLED)
        if progress.reason is not None and never_began:
            raise refused(progress.reason, progress.detail)
        return {**self._result(mover), "left_snapshots": left}

    def _progress(self, mover: Mover) -> dict[str, Any]:
        fields = self._migrations.fields(mover)
        keys = ("migration", "phase", "round", "bytes_sent", "bytes_left", "rate", "eta_seconds")
        return {key: fields[key] for key in keys}

    def _result(self, mover: Mover) -> dict[str, Any]:
        fields = dict(self._migrations.fields(mover))
        fields["state"] = fields["phase"]
        fields["rounds"] = fields["round"]
        return fields

    async def migrations(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        return {"migrations": self._migrations.listed()}

    async def show(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        text = _id(args)
        mover = self._migrations.find(text)
        if mover is not None:
            return self._migrations.fields(mover)
        ended = self._migrations.history.find(text)
        if ended is None:
            raise NoSuchThing(f"there is no migration {text!r}", hint="silofs migration ls")
        return ended

    async def cancel(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        mover = self._open(args)
        if isinstance(mover.machine, TargetMachine) and mover.machine.may_return:
            self._migrations.may_return(mover)
        await self._command(mover, ev.OperatorCancel(), ev.Command.CANCEL)
        with trio.move_on_after(COMMAND_S):
            await mover.over.wait()
        return self._migrations.fields(mover)

    async def pause(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        mover = self._open(args)
        mover.post(ev.OperatorPause())
        return self._migrations.fields(mover)

    async def resume(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        mover = self._open(args)
        mover.post(ev.OperatorResume())
        return self._migrations.fields(mover)

    async def switchover(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        mover = self._leaving(args)
        event = ev.OperatorSwitchover(bool(args.get("fence_writer")))
        await self._command(mover, event, ev.Command.SWITCHOVER)
        return self._migrations.fields(mover)

    async def accept_lost(self, args: dict[str, Any], call: Call) -> dict[str, Any]:
        mover = self._leaving(args)
        await self._command(mover, ev.OperatorAcceptLost(), ev.Command.ACCEPT_LOST)
        return self._migrations.fields(mover)

    def _open(self, args: dict[str, Any]) -> Mover:
        text = _id(args)
        mover = self._migrations.find(text)
        if mover is None:
            if self._migrations.history.find(text) is not None:
                raise errors.Busy(f"migration {text} is over", hint=f"silofs migration show {text}")
            raise NoSuchThing(f"there is no migration {text!r}", hint="silofs migration ls")
        return mover

    def _leaving(self, args: dict[str, Any]) -> Mover:
        """An open migration out of this host: the source alone hears this command."""
        mover = self._open(args)
        if mover.side is not Side.SOURCE:
            raise UserError(
                f"migration {mover.name} comes here from {mover.progress.peer}, which has to be told this",
                hint=f"give the same command on {mover.progress.peer}",
            )
        return mover

    async def _command(self, mover: Mover, event: ev.Event, command: ev.Command) -> None:
        """Give the machine a command and raise what it says to it."""
        replies = mover.progress.replies
        before = list(replies)
        mover.post(event)
        with trio.move_on_after(COMMAND_S):
            while not mover.over.is_set():
                new = [reply for reply in replies if reply not in before or replies.count(reply) > before.count(reply)]
                for reply in new:
                    if reply.command is command:
                        if reply.refusal is not None:
                            raise refused(reply.refusal, reply.detail)
                        return
                await mover.progress.changed.wait()


def refused(reason: Refusal, detail: str) -> SiloError:
    """The error that a refusal is to the operator."""
    kind = _ERRORS.get(reason, PeerRefused)
    text = text_of(reason) + (f" ({detail})" if detail else "")
    return kind(text, hint=HINTS.get(reason))


def own_name() -> str:
    """What this host calls itself to a peer."""
    return suggestion_to_name(socket.gethostname().partition(".")[0])


def reachable(address: str) -> str:
    """The listener's address as others can dial it: of a wildcard, the address that this host goes out with."""
    host, port = pairing.split_address(address)
    if host not in ("0.0.0.0", "::"):
        return address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1" if family is socket.AF_INET6 else "192.0.2.1", 9))
            host = probe.getsockname()[0]
    except OSError:
        host = socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ms(seconds: float) -> float | None:
    return None if seconds != seconds else round(seconds * 1000, 2)


def _text(args: dict[str, Any], key: str, default: str | None = None) -> str:
    value = args.get(key, default)
    if value is None and default == "":
        return ""
    if not isinstance(value, str):
        raise UserError(f"{key} is missing")
    return value


def _id(args: dict[str, Any]) -> str:
    """An id as shown, or the beginning of one; what all ids begin with names none."""
    text = _text(args, "id")
    if len(text) <= len(records.ID_PREFIX):
        raise NoSuchThing(f"{text!r} is no migration's id", hint="silofs migration ls")
    return text


def _choice(kind: Any, args: dict[str, Any], key: str, default: Any) -> Any:
    value = args.get(key)
    try:
        return default if value is None else kind(value)
    except ValueError:
        raise UserError(f"{key} is {value!r}, not one of {', '.join(each.value for each in kind)}") from None
