"""Where a store's control socket is, for both of its ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

CONTROL: Final = "control.sock"
_SUN_PATH = 107  # bytes of a socket's path, its terminator not counted (unix(7))


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a socket's path that fits into sun_path however deep its directory is; valid inside the context."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
