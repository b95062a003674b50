"""The live table of `silofs top`: rich's alternate screen, and a keyboard that is read by the key.

Whatever ends it (q, ^C, SIGTERM, an error) leaves the terminal as it was.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any

from silofs.cli import rates

Row = dict[str, Any]


def usable() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def live(store: str, interval_s: float, refresh: Callable[[], Row | str]) -> None:
    """Show what `refresh` finds until q is pressed: a refresh, or a line that says why there is none."""
    from rich.console import Console
    from rich.live import Live

    with (
        _signals() as check,
        _keyboard() as pressed,
        Live(_page(store, "", interval_s), console=Console(), screen=True, auto_refresh=False) as shown,
    ):
        while not pressed("q", interval_s):
            shown.update(_page(store, refresh(), interval_s), refresh=True)
            check()


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """^C, SIGTERM and SIGHUP raise KeyboardInterrupt; where that gets lost (in a destructor), the function does so."""
    came = False

    def interrupt(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _page(store: str, found: Row | str, interval_s: float) -> Any:
    """One picture. Names are put in as text: rich would read brackets as markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    foot = Text(f"every {interval_s:g} s; q ends", style="dim")
    if isinstance(found, str):
        return Group(Text(f"{store}  {found or '…'}"), foot)
    head = (
        f"{store}  {found['state']}, {_count(found['volumes'], 'volume')}, {_count(found['migrations'], 'migration')}"
    )
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(rates.HEADERS):
        grid.add_column(name, justify="right" if at in rates.RIGHT else "left", no_wrap=True)
    # The total on top: what does not fit is cut off below.
    *volumes, total = rates.rows(found)
    for row in (total, *volumes):
        grid.add_row(*map(Text, row), style="bold" if row is total else "")
    return Group(Text(head), foot, Text(), grid)


def _count(things: list[Row], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[str, float], bool]]:
    """A function that waits so long for a key and says whether it came. Where stdin is no terminal none ever does."""
    fd = sys.stdin.fileno() if sys.stdin.isatty() else -1
    before = termios.tcgetattr(fd) if fd >= 0 else None

    def pressed(key: str, wait_s: float) -> bool:
        nonlocal fd
        give_up = time.monotonic() + wait_s
        while (left := give_up - time.monotonic()) > 0:
            if not select.select([fd] if fd >= 0 else [], [], [], left)[0]:
                continue
            typed = os.read(fd, 256)
            if key.encode() in typed.lower():
                return True
            if not typed:
                fd = -1  # hung up
        return False

    try:
        if before is not None:
            tty.setcbreak(fd)
        yield pressed
    finally:
        if before is not None and sys.stdin.isatty():
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
