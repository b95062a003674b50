"""Talking to the daemon of a store over its control socket, in plain blocking sockets.

One request line goes out, with files as SCM_RIGHTS where the verb takes some; lines come back until a result or an
error. Closing the connection is how a client takes its request back.
"""

from __future__ import annotations

import array
import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from silofs import limits
from silofs.errors import SiloError, TryAgain, error_of
from silofs.sockets import CONTROL, nameless, peer_uid, short_path

Progress = Callable[[dict[str, Any]], None]


class Connection(socket.socket):
    """To the daemon of a store."""

    store: Path


def connect(store: Path) -> Connection | None:
    """The daemon of this store, or None when nobody listens. Raises PermissionError for another user's store."""
    sock = Connection(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.store = store
    try:
        try:
            with short_path(store / CONTROL) as path:
                sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.connect(nameless(store))
            if peer_uid(sock) not in (0, store.stat().st_uid):
                raise ConnectionRefusedError("somebody else has taken the daemon's address") from None
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def request(
    sock: Connection,
    verb: str,
    args: dict[str, Any],
    *,
    fds: Sequence[int] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The result of one verb. Raises what the daemon raised, and Gone when it went away without an answer, or is
    silent and does not answer to `status` either."""
    line = json.dumps({"verb": verb, "args": args}).encode() + b"\n"
    try:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(BrokenPipeError):  # it refused us before it heard us: its reason can be read
            sent = sock.sendmsg([line], ancillary)
            sock.sendall(line[sent:])
        for answer in _lines(sock):
            fields = json.loads(answer)
            kind = fields.pop("type", None)
            if kind == "result":
                return dict(fields)
            if kind == "error":
                raise error_from(fields)
            if progress is not None:
                progress(fields)
    except (ConnectionError, ValueError) as error:
        raise _gone() from error
    raise _gone()


def _lines(sock: Connection) -> Iterator[bytes]:
    """What the daemon says, line by line, up to its last whole one."""
    buffer = bytearray()
    while True:
        line, newline, rest = buffer.partition(b"\n")
        if newline:
            buffer = rest
            yield bytes(line)
        elif not select.select([sock], [], [], limits.ANSWER_S)[0]:
            _expect_life(sock.store)
        else:
            data = sock.recv(65536)
            if not data:
                return
            buffer += data


def _expect_life(store: Path) -> None:
    """Raises Gone when the daemon does not even say how it is: it is stopped, hangs, or can open no more files."""
    sock = connect(store)
    if sock is None:
        raise _gone()
    with sock:
        sock.sendall(b'{"verb": "status"}\n')
        if not select.select([sock], [], [], limits.SIGN_OF_LIFE_S)[0]:
            raise Gone(
                f"the daemon of {store} does not answer: it is stopped, or stuck, or has too many files open",
                hint="what was asked for may still be done when it goes on: look with silofs ls; see silofs.log",
            )


class Gone(TryAgain):
    """The connection ended before an answer; the verb may have been done."""


def _gone() -> Gone:
    return Gone(
        "the daemon went away before it answered", hint="look with silofs ls or silofs status whether it was done"
    )


def error_from(fields: dict[str, Any]) -> SiloError:
    """The error class of a `code`, with the daemon's own message and hint."""
    code = str(fields.get("code"))
    return error_of(code)(str(fields.get("message", code)), hint=str(fields.get("hint") or ""))
