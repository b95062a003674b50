"""The verbs on a store that nobody serves: this process opens it, under its lock, for as long as the verb takes.

Nobody writes meanwhile, so a volume's head can be read as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from silofs import diffs, images, packing, raw_out, states, stream_fill, stream_in, stream_out, verbs
from silofs.errors import BadFormat, NoDaemon, NoStore, UserError
from silofs.facts import Fields, View
from silofs.layers.policies import drain
from silofs.layers.rewrite import Reap
from silofs.layers.store import LOCK_FILE, Store, take_lock
from silofs.sink import Source
from silofs.stream import Decoder

Progress = Callable[[Fields], None]


def init(path: Path) -> Fields:
    """Make a store and its identity. Raises Exists, and OSError where no directory can be made."""
    from silofs.peers import identity

    Store.create(path)
    made = identity.ensure(path)
    with contextlib.closing(Store.open(path)) as store:
        uuid = store.uuid.hex()
    return {"store": str(path), "uuid": uuid, "fingerprint": made.fingerprint.hex()}


def open_store(path: Path) -> Store:
    """The store, locked; to be closed. Raises NoStore, StoreLocked, BadFormat."""
    return Store.open(path)


def repair(path: Path, agree: Callable[[Fields], None]) -> Fields:
    """Repair a store that nobody has open; StoreLocked otherwise. `agree` is shown what would be given up, and raises

    if that is not wanted: then nothing has changed. The result has what a check of the repaired store finds.
    """
    from silofs.layers import repair as build
    from silofs.layers.scrub import scrub

    if not (path / "data" / "data.mdb").exists():
        raise NoStore(f"there is no store in {path}")
    lock_fd = take_lock(path)
    try:
        _replay(path, lock_fd)
        mark = (path / LOCK_FILE).read_text().split()
        if len(mark) != 3 or len(mark[2]) != 32:
            raise BadFormat(f"{path / LOCK_FILE} does not say which store this is")
        try:
            found = build.Repair(path, bytes.fromhex(mark[2])).build()
            fields = {
                "store": str(path),
                "losses": [
                    {"what": loss.what, "name": loss.name, "message": loss.message, "ranges": loss.ranges}
                    for loss in found.losses
                ],
                "rebuilt": found.rebuilt,
                "volumes": found.volumes,
                "snapshots": found.snapshots,
            }
            agree(fields)
            kept = build.put_in_place(path, found.journal)
        except BaseException:
            build.drop(path)
            raise
    finally:
        os.close(lock_fd)
    findings = [finding.message for finding in scrub(path, read_data=True).findings]
    return {**fields, "damaged_store": str(kept), "findings": findings}


def _replay(path: Path, lock_fd: int) -> None:
    """Bring what the journal has into the store, if it can be opened; in a child, since damage may end it.

    Else the repaired store gets what can be read of it.
    """
    child = os.fork()
    if not child:
        try:
            Store.open(path, lock_fd=lock_fd).close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def run(store: Store, verb: str, args: Fields, *, fds: Sequence[int] = (), progress: Progress | None = None) -> Fields:
    """One verb, as Service.call does it in the daemon."""
    view = View(store.path)
    report = progress or _silent
    if verb in verbs.READS:
        reader = store.reader()
        try:
            return verbs.READS[verb](reader, args, view)
        finally:
            reader.close()
    if verb in verbs.WRITES:
        done = store.write(lambda txn: verbs.WRITES[verb](txn, args, view))
        drain(store, [Reap()])
        return done
    if verb == "import_abandon":
        return store.write(lambda txn: stream_in.abandon(txn, args, view))
    if verb == "import":
        store.write(images.reap)
        return _import(store, args, view, _one(fds), report)
    if verb == "export":
        return _export(store, args, _one(fds), report)
    if verb == "export_stream":
        return _send(store, args, _one(fds), report)
    if verb == "import_stream":
        return _receive(store, args, view, _one(fds), report)
    if verb == "diff":
        return _diff(store, args, _one(fds), report)
    if verb == "check":
        return verbs.check(store, args, report)
    raise NoDaemon(f"{verb} needs the daemon")


def _import(store: Store, args: Fields, view: View, fd: int, progress: Progress) -> Fields:
    loaded = images.load(store, fd, verbs.optional_size(args, "size"), progress=progress)
    try:
        return store.write(lambda txn: verbs.adopt(txn, args, view, loaded))
    except BaseException:
        images.drop(store, loaded.layer, loaded.holder)
        raise


def _export(store: Store, args: Fields, fd: int, progress: Progress) -> Fields:
    with contextlib.closing(store.reader()) as reader:
        state = states.exported(reader, args)
    return raw_out.write(store, state, fd, progress=progress)


def _diff(store: Store, args: Fields, fd: int, progress: Progress) -> Fields:
    with contextlib.closing(store.reader()) as reader:
        pair = states.compared(reader, args)
    return diffs.write(store, pair, fd, progress=progress)


def _send(store: Store, args: Fields, fd: int, progress: Progress) -> Fields:
    with contextlib.closing(store.reader()) as reader:
        sent = states.sent(reader, args)
    return stream_out.write(store, sent, fd, progress=progress)


def _receive(store: Store, args: Fields, view: View, fd: int, progress: Progress) -> Fields:
    verbs.name_in(args, "name")
    source = Source(fd, images.never)
    decoder = Decoder(source.read)
    target = store.write(lambda txn: stream_in.begin(txn, args, decoder.head, view))
    total = images.image_size(fd)
    stored = stream_fill.fill(
        store, target, decoder, source, progress=progress, total=total, batch_bytes=packing.BATCH_BYTES
    )
    fields = store.write(lambda txn: stream_in.publish(txn, target, view))
    return {**fields, **stored.fields(), "snapshot": decoder.head.snapshot}


def _one(fds: Sequence[int]) -> int:
    if len(fds) != 1:
        raise UserError("this verb takes one open file")
    return fds[0]


def _silent(_: Fields) -> None:
    pass
