"""What stands between a handler and pyfuse3: every exception becomes an errno here; and the calls that are never done.

An exception other than FUSEError that reaches pyfuse3 ends its loop, and with it the disks of all VMs.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from silofs.errors import SiloError, Unsupported
from silofs.mount.session import Hooks

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Counters:
    """What went wrong in handlers since this daemon started."""

    refused: int = 0  # requests answered with an error that silofs raised on purpose
    bugs: int = 0  # requests answered with EIO because a handler failed


def guarded(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A handler out of which nothing but FUSEError and trio's own BaseExceptions comes."""

    @wraps(handler)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            adapter = args[0]
            assert isinstance(adapter, Guarded)
            raise adapter.refusal(error) from None

    return call


class Guarded(Hooks):
    """Operations with one place for refusals, and with those calls that no mount of silofs knows."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()

    def refusal(self, error: Exception) -> FUSEError:
        """What the caller of the system call gets for `error`. The one place where errors become errno."""
        if isinstance(error, FUSEError):
            return error
        if isinstance(error, SiloError):
            self.counters.refused += 1
            return FUSEError(error.errno)
        self.counters.bugs += 1
        log.exception("a file system call failed", exc_info=error)
        return FUSEError(errno.EIO)

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @guarded
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True  # the kernel checks owner and mode itself (default_permissions)

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        raise FUSEError(errno.ENOSYS)  # the kernel stops asking, which it would before every write

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        raise Unsupported("no extended attributes")

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        raise Unsupported("no extended attributes")

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise Unsupported("no extended attributes")
