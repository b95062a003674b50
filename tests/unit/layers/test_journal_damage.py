"""A journal that ends where nothing was synced yet is replayed; one that has lost what was synced is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from silofs.blocks import PAGE
from silofs.errors import Damaged
from silofs.layers.check import check
from silofs.layers.ending import Ending, look_behind
from silofs.layers.journal import BLOCK, DIRECTORY, Journal
from silofs.layers.log import WriteLog
from silofs.layers.pending import Pending
from silofs.layers.records import ALIGN, HEADER, WRAP, WRITE, Mark, header_at, walk
from silofs.layers.repair import Repair, Repaired, put_in_place
from silofs.layers.store import Store

RING = 16 * BLOCK  # fifteen records of a page, and a WRAP
SECTOR = 512
RECORD = HEADER + PAGE


class Host:
    """A store, its write log and its journal, with writes to volumes; what of it is synced and committed is told it."""

    def __init__(self, path: Path, *volumes: str) -> None:
        self.path = path
        Store.create(path)
        self.store = Store.open(path)
        made = [self.store.write(lambda txn, name=name: txn.create_volume(name, 64 * PAGE)) for name in volumes]  # type: ignore[misc]
        self.uuids = {volume.name: volume.uuid for volume in made}
        self.last = {volume.uuid: volume.applied_lsn for volume in made}
        self.fd = os.memfd_create("log")
        WriteLog.format(self.fd, self.store.uuid, RING)
        self.log = WriteLog.open(self.fd, self.store.uuid)
        self.secret = self.log.memory.superblock.secret
        self.journal = Journal.make(path / DIRECTORY, self.secret, self.store.uuid, RING)
        self.file = path / DIRECTORY / f"{self.journal.id:016x}"
        self.pendings: dict[bytes, Pending] = {}
        self.commit()

    def close(self) -> None:
        self.store.close()
        self.journal.close()
        os.close(self.fd)

    def write(self, name: str, page: int, data: bytes) -> int:
        uuid = self.uuids[name]
        if not self.log.room(len(data)):
            self.commit()
        lsn, position = self.log.append(WRITE, uuid, 1, self.last[uuid], page * PAGE, len(data), data)
        self.last[uuid] = lsn
        self.pendings.setdefault(uuid, Pending(uuid)).write(page * PAGE, position, len(data), lsn)
        return lsn

    def sync(self) -> None:
        """As Journalling does."""
        end = self.log.mark()
        self.journal.write(self.journal.stretch(self.log.ring, self.end, end))
        self.end = end
        self.log.synced = end.lsn

    def commit(self) -> None:
        mark, pendings = self.log.mark(), list(self.pendings.values())
        self.store.commit(pendings, self.log.ring, lambda txn: txn.count(journal=self.journal.id, mark=mark)).result()
        self.pendings = {}
        self.mark = self.end = mark
        self.log.release(mark)
        self.log.synced = mark.lsn

    def cut_power(self) -> None:
        self.store.close()

    # What is on the disk

    def places(self) -> dict[int, int]:
        """Where in the file the header of each LSN is that the journal has from its mark on; WRAP's as 0."""
        ring = memoryview(self.file.read_bytes())[BLOCK:]
        found = {}
        for record, _ in walk(ring, self.secret, self.mark):
            found[0 if record.kind == WRAP else record.lsn] = BLOCK + record.position - HEADER
        return found

    def spoil(self, at: int, length: int = 1, *, zero: bool = False) -> None:
        content = bytearray(self.file.read_bytes())
        content[at : at + length] = bytes(length) if zero else bytes(byte ^ 0x40 for byte in content[at : at + length])
        self.file.write_bytes(content)

    def refused(self) -> str:
        """The message with which the store does not open; and nothing has changed."""
        before = self.file.read_bytes(), self.named()
        with pytest.raises(Damaged) as caught:
            Store.open(self.path)
        assert (self.file.read_bytes(), self.named()) == before
        assert str(self.file) in caught.value.message and "\n" not in caught.value.message
        assert "check --repair" in caught.value.hint
        return caught.value.message

    def named(self) -> tuple[int, Mark, dict[str, int]]:
        with Store.open(self.path, replay=False) as store, store.reader() as txn:
            return txn.state.journal, txn.state.mark, {each.name: each.applied_lsn for each in txn.volumes()}

    def contents(self) -> dict[str, bytes]:
        """The first byte of every page of each volume, up to the last that is written."""
        found = {}
        with Store.open(self.path) as store, store.reader() as txn:
            assert txn.state.journal == 0
            assert check(txn, read_data=True) == []
            for volume in txn.volumes():
                leaf = txn.resolve(volume.head, 0).tolist()
                pages = bytes(bytes(txn.page(each))[0] if each else 0 for each in leaf)
                found[volume.name] = pages.rstrip(b"\0")
        return found

    def repair(self) -> Repaired:
        found = Repair(self.path, self.store.uuid).build()
        put_in_place(self.path, found.journal)
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "store", "vm1", "vm2")
    yield made
    made.close()


