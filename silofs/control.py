"""The control socket of a store: one request line in, progress lines and one result or error line out.

Who may: the store's directory is 0700 and the socket 0600, and the caller's uid (SO_PEERCRED, unix(7)) has to be the
daemon's or root's. What comes in is bounded before it is kept: line length, files passed, time to send the line,
connections at a time (limits.CONTROL_*). A line that is no request is answered with an error and changes nothing.

A client that closes its end takes its request back: the verb is cancelled at its next checkpoint, if it was registered
as one that may be. A write transaction that was submitted still lands.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import trio

from silofs import limits
from silofs.errors import NotAuthorised, SiloError, TryAgain, UserError
from silofs.sockets import nameless, peer_uid, short_path

log = logging.getLogger(__name__)


class Call:
    """One request inside the daemon. `fds` are the files that came with it; the server closes them after the verb."""

    def __init__(self, stream: trio.SocketStream, fds: list[int]) -> None:
        self.fds = fds
        self._stream = stream
        self._gone = False

    @property
    def uid(self) -> int:
        """Whose request it is."""
        return peer_uid(self._stream.socket)

    async def progress(self, **fields: Any) -> None:
        """Send one progress line; does nothing once the client is gone."""
        await self.send({"type": "progress", **fields})

    async def send(self, line: dict[str, Any]) -> None:
        """One line, whole or, if the client does not read or has left, the last one."""
        if self._gone:
            return
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        # Shielded: half a line before a cancel would spoil the answer that follows it.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + limits.CONTROL_REQUEST_S) as scope:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._gone = True
        if scope.cancelled_caught:
            self._gone = True

    async def left(self) -> None:
        """Return once the client has closed its end. What it sends after its request is dropped."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._stream.receive_some(4096):
                pass
        self._gone = True


Handler = Callable[[dict[str, Any], Call], Awaitable[dict[str, Any]]]


class Dispatcher(Protocol):
    """What the server needs of silofs.service.Service."""

    async def call(self, verb: str, args: dict[str, Any], call: Call) -> dict[str, Any]: ...

    def cancellable(self, verb: str) -> bool: ...


async def serve(
    path: Path, service: Dispatcher, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the socket at `path` until cancelled. The caller has the store's lock, so a socket found there is stale."""
    sock = _listen(path)
    try:
        slots = trio.CapacityLimiter(limits.CONTROL_CONNECTIONS_MAX)

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                try:
                    slots.acquire_nowait()
                except trio.WouldBlock:
                    await _refuse(stream, TryAgain("too many commands are running", hint="try again"))
                    return
                try:
                    await _connection(stream, service)
                except Exception:
                    log.exception("a control connection failed")
                finally:
                    slots.release()

        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        await trio.serve_listeners(handle, [listener], task_status=_Started(task_status))
    finally:
        sock.close()
        with contextlib.suppress(OSError):
            path.unlink()


class _Started:
    """trio.serve_listeners reports its listeners; the callers of `serve` want no value."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status

    def started(self, value: object = None) -> None:
        self._status.started()


def _listen(path: Path) -> socket.socket:
    """A listening socket that only this user can reach from the moment it exists.

    On a disk that has no room for it, as XFS takes blocks even for a socket, one without a name there: that commands
    are heard is how room is made.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        try:
            with short_path(path) as name:
                sock.bind(name)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("there is no room for %s; commands find the daemon without", path)
            sock.bind(nameless(path.parent))
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    sock.listen(limits.CONTROL_CONNECTIONS_MAX)
    return sock


def authorised(sock: trio.socket.SocketType) -> bool:
    """Whether the other end is this daemon's user, or root."""
    return peer_uid(sock) in (0, os.geteuid())


async def _connection(stream: trio.SocketStream, service: Dispatcher) -> None:
    if not authorised(stream.socket):
        await _refuse(stream, NotAuthorised("this store belongs to another user", hint="run it as that user, or root"))
        return
    fds: list[int] = []
    try:
        try:
            with trio.fail_after(limits.CONTROL_REQUEST_S):
                line = await _read_line(stream.socket, fds)
            if line is None:
                return
            verb, args = parse_request(line)
        except trio.TooSlowError:
            return
        except SiloError as error:
            await _refuse(stream, error)
            return
        await _run(stream, service, verb, args, fds)
    finally:
        for fd in fds:
            os.close(fd)


async def _run(stream: trio.SocketStream, service: Dispatcher, verb: str, args: dict[str, Any], fds: list[int]) -> None:
    call = Call(stream, fds)
    answer: dict[str, Any] | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await call.left()
            if service.cancellable(verb):
                nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        answer = await _answer(service, verb, args, call)
        nursery.cancel_scope.cancel()
    if answer is not None:
        await call.send(answer)


async def _answer(service: Dispatcher, verb: str, args: dict[str, Any], call: Call) -> dict[str, Any]:
    """The last line for a request: its result, or what it raised. A bug ends the request, never the daemon."""
    try:
        return {**await service.call(verb, args, call), "type": "result"}
    except SiloError as error:
        return error_line(error)
    except Exception as error:
        log.exception("the verb %s failed", verb)
        return error_line(SiloError(f"{type(error).__name__}: {error}", hint="the daemon's log has the traceback"))


def error_line(error: SiloError) -> dict[str, Any]:
    fields = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    return {"type": "error", **fields}


async def _refuse(stream: trio.SocketStream, error: SiloError) -> None:
    with trio.move_on_after(1.0):
        await Call(stream, []).send(error_line(error))


async def _read_line(sock: trio.socket.SocketType, fds: list[int]) -> bytes | None:
    """The request line, without its end; None if the client left. Files that come along are appended to `fds`."""
    line = bytearray()
    room = socket.CMSG_SPACE(limits.CONTROL_FDS_MAX * array.array("i").itemsize)
    while True:
        data, ancillary, flags, _ = await sock.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                passed = array.array("i")
                passed.frombytes(payload[: len(payload) - len(payload) % passed.itemsize])
                fds.extend(passed)
        if flags & socket.MSG_CTRUNC or len(fds) > limits.CONTROL_FDS_MAX:
            raise UserError(f"more than {limits.CONTROL_FDS_MAX} files came with one request")
        if not data:
            return None
        line += data
        at = line.find(b"\n")
        if at >= 0:
            return bytes(line[:at])
        if len(line) > limits.CONTROL_LINE_BYTES_MAX:
            raise UserError(f"a request line is longer than {limits.CONTROL_LINE_BYTES_MAX} bytes")


def parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """(verb, args) of a request line. Raises UserError for anything that is not exactly a request."""
    if len(line) > limits.CONTROL_LINE_BYTES_MAX:
        raise UserError(f"a request line is longer than {limits.CONTROL_LINE_BYTES_MAX} bytes")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("a request is one line of JSON") from error
    if not isinstance(request, dict) or set(request) - {"verb", "args"}:
        raise UserError('a request is an object with "verb" and "args"')
    verb, args = request.get("verb"), request.get("args", {})
    if not isinstance(verb, str) or not isinstance(args, dict):
        raise UserError('a request is an object with "verb" and "args"')
    return verb, args
