"""The control socket: who may, what is refused, and that nothing that comes in harms the daemon."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from silofs import limits
from silofs.cli.client import connect, request
from silofs.control import Call, parse_request, serve
from silofs.errors import NoSuchVolume, SiloError, UserError
from silofs.sockets import nameless

Fields = dict[str, Any]


class Verbs:
    """A service with a verb for each thing that can happen to a request."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.ended: list[str] = []

    async def call(self, verb: str, args: Fields, call: Call) -> Fields:
        if verb == "echo":
            return {"args": args}
        if verb == "steps":
            for step in range(3):
                await call.progress(step=step)
            return {"steps": 3}
        if verb == "missing":
            raise NoSuchVolume("there is no volume 'x'")
        if verb == "bug":
            raise KeyError("oops")
        if verb == "files":
            return {"texts": [os.pread(fd, 100, 0).decode() for fd in call.fds]}
        assert verb in ("wait", "stubborn")
        self.started.set()
        try:
            await trio.sleep(3600 if verb == "wait" else 0.2)
            self.ended.append("finished")
        except trio.Cancelled:
            self.ended.append("cancelled")
            raise
        return {}

    def cancellable(self, verb: str) -> bool:
        return verb == "wait"


@contextlib.contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def served(verbs: Verbs | None = None) -> AsyncIterator[Path]:
    with place() as store:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, store / "control.sock", verbs or Verbs())
            yield store
            nursery.cancel_scope.cancel()
        assert not (store / "control.sock").exists()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def ask(store: Path, verb: str, args: Fields | None = None, **rest: Any) -> Fields:
    sock = connect(store)
    assert sock is not None
    with sock:
        return request(sock, verb, args or {}, **rest)


def send_raw(store: Path, data: bytes) -> bytes:
    """What comes back for these bytes until the daemon closes."""
    sock = connect(store)
    assert sock is not None
    with sock:
        sock.settimeout(20)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was refused while we were still talking
        parts = []
        try:
            while part := sock.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


async def test_a_request_and_its_result() -> None:
    async with served() as store:
        assert await trio.to_thread.run_sync(ask, store, "echo", {"name": "ä"}) == {"args": {"name": "ä"}}


async def test_a_disk_without_room_for_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def full(path: Path) -> Iterator[str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield ""

    monkeypatch.setattr("silofs.control.short_path", full)
    async with served() as store:
        assert not (store / "control.sock").exists()
        assert await trio.to_thread.run_sync(ask, store, "echo", {"name": "a"}) == {"args": {"name": "a"}}
    with place() as other:
        assert connect(other) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="being somebody else needs root")
def test_a_stranger_who_took_the_address_is_not_the_daemon() -> None:
    with place() as store:
        script = "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        script += "s.bind(bytes.fromhex(sys.argv[1])); s.listen(); print('listens', flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", script, nameless(store).hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
            assert stranger.stdin is not None and stranger.stdout is not None
            assert stranger.stdout.readline() == b"listens\n"
            assert connect(store) is None
            stranger.stdin.close()


async def test_progress_comes_before_the_result() -> None:
    seen: list[Fields] = []
    async with served() as store:
        result = await trio.to_thread.run_sync(lambda: ask(store, "steps", progress=seen.append))
    assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert result == {"steps": 3}


async def test_an_error_arrives_as_its_own_class() -> None:
    async with served() as store:
        with pytest.raises(NoSuchVolume) as caught:
            await trio.to_thread.run_sync(ask, store, "missing")
    assert caught.value.message == "there is no volume 'x'"
    assert caught.value.hint == NoSuchVolume.default_hint
    assert caught.value.exit_code == 10


async def test_a_bug_ends_the_request_and_not_the_daemon() -> None:
    async with served() as store:
        with pytest.raises(SiloError) as caught:
            await trio.to_thread.run_sync(ask, store, "bug")
        assert caught.value.exit_code == 1
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}


async def test_files_come_along() -> None:
    async with served() as store:
        names = [store / "a", store / "b"]
        for name in names:
            name.write_text(f"this is {name.name}")
        fds = [os.open(name, os.O_RDONLY) for name in names]
        before = open_files()
        result = await trio.to_thread.run_sync(lambda: ask(store, "files", fds=fds))
        assert result == {"texts": ["this is a", "this is b"]}
        for _ in range(100):
            if open_files() <= before:
                break
            await trio.sleep(0.01)
        assert open_files() <= before
        for fd in fds:
            os.close(fd)


async def test_too_many_files_are_refused() -> None:
    async with served() as store:
        fd = os.open("/dev/null", os.O_RDONLY)
        with pytest.raises(UserError):
            await trio.to_thread.run_sync(lambda: ask(store, "files", fds=[fd] * (limits.CONTROL_FDS_MAX + 1)))
        os.close(fd)
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}


async def test_a_client_that_leaves_cancels_what_may_be_cancelled() -> None:
    verbs = Verbs()
    async with served(verbs) as store:
        sock = connect(store)
        assert sock is not None
        sock.sendall(b'{"verb": "wait", "args": {}}\n')
        with trio.fail_after(10):
            await verbs.started.wait()
            sock.close()
            while not verbs.ended:
                await trio.sleep(0.001)
    assert verbs.ended == ["cancelled"]