def synced_in_turns(host: Host, count: int = 6) -> list[int]:
    """Each write synced before the next, to vm1 and vm2 in turns: page N of vm1 gets N."""
    lsns = []
    for number in range(1, count + 1):
        lsns.append(host.write("vm2" if number % 2 == 0 else "vm1", number - 1, bytes([number]) * PAGE))
        host.sync()
    return lsns


PLACES = {
    "magic": 0, "lap": 8, "lsn": 16, "uuid": 32, "length": 64, "synced": 80, "unused": 100, "sum": 120,
    "payload": HEADER, "middle": HEADER + 2000, "end": RECORD - 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("which", "place", "zero"),
    [
        *((2, place, False) for place in PLACES),
        *((0, place, True) for place in ("magic", "lsn", "sum", "payload")),
        *((4, place, False) for place in ("magic", "synced", "end")),
    ],
)
def test_a_spoilt_byte_of_what_was_synced_is_told(host: Host, which: int, place: str, zero: bool) -> None:
    lsns = synced_in_turns(host)
    host.cut_power()
    host.spoil(host.places()[lsns[which]] + PLACES[place], zero=zero)
    message = host.refused()
    # LSNs go to both in turns; of vm1's fifth and last nothing behind it says whose it was, unless its header is whole.
    known = which < 4 or PLACES[place] >= HEADER
    assert message.endswith(f"LSN {lsns[which]} was synced and cannot be read, {'' if known else 'perhaps '}of 'vm1'")


@pytest.mark.parametrize("length", [SECTOR, BLOCK, 3 * BLOCK])
def test_whole_blocks_that_are_gone_are_told(host: Host, length: int) -> None:
    lsns = synced_in_turns(host, 8)
    host.cut_power()
    host.spoil(host.places()[lsns[1]] & -SECTOR, length, zero=True)
    assert f"LSN {lsns[0]}" in host.refused()


def test_what_is_sound_is_replayed(host: Host) -> None:
    """The negative control of all this: nothing was done to the file."""
    synced_in_turns(host)
    host.cut_power()
    assert host.contents() == {"vm1": b"\1\0\3\0\5", "vm2": b"\0\2\0\4\0\6"}


def test_without_a_witness_it_looks_like_a_torn_end(host: Host) -> None:
    """The other one: of records of earlier daemons, which say nothing, a lost one ends the replay without a word."""
    lsns = []
    for number in range(1, 5):
        host.log.synced = 0
        lsns.append(host.write("vm1", number - 1, bytes([number]) * PAGE))
        host.sync()
    host.cut_power()
    host.spoil(host.places()[lsns[1]] + 500)
    assert host.contents() == {"vm1": b"\1", "vm2": b""}


def test_of_what_was_synced_last_nobody_can_tell(host: Host) -> None:
    lsns = synced_in_turns(host)
    host.cut_power()
    host.spoil(host.places()[lsns[-1]] + 500)
    assert host.contents() == {"vm1": b"\1\0\3\0\5", "vm2": b"\0\2\0\4"}


