"""A QMP client of one socket: greeting, commands, events (QEMU's docs/interop/qmp-spec)."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class QmpError(Exception):
    """QEMU answered a command with an error; the message is `class: description`."""


class Qmp:
    """Blocking; every wait ends at its deadline with TimeoutError. Events that nobody waited for are kept in order."""

    def __init__(self, path: Path, *, timeout: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no QEMU listens at {path}") from None
                time.sleep(0.02)
        self._message(deadline)  # the greeting
        self.command("qmp_capabilities")

    def command(self, name: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """Run `name`; underscores in argument names become hyphens. Returns QEMU's `return` value."""
        request = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while True:
            message = self._message(deadline)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{name}: {message['error']['class']}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_event(self, name: str, timeout: float = 30.0) -> dict[str, Any]:
        """The next event called `name`, an unread one from earlier included."""
        deadline = time.monotonic() + timeout
        while True:
            for at, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(at)
            message = self._message(deadline)
            if "event" in message:
                self.events.append(message)

    def wait_migration(self, *wanted: str, timeout: float = 60.0) -> dict[str, Any]:
        """Poll query-migrate until its status is in `wanted`; QmpError when the migration failed instead."""
        deadline = time.monotonic() + timeout
        while True:
            state: dict[str, Any] = self.command("query-migrate")
            status = state.get("status")
            if status in wanted:
                return state
            if status in ("failed", "cancelled"):
                raise QmpError(f"migration {status}: {state.get('error-desc', 'no reason given')}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"migration is {status}, not {' or '.join(wanted)}")
            time.sleep(0.02)

    def close(self) -> None:
        self._socket.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("QEMU closed its QMP socket")
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message
