"""`silofs` run in this process, a daemon's service on a thread of it, and images to import."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import trio

from silofs.cli.main import run
from silofs.control import Handler, serve
from silofs.engine.volume import VolumeState
from silofs.layers.catalog import Volume
from silofs.layers.log import WriteLog
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.service import Service

T = TypeVar("T")

PAGE = 4096


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def json(self) -> dict[str, Any]:
        """The only JSON object, or the last one of long work."""
        return self.lines[-1]


class Silofs:
    """`silofs` with a store: `silofs("create", "vm1", "--size", "1G")`."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store = store
        self._capsys = capsys

    def __call__(self, *args: str | Path) -> Done:
        self._capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Done(code, *self._capsys.readouterr())

    def ok(self, *args: str | Path) -> dict[str, Any]:
        """The result of a command that succeeds, run with --json."""
        done = self(*args, "--json")
        assert done.code == 0, done
        return done.json

    def fails(self, code: int, *args: str | Path) -> dict[str, Any]:
        """The error of a command that ends with this exit code; in both forms, and with what to do about it."""
        done = self("--json", *args)
        assert done.code == code, done
        error = done.json
        assert error["type"] == "error"
        assert error["schema"].startswith("silofs.")
        assert error["message"]
        plain = self(*args)
        assert (plain.code, plain.out) == (code, "")
        lines = plain.err.splitlines()
        assert len(lines) == (2 if error["hint"] else 1), plain
        assert "Traceback" not in plain.err
        return error


class Engine:
    """As much of an engine as the service needs: nothing is ever pending here."""

    dirty_bytes = 0

    def __init__(self, store: Store, log: WriteLog) -> None:
        self.store = store
        self.log = log

    def volumes(self) -> list[VolumeState]:
        return []

    def shown(self, record: Volume) -> tuple[Volume, int, int]:
        return record, record.size, record.data_pages

    async def transact(self, fn: Callable[[WriteTxn], T]) -> T:
        return await trio.to_thread.run_sync(self.store.write, fn)


class Daemon:
    def __init__(self, store: Path) -> None:
        self._store = store

    async def restart(self) -> None: ...

    def status(self) -> dict[str, Any]:
        return {
            "state": "serving",
            "version": "0.1.0",
            "mountpoint": "/mnt/silo",
            "daemon_pid": os.getpid(),
            "holder_pid": os.getppid(),
            "listen": None,
            "restarts": 0,
            "capabilities": ["resend"],
        }


@contextmanager
def daemon(path: Path, handlers: Mapping[str, Handler] | None = None) -> Iterator[WriteLog]:
    """The store, served by a thread of this process, with `handlers` for verbs that other parts of a daemon have."""
    started = threading.Event()
    stop: list[Callable[[], None]] = []
    memfd = os.memfd_create("log")
    with Store.open(path) as store:
        WriteLog.format(memfd, store.uuid, 1 << 20)
        log = WriteLog.open(memfd, store.uuid)

        async def main() -> None:
            service = Service(Engine(store, log), Daemon(path))
            for verb, handler in (handlers or {}).items():
                service.register(verb, handler)
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, path / "control.sock", service)
                token = trio.lowlevel.current_trio_token()
                stop.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
                started.set()

        thread = threading.Thread(target=trio.run, args=(main,))
        thread.start()
        assert started.wait(10)
        try:
            yield log
        finally:
            stop[0]()
            thread.join()
    os.close(memfd)


def image(path: Path, size: int, *pages: int) -> Path:
    """A sparse raw image; each page of `pages` is full of its own number."""
    with open(path, "wb") as file:
        file.truncate(size)
        for page in pages:
            file.seek(page * PAGE)
            file.write(bytes([page % 255 + 1]) * min(PAGE, size - page * PAGE))
    return path
