"""Where a store's control socket is, for both of its ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Final, Protocol

CONTROL: Final = "control.sock"
_CREDENTIALS: Final = Struct("iII")  # pid, uid, gid
_SUN_PATH = 107  # bytes of a socket's path, its terminator not counted (unix(7))


def nameless(store: Path) -> bytes:
    """The socket's address while the store's disk has no room for one: an abstract one (unix(7)), which takes none.

    Anybody on the host can take such an address first, so whoever connects to it looks at who listens.
    """
    status = store.stat()
    return f"\0silofs/{status.st_dev}/{status.st_ino}".encode()


class _Socket(Protocol):
    """Of Python or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int) -> bytes: ...


def peer_uid(sock: _Socket) -> int:
    """The user at the other end; of whoever listens, the one who began to."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


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