def test_bytes_that_belong_to_no_record_are_of_no_consequence(host: Host) -> None:
    first = host.write("vm1", 0, b"\1" * 100)
    host.sync()
    host.write("vm1", 1, b"\2" * PAGE)
    host.sync()
    host.cut_power()
    at = host.places()[first] + HEADER + 100
    assert at % ALIGN
    host.spoil(at, -at % ALIGN)  # behind a payload
    host.spoil(BLOCK + host.log.mark().position + 1000, 500)  # and where nothing is yet
    assert host.contents()["vm1"] == b"\1\2"


def lapped(host: Host) -> list[int]:
    """Synced writes around the end of a lap."""
    while host.log.mark().position + 3 * RECORD < RING:
        host.write("vm1", 0, b"\x7f" * PAGE)
        host.sync()
    host.commit()
    lap = host.log.mark().lap
    lsns = synced_in_turns(host)
    assert host.log.mark().lap == lap + 1
    return lsns


@pytest.mark.parametrize("which", range(5))
def test_a_spoilt_byte_around_the_end_of_a_lap_is_told(host: Host, which: int) -> None:
    lsns = lapped(host)
    host.cut_power()
    host.spoil(host.places()[lsns[which]] + 300)
    assert f"LSN {lsns[which]} " in host.refused()


def test_a_spoilt_end_of_a_lap_is_told_and_a_repair_loses_nothing(host: Host) -> None:
    lapped(host)
    host.cut_power()
    host.spoil(host.places()[0])
    assert "all records can" in host.refused()
    assert host.repair().losses == []
    assert host.contents() == {"vm1": b"\1\0\3\0\5", "vm2": b"\0\2\0\4\0\6"}


def test_a_repair_keeps_all_of_a_volume_that_lacks_nothing_and_the_other_up_to_its_gap(host: Host) -> None:
    lsns = synced_in_turns(host, 8)
    host.cut_power()
    host.spoil(host.places()[lsns[2]] + 20)
    assert host.refused().endswith(f"LSN {lsns[2]} was synced and cannot be read, of 'vm1'")
    content = host.file.read_bytes()
    (loss,) = host.repair().losses
    assert (loss.what, loss.name) == ("journal", "vm1")
    lost = f"LSN {lsns[2]} to {lsns[6]}"
    assert loss.message == f"volume 'vm1' is as it was at LSN {lsns[0]}: its later writes, {lost}, are lost"
    assert host.contents() == {"vm1": b"\1", "vm2": b"\0\2\0\4\0\6\0\x08"}
    # The damaged store is kept with its journal: put back, they are what they were.
    assert (host.path / "data.damaged" / host.file.name).read_bytes() == content
    assert not host.file.exists()


def test_a_repair_says_of_which_volumes_a_record_may_have_been(host: Host) -> None:
    """Nothing behind the lost record of vm2 is vm2's, and vm1's say that it was not vm1's."""
    lsns = synced_in_turns(host, 3)
    host.cut_power()
    host.spoil(host.places()[lsns[1]] + 20)
    assert host.refused().endswith("cannot be read, perhaps of 'vm2'")
    (loss,) = host.repair().losses
    assert loss.message.startswith(f"volume 'vm2' may lack its last writes: LSN {lsns[1]} ")
    assert host.contents() == {"vm1": b"\1\0\3", "vm2": b""}


def test_a_header_without_its_payload_says_whose_it_was(host: Host) -> None:
    lsns = synced_in_turns(host, 3)
    host.cut_power()
    host.spoil(host.places()[lsns[1]] + 500)
    assert host.refused().endswith("cannot be read, of 'vm2'")
    assert [(loss.what, loss.name) for loss in host.repair().losses] == [("journal", "vm2")]
    assert host.contents() == {"vm1": b"\1\0\3", "vm2": b""}


def test_a_repair_of_a_sound_store_brings_its_journal_along(host: Host) -> None:
    synced_in_turns(host)
    host.cut_power()
    assert host.repair().losses == []
    assert host.contents() == {"vm1": b"\1\0\3\0\5", "vm2": b"\0\2\0\4\0\6"}


