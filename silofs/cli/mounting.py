"""Verbs on the mount, its daemon and this host."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from silofs import __version__, limits
from silofs.cli.client import Gone
from silofs.cli.output import App, pairs
from silofs.cli.runner import call, holder_says, lock_owner
from silofs.cli.sizes import show_size
from silofs.cli.verbs import common
from silofs.errors import Busy, Exit, NoDaemon, NoStore, NoSuchThing, SiloError, TryAgain, UserError, error_of


@click.command("mount", short_help="Mount the store's volumes as files.")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--listen", metavar="HOST:PORT", help="Where paired hosts reach this one.")
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr.")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Options of mount(8), separated by commas.")
@common("mount")
def mount_command(app: App, mountpoint: Path, listen: str | None, foreground: bool, options: tuple[str, ...]) -> None:
    """Mount the volumes of the store as files: NAME.img in MOUNTPOINT. Returns once the mount answers."""
    from silofs.mount import launcher

    if listen is not None:
        check_address(listen)
    if not (app.store / "data").is_dir():
        from silofs.offline import init

        if not mountpoint.is_dir():  # else a mount that is refused would leave a new store behind
            raise UserError(f"{mountpoint} is not a directory", hint="make it, or name another mountpoint")
        init(app.store)
        app.note(f"made a store in {app.store}")
    command = launcher.command(app.store, mountpoint, options=",".join(options), listen=listen)
    if foreground:
        launcher.foreground(command)
    holder = launcher.start(command, app.store)
    status = call(app.store, "status", {}, offline=False)
    shown = {"mountpoint": status["mountpoint"], "store": str(app.store), "holder_pid": holder}
    app.result({**shown, "daemon_pid": status["daemon_pid"], "listen": status.get("listen")})
    app.note(f"mounted on {mountpoint}")


def check_address(text: str) -> str:
    """HOST:PORT. Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{text!r} is no address", hint="write HOST:PORT, for example 10.0.0.1:7011")
    return text


@click.command("umount", short_help="Write everything out, and unmount.")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Take the mount away now; files that are open stay usable.")
@common("umount")
def umount_command(app: App, mountpoint: Path, lazy: bool) -> None:
    """Unmount, and wait until everything is written out. Refused while files are open, unless --lazy."""
    from silofs.mount import kernel, launcher

    store = launcher.store_of(mountpoint)
    if store is None:
        raise NoSuchThing(f"nothing of silofs is mounted on {mountpoint}", hint="silofs status shows the mountpoint")
    holder = lock_owner(store)
    try:
        kernel.unmount(str(kernel.absolute(mountpoint)), lazy=lazy)
    except OSError as error:
        if error.errno == errno.EBUSY:
            hint = "stop the VMs that use them; --lazy takes the mount away and lets them go on"
            raise Busy(f"files on {mountpoint} are open", hint=hint) from None
        raise SiloError(f"cannot unmount {mountpoint}: {error.strerror}", hint="unmount as who mounted it") from None
    if not lazy and holder and not launcher.wait_gone(holder, timeout_s=limits.START_S):
        raise TryAgain("unmounted, but the write log is not committed yet", hint=f"the holder is process {holder}")
    app.result({"mountpoint": str(kernel.absolute(mountpoint)), "store": str(store), "lazy": lazy})
    app.note(f"unmounted {mountpoint}")


@click.command("restart", short_help="Replace the daemon under running VMs.")
@common("restart")
def restart_command(app: App) -> None:
    """Start the daemon anew, from the program as it is installed now. Running VMs notice a short pause."""
    before = call(app.store, "status", {}, offline=False)
    started = time.monotonic()
    with contextlib.suppress(Gone):  # the daemon may be gone before its answer is out
        call(app.store, "restart", {}, offline=False)
    while True:
        try:
            now = call(app.store, "status", {}, offline=False)
            if now["daemon_pid"] != before["daemon_pid"] and now["state"] == "serving":
                break
        except TryAgain:
            pass
        if time.monotonic() - started > limits.START_S:
            raise TryAgain("the new daemon does not serve yet", hint="silofs status says why; I/O is held meanwhile")
        time.sleep(0.02)
    refused = now.get("refused")
    if refused:
        # The program of before had a daemon waiting, and it serves.
        message = f"the program as it is installed now cannot open the store: {refused['message']}"
        raise error_of(str(refused["code"]))(message, hint=f"the one of before goes on; {refused['hint']}")
    seconds = round(time.monotonic() - started, 3)
    app.result({"daemon_pid": now["daemon_pid"], "old_daemon_pid": before["daemon_pid"], "seconds": seconds})
    app.note(f"daemon {before['daemon_pid']} was replaced by {now['daemon_pid']}")


@click.command("status", short_help="Show the daemon of the store.")
@common("status")
def status_command(app: App) -> int:
    """Show the daemon, the holder and the mount. Exit code 75 while the daemon is away, 1 if nothing is mounted."""
    try:
        fields = call(app.store, "status", {}, offline=False)
    except TryAgain:
        held = holder_says(app.store)
        if held is None:
            raise
        app.result(held, lambda: _status_text(held))
        app.warn("the daemon does not answer; I/O on the mount waits for it")
        return Exit.TRY_AGAIN
    app.result(fields, lambda: _status_text(fields))
    return Exit.OK


def _flat(fields: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of fields by both names; of those inside others, what is nothing is left out."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}_")
        elif not above or value:
            yield above + key, value


def _status_text(fields: dict[str, Any]) -> str:
    rows: list[tuple[str, object]] = []
    for key, value in _flat(fields):
        if value in (None, "", []) or key == "refused":  # `why` says it in words
            continue
        if key in ("frozen", "expired_freezes"):
            value = [f"{each['volume']} by {each['owner']} until {each['until']}" for each in value]
        shown = show_size(value) if key.endswith("_bytes") and isinstance(value, int) else value
        rows.append((key.replace("_", " "), ", ".join(map(str, shown)) if isinstance(shown, list) else shown))
    return pairs(rows)


@click.command("doctor", short_help="Look for what this host lacks.")
@common("doctor")
def doctor_command(app: App) -> int:
    """Look at the kernel, the tools and the store's file system. Exit code 3 if something is missing."""
    from silofs.cli import doctor

    findings = doctor.examine(app.store)
    worse = [finding for finding in findings if finding["status"] != "ok"]
    failed = any(finding["status"] == "failed" for finding in findings)
    app.result(
        {"checks": findings, "warnings": len(worse), "state": doctor.verdict(findings)}, lambda: doctor.text(findings)
    )
    if failed:
        return Exit.FAILED
    return Exit.WARNINGS if worse else Exit.OK


@click.command("version", short_help="Show the version.")
@common("version")
def version_command(app: App) -> None:
    """Show the versions of silofs and of what it runs on; of its running daemon as well."""
    import platform

    fields: dict[str, Any] = {"version": __version__, "python": platform.python_version(), "kernel": platform.release()}
    try:
        fields["daemon"] = call(app.store, "status", {}, offline=False).get("version")
    except (NoDaemon, NoStore, TryAgain, OSError):
        fields["daemon"] = None
    app.result(fields, lambda: f"silofs {__version__}")
