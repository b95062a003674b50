"""Stores and mounts in a temporary directory, for the scripts beside this file; driven by the shipped command alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
PATH = f"{BIN}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class CommandFailed(Exception):
    """A command of the sandbox exited with an error; the message holds the command and what it said."""


class Host:
    """One store and its mount, as one host would have them."""

    def __init__(self, directory: Path, listen: str | None) -> None:
        self.store = directory / "store"
        self.mountpoint = directory / "mount"
        self.listen = listen
        self.mountpoint.mkdir(parents=True)

    def disk(self, mib: int) -> None:
        """Put the store on an ext4 file system of so many MiB of its own. Needs root, and comes before the store."""
        image = self.store.parent / "disk"
        with image.open("wb") as file:
            file.truncate(mib << 20)
        self.store.mkdir()
        run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)])
        run(["mount", "-o", "loop", str(image), str(self.store)])
        (self.store / "lost+found").rmdir()

    def image(self, volume: str) -> Path:
        return self.mountpoint / f"{volume}.img"

    def snapshot(self, name: str) -> Path:
        """The file of a snapshot, "volume@name"."""
        return self.mountpoint / ".snapshots" / f"{name}.img"

    def silofs(self, *arguments: str) -> str:
        """Run one verb on this store; returns its stdout."""
        return run([str(BIN / "silofs"), *arguments], store=self.store)

    def silofs_json(self, *arguments: str) -> dict[str, Any]:
        """Run one verb with --json; returns the last object that it printed."""
        result: dict[str, Any] = json.loads(self.silofs(*arguments, "--json").splitlines()[-1])
        return result

    def mount(self) -> None:
        self.silofs("mount", *(["--listen", self.listen] if self.listen else []), str(self.mountpoint))

    def umount(self) -> None:
        if os.path.ismount(self.mountpoint):
            self.silofs("umount", str(self.mountpoint))


class Sandbox:
    """A context manager: makes a directory, and on leaving ends what was started, unmounts and removes it."""

    def __init__(self, *, keep: bool = False, under: str | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="silofs-", dir=under))
        self.keep = keep
        self.hosts: list[Host] = []
        self.processes: list[subprocess.Popen[Any]] = []

    def host(self, name: str, *, listen: bool = False) -> Host:
        address = f"127.0.0.1:{free_port()}" if listen else None
        host = Host(self.directory / name, address)
        self.hosts.append(host)
        return host

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(), cwd=ROOT, **options)
        self.processes.append(process)
        return process

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self.processes:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.keep:
            return
        for host in self.hosts:
            try:
                host.umount()
            except CommandFailed as failure:
                print(f"{failure}; unmounting lazily", file=sys.stderr)
                umount = ["umount", "--lazy", str(host.mountpoint)]
                subprocess.run([BIN / "silofs", *umount], env=environment(host.store), check=False)
                subprocess.run(umount, check=False, stderr=subprocess.DEVNULL)
        for host in self.hosts:
            if os.path.ismount(host.store):
                subprocess.run(["umount", "--lazy", str(host.store)], check=False)
        if not any(os.path.ismount(path) for host in self.hosts for path in (host.mountpoint, host.store)):
            shutil.rmtree(self.directory)


def environment(store: Path | None = None) -> dict[str, str]:
    return {**os.environ, "PATH": PATH} | ({"SILOFS_STORE": str(store)} if store else {})


def run(command: list[str], *, store: Path | None = None) -> str:
    """Run a command in the repository to its end; returns its stdout. CommandFailed carries what it said."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(store), stdin=subprocess.DEVNULL, cwd=ROOT, check=False
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise CommandFailed(f"{' '.join(command)} exited {done.returncode}: {said}")
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def raise_on_signals() -> None:
    """SIGTERM and SIGHUP unwind like ^C, so that context managers clean up."""
    import signal

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, stop)