@pytest.mark.parametrize("seed", range(8))
def test_what_a_repair_gives_up_is_what_it_says(tmp_path: Path, seed: int) -> None:
    """Several places spoilt at random: each volume is a prefix of its writes, and none that lacks any is left out."""
    rng = random.Random(seed)
    wrote: dict[str, list[int]] = {name: [] for name in ("a", "b", "c", "idle")}
    with closing(Host(tmp_path / "store", *wrote)) as host:
        for byte in range(1, 13):
            name = rng.choice("abc")
            host.write(name, len(wrote[name]), bytes([byte]) * rng.choice([PAGE, 200]))
            wrote[name].append(byte)
            if byte > 10 or rng.random() < 0.7:
                host.sync()
        host.cut_power()
        places = host.places()
        for lsn in rng.sample(sorted(places)[:-1], rng.randint(1, 3)):
            host.spoil(places[lsn] + rng.choice([20, 90, 130]))
        host.refused()
        losses = host.repair().losses
        found = host.contents()
    for name, written in wrote.items():
        kept = len(found[name])
        assert found[name] == bytes(written[:kept])
        said = [loss.message for loss in losses if loss.name == name]
        assert len(said) <= 1
        assert said if kept < len(written) else not any("are lost" in message for message in said)


# Torn ends


class Disk:
    """A journal as the disk has it, sector by sector, and what the engine does to it. Nothing of it is a file."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("log")
        WriteLog.format(self.fd, b"S" * 16, RING)
        self.log = WriteLog.open(self.fd, b"S" * 16)
        self.secret = self.log.memory.superblock.secret
        self.content = bytearray(RING)
        self.mark = self.end = self.log.mark()
        self.flying: tuple[Mark, list[tuple[int, bytes]]] | None = None
        self.committing = self.mark

    def append(self, size: int) -> None:
        if not self.log.room(size):
            self.finish()
            self.cut()
            self.land()
        self.log.append(WRITE, b"V" * 16, 1, self.log.next_lsn - 1, 0, size, bytes([self.log.next_lsn % 251]) * size)

    def begin(self) -> None:
        """A write of the journal is under way; records are appended meanwhile."""
        if self.flying is not None:
            self.finish()
        end, start = self.log.mark(), self.end
        first, whole = start.position & -BLOCK, -(-end.position // BLOCK) * BLOCK
        pieces = [(first, whole)] if end.lap == start.lap else [(first, RING), (0, whole)]
        self.flying = end, [(at, bytes(self.log.ring[at:stop])) for at, stop in pieces]

    def finish(self) -> None:
        if self.flying is None:
            return
        end, pieces = self.flying
        self.flying = None
        for at, piece in pieces:
            self.content[at : at + len(piece)] = piece
        if end.lsn > self.end.lsn:
            self.end = end
            self.log.synced = max(self.log.synced, end.lsn)

    def cut(self) -> None:
        """A commit of everything begins."""
        self.committing = self.log.mark()

    def land(self) -> None:
        """It is durable, whatever is under way, and the store's mark with it."""
        mark = self.committing
        if mark.lsn > self.mark.lsn:
            self.mark = mark
            if mark.lsn > self.end.lsn:
                self.end = mark
            self.log.release(mark)
            self.log.synced = max(self.log.synced, mark.lsn)

    def ending(self, content: bytearray | None = None) -> Ending:
        ring = memoryview(bytes(content or self.content))
        end = [self.mark, *(after for _, after in walk(ring, self.secret, self.mark))][-1]
        return look_behind(ring, self.secret, end)

    def torn(self, arrived: list[bool], *, landed: bool = False) -> Ending:
        """After a power cut in the write under way, of which these sectors have arrived.

        `landed`: the commit as well, and nobody here has been told.
        """
        if landed and self.committing.lsn > self.mark.lsn:
            self.mark = self.committing
        content = bytearray(self.content)
        lost = iter(arrived)
        if self.flying is not None:
            for at, piece in self.flying[1]:
                for sector in range(0, len(piece), SECTOR):
                    if next(lost, True):
                        content[at + sector : at + sector + SECTOR] = piece[sector : sector + SECTOR]
        return self.ending(content)

    def close(self) -> None:
        os.close(self.fd)


