"""Raw images in and out of a store, in bulk: synchronous, over a `Store`; the daemon runs it in a thread.

An import goes into a layer that nothing shows yet, held by a pin, batch by batch; the volume is made on that layer when
all of it is durable, in one transaction. So an import that fails, or is killed, leaves no volume: only a pinned layer,
which is dropped at once, or by `reap` the next time that somebody has the store to himself.

Sparse files stay sparse both ways: only data is read (lseek(2) SEEK_DATA), pages of zeros are not stored, and an export
writes only pages that are data.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from silofs import limits
from silofs.blocks import PAGE, pages_for
from silofs.errors import BadImage, BadSize, Interrupted
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.names import check_size
from silofs.packing import BATCH_BYTES, BlockWriter
from silofs.stream import MAGIC

Progress = Callable[[dict[str, Any]], None]

READ_BYTES: Final = 4 * limits.MIB  # of an image at a time
READER_S: Final = 0.5  # a read transaction is renewed at this age, so that freed pages can be used again
PIN_IMPORT: Final = "import:"
PIN_EXPORT: Final = "export:"


class Cancelled(Protocol):
    def __call__(self) -> bool: ...


def never() -> bool:
    return False


@dataclass(frozen=True)
class Loaded:
    """An image that is in the store, as a sealed layer held by a pin; `bytes_read` of its file were data."""

    layer: int
    holder: str
    size: int
    bytes_read: int


def image_size(fd: int) -> int | None:
    """Bytes of a file or block device; None for a stream, which tells only at its end."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        return os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISREG(mode) and os.lseek(fd, 0, os.SEEK_CUR) == 0:
        return os.fstat(fd).st_size
    return None


def volume_size(image: int, wanted: int | None) -> int:
    """The size of the volume for an image: rounded up to a sector, or what the user wants. Raises BadSize, BadImage."""
    if image == 0:
        raise BadImage("the image is empty", hint="silofs create makes an empty volume")
    if wanted is None:
        return check_size(max(limits.SIZE_MIN, -(-image // limits.SECTOR) * limits.SECTOR))
    if wanted < image:
        raise BadSize(
            f"the image has {image} bytes and does not fit into {wanted}", hint="leave --size out, or raise it"
        )
    return check_size(wanted)


def load(
    store: Store,
    fd: int,
    wanted: int | None,
    *,
    progress: Progress,
    cancelled: Cancelled = never,
    batch_bytes: int = BATCH_BYTES,
) -> Loaded:
    """Read the raw image behind `fd` into a new layer. Raises BadImage, BadSize, StoreFull, OSError, Interrupted.

    The caller makes a volume on the layer and unpins it, or calls `drop`.
    """
    source = image_size(fd)
    if source is None:
        with _spooled(store, fd, cancelled) as spooled:
            if os.pread(spooled, len(MAGIC), 0) == MAGIC:
                raise BadImage("what came is a stream, not an image", hint="--format stream imports it")
            return load(store, spooled, wanted, progress=progress, cancelled=cancelled, batch_bytes=batch_bytes)
    size = volume_size(source, wanted)
    holder = PIN_IMPORT + uuid.uuid4().hex

    def begin(txn: WriteTxn) -> int:
        layer = txn.receive_layer(uuid.uuid4().bytes, 0, size, size)
        txn.pin(layer.id, holder)
        return layer.id

    layer = store.write(begin)
    try:
        read = _fill(store, layer, fd, source, batch_bytes, progress, cancelled)
        store.write(lambda txn: txn.put_map(layer, [], mapped=pages_for(size)))
    except BaseException:
        drop(store, layer, holder)
        raise
    return Loaded(layer, holder, size, read)


def let_go(txn: WriteTxn, layers: Iterable[int], holder: str) -> None:
    """Give up the hold on layers; each is removed when nothing else reaches it."""
    for layer in layers:
        txn.unpin(layer, holder)


def drop(store: Store, layer: int, holder: str) -> None:
    """`let_go` in a transaction of its own."""
    store.write(lambda txn: let_go(txn, [layer], holder))


def reap(txn: WriteTxn) -> int:
    """Let go of what killed imports and exports left held. Only for who knows that none is running."""
    ours = (PIN_IMPORT, PIN_EXPORT)
    found = [pin for layer in txn.layers() if layer.pins for pin in txn.pins(layer.id) if pin.holder.startswith(ours)]
    for pin in found:
        txn.unpin(pin.layer, pin.holder)
    return len(found)


def _fill(
    store: Store, layer: int, fd: int, source: int, batch_bytes: int, progress: Progress, cancelled: Cancelled
) -> int:
    """Store every page of the image that is not zero, and not in the store already; the bytes read."""
    done = 0
    with BlockWriter(store, layer, batch_bytes=batch_bytes) as writer:
        for offset, length in extents(fd, source):
            for at in range(offset, offset + length, READ_BYTES):
                if cancelled():
                    raise Interrupted("the import was stopped", hint="nothing was left behind")
                block = _read(fd, at, min(READ_BYTES, offset + length - at))
                writer.add(at // PAGE, block)
                done += len(block)
                progress({"bytes_done": at + len(block), "bytes_total": source, "bytes_read": done})
    return done


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the data of a file, in whole pages; all of it where holes cannot be asked for."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after this
                return
            yield at, size - at  # a block device, or a file system without holes
            return
        start = max(at, start // PAGE * PAGE)
        end = min(size, -(-end // PAGE) * PAGE)
        if start < end:
            yield start, end - start
        at = max(end, at + 1)


def _read(fd: int, offset: int, length: int) -> bytes:
    """Exactly `length` bytes. Raises BadImage when the file ends before."""
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            raise BadImage(f"the image ends at byte {offset}, before its size", hint="did somebody truncate it?")
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _spooled:
    """A stream, copied to a file without a name in the store's directory, pages of zeros left out."""

    def __init__(self, store: Store, fd: int, cancelled: Cancelled) -> None:
        self._store, self._source, self._cancelled = store, fd, cancelled
        self._fd = -1

    def __enter__(self) -> int:
        self._fd = os.open(self._store.path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            self._copy()
        except BaseException:
            os.close(self._fd)
            raise
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _copy(self) -> None:
        at = 0
        while part := self._next():
            if at > limits.SIZE_MAX:
                raise BadSize("the image is larger than a volume can be")
            if part.count(0) != len(part):
                view = memoryview(part)
                done = 0
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], at + done)
            at += len(part)
        os.ftruncate(self._fd, at)

    def _next(self) -> bytes:
        """What comes next; empty at the end. A writer that is slow does not keep a cancelled import alive."""
        while not self._cancelled():
            if select.select([self._source], [], [], 0.2)[0]:
                return os.read(self._source, limits.MIB)
        raise Interrupted("the import was stopped", hint="nothing was left behind")
