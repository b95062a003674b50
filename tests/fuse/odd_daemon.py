"""The daemon, with faults that a test switches on by making a file in the store: `die`, `refuse`, `dialect`, `plain`
(without the C extension; `equipped`: with it), `withdrawn` (once), `touched`, `no-copies` (writes that pyfuse3 copies
fail), and `refuse-new`, `old-log` (a program that knows version 1 of the write log only) and `old-format` (one that
knows version 2 of the store), which those have seen that started after they were made."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

STORE = Path(sys.argv[sys.argv.index("--store") + 1])

if (STORE / "die").exists():
    os._exit(3)  # as a daemon does whose installation is broken

if (STORE / "plain").exists():
    os.environ["SILOFS_EXTENSION"] = "off"
if (STORE / "equipped").exists():
    del os.environ["SILOFS_EXTENSION"]

OLD_LOG = (STORE / "old-log").exists()
OLD_FORMAT = (STORE / "old-format").exists()
NEW = (STORE / "refuse-new").exists()
(STORE / f"started-{os.getpid()}").touch()

from silofs import daemon  # noqa: E402
from silofs.errors import BadFormat  # noqa: E402
from silofs.layers import memfd, schema  # noqa: E402
from silofs.layers.store import Store  # noqa: E402
from silofs.mount import session  # noqa: E402
from silofs.mount.fuse import Adapter  # noqa: E402

from pyfuse3 import FUSEError  # noqa: E402  # isort: skip - after the extension


class PickyStore(Store):
    @classmethod
    def open(cls, path: Path, **rest: object) -> Store:  # type: ignore[override]
        if NEW or (STORE / "refuse").exists():
            raise BadFormat("this test refuses the store")
        return super().open(path, **rest)  # type: ignore[arg-type]


class HastyWait(session._Polled):
    """Says once that there is a request when there is none, as if its sender had been killed at that moment; and writes

    to the disk at each request while there is `touched`, so that the loop waits when the disk lets nobody write.
    """

    __slots__ = ()

    async def wait(self) -> bool:
        if (STORE / "touched").exists():
            (STORE / "touched").touch()
        if (STORE / "withdrawn").exists() and not self._poll(0):
            (STORE / "withdrawn").unlink()
            return True
        return await super().wait()


async def no_copies(self: Adapter, fh: int, off: int, buf: bytes) -> int:
    raise FUSEError(errno.EIO)


if __name__ == "__main__":
    if (STORE / "no-copies").exists():
        Adapter.write = no_copies  # type: ignore[method-assign]
    session._Polled = HastyWait  # type: ignore[misc]
    daemon.Store = PickyStore  # type: ignore[misc]
    if OLD_FORMAT:
        schema.FORMAT_VERSION = 2  # type: ignore[misc]
    if OLD_LOG:
        memfd.VERSION, memfd.KNOWN = 1, (1,)  # type: ignore[misc, assignment]
        memfd.LOCKS_MAX = memfd.NOTES_MAX = 0  # type: ignore[misc]
    if (STORE / "dialect").exists():
        Adapter.enable_writeback_cache = True
    sys.exit(daemon.main())