SIZES = st.one_of(st.integers(0, 600), st.sampled_from([PAGE, 2 * PAGE, 9000]))
STEPS = st.lists(st.one_of(SIZES, SIZES, st.sampled_from(["begin", "finish", "cut", "land"])), max_size=60)
ARRIVED = st.lists(st.booleans(), min_size=RING // SECTOR + 8, max_size=RING // SECTOR + 8)


def tell(disk: Disk, steps: list[int | str]) -> None:
    for step in steps:
        if isinstance(step, int):
            disk.append(step)
        else:
            getattr(disk, step)()


@settings(max_examples=100)
@given(steps=STEPS, arrived=ARRIVED, landed=st.booleans(), data=st.data())
def test_a_torn_end_is_never_called_damage(
    steps: list[int | str], arrived: list[bool], landed: bool, data: st.DataObject
) -> None:
    """Whatever sectors of the write under way have arrived, in any order; over a WRAP, over leftovers of laps."""
    with closing(Disk()) as disk:
        tell(disk, steps)
        disk.begin()
        tell(disk, data.draw(st.lists(SIZES, max_size=3), label="appended meanwhile"))
        ending = disk.torn(arrived, landed=landed)
        assert not ending.damaged and not ending.missing()
        assert ending.lsn >= disk.log.synced


def test_a_log_that_promises_too_much_is_noticed() -> None:
    """The negative control: records that call durable what is only written are taken for witnesses."""
    with closing(Disk()) as disk:
        for _ in range(4):
            disk.log.synced = disk.log.next_lsn
            disk.append(PAGE)
        disk.begin()
        assert disk.torn([False] * 9).damaged


@settings(max_examples=100)
@given(steps=STEPS, last=st.integers(0, 600), data=st.data())
def test_whatever_is_spoilt_of_what_was_synced_is_damage_if_a_later_record_knows(
    steps: list[int | str], last: int, data: st.DataObject
) -> None:
    with closing(Disk()) as disk:
        tell(disk, steps)
        disk.append(100)
        disk.begin()
        disk.finish()
        disk.append(last)
        disk.begin()
        disk.finish()
        ring = memoryview(bytes(disk.content))
        records = [record for record, _ in walk(ring, disk.secret, disk.mark)]
        known = [each for each in records if each.lsn < disk.end.lsn - 1]
        assume(known)  # a commit may have taken all but the last
        victim = data.draw(st.sampled_from(known), label="record")
        length = HEADER + (0 if victim.kind == WRAP else victim.length)
        at = victim.position - HEADER + data.draw(st.integers(0, length - 1), label="byte")
        disk.content[at] ^= data.draw(st.integers(1, 255), label="bits")
        ending = disk.ending()
        assert ending.damaged and ending.lsn == victim.lsn
        assert list(ending.missing()) == ([] if victim.kind == WRAP else [(victim.lsn, victim.lsn + 1)])


def test_a_header_that_a_guest_copies_is_no_witness() -> None:
    """What a guest writes has another secret; what is older than the mark says nothing new."""
    with closing(Disk()) as disk, closing(Disk()) as other:
        for each in (other, disk):
            for _ in range(3):
                each.append(PAGE)
                each.begin()
                each.finish()
        forged = bytes(other.content[2 * RECORD : 2 * RECORD + HEADER])
        assert header_at(memoryview(other.content), other.secret, 2 * RECORD) is not None
        disk.content[RING - BLOCK : RING - BLOCK + HEADER] = forged
        assert not disk.ending().damaged
        disk.content[RECORD:] = bytes(RING - RECORD)
        disk.content[RING - BLOCK : RING - BLOCK + HEADER] = forged
        assert not disk.ending().damaged
