"""`mount.silofs STORE MOUNTPOINT [-sfnv] [-o OPTS]`: what mount(8) runs for a line of fstab(5) like

    /var/lib/silofs  /var/lib/silo  silofs  listen=10.0.0.1:7011,nofail  0  0

Beside the options of `silofs mount -o`, `listen=HOST:PORT` is what `--listen` is there. Exit codes are mount(8)'s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from silofs.errors import SiloError, UserError

USAGE, SYSTEM, INTERRUPTED, FAILED = 1, 2, 8, 32


def run(argv: Sequence[str] | None = None) -> int:
    """Mount, and return mount(8)'s exit code."""
    try:
        places, options, fake = parse(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"mount.silofs: {error.message}", file=sys.stderr)
        return USAGE
    if fake:
        return 0
    try:
        _mount(*places, options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SiloError as error:
        print(f"mount.silofs: {error.message}\n  {error.hint}".rstrip(), file=sys.stderr)
        return USAGE if isinstance(error, UserError) and error.code == "invalid" else FAILED
    except OSError as error:
        print(f"mount.silofs: {error}", file=sys.stderr)
        return SYSTEM
    return 0


def parse(args: list[str]) -> tuple[tuple[Path, Path], list[str], bool]:
    """((store, mountpoint), options, only pretend). Raises UserError."""
    words: list[str] = []
    options: list[str] = []
    fake = False
    at = 0
    while at < len(args):
        word = args[at]
        if word in ("-o", "-t", "-N"):  # -t TYPE.SUBTYPE and -N NAMESPACE say nothing to us
            at += 1
            if at == len(args):
                raise UserError(f"{word} wants a value")
            if word == "-o":
                options += [option for option in args[at].split(",") if option]
        elif word.startswith("-") and len(word) > 1 and set(word[1:]) <= set("sfnv"):
            fake = fake or "f" in word
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}")
        else:
            words.append(word)
        at += 1
    if len(words) != 2:
        raise UserError("usage: mount.silofs STORE MOUNTPOINT [-sfnv] [-o OPTIONS]")
    return (Path(words[0]), Path(words[1])), options, fake


def _mount(store: Path, mountpoint: Path, options: list[str]) -> None:
    from silofs.cli.mounting import check_address
    from silofs.mount import launcher

    listen = [option.removeprefix("listen=") for option in options if option.startswith("listen=")]
    if listen:
        check_address(listen[-1])
    rest = ",".join(option for option in options if not option.startswith("listen="))
    if not (store / "data").is_dir():
        from silofs.offline import init

        init(store)
    launcher.start(launcher.command(store, mountpoint, options=rest, listen=listen[-1] if listen else None), store)