async def test_a_client_that_leaves_does_not_cancel_anything_else() -> None:
    verbs = Verbs()
    async with served(verbs) as store:
        sock = connect(store)
        assert sock is not None
        sock.sendall(b'{"verb": "stubborn", "args": {}}\n')
        with trio.fail_after(10):
            await verbs.started.wait()
            sock.close()
            while not verbs.ended:
                await trio.sleep(0.001)
    assert verbs.ended == ["finished"]


async def test_the_socket_is_for_its_user_only() -> None:
    async with served() as store:
        assert (store / "control.sock").stat().st_mode & 0o777 == 0o600


async def test_a_stale_socket_is_replaced() -> None:
    with place() as store:
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(store / "control.sock"))
        stale.close()
        assert connect(store) is None
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, store / "control.sock", Verbs())
            assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}
            nursery.cancel_scope.cancel()


async def test_a_store_with_a_very_long_path() -> None:
    with place() as top:
        store = top / ("d" * 100) / ("e" * 100)
        store.mkdir(parents=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, store / "control.sock", Verbs())
            assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}
            nursery.cancel_scope.cancel()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_even_if_the_socket_were_open_to_all() -> None:
    async with served() as store:
        store.chmod(0o755)
        (store / "control.sock").chmod(0o666)
        ready, answer = os.pipe()
        child = os.fork()
        if child == 0:  # no trio, no pytest in here: only a socket
            line = b"nothing"
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(store / "control.sock"))
                    with contextlib.suppress(BrokenPipeError):
                        sock.sendall(b'{"verb": "echo", "args": {}}\n')
                    line = sock.recv(65536)
            except OSError as error:
                line = repr(error).encode()
            finally:
                os.write(answer, line)
                os._exit(0)
        os.close(answer)
        received = await trio.to_thread.run_sync(os.read, ready, 65536)
        os.close(ready)
        os.waitpid(child, 0)
        fields = json.loads(received)
        assert (fields["type"], fields["code"], fields["exit_code"]) == ("error", "not_authorised", 12)
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}


MALFORMED = [
    b"\n",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b'"verb"\n',
    b'{"verb": 1, "args": {}}\n',
    b'{"verb": "echo", "args": []}\n',
    b'{"verb": "echo", "args": {}, "more": 1}\n',
    b'{"verb": "echo", "args": {}\n',
    b"\xff\xfe\x00\n",
    b"[" * 200_000 + b"\n",
    b'{"verb": "echo", "args": {}} {"verb": "echo"}\n',
]


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_line_that_is_no_request(line: bytes) -> None:
    async with served() as store:
        fields = json.loads(await trio.to_thread.run_sync(send_raw, store, line))
        assert (fields["type"], fields["code"], fields["exit_code"]) == ("error", "invalid", 2)
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}


async def test_a_line_without_an_end_is_bounded() -> None:
    async with served() as store:
        answer = await trio.to_thread.run_sync(send_raw, store, b"x" * (limits.CONTROL_LINE_BYTES_MAX + 70_000))
        assert b"longer than" in answer
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}


async def test_half_a_request_is_no_request() -> None:
    async with served() as store:
        assert await trio.to_thread.run_sync(send_raw, store, b'{"verb": "echo", "ar') == b""
        assert await trio.to_thread.run_sync(send_raw, store, b"") == b""
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}


async def test_a_client_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONTROL_REQUEST_S", 0.05)
    async with served() as store:
        sock = connect(store)
        assert sock is not None
        sock.settimeout(10)
        assert await trio.to_thread.run_sync(sock.recv, 100) == b""
        sock.close()


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONTROL_CONNECTIONS_MAX", 2)
    async with served() as store:
        idle = [connect(store), connect(store)]
        with trio.fail_after(10):
            answer = await trio.to_thread.run_sync(send_raw, store, b"")
        assert json.loads(answer)["code"] == "try_again"
        for sock in idle:
            assert sock is not None
            sock.close()
        with trio.fail_after(10):
            while True:
                try:
                    result = await trio.to_thread.run_sync(ask, store, "echo")
                    break
                except SiloError:
                    await trio.sleep(0.01)
        assert result == {"args": {}}


VALUES = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["verb", "args", "x"]), inner),
)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_request_or_a_user_error(line: bytes) -> None:
    try:
        verb, args = parse_request(line)
    except UserError:
        return
    assert isinstance(verb, str)
    assert isinstance(args, dict)


async def test_bytes_at_random_leave_the_daemon_as_it_was() -> None:
    import random

    seeded = random.Random(48)
    async with served() as store:
        for _ in range(100):
            data = seeded.randbytes(seeded.randrange(300)) + b"\n" * seeded.randrange(2)
            for line in (await trio.to_thread.run_sync(send_raw, store, data)).splitlines():
                assert json.loads(line)["type"] == "error"
        assert await trio.to_thread.run_sync(ask, store, "echo") == {"args": {}}
