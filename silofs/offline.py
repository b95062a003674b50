"""The verbs on a store that nobody serves: it is opened, under its lock, for as long as the verb takes.

Nobody writes meanwhile, so a volume's head can be read as it is. A command has a child do it (apart.py), since what the
disk cannot give ends the process that looks at it; what that was goes into quarantine, as when a daemon dies of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from silofs import apart, diffs, images, packing, raw_out, states, stream_fill, stream_in, stream_out, verbs
from silofs.errors import BadFormat, Damaged, NoDaemon, NoStore, SiloError, StoreError, UserError
from silofs.facts import Fields, View
from silofs.layers.directory import DATA_DIRECTORY, LOCK_FILE, take_lock
from silofs.layers.environment import DATA_FILE
from silofs.layers.memfd import SLOT
from silofs.layers.notes import Notes
from silofs.layers.policies import drain
from silofs.layers.quarantine import Quarantine
from silofs.layers.rewrite import Reap
from silofs.layers.store import Store
from silofs.limits import NOTES_MAX
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


def call(
    path: Path, verb: str, args: Fields, *, fds: Sequence[int] = (), progress: Progress | None = None
) -> Fields:
    """One verb on the store, in a child. Raises what `open_store` and `run` raise, and Damaged for what ends it."""
    lock_fd = Store.lock(path)
    try:
        with mmap.mmap(-1, NOTES_MAX * SLOT) as area:

            def work(say: Progress) -> Fields:
                notes = Notes(memoryview(area))
                with contextlib.closing(Store.open(path, lock_fd=lock_fd, notes=notes)) as store:
                    return run(store, verb, args, fds=fds, progress=say)

            try:
                return apart.run(work, progress or _silent)
            except apart.Killed as killed:
                raise _why(path, area, killed) from None
    finally:
        os.close(lock_fd)


def _why(path: Path, area: mmap.mmap, killed: apart.Killed) -> SiloError:
    """What a child died of. While the store's lock is still held. Raises StoreBroken when nothing goes on."""
    places: list[str] = []
    if killed.number == signal.SIGBUS:
        with memoryview(area) as view:
            notes = Notes(view)
            places = Store.learn(path, notes)
            notes.release()
    if places:
        Quarantine.load(path, path / DATA_DIRECTORY / DATA_FILE).refuse_all()
        more = f", and {len(places) - 1} more" if len(places) > 1 else ""
        hint = "all else goes on: run the same command again; silofs check --read-data says what else is lost"
        return Damaged(places[0] + more, hint=hint)
    if killed.number in (signal.SIGBUS, signal.SIGABRT, signal.SIGSEGV):
        hint = "silofs check --read-data says what is damaged; the system's log has the disk's errors"
        return StoreError(f"the store in {path} cannot be read: what read it died ({killed})", hint=hint)
    hint = "nothing is left half done: look with silofs ls, and run the same command again"
    return SiloError(f"what worked on the store in {path} died ({killed})", hint=hint)


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
    if verb in ("import", "import_stream", "import_abandon"):
        try:
            return _bring(store, verb, args, view, fds, report)
        finally:
            with contextlib.suppress(SiloError):  # what it came to is what counts; the rest goes with the next change
                drain(store, [Reap()])
    if verb == "export":
        return _export(store, args, _one(fds), report)
    if verb == "export_stream":
        return _send(store, args, _one(fds), report)
    if verb == "diff":
        return _diff(store, args, _one(fds), report)
    if verb == "check":
        return verbs.check(store, args, report)
    raise NoDaemon(f"{verb} needs the daemon")


def _bring(store: Store, verb: str, args: Fields, view: View, fds: Sequence[int], progress: Progress) -> Fields:
    """What brings data into the store, or drops what an interrupted import has brought."""
    if verb == "import_abandon":
        return store.write(lambda txn: stream_in.abandon(txn, args, view))
    if verb == "import_stream":
        return _receive(store, args, view, _one(fds), progress)
    store.write(images.reap)
    return _import(store, args, view, _one(fds), progress)


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
