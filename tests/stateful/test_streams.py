"""Two stores that exchange streams, at random: any state that is sent on top of any other arrives as it was."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest

from silofs import images, states, stream_fill, stream_in, stream_out
from silofs.blocks import LEAF_BYTES, PAGE
from silofs.errors import BadStream
from silofs.facts import View
from silofs.sink import Source
from silofs.stream import Decoder
from tests.storerig import Rig, page_bytes, read_layer

SIZE = 3 * LEAF_BYTES


def quiet(_: object) -> None:
    pass


def export(rig: Rig, snapshot: str, since: str | None, fd: int) -> None:
    args = {"volume": "vm1", "snapshot": snapshot}
    if since is not None:
        args |= {"since": "vm1", "since_snapshot": since}
    with rig.store.reader() as txn:
        sent = states.sent(txn, args)  # type: ignore[arg-type]
    stream_out.write(rig.store, sent, fd, progress=quiet)


def load(rig: Rig, name: str, fd: int, *, onto: bool) -> stream_fill.Stored:
    """As silofs.offline does it."""
    os.lseek(fd, 0, os.SEEK_SET)
    source, view = Source(fd, images.never), View(rig.path)
    decoder = Decoder(source.read)
    args = {"name": name, "onto": onto}
    target = rig.store.write(lambda txn: stream_in.begin(txn, args, decoder.head, view))
    stored = stream_fill.fill(
        rig.store, target, decoder, source, progress=quiet, total=None, batch_bytes=random.choice([1, 1 << 18, 1 << 24])
    )
    rig.store.write(lambda txn: stream_in.publish(txn, target, view))
    return stored


def content(rig: Rig, name: str, snapshot: str | None = None) -> bytes:
    with rig.store.reader() as txn:
        volume = txn.volume_by_name(name)
        if snapshot is None:
            return read_layer(txn, volume.head, volume.size)
        taken = txn.find_snapshot(volume.uuid, snapshot)
        return read_layer(txn, taken.layer, taken.size)


def change(rig: Rig, uuid: bytes, rng: random.Random, serial: int) -> None:
    """A few writes, discards and resizes."""
    with rig.store.reader() as txn:
        size = txn.volume(uuid).size
    pages = size // PAGE
    for at in range(rng.randrange(1, 40)):
        page = rng.randrange(pages)
        data = bytes(PAGE) if rng.random() < 0.2 else page_bytes(rng.randrange(50), serial + at % 3)
        rig.write(uuid, page * PAGE, data[: rng.choice([PAGE, 512])])
    if rng.random() < 0.5:
        first = rng.randrange(pages)
        rig.zero(uuid, first, min(pages, first + rng.randrange(1, 900)))
    rig.commit()
    if rng.random() < 0.4:
        wanted = rng.randrange(8, SIZE // 512) * 512
        rig.store.write(lambda txn: txn.resize(uuid, wanted))


@pytest.mark.parametrize("seed", range(8))
def test_any_state_on_top_of_any_other(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    here, there = Rig(tmp_path / "here"), Rig(tmp_path / "there")
    uuid = here.store.write(lambda txn: txn.create_volume("vm1", SIZE)).uuid
    copies: dict[str, str] = {}  # snapshot here -> the volume there that is at it
    layers: dict[str, int] = {}
    for step in range(10):
        if layers and rng.random() < 0.3:
            back = layers[rng.choice(list(layers))]
            here.store.write(lambda txn, back=back: txn.rollback(uuid, back))
        change(here, uuid, rng, step * 100)
        name = f"s{step}"
        layers[name] = here.store.write(lambda txn, name=name: txn.take_snapshot(uuid, name)).layer
        wanted = content(here, "vm1")
        since = rng.choice([None, *copies])
        with tempfile.TemporaryFile() as file:
            fd = file.fileno()
            export(here, name, since, fd)
            length = os.fstat(fd).st_size
            if rng.random() < 0.3:  # the export broke off, and goes on
                whole = os.pread(fd, length, 0)
                os.ftruncate(fd, rng.randrange(length))
                export(here, name, since, fd)
                assert os.pread(fd, length + 1, 0) == whole
            target = f"copy{step}" if since is None else copies.pop(since)
            if rng.random() < 0.5:  # the import broke off, and goes on
                before = content(there, target) if since is not None else None
                with tempfile.TemporaryFile() as part:
                    part.write(os.pread(fd, rng.randrange(length), 0))
                    part.flush()
                    with pytest.raises(BadStream):
                        load(there, target, part.fileno(), onto=since is not None)
                if before is not None:
                    assert content(there, target) == before
            load(there, target, fd, onto=since is not None)
        copies[name] = target
        assert content(there, target) == wanted
        assert content(there, target, name) == wanted
        for snapshot, volume in copies.items():
            assert content(there, volume, snapshot) == content(here, "vm1", snapshot)
    assert there.findings() == []
    with there.store.reader() as txn:
        assert not [layer for layer in txn.layers() if layer.pins]
    here.close()
    there.close()
