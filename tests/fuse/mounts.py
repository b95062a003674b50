"""Real mounts for tests: a holder and its daemon in processes of their own, and nothing left behind.

    with Mount(tmp_path) as mount:
        mount.create("vm1", 1 << 30)
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        mount.kill_daemon()

Nothing here sleeps to let something happen: `wait` polls a condition up to a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from silofs.mount import kernel, launcher

T = TypeVar("T")
DEADLINE_S = 20.0
HOLDER = "silofs.mount.holder"


def why_not() -> str | None:
    """Why no real mount can be made on this machine; None if one can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened"
    if os.geteuid() != 0:
        return "the tests of the mount run as root"
    return None


def wait(condition: Callable[[], T | None], what: str, *, timeout_s: float = DEADLINE_S) -> T:
    """The first true value of `condition`; AssertionError naming `what` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def open_files(pid: int) -> dict[Path, str]:
    """What a process has open, by its entries in /proc: of one that runs, some may be gone when they are looked at."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[link] = str(link.readlink())
    return found


class Mount:
    """One store, mounted. Everything lives below `base`: store, mountpoint and log."""

    def __init__(
        self,
        base: Path,
        *,
        name: str = "a",
        options: str = "",
        listen: str | None = None,
        daemon: str = "silofs.daemon",
        holder: str = HOLDER,
        env: dict[str, str] | None = None,
    ) -> None:
        self.store = base / f"{name}-store"
        self.path = base / f"{name}-mount"
        self._options, self._listen, self._daemon, self._holder = options, listen, daemon, holder
        self._env = env or {}
        self.holder_pid = 0
        self._daemons: set[int] = set()

    # Life

    def start(self) -> Mount:
        """Make the store if there is none, and mount it."""
        from silofs.layers.store import Store

        if not self.is_mounted:  # a dead mount is there, and can only be asked by its name
            self.path.mkdir(parents=True, exist_ok=True)
        if not (self.store / "lock").exists():
            Store.create(self.store)
        command = launcher.command(
            self.store, self.path, options=self._options, listen=self._listen, daemon=self._daemon
        )
        if self._holder != HOLDER:
            at = command.index("-m")
            command[at : at + 2] = ["-X", HOLDER, "-m", self._holder]  # by that name it is known to commands
        # Compiled modules halve the start of a daemon, also where the environment says not to keep them.
        environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "", **self._env}
        with _environment(environment):
            self.holder_pid = launcher.start(command, self.store)
        return self

    def stop(self) -> None:
        """Unmount as umount(8) does, and wait until holder and daemon have committed and are gone."""
        kernel.unmount(str(self.path), lazy=False)
        assert launcher.wait_gone(self.holder_pid, timeout_s=DEADLINE_S), "the holder did not end:\n" + self.log()
        self.holder_pid = 0

    def destroy(self) -> None:
        """End whatever is left, however broken. Safe to call at any time."""
        about = launcher.holder_state(self.store) or {}
        pids = {self.holder_pid, int(about.get("holder_pid") or 0), *self._daemons, int(about.get("daemon_pid") or 0)}
        pids |= set(_children(self.holder_pid))
        for pid in pids - {0}:
            if _is_ours(pid, self.store):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                launcher.wait_gone(pid, timeout_s=DEADLINE_S)
        for mounted in kernel.mounts():
            if mounted.mountpoint == str(self.path):
                kernel.unmount(str(self.path), lazy=True)
        self.holder_pid = 0

    def __enter__(self) -> Mount:
        try:
            return self.start()
        except BaseException:
            self.destroy()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None and self.holder_pid and self.is_mounted:
                self.stop()
        finally:
            self.destroy()

    # What it is doing

    def status(self) -> dict[str, Any]:
        """What the holder says of itself: state, holder_pid, daemon_pid, restarts, last_exit."""
        about = launcher.holder_state(self.store)
        assert about is not None, "there is no holder:\n" + self.log()
        if about["daemon_pid"]:
            self._daemons.add(about["daemon_pid"])
        return about

    def silofs(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line against this store."""
        done = subprocess.run(
            [sys.executable, "-m", "silofs.cli.main", *words, "--store", str(self.store)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * 3,
        )
        assert not check or done.returncode == 0, f"silofs {' '.join(words)}: {done.returncode}\n{done.stderr}"
        return done

    def ask(self, *words: str) -> dict[str, Any]:
        """The same with --json; its last line."""
        out = self.silofs(*words, "--json").stdout
        found = json.loads(out.strip().splitlines()[-1])
        assert isinstance(found, dict)
        return found

    def log(self) -> str:
        try:
            return (self.store / launcher.LOG_FILE).read_text()
        except FileNotFoundError:
            return ""

    @property
    def is_mounted(self) -> bool:
        return any(mounted.mountpoint == str(self.path) for mounted in kernel.mounts())

    def image(self, name: str) -> Path:
        return self.path / f"{name}.img"

    def create(self, name: str, size: int) -> Path:
        """A new volume of `size` bytes, made through the mount."""
        path = self.image(name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
        return path

    # What is done to it

    def kill_daemon(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the daemon that serves; its pid."""
        pid = wait(lambda: self.status()["state"] == "serving" and self.status()["daemon_pid"], "a daemon serves")
        os.kill(pid, number)
        return int(pid)

    def wait_served(self, *, not_by: int = 0) -> int:
        """Wait until a daemon other than `not_by` serves; its pid."""

        def serving() -> int | None:
            about = self.status()
            served = about["state"] == "serving" and about["daemon_pid"] != not_by
            return int(about["daemon_pid"]) if served else None

        return wait(serving, f"a daemon other than {not_by} serves")


@contextlib.contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _is_ours(pid: int, store: Path) -> bool:
    """The process is a holder or daemon of this store, and not one that got its pid since."""
    try:
        return os.fsencode(store) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
